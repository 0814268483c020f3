"""`ctcgrpo evaluate`: a benchmark played by Inspect into a folder, once; what was cut off or failed is played again by the same
command.

evaluation.json   what was asked for
logs/             Inspect's own (inspect view start --log-dir FOLDER/logs)
results.jsonl     every dialogue
summary.json      the figures
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import inspect_ai
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.log import EvalLog
from inspect_ai.model import GenerateConfig, Model, get_model
from rich.errors import MarkupError
from rich.text import Text

from ctcgrpo.environments.eibench.scenarios import load_set
from ctcgrpo.errors import CtcGrpoError, OutputError, PolicyError, RecipeError, RunInterrupted
from ctcgrpo.evaluation import _registry
from ctcgrpo.evaluation.benches import EIBENCH, EQBENCH3, named
from ctcgrpo.evaluation.fingerprints import fingerprint
from ctcgrpo.evaluation.generation import LOCAL_TOKENS, SAMPLING, names_of
from ctcgrpo.evaluation.logs import newest_log, results_of
from ctcgrpo.evaluation.played import data_set, settings_of, trained_as
from ctcgrpo.evaluation.presets import TRIES, asks_an_llm, preset_of
from ctcgrpo.evaluation.reasons import PATIENCE
from ctcgrpo.evaluation.results import summarise, write_results
from ctcgrpo.evaluation.users import TEMPERATURE
from ctcgrpo.run.folders import check_model, is_model
from ctcgrpo.run.recipe_file import differences
from ctcgrpo.simulator.choice import named_simulator
from ctcgrpo.util.files import read_json, write_whole
from ctcgrpo.util.proxies import settle_environment
from ctcgrpo.util.sections import named_value

LOCAL = "ctcgrpo/"
"""The provider of policies in folders."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is evaluated, on what, and how. `task` are the arguments of the benchmark's task, `generation` those of sampling
    (temperature, top_p, max_tokens, ...), `roles` models by role, `role_generation` the sampling of those, `model_args` what the
    model's provider takes. `preset` names the settings that these were taken from, where they were."""

    bench: str
    model: str
    task: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    role_generation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    preset: str | None = None


def model_name(model: str, option: str = "--model") -> str:
    """How Inspect is told of a model: folders are policies of ours, anything else is PROVIDER/NAME. Raises PolicyError for what is
    neither."""
    check_model(model, option)
    if is_model(Path(model).expanduser()):
        return f"{LOCAL}{model}"
    if "/" not in model:
        raise PolicyError(
            f"{option} {model!r} is neither a folder with a model (checkpoints/RUN/final) nor PROVIDER/NAME (openai/gpt-4o, "
            "openai-api/local/NAME, hf/NAME, vllm/NAME)"
        )
    return model


