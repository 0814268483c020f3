"""How a reply changes the scripted user: one small function a rule, each with its reason in words.

A rule takes what the user heard and returns Findings; a new one is a row (`_row`), or a few lines and a decorator. Points are
changes of anger and trust before the user's temper is applied (`backend.py`). Gains are conditional: manner counts only in a reply
about this user's own matters, and a broken, copied or repeated reply gains nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from ctcgrpo.simulator.scripted.knowledge import Detail, Knowledge
from ctcgrpo.simulator.scripted.reading import TELLING, Reading

_MERE_MENTION = 0.25  # what manner is worth in a reply that mentions this user's matters and brings in nothing of its own
_AGAIN = 0.75  # what the same good thing is worth each time again
LONG, CURT = 90, 4  # in words: replies above LONG tire, replies below CURT put off
_MANY_BORROWED = 3  # content words of the user's last line in one reply
_ECHO = 0.5  # A larger share of a reply in word-for-word runs from what was said is an echo
_MOST_OFTEN = 3  # so many empty replies before this one, and it cannot get worse
MANY = 5  # sentences that somebody who listens gets by with; written replies to these scenarios have two to four


@dataclass(frozen=True, slots=True)
class Finding:
    anger: float
    trust: float
    why: str

    @property
    def is_credit(self) -> bool:
        return self.anger < 0 or self.trust > 0


@dataclass(frozen=True, slots=True)
class Heard:
    """A reply in its place: what came before it (`earlier`, oldest first) decides what it is worth."""

    reading: Reading
    earlier: tuple[Reading, ...]
    knowledge: Knowledge
    round: int

    @property
    def tells(self) -> bool:
        """Whether it comes with something of its own persona that it has not told yet."""
        already = frozenset().union(*(r.tells for r in self.earlier))
        return self.knowledge.language.weight(self.reading.tells - already) >= TELLING

    @property
    def fresh(self) -> list[Detail]:
        """Details that no earlier reply engaged with."""
        known = frozenset(d for r in self.earlier for d in r.engaged)
        return [d for d in self.reading.engaged if d not in known]


Rule = Callable[[Heard], Iterator[Finding]]
RULES: list[Rule] = []
SPOILERS: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Adds to what the user makes of a reply."""
    RULES.append(function)
    return function


def spoiler(function: Rule) -> Rule:
    """A rule whose finding also takes away all credit that the reply would otherwise have."""
    SPOILERS.append(function)
    return function


def _row(registry: list[Rule], name: str, points: Callable[[Heard], float], why: str) -> None:
    """A rule that raises anger and lowers trust by so many points; it finds nothing where they are 0."""

    def found(h: Heard) -> Iterator[Finding]:
        if bad := points(h):
            yield Finding(bad, -bad, why)

    found.__name__ = name
    registry.append(found)


def findings(heard: Heard) -> list[Finding]:
    """Everything this user makes of a reply, worst first."""
    spoiled = [f for rule in SPOILERS for f in rule(heard)]
    others = [f for rule in RULES for f in rule(heard) if not (spoiled and f.is_credit)]
    return sorted(spoiled + others, key=lambda f: f.trust - f.anger)


# --- what spoils a reply -------------------------------------------------------------------------------------------------


@spoiler
def senseless(h: Heard) -> Iterator[Finding]:
    unsound = h.reading.share("sound")
    if unsound > 0.5:
        yield Finding(5, -5, "I cannot make sense of it")
    elif unsound > 0.34 or sum(not s.sound for s in h.reading.sentences) > 1:
        yield Finding(3, -3, "broken sentences")


def _echoes(r: Reading) -> bool:
    # To name what was said and then say what it is like is reflective listening, if the echo is the smaller part.
    return r.echo > _ECHO or (r.share("own") >= 0.5 and not r.feels)


_row(SPOILERS, "echoing", lambda h: 4 * _echoes(h.reading), "gives me my own words back")


