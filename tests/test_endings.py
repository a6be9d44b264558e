"""Searches that end before their last trial: hours that are used up, a plateau."""

import random
import re
from dataclasses import replace

import formulas
import pytest
import yaml
from test_search import told

from tune_topkd.cli.display import tell_result
from tune_topkd.cli.standing import line_of
from tune_topkd.cli.standing import standing
from tune_topkd.config import ConfigError
from tune_topkd.execution.simulated import SimulatedExecutor
from tune_topkd.execution.simulated import VirtualClock
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Finalists
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Plateau
from tune_topkd.ledger import Share
from tune_topkd.ledger import Stop
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.search import Search
from tune_topkd.search import audit_decisions
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import cost
from tune_topkd.sweep.remaining import seconds_to_limit

HOUR = 3600.0


def config(trials=30, **sweep):
    """One whose baselines and finalists follow the search."""
    settings = {"trials": trials, "startup_trials": 4, "asha": {"grace_epochs": 1}, "sampler": "random"}
    return formulas.sweep_config(sweep=settings | sweep, baselines={"methods": ["ce"], "trials": 2})


def hourly(trial, epoch):
    """An hour an epoch."""
    return {"val_top1": formulas.value(trial.config, epoch), "epoch_seconds": HOUR}


def drive(path, settings, formula=hourly, at_once=1, trials=None, reports=None):
    """A driver's turn at a sweep: its state and why it stopped."""
    clock = VirtualClock()
    if path.exists():
        ledger = Ledger.open(path)
    else:
        header = Header(sweep="s", id="0", seed=settings.sweep.seed, trials=settings.sweep.trials)
        ledger = Ledger.create(path, header, clock=clock, is_durable=False)
    with ledger:
        hours = {"gpu_hours": settings.sweep.gpu_hours, "cpu_hours": settings.sweep.cpu_hours}
        target = trials or (ledger.state.target if ledger.state.last_driver else settings.sweep.trials)
        finalists = Finalists.configured(settings.sweep.finalists)
        ledger.append(Driver.here(trials=target, finalists=finalists, **hours))
        reason = simulate(Search(settings, ledger, clock=clock), formula, at_once=at_once, clock=clock, reports=reports)
        return ledger.state, reason


def findings(path, settings):
    return audit_decisions(settings, read_events(path)[0])[0]


# --- hours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "share"),
    [
        ({"cpu_hours": 40.0}, {"cpus_per_trial": 2.0}),
        ({"gpu_hours": 5.0}, {"gpus_per_trial": 0.25}),
        ({"gpu_hours": 20.0}, {"gpus_per_trial": 1.0}),
    ],
)
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_sweep_stops_when_its_hours_are_used_up(tmp_path, limit, share, at_once):
    """All three are 20 epochs of an hour; trials at work stop at their next report."""
    settings = config(**limit, **share)
    state, reason = drive(tmp_path / "l", settings, at_once=at_once)
    epochs = sum(record.epoch for record in state.trials.values())
    assert reason == next(iter(limit)) == state.stop_reason
    assert 20 <= epochs <= 20 + at_once - 1
    assert len(state.running()) <= at_once
    assert findings(tmp_path / "l", settings) == []


def test_hours_are_of_the_whole_sweep_and_a_resume_with_more_goes_on_to_the_same_end(tmp_path):
    endless = config(trials=6)
    drive(tmp_path / "whole", endless)
    path = tmp_path / "l"
    for hours in (7.0, 7.0, 19.0):
        before = read_events(path)[0] if path.exists() else []
        _, reason = drive(path, config(trials=6, cpu_hours=hours))
        assert reason == "cpu_hours"
        new = [event.name for event in read_events(path)[0][len(before) :]]
        assert (new == ["driver", "stop"]) == (hours == 7.0 and bool(before)), "the second has nothing left"
        assert findings(path, config(trials=6, cpu_hours=hours)) == []
    assert drive(path, endless)[1] == "finished"
    assert told(path) == told(tmp_path / "whole")
    assert findings(path, endless) == []


