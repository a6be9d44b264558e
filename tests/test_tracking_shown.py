"""What MLflow shows is what the ledger says: in whatever order trials end, whatever they hold, and whatever fails."""

import math
import sqlite3
import tempfile
import time
from pathlib import Path
from random import Random
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from memory_mlflow import MemoryMlflow
from test_tracking import client
from test_tracking import new_store as _new_store
from test_tracking import pytestmark as _mlflow_warnings
from test_tracking import runs

from tune_topkd import tracking
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Driver
from tune_topkd.ledger import End
from tune_topkd.ledger import Finalists
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Repeat
from tune_topkd.ledger import Report
from tune_topkd.ledger import Stop
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import finalists_to_repeat
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.ledger import winner_of
from tune_topkd.tracking import catch_up
from tune_topkd.tracking import comparing
from tune_topkd.tracking import disagreements
from tune_topkd.tracking import writer
from tune_topkd.tracking.cleaning import clean_name
from tune_topkd.tracking.cleaning import clean_text
from tune_topkd.tracking.projection import run_in

pytestmark = _mlflow_warnings
new_store = _new_store

STATUS = {"running": "RUNNING", "completed": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
NAN = float("nan")


def begin(folder, plan=None):
    header = Header(sweep="t", id="abc", seed=0, trials=9, dataset="digits")
    ledger = Ledger.create(folder / "ledger.jsonl", header)
    ledger.append(Driver(host="h", pid=1, trials=9, finalists=plan))
    return ledger


def suggest(arm, number, **params):
    params = params or {"k": 3 + number, "lr": 0.1 * (number + 1)}
    return Suggest(key=TrialKey(arm, number), proposal=params, params=params)


def report(arm, number, epoch, metrics):
    return Report(key=TrialKey(arm, number), epoch=epoch, metrics=metrics, decision=Decision.CONTINUE)


def end(arm, number, value, status="completed", **more):
    key = TrialKey(arm, number)
    return End(key=key, epoch=1, status=TrialStatus(status), reason="full budget", value=value, **more)


def a_step(random, state):
    """Anything that may come next in a ledger."""
    running = state.running()
    kinds = ["suggest", "report", "report", "end", "end", "driver", "stop"]
    lacking = finalists_to_repeat(state)
    kinds += ["repeat", "repeat"] if lacking else []
    kind = "driver" if state.stop_reason else random.choice(kinds)
    if kind == "repeat":
        trial, seed = random.choice(lacking)
        return Repeat(key=TrialKey("repeat", state.size("repeat")), of_trial=trial.key, seed=seed)
    if kind in ("report", "end") and running:
        record = random.choice(running)
        arm, number = record.key
        if kind == "report" or not record.reports:
            value = random.choice([10.0, 20.0, 30.0, NAN])
            return report(arm, number, record.epoch + 1, {"val_top1": value, "loss": random.random()})
        status = random.choice(["completed", "completed", "pruned", "failed"])
        value = None if status == "failed" else random.choice([float(n) for n in range(10)])
        return end(arm, number, value, status)
    if kind == "stop":
        return Stop(reason=random.choice(["interrupted", "finished", "trouble"]))
    if kind == "driver":  # after a kill, if there was no stop
        return Driver(host="h", pid=2, trials=9)
    arm = random.choice([SEARCH, SEARCH, "ce", "kd"])
    return suggest(arm, len(state.arm(arm)))


def check_shown(store, state):
    """What MLflow shows of each run, compared with what the ledger says."""
    found = store.search_runs(["1"], "", max_results=9, page_token=None)
    shown = {run_in(run.data.tags): run for run in found}
    parent = shown.pop("")
    assert len(shown) == len(found) - 1
    winner = winner_of(state)
    best = winner and winner.record
    if winner is not None and winner.finalist is not None:
        assert parent.data.metrics["finalist_val_top1"] == winner.value
        assert parent.data.metrics["finalist_trial"] == best.key.number
    if state.finalists is not None:
        is_done = winner is not None and winner.finalist is not None
        assert (parent.data.tags["finalists"] == "done") is is_done
    assert parent.data.metrics.get("best_val_top1") == (best and best.value)
    assert parent.data.metrics.get("best_trial") == (best and best.key.number)
    for method in ("ce", "kd"):
        best = state.best(method)
        assert parent.data.metrics.get(f"baseline_{method}_val_top1") == (best and best.value)
        assert parent.data.metrics.get(f"baseline_{method}_lr") == (best and best.params["lr"])
    assert parent.data.tags["state"] == (state.stop_reason or "running")
    counts = {f"trials_{status}": n for status, n in state.counts().items() if n and status != "running"}
    assert {name: n for name, n in parent.data.metrics.items() if name.startswith("trials_")} == counts
    if winner is not None and winner.finalist is None:
        gains = {f"gain_over_{m}": winner.value - b.value for m in ("ce", "kd") if (b := state.best(m)) is not None}
        assert {name: v for name, v in parent.data.metrics.items() if name.startswith("gain_")} == gains
    trials = {
        str(record.key.number if record.key.arm == SEARCH else record.key): record for record in state.trials.values()
    }
    assert set(shown) == set(trials)
    for number, run in shown.items():
        record = trials[number]
        stopped = not record.status.is_end and state.stop_reason
        assert run.info.status == ("KILLED" if stopped else STATUS[record.status])
        assert run.data.tags["trial_status"] == ("interrupted" if stopped else record.status)
        assert run.data.params == {name: str(value) for name, value in record.params.items()}
        finite = [metrics["val_top1"] for metrics in record.reports.values() if math.isfinite(metrics["val_top1"])]
        assert run.data.metrics.get("val_top1") == (finite[-1] if finite else None)


def old_rows(events):
    """What the version before wrote of the sweep itself: each end at its trial's number."""
    best = -math.inf
    for at, content in events:
        if isinstance(content, End) and content.status is TrialStatus.COMPLETED:
            arm, number = content.key
            if arm != SEARCH:
                yield f"baseline_{arm}_val_top1", number, content.value, at
                yield f"baseline_{arm}_lr", number, 0.1 * (number + 1), at
            elif content.value > best:
                best = content.value
                yield "best_val_top1", number, best, at


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_mlflow_shows_what_the_ledger_says_after_every_event(seed, was_followed_by_an_older_version):
    """With clocks that jump, requests that fail before or after they are done, and followers that begin anew."""
    random, store, clock, events = Random(seed), MemoryMlflow(), [1e9], []
    plans = [None] if was_followed_by_an_older_version else [None, Finalists(1, 2), Finalists(2, 2)]

    def fail(number, when):
        if random.random() < 0.05:
            raise ConnectionError(f"no answer to request {number}")

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(writer, "client_of", return_value=store),
        mock.patch.object(comparing, "client_of", return_value=store),
        mock.patch.object(writer, "EVENTS_PER_CHUNK", random.choice([1, 3, 2000])),
        mock.patch.object(time, "time", side_effect=lambda: clock[0]),
        begin(Path(folder), random.choice(plans)) as ledger,
    ):
        follower = writer._Writer(ledger.path, "memory")
        for _ in range(random.randrange(5, 40)):
            clock[0] += random.choice([0.0, 0.001, 5.0, -7.0])
            step = a_step(random, ledger.state)
            ledger.append(step)
            events.append((round(1000 * clock[0]), step))
            if was_followed_by_an_older_version and store.runs:
                store.runs["run0"]["rows"] |= set(old_rows(events))
            if random.random() < 0.3:  # it was away for a while
                continue
            if random.random() < 0.3:
                follower = writer._Writer(ledger.path, "memory")
            store.fail = fail
            for _ in range(200):
                try:
                    follower.catch_up()
                    break
                except ConnectionError:
                    continue
            store.fail = lambda number, when: None
            check_shown(store, read_state(ledger.path))
            assert disagreements(ledger.path, "memory") == []


