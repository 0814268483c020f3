"""Real processes: two of them are the same as one, whatever shards the policy."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests import sameness
from tests.conftest import ROOT
from tests.process.test_processes import ENVIRONMENT, SHARDED, TORCHRUN

KL, BY_TURN = ("--kl", "0.5"), ("--importance", "turn")
BY_EPISODE = ("--importance", "episode", "--top-k", "2000")  # some tokens of the fixed episodes are removed
KL_BY_TURN = (*KL, *BY_TURN, "--top-k", "1500")
IN_PARTS = ("--parts",)


@pytest.fixture(scope="module")
def ones(tiny: Path) -> dict[tuple[str, ...], sameness.Outcome]:
    """Of one process, by the options that the two are run with."""
    return {
        (): sameness.run(str(tiny), packing="none"),
        KL: sameness.run(str(tiny), packing="none", beta=0.5),
        BY_TURN: sameness.run(str(tiny), packing="none", importance="turn", old_logprobs="recomputed"),
        BY_EPISODE: sameness.run(str(tiny), packing="none", importance="episode", old_logprobs="recomputed", top_k=2000),
        KL_BY_TURN: sameness.run(str(tiny), packing="none", beta=0.5, importance="turn", old_logprobs="recomputed", top_k=1500),
    }


@pytest.mark.parametrize(
    ("backend", "options", "ran"),
    [
        ("", IN_PARTS, "DistributedDataParallel"),
        ("zero1", BY_TURN, "DeepSpeedEngine, ZeRO-1"),
        ("zero2", KL, "DeepSpeedEngine, ZeRO-2"),
        ("zero3", (*KL_BY_TURN, *IN_PARTS), "DeepSpeedEngine, ZeRO-3"),
        ("fsdp2", (*BY_EPISODE, *IN_PARTS), "FSDPQwen3ForCausalLM"),
    ],
)
def test_two_processes_are_the_same_as_one(
    ones: dict[tuple[str, ...], sameness.Outcome],
    backend: str,
    options: tuple[str, ...],
    ran: str,
    tiny: Path,
    tmp_path: Path,
) -> None:
    """One of them plain, the two with shared prefixes, and some of them with updates in parts."""
    kind = tuple(option for option in options if option not in IN_PARTS)
    assert not kind or not sameness.is_same(ones[()], ones[kind])
    one = ones[kind]
    options += ("--backend", backend) if backend else ()
    command = [*TORCHRUN, "-m", "tests.sameness", str(tmp_path / "two"), str(tiny), *options]
    environment = SHARDED if backend else ENVIRONMENT
    launched = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert launched.returncode == 0, launched.stderr
    parts = [sameness.Outcome(**torch.load(tmp_path / f"two.rank{r}.pt", weights_only=False)) for r in (0, 1)]
    assert [p.processes for p in parts] == [2, 2]
    assert [p.backend for p in parts] == [ran, ran]
    for part in parts:
        assert sameness.is_same(one, part), sameness.difference(one, part)
    together = [*parts[0].logprobs["0"], *parts[1].logprobs["1"]]
    assert len(together) == len(one.logprobs["0"])
    for a, b in zip(one.logprobs["0"], together, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    sketches = torch.cat([part.sketches for part in parts])
    assert len(one.sketches) == len(together) and torch.allclose(sketches, one.sketches, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one_in_bfloat16(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> sameness.Outcome:
    return launched_in_bfloat16(tiny, tmp_path_factory.mktemp("one"), "zero2", 1)[0]


def launched_in_bfloat16(tiny: Path, folder: Path, backend: str, processes: int) -> list[sameness.Outcome]:
    command = [*TORCHRUN, "-m", "tests.sameness", str(folder / "out"), str(tiny), "--backend", backend, "--bf16"]
    command[command.index("--nproc_per_node") + 1] = str(processes)
    done = subprocess.run(command, cwd=ROOT, env=SHARDED, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files = [folder / f"out.rank{rank}.pt" for rank in range(processes)]
    return [sameness.Outcome(**torch.load(file, weights_only=False)) for file in files]


@pytest.mark.parametrize("backend", ["zero2", "zero3"])
def test_gradients_are_summed_over_processes_in_float32(
    one_in_bfloat16: sameness.Outcome, backend: str, tiny: Path, tmp_path: Path
) -> None:
    """With bfloat16 compute the rows are the same to the last bit, on one process or two, and so the sums must be. Summed in
    bfloat16 they are 3e-3 apart."""
    for part in launched_in_bfloat16(tiny, tmp_path, backend, 2):
        assert part.processes == 2 and one_in_bfloat16.rows == 2 * part.rows
        apart = sameness.difference(one_in_bfloat16, part)
        assert apart["gradients"] < 1e-6 and apart["norm"] < 1e-6, apart
