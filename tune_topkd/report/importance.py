"""The figure of the parameters' importance."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tune_topkd.report.style import legend
from tune_topkd.report.style import new_figure
from tune_topkd.report.style import plain
from tune_topkd.report.style import say
from tune_topkd.report.style import title

BAR_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")


def importance_figure(importances: Mapping[str, Mapping[str, float]]) -> Figure:
    """Grouped horizontal bars, the most important parameter on top, by its mean over the evaluators.

    Args:
        importances: evaluator's name to parameter to share (0 to 1). A parameter that an evaluator lacks, or has NaN
            for, gets no bar from it.
    """
    table = pd.DataFrame({name: pd.Series(dict(shares), dtype=float) for name, shares in importances.items()})
    table = table.dropna(how="all")
    mean = table.mean(axis=1)
    table = table.loc[sorted(table.index, key=lambda name: (mean[name], name))]
    figure = new_figure(9, 1.9 + max(1.5, len(table) * (0.16 + 0.11 * max(1, table.shape[1]))))
    ax = figure.subplots()
    title(ax, "Importance of the parameters")
    if table.empty:
        ax.set_axis_off()
        say(ax, "too few trials to tell")
        return figure
    plain(ax, grid="x")
    thickness = 0.8 / table.shape[1]
    rows = np.arange(len(table))
    for place, evaluator in enumerate(table.columns):
        offset = (table.shape[1] - 1) / 2 - place  # the first evaluator's bar is the upper one
        colour = BAR_COLOURS[place % len(BAR_COLOURS)]
        shares = table[evaluator].to_numpy(float)
        ax.barh(rows + offset * thickness, shares, 0.88 * thickness, color=colour, label=str(evaluator))
    ax.set_yticks(rows, [str(name) for name in table.index])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(-0.6, len(table) - 0.4)
    ax.set_xlim(0, max(float(table.max().max()) * 1.05, 0.01))
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    ax.set_xlabel("share of the importance")
    legend(ax, columns=1)
    return figure
