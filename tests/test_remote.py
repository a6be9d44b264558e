"""Sweeps whose runs lie in a store: what survives, who drives, whose checkpoints count."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import formulas
import pytest
import stored
import test_cli
import test_faults
import test_stores
import test_sweep
import torture
from typer.testing import CliRunner

from tune_topkd.cli.app import app
from tune_topkd.config import TrialConfig
from tune_topkd.execution import RemoteSweep
from tune_topkd.execution import ResourceError
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.execution.checkpoints import checkpoints
from tune_topkd.execution.checkpoints import read_report
from tune_topkd.execution.checkpoints import write_checkpoint
from tune_topkd.execution.remote import Attempt
from tune_topkd.execution.remote import OutdatedAttemptError
from tune_topkd.execution.remote import bring_checkpoints
from tune_topkd.execution.remote import share
from tune_topkd.execution.worker import run_trial
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Mirror
from tune_topkd.ledger import Stop
from tune_topkd.ledger import TakenOverError
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.search import audit_decisions
from tune_topkd.storage import FolderStore
from tune_topkd.storage import S3Store
from tune_topkd.storage import StoreError
from tune_topkd.storage import copy_of
from tune_topkd.storage import file_hash
from tune_topkd.storage import open_store
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import audit
from tune_topkd.sweep.remote import Remote
from tune_topkd.teacher import TeacherLogits

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore.*"),
    *test_sweep.pytestmark[1:],
]
inside = test_cli.inside
server = test_stores.server
patient = test_stores.s3

SPACE = stored.SPACE | {"recipe": {"epochs": 3, "lr": 0.1}, "sweep": {"trials": 3, "asha": None}}
HERE = Path(__file__).parent
KILLS = 4
"""Of the driver of one sweep; it may be done before the last."""


@pytest.fixture
def s3(patient, monkeypatch):
    """The environment of the server's users, who lose no time when it is gone."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    return patient


@pytest.fixture(params=["folder", "s3"])
def uri(request, tmp_path):
    if request.param == "folder":
        return f"file://{tmp_path}/kept"
    request.getfixturevalue("s3")
    return f"s3://runs/{request.node.name}"


