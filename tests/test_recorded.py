"""Sweeps that earlier versions began are still read, and go on."""

import json
import shutil
from pathlib import Path

import pytest
import test_cli
import torch

from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.teacher.logits import computed_by

RECORDED = Path(__file__).with_name("recorded")
VERSIONS = (2, 3)
inside = test_cli.inside
OF_EACH_RUN = ("epoch_seconds", "images_per_second", "cpu_percent", "memory_mb")


@pytest.fixture(params=VERSIONS, ids="version {}".format)
def runs(request, tmp_path):
    shutil.copytree(RECORDED / f"version-{request.param}", tmp_path / "runs")
    return tmp_path / "runs"


def told(path):
    """What the lines say of trials, but for how fast they were."""
    found = [(e.name, e.data) for e in read_events(path)[0] if e.name in ("suggest", "report", "end")]
    for _, data in found:
        for name in OF_EACH_RUN:
            data.get("metrics", {}).pop(name, None)
    return found


def alike(one, other):
    """Whether two tellings agree: by the bit where the same kernels computed them, else in what was proposed first."""
    kernels = json.loads(next(RECORDED.glob("version-3/teachers/*/bank-*.json")).read_text())["computed"]
    if kernels == computed_by(torch.device("cpu")):
        return one == other
    return [e for e in one if e[0] == "suggest"][:3] == [e for e in other if e[0] == "suggest"][:3]


def test_what_it_says_is_read_and_nothing_in_it_is_wrong(runs, inside):
    state = read_state(runs / "small" / "ledger.jsonl")
    assert state.counts() == {"running": 1, "pruned": 4, "completed": 1, "failed": 0}
    assert (state.best().key.number, state.best().value) == (0, pytest.approx(53.11, abs=0.01))
    done = inside("audit", "small", "--no-mlflow", "--runs-dir", runs)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.slow
@pytest.mark.ray
@test_cli.of_ray_itself
def test_it_goes_on_to_the_end_of_one_that_was_not_interrupted(runs, inside):
    ledger = runs / "small" / "ledger.jsonl"
    before = ledger.read_bytes()
    files = {path: path.read_bytes() for path in runs.glob("teachers/*/teacher.pt")}
    done = inside("resume", "small", "--runs-dir", runs)
    assert done.returncode == 0, done.stderr
    assert ledger.read_bytes().startswith(before)
    assert {path: path.read_bytes() for path in runs.glob("teachers/*/teacher.pt")} == files
    assert alike(told(ledger), told(RECORDED / "uninterrupted.jsonl"))
    state = read_state(ledger)
    assert (state.stop_reason, len(state.arm("search")), state.running()) == ("finished", 8, [])
    done = inside("audit", "small", "--runs-dir", runs)
    assert done.returncode == 0, done.stderr
