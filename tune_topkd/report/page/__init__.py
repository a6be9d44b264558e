"""The HTML page of a sweep, and of a campaign: one file that loads nothing.

Figures are Vega-Lite's, made with Altair; the page carries Vega, its own style and script, and the numbers that its
figures and tables are made of. Text goes through Jinja's escaping and data through JSON without `<`, so what a user
called a sweep, a parameter or a failure is never markup. It is made of `Findings`, gathered by `tune_topkd.sweep.page`.
"""

from tune_topkd.report.page.assembly import campaign_page
from tune_topkd.report.page.assembly import sweep_page

__all__ = ["campaign_page", "sweep_page"]
