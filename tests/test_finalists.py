"""Finalists: a sweep's best trials on fresh seeds, and the answer by their means."""

import formulas
import pytest

from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Finalists
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import read_events
from tune_topkd.search import Search
from tune_topkd.search import audit_decisions

TRIALS = 6
PLAN = {"count": 3, "seeds": 2}
LUCK = 20.0


def config(trials=TRIALS, finalists=PLAN, **sections):
    settings = {"trials": trials, "startup_trials": 50, "finalists": finalists, "asha": None, "seed": 5}
    sections = {"baselines": {"trials": 1}, "recipe": {"epochs": 2}} | sections
    return formulas.sweep_config(sweep=settings, **sections)


def lucky(trial, epoch):
    """A trial's value, and on the search's seed the luck of trial 2."""
    value = formulas.value(trial.config, epoch)
    return {"val_top1": value + LUCK * (trial.record.key == ("search", 2)) + 0.1 * (trial.config.seed - 5)}


def drive(path, config, formula=lucky, at_once=1, reports=None):
    """Run a sweep, or what is left of it, and return its state."""
    if path.exists():
        ledger = Ledger.open(path, is_durable=False)
    else:
        header = Header(sweep="t", id="i", seed=config.sweep.seed, trials=config.sweep.trials, num_classes=10)
        ledger = Ledger.create(path, header, is_durable=False)
    with ledger:
        trials = max(config.sweep.trials, ledger.state.target)
        finalists = ledger.state.finalists or Finalists.configured(config.sweep.finalists)
        ledger.append(Driver.here(trials=trials, finalists=finalists))
        simulate(Search(config, ledger), formula, at_once=at_once, reports=reports)
        return ledger.state
