"""The teacher: trained once and kept under a content hash, or given as a checkpoint.

`runs/teachers/<key>/` holds `teacher.pt`, the weights, and `teacher.json`, what they are. The JSON is written last and
holds the SHA-256 of the weights: a folder without it, or whose weights do not match it, is no teacher. During training,
`checkpoint/` holds the last epoch, from which an interrupted training resumes.

A teacher is measured on the validation split when it is opened. A measurement that took long is kept in
`measured-….json`, named by a hash of the weights, the network and the data, also for a checkpoint that was given, and
read the next time.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime
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
from tune_topkd.config import what
from tune_topkd.data import dataset_info
from tune_topkd.data import fingerprint
from tune_topkd.data import load_dataset
from tune_topkd.data import read_as
from tune_topkd.evaluate import evaluate
from tune_topkd.models import build_configured
from tune_topkd.models import load_weights
from tune_topkd.models import network_fingerprint
from tune_topkd.models import save_weights
from tune_topkd.storage import Lock
from tune_topkd.storage import file_hash
from tune_topkd.storage import lock
from tune_topkd.storage import write_text
from tune_topkd.teacher.network import check_logits

WEIGHTS_NAME = "teacher.pt"
RECORD_NAME = "teacher.json"
CHECKPOINT_NAME = "checkpoint"

KEPT_FROM_SECONDS = 10.0
"""A measurement that took longer than this is kept, and not repeated each time the teacher is opened."""

_FORMAT = 2
"""Part of the key, to be raised when the same config is trained in another way. The keys of format 1 covered neither
the network's code nor the content of the dataset's files."""
_TOLERANCE = 0.5
"""Percentage points, or two images, by which two measurements of the same weights may differ: other kernels may decide
otherwise on images that are on the edge."""

_CPU = torch.device("cpu")

_log = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Called after each epoch of a teacher's training with the epoch, from 1, and its metrics."""


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
        """Whether the training stopped because its loss was not finite."""


class TrainFunction(Protocol):
    """How a network is trained: `tune_topkd.train.train`, which is passed in because it imports this room."""

    def __call__(
        self,
        config: TrialConfig,
        report: Callable[[int, Mapping[str, float], Callable[[Path], None]], None],
        resume_from: Path | None = None,
        /,
    ) -> TrainingOutcome:
        """Train the student of `config`, from the checkpoint in the folder `resume_from` if one is given."""


@dataclass(frozen=True)
class Teacher:
    """A teacher that is ready to be used."""

    path: Path
    """Of its weights, absolute."""
    key: str
    """Its `teacher_key`."""
    val_top1: float
    """Its accuracy on the validation split, in percent."""
    was_cached: bool
    """Whether it was there before, so that nothing was trained."""
    measured: str | None = None
    """When `val_top1` was measured (ISO 8601), if it was read from an earlier measurement."""


@dataclass(frozen=True)
class _Measurement:
    """How good a teacher is."""

    val_top1: float
    """Its accuracy on the validation split, in percent."""
    seconds: float = 0.0
    """How long the measurement took."""
    taken: str | None = None
    """When it was taken, if it was read from a file."""


def teacher_key(config: PairConfig) -> str:
    """16 hex digits that name a teacher: a hash of everything that its training depends on, or of the given checkpoint.

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


def ensure_teacher(
    config: PairConfig,
    root: Path,
    train: TrainFunction,
    progress: Progress | None = None,
    *,
    device: torch.device = _CPU,
    measure: bool = False,
) -> Teacher:
    """The teacher of a sweep: the given checkpoint, or the one under `root`, which is trained if it is not there.

    Two processes that need the same teacher at the same time train it once: the second waits for the first. An
    interrupted training resumes from its last epoch.

    Args:
        config: whose teacher.
        root: the folder of all teachers, `runs/teachers`; made if need be.
        train: trains a `TrialConfig`.
        progress: called after each epoch, if the teacher is trained.
        device: where a teacher that is there is measured.
        measure: measure it even if an earlier measurement is kept.

    Raises:
        ValueError: the checkpoint does not fit or cannot be read, the training diverged, the teacher is hardly better
            than chance on the validation split, its logits are not finite or too large, or `root` cannot be written to.
    """
    measurer = _Measurer(config, device, measure)
    key = teacher_key(config)
    folder = root.absolute() / key
    given = _given(config)
    if given.checkpoint is not None:
        path = Path(given.checkpoint).absolute()
        found = measurer(path, folder, str(path))
        return Teacher(path, key, found.val_top1, was_cached=True, measured=found.taken)
    known = _kept(folder, key, measurer) or _of_older_format(config, root.absolute(), measurer)  # needs no lock
    if known is not None:
        return known
    with _locked(folder):
        return _kept(folder, key, measurer) or _trained(config, folder, key, measurer, train, progress)


def load_teacher(model: ModelConfig, checkpoint: Path, *, num_classes: int) -> nn.Module:
    """The network with the checkpoint's weights, on the CPU, in eval mode and frozen.

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
    """The data that the teacher is trained on, with its own augmentation if it has one."""
    augment = _given(config).augment
    return config.data if augment is None else config.data.model_copy(update={"augment": augment})


