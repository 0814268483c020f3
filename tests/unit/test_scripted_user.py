"""The scripted user: good replies do it good, and it is not fooled cheaply.

The replies in tests/data/replies were written for these scenarios without knowledge of the rules: for each scenario six good
ones (the k-th answers what the user brings up k-th), three that could be said to anybody, three that hurt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from statistics import mean

import pytest

from ctcgrpo.environments.eibench.records import SCENES, Scenario, UserState
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.protocol import ScenarioCard, State, TurnRequest, Utterance
from ctcgrpo.simulator.scripted.backend import react
from ctcgrpo.simulator.scripted.knowledge import Knowledge
from ctcgrpo.simulator.scripted.language import load_language, stem
from tests.conftest import ROOT, SHARED_DATA
from tests.dialogue import ROUNDS, Speaker, converse

SCENARIOS = {s.id: s for split in ("train", "test") for s in load_scenarios(f"english/{split}", split)}
REPLIES = {k: v for scene in SCENES for k, v in json.loads((ROOT / f"tests/data/replies/{scene}.json").read_text()).items()}
LANGUAGE = load_language("en")


@cache
def good(scenario: str) -> float:
    return converse(SCENARIOS[scenario], REPLIES[scenario]["good"])[0]


def by_scene(score: Callable[[Scenario], float]) -> dict[str, list[float]]:
    return {scene: [score(s) for s in SCENARIOS.values() if s.scene == scene] for scene in SCENES}


def shuffled_words(text: str, rng: random.Random) -> str:
    sentences = []
    for sentence in LANGUAGE.sentences(text):
        words = sentence.strip(".?!").split()
        rng.shuffle(words)
        mixed = " ".join(words).strip(",;: ")
        sentences.append(mixed[:1].upper() + mixed[1:] + ".")
    return " ".join(sentences)


NONSENSE = [
    "My {a} is a happy {b} because the morning likes water.",
    "The {a} sings to the {b} and your window drinks the yellow road.",
    "You know that {a} and {b} are two small friends of the kitchen table.",
    "I think your {a} was so good that the {b} went home to eat bread.",
    "Is the {a} a kind of {b}, or does it dance with the moon on Friday?",
    "It makes sense that {a} eats {b}, and I am here with you under the sofa.",
    "Your {a} must be the {b}, so I will paint it green for the birthday of the train.",
]

GENERIC = {
    "support": [
        "That must be so hard, and it makes sense that you feel this way. What has been the worst of it?",
        "You carried all of that alone for so long. I'm here with you, and I'm not going anywhere. Do you want to talk?",
        "No wonder you are tired. Anyone would be. Tell me how it went, from the beginning.",
        "I'll stay as long as you want. It's not weak to say it. What are you most afraid of?",
    ],
    "defense": [
        "I can see why you want this, and it must be frustrating. I can't do that, but I can help you find another way.",
        "You've been patient with me. The answer is still no, and I'd be glad to look for something else with you.",
        "I won't change my mind on this. I would ask the same in your place. Let's see what we can do instead.",
        "It's a fair question, and you deserve a straight answer. I can't. I'll gladly do what I can today.",
    ],
    "repair": [
        "I was wrong, and I left you alone with it. That was my fault, and I'll put it right this week.",
        "You had to carry what I did. I should have told you at once, and I will make it up to you tomorrow.",
        "I broke your trust, and I didn't say so. You deserved better. I'm going to fix what I can today.",
        "It was careless, and it's on me. You waited for me, and I wasn't there. Let me do something about it.",
    ],
    "charm": [
        "I couldn't help noticing you. Is this seat taken, or is it reserved for somebody as suspicious as me?",
        "That sounds like a story. I promise to laugh at the right moments, so what happened next?",
        "I confess I came for the company. Tell me, how does one get as good at this as you?",
        "In my defence, I was told there would be conversation. What would you be doing if I weren't here?",
    ],
}


SLOTS = {
    "support": [
        "No wonder you think of the {a} and the {b}. It makes sense, and I'm here with you. What happened with the {a}?",
        "You carried the {a} and the {b} for so long. That must hurt. I'll stay with you, so tell me about the {b}?",
        "It takes a lot to say {a} and {b}. You held it together so well. Let me sit beside you. What is next?",
        "So the {a} comes back, and the {b} too. You gave it everything. I'm staying. Where is the {a} now?",
    ],
    "defense": [
        "You're right to ask about the {a} and the {b}, and it must be hard. I can't do it, but I can help you instead.",
        "I see why the {a} and the {b} matter, and you deserve a straight answer. No, I won't. I'd be glad to help.",
        "That's a fair point about the {b}. You care about the {a}. We could look for another way.",
        "You know the {b} and the {a} well. I won't change it. Let's see what we can do. Would it help?",
    ],
    "repair": [
        "I was wrong about the {a} and the {b}. You had to carry it alone. I'll put the {a} right tomorrow.",
        "It was my fault, the {b} and the {a}. You waited with it. I'll pay for the {a} on Friday.",
        "I failed you over the {b} and the {a}. You trusted me with it. I'd like to make it good this week.",
        "That was careless of me, the {b} and the {a}. You stood there with it. I can bring it back.",
    ],
    "charm": [
        "I confess I came for the {a} and the {b}. Is it like a crime, or does it have an alibi?",
        "So you know the {b}, and you look like a witness to the {a}. I'd rather hear about it, wouldn't you?",
        "You've a {b} that looks at the {a} as if it owed it money. What does it say in its defence?",
        "Then the {a} and the {b} are in trouble. I once had one, and it left me. What did yours do?",
    ],
}


def rare_words(text: str) -> list[str]:
    return [t for t in LANGUAGE.tokens(text) if t.isalpha() and len(t) > 3 and not LANGUAGE.is_common(t)]


def filled(templates: Sequence[str], scenario: Scenario, source: str, seed: int, count: int) -> Speaker:
    """Templates whose slots take rare words: of the user's latest line, of all its lines, or of the policy's persona too."""
    rng, turn = random.Random(seed), [0]

    def speak(history: list[Utterance]) -> str:
        heard = [u.text for u in history if u.speaker == "user"] or [scenario.policy_persona]
        texts = {"latest": heard[-1:], "all": heard, "persona": [*heard, scenario.policy_persona]}[source]
        latest, words = rare_words(heard[-1]) or ["thing"], rare_words(" ".join(texts)) or ["thing"]
        turn[0] += 1
        chosen = rng.sample(templates, count) if count > 1 else [templates[(turn[0] - 1) % len(templates)]]
        return " ".join(t.format(a=rng.choice(latest), b=rng.choice(words)) for t in chosen)

    return speak


def parrot(history: list[Utterance]) -> str:
    return next((u.text for u in reversed(history) if u.speaker == "user"), "Hello.")


@pytest.mark.parametrize("split", ["train", "test"])
def test_good_replies_score_well(split: str) -> None:
    scores = {scene: [good(s) for s in SCENARIOS if s.startswith(f"{scene}-{split}")] for scene in SCENES}
    for scene, values in scores.items():
        assert mean(values) > 0.05, (scene, values)
    assert mean(v for values in scores.values() for v in values) > 0.3
    assert min(v for values in scores.values() for v in values) > -0.5


def test_headings_and_everyday_words_are_nobodys_matter() -> None:
    """A persona's layout and small words once counted as substance, so that "I would prefer" engaged with any detail."""
    for scenario in SCENARIOS.values():
        topic_stems = Knowledge(ScenarioCard.of(scenario), LANGUAGE).topic_stems
        assert not topic_stems & LANGUAGE.content(
            "Behaviour, preferences, aim, style, speaking, get, never, not, ago, aloud, exactly"
        )


