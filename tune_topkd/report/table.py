"""The table of trials, from the runs that MLflow holds, and what may be asked of its columns."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from tune_topkd.config import Scalar
from tune_topkd.ledger import TrialStatus

PARAMETER_ORDER = (
    "k",
    "scale_top",
    "scale_last",
    "scale_gt",
    "shift",
    "alpha",
    "beta",
    "temperature",
    "normalize",
    "ce_weight",
    "tdl_weight",
    "contrastive_weight",
    "lr",
)
"""The order in which parameters stand in tables and figures; any others follow by name."""

LOG_DECADES = 1.5
"""Values that span more decades than this get a logarithmic axis."""

FROM_ZERO = frozenset({"shift"})
"""Parameters whose range begins at 0: a value that is very small by chance is no reason for a logarithmic axis."""

_OWN_COLUMNS = ("number", "status", "reason", "val_top1", "epochs")

FloatArray = npt.NDArray[np.float64]


def trials_table(runs: pd.DataFrame, curves: pd.DataFrame | None = None) -> pd.DataFrame:
    """One tidy row per trial, by number, from the runs of one sweep.

    Args:
        runs: what `mlflow.search_runs` gives (`tags.*`, `params.*`, `metrics.*`); runs without the tag `trial_number`,
            such as the sweep's own, are no rows.
        curves: if given, `epochs` counts what is in it. Otherwise it comes from the runs: the sweep's budget for a
            completed trial, the epoch that the reason names for another, and is missing where neither tells.

    Returns:
        The columns `number`, `status`, `reason`, the parameters in `PARAMETER_ORDER`, `val_top1` (percent), `epochs`.
        Parameters are bool, int or float where all their values are, else text; with missing values the nullable
        kinds of pandas.

    Raises:
        ValueError: the trials belong to more than one sweep.
    """
    is_trial = _column(runs, "tags.trial_number").notna()
    trials, others = runs[is_trial], runs[~is_trial]
    if _column(trials, "tags.sweep_id").nunique() > 1:
        raise ValueError("the runs must be of one sweep, but their tag sweep_id has several values")
    found = [name.removeprefix("params.") for name in trials.columns if name.startswith("params.")]
    parameters = [name for name in _ordered(found) if trials[f"params.{name}"].notna().any()]
    table = pd.DataFrame(
        {
            "number": _column(trials, "tags.trial_number").astype("int64"),
            "status": _column(trials, "tags.trial_status").fillna("").astype(str),
            "reason": _column(trials, "tags.reason").fillna("").astype(str),
            **{name: _restored(trials[f"params.{name}"]) for name in parameters},
            "val_top1": _column(trials, "metrics.val_top1").astype("float64"),
        }
    )
    if curves is not None:
        table["epochs"] = table["number"].map(curves.groupby("number")["epoch"].max()).astype("Int64")
    else:
        table["epochs"] = _epochs_by_tags(table, _column(others, "params.epochs"))
    return table.sort_values("number", ignore_index=True)


def parameters_of(trials: pd.DataFrame) -> list[str]:
    """The columns of a trials table that are searched parameters."""
    return [str(name) for name in trials.columns if name not in _OWN_COLUMNS]


def is_log_scaled(values: "pd.Series[Any]") -> bool:
    """Whether a parameter's values are numbers above 0 that span more than `LOG_DECADES`, and it is not `FROM_ZERO`."""
    if not is_number(values) or values.name in FROM_ZERO:
        return False
    numbers = floats(values)
    numbers = numbers[np.isfinite(numbers)]
    return bool(numbers.size and numbers.min() > 0 and np.log10(numbers.max() / numbers.min()) > LOG_DECADES)


def of_status(trials: pd.DataFrame, status: TrialStatus) -> pd.DataFrame:
    """The trials that have this status."""
    return trials[trials["status"] == status.value]


def row_of(trials: pd.DataFrame, trial: "pd.Series[Any]") -> int:
    """At which row of the table a trial stands."""
    return int(np.flatnonzero(trials["number"].to_numpy() == trial["number"])[0])


def is_number(values: "pd.Series[Any]") -> bool:
    """Whether a column holds numbers; true and false are none."""
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def floats(values: "pd.Series[Any]") -> FloatArray:
    """A column as floats, a missing value as NaN."""
    return values.to_numpy(dtype=float, na_value=np.nan, copy=True)


def _column(frame: pd.DataFrame, name: str) -> "pd.Series[Any]":
    """A column that MLflow leaves out where no run has the tag, parameter or metric."""
    return frame[name] if name in frame.columns else pd.Series(np.nan, index=frame.index, dtype=object)


def _ordered(names: Sequence[str]) -> list[str]:
    known = [name for name in PARAMETER_ORDER if name in names]
    return known + sorted(set(names) - set(known))


def _restored(texts: "pd.Series[Any]") -> "pd.Series[Any]":
    """Parameters as the type they had before MLflow made text of them."""
    values = [None if pd.isna(text) else _scalar(str(text)) for text in texts]
    kinds = {type(value) for value in values if value is not None}
    has_gaps = None in values
    if kinds == {bool}:
        dtype = "boolean" if has_gaps else "bool"
    elif kinds == {int}:
        dtype = "Int64" if has_gaps else "int64"
    elif kinds <= {int, float}:
        dtype = "float64"
    else:
        return texts.astype("str")
    return pd.Series(values, index=texts.index, dtype=dtype)


def _scalar(text: str) -> Scalar:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _epochs_by_tags(table: pd.DataFrame, budgets: "pd.Series[Any]") -> "pd.Series[Any]":
    budget = None if budgets.dropna().empty else int(budgets.dropna().iloc[0])

    def epochs(status: str, reason: str) -> int | None:
        if status == TrialStatus.COMPLETED:
            return budget
        named = re.search(r"\bepoch (\d+)", reason)
        return int(named[1]) if named else None

    values = [epochs(status, reason) for status, reason in zip(table["status"], table["reason"], strict=True)]
    return pd.Series(values, index=table.index, dtype="Int64")
