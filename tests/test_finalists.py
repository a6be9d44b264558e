"""Finalists: a sweep's best trials on fresh seeds, and the answer by their means."""

import io
import json
import math
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import formulas
import numpy as np
import pandas as pd
import pytest
import rich.console
from test_audit import events_of
from test_audit import write as write_ledger

from tune_topkd import report
from tune_topkd.cli.app import main
from tune_topkd.cli.display import ConsoleCallback
from tune_topkd.cli.display import result_table
from tune_topkd.cli.display import summary_table
from tune_topkd.cli.picture import Picture
from tune_topkd.cli.standing import line_of
from tune_topkd.cli.standing import standing
from tune_topkd.config import ConfigError
from tune_topkd.config import new_config
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.execution.simulated import WorkerLostError
from tune_topkd.execution.simulated import simulate
from tune_topkd.export import WRITERS
from tune_topkd.export import as_yaml
from tune_topkd.export import load_tuned_config
from tune_topkd.export import tuned_config
from tune_topkd.ledger import REPEAT
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Driver
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Finalists
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Repeat
from tune_topkd.ledger import Report
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import baseline_to_come
from tune_topkd.ledger import baseline_trials
from tune_topkd.ledger import events
from tune_topkd.ledger import finalists
from tune_topkd.ledger import finalists_done
from tune_topkd.ledger import finalists_to_repeat
from tune_topkd.ledger import is_searched
from tune_topkd.ledger import read_events
from tune_topkd.ledger import standings
from tune_topkd.ledger import unrepeated
from tune_topkd.ledger import winner_of
from tune_topkd.report.page.data import base_values
from tune_topkd.report.page.evidence_figures import finalists_figure
from tune_topkd.report.table import baseline_finalists
from tune_topkd.search import Search
from tune_topkd.search import audit_decisions
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import audit
from tune_topkd.sweep import cost
from tune_topkd.sweep.campaign import figures_of
from tune_topkd.sweep.page import findings_from
from tune_topkd.sweep.remaining import epochs_ahead
from tune_topkd.sweep.remaining import training_total
from tune_topkd.sweep.result import advice
from tune_topkd.sweep.result import finalists_sentence
from tune_topkd.sweep.result import gains
from tune_topkd.sweep.wording import short
from tune_topkd.sweep.wording import title
from tune_topkd.terminal import Console
from tune_topkd.terminal import Terminal
from tune_topkd.tracking.projection import Batch
from tune_topkd.tracking.projection import Projection
from tune_topkd.verdict import capital
from tune_topkd.verdict import fresh_gains
from tune_topkd.verdict import listed
from tune_topkd.verdict import mean_interval

RECORDED = Path(__file__).with_name("recorded") / "finalists.jsonl"
SEED, TRIALS, EPOCHS = 5, 6, 2
OWN = {"search": [70.0, 75.0, 80.0, 78.0, 60.0, 65.0, 79.0, 50.0], "ce": [74.0], "kd": [76.0]}
"""What each trial gives on the search's seed, by its number."""
FRESH = {
    "search": [(0, 0), (74.0, 75.0), (71.0, 72.0), (76.0, 77.0), (0, 0), (0, 0), (76.5, 77.5), (0, 0)],
    "ce": [(73.0, 75.0)],
    "kd": [(74.5, 74.5)],
}
"""What it gives on the two seeds after it: trial 2, the luckiest, is none of the better ones."""
LUCKIEST, BEST = TrialKey("search", 2), TrialKey("search", 3)


def config(trials=TRIALS, count=3, seeds=2, **sections):
    """A sweep's config; with a count of 0 it has no finalists."""
    plan = {"count": count, "seeds": seeds} if count else None
    settings = {
        "trials": trials,
        "startup_trials": 50,
        "finalists": plan,
        "asha": None,
        "seed": SEED,
        "max_failures": 1,
    }
    sections = {"baselines": {"trials": 1}, "recipe": {"epochs": EPOCHS}} | sections
    settings |= sections.pop("sweep", {})
    return formulas.sweep_config(sweep=settings, **sections, space={"lr": {"low": 0.1, "high": 0.1}})


def planted(trial, epoch):
    """The values above."""
    arm, number = trial.record.origin
    place = trial.config.seed - SEED
    value = FRESH[arm][number][place - 1] if place else OWN[arm][number]
    return {"val_top1": value - 1.0 + epoch / EPOCHS}


def breaking(*broken, how=math.nan):
    """The values above, but for trainings, each an (origin, seed): they diverge, or have another value, or it raises."""

    def formula(trial, epoch):
        if (trial.record.origin, trial.config.seed) not in broken:
            return planted(trial, epoch)
        if isinstance(how, Exception):
            raise how
        return {"val_top1": how}

    return formula


def drive(path, config, formula=planted, at_once=1, reports=None, **options):
    """Run a sweep, or what is left of it, and return its state."""
    if path.exists():
        ledger = Ledger.open(path, is_durable=False)
    else:
        header = Header(sweep="t", id="i", seed=SEED, trials=config.sweep.trials, num_classes=10, epochs=EPOCHS)
        ledger = Ledger.create(path, header, is_durable=False)
    with ledger:
        plan = Finalists.configured(config.sweep.finalists)
        ledger.append(Driver.here(trials=config.sweep.trials, finalists=plan))
        simulate(Search(config, ledger, **options), formula, at_once=at_once, reports=reports)
        return ledger.state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The ledger of a finished sweep; not to be changed."""
    path = tmp_path_factory.mktemp("whole") / "ledger.jsonl"
    assert drive(path, config()).stop_reason == "finished"
    return path


def state_of(path):
    state = SweepState()
    for event in read_events(path)[0]:
        state.apply(event)
    return state


def told(path):
    """A ledger's events without times, and without who drove it when."""
    return [(e.name, e.data) for e in read_events(path)[0] if e.name not in ("driver", "stop", "start")]


def repeated(state):
    return [(str(record.of_trial), record.seed) for record in state.arm("repeat")]


# --- which trials are repeated ----------------------------------------------------------------------------------------


def test_the_best_trials_and_the_best_of_each_baseline_are_trained_on_the_same_fresh_seeds(whole):
    state = state_of(whole)
    assert repeated(state) == [
        (name, seed) for seed in (6, 7) for name in ("0002", "0003", "0001", "ce-0000", "kd-0000")
    ]
    assert [record.epoch for record in state.arm("repeat")] == [EPOCHS] * 10
    names = [e.name for e in read_events(whole)[0]]
    first = names.index("repeat")
    assert sum(e.name == "end" for e in read_events(whole)[0][:first]) == TRIALS + 2
    assert "suggest" not in names[first:]
    assert (state.size(), state.counts()["completed"], state.best().key) == (TRIALS, TRIALS, LUCKIEST)
    assert audit_decisions(config(), read_events(whole)[0])[0] == []


