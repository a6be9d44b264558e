"""One training without a sweep: its teacher, its metrics epoch by epoch, its weights."""

import json
import math
import tempfile
import time
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_topkd.config import NO_FILES
from tune_topkd.config import PairConfig
from tune_topkd.config import dump_config
from tune_topkd.storage import rename
from tune_topkd.storage import write_atomically
from tune_topkd.storage import write_text
from tune_topkd.sweep import prepare
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.workspace import TRAINED
from tune_topkd.sweep.workspace import Workspace

CONFIG_NAME, METRICS_NAME, RESULT_NAME = "config.yaml", "metrics.jsonl", "result.json"
WEIGHTS_NAME = "student.pt"
"""The weights of the last epoch, where that is what the result says."""
BEST_NAME, LAST_NAME = "student-best.pt", "student-last.pt"
"""Instead, where the result is the best epoch's by the test set: those of that epoch, and those of the last one."""
PARTIAL = ".partial"
"""Between name and ending while the training goes on, or where it was killed: `student-best.partial.pt`."""

_SELECTED = {
    "validation": "nothing was selected: it is the last epoch, measured on the validation split",
    "test_at_end": "nothing was selected: it is the last epoch, measured on the TEST set, once",
    "all_training": "nothing was selected: it is the last epoch, measured on validation images that it has LEARNT from",
    "best_test_epoch": "the best epoch on the TEST set: only comparable with published rows selected so",
}


@dataclass
class _Log:
    """Keeps every epoch's metrics: a line on the screen and one in the file, flushed, then all of them for MLflow.

    And the weights: of the newest epoch, and, where the result is the best epoch's, of that one.
    """

    folder: Path
    watchers: Watchers
    epochs: int
    is_best_kept: bool

    def __post_init__(self) -> None:
        self.history: list[tuple[int, float, dict[str, float]]] = []
        self.kept: dict[str, tuple[int, dict[str, float]]] = {}

    def __call__(self, epoch: int, metrics: Mapping[str, float], save: Callable[[Path], None], /) -> None:
        self.history.append((epoch, time.time(), dict(metrics)))
        with (self.folder / METRICS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, **metrics}) + "\n")
        self._keep(epoch, metrics, save)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "top" in name or "loss" in name)
        self.watchers.info(f"epoch {epoch}/{self.epochs}: {shown}")

    def _keep(self, epoch: int, metrics: Mapping[str, float], save: Callable[[Path], None]) -> None:
        import torch

        from tune_topkd.models import WEIGHTS_KEY
        from tune_topkd.models import read_checkpoint
        from tune_topkd.train import CHECKPOINT_NAME
        from tune_topkd.train import TEST_TOP1

        names = [LAST_NAME if self.is_best_kept else WEIGHTS_NAME]
        if self.is_best_kept:
            _, best = self.kept.get(BEST_NAME, (0, {TEST_TOP1: -1.0}))
            names += [BEST_NAME] if metrics[TEST_TOP1] > best[TEST_TOP1] else []
        with tempfile.TemporaryDirectory(prefix=".", dir=self.folder) as scratch:
            save(Path(scratch))
            weights = {WEIGHTS_KEY: read_checkpoint(Path(scratch) / CHECKPOINT_NAME)[WEIGHTS_KEY]}
            for name in names:
                write_atomically(self.folder / _partial(name), lambda file: torch.save(weights, file))
                self.kept[name] = (epoch, dict(metrics))

    def finish(self) -> dict[str, dict[str, float]]:
        """Give the files of weights their names; the epoch of each, and how it did."""
        for name in self.kept:
            rename(self.folder / _partial(name), self.folder / name)
        return {
            name: {"epoch": epoch, **{key: value for key, value in metrics.items() if key in ("val_top1", "test_top1")}}
            for name, (epoch, metrics) in self.kept.items()
        }


def _partial(name: str) -> str:
    return f"{Path(name).stem}{PARTIAL}{Path(name).suffix}"


def train_one(config: PairConfig, name: str, seed: int, workspace: Workspace, watchers: Watchers) -> dict[str, Any]:
    """Train the student of a config once.

    Returns:
        What there is to say of it, as JSON can hold it: name, folder, seed, epochs, metrics of the last epoch, by what
        the result was selected, and of each file of weights its epoch and accuracy. The folder has it as a file.

    Raises:
        ConfigError: the data or the teacher cannot be had.
    """
    from tune_topkd import tracking
    from tune_topkd.train import train

    prepare.ready_data(config)
    files = NO_FILES
    if config.method != "ce":
        teacher = prepare.ready_teacher(config, workspace, watchers)
        files = prepare.teacher_files(teacher, config, workspace, watchers, seed, once=True)
    trial = prepare.trial_with(config, files, seed)
    folder = _fresh(workspace.runs / TRAINED, f"{name}-seed{seed}")
    (folder / CONFIG_NAME).write_text(dump_config(trial), encoding="utf-8")
    log = _Log(folder, watchers, config.recipe.epochs, config.data.selection == "best_test_epoch")
    status, started = "KILLED", time.time()
    try:
        result = train(trial, log)
        status = "FAILED" if result.diverged else "FINISHED"
        weights = log.finish()
    finally:
        trouble = tracking.log_training(
            workspace.mlflow_uri,
            folder.name,
            params=_flat(trial.model_dump(mode="json")),
            tags={"training": folder.name, "selection": config.data.selection},
            history=log.history,
            started=started,
            status=status,
        )
        if trouble:
            watchers.note(f"MLflow has not got this training ({trouble})")
    said = {
        "name": folder.name,
        "folder": str(folder),
        "seed": seed,
        "epochs": result.epoch,
        "diverged": result.diverged,
        "selected_by": _SELECTED[config.data.selection],
        "metrics": {k: v for k, v in result.metrics.items() if math.isfinite(v)},  # JSON has no NaN
        "weights": weights,
    }
    write_text(folder / RESULT_NAME, json.dumps(said, indent=2) + "\n")
    return said


def _fresh(root: Path, name: str) -> Path:
    """A folder of this name that was not there before, or of the name with the next free number."""
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
