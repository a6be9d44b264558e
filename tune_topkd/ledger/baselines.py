"""How many trials each baseline is to have, by the config and the ledger."""

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
