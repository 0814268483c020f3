"""Draws requests: for each scenario a unique combination of seeds and a few examples. Deterministic."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.errors import ScenarioError
from ctcgrpo.util.sections import Section, parse_mapping, read_text, validated

_SEEDS = files("ctcgrpo.factory") / "seeds"


def _is_a_choice(values: tuple[str, ...]) -> tuple[str, ...]:
    if twice := next((value for k, value in enumerate(values) if value in values[:k]), None):
        raise ValueError(f"duplicate {twice!r}")
    return values


Choice = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_is_a_choice)]


class Pools(Section):
    """seeds/CODE.yaml: themes with their keywords, and relationships, by scene; and what is common to all scenes."""

    themes: dict[str, Annotated[dict[str, Choice], Field(min_length=1)]]
    relationships: dict[str, Choice]
    places: Choice
    intensity: Choice
    personalities: Choice


class Seed(NamedTuple):
    theme: str
    keyword: str
    relationship: str
    place: str
    intensity: str
    personality: str


class Wanted(NamedTuple):
    """One scenario to be written. `examples`: ids of scenarios of the scene that show how one looks."""

    id: str
    scene: str
    seed: Seed
    examples: tuple[str, ...]


def pools(source: str | Path) -> Pools:
    """The pools of a bundled language ("en"), or in a file. Raises RecipeError naming file, field, value and what is expected."""
    known = sorted(f.name.removesuffix(".yaml") for f in _SEEDS.iterdir() if f.name.endswith(".yaml"))
    file = Path(str(_SEEDS / f"{source}.yaml")) if str(source) in known else Path(source)
    return validated(parse_mapping(read_text(file, "seeds"), file, Pools, "seeds"), Pools, file)


def wanted(
    found: Pools,
    *,
    count: int,
    scenes: Sequence[str] = SCENES,
    examples: Mapping[str, Iterable[str]],
    shots: int = 2,
    prefix: str,
    seed: int = 0,
) -> list[Wanted]:
    """`count` requests, spread evenly over scenes, and within a scene over themes. A longer list begins with the shorter one.
    Raises ScenarioError for a scene without seeds, and if there are fewer combinations than requests."""
    requests = []
    makers = {scene: _of_scene(found, scene, seed) for scene in scenes}
    for k, scene in enumerate(islice(cycle(scenes), count)):
        if (combination := next(makers[scene], None)) is None:
            raise ScenarioError(f"scene {scene!r} has fewer combinations of seeds than requested; add themes or places")
        name = f"{prefix}-{scene}-{k // len(scenes) + 1:04d}"
        known = list(examples.get(scene, ()))
        shown = random.Random(f"examples/{seed}/{name}").sample(known, min(shots, len(known)))
        requests.append(Wanted(name, scene, combination, tuple(shown)))
    return requests


def _of_scene(found: Pools, scene: str, seed: int) -> Iterator[Seed]:
    """The seeds of a scene: themes in rotation, everything else drawn at random."""
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
