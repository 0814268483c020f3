"""Near-duplicates: within a set, and against held-out sets; and splitting a set without them on both sides.

Two records are near-duplicates by text if the cosine of their TF-IDF vectors over words (in Chinese: pairs of characters) is high;
the order of sentences does not matter, and a synonym changes only its own share. They are near-duplicates by seed if they were
made from the same combination of theme, keyword, relationship and place.

Vectors are hashed (scikit-learn), so memory depends only on the number of records, and are compared in blocks."""

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from scipy.sparse import csr_matrix, vstack
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from ctcgrpo.environments.eibench.scenario_format import Split
from ctcgrpo.environments.eibench.scenarios import BUNDLED, read_records
from ctcgrpo.factory.layout import sections
from ctcgrpo.simulator.scripted.language import stem

Record = Mapping[str, Any]
Level = Literal["copy", "close paraphrase", "paraphrase", "same seeds"]
THRESHOLD = 0.5
"""Cosine from which two records are near-duplicates. No two of the bundled packs reach 0.25 (tests/unit/test_factory.py)."""
SEED_FIELDS = ("theme", "keyword", "relationship", "place")
_COPY, _CLOSE = 0.98, 0.8
_FEATURES = 2**18
_BLOCK = 512
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"(?:(?![{_UNSPACED}])[^\W_])+")
_RUN = re.compile(rf"[{_UNSPACED}]+")


class Pair(NamedTuple):
    """Near-duplicates: `a` and `b` are indices into the two lists that were compared; `similarity` is in [0, 1]."""

    a: int
    b: int
    similarity: float
    level: Level

    def __str__(self) -> str:
        return self.level if self.level == "same seeds" else f"{self.level}, {self.similarity:.2f}"


def duplicates(records: Sequence[Record], held_out: Sequence[Record] = (), *, threshold: float = THRESHOLD) -> list[Pair]:
    """Pairs of `records` (a) with `held_out` (b); without held-out records, pairs within `records` (a < b). Most similar first."""
    if not records:
        return []
    found = {(p.a, p.b): p for p in _same_seeds(records, held_out)}
    for a, b, similarity in _alike([*map(text_of, records)], [*map(text_of, held_out)], threshold):
        level: Level = "copy" if similarity >= _COPY else "close paraphrase" if similarity >= _CLOSE else "paraphrase"
        found[a, b] = Pair(a, b, similarity, level)
    return sorted(found.values(), key=lambda p: (-p.similarity, p.a, p.b))


def to_drop(
    records: Sequence[Record], within: Sequence[Pair], held_out: Sequence[Record] = (), leaks: Sequence[Pair] = ()
) -> dict[int, str]:
    """The records to drop, with reasons: near-duplicates of held-out ones (`leaks`), and all but the first of those in `within`."""
    reasons: dict[int, str] = {}
    for pair in leaks:
        reasons.setdefault(pair.a, f"is like {held_out[pair.b].get('id')} of a held-out set ({pair})")
    for pair in sorted(within, key=lambda p: (p.b, p.a)):
        if pair.a not in reasons:
            reasons.setdefault(pair.b, f"is like {records[pair.a].get('id')} ({pair})")
    return reasons


def clusters(pairs: Sequence[Pair], size: int) -> list[int]:
    """For each of `size` records the smallest index in its connected component of pairs."""
    edges = ([pair.a for pair in pairs], [pair.b for pair in pairs])
    _, labels = connected_components(csr_matrix((np.ones(len(pairs)), edges), shape=(size, size)), directed=False)
    first: dict[int, int] = {}
    return [first.setdefault(int(label), k) for k, label in enumerate(labels)]


def text_of(record: Record) -> str:
    """The text of a record, without section titles, which all records share."""
    user, policy = record.get("aggressor_profile") or {}, record.get("defender_profile") or {}
    parts = [str(text or "") for text in (record.get("title"), user.get("opening_line"), record.get("goal_one_liner"))]
    for profile in (user, policy):
        parts += [text for _, text in sections(str(profile.get("system_prompt") or ""))]
    return "\n".join(parts)


