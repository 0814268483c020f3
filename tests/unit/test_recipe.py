"""Recipes: both readings of every shipped file, overrides, and mistakes named with what would be right."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ctcgrpo.errors import RecipeError
from ctcgrpo.experiments.spec import load_sweep
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import load_recipe, resolved_recipe
from ctcgrpo.util.naming import differences
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TINY = ROOT / "recipes" / "tiny.yaml"


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_a_shipped_recipe_is_yaml_and_python(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.run.name == file.stem
    tree = ast.parse(file.read_text(encoding="utf-8"))
    text, importing, call = tree.body
    assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    assert ast.unparse(importing) == "from ctcgrpo.cli import run_recipe"
    assert ast.unparse(call) == "run_recipe(__file__)"
    # What the run saves is a recipe again, the same one.
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_spawned_child_that_imports_the_recipe_does_not_run_it() -> None:
    code = f"import runpy; runpy.run_path({str(TINY)!r}, run_name='__mp_main__'); print('imported')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "imported"), done.stderr


def test_published_settings() -> None:
    recipe = load_recipe(ROOT / "recipes" / "qwen3_8b.yaml")
    assert recipe.policy.model == "Qwen/Qwen3-8B" and recipe.policy.reasons
    assert recipe.policy.reasoning_context == "strip"
    assert (recipe.credit.alpha, recipe.credit.centering, recipe.credit.std_min) == (15, "rollout", 0.1)
    assert (recipe.scenarios.train, recipe.scenarios.per_step, recipe.rollout.group_size) == ("eibench/train", 16, 8)
    rollout, training = recipe.rollout, recipe.training
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (0.6, 0.95, 20)
    assert (rollout.max_turns, rollout.max_new_tokens, rollout.max_prompt_tokens) == (8, 1024, 8192)
    assert (training.max_steps, training.updates_per_step, training.learning_rate) == (250, 4, 1e-6)
    assert (training.warmup, training.min_learning_rate, training.clip, training.entropy_bonus) == (0.03, 0.1, 0.2, 0.001)
    assert training.save_every == 10 and training.schedule == "cosine"
    group = load_recipe(ROOT / "recipes" / "qwen3_8b_group.yaml")
    changed = differences(recipe.model_dump(mode="json"), group.model_dump(mode="json"))
    assert changed == ["run.name: qwen3_8b -> qwen3_8b_group", "credit.centering: rollout -> group"]


def test_the_quickstart_is_the_longer_run_cut_short() -> None:
    longer, short = (load_recipe(ROOT / "recipes" / f"{name}.yaml").model_dump(mode="json") for name in ("smollm2", "quickstart"))
    assert differences(longer, short) == [
        "run.name: smollm2 -> quickstart",
        "training.max_steps: 40 -> 16",
        "training.save_every: 10 -> 8",
        "validation.every: 10 -> 16",
    ]


def test_overrides() -> None:
    recipe = load_recipe(TINY, ["credit.alpha=10", "training.learning_rate=1e-6", "policy.lora.rank=4", "run.name=other"])
    assert (recipe.credit.alpha, recipe.training.learning_rate, recipe.run.name) == (10.0, 1e-6, "other")
    assert recipe.policy.lora is not None and (recipe.policy.lora.rank, recipe.policy.lora.alpha) == (4, 32)


@pytest.mark.parametrize(
    "override, message",
    [
        ("credit.aplha=10", r"unknown field credit.aplha; did you mean 'alpha'\?"),
        ("credits.alpha=10", r"unknown field credits; did you mean 'credit'\?"),
        ("rollout.group_size=1", "rollout.group_size is 1; input should be greater than or equal to 2"),
        ("credit.alpha=much", "credit.alpha is 'much'; input should be a valid number"),
        (
            "credit.gamma=0.9",
            "credit: gamma is 0.9, but credit 'immediate' does not discount; leave it out, or set credit.gamma=1",
        ),
        ("policy.fault_penalty=0.1", "policy: fault_penalty is 0.1, but reasons is false; set policy.reasons=true"),
        ("credit.turn_std_min=0.1", "credit: turn_std_min is 0.1, but turn_scale 'none' does not divide; leave it out"),
        ("credit.continuations=2", "credit: continuations is 2, but credit 'immediate' plays none; leave it out"),
        ("credit.turn_scale=groups", r"credit.turn_scale is 'groups'; did you mean 'group'\?"),
        ("credit.gamma=1.5", "credit.gamma is 1.5; input should be less than or equal to 1"),
        ("credit.centering=rolout", r"credit.centering is 'rolout'; did you mean 'rollout'\?"),
        ("credit.scale=batches", r"credit.scale is 'batches'; did you mean 'batch'\?"),
        ("credit.center_weights=tokens", "credit.center_weights is 'tokens'; input should be 'turn' or 'token'"),
        ("rollout.engine=vllm", "rollout.engine is 'vllm'; input should be 'transformers'"),
        ("scenarios.scenes=[support,5]", "scenarios.scenes.1 is 5"),
        ("scenarios.per_step=6", "scenarios.per_step is 6 for 4 scenes"),
        (
            "training.updates_per_step=3",
            "training.updates_per_step is 3 and rollout.group_size 4; expected a divisor",
        ),
        ("scenarios.scenes=[support,support]", "duplicate scene"),
        ("scoring.turn_weights={support: [5, 7]}", "the weights of support sum to 12; expected at most 1"),
        ("simulator={url: http://x, port: 9}", "simulator: port is 9, but url names a server; leave the port out"),
        ("credit={centering: none, center_weights: token}", "centering 'none' uses no weights"),
        ("credit={scale: none, std_min: 0.2}", "scale 'none' does not divide"),
        ("scenarios.scenes=[]", "scenarios.scenes is \\[\\]"),
        ("training.max_steps=true", "training: max_steps is true; expected a number"),
        ("training.learning_rate=.inf", "training.learning_rate is inf; input should be a finite number"),
        ("scoring.turn_weights={support: [.nan, 1]}", "scoring.turn_weights.support.0 is nan"),
        ("scoring.turn_weights={support: [-1, 1]}", "scoring.turn_weights.support.0 is -1"),
        ("run.name=../elsewhere", "run.name is '../elsewhere'"),
        ("alpha", "override 'alpha'; expected section.field=value"),
        ("run.name.deep=1", "'name' is not a section"),
        ("credit.alpha=[", "the value is not valid YAML"),
        ("run.name=2026-02-30", "the value is not valid YAML: day is out of range for month"),
        ("credit={alpha: 1, alpha: 2}", "the value is not valid YAML"),
        ("credit.alpha=" + "[" * 5000, "the value is not valid YAML"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(TINY, [override])


def test_a_file_sends_no_variable_of_others_to_a_simulator(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    text = "".join(line for line in TINY.read_text().splitlines(keepends=True) if not line.startswith(("'", "#")))

    def write(section: str) -> None:
        file.write_text(f"{text}\nsimulator: {section}\n")

    theirs = "{url: 'http://evil.example', token_env: AWS_SECRET_ACCESS_KEY}"
    write(theirs)
    reason = (
        r"r.yaml: simulator.token_env = 'AWS_SECRET_ACCESS_KEY'; expected a name that begins with CTCGRPO_, .* "
        r"pass simulator.token_env=AWS_SECRET_ACCESS_KEY on the command line"
    )
    for overrides in ([], ["simulator.url=http://x"], ["credit.alpha=1"]):
        with pytest.raises(RecipeError, match=reason):
            load_recipe(file, overrides)
    for overrides in (["simulator.token_env=AWS_SECRET_ACCESS_KEY"], [f"simulator={theirs}"]):
        recipe = load_recipe(file, overrides)
        assert recipe.simulator.token_env == "AWS_SECRET_ACCESS_KEY"
        with pytest.raises(RecipeError, match="begins with CTCGRPO_"):  # a sweep's file is a file, too
            load_recipe(TINY, changes=overrides)
    sweep = yaml.safe_load((ROOT / "configs/sweeps/tiny.yaml").read_text())
    sweep["parameters"]["simulator.token_env"] = {"value": "AWS_SECRET_ACCESS_KEY"}
    study = yaml.safe_load((ROOT / "configs/sweeps/credit_study.yaml").read_text())
    next(iter(study["variants"].values()))["simulator.token_env"] = "AWS_SECRET_ACCESS_KEY"
    for content in (sweep, study):
        (tmp_path / "many.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(RecipeError, match="many.yaml: .*begins with CTCGRPO_"):
            load_sweep(tmp_path / "many.yaml")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())  # what the run writes can be read, and not run
    assert resolved_recipe(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(RecipeError, match="begins with CTCGRPO_"):
        load_recipe(tmp_path / "recipe.yaml")
    assert load_recipe(file, ["simulator.token_env=CTCGRPO_OTHER"]).simulator.token_env == "CTCGRPO_OTHER"
    write("{token_env: CTCGRPO_MINE}")
    assert load_recipe(file).simulator.token_env == "CTCGRPO_MINE"
    for lookalike in ("ctcgrpo_mine", "XCTCGRPO_MINE", "CTCGRPO"):
        write(f"{{token_env: {lookalike}}}")
        with pytest.raises(RecipeError, match="begins with CTCGRPO_"):
            load_recipe(file)
    write("{token_env: sk-123}")
    with pytest.raises(RecipeError) as refused:
        load_recipe(file)
    assert "never the secret itself" in str(refused.value) and "sk-123" not in str(refused.value)


def test_recorded_logprobs_are_refused_under_truncation() -> None:
    load_recipe(TINY, ["training.old_logprobs=recorded"])
    with pytest.raises(RecipeError, match="renormalised over the kept mass"):
        load_recipe(TINY, ["training.old_logprobs=recorded", "rollout.top_p=0.9"])


def test_importance_weights_need_a_recomputed_ratio() -> None:
    load_recipe(
        TINY, ["training.importance=turn", "rollout.top_k=20", "rollout.engine=vllm_colocated", "rollout.deterministic=false"]
    )
    with pytest.raises(RecipeError, match="whose ratio contains the importance weight already"):
        load_recipe(TINY, ["training.importance=token", "training.old_logprobs=recorded"])
    with pytest.raises(RecipeError, match="importance_max"):
        load_recipe(TINY, ["training.importance_max=0.5"])


def test_processes_share_the_episodes_equally() -> None:
    recipe = load_recipe(TINY)
    recipe.check_processes(8)
    with pytest.raises(RecipeError, match=r"4 x 4 = 16 episodes a step for 3 processes; expected a multiple of 3"):
        recipe.check_processes(3)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"not found; did you mean '.*tiny.yaml'"):
        load_recipe(ROOT / "recipes" / "tiney.yaml")
    text = TINY.read_text()
    for name, content, message in [
        ("broken.yaml", "run: [", "not valid YAML"),
        ("deep.yaml", "run: " + "[" * 5000, "nested too deeply"),
        ("list.yaml", "- 1\n", "a mapping of sections"),
        ("missing.yaml", "run:\n  name: x\n", "policy is missing"),
        ("backslash.yaml", text.replace("name: tiny", 'name: "ti\\ny"'), "neither ''' nor a backslash"),
        ("twice.yaml", text.replace("scenarios:", "rollout:\n  max_turns: 2\nscenarios:"), "duplicate key 'rollout'"),
        ("quotes.yaml", text.replace("# The whole", "# '''The whole"), "neither ''' nor a backslash"),
    ]:
        file = tmp_path / name
        file.write_text(content)
        with pytest.raises(RecipeError, match=message):
            load_recipe(file)
    (tmp_path / "latin.yaml").write_bytes("run: é".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_shipped_launcher_configuration_leaves_the_rest_to_the_recipe(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no" and not getattr(config, "deepspeed_config", None)
    assert config.num_processes == {"one_gpu": 1, "one_node": 8, "nodes": 16, "fsdp2": 8, "cpu_two_processes": 2}[file.stem]


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda f: f.stem)
def test_a_shipped_deepspeed_configuration_sums_gradients_in_float32(file: Path) -> None:
    from ctcgrpo.model.sharding import deepspeed_stage, offloads, sharding_arguments, splits_weights

    stage = int(file.stem[4])
    assert deepspeed_stage(str(file)) == stage and splits_weights(str(file)) == (stage == 3)
    assert offloads(str(file)) == ("offload" in file.stem)
    config = sharding_arguments(str(file))["deepspeed"]
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "expected a DeepSpeed configuration"),
        ("{}", "expected a DeepSpeed configuration with a ZeRO stage"),
        ('{"zero_optimization": {"stage": 7}}', "stage = 7; expected 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2}}', "data_types.grad_accum_dtype = None; expected 'fp32'"),
        (
            '{"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "bf16"}',
            "communication_data_type = 'bf16'; expected 'fp32': gradients are summed over the processes",
        ),
    ],
)
def test_a_deepspeed_configuration_that_cannot_serve_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(RecipeError, match=reason):
        load_recipe(TINY, [f"training.sharding={tmp_path / 'ds.json'}"]).check_sharding()


def test_engines_and_sharding_that_do_not_go_together_are_refused() -> None:
    zero3 = "training.sharding=configs/deepspeed/zero3.json"
    for overrides, reason in (
        ([zero3], "leaves no process a whole policy"),
        (["training.sharding=fsdp2"], "leaves no process a whole policy"),
        (["rollout.engine=vllm_server", "rollout.deterministic=false"], "rollout.vllm.urls is empty"),
        (["rollout.vllm.urls=[http://a:1]"], "rollout.vllm.urls names servers"),
        (["rollout.vllm.urls=[a:1]"], "'a:1'; expected a URL that begins with http"),
        (["rollout.engine=vllm_colocated"], "rollout.deterministic needs"),
        (["rollout.deadline=60"], "rollout.deadline = 60.0 depends on the clock"),
        (["policy.attention=eager"], "policy.attention is 'eager', but packing and the transformers engine use their own"),
        (["policy.quantization=nf4"], "expected an adapter to train"),
        (
            ["policy.quantization=nf4", "policy.lora.rank=4", "training.sharding=configs/deepspeed/zero1.json"],
            "unquantized weights",
        ),
    ):
        with pytest.raises(RecipeError, match=reason):
            load_recipe(TINY, overrides).check_sharding()


def test_penalties_for_reasoning_go_with_an_environment_of_ones_own() -> None:
    recipe = load_recipe(ROOT / "recipes" / "examples" / "guess.yaml", ["policy.reasons=true", "policy.no_reasoning_penalty=0.5"])
    assert recipe.credit_options().no_reasoning_penalty == 0.5
