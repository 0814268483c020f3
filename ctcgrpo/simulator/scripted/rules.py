"""The rules of the scripted user: each maps a reply to changes of anger and trust, with a reason in words.

A rule takes a ReplyContext and yields Findings. To add one, decorate a function with `@rule` or `@spoiler`, or call `_add_rule`.
Points are the changes before caps and the factor of a bad state (`backend.py`). Moves of the scene count only in a reply about
this user's topics. A malformed, copied or repeated reply gets no credit.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from ctcgrpo.simulator.scripted.knowledge import Detail, Knowledge
from ctcgrpo.simulator.scripted.reading import FACT_WEIGHT, Reading

_MENTION_FACTOR = 0.25  # scales moves in a reply that engages with no detail
_REPEAT_FACTOR = 0.75  # scales the credit of each repetition of a move
LONG, CURT = 90, 4  # in words: replies above LONG or below CURT are penalized
_MANY_BORROWED = 3  # content words of the user's last message in one reply
_MAX_ECHO = 0.5  # the share of a reply's words copied in runs; above it, the reply is an echo
_MAX_EMPTY = 3  # earlier empty replies that raise the penalty
MAX_SENTENCES = 5  # written replies to the bundled scenarios have two to four


@dataclass(frozen=True, slots=True)
class Finding:
    """A change of anger and trust in points, and its reason."""

    anger: float
    trust: float
    why: str

    @property
    def is_credit(self) -> bool:
        return self.anger < 0 or self.trust > 0


@dataclass(frozen=True, slots=True)
class ReplyContext:
    """A reply and the policy's earlier replies, oldest first. `round` counts replies from 1."""

    reading: Reading
    earlier: tuple[Reading, ...]
    knowledge: Knowledge
    round: int

    @property
    def states_new_fact(self) -> bool:
        """Whether it states a fact of the policy's persona that no earlier reply stated."""
        earlier = frozenset().union(*(r.stated_facts for r in self.earlier))
        return self.knowledge.language.weight(self.reading.stated_facts - earlier) >= FACT_WEIGHT

    @property
    def new_details(self) -> list[Detail]:
        """The engaged details that no earlier reply engaged with."""
        earlier = frozenset(d for r in self.earlier for d in r.engaged)
        return [d for d in self.reading.engaged if d not in earlier]


