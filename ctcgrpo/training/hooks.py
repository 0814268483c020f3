"""What a trainer reports of its rollouts to whoever runs it, and asks."""

from __future__ import annotations

from ctcgrpo.types import Episode


class RolloutHooks:
    """Does nothing. A subclass follows the rollouts, and may stop them. Called on every process alike."""

    def before_rollouts(self, step: int) -> None:
        """`step` batches of rollouts have been trained on; the next one is about to be played."""

    def rollouts(self, step: int, episodes: int) -> None:
        """This process begins to play so many episodes of a step, from 1."""

    def episode(self, episode: Episode) -> None:
        """An episode is over."""

    def update(self, step: int) -> None:
        """The episodes of a step are over; its update begins."""

    def interrupted(self) -> bool:
        """Whether the run is to stop at the next safe point, with a checkpoint."""
        return False


NO_HOOKS = RolloutHooks()
