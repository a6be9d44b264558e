"""One trial: a student trained on one device, its metrics reported epoch by epoch.

`train` does not know who calls it: the caller gives a `Reporter`, which is told every epoch's metrics and may ask for
a checkpoint. A run that is resumed from its checkpoint goes on as if it had never been interrupted, on the CPU bit for
bit.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import math
import random
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Protocol
from typing import TypeAlias

import torch
from torch import Tensor
from torch import nn
from torch.optim import SGD
from torch.optim import AdamW
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.lr_scheduler import MultiStepLR

from tune_topkd.config import RecipeConfig
from tune_topkd.config import StudentConfig
from tune_topkd.config import TrialConfig
from tune_topkd.data import AnySplit
from tune_topkd.data import Batch
from tune_topkd.data import Dataset
from tune_topkd.data import FileSplit
from tune_topkd.data import batches_of
from tune_topkd.data import count_hits
from tune_topkd.data import load_dataset
from tune_topkd.data import load_saved
from tune_topkd.errors import TuneTopKDError
from tune_topkd.loss import CELoss
from tune_topkd.loss import LossState
from tune_topkd.loss import build_loss
from tune_topkd.models import WEIGHTS_KEY
from tune_topkd.models import build_configured
from tune_topkd.models import freeze_backbone
from tune_topkd.models import laid_out
from tune_topkd.models import load_backbone
from tune_topkd.models import network_fingerprint
from tune_topkd.models import read_checkpoint
from tune_topkd.storage import file_hash
from tune_topkd.storage import write_atomically
from tune_topkd.teacher import TeacherLogits
from tune_topkd.teacher import teacher_identity

TRAIN_PREFIX = "train_"
"""Before the name of each unweighted term of the loss: `train_ce`, `train_tdl`, …"""
TRAIN_LOSS = "train_loss"
"""The loss that was minimised, mean over the epoch's batches, as are its terms."""
VAL_TOP1 = "val_top1"
"""Percent of the validation images whose label has the largest logit."""
VAL_TOP5 = "val_top5"
"""Percent with the label among the five largest logits; only where there are more than five classes."""
TEST_TOP1 = "test_top1"
"""Instead of `val_top1` where the data's selection is `best_test_epoch`: of the test images; `test_top5` likewise."""
TEST_TOP5 = "test_top5"
BEST_TEST_TOP1 = "best_epoch_test_top1"
"""The highest `test_top1` of the epochs so far: selected on the test set, comparable only with rows that are too."""
LEARNING_RATE = "lr"
"""The learning rate of the epoch."""
EPOCH_SECONDS = "epoch_seconds"
"""Wall seconds of the epoch, training and validation."""
IMAGES_PER_SECOND = "images_per_second"
"""Training images by `epoch_seconds`."""

CHECKPOINT_NAME = "checkpoint.pt"
CODE_KEY = "code"
"""In a checkpoint's config: what the user's code computes that it names."""
LOSS_KEY = "loss"
"""In a checkpoint: what the loss keeps, where it keeps something."""

GPU_PART = 0.95
"""Of its share of a GPU's memory, what a training may allocate; the rest is for the CUDA context, which is not counted."""
LONGEST_WAIT_FOR_MEMORY = 60.0
"""Seconds that a training waits for its share of a GPU's memory."""
_FREE_ENOUGH = 0.8
"""Of that share: this process has its own context there already."""

_log = logging.getLogger(__name__)

Save: TypeAlias = Callable[[Path], None]


class CheckpointError(TuneTopKDError):
    """A checkpoint is missing or damaged; the message names it."""


