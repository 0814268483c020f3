"""What is asked for: for each scenario to come a combination of seeds, none twice, and a few examples. Deterministic."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.errors import ScenarioError
from ctcgrpo.util.sections import Section, parse_mapping, read_text, validated

_SEEDS = files("ctcgrpo.factory") / "seeds"


class Pools(Section):
    """seeds/CODE.yaml: themes with their keywords, and relationships, by scene; and what all scenes share."""

    themes: dict[str, dict[str, tuple[str, ...]]]
    relationships: dict[str, tuple[str, ...]]
    places: tuple[str, ...] = Field(min_length=1)
    intensity: tuple[str, ...] = Field(min_length=1)
    personalities: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _every_list_is_a_choice(self) -> Pools:
        lists: dict[str, Sequence[str]] = {f"relationships.{scene}": names for scene, names in self.relationships.items()}
        lists |= {f"themes.{scene}": tuple(themes) for scene, themes in self.themes.items()}
        lists |= {f"themes.{s}.{theme}": words for s, themes in self.themes.items() for theme, words in themes.items()}
        lists |= {name: getattr(self, name) for name in ("places", "intensity", "personalities")}
        for name, values in lists.items():
            if not values:
                raise ValueError(f"{name} is empty")
            if twice := next((value for k, value in enumerate(values) if value in values[:k]), None):
                raise ValueError(f"{name} holds {twice!r} twice")
        return self


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
    scene: str
    seed: Seed
    examples: tuple[str, ...]

    @property
    def as_dict(self) -> dict[str, str]:
        return asdict(self.seed)


def pools(source: str | Path) -> Pools:
    """Of a language that comes along ("en"), or in a file. Raises RecipeError naming file, field, value and what would be right."""
    known = sorted(f.name.removesuffix(".yaml") for f in _SEEDS.iterdir() if f.name.endswith(".yaml"))
    file = Path(str(_SEEDS / f"{source}.yaml")) if str(source) in known else Path(source)
    return validated(parse_mapping(read_text(file, "seeds"), file, Pools, "seeds"), Pools, file)


def wanted(
    found: Pools,
    *,
    count: int,
    scenes: Sequence[str] = SCENES,
    examples: Mapping[str, Sequence[str]],
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


def _of_scene(found: Pools, scene: str, seed: int) -> Any:
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
