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
from tune_topkd.report.table import baseline_finalists


def summary_figure(
    trials: pd.DataFrame,
    curves: pd.DataFrame,
    baselines: Mapping[str, float] | None = None,
    rungs: Sequence[int] = (),
    finalists: pd.DataFrame | None = None,
) -> Figure:
    """The sweep in one picture, the answer as its title: K against validation top-1 beside the learning curves.

    Where finalists have given the answer, their means over fresh seeds are drawn, and the baselines' over the same seeds.

    Args:
        trials: a trials table.
        curves: a curves table.
        baselines: validation top-1 (percent) by name.
        rungs: the epochs at which ASHA decides.
        finalists: a table of `finalists_table`.
    """
    figure = new_figure(12, 5.4)
    left, right = figure.subplots(1, 2)
    has_answer = finalists is not None and bool(finalists["is_answer"].any())
    text = headline(trials, baselines, finalists)
    lines, size = (text.replace(" (", "\n(", 1), 13) if has_answer else (text, 15)
    figure.suptitle(lines, x=0.01, ha="left", fontsize=size, fontweight="bold", color=INK)
    if finalists is not None and has_answer:
        means = baseline_finalists(finalists).set_index("arm")["mean"]
        draw_k(left, trials, finite({str(arm): float(mean) for arm, mean in means.items()}), finalists)
    else:
        draw_k(left, trials, finite(baselines))
    title(left, "K against validation top-1")
    draw_curves(right, curves, trials, rungs)
    title(right, "Learning curves")
    return figure
