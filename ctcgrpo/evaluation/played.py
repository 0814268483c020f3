"""The settings behind a score, in words: the data set, the settings that it depends on, and a run's training and validation.

Scores with different data or settings are not comparable, so every table, page, ranking and card names them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctcgrpo.environments.eibench.scenarios import EIBENCH_DATA, described
from ctcgrpo.evaluation.benches import EIBENCH, named
from ctcgrpo.policy.instructions import load_instructions
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.simulator.choice import name_of

SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")
BRIEFING = ("instructions", "reasons", "persona_sections")  # arguments of tasks that decide a policy's prompt
_TASK = ("rounds", "variant", "reasoning", "tries", "official", "opener", "rescored", *BRIEFING)
"""Arguments of tasks that decide what a score means."""
_SHOWN = {
    "reasons": "instructed to reason:",
    "top_p": "top-p",
    "top_k": "top-k",
    "max_tokens": "max tokens",
    "variant": "scoring variant",
    "reasoning": "earlier reasoning",
    "tries": "tries of the user's LLM",
    "simulator.temperature": "the user's temperature",
    "simulator.top_p": "the user's top-p",
}
_SHOWN_VALUES = {"strip": "stripped", "keep": "kept"}


def data_set(bench: str, task: Mapping[str, Any], scenarios: str) -> str:
    """The data set of an evaluation in words; `scenarios` is the default of a task that names none."""
    if bench == EIBENCH.name:
        return described(task.get("scenarios", scenarios))
    return str(task.get("data") or f"$CTCGRPO_DATA/{bench}")


def title_of(summary: Mapping[str, Any]) -> str:
    """The benchmark's title with its data set and the number of invalid records left out. The name EIBench is only for its own data
    set; on other scenarios the title is "eibench task on ..."."""
    bench, data = named(summary["bench"]), summary.get("data_set") or "a data set that was not recorded"
    title = eibench_on(data) if bench is EIBENCH else f"{bench.title}, {data}"
    skipped = summary.get("skipped") or {"count": 0}
    left_out = f", without {skipped['count']} invalid of its {skipped['records']} records" if skipped["count"] else ""
    return f"{title}{left_out}"


def eibench_on(data: str) -> str:
    """EIBench for its own data set (as `data_set` names it), else its task on another."""
    return data if data.startswith(f"{EIBENCH_DATA} (") else f"eibench task on {data}"


def settings_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a score depends on, beside data set, model and simulator or judge, by name, in display order."""
    task, generation = summary["task"], summary["generation"]
    found = {name: task[name] for name in _TASK if task.get(name) is not None}
    if summary.get("instructions"):  # with the digest of the texts
        found["instructions"] = summary["instructions"]
    if "rescored" not in task:
        found |= {name: generation.get(name) for name in SAMPLING}
        found |= {name: value for name, value in generation.items() if name not in SAMPLING}
    if task.get("repeats", 1) != 1:
        found["repeats"] = task["repeats"]
    return found | ({"limit": summary["limit"]} if summary.get("limit") else {})


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings as one line: rounds 8, temperature 0.6, top-p 0.95, top-k not set, ..."""
    return ", ".join(f"{shown_name(name)} {shown_value(name, value)}" for name, value in settings.items())


def shown_name(name: str) -> str:
    return _SHOWN.get(name, name.replace("_", " "))


def shown_value(name: str, value: Any) -> str:
    if name == "top_k" and value == 0:
        return "off"
    if name == "reasoning":
        return _SHOWN_VALUES.get(str(value), str(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def validated_as(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's validation as arguments of the task eibench (scenarios, repeats and seed only with a validation section, no simulator
    where the run has several users) and of sampling."""
    rollout = recipe.rollout
    task: dict[str, Any] = {"rounds": rollout.max_turns, "variant": recipe.scoring.variant, **briefed_as(recipe)}
    task["reasoning"] = recipe.policy.reasoning_context
    if (user := name_of(recipe.simulator)) is not None:
        task["simulator"] = user
    if (validation := recipe.validation) is not None:
        task |= {"scenarios": validation.scenarios, "repeats": validation.samples, "seed": validation.seed}
        task["invalid"] = recipe.eibench_scenarios().invalid
    sampling = (rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens)
    return task, dict(zip(SAMPLING, sampling, strict=True))


def briefed_as(recipe: Recipe) -> dict[str, Any]:
    """A run's briefing of its policy, as arguments of the task eibench."""
    policy = recipe.policy
    sections = None if policy.persona_sections is None else list(policy.persona_sections)
    return {"instructions": policy.instructions, "reasons": policy.reasons, "persona_sections": sections}


def validation_settings(recipe: Recipe) -> dict[str, Any]:
    """The validation's settings for a run's summary and card, the data set in words. Needs a validation section."""
    task, sampling = validated_as(recipe)
    instructions = load_instructions(recipe.policy.instructions).name
    settings = {"rounds": task["rounds"], "variant": task["variant"], "instructions": instructions, **sampling}
    return {"data_set": described(task["scenarios"]), **settings, "repeats": task["repeats"]}


@dataclass(frozen=True, slots=True)
class Trained:
    """A policy of a run. `which`: its folder in the run; `task` and `sampling`: see `validated_as`."""

    run: Path
    which: str
    recipe: Recipe
    task: Mapping[str, Any]
    sampling: Mapping[str, Any]

    @property
    def description(self) -> str:
        """The run's training and validation, in words."""
        sections = self.recipe.policy.persona_sections
        persona = "all of the persona" if sections is None else f"persona sections {', '.join(sections)}"
        on = self.task.get("scenarios")
        validated = "without a validation" if on is None else f"validated on {described(on)}"
        settings = {"rounds": self.task["rounds"], "variant": self.task["variant"], **self.sampling}
        source = described(self.recipe.eibench_scenarios().train)
        return (
            f"{self.run / self.which} belongs to the run {self.recipe.run.name}: trained on {source}, {validated}, with "
            f"{in_words(settings)}, simulator {self.task.get('simulator', 'several users')}, {persona}, "
            f"instructions {self.recipe.policy.instructions}"
        )

    def differences(self, played: Mapping[str, Any]) -> list[str]:
        """The differences of other settings (task arguments and sampling together) to the run's: "rounds 8 (the run: 4)". A run
        writes no top-k as 0."""
        deciding = ("scenarios", "simulator", "rounds", "variant", "reasoning", *BRIEFING, *SAMPLING)
        own = {**self.task, **self.sampling}
        return [
            f"{shown_name(name)} {shown_value(name, played.get(name))} (the run: {shown_value(name, own[name])})"
            for name in deciding
            if name in own and (played.get(name) or 0 if name == "top_k" else played.get(name)) != own[name]
        ]


def trained_as(folder: Path) -> Trained | None:
    """The run of a policy's folder (RUN/final, best, base, checkpoint-N, an export in it). None for a folder outside of runs, and
    for a run with its own environment, whose settings fit no benchmark. Raises RecipeError for a recipe that cannot be read."""
    folder = folder.expanduser()
    if not folder.is_dir():
        return None
    for place in (folder, folder.resolve()):  # a sweep's best policy is a link into its run
        run = RunFolder(place.parent)
        if run.recipe_file.exists():
            recipe = resolved_recipe(run.recipe_file)
            if recipe.environment is not None:
                return None
            return Trained(run.path, place.name, recipe, *validated_as(recipe))
    return None
