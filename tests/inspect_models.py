"""Models for Inspect that answer from a table and count their tokens, for tests: `scripted/NAME`.

As a program it is the `ctcgrpo` command with these models at hand:  python -m tests.inspect_models evaluate eibench --model ...
$CTCGRPO_TEST_CALLS names a file that gets a byte for each call; $CTCGRPO_TEST_DELAY are seconds that a call takes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, ModelUsage, modelapi

REPLIES = (
    "I hear you, and I am sorry that it came to this.",
    "What you say about it makes sense to me, and I will not hurry you.",
    "You should look on the bright side.",
    "<think>Something kind.</think>I was wrong, and I will put it right this week.",
    "No. Do as you like.",
    "",
)
NAMES = {"demonstrated_empathy": 12, "pragmatic_ei": 10, "depth_of_insight": 9, "social_dexterity": 11}
NAMES |= {"emotional_reasoning": 10, "message_tailoring": 8, "moralising": 3}
OF_ANALYSES = {"depth_of_insight": 10, "emotional_reasoning": 12, "theory_of_mind": 14, "subtext_identification": 8}
OF_ANALYSES |= {"intellectual_grounding": 6, "correctness": 10}


def _pick(n: int, *where: object) -> int:
    return hashlib.sha256("/".join(map(str, where)).encode()).digest()[0] % n


def talker(messages: list[ChatMessage], config: GenerateConfig) -> str:
    """Different replies, the same for the same context and seed."""
    return REPLIES[_pick(len(REPLIES), config.seed, *(m.text for m in messages))]


def user(messages: list[ChatMessage], config: GenerateConfig) -> str:
    """As an LLM that plays the user in EIBench answers."""
    anger, trust = (_pick(13, axis, config.seed, messages[-1].text) - 6 for axis in ("anger", "trust"))
    said = {"reflection": "Hm.", "anger_delta": anger, "trust_delta": trust, "reply": "Go on.", "continue": "yes"}
    return f"```json\n{json.dumps({**said, 'stop_reason': ''})}\n```"


def unsteady_user(messages: list[ChatMessage], config: GenerateConfig) -> str:
    """The same user, who for one turn in five cannot be had to say anything that makes sense."""
    turn = messages[1].text if len(messages) > 1 else ""
    return "I cannot help with that." if not _pick(5, "unsteady", turn) else user(messages, config)


def confidant(messages: list[ChatMessage], config: GenerateConfig) -> str:
    """As the simulator of SAGE answers; the emotion goes up by 8 a turn, so that it ends with 100 after eight changes."""
    if "TargetCompletion" in messages[-1].text:
        return "Content: 安慰\nTargetCompletion: 部分\nActivity: 有点感动\nAnalyse: 觉得被理解了\nChange: +8"
    return "Thinking: 平和\nOrigin: 谢谢。\nChange: 更口语\nResponse:\n“嗯，你说得对。”"


def judge(messages: list[ChatMessage], config: GenerateConfig) -> str:
    """A judge with its mind made up, who writes a number as some do."""
    asked = messages[-1].text
    scores: dict[str, Any] = dict(OF_ANALYSES if "theory_of_mind" in asked else NAMES)
    scores["depth_of_insight"] = f"{scores['depth_of_insight']}/20"
    verdict = json.dumps({"chain_of_thought_reasoning": 'Well, "so".', **scores})
    return f"Here it is:\n```json\n{verdict}\n```"


def confused_judge(messages: list[ChatMessage], config: GenerateConfig) -> str:
    """The same judge, lost for words over a drafted message."""
    return "A moving piece, 18/20." if "Draft brainstorming" in messages[-1].text else judge(messages, config)


ANSWERS: dict[str, Callable[[list[ChatMessage], GenerateConfig], str | ModelOutput]] = {
    f.__name__: f for f in (talker, user, unsteady_user, confidant, judge, confused_judge)
}
ANSWERS["silent"] = lambda messages, config: ""


@modelapi(name="scripted")
class Scripted(ModelAPI):
    async def generate(self, input: list[ChatMessage], tools: Any, tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        if calls := os.environ.get("CTCGRPO_TEST_CALLS"):
            with Path(calls).open("a") as out:
                out.write(".")
        await asyncio.sleep(float(os.environ.get("CTCGRPO_TEST_DELAY", "0")))
        text = ANSWERS[self.model_name](input, config)
        if isinstance(text, ModelOutput):
            return text
        output = ModelOutput.from_content(self.model_name, text)
        read, written = sum(len(m.text) for m in input), len(re.findall(r"\S+", text))
        output.usage = ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
        return output


if __name__ == "__main__":
    import tests.inspect_models  # noqa: F401 - under the name that it is registered by
    from ctcgrpo.cli import main

    main()
