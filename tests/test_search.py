"""The decisions of a sweep, without Ray: proposals, ASHA, failures, resuming."""

import itertools
import math
import random

import optuna
import pytest
from formulas import DEFAULTS
from formulas import EPOCHS
from formulas import sweep_config
from formulas import value
from optuna.trial import TrialState

from tune_topkd.config import METHODS
from tune_topkd.config import SharedFiles
from tune_topkd.execution.simulated import WorkerLostError
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Share
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_events
from tune_topkd.search import Search
from tune_topkd.search import failing
from tune_topkd.search import samplers
from tune_topkd.search import search as search_module
from tune_topkd.search.search import UndecidedError


def begin(path, config, first=(DEFAULTS,)):
    settings = config.sweep
    header = Header(sweep="t", id="i", seed=settings.seed, trials=settings.trials, first=list(first))
    return Ledger.create(path, header, is_durable=False)


@pytest.fixture
def make(tmp_path):
    """Makes searches over new ledgers."""
    opened = []

    def make(config=None, first=(DEFAULTS,), **options):
        ledger = begin(tmp_path / f"{len(opened)}.jsonl", config or sweep_config(), first)
        opened.append(ledger)
        return Search(config or sweep_config(), ledger, **options)

    yield make
    for ledger in opened:
        ledger.close()


def run(search, at_once=1):
    """Run a search to its end with trials that do as they should."""
    simulate(search, lambda trial, epoch: {"val_top1": value(trial.config, epoch)}, at_once=at_once)
    return search.state


def told(path):
    """A ledger's events without times, and without who drove it when."""
    return [(e.name, e.data) for e in read_events(path)[0] if e.name not in ("driver", "stop", "start")]


def test_a_sweep_has_exactly_its_trials_and_all_baselines(make):
    state = run(make())
    assert [record.key.number for record in state.arm("search")] == list(range(12))
    assert [len(state.arm("ce")), len(state.arm("kd"))] == [2, 2]
    assert state.running() == []
    assert state.stop_reason == "finished"


def started(search, count):
    return [search.next_trial() for _ in range(count)]


def ended(search, records):
    for record in records:
        search.reported(record.key, EPOCHS, {"val_top1": 50.0})


def test_startable_are_the_trials_that_wait_for_no_other_s_end(make):
    search = make(sweep_config(sweep={"asha": None}, baselines={"methods": ["ce"]}))
    assert search.startable() == 12 + 2
    records = started(search, 5)
    assert search.startable() == 7 + 2
    search.lost(records[0].key, "node", "x")
    assert search.startable() == 1 + 7 + 2
    started(search, 8 + 2)
    assert search.startable() == 0


def test_startable_are_the_baselines_that_are_tuned_alike_once_it_is_known_how_many(make):
    settings = {"sweep": {"asha": None, "finalists": None}, "baselines": {"methods": ["kd"], "match": True}}
    search = make(sweep_config(**settings))
    assert search.startable() == 12
    ended(search, started(search, 12))
    assert search.startable() == 12


def test_nothing_is_startable_when_the_time_is_up(make):
    now = iter([0.0, 0.0, 99.0])
    search = make(sweep_config(sweep={"time_budget": 10.0}), clock=lambda: next(now))
    assert search.startable() == 12 + 4
    assert search.startable() == 0


def test_the_first_trial_is_what_the_sweep_was_begun_with(make):
    assert make().next_trial().params == DEFAULTS


def test_proposals_are_a_function_of_the_seed(make):
    def proposals(seed):
        return [r.params for r in run(make(sweep_config(sweep={"trials": 14, "seed": seed}))).arm("search")]

    assert proposals(0) == proposals(0)
    assert proposals(0)[1:] != proposals(1)[1:]
    assert len({repr(p) for p in proposals(0)}) == 14


def test_scales_are_ordered_and_weights_relative_in_every_trial(make):
    for record in run(make(sweep_config(sweep={"trials": 40}))).arm("search"):
        p = record.params
        assert 1.0 <= p["scale_last"] <= p["scale_top"] <= p["scale_gt"] <= 6.0
        assert math.isclose(p["ce_weight"] + p["tdl_weight"], 2.0)
        assert isinstance(p["k"], int)
        assert 1 <= p["k"] <= 20


def test_the_search_finds_the_better_region(make):
    state = run(make(sweep_config(sweep={"trials": 60, "asha": None})))
    early = [r.value for r in state.arm("search")[1:11]]
    late = [r.value for r in state.arm("search")[-10:]]
    assert sum(late) / 10 > sum(early) / 10 + 5
    assert abs(state.best().params["k"] - 4) <= 1


