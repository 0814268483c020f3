"""Fetching a dataset over HTTP: after its licence, whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ctcgrpo.records import SCENES
from ctcgrpo.scenarios import PACKS, load_scenarios
from tests.conftest import Command


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled pack, laid out as the dataset is."""
    monkeypatch.setenv("CTCGRPO_DATA", str(tmp_path / "home"))
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for scene in SCENES:
            text = (PACKS / "english" / split / f"{scene}_final.jsonl").read_text()
            (tmp_path / "data" / split / f"{scene}_final.jsonl").write_text(text)
    return tmp_path / "data"


@pytest.fixture
def url(published: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(published)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_a_dataset_is_fetched_after_its_licence(ctcgrpo: Command, url: str, published: Path, tmp_path: Path) -> None:
    code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", url, "--yes")
    assert code == 0, err
    assert "CC BY-NC 4.0" in out and "train: 64 scenarios (16 charm, 16 defense, 16 repair, 16 support)" in out
    assert len(load_scenarios("eibench/train")) == 64 and len(load_scenarios("eibench/test", "test")) == 16
    assert "CC BY-NC" in (tmp_path / "home" / "eibench" / "SOURCE").read_text()
    code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", str(published), "--yes")
    assert code == 6 and "is there already" in err


def test_what_cannot_be_had_whole_is_not_there_at_all(ctcgrpo: Command, url: str, published: Path, tmp_path: Path) -> None:
    def fails(expected: str, *arguments: str) -> None:
        code, _, err = ctcgrpo("scenarios", "fetch", *arguments)
        assert code == 3 and expected in err and "Traceback" not in err, err
        assert not list((tmp_path / "home").glob("*"))

    file = published / "test" / "charm_final.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-200])
    fails("charm_final.jsonl, line 4", "eibench", "--source", url, "--yes")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    fails("Git LFS", "eibench", "--source", url, "--yes")
    file.unlink()
    fails("test/charm_final.jsonl cannot be had (HTTP Error 404", "eibench", "--source", url, "--yes")
    fails("charm_final.jsonl cannot be copied", "eibench", "--source", str(published), "--yes")
    fails("did you mean 'eibench'", "eibensh", "--yes")


def test_without_agreement_nothing_is_fetched(ctcgrpo: Command, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.confirm", lambda question: False)
    code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", str(published))
    assert code == 6 and "CC BY-NC 4.0" in out and "nothing was fetched" in err
