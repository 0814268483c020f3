"""Evaluations as processes: one that is killed half-way goes on, and a real browser reads what Inspect's viewer shows of it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctcgrpo.evaluation.results import read_results
from ctcgrpo.evaluation.run import Evaluation, evaluate
from tests import inspect_models  # noqa: F401 - registers the models
from tests.browsing import CHROMIUM
from tests.conftest import ROOT

WANTED = Evaluation("eibench", "scripted/talker", task={"simulator": "scripted"}, generation={"temperature": 1.0})
COMMAND = ["evaluate", "eibench", "--model", "scripted/talker", "--simulator", "scripted", "--temperature", "1"]


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name not in ("began", "log")}


def test_an_evaluation_killed_half_way_ends_like_one_that_nobody_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole test split of the bundled pack: told to stop, then killed, then played to its end."""
    calls = tmp_path / "calls"
    monkeypatch.setenv("CTCGRPO_TEST_CALLS", str(calls))
    whole = evaluate(WANTED, tmp_path / "whole", display="none")
    assert whole["results"] == 16 and whole["failed"] == 0
    in_all = calls.stat().st_size
    assert in_all > 60
    folder = tmp_path / "out"
    environment = {**os.environ, "CTCGRPO_TEST_CALLS": str(calls), "CTCGRPO_TEST_DELAY": "0.25"}
    command = [sys.executable, "-m", "tests.inspect_models", *COMMAND, "--out", str(folder), "--connections", "2"]

    def begin(until: int) -> subprocess.Popen[str]:
        calls.write_bytes(b"")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Whoever runs the tests in the background has them ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 150
        while calls.stat().st_size < until:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    stopped = begin(in_all // 3)
    stopped.send_signal(signal.SIGINT)
    out, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 130 and "the same command resumes" in out and "Traceback" not in out, out
    killed = begin(in_all // 4)
    killed.kill()
    killed.communicate(timeout=60)
    assert not (folder / "summary.json").exists()
    calls.write_bytes(b"")
    resumed = evaluate(WANTED, folder, display="none")
    assert 0 < calls.stat().st_size < 0.75 * in_all
    assert without_times(resumed) == without_times(whole)
    assert read_results(folder) == read_results(tmp_path / "whole")


@pytest.fixture
def viewer(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """`inspect view` on the log of a small evaluation."""
    folder = tmp_path / "evaluation"
    evaluate(
        Evaluation("eibench", "scripted/talker", task={"simulator": "scripted", "rounds": 2}, limit=2),
        folder,
        display="none",
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    inspect = str(Path(sys.executable).with_name("inspect"))
    command = [inspect, "view", "start", "--log-dir", str(folder / "logs"), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url, timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.2)
        yield url, folder
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
def test_a_browser_finds_a_dialogue_with_its_states_in_the_viewer(viewer: tuple[str, Path]) -> None:
    from playwright.sync_api import sync_playwright

    url, folder = viewer
    line = next(line for line in read_results(folder)[0].lines if line.speaker == "user" and line.why)
    shots = os.environ.get("CTCGRPO_TEST_SCREENSHOTS")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        outside: list[str] = []
        page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
        page.goto(url)
        page.get_by_text("eibench").first.click()
        page.get_by_text("charm-test-01").locator("visible=true").first.click()
        page.get_by_text(line.text[:40]).first.wait_for()
        if shots:
            page.screenshot(path=f"{shots}/messages.png")
        page.get_by_role("tab", name="Transcript").first.click()
        page.get_by_text("simulator").first.wait_for()
        text = page.locator("body").inner_text()
        if shots:
            page.screenshot(path=f"{shots}/transcript.png")
        browser.close()
    assert outside == []
    assert "turn 1" in text.lower() and json.dumps(line.why)[1:20] in text
