"""Foreign text reaches the terminal as text: no colours, titles, cursor moves or reordering."""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ctcgrpo.evaluation.benches import EIBENCH
from ctcgrpo.evaluation.results import Line, Result, summarise, write_results
from ctcgrpo.experiments.table import printed
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.logs import json_log
from ctcgrpo.simulator.protocol import Reaction
from ctcgrpo.simulator.server import SimulatorServer, running
from ctcgrpo.util.terminal import Terminal, printable
from tests.conftest import Backend, Command
from tests.unit.test_show import trace

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
    assert "RED" in shown and "\x1b[2J" not in shown and "\x1b]0" not in shown and "\x07" not in shown and "\u202e" not in shown
    if colors:
        assert "\x1b[" in shown  # its own styles are still there
    else:
        assert harmless(shown)
        assert len({len(line) for line in shown.splitlines()[:3]}) == 1  # the panel's borders are aligned


def test_show_prints_what_others_wrote_as_text(tmp_path: Path, ctcgrpo: Command) -> None:
    episode = trace("a", -0.5, [f"reply {EVIL}"])
    episode["opening"] = EVIL
    episode["turns"][0] |= {"message": EVIL, "reasoning": EVIL, "info": {**episode["info"], "why": EVIL, EVIL: EVIL}}
    (tmp_path / "traces").mkdir()
    for step in (0, 7):
        (tmp_path / "traces" / f"validation-{step:06d}.rank-0.jsonl").write_text(json.dumps(episode) + "\n")
    figures = {"overall": -0.5, "scenes": {EVIL: -0.5}, "n": 1}
    summary = {"before": figures | {"step": 0}, "after": figures | {"step": 7}, "simulator": {"backend": EVIL}}
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "improvement": {"overall": 0.0, "ci95": [0, 0], "n": 1}}))
    code, out, err = ctcgrpo("show", str(tmp_path))
    assert code == 0 and "RED" in out and harmless(out) and harmless(err), err


class Evil(Backend):
    """A user of somebody else's, who writes to the terminal of whoever reads it."""

    name = f"evil{EVIL[:-4]}"

    async def react(self, request: Any) -> Reaction:
        text = EVIL.replace("\ud800", "")  # no server could send it
        return Reaction(reply=text, anger_delta=-1, trust_delta=1, goes_on=True, why=text)


def test_chat_prints_what_a_foreign_simulator_says_as_text(ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello.\nWell.\n\n"))
    with running(SimulatorServer(SCRIPTED_USER, backend=Evil())) as url:
        code, out, err = ctcgrpo("chat", "--url", url)
    assert code == 0 and out.count("RED") >= 4 and harmless(out), err


def test_evaluations_are_printed_as_text(tmp_path: Path, ctcgrpo: Command) -> None:
    evil = EVIL.replace("\ud800", "")
    for name, score in (("a", 0.1), ("b", 0.2)):
        results = [Result(f"{evil}{k}", 1, evil, score, {}, None, (Line("user", evil), Line("model", evil))) for k in range(2)]
        facts = {
            "model": f"{name}{evil}",
            "other": {"models": [evil]},
            "task": {"rounds": evil},
            "generation": {"stop": evil + name},
        }
        write_results(tmp_path / name, results, summarise(EIBENCH, results, facts | {"limit": None}))
    for command in (("compare", str(tmp_path / "a"), str(tmp_path / "b")), ("leaderboard", str(tmp_path))):
        code, out, err = ctcgrpo(*command)
        assert code == 0 and "RED" in out and harmless(out), err


def test_a_sweeps_table_and_errors_are_printed_as_text(ctcgrpo: Command) -> None:
    row = {
        "trial": "trial-0",
        "params": {"x": EVIL},
        "state": "failed",
        "reason": f"error: [/red] [bold] {EVIL}",
        "score": None,
        "by_seed": {},
    }
    out = io.StringIO()
    Terminal(140, file=out).print(printed([row], EVIL))
    assert "[/red]" in out.getvalue() and harmless(out.getvalue())
    code, _, err = ctcgrpo("show", f"/tmp/{EVIL}".replace("\x00", "").replace("\ud800", ""))
    assert code == 6 and "RED" in err and harmless(err)


def test_the_servers_log_holds_no_control_characters() -> None:
    out = io.StringIO()
    json_log(out).warning("endpoint failed", reason=EVIL)
    assert json.loads(out.getvalue())["reason"].startswith("\x1b[2J") and harmless(out.getvalue())
