"""What other sweeps found, to be tried first."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from tune_topkd.config import ConfigError
from tune_topkd.config import Problem
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.config import loss_part
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import read_state
from tune_topkd.space import Space
from tune_topkd.sweep.preflight import complete_parameters
from tune_topkd.sweep.preflight import first_proposals
from tune_topkd.sweep.wording import changes
from tune_topkd.sweep.wording import is_same
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.sweep.workspace import frozen_config

WARM_STARTS = 3
"""How many of another sweep's best trials are tried first."""


def warm_starts(
    sweeps: Sequence[str], workspace: Workspace, config: SweepConfig, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The parameters of other sweeps' best trials, to be tried first, brought into this space: each only once.

    A parameter that another sweep did not search has the value that it had there. Of one that is not searched here the
    value of here stays.

    Args:
        sweeps: the other ones.
        workspace: where they are.
        config: of the sweep that is to begin; what it tries first of itself is not repeated.
        note: is told of each value that is another one here.

    Raises:
        ConfigError: there is no such sweep, none of its trials reached the full budget, or its method lacks parameters of
            this space.
    """
    space = Space.of(config)
    found: list[dict[str, Any]] = []
    tried = [space.params(space.proposal(params)) for params in first_proposals(config)]
    for sweep in sweeps:
        of_sweep = 0
        for record, there in _ranked(sweep, workspace, config):
            here = space.params(space.proposal(there))
            if of_sweep < WARM_STARTS and not any(is_same(here, other) for other in [*tried, *found]):
                found.append(here)
                of_sweep += 1
                for told in _differences(config, {**loss_part(there), **record.params}, here):
                    note(f"--warm-start {sweep}: trial {record.key.number}: {told}")
    return found


def _ranked(sweep: str, workspace: Workspace, config: SweepConfig) -> list[tuple[TrialRecord, dict[str, Scalar]]]:
    """Another sweep's trials of the full budget with their complete parameters, the best first."""
    folder = workspace.existing(sweep)
    state = read_state(folder / LEDGER_FILE)
    ranked = state.ranked()
    fixed = complete_parameters(frozen_config(folder, state)) if ranked else {}
    found = [(record, {**fixed, **record.params}) for record in ranked]
    missing = sorted(set(config.space) - set(found[0][1])) if found else []
    if not found or missing:
        rule = f"its trials lack {', '.join(missing)}" if missing else "has no trial that reached the full budget"
        raise ConfigError("--warm-start", [Problem(key=sweep, rule=rule)])
    return found


def _differences(config: SweepConfig, there: Mapping[str, Scalar], here: Mapping[str, Scalar]) -> list[str]:
    """In words, what of a trial's parameters is another here; of relative weights only the ratios matter."""
    scaled = config.relative.of if config.relative else []
    nearest = changes(there, {name: value for name, value in here.items() if name not in scaled and name in there})
    fixed = {name: value for name, value in complete_parameters(config).items() if name in there and name not in here}
    return [
        *(f"{told}, the nearest in this space" for told in nearest),
        *(f"{told}, as it is not searched here" for told in changes(there, fixed)),
    ]
