"""One real finished run: every command that the quickstart names next, for every simulated user, and with its files damaged."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctcgrpo.cli import train_here
from ctcgrpo.report.show import show_run
from ctcgrpo.run.export import model_card
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.run_records import read_summary
from ctcgrpo.util.terminal import Terminal
from tests.conftest import Command
from tests.unit.test_run import TINY


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of recipes/tiny.yaml with a validation section."""
    folder = tmp_path_factory.mktemp("runs")
    quick = ["rollout.group_size=2", "rollout.max_new_tokens=8"]
    train_here(load_recipe(TINY, [*quick, "validation.scenarios=english/test", "validation.every=1", f"run.output_dir={folder}"]))
    return folder / "tiny"


@pytest.fixture(scope="module")
def shown(finished: Path) -> str:
    """What `show` prints of it, up to the dialogues."""
    out = io.StringIO()
    show_run(finished, Terminal(120, file=out))
    return out.getvalue().partition("improvement")[0]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))


def test_every_next_command_of_the_quickstart_works(run: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = json.loads((run / "summary.json").read_text())
    score = f"{summary['after']['overall']:+.3f}"
    code, out, err = ctcgrpo("show", str(run))
    assert code == 0 and score in out and "warning" not in out, out + err
    code, out, err = ctcgrpo("report", str(run))
    assert code == 0 and (run / "report.html").stat().st_size > 10_000, err
    code, out, err = ctcgrpo("export", str(run))
    assert code == 0 and not list(run.glob("*.partial")), err
    card = (run / "export" / "README.md").read_text()
    assert f"| {score} |" in card and "Simulated user: scripted;" in card
    AutoTokenizer.from_pretrained(run / "export")
    AutoModelForCausalLM.from_pretrained(run / "export")
    code, out, err = ctcgrpo("evaluate", str(run), "--limit", "2", "--display", "none")
    assert code == 0 and "difference" in out, err
    code, out, err = ctcgrpo("leaderboard", str(run))
    assert code == 0 and "tiny" not in err, err
    folders = [str(run / "evaluations" / f"eibench-{which}") for which in ("base", "final")]
    code, out, err = ctcgrpo("compare", *folders)
    assert code == 0, err
    monkeypatch.setattr(sys, "stdin", io.StringIO("I should have closed the gate.\n\n"))
    code, out, err = ctcgrpo("chat", "--scenario", "repair-test-01")
    assert code == 0 and "outcome" in out, err


def test_a_run_without_validation_is_told_of(run: Path, ctcgrpo: Command) -> None:
    for file in (run / "summary.json", run / "validation.jsonl", *(run / "traces").glob("validation-*")):
        file.unlink()
    code, _, err = ctcgrpo("show", str(run))
    assert code == 6 and "no summary.json" in err
    assert ctcgrpo("report", str(run))[0] == 0
    assert ctcgrpo("export", str(run))[0] == 0
    assert "nothing is known of how good" in (run / "export" / "README.md").read_text()


USERS: list[tuple[dict[str, Any], str]] = [
    ({"backend": "scripted"}, "scripted"),
    ({"backend": "scripted", "reluctance": 0.5}, "scripted, reluctance 0.5"),
    ({"backend": "llm", "models": ["qwen3-max"], "prompts": "ctcgrpo/1", "samples": 2}, "qwen3-max, prompts ctcgrpo/1"),
    ({"backend": "llm", "models": ["a", "b"], "prompts": "official/9", "settings": "x"}, "a, b, prompts official/9"),
    ({"backend": "mine"}, "mine"),
    ({"backend": "mine", "models": "qwen", "prompts": None}, "mine"),
    ({"backend": {"x": 1}, "models": [None, 3], "prompts": []}, "unknown"),
    ({"backend": "e\x1b[31mvil\u202e\n# heading"}, "e[31mvil # heading"),
    ({}, "unknown"),
]


@pytest.mark.parametrize(("said", "told"), USERS)
def test_every_reader_takes_what_any_simulator_says_of_itself(
    run: Path, ctcgrpo: Command, said: dict[str, Any], told: str
) -> None:
    from ctcgrpo.evaluation.report import other_of
    from ctcgrpo.report.page import figures_of
    from ctcgrpo.report.reading import read_run

    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "simulator": said}))
    (run / "simulator.json").write_text(json.dumps(said))
    assert ctcgrpo("show", str(run))[0] == 0
    found = read_summary(run)
    assert f"Simulated user: {told};" in model_card(load_recipe(run / "recipe.yaml"), found, which="final")
    assert figures_of(read_run(run))["facts"]["simulated user"] == told
    assert other_of({"other": said}) == told


