"""How much of the variation in top-1 goes with each parameter, by Optuna's measures."""

from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.importance import BaseImportanceEvaluator
from optuna.importance import FanovaImportanceEvaluator
from optuna.importance import PedAnovaImportanceEvaluator

from tune_topkd.config import INTEGER_PARAMETERS
from tune_topkd.config import OBJECTIVE
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.findings import Importance
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord

optuna.logging.set_verbosity(optuna.logging.WARNING)  # studies are made here only to be measured

MOST = 200
"""Trials that a measure is taken over: fANOVA's time grows with their square."""
FEWEST_PER_PARAMETER = 1.5
"""Trials for each parameter below which a measure says nothing."""

_Pair = tuple[Mapping[str, Scalar | None], float]
_Measure = tuple[str, BaseImportanceEvaluator, Sequence[_Pair]]


class _Kinds(NamedTuple):
    """Which parameters are searched in the logarithm, which have choices, and which are whole numbers."""

    logs: set[str]
    choices: set[str]
    whole: set[str]


def importances(config: SweepConfig, state: SweepState) -> list[Importance]:
    """How much of the variation goes with each parameter, at the end and at the first rung.

    Completed trials are few, and early stopping chose them, so it is also measured at the first rung, where all trials
    have a value after the same number of epochs; that is about learning fast, not about ending high.
    """
    done = [(dict(record.params), record.value or 0.0) for record in state.ranked()]
    rungs = config.sweep.asha.rungs(config.recipe.epochs) if config.sweep.asha else []
    early = list(_at(state.arm(SEARCH), rungs[0], config.rung_metric)) if rungs else []
    names = [name for name in config.space if len({str(r.params.get(name)) for r in state.arm(SEARCH)}) > 1]
    logs = {name for name in names if config.space[name].log}
    choices = {name for name in names if config.space[name].choices is not None}
    whole = {name for name in names if name in INTEGER_PARAMETERS or config.space[name].type == "int"}
    measures = _measures(done, early, rungs[0] if rungs else None)
    return _measured(measures, names, _Kinds(logs, choices, whole))


def importances_of(
    params: Mapping[int, Mapping[str, Scalar | None]],
    at_the_end: Mapping[int, float],
    at_first_rung: Mapping[int, float],
    rung: int | None,
    logs: Collection[str] = (),
) -> list[Importance]:
    """The same from plain tables, such as those that MLflow's runs give.

    Args:
        params: what each trial was given, by its number; of a trial that lacks one that others have, it is None.
        at_the_end: top-1 in percent of the trials that reached the full budget.
        at_first_rung: that of all trials that reached the first rung, there.
        rung: the first rung's epoch; None where none was stopped early.
        logs: parameters that were searched in the logarithm.
    """
    names = list(dict.fromkeys(name for of_trial in params.values() for name in of_trial))
    names = [name for name in names if len({str(of_trial.get(name)) for of_trial in params.values()}) > 1]
    values = {name: [v for of_trial in params.values() if (v := of_trial.get(name)) is not None] for name in names}
    whole = {name for name in names if all(isinstance(v, int) and not isinstance(v, bool) for v in values[name])}
    choices = {name for name in names if any(isinstance(value, bool | str) for value in values[name])}
    ends, early = (
        [(dict(params[n]), v) for n, v in found.items() if n in params] for found in (at_the_end, at_first_rung)
    )
    return _measured(_measures(ends, early, rung), names, _Kinds(set(logs), choices, whole))


def _measures(ends: Sequence[_Pair], early: Sequence[_Pair], rung: int | None) -> list[_Measure]:
    """What is measured over which trials, each with its value."""
    fanova = FanovaImportanceEvaluator(seed=0)
    quarter = PedAnovaImportanceEvaluator(target_quantile=0.25)
    if rung is None:
        return [("fANOVA", fanova, ends), ("PED-ANOVA", quarter, ends)]
    return [
        ("fANOVA, full budget", fanova, ends),
        (f"fANOVA, at epoch {rung}", fanova, early),
        (f"PED-ANOVA, at epoch {rung}", quarter, early),
    ]


def _measured(measures: Sequence[_Measure], names: Sequence[str], kinds: _Kinds) -> list[Importance]:
    found = []
    for measure, evaluator, pairs in measures:
        if len(pairs) < max(FEWEST_PER_PARAMETER * len(names), 4) or len({value for _, value in pairs}) < 2:
            continue
        taken = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), MOST)).round().astype(int))]
        if shares := _shares(kinds, names, taken, evaluator):
            found.append(Importance(measure, len(taken), len(pairs), shares))
    return found


def _at(records: Sequence[TrialRecord], epoch: int, metric: str) -> Iterator[_Pair]:
    for record in records:
        report = record.reports.get(epoch, {})
        value = report.get(metric, report.get(OBJECTIVE))
        if value is not None and np.isfinite(value):
            yield dict(record.params), value


def _shares(
    kinds: _Kinds, names: Sequence[str], pairs: Sequence[_Pair], evaluator: BaseImportanceEvaluator
) -> dict[str, float]:
    """By parameter, those that differ among these trials; empty if none does."""
    columns = {name: [params.get(name) for params, _ in pairs] for name in names}
    known = {name: [v for v in values if v is not None] for name, values in columns.items()}
    used = {name: known[name] for name in names if len(known[name]) == len(pairs) and len(set(known[name])) > 1}
    if not used:
        return {}
    distributions = {name: _distribution(kinds, name, values) for name, values in used.items()}
    study = optuna.create_study(direction="maximize", storage=optuna.storages.InMemoryStorage())
    for place, (_, value) in enumerate(pairs):
        params: Mapping[str, Scalar] = {name: values[place] for name, values in used.items()}
        study.add_trial(optuna.trial.create_trial(params=dict(params), distributions=distributions, value=float(value)))
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in shares.items() if np.isfinite(share)}


def _distribution(kinds: _Kinds, name: str, values: Sequence[Scalar]) -> BaseDistribution:
    """Of the values that there are, on the axis that is searched."""
    if name in kinds.choices or any(isinstance(value, bool | str) for value in values):
        return CategoricalDistribution(sorted(set(values), key=str))
    numbers, is_log = [float(value) for value in values], name in kinds.logs
    if name in kinds.whole and all(number.is_integer() for number in numbers):
        return IntDistribution(int(min(numbers)), int(max(numbers)), log=is_log)
    return FloatDistribution(min(numbers), max(numbers), log=is_log)
