"""What the figures and tables of a page draw from: rows of numbers and words, out of a sweep's ledger."""

import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tune_topkd.config import OBJECTIVE
from tune_topkd.config import OBJECTIVE_TEST
from tune_topkd.config import ParameterRange
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.findings import Findings
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import TEST
from tune_topkd.ledger import Finalist
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import baseline_trials
from tune_topkd.ledger import finalist_of
from tune_topkd.ledger import winner_of
from tune_topkd.report.style import limits
from tune_topkd.verdict import baseline_name

MOST_CURVES = 160
"""Trials whose learning curves are drawn: of more a part is taken."""
MOST_POINTS = 60
"""Epochs of a curve that are drawn."""
MOST_LINES = 240
"""Trials that are drawn as lines through all parameters."""
EPOCH_SECONDS = "epoch_seconds"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Parameter:
    """A parameter that was searched."""

    name: str
    field: str
    """Its name in the rows: what a user may call a parameter is no name there."""
    range: ParameterRange

    @property
    def is_choice(self) -> bool:
        """Whether it is one of a list."""
        return self.range.choices is not None

    @property
    def is_log(self) -> bool:
        """Whether it is searched in the logarithm."""
        return self.range.log


def parameters_of(config: SweepConfig) -> list[Parameter]:
    """The parameters of a sweep in the order of its space, K first."""
    names = sorted(config.space, key=lambda name: name != "k")
    return [Parameter(name, f"p{place}", config.space[name]) for place, name in enumerate(names)]


@dataclass(frozen=True)
class Top1Axis:
    """From where to where the axis of top-1 goes: poor values lie on its lower edge, to leave room for good ones."""

    low: float
    high: float
    floor: float
    """Where what is below the axis, and what failed, is drawn."""

    @property
    def domain(self) -> list[float]:
        """Both ends."""
        return [self.low, self.high]


def axis_of(values: Iterable[float], always: Iterable[float] = ()) -> Top1Axis:
    """The axis for these values, which `always` lie on."""
    low, high = limits(np.asarray(list(values), dtype=float), list(always))
    edge = low - 0.08 * (high - low)
    return Top1Axis(edge, high, (low + edge) / 2)


def base_values(found: Findings) -> dict[str, float]:
    """The baselines in percent by name: means over fresh seeds where the answer has them, else values of one seed."""
    state, winner = found.state, winner_of(found.state)
    values = {}
    for record in baseline_trials(state):
        mean = finalist_of(state, record).mean if winner is not None and winner.finalist is not None else record.value
        if mean is not None:
            values[baseline_name(record)] = float(mean)
    return values


def axis_of_trials(found: Findings) -> Top1Axis:
    """The axis that the figures of trials share."""
    ranked = [record.value or 0.0 for record in found.state.ranked()]
    others = [r.value for r in found.state.arm(SEARCH) if r.value is not None and math.isfinite(r.value)]
    fresh = repeated(found)
    always = [*base_values(found).values(), *(f["mean"] for f in fresh)]
    return axis_of(ranked or others, [*always, *ends([*(ranked or others), *always], fresh)])


def ends(values: Sequence[float], spans: Rows) -> list[float]:
    """The ends of intervals that an axis is to show: none further from the values than these are apart.

    The intervals of two seeds are so long that the values would lie on a line; they are cut at the edge instead.

    Args:
        values: in percent.
        spans: rows with `low` and `high`.
    """
    if not values:
        return []
    least, most = min(values), max(values)
    apart = max(most - least, 2.0)
    return [min(max(row[end], least - apart), most + apart) for row in spans for end in ("low", "high")]


# --- trials -----------------------------------------------------------------------------------------------------------


def trial_rows(found: Findings, axis: Top1Axis) -> Rows:
    """A row for each trial of the search."""
    state, parameters = found.state, parameters_of(found.config)
    winner = winner_of(state)
    best: float | None = None
    rows = []
    for record in state.arm(SEARCH):
        row = _row(record, parameters)
        value = row["top1"]
        is_below = value is not None and value < axis.low + (axis.floor - axis.low) * 2
        row["y"] = axis.floor if value is None or is_below else value
        failed = record.status is TrialStatus.FAILED
        if record.status is TrialStatus.COMPLETED and value is not None:
            best = value if best is None else max(best, value)
        row["mark"] = "cross" if failed or value is None else "triangle-down" if is_below else "circle"
        row["has_y"] = value is not None or failed
        row["is_best"] = winner is not None and winner.record.key == record.key
        row["best"] = best
        row["kx"] = _place_of_k(record, found.config)
        rows.append(row)
    return rows


def other_rows(found: Findings) -> Rows:
    """A row for each training that is no trial of the search: baselines, finalists on fresh seeds, the test stage."""
    parameters = parameters_of(found.config)
    return [_row(record, parameters) for record in found.state.trials.values() if record.key.arm != SEARCH]


