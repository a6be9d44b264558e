"""The sweep in one picture."""

from collections.abc import Mapping
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from tune_topkd.report.answer import finite
from tune_topkd.report.answer import headline
from tune_topkd.report.curves import draw_curves
from tune_topkd.report.k import draw_k
from tune_topkd.report.style import INK
from tune_topkd.report.style import new_figure
from tune_topkd.report.style import title


def summary_figure(
    trials: pd.DataFrame,
    curves: pd.DataFrame,
    baselines: Mapping[str, float] | None = None,
    rungs: Sequence[int] = (),
) -> Figure:
    """The sweep in one picture, the answer as its title: K against validation top-1 beside the learning curves.

    Args:
        trials: a trials table.
        curves: a curves table.
        baselines: validation top-1 (percent) by name.
        rungs: the epochs at which ASHA decides.
    """
    figure = new_figure(12, 5.4)
    left, right = figure.subplots(1, 2)
    figure.suptitle(headline(trials, baselines), x=0.01, ha="left", fontsize=15, fontweight="bold", color=INK)
    draw_k(left, trials, finite(baselines))
    title(left, "K against validation top-1")
    draw_curves(right, curves, trials, rungs)
    title(right, "Learning curves")
    return figure
