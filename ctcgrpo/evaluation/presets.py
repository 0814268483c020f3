"""Named settings of an evaluation of eibench. Options take precedence over a preset; the summary lists the differences."""

from collections.abc import Mapping, Sequence
from typing import Any

from ctcgrpo.environments.eibench.scenarios import described
from ctcgrpo.evaluation.played import shown_name, shown_value
from ctcgrpo.policy.instructions import DEFAULT_INSTRUCTIONS
from ctcgrpo.simulator.choice import named_simulator, names_a_simulator

TRIES = 3  # default limit on calls to the user's LLM per turn, until its answer is valid
_DIALOGUE = ("rounds", "variant", "reasoning")
_BRIEFING = ("instructions", "reasons", "opener")
_SAMPLING = ("temperature", "top_p", "max_tokens")
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Of the figures in EIBench's paper (arXiv 2606.15532), by its authors' evaluation code.
    "published": {
        "rounds": 8,
        "variant": "evaluation",
        "reasoning": "strip",
        "tries": 3,
        "temperature": 0.7,
        "top_p": None,
        "max_tokens": 8192,
        "instructions": DEFAULT_INSTRUCTIONS,
        "reasons": True,
        "opener": "You speak first.",
        "simulator.temperature": 0.7,
        "simulator.top_p": None,
        "simulator.seed": None,
        "scenarios": "eibench/test",
        "simulator": "qwen3-max",
    }
}
"""Task arguments and sampling settings by name; a setting that is None is not sent. The official mode has its own `instructions`,
`reasons` and `opener`; `tries` and the simulator's sampling apply to an LLM user. `scenarios` and `simulator` need data and a
provider: they are not set, only compared."""


def preset_differences(name: str, played: Mapping[str, Any]) -> list[str]:
    """The differences of an evaluation's settings (run.settings_before) to a preset: "temperature 0.6 (published: 0.7)"."""
    wanted = PRESETS[name]
    names = [*_DIALOGUE, *_SAMPLING, *(() if played.get("official") is not None else _BRIEFING)]
    names += ["tries", "simulator.temperature", "simulator.top_p"] if "tries" in played else []
    differing = [
        f"{shown_name(key)} {shown_value(key, played.get(key))} ({name}: {shown_value(key, wanted[key])})"
        for key in names
        if played.get(key) != wanted[key]
    ]
    data, published = described(played["scenarios"]), described(wanted["scenarios"])
    if data not in (published, described("eibench")):
        differing.append(f"data {data} ({name}: {published})")
    if limit := played.get("limit"):
        differing.append(f"the first {limit} scenarios ({name}: all)")
    models = _models(played["simulator"])
    if not all(wanted["simulator"] in model.lower() for model in models):
        differing.append(f"user {', '.join(models)} ({name}: {wanted['simulator']})")
    if played.get("official") is None:
        differing.append(f"prompts of ctcgrpo ({name}: the authors', --official FOLDER)")
    return differing


def in_words(name: str, differing: Sequence[str]) -> str:
    """A preset and an evaluation's differences to it, as a line."""
    return f"preset: {name}{', but ' if differing else ''}{', '.join(differing)}"


def _models(simulator: str) -> list[str]:
    """The models of the user's LLM; the simulator's name where this process does not know them."""
    llm = named_simulator(simulator).llm if names_a_simulator(simulator) else None
    return [simulator] if llm is None else sorted({endpoint.model for endpoint in llm.endpoints})


def with_preset(
    name: str,
    simulator: str | None,
    task: Mapping[str, Any],
    generation: Mapping[str, Any],
    roles: Mapping[str, dict[str, Any]],
    unset: Sequence[str],
    models: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """Task, generation, generation of roles and settings left out, completed by a preset's values. `simulator`: the task's
    argument; `models`: the models of the roles."""
    preset, user = PRESETS[name], roles.get("simulator", {})
    names = [*_DIALOGUE, *(["tries"] if asks_an_llm(simulator) else []), *(() if "official" in task else _BRIEFING)]
    if "simulator" in models:
        own = {} if "simulator.temperature" in unset else {"temperature": preset["simulator.temperature"]}
        roles = {**roles, "simulator": {**own, **user}}
    chosen = {*generation, *(f"simulator.{setting}" for setting in user), *unset}
    return (
        {**{key: preset[key] for key in names}, **task},
        {**{key: preset[key] for key in _SAMPLING if preset[key] is not None and key not in unset}, **generation},
        dict(roles),
        [*unset, *(key for key, value in preset.items() if value is None and key not in chosen)],
    )


def asks_an_llm(simulator: str | None) -> bool:
    """Whether this process calls an LLM for the user: for a model of Inspect's (None) and an LLM configuration, not for the
    scripted user or a server. Raises RecipeError for a configuration that cannot be read."""
    return simulator is None or named_simulator(simulator).llm is not None