def evaluate(
    wanted: Evaluation,
    folder: Path,
    *,
    display: str = "plain",
    connections: int | None = None,
    price: tuple[float, float] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The summary of an evaluation, which stands in `folder` with all that it comes from. `price`: US dollars for a million
    tokens that the model reads and writes.

    Raises OutputError where the folder holds another evaluation, or one of other data or another policy under the same name;
    RecipeError and PolicyError for what cannot be evaluated here; RunInterrupted on Ctrl-C: the same call goes on.
    """
    wanted = with_defaults(wanted)
    settle_environment()  # for the providers' clients
    bench = named(wanted.bench)
    logs = folder / "logs"
    log = newest_log(logs, say)
    default = inspect.signature(_registry.eibench).parameters["scenarios"].default
    of = fingerprint(bench.name, wanted.model.removeprefix(LOCAL), wanted.task, default)
    _keep_to(folder, {**asdict(wanted), "of": of}, begun=log is not None)
    options: dict[str, Any] = {
        "log_dir": str(logs),
        "display": display,
        "fail_on_error": False,
        "log_level": "warning",
        "log_buffer": 1,  # what a model has said is paid for: it is written down as soon as a dialogue is over
        "max_samples": connections,
    }
    if connections is not None:
        options["max_connections"] = connections
    try:
        if log is None or not log.eval.dataset.sample_ids:
            played = inspect_ai.eval(
                f"ctcgrpo/{bench.name}",
                model=wanted.model,
                model_args=dict(wanted.model_args),
                model_roles=_role_models(wanted) or None,
                task_args=dict(wanted.task),
                limit=wanted.limit,
                **options,
                **{"timeout": PATIENCE, **wanted.generation},
            )
        elif log.status != "success" or _failed(log):
            played = inspect_ai.eval_retry(log.location, **options)
        else:
            say(f"{folder} was played on {log.eval.created[:10]}: nothing is played again")
            played = [log]
    except CtcGrpoError:
        raise
    except KeyboardInterrupt:
        raise RunInterrupted("interrupted; the same command goes on") from None
    except Exception as error:
        raise _explained(error, wanted) from error
    finally:
        _close_policies()
    if not played or played[0].status == "cancelled":  # Inspect takes Ctrl-C for an answer
        raise RunInterrupted("interrupted; the same command goes on")
    log = played[0]
    if log.status == "error":
        raise PolicyError(f"{wanted.bench} could not be played: {log.error.message if log.error else 'no reason given'}")
    results, facts = results_of(log)
    facts |= {"data": of["data"], "data_set": data_set(bench.name, wanted.task, default)}
    if "instructions" in of:
        facts["instructions"] = of["instructions"]
    if bench.name == EIBENCH.name:
        whole = load_set(wanted.task.get("scenarios", default), "test", wanted.task.get("invalid", "skip"))
        facts["skipped"] = {"count": whole.skipped, "records": whole.records, "faults": list(map(str, whole.faults))}
    if (trained := trained_as(Path(wanted.model.removeprefix(LOCAL)))) is not None:
        facts["trained"] = trained.told
        if bench.name == EIBENCH.name:
            facts["unlike_trained"] = trained.differences(settings_before(wanted))
    facts["settings"] = settings_of(facts)
    if wanted.preset is not None:
        facts["preset"] = {
            "name": wanted.preset,
            "differs": preset_of(wanted.preset).differences(settings_before(wanted)),
        }
    if price is not None:
        facts["prices"] = {**facts["prices"], "model": {"input": price[0], "output": price[1], "currency": "USD"}}
    summary = summarise(bench, results, facts)
    write_results(folder, results, summary)
    return summary


def _role_models(wanted: Evaluation) -> dict[str, Model]:
    return {
        role: get_model(name, config=GenerateConfig(**{"timeout": PATIENCE, **wanted.role_generation.get(role, {})}))
        for role, name in wanted.roles.items()
    }


def _close_policies() -> None:
    """Give back what local policies hold, where there are any: importing them takes PyTorch."""
    module = sys.modules.get("ctcgrpo.evaluation.local_policy")
    if module is not None:
        module.close_all()


def _failed(log: EvalLog) -> bool:
    return log.results is None or log.results.completed_samples < log.results.total_samples


def _keep_to(folder: Path, asked: Mapping[str, Any], *, begun: bool) -> None:
    """A folder holds one evaluation."""
    file = folder / "evaluation.json"
    asked = json.loads(json.dumps(asked))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if begun and file.exists():
            before = read_json(file)
            if not isinstance(before, dict):
                raise OutputError(f"{file} is no record of an evaluation; choose another folder with --out")
            if changed := differences(before, asked):
                raise OutputError(f"{folder} holds another evaluation ({'; '.join(changed)}); choose another with --out")
        write_whole(file, json.dumps(asked, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}); choose another with --out") from None


def _explained(error: Exception, wanted: Evaluation) -> Exception:
    """What Inspect and its providers raise for a user's mistake, as one line; anything else as it is."""
    told = _plain(" ".join(str(getattr(error, "message", error)).split())).removeprefix("ERROR: ")
    others = "".join(f", --{role} {name}" for role, name in wanted.roles.items())
    where = f"--model {wanted.model}{others}"
    if isinstance(error, PrerequisiteError) or "not recognized" in told:
        return RecipeError(f"{where}: {told}")
    if isinstance(error, TypeError) and "unexpected keyword" in told:
        return RecipeError(f"-M: {told}")
    if isinstance(error, OSError):
        return PolicyError(f"{where}: {told}")
    return error


def _plain(text: str) -> str:
    """Without rich's markup, where it is markup."""
    try:
        return Text.from_markup(text).plain
    except MarkupError:
        return text


def settled(parts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE arguments (of a provider or a task). Raises RecipeError for one of another form."""
    return dict(named_value(part, "argument", "NAME=VALUE") for part in parts)


def with_defaults(wanted: Evaluation) -> Evaluation:
    """The settings that depend on who is evaluated and who plays the user, where nobody named them: what becomes of earlier
    reasoning, tries of the user's LLM, and tokens of a reply."""
    task, generation = dict(wanted.task), dict(wanted.generation)
    is_local = wanted.model.startswith(LOCAL)
    trained = trained_as(Path(wanted.model.removeprefix(LOCAL))) if is_local else None
    if wanted.bench == EIBENCH.name:
        task.setdefault("reasoning", "strip" if trained is None else trained.task["reasoning"])
        simulator = task.get("simulator")
        if asks_an_llm(simulator):
            llm = None if simulator is None else named_simulator(simulator).llm
            task.setdefault("tries", TRIES if llm is None else llm.tries)
    reasons = trained is not None and trained.recipe.policy.reasons
    limited = wanted.bench == EQBENCH3.name or "model.max_tokens" in names_of(task.get("unset", ""))
    if is_local and not reasons and not limited:
        generation.setdefault("max_tokens", LOCAL_TOKENS)
    return replace(wanted, task=task, generation=generation)


def settings_before(wanted: Evaluation) -> dict[str, Any]:
    """The settings that an evaluation of eibench will have: arguments of the task and of sampling together, and how an LLM that
    plays the user is sampled."""
    wanted = with_defaults(wanted)
    defaults = {name: parameter.default for name, parameter in inspect.signature(_registry.eibench).parameters.items()}
    unset = names_of(wanted.task.get("unset", ""))
    sampling = {n: value for n, value in SAMPLING.model_dump(exclude_none=True).items() if f"model.{n}" not in unset}
    played = {**defaults, **sampling, **wanted.task, **wanted.generation}
    if "tries" not in wanted.task:
        del played["tries"]
    elif (simulator := wanted.task.get("simulator")) is not None:
        llm = named_simulator(simulator).llm
        played |= {"simulator_temperature": llm and llm.temperature, "simulator_top_p": llm and llm.top_p}
    else:
        sampled = {"temperature": TEMPERATURE, **wanted.role_generation.get("simulator", {})}
        played |= {
            f"simulator_{n}": None
            if f"simulator.{n}" in unset and n not in wanted.role_generation.get("simulator", {})
            else sampled.get(n)
            for n in ("temperature", "top_p")
        }
    return {**played, "simulator": wanted.roles.get("simulator", played["simulator"])}


def task_options(bench: str) -> list[str]:
    """The arguments of a benchmark's task."""
    return list(inspect.signature(getattr(_registry, bench)).parameters)
