"""Trials whose top-1 stays at chance are ended as failed, by a rule that the ledger alone decides."""

import math

import formulas
import pytest

from tune_topkd.config import ConfigError
from tune_topkd.execution.simulated import VirtualClock
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import has_collapsed
from tune_topkd.ledger import read_events
from tune_topkd.search import Search
from tune_topkd.search import audit_decisions

CLASSES = 10


def config(collapse_epochs=3, warmup=0, **sweep):
    settings = {"trials": 12, "startup_trials": 4, "asha": None, "collapse_epochs": collapse_epochs} | sweep
    return formulas.sweep_config(sweep=settings, baselines=None, recipe={"warmup_epochs": warmup})


def formula(trial, epoch):
    """Every third trial guesses; trial 4 does so until its sixth epoch."""
    number = trial.record.key.number
    guesses = number % 3 == 2 or (number == 4 and epoch < 3)
    return {"val_top1": 10.0 + epoch / 10 if guesses else formulas.value(trial.config, epoch)}


def run(path, settings, reports=None, classes=CLASSES):
    """Simulate a sweep, or go on with it; its state."""
    clock = VirtualClock()
    if path.exists():
        ledger = Ledger.open(path)
    else:
        header = Header(sweep="s", id="0", seed=0, trials=settings.sweep.trials, num_classes=classes)
        ledger = Ledger.create(path, header, clock=clock, is_durable=False)
    with ledger:
        ledger.append(Driver.here(trials=settings.sweep.trials))
        simulate(Search(settings, ledger, clock=clock), formula, at_once=1, clock=clock, reports=reports)
        return ledger.state


def test_a_trial_at_chance_ends_as_failed_and_the_others_go_on(tmp_path):
    state = run(tmp_path / "l", config())
    ends = {r.key.number: (r.status, r.reason, r.epoch) for r in state.arm("search")}
    assert len(ends) == 12
    for number, end in ends.items():
        if number % 3 == 2:
            assert end == (TrialStatus.FAILED, "collapsed", 3)
        else:
            assert end == (TrialStatus.COMPLETED, "full budget", formulas.EPOCHS)
    assert state.arm("search")[2].error == "top-1 is at chance at epoch 3, as in those before it"
    assert state.arm("search")[2].value is None
    assert audit_decisions(config(), read_events(tmp_path / "l")[0])[0] == []


def test_none_is_ended_where_nobody_asks_for_it_or_chance_is_not_known(tmp_path):
    for name, settings, classes in (("off", config(None), CLASSES), ("unknown", config(), None)):
        state = run(tmp_path / name, settings, classes=classes)
        assert {r.status for r in state.arm("search")} == {TrialStatus.COMPLETED}


def test_a_killed_sweep_ends_the_same_trials_at_the_same_epochs(tmp_path):
    whole = run(tmp_path / "whole", config())
    cut = tmp_path / "cut"
    for reports in (1, 3, 5, 7, 20, 21, None):
        state = run(cut, config(), reports)
    said = [[(r.key, r.params, r.status, r.reason, r.epoch) for r in s.arm("search")] for s in (whole, state)]
    assert said[0] == said[1]


def test_an_audit_finds_a_collapsed_trial_that_went_on_and_one_that_should_have(tmp_path):
    run(tmp_path / "off", config(None))
    findings = audit_decisions(config(), read_events(tmp_path / "off")[0])[0]
    assert any("was decided continue at epoch 3, where collapsed is right" in str(finding) for finding in findings)
    run(tmp_path / "on", config())
    findings = audit_decisions(config(None), read_events(tmp_path / "on")[0])[0]
    assert any("was decided collapsed at epoch 3, where continue is right" in str(finding) for finding in findings)


@pytest.mark.parametrize(
    ("classes", "values", "warmup", "is_one"),
    [
        (10, [10.0, 12.0, 14.5], 0, True),
        (10, [10.0, 12.0, 14.6], 0, False),  # a twentieth of the way to 100 %
        (100, [1.0, 1.5, 1.4], 0, True),
        (100, [1.0, 1.6, 1.4], 0, False),
        (2, [50.0, 51.0, 52.5], 0, True),
        (2, [50.0, 60.0, 52.0], 0, False),  # of two classes 60 % is no chance
        (10, [10.0, 10.0], 0, False),
        (10, [10.0, 10.0, 10.0, 10.0], 2, False),  # two of these are of the warm-up
        (10, [10.0] * 5, 2, True),
        (10, [90.0, 10.0, 10.0, 10.0], 0, True),  # it has fallen apart, and stays so
    ],
)
def test_what_is_at_chance(classes, values, warmup, is_one):
    *before, last = values
    record = TrialRecord(TrialKey("search", 0), {}, {})
    record.reports = {epoch: {"val_top1": value} for epoch, value in enumerate(before, 1)}
    assert has_collapsed(config(warmup=warmup), classes, record, len(values), {"val_top1": last}) is is_one


def test_a_gap_or_a_metric_that_is_missing_is_no_collapse():
    record = TrialRecord(TrialKey("search", 0), {}, {})
    record.reports = {1: {"val_top1": 10.0}, 2: {"loss": 1.0}}
    assert not has_collapsed(config(), CLASSES, record, 3, {"val_top1": 10.0})
    assert not has_collapsed(config(1), CLASSES, record, 3, {"loss": math.inf})


def test_less_than_one_epoch_is_refused():
    with pytest.raises(ConfigError, match=r"sweep\.collapse_epochs"):
        config(0)
