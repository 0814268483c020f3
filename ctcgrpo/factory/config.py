"""The configuration of scenario generation (configs/factory/*.yaml): model, language, seeds, budget."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.factory.layout import layouts
from ctcgrpo.simulator.config import Budget, Calls
from ctcgrpo.util.naming import did_you_mean
from ctcgrpo.util.sections import Section, parse_mapping, read_text, validated


class Writer(Calls):
    """The model that writes scenarios."""

    temperature: float | None = Field(0.9, ge=0, description="sampling temperature; null: not sent")
    max_tokens: int = Field(6000, ge=1, description="limit on the tokens of an answer; a scenario takes some 2,500")
    deadline: float = Field(300.0, gt=0, description="limit on the seconds of an answer, retries included")


class FactoryConfig(Section):
    """How `ctcgrpo scenarios generate` and `clean` write scenarios."""

    writer: Writer
    store: Path = Field(description="the folder for answers already paid for, and the account")
    budget: Budget = Budget()  # type: ignore[call-arg]
    language: str = Field("en", description="of the scenarios: one that factory/layout.yaml has the sections of (en, zh)")
    seeds: Path | None = Field(None, description="pools of seeds; left out: the package's own of the language")
    scenes: tuple[str, ...] = Field(SCENES, min_length=1, description="the scenes that are written")
    examples: str | None = Field(None, description="a set whose scenarios are shown: english/train, chinese/train, a path")
    shots: int = Field(2, ge=0, description="examples in each request")
    attempts: int = Field(3, ge=1, description="calls at most per scenario; each repeats the faults of the last answer")
    prefix: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]*$", description="of ids: PREFIX-SCENE-0001")
    licence: str = Field(description="of what is written, carried in every record")
    source: str = Field(description="the set's name, carried in every record")
    seed: int = Field(0, ge=0, description="seed for drawing themes, people and examples")

    @model_validator(mode="after")
    def _fits_together(self) -> FactoryConfig:
        if self.language not in layouts():
            raise ValueError(f"language: {did_you_mean(self.language, layouts())}; layout.yaml has the sections of each")
        if self.shots and self.examples is None:
            raise ValueError(f"shots is {self.shots}, but examples names no set to take them from; shots: 0 asks without")
        priced = all(e.price.prompt or e.price.completion for e in self.writer.endpoints)
        if self.budget.money is not None and not priced:
            raise ValueError("budget.money needs the price of every endpoint")
        return self


def load_factory_config(file: Path) -> FactoryConfig:
    """Raises RecipeError naming file, field, value and what is expected."""
    text = read_text(file, "factory configuration")
    config = validated(parse_mapping(text, file, FactoryConfig, "factory configuration"), FactoryConfig, file)
    return config.model_copy(update={"store": config.store.expanduser()})
