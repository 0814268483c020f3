"""A trained policy to take home: adapters merged, ZeRO's shards joined, in safetensors, with a card that says what was measured."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from ctcgrpo import __version__
from ctcgrpo.errors import CtcGrpoError, OutputError, PolicyError
from ctcgrpo.files import checkpoints, is_complete, missing_in
from ctcgrpo.policy.loading import stop_ids
from ctcgrpo.recipe import Recipe, load_recipe
from ctcgrpo.run_folder import BEST_STEP, RunFolder
from ctcgrpo.run_records import Summary, disagreement, read_summary, read_validations
from ctcgrpo.simulator.about import described

Dtype = Literal["bfloat16", "float32"]


def export(run: Path, out: Path, *, which: str = "final", dtype: Dtype = "bfloat16") -> Path:
    """Write a policy of a run to `out`: `which` is final, best, or the number of a checkpoint (its optimizer steps).

    Adapters are merged, and shards joined, in float32, then rounded to `dtype`. Raises OutputError for a run or checkpoint that is
    not there or not complete, where `out` exists or cannot be written, and where the figures for its card are damaged; PolicyError
    where the policy cannot be loaded. A failed export leaves nothing behind.
    """
    folder = RunFolder(run)
    if not folder.recipe_file.exists():
        raise OutputError(f"{run} is no run's folder: it holds no recipe.yaml")
    if out.exists():
        raise OutputError(f"{out} is there already; choose another with --out")
    recipe = load_recipe(folder.recipe_file)
    source = _source(folder, which)
    card = model_card(recipe, _summary(folder), which=which)
    base = str(folder.base) if recipe.policy.model.startswith("builtin/") else recipe.policy.model
    try:
        model = _whole(source, base, recipe.policy.revision, dtype).to(getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(
            source if (source / "tokenizer_config.json").exists() else base, revision=recipe.policy.revision
        )
    except CtcGrpoError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged files raise whatever their readers do (safetensors, tokenizers, torch)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PolicyError(f"{source} cannot be loaded on {base!r}: {reason}") from None
    model.generation_config = _generation(recipe, sorted(stop_ids(base, tokenizer, recipe.policy.revision)))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}; choose another folder with --out") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _summary(folder: RunFolder) -> Summary | None:
    """The figures of a run. Raises OutputError where its files are damaged: a card is not to publish a wrong one."""
    summary = read_summary(folder.path, Summary)
    if summary is None:
        return None
    validations, problems = read_validations(folder.validation_file)
    if told := next(iter(problems), None) or disagreement(summary, validations):
        raise OutputError(f"{folder.path}: {told}; without summary.json the card says that nothing was measured")
    return summary


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload an export to the Hub; gives its address. Raises OutputError where the Hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # noqa: BLE001 - what its HTTP library raises changes with it; the export is written in any case
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OutputError(f"the Hub did not take {repository}: {reason}; {folder} stays as it is") from None
    return f"https://huggingface.co/{repository}"


def _source(folder: RunFolder, which: str) -> Path:
    sources = {"final": folder.final, "best": folder.best}
    source = sources.get(which, folder.path / f"checkpoint-{which}")
    lacks = _lacks_best(folder) if which == "best" else missing_in(source)
    if lacks is not None:
        complete = sorted(step for step, path in checkpoints(folder.path).items() if is_complete(path))
        have = [name for name, ok in (("final", is_complete(folder.final)), ("best", _lacks_best(folder) is None)) if ok]
        known = ", ".join([*have, *map(str, complete)]) or "nothing"
        why = f" ({lacks})" if source.exists() else ""
        raise OutputError(f"{folder.path} has no complete {which!r}; it has {known}{why}")
    return source


def _lacks_best(folder: RunFolder) -> str | None:
    """What keeps best/ from being exported; None where nothing does."""
    file = folder.best / BEST_STEP
    try:
        return None if folder.best_step is not None else f"{file} is missing"
    except (OSError, ValueError) as error:
        return f"{file} is no number of steps: {error}"


def _whole(source: Path, base: str, revision: str | None, dtype: Dtype) -> PreTrainedModel:
    """The policy in float32, in one piece."""
    if (source / "adapter_config.json").exists():
        from peft import PeftModel

        model = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=torch.float32)
        merged: PreTrainedModel = PeftModel.from_pretrained(model, str(source)).merge_and_unload()
        return merged
    shards = any(
        source.glob("global_step*")
    )  # DeepSpeed's own, with float32 masters; beside them lie weights rounded to bfloat16
    if shards and _is_zero1(source):
        if dtype == "float32":
            raise PolicyError(
                f"{source}: ZeRO-1 keeps its float32 masters in a form that cannot be joined; use --dtype bfloat16"
            )
    elif shards:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(str(source))
        joined: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
        missing, unexpected = joined.load_state_dict(state, strict=False)
        joined.tie_weights()
        tied = {"lm_head.weight"} if joined.config.tie_word_embeddings else set()
        if set(missing) - tied or unexpected:
            raise PolicyError(
                f"{source}: its shards lack {sorted(set(missing) - tied)[:3]} or hold {sorted(unexpected)[:3]}"
            )
        return joined
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return whole


def _is_zero1(source: Path) -> bool:
    """Whether it is of ZeRO-1 in bfloat16, whose optimizer names no stage."""
    states = next(source.glob("global_step*/bf16_zero_*optim_states.pt"), None)
    if states is None:
        return False
    return "zero_stage" not in torch.load(states, map_location="cpu", weights_only=False)["optimizer_state_dict"]


def _generation(recipe: Recipe, ends: list[int]) -> GenerationConfig:
    """How it was sampled from in training, which is how its figures were made."""
    rollout = recipe.rollout
    truncation: dict[str, Any] = {"top_p": rollout.top_p} if rollout.top_p < 1 else {}
    truncation |= {"top_k": rollout.top_k or 0}
    return GenerationConfig(
        do_sample=True,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        eos_token_id=ends,
        **truncation,
    )


def model_card(recipe: Recipe, summary: Summary | None, *, which: str) -> str:
    """The README of an export: what it comes from, how it was trained, what was measured and on what. `summary`: of the run, where
    it was validated."""
    template = jinja2.Template(
        (files("ctcgrpo") / "model_card.md.j2").read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined
    )
    builtin = recipe.policy.model.startswith("builtin/")
    user = described(summary.simulator) if summary is not None else None
    return str(template.render(recipe=recipe, summary=summary, user=user, which=which, version=__version__, builtin=builtin))
