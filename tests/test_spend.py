"""What trainings cost and what stopping saved, by ledgers of the test's own making."""

import formulas
import pandas as pd
import pytest

from tune_topkd.config.sections import AshaConfig
from tune_topkd.findings import ArmSpend
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Decision
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Header
from tune_topkd.ledger import Report
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.sweep import api
from tune_topkd.sweep import campaign
from tune_topkd.sweep.spend import FEWEST
from tune_topkd.sweep.spend import rung_ranks
from tune_topkd.sweep.spend import rungs_of
from tune_topkd.sweep.spend import spend
from tune_topkd.sweep.spend import spend_by_arm

CONFIG = formulas.sweep_config()
EPOCHS = CONFIG.recipe.epochs


def state_of(*trials):
    """Of (arm, status, values by epoch, seconds of an epoch)."""
    contents = [Header(sweep="s", id="0", seed=0, trials=len(trials), epochs=EPOCHS)]
    for number, (arm, status, values, seconds) in enumerate(trials):
        key = TrialKey(arm, number)
        contents.append(Suggest(key=key, proposal={}, params={}))
        for epoch, value in enumerate(values, 1):
            metrics = {"val_top1": value} | ({} if seconds is None else {"epoch_seconds": seconds})
            contents.append(Report(key=key, epoch=epoch, metrics=metrics, decision=Decision.CONTINUE))
        if status.is_end:
            value = values[-1] if values and status is not TrialStatus.FAILED else None
            contents.append(End(key=key, epoch=len(values), status=status, reason="", value=value))
    state = SweepState()
    for seq, content in enumerate(contents):
        state.apply(Event(seq, 0.0, content))
    return state


def test_stopped_trials_save_what_they_would_have_taken_at_their_own_pace():
    found = spend(
        state_of(
            (SEARCH, TrialStatus.COMPLETED, [50.0] * EPOCHS, 2.0),
            (SEARCH, TrialStatus.PRUNED, [50.0] * 3, 4.0),
            (SEARCH, TrialStatus.FAILED, [50.0] * 2, 10.0),
            (SEARCH, TrialStatus.RUNNING, [50.0], 1.0),
            ("ce", TrialStatus.COMPLETED, [50.0] * EPOCHS, 1.0),
        ),
    )
    assert found.search == 2.0 * EPOCHS + 12.0 + 20.0 + 1.0
    assert found.others == EPOCHS
    assert (found.stopped, found.failed) == (12.0, 20.0)
    assert found.saved == 4.0 * (EPOCHS - 3)
    assert found.total == found.search + found.others
    assert found.sentence() == (
        f"{found.total:.0f} s of training in all, one trial at a time, 20 s of it in trainings that failed; "
        f"stopping trials early has saved {found.saved:.0f} s"
    )


def test_a_baseline_that_failed_is_among_the_failed_trainings():
    found = spend(state_of(("ce", TrialStatus.FAILED, [50.0] * 2, 3.0), ("kd", TrialStatus.COMPLETED, [50.0], 1.0)))
    assert (found.failed, found.total) == (6.0, 7.0)
    assert "6 s of it in trainings that failed" in found.sentence()


def test_what_was_not_reported_costs_nothing_and_is_not_told():
    found = spend(state_of((SEARCH, TrialStatus.PRUNED, [], None), (SEARCH, TrialStatus.RUNNING, [50.0], None)))
    assert (found.total, found.saved, found.sentence()) == (0.0, 0.0, "")


def test_how_a_sweep_stands_is_told_by_adding_its_spend_once(tmp_path, monkeypatch):
    added = []
    for module in (api, campaign):
        monkeypatch.setattr(module, "spend", lambda state: added.append(state) or spend(state))
    state = state_of((SEARCH, TrialStatus.COMPLETED, [50.0] * EPOCHS, 400.0))
    (tmp_path / "ledger.jsonl").touch()
    found = api.status_of("s", tmp_path, state)
    assert (found.spend.total, found.cpu_hours) == (3600.0, 1.0)
    assert len(added) == 1, "a ledger may be long, and status --watch looks often"


