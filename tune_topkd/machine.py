"""What this process may use of its machine: fewer CPUs and less memory than there are, in a container or a batch job.

And what the machine's GPUs are doing; and how long a process lives there.
"""

import ctypes
import functools
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CGROUPS = Path("/proc/self/cgroup")
_MOUNTS = Path("/proc/self/mountinfo")
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's sys/prctl.h


def cpus() -> int:
    """The CPUs that this process may run on (affinity: `taskset`, a cpuset), no more than its cgroup has time for."""
    allowed = len(os.sched_getaffinity(0))
    return max(math.floor(min([allowed, *_cpu_quotas()])), 1)


def memory() -> int:
    """Bytes of memory that this process and those it starts may take: the machine's, or what its cgroup has."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_memory_limits()])


def _cpu_quotas() -> Iterator[float]:
    """CPUs' worth of time, by each cgroup above this process that is limited."""
    for folder in _cgroup_folders("cpu"):
        quota, *period = _words(folder / "cpu.max")
        if not period:
            quota, *period = _words(folder / "cpu.cfs_quota_us")[:1] + _words(folder / "cpu.cfs_period_us")[:1]
        if period and quota.isdecimal() and period[0].isdecimal() and int(quota) and int(period[0]):
            yield int(quota) / int(period[0])


def _memory_limits() -> Iterator[int]:
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _words(folder / name)[0]
            if limit.isdecimal() and int(limit):
                yield int(limit)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup for a controller, and of those above it: version 2, and version 1."""
    inside: dict[str, str] = {}
    for line in _lines(_CGROUPS):
        _, names, its = line.split(":", 2)
        inside |= dict.fromkeys(names.split(","), its)
    for line in _lines(_MOUNTS):
        place, _, kind = line.partition(" - ")
        root, mounted_at = place.split()[3:5]
        system, _, options = kind.split(" ", 2)
        is_its = system == "cgroup2" or (system == "cgroup" and controller in options.split(","))
        path = inside.get("" if system == "cgroup2" else controller)
        if not is_its or path is None:
            continue
        within = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
        here = Path(mounted_at) / within
        yield from [here, *here.parents][: len(within.parts) + 1]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # another system than Linux, or /proc is not there: there is no limit to be known
        return []


def _words(path: Path) -> list[str]:
    """The words of a file; one empty word if it is not there."""
    try:
        return path.read_text().split() or [""]
    except OSError:
        return [""]


def end_with(parent: int) -> None:
    """See that the kernel kills this process when the thread that started it ends, however it does.

    Args:
        parent: the process id of who started this one; if that is gone already, this process ends.

    Raises:
        OSError: the kernel refuses.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) is refused")
    if os.getppid() != parent:
        sys.exit(1)


# --- GPUs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU of this machine at a moment, whoever uses it."""

    name: str
    used: int
    """Bytes of its memory."""
    total: int
    busy: int | None
    """Percent of the last moments in which it computed; None where the driver does not say, as with MIG."""


@dataclass(frozen=True)
class NodeGpus:
    """The NVIDIA GPUs of one of a cluster's nodes at a moment."""

    name: str
    """What the cluster calls the node; two may be called the same."""
    at: float
    """When it answered, in Unix seconds by the clock of who asked."""
    gpus: tuple[Gpu, ...]


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Rates(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


@functools.cache
def _nvml() -> Any:
    """NVIDIA's management library, ready for use; None where there is none. It makes no CUDA context."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs of this machine as they are now; none where there is no driver of NVIDIA's."""
    library, count = _nvml(), ctypes.c_uint()
    if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    found = (_gpu(library, number) for number in range(count.value))
    return [gpu for gpu in found if gpu is not None]


def _gpu(library: Any, number: int) -> Gpu | None:
    handle, name, memory, rates = ctypes.c_void_p(), ctypes.create_string_buffer(96), _Memory(), _Rates()
    if (
        library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(handle)) != 0
        or library.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name))) != 0
        or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0
    ):
        return None
    is_told = library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates)) == 0
    return Gpu(name.value.decode(errors="replace"), memory.used, memory.total, rates.gpu if is_told else None)
