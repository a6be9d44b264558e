"""What a sweep found, in words: its best trial and the headline."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from tune_topkd.ledger import TrialStatus
from tune_topkd.report.table import of_status


def best_trial(trials: pd.DataFrame) -> "pd.Series[Any] | None":
    """The row of the completed trial with the highest `val_top1`, of equals the earliest; none if none completed."""
    done = of_status(trials, TrialStatus.COMPLETED).dropna(subset="val_top1")
    if done.empty:
        return None
    return done.sort_values(["val_top1", "number"], ascending=[False, True]).iloc[0]


def headline(trials: pd.DataFrame, baselines: Mapping[str, float] | None = None) -> str:
    """The answer in words: the best K, its validation top-1 and the gain in points over each baseline, best first."""
    best = best_trial(trials)
    if best is None:
        return "No trial reached the full budget"
    ranked = sorted(finite(baselines).items(), key=lambda item: -item[1])
    gains = ", ".join(f"{best['val_top1'] - value:+.1f} over {name.upper()}" for name, value in ranked)
    return value_text(best) + (f" ({gains})" if gains else "")


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
