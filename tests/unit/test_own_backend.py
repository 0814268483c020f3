"""A simulator backend of one's own: named in a configuration, it plays dialogues; what is wrong with one is named."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from ctcgrpo.environments.eibench import EIBench, task_of
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import RecipeError, SimulatorReplyError
from ctcgrpo.evaluation.users import chosen_user
from ctcgrpo.simulator.choice import named_simulator
from ctcgrpo.simulator.config import load_simulator_config
from tests.conftest import Command
from tests.unit.test_run import FAST, TINY

BACKEND = """
from ctcgrpo.simulator.protocol import Reaction, SimulatorBackend, TurnRequest

class MyUser(SimulatorBackend):
    name = "thankful"

    def __init__(self, gain: int = 1) -> None:
        self.gain = gain

    async def react(self, request: TurnRequest) -> Reaction:
        thanked = "thank" in request.history[-1].text.lower()
        change = self.gain if thanked else -self.gain
        return Reaction("Well.", anger_delta=-change, trust_delta=change, goes_on=True, why="thanked" if thanked else "not")
"""


@pytest.fixture
def config(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A configuration beside a module of a name of its own."""
    module = f"users_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(BACKEND))
    file = tmp_path / "mine.yaml"
    file.write_text(f"backend: {module}:MyUser\noptions: {{gain: 4}}\n")
    return file


async def test_a_backend_of_ones_own_plays_a_dialogue(config: Path) -> None:
    scenario = load_scenarios("english/test")[0]
    choice = named_simulator(str(config))
    with choice.served([scenario]) as urls:
        client = choice.client(urls)
        async with client:
            assert (await client.health())["backend"] == "thankful" and (await client.health())["gain"] == 4
            dialogue = EIBench(client, briefing=Briefing(), max_turns=3)
            dialogue.name = "x"
            await dialogue.reset(task_of(scenario).data, seed=0)
            infos = [(await dialogue.step(reply)).info for reply in ("Thank you.", "No.", "Thanks.")]
            assert await client.account() == {}
    start = scenario.anchors.initial
    assert [(i["anger"], i["trust"]) for i in infos] == [start.plus(-d, d) for d in (4, 0, 4)]
    about = await chosen_user(str(config), None).about()
    assert about == {"backend": "thankful", "gain": 4}


def test_a_run_trains_on_it(config: Path, ctcgrpo: Command, tmp_path: Path) -> None:
    mine = ["training.max_steps=1", f"run.output_dir={tmp_path}", f"simulator.config={config}"]
    code, out, _ = ctcgrpo("check", TINY, *FAST, *mine)
    told = " ".join(out.replace("│", " ").split())  # a table, whose columns wrap
    assert code == 0 and "thankful answered a test turn" in told
    assert "itself (LLM calls, services)" in told
    code, _, err = ctcgrpo("train", TINY, *FAST, *mine)
    assert code == 0, err
    traces = "".join(file.read_text() for file in (tmp_path / "tiny" / "traces").glob("*.jsonl"))
    assert '"message": "Well."' in traces and '"failure": {' not in traces


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("backend: scriptd", "backend.*did you mean 'scripted'.*my_module:MyUser"),
        ("backend: no_such_module:MyUser", "backend = 'no_such_module:MyUser': there is no module 'no_such_module'"),
        ("backend: MODULE:Yours", "has no 'Yours'; known: MyUser"),
        ("backend: MODULE:Reaction", "expected a subclass of ctcgrpo.simulator.protocol.SimulatorBackend"),
        ("backend: MODULE:SimulatorBackend", "has no `name`"),
        ("backend: MODULE:MyUser\noptions: {loss: 4}", "its constructor failed with options {'loss': 4}: TypeError: .*'loss'"),
        ("backend: scripted\noptions: {gain: 4}", "expected options with your own backend"),
        (
            "backend: MODULE:MyUser\nllm: {endpoints: [{url: 'http://a/v1', model: m}]}",
            "expected section llm with backend 'llm'",
        ),
        ("backend: MODULE:MyUser\nscripted: {reluctance: 0.5}", "expected section scripted with backend 'scripted'"),
    ],
)
def test_what_is_wrong_with_one_is_named(config: Path, text: str, problem: str) -> None:
    module = config.read_text().split()[1].partition(":")[0]
    config.write_text(text.replace("MODULE", module))
    with pytest.raises(RecipeError, match=problem), named_simulator(str(config)).served():
        pytest.fail("it was served")


async def test_a_backend_that_raises_fails_the_turn(config: Path) -> None:
    (module,) = config.parent.glob("users_*.py")
    module.write_text(BACKEND.replace('thanked = "thank"', 'thanked = {}["thank"]'))
    scenario = load_scenarios("english/test")[0]
    choice = named_simulator(str(config))
    with choice.served() as urls:
        async with choice.client(urls) as client:
            dialogue = EIBench(client, briefing=Briefing(), max_turns=3)
            dialogue.name = "x"
            await dialogue.reset(task_of(scenario).data, seed=0)
            with pytest.raises(SimulatorReplyError, match="internal error of the simulator: KeyError"):
                await dialogue.step("Hello.")


def test_options_and_reluctance_are_part_of_a_configurations_digest(config: Path) -> None:
    first = load_simulator_config(config).digest
    config.write_text(config.read_text().replace("4", "5"))
    assert load_simulator_config(config).digest != first
    assert (
        load_simulator_config("configs/simulator/reluctant.yaml").digest
        != load_simulator_config("configs/simulator/scripted.yaml").digest
    )
