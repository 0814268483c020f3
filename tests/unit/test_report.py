"""The report of a run: figures by hand, credit as it was trained with, hostile text, and a real browser that opens it."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctcgrpo.errors import OutputError
from ctcgrpo.files import mark_complete
from ctcgrpo.report import page as pages
from ctcgrpo.report.page import figures_of, write_report
from ctcgrpo.report.reading import read_run
from tests.conftest import ROOT, Command
from tests.unit.test_run import FAST, TINY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><script>document.title='owned'</script> \"quotes' & \x07\u2028 <img src=x onerror=alert(1)>"


def turn(before: tuple[int, int], after: tuple[int, int], reply: str = "I hear you.") -> dict[str, Any]:
    return {
        "reasoning": "So the tea.",
        "reply": reply,
        "faults": [],
        "user_line": "Go on.",
        "before": before,
        "after": after,
        "why": "takes it seriously (-1/+1)",
        "goes_on": True,
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "finish_reason": "stop",
        "dropped_exchanges": 0,
    }


def episode(group: int, rollout: int, outcome: float | None, ends: list[tuple[int, int]], **changes: Any) -> dict[str, Any]:
    states = [(50, 50), *ends]
    return {
        "step": 1,
        "scenario": f"support-{group}",
        "scene": "support",
        "group": group,
        "rollout": rollout,
        "outcome": outcome,
        "failure": None if outcome is not None else {"kind": "simulator_reply", "message": "turn 2: no answer"},
        "initial_state": (50, 50),
        "final_state": states[-1],
        "opening_line": "My tea is cold.",
        "turns": [turn(a, b) for a, b in pairwise(states)],
        "seconds_policy": 0.1,
        "seconds_simulator": 0.1,
    } | changes


def made(folder: Path, episodes: list[dict[str, Any]], *, finished: bool = True, **recipe: Any) -> Path:
    """A run's folder with these episodes of step 1."""
    (folder / "traces").mkdir(parents=True)
    settings = {"run": {"name": "r"}, "policy": {"model": "m"}, "scenarios": {"train": "english/train"}, **recipe}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    lines = [json.dumps(e, ensure_ascii=False) + "\n" for e in episodes]
    (folder / "traces" / "step-000001.rank-0.jsonl").write_text("".join(lines), encoding="utf-8")
    outcomes = {"s1": [0.1, 0.3], "s2": [-0.5]}
    validation = {"step": 0, "outcomes": outcomes, "scenes": {"s1": "support", "s2": "charm"}, "failed": 0}
    (folder / "validation.jsonl").write_text(json.dumps(validation) + "\n")
    metrics = {"step": 1, "outcome/all": 0.2, "seconds/rollout": 3.0, "failed/simulator_reply": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    if finished:
        (folder / "final").mkdir()
        (folder / "final" / "config.json").write_text("{}")
        mark_complete(folder / "final")
    return folder


EPISODES = [
    episode(0, 0, 0.5, [(46, 52), (40, 60)]),
    episode(0, 1, -0.5, [(54, 50), (58, 40)]),
    episode(0, 2, None, [(50, 50)]),
    episode(1, 0, 0.2, [(48, 50)]),
    episode(1, 1, 0.2, [(48, 50)]),
]


def test_credit_in_a_report_by_hand(tmp_path: Path) -> None:
    run = read_run(made(tmp_path / "r", EPISODES))
    first, second, failed, *alike = run.episodes
    # Outcomes 0.5 and -0.5: A = +-0.5 / 0.7071. Turn scores 0.03 and 0.07, centered on their mean: -+0.02, times 15.
    assert first["advantages"] == pytest.approx([0.70711 - 0.3, 0.70711 + 0.3], abs=1e-4)
    assert second["advantages"] == pytest.approx([-0.70711 + 0.375, -0.70711 - 0.375], abs=1e-4)
    assert failed["advantages"] is None and all(e["advantages"] == (0.0,) for e in alike)
    found = figures_of(run)
    assert found["validations"][0]["scores"]["overall"]["mean"] == pytest.approx(-0.15)
    assert found["failures"] == {"simulator_reply": 1.0} and found["finished"] and found["steps"] == 1
    # Both of group 1 left after a turn: they count with the state that they left in.
    assert found["states"][0]["scenes"]["support"] == [[50, 50], [49, 50.5], [48.5, 50]]
    assert sum(found["credit"]["turns"]["1"]["counts"]) == 4 and sum(found["credit"]["scenes"]["support"]["counts"]) == 6


def test_a_real_run_has_the_credit_that_it_was_trained_with(tmp_path: Path, ctcgrpo: Command) -> None:
    code, _, err = ctcgrpo(
        "train", TINY, *FAST, f"run.output_dir={tmp_path}", "credit.centering=scene", "training.max_steps=2"
    )
    assert code == 0, err
    run = read_run(tmp_path / "tiny")
    metrics = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    for m in metrics:
        of_step = [e for e in run.episodes if e["step"] == m["step"] and e["kind"] == "step"]
        assert len(of_step) == m["episodes/valid"]
        outcomes = [e["outcome"] for e in of_step]
        assert sum(outcomes) / len(outcomes) == pytest.approx(m["outcome/all"])
        values = [a for e in of_step for a in e["advantages"]]
        # Without differences between outcomes, what is left is the turn term, whose spread the trainer logged.
        if m["credit/outcome_term_std"] == 0:
            mean = sum(values) / len(values)
            spread = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
            assert spread == pytest.approx(m["credit/turn_term_std"], rel=1e-6)
    code, out, err = ctcgrpo("report", str(tmp_path / "tiny"))
    assert code == 0 and "16 episodes" in out, err
    assert (tmp_path / "tiny" / "report.html").stat().st_size < 1e6


def test_what_cannot_be_reported_is_said(tmp_path: Path, ctcgrpo: Command) -> None:
    code, _, err = ctcgrpo("report", str(tmp_path))
    assert code == 6 and "is no run's folder" in err
    empty = made(tmp_path / "empty", [])
    code, _, err = ctcgrpo("report", str(empty))
    assert code == 6 and "no episode yet" in err
    cut = made(tmp_path / "cut", EPISODES, finished=False)
    with (cut / "traces" / "step-000001.rank-0.jsonl").open("a") as out:
        out.write('{"step": 1, "scena')
    run = read_run(cut)
    assert run.unreadable == 1 and len(run.episodes) == 5 and not run.finished
    with pytest.raises(OutputError, match="no recipe.yaml"):
        read_run(tmp_path)


def test_larger_runs_are_sampled_by_whole_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = [
        episode(g, k, 0.1 * k, [(45, 55)], opening_line=random.Random(4 * g + k).randbytes(60).hex())
        for g in range(60)
        for k in range(4)
    ]
    run = read_run(made(tmp_path / "r", episodes))
    monkeypatch.setattr(pages, "MOST_BYTES", 6000)
    wrote = write_report(run, tmp_path / "page.html")
    assert wrote["of"] == 240 and 4 <= wrote["shown"] < 240 and wrote["shown"] % 4 == 0
    kept = pages._within(run.episodes, 6000)
    groups = sorted({e["group"] for e in kept})
    assert len(kept) == 4 * len(groups) and groups[0] == 0 and (len(groups) == 1 or groups[-1] == 59)


@pytest.fixture
def browser() -> Any:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def opened(browser: Any, file: Path, width: int = 1280, dark: bool = False) -> tuple[Any, list[str], list[str]]:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda r: asked.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.goto(file.as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=20_000)
    return page, asked, wrong


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
def test_a_browser_opens_the_page(browser: Any, tmp_path: Path) -> None:
    hostile = episode(2, 0, 0.3, [(40, 60)], scenario=HOSTILE, opening_line=HOSTILE, scene="charm")
    hostile["turns"][0] |= {"reply": HOSTILE, "why": HOSTILE, "reasoning": HOSTILE, "user_line": HOSTILE}
    run = read_run(
        made(tmp_path / "r", [*EPISODES, hostile, episode(2, 1, 0.1, [(48, 52)], scenario=HOSTILE, scene="charm")])
    )
    file = tmp_path / "report.html"
    trials = [
        {"trial": f"trial-{k}", "params": {"credit.alpha": k, "x": HOSTILE}, "score": 0.1 * k, "ci95": [0, 0.2], "gain": 0.1,
         "by_seed": {"0": 0.1}, "state": "done", "reason": ""}
        for k in range(2)
    ]  # fmt: skip
    write_report(run, file, trials)
    shots = os.environ.get("CTCGRPO_TEST_SCREENSHOTS")
    for width, dark in ((1280, False), (390, True)):
        page, asked, wrong = opened(browser, file, width, dark)
        assert (asked, wrong) == ([], [])
        assert page.title() == "r: report" and page.locator("#charts svg").count() >= 5
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".episode").count() == 3 and "group 1 of 3" in page.locator("#where").inner_text()
        # Colours and figures are those of the credit.
        colored = page.locator(".turn[data-advantage]")
        told = [float(colored.nth(k).get_attribute("data-advantage")) for k in range(colored.count())]
        assert told == pytest.approx([a for e in run.episodes[:3] for a in e["advantages"] or ()], abs=1e-5)
        for k, advantage in enumerate(told):
            red, green = map(
                int, re.findall(r"\d+", colored.nth(k).evaluate("e => getComputedStyle(e).backgroundColor"))[:2]
            )
            assert (green > red) == (advantage > 0)
            sign = "+" if advantage > 0 else "−"
            assert f"advantage {sign}{abs(advantage):.2f}" in colored.nth(k).inner_text()
        assert "failed" in page.locator(".episode").nth(2).inner_text()
        if shots:
            page.screenshot(path=f"{shots}/report-{width}.png", full_page=True)
        page.select_option("#scene", "charm")
        assert page.locator(".episode").count() == 2
        text = page.locator(".episode").first.inner_text()
        assert "</script><script>document.title='owned'</script>" in text and page.locator(".episode img").count() == 0
        assert "owned" not in page.title()
        page.select_option("#scene", "")
        page.fill("#words", "no such words")
        assert "no group fits" in page.locator("#where").inner_text()
        page.fill("#words", "")
        page.click("#after")
        assert "group 2 of 3" in page.locator("#where").inner_text()
        page.close()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
