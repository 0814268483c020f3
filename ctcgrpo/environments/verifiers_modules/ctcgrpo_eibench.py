"""The name by which verifiers finds EIBench (`vf-eval ctcgrpo-eibench`); it imports modules without dots in their names."""

from ctcgrpo.environments.chat_harness import ChatHarness
from ctcgrpo.environments.verifiers import EIBenchEnv, ScenarioTaskset

__all__ = ["ChatHarness", "EIBenchEnv", "ScenarioTaskset"]
