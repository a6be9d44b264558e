"""Sweeps submitted to a Ray cluster: what travels there, and the command that runs them."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tune_topkd
from tune_topkd.config import ConfigError
from tune_topkd.config import Override
from tune_topkd.config import Problem
from tune_topkd.config import SweepConfig
from tune_topkd.config import dump_config
from tune_topkd.config import load_config
from tune_topkd.config import value_at
from tune_topkd.storage import check_uri
from tune_topkd.storage import is_uri
from tune_topkd.storage import write_text
from tune_topkd.sweep.spaces import space_path
from tune_topkd.sweep.workspace import MLFLOW_VARIABLE
from tune_topkd.sweep.workspace import PLACES
from tune_topkd.sweep.workspace import check_priority
from tune_topkd.sweep.workspace import naming_runs

if TYPE_CHECKING:
    from tune_topkd.execution.jobs import Job as Job
    from tune_topkd.execution.jobs import Jobs

JOBS_VARIABLE = "RAY_API_SERVER_ADDRESS"
"""Names the cluster's dashboard, for Ray's own command line too."""
LARGEST_FILE = 2**20
"""Bytes of a file that travels: it is code, or a small table, and no data."""
MOST_BYTES = 50 * 2**20
"""Of all that travels."""
SPACES = "submitted"
"""The folder of the job's search spaces within its working directory."""
_NOT_SENT = ("__pycache__", "mlruns", "node_modules", "build", "dist")


@dataclass(frozen=True)
class Submission:
    """Sweeps that a cluster is to run, one after the other."""

    configs: Mapping[str, SweepConfig]
    """By the sweep's name."""
    runs: str
    """The runs folder, an absolute path that means the same folder on all of the cluster's nodes, or a store's URI."""
    mlflow_uri: str | None = None
    """MLflow's, as the cluster reaches it; None for what the cluster's environment says."""
    priority: float = 1.0
    """Among the sweeps on the cluster."""

    @classmethod
    def of(
        cls,
        spaces: Sequence[str],
        names: Sequence[str],
        overrides: Sequence[Override],
        runs: str,
        mlflow_uri: str | None = None,
        priority: float = 1.0,
    ) -> "Submission":
        """Search spaces, checked as far as that can be done without the cluster's files.

        Raises:
            ConfigError: with the problems of the first space that has any, of the runs folder or of the priority.
        """
        check_priority(priority)
        if is_uri(runs):
            with naming_runs():
                check_uri(runs)
        elif not os.path.isabs(runs):
            rule = "must be an absolute path, of a folder that all of the cluster's nodes share, or s3://BUCKET/PREFIX"
            raise ConfigError("--runs-dir", [Problem(key=runs, rule=rule)])
        configs = {}
        for name, space in zip(names, spaces, strict=True):
            path = space_path(space)
            configs[name] = load_config(path, overrides)
            rule = "must be an absolute path: the job runs in another folder, on the cluster"
            relative = [
                Problem(key=key, rule=rule, value=value, has_value=True)
                for key, place in PLACES.items()
                if place.must_exist
                and isinstance(value := value_at(configs[name].model_dump(mode="json"), key), str)
                and not os.path.isabs(value)
            ]
            if relative:
                raise ConfigError(str(path), relative)
        return cls(configs, runs, mlflow_uri, priority)

    def to(self, jobs: "Jobs", folder: Path) -> "tuple[Job, list[str]]":
        """Submit them as one job; the same submission goes on with what an earlier one of them left.

        Args:
            jobs: the cluster's.
            folder: what is in it travels along, as the working directory: the user's code.

        Returns:
            The job, and what should be known of it.

        Raises:
            ConfigError: the folder is too large.
            JobError: a job runs one of these sweeps already, or the cluster refuses.
            ResourceError: the cluster does not let this process in.
        """
        with tempfile.TemporaryDirectory(prefix="tune-topkd-submit-") as temporary:
            place = Path(temporary)
            notes = copy_code(folder, place, self.runs)
            (place / SPACES).mkdir(exist_ok=True)
            for name, config in self.configs.items():
                write_text(place / SPACES / f"{name}.yaml", dump_config(config))
            words = ["run", *(f"{SPACES}/{name}.yaml" for name in self.configs), "--or-resume", "--runs-dir", self.runs]
            words += [] if self.priority == 1.0 else ["--priority", f"{self.priority:g}"]
            variables = {} if self.mlflow_uri is None else {MLFLOW_VARIABLE: self.mlflow_uri}
            return jobs.submit(words, list(self.configs), self.runs, place, variables), notes


def copy_code(folder: Path, place: Path, runs: str) -> list[str]:
    """Copy what a job needs of a folder, and this package beside it.

    Hidden files and folders, caches, the runs folder and environments of Python do not travel, nor do large files.

    Args:
        folder: the user's.
        place: where the copy goes; is there and empty.
        runs: a runs folder, in case it lies in `folder`.

    Returns:
        What does not travel though it may be needed, in words.

    Raises:
        ConfigError: more than `MOST_BYTES` would travel; names the largest folders.
    """
    sizes: dict[str, int] = {}
    large: list[str] = []
    for root, folders, files in os.walk(folder):
        here = Path(root)
        folders[:] = sorted(f for f in folders if _travels(here / f, runs))
        for name in sorted(files):
            source = here / name
            if name.startswith(".") or not source.is_file():
                continue
            size, path = source.stat().st_size, source.relative_to(folder)
            if size > LARGEST_FILE:
                large.append(str(path))
                continue
            top = path.parts[0] if len(path.parts) > 1 else "."
            sizes[top] = sizes.get(top, 0) + size
            if sum(sizes.values()) > MOST_BYTES:
                most = sorted(sizes, key=lambda part: -sizes[part])[:3]
                rule = (
                    f"its files travel with the job, and they are more than {MOST_BYTES // 2**20} MiB (most of it in "
                    f"{', '.join(most)}); submit from a folder that has the code and no data"
                )
                raise ConfigError("the working directory", [Problem(key=str(folder), rule=rule)])
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place / path)
    package = Path(tune_topkd.__file__).parent
    if not (place / package.name).exists():
        shutil.copytree(package, place / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    if not large:
        return []
    shown = ", ".join(large[:3]) + (f" and {len(large) - 3} more" if len(large) > 3 else "")
    return [f"too large to travel with the job, over {LARGEST_FILE // 2**20} MiB: {shown}"]


def _travels(folder: Path, runs: str) -> bool:
    is_ours = folder.name in _NOT_SENT or folder.name.startswith(".") or folder.name.endswith(".egg-info")
    return not is_ours and str(folder) != runs and not (folder / "pyvenv.cfg").exists() and not folder.is_symlink()


def jobs_at(address: str | None) -> "Jobs":
    """The jobs of the cluster at an address.

    Raises:
        ConfigError: there is no address.
        ResourceError: nothing answers there, or it does not let this process in.
    """
    if not address:
        rule = "must be given: http://HOST:8265, the cluster's dashboard, or HOST:PORT of its head"
        raise ConfigError("--address", [Problem(key="", rule=rule)])
    from tune_topkd.execution.jobs import Jobs

    return Jobs(address)
