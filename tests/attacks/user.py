"""The scripted user: replies that would take it minutes, and what is said to break its judgement."""

from __future__ import annotations

import time

from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.scripted.backend import react
from tests.attacks.suite import Tries, attack
from tests.unit.test_long_requests import request, said
from tests.unit.test_simulator_prompts import HOSTILE

_SECONDS = 3.0
"""A reaction takes at most so long, on a slow machine too."""


@attack("user", seconds=40)
def endless_replies(tries: Tries) -> None:
    """2,000 empty replies, and replies of one part repeated to 64,000 characters and a million."""
    rng = tries.rng("replies")
    parts = ["I'm ", "But I ", "a! ", "*", "(", "你好吗我", "?!", "\n", "I think of you. ", "\u2028", "don't ", '"', "，。"]
    parts += ["".join(rng.choices("abI'm ,.!?-\"()*我你。，", k=rng.randrange(1, 9))) for _ in range(6)]
    histories = {"2,000 empty replies": said(*[""] * 2000), "2,000 short replies": said(*["Ok."] * 2000)}
    histories |= {repr(part): said(part * (64_000 // len(part))) for part in parts}
    histories["a million characters"] = said("I'm " * 250_000)
    for name, history in histories.items():
        with tries.one(name):
            started = time.perf_counter()
            assert react(request(history)).why
            seconds = time.perf_counter() - started
            assert seconds < _SECONDS, f"judged in {seconds:.1f} s"


@attack("user", quick=True)
def hostile_replies(tries: Tries) -> None:
    """Replies that ask for a score, close its quotation marks or hold odd characters: changes stay within their range."""
    for k, text in enumerate(HOSTILE[:-1]):
        with tries.one(f"hostile reply {k}"):
            try:
                reaction = react(request(said(text.encode("utf-8", "replace").decode())))
            except SimulatorReplyError:
                continue
            assert -10 <= reaction.anger_delta <= 10 and -10 <= reaction.trust_delta <= 10
            assert reaction.trust_delta <= 0 or "trust" not in text.lower(), f"{text[:80]!r} was rewarded: {reaction.why}"
