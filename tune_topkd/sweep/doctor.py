"""What is installed, what the machine or cluster has, and what is wrong."""

import os
import platform
import shutil
import sys
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tune_topkd import machine
from tune_topkd.config import ConfigError
from tune_topkd.ledger import Share
from tune_topkd.storage import StoreError
from tune_topkd.sweep import preflight
from tune_topkd.sweep.capacity import line_of
from tune_topkd.sweep.capacity import survey
from tune_topkd.sweep.workspace import Workspace

NEEDED = ("torch", "torchvision", "ray", "optuna", "mlflow", "pandas", "scikit-learn", "typer", "rich", "matplotlib")
LEAST_FREE_GB = 1.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    text: str
    is_well: bool = True


def examine(workspace: Workspace, progress: Callable[[str], AbstractContextManager[Any]]) -> Iterator[Finding]:
    """Look at Python, the packages, the machine, the devices, Ray, MLflow and the runs folder; each finding as it is made.

    Args:
        workspace: where sweeps would be run, and Ray and MLflow looked for.
        progress: told what is being looked at, where that takes seconds; held until it is done.
    """
    yield from (*_python(), *_packages(), *_machine())
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "importing torch": _torch,
        "asking the Ray cluster" if workspace.address else "starting a private Ray": lambda: _ray(workspace),
        "asking MLflow": lambda: _mlflow(workspace),
        "writing to the runs folder": lambda: _runs(workspace),
    }
    for what, look in looks.items():
        with progress(what):
            findings = list(look())
        yield from findings


def _python() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} at {sys.executable}", sys.version_info >= (3, 11))


def _packages() -> Iterator[Finding]:
    for package in NEEDED:
        try:
            yield Finding(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(package, "is not installed: pip install 'tune_topkd[sweep]'", is_well=False)


def _machine() -> Iterator[Finding]:
    """As a sweep counts it: in a container or a batch job there is more than this process may use."""
    cpus, there = machine.cpus(), os.cpu_count() or 0
    of_all = f" of {there} (its affinity and its cgroup allow no more)" if cpus < there else ""
    yield Finding("CPUs", f"{cpus}{of_all}")
    memory = machine.memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    of_all = f" of {total / 1e9:.0f} GB (its cgroup allows no more)" if memory < total else ""
    yield Finding("memory", f"{memory / 1e9:.0f} GB{of_all}")


def _torch() -> Iterator[Finding]:
    try:
        import torch
        import torchvision  # noqa: F401 (a CPU-only torch beside the registry's torchvision does not import)
    except (ImportError, RuntimeError) as error:
        yield Finding("torch and torchvision", f"do not import together: {error}", is_well=False)
        return
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("GPUs", ", ".join(gpus) or "none; trials run on the CPU")
    if gpus:
        pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))  # noqa: S108 (NVIDIA's default)
        is_there = (pipes / "control").exists()
        remedy = (
            "trials that share a GPU take turns on it; nvidia-cuda-mps-control -d, before Ray starts, lets them overlap"
        )
        yield Finding("CUDA MPS", "runs" if is_there else f"does not run: {remedy}")


def _ray(workspace: Workspace) -> Iterator[Finding]:
    from tune_topkd.execution import Cluster
    from tune_topkd.execution import ResourceError

    where = f"cluster at {workspace.address}" if workspace.address else "private cluster"
    try:
        with Cluster.attached(workspace.address) as cluster:
            cpus, gpus = (sum(column) for column in zip(Share(0.0, 0.0), *cluster.nodes, strict=True))
            yield Finding("ray", f"{where}: {len(cluster.nodes)} node(s), {cpus:g} CPUs, {gpus:g} GPUs")
            if workspace.address:
                yield from _nodes(workspace)
    except ResourceError as error:
        yield Finding("ray", str(error), is_well=False)


def _nodes(workspace: Workspace) -> Iterator[Finding]:
    """Of the cluster that this process is attached to; one that is gone is told of, and may be as it was meant."""
    try:
        found = survey(workspace)
    except ConfigError as error:  # the runs folder, which has a finding of its own
        yield Finding("nodes", f"not asked: {error}", is_well=False)
        return
    for surveyed in found:
        name, _, text = line_of(surveyed).partition(": ")
        is_well = not surveyed.node.is_alive or not (surveyed.trouble or surveyed.other_versions)
        yield Finding(name, text, is_well)


def _mlflow(workspace: Workspace) -> Iterator[Finding]:
    from tune_topkd.tracking import check_uri
    from tune_topkd.tracking import masked

    database = _sqlite_file(workspace.mlflow_uri)
    try:
        if database is not None:
            preflight.check_writable(database.parent)
        if database is not None and not database.exists():  # asking it would make it, with its tables
            yield Finding("mlflow", f"{masked(workspace.mlflow_uri)}, which the first sweep makes")
            return
        check_uri(workspace.mlflow_uri)
        yield Finding("mlflow", masked(workspace.mlflow_uri))
    except ConfigError as error:
        yield Finding("mlflow", f"not tried: {error}", is_well=False)
    except ValueError as error:
        yield Finding("mlflow", str(error), is_well=False)


def _sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite database; None for another store."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(unquote(path)).absolute() if path != uri else None


def _runs(workspace: Workspace) -> Iterator[Finding]:
    try:
        preflight.check_writable(workspace.runs)
    except ConfigError as error:
        yield Finding("runs", str(error), is_well=False)
        return
    free = shutil.disk_usage(workspace.runs).free / 1e9
    yield Finding("runs", f"{workspace.runs}, {free:.0f} GB free", free >= LEAST_FREE_GB)
    if workspace.remote is not None:
        try:
            workspace.remote.check()
            yield Finding("store", f"{workspace.place}, which keeps two drivers of a sweep apart")
        except StoreError as error:
            yield Finding("store", str(error), is_well=False)
