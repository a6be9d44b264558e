"""How fast a training is, and how much memory it takes, beside others like it: what packing trials goes by."""

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_topkd import machine
from tune_topkd.config import TrialConfig
from tune_topkd.train import Training
from tune_topkd.train import device_of
from tune_topkd.train import in_share
from tune_topkd.train import own_randomness

WARM_STEPS = 5
"""Before any is timed: buffers are made, kernels chosen, the teacher asked."""
STEPS_BETWEEN_LOOKS = 5
"""At the clock, for which a GPU is waited for: a training waits once an epoch."""
CONTEXT_BYTES = 600 * 2**20
"""What a process takes of a GPU besides what torch counts, about."""


@dataclass(frozen=True)
class Speed:
    """What one training came to.

    `peak_bytes` is the most that it took, of the GPU if it has one, else of the machine, which have `total_bytes`.
    """

    images_per_second: float
    peak_bytes: int
    total_bytes: int


class Probe:
    """A training that is run for its speed alone: that of a trial that finds the bank filled, if there is one."""

    def __init__(self, config: TrialConfig) -> None:
        """Build all of it and take the first steps, which are slower than the rest.

        Raises:
            ValueError: what the config names does not exist or does not fit together.
        """
        self._config = config
        self._device = device_of(config)
        with own_randomness(self._device), in_share(config, self._device):
            torch.manual_seed(config.seed % 2**64)
            self._training = _Training(config, self._device)
            self._sizes = self._training.sizes()
            for _ in range(WARM_STEPS):
                next(self._sizes)
            self._training.is_warm = True

    def __call__(self, seconds: float) -> Speed:
        """Train for so many seconds, epoch after epoch."""
        with own_randomness(self._device), in_share(self._config, self._device, waits=False):
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


class _Training(Training):
    """Takes its bank for filled once it is warm: every trial but the first of a sweep finds it so."""

    is_warm = False

    def sizes(self) -> Iterator[int]:
        """Train without end; how many images each step took."""
        while True:
            for size, _, _ in self.steps():
                yield size

    def _teacher_logits(self, images: Tensor, number: int) -> Tensor | None:
        if not self.is_warm or self.config.teacher_bank is None:
            self._known = super()._teacher_logits(images, number)
            return self._known
        return None if self._known is None else self._known[: len(images)]
