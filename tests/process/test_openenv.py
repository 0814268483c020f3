"""`ctcgrpo serve --openenv` as a process of its own, with an LLM as the user: played, down, told to stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("openenv", reason="needs the extra openenv")

from openenv.core.generic_client import GenericEnvClient

from tests.fake_llm import FakeLlm


@contextmanager
def serving(config: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "ctcgrpo", "serve", str(config), "--openenv", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert "OpenEnv server of 16 scenarios, simulator 'llm', listens on" in line, line + process.stderr.read()
        yield process, next(word for word in line.split() if word.startswith("http://"))
    finally:
        process.kill()
        process.communicate()


def configured(file: Path, llm: FakeLlm, **settings: Any) -> Path:
    endpoint = {"url": llm.url, "model": "m", "timeout": 5, "breaker_seconds": 0.2}
    file.write_text(yaml.safe_dump({"backend": "llm", "llm": {"deadline": 1, "patience": 1, "endpoints": [endpoint]}} | settings))
    return file


def test_an_llm_plays_the_user(tmp_path: Path) -> None:
    with FakeLlm().serving() as llm:
        config = configured(tmp_path / "s.yaml", llm, store=str(tmp_path / "store"))
        with serving(config, "--scenarios", "english/test", "--max-turns", "2") as (process, url):
            played = []
            for _ in range(2):
                with GenericEnvClient(base_url=url).sync() as env:
                    env.reset(id="support-test-01", seed=3)
                    seen = [env.step({"message": reply}) for reply in ("Tell me more.", "I see.")]
                    played.append([(step.observation, step.reward, step.done) for step in seen])
                    assert [step.done for step in seen] == [False, True] and "outcome" in seen[-1].metadata
            assert played[0] == played[1] and len(llm.requests) == 2  # the second dialogue comes from the store
            with GenericEnvClient(base_url=url).sync() as env:
                env.reset(id="support-test-01", seed=4)
                process.send_signal(signal.SIGINT)
                _, log = process.communicate(timeout=30)
            assert process.returncode in (0, 130), log
            stopped = json.loads(log.strip().splitlines()[-1])
            assert stopped["event"] == "stopped" and stopped["calls"] == 2


def test_an_llm_that_is_down_is_an_error_of_the_step(tmp_path: Path) -> None:
    with FakeLlm().serving() as llm:
        config = configured(tmp_path / "s.yaml", llm)
    with serving(config, "--scenarios", "english/test") as (_, url):
        with GenericEnvClient(base_url=url).sync() as env:
            env.reset(id="support-test-01", seed=3)
            with pytest.raises(RuntimeError, match="EXECUTION_ERROR"):
                env.step({"message": "Tell me more."})
            assert env.reset(id="support-test-01", seed=3).observation["message"]
