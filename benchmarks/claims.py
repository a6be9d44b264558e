"""`python -m benchmarks.claims [--sweeps N] [--write]`: how often a confirmed sweep claims what is not so.

Every sweep is a real one (sampler, ledger, finalists, the look at the test set) on the simulated executor. What a training
gives is the true value of its config plus the noise of its seed, normal with a standard deviation of 1.5 points, on the
validation split and the test set alike. Of the true values all is known, so it can be counted how often

- the **sentence claims a difference** between the answer and any of its three baselines, where there is none;
- the **90 % intervals hold** the true value: of the answer, and of each of its gains;
- **naive** ones do, of the same width for noise that is known: the search's best value as it stands;
- and by how much that value is too high on average: its **optimism**, in points.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.pages import give
from benchmarks.pages import spread
from tune_topkd.config import SweepConfig
from tune_topkd.config import new_config
from tune_topkd.execution.simulated import SimulatedTrial
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.search import Search
from tune_topkd.sweep.confirm import Plan
from tune_topkd.sweep.confirm import request
from tune_topkd.verdict import Verdict
from tune_topkd.verdict import mean_interval
from tune_topkd.verdict import verdict_of

SWEEPS = 200
NOISE, BASE = 1.5, 70.0
"""The standard deviation over seeds, and what the baselines are worth, in points."""
LEVEL = 0.9
TRIALS, EPOCHS = 20, 2
QUANTILE = 1.6449
"""Of the normal distribution, for an interval of `LEVEL`."""

Truth = Callable[[TrialKey, float], float]
"""The true value of a trial, by its key and its learning rate's place in its range, from 0 to 1."""


def none(key: TrialKey, place: float) -> float:
    """All configs are alike."""
    return BASE


def two(key: TrialKey, place: float) -> float:
    """The search's are 2 points above the baselines, whatever the learning rate."""
    return BASE + 2.0 * (key.arm == SEARCH)


def peaked(key: TrialKey, place: float) -> float:
    """The learning rate decides: at its best the search's are 1 point above the baselines, at the ends 7 below."""
    return BASE + (1.0 - 32.0 * (place - 0.5) ** 2 if key.arm == SEARCH else 0.0)


SCENES: dict[str, Truth] = {
    "no difference at all": none,
    "a gain of 2 points, all configs of the search alike": two,
    "the learning rate decides, 1 point at best": peaked,
}


@dataclass(frozen=True)
class Outcome:
    """What one confirmed sweep said, beside what is so."""

    claims: bool
    """Whether the sentence claims a difference."""
    held: list[bool]
    """Of each interval, whether it holds the true value."""
    naive_held: bool
    optimism: float


def space() -> SweepConfig:
    """The space that is swept: a learning rate."""
    about = {
        "data": {"name": "digits"},
        "teacher": {"name": "digits_cnn", "recipe": {"epochs": 1}},
        "student": "digits_linear",
        "recipe": {"epochs": EPOCHS, "lr": 0.1},
        "space": {"lr": {"low": 0.01, "high": 1.0, "log": True}},
        "sweep": {"trials": TRIALS, "asha": None, "startup_trials": 5},
        "baselines": {"methods": ["ce", "kd", "defaults"], "trials": 4},
    }
    return new_config(about, "claims", ())


def confirmed(config: SweepConfig, number: int, truth: Truth, seeds: int) -> SweepState:
    """The state of a sweep of its own noise, searched and confirmed."""

    def value(trial: SimulatedTrial, epoch: int) -> dict[str, float]:
        origin, seed = trial.record.origin, trial.config.seed
        draw = np.random.default_rng([number, seed, *origin.arm.encode(), origin.number]).standard_normal()
        at = truth(origin, place_of(trial.config.recipe.lr)) + NOISE * float(draw)
        if trial.config.data.selection == "validation":
            return {"val_top1": at}
        return {"test_top1": at} if epoch == EPOCHS else {"train_loss": 1.0}

    with tempfile.TemporaryDirectory() as folder:
        header = Header(sweep="s", id="0", seed=0, trials=TRIALS, num_classes=10, epochs=EPOCHS, method="topkd")
        with Ledger.create(Path(folder) / "ledger.jsonl", header, is_durable=False) as ledger:
            ledger.append(Driver.here(trials=TRIALS))
            simulate(Search(config, ledger), value, at_once=1)
            line = request(config, ledger.state, Plan(finalists=3, seeds=seeds))
            assert line is not None, "it is confirmed for the first time"
            ledger.append(Driver.here(trials=TRIALS), line)
            simulate(Search(config, ledger), value, at_once=1)
            return ledger.state


def place_of(lr: float) -> float:
    """Where a learning rate is in its range of 0.01 to 1, from 0 to 1."""
    return (math.log10(lr) + 2) / 2


def outcome(state: SweepState, verdict: Verdict, truth: Truth) -> Outcome:
    """What a confirmed sweep said, beside what is so."""

    def true(key: TrialKey) -> float:
        return truth(key, place_of(float(state.trials[key].params["lr"])))

    answer, best = verdict.answer.record.key, state.best()
    assert best is not None, "it has been confirmed"
    intervals = [(verdict.answer.values, true(answer))]
    intervals += [(list(gain.values), true(answer) - true(gain.base.record.key)) for gain in verdict.gains]
    told = [gain for gain in verdict.gains if gain.is_told_apart]
    naive, at = best.value or 0.0, true(best.key)
    found = [(mean_interval(values, LEVEL), value) for values, value in intervals]
    return Outcome(
        claims=bool(told),
        held=[interval is not None and value in interval for interval, value in found],
        naive_held=abs(naive - at) < QUANTILE * NOISE,
        optimism=naive - at,
    )


def outcomes(scene: str, sweeps: int, seeds: int = 5) -> list[Outcome]:
    """What so many sweeps of a scene said."""
    config, truth, found = space(), SCENES[scene], []
    for number in range(sweeps):
        state = confirmed(config, number, truth, seeds)
        verdict = verdict_of(state)
        assert verdict is not None, "it has been confirmed"
        found.append(outcome(state, verdict, truth))
    return found


def shares(found: list[Outcome]) -> tuple[float, float, float]:
    """Of the sweeps that claim a difference, of the intervals that hold, and of the naive ones that do."""
    claims = statistics.fmean(each.claims for each in found)
    held = statistics.fmean(held for each in found for held in each.held)
    return claims, held, statistics.fmean(each.naive_held for each in found)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.claims", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=SWEEPS)
    parser.add_argument("--write", action="store_true", help="keep the page in benchmarks/results")
    args = parser.parse_args()
    lines = ["# What confirmed sweeps claim", "", *(__doc__ or "").splitlines()[2:], ""]
    lines += [f"{args.sweeps} sweeps a row, {TRIALS} trials each, 3 finalists and 3 baselines on 5 + 5 seeds.", ""]
    lines += [
        "| true values | claims a difference | 90 % intervals hold | naive ones hold | optimism of the naive value |"
    ]
    lines += ["|---|--:|--:|--:|--:|"]
    for scene in SCENES:
        found = outcomes(scene, args.sweeps)
        claims, held, naive = shares(found)
        optimism = spread([each.optimism for each in found], 2)
        lines.append(f"| {scene} | {claims:.1%} | {held:.1%} | {naive:.1%} | {optimism} |")
    give([*lines, ""], "claims", args.write)


if __name__ == "__main__":
    main()
