"""The blob ids of a commit's files, from GitHub's API or from a clone: what a file is compared with.

A blob id is a SHA-1 of a file's length and content. For a file in Git LFS it is that of a pointer, and never that of the file."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ctcgrpo.environments.eibench.download import download
from ctcgrpo.errors import ScenarioError
from ctcgrpo.util.files import explained

_LARGEST, _PATIENCE = 10_000_000, 60.0
"""Bytes of a list, where GitHub truncates those above 7 MB; and seconds that it may take."""


def blob_id(content: bytes) -> str:
    """Git's id of a content: the SHA-1 of "blob", the length, a zero byte and the content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)
    path: str
    type: str
    sha: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class _Tree(BaseModel):
    model_config = ConfigDict(strict=True)
    truncated: bool
    tree: list[_Entry]


def listed_by_github(url: str, scratch: Path) -> dict[str, str]:
    """The blob ids of a commit by path, from GitHub's API at `url` (.../git/trees/COMMIT?recursive=1), by way of a file in
    `scratch`. Raises ScenarioError where there is no answer, or no complete one."""
    answer = scratch / "tree.json"
    download(url, answer, largest=_LARGEST, patience=_PATIENCE, accept="application/vnd.github+json")
    try:
        tree = _Tree.model_validate_json(answer.read_bytes())
    except ValidationError as error:
        raise ScenarioError(f"{url}: {explained(error)}; expected a list of files as GitHub's API gives it") from None
    if tree.truncated:
        raise ScenarioError(f"{url}: truncated = true; expected a complete list of files")
    return {e.path: e.sha for e in tree.tree if e.type == "blob"}


def listed_by_clone(place: Path, commit: str) -> dict[str, str] | None:
    """The same from the git repository that `place` is in; None where there is none, it lacks the commit, or git is missing."""
    try:
        entries = subprocess.run(
            ["git", "-C", str(place), "ls-tree", "-r", "-z", "--full-tree", commit],
            # No transport is allowed: a partial clone would run commands of its own configuration to fetch what it lacks. And no
            # object stands in for another (git replace).
            env={**os.environ, "GIT_ALLOW_PROTOCOL": "none", "GIT_NO_REPLACE_OBJECTS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    blobs = {}
    for about, _, path in (entry.partition(b"\t") for entry in entries.split(b"\0") if entry):
        _, kind, name = about.split()
        if kind == b"blob":
            blobs[os.fsdecode(path)] = name.decode()
    return blobs