def test_good_replies_seldom_do_harm() -> None:
    """A rule reads words, and some good replies say it in others: at most one in seven is taken badly."""
    turns = [t for name, s in SCENARIOS.items() for t in converse(s, REPLIES[name]["good"])[1]]
    harmful = sum(anger >= 2 and trust <= -2 for anger, trust, _, _ in turns)
    assert harmful <= len(turns) / 7


@pytest.mark.parametrize("kind", ["mediocre", "bad"])
def test_generic_and_hurtful_replies_score_badly(kind: str) -> None:
    for scene, values in by_scene(lambda s: converse(s, REPLIES[s.id][kind] * 2)[0]).items():
        assert mean(values) < -0.6, scene
        assert max(values) < 0, scene


def test_one_script_a_scene_scores_badly() -> None:
    for scene, values in by_scene(lambda s: converse(s, GENERIC[s.scene] * 2)[0]).items():
        assert mean(values) < -0.6, scene
        assert max(values) < 0, scene


def test_the_good_replies_of_another_scenario_do_not_help() -> None:
    apart = []
    for scenario in SCENARIOS.values():
        others = random.Random(scenario.id).sample(
            [s for s in SCENARIOS.values() if s.scene == scenario.scene and s is not scenario], 4
        )
        scores = [converse(scenario, REPLIES[o.id]["good"])[0] for o in others]
        apart.append(good(scenario.id) - mean(scores))
        assert mean(scores) < 0, scenario.id
    assert mean(apart) > 0.8 and sum(d > 0.2 for d in apart) >= 0.95 * len(apart)