Rule = Callable[[ReplyContext], Iterator[Finding]]
RULES: list[Rule] = []
SPOILERS: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a rule."""
    RULES.append(function)
    return function


def spoiler(function: Rule) -> Rule:
    """Register a rule whose findings also remove all credit of the reply."""
    SPOILERS.append(function)
    return function


def _add_rule(registry: list[Rule], name: str, points: Callable[[ReplyContext], float], why: str) -> None:
    """Register a rule that raises anger and lowers trust by `points`; at 0 it yields nothing."""

    def rule_of_points(c: ReplyContext) -> Iterator[Finding]:
        if size := points(c):
            yield Finding(size, -size, why)

    rule_of_points.__name__ = name
    registry.append(rule_of_points)


def findings(context: ReplyContext) -> list[Finding]:
    """The findings of all rules, worst first."""
    spoiled = [f for rule in SPOILERS for f in rule(context)]
    others = [f for rule in RULES for f in rule(context) if not (spoiled and f.is_credit)]
    return sorted(spoiled + others, key=lambda f: f.trust - f.anger)


# --- spoilers -------------------------------------------------------------------------------------------------


@spoiler
def senseless(c: ReplyContext) -> Iterator[Finding]:
    malformed = c.reading.share_without("well_formed")
    if malformed > 0.5:
        yield Finding(5, -5, "I cannot make sense of it")
    elif malformed > 0.34 or sum(not s.well_formed for s in c.reading.sentences) > 1:
        yield Finding(3, -3, "broken sentences")


def _echoes(r: Reading) -> bool:
    # Reflective listening is no echo: most of the reply is new and it names a feeling.
    return r.echo > _MAX_ECHO or (r.share_without("original") >= 0.5 and not r.empathises)


_add_rule(SPOILERS, "echoing", lambda c: 4 * _echoes(c.reading), "gives me my own words back")


@spoiler
def rearranging(c: ReplyContext) -> Iterator[Finding]:
    """A sentence made of the user's last words in another order gets no credit. Trained policies exploited that: "The coat is
    buttoned to the chin, not to the door". A good reply takes up one or two words and adds content, or empathises. None of 840
    written replies borrows three words and twice as many as it adds."""
    r = c.reading
    if r.borrowed < 2 or r.borrowed <= r.added or r.empathises or r.echo > _MAX_ECHO:
        return
    # A question or response counts as one added word.
    if r.borrowed >= _MANY_BORROWED and r.borrowed >= 2 * (r.added + (r.responds or r.questions > 0)):
        yield Finding(2, -2, "turns my own words around")
    elif not r.responds and not r.engaged:
        # Two borrowed words may be reflective listening: no penalty, and no credit.
        yield Finding(0, 0, "says back to me what I said")


# "I forgot to cancel the debit", said to the user who forgot it.
_add_rule(SPOILERS, "mixing_up", lambda c: 3 * c.reading.confuses_speakers, "mixes up who did what")
_add_rule(SPOILERS, "repeating", lambda c: 4 * (c.reading.repetition > 0.6), "has said that before")
# The same template with other content words, however well they fit.
_formula = "the same sentence as before with other words in it"
_add_rule(SPOILERS, "formulaic", lambda c: 3 * any(c.reading.templates & r.templates for r in c.earlier), _formula)
_add_rule(SPOILERS, "stammering", lambda c: 4 * c.reading.has_duplicates, "says the same thing twice")
_unfinished = "breaks off in the middle of a sentence"
_add_rule(SPOILERS, "breaking_off", lambda c: 3 * (bool(c.reading.sentences) and c.reading.unfinished), _unfinished)


@spoiler
def rambling(c: ReplyContext) -> Iterator[Finding]:
    strange = c.reading.share_without("well_formed") <= 0.34 and c.reading.share_without("on_topic") > 0.5
    if strange and _is_empty(c.reading) and not _is_sincere(c, _is_empty):
        yield Finding(3, -3, "talks of things that have nothing to do with me")


# --- length and style ---------------------------------------------------------------------------------------------------


@rule
def long_winded(c: ReplyContext) -> Iterator[Finding]:
    if c.reading.length > LONG:
        excess = min(5.0, 1 + (c.reading.length - LONG) / 30)
        yield Finding(excess, -excess, "goes on and on")


_add_rule(
    RULES, "breathless", lambda c: max(0, min(5.0, len(c.reading.sentences) - MAX_SENTENCES)), "one sentence after the other"
)
_add_rule(RULES, "curt", lambda c: 2 * (c.reading.length < CURT), "hardly says a word")
_add_rule(RULES, "interrogating", lambda c: 1 * (c.reading.questions > 3), "questions me like a form")


def _faults(c: ReplyContext, spoils: bool) -> Iterator[Finding]:
    language = c.knowledge.language
    for fault in (*language.faults, *language.for_scene(language.scene_faults, c.knowledge.card.scene)):
        if fault.spoils == spoils and any(fault.matches(s.text.lower()) for s in c.reading.sentences):
            yield Finding(fault.anger, fault.trust, fault.why)


@rule
def manner(c: ReplyContext) -> Iterator[Finding]:
    yield from _faults(c, spoils=False)


@spoiler
def offence(c: ReplyContext) -> Iterator[Finding]:
    yield from _faults(c, spoils=True)


# --- substance: this user's topics -----------------------------------------------------------------------------------


@rule
def about_me(c: ReplyContext) -> Iterator[Finding]:
    for k, detail in enumerate(c.new_details[:3]):
        if detail == c.reading.raised:
            yield Finding(-3, 3, f"takes up {detail.about}, which I had just brought up")
        else:
            yield Finding(-2 if not k else -1, 2 if not k else 1, f"thinks of {detail.about}")
    if not c.new_details and c.reading.mentioned:
        yield Finding(0, 1, f"mentions {c.reading.mentioned[0].about}")


@rule
def about_anybody(c: ReplyContext) -> Iterator[Finding]:
    """Empty replies, which would fit any user. The first one gains a little if it empathises. A sincere one changes nothing. Any
    other one costs more with each empty reply before it."""
    if not _is_empty(c.reading):
        return
    if c.reading.empathises and not any(map(_is_empty, c.earlier)):
        yield Finding(0, 1, "says what it is like, as anybody might")
    elif _is_sincere(c, _is_empty):
        yield Finding(0, 0, "tells me something of its own" if c.states_new_fact else "goes along with what I speak of")
    else:
        weight = 1 + min(_MAX_EMPTY, sum(map(_is_empty, c.earlier)))
        yield Finding(weight, -weight, "could be said to anybody")


def _is_sincere(c: ReplyContext, is_poor: Callable[[Reading], bool]) -> bool:
    """Whether it states a new fact of the policy's own persona or shares a referent with the user, and at most one of the earlier
    replies, and at most half of them, are poor: own facts do not replace listening."""
    poor = sum(map(is_poor, c.earlier))
    return (c.states_new_fact or c.reading.shares_referent) and poor <= min(1, len(c.earlier) / 2)


def _is_empty(reading: Reading) -> bool:
    return not reading.mentioned and not reading.adds_information and not reading.answers


@rule
def listening(c: ReplyContext) -> Iterator[Finding]:
    """Credit for taking up the last message, which a prepared reply does only by chance. It is larger if the reply responds, since
    naming a word is weak evidence. Without engagement, each repetition gets less."""
    if c.reading.answers:
        worth = 1.0 if c.reading.engaged else _REPEAT_FACTOR ** sum(r.answers and not r.engaged for r in c.earlier)
        if c.reading.responds:
            yield Finding(-1.5 * worth, 1.5 * worth, "heard what I just said, and responds to it")
        else:
            yield Finding(-worth if c.reading.engaged else -worth / 2, worth, "heard what I just said")


@rule
def mere_mention(c: ReplyContext) -> Iterator[Finding]:
    """From the second time in a row, mentioning details without engaging or answering costs something."""
    if _merely_mentions(c.reading) and not _is_sincere(c, lambda r: _is_empty(r) or _merely_mentions(r)):
        since = takewhile(lambda r: not r.engaged and not r.answers, reversed(c.earlier))
        weight = min(2, sum(map(_merely_mentions, since)))
        if weight:
            yield Finding(weight, -weight, "names my things and says nothing about them")


def _merely_mentions(reading: Reading) -> bool:
    return bool(reading.mentioned) and not reading.engaged and not reading.answers


@rule
def moves(c: ReplyContext) -> Iterator[Finding]:
    """Credit for the moves of the scene in a reply that is not empty. Each repetition of a move gets less."""
    if _is_empty(c.reading):
        return
    used = Counter(move.name for r in c.earlier if not _is_empty(r) for move in r.moves)
    for move in c.reading.moves:
        worth = _REPEAT_FACTOR ** used[move.name] * (1 if c.reading.engaged else _MENTION_FACTOR)
        yield Finding(move.anger * worth, move.trust * worth, move.why)


# --- requirements of a scene -------------------------------------------------------------------------------------


def _first_time(c: ReplyContext, requirement: str) -> bool:
    return requirement in c.reading.requirements and not any(requirement in r.requirements for r in c.earlier)


@rule
def boundary(c: ReplyContext) -> Iterator[Finding]:
    if not c.knowledge.requirements.keys() & {"words", "offer"}:
        return
    if _first_time(c, "words"):
        yield Finding(0, 2, "says clearly where the line is")
    if _first_time(c, "offer"):
        yield Finding(-1, 1, "has something else to offer")
    if c.round >= 3 and not any("words" in r.requirements for r in (*c.earlier, c.reading)):
        yield Finding(0, -2, "will not say whether it is yes or no")


@rule
def amends(c: ReplyContext) -> Iterator[Finding]:
    if not c.knowledge.requirements.keys() & {"fault", "remedy"}:
        return
    if _first_time(c, "fault"):
        yield Finding(-2, 2, "calls what happened by its name")
    if _first_time(c, "remedy"):
        yield Finding(-1, 2, "names what would put it right")
    if c.round >= 2 and not any("fault" in r.requirements for r in (*c.earlier, c.reading)):
        yield Finding(1, -2, "still has not said what was done")
