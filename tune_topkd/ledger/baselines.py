"""How many trials each baseline is to have, and when all that finalists are chosen from has ended, by config and ledger."""

import math

from tune_topkd.config import RECIPE_PARAMETERS
from tune_topkd.config import SweepConfig
from tune_topkd.ledger.events import SEARCH
from tune_topkd.ledger.state import SweepState


def baseline_target(config: SweepConfig, state: SweepState, method: str) -> int | None:
    """The trials that a baseline is to have; none as long as that depends on trials of the search that have not ended.

    A baseline that is tuned alike gets as many full trainings as the search has trained epochs: those that were stopped
    early count by what they had.
    """
    assert config.baselines is not None, "it is one of them"
    if not config.baselines.is_tuned_alike(method):
        searched = any(name in RECIPE_PARAMETERS for name in config.space)
        return config.baselines.trials if searched else 1
    search = state.arm(SEARCH)
    if len(search) < state.target or not all(record.status.is_end for record in search):
        return None
    return max(math.ceil(sum(record.epoch for record in search) / config.recipe.epochs), 1)


def baseline_to_come(config: SweepConfig, state: SweepState) -> tuple[str, int | None] | None:
    """The first baseline that lacks a trial, and how many it is to have, if that is known by now; None if none lacks any."""
    later = None
    for method in config.baselines.methods if config.baselines else ():
        target = baseline_target(config, state, method)
        if target is None:
            later = later or (method, None)
        elif state.size(method) < target:
            return method, target
    return later


def is_searched(config: SweepConfig, state: SweepState) -> bool:
    """Whether all that finalists are chosen from has ended: the search's trials and the baselines'."""
    is_all_there = state.size() >= state.target and baseline_to_come(config, state) is None
    return is_all_there and all(record.of_trial is not None for record in state.running())
