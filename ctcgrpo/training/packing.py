"""Packing: the turn samples of a step as rows of a prefix tree, in which what several samples begin with stands once.

The turns of a dialogue begin with the same context, and so do the rollouts of a group. Sorted as strings, samples lie in the
order of a walk through the tree of their prefixes, and each needs only what it does not share with its neighbour:

    sample i = path[:fork_i] + its own tokens,    fork_i = the length of what it shares with sample i - 1

A row is a stretch of that order. Rows are cut where they cost the least to cut and so that all cost about the same, and each
process of a run takes equally many of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from ctcgrpo.model.tree_attention import Segments
from ctcgrpo.training.rows import IGNORE, Row, entries
from ctcgrpo.types import TurnSample
from ctcgrpo.util.tokens import common_prefix

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Costs:
    """What the work on a row is made of, in any unit: each of its tokens, each pair of a token and one that it sees, each
    trained token (the head). `path`: the memory that a token takes on the path of a sequence, whose keys and values are gathered
    for it, in that of a token of the row."""

    token: float = 1.0
    pair: float = 0.0
    trained: float = 0.0
    path: float = 0.0

    def of(self, tokens: Ints, shared: Ints, trained: Ints) -> Floats:
        """Of sequences of `tokens` tokens behind `shared` ones that are there already."""
        pairs = tokens * shared + tokens * (tokens + 1) / 2
        cost: Floats = self.token * tokens + self.pair * pairs + self.trained * trained
        return cost


@dataclass(frozen=True, slots=True)
class Tree:
    """N samples in the order of a walk through the tree of their prefixes. `order` (N,): their places in what was given;
    `tokens` (sum of lengths,) and `offsets` (N + 1,): their tokens, end to end; `prompts` (N,): the lengths of their prompts;
    `forks` (N,): how many of its first tokens each has from the path of the one before, 0 for the first."""

    order: Ints
    tokens: Ints
    offsets: Ints
    prompts: Ints
    forks: Ints

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)


def prefix_tree(samples: Sequence[TurnSample]) -> Tree:
    """The tree of some samples, at least one."""
    ids = [np.concatenate([s.prompt_ids, s.completion_ids]).astype(">i4") for s in samples]
    keys = [x.tobytes() for x in ids]  # big-endian numbers compare as their bytes do
    order = sorted(range(len(samples)), key=keys.__getitem__)
    lengths = np.array([len(ids[k]) for k in order])
    prompts = np.array([len(samples[k].prompt_ids) for k in order])
    common = np.array([0, *(common_prefix(ids[a], ids[b]) for a, b in pairwise(order))])
    before = np.array([0, *lengths[:-1]])
    # A position predicts one token. So a sample leaves the one before it a token early, with a copy of the position from which they
    # differ; where the one before ended, it just goes on.
    forks = np.maximum(common - ((common < lengths) & (common < before)), 0)
    return Tree(
        order=np.array(order),
        tokens=np.concatenate([ids[k] for k in order]).astype(np.int64),
        offsets=np.array([0, *np.cumsum(lengths)]),
        prompts=prompts,
        forks=forks,
    )


def cut(tree: Tree, *, tokens_per_row: int, processes: int, costs: Costs) -> list[range]:
    """The tree's samples as rows: stretches of at most `tokens_per_row` distinct tokens, paths counted with what they take (a
    larger sample makes a row of its own); about as few as that takes and a multiple of `processes`, and the dearest about as
    cheap as can be: cutting is greedy."""
    lengths, trained = tree.lengths, tree.lengths - tree.prompts
    goes_on = np.append(tree.forks[1:], 0) == lengths  # the next sample, from this one's end: it has their path
    seen = np.where(goes_on, 0, lengths)
    # What each sample costs by itself, and what it takes of the limit; and up to each, all of them behind one another.
    whole, own = costs.of(lengths, np.zeros_like(lengths), trained), lengths + costs.path * seen
    spent = np.cumsum(costs.of(lengths - tree.forks, tree.forks, trained))
    taken = np.cumsum(lengths - tree.forks + costs.path * seen)

    def rows_of(cost: float) -> list[range]:
        """Greedily, rows of at most `cost` and `tokens_per_row`."""
        rows, start, n = [], 0, len(own)
        while start < n:
            by_cost = np.searchsorted(spent, cost - whole[start] + spent[start], side="right")
            by_limit = np.searchsorted(taken, tokens_per_row - own[start] + taken[start], side="right")
            end = max(int(min(by_cost, by_limit)), start + 1)
            if end < n:  # within the last eighth of the row, where the next one has the least to repeat
                near = max(start + 1, end - (end - start) // 8)
                end = near + int(np.argmin(tree.forks[near : end + 1]))
            rows.append(range(start, end))
            start = end
        return rows

    low, high = float(whole.max()), float(whole.sum())
    fewest = rows_of(high)
    wanted = min(-(-len(fewest) // processes) * processes, len(lengths))
    if wanted == 1:
        return fewest
    best = fewest
    for _ in range(30):
        middle = (low + high) / 2
        rows = rows_of(middle)
        if len(rows) <= wanted:
            best, high = rows, middle
        else:
            low = middle
    return best


def dealt(costs: Floats, processes: int) -> list[list[int]]:
    """Which rows each process takes: equally many (but for a rest), the dearest first, each to who has the least to do."""
    share = -(-len(costs) // processes)
    taken: list[list[int]] = [[] for _ in range(processes)]
    load = [0.0] * processes
    for k in np.argsort(-costs, kind="stable"):
        who = min((p for p in range(processes) if len(taken[p]) < share), key=lambda p: (load[p], p))
        taken[who].append(int(k))
        load[who] += float(costs[k])
    return taken


def row_costs(tree: Tree, rows: Sequence[range], costs: Costs) -> Floats:
    forks = _forks_in(tree, rows)
    each = costs.of(tree.lengths - forks, forks, tree.lengths - tree.prompts)
    return np.array([each[row.start : row.stop].sum() for row in rows])


def distinct_tokens(tree: Tree, rows: Sequence[range]) -> int:
    """The tokens of all rows together, each row with the beginning of its first sample."""
    return int((tree.lengths - _forks_in(tree, rows)).sum())


def _forks_in(tree: Tree, rows: Sequence[range]) -> Ints:
    """The tree's forks, where the first sample of each row shares nothing."""
    forks = tree.forks.copy()
    forks[[row.start for row in rows]] = 0
    return forks


