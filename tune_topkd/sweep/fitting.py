"""Whether the networks, weights and loss of a config fit its dataset: tried on two images before anything is spent.

Networks, and perhaps the loss, are other people's code, whose behaviour is known only by running it.
"""

import contextlib
import sys
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

import torch
from torch import Tensor
from torch import nn

from tune_topkd.config import METHODS
from tune_topkd.config import ModelConfig
from tune_topkd.config import PairConfig
from tune_topkd.config import Problem
from tune_topkd.config import RecipeConfig
from tune_topkd.config import SweepConfig
from tune_topkd.data import DatasetInfo
from tune_topkd.loss import CELoss
from tune_topkd.loss import DistillationLoss
from tune_topkd.loss import build_loss
from tune_topkd.models import ModelNameError
from tune_topkd.models import OutputError
from tune_topkd.models import build_configured
from tune_topkd.models import freeze_backbone
from tune_topkd.models import load_backbone
from tune_topkd.models import load_weights

_IMAGES = 2
_LOSS_ROWS = 64
"""The most rows of logits that a loss is tried on; some losses need a whole batch."""
_SIDES = (32, 64, 96, 128, 224, 299)
"""Sides that images are resized to in search of one that a network takes."""


@dataclass
class Findings:
    """Problems, which keep the config from being run, and notes, which do not."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, key: str, rule: str, *value: object) -> None:
        """Add a problem."""
        problem = Problem(key=key, rule=rule, value=value[0] if value else None, has_value=bool(value))
        self.problems.append(problem)


@dataclass(frozen=True)
class _Role:
    """A network of a config, as the student or the teacher."""

    key: str
    """`student` or `teacher`."""
    model: ModelConfig
    checkpoint: str | None
    recipe: RecipeConfig | None
    """What it will be trained by; None if it is not trained."""
    smallest_batch: int
    batch_key: str
    """The config key of the batch size."""


def try_on(config: PairConfig, info: DatasetInfo, parameters: Mapping[str, object] | None) -> Findings:
    """Build each network with its weights, run it on images, and compute the gradient of the loss once.

    This runs on one thread of the CPU and, if there are problems, again on the GPU if there is one. The global
    generator is left as it was, and what a network prints goes to stderr.

    Args:
        config: whose networks and loss.
        info: of its dataset.
        parameters: of the loss; None does not try the loss.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # starting more takes longer than two images
        with contextlib.redirect_stdout(sys.stderr):
            found = _tried(config, info, parameters, torch.device("cpu"))
            if found.problems and torch.cuda.is_available():
                on_gpu = _tried(config, info, parameters, torch.device("cuda"))
                found = found if on_gpu.problems else on_gpu
    finally:
        torch.set_num_threads(threads)
    return found


def _tried(
    config: PairConfig, info: DatasetInfo, parameters: Mapping[str, object] | None, device: torch.device
) -> Findings:
    found = Findings()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        images = torch.randn(_IMAGES, *info.image_shape).to(device)
        teacher_logits = _try_teacher(config, info, images, found)
        _try_student(config, info, images, teacher_logits, parameters, found)
    return found


def _try_teacher(config: PairConfig, info: DatasetInfo, images: Tensor, found: Findings) -> Tensor | None:
    """The teacher's logits of the images; None if there is no teacher, or it does not run."""
    given = config.teacher
    if given is None:
        return None
    key = "teacher.recipe.batch_size"
    role = _Role(
        "teacher", given.model, given.checkpoint, given.recipe, given.recipe.batch_size if given.recipe else 1, key
    )
    teacher = _network(role, info, images.device, found)
    if teacher is None or not _takes(role, teacher, images, info, found):
        return None
    teacher_logits = _logits(teacher, images)
    if given.recipe is not None:
        teacher.train()
        _learn(role, teacher, images, build_loss("ce", {}), None, info, found)
    return teacher_logits


def _try_student(
    config: PairConfig,
    info: DatasetInfo,
    images: Tensor,
    teacher_logits: Tensor | None,
    parameters: Mapping[str, object] | None,
    found: Findings,
) -> None:
    given, (smallest, key) = config.student, _smallest_batch(config)
    role = _Role("student", given, given.checkpoint, config.recipe, smallest, key)
    student = _network(role, info, images.device, found)
    if student is None or not _takes(role, student, images, info, found):
        return
    if given.linear_probe:
        try:
            freeze_backbone(student)
        except ValueError as error:
            found.add("student.linear_probe", str(error))
            return
    if config.teacher is not None:
        _check_images_are_kept(role, student, images, found)
    if parameters is not None and not found.problems:
        student.train(not given.linear_probe)
        _learn(role, student, images, build_loss(config.method, parameters), teacher_logits, info, found, config.method)


