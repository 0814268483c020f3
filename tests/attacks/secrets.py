"""Tokens of the Hub and names of datasets there: a Hub that quotes the token back, names that lead elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ctcgrpo.factory.example import example
from tests.attacks.run_files import run
from tests.attacks.suite import Tries, attack
from tests.conftest import ROOT

_TOKEN = "hf_AttackAttackAttackAttackAttack01"


@contextmanager
def _hub(status: int) -> Iterator[tuple[str, list[str]]]:
    """A Hub that refuses everything, and quotes the request's headers wherever it can; and what it was sent."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            self.rfile.read(length)
            token = self.headers.get("authorization", "")
            seen.append(token)
            body = json.dumps({"error": f"you sent {token}", "message": token, "sha": token}).encode()
            self.send_response(status)
            for name in ("X-Error-Message", "X-Request-Id", "X-Error-Code"):
                self.send_header(name, f"you sent {token}")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_HEAD = _answer  # noqa: N815 - the library's names

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


def _records(file: Path) -> Path:
    record = example("support", "en") | {"licence": "CC0-1.0", "data_source": "made here"}
    file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return file


@attack("secrets", seconds=180)
def hub_tokens(tries: Tries) -> None:
    """Pushing and fetching where the Hub refuses and quotes the token: no output holds it, and there is no traceback."""
    file = _records(tries.folder / "scenarios.jsonl")
    (tries.folder / "policy").mkdir()
    (tries.folder / "policy" / "config.json").write_text("{}")
    push = "from ctcgrpo.cli import _guarded; from ctcgrpo.run.export import push; from pathlib import Path; "
    push += f"_guarded(lambda: push(Path({str(tries.folder / 'policy')!r}), 'me/policy'))"
    commands = {
        "push a policy": ["-c", push],
        "push scenarios": ["-m", "ctcgrpo", "scenarios", "convert", str(file), "hf://datasets/me/scenarios"],
        "fetch scenarios": [
            "-m",
            "ctcgrpo",
            "scenarios",
            "convert",
            "hf://datasets/me/scenarios",
            str(tries.folder / "out"),
        ],
        "fetch a model": ["-m", "ctcgrpo", "check", "recipes/tiny.yaml", "policy.model=me/model"],
    }
    for what, command in commands.items():
        for status in (401, 403):
            with tries.one(f"{what}, {status}"), _hub(status) as (url, seen):
                ended = subprocess.run(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env={
                        **os.environ,
                        "HF_ENDPOINT": url,
                        "HF_TOKEN": _TOKEN,
                        "HF_HUB_OFFLINE": "0",
                        "PYTHONPATH": str(ROOT),
                    }
                    | {"HF_HOME": str(tries.folder / "hf"), "HF_HUB_ETAG_TIMEOUT": "3", "HF_HUB_DISABLE_TELEMETRY": "1"},
                    capture_output=True,
                    text=True,
                    timeout=80,
                )
                said = ended.stdout + ended.stderr
                assert any(_TOKEN in header for header in seen), f"the Hub was not asked with the token: {said[-300:]}"
                assert _TOKEN not in said and _TOKEN[3:] not in said, f"the token is shown: {said[-500:]}"
                assert "Traceback" not in said and ended.returncode, said[-500:]


@attack("secrets", seconds=30)
def hub_names(tries: Tries) -> None:
    """Names of datasets and models that are paths, empty, of odd characters or very long: an error, never a traceback."""
    file = _records(tries.folder / "scenarios.jsonl")
    odd = [
        "~nobody/x",
        "",
        "/",
        "../../etc",
        "a/b/c",
        "me/x\n",
        "me/\u202e",
        "x" * 5000,
        "me/name?token=1",
        "me/..",
        "-/-",
        "me/\0",
    ]
    for name in odd:
        with tries.one(f"to hf://datasets/{name[:30]!r}"):
            ran = run("scenarios", "convert", str(file), f"hf://datasets/{name}")
            assert ran.code and not ran.trace and ran.err, (ran.trace, ran.said[-200:])
        with tries.one(f"from hf://datasets/{name[:30]!r}"):
            ran = run("scenarios", "convert", f"hf://datasets/{name}", str(tries.folder / "out"))
            assert ran.code and not ran.trace and ran.err, (ran.trace, ran.said[-200:])
            assert not (tries.folder / "out").exists()
        with tries.one(f"as a model {name[:30]!r}"):
            ran = run("train", "recipes/tiny.yaml", f"policy.model={name}", f"run.output_dir={tries.folder}")
            assert ran.code and not ran.trace and ran.err, (ran.trace, ran.said[-200:])
