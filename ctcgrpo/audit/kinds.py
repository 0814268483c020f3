"""The kinds of credit that an audit compares: sections `credit` of a recipe, by name."""

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from importlib.resources import files
from typing import Any

from ctcgrpo.centering import make_centering
from ctcgrpo.credit import VINE
from ctcgrpo.options import CreditOptions
from ctcgrpo.util.strict_yaml import load_yaml

BASELINE = "grpo"
"""The kind that gains are relative to, unless another one is named."""
_NAMES = {"scale": "scale_rewards", "shuffle": "shuffle_credit"}  # of a recipe's fields as options
_INHERITED = ("alpha", "scale_rewards", "std_min", "reasons", "no_reasoning_penalty", "fault_penalty")


@cache
def package_sections() -> Mapping[str, Mapping[str, Any]]:
    """Those of credits.yaml."""
    return dict(load_yaml((files("ctcgrpo.audit") / "credits.yaml").read_text(encoding="utf-8"))["credits"])


def kinds(sections: Mapping[str, Mapping[str, Any]], own: CreditOptions, *, vine: bool) -> dict[str, CreditOptions]:
    """Options by name, GRPO first, and `own`, those of the run, under "recipe" where no section has them. A section without alpha,
    scale or std_min has those of `own`. `vine`: whether there are continuations; without them the kinds that need them are left
    out."""
    own = CreditOptions(**{f.name: getattr(own, f.name) for f in fields(CreditOptions)})
    base = replace(CreditOptions(), **{name: getattr(own, name) for name in _INHERITED})
    found = {BASELINE: replace(base, alpha=0.0)}
    for name, section in sections.items():
        found[name] = replace(base, **{_NAMES.get(field, field): value for field, value in section.items()})
    if own not in found.values():
        found["recipe"] = own
    return {name: options for name, options in found.items() if vine or options.credit != VINE}


def of_one_step(found: Mapping[str, CreditOptions]) -> dict[str, CreditOptions]:
    """The kinds whose credit needs no other step: a centering with a state has learned nothing from a single one."""
    return {name: options for name, options in found.items() if make_centering(options.centering).state_dict() is None}
