"""What the doctor looks at, when it says so, and what it leaves alone."""

import contextlib
import importlib
import os
import shutil

import pytest

from tune_topkd import machine
from tune_topkd.cli import display
from tune_topkd.config import ConfigError
from tune_topkd.execution import cluster
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import doctor
from tune_topkd.sweep import preflight
from tune_topkd.sweep.doctor import Finding
from tune_topkd.terminal import Console
from tune_topkd.terminal import close_stderr

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 and what it imports
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
)

app = importlib.import_module("tune_topkd.cli.app")  # the package has a name `app` of its own


def test_each_look_is_announced_before_it_is_done_and_told_when_it_is(monkeypatch, tmp_path):
    happened = []

    @contextlib.contextmanager
    def progress(what):
        happened.append(what)
        yield

    def looks_at(what):
        def look(*_):
            happened.append(f"{what} is done")
            yield Finding(what, "")

        return look

    for name in ("_torch", "_ray", "_mlflow", "_runs"):
        monkeypatch.setattr(doctor, name, looks_at(name))
    for finding in doctor.examine(Workspace(tmp_path, "sqlite:///x.db"), progress):
        happened.append(f"{finding.what} is told")
    assert happened[0] == "python is told"
    assert happened[-9:] == [
        "starting a private Ray",
        "_ray is done",
        "_ray is told",
        "asking MLflow",
        "_mlflow is done",
        "_mlflow is told",
        "writing to the runs folder",
        "_runs is done",
        "_runs is told",
    ]


def test_a_line_says_what_is_done_where_there_is_no_terminal(capfd):
    console = Console()
    with display.progress_of(console)("asking MLflow"):
        console.terminal.flush()
        assert capfd.readouterr().err == "asking MLflow …\n"


def test_a_database_that_is_not_there_is_not_made(tmp_path):
    (finding,) = doctor._mlflow(Workspace(tmp_path / "runs", f"sqlite:///{tmp_path}/here/m.db"))
    assert finding.is_well
    assert "which the first sweep makes" in finding.text
    assert not list((tmp_path / "here").iterdir())


def test_a_database_that_is_there_is_only_read(tmp_path, empty_store):
    shutil.copy(empty_store, tmp_path / "m.db")
    before = (tmp_path / "m.db").read_bytes()
    (finding,) = doctor._mlflow(Workspace(tmp_path / "runs", f"sqlite:///{tmp_path}/m.db"))
    assert finding == Finding("mlflow", f"sqlite:///{tmp_path}/m.db")
    assert (tmp_path / "m.db").read_bytes() == before


def test_what_a_process_may_use_is_told_beside_what_there_is(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine, "cpus", lambda: 4)
    monkeypatch.setattr(machine, "memory", lambda: 2_000_000_000)
    cpus, memory = doctor._machine()
    assert cpus.text == "4 of 64 (its affinity and its cgroup allow no more)"
    assert memory.text.startswith("2 GB of ")


@pytest.mark.parametrize("gpus", [0])
def test_what_a_trial_is_given_is_held_against_what_this_process_may_use(monkeypatch, gpus):
    import formulas

    monkeypatch.setattr(machine, "cpus", lambda: 1)
    preflight.check_machine(formulas.sweep_config(sweep={"cpus_per_trial": 1.0, "gpus_per_trial": gpus}), "s")
    with pytest.raises(ConfigError, match="this process may use 1 CPUs of this machine"):
        preflight.check_machine(formulas.sweep_config(sweep={"cpus_per_trial": 2.0, "gpus_per_trial": gpus}), "s")


def test_a_place_for_temporary_files_that_cannot_be_had_is_a_finding(monkeypatch, tmp_path):
    from tune_topkd.execution import scratch

    monkeypatch.setattr(scratch, "OTHERWISE", ())
    for name in scratch.CHOSEN_BY_USER:
        monkeypatch.setenv(name, str(tmp_path / "missing"))
    (finding,) = doctor._ray(Workspace(tmp_path, "sqlite:///x.db"))
    assert not finding.is_well
    assert "no folder for temporary files" in finding.text


@pytest.mark.parametrize(
    ("option", "variable", "used", "said"),
    [
        (None, None, None, ""),
        ("h:1", None, "h:1", ""),
        ("h:1", "h:1", "h:1", "Ray: the cluster at h:1, as RAY_ADDRESS says; --address local starts a private one\n"),
        ("h:2", "h:1", "h:2", ""),
        ("local", "h:1", None, ""),
        ("local", "local", None, ""),
        ("", "", None, ""),
    ],
)
def test_the_environment_s_cluster_is_used_and_said(monkeypatch, capfd, option, variable, used, said):
    """`option` is what Typer gives: the environment's value where there is no option."""
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert app._cluster_of(option) == used
    close_stderr()
    assert capfd.readouterr().err == said


def test_the_environment_s_address_is_taken_by_the_commands_that_start_ray(monkeypatch):
    import typer

    for name in ("run", "resume", "check", "doctor"):
        options = typer.main.get_command(app.app).commands[name].params
        assert next(option.envvar for option in options if option.name == "address") == "RAY_ADDRESS"


def test_the_private_ray_is_kept_from_the_environment_s_cluster():
    assert "RAY_ADDRESS" in cluster._OF_ANOTHER_CLUSTER
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR" in cluster._OF_ANOTHER_CLUSTER
