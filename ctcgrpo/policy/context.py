"""The token ids that each turn of the policy is sampled from, and trained on.

A context is a sequence of segments. Each is encoded once and in one piece, with the ids that the chat template's whole text has:

    head (system, first user line) | reply | user line | reply | user line | ... | generation prompt

so the unchanged part of a turn's prompt equals the earlier turn's, id by id. The system message is optional, and a "line" may be
several messages, if the chat template renders them. Replies are the sampled ids, if they decode to what the template writes. With
`reasoning="strip"` (the paper) earlier turns keep only their visible reply, as the model is deployed; with "keep" they keep every
sampled token. Text of users and policies never becomes a control token.

A prompt that is too long drops the oldest exchange, but never the system prompt or the latest observation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from ctcgrpo.environments.eibench.persona import BETWEEN, together
from ctcgrpo.errors import PolicyEngineError, PolicyError
from ctcgrpo.policy.chat_template import ANOTHER, USUAL, ChatTemplate, ControlTokens, Layout, Roles
from ctcgrpo.policy.reasoning import CLOSE, OPEN, parse_completion
from ctcgrpo.types import Completion, Message, Observation

ReasoningPolicy = Literal["strip", "keep"]
Ids = tuple[int, ...]

_ANCHORS = ("a", ".", "1", "Q", "。", "\n")
"""Prefixes for encoding a text in the middle of a dialogue: the first whose tokens do not merge with the text's is used."""
_ODD_REPLY = 'I hear you. "Quite" & <i>so</i>:\n\n- it\'s {1}\n  100 %'
_ODD_LINE = 'It is "so" & <i>so</i>, ' + "and so on, " * 60 + "as I said."
"""Probes: a template that escapes, shortens or re-formats contents changes them."""


class Line(NamedTuple):
    """A message that the policy did not sample. `instructions` is the developer's text after `content`; only there control tokens
    (<think>) are encoded as such."""

    role: str
    content: str
    instructions: str = ""

    @property
    def text(self) -> str:
        return together(self.content, self.instructions)