@pytest.fixture
def elsewhere(monkeypatch, tmp_path_factory):
    """Goes to another machine: one with an empty cache."""
    return lambda: monkeypatch.setenv("TUNE_TOPKD_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def value(trial, epoch):
    return {"val_top1": 90.0 - 20.0 * abs(trial.config.recipe.lr - 0.3) + epoch / 100, "epoch_seconds": 0.1}


def begin(uri, formula=value, **arguments):
    sweep = Sweep.create(SPACE, name="s", runs_dir=uri, mlflow_uri="", address="local", **arguments)
    return sweep.run(executor=SimulatedExecutor(formula))


def opened(uri):
    return Sweep.open("s", runs_dir=uri, mlflow_uri="", address="local")


def resume(uri, formula=value):
    return opened(uri).resume(executor=SimulatedExecutor(formula))


def told(path):
    """What was proposed, reported and ended."""
    return [line for line in test_sweep.comparable(path) if line[0] in ("suggest", "report", "end")]


def doubtful(result):
    """What the audit finds of a sweep whose trials were never trained."""
    return audit_decisions(result.config, read_events(result.folder / "ledger.jsonl")[0])[0]


def segments(uri):
    return open_store(uri).list("s/ledger/")


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_a_sweep_lies_in_the_store_and_is_read_from_there(uri, elsewhere):
    result = begin(uri)
    lines = (result.folder / "ledger.jsonl").read_bytes()
    assert b"".join(map(open_store(uri).get, segments(uri))) == lines
    elsewhere()
    sweep = opened(uri)
    assert (sweep.folder / "ledger.jsonl").read_bytes() == lines
    assert sweep.status().trials["completed"] == 3
    assert sweep.answer() == result.answer
    assert (sweep.folder / "tuned.yaml").read_bytes() == (result.folder / "tuned.yaml").read_bytes()
    assert Workspace.at(uri, "", "local").sweeps() == ["s"]


def test_a_sweep_cut_after_any_segment_goes_on_from_the_uri_alone(tmp_path, elsewhere):
    """A driver that is killed has put a number of segments, and perhaps not the next; its disk is lost."""
    whole = begin(f"file://{tmp_path}/whole")
    names = segments(f"file://{tmp_path}/whole")
    assert len(names) > 12
    prepared = next(
        n for n, line in enumerate(read_events(whole.folder / "ledger.jsonl")[0]) if line.name == "prepared"
    )
    for kept in range(prepared + 1, len(names)):
        uri, folder = f"file://{tmp_path}/{kept}", tmp_path / str(kept)
        shutil.copytree(tmp_path / "whole", folder)
        for name in names[kept:]:
            (folder / name).unlink()
        elsewhere()
        result = resume(uri)
        assert told(result.folder / "ledger.jsonl") == told(whole.folder / "ledger.jsonl"), kept
        assert doubtful(result) == []
        shutil.rmtree(folder)


def test_a_copy_that_is_behind_or_ahead_becomes_what_the_store_has(uri, elsewhere):
    path = begin(uri).folder / "ledger.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for local in (b"".join(lines[:4]), whole + lines[-1], b"".join(lines[:-1]) + lines[-1][:9], b"", b"no line\n"):
        path.write_bytes(local)
        assert opened(uri).status().condition == "finished"
        assert path.read_bytes() == whole


def test_a_store_that_was_emptied_is_no_reason_to_forget_a_sweep(tmp_path):
    uri = f"file://{tmp_path}/kept"
    path = begin(uri).folder / "ledger.jsonl"
    lines = path.read_bytes()
    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(
        LedgerError, match=rf"kept/s: has no ledger, but this machine's copy has {lines.count(10)} lines"
    ):
        begin(uri, or_resume=True)
    assert path.read_bytes() == lines


def test_a_second_driver_takes_over_and_the_first_says_so_in_a_line(uri, elsewhere, monkeypatch):
    first_cache, seen = os.environ["TUNE_TOPKD_CACHE_DIR"], []

    def overtaken(trial, epoch):
        if not seen and trial.record.key.number == 1 and epoch == 2:
            seen.append("in between")
            elsewhere()
            seen.append(resume(uri))
            monkeypatch.setenv("TUNE_TOPKD_CACHE_DIR", first_cache)
        return value(trial, epoch)

    with pytest.raises(TakenOverError) as raised:
        begin(uri, overtaken)
    assert str(raised.value).startswith(f"{uri}/s: another driver has taken over this sweep (line ")
    assert "\n" not in str(raised.value)
    second = seen[1]
    assert second.reason == "finished"
    elsewhere()
    assert told(opened(uri).folder / "ledger.jsonl") == told(second.folder / "ledger.jsonl")
    assert doubtful(second) == []


def test_of_two_that_begin_at_once_one_does(tmp_path):
    store = FolderStore(tmp_path / "kept")

    def ledger(name):
        (tmp_path / name).mkdir()
        path, mirror = tmp_path / name / "ledger.jsonl", Mirror(store, "s")
        mirror.pull(path)
        return lambda: Ledger.create(path, Header(sweep="s", id=name, seed=0, trials=1), mirror=mirror)

    one, other = ledger("one"), ledger("other")
    with one() as kept:
        kept.append(Driver(host="h", pid=1, trials=1))
        with pytest.raises(TakenOverError):
            other()
        kept.append(Stop(reason="interrupted"))
    assert not (tmp_path / "other" / "ledger.jsonl").exists()


def test_who_is_begun_anew_elsewhere_writes_no_further_line(tmp_path):
    """A sweep that was never prepared may be begun anew; whoever still prepares it is refused."""
    store = FolderStore(tmp_path / "kept")
    paths = [tmp_path / name / "ledger.jsonl" for name in ("one", "other")]
    mirrors = [Mirror(store, "s"), Mirror(store, "s")]
    mirrors[0].pull(paths[0])
    paths[0].parent.mkdir()
    with Ledger.create(paths[0], Header(sweep="s", id="one", seed=0, trials=1), mirror=mirrors[0]) as first:
        assert mirrors[1].pull(paths[1])
        again = {"may_replace": lambda state: True, "mirror": mirrors[1]}
        with Ledger.create(paths[1], Header(sweep="s", id="other", seed=0, trials=1), **again) as second:
            with pytest.raises(TakenOverError):
                first.append(Driver(host="h", pid=1, trials=1))
            second.append(Driver(host="h", pid=2, trials=1))
    assert Mirror(store, "s").pull(paths[0])
    assert read_state(paths[0]).header.id == "other"


def test_what_cannot_be_prepared_leaves_nothing_and_may_be_begun_anew(uri, elsewhere):
    def refusing(trial, epoch):
        raise AssertionError("no trial is run")

    class Refusing(SimulatedExecutor):
        def measure(self, config, trial, probe):
            raise ResourceError("no trial can be run")

    space = SPACE | {"sweep": {**SPACE["sweep"], "cpus_per_trial": "auto"}}
    arguments = {"name": "s", "runs_dir": uri, "mlflow_uri": "", "address": "local"}
    with pytest.raises(ResourceError):
        Sweep.create(space, **arguments).run(executor=Refusing(refusing))
    assert Workspace.at(uri, "", "local").sweeps() == []
    elsewhere()
    assert begin(uri).reason == "finished"
    assert Workspace.at(uri, "", "local").sweeps() == ["s"]


def test_lines_whose_put_seemed_to_fail_are_kept(tmp_path):
    class Failing(FolderStore):
        fails = False

        def put_new(self, name, content):
            done = super().put_new(name, content)
            if self.fails:
                raise StoreError(self.at(name), "Read timeout")
            return done

    store, path = Failing(tmp_path / "kept"), tmp_path / "ledger.jsonl"
    mirror = Mirror(store, "s")
    assert not mirror.pull(path)
    with Ledger.create(path, Header(sweep="s", id="i", seed=0, trials=1), mirror=mirror) as ledger:
        store.fails = True
        with pytest.raises(StoreError):
            ledger.append(Driver(host="h", pid=1, trials=1))
        assert ledger.state.last_driver is None
        store.fails = False
        ledger.append(Stop(reason="trouble"))
    assert [event.name for event in read_events(path)[0]] == ["sweep", "driver", "stop"]
    copy = tmp_path / "copy.jsonl"
    assert Mirror(store, "s").pull(copy)
    assert copy.read_bytes() == path.read_bytes()


def test_a_bucket_that_is_gone_is_told_in_a_line_and_the_sweep_goes_on_when_it_is_back(s3):
    uri, seen = "s3://runs/gone", []

    def cut_off(trial, epoch):
        if not seen and trial.record.key.number == 1 and epoch == 2:
            seen.append(s3.go())
        return value(trial, epoch)

    with pytest.raises(StoreError) as raised:
        begin(uri, cut_off)
    assert str(raised.value).startswith(f"{uri}/s/ledger/")
    assert "Could not connect" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(StoreError, match="Could not connect"):
        opened(uri)
    s3.come_back()
    before = told(copy_of(uri) / "s" / "ledger.jsonl")
    result = resume(uri)
    assert result.reason == "finished"
    assert told(result.folder / "ledger.jsonl")[: len(before)] == before
    assert doubtful(result) == []


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "kept")


