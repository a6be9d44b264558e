"""`python -m benchmarks.sweeps [--sweeps N] [--seeds N] [--runs-dir DIR] [--write]`: what several sweeps of glyphs find.

Each sweep is `search_spaces/glyphs.yaml` with another seed: 40 trials, finalists on two fresh seeds, KD tuned as TopKD is
(`baselines.match`), TopKD's defaults over the same learning rates and clip norms. Its answer is then confirmed. **Reported**
is what the sweep says of its answer, the mean of the finalists' fresh seeds; **afterwards** the mean of further seeds, which
took no part in any choice, also on the validation split. The test figures are of more seeds, after training on all images
but the test set's.

**Old search** is the space without clipped gradients, moving averages, units of effect and finalists
(`recorded/glyphs-unclipped.yaml`), 40 trials too, whose answer is the best trial of one seed.

A sweep's seeds have its answer in common, so the error of a mean is over the sweeps' means. Sweeps that the runs folder has
already are gone on with, so the whole may be stopped at any time.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.__main__ import cores
from benchmarks.__main__ import machine
from benchmarks.answers import launch
from benchmarks.pages import give
from benchmarks.pages import spread
from tune_topkd.sweep import Sweep
from tune_topkd.verdict import Verdict

OLD = Path(__file__).parent / "recorded" / "glyphs-unclipped.yaml"
ANSWER, OLD_ANSWER, KD, DEFAULTS = "tuned TopKD", "the old search's answer", "tuned KD", "TopKD's defaults"
SWEEPS, SEEDS = 5, 5
_NEW = ("--set", "baselines.match=true", "--set", "baselines.methods=[kd, defaults]")
_PLAIN = ("--set", "baselines=null", "--set", "sweep.finalists=null")


@dataclass(frozen=True)
class Found:
    """What one sweep found, in percent."""

    k: object
    reported: float
    """By the sweep, of its answer."""
    own: float
    """Of the trial that the answer was found by."""
    afterwards: Sequence[float]
    """By seeds that took no part in any choice, on the validation split."""
    test: Mapping[str, Sequence[float]]
    """By arm, by seed."""

    @property
    def optimism(self) -> float:
        """By how much what it reported was too high, in points."""
        return self.reported - statistics.fmean(self.afterwards)


def found(space: str, name: str, runs: Path, seed: int, seeds: int, changes: Sequence[str]) -> tuple[Sweep, Verdict]:
    """Run and confirm a sweep, or go on with it."""
    plain = ("--runs-dir", str(runs), "--mlflow-uri", "")
    launch("run", space, "--or-resume", "--name", name, *plain, "--set", f"sweep.seed={seed}", *changes)
    launch("confirm", name, *plain, "--finalists", "1", "--seeds", str(seeds))
    sweep = Sweep.open(name, runs_dir=runs, mlflow_uri="")
    verdict = sweep.status().verdict
    assert verdict is not None, "it has just been confirmed"
    return sweep, verdict


def pair(runs: Path, seed: int, seeds: int, changes: Sequence[str]) -> Found:
    """The new and the old search of one seed."""
    sweep, new = found("glyphs", f"new-{seed}", runs, seed, seeds, (*changes, *_NEW))
    _, old = found(str(OLD), f"old-{seed}", runs, seed, seeds, (*changes, *_PLAIN))
    plan = sweep.config.sweep.finalists
    chosen = list(new.answer.chosen_by.values.values())  # the finalists' seeds come first
    known = plan.seeds if plan else 0
    names = {"tuned KD": KD, "the untuned method": DEFAULTS}
    test = {ANSWER: new.answer.values, OLD_ANSWER: old.answer.values}
    test |= {names[base.name]: base.values for base in new.baselines}
    record = new.answer.record
    return Found(record.params["k"], statistics.fmean(chosen[:known]), record.value or 0.0, chosen[known:], test)


def section(all_found: Mapping[int, Found]) -> Iterator[str]:
    """What there is to say of them."""
    yield "| seed | K | its own value | reported | afterwards | too high by | " + " | ".join(_arms(all_found)) + " |"
    yield "|--:|--:|--:|--:|--:|--:|" + "--:|" * len(_arms(all_found))
    for seed, one in all_found.items():
        tests = " | ".join(spread(one.test[arm], 2) for arm in _arms(all_found))
        yield (
            f"| {seed} | {one.k} | {one.own:.2f} | {one.reported:.2f} | {spread(one.afterwards, 2)} | "
            f"{one.optimism:+.2f} | {tests} |"
        )
    each = list(all_found.values())
    means = {arm: [statistics.fmean(one.test[arm]) for one in each] for arm in _arms(all_found)}
    own = [one.own - statistics.fmean(one.afterwards) for one in each]
    yield (
        f"| mean | | {spread([one.own for one in each], 2)} | {spread([one.reported for one in each], 2)} | "
        f"{spread([statistics.fmean(one.afterwards) for one in each], 2)} | {spread([one.optimism for one in each], 2)} | "
        + " | ".join(spread(values, 2) for values in means.values())
        + " |"
    )
    seeds = {arm: [value for one in each for value in one.test[arm]] for arm in means}
    yield ""
    yield "± is a standard error: over a sweep's seeds, and of the means over the sweeps."
    yield f"The trials' own values were too high by {spread(own, 2)}, what the sweeps reported by "
    yield f"{spread([one.optimism for one in each], 2)}."
    yield ""
    yield "| test top-1 % | sweeps | trainings | mean ± se over sweeps | sd over seeds | worst seed | answer above by |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for arm, values in means.items():
        within = statistics.fmean(statistics.stdev(one.test[arm]) for one in each)
        above = [a - b for a, b in zip(means[ANSWER], values, strict=True)]
        cell = "" if arm == ANSWER else f"{spread(above, 2)}{_told(above)}"
        cells = [arm, len(values), len(seeds[arm]), spread(values, 2), f"{within:.2f}", f"{min(seeds[arm]):.2f}", cell]
        yield f"| {' | '.join(map(str, cells))} |"


def _arms(all_found: Mapping[int, Found]) -> list[str]:
    return list(next(iter(all_found.values())).test)


def _told(above: Sequence[float]) -> str:
    """Whether the interval of a mean, 95 %, lies on one side of zero."""
    from tune_topkd.verdict import mean_interval

    interval = mean_interval(above)
    return "" if interval is None else " (told apart)" if interval.excludes_zero else " (not told apart)"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.sweeps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=SWEEPS, metavar="N", help="of each search, seeds 0, 100, 200 ...")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="of each stage of confirming; at least 4")
    parser.add_argument("--runs-dir", help="folder of the sweeps, to go on with them; by default a scratch one")
    parser.add_argument("--quick", action="store_true", help="small and rough: shows that it runs")
    parser.add_argument("--write", action="store_true", help="keep the page in benchmarks/results")
    args = parser.parse_args()
    small = ["trials=2", "startup_trials=1", "finalists.count=1"]
    changes = [f"sweep.{change}" for change in small] + [
        "recipe.epochs=2", "teacher.recipe.epochs=1", "sweep.asha=null", "baselines.trials=1",
        "data.kwargs={train_images: 600, test_images: 200}",
    ]  # fmt: skip
    quick = [word for change in changes for word in ("--set", change)] if args.quick else []
    all_found: dict[int, Found] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(0, 100 * args.sweeps, 100):  # further apart than a sweep's seeds
            all_found[seed] = pair(Path(args.runs_dir or scratch), seed, args.seeds, quick)
            print("\n".join(section(all_found)), file=sys.stderr, flush=True)
    lines = [f"# {args.sweeps} sweeps of glyphs", "", *machine()[:2], "", *(__doc__ or "").splitlines()[2:], ""]
    give([*lines, *section(all_found)], f"sweeps-glyphs-{cores()}-cores", args.write)


if __name__ == "__main__":
    main()
