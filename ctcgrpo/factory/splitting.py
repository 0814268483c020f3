"""Splitting a set into training and held-out scenarios: stratified by scene, and without leaks."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ctcgrpo.factory.duplicates import clusters, duplicates


def held_out(records: Sequence[Mapping[str, Any]], *, share: float, seed: int = 0, threshold: float) -> list[bool]:
    """Which records are held out. Records that are alike (`duplicates`), directly or over others, stay together; of each scene
    as near to `share` of the records as whole groups allow, at least one where there are two groups."""
    together = clusters(duplicates(records, threshold=threshold), len(records))
    groups: dict[int, list[int]] = defaultdict(list)
    for k, root in enumerate(together):
        groups[root].append(k)
    by_scene: dict[str, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        by_scene[str(records[members[0]]["scene_tag"]).lower()].append(members)
    chosen = [False] * len(records)
    for scene, of_scene in sorted(by_scene.items()):
        random.Random(f"split/{seed}/{scene}").shuffle(of_scene)
        wanted = round(share * sum(map(len, of_scene)))
        if share and not wanted and len(of_scene) > 1:
            wanted = 1
        taken = 0
        # Small groups first, so that one large one does not take the place of many.
        for members in sorted(of_scene, key=len):
            if taken + len(members) <= wanted:
                taken += len(members)
                for k in members:
                    chosen[k] = True
    return chosen