@pytest.fixture
def ledger(tmp_path):
    """Three trials and three runs of KD at once: the best of each has the lowest number, and ends in the middle."""
    with begin(tmp_path) as ledger:
        for arm in (SEARCH, "kd"):
            ledger.append(*(suggest(arm, number) for number in range(3)))
            for number, value in ((2, 61.36), (0, 92.2), (1, 88.75)):
                ledger.append(report(arm, number, 1, {"val_top1": value, "loss": 1.0}), end(arm, number, value))
        yield ledger


def test_the_best_is_shown_in_whatever_order_trials_end(ledger, new_store):
    uri = new_store("mlflow.db")
    catch_up(ledger.path, uri)
    shown = runs(uri)[None].data.metrics
    assert (shown["best_val_top1"], shown["best_trial"]) == (92.2, 0)
    assert (shown["baseline_kd_val_top1"], shown["baseline_kd_lr"]) == (92.2, 0.1)


def test_a_store_of_an_older_version_is_found_wrong_and_put_right(ledger, new_store):
    uri = new_store("mlflow.db")
    catch_up(ledger.path, uri)
    parent = runs(uri)[None].info.run_id
    with sqlite3.connect(
        uri.removeprefix("sqlite:///")
    ) as database:  # as it was before: no other rows than the old ones
        for table in ("metrics", "latest_metrics"):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", [parent])
    events = [(round(1000 * e.time), e.content) for e in read_events(ledger.path)[0]]
    for name, step, value, at in old_rows(events):
        client(uri).log_metric(parent, name, value, timestamp=at, step=step)
    assert runs(uri)[None].data.metrics["best_val_top1"] == 61.36, "the fault is there"
    found = "\n".join(disagreements(ledger.path, uri))
    assert "the sweep: metric best_val_top1: 2 rows missing" in found
    assert "shown as 61.36, should be 92.2" in found
    catch_up(ledger.path, uri)
    assert runs(uri)[None].data.metrics["best_val_top1"] == 92.2
    assert runs(uri)[None].data.metrics["baseline_kd_val_top1"] == 92.2
    assert disagreements(ledger.path, uri) == []


