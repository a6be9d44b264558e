"""The package as who installs it has it: a wheel in an environment of its own, far from any checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "tune_topkd", "search_spaces")


def call(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, **options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source)
    (wheel,) = built.glob("tune_topkd-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of commands of an environment that has the wheel, and the libraries of this one but not its checkout."""
    home = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", home)
    packages = Path(sysconfig.get_path("purelib", vars={"base": home}))
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python")
    call(*pip, "install", "--no-deps", "--no-index", wheel)
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # whose own .pth files do not count
    return home / "bin"


@pytest.fixture
def launch(installed, tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TUNE_TOPKD_RUNS_DIR")
    }
    environment["PATH"] = f"{installed}:{environment['PATH']}"

    def launch(*arguments):
        return call(installed / "tune-topkd", *arguments, cwd=tmp_path, env=environment)

    return launch


def test_the_wheel_has_every_module_and_every_search_space(wheel):
    found = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tune_topkd").rglob("*.py")}
    spaces = {f"tune_topkd/{path.relative_to(ROOT)}" for path in (ROOT / "search_spaces").rglob("*.yaml")}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "tune_topkd" / "report" / "page" / "templates").iterdir()}
    assert modules | spaces | pages | {"tune_topkd/py.typed"} <= found
    assert not [name for name in found if name.startswith(("tests", "search_spaces", "benchmarks"))]


def test_a_space_is_found_by_its_name_far_from_any_checkout(installed, launch):
    python = installed / "python"
    where = call(python, "-c", "import tune_topkd; print(tune_topkd.__file__)", cwd=installed).stdout.strip()
    assert Path(where).is_relative_to(installed.parent)
    assert launch("--version").stdout.startswith("tune_topkd ")
    done = launch("check", "digits")
    assert "digits.yaml: valid" in done.stderr
    assert "tune_topkd/search_spaces" in done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_runs_and_names_the_command_that_was_typed(launch, tmp_path):
    done = launch("run", "digits", "--trials", 4, "--epochs", 2, "--set", "baselines=null", "--set", "sweep.asha=null")
    assert "next: tune-topkd confirm digits" in done.stderr
    assert json.loads(launch("status", "digits", "--json").stdout)["state"] == "finished"
    header = json.loads((tmp_path / "runs" / "digits" / "ledger.jsonl").read_bytes().splitlines()[0])
    assert header["git_commit"] is None
    assert launch("audit", "digits").stdout == ""
