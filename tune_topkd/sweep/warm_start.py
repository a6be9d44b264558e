"""What another sweep found, to be tried first."""

from collections.abc import Callable
from typing import Any

from tune_topkd.config import ConfigError
from tune_topkd.config import Problem
from tune_topkd.config import SweepConfig
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import read_state
from tune_topkd.space import Space
from tune_topkd.sweep.preflight import first_proposals
from tune_topkd.sweep.wording import changes
from tune_topkd.sweep.wording import is_same
from tune_topkd.sweep.workspace import Workspace

WARM_STARTS = 3
"""How many of another sweep's best trials are tried first."""


def warm_starts(
    sweep: str, workspace: Workspace, config: SweepConfig, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The parameters of another sweep's best trials, to be tried first, brought into this space: each only once.

    Args:
        sweep: the other one.
        workspace: where it is.
        config: of the sweep that is to begin; its defaults are tried anyway.
        note: is told of each value that is another one here.

    Raises:
        ConfigError: there is no such sweep, or it lacks parameters of this space.
    """
    ranked = read_state(workspace.existing(sweep) / LEDGER_FILE).ranked()
    missing = sorted(set(config.space) - set(ranked[0].params)) if ranked else []
    if not ranked or missing:
        rule = f"its trials lack {', '.join(missing)}" if missing else "has no trial that reached the full budget"
        raise ConfigError("--warm-start", [Problem(key=sweep, rule=rule)])
    space = Space.of(config)
    tried = [space.params(space.proposal(params)) for params in first_proposals(config)]
    found: list[dict[str, Any]] = []
    for record in ranked:
        params = space.params(space.proposal(record.params))
        if len(found) < WARM_STARTS and not any(is_same(params, other) for other in [*tried, *found]):
            found.append(params)
            scaled = config.relative.of if config.relative else []  # of which only the ratios matter
            kept = {name: value for name, value in params.items() if name not in scaled}
            for told in changes(record.params, kept):
                note(f"--warm-start {sweep}: trial {record.key.number}: {told}, the nearest in this space")
    return found
