"""`python -m benchmarks.glyphs [--quick] [--write]`: what TopKD is worth on glyphs, part by part.

Every row is a student of `search_spaces/glyphs.yaml`, trained as it says, at the learning rate of the same small grid that
was best for this row on the validation split; its test top-1 is given as mean ± standard deviation over the seeds. The
teacher is one and the same. "TopKD, tuned" has the loss that a sweep of that search space found, `glyphs-tuned.yaml`; the
rows below it take one thing away from it. TopKD's other rows leave out the highest rate, at which the tuned row falls
apart. The figure shows the tuned loss at other K, each at the tuned row's learning rate.

Nothing here has a part in choosing K or weights: the test images are looked at for the table alone.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.__main__ import RESULTS
from benchmarks.__main__ import cores
from benchmarks.__main__ import machine
from tune_topkd.config import NO_FILES
from tune_topkd.config import PairConfig
from tune_topkd.config import SharedFiles
from tune_topkd.config import load_pair
from tune_topkd.data import load_dataset
from tune_topkd.evaluate import evaluate
from tune_topkd.export import load_tuned_config
from tune_topkd.loss import TopKDLoss
from tune_topkd.sweep.prepare import trial_with
from tune_topkd.teacher import Teacher
from tune_topkd.teacher import ensure_teacher
from tune_topkd.train import train

SPACE = Path(__file__).parents[1] / "search_spaces" / "glyphs.yaml"
TUNED = Path(__file__).parent / "glyphs-tuned.yaml"
GRID = (0.1, 0.2, 0.4, 0.8)
SEEDS = (0, 1, 2)
KS = (1, 2, 3, 5, 10, 20, 50)
MAIN = ("cross-entropy", "KD, T = 4", "TopKD, tuned")


class Undecoupled(TopKDLoss):
    """TopKD with one cosine over all classes in place of the three groups', weighed as they are together."""

    def _tdl(self, student: Tensor, scaled: Tensor) -> Tensor:
        distance = 1 - functional.cosine_similarity(student, scaled).mean()
        return (self.alpha + self.beta + 1) * distance


@dataclass(frozen=True)
class Job:
    """One training: a row's method and loss, a learning rate and a seed."""

    row: str
    method: str
    loss: tuple[tuple[str, Any], ...]
    lr: float
    seed: int


@dataclass(frozen=True)
class Result:
    """What a training came to, in percent."""

    val_top1: float
    test_top1: float
    seconds: float


