"""The token ids that each turn of the policy is sampled from, and trained on.

A context is laid out message by message, each piece encoded once:

    head (system, first user line) | reply | user line | reply | user line | ... | generation prompt

so the unchanged part of a turn's prompt equals the earlier turn's, id by id. Replies are the sampled ids themselves; they
are never decoded and encoded again. With `reasoning="strip"` (the paper) earlier turns keep their visible reply only, as
the model is deployed; with "keep" they keep every sampled token.

A prompt that is too long drops the oldest exchange, never the system prompt and never the latest line of the user.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ctcgrpo.errors import PolicyEngineError, PolicyError
from ctcgrpo.policy.persona import told
from ctcgrpo.policy.reasoning import CLOSE, OPEN, parse_completion
from ctcgrpo.records import Completion, Scenario

ReasoningPolicy = Literal["strip", "keep"]
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A reply of the policy as context ids, and the user's answer to it."""

    reply_ids: Ids
    user_line: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation so far, from the policy's side. `opening_line` is empty where the policy opens."""

    policy_persona: str
    opening_line: str
    exchanges: tuple[Exchange, ...] = ()


class ContextBuilder:
    """Builds prompts for one tokenizer and chat template. Raises PolicyError for a template that cannot serve."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Iterable[int],
        max_prompt_tokens: int,
        reasoning: ReasoningPolicy = "strip",
        persona_sections: Sequence[str] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._max_prompt_tokens = max_prompt_tokens
        self._reasoning = reasoning
        self._persona_sections = persona_sections
        self._template_kwargs = dict(template_kwargs or {})
        if not getattr(tokenizer, "chat_template", None):
            raise PolicyError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template; "
                "choose an instruct model or set its chat_template"
            )
        self._before_reply, self._between, self._after_user, self._generation = self._probe_template()
        self._generation_ids = self._encode(self._generation)
        # What is kept was sampled behind the generation prompt, which may open the reasoning; history proper may not.
        self._before_reply_ids = self._generation_ids if reasoning == "keep" else self._encode(self._before_reply)
        self._head_ids = lru_cache(maxsize=4096)(self._encode_head)
        self._glue_ids = lru_cache(maxsize=65536)(self._encode_glue)

    @property
    def opens_reasoning(self) -> bool:
        """Whether the generation prompt already opens the reasoning, so that completions begin inside it."""
        return OPEN in self._generation and CLOSE not in self._generation.rpartition(OPEN)[2]

    def start(self, scenario: Scenario) -> Dialogue:
        return Dialogue(told(scenario.policy_persona, self._persona_sections), scenario.opening_line)

    def extend(self, dialogue: Dialogue, completion: Completion, user_line: str) -> Dialogue:
        """The dialogue after the policy's completion and the user's answer."""
        ids = completion.token_ids
        if ids and ids[-1] in self._stop_ids:
            ids = ids[:-1]
        if self._reasoning == "strip":
            ids = self._visible(ids)
        return replace(dialogue, exchanges=(*dialogue.exchanges, Exchange(ids, user_line.strip())))

    def prompt(self, dialogue: Dialogue) -> tuple[Ids, int]:
        """The prompt ids of the policy's next turn, and how many exchanges were dropped to make them fit."""
        first_line, exchanges = dialogue.opening_line, dialogue.exchanges
        # Where the policy opens, the latest user line lives in the last exchange, which therefore has to stay.
        last_droppable = len(exchanges) - (0 if first_line else 1)
        for dropped in range(max(0, last_droppable) + 1):
            opening = first_line if not dropped or not first_line else exchanges[dropped - 1].user_line
            ids = list(self._head_ids(dialogue.policy_persona, opening))
            for exchange in exchanges[dropped:]:
                ids += self._before_reply_ids
                ids += exchange.reply_ids
                ids += self._glue_ids(exchange.user_line)
            ids += self._generation_ids
            if len(ids) <= self._max_prompt_tokens:
                return tuple(ids), dropped
        raise PolicyEngineError(
            f"system prompt and latest user line take {len(ids)} tokens; "
            f"rollout.max_prompt_tokens is {self._max_prompt_tokens}"
        )

    def check(self, scenarios: Iterable[Scenario]) -> None:
        """Refuse, before any rollout, scenarios whose first prompt does not fit or whose template cannot open."""
        scenarios = list(scenarios)
        for scenario in scenarios:
            try:
                self.prompt(self.start(scenario))
            except PolicyEngineError as error:
                raise PolicyError(f"scenario {scenario.id!r}: {error}; raise it or drop the scenario") from None
            except PolicyError as error:
                raise PolicyError(f"scenario {scenario.id!r}: {error}") from None
        if any(scenario.policy_opens for scenario in scenarios):
            self._check_system_only()

    # --- chat template -----------------------------------------------------------------------------------------------

    def _render(self, messages: list[dict[str, str]], generation: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **self._template_kwargs
            )
        except TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise PolicyError(
                f"the chat template of {self._tokenizer.name_or_path!r} refuses messages ({roles}): {error}"
            ) from None
        return str(text)

    def _probe_template(self) -> tuple[str, str, str, str]:
        """The template's text before a reply, between a reply and a user line, after a user line, and its prompt."""
        reply, line = "PROBE-REPLY", "PROBE-LINE"
        opening = [{"role": "system", "content": "PROBE-SYSTEM"}, {"role": "user", "content": "PROBE-OPENING"}]
        head = self._render(opening)
        full = self._render([*opening, {"role": "assistant", "content": reply}, {"role": "user", "content": line}])
        prompted = self._render(opening, generation=True)
        before_reply, found_reply, rest = full[len(head) :].partition(reply)
        between, found_line, after_user = rest.partition(line)
        if not (full.startswith(head) and prompted.startswith(head) and found_reply and found_line):
            raise PolicyError(
                f"the chat template of {self._tokenizer.name_or_path!r} does not render message by message, "
                "so contexts would not stay a prefix from turn to turn; set another chat_template"
            )
        return before_reply, between, after_user, prompted[len(head) :]

    def _check_system_only(self) -> None:
        system = [{"role": "system", "content": "PROBE-SYSTEM"}]
        reply, line = {"role": "assistant", "content": "R"}, {"role": "user", "content": "L"}
        head = self._render(system)
        expected = head + self._before_reply + "R" + self._between + "L" + self._after_user
        prompted = self._render(system, generation=True)
        if self._render([*system, reply, line]) != expected or prompted != head + self._generation:
            raise PolicyError(
                f"the chat template of {self._tokenizer.name_or_path!r} cannot open a dialogue from a system message alone, "
                "which scene charm needs; leave charm out with scenarios.scenes or set another chat_template"
            )

    # --- pieces --------------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> Ids:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _encode_head(self, persona: str, opening_line: str) -> Ids:
        words = {"system": persona, "user": opening_line}
        messages = [{"role": role, "content": f"PROBE-{role}"} for role, text in words.items() if text]
        rest = self._render(messages)
        ids: Ids = ()
        for message in messages:
            before, _, rest = rest.partition(message["content"])
            ids += self._encode(before) + self._words(words[message["role"]])
        return ids + self._encode(rest)

    def _encode_glue(self, user_line: str) -> Ids:
        return self._encode(self._between) + self._words(user_line) + self._encode(self._after_user)

    def _words(self, text: str) -> Ids:
        """What somebody says are words, whatever they spell: no control token comes out of them."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _visible(self, ids: Ids) -> Ids:
        """The sampled ids after the reasoning, or none where it was never closed."""
        text = self._tokenizer.decode(ids)
        parsed = parse_completion(text, "stop", self.opens_reasoning)
        reply = parsed.reply
        if not reply:
            return ()
        if parsed.reasoning is None:
            return ids
        for cut in range(len(ids), -1, -1):
            rest = self._tokenizer.decode(ids[cut:])
            if rest.rstrip() == reply:
                return ids[cut:]
            if CLOSE in rest:
                break
        # A token straddles the closing tag and the reply, or tags are broken and the user saw the reply without them: this
        # text is context only, so encoding it anew is exact.
        return self._encode(reply)