def test_asha_stops_the_loser_at_the_rung_and_optuna_has_all_its_values(make):
    search = make()
    good, bad = search.next_trial(), search.next_trial()
    for record, level in ((good, 50.0), (bad, 40.0)):
        search.reported(record.key, 1, {"val_top1": level})
    assert good.status is TrialStatus.RUNNING
    assert (bad.status, bad.reason, bad.value) == (TrialStatus.PRUNED, "asha at epoch 1", 40.0)
    frozen = search.sampler.study.trials[1]
    assert (frozen.state, frozen.intermediate_values) == (TrialState.PRUNED, {1: 40.0})
    assert search.sampler.study.trials[0].state is TrialState.RUNNING


def test_rungs_are_at_grace_times_reduction_to_the_power(make):
    search = make()
    keys = [search.next_trial().key for _ in range(2)]
    decisions = {}
    for epoch in range(1, EPOCHS + 1):
        search.reported(keys[0], epoch, {"val_top1": 50.0 + epoch})
    for epoch in range(1, EPOCHS + 1):  # as good at the first rung, worse at the second
        decisions[epoch] = search.reported(keys[1], epoch, {"val_top1": 51.0})
        if decisions[epoch] is Decision.PRUNE:
            break
    assert decisions == {1: Decision.CONTINUE, 2: Decision.CONTINUE, 3: Decision.PRUNE}


def test_a_trial_at_full_budget_completes_with_its_last_value(make):
    search = make()
    record = search.next_trial()
    for epoch in range(1, EPOCHS + 1):
        decision = search.reported(record.key, epoch, {"val_top1": 90.0 - epoch})
    assert decision is Decision.COMPLETE
    assert (record.status, record.value) == (TrialStatus.COMPLETED, 90.0 - EPOCHS)
    assert search.sampler.study.trials[0].value == 90.0 - EPOCHS


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["val_top1", "train_loss"])
def test_a_number_that_is_none_ends_the_trial_at_once(make, bad, name):
    search = make()
    record = search.next_trial()
    search.reported(record.key, 1, {"val_top1": 50.0, "train_loss": 1.0})
    decision = search.reported(record.key, 2, {"val_top1": 99.0, "train_loss": 1.0, name: bad})
    assert decision is Decision.DIVERGED
    assert (record.status, record.reason, record.value) == (TrialStatus.FAILED, "diverged", None)
    assert "epoch 2" in record.error
    frozen = search.sampler.study.trials[0]
    assert (frozen.state, frozen.intermediate_values) == (TrialState.PRUNED, {})
    assert search.state.best() is None


FAILURES = ("error", "diverged", "oom")


def fail(way, k):
    """The formula of a trial that ends without an answer."""
    if way == "oom":
        raise WorkerLostError("oom", f"MemoryError: k = {k}", Share(2.0, 0.0))
    if way == "error":
        raise ValueError(f"k = {k}")
    return {"val_top1": math.nan}


def half_failing(make, seed, trials, way):
    """A search in whose space half of k fails, `way(record)` saying how, and the rest completes after one epoch."""
    sections = {"space": {"k": {"low": 1, "high": 20}}, "baselines": None, "recipe": {"epochs": 1}}
    search = make(sweep_config(sweep={"trials": trials, "seed": seed, "asha": None}, **sections), first=())

    def formula(trial, epoch):
        k = trial.record.params["k"]
        return fail(way(trial.record), k) if k > 10 else {"val_top1": 50.0 + trial.record.params["scale_top"]}

    simulate(search, formula, at_once=1)
    for event, following in itertools.pairwise(read_events(search.ledger.path)[0]):
        assert event.name != "retry" or (following.name, following.key) == ("start", event.key)
    return search


def test_a_region_that_always_fails_is_left(make):
    """Told as FAIL, TPE proposes it for ever: about 11 useful trials of 100 instead of about 88."""
    useful, seen = [], set()
    for seed in range(6):
        search = half_failing(make, seed, 100, lambda record: FAILURES[record.key.number % 3])
        assert len(search.state.arm("search")) == 100
        useful.append(search.state.counts()["completed"])
        seen |= {record.reason for record in search.state.arm("search")}
    assert sum(useful) / len(useful) >= 80, useful
    assert seen == {"full budget", *FAILURES}


