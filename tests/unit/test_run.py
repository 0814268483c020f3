"""Whole runs in this process: every mistake has its message and exit code; LoRA; failures stop a run that can go on."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctcgrpo.environments.eibench.scenarios import PACKS
from ctcgrpo.errors import OutputError, SimulatorReplyError
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.simulator.config import SCRIPTED_USER
from ctcgrpo.simulator.protocol import Reaction, TurnRequest
from ctcgrpo.simulator.scripted.backend import react
from ctcgrpo.simulator.server import SimulatorServer, running
from ctcgrpo.util.files import is_complete, mark_complete
from tests.conftest import ROOT, Backend, Command

TINY = str(ROOT / "recipes" / "tiny.yaml")


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """The four scenes of the bundled pack as files to be broken."""
    shutil.copytree(PACKS / "english" / "train", tmp_path / "pack")
    return tmp_path / "pack"


def edit(file: Path, line: int, change: Callable[[dict[str, Any]], object]) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[line - 1])
    change(record)
    lines[line - 1] = json.dumps(record)
    file.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    "name, line, change, message",
    [
        ("support", 3, lambda r: r["worst_case"].update(worst_anger_min=10), "worst_anger_min is 10; it must not lie below"),
        ("repair", 2, lambda r: r["rub_goals"].update(target_trust=0), "the three must not decrease"),
        ("charm", 1, lambda r: r["initial_calibration"].update(initial_trust=-5), "initial_trust is -5; it must lie in [0, 100]"),
        ("defense", 4, lambda r: r.update(scene_tag="defence"), "scene_tag is 'defence'; did you mean 'defense'?"),
        ("support", 2, lambda r: r.update(id="support-train-01"), "id 'support-train-01' is already used at"),
        ("repair", 5, lambda r: r["aggressor_profile"].update(system_prompt=" "), "a persona cannot be empty"),
        ("charm", 6, lambda r: r.update(rub_goal=r.pop("rub_goals")), "did you mean 'rub_goals'?"),
    ],
)  # fmt: skip
def test_broken_scenarios_stop_a_run_that_refuses_them_before_it_begins(
    ctcgrpo: Command, pack: Path, tmp_path: Path, name: str, line: int, change: Callable[[Any], object], message: str
) -> None:
    edit(pack / f"{name}_final.jsonl", line, change)
    asked = ("train", TINY, f"scenarios.train={pack}", f"run.output_dir={tmp_path / 'out'}", "scenarios.invalid=refuse")
    code, _, err = ctcgrpo(*asked)
    assert code == 3 and err.startswith("error: ") and err.count("\n") == 1
    assert f"{name}_final.jsonl, line {line}" in err and message in err
    assert not (tmp_path / "out").exists()


def test_a_run_leaves_invalid_records_out_and_says_so(ctcgrpo: Command, pack: Path, tmp_path: Path) -> None:
    file = pack / "support_final.jsonl"
    edit(file, 3, lambda r: r["worst_case"].update(worst_anger_min=10))
    file.write_text(f"{file.read_text()}\n{{", encoding="utf-8")
    command = ["train", TINY, *FAST, f"run.output_dir={tmp_path}", f"scenarios.train={pack}"]
    command += [f"validation={{scenarios: {pack}, every: 9}}"]
    code, out, err = ctcgrpo(*command)
    assert code == 0, err
    told = f"warning: {pack}: 2 of 65 records are invalid and left out"
    assert out.count(told) == 2 and "63 scenarios to train on, 63 held out" in out  # of each set once
    assert f"{file}, line 3: scenario 'support-train-03': worst_case.worst_anger_min is 10" in out
    assert f"{file}, line 17: not valid JSON" in out
    data = json.loads((tmp_path / "tiny" / "data.json").read_text())
    assert len(data["scenarios.train"]) == 63 and list(data["skipped"]) == [f"{file}, line 3", f"{file}, line 17"]
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["skipped"] == {"scenarios.train": 2, "validation.scenarios": 2}
    code, out, _ = ctcgrpo("show", str(tmp_path / "tiny"))
    assert code == 0 and "invalid records left out: 2 of scenarios.train, 2 of validation.scenarios" in out
    shutil.rmtree(tmp_path / "tiny" / "final")
    file.write_text("\n".join(file.read_text().splitlines()[:-1]), encoding="utf-8")  # what was left out may be removed
    code, _, err = ctcgrpo(*command)
    assert code == 0, err


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.update(script={"details": [{"about": "x"}]}), "script.details.0.words: field required"),
        (lambda r: r["script"].update(lines="abc"), "script.lines: input should be a valid dictionary"),
        (lambda r: r.update(language="fr"), "language = 'fr'; expected one of the scripted user's: en, zh"),
    ],
)
def test_what_the_scripted_user_cannot_play_stops_a_run_before_it_begins(
    ctcgrpo: Command, pack: Path, tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    edit(pack / "charm_final.jsonl", 2, change)
    own = ["policy.instructions=none", f"run.output_dir={tmp_path / 'out'}"]  # there are none in French
    code, _, err = ctcgrpo("train", TINY, f"scenarios.train={pack}", *own)
    assert code == 3 and "'charm-train-02' cannot be played by the embedded simulator" in err and message in err


def test_a_mistake_can_be_mended_in_the_same_folder(ctcgrpo: Command, tmp_path: Path) -> None:
    command = ["train", TINY, *FAST, f"run.output_dir={tmp_path}"]
    assert ctcgrpo(*command, "policy.model=/nope")[0] == 4
    assert ctcgrpo(*command)[0] == 0


def test_broken_json_is_named_with_its_line(ctcgrpo: Command, pack: Path) -> None:
    file = pack / "support_final.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = lines[4][:-40]
    file.write_text("\n".join(lines))
    for command in (
        ("train", TINY, f"scenarios.train={pack}", "scenarios.invalid=refuse"),
        ("scenarios", "validate", str(pack)),
    ):
        code, out, err = ctcgrpo(*command)
        assert code == 3 and "support_final.jsonl, line 5: not valid JSON" in (err if command[0] == "train" else out)


def test_a_run_warns_of_scenarios_that_the_scripted_user_knows_nothing_of(ctcgrpo: Command, pack: Path, tmp_path: Path) -> None:
    edit(pack / "charm_final.jsonl", 2, lambda r: r.pop("script"))
    command = ("train", TINY, f"run.output_dir={tmp_path / 'out'}", "policy.lora={target_modules: [nope]}")  # ends early
    code, out, _ = ctcgrpo(*command, f"scenarios.train={pack}")
    assert code == 4 and "warning: 1 of 64 training scenarios have no script.details (charm-train-02)" in out
    assert "ctcgrpo scenarios new" in out


def without_chat_template(tiny: Path, folder: Path) -> Path:
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(
    "override, code, message",
    [
        ("scenarios.train=nowhere", 3, "scenarios 'nowhere' not found"),
        ("scenarios.train=eibench/train", 3, "ctcgrpo scenarios fetch eibench"),
        ("rollout.group_size=1", 2, "rollout.group_size is 1; input should be greater than or equal to 2"),
        ("rollout.gruop_size=4", 2, "unknown field rollout.gruop_size; did you mean 'group_size'?"),
        ("scenarios.per_step=5", 2, "scenarios.per_step is 5 for 4 scenes"),
        ("rollout.max_prompt_tokens=100", 4, "rollout.max_prompt_tokens) is 100; raise it or drop the scenario"),
        ("rollout.max_prompt_tokens=5000", 4, "has 4096 positions; set rollout.max_prompt_tokens=4072 or less"),
        ("policy.model=/nowhere/at/all", 4, "policy.model '/nowhere/at/all' cannot be loaded: no such folder"),
        ("policy.model=WITHOUT_TEMPLATE", 4, "has no chat template"),
        ("simulator.url=http://127.0.0.1:9", 5, "no simulator server answers"),
        ("simulator.port=TAKEN", 5, "try another one, or 0 for any free port"),
        ("run.output_dir=A_FILE", 6, "cannot write to"),
        ("policy.attention=foo", 2, "policy.attention is 'foo', but packing and the transformers engine use their own"),
        ("policy.lora={target_modules: [nope]}", 4, "policy (model 'builtin/tiny', attention, lora)"),
        ("policy.lora={target_modules: [lm_head]}", 4, "takes in lm_head, which this model ties to model.embed_tokens"),
        (
            "policy.lora={target_modules: '.*embed_tokens'}",
            4,
            "takes in model.embed_tokens, which this model ties to lm_head",
        ),
        ("policy.model=WITHOUT_WEIGHTS", 4, "without_weights', attention, lora)"),
    ],
)
def test_every_mistake_has_its_message_and_exit_code(
    ctcgrpo: Command, tiny: Path, tmp_path: Path, override: str, code: int, message: str
) -> None:
    (tmp_path / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        override = override.replace("TAKEN", str(taken.getsockname()[1])).replace("A_FILE", str(tmp_path / "file"))
        if "WITHOUT_TEMPLATE" in override:
            override = f"policy.model={without_chat_template(tiny, tmp_path / 'plain')}"
        if "WITHOUT_WEIGHTS" in override:
            shutil.copytree(tiny, tmp_path / "without_weights", ignore=shutil.ignore_patterns("*.safetensors"))
            override = f"policy.model={tmp_path / 'without_weights'}"
        got, _, err = ctcgrpo("train", TINY, f"run.output_dir={tmp_path}", override)
    assert got == code and message in err and "Traceback" not in err


def test_a_read_only_output_folder() -> None:
    nobody = 65534
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        recipe = load_recipe(TINY, [f"run.output_dir={folder}"])
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(nobody)  # root may write anywhere
            with (
                pytest.raises(OutputError, match=r"cannot write to .* \(Permission denied\).*run.output_dir"),
                RunFolder(recipe.folder).lock(print),
            ):
                pass
        finally:
            os.seteuid(user)


def test_a_recipe_that_is_not_there(ctcgrpo: Command) -> None:
    code, _, err = ctcgrpo("train", str(ROOT / "recipes" / "tinny.yaml"))
    assert code == 2 and "did you mean" in err and "tiny.yaml" in err


def test_processes_that_cannot_share_the_batch(ctcgrpo: Command) -> None:
    code, _, err = ctcgrpo("train", TINY, "--processes", "3")
    assert code == 2 and "16 episodes a step for 3 processes; expected a multiple of 3" in err


def test_small_commands(ctcgrpo: Command) -> None:
    assert ctcgrpo("version")[1].strip()
    code, out, _ = ctcgrpo("scenarios", "validate", "english/test", "--split", "test")
    assert code == 0 and "16 scenarios (4 charm, 4 defense, 4 repair, 4 support)" in out


FAST = ["training.max_steps=1", "training.updates_per_step=1", "rollout.max_turns=2", "rollout.group_size=2"]


def test_lora_changes_the_adapter_alone(ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = ctcgrpo("train", TINY, *FAST, "run.output_dir=out", "policy.lora.rank=4")
    assert code == 0, err
    folder = tmp_path / "out" / "tiny"
    monkeypatch.chdir("/")  # final/ loads from anywhere
    assert (folder / "final" / "adapter_model.safetensors").exists()
    tuned = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert AutoTokenizer.from_pretrained(folder / "final").chat_template
    base = AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()
    state = tuned.state_dict()
    adapters = [k for k in state if "lora_B" in k]
    assert adapters and any(state[k].abs().max() > 0 for k in adapters)
    for key, value in base.items():
        name = key if key in state else key.replace(".weight", ".base_layer.weight")
        assert torch.equal(state[name], value), key

    # Merged, it says the same.
    code, out, err = ctcgrpo("export", str(folder), "--dtype", "float32")
    assert code == 0 and str(folder / "export") in out, err
    assert not (folder / "export" / "adapter_config.json").exists() and (folder / "export" / "model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(folder / "export")
    ids = torch.randint(0, merged.config.vocab_size, (4, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, adapted = (model.eval()(ids).logits.log_softmax(-1) for model in (merged, tuned))
    assert (whole - adapted).abs().max() < 1e-5
    assert "LoRA of rank 4, merged" in (folder / "export" / "README.md").read_text()


def test_qlora_trains_an_adapter_on_weights_of_four_bits(ctcgrpo: Command, tmp_path: Path) -> None:
    options = ["policy.lora.rank=4", "policy.quantization=nf4", f"run.output_dir={tmp_path}"]
    code, _, err = ctcgrpo("train", TINY, *FAST, *options)
    assert code == 0, err
    from safetensors.torch import load_file

    adapter = load_file(tmp_path / "tiny" / "final" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for key, value in adapter.items() if "lora_B" in key)
    metrics = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    # Sampled from the same four bits that are trained on; the kernels for one token and for many round otherwise (0.01 was seen).
    assert all(m["logprob_gap"] < 0.05 for m in metrics if "logprob_gap" in m) and "logprob_gap" in metrics[0]
    code, _, err = ctcgrpo("export", str(tmp_path / "tiny"))
    assert code == 0, err
    assert "of the unquantized model" in (tmp_path / "tiny" / "export" / "README.md").read_text()


def test_a_run_that_fails_too_often_stops_and_can_go_on(ctcgrpo: Command, tmp_path: Path) -> None:
    class BreaksDown(Backend):
        """Answers the first step's eight episodes, then says it cannot."""

        answers = 0
        broken = True

        async def react(self, request: TurnRequest) -> Reaction:
            self.answers += 1
            if self.broken and request.request_id.split("/")[0] != "1":
                raise SimulatorReplyError("no words left")
            return react(request)

    backend = BreaksDown()
    with running(SimulatorServer(SCRIPTED_USER, backend=backend)) as url:
        command = ["train", TINY, *FAST, "training.max_steps=2", f"run.output_dir={tmp_path}", f"simulator.url={url}"]
        command += ["run.seed=7"]
        code, _, err = ctcgrpo(*command)
        assert code == 7, err
        assert "step 2: 8 of 8 episodes failed ({'simulator_reply': 8})" in err and "no words left" in err
        assert "checkpoint-1; run the same command to resume" in err
        traces = (tmp_path / "tiny" / "traces" / "step-000002.rank-0.jsonl").read_text().splitlines()
        assert all(json.loads(t)["outcome"] is None and "no words left" in json.loads(t)["failure"]["message"] for t in traces)

        changed, _, err = ctcgrpo(*command, "credit.alpha=3")
        assert changed == 6 and "credit.alpha: 15.0 -> 3.0" in err and "run.name=NAME" in err

        tolerant, _, err = ctcgrpo(*command, "rollout.max_failed=1.0", "run.name=tolerant")
        assert tolerant == 7 and "8 of 8 episodes failed" in err  # nothing to train on is never tolerated

        backend.broken = False
        code, _, err = ctcgrpo(*command)
        assert code == 0, err
    steps = [json.loads(line)["step"] for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_a_broken_checkpoint_is_never_loaded(ctcgrpo: Command, tmp_path: Path) -> None:
    command = ["train", TINY, *FAST, "training.max_steps=3", f"run.output_dir={tmp_path}"]
    code, _, err = ctcgrpo(*command)
    assert code == 0, err
    folder = tmp_path / "tiny"
    final = (folder / "final" / "model.safetensors").read_bytes()
    (folder / "final" / "COMPLETE").unlink()
    # One without its marker, one with a file cut short, one that somebody made.
    (folder / "checkpoint-3" / "COMPLETE").unlink()
    whole = (folder / "checkpoint-2" / "optimizer.pt").read_bytes()
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(whole[:100])
    (folder / "checkpoint-9").mkdir()
    code, out, err = ctcgrpo(*command)
    assert code == 0, err
    for reason in (
        f"checkpoint-2: optimizer.pt has 100 bytes; expected {len(whole)}",
        "checkpoint-3: COMPLETE is missing",
        "checkpoint-9",
    ):
        assert f"skipping incomplete {reason}" in " ".join(out.split()), out
    assert "step 2/3" in out and "step 1/3" not in out
    assert (folder / "final" / "model.safetensors").read_bytes() == final


def test_files_that_are_not_what_was_written_are_never_loaded(ctcgrpo: Command, tmp_path: Path) -> None:
    command = ["train", TINY, *FAST, "training.max_steps=3", f"run.output_dir={tmp_path}"]
    assert ctcgrpo(*command)[0] == 0
    folder = tmp_path / "tiny"
    final = (folder / "final" / "model.safetensors").read_bytes()
    weights = folder / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))  # zeros, in the right length
    (folder / "checkpoint-2" / "COMPLETE").write_text("{}")
    (folder / "final" / "COMPLETE").unlink()
    code, out, err = ctcgrpo(*command)
    assert code == 0, err
    told = " ".join(out.split())
    assert "checkpoint-3: model.safetensors is damaged" in told and "checkpoint-2: COMPLETE lists no file" in told
    assert "step 2/3" in out and "step 1/3" not in out
    assert (folder / "final" / "model.safetensors").read_bytes() == final


