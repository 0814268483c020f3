"""What a chat template puts around the messages of a dialogue, found by rendering probes.

A prompt is a system message, lines of the user and replies of the policy, with the template's own text between them:

    lead SYSTEM joint USER before_reply REPLY between USER ... prompt

A template that drops, repeats, moves or rewrites a message, or that renders a dialogue otherwise once it is longer, is refused: its
contexts would not be what the model was taught. One that knows no system role gets the persona in the first user turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ctcgrpo.errors import PolicyError
from ctcgrpo.time_limit import time_limit

Message = dict[str, str]

FOLD = "\n\n"
"""Between persona and first line where both stand in the first user turn."""
_RENDER_SECONDS = 30.0
_MANY = 16
"""Exchanges of the longest dialogue that is probed: some templates keep the last messages only."""
_TODAY = "PROBE-TODAY"
_TEMPLATE_ERRORS = (
    TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""What an expression in a template may raise."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The template's text around the messages of a dialogue that the user opens, or that the policy opens.

    `before_first_reply` and `before_reply` stand between a line of the user (the first one, a later one) and the policy's reply;
    `first_prompt` and `prompt` stand there in place of them while the reply is still to be sampled. `folded`: the persona is part
    of the first user turn. `joint` stands between persona and first line; it is empty where the policy opens.
    """

    lead: str
    joint: str
    before_first_reply: str
    first_prompt: str
    between: str
    before_reply: str
    prompt: str
    folded: bool


class ChatTemplate:
    """One tokenizer's chat template with the arguments that it is rendered with. Raises PolicyError where there is none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs or {})
        self.name = f"the chat template of {tokenizer.name_or_path!r}"
        if not getattr(tokenizer, "chat_template", None):
            raise PolicyError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template; choose an instruct model, or name a template "
                "file with policy.chat_template"
            )
        self.layout = lru_cache(maxsize=2)(self._find_layout)

    def render(self, messages: Sequence[Message], **kwargs: Any) -> str:
        """The prompt for the policy's next reply. Raises PolicyError where the template refuses these messages or does not end."""
        roles = ", ".join(m["role"] for m in messages)
        try:
            with time_limit(_RENDER_SECONDS):
                return str(
                    self._tokenizer.apply_chat_template(
                        list(messages), tokenize=False, add_generation_prompt=True, **{**self._kwargs, **kwargs}
                    )
                )
        except TimeoutError:
            raise PolicyError(
                f"{self.name} was still rendering after {_RENDER_SECONDS:g} s; set policy.chat_template"
            ) from None
        except _TEMPLATE_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise PolicyError(f"{self.name} refuses messages ({roles}): {reason.splitlines()[0]}") from None

    def messages(self, persona: str, opening: str, exchanges: Sequence[tuple[str, str]] = ()) -> list[Message]:
        """A dialogue as the template is given it; `opening` is empty where the policy opens. Exchanges are (reply, user line)."""
        if self.layout(not opening).folded:
            first = [{"role": "user", "content": persona + FOLD + opening if opening else persona}]
        else:
            first = _unfolded(persona, opening)
        return [*first, *_exchanged(exchanges)]

    def uses_today(self) -> bool:
        """Whether today's date enters prompts, so that the same dialogue has another context tomorrow."""
        persona, opening = "PROBE-SYSTEM", "PROBE-OPENING"
        shadowed = "{% macro strftime_now(format) %}" + _TODAY + "{% endmacro %}" + self._tokenizer.get_chat_template()
        return _TODAY in self.render(self.messages(persona, opening), chat_template=shadowed)

    def _find_layout(self, policy_opens: bool) -> Layout:
        """Raises PolicyError for a template that cannot serve dialogues of this kind."""
        persona, opening = "PROBE-SYSTEM", "" if policy_opens else "PROBE-OPENING"
        try:
            return self._layout(_unfolded(persona, opening), folded=False)
        except _NoSystemRole:
            if policy_opens:
                first, probes = [{"role": "user", "content": persona}], [persona]
            else:
                first, probes = [{"role": "user", "content": persona + FOLD + opening}], [persona, opening]
            return self._layout(first, folded=True, probes=probes)

    def _layout(self, first: list[Message], *, folded: bool, probes: list[str] | None = None) -> Layout:
        firsts = probes or [m["content"] for m in first]
        counts = (0, 1, 2, 3, _MANY)
        parts = [self._parts(first, firsts, exchanges, folded) for exchanges in counts]
        n = len(firsts)
        opens, once, twice = parts[:3]
        lead, joint = opens[0], opens[1] if n == 2 else ""
        before_first, between, prompt = once[n], once[n + 1], once[n + 2]
        before = twice[n + 2]
        head = [lead, joint][:n]
        expected = [
            [*head, before_first, between, *[before, between] * (k - 1), prompt] if k else [*head, opens[n]] for k in counts
        ]
        if parts != expected:
            shorter, longer = next((a, b) for a, b in zip(expected, parts, strict=True) if a != b)
            was, now = next((a, b) for a, b in zip(shorter, longer, strict=True) if a != b)
            raise PolicyError(
                f"{self.name} does not render message by message: where it wrote {was[-60:]!r} it writes {now[-60:]!r} once the "
                "dialogue is longer; set policy.chat_template to a file with another one"
            )
        return Layout(lead, joint, before_first, opens[n], between, before, prompt, folded)

    def _parts(self, first: list[Message], firsts: list[str], exchanges: int, folded: bool) -> list[str]:
        """What the template writes around the messages of a dialogue, each of which it must render once and in its place."""
        said = [(f"PROBE-REPLY-{k:02}", f"PROBE-LINE-{k:02}") for k in range(exchanges)]
        messages = [*first, *_exchanged(said)]
        try:
            rest = text = self.render(messages)
        except PolicyError:
            if folded or exchanges > 1:
                raise
            raise _NoSystemRole from None
        parts = []
        contents = [*firsts, *(text for exchange in said for text in exchange)]
        for k, content in enumerate(contents):
            before, found, rest = rest.partition(content)
            if not found:
                if k == 0 and not folded and content not in text:
                    raise _NoSystemRole
                raise PolicyError(self._why_lost(contents, text, messages))
            parts.append(before)
        if again := next((content for content in contents if text.count(content) > 1), None):
            raise PolicyError(f"{self.name} repeats the {_role(again, messages)} message; set policy.chat_template")
        return [*parts, rest]

    def _why_lost(self, contents: Sequence[str], text: str, messages: list[Message]) -> str:
        lost = next((content for content in contents if content not in text), None)
        if lost is None:
            order = [_role(content, messages) for content in sorted(contents, key=text.index)]
            how = f"renders messages in another order ({', '.join(order)})"
        else:
            how = f"{'rewrites' if lost.casefold() in text.casefold() else 'drops'} the {_role(lost, messages)} message"
        return f"{self.name} {how}; set policy.chat_template to a file with another one"