def test_a_repeat_trains_what_its_trial_trained_but_for_the_seed(tmp_path):
    trained = {}

    def formula(trial, epoch):
        trained[trial.record.key] = trial.config
        return planted(trial, epoch)

    for record in drive(tmp_path / "l", config(), formula).arm("repeat"):
        assert record.seed != SEED
        assert trained[record.key] == trained[record.of_trial].model_copy(update={"seed": record.seed})


def test_it_is_never_stopped_early_and_the_sampler_is_not_told(tmp_path):
    asked = []

    class Watching:
        def decide(self, key, epoch, value):
            asked.append(key.arm)
            return events.Decision.CONTINUE

        def replay(self, state):
            pass

    path = tmp_path / "l"
    drive(path, config(), scheduler=Watching())
    assert set(asked) == {"search"}
    with Ledger.open(path) as ledger:
        assert len(Search(config(), ledger).sampler.study.trials) == TRIALS


@pytest.mark.parametrize("at_once", [2, 7])
def test_none_begins_before_all_that_it_is_chosen_from_has_ended(tmp_path, at_once):
    state = drive(tmp_path / "l", config(), at_once=at_once)
    assert state.stop_reason == "finished"
    assert len(repeated(state)) == len(set(repeated(state))) == 10
    assert audit_decisions(config(), read_events(tmp_path / "l")[0])[0] == []


def test_all_trainings_of_the_finalists_can_be_started_at_once_when_the_last_trial_has_ended(tmp_path):
    left = []

    def report(trial, epoch):
        left.append(search.startable())
        return planted(trial, epoch)

    header = Header(sweep="t", id="i", seed=SEED, trials=TRIALS, num_classes=10, epochs=EPOCHS)
    with Ledger.create(tmp_path / "l.jsonl", header, is_durable=False) as ledger:
        ledger.append(Driver.here(trials=TRIALS, finalists=Finalists.configured(config().sweep.finalists)))
        search = Search(config(), ledger)
        simulate(search, report, at_once=1)
        assert search.startable() == 0
    trials, trainings = TRIALS + 2, (3 + 2) * 2
    assert left[::EPOCHS] == [*reversed(range(trials)), *reversed(range(trainings))]


def test_trials_of_the_same_parameters_count_once_and_share_their_repeats(tmp_path):
    with Ledger.create(tmp_path / "l", Header(sweep="t", id="i", seed=0, trials=3), is_durable=False) as ledger:
        ledger.append(Driver.here(trials=3, finalists=Finalists(2, 2)))
        for number, (k, value) in enumerate([(3, 80.0), (3, 81.0), (4, 70.0)]):
            key = TrialKey("search", number)
            end = events.End(key=key, epoch=1, status=TrialStatus.COMPLETED, reason="", value=value)
            ledger.append(Suggest(key=key, proposal={"k": k}, params={"k": k}), end)
        wanted = [(str(trial.key), seed) for trial, seed in finalists_to_repeat(ledger.state)]
        assert wanted == [("0001", 1), ("0002", 1), ("0001", 2), ("0002", 2)]
        ledger.append(Repeat(key=TrialKey("repeat", 0), of_trial=TrialKey("search", 0), seed=1))
        wanted = [(str(trial.key), seed) for trial, seed in finalists_to_repeat(ledger.state)]
        assert wanted == [("0002", 1), ("0001", 2), ("0002", 2)]


def test_any_trials_can_be_repeated_on_any_seeds(whole):
    state = state_of(whole)
    trials = [state.trials[BEST], state.trials[TrialKey("search", 4)]]
    assert unrepeated(state, trials, [7, 9]) == [(trials[1], 7), (trials[0], 9), (trials[1], 9)]


def test_a_sweep_killed_after_any_line_goes_on_as_if_it_had_not_been(tmp_path, whole):
    lines = whole.read_bytes().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if b'"repeat"' in line)
    for cut in range(first - 4, len(lines)):
        part = tmp_path / f"{cut}"
        part.write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
        assert drive(part, config()).stop_reason == "finished"
        assert told(part) == told(whole), cut
        assert audit_decisions(config(), read_events(part)[0])[0] == []


def test_a_sweep_whose_finalists_are_to_come_is_not_finished(tmp_path, whole):
    lines = whole.read_bytes().splitlines(keepends=True)
    (tmp_path / "l").write_bytes(b"".join(lines[: next(i for i, line in enumerate(lines) if b'"repeat"' in line)]))
    with Ledger.open(tmp_path / "l", is_durable=False) as ledger:
        search = Search(config(sweep={"time_budget": 1.0}), ledger, clock=iter((0.0, *[2.0] * 99)).__next__)
        assert not search.is_finished
        assert search.next_trial() is None
        assert search.stopped() == "time_budget"


@pytest.mark.parametrize("cut", [None, 37, 45, 60])
def test_more_trials_afterwards_train_only_the_finalists_that_are_missing(tmp_path, whole, cut):
    path = tmp_path / "l"
    path.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:cut]))
    before = repeated(state_of(path))
    state = drive(path, config(trials=8))
    assert (state.stop_reason, state.size()) == ("finished", 8)
    if cut is None:  # trial 6 is the second of the search now, and takes the place of trial 1
        assert repeated(state)[10:] == [("0006", 6), ("0006", 7)]
    assert repeated(state)[: len(before)] == before
    assert len(set(repeated(state))) == len(repeated(state))
    assert [str(f.record.key) for f in standings(state)] == ["0006", "0003", "0002"]
    assert winner_of(state).record.key.number == 6
    assert audit_decisions(config(trials=8), read_events(path)[0])[0] == []


def test_workers_that_are_lost_are_started_again_by_the_same_rules(tmp_path):
    def formula(trial, epoch):
        if trial.record.of_trial and not trial.record.retries:
            raise WorkerLostError("crash", "it died")
        if trial.record.of_trial == BEST and trial.record.seed == 7:
            raise WorkerLostError("crash", "it died")
        return planted(trial, epoch)

    state = drive(tmp_path / "l", config(), formula, at_once=2)
    failed = [record for record in state.arm("repeat") if record.status is TrialStatus.FAILED]
    assert [(record.of_trial, record.seed, record.reason) for record in failed] == [(BEST, 7, "crash")]
    assert state.stop_reason == "finished"
    assert audit_decisions(config(), read_events(tmp_path / "l")[0])[0] == []


