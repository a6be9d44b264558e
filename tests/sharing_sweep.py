"""A driver for tests/test_broker.py: one sweep of sleeping formula trials on a cluster that others use too."""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import formulas
from torture import opened

from tune_topkd.execution import Cluster
from tune_topkd.execution import broker
from tune_topkd.execution import run_sweep
from tune_topkd.interruption import listening
from tune_topkd.ledger import Driver
from tune_topkd.search import Search


@dataclass(frozen=True)
class Sleeping:
    """A trial of a few epochs that takes so many seconds and no CPU."""

    seconds: float

    def __call__(self, config, report, resume_from=None):
        def slept(config, epoch):
            time.sleep(self.seconds / config.recipe.epochs)
            return formulas.value(config, epoch)

        formulas.epochs(config, report, resume_from, slept)


def refused():
    raise RuntimeError("there is no broker")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--address")
    parser.add_argument("--priority", type=float)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--autoscale-to", type=int)
    parser.add_argument("--no-broker", action="store_true", help="none can be begun, or found")
    given = parser.parse_args()
    if given.no_broker:
        broker._broker = refused
    settings = {"max_concurrent": None, "trials": given.trials, "asha": None, "sampler": "random"}
    settings |= {"autoscale_to": given.autoscale_to}
    config = formulas.sweep_config(sweep=settings, recipe={"epochs": 3}, baselines=None)
    given.folder.mkdir(parents=True, exist_ok=True)
    with (
        listening() as interruption,
        opened(given.folder / "ledger.jsonl", config) as ledger,
        interruption.deferred(),
    ):
        ledger.append(Driver.here(trials=given.trials))
        with Cluster.attached(given.address) as cluster:
            search = Search(config, ledger)
            options = {
                "priority": given.priority,
                "interruption": interruption,
                "note": lambda text: print(text, flush=True),  # noqa: T201 (the test reads it)
            }
            run_sweep(search, cluster=cluster, folder=given.folder, train=Sleeping(given.seconds), **options)


if __name__ == "__main__":
    main()
