"""Trials on several GPUs on a real Ray, whose GPUs are made up: their processes train on the CPU."""

import dataclasses
import os

import pytest
import test_packing
import test_sweep
import test_train
import torch

from tune_topkd.config import SharedFiles
from tune_topkd.config import SweepConfig
from tune_topkd.config import config_from
from tune_topkd.execution import Cluster
from tune_topkd.execution import RemoteSweep
from tune_topkd.execution import nodes
from tune_topkd.execution import run_sweep
from tune_topkd.execution.remote import share
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_events
from tune_topkd.search import Search
from tune_topkd.storage import open_store
from tune_topkd.sweep import audit_sweep
from tune_topkd.train import train

pytestmark = [
    *test_sweep.pytestmark,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none"),
]
node = test_packing.node
teacher = test_train.teacher

TOLD = {"killed": "ProcessLostError: rank 1 of 2 was killed (SIGKILL)", "kills_worker": ""}


@pytest.fixture
def patient(monkeypatch):
    """A worker may take its time to import torch: a busy machine is no fault here."""
    monkeypatch.setattr(nodes, "LONGEST_START_OF_A_WORKER", 600.0)


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("fate", "is_remote"),
    [("killed", False), ("killed", True), pytest.param("kills_worker", False, marks=pytest.mark.long)],
)
def test_a_trial_whose_rank_or_worker_is_killed_goes_on_and_leaves_no_process(node, teacher, tmp_path, fate, is_remote):
    notes = tmp_path / "notes"
    notes.mkdir()
    raw = {
        "data": {"name": "digits"},
        "teacher": {"name": "digits_cnn", "kwargs": {"widths": [6]}, "recipe": {"epochs": 1}},
        "student": "ranked:InFloat64",
        "method": "ranked:Fateful",
        "loss": {"notes": str(notes), "fate": fate, "steps": 2},
        "recipe": {"epochs": 4, "batch_size": 1000},
        "space": {"lr": {"low": 0.01, "high": 1.0}},
        "sweep": {"trials": 2, "asha": None, "cpus_per_trial": 4.0, "gpus_per_trial": 2.0},
        "baselines": None,
    }
    config = config_from(raw, "test")
    assert isinstance(config, SweepConfig)
    files = SharedFiles(teacher_checkpoint=teacher["teacher_checkpoint"])
    header = Header(sweep="t", id="t", seed=0, trials=2)
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        ledger.append(Driver(host="h", pid=os.getpid(), trials=2))
        remote = in_a_store(ledger, files, tmp_path) if is_remote else None
        search, cluster = Search(config, ledger), Cluster.now()
        run_sweep(search, cluster=cluster, folder=tmp_path, train=train, files=files, remote=remote)
        records, state = ledger.state.arm("search"), ledger.state
    assert state.stop_reason == "finished"
    assert [(r.status, r.epoch, r.retries) for r in records] == [
        (TrialStatus.COMPLETED, 4, ["crash"]),
        (TrialStatus.COMPLETED, 4, []),
    ]
    (retry,) = [event for event in read_events(tmp_path / "ledger.jsonl")[0] if event.name == "retry"]
    assert TOLD[fate] in retry.data["error"]
    assert sorted(path.name for path in notes.glob("[0-9]-[0-9]")) == [f"{n}-{r}" for n in (1, 2, 3) for r in (0, 1)]
    assert (notes / "left").read_text() == ""
    if remote is None:
        assert audit_sweep(config, tmp_path) == []
    else:
        (there,) = (path for path in tmp_path.parent.glob("cache-of-workers?") if list(path.glob("files/*/*")))
        assert len(list(there.glob("files/*/teacher.pt"))) == 1, "it was fetched once"
        stored = open_store(remote.uri).list("t/trials/")
        assert {name.split("/")[3] for name in stored if "/0000/" in name} == {"0001-0001", "0001-0002"}, "two attempts"
        assert sum(name.endswith("epoch-0004/report.json") for name in stored) == 2
        assert not list(tmp_path.glob("trials/*/epoch-*")), "checkpoints lie in the node's copy"
        assert list(there.rglob("t/trials/*/epoch-0004"))


def in_a_store(ledger, files, tmp_path):
    """The sweep as workers are told of it that are not on the driver's machine."""
    uri, first = f"file://{tmp_path}/kept", "t/ledger/first.jsonl"
    store = open_store(uri)
    store.put(first, ledger.path.read_bytes())
    remote = RemoteSweep.driven(uri, "t", first, tmp_path, "the driver's")
    return dataclasses.replace(remote, token="not seen", shared=share(store, [files.teacher_checkpoint]))