def test_a_finalist_that_fails_on_all_of_many_seeds_does_not_end_the_sweep(tmp_path):
    """Of as many trials of the search that fail alike one would give up."""

    def formula(trial, epoch):
        if trial.record.of_trial is not None:
            raise OSError("no data")
        return planted(trial, epoch)

    state = drive(tmp_path / "l", config(count=1, seeds=30, baselines=None), formula)
    assert (state.stop_reason, state.size("repeat")) == ("finished", 30)
    assert audit_decisions(config(count=1, seeds=30, baselines=None), read_events(tmp_path / "l")[0])[0] == []


# --- the answer ---------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_best_mean_and_not_the_luckiest(whole):
    state = state_of(whole)
    assert [(str(f.record.key), f.mean) for f in standings(state)] == [("0003", 76.5), ("0001", 74.5), ("0002", 71.5)]
    winner = winner_of(state)
    assert (winner.record.key, winner.value, winner.record.value) == (BEST, 76.5, 78.0)
    assert winner.finalist.values == {6: 76.0, 7: 77.0}
    assert winner.finalist.error == pytest.approx(0.5)  # |76 - 77| / 2
    assert winner.finalist.luck == 1.5
    text = "76.50 ± 0.50 % over 2 fresh seeds; the search's own value 78.00 %, 1.50 of it luck"
    assert winner.finalist.sentence == finalists_sentence(state) == text


def test_of_equal_means_the_earlier_trial_is_the_answer(tmp_path):
    def formula(trial, epoch):
        return planted(trial, epoch) if trial.record.of_trial is None else {"val_top1": 70.0}

    state = drive(tmp_path / "l", config(), formula)
    assert [f.record.key.number for f in standings(state)] == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_as_long_as_a_training_is_to_come_the_answer_is_the_searchs_best_and_that_is_said(tmp_path, whole, cut):
    lines = whole.read_bytes().splitlines(keepends=True)[:-1]
    path = tmp_path / "l"
    path.write_bytes(b"".join(lines[: len(lines) - cut]))
    state = state_of(path)
    assert standings(state) == []
    assert (winner_of(state).record.key, winner_of(state).finalist) == (LUCKIEST, None)
    assert finalists_done(state) == (9, 10)
    assert "the finalists are not done (9 of 10 trainings)" in finalists_sentence(state)


def test_before_the_first_of_them_finalists_are_not_counted(tmp_path, whole):
    """How many there will be is not known before the search is over."""
    lines = whole.read_bytes().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if json.loads(line)["event"] == "repeat")
    path = tmp_path / "l"
    path.write_bytes(b"".join(lines[:first]))
    told = "the finalists are not trained yet: the answer is the best of one seed, which is optimistic; `resume` trains them"
    assert finalists_sentence(state_of(path)) == told


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (math.nan, "seed 7 diverged"),
        (ValueError("no"), "seed 7 failed (error)"),
        (43.9, "seed 7 fell to 43.90 %"),  # chance is 10, its own value 78: half of what is above chance is lost at 44
    ],
)
def test_a_config_that_falls_apart_on_one_seed_is_no_answer_while_another_has_all(tmp_path, how, said):
    """Its other seed is better than all others'."""

    def formula(trial, epoch):
        if (trial.record.origin, trial.config.seed) == (BEST, 6):
            return {"val_top1": 99.0}
        return breaking((BEST, 7), how=how)(trial, epoch)

    state = drive(tmp_path / "l", config(), formula)
    assert state.stop_reason == "finished"
    assert [f.record.key.number for f in standings(state)] == [1, 2, 3]
    assert winner_of(state).record.key.number == 1
    assert said in standings(state)[-1].sentence
    assert audit_decisions(config(), read_events(tmp_path / "l")[0])[0] == []


def test_a_seed_that_is_only_worse_counts_in_the_mean(tmp_path):
    state = drive(tmp_path / "l", config(), breaking((BEST, 7), how=44.1))
    assert standings(state)[-1].broken == {}
    assert winner_of(state).record.key.number == 1


def test_where_all_fall_apart_it_is_the_one_with_the_most_seeds_then_the_best_mean(tmp_path):
    every = [TrialKey("search", number) for number in (1, 2, 3)]
    broken = [*((key, 7) for key in every), (BEST, 6)]
    state = drive(tmp_path / "a", config(), breaking(*broken))
    assert winner_of(state).record.key.number == 1
    assert "74.00 % over 1 of 2 fresh seeds" in winner_of(state).finalist.sentence
    broken = [(key, seed) for key in every for seed in (6, 7)]
    state = drive(tmp_path / "b", config(), breaking(*broken, how=ValueError("no")))
    assert (winner_of(state).record.key, winner_of(state).finalist, state.stop_reason) == (LUCKIEST, None, "finished")
    assert "no finalist has a value of a fresh seed" in finalists_sentence(state)
    assert [gain.counts for gain in gains(config(), state, 1000)] == [True, True]


def test_a_sweep_without_a_full_trial_has_no_finalists(tmp_path):
    state = drive(tmp_path / "l", config(baselines=None), lambda trial, epoch: {"val_top1": math.nan})
    assert (state.stop_reason, winner_of(state), finalists_done(state)) == ("finished", None, (0, 0))
    assert finalists_sentence(state) == ""


def test_the_difference_is_taken_seed_by_seed(whole):
    apart = fresh_gains(state_of(whole))["ce"]
    assert apart.values == [76 - 73, 77 - 75]
    assert (apart.mean, apart.error) == (2.5, pytest.approx(0.5))
    assert apart.interval == mean_interval([3.0, 2.0], together=2), "it is told beside the one over KD"
    assert not apart.is_told_apart, "two seeds tell nothing"
    assert apart.interval.low < -10


