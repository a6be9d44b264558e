"""What this process may use of its machine: fewer CPUs and less memory than there are, in a container or a batch job."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/proc/self/cgroup")
_MOUNTS = Path("/proc/self/mountinfo")


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
