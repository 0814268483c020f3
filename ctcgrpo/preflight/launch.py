"""Checks of the launch (libraries, processes, sharding, accelerate, policy servers) and of this machine (disk, run folder,
trackers)."""

import contextlib
import importlib.util
import json
import netrc
import shutil
from collections.abc import Iterator

import yaml

from ctcgrpo.model.shapes import GIB, Shape
from ctcgrpo.model.sharding import FSDP2, NONE, check_launcher, deepspeed_stage, offloads
from ctcgrpo.preflight.subject import Finding, Subject, failed, ok, warning
from ctcgrpo.rollout.vllm_adapter import base_url
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.saving import checkpoint_bytes, notice_seconds, save_seconds, too_little_time
from ctcgrpo.run.startup import SHUTDOWN_TIMEOUT
from ctcgrpo.run.tracking import trackers_of
from ctcgrpo.run.weights_and_biases import WANDB
from ctcgrpo.util.importing import installing
from ctcgrpo.util.proxies import open_url


def sharding(s: Subject) -> Iterator[Finding]:
    s.recipe.check_sharding()
    chosen = s.recipe.training.sharding
    stage = deepspeed_stage(chosen)
    yield ok(f"DeepSpeed ZeRO-{stage}" if stage else {NONE: "none", FSDP2: "FSDP2"}[chosen])


def libraries(s: Subject) -> Iterator[Finding]:
    needed = {
        "vllm": s.recipe.rollout.engine != "transformers",
        "deepspeed": deepspeed_stage(s.recipe.training.sharding) > 0,
        "bitsandbytes": s.recipe.policy.quantization != "none",
    }
    used = [name for name, wanted in needed.items() if wanted]
    missing = [name for name in used if importlib.util.find_spec(name) is None]
    for name in missing:
        extra = {"bitsandbytes": "qlora"}.get(name, name)
        yield failed(f"{name} is not installed; run {installing(extra)}")
    if not missing:
        yield ok(", ".join(used) or "no optional libraries needed")


def processes(s: Subject) -> Iterator[Finding]:
    wanted, here = s.recipe.hardware.processes, s.gpus * s.recipe.hardware.nodes
    s.recipe.check_processes(wanted)
    if 0 < here < wanted:
        shared = ""
        if s.recipe.tasks_per_step * s.recipe.rollout.group_size % here:
            shared = f", and scenarios.per_step or rollout.group_size so that their product is a multiple of {here}"
        yield warning(
            f"hardware.processes = {wanted}, and {s.recipe.hardware.nodes} x {s.gpus} GPUs are here (nodes x this machine's); for "
            f"these set hardware.processes={here}{shared}, and launch with --num_processes {here}"
        )
    episodes = s.recipe.tasks_per_step * s.recipe.rollout.group_size // wanted
    text = f"{wanted} with {episodes} episodes per step each (hardware.processes)"
    split = episodes % s.recipe.rollout.group_size > 0
    yield warning(f"{text}: groups are split over processes, so their rollouts share no prefix cache") if split else ok(text)


def launcher(s: Subject) -> Iterator[Finding]:
    sharding, file = s.recipe.training.sharding, s.accelerate_config
    check_launcher(sharding, s.variables)
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (yaml.YAMLError, ValueError) as error:
        yield failed(f"{file}, accelerate's default, is not valid YAML: {error}")
        return
    if not isinstance(config, dict):
        yield failed(f"{file}, accelerate's default, is no mapping; `accelerate config default` writes a valid one")
        return
    kind = str(config.get("distributed_type", "NO"))
    if kind == "DEEPSPEED" or (kind == "FSDP" and sharding != FSDP2):
        problem = f"{file} sets distributed_type {kind}, but the recipe sets training.sharding = {sharding}"
        yield failed(f"{problem}; launch with --config_file configs/accelerate/one_node.yaml")
    else:
        yield ok(f"accelerate's default is {kind}; --config-file overrides it" if config else "no accelerate configuration")


