"""What the losses cost: forward and backward against cross-entropy, and the TopKD loss within a training step.

In CPU time, on one thread, which is what a sweep gives a trial by default; batches of 64. The step is what
`tune_topkd.train` does for a batch once the teacher's logits are there: forward, loss, backward, SGD with momentum. A
loss alone runs from the student's logits, as a leaf, to their gradient.
"""

from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor
from torch import nn
from torch.nn import functional

from benchmarks.ratio import Ratio
from benchmarks.ratio import cpu_seconds
from benchmarks.ratio import in_turns
from tune_topkd.loss import DKDLoss
from tune_topkd.loss import KDLoss
from tune_topkd.loss import LogitStandardKDLoss
from tune_topkd.loss import TopKDLoss
from tune_topkd.models import build_model

BATCH = 64
CLASSES = (10, 100, 1000)
LOSSES = (TopKDLoss, KDLoss, DKDLoss, LogitStandardKDLoss)
GOAL = "at most 0.05"
CROSS_ENTROPY = "torch cross-entropy"

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(quick: bool) -> list[Ratio]:
    """The losses against cross-entropy, and the TopKD loss as a share of two students' steps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    turns, calls, steps = (3, 20, 1) if quick else (11, 50, 3)
    ratios = [ratio for classes in CLASSES for ratio in _against_cross_entropy(classes, turns, calls)]
    digits = build_model("digits_cnn_tiny", num_classes=10)
    resnet = torchvision.models.resnet18(num_classes=100)
    ratios += _within_a_step("digits_cnn_tiny, 8×8", digits, torch.randn(BATCH, 1, 8, 8), 10, turns, calls)
    ratios += _within_a_step("resnet18, 32×32", resnet, torch.randn(BATCH, 3, 32, 32), 100, turns, steps)
    return ratios


def _against_cross_entropy(classes: int, turns: int, calls: int) -> list[Ratio]:
    logits = _logits(classes)
    losses: dict[str, Criterion] = {CROSS_ENTROPY: _cross_entropy, **{loss.__name__: loss() for loss in LOSSES}}
    measures = {name: partial(cpu_seconds, partial(_pass, loss, *logits), calls) for name, loss in losses.items()}
    times = _warm(measures, turns)
    return [
        Ratio(f"{loss.__name__}, {classes} classes", CROSS_ENTROPY, times[loss.__name__], times[CROSS_ENTROPY], "s")
        for loss in LOSSES
    ]


def _within_a_step(name: str, model: nn.Module, images: Tensor, classes: int, turns: int, calls: int) -> list[Ratio]:
    student, teacher, labels = _logits(classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    topkd = TopKDLoss()

    def step(criterion: Criterion) -> None:
        loss = criterion(model(images), teacher, labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    times = _warm(
        {
            "loss": partial(cpu_seconds, partial(_pass, topkd, student, teacher, labels), max(calls, 20)),
            "step": partial(cpu_seconds, partial(step, topkd), calls),
            "plain step": partial(cpu_seconds, partial(step, _cross_entropy), calls),
        },
        turns,
    )
    where = f"{name}, {classes} classes"
    return [
        Ratio(f"TopKDLoss alone, {where}", "the whole step with it", times["loss"], times["step"], "s", GOAL),
        Ratio(f"step with TopKDLoss, {where}", "step with cross-entropy", times["step"], times["plain step"], "s"),
    ]


def _warm(measures: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    in_turns(measures, 1)
    return in_turns(measures, turns)


def _logits(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The student's as a leaf, the teacher's, and labels."""
    student = (3 * torch.randn(BATCH, classes)).requires_grad_()
    return student, 3 * torch.randn(BATCH, classes), torch.randint(classes, (BATCH,))


def _pass(loss: Criterion, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    student.grad = None
    torch.autograd.backward(loss(student, teacher, labels))


def _cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(student, labels)
