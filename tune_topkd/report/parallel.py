"""The figure of all parameters as parallel coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tune_topkd.ledger import TrialStatus
from tune_topkd.report.answer import best_label
from tune_topkd.report.answer import best_trial
from tune_topkd.report.style import BEST_COLOUR
from tune_topkd.report.style import FAINT_INK
from tune_topkd.report.style import HALO
from tune_topkd.report.style import INK
from tune_topkd.report.style import PRUNED_COLOUR
from tune_topkd.report.style import TOP1_LABEL
from tune_topkd.report.style import legend
from tune_topkd.report.style import new_figure
from tune_topkd.report.style import say
from tune_topkd.report.style import title
from tune_topkd.report.table import FloatArray
from tune_topkd.report.table import floats
from tune_topkd.report.table import is_log_scaled
from tune_topkd.report.table import is_number
from tune_topkd.report.table import parameters_of
from tune_topkd.report.table import row_of

VALUE_COLOURS = LinearSegmentedColormap.from_list("top1", ["#D7E3C8", "#7FC0A5", "#2F8FA3", "#26528C", "#1B1150"])


def parallel_coordinates_figure(trials: pd.DataFrame, parameters: Sequence[str] | None = None) -> Figure:
    """One axis per parameter and one line per trial: completed ones coloured by their value, pruned ones grey.

    Axes are logarithmic where `is_log_scaled`. The best trial is drawn on top, with its values.

    Args:
        trials: a trials table.
        parameters: which ones and in which order; all by default.
    """
    names = list(parameters) if parameters is not None else parameters_of(trials)
    figure = new_figure(max(6.0, min(2.5 + 0.73 * len(names), 14.0)), 5)
    ax = figure.subplots()
    if names and len(trials):
        _draw_parallel(figure, ax, trials, [_coordinate(name, trials[name]) for name in names])
    else:
        ax.set_axis_off()
        say(ax, "no parameter was searched" if len(trials) else "no trial yet")
    title(ax, "Parameters of the trials")
    return figure


@dataclass(frozen=True)
class _Coordinate:
    """One axis of the parallel coordinates."""

    name: str
    places: FloatArray
    """Of each trial, 0 (bottom) to 1 (top); NaN without a value."""
    texts: list[str]
    """The value of each trial."""
    ticks: list[tuple[float, str]]


def _coordinate(name: str, values: "pd.Series[Any]") -> _Coordinate:
    texts = [_text(value) for value in values]
    if not is_number(values):
        choices = sorted({text for text in texts if text})
        place_of = {choice: (i + 0.5) / len(choices) for i, choice in enumerate(choices)}
        places = np.array([place_of.get(text, np.nan) for text in texts])
        return _Coordinate(name, places, texts, [(place, choice) for choice, place in place_of.items()])
    numbers = floats(values)
    numbers[~np.isfinite(numbers)] = np.nan
    is_log = is_log_scaled(values)
    if np.isnan(numbers).all():
        return _Coordinate(name, numbers, texts, [])
    low, high = float(np.nanmin(numbers)), float(np.nanmax(numbers))
    if low == high:
        return _Coordinate(name, np.where(np.isnan(numbers), np.nan, 0.5), texts, [(0.5, _text(low))])
    nice = _log_ticks(low, high) if is_log else MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    if pd.api.types.is_integer_dtype(values):
        nice = [t for t in nice if t == round(t)]
    if is_log:
        numbers, low, high = np.log10(numbers), np.log10(low), np.log10(high)
    span = high - low
    ticks = [((np.log10(t) if is_log else t) - low) / span for t in nice]
    labelled = [(place, _text(t)) for place, t in zip(ticks, nice, strict=True) if -1e-9 <= place <= 1 + 1e-9]
    return _Coordinate(name, (numbers - low) / span, texts, labelled)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**d for d in decades for f in factors]
        if sum(low <= t <= high for t in ticks) >= 3:
            break
    return ticks


def _text(value: Any) -> str:
    """A value in few characters; empty for a missing one."""
    if pd.isna(value):
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.3g}"


def _draw_parallel(figure: Figure, ax: Axes, trials: pd.DataFrame, coordinates: Sequence[_Coordinate]) -> None:
    _draw_coordinates(ax, coordinates)
    # Lines through one place of a yes/no axis would hide one another.
    spread = ((trials["number"].to_numpy(float) * 0.618) % 1 - 0.5) * 0.05
    columns = [c.places + spread * (not is_number(trials[c.name])) for c in coordinates]
    lines = np.stack([np.stack([np.full(len(trials), i), column], axis=1) for i, column in enumerate(columns)], axis=1)
    pruned = (trials["status"] == TrialStatus.PRUNED).to_numpy()
    done = ((trials["status"] == TrialStatus.COMPLETED) & trials["val_top1"].notna()).to_numpy()
    if pruned.any():
        grey = LineCollection(list(lines[pruned]), colors=PRUNED_COLOUR, linewidths=0.8, alpha=0.22, zorder=1,
                              label=f"pruned ({pruned.sum()})", gid="pruned")  # fmt: skip
        ax.add_collection(grey)
    best = best_trial(trials)
    if best is None:
        say(ax, "no trial reached the full budget")
        legend(ax)
        return
    values = floats(trials["val_top1"])
    order = np.flatnonzero(done)[np.argsort(values[done])]  # the better ones are drawn over the others
    norm, extend = _colour_range(values[done])
    coloured = LineCollection(list(lines[order]), array=values[order], cmap=VALUE_COLOURS, norm=norm, linewidths=1.5,
                              alpha=0.85, zorder=2, label=f"completed ({done.sum()})", gid="completed")  # fmt: skip
    ax.add_collection(coloured)
    bar = figure.colorbar(coloured, ax=ax, pad=0.015, fraction=0.03, aspect=28, extend=extend)
    bar.set_label(TOP1_LABEL, color=INK, fontsize=11)
    bar.ax.tick_params(labelsize=9.5, labelcolor=INK, colors=FAINT_INK)
    bar.outline.set_visible(False)
    row = row_of(trials, best)
    ax.plot(*lines[row].T, color=BEST_COLOUR, linewidth=2.8, zorder=3, marker="o", markersize=5, path_effects=HALO,
            label=best_label(best), gid="best")  # fmt: skip
    for c, (x, y) in zip(coordinates, lines[row], strict=True):
        if is_number(trials[c.name]):  # elsewhere the tick says it
            ax.annotate(c.texts[row], (x, y), xytext=(5, 5), textcoords="offset points", fontsize=9.5,
                        fontweight="bold", color=BEST_COLOUR, path_effects=HALO, zorder=4)  # fmt: skip
    legend(ax, columns=3)


def _draw_coordinates(ax: Axes, coordinates: Sequence[_Coordinate]) -> None:
    ax.spines[:].set_visible(False)
    ax.set_xlim(-0.45, len(coordinates) - 0.4)
    ax.set_ylim(-0.04, 1.02)
    ax.set_yticks([])
    ax.set_xticks(range(len(coordinates)), [c.name.replace("_", "\n") for c in coordinates])
    ax.tick_params(axis="x", length=0, labelsize=9, labelcolor=INK, pad=4)
    ax.set_xlabel(" ", fontsize=2)
    for i, c in enumerate(coordinates):
        ax.plot([i, i], [0, 1], color=FAINT_INK, linewidth=1, zorder=0.5, gid="axis")
        for place, text in c.ticks:
            ax.plot([i - 0.05, i], [place, place], color=FAINT_INK, linewidth=1, zorder=0.5, gid="tick")
            ax.annotate(text, (i - 0.05, place), xytext=(-2, 0), textcoords="offset points", ha="right", va="center",
                        fontsize=8.5, color=FAINT_INK, path_effects=HALO, zorder=3.5)  # fmt: skip


def _colour_range(values: FloatArray) -> tuple[Normalize, str]:
    """Colours for the upper nine tenths of the values; whether the scale is open below."""
    low, high = float(np.quantile(values, 0.1)), float(values.max())
    if high - low < 0.2:
        low = high - 0.2
    return Normalize(low, high), "min" if values.min() < low else "neither"
