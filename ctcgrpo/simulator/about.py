"""Who played the user (or the judge), in words, from what a server or an evaluation said of it (`GET /health`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctcgrpo.util.terminal import printable


def described(about: Mapping[str, Any] | None) -> str:
    """The models, or the backend where it has none, and its prompts; "unknown" where neither is said. A server of somebody else may
    say anything: what is not text is left out."""
    about = about or {}
    models = about.get("models")
    names = [name for name in models if isinstance(name, str) and name] if isinstance(models, list | tuple) else []
    backend, prompts = (about[key] if isinstance(about.get(key), str) else "" for key in ("backend", "prompts"))
    told = ", ".join(names) or backend or "unknown"
    told += f", prompts {prompts}" if prompts else ""
    reluctance = about.get("reluctance")
    told += f", reluctance {reluctance:g}" if isinstance(reluctance, int | float) else ""
    return " ".join(printable(told).split())
