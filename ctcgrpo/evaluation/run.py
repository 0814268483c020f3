"""`ctcgrpo evaluate`: plays a benchmark with Inspect into a folder. The same command resumes it, and re-runs interrupted and
failed dialogues.

evaluation.json   model, benchmark and settings
logs/             Inspect's own (inspect view start --log-dir FOLDER/logs)
results.jsonl     every dialogue
summary.json      the figures
"""

import asyncio
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import inspect_ai
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.log import EvalLog
from inspect_ai.model import GenerateConfig, get_model

from ctcgrpo.environments.eibench.scenarios import load_set
from ctcgrpo.environments.sage_protocol import load_profiles
from ctcgrpo.errors import CtcGrpoError, OutputError, PolicyError, RecipeError, RunInterrupted
from ctcgrpo.evaluation import _registry
from ctcgrpo.evaluation.benches import EIBENCH, EQBENCH3, data_folder, named
from ctcgrpo.evaluation.eqbench3_protocol import load_eqbench
from ctcgrpo.evaluation.generation import LOCAL_TOKENS, SAMPLING, names_of
from ctcgrpo.evaluation.played import BRIEFING, data_set, settings_of, trained_as, validated_as
from ctcgrpo.evaluation.presets import TRIES, asks_an_llm, preset_differences, with_preset
from ctcgrpo.evaluation.reasons import PATIENCE, plain
from ctcgrpo.evaluation.record import newest_log, results_of
from ctcgrpo.evaluation.results import summarise, write_results
from ctcgrpo.evaluation.users import TEMPERATURE, chosen_user
from ctcgrpo.policy.instructions import DEFAULT_INSTRUCTIONS, load_instructions
from ctcgrpo.run.folders import check_model, is_model
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.simulator.choice import SCRIPTED, named_simulator
from ctcgrpo.simulator.llm.backend import chosen_prompts
from ctcgrpo.util.files import missing_in, read_json, write_whole
from ctcgrpo.util.naming import differences
from ctcgrpo.util.proxies import settle_environment
from ctcgrpo.util.sections import named_value

