"""The program that the torture suite kills: begins a sweep of formula trials, or goes on with it, as the command line does.

The train function leaves a line for each call and each epoch in `work.log`: a witness of the work that is not the ledger.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import formulas

from tune_topkd.config import dump_config
from tune_topkd.execution import Cluster
from tune_topkd.execution import run_sweep
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.search import Search
from tune_topkd.space import digest

WORK_LOG = "work.log"


@dataclass(frozen=True)
class Witnessed:
    """A formula's training that takes its time and says what it does, when and in which process."""

    log: str
    pause: float

    def __call__(self, config, report, resume_from=None):
        machine = os.stat("/proc/self/ns/mnt").st_ino  # nodes of the tests are namespaces
        call = {"trial": trial_id(config), "pid": os.getpid(), "machine": machine, "call": time.time_ns()}

        def note(**what):
            line = json.dumps({**call, **what, "time": time.time()}) + "\n"
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, line.encode())
            os.close(descriptor)

        def slowly(config, epoch):
            note(what="begun", epoch=epoch)
            time.sleep(self.pause)
            note(what="trained", epoch=epoch)
            return formulas.value(config, epoch)

        note(what="called")
        formulas.epochs(config, report, resume_from, slowly)


def trial_id(config):
    """A trial's name that its train function knows too: no two have the same config, wherever they run."""
    return digest(config.model_dump(mode="json", exclude={"threads", "gpu_share", "ranks"}))


def sweep_config(concurrent=None, trials=12, seed=0, max_failures=3, asha=1, sampler="tpe"):
    """A sweep with every kind of range and baselines, and with ASHA if it is to have it."""
    settings = {"max_concurrent": concurrent, "trials": trials, "seed": seed, "max_failures": max_failures}
    settings |= {"sampler": sampler} | ({} if sampler == "tpe" else {"startup_trials": 4})
    return formulas.sweep_config(sweep=settings if asha else {**settings, "asha": None})


def opened(path, config):
    """The sweep's ledger; one that a kill left without its first line is begun again."""
    if path.exists() and b"\n" in path.read_bytes():
        return Ledger.open(path)
    path.unlink(missing_ok=True)
    (path.parent / "sweep.yaml").write_text(dump_config(config))
    name, settings = path.parent.name, config.sweep
    begun = digest(config.model_dump(mode="json", exclude={"description"}))
    asked = {"seed": settings.seed, "trials": settings.trials, "epochs": config.recipe.epochs}
    return Ledger.create(path, Header(sweep=name, id=name, metric="val_top1", digest=begun, **asked))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--concurrent", type=int)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-failures", type=int, default=3)
    parser.add_argument("--asha", type=int, default=1)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds an epoch takes")
    parser.add_argument("--address")
    given = parser.parse_args()
    config = sweep_config(given.concurrent, given.trials, given.seed, given.max_failures, given.asha, given.sampler)
    given.folder.mkdir(parents=True, exist_ok=True)
    train = Witnessed(str(given.folder / WORK_LOG), given.pause)
    with opened(given.folder / "ledger.jsonl", config) as ledger:
        ledger.append(Driver.here(trials=config.sweep.trials))
        search = Search(config, ledger)
        if search.is_finished:
            search.stopped()
            return
        with Cluster.attached(given.address) as cluster:
            run_sweep(search, cluster=cluster, folder=given.folder, train=train)


if __name__ == "__main__":
    main()
