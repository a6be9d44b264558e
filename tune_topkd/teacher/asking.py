"""A teacher that says the same of an image whoever asks: beside whichever images, on however many threads."""

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
"""Images that a network is shown at once, always so many, since its rounding may depend on it. A thread of the CPU is as
fast with 16 as with more, and so a batch of 64 keeps four of them busy."""

LARGEST = torch.finfo(torch.float16).max
"""Of the logits that float16 has."""

_log = logging.getLogger(__name__)


class TeacherError(TuneTopKDError):
    """What a teacher says cannot be learned from."""


class AskedTeacher:
    """A network whose logits, rounded to float16, are a function of the image and the kind of device alone.

    On the CPU each thread computes the logits of other images by itself. Threads that share the work on the same images add
    up in another order when there are more of them, and wait for one another.
    """

    def __init__(self, model: nn.Module, name: str, device: torch.device) -> None:
        """Take over a network in eval mode, on `device`; `name` is for messages."""
        self._model = model
        self._name = name
        self._device = device
        self._at_once = ON_CPU if device.type == "cpu" else ON_GPU
        self._largest = torch.zeros((), device=device)
        self._threads: _Threads | None = None

    def says(self, images: Tensor) -> Tensor:
        """The logits of normalised images `(B, C, H, W)`: `(B, classes)` float16 on their device.

        Raises:
            TeacherError: on the CPU, as `check`; a GPU would have to be waited for.
        """
        parts = [self._filled_up(part) for part in torch.split(images, self._at_once)]
        logits = torch.cat(self._each(parts))[: len(images)]
        self._largest = torch.maximum(self._largest, logits.abs().max())  # NaN stays NaN
        if self._device.type == "cpu":
            self.check()
        return logits.half()

    def check(self) -> None:
        """Look at all that was said.

        Raises:
            TeacherError: a logit was NaN, or too large for float16.
        """
        check_logits(float(self._largest), self._name)

    def _filled_up(self, images: Tensor) -> Tensor:
        """With the first of the images again and again, to make up the number."""
        lacking = self._at_once - len(images)
        return torch.cat([images, images[:1].expand(lacking, *images.shape[1:])]) if lacking else images.contiguous()

    def _each(self, parts: Sequence[Tensor]) -> list[Tensor]:
        threads = torch.get_num_threads()
        if self._device.type != "cpu" or threads == 1:
            return [_logits(self._model, part) for part in parts]
        if self._threads is None or self._threads.number != threads:
            self._threads = _Threads(self._model, threads, self._name)
        return self._threads.logits(parts)


def check_logits(largest: float, name: str) -> None:
    """Look at the largest magnitude of a teacher's logits.

    Raises:
        TeacherError: it is NaN, or too large for float16.
    """
    if not largest <= LARGEST:
        raise TeacherError(
            f"teacher {name}: gives a logit of {largest:g}, but logits must be finite and at most {LARGEST:,.0f}, the "
            "largest number of float16, which they are kept in; check its weights, and data.mean and data.std"
        )


class _Threads:
    """Threads that each show the teacher other images, and compute by themselves."""

    def __init__(self, model: nn.Module, number: int, name: str) -> None:
        self.number = number
        self._local = local = threading.local()
        twins: queue.SimpleQueue[nn.Module] = queue.SimpleQueue()
        for twin in _twins(model, number, name):
            twins.put(twin)
        at_work = twins.qsize()
        all_begun = threading.Barrier(at_work + 1)

        def begin() -> None:
            torch.get_num_threads()  # a thread takes the common number when it is first asked, not before
            torch.set_num_threads(1)  # of this thread
            local.model = twins.get()
            all_begun.wait()

        self._pool = ThreadPoolExecutor(at_work, "teacher", begin)
        for _ in range(at_work):
            self._pool.submit(int)
        all_begun.wait()
        torch.set_num_threads(number)  # of the threads to come, as it was

    def logits(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Of each part, in their order."""
        local = self._local
        return list(self._pool.map(lambda part: _logits(local.model, part), parts))


def _twins(model: nn.Module, number: int, name: str) -> list[nn.Module]:
    """The network as often as told, with the same weights: one that remembers something while it computes is not shared."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return [model, *(copy.deepcopy(model, dict(shared)) for _ in range(number - 1))]
    except Exception as error:  # noqa: BLE001 (others' networks may hold anything)
        _log.warning("teacher %s: works on one thread, since it cannot be copied: %s", name, error)
        return [model]


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images)
        return logits