@spoiler
def rearranging(h: Heard) -> Iterator[Finding]:
    """A sentence built of the user's last words says nothing, in whatever order: policies trained here lived on "The coat is
    buttoned to the chin, not to the door". Whoever listens names a thing or two and has something of their own to say about
    it, or says what it is like: of 840 written replies none borrows three words and twice what it adds."""
    r = h.reading
    if r.borrowed < 2 or r.borrowed <= r.added or r.feels or r.echo > _ECHO:
        return
    # A question adds what it asks.
    if r.borrowed >= _MANY_BORROWED and r.borrowed >= 2 * (r.added + (r.responds or r.questions > 0)):
        yield Finding(2, -2, "turns my own words around")
    elif not r.responds and not r.engaged:
        # To say two words back may be how somebody listens. It is not taken amiss, and does no good.
        yield Finding(0, 0, "says back to me what I said")


# Who keeps the user's "I" speaks as if they were the user: "I forgot to cancel the debit" to the one who forgot.
_row(SPOILERS, "mixing_up", lambda h: 3 * h.reading.mixes_up, "mixes up who did what")
_row(SPOILERS, "repeating", lambda h: 4 * (h.reading.repetition > 0.6), "has said that before")
# Filling other words into the sentence of before is a formula, however well each word fits.
_formula = "the same sentence as before with other words in it"
_row(SPOILERS, "formulaic", lambda h: 3 * any(h.reading.frames & r.frames for r in h.earlier), _formula)
_row(SPOILERS, "stammering", lambda h: 4 * h.reading.twice, "says the same thing twice")
_unfinished = "breaks off in the middle of a sentence"
_row(SPOILERS, "breaking_off", lambda h: 3 * (bool(h.reading.sentences) and h.reading.breaks_off), _unfinished)


@spoiler
def rambling(h: Heard) -> Iterator[Finding]:
    strange = h.reading.share("sound") <= 0.34 and h.reading.share("sensible") > 0.5
    if strange and _is_empty(h.reading) and not _is_sincere(h, _is_empty):
        yield Finding(3, -3, "talks of things that have nothing to do with me")


# --- length and manner ---------------------------------------------------------------------------------------------------


@rule
def long_winded(h: Heard) -> Iterator[Finding]:
    if h.reading.length > LONG:
        excess = min(5.0, 1 + (h.reading.length - LONG) / 30)
        yield Finding(excess, -excess, "goes on and on")


_row(RULES, "breathless", lambda h: max(0, min(5.0, len(h.reading.sentences) - MANY)), "one sentence after the other")
_row(RULES, "curt", lambda h: 2 * (h.reading.length < CURT), "hardly says a word")
_row(RULES, "interrogating", lambda h: 1 * (h.reading.questions > 3), "questions me like a form")


def _faults(h: Heard, spoils: bool) -> Iterator[Finding]:
    language = h.knowledge.language
    for fault in (*language.faults, *language.of_scene(language.scene_faults, h.knowledge.card.scene)):
        if fault.spoils == spoils and any(fault.matches(s.text.lower()) for s in h.reading.sentences):
            yield Finding(fault.anger, fault.trust, fault.why)


@rule
def manner(h: Heard) -> Iterator[Finding]:
    yield from _faults(h, spoils=False)


@spoiler
def offence(h: Heard) -> Iterator[Finding]:
    yield from _faults(h, spoils=True)


# --- substance: this user's own matters -----------------------------------------------------------------------------------


@rule
def about_me(h: Heard) -> Iterator[Finding]:
    for k, detail in enumerate(h.fresh[:3]):
        if detail == h.reading.raised:
            yield Finding(-3, 3, f"takes up {detail.about}, which I had just brought up")
        else:
            yield Finding(-2 if not k else -1, 2 if not k else 1, f"thinks of {detail.about}")
    if not h.fresh and h.reading.touched:
        yield Finding(0, 1, f"mentions {h.reading.touched[0].about}")


