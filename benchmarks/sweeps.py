"""`python -m benchmarks.sweeps [--sweeps N] [--seeds N] [--runs-dir DIR] [--write]`: what several sweeps of glyphs find.

Each sweep is `search_spaces/glyphs.yaml` with another seed: 40 trials, finalists on two fresh seeds. The first `--matched`
of them have baselines: TopKD's defaults over the same learning rates and clip norms, and KD tuned as TopKD is
(`baselines.match`). Each answer is then confirmed. **Reported** is what the sweep says of its answer, the mean of the
finalists' fresh seeds; **afterwards** the mean of further seeds, which took no part in any choice, also on the validation
split. The test figures are of more seeds, after training on all images but the test set's.

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
_MATCHED = ("--set", "baselines.match=true", "--set", "baselines.methods=[kd, defaults]")
_ALONE = ("--set", "baselines=null")
_PLAIN = ("--set", "baselines=null", "--set", "sweep.finalists=null")


@dataclass(frozen=True)
class Found:
    """What one seed's sweep found, in percent."""

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


def new_search(runs: Path, seed: int, seeds: int, changes: Sequence[str], is_matched: bool) -> Found:
    """The default search of one seed, with its baselines or alone."""
    baselines = _MATCHED if is_matched else _ALONE
    sweep, verdict = found("glyphs", f"new-{seed}", runs, seed, seeds, (*changes, *baselines))
    plan = sweep.config.sweep.finalists
    chosen = list(verdict.answer.chosen_by.values.values())  # the finalists' seeds come first
    known = plan.seeds if plan else 0
    names = {"tuned KD": KD, "the untuned method": DEFAULTS}
    test = {ANSWER: verdict.answer.values} | {names[base.name]: base.values for base in verdict.baselines}
    record = verdict.answer.record
    return Found(record.params["k"], statistics.fmean(chosen[:known]), record.value or 0.0, chosen[known:], test)


def old_search(runs: Path, seed: int, seeds: int, changes: Sequence[str]) -> Sequence[float]:
    """The test top-1 of the old search's answer of one seed, by seed."""
    return found(str(OLD), f"old-{seed}", runs, seed, seeds, (*changes, *_PLAIN))[1].answer.values


def section(all_found: Mapping[int, Found], old: Mapping[int, Sequence[float]]) -> Iterator[str]:
    """What there is to say of them.

    Args:
        all_found: by the default search, by seed.
        old: test top-1 of the old search's answers, by the sweep's seed and their own.
    """
    if all_found:
        yield from _by_sweep(all_found)
        yield ""
    yield "| test top-1 % | sweeps | trainings | mean ± se over sweeps | sd over seeds | worst seed | answer above by |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    tests = {seed: dict(one.test) for seed, one in all_found.items()}
    for seed, values in old.items():
        tests.setdefault(seed, {})[OLD_ANSWER] = values
    for arm in dict.fromkeys(arm for one in tests.values() for arm in one):
        those = [one for one in tests.values() if arm in one]
        means = [statistics.fmean(one[arm]) for one in those]
        within = statistics.fmean(statistics.stdev(one[arm]) for one in those)
        values = [value for one in those for value in one[arm]]
        above = [statistics.fmean(one[ANSWER]) - statistics.fmean(one[arm]) for one in those if ANSWER in one]
        cell = f"{spread(above, 2)}{_told(above)}" if above and arm != ANSWER else ""
        cells = [arm, len(those), len(values), spread(means, 2), f"{within:.2f}", f"{min(values):.2f}", cell]
        yield f"| {' | '.join(map(str, cells))} |"


def _by_sweep(all_found: Mapping[int, Found]) -> Iterator[str]:
    each = list(all_found.values())
    arms = list(dict.fromkeys(arm for one in each for arm in one.test))
    yield f"| seed | K | its own value | reported | afterwards | too high by | {' | '.join(arms)} |"
    yield "|--:|--:|--:|--:|--:|--:|" + "--:|" * len(arms)
    for seed, one in all_found.items():
        tests = [spread(one.test[arm], 2) if arm in one.test else "–" for arm in arms]
        cells = [
            seed,
            one.k,
            f"{one.own:.2f}",
            f"{one.reported:.2f}",
            spread(one.afterwards, 2),
            f"{one.optimism:+.2f}",
        ]
        yield f"| {' | '.join(map(str, [*cells, *tests]))} |"
    luck = [one.own - statistics.fmean(one.afterwards) for one in each]
    yield ""
    yield (
        f"± is a standard error: here over a sweep's seeds, below over the sweeps. What the sweeps reported was too high by "
        f"{spread([one.optimism for one in each], 2)} points, their trials' own values by {spread(luck, 2)}."
    )


def _told(above: Sequence[float]) -> str:
    """Whether the interval of a mean, 95 %, lies on one side of zero."""
    from tune_topkd.verdict import mean_interval

    interval = mean_interval(above)
    return "" if interval is None else " (told apart)" if interval.excludes_zero else " (not told apart)"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.sweeps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=SWEEPS, metavar="N", help="seeds 0, 100, 200 ...")
    parser.add_argument("--matched", type=int, default=SWEEPS, metavar="N", help="how many of these have baselines")
    parser.add_argument(
        "--old", type=int, default=SWEEPS, metavar="N", help="sweeps of the old search, of the same seeds"
    )
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
    old: dict[int, Sequence[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(args.runs_dir or scratch)
        for seed in range(0, 100 * args.sweeps, 100):  # further apart than a sweep's seeds
            all_found[seed] = new_search(runs, seed, args.seeds, quick, len(all_found) < args.matched)
            print("\n".join(section(all_found, old)), file=sys.stderr, flush=True)
        for seed in range(0, 100 * args.old, 100):
            old[seed] = old_search(runs, seed, args.seeds, quick)
            print("\n".join(section(all_found, old)), file=sys.stderr, flush=True)
    counts = {"sweeps of glyphs": args.sweeps, "sweeps of glyphs by the old search": args.old}
    title = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    lines = [f"# {title}", "", *machine()[:2], ""]
    lines += [*(__doc__ or "").splitlines()[2:], ""]
    page = "sweeps-glyphs" if args.sweeps else "sweeps-glyphs-old"
    give([*lines, *section(all_found, old)], f"{page}-{cores()}-cores", args.write)


if __name__ == "__main__":
    main()