def test_what_is_shown_is_audited_and_not_the_rows_alone(ledger, new_store):
    uri = new_store("mlflow.db")
    catch_up(ledger.path, uri)
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE latest_metrics SET value = 7 WHERE key = 'best_val_top1'")
    assert disagreements(ledger.path, uri) == ["the sweep: metric best_val_top1: shown as 7, should be 92.2"]


ODD_TEXTS = ["half \udc80 a character", "a \0 NUL", "x" * 20_000, "é 🚀 \n\t\x1b[31m", ""]


ODD_METRICS = {"val_top1": 50.0, "acc@1": 1.0, "a/../b": 2.0, "": 3.0, "n" * 300: 4.0, "\udcff": 5.0, "inf": math.inf}
ODD_PARAMS = {"k": 10**40, "odd@name": "\udc80", "long": "y" * 7000, "none": "a\0b", "lr": 0.1, "tiny": 5e-324}


def odd_ledger(folder):
    """Trials that end on each of the odd texts; then one as it should be."""
    with begin(folder) as ledger:
        for number, text in enumerate(ODD_TEXTS):
            ledger.append(
                suggest(SEARCH, number, **ODD_PARAMS), report(SEARCH, number, 1, ODD_METRICS | {"tiny": 5e-324})
            )
            ledger.append(end(SEARCH, number, None, "failed", error=text))
        ledger.append(suggest("kd", 0, k=10**400, lr=0.5), report("kd", 0, 1, ODD_METRICS), end("kd", 0, 70.0))
        ledger.append(suggest(SEARCH, 5), report(SEARCH, 5, 1, ODD_METRICS), end(SEARCH, 5, 50.0))
    return ledger.path


def check_odd(found):
    """Every run is there, with all that a database can hold of it."""
    assert [found[str(number)].info.status for number in range(6)] == ["FAILED"] * 5 + ["FINISHED"]
    errors = [found[str(number)].data.tags.get("error") for number in range(5)]
    assert errors[:2] == [r"half \udc80 a character", r"a \x00 NUL"]
    assert errors[2].endswith(" … (20000 characters)")
    assert errors[3:] == [ODD_TEXTS[3], None]
    assert found["0"].data.params["k"] == str(10**40)
    assert len(found["0"].data.metrics) == 7
    assert found[None].data.metrics["baseline_kd_val_top1"] == 70.0
    assert found[None].data.metrics["baseline_kd_lr"] == 0.5


