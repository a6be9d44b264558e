"""The trials of benchmarks that train nothing: a formula, also for plain Ray Tune. The workers import it."""

import math
import os
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from tune_topkd.config import SweepConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import config_from

if TYPE_CHECKING:  # the workers need no more than the formula
    from tune_topkd.execution.simulated import SimulatedTrial

EPOCHS = 9
OBJECTIVE = "val_top1"
MORE_AXES = {
    "scale_top": {"low": 1.0, "high": 4.0},
    "scale_last": {"low": 1.0, "high": "scale_top"},
    "scale_gt": {"low": "scale_top", "high": 6.0},
    "shift": {"low": 0.0, "high": 1.0},
    "normalize": [True, False],
    "temperature": {"low": 0.02, "high": 5.0, "log": True},
}
"""Ranges that the formula does not look at, with which a space is as large as a real one."""


Report = Callable[[int, Mapping[str, float], Callable[[Path], None]], None]
Train = Callable[[TrialConfig, Report, Any], None]


def train(config: TrialConfig, report: Report, resume_from: Any) -> None:
    """The trial as the project's train function."""
    for epoch in range(1, EPOCHS + 1):
        report(epoch, metrics(config.loss["k"], config.recipe.lr, epoch), _save)


def trainable(config: Mapping[str, Any]) -> None:
    """The trial as Ray Tune's function."""
    from ray import tune  # only a worker needs it

    for epoch in range(1, EPOCHS + 1):
        tune.report(metrics(config["k"], config["lr"], epoch))


class Paced:
    """A trial as the project's train function that reports every so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, config: TrialConfig, report: Report, resume_from: Any) -> None:
        """Sleep and report, as many times as the trial has epochs."""
        for epoch in range(1, config.recipe.epochs + 1):
            time.sleep(self.seconds)
            report(epoch, metrics(config.loss.get("k", 4), config.recipe.lr, epoch), _save)


class Together:
    """Trials that begin to report when all of them are there, at rates that rise, and never end by themselves."""

    def __init__(self, folder: Path, count: int, rates: Sequence[float], seconds: float) -> None:
        self.folder, self.count, self.rates, self.seconds = folder, count, rates, seconds
        self._begins: float | None = None
        self._looked = 0.0

    def begins(self) -> float | None:
        """When the first report is due, in seconds since 1970; None as long as some are not there.

        It is asked for at every report, so it looks at the folder every half second only.
        """
        if self._begins is None and time.monotonic() > self._looked + 0.5:
            there = [entry.stat().st_mtime for entry in os.scandir(self.folder)]
            self._begins = max(there) + 2.0 if len(there) >= self.count else None
            self._looked = time.monotonic()
        return self._begins

    def __call__(self, config: TrialConfig, report: Report, resume_from: Any) -> None:
        """Report so often a second, for so many seconds at each rate; an infinite rate waits for nothing but the answer."""
        here, epoch = Path(self.folder, str(os.getpid())), 0
        here.touch()
        while (begins := self.begins()) is None:
            time.sleep(0.5)
        for number, rate in enumerate(self.rates):
            due = begins + number * self.seconds + (os.getpid() % 97) / 97 / rate
            end = begins + (number + 1) * self.seconds
            while max(due, time.time()) < end:
                time.sleep(max(due - time.time(), 0.0))
                due, epoch = due + 1 / rate, epoch + 1
                report(epoch, metrics(4, config.recipe.lr, epoch), _save)
        while True:
            time.sleep(60)


def trainable_of_a_second(config: Mapping[str, Any]) -> None:
    """A trial of one report as Ray Tune's function."""
    from ray import tune  # only a worker needs it

    time.sleep(1.0)
    tune.report(metrics(config["k"], config["lr"], 1))


def simulated(trial: "SimulatedTrial", epoch: int) -> dict[str, float]:
    """The trial's epoch as `simulate` asks for it."""
    return metrics(trial.config.loss["k"], trial.config.recipe.lr, epoch)


def metrics(k: Any, lr: float, epoch: int) -> dict[str, float]:
    """Accuracy rises with the epoch to a top that is best at k = 4 and lr = 0.1."""
    accuracy = 90 - 2 * abs(k - 4) - 10 * abs(math.log10(lr) + 1) - 20 / epoch
    return {OBJECTIVE: accuracy, "train_loss": 1 / epoch, "epoch_seconds": 0.0}


def sweep_config(trials: int, more: Mapping[str, Any], *, epochs: int = EPOCHS, **sweep: Any) -> SweepConfig:
    """A sweep of such trials: over k, lr and what `more` names, with these settings."""
    config = config_from(
        {
            "data": {"name": "digits"},
            "teacher": {"name": "digits_cnn", "recipe": {"epochs": 1}},
            "student": "digits_cnn_tiny",
            "recipe": {"epochs": epochs},
            "space": {"k": {"low": 1, "high": 10}, "lr": {"low": 0.01, "high": 1.0, "log": True}, **more},
            "sweep": {"trials": trials, **sweep},
            "baselines": None,
        },
        "benchmark",
    )
    assert isinstance(config, SweepConfig)
    return config


def _save(folder: Path) -> None:
    (folder / "state.txt").write_text("a checkpoint\n")