def test_failures_of_every_kind_weigh_the_same(make):
    proposals = []
    for kind in FAILURES:
        search = half_failing(make, 0, 40, lambda record, kind=kind: kind)
        assert search.state.counts()["failed"] >= 10
        assert {trial.state for trial in search.sampler.study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
        proposals.append([record.proposal for record in search.state.arm("search")])
    assert proposals[0] == proposals[1] == proposals[2]


def test_the_best_is_one_that_reached_the_full_budget(make):
    search = make(sweep_config(sweep={"asha": None}))
    short, full = search.next_trial(), search.next_trial()
    search.reported(short.key, 1, {"val_top1": 99.0})
    for epoch in range(1, EPOCHS + 1):
        search.reported(full.key, epoch, {"val_top1": 60.0})
    search.failed(short.key, "error", "RuntimeError: late")
    assert search.state.best() is full


def test_an_epoch_reported_again_changes_nothing(make):
    search = make()
    record = search.next_trial()
    search.reported(record.key, 1, {"val_top1": 50.0})
    before = search.state.last_seq
    assert search.reported(record.key, 1, {"val_top1": 10.0}) is Decision.CONTINUE
    assert search.state.last_seq == before
    assert record.reports == {1: {"val_top1": 50.0}}


def test_a_report_after_the_end_repeats_the_decision(make):
    search = make()
    good, bad = search.next_trial(), search.next_trial()
    search.reported(good.key, 1, {"val_top1": 50.0})
    search.reported(bad.key, 1, {"val_top1": 40.0})
    assert search.reported(bad.key, 2, {"val_top1": 99.0}) is Decision.PRUNE
    assert bad.epoch == 1


def test_baselines_cover_the_learning_rates_are_never_stopped_and_have_default_losses(make):
    search = make()
    state = run(search)
    assert [r.params for r in state.arm("kd")] == [{"lr": 0.01}, {"lr": 1.0}]
    assert all(r.status is TrialStatus.COMPLETED for arm in ("ce", "kd") for r in state.arm(arm))
    config = search.trial_config(state.arm("kd")[1], SharedFiles(teacher_checkpoint="/t.pt"))
    assert (config.method, config.loss, config.recipe.lr, config.recipe.epochs) == ("kd", {}, 1.0, EPOCHS)
    assert {"ce", "kd"} <= set(METHODS)


def test_without_a_searched_recipe_a_baseline_runs_once(make):
    config = sweep_config(space={"lr": {"low": 0.01, "high": 1.0}})
    fixed = {name: r for name, r in config.space.items() if name != "lr"}
    state = run(make(config.model_copy(update={"space": fixed}), first=()))
    assert [len(state.arm("ce")), len(state.arm("kd"))] == [1, 1]


def test_a_trial_gets_the_fixed_the_searched_and_the_recipe(make):
    config = sweep_config(loss={"alpha": 2.5}, sweep={"seed": 7})
    search = make(config)
    trial = search.trial_config(search.next_trial(), SharedFiles(teacher_checkpoint="/t.pt"))
    assert trial.loss == {"alpha": 2.5} | {name: v for name, v in DEFAULTS.items() if name != "lr"}
    assert (trial.recipe.lr, trial.seed, trial.teacher_checkpoint) == (0.1, 7, "/t.pt")
    assert trial.teacher.name == "digits_cnn"


# --- the error that every trial makes ------------------------------------------------------------------------------

OWN = [
    "FileNotFoundError: [Errno 2] No such file or directory: '/scratch/job-{n}/trial {key}/data.bin'",
    "OSError: /scratch/{key}/epoch-000{n}/weights.pt is not there",
    "RuntimeError: worker 7{n}31 (pid 41{n}) has no network",
    "TypeError: <tensor at 0x7f{n}c0ffee> takes no index",
    "RuntimeError: lost connection 3f2504e0-4f89-11d3-9a0c-0305e82c330{n} after {n}.25 s",
    r"OSError: C:\Users\me\run{n}\data.bin is not there",
    "RuntimeError: trial {key} of 12 cannot start",
]


def fail_alike(search, count, text="OSError: no data"):
    """End the next so many trials with an error, each with its own number and label in it; the sweep goes on from there."""
    for n in range(count):
        record = search.next_trial()
        if record is None:
            return n
        search.failed(record.key, "error", text.format(n=n % 10, key=record.key))
    return count


def succeed(search):
    record = search.next_trial()
    for epoch in range(1, EPOCHS + 1):
        if search.reported(record.key, epoch, {"val_top1": 50.0 + epoch}) is not Decision.CONTINUE:
            return record
    raise AssertionError("it had an end")


@pytest.mark.parametrize("text", ["OSError: no data", *OWN])
def test_the_error_that_every_trial_makes_ends_the_sweep_whatever_of_a_trials_own_it_names(make, text):
    search = make()
    assert fail_alike(search, 12, text) == 3
    assert search.fatal == search.state.trials[TrialKey("search", 2)].error
    assert search.stopped() == "failed"


def test_errors_of_different_causes_do_not_end_the_sweep(make):
    search = make()
    for error in ["OSError: no data", "KeyError: 'lr'", "ValueError: no data", "OSError: no date"] * 2:
        search.failed(search.next_trial().key, "error", error)
    for reason in ("error", "crash", "oom", "error"):
        search.failed(search.next_trial().key, reason, "the same words")
    assert search.fatal == ""


def test_an_error_that_names_the_trials_own_parameter_speaks_of_the_space(make):
    search = make(sweep_config(sweep={"trials": 40}))
    given = set()
    while len(given) < 3:
        record = search.next_trial()
        given.add(record.params["k"])
        search.failed(record.key, "error", f"ValueError: k must be at most 0, but got {record.params['k']}")
    assert search.fatal == ""
    assert fail_alike(search, 40, "ValueError: k must be at most 0, but got {n}17") <= 20, "but not for ever"


def test_after_a_success_a_long_row_of_the_same_error_ends_the_sweep_and_the_answer_stays(make):
    search = make(sweep_config(sweep={"trials": 200, "startup_trials": 200}))
    best = succeed(search)
    assert fail_alike(search, 199, OWN[0]) == failing.SAME_ERRORS_AFTER_A_SUCCESS
    assert search.stopped() == "failed"
    assert search.state.best() is best


def test_a_success_in_between_begins_the_count_again(make):
    search = make(sweep_config(sweep={"trials": 200, "startup_trials": 200, "asha": None}))
    for _ in range(3):
        succeed(search)
        assert fail_alike(search, failing.SAME_ERRORS_AFTER_A_SUCCESS - 1) == failing.SAME_ERRORS_AFTER_A_SUCCESS - 1
    assert search.fatal == ""


def test_the_ends_of_all_arms_count_in_their_order(make):
    search = make(sweep_config(sweep={"trials": 1}), first=())
    fail_alike(search, 3)
    assert [record.key.arm for record in search.state.ended] == ["search", "ce", "ce"]
    assert search.fatal == "OSError: no data"


def test_trials_that_all_diverge_end_the_sweep_too_but_only_after_many(make):
    search = make(sweep_config(sweep={"trials": 100, "startup_trials": 100}))

    def formula(trial, epoch):
        return {"val_top1": math.nan if epoch == 1 + trial.record.key.number % 3 else 50.0}

    assert simulate(search, formula, at_once=1) == "failed"
    assert len(search.state.ended) == failing.SAME_ERRORS_AFTER_A_SUCCESS
    assert {record.reason for record in search.state.ended} == {"diverged"}


def test_half_a_space_that_fails_alike_does_not_end_a_sweep_that_began_well(make):
    """All failures have one cause, with and without the parameter in it; the first trial is the published default."""

    def formula(trial, epoch):
        if trial.record.params["k"] > 10:
            raise RuntimeError("CUDA error: an illegal memory access")
        return {"val_top1": 50.0 + trial.record.params["scale_top"]}

    for seed in range(4):
        sections = {"space": {"k": {"low": 1, "high": 20}}, "baselines": None, "recipe": {"epochs": 1}}
        settings = {"trials": 60, "seed": seed, "asha": None}
        search = make(sweep_config(sweep=settings, **sections))
        simulate(search, formula, at_once=1)
        assert (search.fatal, search.state.size()) == ("", 60), seed


@pytest.mark.parametrize("successes", [0, 2])
def test_a_sweep_of_the_same_error_cut_after_any_line_stops_where_an_uninterrupted_one_does(tmp_path, successes):
    config = sweep_config(sweep={"trials": 60, "startup_trials": 60})

    def formula(trial, epoch):
        if trial.record.key.number >= successes:
            raise OSError(f"/scratch/{trial.record.key}/data is not there")
        return {"val_top1": 50.0}

    def driven(ledger):
        ledger.append(Driver(host="h", pid=1, trials=60))
        return simulate(Search(config, ledger), formula, at_once=1)

    path = tmp_path / "whole.jsonl"
    with begin(path, config) as ledger:
        assert driven(ledger) == "failed"
        count = len(ledger.state.ended)
    assert count == successes + (failing.SAME_ERRORS_AFTER_A_SUCCESS if successes else 3)
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines), 1 if successes == 0 else 5):
        part = tmp_path / f"cut{cut}.jsonl"
        part.write_bytes(b"".join(lines[:cut]))
        with Ledger.open(part) as ledger:
            assert driven(ledger) == "failed", cut
        assert told(part) == told(path), cut
    with Ledger.open(path) as ledger:  # a person has read why and goes on
        assert driven(ledger) == "failed"
        assert len(ledger.state.ended) > count, "what was given up is tried anew"


