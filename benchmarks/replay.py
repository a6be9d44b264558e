"""`python -m benchmarks.replay [--samplers | --endings] [--seeds N] [--quick] [--write]`: what sweeps find, by the hundred.

Every sweep is a real one (sampler, ASHA, ledger, what TPE is told) on the simulated executor, four trials at once; its
trainings are drawn from recorded ones of glyphs (`benchmarks/record.py`, `benchmarks/surrogate.py`). The budget is that of
so many trainings to the end; **used** is what sweeps took of it. **Found** is the expected value of the config that a sweep
ends with, in percent of validation top-1; **regret** is by how much the best expected value of its space, over 20,000
points, is above that: what a user would lose. **Optimism** is by how much the value that the sweep tells is above the
expected one: its luck, without finalists. All are means ± standard errors over the sweeps' seeds. Each space has a model of
its own, made of trainings with and without clipped gradients, and a model knows less of the best configs where it is made
of fewer trainings: **found** compares ways to search one space, not two spaces.

`unclipped` is the space without clipped gradients, moving averages and units of effect (`recorded/glyphs-unclipped.yaml`),
compared at its rungs by the weights' own accuracy; `default` is `search_spaces/glyphs.yaml`. A sweep that is **warm** begins
with the defaults and the three best trials of another one: of a related problem, `unclipped`, whose gradients are not
clipped, or of the same problem with other seeds.
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
from dataclasses import field
from datetime import date
from functools import cache
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.__main__ import RESULTS
from benchmarks.__main__ import cores
from benchmarks.__main__ import machine
from benchmarks.pages import give
from benchmarks.pages import rank_cells
from benchmarks.pages import spread
from benchmarks.surrogate import DEFAULTS
from benchmarks.surrogate import RECORDED
from benchmarks.surrogate import Recorded
from benchmarks.surrogate import Surrogate
from benchmarks.surrogate import recorded
from tune_topkd.config import OBJECTIVE
from tune_topkd.config import OBJECTIVE_EMA
from tune_topkd.config import SAMPLERS
from tune_topkd.config import Override
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.config import load_config
from tune_topkd.execution.simulated import SimulatedTrial
from tune_topkd.execution.simulated import VirtualClock
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import SweepState
from tune_topkd.search import RandomSampler
from tune_topkd.search import Search
from tune_topkd.space import Space
from tune_topkd.sweep.preflight import first_proposals
from tune_topkd.sweep.warm_start import WARM_STARTS

SPACES = {
    "unclipped": RECORDED / "glyphs-unclipped.yaml",
    "default": Path(__file__).parents[1] / "search_spaces" / "glyphs.yaml",
}
AT_ONCE = 4
SEEDS = 100
ANOTHER = 10_000
"""What is added to the seed of the sweep that another one is begun with: their proposals and their luck differ."""
SEED_NOISE = {"unclipped": 1.4, "default": 1.0}
"""Standard deviation over seeds of a good config's top-1, in points. Two clipped ones had 0.8 and 1.4 over a dozen seeds
each; unclipped ones 1.2 to 1.5, and up to 6.5 where trainings fell apart."""
FILES = {"unclipped": ("glyphs-unclipped",), "default": ("glyphs-clip", "glyphs-clip-1", "glyphs")}
"""The recorded trainings that a space's model is made of."""
POINTS = 20_000
"""Of each space, among which the best is looked for."""
PARTS = (0.25, 0.5, 0.75)
"""Of the schedule, at which correlations are told."""
GOOD, BAD = 64.0, 40.0
"""Validation top-1 in percent."""


@dataclass(frozen=True)
class Variant:
    """A way to search."""

    name: str
    space: str
    budget: int
    """In trainings to the end."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of the space's YAML, by dotted key."""
    warm: "Variant | None" = None
    """The sweep whose three best trials are tried first."""


_COLD = Variant("unclipped", "unclipped", 40)
_ALIKE = Variant("default", "default", 40)
VARIANTS = (
    *(Variant("default", "default", budget) for budget in (20, 40)),
    Variant("default, rungs by the weights' own accuracy", "default", 40, {"sweep.rung_metric": OBJECTIVE}),
    Variant("default, every trial to the end", "default", 40, {"sweep.asha": None}),
    Variant("random, every trial to the end", "default", 40, {"sweep.sampler": "random", "sweep.asha": None}),
    Variant("random, every trial to the end", "default", 300, {"sweep.sampler": "random", "sweep.asha": None}),
    *(Variant("default, warm from `unclipped` at 40", "default", budget, warm=_COLD) for budget in (10, 20)),
    *(Variant("default, warm from another `default` at 40", "default", budget, warm=_ALIKE) for budget in (10, 20)),
    _COLD,
    Variant("unclipped", "unclipped", 80),
)
SAMPLER_VARIANTS = tuple(
    Variant(f"default, by the sampler {name}", "default", 40, {"sweep.sampler": name}) for name in SAMPLERS
)
ENDING_VARIANTS = (
    Variant("default", "default", 80),
    *(
        Variant(
            f"default, to a plateau: {newest} trials, {points:g} points", "default", 80, {"sweep.plateau": settings}
        )
        for newest, points in ((10, 1.0), (20, 1.0), (30, 1.0), (20, 0.5), (20, 2.0))
        for settings in ({"newest": newest, "points": points},)
    ),
)


