"""`ctcgrpo fields`, `ctcgrpo metrics` and the groups of --help.

1. every field of every section has a description, every section a docstring, and what is printed comes from the model;
2. the table of metrics and the code name the same metrics: what a real run writes, and what the code logs on other paths;
3. lines fit into 80 columns; an unknown name gets a suggestion.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

import ctcgrpo as package
from ctcgrpo import cli
from ctcgrpo.errors import RecipeError
from ctcgrpo.factory.sampling import Pools
from ctcgrpo.reference.fields import FILES, sections_of
from ctcgrpo.reference.fields import select as selected_fields
from ctcgrpo.reference.metrics import all_groups, all_metrics, entry_of
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.train import train
from ctcgrpo.util.sections import Section, section_type
from tests.conftest import ROOT, Command

PACKAGE = Path(package.__file__).parent


# --- fields ------------------------------------------------------------------------------------------------------------------


def _subclasses(model: type[Section]) -> Iterator[type[Section]]:
    for below in model.__subclasses__():
        yield below
        yield from _subclasses(below)


def _reachable(model: type[Section]) -> Iterator[type[Section]]:
    yield model
    for field in model.model_fields.values():
        section = section_type(field.annotation)
        if section is not None and issubclass(section, Section):
            yield from _reachable(section)


def test_every_field_has_a_description_and_every_section_a_docstring() -> None:
    # Without bases of others, and without the seeds of the factory, which are the package's own file.
    everywhere = {s for s in _subclasses(Section) if s.__module__.startswith("ctcgrpo.") and not s.__subclasses__()} - {Pools}
    assert everywhere == {s for model, _ in FILES.values() for s in _reachable(model)}, "a section that `fields` does not show"
    bare = [
        f"{model.__name__}.{name}"
        for model in everywhere
        for name, field in model.model_fields.items()
        if section_type(field.annotation) is None and len((field.description or "").split()) < 2
    ]
    assert bare == []
    assert [model.__name__ for model in everywhere if not model.__doc__] == []


def test_defaults_ranges_and_choices_are_those_of_the_model() -> None:
    shown = {field.path: field for section in sections_of("recipe") for field in section.fields}
    for section, model in (
        ("credit", Recipe.model_fields["credit"].default),
        ("training", Recipe.model_fields["training"].default),
    ):
        for name, value in model.model_dump(mode="json").items():
            assert json.loads(shown[f"{section}.{name}"].default) == value
    assert shown["training.clip"].allowed == "number > 0, < 1"
    assert shown["rollout.group_size"].allowed == "integer >= 2"
    assert shown["credit.centering"].allowed == (
        "one of rollout, group, group_turn, group_loo, group_turn_loo, scene, none, my_module:my_function"
    )
    assert shown["credit.scale"].option == "scale_rewards" and shown["training.learning_rate"].option == ""
    assert shown["scenarios.scenes"].allowed == "list (1 or more) of text"
    assert shown["policy.model"].default == "required" and shown["policy.revision"].allowed == "text, or null"
    in_lists = {field.path for section in sections_of("simulator-config") for field in section.fields}
    assert {"llm.endpoints[].url", "llm.endpoints[].price.prompt", "server.token_env"} <= in_lists


@pytest.mark.parametrize("name", [None, *FILES])
def test_fields_are_printed_within_80_columns(ctcgrpo: Command, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = ctcgrpo("fields", *([name] if name else []))
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    for section in sections_of(name or "recipe"):
        for field in section.fields:
            assert f"  {field.path}" in out and " ".join(field.meaning.split()[:2]) in out


def test_a_section_a_section_in_it_and_one_field(ctcgrpo: Command) -> None:
    _, out, _ = ctcgrpo("fields", "policy")
    assert "policy.lora.rank = 16" in out and "training.clip" not in out
    _, out, _ = ctcgrpo("fields", "policy.lora")
    assert "policy.lora.rank" in out and "policy.model" not in out
    _, out, _ = ctcgrpo("fields", "training.clip")
    assert "training.clip = 0.2" in out and "number > 0, < 1" in out and "training.kl" not in out
    _, out, _ = ctcgrpo("fields", "simulator-config.llm.endpoints")
    assert "llm.endpoints[].key_env" in out and "budget" not in out
    assert {s.path for s in selected_fields("simulator")[1]} == {"simulator", "simulator.users[]"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("trianing", "training"),
        ("simulater-config", "simulator-config"),
        ("credit.alfa", "credit.alpha"),
        ("centering", "credit.centering"),
        ("endpoint", "simulator-config.llm.endpoints"),
        ("nothing-like-it", "known: "),
    ],
)
def test_an_unknown_section_gets_a_suggestion(ctcgrpo: Command, given: str, meant: str) -> None:
    code, out, err = ctcgrpo("fields", given)
    assert code == RecipeError.exit_code and out == "" and repr(given) in err and meant in err


# --- metrics -----------------------------------------------------------------------------------------------------------------


def _named(node: ast.expr) -> str | None:
    """The name that a literal is, its variable parts as {}; None for what is no literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
    return None


