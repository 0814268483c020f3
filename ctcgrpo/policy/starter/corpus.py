"""What the starter is taught: dialogues put together from bundled lines and sentence frames, mostly mediocre.

`english/SCENE.yaml` holds lines that a user may say, each with the thing that it is about and words that go with that thing;
replies that could be said to anybody (`plain`); replies that hurt (`poor`). `english/frames.yaml` holds sentences with gaps,
`english/nouns.txt` everyday nouns that a user may speak of.
A dialogue draws from all of them at random, and often from the frames of another scene than its own: the starter
speaks in sentences and knows how to take up a word, and has yet to learn when, of whom, and what for.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from ctcgrpo.policy.reasoning import CLOSE, OPEN
from ctcgrpo.records import SCENES, Scene
from ctcgrpo.strict_yaml import load_yaml

_FOLDER = files("ctcgrpo.policy.starter") / "english"
_NOUN = re.compile(r"\b(?:the|an?|my|his|her|our|their|that|this|no|old)\s+([a-z]{4,})\b")

KINDS: Mapping[str, float] = {"plain": 0.4, "poor": 0.12, "name": 0.18, "engage": 0.3}
"""What a reply does, and how often: says what anybody could, hurts, names the user's thing, says something about it."""
_OTHER_SCENE = 0.4
_OTHER_WORDS = 0.3
_COMMON = 3
"""How many lines a word has to go with to be taught: of a word met once a minute there is nothing to learn."""
_OWN_LINES, _VARIED, _RARE, _LAST_ONLY = 0.5, 0.8, 0.6, 0.3
_REACTION = 0.7


@dataclass(frozen=True, slots=True)
class Line:
    """Something that a user says. `thing` is the word that it is about, or "" for none; `around` the words that go with it."""

    text: str
    thing: str
    around: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    thought: str
    text: str
    kind: str

    @property
    def completion(self) -> str:
        return f"{OPEN}{self.thought}{CLOSE}{self.text}"


@dataclass(frozen=True)
class Corpus:
    lines: Mapping[Scene, Sequence[Line]]
    replies: Mapping[Scene, Mapping[str, Sequence[str]]]
    """By scene and kind; `ask` and `move` follow the others."""
    thoughts: Mapping[str, Sequence[str]]
    around: Sequence[str]
    reactions: Sequence[str]
    """What a user says of the last reply before going on."""
    nouns: Sequence[str]
    """Each a token of its own to the starter, so that taking one up is one copy."""

    def reply(self, scene: Scene, line: Line, rng: random.Random, kinds: Mapping[str, float] = KINDS) -> Reply:
        """A reply to a line: of a kind drawn by the weights `kinds`, with a thought before it."""
        kind = rng.choices(list(kinds), weights=list(kinds.values()))[0]
        if not line.thing and kind in ("name", "engage"):
            kind = "plain"
        words = line.around if len(line.around) > 1 and rng.random() > _OTHER_WORDS else self.around
        a, b = rng.sample(words, 2)
        gaps = {"thing": line.thing, "a": a, "b": b}

        def fill(table: Mapping[str, Sequence[str]], kind: str) -> str:
            return rng.choice(table[kind]).format(**gaps)

        def say(kind: str) -> str:
            other = kind not in ("plain", "poor") and rng.random() < _OTHER_SCENE
            return fill(self.replies[rng.choice(SCENES) if other else scene], kind)

        then = {"plain": ["plain", "move", ""], "poor": ["plain", ""], "name": ["plain", "move"], "engage": ["ask", "move"]}
        following = rng.choice(then[kind])
        text = " ".join(say(k) for k in (kind, following) if k)
        return Reply(fill(self.thoughts, kind), text, kind)


