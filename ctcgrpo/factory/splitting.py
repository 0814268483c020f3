"""Splitting a set into training and held-out scenarios: stratified by scene, and without leaks."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ctcgrpo.factory.duplicates import clusters, duplicates


def held_out(records: Sequence[Mapping[str, Any]], *, share: float, seed: int = 0, threshold: float) -> list[bool]:
    """Which records are held out. Records that are alike (`duplicates`), directly or over others, stay together; of each scene the
    groups whose sizes sum up nearest to `share` of its records, at least one and not all where there are two."""
    together = clusters(duplicates(records, threshold=threshold), len(records))
    groups: dict[int, list[int]] = defaultdict(list)
    for k, root in enumerate(together):
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
    """The groups, at least one and not all, whose sizes sum up nearest to `wanted`."""
    total = sum(map(len, groups))
    most = min(total - 1, round(2 * wanted) + max(map(len, groups)))
    last: dict[int, tuple[int, int]] = {0: (-1, 0)}  # sum -> the group that it was first reached with, and the sum before
    for k, group in enumerate(groups):
        for reached in sorted(last, reverse=True):
            if (more := reached + len(group)) <= most and more not in last:
                last[more] = (k, reached)
    size = min((size for size in last if size), key=lambda size: (abs(size - wanted), size))
    told = []
    while size:
        k, size = last[size]
        told.append(k)
    return told
