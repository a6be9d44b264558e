"""The figure of K against validation top-1."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter
from matplotlib.ticker import FixedLocator
from matplotlib.ticker import NullLocator

from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import TrialStatus
from tune_topkd.report.answer import best_trial
from tune_topkd.report.answer import finite
from tune_topkd.report.answer import value_text
from tune_topkd.report.style import BEST_COLOUR
from tune_topkd.report.style import COMPLETED_COLOUR
from tune_topkd.report.style import FAILED_COLOUR
from tune_topkd.report.style import FAINT_INK
from tune_topkd.report.style import HALO
from tune_topkd.report.style import INK
from tune_topkd.report.style import PRUNED_COLOUR
from tune_topkd.report.style import legend
from tune_topkd.report.style import limits
from tune_topkd.report.style import new_figure
from tune_topkd.report.style import plain
from tune_topkd.report.style import say
from tune_topkd.report.style import set_top1_axis
from tune_topkd.report.style import title
from tune_topkd.report.table import FloatArray
from tune_topkd.report.table import baseline_label
from tune_topkd.report.table import floats
from tune_topkd.report.table import of_status
from tune_topkd.report.table import row_of

BASELINE_STYLES = ("--", ":", "-.")


def k_figure(trials: pd.DataFrame, baselines: Mapping[str, float] | None = None) -> Figure:
    """K against validation top-1: every trial a point, the best and the median of each K, the baselines as lines.

    Where K was not searched, all trials stand in one column.

    Args:
        trials: a trials table.
        baselines: validation top-1 (percent) by name, such as `ce` and `kd`.
    """
    figure = new_figure(9, 5)
    ax = figure.subplots()
    draw_k(ax, trials, finite(baselines))
    title(ax, "K against validation top-1")
    return figure


def draw_k(
    ax: Axes, trials: pd.DataFrame, baselines: Mapping[str, float], finalists: pd.DataFrame | None = None
) -> None:
    """Draw K against validation top-1 on these axes; of finalists the means over fresh seeds, the answer marked."""
    plain(ax)
    at, y = _k_positions(ax, trials), floats(trials["val_top1"])
    status = trials["status"].to_numpy(dtype=object)
    done, pruned = (
        (status == s) & np.isfinite(at) & np.isfinite(y) for s in (TrialStatus.COMPLETED, TrialStatus.PRUNED)
    )
    failed = (status == TrialStatus.FAILED) & np.isfinite(at)
    low, high = limits(y[done] if done.any() else y[pruned], list(baselines.values()))
    inside = y >= low
    floor = low
    if failed.any() or (~inside & (done | pruned)).any():
        low -= 0.09 * (high - low)  # a strip for what has no place on the axis
    set_top1_axis(ax, low, high, ticks_from=floor)
    x = _side_by_side(ax, at, y, inside & (done | pruned))
    if done.any():
        ax.scatter(
            x[done & inside], y[done & inside], s=46, color=COMPLETED_COLOUR, edgecolors="white", linewidths=0.8,
            zorder=3, label=f"completed ({done.sum()})", gid="completed",
        )  # fmt: skip
        _draw_k_lines(ax, at[done], y[done])
        if finalists is None:
            _mark_best(ax, trials, x)
        else:
            _draw_finalists(ax, trials, x, finalists)
    else:
        say(ax, "no trial reached the full budget" if len(trials) else "no trial yet")
    if (which := pruned & inside).any():
        label = f"pruned ({which.sum()}): value after fewer epochs"
        ax.scatter(x[which], y[which], s=26, color=PRUNED_COLOUR, alpha=0.5, linewidths=0, label=label, gid="pruned")
    if low < floor:
        groups = (
            (pruned & ~inside, "pruned ({}), below the axis", "v", PRUNED_COLOUR, 0),
            (done & ~inside, "completed ({}), below the axis", "v", COMPLETED_COLOUR, -1),
            (failed, "failed ({}): no value", "x", FAILED_COLOUR, 1),
        )
        for which, label, marker, colour, side in groups:
            _draw_counts(ax, at[which], (low + floor) / 2, side, label=label, marker=marker, color=colour)
    _draw_baselines(ax, baselines, gap=0.05 * (high - low))
    legend(ax)


def _draw_counts(ax: Axes, at: FloatArray, height: float, side: int, *, label: str, **look: Any) -> None:
    """One marker for each K that has any of these trials, with their number where it is more than one."""
    if not at.size:
        return
    k, count = np.unique(at, return_counts=True)
    x = k + side * np.minimum(4 * _pitch(ax, k), 0.3)
    ax.scatter(
        x, np.full(len(k), height), s=28, label=label.format(len(at)), gid=label.split(" (")[0] + " count", **look
    )
    for place, n in zip(x[count > 1], count[count > 1], strict=True):
        ax.annotate(str(n), (place, height), xytext=(0, 4), textcoords="offset points", ha="center", va="bottom",
                    fontsize=8, color=FAINT_INK)  # fmt: skip


def _k_positions(ax: Axes, trials: pd.DataFrame) -> FloatArray:
    """Where each trial stands on the horizontal axis, which is set up for it."""
    if "k" not in trials.columns:
        ax.set_xticks([0], ["K was not searched"])
        ax.set_xlim(-1, 1)
        return np.zeros(len(trials))
    k = floats(trials["k"])
    known = k[np.isfinite(k)]
    ax.set_xlabel("K")
    if not known.size:
        ax.xaxis.set_major_locator(NullLocator())
        return k
    low, high = int(known.min()), int(known.max())
    if low >= 1 and high > 12:
        ax.set_xscale("log")
        ax.set_xlim(low * 0.8, high * 1.15)
        ticks = [t for t in (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000) if low <= t <= high]
    else:
        ax.set_xlim(low - 0.6, high + 0.6)
        ticks = list(range(low, high + 1))
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FixedFormatter([str(t) for t in ticks]))
    ax.xaxis.set_minor_locator(NullLocator())
    return k


def _side_by_side(ax: Axes, at: FloatArray, heights: FloatArray, shown: npt.NDArray[np.bool_]) -> FloatArray:
    """The places of the points, those of one place and height moved apart as far as their column is wide."""
    points = pd.DataFrame({"at": at, "height": heights})[shown].groupby(["at", "height"])
    step = points.cumcount() - (points["at"].transform("size") - 1) / 2
    moved = at.copy()
    moved[shown] += np.clip(step.to_numpy() * _pitch(ax, at[shown]), -0.4, 0.4)
    return moved


def _pitch(ax: Axes, at: FloatArray) -> FloatArray:
    """How far apart, in units of the axis, points at these places must be to be told apart."""
    left, right = ax.get_xlim()
    pitch = at * np.log(right / left) if ax.get_xscale() == "log" else np.full(len(at), right - left)
    return np.minimum(0.013 * pitch, 0.2)


def _draw_k_lines(ax: Axes, k: FloatArray, y: FloatArray) -> None:
    by_k = pd.Series(y).groupby(k)
    best, median = by_k.max(), by_k.median()[by_k.size() >= 3]
    if len(best) < 2:
        return
    ax.plot(
        best.index, best, color=COMPLETED_COLOUR, linewidth=1.4, alpha=0.55, label="best of each K", gid="best of K"
    )
    if len(median):
        ax.scatter(median.index, median, s=420, marker="_", color=INK, linewidths=1.6, zorder=2.5,
                   label="median of 3 or more", gid="median")  # fmt: skip


def _mark_best(ax: Axes, trials: pd.DataFrame, x: FloatArray) -> None:
    best = best_trial(trials)
    assert best is not None, "called with completed trials"
    at, y = x[row_of(trials, best)], float(best["val_top1"])
    if not np.isfinite(at):
        return
    equals = int((of_status(trials, TrialStatus.COMPLETED)["val_top1"] == y).sum())
    rank = "best" if equals == 1 else f"first of {equals} equal"
    ax.scatter([at], [y], s=110, color=BEST_COLOUR, edgecolors="white", linewidths=1.2, zorder=4, gid="best")
    share = ax.transAxes.inverted().transform(ax.transData.transform((at, y)))[0]
    side = "left" if share < 0.25 else "right" if share > 0.75 else "center"
    ax.annotate(
        f"{rank}: {value_text(best)}", (at, y), xytext=(0, 9), textcoords="offset points", ha=side, va="bottom",
        fontsize=10.5, fontweight="bold", color=BEST_COLOUR, path_effects=HALO, zorder=5,
    )  # fmt: skip


def _draw_finalists(ax: Axes, trials: pd.DataFrame, x: FloatArray, finalists: pd.DataFrame) -> None:
    """The means of the search's finalists over fresh seeds, each below or above the value that it was found by."""
    places = dict(zip(trials["number"], x, strict=True))
    shown = finalists[(finalists["arm"] == SEARCH) & finalists["mean"].notna()]
    at = np.array([places[int(trial)] for trial in shown["trial"]])
    mean, error = floats(shown["mean"]), np.nan_to_num(floats(shown["error"]))
    ax.errorbar(
        at, mean, yerr=error, fmt="D", markersize=6, color=BEST_COLOUR, markeredgecolor="white", markeredgewidth=0.8,
        elinewidth=1.4, capsize=3, zorder=4, label="finalists: mean over fresh seeds ± standard error", gid="finalists",
    )  # fmt: skip
    for place, value, is_answer in zip(at, mean, shown["is_answer"], strict=True):
        if is_answer:
            ax.scatter([place], [value], s=210, facecolors="none", edgecolors=BEST_COLOUR, linewidths=1.6, zorder=4,
                       label="the answer", gid="answer")  # fmt: skip


def _draw_baselines(ax: Axes, baselines: Mapping[str, float], gap: float) -> None:
    last = -np.inf
    for place, (name, value) in enumerate(sorted(baselines.items(), key=lambda item: item[1])):
        style = BASELINE_STYLES[place % len(BASELINE_STYLES)]
        ax.axhline(value, color=INK, linewidth=1.2, linestyle=style, alpha=0.75, zorder=1.5, gid=f"baseline {name}")
        last = max(value, last + gap)
        ax.annotate(
            f"{baseline_label(name)} {value:.1f} %", (1, last), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=10, color=INK, annotation_clip=False,
        )  # fmt: skip