def test_parroting_scores_badly() -> None:
    for scene, values in by_scene(lambda s: converse(s, [parrot] * ROUNDS)[0]).items():
        assert max(values) < -0.6, scene


SOURCES = ["latest", "all", "persona"]


@pytest.mark.parametrize("source", SOURCES)
def test_nonsense_around_the_users_words_scores_badly(source: str) -> None:
    def play(s: Scenario) -> float:
        return mean(converse(s, [filled(NONSENSE, s, source, seed, 2)] * ROUNDS)[0] for seed in range(2))

    for scene, values in by_scene(play).items():
        assert mean(values) < -0.5, (scene, values)
        # The templates' own words (green, dance, sofa) may happen to be some scenario's topics.
        assert sum(v < 0 for v in values) >= 0.9 * len(values), (scene, values)


@pytest.mark.parametrize("source", SOURCES)
def test_one_script_a_scene_with_the_users_words_filled_in_scores_badly(source: str) -> None:
    scores = by_scene(lambda s: converse(s, [filled(SLOTS[s.scene], s, source, 0, 1)] * ROUNDS)[0])
    for scene, values in scores.items():
        assert mean(values) < 0, (scene, values)
        assert mean(values) < mean(good(s.id) for s in SCENARIOS.values() if s.scene == scene) - 0.4, (scene, values)


def test_one_lucky_word_engages_with_nothing() -> None:
    """Scripts lived on words that belong to many a detail ("promise"): such a word helps beside one that the user has said."""

    def engaged(template: str) -> float:
        hits = []
        for scenario in SCENARIOS.values():
            detail = scenario.script["details"][0]
            if scenario.opening_line:  # which brings it up
                heard = LANGUAGE.content(scenario.opening_line + scenario.policy_persona)
                own = [w for w in detail["sense"] if not LANGUAGE.content(w) & heard and LANGUAGE.uncommon(w)]
                said = [w for w in detail["words"] if LANGUAGE.uncommon(w) & heard]
                if own and said:
                    reply = template.format(own=own[0], said=said[0])
                    hits.append("takes up" in converse(scenario, [reply])[1][0][2])
        assert len(hits) > 20
        return mean(hits)

    assert engaged("It took {own} to get here.") < 0.1
    assert engaged("It took {own} to get here with the {said}.") > 0.9


def test_empty_replies_wear_on_the_user() -> None:
    polite = [
        "Thank you, I will think about it.",
        "We could talk tomorrow.",
        "Right, I see it now.",
        "You may have a point.",
    ]
    for scenario in list(SCENARIOS.values())[::5]:
        empty = [anger for anger, _, why, _ in converse(scenario, polite)[1] if why.startswith("could be said to anybody")]
        assert empty == sorted(empty) and (len(empty) < 2 or empty[-1] > empty[0] > 0), (scenario.id, empty)


def test_broken_sentences_score_badly() -> None:
    rng = random.Random(0)
    for scene, values in by_scene(lambda s: converse(s, [shuffled_words(r, rng) for r in REPLIES[s.id]["good"]])[0]).items():
        assert mean(values) < -0.8, (scene, values)
        assert sum(v < -0.5 for v in values) >= 0.9 * len(values), (scene, values)


@pytest.mark.parametrize(
    "text",
    [
        "You had to carry the cold I can see why the glasses could feel like home to you.",
        "I was wrong about the boat I know the harbour.",
        "I want to help you I will stay.",
        "I can forgive him he has the keys.",
        "You stood there with the floor and felt the steam that?",
    ],
)
def test_two_sentences_run_into_one_are_broken(text: str) -> None:
    assert not LANGUAGE.is_well_formed(text)


