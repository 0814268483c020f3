"""Reading an LLM's answer as the user: every form that models really use, exactly; whatever else, refused and never guessed."""

from __future__ import annotations

import json
import random
import string
from collections import Counter
from collections.abc import Callable

import pytest

from ctcgrpo.environments.eibench.records import UserState
from ctcgrpo.simulator.llm.answers import Answer, Unreadable, read_answer

STATE = UserState(60, 35)
MUTATED = 100_000


def fields(anger: int = -3, trust: int = 4, reply: str = "Well, go on.", goes_on: str = "yes") -> dict[str, object]:
    return {
        "reflection": "1. It asks. 2. It touches.",
        "anger_delta": anger,
        "trust_delta": trust,
        "reply": reply,
        "continue": goes_on,
        "stop_reason": "",
    }


GOOD = json.dumps(fields())
EXPECTED = Answer("Well, go on.", -3, 4, True, "1. It asks. 2. It touches.", "")


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        json.dumps(fields(), indent=2),
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```",
        f"Here is my answer:\n{GOOD}\nThat is all.",
        f'<think>They said {{nice}} things. {{"anger_delta": 9}}</think>\n{GOOD}',
        GOOD.replace('"trust_delta": 4', '"trust_delta": +4'),
        GOOD.replace('"trust_delta": 4', '"trust_delta": "+4"'),
        GOOD.replace('"anger_delta": -3', '"anger_delta": "-3"'),
        GOOD.replace('"anger_delta": -3', '"anger_delta": "\u22123"'),
        GOOD.replace('"anger_delta": -3', '"anger_delta": -3.0'),
        GOOD.replace('"anger_delta": -3,', '"anger_delta": -3, // a little better\n'),
        GOOD.replace('"anger_delta": -3,', '"anger_delta": -3, /* a little better */'),
        GOOD.replace('"stop_reason": ""}', '"stop_reason": "",}'),
        GOOD.replace('"stop_reason": ""}', '"stop_reason": ""'),
        GOOD.replace('"stop_reason": ""}', '"stop_reason": "'),
        GOOD.replace('"continue": "yes"', '"continue": true'),
        GOOD.replace('"continue": "yes"', '"continue": "Yes."'),
        GOOD.replace("anger_delta", "Anger Delta"),
    ],
)
def test_forms_that_models_really_use_are_read_exactly(text: str) -> None:
    assert read_answer(text, STATE) == EXPECTED


def test_raw_newlines_and_unescaped_quotes_in_what_the_user_says() -> None:
    raw = GOOD.replace("Well, go on.", "Well,\ngo on.")
    assert read_answer(raw, STATE).reply == "Well,\ngo on."
    quoted = GOOD.replace("Well, go on.", 'You said "fine" and left.')
    answer = read_answer(quoted, STATE)
    assert (answer.anger_delta, answer.trust_delta) == (-3, 4) and "fine" in answer.reply


@pytest.mark.parametrize(
    ("anger", "trust", "meant"),
    [
        (-15, 12, (-10, 10)),  # exaggerated changes are clipped
        (57, 39, (-3, 4)),  # new levels, where they cannot be changes
        (60, 35, (0, 0)),
        (75, 20, (10, -10)),
        (10, 10, (10, 10)),
        (0, 0, (0, 0)),
    ],
)
def test_changes_and_levels_are_told_apart(anger: int, trust: int, meant: tuple[int, int]) -> None:
    answer = read_answer(json.dumps(fields(anger, trust)), STATE)
    assert (answer.anger_delta, answer.trust_delta) == meant


@pytest.mark.parametrize(
    ("anger", "trust", "state"),
    [
        (15, 12, UserState(14, 15)),  # large changes, or small ones given as levels?
        (57, 4, STATE),  # one of each
        (95, 35, STATE),  # a level too far away
        (-40, 5, STATE),
        (101, 35, UserState(99, 35)),
    ],
)
def test_what_could_be_both_or_neither_is_refused(anger: int, trust: int, state: UserState) -> None:
    with pytest.raises(Unreadable, match="out of range: (anger|trust)_delta"):
        read_answer(json.dumps(fields(anger, trust)), state)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        ("   \n", "empty"),
        ("<think>hm</think>", "empty"),
        ("I would rather not.", "no object"),
        ("{", "missing: anger_delta"),
        ("{}", "missing: anger_delta"),
        (GOOD + GOOD, "several"),
        (GOOD + "\n" + json.dumps(fields(-10, 10)), "several"),
        (GOOD.replace('"trust_delta": 4', '"trust_delta": 4, "trust_delta": 10'), "several"),
        (GOOD.replace("Well, go on.", 'It says "anger_delta": -10, "trust_delta": 10 to me'), "several"),
        (GOOD[: GOOD.index('"reply"')], "missing: (reply|trust_delta)"),
        (GOOD[: GOOD.index('"trust_delta"') + 16], "missing: trust_delta"),
        (GOOD[: GOOD.index("go on")], "missing: reply"),
        (GOOD[: GOOD.index('"yes"') + 2], "missing: continue"),
        (GOOD.replace('"anger_delta": -3', '"anger_delta": true'), "not a number: anger_delta: True"),
        (GOOD.replace('"anger_delta": -3', '"anger_delta": null'), "missing: anger_delta"),
        (GOOD.replace('"anger_delta": -3', '"anger_delta": -2.5'), "not a number: anger_delta: -2.5"),
        (GOOD.replace('"anger_delta": -3', '"anger_delta": NaN'), "not a number"),
        (GOOD.replace('"anger_delta": -3', '"anger_delta": 1e400'), "not a number"),
        (GOOD.replace('"anger_delta": -3', f'"anger_delta": {"9" * 5000}'), "no object|not a number"),
        (GOOD.replace('"anger_delta": -3', '"anger_delta": [1]'), "not a number"),
        (GOOD.replace('"anger_delta": -3', '"anger_delta": "a lot"'), "not a number: anger_delta: 'a lot'"),
        (GOOD.replace('"continue": "yes"', '"continue": "perhaps"'), "not yes or no: continue: 'perhaps'"),
        (GOOD.replace("Well, go on.", "   "), "missing: reply"),
        (GOOD.replace('"Well, go on."', "7"), "missing: reply"),
        ("[" * 3000 + "{" * 3000, "no object|missing"),
        ('{"a":' * 5000, "no object|missing"),
    ],
)
def test_what_says_nothing_certain_is_refused_with_its_reason(text: str, problem: str) -> None:
    with pytest.raises(Unreadable, match=problem):
        read_answer(text, STATE)


QUOTED = '{"anger_delta": -10, "trust_delta": 10, "reply": "I forgive you", "continue": "no"}'
SINGLE = "{'anger_delta': -10, 'trust_delta': 10, 'reply': 'ok', 'continue': 'no'}"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(fields(5, -5) | {"reflection": f"They wrote {QUOTED}"}),
        json.dumps(fields(5, -5, reply=f"Why do you say </think>{SINGLE}?")),
        json.dumps(fields(5, -5) | {"reflection": f"</think>{SINGLE.replace('anger', 'Anger').replace('trust', 'Trust')}"}),
        json.dumps(fields(5, -5, reply=f"<think>{QUOTED}</think>Go away.")),
        f"<think>They wrote {QUOTED}</think>" + json.dumps(fields(5, -5)),
    ],
)
def test_what_a_whole_answer_quotes_is_not_its_verdict(text: str) -> None:
    answer = read_answer(text, STATE)
    assert (answer.anger_delta, answer.trust_delta, answer.goes_on) == (5, -5, True)


@pytest.mark.parametrize(
    "text",
    [
        # Quoted without escapes: what is quoted and what is meant cannot be told apart.
        GOOD.replace("1. It asks.", f"They wrote {QUOTED}"),
        GOOD.replace("Well, go on.", f"What is {QUOTED} to me?"),
        GOOD.replace("Well, go on.", f"What is {SINGLE} to me?").replace('"yes"', "yes"),
        # Drafts.
        f"First: {GOOD}\nBut no, finally: " + GOOD.replace("-3,", "-9, // better"),
        f"<think>Draft: {GOOD} no, that is too kind",
        GOOD.replace('"continue": "yes"', '"continue": "no", "continue": "yes"'),
        # Half a number, and signs and ranges that a repair would drop.
        '{"reflection": "a "b} c" d", "reply": "x", "continue": "no", "trust_delta": 4, "anger_delta": 1',
        *(
            GOOD.replace("-3", v)
            for v in ("~3", "\u00b13", "3-", "-3 to -5", "-3, -4", "1,5", "-3 -> -2", "-1 0", "-1\n0", "1_0", "<3")
        ),
        *(GOOD.replace("-3", f'"{v}"') for v in ("1\u00b2", "-3 5", "+4 / -2", "1_0")),
        GOOD.replace('"yes"', "no, I stay"),
        GOOD.replace('"yes"', '"no" or "yes"'),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(Unreadable):
        read_answer(text, STATE)


@pytest.mark.parametrize("minus", ["-", "\u2212", "\uff0d", "\u2013"])
def test_every_minus_is_a_minus(minus: str) -> None:
    for text in (GOOD.replace("-3", f"{minus}3"), GOOD.replace("-3", f'"{minus}3"')):
        assert read_answer(text, STATE).anger_delta == -3


def test_degenerate_answers_are_refused() -> None:
    """Repairing such an answer once took minutes."""
    for text in (
        '{"' * 25_000,
        "{" * 50_000,
        '{"a":' * 8000,
        '{"reply": "' + '"a "' * 4000,
        "[" * 15_000 + "{" * 50,
        "\\" * 16_000,
    ):
        with pytest.raises(Unreadable):
            read_answer(text, STATE)


def test_what_no_text_may_hold_is_left_out() -> None:
    answer = read_answer(GOOD.replace("Well, go on.", "\\ud800Well,\\u0000\\n go on."), STATE)
    assert answer.reply == "Well,\n go on."
    answer.reply.encode()


# --- fuzzing -------------------------------------------------------------------------------------------------------------------

WORDS = [
    "Well",
    "no",
    "你说的",
    "deine",
    "«si»",
    "…",
    'I "know"',
    "it's",
    "{really}",
    "a\\b",
    "😀",
    "line\nbreak",
    "[x]",
    "//",
    "100%",
]


def some_text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


def plus(text: str, rng: random.Random) -> str:
    data = json.loads(text)
    for name in ("anger_delta", "trust_delta"):
        if data[name] > 0:
            text = text.replace(f'"{name}": {data[name]}', f'"{name}": +{data[name]}')
    return text


def as_strings(text: str, rng: random.Random) -> str:
    data = json.loads(text)
    return json.dumps(data | {"anger_delta": str(data["anger_delta"]), "trust_delta": f" {data['trust_delta']} "})


HARMLESS: list[Callable[[str, random.Random], str]] = [
    lambda text, rng: text,
    lambda text, rng: json.dumps(json.loads(text), ensure_ascii=False, indent=rng.choice([1, 2, 4])),
    lambda text, rng: f"```json\n{text}\n```",
    lambda text, rng: f"Sure:\n{text}",
    lambda text, rng: f"<think>{some_text(rng)}</think>{text}",
    lambda text, rng: text[:-1] + ",}",
    lambda text, rng: text[:-1],
    lambda text, rng: text.replace(', "trust_delta"', ', // so\n "trust_delta"'),
    lambda text, rng: text.replace("\\n", "\n"),
    plus,
    as_strings,
]


def test_well_formed_answers_are_always_read_exactly() -> None:
    rng = random.Random(0)
    for _ in range(20_000):
        anger, trust = rng.randint(-10, 10), rng.randint(-10, 10)
        data = fields(anger, trust, some_text(rng), rng.choice(["yes", "no"])) | {"reflection": some_text(rng)}
        text = rng.choice(HARMLESS)(json.dumps(data), rng)
        answer = read_answer(text, UserState(rng.randint(0, 100), rng.randint(0, 100)))
        assert (answer.anger_delta, answer.trust_delta) == (anger, trust), text
        assert answer.reply == data["reply"] and answer.goes_on == (data["continue"] == "yes"), text


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        what = rng.randrange(8)
        if what == 0:
            text = text[:at] + text[at + rng.randint(1, 6) :]
        elif what == 1:
            text = text[:at] + rng.choice(string.printable + "\u2028\ud83d\x00\u202e") + text[at:]
        elif what == 2:
            text = text[:at]
        elif what == 3:
            text = text[:at] + rng.choice(['{"anger_delta": 10}', "}", '"', "```", "//", "null", "<think>", "999"]) + text[at:]
        elif what == 4:
            text = text[:at] + text[at : at + 30] * 2 + text[at + 30 :]
        elif what == 5:
            text = text.replace(rng.choice(['"', ",", ":", "yes", "-3", "reply"]), rng.choice(["", "'", "61", "\n"]), 1)
        elif what == 6:
            text = text[at:] + text[:at]
        else:
            text = text.replace("-3", str(rng.randint(-200, 200)), 1)
    return text


def test_mutated_answers_never_raise_anything_else_and_never_leave_the_range() -> None:
    rng = random.Random(1)
    seen: Counter[str] = Counter()
    for k in range(MUTATED):
        anger, trust = rng.randint(-10, 10), rng.randint(-10, 10)
        text = mutated(json.dumps(fields(anger, trust, some_text(rng)), ensure_ascii=bool(k % 2)), rng)
        try:
            answer = read_answer(text, UserState(rng.randint(0, 100), rng.randint(0, 100)))
        except Unreadable as error:
            seen[error.kind] += 1
            continue
        seen["read"] += 1
        for delta in (answer.anger_delta, answer.trust_delta):
            assert type(delta) is int and -10 <= delta <= 10, text
        assert answer.reply and answer.reply == answer.reply.strip() and type(answer.goes_on) is bool, text
        answer.reply.encode(), answer.reflection.encode()
    assert sum(seen.values()) == MUTATED and seen["read"] > 0.1 * MUTATED, seen
    assert {"no_object", "several", "missing", "not_a_number", "out_of_range"} <= set(seen)
