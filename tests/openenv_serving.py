"""An ASGI application on loopback, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from ctcgrpo.simulator.server import bind


@contextmanager
def serving(app: Any, port: int = 0) -> Iterator[str]:
    """Gives the URL. At the end every connection is closed at once, as when a server is killed."""
    listener = bind("127.0.0.1", port)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for what a server does after a connection has ended."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)
