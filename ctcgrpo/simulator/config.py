"""The configuration of a simulator server (configs/simulator/*.yaml): who plays the user, where, and at what cost."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ctcgrpo.errors import RecipeError
from ctcgrpo.sections import Section, environment_name, parse_mapping, read_text, validated

TOKEN_ENV = "CTCGRPO_SIMULATOR_TOKEN"


class Price(Section):
    """Money for a million tokens."""

    prompt: float = Field(0.0, ge=0, description="for a million tokens of prompts")
    completion: float = Field(0.0, ge=0, description="for a million tokens of answers")


class Endpoint(Section):
    """One OpenAI-compatible endpoint."""

    url: str = Field(description="of the API, up to and with /v1")
    model: str = Field(description="the model's name at this endpoint")
    key_env: str | None = Field(None, description="the environment variable that holds the key; none for an open endpoint")
    weight: float = Field(1.0, gt=0, description="its share of the dialogues")
    concurrency: int = Field(64, ge=1, description="calls at a time")
    requests_per_minute: int | None = Field(None, ge=1, description="the account's limit; no limit where absent")
    tokens_per_minute: int | None = Field(None, ge=1, description="the account's limit; no limit where absent")
    timeout: float = Field(60.0, gt=0, description="seconds a call")
    output: Literal["json_schema", "json_object", "text"] = Field(
        "json_schema", description="the strictest form of answer that it supports"
    )
    bounded_strings: bool = Field(False, description="put maxLength into the schema (vLLM keeps to it; some refuse it)")
    seed: bool = Field(True, description="send a seed with each call")
    extra_body: dict[str, Any] = Field({}, description="further fields of the request, for example enable_thinking: false")
    price: Price = Price()  # type: ignore[call-arg]
    breaker_failures: int = Field(10, ge=1, description="failures in a row that open its circuit breaker")
    breaker_seconds: float = Field(10.0, gt=0, description="how long it stays open at first; doubles each time")

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("an endpoint begins with http:// or https://")
        if parts.username or parts.password:
            raise ValueError("an endpoint's URL holds no secrets; name the variable with the key in key_env")
        return value.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return None if value is None else environment_name(value)

    @property
    def label(self) -> str:
        """How logs and metrics call it."""
        parts = urlsplit(self.url)
        key = f" by {self.key_env}" if self.key_env else ""
        return f"{self.model} at {parts.netloc}{parts.path.removesuffix('/v1')}{key}"


class Llm(Section):
    """An LLM that plays the user."""

    endpoints: tuple[Endpoint, ...] = Field(min_length=1, description="the endpoints that share the dialogues")
    official: Path | None = Field(
        None, description="the folder with the authors' EIBench code: its prompts instead of ours (runs third-party code)"
    )
    temperature: float = Field(0.7, ge=0, description="sampling temperature of the user's answers")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the most likely tokens with this total probability; 1 is off"
    )
    max_tokens: int = Field(1024, ge=1, description="tokens of an answer at most")
    samples: int = Field(1, ge=1, description="k: answers whose state changes are averaged; costs k times as much")
    deadline: float = Field(180.0, gt=0, description="seconds that a turn may take, retries and waiting included")

    @model_validator(mode="after")
    def _labels_differ(self) -> Llm:
        labels = [endpoint.label for endpoint in self.endpoints]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"two endpoints are {min(twice)!r}; join them into one, with the sum of their limits")
        return self


class Scripted(Section):
    """The scripted user."""

    reluctance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="for studies of credit: the share of what a reply earns that goes the wrong way at first; with the next turn "
        "it comes back, and all that was earned",
    )


class Budget(Section):
    """A hard limit on what is spent over all runs that share the store; reaching it pauses the run."""

    money: float | None = Field(None, gt=0, description="in `currency`, by the prices of the endpoints")
    tokens: int | None = Field(None, gt=0, description="tokens of prompts and answers together")
    currency: str = Field("USD", description="of prices and of `money`; a name, nothing is converted")


class ServerSection(Section):
    """How `ctcgrpo serve` answers."""

    token_env: str = Field(TOKEN_ENV, description="the variable with the bearer token; a token is required beyond loopback")
    max_body_mb: float = Field(
        16.0, gt=0, description="a larger request is refused with status 413 (megabytes of 10^6 bytes)"
    )
    drain_seconds: int = Field(60, ge=1, description="how long turns under way may take after a signal to stop")
    log_level: Literal["debug", "info", "warning"] = Field("info", description="only debug shows texts")

    @field_validator("token_env")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        return environment_name(value)

    def token(self) -> str | None:
        return os.environ.get(self.token_env) or None


class SimulatorConfig(Section):
    """Who plays the user. The default is the scripted user."""

    backend: Literal["scripted", "llm"] = Field("scripted", description="the scripted user (rules, no LLM), or an LLM")
    scripted: Scripted = Scripted()  # type: ignore[call-arg]
    llm: Llm | None = None
    store: Path | None = Field(
        None, description="the folder for answers already paid for and the account; none keeps nothing"
    )
    cache: bool = Field(True, description="answer a turn from the store that it has answered before")
    budget: Budget = Budget()  # type: ignore[call-arg]
    server: ServerSection = ServerSection()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _fits_together(self) -> SimulatorConfig:
        if (self.backend == "llm") != (self.llm is not None):
            raise ValueError(f"backend is {self.backend!r}: section llm belongs to backend 'llm', and it needs one")
        if self.llm is not None and self.scripted.reluctance:
            raise ValueError("section scripted belongs to backend 'scripted', and backend is 'llm'")
        limited = self.budget.money is not None or self.budget.tokens is not None
        if limited and self.store is None:
            raise ValueError("a budget needs a store, to know after a restart what was spent")
        if limited and self.llm is None:
            raise ValueError("a budget is for backend 'llm'; the scripted user costs nothing")
        if (
            self.budget.money is not None
            and self.llm
            and not all(e.price.prompt or e.price.completion for e in self.llm.endpoints)
        ):
            raise ValueError("budget.money needs the price of every endpoint")
        return self

    @property
    def digest(self) -> str:
        """Of all that decides the user's answers. How fast they come and what they cost does not."""
        if self.llm is None:
            return ""
        told = self.llm.model_dump(mode="json", include={"temperature", "top_p", "max_tokens", "samples"})
        deciding = ("url", "model", "output", "bounded_strings", "seed", "extra_body")
        told["endpoints"] = [{name: getattr(endpoint, name) for name in deciding} for endpoint in self.llm.endpoints]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


SCRIPTED_USER = SimulatorConfig()  # type: ignore[call-arg]
"""What plays the user where nothing else is configured."""


def load_simulator_config(file: str | Path) -> SimulatorConfig:
    """Raises RecipeError naming file, field, value and what would be right."""
    path = Path(file)
    text = read_text(path, "simulator configuration")
    config = validated(parse_mapping(text, path, SimulatorConfig, "simulator configuration"), SimulatorConfig, path)
    if config.store is not None:
        config = config.model_copy(update={"store": config.store.expanduser()})
    if config.llm is not None and config.llm.official is not None:
        llm = config.llm.model_copy(update={"official": config.llm.official.expanduser()})
        config = config.model_copy(update={"llm": llm})
    return config


def check_listening(host: str, token: str | None, token_env: str) -> None:
    """Refuse to listen beyond loopback without a token."""
    if host not in ("localhost", "::1") and not host.startswith("127.") and token is None:
        raise RecipeError(
            f"listening on {host!r} needs a bearer token: set {token_env} (openssl rand -hex 32), or use 127.0.0.1"
        )
