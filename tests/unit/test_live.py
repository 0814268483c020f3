"""The live report: what changed is read alone, files of a run that is writing are tolerated, and a real browser follows a run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from gzip import decompress
from pathlib import Path
from typing import Any

import pytest

from ctcgrpo.report import live as reading
from ctcgrpo.report.live import Live, LiveReader
from ctcgrpo.report.live_figures import failures, live_figures, phase, step_seconds
from ctcgrpo.report.live_server import snapshot_of
from ctcgrpo.report.page import figures_of
from ctcgrpo.report.reading import read_run
from tests.browsing import shows, watched, with_browser
from tests.conftest import ROOT, Command
from tests.served import Served, serving
from tests.unit.test_report import EPISODES, HOSTILE, episode, made
from tests.unit.test_run import FAST, TINY

SMALL = {"scenarios": {"train": "english/train", "per_step": 4}, "rollout": {"group_size": 2}, "training": {"max_steps": 5}}


def read(reader: LiveReader) -> Live:
    live = reader.read()
    assert live is not None
    return live


def add(folder: Path, step: int, *episodes: dict[str, Any], kind: str = "step") -> Path:
    """Append episodes to the file of a step."""
    file = folder / "traces" / f"{kind}-{step:06d}.rank-0.jsonl"
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in episodes))
    return file


def add_metrics(folder: Path, **metrics: Any) -> None:
    with (folder / "metrics.jsonl").open("a") as out:
        out.write(json.dumps(metrics) + "\n")


def test_a_live_report_has_the_figures_of_the_whole_report(tmp_path: Path) -> None:
    folder = made(tmp_path / "r", EPISODES)
    add(folder, 2, episode(0, 0, 0.1, [(44, 55), (40, 60), (38, 61)], [(1.0, 5.0), (1.0, -9.0), (1.0, 0.0)], step=2))
    add(folder, 0, episode(0, 0, 0.1, [(44, 55)], task="s1"), kind="validation")
    reader = LiveReader(folder)
    read(reader)
    live, whole = read(reader), read_run(folder)  # a contradiction counts from the second reading on
    assert whole.problems and set(live.run.problems) == set(whole.problems)
    assert figures_of(live.run) == figures_of(whole)
    order = [(*json.loads(text)[:3],) for text in live.dialogues]
    of_step = [("step", 1, name) for name in ["support-0"] * 3 + ["support-1"] * 2]
    assert order == [("validation", 0, "s1"), *of_step, ("step", 2, "support-0")]


def test_only_what_changed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "r", [], finished=False, **SMALL)
    for step in range(1, 31):
        add(folder, step, *EPISODES)
    places: list[tuple[str, int]] = []
    whole = reading.read_place
    monkeypatch.setattr(
        reading, "read_place", lambda kind, step, *a, **k: places.append((kind, step)) or whole(kind, step, *a, **k)
    )
    reader = LiveReader(folder)
    read(reader)
    assert sorted(places) == [("step", step) for step in range(1, 31)]
    places.clear()
    while reader.read() is not None:
        pass
    assert places == []
    add(folder, 31, EPISODES[0])
    assert len(read(reader).run.parts) == 31 and places == [("step", 31)]
    places.clear()
    add_metrics(folder, step=2, **{"outcome/all": 0.1})
    assert read(reader).run.metrics[-1]["step"] == 2 and places == []
    # A resumed run removes steps, and plays them again.
    for step in range(20, 32):
        (folder / "traces" / f"step-{step:06d}.rank-0.jsonl").unlink()
    add(folder, 20, EPISODES[0])
    assert len(read(reader).run.parts) == 20 and places == [("step", 20)]


def test_of_old_steps_only_figures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "r", [], finished=False, **SMALL)
    for step in range(1, 41):
        add(folder, step, *EPISODES)
    size = len(json.dumps(EPISODES))
    monkeypatch.setattr(reading, "MOST_CHARACTERS", 4 * size)
    reader = LiveReader(folder)
    live = read(reader)
    shown = {json.loads(text)[1] for text in live.dialogues}
    assert shown and shown == set(range(min(shown), 41)) and len(shown) < 12
    assert sum(part.episodes for part in live.run.parts) == 200
    kept = [step for (_, step), found in reader._places.items() if found.episodes is not None]
    assert set(kept) >= shown and len(kept) < 14
    # Steps that are the newest again are read again.
    for step in range(11, 41):
        (folder / "traces" / f"step-{step:06d}.rank-0.jsonl").unlink()
    assert {json.loads(text)[1] for text in read(reader).dialogues} >= {9, 10}
    # A step that is larger than all that is shown: a group of it is.
    monkeypatch.setattr(reading, "MOST_CHARACTERS", 10)
    add(folder, 10, episode(7, 0, None, []))
    live = read(reader)
    assert {json.loads(text)[2] for text in live.dialogues} == {"support-7"} and live.latest == ("step", 10, "support-7")


def test_half_lines_and_files_that_vanish_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "r", [], finished=False, **SMALL)
    (folder / "metrics.jsonl").write_text("")
    file = add(folder, 1, *EPISODES)
    for name in ("metrics.jsonl", "validation.jsonl"):
        with (folder / name).open("a") as out:
            out.write('{"step": 1, "outc')
    with file.open("a", encoding="utf-8") as out:
        out.write('{"step": 1, "scena')
    reader = LiveReader(folder)
    for live in (read(reader), reader.read()):
        assert live is None or (not live.run.problems and len(live.dialogues) == 5)
    with file.open("a", encoding="utf-8") as out:
        out.write("\nno line\n")
    assert read(reader).run.problems == []  # it may be a moment's
    (problem,) = [p for p in read(reader).run.problems if "line 7" in p]
    assert "step-000001.rank-0.jsonl, line 7: not valid JSON" in problem
    found = reading.trace_files

    def vanishing(traces: Path) -> Any:
        files = found(traces)
        file.unlink(missing_ok=True)
        return files

    monkeypatch.setattr(reading, "trace_files", vanishing)
    assert read(reader).dialogues == []


def test_phases_by_hand(tmp_path: Path) -> None:
    folder = made(tmp_path / "r", [], finished=False, **SMALL, validation={"scenarios": "english/test", "every": 2})
    for name in ("metrics.jsonl", "validation.jsonl", "traces/step-000001.rank-0.jsonl"):
        (folder / name).unlink()
    reader = LiveReader(folder)

    def says() -> str:
        return phase(read(reader).run)

    assert says() == "No episode yet"
    add(folder, 0, episode(0, 0, 0.1, [(40, 60)], task="s1"), kind="validation")
    assert says() == "Validation after step 0: playing, 1 episodes"
    validation = {"step": 0, "outcomes": {"s1": [0.1], "s2": [0.2]}, "scenes": {"s1": "support", "s2": "charm"}, "failed": 1}
    (folder / "validation.jsonl").write_text(json.dumps(validation) + "\n")
    assert says() == "Step 1: no episode yet"
    add(folder, 1, episode(0, 0, 0.1, [(40, 60)]), episode(0, 1, None, []))
    assert says() == "Step 1: playing, 2 of 8 episodes"
    add(folder, 1, *(episode(g, k, 0.1, [(40, 60)]) for g in (1, 2, 3) for k in (0, 1)))
    assert says() == "Step 1: 8 episodes played; updating the policy"
    for step in (1, 2):
        add_metrics(folder, step=step)
    add(folder, 2, *EPISODES[:2], kind="validation")
    assert says() == "Validation after step 2: playing, 2 of 3 episodes"
    add(folder, 3, *(episode(g, k, 0.1, [(40, 60)]) for g in range(4) for k in (0, 1)))  # played ahead, with rollout.overlap
    assert says() == "Validation after step 2: playing, 2 of 3 episodes"
    for step in (3, 4, 5):
        add_metrics(folder, step=step)
    assert says() == "Step 5 is done; saving the policy"


def test_progress_scores_and_failures_by_hand(tmp_path: Path) -> None:
    folder = made(tmp_path / "r", [*EPISODES, episode(2, 0, 0.5, [(40, 60)], tag="charm")], finished=False, **SMALL)
    metrics = [
        {
            "step": n,
            "outcome/all": n / 100,
            "outcome/charm": -n / 100,
            "seconds/rollout": 3.0,
            "seconds/update": n,
            "failed/judge": 1,
        }
        for n in range(1, 21)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    found = live_figures(read(LiveReader(folder)))
    assert found["progress"] == {
        "done": 20,
        "max_steps": 5,
        "seconds": 18.5,  # 3 + the median of 11 to 20
        "left": 0.0,
        "score": pytest.approx(-0.15),
        "score_note": "after step 0",
    }
    overall, support, charm = found["scores"]["rows"]
    assert overall == ["overall", *map(pytest.approx, (-0.15, -0.15, 0.055, 0.155))]
    assert support == ["support", pytest.approx(0.2), pytest.approx(0.2), None, None]
    assert charm == ["charm", *map(pytest.approx, (-0.5, -0.5, -0.055, -0.155))]
    assert found["failures"]["rows"] == [("judge", 10, 20)]
    assert found["failures"]["newest"] == ["step 1, support-0, rollout 2: simulator_reply: turn 2: no answer"]
    assert found["latest"] == ("step", 1, "support-2")
    assert step_seconds([]) is None and failures([]) == []
    seconds = {"seconds/rollout": 60.0, "seconds/update": 50.0}
    assert step_seconds([seconds]) == 110 and step_seconds([seconds | {"overlap/trainer_waited": 12.0}]) == 62


def test_what_is_served_is_json_for_any_text(tmp_path: Path) -> None:
    hostile = episode(0, 0, 0.3, [(40, 60)], task=HOSTILE, opening="\ud800" + HOSTILE)
    file = made(tmp_path / "r", [], finished=False, **SMALL) / "traces" / "step-000001.rank-0.jsonl"
    file.write_text(json.dumps(hostile) + "\n")
    live = read(LiveReader(tmp_path / "r"))
    data = json.loads(decompress(snapshot_of(live).body))
    assert data["episodes"][0][2] == HOSTILE and data["episodes"][0][7] == "?" + HOSTILE


# --- served --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    with serving() as start:
        yield lambda folder, *options, **variables: start(*["report", str(folder), "--live", *options], **variables)


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=names, method=method), timeout=20) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def test_a_server_waits_for_a_run_answers_this_machine_only_and_ends_at_once(
    tmp_path: Path, serve: Callable[..., Served]
) -> None:
    folder = tmp_path / "later"
    served = serve(folder)
    assert "no run yet, the page waits for one" in served.said
    status, headers, page = ask(served.url)
    policy = headers["content-security-policy"]
    assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy and b"<h1" in page

    def data(**headers: str) -> tuple[int, dict[str, str], bytes]:
        return ask(f"{served.url}/data", **headers)

    def eventually(what: str) -> dict[str, Any]:
        for _ in range(200):
            found = json.loads(decompress(data()[2]))
            if what in found:
                return found
            time.sleep(0.1)
        raise AssertionError(found)

    for _ in range(100):
        if "no such folder" in json.loads(decompress(data()[2]))["waiting"]:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it does not say what it waits for")
    made(folder, EPISODES, finished=False, **SMALL)
    assert eventually("live")["live"]["phase"] == "Step 2: no episode yet"
    time.sleep(1.5)
    etag = data()[1]["etag"]
    assert data(If_None_Match=etag)[0] == 304
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example", ""):
        assert data(Host=host)[0] == 403
    assert data(Host=f"localhost:{served.port}")[0] == 200
    assert ask(f"{served.url}/data", "POST")[0] == 403
    assert served.end().strip().count("\n") == 0 and served.process.returncode == 0
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_beyond_loopback_a_token_is_the_password(tmp_path: Path, serve: Callable[..., Served], ctcgrpo: Command) -> None:
    folder = made(tmp_path / "r", EPISODES)
    code, _, err = ctcgrpo("report", str(folder), "--live", "--host", "0.0.0.0")
    assert code == 2 and "CTCGRPO_PAGE_TOKEN is blank or not set" in err
    served = serve(folder, "--host", "0.0.0.0", CTCGRPO_PAGE_TOKEN="tök:en")
    url = f"http://127.0.0.1:{served.port}/data"

    def basic(text: str) -> str:
        return f"Basic {b64encode(text.encode()).decode()}"

    for wrong in ("", basic("me:tök"), basic("tök:en"), "Basic ???", "Bearer x", "Basic"):
        status, headers, _ = ask(url, Authorization=wrong)
        assert status == 401 and headers["www-authenticate"].startswith("Basic ")
    assert ask(url, Authorization=basic("me:tök:en"), Host="node7")[0] == 200


def test_options_that_do_not_fit_are_refused(tmp_path: Path, ctcgrpo: Command) -> None:
    folder = made(tmp_path / "r", EPISODES)
    code, _, err = ctcgrpo("report", str(folder), "--live", "--out", "x.html")
    assert code == 2 and "--live writes no file" in err
    (tmp_path / "table.json").write_text("[]")
    code, _, err = ctcgrpo("report", str(tmp_path), "--live")
    assert code == 6 and "expected that of a run" in err


# --- in a browser --------------------------------------------------------------------------------------------------------------


@with_browser
def test_a_page_follows_in_place(browser: Any, tmp_path: Path, serve: Callable[..., Served]) -> None:
    folder = made(tmp_path / "<b>r", [], finished=False, **SMALL)
    hostile = episode(2, 0, 0.3, [(40, 60)], [(0.5, 0.2)], task=HOSTILE, opening=HOSTILE, tag="charm")
    hostile["turns"][0] |= {"reply": HOSTILE, "reasoning": HOSTILE, "message": f"\u202e{HOSTILE}\u2066"}
    broken = episode(2, 1, None, [], task=HOSTILE, tag="charm", failure={"kind": "judge", "message": HOSTILE})
    add(folder, 1, *EPISODES, hostile, broken)
    served = serve(folder)
    shots = os.environ.get("CTCGRPO_TEST_SCREENSHOTS")
    for width, dark in ((1280, False), (390, True)):
        page, wrong = watched(browser, served.url, width, dark)
        page.wait_for_selector("body[data-ready=yes]")
        assert page.locator("#latest .episode").count() == 2
        assert "<script>document.title='owned'" in page.locator("#latest").inner_text() and page.title() == "<b>r: live report"
        assert not re.search("[\u202a-\u202e\u2066-\u2069]", page.inner_text("body"))
        assert page.locator("img").count() == 0 and page.evaluate("document.documentElement.scrollWidth") <= width
        if shots:
            page.screenshot(path=f"{shots}/live-{width}.png", full_page=True)
        assert wrong == []
        page.close()
    page, wrong = watched(browser, served.url)
    page.wait_for_selector("body[data-ready=yes]")
    page.click("#failed summary")
    assert HOSTILE.partition("\x07")[0].strip() in page.locator("#failed-list").inner_text()
    page.select_option("#scenario", "support-1")
    page.fill("#words", "hear")
    first = page.locator("#group .episode").first.element_handle()
    page.set_viewport_size({"width": 1280, "height": 250})
    first.evaluate("e => e.scrollIntoView()")
    top = first.bounding_box()["y"]
    add(folder, 2, episode(3, 0, 0.25, [(30, 70)], [(0.5, 0.2)], tag="repair"))
    add_metrics(folder, step=2, **{"outcome/all": 0.25, "seconds/rollout": 50.0, "seconds/update": 11.0})
    shows(page, "#now", "2 of 5")
    assert "32 s" in page.locator("#now").inner_text() and "2 min" in page.locator("#now").inner_text()
    shows(page, "#latest-where", "Step 2, support-3 (repair)")
    assert page.evaluate("document.querySelector('#failed').open")
    assert page.input_value("#scenario") == "support-1" and page.input_value("#words") == "hear"
    assert abs(first.bounding_box()["y"] - top) < 2  # what is read stays where it is, whatever grew above it
    assert first.is_visible() and page.locator("#group .episode").count() == 2  # not even drawn again
    assert wrong == []
    # Killed and started again on its port: the page connects again by itself.
    served.end(signal.SIGKILL)
    shows(page, "#said", "No connection")
    serve(folder, "--port", served.port)
    add(folder, 3, EPISODES[0])
    shows(page, "#said", "Step 3: playing, 1 of 8", 60)
    assert page.input_value("#scenario") == "support-1"
    assert [text for text in wrong if "ERR_CONNECTION_REFUSED" not in text and "ERR_EMPTY_RESPONSE" not in text] == []


@with_browser
def test_a_run_that_is_watched_by_a_server_that_dies_is_unharmed(
    browser: Any,
    tmp_path: Path,
    serve: Callable[..., Served],
) -> None:
    served = serve(tmp_path / "tiny")
    page, _ = watched(browser, served.url)
    options = [*FAST, f"run.output_dir={tmp_path}", "training.max_steps=4", "validation={scenarios: english/test, every: 2}"]
    command = [sys.executable, "-m", "ctcgrpo", "train", TINY, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    train = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # The run is held after its first step, however fast the machine is, so that the page has to show it before the server dies.
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    while train.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    train.send_signal(signal.SIGSTOP)
    try:
        for _ in range(2):
            shows(page, "#said", re.compile(r"Step [1-4]|Validation after step [024]"), 60)
            served.end(signal.SIGKILL)
            served = serve(tmp_path / "tiny", "--port", served.port)
            page.reload()
    finally:
        train.send_signal(signal.SIGCONT)
    out, _ = train.communicate()
    assert train.returncode == 0, out
    shows(page, "#said", "Finished. 4 of 4 steps", 60)
    run = read_run(tmp_path / "tiny")
    assert run.finished and not run.problems and [m["step"] for m in run.metrics] == [1, 2, 3, 4]
    assert "improvement" in page.inner_text("#headline") and page.locator("#notes .note").count() == 0