def first_line(line: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        lines = file.read_text().split("\n")
        file.write_text("\n".join([line, *lines[1:]]))

    return damage


def text(content: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(content)


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content, n = re.subn(old, new, file.read_text(), count=1)
        assert n == 1
        file.write_text(content)

    return damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def without_second_line(file: Path) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], *lines[2:]]))


def doubled(file: Path) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[0]]))


LINES = [first_line("{bad"), first_line("{}"), first_line("[]"), first_line('{"step": 1}'), first_line('{"turns": 5}'), zeroed, cut,
         doubled, first_line("\x00"), first_line("[" * 5000)]  # fmt: skip
DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    *(("summary.json", damage) for damage in (
        cut, zeroed, text(""), text("[]"), text("{}"), text("null"), text('{"before": 1}'), text("[" * 5000),
        replaced(r'"overall": -0', '"overall": NaN, "x": -0'), replaced(r'"overall": -0', '"overall": 0'),
        replaced(r'"overall": -0', '"overall": "-0.5", "x": -0'), replaced('"improvement"', '"improvements"'),
        replaced(r'"step": 0', '"step": 1'), replaced(r'"ci95": \[', '"ci95": [-0.9, 0.9], "x": ['),
    )),
    *((file, damage) for file in ("metrics.jsonl", "validation.jsonl") for damage in LINES),
    ("validation.jsonl", replaced(r"-0\.\d+", "0.5")),
    ("validation.jsonl", replaced(r"-0\.\d+", "NaN")),
    ("metrics.jsonl", replaced(r'"outcome/all": -0\.\d+', '"outcome/all": 0.5')),
    ("metrics.jsonl", replaced(r'"outcome/all": -0\.\d+', '"outcome/all": "high"')),
    *((f"traces/{kind}.rank-0.jsonl", damage) for kind in ("step-000001", "validation-000000") for damage in LINES),
    ("traces/validation-000000.rank-0.jsonl", replaced(r'"outcome": -\d\.\d+', '"outcome": 0.5')),
    ("traces/step-000001.rank-0.jsonl", replaced(r'"outcome": -\d\.\d+', '"outcome": 0.5')),
    ("traces/step-000001.rank-0.jsonl", replaced(r'"reward": -?\d\.\d+', '"reward": 0.1')),
    ("traces/step-000001.rank-0.jsonl", replaced(r'"advantage": -?\d\.\d+', '"advantage": 9.5')),
    ("metrics.jsonl", replaced(r'"outcome/charm": -\d\.\d+', '"outcome/charm": 0.5')),
    ("metrics.jsonl", text("")), ("validation.jsonl", replaced("support", "charm")), ("validation.jsonl", without_second_line),
    ("validation.jsonl", replaced('"failed": 0', '"failed": 3')),
    ("simulator.json", cut), ("simulator.json", text("[]")), ("simulator.json", zeroed),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_file_is_named_and_never_a_traceback(
    finished: Path, shown: str, tmp_path: Path, ctcgrpo: Command, name: str, damage: Callable[[Path], None]
) -> None:
    """`show` and `report` either refuse, naming the file, or say beside their figures what is wrong; an export is refused where
    its card would be wrong."""
    from ctcgrpo.report.reading import read_run

    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "best"))
    damage(run / name)
    stem = Path(name).stem.partition(".")[0].replace("-", ".")
    code, out, err = ctcgrpo("show", str(run))
    assert code in (0, 6), err
    if code:
        assert re.search(stem, err) or "traces" in err, err
    elif out.partition("improvement")[0] != shown:
        assert "warning:" in out and re.search(rf"{stem}|after step 0|summary", out), out
    code, out, err = ctcgrpo("report", str(run))
    problems = read_run(run).problems
    assert code == 0 and out.count("warning: ") == len(problems), err
    if name == "validation.jsonl" or name.startswith(("traces", "metrics", "summary")):
        assert problems, "nothing is said"
    if name in ("summary.json", "validation.jsonl"):
        code, out, err = ctcgrpo("export", str(run))
        if code:
            assert code == 6 and re.search(stem, err), (code, out, err)
            assert not list(run.glob("export*"))
        else:  # only where the damage concerns no figure of the card
            whole = model_card(load_recipe(finished / "recipe.yaml"), read_summary(finished), which="final")
            assert (run / "export" / "README.md").read_text() == whole
    if name.startswith("traces/step"):
        code, out, err = ctcgrpo("noise", str(run), "--dialogues", "1", "--replays", "2")
        assert code == 0, err
        if damage in LINES and damage is not doubled:
            assert "warning: step-000001.rank-0.jsonl, line" in err


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", zeroed), ("model.safetensors", cut), ("config.json", text("{")), ("config.json", zeroed),
        ("tokenizer.json", zeroed), ("tokenizer.json", text("{}")), ("tokenizer_config.json", text("[]")), ("COMPLETE", text("{}")),
        ("COMPLETE", text("[]")), ("COMPLETE", zeroed),
    ],
)  # fmt: skip
@pytest.mark.parametrize("refreshed", [False, True])
def test_a_damaged_policy_is_named_and_leaves_nothing_behind(
    run: Path, ctcgrpo: Command, name: str, damage: Callable[[Path], None], refreshed: bool
) -> None:
    """With the marker of the whole folder, and with one that was written after the damage."""
    from ctcgrpo.util.files import mark_complete

    damage(run / "final" / name)
    if refreshed and name != "COMPLETE":
        mark_complete(run / "final")
    code, _, err = ctcgrpo("export", str(run))
    assert code in (4, 6) and "final" in err, err
    assert not list(run.glob("export*"))
    if name == "COMPLETE":
        assert code == 6 and "no complete 'final' (COMPLETE " in err, err
    if name in ("model.safetensors", "tokenizer.json"):
        code, _, err = ctcgrpo("evaluate", str(run), "--limit", "1", "--display", "none")
        assert code in (4, 6) and "final" in err, err


