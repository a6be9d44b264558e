"""The audit: silent on what a sweep wrote, and loud on anything else."""

import json
import math
import shutil
import sys
import zlib

import formulas
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from tune_topkd.execution.checkpoints import write_checkpoint
from tune_topkd.execution.simulated import WorkerLostError
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Share
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import read_events
from tune_topkd.search import Search
from tune_topkd.search import TpeSampler
from tune_topkd.search import audit
from tune_topkd.sweep import audit_sweep

TRIALS = 14


def config(**sections):
    settings = {"trials": TRIALS, "startup_trials": 4, "max_failures": 1}
    return formulas.sweep_config(sweep=settings, **{"baselines": {"trials": 2}} | sections)


def drive(folder, config, at_once=2, reports=None, faults=True):
    """Run formula trials beside one another, some of them lost, one diverging; let go after so many reports, if given."""
    path = folder / "ledger.jsonl"
    if path.exists():
        ledger = Ledger.open(path, is_durable=False)
    else:
        header = Header(sweep="t", id="i", seed=config.sweep.seed, trials=TRIALS, first=[formulas.DEFAULTS])
        ledger = Ledger.create(path, header, is_durable=False)

    def formula(trial, epoch):
        key, retries = trial.record.key, trial.record.retries
        if faults and key.number % 5 == 3 and not retries:
            raise WorkerLostError("node" if key.number == 8 else "crash", "it died")
        if faults and key == ("search", 6) and epoch == 1:
            raise WorkerLostError("oom", "MemoryError: ", Share(2.0, 0.0) if not retries else None)
        metrics = {"val_top1": float("nan") if faults and key == ("search", 7) else formulas.value(trial.config, epoch)}
        place = folder / "trials" / str(key)
        place.mkdir(parents=True, exist_ok=True)
        write_checkpoint(place, epoch, metrics, lambda f: (f / "w").write_text("w"))
        return metrics

    with ledger:
        ledger.append(Driver.here(trials=TRIALS))
        simulate(Search(config, ledger), formula, at_once=at_once, reports=reports)
        return ledger.state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished sweep's folder; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    state = drive(folder, config())
    assert state.stop_reason == "finished"
    assert {r.status.value for r in state.trials.values()} == {"completed", "pruned", "failed"}
    assert {reason for r in state.trials.values() for reason in r.retries} == {"crash", "node", "oom"}
    return folder


@pytest.mark.parametrize("at_once", [1, 3])
def test_nothing_is_wrong_with_a_sweep(tmp_path, at_once):
    drive(tmp_path, config(), at_once)
    assert audit_sweep(config(), tmp_path) == []


def test_nothing_is_wrong_with_a_sweep_that_was_interrupted_and_gone_on_with(tmp_path):
    state = None
    for reports in (5, 17, 30, None):
        state = drive(tmp_path, config(), reports=reports)
        assert audit_sweep(config(), tmp_path) == []
    assert state.stop_reason == "finished"


def test_nothing_is_wrong_with_a_sweep_that_was_killed_at_any_line(tmp_path, whole):
    lines = (whole / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines), 7):
        part = tmp_path / str(cut)
        part.mkdir()
        (part / "ledger.jsonl").write_bytes(b"".join(lines[:cut]))
        found = audit_sweep(config(), part)
        assert all("no checkpoint" in finding for finding in found), cut  # this one has none


def test_only_some_proposals_of_a_long_sweep_are_drawn_again(whole, monkeypatch):
    drawn = []
    ask = TpeSampler.ask
    monkeypatch.setattr(TpeSampler, "ask", lambda self, n: drawn.append(n) or ask(self, n))
    audit_sweep(config(), whole)
    assert drawn == list(range(1, TRIALS))
    drawn.clear()
    monkeypatch.setattr(audit, "PROPOSALS_DRAWN_AGAIN", 5)
    assert audit_sweep(config(), whole) == []
    assert drawn == [3, 6, 9, 12]