class Reporter(Protocol):
    """What `train` tells its caller.

    Called once at the end of every epoch, on the thread of `train`, with the absolute epoch (from 1), its metrics and
    a function that writes a checkpoint of this epoch into a folder; `save` is only valid until the reporter returns.
    To stop the training, raise. Random numbers that a reporter draws do not change the training.
    """

    def __call__(self, epoch: int, metrics: Mapping[str, float], save: Save, /) -> None:
        """Take note of an epoch."""


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Give torch's generators back at the end as they were at the start."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def in_share(config: TrialConfig, device: torch.device, *, waits: bool = True) -> Iterator[None]:
    """Keep to the threads and the GPU memory that a training was given; if told to, wait for what the one before it had."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(config.threads or threads)
        if device.type == "cuda":
            share = 1.0 if config.gpu_share is None else config.gpu_share
            torch.cuda.set_per_process_memory_fraction(GPU_PART * share if share < 1 else 1.0, device)
            if waits and config.gpu_share is not None:
                _await_memory(share, device)
        yield
    finally:
        torch.set_num_threads(threads)


def _await_memory(share: float, device: torch.device) -> None:
    """Wait until a GPU's memory is free as far as this share of it goes; a killed process's is for a while not."""
    gc.collect()
    torch.cuda.empty_cache()
    deadline = time.monotonic() + LONGEST_WAIT_FOR_MEMORY
    while True:
        free, total = torch.cuda.mem_get_info(device)
        if free >= _FREE_ENOUGH * share * total:
            return
        if time.monotonic() > deadline:
            _log.warning("only %.1f of the GPU's %.1f GB are free: going on with less", free / 1e9, total / 1e9)
            return
        time.sleep(0.5)


def null_reporter(epoch: int, metrics: Mapping[str, float], save: Save) -> None:
    """Listen to nothing and save nothing."""


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    `epoch` is the last one and `metrics` its metrics; `diverged` says that training stopped there because its loss was
    not finite. `model` is on the device it was trained on, in eval mode.
    """

    epoch: int
    metrics: dict[str, float]
    model: nn.Module
    diverged: bool


def default_device() -> torch.device:
    """The current GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_of(config: TrialConfig) -> torch.device:
    """Where a training takes place: on the CPU if it was given no part of a GPU."""
    return torch.device("cpu") if config.gpu_share == 0 else default_device()


def train(config: TrialConfig, report: Reporter = null_reporter, resume_from: Path | None = None) -> TrainResult:
    """Train the student of a config to its last epoch, or until its loss is not finite.

    The same config gives the same result, whatever the state of torch's global generator, which is left as it was.

    Args:
        config: all that the training depends on.
        report: told of every epoch.
        resume_from: a folder that `save` wrote a checkpoint of this same config into; training goes on after its
            epoch. If that was the last one, nothing is trained or reported and the result is that of the checkpoint.

    Raises:
        CheckpointError: `resume_from` holds no sound checkpoint.
        ValueError: what the config names does not exist or does not fit together, or the checkpoint is of another
            config.
    """
    device = device_of(config)
    with own_randomness(device), in_share(config, device):
        torch.manual_seed(config.seed % 2**64)
        trial = Training(config, device)
        if resume_from is not None:
            trial.restore(resume_from)
        while trial.epoch < config.recipe.epochs and not trial.diverged:
            trial.run_epoch()
            with own_randomness(device):
                report(trial.epoch, dict(trial.metrics), trial.save)
    trial.model.eval()
    return TrainResult(trial.epoch, trial.metrics, trial.model, trial.diverged)


def checkpoint_metrics(folder: Path) -> tuple[int, dict[str, float]]:
    """Epoch and metrics of the checkpoint in a folder, which is checked as a whole.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    content = _read(folder)
    return content["epoch"], content["metrics"]


