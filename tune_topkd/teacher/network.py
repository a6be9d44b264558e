"""The teacher's network, which gives the same logits of an image beside whichever other images, on however many
threads."""

import copy
import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch import nn

from tune_topkd.errors import TuneTopKDError

ON_CPU, ON_GPU = 16, 64
"""Images per forward pass, always exactly so many, since the rounding may depend on the number. A thread of the CPU is
as fast with 16 as with more, so a batch of 64 keeps four of them busy."""

LARGEST = torch.finfo(torch.float16).max
"""The largest logit that float16 can hold."""

_log = logging.getLogger(__name__)


class TeacherError(TuneTopKDError):
    """The logits of a teacher cannot be learned from."""


class TeacherNetwork:
    """A network whose logits, rounded to float16, depend on the image and the kind of device alone.

    On the CPU each thread runs the network on other images by itself. Threads that share the work on the same images
    would add up in another order for every number of threads, and wait for one another.
    """

    def __init__(self, model: nn.Module, name: str, device: torch.device) -> None:
        """Take over a network.

        Args:
            model: in eval mode, on `device`.
            name: for messages.
            device: where it runs.
        """
        self._model = model
        self._name = name
        self._device = device
        self._at_once = ON_CPU if device.type == "cpu" else ON_GPU
        self._largest = torch.zeros((), device=device)
        self._threads: _Threads | None = None

    def logits(self, images: Tensor) -> Tensor:
        """The logits of normalised images `(B, C, H, W)`: `(B, classes)` float16 on their device.

        Raises:
            TeacherError: as `check`, on the CPU only; on a GPU, `check` would wait for it.
        """
        parts = [self._padded(part) for part in torch.split(images, self._at_once)]
        logits = torch.cat(self._each(parts))[: len(images)]
        self._largest = torch.maximum(self._largest, logits.abs().max())  # NaN stays NaN
        if self._device.type == "cpu":
            self.check()
        return logits.half()

    def check(self) -> None:
        """Check all logits so far.

        Raises:
            TeacherError: one was NaN, or too large for float16.
        """
        check_logits(float(self._largest), self._name)

    def _padded(self, images: Tensor) -> Tensor:
        """The images, with the first of them repeated until there are as many as a forward pass takes."""
        lacking = self._at_once - len(images)
        return torch.cat([images, images[:1].expand(lacking, *images.shape[1:])]) if lacking else images.contiguous()

    def _each(self, parts: Sequence[Tensor]) -> list[Tensor]:
        threads = torch.get_num_threads()
        if self._device.type != "cpu" or threads == 1:
            return [_forward(self._model, part) for part in parts]
        if self._threads is None or self._threads.number != threads:
            self._threads = _Threads(self._model, threads, self._name)
        return self._threads.logits(parts)


def check_logits(largest: float, name: str) -> None:
    """Check the largest magnitude of a teacher's logits.

    Raises:
        TeacherError: it is NaN, or too large for float16.
    """
    if not largest <= LARGEST:
        raise TeacherError(
            f"teacher {name}: gives a logit of {largest:g}, but logits must be finite and at most {LARGEST:,.0f}, the "
            "largest number of float16, in which they are cached; check its weights, and data.mean and data.std"
        )


class _Threads:
    """Threads that each run their own copy of the network on other images, single-threaded."""

    def __init__(self, model: nn.Module, number: int, name: str) -> None:
        self.number = number
        self._local = local = threading.local()
        copies: queue.SimpleQueue[nn.Module] = queue.SimpleQueue()
        for each in _copies(model, number, name):
            copies.put(each)
        workers = copies.qsize()
        all_begun = threading.Barrier(workers + 1)

        def begin() -> None:
            torch.get_num_threads()  # a thread takes over the process's number at this first call
            torch.set_num_threads(1)  # of this thread
            local.model = copies.get()
            all_begun.wait()

        self._pool = ThreadPoolExecutor(workers, "teacher", begin)
        for _ in range(workers):
            self._pool.submit(int)
        all_begun.wait()
        torch.set_num_threads(number)  # of threads to come, as it was

    def logits(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The logits of each part, in their order."""
        local = self._local
        return list(self._pool.map(lambda part: _forward(local.model, part), parts))


def _copies(model: nn.Module, number: int, name: str) -> list[nn.Module]:
    """As many copies with shared weights: a network may hold state while it computes, so no two threads share one."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return [model, *(copy.deepcopy(model, dict(shared)) for _ in range(number - 1))]
    except Exception as error:  # noqa: BLE001 (others' networks may hold anything)
        _log.warning("teacher %s: runs on one thread, since it cannot be copied: %s", name, error)
        return [model]


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images)
        return logits
