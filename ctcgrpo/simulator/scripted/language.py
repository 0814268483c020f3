"""What the scripted user knows of a language: `languages/CODE.yaml`. A language is added by adding a file.

A file holds: `script` (latin or han), `lexicon` (tag -> words, latin only), `things` (concrete everyday words), `takes_clause`
and `takes_two` (latin only: see `grammar.is_spliced`), `binding` (han only: characters that bind words into a clause),
`misplaced` (han only, may be absent: what no clause holds), `mine` (a pattern: what a speaker calls its own), `pronouns`
(those of one third person each), `speakers` (words for whoever speaks or is spoken to), `empathy` and `responses`
(patterns: what somebody who listens does with what was said), `faults` and `moves` (name -> patterns and effect; moves
per scene, `other_scenes` names the one whose moves count in scenes that are not here), `lines` (what the user says
where the scenario has no words of its own).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.resources import files
from typing import Any

import snowballstemmer

from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.scripted.grammar import is_sound, is_spliced
from ctcgrpo.util.strict_yaml import load_yaml

_LANGUAGES = files("ctcgrpo.simulator.scripted") / "languages"
_LATIN_TOKEN = re.compile(r"n't\b|'(?:s|m|re|ve|d|ll)\b|[a-z]+(?=n't\b)|[a-z]+'(?:am|clock)\b|[a-z]+|\d+(?:[.,:]\d+)*|,")
_HAN_RUN = re.compile(r"[\u4e00-\u9fff]+")
_SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"')\]]*(?:\s+|(?<=[。！？]))|\n+")
_CLAUSE = re.compile(r"[，、；：,]")
_BREAK = re.compile(r"[;:()\"“”—–]| - |--")
_ENDED = re.compile(r"[.!?…。！？][\"')\]”’」]*\s*$")
_LONGEST_SENTENCE = 500
"""In characters; a longer stretch without an end is read in pieces of this length, so that no pattern meets more at once."""
_KEPT = 8192
"""Texts whose reading is kept."""
_stemmers = threading.local()
"""A stemmer keeps state while it works: one for each thread."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A way of speaking: any of `patterns` found in a sentence (lower case); what it does to the user, and why.
    One that `spoils` takes away all credit of the reply that it stands in."""

    name: str
    patterns: re.Pattern[str]
    anger: float
    trust: float
    why: str
    spoils: bool

    def matches(self, sentence: str) -> bool:
        return self.patterns.search(sentence) is not None


@dataclass(frozen=True)
class Language:
    code: str
    han: bool
    lexicon: Mapping[str, str]
    things: frozenset[str]
    takes_clause: frozenset[str]
    takes_two: frozenset[str]
    binding: frozenset[str]
    misplaced: re.Pattern[str] | None
    mine: re.Pattern[str]
    pronouns: Mapping[str, str]
    speakers: frozenset[str]
    empathy: re.Pattern[str]
    responses: re.Pattern[str]
    faults: tuple[Pattern, ...]
    scene_faults: Mapping[str, tuple[Pattern, ...]]
    moves: Mapping[str, tuple[Pattern, ...]]
    other_scenes: str
    lines: Mapping[str, list[str]]

    def of_scene(self, table: Mapping[str, tuple[Pattern, ...]], scene: str) -> tuple[Pattern, ...]:
        """The `moves` or `scene_faults` of a scene; of one that has none, those of `other_scenes`."""
        return table.get(scene, table[self.other_scenes])

    def sentences(self, text: str) -> list[str]:
        sentences = (s.strip() for s in _SENTENCE_END.split(text) if s)
        return [s[k : k + _LONGEST_SENTENCE] for s in sentences for k in range(0, len(s), _LONGEST_SENTENCE)]

    def ends(self, text: str) -> bool:
        """Whether the last sentence is brought to its end."""
        return bool(_ENDED.search(text))

    def tokens(self, text: str) -> tuple[str, ...]:
        """Words and commas in lower case; for Han script, overlapping pairs of characters."""
        return self._kept_tokens(text)

    def _tokens(self, text: str) -> tuple[str, ...]:
        if self.han:
            return tuple(run[k : k + 2] for run in _HAN_RUN.findall(text) for k in range(max(1, len(run) - 1)))
        return tuple(_LATIN_TOKEN.findall(text.lower().replace("\u2019", "'")))

    def length(self, text: str) -> int:
        """In words; for Han script 1.6 characters count as one."""
        if self.han:
            return round(sum(map(len, _HAN_RUN.findall(text))) / 1.6) + len(re.findall(r"[A-Za-z]+", text))
        return sum(token[0].isalnum() for token in self.tokens(text))

    def content(self, text: str) -> frozenset[str]:
        """The stems of the words that carry content."""
        return self._kept_content(text)

    def _content(self, text: str) -> frozenset[str]:
        return frozenset(stem(t) if not self.han else t for t in self.tokens(text) if self._is_content(t))

    def substance(self, text: str) -> frozenset[str]:
        """The content without words that say little by themselves; in Han script, its characters, so that other words made of
        them do not count as new."""
        if not self.han:
            return self.content(text) - self._light
        return frozenset(char for run in _HAN_RUN.findall(text) for char in run if char not in self.lexicon)

    def uncommon(self, text: str) -> frozenset[str]:
        """The content that is not everyday talk."""
        return self.content(text) - self.everyday

    def possessed(self, text: str) -> frozenset[str]:
        """The content of what a text calls the speaker's own ("my own mother")."""
        return frozenset().union(*(self.content(match[0]) for match in self.mine.finditer(text.lower())))

    def persons(self, text: str) -> frozenset[str]:
        """The third persons that a text speaks of: "she", if it has "her"."""
        return frozenset(self.pronouns[t] for t in self.pronouns if t in (text if self.han else self.tokens(text)))

    def weight(self, stems: frozenset[str]) -> int:
        """How much it tells that two texts share these stems: 1 for a word of everyday talk, 2 for any other. Pairs of
        characters are too short to tell as much, and count 1."""
        return len(stems) if self.han else len(stems) + len(stems - self.everyday)

    # Personas and earlier lines are read anew at every turn of a dialogue.
    @cached_property
    def _kept_tokens(self) -> Callable[[str], tuple[str, ...]]:
        return lru_cache(maxsize=_KEPT)(self._tokens)

    @cached_property
    def _kept_content(self) -> Callable[[str], frozenset[str]]:
        return lru_cache(maxsize=_KEPT)(self._content)

    @cached_property
    def everyday(self) -> frozenset[str]:
        """The stems of everyday talk."""
        return frozenset(stem(word) for word in self.lexicon)

    @cached_property
    def _light(self) -> frozenset[str]:
        """The stems of verbs that can be auxiliaries, of numbers and the like."""
        return frozenset(stem(word) for word, tags in self.lexicon.items() if set("XMD") & set(tags))

    @cached_property
    def thing_stems(self) -> frozenset[str]:
        return frozenset(stem(word) for word in self.things)

    def is_common(self, word: str) -> bool:
        """Whether it is a word of everyday talk, whatever the subject."""
        return word in self.lexicon

    def is_speaker(self, token: str) -> bool:
        """Whether it is a word for whoever speaks or is spoken to; a pair of characters is one by its first."""
        return (token[0] if self.han else token) in self.speakers

    def is_sound(self, sentence: str) -> bool:
        """Whether it is a sentence of this language that hangs together."""
        if not self.han:
            first = next((char for char in sentence if char.isalnum()), "a")
            return not first.islower() and is_sound(self.tokens(sentence), self.lexicon) and not self._is_spliced(sentence)
        letters = re.findall(r"[\w]", sentence)
        han = sum(map(len, _HAN_RUN.findall(sentence)))
        is_chinese = bool(letters) and han >= 0.6 * len(letters)
        if not is_chinese or re.search(r"(.{1,4})\1{2,}", sentence) or self._is_list(sentence):
            return False
        return not (self.misplaced and any(map(self.misplaced.search, _CLAUSE.split(sentence.rstrip("。！？!?…")))))

    def _is_list(self, sentence: str) -> bool:
        """Whether a Chinese sentence is words set side by side: hardly a clause in it has anything that binds them."""
        clauses = [clause for clause in _CLAUSE.split(sentence) if _HAN_RUN.search(clause)]
        bound = sum(any(char in self.binding for char in clause) for clause in clauses)
        return len(clauses) >= 3 and 2 * bound <= len(clauses)

    def _is_spliced(self, sentence: str) -> bool:
        return any(
            is_spliced(self.tokens(part), self.lexicon, self.takes_clause, self.takes_two) for part in _BREAK.split(sentence)
        )

    def _is_content(self, token: str) -> bool:
        if self.han:
            return not any(char in self.lexicon for char in token)
        return token[0].isalpha() and not set(self.lexicon.get(token, "N")) <= set("DPOXMZITCWUR")


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    if not hasattr(_stemmers, "english"):
        _stemmers.english = snowballstemmer.stemmer("english")
    return str(_stemmers.english.stemWord(word))


