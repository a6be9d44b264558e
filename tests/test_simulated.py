"""Sweeps of formula trials on a virtual clock."""

import math

import formulas
import pytest

from tune_topkd.execution.simulated import VirtualClock
from tune_topkd.execution.simulated import WorkerLostError
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_events
from tune_topkd.search import Search
from tune_topkd.search import audit_decisions

TRIALS = 30


def config(recipe=None, **sweep):
    settings = {"trials": TRIALS, "startup_trials": 4, "asha": {"grace_epochs": 1}}
    return formulas.sweep_config(sweep=settings | sweep, baselines=None, recipe=recipe or {})


def rising(trial, epoch):
    return {"val_top1": formulas.value(trial.config, epoch)}


def sweep_of(path, formula=rising, *, at_once=4, seconds=lambda trial, epoch: 1.0, reports=None, **sweep):
    """Simulate a sweep, or what is left of it: its clock, the state, why it stopped."""
    clock, settings = VirtualClock(), config(**sweep)
    if path.exists():
        ledger = Ledger.open(path)
    else:
        header = Header(sweep="s", id="0", seed=settings.sweep.seed, trials=settings.sweep.trials)
        ledger = Ledger.create(path, header, clock=clock, is_durable=False)
    with ledger:
        ledger.append(Driver.here(trials=settings.sweep.trials))
        search = Search(settings, ledger, clock=clock)
        reason = simulate(search, formula, at_once=at_once, clock=clock, seconds=seconds, reports=reports)
    return clock.now, ledger.state, reason


@pytest.mark.parametrize("at_once", [1, 7])
def test_a_sweep_runs_to_its_end_by_the_rules_of_a_real_one(tmp_path, at_once):
    _, state, reason = sweep_of(tmp_path / "l.jsonl", at_once=at_once)
    assert (reason, len(state.arm("search")), state.running()) == ("finished", TRIALS, [])
    assert {r.status for r in state.arm("search")} == {TrialStatus.COMPLETED, TrialStatus.PRUNED}
    assert audit_decisions(config(), read_events(tmp_path / "l.jsonl")[0])[0] == []


@pytest.mark.parametrize("at_once", [1, 7])
def test_twice_gives_the_same_ledger_to_the_byte(tmp_path, at_once):
    for name in ("one", "other"):
        sweep_of(tmp_path / name, at_once=at_once, seconds=lambda trial, epoch: 1 + trial.record.key.number % 3)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_the_clock_counts_the_epochs_that_are_one_after_another(tmp_path):
    now, _, _ = sweep_of(tmp_path / "one", at_once=1, trials=5, asha=None)
    assert now == 5 * formulas.EPOCHS
    now, _, _ = sweep_of(tmp_path / "five", at_once=5, trials=5, asha=None)
    assert now == formulas.EPOCHS
    now, _, _ = sweep_of(tmp_path / "slow", at_once=5, trials=5, asha=None, seconds=lambda trial, epoch: 60.0)
    assert now == 60 * formulas.EPOCHS


def test_a_faster_trial_reports_more_often(tmp_path):
    seen = []

    def formula(trial, epoch):
        seen.append(trial.record.key.number)
        return rising(trial, epoch)

    sweep_of(
        tmp_path / "l", formula, at_once=2, trials=2, asha=None, seconds=lambda t, e: (1.0, 3.0)[t.record.key.number]
    )
    assert seen[:8] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_what_a_formula_raises_fails_its_trial_and_no_other(tmp_path):
    def formula(trial, epoch):
        if trial.record.key.number == 3:
            raise ZeroDivisionError("in the formula")
        return {"val_top1": math.nan} if trial.record.key.number == 5 else rising(trial, epoch)

    _, state, reason = sweep_of(tmp_path / "l", formula)
    failed = {r.key.number: (r.reason, r.error) for r in state.arm("search") if r.status is TrialStatus.FAILED}
    assert reason == "finished"
    assert set(failed) == {3, 5}
    assert failed[3] == ("error", "ZeroDivisionError: in the formula")
    assert failed[5][0] == "diverged"


def test_a_lost_worker_s_trial_goes_on_after_its_last_epoch(tmp_path):
    told = []

    def formula(trial, epoch):
        told.append((trial.record.key.number, epoch))
        if (trial.record.key.number, epoch) == (1, 4) and told.count((1, 4)) == 1:
            raise WorkerLostError("crash", "it died")
        return rising(trial, epoch)

    _, state, _ = sweep_of(tmp_path / "l", formula, trials=3, asha=None)
    record = state.arm("search")[1]
    assert (record.retries, record.status) == (["crash"], TrialStatus.COMPLETED)
    assert [epoch for number, epoch in told if number == 1] == [1, 2, 3, 4, *range(4, formulas.EPOCHS + 1)]


def test_a_time_budget_is_of_the_virtual_clock(tmp_path):
    _, state, reason = sweep_of(tmp_path / "l", time_budget=20.0, asha=None)
    assert reason == "time_budget"
    assert 0 < len(state.arm("search")) < TRIALS


def test_cut_after_any_report_it_goes_on_to_the_same_end(tmp_path):
    _, whole, _ = sweep_of(tmp_path / "whole", at_once=1)
    for reports in (1, 17, 40):
        path = tmp_path / str(reports)
        assert sweep_of(path, at_once=1, reports=reports)[2] == "interrupted"
        _, state, reason = sweep_of(path, at_once=1)
        assert reason == "finished"
        assert [r.params for r in state.arm("search")] == [r.params for r in whole.arm("search")]
        assert [r.reports for r in state.arm("search")] == [r.reports for r in whole.arm("search")]


@pytest.mark.parametrize(("sampler", "trials", "at_once"), [("random", 500, 100), ("tpe", 150, 50)])
def test_many_trials_many_at_once_give_the_same_ledger_twice(tmp_path, sampler, trials, at_once):
    for name in ("one", "other"):
        now, state, reason = sweep_of(tmp_path / name, at_once=at_once, trials=trials, sampler=sampler)
        assert (reason, len(state.arm("search"))) == ("finished", trials)
        assert now < trials * formulas.EPOCHS / at_once
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_at_once_must_be_a_number_of_trials(tmp_path):
    with pytest.raises(ValueError, match="at_once must be at least 1, but got 0"):
        sweep_of(tmp_path / "l", at_once=0)
