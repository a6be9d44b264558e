"""MLflow: one parent run per sweep, one nested child run per trial, written beside the sweep from its ledger.

The tracker is a thread that follows the ledger file. What it writes is a function of the ledger, and writing it twice
changes nothing: runs are found again by their tags, and metrics carry the ledger's times. So a tracking server that is
slow, down or gone costs the sweep nothing, and what was missed is caught up the next time the ledger is followed. The
same function tells what MLflow should have, which `disagreements` compares with what it has.

In MLflow (experiment `tune_topkd`, or `MLFLOW_EXPERIMENT_NAME`):

- the parent: tags `sweep`, `sweep_id`, `state`; params of the sweep; metrics `best_val_top1` and
  `baseline_<method>_<metric>`, their step the trial's number;
- a child: tags `sweep`, `sweep_id`, `trial_number`, `trial_status` (completed | pruned | failed; running and interrupted
  while it has no end), `reason`; its parameters; its metrics by epoch.

A run that was interrupted and goes on keeps the time of the interruption as its end until it has another one: MLflow
takes no end back.
"""

from tune_topkd.tracking.comparing import disagreements
from tune_topkd.tracking.following import MlflowTracker
from tune_topkd.tracking.following import catch_up
from tune_topkd.tracking.masking import masked
from tune_topkd.tracking.sending import log_training
from tune_topkd.tracking.store import EXPERIMENT
from tune_topkd.tracking.store import TrackingError
from tune_topkd.tracking.store import check_uri

__all__ = [
    "EXPERIMENT",
    "MlflowTracker",
    "TrackingError",
    "catch_up",
    "check_uri",
    "disagreements",
    "log_training",
    "masked",
]