class _NoSystemRole(Exception):
    """The template refuses or drops a system message."""


def _unfolded(persona: str, opening: str) -> list[Message]:
    first = [{"role": "system", "content": persona}]
    return [*first, {"role": "user", "content": opening}] if opening else first


def _exchanged(exchanges: Sequence[tuple[str, str]]) -> list[Message]:
    return [
        message
        for reply, line in exchanges
        for message in ({"role": "assistant", "content": reply}, {"role": "user", "content": line})
    ]


def _role(content: str, messages: list[Message]) -> str:
    return next(m["role"] for m in messages if content in m["content"])


_MARKUP = re.compile(r"\s*[<\[{|].+[>\]}|]\s*", re.DOTALL)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class ControlTokens:
    """The tokens that no text of a person or a policy may turn into: special tokens, and added ones that look like markup (words
    that were added are words). `ids` leaves out what stands for unknown text and for bytes, since any text may need them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        by_text = {text: k for text, k in tokenizer.get_added_vocab().items() if _MARKUP.fullmatch(text)}
        by_text |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.ids = frozenset(k for text, k in by_text.items() if not _BYTE.fullmatch(text)) - {tokenizer.unk_token_id}
        self._by_text = by_text
        longest_first = sorted(by_text, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def find(self, text: str) -> list[tuple[int, int]]:
        """Where `text` spells such tokens out, as (start, end)."""
        return [match.span() for match in self._pattern.finditer(text)] if self._pattern else []

    def first(self, text: str) -> int | None:
        """The id of the first one in `text`."""
        spans = self.find(text)
        return self._by_text[text[spans[0][0] : spans[0][1]]] if spans else None


def end_of_turn(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None) -> int | None:
    """The control token that the template writes behind a reply, which is how the model was taught to end one; None where the
    template ends replies with plain text."""
    template = ChatTemplate(tokenizer, kwargs)
    return ControlTokens(tokenizer).first(template.layout(False).between)
