"""Episodes at their own pace, against turns in lockstep and against the longest episode, on the same drawn latencies.

    python -m tests.benchmarks.rollouts [--times 5]

64 episodes of up to 8 turns. The simulator is the real server over loopback, its user as slow as a hosted LLM:
log-normal, median 1.5 s, 99th percentile 10 s. A generator gives 50 tokens/s a request, 64 requests at once. All times are scaled
down tenfold. Latencies depend on the draw, the episode and the turn alone.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ctcgrpo.environments.eibench import EIBench, task_of
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.policy.builtin import build_builtin
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.policy.loading import load_tokenizer, stop_ids
from ctcgrpo.rollout.engine import PolicyEngine, Sampling, request_seed
from ctcgrpo.rollout.runner import Play, RolloutRunner, Slot
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.protocol import Reaction, SimulatorBackend, TurnRequest
from ctcgrpo.simulator.server import SimulatorServer, running
from ctcgrpo.types import Completion

SCALE, EPISODES, TURNS = 0.1, 64, 8
MEDIAN, SPREAD = 1.5, math.log(10 / 1.5) / 2.326
TOKENS_PER_SECOND, AT_ONCE = 50, 64


class Clock:
    """Draws latencies, anew with each `seed`, and adds up what each episode cannot do without."""

    def __init__(self) -> None:
        self.seed = 0
        self.path: dict[str, float] = defaultdict(float)

    def latency(self, episode: str, turn: int) -> float:
        seconds = SCALE * math.exp(random.Random(f"{self.seed}/{episode}/{turn}").gauss(math.log(MEDIAN), SPREAD))
        self.path[episode] += seconds
        return seconds

    def generation(self, episode: str, turn: int) -> tuple[int, float]:
        tokens = random.Random(f"{self.seed}/{episode}/{turn}/tokens").randint(30, 90)
        self.path[episode] += SCALE * tokens / TOKENS_PER_SECOND
        return tokens, SCALE * tokens / TOKENS_PER_SECOND


class SlowUser(SimulatorBackend):
    """A user as slow as a hosted LLM, who leaves after one turn in thirty."""

    name = "slow"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def react(self, request: TurnRequest) -> Reaction:
        _, _, group, _, rollout, turn = request.request_id.split("/")
        await asyncio.sleep(self._clock.latency(f"{group}/{rollout}", int(turn)))
        stays = random.Random(f"{self._clock.seed}/{group}/{rollout}/{turn}/stays").random() > 1 / 30
        return Reaction(reply="And then?", anger_delta=-1, trust_delta=1, goes_on=stays, why="drawn")


class PacedEngine(PolicyEngine):
    """Gives so many tokens a second to each of so many requests at once."""

    def __init__(self, clock: Clock, word: int, slots: Sequence[Slot], seed: int) -> None:
        self._clock, self._word = clock, word
        self._free = asyncio.Semaphore(AT_ONCE)
        self._turns = {
            request_seed(seed, *slot.seeds, turn): (f"{slot.group}/{slot.rollout}", turn + 1)
            for slot in slots
            for turn in range(TURNS)
        }

    async def generate(self, prompt_ids: Sequence[int], *, seed: int, sampling: Sampling) -> Completion:
        tokens, seconds = self._clock.generation(*self._turns[seed])
        async with self._free:
            await asyncio.sleep(seconds)
        return Completion((self._word,) * tokens, (0.0,) * tokens, "length")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5)
    asked = parser.parse_args()
    folder = build_builtin("builtin/tiny", Path(tempfile.mkdtemp()), 0)
    tokenizer = load_tokenizer(folder)
    ends = stop_ids(folder, tokenizer)
    scenarios = load_scenarios("english/train")[:8]
    slots = [
        Slot(task_of(s), 1, group, rollout) for group, s in enumerate(scenarios) for rollout in range(EPISODES // len(scenarios))
    ]
    word = tokenizer.encode("I", add_special_tokens=False)[0]
    clock = Clock()
    with running(SimulatorServer(SCRIPTED_USER, backend=SlowUser(clock)), 0) as url:

        def run(draw: int, deterministic: bool) -> float:
            clock.path.clear()
            clock.seed = draw
            seed = len(turns)  # another run's requests: the server knows a request that comes again, and answers at once
            client = SimulatorClient(url)
            runner = RolloutRunner(
                engine=PacedEngine(clock, word, slots, seed),
                environment=lambda: EIBench(client, briefing=Briefing(), max_turns=TURNS),
                shared=client,
                contexts=ContextBuilder(tokenizer, stop_ids=ends, max_prompt_tokens=4000),
                tokenizer=tokenizer,
                stop_ids=ends,
                play=Play(sampling=Sampling(), max_turns=TURNS, seed=seed, deterministic=deterministic),
            )
            started = time.perf_counter()
            episodes = asyncio.run(runner.run(slots))
            seconds = time.perf_counter() - started
            assert not any(e.failure for e in episodes)
            turns.append(sum(len(e.turns) for e in episodes))
            return seconds

        turns: list[int] = []
        rows = [(run(k, False), max(clock.path.values()), run(k, True)) for k in range(asked.times)]
    assert turns[::2] == turns[1::2]
    longest = ", ".join(f"{path:.2f}" for _, path, _ in rows)
    print(f"{EPISODES} episodes, some {turns[0]} turns; the longest cannot take less than {longest} s")
    for name, values in (
        ("own pace to the longest episode", [free / path for free, path, _ in rows]),
        ("own pace to turns in lockstep", [free / lockstep for free, _, lockstep in rows]),
    ):
        print(f"{name}: {statistics.median(values):.2f} x ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
