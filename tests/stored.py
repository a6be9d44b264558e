"""The program that the tests of runs in a store kill: begins a sweep of formula trials there, or goes on with it.

The train function leaves a line for each call and each epoch in a log: a witness of the work that is not the ledger.
"""

import argparse
import dataclasses
import sys

import formulas
import torture

from tune_topkd.cli import app
from tune_topkd.errors import TuneTopKDError
from tune_topkd.execution import RayExecutor
from tune_topkd.execution import nodes
from tune_topkd.interruption import listening
from tune_topkd.sweep import Sweep

SPACE = {
    "data": {"name": "digits"},
    "teacher": None,
    "method": "ce",
    "student": "digits_linear",
    "recipe": {"epochs": formulas.EPOCHS, "lr": 0.1},
    "space": {"lr": {"low": 0.01, "high": 1.0, "log": True}},
    "sweep": {"trials": 6, "asha": {"grace_epochs": 1, "reduction_factor": 3}, "cpus_per_trial": 1},
    "baselines": None,
}


nodes.LONGEST_START_OF_A_WORKER = 600.0  # the machine of the tests may have much else to do


class FormulaExecutor(RayExecutor):
    """Ray, with a formula in the place of training."""

    def __init__(self, interruption, log, pause, address=None):
        super().__init__(interruption, address)
        self._train = torture.Witnessed(log, pause)

    def run(self, search, work):
        return super().run(search, dataclasses.replace(work, train=self._train))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("uri")
    parser.add_argument("log")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds an epoch takes")
    parser.add_argument("--concurrent", type=int)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--address")
    given = parser.parse_args()
    settings = {"sweep.max_concurrent": given.concurrent, "sweep.trials": given.trials}
    arguments = {"runs_dir": given.uri, "mlflow_uri": "", "address": given.address or "local"}
    try:
        sweep = Sweep.create(SPACE, name="s", overrides=settings, or_resume=True, **arguments)
        with listening() as interruption:
            result = sweep.run(executor=FormulaExecutor(interruption, given.log, given.pause, given.address))
    except (TuneTopKDError, OSError) as error:
        app._tell(app._told(error))
        sys.exit(app.USER_ERROR)
    sys.exit(0 if result.reason == "finished" else 1)


if __name__ == "__main__":
    main()