@cache
def load_corpus() -> Corpus:
    def read(name: str) -> Any:
        return load_yaml((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))

    frames, scenes = read("frames"), {scene: read(scene) for scene in SCENES}
    uses = Counter(word for data in scenes.values() for entry in data["lines"] for word in entry["around"])
    lines = {
        scene: [
            Line(entry["line"], entry["thing"], tuple(w for w in entry["around"] if uses[w] >= _COMMON))
            for entry in data["lines"]
        ]
        for scene, data in scenes.items()
    }
    return Corpus(
        lines=lines,
        replies={scene: {**frames[scene], "plain": data["plain"], "poor": data["poor"]} for scene, data in scenes.items()},
        thoughts=frames["thoughts"],
        reactions=frames["reactions"],
        nouns=(_FOLDER / "nouns.txt").read_text(encoding="utf-8").split(),
        around=sorted(word for word, n in uses.items() if n >= _COMMON),
    )


@dataclass(frozen=True, slots=True)
class Lesson:
    """A dialogue to learn from: what the role was told, and exchanges of a user's line ("" where the policy opens) and the
    reply to it. With `last_only` earlier replies stand without their thoughts, as the policy will meet them, and are not taught."""

    persona: str
    exchanges: tuple[tuple[str, Reply], ...]
    last_only: bool = False


@dataclass(frozen=True, slots=True)
class Situation:
    """What a training scenario offers to learn from: what the role is told, and what the user may say."""

    scene: Scene
    persona: str
    lines: tuple[str, ...]


def short_lessons(situations: Sequence[Situation], seed: int, kinds: Mapping[str, float] = KINDS) -> Iterator[Lesson]:
    """A line and a reply, of any scene, without a role."""
    corpus, rng, rare = load_corpus(), random.Random(f"short/{seed}"), _rare_words(situations)
    while True:
        situation = rng.choice(situations)
        line = _line(situation, corpus, rare, rng)
        yield Lesson("", ((line.text, corpus.reply(situation.scene, line, rng, kinds)),))


def long_lessons(situations: Sequence[Situation], seed: int) -> Iterator[Lesson]:
    """Dialogues in a role."""
    corpus, rng, rare = load_corpus(), random.Random(f"long/{seed}"), _rare_words(situations)
    while True:
        situation = rng.choice(situations)
        lines = [_line(situation, corpus, rare, rng) for _ in range(rng.randint(2, 4))]
        for k, line in enumerate(lines):
            if k and rng.random() < _REACTION:
                lines[k] = replace(line, text=f"{rng.choice(corpus.reactions)} {line.text}")
        if situation.scene == "charm":  # the policy opens, on something that its role was told
            lines[0] = Line("", rng.choice(_NOUN.findall(situation.persona) or [""]))
        exchanges = tuple((line.text, corpus.reply(situation.scene, line, rng)) for line in lines)
        yield Lesson(situation.persona, exchanges, last_only=rng.random() < _LAST_ONLY)


def _line(situation: Situation, corpus: Corpus, rare: Sequence[str], rng: random.Random) -> Line:
    """What a user says, with another thing in the place of the one that it is about, more often than not: there are too few
    lines to learn from each what it is about, and enough to learn where in a line that stands."""
    line = rng.choice(corpus.lines[situation.scene])
    if rng.random() < _OWN_LINES:
        text = rng.choice(situation.lines)
        line = Line(text, rng.choice(_NOUN.findall(text) or [""]))
    if not line.thing or rng.random() > _VARIED:
        return line
    other = rng.choice(corpus.lines[rng.choice(SCENES)])
    if rng.random() < _RARE:
        other = Line("", rng.choice(rare) if rng.random() < 0.6 else _made_up(rng))
    return Line(re.sub(rf"\b{line.thing}\b", other.thing, line.text, count=1), other.thing, other.around)


def _rare_words(situations: Sequence[Situation]) -> list[str]:
    text = " ".join(s.persona + " " + " ".join(s.lines) for s in situations)
    return sorted({*re.findall(r"\b[a-z]{4,}\b", text), *load_corpus().nouns})


def _made_up(rng: random.Random) -> str:
    """A word that nobody has heard before: taking it up is copying and nothing else."""
    return "".join(rng.choice("bdfgklmnprstvw") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))) + rng.choice(
        "nrstlm"
    )
