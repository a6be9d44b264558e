"""Does a tuned config keep its promise? Its training again, from the exported file alone, on seeds that it has not had."""

import functools
import statistics
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_topkd.config import NO_FILES
from tune_topkd.config import OBJECTIVE
from tune_topkd.config import OBJECTIVE_TEST
from tune_topkd.config import ConfigError
from tune_topkd.config import Override
from tune_topkd.config import PairConfig
from tune_topkd.config import Problem
from tune_topkd.config import pair_from
from tune_topkd.config import read_yaml
from tune_topkd.export import TunedConfig
from tune_topkd.export import load_tuned_config
from tune_topkd.sweep import identity
from tune_topkd.sweep import preflight
from tune_topkd.sweep import prepare
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.wording import counted
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.verdict import LEVEL
from tune_topkd.verdict import Interval
from tune_topkd.verdict import prediction_interval

FEWEST_PROMISED = 2
"""Values below which a promise has no spread, and nothing can be held to it."""


@dataclass(frozen=True)
class Promise:
    """What a tuned config says of itself."""

    metric: str
    """`test_top1` of a confirmed one, which is trained on all images but the test set's; else `val_top1`."""
    values: list[float]
    """In percent, by seed."""
    seeds: frozenset[int]
    """All that it has had."""

    @property
    def mean(self) -> float:
        """In percent."""
        return statistics.fmean(self.values)


@dataclass(frozen=True)
class Verified:
    """What trainings from a tuned config alone gave, beside what it promised."""

    promise: Promise
    values: dict[int, float | None]
    """By seed, in percent; none of a training that diverged."""
    expected: Interval
    """Where the mean of so many further trainings is to be expected, at 95 %."""
    differences: list[str]
    """What is not as it was when the config was found."""

    @property
    def mean(self) -> float | None:
        """Of the trainings, in percent; none if one of them has no value."""
        values = [value for value in self.values.values() if value is not None]
        return statistics.fmean(values) if len(values) == len(self.values) else None

    @property
    def holds(self) -> bool:
        """Whether the promise holds."""
        return self.mean is not None and self.mean in self.expected

    @property
    def sentence(self) -> str:
        """In plain words."""
        promise, trainings = self.promise, counted(len(self.values), "training")
        low, high = self.expected
        expected = f"{low:.2f} to {high:.2f} is where the mean of {trainings} is to be expected ({LEVEL:.0%})"
        promised = (
            f"{promise.mean:.2f} % {promise.metric} promised over {counted(len(promise.values), 'seed')}: {expected}"
        )
        if self.mean is None:
            broken = ", ".join(str(seed) for seed, value in self.values.items() if value is None)
            return f"the promise does not hold: a training diverged (seed {broken}). {promised}"
        found = f"{self.mean:.2f} % over {counted(len(self.values), 'fresh seed')}"
        if self.holds:
            return f"the promise holds: {found}. {promised}"
        how = "less" if self.mean < low else "more"
        return f"the promise does not hold: {found}, which is {how} than it leads to expect. {promised}"

    def as_json(self) -> dict[str, Any]:
        """What there is to say of it, as JSON can hold it."""
        return {
            "holds": self.holds,
            "metric": self.promise.metric,
            "promised": {"mean": self.promise.mean, "values": self.promise.values},
            "expected": list(self.expected),
            "mean": self.mean,
            "values": {str(seed): value for seed, value in self.values.items()},
            "differences": self.differences,
        }


def promise_of(tuned: TunedConfig, source: str) -> Promise:
    """What can be held to account of a tuned config.

    Raises:
        ConfigError: it has no figure of two fresh seeds or more.
    """
    evidence = tuned.evidence
    test, fresh = evidence.test, evidence.fresh
    seeds = {*evidence.seeds, *(fresh.seeds if fresh else ()), *(test.seeds if test else ())}
    found = [(OBJECTIVE_TEST, test.values)] if test else [(OBJECTIVE, fresh.values)] if fresh else []
    for metric, values in found:
        whole = [value for value in values if value is not None]
        if len(whole) >= FEWEST_PROMISED:
            return Promise(metric, whole, frozenset(seeds))
    rule = (
        "has no figure of two fresh seeds or more, and the value that a search chose by is not to be expected again: "
        f"`confirm {evidence.sweep}` and export it again"
    )
    raise ConfigError(source, [Problem(key="evidence", rule=rule)])


def is_tuned(path: str | Path) -> bool:
    """Whether a YAML is a tuned config, of this version or another, and no search space."""
    return Path(path).is_file() and "schema_version" in read_yaml(path)