class Training:
    """The state of one training between epochs: all of it is in a checkpoint, or follows from the config."""

    def __init__(self, config: TrialConfig, device: torch.device | None = None) -> None:
        """Build all that the config names.

        Args:
            config: all that the training depends on, but for torch's global generator, which initialises the weights.
            device: `device_of` the config if none is given.

        Raises:
            ValueError: what the config names does not exist or does not fit together.
        """
        device = device or device_of(config)
        self.config = config
        self.device = device
        self.dataset = _dataset(config)
        self.train_split = _with_workers(self.dataset.train, config).to(device)
        self.val_split = _with_workers(self.dataset.val, config).to(device)
        student = _student(config.student, self.dataset.num_classes).to(device)
        self.model = laid_out(student, self.train_split.batch_shape[0])
        self.loss = build_loss(config.method, config.loss)
        self.loss_state = LossState(self.loss, device)
        self.teacher = None if isinstance(self.loss, CELoss) else TeacherLogits(config, self.dataset, self.train_split)
        self.identity = _identity(config, self.dataset.num_classes, self.train_split.batch_shape)
        self.optimizer = _optimizer([self.model, self.loss], config.recipe, device)
        self.scheduler = _scheduler(self.optimizer, config.recipe)
        self.epoch = 0
        self.metrics: dict[str, float] = {}
        self.rng: dict[str, Tensor] = {}

    @property
    def diverged(self) -> bool:
        """Whether the loss of the last epoch was not finite."""
        return not math.isfinite(self.metrics.get(TRAIN_LOSS, 0.0))

    def run_epoch(self) -> None:
        """Train and validate one epoch; the results wait on the device until its end."""
        started = time.perf_counter()
        rate = self.scheduler.get_last_lr()[0]
        names, means, images = self.train_epoch()
        self.loss_state.check_parameters()
        with self._autocast():
            hits = count_hits(self.model, self.val_split, mean=self.dataset.mean, std=self.dataset.std)
        values: list[float] = torch.cat([means, 100 * hits.double() / len(self.val_split)]).tolist()
        self.scheduler.step()
        self.rng = _generator_states(self.device)  # before a reporter can draw from them
        self.epoch += 1
        seconds = time.perf_counter() - started
        on_test = self.config.data.selection == "best_test_epoch"
        top1, top5 = (TEST_TOP1, TEST_TOP5) if on_test else (VAL_TOP1, VAL_TOP5)
        best = self.metrics.get(BEST_TEST_TOP1, 0.0)
        self.metrics = dict(zip([*names, top1, top5], values, strict=True)) | {TRAIN_LOSS: values[0]}
        if self.dataset.num_classes <= 5:
            del self.metrics[top5]
        if on_test:
            self.metrics[BEST_TEST_TOP1] = max(best, self.metrics[TEST_TOP1])
        self.metrics |= {LEARNING_RATE: float(rate), EPOCH_SECONDS: seconds, IMAGES_PER_SECOND: images / seconds}

    def save(self, folder: Path) -> None:
        """Write a checkpoint into `folder`, which is made if need be; an older one in it is replaced in one step."""
        content = {
            WEIGHTS_KEY: self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": self.rng,
            "epoch": self.epoch,
            "metrics": self.metrics,
            "config": self.identity,
        }
        if loss := self.loss_state.state():
            content[LOSS_KEY] = loss
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CHECKPOINT_NAME, lambda file: torch.save(content, file))

    def restore(self, folder: Path) -> None:
        """Become what `save` found."""
        content = _read(folder)
        there, here = json.loads(content["config"]), json.loads(self.identity)
        if unknown := sorted(here.get(CODE_KEY, {}).keys() - there.setdefault(CODE_KEY, {}).keys()):
            _log.warning("%s does not say what was computed by: %s", folder / CHECKPOINT_NAME, ", ".join(unknown))
        there[CODE_KEY] = here.get(CODE_KEY, {}) | there[CODE_KEY]
        if changed := _changed(there, here | {CODE_KEY: here.get(CODE_KEY, {})}):
            told = "; ".join(changed)
            hint = " (code: what the network or loss of this name computes)" if f"{CODE_KEY}." in told else ""
            raise ValueError(f"{folder / CHECKPOINT_NAME}: is of another config: {told}{hint}")
        self.model.load_state_dict(content[WEIGHTS_KEY])
        try:
            self.loss_state.restore(content.get(LOSS_KEY, {}))
        except ValueError as error:
            raise ValueError(f"{folder / CHECKPOINT_NAME}: cannot be gone on with: {error}") from error
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        self.epoch, self.metrics, self.rng = content["epoch"], content["metrics"], content["rng"]
        torch.set_rng_state(self.rng["cpu"])
        if self.device.type == "cuda" and "cuda" in self.rng:
            torch.cuda.set_rng_state(self.rng["cuda"], self.device)

    def train_epoch(self) -> tuple[list[str], Tensor, int]:
        """Train the epoch after `epoch`: the names and means, over its batches, of loss and terms; how many images.

        The means are on the device.
        """
        names: list[str] = []
        values: list[Tensor] = []
        images = 0
        for size, total, terms in self.steps():
            values.append(torch.stack([total, *terms.values()]).detach())
            names = [TRAIN_LOSS, *(TRAIN_PREFIX + name for name in terms)]
            images += size
        return names, torch.stack(values).double().mean(0), images

    def steps(self) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
        """Train the epoch after `epoch` step by step: how many images, the loss and its unweighted terms, on the device."""
        self.model.train(not self.config.student.linear_probe)  # a probe's batch norms keep their statistics
        self.loss.train()
        batches = batches_of(self.config, self.dataset, self.train_split, self.epoch + 1)
        if self.teacher is not None:
            self.teacher.begin(self.epoch + 1)
        for number, batch in enumerate(batches):
            yield len(batch.labels), *self._step(batch, number)

    def _step(self, batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of the optimiser; the loss and its unweighted terms on this batch."""
        alpha = self.config.data.augment.mixup
        if alpha:
            share, other = _mixup(len(batch.labels), alpha, (self.config.seed, self.epoch + 1, number))
            other = other.to(self.device)
            images = share * batch.images + (1 - share) * batch.images[other]
            logits, taught = self._logits(images), self._taught(images, number)
            one, two = (self._terms(logits, taught, labels) for labels in (batch.labels, batch.labels[other]))
            terms = {name: share * one[name] + (1 - share) * two[name] for name in one}
        else:
            logits = self._logits(batch.images)
            terms = self._terms(logits, self._taught(batch.images, number), batch.labels)
        strength = self.config.recipe.distill_share(self.epoch + 1, self.config.method)
        total = self.loss.total({name: term if name == "ce" else strength * term for name, term in terms.items()})
        if not total.requires_grad:
            raise ValueError(
                f"method {self.config.method!r}: its loss has no gradient, so nothing can be learnt from it"
            )
        self.optimizer.zero_grad()
        torch.autograd.backward(total)
        if number == 0 and all(weight.grad is None for weight in self.model.parameters()):
            raise ValueError(f"method {self.config.method!r}: its loss has no gradient for the student")
        self.optimizer.step()
        return total, terms

    def _logits(self, images: Tensor) -> Tensor:
        with self._autocast():
            logits: Tensor = self.model(images)
            return logits

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.config.recipe.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _terms(self, logits: Tensor, taught: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        if taught is None:
            assert isinstance(self.loss, CELoss)
            return self.loss.terms(logits, None, labels)
        return self.loss.terms(logits, taught, labels)

    def _taught(self, images: Tensor, number: int) -> Tensor | None:
        """The teacher's logits of a batch, if there is a teacher."""
        return None if self.teacher is None else self.teacher.logits(images, number)


def _dataset(config: TrialConfig) -> Dataset:
    if config.dataset_file is not None:
        try:
            return load_saved(config.data, Path(config.dataset_file))
        except FileNotFoundError as error:
            _log.warning("the dataset is read anew: %s", error)
    return load_dataset(config.data)


def _with_workers(split: AnySplit, config: TrialConfig) -> AnySplit:
    """The split, decoded by as many processes as the training has threads where the config leaves it open."""
    threads = config.threads or 1
    if config.data.workers is None and threads > 1 and isinstance(split, FileSplit):
        return dataclasses.replace(split, workers=threads)
    return split


def _student(config: StudentConfig, num_classes: int) -> nn.Module:
    model = build_configured(config, num_classes=num_classes)
    if config.checkpoint is not None:
        load_backbone(model, Path(config.checkpoint), config.checkpoint_key)
    if config.linear_probe:
        freeze_backbone(model)
    return model


def _mixup(size: int, alpha: float, key: tuple[int, ...]) -> tuple[float, Tensor]:
    """The share of the first image, and for each image of a batch the one it is mixed with, `(size,)` on the CPU."""
    drawn = random.Random(repr(key))  # noqa: S311 (no secret)
    share = drawn.betavariate(alpha, alpha)
    others = list(range(size))
    drawn.shuffle(others)
    return share, torch.tensor(others)


_ADAMW = "tokens and positions do not decay, the warm-up comes before the schedule"
"""In the identity, as these rules have not always been so."""


def _identity(config: TrialConfig, num_classes: int, image_shape: tuple[int, int, int]) -> str:
    """The config as JSON, the files and the user's code that it names by content: a name says little of either."""
    content = config.model_dump(mode="json")
    content["teacher_checkpoint"] = teacher_identity(config)[1]
    if config.student.checkpoint is not None:
        content["student"]["checkpoint"] = file_hash(Path(config.student.checkpoint))
    for name in ("root", "download", "workers"):
        del content["data"][name]
    for name in ("teacher_bank", "dataset_file", "threads", "gpu_share"):
        del content[name]
    if config.recipe.optimizer == "adamw":
        content["adamw"] = _ADAMW
    if code := _code(config, num_classes, image_shape):
        content[CODE_KEY] = code
    return json.dumps(content, sort_keys=True)


def _code(config: TrialConfig, num_classes: int, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What the code of the user's computes that a config names: his networks and his loss."""
    code: dict[str, Any] = {}
    for role, network in {"student": config.student, "teacher": config.teacher}.items():
        if network is not None and ":" in network.name and not network.name.startswith(_LIBRARIES):
            code[role] = network_fingerprint(network, num_classes=num_classes, image_shape=image_shape)
    if ":" in config.method and (values := _loss_values(config, num_classes)):
        code["method"] = values
    return code


_LIBRARIES = ("cifar:", "torchvision:", "timm:")


def _loss_values(config: TrialConfig, num_classes: int) -> list[float]:
    """The loss of a batch of logits set by a formula, and sums of its gradient; nothing if it takes no such batch."""
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


def _optimizer(modules: Sequence[nn.Module], recipe: RecipeConfig, device: torch.device) -> Optimizer:
    """The optimiser of a student and its loss, whose weights are treated alike."""
    fused = device.type == "cuda"  # one kernel for all weights; on the CPU it gains nothing
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    if recipe.optimizer == "adamw":
        spared = {id(weight) for module in modules for weight in _undecayed(module)}
        groups = [
            {"params": [w for w in weights if id(w) not in spared], "weight_decay": recipe.weight_decay},
            {"params": [w for w in weights if id(w) in spared], "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=recipe.lr, fused=fused)
    return SGD(
        weights,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )


_TOKENS = ("cls_token", "class_token", "dist_token", "distill_token", "reg_token")
_POSITIONS = ("pos_embed", "pos_embedding", "relative_position_bias_table")


def _undecayed(module: nn.Module) -> Iterator[Tensor]:
    """What does not decay as vision transformers are trained: vectors, biases, tokens and embeddings of positions.

    A network, or a part of one, can name more of its own: `no_weight_decay()`, as timm's do.
    """
    own = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if callable(names := getattr(part, "no_weight_decay", None))
        for name in names()
    }
    for name, weight in module.named_parameters():
        leaf = name.rpartition(".")[2]
        if weight.ndim <= 1 or leaf in ("bias", *_TOKENS, *_POSITIONS) or name in own:
            yield weight


def _scheduler(optimizer: Optimizer, recipe: RecipeConfig) -> LRScheduler:
    if recipe.warmup_epochs:
        return LambdaLR(optimizer, functools.partial(_lr_factor, recipe=recipe))
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=recipe.epochs, eta_min=recipe.min_lr)
    milestones = recipe.milestone_epochs() if recipe.schedule == "step" else []
    return MultiStepLR(optimizer, milestones, recipe.gamma)


def _lr_factor(done: int, recipe: RecipeConfig) -> float:
    """The learning rate after so many epochs, in units of the recipe's: the schedule's times the warm-up's ramp.

    AdamW's warm-up ends at the recipe's rate, as timm has it: the schedule, whose epochs count on, has its say after it.
    """
    if recipe.optimizer == "adamw" and done < recipe.warmup_epochs:
        return recipe.warmup_start + (1 - recipe.warmup_start) * done / recipe.warmup_epochs
    factor = 1.0
    if recipe.schedule == "cosine":
        floor = recipe.min_lr / recipe.lr
        factor = floor + (1 - floor) * (1 + math.cos(math.pi * done / recipe.epochs)) / 2
    elif recipe.schedule == "step":
        factor = recipe.gamma ** sum(done >= milestone for milestone in recipe.milestone_epochs())
    ramp = min(done / recipe.warmup_epochs, 1.0)
    return factor * (recipe.warmup_start * (1 - ramp) + ramp)


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    on_gpu = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **on_gpu}


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CHECKPOINT_NAME
    try:
        content = read_checkpoint(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    keys = {WEIGHTS_KEY, "optimizer", "scheduler", "rng", "epoch", "metrics", "config"}
    if missing := keys - content.keys():
        raise CheckpointError(f"{path}: is no checkpoint of a training: it has no {', '.join(sorted(missing))}")
    return content


def _changed(there: Any, here: Any, key: str = "") -> list[str]:
    """Where two configs differ, one line for each dotted key."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        inner = [_changed(there.get(k), here.get(k), f"{key}.{k}" if key else k) for k in keys]
        return [line for lines in inner for line in lines]
    same = _alike(there, here) if key == f"{CODE_KEY}.method" else there == here
    return [] if same else [f"{key} was {there!r} and is now {here!r}"]


def _alike(there: Sequence[float], here: Sequence[float]) -> bool:
    """Whether these are the same numbers, up to what another machine's arithmetic may do."""
    pairs = zip(there, here, strict=False)
    return len(there) == len(here) and all(math.isclose(*pair, rel_tol=1e-4, abs_tol=1e-4) for pair in pairs)