@pytest.fixture
def config():
    sweep = formulas.sweep_config()
    return TrialConfig(data=sweep.data, student=sweep.student, loss={"k": 4}, recipe=sweep.recipe)


class Killed(BaseException):
    """Of a worker, by nobody in particular."""


def sends(heard, until=None):
    """Takes the messages of a worker, which is killed after the report of an epoch."""

    def send(message):
        heard.append(message["epoch"])
        if message["epoch"] == until:
            raise Killed

    return send


def work(store, config, node, attempt, until=None, trial="s/trials/0001"):
    """A worker's turn on a node: the epochs that it told."""
    heard = []
    folder = node / "0001"
    node.mkdir(exist_ok=True)
    try:
        run_trial(formulas.rising, config, folder, sends(heard, until), attempt=Attempt(store, trial, attempt))
    except Killed:
        assert until is not None
    return heard


def kept(store):
    return [
        name.removeprefix("s/trials/0001/") for name in store.list("s/trials/0001/") if name.endswith("report.json")
    ]


def test_a_trial_goes_on_on_another_node(store, config, tmp_path):
    assert work(store, config, tmp_path / "a", "0001-0001", until=4) == [1, 2, 3, 4]
    assert kept(store) == [f"0001-0001/epoch-000{n}/report.json" for n in (3, 4)]
    assert work(store, config, tmp_path / "b", "0001-0002") == list(range(4, formulas.EPOCHS + 1))
    assert kept(store) == [f"0001-0002/epoch-000{n}/report.json" for n in (8, 9)]
    assert [path.name for path in checkpoints(tmp_path / "b" / "0001")] == ["epoch-0009", "epoch-0008"]


