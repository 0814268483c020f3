"""The credit: whether functions of one's own give what advantages can be made of."""

from __future__ import annotations

from collections.abc import Iterator

from ctcgrpo.preflight.subject import Finding, Subject
from ctcgrpo.training.samples import try_credit


def credit(s: Subject) -> Iterator[Finding]:
    options = s.recipe.credit_options()
    try_credit(options)
    yield Finding("credit", "ok", f"{options.credit}, centered on {options.centering}, scale {options.scale_rewards}")
