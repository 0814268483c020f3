"""The configuration of a simulator server (configs/simulator/*.yaml): who plays the user, which endpoints, which budget."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from ctcgrpo.errors import RecipeError
from ctcgrpo.util.importing import is_reference
from ctcgrpo.util.naming import did_you_mean
from ctcgrpo.util.proxies import is_loopback
from ctcgrpo.util.sections import Section, environment_name, parse_mapping, read_text, validated

TOKEN_ENV = "CTCGRPO_SIMULATOR_TOKEN"
BACKENDS: dict[str, str] = {
    "scripted": "ctcgrpo.simulator.scripted:ScriptedBackend",
    "llm": "ctcgrpo.simulator.llm:LlmBackend",
}
"""The import path of each backend's class, by its name in configurations."""
_CHAT = "/chat/completions"
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_SECRET_NAME = re.compile(r"auth|key|token|secret|password|cookie|sig$|^code$", re.IGNORECASE)
"""Names of headers and of parameters in URLs whose values are secrets."""
_VariableName = Annotated[str, AfterValidator(environment_name)]
_HomePath = Annotated[Path, AfterValidator(Path.expanduser)]


class Price(Section):
    """Prices per million tokens."""

    prompt: float = Field(0.0, ge=0, description="price of a million prompt tokens")
    completion: float = Field(0.0, ge=0, description="price of a million completion tokens")


