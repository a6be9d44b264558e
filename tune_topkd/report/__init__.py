"""Tables and figures of a sweep, from the runs that MLflow holds or from any table of the same columns.

Two tables go in, both as pandas data frames:

- `trials`, as `trials_table` makes it, one row per trial: `number` (int), `status` (the words of `TrialStatus`, or
  `interrupted`), `reason`, one column per searched parameter under its plain name, `val_top1` (percent, at the last
  epoch the trial reached; NaN without one), `epochs` (how many were trained);
- `curves`, one row per trial and epoch: `number`, `epoch` (from 1), `val_top1` (percent).

The value of a pruned trial is of a shorter budget than that of a completed one. So only completed trials are ranked,
joined by lines or coloured by their value; pruned ones are drawn faint and named for what they are. Of finalists
the summary draws the means over fresh seeds, and no figure their trainings; `finalists_table` has them.

`read_sweep` makes both from what MLflow holds of a sweep, with the finalists, the baselines and the figures.

Figures are plain `matplotlib.figure.Figure` objects: no backend is chosen, no display is needed, and nothing is kept
alive by pyplot. They are made to be read about 900 pixels wide.
"""

from tune_topkd.report.answer import best_trial
from tune_topkd.report.answer import headline
from tune_topkd.report.curves import learning_curves_figure
from tune_topkd.report.importance import BAR_COLOURS
from tune_topkd.report.importance import importance_figure
from tune_topkd.report.k import BASELINE_STYLES
from tune_topkd.report.k import k_figure
from tune_topkd.report.parallel import VALUE_COLOURS
from tune_topkd.report.parallel import parallel_coordinates_figure
from tune_topkd.report.reading import SweepTables
from tune_topkd.report.reading import best_k_table
from tune_topkd.report.reading import read_sweep
from tune_topkd.report.reading import read_sweeps
from tune_topkd.report.style import BEST_COLOUR
from tune_topkd.report.style import COMPLETED_COLOUR
from tune_topkd.report.style import FAILED_COLOUR
from tune_topkd.report.style import FAINT_INK
from tune_topkd.report.style import GRID_COLOUR
from tune_topkd.report.style import INK
from tune_topkd.report.style import PRUNED_COLOUR
from tune_topkd.report.style import RUNNING_COLOUR
from tune_topkd.report.style import TOP1_LABEL
from tune_topkd.report.summary import summary_figure
from tune_topkd.report.table import FROM_ZERO
from tune_topkd.report.table import LOG_DECADES
from tune_topkd.report.table import PARAMETER_ORDER
from tune_topkd.report.table import finalists_table
from tune_topkd.report.table import is_log_scaled
from tune_topkd.report.table import parameters_of
from tune_topkd.report.table import trials_table

__all__ = [
    "BAR_COLOURS",
    "BASELINE_STYLES",
    "BEST_COLOUR",
    "COMPLETED_COLOUR",
    "FAILED_COLOUR",
    "FAINT_INK",
    "FROM_ZERO",
    "GRID_COLOUR",
    "INK",
    "LOG_DECADES",
    "PARAMETER_ORDER",
    "PRUNED_COLOUR",
    "RUNNING_COLOUR",
    "TOP1_LABEL",
    "VALUE_COLOURS",
    "SweepTables",
    "best_k_table",
    "best_trial",
    "finalists_table",
    "headline",
    "importance_figure",
    "is_log_scaled",
    "k_figure",
    "learning_curves_figure",
    "parallel_coordinates_figure",
    "parameters_of",
    "read_sweep",
    "read_sweeps",
    "summary_figure",
    "trials_table",
]
