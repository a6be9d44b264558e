"""Signals that ask a process to end."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from tune_topkd.interruption import listening

ROOT = Path(__file__).parents[1]
WAIT = 30


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_a_signal_raises_and_says_so_at_once():
    said = []
    with listening() as interruption:
        interruption.say, interruption.advice = said.append, "; `resume s` goes on"
        with pytest.raises(KeyboardInterrupt):
            send()
        deadline = time.monotonic() + WAIT
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
    assert said == ["interrupted: stopping; `resume s` goes on; a second interruption ends it at once"]
    assert (interruption.is_asked, interruption.exit_code) == (True, 130)


def test_a_deferred_signal_only_leaves_its_mark_and_a_second_one_raises():
    with listening() as interruption:
        interruption.say = lambda text: None
        with interruption.deferred():
            assert not interruption.is_asked
            send(signal.SIGHUP)
            assert interruption.is_asked
            with pytest.raises(KeyboardInterrupt):
                send()
    assert interruption.exit_code == 129


def test_what_swallows_the_exception_does_not_swallow_the_interruption():
    def swallowing():
        try:
            send()
        except BaseException:  # noqa: BLE001
            return

    with listening() as interruption:
        interruption.say = lambda text: None
        swallowing()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(WAIT)


def test_what_winds_up_is_not_interrupted_again():
    wound_up = []

    def winding_up():
        try:
            send()
        finally:
            deadline = time.monotonic() + 2.5
            while time.monotonic() < deadline:
                time.sleep(0.05)
            wound_up.append(True)

    with listening() as interruption:
        interruption.say = lambda text: None
        with pytest.raises(KeyboardInterrupt):
            winding_up()
    assert wound_up


def test_after_close_nothing_is_raised_again():
    with listening() as interruption:
        interruption.say = lambda text: None
        with pytest.raises(KeyboardInterrupt):
            send()
        interruption.close()
        time.sleep(1.5)


def test_the_handlers_of_before_come_back_and_inner_listeners_share_one():
    before = signal.getsignal(signal.SIGTERM)
    with listening() as outer, listening() as inner:
        assert inner is outer
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) is before


def test_who_ignores_a_closed_terminal_goes_on_doing_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening() as interruption:
            send(signal.SIGHUP)
            assert not interruption.is_asked
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 130), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=str
)
def test_the_program_is_ended_while_it_is_still_being_imported(number, code):
    script = (
        "import os, sys, threading, importlib.abc\n"
        "class Slow(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'typer':\n"
        "            os.kill(os.getpid(), int(sys.argv[1]))\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from tune_topkd.cli import main\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(int(number))], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert "interrupted: stopping" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_import_is_finished_first_as_many_libraries_cannot_be_loaded_twice(tmp_path, monkeypatch):
    """Such as NumPy, whose second loading is an ImportError."""
    (tmp_path / "once.py").write_text(
        "import os, sys, time\nos.kill(os.getpid(), 15)\ntime.sleep(0.3)\nsys.loaded += 1\n"
    )
    (tmp_path / "swallowing.py").write_text("try:\n    import once\nexcept BaseException:\n    import once\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "loaded", 0, raising=False)

    def run():
        import_module("swallowing")
        time.sleep(WAIT)

    with listening() as interruption:
        interruption.say = lambda text: None
        with pytest.raises(KeyboardInterrupt):
            run()
    assert sys.loaded == 1
    assert {"once", "swallowing"} <= set(sys.modules)


def test_a_program_that_is_itself_run_by_an_import_is_interrupted(tmp_path, monkeypatch):
    steps = "from tests_listening import listening, send, time\nwith listening():\n    send()\n    time.sleep(30)\n"
    (tmp_path / "program.py").write_text(steps)
    monkeypatch.setitem(sys.modules, "tests_listening", SimpleNamespace(listening=listening, send=send, time=time))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        import_module("program")


def test_an_impatient_third_signal_ends_the_process_on_the_spot():
    script = (
        "import os, signal, sys\n"
        "from tune_topkd.interruption import listening\n"
        "with listening() as interruption, interruption.deferred():\n"
        "    for _ in range(3):\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
        "    print('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (130, "")
