"""A policy that replies in a conversation."""

import time
from collections.abc import Sequence
from dataclasses import replace

from ctcgrpo.chat.conversation import Conversation, Reply, add_replies, dialogue_of, say_line
from ctcgrpo.policy.reasoning import parse_completion
from ctcgrpo.rollout.engine import Sampling, request_seed
from ctcgrpo.run.opened_policy import OpenedPolicy


class Speaker:
    """Replies with an opened policy, as it was trained to: the same contexts, and `sampling`."""

    def __init__(self, name: str, policy: OpenedPolicy, sampling: Sampling) -> None:
        """Raises PolicyError for an unusable chat template."""
        self.name = name
        self.sampling = sampling
        self._policy = policy
        self._contexts = policy.contexts()

    async def reply(self, conversation: Conversation, place: int, seed: int) -> Reply:
        """To the last line; `place` is this policy's in the conversation. Raises PolicyEngineError, for example where the line is
        too long for a prompt."""
        started = time.perf_counter()
        prompt, _ = self._contexts.prompt(dialogue_of(conversation, place, self._contexts))
        room = min(self.sampling.max_new_tokens, self._policy.room_after(len(prompt)))
        sampling = replace(self.sampling, max_new_tokens=room)
        completion = await self._policy.engine.generate(
            prompt, seed=request_seed("chat", seed, len(conversation.lines)), sampling=sampling
        )
        ids = [token for token in completion.token_ids if token not in self._policy.stop_ids]
        parsed = parse_completion(self._policy.tokenizer.decode(ids), completion.finish_reason, self._contexts.opens_reasoning)
        return Reply(parsed.reply, parsed.reasoning, parsed.faults, completion, time.perf_counter() - started)

    def close(self) -> None:
        """Free the engine's thread and caches."""
        self._policy.engine.close()


async def converse(conversation: Conversation, line: str, speakers: Sequence[Speaker], seed: int) -> Conversation:
    """The conversation after a line and the replies of all policies, one after the other, sampled with the same seed. Raises
    ValueError for an empty line, PolicyEngineError as `Speaker.reply`; the conversation then stays as it was."""
    extended = say_line(conversation, line)
    return add_replies(extended, [await speaker.reply(extended, k, seed) for k, speaker in enumerate(speakers)])
