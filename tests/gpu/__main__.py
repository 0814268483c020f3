"""Runs the checks that this machine can run, a line each, then a table of all. Exits with 1 where one failed.

    python -m tests.gpu [--cpu] [--only NAME ...] [--list] [--out FOLDER] [--scratch FOLDER]

FOLDER (default checkpoints/test_gpu) gets results.md, results.json and a log a check. Some 10 GB are needed in the scratch folder
(default: a temporary one).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "--cpu" in sys.argv:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

import torch
from rich.table import Table

from ctcgrpo.util.terminal import Terminal, log_line
from tests.gpu.registry import Check, Figures, Machine, all_checks, why_not
from tests.gpu.running import Result, run_and_write, run_apart


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch/test_gpu.sh", description="Try every way in which this project uses a GPU.")
    parser.add_argument("--cpu", action="store_true", help="run what needs no GPU, on a small policy")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="checks whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="name the checks and what they need, and run none")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/test_gpu"), help="where results and logs go")
    parser.add_argument("--scratch", type=Path, help="where policies and runs go while the checks run")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    checks = all_checks()
    if asked.run:  # one check, in a process of its own
        machine = this_machine(asked.scratch, on_cpu=asked.cpu)
        run_and_write(next(c for c in checks if c.name == asked.run), machine, asked.answer)
        return 0
    chosen = [c for c in checks if not asked.only or any(part in c.name for part in asked.only)]
    if asked.list and asked.cpu:
        chosen = [c for c in chosen if c.on_cpu]
    if not chosen:
        parser.error(f"--only {' '.join(asked.only)}: no check has such a name; --list names them")
    if asked.list:
        for check in chosen:
            log_line(f"{check.name:<80}{_needs(check)}")
        return 0
    if not asked.cpu and not torch.cuda.device_count():  # not is_available(): that would initialise CUDA here
        log_line("no GPU here: every check that needs one is not run; --cpu runs what needs none")
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="test_gpu-") as temporary:
        scratch = asked.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        return report(run_all(chosen, this_machine(scratch, on_cpu=asked.cpu), asked.out), asked.out)


def this_machine(scratch: Path, *, on_cpu: bool) -> Machine:
    gpus = 0 if on_cpu else torch.cuda.device_count()
    gib = min((torch.cuda.get_device_properties(k).total_memory / 2**30 for k in range(gpus)), default=0.0)
    return Machine(gpus, gib, on_cpu, scratch.resolve())


def run_all(checks: Sequence[Check], machine: Machine, out: Path) -> list[Result]:
    results = []
    for check in checks:
        if reason := why_not(check, machine):
            result = Result(check.name, "not run", 0.0, {}, reason)
        else:
            log = out / (re.sub(r"[^a-z0-9]+", "-", check.name.lower()).strip("-") + ".log")
            log.unlink(missing_ok=True)
            result = run_apart(check, machine, log)
        results.append(result)
        detail = result.why or figures_text(result.figures)
        log_line(f"{result.outcome:<8}{result.name:<64}{result.seconds:6.0f} s  {detail}")
    return results


def report(results: Sequence[Result], out: Path) -> int:
    """Print the table and write it; gives the exit code."""
    table = Table("check", "outcome", "seconds", "figures, or why", title="GPU checks")
    for r in results:
        why = f"{r.why} ({r.log})" if r.outcome == "FAILED" else r.why
        table.add_row(r.name, r.outcome, f"{r.seconds:.0f}", why or figures_text(r.figures))
    Terminal(160).print(table)
    rows = [f"| {r.name} | {r.outcome} | {r.seconds:.0f} | {_cell(r.why or figures_text(r.figures))} |" for r in results]
    head = ["| check | outcome | seconds | figures, or why |", "|---|---|---|---|"]
    (out / "results.md").write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    (out / "results.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")
    counts = {outcome: sum(r.outcome == outcome for r in results) for outcome in ("ok", "FAILED", "not run")}
    log_line(f"{', '.join(f'{n} {outcome}' for outcome, n in counts.items())}; written to {out / 'results.md'} and results.json")
    return int(counts["FAILED"] > 0)


def figures_text(figures: Figures) -> str:
    return "; ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items())


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _needs(check: Check) -> str:
    needs = [f"{check.gpus} GPU{'s' * (check.gpus > 1)}{' or a CPU' * check.on_cpu}", *check.modules]
    needs += [f"{check.gib:g} GiB"] if check.gib else []
    return f"{', '.join(needs)}; about {check.seconds} s on a GPU"


if __name__ == "__main__":
    sys.exit(main())
