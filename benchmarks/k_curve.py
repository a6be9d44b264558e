"""`python -m benchmarks.k_curve [SPACE] [--params FILE] [--seeds N] [--ks K…] [--write]`: top-1 against K, all else held.

Trains one config with each K on the same seeds, from 100, and does so for two: the parameters of a YAML file, by default the
answer that a confirmed sweep of the space gave, and the method's defaults at that answer's learning rate. No K is chosen by
these values, so they are told on the test set, after the last epoch.

For each K: mean ± standard error, the worst seed, and by how much it is below the best K: the mean of the differences seed
by seed, with an interval that holds for all pairs of K at once (Student's t, Bonferroni), since the best is chosen by the
same values. An F-test over all K at once (one-way analysis of variance) sees smaller differences, but not between which K
they are. Where neither finds a difference the curve is flat as far as these seeds tell.
"""

import argparse
import math
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
from concurrent.futures import as_completed
from datetime import date
from pathlib import Path

import yaml
from scipy import stats

from benchmarks.__main__ import cores
from benchmarks.__main__ import machine
from benchmarks.pages import give
from benchmarks.pages import spread
from benchmarks.record import RECORDED
from benchmarks.record import SPACES
from benchmarks.record import record
from tune_topkd.config import Scalar
from tune_topkd.config import SharedFiles
from tune_topkd.config import load_config
from tune_topkd.teacher import ensure_teacher
from tune_topkd.train import train
from tune_topkd.verdict import mean_interval

KS = (1, 2, 3, 5, 9, 15, 25, 40, 70, 99)
FIRST_SEED = 100
_ALPHA = 0.05
Values = Mapping[int, Mapping[int, float]]
"""By K and seed: test top-1 at the end, in percent."""


def table(values: Values) -> Iterator[str]:
    """A row for each K, and the sentence below."""
    means = {k: statistics.fmean(by_seed.values()) for k, by_seed in values.items()}
    best = max(means, key=lambda k: means[k])
    yield "| K | test top-1 % | worst seed | below the best K by |"
    yield "|--:|--:|--:|--:|"
    apart: list[int] = []
    for k, by_seed in values.items():
        below = [values[best][seed] - value for seed, value in by_seed.items()]
        interval = mean_interval(below, together=math.comb(len(values), 2))
        cell = "the best" if k == best else f"{statistics.fmean(below):.2f}"
        if k != best and interval is not None:
            cell += f" ({interval.low:+.2f} to {interval.high:+.2f})"
            apart += [k] if interval.excludes_zero else []
        yield f"| {k} | {spread(list(by_seed.values()), 2)} | {min(by_seed.values()):.2f} | {cell} |"
    yield ""
    least, most = min(means.values()), max(means.values())
    overall = stats.f_oneway(*(list(by_seed.values()) for by_seed in values.values()))
    yield f"All K at once: F = {overall.statistic:.2f}, p = {overall.pvalue:.2f}."
    if not apart:
        how = "Flat" if overall.pvalue >= _ALPHA else "Not flat as a whole, though pair by pair it does not show"
        yield f"{how}: no K is told apart from K = {best}; the means lie within {most - least:.2f} points."
        return
    equal = [k for k in values if k not in apart]
    where = "inside the range" if min(values) < min(equal) and max(equal) < max(values) else "up to an end of the range"
    others = f"; K = {', '.join(str(k) for k in equal if k != best)} not" if len(equal) > 1 else ""
    yield f"Told apart from K = {best}: K = {', '.join(map(str, apart))}{others}. The optimum lies {where}."


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.k_curve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("space", nargs="?", default="glyphs")
    parser.add_argument("--params", type=Path, help="default: benchmarks/recorded/SPACE-answer.yaml")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ks", type=int, nargs="+", default=KS)
    parser.add_argument("--epochs", type=int, help="of a training, and at most of the teacher's; to try it out")
    parser.add_argument("--at-once", type=int, default=cores())
    parser.add_argument("--write", action="store_true", help="write the page to benchmarks/results")
    args = parser.parse_args()
    config = load_config(SPACES / f"{args.space}.yaml")
    assert config.teacher is not None, "the space has a teacher"
    assert config.teacher.recipe is not None, "which is trained"
    if args.epochs:
        recipe = config.teacher.recipe.model_copy(update={"epochs": min(args.epochs, config.teacher.recipe.epochs)})
        teacher = config.teacher.model_copy(update={"recipe": recipe})
        of_student = config.recipe.model_copy(update={"epochs": args.epochs})
        config = config.model_copy(update={"teacher": teacher, "recipe": of_student})
    given = yaml.safe_load((args.params or RECORDED / f"{args.space}-answer.yaml").read_text())
    held: dict[str, Mapping[str, Scalar]] = {"the answer": given, "the defaults": {"lr": given["lr"]}}
    seeds = range(FIRST_SEED, FIRST_SEED + args.seeds)
    started = time.perf_counter()
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.at_once, mp_context=context) as pool:
        teacher_file = ensure_teacher(config, Path(scratch), train)
        shared = SharedFiles(teacher_checkpoint=str(teacher_file.path), teacher_bank=str(Path(scratch) / "bank"))
        jobs = {
            pool.submit(record, config, shared, config.method, seed, {**params, "k": k}, seed): (name, k, seed)
            for name, params in held.items()
            for seed in seeds
            for k in args.ks
        }
        for done, _ in enumerate(as_completed(jobs), 1):
            print(f"{done} of {len(jobs)}", file=sys.stderr, flush=True)
    values: dict[str, dict[int, dict[int, float]]] = {name: {k: {} for k in args.ks} for name in held}
    for job, (name, k, seed) in jobs.items():
        values[name][k][seed] = job.result()["test"]
    give(_page(args.space, held, values, seeds, time.perf_counter() - started), f"k-curve-{args.space}", args.write)


def _page(
    space: str,
    held: Mapping[str, Mapping[str, Scalar]],
    values: Mapping[str, Values],
    seeds: Sequence[int],
    seconds: float,
) -> list[str]:
    lines = [f"# Top-1 against K on {space}", "", *(__doc__ or "").strip().splitlines()[2:], "", *machine()[:2]]
    lines += [f"- seeds {seeds[0]} to {seeds[-1]}; {seconds / 60:.0f} minutes in all, {date.today()}"]
    for name, params in held.items():
        what = ", ".join(f"{n} {v}" for n, v in params.items() if n != "k")
        lines += [
            "",
            f"## With all else as in {name}",
            "",
            f"{what}; the rest at the defaults.",
            "",
            *table(values[name]),
        ]
    return [*lines, ""]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
