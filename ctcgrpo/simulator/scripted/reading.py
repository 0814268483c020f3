"""The features of a reply, from which the rules compute the state change."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, islice, takewhile

from ctcgrpo.simulator.scripted.knowledge import Detail, Knowledge
from ctcgrpo.simulator.scripted.language import Language, stem

_RUN = 4  # words
_MIN_TEMPLATE = 5  # words
_MAX_SENTENCES = 200  # later sentences are ignored
_CHARACTERS_PER_WORD = 2  # of Chinese, typically
_MIN_CONFUSION = 3  # in words (pairs of characters in Han script)
_ENDED = re.compile(r"[.!?…。！？][\"')\]”’」]*\s*$")
_NAME = re.compile(r"\b[A-Z][a-z]+\b(?=[,.!?])")  # a name in an address, which may be a short form
_VOCATIVE = re.compile(r"^(?:[A-Z][\w.]* ?){1,3}(?=,)|(?<=, )(?:[A-Z][\w.]* ?){1,3}(?=[,.!?])")
"""A name in an address, at the beginning of a sentence or after a comma."""
_SUFFIXES = frozenset(["er", "ers", "or", "ors", "y", "ly", "ment", "ness", "ful", "less", "en"])
"""Suffixes that derive a word from a complete word."""
FACT_WEIGHT = 2  # minimum `Language.weight` of the content that a sentence shares with a fact


class Sentence:
    """One sentence of a reply.

    `well_formed`: it is grammatical and has no truncated word. `original`: it is not copied from the context. `on_topic`: most of
    its content is everyday words or belongs to the scenario. `about_user`: its content without the speaker's own possessions and
    relations ("my own mother").
    """

    def __init__(
        self,
        text: str,
        knowledge: Knowledge,
        language: Language,
        sources: frozenset[tuple[str, ...]],
        context_words: Sequence[str],
    ) -> None:
        """`sources`: the runs of words of the context; `context_words`: its words, sorted."""
        words = _words(text, language)
        names = {word.lower() for word in _NAME.findall(text)}
        everyday = {stem(w) for w in words if language.is_common(w)} - language.thing_stems
        self.text, self.content = text, language.content(text)
        strange = self.content - knowledge.vocabulary - everyday
        whole = (not _is_truncated(w, context_words, knowledge, language) for w in words if w not in names)
        self.well_formed = language.is_well_formed(text) and all(whole)
        self.original = _coverage(words, sources) <= 0.5
        self.on_topic = language.han or len(strange) <= max(1, len(self.content) // 3)
        self.about_user = self.content - language.possessions(text)

    @property
    def is_valid(self) -> bool:
        return self.well_formed and self.original and self.on_topic

    @property
    def asks(self) -> bool:
        return "?" in self.text or "？" in self.text


class Reading:
    """The features of one reply at its point of the dialogue.

    Only valid sentences (`Sentence.is_valid`) count for the following:

    - `mentioned`: the details that they mention;
    - `adds_information`: they hold content about this user's topics that is in no message and not in the policy's persona, so it
      cannot be copied;
    - `engaged`: the mentioned details with such content: one word if the reply also takes up something of the context, else two.
      One word alone may be chance, since a fixed script that always says "promise" is sometimes right;
    - `answers`: they take up a word of the user's last message that is not an everyday word;
    - `shares_referent`: they refer to a person of the last message ("her"), or to a relation in it ("my mother" after "mother");
    - `moves`, `requirements`: the moves of the scene, and the names of the requirements, that they meet;
    - `empathises`: they name a feeling or apologise; `responds`: they empathise, offer something or ask an open question.

    All sentences count for these:

    - `stated_facts`: stems of facts from the policy's persona that well-formed, original sentences state; questions may also take
      them from the goal;
    - `templates`: the longer sentences with "_" for each content word: "You have put _ and _ into the _, and I can see it";
    - `raised`: the detail that the user raised last;
    - `length`, in words, and `questions`, a count;
    - `echo`, `repetition`: the shares of words taken from the context, and from the most similar earlier reply, in [0, 1];
    - `has_duplicates`: two sentences are nearly the same; `unfinished`: the reply has no end mark;
    - `borrowed`, `added`: how many content words come from the last message, and how many do not, without names of address and
      without auxiliaries and numbers;
    - `confuses_speakers`: a sentence copies "I ..." from the user, as if the policy were the user, or copies "you ...".
    """

    def __init__(
        self,
        text: str,
        *,
        knowledge: Knowledge,
        context: Sequence[str],
        last_message: str,
        earlier_replies: Sequence[str],
        raised: Detail | None,
    ) -> None:
        """`context`: the user's messages and the policy's persona; `last_message`: the user's, "" where the policy opens;
        `earlier_replies`: the policy's."""
        language = knowledge.language
        sources = frozenset().union(*(_runs(_words(text, language)) for text in context))
        context_words = sorted(frozenset().union(*(_words(text, language) for text in context)))
        texts = language.sentences(text)[:_MAX_SENTENCES]
        self.sentences = sentences = tuple(Sentence(s, knowledge, language, sources, context_words) for s in texts)
        valid = [s for s in sentences if s.is_valid]
        valid_content = frozenset().union(*(s.about_user for s in valid))
        context_content = frozenset().union(*(language.content(text) for text in context))
        new_content = valid_content - context_content - language.thing_stems
        takes_up = (
            bool(valid_content & context_content & (knowledge.topic_stems | language.thing_stems))
            or len(valid_content & language.content(last_message)) >= 2
        )

        def engages(detail: Detail) -> bool:
            added = new_content & (knowledge.topic_stems | detail.field | detail.words)
            return len(added) >= (1 if takes_up else 2)

        self.mentioned = tuple(d for d in knowledge.details if _mentions(valid_content, d, just_raised=d == raised))
        content, reply_words, message_content = language.content(text), _words(text, language), language.content(last_message)
        addressees = frozenset().union(*(language.content(name) for s in texts for name in _VOCATIVE.findall(s)))
        self.empathises = any(language.empathy.search(s.text.lower()) for s in valid)
        reply_substance, message_substance = language.substance(text) - addressees, language.substance(last_message)
        word = _CHARACTERS_PER_WORD if language.han else 1
        self.length = language.length(text)
        self.adds_information = bool(new_content & knowledge.topic_stems)
        self.engaged = tuple(d for d in self.mentioned if engages(d))
        self.raised = raised
        self.stated_facts = frozenset().union(
            *(_stated_facts(s, knowledge, language) for s in sentences if s.well_formed and s.original)
        )
        self.shares_referent = any(_shares_referent(s.text, last_message, language) for s in valid)
        moves = language.for_scene(language.moves, knowledge.card.scene)
        self.moves = tuple(m for m in moves if any(m.matches(s.text.lower()) for s in valid))
        self.answers = bool((valid_content - addressees) & message_content & (knowledge.topic_stems | language.thing_stems))
        self.requirements = frozenset(
            name for name, words in knowledge.requirements.items() if any(s.content & words for s in valid)
        )
        self.templates = frozenset(
            _template(w, language) for s in sentences if len(w := _words(s.text, language)) >= _MIN_TEMPLATE
        )
        self.questions = sum(s.asks for s in sentences)
        self.echo = _coverage(reply_words, sources)
        self.repetition = max((_similarity(content, reply_words, other, language) for other in earlier_replies), default=0.0)
        self.has_duplicates = any(_near_duplicates(a, b, language) for a, b in combinations(sentences, 2))
        self.unfinished = not _ENDED.search(text)
        self.borrowed = len(reply_substance & message_substance) // word
        self.added = len(reply_substance - message_substance) // word
        self.responds = self.empathises or any(language.responses.search(s.text.lower()) for s in valid)
        self.confuses_speakers = any(_confuses_speakers(s.text, last_message, knowledge, language) for s in sentences)

    def share_without(self, predicate: str) -> float:
        """The share of sentences, in [0, 1], for which the named property does not hold; 1 without sentences."""
        return sum(not getattr(s, predicate) for s in self.sentences) / len(self.sentences) if self.sentences else 1.0


