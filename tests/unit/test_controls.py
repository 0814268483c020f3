"""The controls of a trained policy: what they are picked from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import controls


def test_candidates_are_what_the_policy_said_early_and_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "MOST_CANDIDATES", 3)
    (tmp_path / "traces").mkdir()
    for step in range(1, 31):
        replies = [f"Only in step {step}, {k}." for k in range(4)] + ["", ""]
        replies += ["I see."] * (2 if step < 5 else 0) + ["The lamp?"] * (2 if step > 26 else 0)
        lines = [json.dumps({"turns": [{"reply": reply}]}) for reply in replies]
        (tmp_path / "traces" / f"step-{step:06d}.rank-0.jsonl").write_text("\n".join(lines) + "\n")
    found = controls.candidates(tmp_path)
    assert len(found) == len(set(found)) == 6 and found[0] == "I see." and found[3] == "The lamp?"
    steps = [int(text.split()[3].rstrip(",")) for text in found if text.startswith("Only")]
    assert all(step <= 8 for step in steps[:2]) and all(step >= 23 for step in steps[2:])
    assert found == controls.candidates(tmp_path)
