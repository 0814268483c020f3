"""Replies built of the user's own last words do not pay, and short sincere ones still do.

tests/data/replies/gamed.json holds, by kind, replies that policies trained against an earlier version of the rules gave, and
more of the same kinds; short.json, sincere replies of a sentence or two. tests/sincere.py plays both.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from functools import cache
from statistics import mean

import pytest

from ctcgrpo.environments.eibench.records import SCENES, Scenario
from ctcgrpo.simulator.protocol import Utterance
from ctcgrpo.simulator.scripted.language import load_language
from tests.dialogue import ROUNDS, Speaker, converse
from tests.sincere import DATA, Said, good_replies, is_taken_badly, progress, reaction, scenarios

SHORT: dict[str, list[Said]] = json.loads((DATA / "short.json").read_text(encoding="utf-8"))
GAMED: dict[str, dict[str, list[Said]]] = json.loads((DATA / "gamed.json").read_text(encoding="utf-8"))
KINDS = [(kind, language) for kind, of_language in GAMED.items() for language in of_language]
LANGUAGES = ["english", "chinese"]


@cache
def short(language: str) -> float:
    return mean(progress(reaction(language, said)) for said in SHORT[language])


def how(scenario: str, turn: int, reply: str, language: str = "english") -> tuple[float, str]:
    taken = reaction(language, {"scenario": scenario, "turn": turn, "reply": reply})
    return progress(taken), taken.why


@pytest.mark.parametrize(("kind", "language"), KINDS)
def test_the_users_words_in_another_order_cost(kind: str, language: str) -> None:
    points = [progress(reaction(language, said)) for said in GAMED[kind][language]]
    assert mean(points) < -1.5 and mean(points) < short(language) - 2.5, points
    assert sum(p > 0 for p in points) <= len(points) / 7, points


@pytest.mark.parametrize(("language", "least"), [("english", 1.0), ("chinese", 0.3)])
def test_short_sincere_replies_are_well_taken(language: str, least: float) -> None:
    assert short(language) > least


@pytest.mark.parametrize("language", LANGUAGES)
def test_sincere_replies_are_hardly_ever_taken_for_the_users_words(language: str) -> None:
    spoken = [*SHORT[language], *json.loads((DATA / "sincere.json").read_text(encoding="utf-8"))[language]]
    spoken += [Said(scenario=n, turn=k, reply=r) for n, good in good_replies(language).items() for k, r in enumerate(good[:5])]
    blamed = [said for said in spoken if re.search("turns my own words|mixes up", reaction(language, said).why)]
    assert len(spoken) > 200 and len(blamed) <= len(spoken) / 200, blamed


COPIED = [
    "How many {a} does the {b} of the {c} have?",
    "The {a} is for the {b}, not for the {c}.",
    "You want the {a} and the {b} at your {c}.",
    "The {c} was the {a} before the {b}, right?",
    "Your {b} has a {c} on it, so the {a} is the {d}.",
    "If it is a {a}, then the {d} is a {c}.",
    "It was {d}, not {b}, and the {a} too.",
    "So where is the {c} on the {a} of the {d}?",
]
COPIED_CHINESE = [
    "{a}的{b}不是{c}，是{d}。",
    "{c}在{a}那里，{b}也在。",
    "你有几个{b}的{a}{c}？",
    "{d}和{c}都给{a}了，{b}没有。",
    "原来{b}{a}，就是{d}{c}。",
    "是{a}让{d}去{b}的{c}吗？",
    "{b}到{c}的时候，{a}还是{d}。",
    "所以{c}会{d}，{a}不会{b}。",
]


def copied(scenario: Scenario) -> list[Speaker]:
    """Eight sentences, filled with words of the user's last line alone."""
    language, rng, turn = load_language(scenario.language), random.Random(scenario.id), [0]

    def words(text: str) -> list[str]:
        if language.han:
            runs = re.findall("[^" + "".join(language.lexicon) + "\\W]{2,}", text)
            return [run[k : k + 2] for run in runs for k in range(0, len(run) - 1, 2)]
        return [t for t in language.tokens(text) if t.isalpha() and len(t) > 3 and language.substance(t)]

    def speak(history: list[Utterance]) -> str:
        heard = [u.text for u in history if u.speaker == "user"] or [scenario.policy_persona]
        found = sorted(set(words(heard[-1])))
        chosen = rng.sample(found, 4) if len(found) >= 4 else (found or words(scenario.policy_persona)) * 4
        frames = COPIED_CHINESE if language.han else COPIED
        turn[0] += 1
        return frames[turn[0] % len(frames)].format(a=chosen[0], b=chosen[1], c=chosen[2], d=chosen[3])

    return [speak] * ROUNDS


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_of_copied_words_score_badly(language: str) -> None:
    for scene in SCENES:
        here = [s for s in scenarios(language).values() if s.scene == scene]
        score = mean(converse(s, copied(s))[0] for s in here)
        assert score < -0.6, (scene, score)


def test_plain_listening_is_worth_more_than_a_question_of_copied_words() -> None:
    plain = "That sounds exhausting. What happened next?"
    apart = []
    for scenario in (s for s in scenarios("english").values() if s.opening_line):
        copying: Sequence[str | Speaker] = copied(scenario)[:1]
        (listened,), (copies,) = (converse(scenario, said)[1] for said in ([plain], copying))
        apart.append((listened[1] - listened[0] - copies[1] + copies[0]) / 2)
    assert mean(apart) > 2 and mean(a > 0 for a in apart) > 0.9


def test_to_say_once_what_it_is_like_is_kind_and_again_it_wears() -> None:
    scenario = scenarios("english")["support-test-02"]
    said = ["I'm sorry, that must have been awful.", "It sounds so lonely.", "No wonder you were scared."]
    _, turns = converse(scenario, said)
    assert turns[0][0] <= 0 < turns[0][1] and "as anybody might" in turns[0][2]
    assert all(anger > 0 > trust and "could be said to anybody" in why for anger, trust, why, _ in turns[1:])


@pytest.mark.parametrize(
    ("said", "better"),
    [
        ("Your cab and the engine, nineteen months.", "Nights in that cab, that must be so lonely."),
        ("The cab is out the front of the finance.", "Who sees you out there in the cab?"),
        ("The cab is off at night.", "I'll come down and sit in the cab with you."),
    ],
)
def test_who_responds_to_what_was_said_earns_more_than_who_repeats_it(said: str, better: str) -> None:
    assert how("support-test-02", 1, said)[0] <= 0 < 2 <= how("support-test-02", 1, better)[0]


def test_who_keeps_the_users_i_mixes_up_who_did_what() -> None:
    points, why = how("repair-train-04", 1, "I open my locker on Monday and see the alphabet.")
    assert points < -2 and "mixes up who did what" in why
    for reply in (
        "You open your locker, and there's an alphabet? I'm sorry.",
        "I told them, and they put that in your locker.",
    ):
        points, why = how("repair-train-04", 1, reply)
        assert points > 0 and "mixes up" not in why


def test_what_somebody_is_called_is_no_word_of_theirs() -> None:
    named, unnamed = (
        reaction("english", {"scenario": "repair-test-04", "turn": 0, "reply": reply})
        for reply in ("How can you tell, Frau Huber?", "How can you tell?")
    )
    assert progress(named) == progress(unnamed) and is_taken_badly(named)
