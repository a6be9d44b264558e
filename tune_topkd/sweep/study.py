"""A sweep as Optuna studies, in a SQLite file that optuna-dashboard and Optuna's own plots open."""

import contextlib
import math
import os
import sqlite3
import tempfile
from collections.abc import Mapping
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from tune_topkd.config import OBJECTIVE
from tune_topkd.config import ConfigError
from tune_topkd.config import ParameterRange
from tune_topkd.config import Problem
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.ledger import REPEAT
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import TEST
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import repeats_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STUDY = "optuna"
"""The format's name."""
_OURS = "tune_topkd.sweep"


def write_study(path: Path, config: SweepConfig, state: SweepState) -> list[str]:
    """Write a sweep's trials as Optuna studies, and return the studies' names.

    The search is a study of the sweep's name, each baseline one of its own, `SWEEP/ARM`. A trial has its parameters as the
    training was given them, validation top-1 in percent by epoch as its intermediate values, its state, times and, as user
    attributes, why it ended and what fresh seeds gave. Trials under way are RUNNING.

    Args:
        path: the file; an earlier export is replaced.
        config: the sweep's frozen config.
        state: its trials.

    Raises:
        ConfigError: there is a file of another kind, which is left alone.
        OSError: the file cannot be written.
    """
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        try:
            storage = optuna.storages.RDBStorage(_url(Path(name)))
            names = [_write(storage, config, state, arm) for arm in (SEARCH, *_baselines(state))]
            storage.engine.dispose()
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return names


def _baselines(state: SweepState) -> list[str]:
    arms = dict.fromkeys(key.arm for key in state.trials)
    return [arm for arm in arms if arm not in (SEARCH, REPEAT, TEST)]


def _check_replaceable(path: Path) -> None:
    """Raise ConfigError if there is something that is no such export."""
    if not path.exists() or (path.is_file() and _is_export(path)):
        return
    rule = "is there already and is no such export; remove it, or choose another name"
    raise ConfigError("--output", [Problem(key=str(path), rule=rule)])


def _is_export(path: Path) -> bool:
    """Whether each study of a database is one that was written here. Read without Optuna, which would add its tables."""
    count = "select (select count(*) from studies), (select count(*) from study_user_attributes where key = ?)"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            studies, ours = database.execute(count, (_OURS,)).fetchone()
    except sqlite3.Error:
        return False
    return bool(studies) and studies == ours


def _url(path: Path) -> str:
    return f"sqlite:///{path.absolute()}"


def _write(storage: Any, config: SweepConfig, state: SweepState, arm: str) -> str:
    import optuna

    sweep = state.header.sweep
    name = sweep if arm == SEARCH else f"{sweep}/{arm}"
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    told = {_OURS: sweep, "sweep_id": state.header.id, "method": config.method if arm == SEARCH else arm}
    told |= {"dataset": config.data.name, "student": config.student.name, "value": "validation top-1 in percent"}
    told |= {"teacher": config.teacher.name} if config.teacher else {}
    for key, value in told.items():
        study.set_user_attr(key, value)
    records = state.arm(arm)
    distributions = _distributions(config, records)
    study.add_trials([_trial(state, record, distributions) for record in records])
    return name


def _trial(state: SweepState, record: TrialRecord, distributions: Mapping[str, "BaseDistribution"]) -> "FrozenTrial":
    import optuna

    states = {
        TrialStatus.COMPLETED: optuna.trial.TrialState.COMPLETE,
        TrialStatus.PRUNED: optuna.trial.TrialState.PRUNED,
        TrialStatus.FAILED: optuna.trial.TrialState.FAIL,
        TrialStatus.RUNNING: optuna.trial.TrialState.RUNNING,
    }
    curve = {epoch: metrics[OBJECTIVE] for epoch, metrics in record.reports.items() if OBJECTIVE in metrics}
    told: dict[str, Any] = {"trial": str(record.key)}
    told |= {"reason": record.reason} if record.reason else {}
    told |= {"error": record.error} if record.error else {}
    repeats = {seed: r.value for seed, r in repeats_of(state, record).items() if r.status is TrialStatus.COMPLETED}
    if repeats:
        told["fresh_seeds"] = {str(seed): value for seed, value in sorted(repeats.items())}
    trial = optuna.trial.create_trial(
        state=states[record.status],
        value=record.value if record.status is TrialStatus.COMPLETED else None,
        params={name: value for name, value in record.params.items() if name in distributions},
        distributions={name: of for name, of in distributions.items() if name in record.params},
        user_attrs=told,
        intermediate_values={epoch: value for epoch, value in curve.items() if math.isfinite(value)},
    )
    trial.datetime_start = datetime.fromtimestamp(record.suggested_at)
    trial.datetime_complete = None if record.ended_at is None else datetime.fromtimestamp(record.ended_at)
    return trial


def _distributions(config: SweepConfig, records: Sequence[TrialRecord]) -> dict[str, "BaseDistribution"]:
    """Of each parameter, as wide as its range and as the values that trials were given.

    What depends on other parameters, a bound or relative weights, has no range of its own, so that of its values counts too.
    """
    names = dict.fromkeys(name for record in records for name in record.params)
    found = {}
    for name in names:
        values = [record.params[name] for record in records if name in record.params]
        found[name] = _distribution(config.space.get(name), values)
    return found


def _distribution(parameter: ParameterRange | None, values: Sequence[Scalar]) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution
    from optuna.distributions import FloatDistribution
    from optuna.distributions import IntDistribution

    if any(isinstance(value, bool | str) for value in values) or (parameter and parameter.choices is not None):
        choices = [*(parameter.choices or [])] if parameter else []
        return CategoricalDistribution([*dict.fromkeys([*choices, *values])])
    numbers = [float(value) for value in values]
    bounds = [b for b in (parameter.low, parameter.high) if isinstance(b, int | float)] if parameter else []
    low, high = min([*numbers, *bounds]), max([*numbers, *bounds])
    is_log = (parameter.log if parameter else low > 0 and high > 10 * low) and low > 0
    if all(isinstance(value, int) for value in values):
        return IntDistribution(int(low), int(high), log=is_log)
    return FloatDistribution(low, high, log=is_log)
