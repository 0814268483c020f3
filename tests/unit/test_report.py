"""The report of a run: figures by hand, credit as it was trained with, hostile text, and a real browser that opens it."""

from __future__ import annotations

import json
import os
import random
import re
import time
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import OutputError
from ctcgrpo.report import page as pages
from ctcgrpo.report.page import figures_of, write_report
from ctcgrpo.report.parts import credit_of
from ctcgrpo.report.reading import read_run
from ctcgrpo.training.samples import turn_samples
from ctcgrpo.types import TurnSample
from ctcgrpo.util.files import mark_complete
from tests.browsing import with_browser
from tests.conftest import ROOT, Command
from tests.unit.test_run import FAST, TINY

HOSTILE = "</script><script>document.title='owned'</script> \"quotes' & \x07\u2028 <img src=x onerror=alert(1)>"


def turn(before: tuple[int, int], after: tuple[int, int], reply: str = "I hear you.") -> dict[str, Any]:
    (anger, trust), (was_angry, trusted) = after, before
    return {
        "reasoning": "So the tea.",
        "reply": reply,
        "faults": [],
        "message": "Go on.",
        "reward": ((was_angry - anger) + (trust - trusted)) / 200,
        "credit": None,
        "done": False,
        "info": {"anger": anger, "trust": trust, "why": "takes it seriously (-1/+1)"},
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "finish_reason": "stop",
        "dropped_exchanges": 0,
    }


