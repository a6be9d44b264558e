"""`python -m benchmarks.record [SPACE] [--draws N] [--first N] [--at-once N]`: curves of random trainings, for replay.

Draws configs from a search space at random, trains each to the full budget with a moving average of its weights, and adds a
line of JSON to `benchmarks/recorded/SPACE.jsonl`: its number, its parameters, the seed of its training (its number, so that
the spread over seeds is in the record), the validation top-1 of the weights and of their average by epoch, and the test
top-1 at the end, all in percent. Draws that are there already are passed over. `--baselines` adds cross-entropy and KD over
the learning rates of the space instead.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import cores
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
from tune_topkd.data import load_dataset
from tune_topkd.evaluate import evaluate
from tune_topkd.search import RandomSampler
from tune_topkd.space import Axis
from tune_topkd.space import Space
from tune_topkd.space import lattice
from tune_topkd.sweep.prepare import trial_with
from tune_topkd.teacher import ensure_teacher
from tune_topkd.train import train

SPACES = Path(__file__).parents[1] / "search_spaces"
RECORDED = Path(__file__).parent / "recorded"
DRAWS = 200
BASELINES = 24
"""Trainings of each baseline."""


def record(
    config: SweepConfig, shared: SharedFiles, method: str, number: int, params: Mapping[str, Scalar], seed: int
) -> dict[str, Any]:
    """Train once, in a process of its own with one thread; epochs after a divergence are 0."""
    torch.set_num_threads(1)
    files = NO_FILES if method == "ce" else shared
    loss = {**config.loss, **loss_part(params)} if method == config.method else {}
    recipe = config.recipe.model_copy(update={**recipe_part(params), "ema": EmaConfig()})
    pair = config.model_copy(update={"method": method, "loss": loss, "recipe": recipe})
    reports: list[Mapping[str, float]] = []
    result = train(trial_with(pair, files, seed), lambda epoch, metrics, save: reports.append(metrics))
    dataset = load_dataset(config.data)
    test = evaluate(result.model, dataset.test, mean=dataset.mean, std=dataset.std).top1
    lost = [0.0] * (recipe.epochs - len(reports))
    raw, ema = ([*(round(r.get(name, 0.0), 3) for r in reports), *lost] for name in (OBJECTIVE, OBJECTIVE_EMA))
    clip = {} if recipe.clip_grad is None else {"clip_grad": recipe.clip_grad}
    short = clip | {name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in params.items()}
    return {"method": method, "number": number, "seed": seed, "params": short, "val": raw, "ema": ema, "test": test}


def draws(config: SweepConfig, first: int, count: int) -> Iterator[tuple[str, int, Mapping[str, Scalar], int]]:
    """Random points of the space: method, number, parameters, training seed."""
    space = Space.of(config)
    sampler = RandomSampler(space.axes(), seed=0)
    for number in range(first, first + count):
        yield config.method, number, space.params(sampler.ask(number)), number


def baselines(config: SweepConfig, count: int) -> Iterator[tuple[str, int, Mapping[str, Scalar], int]]:
    """The same for the baselines: the learning rates of the space, evenly, at the recipe's other values."""
    axes: list[Axis] = [axis for axis in Space.of_recipe(config).axes() if axis.name == "lr"]
    for method in ("ce", "kd"):
        for number, params in enumerate(lattice(axes, count)):
            yield method, number, params, number


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.record", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("space", nargs="?", default="glyphs")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument(
        "--keep", help="folder for the teacher and its bank, to have them again; by default a scratch one"
    )
    parser.add_argument("--at-once", type=int, default=cores())
    args = parser.parse_args()
    config = load_config(SPACES / f"{args.space}.yaml")
    RECORDED.mkdir(exist_ok=True)
    path = RECORDED / f"{args.space}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    known = {(line["method"], line["number"]) for line in map(json.loads, lines)}
    wanted = baselines(config, BASELINES) if args.baselines else draws(config, args.first, args.draws)
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.at_once, mp_context=context) as pool:
        folder = Path(args.keep or scratch)
        teacher = ensure_teacher(config, folder, train)
        shared = SharedFiles(teacher_checkpoint=str(teacher.path), teacher_bank=str(folder / "bank"))
        print(f"teacher: validation top-1 {teacher.val_top1:.1f} %", file=sys.stderr, flush=True)
        jobs = [pool.submit(record, config, shared, *job) for job in wanted if job[:2] not in known]
        for done, job in enumerate(as_completed(jobs), 1):
            with path.open("a") as file:
                file.write(json.dumps(job.result()) + "\n")
            print(f"{done} of {len(jobs)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
