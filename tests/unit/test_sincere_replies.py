"""Sincere replies from the policy's own persona are not punished, and filling its facts into templates does not pay.

tests/data/replies/sincere.json was written from the personas without knowledge of the rules; tests/sincere.py plays it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from statistics import mean

import pytest

from ctcgrpo.environments.eibench.records import SCENES, Scenario
from ctcgrpo.simulator.scripted.language import load_language
from tests.dialogue import ROUNDS, Speaker, converse
from tests.sincere import SINCERE, good_replies, is_taken_badly, reaction, scenarios

ENGLISH = load_language("en")


def why(scenario: str, turn: int, reply: str, language: str = "english") -> str:
    how = reaction(language, {"scenario": scenario, "turn": turn, "reply": reply})
    assert not is_taken_badly(how), (reply, how.why)
    return how.why


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_at_most_one_sincere_reply_of_twelve_is_taken_badly(language: str) -> None:
    replies = json.loads(SINCERE.read_text(encoding="utf-8"))[language]
    taken = [(said, reaction(language, said)) for said in replies]
    badly = [(said["reply"], how.why) for said, how in taken if is_taken_badly(how)]
    assert len(badly) <= len(taken) / 12, badly


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_few_good_replies_are_taken_badly(language: str) -> None:
    replies = [(name, k, said) for name, good in good_replies(language).items() for k, said in enumerate(good[:5])]
    badly = [is_taken_badly(reaction(language, {"scenario": name, "turn": k, "reply": said})) for name, k, said in replies]
    assert mean(badly) <= 1 / 12


# --- a fact of the policy's own persona ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "turn", "reply"),
    [
        ("support-test-01", 0, "Will you come on Tuesday? My wife's group has a place for him."),
        ("support-test-01", 0, "When my own mother was dying I shouted at her."),
        ("support-test-03", 1, "I cannot see well any more, so I fit the sound posts by touch."),
        ("charm-train-09", 0, "I whisper to actors for a living."),
    ],
)
def test_a_fact_of_the_policys_persona_counts_as_its_own(scenario: str, turn: int, reply: str) -> None:
    assert "tells me something of its own" in why(scenario, turn, reply)


def test_a_fact_of_the_policys_persona_counts_in_chinese() -> None:
    assert "tells me something of its own" in why("zh-charm-train-06", 2, "我爷爷也养过土蜂，两箱，放在屋后头。", "chinese")


def test_the_policys_mother_is_not_the_users() -> None:
    said = {"my": "I miss my own mother too.", "your": "I miss your mother too."}
    how = {whose: why("charm-test-03", 5, reply) for whose, reply in said.items()}
    assert "chipped soup dish" in how["your"] and "chipped soup dish" not in how["my"]
    assert "mentions" not in why("support-test-01", 0, "When my own mother was dying I shouted at her.")


@pytest.mark.parametrize("turn", [0, 2])
def test_a_question_about_the_subject_is_about_the_matter(turn: int) -> None:
    why("charm-test-01", turn, "Is it harder to draw left-handed?")


def test_to_speak_of_the_person_whom_the_user_speaks_of_is_no_empty_talk() -> None:
    assert "goes along with what I speak of" in why("repair-train-01", 2, "I'll ring her tonight and tell her where I was.")
    about_nobody = reaction("english", {"scenario": "repair-train-01", "turn": 2, "reply": "I'll ring him and tell him."})
    assert "could be said to anybody" in about_nobody.why


def test_a_fact_counts_once_and_is_no_substitute_for_listening() -> None:
    scenario = scenarios("english")["support-test-01"]
    own, empty = "tells me something of its own", "could be said to anybody"
    told = [
        "My wife has a small group on Tuesdays.",
        "There is a small group, my wife's.",
        "The stool is behind my counter.",
    ]
    _, [first, again, another] = converse(scenario, told)
    assert own in first[2] and empty in again[2] and empty in another[2]
    _, [_, another] = converse(scenario, [good_replies("english")[scenario.id][0], told[2]])
    assert own in another[2]


def test_of_what_is_past_you_never_may_praise() -> None:
    praise = "You brought me coffee when my mother died, and you never told me to be brave."
    assert "blame" not in why("support-train-07", 0, praise)
    blame = reaction("english", {"scenario": "support-train-07", "turn": 0, "reply": "You never listen to what anybody says."})
    assert "puts the blame on me" in blame.why


# --- whole sentences that were taken for broken ones ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "My cellar fridge stands empty.",
        "One call from me would get you in.",
        "Was she kind to you?",
        "Is he taking his time?",
        "How old is she?",
        "What are you most afraid of?",
        "Was it somebody you'd been fond of, the one who wrote it?",
        "Everybody who wants pills tells me the same story.",
        "Yes, yes, I have read the poster.",
        "I don't think people do that for fun, though.",
        "There you go, making it small again.",
        "You poor thing, all alone in your corner.",
        "You did, and without them I'd have gone under.",
        "I do need the drive clear, ma'am.",
        "At two o'clock a search crew came.",
    ],
)
def test_everyday_sentences_hang_together(text: str) -> None:
    assert ENGLISH.is_well_formed(text)


@pytest.mark.parametrize(
    "text", ["The of and it.", "What would help with the is.", "You to the of kind was.", "I want to help you I will stay."]
)
def test_word_salad_does_not(text: str) -> None:
    assert not ENGLISH.is_well_formed(text)


def test_a_short_name_and_the_root_of_a_word_are_not_words_cut_short() -> None:
    assert (
        "make sense"
        not in reaction("english", {"scenario": "defense-train-04", "turn": 0, "reply": "Kes, I can't lend you it."}).why
    )
    heat = reaction(
        "english", {"scenario": "charm-train-01", "turn": 0, "reply": "Those belts have more need of the heat than I have."}
    )
    assert "broken" not in heat.why and "make sense" not in heat.why


# --- templates that live on the persona's facts ---------------------------------------------------------------------------------

STUFFED = [
    "I have the {a} and the {b}.",
    "My {a} is near the {b} today.",
    "There is a {a} here, and I know the {b}.",
    "I think of my {a} and of the {b}.",
    "I once had a {a} with a {b} on it.",
    "We keep the {a} with the {b} at home.",
    "Do you want the {a} or the {b}?",
    "I brought the {b} and a {a}.",
]
STUFFED_CHINESE = [
    "我有{a}和{b}。",
    "我的{a}就在{b}旁边。",
    "我想起{a}，也想起{b}。",
    "这里有{a}，还有{b}呢。",
    "我们家的{a}和{b}都在。",
    "你要{a}还是{b}？",
    "我带了{a}来，也带了{b}。",
    "我知道{a}和{b}的事。",
]


def facts(scenario: Scenario) -> list[str]:
    """The sentences of the policy's persona, without headings and numbers."""
    lines = [line for line in scenario.policy_persona.splitlines() if line and not line.startswith("#")]
    return [s for line in lines for s in load_language(scenario.language).sentences(re.sub(r"^\d+\.\s*", "", line))]


