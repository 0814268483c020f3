"""Finding the policy: its folder, its tokenizer, and what ends its replies."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ctcgrpo.errors import PolicyError
from ctcgrpo.policy.builtin import is_builtin
from ctcgrpo.policy.chat_template import end_of_turn
from ctcgrpo.policy.hub import hub_reason

if TYPE_CHECKING:
    from peft import LoraConfig

LOAD_ERRORS = (OSError, ValueError, SafetensorError, pickle.UnpicklingError, StrictDataclassError)
"""What transformers raises for a model or tokenizer that is not there, or whose files are damaged."""
_ODD_FILES = (*LOAD_ERRORS, TypeError, AttributeError, LookupError)
"""And where a file is JSON of another shape: only configurations and tokenizers are read when these are caught."""


@contextlib.contextmanager
def loading_weights(what: str) -> Iterator[None]:
    """Raises PolicyError, which `what` opens, where a model's files are not there, damaged, pickled or do not fit each other."""
    try:
        yield
    except pickle.UnpicklingError:
        why = "its pickled weights contain other objects, and were not loaded; convert them to safetensors"
        raise PolicyError(f"{what}: {why}") from None
    except LOAD_ERRORS as error:
        raise PolicyError(f"{what}: {hub_reason(error)}") from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise PolicyError(f"{what}: the sizes of its weights differ from its config.json") from None


def pinned(model: str, revision: str | None) -> str:
    """A Hub model at a revision as a folder, so that all processes load the same files: vLLM gets a name only."""
    if revision is None or Path(model).exists() or is_builtin(model):
        return model
    try:
        return str(snapshot_download(model, revision=revision))
    except LOAD_ERRORS as error:
        raise PolicyError(f"policy.model = {model!r} at {revision!r} cannot be loaded: {hub_reason(error)}") from None


def load_tokenizer(
    model: str, revision: str | None = None, chat_template: Path | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, padding on the left, with a pad token and the template of a file. Raises PolicyError."""
    try:
        options = {"revision": revision, "padding_side": "left", "trust_remote_code": trust_remote_code}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, **options)
    except Exception as error:  # noqa: BLE001 - what tokenizers raises for a file that it cannot parse
        raise PolicyError(f"model {model!r}: its tokenizer cannot be loaded: {hub_reason(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"policy.chat_template = {str(chat_template)!r} cannot be read: {error}") from None
    return tokenizer


def stop_ids(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    revision: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> frozenset[int]:
    """Every id that ends a reply: the tokenizer's end of sequence, what the model's generation config adds, and what the chat
    template writes behind a reply (base models often declare the first alone). Raises PolicyError where there is none, and for a
    generation config that cannot be read."""
    ids = {tokenizer.eos_token_id}
    try:
        declared = GenerationConfig.from_pretrained(model, revision=revision).eos_token_id
        ids |= set(declared if isinstance(declared, list) else [declared])
    except _ODD_FILES as error:
        file = Path(model) / "generation_config.json"
        if file.exists() or not isinstance(error, OSError):  # not every model comes with one
            raise PolicyError(f"policy.model {model!r}: {file.name} cannot be read: {hub_reason(error)}") from None
    if tokenizer.chat_template:
        ids.add(end_of_turn(tokenizer, template_kwargs))
    ids.discard(None)
    if not ids:
        raise PolicyError(f"tokenizer of {model!r} has no end-of-sequence token, so no reply would ever end")
    return frozenset(ids)


def load_config(model: str, revision: str | None = None) -> PretrainedConfig:
    """The model's configuration. Raises PolicyError where there is none."""
    try:
        return AutoConfig.from_pretrained(model, revision=revision)
    except _ODD_FILES as error:
        raise PolicyError(f"policy.model {model!r} cannot be loaded: config.json: {hub_reason(error)}") from None


def check_fits(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, prompt: int, reply: int, name: str) -> None:
    """Raises PolicyError where a model of `config` lacks positions for so many tokens of prompt and reply, or embeddings of the
    tokenizer's."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and prompt + reply > limit:
        asked = f"rollout.max_prompt_tokens + rollout.max_new_tokens = {prompt} + {reply} = {prompt + reply}"
        fits = f"rollout.max_prompt_tokens={limit - reply}" if reply < limit else f"rollout.max_new_tokens={limit // 4}"
        raise PolicyError(f"{asked}, but {name!r} has {limit} positions; set {fits} or less")
    rows = getattr(config.get_text_config(), "vocab_size", None)
    beyond = sorted((k, token) for token, k in tokenizer.get_vocab().items() if rows is not None and k >= rows)
    if beyond:
        some = ", ".join(f"{token!r} ({k})" for k, token in beyond[:3])
        problem = f"its tokenizer has {len(beyond)} tokens beyond its embedding of {rows} rows: {some}"
        advice = "resize the model's embeddings (resize_token_embeddings), or use the tokenizer that belongs to it"
        raise PolicyError(f"policy.model {name!r}: {problem}; {advice}")


def refuse_tied_targets(config: PretrainedConfig, adapter: LoraConfig) -> None:
    """Raises PolicyError where an adapter would change one of two modules that share a weight (a head tied to the embedding): once
    merged, it would change the other as well, which makes another policy."""
    if not config.get_text_config().tie_word_embeddings:
        return
    import torch
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shared = model.get_input_embeddings().weight
    tied = [name for name, module in model.named_modules() if getattr(module, "weight", None) is shared]
    hit = [name for name in tied if len(tied) > 1 and check_target_module_exists(adapter, name)]
    if hit:
        other = next(name for name in tied if name != hit[0])
        problem = f"policy.lora.target_modules = {adapter.target_modules!r} takes in {hit[0]}, which this model ties to {other}"
        raise PolicyError(f"{problem}: a merged adapter would change both; leave it out (all-linear does)")
