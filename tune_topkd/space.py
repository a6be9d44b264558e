"""The space that is searched: from what the sampler proposes to the parameters a trial is given.

The sampler works on `Axis`es with fixed, inclusive bounds. A range whose bound names another parameter becomes an axis
from 0 to 1, the share of the way from its low to its high bound, so that the sampler's joint model stays valid while
`scale_last <= scale_top <= scale_gt` holds in every proposal. Relative weights are drawn and then scaled to their sum.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tune_topkd.config import BASELINE_SPACES
from tune_topkd.config import INTEGER_PARAMETERS
from tune_topkd.config import RECIPE_PARAMETERS
from tune_topkd.config import ParameterRange
from tune_topkd.config import RelativeConfig
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.config import weight_of_effect
from tune_topkd.config import what

NEAR_AN_END = 0.03
"""A value nearer than this to an end of its range, as a share of the range, may be better beyond it."""

_WITHIN = (0.618, 0.2763)
"""Shares of an axis that make no integer of its ends, but by a rare chance, and hardly both."""
_LONGEST_CHAIN = 6  # of ranges that a bound leads to, for which points within are tried: 4,096 of them


@dataclass(frozen=True)
class Axis:
    """One coordinate of a proposal: a number from `low` to `high`, both included, or one of `choices`."""

    name: str
    kind: Literal["int", "float", "choice"]
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[Scalar, ...] = ()

    def at(self, share: float) -> Scalar:
        """The value `share` (0 to 1) of the way along the axis, in the logarithm on a log axis."""
        if self.kind == "choice":
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        value = _between(self.low, self.high, share, log=self.log)
        return round(value) if self.kind == "int" else value

    def share(self, value: Scalar) -> float:
        """How far along the axis a number is, from 0 to 1: the inverse of `at`; 0.5 on an axis of one value alone."""
        number = float(value)
        if self.low == self.high:
            return 0.5
        if self.log:
            return math.log(number / self.low) / math.log(self.high / self.low)
        return (number - self.low) / (self.high - self.low)


def end_of_range(parameter: ParameterRange, value: Scalar) -> Literal["lower", "upper", ""]:
    """At which end of its range a value lies; empty if at none, or if an end names another parameter."""
    low, high = parameter.low, parameter.high
    if isinstance(value, str | bool) or isinstance(low, str) or isinstance(high, str):
        return ""
    if low is None or high is None or low >= high or (parameter.log and value <= 0):
        return ""
    place = Axis("", "float", low, high, log=parameter.log).share(value)
    return "upper" if place > 1 - NEAR_AN_END else "lower" if place < NEAR_AN_END else ""


def startup_trials_of(axes: int) -> int:
    """Random proposals before a model of so many axes takes over: two for each, and at least Optuna's 10."""
    return max(10, 2 * axes)


def random_proposals(config: SweepConfig) -> int:
    """Random proposals of a sweep before its sampler's model takes over: what it says, or what its axes need."""
    return config.sweep.startup_trials or startup_trials_of(len(config.space))


