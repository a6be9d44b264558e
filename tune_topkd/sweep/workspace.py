"""A runs folder: the names and files in it, the frozen configs, and whether a sweep can have a name."""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from tune_topkd.config import SWEEP_NAME
from tune_topkd.config import ConfigError
from tune_topkd.config import Override
from tune_topkd.config import Problem
from tune_topkd.config import SweepConfig
from tune_topkd.config import config_from
from tune_topkd.config import placements
from tune_topkd.config import read_yaml
from tune_topkd.config import unknown_choice
from tune_topkd.config import value_at
from tune_topkd.config import without
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import LEDGER_VERSION
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Share
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import is_driven
from tune_topkd.ledger import read_state
from tune_topkd.space import digest
from tune_topkd.storage import StoreNameError
from tune_topkd.storage import is_uri

if TYPE_CHECKING:
    from tune_topkd.ledger import Mirror
    from tune_topkd.sweep.remote import Remote

RUNS_DIR_VARIABLE = "TUNE_TOPKD_RUNS_DIR"
MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"
RAY_VARIABLE = "RAY_ADDRESS"
DEFAULT_RUNS = "runs"
NO_MLFLOW = ""
"""The URI that means no MLflow, whatever the environment says."""
PRIVATE = "local"
"""The address that means a private Ray on this machine, whatever the environment says."""

CONFIG_FILE = "sweep.yaml"
DATASET_FILE = "dataset.pt"
TEST_DATASET_FILE = "test-dataset.pt"
LOG_FILE = "sweep.log"
GPUS_FILE = "gpus.json"
"""While trials run on a cluster: what the GPUs of its nodes are doing."""
DRIVER_FILE = "driver.json"
"""Of runs in a store: which process has said when that it drives the sweep."""
LONGEST_SILENCE = 45.0
"""Seconds after which it is taken for dead."""
TEACHERS, TRAINED = "teachers", "trained"
"""Folders beside the sweeps: of trained teachers, of single trainings."""
RESERVED = (TEACHERS, TRAINED, "mlartifacts")
"""Names of a runs folder that no sweep can have."""

PLACES = placements(SweepConfig)
"""Keys that say where a sweep's files are and how it is run, not what comes out: `resume --set` may change them."""

_FIRST_WITHOUT_PLACES = 3  # the ledger version whose digest leaves out where files are
_STATES = {
    "time_budget": "out of time",
    "gpu_hours": "out of GPU hours",
    "cpu_hours": "out of CPU hours",
    "trouble": "stopped by trouble",
    "": "killed",
}


def check_priority(priority: float) -> None:
    """See that it is one.

    Raises:
        ConfigError: it is no positive number.
    """
    if not (priority > 0 and math.isfinite(priority)):
        raise ConfigError("--priority", [Problem(key=f"{priority:g}", rule="must be a positive number")])