def _tokens(text: str) -> list[str]:
    text = text.lower()
    pairs = [run[k : k + 2] for run in _RUN.findall(text) for k in range(max(1, len(run) - 1))]
    return [stem(word) for word in _WORD.findall(text)] + pairs


@cache
def _background() -> csr_matrix:
    """Counts of the bundled packs, so that the inverse document frequencies of a small set are not arbitrary."""
    splits: tuple[Split, ...] = get_args(Split)
    return _counts([text_of(r) for name in BUNDLED for split in splits for _, r in read_records(name, split)])


def _counts(texts: Sequence[str]) -> csr_matrix:
    hashing = HashingVectorizer(analyzer=_tokens, n_features=_FEATURES, alternate_sign=False, norm=None, dtype=np.float32)
    return hashing.transform(texts)


def _alike(ours: Sequence[str], theirs: Sequence[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """Pairs between the two lists, or within the first if the second is empty."""
    sides = [_counts(texts) for texts in (ours, theirs) if texts]
    weighing = TfidfTransformer(sublinear_tf=True).fit(vstack([_background(), *sides]))
    weighted = [weighing.transform(counts).astype(np.float32) for counts in sides]
    left, right = weighted[0], weighted[-1].T.tocsr()
    for start in range(0, left.shape[0], _BLOCK):
        block = (left[start : start + _BLOCK] @ right).tocoo()
        near = block.data >= threshold
        for a, b, similarity in zip(block.row[near] + start, block.col[near], block.data[near], strict=True):
            if theirs or a < b:
                yield int(a), int(b), min(1.0, float(similarity))


def _same_seeds(records: Sequence[Record], held_out: Sequence[Record]) -> Iterator[Pair]:
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for b, record in enumerate(held_out or records):
        places[_combination(record)].append(b)
    for a, record in enumerate(records):
        if combination := _combination(record):
            others = places.get(combination, ())
            yield from (Pair(a, b, 0.0, "same seeds") for b in others if held_out or a < b)


def _combination(record: Record) -> tuple[str, ...]:
    """The seeds of a record with its scene; empty if any is missing."""
    seed = record.get("seed")
    if not isinstance(seed, Mapping) or not all(seed.get(field) for field in SEED_FIELDS):
        return ()
    return (str(record.get("scene_tag")).lower(), *(str(seed[field]).strip().lower() for field in SEED_FIELDS))


def held_out(records: Sequence[Record], *, share: float, seed: int = 0, threshold: float) -> list[bool]:
    """Which records are held out. Connected near-duplicates (`duplicates`) stay on one side. Of each scene the groups whose sizes
    sum nearest to `share` of its records are held out: at least one, and not all, if there are two."""
    groups: dict[int, list[int]] = defaultdict(list)
    for k, root in enumerate(clusters(duplicates(records, threshold=threshold), len(records))):
        groups[root].append(k)
    by_scene: dict[str, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        by_scene[str(records[members[0]]["scene_tag"]).strip().lower()].append(members)
    chosen = [False] * len(records)
    for scene, of_scene in sorted(by_scene.items()):
        if not share or len(of_scene) < 2:
            continue
        random.Random(f"split/{seed}/{scene}").shuffle(of_scene)
        for k in (k for group in _nearest_sum(of_scene, share * sum(map(len, of_scene))) for k in of_scene[group]):
            chosen[k] = True
    return chosen


def _nearest_sum(groups: Sequence[Sequence[int]], wanted: float) -> list[int]:
    """The groups, at least one and not all, whose sizes sum nearest to `wanted`."""
    total = sum(map(len, groups))
    most = min(total - 1, round(2 * wanted) + max(map(len, groups)))
    last: dict[int, tuple[int, int]] = {0: (-1, 0)}  # sum -> the group that it was first reached with, and the sum before
    for k, group in enumerate(groups):
        for reached in sorted(last, reverse=True):
            if (more := reached + len(group)) <= most and more not in last:
                last[more] = (k, reached)
    size = min((size for size in last if size), key=lambda size: (abs(size - wanted), size))
    chosen = []
    while size:
        k, size = last[size]
        chosen.append(k)
    return chosen