def _inputs(config: PairConfig) -> dict[str, Any]:
    """Everything that a trained teacher depends on."""
    return {"format": _FORMAT, **_settings(config), "files": fingerprint(config.data), "network": _network(config)}


def _settings(config: PairConfig) -> dict[str, Any]:
    """What a trained teacher depends on as far as the config says it."""
    given = what(_given(config))
    teacher = {key: given[key] for key in ("name", "kwargs", "image_size", "recipe", "seed")}
    return {"data": what(_data(config)), "teacher": teacher}


def _network(config: PairConfig) -> str:
    info = dataset_info(config.data)
    return network_fingerprint(_given(config).model, num_classes=info.num_classes, image_shape=info.image_shape)


def _trained(
    config: PairConfig, folder: Path, key: str, measurer: "_Measurer", train: TrainFunction, progress: Progress | None
) -> Teacher:
    given = _given(config)
    assert given.recipe is not None, "a teacher without a checkpoint has a recipe"
    trial = TrialConfig(
        data=_data(config),
        student=StudentConfig.model_validate(given.model),
        method="ce",
        recipe=given.recipe,
        seed=given.seed,
    )
    inputs = _inputs(config)
    started = time.perf_counter()
    result = _train_or_resume(trial, folder / CHECKPOINT_NAME, train, progress)
    if result.diverged:
        raise ValueError(f"teacher {given.name!r}: its training diverged in epoch {result.epoch}; lower its lr")
    found = measurer.of(result.model, repr(given.name))
    path = folder / WEIGHTS_NAME
    save_weights(result.model, path)
    measurer.keep(found, path, folder)
    record = {
        "key": key,
        "config": inputs,
        "val_top1": found.val_top1,
        "epochs": result.epoch,
        "seconds": round(time.perf_counter() - started, 3),
        "sha256": file_hash(path),
        "versions": {"tune_topkd": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    _write(folder / RECORD_NAME, record)
    shutil.rmtree(folder / CHECKPOINT_NAME, ignore_errors=True)
    return Teacher(path, key, found.val_top1, was_cached=False)


def _train_or_resume(
    trial: TrialConfig, checkpoint: Path, train: TrainFunction, progress: Progress | None
) -> TrainingOutcome:
    """Train, from the checkpoint of an interrupted training if there is one that can be used."""
    epochs = 0

    def report(epoch: int, metrics: Mapping[str, float], save: Callable[[Path], None]) -> None:
        nonlocal epochs
        epochs += 1
        save(checkpoint)
        if progress is not None:
            progress(epoch, metrics)

    if checkpoint.exists():
        try:
            return train(trial, report, checkpoint)
        except ValueError as error:
            if epochs:  # the checkpoint was good
                raise
            _log.warning("the teacher is trained from the start, not from its last checkpoint: %s", error)
    return train(trial, report)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


# --- what is there --------------------------------------------------------------------------------------------------


def _kept(folder: Path, key: str, measurer: "_Measurer") -> Teacher | None:
    """The teacher in a folder; None if there is none, or if it is not what it was, of which the log warns."""
    path = folder / WEIGHTS_NAME
    if not (folder / RECORD_NAME).exists():
        return None
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        if record["key"] != key or record["sha256"] != file_hash(path):
            raise ValueError(f"{WEIGHTS_NAME} is not what {RECORD_NAME} says")
        recorded = float(record["val_top1"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("teacher %s is damaged and is trained again: %s: %s", folder, type(error).__name__, error)
        return None
    return _as_recorded(Teacher(path, key, recorded, was_cached=True), measurer, "is trained again")


def _as_recorded(teacher: Teacher, measurer: "_Measurer", otherwise: str) -> Teacher | None:
    """The teacher, if it is as good as recorded; else None, and the log says what is done `otherwise`."""
    try:
        found = measurer(teacher.path, teacher.path.parent, str(teacher.path))
    except ValueError as error:
        reason = str(error)
    else:
        if abs(found.val_top1 - teacher.val_top1) <= measurer.tolerance():
            return dataclasses.replace(teacher, measured=found.taken)
        reason = f"measured {found.val_top1:.2f} %"
    _log.warning(
        "teacher %s had a validation top-1 of %.2f %% when it was trained, and is no longer what it was: %s; it %s",
        teacher.path, teacher.val_top1, reason, otherwise,
    )  # fmt: skip
    return None


def _of_older_format(config: PairConfig, root: Path, measurer: "_Measurer") -> Teacher | None:
    """A teacher of the same config in format 1, whose key covers less, so that its accuracy must confirm it."""
    settings = _settings(config)
    for path in sorted(root.glob(f"*/{RECORD_NAME}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            inputs = record["config"]
            is_meant = inputs["format"] == 1 and all(
                settings[part].get(name) == value
                for part in ("data", "teacher")
                for name, value in inputs[part].items()
            )
            is_whole = is_meant and record["sha256"] == file_hash(path.with_name(WEIGHTS_NAME))
            recorded = float(record["val_top1"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: no teacher
        if is_whole:
            old = Teacher(path.with_name(WEIGHTS_NAME), path.parent.name, recorded, was_cached=True)
            if (known := _as_recorded(old, measurer, "is not used, and another is trained")) is not None:
                return known
    return None


# --- how good it is -------------------------------------------------------------------------------------------------


class _Measurer:
    """Measures teachers of a config on its validation split, and keeps measurements that took long."""

    def __init__(self, config: PairConfig, device: torch.device, again: bool) -> None:
        self._config, self._device, self._again = config, device, again

    def __call__(self, path: Path, folder: Path, name: str) -> _Measurement:
        """Measure the weights at `path`, or read the measurement of them that `folder` keeps.

        Raises:
            ValueError: the weights do not fit, or are hardly better than chance.
        """
        file, what = self._place(path, folder)
        if not self._again and (known := _read_measurement(file, what)) is not None:
            return known
        num_classes = dataset_info(self._config.data).num_classes
        model = load_teacher(_given(self._config).model, path, num_classes=num_classes).to(self._device)
        found = self.of(model, name)
        self.keep(found, path, folder)
        return found

    def of(self, model: nn.Module, name: str) -> _Measurement:
        """Measure a network on its device.

        Raises:
            ValueError: it is hardly better than chance.
        """
        started = time.perf_counter()
        val_top1 = _checked_accuracy(model, self._config.data, name)
        return _Measurement(val_top1, seconds=time.perf_counter() - started)

    def keep(self, found: _Measurement, path: Path, folder: Path) -> None:
        """Keep the measurement of the weights at `path` in `folder`, if it took long."""
        if found.seconds < KEPT_FROM_SECONDS:
            return
        file, what = self._place(path, folder)
        taken = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, {**what, "val_top1": found.val_top1, "seconds": round(found.seconds, 3), "taken": taken})
        except OSError as error:
            _log.warning("the teacher is measured again the next time: %s: %s", file, error.strerror or error)

    def _place(self, path: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
        """The file of a measurement, and everything that the measurement depends on."""
        data = self._config.data
        what = {
            "weights": file_hash(path),
            "network": _network(self._config),
            "data": [read_as(data), fingerprint(data)],
        }
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return folder / f"measured-{digest}.json", what

    def tolerance(self) -> float:
        """Percentage points that two measurements of the same weights may differ by."""
        return max(_TOLERANCE, 200 / len(load_dataset(self._config.data).val))


def _read_measurement(file: Path, what: Mapping[str, Any]) -> _Measurement | None:
    try:
        content = json.loads(file.read_bytes())
        if {name: content[name] for name in what} == what:
            return _Measurement(float(content["val_top1"]), taken=str(content["taken"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is damaged, the teacher is measured again: %s: %s", file, type(error).__name__, error)
    return None


def _checked_accuracy(model: nn.Module, data: DataConfig, name: str) -> float:
    dataset = load_dataset(data)
    device = next(model.parameters()).device
    found = evaluate(model, dataset.val.to(device), mean=dataset.mean, std=dataset.std)
    check_logits(found.largest_logit, name)
    top1 = found.top1
    chance = 100 / dataset.num_classes
    floor = min(2 * chance, (100 + chance) / 2)  # of two classes, twice chance is all
    if top1 <= floor:
        raise ValueError(
            f"teacher {name}: {top1:.1f} % top-1 on the validation split of {data.name!r} is hardly better than "
            f"chance ({chance:.1f} %); more than {floor:.1f} % is needed"
        )
    return top1


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
