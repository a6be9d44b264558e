"""Stdout and stderr in any state: what is said there neither ends nor slows the work, and never is a traceback."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ptys
import pytest
from rich.console import Group
from rich.text import Text

from tune_topkd import terminal
from tune_topkd.terminal import Console
from tune_topkd.terminal import Terminal

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tty(monkeypatch):
    """A pty of 80 × 24, and a console on it."""
    monkeypatch.setenv("TERM", "xterm-256color")
    pty = ptys.Pty(80, 24)
    with Terminal(pty.slave) as opened:
        yield pty, Console(opened)
    pty.close()


@pytest.fixture
def pipe(monkeypatch):
    """The reading end of a pipe, and a console on the other."""
    monkeypatch.setattr(terminal, "PATIENCE", 0.2)
    monkeypatch.setattr(terminal, "PATIENCE_AT_END", 0.3)
    reading, writing = os.pipe()
    with Terminal(writing) as opened:
        os.close(writing)
        yield reading, Console(opened)


def read_all(descriptor):
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read().decode()


# --- a live region ------------------------------------------------------------------------------------------------


def test_a_live_region_is_drawn_anew_below_what_is_printed_and_taken_away(tty):
    pty, console = tty
    console.print("before")
    for number in range(3):
        console.show(Group(Text(f"frame {number}"), Text("second " + "=" * 200), Text("third")))
        console.print(f"note {number}")
    lines = pty.wait_for(lambda lines: "note 2" in lines and lines[-1] == "third")
    assert lines[:5] == ["before", "note 0", "note 1", "note 2", "frame 2"]
    assert lines[5].startswith("second =====")
    assert (len(lines[5]), len(lines)) == (79, 7), "a line is as wide as the screen but for a column"
    console.show(None)
    console.print("after")
    pty.wait_for(lambda lines: lines == ["before", "note 0", "note 1", "note 2", "after", ""])
    assert pty.screen.unknown == []


@pytest.mark.parametrize("columns", [50, 200])
def test_a_terminal_that_is_resized_loses_no_line_and_keeps_no_rest(tty, columns):
    pty, console = tty

    def show(number):
        console.show(Group(Text(f"frame {number}"), Text("x" * 300), Text("y" * 300)))

    console.print("a line that was there before")
    show(1)
    pty.wait_for(lambda lines: len(lines) == 4 and lines[-1].startswith("y"))
    pty.resize(columns, 30)
    show(2)
    wide = ["a line that was there before", "frame 2", "x" * (columns - 2) + "…", "y" * (columns - 2) + "…"]
    pty.wait_for(lambda lines: lines == wide)


def test_a_phase_is_one_line_as_long_as_it_lasts(tty):
    pty, console = tty
    with console.phase("reading") as show:
        pty.wait_for(lambda lines: lines == ["reading …"])
        show("reading [/half] of it")
        pty.wait_for(lambda lines: lines == ["reading [/half] of it …"])
    pty.wait_for(lambda lines: lines == [""])


@pytest.mark.parametrize("name", ["dumb", ""])
def test_a_terminal_without_a_cursor_and_a_pipe_have_no_live_region(monkeypatch, pipe, name):
    reading, console = pipe
    monkeypatch.setenv("TERM", name)
    pty = ptys.Pty(80, 24)
    with Terminal(pty.slave) as opened:
        for quiet in (Console(opened), console):
            with quiet.phase("reading"):
                quiet.print("a word")
        pty.wait_for(lambda lines: lines == ["a word", ""])
    pty.close()
    console.terminal.close()
    assert read_all(reading) == "a word\n"


# --- readers that are gone or asleep ------------------------------------------------------------------------------


def test_nothing_in_a_text_is_markup(pipe):
    reading, console = pipe
    told = "[/mnt/x] [bold]no[/bold] :smile: [link=http://a]"
    console.print(told, style="bold", soft_wrap=True)
    console.terminal.close()
    assert read_all(reading) == f"{told}\n"


def test_a_reader_that_is_gone_is_no_error(pipe):
    reading, console = pipe
    os.close(reading)
    for _ in range(50):
        console.print("x" * 1000)
        console.terminal.write("y\n")
        console.terminal.flush()


def test_a_reader_that_is_asleep_is_waited_for_once_and_finds_the_newest_lines(pipe):
    reading, console = pipe
    began = time.monotonic()
    for number in range(2000):
        console.print(f"line {number} {'x' * 300}", soft_wrap=True)
    took = time.monotonic() - began
    assert took < 100 * terminal.PATIENCE, "a wait for each line would take 400 s"
    found = []
    reader = threading.Thread(target=lambda: found.append(read_all(reading)))
    reader.start()
    console.terminal.close()
    reader.join()
    lines = found[0].splitlines()
    assert lines[-1].startswith("line 1999 ")
    assert any(line.endswith("lines left out: nobody read them)") for line in lines)
    assert len(found[0]) < terminal.MOST_BYTES_KEPT + 200_000


def test_the_end_waits_no_longer_than_it_says_for_a_reader_that_is_asleep(pipe):
    reading, console = pipe
    console.terminal.write("x" * 200_000)
    began = time.monotonic()
    console.terminal.close()
    assert time.monotonic() - began >= terminal.PATIENCE_AT_END
    os.close(reading)


def test_a_signal_handler_may_write_while_the_work_writes(pipe):
    reading, console = pipe
    before = signal.signal(signal.SIGUSR1, lambda *_: console.print("at once"))
    try:
        threading.Thread(target=lambda: [os.kill(os.getpid(), signal.SIGUSR1) for _ in range(20)]).start()
        for _ in range(200):
            console.print("line")
    finally:
        signal.signal(signal.SIGUSR1, before)
    console.terminal.close()
    assert "at once" in read_all(reading)


@pytest.mark.parametrize(("encoding", "told"), [("ascii", r"a \u2192 b \xd7"), ("cp1252", r"a \u2192 b ×")])
def test_what_an_encoding_lacks_is_escaped(monkeypatch, encoding, told):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    reading, writing = os.pipe()
    with Terminal(writing) as opened:
        os.close(writing)
        Console(opened).print("a → b ×")
    with os.fdopen(reading, "rb") as stream:
        assert stream.read().decode(encoding) == f"{told}\n"


# --- libraries' words ---------------------------------------------------------------------------------------------


def test_what_libraries_print_goes_into_the_log_and_the_streams_come_back_though_the_disk_is_full(
    tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False))
    with open(tmp_path / "log", "wb") as log, terminal.streams_into(log):
        sys.stdout.write("from Python\n")
        os.write(2, b"from C\n")
    with open("/dev/full", "wb") as log, terminal.streams_into(log):
        sys.stdout.write("x" * 10)
    os.write(2, b"back\n")
    assert sorted((tmp_path / "log").read_text().split("\n")) == ["", "from C", "from Python"]
    monkeypatch.undo()
    assert capfd.readouterr().err == "back\n"


# --- stdout -------------------------------------------------------------------------------------------------------


def test_a_document_is_utf_8_and_a_line_is_what_its_encoding_has(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    terminal.result("é\n")
    terminal.result("é\n", is_document=True)
    assert sys.stdout.buffer.getvalue() == b"\\xe9\n\xc3\xa9\n"


def python(code, redirection, **options):
    command = f'exec "{sys.executable}" -c "$1" {redirection}'
    return subprocess.run(["sh", "-c", command, "sh", code], cwd=ROOT, capture_output=True, text=True, **options)


def test_no_file_takes_the_place_of_a_closed_stream():
    code = (
        "from tune_topkd import terminal; import os; terminal.open_standard_streams();"
        "print(1, flush=True); os._exit(os.open('/dev/null', os.O_RDONLY))"
    )
    assert python(code, "<&- >&- 2>&-").returncode > 2


def launch(arguments, redirection, **options):
    """The program by a shell: `python launch.py … REDIRECTION`."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120} | options
    command = f'"{sys.executable}" "{ROOT}/launch.py" {arguments} {redirection}'
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], **options)


@pytest.mark.parametrize(
    ("redirection", "code", "told"),
    [
        (">&-", 2, "error: stdout: is closed, and the result goes there"),
        (">/dev/full", 2, f"error: stdout: {os.strerror(errno.ENOSPC)}"),
        ("2>&-", 0, ""),
        ("<&- 2>/dev/full", 0, ""),
        ("| (exec <&-; sleep 0.5)", 0, ""),
    ],
)
def test_a_program_whose_streams_are_closed_full_or_not_read_says_at_most_a_line(redirection, code, told):
    done = launch("status --json --runs-dir /gone", redirection)
    assert done.returncode == code, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith(("error", "Traceback", "Exception"))]
    assert said == ([told] if told else [])


def test_an_error_without_stderr_is_still_an_error():
    done = launch("status none", "2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_working_directory_that_is_gone_is_one_line(tmp_path):
    command = f'mkdir gone; cd gone; rmdir ../gone; "{sys.executable}" "{ROOT}/launch.py" status'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the working directory: has been removed; `cd` into one that exists\n"