def _names_in_code() -> set[str]:
    """What any code path logs: literals given to the trainer's `_log_number`, the names that `rollout_metrics` makes, and those of
    `validation_metrics`."""
    found: set[str | None] = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_log_number":
                found.add(_named(node.args[0]))
            if isinstance(node, ast.FunctionDef) and node.name in ("rollout_metrics", "validation_metrics", "log_dialogues"):
                for part in ast.walk(node):
                    if isinstance(part, ast.Dict):
                        found |= {_named(key) for key in part.keys if key is not None}
                    if isinstance(part, ast.DictComp):
                        found.add(_named(part.key))
                    if isinstance(part, ast.Subscript) and isinstance(part.ctx, ast.Store):
                        found.add(_named(part.slice))
    return {re.sub("^eval_", "eval/", name) for name in found if name is not None}


def _without_variables(name: str) -> str:
    return re.sub(r"\{\w*\}", "{}", name)


def test_every_metric_that_the_code_logs_is_in_the_table() -> None:
    names = _names_in_code()
    assert {
        "kl",
        "memory/peak_gib",
        "deadline/after_{}_turns",
        "eval/outcome/{}",
    } <= names  # no run of the tests logs all of these
    assert sorted(names - {_without_variables(metric.name) for metric in all_metrics()}) == []


def test_a_run_logs_what_is_in_the_table_and_something_logs_each_entry(tmp_path: Path) -> None:
    """A run of recipes/tiny.yaml. Entries that it does not log are logged by the code's own literals; of what transformers logs
    itself (loss, epoch), only the run shows the names."""
    small = ["training.max_steps=1", "rollout.max_turns=1", "rollout.group_size=2", f"run.output_dir={tmp_path}"]
    train(load_recipe(ROOT / "recipes" / "tiny.yaml", small))
    lines = (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)}
    assert {"outcome/all", "outcome/charm", "grad_norm", "logprob_gap"} <= logged
    assert sorted(name for name in logged if entry_of(name) is None) == []
    known = _names_in_code() | logged
    assert sorted(m.name for m in all_metrics() if _without_variables(m.name) not in known) == []


def test_metrics_name_fields_that_there_are() -> None:
    fields = {key for section in sections_of("recipe") for key in (section.key, *(field.key for field in section.fields))}
    sections = set(Recipe.model_fields)
    for metric in all_metrics():
        for name in re.findall(r"\b([a-z]+(?:\.[a-z_]+)+)\b", f"{metric.healthy} {metric.otherwise} {metric.meaning}"):
            if name.partition(".")[0] in sections and not name.endswith((".json", ".jsonl")):
                assert name in fields, f"{metric.name} names {name}"


def test_metrics_are_printed_within_80_columns(ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = ctcgrpo("metrics")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert all(f"  {metric.name}: " in out for metric in all_metrics()) and all(
        group.split(",")[0] in out for group in all_groups()
    )
    _, out, _ = ctcgrpo("metrics", "failed/deadline")
    assert "failed/{kind}" in out and "clip_share" not in out
    _, out, _ = ctcgrpo("metrics", "packing")
    assert "packing/padding" in out and "packing/logprob_gap" in out and "entropy" not in out
    code, out, err = ctcgrpo("metrics", "clipshare")
    assert code == RecipeError.exit_code and out == "" and "did you mean 'clip_share'?" in err


# --- help --------------------------------------------------------------------------------------------------------------------


def test_help_groups_commands_and_says_each_in_one_sentence(ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = ctcgrpo("--help")
    assert code == 0
    listed = re.findall(r"^│ (\w+)  +\S", out, re.MULTILINE)
    assert listed[:4] == ["train", "show", "chat", "report"]
    assert set(listed) == set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert "─ Commands ─" not in out, "a command without a panel"
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        first = (command.help or "").split("\n\n")[0]
        assert re.fullmatch(r"[A-Z][^.]*\.", " ".join(first.split())), f"{name}: {first!r} is not one sentence"
