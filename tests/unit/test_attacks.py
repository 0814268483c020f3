"""The attacks that take less than a second, and the suite that runs all of them."""

from __future__ import annotations

import time

import pytest

from tests.attacks.__main__ import main
from tests.attacks.run_files import table_rows
from tests.attacks.suite import ATTACKS, SUBJECTS, Attack, Tries, load

QUICK = [one for one in load().values() if one.quick]


@pytest.mark.parametrize("one", QUICK, ids=lambda one: one.name)
def test_a_quick_attack_is_held_off(one: Attack) -> None:
    result = one.run()
    assert result.held, result.shown
    assert result.tries > 1


def test_the_order_of_scenes_is_no_figure_and_a_score_of_another_scene_is() -> None:
    table = "charm  -0.787\nrepair -0.755\nanger +0.100"
    assert table_rows("repair -0.755\ncharm  -0.787") == table_rows(table)
    assert table_rows("repair -0.787\ncharm  -0.755") != table_rows(table)


def attack_of(make: object, seconds: float = 5.0) -> Attack:
    return Attack("texts", "made-here", "", make, seconds, quick=True)  # type: ignore[arg-type]


def test_every_failed_try_is_told_and_the_others_are_made() -> None:
    def makes(tries: Tries) -> None:
        for k in range(4):
            with tries.one(f"try {k}"):
                if k == 1:
                    raise AssertionError("did not hold")
                if k == 2:
                    raise KeyError("a defect")

    result = attack_of(makes).run()
    assert result.tries == 4 and not result.held
    assert result.failures == ["try 1: did not hold", "try 2: KeyError: 'a defect'"]


def test_an_attack_that_shows_nothing_has_failed() -> None:
    def hangs(tries: Tries) -> None:
        with tries.one("a reader that never ends"):
            time.sleep(30)

    def breaks(tries: Tries) -> None:
        raise OSError("no port")

    started = time.monotonic()
    (hung,) = attack_of(hangs, seconds=0.3).run().failures
    assert "still at work after 0.3 s" in hung and "a reader that never ends" in hung and time.monotonic() - started < 5
    assert attack_of(breaks).run().failures == ["after 0 tries: OSError: no port", "no try was made"]
    assert attack_of(lambda tries: None).run().failures == ["no try was made"]


def test_the_command_lists_and_runs_attacks_and_fails_with_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert {one.subject for one in ATTACKS.values()} == set(SUBJECTS)
    assert all(name in listed for name in ("oversize-heads", "read-run-files", "killed-ranks"))
    assert main(["oversize-heads"]) == 0
    assert "oversize-heads" in (out := capsys.readouterr().out) and "held" in out and "tokens-of" not in out
    with pytest.raises(SystemExit) as stop:
        main(["no-such-attack"])
    assert stop.value.code == 2 and "no attack is named no-such-attack" in capsys.readouterr().err

    def fails(tries: Tries) -> None:
        with tries.one("a try"):
            raise AssertionError("it broke")

    monkeypatch.setitem(ATTACKS, "made-here", attack_of(fails))
    assert main(["made-here", "--seed", "7"]) == 1
    out = capsys.readouterr().out
    assert "FAILED (seed 7) a try: it broke" in out and "1 failed" in out