def test_what_a_node_has_of_an_earlier_turn_is_no_longer_used(store, config, tmp_path):
    work(store, config, tmp_path / "a", "0001-0001", until=3)
    work(store, config, tmp_path / "b", "0001-0002", until=6)
    (tmp_path / "a" / "0001" / "epoch-0003" / formulas.STATE).write_text("7")  # were it used, epoch 8 would be next
    assert work(store, config, tmp_path / "a", "0002-0001", until=7) == [6, 7]


def test_a_zombies_late_checkpoint_is_never_used(store, config, tmp_path):
    """The worker of the first turn is cut off, not dead; what it commits after the second has begun must not count."""
    work(store, config, tmp_path / "a", "0001-0001", until=3)
    zombie = Attempt(store, "s/trials/0001", "0001-0001")
    assert work(store, config, tmp_path / "b", "0001-0002", until=3) == [3], "it dies before an epoch of its own"
    late = write_checkpoint(
        tmp_path / "a" / "0001", 8, {"val_top1": 1.0}, lambda f: (f / formulas.STATE).write_text("8")
    )
    zombie.keep(late)
    assert "0001-0001/epoch-0008/report.json" in kept(store)
    assert work(store, config, tmp_path / "c", "0002-0001", until=5) == [3, 4, 5]
    zombie.keep(late)
    assert work(store, config, tmp_path / "a", "0003-0001")[:2] == [5, 6]


def test_a_worker_that_comes_too_late_is_refused(store, config, tmp_path):
    work(store, config, tmp_path / "b", "0002-0001", until=2)
    for attempt in ("0001-0009", "0002-0001"):
        with pytest.raises(OutdatedAttemptError, match=attempt):
            work(store, config, tmp_path / "a", attempt)


@pytest.mark.parametrize("damage", ["change", "remove", "not committed"])
def test_a_checkpoint_that_is_not_whole_is_passed_over_for_the_one_before(store, config, tmp_path, damage):
    work(store, config, tmp_path / "a", "0001-0001", until=4)
    newest = "s/trials/0001/0001-0001/epoch-0004"
    match damage:
        case "change":
            store.put(f"{newest}/{formulas.STATE}", b"stale")
        case "remove":
            store.delete(f"{newest}/{formulas.STATE}")
        case "not committed":
            store.delete(f"{newest}/report.json")
    assert work(store, config, tmp_path / "b", "0001-0002", until=4) == [3, 4]


def test_a_trial_cut_before_any_change_in_the_store_goes_on(config, tmp_path):
    """Whichever request is the last that a worker sent, the next one has what the driver was told of."""

    class Dying(FolderStore):
        left = 10**6

        def _step(self):
            self.left -= 1
            if self.left < 0:
                raise Killed

        def put(self, name, content):
            self._step()
            super().put(name, content)

        def delete(self, name):
            self._step()
            super().delete(name)

    for left in range(0, 30, 3):
        store, heard = Dying(tmp_path / f"kept-{left}"), []
        store.left = left
        node = tmp_path / f"a-{left}"
        node.mkdir()
        attempt = Attempt(store, "s/trials/0001", "0001-0001")
        with pytest.raises(Killed):
            run_trial(formulas.rising, config, node / "0001", heard.append, attempt=attempt)
        store.left = 10**6
        last = heard[-1]["epoch"] if heard else 0
        resumed = work(store, config, tmp_path / f"b-{left}", "0001-0002")
        assert resumed[0] in (last, last + 1), left
        assert resumed[-1] == formulas.EPOCHS


def test_the_newest_checkpoint_is_brought_for_who_reads_it(uri, config, tmp_path, elsewhere):
    folder = begin(uri).folder
    work(open_store(uri), config, tmp_path / "a", "0001-0001", until=4)
    elsewhere()
    folder = opened(uri).folder
    bring_checkpoints(folder, ["0001"])
    assert read_report(folder / "trials" / "0001" / "epoch-0004")[0] == 4
    bring_checkpoints(tmp_path, ["0001"])  # a folder that is no copy: nothing is to be brought


