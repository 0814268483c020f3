"""Near-duplicates: within a set, and against held-out sets.

Two records are alike by text, the cosine of their TF-IDF vectors over words (pairs of characters in Chinese): the order of
sentences does not matter, and words exchanged for others of the same meaning cost no more than their share. Or they are alike by
seed: made from the same combination of theme, keyword, relationship and place.

Vectors are hashed (scikit-learn), so memory grows with the number of records alone, and compared in blocks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix, vstack
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from ctcgrpo.environments.eibench.scenarios import BUNDLED, read_records
from ctcgrpo.factory.layout import sections
from ctcgrpo.simulator.scripted.language import stem

Record = Mapping[str, Any]
Level = Literal["copy", "close paraphrase", "paraphrase", "same seeds"]
THRESHOLD = 0.5
"""Cosine from which two records count as one. No two of the bundled packs reach 0.25 (tests/unit/test_factory.py)."""
SEED_FIELDS = ("theme", "keyword", "relationship", "place")
_COPY, _CLOSE = 0.98, 0.8
_FEATURES = 2**18
_BLOCK = 512
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"(?:(?![{_UNSPACED}])[^\W_])+")
_RUN = re.compile(rf"[{_UNSPACED}]+")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two records that are one: `a` and `b` are their places in the two lists that were compared; `similarity` in [0, 1]."""

    a: int
    b: int
    similarity: float
    level: Level

    def __str__(self) -> str:
        return self.level if self.level == "same seeds" else f"{self.level}, {self.similarity:.2f}"


def duplicates(records: Sequence[Record], held_out: Sequence[Record] = (), *, threshold: float = THRESHOLD) -> list[Pair]:
    """Pairs of `records` (a) with `held_out` (b); without held-out ones, pairs within `records` (a < b). The most alike first."""
    if not records:
        return []
    ours = [text_of(record) for record in records]
    theirs = [text_of(record) for record in held_out] if held_out else ours
    found = {(p.a, p.b): p for p in _same_seeds(records, held_out)}
    for a, b, similarity in _alike(ours, theirs, threshold, within=not held_out):
        level: Level = "copy" if similarity >= _COPY else "close paraphrase" if similarity >= _CLOSE else "paraphrase"
        found[a, b] = Pair(a, b, similarity, level)
    return sorted(found.values(), key=lambda p: (-p.similarity, p.a, p.b))


def to_drop(
    records: Sequence[Record], within: Sequence[Pair], held_out: Sequence[Record] = (), leaks: Sequence[Pair] = ()
) -> dict[int, str]:
    """Which records have to go, and why: those like a held-out one (`leaks`), and of those that are alike (`within`) all but the
    first. What went already takes nothing with it."""
    told: dict[int, str] = {}
    for pair in leaks:
        told.setdefault(pair.a, f"is like {held_out[pair.b].get('id')} of a held-out set ({pair})")
    for pair in sorted(within, key=lambda p: (p.b, p.a)):
        if pair.a not in told:
            told.setdefault(pair.b, f"is like {records[pair.a].get('id')} ({pair})")
    return told


def clusters(pairs: Sequence[Pair], size: int) -> list[int]:
    """For each of `size` records the smallest index of those that it is connected with over pairs within the set."""
    parent = list(range(size))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    for pair in pairs:
        a, b = sorted((root(pair.a), root(pair.b)))
        parent[b] = a
    return [root(k) for k in range(size)]


def text_of(record: Record) -> str:
    """What a record tells, without titles of sections, which all records share."""
    user, policy = record.get("aggressor_profile") or {}, record.get("defender_profile") or {}
    personas = [str(profile.get("system_prompt") or "") for profile in (user, policy)]
    parts = [str(record.get("title") or ""), str(user.get("opening_line") or ""), str(record.get("goal_one_liner") or "")]
    parts += [text for persona in personas for _, text in sections(persona)]
    return "\n".join(parts)


def _tokens(text: str) -> list[str]:
    text = text.lower()
    pairs = [run[k : k + 2] for run in _RUN.findall(text) for k in range(max(1, len(run) - 1))]
    return [stem(word) for word in _WORD.findall(text)] + pairs


@cache
def _background() -> csr_matrix:
    """Counts of the bundled packs: with them, how rare a word is does not depend on a small set alone."""
    packs = [(name, split) for name in BUNDLED for split in ("train", "test")]
    return _counts([text_of(record) for name, split in packs for _, record in read_records(name, split)])  # type: ignore[arg-type]


def _counts(texts: Sequence[str]) -> csr_matrix:
    hashing = HashingVectorizer(analyzer=_tokens, n_features=_FEATURES, alternate_sign=False, norm=None, dtype=np.float32)
    return hashing.transform(texts)


def _alike(
    ours: Sequence[str], theirs: Sequence[str], threshold: float, *, within: bool
) -> Iterator[tuple[int, int, float]]:
    counts = _counts(ours)
    others = counts if within else _counts(theirs)
    weighing = TfidfTransformer(sublinear_tf=True).fit(vstack([_background(), counts, *([] if within else [others])]))
    left = weighing.transform(counts).astype(np.float32)
    right = (left if within else weighing.transform(others).astype(np.float32)).T.tocsr()
    for start in range(0, left.shape[0], _BLOCK):
        block = (left[start : start + _BLOCK] @ right).tocoo()
        near = block.data >= threshold
        for a, b, similarity in zip(block.row[near] + start, block.col[near], block.data[near], strict=True):
            if not within or a < b:
                yield int(a), int(b), min(1.0, float(similarity))


def _same_seeds(records: Sequence[Record], held_out: Sequence[Record]) -> Iterator[Pair]:
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for b, record in enumerate(held_out or records):
        if combination := _combination(record):
            places[combination].append(b)
    for a, record in enumerate(records):
        for b in places.get(_combination(record) or (), ()):
            if held_out or a < b:
                yield Pair(a, b, 0.0, "same seeds")


def _combination(record: Record) -> tuple[str, ...] | None:
    """The seeds of a record with its scene; None where it does not say all of them."""
    seed = record.get("seed")
    if not isinstance(seed, Mapping) or not all(seed.get(field) for field in SEED_FIELDS):
        return None
    return (str(record.get("scene_tag")).lower(), *(str(seed[field]).strip().lower() for field in SEED_FIELDS))