def policy_servers(s: Subject) -> Iterator[Finding]:
    for url in map(base_url, s.recipe.rollout.vllm.urls):
        try:
            with open_url(f"{url}/v1/models", timeout=5) as response:
                served = json.load(response)["data"][0]
            with open_url(f"{url}/server_info?config_format=json", timeout=5) as response:
                transfer = json.load(response).get("vllm_config", {}).get("weight_transfer_config")
        except (OSError, ValueError, KeyError, IndexError) as error:
            why = f"{url}: expected a vLLM server with development endpoints ({error})"
            yield failed(f"{why}; start it with launch/serve_policy.sh or launch/slurm.sbatch")
            continue
        if transfer is None:
            yield failed(f"{url} cannot receive weights; start it with --weight-transfer-config (launch/serve_policy.sh)")
        elif (length := served.get("max_model_len") or s.longest) < s.longest:
            yield failed(f"{url}: max_model_len = {length}; expected at least {s.longest}; set --max-model-len")
        else:
            yield ok(f"{url} serves {served['id']}")


def disk(s: Subject) -> Iterator[Finding]:
    if s.shape is None:
        return
    recipe, size = s.recipe, _checkpoint_bytes(s.recipe, s.shape)
    # keep_checkpoints and the one being written; best and final have only weights, at most a third of a checkpoint each.
    needed = (recipe.training.keep_checkpoints + 1) * size + 2 * size / 3
    where = next(p for p in [recipe.folder, *recipe.folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(where).free
    text = f"{needed / GIB:.1f} GiB for {recipe.training.keep_checkpoints} checkpoints, best and final; {free / GIB:.0f} GiB free"
    advice = f"{text} at {where}; lower training.keep_checkpoints, or set run.output_dir"
    yield ok(text) if needed < free else failed(advice)


def stopping(s: Subject) -> Iterator[Finding]:
    """The time that saving needs after Ctrl-C or a scheduler's signal."""
    if s.shape is None:
        return
    size = _checkpoint_bytes(s.recipe, s.shape)
    if text := too_little_time(size, s.variables):
        yield warning(text)
    elif s.recipe.hardware.processes > 1:
        advice = f"set {SHUTDOWN_TIMEOUT}=3600 for accelerate and torchrun, sbatch --signal=B:TERM@{notice_seconds(size)}"
        yield ok(f"saving a checkpoint of {size / GIB:.1f} GiB takes about {save_seconds(size):.0f} s; {advice}")


def threads(s: Subject) -> Iterator[Finding]:
    """Checks that an optimizer on the CPU has more than one thread."""
    if offloads(s.recipe.training.sharding) and s.variables.get("OMP_NUM_THREADS", "1") == "1":
        problem = f"{s.recipe.training.sharding} runs the optimizer on the CPU, and launchers give each process one thread"
        yield warning(f"{problem}; set OMP_NUM_THREADS to cores / processes of a machine")


def _checkpoint_bytes(recipe: Recipe, shape: Shape) -> float:
    lora = recipe.policy.lora
    return checkpoint_bytes(recipe, shape.parameters if lora is None else shape.lora_parameters(lora.rank))


def output(s: Subject) -> Iterator[Finding]:
    folder = RunFolder(s.recipe.folder)
    resumed = folder.open(s.recipe)
    if resumed is None:
        yield ok(f"{folder.path}: new run")
    else:
        extended = folder.extended_from(s.recipe)
        more = f", with training.max_steps {extended} -> {s.recipe.training.max_steps}" if extended else ""
        yield ok(f"resumes from {resumed}{more}")


def trackers(s: Subject) -> Iterator[Finding]:
    names = s.recipe.run.report_to
    trackers_of(names)
    if WANDB in names and s.variables.get("WANDB_MODE", "online") == "online":
        found = "WANDB_API_KEY" in s.variables
        with contextlib.suppress(FileNotFoundError, netrc.NetrcParseError):
            found = found or netrc.netrc().authenticators("api.wandb.ai") is not None
        if not found:
            problem = f"run.report_to has {WANDB!r}, but there is no API key"
            yield failed(f"{problem}; run wandb login, or set the environment variable WANDB_MODE=offline")
            return
    if names:
        yield ok(", ".join(names))