def rows(tuned: Mapping[str, Any]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Method and loss of every row, in the table's order."""
    unscaled = {"scale_top": 1.0, "scale_last": 1.0, "scale_gt": 1.0, "shift": 0.0}
    return {
        "cross-entropy": ("ce", {}),
        "KD, T = 4": ("kd", {}),
        "TopKD, defaults": ("topkd", {}),
        "TopKD, tuned": ("topkd", tuned),
        "– scaling off (all w = 1, shift 0)": ("topkd", {**tuned, **unscaled}),
        "– decoupling off (one cosine over all classes)": (f"{__spec__.name}:Undecoupled", tuned),
        "– decoupled loss off (tdl_weight 0)": ("topkd", {**tuned, "tdl_weight": 0.0}),
        "– contrastive off (contrastive_weight 0)": ("topkd", {**tuned, "contrastive_weight": 0.0}),
    }


def run(pair: PairConfig, teacher: Teacher, job: Job) -> Result:
    """Train once, in a process of its own with one thread."""
    torch.set_num_threads(1)
    files = SharedFiles(teacher_checkpoint=str(teacher.path)) if job.method != "ce" else NO_FILES
    recipe = pair.recipe.model_copy(update={"lr": job.lr})
    of_job = pair.model_copy(update={"method": job.method, "loss": dict(job.loss), "recipe": recipe})
    config = trial_with(of_job, files, job.seed)
    started = time.perf_counter()
    result = train(config)
    seconds = time.perf_counter() - started
    dataset = load_dataset(pair.data)
    found = evaluate(result.model, dataset.test, mean=dataset.mean, std=dataset.std)
    return Result(result.metrics["val_top1"], found.top1, seconds)


class Bench:
    """Runs jobs, two or more at once, and keeps what they came to."""

    def __init__(self, pair: PairConfig, teacher: Teacher, pool: ProcessPoolExecutor) -> None:
        self.pair, self.teacher, self.pool = pair, teacher, pool
        self.results: dict[Job, Result] = {}

    def run(self, jobs: Sequence[Job]) -> None:
        """Run those jobs that were not run before."""
        fresh = [job for job in dict.fromkeys(jobs) if job not in self.results]
        futures = {job: self.pool.submit(run, self.pair, self.teacher, job) for job in fresh}
        for job, future in futures.items():
            self.results[job] = future.result()
            print(f"{job.row}, lr {job.lr:g}, seed {job.seed}: {self.results[job]}", file=sys.stderr, flush=True)

    def of(self, row: str, lr: float) -> list[Result]:
        """The results of a row at a learning rate, by seed."""
        return [result for job, result in self.results.items() if (job.row, job.lr) == (row, lr)]

    def best_lr(self, row: str) -> float:
        """The learning rate with the highest mean validation top-1."""
        rates = {job.lr for job in self.results if job.row == row}
        return max(sorted(rates), key=lambda lr: statistics.mean(r.val_top1 for r in self.of(row, lr)))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.glyphs", description="What TopKD is worth on glyphs.")
    parser.add_argument("--quick", action="store_true", help="small and rough: shows that it runs")
    parser.add_argument("--write", action="store_true", help=f"write table and figure to {RESULTS}")
    args = parser.parse_args()
    started = time.perf_counter()
    pair, grid, seeds, ks = load_pair(SPACE), GRID, SEEDS, KS
    if args.quick:
        pair, grid, seeds, ks = _quick(pair), (0.1, 0.4), (0,), (1, 20)
    tuned = load_tuned_config(TUNED).loss
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(cores(), mp_context=context) as pool:
        teacher = ensure_teacher(pair, Path(folder), train)
        bench = Bench(pair, teacher, pool)
        jobs = {
            name: [Job(name, method, tuple(loss.items()), lr, seed) for lr in grid for seed in seeds]
            for name, (method, loss) in rows(tuned).items()
        }
        bench.run([job for name in jobs for job in jobs[name] if name in MAIN or job.lr < max(grid)])
        ordering_seconds = time.perf_counter() - started
        lr = bench.best_lr("TopKD, tuned")
        for k in ks:
            of_k = [replace(job, row=f"K = {k}", loss=tuple({**tuned, "k": k}.items())) for job in jobs["TopKD, tuned"]]
            bench.run([job for job in of_k if job.lr == lr])
    lines = page(bench, list(jobs), ks, lr, ordering_seconds, time.perf_counter() - started)
    if not args.write:
        print("\n".join(lines))
        return
    slug = f"{date.today()}-glyphs-{cores()}-cores"
    RESULTS.mkdir(exist_ok=True)
    figure(bench, ks, lr, RESULTS / f"{slug}.png")
    path = RESULTS / f"{slug}.md"
    path.write_text("\n".join([*lines, f"![test top-1 against K]({slug}.png)", ""]))
    print(path)


def _quick(pair: PairConfig) -> PairConfig:
    """The same on few images for two epochs; the teacher's batches are small, so that it learns something at all."""
    assert pair.teacher is not None, "the glyphs space has a teacher"
    assert pair.teacher.recipe is not None, "which is trained"
    recipe = pair.teacher.recipe.model_copy(update={"epochs": 10, "batch_size": 32})
    changes = {
        "data": pair.data.model_copy(update={"kwargs": {"train_images": 3000, "test_images": 200}}),
        "recipe": pair.recipe.model_copy(update={"epochs": 2}),
        "teacher": pair.teacher.model_copy(update={"recipe": recipe}),
    }
    return pair.model_copy(update=changes)


def page(bench: Bench, names: Sequence[str], ks: Sequence[int], lr: float, ordering: float, total: float) -> list[str]:
    """The table of the rows, and that of K."""
    val = f"{bench.teacher.val_top1:.1f}"
    lines = [f"# Glyphs, {date.today()}", "", *machine()[:2]]
    lines += [
        f"- {len(bench.results)} trainings of {bench.pair.recipe.epochs} epochs, {cores()} at once: "
        f"{total / 60:.1f} min in all, {ordering / 60:.1f} min for the first table, the teacher's training in both",
        f"- teacher: validation top-1 {val} %",
        "",
        *(__doc__ or "").strip().splitlines()[2:],
        "",
        "| | best lr | validation top-1 | test top-1 | over KD | seeds | at other lr (test) |",
        "|---|---|---|---|---|---|---|",
    ]
    kd = statistics.mean(r.test_top1 for r in bench.of("KD, T = 4", bench.best_lr("KD, T = 4")))
    for name in names:
        best = bench.best_lr(name)
        results = bench.of(name, best)
        rates = sorted({job.lr for job in bench.results if job.row == name} - {best})
        others = ", ".join(f"{rate:g}: {_mean(bench.of(name, rate)):.1f}" for rate in rates)
        lines.append(
            f"| {name} | {best:g} | {spread([r.val_top1 for r in results])} | {spread([r.test_top1 for r in results])} "
            f"| {_mean(results) - kd:+.1f} | {len(results)} | {others} |"
        )
    lines += [
        "",
        f"Other K in the tuned loss, learning rate {lr:g}:",
        "",
        "| K | validation top-1 | test top-1 |",
        "|---|---|---|",
    ]
    for k in ks:
        results = bench.of(f"K = {k}", lr)
        lines.append(f"| {k} | {spread([r.val_top1 for r in results])} | {spread([r.test_top1 for r in results])} |")
    return [*lines, ""]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def _mean(results: Sequence[Result]) -> float:
    return statistics.mean(result.test_top1 for result in results)


def figure(bench: Bench, ks: Sequence[int], lr: float, path: Path) -> None:
    """Test top-1 against K, every seed a dot, with KD and cross-entropy as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    points = {k: [r.test_top1 for r in bench.of(f"K = {k}", lr)] for k in ks}
    axes.plot(
        list(points),
        [statistics.mean(values) for values in points.values()],
        "o-",
        color="#0072b2",
        label="TopKD, tuned but for K: mean",
    )
    for k, values in points.items():
        axes.plot([k] * len(values), values, ".", color="#56b4e9", markersize=5)
    for name, colour in (("KD, T = 4", "#d55e00"), ("cross-entropy", "#777777")):
        axes.axhline(_mean(bench.of(name, bench.best_lr(name))), color=colour, linestyle="--", label=f"{name}: mean")
    axes.set_xscale("log")
    axes.set_xticks(list(ks), [str(k) for k in ks])
    axes.minorticks_off()
    axes.set(
        xlabel="K", ylabel="test top-1, %", title="Glyphs: every dot is a seed, each method at its best learning rate"
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
