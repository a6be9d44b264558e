"""One config for several datasets and pairs: what it loses on each against what was found there.

Every full trial of any of the sweeps is a candidate, as far as it lies in all of their spaces and its method is theirs. On
each sweep a candidate loses what its answer has and the candidate has not, in points:

- where both were trained there on the same fresh seeds, the mean of the differences seed by seed;
- else by a model, a Gaussian process over that sweep's trials: it was not trained there. A trial that was stopped early
  counts with the value that its last epoch foretells, by a line through those that reached the end.

The recommended one is that whose worst loss is smallest (minimax regret, Savage 1951, 'The theory of statistical decision').
"""

import itertools
import math
import statistics
import warnings
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tune_topkd.config import DEFAULTS
from tune_topkd.config import OBJECTIVE
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.findings import NONE
from tune_topkd.findings import Figure
from tune_topkd.findings import ForAll
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import apart_by_seed
from tune_topkd.ledger import finalist_of
from tune_topkd.ledger import finalists
from tune_topkd.ledger import winner_of
from tune_topkd.space import Space
from tune_topkd.sweep.wording import counted
from tune_topkd.sweep.wording import is_same
from tune_topkd.sweep.wording import short_params
from tune_topkd.verdict import Interval
from tune_topkd.verdict import mean_interval

FEWEST = 8
"""Full trials below which nothing is foretold of a sweep."""
FOLDS = 5
_QUANTILE = statistics.NormalDist().inv_cdf(0.975)
WEAK = 0.5
"""A rank correlation below which a model foresees little."""


@dataclass(frozen=True)
class Searched:
    """A sweep, and what it was searched over."""

    config: SweepConfig
    """The frozen one."""
    state: SweepState
    complete: Mapping[str, Scalar]
    """Its parameters as the config has them, those that it searches at their defaults."""

    @property
    def name(self) -> str:
        """Of the sweep."""
        return self.state.header.sweep

    def params_of(self, record: TrialRecord) -> dict[str, Scalar]:
        """A trial's parameters, complete."""
        return {**self.complete, **record.params}

    def trials(self) -> list[TrialRecord]:
        """Those of its own method: the search's, and the untuned method's."""
        return [*self.state.arm(SEARCH), *self.state.arm(DEFAULTS)]


@dataclass(frozen=True)
class Loss:
    """What one config loses on one sweep against that sweep's answer, in points; below 0 it gains."""

    sweep: str
    points: float
    interval: Interval | None
    """At 95 %; none of one seed."""
    how: str
    """`own` (it is that sweep's answer), `seeds` (both were trained on fresh seeds), or `model`."""
    seeds: int = 0
    """On so many fresh seeds both were trained."""

    def text(self) -> str:
        """In words."""
        return Figure(self.points, self.interval).of_gain("")

    def data(self) -> dict[str, Any]:
        """As JSON can hold it."""
        interval = None if self.interval is None else list(self.interval)
        return {"sweep": self.sweep, "points": self.points, "interval": interval, "how": self.how, "seeds": self.seeds}


@dataclass(frozen=True)
class Recommendation:
    """One config for all of the sweeps, or why there is none."""

    why_none: str = ""
    params: Mapping[str, Scalar] = field(default_factory=dict)
    """What the sweeps search, complete; empty where there is none."""
    origin: str = ""
    """The trial it was, in words."""
    losses: Sequence[Loss] = ()
    of_defaults: Sequence[Loss] = ()
    """What the untuned method's defaults lose; empty where they do not lie in all spaces."""
    ranks: Mapping[str, float] = field(default_factory=dict)
    """How well each sweep's model ranks trials that it has not seen (Spearman)."""

    def data(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "why_none": self.why_none,
            "params": dict(self.params),
            "origin": self.origin,
            "losses": [loss.data() for loss in self.losses],
            "of_defaults": [loss.data() for loss in self.of_defaults],
            "ranks": dict(self.ranks),
        }

    def told(self) -> ForAll:
        """In words: what it is, and a table of what it loses where."""
        if not self.params:
            return ForAll(f"No config is recommended for all: {self.why_none}.")
        worst = max(self.losses, key=lambda loss: loss.points)
        plain = {loss.sweep: loss.text() for loss in self.of_defaults}
        return ForAll(
            f"One config for all {len(self.losses)}: {short_params(self.params)} ({self.origin}). "
            f"Against tuning each it loses {worst.points:.2f} points at most, on {worst.sweep}.",
            ("sweep", "loses, points", "the defaults lose", "by"),
            [(loss.sweep, loss.text(), plain.get(loss.sweep, NONE), self._by(loss)) for loss in self.losses],
        )

    def lines(self) -> list[str]:
        """As Markdown."""
        told = self.told()
        if not told.rows:
            return [told.sentence]
        rows = [f"| {' | '.join(row)} |" for row in told.rows]
        return [told.sentence, "", f"| {' | '.join(told.headings)} |", "|---|--:|--:|---|", *rows]

    def _by(self, loss: Loss) -> str:
        if loss.how == "own":
            return "it is the answer there"
        if loss.how == "seeds":
            return counted(loss.seeds, "fresh seed")
        rank = self.ranks[loss.sweep]
        weak = ", which foresees little" if rank < WEAK else ""
        return f"a model of its trials (rank correlation {rank:.2f} on those left out{weak}); not trained there"