def test_a_damaged_starting_policy_is_never_loaded(ctcgrpo: Command, tmp_path: Path) -> None:
    command = ["train", TINY, *FAST, f"run.output_dir={tmp_path}", "validation={scenarios: english/test, every: 9}"]
    assert ctcgrpo(*command)[0] == 0
    folder = tmp_path / "tiny"
    config = folder / "base" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-16'))
    assert config.read_text() != whole
    commands = (["export", str(folder)], ["evaluate", str(folder), "--limit", "1"], [*command, "training.max_steps=2"])
    for again in commands:
        code, _, err = ctcgrpo(*again)
        assert code == 6 and "base: config.json is damaged" in err, (again, err)
    config.write_text(whole)
    assert ctcgrpo(*commands[-1])[0] == 0


def test_a_run_that_resumes_meets_the_same_data(ctcgrpo: Command, pack: Path, tiny: Path, tmp_path: Path) -> None:
    model, template = tmp_path / "model", tmp_path / "template.jinja"
    shutil.copytree(tiny, model)
    shutil.copy(model / "chat_template.jinja", template)
    command = ["train", TINY, *FAST, "training.max_steps=2", f"run.output_dir={tmp_path}", f"scenarios.train={pack}"]
    command += [f"policy.model={model}", f"policy.chat_template={template}"]
    command += [f"validation={{scenarios: {pack}, every: 9}}"]
    assert ctcgrpo(*command)[0] == 0
    folder = tmp_path / "tiny"
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoint-2")  # as if it had been killed after its first checkpoint

    file = pack / "support_final.jsonl"
    whole = file.read_text()

    def refused(*reasons: str) -> None:
        code, out, err = ctcgrpo(*command)
        assert code == 6 and all(reason in err for reason in reasons) and "resumes from" not in out, err

    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:8]))
    refused(
        "data changed since the run began",
        "scenarios.train: 8 removed (support-train-09, support-train-10, support-train-11, ...)",
        "validation.",
    )
    file.write_text("".join(lines[::-1]))
    refused("scenarios.train: reordered")
    file.write_text(whole.replace("### Background", "### Altered background", 1))
    refused("scenarios.train: 1 altered (support-train-01)")
    file.write_text(whole)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config + " ")
    refused("policy.model: 1 altered (config.json)")
    (model / "config.json").write_text(config)
    template.write_text(template.read_text() + " ")
    refused("policy.chat_template: 1 altered (template.jinja)", "run.name=NAME")
    shutil.copy(model / "chat_template.jinja", template)
    code, out, err = ctcgrpo(*command)
    assert code == 0 and "tiny resumes from checkpoint-1: policy" in out and "step 2/2" in out, err


