"""`run` of a sweep that has begun: is it the same sweep, and what of the call applies to what is left of it?"""

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from tune_topkd.config import ConfigError
from tune_topkd.config import Problem
from tune_topkd.config import SweepConfig
from tune_topkd.config import value_at
from tune_topkd.config import without
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import read_state
from tune_topkd.sweep.driver import Limits
from tune_topkd.sweep.workspace import PLACES
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.sweep.workspace import condition
from tune_topkd.sweep.workspace import frozen_config
from tune_topkd.sweep.workspace import may_begin_again

LIMITS = ("sweep.trials", "sweep.time_budget", "sweep.gpu_hours", "sweep.cpu_hours")
_MAY_DIFFER = (*LIMITS, "description", *PLACES)
"""What says how far a sweep goes, and where its files are, but never what its trials are."""
_MOST_TOLD = 5


@dataclass(frozen=True)
class Continuation:
    """With what a sweep that has begun is gone on with."""

    limits: Limits
    """Trials are among them only if they are more than were ever asked for."""
    places: Mapping[str, Any] = field(default_factory=dict)
    """Where its files are now, where that is elsewhere than before."""


def continuation(config: SweepConfig, source: str, name: str, workspace: Workspace) -> Continuation | None:
    """How to go on with the sweep of this name; None if it is to begin.

    Args:
        config: what it would begin with.
        source: where that is from, for the error.
        name: of the sweep.
        workspace: where it lies.

    Raises:
        ConfigError: the sweep of this name is another one; names the keys that differ.
        LedgerError: its ledger is damaged.
    """
    if not workspace.has_begun(name):
        return None
    folder = workspace.folder(name)
    state = read_state(folder / LEDGER_FILE)
    if may_begin_again(state) and condition(folder, state) != "running":
        return None
    begun = frozen_config(folder, state).model_dump(mode="json")
    now = config.model_dump(mode="json")
    for key in ("cpus_per_trial", "gpus_per_trial"):
        if now["sweep"][key] == "auto":  # it has been measured
            begun["sweep"][key] = "auto"
    differences = _differences(without(begun, _MAY_DIFFER), without(now, _MAY_DIFFER))
    problems = [Problem(key=key, rule=f"was {then!r} and is {value!r}") for key, then, value in differences]
    if problems:
        rule = f"{folder} holds another sweep of this name; --name gives this one another, or put back what differs:"
        more = [Problem(key="", rule=f"and {n} more")] if (n := len(problems) - _MOST_TOLD) > 0 else []
        raise ConfigError(source, [Problem(key="--or-resume", rule=rule), *problems[:_MOST_TOLD], *more])
    trials, *others = (value_at(now, key) for key in LIMITS)
    places = {key: value_at(now, key) for key in PLACES if value_at(now, key) != value_at(begun, key)}
    return Continuation(Limits(trials if trials > state.asked else None, *others), places)


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values are not the same, with both."""
    for key in dict.fromkeys([*begun, *now]):
        then, value = begun.get(key), now.get(key)
        if isinstance(then, Mapping) and isinstance(value, Mapping):
            yield from _differences(then, value, f"{parent}{key}.")
        elif then != value:
            yield f"{parent}{key}", then, value
