"""The loop over the epochs of a training: batches, teacher logits, loss, optimiser, validation, report."""

import contextlib
import dataclasses
import logging
import math
import random
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from typing import TypeAlias

import torch
from torch import Tensor
from torch import nn

from tune_topkd.config import OBJECTIVE
from tune_topkd.config import OBJECTIVE_TEST
from tune_topkd.config import StudentConfig
from tune_topkd.config import TrialConfig
from tune_topkd.data import AnySplit
from tune_topkd.data import Batch
from tune_topkd.data import Dataset
from tune_topkd.data import FileSplit
from tune_topkd.data import batches_of
from tune_topkd.data import load_dataset
from tune_topkd.data import load_saved
from tune_topkd.evaluate import Evaluation
from tune_topkd.evaluate import evaluate
from tune_topkd.loss import CELoss
from tune_topkd.loss import LossState
from tune_topkd.loss import build_loss
from tune_topkd.models import WEIGHTS_KEY
from tune_topkd.models import build_configured
from tune_topkd.models import freeze_backbone
from tune_topkd.models import load_backbone
from tune_topkd.models import to_channels_last
from tune_topkd.teacher import TeacherLogits
from tune_topkd.train.checkpoint import CHECKPOINT_NAME
from tune_topkd.train.checkpoint import EMA_KEY
from tune_topkd.train.checkpoint import HITS_KEY
from tune_topkd.train.checkpoint import LOSS_KEY
from tune_topkd.train.checkpoint import check_same_config
from tune_topkd.train.checkpoint import config_identity
from tune_topkd.train.checkpoint import load_checkpoint
from tune_topkd.train.checkpoint import write_checkpoint
from tune_topkd.train.device import device_of
from tune_topkd.train.device import in_share
from tune_topkd.train.device import memory_held
from tune_topkd.train.device import preserved_rng
from tune_topkd.train.group import ALONE
from tune_topkd.train.group import Group
from tune_topkd.train.optim import averaged
from tune_topkd.train.optim import build_optimizer
from tune_topkd.train.optim import build_scheduler
from tune_topkd.train.optim import trained_weights
from tune_topkd.train.ranks import train_on_ranks

TRAIN_PREFIX = "train_"
"""Before the name of each unweighted term of the loss: `train_ce`, `train_tdl`, …"""
TRAIN_LOSS = "train_loss"
"""The loss that is minimised; like its terms, the mean over the epoch's batches."""
VAL_TOP1 = OBJECTIVE
"""Percent of the validation images whose label has the largest logit."""
VAL_TOP5 = "val_top5"
"""Percent with the label among the five largest logits; only where there are more than five classes."""
TEST_TOP1 = OBJECTIVE_TEST
"""Of the test images, in place of `val_top1`, where the data's selection reads the test part; so is `test_top5`."""
TEST_TOP5 = "test_top5"
BEST_TEST_TOP1 = "best_epoch_test_top1"
"""The highest `test_top1` of the epochs so far: selected on the test set, comparable only with rows that are too."""
GRAD_NORM = "train_grad_norm"
"""Where `recipe.log_grad_norms` is set: the length of the gradient of all trained weights, before it is clipped; and with
`_` and the name of a term after it, that of the term, its weight and warm-up included. The means over the epoch's batches,
but one that is not finite is left out: a metric that is not finite ends a trial, and this changes none."""
EMA_SUFFIX = "_ema"
"""After `val_top1` or `test_top1`: of the moving average of the weights, where `recipe.ema` is set."""
LEARNING_RATE = "lr"
"""The learning rate of the epoch."""
EPOCH_SECONDS = "epoch_seconds"
"""Wall seconds of the epoch, training and validation."""
IMAGES_PER_SECOND = "images_per_second"
"""Training images per second of `epoch_seconds`."""
CPU_PERCENT = "cpu_percent"
"""CPU time of this process over the wall time of the epoch, in percent of one CPU; without the processes that load data."""

