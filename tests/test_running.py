"""A sweep from its claim to its end, and what a resume must find unchanged; trials are formulas, without Ray."""

import importlib
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
import yaml
from formulas import EPOCHS
from formulas import value
from PIL import Image

import tune_topkd.data.datasets as datasets
from tune_topkd import execution
from tune_topkd.config import ConfigError
from tune_topkd.config import Override
from tune_topkd.config import Problem
from tune_topkd.execution import Packed
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.execution.checkpoints import write_checkpoint
from tune_topkd.interruption import listening
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Share
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.models import build_model
from tune_topkd.models import save_weights
from tune_topkd.space import digest
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import audit
from tune_topkd.sweep import driver
from tune_topkd.sweep import identity
from tune_topkd.sweep import prepare
from tune_topkd.sweep import workspace
from tune_topkd.terminal import Console
from tune_topkd.terminal import close_stderr

NETWORK = """
'''A network of one map.'''
import torch
from torch import nn

def network(num_classes=10):
    '''It has {bias} bias.'''  # {comment}
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes, bias={bias}))
"""
LOSS = """
import torch
from torch.nn import functional

def loss(student, teacher, labels, *, sharpness: float = 1.0):
    return functional.cross_entropy({factor} * sharpness * student, labels)
"""


DATASET = """
import torch
from tune_topkd.data import DatasetInfo, Parts, Source, Split

class Bright(Source):
    def info(self, config):
        return DatasetInfo(2, (1, 8, 8))

    def read(self, config):
        labels = torch.arange(80) % 2
        images = ({factor} * labels).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
        images[:, 0, 0, 0] = torch.arange(80)
        return Parts(Split(images, labels))
"""

SEARCH = """
from tune_topkd.ledger import Decision
from tune_topkd.search import RandomSampler

class Shifted(RandomSampler):
    def __init__(self, axes, seed):
        super().__init__(axes, seed + {shift})

class Patient:
    def __init__(self, config):
        self.patience = {shift}

    def decide(self, key, epoch, value):
        return Decision.CONTINUE

    def replay(self, state):
        pass
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A teacher for the digits, good enough to be one, and another."""
    from tune_topkd.config import RecipeConfig
    from tune_topkd.config import TrialConfig
    from tune_topkd.train import train

    folder = tmp_path_factory.mktemp("weights")
    for seed in (0, 1):
        recipe = RecipeConfig(epochs=2, lr=0.1, milestones=[])
        trial = {"data": {"name": "digits"}, "student": "digits_cnn_tiny", "method": "ce", "seed": seed}
        result = train(TrialConfig.model_validate({**trial, "recipe": recipe.model_dump()}))
        save_weights(result.model, folder / f"{seed}.pt")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a user's modules, on the path and forgotten afterwards."""
    (tmp_path / "my_nets.py").write_text(NETWORK.format(bias=True, comment="once"))
    (tmp_path / "my_losses.py").write_text(LOSS.format(factor=1))
    (tmp_path / "my_data.py").write_text(DATASET.format(factor=100))
    (tmp_path / "my_search.py").write_text(SEARCH.format(shift=1))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    forget()


def forget():
    """As a new process would begin."""
    datasets._loaded.cache_clear()
    for name in ("my_nets", "my_losses", "my_data", "my_search"):
        sys.modules.pop(name, None)
    for left in Path.cwd().glob("__pycache__"):
        shutil.rmtree(left)


def space(weights, **sections):
    raw = {
        "data": {"name": "digits"},
        "teacher": {"name": "digits_cnn_tiny", "checkpoint": str(weights / "mine.pt")},
        "student": "digits_linear",
        "recipe": {"epochs": EPOCHS, "lr": 0.1},
        "space": {"k": {"low": 1, "high": 9}, "lr": {"low": 0.01, "high": 1.0, "log": True}},
        "sweep": {"trials": 2, "asha": None},
        "baselines": None,
    }
    raw |= sections
    return raw


class Formulas(SimulatedExecutor):
    """Trials that train nothing and keep checkpoints."""

    def __init__(self):
        super().__init__(self.formula)
        self.sweep = None

    def run(self, search, work):
        self.sweep = work.folder
        return super().run(search, work)

    def formula(self, trial, epoch):
        metrics = {"val_top1": value(trial.config, epoch)}
        folder = self.sweep / "trials" / str(trial.record.key)
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder, epoch, metrics, lambda folder: (folder / "weights").touch())
        return metrics


