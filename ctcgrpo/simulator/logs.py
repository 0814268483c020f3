"""The simulator server's log: one JSON object a line. At the default level it holds no text of personas or dialogues, and no level
shows a secret."""

from __future__ import annotations

import logging
from typing import TextIO

import structlog

from ctcgrpo.terminal import printable

Log = structlog.typing.FilteringBoundLogger


def json_log(stream: TextIO, level: str = "info") -> Log:
    log: Log = structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(ensure_ascii=False),
            lambda _, __, line: printable(line),  # the stream may be a terminal, and endpoints' errors are quoted
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
    )
    return log
