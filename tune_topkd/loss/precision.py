"""What keeps the arithmetic in range: float32 or wider, autocast off, lengths that can be divided by."""

import contextlib
import math

import torch
from torch import Tensor


def widened(*logits: Tensor) -> list[Tensor]:
    """Bring tensors to their common dtype, float32 at least."""
    dtype = torch.float32
    for each in logits:
        dtype = torch.promote_types(dtype, each.dtype)
    return [each.to(dtype) for each in logits]


def autocast_off(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast is off for the device of the tensor."""
    kind = tensor.device.type
    # Asked first: torch.autocast is slow to enter, and raises for devices that have none, such as "meta". Not asked while
    # compiling: torch 2.11 cannot trace the question.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    if not available or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(device_type=kind, enabled=False)


def safe_length(vectors: Tensor, floor: Tensor | float | None = None) -> Tensor:
    """Return the L2 norm over the last dimension, or infinity for a vector that counts as zero.

    Dividing by infinity gives value 0 and gradient 0. Below the default floor squares leave the range.
    """
    if floor is None:
        limits = torch.finfo(vectors.dtype)
        floor = math.sqrt(limits.tiny / limits.eps)
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return length.masked_fill(length <= floor, math.inf)
