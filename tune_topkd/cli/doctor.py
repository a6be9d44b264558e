"""What is installed, what the machine or cluster has, and what is wrong."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tune_topkd.cli import preflight
from tune_topkd.cli.running import Place
from tune_topkd.config import ConfigError

NEEDED = ("torch", "torchvision", "ray", "optuna", "mlflow", "pandas", "scikit-learn", "typer", "rich", "matplotlib")
LEAST_FREE_GB = 1.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    text: str
    is_well: bool = True


def examine(place: Place) -> list[Finding]:
    """Look at Python, the packages, the devices, Ray, MLflow and the runs folder."""
    return [*_python(), *_packages(), *_torch(), *_ray(place), *_mlflow(place), *_runs(place)]


def _python() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} at {sys.executable}", sys.version_info >= (3, 11))


def _packages() -> Iterator[Finding]:
    for package in NEEDED:
        try:
            yield Finding(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(package, "is not installed: pip install 'tune_topkd[sweep]'", is_well=False)


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


def _ray(place: Place) -> Iterator[Finding]:
    from tune_topkd.sweep import Cluster
    from tune_topkd.sweep import ResourceError

    where = f"cluster at {place.address}" if place.address else "private cluster"
    try:
        with Cluster.attached(place.address) as cluster:
            cpus, gpus = (sum(column) for column in zip(*cluster.nodes, strict=True))
            yield Finding("ray", f"{where}: {len(cluster.nodes)} node(s), {cpus:g} CPUs, {gpus:g} GPUs")
    except ResourceError as error:
        yield Finding("ray", str(error), is_well=False)


def _mlflow(place: Place) -> Iterator[Finding]:
    from tune_topkd.tracking import check_uri
    from tune_topkd.tracking import masked

    try:
        preflight.check_writable(place.runs)
        check_uri(place.mlflow_uri)
        yield Finding("mlflow", masked(place.mlflow_uri))
    except ConfigError as error:
        yield Finding("mlflow", f"not tried: {error}", is_well=False)
    except ValueError as error:
        yield Finding("mlflow", str(error), is_well=False)


def _runs(place: Place) -> Iterator[Finding]:
    try:
        preflight.check_writable(place.runs)
    except ConfigError as error:
        yield Finding("runs", str(error), is_well=False)
        return
    free = shutil.disk_usage(place.runs).free / 1e9
    yield Finding("runs", f"{place.runs}, {free:.0f} GB free", free >= LEAST_FREE_GB)
