"""The simulator server's log: one JSON object a line. At the default level it holds no text of personas or dialogues, and no level
shows a secret."""

import json
import logging
from typing import Any, TextIO

import structlog

from ctcgrpo.util.terminal import printable

Log = structlog.typing.FilteringBoundLogger


def _printable_json(event: object, **options: Any) -> str:
    """JSON without control characters: the stream may be a terminal, and the log quotes endpoints."""
    return printable(json.dumps(event, ensure_ascii=False, **options))


def json_log(stream: TextIO, level: str = "info") -> Log:
    log: Log = structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=_printable_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
    )
    return log