def test_every_place_tells_the_same_differences_apart(tmp_path):
    """On four seeds the answer is 6 above cross-entropy, give or take 0.5, and 1 above KD, give or take 2."""

    def formula(trial, epoch):
        place = trial.config.seed - SEED
        base = {SEARCH: 80.0, "ce": 74.0 + (-1) ** place / 2, "kd": 79.0 + 2 * (-1) ** place}[trial.record.origin.arm]
        return {"val_top1": base - (trial.record.origin.number > 0)}

    state = drive(tmp_path / "l", config(seeds=4), formula)
    apart = fresh_gains(state)
    assert {arm: (gain.mean, gain.is_told_apart) for arm, gain in apart.items()} == {
        "ce": (6.0, True),
        "kd": (1.0, False),
    }
    ends = {told.sentence.split("points over ")[1][:2]: told for told in gains(config(seeds=4), state, 1000)}
    assert (ends["cr"].counts, ends["KD"].counts) == (True, False)
    assert ends["cr"].sentence.endswith("+60 of 1,000 validation images")
    low, high = apart["kd"].interval
    assert ends["KD"].sentence.endswith(f"+10 of 1,000 validation images; not told apart ({low:+.2f} to {high:+.2f})")
    row = figures_of(state)["gains"]
    assert {name: gain.interval for name, gain in row.items()} == {
        "cross-entropy": apart["ce"].interval,
        "KD, T = 4": apart["kd"].interval,
    }
    (best,) = [line for line in lines_of(tmp_path / "l", config(seeds=4)) if line.startswith("best")]
    assert best.endswith("+6.00 over ce, +1.00 over kd (not told apart)")
    runs, _ = mlflow_runs(tmp_path / "l")
    told = report.headline(report.trials_table(runs), {}, report.finalists_table(runs))
    assert "+6.0 ± 0.3 over CE" in told
    assert "+1.0 ± 1.2 over KD, not told apart" in told


def lines_of(path, config):
    """What the live display draws in the end."""
    drawn = Picture(config, 0.0)
    for event in read_events(path)[0]:
        drawn.take(event)
    console = rich.console.Console(width=120, file=io.StringIO())
    console.print(drawn.frame(30, 100.0))
    return console.file.getvalue().splitlines()


def test_a_gain_is_of_the_same_fresh_seeds_and_says_when_it_tells_nothing(tmp_path, whole):
    ce, kd = gains(config(), state_of(whole), 1000)
    over = "+2.50 ± 0.50 points over cross-entropy (74.00 ± 1.00 %, lr 0.1) on the same 2 fresh seeds"
    far = "; not told apart (-10.23 to +15.23)"  # t with one degree of freedom, for two at once
    assert (ce.sentence, ce.counts) == (f"{over}: +25 of 1,000 validation images{far}", False)
    assert "+2.00 ± 0.50 points over KD, T = 4" in kd.sentence
    state = drive(
        tmp_path / "a", config(), breaking((BEST, 7), how=75.0)
    )  # 3 and 0 above the one, 1.5 and 0.5 above the other
    ce, kd = gains(config(), state, 1000)
    assert "+15 of 1,000 validation images; not told apart (" in ce.sentence
    assert (ce.counts, kd.counts) == (False, False)
    ce, _ = gains(config(), drive(tmp_path / "c", config(), breaking((TrialKey("ce", 0), 6))), 1000)
    assert ce.sentence.endswith("on one fresh seed: +20 of 1,000 validation images; of one seed nothing is sure")
    assert not ce.counts
    state = drive(tmp_path / "b", config(), breaking((TrialKey("ce", 0), 6), (TrialKey("ce", 0), 7)))
    ce, _ = gains(config(), state, 1000)
    assert ce.sentence.startswith("cross-entropy has no fresh seed to be compared on (74.00 %")


def test_a_baseline_that_is_better_on_fresh_seeds_comes_with_what_to_do(tmp_path, whole):
    assert advice(config(), state_of(whole)) == ""
    kd = [(TrialKey("kd", 0), seed) for seed in (6, 7)]
    assert advice(config(), drive(tmp_path / "l", config(), breaking(*kd, how=77.0))).startswith(
        "KD, T = 4 does as well"
    )


# --- off, and what an older ledger is -----------------------------------------------------------------------------------


def test_without_finalists_the_ledger_is_that_of_earlier_versions(tmp_path):
    path = tmp_path / "l"
    state = drive(path, config(count=0))
    assert state.stop_reason == "finished"
    assert state.size("repeat") == 0
    assert b"finalists" not in path.read_bytes()
    assert b"repeat" not in path.read_bytes()
    assert (winner_of(state).record.key, winner_of(state).finalist, finalists_sentence(state)) == (LUCKIEST, None, "")
    driver = events.encode(Event(1, 2.0, Driver(host="h", pid=3, trials=4)))
    begun = (
        b'{"seq":1,"time":2.0,"event":"driver","host":"h","pid":3,"trials":4,"folder":null,"versions":{},"places":{},'
    )
    assert driver.startswith(begun + b'"crc":')
    assert "fresh" not in as_yaml(tuned_config(config(count=0), state, {}))


def test_up_to_its_finalists_a_sweep_is_the_one_without(tmp_path, whole):
    drive(tmp_path / "l", config(count=0))
    without = told(tmp_path / "l")
    assert told(whole)[: len(without)] == without
    assert told(whole)[len(without)][0] == "repeat"


def test_a_line_of_a_repeat_says_which_trial_and_which_seed(whole):
    line = next(line for line in whole.read_bytes().splitlines() if b'"event":"repeat"' in line)
    data = {name: value for name, value in json.loads(line).items() if name not in ("seq", "time", "crc")}
    assert data == {"event": "repeat", "arm": "repeat", "number": 0, "of_trial": ["search", 2], "seed": 6}
    assert events.encode(events.decode(line, "it")) == line + b"\n"


def test_a_ledger_that_was_recorded_is_read_with_its_answer_and_goes_on(tmp_path):
    path = tmp_path / "l"
    shutil.copy(RECORDED, path)
    state = state_of(path)
    assert (finalists_done(state), state.stop_reason) == ((5, 10), "interrupted")
    assert audit_decisions(config(), read_events(path)[0])[0] == []
    state = drive(path, config())
    assert path.read_bytes().startswith(RECORDED.read_bytes())
    assert (winner_of(state).record.key, winner_of(state).value, state.size("repeat")) == (BEST, 76.5, 10)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (Repeat(key=TrialKey("repeat", 10), of_trial=TrialKey("search", 9), seed=6), "0009, which was never suggested"),
        (Repeat(key=TrialKey("repeat", 10), of_trial=TrialKey("repeat", 0), seed=6), "which is a repeat itself"),
        (Repeat(key=TrialKey("search", 10), of_trial=BEST, seed=6), "trial 0010, which is of another arm"),
        (Repeat(key=TrialKey("repeat", 1), of_trial=BEST, seed=6), "trial repeat-0001 is suggested a second time"),
        (Suggest(key=TrialKey("repeat", 10), proposal={}, params={}), "does not say which trial it repeats"),
    ],
)
def test_a_repeat_that_cannot_be_is_refused(whole, content, rule):
    state = state_of(whole)
    with pytest.raises(LedgerError, match=rule):
        state.apply(Event(state.last_seq + 1, 0.0, content))


