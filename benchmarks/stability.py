"""`python -m benchmarks.stability [SPACE] [--quick] [--write]`: which trainings fall apart, and how early good ones show.

The first table trains each method at its defaults over the whole learning-rate range of a search space, with the gradient
as it is and clipped at a norm: validation top-1 as mean ± standard error over the seeds, and the worst of them. A cell whose
worst seed is below half of the row's best mean is marked with ✗: it fell apart.

The second draws configs from the space at random and trains each with a moving average of its weights beside it. It tells
Spearman's rank correlation between the validation top-1 at a part of the schedule, of the weights themselves and of their
average, and the one at the end; over all draws, and over the better half of them by their end.

No test image is looked at.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from benchmarks.__main__ import RESULTS
from benchmarks.__main__ import cores
from benchmarks.__main__ import machine
from benchmarks.pages import give
from benchmarks.pages import rank_cells
from benchmarks.pages import spread
from tune_topkd.config import NO_FILES
from tune_topkd.config import OBJECTIVE
from tune_topkd.config import OBJECTIVE_EMA
from tune_topkd.config import EmaConfig
from tune_topkd.config import Scalar
from tune_topkd.config import SharedFiles
from tune_topkd.config import SweepConfig
from tune_topkd.config import load_config
from tune_topkd.config import loss_part
from tune_topkd.config import recipe_part
from tune_topkd.search import RandomSampler
from tune_topkd.space import Space
from tune_topkd.sweep.prepare import trial_with
from tune_topkd.teacher import Teacher
from tune_topkd.teacher import ensure_teacher
from tune_topkd.train import train

SPACES = Path(__file__).parents[1] / "search_spaces"
METHODS = {"cross-entropy": "ce", "KD, T = 4": "kd", "TopKD, defaults": "topkd"}
CLIPS = (None, 3.0, 1.0, 0.3)
SEEDS = (0, 1, 2, 3, 4)
RATES = 6
"""Learning rates of the grid, even in the logarithm, both ends of the range among them."""
DRAWS = 120
PARTS = (0.25, 0.5, 0.75)
"""Of the schedule, at which the correlations are told."""


@dataclass(frozen=True)
class Job:
    """One training."""

    method: str
    params: tuple[tuple[str, Scalar], ...]
    clip: float | None
    seed: int
    has_ema: bool = False


@dataclass(frozen=True)
class Curve:
    """What a training came to, in percent by epoch; a training that diverged is 0 from there on."""

    raw: tuple[float, ...]
    ema: tuple[float, ...]


def run(config: SweepConfig, teacher: Teacher, job: Job) -> Curve:
    """Train once, in a process of its own with one thread."""
    torch.set_num_threads(1)
    params = dict(job.params)
    ema = EmaConfig() if job.has_ema else None
    recipe = config.recipe.model_copy(update={**recipe_part(params), "clip_grad": job.clip, "ema": ema})
    reports: list[Mapping[str, float]] = []
    files = SharedFiles(teacher_checkpoint=str(teacher.path)) if job.method != "ce" else NO_FILES
    pair = config.model_copy(update={"method": job.method, "loss": loss_part(params), "recipe": recipe})
    trial = trial_with(pair, files, job.seed)
    train(trial, lambda epoch, metrics, save: reports.append(metrics))
    lost = [0.0] * (recipe.epochs - len(reports))
    return Curve(*(tuple([r.get(name, 0.0) for r in reports] + lost) for name in (OBJECTIVE, OBJECTIVE_EMA)))


class Bench:
    """Runs jobs, as many at once as there are cores."""

    def __init__(self, config: SweepConfig, teacher: Teacher, pool: ProcessPoolExecutor) -> None:
        self.config, self.teacher, self.pool = config, teacher, pool
        self.count = 0

    def run(self, jobs: Sequence[Job]) -> dict[Job, Curve]:
        """What each job came to."""
        futures = {job: self.pool.submit(run, self.config, self.teacher, job) for job in jobs}
        curves = {job: future.result() for job, future in futures.items()}
        self.count += len(curves)
        print(f"{self.count} trainings", file=sys.stderr, flush=True)
        return curves


def clipping(
    bench: Bench, rates: Sequence[float], clips: Sequence[float | None], seeds: Sequence[int]
) -> Iterator[str]:
    """The table of methods and clips by learning rate."""
    yield "| | clip | " + " | ".join(f"lr {rate:.2g}" for rate in rates) + " | best |"
    yield "|---|---|" + "---|" * (len(rates) + 1)
    for name, method in METHODS.items():
        for clip in clips:
            jobs = {rate: [Job(method, (("lr", rate),), clip, seed) for seed in seeds] for rate in rates}
            curves = bench.run([job for of_rate in jobs.values() for job in of_rate])
            ends = {rate: [curves[job].raw[-1] for job in of_rate] for rate, of_rate in jobs.items()}
            best = max(map(statistics.mean, ends.values()))
            cells = [f"{spread(values)} ({min(values):.1f}){fallen(values, best)}" for values in ends.values()]
            yield f"| {name} | {'–' if clip is None else f'{clip:g}'} | {' | '.join(cells)} | {best:.1f} |"


def fallen(values: Sequence[float], best: float) -> str:
    """A mark for a cell that fell apart."""
    return " ✗" if min(values) < best / 2 else ""


def ranks(bench: Bench, clips: Sequence[float | None], draws: int) -> Iterator[str]:
    """The table of rank correlations."""
    yield "| clip | draws | at epoch | all: weights | all: average | better half: weights | better half: average |"
    yield "|---|---|---|---|---|---|---|"
    space, epochs = Space.of(bench.config), bench.config.recipe.epochs
    sampler = RandomSampler(space.axes(), seed=0)
    drawn = [tuple(space.params(sampler.ask(number)).items()) for number in range(draws)]
    for clip in clips:
        jobs = [Job(bench.config.method, params, clip, seed=0, has_ema=True) for params in drawn]
        curves = list(bench.run(jobs).values())
        for part in PARTS:
            epoch = max(1, round(part * epochs))
            shown = pd.DataFrame(
                [(c.raw[epoch - 1], c.ema[epoch - 1], c.raw[-1]) for c in curves], columns=["raw", "ema", "end"]
            )
            cells = rank_cells(shown, "raw", "ema")
            yield f"| {'–' if clip is None else f'{clip:g}'} | {draws} | {epoch} of {epochs} | {' | '.join(cells)} |"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.stability", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("space", nargs="?", default="digits", help="a search space with a teacher of its own and an lr")
    parser.add_argument("--quick", action="store_true", help="small and rough: shows that it runs")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of the first table")
    parser.add_argument(
        "--clips", type=float, nargs="*", help="norms of the first table, besides the gradient as it is"
    )
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the second table; 0 leaves it out")
    parser.add_argument("--write", action="store_true", help=f"write the tables to {RESULTS}")
    args = parser.parse_args()
    started = time.perf_counter()
    config, count, draws = load_config(SPACES / f"{args.space}.yaml"), RATES, args.draws
    clips, seeds = CLIPS if args.clips is None else (None, *args.clips), tuple(range(args.seeds))
    if args.quick:
        config, clips, seeds, count, draws = _quick(config), (None, 1.0), (0, 1), 2, 6
    axis = next(axis for axis in Space.of(config).axes() if axis.name == "lr")
    rates = [float(axis.at(number / (count - 1))) for number in range(count)]
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(cores(), mp_context=context) as pool:
        bench = Bench(config, ensure_teacher(config, Path(folder), train), pool)
        tables = [*clipping(bench, rates, clips, seeds), *(["", *ranks(bench, (None, 1.0), draws)] if draws else [])]
    minutes = (time.perf_counter() - started) / 60
    lines = [f"# Stability of trainings on {args.space}, {date.today()}", "", *machine()[:2]]
    lines += [
        f"- {bench.count} trainings of {config.recipe.epochs} epochs, {cores()} at once: {minutes:.1f} min in all",
        f"- teacher: validation top-1 {bench.teacher.val_top1:.1f} %; seeds of the first table: {len(seeds)}",
        "",
        *paragraphs(draws),
        "",
        *tables,
        "",
    ]
    give(lines, f"stability-{args.space}-{cores()}-cores", args.write)


def paragraphs(draws: int) -> list[str]:
    """What the page's tables are."""
    first, second, last = (__doc__ or "").strip().split("\n\n")[1:]
    return "\n\n".join([first, *([second] if draws else []), last]).splitlines()


def _quick(config: SweepConfig) -> SweepConfig:
    """The same for three epochs, the teacher's training too."""
    assert config.teacher is not None, "the space has a teacher"
    assert config.teacher.recipe is not None, "which is trained"
    teacher = config.teacher.model_copy(update={"recipe": config.teacher.recipe.model_copy(update={"epochs": 3})})
    return config.model_copy(update={"teacher": teacher, "recipe": config.recipe.model_copy(update={"epochs": 4})})


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