_log = logging.getLogger(__name__)

Save: TypeAlias = Callable[[Path], None]


class Reporter(Protocol):
    """What `train` reports to.

    Called at the end of every epoch, on the thread of `train`, with the absolute epoch (from 1), its metrics and
    `save`, which writes a checkpoint of this epoch into a folder and is valid until the reporter returns. To stop the
    training, raise. Random numbers that a reporter draws do not change the training.
    """

    def __call__(self, epoch: int, metrics: Mapping[str, float], save: Save, /) -> None:
        """Take note of an epoch."""


def null_reporter(epoch: int, metrics: Mapping[str, float], save: Save) -> None:
    """Ignore the report."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a training."""

    epoch: int
    """The last one that was trained."""
    metrics: dict[str, float]
    """Of that epoch."""
    model: nn.Module
    """The student in eval mode, on the device it was trained on; on the CPU where it was trained on several."""
    diverged: bool
    """Whether training stopped at that epoch because its loss was not finite."""


def train(config: TrialConfig, report: Reporter = null_reporter, resume_from: Path | None = None) -> TrainResult:
    """Train the student of a config to its last epoch, or until its loss is not finite.

    The same config gives the same result, whatever the state of torch's global generator, which is left as it was. With
    `ranks` of 2 or more the training runs in so many processes of this machine, started here and ended with this one.

    Args:
        config: everything that the training depends on.
        report: called after every epoch.
        resume_from: a folder with a checkpoint of the same config; training continues with the epoch after it. If that
            was the last epoch, nothing is trained or reported and the result is that of the checkpoint.

    Raises:
        CheckpointError: `resume_from` holds no checkpoint, or a damaged one.
        ProcessLostError: one of several processes died; the training can be tried again from its checkpoint.
        ValueError: what the config names does not exist or does not fit together, or the checkpoint is of another
            config.
    """
    if config.ranks > 1:
        return train_on_ranks(config, report, resume_from)
    device = device_of(config)
    with preserved_rng(device), in_share(config, device):
        torch.manual_seed(config.seed % 2**64)
        trial = Training(config, device)
        if resume_from is not None:
            trial.restore(resume_from)
        while trial.epoch < config.recipe.epochs and not trial.diverged:
            trial.run_epoch()
            with preserved_rng(device):
                report(trial.epoch, dict(trial.metrics), trial.save)
    trial.model.eval()
    return TrainResult(trial.epoch, trial.metrics, trial.model, trial.diverged)


