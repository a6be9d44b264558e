"""Trials that are formulas: a sweep of them is exact, fast and known in advance. Importable by Ray's workers."""

import math
import os
import signal
import time

from tune_topkd.config import SweepConfig
from tune_topkd.config import config_from

EPOCHS = 9
STATE = "state.txt"


def sweep_config(**sections):
    """A small sweep config whose space has every kind of range."""
    raw = {
        "data": {"name": "digits"},
        "teacher": {"name": "digits_cnn", "recipe": {"epochs": 1}},
        "student": "digits_cnn_tiny",
        "recipe": {"epochs": EPOCHS, "lr": 0.1},
        "space": {
            "k": {"low": 1, "high": 20, "log": True},
            "scale_top": {"low": 1.0, "high": 4.0},
            "scale_last": {"low": 1.0, "high": "scale_top"},
            "scale_gt": {"low": "scale_top", "high": 6.0},
            "normalize": [True, False],
            "ce_weight": {"low": 0.1, "high": 10.0, "log": True},
            "tdl_weight": {"low": 0.1, "high": 10.0, "log": True},
            "lr": {"low": 0.01, "high": 1.0, "log": True},
        },
        "relative": {"sum": 2.0, "of": ["ce_weight", "tdl_weight"]},
        "sweep": {"trials": 12, "asha": {"grace_epochs": 1, "reduction_factor": 3}, "max_concurrent": 1},
        "baselines": {"trials": 2},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    config = config_from(raw, "test")
    assert isinstance(config, SweepConfig)
    return config


def value(config, epoch):
    """Rises with the epoch to a top that is best at k = 4 and lr = 0.1."""
    k, lr = config.loss.get("k", 1), config.recipe.lr
    return 90 - 2 * abs(k - 4) - 10 * abs(math.log10(lr) + 1) - 20 / epoch


def first_epoch(resume_from):
    return 1 if resume_from is None else 1 + int((resume_from / STATE).read_text())


def epochs(config, report, resume_from, metric=value):
    for epoch in range(first_epoch(resume_from), config.recipe.epochs + 1):
        save = lambda folder, epoch=epoch: (folder / STATE).write_text(str(epoch))  # noqa: E731
        report(epoch, {"val_top1": metric(config, epoch), "train_loss": 1 / epoch, "epoch_seconds": 0.1}, save)


def rising(config, report, resume_from=None):
    """A trial that does as it should."""
    epochs(config, report, resume_from)


def slow(config, report, resume_from=None):
    """A trial that takes its time."""

    def after_a_while(config, epoch):
        time.sleep(0.05)
        return value(config, epoch)

    epochs(config, report, resume_from, after_a_while)


def nan_for_large_k(config, report, resume_from=None):
    """NaN from the second epoch on where k is above 10."""

    def metric(config, epoch):
        return math.nan if config.loss.get("k", 1) > 10 and epoch >= 2 else value(config, epoch)

    epochs(config, report, resume_from, metric)


def raising(config, report, resume_from=None):
    """The same mistake in every trial."""
    report(1, {"val_top1": 1.0}, lambda folder: None)
    raise RuntimeError("the dataset\nis not there")


def giving_up(config, report, resume_from=None):
    """Returns after one epoch."""
    report(1, {"val_top1": 1.0}, lambda folder: None)


def objective_missing(config, report, resume_from=None):
    """Reports another metric."""
    report(1, {"accuracy": 1.0}, lambda folder: None)


def dying_once(config, report, resume_from=None):
    """Its worker is killed after the third epoch of the first attempt."""

    def metric(config, epoch):
        if resume_from is None and epoch == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return value(config, epoch)

    epochs(config, report, resume_from, metric)


def dying_always(config, report, resume_from=None):
    """Its worker is killed in every attempt."""
    os.kill(os.getpid(), signal.SIGKILL)


def threads_and_host(config, report, resume_from=None):
    """Reports how many threads it was given."""
    epochs(config, report, resume_from, lambda config, epoch: float(os.environ["OMP_NUM_THREADS"]))
