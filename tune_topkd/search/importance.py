"""How much of the variation in top-1 goes with each parameter, by Optuna's measures."""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence

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

MOST = 200
"""Trials that a measure is taken over: fANOVA's time grows with their square."""
FEWEST_PER_PARAMETER = 1.5
"""Trials for each parameter below which a measure says nothing."""


def importances(config: SweepConfig, state: SweepState) -> list[Importance]:
    """How much of the variation goes with each parameter, at the end and at the first rung.

    Completed trials are few, and early stopping chose them, so it is also measured at the first rung, where all trials
    have a value after the same number of epochs; that is about learning fast, not about ending high.
    """
    fanova = FanovaImportanceEvaluator(seed=0)
    quarter = PedAnovaImportanceEvaluator(target_quantile=0.25)
    done = [(record, record.value or 0.0) for record in state.ranked()]
    rungs = config.sweep.asha.rungs(config.recipe.epochs) if config.sweep.asha else []
    measures: list[tuple[str, BaseImportanceEvaluator, list[tuple[TrialRecord, float]]]]
    if rungs:
        early = list(_at(state.arm(SEARCH), rungs[0], config.rung_metric))
        measures = [
            ("fANOVA, full budget", fanova, done),
            (f"fANOVA, at epoch {rungs[0]}", fanova, early),
            (f"PED-ANOVA, at epoch {rungs[0]}", quarter, early),
        ]
    else:
        measures = [("fANOVA", fanova, done), ("PED-ANOVA", quarter, done)]
    names = [name for name in config.space if len({str(r.params.get(name)) for r in state.arm(SEARCH)}) > 1]
    found = []
    for measure, evaluator, pairs in measures:
        if len(pairs) < max(FEWEST_PER_PARAMETER * len(names), 4) or len({value for _, value in pairs}) < 2:
            continue
        taken = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), MOST)).round().astype(int))]
        if shares := _shares(config, names, taken, evaluator):
            found.append(Importance(measure, len(taken), len(pairs), shares))
    return found


def _at(records: Sequence[TrialRecord], epoch: int, metric: str) -> Iterator[tuple[TrialRecord, float]]:
    for record in records:
        report = record.reports.get(epoch, {})
        value = report.get(metric, report.get(OBJECTIVE))
        if value is not None and np.isfinite(value):
            yield record, value


def _shares(
    config: SweepConfig,
    names: Sequence[str],
    pairs: Sequence[tuple[TrialRecord, float]],
    evaluator: BaseImportanceEvaluator,
) -> dict[str, float]:
    """By parameter, those that differ among these trials; empty if none does."""
    columns = {name: [record.params.get(name) for record, _ in pairs] for name in names}
    known = {name: [v for v in values if v is not None] for name, values in columns.items()}
    used = {name: known[name] for name in names if len(known[name]) == len(pairs) and len(set(known[name])) > 1}
    if not used:
        return {}
    distributions = {name: _distribution(config, name, values) for name, values in used.items()}
    study = optuna.create_study(direction="maximize", storage=optuna.storages.InMemoryStorage())
    for place, (_, value) in enumerate(pairs):
        params: Mapping[str, Scalar] = {name: values[place] for name, values in used.items()}
        study.add_trial(optuna.trial.create_trial(params=dict(params), distributions=distributions, value=float(value)))
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in shares.items() if np.isfinite(share)}


def _distribution(config: SweepConfig, name: str, values: Sequence[Scalar]) -> BaseDistribution:
    """Of the values that there are, on the axis that is searched."""
    if config.space[name].choices is not None or any(isinstance(value, bool | str) for value in values):
        return CategoricalDistribution(sorted(set(values), key=str))
    numbers, is_log = [float(value) for value in values], config.space[name].log
    if all(number.is_integer() for number in numbers) and (
        name in INTEGER_PARAMETERS or config.space[name].type == "int"
    ):
        return IntDistribution(int(min(numbers)), int(max(numbers)), log=is_log)
    return FloatDistribution(min(numbers), max(numbers), log=is_log)