def _smallest_batch(config: PairConfig) -> tuple[int, str]:
    """The smallest batch size that the student may be trained with, and its config key."""
    sizes = config.space.get("batch_size") if isinstance(config, SweepConfig) else None
    if sizes is None:
        return config.recipe.batch_size, "recipe.batch_size"
    numbers = [int(size) for size in (sizes.low, *(sizes.choices or ())) if isinstance(size, int | float)]
    return min(numbers, default=_IMAGES), "space.batch_size"


# --- a network ------------------------------------------------------------------------------------------------------


def _network(role: _Role, info: DatasetInfo, device: torch.device, found: Findings) -> nn.Module | None:
    """The network with its weights; None if it cannot be built."""
    try:
        network = build_configured(role.model, num_classes=info.num_classes)
    except ModelNameError as error:
        found.add(f"{role.key}.name", str(error))
        return None
    except ValueError as error:
        found.add(f"{role.key}.kwargs", str(error), role.model.kwargs)
        return None
    if any(isinstance(weight, nn.parameter.UninitializedParameter) for weight in network.parameters()):
        rule = "has weights without a shape until it is shown an image (lazy layers): give its layers their sizes"
        found.add(f"{role.key}.name", rule, role.model.name)
        return None
    if role.recipe is not None and not any(weight.requires_grad for weight in network.parameters()):
        found.add(f"{role.key}.name", "has no weights that can be trained", role.model.name)
        return None
    if role.checkpoint is not None:
        _fill(role, network, role.checkpoint, found)
    return network.to(device)


def _fill(role: _Role, network: nn.Module, checkpoint: str, found: Findings) -> None:
    key, path = f"{role.key}.checkpoint", Path(checkpoint)
    if missing := _missing(key, checkpoint):
        found.problems.append(missing)
        return
    load = load_backbone if role.key == "student" else load_weights
    try:
        load(network, path, role.model.checkpoint_key)
    except ValueError as error:
        found.add(key, str(error))


def missing_checkpoints(config: PairConfig) -> Iterator[Problem]:
    """Files of weights that are named and are not there: all that can be told of networks before the data is known."""
    teacher = None if config.teacher is None else config.teacher.checkpoint
    given = {"teacher": teacher, "student": config.student.checkpoint}
    found = [_missing(f"{key}.checkpoint", path) for key, path in given.items() if path is not None]
    yield from filter(None, found)


def _missing(key: str, checkpoint: str) -> Problem | None:
    path = Path(checkpoint)
    if path.is_file():
        return None
    hint = ", but is a folder: name the file of weights in it" if path.is_dir() else ""
    return Problem(key=key, rule=f"must be an existing file{hint}", value=checkpoint, has_value=True)


def _takes(role: _Role, network: nn.Module, images: Tensor, info: DatasetInfo, found: Findings) -> bool:
    """Whether the network gives logits of a batch and of a single image, as at the end of a split."""
    for some in (images, images[:1]):
        try:
            logits = _logits(network, some)
        except Exception as error:  # noqa: BLE001 (others' code can raise anything)
            _explain(role, error, some, info, found)
            return False
        if rule := _rule_of_logits(logits, len(some), info):
            is_size = logits.ndim == 2 and len(logits) == len(some)
            hint = "; does its code use num_classes?" if is_size and logits.shape[1] != info.num_classes else ""
            weights = f"{role.key}.checkpoint" if role.checkpoint and "finite" in rule else f"{role.key}.name"
            found.add(weights, rule + hint, role.model.name)
            return False
    return True


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    """The logits in eval mode."""
    network.eval()
    with torch.no_grad():
        logits: Tensor = network(images.clone())
    return logits


def _rule_of_logits(logits: Tensor, images: int, info: DatasetInfo) -> str:
    """The rule that the logits break; empty if they break none."""
    if logits.shape != (images, info.num_classes):
        return f"must give logits {(images, info.num_classes)} for {images} images, but gives {tuple(logits.shape)}"
    if not logits.is_floating_point():
        return f"must give logits that are floating point, but gives {logits.dtype}"
    return "" if bool(logits.isfinite().all()) else "gives logits that are not finite"


def _explain(role: _Role, error: Exception, images: Tensor, info: DatasetInfo, found: Findings) -> None:
    """Add the problem of a network that failed on images, with the channels or the size that it takes, if found."""
    if isinstance(error, OutputError):
        found.add(f"{role.key}.name", str(error))
        return
    channels, height, width = images.shape[1:]
    what = f"takes no {len(images)} images of the shape {tuple(images.shape[1:])} ({_told(error)})"
    for other in {1, 3} - {channels}:
        if _works(role.model, torch.randn(_IMAGES, other, height, width).to(images.device), info):
            rule = f"{what}; it takes {other} channels, and those of the dataset have {channels}"
            found.add(f"{role.key}.name", rule, role.model.name)
            return
    for side in _SIDES:
        if (side, side) != (height, width) and _works(role.model.model_copy(update={"image_size": side}), images, info):
            found.add(f"{role.key}.image_size", f"{what}; with {side} it would", role.model.image_size)
            return
    found.add(f"{role.key}.name", what, role.model.name)


