"""Confirming an answer: chosen on fresh seeds, measured on the test set once, and what may be said of it."""

import dataclasses
import importlib
import json
import math
import os
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from tune_topkd import verdict as verdicts
from tune_topkd.cli.app import main
from tune_topkd.cli.display import ConsoleCallback
from tune_topkd.cli.display import result_table
from tune_topkd.cli.standing import line_of
from tune_topkd.cli.standing import standing
from tune_topkd.config import ConfigError
from tune_topkd.config import DataConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import new_config
from tune_topkd.data import load_dataset
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.export import SCHEMA_FILE
from tune_topkd.export import as_yaml
from tune_topkd.export import json_schema
from tune_topkd.export import load_tuned_config
from tune_topkd.export.writers import figures
from tune_topkd.ledger import TEST
from tune_topkd.ledger import Confirm
from tune_topkd.ledger import Driver
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Look
from tune_topkd.ledger import Repeat
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import candidates
from tune_topkd.ledger import confirmation
from tune_topkd.ledger import finalists
from tune_topkd.ledger import former_finalists
from tune_topkd.ledger import read_events
from tune_topkd.ledger import winner_of
from tune_topkd.ledger.events import encode
from tune_topkd.report.page.evidence_figures import finalists_figure
from tune_topkd.report.page.tables import finalists_table
from tune_topkd.search import Search
from tune_topkd.search import audit_decisions
from tune_topkd.storage import file_hash
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import audit
from tune_topkd.sweep import images
from tune_topkd.sweep.confirm import Plan
from tune_topkd.sweep.confirm import cost
from tune_topkd.sweep.confirm import request
from tune_topkd.sweep.page import findings_from
from tune_topkd.sweep.remaining import training_total
from tune_topkd.sweep.student import student_trial
from tune_topkd.terminal import Console
from tune_topkd.terminal import Terminal
from tune_topkd.tracking.projection import Batch
from tune_topkd.tracking.projection import Projection
from tune_topkd.train import train
from tune_topkd.verdict import Interval
from tune_topkd.verdict import mean_interval
from tune_topkd.verdict import prediction_interval
from tune_topkd.verdict import verdict_of

EPOCHS, SEED, TRIALS = 2, 5, 6
SPACE = {
    "data": {"name": "digits"},
    "teacher": {"name": "digits_cnn", "checkpoint": "t.pt"},
    "student": "digits_linear",
    "recipe": {"epochs": EPOCHS, "lr": 0.1},
    "space": {"lr": {"low": 0.01, "high": 1.0, "log": True}},
    "sweep": {"trials": TRIALS, "asha": None, "seed": SEED, "startup_trials": 50},
    "baselines": {"methods": ["ce", "kd", "defaults"], "trials": 1},
}
OWN = {"search": [70.0, 75.0, 80.0, 78.0, 60.0, 65.0], "ce": [70.0], "kd": [74.0], "defaults": [75.0]}
"""What each trial gives on the search's seed: trial 2 is the luckiest."""
TRUE = {"search": [70.0, 74.0, 73.0, 77.0, 60.0, 65.0], "ce": [70.0], "kd": [76.8], "defaults": [75.0]}
"""What it gives on others, but for the noise of the seed."""
CHOSEN = TrialKey("search", 3)


def noise(seed, key, size=0.3):
    """Of a training's value: a function of its seed and trial."""
    return size * float(np.random.default_rng([seed, *key.arm.encode(), key.number]).standard_normal())


def planted(trial, epoch):
    """The values above; those of the test set, after the last epoch, are 5 points higher."""
    origin, seed = trial.record.origin, trial.config.seed
    value = OWN[origin.arm][origin.number] if seed == SEED else TRUE[origin.arm][origin.number] + noise(seed, origin)
    if trial.config.data.selection == "test_at_end":
        return {"test_top1": value + 5.0} if epoch == EPOCHS else {"train_loss": 1.0}
    return {"val_top1": value - 1.0 + epoch / EPOCHS}


def config(**sections):
    raw = json.loads(json.dumps(SPACE)) | {"teacher": {"name": "digits_cnn", "recipe": {"epochs": 1}}}
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return new_config(raw, "test", ())


def drive(path, config, formula=planted, plan=None, at_once=1, reports=None, **options):
    """Run a sweep, or what is left of it, with what is to be confirmed; its state."""
    if path.exists():
        ledger = Ledger.open(path, is_durable=False)
    else:
        about = {"trials": config.sweep.trials, "num_classes": 10, "epochs": EPOCHS, "method": "topkd"}
        ledger = Ledger.create(path, Header(sweep="t", id="i", seed=SEED, **about), is_durable=False)
    with ledger:
        line = None if plan is None else request(config, ledger.state, plan)
        ledger.append(Driver.here(trials=config.sweep.trials), *([line] if line else []))
        from tune_topkd.execution.simulated import simulate

        simulate(Search(config, ledger, **options), formula, at_once=at_once, reports=reports)
        return ledger.state


def state_of(path):
    state = SweepState()
    for event in read_events(path)[0]:
        state.apply(event)
    return state


