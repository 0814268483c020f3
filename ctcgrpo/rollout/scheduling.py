"""The order in which the episodes of a batch begin: the longest expected ones first.

Where more episodes are asked for than an engine or a simulator takes at once, some wait. An episode that begins last and is long
ends long after the others, and everything waits for it. Longest processing time first is the classic rule (Graham 1969).
"""

import math
from collections.abc import Sequence

from ctcgrpo.rollout.runner import Slot
from ctcgrpo.types import Episode


class ExpectedLengths:
    """Expected numbers of sampled tokens of a task's episodes: the mean over those of its last batch; for a task that was not
    played yet the mean over all others."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, list[int]]] = {}  # by task: the step, and the lengths of its episodes then

    def note(self, episode: Episode) -> None:
        """Learn from an episode that ended. A failed one says nothing."""
        if episode.failure:
            return
        step, lengths = self._seen.get(episode.task, (episode.step, []))
        if step != episode.step:
            lengths = []
        self._seen[episode.task] = episode.step, [*lengths, sum(len(turn.completion.token_ids) for turn in episode.turns)]

    def expected(self, task: str) -> float:
        """Sampled tokens; 0 where no task was played yet."""
        _, lengths = self._seen.get(task, (0, []))
        if not lengths:
            lengths = [length for _, of_task in self._seen.values() for length in of_task]
        return math.fsum(lengths) / max(1, len(lengths))

    def longest_first(self, slots: Sequence[Slot]) -> list[int]:
        """The places of slots in the order in which they should begin; those that are alike stay in their order."""
        expected = {task: self.expected(task) for task in {slot.task.id for slot in slots}}
        return sorted(range(len(slots)), key=lambda k: -expected[slots[k].task.id])