def test_a_trial_with_a_larger_share_counts_by_that(tmp_path):
    settings = config(cpu_hours=8.0)
    with Ledger.create(tmp_path / "l", Header(sweep="s", id="0", seed=0, trials=30), is_durable=False) as ledger:
        ledger.append(Driver.here(trials=30, cpu_hours=8.0))
        search = Search(settings, ledger)
        record = search.next_trial()
        search.started(record.key)
        search.lost(record.key, "oom", "MemoryError: ", Share(4.0, 0.0))
        assert search.next_trial() is record
        search.reported(record.key, 1, {"val_top1": 1.0, "epoch_seconds": HOUR})
        assert (search.used_up, search.lets_go) == ("", False)
        assert seconds_to_limit(settings, ledger.state) == pytest.approx(HOUR)
        search.reported(record.key, 2, {"val_top1": 1.0, "epoch_seconds": HOUR})
        assert (search.used_up, search.lets_go) == ("cpu_hours", True)
        assert seconds_to_limit(settings, ledger.state) == 0.0
        rebuilt = Search(settings, ledger)
        assert rebuilt.used_up == "cpu_hours"
        assert rebuilt.next_trial() is None
        assert rebuilt.stopped() == "cpu_hours"


def test_gpu_hours_without_gpus_are_refused_with_what_to_give_instead():
    with pytest.raises(ConfigError) as told:
        config(gpu_hours=3.0)
    assert str(told.value) == (
        "test: sweep.gpu_hours = 3.0: no trial has a GPU (sweep.gpus_per_trial is 0), so none would be counted; give "
        "sweep.cpu_hours or sweep.time_budget"
    )
    assert config(gpu_hours=3.0, gpus_per_trial="auto").sweep.gpu_hours == 3.0


def test_an_audit_finds_hours_that_were_passed_over_and_a_stop_too_early(tmp_path):
    drive(tmp_path / "l", config(trials=6))
    events = read_events(tmp_path / "l")[0]
    limited = [
        event
        if not isinstance(event.content, Driver)
        else type(event)(event.seq, event.time, Driver(host="h", pid=1, trials=6, cpu_hours=5.0))
        for event in events
    ]
    found, _ = audit_decisions(config(trials=6, cpu_hours=5.0), limited)
    assert any("is begun although cpu_hours are used up" in finding for finding in found)
    early = [*limited[:3], type(events[0])(3, 0.0, Stop(reason="cpu_hours"))]
    found, _ = audit_decisions(config(trials=6, cpu_hours=5.0), early)
    assert found == ["line 4: the sweep is stopped for cpu_hours, which are not used up"]


# --- a plateau ----------------------------------------------------------------------------------------------------


def rising_until(last):
    """Values that rise by a point with each trial, up to one of them."""

    def formula(trial, epoch):
        number = trial.record.key.number if trial.record.key.arm == "search" else 0
        return {"val_top1": 50.0 + min(number, last), "epoch_seconds": 1.0}

    return formula


PLATEAU = {"plateau": {"points": 1.0, "newest": 5}, "asha": None}


@pytest.mark.parametrize("last", [3, 9])
def test_a_search_ends_where_its_newest_trials_bring_nothing(tmp_path, last):
    settings = config(**PLATEAU, finalists={"count": 2, "seeds": 2})
    state, reason = drive(tmp_path / "l", settings, rising_until(last))
    after = max(last + 1, 4) + 5  # the random proposals at the start are not among the newest
    assert (reason, state.size(), state.target) == ("finished", after, after)
    best = 50.0 + last
    assert state.plateau == Plateau(trials=after, best=best, gained=0.0, newest=5, points=1.0)
    assert state.size("ce") == 2, "the baselines follow"
    assert state.size("repeat") == 6, "and so do the finalists"
    assert findings(tmp_path / "l", settings) == []
    names = [event.name for event in read_events(tmp_path / "l")[0]]
    assert names.count("plateau") == 1


def test_a_search_that_still_gains_its_points_goes_on(tmp_path):
    state, _ = drive(tmp_path / "l", config(**PLATEAU), rising_until(100))
    assert (state.size(), state.plateau) == (30, None)
    state, _ = drive(tmp_path / "m", config(plateau={"points": 5.5, "newest": 5}, asha=None), rising_until(100))
    assert state.size() == 9, "five points in five trials are less than 5.5"
    assert state.plateau.gained == 5.0
    assert "the newest 5 brought 5.00 points, less than sweep.plateau.points = 5.5" in state.plateau.sentence