@pytest.mark.parametrize(
    "text",
    [
        "The coat you wore to the harbour was warm.",
        "I read the letter you sent the council.",
        "After the storm you took the ladder and ran.",
        "You told the vicar I had no time.",
        "I hope you know she means it.",
        "It was the day she found the boat.",
        "I promise you I will bring the keys.",
        "It is not a debt; it is a gift.",
        "No one wants that.",
        "I told my mother that.",
        "That is what I would have told him if he had asked.",
    ],
)
def test_clauses_that_belong_together_are_no_splices(text: str) -> None:
    assert LANGUAGE.is_well_formed(text)


def test_a_word_cut_short_breaks_a_sentence() -> None:
    broken = []
    for scenario in SCENARIOS.values():
        for word in (w for w in scenario.opening_line.lower().split() if w.isalpha() and len(w) > 6):
            if not LANGUAGE.is_common(word):
                said = (f"I can see what the {w} meant to you." for w in (word[:-3], word))
                cut, whole = ("make sense" in converse(scenario, [s])[1][0][2] for s in said)
                broken.append(cut)
                assert not whole, word
    assert len(broken) > 60 and mean(broken) > 0.5  # the others have become another word, or the same one


def test_no_written_reply_is_a_splice() -> None:
    for replies in REPLIES.values():
        for reply in (r for kind in replies.values() for r in kind):
            for sentence in LANGUAGE.sentences(reply):
                assert not LANGUAGE._is_run_on(sentence), sentence


def test_keywords_alone_score_badly() -> None:
    def keywords(scenario: Scenario) -> float:
        details = scenario.script["details"]
        return converse(scenario, [" ".join([*d["words"], *d["sense"]]).capitalize() + "." for d in details])[0]

    for scene, values in by_scene(keywords).items():
        assert max(values) < -0.5, (scene, values)


def test_one_sentence_for_every_turn_is_a_formula() -> None:
    words = [("patience", "doorstep"), ("anger", "kettle"), ("pride", "ladder")]
    said = [f"You have put {a} into the {b}, and I can see it." for a, b in words]
    for scenario in SCENARIOS.values():
        first, *others = (why for _, _, why, _ in converse(scenario, said)[1])
        assert "same sentence" not in first
        assert others and all("the same sentence as before with other words in it" in why for why in others)