def test_after_the_time_budget_nothing_new_starts(make):
    now = [0.0]
    search = make(sweep_config(sweep={"time_budget": 10.0}), clock=lambda: now[0])
    assert search.next_trial() is not None
    now[0] = 10.0
    assert search.out_of_time
    assert search.next_trial() is None
    assert search.stopped() == "time_budget"


class Raising:
    calls = 0

    def notify(self, event):
        self.calls += 1
        raise ConnectionError("gone")

    def close(self):
        """Nothing to close."""


class Listening(Raising):
    def notify(self, event):
        self.calls += 1


def test_a_tracker_that_raises_is_named_dropped_and_the_sweep_goes_on(make, caplog):
    broken, sound = Raising(), Listening()
    state = run(make(trackers=[broken, sound]))
    assert state.stop_reason == "finished"
    assert broken.calls == 1
    assert sound.calls == state.last_seq
    assert "Raising" in caplog.text
    assert "gone" in caplog.text


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_sweep_cut_anywhere_goes_on_as_if_it_had_not_been(tmp_path, at_once):
    """Kill after any line: what is in the ledger at the end is what an uninterrupted sweep writes."""
    config = sweep_config()
    path = tmp_path / "whole.jsonl"
    with begin(path, config) as ledger:
        run(Search(config, ledger), at_once)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) > 60
    for cut in random.Random(0).sample(range(1, len(lines)), 12):
        part = tmp_path / f"cut{cut}.jsonl"
        part.write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
        with Ledger.open(part, is_durable=False) as ledger:
            run(Search(config, ledger), at_once)
        if at_once == 1:
            assert told(part) == told(path), cut
        with Ledger.open(part) as ledger:
            assert len(ledger.state.arm("search")) == 12
            assert ledger.state.running() == []


