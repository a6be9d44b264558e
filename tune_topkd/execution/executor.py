"""Where a sweep's trials run: the `Executor` protocol, and Ray behind it."""

import contextlib
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tune_topkd.config import NO_FILES
from tune_topkd.config import SharedFiles
from tune_topkd.config import SweepConfig
from tune_topkd.config import TrialConfig
from tune_topkd.execution.bridge import Interruption
from tune_topkd.execution.cluster import Cluster
from tune_topkd.execution.packing import Packed
from tune_topkd.execution.packing import Probe
from tune_topkd.execution.packing import pack
from tune_topkd.execution.ray_tune import run_sweep
from tune_topkd.execution.remote import RemoteSweep
from tune_topkd.execution.worker import TrainFunction
from tune_topkd.machine import NodeGpus
from tune_topkd.search import Search


@dataclass(frozen=True)
class Work:
    """What an executor is given besides the search."""

    folder: Path
    """The sweep's, absolute, on storage that all nodes see; with `remote` the driver's alone."""
    train: TrainFunction
    """Runs a trial; must be importable where trials run."""
    files: SharedFiles
    """What all trials share, but for those of the arm `test`."""
    hashes: Mapping[str, str]
    """SHA-256 by path of files that must still be what they were."""
    note: Callable[[str], None]
    """Is told what should be known and need not be acted on at once."""
    give_up: Callable[[str], None]
    """Is told why the process cannot go on, and ends it."""
    test_files: SharedFiles = NO_FILES
    """What the trials of the arm `test` share."""
    remote: RemoteSweep | None = None
    """Where the sweep lies, if that is a store."""
    on_gpus: Callable[[Sequence[NodeGpus]], None] | None = None
    """Is told every few seconds, on another thread than the sweep's, what the GPUs are doing of a cluster's nodes on which
    trials are at work; of a machine that the sweep has for itself the machine is to be asked."""


class Executor(Protocol):
    """Runs the trials that a search proposes, and tells it what becomes of them."""

    def measure(self, config: SweepConfig, trial: TrialConfig, probe: Probe) -> list[Packed]:
        """Try numbers of such trials beside one another; the best comes first.

        Raises:
            ResourceError: not even one can be run.
        """

    def run(self, search: Search, work: Work) -> str:
        """Run what is left of a sweep and return the reason of the ledger's `stop` line.

        Raises:
            ResourceError: a trial can never be placed.
            SweepTroubleError: something outside the sweep keeps it from going on; it can be resumed.
        """


class RayExecutor:
    """A private Ray on this machine, or the one at an address."""

    def __init__(self, interruption: Interruption, address: str | None = None, priority: float = 1.0) -> None:
        self._interruption = interruption
        self._address = address
        self._priority = None if address is None else priority  # nobody else is on a private one

    def measure(self, config: SweepConfig, trial: TrialConfig, probe: Probe) -> list[Packed]:
        """Measure on the largest node."""
        with contextlib.ExitStack() as stack:
            with self._interruption.deferred():
                stack.enter_context(Cluster.attached(self._address))
            self._interruption.check()
            return pack(config, trial, probe)

    def run(self, search: Search, work: Work) -> str:
        """Run the trials through Ray Tune."""
        with self._interruption.deferred(), Cluster.attached(self._address, work.give_up) as cluster:
            return run_sweep(
                search,
                cluster=cluster,
                folder=work.folder,
                train=work.train,
                files=work.files,
                test_files=work.test_files,
                hashes=work.hashes,
                interruption=self._interruption,
                note=work.note,
                priority=self._priority,
                remote=work.remote,
                on_gpus=None if self._address is None else work.on_gpus,
            )
