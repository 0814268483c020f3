"""Model folders and checkpoints from others: code, templates, pickles, damaged or poisoned weights."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.policy.tiny import build_tiny
from ctcgrpo.util.files import mark_complete
from tests.attacks.run_files import FAST, TINY, Ran, run
from tests.attacks.suite import Tries, attack


class Pickled:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._marker),)


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _refused(ran: Ran, marker: Path) -> None:
    assert not marker.exists(), "code of the model's ran"
    assert not ran.trace, ran.trace
    assert ran.code in range(1, 12), f"exit code {ran.code}: {ran.said[-200:]}"
    assert "error: " in ran.err, ran.err[-300:]


def _code(folder: Path, marker: Path, model_type: str | None = None) -> None:
    _edit(folder / "config.json", auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"})
    if model_type:
        _edit(folder / "config.json", model_type=model_type, architectures=["Evil"])
    _edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(marker)!r})\nclass EvilConfig: pass\nclass Evil: pass\n")


def _bin(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Pickled(marker)}, folder / "pytorch_model.bin")


def _weights(change: Callable[[torch.Tensor], torch.Tensor], name: str = "") -> Callable[[Path, Path], None]:
    def edit(folder: Path, marker: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {k: change(v) if name in k else v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})

    return edit


def _cut(name: str, keep: float | int) -> Callable[[Path, Path], None]:
    def edit(folder: Path, marker: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])

    return edit


def _written(name: str, text: str) -> Callable[[Path, Path], None]:
    return lambda folder, marker: (folder / name).write_text(text.replace("MARKER", str(marker))) and None  # type: ignore[func-returns-value]


_ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
_ESCAPE = "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}{{ ''.__class__.__mro__[1].__subclasses__() }}"
_REFUSED: dict[str, Callable[[Path, Path], None]] = {
    "code for an unknown model type": lambda folder, marker: _code(folder, marker, "evil"),
    "a pickle for weights": _bin,
    "a template without an end": _written("chat_template.jinja", _ENDLESS),
    "a template of exponential size": _written("chat_template.jinja", "{{ 'x' * 10**11 }}"),
    "a template that leaves its sandbox": _written("chat_template.jinja", _ESCAPE),
    "a template that includes a file": _written("chat_template.jinja", "{% include '/etc/hostname' %}"),
    "a template that is none": _written("chat_template.jinja", "{% for %}{{"),
    "no weights": _cut("model.safetensors", 0),
    "weights cut in the header": _cut("model.safetensors", 100),
    "weights cut in half": _cut("model.safetensors", 0.5),
    "a header of 2^60 bytes": lambda folder, marker: (
        (folder / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}") and None
    ),  # type: ignore[func-returns-value]
    "NaN weights": _weights(lambda t: t * float("nan")),
    "one NaN": _weights(lambda t: t.index_fill(0, torch.tensor([0]), float("nan")), "embed_tokens"),
    "infinite weights": _weights(lambda t: t + float("inf"), "layers.0"),
    "weights of another size": _weights(lambda t: t[:1].clone(), "mlp"),
    "a broken tokenizer.json": _written("tokenizer.json", "{"),
    "a tokenizer.json that is a list": _written("tokenizer.json", "[]"),
    "a broken config.json": _written("config.json", "{"),
    "a config.json that is a list": _written("config.json", "[]"),
    "a config with text for sizes": lambda folder, marker: _edit(folder / "config.json", hidden_size="big"),
    "a config of another model": lambda folder, marker: _edit(folder / "config.json", hidden_size=24),
    "a config without a type": _written("config.json", "{}"),
}


@attack("models", seconds=180)
def untrusted_models(tries: Tries) -> None:
    """Model folders with code, pickles, templates that loop or leave their sandbox, cut or NaN weights: an error by name."""
    base, folder, marker = tries.folder / "base", tries.folder / "model", tries.folder / "RAN"
    build_tiny(base, (s.user_persona for s in load_scenarios("english/train")))
    sys.path_importer_cache.clear()

    def train(name: str) -> Ran:
        shutil.rmtree(tries.folder / "runs", ignore_errors=True)
        with mock.patch("ctcgrpo.policy.chat_template._RENDER_SECONDS", 1.0):
            return run(
                "train",
                TINY,
                *FAST,
                f"policy.model={folder}",
                f"run.output_dir={tries.folder / 'runs'}",
                "training.max_steps=1",
            )

    def remade() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)

    remade()
    with tries.one("the model as it is"):
        ran = train("plain")
        assert ran.code == 0, ran.said + ran.trace
    remade()
    _code(folder, marker)
    with tries.one("code for a model type that is known"):
        ran = train("code")
        assert not marker.exists() and not ran.trace, ran.trace or "code of the model's ran"
    for name, edit in _REFUSED.items():
        remade()
        edit(folder, marker)
        with tries.one(name):
            _refused(train(name), marker)


@attack("models", seconds=120)
def pickles_in_checkpoints(tries: Tries) -> None:
    """A pickle that runs code, in every file of a checkpoint that torch reads, on resume and export, with a marker that fits."""
    marker = tries.folder / "RAN"
    made = run("train", TINY, *FAST, f"run.output_dir={tries.folder}", "run.name=base", "training.max_steps=1")
    assert made.code == 0, made.said + made.trace
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt", "pytorch_model.bin"):
        folder = tries.folder / name.replace(".", "-")
        shutil.copytree(tries.folder / "base", folder)
        shutil.rmtree(folder / "final")
        checkpoint = folder / "checkpoint-1"
        torch.save({"x": Pickled(marker)}, checkpoint / name)
        if name == "pytorch_model.bin":
            (checkpoint / "model.safetensors").unlink()
        mark_complete(checkpoint)
        with tries.one(f"{name}, resume"):
            ran = run("train", TINY, *FAST, f"run.output_dir={tries.folder}", f"run.name={folder.name}", "training.max_steps=2")
            assert not marker.exists(), "code of the checkpoint's ran"
            assert not ran.trace, ran.trace
            assert ran.code == 0 or "error: " in ran.err, ran.said[-300:]
        with tries.one(f"{name}, export"):
            ran = run("export", str(folder), "--which", "1", "--out", str(folder / "out"))
            assert not marker.exists(), "code of the checkpoint's ran"
            assert not ran.trace, ran.trace
    for name in ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        folder = tries.folder / f"zero-{name[:4]}"
        shutil.copytree(tries.folder / "base", folder)
        shards = folder / "checkpoint-1" / "global_step1"
        shards.mkdir()
        torch.save({"optimizer_state_dict": {"x": Pickled(marker)}}, shards / name)
        torch.save({"module": {}, "x": Pickled(marker)}, shards / "mp_rank_00_model_states.pt")
        (folder / "checkpoint-1" / "latest").write_text("global_step1")
        mark_complete(folder / "checkpoint-1")
        with tries.one(f"shards of DeepSpeed's, {name}, export"):
            ran = run("export", str(folder), "--which", "1", "--out", str(folder / "out"))
            assert not marker.exists(), "code of the checkpoint's ran"
            assert not ran.trace, ran.trace
            assert ran.code in (4, 6), ran.said[-300:]