def test_an_end_that_a_kill_left_out_is_written_at_the_next_start(tmp_path):
    config = sweep_config()
    path = tmp_path / "l.jsonl"
    with begin(path, config) as ledger:
        run(Search(config, ledger))
    lines = path.read_bytes().splitlines(keepends=True)
    last_report = max(i for i, line in enumerate(lines) if b'"decision":"complete"' in line and b'"search"' in line)
    path.write_bytes(b"".join(lines[: last_report + 1]))
    with Ledger.open(path) as ledger:
        assert len(ledger.state.running()) == 1
        search = Search(config, ledger)
        assert ledger.state.running() == []
        assert search.sampler.study.trials[-1].state is TrialState.COMPLETE


def test_one_trial_in_ten_that_turns_to_nan_costs_no_epoch_more_and_no_place_in_the_study(make):
    """The NaN comes at any epoch, also at one where ASHA looks, and is not the best even where all before it was."""
    chance = random.Random(0)
    spoiled = {number: chance.randint(1, EPOCHS) for number in chance.sample(range(60), 6)}
    search = make(sweep_config(sweep={"trials": 60, "asha": {"grace_epochs": 3}}, baselines=None))

    def formula(trial, epoch):
        number = trial.record.key.number
        reported = 10 * value(trial.config, epoch) if number in spoiled else 1.0
        return {"val_top1": math.nan if epoch == spoiled.get(number) else reported + number}

    simulate(search, formula, at_once=3)
    records = search.state.arm("search")
    diverged = {r.key.number: r.epoch for r in records if r.reason == "diverged"}
    assert diverged
    assert diverged == {number: epoch for number, epoch in spoiled.items() if records[number].epoch >= epoch}
    finite = [r for r in records if r.status is TrialStatus.COMPLETED]
    assert all(map(math.isfinite, (r.value for r in finite)))
    assert search.state.best() is max(finite, key=lambda r: r.value)
    assert {trial.state for trial in search.sampler.study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}


# --- workers that are lost ----------------------------------------------------------------------------------------

