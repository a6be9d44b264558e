"""The command line as a user has it: a process, its exit code, its two streams, what it leaves behind."""

import contextlib
import json
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
import yaml
from mlflow import MlflowClient
from PIL import Image

from tune_topkd import __version__
from tune_topkd.cli import main
from tune_topkd.cli.app import app
from tune_topkd.cli.calling import command_for
from tune_topkd.config import Override
from tune_topkd.config import PairConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import read_yaml
from tune_topkd.config import validated
from tune_topkd.data import load_dataset
from tune_topkd.evaluate import evaluate
from tune_topkd.export import load_tuned_config
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Event
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Prepared
from tune_topkd.ledger import Share
from tune_topkd.ledger import Stop
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.ledger.events import encode
from tune_topkd.machine import Gpu
from tune_topkd.models import build_configured
from tune_topkd.models import build_model
from tune_topkd.models import load_weights
from tune_topkd.models import save_weights
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import cost
from tune_topkd.sweep import preflight
from tune_topkd.sweep.callbacks import SILENT
from tune_topkd.sweep.single import train_one
from tune_topkd.tracking import sqlite_uri
from tune_topkd.train import TrainResult
from tune_topkd.train import train

ROOT = Path(__file__).parents[1]

of_ray_itself = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
"""Its own deprecated calls, and sockets it leaves to the collector."""

SPACE = """
description: a sweep of seconds
data: {name: digits, val_fraction: 0.25, test_fraction: 0.25}
teacher: {name: digits_cnn, recipe: {epochs: 2, lr: 0.1}}
student: digits_cnn_tiny
recipe: {epochs: 4, batch_size: 128}
space:
  k: {low: 1, high: 9, log: true}
  scale_top: {low: 1.0, high: 4.0}
  scale_last: {low: 1.0, high: scale_top}
  scale_gt: {low: scale_top, high: 6.0}
  ce_weight: {low: 0.1, high: 10.0, log: true}
  tdl_weight: {low: 0.1, high: 10.0, log: true}
  lr: {low: 0.01, high: 0.5, log: true}
relative: {sum: 2.0, of: [ce_weight, tdl_weight]}
sweep: {trials: 6, startup_trials: 3, asha: {grace_epochs: 1, reduction_factor: 2}}
baselines: {methods: [ce, kd], trials: 1}
"""