# --- the audit ------------------------------------------------------------------------------------------------------------


def forge(change):
    """Changes the second repeat's line."""

    def forged(found):
        place = [i for i, (name, _) in enumerate(found) if name == "repeat"][1]
        found[place][1].update(change)

    return forged


def drop_the_last(found):
    places = [i for i, (_, data) in enumerate(found) if data.get("arm") == "repeat" and data["number"] == 9]
    del found[places[0] : places[-1] + 1]


def repeat_before_the_end(found):
    """The first repeat's line where a trial of the search is still at work."""
    line = found.pop(next(i for i, (name, _) in enumerate(found) if name == "repeat"))
    found.insert(next(i for i, (n, d) in enumerate(found) if n == "end" and d["number"] == 5), line)


def change_the_plan(found):
    found[1][1]["finalists"]["seeds"] = 3


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (forge({"seed": 9}), "trial repeat-0001 repeats 0003 on seed 9, where 0003 on seed 6 comes next"),
        (forge({"seed": SEED}), "trial repeat-0001 repeats 0003 on seed 5, where 0003 on seed 6 comes next"),
        (forge({"of_trial": ["search", 4]}), "repeats 0004 on seed 6, where 0003 on seed 6 comes next"),
        (forge({"of_trial": ["search", 2]}), "repeats 0002 on seed 6, where 0003 on seed 6 comes next"),
        (drop_the_last, "the sweep is finished without kd-0000 on seed 7"),
        (repeat_before_the_end, "trial repeat-0000 repeats a finalist although the search is not over"),
        (
            change_the_plan,
            "finalists are Finalists(count=3, seeds=3, baselines=1), where the config says "
            "Finalists(count=3, seeds=2, baselines=1)",
        ),
    ],
)
def test_the_audit_finds_a_finalist_that_is_not_the_ledgers(tmp_path, whole, damage, finding):
    found = events_of(whole.parent)
    damage(found)
    write_ledger(tmp_path, found)
    told = audit_decisions(config(), read_events(tmp_path / "ledger.jsonl")[0])[0]
    assert any(finding in line for line in told), told


# --- how much there is to do --------------------------------------------------------------------------------------------


def test_the_finalists_are_part_of_the_work_to_do(tmp_path, whole):
    whole_sweep = TRIALS + 2 + 10
    lines = whole.read_bytes().splitlines(keepends=True)
    for cut in range(2, len(lines), 5):
        path = tmp_path / f"{cut}"
        path.write_bytes(b"".join(lines[:cut]))
        state = state_of(path)
        assert training_total(config(), state) == whole_sweep, cut
        ended = sum(record.status.is_end for record in state.trials.values())
        assert len(epochs_ahead(config(), state)) == whole_sweep - ended, cut
    state = state_of(whole)
    assert epochs_ahead(config(), state) == []
    more = drive(tmp_path / "more", config(trials=8), reports=1)
    assert training_total(config(trials=8), more) == 8 + 2 + 10


# --- the config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "rule"),
    [
        ({"count": 0}, "sweep.finalists.count = 0"),
        ({"seeds": 1}, "sweep.finalists.seeds = 1"),
        ({"trials": 3}, "sweep.finalists.trials"),
        (3, "sweep.finalists = 3"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_its_key(plan, rule):
    with pytest.raises(ConfigError) as refused:
        config(sweep={"finalists": plan})
    assert rule in str(refused.value)


def test_seeds_that_are_too_large_to_be_followed_are_refused():
    with pytest.raises(ConfigError, match=r"sweep.seed = 9223372036854775807: the seeds up to sweep.seed \+ 2"):
        config(sweep={"seed": 2**63 - 1})
    assert config(sweep={"seed": 2**63 - 1, "finalists": None}).sweep.finalists is None
    assert config(sweep={"finalists": {}}).sweep.finalists.model_dump() == {"count": 3, "seeds": 2, "baselines": 1}


# --- what others have of it -----------------------------------------------------------------------------------------------


def test_the_tuned_config_has_the_evidence_and_is_read_again(tmp_path, whole):
    tuned = tuned_config(config(), state_of(whole), {})
    evidence = tuned.evidence
    assert (evidence.trial, evidence.val_top1, evidence.seeds) == (3, 78.0, [SEED])
    assert (evidence.fresh.val_top1, evidence.fresh.error) == (76.5, pytest.approx(0.5))
    assert (evidence.fresh.seeds, evidence.fresh.values) == ([6, 7], [76.0, 77.0])
    assert evidence.baselines["ce"].fresh.values == [73.0, 75.0]
    for form in ("yaml", "json"):
        (tmp_path / form).write_text(WRITERS[form](tuned))
        assert load_tuned_config(tmp_path / form) == tuned
    assert "76.50 ± 0.50 % over 2 fresh seeds, 78.00 % in the search (trial 3" in as_yaml(tuned)
    assert tuned.loss["k"] == state_of(whole).trials[BEST].params["k"]


def test_a_failed_seed_is_in_the_evidence_as_none(tmp_path):
    every = [(TrialKey("search", number), 7) for number in (1, 2, 3)]
    fresh = tuned_config(config(), drive(tmp_path / "l", config(), breaking(*every)), {}).evidence.fresh
    assert (fresh.values, fresh.error, fresh.val_top1) == ([76.0, None], None, 76.0)
    assert "fresh: \n" not in as_yaml(tuned_config(config(), drive(tmp_path / "l", config()), {}))


def mlflow_runs(path):
    """The table that MLflow would give of a sweep."""
    projection, batch = Projection(), Batch()
    for event in read_events(path)[0]:
        projection.take(event, batch)
    rows = []
    for run, opening in batch.opened.items():
        row = {f"params.{name}": text for name, text in opening.params.items()}
        row |= {f"tags.{name}": text for name, text in (opening.tags | batch.tags[run]).items()}
        row |= {f"metrics.{p.name}": p.value for p in sorted(batch.points[run], key=lambda p: (p.step, p.at))}
        rows.append(row | {"run": run, "name": opening.name, "status": batch.status.get(run, ["RUNNING"])[0]})
    return pd.DataFrame(rows), projection


def test_mlflow_has_a_run_for_each_training_of_a_finalist_and_the_answer_in_the_parent(whole):
    runs, projection = mlflow_runs(whole)
    parent = runs[runs["run"] == ""].iloc[0]
    shown = {name: parent[f"metrics.{name}"] for name in projection.summary()}
    assert shown == projection.summary()
    assert (shown["best_trial"], shown["best_val_top1"]) == (3, 78.0)
    assert (shown["finalist_trial"], shown["finalist_val_top1"], shown["finalist_error"]) == (
        3,
        76.5,
        pytest.approx(0.5),
    )
    assert (shown["finalist_ce_val_top1"], shown["finalist_kd_val_top1"]) == (74.0, 74.5)
    assert (shown["baseline_ce_val_top1"], parent["tags.finalists"]) == (74.0, "done")
    repeats = runs[runs["tags.repeat_number"].notna()]
    assert list(repeats["name"])[:4] == [
        "trial 0002, seed 6",
        "trial 0003, seed 6",
        "trial 0001, seed 6",
        "ce-0000, seed 6",
    ]
    assert list(repeats["tags.arm"])[2:5] == ["search", "ce", "kd"]
    assert list(repeats["tags.repeats"])[2:5] == ["0001", "ce-0000", "kd-0000"]
    assert set(repeats["tags.seed"]) == {"6", "7"}
    assert set(repeats["status"]) == {"FINISHED"}
    assert repeats["tags.trial_number"].isna().all()
    assert list(repeats["metrics.val_top1"])[:3] == [71.0, 76.0, 74.0]


def test_until_they_are_done_the_parent_shows_the_searchs_best_and_how_far_they_are(tmp_path, whole):
    path = tmp_path / "l"
    path.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:-4]))
    runs, projection = mlflow_runs(path)
    assert projection.summary()["best_trial"] == 2
    assert "finalist_trial" not in projection.summary()
    assert runs["tags.finalists"].iloc[0] == "9 of 10 trainings"


