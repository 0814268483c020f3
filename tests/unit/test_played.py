"""What scores are named by: the data set, the settings, and how a run trained and validated its policy."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from ctcgrpo.environments.eibench.scenarios import PACKS, described
from ctcgrpo.errors import OutputError
from ctcgrpo.evaluation.compare import compared, ranked
from ctcgrpo.evaluation.played import in_words, settings_of, title_of, trained_as
from ctcgrpo.run.recipe_file import load_recipe
from tests import inspect_models  # noqa: F401 - registers the models
from tests.conftest import Command
from tests.unit.test_evaluation import made
from tests.unit.test_run import FAST, TINY

SAMPLING = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 1024}
BUNDLED = "eibench task on the bundled pack english/test"


def played(folder: Path, score: float = 0.1, model: str = "m/a", *, rounds: int = 8, **sampling: Any) -> Path:
    facts = {"task": {"rounds": rounds, "variant": "evaluation", "repeats": 1}, "generation": SAMPLING | sampling}
    return made(folder, {"a": [score], "b": [score]}, model, data="d1", data_set="the bundled pack english/test", **facts)


def test_only_eibenchs_own_data_is_called_eibench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTCGRPO_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "eibench" / "test").mkdir(parents=True)
    copy = tmp_path / "EIBench" / "test"
    copy.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source, title in {
        "english/test": BUNDLED,
        str(PACKS / "chinese" / "test"): "eibench task on the bundled pack chinese/test",
        "eibench/test": "EIBench (eibench/test)",
        "EIBench/test": "eibench task on EIBench/test",
        "mine.jsonl": "eibench task on mine.jsonl",
    }.items():
        assert title_of({"bench": "eibench", "data_set": described(source)}) == title
    (tmp_path / "english" / "test").mkdir(parents=True)  # goes before the pack, as in load_scenarios
    assert described("english/test") == "english/test"
    assert "not recorded" in title_of({"bench": "eibench"})


def test_a_leaderboard_names_and_separates_settings(tmp_path: Path, ctcgrpo: Command) -> None:
    played(tmp_path / "a", 0.1)
    played(tmp_path / "b", 0.2, "m/b")
    played(tmp_path / "c", 0.3, "m/c", rounds=4)
    played(tmp_path / "d", 0.4, "m/d", temperature=1.0)
    played(tmp_path / "e", 0.5, "m/e", max_tokens=32)
    boards = {tuple(entry["model"] for entry in board["entries"]): board for board in ranked(tmp_path)}
    assert set(boards) == {("m/b", "m/a"), ("m/c",), ("m/d",), ("m/e",)}
    settings = boards["m/d",]["settings"]
    assert settings == "rounds 8, scoring variant evaluation, temperature 1.0, top-p 0.95, top-k not set, max tokens 1024"
    code, out, _ = ctcgrpo("leaderboard", str(tmp_path))
    told = " ".join(out.split())
    assert code == 0 and told.count(BUNDLED) == 4 and "rounds 4, scoring variant" in told and "EIBench" not in out


def test_a_comparison_refuses_other_rounds_and_names_other_sampling(tmp_path: Path, ctcgrpo: Command) -> None:
    a, b = played(tmp_path / "a"), played(tmp_path / "b", 0.3, "m/b", temperature=1.0, top_k=20)
    other = played(tmp_path / "c", rounds=4)
    with pytest.raises(OutputError, match="^different rounds: .*a has rounds 8; .*c has rounds 4; .*--mixed"):
        compared([a, other])
    code, out, err = ctcgrpo("compare", str(a), str(b))
    assert (code, err) == (0, "")
    page = (b / "comparison.html").read_text()
    for told in (" ".join(out.split()), page):
        assert BUNDLED in told and "EIBench" not in told
        assert "rounds 8, scoring variant evaluation, top-p 0.95, max tokens 1024" in told
        assert "temperature differs: m/a has 0.6, m/b 1.0" in told and "top-k differs: m/a has not set, m/b 20" in told


def test_repeats_a_limit_and_further_sampling_are_settings() -> None:
    summary = {"task": {"rounds": 3, "repeats": 2}, "generation": {"reasoning_effort": "low"}, "limit": 5}
    told = in_words(settings_of(summary))
    assert told.startswith("rounds 3, temperature not set") and told.endswith("reasoning effort low, repeats 2, limit 5")


def test_a_policy_of_a_run_is_evaluated_as_it_was_trained(
    tmp_path: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Benchmark defaults on a run's policy: what differs is said before and after, with the command that differs in nothing; that
    command gives the score of the run's own validation."""
    own = ["validation.scenarios=english/test", "validation.every=1", "rollout.top_p=0.9", "rollout.max_new_tokens=12"]
    code, _, err = ctcgrpo("train", TINY, *FAST, f"run.output_dir={tmp_path}", *own)
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    trained = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert trained["settings"]["data_set"] == "the bundled pack english/test" and trained["settings"]["rounds"] == 2

    asked = ["evaluate", "eibench", "--model", "tiny/best", "--simulator", "scripted", "--display", "none", "--rounds", "1"]
    code, out, err = ctcgrpo(*asked, "--max-tokens", "8")
    assert code == 0, err
    assert (
        "tiny/best belongs to the run tiny: trained on the bundled pack english/train, validated on the bundled pack english/test"
        in out
    )
    unlike = "rounds 1 (the run: 2); scoring variant evaluation (the run: training); temperature 0.6 (the run: 1.0); "
    unlike += "top-p 0.95 (the run: 0.9); max tokens 8 (the run: 12)"
    assert out.count(unlike) == 2 and out.index(unlike) < out.index(BUNDLED) < out.rindex(unlike)
    assert "EIBench" not in out
    command = next(line for line in out.splitlines() if line.startswith("to use the run's settings: ")).partition(": ")[2]
    assert command == "ctcgrpo evaluate eibench --model tiny/best --display none --as-trained"

    code, out, err = ctcgrpo(*shlex.split(command)[1:])
    assert code == 0, err
    assert "not comparable" not in out and "to use the run's settings" not in out
    [folder] = (tmp_path / "checkpoints" / "evaluations" / "eibench").glob("*-as-trained")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["score"]["mean"] == pytest.approx(trained["best"]["overall"], abs=0.02)
    assert summary["task"]["rounds"] == 2 and summary["generation"]["max_tokens"] == 12 and summary["unlike_trained"] == []

    code, out, err = ctcgrpo(*shlex.split(command)[1:], "--rounds", "1", "--limit", "2", "--out", "mine")
    assert code == 0 and "different settings: rounds 1 (the run: 2)\n" in out  # an option goes before the run
    assert "--out mine-as-trained" in out
    code, out, _ = ctcgrpo("show", "tiny")
    told = " ".join(out.split())
    assert code == 0 and f"{BUNDLED}: rounds 2, scoring variant training, instructions short (" in told
    assert "temperature 1.0, top-p 0.9" in told


