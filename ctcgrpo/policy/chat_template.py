"""The text that a chat template puts around the messages of a dialogue, found by rendering probes.

A prompt consists of the first messages of a dialogue (its head: usually a system message and a line of the user), then of each
reply of the policy and the observation after it (usually a line of the user), with the template's own text between them:

    opens[0] SYSTEM opens[1] USER before_reply REPLY between[0] USER ... prompt

A template is refused if it drops, repeats, moves or rewrites a message, or renders earlier messages differently in a longer
dialogue: contexts would differ from those that the model was trained on. For a template without a system role the system message
is put into the first user turn."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ctcgrpo.errors import PolicyError
from ctcgrpo.util.time_limit import time_limit

Message = dict[str, str]
Roles = tuple[str, ...]
USUAL: Roles = ("system", "user")  # how most dialogues begin

FOLD = "\n\n"  # between system message and first line where both are in the first user turn
_MARKUP = re.compile(r"\s*[<\[{|].+[>\]}|]\s*", re.DOTALL)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_RENDER_SECONDS = 30.0
ANOTHER = "set another chat_template (in a recipe policy.chat_template, a file)"  # advice in errors
_MANY = 16  # exchanges of the longest dialogue that is probed: some templates keep the last messages only
_TODAY = "PROBE-TODAY"
_TEMPLATE_ERRORS = (
    TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""Exceptions that an expression in a template may raise."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The template's text around the messages of dialogues whose messages have certain roles.

    `opens` (n,): before each message of the head. `between` (m,): before each message of an observation after a reply.
    `before_first_reply`, `before_reply`: between a message (the head's last, a later one) and the policy's reply in history.
    `first_prompt`, `prompt`: the same where the reply is still to be sampled. `folded`: the system message is part of the first
    user turn."""

    opens: tuple[str, ...]
    before_first_reply: str
    first_prompt: str
    between: tuple[str, ...]
    before_reply: str
    prompt: str
    folded: bool


