"""Finding numbers that are no numbers, in weights and gradients, whatever they are sharded with."""

import torch

from ctcgrpo.errors import PolicyError
from ctcgrpo.util.processes import raise_on_all


def nonfinite_weight(model: torch.nn.Module) -> str | None:
    """The name of a parameter of which this process holds NaN or infinite values; None where there is none."""
    for name, parameter in model.named_parameters():
        # DeepSpeed's ZeRO-3 keeps its shard of a parameter beside it.
        if not _finite(getattr(parameter, "ds_tensor", parameter)):
            return name
    return None


def refuse_nonfinite(model: torch.nn.Module, name: str) -> None:
    """Raises PolicyError, on all processes together, for a policy that was loaded with NaN or infinite weights on any of them."""
    found = nonfinite_weight(model)
    damaged = f"model {name!r}: its weights are not finite ({found}): the files are damaged; load another model"
    raise_on_all(None if found is None else PolicyError(damaged))


def nonfinite_gradient(model: torch.nn.Module) -> str | None:
    """The name of a parameter whose gradient, or this process's shard of it, is not finite; None where there is none, and under
    DeepSpeed, which keeps gradients elsewhere."""
    for name, parameter in model.named_parameters():
        # Its norm, as clipping takes it: finite numbers whose squares overflow would be scaled to nothing.
        if parameter.grad is not None and not bool(torch.isfinite(torch.linalg.vector_norm(_local(parameter.grad)))):
            return name
    return None


@torch.no_grad()
def _finite(tensor: torch.Tensor) -> bool:
    local = _local(tensor)
    if not local.is_floating_point() or not local.numel():
        return True
    # Both ends show NaN and infinities, and need no mask of the tensor's size.
    lowest, highest = local.aminmax()
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of an FSDP2 DTensor; any other tensor itself."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