def test_a_policys_run_is_found_beside_it_and_behind_a_link(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("final", "best", "base", "checkpoint-4", "export"):
        (run / name).mkdir(parents=True)
    text = load_recipe(TINY, ["policy.persona_sections=[Known facts]", "validation.scenarios=english/test"]).to_yaml()
    (run / "recipe.yaml").write_text(text)
    (tmp_path / "best").symlink_to(run / "checkpoint-4")
    for folder in (*run.iterdir(), tmp_path / "best"):
        found = trained_as(folder)
        assert (found is not None) == folder.is_dir(), folder
        if found is not None:
            assert found.run == run and "simulator scripted, persona sections Known facts" in found.description
            assert found.differences({**found.task, **found.sampling}) == []
            assert found.differences({**found.task, **found.sampling, "rounds": 9}) == ["rounds 9 (the run: 3)"]
    assert trained_as(tmp_path / "nothing") is None and trained_as(Path("openai/gpt-4o")) is None


def test_as_trained_needs_a_run(ctcgrpo: Command, tmp_path: Path) -> None:
    code, _, err = ctcgrpo("evaluate", "eibench", "--model", "scripted/talker", "--simulator", "scripted", "--as-trained")
    assert code == 2 and "--model = scripted/talker" in err and "checkpoints/RUN/best" in err
    code, _, err = ctcgrpo("evaluate", "sage", "--model", "scripted/talker", "--simulator", "scripted/user", "--as-trained")
    assert code == 2 and "--as-trained cannot be used with sage" in err