def _row(record: TrialRecord, parameters: Sequence[Parameter]) -> dict[str, Any]:
    metric = OBJECTIVE_TEST if record.key.arm == TEST else OBJECTIVE
    value = record.value
    if value is None and record.reports:
        value = record.reports[record.epoch].get(metric)
    why = "" if record.reason in ("", "completed") else record.reason
    return {
        "trial": str(record.key),
        "n": record.key.number,
        "status": record.status.value,
        "of": "" if record.of_trial is None else f"{record.of_trial}, seed {record.seed}",
        "reason": f"{why}: {record.error}" if record.error else why,
        "top1": _rounded(value),
        "on": "test" if record.key.arm == TEST else "validation",
        "epochs": record.epoch,
        "seconds": round(math.fsum(report.get(EPOCH_SECONDS, 0.0) for report in record.reports.values()), 1),
        **{p.field: _plain(record.params.get(p.name)) for p in parameters},
    }


def _rounded(value: float | None) -> float | None:
    """A percentage to a hundredth of a point's tenth; none where it is no number."""
    return None if value is None or not math.isfinite(value) else round(value, 3)


def _plain(value: Scalar | None) -> Scalar | None:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _place_of_k(record: TrialRecord, config: SweepConfig) -> float | None:
    """Where a trial stands beside others of its K: a little to the side, by its number."""
    k = record.params.get("k")
    if "k" not in config.space or not isinstance(k, int | float):
        return None
    side = ((record.key.number * 0.618) % 1 - 0.5) * 0.5
    return round(k * (1 + 0.16 * side) if config.space["k"].log else k + side, 4)


# --- curves -----------------------------------------------------------------------------------------------------------


def curve_rows(found: Findings) -> tuple[Rows, str]:
    """Validation top-1 by epoch of the search's trials, and what was left out, in words.

    Of many trials the best, then others evenly over the search; of a long curve epochs evenly, the rungs among them.
    """
    records = [record for record in found.state.arm(SEARCH) if record.reports]
    shown = _some(records, found.state, MOST_CURVES)
    rungs = {rung.epoch for rung in found.rungs}
    rows: Rows = []
    is_thinned = False
    for record in shown:
        points = [(e, v) for e, m in sorted(record.reports.items()) if math.isfinite(v := m.get(OBJECTIVE, math.nan))]
        if len(points) > MOST_POINTS:
            is_thinned = True
            taken = {round(x) for x in np.linspace(0, len(points) - 1, MOST_POINTS)}
            points = [point for place, point in enumerate(points) if place in taken or point[0] in rungs]
        rows += [
            {"n": record.key.number, "status": record.status.value, "epoch": epoch, "top1": round(value, 2)}
            for epoch, value in points
        ]
    parts = [f"{len(shown)} of {len(records):,} trials are drawn: the best, and others evenly over the search"]
    told = parts if len(shown) < len(records) else []
    told = [*told, f"of each curve at most about {MOST_POINTS} epochs"] if is_thinned else told
    return rows, "; ".join(told)


