"""One training without a sweep: its teacher, its metrics epoch by epoch, its weights."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tune_topkd.cli import running
from tune_topkd.config import NO_FILES
from tune_topkd.config import PairConfig
from tune_topkd.config import dump_config

FOLDER = "trained"
"""Below the runs folder: where single trainings lie."""
CONFIG_NAME, METRICS_NAME, WEIGHTS_NAME = "config.yaml", "metrics.jsonl", "student.pt"

_SELECTED = {
    "validation": "nothing: the last epoch, measured on the validation split",
    "best_test_epoch": "the best epoch on the TEST set: only comparable with published rows selected so",
}


@dataclass
class _Log:
    """Keeps every epoch's metrics: a line on the screen and one in the file, flushed, then all of them for MLflow."""

    path: Path
    console: Console
    epochs: int

    def __post_init__(self) -> None:
        self.history: list[tuple[int, float, dict[str, float]]] = []

    def __call__(self, epoch: int, metrics: Mapping[str, float], save: object, /) -> None:
        self.history.append((epoch, time.time(), dict(metrics)))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, **metrics}) + "\n")
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "top" in name or "loss" in name)
        self.console.print(f"epoch {epoch}/{self.epochs}: {shown}", highlight=False, soft_wrap=True)


def train_one(config: PairConfig, name: str, seed: int, place: running.Place, console: Console) -> dict[str, Any]:
    """Train the student of a config once.

    Returns:
        What there is to say of it, as JSON can hold it: name, folder, seed, epochs, metrics of the last epoch, and by
        what the result was selected.

    Raises:
        ConfigError: the data or the teacher cannot be had.
    """
    from tune_topkd import tracking
    from tune_topkd.models import save_weights
    from tune_topkd.train import train

    running.ready_data(config)
    taught = running.taught_by(config, place, console, seed) if config.method != "ce" else NO_FILES
    trial = running.trial_with(config, taught, seed)
    folder = _fresh(place.runs / FOLDER, f"{name}-seed{seed}")
    (folder / CONFIG_NAME).write_text(dump_config(trial), encoding="utf-8")
    log = _Log(folder / METRICS_NAME, console, config.recipe.epochs)
    status, started = "KILLED", time.time()
    try:
        result = train(trial, log)
        status = "FAILED" if result.diverged else "FINISHED"
        save_weights(result.model, folder / WEIGHTS_NAME)
    finally:
        trouble = tracking.log_training(
            place.mlflow_uri,
            folder.name,
            params=_flat(trial.model_dump(mode="json")),
            tags={"training": folder.name, "selection": config.data.selection},
            history=log.history,
            started=started,
            status=status,
        )
        if trouble:
            console.print(f"note: MLflow has not got this training ({trouble})", style="yellow", soft_wrap=True)
    return {
        "name": folder.name,
        "folder": str(folder),
        "seed": seed,
        "epochs": result.epoch,
        "diverged": result.diverged,
        "selected_by": _SELECTED[config.data.selection],
        "metrics": {k: v for k, v in result.metrics.items() if v == v},  # JSON has no NaN
    }


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