def launch(*arguments, **options):
    """`python launch.py …` from the repository's root."""
    command = [sys.executable, "launch.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, **options)


@pytest.fixture
def inside(monkeypatch, capfd):
    """The same within this process, which has the libraries imported: an exit code and the two streams."""

    def inside(*arguments, cwd=ROOT):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, exit_.value.code, out, err)

    return inside


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    path = tmp_path_factory.mktemp("spaces") / "small.yaml"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder whose teacher is trained once for all tests here."""
    return tmp_path_factory.mktemp("runs")


TORN = b'{"seq":0,"ti'
"""A ledger that a kill left without its first line."""


@pytest.fixture(scope="module")
def finished(space, runs):
    """A whole sweep on real data, run once; a kill had broken off a first try of it at once."""
    (runs / "small").mkdir()
    (runs / "small" / "ledger.jsonl").write_bytes(TORN)
    done = launch("run", space, "--runs-dir", runs, "--seed", 3)
    assert done.returncode == 0, done.stderr
    return done


# --- what a whole sweep leaves ------------------------------------------------------------------------------------


def test_a_sweep_ends_with_an_answer_that_other_projects_can_use(finished, runs):
    from tune_topkd.loss import TopKDLoss

    tuned = load_tuned_config(runs / "small" / "tuned.yaml")
    best = read_state(runs / "small" / "ledger.jsonl").best()
    assert TopKDLoss(**tuned.loss).k == best.params["k"]
    assert tuned.recipe.lr == best.params["lr"]
    assert tuned.recipe.epochs == 4
    evidence = tuned.evidence
    assert (evidence.val_top1, evidence.trial, evidence.seeds) == (best.value, best.key.number, [3])
    assert sum(evidence.trials.values()) == 6
    assert set(evidence.baselines) == {"ce", "kd"}
    assert evidence.versions["torch"]
    assert evidence.teacher["val_top1"] > 50


def test_the_terminal_has_a_line_per_trial_a_table_and_what_to_do_next_and_no_chatter(finished):
    assert len(re.findall(r"^\[\d+/8 trainings\] trial \d{4} (completed|pruned)", finished.stderr, re.M)) == 6
    assert len(re.findall(r"^\[\d+/8 trainings\] baseline (ce|kd)-0000 completed", finished.stderr, re.M)) == 2
    for words in (
        "points over cross-entropy",
        "points over KD",
        "tuned.yaml",
        "mlflow ui",
        "make analysis SWEEP=",
        "next: ",
    ):
        assert words in finished.stderr
    assert not re.search(r"raylet|tune_controller|alembic|Traceback|Warning", finished.stderr)
    assert finished.stdout == ""


def test_status_tells_people_and_programs(finished, runs, inside):
    found = json.loads(inside("status", "small", "--json", "--runs-dir", runs).stdout)
    assert (found["sweep"], found["state"]) == ("small", "finished")
    assert found["trials"]["completed"] + found["trials"]["pruned"] == 6
    assert found["trials"]["running"] == 0
    assert set(found["best"]) == {"number", "val_top1", "params"}
    text = inside("status", "small", "--runs-dir", runs).stdout
    assert re.match(
        r"small: finished, .* of 6 trials; best \d+\.\d\d % \(trial \d, K = \d\).*; \d+\.\d\d CPU h\n", text
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@of_ray_itself
def test_mlflow_has_one_parent_and_a_child_per_trial_and_nothing_runs(finished, runs):
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{runs / 'mlflow.db'}")
    found = mlflow.search_runs(experiment_names=["tune_topkd"])
    children = found[found["tags.mlflow.parentRunId"].notna()]
    assert len(found) - len(children) == 1
    trials = children[children["tags.kind"] == "trial"]
    assert sorted(trials["tags.trial_number"].astype(int)) == list(range(6))
    assert set(trials["tags.trial_status"]) <= {"completed", "pruned"}
    baselines = children[children["tags.kind"] == "baseline"]
    assert len(baselines) == len(children) - 6 > 0
    assert (baselines["metrics.system/process_memory_megabytes"] > 50).all()
    assert "RUNNING" not in set(found["status"])
    assert (children["metrics.val_top1"] > 0).all()


def test_a_name_that_is_taken_is_refused_and_says_what_to_do(finished, space, runs, inside):
    before = (runs / "small" / "ledger.jsonl").read_bytes()
    again = inside("run", space, "--runs-dir", runs)
    assert again.returncode == 2
    assert "`resume small`" in again.stderr
    assert "--name" in again.stderr
    assert (runs / "small" / "ledger.jsonl").read_bytes() == before


def test_resume_of_a_finished_sweep_runs_nothing_and_fewer_trials_are_refused(finished, runs, inside):
    def trials():
        return [e.data["number"] for e in read_events(runs / "small" / "ledger.jsonl")[0] if e.name == "suggest"]

    before = trials()
    assert inside("resume", "small", "--runs-dir", runs).returncode == 0
    assert trials() == before
    fewer = inside("resume", "small", "--trials", 3, "--runs-dir", runs)
    assert fewer.returncode == 2
    assert "must be at least 6" in fewer.stderr


# --- all that is told of a sweep agrees -----------------------------------------------------------------------------


@pytest.fixture
def copied(finished, runs, tmp_path):
    """The finished sweep in a runs folder of its own, which MLflow does not know yet."""
    shutil.copytree(runs / "small", tmp_path / "small")
    return tmp_path


def test_an_audit_finds_nothing_wrong_with_a_sweep(finished, runs, inside):
    done = inside("audit", "small", "--runs-dir", runs)
    assert (done.returncode, done.stdout) == (0, "")
    assert "nothing is wrong" in done.stderr


def test_what_mlflow_lacks_is_found_and_written_any_number_of_times(copied, inside):
    done = inside("audit", "small", "--runs-dir", copied)
    assert done.returncode == 1
    assert "`track small` writes what MLflow lacks" in done.stdout
    assert inside("audit", "small", "--no-mlflow", "--runs-dir", copied).returncode == 0
    for _ in range(2):
        assert inside("track", "small", "--runs-dir", copied).returncode == 0
        assert inside("audit", "small", "--runs-dir", copied).returncode == 0


def test_what_was_changed_after_a_sweep_is_found(copied, inside):
    tuned = copied / "small" / "tuned.yaml"
    written = tuned.read_text()
    tuned.write_text(written.replace("epochs: 4", "epochs: 5"))
    done = inside("audit", "small", "--no-mlflow", "--runs-dir", copied)
    assert done.returncode == 1
    assert f"{tuned}: is not the answer that the ledger gives" in done.stdout
    tuned.write_text(written)
    config = copied / "small" / "sweep.yaml"
    config.write_text(config.read_text().replace("epochs: 4", "epochs: 5"))
    done = inside("audit", "small", "--no-mlflow", "--runs-dir", copied)
    assert done.returncode == 1
    assert "has been changed since the sweep began" in done.stdout


def test_a_sweep_that_is_driven_is_neither_audited_nor_tracked(copied, inside):
    with Ledger.open(copied / "small" / "ledger.jsonl"):
        for command in ("audit", "track"):
            done = inside(command, "small", "--runs-dir", copied)
            assert (done.returncode, done.stdout) == (2, "")
            assert "a process drives it at the moment" in done.stderr


def test_an_mlflow_that_cannot_be_reached_is_told_without_its_password(copied, inside):
    uri = "http://me:secret-word@127.0.0.1:9"
    found = inside("audit", "small", "--runs-dir", copied, "--mlflow-uri", uri)
    refused = inside("track", "small", "--runs-dir", copied, "--mlflow-uri", uri)
    assert (found.returncode, refused.returncode) == (1, 2)
    for told in (found.stdout, refused.stderr):
        assert "MLflow at http://***@127.0.0.1:9 fails" in told
    assert "secret-word" not in found.stdout + found.stderr + refused.stdout + refused.stderr


@pytest.mark.parametrize("format_", ["yaml", "json", "python"])
def test_export_writes_what_the_sweep_found(finished, runs, tmp_path, format_, inside):
    best = read_state(runs / "small" / "ledger.jsonl").best()
    path = tmp_path / f"tuned.{format_}"
    done = inside("export", "small", "--format", format_, "-o", path, "--runs-dir", runs)
    assert done.returncode == 0, done.stderr
    loss = runpy.run_path(str(path))["LOSS"] if format_ == "python" else load_tuned_config(path).loss
    assert loss["k"] == best.params["k"]
    assert inside("export", "small", "--format", format_, "--runs-dir", runs).stdout == path.read_text()


def test_a_format_of_several_files_is_written_into_a_folder_that_is_named(finished, runs, tmp_path, inside):
    folder, export = tmp_path / "here", ["export", "small", "--format", "torchdistill", "--runs-dir", runs]
    unnamed = inside(*export)
    assert (unnamed.returncode, unnamed.stdout) == (2, "")
    assert "--format: torchdistill: is several files, so it needs a folder: add -o FOLDER" in unnamed.stderr
    for _ in range(2):  # what an export wrote another replaces
        done = inside(*export, "-o", folder)
        assert done.returncode == 0, done.stderr
        assert {line.partition(": ")[2] for line in done.stderr.splitlines() if line.startswith("written: ")} == {
            str(path) for path in folder.iterdir()
        }
    (folder / "tuned.py").write_text("mine")
    refused = inside(*export, "-o", folder)
    assert refused.returncode == 2
    assert f"{folder / 'tuned.py'}: is not of an export to a folder" in refused.stderr


def test_the_teacher_is_trained_once_and_its_path_printed(finished, space, runs, inside):
    done = inside("teacher", space, "--runs-dir", runs)
    assert "found" in done.stderr
    assert Path(done.stdout.strip()).is_file()
    assert len(list((runs / "teachers").glob("*/teacher.pt"))) == 1


def test_the_bank_is_filled_by_the_trials_and_ahead(finished, space, runs, inside):
    (bank,) = runs.glob("teachers/*/bank-*.f16")
    before = bank.stat().st_size
    done = inside("teacher", space, "--runs-dir", runs, "--fill-bank")
    assert done.returncode == 0
    assert re.search(r"bank: [\d,]+ views in ", done.stderr)
    assert list(runs.glob("teachers/*/bank-*.f16")) == [bank]
    assert bank.stat().st_size == before


def test_a_space_without_a_bank_says_why(finished, space, runs, inside):
    for setting, why in (
        ("teacher.bank=false", "teacher.bank is false"),
        ("data.augment.mixup=0.2", "mixup shows each"),
    ):
        sets = ["--set", setting, "--set", "method=kd"]
        done = inside("teacher", space, "--runs-dir", runs, *sets)
        assert done.returncode == 0
        assert f"teacher logits: the teacher runs on every batch: {why}" in done.stderr
        refused = inside("teacher", space, "--runs-dir", runs, *sets, "--fill-bank")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "has no bank for this space" in refused.stderr


@pytest.mark.long
@pytest.mark.slow
def test_several_spaces_end_in_a_table_of_all_and_begin_with_the_best_of_another_sweep(finished, runs, tmp_path):
    for name, student in (("first", "digits_linear"), ("second", "digits_cnn_tiny")):
        (tmp_path / f"{name}.yaml").write_text(SPACE.replace("digits_cnn_tiny", student))
    paths = [tmp_path / "first.yaml", tmp_path / "second.yaml"]
    options = ["--trials", 2, "--set", "baselines=null", "--warm-start", "small"]
    done = launch("run", *paths, *options, "--runs-dir", runs)
    assert done.returncode == 0, done.stderr
    table = done.stderr[done.stderr.index("all sweeps") :]
    assert "digits_linear" in table
    assert "digits_cnn_tiny" in table
    best = read_state(runs / "small" / "ledger.jsonl").best().params
    for name in ("first", "second"):
        defaults, warm = (r.params for r in read_state(runs / name / "ledger.jsonl").arm("search"))
        assert defaults["k"] == 5
        assert warm == pytest.approx(best)


PROJECT = """
import os, time
from pathlib import Path
import torch

