"""Terminal output at the terminal's width, without control characters from untrusted text.

Replies of a policy, lines of a simulator, names in a dataset and errors of an endpoint are untrusted. Control characters in
them could set colours, clear the screen or move the cursor; bidirectional overrides could reorder text.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

LogLine = Callable[[str], None]
"""What takes a line of a program's log."""

_REMOVED = [
    *(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"),  # C0, DEL, C1
    *range(0x202A, 0x202F), *range(0x2066, 0x206A),  # bidirectional embeddings, overrides and isolates
    0x2028, 0x2029,  # line and paragraph separators
]  # fmt: skip
_TABLE: dict[int, str | None] = {
    **dict.fromkeys(_REMOVED),
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
}


def printable(text: str) -> str:
    """Foreign text without control characters (line ends and tabs stay), bidirectional overrides and line separators; a lone
    surrogate, which cannot be encoded, becomes a replacement character. What is removed has no width: columns stay aligned."""
    return text.translate(_TABLE)


class Terminal(Console):
    """A console whose output holds no control characters but its own, wherever foreign text stands (cells, panels, titles).

    It is as wide as the terminal or $COLUMNS says, and `otherwise` where there is neither.
    """

    def __init__(self, otherwise: int, file: TextIO | None = None) -> None:
        known = file is None and (sys.stdout.isatty() or "COLUMNS" in os.environ)
        super().__init__(width=None if known else otherwise, file=file)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def log_line(text: object, file: TextIO | None = None) -> None:
    """Print a line as plain text, to standard output by default."""
    print(printable(str(text)), file=file, flush=True)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print foreign text on a console as it is: no markup, no highlights, and no line ends of rich's own."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
