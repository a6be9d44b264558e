"""What a sweep found, in words: its best trial and the headline."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from tune_topkd.ledger import TrialStatus
from tune_topkd.report.table import baseline_finalists
from tune_topkd.report.table import baseline_label
from tune_topkd.report.table import of_status
from tune_topkd.verdict import Apart


def best_trial(trials: pd.DataFrame) -> "pd.Series[Any] | None":
    """The row of the completed trial with the highest `val_top1`, of equals the earliest; none if none completed.

    It is the best by the search's own values, of one seed, also where finalists have said which is the answer.
    """
    done = of_status(trials, TrialStatus.COMPLETED).dropna(subset="val_top1")
    if done.empty:
        return None
    return done.sort_values(["val_top1", "number"], ascending=[False, True]).iloc[0]


def headline(
    trials: pd.DataFrame, baselines: Mapping[str, float] | None = None, finalists: pd.DataFrame | None = None
) -> str:
    """The answer in words: the best K, its validation top-1 and the gain in points over each baseline, best first.

    Args:
        trials: a trials table.
        baselines: validation top-1 (percent) by name.
        finalists: a table of `finalists_table`. If it has the answer, the figures are means over its fresh seeds, with the
            standard errors of the means and of their differences seed by seed. A gain is called not told apart if its 95 %
            interval has zero in it, where the intervals of all gains hold together.
    """
    if finalists is not None and finalists["is_answer"].any():
        return _of_fresh_seeds(trials, finalists)
    best = best_trial(trials)
    if best is None:
        return "No trial reached the full budget"
    ranked = sorted(finite(baselines).items(), key=lambda item: -item[1])
    gains = ", ".join(f"{best['val_top1'] - value:+.1f} over {baseline_label(name)}" for name, value in ranked)
    return value_text(best) + (f" ({gains})" if gains else "")


def _of_fresh_seeds(trials: pd.DataFrame, finalists: pd.DataFrame) -> str:
    """The headline of an answer that was chosen by its fresh seeds."""
    answer = finalists[finalists["is_answer"]].iloc[0]
    seeds = [name for name in finalists.columns if isinstance(name, int)]
    bases = baseline_finalists(finalists).iterrows()
    found = {str(base["arm"]): (answer[seeds] - base[seeds]).astype(float).dropna() for _, base in bases}
    apart = {arm: [float(value) for value in values] for arm, values in found.items() if len(values)}
    gains = []
    for arm, gain in zip(apart, Apart.together(list(apart.values())), strict=True):
        doubt = "" if gain.is_told_apart else ", not told apart"
        gains.append(f"{_with_error(gain.mean, gain.error, '+')} over {baseline_label(arm)}{doubt}")
    own = trials[trials["number"] == int(answer["trial"])]
    k = "" if own.empty or "k" not in own or pd.isna(own["k"].iloc[0]) else f"K = {int(own['k'].iloc[0])}, "
    count = int(answer[seeds].notna().sum())
    figure = f"{k}{_with_error(answer['mean'], answer['error'])} % over {count} fresh seed{'' if count == 1 else 's'}"
    return f"{figure}, {answer['own']:.1f} % in the search" + (f" ({'; '.join(gains)})" if gains else "")


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.1f}" + ("" if error is None or np.isnan(error) else f" ± {error:.1f}")


def finite(baselines: Mapping[str, float] | None) -> dict[str, float]:
    """The baselines that have a value."""
    return {name: float(value) for name, value in (baselines or {}).items() if np.isfinite(value)}


def value_text(trial: "pd.Series[Any]") -> str:
    """A trial's K, where it was searched, and its value."""
    k = trial.get("k")
    return ("" if k is None or pd.isna(k) else f"K = {int(k)}, ") + f"{trial['val_top1']:.1f} %"


def best_label(trial: "pd.Series[Any]") -> str:
    """The best trial in a legend."""
    return f"best, trial {trial['number']}: {value_text(trial)}"
