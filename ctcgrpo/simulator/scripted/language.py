"""Word lists and patterns of a language, read from `languages/CODE.yaml`. The comments there explain each field. A new language is
a new file; its `script` is latin or han.
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
from ctcgrpo.simulator.scripted.grammar import is_run_on, is_well_formed
from ctcgrpo.util.strict_yaml import load_yaml

_LANGUAGES = files("ctcgrpo.simulator.scripted") / "languages"
_LATIN_TOKEN = re.compile(r"n't\b|'(?:s|m|re|ve|d|ll)\b|[a-z]+(?=n't\b)|[a-z]+'(?:am|clock)\b|[a-z]+|\d+(?:[.,:]\d+)*|,")
_HAN_RUN = re.compile(r"[\u4e00-\u9fff]+")
_SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"')\]]*(?:\s+|(?<=[。！？]))|\n+")
_CLAUSE = re.compile(r"[，、；：,]")
_BREAK = re.compile(r"[;:()\"“”—–]| - |--")
_MAX_SENTENCE = 500
"""In characters. Longer sentences are split, so that the time of a pattern stays bounded."""
_CACHE_SIZE = 8192  # every turn reads the personas and earlier messages again
_stemmers = threading.local()  # a stemmer is not thread-safe

_Words = Annotated[frozenset[str], BeforeValidator(lambda words: str(words).split())]
_AnyOf = Annotated[re.Pattern[str], BeforeValidator(lambda patterns: "|".join(f"(?:{p})" for p in patterns))]
_Persons = Annotated[
    Mapping[str, str], BeforeValidator(lambda lines: {w: line.split()[0] for line in lines for w in line.split()})
]


@dataclass(frozen=True)
class Pattern:
    """A pattern of speech: it matches a sentence (lower case) in which any of `patterns` is found. `anger` and `trust` are the
    changes in points, `why` the reason. With `spoils`, the reply loses all credit."""

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
    """The parsed fields of a file. `lexicon`: the tags of each word."""

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

    def for_scene(self, table: Mapping[str, tuple[Pattern, ...]], scene: str) -> tuple[Pattern, ...]:
        """The `moves` or `scene_faults` of a scene, by default those of `other_scenes`."""
        return table.get(scene, table[self.other_scenes])

    def sentences(self, text: str) -> list[str]:
        sentences = (s.strip() for s in _SENTENCE_END.split(text) if s)
        return [s[k : k + _MAX_SENTENCE] for s in sentences for k in range(0, len(s), _MAX_SENTENCE)]

    @lru_cache(maxsize=_CACHE_SIZE)  # noqa: B019 - a language lives as long as the process
    def tokens(self, text: str) -> tuple[str, ...]:
        """Words and commas in lower case; for Han script, overlapping pairs of characters."""
        if self.han:
            return tuple(run[k : k + 2] for run in _HAN_RUN.findall(text) for k in range(max(1, len(run) - 1)))
        return tuple(_LATIN_TOKEN.findall(text.lower().replace("\u2019", "'")))

    def length(self, text: str) -> int:
        """The length in words; in Han script, 1.6 characters count as a word."""
        if self.han:
            return round(sum(map(len, _HAN_RUN.findall(text))) / 1.6) + len(re.findall(r"[A-Za-z]+", text))
        return sum(token[0].isalnum() for token in self.tokens(text))

    @lru_cache(maxsize=_CACHE_SIZE)  # noqa: B019
    def content(self, text: str) -> frozenset[str]:
        """The stems of content words."""
        return frozenset(stem(t) if not self.han else t for t in self.tokens(text) if self._is_content(t))

    def substance(self, text: str) -> frozenset[str]:
        """The content without auxiliaries, numbers and the like. In Han script, single characters, so that other words made of the
        same characters do not count as new."""
        if not self.han:
            return self.content(text) - self._light_stems
        return frozenset(char for run in _HAN_RUN.findall(text) for char in run if char not in self.lexicon)

    def uncommon(self, text: str) -> frozenset[str]:
        """The content without everyday words."""
        return self.content(text) - self.common_stems

    def possessions(self, text: str) -> frozenset[str]:
        """The content of the speaker's possessions and relations ("my own mother")."""
        return frozenset().union(*(self.content(match[0]) for match in self.mine.finditer(text.lower())))

    def third_persons(self, text: str) -> frozenset[str]:
        """The third-person pronouns of a text, in the nominative: "she" for "her"."""
        return frozenset(self.pronouns[t] for t in self.pronouns if t in (text if self.han else self.tokens(text)))

    def weight(self, stems: frozenset[str]) -> int:
        """The weight of stems that two texts share: 1 for an everyday word, 2 for any other, 1 for a pair of Han characters."""
        return len(stems) if self.han else len(stems) + len(stems - self.common_stems)

    @cached_property
    def common_stems(self) -> frozenset[str]:
        """The stems of everyday words."""
        return frozenset(stem(word) for word in self.lexicon)

    @cached_property
    def _light_stems(self) -> frozenset[str]:
        """The stems of auxiliaries, numbers and determiners."""
        return frozenset(stem(word) for word, tags in self.lexicon.items() if set("XMD") & set(tags))

    @cached_property
    def thing_stems(self) -> frozenset[str]:
        return frozenset(stem(word) for word in self.things)

    def is_common(self, word: str) -> bool:
        """Whether it is an everyday word."""
        return word in self.lexicon

    def is_first_or_second_person(self, token: str) -> bool:
        """Whether it is a first- or second-person pronoun; for a pair of Han characters, whether the first one is."""
        return (token[0] if self.han else token) in self.speakers

    def is_well_formed(self, sentence: str) -> bool:
        """Whether it is a well-formed sentence in this language."""
        if not self.han:
            first = next((char for char in sentence if char.isalnum()), "a")
            return not first.islower() and is_well_formed(self.tokens(sentence), self.lexicon) and not self._is_run_on(sentence)
        letters = re.findall(r"[\w]", sentence)
        han = sum(map(len, _HAN_RUN.findall(sentence)))
        is_chinese = bool(letters) and han >= 0.6 * len(letters)
        if not is_chinese or re.search(r"(.{1,4})\1{2,}", sentence) or self._is_list(sentence):
            return False
        return not (self.misplaced and any(map(self.misplaced.search, _CLAUSE.split(sentence.rstrip("。！？!?…")))))

    def _is_list(self, sentence: str) -> bool:
        """Whether a Chinese sentence is a list of words: at most half of its clauses have a character that connects words."""
        clauses = [clause for clause in _CLAUSE.split(sentence) if _HAN_RUN.search(clause)]
        bound = sum(any(char in self.binding for char in clause) for clause in clauses)
        return len(clauses) >= 3 and 2 * bound <= len(clauses)

    def _is_run_on(self, sentence: str) -> bool:
        return any(
            is_run_on(self.tokens(part), self.lexicon, self.takes_clause, self.takes_two) for part in _BREAK.split(sentence)
        )

    def _is_content(self, token: str) -> bool:
        if self.han:
            return not any(char in self.lexicon for char in token)
        return token[0].isalpha() and not set(self.lexicon.get(token, "N")) <= set("DPOXMZITCWUR")


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """The stem of an English word."""
    if not hasattr(_stemmers, "english"):
        _stemmers.english = snowballstemmer.stemmer("english")
    return str(_stemmers.english.stemWord(word))


@cache
def load_language(code: str) -> Language:
    """The language of a code. Raises SimulatorReplyError for an unknown code."""
    known = {file.name.removesuffix(".yaml"): file for file in _LANGUAGES.iterdir() if file.name.endswith(".yaml")}
    if code not in known:
        raise SimulatorReplyError(f"language = {code!r}; expected one of the scripted user's: {', '.join(sorted(known))}")
    data = load_yaml(known[code].read_text(encoding="utf-8"))
    lexicon: dict[str, str] = {}
    for tags, words in (*data.pop("lexicon").items(), ("N", data["things"])):
        for word in words.split():
            lexicon[word] = lexicon.get(word, "") + tags
    return Language(han=data.pop("script") == "han", lexicon=lexicon, **data)
