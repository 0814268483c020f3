"""Folders that are not there, or hold something else than what was meant: said at once, with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctcgrpo.errors import OutputError, PolicyError
from ctcgrpo.run.folders import check_model, require_folder, require_run
from ctcgrpo.util.naming import is_path
from tests.conftest import ROOT, Command

TINY = str(ROOT / "recipes" / "tiny.yaml")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished run, the current one."""
    (tmp_path / "checkpoints" / "quickstart" / "final").mkdir(parents=True)
    (tmp_path / "checkpoints" / "quickstart" / "recipe.yaml").write_text("run: {name: quickstart}")
    (tmp_path / "checkpoints" / "quickstart" / "final" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "model, message",
    [
        ("checkpoints/quikstart", "no such folder; did you mean 'checkpoints/quickstart'?"),
        ("checkpoints/quikstart/final", "no such folder; did you mean 'checkpoints/quickstart/final'?"),
        ("checkpoints/other", "no such folder"),
        ("./x", "no such folder"),
        ("../x", "no such folder"),
        ("/nowhere/x", "no such folder"),
        ("~/nowhere-at-all", "no such folder"),
        ("mine/", "no such folder"),
        ("checkpoints/quickstart", "it is a run folder; its trained policy is checkpoints/quickstart/final"),
        ("checkpoints/quickstart/", "it is a run folder; its trained policy is checkpoints/quickstart/final"),
        ("checkpoints", "it has no config.json"),
        ("checkpoints/quickstart/recipe.yaml", "it is a file"),
    ],
)
def test_a_path_never_goes_to_the_hub(
    runs: Path, ctcgrpo: Command, monkeypatch: pytest.MonkeyPatch, model: str, message: str
) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(PolicyError) as error:
        check_model(model, "policy.model")
    assert f"policy.model {model!r}" in str(error.value) and message in str(error.value)
    code, _, err = ctcgrpo("train", TINY, f"policy.model={model}")
    assert code == 4 and message in err
    code, _, err = ctcgrpo("evaluate", "eibench", "--simulator", "scripted", "--model", model)
    assert code == 4 and f"--model {model!r}" in err and message in err


@pytest.mark.parametrize(
    "model", ["builtin/tiny", "Qwen/Qwen3-0.6B", "gpt2", "openai-api/local/NAME", "checkpoints/quickstart/final"]
)
def test_what_may_be_elsewhere_passes(runs: Path, model: str) -> None:
    check_model(model, "policy.model")
    assert is_path(model) == model.startswith("checkpoints")


def test_runs_are_named_where_they_are(runs: Path, ctcgrpo: Command) -> None:
    assert require_run(Path("checkpoints/quickstart")).path == Path("checkpoints/quickstart")
    with pytest.raises(OutputError, match="has no recipe.yaml; the run is checkpoints/quickstart"):
        require_run(Path("checkpoints/quickstart/final"))
    with pytest.raises(OutputError, match="is a file; expected a folder"):
        require_folder(Path("checkpoints/quickstart/recipe.yaml"))
    for name, hint in (
        ("traces", "it is the output of a CTCGRPOTrainer"),
        ("data.json", "the run there ended before its first step"),
    ):
        Path("begun", name).mkdir(parents=True)  # a recipe's run writes traces/ and data.json before recipe.yaml
        with pytest.raises(OutputError, match=f"has no recipe.yaml; {hint}"):
            require_run(Path("begun"))
    for command in ("show", "report", "noise", "export", "evaluate", "leaderboard"):
        code, _, err = ctcgrpo(command, "checkpoints/quickstrt")
        assert code == 6 and "checkpoints/quickstrt: no such folder; did you mean 'checkpoints/quickstart'?" in err, command
    code, _, err = ctcgrpo("evaluate", "checkpoints/quickstart/final")
    assert code == 2 and "try `ctcgrpo evaluate eibench --model checkpoints/quickstart/final`" in err
