"""Whether an English sentence hangs together: a coarse part-of-speech check, enough to tell talk from word salad.

Every word has a set of possible tags; a sentence is sound when tags can be chosen so that no two neighbours are a pair
that English does not allow ("the of", "to the." with nothing after it), it has a verb, and function words and content
words alternate as they do in talk. It does not parse, and it lets odd but grammatical sentences pass; two sentences run
into one are looked for by themselves (`is_spliced`). Tags: see grammar.yaml.
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
_LONGEST_CONTENT_RUN = 5
_LONGEST_FRAGMENT = 9
_SHORT = 4  # in words: up to here any words that can stand side by side may be a sentence ("Good evening, Mr Danciu")
_LEAST_FUNCTION = 0.2  # the least share of function words: one in five, as in "My cellar fridge stands empty"
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


def is_sound(tokens: Sequence[str], lexicon: Mapping[str, str]) -> bool:
    """`tokens`: lower-case words (contractions split: it 's) and commas, without the final mark; `lexicon`: word -> tags."""
    words = [t for t in tokens if t != ","]
    if not words:
        return False
    if len(words) <= _SHORT:
        return _agrees(tokens, lexicon)
    tags = [_tags_of(word, lexicon) for word in words]
    function = [bool(_FUNCTION_TAGS & set(t)) for t in tags]
    if sum(function) < _LEAST_FUNCTION * len(words):
        return False
    longest = max((len(list(run)) for is_function, run in groupby(function) if not is_function), default=0)
    repeated = any(a == b and a not in ("very", "that", "had", "really", "so", ",") for a, b in pairwise(tokens))
    verbal = len(words) <= _LONGEST_FRAGMENT or any(
        set("XMV") & set(lexicon.get(word, "V" if word.endswith(("ed", "s")) else "")) for word in words
    )
    return longest <= _LONGEST_CONTENT_RUN and not repeated and verbal and _agrees(tokens, lexicon)


def _agrees(tokens: Sequence[str], lexicon: Mapping[str, str]) -> bool:
    """Whether some choice of tags runs through the sentence without a forbidden pair."""
    reachable = frozenset("^")
    for token in tokens:
        reachable = _next_tags(reachable, "," if token == "," else _tags_of(token, lexicon))
        if not reachable:
            return False
    return bool(_next_tags(reachable, "."))


@lru_cache(maxsize=65536)
def _next_tags(reachable: frozenset[str], options: str) -> frozenset[str]:
    """Those of a word's possible tags, by `_BY_PLACE` too, that can stand after some of the tags of the word before."""
    by_place = {tag for of, behind, tag in _BY_PLACE if of in options and reachable & set(behind)}
    return frozenset(
        by_place | {tag for tag in options if any(tag not in _CANNOT_FOLLOW.get(before, "") for before in reachable)}
    )


def is_spliced(tokens: Sequence[str], lexicon: Mapping[str, str], takes_clause: Set[str], takes_two: Set[str]) -> bool:
    """Whether a second sentence begins in the middle of a first one, with nothing between them.

    `tokens`: as for `is_sound`, of a stretch without colons, dashes and the like; `takes_clause`: words that a clause may follow
    with no word between (I think, the day); `takes_two`: verbs with two objects. Told by two signs, each rare in good English: a
    noun, a subject and its verb, as in "the coat you wore", but the verb has an object of its own ("the cold I can see
    why"); or an object and a subject side by side ("to help you I will"). One that does not get beyond its "that" counts too.
    """
    if len(tokens) > 3 and tokens[-1] == "that" and _is_noun(tokens, len(tokens) - 2, lexicon):
        return not takes_two & set(tokens)
    # "After the storm you took the ladder" is as it should be.
    if not tokens or _OPENS_CLAUSE & set(_tags_of(tokens[0], lexicon)):
        return False
    has_pause = tokens[0] == ","
    for k in range(2, len(tokens)):
        before, after = tokens[k - 1], _verb_group(tokens, k, lexicon)
        if lexicon.get(before) == "C" and before not in ("and", "or", "nor"):  # it opens a subordinate clause
            return False
        has_pause = has_pause or before == ","
        if not after or before in takes_clause:
            continue
        side_by_side = before in _OBJECTS and tokens[k] in _ONLY_SUBJECTS
        if side_by_side and not takes_clause & set(tokens[max(0, k - 3) : k]) and not _is_put_first(tokens, k - 2, lexicon):
            return True
        # So is "told the vicar I had no time".
        if has_pause or (takes_clause | takes_two) & set(tokens[max(0, k - 4) : k - 2]):
            continue
        if _is_noun(tokens, k - 1, lexicon) and tokens[after - 1] not in takes_two and after < len(tokens):
            follows = set(_tags_of(tokens[after], lexicon))
            if follows <= set("DO") or (follows <= set("WR") and "W" in follows):
                return True
    return False


def _is_put_first(tokens: Sequence[str], at: int, lexicon: Mapping[str, str]) -> bool:
    """Whether a clause opens there with a preposition: "You did, and without them I would have drowned"."""
    return "I" in _tags_of(tokens[at], lexicon) and (at == 0 or tokens[at - 1] == "," or "C" in _tags_of(tokens[at - 1], lexicon))


def _is_noun(tokens: Sequence[str], at: int, lexicon: Mapping[str, str]) -> bool:
    """Whether a word with an article or the like before it stands there, so that it can be nothing else."""
    before = set(lexicon.get(tokens[at - 1], "")) if at else set()
    return "D" in before and before <= set("DUON") and not _FUNCTION_TAGS & set(_tags_of(tokens[at], lexicon))


def _verb_group(tokens: Sequence[str], k: int, lexicon: Mapping[str, str]) -> int:
    """Where the verb of a clause that begins with the subject at `k` ends, or 0 where none begins there."""

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
