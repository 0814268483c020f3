"""Turn samples from all processes to each: as arrays, what several samples begin with once.

A process's samples, in depth-first order of the tree of their prefixes (packing.py), are encoded by the length that each shares
with the one before (`forks`) and its own tokens. Arrays of all processes are gathered as tensors, padded to the longest.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from ctcgrpo.training.packing import prefix_tree
from ctcgrpo.training.rows import old_logprobs, sampled_logprobs
from ctcgrpo.types import TurnSample

Arrays = list[npt.NDArray[np.generic]]


def gather_samples(accelerator: Accelerator, samples: Sequence[TurnSample]) -> list[TurnSample]:
    """The samples of all processes, process by process, in each process's order; the same list on each."""
    if accelerator.num_processes == 1:
        return list(samples)
    return [sample for arrays in gather_arrays(accelerator, packed(samples)) for sample in unpacked(arrays)]


def gather_arrays(accelerator: Accelerator, arrays: Sequence[npt.NDArray[np.generic]]) -> list[Arrays]:
    """For each process, its arrays (each of one axis and any length, of the same types everywhere)."""
    if accelerator.num_processes == 1:
        return [list(arrays)]
    mine = torch.tensor([[len(array) for array in arrays]], dtype=torch.int64, device=accelerator.device)
    lengths = accelerator.gather(mine).cpu().numpy()
    found: list[Arrays] = [[] for _ in lengths]
    for array, of_processes in zip(arrays, lengths.T, strict=True):
        padded = np.zeros((1, int(of_processes.max())), dtype=array.dtype)
        padded[0, : len(array)] = array
        everybodys = accelerator.gather(torch.from_numpy(padded).to(accelerator.device)).cpu().numpy()
        for process, length in enumerate(of_processes):
            found[process].append(everybodys[process, :length])
    return found


def packed(samples: Sequence[TurnSample]) -> Arrays:
    """Samples as eight arrays: order, lengths, prompt lengths and forks (N,) int32, own tokens int32, advantages (N,) float64, old
    and sampled log-probabilities float32 of all samples in order, empty where they have none."""
    nothing = np.zeros(0, np.float32)
    if not samples:
        return [*(np.zeros(0, np.int32) for _ in range(5)), np.zeros(0), nothing, nothing]
    tree = prefix_tree(samples)
    ends = zip(tree.offsets[:-1] + tree.forks, tree.offsets[1:], strict=True)
    own = [tree.tokens[start:end] for start, end in ends]
    old, sampled = old_logprobs(samples), sampled_logprobs(samples)
    integers = (tree.order, tree.lengths, tree.prompts, tree.forks, np.concatenate(own))
    advantages = np.array([sample.advantage for sample in samples])
    return [*(x.astype(np.int32) for x in integers), advantages, *(nothing if x is None else x for x in (old, sampled))]


def unpacked(arrays: Sequence[npt.NDArray[np.generic]]) -> list[TurnSample]:
    """The samples that `packed` made the arrays of, in their order."""
    order, lengths, prompts, forks, own, advantages, old, sampled = arrays
    ids: dict[int, tuple[npt.NDArray[np.int32], int]] = {}
    before, start = np.zeros(0, np.int32), 0
    for place, length, prompt, fork in zip(order.tolist(), lengths.tolist(), prompts.tolist(), forks.tolist(), strict=True):
        before = np.concatenate([before[:fork], own[start : start + length - fork]]).astype(np.int32)
        start += length - fork
        ids[place] = before, prompt
    samples, at = [], 0
    for place in range(len(order)):
        tokens, prompt = ids[place]
        n = len(tokens) - prompt
        logprobs = (x[at : at + n].astype(np.float32) if len(x) else None for x in (old, sampled))
        samples.append(TurnSample(tokens[:prompt], tokens[prompt:], float(advantages[place]), *logprobs))
        at += n
    return samples