@pytest.mark.parametrize("where", ["memory", "sqlite"])
def test_no_odd_text_or_number_holds_up_the_rest(tmp_path, new_store, monkeypatch, where, caplog):
    uri, store = new_store("mlflow.db"), MemoryMlflow()
    if where == "memory":
        for module in (writer, comparing):
            monkeypatch.setattr(module, "client_of", lambda uri: store)
    ledger = odd_ledger(tmp_path)
    catch_up(ledger, uri)
    assert disagreements(ledger, uri) == []
    if where == "memory":
        found = store.search_runs(["1"], "", max_results=9, page_token=None)
        check_odd({run_in(run.data.tags) or None: run for run in found})
    else:
        check_odd(runs(uri))
    for words in ("'acc@1' is called 'acc_1_", "'long' is not quite the ledger's"):
        assert caplog.text.count(words) == 1, "said once, and not for each trial"


@given(st.text(), st.text())
def test_names_become_names_that_mlflow_takes_and_stay_different(one, other):
    from mlflow.utils.validation import _validate_metric
    from mlflow.utils.validation import _validate_param_name
    from mlflow.utils.validation import _validate_tag_name

    for name in (one, other, one + "\udc80", one * 100):
        cleaned = clean_name(name)
        _validate_metric(cleaned, 1.0, 1, 1)
        _validate_param_name(cleaned)
        _validate_tag_name(cleaned)
        assert clean_name(cleaned) == cleaned
    assert (clean_name(one) == clean_name(other)) == (one == other)


@given(st.text(st.characters(exclude_categories=[])), st.integers(60, 200))
def test_texts_become_texts_that_every_database_takes(text, limit):
    cleaned = clean_text(text, limit)
    cleaned.encode()
    assert "\0" not in cleaned
    assert len(cleaned) <= limit
    assert clean_text(cleaned, limit) == cleaned


@pytest.mark.parametrize("kind", ["metrics", "params", "tags"])
def test_what_mlflow_refuses_is_left_out_and_said_and_the_rest_is_there(ledger, monkeypatch, caplog, kind):
    """A server whose limits are other than ours."""
    store = MemoryMlflow()
    store.refused = {(kind, name) for name in ("val_top1", "lr", "reason")}
    monkeypatch.setattr(writer, "client_of", lambda uri: store)
    for _ in range(2):
        catch_up(ledger.path, "memory")
    (trial,) = (run for run in store.runs.values() if run["tags"].get("trial_number") == "1")
    assert trial["status"] == "FINISHED"
    assert trial["tags"]["trial_status"] == "completed"
    assert ("reason" in trial["tags"]) is (kind != "tags")
    assert set(trial["params"]) == ({"k"} if kind == "params" else {"k", "lr"})
    assert {name for name, *_ in trial["rows"]} == ({"loss"} if kind == "metrics" else {"loss", "val_top1"})
    assert "MLflow does not take the" in caplog.text


def test_a_training_with_odd_values_is_written(new_store):
    uri = new_store("mlflow.db")
    odd = {"params": {"a": "\udc80", "b": None, "c": "z" * 9000}, "tags": {"training": "t\0"}}
    history = [(1, 5.0, {"val_top1": NAN, "acc@1": 1.0}), (2, 6.0, {"val_top1": 3.0, "acc@1": 2.0})]
    assert tracking.log_training(uri, "n\udc80", **odd, history=history, started=1.0, status="FINISHED") == ""
    (run,) = client(uri).search_runs([client(uri).get_experiment_by_name("tune_topkd").experiment_id])
    assert run.data.metrics["val_top1"] == 3.0
    assert run.data.params["a"] == r"\udc80"
    assert run.info.status == "FINISHED"