class Sweeps:
    """Runs sweeps in a folder, their trials as formulas."""

    def __init__(self, folder):
        self.place = Workspace(folder / "runs", mlflow_uri="")
        self.folder = folder
        self.executor = Formulas()

    def run(self, raw, name="s"):
        path = self.folder / "space.yaml"
        path.write_text(yaml.safe_dump(raw))
        return Sweep.new(path, name, self.place).run(executor=self.executor)

    def resume(self, name="s", **more):
        forget()
        return Sweep(name, self.place).resume(executor=self.executor, **more)

    def events(self, name="s"):
        return read_events(self.place.folder(name) / "ledger.jsonl")[0]

    def audit(self, name="s"):
        forget()
        return audit(name, self.place, with_mlflow=False)


@pytest.fixture
def sweeps(here, monkeypatch, weights):
    for seed in (0, 1):
        shutil.copy(weights / f"{seed}.pt", here / f"{seed}.pt")
    shutil.copy(weights / "0.pt", here / "mine.pt")
    return Sweeps(here)


# --- what results depend on -------------------------------------------------------------------------------------------


def folder_of_images(root, shade=0):
    for label, name in enumerate(("one", "two")):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(12):
            pixels = torch.full((8, 8), 40 * label + number + shade, dtype=torch.uint8)
            pixels[number % 8, label] = 255 - shade
            Image.fromarray(pixels.numpy()).save(root / name / f"{number}.png")


def overwritten_teacher(here):
    shutil.copy(here / "1.pt", here / "mine.pt")


def overwritten_student(here):
    save_weights(build_model("digits_linear", num_classes=10), here / "student.pt")


def edited_network(here):
    (here / "my_nets.py").write_text(NETWORK.format(bias=False, comment="once"))


def edited_loss(here):
    (here / "my_losses.py").write_text(LOSS.format(factor=2))


def edited_dataset(here):
    (here / "my_data.py").write_text(DATASET.format(factor=90))


def edited_search(here):
    (here / "my_search.py").write_text(SEARCH.format(shift=2))


def other_images(here):
    folder_of_images(here / "images", shade=1)


CHANGES = {
    "teacher's weights": ({}, overwritten_teacher, "teacher.checkpoint"),
    "student's weights": (
        {"student": {"name": "digits_linear", "checkpoint": "student.pt"}},
        overwritten_student,
        "student.checkpoint",
    ),
    "student's network": ({"student": "my_nets:network"}, edited_network, "student.name"),
    "loss": (
        {"method": "my_losses:loss", "space": {"sharpness": {"low": 0.5, "high": 2.0}}},
        edited_loss,
        "code my_losses",
    ),
    "data": (
        {
            "data": {"name": "image_folder", "root": "images", "val_fraction": 0.25, "test_fraction": 0.25},
            "teacher": None,
            "student": "resnet8",
            "method": "ce",
            "space": {"lr": {"low": 0.01, "high": 1.0}},
        },
        other_images,
        "data",
    ),
    "dataset's code": (
        {
            "data": {"name": "my_data:Bright"},
            "teacher": None,
            "student": "digits_linear",
            "method": "ce",
            "space": {"lr": {"low": 0.01, "high": 1.0}},
        },
        edited_dataset,
        "code my_data",
    ),
    "sampler": (
        {"sweep": {"trials": 2, "asha": None, "sampler": "my_search:Shifted"}},
        edited_search,
        "code my_search",
    ),
    "scheduler": ({"sweep": {"trials": 2, "scheduler": "my_search:Patient"}}, edited_search, "code my_search"),
}


@pytest.mark.parametrize(("sections", "change", "key"), CHANGES.values(), ids=CHANGES)
def test_what_a_result_depends_on_may_not_change_under_a_sweep(sweeps, here, sections, change, key):
    torch.manual_seed(0)
    overwritten_student(here)
    folder_of_images(here / "images")
    sweeps.run(space(here, **sections))
    assert sweeps.resume(trials=3).state.counts()["completed"] == 3
    assert sweeps.audit() == []
    before = len(sweeps.events())
    change(here)
    with pytest.raises(ConfigError) as caught:
        sweeps.resume(trials=4)
    also = {"code my_nets"} | ({"data"} if key == "code my_data" else set())  # what its code gives
    assert {problem.key for problem in caught.value.problems} - also == {key}
    assert "changed since the sweep began" in str(caught.value)
    assert len(sweeps.events()) == before, "nothing is written before it is refused"
    assert any("changed since the sweep began" in finding for finding in sweeps.audit())


def test_a_comment_is_no_change(sweeps, here):
    sweeps.run(space(here, student="my_nets:network"))
    (here / "my_nets.py").write_text(NETWORK.format(bias=True, comment="twice\n    # a comment"))
    assert sweeps.resume(trials=3).reason == "finished"
    assert sweeps.audit() == []


def test_a_trained_teacher_that_was_replaced_is_no_longer_the_sweeps(sweeps, here):
    raw = space(here, teacher={"name": "digits_cnn_tiny", "recipe": {"epochs": 3, "lr": 0.2, "milestones": []}})
    sweeps.run(raw)
    assert sweeps.resume(trials=3).reason == "finished"
    (weights,) = sweeps.place.runs.glob("teachers/*/teacher.pt")
    shutil.copy(here / "1.pt", weights)
    with pytest.raises(ConfigError, match="the teacher's weights changed since the sweep began"):
        sweeps.resume(trials=4)