@pytest.mark.parametrize("ties", [False, True])
def test_a_rungs_rank_correlation_is_spearmans_over_the_trials_that_ended(ties):
    early = [10.0, 30.0, 20.0, 50.0, 40.0, 60.0, 80.0, 70.0, 90.0]
    if ties:
        early[1] = early[2] = 30.0
    late = [15.0, 25.0, 35.0, 45.0, 55.0, 65.0, 75.0, 85.0, 80.0]
    trials = [(SEARCH, TrialStatus.COMPLETED, [e] * (EPOCHS - 1) + [v], 1.0) for e, v in zip(early, late, strict=True)]
    stopped = [(SEARCH, TrialStatus.PRUNED, [99.0], 1.0)]
    rank, later = rung_ranks(CONFIG, state_of(*trials, *stopped))
    assert (later.epoch, later.spearman) == (3, rank.spearman)
    expected = pd.Series(early).corr(pd.Series(late), method="spearman")
    assert (rank.epoch, rank.trials, rank.spearman) == (1, 9, pytest.approx(expected))
    assert "foresees little" not in rank.sentence()


def test_a_weak_rung_is_told_and_few_trials_say_nothing():
    early = [50.0, 10.0, 40.0, 20.0, 30.0, 60.0, 15.0, 35.0]
    trials = [(SEARCH, TrialStatus.COMPLETED, [e] * (EPOCHS - 1) + [10.0 + n], 1.0) for n, e in enumerate(early)]
    rank, _ = rung_ranks(CONFIG, state_of(*trials))
    assert rank.spearman < 0.5
    assert "it foresees little" in rank.sentence()
    assert rung_ranks(CONFIG, state_of(*trials[:7])) == []
    same = [(SEARCH, TrialStatus.COMPLETED, [50.0] * EPOCHS, 1.0)] * 9
    assert rung_ranks(CONFIG, state_of(*same)) == [], "all alike have no ranks"


def test_rungs_are_below_the_last_epoch():
    assert AshaConfig(grace_epochs=1, reduction_factor=3).rungs(9) == [1, 3]
    assert AshaConfig(grace_epochs=5, reduction_factor=2).rungs(20) == [5, 10]
    assert AshaConfig(grace_epochs=9).rungs(9) == []
    assert rung_ranks(formulas.sweep_config(sweep={"asha": None}), state_of()) == []


def test_each_arm_has_what_its_trials_cost_by_what_became_of_them():
    found = spend_by_arm(
        state_of(
            ("ce", TrialStatus.COMPLETED, [50.0] * EPOCHS, 1.0),
            (SEARCH, TrialStatus.COMPLETED, [50.0] * EPOCHS, 2.0),
            (SEARCH, TrialStatus.PRUNED, [50.0] * 3, 4.0),
            (SEARCH, TrialStatus.COMPLETED, [50.0] * EPOCHS, 3.0),
        )
    )
    assert found == [
        ArmSpend("search", "completed", 2, 5.0 * EPOCHS),
        ArmSpend("search", "pruned", 1, 12.0),
        ArmSpend("baseline cross-entropy", "completed", 1, 1.0 * EPOCHS),
    ]


def test_a_rung_counts_who_arrived_and_who_was_stopped_there():
    first, second = CONFIG.sweep.asha.rungs(EPOCHS)
    done = [(SEARCH, TrialStatus.COMPLETED, [float(n)] * EPOCHS, None) for n in range(FEWEST)]
    state = state_of(
        *done, (SEARCH, TrialStatus.PRUNED, [1.0] * first, None), (SEARCH, TrialStatus.PRUNED, [1.0] * second, None)
    )
    assert [(r.epoch, r.arrived, r.stopped, r.trials) for r in rungs_of(CONFIG, state)] == [
        (first, FEWEST + 2, 1, FEWEST),
        (second, FEWEST + 1, 1, FEWEST),
    ]
    assert [rung.rank_correlation for rung in rungs_of(CONFIG, state)] == [pytest.approx(1.0)] * 2
    assert [rung.rank_correlation for rung in rungs_of(CONFIG, state_of(*done[:3]))] == [None, None]
