"""How the run is launched: libraries, processes, sharding, accelerate, the policy's servers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator

import yaml

from ctcgrpo.model.sharding import FSDP2, NONE, check_launcher, deepspeed_stage
from ctcgrpo.preflight.subject import Finding, Subject
from ctcgrpo.rollout.vllm_adapter import base_url
from ctcgrpo.util.proxies import open_url


def sharding(s: Subject) -> Iterator[Finding]:
    s.recipe.check_sharding()
    chosen = s.recipe.training.sharding
    stage = deepspeed_stage(chosen)
    yield Finding("sharding", "ok", f"DeepSpeed ZeRO-{stage}" if stage else {NONE: "none", FSDP2: "FSDP2"}[chosen])


def libraries(s: Subject) -> Iterator[Finding]:
    needed = {
        "vllm": s.recipe.rollout.engine != "transformers",
        "deepspeed": deepspeed_stage(s.recipe.training.sharding) > 0,
        "bitsandbytes": s.recipe.policy.quantization != "none",
    }
    missing = [name for name, wanted in needed.items() if wanted and importlib.util.find_spec(name) is None]
    for name in missing:
        extra = {"bitsandbytes": "qlora"}.get(name, name)
        yield Finding("libraries", "failed", f"{name} is not installed here: pip install 'ctcgrpo[{extra}]'")
    if not missing:
        used = [name for name, wanted in needed.items() if wanted]
        yield Finding("libraries", "ok", ", ".join(used) if used else "none beyond the base")


def processes(s: Subject) -> Iterator[Finding]:
    wanted = s.recipe.hardware.processes
    s.recipe.check_processes(wanted)
    episodes = s.recipe.tasks_per_step * s.recipe.rollout.group_size // wanted
    text = f"{wanted} with {episodes} episodes a step each (hardware.processes)"
    if episodes % s.recipe.rollout.group_size:
        yield Finding("processes", "warning", f"{text}: groups are split over processes, and share no prefix cache")
    else:
        yield Finding("processes", "ok", text)


def launcher(s: Subject) -> Iterator[Finding]:
    sharding = s.recipe.training.sharding
    check_launcher(sharding, s.variables)
    file = s.accelerate_config
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (yaml.YAMLError, ValueError) as error:
        yield Finding("launcher", "failed", f"{file}, accelerate's default, is not valid YAML: {error}")
        return
    if not isinstance(config, dict):
        yield Finding(
            "launcher", "failed", f"{file}, accelerate's default, is no mapping; `accelerate config default` writes one"
        )
        return
    kind = str(config.get("distributed_type", "NO"))
    if (kind == "DEEPSPEED") or (kind == "FSDP" and sharding != FSDP2):
        yield Finding(
            "launcher",
            "failed",
            f"{file} makes accelerate launch with {kind}, and the recipe says training.sharding={sharding}; launch with "
            "--config_file configs/accelerate/one_node.yaml",
        )
        return
    yield Finding(
        "launcher", "ok", f"accelerate's default is {kind}; a --config-file decides otherwise" if config else "plain"
    )


def policy_servers(s: Subject) -> Iterator[Finding]:
    for url in map(base_url, s.recipe.rollout.vllm.urls):
        try:
            with open_url(f"{url}/v1/models", timeout=5) as response:
                served = json.load(response)["data"][0]
            with open_url(f"{url}/server_info?config_format=json", timeout=5) as response:
                transfer = json.load(response).get("vllm_config", {}).get("weight_transfer_config")
        except (OSError, ValueError, KeyError, IndexError) as error:
            why = f"{url} does not answer as a vLLM server with development endpoints ({error})"
            yield Finding("policy servers", "failed", f"{why}; launch/serve_policy.sh and launch/slurm.sbatch start such")
            continue
        if transfer is None:
            why = f"{url} cannot take weights: it needs --weight-transfer-config"
            yield Finding("policy servers", "failed", f"{why} (launch/serve_policy.sh)")
        elif (length := served.get("max_model_len") or s.longest) < s.longest:
            yield Finding("policy servers", "failed", f"{url} has max_model_len {length}, and the recipe needs {s.longest}")
        else:
            yield Finding("policy servers", "ok", f"{url} serves {served['id']}")
