"""Trackers of a run (run.report_to): transformers' integrations, which get the metrics of steps and validations."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ctcgrpo.errors import RecipeError
from ctcgrpo.run.scores import Validation, gap
from ctcgrpo.util.naming import did_you_mean


def trackers_of(names: Sequence[str]) -> list[TrainerCallback]:
    """The integration of each name. Raises RecipeError for an unknown one, and for one whose package is missing."""
    available = get_available_reporting_integrations() if names else []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(f"run.report_to = {name!r}; {did_you_mean(name, INTEGRATION_TO_CALLBACK)}")
        if name not in available:
            there = f"its package is not installed, or not configured; available here: {', '.join(available)}"
            raise RecipeError(f"run.report_to = {name!r}: {there}; try pip install {name}, or leave it out")
    return [INTEGRATION_TO_CALLBACK[name]() for name in names]


class Trackers(TrainerCallback):  # type: ignore[misc]
    """Forwards a run's events to its trackers.

    transformers would count optimizer steps, and end the trackers with the training loop. These count steps of the recipe, which
    make `updates` optimizer steps each, and end with `close`: the last validation comes after training.
    """

    def __init__(self, trackers: Sequence[TrainerCallback], updates: int) -> None:
        self._trackers, self._updates = trackers, updates
        self._begun: tuple[Any, Any, Any, dict[str, Any]] | None = None  # the arguments of on_train_begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = args, state, control, kwargs
        for tracker in self._trackers:
            tracker.on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        self._log(state.global_step // self._updates, logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for tracker in self._trackers:
            tracker.on_save(args, state, control, **kwargs)

    def validated(self, validation: Validation) -> None:
        """A validation is over."""
        self._log(validation.step, validation_metrics(validation))

    def _log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._begun is None:
            return
        args, state, control, kwargs = self._begun
        counted = copy.copy(state)
        counted.global_step = step
        measured = {name: value for name, value in metrics.items() if value is not None}
        for tracker in self._trackers:
            tracker.on_log(args, counted, control, logs=dict(measured), **kwargs)

    def close(self) -> None:
        """The run is over, or pauses."""
        if self._begun is not None:
            args, state, control, kwargs = self._begun
            for tracker in self._trackers:
                tracker.on_train_end(args, state, control, **kwargs)


def validation_metrics(validation: Validation) -> dict[str, float | None]:
    """The figures of a validation, by the names that `CTCGRPOTrainer.evaluate` gives them; trackers show eval_ as eval/."""
    figures = validation.figures()
    found: dict[str, float | None] = {f"eval_outcome/{scene}": score for scene, score in figures.scenes.items()}
    found |= {"eval_outcome/all": figures.overall, "eval_episodes/failed": float(figures.failed)}
    if validation.other is not None:
        other = validation.other.figures()
        found |= {f"eval_other_user/outcome/{scene}": score for scene, score in other.scenes.items()}
        found |= {"eval_other_user/outcome/all": other.overall, "eval_other_user/episodes/failed": float(other.failed)}
        found["eval_gap"] = gap(validation).overall
    return found