def test_the_report_keeps_the_finalists_apart_from_the_searchs_scatter(tmp_path, whole):
    runs, _ = mlflow_runs(whole)
    trials = report.trials_table(runs)
    assert list(trials["number"]) == list(range(TRIALS))
    assert list(trials["val_top1"]) == OWN["search"][:TRIALS]
    (done,) = [c for c in report.k_figure(trials).axes[0].collections if c.get_gid() == "completed"]
    assert len(done.get_offsets()) == TRIALS
    found = report.finalists_table(runs)
    assert list(found.columns) == ["trial", "arm", "is_answer", 6, 7, "mean", "error", "own", "luck"]
    assert list(found["trial"]) == ["0003", "0001", "kd-0000", "ce-0000", "0002"]
    assert list(found["is_answer"]) == [True, False, False, False, False]
    assert found.iloc[0][[6, 7, "mean", "error", "own", "luck"]].to_list() == pytest.approx(
        [76, 77, 76.5, 0.5, 78, 1.5]
    )
    assert found.iloc[2][["mean", "own"]].to_list() == [74.5, 76.0]
    k = state_of(whole).trials[BEST].params["k"]
    figure = f"K = {k}, 76.5 ± 0.5 % over 2 fresh seeds, 78.0 % in the search"
    gain = "(+2.0 ± 0.5 over KD, not told apart; +2.5 ± 0.5 over CE, not told apart)"
    assert report.headline(trials, {"kd": 76.0}, found) == f"{figure} {gain}"


def test_a_report_of_finalists_that_are_not_done_or_not_there_is_of_the_search(tmp_path, whole):
    for lines in (-4, 30):
        path = tmp_path / f"{lines}"
        path.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:lines]))
        runs, _ = mlflow_runs(path)
        found = report.finalists_table(runs)
        assert not found["is_answer"].any()
        assert report.headline(report.trials_table(runs), {}, found).endswith("80.0 %")
    assert report.finalists_table(runs).empty
    failed = drive(tmp_path / "failed", config(), breaking((BEST, 6)))
    assert standings(failed)[-1].record.key == BEST
    found = report.finalists_table(mlflow_runs(tmp_path / "failed")[0]).set_index("trial")
    assert np.isnan(found.loc["0003", 6])
    assert np.isnan(found.loc["0003", "error"])
    assert found.loc["0003", "mean"] == 77.0


def test_tables_show_the_answer_first_with_its_means(whole):
    state = state_of(whole)
    table = result_table(config(), state)
    cells = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns] == ["trial", "3", "1", "2", "0", "ce", "kd"]
    assert [column[1] for column in cells] == ["fresh seeds %", "76.50 ± 0.50", "74.50 ± 0.50", "71.50 ± 0.50", "", *(
        "74.00 ± 1.00", "74.50 ± 0.00"
    )]  # fmt: skip
    row = [next(iter(column.cells)) for column in summary_table([(config(), state)]).columns]
    assert row[-2:] == ["76.50 ± 0.50", "+2.50/+2.00"]


def test_a_repeat_is_called_by_its_trial_and_seed(whole):
    trials = state_of(whole).trials
    assert title(trials[TrialKey("repeat", 0)]) == "trial 0002 on seed 6"
    assert title(trials[TrialKey("repeat", 3)]) == "baseline ce-0000 on seed 6"
    assert [title(trials[key]) for key in (BEST, TrialKey("kd", 0))] == ["trial 0003", "baseline kd-0000"]


# --- from end to end ------------------------------------------------------------------------------------------------------

SPACE = {
    "data": {"name": "digits"},
    "teacher": None,
    "method": "ce",
    "student": "digits_linear",
    "recipe": {"epochs": EPOCHS, "lr": 0.1},
    "space": {"lr": {"low": 0.01, "high": 1.0, "log": True}},
    "sweep": {"trials": TRIALS, "asha": None, "seed": SEED, "finalists": {"count": 3, "seeds": 2}},
    "baselines": {"methods": ["ce"], "trials": 1},
}


