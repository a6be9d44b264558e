"""`status --watch`: a sweep that another process drives, until it ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ptys
import pytest
from test_confirm import PLAIN
from test_confirm import planted

from tune_topkd.cli.app import main
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.ledger import is_driven
from tune_topkd.sweep import Sweep

ROOT = Path(__file__).parents[1]


class Paused(SimulatedExecutor):
    """Trials that go on one report at a time, when they are told to."""

    def __init__(self):
        self._steps = threading.Semaphore(0)
        super().__init__(self.formula)

    def formula(self, trial, epoch):
        assert self._steps.acquire(timeout=120)
        return planted(trial, epoch)

    def go_on(self, reports):
        """Let so many reports come."""
        self._steps.release(reports)


@pytest.fixture
def driven(tmp_path):
    """A sweep of six trials of two epochs that a thread drives, the thread, and what lets it go on."""
    executor = Paused()
    sweep = Sweep.create(PLAIN, name="s", runs_dir=tmp_path / "runs", mlflow_uri="", address="local")
    thread = threading.Thread(target=sweep.run, kwargs={"executor": executor})
    thread.start()
    deadline = time.monotonic() + 60
    while not (sweep.folder / "ledger.jsonl").exists() or not is_driven(sweep.folder / "ledger.jsonl"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield sweep, thread, executor
    executor.go_on(1000)
    thread.join(60)


def command(*arguments, runs):
    program = [sys.executable, str(ROOT / "launch.py"), "status"]
    return [*program, *arguments, "--watch", "--every", "0.1", "--runs-dir", str(runs)]


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (160, 50)])
def test_on_a_terminal_the_picture_is_drawn_anew_until_the_sweep_ends(driven, columns, lines):
    sweep, thread, executor = driven
    pty = ptys.Pty(columns, lines)
    environment = os.environ | {"TERM": "xterm-256color"}
    arguments = command(runs=sweep.workspace.runs)  # the one that is under way
    process = subprocess.Popen(arguments, env=environment, stdout=pty.slave, stderr=pty.slave, start_new_session=True)
    try:
        executor.go_on(5)
        shown = pty.wait_for(lambda found: any("2 completed  1 running" in line for line in found))
        assert any(line.startswith("best   ") for line in shown)
        assert any(line.startswith(("trainings ━", "trainings ╸")) for line in shown)
        assert "\x1b[2J" not in pty.written, "a screen that is wiped flickers"
        executor.go_on(1000)
        thread.join(60)
        assert process.wait(60) == 0
        shown = pty.wait_for(lambda found: found[-1] == "" and any(line.startswith("s: finished") for line in found))
        assert not any("running" in line or line.startswith("trainings") for line in shown), "the picture is taken away"
        assert pty.screen.unknown == []
    finally:
        process.kill()
        process.wait()
        pty.close()


def test_ctrl_c_leaves_and_the_sweep_goes_on(driven):
    sweep, thread, executor = driven
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command("s", runs=sweep.workspace.runs), **pipes)
    executor.go_on(2)
    assert process.stdout.readline().startswith("s: running")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: stopping this display; the sweep s goes on; " in err
    assert thread.is_alive()


def called(monkeypatch, capfd, *arguments):
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["launch.py", "status", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capfd.readouterr()


def test_elsewhere_there_is_a_line_when_something_has_changed(driven, monkeypatch, capfd):
    sweep, _, executor = driven

    def go_on():
        for _ in range(3):
            time.sleep(0.5)
            executor.go_on(2)
        time.sleep(0.5)
        executor.go_on(1000)

    feeder = threading.Thread(target=go_on)
    feeder.start()
    code, out, _ = called(monkeypatch, capfd, "s", "--watch", "--every", "0.1", "--runs-dir", str(sweep.workspace.runs))
    feeder.join()
    lines = out.splitlines()
    assert code == 0
    assert lines[-1].startswith("s: finished, 6 completed of 6 trials; best ")
    assert all(line.startswith("s: running") for line in lines[:-1])
    assert 3 <= len(lines) <= 12, "one for a change, none for a look"
    assert len(set(lines)) == len(lines)


def test_a_sweep_that_nobody_drives_is_told_at_once(driven, monkeypatch, capfd):
    sweep, thread, executor = driven
    executor.go_on(1000)
    thread.join(60)
    runs = ("--runs-dir", str(sweep.workspace.runs))
    code, out, _ = called(monkeypatch, capfd, "s", "--watch", *runs)
    assert (code, out.count("\n"), out.startswith("s: finished, ")) == (0, 1, True)
    code, _, err = called(monkeypatch, capfd, "--watch", *runs)
    assert code == 2
    assert err == f"error: --watch: no sweep in {sweep.workspace.runs} is under way\n"
    code, _, err = called(monkeypatch, capfd, "nothing", "--watch", *runs)
    assert (code, err.count("\n")) == (2, 1)