def test_a_finished_run_can_be_given_more_steps(ctcgrpo: Command, tmp_path: Path) -> None:
    command = ["train", TINY, *FAST, f"run.output_dir={tmp_path}", "training.schedule=constant", "training.warmup=0"]
    assert ctcgrpo(*command, "training.max_steps=3", "run.name=whole")[0] == 0
    assert ctcgrpo(*command, "training.max_steps=1")[0] == 0
    folder = tmp_path / "tiny"
    first = (folder / "final" / "model.safetensors").read_bytes()
    code, _, err = ctcgrpo(*command, "training.max_steps=1")
    assert code == 6 and "is finished" in err and "training.max_steps=N" in err
    code, _, err = ctcgrpo(*command, "training.max_steps=2", "credit.alpha=3")
    assert code == 6 and "credit.alpha: 15.0 -> 3.0" in err and "max_steps" not in err
    code, out, err = ctcgrpo(*command, "training.max_steps=3")
    assert code == 0, err
    assert "training.max_steps 1 -> 3: the constant schedule now spans 3 steps; the learning rate" in " ".join(out.split())
    assert "step 2/3" in out and "step 1/3" not in out
    # The same weights as a run that was to have three steps from the beginning, and the earlier policy beside them.
    final = (folder / "final" / "model.safetensors").read_bytes()
    assert final == (tmp_path / "whole" / "final" / "model.safetensors").read_bytes() != first
    assert (folder / "final-after-1-steps" / "model.safetensors").read_bytes() == first
    code, _, err = ctcgrpo(*command, "training.max_steps=2")
    assert code == 6 and "training.max_steps: 3 -> 2" in err


