"""Fetching a dataset that does not come with this package: from its public repository, after its licence was agreed to."""

from __future__ import annotations

import http.client
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from ctcgrpo.errors import OutputError, ScenarioError
from ctcgrpo.naming import cut, did_you_mean
from ctcgrpo.records import SCENES
from ctcgrpo.scenario_format import Split
from ctcgrpo.scenarios import by_scene, data_home, load_set

_TIMEOUT, _PATIENCE = 60.0, 900.0
"""Seconds that a server may be silent, and that a file may take."""
_LARGEST = 50_000_000
"""Bytes of a file at most; those of EIBench have some 2 to 6 million."""
_PART = 1 << 16


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where a dataset is published, by whom and under what. `source` holds the files of `names`, with so many scenarios a split
    (`counts`); it may redirect to `hosts`, over https."""

    title: str
    licence: str
    source: str
    names: tuple[str, ...]
    counts: Mapping[Split, int]
    hosts: tuple[str, ...]


DATASETS = {
    "eibench": DataSet(
        title="EIBench (arXiv 2606.15532): 2,009 scenarios to train on and 213 to test on, in Chinese",
        licence="CC BY-NC 4.0: name its authors, and no commercial use (https://creativecommons.org/licenses/by-nc/4.0)",
        # As it stood when it was looked at: figures are comparable only on the same scenarios.
        source="https://github.com/Tongyi-ConvAI/Qwen-Character/raw/af8994a4df876c6f4123b3eb41d8a1888507c40c/EIBench/data",
        names=tuple(f"{split}/{scene}_final.jsonl" for split in ("train", "test") for scene in SCENES),
        counts={"train": 2009, "test": 213},
        hosts=("github.com", "raw.githubusercontent.com", "media.githubusercontent.com"),
    )
}


def fetch(
    name: str, agree: Callable[[DataSet], bool], *, source: str | None = None, say: Callable[[str], None] = print
) -> Path:
    """Put a dataset under `data_home()`, whole or not at all; gives its folder. `source`: another URL, or a folder with the files;
    only there may the number of scenarios differ from the published one, which is said.

    Raises ScenarioError for a dataset nobody knows, and for files that cannot be had, come cut, are too large or cannot be read;
    OutputError where the licence is not agreed to, or the folder exists.
    """
    if name not in DATASETS:
        raise ScenarioError(f"there is no dataset {name!r} to fetch; {did_you_mean(name, DATASETS)}")
    dataset, target = DATASETS[name], data_home() / name
    if target.exists():
        raise OutputError(f"{target} is there already; remove it to fetch it anew")
    if not agree(dataset):
        raise OutputError(f"nothing was fetched: {name} is for those who agree to its licence ({dataset.licence})")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / name
        for file in dataset.names:
            say(f"fetching {file}")
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            _copy(source or dataset.source, file, partial / file, dataset.hosts)
        notes = []
        for split, count in dataset.counts.items():
            for file in (file for file in dataset.names if file.startswith(f"{split}/")):
                load_set(partial / file, split)  # each file by itself: none is empty
            found = load_set(partial / split, split)
            if damaged := next((fault for fault in found.faults if not fault.field), None):  # no JSON object: a cut file
                raise ScenarioError(str(damaged))
            say(f"{split}: {len(found.scenarios)} scenarios ({by_scene(found.scenarios)})")
            for line in found.report():
                say(line)
            if found.records != count:
                notes.append(f"{split} has {found.records} records, and the published data set {count}")
        if notes and source is None:
            raise ScenarioError(f"{dataset.source}: {'; '.join(notes)}; the download is not complete, try again")
        for note in notes:
            say(f"{note}: figures on them cannot be compared with published ones")
        lines = [dataset.title, dataset.licence, source or dataset.source, *notes]
        (partial / "SOURCE").write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.rename(target)
    return target


def _copy(source: str, file: str, target: Path, hosts: tuple[str, ...]) -> None:
    if not source.startswith(("http://", "https://")):
        place = str(Path(source) / file)
        try:
            with Path(place).open("rb") as found, target.open("wb") as out:
                _pour(found, out, place)
        except OSError as error:
            raise ScenarioError(f"{place} cannot be copied: {error.strerror}") from None
        return
    url = f"{source.rstrip('/')}/{file}"
    try:
        with urllib.request.build_opener(_Redirects(source, hosts)).open(url, timeout=_TIMEOUT) as response:
            length: int | None = response.length
            if length is None and not response.chunked:
                raise ScenarioError(
                    f"{url} comes without a length (Content-Length), so a cut file would look like a whole one"
                )
            if length is not None and length > _LARGEST:
                raise _too_large(url, length)
            with target.open("wb") as out:
                size = _pour(response, out, url, length)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = "the connection ended too early" if isinstance(error, http.client.IncompleteRead) else cut(str(error))
        raise ScenarioError(
            f"{url} cannot be had ({reason}); clone the repository elsewhere and pass its EIBench/data folder with --source"
        ) from None
    if length is not None and size != length:
        raise ScenarioError(f"{url} came cut: {size} of {length} bytes; try again")
    if target.read_bytes()[:40].startswith(b"version https://git-lfs"):
        raise ScenarioError(
            f"{url} is a pointer to a file in Git LFS; clone the repository with LFS and pass its folder with --source"
        )


def _pour(found: BufferedReader | http.client.HTTPResponse, out: BinaryIO, place: str, length: int | None = None) -> int:
    """Copy a file of acceptable size, in acceptable time, up to `length`; gives how much there was."""
    size, deadline = 0, time.monotonic() + _PATIENCE
    while size != length and (part := found.read1(_PART if length is None else min(_PART, length - size))):
        size += len(part)
        if size > _LARGEST:
            raise _too_large(place, size)
        if time.monotonic() > deadline:
            raise ScenarioError(f"{place} is not whole after {_PATIENCE:g} s; try again")
        out.write(part)
    return size


def _too_large(place: str, size: int) -> ScenarioError:
    return ScenarioError(f"{place} has {size} bytes or more; expected a file of scenarios, of at most {_LARGEST} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to where the source is, and over https to `hosts`."""

    def __init__(self, source: str, hosts: tuple[str, ...]) -> None:
        self._source, self._hosts = urlsplit(source), hosts

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: object,
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        there = urlsplit(newurl)
        here = self._source.netloc
        same = (there.scheme, there.netloc) == (self._source.scheme, here)
        if not same and not (there.scheme == "https" and there.netloc in (here, *self._hosts)):
            raise ScenarioError(
                f"{req.full_url} redirects to {newurl[:200]!r}; expected {self._source.netloc}, or over https "
                f"{', '.join(self._hosts)}"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