def tuned_pair(path: str | Path, overrides: Sequence[Override] = ()) -> PairConfig:
    """The training that the file of a tuned config describes, with these values replaced.

    Raises:
        ConfigError: as `pair_of`, or it is no tuned config.
    """
    return pair_of(load_tuned_config(Path(path)), str(path), overrides)


def pair_of(tuned: TunedConfig, source: str, overrides: Sequence[Override]) -> PairConfig:
    """The training that a tuned config describes.

    Args:
        tuned: the config.
        source: its file, for messages.
        overrides: values that replace its own; of the teacher, whose weights the file has not got, where they are.

    Raises:
        ConfigError: a value breaks a rule, or the teacher's weights are not to be had.
    """
    content = tuned.model_dump(mode="json", exclude={"evidence", "schema_version"})
    is_given = any(override.key == "teacher.checkpoint" for override in overrides)
    if content["teacher"] is not None and not is_given:
        if content["teacher"]["recipe"] is None:
            rule = "its weights are not in the file; `--set teacher.checkpoint=PATH` says where they lie"
            raise ConfigError(source, [Problem(key="teacher", rule=rule)])
    elif content["teacher"] is not None:
        content["teacher"] |= {"recipe": None, "augment": None, "seed": 0}
    return preflight.checked_pair(pair_from(content, source, overrides), source)


def verify(
    path: Path,
    seeds: int,
    workspace: Workspace,
    watchers: Watchers,
    places: Mapping[str, Any] | None = None,
) -> Verified:
    """Train what a tuned config describes on fresh seeds, one after the other, and compare with what it promises.

    Args:
        path: of the tuned config.
        seeds: how many trainings.
        workspace: where a teacher is trained, if need be, and banks lie; a fresh one owes nothing to the sweep's.
        watchers: are told of each training.
        places: where files are, by config key: `data.root`, `teacher.checkpoint`.

    Raises:
        ConfigError: the file is not a tuned config, promises nothing, or its data or teacher cannot be had.
    """
    from tune_topkd.train import train

    if seeds < 1:
        raise ConfigError("verify", [Problem(key="--seeds", rule="must be at least 1", value=seeds, has_value=True)])
    source = str(path)
    tuned = load_tuned_config(path)
    promise = promise_of(tuned, source)
    pair = pair_of(tuned, source, [Override(key, value, f"--set {key}") for key, value in (places or {}).items()])
    prepare.ready_data(pair)
    trained = prepare.for_the_test(pair) if promise.metric == OBJECTIVE_TEST else pair
    files, teacher_file = NO_FILES, None
    if pair.method != "ce" and pair.teacher is not None:
        first_of = prepare.test_teacher if promise.metric == OBJECTIVE_TEST else prepare.ready_teacher
        teacher = first_of(pair, workspace, watchers)
        files = prepare.teacher_files(teacher, trained, workspace, watchers, max(promise.seeds) + 1)
        teacher_file = teacher.path if teacher else None
    differences = _differences(tuned, pair, teacher_file)
    for text in differences:
        watchers.note(text)
    trial = prepare.trial_with(trained, files, 0)
    values: dict[int, float | None] = {}
    first = max(promise.seeds) + 1
    for number, seed in enumerate(range(first, first + seeds), 1):
        what = f"training {number} of {seeds}, seed {seed}"
        with watchers.phase(what) as show:
            result = train(trial.model_copy(update={"seed": seed}), functools.partial(_tell, show, what))
        values[seed] = value = None if result.diverged else result.metrics[promise.metric]
        watchers.info(f"{what}: {'diverged' if value is None else f'{promise.metric} {value:.2f} %'}")
    expected = prediction_interval(promise.values, seeds)
    assert expected is not None, "there are enough values"
    return Verified(promise, values, expected, differences)


def _tell(show: Callable[[str], None], what: str, epoch: int, metrics: Mapping[str, float], save: object) -> None:
    show(f"{what}: epoch {epoch}")


def _differences(tuned: TunedConfig, pair: PairConfig, teacher_file: Path | None) -> list[str]:
    """What results depend on, and is not as the config's evidence has it: a reason why a promise may not hold."""
    before, test = tuned.evidence.identities, tuned.evidence.test
    if not before:
        return []
    if test is not None and test.teacher is not None:
        before = before | {identity.TEACHER: test.teacher}
    now = identity.identities(pair, teacher_file)
    return [
        f"{identity.described(key)} is not what it was when the config was found: the figure may differ for that reason"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    ]


__all__ = ["Promise", "Verified", "is_tuned", "pair_of", "promise_of", "tuned_pair", "verify"]
