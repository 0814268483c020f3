"""Fixtures that cost something are made once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import pytest
from hypothesis import settings

# The same examples every time: a gate that fails by chance says nothing about the change before it.
settings.register_profile("gate", derandomize=True, deadline=None)
settings.load_profile("gate")

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the random tiny Qwen3 and its tokenizer."""
    from ctcgrpo.policy.tiny import build_tiny
    from ctcgrpo.scenarios import load_scenarios

    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, (s.user_persona for s in load_scenarios("english/train")))
    return folder


@pytest.fixture(scope="session")
def simulator_url() -> Iterator[str]:
    """A real server with the scripted user, on loopback."""
    from ctcgrpo.simulator.scripted import ScriptedBackend
    from ctcgrpo.simulator.server import embedded

    with embedded(ScriptedBackend()) as url:
        yield url
