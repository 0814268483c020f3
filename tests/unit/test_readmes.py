"""Every README.md: its links lead somewhere, its commands parse, and its code runs, up to the edge that needs a GPU or a key."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from ctcgrpo.cli import app
from ctcgrpo.environments.eibench.scenario_format import check_record
from ctcgrpo.experiments.spec import Sweep
from ctcgrpo.factory.config import FactoryConfig
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.simulator.config import SimulatorConfig
from tests.conftest import ROOT

_ROOMS = ("recipes", "configs", "launch", "ctcgrpo", "tests")
# Runs write READMEs of their own below checkpoints/.
READMES = [
    ROOT / "README.md",
    ROOT / "checkpoints" / "README.md",
    *sorted(path for room in _ROOMS for path in (ROOT / room).rglob("README.md")),
]

_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LANGUAGES = {"bash", "python", "yaml", "json", "jsonc", "text", "bibtex"}
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*", re.DOTALL)
_PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]+\b|\.\.\.")
_OTHERS = {
    "export",
    "curl",
    "inspect",
    "sbatch",
    "git",
    "cd",
    "tensorboard",
    "ssh",
    "scp",
    "squeue",
    "mkdir",
    "kill",
    "nvidia-smi",
    "cp",
    "ruff",
    "mypy",
    "vllm",
    "vf-eval",
}
"""Programs that are not of this project: their lines are not looked into."""
_WITH_VALUE = {"--config_file", "--num_processes", "--num_machines", "--gpu_ids", "--machine_rank", "--main_process_ip"}
"""Options of `accelerate launch` that take a value."""
_SETTINGS = [Recipe, SimulatorConfig, FactoryConfig, Sweep]


class Block(NamedTuple):
    file: Path
    language: str
    text: str


def _blocks(*languages: str) -> list[Any]:
    found = []
    for file in READMES:
        for k, match in enumerate(_FENCE.finditer(file.read_text(encoding="utf-8"))):
            if match[1] in languages:
                found.append(pytest.param(Block(file, match[1], match[2]), id=f"{file.relative_to(ROOT)}-{k}"))
    return found


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, without comments and variables set before it; pipelines are cut apart."""
    pending = ""
    for line in text.replace("\\\n", " ").splitlines():
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # the quotation continues on the next line
            pending += "\n"
            continue
        pending = ""
        for k, group in itertools.groupby(words, lambda word: word in (";", "|", "&&", "&", "||", "do", "done")):
            command = list(itertools.dropwhile(_ASSIGNMENT.fullmatch, [] if k else group))
            if command and command[0] != "for":
                yield command
    assert not pending, f"a quotation is not closed: {pending}"


def _of_project(argument: str) -> bool:
    """Whether an argument is a path to something that the repository has."""
    first, *more = argument.removeprefix("./").split("/")
    known = first in ("recipes", "configs", "launch", "tests", "ctcgrpo") and bool(more)
    return known and not _PLACEHOLDER.search(argument) and "*" not in argument


def _parse(words: list[str]) -> Any:
    """A `ctcgrpo` command line, parsed by the real parser without being run. Raises typer.TyperException."""
    command: Any = typer.main.get_command(app)
    context, arguments = None, words[1:]
    if arguments[0] == "evaluate" and (_PLACEHOLDER.fullmatch(arguments[1]) or "/" in arguments[1]):
        arguments.insert(1, "run")  # the sub-command of the folder of a run, which is not there
    while True:
        context = command.make_context(command.name, list(arguments), parent=context)
        if not hasattr(command, "resolve_command"):
            return context
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


def _check_recipe(file: str, overrides: list[str]) -> None:
    if _of_project(file):
        load_recipe(ROOT / file, [o for o in overrides if "=" in o and not _PLACEHOLDER.fullmatch(o.partition("=")[2])])


def _check(words: list[str]) -> None:
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program in _OTHERS:
        return
    for argument in arguments:
        path = argument.partition("=")[2] if argument.startswith("-") and "=" in argument else argument
        if _of_project(path):
            assert (ROOT / path.partition("::")[0]).exists(), f"{path} is not there"
    if program == "ctcgrpo":
        context = _parse([program, *arguments])
        if context.info_name in ("train", "check"):
            _check_recipe(str(context.params["recipe"]), context.params["overrides"] or [])
    elif program == "accelerate":
        assert arguments[0] == "launch"
        k = next(k for k, a in enumerate(arguments[1:], 1) if not a.startswith("-") and arguments[k - 1] not in _WITH_VALUE)
        if not arguments[k].endswith(".py"):
            _check_recipe(arguments[k], arguments[k + 1 :])
    elif program in ("python", "python3"):
        if arguments[0] == "-m":
            assert find_spec(arguments[1]) is not None, f"no module {arguments[1]}"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"\[([\w,-]+)\]", " ".join(arguments)):
            assert set(named.split(",")) <= set(extras), named
    elif program.removeprefix("./").startswith((".ci/", "launch/")):
        assert (ROOT / program).stat().st_mode & 0o100, f"{program} cannot be run"
    else:
        assert program == "pytest" or _PLACEHOLDER.fullmatch(program), f"unknown program {program}"


