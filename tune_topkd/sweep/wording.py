"""Values and times as people write them."""

import math
from collections.abc import Iterator
from collections.abc import Mapping

from tune_topkd.config import Scalar
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import TEST
from tune_topkd.ledger import TrialRecord


def short(value: Scalar) -> str:
    """A value in few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def short_params(params: Mapping[str, Scalar]) -> str:
    """Parameters in one short line."""
    return " ".join(f"{name}={short(value)}" for name, value in params.items())


def changes(params: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> Iterator[str]:
    """What is different in the other parameters, in words; rounding is no difference."""
    for name, value in other.items():
        before = params[name]
        if isinstance(value, float) and isinstance(before, float | int):
            is_same_value = math.isclose(value, before, rel_tol=1e-6)
        else:
            is_same_value = value == before
        if not is_same_value:
            yield f"{name} = {short(before)} becomes {short(value)}"


def is_same(params: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> bool:
    """Whether two sets of parameters are one, but for rounding."""
    return params.keys() == other.keys() and not any(changes(params, other))


def title(record: TrialRecord) -> str:
    """A trial as a person is told of it: `trial 0007`, `baseline kd-0001`, `trial 0007 on seed 2`."""
    kind = "trial" if record.origin.arm == SEARCH else "baseline"
    on = "" if record.of_trial is None else f" on seed {record.seed}"
    return f"{kind} {record.origin}{on}" + (", for the test set" if record.key.arm == TEST else "")


def counted(number: float, noun: str) -> str:
    """A number of things: `1 trial`, `2 trials`."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"