def told(path):
    """A ledger's events without times, and without who drove it when."""
    return [(e.name, e.data) for e in read_events(path)[0] if e.name not in ("driver", "stop", "start")]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The ledger of a sweep that is over; not to be changed."""
    path = tmp_path_factory.mktemp("searched") / "ledger.jsonl"
    assert drive(path, config()).stop_reason == "finished"
    return path


@pytest.fixture(scope="module")
def confirmed(tmp_path_factory, searched):
    """The same, confirmed."""
    path = tmp_path_factory.mktemp("confirmed") / "ledger.jsonl"
    path.write_bytes(searched.read_bytes())
    assert drive(path, config(), plan=Plan(3, 4)).stop_reason == "finished"
    return path


# --- what is trained, and when the test set is read --------------------------------------------------------------------


def test_the_finalists_and_the_baselines_are_trained_on_fresh_seeds_then_the_best_and_they_on_further_ones(confirmed):
    state = state_of(confirmed)
    first = [(str(r.of_trial), r.seed) for r in state.arm("repeat")]
    bases = ["ce-0000", "defaults-0000", "kd-0000"]
    assert first == [(name, seed) for seed in range(6, 10) for name in ("0002", "0003", "0001", *bases)]
    second = [(str(r.of_trial), r.seed) for r in state.arm(TEST)]
    assert second == [(name, seed) for seed in range(10_005, 10_009) for name in ("0003", *bases)]
    assert winner_of(state).record.key == CHOSEN, "not the luckiest, but the best mean"
    assert {r.epoch for r in (*state.arm("repeat"), *state.arm(TEST))} == {EPOCHS}


def test_the_line_that_the_test_set_is_read_stands_before_any_training_that_does(confirmed):
    names = [(e.name, e.key.arm if e.name in ("repeat", "report", "start") else "") for e in read_events(confirmed)[0]]
    look = names.index(("test", ""))
    assert ("repeat", TEST) in names[look:]
    assert not [name for name in names[:look] if TEST in name[1:]]
    assert names.count(("test", "")) == 1
    reports = [e for e in read_events(confirmed)[0] if e.name == "report" and e.key.arm == TEST]
    assert [e.content.epoch for e in reports if "test_top1" in e.content.metrics] == [EPOCHS] * 16
    seen = [name for e in reports if e.content.epoch < EPOCHS for name in e.content.metrics if "top1" in name]
    assert not seen, "before the last epoch nothing is known of how good it is"


def test_a_training_for_the_test_set_learns_from_all_other_images(confirmed):
    with Ledger.open(confirmed, is_durable=False) as ledger:
        search = Search(config(), ledger)
        arms = [search.trial_config(search.state.arm(arm)[0]) for arm in ("search", "repeat", TEST)]
    assert [trial.data.selection for trial in arms] == ["validation", "validation", "test_at_end"]


def test_the_untuned_defaults_are_the_method_with_what_is_fixed(tmp_path, confirmed):
    fixed = config(loss={"k": 3})
    with Ledger.open(confirmed, is_durable=False) as ledger:
        search = Search(fixed, ledger)
        trial = search.trial_config(search.state.arm("defaults")[0])
    assert (trial.method, trial.loss) == ("topkd", {"k": 3})


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_kill_after_any_report_of_either_stage_leaves_the_same_trainings(tmp_path, searched, confirmed, at_once):
    whole = tmp_path / "whole.jsonl"
    whole.write_bytes(searched.read_bytes())
    state = drive(whole, config(), plan=Plan(3, 4), at_once=at_once)
    trainings = [(r.key, r.of_trial, r.seed, r.value) for r in state.trials.values() if r.of_trial]
    reports = sum(e.name == "report" for e in read_events(whole)[0]) - sum(
        e.name == "report" for e in read_events(searched)[0]
    )
    assert reports == EPOCHS * (24 + 16)
    for cut in range(0, reports + 1, 5 if at_once == 1 else 11):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(searched.read_bytes())
        drive(path, config(), plan=Plan(3, 4), at_once=at_once, reports=cut)
        state = drive(path, config(), at_once=at_once)
        assert state.stop_reason == "finished"
        assert [(r.key, r.of_trial, r.seed, r.value) for r in state.trials.values() if r.of_trial] == trainings
        assert sum(e.name == "test" for e in read_events(path)[0]) == 1
        assert audit_decisions(config(), read_events(path)[0])[0] == []


def test_a_history_cut_at_any_line_goes_on_to_the_same_answer(tmp_path, searched, confirmed):
    lines = confirmed.read_bytes().splitlines(keepends=True)
    begun = len(searched.read_bytes().splitlines())
    values = {r.key: r.value for r in state_of(confirmed).trials.values()}
    for cut in range(begun + 2, len(lines), 7):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(b"".join(lines[:cut]))
        state = drive(path, config())
        assert {r.key: r.value for r in state.trials.values()} == values
        assert len(state.looks) == 1
        assert audit_decisions(config(), read_events(path)[0])[0] == []


def test_the_work_to_do_counts_both_stages(searched, confirmed):
    state = state_of(searched)
    assert training_total(config(), state) == TRIALS + 3
    line = request(config(), state, Plan(3, 4))
    found = cost(config(), state, line)
    assert (found.to_choose, found.to_measure) == (24, 16)
    state.apply(Event(state.last_seq + 1, 0.0, line))
    assert training_total(config(), state) == TRIALS + 3 + 24 + 16
    assert training_total(config(), state_of(confirmed)) == TRIALS + 3 + 24 + 16


def test_the_cost_says_the_wall_time_by_the_sweeps_own_trainings(searched):
    events = read_events(searched)[0]
    state = SweepState()
    for event in events:  # each trial takes 10 s, two at once
        begins = event.name == "suggest"
        ends = event.name == "end"
        number = (
            list(dict.fromkeys(e.key for e in events if e.name == "suggest")).index(event.key) if begins or ends else 0
        )
        at = (number // 2) * 10.0 + (0.0 if begins else 10.0)
        state.apply(dataclasses.replace(event, time=at if begins or ends else event.time))
    found = cost(config(), state, request(config(), state, Plan(3, 4)))
    assert found.seconds == pytest.approx((24 + 16 / 0.9) * 10 / 2)
    told = "24 trainings to choose among the finalists; then, after one of the teacher, 16 on all images but the test set's"
    assert told in found.sentence()
    assert found.sentence().endswith("; about 3 min, going by the sweep's own trainings")


def test_a_trial_that_is_no_finalist_any_more_keeps_its_fresh_seeds_in_the_tables(tmp_path, searched):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(searched.read_bytes())
    before = drive(path, config(), plan=Plan(3, 2))
    assert former_finalists(before) == []
    (luckiest,) = [finalist for finalist in finalists(before) if finalist.record.key == TrialKey("search", 2)]
    state = drive(path, config(), plan=Plan(2, 4, again=True))
    of_search = [finalist.record.key.number for finalist in finalists(state) if finalist.record.key.arm == "search"]
    assert of_search == [3, 1]
    (former,) = former_finalists(state)
    assert (former.record.key, former.values) == (luckiest.record.key, luckiest.values)
    columns = result_table(config(), state).columns
    assert [column.header for column in columns][:4] == ["trial", "3", "1", "2"]
    answer, second, third = ([*column.cells][1] for column in columns[1:4])
    assert third == f"{luckiest.figure.removesuffix(' %')} (2 seeds)"
    assert "±" in answer
    assert "±" in second
    found = findings_from(config(), state, tmp_path, "finished", lambda *words: " ".join(words))
    table = finalists_table(found)
    assert [line.cells[0] for line in table.rows if line.cells[1] == "search"] == ["0003", "0001", "0002"]
    assert table.notes[-1] == "Of an earlier choice, and not among the finalists now: 0002."
    assert "Trials of an earlier choice" in finalists_figure(found).caption


# --- who the finalists are ---------------------------------------------------------------------------------------------


def test_a_value_of_one_seed_counts_less_by_the_luck_of_those_that_have_fresh_seeds(tmp_path):
    path = tmp_path / "ledger.jsonl"
    plan = {"finalists": {"count": 2, "seeds": 2}}
    calm = lambda trial, epoch: planted(trial, epoch)  # noqa: E731
    about = config(sweep=plan)
    header = Header(sweep="t", id="i", seed=SEED, trials=TRIALS, num_classes=10, epochs=EPOCHS)
    from tune_topkd.execution.simulated import simulate
    from tune_topkd.ledger import Finalists

    with Ledger.create(path, header, is_durable=False) as ledger:
        ledger.append(Driver.here(trials=TRIALS, finalists=Finalists(2, 2)))
        simulate(Search(about, ledger), calm, at_once=1)
        state = ledger.state
    # 2 was found with 80 and has 73, 3 with 78 and has 77: 1, found with 75, is to be expected at 75 less their mean luck, 4
    assert [r.key.number for r in candidates(state)] == [3, 2, 1, 0, 5, 4]
    assert [key.number for key in confirmation(state, 3, 4, 4).finalists] == [3, 2, 1]


def test_trials_of_the_same_parameters_are_one_finalist(tmp_path):
    twins = config(space={"lr": {"low": 0.1, "high": 0.1}})
    state = drive(tmp_path / "ledger.jsonl", twins)
    assert [key.number for key in confirmation(state, 3, 4, 4).finalists] == [2]
    with pytest.raises(ConfigError, match=r"--finalists = 3: must be at most 1, the trials of the full budget"):
        request(twins, state, Plan(3, 4))


def test_a_finalist_that_falls_apart_is_not_the_answer_however_lucky_it_was_else(tmp_path, searched):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(searched.read_bytes())

    def breaking(trial, epoch):
        found = planted(trial, epoch)
        is_broken = trial.record.origin == CHOSEN and trial.config.seed == SEED + 2
        return {"val_top1": 12.0} if is_broken else found

    state = drive(path, config(), breaking, plan=Plan(3, 4))
    assert winner_of(state).record.key.number == 1
    assert state.looks[0].trials[0].number == 1


def test_where_no_finalist_has_a_value_nothing_is_measured(tmp_path, searched):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(searched.read_bytes())

    def failing(trial, epoch):
        raise ValueError("no")

    state = drive(path, config(), failing, plan=Plan(3, 2))
    assert (state.stop_reason, state.looks, verdict_of(state)) == ("finished", (), None)


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (
            Plan(3, 1),
            "confirm: --seeds = 1: must be at least 2: one training says nothing of how much the seed matters",
        ),
        (Plan(3, 0), "confirm: --seeds = 0: must be at least 2"),
        (Plan(3, 1001), "confirm: --seeds = 1001: must be at most 1000"),
        (Plan(0, 5), "confirm: --finalists = 0: must be at least 1"),
        (
            Plan(7, 5),
            "confirm: --finalists = 7: must be at most 6, the trials of the full budget with parameters of their own",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(searched, plan, told):
    with pytest.raises(ConfigError) as caught:
        request(config(), state_of(searched), plan)
    assert str(caught.value).startswith(told)


def test_a_sweep_that_is_not_over_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    state = drive(path, config(), reports=5)
    told = r"confirm: SWEEP = 't': its search is not over \(2 of 6 trials reached the full budget\): `resume t` first"
    with pytest.raises(ConfigError, match=told):
        request(config(), state, Plan())


def test_a_sweep_without_a_full_trial_is_refused(tmp_path):
    def failing(trial, epoch):
        return {"val_top1": math.nan} if epoch == EPOCHS else planted(trial, epoch)

    state = drive(tmp_path / "ledger.jsonl", config(), failing)
    with pytest.raises(ConfigError, match="no trial reached the full budget: there is nothing to confirm"):
        request(config(), state, Plan())


def test_a_second_look_is_refused_and_marked_for_ever_where_it_is_asked_for(tmp_path, confirmed):
    state = state_of(confirmed)
    assert request(config(), state, Plan(3, 4)) is None, "the same again is what there is"
    for other in (Plan(2, 4), Plan(3, 5)):
        with pytest.raises(ConfigError, match="its test set has been read, for 4 configs on 4 seeds"):
            request(config(), state, other)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(confirmed.read_bytes())
    state = drive(path, config(), plan=Plan(3, 5, again=True))
    assert [look.look for look in state.looks] == [1, 2]
    assert not set(state.looks[0].seeds) & set(state.looks[1].seeds)
    found = verdict_of(state)
    assert (found.look, len(found.answer.values)) == (2, 5)
    assert found.sentence.endswith("This is look 2 at the test set: it may have been chosen by an earlier one.")
    assert audit_decisions(config(), read_events(path)[0])[0] == []


def test_before_the_test_set_is_read_the_plan_may_change(tmp_path, searched):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(searched.read_bytes())
    drive(path, config(), plan=Plan(3, 4), reports=3)
    assert drive(path, config(), plan=Plan(3, 4), reports=4).confirm.seeds == 4
    with pytest.raises(ConfigError, match="trainings of it are under way: `resume t` first"):
        drive(path, config(), plan=Plan(2, 2))


def test_a_search_that_went_on_after_it_was_confirmed_needs_another_look(tmp_path, confirmed):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(confirmed.read_bytes())
    longer = config(sweep={"trials": TRIALS + 1})

    def more(trial, epoch):
        return {"val_top1": 90.0} if trial.record.origin == TrialKey("search", TRIALS) else planted(trial, epoch)

    state = drive(path, longer, more)
    assert state.stop_reason == "finished"
    assert winner_of(state).record.key == CHOSEN, "what was confirmed stays the answer"
    with pytest.raises(ConfigError, match="its test set has been read"):
        request(longer, state, Plan(3, 4))
    assert request(longer, state, Plan(3, 4, again=True)).finalists[0].number == TRIALS


# --- what the audit finds ----------------------------------------------------------------------------------------------


def changed(event, **values):
    return dataclasses.replace(event, content=dataclasses.replace(event.content, **values))


def other_finalists(events):
    at = next(i for i, e in enumerate(events) if isinstance(e.content, Confirm))
    keys = tuple(TrialKey("search", n) for n in (2, 3, 0))
    events[at] = changed(events[at], finalists=keys)


def another_winner(events):
    at = next(i for i, e in enumerate(events) if isinstance(e.content, Look))
    trials = (TrialKey("search", 2), *events[at].content.trials[1:])
    events[at] = changed(events[at], trials=trials)


def a_look_called_the_first(events):
    at = next(i for i, e in enumerate(events) if isinstance(e.content, Confirm))
    events[at] = changed(events[at], look=2)


def without_the_look(events):
    at = next(i for i, e in enumerate(events) if isinstance(e.content, Look))
    del events[at]


def another_value(events):
    at = next(i for i, e in enumerate(events) if isinstance(e.content, End) and e.content.key.arm == TEST)
    events[at] = changed(events[at], value=99.0)


def another_seed(events):
    at = next(i for i, e in enumerate(events) if isinstance(e.content, Repeat) and e.content.key.arm == TEST)
    events[at] = changed(events[at], seed=6)


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (other_finalists, "the finalists are 0002, 0003, 0000, where 0002, 0003, 0001 is to be confirmed"),
        (another_winner, "the test set is to be read for 0002, "),
        (a_look_called_the_first, "this is look 2 at the test set, where 1 is right"),
        (without_the_look, "where nothing comes next"),
        (another_value, "ends with 99.0, but its last test_top1 is"),
        (another_seed, "repeats 0003 on seed 6, where 0003 on seed 10005 comes next"),
    ],
)
def test_what_no_confirmation_would_have_written_is_found(confirmed, damage, finding):
    events = list(read_events(confirmed)[0])
    damage(events)
    events = [dataclasses.replace(event, seq=seq) for seq, event in enumerate(events)]
    assert any(finding in line for line in audit_decisions(config(), events)[0])


def test_nothing_is_wrong_with_a_confirmed_sweep(confirmed):
    assert audit_decisions(config(), read_events(confirmed)[0])[0] == []


def test_a_finished_sweep_that_lacks_a_training_of_the_test_is_found(confirmed):
    events = read_events(confirmed)[0]
    last = next(e.key for e in reversed(events) if isinstance(e.content, Repeat))
    left = [e for e in events if getattr(e.content, "key", None) != last]
    left = [dataclasses.replace(event, seq=seq) for seq, event in enumerate(left)]
    found = audit_decisions(config(), left)[0]
    assert any("the sweep is finished without kd-0000 on seed 10008, and 0 more like it" in line for line in found)


def test_a_line_about_a_trial_that_there_is_none_of_is_refused(tmp_path, searched):
    state, key = state_of(searched), TrialKey("search", 77)
    for line in (
        Confirm(finalists=(key,), seeds=2, test_seeds=2, of_trials=6, look=1),
        Look(look=1, trials=(key,), seeds=(1,)),
    ):
        with pytest.raises(LedgerError, match="names trial 0077, which was never suggested"):
            state.apply(Event(state.last_seq + 1, 0.0, line))


# --- what may be said --------------------------------------------------------------------------------------------------


def test_no_interval_is_told_of_what_cannot_be():
    assert Interval(-59.66, 125.64).of_top1 == (0.0, 100.0)
    assert Interval(101.0, 103.0).of_top1 == (100.0, 100.0)
    assert Interval(-239.8, 264.1).of_gain == (-100.0, 100.0)
    assert Interval(-1.0, 2.0).of_gain == (-1.0, 2.0)
    assert Interval(96.8, 97.9).of_top1 == (96.8, 97.9)


def test_intervals_are_students():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert mean_interval(values) == pytest.approx((3 - half, 3 + half))
    wider = float(stats.t.ppf(1 - 0.025 / 3, 4)) * math.sqrt(2.5 / 5)
    assert mean_interval(values, together=3) == pytest.approx((3 - wider, 3 + wider))
    further = 2.7764451 * math.sqrt(2.5 * (1 / 5 + 1 / 2))
    assert prediction_interval(values, 2) == pytest.approx((3 - further, 3 + further))
    assert (
        mean_interval([1.0]) is mean_interval([]) is prediction_interval([1.0], 3) is prediction_interval([], 3) is None
    )
    assert 3.0 in Interval(2.0, 4.0)
    assert "3" not in Interval(2.0, 4.0)
    assert [Interval(*ends).excludes_zero for ends in ((0.1, 1), (-1, -0.1), (-1, 1), (0.0, 1.0))] == [
        True,
        True,
        False,
        False,
    ]


def test_the_verdict_is_of_the_test_set_alone(confirmed):
    found = verdict_of(state_of(confirmed))
    values = [TRUE["search"][3] + 5 + noise(seed, CHOSEN) for seed in range(10_005, 10_009)]
    assert found.answer.values == pytest.approx(values)
    assert found.answer.spread == pytest.approx(statistics.stdev(values))
    assert [base.name for base in found.baselines] == ["cross-entropy", "the untuned method", "KD, T = 4"]
    gains = {gain.base.record.key.arm: gain for gain in found.gains}
    assert gains["ce"].interval == mean_interval(gains["ce"].values, together=3)
    assert [gains[arm].is_told_apart for arm in ("ce", "defaults", "kd")] == [True, True, False]
    assert found.sentence.startswith(f"Tuned topkd has {statistics.fmean(values):.2f} % (")
    assert "points over cross-entropy (+" in found.sentence
    assert f"{gains['kd'].mean:+.2f} points against KD, T = 4 ({gains['kd'].interval.low:+.2f} to" in found.sentence
    assert ": not told apart)." in found.sentence
    better = (
        "Tuned topkd is better than cross-entropy and the untuned method; these seeds do not tell whether it is better"
    )
    assert f"{better} than KD, T = 4." in found.sentence
    assert found.sentence.endswith(
        "The search trained 6 configs, in all for as many epochs as 6 full trainings have; cross-entropy is the best of 1; "
        "the untuned method is the best of 1; KD, T = 4 is the best of 1."
    )


@pytest.mark.parametrize(
    ("truth", "told"),
    [
        ({"ce": [70.0], "kd": [70.0], "defaults": [71.0]}, "Tuned topkd is the best of these."),
        ({"ce": [70.0], "kd": [85.0], "defaults": [90.0]}, "The untuned method is the better choice here."),
        (
            {"ce": [77.0], "kd": [77.0], "defaults": [77.0]},
            "These seeds do not tell whether tuned topkd is better than",
        ),
    ],
)
def test_the_advice_is_what_the_intervals_allow(tmp_path, searched, monkeypatch, truth, told):
    monkeypatch.setitem(TRUE, "kd", truth["kd"])
    monkeypatch.setitem(TRUE, "ce", truth["ce"])
    monkeypatch.setitem(TRUE, "defaults", truth["defaults"])
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(searched.read_bytes())
    assert told in verdict_of(drive(path, config(), plan=Plan(3, 8))).sentence


def test_the_student_of_a_confirmed_answer_is_its_first_training_for_the_test_set_not_the_luckiest(searched, confirmed):
    assert student_trial(state_of(searched)).key == TrialKey("search", 2)
    state = state_of(confirmed)
    state.arm(TEST)[0].value -= 5.0
    first = student_trial(state)
    assert (first.key, first.of_trial, first.seed) == (TrialKey(TEST, 0), CHOSEN, 10_005)
    assert first.value < max(verdict_of(state).answer.values)


def test_a_verdict_that_is_not_done_says_so(tmp_path, searched):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(searched.read_bytes())
    state = drive(path, config(), plan=Plan(3, 4), reports=EPOCHS * 24 + EPOCHS * 3)
    found = verdict_of(state)
    assert (found.is_done, found.trainings) == (False, (3, 16))
    assert found.sentence == "the answer is not measured yet: 3 of 16 trainings of the test are done; `resume` goes on"


# --- does it claim what is not so? ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def claims():
    """The benchmark that simulates confirmed sweeps of known truth."""
    root = str(Path(__file__).parents[1])
    sys.path.insert(0, root)
    module = importlib.import_module("benchmarks.claims")
    sys.path.remove(root)
    return module


@pytest.mark.slow
def test_where_there_is_no_difference_hardly_a_sentence_claims_one_and_intervals_hold_as_often_as_they_say(claims):
    claimed, held, naive = claims.shares(claims.outcomes("no difference at all", 40))
    assert claimed <= 6 / 40  # at 5 %: seven or more happen once in 300 times
    assert 0.8 <= held <= 0.98
    assert naive < 0.7, "the best of twenty is too high"


def test_a_real_gain_is_told_and_its_intervals_hold(claims):
    claimed, held, _ = claims.shares(
        claims.outcomes("a gain of 2 points, all configs of the search alike", 12, seeds=12)
    )
    assert claimed >= 10 / 12
    assert held >= 0.75


# --- the data and the training ----------------------------------------------------------------------------------------


def test_all_images_but_the_test_sets_are_trained_on_and_normalised_as_in_the_search():
    data = DataConfig(name="digits", val_fraction=0.3, test_fraction=0.2)
    searched, measured = load_dataset(data), load_dataset(data.model_copy(update={"selection": "test_at_end"}))
    assert len(measured.train) == len(searched.train) + len(searched.val)
    assert (measured.mean, measured.std) == (searched.mean, searched.std), (
        "the teacher is shown what it has learnt from"
    )
    assert measured.test.images.equal(searched.test.images)
    assert measured.val is measured.test
    taught = load_dataset(data.model_copy(update={"selection": "all_training"}))
    assert taught.train.images.equal(measured.train.images)
    assert taught.val.images.equal(searched.val.images), "a teacher of these is not measured on the test set"
    assert (taught.mean, taught.std) == (searched.mean, searched.std)
    assert load_dataset(data.model_copy(update={"selection": "best_test_epoch"})).mean != searched.mean


def test_the_test_set_is_evaluated_once_after_the_last_epoch(monkeypatch):
    from tune_topkd.train import loop

    shown = []
    real = loop.evaluate
    monkeypatch.setattr(
        loop, "evaluate", lambda model, split, **kw: (shown.append(len(split)), real(model, split, **kw))[1]
    )
    about = {
        "data": {"name": "digits", "selection": "test_at_end"},
        "student": {"name": "digits_linear"},
        "method": "ce",
    }
    ema = {"decay_epochs": 0.4}
    trial = TrialConfig.model_validate({**about, "recipe": {"epochs": 3, "ema": ema}})
    reports = []
    train(trial, lambda epoch, metrics, save: reports.append(metrics))
    test = load_dataset(trial.data).test
    assert shown == [len(test)]
    assert [("test_top1" in metrics, "val_top1" in metrics) for metrics in reports] == [(False, False)] * 2 + [
        (True, False)
    ]
    assert not [name for metrics in reports for name in metrics if name.startswith(("best_epoch", "test_top1_ema"))]


def test_the_last_checkpoint_says_about_which_test_images_the_training_is_right(tmp_path):
    from tune_topkd.train.checkpoint import HITS_KEY
    from tune_topkd.train.checkpoint import load_checkpoint

    about = {
        "data": {"name": "digits", "selection": "test_at_end"},
        "student": {"name": "digits_linear"},
        "method": "ce",
    }
    trial = TrialConfig.model_validate({**about, "recipe": {"epochs": 2}})
    result = train(trial, lambda epoch, metrics, save: save(tmp_path / str(epoch)))
    first, last = (load_checkpoint(tmp_path / name) for name in "12")
    assert HITS_KEY not in first
    hits = last[HITS_KEY]
    assert (hits.dtype, len(hits)) == (torch.bool, len(load_dataset(trial.data).test))
    assert 100 * hits.double().mean().item() == pytest.approx(result.metrics["test_top1"])


def test_the_spread_over_images_is_what_a_bootstrap_over_them_gives(tmp_path, monkeypatch, confirmed):
    found, chance = verdict_of(state_of(confirmed)), np.random.default_rng(0)
    easy = chance.random(3000)  # an image that one training is wrong about, another likely is as well
    planted = {}
    for arm in (found.answer, *found.baselines):
        right = (chance.random((len(arm.values), 3000)) < 0.5 + 0.5 * easy).astype(float)
        planted[arm.record.key] = {
            seed: 100 * torch.tensor(row) for seed, row in zip(arm.finalist.seeds, right, strict=True)
        }
    monkeypatch.setattr(images, "_hits", lambda folder, finalist: planted[finalist.record.key])
    told = images.image_spread(tmp_path, found)
    means = {key: torch.stack(list(rows.values())).mean(0).numpy() for key, rows in planted.items()}
    draws = chance.integers(0, 3000, (2000, 3000))
    assert told.images == 3000
    assert told.answer == pytest.approx(means[CHOSEN][draws].mean(1).std(), rel=0.1)
    for base in found.baselines:
        apart = means[CHOSEN] - means[base.record.key]
        assert told.gains[base.record.key] == pytest.approx(apart[draws].mean(1).std(), rel=0.1)
    assert (
        f"the standard error of the answer is {told.answer:.2f} points, of the gain over cross-entropy"
        in told.sentence(found)
    )


def test_without_the_trainings_checkpoints_nothing_is_said_of_images(tmp_path, confirmed):
    assert images.image_spread(tmp_path, verdict_of(state_of(confirmed))) is None


def test_a_sweep_does_not_look_at_the_test_set():
    raw = json.loads(json.dumps(SPACE)) | {"teacher": {"name": "digits_cnn", "recipe": {"epochs": 1}}}
    raw["data"] = {"name": "digits", "selection": "test_at_end"}
    with pytest.raises(ConfigError, match=r"data.selection = 'test_at_end': a sweep never looks at the test set"):
        new_config(raw, "test", ())


# --- from end to end ---------------------------------------------------------------------------------------------------

PLAIN = {
    **SPACE,
    "teacher": None,
    "method": "ce",
    "baselines": {"methods": ["ce"], "trials": 1},
}


def test_a_sweep_is_confirmed_exported_and_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    create = {"name": "s", "mlflow_uri": "", "address": "local"}
    Sweep.create(PLAIN, **create).run(executor=SimulatedExecutor(planted, at_once=2))
    place, sweep = Workspace.at(mlflow_uri="", address="local"), Sweep.open("s", mlflow_uri="", address="local")

    def stopping(trial, epoch):
        if trial.record.key == TrialKey(TEST, 3):
            raise KeyboardInterrupt
        return planted(trial, epoch)

    first = sweep.confirm(seeds=3, executor=SimulatedExecutor(stopping, at_once=2))
    assert first.reason == "interrupted"
    assert not first.verdict.is_done
    assert load_tuned_config(first.folder / "tuned.yaml").evidence.test is None
    assert "; test: 2 of 6 trainings" in line_of(standing("s", place))
    last = sweep.confirm(seeds=3, executor=SimulatedExecutor(planted, at_once=2))
    assert (last.reason, last.best.key, last.verdict.is_done) == ("finished", CHOSEN, True)
    tuned = load_tuned_config(last.folder / "tuned.yaml")
    assert tuned == last.answer
    test = tuned.evidence.test
    assert test.test_top1 == pytest.approx(last.verdict.answer.finalist.mean)
    assert (test.look, test.seeds, len(test.values)) == (1, [10_005, 10_006, 10_007], 3)
    assert tuple(test.interval) == last.verdict.answer.interval
    gain = tuned.evidence.baselines["ce"].gain
    assert (gain.is_told_apart, gain.points) == (True, pytest.approx(last.verdict.gains[0].mean))
    assert "on the test set " in as_yaml(tuned).splitlines()[0]
    wide = test.model_copy(update={"interval": [-17.8, 158.1]})
    assert " % (0.00 to 100.00) over 3 fresh seeds" in figures(tuned.evidence.model_copy(update={"test": wide}))
    shown = standing("s", place)
    assert json.loads(json.dumps(shown))["test"]["gains"]["ce"]["is_told_apart"] is True
    assert f"; test set {test.test_top1:.2f} % (" in line_of(shown)
    assert [line for line in audit("s", place, with_mlflow=False) if "checkpoint" not in line] == []
    assert "".join(capfd.readouterr()) == ""


class Watched(SimulatedExecutor):
    """Formulas, and what they were given."""

    work = None

    def run(self, search, work):
        self.work = work
        return super().run(search, work)


def test_a_teacher_with_a_recipe_learns_from_all_images_that_the_trainings_for_the_test_set_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = json.loads(json.dumps(SPACE)) | {"teacher": {"name": "digits_cnn", "recipe": {"epochs": 2, "lr": 0.1}}}
    Sweep.create(space, name="s", mlflow_uri="", address="local").run(executor=SimulatedExecutor(planted))
    sweep, executor = Sweep.open("s", mlflow_uri="", address="local"), Watched(interrupted_in_the_test)
    state = sweep.confirm(seeds=2, executor=executor).state
    work = executor.work
    own, others = Path(work.files.teacher_checkpoint), Path(work.test_files.teacher_checkpoint)
    assert own != others
    assert state.confirm.teacher == file_hash(others) != file_hash(own)
    assert work.hashes[str(others)] == file_hash(others)
    config = yaml.safe_load((others.parent / "teacher.json").read_text())["config"]
    assert config["data"]["selection"] == "all_training"
    assert Path(work.test_files.dataset_file).name == "test-dataset.pt"
    ledger = sweep.folder / "ledger.jsonl"
    kept, events = ledger.read_bytes(), list(read_events(ledger)[0])
    at = next(i for i, e in enumerate(events) if isinstance(e.content, Confirm))
    events[at] = changed(events[at], teacher="0" * 64)
    ledger.write_bytes(b"".join(map(encode, events)))
    with pytest.raises(ConfigError, match="the teacher of the trainings for the test set is not the one that"):
        sweep.resume(executor=Watched(planted))
    ledger.write_bytes(kept)
    done = sweep.resume(executor=Watched(planted))
    assert done.verdict.is_done
    assert done.answer.evidence.test.teacher == file_hash(others)
    assert not list(done.folder.glob("*dataset.pt"))


def interrupted_in_the_test(trial, epoch):
    if trial.record.key == TrialKey(TEST, 1):
        raise KeyboardInterrupt
    return planted(trial, epoch)


def test_the_console_says_the_cost_first_and_the_sentence_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Sweep.create(PLAIN, name="s", mlflow_uri="", address="local").run(executor=SimulatedExecutor(planted))
    reading, writing = os.pipe()
    console, place = Console(Terminal(writing)), Workspace.at(mlflow_uri="", address="local")
    result = Sweep.open("s", mlflow_uri="", address="local").confirm(
        [ConsoleCallback(console, place)], seeds=2, executor=SimulatedExecutor(planted)
    )
    console.terminal.close()
    told = os.read(reading, 1 << 16).decode()
    os.close(reading)
    assert told.startswith(
        "confirm s: 8 trainings to choose among the finalists; then 4 on all images but the test set's"
    )
    assert "trial 0003 on seed 10005, for the test set completed at epoch 2: test_top1 8" in told
    assert "test set, look 1: trained on all other images, 2 seeds each" in told
    assert f"  {result.verdict.sentence}\n" in told
    assert "export s" in told.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["confirm", "nothing"], "error: "),
        (["confirm", "s", "--seeds", "1"], "error: confirm: --seeds = 1: must be at least 2"),
        (["confirm", "s", "--finalists", "9"], "error: confirm: --finalists = 9: must be at most 6"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_the_ledger_alone(tmp_path, monkeypatch, capfd, arguments, told):
    monkeypatch.chdir(tmp_path)
    result = Sweep.create(PLAIN, name="s", mlflow_uri="", address="local").run(executor=SimulatedExecutor(planted))
    before = (result.folder / "ledger.jsonl").read_bytes()
    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert said.startswith(told)
    assert said.count("\n") == 1
    assert (result.folder / "ledger.jsonl").read_bytes() == before


def test_mlflow_has_a_run_for_each_training_and_the_figures_in_the_sweeps_own(confirmed):
    projection, batch = Projection(), Batch()
    for event in read_events(confirmed)[0]:
        projection.take(event, batch)
    runs = [run for run in batch.opened if run.startswith(f"{TEST}-")]
    assert len(runs) == 16
    assert batch.opened["test-0000"].name == "trial 0003, seed 10005, test"
    assert batch.tags["test-0000"]["test_number"] == "0"
    assert [row.name for row in batch.points["test-0000"]] == ["train_loss", "test_top1"]
    newest = {row.name: row.value for row in batch.points[""]}
    found = verdict_of(state_of(confirmed))
    assert newest["test_top1"] == pytest.approx(found.answer.finalist.mean)
    assert newest["test_ce_top1"] == pytest.approx(found.baselines[0].finalist.mean)
    assert newest["test_look"] == 1.0
    assert newest["best_val_top1"] == OWN["search"][3], "the search's own"


# --- the tuned config's schema ------------------------------------------------------------------------------------------


def test_the_published_schema_is_that_of_the_program_and_takes_its_files(tmp_path, monkeypatch):
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema(), "write json_schema() to export/tuned.schema.json"
    monkeypatch.chdir(tmp_path)
    Sweep.create(PLAIN, name="s", mlflow_uri="", address="local").run(executor=SimulatedExecutor(planted))
    result = Sweep.open("s", mlflow_uri="", address="local").confirm(seeds=2, executor=SimulatedExecutor(planted))
    content = yaml.safe_load(as_yaml(result.answer))
    jsonschema.validate(content, json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"loses": {}}, json_schema())


# --- baselines that are tuned alike -------------------------------------------------------------------------------------


def alike(**sections):
    return config(baselines={"methods": ["ce", "kd"], "trials": 2, "match": True}, **sections)


def flat(trial, epoch):
    """Better with the temperature, for KD; rising with the learning rate, for all."""
    lr, temperature = trial.config.recipe.lr, trial.config.loss.get("temperature", 0.0)
    return {"val_top1": 50 + 5 * math.log10(lr) + float(temperature) + epoch}


def test_kd_gets_as_many_full_trainings_as_the_search_has_trained_epochs(tmp_path):
    plan = alike(sweep={"asha": {"grace_epochs": 1, "reduction_factor": 2}, "trials": 12})
    path = tmp_path / "ledger.jsonl"
    state = drive(path, plan, flat, at_once=2)
    epochs = sum(record.epoch for record in state.arm("search"))
    assert EPOCHS * 6 < epochs < EPOCHS * 12
    assert (state.size("kd"), state.size("ce")) == (math.ceil(epochs / EPOCHS), 2)
    assert {record.epoch for record in state.arm("kd")} == {EPOCHS}
    first = state.arm("kd")[0].params
    assert first == pytest.approx({"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9, "lr": 0.1})
    for record in state.arm("kd"):
        assert record.params["ce_weight"] + record.params["kd_weight"] == pytest.approx(1.0)
        assert 1.0 <= record.params["temperature"] <= 16.0
    assert max(state.arm("kd"), key=lambda r: r.value).params["temperature"] > 4.0, "it is searched for"
    assert audit_decisions(plan, read_events(path)[0])[0] == []


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_baseline_that_is_tuned_alike_goes_on_as_if_it_had_not_been_killed(tmp_path, at_once):
    plan = alike()
    whole = tmp_path / "whole.jsonl"
    drive(whole, plan, flat, at_once=at_once)
    reports = sum(e.name == "report" for e in read_events(whole)[0])
    for cut in range(1, reports, 3):
        path = tmp_path / f"{cut}.jsonl"
        drive(path, plan, flat, at_once=at_once, reports=cut)
        drive(path, plan, flat, at_once=at_once)
        if at_once == 1:
            assert told(path) == told(whole)
        assert audit_decisions(plan, read_events(path)[0])[0] == []


def test_a_proposal_of_a_tuned_baseline_that_its_sampler_would_not_make_is_found(tmp_path):
    plan, path = alike(), tmp_path / "ledger.jsonl"
    drive(path, plan, flat)
    events = list(read_events(path)[0])
    at = next(i for i, e in enumerate(events) if isinstance(e.content, Suggest) and e.content.key == TrialKey("kd", 3))
    proposal = dict(events[at].content.proposal) | {"lr": 0.5}
    params = dict(events[at].content.params) | {"lr": 0.5}
    events[at] = changed(events[at], proposal=proposal, params=params)
    found = audit_decisions(plan, events)[0]
    assert any("the proposal of trial kd-0003 is not what the sampler proposes" in line for line in found)


def test_a_tuned_baseline_is_trained_with_what_it_was_given_and_called_tuned(tmp_path):
    plan, path = alike(), tmp_path / "ledger.jsonl"
    state = drive(path, plan, flat)
    with Ledger.open(path, is_durable=False) as ledger:
        trial = Search(plan, ledger).trial_config(ledger.state.arm("kd")[2])
    assert trial.method == "kd"
    assert set(trial.loss) == {"temperature", "ce_weight", "kd_weight"}
    assert verdicts.baseline_name(state.best("kd")) == "tuned KD"
    assert verdicts.baseline_name(state.best("ce")) == "cross-entropy"


def test_there_must_be_a_baseline_to_tune():
    with pytest.raises(ConfigError, match=r"baselines.match = True: there is no baseline to tune alike"):
        config(baselines={"methods": ["ce", "defaults"], "match": True})