def test_stopped_trials_count_and_failed_ones_do_not(tmp_path):
    def formula(trial, epoch):
        if trial.record.key.arm == "search" and trial.record.key.number % 2:
            raise ZeroDivisionError("odd")
        return {"val_top1": 50.0 - trial.record.key.number if trial.record.key.arm == "search" else 1.0}

    settings = config(plateau={"points": 1.0, "newest": 4})
    state, _ = drive(tmp_path / "l", settings, formula)
    kinds = [record.status for record in state.arm("search")]
    assert {TrialStatus.FAILED, TrialStatus.PRUNED} <= set(kinds)
    assert sum(status is not TrialStatus.FAILED for status in kinds) == 8
    assert findings(tmp_path / "l", settings) == []


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_sweep_with_a_plateau_cut_anywhere_ends_at_the_same_one(tmp_path, at_once):
    settings = config(**PLATEAU)
    drive(tmp_path / "whole", settings, rising_until(6), at_once)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if b'"event":"plateau"' in line)
    for cut in {at - 1, at, at + 1, *random.Random(0).sample(range(2, len(lines)), 5)}:
        part = tmp_path / "part"
        part.write_bytes(b"".join(lines[:cut]))
        state, reason = drive(part, settings, rising_until(6), at_once)
        assert reason == "finished"
        if at_once == 1:
            assert told(part) == told(tmp_path / "whole"), cut
        assert state.plateau is not None
        assert findings(part, settings) == [], cut


def test_whoever_asks_for_more_trials_goes_on_from_a_plateau_to_the_next_one(tmp_path):
    settings, path = config(**PLATEAU), tmp_path / "l"
    drive(path, settings, rising_until(3))
    before = read_state(path).size()
    assert before == 9
    assert drive(path, settings, rising_until(3))[0].size() == before, "resumed without more it is over"
    state, reason = drive(path, settings, rising_until(3), trials=25)
    assert (reason, state.size()) == ("finished", before + 5)
    assert state.plateau.trials == before + 5
    state, _ = drive(path, settings, rising_until(100), trials=20)
    assert (state.size(), state.plateau) == (20, None)
    assert findings(path, settings) == []


def test_an_audit_finds_a_plateau_that_is_none_and_one_that_was_passed_over(tmp_path):
    settings = config(**PLATEAU)
    drive(tmp_path / "l", config(asha=None), rising_until(3))
    found = findings(tmp_path / "l", settings)
    assert any("trial 0009 is suggested where the search ended at a plateau, with 9 trials" in text for text in found)
    drive(tmp_path / "m", settings, rising_until(3))
    found = findings(tmp_path / "m", config(plateau={"points": 1.0, "newest": 6}, asha=None))
    assert any("the search is ended" in text and "where it goes on" in text for text in found)


def test_a_plateau_of_another_number_of_trials_is_refused(tmp_path):
    with Ledger.create(tmp_path / "l", Header(sweep="s", id="0", seed=0, trials=3), is_durable=False) as ledger:
        ledger.append(Driver.here(trials=3))
        with pytest.raises(LedgerError, match="a plateau of 2 trials, where there are 0"):
            ledger.append(Plateau(trials=2, best=1.0, gained=0.0, newest=5, points=1.0))


def test_a_bare_number_is_the_points_of_a_plateau():
    assert config(plateau=1).sweep.plateau == config(plateau={"points": 1.0}).sweep.plateau
    with pytest.raises(ConfigError, match=r"sweep\.plateau\.points = 0\.0: .*greater than 0"):
        config(plateau=0.0)
    with pytest.raises(ConfigError, match=r"sweep\.plateau"):
        config(plateau=True)


# --- from the service -------------------------------------------------------------------------------------------

SPACE = {
    "data": {"name": "digits"},
    "student": "digits_cnn_tiny",
    "method": "ce",
    "recipe": {"epochs": 2, "milestones": [1], "lr": 0.1},
    "space": {"lr": {"low": 0.01, "high": 0.1}},
    "baselines": None,
}


def created(folder, **settings):
    settings = {"sampler": "random", "asha": None, "startup_trials": 4} | settings
    (folder / "s.yaml").write_text(yaml.safe_dump(SPACE | {"sweep": settings}))
    return Sweep.create(folder / "s.yaml", runs_dir=folder / "runs", mlflow_uri="")


def by_rate(trial, epoch):
    return {"val_top1": 50.0 + trial.config.recipe.lr, "epoch_seconds": HOUR}


