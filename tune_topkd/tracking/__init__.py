"""MLflow: one parent run per sweep, one nested child run per trial, written beside the sweep from its ledger.

The tracker is a thread that follows the ledger file. What it writes is a function of the ledger, and writing it twice
changes nothing: runs are found again by their tags, and metrics carry the ledger's times. So a tracking server that is
slow, down or gone costs the sweep nothing, and what was missed is caught up the next time the ledger is followed. The
same function tells what MLflow should have, which `disagreements` compares with what it has.

In MLflow (experiment `tune_topkd`, or `MLFLOW_EXPERIMENT_NAME`):

- the parent: tags `kind` (`sweep`), `sweep`, `sweep_id`, `state`; params of the sweep; metrics of what is best so far,
  `best_val_top1`, `best_trial`, `gain_over_<method>`, and `baseline_<method>_val_top1` with its parameters; of its trials by
  state and their cost; their step the line of the ledger, so that what MLflow shows is always what the ledger says;
  `grid_<method>_…` of each run of a baseline, the step its number; its config, answer and report as artifacts;
- a child for each training: tags `kind` (`trial`, `baseline`, `finalist`, `test`), `sweep`, `sweep_id`, `trial_number` (or
  `baseline_number`, `repeat_number`, `test_number`), `trial_status` (completed | pruned | failed; running and interrupted
  while it has no end), `reason`; its parameters; its metrics by epoch, none of them named like a parameter;
- the dataset of each of them, its digest that of its content.

What MLflow or a database cannot hold is changed in the same way each time, and said: a lone surrogate and NUL are escaped,
long texts cut, forbidden signs in names replaced; metrics that are not finite are left out. What a store refuses all the
same is left out and said, and does not hold up the rest.

The student of a confirmed sweep is a version of a registered model, `topkd.<dataset>.<teacher>.<student>`, its files among
the artifacts of the sweep's run (`Registry`).

A run that was interrupted and goes on keeps the time of the interruption as its end until it has another one: MLflow
takes no end back.
"""

from tune_topkd.tracking.comparing import disagreements
from tune_topkd.tracking.documents import Author
from tune_topkd.tracking.documents import Documents
from tune_topkd.tracking.masking import masked
from tune_topkd.tracking.projection import SWEEP_NOTE
from tune_topkd.tracking.registry import CHAMPION
from tune_topkd.tracking.registry import PREVIOUS
from tune_topkd.tracking.registry import Registry
from tune_topkd.tracking.registry import Version
from tune_topkd.tracking.registry import model_name
from tune_topkd.tracking.registry import write_model
from tune_topkd.tracking.sending import log_training
from tune_topkd.tracking.store import EXPERIMENT
from tune_topkd.tracking.store import TrackingError
from tune_topkd.tracking.store import check_uri
from tune_topkd.tracking.store import sqlite_file
from tune_topkd.tracking.store import sqlite_uri
from tune_topkd.tracking.store import ui_command
from tune_topkd.tracking.store import uri_problem
from tune_topkd.tracking.writer import MlflowTracker
from tune_topkd.tracking.writer import catch_up

__all__ = [
    "CHAMPION",
    "EXPERIMENT",
    "PREVIOUS",
    "SWEEP_NOTE",
    "Author",
    "Documents",
    "MlflowTracker",
    "Registry",
    "TrackingError",
    "Version",
    "catch_up",
    "check_uri",
    "disagreements",
    "log_training",
    "masked",
    "model_name",
    "sqlite_file",
    "sqlite_uri",
    "ui_command",
    "uri_problem",
    "write_model",
]
