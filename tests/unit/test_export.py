"""What is taken home: figures on the card, what is missing named, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ctcgrpo.errors import OutputError
from ctcgrpo.run.export import export, push
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.util.files import mark_complete
from tests.conftest import ROOT, Command


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """A finished run's folder, as far as an export looks at it."""
    folder = tmp_path / "run"
    overrides = ["scenarios.train=eibench/train", f"policy.model={tiny}", "rollout.top_p=0.9"]
    overrides += ["validation.scenarios=english/test", "validation.samples=2"]
    folder.mkdir()
    (folder / "recipe.yaml").write_text(load_recipe(ROOT / "recipes" / "tiny.yaml", overrides).to_yaml())
    for name, mark in (("final", "COMPLETE"), ("checkpoint-4", "COMPLETE"), ("checkpoint-6", ""), ("best", "STEP")):
        model = AutoModelForCausalLM.from_pretrained(tiny)
        torch.nn.init.constant_(model.model.norm.weight, len(name))
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / name)
        if mark == "STEP":
            (folder / name / mark).write_text("4\n")
        if mark:
            mark_complete(folder / name)
    return folder


SUMMARY = {
    "before": {"overall": -0.5, "scenes": {"support": -0.5, "charm": -0.5}, "n": 16, "step": 0},
    "after": {"overall": -0.25, "scenes": {"support": -0.25, "charm": -0.25}, "n": 16, "step": 4},
    "improvement": {"overall": 0.25, "ci95": [0.1, 0.4], "n": 16},
    "scoring_variant": "training",
    "simulator": {"backend": "llm", "models": ["qwen3-max"], "prompts": "ctcgrpo/12345678"},
}


def test_an_export_loads_and_says_what_was_measured(run: Path, ctcgrpo: Command) -> None:
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    code, out, err = ctcgrpo("export", str(run), "--which", "4", "--out", str(run / "four"))
    assert code == 0 and f"exported to {run / 'four'}" in out, err
    model = AutoModelForCausalLM.from_pretrained(run / "four")
    assert model.dtype == torch.bfloat16 and float(model.model.norm.weight[0]) == len("checkpoint-4")
    assert AutoTokenizer.from_pretrained(run / "four").chat_template
    generation = GenerationConfig.from_pretrained(run / "four")
    assert (generation.do_sample, generation.temperature, generation.top_p, generation.top_k) == (True, 1.0, 0.9, 0)
    card = (run / "four" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" in front
    assert "eibench task on the bundled pack english/test; rounds 3, " in card and "temperature 1.0, top-p 0.9, top-k off" in card
    assert "EIBench (" not in card.replace("EIBench (eibench/train)", "")  # trained on it, not measured on it
    for part in ("| overall (16) | -0.500 | -0.250 |", "| charm | -0.500 | -0.250 |", "+0.250", "+0.100 to +0.400", "qwen3-max",
                 "ctcgrpo/12345678", "CC BY-NC 4.0", "the 4 policy", "all weights", "variant `training`"):  # fmt: skip
        assert part in card, card
    assert not list(run.glob("*.partial"))
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"simulator": {"backend": "scripted"}}))
    export(run, run / "best-one", which="best")
    card = (run / "best-one" / "README.md").read_text()
    assert (
        "the best policy" in card
        and "Simulated user: scripted;\na score is comparable only with one of the same data, settings and simulator." in card
    )


def test_the_card_of_a_run_with_the_scripted_user(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({**SUMMARY, "simulator": {"backend": "scripted", "deadline": None}}))
    export(run, run / "out")
    assert "Simulated user: scripted;" in (run / "out" / "README.md").read_text()


def test_without_validation_the_card_says_that_nothing_is_known(run: Path) -> None:
    export(run, run / "out")
    assert "nothing is known of how good this policy is" in (run / "out" / "README.md").read_text()


def test_what_is_not_there_is_named(run: Path, ctcgrpo: Command, tmp_path: Path) -> None:
    def fails(expected: str, *arguments: str, code: int = 6) -> None:
        got, _, err = ctcgrpo("export", *arguments)
        assert got == code and expected in err and "Traceback" not in err, err

    fails("has no recipe.yaml", str(tmp_path))
    fails("no complete '6' (COMPLETE is missing); available: final, best, 4", str(run), "--which", "6")
    fails("no complete 'lost'", str(run), "--which", "lost")
    fails("already exists", str(run), "--out", str(run))
    (run / "final" / "config.json").unlink()
    fails("no complete 'final' (config.json is missing); available: best, 4", str(run))
    mark_complete(run / "final")
    fails("final cannot be loaded on", str(run), code=4)
    assert not (run / "export").exists()


def test_the_hub_takes_it_or_says_why_not(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[Any] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> None:
            if "offline" in name:
                raise RuntimeError("[Errno 111] Connection refused")
            if "/" not in name:
                raise ValueError("Repo id must be in the form 'namespace/repo_name'")
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push(run, "me/policy") == "https://huggingface.co/me/policy"
    assert calls == [("me/policy", {"private": True, "exist_ok": True}), {"repo_id": "me/policy", "folder_path": run}]
    with pytest.raises(OutputError, match="upload to policy failed: Repo id must be"):
        push(run, "policy")
    with pytest.raises(OutputError, match="Connection refused; the export in .* is complete"):
        push(run, "me/offline")


def test_zero_1_in_bfloat16_is_exported_from_its_rounded_weights(run: Path, ctcgrpo: Command) -> None:
    """Its masters cannot be joined; laid out as DeepSpeed 0.19 writes them (a real one takes processes of its own)."""
    states = run / "checkpoint-4" / "global_step4" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    states.parent.mkdir()
    torch.save({"optimizer_state_dict": {"single_partition_of_fp32_groups": []}}, states)
    (run / "checkpoint-4" / "COMPLETE").unlink()
    mark_complete(run / "checkpoint-4")
    code, _, err = ctcgrpo("export", str(run), "--which", "4", "--dtype", "float32")
    assert code == 4 and "use --dtype bfloat16" in err and "Traceback" not in err, err
    code, _, err = ctcgrpo("export", str(run), "--which", "4")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    assert float(model.model.norm.weight[0]) == len("checkpoint-4")


def test_an_export_that_is_another_policy_is_not_written(run: Path, tiny: Path, ctcgrpo: Command) -> None:
    """An adapter on a head that is tied to the embedding: merged, it changes both."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(run / "checkpoint-6")
    for weights in (run / "checkpoint-6").glob("model*.safetensors"):
        weights.unlink()
    mark_complete(run / "checkpoint-6")
    for dtype in ("bfloat16", "float32"):
        code, _, err = ctcgrpo("export", str(run), "--which", "6", "--dtype", dtype)
        assert code == 4 and "the export is not the trained policy: the mean log-probability difference is " in err, err
        assert not (run / "export").exists() and not list(run.glob("*.partial"))


def test_an_adapter_is_merged_into_the_policy_that_was_trained(run: Path, tiny: Path, ctcgrpo: Command) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(run / "checkpoint-6")
    (run / "checkpoint-6" / "model.safetensors").unlink()
    mark_complete(run / "checkpoint-6")
    code, _, err = ctcgrpo("export", str(run), "--which", "6", "--dtype", "float32")
    assert code == 0, err
    ids = torch.arange(50)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(run / "export")(ids).logits
        assert torch.allclose(merged, adapted.eval()(ids).logits, atol=1e-3)