def pull(student, teacher, labels, strength=1.0):
    fit = torch.nn.functional.cross_entropy(student, labels)
    return fit + strength * (student - teacher).square().mean()

class Network(torch.nn.Sequential):
    def forward(self, images):
        while Path(os.environ["HOLD"]).exists() and reports() > 5:
            time.sleep(0.02)
        return super().forward(images)

def reports():
    ledger = Path("LEDGER")
    return ledger.read_bytes().count(b'"event":"report"') if ledger.exists() else 0

def network(*, num_classes, width=8):
    return Network(torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.Linear(width, num_classes))
"""
"""A user's loss and network; while there is the file `HOLD`, the network stops once trials have reported six epochs."""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's working directory with a loss and a network of their own, and a space that names them."""
    ledger = tmp_path / "runs" / "mine" / "ledger.jsonl"
    (tmp_path / "my_project.py").write_text(PROJECT.replace("LEDGER", str(ledger)))
    content = yaml.safe_load(SPACE)
    del content["relative"]
    content |= {"method": "my_project:pull", "student": {"name": "my_project:network", "kwargs": {"width": 12}}}
    content |= {"space": {"strength": {"low": 0.01, "high": 1.0, "log": True}}, "baselines": None}
    content["sweep"]["max_concurrent"] = 1
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "hold").touch()
    monkeypatch.setenv("HOLD", str(tmp_path / "hold"))
    monkeypatch.setenv("TUNE_TOPKD_RUNS_DIR", "runs")
    return tmp_path


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@of_ray_itself
def test_ctrl_c_ends_cleanly_and_resume_finishes_the_same_sweep(project, inside):
    """A sweep of a user's own loss and network, which the workers find as well, in the working directory."""
    ledger = project / "runs" / "mine" / "ledger.jsonl"
    command = [sys.executable, ROOT / "launch.py", "run", "mine.yaml"]
    process = subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not (ledger.exists() and ledger.read_bytes().count(b'"event":"report"') > 5):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        status = json.loads(inside("status", "mine", "--json", cwd=project).stdout)
        assert status["state"] == "running"
        second = inside("resume", "mine", cwd=project)
        assert second.returncode == 2
        assert f"process {process.pid}" in second.stderr
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "resume mine" in stderr
    status = json.loads(inside("status", "mine", "--json", cwd=project).stdout)
    assert status["state"] == "interrupted"
    assert status["trials"]["running"] == 0
    ended = {key for key, r in read_state(ledger).trials.items() if r.status.is_end}
    assert ended
    seen = len(read_events(ledger)[0])
    (project / "hold").unlink()
    done = inside("resume", "mine", cwd=project)
    assert done.returncode == 0, done.stderr
    state = read_state(ledger)
    assert len(state.arm("search")) == 6
    assert state.running() == []
    assert not {e.key for e in read_events(ledger)[0][seen:] if e.name == "report"} & ended
    tuned = load_tuned_config(project / "runs" / "mine" / "tuned.yaml")
    assert (tuned.method, set(tuned.loss), tuned.evidence.val_top1 > 50) == ("my_project:pull", {"strength"}, True)


# --- what is refused ----------------------------------------------------------------------------------------------


