"""Exports a trained policy as safetensors with a model card: adapters merged, ZeRO shards joined."""

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ctcgrpo import __version__
from ctcgrpo.environments.eibench.scenarios import described, load_scenarios
from ctcgrpo.errors import CtcGrpoError, OutputError, PolicyError
from ctcgrpo.evaluation.played import eibench_on, in_words, validation_settings
from ctcgrpo.model.finite import refuse_nonfinite
from ctcgrpo.policy.builtin import is_builtin, wheel_of
from ctcgrpo.policy.hub import hub_reason
from ctcgrpo.policy.loading import stop_ids
from ctcgrpo.run.folders import require_run
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import Summary, checked_summary
from ctcgrpo.run.settings import template_kwargs
from ctcgrpo.simulator.choice import who_played
from ctcgrpo.training.checkpoint_pickles import weights_only
from ctcgrpo.types import NO_TAG
from ctcgrpo.util.files import disk_problem
from ctcgrpo.util.naming import first_line
from ctcgrpo.util.terminal import LogLine

Dtype = Literal["bfloat16", "float32"]


def export(run: Path, out: Path, *, which: str = "final", dtype: Dtype = "bfloat16", log_line: LogLine = lambda _: None) -> Path:
    """Write a policy of a run to `out`: `which` is final, best, or the number of a checkpoint (its optimizer steps).

    Adapters are merged, and shards joined, in float32, then rounded to `dtype`. What was written is loaded again, and its
    log-probabilities are compared with the trained policy's. Raises OutputError for a missing or incomplete run or checkpoint,
    where `out` exists or is not writable, and for damaged scores; PolicyError where the policy cannot be loaded, has weights that
    are not finite, or differs from what was written. A failed export leaves no files.
    """
    folder = require_run(run)
    if out.exists():
        raise OutputError(f"{out} already exists; choose another folder with --out")
    recipe = resolved_recipe(folder.recipe_file)
    source = folder.policy(which)
    card = model_card(recipe, _summary(folder, recipe), which=which)
    base = folder.starting_policy(recipe, log_line)
    try:
        trained = _trained(source, base, recipe.policy.revision, dtype)
        tokenizer = AutoTokenizer.from_pretrained(
            source if (source / "tokenizer_config.json").exists() else base, revision=recipe.policy.revision
        )
        refuse_nonfinite(trained, str(source))
        wanted = _logprobs(trained, tokenizer)
    except CtcGrpoError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged files raise whatever their readers do (safetensors, tokenizers, torch)
        raise PolicyError(f"{source} cannot be loaded on {base!r}: {first_line(error)}") from None
    model = (trained.merge_and_unload() if isinstance(trained, PeftModel) else trained).to(getattr(torch, dtype))
    del trained
    ends = stop_ids(base, tokenizer, recipe.policy.revision, template_kwargs(recipe))
    model.generation_config = _generation(recipe, sorted(ends))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        del model
        _refuse_another_policy(partial, tokenizer, wanted, dtype)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        reason = disk_problem(error) or getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"cannot write {out}: {reason}; choose another folder with --out") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _summary(folder: RunFolder, recipe: Recipe) -> Summary | None:
    """Raises OutputError for damaged files, so that no card publishes wrong scores."""
    summary, problems = checked_summary(folder.path)
    if summary is None:
        return None
    if recipe.validation is None:
        raise OutputError(f"{folder.path}: summary.json has scores, but recipe.yaml no validation section; one is damaged")
    if problems:
        raise OutputError(f"{folder.path}: {problems[0]}; remove summary.json to export a card without scores")
    return summary


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload an export to the Hub. Returns its URL. Raises OutputError where the upload fails."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # noqa: BLE001 - what its HTTP library raises changes with it; the export is written in any case
        raise OutputError(f"upload to {repository} failed: {hub_reason(error)}; the export in {folder} is complete") from None
    return f"https://huggingface.co/{repository}"


_TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.1}
"""Tolerance of the mean log-probability difference, in nats: above rounding of weights, far below that of another policy."""


