"""Fetching a dataset that does not come with this package: from its public repository, after its licence was agreed to."""

from __future__ import annotations

import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ctcgrpo.errors import OutputError, ScenarioError
from ctcgrpo.naming import did_you_mean
from ctcgrpo.records import SCENES
from ctcgrpo.scenarios import by_scene, data_home, load_scenarios

_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where a dataset is published, by whom and under what. `source` holds the files of `names`."""

    title: str
    licence: str
    source: str
    names: tuple[str, ...]


DATASETS = {
    "eibench": DataSet(
        title="EIBench (arXiv 2606.15532): 2,009 scenarios to train on and 213 to test on, in Chinese",
        licence="CC BY-NC 4.0: name its authors, and no commercial use (https://creativecommons.org/licenses/by-nc/4.0)",
        # As it stood when it was looked at: figures are comparable only on the same scenarios.
        source="https://github.com/Tongyi-ConvAI/Qwen-Character/raw/af8994a4df876c6f4123b3eb41d8a1888507c40c/EIBench/data",
        names=tuple(f"{split}/{scene}_final.jsonl" for split in ("train", "test") for scene in SCENES),
    )
}


def fetch(
    name: str, agree: Callable[[DataSet], bool], *, source: str | None = None, say: Callable[[str], None] = print
) -> Path:
    """Put a dataset under `data_home()`, whole or not at all; gives its folder. `source`: another URL, or a folder with the files.

    Raises ScenarioError for a dataset nobody knows, and for files that cannot be had or read; OutputError where the licence is not
    agreed to, or the folder exists.
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
            _copy(source or dataset.source, file, partial / file)
        for split in ("train", "test"):
            found = load_scenarios(partial / split, "train" if split == "train" else "test")
            say(f"{split}: {len(found)} scenarios ({by_scene(found)})")
        (partial / "SOURCE").write_text(
            f"{dataset.title}\n{dataset.licence}\n{source or dataset.source}\n", encoding="utf-8"
        )
        partial.rename(target)
    return target


def _copy(source: str, file: str, target: Path) -> None:
    if not source.startswith(("http://", "https://")):
        try:
            shutil.copyfile(Path(source) / file, target)
        except OSError as error:
            raise ScenarioError(f"{Path(source) / file} cannot be copied: {error.strerror}") from None
        return
    url = f"{source.rstrip('/')}/{file}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, target.open("wb") as out:
            shutil.copyfileobj(response, out)
    except (urllib.error.URLError, OSError) as error:
        raise ScenarioError(
            f"{url} cannot be had ({error}); clone the repository elsewhere and pass its EIBench/data folder with --source"
        ) from None
    if target.read_bytes()[:40].startswith(b"version https://git-lfs"):
        raise ScenarioError(
            f"{url} is a pointer to a file in Git LFS; clone the repository with LFS and pass its folder with --source"
        )