def test_a_bad_number_of_the_best_step_is_named(run: Path, ctcgrpo: Command) -> None:
    (run / "best" / "STEP").write_text("xx\n")
    code, _, err = ctcgrpo("export", str(run), "--which", "best")
    assert code == 6 and "no complete 'best' (STEP has 3 bytes; expected 2)" in err, err
    assert ctcgrpo("export", str(run))[0] == 0


@pytest.fixture
def killed(finished: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of it as if it had been killed before its final policy was written; and the command that resumes it."""
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "final")
    return run, ["train", str(run / "recipe.yaml"), f"run.output_dir={tmp_path}", "run.name=run"]


def test_half_a_line_at_the_end_of_the_metrics_is_forgotten(killed: tuple[Path, list[str]], ctcgrpo: Command) -> None:
    run, command = killed
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"step": 3, "outco')
    code, out, err = ctcgrpo(*command)
    assert code == 0 and "resumes from checkpoint-4" in " ".join(out.split()), err
    assert (run / "metrics.jsonl").read_text() == whole and (run / "final" / "COMPLETE").exists()


RECORDS: list[tuple[str, Callable[[Path], None], str]] = [
    *((file, damage, problem) for file in ("metrics.jsonl", "validation.jsonl") for damage, problem in (
        (first_line("{bad"), "line 1: not valid JSON"), (first_line("{}"), "line 1: step"), (first_line("[]"), "line 1: expected"),
        (first_line('{"step": "1"}'), "line 1: step = '1'"), (first_line('{"step": 1, "step": 1}'), "line 1: .*duplicate key"),
        (first_line("[" * 5000), "line 1: not"), (first_line("\x00"), "line 1: not valid JSON"), (doubled, "duplicate step"),
    )),
    ("metrics.jsonl", first_line('{"step": 1, "x": 1' + "0" * 400 + "}"), "line 1: "),
    ("validation.jsonl", without_second_line, "lacks the validation after step 1"),
    ("validation.jsonl", cut, "lacks the validation after step 1"),
    *((file, damage, problem) for file in ("simulator.json", "data.json", "sharding.json") for damage, problem in (
        (cut, "cannot be read"), (zeroed, "cannot be read"), (text("[]"), "a JSON object"), (text("[" * 5000), "nested too deep"),
        (text('{"a": 1, "a": 2}'), "duplicate key"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "problem"), RECORDS)
def test_a_run_does_not_resume_from_damaged_records(
    killed: tuple[Path, list[str]], ctcgrpo: Command, name: str, damage: Callable[[Path], None], problem: str
) -> None:
    run, command = killed
    damage(run / name)
    before = {file: file.read_bytes() for file in [run / name, *(run / "traces").iterdir()]}
    code, _, err = ctcgrpo(*command)
    assert code == 6 and re.search(rf"{run / name}\W.*{problem}", err), err
    assert "restore the file to resume, or start another run with run.name=NAME" in err and "Traceback" not in err
    assert {file: file.read_bytes() for file in before} == before, "nothing is lost"


def test_a_record_of_data_that_holds_something_else_is_no_record(killed: tuple[Path, list[str]], ctcgrpo: Command) -> None:
    run, command = killed
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**data, next(iter(data)): 3}))
    code, _, err = ctcgrpo(*command)
    assert code == 6 and f"{next(iter(data))}: recorded as '3'; expected digests by name" in err, err


def test_a_failed_write_leaves_nothing_behind(run: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        code, _, err = ctcgrpo("export", str(run))
    assert code == 6 and "No space left" in err, err
    assert not list(run.glob("export*"))
