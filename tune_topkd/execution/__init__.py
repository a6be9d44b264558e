"""Where trials run: all of Ray.

An `Executor` runs the trials of a search: `RayExecutor` on Ray, `SimulatedExecutor` as formulas. Inside: `worker` runs one
trial where Ray put it, `checkpoints` keeps what it can go on from, `remote` is a sweep that lies in a store, `cluster` is
the Ray there is, `nodes` which of its nodes trials may go to, `gpus` what their GPUs are doing, `packing` measures how many
trials to put there, `ray_tune` joins them to the search through Ray Tune.
"""

from tune_topkd.execution.cluster import Cluster
from tune_topkd.execution.cluster import ResourceError
from tune_topkd.execution.cluster import check_address
from tune_topkd.execution.executor import Executor
from tune_topkd.execution.executor import RayExecutor
from tune_topkd.execution.executor import Work
from tune_topkd.execution.packing import Packed
from tune_topkd.execution.packing import pack
from tune_topkd.execution.ray_tune import SweepTroubleError
from tune_topkd.execution.ray_tune import run_sweep
from tune_topkd.execution.remote import RemoteSweep
from tune_topkd.execution.simulated import SimulatedExecutor
from tune_topkd.execution.worker import TrainFunction

__all__ = [
    "Cluster",
    "Executor",
    "Packed",
    "RayExecutor",
    "RemoteSweep",
    "ResourceError",
    "SimulatedExecutor",
    "SweepTroubleError",
    "TrainFunction",
    "Work",
    "check_address",
    "pack",
    "run_sweep",
]
