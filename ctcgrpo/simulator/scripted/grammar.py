"""Whether an English sentence hangs together: a coarse part-of-speech check, enough to tell talk from word salad.

Every word has a set of possible tags; a sentence is sound when tags can be chosen so that no two neighbours are a pair
that English does not allow ("the of", "to the." with nothing after it), it has a verb, and function words and content
words alternate as they do in talk. It does not parse, and it lets odd but grammatical sentences pass.

Tags: D determiner, P subject pronoun, O object pronoun, X auxiliary, M modal, Z "n't", V verb, G -ing form, N noun, J adjective,
R adverb, I preposition, T "to", C conjunction, W question word, U interjection, "." the end, "," a pause, "^" the beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

# For each tag, the tags that cannot follow it.
_CANNOT_FOLLOW: dict[str, str] = {
    "^": "OZ,",
    "D": "DPOXMZVICTWU.,",
    "P": "DPOJTWUNGIZ",
    "O": "OXMZ",
    "X": "XM",
    "M": "XMI",
    "Z": "XMZ",
    "V": "MZ",
    "G": "MZ",
    "N": "Z",
    "J": "DOXMZ",
    "R": "Z",
    "I": "PXMZVCIU.,",
    "T": "PXMZTICU",
    "C": "Z.",
    "W": "OZ",
    "U": "Z",
    ",": "Z.,",
}
_FUNCTION_TAGS = frozenset("DPOXMZITCW")
_LONGEST_CONTENT_RUN = 4
_LONGEST_FRAGMENT = 7


def _tags_of(word: str, lexicon: Mapping[str, str]) -> str:
    known = lexicon.get(word)
    if known:
        return known
    if word.isdigit():
        return "NJ"
    if word.endswith("ly"):
        return "RJ"
    if word.endswith("ing"):
        return "GNJV"
    if word.endswith("ed"):
        return "VJ"
    if word.endswith("s"):
        return "NV"
    return "NJV"


def is_sound(tokens: Sequence[str], lexicon: Mapping[str, str]) -> bool:
    """`tokens`: lower-case words (contractions split: it 's) and commas, without the final mark; `lexicon`: word -> tags."""
    words = [t for t in tokens if t != ","]
    if not words:
        return False
    if len(words) <= 3:
        return _agrees(tokens, lexicon)
    tags = [_tags_of(word, lexicon) for word in words]
    function = [bool(_FUNCTION_TAGS & set(t)) for t in tags]
    if sum(function) < 0.25 * len(words):
        return False
    run = longest = 0
    for is_function in function:
        run = 0 if is_function else run + 1
        longest = max(longest, run)
    repeated = any(a == b and a not in ("very", "that", "had", "really", "so") for a, b in pairwise(words))
    return longest <= _LONGEST_CONTENT_RUN and not repeated and _verbal(words, lexicon) and _agrees(tokens, lexicon)


def _verbal(words: Sequence[str], lexicon: Mapping[str, str]) -> bool:
    """Whether it has a verb, or is short enough to do without."""
    return len(words) <= _LONGEST_FRAGMENT or any(
        set("XV") & set(lexicon.get(word, "V" if word.endswith(("ed", "s")) else "")) for word in words
    )


def _agrees(tokens: Sequence[str], lexicon: Mapping[str, str]) -> bool:
    """Whether some choice of tags runs through the sentence without a forbidden pair."""
    reachable = {"^"}
    for token in tokens:
        options = "," if token == "," else _tags_of(token, lexicon)
        reachable = {tag for tag in options if any(tag not in _CANNOT_FOLLOW.get(before, "") for before in reachable)}
        if not reachable:
            return False
    return any("." not in _CANNOT_FOLLOW.get(tag, "") for tag in reachable)