@torch.no_grad()
def _logprobs(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Log-probabilities of the tokens of three personas, concatenated."""
    model.eval()
    found = []
    for scenario in [*load_scenarios("english/test", "test")[:2], *load_scenarios("chinese/test", "test")[:1]]:
        ids = torch.tensor([tokenizer.encode(scenario.policy_persona, add_special_tokens=False)[:256]])
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        found.append(scores.gather(-1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)


def _refuse_another_policy(folder: Path, tokenizer: PreTrainedTokenizerBase, wanted: torch.Tensor, dtype: Dtype) -> None:
    """Raises PolicyError where the written policy differs from the trained one."""
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    apart = float((_logprobs(again, tokenizer) - wanted).abs().mean())
    if not apart <= _TOLERANCE[dtype]:
        raise PolicyError(
            f"the export is not the trained policy: the mean log-probability difference is {apart:.3g} nats; expected "
            f"at most {_TOLERANCE[dtype]:g} (--dtype {dtype}); nothing was written"
        )


def _trained(source: Path, base: str, revision: str | None, dtype: Dtype) -> PreTrainedModel | PeftModel:
    """The policy in float32: whole, or as an adapter on its base."""
    if (source / "adapter_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=torch.float32)
        return PeftModel.from_pretrained(model, str(source))
    # DeepSpeed's shards have float32 masters; the checkpoint's safetensors are rounded to bfloat16
    shards = any(source.glob("global_step*"))
    if shards and _is_zero1(source):
        if dtype == "float32":
            raise PolicyError(f"{source}: ZeRO-1's float32 masters cannot be joined; use --dtype bfloat16")
    elif shards:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with weights_only(source):
            state = get_fp32_state_dict_from_zero_checkpoint(str(source))
        joined: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
        missing, unexpected = joined.load_state_dict(state, strict=False)
        joined.tie_weights()
        tied = {"lm_head.weight"} if joined.config.tie_word_embeddings else set()
        if (lacking := set(missing) - tied) or unexpected:
            raise PolicyError(f"{source}: its shards lack {sorted(lacking)[:3]} or hold {sorted(unexpected)[:3]}")
        return joined
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return whole


def _is_zero1(source: Path) -> bool:
    """Whether the checkpoint is from ZeRO-1 in bfloat16, whose optimizer state has no stage."""
    states = next(source.glob("global_step*/bf16_zero_*optim_states.pt"), None)
    if states is None:
        return False
    with weights_only(source):
        return "zero_stage" not in torch.load(states, map_location="cpu")["optimizer_state_dict"]


def _generation(recipe: Recipe, ends: list[int]) -> GenerationConfig:
    """The sampling settings of training, which the scores were measured with."""
    rollout = recipe.rollout
    how = rollout.model_dump(include={"temperature", "max_new_tokens", "top_k", *(["top_p"] if rollout.top_p < 1 else [])})
    return GenerationConfig(do_sample=True, eos_token_id=ends, **how)


def model_card(recipe: Recipe, summary: Summary | None, *, which: str) -> str:
    """The README of an export: base model, training, scores and their conditions. `summary`: of the run; None without
    validation."""
    text = (files("ctcgrpo.run") / "model_card.md.j2").read_text(encoding="utf-8")
    template = jinja2.Template(text, undefined=jinja2.StrictUndefined)
    model, own = recipe.policy.model, recipe.environment
    fetched = wheel_of(model)
    values: dict[str, Any] = {"fetched": fetched, "noun": "scenarios" if own is None else "tasks"}
    values["trained_on"] = described(recipe.eibench_scenarios().train) if own is None else own.tasks
    values["base_model"] = fetched.hub_id if fetched else None if is_builtin(model) else model
    if summary is not None and own is None:
        settings = validation_settings(recipe)
        values |= {"measured": eibench_on(settings.pop("data_set")), "settings": in_words(settings)}
        values["user"] = who_played(summary.simulator)
    return str(template.render(recipe=recipe, summary=summary, which=which, version=__version__, no_tag=NO_TAG, **values))