def recommended(sweeps: Sequence[Searched]) -> Recommendation | None:
    """The config with the smallest worst loss over all sweeps; None for fewer than two."""
    if len(sweeps) < 2:
        return None
    methods = sorted({sweep.config.method for sweep in sweeps})
    if len(methods) > 1:
        return Recommendation(f"they are of several methods ({', '.join(methods)})")
    few = next((s for s in sweeps if len(_full(s)) < FEWEST), None)
    if few is not None:
        return Recommendation(f"{few.name} has {len(_full(few))} full trials of its method, and a model needs {FEWEST}")
    candidates = _candidates(sweeps)
    if not candidates:
        return Recommendation("no full trial of any of them lies in the spaces of all")
    models = [_Model(sweep) for sweep in sweeps]
    losses = [[model.loss(params) for model in models] for params, _ in candidates]
    best = min(range(len(candidates)), key=lambda i: max(loss.points for loss in losses[i]))
    plain = {name: sweeps[0].complete[name] for name in candidates[best][0] if name in sweeps[0].complete}
    knows_plain = len(plain) == len(candidates[best][0]) and all(_lies_in(sweep, plain) for sweep in sweeps)
    return Recommendation(
        params=candidates[best][0],
        origin=candidates[best][1],
        losses=losses[best],
        of_defaults=[model.loss(plain) for model in models] if knows_plain else (),
        ranks={sweep.name: model.rank for sweep, model in zip(sweeps, models, strict=True)},
    )


def _full(sweep: Searched) -> list[TrialRecord]:
    return [r for r in sweep.trials() if r.status is TrialStatus.COMPLETED and r.value is not None]


def _candidates(sweeps: Sequence[Searched]) -> list[tuple[dict[str, Scalar], str]]:
    """Configs that lie in all spaces, each once: what any of them searches, and the trial it was."""
    searched = list(dict.fromkeys(itertools.chain.from_iterable(sweep.config.space for sweep in sweeps)))
    found: list[tuple[dict[str, Scalar], str]] = []
    for sweep in sweeps:
        for record in _full(sweep):
            known = sweep.params_of(record)
            params = {name: known[name] for name in searched if name in known}
            is_new = not any(is_same(params, other) for other, _ in found)
            if len(params) == len(searched) and is_new and all(_lies_in(other, params) for other in sweeps):
                kind = "trial" if record.key.arm == SEARCH else "baseline"
                found.append((params, f"{kind} {record.key} of {sweep.name}"))
    return found


def _lies_in(sweep: Searched, params: Mapping[str, Scalar]) -> bool:
    """Whether a sweep could have proposed it: within its ranges, and as it is there where it is not searched."""
    here = {**sweep.complete, **params}
    space = Space.of(sweep.config)
    try:
        nearest = space.params(space.proposal(here))
    except ValueError:  # a range is empty there
        return False
    fixed = {name: value for name, value in sweep.complete.items() if name in params and name not in nearest}
    searched = {name: params[name] for name in nearest if name in params}
    return is_same(searched, nearest) and is_same({name: params[name] for name in fixed}, fixed)