def _some(records: Sequence[TrialRecord], state: SweepState, most: int) -> list[TrialRecord]:
    """At most so many of the records: a quarter of them the best ones, the others evenly spaced."""
    if len(records) <= most:
        return list(records)
    best = {record.key for record in state.ranked()[: most // 4]}
    rest = [record for record in records if record.key not in best]
    taken = {round(x) for x in np.linspace(0, len(rest) - 1, most - len(best))}
    chosen = best | {record.key for place, record in enumerate(rest) if place in taken}
    return [record for record in records if record.key in chosen]


# --- lines through all parameters -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coordinates:
    """The trials as lines through an axis for each parameter."""

    lines: Rows
    """A row for each trial and axis."""
    ticks: Rows
    """A row for each label on an axis."""
    left_out: str
    """What is not drawn, in words."""


def coordinates(found: Findings) -> Coordinates:
    """The trials as lines; each axis from the lowest to the highest value, as it was searched."""
    parameters, state = parameters_of(found.config), found.state
    records = [r for r in state.arm(SEARCH) if r.status in (TrialStatus.COMPLETED, TrialStatus.PRUNED)]
    shown = _some(records, state, MOST_LINES)
    winner = winner_of(state)
    lines: Rows = []
    ticks: Rows = []
    places: dict[str, dict[int, float]] = {}
    for parameter in parameters:
        values = {record.key.number: record.params.get(parameter.name) for record in shown}
        places[parameter.field], labels = _places(parameter, {n: v for n, v in values.items() if v is not None})
        ticks += [{"axis": parameter.name, "place": place, "text": text} for place, text in labels]
    for record in shown:
        number = record.key.number
        about = {
            "n": number,
            "status": record.status.value,
            "top1": _rounded(record.value),
            "is_best": winner is not None and winner.record.key == record.key,
        }
        for i, parameter in enumerate(parameters):
            if number in places[parameter.field]:
                place = places[parameter.field][number]
                text = _text(record.params[parameter.name])
                lines.append(
                    {**about, "axis": parameter.name, "place_of_axis": i, "place": round(place, 4), "value": text}
                )
    few = f"{len(shown)} of {len(records):,} trials are drawn: the best, and others evenly over the search"
    return Coordinates(lines, ticks, few if len(shown) < len(records) else "")


def _places(parameter: Parameter, values: Mapping[int, Scalar]) -> tuple[dict[int, float], list[tuple[float, str]]]:
    """Where each trial stands on an axis, 0 to 1, and the labels of the axis."""
    if parameter.is_choice or not all(isinstance(value, int | float) for value in values.values()):
        choices = list(dict.fromkeys(map(_text, [*(parameter.range.choices or ()), *values.values()])))
        place_of = {choice: (i + 0.5) / len(choices) for i, choice in enumerate(choices)}
        places = {n: place_of[_text(v)] + ((n * 0.618) % 1 - 0.5) * 0.06 for n, v in values.items()}
        return places, [(place, choice) for choice, place in place_of.items()]
    numbers = {n: float(v) for n, v in values.items() if math.isfinite(float(v))}
    if not numbers:
        return {}, []
    low, high = min(numbers.values()), max(numbers.values())
    if low == high:
        return dict.fromkeys(numbers, 0.5), [(0.5, _text(low))]
    is_log = parameter.is_log and low > 0
    scale = math.log if is_log else float
    first, last = scale(low), scale(high)
    places = {n: (scale(v) - first) / (last - first) for n, v in numbers.items()}
    middle = math.exp((first + last) / 2) if is_log else (low + high) / 2
    at = (low, round(middle) if parameter.name == "k" else middle, high)
    return places, [((scale(v) - first) / (last - first), _text(v)) for v in dict.fromkeys(at)]


def _text(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.3g}" if isinstance(value, int | float) else value


# --- seeds ------------------------------------------------------------------------------------------------------------


def repeated(found: Findings) -> Rows:
    """The search's finalists with values on fresh seeds: their mean, its interval, their K."""
    winner, rows = winner_of(found.state), []
    for finalist in finalists_of_search(found.state):
        if finalist.mean is None:
            continue
        interval = interval_of(finalist)
        rows.append(
            {
                "n": finalist.record.key.number,
                "k": finalist.record.params.get("k"),
                "kx": _place_of_k(finalist.record, found.config),
                "mean": round(finalist.mean, 3),
                "low": round(interval[0], 3),
                "high": round(interval[1], 3),
                "seeds": len(finalist.values),
                "is_answer": winner is not None and winner.record.key == finalist.record.key,
            }
        )
    return rows


def finalists_of_search(state: SweepState) -> list[Finalist]:
    """The finalists that are trials of the search."""
    from tune_topkd.ledger import finalists

    return [finalist for finalist in finalists(state) if finalist.record.key.arm == SEARCH]


def interval_of(finalist: Finalist) -> tuple[float, float]:
    """Of the mean over seeds, in percent from 0 to 100; the mean itself of one seed."""
    from tune_topkd.verdict import mean_interval

    interval = mean_interval(list(finalist.values.values()))
    mean = finalist.mean or 0.0
    return (mean, mean) if interval is None else interval.of_top1


def seed_rows(named: Mapping[str, Finalist]) -> tuple[Rows, Rows]:
    """Trainings on fresh seeds: a row for each, and one for each trial's mean and interval."""
    each: Rows = []
    means: Rows = []
    for name, finalist in named.items():
        each += [{"name": name, "seed": seed, "top1": round(value, 3)} for seed, value in finalist.values.items()]
        if finalist.mean is not None:
            low, high = interval_of(finalist)
            means.append({"name": name, "mean": round(finalist.mean, 3), "low": round(low, 3), "high": round(high, 3)})
    return each, means


# --- time -------------------------------------------------------------------------------------------------------------


def timeline_rows(found: Findings) -> tuple[Rows, str]:
    """When each training ran, in lanes of trainings one after another; and the unit of time."""
    state = found.state
    ends = [record.ended_at for record in state.trials.values() if record.ended_at is not None]
    now = max([*ends, *(record.suggested_at for record in state.trials.values())], default=0.0)
    begun = state.started_at or min((r.suggested_at for r in state.trials.values()), default=0.0)
    length = now - begun
    unit, seconds = ("hours", 3600.0) if length > 5400 else ("minutes", 60.0) if length > 90 else ("seconds", 1.0)
    free: list[float] = []
    rows = []
    for record in sorted(state.trials.values(), key=lambda record: record.suggested_at):
        start, end = record.suggested_at - begun, (record.ended_at or now) - begun
        lane = next((i for i, until in enumerate(free) if until <= start + 1e-6), len(free))
        free[lane : lane + 1] = [end]
        rows.append(
            {
                "trial": str(record.key),
                "arm": _stage(record),
                "status": record.status.value,
                "lane": lane + 1,
                "begin": round(start / seconds, 4),
                "end": round(max(end, start) / seconds, 4),
                "epochs": record.epoch,
            }
        )
    return rows, unit


def _stage(record: TrialRecord) -> str:
    arm = record.key.arm
    return {SEARCH: "search", "repeat": "fresh seeds", TEST: "test set"}.get(arm, "baselines")
