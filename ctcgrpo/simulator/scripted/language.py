"""The scripted user's word lists of a language: `languages/CODE.yaml`, whose comments explain each field. To add a language, add a
file; `script` is latin or han.
"""

import re
import threading
from collections.abc import Mapping
from functools import cache, cached_property, lru_cache
from importlib.resources import files
from typing import Annotated

import snowballstemmer
from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.scripted.grammar import is_sound, is_spliced
from ctcgrpo.util.strict_yaml import load_yaml

_LANGUAGES = files("ctcgrpo.simulator.scripted") / "languages"
_LATIN_TOKEN = re.compile(r"n't\b|'(?:s|m|re|ve|d|ll)\b|[a-z]+(?=n't\b)|[a-z]+'(?:am|clock)\b|[a-z]+|\d+(?:[.,:]\d+)*|,")
_HAN_RUN = re.compile(r"[\u4e00-\u9fff]+")
_SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"')\]]*(?:\s+|(?<=[。！？]))|\n+")
_CLAUSE = re.compile(r"[，、；：,]")
_BREAK = re.compile(r"[;:()\"“”—–]| - |--")
_LONGEST_SENTENCE = 500
"""In characters; a longer stretch without an end is read in pieces of this length, so that no pattern meets more at once."""
_KEPT = 8192  # size of the caches: personas and earlier lines are read again at every turn of a dialogue
_stemmers = threading.local()  # A stemmer keeps state while it works: one for each thread

_Words = Annotated[frozenset[str], BeforeValidator(lambda words: str(words).split())]
_AnyOf = Annotated[re.Pattern[str], BeforeValidator(lambda patterns: "|".join(f"(?:{p})" for p in patterns))]
_Persons = Annotated[
    Mapping[str, str], BeforeValidator(lambda lines: {w: line.split()[0] for line in lines for w in line.split()})
]


@dataclass(frozen=True)
class Pattern:
    """A way of speaking: any of `patterns` found in a sentence (lower case); what it does to the user, and why.
    One that `spoils` takes away all credit of the reply that it stands in."""

    name: str
    patterns: _AnyOf
    anger: float
    trust: float
    why: str
    spoils: bool = False

    def matches(self, sentence: str) -> bool:
        return self.patterns.search(sentence) is not None


_Patterns = Annotated[
    tuple[Pattern, ...], BeforeValidator(lambda table: [{"name": name} | entry for name, entry in table.items()])
]


@dataclass(frozen=True, eq=False)
class Language:
    """The fields of a file, read; of `lexicon` the tags of each word."""

    han: bool
    lexicon: Mapping[str, str]
    things: _Words
    mine: re.Pattern[str]
    pronouns: _Persons
    speakers: _Words
    empathy: _AnyOf
    responses: _AnyOf
    faults: _Patterns
    scene_faults: Mapping[str, _Patterns]
    moves: Mapping[str, _Patterns]
    other_scenes: str
    lines: Mapping[str, list[str]]
    takes_clause: _Words = frozenset()
    takes_two: _Words = frozenset()
    binding: _Words = frozenset()
    misplaced: _AnyOf | None = None

    def of_scene(self, table: Mapping[str, tuple[Pattern, ...]], scene: str) -> tuple[Pattern, ...]:
        """The `moves` or `scene_faults` of a scene; of one that has none, those of `other_scenes`."""
        return table.get(scene, table[self.other_scenes])

    def sentences(self, text: str) -> list[str]:
        sentences = (s.strip() for s in _SENTENCE_END.split(text) if s)
        return [s[k : k + _LONGEST_SENTENCE] for s in sentences for k in range(0, len(s), _LONGEST_SENTENCE)]

    @lru_cache(maxsize=_KEPT)  # noqa: B019 - a language lives as long as the process
    def tokens(self, text: str) -> tuple[str, ...]:
        """Words and commas in lower case; for Han script, overlapping pairs of characters."""
        if self.han:
            return tuple(run[k : k + 2] for run in _HAN_RUN.findall(text) for k in range(max(1, len(run) - 1)))
        return tuple(_LATIN_TOKEN.findall(text.lower().replace("\u2019", "'")))

    def length(self, text: str) -> int:
        """In words; for Han script 1.6 characters count as one."""
        if self.han:
            return round(sum(map(len, _HAN_RUN.findall(text))) / 1.6) + len(re.findall(r"[A-Za-z]+", text))
        return sum(token[0].isalnum() for token in self.tokens(text))

    @lru_cache(maxsize=_KEPT)  # noqa: B019
    def content(self, text: str) -> frozenset[str]:
        """The stems of the words that carry content."""
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
        """The weight of stems that two texts share: 1 for a word of everyday talk, 2 for any other. Pairs of characters are
        short, and count 1."""
        return len(stems) if self.han else len(stems) + len(stems - self.everyday)

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
        """Whether it is a well-formed sentence of this language."""
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
    """The language of a code. Raises SimulatorReplyError for a code without a file."""
    known = {file.name.removesuffix(".yaml"): file for file in _LANGUAGES.iterdir() if file.name.endswith(".yaml")}
    if code not in known:
        raise SimulatorReplyError(f"language = {code!r}; expected one of the scripted user's: {', '.join(sorted(known))}")
    data = load_yaml(known[code].read_text(encoding="utf-8"))
    lexicon: dict[str, str] = {}
    for tags, words in (*data.pop("lexicon").items(), ("N", data["things"])):
        for word in words.split():
            lexicon[word] = lexicon.get(word, "") + tags
    return Language(han=data.pop("script") == "han", lexicon=lexicon, **data)