def test_more_steps_take_their_learning_rate_from_the_longer_schedule(ctcgrpo: Command, tmp_path: Path) -> None:
    command = ["train", TINY, *FAST, f"run.output_dir={tmp_path}", "training.warmup=0", "training.learning_rate=1e-3"]
    assert ctcgrpo(*command, "training.max_steps=4", "run.name=whole")[0] == 0
    assert ctcgrpo(*command, "training.max_steps=2")[0] == 0
    code, out, err = ctcgrpo(*command, "training.max_steps=4")
    assert code == 0, err

    def rates(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["learning_rate"] for line in lines]

    assert rates("tiny")[2:] == pytest.approx(rates("whole")[2:])
    assert rates("tiny")[1] != pytest.approx(rates("whole")[1])
    assert f"the learning rate after the earlier last step is {rates('whole')[2]:.3g}" in " ".join(out.split())


@pytest.mark.parametrize(
    "where, error",
    [
        ("ctcgrpo.rollout.traces.TraceWriter.__call__", OSError(28, "No space left on device", "step-000002.rank-0.jsonl")),
        ("ctcgrpo.run.run_folder.RunFolder.append_metrics", OSError(122, "Disk quota exceeded")),
        # As torch and safetensors say it on a file system of 12 MB.
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1649728 vs 1649620")),
        ("safetensors.torch.serialize_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    ],
)
def test_a_full_disk_is_an_error_with_what_was_saved(
    ctcgrpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    command = ["train", TINY, *FAST, f"run.output_dir={tmp_path}"]
    assert ctcgrpo(*command)[0] == 0

    def full(*arguments: Any, **options: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        code, _, err = ctcgrpo(*command, "training.max_steps=2")
    assert code == 6 and err.startswith(f"error: cannot write to {tmp_path / 'tiny'}: "), err
    assert f"Saved {tmp_path / 'tiny' / 'checkpoint-1'}; free disk space" in err and err.count("\n") == 1
    code, out, err = ctcgrpo(*command, "training.max_steps=2")
    assert code == 0 and "step 2/2" in out, err


def test_a_run_folder_resumes_elsewhere(ctcgrpo: Command, tmp_path: Path) -> None:
    assert ctcgrpo("train", TINY, *FAST, f"run.output_dir={tmp_path / 'here'}")[0] == 0
    shutil.rmtree(tmp_path / "here" / "tiny" / "final")
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "tiny").rename(tmp_path / "there" / "moved")
    moved = ["train", TINY, *FAST, f"run.output_dir={tmp_path / 'there'}", "run.name=moved"]
    code, _, err = ctcgrpo(*moved)
    assert code == 0 and (tmp_path / "there" / "moved" / "final").exists(), err


def test_servers_may_be_elsewhere_when_a_run_resumes(tmp_path: Path) -> None:
    """As in a job that is submitted again, and gets other nodes."""

    def recipe(node: str, *more: str) -> Recipe:
        places = [f"simulator.url=http://{node}:8765", f"rollout.vllm.urls=[http://{node}:8000]"]
        served = ["rollout.engine=vllm_server", "rollout.deterministic=false", f"run.output_dir={tmp_path}"]
        return load_recipe(TINY, [*places, *served, *more])

    folder = RunFolder(tmp_path / "tiny")
    folder.path.mkdir()
    folder.begin(recipe("node-1"), 0)
    assert folder.changes(recipe("node-2", "simulator.timeout=300")) == []
    (changed,) = folder.changes(recipe("node-2", "rollout.vllm.gpu_memory=0.3"))
    assert changed.startswith("rollout.vllm.gpu_memory: ")


def test_a_best_policy_counts_once_a_checkpoint_has_its_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def take(step: int) -> None:
        saved = tmp_path / "best.partial"
        saved.mkdir()
        (saved / "weights").write_text(str(step))
        folder.take_best(saved, step)

    assert folder.best_step is None and folder.rewind_best(0) is None
    take(2)
    folder.settle_best(2)
    assert folder.best_step == 2 and is_complete(folder.best)
    take(4)
    folder.settle_best(3)  # the newest checkpoint is of step 3: killed now, step 4 is played again
    assert folder.best_step == 2
    assert folder.rewind_best(3) == 2 and (folder.best / "weights").read_text() == "2"
    take(4)
    take(6)
    assert folder.rewind_best(6) == 6 and (folder.best / "weights").read_text() == "6"
    (folder.best / "STEP").write_text("x\n")
    mark_complete(folder.best)
    with pytest.raises(OutputError, match="STEP: expected the number of a step"):
        folder.rewind_best(6)
