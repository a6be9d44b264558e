"""`python -m benchmarks.bounded [--seeds N] [--quick] [--write]`: ways to hold TopKD's gradient, side by side on glyphs.

Both of TopKD's cosine terms have a gradient ∝ 1 / ‖student logits‖. Each row trains TopKD at its defaults at three learning
rates of `search_spaces/glyphs.yaml`, up to the highest: validation top-1 as mean ± standard error over the seeds, and the
worst of them.

- **as it is**: the paper's loss and the field's plain SGD.
- **clipped**: the norm of the whole gradient, of all weights, is at most 1.0 (`recipe.clip_grad`).
- **a floor**: a student's length in a cosine is at least so much, so that a gradient is at most 1 / floor.
- **warm-up**: the distillation terms rise from 0 in the first three epochs (`recipe.distill_warmup`).
- **by term**: a sample's gradient at the logits is at most as long, from each distillation term, as cross-entropy's can be.

No test image is looked at.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from dataclasses import field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.__main__ import cores
from benchmarks.__main__ import machine
from benchmarks.pages import give
from benchmarks.pages import spread
from benchmarks.stability import SPACES
from benchmarks.stability import fallen
from tune_topkd.config import OBJECTIVE
from tune_topkd.config import Scalar
from tune_topkd.config import SharedFiles
from tune_topkd.config import SweepConfig
from tune_topkd.config import load_config
from tune_topkd.loss import top_k_decoupled_loss
from tune_topkd.loss import top_k_scaling
from tune_topkd.space import Space
from tune_topkd.sweep.prepare import trial_with
from tune_topkd.teacher import ensure_teacher
from tune_topkd.train import train

RATES = 3
SEEDS = 3
K, SCALES, TEMPERATURE = 5, {"scale_top": 2.0, "scale_last": 1.0, "scale_gt": 3.0, "shift": 0.1}, 0.1
"""TopKD's defaults."""


@dataclass(frozen=True)
class Way:
    """One way to hold the gradient."""

    name: str
    method: str = "topkd"
    loss: Mapping[str, Scalar] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


WAYS = (
    Way("as it is"),
    Way("clipped at 1.0", recipe={"clip_grad": 1.0}),
    Way("a floor of 3", "benchmarks.bounded:floored", {"floor": 3.0}),
    Way("a floor of 10", "benchmarks.bounded:floored", {"floor": 10.0}),
    Way("warm-up", recipe={"distill_warmup": 3}),
    Way("by term", "benchmarks.bounded:by_term"),
)


def floored(student: Tensor, teacher: Tensor, labels: Tensor, *, floor: float = 3.0) -> Tensor:
    """TopKD with a floor on the student's length in its cosines: below it a cosine is shrunk, its gradient is not raised."""
    scaled = top_k_scaling(teacher, labels, k=K, **SCALES)
    rows = torch.arange(len(student), device=student.device)
    unit = functional.normalize(teacher, dim=1)
    similarity = student / student.norm(dim=1, keepdim=True).clamp_min(floor) @ unit.T / TEMPERATURE
    contrastive = (functional.cross_entropy(similarity, rows) + functional.cross_entropy(similarity.T, rows)) / 2
    return functional.cross_entropy(student, labels) + _floored_distance(student, scaled, floor) + contrastive


def _floored_distance(student: Tensor, scaled: Tensor, floor: float) -> Tensor:
    order = scaled.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    positive = (ranks < K) & (scaled > 0)
    negative = (ranks >= order.shape[1] - K) & (scaled < 0)
    distance = student.new_zeros(())
    for group in (positive, negative, ~(positive | negative)):
        one, other = student * group, functional.normalize(scaled * group, dim=1)
        cosine = (one * other).sum(1) / one.norm(dim=1).clamp_min(floor)
        distance = distance + torch.where(group.any(1), 1 - cosine, 0.0).mean()
    return distance