def _works(model: ModelConfig, images: Tensor, info: DatasetInfo) -> bool:
    try:
        network = build_configured(model, num_classes=info.num_classes).to(images.device)
        logits = _logits(network, images)
    except Exception:  # noqa: BLE001 (failing is the answer)
        return False
    return not _rule_of_logits(logits, len(images), info)


def _check_images_are_kept(role: _Role, network: nn.Module, images: Tensor, found: Findings) -> None:
    """Check that the student does not change its images, which the teacher is shown after it."""
    shown = images.clone()
    with torch.no_grad():
        network(shown)
    if not torch.equal(shown, images):
        rule = "changes the images in place, which the teacher is shown after it: let its first layer make new ones"
        found.add(f"{role.key}.name", rule, role.model.name)


# --- learning -------------------------------------------------------------------------------------------------------


def _learn(
    role: _Role,
    network: nn.Module,
    images: Tensor,
    loss: DistillationLoss,
    teacher_logits: Tensor | None,
    info: DatasetInfo,
    found: Findings,
    method: str = "ce",
) -> None:
    """Try a training step without an optimiser: a forward pass in training mode, the loss, its gradient."""
    assert role.recipe is not None, "only what is trained learns"
    some = images[: min(len(images), role.smallest_batch)]
    try:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=role.recipe.precision == "bfloat16"):
            logits: Tensor = network(some.clone())
    except Exception as error:  # noqa: BLE001 (others' code can raise anything)
        _explain_training(role, network, error, some, images, found)
        return
    if rule := _rule_of_logits(logits, len(some), info):
        found.add(f"{role.key}.name", f"in training mode it {rule}", role.model.name)
        return
    if not logits.requires_grad:
        found.add(f"{role.key}.name", "gives logits that depend on none of its weights", role.model.name)
        return
    key = "loss" if method in METHODS else "method"
    try:
        total = _total(loss, logits, teacher_logits, role.recipe)
        torch.autograd.backward(total)
    except Exception as error:  # noqa: BLE001
        found.add(key, f"method {method!r} fails: {_told(error)}")
        return
    for rule in _rules_of_gradient(network, total):
        found.add(key, f"method {method!r}: {rule}")
    idle = [name for name, w in network.named_parameters() if w.requires_grad and w.grad is None]
    if idle and not found.problems:
        shown = ", ".join(idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
        found.notes.append(
            f"the loss depends on none of these weights of the {role.key}, which stay as they are: {shown}"
        )


def _explain_training(
    role: _Role, network: nn.Module, error: Exception, some: Tensor, images: Tensor, found: Findings
) -> None:
    """Add the problem of a network that runs in eval mode but not in training mode, on one image or on any."""
    if len(some) < len(images):
        with contextlib.suppress(Exception):  # fails with more images, too: reported below
            network(images.clone())
            rule = f"must be at least 2: the {role.key} cannot be trained on a single image ({_told(error)})"
            found.add(role.batch_key, rule)
            return
    rule = str(error) if isinstance(error, OutputError) else f"cannot be trained: {_told(error)}"
    found.add(f"{role.key}.name", f"in training mode: {rule}", role.model.name)


def _total(loss: DistillationLoss, logits: Tensor, teacher_logits: Tensor | None, recipe: RecipeConfig) -> Tensor:
    """The loss of as many rows as a batch has, at most `_LOSS_ROWS`: the logits, repeated with a little noise."""
    times = max(1, min(recipe.batch_size, _LOSS_ROWS) // len(logits))
    rows = _with_noise(logits, times)
    labels = torch.arange(len(rows), device=rows.device) % rows.shape[1]
    if isinstance(loss, CELoss):
        return loss.total(loss.terms(rows, None, labels))
    assert teacher_logits is not None, "every other loss has a teacher"
    return loss.total(loss.terms(rows, _with_noise(teacher_logits[: len(logits)], times), labels))


def _with_noise(logits: Tensor, times: int) -> Tensor:
    rows = logits.repeat(times, 1)
    return rows + 0.1 * torch.randn_like(rows)


def _rules_of_gradient(network: nn.Module, total: Tensor) -> Iterator[str]:
    grads = [weight.grad for weight in network.parameters() if weight.grad is not None]
    if not bool(total.isfinite()):
        yield f"is not finite ({float(total.detach()):g}) for logits of untrained networks"
    elif not grads:
        yield "depends on none of the student's weights"
    elif not all(bool(grad.isfinite().all()) for grad in grads):
        yield "its gradient is not finite for logits of untrained networks"


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