def test_a_sweep_resumed_keeps_its_hours_until_others_are_given(tmp_path):
    sweep, executor = created(tmp_path, trials=4, cpu_hours=3.0), SimulatedExecutor(by_rate)
    assert sweep.run(executor=executor).reason == "cpu_hours"
    assert (sweep.status().condition, sweep.status().trials["completed"]) == ("out of CPU hours", 1)
    again = Sweep.open("s", runs_dir=tmp_path / "runs", mlflow_uri="")
    assert again.resume(executor=executor).reason == "cpu_hours"
    assert again.status().trials["completed"] == 1, "there was nothing left"
    assert again.resume(executor=executor, cpu_hours=5.0).state.cpu_hours == 5.0
    assert again.resume(executor=executor).state.cpu_hours == 5.0
    assert again.resume(executor=executor, cpu_hours=1e4).reason == "finished"
    assert again.status().trials["completed"] == 4


def test_a_sweep_that_ended_at_a_plateau_says_so_in_its_status(tmp_path):
    sweep = created(tmp_path, trials=40, plateau=20.0)
    result, status = sweep.run(executor=SimulatedExecutor(by_rate)), sweep.status()
    assert (result.reason, status.condition, status.target) == ("finished", "finished", 24)
    assert status.plateau.startswith("the search ended at a plateau, with 24 trials: the newest 20 brought ")
    told = line_of(standing("s", sweep.workspace))
    assert told.startswith("s: finished, 24 completed of 24 trials; best ")
    assert f"; {status.plateau}; " in told
    assert TrialKey("search", 23) in result.state.trials


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"sampler": "tpe", "trials": 4},
            "  all 4 are drawn at random: tpe proposes after the first 4 (sweep.startup_trials; ",
        ),
        (
            {"sampler": "gp", "trials": 16, "startup_trials": None},
            "  all 16 are drawn at random: gp proposes after the first 16",
        ),
        ({"sampler": "tpe", "trials": 5}, None),
        ({"sampler": "random", "trials": 4}, None),
    ],
)
def test_a_search_of_random_proposals_alone_is_told(settings, told):
    found = [line for line in cost.describe(config(**settings), with_time=False) if "at random" in line]
    assert len(found) == (told is not None)
    assert not found or found[0].startswith(told)


def test_the_cost_of_a_sweep_names_what_may_end_it_earlier():
    lines = list(cost.describe(config(cpu_hours=2.0, plateau=1.5)))
    assert "the sweep stops after 2 CPU hours of training" in lines
    assert "the search ends when its newest 20 trials bring less than 1.5 points of top-1" in lines
    assert not any("stops after" in line or "the search ends" in line for line in cost.describe(config()))


class Printed:
    """A console that keeps what it is given."""

    def __init__(self):
        self.lines = []

    def print(self, what, **style):
        self.lines.append(str(what))


def test_what_comes_next_after_used_up_hours_is_more_of_them(tmp_path):
    sweep = created(tmp_path, trials=4, cpu_hours=3.0)
    result, console = sweep.run(executor=SimulatedExecutor(by_rate)), Printed()
    tell_result(result, sweep.workspace, console)
    assert console.lines[-1].endswith(f"resume s --cpu-hours 6 --runs-dir {tmp_path / 'runs'}")


def test_a_plateau_is_told_with_the_result(tmp_path):
    sweep, console = created(tmp_path, trials=40, plateau=20.0), Printed()
    result = sweep.run(executor=SimulatedExecutor(by_rate))
    tell_result(result, sweep.workspace, console)
    assert f"  {result.state.plateau.sentence}" in console.lines


@pytest.mark.parametrize(("level", "lines"), [(9.0, 1), (80.0, 0)])
def test_a_student_at_chance_is_told_with_the_result(tmp_path, level, lines):
    sweep, console = created(tmp_path, trials=4), Printed()
    result = sweep.run(executor=SimulatedExecutor(lambda trial, epoch: {"val_top1": level, "epoch_seconds": 1.0}))
    tell_result(result, sweep.workspace, console)
    assert sum("top-1 is at chance" in line for line in console.lines) == lines


def test_a_trial_that_was_at_work_as_the_run_ended_is_not_called_running(tmp_path):
    sweep, console = created(tmp_path, trials=4), Printed()
    result = sweep.run(executor=SimulatedExecutor(by_rate))
    events, _ = read_events(result.folder / "ledger.jsonl")
    started = next(place for place, event in enumerate(events) if event.content.NAME == "start")
    state = SweepState()
    for event in events[: started + 1]:
        state.apply(event)
    state.apply(replace(events[started], seq=started + 1, content=Stop(reason="interrupted")))
    tell_result(replace(result, state=state), sweep.workspace, console)
    assert re.fullmatch(r"s: \d interrupted so far, none of them of the full budget; interrupted", console.lines[0])
