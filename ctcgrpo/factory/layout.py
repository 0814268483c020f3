"""The sections of a persona, `### Title` lines with text below: checks, and repair by rule."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple

from ctcgrpo.util.naming import nearest
from ctcgrpo.util.strict_yaml import load_yaml

Role = Literal["user", "policy"]
_TITLE = re.compile(r"^\s*#{1,6}\s*(.+?)\s*[:：]?\s*$")
_LOOSE_TITLE = re.compile(r"^\s*(?:#{1,6}\s*)?(?:\*\*|【|\[)?\s*(.+?)\s*(?:\*\*|】|\])?\s*[:：]?\s*(?:\*\*)?\s*$")
_FACT = re.compile(r"^\d+[.、)](?!\d) ?\S")
_MARK = re.compile(r"^\s*(?:[-*•·](?=\s)|[（(]?\d+[.、)）](?!\d))\s*")
"""A list mark. Not before a digit, as in a number or a time: 3.5 million, 08.15."""


class Layout(NamedTuple):
    """The layout of a language: for each role the accepted titles of its sections in order; and the titles of sections of facts."""

    titles: Mapping[Role, list[list[str]]]
    facts: list[str]


@cache
def layouts() -> Mapping[str, Layout]:
    """By language code, from layout.yaml."""
    data = load_yaml((files("ctcgrpo.factory") / "layout.yaml").read_text(encoding="utf-8"))
    return {code: Layout({role: entry[role] for role in ("user", "policy")}, entry["facts"]) for code, entry in data.items()}


def sections(persona: str) -> list[tuple[str, str]]:
    """(title, text) in order; text before the first title has the title ""."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in persona.splitlines():
        if line.lstrip().startswith("#") and (title := _TITLE.match(line)):
            found.append((title[1], []))
        else:
            found[-1][1].append(line)
    parts = [(title, "\n".join(lines).strip()) for title, lines in found]
    return parts[1:] if not parts[0][1] else parts


def layout_problems(persona: str, role: Role, language: str) -> Iterator[str]:
    """Problems of a persona's sections; none for a language without a layout."""
    if language not in layouts():
        return
    layout = layouts()[language]
    wanted, found = layout.titles[role], sections(persona)
    known = [name for names in wanted for name in names]
    if found and found[0][0] == "":
        yield f"text before the first section ({found[0][1][:30]!r})"
        found = found[1:]
    titles = [title for title, _ in found]
    for names in wanted:
        there = [title for title in titles if title in names]
        if not there:
            near = nearest(names[0], [title for title in titles if title not in known])
            yield f"section {names[0]!r} is missing" + (f" ({near!r} is there)" if near else "")
        elif len(there) > 1:
            yield f"duplicate section {names[0]!r}"
    for title in titles:
        if title not in known:
            yield f"section {title!r} is unknown"
    order = [_place(title, wanted) for title in titles if title in known]
    if order != sorted(order):
        yield f"the sections are out of order: {', '.join(titles)}"
    for title, text in found:
        if not text:
            yield f"section {title!r} is empty"
        elif title in layout.facts and not all(_FACT.match(line) for line in text.splitlines() if line.strip()):
            yield f"section {title!r} is not a numbered list"


def mended(persona: str, role: Role, language: str) -> str:
    """The persona repaired by rule: marks, names and order of titles, numbers of facts, blank lines. No word changes."""
    if language not in layouts():
        return persona
    layout = layouts()[language]
    wanted = layout.titles[role]
    by_name = {name: names[0] for names in wanted for name in names}
    lines = []
    for line in persona.splitlines():
        title = _LOOSE_TITLE.match(line)
        known = by_name.get(title[1]) if title else None
        lines.append(f"### {known}" if known else line.rstrip())
    found = sections("\n".join(lines))
    if all(title in by_name for title, _ in found if title):
        found.sort(key=lambda section: _place(section[0], wanted) if section[0] else -1)
    parts = []
    for name, text in found:
        body = _numbered(text) if name in layout.facts else text
        parts.append(f"### {name}\n{body}" if name else body)
    return "\n\n".join(parts)


def _numbered(text: str) -> str:
    facts = [line.strip() for line in text.splitlines() if line.strip()]
    if not all(_MARK.match(fact) and without_mark(fact) for fact in facts):
        return text
    return "\n".join(f"{k}. {without_mark(fact)}" for k, fact in enumerate(facts, 1))


def without_mark(line: str) -> str:
    """A line without its list mark."""
    return _MARK.sub("", line)


def _place(title: str, wanted: Sequence[Sequence[str]]) -> int:
    return next(k for k, names in enumerate(wanted) if title in names)