@dataclass(frozen=True)
class Workspace:
    """Where sweeps lie and run: the runs folder, MLflow, and the Ray cluster to use, if not a private one."""

    runs: Path
    """The folder; of runs in a store this machine's copy."""
    mlflow_uri: str
    """Empty for a sweep that is not to be in MLflow."""
    address: str | None = None
    priority: float = 1.0
    """Among the sweeps on that cluster."""
    remote: "Remote | None" = None
    """The store that the runs lie in, if they do."""

    @classmethod
    def at(
        cls,
        runs_dir: str | Path | None = None,
        mlflow_uri: str | None = None,
        address: str | None = None,
        priority: float = 1.0,
    ) -> "Workspace":
        """The workspace of these arguments; what is None is as the environment says.

        Args:
            runs_dir: where sweeps, teachers and mlflow.db lie, a folder or the URI of a store (`s3://BUCKET/PREFIX`); by
                default `TUNE_TOPKD_RUNS_DIR`, or `runs`.
            mlflow_uri: MLflow's; by default `MLFLOW_TRACKING_URI`, or SQLite in the runs folder. Empty for no MLflow.
            address: a running Ray cluster; by default `RAY_ADDRESS`. `local`, and none at all, is a private one.
            priority: above 0, among the sweeps on that cluster: with 3 a sweep gets three times what one with 1 gets.

        Raises:
            ConfigError: the runs cannot lie at such a URI, the priority is no positive number, or MLflow keeps no runs at
                such a URI.
            ResourceError: Ray cannot be at such an address.
        """
        from tune_topkd.sweep.preflight import check_mlflow_uri
        from tune_topkd.tracking import sqlite_uri

        folder = runs_dir if runs_dir is not None else os.environ.get(RUNS_DIR_VARIABLE) or DEFAULT_RUNS
        remote = _remote(str(folder))
        runs = Path(folder).expanduser().absolute() if remote is None else remote.runs
        uri = mlflow_uri
        if uri is None:
            uri = os.environ.get(MLFLOW_VARIABLE) or sqlite_uri(runs / "mlflow.db")
        if uri:
            check_mlflow_uri(uri)
        check_priority(priority)
        address = os.environ.get(RAY_VARIABLE) if address is None else address
        if address in (None, "", PRIVATE):
            return cls(runs, uri, remote=remote)
        from tune_topkd.execution import check_address

        check_address(address)
        return cls(runs, uri, address, priority, remote)

    @property
    def place(self) -> str:
        """Where the runs lie, as `--runs-dir` has it."""
        return str(self.runs) if self.remote is None else self.remote.uri

    def mirror(self, sweep: str) -> "Mirror | None":
        """Of a sweep in a store: its ledger there, for the process that is to drive it.

        Raises:
            LedgerError: only this machine's copy has the sweep.
            StoreError: the store cannot be read.
        """
        return None if self.remote is None else self.remote.mirror(sweep)

    def folder(self, sweep: str) -> Path:
        """A sweep's folder."""
        return self.runs / sweep

    @property
    def teachers(self) -> Path:
        """Where trained teachers are kept."""
        return self.runs / TEACHERS

    def sweeps(self) -> list[str]:
        """The names of the sweeps that have begun, oldest first; those that cannot be looked into are among them.

        Raises:
            StoreError: the store that they lie in cannot be read.
        """
        if self.remote is not None:
            return sorted(self.remote.sweeps(), key=lambda name: (_begun_at(self.folder(name)), name))
        try:
            names = [path.name for path in self.runs.iterdir() if SWEEP_NAME.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        return sorted(filter(self._may_have_begun, names), key=lambda name: (self._changed_at(name), name))

    def _may_have_begun(self, sweep: str) -> bool:
        try:
            return self.has_begun(sweep)
        except OSError:
            return True

    def _changed_at(self, sweep: str) -> float:
        try:
            return (self.folder(sweep) / LEDGER_FILE).stat().st_mtime
        except OSError:
            return 0.0

    def has_begun(self, sweep: str) -> bool:
        """Whether the sweep's ledger has a line; a kill may have come between the file and its first one.

        Raises:
            StoreError: the store that it lies in cannot be read.
        """
        if self.remote is not None:
            return self.remote.pull(sweep)
        try:
            with open(self.folder(sweep) / LEDGER_FILE, "rb") as ledger:
                return ledger.readline().endswith(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return False

    def existing(self, sweep: str) -> Path:
        """The folder of a sweep that has begun.

        Raises:
            ConfigError: there is none of this name.
        """
        folder = self.folder(sweep)
        if not self.has_begun(sweep):
            known = self.sweeps()
            rule = f"no such sweep in {self.place}; " + (unknown_choice(sweep, known) if known else "there are none")
            raise ConfigError("SWEEP", [Problem(key=sweep, rule=rule)])
        return folder

    def check_free(self, name: str) -> None:
        """Check that a new sweep can have this name.

        Raises:
            ConfigError: it is no name for a folder, or taken.
        """
        if not SWEEP_NAME.fullmatch(name) or name in RESERVED:
            rule = (
                "must be letters, digits, '.', '_' and '-', begin with a letter or digit, and must not be a reserved "
                f"folder name ({', '.join(RESERVED)})"
            )
            raise ConfigError("--name", [Problem(key=name, rule=rule)])
        if not self.has_begun(name):
            return
        folder = self.folder(name)
        state = read_state(folder / LEDGER_FILE)
        what = condition(folder, state)
        if may_begin_again(state) and what != "running":
            return
        rule = (
            f"{folder} holds a sweep of this name ({what}, {len(state.arm('search'))} of {state.target} "
            f"trials); `resume {name}` goes on with it, --name gives the new one another name"
        )
        raise ConfigError("--name", [Problem(key=name, rule=rule)])


def _remote(place: str) -> "Remote | None":
    """The store that a place of runs is the URI of; None for a folder.

    Raises:
        ConfigError: it is the URI of none.
    """
    if not is_uri(place):
        if re.match(r"[a-z][a-z0-9+]+:/", place):
            rule = "is no folder's name; a URI is given as a text, not as a `Path`, which drops a slash"
            raise ConfigError("--runs-dir", [Problem(key=place, rule=rule)])
        return None
    from tune_topkd.sweep.remote import Remote

    with naming_runs():
        return Remote.at(place)


@contextlib.contextmanager
def naming_runs() -> Iterator[None]:
    """Make of a URI that names no store an error of the option that names the runs.

    Raises:
        ConfigError: it is the URI of none.
    """
    try:
        yield
    except StoreNameError as error:
        raise ConfigError("--runs-dir", [Problem(key="", rule=str(error))]) from error


def _begun_at(folder: Path) -> float:
    try:
        return read_state(folder / LEDGER_FILE).started_at
    except LedgerError:
        return 0.0


def may_begin_again(state: SweepState) -> bool:
    """Whether nothing is lost if a sweep is begun anew: it ended before its teacher was there."""
    return not state.is_prepared


def condition(folder: Path, state: SweepState) -> str:
    """`running`, or how it ended: `finished`, `failed`, `interrupted`, `out of time`, `out of GPU hours`,
    `out of CPU hours`, `stopped by trouble`, `killed`."""
    if is_under_way(folder):
        return "running"
    return stopped_as(state)


def is_under_way(folder: Path) -> bool:
    """Whether a process drives the sweep: one of this machine, or, of runs in a store, one that was heard of lately."""
    return is_driven(folder / LEDGER_FILE) or driver_elsewhere(folder) is not None


def driver_elsewhere(folder: Path) -> str | None:
    """Who has lately said that it drives a sweep whose runs are in a store, as this machine's copy has it."""
    try:
        said = json.loads((folder / DRIVER_FILE).read_bytes())
        silence = time.time() - said["time"]
        who = f"process {said['pid']} on {said['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # there is no such file, or nobody of ours has written it
        return None
    return f"{who}, heard of {max(silence, 0):.0f} s ago" if silence < LONGEST_SILENCE else None


def stopped_as(state: SweepState) -> str:
    """How a sweep that nobody drives ended, in the words of `condition`."""
    return _STATES.get(state.stop_reason, state.stop_reason)


def config_digest(content: Mapping[str, Any], version: int = LEDGER_VERSION) -> str:
    """Of a frozen config as its file has it: of all that a sweep depends on.

    What the file does not name does not count, so a later version may have keys that this one has not.
    """
    content = without(content, ["description"])
    if version >= _FIRST_WITHOUT_PLACES:
        is_given = {key: value_at(content, key) is not None for key, place in PLACES.items() if place.has_content}
        content = without(content, PLACES)
        for key, is_there in is_given.items():
            section, _, name = key.partition(".")
            if isinstance(content.get(section), dict):
                content[section] = content[section] | {f"has_{name}": is_there}
    return digest(content)


def frozen_config(folder: Path, state: SweepState) -> SweepConfig:
    """The frozen config, which must still be the one that the sweep was begun with, with its files where they are now.

    Raises:
        ConfigError: it has been changed by hand, or is gone.
    """
    path = folder / CONFIG_FILE
    content = read_yaml(path)
    begun, prepared = state.header.digest, state.prepared
    known = (begun, prepared and prepared.digest)  # a kill may have come before the second was written
    if config_digest(content, state.header.version) not in known:
        rule = "has been changed since the sweep began; a changed space is a new sweep: `run` it under another name"
        raise ConfigError(str(path), [Problem(key="", rule=rule)])
    for key, value in state.places.items():
        section, _, name = key.partition(".")
        content[section][name] = value
    config = config_from(content, str(path))
    return config if prepared is None or prepared.share is None else with_share(config, prepared.share)


def with_share(config: SweepConfig, share: Share) -> SweepConfig:
    """The config with each trial's share of a node."""
    shares = {"cpus_per_trial": share.cpus, "gpus_per_trial": share.gpus}
    return config.model_copy(update={"sweep": config.sweep.model_copy(update=shares)})


def moved_places(overrides: Sequence[Override]) -> dict[str, Any]:
    """Where a sweep's files are now, and how it is run, by key; paths become absolute.

    Raises:
        ConfigError: a key is none of `PLACES`.
    """
    for override in overrides:
        if override.key not in PLACES:
            rule = (
                f"a sweep that has begun keeps its config; only what changes no result may differ: {', '.join(PLACES)}"
            )
            raise ConfigError("--set", [Problem(key=override.key, rule=rule)])
    files = {o.key for o in overrides if isinstance(o.value, str)}
    return {o.key: str(Path(str(o.value)).expanduser().absolute()) if o.key in files else o.value for o in overrides}