def test_readmes_are_found() -> None:
    rooms = {str(path.parent.relative_to(ROOT)) for path in READMES}
    assert {".", "recipes", "configs", "launch", "tests", "checkpoints", "ctcgrpo/simulator", "ctcgrpo/training"} <= rooms


@pytest.mark.parametrize("file", READMES, ids=lambda f: str(f.relative_to(ROOT)))
def test_links_and_fences(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    prose = _FENCE.sub("", text)
    assert "```" not in prose, "a fence is not closed"
    assert {match[1] for match in _FENCE.finditer(text)} <= _LANGUAGES
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', prose)
    for target in [*re.findall(r"\]\(([^)\s]+)\)", prose), *pictures]:
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in _anchors(there), f"{target}: no such heading"


def _anchors(file: Path) -> set[str]:
    """The names that a code host gives to headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("block", _blocks("bash"))
def test_commands_parse(block: Block) -> None:
    for words in _commands(block.text):
        try:
            _check(words)
        except typer.TyperException as error:
            pytest.fail(f"{shlex.join(words)}: {error}")


@pytest.mark.parametrize("block", _blocks("json", "jsonc"))
def test_json_is_valid(block: Block) -> None:
    text = re.sub(r"\s//.*$", "", block.text, flags=re.MULTILINE) if block.language == "jsonc" else block.text
    data = json.loads(text)
    if isinstance(data, dict) and "scene_tag" in data:
        scenario, faults = check_record(data, str(block.file))
        assert scenario is not None, faults


@pytest.mark.parametrize("block", _blocks("yaml"))
def test_yaml_names_fields(block: Block) -> None:
    data = yaml.safe_load(block.text)
    assert isinstance(data, dict)
    data.pop("'", None)  # the first line of a recipe, which makes it Python too
    fields = [{*model.model_fields, "extends"} for model in _SETTINGS]
    assert any(set(data) <= known for known in fields), f"{sorted(data)} are fields of no kind of file"


@pytest.mark.parametrize("block", _blocks("python"))
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that trains is run by test_python_api.py, with a small model."""
    if "openenv" in block.text:
        pytest.importorskip("openenv", reason="needs the extra openenv")
    code = compile(block.text, str(block.file), "exec")
    if ".train()" in block.text:
        assert block.file == ROOT / "README.md"
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes" / "examples"), *sys.path])
    exec(code, {"__name__": "readme"})


def test_messages_of_the_troubleshooting_are_those_of_the_program() -> None:
    """What a reader searches for: every part of three words and more stands in the source, whatever its values are."""
    files = [
        file
        for folder in ("ctcgrpo", "launch")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".sh", ".sbatch")
    ]
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text(encoding="utf-8") for file in files))
    page = (ROOT / "launch" / "README.md").read_text(encoding="utf-8").partition("## Troubleshooting")[2]
    messages = [m for row in re.findall(r"^\| (`.*?) \| ", page, re.M) for m in re.findall(r"`([^`]+)`", row)]
    parts = [part.strip() for m in messages for part in re.split(r"\.\.\.|\bN\b", m) if len(part.split()) >= 3]
    assert len(parts) > 20 and [part for part in parts if part not in source] == []


def test_extras_are_installed_from_the_clone() -> None:
    folders = [ROOT, *(ROOT / name for name in ("ctcgrpo", "recipes", "configs", "launch", "tests"))]
    files = [file for folder in folders for file in folder.glob("*" if folder == ROOT else "**/*")]
    texts = {f: f.read_text(encoding="utf-8") for f in files if f.suffix in (".py", ".md", ".yaml", ".sh", ".sbatch")}
    assert len(texts) > 300 and [str(file) for file, text in texts.items() if "pip install 'ctcgrpo" + "[" in text] == []


def test_a_wrong_option_is_noticed() -> None:
    for line in ("ctcgrpo train recipes/tiny.yaml --fast", "ctcgrpo evaluate eibench --modle x", "ctcgrpo nothing"):
        with pytest.raises(typer.TyperException):
            _check(line.split())
    for line in (
        "ctcgrpo train recipes/none.yaml",
        "launch/none.sh",
        "python -m tests.none",
        "pip install '.[none]'",
        "made-up x",
    ):
        with pytest.raises((AssertionError, FileNotFoundError)):
            _check(shlex.split(line))
