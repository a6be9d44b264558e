"""The teacher: trained once and kept by content hash, or given as a checkpoint.

Under `runs/teachers/<key>/` lie `teacher.pt`, the weights, and `teacher.json`, what they are. The JSON is written last
and holds the weights' SHA-256: a folder without it, or whose weights do not match it, counts for nothing.
"""

import contextlib
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Protocol
from typing import TypeAlias

import torch
from torch import nn

from tune_topkd import __version__
from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.config import PairConfig
from tune_topkd.config import StudentConfig
from tune_topkd.config import TeacherConfig
from tune_topkd.config import TrialConfig
from tune_topkd.data import count_hits
from tune_topkd.data import dataset_info
from tune_topkd.data import fingerprint
from tune_topkd.data import load_dataset
from tune_topkd.models import build_configured
from tune_topkd.models import load_weights
from tune_topkd.models import save_weights
from tune_topkd.models import write_atomically
from tune_topkd.storage import Lock
from tune_topkd.storage import lock

WEIGHTS_NAME = "teacher.pt"
RECORD_NAME = "teacher.json"

_FORMAT = 1
"""Part of the key: raised when the same config would come to be trained in another way."""

_log = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Told the epoch, from 1, and its metrics while the teacher is trained."""


class TrainingOutcome(Protocol):
    """What `ensure_teacher` needs to know of a finished training."""

    @property
    def epoch(self) -> int:
        """The last epoch."""

    @property
    def model(self) -> nn.Module:
        """The trained network."""

    @property
    def diverged(self) -> bool:
        """The loss was not finite."""


class TrainFunction(Protocol):
    """What trains: `tune_topkd.train.train`, handed in, since that module imports this one."""

    def __call__(
        self, config: TrialConfig, report: Callable[[int, Mapping[str, float], Callable[[Path], None]], None]
    ) -> TrainingOutcome:
        """Train the student of `config`."""


@dataclass(frozen=True)
class Teacher:
    """A teacher that is ready: its weights' absolute `path`, its content `key`, its accuracy on the validation split
    in percent, and whether it was there before.
    """

    path: Path
    key: str
    val_top1: float
    was_cached: bool


def teacher_key(config: PairConfig) -> str:
    """16 hex digits that name a teacher by content: of its training's inputs, or of the given checkpoint's bytes.

    Raises:
        ValueError: the given checkpoint cannot be read, or the dataset's files are not there.
    """
    given = _given(config)
    if given.checkpoint is not None:
        content = file_hash(Path(given.checkpoint))
        if given.checkpoint_key is not None:  # of several sets of weights in one file
            content = hashlib.sha256(f"{content} {given.checkpoint_key}".encode()).hexdigest()
        return content[:16]
    text = json.dumps(_inputs(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ensure_teacher(config: PairConfig, root: Path, train: TrainFunction, progress: Progress | None = None) -> Teacher:
    """The teacher of a sweep: the given checkpoint, checked, or the one under `root`, trained first if need be.

    Two processes that need the same teacher at once train it once: the second waits for the first.

    Args:
        config: whose teacher.
        root: the folder of all teachers, `runs/teachers`; made if need be.
        train: what trains a `TrialConfig`.
        progress: told of each epoch, if one is trained.

    Raises:
        ValueError: the checkpoint does not fit or cannot be read, the training diverged, the teacher is hardly better
            than chance on the validation split, or `root` cannot be written to.
    """
    given = _given(config)
    if given.checkpoint is not None:
        path = Path(given.checkpoint).absolute()
        key = teacher_key(config)
        model = load_teacher(given.model, path, num_classes=dataset_info(config.data).num_classes)
        return Teacher(path, key, _checked_accuracy(model, config.data, str(path)), was_cached=True)
    key = teacher_key(config)
    folder = root.absolute() / key
    with _locked(folder):
        known = _recorded(folder, key)
        if known is not None:
            return Teacher(folder / WEIGHTS_NAME, key, known, was_cached=True)
        return _trained(config, folder, key, train, progress)


def load_teacher(model: ModelConfig, checkpoint: Path, *, num_classes: int) -> nn.Module:
    """The network with the checkpoint's weights, on the CPU, in eval mode, no weight asking for a gradient.

    Raises:
        ValueError: an unknown network, or a checkpoint that is missing, damaged or of another network or class count.
    """
    network = build_configured(model, num_classes=num_classes)
    load_weights(network, checkpoint, model.checkpoint_key)
    return network.eval().requires_grad_(False)


def _given(config: PairConfig) -> TeacherConfig:
    assert config.teacher is not None, "asked for only where the config has a teacher"
    return config.teacher


def _data(config: PairConfig) -> DataConfig:
    """The data as the teacher is trained on it."""
    augment = _given(config).augment
    return config.data if augment is None else config.data.model_copy(update={"augment": augment})


def _inputs(config: PairConfig) -> dict[str, Any]:
    """All that a trained teacher depends on."""
    teacher = _given(config).model_dump(mode="json", include={"name", "kwargs", "image_size", "recipe", "seed"})
    data = _data(config).model_dump(mode="json", exclude={"root", "download", "workers"})  # these change no pixel
    return {"format": _FORMAT, "data": data, "files": fingerprint(config.data), "teacher": teacher}


def _trained(config: PairConfig, folder: Path, key: str, train: TrainFunction, progress: Progress | None) -> Teacher:
    given = _given(config)
    assert given.recipe is not None, "a teacher without a checkpoint has a recipe"
    trial = TrialConfig(
        data=_data(config),
        student=StudentConfig.model_validate(given.model),
        method="ce",
        recipe=given.recipe,
        seed=given.seed,
    )
    started = time.perf_counter()
    result = train(trial, lambda epoch, metrics, save: progress(epoch, metrics) if progress else None)
    if result.diverged:
        raise ValueError(f"teacher {given.name!r}: its training diverged in epoch {result.epoch}; lower its lr")
    val_top1 = _checked_accuracy(result.model, config.data, repr(given.name))
    path = folder / WEIGHTS_NAME
    save_weights(result.model, path)
    record = {
        "key": key,
        "config": _inputs(config),
        "val_top1": val_top1,
        "epochs": result.epoch,
        "seconds": round(time.perf_counter() - started, 3),
        "sha256": file_hash(path),
        "versions": {"tune_topkd": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(folder / RECORD_NAME, lambda file: file.write(text.encode()))
    return Teacher(path, key, val_top1, was_cached=False)


def _recorded(folder: Path, key: str) -> float | None:
    """Accuracy of the teacher in `folder`, or None if there is none that is whole; a damaged one is warned of."""
    if not (folder / RECORD_NAME).exists():
        return None
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        if record["key"] == key and record["sha256"] == file_hash(folder / WEIGHTS_NAME):
            return float(record["val_top1"])
        reason = f"{WEIGHTS_NAME} is not what {RECORD_NAME} says"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    _log.warning("teacher %s is damaged and is trained again: %s", folder, reason)
    return None


def _checked_accuracy(model: nn.Module, data: DataConfig, name: str) -> float:
    dataset = load_dataset(data)
    device = next(model.parameters()).device
    hits = count_hits(model, dataset.val.to(device), mean=dataset.mean, std=dataset.std)
    top1 = 100 * int(hits[0]) / len(dataset.val)
    chance = 100 / dataset.num_classes
    floor = min(2 * chance, (100 + chance) / 2)  # of two classes, twice chance is all
    if top1 <= floor:
        raise ValueError(
            f"teacher {name}: {top1:.1f} % top-1 on the validation split of {data.name!r} is hardly better than "
            f"chance ({chance:.1f} %); more than {floor:.1f} % is needed"
        )
    return top1


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a teacher's folder, which is made; the system drops the lock of a process that dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"{folder}: teachers cannot be kept here: {error.strerror or error}") from error
    with stream:
        if lock(stream) is Lock.BUSY:
            _log.info("waiting for another process that trains the teacher %s", folder)
            lock(stream, waits=True)
        yield