def test_an_audit_of_four_times_the_trials_makes_about_four_times_the_calls(tmp_path, monkeypatch):
    """What is called is counted, not timed: copies of all trials for each of them would make sixteen times as many."""
    monkeypatch.setattr(audit, "PROPOSALS_DRAWN_AGAIN", 4)
    calls = {}
    for trials in (40, 160):
        settings = {"trials": trials, "startup_trials": 1000, "max_failures": 1}
        long = formulas.sweep_config(sweep=settings, baselines=None, recipe={"epochs": 2})
        folder = tmp_path / str(trials)
        folder.mkdir()
        monkeypatch.setattr(sys.modules[__name__], "TRIALS", trials)
        drive(folder, long, faults=False)
        counted = 0

        def count(frame, event, argument):
            nonlocal counted
            counted += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            found = audit_sweep(long, folder)
        finally:
            sys.setprofile(None)
        assert found == []
        calls[trials] = counted
    assert calls[160] < 5 * calls[40], calls


def test_a_sweep_that_all_trials_of_one_error_ended_is_right_and_one_that_was_given_up_without_is_not(tmp_path, whole):
    path = tmp_path / "ledger.jsonl"
    header = Header(sweep="t", id="i", seed=0, trials=TRIALS, first=[formulas.DEFAULTS])

    def absent(trial, epoch):
        raise OSError(f"/scratch/{trial.record.key} is not there")

    with Ledger.create(path, header, is_durable=False) as ledger:
        for _ in range(2):  # the second driver goes on where the first has given up
            ledger.append(Driver.here(trials=TRIALS))
            assert simulate(Search(config(), ledger), absent, at_once=1) == "failed"
    assert audit_sweep(config(), tmp_path) == []
    events = events_of(tmp_path)
    del events[first(events, "stop") : first(events, "stop") + 2]  # as if the first had gone on by itself
    write(tmp_path, events)
    assert "line 12: trial 0003 is suggested although the newest have all failed alike" in audit_sweep(
        config(), tmp_path
    )
    events = [e for e in events_of(whole) if e[0] != "stop"]
    write(tmp_path, [*events, ("stop", {"reason": "failed", "error": "no"})])
    found = audit_sweep(config(), tmp_path)
    assert any("is given up although its trials do not all fail alike" in finding for finding in found)


def events_of(folder):
    return [(e.name, json.loads(json.dumps(dict(e.data)))) for e in read_events(folder / "ledger.jsonl")[0]]


def write(folder, events):
    """A ledger that is as it was written, whatever it says."""
    lines = []
    for seq, (name, data) in enumerate(events):
        body = json.dumps({"seq": seq, "time": 0.0, "event": name, **data}, separators=(",", ":")).encode()[:-1]
        lines.append(b'%s,"crc":"%08x"}\n' % (body, zlib.crc32(body)))
    (folder / "ledger.jsonl").write_bytes(b"".join(lines))


def first(events, name, **wanted):
    """The place of the first event of this name whose data are as wanted."""
    return next(
        i for i, (n, data) in enumerate(events) if n == name and all(data.get(k) == v for k, v in wanted.items())
    )


def change(name, **changes):
    """A change of the first event of this name (`where` picks it)."""

    def changed(events):
        where = changes.pop("where", {})
        place = first(events, name, **where)
        events[place][1].update(changes)

    return changed


def change_proposal(events):
    data = events[first(events, "suggest", arm="search", number=9)][1]
    data["proposal"]["k"] += 1 if data["proposal"]["k"] < 20 else -1
    data["params"]["k"] = data["proposal"]["k"]


def change_params(events):
    events[first(events, "suggest", arm="search", number=9)][1]["params"]["k"] += 1


