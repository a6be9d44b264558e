"""Trials whose workers are slow to start: a process that imports this waits as long as `VARIABLE` says."""

import os
import time

from benchmarks.formula import Paced

VARIABLE = "BENCHMARK_SECONDS_TO_START"

time.sleep(float(os.environ.get(VARIABLE, "0")))


class Slow(Paced):
    """A paced trial, found by the workers in this module."""