class Space:
    """The ranges of a `SweepConfig`, with their order, their conditional bounds and their relative weights."""

    def __init__(
        self,
        ranges: Mapping[str, ParameterRange],
        relative: RelativeConfig | None = None,
        fixed: Mapping[str, Scalar] | None = None,
    ) -> None:
        self._ranges = {name: ranges[name] for name in _bounds_first(ranges)}
        self._relative = relative
        self._fixed = fixed or {}
        """Parameters of the loss that are not searched, which an effect may depend on."""

    @classmethod
    def of(cls, config: SweepConfig) -> "Space":
        """The whole space of a sweep."""
        return cls(config.space, config.relative, config.loss)

    @classmethod
    def of_recipe(cls, config: SweepConfig) -> "Space":
        """The part of a sweep's space that is the recipe's: what a baseline is searched over."""
        return cls({name: r for name, r in config.space.items() if name in RECIPE_PARAMETERS})

    @classmethod
    def of_baseline(cls, config: SweepConfig, method: str) -> "Space":
        """What a baseline is searched over: the recipe's part of the space, and its own where it is tuned alike."""
        if config.baselines is None or not config.baselines.is_tuned_alike(method):
            return cls.of_recipe(config)
        own, relative = BASELINE_SPACES[method]
        ranges = {name: ParameterRange(low=low, high=high, log=True) for name, (low, _, high) in own.items()}
        return cls(ranges | {name: r for name, r in config.space.items() if name in RECIPE_PARAMETERS}, relative)

    def __len__(self) -> int:
        return len(self._ranges)

    def axes(self) -> list[Axis]:
        """What the sampler proposes values for, bounds before the ranges that name them."""
        return [_axis(name, parameter) for name, parameter in self._ranges.items()]

    def params(self, proposal: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """The parameters a trial is given for a proposal (one value per axis).

        Raises:
            ValueError: if a conditional range is empty for this proposal.
        """
        params: dict[str, Scalar] = {}
        for name, parameter in self._ranges.items():
            value = proposal[name]
            if parameter.bound_names():
                value = _resolved(name, parameter, params, float(value))
            params[name] = value
        return self._scaled(params)

    def proposal(self, params: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """The proposal that gives these parameters, each brought to the nearest value of its range: the inverse of `params`.

        Of relative weights only the ratios matter: they are brought into their ranges together, as far as that goes.

        Raises:
            ValueError: if a conditional range is empty for these parameters.
        """
        params = self._unscaled(params)
        proposal: dict[str, Scalar] = {}
        kept: dict[str, Scalar] = {}
        for name, parameter in self._ranges.items():
            axis, value = _axis(name, parameter), params[name]
            if axis.kind == "choice":
                proposal[name] = _nearest(value, axis.choices)
                continue
            low, high = _bounds(name, parameter, kept)
            inside = min(max(float(value), low), high)
            kept[name] = round(inside) if _is_int(name, parameter) else inside
            proposal[name] = kept[name]
            if parameter.bound_names():
                proposal[name] = _share(low, high, float(kept[name]), log=parameter.log)
        return proposal

    def check(self) -> None:
        """Check that no range is empty for any proposal.

        The bounds of a conditional range follow the ranges they name. It is narrowest where each of these is at an end of
        its axis; a range of whole numbers also where they meet between two integers, so a point within is tried as well.

        Raises:
            ValueError: names a range that can be empty, and the values of the others where it is.
        """
        for name, parameter in self._ranges.items():
            if not parameter.bound_names():
                continue
            above = _bounds_first(self._ranges, parameter.bound_names())
            axes = [_axis(n, self._ranges[n]) for n in above]
            points = (0.0, 1.0, *_WITHIN) if len(axes) <= _LONGEST_CHAIN else (0.0, 1.0)
            for shares in itertools.product(points, repeat=len(axes)):
                proposal = {axis.name: axis.at(share) for axis, share in zip(axes, shares, strict=True)}
                params = Space({n: self._ranges[n] for n in above}).params(proposal)
                try:
                    _bounds(name, parameter, params)
                except ValueError as error:
                    at = ", ".join(f"{n} = {value:g}" for n, value in params.items())
                    raise ValueError(f"{error}, at {at}") from None

    def corners(self) -> Iterator[dict[str, Scalar]]:
        """The parameters at every combination of axis ends (all choices of a choice axis)."""
        ends = [axis.choices or (axis.at(0.0), axis.at(1.0)) for axis in self.axes()]
        names = list(self._ranges)
        for values in itertools.product(*ends):
            yield self.params(dict(zip(names, values, strict=True)))

    def digest(self) -> str:
        """A short name of this space that changes with any range, but not with the order they are written in."""
        content = {name: r.model_dump(mode="json") for name, r in self._ranges.items()}
        relative = what(self._relative) if self._relative else None
        return digest({"ranges": content, "relative": relative})

    def _scaled(self, params: dict[str, Scalar]) -> dict[str, Scalar]:
        if self._relative is None:
            return params
        total = math.fsum(float(params[name]) for name in self._relative.of)
        scaled = {name: float(params[name]) * self._relative.sum / total for name in self._relative.of}
        units = self._units(params)
        return params | {name: value * units[name] if name in units else value for name, value in scaled.items()}

    def _unscaled(self, params: Mapping[str, Scalar]) -> Mapping[str, Scalar]:
        """The relative weights times what brings all of them into those of their bounds that are numbers."""
        names = self._relative.of if self._relative else []
        units = self._units(params)
        if not all(float(params[name]) > 0 and units.get(name, 1.0) > 0 for name in names):
            return params
        weights = {name: float(params[name]) / units.get(name, 1.0) for name in names}
        lows = [(self._ranges[name].low, value) for name, value in weights.items()]
        highs = [(self._ranges[name].high, value) for name, value in weights.items()]
        least = max((low / value for low, value in lows if isinstance(low, float)), default=0.0)
        most = min((high / value for high, value in highs if isinstance(high, float)), default=math.inf)
        factor = min(max(1.0, least), most)
        return {**params, **{name: value * factor for name, value in weights.items()}}

    def _units(self, params: Mapping[str, Scalar]) -> dict[str, float]:
        """What the relative weights are multiplied by to have their effect; empty where the weights themselves are drawn."""
        if self._relative is None or self._relative.units is None:
            return {}
        return {name: weight_of_effect(name, {**self._fixed, **params}) for name in self._relative.of}


def digest(content: object) -> str:
    """The first 16 hex digits of the SHA-256 of `content` as canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lattice(axes: list[Axis], n: int) -> list[dict[str, Scalar]]:
    """`n` proposals spread evenly over the axes: a grid with both ends for one axis, else an R-sequence.

    The R-sequence (Roberts 2018, 'The unreasonable effectiveness of quasirandom sequences') is a Kronecker lattice of
    the powers of the generalised golden ratio.
    """
    if len(axes) <= 1:
        shares = [[i / (n - 1) if n > 1 else 0.5] for i in range(n)]
    else:
        phi = 2.0
        for _ in range(60):
            phi = (1 + phi) ** (1 / (len(axes) + 1))
        shares = [[(0.5 + (i + 1) * phi ** -(d + 1)) % 1 for d in range(len(axes))] for i in range(n)]
    return [{axis.name: axis.at(s) for axis, s in zip(axes, row, strict=False)} for row in shares]


def _bounds_first(ranges: Mapping[str, ParameterRange], wanted: Iterable[str] | None = None) -> list[str]:
    """The ranges, or those that are wanted and all that their bounds lead to: each after the ones it names."""
    order: list[str] = []

    def visit(name: str) -> None:
        for bound in ranges[name].bound_names():
            visit(bound)
        if name not in order:
            order.append(name)

    for name in ranges if wanted is None else wanted:
        visit(name)
    return order


def _is_int(name: str, parameter: ParameterRange) -> bool:
    return parameter.type == "int" or (parameter.type is None and name in INTEGER_PARAMETERS)


def _axis(name: str, parameter: ParameterRange) -> Axis:
    if parameter.choices is not None:
        return Axis(name, "choice", choices=tuple(parameter.choices))
    if parameter.bound_names():
        return Axis(name, "float")
    low, high = (_bound(b, {}) for b in (parameter.low, parameter.high))
    return Axis(name, "int" if _is_int(name, parameter) else "float", low, high, parameter.log)


def _bound(bound: float | str | None, params: Mapping[str, Scalar]) -> float:
    assert bound is not None, "a range has both bounds"
    return float(params[bound]) if isinstance(bound, str) else float(bound)


def _bounds(name: str, parameter: ParameterRange, params: Mapping[str, Scalar]) -> tuple[float, float]:
    """A range's bounds, of a range of integers the outermost integers within them.

    Raises:
        ValueError: nothing lies between them.
    """
    low, high = (_bound(b, params) for b in (parameter.low, parameter.high))
    if _is_int(name, parameter):
        low, high = math.ceil(low), math.floor(high)
    if low > high:
        raise ValueError(
            f"space.{name}: low <= high must hold, but its bounds came out as low = {low:g}, high = {high:g}"
        )
    if parameter.log and low <= 0:
        raise ValueError(f"space.{name}: log: true needs bounds above 0, but low came out as {low:g}")
    return low, high


def _resolved(name: str, parameter: ParameterRange, params: Mapping[str, Scalar], share: float) -> Scalar:
    low, high = _bounds(name, parameter, params)
    if _is_int(name, parameter):
        return min(math.floor(_between(low, high + 1, share, log=parameter.log)), int(high))
    return _between(low, high, share, log=parameter.log)


def _between(low: float, high: float, share: float, *, log: bool) -> float:
    if share in (0.0, 1.0):
        return high if share else low  # the ends exactly, whatever rounding does in between
    if log:
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    else:
        value = low + share * (high - low)
    return min(max(value, low), high)


def _nearest(value: Scalar, choices: Sequence[Scalar]) -> Scalar:
    """The choice that is the value, or the nearest number to it, or the first."""
    numbers = [c for c in choices if isinstance(c, int | float) and not isinstance(c, bool)]
    if value in choices or isinstance(value, bool | str) or not numbers:
        return value if value in choices else choices[0]
    return min(numbers, key=lambda choice: abs(choice - value))


def _share(low: float, high: float, value: float, *, log: bool) -> float:
    if high == low:
        return 0.5
    if log and math.isinf(high / low):  # bounds further apart than a number can say
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    if log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)
