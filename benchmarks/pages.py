"""What the benchmarks with pages of their own share: means with errors, rank correlations, and where a page goes."""

import math
import statistics
from collections.abc import Sequence
from datetime import date

import pandas as pd

from benchmarks.__main__ import RESULTS


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"


def rank_cells(shown: pd.DataFrame, *columns: str) -> list[str]:
    """Spearman's correlation of each column with `end`: over all rows, then over the better half of them by `end`."""
    better = shown[shown["end"] >= shown["end"].median()]
    return [f"{of['end'].corr(of[name], method='spearman'):.2f}" for of in (shown, better) for name in columns]


def give(lines: Sequence[str], slug: str, write: bool) -> None:
    """Print a page, or write it to the results under today's date and say where."""
    if not write:
        print("\n".join(lines))
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today()}-{slug}.md"
    path.write_text("\n".join(lines))
    print(path)