@cache
def load_language(code: str) -> Language:
    """Raises SimulatorReplyError for a language without a file."""
    file = _LANGUAGES / f"{code}.yaml"
    if not file.is_file():
        known = sorted(f.name.removesuffix(".yaml") for f in _LANGUAGES.iterdir() if f.name.endswith(".yaml"))
        raise SimulatorReplyError(f"the scripted simulator does not speak {code!r}; it speaks {', '.join(known)}")
    data = load_yaml(file.read_text(encoding="utf-8"))
    lexicon: dict[str, str] = {}
    for tags, words in data["lexicon"].items():
        for word in str(words).split():
            lexicon[word] = lexicon.get(word, "") + str(tags)
    things = frozenset(str(data["things"]).split())
    for word in things:
        lexicon[word] = lexicon.get(word, "") + "N"
    scenes: list[str] = list(data["moves"])
    return Language(
        code=code,
        han=data["script"] == "han",
        lexicon=lexicon,
        things=things,
        takes_clause=frozenset(str(data.get("takes_clause", "")).split()),
        takes_two=frozenset(str(data.get("takes_two", "")).split()),
        binding=frozenset(str(data.get("binding", "")).split()),
        mine=re.compile(data["mine"]),
        pronouns={word: words.split()[0] for words in data["pronouns"] for word in words.split()},
        speakers=frozenset(str(data["speakers"]).split()),
        empathy=_any_of(data["empathy"]),
        responses=_any_of(data["responses"]),
        misplaced=_any_of(data["misplaced"]) if "misplaced" in data else None,
        faults=_patterns(data["faults"]),
        scene_faults={scene: _patterns(data["scene_faults"].get(scene, {})) for scene in scenes},
        moves={scene: _patterns(data["moves"][scene]) for scene in scenes},
        other_scenes=data["other_scenes"],
        lines=data["lines"],
    )


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{p})" for p in patterns))


def _patterns(table: Mapping[str, Mapping[str, Any]]) -> tuple[Pattern, ...]:
    return tuple(
        Pattern(name, _any_of(entry["patterns"]), entry["anger"], entry["trust"], entry["why"], entry.get("spoils", False))
        for name, entry in table.items()
    )