def as_own(fact: str) -> str:
    """A fact said by its owner: I for you."""
    fact = re.sub(r"\bYou are\b", "I am", fact).replace("你", "我")
    return re.sub(r"\byour\b", "my", re.sub(r"\bYour\b", "My", re.sub(r"\b[Yy]ou\b", "I", fact)))


def stuffed(scenario: Scenario, source: Scenario, sentences: int = 1) -> list[Speaker]:
    """Eight templates in turn, filled with words of the facts of `source`."""
    language, rng, turn = load_language(scenario.language), random.Random(scenario.id), [0]
    if language.han:
        templates, words = STUFFED_CHINESE, sorted({pair for fact in facts(source) for pair in language.content(fact)})
    else:
        text = " ".join(facts(source))
        templates = STUFFED
        words = [t for t in language.tokens(text) if t.isalpha() and len(t) > 3 and not language.is_common(t)]

    def speak(history: object) -> str:
        turn[0] += 1
        chosen = [templates[(turn[0] * sentences + k) % len(templates)] for k in range(sentences)]
        return " ".join(t.format(a=rng.choice(words), b=rng.choice(words)) for t in chosen)

    return [speak] * ROUNDS


def neighbour(scenario: Scenario) -> Scenario:
    of_language = scenarios("chinese" if scenario.language == "zh" else "english")
    names = list(of_language)
    return of_language[names[(names.index(scenario.id) + 1) % len(names)]]


GENERIC = ["That must be hard for you.", "I am here, and I listen.", "Tell me more, if you want.", "It makes sense to me."]
ATTACKS: dict[str, Callable[[Scenario], Sequence[str | Speaker]]] = {
    "words of its own facts": lambda s: stuffed(s, s),
    "two sentences of them": lambda s: stuffed(s, s, 2),
    "words of another scenario's facts": lambda s: stuffed(s, neighbour(s)),
    "facts word by word": lambda s: facts(s)[:ROUNDS],
    "facts word by word, said by their owner": lambda s: [as_own(fact) for fact in facts(s)[:ROUNDS]],
    "one fact in every turn": lambda s: [as_own(facts(s)[3])] * ROUNDS,
    "another scenario's facts": lambda s: [as_own(fact) for fact in facts(neighbour(s))[:ROUNDS]],
    "words of its facts, then what anybody could say": lambda s: [
        said for generic in GENERIC for said in (stuffed(s, s)[0], generic)
    ],
}


@pytest.mark.parametrize("language", ["english", "chinese"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_its_own_facts_in_a_template_do_not_pay(attack: str, language: str) -> None:
    for scene in SCENES:
        here = [s for s in scenarios(language).values() if s.scene == scene]
        score = mean(converse(s, ATTACKS[attack](s))[0] for s in here)
        good = mean(converse(s, good_replies(language)[s.id])[0] for s in here)
        assert score < -0.55 and score < good - 0.9, (scene, score, good)


@pytest.mark.parametrize(("scenario", "turn"), [("repair-train-07", 4), ("defense-train-07", 4), ("defense-test-03", 3)])
def test_naming_a_thing_again_after_listening_is_no_clinging(scenario: str, turn: int) -> None:
    """Earlier mentions wear on the user only where nothing was heard since."""
    assert "mentions" in why(scenario, turn, good_replies("english")[scenario][turn])