REFUSED = {
    "missing": (["run", "missing.yaml"], ["missing.yaml", "No such file"]),
    "misspelt": (["run", "SPACE", "--set", "recipe.sheduler=step"], ["recipe.sheduler", "unknown key", "'schedule'"]),
    "low above high": (
        ["run", "SPACE", "--set", "space.k={low: 9, high: 2}"],
        ["small.yaml", "space.k", "low <= high must hold", "low = 9, high = 2"],
    ),
    "empty between its ends": (
        ["run", "SPACE", "--set", "space.k={type: int, low: scale_top, high: scale_gt}"],
        ["small.yaml", "space.k", "low <= high must hold", "low = 3, high = 2, at scale_top = 2.854, scale_gt = 2.854"],
    ),
    "k above the classes": (
        ["run", "SPACE", "--set", "space.k.high=50"],
        ["small.yaml", "space.k.high", "50", "at most 10, the number of classes"],
    ),
    "no gpu": (
        ["run", "SPACE", "--set", "sweep.gpus_per_trial=1"],
        ["small.yaml", "sweep.gpus_per_trial", "1", "this machine has 0 GPUs"],
    ),
    "read-only runs": (["run", "SPACE", "--runs-dir", "/proc/runs"], ["/proc/runs", "can be written to"]),
    "runs is a file": (["run", "SPACE", "--runs-dir", "SPACE"], ["small.yaml", "can be written to"]),
    "too many cpus": (["run", "SPACE", "--cpus-per-trial", "4096"], ["sweep.cpus_per_trial", "4096", "CPUs"]),
    "no trials": (["run", "SPACE", "--trials", "0"], ["sweep.trials (from --trials)", "0", "greater than or equal"]),
    "unknown dataset": (["check", "SPACE", "--set", "data.name=digit"], ["data.name", "'digit'", "digits"]),
    "unknown student": (
        ["check", "SPACE", "--set", "student=resnet"],
        ["student.name", "'resnet'", "digits_cnn_tiny", "digits_linear"],
    ),
    "unknown method": (["check", "SPACE", "--set", "method=topk"], ["method", "'topk'", "topkd"]),
    "unknown loss parameter": (["check", "SPACE", "--set", "loss.tau=1"], ["loss.tau", "temperature", "topkd"]),
    "unknown searched": (
        ["check", "SPACE", "--set", "space.tau=[1.0]"],
        ["space.tau", "temperature", "weight_decay"],
    ),
    "impossible corner": (
        ["check", "SPACE", "--set", "space.scale_gt={low: 1.0, high: 6.0}"],
        ["small.yaml", "scale_gt", "scale_top"],
    ),
    "not whole": (["check", "SPACE", "--set", "space.k={low: 1.0, high: 5.5}"], ["space.k.high", "5.5", "whole"]),
    "no checkpoint": (
        ["check", "SPACE", "--set", "teacher={name: digits_cnn, checkpoint: gone.pt}"],
        ["teacher.checkpoint", "gone.pt", "existing file"],
    ),
    "mlflow uri": (["run", "SPACE", "--mlflow-uri", "mlruns"], ["--mlflow-uri", "mlruns", "sqlite"]),
    "no such sweep": (["resume", "none"], ["none", "no such sweep"]),
    "bad name": (["run", "SPACE", "--name", "../up"], ["--name", "../up", "letters"]),
    "no priority": (["run", "SPACE", "--priority", "0"], ["--priority", "0: must be a positive number"]),
    "no cluster": (["run", "SPACE", "--address", "127.0.0.1:1"], ["127.0.0.1:1", "no Ray cluster answers"]),
    "unknown option": (["run", "--trails", "3"], ["--trails"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_one_message_exit_2_and_nothing_half_written(space, tmp_path, case, monkeypatch, inside):
    arguments, words = REFUSED[case]
    monkeypatch.setenv("TUNE_TOPKD_RUNS_DIR", str(tmp_path / "runs"))
    done = inside(*(a.replace("SPACE", str(space)) for a in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("case", ["misspelt", "k above the classes"])
def test_a_process_refuses_without_a_traceback(space, tmp_path, case):
    arguments, words = REFUSED[case]
    environment = os.environ | {"TUNE_TOPKD_RUNS_DIR": str(tmp_path / "runs")}
    done = launch(*(a.replace("SPACE", str(space)) for a in arguments), env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words)


def test_a_ledger_that_a_kill_left_without_a_line_is_no_sweep(tmp_path, finished, inside):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "ledger.jsonl").write_bytes(TORN)
    status = inside("status", "torn", "--runs-dir", tmp_path)
    assert status.returncode == 2
    assert "no such sweep" in status.stderr
    assert finished.returncode == 0, "a sweep of that name can begin"


def test_all_problems_of_all_files_come_at_once(space, tmp_path, inside):
    other = tmp_path / "other.yaml"
    other.write_text(SPACE.replace("trials: 6", "trials: -1").replace("momentum", "momentun"))
    done = inside("check", space, other, "missing.yaml", "--set", "sweep.seed=-2")
    assert done.returncode == 2
    for words in ("small.yaml", "other.yaml", "missing.yaml", "sweep.seed", "sweep.trials"):
        assert words in done.stderr


def test_a_wrong_space_lists_all_there_are_the_near_ones_first(tmp_path, inside, monkeypatch):
    done = inside("check", "glyph")
    assert done.returncode == 2
    first, *others = done.stderr.splitlines()
    assert (
        first
        == "error: glyph: cannot be read: No such file or directory; did you mean glyphs or glyphs-wide? known by name:"
    )
    assert re.findall(r"[\w-]+", " ".join(others)) == sorted(p.stem for p in (ROOT / "search_spaces").glob("*.yaml"))
    assert max(map(len, others)) <= 110


@pytest.mark.parametrize("name", ["digits-linear", "digits-linear.yaml", "search_spaces/digits-linear.yaml"])
def test_a_space_is_found_by_name_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert preflight.load_checked(name).source == str(ROOT / "search_spaces" / "digits-linear.yaml")
    (tmp_path / "search_spaces").mkdir()
    shutil.copy(ROOT / "search_spaces" / "digits-linear.yaml", tmp_path / "search_spaces")
    assert preflight.load_checked(name).source == "search_spaces/digits-linear.yaml"


def test_a_name_that_is_taken_does_not_hide_what_else_is_wrong(space, tmp_path, inside):
    begun(tmp_path / "small")
    done = inside("run", space, "--cpus-per-trial", 4096, "--runs-dir", tmp_path)
    assert done.returncode == 2
    for words in ("sweep.cpus_per_trial = 4096", "holds a sweep of this name"):
        assert words in done.stderr


# --- how sweeps stand ---------------------------------------------------------------------------------------------


def begun(folder, *events):
    """A sweep that has begun and is not driven, with these events."""
    folder.mkdir(parents=True)
    header = Header(sweep=folder.name, id="i", seed=0, trials=4, digest="d")
    with Ledger.create(folder / "ledger.jsonl", header) as ledger:
        prepared = Prepared(digest="d", identity_version=1, share=Share(1.0, 0.0))
        ledger.append(Driver(host="h", pid=1, trials=4), prepared, *events)
    return folder / "ledger.jsonl"


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("finished", "finished"),
        ("failed", "failed"),
        ("time_budget", "out of time"),
        ("gpu_hours", "out of GPU hours"),
        ("cpu_hours", "out of CPU hours"),
        ("trouble", "stopped by trouble"),
        ("interrupted", "interrupted"),
        (None, "killed"),
    ],
)
def test_status_tells_how_a_sweep_ended(tmp_path, inside, reason, shown):
    error = "OSError: [/mnt/x]" if reason in ("failed", "trouble") else ""
    begun(tmp_path / "s", *([Stop(reason=reason, error=error)] if reason else []))
    told = inside("status", "s", "--runs-dir", tmp_path).stdout
    assert told == f"s: {shown}, none of 4 trials{f'; {error}' if error else ''}\n"
    found = json.loads(inside("status", "s", "--json", "--runs-dir", tmp_path).stdout)
    assert (found["state"], found["error"]) == (shown, error)


def test_what_once_stopped_a_sweep_is_not_told_of_it_when_it_has_gone_on(tmp_path, inside):
    begun(tmp_path / "s", Stop(reason="trouble", error="OSError: [/mnt/x]"), Driver(host="h", pid=2, trials=4))
    assert inside("status", "s", "--runs-dir", tmp_path).stdout == "s: killed, none of 4 trials\n"


def flipped(ledger):
    content = ledger.read_bytes()
    ledger.write_bytes(content[:9] + b"7" + content[10:])
    return "its checksum is wrong"


def of_a_later_version(ledger):
    ledger.write_bytes(encode(Event(0, 0.0, Header(version=99, sweep="b", id="i", seed=0, trials=1, digest="d"))))
    return "ledger version 99"


def a_folder(ledger):
    ledger.unlink()
    ledger.mkdir()
    return "Is a directory"


def not_to_be_read(ledger):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    ledger.chmod(0)
    return "Permission denied"


def behind_a_closed_door(ledger):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    ledger.parent.chmod(0)
    return "Permission denied"


@pytest.mark.parametrize("damage", [flipped, of_a_later_version, a_folder, not_to_be_read, behind_a_closed_door])
def test_status_shows_all_sweeps_and_names_the_damaged_ones(tmp_path, inside, damage):
    for name in ("a", "b", "c"):
        begun(tmp_path / name)
    told = damage(tmp_path / "b" / "ledger.jsonl")
    try:
        done = inside("status", "--runs-dir", tmp_path)
        as_json = inside("status", "--json", "--runs-dir", tmp_path)
        unknown = inside("resume", "d", "--runs-dir", tmp_path)
        only = inside("status", "b", "--runs-dir", tmp_path)
    finally:
        (tmp_path / "b").chmod(0o755)
    assert (done.returncode, as_json.returncode, unknown.returncode, only.returncode) == (2, 2, 2, 2)
    heading, *rows, empty, why = done.stdout.splitlines()
    assert heading.split()[:3] == ["sweep", "state", "begun"]
    rows = sorted(rows)
    assert [row.split()[:2] for row in rows] == [["a", "killed"], ["b", "damaged"], ["c", "killed"]]
    assert all(" 0/4 " in row for row in (rows[0], rows[2]))
    assert (empty, why.startswith("b: damaged; ")) == ("", True)
    assert told in why
    states = {entry["sweep"]: entry for entry in json.loads(as_json.stdout)}
    assert {name: entry["state"] for name, entry in states.items()} == {"a": "killed", "b": "damaged", "c": "killed"}
    assert told in states["b"]["error"]
    assert "known: a, b, c" in unknown.stderr
    assert told in only.stderr


# --- what is printed to be pasted ---------------------------------------------------------------------------------


def test_a_printed_command_carries_what_the_runs_need(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNE_TOPKD_RUNS_DIR")
    monkeypatch.setattr(sys, "argv", ["../my checkout/launch.py", "run"])
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "../my checkout/launch.py", "run"])
    program = ".venv/bin/python '../my checkout/launch.py'"

    def command(*words, runs="runs", uri="", address=None, priority=1.0):
        runs = tmp_path / runs
        return command_for(Workspace(runs, uri or sqlite_uri(runs / "mlflow.db"), address, priority), *words)

    assert command("resume", "s") == f"{program} resume s"
    assert command("resume", "s", runs="my runs") == f"{program} resume s --runs-dir '{tmp_path}/my runs'"
    monkeypatch.setenv("TUNE_TOPKD_RUNS_DIR", "my runs")
    assert command("resume", "s", runs="my runs", address="h:1") == f"{program} resume s --address h:1"
    assert "confirm s --priority 0.5 --" in command("confirm", "s", address="h:1", priority=0.5)
    assert "--priority" not in command("status", "s", address="h:1", priority=0.5)
    on_server = {"runs": "my runs", "uri": "http://h:5000"}
    assert command("resume", "s", **on_server) == f"{program} resume s --mlflow-uri http://h:5000"
    assert command("export", "s", **on_server) == f"{program} export s"
    assert "secret" not in command("resume", "s", runs="my runs", uri="http://me:secret@h:5000")
    script = tmp_path / "bin" / "tune_topkd"
    script.parent.mkdir()
    script.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(script), "run"])
    assert command("resume", "s", runs="my runs") == f"{script} resume s"
    monkeypatch.setenv("PATH", str(script.parent))
    assert command("resume", "s", runs="my runs") == "tune_topkd resume s"


