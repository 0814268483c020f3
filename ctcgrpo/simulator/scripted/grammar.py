"""Whether an English sentence is well formed: a coarse part-of-speech check, which separates speech from word salad.

Every word has a set of possible tags. A sentence is well formed if it has a verb, if function words and content words alternate as
in speech, and if some choice of tags has no pair of neighbours that English forbids ("the of", or "to the" at the end). This is no
parser: odd but grammatical sentences pass. `is_run_on` finds two sentences joined without a mark. Tags: see grammar.yaml.
"""

from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from importlib.resources import files
from itertools import groupby, pairwise

from ctcgrpo.util.strict_yaml import load_yaml

_RULES = load_yaml((files("ctcgrpo.simulator.scripted") / "grammar.yaml").read_text(encoding="utf-8"))
_CANNOT_FOLLOW: dict[str, str] = _RULES["cannot_follow"]
_BY_PLACE: list[tuple[str, str, str]] = _RULES["by_place"]
_FUNCTION_TAGS = frozenset("DPOXMZITCW")
_MAX_CONTENT_RUN = 5
_MAX_FRAGMENT = 9
_MAX_SHORT = 4  # in words: a sentence of up to so many words needs allowed pairs only ("Good evening, Mr Danciu")
_MIN_FUNCTION_SHARE = 0.2  # one in five, as in "My cellar fridge stands empty"
_SUBJECTS = frozenset(["i", "he", "she", "we", "they", "you", "it"])
_ONLY_SUBJECTS = _SUBJECTS - {"you", "it"}
_OBJECTS = frozenset(["me", "him", "her", "us", "them", "you"])
_OPENS_CLAUSE = frozenset("IWC")


def _tags_of(word: str, lexicon: Mapping[str, str]) -> str:
    if known := lexicon.get(word):
        return known
    if word.isdigit():
        return "NJ"
    if word.endswith("ed"):
        return "VJ" if len(word) > 5 else "VJN"
    return next((tags for ending, tags in (("ly", "RJ"), ("ing", "GNJV"), ("s", "NV")) if word.endswith(ending)), "NJV")


def is_well_formed(tokens: Sequence[str], lexicon: Mapping[str, str]) -> bool:
    """`tokens`: lower-case words (contractions split: it 's) and commas, without the final mark; `lexicon`: word -> tags."""
    words = [t for t in tokens if t != ","]
    if not words:
        return False
    if len(words) <= _MAX_SHORT:
        return _has_tagging(tokens, lexicon)
    tags = [_tags_of(word, lexicon) for word in words]
    function = [bool(_FUNCTION_TAGS & set(t)) for t in tags]
    if sum(function) < _MIN_FUNCTION_SHARE * len(words):
        return False
    longest = max((len(list(run)) for is_function, run in groupby(function) if not is_function), default=0)
    repeated = any(a == b and a not in ("very", "that", "had", "really", "so", ",") for a, b in pairwise(tokens))
    verbal = len(words) <= _MAX_FRAGMENT or any(
        set("XMV") & set(lexicon.get(word, "V" if word.endswith(("ed", "s")) else "")) for word in words
    )
    return longest <= _MAX_CONTENT_RUN and not repeated and verbal and _has_tagging(tokens, lexicon)


def _has_tagging(tokens: Sequence[str], lexicon: Mapping[str, str]) -> bool:
    """Whether some choice of tags has no forbidden pair."""
    reachable = frozenset("^")
    for token in tokens:
        reachable = _next_tags(reachable, "," if token == "," else _tags_of(token, lexicon))
        if not reachable:
            return False
    return bool(_next_tags(reachable, "."))


@lru_cache(maxsize=65536)
def _next_tags(reachable: frozenset[str], options: str) -> frozenset[str]:
    """A word's possible tags (also those of `_BY_PLACE`) that may follow a reachable tag of the word before."""
    by_place = {tag for of, behind, tag in _BY_PLACE if of in options and reachable & set(behind)}
    return frozenset(
        by_place | {tag for tag in options if any(tag not in _CANNOT_FOLLOW.get(before, "") for before in reachable)}
    )


def is_run_on(tokens: Sequence[str], lexicon: Mapping[str, str], takes_clause: Set[str], takes_two: Set[str]) -> bool:
    """Whether it is a run-on sentence: a second sentence begins in the middle of the first one, without a mark or conjunction.

    `tokens`: as for `is_well_formed`, of a part without colons or dashes; `takes_clause`: words that a clause may follow directly
    (I think, the day); `takes_two`: verbs with two objects. Either of two patterns counts, both rare in correct English:

    - a noun, a subject and its verb, as in "the coat you wore", where the verb has its own object ("the cold I can see why");
    - an object and a subject side by side ("to help you I will").

    A sentence that ends after "that" counts too.
    """
    if len(tokens) > 3 and tokens[-1] == "that" and _is_noun(tokens, len(tokens) - 2, lexicon):
        return not takes_two & set(tokens)
    # "After the storm you took the ladder" is correct.
    if not tokens or _OPENS_CLAUSE & set(_tags_of(tokens[0], lexicon)):
        return False
    has_comma = tokens[0] == ","
    for k in range(2, len(tokens)):
        before, after = tokens[k - 1], _verb_group(tokens, k, lexicon)
        if lexicon.get(before) == "C" and before not in ("and", "or", "nor"):  # a subordinate clause
            return False
        has_comma = has_comma or before == ","
        if not after or before in takes_clause:
            continue
        side_by_side = before in _OBJECTS and tokens[k] in _ONLY_SUBJECTS
        if side_by_side and not takes_clause & set(tokens[max(0, k - 3) : k]) and not _is_fronted(tokens, k - 2, lexicon):
            return True
        # "Told the vicar I had no time" is correct.
        if has_comma or (takes_clause | takes_two) & set(tokens[max(0, k - 4) : k - 2]):
            continue
        if _is_noun(tokens, k - 1, lexicon) and tokens[after - 1] not in takes_two and after < len(tokens):
            follows = set(_tags_of(tokens[after], lexicon))
            if follows <= set("DO") or (follows <= set("WR") and "W" in follows):
                return True
    return False


def _is_fronted(tokens: Sequence[str], at: int, lexicon: Mapping[str, str]) -> bool:
    """Whether a clause begins with a preposition at `at`: "You did, and without them I would have drowned"."""
    return "I" in _tags_of(tokens[at], lexicon) and (at == 0 or tokens[at - 1] == "," or "C" in _tags_of(tokens[at - 1], lexicon))


def _is_noun(tokens: Sequence[str], at: int, lexicon: Mapping[str, str]) -> bool:
    """Whether the word at `at` is a noun because a determiner precedes it."""
    before = set(lexicon.get(tokens[at - 1], "")) if at else set()
    return "D" in before and before <= set("DUON") and not _FUNCTION_TAGS & set(_tags_of(tokens[at], lexicon))


def _verb_group(tokens: Sequence[str], k: int, lexicon: Mapping[str, str]) -> int:
    """The end of the verb of a clause whose subject is at `k`; 0 if no clause begins there."""

    def tags(at: int) -> set[str]:
        return set(_tags_of(tokens[at], lexicon)) if at < len(tokens) else set()

    if tokens[k] not in _SUBJECTS:
        return 0
    at = k + 1
    while "R" in tags(at) and not set("XMV") & tags(at):
        at += 1
    if not set("XMV") & tags(at):
        return 0
    while set("XMZ") & tags(at) or tags(at) == {"R"}:
        at += 1
    return at + 1 if "V" in tags(at) and "D" not in tags(at) else at
