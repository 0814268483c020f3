"""`ctcgrpo report RUN --live`: serves the report while the run trains.

    GET /       the page, which has no figures of its own
    GET /data   figures and newest dialogues as gzipped JSON; 304 where the page has them (If-None-Match)

A thread reads the folder while somebody asks.
"""

import gzip
import hashlib
import json
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ctcgrpo.errors import CtcGrpoError
from ctcgrpo.report.live import Live, LiveReader
from ctcgrpo.report.live_figures import live_figures
from ctcgrpo.report.page import figures_of, live_page
from ctcgrpo.report.page_server import page_response, serve_page
from ctcgrpo.report.reading import Run
from ctcgrpo.util.terminal import printable

_LEAST_SECONDS = 1.0  # between two readings
_SHARE = 9  # times as long as a reading took, so that readings take at most a tenth of a core


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What /data answers, and the run that it shows; None before there is one."""

    body: bytes
    etag: str
    run: Run | None = None


class Watcher:
    """Keeps a snapshot of a run, and renews it while somebody asks for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = LiveReader(path)
        self._asked = threading.Event()
        self._snapshot = waiting(f"reading {path}")
        threading.Thread(target=self._watch, name="live report", daemon=True).start()

    def snapshot(self) -> Snapshot:
        """The newest snapshot. It is never waited for."""
        self._asked.set()
        return self._snapshot

    def _watch(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            started, first = time.thread_time(), self._snapshot.run is None
            self._renew()
            time.sleep(_LEAST_SECONDS if first else max(_LEAST_SECONDS, _SHARE * (time.thread_time() - started)))

    def _renew(self) -> None:
        try:
            live = self._reader.read(self._progress)
            if live is not None:
                self._snapshot = snapshot_of(live)
        except (CtcGrpoError, OSError) as error:
            self._reader = LiveReader(self._path)
            self._snapshot = waiting(f"waiting for the run: {error}")
        except Exception as error:  # noqa: BLE001 - a bug: it is printed, the page shows it, and the next reading may pass
            traceback.print_exc()
            self._reader = LiveReader(self._path)
            self._snapshot = waiting(f"internal error: {type(error).__name__}; see the terminal of ctcgrpo report --live")

    def _progress(self, done: int, of: int) -> None:
        if self._snapshot.run is None:
            self._snapshot = waiting(f"reading the dialogues of {of} steps and validations: {done} done")


def waiting(text: str) -> Snapshot:
    return _packed({"waiting": printable(text)}, None)


def snapshot_of(live: Live) -> Snapshot:
    episodes = sum(part.episodes for part in live.run.parts)
    figures = {**figures_of(live.run), "shown": len(live.dialogues), "of": episodes, "trials": []}
    return _packed({"live": live_figures(live), "figures": figures}, live.run, f'"episodes":[{",".join(live.dialogues)}]')


def _packed(content: Mapping[str, Any], run: Run | None, more: str = "") -> Snapshot:
    text = json.dumps(content, ensure_ascii=False)
    data = (f"{text[:-1]},{more}}}" if more else text).encode("utf-8", "replace")
    return Snapshot(gzip.compress(data, 5, mtime=0), f'"{hashlib.sha256(data).hexdigest()[:16]}"', run)


def routes(path: Path) -> list[Route]:
    """Of the page of a run's folder, which need not be there yet."""
    watcher = Watcher(path)
    name = path.resolve().name

    def page(request: Request) -> Response:
        return page_response(lambda nonce: live_page(name, watcher.snapshot().run, nonce))

    def data(request: Request) -> Response:
        found = watcher.snapshot()
        headers = {"ETag": found.etag, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        if request.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers=headers)
        return Response(found.body, headers={**headers, "Content-Encoding": "gzip"}, media_type="application/json")

    return [Route("/", page), Route("/data", data)]


def serve_live(path: Path, host: str, port: int, log_line: Callable[[str], None]) -> None:
    """Serve the live report of a run until Ctrl-C. Raises RecipeError for a host or port that cannot be used."""
    serve_page(
        routes(path),
        host,
        port,
        announce=lambda url: log_line(f"live report of {path}: {url}\nCtrl-C stops it; it only reads, and the run continues"),
    )
