"""Finds NaN and infinite values in weights and gradients, with any sharding."""

import torch

from ctcgrpo.errors import PolicyError
from ctcgrpo.util.processes import raise_on_all


def nonfinite_weight(model: torch.nn.Module) -> str | None:
    """The name of a parameter with NaN or infinite values on this process, or None."""
    for name, parameter in model.named_parameters():
        # DeepSpeed's ZeRO-3 keeps its shard of a parameter beside it.
        if not _finite(getattr(parameter, "ds_tensor", parameter)):
            return name
    return None


def refuse_nonfinite(model: torch.nn.Module, name: str) -> None:
    """Raises PolicyError on all processes if any of them loaded NaN or infinite weights."""
    found = nonfinite_weight(model)
    damaged = f"model {name!r}: its weights are not finite ({found}): the files are damaged; load another model"
    raise_on_all(None if found is None else PolicyError(damaged))


def nonfinite_gradient(model: torch.nn.Module) -> str | None:
    """The name of a parameter whose gradient, or this process's shard of it, is not finite, or None; always None under DeepSpeed,
    which keeps gradients elsewhere."""
    for name, parameter in model.named_parameters():
        # The norm, as in clipping: if the squares of finite numbers overflow, clipping would scale the gradient to 0.
        if parameter.grad is not None and not bool(torch.isfinite(torch.linalg.vector_norm(_local(parameter.grad)))):
            return name
    return None


@torch.no_grad()
def _finite(tensor: torch.Tensor) -> bool:
    local = _local(tensor)
    if not local.is_floating_point() or not local.numel():
        return True
    # Minimum and maximum reveal NaN and infinities without a mask of the tensor's size.
    lowest, highest = local.aminmax()
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of an FSDP2 DTensor; other tensors unchanged."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