def test_what_has_moved_is_found_where_the_user_says_and_stays_there(sweeps, here):
    sweeps.run(space(here))
    (here / "mine.pt").rename(here / "moved.pt")
    with pytest.raises(ConfigError, match=r"teacher\.checkpoint.*must be an existing file"):
        sweeps.resume()
    moved = [Override("teacher.checkpoint", "moved.pt", "--set")]
    assert sweeps.resume(trials=3, moved=moved).state.counts()["completed"] == 3
    assert sweeps.resume(trials=4).state.counts()["completed"] == 4
    assert sweeps.audit() == []
    with pytest.raises(ConfigError, match="changed since the sweep began"):
        sweeps.resume(moved=[Override("teacher.checkpoint", "1.pt", "--set")])


def test_nothing_but_places_may_be_set_on_a_resume(sweeps, here):
    sweeps.run(space(here))
    with pytest.raises(ConfigError, match="a sweep that has begun keeps its config"):
        sweeps.resume(moved=[Override("recipe.lr", 0.2, "--set")])


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"trials": 0}, "sweep.trials"),
        ({"time_budget": -1.0}, "sweep.time_budget"),
        ({"time_budget": float("nan")}, "sweep.time_budget"),
        ({"time_budget": float("inf")}, "sweep.time_budget"),
        ({"trials": 1}, "must be at least 2, the trials there are"),
    ],
)
def test_a_resume_checks_its_options_as_a_run_does(sweeps, here, given, rule):
    sweeps.run(space(here))
    before = len(sweeps.events())
    with pytest.raises(ConfigError, match=rule):
        sweeps.resume(**given)
    assert len(sweeps.events()) == before


def test_a_resume_from_elsewhere_that_lacks_the_users_module_is_refused(sweeps, here, tmp_path_factory, monkeypatch):
    sweeps.run(space(here, student="my_nets:network"))
    before = len(sweeps.events())
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(here)])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(ConfigError, match=rf"my_nets[\s\S]*the sweep was run from {here}"):
        sweeps.resume(trials=4)
    assert len(sweeps.events()) == before


# --- the frozen config --------------------------------------------------------------------------------------------


def test_a_config_key_that_came_later_changes_no_older_sweep(sweeps, here):
    """As if this version had one more key than the one that began the sweep."""
    sweeps.run(space(here))
    folder = sweeps.place.folder("s")
    for version in (2, 3):
        content = yaml.safe_load((folder / "sweep.yaml").read_text())
        content["recipe"].pop("distill_warmup", None)
        state = read_state(folder / "ledger.jsonl")
        old = {key: part for key, part in content.items() if key != "description"}
        taken = digest(old) if version == 2 else workspace.config_digest(content)
        state.header = replace(state.header, version=version, digest=taken)
        state.prepared = replace(state.prepared, digest=None)
        (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
        assert workspace.frozen_config(folder, state).recipe.distill_warmup is None


def test_a_config_that_was_edited_is_refused_and_one_whose_description_was_is_not(sweeps, here):
    sweeps.run(space(here))
    path = sweeps.place.folder("s") / "sweep.yaml"
    text = path.read_text()
    path.write_text(text.replace("description: ''", "description: mine"))
    assert sweeps.resume().reason == "finished"
    path.write_text(text.replace("batch_size: 64", "batch_size: 32"))
    with pytest.raises(ConfigError, match="has been changed since the sweep began"):
        sweeps.resume()


# --- one owner from the first second --------------------------------------------------------------------------------


def test_a_second_run_of_a_name_touches_nothing_of_the_first(sweeps, here, monkeypatch):
    """While the first still trains its teacher."""
    second = []
    ready = prepare.ready_data
    (here / "other.yaml").write_text(yaml.safe_dump(space(here, sweep={"trials": 7})))
    other = Sweep.new(here / "other.yaml", "s", sweeps.place)  # it looked before the first began

    def meanwhile(config):
        if not second:
            second.append(None)
            with pytest.raises(LedgerError, match="is being driven by"):
                other.run(executor=sweeps.executor)
        ready(config)

    monkeypatch.setattr(prepare, "ready_data", meanwhile)
    outcome = sweeps.run(space(here))
    assert second
    assert (outcome.reason, outcome.state.target) == ("finished", 2)
    assert workspace.frozen_config(sweeps.place.folder("s"), outcome.state).sweep.trials == 2


def test_a_sweep_that_is_interrupted_before_its_teacher_is_there_exists_and_resumes(sweeps, here, monkeypatch):
    def interrupted(*arguments):
        assert sweeps.place.has_begun("s"), "it exists from the first second"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "ready_teacher", interrupted)
        outcome = sweeps.run(space(here))
    assert (outcome.reason, outcome.is_interrupted) == ("interrupted", True)
    assert [event.name for event in sweeps.events()] == ["sweep", "driver", "stop"]
    sweeps.place.check_free("s")  # nothing would be lost by beginning it anew
    assert sweeps.resume().state.counts()["completed"] == 2
    assert sweeps.audit() == []
    with pytest.raises(ConfigError, match="`resume s` goes on"):
        sweeps.place.check_free("s")