class _Model:
    """What a sweep's trials tell of configs that were not trained there."""

    def __init__(self, sweep: Searched) -> None:
        self._sweep = sweep
        self._names = list(sweep.config.space)
        self._levels: dict[str, list[str]] = {}
        winner = winner_of(sweep.state)
        assert winner is not None, "there are full trials"
        self._answer = winner.record
        params, values = _evidence(sweep)
        for name in self._names:
            if any(isinstance(p[name], bool | str) for p in params):
                self._levels[name] = sorted({str(p[name]) for p in params})
        rows = np.array([self._row(p) for p in params])
        self._middle, spread = rows.mean(axis=0), rows.std(axis=0)
        self._spread = np.where(spread > 0, spread, 1.0)
        points, self._values = self._scaled(rows), np.array(values)
        self._process = _fitted(points, self._values)
        self.rank = _rank(self._process, points, self._values)

    def loss(self, params: Mapping[str, Scalar]) -> Loss:
        """What these parameters lose here against the answer."""
        name, own = self._sweep.name, self._sweep.params_of(self._answer)
        if is_same({n: own[n] for n in params}, params):
            return Loss(name, 0.0, None, "own")
        if apart := self._apart(params):
            return Loss(name, statistics.fmean(apart), mean_interval(apart), "seeds", len(apart))
        points = self._scaled(np.array([self._row(own), self._row({**own, **params})]))
        means, covariance = self._process.predict(points, return_cov=True)
        variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) - 2 * self._noise
        lost, half = float(means[0] - means[1]), _QUANTILE * math.sqrt(max(variance, 0.0))
        return Loss(name, lost, Interval(lost - half, lost + half), "model")

    @property
    def _noise(self) -> float:
        """The variance of one training's value around what its config gives, in points squared."""
        return float(self._process.kernel_.k2.noise_level) * float(self._values.std()) ** 2

    def _apart(self, params: Mapping[str, Scalar]) -> list[float]:
        """By how much the answer is above these parameters, by seed; empty unless both have been repeated here."""
        state = self._sweep.state
        answer = finalist_of(state, self._answer)
        for record in self._sweep.trials():
            known = self._sweep.params_of(record)
            is_it = is_same({n: known[n] for n in params}, params)
            if is_it and (apart := apart_by_seed(answer, finalist_of(state, record))):
                return apart
        return []

    def _row(self, params: Mapping[str, Scalar]) -> list[float]:
        """The coordinates of a config: logarithms where its range has them, a 0 or 1 for each choice that is a word."""
        row: list[float] = []
        for name in self._names:
            if name in self._levels:
                row += [float(str(params[name]) == level) for level in self._levels[name]]
            else:
                value = float(params[name])
                row.append(math.log(value) if self._sweep.config.space[name].log and value > 0 else value)
        return row

    def _scaled(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((rows - self._middle) / self._spread)


def _evidence(sweep: Searched) -> tuple[list[dict[str, Scalar]], list[float]]:
    """Parameters and values: of full trials, of their repeats, and of stopped ones what their last epoch foretells."""
    metric, done = sweep.config.rung_metric, _full(sweep)
    found = [(record, record.value or 0.0) for record in done]
    repeats = [r for f in finalists(sweep.state) for r in f.repeats.values() if r.origin.arm in (SEARCH, DEFAULTS)]
    found += [(r, r.value or 0.0) for r in repeats if r.status is TrialStatus.COMPLETED]
    for record in sweep.trials():
        if record.status is TrialStatus.PRUNED and (value := _foretold(record, done, metric)) is not None:
            found.append((record, value))
    return [sweep.params_of(record) for record, _ in found], [value for _, value in found]


def _foretold(record: TrialRecord, done: Sequence[TrialRecord], metric: str) -> float | None:
    """The value at the end of a trial that was stopped; None where too few that reached it say anything."""
    epoch = record.epoch
    pairs = [(r.reports[epoch][metric], r.reports[r.epoch][OBJECTIVE]) for r in done if epoch in r.reports]
    if len(pairs) < FEWEST or len({before for before, _ in pairs}) < 2:
        return None
    line = statistics.linear_regression(*zip(*pairs, strict=True))
    return line.intercept + line.slope * record.reports[epoch][metric]


def _fitted(points: NDArray[np.float64], values: NDArray[np.float64]) -> Any:
    """A Gaussian process with a length for each coordinate, and noise (Rasmussen & Williams 2006, §2.2 and §5.1)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel
    from sklearn.gaussian_process.kernels import Matern
    from sklearn.gaussian_process.kernels import WhiteKernel

    size = points.shape[1]
    smooth = Matern(np.full(size, math.sqrt(size)), (0.3, 100.0), nu=2.5)
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * smooth + WhiteKernel(0.1, (1e-3, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound: the coordinate says nothing
        return process.fit(points, values)


def _rank(process: Any, points: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """Spearman's correlation of the values with what a model without them foretells; 0 where nothing varies."""
    from scipy import stats
    from sklearn.gaussian_process import GaussianProcessRegressor

    foretold = np.full(len(values), values.mean())
    _, place = np.unique(points, axis=0, return_inverse=True)
    groups = place.ravel() % FOLDS  # the seeds of one config stay together
    for fold in range(FOLDS):
        out = groups == fold
        if not out.any() or out.all():
            continue
        rest = GaussianProcessRegressor(process.kernel_, optimizer=None, normalize_y=True).fit(
            points[~out], values[~out]
        )
        foretold[out] = rest.predict(points[out])
    if len(set(values)) < 2 or len(set(foretold)) < 2:
        return 0.0
    return float(stats.spearmanr(values, foretold).statistic)