def packed_row(tree: Tree, row: range, samples: Sequence[TurnSample], *, pad_id: int = 0, multiple: int = 1) -> Row:
    """A stretch of the tree as a row of one sequence, padded to a multiple of `multiple` tokens; `samples` are those that the
    tree was made from."""
    lengths = tree.lengths[row.start : row.stop]
    forks = tree.forks[row.start : row.stop].copy()
    forks[0] = 0
    own = lengths - forks
    starts = np.concatenate([[0], np.cumsum(own)])
    total = int(starts[-1])
    length_of_row = -(-total // multiple) * multiple
    ids, labels = np.full(length_of_row, pad_id), np.full(length_of_row, IGNORE)
    positions = np.zeros(length_of_row, np.int64)
    positions[total:] = np.arange(length_of_row - total)
    path = np.empty(int(lengths.max()), np.int64)  # the row's positions of the sequence at hand
    at: list[Ints] = []
    sizes: list[int] = []
    paths: list[Ints] = []
    ends = np.where(np.arange(length_of_row) < total, total, length_of_row)
    for k, (fork, length, start) in enumerate(zip(forks, lengths, starts[:-1], strict=True)):
        n = length - fork
        if k:
            ends[path[fork : lengths[k - 1]]] = start  # what the sample before had beyond here is over
        path[fork:length] = np.arange(start, start + n)
        tokens = tree.tokens[tree.offsets[row.start + k] :][:length]
        ids[start : start + n], positions[start : start + n] = tokens[fork:], np.arange(fork, length)
        prompt = tree.prompts[row.start + k]
        at.append(path[prompt - 1 : length - 1].copy())
        labels[at[-1]] = tokens[prompt:]
        if k and fork == lengths[k - 1]:  # goes on where the one before ended
            sizes[-1] += int(n)
            paths[-1] = path[:length].copy()
        elif n:
            sizes.append(int(n))
            paths.append(path[:length].copy())
    return Row(
        torch.from_numpy(ids).unsqueeze(0),
        torch.from_numpy(positions).unsqueeze(0),
        torch.from_numpy(labels).unsqueeze(0),
        torch.from_numpy(np.concatenate(at)),
        *entries(samples, tree.order[row.start : row.stop].tolist()),
        segments=Segments(
            lengths=tuple(sizes),
            path_lengths=tuple(map(len, paths)),
            paths=torch.from_numpy(np.concatenate(paths)),
            ends=torch.from_numpy(ends),
            positions=torch.from_numpy(positions),
        ),
    )
