"""Run folders that were cut, edited or damaged: every reader ends with an error that names the file, or says what it read.

A reader may give another figure than the undamaged folder does only with a word about it. A digit that changes where no other file
of a run repeats it cannot be noticed, and is not looked at: numbers of metrics.jsonl, texts of dialogues, options in recipe.yaml.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import io
import json
import random
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import typer.main

from ctcgrpo import cli
from ctcgrpo.util.files import COMPLETE, file_digest, mark_complete
from tests.attacks.suite import TimeIsUp, Tries, attack
from tests.conftest import ROOT

TINY = str(ROOT / "recipes" / "tiny.yaml")
FAST = ("scenarios.per_step=4", "rollout.group_size=2", "rollout.max_turns=2", "training.updates_per_step=1")
VALIDATED = (*FAST, "validation.scenarios=english/test", "validation.every=1")
_SCORE = re.compile(r"[+-]\d+\.\d{3}\b")
_WORDS = (
    "warning", "left out", "damaged", "unreadable", "cannot", "duplicate", "expected", "skipping incomplete", "missing", "differ",
    "ignored", "not as ", "incomplete", "no evaluation", "lacks",
)  # fmt: skip
_EXIT_CODES = {*range(1, 12), 130}
_LONGEST_MESSAGE = 4500


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str
    trace: str = ""

    @property
    def said(self) -> str:
        return f"{self.out}\n{self.err}"


_get_command = functools.cache(typer.main.get_command)
"""Typer builds all commands anew for each call, which takes longer than most readers do."""


def run(*arguments: str) -> Ran:
    """The `ctcgrpo` command in this process; `trace` is the traceback of what escaped it."""
    out, err = io.StringIO(), io.StringIO()
    code, trace = 0, ""
    with (
        mock.patch.object(sys, "argv", ["ctcgrpo", *arguments]),
        mock.patch.object(typer.main, "get_command", _get_command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except TimeIsUp:
            raise
        except Exception as error:  # noqa: BLE001 - what the command would have ended with
            where = traceback.extract_tb(error.__traceback__)[-1]
            code, trace = 1, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return Ran(code, out.getvalue(), err.getvalue(), trace)


# --- the folder that is damaged ----------------------------------------------------------------------------------------------


def finished_run(folder: Path) -> Path:
    """A run with validations and two evaluations in `evaluations/`."""
    trained = run("train", TINY, f"run.output_dir={folder}", "run.name=base", *VALIDATED, "training.max_steps=2")
    assert trained.code == 0, trained.said
    evaluated = run("evaluate", str(folder / "base"), "--limit", "4", "--out", str(folder / "base" / "evaluations"))
    assert evaluated.code == 0, evaluated.said
    shutil.rmtree(folder / "base" / "evaluations" / "logs", ignore_errors=True)
    return folder / "base"


# --- readers -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """`read` gives what the command did and the figures that it gave; `files` are globs of what it reads."""

    read: Callable[[Path, Path], tuple[Ran, Any]]
    files: Sequence[str]
    weight: float


def _scores(text: str) -> list[float]:
    return [float(score) for score in _SCORE.findall(text)]


def _same(a: Any, b: Any) -> bool:
    """Whether figures are the same but for rounding: the last of 16 digits may change without a word."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-9
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _show(folder: Path, out: Path) -> tuple[Ran, Any]:
    ran = run("show", str(folder))
    return ran, _scores(table_rows(ran.out))


def table_rows(text: str) -> str:
    """The lines of tables and sums, sorted: the order of scenes in a file is no figure. No dialogues: one that is damaged makes
    another one the typical one."""
    return "\n".join(sorted(line for line in text.splitlines() if not re.search(r"anger|trust", line)))


def _report(folder: Path, out: Path) -> tuple[Ran, Any]:
    page = out / "page.html"
    ran = run("report", str(folder), "--out", str(page))
    if not page.exists():
        return ran, None
    found: list[Any] = []
    for packed in re.findall(r"H4sI[A-Za-z0-9+/=]{20,}", page.read_text(encoding="utf-8")):
        value = json.loads(gzip.decompress(base64.b64decode(packed)))
        if isinstance(value, dict):
            found.append([value.get("validations"), value.get("headline")])
    assert found, "the page holds no figures"
    page.unlink()
    return ran, found


def _noise(folder: Path, out: Path) -> tuple[Ran, Any]:
    return run("noise", str(folder), "--dialogues", "1", "--replays", "2"), None