@dataclass(frozen=True)
class Found:
    """What one sweep ended with."""

    params: Mapping[str, Scalar]
    value: float
    """As the sweep tells it."""
    expected: float
    """As the model of the trainings has it."""
    trainings: float = 0.0
    """To the end that its epochs are as long as."""


@cache
def surrogate(space: str) -> Surrogate:
    """The model of a space's trainings, made once in a process."""
    return Surrogate(recorded(*FILES[space]), SEED_NOISE[space])


def config_of(variant: Variant, seed: int) -> SweepConfig:
    """The sweep of a variant, with more trials than its budget allows."""
    changes = {"sweep.trials": 100 * variant.budget, "sweep.seed": seed, "baselines": None, **variant.changes}
    return load_config(SPACES[variant.space], [Override(key, value, variant.name) for key, value in changes.items()])


def sweep(variant: Variant, seed: int) -> Found:
    """Run one sweep of a variant."""
    config = config_of(variant, seed)
    first = first_proposals(config)
    if variant.warm is not None:
        space, defaults = Space.of(config), first[0]
        other = seed + ANOTHER
        for record in _run(config_of(variant.warm, other), variant.warm, [], other).ranked()[:WARM_STARTS]:
            known = {**DEFAULTS, **record.params}  # what the space did not search had its default
            wanted = {name: known.get(name, default) for name, default in defaults.items()}
            first.append(space.params(space.proposal(wanted)))
    state = _run(config, variant, first, seed)
    best = state.best()
    if best is None:
        return Found({}, 0.0, 0.0)
    trainings = sum(record.epoch for record in state.trials.values()) / config.recipe.epochs
    return Found(best.params, best.value or 0.0, float(surrogate(variant.space).mean([best.params])[0]), trainings)


def _run(config: SweepConfig, variant: Variant, first: Sequence[Mapping[str, Scalar]], seed: int) -> SweepState:
    """How it ended."""
    fixed = {**recipe_fixed(config), **config.loss}
    curves: dict[int, tuple[Any, Any]] = {}

    def formula(trial: SimulatedTrial, epoch: int) -> Mapping[str, float]:
        number = trial.record.key.number
        if number not in curves:
            curves[number] = surrogate(variant.space).curve({**fixed, **trial.record.params}, 100_003 * seed + number)
        raw, ema = curves[number]
        return {OBJECTIVE: float(raw[epoch - 1]), OBJECTIVE_EMA: float(ema[epoch - 1])}

    header = Header(
        sweep="replay", id="0", seed=seed, trials=config.sweep.trials, first=first or first_proposals(config)
    )
    clock = VirtualClock()
    with (
        tempfile.TemporaryDirectory() as folder,
        Ledger.create(Path(folder) / "ledger.jsonl", header, clock=clock, is_durable=False) as ledger,
    ):
        ledger.append(Driver.here(trials=config.sweep.trials))
        reports = variant.budget * config.recipe.epochs
        simulate(Search(config, ledger, clock=clock), formula, at_once=AT_ONCE, clock=clock, reports=reports)
        return ledger.state


def recipe_fixed(config: SweepConfig) -> dict[str, Scalar]:
    """What the recipe says of the parameters that a training is modelled by."""
    return {} if config.recipe.clip_grad is None else {"clip_grad": config.recipe.clip_grad}


def best_expected(name: str) -> float:
    """The best expected value there is in a space."""
    space = Space.of(config_of(Variant(name, name, 1), 0))
    sampler = RandomSampler(space.axes(), seed=1)
    return float(surrogate(name).mean([space.params(sampler.ask(number)) for number in range(POINTS)]).max())


def row(variant: Variant, found: Sequence[Found], best: float) -> str:
    """A line of the table."""
    regrets = [best - f.expected for f in found]
    worst = sorted(regrets)[int(0.9 * len(regrets))]
    cells = [spread([f.expected for f in found], 2), spread(regrets, 2), f"{worst:.2f}"]
    cells.append(spread([f.value - f.expected for f in found], 2))
    used = spread([f.trainings for f in found], 1)
    return f"| {variant.name} | {variant.budget} | {used} | {' | '.join(cells)} | {len(found)} |"


