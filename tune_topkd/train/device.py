"""Where a training runs: its device, its CPU threads, its part of a GPU's memory, and torch's random numbers there."""

import contextlib
import gc
import logging
import os
import time
from collections.abc import Iterator

import torch

from tune_topkd.config import TrialConfig

GPU_PART = 0.95
"""Fraction of its share of a GPU's memory that a training may allocate; the rest is for the CUDA context, which torch
does not count."""
LONGEST_WAIT_FOR_MEMORY = 60.0
"""Seconds that a training waits until its share of a GPU's memory is free."""
MEMORY, GPU_MEMORY = "memory_mb", "gpu_memory_mb"
"""At the end of an epoch, in millions of bytes: the memory that this process has in RAM, and that torch holds of its GPU."""
_FREE_ENOUGH = 0.8
"""Fraction of the share that must be free: the CUDA context of this process is already in it."""

_log = logging.getLogger(__name__)


def default_device() -> torch.device:
    """The current GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_of(config: TrialConfig) -> torch.device:
    """The device of a training: the CPU where its `gpu_share` is 0, else the default device."""
    return torch.device("cpu") if config.gpu_share == 0 else default_device()


def memory_held(device: torch.device) -> dict[str, float]:
    """The memory that this process holds just now, as metrics; what cannot be known is left out."""
    found = {}
    with contextlib.suppress(OSError), open("/proc/self/statm") as pages:  # only Linux has this file
        found[MEMORY] = int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    if device.type == "cuda":
        found[GPU_MEMORY] = torch.cuda.memory_reserved(device) / 1e6
    return found


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Restore the states of torch's random generators, of the CPU and of `device`, at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def in_share(config: TrialConfig, device: torch.device, *, waits: bool = True) -> Iterator[None]:
    """Keep to the CPU threads and the GPU memory of a training; torch's number of threads is restored at the end.

    Args:
        config: the training's, with `threads` and `gpu_share`.
        device: where it runs.
        waits: wait until the share of the GPU's memory is free, `LONGEST_WAIT_FOR_MEMORY` at most.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(config.threads or threads)
        if device.type == "cuda":
            share = 1.0 if config.gpu_share is None else config.gpu_share
            torch.cuda.set_per_process_memory_fraction(GPU_PART * share if share < 1 else 1.0, device)
            if waits and config.gpu_share is not None:
                _await_memory(share, device)
        yield
    finally:
        torch.set_num_threads(threads)


def _await_memory(share: float, device: torch.device) -> None:
    """Wait until this share of a GPU's memory is free: the memory of a killed process is released with a delay."""
    gc.collect()
    torch.cuda.empty_cache()
    deadline = time.monotonic() + LONGEST_WAIT_FOR_MEMORY
    while True:
        free, total = torch.cuda.mem_get_info(device)
        if free >= _FREE_ENOUGH * share * total:
            return
        if time.monotonic() > deadline:
            _log.warning("only %.1f of the GPU's %.1f GB are free: going on with less", free / 1e9, total / 1e9)
            return
        time.sleep(0.5)
