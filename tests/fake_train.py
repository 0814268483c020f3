"""Stands in for `ctcgrpo train` where the coordinator of a sweep is tested: leaves what a run leaves, in no time.

The score of a run is -(alpha - 10)^2 / 100 + seed / 100, the same on each of four scenarios but for their places. $FAKE_TRAIN says
how it misbehaves: `fail=ALPHA` ends with an error, `poor=ALPHA` with its budget spent, `slow=SECONDS` takes so long a validation,
`count=FILE` gets a line a start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from ctcgrpo.util.files import is_complete, mark_complete


def stop(*_: object) -> None:
    print("stopped: interrupted", flush=True)
    sys.exit(130)


def main() -> None:
    signal.signal(signal.SIGINT, stop)
    given = dict(argument.split("=", 1) for argument in sys.argv[2:])
    how = dict(part.split("=", 1) for part in os.environ.get("FAKE_TRAIN", "").split(",") if part)
    run = Path(given["run.output_dir"]) / given["run.name"]
    assert not is_complete(run / "final"), "a finished run was started again"
    if "count" in how:
        with Path(how["count"]).open("a") as out:
            out.write(f"{run.parent.name}/{run.name} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ['MASTER_PORT']}\n")
    alpha, seed = float(given["credit.alpha"]), int(given["run.seed"])
    (run / "final").mkdir(parents=True, exist_ok=True)
    (run / "best").mkdir(exist_ok=True)
    if float(how.get("fail", "nan")) == alpha:
        print("error: policy.model 'x' cannot be loaded", flush=True)
        sys.exit(4)
    if float(how.get("poor", "nan")) == alpha:
        print("stopped: the budget of 1 USD is spent. Saved checkpoint-1", flush=True)
        sys.exit(1)  # as of accelerate's launcher
    score = -((alpha - 10) ** 2) / 100 + seed / 100
    records = []
    for step in (0, 1, 2, 3):
        time.sleep(float(how.get("slow", "0")))
        at = -1 + (score + 1) * step / 3
        outcomes = {f"s{k}": [at + (k - 1.5) / 100, at + (k - 1.5) / 100] for k in range(4)}
        records.append({"step": step, "outcomes": outcomes, "scenes": {}, "failed": 0})
        (run / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    ends = {name: {"overall": x, "scenes": {}, "n": 4, "step": k} for name, x, k in (("before", -1.0, 0), ("after", score, 3))}
    (run / "summary.json").write_text(json.dumps({**ends, "improvement": {"overall": score + 1, "ci95": None, "n": 4}}))
    (run / "final" / "config.json").write_text("{}")
    mark_complete(run / "final")


if __name__ == "__main__":
    main()
