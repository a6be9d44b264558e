"""What goes between the processes that train one student together: logits, gradients, and what the first of them says.

Each of them, a *rank*, has the student, its part of every batch, and the loss of the whole batch. A loss is a function of
logits and labels, whichever they are: a rank gathers those of all ranks, computes the same loss as the others, and derives
it by its own logits alone. The gradients of the weights, averaged over the ranks, are then those of one process.
"""

import contextlib
import datetime
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed
from torch import nn

from tune_topkd.data import Part

_LONGEST_WAIT = datetime.timedelta(days=7)
"""That a rank waits for another one: who dies or hangs is found by those who watch over the ranks."""


@dataclass(frozen=True)
class Group:
    """One rank's view of all of them; all ranks call the same methods in the same order."""

    number: int = 0
    """Of this rank, from 0."""
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that evaluates, and whose state is kept."""
        return self.number == 0

    @property
    def part(self) -> Part:
        """The part of each batch that this rank trains on."""
        return Part(self.number, self.size)

    def shared(self, student: nn.Module) -> nn.Module:
        """The student as a part of a group: on a GPU its batch norms take the statistics of the whole batch."""
        is_on_gpu = any(tensor.is_cuda for tensor in (*student.parameters(), *student.buffers()))
        if self.size == 1 or not is_on_gpu:
            return student
        synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        return synchronised

    def averaging(self, student: nn.Module) -> nn.Module:
        """A module that computes what the student does, and whose backward pass averages gradients over the ranks.

        The weights and buffers of the first rank are taken over by the others.
        """
        if self.size == 1:
            return student
        # parts of a user's network may have no part in the logits
        return nn.parallel.DistributedDataParallel(student, find_unused_parameters=True)

    def whole(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks in their order, `(size * n, …)` of `(n, …)`, for a loss that all ranks compute.

        The gradient is multiplied by the number of ranks, as gradients are averaged afterwards.
        """
        if self.size == 1:
            return tensor
        gathered: Tensor = _Gathered.apply(tensor, self)
        return gathered

    def averaged(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients averaged over the ranks; there is None for the same ones on all of them."""
        if self.size == 1:
            return list(gradients)
        found: list[Tensor | None] = []
        for gradient in gradients:
            mean = gradient
            if gradient is not None:
                mean = gradient / self.size
                distributed.all_reduce(mean)
            found.append(mean)
        return found

    def average(self, weights: Iterable[nn.Parameter]) -> None:
        """Average the gradients of weights that `averaging` does not know; they change in place."""
        for weight in weights if self.size > 1 else ():
            (weight.grad,) = self.averaged([weight.grad])

    def of_first(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, which replaces this one's."""
        if self.size > 1:
            distributed.broadcast(tensor, 0)
        return tensor


ALONE = Group()
"""One process that trains by itself: every method gives what it was given."""


@contextlib.contextmanager
def joined(number: int, size: int, device: torch.device, meeting_place: Path) -> Iterator[Group]:
    """Meet the other ranks on this machine, which all call this.

    After an exception the process can only end: leaving the others in an orderly way would wait for them.

    Args:
        number: of this rank, from 0.
        size: how many there are.
        device: a GPU of its own, the current one, or the CPU.
        meeting_place: an absolute path where no file is yet, in a folder that nobody else may write to.
    """
    backend, there = "nccl" if device.type == "cuda" else "gloo", meeting_place.as_uri()
    distributed.init_process_group(backend, there, rank=number, world_size=size, timeout=_LONGEST_WAIT)
    yield Group(number, size)
    distributed.destroy_process_group()


class _Gathered(torch.autograd.Function):
    """The rows of all ranks; backwards, those of this one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, len(tensor)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = slice(ctx.group.number * ctx.rows, (ctx.group.number + 1) * ctx.rows)
        return ctx.group.size * gradient[own], None