# --- the bank of a teacher's logits ------------------------------------------------------------------------------------


class Seen(SimulatedExecutor):
    """Keeps what workers are told."""

    work = None

    def run(self, search, work):
        self.work = work
        return super().run(search, work)


def fill(space, uri):
    done = CliRunner().invoke(app, ["teacher", str(space), "--runs-dir", uri, "--fill-bank"])
    assert done.exit_code == 0, done.output


@pytest.fixture
def filled(uri, tmp_path):
    """A space with a teacher whose bank was filled ahead, in the store: the space and the bank's file here."""
    space = SPACE | {
        "method": "topkd",
        "teacher": {"name": "digits_linear", "recipe": {"epochs": 1}},
        "space": {"k": {"low": 1, "high": 4}},
    }
    (tmp_path / "space.yaml").write_text(json.dumps(space))
    fill(tmp_path / "space.yaml", uri)
    (bank,) = copy_of(uri).glob("teachers/*/bank-*.f16")
    return space, bank


def told_to_workers(uri, space):
    executor = Seen(value)
    Sweep.create(space, name="s", runs_dir=uri, mlflow_uri="", address="local").run(executor=executor)
    return executor.work.remote


def on_a_node(remote, bank):
    """Where a trial on another machine than the driver's has its bank."""
    config = {"teacher_checkpoint": None, "dataset_file": None, "student": {}, "teacher_bank": str(bank.parent)}
    return Path(dataclasses.replace(remote, token="another machine's").located(config)["teacher_bank"]) / bank.name


def test_a_bank_that_was_filled_ahead_is_fetched_once_by_each_node(uri, filled, elsewhere, monkeypatch):
    space, bank = filled
    content = bank.read_bytes()
    elsewhere()
    assert not copy_of(uri).exists()
    remote = told_to_workers(uri, space)
    assert list(remote.banks.values()) == [len(content)]
    driven = copy_of(uri) / "teachers" / bank.parent.name / bank.name
    elsewhere()
    fetched = on_a_node(remote, driven)
    assert fetched.is_relative_to(copy_of(uri))
    assert fetched.read_bytes() == content
    monkeypatch.setattr(FolderStore, "get_file", None)
    monkeypatch.setattr(S3Store, "get_file", None)
    assert on_a_node(remote, driven) == fetched, "it is fetched once"


def test_the_drivers_machine_fetches_a_bank_too(uri, filled, elsewhere):
    space, bank = filled
    elsewhere()
    remote = told_to_workers(uri, space)
    folder = copy_of(uri) / "teachers" / bank.parent.name
    assert list(folder.glob("bank-*")) == [], "only who trains needs it"
    config = {"teacher_checkpoint": None, "dataset_file": None, "student": {}, "teacher_bank": str(folder)}
    assert remote.located(config) == config
    assert (folder / bank.name).read_bytes() == bank.read_bytes()


def test_a_node_without_room_for_a_bank_or_a_store_trains_without_it(uri, filled, elsewhere, monkeypatch, caplog):
    space, bank = filled
    remote = told_to_workers(uri, space)
    elsewhere()
    usage = shutil.disk_usage("/")._replace(free=2 * bank.stat().st_size - 1)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: usage)
        assert not on_a_node(remote, bank).exists()
    assert "it would take more than half of the free disk" in caplog.text
    (stored,) = Workspace.at(uri, "", "local").remote.banks()
    open_store(uri).delete(stored.name)
    assert not on_a_node(remote, bank).exists()
    assert "is not fetched, the teacher runs again" in caplog.text
    assert stored.name in caplog.text


def test_a_bank_of_another_augmentation_is_not_the_sweeps(uri, filled):
    space, _ = filled
    assert told_to_workers(uri, space | {"data": {"name": "digits", "augment": {"pad": 1}}}).banks == {}


def test_who_fills_a_bank_elsewhere_goes_on_with_what_the_store_has(uri, filled, tmp_path, elsewhere, monkeypatch):
    _, bank = filled
    elsewhere()

    def refuse(self, images):
        raise AssertionError("the teacher ran on what the store has")

    monkeypatch.setattr(TeacherLogits, "compute", refuse)
    fill(tmp_path / "space.yaml", uri)
    brought = copy_of(uri) / "teachers" / bank.parent.name / bank.name
    assert brought.read_bytes() == bank.read_bytes()
    assert not Remote.at(uri).put_bank(brought), "the store has it"


