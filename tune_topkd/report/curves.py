"""The figure of the learning curves."""

from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.ticker import NullLocator

from tune_topkd.ledger import TrialStatus
from tune_topkd.report.answer import best_label
from tune_topkd.report.answer import best_trial
from tune_topkd.report.style import BEST_COLOUR
from tune_topkd.report.style import COMPLETED_COLOUR
from tune_topkd.report.style import FAILED_COLOUR
from tune_topkd.report.style import HALO
from tune_topkd.report.style import PRUNED_COLOUR
from tune_topkd.report.style import RUNNING_COLOUR
from tune_topkd.report.style import legend
from tune_topkd.report.style import limits
from tune_topkd.report.style import new_figure
from tune_topkd.report.style import plain
from tune_topkd.report.style import say
from tune_topkd.report.style import set_top1_axis
from tune_topkd.report.style import title
from tune_topkd.report.table import floats

_CURVE_LOOKS: Mapping[str, tuple[str, str, float, str, float]] = {
    TrialStatus.COMPLETED: ("completed", COMPLETED_COLOUR, 0.5, "o", 12),
    TrialStatus.PRUNED: ("stopped early", PRUNED_COLOUR, 0.5, "o", 22),
    TrialStatus.FAILED: ("failed", FAILED_COLOUR, 0.8, "x", 34),
    TrialStatus.RUNNING: ("running", RUNNING_COLOUR, 0.9, ">", 16),
    "interrupted": ("interrupted", RUNNING_COLOUR, 0.9, "s", 16),
}
"""A status's word, colour, opacity of the lines, marker of their ends and its size."""


def learning_curves_figure(curves: pd.DataFrame, trials: pd.DataFrame, rungs: Sequence[int] = ()) -> Figure:
    """Validation top-1 by epoch of every trial; a marker where a trial was stopped or failed; the best one on top.

    Args:
        curves: a curves table.
        trials: a trials table; a curve whose trial is not in it is left out.
        rungs: the epochs at which ASHA decides.
    """
    figure = new_figure(9, 5)
    ax = figure.subplots()
    draw_curves(ax, curves, trials, rungs)
    title(ax, "Learning curves")
    return figure


def draw_curves(ax: Axes, curves: pd.DataFrame, trials: pd.DataFrame, rungs: Sequence[int]) -> None:
    """Draw the learning curves on these axes."""
    plain(ax)
    ax.set_xlabel("epoch")
    points = curves[np.isfinite(floats(curves["val_top1"]))].merge(trials[["number", "status"]], on="number")
    points = points.sort_values(["number", "epoch"])
    ends = points.groupby("number").last()
    epochs = int(points["epoch"].max()) if len(points) else 1
    # The steep first tenth of the curves may leave the axis below.
    telling = pd.concat([ends[ends["status"] != TrialStatus.FAILED], points[points["epoch"] == -(-epochs // 10)]])
    shown = floats((points if (ends["status"] == TrialStatus.FAILED).all() else telling)["val_top1"])
    highest = [float(points["val_top1"].max())] if len(points) else []  # a training may have fallen since
    low, high = limits(shown, highest)
    set_top1_axis(ax, low, high, ticks_from=low)
    ax.set_xlim(0.5, epochs + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True) if len(points) else NullLocator())
    best = best_trial(trials)
    if best is not None and (best_line := points[points["number"] == best["number"]]).size:
        ax.plot(best_line["epoch"], best_line["val_top1"], color=BEST_COLOUR, linewidth=2.4, zorder=3,
                path_effects=HALO, label=best_label(best), gid="best curve")  # fmt: skip
    for status, (word, colour, alpha, marker, size) in _CURVE_LOOKS.items():
        ended = ends[ends["status"] == status]
        if ended.empty:
            continue
        lines = [
            g[["epoch", "val_top1"]].to_numpy(float) for _, g in points[points["status"] == status].groupby("number")
        ]
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=1.0, alpha=alpha, gid=f"{status} curve"))
        # What ends below the axis is marked on its edge.
        ax.scatter(ended["epoch"], np.maximum(ended["val_top1"], low), s=size, marker=marker, color=colour, zorder=2.5,
                   clip_on=False, label=f"{word} ({len(ended)})", gid=f"{status} end")  # fmt: skip
    for place, rung in enumerate(rungs):
        label = "_" if place else "ASHA decides"  # once in the legend
        ax.axvline(rung, color="#C9C9C9", linewidth=1.1, zorder=0.6, label=label, gid="rung")
    if points.empty:
        say(ax, "no epoch yet")
    legend(ax)
