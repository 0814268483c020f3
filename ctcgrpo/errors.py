"""The error model: one error type per boundary, each with an exit code.

    boundary              type                    exit   in an episode
    recipe, overrides     RecipeError             2      -
    custom credit         CreditError             2      -
    scenario records      ScenarioError           3      -
    model, tokenizer      PolicyError             4      -
    policy engine         PolicyEngineError       4      a failed episode
    simulator transport   SimulatorTransportError 5      a failed episode
    simulator reply       SimulatorReplyError     5      a failed episode
    judge                 JudgeReplyError         5      -
    run folder            OutputError             6      -
    too many failures     TooManyFailures         7      stops the run after saving
    simulator's budget    BudgetSpent             8      stops the run after saving
    NaN in training       TrainingDiverged        11     stops the run; its last checkpoint stays
    evaluation's gate     GateFailed              9      -
    runs, requests        RunFailed               10     -
    Ctrl-C                RunInterrupted          130    stops the run after saving

A failed episode is recorded with its reason and excluded from every statistic. What the policy causes (an empty, cut or
malformed reply) is an outcome, never an error. Messages name the file, the field, the value and what is expected; users
see the message, not a traceback.
"""


class CtcGrpoError(Exception):
    """Base class of errors that a user can cause or fix."""

    exit_code = 1
    kind = "error"


class RecipeError(CtcGrpoError):
    exit_code = 2
    kind = "recipe"


class CreditError(CtcGrpoError):
    """A custom credit, centering or scale raised an exception or returned an invalid value."""

    exit_code = 2
    kind = "credit"


class ScenarioError(CtcGrpoError):
    exit_code = 3
    kind = "scenario"


class PolicyError(CtcGrpoError):
    exit_code = 4
    kind = "policy"


class PolicyEngineError(CtcGrpoError):
    exit_code = 4
    kind = "policy_engine"


class SimulatorTransportError(CtcGrpoError):
    exit_code = 5
    kind = "simulator_transport"


class SimulatorReplyError(CtcGrpoError):
    exit_code = 5
    kind = "simulator_reply"


class JudgeReplyError(CtcGrpoError):
    """The judge returned no verdict: a failed item of an evaluation."""

    exit_code = 5
    kind = "judge"


class DeadlinePassed(CtcGrpoError):
    """An episode was unfinished at rollout.deadline."""

    kind = "deadline"


class EnvironmentFailed(CtcGrpoError):
    """An environment raised an exception, exceeded its timeout, or returned an invalid value (such as a reward or an outcome that
    is not finite)."""

    kind = "environment"


class OutputError(CtcGrpoError):
    exit_code = 6
    kind = "output"


class TooManyFailures(CtcGrpoError):
    exit_code = 7
    kind = "too_many_failures"


class TrainingDiverged(CtcGrpoError):
    """A loss, a gradient or a weight is NaN or infinite: nothing of this step is saved."""

    exit_code = 11
    kind = "diverged"


class RunFailed(CtcGrpoError):
    """Runs of a sweep failed, or requests for scenarios got no response."""

    exit_code = 10
    kind = "runs"


class GateFailed(CtcGrpoError):
    """An evaluation finished with a score below the required one."""

    exit_code = 9
    kind = "gate"


class RunPaused(CtcGrpoError):
    """The run pauses: it saves a checkpoint and logs the reason; the same command resumes it. Never a failed episode."""


class BudgetSpent(RunPaused):
    exit_code = 8
    kind = "budget_spent"


class RunInterrupted(RunPaused):
    exit_code = 130
    kind = "interrupted"


EPISODE_ERRORS = (PolicyEngineError, SimulatorTransportError, SimulatorReplyError, EnvironmentFailed, DeadlinePassed)
"""Errors that make a failed episode. Any other exception is a bug of this program and stops it."""


def too_many_failed(failed: int, episodes: int, limit: float) -> bool:
    """Whether too many episodes failed for the others to be representative: more than the share `limit`, or all of them."""
    return failed == episodes or failed > limit * episodes
