"""EIBench: a simulated user whose anger and trust change with each reply of the policy; its scenarios and their scoring.

`EIBench` is the environment; `UserState`, `Anchors`, `outcome_score` and `turn_score` are the benchmark's records and formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctcgrpo.environments.eibench.records import Anchors as Anchors
from ctcgrpo.environments.eibench.records import UserState as UserState
from ctcgrpo.environments.eibench.scoring import outcome_score as outcome_score
from ctcgrpo.environments.eibench.scoring import turn_score as turn_score
from ctcgrpo.util.lazy import lazy

if TYPE_CHECKING:
    from ctcgrpo.environments.eibench.environment import EIBench as EIBench
    from ctcgrpo.environments.eibench.environment import EIBenchEpisodes as EIBenchEpisodes
    from ctcgrpo.environments.eibench.environment import User as User
    from ctcgrpo.environments.eibench.environment import opening_messages as opening_messages
    from ctcgrpo.environments.eibench.environment import scenario_tasks as scenario_tasks
    from ctcgrpo.environments.eibench.environment import task_of as task_of

# Simulators read the records, and the environment asks a simulator.
_LAZY = ("EIBench", "EIBenchEpisodes", "User", "opening_messages", "scenario_tasks", "task_of")
__getattr__ = lazy(__name__, dict.fromkeys(_LAZY, "environment"))