def _export(which: str) -> Callable[[Path, Path], tuple[Ran, Any]]:
    def read(folder: Path, out: Path) -> tuple[Ran, Any]:
        target = out / "export"
        ran = run("export", str(folder), "--out", str(target), "--which", which)
        if not target.exists():
            assert not list(out.glob("export*")) or ran.code, "half an export stays"
            return ran, None
        figures = [file_digest(target / "model.safetensors"), _scores((target / "README.md").read_text(encoding="utf-8"))]
        shutil.rmtree(target)
        return ran, figures

    return read


def _evaluate(folder: Path, out: Path) -> tuple[Ran, Any]:
    ran = run("evaluate", str(folder), "--limit", "1", "--out", str(out / "evaluation"))
    shutil.rmtree(out / "evaluation", ignore_errors=True)
    return ran, _scores(ran.out)


def _leaderboard(folder: Path, out: Path) -> tuple[Ran, Any]:
    ran = run("leaderboard", str(folder / "evaluations"))
    return ran, _scores(ran.out)


def _compare(folder: Path, out: Path) -> tuple[Ran, Any]:
    both = [str(folder / "evaluations" / name) for name in ("eibench-base", "eibench-final")]
    ran = run("compare", *both, "--out", str(out / "comparison"))
    shutil.rmtree(out / "comparison", ignore_errors=True)
    return ran, _scores(ran.out)


def _resume(folder: Path, out: Path) -> tuple[Ran, Any]:
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(folder / name, ignore_errors=True)
    again = [f"run.output_dir={folder.parent}", f"run.name={folder.name}", *VALIDATED, "training.max_steps=2"]
    ran = run("train", TINY, *again)
    weights = folder / "final" / "model.safetensors"
    return ran, file_digest(weights) if ran.code == 0 and weights.exists() else None


_WEIGHTS = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    COMPLETE,
)
READERS: Mapping[str, Reader] = {
    "show": Reader(_show, ("summary.json", "validation.jsonl", "traces/validation-*.jsonl", "simulator.json"), 8),
    "report": Reader(
        _report,
        ("recipe.yaml", "metrics.jsonl", "validation.jsonl", "traces/*.jsonl", "summary.json", "simulator.json", "final/COMPLETE"),
        8,
    ),
    "noise": Reader(_noise, ("recipe.yaml", "traces/*.jsonl"), 2),
    "export": Reader(_export("final"), ("recipe.yaml", "summary.json", *(f"final/{name}" for name in _WEIGHTS), "base/*"), 4),
    "export best": Reader(_export("best"), ("best/STEP", *(f"best/{name}" for name in _WEIGHTS)), 2),
    "evaluate": Reader(_evaluate, ("recipe.yaml", *(f"final/{name}" for name in _WEIGHTS), "base/*"), 0.4),
    "leaderboard": Reader(_leaderboard, ("evaluations/*/*.json", "evaluations/*/*.jsonl"), 4),
    "compare": Reader(_compare, ("evaluations/*/*.json", "evaluations/*/*.jsonl"), 4),
    "resume": Reader(
        _resume,
        ("recipe.yaml", "metrics.jsonl", "validation.jsonl", "simulator.json", "data.json", "sharding.json", "best/STEP",
         "best/COMPLETE", "best/model.safetensors", "base/*", "checkpoint-1/*", "summary.json"),
        0.8,
    ),
}  # fmt: skip


# --- damage ------------------------------------------------------------------------------------------------------------------


_DIGITS = (b"0", b"1", b"5", b"9", b"-", b"99999999999999999999", b"1e999", b"NaN", b"null", b'"x"')


def mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What was done, and what the file holds then."""
    kind = rng.choice(["cut", "flip", "zero", "all zero", "repeat", "drop", "digit", "digit", "empty", "append", "swap", "nest"])
    at = rng.randrange(len(data)) if data else 0
    lines = data.split(b"\n")
    line = rng.randrange(len(lines))
    if kind == "cut":
        return f"cut at {at}", data[:at]
    if kind == "flip" and data:
        changed = bytearray(data)
        places = [rng.randrange(len(data)) for _ in range(rng.randrange(1, 4))]
        for place in places:
            changed[place] ^= 1 << rng.randrange(8)
        return f"flip a bit at {places}", bytes(changed)
    if kind == "zero" and data:
        end = min(len(data), at + rng.randrange(1, 200))
        return f"zero {at} to {end}", data[:at] + bytes(end - at) + data[end:]
    if kind == "all zero":
        return "zero all of it", bytes(len(data))
    if kind == "repeat":
        return f"repeat line {line + 1}", b"\n".join([*lines[: line + 1], *lines[line:]])
    if kind == "drop":
        return f"drop line {line + 1}", b"\n".join([*lines[:line], *lines[line + 1 :]])
    if kind == "swap":
        other = rng.randrange(len(lines))
        lines[line], lines[other] = lines[other], lines[line]
        return f"swap lines {line + 1} and {other + 1}", b"\n".join(lines)
    if kind == "append":
        tail = rng.choice([b"{", b"null\n", b"[]\n", b"{}\n", b'"\\ud800"\n', b"\xff\xfe\n", b"[" * 20_000 + b"\n", b"9" * 5000])
        return f"append {tail[:12]!r}", data + tail
    places = [match.start() for match in re.finditer(rb"\d", data)]
    if kind == "digit" and places:
        place = rng.choice(places)
        digit = rng.choice(_DIGITS[: rng.choice([4, len(_DIGITS)])])
        return f"digit at {place} to {digit.decode()}", data[:place] + digit + data[place + 1 :]
    values = [match.span() for match in re.finditer(rb'(?<=: )("[^"\n]*"|[\d.+-]+|null|true|false)', data)]
    if kind == "nest" and values:
        start, end = rng.choice(values)
        other_value = rng.choice([b"[]", b"{}", b"null", b"[[[]]]", b'{"a": [1]}', b'""', b"true", b"-1", b"1e308", b"Infinity"])
        return f"value at {start} to {other_value.decode()}", data[:start] + other_value + data[end:]
    return "empty", b""


@attack("run_files", seconds=420)
def read_run_files(tries: Tries) -> None:
    """Random damage to a file of a run, then one of its readers: show, report, noise, export, evaluate, compare, resume, ..."""
    base = finished_run(tries.folder)
    work, out = tries.folder / "work" / "base", tries.folder / "out"
    shutil.copytree(base, work)
    out.mkdir()
    references: dict[str, tuple[Ran, Any]] = {}
    for name, reader in READERS.items():
        with tries.one(f"{name} of the undamaged folder"):
            references[name] = reader.read(work, out)
            assert not references[name][0].trace and references[name][0].code == 0, references[name][0]
        if name == "resume":
            _restore(base, work)
    counts = dict.fromkeys(references, 0)
    for k in range(tries.mutations):
        if time.monotonic() > tries.deadline:
            tries.notes.append(f"time was up after {k} of {tries.mutations} mutations")
            break
        tries.progress(k)
        rng = tries.rng("run-files", k)
        name = rng.choices(list(references), [READERS[name].weight for name in references])[0]
        reader = READERS[name]
        found = sorted({file for glob in reader.files for file in work.glob(glob) if file.is_file()})
        file = rng.choice(found)
        what, damaged = mutate(file.read_bytes(), rng)
        original = file.read_bytes()
        if damaged == original:
            continue
        file.write_bytes(damaged)
        hostile = (file.parent / COMPLETE).exists() and file.name != COMPLETE and rng.random() < 0.3
        if hostile:
            mark_complete(file.parent)
        label = f"mutation {k}: {name}, {file.relative_to(work)}, {what}{', marked complete' if hostile else ''}"
        counts[name] += 1
        with tries.one(label):
            ran, figures = reader.read(work, out)
            _held(name, ran, figures, references[name], file, hostile=hostile)
        if name == "resume" or hostile:
            _restore(base, work)
        else:
            file.write_bytes(original)
    tries.notes.append("mutations by reader: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


def _restore(base: Path, work: Path) -> None:
    shutil.rmtree(work)
    shutil.copytree(base, work)


def _held(name: str, ran: Ran, figures: Any, reference: tuple[Ran, Any], file: Path, *, hostile: bool) -> None:
    """Raises AssertionError for a traceback, an error without a message, and a figure that changed without a word."""
    assert not ran.trace, ran.trace
    if ran.code:
        assert ran.code in _EXIT_CODES, f"exit code {ran.code}"
        said = re.search(r"(error|stopped): .{10}", ran.err) or "Usage" in ran.err
        assert said, f"exit code {ran.code} without a reason: {ran.said[-300:]}"
        assert len(ran.err) < 2 * _LONGEST_MESSAGE, f"a message of {len(ran.err)} characters"
        return
    same = _same(figures, reference[1])
    weights = hostile or file.name in ("recipe.yaml", "metrics.jsonl")
    if not same and not weights:
        before, now = reference[0].said.lower(), ran.said.lower()
        assert any(now.count(word) > before.count(word) for word in _WORDS), (
            f"another figure without a word: {str(figures)[:150]} where it was {str(reference[1])[:150]}"
        )