def model_line(name: str) -> str:
    """How far the model of a space's trainings can be trusted."""
    model = surrogate(name)
    shown = pd.DataFrame({"end": model.known.raw[:, -1], "expected": model.expected[:, -1]})
    of_all, of_better = rank_cells(shown, "expected")
    return (
        f"- `{name}`: {len(shown)} recorded trainings; Spearman between a training's end and what the trees without it "
        f"expect {of_all}, among the better half {of_better}; residuals scaled by {model.noise_scale:.2f}, to a "
        f"seed noise of {SEED_NOISE[name]:g} points; the best expected value {best_expected(name):.1f} %"
    )


def drawn() -> tuple[Recorded, Recorded]:
    """The recorded random draws of one search, and those inside the default space: some ranges were wider at first."""
    found, ranges = recorded("glyphs"), load_config(SPACES["default"]).space
    highest = {name: float(ranges[name].high or 0) for name in ("lr", "clip_grad")}
    inside = [
        number
        for number, params in enumerate(found.params)
        if all(float(params[name]) <= high for name, high in highest.items())
    ]
    return found, Recorded([found.params[n] for n in inside], found.raw[inside], found.ema[inside], found.test[inside])


def draw_lines() -> list[str]:
    """What random draws of the default space come to, and how early the good ones show."""
    all_drawn, inside = drawn()
    ends, epochs = inside.raw[:, -1], inside.raw.shape[1]
    lines = [
        f"{len(ends)} random draws of the default space, each trained once to the end, every one on a seed of its own: "
        f"{(ends >= GOOD).mean():.0%} reach {GOOD:g} % validation top-1, {(ends < BAD).mean():.0%} end below {BAD:g} %, the "
        f"best has {ends.max():.1f} %, the median {statistics.median(ends):.1f} %. They are among "
        f"{len(all_drawn.params)} draws with clip norms of up to 8.",
        "Spearman's rank correlation of a draw's validation top-1 at an epoch with that at its end:",
        "",
        "| draws | at epoch | all: weights | all: average | better half: weights | better half: average |",
        "|---|---|---|---|---|---|",
    ]
    for found in (inside, all_drawn):
        for part in PARTS:
            epoch = round(part * epochs)
            at, end = epoch - 1, found.raw[:, -1]
            shown = pd.DataFrame({"raw": found.raw[:, at], "ema": found.ema[:, at], "end": end})
            lines.append(f"| {len(end)} | {epoch} of {epochs} | {' | '.join(rank_cells(shown, 'raw', 'ema'))} |")
    return lines


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="sweeps of each variant")
    parser.add_argument("--samplers", action="store_true", help="compare the samplers")
    parser.add_argument("--endings", action="store_true", help="compare searches that end at a plateau")
    parser.add_argument("--only", default="", help="variants whose name has this")
    parser.add_argument("--at-once", type=int, default=cores())
    parser.add_argument("--quick", action="store_true", help="small and rough: shows that it runs")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULTS}")
    args = parser.parse_args()
    started = time.perf_counter()
    seeds = range(2 if args.quick else args.seeds)
    known = SAMPLER_VARIANTS if args.samplers else ENDING_VARIANTS if args.endings else VARIANTS
    page = "replay-samplers" if args.samplers else "replay-endings" if args.endings else "replay-glyphs"
    variants = [v for v in known if args.only in v.name and (not args.quick or known is not VARIANTS or v.budget <= 20)]
    spaces = sorted({v.space for v in variants}) if known is not VARIANTS else list(SPACES)
    best = {name: best_expected(name) for name in spaces}
    table = [
        "| search | budget | used | found | regret | its 90 % point | optimism | sweeps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with ProcessPoolExecutor(args.at_once, mp_context=multiprocessing.get_context("forkserver")) as pool:
        for variant in variants:
            found = list(pool.map(partial(sweep, variant), seeds, chunksize=max(1, len(seeds) // (4 * args.at_once))))
            table.append(row(variant, found, best[variant.space]))
            print(table[-1], file=sys.stderr, flush=True)
    minutes = (time.perf_counter() - started) / 60
    lines = [f"# Replay of glyphs, {date.today()}", "", *machine()[:2], *map(model_line, spaces)]
    lines += [f"- {minutes:.1f} min in all, {args.at_once} at once", ""]
    lines += [*(__doc__ or "").strip().splitlines()[2:], "", *table, ""]
    lines += [] if known is not VARIANTS else [*draw_lines(), ""]
    give(lines, page, args.write)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