LOCAL = "ctcgrpo/"  # the provider of policies in folders
_POLICY_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is evaluated, on what, and how. `task`: arguments of the benchmark's task; `generation`: of sampling (temperature,
    top_p, max_tokens, ...); `roles`: models by role; `role_generation`: the sampling of those; `model_args`: what the model's
    provider takes; `preset`: the settings that these were taken from, where they were."""

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
    """Inspect's name of a model: a local policy for a folder, else PROVIDER/NAME. Raises PolicyError for anything else."""
    check_model(model, option)
    if is_model(Path(model).expanduser()):
        return f"{LOCAL}{model}"
    if "/" not in model:
        user = "scripted, a file of configs/simulator, a simulator server's URL, " if option == "--simulator" else ""
        raise PolicyError(
            f"{option} {model!r}: expected {user}a folder with a model (checkpoints/RUN/final) or PROVIDER/NAME (openai/gpt-4o, "
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
    log_line: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Play an evaluation into `folder`; gives its summary. `price`: US dollars per million input and output tokens.
    Raises OutputError where the folder holds another evaluation, or one of other data or another
    policy under the same name; RecipeError and PolicyError for what cannot be evaluated here; RunInterrupted on Ctrl-C; the same
    call resumes."""
    wanted = with_defaults(wanted)
    settle_environment()  # for the providers' clients
    bench = named(wanted.bench)
    default = inspect.signature(_registry.eibench).parameters["scenarios"].default
    of = _fingerprint(bench.name, wanted.model.removeprefix(LOCAL), wanted.task, default)
    options: dict[str, Any] = {
        "log_dir": str(folder / "logs"),
        "display": display,
        "fail_on_error": False,
        "log_level": "warning",
        "log_buffer": 1,  # replies are paid for: each dialogue is written as soon as it ends
        "max_samples": connections,
        "max_connections": connections,
    }
    newest = newest_log(folder / "logs", log_line)
    with _recorded(folder, {**asdict(wanted), "of": of}, newest) as log:
        try:
            if log is None or not log.eval.dataset.sample_ids:
                roles = {
                    role: get_model(name, config=GenerateConfig(**{"timeout": PATIENCE, **wanted.role_generation.get(role, {})}))
                    for role, name in wanted.roles.items()
                }
                played = inspect_ai.eval(
                    f"ctcgrpo/{bench.name}",
                    model=wanted.model,
                    model_args={name: value for name, value in wanted.model_args.items() if name != "base_url"},
                    model_base_url=wanted.model_args.get("base_url"),
                    model_roles=roles or None,
                    task_args=dict(wanted.task),
                    limit=wanted.limit,
                    **options,
                    **{"timeout": PATIENCE, **wanted.generation},
                )
            elif log.status != "success" or log.results is None or log.results.completed_samples < log.results.total_samples:
                played = inspect_ai.eval_retry(log.location, **options)
            else:
                log_line(f"{folder}: complete since {log.eval.created[:10]}, nothing to play")
                played = [log]
        except CtcGrpoError:
            raise
        except KeyboardInterrupt:
            raise RunInterrupted("interrupted; the same command resumes") from None
        except Exception as error:
            raise _explained(error, wanted) from error
        finally:
            _close_policies()
        if not played or played[0].status == "cancelled":  # Inspect returns after Ctrl-C
            raise RunInterrupted("interrupted; the same command resumes")
        log = played[0]
        if log.status == "error":
            raise PolicyError(f"{wanted.bench} failed: {log.error.message if log.error else 'no reason given'}")
    results, facts = results_of(log)
    facts |= {"data": of["data"], "data_set": data_set(bench.name, wanted.task, default)}
    if "instructions" in of:
        facts["instructions"] = of["instructions"]
    if bench.name == EIBENCH.name:
        whole = load_set(wanted.task.get("scenarios", default), "test", wanted.task.get("invalid", "skip"))
        facts["skipped"] = {"count": whole.skipped, "records": whole.records, "faults": list(map(str, whole.faults))}
    if (trained := trained_as(Path(wanted.model.removeprefix(LOCAL)))) is not None:
        facts["trained"] = trained.description
        if bench.name == EIBENCH.name:
            facts["unlike_trained"] = trained.differences(settings_before(wanted))
    facts["settings"] = settings_of(facts)
    if wanted.preset is not None:
        facts["preset"] = {"name": wanted.preset, "differs": preset_differences(wanted.preset, settings_before(wanted))}
    if price is not None:
        facts["prices"] = {**facts["prices"], "model": {"input": price[0], "output": price[1], "currency": "USD"}}
    summary = summarise(bench, results, facts)
    write_results(folder, results, summary)
    return summary


def _close_policies() -> None:
    """Free the memory of local policies, if the module was imported: importing it loads PyTorch."""
    if (module := sys.modules.get("ctcgrpo.evaluation.local_policy")) is not None:
        module.close_all()


@contextmanager
def _recorded(folder: Path, settings: Mapping[str, Any], log: EvalLog | None) -> Iterator[EvalLog | None]:
    """Record an evaluation in its folder; gives the log to resume. One without a scored dialogue does not bind the folder: other
    settings replace it. An error before anything is played leaves the folder as it was. Raises OutputError for a folder with
    another evaluation."""
    file, logs = folder / "evaluation.json", folder / "logs"
    settings, before = json.loads(json.dumps(settings)), None
    try:
        if log is not None and file.exists():
            before = read_json(file)
            if not isinstance(before, dict):
                raise OutputError(f"{file}: expected the settings of an evaluation; choose another folder with --out")
            if changed := differences(before, settings):
                # An interrupted log has no results either, but may have scored dialogues.
                if log.status != "success" or (log.results is not None and log.results.completed_samples):
                    raise OutputError(f"{folder} contains another evaluation ({'; '.join(changed)}); choose another with --out")
                log = None
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}); choose another with --out") from None
    written = set(logs.glob("*.eval"))
    try:
        yield log
    except BaseException:
        if set(logs.glob("*.eval")) == written:
            if before is not None:
                write_whole(file, json.dumps(before, indent=2) + "\n")
            else:
                file.unlink()
                for empty in (logs, folder):
                    with suppress(OSError):
                        empty.rmdir()
        raise


def _explained(error: Exception, wanted: Evaluation) -> Exception:
    """An error of Inspect or a provider for a user's mistake as one line; any other error unchanged."""
    message = plain(" ".join(str(getattr(error, "message", error)).split())).removeprefix("ERROR: ")
    where = ", ".join(f"--{role} {name}" for role, name in {"model": wanted.model, **wanted.roles}.items())
    if isinstance(error, PrerequisiteError) or "not recognized" in message:
        hint = " For another OpenAI-compatible endpoint: openai-api/SERVICE/NAME" if "not recognized" in message else ""
        return RecipeError(f"{where}: {message}{hint}")
    if isinstance(error, TypeError) and "unexpected keyword" in message:
        return RecipeError(f"-M: {message}")
    if isinstance(error, OSError):
        return PolicyError(f"{where}: {message}")
    return error


def parse_settings(parts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE arguments (of a provider or a task). Raises RecipeError for one of another form."""
    return dict(named_value(part, "argument", "NAME=VALUE") for part in parts)


def _fingerprint(bench: str, model: str, task: Mapping[str, Any], scenarios: str) -> dict[str, Any]:
    """What the names in an evaluation stand for (`data`, `policy` of a local folder, `simulator`, `instructions`), by digests, so
    that figures of others under the same names are not taken for the same; `scenarios` is the default of the task. Raises
    ScenarioError, RecipeError and SimulatorTransportError for what is not there."""
    found: dict[str, Any] = {"data": _data(bench, task, scenarios)}
    if bench == "sage" and (simulator := task.get("simulator")) is not None:
        found["simulator"] = named_simulator(simulator).config.digest
    folder = Path(model).expanduser()
    if folder.is_dir():  # names, sizes and times: weights are too large to be read for this
        files = sorted(file for pattern in _POLICY_FILES for file in folder.glob(pattern))
        found["policy"] = _digest(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)
    if bench != "eibench":
        return found
    if (official := task.get("official")) is not None:
        prompts = chosen_prompts(Path(official).expanduser()).name
        return {**found, "simulator": prompts, "instructions": prompts}
    instructions = load_instructions(task.get("instructions") or DEFAULT_INSTRUCTIONS).name
    return {**found, "simulator": _simulator(task.get("simulator")), "instructions": instructions}


def _data(bench: str, task: Mapping[str, Any], scenarios: str) -> str:
    if bench == "sage":
        return _digest(map(repr, load_profiles(data_folder(bench, task.get("data")))))
    if bench == "eqbench3":
        return _digest([repr(load_eqbench(data_folder(bench, task.get("data"))))])
    return _digest(map(repr, load_set(task.get("scenarios", scenarios), "test", task.get("invalid", "skip")).scenarios))


def _simulator(simulator: str | None) -> Any:
    if simulator is None or simulator == SCRIPTED:
        return chosen_prompts(None).name if simulator is None else SCRIPTED
    choice = named_simulator(simulator)
    if choice.urls:
        return asyncio.run(chosen_user(simulator, None).about())
    return [choice.config.digest, choice.config.backend if choice.llm is None else chosen_prompts(choice.llm.official).name]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode("utf-8", "replace")).hexdigest()[:12]


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
    """The settings that an evaluation of eibench will have: arguments of the task and of sampling together, how an LLM that
    plays the user is sampled, and the limit on scenarios."""
    wanted = with_defaults(wanted)
    defaults = {name: parameter.default for name, parameter in inspect.signature(_registry.eibench).parameters.items()}
    unset = names_of(wanted.task.get("unset", ""))
    sampling = {n: value for n, value in SAMPLING.model_dump(exclude_none=True).items() if f"model.{n}" not in unset}
    played = {**defaults, **sampling, **wanted.task, **wanted.generation}
    if "tries" not in wanted.task:
        del played["tries"]
    elif (simulator := wanted.task.get("simulator")) is not None:
        llm = named_simulator(simulator).llm
        played |= {"simulator.temperature": llm and llm.temperature, "simulator.top_p": llm and llm.top_p}
    else:
        default = {} if "simulator.temperature" in unset else {"temperature": TEMPERATURE}
        sampled = {**default, **wanted.role_generation.get("simulator", {})}
        played |= {f"simulator.{name}": sampled.get(name) for name in ("temperature", "top_p")}
    return {**played, "simulator": wanted.roles.get("simulator", played["simulator"]), "limit": wanted.limit}


def evaluations_of(
    folder: RunFolder,
    task: Mapping[str, Any],
    generation: Mapping[str, Any],
    roles: Mapping[str, str],
    *,
    limit: int | None = None,
    preset: str | None = None,
    log_line: Callable[[str], None] = lambda _: None,
) -> dict[str, Evaluation]:
    """A run's base and final policy (by these names) as its recipe validates them. `task`, `generation` and `roles` go before what
    the recipe says; with a `preset`, which they go before too, the recipe says only what is played (scenarios, repeats, seed) and
    by whom. Raises OutputError for a folder without a finished run, PolicyError for a base policy that cannot be fetched,
    RecipeError where neither the recipe nor an option says what to evaluate on."""
    if (lacks := missing_in(folder.final)) is not None:
        raise OutputError(f"{folder.path}: expected a finished run (final/: {lacks}); try --model {folder.path}/best")
    recipe = resolved_recipe(folder.recipe_file)
    validated, sampled = validated_as(recipe)
    role_generation: dict[str, dict[str, Any]] = {}
    if preset is not None:
        kept = ("scenarios", "repeats", "seed", "invalid", "simulator")
        validated, sampled = {name: validated[name] for name in kept if name in validated}, {}
        simulator = None if roles else task.get("simulator", validated.get("simulator"))
        task, generation, role_generation, unset = with_preset(preset, simulator, task, generation, {}, [], roles)
        task["unset"] = ",".join(unset)
    if "official" in task:  # which words what the policy is message
        validated = {name: value for name, value in validated.items() if name not in BRIEFING}
    played = {**validated, **task}
    if roles:
        played.pop("simulator", None)
    elif "simulator" not in played:
        raise RecipeError(f"{folder.recipe_file}: the run has several users (simulator.users); expected --simulator")
    if "scenarios" not in played:
        raise RecipeError(f"{folder.recipe_file}: no validation section; expected --scenarios to evaluate on")
    base = folder.starting_policy(recipe, log_line)
    return {
        name: Evaluation(
            bench="eibench",
            model=f"{LOCAL}{model}",
            task=played,
            generation={**sampled, **generation},
            roles=roles,
            role_generation=role_generation,
            model_args={"recipe": str(folder.recipe_file), "max_batch": recipe.rollout.max_batch},
            limit=limit,
            preset=preset,
        )
        for name, model in (("base", base), ("final", str(folder.final)))
    }
