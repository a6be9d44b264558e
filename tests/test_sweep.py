"""Whole sweeps of formula trials on a real Ray."""

import contextlib
import errno
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import formulas
import pytest
import ray
from ray.tune.experiment import Trial

from tune_topkd.execution import Cluster
from tune_topkd.execution import ResourceError
from tune_topkd.execution import SweepTroubleError
from tune_topkd.execution import ray_tune
from tune_topkd.execution import run_sweep
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Share
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.search import Search
from tune_topkd.search.samplers import TpeSampler
from tune_topkd.sweep import audit_sweep

pytestmark = [
    pytest.mark.ray,
    # Ray 2.60 itself: its own deprecated calls, and sockets it leaves to the collector
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", here, prepend=os.pathsep)  # the workers are to find the formulas
        with Cluster.attached() as cluster:
            yield cluster


def carry_through(cluster, folder, train, first=(), **sections):
    """Run a sweep of a train function in a folder, or go on with it: its state."""
    config = formulas.sweep_config(**({"baselines": None} | sections))
    path = folder / "ledger.jsonl"
    folder.mkdir(exist_ok=True)
    if path.exists():
        ledger = Ledger.open(path)
    else:
        seed, trials = config.sweep.seed, config.sweep.trials
        header = Header(sweep="t", id=folder.name, seed=seed, trials=trials, first=list(first))
        ledger = Ledger.create(path, header)
    with ledger:
        ledger.append(Driver(host="h", pid=os.getpid(), trials=config.sweep.trials, cpu_hours=config.sweep.cpu_hours))
        run_sweep(Search(config, ledger), cluster=cluster, folder=folder, train=train)
        return ledger.state


@pytest.fixture
def sweep(tmp_path, cluster):
    """Runs a sweep of a train function in a folder and gives its state."""

    def sweep(train, folder="s", **sections):
        return carry_through(cluster, tmp_path / folder, train, **sections)

    return sweep


class Finished(NamedTuple):
    """A sweep that several tests look at."""

    ledger: Path
    state: SweepState


@pytest.fixture(scope="module")
def two_at_once(tmp_path_factory, cluster):
    """A sweep of two trials at once where more would fit, with baselines."""
    folder, settings = tmp_path_factory.mktemp("two"), {"cpus_per_trial": 0.5, "max_concurrent": 2}
    state = carry_through(cluster, folder, formulas.slow, sweep=settings, baselines={"trials": 2})
    return Finished(folder / "ledger.jsonl", state)


@pytest.fixture(scope="module")
def alike(tmp_path_factory, cluster):
    """Two sweeps of the same seed, one trial at a time."""

    def finished(name):
        folder = tmp_path_factory.mktemp(name)
        state = carry_through(cluster, folder, formulas.rising, baselines={"trials": 2})
        return Finished(folder / "ledger.jsonl", state)

    return finished("a"), finished("b")


@pytest.fixture(scope="module")
def fates(tmp_path_factory, cluster):
    """A sweep in which each trial has another fate: its folder and its records by the name of the train function."""
    folder, first = tmp_path_factory.mktemp("fates"), [formulas.DEFAULTS | {"k": k} for k in formulas.FATES]
    sections = {"sweep": {"trials": len(first), "max_failures": 1, "asha": None}}
    state = carry_through(cluster, folder, formulas.by_fate, first, **sections)
    assert state.stop_reason == "finished"
    assert findings(folder, **sections) == []
    return folder, {formulas.FATES[record.params["k"]].__name__: record for record in state.arm("search")}


def findings(folder, **sections):
    """What the audit of a sweep of `carry_through` finds."""
    return audit_sweep(formulas.sweep_config(**({"baselines": None} | sections)), folder)


def comparable(path):
    """A ledger without times and ids."""
    times = ("epoch_seconds",)
    events = []
    for event in read_events(path)[0]:
        data = {name: v for name, v in event.data.items() if name != "id"}
        if "metrics" in data:
            data["metrics"] = {name: v for name, v in data["metrics"].items() if name not in times}
        events.append((event.name, data))
    return events


def test_a_sweep_runs_every_trial_once(two_at_once):
    state = two_at_once.state
    assert state.stop_reason == "finished"
    assert state.counts()["completed"] + state.counts()["pruned"] == 12
    assert state.counts()["pruned"] >= 4
    assert [state.counts(arm)["completed"] for arm in ("ce", "kd")] == [2, 2]
    assert all(list(r.reports) == list(range(1, r.epoch + 1)) for r in state.trials.values())
    assert all(r.attempts == 1 for r in state.trials.values())
    best = state.best()
    assert best.value == pytest.approx(formulas.value(_config(best), formulas.EPOCHS))


def test_no_more_trials_at_once_than_asked_for(two_at_once):
    live, most = set(), 0
    for event in read_events(two_at_once.ledger)[0]:
        if event.name in ("suggest", "end"):
            live = live | {event.key} if event.name == "suggest" else live - {event.key}
            most = max(most, len(live))
    assert most == 2


def _config(record):
    config = formulas.sweep_config()
    recipe = config.recipe.model_copy(update={"lr": record.params["lr"]})
    return type("Trial", (), {"loss": record.params, "recipe": recipe})


@pytest.mark.slow
def test_checkpoints_of_the_losers_are_dropped_and_of_the_others_kept(alike):
    ledger, state = alike[0]
    assert state.counts()["pruned"] >= 4
    for record in state.trials.values():
        kept = list((ledger.parent / "trials" / str(record.key)).glob("epoch-*"))
        assert bool(kept) == (record.status is TrialStatus.COMPLETED), record


@pytest.mark.slow
def test_the_same_seed_one_at_a_time_gives_the_same_ledger(alike):
    first, second = (comparable(finished.ledger) for finished in alike)
    assert first == second
    assert len(first) > 60


@pytest.mark.slow
def test_trials_that_are_shorter_than_a_workers_start_use_every_slot(sweep):
    state = sweep(formulas.process, sweep={"trials": 40, "max_concurrent": 2, "asha": None})
    assert state.counts()["completed"] == 40
    assert all(r.attempts == 1 for r in state.trials.values())
    by_process = Counter(r.value for r in state.arm("search"))
    assert len(by_process) == 2, by_process


class Started:
    """A trial as Ray's scheduler sees it."""

    def __init__(self, number):
        self.trial_id, self.status = str(number), Trial.PENDING


def test_a_free_worker_goes_to_the_trial_that_would_wait_longest_for_its_own():
    """Three slots: while two workers start, the third does trial after trial, and nothing that starts is stopped."""
    scheduler = ray_tune._TellSearch(SimpleNamespace(is_full=False))
    controller = SimpleNamespace(_tune_controller=None)
    trials = [Started(number) for number in range(6)]
    for trial in trials[:3]:
        scheduler.on_trial_add(controller, trial)
    assert [scheduler.choose_trial_to_run(None) for _ in range(3)] == trials[:3], "workers are asked for in their order"
    trials[0].status = Trial.RUNNING
    for short, following in ((0, 3), (3, 4)):
        trials[short].status = Trial.TERMINATED
        scheduler.on_trial_add(controller, trials[following])
        assert scheduler.choose_trial_to_run(None) is trials[following]
        trials[following].status = Trial.RUNNING
    trials[4].status = Trial.TERMINATED
    assert scheduler.choose_trial_to_run(None) is trials[2], "no trial is left: what was asked for last comes first"
    trials[1].status = trials[2].status = Trial.RUNNING
    assert scheduler.choose_trial_to_run(None) is None


def test_a_trial_that_fails_fails_alone(fates):
    """The others of its sweep are as they would be without it."""
    _, records = fates
    well = {name for name, record in records.items() if record.status is TrialStatus.COMPLETED}
    assert well - {"needing_two_cpus"} == {"rising", "dying_once"}
    assert records["rising"].value == pytest.approx(formulas.value(_config(records["rising"]), formulas.EPOCHS))


def test_nan_ends_the_trial_at_that_report(fates):
    record = fates[1]["nan_for_large_k"]
    assert (record.status, record.reason, record.epoch) == (TrialStatus.FAILED, "diverged", 2)


def test_a_worker_that_dies_goes_on_from_its_checkpoint(fates):
    record = fates[1]["dying_once"]
    assert record.status is TrialStatus.COMPLETED
    assert record.attempts == 2
    assert list(record.reports) == list(range(1, formulas.EPOCHS + 1))


def test_a_worker_that_dies_too_often_is_a_crash(fates):
    record = fates[1]["dying_always"]
    assert (record.status, record.reason) == (TrialStatus.FAILED, "crash")
    assert record.attempts == 2


def test_an_exception_is_kept_with_its_trace_and_one_that_all_make_ends_the_sweep(sweep, tmp_path):
    state = sweep(formulas.raising, sweep={"asha": None})
    assert state.stop_reason == "failed"
    assert state.counts()["failed"] == 3
    record = state.arm("search")[0]
    assert (record.reason, record.error) == ("error", "RuntimeError: the dataset is not there")
    trace = (tmp_path / "s" / "trials" / "0000" / "error.txt").read_text()
    assert "in raising" in trace


BROKEN = [
    ZeroDivisionError("in\nthe sampler"),
    pytest.param(ValueError("space.k: low <= high must hold"), marks=pytest.mark.slow),
    pytest.param(RuntimeError(""), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("error", BROKEN, ids=repr)
def test_a_decision_that_fails_ends_the_sweep_in_one_line_with_a_stop_and_so_does_the_next_resume(
    sweep, tmp_path, monkeypatch, error
):
    def broken(self, number):
        raise error

    ledger = tmp_path / "s" / "ledger.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(TpeSampler, "ask", broken)
        for _ in range(2):
            with pytest.raises(SweepTroubleError, match="what comes next cannot be decided") as told:
                sweep(formulas.rising, sweep={"trials": 3, "asha": None})
            assert "\n" not in str(told.value)
            assert " ".join(str(error).split()) in str(told.value)
            stop = read_events(ledger)[0][-1]
            assert (stop.name, stop.data["reason"]) == ("stop", "trouble")
            assert stop.data["error"] in str(told.value)
    assert sweep(formulas.rising, sweep={"trials": 3, "asha": None}).counts()["completed"] == 3


@pytest.mark.parametrize(
    ("train", "error"),
    [(formulas.giving_up, "returned after 1 of 9 epochs"), (formulas.objective_missing, "reported no val_top1")],
)
def test_a_train_function_that_breaks_its_contract_is_told_so(fates, train, error):
    record = fates[1][train.__name__]
    assert record.status is TrialStatus.FAILED
    assert error in record.error


@pytest.mark.slow
def test_a_time_budget_ends_the_run_and_a_resume_goes_on(sweep):
    state = sweep(formulas.slow, sweep={"trials": 6, "time_budget": 1.5, "asha": None})
    assert state.stop_reason == "time_budget"
    before = {r.key: dict(r.reports) for r in state.trials.values()}
    assert 0 < len(before) < 6
    state = sweep(formulas.rising, sweep={"trials": 6, "asha": None})
    assert state.stop_reason == "finished"
    assert state.counts()["completed"] == 6
    for key, reports in before.items():
        assert reports.items() <= state.trials[key].reports.items()


@pytest.mark.slow
def test_hours_that_are_used_up_end_the_run(sweep):
    state = sweep(formulas.slow, sweep={"trials": 6, "cpu_hours": 0.9 / 3600, "asha": None})
    epochs = sum(record.epoch for record in state.trials.values())
    assert (state.stop_reason, epochs) == ("cpu_hours", 9), "an epoch takes a tenth of a second, by the formula"


def test_a_trial_gets_the_threads_of_its_cpus(fates):
    assert fates[1]["needing_two_cpus"].reports[1]["val_top1"] == 1.0


def test_a_trial_without_enough_memory_goes_on_with_a_larger_share(fates, cluster):
    if not cluster.room_for(Share(2.0, 0.0)):
        pytest.skip("needs two cores")
    folder, records = fates
    record = records["needing_two_cpus"]
    assert (record.status, record.attempts) == (TrialStatus.COMPLETED, 2)
    retries = [e for e in read_events(folder / "ledger.jsonl")[0] if e.name == "retry" and e.key == record.key]
    assert [(e.data["reason"], e.data["share"]) for e in retries] == [("oom", [2.0, 0.0])]
    given = {epoch: metrics["val_top1"] for epoch, metrics in record.reports.items()}
    assert given == {1: 1.0, 2: 1.0} | dict.fromkeys(range(3, formulas.EPOCHS + 1), 2.0)
    assert "MemoryError" in (folder / "trials" / str(record.key) / "error.txt").read_text()


@pytest.mark.slow
def test_a_ledger_that_cannot_be_written_ends_the_sweep_and_nothing_is_lost(sweep, tmp_path, monkeypatch):
    """The driver's disk refuses in the middle of a trial; the workers' does not."""
    path, fsync, calls, sections = tmp_path / "s" / "ledger.jsonl", os.fsync, [], {"sweep": {"trials": 3, "asha": None}}

    def refusing(descriptor):
        calls.append(descriptor)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refusing)
        with pytest.raises(SweepTroubleError) as raised:
            sweep(formulas.rising, **sections)
    assert str(raised.value).startswith(f"{path}: No space left on device; the sweep has stopped, nothing is lost")
    before = read_state(path)
    assert (before.stop_reason, len(ended(before)), len(before.running())) == ("", 1, 1)
    assert findings(tmp_path / "s", **sections) == []
    state = sweep(formulas.rising, **sections)
    assert (state.stop_reason, state.counts()["completed"]) == ("finished", 3)
    assert findings(tmp_path / "s", **sections) == []
    assert ended(before).items() <= ended(state).items()
    assert all(r.reports.items() <= state.trials[key].reports.items() for key, r in before.trials.items())


def ended(state):
    """The trials that have an end, with all that is known of them."""
    return {key: (r.status, r.value, r.reports, r.params) for key, r in state.trials.items() if r.status.is_end}


def test_what_no_node_has_is_refused_at_once(sweep):
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"sweep\.cpus_per_trial = 4096: no node has room"):
        sweep(formulas.rising, sweep={"cpus_per_trial": 4096.0})
    with pytest.raises(ResourceError, match=r"sweep\.gpus_per_trial = 64"):
        sweep(formulas.rising, "t", sweep={"gpus_per_trial": 64.0})
    assert time.monotonic() - started < 5


def test_what_the_workers_cannot_import_is_said_before_any_trial(sweep, tmp_path, monkeypatch):
    module = tmp_path / "only_here.py"
    module.write_text("def train(config, report, resume_from=None): pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    with pytest.raises(ResourceError, match=r"cannot be imported .* No module named 'only_here'"):
        sweep(only_here.train)
    assert [e.name for e in read_events(tmp_path / "s" / "ledger.jsonl")[0]] == ["sweep", "driver"]


def test_room_counts_whole_trials_on_each_node():
    cluster = Cluster(nodes=(Share(3.0, 0.0), Share(8.0, 2.0)))

    def room(**settings):
        return cluster.room(formulas.sweep_config(sweep={"max_concurrent": None} | settings))

    assert room(cpus_per_trial=2.0) == 1 + 4
    assert room(cpus_per_trial=1.0, gpus_per_trial=0.25) == 8
    assert room(cpus_per_trial=1.0, gpus_per_trial=0.4) == 4
    assert room(cpus_per_trial=1.0, gpus_per_trial=2.0) == 1
    assert room(cpus_per_trial=1.0, max_concurrent=3) == 3


class AskedAfter:
    """An interruption that is asked for after so many seconds."""

    def __init__(self, seconds):
        self._at = time.monotonic() + seconds

    @property
    def is_asked(self):
        return time.monotonic() > self._at

    def deferred(self):
        return contextlib.nullcontext()

    def check(self):
        pass


def test_a_sweep_that_waits_for_its_first_node_asks_for_it_and_can_be_interrupted(tmp_path, cluster):
    """No node has room, and no autoscaler is there: without one it would be refused at once."""
    config = formulas.sweep_config(
        sweep={"trials": 4, "cpus_per_trial": 64.0, "max_concurrent": None, "autoscale_to": 3}
    )
    told, states = [], lambda: [group["state"] for group in ray.util.placement_group_table().values()]
    with Ledger.create(tmp_path / "ledger.jsonl", Header(sweep="t", id="t", seed=0, trials=4)) as ledger:
        ledger.append(Driver(host="h", pid=os.getpid(), trials=4))
        options = {"cluster": cluster, "folder": tmp_path, "train": formulas.rising}
        with pytest.raises(ResourceError, match="no node has room for a trial"):
            run_sweep(Search(config, ledger), **options)
        before = states().count("PENDING")

        def note(text):
            told.append((text, states().count("PENDING") - before))

        waiting = Search(config, ledger)
        assert run_sweep(waiting, priority=1.0, interruption=AskedAfter(2.5), note=note, **options) == "interrupted"
    assert told == [("the cluster's autoscaler is asked for room for 3 more trials", 0)]
    assert states().count("PENDING") == before
    assert states().count("REMOVED") >= 3
    assert ledger.state.size() == 0


class Turns:
    """Stands for the broker's client: room for trials, then for none until all have ended and their CPUs are free, again."""

    def __init__(self, *_):
        self.begun, self.at_work, self.is_closed, self.was_free = 0, 0, False, False

    def reporting(self):
        return contextlib.nullcontext()

    def tell(self, at_work, most):
        self.at_work = at_work

    def has_room(self):
        return True

    def take(self):
        if self.begun == 2 and not self.was_free:
            self.is_closed = True
            free, there = (found().get("CPU", 0.0) for found in (ray.available_resources, ray.cluster_resources))
            self.was_free = not self.at_work and free == there
            self.is_closed = not self.was_free
        self.begun += not self.is_closed
        return not self.is_closed

    def is_full(self):
        return self.is_closed


@pytest.mark.slow
@pytest.mark.timeout(1500)  # two workers are started, one after the other
def test_a_sweep_whose_room_is_taken_frees_all_cpus_and_goes_on_when_it_has_room_again(tmp_path, cluster, monkeypatch):
    turns = Turns()
    monkeypatch.setattr(ray_tune, "Client", lambda *_: turns)
    config = formulas.sweep_config(sweep={"trials": 4, "asha": None}, baselines=None)
    with Ledger.create(tmp_path / "ledger.jsonl", Header(sweep="t", id="t", seed=0, trials=4)) as ledger:
        ledger.append(Driver(host="h", pid=os.getpid(), trials=4))
        search = Search(config, ledger)
        reason = run_sweep(search, cluster=cluster, folder=tmp_path, train=formulas.rising, priority=1.0)
    assert (reason, turns.was_free, len(ledger.state.ended)) == ("finished", True, 4)
