"""What is asked for: for each scenario to come a combination of seeds, none twice, and a few examples. Deterministic."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ctcgrpo.errors import ScenarioError
from ctcgrpo.naming import did_you_mean
from ctcgrpo.records import SCENES, Scene
from ctcgrpo.sections import Section
from ctcgrpo.strict_yaml import load_yaml

_SEEDS = files("ctcgrpo.factory") / "seeds"


class Pools(Section):
    """seeds/CODE.yaml: themes with their keywords, and relationships, by scene; and what all scenes share."""

    themes: dict[str, dict[str, tuple[str, ...]]]
    relationships: dict[str, tuple[str, ...]]
    places: tuple[str, ...] = Field(min_length=1)
    intensity: tuple[str, ...] = Field(min_length=1)
    personalities: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Seed:
    theme: str
    keyword: str
    relationship: str
    place: str
    intensity: str
    personality: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """One scenario to be written. `examples`: ids of scenarios of the scene that show how one looks."""

    id: str
    scene: Scene
    seed: Seed
    examples: tuple[str, ...]

    @property
    def as_dict(self) -> dict[str, str]:
        return asdict(self.seed)


@cache
def pools(source: str | Path) -> Pools:
    """Of a language that comes along ("en"), or in a file. Raises ScenarioError naming what is wrong."""
    known = sorted(f.name.removesuffix(".yaml") for f in _SEEDS.iterdir() if f.name.endswith(".yaml"))
    file = _SEEDS / f"{source}.yaml" if str(source) in known else Path(source)
    if not file.is_file():
        raise ScenarioError(f"seeds {str(source)!r}: no such file, and {did_you_mean(str(source), known)}")
    try:
        return Pools.model_validate(load_yaml(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise ScenarioError(f"seeds {source}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None


def wanted(
    found: Pools,
    *,
    count: int,
    scenes: Sequence[Scene] = SCENES,
    examples: Mapping[Scene, Sequence[str]],
    shots: int = 2,
    prefix: str,
    seed: int = 0,
) -> list[Wanted]:
    """`count` scenarios, as evenly over the scenes, and within a scene over its themes, as the numbers allow. A longer list begins
    with the shorter one. Raises ScenarioError for a scene without seeds, and where there are fewer combinations than scenarios."""
    told = []
    makers = {scene: _of_scene(found, scene, seed) for scene in scenes}
    for k in range(count):
        scene = scenes[k % len(scenes)]
        combination = next(makers[scene], None)
        if combination is None:
            raise ScenarioError(f"scene {scene!r} has fewer combinations of seeds than are asked for; add themes or places")
        name = f"{prefix}-{scene}-{k // len(scenes) + 1:04d}"
        known = list(examples.get(scene, ()))
        shown = random.Random(f"examples/{seed}/{name}").sample(known, min(shots, len(known)))
        told.append(Wanted(name, scene, combination, tuple(shown)))
    return told


def _of_scene(found: Pools, scene: Scene, seed: int) -> Any:
    """The seeds of a scene, one after the other: themes in turn, everything else drawn."""
    if scene not in found.themes or scene not in found.relationships:
        raise ScenarioError(f"seeds: no themes or relationships for scene {scene!r}; they have {', '.join(found.themes)}")
    rng = random.Random(f"seeds/{seed}/{scene}")
    themes, relationships = found.themes[scene], found.relationships[scene]
    most = sum(map(len, themes.values())) * len(relationships) * len(found.places)
    seen: set[tuple[str, ...]] = set()
    while len(seen) < most:
        order = list(themes)
        rng.shuffle(order)
        for theme in order:
            for _ in range(1000):
                core = (theme, rng.choice(themes[theme]), rng.choice(relationships), rng.choice(found.places))
                if core not in seen:
                    seen.add(core)
                    yield Seed(*core, rng.choice(found.intensity), rng.choice(found.personalities))
                    break
