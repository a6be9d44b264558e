"""The look that all figures share: colours, axes, legends, the axis of top-1."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from tune_topkd.report.table import FloatArray

TOP1_LABEL = "validation top-1 (%)"

# Okabe and Ito's colours, which colour-blind readers tell apart; the best trial has the same one in every figure.
COMPLETED_COLOUR = "#0072B2"
BEST_COLOUR = "#D55E00"
FAILED_COLOUR = "#CC79A7"
PRUNED_COLOUR = "#8C8C8C"
RUNNING_COLOUR = "#56B4E9"
INK = "#222222"
FAINT_INK = "#6B6B6B"
GRID_COLOUR = "#E3E3E3"

HALO = [withStroke(linewidth=3, foreground="white")]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    return Figure(
        figsize=(width, height), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08), facecolor="white"
    )


def plain(ax: Axes, grid: str = "y") -> None:
    """Give axes the shared look: no box, faint ticks, a grid along `grid`."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT_INK)
    ax.tick_params(colors=FAINT_INK, labelcolor=INK, labelsize=10)
    ax.xaxis.label.set(color=INK, fontsize=11)
    ax.yaxis.label.set(color=INK, fontsize=11)
    ax.grid(axis=grid, color=GRID_COLOUR, linewidth=0.8)  # type: ignore[arg-type]  # "x" or "y"
    ax.set_axisbelow(True)


def title(ax: Axes, text: str, pad: float = 10) -> None:
    """Give axes their title."""
    ax.set_title(text, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=pad)


def legend(ax: Axes, columns: int = 2) -> None:
    """What is drawn, in words, under the axes and their label."""
    figure = ax.get_figure()
    if figure is None or not ax.get_legend_handles_labels()[0]:
        return
    below = ax.transAxes + ScaledTranslation(0, -43 / 72, figure.dpi_scale_trans)
    ax.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=columns, frameon=False, fontsize=9.5,
        labelcolor=INK, borderaxespad=0, handletextpad=0.6, columnspacing=1.6,
    )  # fmt: skip


def say(ax: Axes, text: str) -> None:
    """Write in the middle of the axes what there is to say instead of a drawing."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    ax.text(
        0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=12, color=INK, bbox=box, zorder=6
    )


def limits(values: FloatArray, always: Sequence[float] = ()) -> tuple[float, float]:
    """Limits of a top-1 axis that keep a few very poor values from pressing the good ones into a line."""
    if not values.size:
        values = np.asarray(always, dtype=float)
    if not values.size:
        return 0.0, 100.0
    top, quarter = float(values.max()), float(np.quantile(values, 0.25))
    low = max(float(values.min()), quarter - 3 * max(top - quarter, 0.5))
    low, top = min([low, *always]), max([top, *always])
    pad = 0.08 * max(top - low, 2.0)
    return low - pad, top + 1.5 * pad


def set_top1_axis(ax: Axes, low: float, high: float, ticks_from: float) -> None:
    """Make the vertical axis one of top-1, its ticks from `ticks_from` to at most 100."""
    ticks = MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(ticks_from, high)
    ax.yaxis.set_major_locator(FixedLocator([t for t in ticks if ticks_from <= t <= min(high, 100)]))
    ax.set_ylim(low, high)
    ax.set_ylabel(TOP1_LABEL)