class ChatTemplate:
    """A tokenizer's chat template with its arguments for rendering. Raises PolicyError where there is none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs or {})
        self.name = f"the chat template of {tokenizer.name_or_path!r}"
        if not getattr(tokenizer, "chat_template", None):
            raise PolicyError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template; choose an instruct model, or {ANOTHER}"
            )
        self.layout = lru_cache(maxsize=256)(self._find_layout)

    def render(self, messages: Sequence[Message], **kwargs: Any) -> str:
        """The prompt for the policy's next reply. Raises PolicyError where the template refuses them or does not terminate."""
        arguments = {"tokenize": False, "add_generation_prompt": True, **self._kwargs, **kwargs}
        try:
            with time_limit(_RENDER_SECONDS):
                return str(self._tokenizer.apply_chat_template(list(messages), **arguments))
        except TimeoutError:
            after = f"after {_RENDER_SECONDS:g} s"
            raise PolicyError(f"{self.name} was still rendering {after}; {ANOTHER}") from None
        except _TEMPLATE_ERRORS as error:
            roles = ", ".join(m["role"] for m in messages)
            reason = str(error) or type(error).__name__
            raise PolicyError(f"{self.name} refuses messages ({roles}): {reason.splitlines()[0]}") from None

    def messages(self, head: Sequence[Message], exchanges: Sequence[tuple[str, str]] = ()) -> list[Message]:
        """The messages of a dialogue, as passed to the template. Exchanges are (reply, user line)."""
        folded = self.layout(tuple(m["role"] for m in head)).folded
        pairs = [(reply, ({"role": "user", "content": line},)) for reply, line in exchanges]
        return [*(_folded(head) if folded else head), *_exchanged(pairs)]

    def uses_today(self) -> bool:
        """Whether prompts contain today's date, so that the same dialogue has another context tomorrow."""
        head = [{"role": role, "content": f"PROBE-{role}"} for role in USUAL]
        shadowed = "{% macro strftime_now(format) %}" + _TODAY + "{% endmacro %}" + self._tokenizer.get_chat_template()
        return _TODAY in self.render(self.messages(head), chat_template=shadowed)

    def _find_layout(self, head: Roles, observation: Roles = ("user",)) -> Layout:
        """For dialogues with these roles at the head and after each reply. Raises PolicyError where it cannot render them."""
        first = [{"role": role, "content": f"PROBE-HEAD-{k:02}"} for k, role in enumerate(head)]
        try:
            return self._layout(first, observation, folded=False)
        except _NoSystemRole:
            return self._layout(first, observation, folded=True)

    def _layout(self, first: list[Message], observation: Roles, *, folded: bool) -> Layout:
        counts = (0, 1, 2, 3, _MANY)
        parts = [self._parts(first, observation, exchanges, folded) for exchanges in counts]
        n, m = len(first), len(observation)
        opens, first_prompt = parts[0][:n], parts[0][n]
        before_first, between = parts[1][n], parts[1][n + 1 : n + 1 + m]
        before, prompt = parts[2][n + 1 + m], parts[1][-1]
        longer_ones = [[*opens, before_first, *between, *[before, *between] * (k - 1), prompt] for k in counts if k]
        expected = [[*opens, first_prompt], *longer_ones]
        if parts != expected:
            shorter, longer = next((a, b) for a, b in zip(expected, parts, strict=True) if a != b)
            was, now = next((a, b) for a, b in zip(shorter, longer, strict=True) if a != b)
            change = f"where it wrote {was[-60:]!r} it writes {now[-60:]!r} once the dialogue is longer"
            raise PolicyError(f"{self.name} does not render message by message: {change}; {ANOTHER}")
        return Layout(tuple(opens), before_first, first_prompt, tuple(between), before, prompt, folded)

    def _parts(self, first: list[Message], observation: Roles, exchanges: int, folded: bool) -> list[str]:
        """The template's text around the messages of a dialogue, each of which must be rendered once and in order."""
        probes = []
        for k in range(exchanges):
            lines = [{"role": role, "content": f"PROBE-LINE-{k:02}-{j:02}"} for j, role in enumerate(observation)]
            probes.append((f"PROBE-REPLY-{k:02}", lines))
        messages = [*(_folded(first) if folded else first), *_exchanged(probes)]
        may_fold = first[0]["role"] == "system" and not folded
        try:
            rest = text = self.render(messages)
        except PolicyError:
            if not may_fold or exchanges > 1:
                raise
            raise _NoSystemRole from None
        parts = []
        contents = [message["content"] for message in (*first, *_exchanged(probes))]
        for k, content in enumerate(contents):
            before, found, rest = rest.partition(content)
            if not found:
                if k == 0 and may_fold and content not in text:
                    raise _NoSystemRole
                raise PolicyError(self._why_lost(contents, text, messages))
            parts.append(before)
        if again := next((content for content in contents if text.count(content) > 1), None):
            raise PolicyError(f"{self.name} repeats the {_role(again, messages)} message; {ANOTHER}")
        return [*parts, rest]

    def _why_lost(self, contents: Sequence[str], text: str, messages: list[Message]) -> str:
        lost = next((content for content in contents if content not in text), None)
        if lost is None:
            order = [_role(content, messages) for content in sorted(contents, key=text.index)]
            how = f"renders messages in another order ({', '.join(order)})"
        else:
            how = f"{'rewrites' if lost.casefold() in text.casefold() else 'drops'} the {_role(lost, messages)} message"
        return f"{self.name} {how}; {ANOTHER}"


class _NoSystemRole(Exception):
    """The template refuses or drops a system message."""


def _folded(head: Sequence[Message]) -> list[Message]:
    """Messages with the system message merged into the first user turn, or as that turn."""
    system, *others = head
    line = others.pop(0)["content"] if others and others[0]["role"] == "user" else None
    content = system["content"] if line is None else system["content"] + FOLD + line
    return [{"role": "user", "content": content}, *others]


def _exchanged(exchanges: Sequence[tuple[str, Sequence[Message]]]) -> list[Message]:
    return [m for reply, observation in exchanges for m in ({"role": "assistant", "content": reply}, *observation)]


def _role(content: str, messages: list[Message]) -> str:
    return next(m["role"] for m in messages if content in m["content"])


class ControlTokens:
    """Control tokens: special tokens, and added tokens that look like markup. Text of users and policies must not become one. `ids`
    leaves out the tokens for unknown text and for bytes, since any text may need them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        by_text = {text: k for text, k in tokenizer.get_added_vocab().items() if _MARKUP.fullmatch(text)}
        by_text |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.ids = frozenset(k for text, k in by_text.items() if not _BYTE.fullmatch(text)) - {tokenizer.unk_token_id}
        self._by_text = by_text
        longest_first = sorted(by_text, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def find(self, text: str) -> list[tuple[int, int]]:
        """Where `text` contains the text of such tokens, as (start, end)."""
        return [match.span() for match in self._pattern.finditer(text)]

    def first(self, text: str) -> int | None:
        """The id of the first control token in `text`."""
        return next((self._by_text[text[start:end]] for start, end in self.find(text)), None)


def end_of_turn(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None) -> int | None:
    """The control token that the template writes after a reply; None if it ends replies with plain text."""
    template = ChatTemplate(tokenizer, kwargs)
    return ControlTokens(tokenizer).first(template.layout(USUAL).between[0])
