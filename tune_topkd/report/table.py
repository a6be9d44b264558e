"""The table of trials, from the runs that MLflow holds, and what may be asked of its columns."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from tune_topkd.config import DEFAULTS
from tune_topkd.config import Scalar
from tune_topkd.ledger import SEARCH
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


def baseline_label(arm: str) -> str:
    """A baseline's name where there is room for a word: `CE`, `KD`, `untuned` for the method's defaults."""
    return "untuned" if arm == DEFAULTS else arm.upper()


def trials_table(runs: pd.DataFrame, curves: pd.DataFrame | None = None) -> pd.DataFrame:
    """One tidy row per trial, by number, from the runs of one sweep.

    Args:
        runs: what `mlflow.search_runs` gives (`tags.*`, `params.*`, `metrics.*`); runs without the tag `trial_number`,
            such as the sweep's own and those of finalists on fresh seeds, are no rows.
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


def finalists_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One tidy row per finalist, from the runs of one sweep: what its trainings on fresh seeds gave. Empty where none were.

    Args:
        runs: as for `trials_table`.

    Returns:
        The columns `trial` (`0007`, or `kd-0001` of a baseline), `arm`, `is_answer`, a column for each seed under its number
        (percent, NaN of a training that failed or has not ended), `mean`, `error` (the mean's standard error, NaN of one
        value), `own` (the value that it was found by) and `luck` (`own` - `mean`); the best mean comes first.
    """
    is_repeat = _column(runs, "tags.repeat_number").notna()
    repeats, others = runs[is_repeat], runs[~is_repeat]
    sweep = others[_column(others, "tags.trial_number").isna()]
    answer = _column(sweep, "metrics.best_trial").dropna().astype(int).to_list()
    is_done = bool((_column(sweep, "tags.finalists") == "done").any())
    is_whole = _column(repeats, "tags.trial_status") == TrialStatus.COMPLETED.value
    values = pd.DataFrame(
        {
            "trial": _column(repeats, "tags.repeats").astype(str),
            "arm": _column(repeats, "tags.arm").astype(str),
            "seed": _column(repeats, "tags.seed").astype("int64"),
            "val_top1": _column(repeats, "metrics.val_top1").astype("float64").where(is_whole),
        }
    )
    seeds = sorted({int(seed) for seed in values["seed"]})
    rows = []
    for (arm, trial), own in values.groupby(["arm", "trial"]):
        by_seed = own.groupby("seed")["val_top1"].first().reindex(seeds)
        row = {
            "trial": trial,
            "arm": arm,
            "is_answer": is_done and arm == SEARCH and int(str(trial)) in answer,
            **by_seed.to_dict(),
            "mean": by_seed.mean(),
            "error": by_seed.std() / np.sqrt(by_seed.count()) if by_seed.count() else np.nan,
            "own": _own_value(str(arm), str(trial), others, sweep),
        }
        rows.append(row | {"luck": row["own"] - row["mean"]})
    columns = ["trial", "arm", "is_answer", *seeds, "mean", "error", "own", "luck"]
    table = pd.DataFrame(rows, columns=columns).astype({"is_answer": bool})
    return table.sort_values(["mean", "trial"], ascending=[False, True], ignore_index=True)


def baseline_finalists(finalists: pd.DataFrame) -> pd.DataFrame:
    """Of a `finalists_table` the row that stands for each baseline: the fewest seeds without a value, then the best mean."""
    others = finalists[finalists["arm"] != SEARCH]
    seeds = [name for name in finalists.columns if isinstance(name, int)]
    lacking = others[seeds].isna().sum(axis=1)
    kept = others.assign(lacking=lacking).sort_values(["lacking", "mean"], ascending=[True, False], kind="stable")
    return kept.drop_duplicates("arm").drop(columns="lacking").sort_values("mean", ascending=False, kind="stable")


def _own_value(arm: str, trial: str, runs: pd.DataFrame, sweep: pd.DataFrame) -> float:
    """The value that a finalist was found by."""
    if arm == SEARCH:
        own = runs[_column(runs, "tags.trial_number") == str(int(trial))]
        return float(_column(own, "metrics.val_top1").astype("float64").max())
    return float(_column(sweep, f"metrics.baseline_{arm}_val_top1").astype("float64").max())


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
