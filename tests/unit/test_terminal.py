"""Foreign text reaches the terminal as text: no colours, titles, cursor moves or reordering."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ctcgrpo.terminal import Terminal, printable

EVIL = "\x1b[2J\x1b[31mRED\x1b[0m\x1b]0;title\x07 \x9b1A\x85\u202eevil\u2066\u2028\ud800\r\x08\x00"


def harmless(text: str) -> bool:
    overrides = {
        "\u202a",
        "\u202b",
        "\u202c",
        "\u202d",
        "\u202e",
        "\u2066",
        "\u2067",
        "\u2068",
        "\u2069",
        "\u2028",
        "\u2029",
    }
    return not any((unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in overrides for c in text)


@given(st.text(st.characters(codec=None)))
def test_nothing_is_left_that_a_terminal_obeys(text: str) -> None:
    shown = printable(text)
    assert harmless(shown) and printable(shown) == shown
    shown.encode()
    if harmless(text):
        assert shown == text


def test_plain_text_stays() -> None:
    for text in ("one\n\ttwo", "你好，世界", "👩‍👩‍👧 é", "עברית \u200f"):
        assert printable(text) == text


@pytest.mark.parametrize("colors", [False, True])
def test_a_console_prints_foreign_text_as_text_wherever_it_stands(colors: bool) -> None:
    out = io.StringIO()
    console = Terminal(40, file=out)
    if colors:
        console._color_system, console._force_terminal = 1, True  # type: ignore[attr-defined]
    table = Table(title=Text(EVIL))
    table.add_column(Text(EVIL))
    table.add_row(Text(EVIL, style="bold"))
    console.print(Panel(Text(EVIL), title=Text(EVIL), subtitle=Text(EVIL)), table)
    console.print(EVIL, markup=False, soft_wrap=True, style="red")
    shown = out.getvalue()
    assert (
        "RED" in shown and "\x1b[2J" not in shown and "\x1b]0" not in shown and "\x07" not in shown and "\u202e" not in shown
    )
    if colors:
        assert "\x1b[" in shown  # its own styles are still there
    else:
        assert harmless(shown)
        assert len({len(line) for line in shown.splitlines()[:3]}) == 1  # the panel's borders are aligned