def test_prune_removes_banks_from_the_store_that_no_sweep_names(uri, filled):
    space, bank = filled
    remote = Workspace.at(uri, "", "local").remote
    told_to_workers(uri, space)
    assert CliRunner().invoke(app, ["teacher", "--prune", "--runs-dir", uri]).exit_code == 0
    (stored,) = remote.banks()
    other = bank.with_name("bank-0123.f16")
    other.write_bytes(b"rows")
    other.with_suffix(".json").write_text(json.dumps({"teacher": "another"}))
    remote.put_bank(other)
    assert len(list(remote.banks())) == 2
    assert CliRunner().invoke(app, ["teacher", "--prune", "--runs-dir", uri]).exit_code == 0
    assert list(remote.banks()) == [stored]
    assert [name for name in open_store(uri).list("teachers/") if "/bank-" in name] == [
        stored.name,
        stored.name.replace(".f16", ".json"),
    ]


# --- nodes -----------------------------------------------------------------------------------------------------------


def test_a_node_fetches_what_trials_share_once(tmp_path, elsewhere):
    uri = f"file://{tmp_path}/kept"
    runs = copy_of(uri)
    (runs / "s").mkdir(parents=True)
    weights = tmp_path / "teacher.pt"
    weights.write_bytes(b"weights")
    shared = share(open_store(uri), [str(weights)])
    assert shared == {str(weights): file_hash(weights)}
    sweep = RemoteSweep.driven(uri, "s", "first", runs / "s", "token")
    sweep = RemoteSweep(**{**sweep.as_json(), "shared": shared})
    config = {
        "teacher_checkpoint": str(weights),
        "dataset_file": None,
        "teacher_bank": str(runs / "teachers" / "key"),
        "student": {"name": "n", "checkpoint": None},
    }
    assert sweep.located(config) == config, "on the driver's machine nothing is fetched"
    elsewhere()
    (runs / "s" / ".driver").unlink()  # another machine does not see it
    here = sweep.located(config)
    assert Path(here["teacher_checkpoint"]).read_bytes() == b"weights"
    assert here["teacher_checkpoint"] != str(weights)
    assert here["teacher_bank"] == str(copy_of(uri) / "teachers" / "key")
    shutil.rmtree(tmp_path / "kept")
    assert sweep.located(config) == here, "it is fetched once"


def test_a_file_that_was_damaged_in_the_store_is_not_used(tmp_path, elsewhere):
    uri = f"file://{tmp_path}/kept"
    (tmp_path / "teacher.pt").write_bytes(b"weights")
    shared = share(open_store(uri), [str(tmp_path / "teacher.pt")])
    open_store(uri).put(f"files/{file_hash(tmp_path / 'teacher.pt')}", b"other")
    sweep = RemoteSweep(uri, "s", "first", str(tmp_path / "none"), "token", shared)
    config = {"teacher_checkpoint": str(tmp_path / "teacher.pt"), "dataset_file": None, "student": {}}
    with pytest.raises(StoreError, match="is not as it was written"):
        sweep.located(config)


def test_a_node_that_cannot_reach_the_store_says_so(s3, monkeypatch):
    uri = "s3://runs/reached"
    begin(uri)
    name = segments(uri)[0]
    sweep_id = json.loads(open_store(uri).get(name))["id"]
    sweep = RemoteSweep(uri, "s", name, "", "")
    assert sweep.trouble(sweep_id) == ""
    assert "another sweep is called s there by now" in sweep.trouble("other")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "Could not connect" in sweep.trouble(sweep_id)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("status",), ("run", "digits"), ("audit", "s")])
def test_a_uri_of_no_store_is_one_line(inside, arguments):
    done = inside(*arguments, "--runs-dir", "gs://bucket/x")
    assert done.returncode == 2
    assert done.stderr == "error: --runs-dir: gs://bucket/x: must be a folder, s3://BUCKET/PREFIX, or file:///FOLDER\n"


def test_a_single_training_is_refused_in_a_store(inside, tmp_path):
    done = inside("train", "digits", "--runs-dir", f"file://{tmp_path}")
    assert done.returncode == 2
    assert "error: --runs-dir" in done.stderr


