"""What of its role a policy is told: all of it, or the sections that a recipe names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ctcgrpo.errors import PolicyError

_HEADING = re.compile(r"^#+ *(.+?) *$", re.MULTILINE)


def has_sections(persona: str) -> bool:
    return _HEADING.search(persona) is not None


def told(persona: str, sections: Sequence[str] | None) -> str:
    """The named sections of a persona (`### Heading` and the lines below it) in the persona's own order, or, for None, all of
    it. Raises PolicyError naming a section that is not there."""
    if sections is None:
        return persona
    headings = list(_HEADING.finditer(persona))
    ends = [match.start() for match in headings[1:]] + [len(persona)]
    parts = {match[1]: persona[match.start() : end].strip() for match, end in zip(headings, ends, strict=False)}
    if missing := [name for name in sections if name not in parts]:
        raise PolicyError(
            f"policy.persona_sections names {missing[0]!r}; this persona has {', '.join(parts) or 'no sections'}"
        )
    return "\n\n".join(text for name, text in parts.items() if name in sections)
