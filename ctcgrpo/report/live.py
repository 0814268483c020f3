"""Reads a run's folder while the run writes it: only what changed since the last time, without a lock and without a write.

Of a step only its part (parts.py) is kept, and of the newest steps also the dialogues. A file may end in half a line, and files
may disagree for a moment; a contradiction counts once two readings in a row find it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from ctcgrpo.errors import OutputError
from ctcgrpo.report.page import lean
from ctcgrpo.report.parts import Part, Trace, part_of
from ctcgrpo.report.reading import Place, Run, assembled, read_place, trace_files
from ctcgrpo.run.folders import require_run
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.util.files import COMPLETE, is_complete

MOST_CHARACTERS = 1_500_000  # of the newest dialogues as JSON
_NEWEST_FAILURES = 10
_FILES = ("recipe.yaml", "metrics.jsonl", "validation.jsonl", "simulator.json", "summary.json", "audit.jsonl", "audit.json")

Stamp = tuple[tuple[str, int, int, int], ...]  # of some files: name, size, time of the last change, inode


@dataclass(frozen=True, slots=True)
class Live:
    """A reading of a run: `run` without dialogues, and the newest dialogues by group, oldest first, each episode as JSON. `failed`
    names the newest failed episodes, newest first."""

    run: Run
    dialogues: Sequence[str]
    latest: tuple[str, int, str] | None  # kind, step and task of the newest group with credit, else of the newest group
    failed: Sequence[str]


class _Episode(NamedTuple):
    task: str
    text: str  # as JSON


@dataclass(slots=True)
class _Read:
    """What is kept of a step or validation. `episodes` is None once newer ones fill MOST_CHARACTERS."""

    stamp: Stamp
    part: Part
    problems: Sequence[str]
    failed: Sequence[str]
    episodes: list[_Episode] | None


class LiveReader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[Place, _Read] = {}
        self._stamp: Stamp | None = None
        self._final: tuple[Stamp, bool] = ((), False)
        self._suspected: frozenset[str] = frozenset()
        self._confirmed = True

    def read(self, progress: Callable[[int, int], None] = lambda done, of: None) -> Live | None:
        """The run as its files are now; None where nothing changed. `progress` gets the numbers of steps read and to read. Raises
        OutputError while there is no run in the folder, RecipeError for a recipe that cannot be read."""
        folder = require_run(self._path)
        final = stamp([folder.final / COMPLETE])
        own = stamp([self._path / name for name in _FILES])
        files = trace_files(folder.traces)
        stamps = {place: stamp(of_place) for place, of_place in files.items()}
        everything = (*own, *final, *(one for of_place in stamps.values() for one in of_place))
        if everything == self._stamp and self._confirmed:
            return None
        recipe = resolved_recipe(folder.recipe_file)
        self._renew(files, stamps, progress)
        if final != self._final[0]:
            self._final = final, bool(final) and is_complete(folder.final)
        newest = max((changed for _, _, changed, _ in everything), default=0)
        run = assembled(
            folder,
            recipe,
            [read.part for read in self._places.values() if read.part.episodes],
            (),
            [problem for read in self._places.values() for problem in read.problems],
            finished=self._final[1],
            written=datetime.fromtimestamp(newest / 1e9, UTC),
            whole_only=True,
        )
        self._stamp = everything
        return self._live(run)

    def _renew(
        self, files: Mapping[Place, Sequence[Path]], stamps: Mapping[Place, Stamp], progress: Callable[[int, int], None]
    ) -> None:
        """Read the steps whose files changed, newest first, so that of a long run only the newest dialogues are kept."""
        changed = [p for p in files if p not in self._places or self._places[p].stamp != stamps[p]]
        for place in self._places.keys() - files.keys():
            del self._places[place]
        for k, place in enumerate(sorted(changed, key=_age)):
            progress(k, len(changed))
            self._places[place] = _read(place, files[place], stamps[place])
            if k % 50 == 49:
                self._forget_dialogues()
        self._places = dict(sorted(self._places.items()))
        room = self._forget_dialogues()
        for place in sorted(self._places, key=_age):  # a resumed run removes steps: older ones are the newest again
            if room <= 0:
                break
            if (read := self._places[place]).episodes is None:
                self._places[place] = read = _read(place, files[place], read.stamp)
                room -= sum(len(e.text) for e in read.episodes or ())

    def _forget_dialogues(self) -> int:
        """Forget dialogues beyond MOST_CHARACTERS, the oldest first; gives the characters that are left."""
        room = MOST_CHARACTERS
        for place in sorted(self._places, key=_age):
            read = self._places[place]
            if room <= 0:
                read.episodes = None
            room -= sum(len(e.text) for e in read.episodes or ())
        return room

    def _live(self, run: Run) -> Live:
        found = frozenset(run.problems)
        run = replace(run, problems=[p for p in run.problems if p in self._suspected])
        self._confirmed = found == self._suspected
        self._suspected = found
        places = sorted(self._places, key=_age)
        with_credit = [place for place in places if self._places[place].part.trained]
        latest = next(((*place, task) for place in [*with_credit, *places] if (task := self._last_task(place))), None)
        failed = [text for place in places for text in reversed(self._places[place].failed)]
        return Live(run, list(self._newest(places, with_credit[:1])), latest, failed[:_NEWEST_FAILURES])

    def _last_task(self, place: Place) -> str | None:
        episodes = self._places[place].episodes
        return episodes[-1].task if episodes else None

    def _newest(self, places: Sequence[Place], needed: Sequence[Place]) -> Iterator[str]:
        """Whole groups within MOST_CHARACTERS: the newest, and at least the last one of `needed`."""
        room, chosen = MOST_CHARACTERS, []
        for place in dict.fromkeys((*needed, *places)):
            groups: dict[str, list[str]] = {}
            for e in self._places[place].episodes or ():
                groups.setdefault(e.task, []).append(e.text)
            for k, texts in enumerate(reversed(groups.values())):
                size = sum(map(len, texts))
                if size <= room or (place in needed and k == 0):
                    chosen.append((place, -k, texts))
                    room -= size
        for _, _, texts in sorted(chosen, key=lambda group: (*reversed(group[0]), group[1])):
            yield from texts


def _age(place: Place) -> tuple[int, int]:
    """Sorts the newest first: a validation is played after its step."""
    kind, step = place
    return -step, kind == "step"


def _read(place: Place, files: Sequence[Path], stamped: Stamp) -> _Read:
    kind, step = place
    try:
        episodes, problems = read_place(kind, step, files, whole_only=True)
    except OutputError:  # a run that resumes has just removed a file; the next reading sees that
        return _Read((), Part(kind, step), (), (), [])
    failed = [f"{_named(e)}: {e['failure']['kind']}: {e['failure']['message']}" for e in episodes if e["failure"] is not None]
    texts = [_Episode(e["task"], json.dumps(lean(e), ensure_ascii=False)) for e in episodes]
    return _Read(stamped, part_of(kind, step, episodes), problems, failed[-_NEWEST_FAILURES:], texts)


def _named(e: Trace) -> str:
    return f"{e['kind'] if e['kind'] == 'step' else 'validation after step'} {e['step']}, {e['task']}, rollout {e['rollout']}"


def stamp(files: Sequence[Path]) -> Stamp:
    """What changes when one of the files does; missing files are left out."""
    found = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            continue
        found.append((str(file), status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)
