"""The teacher: trained once and kept by content hash, or given as a checkpoint.

Under `runs/teachers/<key>/` lie `teacher.pt`, the weights, and `teacher.json`, what they are. The JSON is written last
and holds the weights' SHA-256: a folder without it, or whose weights do not match it, counts for nothing. While it is
trained, `checkpoint/` holds its last epoch, from which a training that was interrupted goes on.

A teacher is measured on the validation split when it is opened. What took long is kept in `measured-….json`, named by the
weights, the network and the data, also for a checkpoint that was given, and taken from there the next time.
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
from tune_topkd.teacher.asking import check_logits

WEIGHTS_NAME = "teacher.pt"
RECORD_NAME = "teacher.json"
CHECKPOINT_NAME = "checkpoint"

KEPT_FROM_SECONDS = 10.0
"""A measurement that took longer is not repeated at each opening."""

_FORMAT = 2
"""Part of the key: raised when the same config would come to be trained in another way. 1 did not look at the network's code
and at what the dataset's files hold."""
_TOLERANCE = 0.5
"""Points between two measurements of the same weights, or two images: other kernels may turn one that is on the edge."""

_CPU = torch.device("cpu")

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
        self,
        config: TrialConfig,
        report: Callable[[int, Mapping[str, float], Callable[[Path], None]], None],
        resume_from: Path | None = None,
        /,
    ) -> TrainingOutcome:
        """Train the student of `config`, from the checkpoint in `resume_from` on."""


@dataclass(frozen=True)
class Teacher:
    """A teacher that is ready: its weights' absolute `path`, its content `key`, its accuracy on the validation split
    in percent, whether it was there before, and when it was measured, if that was not now.
    """

    path: Path
    key: str
    val_top1: float
    was_cached: bool
    measured: str | None = None


@dataclass(frozen=True)
class _Measurement:
    """Accuracy on the validation split in percent; how long that took, or when it was taken, if that was not now."""

    val_top1: float
    seconds: float = 0.0
    taken: str | None = None


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


def ensure_teacher(
    config: PairConfig,
    root: Path,
    train: TrainFunction,
    progress: Progress | None = None,
    *,
    device: torch.device = _CPU,
    measure: bool = False,
) -> Teacher:
    """The teacher of a sweep: the given checkpoint, checked, or the one under `root`, trained first if need be.

    Two processes that need the same teacher at once train it once: the second waits for the first. A training that was
    interrupted goes on from its last epoch.

    Args:
        config: whose teacher.
        root: the folder of all teachers, `runs/teachers`; made if need be.
        train: what trains a `TrialConfig`.
        progress: told of each epoch, if one is trained.
        device: where a teacher that is there is measured.
        measure: measure it even if a measurement that took long is there.

    Raises:
        ValueError: the checkpoint does not fit or cannot be read, the training diverged, the teacher is hardly better
            than chance on the validation split, its logits are not finite or too large, or `root` cannot be written to.
    """
    measured = _Measured(config, device, measure)
    key = teacher_key(config)
    folder = root.absolute() / key
    given = _given(config)
    if given.checkpoint is not None:
        path = Path(given.checkpoint).absolute()
        found = measured(path, folder, str(path))
        return Teacher(path, key, found.val_top1, was_cached=True, measured=found.taken)
    known = _kept(folder, key, measured) or _of_older_format(config, root.absolute(), measured)  # no need of the lock
    if known is not None:
        return known
    with _locked(folder):
        return _kept(folder, key, measured) or _trained(config, folder, key, measured, train, progress)


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
    return {"format": _FORMAT, **_settings(config), "files": fingerprint(config.data), "network": _network(config)}


def _settings(config: PairConfig) -> dict[str, Any]:
    """What the config says of it."""
    teacher = _given(config).model_dump(mode="json", include={"name", "kwargs", "image_size", "recipe", "seed"})
    data = _data(config).model_dump(mode="json", exclude={"root", "download", "workers"})  # these change no pixel
    return {"data": data, "teacher": teacher}


def _network(config: PairConfig) -> str:
    info = dataset_info(config.data)
    return network_fingerprint(_given(config).model, num_classes=info.num_classes, image_shape=info.image_shape)


def _trained(
    config: PairConfig, folder: Path, key: str, measured: "_Measured", train: TrainFunction, progress: Progress | None
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
    result = _gone_on(trial, folder / CHECKPOINT_NAME, train, progress)
    if result.diverged:
        raise ValueError(f"teacher {given.name!r}: its training diverged in epoch {result.epoch}; lower its lr")
    found = measured.of(result.model, repr(given.name))
    path = folder / WEIGHTS_NAME
    save_weights(result.model, path)
    measured.keep(found, path, folder)
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


def _gone_on(trial: TrialConfig, checkpoint: Path, train: TrainFunction, progress: Progress | None) -> TrainingOutcome:
    """Train, from the checkpoint of an interrupted training if there is one that can be gone on from."""
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
            if epochs:  # it could be gone on from
                raise
            _log.warning("the teacher is trained from the start, not from its last checkpoint: %s", error)
    return train(trial, report)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


# --- what is there --------------------------------------------------------------------------------------------------


def _kept(folder: Path, key: str, measured: "_Measured") -> Teacher | None:
    """The teacher in a folder; None if there is none, or none that is as it was: that is warned of."""
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
    return _as_recorded(Teacher(path, key, recorded, was_cached=True), measured, "is trained again")


def _as_recorded(teacher: Teacher, measured: "_Measured", otherwise: str) -> Teacher | None:
    """The teacher, if it is as good as it was; else what is done `otherwise` is said."""
    try:
        found = measured(teacher.path, teacher.path.parent, str(teacher.path))
    except ValueError as error:
        reason = str(error)
    else:
        if abs(found.val_top1 - teacher.val_top1) <= measured.tolerance():
            return dataclasses.replace(teacher, measured=found.taken)
        reason = f"measured {found.val_top1:.2f} %"
    _log.warning(
        "teacher %s had a validation top-1 of %.2f %% when it was trained, and is no longer what it was: %s; it %s",
        teacher.path, teacher.val_top1, reason, otherwise,
    )  # fmt: skip
    return None


def _of_older_format(config: PairConfig, root: Path, measured: "_Measured") -> Teacher | None:
    """A teacher that an older version trained by the same config: its key says less, so its accuracy decides."""
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
            if (known := _as_recorded(old, measured, "is not used, and another is trained")) is not None:
                return known
    return None


# --- how good it is -------------------------------------------------------------------------------------------------


class _Measured:
    """Measures teachers of a config on its validation split, each as often as it has to."""

    def __init__(self, config: PairConfig, device: torch.device, again: bool) -> None:
        self._config, self._device, self._again = config, device, again

    def __call__(self, path: Path, folder: Path, name: str) -> _Measurement:
        """The accuracy of the weights at `path`, from `folder` if it is kept there.

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
        """The accuracy of a network, on the device that it is on.

        Raises:
            ValueError: it is hardly better than chance.
        """
        started = time.perf_counter()
        val_top1 = _checked_accuracy(model, self._config.data, name)
        return _Measurement(val_top1, seconds=time.perf_counter() - started)

    def keep(self, found: _Measurement, path: Path, folder: Path) -> None:
        """Write down in `folder` what was found of the weights at `path`, if it took long."""
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
        """The file of a measurement, and all that it depends on."""
        data = self._config.data
        what = {
            "weights": file_hash(path),
            "network": _network(self._config),
            "data": [read_as(data), fingerprint(data)],
        }
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return folder / f"measured-{digest}.json", what

    def tolerance(self) -> float:
        """Points that two measurements of the same weights may differ by."""
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
