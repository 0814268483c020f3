"""Fixtures that cost something are made once a session."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import pytest
from hypothesis import settings

from ctcgrpo.simulator.protocol import SimulatorBackend

# The same examples every time: a gate that fails by chance says nothing about the change before it.
settings.register_profile("gate", derandomize=True, deadline=None)
settings.load_profile("gate")

ROOT = Path(__file__).parent.parent
Command = Callable[..., tuple[int, str, str]]
SHARED_DATA = ROOT.parent / "shared" / "data"


class Backend(SimulatorBackend):
    """A simulator backend for tests to fill in."""

    name = "test"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the random tiny Qwen3 and its tokenizer."""
    from ctcgrpo.environments.eibench.scenarios import load_scenarios
    from ctcgrpo.policy.tiny import build_tiny

    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, (s.user_persona for s in load_scenarios("english/train")))
    return folder


@pytest.fixture(scope="session")
def simulator_url() -> Iterator[str]:
    """A real server with the scripted user, on loopback."""
    from ctcgrpo.simulator.config import SCRIPTED_USER
    from ctcgrpo.simulator.server import SimulatorServer, running

    with running(SimulatorServer(SCRIPTED_USER)) as url:
        yield url


@pytest.fixture
def ctcgrpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the `ctcgrpo` command in this process: exit code, standard output, standard error."""

    from ctcgrpo import cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ctcgrpo", *arguments])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return run


@pytest.fixture
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    from tests.browsing import CHROMIUM

    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()