def prune_one_that_should_go_on(events):
    place = first(events, "report", arm="search", decision="continue")
    data = events[place][1]
    data["decision"] = "prune"
    end = {"status": "pruned", "reason": "x", "epoch": data["epoch"], "value": data["metrics"]["val_top1"]}
    key = (data["arm"], data["number"])
    events[place + 1 :] = [
        ("end", {"arm": key[0], "number": key[1], **end}),
        *(e for e in events[place + 1 :] if (e[1].get("arm"), e[1].get("number")) != key),
    ]


def keep_one_that_should_stop(events):
    place = first(events, "report", arm="search", decision="prune")
    events[place][1]["decision"] = "continue"


def lose_a_trial(events):
    events[:] = [e for e in events if (e[1].get("arm"), e[1].get("number")) != ("search", 4)]


def start_again(events):
    place = first(events, "report", arm="search", number=2)
    events.insert(place, ("start", {"arm": "search", "number": 2, "attempt": 2}))


def retry_twice(events):
    place = first(events, "retry", reason="crash")
    events.insert(place, events[place])


def finish_early(events):
    place = first(events, "end", arm="search", number=TRIALS - 1)
    del events[place]


def go_on_after_the_stop(events):
    events.append(
        ("suggest", {**events[first(events, "suggest", arm="search", number=0)][1], "arm": "kd", "number": 2})
    )


def report_backwards(events):
    place = first(events, "report", arm="search", number=0, epoch=2)
    other = first(events, "report", arm="search", number=0, epoch=3)
    events[place], events[other] = events[other], events[place]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (change_proposal, "the proposal of trial 0009 is not what the sampler proposes"),
        (change_params, "the parameters of trial 0009 are not what its proposal gives"),
        (prune_one_that_should_go_on, "was decided prune at epoch 1, where continue is right"),
        (keep_one_that_should_stop, "where prune is right"),
        (keep_one_that_should_stop, "ends pruned after the decision continue"),
        (lose_a_trial, "trial 0005 is suggested where 4 comes next"),
        (start_again, "trial 0002 is started again without a retry or a new driver"),
        (retry_twice, "is retried for crash more often than 1 times"),
        (finish_early, "the sweep is finished, but trial 0013 is not"),
        (go_on_after_the_stop, "`suggest` while no process drives the sweep"),
        (report_backwards, "reports epoch 2 after epoch 3"),
        (change("end", value=99.0, where={"status": "completed"}), "ends with 99.0, but its last val_top1 is"),
        (change("end", epoch=1, where={"status": "completed"}), "ends at epoch 1, but its last report is of 9"),
        (change("driver", trials=20), "the sweep is finished with 14 trials, not 20"),
        (change("driver", trials=10), "there are 14 trials, more than the 10 asked for"),
        (change("report", decision="continue", where={"decision": "diverged"}), "where diverged is right"),
        (change("report", decision="continue", where={"decision": "complete"}), "where complete is right"),
        (change("end", status="completed", value=1.0, where={"status": "failed"}), "ends completed after the decision"),
        (lambda events: events.pop(3), "nothing"),
    ],
)
def test_what_no_sweep_would_have_written_is_found(tmp_path, whole, damage, told):
    events = events_of(whole)
    damage(events)
    write(tmp_path, events)
    found = audit_sweep(config(), tmp_path)
    if told == "nothing":  # a first start that was never written
        assert not [finding for finding in found if "checkpoint" not in finding]
    else:
        assert any((told in finding and finding.startswith("line ")) or told in finding for finding in found), found


def test_a_damaged_ledger_is_one_finding(tmp_path, whole):
    content = (whole / "ledger.jsonl").read_bytes()
    (tmp_path / "ledger.jsonl").write_bytes(content.replace(b'"epoch":2', b'"epoch":3', 1))
    (finding,) = audit_sweep(config(), tmp_path)
    assert "is not as it was written (its checksum is wrong)" in finding