def test_a_sweep_from_end_to_end(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    create = {"name": "s", "mlflow_uri": "", "address": "local"}
    first = Sweep.create(SPACE, **create).run(executor=SimulatedExecutor(interrupted_at((LUCKIEST, 7)), at_once=2))
    place = Workspace.at(mlflow_uri="", address="local")
    assert (first.reason, first.best.key, first.winner.finalist) == ("interrupted", LUCKIEST, None)
    assert line_of(standing("s", place)).endswith(
        "; best 80.00 % (trial 2); finalists: 4 of 8 trainings; baselines: 1 completed; gain over ce +6.00"
    )
    assert load_tuned_config(first.folder / "tuned.yaml").evidence.trial == 2
    last = Sweep.open("s", mlflow_uri="", address="local").resume(executor=SimulatedExecutor(planted, at_once=2))
    assert (last.reason, last.best.key, last.winner.value) == ("finished", BEST, 76.5)
    assert "1.50 of it luck" in last.finalists()
    assert [gain.sentence[:12] for gain in last.gains()] == ["+2.50 ± 0.50"]
    tuned = load_tuned_config(last.folder / "tuned.yaml")
    assert tuned == last.answer == Sweep.open("s").answer()
    assert tuned.recipe.lr == last.best.params["lr"]
    shown = standing("s", place)
    assert shown["finalists"] == {"done": 8, "of": 8}
    assert shown["best"]["fresh"] == {"val_top1": 76.5, "error": pytest.approx(0.5), "values": {"6": 76.0, "7": 77.0}}
    assert json.loads(json.dumps(shown)) == shown
    assert line_of(shown).endswith(
        "; best 76.50 ± 0.50 % over 2 fresh seeds (trial 3, 78.00 % in the search); gain over ce not told apart"
    )
    assert [line for line in audit("s", place, with_mlflow=False) if "checkpoint" not in line] == []
    assert "".join(capfd.readouterr()) == ""


def interrupted_at(training):
    def formula(trial, epoch):
        if (trial.record.origin, trial.config.seed) == training:
            raise KeyboardInterrupt
        return planted(trial, epoch)

    return formula


def test_the_console_tells_each_training_and_what_the_finalists_gave(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reading, writing = os.pipe()
    console, place = Console(Terminal(writing)), Workspace.at(mlflow_uri="", address="local")
    sweep = Sweep.create(SPACE, name="s", mlflow_uri="", address="local")
    sweep.run([ConsoleCallback(console, place)], executor=SimulatedExecutor(planted))
    console.terminal.close()
    told = os.read(reading, 1 << 16).decode()
    os.close(reading)
    assert "[9/15 trainings] trial 0003 on seed 6 completed at epoch 2: val_top1 76.00 %" in told
    assert "[15/15 trainings] baseline ce-0000 on seed 7 completed" in told
    assert told.count("; best 80.00 % (trial 2)\n") > told.count("; best 76.50 ± 0.50 % (trial 3)\n") == 1
    answer = "76.50 ± 0.50 % over 2 fresh seeds; the search's own value 78.00 %, 1.50 of it luck"
    assert f"\n  trial 3: {answer}\n  +2.50 ± 0.50 points over cross-entropy" in told


def test_an_export_before_they_are_done_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    about = {"name": "s", "mlflow_uri": "", "address": "local"}
    for formula, is_said in ((interrupted_at((LUCKIEST, 7)), True), (planted, False)):
        sweep = Sweep.create(SPACE, **about) if is_said else Sweep.open(**about)
        (sweep.run if is_said else sweep.resume)(executor=SimulatedExecutor(formula))
        monkeypatch.setattr(sys, "argv", ["launch.py", "export", "s", "--runs-dir", str(sweep.workspace.runs)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        told = capfd.readouterr()
        assert ended.value.code == 0
        assert (
            "note: the finalists are not done (4 of 8 trainings): this is the best of one seed" in told.err
        ) is is_said
        assert ("\n  fresh:\n" in told.out) is not is_said


def test_check_counts_their_trainings():
    lines = list(cost.describe(new_config(SPACE, "test", ())))
    assert "6 trials and 1 baseline runs of up to 2 epochs" in lines
    assert (
        "then 8 runs of the finalists: the best 3 trials and the best of each baseline, on 2 fresh seeds each" in lines
    )
    assert f"at most {(6 + 1 + 8) * 2} epochs" in lines
    few = new_config({**SPACE, "baselines": None, "sweep": {**SPACE["sweep"], "trials": 2}}, "test", ())
    assert "then 4 runs of the finalists: the best 2 trials, on 2 fresh seeds each" in list(cost.describe(few))


# --- which trial stands for a baseline --------------------------------------------------------------------------------


def several(baselines=2, **about):
    """A sweep whose baselines have four learning rates."""
    space = {"lr": {"low": 0.1, "high": 1.0, "log": True}}
    sections = {"baselines": {"methods": ["kd"], "trials": 4}, "recipe": {"epochs": EPOCHS}}
    plan = {"count": 2, "seeds": 3, "baselines": baselines}
    settings = {"trials": 3, "startup_trials": 50, "finalists": plan, "asha": None, "seed": SEED, "max_failures": 1}
    return formulas.sweep_config(sweep=settings, **sections, space=space, **about)


def lucky(trial, epoch):
    """KD's luckiest learning rate is its third; on other seeds its second is the best; a fourth is behind on all."""
    if trial.record.origin.arm == "kd":
        own, fresh = [(60.0, 60.0), (75.0, 74.0), (80.0, 70.0), (65.0, 90.0)][trial.record.origin.number]
        value = fresh + trial.config.seed % 2 / 10 if trial.config.seed > SEED else own
        return {"val_top1": value - 1 + epoch / EPOCHS}
    return {"val_top1": 77.0 - trial.record.origin.number}


def test_the_best_trials_of_a_baseline_are_compared_on_fresh_seeds_as_those_of_the_search_are(tmp_path):
    state = drive(tmp_path / "l", several(), lucky)
    repeated = Counter(f.record.key.arm for f in finalists(state))
    assert repeated == {SEARCH: 2, "kd": 2}
    assert state.best("kd").key == TrialKey("kd", 2), "the luckiest"
    assert [record.key for record in baseline_trials(state)] == [TrialKey("kd", 1)]
    assert fresh_gains(state)["kd"].mean == pytest.approx(77 - 74 - 0.1 / 3)
    (gain,) = gains(several(), state, 1000)
    assert f"lr {short(state.trials[TrialKey('kd', 1)].params['lr'])}" in gain.sentence
    tuned = tuned_config(several(), state, loss_defaults=formulas.DEFAULTS)
    assert tuned.evidence.baselines["kd"].val_top1 == 75.0
    assert len(tuned.evidence.baselines["kd"].fresh.values) == 3
    table = result_table(several(), state)
    assert table.columns[-1].header == "kd"
    assert next(iter(table.columns[-1].cells)) == "75.00"
    runs, _ = mlflow_runs(tmp_path / "l")
    told = report.headline(report.trials_table(runs), {}, report.finalists_table(runs))
    assert "(+3.0 ± 0.0 over KD)" in told
    assert list(baseline_finalists(report.finalists_table(runs))["trial"]) == ["kd-0001"], "whose mean the figures draw"
    assert [
        line for line in audit_decisions(several(), read_events(tmp_path / "l")[0])[0] if "checkpoint" not in line
    ] == []


def test_the_page_shows_each_of_a_baselines_trials_that_were_trained_again(tmp_path):
    def page(baselines):
        config = several(baselines=baselines)
        state = drive(tmp_path / str(baselines), config, lucky)
        return findings_from(config, state, tmp_path, "finished", lambda *words: " ".join(words))

    names = {row["name"] for row in finalists_figure(page(2)).rows["means"]}
    assert {name for name in names if name.startswith("KD")} == {"KD, T = 4, kd-0001", "KD, T = 4, kd-0002"}
    assert base_values(page(2)) == {"KD, T = 4": pytest.approx(74 + 0.1 / 3)}
    assert "KD, T = 4" in {row["name"] for row in finalists_figure(page(1)).rows["means"]}


def test_before_all_of_them_are_done_the_best_by_its_own_value_stands_for_a_baseline(tmp_path):
    state = drive(tmp_path / "l", several(), lucky)
    lines = (tmp_path / "l").read_bytes().splitlines(keepends=True)
    last = max(n for n, line in enumerate(lines) if json.loads(line)["event"] == "end")
    (tmp_path / "cut").write_bytes(b"".join(lines[:last]))
    assert [record.key for record in baseline_trials(state_of(tmp_path / "cut"))] == [TrialKey("kd", 2)]
    one = drive(tmp_path / "one", several(baselines=1), lucky)
    assert [record.key for record in baseline_trials(one)] == [TrialKey("kd", 2)]
    assert state.counts(REPEAT)["completed"] == one.counts(REPEAT)["completed"] + 3


def test_a_baseline_that_falls_apart_on_a_seed_is_behind_one_that_does_not(tmp_path):
    def formula(trial, epoch):
        if (trial.record.origin, trial.config.seed) == (("kd", 1), SEED + 2):
            return {"val_top1": math.nan}
        return lucky(trial, epoch)

    state = drive(tmp_path / "l", several(), formula)
    assert [record.key for record in baseline_trials(state)] == [TrialKey("kd", 2)]
    runs, _ = mlflow_runs(tmp_path / "l")
    told = report.headline(report.trials_table(runs), {}, report.finalists_table(runs))
    assert "(+7.0 ± 0.0 over KD)" in told, "of two seeds the other one has the higher mean"


@pytest.mark.parametrize(("baselines", "trials", "runs"), [(1, 4, 9), (3, 4, 15), (9, 4, 18)])
def test_as_many_trainings_are_told_ahead_as_there_are(tmp_path, baselines, trials, runs):
    config = several(baselines=baselines)
    told = [line for line in cost.describe(config, with_time=False) if line.startswith("then ")]
    assert told[0].startswith(f"then {runs} runs of the finalists: the best 2 trials and the best ")
    assert (f" {baselines} of each baseline," in told[0]) == (baselines > 1)
    state = drive(tmp_path / "l", config, lucky)
    assert state.size(REPEAT) == runs
    assert training_total(config, state) == len(state.trials)


def test_a_confirmation_compares_as_many_of_each_baseline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def formula(trial, epoch):
        return {"test_top1": lucky(trial, epoch)["val_top1"], **lucky(trial, epoch)}

    space = several().model_dump(mode="json")
    space |= {"space": {"lr": {"low": 0.1, "high": 1.0, "log": True}}, "relative": None}
    sweep = Sweep.create(space, name="s", mlflow_uri="", address="local")
    sweep.run(executor=SimulatedExecutor(formula))
    result = Sweep.open("s", mlflow_uri="", address="local").confirm(
        finalists=2, seeds=4, executor=SimulatedExecutor(formula)
    )
    assert result.state.confirm.baselines == 2
    assert result.state.size(REPEAT) == (2 + 2) * 4
    assert result.verdict.baselines[0].record.key == TrialKey("kd", 1), "it is measured on the test set"
    assert result.verdict.is_done


# --- when all that they are chosen from has ended ---------------------------------------------------------------------


def test_all_is_searched_once_every_trial_and_every_baseline_has_ended_whatever_is_repeated():
    config = formulas.sweep_config(sweep={"trials": 1}, baselines={"methods": ["ce", "kd"], "trials": 1, "match": True})
    state = SweepState()
    found = []

    def take(*contents):
        for content in contents:
            state.apply(Event(state.last_seq + 1, 0.0, content))
        found.append((baseline_to_come(config, state), is_searched(config, state)))

    def end(arm):
        epoch, status = formulas.EPOCHS, TrialStatus.COMPLETED
        return End(key=TrialKey(arm, 0), epoch=epoch, status=status, reason="budget", value=50.0)

    take(Header(sweep="s", id="i", seed=0, trials=1), Driver(host="h", pid=1, trials=1))
    take(Suggest(key=TrialKey("search", 0), proposal={}, params={"k": 1}))
    told = {"metrics": {"val_top1": 50.0}, "decision": Decision.CONTINUE}
    reports = [Report(key=TrialKey("search", 0), epoch=epoch, **told) for epoch in range(1, formulas.EPOCHS + 1)]
    take(*reports, end("search"))
    take(Suggest(key=TrialKey("ce", 0), proposal={}, params={"lr": 0.1}), end("ce"))
    take(Suggest(key=TrialKey("kd", 0), proposal={}, params={"lr": 0.1}))
    take(end("kd"))
    take(Repeat(key=TrialKey("repeat", 0), of_trial=TrialKey("search", 0), seed=1))
    assert found == [
        (("ce", 1), False),
        (("ce", 1), False),
        (("ce", 1), False),
        (("kd", 1), False),
        (None, False),
        (None, True),
        (None, True),
    ]


def test_what_a_sentence_is_made_of():
    assert capital("tuned kd") == "Tuned kd"
    assert [listed(names) for names in (["ce"], ["ce", "kd"], ["ce", "kd", "dkd"])] == [
        "ce",
        "ce and kd",
        "ce, kd and dkd",
    ]
