"""The scripted user in Chinese: good replies do it good, and what anybody could say, or nobody, does not.

The replies in tests/data/replies/chinese were written with these scenarios, without knowledge of the rules; laid out as the English
ones.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from statistics import mean

import pytest

from ctcgrpo.environments.eibench.records import SCENES, Scenario
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.simulator.protocol import Utterance
from ctcgrpo.simulator.scripted.language import load_language
from tests.conftest import ROOT
from tests.dialogue import Speaker, converse

SCENARIOS = {s.id: s for split in ("train", "test") for s in load_scenarios(f"chinese/{split}", split)}
REPLIES = {k: v for s in SCENES for k, v in json.loads((ROOT / f"tests/data/replies/chinese/{s}.json").read_text()).items()}
LANGUAGE = load_language("zh")
NONSENSE = (
    "我觉得{a}就像{b}一样在早上唱歌。你的{b}真是一条黄色的路。",
    "{a}和{b}是厨房里的两个小朋友，它们喜欢喝水。",
    "你的{a}一定是{b}，所以我要把它涂成绿色送给火车。",
)


@cache
def good(name: str) -> float:
    return converse(SCENARIOS[name], REPLIES[name]["good"])[0]


def by_scene(replies: Callable[[Scenario], Sequence[str | Speaker]]) -> dict[str, float]:
    return {scene: mean(converse(s, replies(s))[0] for s in SCENARIOS.values() if s.scene == scene) for scene in SCENES}


def said(history: list[Utterance]) -> str:
    return next((u.text for u in reversed(history) if u.speaker == "user"), "今天天气不错。")


def nonsense(seed: int) -> Speaker:
    rng = random.Random(seed)

    def speak(history: list[Utterance]) -> str:
        pairs = [run[k : k + 2] for run in re.findall(r"[\u4e00-\u9fff]{2,}", said(history)) for k in range(len(run) - 1)]
        a, b = rng.sample(pairs, 2)
        return rng.choice(NONSENSE).format(a=a, b=b)

    return speak


def mixed(text: str, rng: random.Random) -> str:
    sentences = []
    for sentence in LANGUAGE.sentences(text):
        letters = re.findall(r"[\u4e00-\u9fff]", sentence)
        rng.shuffle(letters)
        sentences.append("".join(letters) + "。")
    return "".join(sentences)


def test_good_replies_score_well() -> None:
    assert all(good(name) > 0.1 for name in SCENARIOS)
    assert all(score > 0.3 for score in by_scene(lambda s: REPLIES[s.id]["good"]).values())


@pytest.mark.parametrize(
    ("what", "replies", "limit"),
    [
        ("could be said to anybody", lambda s: REPLIES[s.id]["mediocre"] * 2, -0.6),
        ("hurts", lambda s: REPLIES[s.id]["bad"] * 2, -0.6),
        ("the user's own line", lambda s: [said] * 6, -0.6),
        ("nonsense around the user's words", lambda s: [nonsense(7)] * 6, -0.6),
        ("characters without order", lambda s: [mixed(r, random.Random(3)) for r in REPLIES[s.id]["good"]], -0.4),
        ("one good reply again and again", lambda s: REPLIES[s.id]["good"][:1] * 6, -0.6),
        ("keywords", lambda s: ["，".join([*d["words"][:3], *d["sense"][:3]]) + "。" for d in s.script["details"]], -0.6),
        ("good replies to somebody else", lambda s: REPLIES[_other(s)]["good"], -0.2),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_listen_scores_badly(what: str, replies: Callable[[Scenario], list[str | Speaker]], limit: float) -> None:
    scores = by_scene(replies)
    assert all(score < limit for score in scores.values()), (what, scores)


EVERYDAY = """
你还好么。 是么，那就好。 咱俩不是说好了么。 饿了么的外卖到了。 高一的时候我们就认识了。 大一我就认识你了。
五一我陪你回老家。 其一我不该那样说。 他是百里挑一的人。 始终如一的朋友。 他为人很和善。 这的确是我的错。
我们这的冬天很冷。 也的确如此。 那就打的士吧。 你这样会着凉的。 孩子会着迷的。 那怎行。 你怎忍心。 他没是没非。
男的们都走了。 你知道吗我一直在想你。 医生给他打了吗啡。 “家人”们都在等你。 成都的天气好。 这是你的成就的一部分。
他是温和的人。 暖和的被子。 但的确是这样。 人们常说。 要么你来，要么我去。 你干吗去。 统一的规定。 你一口我一口。
他很了不起。 我个人认为。 把吧台擦干净。 被了解的感觉真好。 我家什么都有。 家里的家什都旧了。 了解一下。 的确如此。
"""


def test_everyday_sentences_hang_together() -> None:
    assert not [sentence for sentence in EVERYDAY.split() if not LANGUAGE.is_well_formed(sentence)]


def test_no_written_sentence_has_a_character_where_it_cannot_stand() -> None:
    assert LANGUAGE.misplaced
    texts = [text for kinds in REPLIES.values() for replies in kinds.values() for text in replies]
    for s in SCENARIOS.values():
        texts += [s.opening_line, s.user_persona, s.policy_persona, *(d["line"] for d in s.script["details"])]
        texts += [line for lines in s.script["lines"].values() for line in lines]
    clauses = [clause for text in texts for s in LANGUAGE.sentences(text) for clause in re.split("[，、；：,。！？!?…\n]+", s)]
    assert len(clauses) > 5000
    assert not [clause for clause in clauses if LANGUAGE.misplaced.search(clause)]


def test_one_kind_of_quotation_marks_and_one_form_of_address() -> None:
    for s in SCENARIOS.values():
        lines = [s.opening_line, *(d["line"] for d in s.script["details"])]
        lines += [line for of_mood in s.script["lines"].values() for line in of_mood]
        assert not re.search("[「」『』]", s.user_persona + s.policy_persona + "".join(lines)), s.id
        assert len(set(re.findall("[你您]", "".join(lines)))) <= 1, s.id


def _other(scenario: Scenario) -> str:
    """Another scenario of another scene."""
    names = list(SCENARIOS)
    return names[(names.index(scenario.id) + 10) % len(names)]