def test_what_is_refused_before_the_first_trial_leaves_nothing(sweeps, here, monkeypatch):
    def refused(*arguments):
        raise ConfigError("teacher", [Problem(key="", rule="it diverged")])

    monkeypatch.setattr(prepare, "ready_teacher", refused)
    with pytest.raises(ConfigError, match="it diverged"):
        sweeps.run(space(here))
    assert not sweeps.place.folder("s").exists()


def test_what_breaks_is_in_the_stop_line(sweeps, here, monkeypatch):
    def broken(*arguments):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(sweeps.executor, "run", broken)
    with pytest.raises(OSError, match="No space left"):
        sweeps.run(space(here))
    assert sweeps.events()[-1].data["reason"] == "trouble"
    assert "No space left" in sweeps.events()[-1].data["error"]


def test_a_kill_between_the_two_writings_of_the_config_costs_nothing(sweeps, here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sweeps.executor, "measure", lambda *arguments: [Packed(Share(0.5, 0.0), 4, 100.0, 0.1)])
        writes = []
        write = driver.write_text

        def killed_at_the_second(path, text):
            writes.append(path)
            if len(writes) == 2:
                raise KeyboardInterrupt
            write(path, text)

        patch.setattr(driver, "write_text", killed_at_the_second)
        outcome = sweeps.run(space(here, sweep={"trials": 2, "asha": None, "cpus_per_trial": "auto"}))
    assert "cpus_per_trial: auto" in (sweeps.place.folder("s") / "sweep.yaml").read_text()
    assert outcome.config.sweep.cpus_per_trial == 0.5
    assert sweeps.resume().state.counts()["completed"] == 2


def test_trials_are_told_what_their_weights_must_be(sweeps, here):
    raw = space(here, student={"name": "digits_linear", "checkpoint": "student.pt"})
    overwritten_student(here)
    state = sweeps.run(raw).state
    config = workspace.frozen_config(sweeps.place.folder("s"), state)
    hashes = identity.file_hashes(config, state.identities, here / "mine.pt")
    assert {Path(path).name for path in hashes} == {"mine.pt", "student.pt"}
    assert identity.file_hashes(config, {}, None) == {}


# --- several ----------------------------------------------------------------------------------------------------------


def test_a_space_that_cannot_be_run_keeps_no_other_from_it(sweeps, here, monkeypatch, capfd):
    command_line = importlib.import_module("tune_topkd.cli.app")
    path = here / "space.yaml"
    path.write_text(yaml.safe_dump(space(here)))
    sweeps_of_it = [replace(Sweep.new(path, "a", sweeps.place), name=name) for name in "abc"]
    teacher = prepare.ready_teacher

    def failing(config, *rest, **more):
        if not sweeps.place.has_begun("b"):
            raise ConfigError("teacher", [Problem(key="", rule="it diverged")])
        return teacher(config, *rest, **more)

    monkeypatch.setattr(prepare, "ready_teacher", failing)
    monkeypatch.setattr(execution, "RayExecutor", lambda *arguments: sweeps.executor)
    close_stderr()  # as it was when this file was read
    console = Console()
    outcomes = command_line._each_run(sweeps_of_it, sweeps.place, console)
    assert {name: getattr(outcome, "reason", outcome) for name, outcome in outcomes.items()} == {
        "a": "teacher: it diverged",
        "b": "finished",
        "c": "finished",
    }
    with pytest.raises(typer.Exit) as ended:
        command_line._conclude(outcomes, sweeps.place, console)
    assert ended.value.exit_code == 2
    close_stderr()
    assert "a: not run: teacher: it diverged" in capfd.readouterr().err


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGHUP, 129)], ids=str
)
def test_every_signal_that_asks_for_an_end_gets_one(sweeps, here, monkeypatch, number, code):
    def waiting(*arguments):
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        time.sleep(60)

    monkeypatch.setattr(sweeps.executor, "run", waiting)
    before = signal.getsignal(number)
    with listening() as interruption:
        outcome = sweeps.run(space(here))
        assert (outcome.reason, interruption.exit_code) == ("interrupted", code)
    assert sweeps.events()[-1].data["reason"] == "interrupted"
    assert signal.getsignal(number) is before