def _confuses_speakers(text: str, last_message: str, knowledge: Knowledge, language: Language) -> bool:
    """Whether a sentence copies words of the user's last message that begin with "I" or "you" and name a topic."""
    words, message = _words(text, language), _words(last_message, language)
    pronouns = [(k, word) for k, word in enumerate(words) if language.is_first_or_second_person(word)]
    starts = [(k, j) for k, word in pronouns for j, other in enumerate(message) if other == word]
    for k, j in starts:
        run = [word for word, _ in takewhile(lambda pair: pair[0] == pair[1], zip(words[k:], message[j:], strict=False))]
        content = frozenset().union(*(language.content(word) for word in run))
        if len(run) >= _MIN_CONFUSION and len(content) >= 2 and content & knowledge.topic_stems:
            return True
    return False


def _stated_facts(sentence: Sentence, knowledge: Knowledge, language: Language) -> frozenset[str]:
    """The stems of the facts that a sentence states."""
    facts = (*knowledge.facts, *knowledge.goal_facts) if sentence.asks else knowledge.facts
    shared = (sentence.content & fact for fact in facts)
    return frozenset().union(*(stems for stems in shared if language.weight(stems) >= FACT_WEIGHT))


def _shares_referent(text: str, last_message: str, language: Language) -> bool:
    persons = language.third_persons(text) & language.third_persons(last_message)
    return bool(persons or language.possessions(text) & language.content(last_message))