@pytest.mark.parametrize("command", [["status"], ["teacher", "--prune"]], ids=" ".join)
def test_what_needs_no_mlflow_does_not_look_at_its_uri(tmp_path, inside, monkeypatch, command):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://nowhere")
    assert inside(*command, "--runs-dir", tmp_path).returncode == 0
    refused = inside("track", "s", "--runs-dir", tmp_path)
    assert refused.returncode == 2
    assert "gopher" in refused.stderr


def test_help_says_every_default_and_choice(inside):
    told = " ".join(re.sub(r"[│╭╮╰╯─]", " ", inside("run", "--help").stdout).split())
    for words in (
        "[default: search_spaces/digits.yaml]",
        "MLflow's URI [default: SQLite in the runs dir].",
        "[default: a private one on this machine]",
        "[default: the YAML's]",
        "[default: what fits]",
    ):
        assert words in told
    assert inside("--version").stdout == f"tune_topkd {__version__}\n"


# --- one training -------------------------------------------------------------------------------------------------


def test_train_trains_one_config_prints_and_logs_it(space, runs, inside):
    done = inside("train", space, "--runs-dir", runs, "--seed", 5, "--set", "loss.k=2", "--set", "recipe.lr=0.2")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["name"], said["seed"], said["epochs"]) == ("small-seed5", 5, 4)
    assert "validation split" in said["selected_by"]
    assert len(re.findall(r"^epoch \d/4: .*val_top1", done.stderr, re.M)) == 4
    folder = runs / "trained" / "small-seed5"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1] == {"epoch": 4} | said["metrics"]
    trial = validated(TrialConfig, read_yaml(folder / "config.yaml"), "it")
    assert (trial.loss, trial.recipe.lr, trial.seed, trial.method) == ({"k": 2}, 0.2, 5, "topkd")
    assert train(trial).metrics["val_top1"] == said["metrics"]["val_top1"]

    model = build_configured(trial.student, num_classes=10)
    load_weights(model, folder / "student.pt")
    dataset = load_dataset(trial.data)
    found = evaluate(model, dataset.val, mean=dataset.mean, std=dataset.std)
    assert found.top1 == said["metrics"]["val_top1"]
    assert said["weights"] == {"student.pt": {"epoch": 4, "val_top1": said["metrics"]["val_top1"]}}
    assert json.loads((folder / "result.json").read_text()) == said
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "metrics.jsonl", "result.json", "student.pt"}

    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments, "tags.training = 'small-seed5'")
    assert (run.info.status, run.data.params["loss.k"], run.data.params["recipe.lr"]) == ("FINISHED", "2", "0.2")
    assert run.data.metrics["val_top1"] == said["metrics"]["val_top1"]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val_top1")] == [1, 2, 3, 4]