def test_checkpoints_that_cannot_be_read_are_found(tmp_path):
    state = drive(tmp_path, config(), reports=40, faults=False)
    running = next(r for r in state.running() if r.epoch >= 2)
    folder = tmp_path / "trials" / str(running.key)
    (folder / f"epoch-{running.epoch:04d}" / "w").write_text("x")
    (finding,) = audit_sweep(config(), tmp_path)
    assert finding.endswith(f"epoch-{running.epoch:04d}: is not as it was written")
    (folder / f"epoch-{running.epoch - 1:04d}" / "w").unlink()
    found = audit_sweep(config(), tmp_path)
    assert len(found) == 3
    assert found[-1].endswith(f"can be read after epoch {running.epoch}: it would begin again")


def test_the_weights_of_a_completed_trial_are_looked_for(tmp_path):
    state = drive(tmp_path, config(), faults=False)
    best = state.best()
    shutil.rmtree(tmp_path / "trials" / str(best.key))
    (finding,) = audit_sweep(config(), tmp_path)
    assert f"trial {best.key} has no checkpoint that can be read after epoch 9: its weights are lost" in finding


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_history_cut_at_any_byte_goes_on_from_a_prefix_of_the_truth_to_a_sweep_with_nothing_wrong(
    data, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("history")
    path = folder / "ledger.jsonl"
    settings = {"trials": 4, "startup_trials": 50, "max_failures": 1}
    small = formulas.sweep_config(sweep=settings, baselines={"trials": 1}, recipe={"epochs": 4})
    Ledger.create(path, Header(sweep="t", id="i", seed=0, trials=4, first=[formulas.DEFAULTS])).close()
    lives = data.draw(st.integers(1, 3))
    for _ in range(lives):
        live(path, small, lambda choices: data.draw(st.sampled_from(choices)), steps=data.draw(st.integers(0, 25)))
    content = path.read_bytes()
    first_line = content.index(b"\n") + 1
    cut = content[: first_line + round(data.draw(st.floats(0, 1)) * (len(content) - first_line))]
    path.write_bytes(cut)
    with Ledger.open(path) as ledger:
        truth = SweepState()
        for event in read_events(path)[0]:
            truth.apply(event)
        assert content.startswith(path.read_bytes())
        assert len(path.read_bytes()) == cut.rindex(b"\n") + 1
        assert repr(vars(ledger.state)) == repr(vars(truth))
        ended = {record.key: repr(record) for record in truth.trials.values() if record.status.is_end}
    live(path, small, lambda choices: choices[0], steps=10_000)
    with Ledger.open(path) as ledger:
        state = ledger.state
        assert state.stop_reason in ("finished", "failed")
        if state.stop_reason == "finished":
            assert [len(state.arm(arm)) for arm in ("search", "ce", "kd")] == [4, 1, 1]
            assert state.running() == []
        assert ended.items() <= {record.key: repr(record) for record in state.trials.values()}.items()
    assert [finding for finding in audit_sweep(small, folder) if "checkpoint" not in finding] == []


def live(path, config, choose, steps):
    """One driver's life: up to so many things happen to up to three trials at once; `choose` says which.

    `simulate` has one order in which things happen, here it is any.
    """
    with Ledger.open(path) as ledger:
        ledger.append(Driver.here(trials=4))
        search = Search(config, ledger)
        at_work = []
        for _ in range(steps):
            if len(at_work) < 3 and (record := search.next_trial()) is not None:
                search.started(record.key)
                at_work.append(record)
            if not at_work:
                search.stopped()
                return
            record = choose(at_work)
            what = choose(["report", "report", "report", "nan", "crash", "node", "oom", "error", "go"])
            if what in ("crash", "node", "oom"):
                search.lost(record.key, what, f"{what}!", choose([Share(2.0, 0.0), None]))
                at_work.remove(record)
                continue
            if what == "error":
                search.failed(record.key, "error", f"ValueError: {record.key}")
            else:
                value = {"nan": math.nan}.get(what, 50.0 + record.key.number)
                search.reported(record.key, record.epoch + 1, {"val_top1": value})
            if record.status.is_end:
                at_work.remove(record)
        if choose([True, False]):  # else it is killed
            search.stopped()
