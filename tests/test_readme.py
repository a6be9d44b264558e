"""The README is true: its commands run, as a newcomer would run them."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_state

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands():
    lines = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_command_is_of_a_kind_that_the_test_below_runs():
    assert {command.split()[0] for command in commands()} == {"make", "python", "mlflow"}
    assert commands()[:2] == ["make sweep", "make test"]


def test_what_it_links_to_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_knows_its_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("sweep", "test", "check", "bench", "analysis", "clean"):
        assert re.search(rf"^{target}:", makefile, re.M), target


SMALLER = {
    "recipe: {epochs: 60": "recipe: {epochs: 6",
    "epochs: 27": "epochs: 9",
    "grace_epochs: 6": "grace_epochs: 3",
    "trials: 80": "trials: 24",
    "finalists: {count: 3, seeds: 4, baselines: 2}": "finalists: {count: 2, seeds: 2}",
    "methods: [ce, kd, defaults], trials: 6": "methods: [ce, kd, defaults], trials: 2",
}
"""A tenth of the work in the sweeps of digits: it is the commands that are tested, not their answers."""
SHORTER = {
    "confirm digits": "confirm digits --finalists 2 --seeds 2",
    "verify runs/digits/tuned.yaml": "verify runs/digits/tuned.yaml --seeds 1",
}
"""The same of commands, by what they end with."""
OF_DIGITS = {"trials: 80", "finalists: {count: 3, seeds: 4, baselines: 2}"}
"""What digits-linear does not have."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The working tree under another path, with this environment as its own, no runs, and less work in the sweeps."""
    folder = tmp_path_factory.mktemp("checkout")
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    for name in tracked.stdout.split():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("digits", "digits-linear"):
        space = folder / "search_spaces" / f"{name}.yaml"
        content = space.read_text()
        for old, new in SMALLER.items():
            assert old in content or (name == "digits-linear" and old in OF_DIGITS), old
            content = content.replace(old, new)
        space.write_text(content)
    return folder


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_the_commands_run_one_after_the_other(checkout):
    environment = {name: v for name, v in os.environ.items() if not name.startswith("TUNE_TOPKD")}
    environment["PATH"] = f"{sys.prefix}/bin:{environment['PATH']}"
    if not (Path(sys.prefix) / ".installed").exists():
        pytest.skip("the environment was not made by make")
    for command in commands():
        if command == "make test":  # this is it
            continue
        if command.startswith("mlflow ui"):
            assert_page_opens(command, checkout, environment)
            continue
        for end, shorter in SHORTER.items():
            command = f"{command.removesuffix(end)}{shorter}" if command.endswith(end) else command
        done = subprocess.run(command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True)
        may_not_hold = " verify " in command  # by chance one promise in twenty does not, which is exit code 1
        assert done.returncode in ((0, 1) if may_not_hold else (0,)), f"{command}\n{done.stdout}\n{done.stderr}"
    state = read_state(checkout / "runs" / "digits" / "ledger.jsonl")
    assert len(state.arm("search")) >= 24
    assert state.counts()[TrialStatus.PRUNED] >= len(state.arm("search")) / 3
    for page in ("01-one-sweep", "02-how-the-search-went", "03-best-k"):
        assert (checkout / "runs" / "digits" / f"{page}.html").stat().st_size > 100_000
    said = ""
    for block in blocks("python"):
        code = subprocess.run(
            [sys.executable, "-c", block], cwd=checkout, env=environment, capture_output=True, text=True
        )
        assert code.returncode == 0, code.stderr
        said += code.stdout
    ended = read_state(checkout / "runs" / "from-python" / "ledger.jsonl").arm("search")
    assert [f"trial {trial.key}: {trial.status} at" in said for trial in ended] == [True] * 8
    assert "best: {'k': " in said
    compile((checkout / "tuned.py").read_text(), "tuned.py", "exec")


def assert_page_opens(command, folder, environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        f"exec {command} --port {port}",
        shell=True,
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read()
                break
            except OSError:
                assert time.monotonic() < deadline, "MLflow's page did not open"
                time.sleep(0.3)
        assert b"<title>MLflow</title>" in page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
