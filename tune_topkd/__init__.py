"""Hyperparameter search for TopKD knowledge distillation.

The parts: `tune_topkd.loss` (the method, torch only), `tune_topkd.export` (reading a tuned config), and the
command line `python launch.py` (the sweep). Importing this package imports nothing else.
"""

__version__ = "0.1.0"
