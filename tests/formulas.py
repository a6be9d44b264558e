"""Trials that are formulas: a sweep of them is exact, fast and known in advance. Importable by Ray's workers."""

import ctypes
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from tune_topkd.config import SweepConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import config_from

EPOCHS = 9
STATE = "state.txt"
DEFAULTS = {
    "k": 5,
    "scale_top": 2.0,
    "scale_last": 1.0,
    "scale_gt": 3.0,
    "normalize": True,
    "ce_weight": 1.0,
    "tdl_weight": 1.0,
    "lr": 0.1,
}
"""A trial of `sweep_config`, to begin with."""


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
        "sweep": {
            "trials": 12,
            "startup_trials": 10,
            "asha": {"grace_epochs": 1, "reduction_factor": 3},
            "max_concurrent": 1,
        },
        "baselines": {"methods": ["ce", "kd"], "trials": 2},
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


def reading(config, report, resume_from=None):
    """A slow trial that needs the file `DATA`, as one of a dataset."""
    Path(os.environ["DATA"]).read_bytes()
    slow(config, report, resume_from)


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


def process(config, report, resume_from=None):
    """Takes its time and reports which process it ran in."""

    def pid(config, epoch):
        time.sleep(0.05)
        return float(os.getpid())

    epochs(config, report, resume_from, pid)


def at_third_epoch(happening):
    """A metric at whose third epoch something happens first."""

    def metric(config, epoch):
        if epoch == 3:
            happening(config)
        return value(config, epoch)

    return metric


def sleep_for_ever():
    while True:
        time.sleep(60)


def hanging(config, report, resume_from=None):
    """Says nothing any more after the second epoch."""
    epochs(config, report, resume_from, at_third_epoch(lambda config: sleep_for_ever()))


def hanging_in_c(config, report, resume_from=None):
    """The same, and no other thread of the process can run: the call holds the interpreter's lock."""
    epochs(config, report, resume_from, at_third_epoch(lambda config: ctypes.PyDLL(None).sleep(3600)))


def hanging_for_large_k(config, report, resume_from=None):
    """Hangs after the second epoch where k is above 10."""
    (hanging if config.loss.get("k", 1) > 10 else rising)(config, report, resume_from)


def frozen_for_large_k(config, report, resume_from=None):
    """Its worker is stopped, as by a debugger, after the second epoch where k is above 10."""

    def freeze(config):
        if config.loss.get("k", 1) > 10:
            os.kill(os.getpid(), signal.SIGSTOP)

    epochs(config, report, resume_from, at_third_epoch(freeze))


def frozen_at_once_for_large_k(config, report, resume_from=None):
    """Its worker is stopped before it has said anything where k is above 10."""
    if config.loss.get("k", 1) > 10:
        os.kill(os.getpid(), signal.SIGSTOP)
    rising(config, report, resume_from)


def cpus(config, epoch):
    """How many CPUs the trial was given."""
    return float(os.environ["OMP_NUM_THREADS"])


def needing_two_cpus(config, report, resume_from=None):
    """Reports its CPUs, and from the third epoch on runs out of memory with fewer than two."""

    def metric(config, epoch):
        if epoch >= 3 and cpus(config, epoch) < 2:
            raise MemoryError
        return cpus(config, epoch)

    epochs(config, report, resume_from, metric)


FATES = {
    4: rising,
    11: nan_for_large_k,
    12: giving_up,
    13: objective_missing,
    14: needing_two_cpus,
    15: dying_once,
    16: dying_always,
}
"""What becomes of a trial of `by_fate`, by its k."""


def by_fate(config, report, resume_from=None):
    """One of `FATES`."""
    FATES[config.loss["k"]](config, report, resume_from)


def out_of_memory_for_large_k(config, report, resume_from=None):
    """Runs out of memory where k is above 10, whatever it is given."""
    if config.loss.get("k", 1) > 10:
        raise MemoryError
    rising(config, report, resume_from)


def heavy(config, report, resume_from=None):
    """Its checkpoints are of the size of a small network."""
    for epoch in range(first_epoch(resume_from), config.recipe.epochs + 1):
        time.sleep(0.05)

        def save(folder, epoch=epoch):
            (folder / STATE).write_text(str(epoch))
            (folder / "weights").write_bytes(bytes(200_000))

        report(epoch, {"val_top1": value(config, epoch), "train_loss": 1 / epoch}, save)


def saving_slowly(config, report, resume_from=None):
    """One epoch of no time, whose checkpoint takes its time."""

    def save(folder):
        time.sleep(1.7)
        (folder / STATE).write_text("1")

    report(1, {"val_top1": 1.0}, save)


class Speed(NamedTuple):
    """What a probe gives."""

    images_per_second: float
    peak_bytes: int
    total_bytes: int


def probed(notes, node, rates, peak_bytes=1, ends=None):
    """A training for `probe`, which leaves a note of each run in the folder `notes`.

    Args:
        notes: a folder.
        node: what the node has, a `Share`.
        rates: images per second of each training, by how many run at once.
        peak_bytes: memory that each takes of 1,000 bytes.
        ends: by how many run at once: `raises` or `dies`, and `at_start` or `at_work`.
    """
    kwargs = {
        "node": {"CPU": node.cpus, "GPU": node.gpus},
        "rates": {str(number): rate for number, rate in rates.items()},
        "peak_bytes": peak_bytes,
        "ends": {str(number): end for number, end in (ends or {}).items()},
    }
    data = {"name": "digits", "root": str(notes), "kwargs": kwargs}
    return TrialConfig.model_validate(
        {"data": data, "student": "digits_cnn_tiny", "method": "ce", "recipe": {"epochs": 1}}
    )


def probe(config):
    """A training of a known speed. It works once all that run beside it are at work as well."""
    import ray

    what = config.data.kwargs
    given = ray.get_runtime_context().get_assigned_resources()
    kind = "GPU" if "GPU" in given else "CPU"
    number = round(what["node"][kind] / given[kind])

    def end(when):
        how = what["ends"].get(str(number))
        if how == ["raises", when]:
            raise ValueError(f"there is no network of this name, said one of {number}")
        if how == ["dies", when]:
            os._exit(1)

    def run(seconds):
        note = {
            "given": given,
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "threads": config.threads,
            "gpu_share": config.gpu_share,
            "seconds": seconds,
        }
        notes = Path(config.data.root)
        written = notes / f".{os.getpid()}"
        written.write_text(json.dumps(note))
        written.rename(notes / f"{number}-{os.getpid()}")  # whole or not there: this process may be killed at any time
        end("at_work")
        deadline = time.monotonic() + 40
        while len(list(notes.glob(f"{number}-*"))) < number:
            if time.monotonic() > deadline:
                raise TimeoutError("the others did not come")
            time.sleep(0.01)
        return Speed(what["rates"][str(number)], what["peak_bytes"], 1000)

    end("at_start")
    return run