class Exchange(NamedTuple):
    """A reply of the policy as context ids, and the observation after it."""

    reply_ids: Ids
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue so far, as the policy sees it. `opening`: the first observation; empty where the policy opens."""

    system: Line | None
    opening: tuple[Line, ...]
    exchanges: tuple[Exchange, ...] = ()

    @property
    def opening_text(self) -> str:
        return "\n\n".join(line.text for line in self.opening)


class ContextBuilder:
    """Builds prompts for one tokenizer and chat template. Raises PolicyError for a template that cannot be used."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Iterable[int],
        max_prompt_tokens: int,
        reasoning: ReasoningPolicy = "strip",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self._max_prompt_tokens = max_prompt_tokens
        self._reasoning = reasoning
        self._template = ChatTemplate(tokenizer, template_kwargs)
        self._control = ControlTokens(tokenizer)
        self._prompt = self._template.layout(USUAL).prompt
        # If the template writes a space before a reply but not at the end of the prompt, the policy samples it.
        before = self._template.layout(USUAL).before_reply
        self._sampled_lead = before[len(self._prompt) :] if before.startswith(self._prompt) else ""
        if unsaid := self._sampled_lead.replace(OPEN, "").replace(CLOSE, "").strip():
            problem = f"{self._template.name} writes {unsaid!r} before a reply in history, but not in the prompt for one"
            raise PolicyError(f"{problem}; {ANOTHER}")
        self._remember()

    def _remember(self) -> None:
        self._head_ids = lru_cache(maxsize=4096)(self._encode_head)
        self._line_ids = lru_cache(maxsize=65536)(self._encode_lines)

    @property
    def opens_reasoning(self) -> bool:
        """Whether the generation prompt already opens the reasoning, so that completions begin inside it."""
        return OPEN in self._prompt and CLOSE not in self._prompt.rpartition(OPEN)[2]

    def notes(self, openings: Iterable[Sequence[Message]]) -> list[str]:
        """Remarks for the log on how dialogues with these first messages are put into prompts."""
        roles = {tuple(message["role"] for message in messages) for messages in openings}
        folded = [each for each in roles if self._template.layout(each).folded]
        notes = []
        if folded:
            which = "every dialogue" if any("user" in each for each in folded) else "dialogues that the policy opens"
            notes.append(f"takes no system message: in {which} the persona is part of the first user turn")
        if self._control.first(self._template.layout(USUAL).between[0]) is None:
            ends = "only the model's end-of-sequence token ends one, which earlier turns in prompts do not show"
            notes.append(f"ends replies with plain text: {ends}")
        if self._template.uses_today():
            advice = "fix the date, for example with policy.template_kwargs={date_string: 26 Jul 2024}"
            notes.append(f"puts today's date into prompts, so the same dialogue has another prompt tomorrow; {advice}")
        return [f"{self._template.name} {note}" for note in notes]

    def start(self, messages: Sequence[Message]) -> Dialogue:
        """The dialogue that begins with these messages: an optional system message, then usually a user's line, or nothing where
        the policy opens. Raises PolicyEngineError where there is nothing to reply to, and for an order of roles that the chat
        template cannot render."""
        roles = [message["role"] for message in messages]
        if not roles or roles[-1] == "assistant":
            begins = f"messages of {', '.join(roles)}" if roles else "no message"
            expected = "expected the last one to be of user or system, since the policy replies to it"
            raise PolicyEngineError(f"an episode begins with {begins}; {expected}")
        self._layout(tuple(roles))
        lines = tuple(map(_line, messages))
        return Dialogue(lines[0], lines[1:]) if roles[0] == "system" else Dialogue(None, lines)

    def extend(self, dialogue: Dialogue, completion: Completion, observation: Observation) -> Dialogue:
        """The dialogue after a completion and the next observation. Raises PolicyEngineError for roles as `start` does."""
        ids = completion.token_ids
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        if self._reasoning == "strip":
            ids = self._as_rendered(ids)
        messages: Sequence[Message] = [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
        lines = tuple(map(_line, messages))
        self._layout(_roles(dialogue.system, dialogue.opening), _roles(None, lines))
        return replace(dialogue, exchanges=(*dialogue.exchanges, Exchange(ids, lines)))

    def prompt(self, dialogue: Dialogue) -> tuple[Ids, int]:
        """The prompt ids of the policy's next turn, and the number of exchanges dropped to fit `max_prompt_tokens`."""
        exchanges = dialogue.exchanges
        # Where the policy opens, the latest observation is in the last exchange, which therefore has to stay.
        last_droppable = len(exchanges) - (0 if dialogue.opening else 1)
        for dropped in range(max(0, last_droppable) + 1):
            opening = exchanges[dropped - 1].lines if dropped and dialogue.opening else dialogue.opening
            head = opening if dialogue.system is None else (dialogue.system, *opening)
            kept = exchanges[dropped:]
            ids = list(self._head_ids(head, not kept))
            for k, exchange in enumerate(kept, start=1):
                ids += exchange.reply_ids
                ids += self._line_ids(_roles(None, head), exchange.lines, k == len(kept))
            if len(ids) <= self._max_prompt_tokens:
                return tuple(ids), dropped
        limit = f"max_prompt_length (in a recipe rollout.max_prompt_tokens) is {self._max_prompt_tokens}"
        raise PolicyEngineError(f"system prompt and latest user line take {len(ids)} tokens; {limit}")

    def _layout(self, head: Roles, observation: Roles = ("user",)) -> Layout:
        """Raises PolicyEngineError, which fails the episode, for roles that the template cannot render."""
        try:
            return self._template.layout(head, observation)
        except PolicyError as error:
            raise PolicyEngineError(str(error)) from None

    def check(self, openings: Mapping[str, Sequence[Message]], noun: str = "scenario") -> None:
        """Check, before any rollout, that the first prompts of tasks fit (`openings`: their first messages, by id; errors call one
        a `noun`), and that the ids of a dialogue are those of the template's own text. Raises PolicyError."""
        for name, messages in openings.items():
            try:
                self.prompt(self.start(messages))
            except (PolicyError, PolicyEngineError) as error:
                advice = f"; raise it or drop the {noun}" if "max_prompt_tokens" in str(error) else ""
                raise PolicyError(f"{noun} {name!r}: {error}{advice}") from None
            self._rendered.check_dialogue(f"{noun} {name!r}", messages)

    @cached_property
    def _rendered(self) -> ContextBuilder:
        """A copy without a limit of length that strips reasoning from earlier turns, as templates do."""
        twin = copy(self)
        twin._max_prompt_tokens, twin._reasoning = sys.maxsize, "strip"
        twin._remember()
        return twin

    def check_dialogue(self, name: str, messages: Sequence[Message]) -> None:
        """Compare the prompts of a dialogue's first turns with the template's text of the same messages. Raises PolicyError."""
        dialogue = self.start(messages)
        lines = [line for line in (dialogue.system, *dialogue.opening) if line is not None]
        head = [{"role": line.role, "content": line.text} for line in lines]
        spelled = any(self._control.find(line.content) for line in lines)
        last = lines[-1].text if lines[-1].role == "user" else (lines[-1].text.splitlines() or [""])[-1].strip()
        probes: list[tuple[str, str]] = []
        for reply in (_ODD_REPLY, "Go on, then"):
            text = self._template.render(self._template.messages(head, probes))
            ids, _ = self.prompt(dialogue)
            own = tuple(self._tokenizer.encode(text, add_special_tokens=False))
            # After a reply a tokenizer may merge sampled tokens with what follows; then only the texts are compared.
            if ids != own and (self._text(ids) != self._text(own) or not (probes or spelled)):
                raise PolicyError(self._difference(name, len(probes) + 1, ids, own))
            probes.append((reply, f"{last}\n{_ODD_LINE}"))
            exchange = Exchange(self._encode_reply(reply), (Line("user", probes[-1][1]),))
            dialogue = replace(dialogue, exchanges=(*dialogue.exchanges, exchange))

    def _difference(self, name: str, turn: int, ids: Ids, own: Ids) -> str:
        at = next((k for k, (a, b) in enumerate(zip(ids, own, strict=False)) if a != b), min(len(ids), len(own)))
        here, there = (self._tokenizer.convert_ids_to_tokens(list(part[max(0, at - 2) : at + 4])) for part in (ids, own))
        what = f"{name}: the prompt of turn {turn} is not what {self._template.name} renders: at token {at} it has {here}"
        return f"{what}, the template's own text {there}; {ANOTHER}"

    def _encode_head(self, head: tuple[Line, ...], last: bool) -> Ids:
        layout = self._layout(_roles(None, head))
        ending = self._ending(layout.first_prompt, layout.before_first_reply, last)
        return self._encode(_around(head, layout.opens, ending))

    def _encode_lines(self, head: Roles, lines: tuple[Line, ...], last: bool) -> Ids:
        """An observation after a reply, with the end of that reply and the start of the next one."""
        layout = self._layout(head, _roles(None, lines))
        ending = self._ending(layout.prompt, layout.before_reply, last)
        return self._encode(_around(lines, layout.between, ending), behind=_ANCHORS)

    def _ending(self, prompt: str, before_reply: str, last: bool) -> str:
        # With "keep", replies were sampled after the generation prompt, which may open the reasoning; history does not open it.
        return prompt if last or self._reasoning == "keep" else before_reply.removesuffix(self._sampled_lead)

    def _as_rendered(self, ids: Ids) -> Ids:
        """The visible part of a completion in later prompts: the sampled ids, if they decode to what the template writes. Else
        (white space around it, a tag or a token across its edge, a control token in it) the encoded text of the reply. This is
        exact, since these ids are context and are not trained on."""
        parsed = parse_completion(self._tokenizer.decode(ids), "stop", self.opens_reasoning)
        wanted = self._sampled_lead + parsed.reply
        visible = ids if parsed.reasoning is None else self._tail(ids, wanted)
        if parsed.reply and self._text(visible) == wanted and self._control.ids.isdisjoint(visible):
            return visible
        return self._encode_reply(parsed.reply)

    def _tail(self, ids: Ids, wanted: str) -> Ids:
        """The shortest suffix of the ids whose text is at least as long as `wanted`."""
        ends = (ids[cut:] for cut in range(len(ids) - 1, -1, -1))
        return next((end for end in ends if len(self._text(end)) >= len(wanted)), ids)

    def _encode_reply(self, reply: str) -> Ids:
        return self._encode([self._sampled_lead, reply], behind=(self._prompt, *_ANCHORS))

    def _text(self, ids: Ids) -> str:
        """The text of ids in the middle of a dialogue; at the start of a text some tokenizers drop a space."""
        anchor = self._plainly(_ANCHORS[0])
        return str(self._tokenizer.decode([*anchor, *ids])).removeprefix(self._tokenizer.decode(anchor))

    def _encode(self, parts: Sequence[str], behind: Sequence[str] = ()) -> Ids:
        """Encode texts of the template (even positions) and of messages (odd positions) in one piece, so that tokens merge across
        their boundaries as in the whole text. `behind`: prefixes. Texts of messages give no control tokens."""
        text = "".join(parts)
        starts = list(accumulate(map(len, parts), initial=0))
        words = [(start, part) for start, part in zip(starts[1::2], parts[1::2], strict=False)]
        literal = sum(len(self._control.find(part)) for part in parts[::2])
        spelled = [start + at + 1 for start, part in words for at, _ in self._control.find(part)]
        each_character = [start + k for start, part in words for k in range(1, len(part))]
        for cuts in (spelled, each_character):  # tokenizers that normalise may see control tokens that are not spelled out
            first, *pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
            ids = self._encode_behind(first, behind) if behind else self._plainly(first)
            for piece in pieces:
                ids += self._encode_behind(piece, _ANCHORS)
            if sum(k in self._control.ids for k in ids) == literal:
                return ids
        raise PolicyEngineError(f"a line reads as control tokens to this tokenizer, however it is cut: {text[:80]!r}")

    def _encode_behind(self, text: str, anchors: Sequence[str]) -> Ids:
        """The ids of a text in the middle of a dialogue: it is encoded after a prefix, whose ids are removed."""
        for anchor in anchors:
            before, whole = self._plainly(anchor), self._plainly(anchor + text)
            if whole[: len(before)] == before:
                return whole[len(before) :]
        raise PolicyEngineError(f"this tokenizer merges {text[:40]!r} with any text before it")

    def _plainly(self, text: str) -> Ids:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))


def _line(message: Message) -> Line:
    """Raises PolicyEngineError for instructions that are not the end of the content."""
    content, instructions = message["content"].strip(), message.get("instructions", "")
    if not content.endswith(instructions):
        found = f"a message of {message['role']} has the instructions {instructions[:40]!r}"
        raise PolicyEngineError(f"{found}, which are not the end of its content")
    words = content.removesuffix(instructions).removesuffix(BETWEEN) if instructions else content
    return Line(message["role"], words, instructions)


def _roles(system: Line | None, lines: Sequence[Line]) -> Roles:
    return tuple(line.role for line in (system, *lines) if line is not None)


def _around(lines: Sequence[Line], before: Sequence[str], ending: str) -> list[str]:
    """Texts of the template (even positions) and of messages (odd positions), alternating."""
    parts = [before[0]]
    for line, literal in zip(lines, (*before[1:], ending), strict=True):
        parts += [line.content, line.text.removeprefix(line.content) + literal]
    return parts
