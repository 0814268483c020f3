"""The recipe's sections on who plays the user: of training, one or several, and the other user of validations."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ctcgrpo.simulator.config import TOKEN_ENV
from ctcgrpo.util.sections import Section, environment_name

EMBEDDED = "embedded"


class PlayedBy(Section):
    """A user: servers that run already, or a configuration for which the run starts a server."""

    url: str | tuple[str, ...] = Field(EMBEDDED, description="embedded, or URLs of a simulator server and its replicas")
    config: Path | None = Field(None, description="of the embedded server; default: the scripted user")

    @field_validator("config", mode="before")
    @classmethod
    def _one_file(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            raise ValueError("expected one file; several users of training are named in simulator.users")
        return value

    @field_validator("url")
    @classmethod
    def _are_urls(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for url in (value,) if isinstance(value, str) else value:
            if url != EMBEDDED and not url.startswith(("http://", "https://")):
                raise ValueError("expected 'embedded', a URL that begins with http:// or https://, or a list of URLs")
        if value == () or (not isinstance(value, str) and EMBEDDED in value):
            raise ValueError("expected a list of at least one URL, without 'embedded'")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> PlayedBy:
        if self.url != EMBEDDED and self.config is not None:
            raise ValueError(
                f"config is {str(self.config)!r}, but url names a server; a server has a configuration of its own (ctcgrpo serve "
                "CONFIG); leave one out"
            )
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """Of running servers; empty for an embedded one."""
        if self.url == EMBEDDED:
            return ()
        return (self.url,) if isinstance(self.url, str) else self.url

    @property
    def label(self) -> str:
        """A short name: the configuration's file, scripted, or the host of the first server."""
        if self.urls:
            return urlsplit(self.urls[0]).netloc
        return "scripted" if self.config is None else self.config.stem


class User(PlayedBy):
    """One of several users of training. All rollouts of a group have the same user, drawn by weight from those that play its
    scenario."""

    name: str | None = Field(
        None, pattern=r"^[\w.:-]+$", description="its name in metrics and traces; default: that of the file of config"
    )
    weight: float = Field(1.0, gt=0, description="its share of the groups, relative to the other users that play the scenario")
    scenes: tuple[str, ...] | None = Field(None, min_length=1, description="scenes that it plays; default: all")
    languages: tuple[str, ...] | None = Field(None, min_length=1, description="languages that it plays; default: all")

    @property
    def label(self) -> str:
        return self.name or super().label


class OtherUser(PlayedBy):
    """Another user than that of training, for validations: whether a policy learned to please one user only."""


class Simulator(PlayedBy):
    """The simulated user's server, and how long a run waits for it."""

    users: tuple[User, ...] = ()
    port: int = Field(0, ge=0, le=65535, description="port of the embedded server; 0 picks a free one")
    token_env: str = Field(
        TOKEN_ENV,
        description="environment variable with the servers' bearer token, if they need one; a name that does not begin with "
        "CTCGRPO_ is accepted on the command line only",
    )
    timeout: float = Field(240.0, gt=0, description="timeout of one request for a turn, in seconds")
    patience: float = Field(600.0, gt=0, description="seconds to retry a turn when no server or no LLM responds")

    _is_a_name = field_validator("token_env")(environment_name)

    @model_validator(mode="after")
    def _fits_together(self) -> Simulator:
        if self.urls and self.port:
            raise ValueError(f"port is {self.port}, but url names a server; leave the port out")
        if not self.users:
            return self
        if given := next((name for name in ("url", "config", "port") if getattr(self, name) != _default(name)), None):
            raise ValueError(
                f"{given} and users: both given; expected one, since each of the users has its own; leave {given} out"
            )
        labels = [user.label for user in self.users]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"users: two are called {twice!r}; expected different names; set users.name")
        return self


def _default(name: str) -> object:
    return Simulator.model_fields[name].default