def _mentions(content: frozenset[str], detail: Detail, just_raised: bool) -> bool:
    """Whether a detail is mentioned: by name in a sentence with more content, or by two words of its field; one suffices where the
    user has just raised it."""
    named, around = content & detail.words, content & (detail.words | detail.field)
    return (bool(named) and len(content - named) >= 3) or len(around) >= (1 if just_raised else 2)


def _is_truncated(word: str, context_words: Sequence[str], knowledge: Knowledge, language: Language) -> bool:
    """Whether it is the beginning of a word of the context ("stri" for stride) and no known word. `context_words` is sorted."""
    if language.han or language.is_common(word) or not word.isalpha():
        return False
    if len(word) < 2 or stem(word) in knowledge.vocabulary | language.thing_stems:
        return False
    following = islice(context_words, bisect_left(context_words, word), None)
    longer = list(takewhile(lambda other: other.startswith(word), following))
    if longer and longer[0] == word:
        return False
    endings = (other.removeprefix(word) for other in longer if stem(other) != stem(word))
    # "Hall" and "heat" are complete words beside "hallway" and "heater".
    return any(not language.is_common(ending) and ending not in _SUFFIXES for ending in endings)


def _near_duplicates(a: Sentence, b: Sentence, language: Language) -> bool:
    shared, both = a.content & b.content, a.content | b.content
    return language.tokens(a.text) == language.tokens(b.text) or 2 * len(shared) > len(both)


def _template(words: Sequence[str], language: Language) -> tuple[str, ...]:
    return tuple("_" if language.content(word) else word for word in words)


def _words(text: str, language: Language) -> tuple[str, ...]:
    return tuple(t for t in language.tokens(text) if t != ",")


@lru_cache(maxsize=8192)
def _runs(words: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    return frozenset(words[k : k + _RUN] for k in range(len(words) - _RUN + 1))


def _coverage(words: tuple[str, ...], sources: frozenset[tuple[str, ...]]) -> float:
    """The share of words, in [0, 1], that are part of a run of four words of the sources."""
    taken = [False] * len(words)
    for k in range(len(words) - _RUN + 1):
        if words[k : k + _RUN] in sources:
            taken[k : k + _RUN] = [True] * _RUN
    return sum(taken) / len(words) if words else 0.0


def _similarity(content: frozenset[str], words: tuple[str, ...], other: str, language: Language) -> float:
    """The similarity of a reply with another one, in [0, 1]: by content words or by runs of words, whichever is larger."""
    other_content = language.content(other)
    shared = len(content & other_content) / max(1, len(content | other_content))
    return max(shared, _coverage(words, _runs(_words(other, language))))
