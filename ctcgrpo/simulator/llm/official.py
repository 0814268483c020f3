"""The authors' own prompts, built by their code (EIBench/code/src/simulator_v2.py), for scores comparable with published ones.

This runs third-party code from a folder that the user names. Only its prompt builders are called; its client libraries are
replaced by empty modules where they are not installed. Their layout does not quote the policy's text and has the state near its
start. Use it for comparable scores, not for training, where a policy may learn to attack it.
"""

import hashlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.errors import CtcGrpoError, PolicyEngineError, RecipeError, SimulatorReplyError
from ctcgrpo.simulator.llm.prompts import TemplatePrompts
from ctcgrpo.simulator.protocol import TurnRequest
from ctcgrpo.types import Message

_FILE = Path("src") / "simulator_v2.py"
_PLACES = (Path("EIBench") / "code", Path("code"), Path())
_CALLERS = ("dashscope", "requests")
_CALL = "_call_openai_compatible"


class OfficialPrompts(TemplatePrompts):
    """The simulator's prompts; the request for a corrected answer is the project's own. Raises RecipeError for a folder without the
    authors' code, or with another version of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        file = _found(folder, _FILE)
        self._theirs = _load(file, "_build_simulator_system_prompt", "_build_simulator_messages")
        self.name = f"official/{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"

    def messages(self, request: TurnRequest) -> list[Message]:
        card, state = request.scenario, request.state
        # Their "user" is the one that the simulator plays.
        history = [
            {"role": "assistant", "content": u.text}
            if u.speaker == "policy"
            else {"role": "user", "content": f"<think>{u.reflection}</think>\n{u.text}" if u.reflection else u.text}
            for u in request.history
        ]
        profile, scene = {"aggressor_profile": {"system_prompt": card.user_persona}}, card.scene.capitalize()
        with _failing_as(SimulatorReplyError):
            system = self._theirs._build_simulator_system_prompt(
                profile, history, state.anger, state.trust, request.round, request.max_rounds, scene
            )
            messages = self._theirs._build_simulator_messages(system, history, scene_tag=scene)
            return [{"role": m["role"], "content": str(m["content"])} for m in messages]


class OfficialPolicyPrompts:
    """The policy's prompts in evaluation: role and instructions by the authors' builder, then the message with which their
    evaluation asks it to open a dialogue (charm). Raises RecipeError as OfficialPrompts does."""

    def __init__(self, folder: Path) -> None:
        file, evaluation = _found(folder, _FILE), _found(folder, Path("evaluation") / "run_eval.py")
        self._builder = _load(file, "_build_defender_messages")
        self._evaluation = _load(evaluation, "_router", _CALL)
        setattr(self._evaluation, _CALL, lambda messages, **_: messages)  # what it would send is what is wanted

    def messages(self, scenario: Scenario, turns: Sequence[tuple[str, str]]) -> list[Message]:
        """All messages of the policy's next turn, the system message first; `turns` holds (role, text) pairs, the policy's lines as
        `assistant`. Raises PolicyEngineError where their code fails."""
        profile = {"defender_profile": {"system_prompt": scenario.policy_persona}}
        history = [{"role": role, "content": text} for role, text in turns]
        # Their dialogue loop names the scene where the policy opens, and only there.
        scene = {} if turns else {"scene_tag": scenario.scene.capitalize()}
        with _failing_as(PolicyEngineError):
            messages = self._evaluation._router(self._builder._build_defender_messages(profile, history, **scene), model="policy")
            return [{"role": m["role"], "content": str(m["content"])} for m in messages]


@contextmanager
def _failing_as(kind: type[CtcGrpoError]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever their code raises is a turn that cannot be asked for
        raise kind(f"the official prompt builder failed: {type(error).__name__}: {error}") from None


def _found(folder: Path, name: Path) -> Path:
    file = next((folder / place / name for place in _PLACES if (folder / place / name).is_file()), None)
    if file is None:
        raise RecipeError(
            f"llm.official = {str(folder)!r}; expected a folder with {_PLACES[0] / name}: "
            "a copy of the authors' repository (Tongyi-ConvAI/Qwen-Character)"
        )
    return file


def _load(file: Path, *functions: str) -> types.ModuleType:
    """Raises RecipeError for a module that cannot be loaded, or lacks one of the functions."""
    spec = importlib.util.spec_from_file_location("ctcgrpo_official_simulator", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importable(file.parent, file.parent.parent / _FILE.parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # noqa: BLE001 - third-party code: whatever it raises is the user's to know
            raise RecipeError(f"llm.official: {file} cannot be loaded: {type(error).__name__}: {error}") from None
    for name in functions:
        if not callable(getattr(module, name, None)):
            raise RecipeError(f"llm.official: {file} has no function {name}; expected the version of the EIBench paper")
    return module


@contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """Within the context, modules of these folders can be imported, and _CALLERS that are not installed are empty modules. Then the
    modules and their additions to the path are removed."""
    path, modules = list(sys.path), set(sys.modules)
    absent = [name for name in _CALLERS if name not in modules and importlib.util.find_spec(name) is None]
    sys.modules.update({name: types.ModuleType(name) for name in absent})
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            origin = Path(getattr(sys.modules[name], "__file__", None) or "")
            if name in absent or any(folder in origin.parents for folder in folders):
                del sys.modules[name]
