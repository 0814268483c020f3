"""What can go wrong, in one place: one error type per boundary, each with an exit code.

    boundary              type                    exit   in an episode
    recipe, overrides     RecipeError             2      -
    credit of one's own   CreditError             2      -
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

A bad episode is data, not a result: it is recorded with its reason and left out of every statistic. What the policy
itself causes (an empty, cut or broken reply) is an outcome and never comes here. Messages name the file, the field, the
value and what would be right; users see the message, not a traceback.
"""


class CtcGrpoError(Exception):
    """Base of all errors that a user can cause or mend."""

    exit_code = 1
    kind = "error"


class RecipeError(CtcGrpoError):
    exit_code = 2
    kind = "recipe"


class CreditError(CtcGrpoError):
    """A credit, centering or scale of one's own raised something, or gave what no advantage can be made of."""

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
    """A judge that gives no verdict: a failed item of an evaluation."""

    exit_code = 5
    kind = "judge"


class DeadlinePassed(CtcGrpoError):
    """An episode that was still going on at rollout.deadline."""

    kind = "deadline"


class EnvironmentFailed(CtcGrpoError):
    """An environment raised something of its own, took too long, or gave a value that its contract does not know (a reward or an
    outcome that is not finite)."""

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
    """Runs of a sweep ended with errors of their own, or requests for scenarios got no answer."""

    exit_code = 10
    kind = "runs"


class GateFailed(CtcGrpoError):
    """An evaluation ended well, with a score below what was asked for."""

    exit_code = 9
    kind = "gate"


class RunPaused(CtcGrpoError):
    """The run cannot go on for now: it saves, says why, and goes on with the same command. Never a failed episode."""


class BudgetSpent(RunPaused):
    exit_code = 8
    kind = "budget_spent"


class RunInterrupted(RunPaused):
    exit_code = 130
    kind = "interrupted"


EPISODE_ERRORS = (PolicyEngineError, SimulatorTransportError, SimulatorReplyError, EnvironmentFailed, DeadlinePassed)
"""What turns an episode into a failed one; anything else is a defect of this program and stops it."""


def too_many_failed(failed: int, episodes: int, limit: float) -> bool:
    """Whether so many episodes failed that the rest says nothing: more than the share `limit`, or all of them."""
    return failed == episodes or failed > limit * episodes
