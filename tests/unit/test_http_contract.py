"""ctcgrpo/simulator/README.md and the server agree: its curl line works, its tables are those of the models and routes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from urllib.parse import urlsplit

import aiohttp
import pytest

from ctcgrpo.errors import BudgetSpent, SimulatorReplyError, SimulatorTransportError
from ctcgrpo.reference.fields import allowed
from ctcgrpo.simulator import protocol
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.protocol import Reaction, TurnProblem, TurnReply, TurnRequest
from ctcgrpo.simulator.server import SimulatorServer, running
from tests.conftest import ROOT, Backend, Command

README = (ROOT / "ctcgrpo" / "simulator" / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
"""The last block of each kind: the curl line, and the answer to it."""
BODY = re.search(r"--data '(.*)'", BLOCKS["bash"], re.DOTALL)


def table(first: str) -> list[list[str]]:
    """The rows of the table whose header begins with `first`."""
    rows = re.search(rf"^\| {first} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert rows, first
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows[1].splitlines()]


def curl(url: str, token: str = "") -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    environment = {**os.environ, "PORT": str(urlsplit(url).port), "TOKEN": token, "no_proxy": "127.0.0.1"}
    done = subprocess.run(["bash", "-euc", BLOCKS["bash"]], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_curl_line_gets_the_answer_that_is_printed(simulator_url: str) -> None:
    assert TurnReply.model_validate_json(curl(simulator_url)) == TurnReply.model_validate_json(BLOCKS["json"])


def test_the_curl_line_carries_the_token() -> None:
    with running(SimulatorServer(SCRIPTED_USER, token="right")) as url:
        assert TurnReply.model_validate_json(curl(url, "right")).reply
        assert TurnProblem.model_validate_json(curl(url, "wrong")).kind == "simulator_transport"


@pytest.mark.parametrize(
    "name", ["TurnRequest", "ScenarioCard", "Utterance", "State", "Anchor", "TurnReply", "Usage", "TurnProblem"]
)
def test_the_tables_are_the_models(name: str) -> None:
    schema = getattr(protocol, name).model_json_schema()
    fields = [(f"`{field}`", allowed(said, schema.get("$defs", {}))) for field, said in schema["properties"].items()]
    assert [(row[0], row[1]) for row in table(name)] == fields
    assert all(len(row[2].split()) >= 1 for row in table(name))
    if name in ("TurnRequest", "ScenarioCard", "Utterance"):  # what a client writes
        optional = [f"`{field}`" for field in schema["properties"] if field not in schema["required"]]
        assert [row[0] for row in table(name) if row[2].startswith("default ")] == optional


def test_the_endpoints_are_the_routes() -> None:
    routes = {(route.path, "POST" if "POST" in route.methods else "GET") for route in SimulatorServer(SCRIPTED_USER).app().routes}  # type: ignore[attr-defined]
    listed = {tuple(reversed(row[0].strip("`").split())) for row in table("endpoint")}
    assert listed == routes


async def test_the_errors_are_those_that_the_server_gives() -> None:
    """Every row of the table of errors, against a server with a backend that fails on demand."""

    class Fails(Backend):
        error: Exception = RuntimeError("a defect")

        async def react(self, request: TurnRequest) -> Reaction:
            raise self.error

    assert BODY
    backend, seen = Fails(), {}
    config = SCRIPTED_USER.model_copy(update={"server": SCRIPTED_USER.server.model_copy(update={"max_body_mb": 0.01})})
    good = {"Authorization": "Bearer right"}
    with running(SimulatorServer(config, backend=backend, token="right")) as url:
        async with aiohttp.ClientSession() as session:

            async def ask(body: str, headers: dict[str, str], path: str = "/v1/turn") -> None:
                async with session.post(url + path, data=body, headers=headers) as response:
                    seen[response.status] = TurnProblem.model_validate_json(await response.read()).kind

            await ask("{}", good)
            await ask(BODY[1], {})
            await ask(" " * 20_000, good)
            await ask(BODY[1], good, "/v1/turns")
            await ask(BODY[1], good, "/health")
            await ask(BODY[1], {"X": "x" * 40_000})
            for k, backend.error in enumerate(
                (RuntimeError(), SimulatorReplyError("x"), SimulatorTransportError("x"), BudgetSpent("x"))
            ):
                await ask(json.dumps({**json.loads(BODY[1]), "seed": k}), good)
    assert {row[0]: row[1].strip("`") for row in table("status")} == {str(status): kind for status, kind in seen.items()}


def test_the_contract_is_linked(ctcgrpo: Command) -> None:
    code, out, _ = ctcgrpo("serve", "--help")
    assert code == 0 and "ctcgrpo/simulator/README.md" in out
    assert "(ctcgrpo/simulator/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
