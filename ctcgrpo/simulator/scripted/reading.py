"""What a reply of the policy does, before anything is made of it."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, islice, takewhile

from ctcgrpo.simulator.scripted.knowledge import Detail, Knowledge
from ctcgrpo.simulator.scripted.language import Language, stem

_RUN = 4
_SHORTEST_FRAME = 5
_MOST_SENTENCES = 200  # what comes after so many sentences is not read: long before, a reply tires
_CHARACTERS_A_WORD = 2  # most words of Chinese have two
_SHORTEST_MIX_UP = 3  # in words (pairs of characters in Han script)
_ENDED = re.compile(r"[.!?…。！？][\"')\]”’」]*\s*$")
_NAME = re.compile(r"\b[A-Z][a-z]+\b(?=[,.!?])")  # somebody is called by a name; people shorten names
_VOCATIVE = re.compile(r"^(?:[A-Z][\w.]* ?){1,3}(?=,)|(?<=, )(?:[A-Z][\w.]* ?){1,3}(?=[,.!?])")
"""Somebody is addressed, at the beginning of a sentence or after a comma."""
_DERIVES = frozenset(["er", "ers", "or", "ors", "y", "ly", "ment", "ness", "ful", "less", "en"])
"""Endings that make a word out of a whole one."""
TELLING = 2  # A sentence speaks of a fact from this much in common on: two words, or one that is not everyday talk


class Sentence:
    """`sound`: it hangs together, of whole words. `own`: it is not taken over from what was said before. `sensible`: most of its
    content is everyday talk or belongs to this scenario. `yours` is the content without what the speaker calls its
    own: "my own mother" is not the user's."""

    def __init__(
        self, text: str, knowledge: Knowledge, language: Language, sources: frozenset[tuple[str, ...]], heard: Sequence[str]
    ) -> None:
        """`sources`: runs of words, and `heard` the words, sorted, of what was said before."""
        words = _words(text, language)
        names = {word.lower() for word in _NAME.findall(text)}
        talk = {stem(w) for w in words if language.is_common(w)} - language.thing_stems
        self.text, self.content = text, language.content(text)
        strange = self.content - knowledge.vocabulary - talk
        whole = (not _is_cut(w, heard, knowledge, language) for w in words if w not in names)
        self.sound = language.is_sound(text) and all(whole)
        self.own = _coverage(words, sources) <= 0.5
        self.sensible = language.han or len(strange) <= max(1, len(self.content) // 3)
        self.yours = self.content - language.possessed(text)

    @property
    def counts(self) -> bool:
        return self.sound and self.own and self.sensible

    @property
    def asks(self) -> bool:
        return "?" in self.text or "？" in self.text


class Reading:
    """One reply, as heard by this user at this point of the dialogue.

    `touched` are the details that its counting sentences take up. `brings` says that it comes with something about this user's
    matters that the user has not said and the policy's role was not told: words cannot be had from the dialogue alone.
    `engaged` are the touched details about which it does so while it listens, that is, takes up what was said as well or comes with
    two such words: one alone may be luck, and a script that says "promise" in every dialogue is bound to be right now and
    then. `answers`: it takes up a word of the user's last line that is not everyday talk, so it could not be said to anybody.
    `frames` are its longer sentences with their content left open: "You have put _ and _ into the _, and I can see it".
    `raised` is the detail that the user brought up last. `tells` are the stems with which it speaks, in its own words, of
    facts of the policy's persona or, in a question, of the goal. `follows` says that it speaks of "her" to a user who has just
    done so, or of "my mother" to one who has spoken of a mother. `moves` and `musts` are what counting sentences do. `echo` and
    `repetition` are the shares taken from what was heard and from earlier replies; `twice` says that two of its sentences are
    nearly one. `borrowed` and `added` count its content words: those of the user's last line, and all others, without whom it
    addresses and what says little by itself (have, do, nine). `feels`: a counting sentence names what it is like, or
    apologises; `responds`: it does, or offers, or asks openly. `mixes_up`: it says of itself what the user said of
    themselves ("I forgot the debit" to one who says so), or "you" where the user meant the policy.
    """

    def __init__(
        self,
        text: str,
        *,
        knowledge: Knowledge,
        heard: Sequence[str],
        latest: str,
        earlier: Sequence[str],
        raised: Detail | None,
    ) -> None:
        """`heard`: what the user said and what the policy's role was told; `latest`: the user's last line, "" where the policy
        opens; `earlier`: the policy's earlier replies."""
        language = knowledge.language
        sources = frozenset().union(*(_runs(_words(text, language)) for text in heard))
        words = sorted(frozenset().union(*(_words(text, language) for text in heard)))
        spoken = language.sentences(text)[:_MOST_SENTENCES]
        self.sentences = sentences = tuple(Sentence(s, knowledge, language, sources, words) for s in spoken)
        counting = [s for s in sentences if s.counts]
        said = frozenset().union(*(s.yours for s in counting))
        known = frozenset().union(*(language.content(text) for text in heard))
        brings = said - known - language.thing_stems
        listens = bool(said & known & (knowledge.matter | language.thing_stems)) or len(said & language.content(latest)) >= 2

        def engages(detail: Detail) -> bool:
            own = brings & (knowledge.matter | detail.field | detail.words)
            return len(own) >= (1 if listens else 2)

        self.touched = tuple(d for d in knowledge.details if _touches(said, d, just_raised=d == raised))
        content, said_words, of_latest = language.content(text), _words(text, language), language.content(latest)
        called = frozenset().union(*(language.content(name) for s in spoken for name in _VOCATIVE.findall(s)))
        self.feels = any(language.empathy.search(s.text.lower()) for s in counting)
        says, hears = language.substance(text) - called, language.substance(latest)
        word = _CHARACTERS_A_WORD if language.han else 1
        self.length = language.length(text)
        self.brings = bool(brings & knowledge.matter)
        self.engaged = tuple(d for d in self.touched if engages(d))
        self.raised = raised
        self.tells = frozenset().union(*(_told(s, knowledge, language) for s in sentences if s.sound and s.own))
        self.follows = any(_follows(s.text, latest, language) for s in counting)
        moves = language.of_scene(language.moves, knowledge.card.scene)
        self.moves = tuple(m for m in moves if any(m.matches(s.text.lower()) for s in counting))
        self.answers = bool((said - called) & of_latest & (knowledge.matter | language.thing_stems))
        self.musts = frozenset(name for name, words in knowledge.musts.items() if any(s.content & words for s in counting))
        self.frames = frozenset(_frame(w, language) for s in sentences if len(w := _words(s.text, language)) >= _SHORTEST_FRAME)
        self.questions = sum(s.asks for s in sentences)
        self.echo = _coverage(said_words, sources)
        self.repetition = max((_similarity(content, said_words, other, language) for other in earlier), default=0.0)
        self.twice = any(_alike(a, b, language) for a, b in combinations(sentences, 2))
        self.breaks_off = not _ENDED.search(text)
        self.borrowed = len(says & hears) // word
        self.added = len(says - hears) // word
        self.responds = self.feels or any(language.responses.search(s.text.lower()) for s in counting)
        self.mixes_up = any(_mixes_up(s.text, latest, knowledge, language) for s in sentences)

    def share(self, predicate: str) -> float:
        """The share of sentences for which the named property does not hold."""
        return sum(not getattr(s, predicate) for s in self.sentences) / len(self.sentences) if self.sentences else 1.0


def _mixes_up(text: str, latest: str, knowledge: Knowledge, language: Language) -> bool:
    """Whether a sentence takes over, from the user's last line, words that begin with "I" or "you" and name a matter."""
    words, heard = _words(text, language), _words(latest, language)
    starts = [(k, j) for k, word in enumerate(words) if language.is_speaker(word) for j, h in enumerate(heard) if h == word]
    for k, j in starts:
        run = [word for word, _ in takewhile(lambda pair: pair[0] == pair[1], zip(words[k:], heard[j:], strict=False))]
        content = frozenset().union(*(language.content(word) for word in run))
        if len(run) >= _SHORTEST_MIX_UP and len(content) >= 2 and content & knowledge.matter:
            return True
    return False


def _told(sentence: Sentence, knowledge: Knowledge, language: Language) -> frozenset[str]:
    """The stems of the facts that a sentence speaks of."""
    facts = (*knowledge.facts, *knowledge.subjects) if sentence.asks else knowledge.facts
    shared = (sentence.content & fact for fact in facts)
    return frozenset().union(*(stems for stems in shared if language.weight(stems) >= TELLING))


def _follows(text: str, latest: str, language: Language) -> bool:
    persons = language.persons(text) & language.persons(latest)
    return bool(persons or language.possessed(text) & language.content(latest))


def _touches(content: frozenset[str], detail: Detail, just_raised: bool) -> bool:
    """Names the detail and says something about it, or moves in its field: with two words, or with one where the user
    has just raised it, since then the rest of a sentence is about it anyway."""
    named, around = content & detail.words, content & (detail.words | detail.field)
    return (bool(named) and len(content - named) >= 3) or len(around) >= (1 if just_raised else 2)


def _is_cut(word: str, heard: Sequence[str], knowledge: Knowledge, language: Language) -> bool:
    """Whether it is the beginning of a word that was heard ("stri" for stride) and no word by itself that anybody here knows;
    `heard` is sorted."""
    if language.han or language.is_common(word) or not word.isalpha():
        return False
    if len(word) < 2 or stem(word) in knowledge.vocabulary | language.thing_stems:
        return False
    from_here = islice(heard, bisect_left(heard, word), None)
    longer = list(takewhile(lambda h: h.startswith(word), from_here))
    if longer and longer[0] == word:
        return False
    rests = (h.removeprefix(word) for h in longer if stem(h) != stem(word))
    # "Hall" is a word where there is a hallway, and "heat" where there is a heater.
    return any(not language.is_common(rest) and rest not in _DERIVES for rest in rests)


def _alike(a: Sentence, b: Sentence, language: Language) -> bool:
    shared, both = a.content & b.content, a.content | b.content
    return language.tokens(a.text) == language.tokens(b.text) or 2 * len(shared) > len(both)


def _frame(words: Sequence[str], language: Language) -> tuple[str, ...]:
    return tuple("_" if language.content(word) else word for word in words)


def _words(text: str, language: Language) -> tuple[str, ...]:
    return tuple(t for t in language.tokens(text) if t != ",")


@lru_cache(maxsize=8192)
def _runs(words: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    return frozenset(words[k : k + _RUN] for k in range(len(words) - _RUN + 1))


def _coverage(words: tuple[str, ...], sources: frozenset[tuple[str, ...]]) -> float:
    """The share of words that stand in a run of four words taken from the sources."""
    taken = [False] * len(words)
    for k in range(len(words) - _RUN + 1):
        if words[k : k + _RUN] in sources:
            taken[k : k + _RUN] = [True] * _RUN
    return sum(taken) / len(words) if words else 0.0


def _similarity(content: frozenset[str], words: tuple[str, ...], other: str, language: Language) -> float:
    """How much of a reply stood in another one already, by content words or by runs of words, whichever is more."""
    other_content = language.content(other)
    shared = len(content & other_content) / max(1, len(content | other_content))
    return max(shared, _coverage(words, _runs(_words(other, language))))