def test_a_second_training_of_a_name_does_not_touch_the_first_and_a_dead_mlflow_stops_neither(space, runs, inside):
    arguments = ("train", space, "--runs-dir", runs, "--name", "twice", "--epochs", 1, "--mlflow-uri", DEAD)
    first, second = inside(*arguments), inside(*arguments)
    assert [json.loads(done.stdout)["name"] for done in (first, second)] == ["twice-seed0", "twice-seed0-2"]
    assert "MLflow has not got this training" in first.stderr
    assert "secret" not in first.stderr


DEAD = "http://user:secret@127.0.0.1:9"


def test_the_best_test_epoch_is_for_a_single_training_and_marks_it(space, runs, inside, tmp_path):
    on_test = ("--set", "data.selection=best_test_epoch", "--mlflow-uri", DEAD)
    done = inside("train", space, "--runs-dir", runs, "--name", "on-test", "--epochs", 3, *on_test)
    said = json.loads(done.stdout)
    assert "TEST set" in said["selected_by"]
    assert said["metrics"]["best_epoch_test_top1"] >= said["metrics"]["test_top1"]
    assert "val_top1" not in said["metrics"]
    assert_each_file_does_what_is_said_of_it(runs / "trained" / "on-test-seed0", said)
    refused = inside("run", space, "--runs-dir", tmp_path / "runs", *on_test[:2])
    assert (refused.returncode, (tmp_path / "runs").exists()) == (2, False)
    assert "data.selection (from --set data.selection=best_test_epoch) = 'best_test_epoch'" in refused.stderr
    assert "a sweep never looks at the test set" in refused.stderr


