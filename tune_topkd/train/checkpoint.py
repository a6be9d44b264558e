"""The checkpoints of a training, and of which config each is.

A checkpoint is a file of torch's that holds tensors and plain data alone. Its config is kept as JSON in which files and
the user's code stand by their content, so that a checkpoint is refused where either has changed under the same name.
"""

import json
import logging
import math
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tune_topkd.config import TrialConfig
from tune_topkd.config import what
from tune_topkd.data import Dataset
from tune_topkd.data import fingerprint
from tune_topkd.errors import TuneTopKDError
from tune_topkd.loss import build_loss
from tune_topkd.models import WEIGHTS_KEY
from tune_topkd.models import network_fingerprint
from tune_topkd.models import read_checkpoint
from tune_topkd.storage import file_hash
from tune_topkd.storage import write_atomically
from tune_topkd.teacher import teacher_identity
from tune_topkd.user_code import is_users

CHECKPOINT_NAME = "checkpoint.pt"
CODE_KEY = "code"
"""In the config of a checkpoint: what the user's code that it names computes."""
HITS_KEY = "test_hits"
"""Of a training that is measured on the test set at its end: about which images it is right, `(N,)` bool."""
EMA_KEY = "ema"
"""In a checkpoint: the moving average of the weights, where `recipe.ema` is set."""
HITS_KEY = "test_hits"
"""In the last checkpoint of a training that reads the test set at its end: about which images it is right, `(N,)` bool."""
LOSS_KEY = "loss"
"""In a checkpoint: the state of the loss, where it has any."""
_KEYS = {WEIGHTS_KEY, "optimizer", "scheduler", "rng", "epoch", "metrics", "config"}

_ADAMW = "tokens and positions do not decay, the warm-up comes before the schedule"
"""In the config of an AdamW checkpoint, as older versions had other rules."""

_log = logging.getLogger(__name__)


class CheckpointError(TuneTopKDError):
    """A checkpoint is missing or damaged; the message names it."""


def write_checkpoint(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint into a folder, which is made if need be; the one in it is replaced in one step.

    Raises:
        OSError: the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CHECKPOINT_NAME, lambda file: torch.save(dict(content), file))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint in a folder, tensors on the CPU.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / CHECKPOINT_NAME
    try:
        content = read_checkpoint(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if missing := _KEYS - content.keys():
        raise CheckpointError(f"{path}: is no checkpoint of a training: it has no {', '.join(sorted(missing))}")
    return content


def checkpoint_metrics(folder: Path) -> tuple[int, dict[str, float]]:
    """Epoch and metrics of the checkpoint in a folder; the whole file is checked.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    content = load_checkpoint(folder)
    return content["epoch"], content["metrics"]


# --- of which config a checkpoint is --------------------------------------------------------------------------------


def config_identity(config: TrialConfig, dataset: Dataset) -> str:
    """The config of a training as JSON, without what changes no result, and with files and the user's code by content.

    Args:
        config: the training's.
        dataset: what its `data` names.
    """
    content = what(config)
    content["teacher_checkpoint"] = teacher_identity(config)[1]
    begun_with = config.student.checkpoint
    content["student"]["checkpoint"] = None if begun_with is None else file_hash(Path(begun_with))
    if config.recipe.optimizer == "adamw":
        content["adamw"] = _ADAMW
    if code := _code(config, dataset):
        content[CODE_KEY] = code
    return json.dumps(content, sort_keys=True)


def check_same_config(path: Path, kept: str, current: str) -> None:
    """Compare the config of a checkpoint with that of the training which is to resume from it.

    What the checkpoint does not say of the user's code, as those of older versions do not, is warned of and not
    compared.

    Args:
        path: of the checkpoint, for messages.
        kept: the checkpoint's `config_identity`.
        current: the training's.

    Raises:
        ValueError: they differ; names each key.
    """
    there, here = json.loads(kept), json.loads(current)
    code = here.setdefault(CODE_KEY, {})
    if unknown := sorted(code.keys() - there.setdefault(CODE_KEY, {}).keys()):
        _log.warning("%s does not say what was computed by: %s", path, ", ".join(unknown))
    there[CODE_KEY] = code | there[CODE_KEY]
    if changed := _differences(there, here):
        told = "; ".join(changed)
        hint = " (code: what the network, loss or dataset of this name computes)" if f"{CODE_KEY}." in told else ""
        raise ValueError(f"{path}: is of another config: {told}{hint}")


def _code(config: TrialConfig, dataset: Dataset) -> dict[str, Any]:
    """What the user's networks, loss and dataset that a config names compute, or give."""
    code: dict[str, Any] = {}
    num_classes, image_shape = dataset.num_classes, dataset.train.batch_shape
    for role, network in {"student": config.student, "teacher": config.teacher}.items():
        if network is not None and is_users(network.name):
            code[role] = network_fingerprint(network, num_classes=num_classes, image_shape=image_shape)
    if is_users(config.data.name):
        code["data"] = fingerprint(config.data, dataset)
    if is_users(config.method) and (values := _loss_values(config, num_classes)):
        code["method"] = values
    return code


def _loss_values(config: TrialConfig, num_classes: int) -> list[float]:
    """The loss of a batch of logits set by a formula, and sums of its gradient; empty if it takes no such batch."""
    size = config.recipe.batch_size
    places = torch.arange(size * num_classes, dtype=torch.float64).reshape(size, num_classes)
    student, teacher = (3 * (places * step).sin() for step in (0.7, 1.3))
    logits = student.float().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            value = build_loss(config.method, config.loss)(logits, teacher.float(), torch.arange(size) % num_classes)
            (gradient,) = torch.autograd.grad(value, logits)
        except Exception as error:  # noqa: BLE001 (others' code can raise anything, and may take other batches)
            _log.warning("a checkpoint cannot tell whether method %s was changed: %s", config.method, error)
            return []
    values = [value.detach(), *((gradient * part).sum() for part in (student, teacher, places.cos()))]
    return [float(each) for each in values if each.isfinite()]


def _differences(there: Any, here: Any, key: str = "") -> list[str]:
    """Where two configs differ, one line for each dotted key."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        inner = [_differences(there.get(k), here.get(k), f"{key}.{k}" if key else k) for k in keys]
        return [line for lines in inner for line in lines]
    same = _are_close(there, here) if key == f"{CODE_KEY}.method" else there == here
    return [] if same else [f"{key} was {there!r} and is now {here!r}"]


def _are_close(there: Sequence[float], here: Sequence[float]) -> bool:
    """Whether these are the same numbers, up to what another machine's arithmetic may change."""
    pairs = zip(there, here, strict=False)
    return len(there) == len(here) and all(math.isclose(*pair, rel_tol=1e-4, abs_tol=1e-4) for pair in pairs)