WIDE = Share(2.0, 0.0)


def reopened(search):
    """The search of the next driver, from the ledger that this one leaves."""
    search.ledger.close()
    return Search(search.config, Ledger.open(search.ledger.path))


def begun(make, epochs=2, **settings):
    """A search and its first trial, which has reported some epochs."""
    search = make(sweep_config(sweep={"trials": 4, "asha": None, **settings}, baselines=None))
    record = search.next_trial()
    search.started(record.key)
    for epoch in range(1, epochs + 1):
        search.reported(record.key, epoch, {"val_top1": 50.0})
    return search, record


def test_a_crash_is_retried_so_often_and_then_is_the_trials_end(make):
    search, record = begun(make, max_failures=2)
    for attempt in (2, 3):
        assert search.lost(record.key, "crash", "the worker died")
        assert search.next_trial() is record
        search.started(record.key)
        assert record.attempts == attempt
    assert not search.lost(record.key, "crash", "the worker died")
    assert (record.status, record.reason, record.error) == (TrialStatus.FAILED, "crash", "the worker died")
    assert record.retries == ["crash", "crash"]
    assert search.sampler.study.trials[0].state is TrialState.PRUNED
    assert search.next_trial().key.number == 1


def test_crashes_of_earlier_drivers_count(make):
    search, record = begun(make, max_failures=1)
    assert search.lost(record.key, "crash", "the worker died")
    search = reopened(search)
    assert search.next_trial().key == record.key
    assert not search.lost(record.key, "crash", "the worker died")
    assert search.state.trials[record.key].reason == "crash"
    search.ledger.close()


def test_what_had_too_little_memory_gets_a_larger_share_once_and_keeps_it(make):
    search, record = begun(make)
    assert record.share is None
    assert search.lost(record.key, "oom", "MemoryError: ", WIDE)
    assert read_events(search.ledger.path)[0][-1].data["share"] == [2.0, 0.0]
    search = reopened(search)
    again = search.next_trial()
    assert (again.key, again.share, again.retries, again.epoch) == (record.key, WIDE, ["oom"], 2)
    assert search.lost(again.key, "crash", "the worker died")
    assert search.next_trial().share == WIDE
    assert not search.lost(again.key, "oom", "MemoryError: ", Share(4.0, 0.0))
    assert (again.status, again.reason, again.error) == (TrialStatus.FAILED, "oom", "MemoryError: ")
    search.ledger.close()


def test_without_a_larger_share_too_little_memory_is_the_end(make):
    search, record = begun(make)
    assert not search.lost(record.key, "oom", "MemoryError: ", None)
    assert (record.status, record.reason, record.retries) == (TrialStatus.FAILED, "oom", [])


def test_a_lost_node_is_not_the_trials_fault(make):
    search, record = begun(make, max_failures=1)
    for _ in range(20):
        assert search.lost(record.key, "node", "its node is gone")
        assert search.next_trial() is record
    assert search.lost(record.key, "crash", "the worker died")
    assert search.next_trial() is record
    assert search.lost(record.key, "oom", "MemoryError: ", WIDE)
    assert search.next_trial() is record
    assert search.lost(record.key, "node", "its node is gone")
    assert record.share == WIDE
    assert not record.status.is_end


def test_a_trial_that_loses_node_after_node_without_an_epoch_fails(make):
    search, record = begun(make)
    lost = 0
    while search.lost(record.key, "node", "its node is gone"):
        lost += 1
        assert search.next_trial() is record
    assert lost == search_module.NODES_LOST_WITHOUT_AN_EPOCH
    assert (record.status, record.reason) == (TrialStatus.FAILED, "node")
    assert record.error == f"{lost + 1} nodes were lost under it without an epoch in between: its node is gone"
    assert search.next_trial().key.number == 1