def test_five_thousand_episodes_open_quickly(browser: Any, tmp_path: Path) -> None:
    """The page says how long it took; that is printed, and held to nothing but its size and that it is whole."""
    corpus = (ROOT / "ctcgrpo" / "policy" / "starter" / "english" / "nouns.txt").read_text().split()
    episodes = []
    for group in range(625):
        for rollout in range(8):
            words = [corpus[(group * 131 + rollout * 17 + k * 7) % len(corpus)] for k in range(60)]
            one = episode(group, rollout, (rollout - 4) / 10, [(48, 52), (46, 54), (44, 56), (42, 58)])
            for k, t in enumerate(one["turns"]):
                t["reply"], t["user_line"] = " ".join(words[k * 10 : k * 10 + 30]), " ".join(words[k * 5 : k * 5 + 25])
            episodes.append(one)
    file = tmp_path / "report.html"
    wrote = write_report(read_run(made(tmp_path / "r", episodes)), file)
    assert wrote["shown"] == 5000 and file.stat().st_size < 25e6
    started = time.perf_counter()
    page, asked, wrong = opened(browser, file)
    print(f"5,000 episodes, {wrote['bytes'] / 1e6:.1f} MB, opened in {time.perf_counter() - started:.1f} s")
    assert (asked, wrong) == ([], []) and "group 1 of 625" in page.locator("#where").inner_text()
