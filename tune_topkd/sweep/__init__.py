"""All of Ray and Optuna: proposing, scheduling, stopping and resuming the trials of a sweep.

`run_sweep` is the whole of it for a caller. Inside: `search` decides (Optuna's TPE, ASHA, the ledger; no Ray), `worker`
runs one trial where Ray put it, `cluster` is the Ray there is, `nodes` which of its nodes trials may go to, `packing`
measures how many to put there, `tuning` joins them through Ray Tune, `audit` takes every decision again.
"""

from tune_topkd.sweep.audit import audit_sweep
from tune_topkd.sweep.cluster import Cluster
from tune_topkd.sweep.cluster import ResourceError
from tune_topkd.sweep.cluster import check_address
from tune_topkd.sweep.packing import Packed
from tune_topkd.sweep.packing import pack
from tune_topkd.sweep.search import OBJECTIVE
from tune_topkd.sweep.search import Search
from tune_topkd.sweep.tuning import SweepTroubleError
from tune_topkd.sweep.tuning import run_sweep
from tune_topkd.sweep.worker import TrainFunction

__all__ = [
    "OBJECTIVE",
    "Cluster",
    "Packed",
    "ResourceError",
    "Search",
    "SweepTroubleError",
    "TrainFunction",
    "audit_sweep",
    "check_address",
    "pack",
    "run_sweep",
]
