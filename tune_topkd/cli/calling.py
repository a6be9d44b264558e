"""How this program was called, so that the commands it prints can be pasted where the user is."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tune_topkd.storage import is_uri
from tune_topkd.sweep.workspace import DEFAULT_RUNS
from tune_topkd.sweep.workspace import MLFLOW_VARIABLE
from tune_topkd.sweep.workspace import RAY_VARIABLE
from tune_topkd.sweep.workspace import RUNS_DIR_VARIABLE
from tune_topkd.sweep.workspace import Workspace

_WITHOUT_MLFLOW = ("export", "status", "report", "verify")
_WITHOUT_RUNS = ("verify",)
_WITH_RAY = ("resume", "confirm")


def command_for(workspace: Workspace, *words: str) -> str:
    """A command line of this program for a workspace."""
    from tune_topkd.tracking import sqlite_uri

    is_default = workspace.mlflow_uri == sqlite_uri(workspace.runs / "mlflow.db") or words[0] in _WITHOUT_MLFLOW
    uri, address = "" if is_default else workspace.mlflow_uri, workspace.address if words[0] in _WITH_RAY else None
    runs = None if words[0] in _WITHOUT_RUNS else workspace.place
    if words[0] in _WITH_RAY and workspace.priority != 1.0:
        words = (*words, "--priority", f"{workspace.priority:g}")
    return command(*words, runs=runs, mlflow_uri=uri, address=address)


def command(*words: str, runs: str | None = None, mlflow_uri: str = "", address: str | None = None) -> str:
    """A command line of this program.

    Args:
        words: the command and its arguments.
        runs: where the runs lie; stands in the command if it would be elsewhere without.
        mlflow_uri: MLflow's, if it is not the default of these runs; one with a password is left out.
        address: the Ray cluster, if it is not a private one; the environment may name it.
    """
    options = [] if runs is None or runs == _default_runs() else ["--runs-dir", runs]
    if mlflow_uri and mlflow_uri != os.environ.get(MLFLOW_VARIABLE) and not _has_secret(mlflow_uri):
        options += ["--mlflow-uri", mlflow_uri]
    if address is not None and address != os.environ.get(RAY_VARIABLE):
        options += ["--address", address]
    return shlex.join([*_program(), *words, *options])


def notebooks_command(workspace: Workspace, sweep: str) -> str:
    """The command line that makes pages of the notebooks for a sweep; it is for a checkout."""
    runs = [] if str(workspace.runs) == _default_runs() else [f"RUNS={workspace.runs}"]
    return shlex.join(["make", "analysis", f"SWEEP={sweep}", *runs])


def _program() -> Sequence[str]:
    script = sys.argv[0]
    if Path(script).name == "__main__.py":
        return sys.orig_argv[0], "-m", "tune_topkd"
    if Path(script).suffix == ".py":
        return sys.orig_argv[0], script
    found = shutil.which(Path(script).name)
    is_on_path = found is not None and Path(script).exists() and os.path.samefile(found, script)
    return (Path(script).name,) if is_on_path else (script,)


def _default_runs() -> str:
    place = os.environ.get(RUNS_DIR_VARIABLE) or DEFAULT_RUNS
    return place.rstrip("/") if is_uri(place) else str(Path(place).expanduser().absolute())


def _has_secret(uri: str) -> bool:
    from tune_topkd.tracking import masked

    return masked(uri) != uri