@rule
def about_anybody(h: Heard) -> Iterator[Finding]:
    """To say once what it is like is kind. Who hears nothing about themselves feels talked past, more each time. What comes from
    the speaker's own life could not be said by anybody: it does neither good nor harm."""
    if not _is_empty(h.reading):
        return
    if h.reading.feels and not any(map(_is_empty, h.earlier)):
        yield Finding(0, 1, "says what it is like, as anybody might")
    elif _is_sincere(h, _is_empty):
        yield Finding(0, 0, "tells me something of its own" if h.tells else "goes along with what I speak of")
    else:
        weight = 1 + min(_MOST_OFTEN, sum(map(_is_empty, h.earlier)))
        yield Finding(weight, -weight, "could be said to anybody")


def _is_sincere(h: Heard, talks_past: Callable[[Reading], bool]) -> bool:
    """Whether it tells something of its own, or goes along with what the user speaks of, and did not talk past the user more than
    once, or more often than not: one's own life is welcome from somebody who listens, and no substitute for listening."""
    talked_past = sum(map(talks_past, h.earlier))
    return (h.tells or h.reading.follows) and talked_past <= min(1, len(h.earlier) / 2)


def _is_empty(reading: Reading) -> bool:
    return not reading.touched and not reading.brings and not reading.answers


@rule
def listening(h: Heard) -> Iterator[Finding]:
    """Taking up what was said last does good by itself, little as it may add: a reply made beforehand does it by luck alone. It
    does more where it responds: to name a word is no proof of listening, to say what it is like or to ask on is. Done again,
    with nothing of one's own, it is worth less each time."""
    if h.reading.answers:
        worth = 1.0 if h.reading.engaged else _AGAIN ** sum(r.answers and not r.engaged for r in h.earlier)
        if h.reading.responds:
            yield Finding(-1.5 * worth, 1.5 * worth, "heard what I just said, and responds to it")
        else:
            yield Finding(-worth if h.reading.engaged else -worth / 2, worth, "heard what I just said")


@rule
def mere_mention(h: Heard) -> Iterator[Finding]:
    """Coming back to this user's things is a beginning; from the second time on, with no listening in between, it has to come with
    something of one's own."""
    if _merely_mentions(h.reading) and not _is_sincere(h, lambda r: _is_empty(r) or _merely_mentions(r)):
        since = takewhile(lambda r: not r.engaged and not r.answers, reversed(h.earlier))
        weight = min(2, sum(map(_merely_mentions, since)))
        if weight:
            yield Finding(weight, -weight, "names my things and says nothing about them")


def _merely_mentions(reading: Reading) -> bool:
    return bool(reading.touched) and not reading.engaged and not reading.answers


@rule
def moves(h: Heard) -> Iterator[Finding]:
    """What the scene asks for, in a reply that is about this user; the same move again is worth less each time."""
    if _is_empty(h.reading):
        return
    used = Counter(move.name for r in h.earlier if not _is_empty(r) for move in r.moves)
    for move in h.reading.moves:
        worth = _AGAIN ** used[move.name] * (1 if h.reading.engaged else _MERE_MENTION)
        yield Finding(move.anger * worth, move.trust * worth, move.why)


# --- what a scene asks for by name -------------------------------------------------------------------------------------


def _first_time(h: Heard, must: str) -> bool:
    return must in h.reading.musts and not any(must in r.musts for r in h.earlier)


@rule
def boundary(h: Heard) -> Iterator[Finding]:
    if not h.knowledge.musts.keys() & {"words", "offer"}:
        return
    if _first_time(h, "words"):
        yield Finding(0, 2, "says clearly where the line is")
    if _first_time(h, "offer"):
        yield Finding(-1, 1, "has something else to offer")
    if h.round >= 3 and not any("words" in r.musts for r in (*h.earlier, h.reading)):
        yield Finding(0, -2, "will not say whether it is yes or no")


@rule
def amends(h: Heard) -> Iterator[Finding]:
    if not h.knowledge.musts.keys() & {"fault", "remedy"}:
        return
    if _first_time(h, "fault"):
        yield Finding(-2, 2, "calls what happened by its name")
    if _first_time(h, "remedy"):
        yield Finding(-1, 2, "names what would put it right")
    if h.round >= 2 and not any("fault" in r.musts for r in (*h.earlier, h.reading)):
        yield Finding(1, -2, "still has not said what was done")
