"""The tasks of a trainer's dataset, one per row, and the schedule of tasks per step."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from ctcgrpo.types import NO_TAG, Task


def tasks_of(rows: Dataset | Sequence[Task | Mapping[str, Any]], what: str) -> Sequence[Task]:
    """The tasks of a dataset, or of a list of mappings. `Environment.reset` gets the whole row. Its id is the column `id`, else its
    position; its tag is the column `tag`, else "all". Rows of a dataset are read when they are played.

    Raises TypeError for rows that are no mappings, ValueError for an empty dataset or duplicate ids.
    """
    if isinstance(rows, Dataset):
        found: Sequence[Task] = _Rows(rows, what)
        ids = list(rows["id"]) if "id" in rows.column_names else []
    elif isinstance(rows, Sequence):
        found = [_task(row, k, what) for k, row in enumerate(rows)]
        ids = [task.id for task in found]
    else:
        raise TypeError(f"{what} is a {type(rows).__name__}; expected a datasets.Dataset or a list of mappings, one per task")
    if not len(found):
        raise ValueError(f"{what} is empty; expected at least one task")
    if len(set(map(str, ids))) < len(ids):
        raise ValueError(f"{what}: duplicate task id; expected unique values in the column id")
    return found


def tags_of(tasks: Sequence[Task]) -> list[str]:
    """The tag of each task."""
    return tasks.tags if isinstance(tasks, _Rows) else [task.tag for task in tasks]


class _Rows(Sequence[Task]):
    def __init__(self, rows: Dataset, what: str) -> None:
        self._rows, self._what = rows, what
        self.tags = [str(tag) for tag in rows["tag"]] if "tag" in rows.column_names else [NO_TAG] * len(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        return _task(self._rows[k], k, self._what)


def _task(row: Task | Mapping[str, Any], position: int, what: str) -> Task:
    if isinstance(row, Task):
        return row
    if not isinstance(row, Mapping):
        raise TypeError(f"{what}[{position}] is a {type(row).__name__}; expected a mapping, the argument of Environment.reset")
    return Task(str(row.get("id", position)), row, str(row.get("tag", NO_TAG)))


def step_schedule(tags: Sequence[str], *, steps: int, per_step: int, seed: int | None) -> list[list[int]]:
    """For every step, the positions of its `per_step` tasks, the same on every process and after a resume.

    Each step has the same number of each tag. The tasks of a tag come in shuffled rounds (in order where `seed` is None), so no
    task repeats before all others of its tag.

    Raises ValueError where `per_step` is no multiple of the number of tags.
    """
    by_tag: dict[str, list[int]] = {}
    for position, tag in enumerate(tags):
        by_tag.setdefault(tag, []).append(position)
    if per_step % len(by_tag):
        raise ValueError(
            f"{per_step} tasks a step (per_device_train_batch_size x processes / num_generations) for {len(by_tag)} tags "
            f"({', '.join(sorted(by_tag)[:5])}); expected a multiple of {len(by_tag)}: a step plays the same number of each tag; "
            f"set per_device_train_batch_size x processes to a multiple of {len(by_tag)} x num_generations"
        )
    share = per_step // len(by_tag)
    decks = [_deal(positions, None if seed is None else random.Random(f"{seed}/{tag}")) for tag, positions in by_tag.items()]
    return [[next(deck) for deck in decks for _ in range(share)] for _ in range(steps)]


def _deal(positions: Sequence[int], rng: random.Random | None) -> Iterator[int]:
    while True:
        deck = list(positions)
        if rng is not None:
            rng.shuffle(deck)
        yield from deck
