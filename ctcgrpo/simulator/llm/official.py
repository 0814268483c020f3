"""The authors' own prompts, built by their code (EIBench/code/src/simulator_v2.py), for scores that compare with published ones.

This runs third-party code from a folder that the user names. Only its prompt builders are called; what it imports to make calls
of its own is replaced by empty modules where it is not installed. Their layout does not quote what the policy said and has the
state near its start: it is for scores that are to be compared, not for training against a policy that attacks it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.errors import PolicyEngineError, RecipeError, SimulatorReplyError
from ctcgrpo.simulator.llm.answers import Unreadable
from ctcgrpo.simulator.llm.prompts import TemplatePrompts
from ctcgrpo.simulator.protocol import ScenarioCard, TurnRequest
from ctcgrpo.types import Message

_FILE = Path("src") / "simulator_v2.py"
_EVALUATION = Path("evaluation") / "run_eval.py"
_PLACES = (Path("EIBench") / "code", Path("code"), Path())
_CALLERS = ("dashscope", "requests")
_SYSTEM, _MESSAGES = "_build_simulator_system_prompt", "_build_simulator_messages"
_POLICY_MESSAGES, _ROUTER, _CALL = "_build_defender_messages", "_router", "_call_openai_compatible"


class OfficialPrompts:
    """What the simulator is given. Raises RecipeError where the folder does not hold the authors' code, or has other functions."""

    def __init__(self, folder: Path) -> None:
        file = _found(folder, _FILE)
        module = _load(file)
        self._system = _function(module, _SYSTEM, file)
        self._messages = _function(module, _MESSAGES, file)
        self._own = TemplatePrompts()
        self.name = f"official/{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"

    def check(self, card: ScenarioCard) -> None:
        """Their prompts serve every scene; a corrected answer is asked for in the scenario's language."""
        self._own.check(card)

    def messages(self, request: TurnRequest) -> list[Message]:
        card = request.scenario
        # Their "user" is the one that the simulator plays.
        history = [
            {"role": "assistant", "content": u.text}
            if u.speaker == "policy"
            else {"role": "user", "content": f"<think>{u.reflection}</think>\n{u.text}" if u.reflection else u.text}
            for u in request.history
        ]
        profile = {"aggressor_profile": {"system_prompt": card.user_persona}}
        scene, state = card.scene.capitalize(), request.state
        try:
            system = self._system(profile, history, state.anger, state.trust, request.round, request.max_rounds, scene)
            messages = self._messages(system, history, scene_tag=scene)
            return [{"role": m["role"], "content": str(m["content"])} for m in messages]
        except Exception as error:  # noqa: BLE001 - whatever their code raises is a turn that cannot be asked for
            raise SimulatorReplyError(f"the official prompt builder failed: {type(error).__name__}: {error}") from None

    def correction(self, card: ScenarioCard, problem: Unreadable) -> str:
        return self._own.correction(card, problem)


class OfficialPolicyPrompts:
    """What the policy is given in evaluation: its role and instructions by the authors' builder, then the message with which their
    evaluation asks it to open a dialogue (charm). Raises RecipeError as OfficialPrompts does."""

    def __init__(self, folder: Path) -> None:
        file, evaluation = _found(folder, _FILE), _found(folder, _EVALUATION)
        self._messages = _function(_load(file), _POLICY_MESSAGES, file)
        module = _load(evaluation)
        self._route = _function(module, _ROUTER, evaluation)
        _function(module, _CALL, evaluation)
        setattr(module, _CALL, lambda messages, **_: messages)  # what it would send is what is wanted

    def messages(self, scenario: Scenario, said: Sequence[tuple[str, str]]) -> list[Message]:
        """All messages of the policy's next turn, the system message first; `said` holds (role, text) pairs, the policy's lines as
        `assistant`. Raises PolicyEngineError where their code fails."""
        profile = {"defender_profile": {"system_prompt": scenario.policy_persona}}
        # Their dialogue loop names the scene where the policy opens, and only there.
        scene = {} if said else {"scene_tag": scenario.scene.capitalize()}
        try:
            messages = self._route(
                self._messages(profile, [{"role": role, "content": text} for role, text in said], **scene), model="policy"
            )
            return [{"role": m["role"], "content": str(m["content"])} for m in messages]
        except Exception as error:  # noqa: BLE001 - whatever their code raises is a turn that cannot be asked for
            raise PolicyEngineError(f"the official prompt builder failed: {type(error).__name__}: {error}") from None


def _found(folder: Path, name: Path) -> Path:
    file = next((folder / place / name for place in _PLACES if (folder / place / name).is_file()), None)
    if file is None:
        raise RecipeError(
            f"llm.official is {str(folder)!r}: there is no {_PLACES[0] / name} in it; "
            "name the folder of a copy of the authors' repository (Tongyi-ConvAI/Qwen-Character)"
        )
    return file


def _function(module: types.ModuleType, name: str, file: Path) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if not callable(found):
        raise RecipeError(f"llm.official: {file} has no function {name}; it is not the version that this was written for")
    return found  # type: ignore[no-any-return]


def _load(file: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("ctcgrpo_official_simulator", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _stood_in_for(_CALLERS), _importable(file.parent, file.parent.parent / _FILE.parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # noqa: BLE001 - third-party code: whatever it raises is the user's to know
            raise RecipeError(f"llm.official: {file} cannot be loaded: {type(error).__name__}: {error}") from None
    return module


@contextlib.contextmanager
def _stood_in_for(names: tuple[str, ...]) -> Iterator[None]:
    """Empty modules for those that are not installed, for as long as the context lasts."""
    absent = [name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextlib.contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """Modules of these folders, for as long as the context lasts: neither they nor what they add to the path stay."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin is not None and any(folder in Path(origin).parents for folder in folders):
                del sys.modules[name]
