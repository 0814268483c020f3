"""The sampling settings sent with each call: the benchmark's, those of the command line, and those to leave out.

`unset` names settings that providers refuse: temperature, top_p, max_tokens, seed; of another role ROLE.NAME (judge.temperature,
simulator.response_schema). The provider's default applies to a setting that is left out.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from inspect_ai.model import GenerateConfig

from ctcgrpo.errors import RecipeError
from ctcgrpo.util.naming import did_you_mean

SAMPLING = GenerateConfig(temperature=0.6, top_p=0.95, max_tokens=8192)
"""Default sampling: temperature and top-p as in training, so that validations and evaluations of a policy agree; max_tokens as
published, since models that reason spend some thousands of tokens before they reply."""
LOCAL_TOKENS = 1024
"""Default max_tokens of a policy in a folder that does not reason, as in training: with the other default, a policy that never ends
a reply would take eight times as long."""
NAMES = ("temperature", "top_p", "max_tokens", "seed", "response_schema")
ROLES = ("model", "simulator", "judge")
Unset = str | Sequence[str]


def names_of(unset: Unset) -> frozenset[str]:
    """The names as ROLE.NAME. Raises RecipeError for an unknown setting."""
    given = [part.strip() for part in (unset.split(",") if isinstance(unset, str) else unset) if part.strip()]
    known = [*NAMES, *(f"{role}.{setting}" for role in ROLES for setting in NAMES)]
    if wrong := next((name for name in given if name not in known), None):
        raise RecipeError(f"unset = {wrong!r}; {did_you_mean(wrong, known)}")
    return frozenset(name if "." in name else f"model.{name}" for name in given)


def config_of(role: str, unset: Collection[str], **settings: Any) -> GenerateConfig:
    """The settings of a role without those that are left out; `unset` as `names_of` gives it."""
    return GenerateConfig(**{name: value for name, value in settings.items() if f"{role}.{name}" not in unset})


def split_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """Splits NAME=VALUE settings of -G: those of the model, those of other roles by role, and the names set to null.

    max_completion_tokens=N stands in for max_tokens, which is then left out. Raises RecipeError for a setting that Inspect does not
    know."""
    ours: dict[str, dict[str, Any]] = {}
    unset: list[str] = []
    known = [*GenerateConfig.model_fields, "max_completion_tokens"]
    for name, value in given.items():
        role, dot, setting = name.rpartition(".")
        role = role or "model"
        if (dot and role not in ROLES) or setting not in known:
            raise RecipeError(f"-G {name!r}: {did_you_mean(name, known)}; of another role ROLE.NAME (judge.temperature)")
        if value is None:
            if setting not in NAMES:
                raise RecipeError(f"-G {name}=null: not sent by default; expected one of {', '.join(NAMES)}")
            unset.append(name)
        elif setting == "max_completion_tokens":
            unset.append(f"{role}.max_tokens" if dot else "max_tokens")
            sent = ours.setdefault(role, {})
            sent["extra_body"] = {setting: value, **sent.get("extra_body", {})}
        else:
            ours.setdefault(role, {})[setting] = value
    return ours.pop("model", {}), ours, unset