def test_a_trial_that_gets_on_may_lose_any_number_of_nodes_also_of_earlier_drivers(make):
    search, record = begun(make, epochs=0)
    for epoch in range(1, EPOCHS):
        for _ in range(search_module.NODES_LOST_WITHOUT_AN_EPOCH // 2):
            assert search.lost(record.key, "node", "its node is gone")
            assert search.next_trial() is record
        search = reopened(search)
        record = search.next_trial()
        for _ in range(search_module.NODES_LOST_WITHOUT_AN_EPOCH // 2):
            assert search.lost(record.key, "node", "its node is gone")
            assert search.next_trial() is record
        search.reported(record.key, epoch, {"val_top1": 50.0})
    assert not record.status.is_end
    search.ledger.close()


def test_a_loss_that_is_told_twice_gives_the_trial_out_once(make):
    search, record = begun(make)
    for _ in range(2):
        assert search.lost(record.key, "node", "its node is gone")
    assert [search.next_trial().key.number for _ in range(2)] == [0, 1]


@pytest.mark.parametrize("reason", ["crash", "oom", "node"])
def test_a_worker_lost_after_its_trials_end_changes_nothing(make, reason):
    search, record = begun(make, epochs=EPOCHS)
    assert record.status is TrialStatus.COMPLETED
    before = search.state.last_seq
    assert not search.lost(record.key, reason, "late", WIDE)
    search.started(record.key)
    search.failed(record.key, "error", "later")
    assert search.state.last_seq == before
    assert (record.status, record.attempts, record.retries) == (TrialStatus.COMPLETED, 1, [])
    assert search.next_trial().key.number == 1


def test_the_lost_trial_comes_before_new_ones_with_the_same_parameters(make):
    search, first = begun(make)
    second = search.next_trial()
    params = dict(first.params), dict(second.params)
    search.lost(second.key, "crash", "the worker died")
    search.lost(first.key, "node", "its node is gone")
    assert [search.next_trial() for _ in range(2)] == [second, first]
    assert (first.params, second.params) == params
    assert search.next_trial().key.number == 2


def test_a_trial_lost_after_the_time_budget_is_left_to_the_next_driver(make):
    now = [0.0]
    search = make(sweep_config(sweep={"time_budget": 10.0}), clock=lambda: now[0])
    record = search.next_trial()
    now[0] = 10.0
    assert search.lost(record.key, "crash", "the worker died")
    assert search.next_trial() is None
    assert search.stopped() == "time_budget"
    search = reopened(search)
    assert search.next_trial().key == record.key
    search.ledger.close()


class Noting(Search):
    """Keeps what it gives out: the trial, how often it has been retried, its epoch."""

    def __init__(self, config, ledger):
        super().__init__(config, ledger)
        self.given = []

    def next_trial(self):
        record = super().next_trial()
        if record is not None:
            self.given.append((record.key, len(record.retries), record.epoch))
        return record


def faulty(search, at_once):
    """Run a search whose workers are lost in every way, as a function of the ledger alone; the trials as given out."""

    def formula(trial, epoch):
        record = trial.record
        after, reason = LOSSES.get((record.key, len(record.retries)), (None, ""))
        if epoch - 1 == after:
            raise WorkerLostError(reason, f"{reason} of {record.key}", WIDE)
        return {"val_top1": value(trial.config, epoch)}

    simulate(search, formula, at_once=at_once)
    return search.given


LOSSES = {
    (TrialKey("search", 0), 0): (2, "crash"),
    (TrialKey("search", 0), 1): (2, "crash"),
    (TrialKey("search", 1), 0): (0, "node"),
    (TrialKey("search", 1), 1): (0, "oom"),
    (TrialKey("search", 2), 0): (0, "oom"),
    (TrialKey("search", 2), 1): (0, "oom"),
    (TrialKey("search", 3), 0): (0, "crash"),
    (TrialKey("search", 3), 1): (0, "crash"),
    (TrialKey("search", 3), 2): (0, "crash"),
    (TrialKey("kd", 0), 0): (4, "node"),
}
"""By trial and retries so far: the epoch after which its worker is lost, and to what."""


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_sweep_that_lost_workers_and_is_cut_anywhere_ends_with_the_same_trials(tmp_path, at_once):
    """After each line of it a new driver gives out every trial at work, once, and nothing is retried twice."""
    config = sweep_config(sweep={"trials": 6, "max_failures": 2}, recipe={"epochs": 5})
    path = tmp_path / "whole.jsonl"
    with begin(path, config) as ledger:
        faulty(Noting(config, ledger), at_once)
        whole = ledger.state
    reasons = {(r.key.number, r.reason) for r in whole.arm("search") if r.status is TrialStatus.FAILED}
    assert reasons == {(2, "oom"), (3, "crash")}
    assert [whole.trials[TrialKey("search", n)].retries for n in range(4)] == [
        ["crash", "crash"],
        ["node", "oom"],
        ["oom"],
        ["crash", "crash"],
    ]
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines)):
        part = tmp_path / "cut.jsonl"
        part.write_bytes(b"".join(lines[:cut]))
        with Ledger.open(part, is_durable=False) as ledger:
            search = Noting(config, ledger)
            running = [r.key for r in ledger.state.running()]
            given = faulty(search, at_once)
            assert sorted(key for key, *_ in given[: len(running)]) == sorted(running), cut
            assert len(set(given)) == len(given), cut
            state = ledger.state
        assert state.stop_reason == "finished", cut
        assert {key: r.retries for key, r in state.trials.items()} == {k: r.retries for k, r in whole.trials.items()}
        assert all(list(r.reports) == list(range(1, r.epoch + 1)) for r in state.trials.values()), cut
        if at_once == 1:
            assert told(part) == told(path), cut