def test_the_commands_take_a_uri_and_name_it(inside, tmp_path):
    uri = f"file://{tmp_path}/kept"
    begin(uri)
    done = inside("status", "s", "--runs-dir", uri)
    assert (done.returncode, "finished" in done.stdout) == (0, True)
    assert inside("export", "s", "--runs-dir", uri).stdout == (copy_of(uri) / "s" / "tuned.yaml").read_text()
    done = inside("status", "other", "--runs-dir", uri)
    assert f"no such sweep in {uri}; must be 's'" in done.stderr or f"no such sweep in {uri}" in done.stderr


# --- real drivers ----------------------------------------------------------------------------------------------------


class Driven:
    """`stored.py` as a process, on a machine whose disk can be lost."""

    def __init__(self, uri, folder, server, **settings):
        self.uri, self.folder, self.server = uri, folder, server
        self.settings = settings
        self.machine = 0
        self.process = None

    @property
    def cache(self):
        return self.folder / f"machine-{self.machine}"

    @property
    def environment(self):
        path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, **self.server.environment, "PYTHONPATH": path, "TUNE_TOPKD_CACHE_DIR": str(self.cache)}

    @property
    def log(self):
        return self.folder / torture.WORK_LOG

    def start(self):
        options = [f"--{name}={value}" for name, value in self.settings.items()]
        self.process = subprocess.Popen(
            [sys.executable, stored.__file__, self.uri, self.log, *options],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_reports(self, count):
        give_up = time.monotonic() + 300
        while sum(line["event"] == "report" for line in store_lines(self.uri)) < count:
            assert time.monotonic() < give_up
            time.sleep(0.2)

    def kill(self):
        """SIGKILL, with all that it has started in its group; the disk is lost."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        shutil.rmtree(self.cache, ignore_errors=True)
        self.machine += 1

    def ends(self):
        """Its exit code, and the last line that it said."""
        _, said = self.process.communicate(timeout=400)
        return self.process.returncode, said.splitlines()[-1] if said else ""

    def work(self):
        """The epochs that were trained, as the train function itself has noted."""
        if not self.log.exists():
            return []
        lines = [json.loads(line) for line in self.log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        return [(line["trial"], line["epoch"]) for line in lines if line["what"] == "trained"]


def store_lines(uri):
    """The lines of the ledger in the store."""
    store = open_store(uri)
    return [json.loads(line) for name in store.list("s/ledger/") for line in store.get(name).splitlines()]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_driver_that_is_killed_and_loses_its_disk_loses_nothing(patient, tmp_path, elsewhere):
    uri = "s3://runs/killed"
    driven = Driven(uri, tmp_path, patient, pause=0.2)
    chance, kills, before = random.Random(7), 0, []
    while kills < KILLS:
        driven.start()
        seen = len(before)
        give_up = time.monotonic() + 300
        lines = before
        target = seen + chance.randint(3, 14)
        while len(lines) < target and driven.process.poll() is None:
            assert time.monotonic() < give_up, "no progress"
            time.sleep(0.2)
            lines = store_lines(uri)
        if driven.process.poll() is not None:
            break
        driven.kill()
        kills += 1
        after = store_lines(uri)
        assert after[: len(before)] == before, "no event is lost"
        before = after
    assert kills > 0
    if driven.process.poll() != 0:
        driven.start()
        assert driven.ends()[0] == 0
    elsewhere()
    workspace = Workspace.at(uri, "", "local")
    assert audit("s", workspace, with_mlflow=False) == []
    events = read_events(workspace.existing("s") / "ledger.jsonl")[0]
    assert [e.seq for e in events] == list(range(len(events)))
    state = read_state(workspace.folder("s") / "ledger.jsonl")
    assert (state.stop_reason, len(state.arm("search"))) == ("finished", 6)
    trained = Counter(driven.work())
    assert sum(count - 1 for count in trained.values()) <= 2 * kills, "at most the epochs under way are trained again"
    ended = {e.key: e.time for e in events if e.name == "end"}
    started = [(e.key, e.time) for e in events if e.name == "start"]
    assert [key for key, when in started if key in ended and when > ended[key]] == [], "no finished trial is run again"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_second_driver_ends_the_first_with_one_line(patient, tmp_path):
    uri = "s3://runs/second"
    slow = Driven(uri, tmp_path / "a", patient, pause=10)  # it must not come to its end before the second has begun
    first, second = slow, Driven(uri, tmp_path / "b", patient, pause=0.05)
    for driven in (first, second):
        driven.folder.mkdir()
    first.start()
    first.wait_for_reports(3)
    second.start()
    code, said = first.ends()
    assert code == 2
    assert said.startswith(f"error: {uri}/s: another driver has taken over this sweep")
    assert second.ends() == (0, "")
    lines = store_lines(uri)
    assert [line["seq"] for line in lines] == list(range(len(lines)))
    assert sum(line["event"] == "end" for line in lines) == 6


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_bucket_that_goes_mid_sweep_stops_it_with_one_line_and_it_goes_on_later(patient, tmp_path):
    uri = "s3://runs/away"
    driven = Driven(uri, tmp_path, patient, pause=0.3)
    driven.start()
    driven.wait_for_reports(3)
    patient.go()
    try:
        code, said = driven.ends()
    finally:
        patient.come_back()
    assert code == 2
    assert said.startswith(f"error: {uri}/s/")
    assert "nothing is lost: `resume s` goes on" in said
    driven.start()
    assert driven.ends()[0] == 0
    lines = store_lines(uri)
    assert sum(line["event"] == "end" for line in lines) == 6


NODES = """
import os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ttk-")
import psutil
import ray.cluster_utils
import stored
from tune_topkd.execution import Cluster
from tune_topkd.interruption import listening
from tune_topkd.sweep import Callback, Sweep

uri, log = sys.argv[1:]
hidden = os.environ["TUNE_TOPKD_CACHE_DIR"]
ray_command = str(Path(sys.executable).with_name("ray"))
joined = {}

def join(name):
    before = len(Cluster.now().nodes)
    own_disk = 'mount -t tmpfs tmpfs "$0" && exec "$2" start --address="$1" --num-cpus=1 --node-name="$3" --block'
    joined[name] = subprocess.Popen(["unshare", "-rm", "sh", "-c", own_disk, hidden, nodes.address, ray_command, name])
    deadline = time.monotonic() + 200
    while len(Cluster.now().nodes) == before:
        assert time.monotonic() < deadline and joined[name].poll() is None
        time.sleep(0.1)

def kill(name):
    first = psutil.Process(joined[name].pid)
    for process in [*first.children(recursive=True), first]:
        process.kill()
    joined.pop(name).wait()

class Moves(Callback):
    reports = 0

    def on_event(self, event):
        self.reports += event.name == "report"
        if event.name == "report" and self.reports == 15:
            kill("b")
            join("d")

    def on_message(self, text, kind):
        print(text, flush=True)

nodes = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
os.makedirs(hidden, exist_ok=True)
try:
    with Cluster.attached(nodes.address):
        for name in ("a", "b", "c"):
            join(name)
    settings = {"sweep.trials": 12, "sweep.asha": None}
    sweep = Sweep.create(stored.SPACE, name="s", overrides=settings, runs_dir=uri, mlflow_uri="", address=nodes.address)
    with listening() as interruption:
        executor = stored.FormulaExecutor(interruption, log, 0.3, nodes.address)
        print(sweep.run([Moves()], executor=executor).reason)
finally:
    for name in list(joined):
        kill(name)
    nodes.shutdown()
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_nodes_that_share_nothing_but_the_uri_run_a_sweep_while_one_dies_and_one_joins(patient, tmp_path, elsewhere):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    uri = "s3://runs/nodes"
    driven = Driven(uri, tmp_path, patient)
    printed = test_faults.printed(NODES, uri, driven.log, environment=driven.environment, timeout=900)
    assert printed[-1] == "finished", printed
    elsewhere()
    workspace = Workspace.at(uri, "", "local")
    assert audit("s", workspace, with_mlflow=False) == []
    state = read_state(workspace.folder("s") / "ledger.jsonl")
    assert (state.stop_reason, state.counts()["completed"]) == ("finished", 12)
    trained = Counter(driven.work())
    assert len(trained) == 12 * formulas.EPOCHS
    assert sum(count - 1 for count in trained.values()) <= 1, "at most the epoch under way on the node that died"
    lines = [json.loads(line) for line in driven.log.read_text().splitlines()]
    assert len({line["machine"] for line in lines}) == 4, "all nodes had trials, the one that joined later too"