class Training:
    """A training between two epochs; its whole state is in a checkpoint or follows from the config."""

    def __init__(self, config: TrialConfig, device: torch.device | None = None, group: Group = ALONE) -> None:
        """Build everything that the config names.

        Args:
            config: everything that the training depends on besides torch's global generator, which initialises the
                weights.
            device: where to train; by default `device_of` the config.
            group: the processes that train together, this one among them.

        Raises:
            ValueError: what the config names does not exist or does not fit together.
        """
        device = device or device_of(config)
        self.group = group
        self.config = config
        self.device = device
        self.dataset = _dataset(config)
        self.train_split = _with_workers(self.dataset.train, config).to(device)
        self.val_split = _with_workers(self.dataset.val, config).to(device)
        student = group.shared(build_student(config.student, self.dataset.num_classes).to(device))
        self.model = to_channels_last(student, self.train_split.batch_shape[0])
        self.averaging = group.averaging(self.model)
        self.loss = build_loss(config.method, config.loss)
        self.loss_state = LossState(self.loss, device)
        self.teacher: TeacherLogits | None = None
        if not isinstance(self.loss, CELoss):
            self.teacher = TeacherLogits(config, self.dataset, self.train_split, group.part)
        self.identity = config_identity(config, self.dataset)
        self.optimizer = build_optimizer([self.model, self.loss], config.recipe, device)
        self.scheduler = build_scheduler(self.optimizer, config.recipe)
        steps = math.ceil(len(self.train_split) / config.recipe.batch_size)
        self.ema = None if config.recipe.ema is None else averaged(self.model, config.recipe.ema, steps)
        self.epoch = 0
        self.grad_norms: list[Tensor] = []
        """Of the epoch's steps so far: that of the gradient and those of the terms, where they are logged."""
        self.metrics: dict[str, float] = {}
        self.hits: Tensor | None = None
        """Of which test images it is right, once the test set has been read at the end."""
        self.rng: dict[str, Tensor] = {}

    @property
    def diverged(self) -> bool:
        """Whether the loss of the last epoch was not finite."""
        return not math.isfinite(self.metrics.get(TRAIN_LOSS, 0.0))

    def run_epoch(self) -> None:
        """Train and validate one epoch; a GPU is waited for at its end only."""
        started, cpu_started = time.perf_counter(), time.process_time()
        rate = self.scheduler.get_last_lr()[0]
        names, means, images = self.train_epoch()
        self.loss_state.check_parameters()
        means = self.group.of_first(means)  # whether to go on is decided by it, by all alike
        accuracies = self._validate() if self.group.is_first else {}
        self.scheduler.step()
        self.rng = _rng_states(self.device)  # before a reporter can draw from them
        self.epoch += 1
        seconds = time.perf_counter() - started
        best = self.metrics.get(BEST_TEST_TOP1, 0.0)
        self.metrics = dict(zip(names, means.tolist(), strict=True)) | accuracies
        if self.config.data.selection == "best_test_epoch" and accuracies:
            self.metrics[BEST_TEST_TOP1] = max(best, accuracies[TEST_TOP1])
        self.metrics |= self._mean_grad_norms(names)
        self.metrics |= {LEARNING_RATE: float(rate), EPOCH_SECONDS: seconds, IMAGES_PER_SECOND: images / seconds}
        self.metrics[CPU_PERCENT] = 100 * (time.process_time() - cpu_started) / seconds
        self.metrics |= memory_held(self.device)

    def _mean_grad_norms(self, names: list[str]) -> dict[str, float]:
        """What is reported of the epoch's gradients, whose loss and terms have these names."""
        if not self.grad_norms:
            return {}
        of_terms = [f"{GRAD_NORM}_{name.removeprefix(TRAIN_PREFIX)}" for name in names[1:]]
        means = torch.stack(self.grad_norms).double().mean(0).tolist()
        found = dict(zip([GRAD_NORM, *of_terms], means, strict=True))
        return {name: mean for name, mean in found.items() if math.isfinite(mean)}

    def _validate(self) -> dict[str, float]:
        """The accuracies on the validation split, in percent, under the names of what that split is.

        Where the test set is read once, there are none but those of the last epoch, of the weights alone.
        """
        selection = self.config.data.selection
        if selection == "test_at_end" and self.epoch + 1 < self.config.recipe.epochs:
            return {}
        found, on_test = self._evaluated(self.model), selection in ("test_at_end", "best_test_epoch")
        self.hits = found.hits if selection == "test_at_end" else None
        top1, top5 = (TEST_TOP1, TEST_TOP5) if on_test else (VAL_TOP1, VAL_TOP5)
        accuracies = {top1: found.top1} | ({} if found.top5 is None else {top5: found.top5})
        if self.ema is not None and selection != "test_at_end":
            accuracies[f"{top1}{EMA_SUFFIX}"] = self._evaluated(self.ema).top1
        return accuracies

    def _evaluated(self, model: nn.Module) -> Evaluation:
        with self._autocast():
            return evaluate(model, self.val_split, mean=self.dataset.mean, std=self.dataset.std)

    def save(self, folder: Path) -> None:
        """Write a checkpoint into `folder`, which is made if need be; the one in it is replaced in one step."""
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
        if self.ema is not None:
            content[EMA_KEY] = self.ema.state_dict()
        if self.hits is not None:
            content[HITS_KEY] = self.hits.cpu()
        write_checkpoint(folder, content)

    def restore(self, folder: Path) -> None:
        """Take over the state in the checkpoint of a folder.

        Raises:
            CheckpointError: there is none, or it is damaged.
            ValueError: it is of another config, or its loss has another state.
        """
        content = load_checkpoint(folder)
        check_same_config(folder / CHECKPOINT_NAME, content["config"], self.identity)
        self.model.load_state_dict(content[WEIGHTS_KEY])
        try:
            self.loss_state.restore(content.get(LOSS_KEY, {}))
        except ValueError as error:
            raise ValueError(f"{folder / CHECKPOINT_NAME}: cannot be resumed from: {error}") from error
        if self.ema is not None:
            self.ema.load_state_dict(content[EMA_KEY])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        self.epoch, self.metrics, self.rng = content["epoch"], content["metrics"], content["rng"]
        torch.set_rng_state(self.rng["cpu"])
        if self.device.type == "cuda" and "cuda" in self.rng:
            torch.cuda.set_rng_state(self.rng["cuda"], self.device)

    def train_epoch(self) -> tuple[list[str], Tensor, int]:
        """Train the next epoch.

        Returns:
            The names of the loss and its terms, their means over the batches, float64 on the device, and the number of
            images.
        """
        self.grad_norms = []
        names: list[str] = []
        values: list[Tensor] = []
        images = 0
        for size, total, terms in self.steps():
            values.append(torch.stack([total, *terms.values()]).detach())
            names = [TRAIN_LOSS, *(TRAIN_PREFIX + name for name in terms)]
            images += size
        return names, torch.stack(values).double().mean(0), images

    def steps(self) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
        """Train the next epoch step by step.

        Yields:
            Of each step the number of images, the loss and its unweighted terms, scalars on the device.
        """
        self.model.train(not self.config.student.linear_probe)  # a probe's batch norms keep their statistics
        self.loss.train()
        batches = batches_of(self.config, self.dataset, self.train_split, self.epoch + 1, self.group.part)
        if self.teacher is not None:
            self.teacher.begin(self.epoch + 1)
        for number, batch in enumerate(batches):
            yield self.group.size * len(batch.labels), *self._step(batch, number)

    def _step(self, batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of the optimiser; the loss and its unweighted terms on this batch."""
        terms = self._batch_terms(batch, number)
        strength = self.config.recipe.distill_share(self.epoch + 1, self.config.method)
        strong = {name: term if name == "ce" else strength * term for name, term in terms.items()}
        total = self.loss.total(strong)
        if not total.requires_grad:
            raise ValueError(
                f"method {self.config.method!r}: its loss has no gradient, so nothing can be learnt from it"
            )
        self.optimizer.zero_grad()
        of_terms = self._term_grad_norms(strong) if self.config.recipe.log_grad_norms else []
        torch.autograd.backward(total)
        self.group.average(trained_weights([self.loss]))
        if number == 0 and all(weight.grad is None for weight in self.model.parameters()):
            raise ValueError(f"method {self.config.method!r}: its loss has no gradient for the student")
        if of_terms:
            of_all = (weight.grad for weight in trained_weights([self.model, self.loss]))
            self.grad_norms.append(torch.stack([self._grad_norm(of_all), *of_terms]))
        if self.config.recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(trained_weights([self.model, self.loss]), self.config.recipe.clip_grad)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return total, terms

    def _term_grad_norms(self, terms: Mapping[str, Tensor]) -> list[Tensor]:
        """How long the gradient of each term of the loss is, by its weight: scalars; nothing of the step is changed."""
        weights, found = trained_weights([self.model, self.loss]), []
        for name in terms:
            alone = self.loss.total({n: term if n == name else torch.zeros_like(term) for n, term in terms.items()})
            grads: tuple[Tensor | None, ...] = (None,)
            if alone.requires_grad:
                grads = torch.autograd.grad(alone, weights, retain_graph=True, allow_unused=True)
            found.append(self._grad_norm(self.group.averaged(grads)))
        return found

    def _grad_norm(self, grads: Iterable[Tensor | None]) -> Tensor:
        """The length of a gradient, which is 0 in what it has no part for; a float32 scalar on the device."""
        lengths = [torch.linalg.vector_norm(grad).float() for grad in grads if grad is not None]
        return torch.linalg.vector_norm(torch.stack(lengths)) if lengths else torch.zeros((), device=self.device)

    def _batch_terms(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """The unweighted terms of the loss on the epoch's batch `number`, mixed up where the augmentation says so."""
        alpha = self.config.data.augment.mixup
        if not alpha:
            logits, teacher_logits = self._logits(batch.images), self._teacher_logits(batch.images, number)
            whole = self.group.whole
            teacher_logits = None if teacher_logits is None else whole(teacher_logits)
            return self._terms(whole(logits), teacher_logits, whole(batch.labels))
        if self.group.size > 1:
            raise ValueError(
                "data.augment.mixup mixes images of the whole batch, of which each of several GPUs has a part"
            )
        share, other = draw_mixup(len(batch.labels), alpha, (self.config.seed, self.epoch + 1, number))
        other = other.to(self.device)
        images = share * batch.images + (1 - share) * batch.images[other]
        logits, teacher_logits = self._logits(images), self._teacher_logits(images, number)
        one, two = (self._terms(logits, teacher_logits, labels) for labels in (batch.labels, batch.labels[other]))
        return {name: share * one[name] + (1 - share) * two[name] for name in one}

    def _logits(self, images: Tensor) -> Tensor:
        with self._autocast():
            logits: Tensor = self.averaging(images)
            return logits

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.config.recipe.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _terms(self, logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        if teacher_logits is None:
            assert isinstance(self.loss, CELoss)
            return self.loss.terms(logits, None, labels)
        return self.loss.terms(logits, teacher_logits, labels)

    def _teacher_logits(self, images: Tensor, number: int) -> Tensor | None:
        """The teacher's logits of the epoch's batch `number`, if there is a teacher."""
        return None if self.teacher is None else self.teacher.logits(images, number)


def draw_mixup(size: int, alpha: float, key: tuple[int, ...]) -> tuple[float, Tensor]:
    """How a batch is mixed up.

    Args:
        size: images of the batch, B.
        alpha: of the Beta distribution that the share is drawn from.
        key: what the draw is a function of.

    Returns:
        The share of an image in its mixture, and for each image the one that it is mixed with, `(B,)` int64 on the CPU.
    """
    drawn = random.Random(repr(key))  # noqa: S311 (no secret)
    share = drawn.betavariate(alpha, alpha)
    others = list(range(size))
    drawn.shuffle(others)
    return share, torch.tensor(others)


def _dataset(config: TrialConfig) -> Dataset:
    if config.dataset_file is not None:
        try:
            return load_saved(config.data, Path(config.dataset_file))
        except FileNotFoundError as error:
            _log.warning("the dataset is read anew: %s", error)
    return load_dataset(config.data)


def _with_workers(split: AnySplit, config: TrialConfig) -> AnySplit:
    """The split, decoded by as many processes as the training has threads where the config does not say how many."""
    threads = config.threads or 1
    if config.data.workers is None and threads > 1 and isinstance(split, FileSplit):
        return dataclasses.replace(split, workers=threads)
    return split


def build_student(config: StudentConfig, num_classes: int) -> nn.Module:
    """The student of a training before its first step, on the CPU: what it begins with, and what of it is trained."""
    model = build_configured(config, num_classes=num_classes)
    if config.checkpoint is not None:
        load_backbone(model, Path(config.checkpoint), config.checkpoint_key)
    if config.linear_probe:
        freeze_backbone(model)
    return model


def _rng_states(device: torch.device) -> dict[str, Tensor]:
    on_gpu = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **on_gpu}