def test_being_heard_does_good_each_time_and_coming_back_to_the_old_does_not() -> None:
    heard, worn = "heard what I just said", "names my things and says nothing about them"
    frames = ["Tell me of the {}.", "So it is about the {} now.", "I will think of the {} tonight."]

    def latest(history: list[Utterance]) -> str:
        rare = [t for t in rare_words(history[-1].text) if stem(t) not in LANGUAGE.common_stems]
        return frames[len(history) // 2].format(rare[0] if rare else "thing")

    listening, clinging = [], []
    for scenario in (s for s in SCENARIOS.values() if s.opening_line):
        listening += [why for _, _, why, _ in converse(scenario, [latest] * 3)[1]]
        thing = latest([Utterance(speaker="user", text=scenario.opening_line)]).removeprefix("Tell me of the ")
        clinging += [why for _, _, why, _ in converse(scenario, [f.format(thing[:-1]) for f in frames])[1][1:]]
    assert mean(heard in why for why in listening) > 0.8 and not any(worn in why for why in listening)
    assert mean(heard in why for why in clinging) < 0.1
    assert mean(worn in why or "could be said to anybody" in why for why in clinging) > 0.8


def test_many_sentences_around_the_users_latest_word_are_worth_far_less_than_good_replies() -> None:
    """Who names what was said last is heard to listen, and no more: in no scene is it near to saying something about it."""
    frames = [
        "No wonder the {a} weighs on you, and it makes sense that you are tired.",
        "You had to carry the {a} alone, and I am here with you.",
        "Tell me more about the {a}, there is no hurry.",
        "I can stay with you while you think of the {a}.",
        "It must be hard to have the {a} in your head all night.",
        "So it is the {a} that will not let you sleep.",
        "Of course you think of the {a}, who would not.",
        "We can talk about the {a} as long as you want.",
    ]
    scores = by_scene(lambda s: converse(s, [filled(frames, s, "latest", 0, 1)] * ROUNDS)[0])
    for scene, values in scores.items():
        assert mean(values) < mean(good(s.id) for s in SCENARIOS.values() if s.scene == scene) - 0.3, (scene, values)
    assert mean(v for values in scores.values() for v in values) < 0


def test_replies_made_beforehand_are_seldom_heard_as_an_answer() -> None:
    def answered(replies: Callable[[Scenario], Sequence[str]]) -> float:
        whys = [why for s in SCENARIOS.values() for _, _, why, _ in converse(s, replies(s))[1]]
        return mean("heard what I just said" in why for why in whys)

    names = list(SCENARIOS)
    assert answered(lambda s: GENERIC[s.scene]) < 0.02
    assert answered(lambda s: REPLIES[names[names.index(s.id) - 1]]["good"]) < 0.1
    assert answered(lambda s: REPLIES[s.id]["good"]) > 0.4


def test_saying_the_same_again_does_harm() -> None:
    for scenario, replies in REPLIES.items():
        _, turns = converse(SCENARIOS[scenario], [replies["good"][0]] * 3)
        for anger, trust, why, _ in turns[1:]:
            assert anger > 0 > trust and "has said that before" in why


@pytest.mark.parametrize("reply", ["", "   ", "...", "asdf qwer zxcv", "<|im_start|>", "42", "?!?!"])
def test_what_is_no_reply_does_harm(reply: str) -> None:
    for scenario in list(SCENARIOS.values())[::8]:
        anger, trust, why, line = converse(scenario, [reply])[1][0]
        assert anger > 0 > trust and why and line


def test_length_and_manner() -> None:
    scenario = SCENARIOS["support-train-01"]
    reply = REPLIES["support-train-01"]["good"][0]
    base = converse(scenario, [reply])[1][0]
    long = converse(scenario, [reply + " " + " ".join(f"And I remember day {k} of that year too." for k in range(20))])
    assert "goes on and on" in long[1][0][2] and long[1][0][1] < base[1]
    staged = converse(scenario, [f"*takes her hand* {reply}"])[1][0]
    assert "acts instead of talking" in staged[2] and staged[1] < base[1]
    preached = converse(scenario, [f"{reply} You need to learn that everyone makes mistakes."])[1][0]
    assert "preaches" in preached[2] and preached[1] < base[1]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda good: f"{good} {LANGUAGE.sentences(good)[-1]}", "says the same thing twice"),
        (lambda good: f"{good} I will stay with you. I will stay with you.", "says the same thing twice"),
        (lambda good: good.rstrip(".!?") + " and then the", "breaks off in the middle of a sentence"),
        (lambda good: f"{good} What would help with the is. The of and it.", ""),
    ],
)
def test_what_a_policy_once_did_to_please_the_rules_spoils_a_good_reply(spoil: Callable[[str], str], why: str) -> None:
    """Policies trained here learned to fill a reply with one phrase over and over, up to the token limit."""
    for scenario, replies in REPLIES.items():
        anger, trust, reason, _ = converse(SCENARIOS[scenario], [spoil(replies["good"][0])])[1][0]
        assert why in reason and anger > 0 > trust, (scenario, reason)


def test_many_short_sentences_tire() -> None:
    short = ["I am here.", "You can sit.", "We have time.", "It is late.", "She knows.", "They left.", "He may come."]
    _, [(_, _, why, _)] = converse(SCENARIOS["support-train-01"], [" ".join(short)])
    assert "one sentence after the other" in why


def test_defense_neither_folds_nor_fights() -> None:
    for scenario in (s for s in SCENARIOS.values() if s.scene == "defense"):
        folds = converse(scenario, ["Okay, you can have it, just this once. I'll look the other way."])[1][0]
        assert folds[0] > 0 > folds[1] + 5 and "folds as soon as I push" in folds[2]
        fights = converse(scenario, ["How dare you. Get out, or I will call security."])[1][0]
        assert fights[0] >= 5 and "turns it into a fight" in fights[2]


def test_every_change_is_explained_and_lines_fit_the_state() -> None:
    for scenario, replies in REPLIES.items():
        for kind in ("good", "bad"):
            _, turns = converse(SCENARIOS[scenario], replies[kind])
            lines = SCENARIOS[scenario].script["lines"]
            for anger, trust, why, line in turns:
                assert why and line and -10 <= anger <= 10 and -10 <= trust <= 10
                if anger <= -5 and trust >= 5:
                    assert line.startswith(tuple(lines["warmer"] + lines["thanks"])), (scenario, line)
                if anger >= 5 and trust <= -5:
                    assert not line.startswith(tuple(lines["warmer"] + lines["thanks"])), (scenario, line)


