"""Fetching a dataset over HTTP: after its licence, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ctcgrpo import fetch
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


Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


@contextmanager
def mirror(published: Path, answer: Answer) -> Iterator[str]:
    """A server that gives the files whole, and test/repair_final.jsonl as `answer` writes it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def do_GET(self) -> None:
            body = (published / self.path.lstrip("/")).read_bytes()
            if self.path == "/test/repair_final.jsonl":
                self.close_connection = True
                answer(self, body)
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def sends(data: Callable[[bytes], bytes], **headers: str) -> Answer:
    """An answer with `data` of the file; a header's value may name the file's `length`."""

    def answer(to: BaseHTTPRequestHandler, body: bytes) -> None:
        to.send_response(200)
        for name, value in headers.items():
            to.send_header(name.replace("_", "-"), value.format(length=len(body)))
        to.end_headers()
        with suppress(ConnectionError):  # who reads has had enough
            to.wfile.write(data(body))

    return answer


def redirects(where: str) -> Answer:
    def answer(to: BaseHTTPRequestHandler, body: bytes) -> None:
        to.send_response(302)
        to.send_header("Location", where.format(port=to.server.server_port))  # type: ignore[attr-defined]
        to.send_header("Content-Length", "0")
        to.end_headers()

    return answer


def chunks(body: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:1000], body[1000:]) if part)


def first_line(body: bytes) -> bytes:
    return body[: body.index(b"\n") + 1]


def test_one_invalid_record_does_not_refuse_a_data_set(ctcgrpo: Command, published: Path) -> None:
    file = published / "train" / "repair_final.jsonl"
    first, rest = file.read_text(encoding="utf-8").split("\n", 1)
    record = json.loads(first)
    record["worst_case"]["worst_anger_min"] = 0
    file.write_text(f"{json.dumps(record)}\n{rest}", encoding="utf-8")
    code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", str(published), "--yes")
    assert code == 0, err
    assert "train: 63 scenarios" in out and "1 of 64 records are invalid and left out" in out
    assert f"scenario '{record['id']}': worst_case.worst_anger_min is 0" in out


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(sends(first_line, Content_Length="{length}"), "test/repair_final.jsonl came cut: ", id="cut at a line"),
        pytest.param(sends(lambda body: b"", Content_Length="{length}"), " came cut: 0 of ", id="nothing of it"),
        pytest.param(sends(lambda body: b"", Content_Length="0"), "repair_final.jsonl: holds no scenarios", id="empty"),
        pytest.param(
            sends(lambda body: chunks(first_line(body)), Transfer_Encoding="chunked"), "ended too early", id="cut chunks"
        ),
        pytest.param(sends(first_line), "comes without a length", id="no length"),
        pytest.param(
            sends(lambda body: b" " * 10_000, Content_Length="1000000000000"), "1000000000000 bytes or more", id="huge"
        ),
        pytest.param(
            sends(lambda body: chunks(b" " * 10**6) * 60, Transfer_Encoding="chunked"), "bytes or more", id="endless chunks"
        ),
        pytest.param(sends(lambda body: b"<html>\n", Content_Length="7"), "not valid JSON", id="a page"),
        pytest.param(
            redirects("http://localhost:{port}/train/charm_final.jsonl"), "redirects to 'http://localhost", id="host"
        ),
        pytest.param(redirects("http://127.0.0.1:9/x"), "redirects to 'http://127.0.0.1:9/x'; expected", id="port"),
        pytest.param(redirects("http://github.com/x"), "redirects to 'http://github.com/x'", id="a known host without TLS"),
        pytest.param(redirects("https://github.com.evil.example/x"), "redirects to", id="a host that looks known"),
        pytest.param(redirects("https://github.com@evil.example/x"), "redirects to", id="a user that looks known"),
        pytest.param(redirects("file:///etc/passwd"), "'file:///etc/passwd' is not allowed", id="a local file"),
        pytest.param(redirects("/test/repair_final.jsonl"), "cannot be had (HTTP Error 302", id="in a circle"),
    ],
)
def test_a_server_is_not_believed(ctcgrpo: Command, published: Path, tmp_path: Path, answer: Answer, expected: str) -> None:
    started = time.monotonic()
    with mirror(published, answer) as url:
        code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", url, "--yes")
    assert code == 3 and expected in err and "Traceback" not in err, err
    assert not list((tmp_path / "home").iterdir()) and time.monotonic() - started < 20


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(sends(lambda body: chunks(body) + b"0\r\n\r\n", Transfer_Encoding="chunked"), id="chunks"),
        pytest.param(sends(lambda body: body + b"more", Content_Length="{length}"), id="more than its length"),
        pytest.param(redirects("http://127.0.0.1:{port}/train/../test/repair_final.jsonl"), id="the same server"),
    ],
)
def test_what_comes_whole_is_taken(ctcgrpo: Command, published: Path, answer: Answer) -> None:
    with mirror(published, answer) as url:
        code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", url, "--yes")
    assert code == 0, err
    assert "train has 64 records, and the published data set 2009: figures on them cannot be compared" in out
    assert len(load_scenarios("eibench/test", "test")) == 16


def test_a_slow_server_is_given_up(
    ctcgrpo: Command, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trickles(to: BaseHTTPRequestHandler, body: bytes) -> None:
        sends(lambda body: b"", Content_Length="{length}")(to, body)
        with suppress(ConnectionError):
            for byte in body:
                to.wfile.write(bytes([byte]))
                time.sleep(0.05)

    monkeypatch.setattr(fetch, "_PATIENCE", 0.5)
    with mirror(published, trickles) as url:
        code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", url, "--yes")
    assert code == 3 and "is not whole after 0.5 s" in err
    assert not list((tmp_path / "home").iterdir())


def test_the_published_source_has_the_published_number(
    ctcgrpo: Command, published: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch.DATASETS["eibench"].counts == {"train": 2009, "test": 213}
    here = dataclasses.replace(fetch.DATASETS["eibench"], source=url)
    monkeypatch.setitem(fetch.DATASETS, "eibench", here)
    code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--yes")
    assert code == 3 and "train has 64 records, and the published data set 2009; test has 16" in err
    assert not list((tmp_path / "home").iterdir())
    monkeypatch.setitem(fetch.DATASETS, "eibench", dataclasses.replace(here, counts={"train": 64, "test": 16}))
    code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--yes")
    assert code == 0 and "published data set" not in out, err


def test_a_file_of_a_folder_has_a_largest_size(
    ctcgrpo: Command, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_LARGEST", 10_000)
    code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", str(published), "--yes")
    assert code == 3 and "at most 10000 bytes" in err and not list((tmp_path / "home").iterdir())