class Endpoint(Section):
    """One OpenAI-compatible endpoint."""

    url: str = Field(description="the base URL; most end with /v1 or /v1/chat/completions; ?query allowed")
    model: str = Field(description="the model's name at this endpoint")
    key_env: _VariableName | None = Field(None, description="the environment variable with the key; absent: no key")
    headers: dict[str, str] = Field(
        {}, description="further headers; ${NAME} in a value is replaced by that environment variable: api-key: ${AZURE_API_KEY}"
    )
    weight: float = Field(1.0, gt=0, description="its share of the dialogues, relative to the other endpoints")
    concurrency: int = Field(64, ge=1, description="concurrent calls at most")
    requests_per_minute: int | None = Field(None, ge=1, description="the account's limit; no limit where absent")
    tokens_per_minute: int | None = Field(None, ge=1, description="the account's limit; no limit where absent")
    timeout: float = Field(60.0, gt=0, description="seconds a call")
    output: Literal["json_schema", "json_object", "text"] = Field(
        "json_schema", description="the strictest response format that it supports"
    )
    bounded_strings: bool = Field(False, description="put maxLength into the schema (vLLM obeys it; some providers refuse it)")
    seed: bool = Field(False, description="send a seed with each call; vLLM uses it, hosted models refuse or ignore it")
    extra_body: dict[str, Any] = Field(
        {}, description="further fields of the request (enable_thinking: false); null removes a field (temperature: null)"
    )
    price: Price = Price()  # type: ignore[call-arg]
    breaker_failures: int = Field(10, ge=1, description="consecutive failures that open its circuit breaker")
    breaker_seconds: float = Field(10.0, gt=0, description="seconds that the breaker stays open at first; doubled each time")

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("expected a URL that begins with http:// or https://")
        if parts.username or parts.password or any(_SECRET_NAME.search(name) for name, _ in parse_qsl(parts.query)):
            raise ValueError("the URL contains a secret; expected none; name the key's variable in key_env or headers")
        path = parts.path.rstrip("/").removesuffix(_CHAT)
        return parts._replace(path=path.rstrip("/"), fragment="").geturl()

    @field_validator("headers")
    @classmethod
    def _hold_no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            variables = [environment_name(variable) for variable in _VARIABLE.findall(text)]
            if _SECRET_NAME.search(name) and not variables:
                raise ValueError(f"{name} is a secret; expected ${{NAME}}, the environment variable that contains it")
        return value

    @property
    def chat_url(self) -> str:
        parts = urlsplit(self.url)
        return parts._replace(path=parts.path + _CHAT).geturl()

    @property
    def secrets(self) -> list[str]:
        """The environment variables that key and headers come from."""
        key = [self.key_env] if self.key_env else []
        return key + [v for text in self.headers.values() for v in _VARIABLE.findall(text)]

    def sent_headers(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Key and headers, with values from the environment. Raises RecipeError for a variable that is not set."""
        for name in self.secrets:
            if not environment.get(name):
                variable = f"the environment variable {name} ({'key_env' if name == self.key_env else 'headers'})"
                raise RecipeError(f"llm.endpoints {self.url!r}: {variable} is empty or not set")
        key = {"Authorization": f"Bearer {environment[self.key_env]}"} if self.key_env else {}
        return key | {k: _VARIABLE.sub(lambda found: environment[found[1]], text) for k, text in self.headers.items()}

    @property
    def label(self) -> str:
        """Its name in logs and metrics."""
        parts = urlsplit(self.url)
        key = f" (key {', '.join(self.secrets)})" if self.secrets else ""
        return f"{self.model} at {parts.netloc}{parts.path.removesuffix('/v1')}{key}"


class Calls(Section):
    """The endpoints, the sampling settings of a call, and its time limits."""

    endpoints: tuple[Endpoint, ...] = Field(min_length=1, description="the endpoints; each dialogue is assigned to one")
    temperature: float | None = Field(0.7, ge=0, description="sampling temperature; null: not sent")
    top_p: float | None = Field(None, gt=0, le=1, description="nucleus sampling; absent: not sent")
    max_tokens: int = Field(1024, ge=1, description="limit on the tokens of an answer")
    max_completion_tokens: int | None = Field(None, ge=1, description="replaces max_tokens, for providers that use this name")
    deadline: float = Field(180.0, gt=0, description="limit on the seconds of an answer, retries included")
    patience: float = Field(
        600.0, ge=0, description="further seconds to wait, beyond deadline, while every endpoint is unavailable"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        labels = [endpoint.label for endpoint in self.endpoints]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"duplicate endpoint {min(twice)!r}; expected each once; merge them, with the sum of their limits")
        if self.max_completion_tokens is not None and "max_tokens" in self.model_fields_set:
            raise ValueError("max_tokens and max_completion_tokens: both given; expected the one that the provider accepts")
        return self

    @property
    def most_tokens(self) -> int:
        """The limit on the tokens of an answer, by either name."""
        return self.max_completion_tokens or self.max_tokens


class Llm(Calls):
    """An LLM that plays the user."""

    official: _HomePath | None = Field(
        None, description="the folder of the EIBench authors' code, to use its prompts instead of ours (runs third-party code)"
    )
    reflections: bool = Field(True, description="include the user's own earlier reflections in its prompt")
    tries: int = Field(3, ge=1, description="calls at most until an answer is valid; published: 8, in evaluation 3")
    samples: int = Field(1, ge=1, description="k: answers whose state changes are averaged; costs k times as much per turn")


class Scripted(Section):
    """The scripted user."""

    # For studies of credit: the next turn returns the share, and pays all that was earned.
    reluctance: float = Field(0.0, ge=0, le=1, description="share of a gain that first counts as a loss, repaid a turn later")


class Budget(Section):
    """A hard limit on spending, over all runs that share the store. Reaching it pauses the run."""

    money: float | None = Field(None, gt=0, description="limit in `currency`, computed from the endpoints' prices")
    tokens: int | None = Field(None, gt=0, description="limit on prompt and completion tokens together")
    currency: str = Field("USD", description="the currency of prices and `money`; only a label, nothing is converted")

    @property
    def is_limited(self) -> bool:
        return self.money is not None or self.tokens is not None


class ServerSection(Section):
    """Limits and logging of `ctcgrpo serve`."""

    token_env: _VariableName = Field(
        TOKEN_ENV, description="the environment variable with the bearer token; required for addresses other than loopback"
    )
    max_body_mb: float = Field(16.0, gt=0, description="megabytes (10^6 bytes); a larger request gets status 413")
    request_seconds: float = Field(30.0, gt=0, description="seconds; a request that arrives more slowly gets status 408")
    max_connections: int = Field(
        4096,
        ge=1,
        description="limit on open connections, at most half of the open files (ulimit -n); a further one gets status 503",
    )
    drain_seconds: int = Field(60, ge=1, description="seconds that turns in progress may take after a signal to stop")
    log_level: Literal["debug", "info", "warning"] = Field("info", description="texts are logged with debug only")


class SimulatorConfig(Section):
    """Who plays the user. The default is the scripted user."""

    backend: str = Field(
        "scripted",
        description="scripted (rules, no LLM), llm, or your own class: my_module:MyUser, in a file beside the configuration",
        json_schema_extra={"enum": [*BACKENDS, "my_module:MyUser"]},
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of your own backend")
    folder: Path | None = Field(None, description="where your own backend's file is; absent: the configuration's folder")
    scripted: Scripted = Scripted()  # type: ignore[call-arg]
    llm: Llm | None = None
    store: _HomePath | None = Field(None, description="the folder for answers already paid for, and the account of spending")
    cache: bool = Field(True, description="answer a repeated turn from the store")
    budget: Budget = Budget()  # type: ignore[call-arg]
    server: ServerSection = ServerSection()  # type: ignore[call-arg]

    @field_validator("backend")
    @classmethod
    def _is_a_backend(cls, value: str) -> str:
        if value not in BACKENDS and not is_reference(value):
            raise ValueError(f"{did_you_mean(value, BACKENDS)} (your own class: my_module:MyUser)")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> SimulatorConfig:
        if (self.backend == "llm") != (self.llm is not None):
            raise ValueError(f"backend = {self.backend!r}; expected section llm with backend 'llm', and with no other")
        if self.backend != "scripted" and self.scripted.reluctance:
            raise ValueError(f"backend = {self.backend!r}; expected section scripted with backend 'scripted' only")
        if self.backend in BACKENDS and self.options:
            raise ValueError(f"backend = {self.backend!r}; expected options with your own backend (my_module:MyUser) only")
        if self.budget.is_limited and self.store is None:
            raise ValueError("budget without a store; expected a store, which records what was spent over restarts")
        if self.budget.is_limited and self.llm is None:
            raise ValueError("budget without backend 'llm'; expected a budget only where an LLM is called")
        priced = all(e.price.prompt or e.price.completion for e in self.llm.endpoints) if self.llm else True
        if self.budget.money is not None and not priced:
            raise ValueError("budget.money without prices; expected the price of every endpoint")
        return self

    @property
    def digest(self) -> str:
        """A digest of every setting that decides the user's answers; settings of speed and cost are left out."""
        if self.backend == "scripted" and not self.scripted.reluctance:
            return ""
        if self.llm is None:
            deciding = self.model_dump(include={"backend", "options", "scripted"})
        else:
            deciding = self.llm.model_dump(mode="json", include={"temperature", "top_p", "samples"})
            deciding["max_tokens"] = self.llm.most_tokens
            names = ("url", "model", "output", "bounded_strings", "seed", "extra_body")
            deciding["endpoints"] = [{name: getattr(endpoint, name) for name in names} for endpoint in self.llm.endpoints]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()[:8]


SCRIPTED_USER = SimulatorConfig()  # type: ignore[call-arg]
"""The default: the scripted user."""


def load_simulator_config(file: str | Path) -> SimulatorConfig:
    """The configuration in a file. Raises RecipeError naming file, field, value and what is expected."""
    path = Path(file)
    text = read_text(path, "simulator configuration")
    config = validated(parse_mapping(text, path, SimulatorConfig, "simulator configuration"), SimulatorConfig, path)
    own_folder = is_reference(config.backend) and config.folder is None
    return config.model_copy(update={"folder": path.parent}) if own_folder else config


def check_listening(host: str, token: str | None, token_env: str) -> None:
    """Raises RecipeError for an address other than loopback without a token."""
    if token is None and not is_loopback(host):
        raise RecipeError(
            f"--host {host!r}: {token_env} is blank or not set; expected a bearer token for an address other than loopback; set "
            f"{token_env} (openssl rand -hex 32), or use 127.0.0.1"
        )


def bearer_token(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token that a client sends: the environment variable's value without surrounding white space; None where it is blank
    or not set. Raises RecipeError for a token that the client cannot send."""
    token = server_token(name, environment)
    if token is not None and not token.isprintable():  # what is not UTF-8 arrives as lone surrogates
        raise RecipeError(f"the token in {name} is not printable UTF-8 text; make one with openssl rand -hex 32")
    return token


def server_token(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token that a server requires. Raises RecipeError for a token that no HTTP header can carry."""
    token = environment.get(name, "").strip()
    if any(ord(character) < 32 or ord(character) == 127 for character in token):
        raise RecipeError(f"the token in {name} holds a control character; make one with openssl rand -hex 32")
    return token or None