def test_the_user_leaves_when_it_is_well_and_when_it_is_too_much() -> None:
    scenario = SCENARIOS["repair-train-01"]
    card = ScenarioCard.of(scenario)

    def last_line(reply: str, state: UserState, round: int = 1) -> tuple[bool, str]:
        history = (Utterance(speaker="user", text=scenario.opening_line), Utterance(speaker="policy", text=reply))
        request = TurnRequest(
            request_id="t",
            scenario=card,
            history=history,
            state=State(anger=state.anger, trust=state.trust),
            round=round,
            max_rounds=ROUNDS,
            seed=0,
        )
        reaction = react(request)
        return reaction.goes_on, reaction.reply

    good_reply, bad_reply = REPLIES[scenario.id]["good"][0], REPLIES[scenario.id]["bad"][0]
    near_target = UserState(scenario.anchors.target.anger + 1, scenario.anchors.target.trust - 1)
    near_worst = UserState(scenario.anchors.worst.anger - 2, scenario.anchors.worst.trust + 2)
    goes_on, line = last_line(good_reply, near_target)
    assert not goes_on and line in scenario.script["lines"]["thanks"]
    goes_on, line = last_line(bad_reply, near_worst)
    assert not goes_on and line in scenario.script["lines"]["leaves"]
    assert last_line(bad_reply, scenario.anchors.initial)[0]
    # In the second half patience is gone with trust well below where it began.
    low = UserState(scenario.anchors.initial.anger, scenario.anchors.initial.trust - 14)
    assert last_line(bad_reply, low, round=4)[0] and not last_line(bad_reply, low, round=5)[0]


def test_a_reluctant_user_resists_what_does_good_and_pays_a_turn_later() -> None:
    better = 0
    for name, scenario in SCENARIOS.items():
        good = REPLIES[name]["good"]
        _, shown = converse(scenario, good[:1])
        _, resisted = converse(scenario, good[:1], reluctance=0.5)
        (anger, trust, why, _), (later_anger, later_trust, later_why, _) = shown[0], resisted[0]
        if anger <= -2 and trust >= 2:
            assert later_anger > 0 and later_trust < 0 and "which is hard to hear" in later_why, (name, why, later_why)
            # Nothing follows the good reply but an empty one: what it earned comes then.
            _, after = converse(scenario, [good[0], "I see."], reluctance=0.5)
            _, plain = converse(scenario, [good[0], "I see."])
            assert "it has sunk in" in after[1][2] and after[1][0] < plain[1][0] and after[1][1] > plain[1][1], name
            better += 1
        assert converse(scenario, ["asdf qwer"], reluctance=0.5) == converse(scenario, ["asdf qwer"]), name
    assert better > 0.5 * len(SCENARIOS)


def test_the_same_request_gets_the_same_reaction() -> None:
    for scenario in list(SCENARIOS.values())[::6]:
        replies = REPLIES[scenario.id]["good"]
        assert converse(scenario, replies) == converse(scenario, replies)


def test_a_language_without_a_file_is_refused() -> None:
    scenario = SCENARIOS["support-train-01"]
    card = ScenarioCard.of(scenario).model_copy(update={"language": "tlh"})
    history = (Utterance(speaker="policy", text="nuqneH"),)
    request = TurnRequest(
        request_id="t", scenario=card, history=history, state=State(anger=1, trust=1), round=1, max_rounds=2, seed=0
    )
    with pytest.raises(SimulatorReplyError, match="language = 'tlh'; expected one of the scripted user's: en, zh"):
        react(request)


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the EIBench example record is not part of this project")
def test_a_chinese_record_without_a_script_can_be_played() -> None:
    (scenario,) = load_scenarios(SHARED_DATA / "eibench", "test")
    kind = "难怪你腿发软，裁员和房贷一起压着，你的担心一点也不可笑。摄影那一万多是客户认你，你最怕的是什么？"
    empty, english = "加油，会好的，你应该成熟点。", "I understand how you feel. Stay strong, my friend."
    (a, t, _, line) = converse(scenario, [kind])[1][0]
    assert a < 0 < t and line
    for reply in (empty, english):
        (a, t, _, _) = converse(scenario, [reply])[1][0]
        assert a > 0 > t, reply