def assert_each_file_does_what_is_said_of_it(folder, said):
    """Of a training that was selected on the test set: its best epoch, of equals the first, and its last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["test_top1"])
    assert said["weights"] == {
        name: {"epoch": line["epoch"], "test_top1": line["test_top1"]}
        for name, line in (("student-last.pt", lines[-1]), ("student-best.pt", best))
    }
    assert best["test_top1"] == said["metrics"]["best_epoch_test_top1"]
    names = {"config.yaml", "metrics.jsonl", "result.json", "student-best.pt", "student-last.pt"}
    assert {path.name for path in folder.iterdir()} == names
    trial = validated(TrialConfig, read_yaml(folder / "config.yaml"), "it")
    for name, told in said["weights"].items():
        model = build_configured(trial.student, num_classes=10)
        load_weights(model, folder / name)
        dataset = load_dataset(trial.data)
        found = evaluate(model, dataset.val, mean=dataset.mean, std=dataset.std)
        assert found.top1 == told["test_top1"]


class Killed(BaseException):
    """As a kill: nothing after it is done."""


def one_training(monkeypatch, tmp_path, accuracies, end=None):
    """`train_one` of a training whose weights are its epochs, one number each: its folder and what it says."""

    def made_up(config, report):
        model, metrics = torch.nn.Linear(1, 1, bias=False), {}
        for epoch, accuracy in enumerate(accuracies, start=1):
            best = max(accuracies[:epoch])
            metrics = {"train_loss": 1.0, "test_top1": accuracy, "best_epoch_test_top1": best}
            torch.nn.init.constant_(model.weight, epoch)

            def save(folder):
                torch.save({"model": model.state_dict()}, folder / "checkpoint.pt")

            report(epoch, metrics, save)
        if end is not None:
            raise end
        return TrainResult(epoch, metrics, model, diverged=False)

    monkeypatch.setattr("tune_topkd.train.train", made_up)
    monkeypatch.setattr("tune_topkd.tracking.log_training", lambda *_, **__: "")
    raw = yaml.safe_load(SPACE) | {"method": "ce", "teacher": None, "baselines": None}
    raw = {key: raw[key] for key in ("data", "student", "recipe", "method")}
    raw["data"]["selection"] = "best_test_epoch"
    place = Workspace(tmp_path, f"sqlite:///{tmp_path}/gone/mlflow.db")
    folder = tmp_path / "trained" / "t-seed0"
    try:
        return folder, train_one(validated(PairConfig, raw, "it"), "t", 0, place, SILENT)
    except Killed:
        return folder, None


def epochs_of(folder):
    """The epoch of each file of weights."""
    return {path.name: int(torch.load(path)["model"]["weight"]) for path in folder.glob("*.pt")}


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [([10.0, 30.0, 20.0], 2), ([10.0, 30.0, 30.0], 2), ([30.0, 20.0], 1), ([1.0, 2.0, 3.0], 3), ([0.0, 0.0], 1)],
)
def test_a_training_selected_on_the_test_set_keeps_its_best_epoch(monkeypatch, tmp_path, accuracies, best):
    folder, said = one_training(monkeypatch, tmp_path, accuracies)
    assert epochs_of(folder) == {"student-best.pt": best, "student-last.pt": len(accuracies)}
    assert said["weights"]["student-best.pt"] == {"epoch": best, "test_top1": max(accuracies)}


def test_a_training_that_is_killed_leaves_files_that_say_so(monkeypatch, tmp_path):
    folder, _ = one_training(monkeypatch, tmp_path, [10.0, 30.0, 20.0], Killed())
    assert epochs_of(folder) == {"student-best.partial.pt": 2, "student-last.partial.pt": 3}
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "metrics.jsonl"}
    assert not (folder / "result.json").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_space_without_a_teacher_trains_and_sweeps(space, runs, inside, tmp_path):
    alone = tmp_path / "alone.yaml"
    content = yaml.safe_load(SPACE)
    del content["teacher"], content["relative"]
    content |= {"method": "ce", "space": {"lr": {"low": 0.05, "high": 0.2}}, "baselines": None}
    content["sweep"] = {"trials": 2, "asha": None}
    alone.write_text(yaml.safe_dump(content))
    done = launch("run", alone, "--runs-dir", runs)
    assert done.returncode == 0, done.stderr
    tuned = load_tuned_config(runs / "alone" / "tuned.yaml")
    assert (tuned.teacher, tuned.method, tuned.evidence.teacher) == (None, "ce", {})
    assert "Traceback" not in done.stderr
    assert inside("check", alone).returncode == 0
    refused = inside("teacher", alone, "--runs-dir", runs)
    assert (refused.returncode, "there is none" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("loss.kk=2", "loss.kk: is no parameter of method topkd; did you mean 'k'"),
        ("loss.k=11", "k must be at most 10, the number of classes, but got 11"),
        ("space.k.high=3", "--set space.k.high=3: a single training searches nothing; loss.NAME and recipe.NAME"),
        ("method=no_such_module:loss", "method: method 'no_such_module:loss' cannot be imported"),
        ("data.augment.mixup=0.2", "no rule is defined for both"),
        ("student.checkpoint=gone.pt", "student.checkpoint = "),
    ],
)
def test_what_a_single_training_cannot_do_is_told(space, tmp_path, inside, setting, told):
    done = inside("train", space, "--runs-dir", tmp_path / "runs", "--set", setting)
    assert (done.returncode, done.stdout, (tmp_path / "runs").exists()) == (2, "", False)
    assert told in done.stderr


# --- data and teachers that are not as they must be ---------------------------------------------------------------


def of_other_classes(folder):
    save_weights(build_model("digits_cnn", num_classes=7), folder / "t.pt")
    return {"teacher": {"name": "digits_cnn", "checkpoint": str(folder / "t.pt")}}, "a head for 7 classes"


def cut_off(folder):
    save_weights(build_model("digits_cnn", num_classes=10), folder / "t.pt")
    (folder / "t.pt").write_bytes((folder / "t.pt").read_bytes()[:-900])
    return {"teacher": {"name": "digits_cnn", "checkpoint": str(folder / "t.pt")}}, "t.pt: is damaged"


class Harm:
    def __reduce__(self):
        return (os.mkdir, (str(Path(tempfile.gettempdir()) / "harm_was_done"),))


def malicious(folder):
    torch.save({"model": Harm()}, folder / "t.pt")
    return {
        "teacher": {"name": "digits_cnn", "checkpoint": str(folder / "t.pt")}
    }, "is refused: it asks for posix.mkdir"


def no_better_than_chance(folder):
    model = build_model("digits_cnn", num_classes=10)
    torch.nn.init.zeros_(model.classifier.weight)
    save_weights(model, folder / "t.pt")
    return {"teacher": {"name": "digits_cnn", "checkpoint": str(folder / "t.pt")}}, "hardly better than chance"


def data_is_missing(folder):
    data = {"name": "cifar100", "root": str(folder)}
    return {"data": data, "teacher": RESNET, "student": "resnet8"}, "cifar-100-python"


def one_class_of_validation(folder):
    for label in ("a", "b"):
        for number in range(4):
            write(folder / "train" / label / f"{number}.png")
            write(folder / "val" / "images" / f"val_{label}{number}.png")
    data = {"name": "image_folder", "root": str(folder), "val_fraction": 0.5}
    return {"data": data, "teacher": RESNET, "student": "resnet8"}, "val"


def tiny_of_one_class(folder):
    for label in ("n01", "n02"):
        for number in range(4):
            write(folder / "tiny-imagenet-200" / "train" / label / "images" / f"{number}.JPEG")
            write(folder / "tiny-imagenet-200" / "val" / "images" / f"val_{label}{number}.JPEG")
    data = {"name": "tiny_imagenet", "root": str(folder), "kwargs": {"num_classes": 2}, "val_fraction": 0.5}
    return {"data": data, "teacher": RESNET, "student": "resnet8"}, "val_annotations.txt"


def labels_out_of_range(folder):
    place = folder / "cifar-100-python"
    place.mkdir()
    for part in ("train", "test"):
        content = {b"data": np.zeros((200, 3072), np.uint8), b"fine_labels": [n % 101 for n in range(200)]}
        (place / part).write_bytes(pickle.dumps(content, protocol=2))
    (place / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"x"] * 100}, protocol=2))
    return {"data": {"name": "cifar100", "root": str(folder)}, "teacher": RESNET, "student": "resnet8"}, "label"


RESNET = {"name": "resnet14", "recipe": {"epochs": 1, "milestones": []}}


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (90, 20, 30)).save(path)


@pytest.mark.parametrize(
    "wrong",
    [
        of_other_classes,
        cut_off,
        malicious,
        no_better_than_chance,
        data_is_missing,
        one_class_of_validation,
        tiny_of_one_class,
        labels_out_of_range,
    ],
)
def test_wrong_data_and_teachers_are_one_message_before_ray_starts(tmp_path, wrong, inside, monkeypatch):
    folder = tmp_path / "given"
    folder.mkdir()
    changes, told = wrong(folder)
    content = yaml.safe_load(SPACE) | changes
    content["space"]["k"] = {"low": 1, "high": 2}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    done = inside("run", tmp_path / "wrong.yaml", "--runs-dir", tmp_path / "runs")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "wrong").exists()
    assert not (Path(tempfile.gettempdir()) / "harm_was_done").exists()


def test_check_says_what_would_run_and_starts_nothing(space, tmp_path, inside, monkeypatch):
    monkeypatch.setenv("TUNE_TOPKD_RUNS_DIR", str(tmp_path / "runs"))
    done = inside("check", space, "--show")
    assert done.returncode == 0, done.stderr
    for words in (
        "small.yaml: valid",
        "6 trials and 2 baseline runs of up to 4 epochs",
        "at most 32 epochs",
        "per epoch",
    ):
        assert words in done.stderr
    assert yaml.safe_load(done.stdout)["recipe"]["momentum"] == 0.9
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
@of_ray_itself
def test_doctor_tells_what_is_there(tmp_path, inside):
    done = inside("doctor", "--runs-dir", tmp_path)
    assert done.returncode == 0, done.stdout
    for words in ("ok  python", "ok  torch", "ok  ray: private cluster: 1 node(s)", "ok  mlflow: sqlite", "GB free"):
        assert words in done.stdout
    sick = inside("doctor", "--runs-dir", "/proc/runs", "--address", "127.0.0.1:1")
    assert sick.returncode == 2
    assert sick.stdout.count("BAD") == 3


# --- the surface --------------------------------------------------------------------------------------------------


COMMANDS = {
    "run": "--name --trials --epochs --seed --max-concurrent --cpus-per-trial --gpus-per-trial --time-budget --gpu-hours "
    "--cpu-hours --plateau --runs-dir --mlflow-uri --address --priority --warm-start --or-resume --json --set",
    "init": "--data --teacher --student --checkpoint --root --epochs --image-size --output -o",
    "check": "--trials --epochs --set --show --cpus-per-trial --gpus-per-trial --runs-dir --address",
    "schema": "--output -o",
    "resume": "--trials --time-budget --gpu-hours --cpu-hours --runs-dir --mlflow-uri --address --priority --json --set",
    "confirm": "--finalists --seeds --again --runs-dir --mlflow-uri --address --priority --json --set",
    "verify": "--seeds --set",
    "report": "--format --output -o --runs-dir",
    "compare": "--format --output -o --runs-dir",
    "status": "--json --campaign --watch --every --runs-dir",
    "submit": "--name --trials --epochs --seed --time-budget --runs-dir --mlflow-uri --address --priority --set "
    "--cpus-per-trial --gpus-per-trial",
    "jobs": "--json --address",
    "logs": "--follow -f --address",
    "stop": "--address",
    "track": "--runs-dir --mlflow-uri",
    "audit": "--mlflow --runs-dir --mlflow-uri",
    "export": "--format --output -o --runs-dir --mlflow-uri",
    "teacher": "--set --measure --fill-bank --prune --seed --runs-dir",
    "train": "--set --name --epochs --seed --runs-dir --mlflow-uri",
    "doctor": "--runs-dir --mlflow-uri --address",
}


def test_the_command_line_grows_only_on_purpose():
    commands = typer.main.get_command(app).commands
    assert {
        name: {o for p in command.params if p.param_type_name == "option" for o in p.opts}
        for name, command in commands.items()
    } == {name: set(options.split()) for name, options in COMMANDS.items()}


def test_help_is_quick_to_import():
    code = (
        "import sys, tune_topkd.cli; sys.exit(bool({'torch', 'ray', 'mlflow', 'optuna', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_repeated_trials_are_told_and_a_space_of_the_project_says_nothing_of_itself(tmp_path):
    few = tmp_path / "few.yaml"
    content = yaml.safe_load(SPACE)
    del content["relative"]
    content |= {"space": {"k": {"low": 1, "high": 2}, "alpha": [1.0, 2.0]}, "baselines": None}
    few.write_text(yaml.safe_dump(content | {"sweep": {"trials": 12}}))
    told = "the space has 4 points, so 8 of 12 trials repeat another, with the same seed and result"
    assert preflight.load_checked(str(few)).warnings == (told,)
    runs = Workspace(tmp_path / "runs", "")
    assert [Sweep.new(source, None, runs).notes for source in ("digits", few)] == [(), (told,)]
    assert preflight.load_checked("digits").warnings, "`check` tells all"


def test_the_time_that_check_tells_counts_more_than_steps():
    config = preflight.load_checked("digits").config
    minutes = cost.sweep_seconds(config, (359, 898), [cost.Step(0.001, 0.001)]) / 60
    assert 1 < minutes < 4, "two minutes on two cores"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "  at epochs 6 and 18 about one trial in 3 goes on, by val_top1_ema"),
        (
            {"sweep.asha.grace_epochs": 9, "sweep.rung_metric": "val_top1"},
            "  at epoch 9 about one trial in 3 goes on, by val_top1",
        ),
        ({"recipe.epochs": 6}, "  no trial is stopped early: ASHA's first rung, epoch 6, is not before the last"),
        ({"sweep.asha": None}, None),
        ({"sweep.cpus_per_trial": 2}, "this machine has room for 2 trials at once (5 CPUs)"),
        ({"sweep.max_concurrent": 1}, "this machine has room for 1 trial at once (5 CPUs)"),
        ({"sweep.gpus_per_trial": 0.5}, "this machine has room for 4 trials at once (5 CPUs and 2 GPUs)"),
        ({"sweep.gpus_per_trial": "auto"}, "how many trials run at once is measured before the first begins"),
    ],
)
def test_check_tells_the_rungs_and_the_room(settings, told, monkeypatch):
    monkeypatch.setattr(cost.machine, "cpus", lambda: 5)
    monkeypatch.setattr(cost.machine, "gpus", lambda: [Gpu("NVIDIA H200", 0, 1, 0)] * 2)
    config = preflight.load_checked("digits", [Override(key, value, "") for key, value in settings.items()]).config
    lines = [*cost.describe(config, with_time=False), *cost._room_here(config)]
    if told is None:
        assert not [line for line in lines if " goes on, by" in line or "stopped early" in line]
    else:
        assert told in lines


def test_the_time_is_told_before_the_data_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_TIMED_STEPS", 2)
    config = preflight.load_checked("cifar100-resnet56-resnet20", [Override("data.root", str(tmp_path), "")]).config
    *_, told = cost.describe(config)
    assert re.search(r"about [\d.]+ (h|days) one trial at a time", told)
