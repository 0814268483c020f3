"""Data sets on the Hub as sources of records: hf://datasets/OWNER/NAME[@REVISION][/SPLIT, /CONFIGURATION/SPLIT or /FILE].

The Hub's library resolves the revision to a commit, once in a process, and keeps the files of the commit in its cache; from there
they are read without a network too. `datasets` says which files make a split, and reads tables (Parquet, CSV). JSON is read
by `record_files`, since Arrow gives all rows the same fields, which records do not have.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from ctcgrpo.errors import CtcGrpoError
from ctcgrpo.util.naming import did_you_mean, quoted
from ctcgrpo.util.record_files import SUFFIXES, OnBad, is_record_file, read_record_file

HUB = "hf://datasets/"
_SOURCE = re.compile(r"hf://datasets/(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^/@]+))?(?:/(?P<part>[^@]+))?")
_TABLES = (".parquet", ".csv")
_FETCHED = ["README.md", *(f"*{s}" for suffix in (*SUFFIXES, *_TABLES) for s in (suffix, suffix.upper()))]


class Part(NamedTuple):
    """A file or table of a source: its name for messages, and its records with their places. A `table` has a value for each column
    in every row, None where a record has none."""

    name: str
    read: Callable[[OnBad | None], Iterator[tuple[str, dict[str, Any]]]]
    table: bool = False


class HubSource(NamedTuple):
    text: str
    name: str
    revision: str | None
    part: str

    @property
    def whole(self) -> str:
        """The source without its part."""
        return self.text.removesuffix(f"/{self.part}") if self.part else self.text


def is_hub(source: object) -> bool:
    return str(source).startswith(HUB)


def hub_source(text: str, error: type[CtcGrpoError]) -> HubSource:
    """Raises `error` for a text of another form."""
    found = _SOURCE.fullmatch(text)
    if found is None or ".." in re.split("[/@]", text):
        form = f"{HUB}OWNER/NAME[@REVISION], with /SPLIT, /CONFIGURATION/SPLIT or /FILE behind it or nothing"
        raise error(f"{quoted(text)}: expected {form}; try {HUB}OWNER/NAME")
    revision = found["revision"]
    return HubSource(text, found["name"], None if revision is None else unquote(revision), found["part"] or "")


def unpinned(text: str) -> str:
    """A source without its revision; any other text as it is."""
    return re.sub(r"@[^/@]+", "", text, count=1) if is_hub(text) else text


def commit_of(text: str, error: type[CtcGrpoError]) -> str:
    """The commit (40 hexadecimal digits) that a source is read at in this process. Raises `error` where it cannot be found out."""
    source = hub_source(text, error)
    with _explained(source, error):
        return _resolved(source.name, source.revision)


def hub_parts(text: str, split: str, error: type[CtcGrpoError]) -> list[Part]:
    """The parts of a source; of its split `split` where it names neither a split nor a file. Raises `error`, in plain words, for
    what cannot be reached and is not in the cache, and for a split or file that the data set does not have."""
    source, commit = hub_source(text, error), commit_of(text, error)
    is_file = source.part.lower().endswith((*SUFFIXES, *_TABLES))
    with _explained(source, error):
        folder = _fetched(source.name, commit, [source.part] if is_file else _FETCHED)
    shown = f"{HUB}{source.name}@{commit[:12]}"
    if is_file and not (folder / source.part).is_file():
        raise error(f"{text}: no such file at commit {commit[:12]}; try {source.whole} for the split {split!r}")
    if is_record_file(source.part):
        return [_file_part(folder, source.part, shown, error)]
    with _explained(source, error):
        builder, split = _table_file(folder, source) if is_file else _split_of(folder, source, split, error)
        files = [str(Path(file).relative_to(folder)) for file in builder.config.data_files[split]]
    if all(map(is_record_file, files)):
        return [_file_part(folder, file, shown, error) for file in files]
    place = f"{shown}/{source.part}" if is_file else f"{shown}, {split}"

    def rows(on_bad: OnBad | None) -> Iterator[tuple[str, dict[str, Any]]]:
        with _explained(source, error):
            builder.download_and_prepare()
            data = builder.as_dataset(split=split)
        for number, row in enumerate(data, 1):
            yield f"{place}, row {number}", dict(row)

    return [Part(place, rows, table=True)]


def _file_part(folder: Path, file: str, shown: str, error: type[CtcGrpoError]) -> Part:
    name = f"{shown}/{file}"
    return Part(name, lambda on_bad: read_record_file(folder / file, error, name=name, on_bad=on_bad))


@functools.cache
def _resolved(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().resolve_revision(name, repo_type="dataset", revision=revision).resolved)


def _fetched(name: str, commit: str, wanted: Sequence[str]) -> Path:
    """The folder with these files of a commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Progress(tqdm):
        """Shown only where it takes a while."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "delay": 2.0})  # type: ignore[no-untyped-call]

    found = snapshot_download(name, repo_type="dataset", revision=commit, allow_patterns=list(wanted), tqdm_class=Progress)
    return Path(found)


def _table_file(folder: Path, source: HubSource) -> tuple[Any, str]:
    import datasets

    return datasets.load_dataset_builder(str(folder), data_files={"train": source.part}), "train"


def _split_of(folder: Path, source: HubSource, split: str, error: type[CtcGrpoError]) -> tuple[Any, str]:
    """A builder of `datasets`, and the name of the split."""
    import datasets

    *configuration, split = source.part.split("/") if source.part else [split]
    names: Sequence[str] = datasets.get_dataset_config_names(str(folder))
    name = configuration[0] if configuration else datasets.get_dataset_default_config_name(str(folder))
    if len(configuration) > 1 or (configuration and name not in names):
        raise error(f"{source.text}: no configuration {'/'.join(configuration)!r}; {did_you_mean(str(name), names)}")
    if name is None:
        several = f"the data set has several configurations ({', '.join(names)})"
        raise error(f"{source.text}: {several}; expected one of them; try {source.whole}/{names[0]}/{split}")
    builder = datasets.load_dataset_builder(str(folder), name)
    splits = list(map(str, builder.config.data_files))
    if split not in splits:
        other = "/".join([*configuration, splits[0]])
        raise error(f"{source.text}: no split {split!r}; it has {', '.join(splits)}; try {source.whole}/{other}")
    return builder, split


@contextlib.contextmanager
def _explained(source: HubSource, error: type[CtcGrpoError]) -> Iterator[None]:
    try:
        yield
    except CtcGrpoError:
        raise
    except Exception as problem:  # noqa: BLE001 - what these libraries raise changes with them
        raise error(f"{source.text}: {_reason(source, problem)}") from None


def _reason(source: HubSource, problem: Exception) -> str:
    from huggingface_hub import constants, errors

    from ctcgrpo.policy.hub import hub_reason

    unreachable = (errors.RevisionResolutionError, errors.LocalEntryNotFoundError, ConnectionError)
    if isinstance(problem, errors.GatedRepoError):
        return "access to the data set has to be granted; expected its terms accepted on its page; try `hf auth login`"
    if isinstance(problem, errors.RepositoryNotFoundError):
        return f"no such data set at {constants.ENDPOINT}, or a private one; check OWNER/NAME, or try `hf auth login`"
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"no revision {source.revision!r}; expected a branch, a tag or a commit"
    if isinstance(problem, unreachable):
        network = "is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else f"at {constants.ENDPOINT} cannot be reached"
        revision = f" --revision {source.revision}" if source.revision else ""
        command = f"`hf download {source.name} --repo-type dataset{revision}`"
        where = f"not completely in the cache {constants.HF_HUB_CACHE}, and the Hub {network}"
        return f"{where}; try {command} on a machine with a network and the same HF_HOME"
    return hub_reason(problem)