class _Held(torch.autograd.Function):
    """The identity, whose gradient is no longer than cross-entropy's can be: √2 / B for each of B samples."""

    @staticmethod
    def forward(context: Any, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        longest = math.sqrt(2) / len(gradient)
        return gradient * (longest / gradient.norm(dim=1, keepdim=True).clamp_min(longest))


_held: Callable[[Tensor], Tensor] = _Held.apply


def by_term(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """TopKD whose two distillation terms each give a sample a gradient as long as cross-entropy's at most."""
    scaled = top_k_scaling(teacher, labels, k=K, **SCALES)
    rows = torch.arange(len(student), device=student.device)
    unit = functional.normalize(teacher, dim=1)
    similarity = functional.normalize(_held(student), dim=1) @ unit.T / TEMPERATURE
    contrastive = (functional.cross_entropy(similarity, rows) + functional.cross_entropy(similarity.T, rows)) / 2
    tdl = top_k_decoupled_loss(_held(student), scaled, k=K, alpha=1.0, beta=1.0)
    return functional.cross_entropy(student, labels) + tdl + contrastive


def run(config: SweepConfig, files: SharedFiles, way: Way, rate: float, seed: int) -> float:
    """Train once, in a process of its own with one thread; validation top-1 at the end in percent, 0 if it diverged."""
    torch.set_num_threads(1)
    changes = {"clip_grad": None, "ema": None, **way.recipe, "lr": rate}
    recipe = config.recipe.model_copy(update=changes)
    pair = config.model_copy(update={"method": way.method, "loss": dict(way.loss), "recipe": recipe})
    reports: list[Mapping[str, float]] = []
    train(trial_with(pair, files, seed), lambda epoch, metrics, save: reports.append(metrics))
    return reports[-1].get(OBJECTIVE, 0.0) if len(reports) == recipe.epochs else 0.0


def table(
    pool: ProcessPoolExecutor,
    config: SweepConfig,
    files: SharedFiles,
    ways: Sequence[Way],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> Iterator[str]:
    """A row for each way."""
    yield "| | " + " | ".join(f"lr {rate:.2g}" for rate in rates) + " | best |"
    yield "|---|" + "---|" * (len(rates) + 1)
    for way in ways:
        jobs = {rate: [pool.submit(run, config, files, way, rate, seed) for seed in seeds] for rate in rates}
        ends = {rate: [job.result() for job in of_rate] for rate, of_rate in jobs.items()}
        best = max(map(statistics.mean, ends.values()))
        cells = [f"{spread(values)} ({min(values):.1f}){fallen(values, best)}" for values in ends.values()]
        yield f"| {way.name} | {' | '.join(cells)} | {best:.1f} |"
        print(way.name, file=sys.stderr, flush=True)


def _quick(config: SweepConfig) -> SweepConfig:
    """The same for a few epochs of fewer images."""
    assert config.teacher is not None, "the space has a teacher"
    assert config.teacher.recipe is not None, "which is trained"
    data = config.data.model_copy(update={"kwargs": {"train_images": 3000, "test_images": 200}})
    teacher = config.teacher.model_copy(update={"recipe": config.teacher.recipe.model_copy(update={"epochs": 8})})
    recipe = config.recipe.model_copy(update={"epochs": 4})
    return config.model_copy(update={"data": data, "teacher": teacher, "recipe": recipe})


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.bounded", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--keep", help="folder for the teacher and its bank; by default a scratch one")
    parser.add_argument("--quick", action="store_true", help="small and rough: shows that it runs")
    parser.add_argument("--write", action="store_true", help="keep the page in benchmarks/results")
    args = parser.parse_args()
    started = time.perf_counter()
    config, count, seeds = load_config(SPACES / "glyphs.yaml"), RATES, range(args.seeds)
    if args.quick:
        config, count, seeds = _quick(config), 1, range(1)
    axis = next(axis for axis in Space.of(config).axes() if axis.name == "lr")
    rates = [float(axis.at((number + 1) / count)) for number in range(count)]
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(cores(), mp_context=context) as pool:
        folder = Path(args.keep or scratch)
        teacher = ensure_teacher(config, folder, train)
        files = SharedFiles(teacher_checkpoint=str(teacher.path), teacher_bank=str(folder / "bank"))
        rows = list(table(pool, config, files, WAYS, rates, seeds))
    minutes = (time.perf_counter() - started) / 60
    lines = [f"# Ways to hold TopKD's gradient, {date.today()}", "", *machine()[:2]]
    count = len(WAYS) * len(rates) * len(seeds)
    lines += [f"- {count} trainings of {config.recipe.epochs} epochs, {cores()} at once: {minutes:.1f} min in all", ""]
    give([*lines, *(__doc__ or "").strip().splitlines()[2:], "", *rows, ""], "bounded-glyphs", args.write)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