# --- long sweeps ----------------------------------------------------------------------------------------------------


def test_the_sampler_looks_at_the_best_the_newest_and_those_at_work(make, monkeypatch):
    monkeypatch.setattr(samplers, "LONGEST_HISTORY", 10)
    search = make(sweep_config(sweep={"trials": 40, "startup_trials": 5, "asha": None}))
    looked_at = []
    beside = samplers.TpeSampler._beside

    def looking(self, trials, number):
        looked_at.append([trial.number for trial in trials])
        return beside(self, trials, number)

    monkeypatch.setattr(samplers.TpeSampler, "_beside", looking)
    oldest = search.next_trial()  # is never told
    state = run(search)
    best = sorted((r for r in state.arm("search")[:39] if r.value is not None), key=lambda r: -r.value)[:2]
    assert {oldest.key.number, *(r.key.number for r in best), *range(31, 39)} == set(looked_at[-1])
    assert max(map(len, looked_at)) <= 11


@pytest.mark.parametrize("longest", [500, 10])
def test_a_sampler_that_is_shown_trials_proposes_what_one_that_has_them_does(make, monkeypatch, longest):
    monkeypatch.setattr(samplers, "LONGEST_HISTORY", longest)
    search = make(sweep_config(sweep={"trials": 40, "startup_trials": 5}))
    running = [search.next_trial() for _ in range(2)]
    search.failed(search.next_trial().key, "error", "E: x")
    run(search)
    proposer = search.sampler
    history = proposer._history()
    assert {trial.state for trial in history} >= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING}
    for number in (40, 41):
        study = optuna.create_study(direction="maximize", sampler=proposer._sampler(number))
        study.add_trials(history)
        assert proposer.ask(number) == study.ask(proposer.distributions).params
    assert [trial.number for trial in proposer.study.trials] == list(range(40))
    assert [record.key.number for record in running] == [0, 1]


def test_a_sampler_that_is_told_the_space_proposes_what_optunas_own_does(make):
    """The first axis has one value alone, which Optuna does not model."""
    space = {"scale_top": {"low": 2.0, "high": 2.0}}
    search = make(sweep_config(space=space, sweep={"trials": 30, "startup_trials": 5}), first=())
    proposer = search.sampler
    for number in range(30):
        seed = proposer._sampler(number)._rng.rng.randint(2**31)
        ours = proposer._sampler(number)
        own = optuna.samplers.TPESampler(n_startup_trials=5, multivariate=True, constant_liar=True)
        for sampler in (ours, own):
            sampler.reseed_rng()
            sampler._rng.rng.seed(seed)
            sampler._random_sampler._rng.rng.seed(seed)
        asked = []
        for sampler in (ours, own):
            study = optuna.create_study(direction="maximize", sampler=sampler)
            study.add_trials(proposer._history())
            asked.append(study.ask(proposer.distributions).params)
        assert asked[0] == asked[1], number
        record = search.next_trial()
        if number % 4 != 2:
            search.reported(record.key, EPOCHS, {"val_top1": value(search.trial_config(record), EPOCHS)})


def test_a_ledger_whose_proposals_do_not_fit_the_space_is_told_in_one_line(tmp_path):
    config = sweep_config()
    path = tmp_path / "l.jsonl"
    with begin(path, config) as ledger:
        Search(config, ledger).next_trial()
    narrow = sweep_config(space={"scale_top": {"low": 3.0, "high": 3.5}})
    with (
        Ledger.open(path) as ledger,
        pytest.raises(UndecidedError, match=r"trial 0000 does not fit the space: scale_top must be .+") as told,
    ):
        Search(narrow, ledger)
    assert "\n" not in str(told.value)


def test_a_long_sweep_cut_anywhere_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(samplers, "LONGEST_HISTORY", 5)
    test_a_sweep_cut_anywhere_goes_on_as_if_it_had_not_been(tmp_path, 1)
