"""Fetching a dataset over HTTP: after its licence, whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ctcgrpo.environments.eibench import fetch
from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.environments.eibench.scenarios import PACKS, load_scenarios
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
    assert code == 6 and "already exists" in err


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
    fails("git clone https://github.com/Tongyi-ConvAI/Qwen-Character`", "eibench", "--source", url, "--yes")
    fails("test/charm_final.jsonl cannot be downloaded (HTTP Error 404", "eibench", "--source", url, "--yes")
    fails("charm_final.jsonl cannot be copied", "eibench", "--source", str(published), "--yes")
    fails("did you mean 'eibench'", "eibensh", "--yes")


def test_without_agreement_nothing_is_fetched(ctcgrpo: Command, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.confirm", lambda question: False)
    code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", str(published))
    assert code == 6 and "CC BY-NC 4.0" in out and "nothing was fetched" in err


Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


@contextmanager
def mirror(published: Path, answer: Answer, path: str = "/test/repair_final.jsonl") -> Iterator[str]:
    """A server that gives the files whole, and at /tree what GitHub's API says of them; `path` as `answer` writes it."""
    tree = listing(published)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def do_GET(self) -> None:
            body = tree if self.path == "/tree" else (published / self.path.lstrip("/")).read_bytes()
            self.close_connection = True
            (answer if self.path == path else whole)(self, body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def listing(published: Path, **changes: object) -> bytes:
    """What GitHub's API says of a commit with the files of `published` in EIBench/data."""
    entries: list[dict[str, object]] = [{"path": "EIBench", "mode": "040000", "type": "tree", "sha": "0" * 40, "url": "x"}]
    for file in sorted(published.rglob("*.jsonl")):
        path, body = f"EIBench/data/{file.relative_to(published)}", file.read_bytes()
        # As git computes it, and not as ctcgrpo does.
        found = subprocess.run(["git", "hash-object", "--stdin"], input=body, capture_output=True, check=True).stdout
        entry = {
            "path": path,
            "mode": "100644",
            "type": "blob",
            "sha": found.decode().strip(),
            "size": len(body),
            "url": "x",
        }
        entries.append(entry)
    return json.dumps({"sha": "0" * 40, "url": "x", "tree": entries, "truncated": False} | changes).encode()


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


whole = sends(lambda body: body, Content_Length="{length}")


def redirects(where: str) -> Answer:
    def answer(to: BaseHTTPRequestHandler, body: bytes) -> None:
        to.send_response(302)
        to.send_header("Location", where.format(port=to.server.server_port))  # type: ignore[attr-defined]
        to.send_header("Content-Length", "0")
        to.end_headers()

    return answer


def trickles(to: BaseHTTPRequestHandler, body: bytes) -> None:
    sends(lambda body: b"", Content_Length="{length}")(to, body)
    with suppress(ConnectionError):
        for byte in body:
            to.wfile.write(bytes([byte]))
            time.sleep(0.05)


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
        pytest.param(
            sends(first_line, Content_Length="{length}"), "repair_final.jsonl: incomplete download, ", id="cut at a line"
        ),
        pytest.param(sends(lambda body: b"", Content_Length="{length}"), ": incomplete download, 0 of ", id="nothing of it"),
        pytest.param(sends(lambda body: b"", Content_Length="0"), "repair_final.jsonl: holds no scenarios", id="empty"),
        pytest.param(
            sends(lambda body: chunks(first_line(body)), Transfer_Encoding="chunked"), "closed too early", id="cut chunks"
        ),
        pytest.param(sends(first_line), "comes without a length", id="no length"),
        pytest.param(sends(lambda body: b" " * 10_000, Content_Length="1000000000000"), "1000000000000 bytes or more", id="huge"),
        pytest.param(
            sends(lambda body: chunks(b" " * 10**6) * 60, Transfer_Encoding="chunked"), "bytes or more", id="endless chunks"
        ),
        pytest.param(sends(lambda body: b"<html>\n", Content_Length="7"), "not valid JSON", id="a page"),
        pytest.param(redirects("http://localhost:{port}/train/charm_final.jsonl"), "redirects to 'http://localhost", id="host"),
        pytest.param(redirects("http://127.0.0.1:9/x"), "redirects to 'http://127.0.0.1:9/x'; expected", id="port"),
        pytest.param(redirects("http://github.com/x"), "redirects to 'http://github.com/x'", id="a known host without TLS"),
        pytest.param(redirects("https://github.com.evil.example/x"), "redirects to", id="a host that looks known"),
        pytest.param(redirects("https://github.com@evil.example/x"), "redirects to", id="a user that looks known"),
        pytest.param(redirects("file:///etc/passwd"), "'file:///etc/passwd' is not allowed", id="a local file"),
        pytest.param(redirects("/test/repair_final.jsonl"), "cannot be downloaded (HTTP Error 302", id="in a circle"),
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


def test_a_slow_server_is_given_up(ctcgrpo: Command, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PATIENCE", 0.5)
    with mirror(published, trickles) as url:
        code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", url, "--yes")
    assert code == 3 and "not complete after 0.5 s" in err
    assert not list((tmp_path / "home").iterdir())


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a mirror the published source."""

    def pin(url: str) -> None:
        here = dataclasses.replace(fetch.DATASETS["eibench"], source=url, listing=f"{url}/tree", counts={"train": 64, "test": 16})
        monkeypatch.setitem(fetch.DATASETS, "eibench", here)

    return pin


def test_the_published_source_has_the_published_number(
    ctcgrpo: Command, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: Callable[[str], None]
) -> None:
    assert fetch.DATASETS["eibench"].counts == {"train": 2009, "test": 213}
    with mirror(published, whole) as url:
        pinned(url)
        here = fetch.DATASETS["eibench"]
        monkeypatch.setitem(fetch.DATASETS, "eibench", dataclasses.replace(here, counts={"train": 2009, "test": 213}))
        code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--yes")
        assert code == 3 and "train has 64 records, and the published data set 2009; test has 16" in err
        assert not list((tmp_path / "home").iterdir())
        monkeypatch.setitem(fetch.DATASETS, "eibench", here)
        code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--yes")
        assert code == 0 and "published data set" not in out, err


def test_the_files_are_those_of_the_pinned_commit(
    ctcgrpo: Command, published: Path, tmp_path: Path, pinned: Callable[[str], None]
) -> None:
    dataset = fetch.DATASETS["eibench"]
    assert dataset.commit in dataset.source and dataset.commit in dataset.listing and dataset.source.endswith(dataset.folder)
    with mirror(published, whole) as url:
        pinned(url)
        code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--yes")
    assert code == 0, err
    assert f"compared with commit {dataset.commit} by {url}/tree: 8 of 8 files are the same" in out
    source = (tmp_path / "home" / "eibench" / "SOURCE").read_text()
    assert "8 of 8 files are the same" in source and sums(published) in source


def sums(folder: Path) -> str:
    """The SHA-256 of each file, as sha256sum prints it."""
    names = [f"{split}/{scene}_final.jsonl" for split in ("train", "test") for scene in SCENES]
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def other_letter(body: bytes) -> bytes:
    """As long, with as many scenarios as before."""
    return body.replace(b"the", b"thy", 1)


def test_a_file_that_differs_from_the_commit_is_refused_by_name(
    ctcgrpo: Command, published: Path, tmp_path: Path, pinned: Callable[[str], None]
) -> None:
    body = (published / "test" / "repair_final.jsonl").read_bytes()
    assert len(other_letter(body)) == len(body) and other_letter(body) != body
    with mirror(published, sends(other_letter, Content_Length="{length}")) as url:
        pinned(url)
        code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--yes")
        assert code == 3 and f"{url}/test/repair_final.jsonl: git blob id = " in err and "expected " in err, err
        assert not list((tmp_path / "home").iterdir())
        code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--yes", "--unverified")
    assert code == 0, err
    commit = fetch.DATASETS["eibench"].commit
    note = f"the files are NOT compared with commit {commit}, only their format and number are checked (--unverified)"
    source = (tmp_path / "home" / "eibench" / "SOURCE").read_text()
    assert note in out and note in source
    assert f"{hashlib.sha256(other_letter(body)).hexdigest()}  test/repair_final.jsonl\n" in source


def without_a_file(body: bytes) -> bytes:
    return body.replace(b"EIBench/data/test/repair", b"EIBench/data/text/repair")


def answers(status: int, body: bytes, **headers: str) -> Answer:
    def answer(to: BaseHTTPRequestHandler, _: bytes) -> None:
        to.send_response(status)
        for name, value in headers.items():
            to.send_header(name.replace("_", "-"), value)
        to.send_header("Content-Length", str(len(body)))
        to.end_headers()
        to.wfile.write(body)

    return answer


def sends_all(data: Callable[[bytes], bytes]) -> Answer:
    return lambda to, body: answers(200, data(body))(to, body)


LIMIT = answers(403, b'{"message": "API rate limit exceeded"}', X_RateLimit_Remaining="0")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(LIMIT, "HTTP Error 403: Forbidden; the server allows no more requests", id="rate limit"),
        pytest.param(answers(404, b""), "cannot be downloaded (HTTP Error 404", id="no such commit"),
        pytest.param(answers(200, b""), "/tree: ", id="empty"),
        pytest.param(answers(200, b"<html>"), "b'<html>'; expected an object", id="a page"),
        pytest.param(answers(200, b"[" * 100_000), "[[; expected an object", id="deep"),
        pytest.param(answers(200, b"{}"), "truncated is missing", id="an object"),
        pytest.param(sends_all(lambda body: body.replace(b'"sha": "', b'"sha": "x', 2)), "tree.0.sha = 'x0000", id="id"),
        pytest.param(sends_all(lambda body: body.replace(b"false", b"true")), "truncated = true; expected", id="truncated"),
        pytest.param(sends_all(lambda body: body.replace(b"false", b'"no"')), "truncated = 'no'", id="another type"),
        pytest.param(sends(lambda body: body[:-50], Content_Length="{length}"), "/tree: incomplete download, ", id="cut"),
        pytest.param(sends(lambda body: b" " * 10_000, Content_Length="10000001"), "at most 10000000 bytes", id="huge"),
        pytest.param(
            sends(lambda body: chunks(b" " * 10**6) * 20, Transfer_Encoding="chunked"),
            "at most 10000000 bytes",
            id="endless",
        ),
        pytest.param(redirects("http://localhost:{port}/tree"), "redirects to 'http://localhost", id="another host"),
        pytest.param(redirects("https://github.com/tree"), "redirects to 'https://github.com/tree'", id="not the API"),
    ],
)
def test_without_the_list_of_files_nothing_is_fetched(
    ctcgrpo: Command, published: Path, tmp_path: Path, answer: Answer, expected: str, pinned: Callable[[str], None]
) -> None:
    with mirror(published, answer, "/tree") as url:
        pinned(url)
        code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--yes")
        assert code == 3 and expected in err and "--unverified" in err and "Traceback" not in err, err
        assert "git clone https://github.com/Tongyi-ConvAI/Qwen-Character` and" in err and "--source CLONE/EIBench/data" in err
        assert "fetching" not in out and not list((tmp_path / "home").iterdir())
        code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--yes", "--unverified")
    assert code == 0 and "NOT compared with commit" in out, err


def test_a_slow_list_of_files_is_given_up(
    ctcgrpo: Command, published: Path, monkeypatch: pytest.MonkeyPatch, pinned: Callable[[str], None]
) -> None:
    monkeypatch.setattr(fetch, "_LIST_PATIENCE", 0.5)
    with mirror(published, trickles, "/tree") as url:
        pinned(url)
        code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--yes")
    assert code == 3 and "/tree: not complete after 0.5 s" in err and "--unverified" in err


def test_a_file_that_the_commit_lacks_is_refused(
    ctcgrpo: Command, published: Path, tmp_path: Path, pinned: Callable[[str], None]
) -> None:
    with mirror(published, sends_all(without_a_file), "/tree") as url:
        pinned(url)
        code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--yes")
    assert code == 3 and "test/repair_final.jsonl: git blob id = " in err and "expected no such file by commit" in err
    assert not list((tmp_path / "home").iterdir())


def test_a_folder_is_compared_where_it_is_in_a_clone(
    ctcgrpo: Command, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(published, clone / "EIBench" / "data")

    def git(*command: str) -> str:
        found = ["git", "-C", str(clone), "-c", "user.name=x", "-c", "user.email=x@example.org", *command]
        return subprocess.run(found, capture_output=True, check=True, text=True).stdout.strip()

    def fetched(folder: Path) -> str:
        code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", str(folder), "--yes")
        assert code == 0, err
        source = (tmp_path / "home" / "eibench" / "SOURCE").read_text()
        shutil.rmtree(tmp_path / "home" / "eibench")
        assert sums(folder) in source and "compared with commit" in out
        return source

    data = clone / "EIBench" / "data"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "data")
    assert f"NOT compared with commit {fetch.DATASETS['eibench'].commit}" in fetched(data)  # the clone is of something else
    here = dataclasses.replace(fetch.DATASETS["eibench"], commit=git("rev-parse", "HEAD"))
    monkeypatch.setitem(fetch.DATASETS, "eibench", here)
    assert "by the clone that" in (source := fetched(data)) and "8 of 8 files are the same" in source
    assert f"{published} is not in a git clone that has it" in fetched(published)
    file = data / "test" / "repair_final.jsonl"
    file.write_bytes(other_letter(file.read_bytes()))
    git("commit", "-qam", "another")
    source = fetched(data)
    assert "7 of 8 files are the same" in source
    assert "test/repair_final.jsonl is not that of the commit: git blob id = " in source


def test_a_partial_clone_is_listed_without_its_commands(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        found = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "protocol.file.allow=always", *command]
        return subprocess.run(found, capture_output=True, check=True, text=True).stdout.strip()

    whole, part, ran = tmp_path / "whole", tmp_path / "part", tmp_path / "ran"
    git("init", "-q", str(whole))
    (whole / "file").write_text("x")
    git("-C", str(whole), "add", ".")
    git("-C", str(whole), "commit", "-qm", "x")
    git("-C", str(whole), "config", "uploadpack.allowFilter", "true")
    git("-C", str(whole), "config", "uploadpack.allowAnySHA1InWant", "true")
    git("clone", "-q", "--no-checkout", "--filter=tree:0", f"file://{whole}", str(part))
    git("-C", str(part), "config", "remote.origin.uploadpack", f"touch {ran}; git-upload-pack")
    commit = git("-C", str(part), "rev-parse", "HEAD")
    assert fetch.listed_by_clone(part, commit) is None and not ran.exists()
    assert list(fetch.listed_by_clone(whole, commit) or ()) == ["file"]
    git("-C", str(part), "ls-tree", commit)
    assert ran.exists()  # so git runs it, where nobody forbids it


def test_another_url_is_said_not_to_be_compared(ctcgrpo: Command, url: str, tmp_path: Path) -> None:
    code, out, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", url, "--yes")
    assert code == 0, err
    source = (tmp_path / "home" / "eibench" / "SOURCE").read_text()
    for text in (out, source):
        assert "NOT compared with commit" in text and f"{url} is not the published source" in text
    code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", url, "--yes", "--unverified")
    assert code == 3 and "--unverified and --source: both given" in err


def test_a_file_of_a_folder_has_a_largest_size(
    ctcgrpo: Command, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_LARGEST", 10_000)
    code, _, err = ctcgrpo("scenarios", "fetch", "eibench", "--source", str(published), "--yes")
    assert code == 3 and "at most 10000 bytes" in err and not list((tmp_path / "home").iterdir())
