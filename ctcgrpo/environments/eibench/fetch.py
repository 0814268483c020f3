"""Fetching a dataset that does not come with this package: from its public repository, after its licence was agreed to.

Its files are compared with the blob ids of the published commit, from GitHub's API or from a clone. A blob id is a SHA-1 of a
file's length and content; for a file in Git LFS it is that of a pointer, and never that of the file."""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ctcgrpo.environments.eibench.download import copy, download
from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.environments.eibench.scenario_format import Split
from ctcgrpo.environments.eibench.scenarios import by_scene, data_home, load_set
from ctcgrpo.errors import OutputError, ScenarioError
from ctcgrpo.util.files import explained
from ctcgrpo.util.naming import did_you_mean
from ctcgrpo.util.terminal import log_line

_LARGEST, _PATIENCE = 50_000_000, 900.0
"""Bytes of a file at most, where those of EIBench have some 2 to 6 million; and seconds that it may take."""
_LIST_LARGEST, _LIST_PATIENCE = 10_000_000, 60.0  # of a list of files, where GitHub truncates those above 7 MB


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where a dataset is published, by whom and under what. `source` holds the files of `names`, with so many scenarios a split
    (`counts`); it may redirect to `hosts`, over https. `listing` is where GitHub's API lists the files of `commit`, those of the
    dataset in `folder`; `repository` is what git clones."""

    title: str
    licence: str
    source: str
    commit: str
    folder: str
    listing: str
    repository: str
    names: tuple[str, ...]
    counts: Mapping[Split, int]
    hosts: tuple[str, ...]

    @property
    def by_hand(self) -> str:
        """How to get the files where this machine cannot download them."""
        return (
            f"by hand: where there is a connection, `git clone {self.repository}` and, in the clone, `git checkout {self.commit}`; "
            f"copy the clone here, and pass --source CLONE/{self.folder}"
        )


# As it was when it was looked at: figures are comparable only on the same scenarios.
_COMMIT = "af8994a4df876c6f4123b3eb41d8a1888507c40c"
DATASETS = {
    "eibench": DataSet(
        title="EIBench (arXiv 2606.15532): 2,009 scenarios to train on and 213 to test on, in Chinese",
        licence="CC BY-NC 4.0: name its authors, and no commercial use (https://creativecommons.org/licenses/by-nc/4.0)",
        source=f"https://github.com/Tongyi-ConvAI/Qwen-Character/raw/{_COMMIT}/EIBench/data",
        commit=_COMMIT,
        folder="EIBench/data",
        listing=f"https://api.github.com/repos/Tongyi-ConvAI/Qwen-Character/git/trees/{_COMMIT}?recursive=1",
        repository="https://github.com/Tongyi-ConvAI/Qwen-Character",
        names=tuple(f"{split}/{scene}_final.jsonl" for split in ("train", "test") for scene in SCENES),
        counts={"train": 2009, "test": 213},
        hosts=("github.com", "raw.githubusercontent.com", "media.githubusercontent.com"),
    )
}


def fetch(name: str, agree: Callable[[DataSet], bool], *, source: str | None = None, verify: bool = True) -> Path:
    """Put a dataset under `data_home()`, complete or not at all; gives its folder. Each file is compared with the published commit,
    whose list of files GitHub's API gives. `verify=False` skips this, which is logged and recorded. Files of another `source` (a
    URL or a folder) are compared where it is in a clone that has the commit; a difference is logged and recorded too.

    Raises ScenarioError for a dataset nobody knows, for files that cannot be downloaded, are cut, altered, too large or cannot be
    read, and where the list of files is not available; OutputError where the licence is not agreed to, or the folder exists."""
    if name not in DATASETS:
        raise ScenarioError(f"unknown dataset {name!r}; {did_you_mean(name, DATASETS)}")
    dataset, target = DATASETS[name], data_home() / name
    if source is not None and not verify:
        raise ScenarioError(
            "--unverified and --source: both given; expected one, since files of another source may differ anyway"
        )
    if target.exists():
        raise OutputError(f"{target} already exists; remove it to fetch it again")
    if not agree(dataset):
        raise OutputError(f"nothing was fetched: {name} requires agreement to its licence ({dataset.licence})")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / name
        listed, how = _listed(dataset, source, verify, Path(folder))
        log_line(how)
        digests, differing = [], []
        for file in dataset.names:
            log_line(f"fetching {file}")
            content = _fetch_file(dataset, source, file, partial / file)
            digests.append(f"{hashlib.sha256(content).hexdigest()}  {file}")
            blob = blob_id(content)
            wanted = blob if listed is None else listed.get(f"{dataset.folder}/{file}", "no such file")
            if blob == wanted:
                continue
            problem = f"git blob id = {blob}; expected {wanted}"
            if source is None:
                why = "it was altered on the way, or the commit has only a pointer to Git LFS; try again"
                raise ScenarioError(f"{dataset.source}/{file}: {problem} by commit {dataset.commit}: {why}")
            differing.append(f"{file} is not that of the commit: {problem}")
        notes = [*differing, *_differing_counts(dataset, partial)]
        if notes and source is None:
            raise ScenarioError(f"{dataset.source}: {'; '.join(notes)}; the download is not complete, try again")
        for note in notes:
            log_line(f"{note}: figures on them cannot be compared with published ones")
        if listed is not None:
            how = f"{how}: {len(dataset.names) - len(differing)} of {len(dataset.names)} files are the same"
            log_line(how)
        lines = [dataset.title, dataset.licence, source or dataset.source, how, *notes, "sha256 of each file:", *digests]
        (partial / "SOURCE").write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.rename(target)
    return target


def _listed(dataset: DataSet, source: str | None, verify: bool, scratch: Path) -> tuple[dict[str, str] | None, str]:
    """The blob ids of the commit by path, None where there is nothing to compare with; and how files are compared, or why not."""
    commit = f"commit {dataset.commit}"
    unknown = f"the files are NOT compared with {commit}, only their format and number are checked"
    if not verify:
        return None, f"{unknown} (--unverified)"
    if source is None:
        try:
            return listed_by_github(dataset.listing, scratch), f"compared with {commit} by {dataset.listing}"
        except ScenarioError as error:
            problem = f"{error}; without it the files cannot be compared with {commit}"
            advice = "Try again later, or take the files unchecked with --unverified"
            raise ScenarioError(f"{problem}. {advice}, or {dataset.by_hand}") from None
    if _is_url(source):
        return None, f"{unknown}: {source} is not the published source"
    listed = listed_by_clone(Path(source), dataset.commit)
    if listed is None:
        return None, f"{unknown}: {source} is not in a git clone that has it"
    return listed, f"compared with {commit} by the clone that {source} is in"


def _fetch_file(dataset: DataSet, source: str | None, file: str, target: Path) -> bytes:
    """Copy or download a file; gives its content."""
    target.parent.mkdir(parents=True, exist_ok=True)
    place = f"{(source or dataset.source).rstrip('/')}/{file}"
    if source is not None and not _is_url(source):
        copy(Path(place), target, largest=_LARGEST, patience=_PATIENCE)
    else:
        try:
            download(place, target, largest=_LARGEST, patience=_PATIENCE, hosts=dataset.hosts)
        except ScenarioError as error:
            raise ScenarioError(f"{error}; try again, or {dataset.by_hand}") from None
    content = target.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        advice = f"clone {dataset.repository} with LFS and pass --source CLONE/{dataset.folder}"
        raise ScenarioError(f"{place} is a pointer to a file in Git LFS; {advice}")
    return content


def _differing_counts(dataset: DataSet, folder: Path) -> list[str]:
    """A note for each split that has not the published number of scenarios. Raises ScenarioError for files that cannot be read."""
    notes = []
    for split, count in dataset.counts.items():
        for file in (file for file in dataset.names if file.startswith(f"{split}/")):
            load_set(folder / file, split)  # each file by itself: none is empty
        found = load_set(folder / split, split)
        if damaged := next((fault for fault in found.faults if not fault.field), None):  # no JSON object: a cut file
            raise ScenarioError(str(damaged))
        log_line(f"{split}: {len(found.scenarios)} scenarios ({by_scene(found.scenarios)})")
        for line in found.report():
            log_line(line)
        if found.records != count:
            notes.append(f"{split} has {found.records} records, and the published data set {count}")
    return notes


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


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
    download(url, answer, largest=_LIST_LARGEST, patience=_LIST_PATIENCE, accept="application/vnd.github+json")
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
            timeout=_LIST_PATIENCE,
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
