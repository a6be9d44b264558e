"""The command line: the composition root, the only place that knows all rooms."""

from tune_topkd.cli.app import app
from tune_topkd.cli.app import main

__all__ = ["app", "main"]
