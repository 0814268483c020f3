"""The policy's system prompt: its role, or the sections of it that a recipe names, and the instructions on how to reply."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.errors import PolicyError
from ctcgrpo.policy.instructions import WITHOUT, Instructions

BETWEEN = "\n\n"  # between a role and the instructions behind it
_HEADING = re.compile(r"^#+ *(.+?) *$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Briefing:
    """Makes the policy's system prompt from a scenario's role: its `sections` (None: all), then the `instructions`, in the version
    for a policy that `reasons` before it replies, or for one that does not."""

    sections: tuple[str, ...] | None = None
    instructions: Instructions = WITHOUT
    reasons: bool = False

    def parts(self, scenario: Scenario) -> tuple[str, str]:
        """Role and instructions, either may be empty. Raises PolicyError for a section that the role does not have, or a language
        without instructions."""
        role = select_sections(scenario.policy_persona, self.sections).strip()
        try:
            return role, self.instructions.text(scenario.language, self.reasons)
        except PolicyError as error:
            raise PolicyError(f"scenario {scenario.id!r}: {error}") from None


def together(role: str, instructions: str) -> str:
    return BETWEEN.join(part for part in (role, instructions) if part)


def select_sections(persona: str, sections: Sequence[str] | None) -> str:
    """The named sections of a persona (`### Heading` and the lines below) in its own order; for None all. Raises PolicyError."""
    if sections is None:
        return persona
    headings = list(_HEADING.finditer(persona))
    ends = [match.start() for match in headings[1:]] + [len(persona)]
    parts = {match[1]: persona[match.start() : end].strip() for match, end in zip(headings, ends, strict=False)}
    if missing := [name for name in sections if name not in parts]:
        has = ", ".join(parts) or "no sections"
        raise PolicyError(f"policy.persona_sections names {missing[0]!r}; this persona has {has}")
    return "\n\n".join(text for name, text in parts.items() if name in sections)
