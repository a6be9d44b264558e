"""How fast a training is and how much memory it takes, alone or beside others: what packing decides by."""

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_topkd import machine
from tune_topkd.config import TrialConfig
from tune_topkd.train.device import device_of
from tune_topkd.train.device import in_share
from tune_topkd.train.device import preserved_rng
from tune_topkd.train.loop import Training

WARM_STEPS = 5
"""Steps before any is timed: buffers are allocated, kernels chosen, the teacher asked."""
STEPS_BETWEEN_LOOKS = 5
"""Steps between two looks at the clock: a look waits for the GPU, which a training does once an epoch."""
CONTEXT_BYTES = 600 * 2**20
"""About what a process takes of a GPU's memory besides what torch counts."""


@dataclass(frozen=True)
class Speed:
    """The measured speed and memory of one training."""

    images_per_second: float
    peak_bytes: int
    """The most memory that it took, of the GPU if it runs on one, else of the machine."""
    total_bytes: int
    """All memory of that GPU or machine."""


class Probe:
    """A training that is run to measure it; it is as fast as a trial that finds its bank filled, if it has one."""

    def __init__(self, config: TrialConfig) -> None:
        """Build the training and take its first steps, which are slower than the rest.

        Raises:
            ValueError: what the config names does not exist or does not fit together.
        """
        self._config = config
        self._device = device_of(config)
        with preserved_rng(self._device), in_share(config, self._device):
            torch.manual_seed(config.seed % 2**64)
            self._training = _EndlessTraining(config, self._device)
            self._sizes = self._training.sizes()
            for _ in range(WARM_STEPS):
                next(self._sizes)
            self._training.is_warm = True

    def __call__(self, seconds: float) -> Speed:
        """Train for so many seconds, epoch after epoch, and measure it."""
        with preserved_rng(self._device), in_share(self._config, self._device, waits=False):
            started, images, steps = self._now(), 0, 0
            while steps % STEPS_BETWEEN_LOOKS or self._now() < started + seconds:
                images, steps = images + next(self._sizes), steps + 1
            rate = images / (self._now() - started)
        return Speed(rate, *self._memory())

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _memory(self) -> tuple[int, int]:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self._device) + CONTEXT_BYTES
            return peak, torch.cuda.get_device_properties(self._device).total_memory
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, machine.memory()


class _EndlessTraining(Training):
    """Trains without end; once warm, it reuses the teacher logits of a warm step, as if its bank were filled."""

    is_warm = False

    def sizes(self) -> Iterator[int]:
        """The number of images of each step."""
        while True:
            for size, _, _ in self.steps():
                yield size

    def _teacher_logits(self, images: Tensor, number: int) -> Tensor | None:
        if not self.is_warm or self.config.teacher_bank is None:
            self._known = super()._teacher_logits(images, number)
            return self._known
        return None if self._known is None else self._known[: len(images)]