def episode(
    group: int,
    rollout: int,
    outcome: float | None,
    ends: list[tuple[int, int]],
    credit: list[tuple[float, float]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """`credit`: (outcome term, turn term) of each turn, of an episode that was trained on."""
    states = [(50, 50), *ends]
    turns = [turn(a, b) for a, b in pairwise(states)]
    for k, (a, b) in enumerate(credit or ()):
        turns[k]["credit"] = {"outcome": a, "turn": b, "advantage": a + b}
    return {
        "step": 1,
        "task": f"support-{group}",
        "tag": "support",
        "group": group,
        "rollout": rollout,
        "outcome": outcome,
        "failure": None if outcome is not None else {"kind": "simulator_reply", "message": "turn 2: no answer"},
        "opening": "My tea is cold.",
        "info": {"anger": 50, "trust": 50},
        "turns": turns,
        "seconds_policy": 0.1,
        "seconds_environment": 0.1,
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
    episode(0, 0, 0.5, [(46, 52), (40, 60)], [(0.7, -0.3), (0.7, 0.3)]),
    episode(0, 1, -0.5, [(54, 50), (58, 40)], [(-0.7, 0.375), (-0.7, -0.375)]),
    episode(0, 2, None, [(50, 50)]),
    episode(1, 0, 0.2, [(48, 50)], [(0.0, 0.0)]),
    episode(1, 1, 0.2, [(48, 50)], [(0.0, 0.0)]),
]


def test_credit_in_a_report_by_hand(tmp_path: Path) -> None:
    run = read_run(made(tmp_path / "r", EPISODES))
    first, second, failed, *alike = (advantages(e) for e in run.episodes)
    assert first == pytest.approx([0.4, 1.0]) and second == pytest.approx([-0.325, -1.075])
    assert failed is None and alike == [[0.0], [0.0]]
    assert pages.lean(run.episodes[0])[-1] == [[0.4, 0.7, -0.3], [1.0, 0.7, 0.3]]
    found = figures_of(run)
    assert found["validations"][0]["scores"]["overall"]["mean"] == pytest.approx(-0.15)
    assert found["failures"] == {"simulator_reply": 1.0} and found["finished"] and found["steps"] == 1
    # Both of group 1 left after a turn: they count with the state that they left in.
    assert found["states"][0]["tags"]["support"] == {"anger": [50, 49, 48.5], "trust": [50, 50.5, 50]}
    assert sum(found["credit"]["turns"]["1"]["counts"]) == 4 and sum(found["credit"]["scenes"]["support"]["counts"]) == 6


def advantages(episode: dict[str, Any]) -> list[float] | None:
    credit = credit_of(episode)
    return None if credit is None else [c["advantage"] for c in credit]


def test_recorded_credit_that_is_not_what_the_run_logged_is_named(tmp_path: Path) -> None:
    def problems(name: str, **changes: float) -> list[str]:
        episodes = json.loads(json.dumps(EPISODES))
        episodes[1]["turns"][0]["credit"] |= changes
        folder = made(tmp_path / name, episodes)
        # Turn terms -+0.3, +-0.375 and twice 0: their squares sum to 0.46125.
        stds = {"credit/outcome_term_std": (0.98 / 4) ** 0.5, "credit/turn_term_std": (0.46125 / 6) ** 0.5}
        turns = [t["reward"] for e in EPISODES for t in e["turns"] if e["failure"] is None]
        figures = {"step": 1, "episodes/valid": 4.0, "outcome/all": 0.1, "outcome/support": 0.1, **stds}
        figures["reward/turn"] = sum(turns) / len(turns)
        (folder / "metrics.jsonl").write_text(json.dumps(figures) + "\n")
        return [text for text in read_run(folder).problems if text.startswith("step 1")]

    assert problems("as-it-was") == []
    (said,) = problems("advantage", advantage=2.0)
    assert said == "step 1: advantage = 2.0; expected outcome + turn (wrong in 1 turns)"
    said, _ = problems("turn", turn=0.5)
    assert said.startswith("step 1: credit/turn_term_std is 0.3") and "in traces, 0.2772634" in said


def test_runs_without_recorded_credit_show_none(tmp_path: Path) -> None:
    old = json.loads(json.dumps(EPISODES))
    for e in old:
        for t in e["turns"]:
            del t["credit"]
    run = read_run(made(tmp_path / "r", old))
    assert [advantages(e) for e in run.episodes] == [None] * 5 and figures_of(run)["credit"]["turns"] == {}


def test_a_real_run_has_the_credit_that_it_was_trained_with(
    tmp_path: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[float] = []

    def kept(*arguments: Any, **options: Any) -> list[TurnSample]:
        samples = turn_samples(*arguments, **options)
        trained.extend(sample.advantage for sample in samples)
        return samples

    monkeypatch.setattr("ctcgrpo.training.trainer.turn_samples", kept)
    code, _, err = ctcgrpo("train", TINY, *FAST, f"run.output_dir={tmp_path}", "credit.centering=scene", "training.max_steps=2")
    assert code == 0, err
    run = read_run(tmp_path / "tiny")
    metrics = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    for m in metrics:
        of_step = [e for e in run.episodes if e["step"] == m["step"] and e["kind"] == "step"]
        assert len(of_step) == m["episodes/valid"]
        outcomes = [e["outcome"] for e in of_step]
        assert sum(outcomes) / len(outcomes) == pytest.approx(m["outcome/all"])
        values = [a for e in of_step for a in advantages(e) or ()]
        # Without differences between outcomes, what is left is the turn term, whose spread the trainer logged.
        if m["credit/outcome_term_std"] == 0:
            mean = sum(values) / len(values)
            spread = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
            assert spread == pytest.approx(m["credit/turn_term_std"], rel=1e-6)
    recorded = [a for e in run.episodes for a in advantages(e) or ()]
    assert recorded and sorted(recorded) == sorted(trained) and not run.problems
    code, out, err = ctcgrpo("report", str(tmp_path / "tiny"))
    assert code == 0 and "16 episodes" in out, err
    assert (tmp_path / "tiny" / "report.html").stat().st_size < 1e6


def test_what_cannot_be_reported_is_said(tmp_path: Path, ctcgrpo: Command) -> None:
    code, _, err = ctcgrpo("report", str(tmp_path))
    assert code == 6 and "expected a run folder; it has no recipe.yaml" in err
    empty = made(tmp_path / "empty", [])
    code, _, err = ctcgrpo("report", str(empty))
    assert code == 6 and "no episode yet" in err
    cut = made(tmp_path / "cut", EPISODES, finished=False)
    with (cut / "traces" / "step-000001.rank-0.jsonl").open("a") as out:
        out.write('{"step": 1, "scena')
    run = read_run(cut)
    assert run.unreadable == 1 and len(run.episodes) == 5 and not run.finished
    assert any("step-000001.rank-0.jsonl, line 6" in problem for problem in run.problems)
    with pytest.raises(OutputError, match="no recipe.yaml"):
        read_run(tmp_path)


def test_the_headline_and_the_facts_by_hand(tmp_path: Path) -> None:
    folder = made(tmp_path / "r", EPISODES, validation={"scenarios": "english/test"})
    assert figures_of(read_run(folder))["headline"] is None  # one validation says nothing of training
    with (folder / "validation.jsonl").open("a") as out:
        scores = {"s1": [0.3, 0.5], "s2": [0.1]}
        out.write(json.dumps({"step": 4, "outcomes": scores, "scenes": {"s1": "support", "s2": "charm"}, "failed": 0}) + "\n")
    (folder / "simulator.json").write_text(json.dumps({"backend": "llm", "models": ["qwen3-max"], "prompts": "ctcgrpo/1"}))
    found = figures_of(read_run(folder))
    headline = found["headline"]
    assert (headline["before"], headline["after"]) == (
        {"step": 0, "score": pytest.approx(-0.15)},
        {"step": 4, "score": pytest.approx(0.25)},
    )
    # By scenario +0.2 and +0.6: a bootstrap over two draws both, or one of them twice.
    assert headline["improvement"]["overall"] == pytest.approx(0.4)
    assert headline["improvement"]["ci95"] == pytest.approx([0.2, 0.6]) and headline["improvement"]["n"] == 2
    facts = found["facts"]
    assert facts["model"] == "m, all weights" and facts["simulated user"] == "qwen3-max, prompts ctcgrpo/1"
    assert facts["recipe"] == "r, seed 0" and facts["validated on"] == "english/test"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", facts["date"])
    assert facts["command to repeat it"] == f"ctcgrpo train {folder}/recipe.yaml run.name=r-again"


def test_scenes_are_told_apart_by_colour_blind_readers_too() -> None:
    """The smallest distance in CIELAB between two scenes' colours, as seen with each dichromacy (Machado et al. 2009)."""
    page = (ROOT / "ctcgrpo" / "report" / "page.html.j2").read_text()
    seen = [np.eye(3)] + [
        np.array(m).reshape(3, 3)
        for m in (
            (0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998),
            (0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.011820, 0.042940, 0.968881),
            (1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.303900),
        )
    ]
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def linear(color: str) -> Any:
        c = np.array([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)

    def lab(rgb: Any) -> Any:
        f = np.cbrt(to_xyz @ np.clip(rgb, 1e-3, 1) / [0.9505, 1, 1.089])
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    blocks = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:  # light and dark
        value = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block))
        colors = [linear(value[name]) for name in ("overall", *SCENES)]
        card = linear(value["card"])
        for color in colors:
            low, high = sorted((float(to_xyz[1] @ color), float(to_xyz[1] @ card)))
            assert (high + 0.05) / (low + 0.05) >= 3  # the contrast that WCAG asks of graphics
        for m in seen:
            assert min(np.linalg.norm(lab(m @ a) - lab(m @ b)) for a, b in combinations(colors, 2)) > 20


@pytest.mark.parametrize("text", ["{", "{}", "[3]", '[{"trial": "t"}]', "[" * 9000, '[{"trial": "t", "score": "x"}]'])
def test_a_damaged_table_of_a_sweep_is_named(tmp_path: Path, ctcgrpo: Command, text: str) -> None:
    made(tmp_path / "seed-0", EPISODES)
    (tmp_path / "best").symlink_to(tmp_path / "seed-0" / "final")
    (tmp_path / "table.json").write_text("[]")
    assert ctcgrpo("report", str(tmp_path))[0] == 0
    (tmp_path / "table.json").write_text(text)
    code, _, err = ctcgrpo("report", str(tmp_path))
    assert code == 6 and "table.json" in err, err


def test_larger_runs_are_sampled_by_whole_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = [
        episode(g, k, 0.1 * k, [(45, 55)], opening=random.Random(4 * g + k).randbytes(60).hex())
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


@with_browser
def test_a_browser_opens_the_page(browser: Any, tmp_path: Path) -> None:
    hostile = episode(2, 0, 0.3, [(40, 60)], task=HOSTILE, opening=HOSTILE, tag="charm")
    hostile["turns"][0] |= {"reply": HOSTILE, "reasoning": HOSTILE, "message": HOSTILE, "reward": None}
    hostile["turns"][0]["info"] |= {"why": HOSTILE, HOSTILE: HOSTILE}
    run = read_run(made(tmp_path / "r", [*EPISODES, hostile, episode(2, 1, 0.1, [(48, 52)], task=HOSTILE, tag="charm")]))
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
        assert told == pytest.approx([a for e in run.episodes[:3] for a in advantages(e) or ()], abs=1e-5)
        for k, advantage in enumerate(told):
            red, green = map(int, re.findall(r"\d+", colored.nth(k).evaluate("e => getComputedStyle(e).backgroundColor"))[:2])
            assert (green > red) == (advantage > 0)
            sign = "+" if advantage > 0 else "−"
            assert f"advantage {sign}{abs(advantage):.2f}" in colored.nth(k).inner_text()
        assert "failed" in page.locator(".episode").nth(2).inner_text()
        if shots:
            page.screenshot(path=f"{shots}/report-{width}.png", full_page=True)
        page.select_option("#scene", "charm")
        assert page.locator(".episode").count() == 2
        text = page.locator(".episode").first.inner_text()
        assert "</script><script>document.title='owned'</script>" in text and "not scored" in text
        assert page.locator(".episode img").count() == 0
        assert "owned" not in page.title()
        page.select_option("#scene", "")
        page.fill("#words", "no such words")
        assert "no group fits" in page.locator("#where").inner_text()
        page.fill("#words", "")
        page.click("#after")
        assert "group 2 of 3" in page.locator("#where").inner_text()
        page.close()


@with_browser
def test_charts_have_round_ticks_a_zero_line_one_look_a_scene_and_values_on_hover(browser: Any, tmp_path: Path) -> None:
    episodes = [
        episode(g, k, 0.3 * k - 0.5, [(47, 52), (44 + 3 * k, 55)], [(k - 1, 0.2), (k - 1, -0.2)], task=f"{scene}-{g}", tag=scene)
        for g, scene in enumerate(SCENES)
        for k in range(3)
    ]
    folder = made(tmp_path / "r", episodes, validation={"scenarios": "english/test"})
    scenes = {f"v{k}": scene for k, scene in enumerate(reversed(SCENES))}
    validations = [
        {
            "step": step,
            "outcomes": {name: [0.013 * step - 0.2 - 0.05 * k] for k, name in enumerate(scenes)},
            "scenes": scenes,
        }
        for step in (0, 7, 23)
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(v) + "\n" for v in validations))
    metrics = [{"step": n, "outcome/all": n / 40 - 0.3, **{f"outcome/{s}": n / 50 - 0.2 for s in SCENES}} for n in range(1, 24)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    file = tmp_path / "report.html"
    write_report(read_run(folder), file)
    for width, dark in ((1280, False), (1280, True), (390, True), (390, False)):
        page, asked, wrong = opened(browser, file, width, dark)
        assert (asked, wrong) == ([], [])
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        headline = page.locator("#headline").inner_text()
        for part in ("before (step 0)", "−0.275", "after (step 23)", "+0.024", "+0.299", "95 % interval +0.299 to +0.299"):
            assert part in headline, headline
        assert "ctcgrpo train" in page.locator("#facts").inner_text()
        charts = page.evaluate(CHARTS)
        assert len(charts) >= 8
        for chart in charts:
            for ticks, whole in ((chart["x"], chart["whole"]), (chart["y"], False)):
                assert 2 <= len(ticks) <= 8, chart
                steps = {round(b - a, 9) for a, b in pairwise(ticks)}
                assert len(steps) == 1 and float(f"{min(steps):e}".partition("e")[0]) in (1, 2, 5), chart
                assert not whole or all(tick == int(tick) for tick in ticks)
            assert bool(chart["zero"]) == (min(chart["y"]) <= 0 <= max(chart["y"]))
            assert len(set(chart["swatches"])) == len(chart["swatches"]), chart["title"]
        # Where values cross zero there is a line, and a scene has one colour, dash and marker in all charts.
        assert charts[0]["zero"] and charts[1]["zero"]
        looks = [
            {name: look for chart in charts for name, look in chart["looks"].items() if name.partition(" ")[0] == scene}
            for scene in SCENES
        ]
        assert all(len(of_scene) == 2 and len(set(of_scene.values())) == 1 for of_scene in looks), looks
        assert len({look for of_scene in looks for look in of_scene.values()}) == 4
        chart = page.locator("#charts svg.chart").first
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.97, box["y"] + box["height"] / 2)
        tip = page.locator("#tip")
        assert tip.is_visible()
        for part in ("step 23", "overall: 0.024 (95 %", "support: −0.051", "charm: 0.099"):
            assert part in tip.inner_text(), tip.inner_text()
        at = tip.bounding_box()
        assert at["x"] >= 0 and at["x"] + at["width"] <= width
        page.mouse.move(2, 2)
        assert not tip.is_visible()
        page.close()


CHARTS = """() => [...document.querySelectorAll("svg.chart")].map(svg => {
  const number = t => Number(t.textContent.replace("−", "-")), box = svg.closest("figure");
  const title = box.querySelector("figcaption").textContent;
  const look = line => [getComputedStyle(line).stroke, line.getAttribute("stroke-dasharray")].join("/");
  return {title, whole: /by step|by turn \\(solid|seconds/.test(title),
    x: [...svg.querySelectorAll(".tick-x")].map(number), y: [...svg.querySelectorAll(".tick-y")].map(number),
    zero: svg.querySelectorAll(".zero-y").length,
    swatches: [...box.querySelectorAll(".legend svg")].map(s => s.innerHTML),
    looks: Object.fromEntries([...svg.querySelectorAll("[data-series]")].map(l => [l.dataset.series, look(l)]))};
})"""


@with_browser
def test_five_thousand_episodes_open_quickly(browser: Any, tmp_path: Path) -> None:
    """The page says how long it took; that is printed, and held to nothing but its size and that it is whole."""
    corpus = sorted({word for s in load_scenarios("english/train") for word in s.user_persona.split()})
    episodes = []
    for group in range(625):
        for rollout in range(8):
            words = [corpus[(group * 131 + rollout * 17 + k * 7) % len(corpus)] for k in range(60)]
            one = episode(group, rollout, (rollout - 4) / 10, [(48, 52), (46, 54), (44, 56), (42, 58)])
            for k, t in enumerate(one["turns"]):
                t["reply"], t["message"] = " ".join(words[k * 10 : k * 10 + 30]), " ".join(words[k * 5 : k * 5 + 25])
            episodes.append(one)
    file = tmp_path / "report.html"
    wrote = write_report(read_run(made(tmp_path / "r", episodes)), file)
    assert wrote["shown"] == 5000 and file.stat().st_size < 25e6
    started = time.perf_counter()
    page, asked, wrong = opened(browser, file)
    print(f"5,000 episodes, {wrote['bytes'] / 1e6:.1f} MB, opened in {time.perf_counter() - started:.1f} s")
    assert (asked, wrong) == ([], []) and "group 1 of 625" in page.locator("#where").inner_text()
