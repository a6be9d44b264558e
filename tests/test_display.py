"""The live display and the tables, on a real pty and on pipes, from a ledger; and, slow, from a real sweep."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import formulas
import ptys
import pytest

from tune_topkd.cli import display
from tune_topkd.cli.display import ProgressDisplay
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Driver
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Prepared
from tune_topkd.ledger import Report
from tune_topkd.ledger import Share
from tune_topkd.ledger import Start
from tune_topkd.ledger import Stop
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.sweep import result
from tune_topkd.sweep.remaining import Pace
from tune_topkd.terminal import Console
from tune_topkd.terminal import Terminal

ROOT = Path(__file__).parents[1]
SIZES = [(80, 24), (160, 50)]


@pytest.fixture
def ledger(tmp_path):
    """A ledger of a sweep of 60 trials that has begun."""
    with Ledger.create(tmp_path / "ledger.jsonl", Header(sweep="s", id="i", seed=0, trials=60, digest="d")) as ledger:
        ledger.append(Driver(host="h", pid=1, trials=60), Prepared(share=Share(1.0, 0.0)))
        yield ledger


@pytest.fixture
def pty(request, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    pty = ptys.Pty(*getattr(request, "param", SIZES[0]))
    yield pty
    pty.close()


def suggest(number, arm=SEARCH):
    return Suggest(key=TrialKey(arm, number), proposal={}, params=formulas.DEFAULTS)


def start(number):
    return Start(key=TrialKey(SEARCH, number), attempt=1)


def report(number, epoch):
    key, metrics = TrialKey(SEARCH, number), {"val_top1": 50.0 + number}
    return Report(key=key, epoch=epoch, metrics=metrics, decision=Decision.CONTINUE)


def failed(number, error):
    key = TrialKey(SEARCH, number)
    return End(key=key, epoch=2, status=TrialStatus.FAILED, reason="error", error=error, value=None)


def shown_on(descriptor, ledger, config=None, seen=None):
    console = Console(Terminal(descriptor))
    return ProgressDisplay(
        config or formulas.sweep_config(sweep={"trials": 60}),
        ledger.path,
        ledger.state.last_seq if seen is None else seen,
        console,
    ), console


# --- on a terminal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pty", SIZES, indirect=True)
def test_a_terminal_shows_the_bar_the_running_trials_and_the_time_left_and_then_nothing(ledger, pty):
    shown, console = shown_on(pty.slave, ledger)
    pty.wait_for(lambda lines: lines[-1].startswith("starting Ray"))
    for number in range(40):
        ledger.append(suggest(number), start(number))
    for epoch in (1, 2):
        ledger.append(*(report(number, epoch) for number in range(40)))
        time.sleep(0.01)
    ledger.append(failed(0, "no [/mnt/x]"))
    shown.notify(None)
    lines = pty.wait_for(lambda lines: "1/60" in lines[-1] or "1/64" in lines[-1])
    columns, rows = pty.screen.columns, pty.screen.lines
    assert len(lines) < rows
    assert lines[0] == "trials 1 failed  39 running  of 60"
    assert lines[1] == "rungs  epoch 1: 40 of 40 went on"
    assert lines[2].startswith("  0001  epoch 2/9  val_top1 51.00 %  k=5 scale_top=2")
    assert max(map(len, lines)) == columns - 1, "the whole width is used but for a column"
    assert lines[-1].startswith(("trainings ━", "trainings ╸"))
    assert lines[-1].endswith(" left")
    at_work = sum("epoch 2/9" in line for line in lines)
    assert at_work == 39 or f"  and {39 - at_work} more" in lines
    shown.close()
    console.print("the end")
    pty.wait_for(lambda lines: lines == ["the end", ""])
    console.terminal.close()


def test_the_display_follows_the_size_of_its_terminal(ledger, pty):
    shown, console = shown_on(pty.slave, ledger)
    ledger.append(suggest(0), start(0))
    pty.wait_for(lambda lines: lines[-1].startswith("trainings") and len(lines[-1]) == 79)
    for columns, lines in ((50, 20), (120, 40)):
        pty.resize(columns, lines)
        shown_lines = pty.wait_for(lambda lines, columns=columns: len(lines[-1]) == columns - 1)
        assert len(shown_lines) == 3, "nothing of the former size is left"
    shown.close()
    console.terminal.close()


# --- elsewhere ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield reading, writing
    os.close(writing)


def read_all(descriptor):
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read().decode()


def test_a_pipe_gets_a_line_per_trial_that_ends_from_now_on_with_texts_as_they_are(ledger, pipe):
    reading, writing = pipe
    ledger.append(suggest(0), failed(0, "of an earlier driver"))
    shown, console = shown_on(writing, ledger)
    ledger.append(suggest(1), start(1), report(1, 1), failed(1, "OSError: [/mnt/x] [bold]gone"))
    shown.notify(None)
    shown.close()
    console.terminal.close()
    os.set_blocking(reading, False)
    told = os.read(reading, 65536).decode()
    assert told.startswith(
        "[2/64 trainings] trial 0001 failed at epoch 1: OSError: [/mnt/x] [bold]gone  k=5 scale_top=2"
    )
    assert told.count("\n") == 1
    os.close(reading)


def test_a_stopped_trial_is_told_by_what_it_was_compared_by(ledger, pipe):
    reading, writing = pipe
    config = formulas.sweep_config(sweep={"trials": 60}, recipe={"epochs": 9, "ema": {"decay_epochs": 1.0}})
    shown, console = shown_on(writing, ledger, config)
    key, metrics = TrialKey(SEARCH, 1), {"val_top1": 50.0, "val_top1_ema": 61.25}
    stopped = Report(key=key, epoch=1, metrics=metrics, decision=Decision.PRUNE)
    end = End(key=key, epoch=1, status=TrialStatus.PRUNED, reason="asha", error="", value=50.0)
    ledger.append(suggest(0), suggest(1), start(1), stopped, end)
    shown.notify(None)
    shown.close()
    console.terminal.close()
    os.set_blocking(reading, False)
    assert "trial 0001 pruned at epoch 1: val_top1_ema 61.25 %  k=5" in os.read(reading, 65536).decode()
    os.close(reading)


@pytest.mark.parametrize(("trials", "troubles"), [(2000, 0), (2000, 3), (10_000, 0), (151, 0)])
def test_a_large_sweep_has_some_hundred_lines_that_count_every_trial(tmp_path, trials, troubles, monkeypatch):
    monkeypatch.setattr(display, "LONGEST_CLOSE", 60.0)  # all of it comes at once here
    ends = []
    for number in range(trials):
        key = TrialKey(SEARCH, number)
        if troubles and number % troubles == 0:
            ends.append(failed(number, "gone"))
        elif number % 2:
            ends.append(End(key=key, epoch=1, status=TrialStatus.PRUNED, reason="asha", value=1.0))
        else:
            value = 50 + 10 * number / trials if number % 200 == 0 else 1.0
            ends.append(End(key=key, epoch=9, status=TrialStatus.COMPLETED, reason="full", value=value))
    header = Header(sweep="s", id="i", seed=0, trials=trials, digest="d")
    with (
        (tmp_path / "out").open("w") as out,
        Ledger.create(tmp_path / "ledger.jsonl", header, is_durable=False) as ledger,
    ):
        ledger.append(Driver(host="h", pid=1, trials=trials), Prepared(share=Share(1.0, 0.0)))
        shown, console = shown_on(out.fileno(), ledger, formulas.sweep_config(sweep={"trials": trials}, baselines=None))
        ledger.append(*(content for number, end in enumerate(ends) for content in (suggest(number), end)))
        shown.notify(None)
        shown.close()
        console.terminal.close()
    lines = (tmp_path / "out").read_text().splitlines()
    assert len(lines) < 250
    assert lines[-1].startswith(f"[{trials}/{trials} trainings] ")
    told = sum(
        int(count) for line in lines for count in re.findall(r"(\d+) (?:completed|pruned|failed)[,;]", line + ";")
    )
    singles = sum(bool(re.match(r"\[\d+/\d+ trainings\] trial", line)) for line in lines)
    assert told + singles == trials
    bests = {n for n in range(0, trials, 200) if not troubles or n % troubles}
    assert bests <= {int(n) for n in re.findall(r"trial (\d+) completed", "\n".join(lines))}


def test_a_reader_that_is_asleep_does_not_slow_the_sweep_and_misses_nothing(ledger, pipe):
    reading, writing = pipe
    shown, console = shown_on(writing, ledger)
    began = time.monotonic()
    for number in range(60):
        ledger.append(suggest(number), failed(number, "x" * 2000))
        shown.notify(None)
    assert time.monotonic() - began < 60, "it would wait for ever"
    found = []
    os.set_blocking(reading, True)

    def read():
        while not found or b"[60/64 trainings]" not in found[-1]:
            found.append(os.read(reading, 1 << 20))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    shown.close()
    console.terminal.close()
    reader.join(60)
    assert b"".join(found).count(b"failed at epoch") == 60
    os.close(reading)


def test_a_display_that_raises_anything_is_named_in_the_log_and_ends_nothing(ledger, pipe, caplog, monkeypatch):
    reading, writing = pipe
    shown, console = shown_on(writing, ledger)
    monkeypatch.setattr(Console, "print", lambda *_, **__: sys.exit(1))
    ledger.append(suggest(0), failed(0, "x"))
    shown.notify(None)
    shown._thread.join(60)
    ledger.append(suggest(1))
    shown.notify(None)
    shown.close()
    console.terminal.close()
    assert "the display has failed; the sweep goes on without it" in caplog.text
    os.close(reading)


# --- the time left ------------------------------------------------------------------------------------------------


class Simulated:
    """A sweep whose trials take `seconds` per epoch, `slots` at once, after `start` seconds; the stopped ones by number."""

    def __init__(self, config, slots, seconds, start, stopped_at):
        self.config, self.state, self.pace = config, SweepState(), Pace()
        self.now = 0.0
        self._seq = 0
        self._left, self._at = [], []
        self._slots, self._seconds, self._start, self._stopped_at = slots, seconds, start, stopped_at

    def run(self):
        """The estimates as (time, seconds left), after each report; then how long it took."""
        trials = self.config.sweep.trials
        self._apply(Header(version=2, sweep="s", id="i", seed=0, trials=trials, digest="d"))
        self._apply(Driver(host="h", pid=1, trials=trials))
        waiting = [(SEARCH, n, self._stopped_at(n)) for n in range(trials)]
        waiting += [(m, n, self.config.recipe.epochs) for m in ("ce", "kd") for n in range(2)]
        self.now = self._start
        at_work, estimates = [], []
        while waiting or at_work:
            while waiting and len(at_work) < self._slots:
                arm, number, last = waiting.pop(0)
                self._apply(Suggest(key=TrialKey(arm, number), proposal={}, params={}))
                self._apply(Start(key=TrialKey(arm, number), attempt=1))
                at_work.append([self.now + self._seconds * (1 + 0.3 * len(at_work)), arm, number, 1, last])
            at_work.sort()
            self.now, arm, number, epoch, last = at_work[0]
            key = TrialKey(arm, number)
            self._apply(Report(key=key, epoch=epoch, metrics={"val_top1": 1.0}, decision=Decision.CONTINUE))
            self.pace.reported(key, self.now)
            if epoch == last:
                self._apply(End(key=key, epoch=epoch, status=TrialStatus.PRUNED, reason="asha", value=1.0))
                at_work.pop(0)
            else:
                at_work[0] = [self.now + self._seconds, arm, number, epoch + 1, last]
            estimates.append((self.now, self.pace.seconds_left(self.config, self.state, self.now)))
        return estimates, self.now

    def _apply(self, content):
        self.state.apply(Event(self._seq, self.now, content))
        self._seq += 1


@pytest.mark.parametrize("slots", [1, 2, 7])
@pytest.mark.parametrize("start", [0.0, 500.0])
@pytest.mark.parametrize("asha", [None, {"grace_epochs": 1, "reduction_factor": 3}])
def test_the_time_left_counts_what_is_to_come_and_no_start(slots, start, asha):
    config = formulas.sweep_config(sweep={"trials": 30, "asha": asha}, baselines={"trials": 2})

    def stopped_at(number):  # a third goes on at each rung
        return 9 if asha is None or number % 9 == 8 else 3 if number % 3 == 2 else 1

    estimates, end = Simulated(config, slots, 10.0, start, stopped_at).run()
    assert estimates[0][1] is None, "one report gives no pace"
    for share, tolerance in ((0.25, 0.35), (0.5, 0.3), (0.75, 0.3)):
        at, left = min(estimates, key=lambda e: abs(e[0] - start - share * (end - start)))
        assert left == pytest.approx(end - at, rel=tolerance), (share, left, end - at)
    assert estimates[-1][1] == 0.0


def test_the_time_left_is_never_more_than_the_time_budget(ledger, pipe):
    config = formulas.sweep_config(sweep={"trials": 60, "time_budget": 30.0})
    shown, console = shown_on(pipe[1], ledger, config)
    assert shown._picture.time_left(time.time()) in ("about 30 s left", "about 29 s left", "about 28 s left")
    shown.close()
    console.terminal.close()
    os.close(pipe[0])


# --- the tables ---------------------------------------------------------------------------------------------------


def answered(best, **bases):
    """The state of a finished sweep with these values at the full budget."""
    state = SweepState()
    contents = [Header(version=2, sweep="s", id="i", seed=0, trials=1, digest="d")]
    for arm, value in {SEARCH: best, **bases}.items():
        key, params = TrialKey(arm, 0), dict(formulas.DEFAULTS) if arm == SEARCH else {"lr": 0.1}
        contents.append(Suggest(key=key, proposal={}, params=params))
        contents.append(End(key=key, epoch=9, status=TrialStatus.COMPLETED, reason="budget", value=value))
    for seq, content in enumerate([*contents, Stop(reason="finished")]):
        state.apply(Event(seq, 0.0, content))
    return state


def test_a_gain_is_told_in_images_and_does_not_count_when_it_is_one_of_them():
    config, state = formulas.sweep_config(), answered(77.78, ce=66.67, kd=44.44)
    of_nine, of_many = result.gains(config, state, 9), result.gains(config, state, 900)
    assert of_nine[0].sentence == "+11.11 points over cross-entropy (66.67 %, lr 0.1): +1 of 9 validation images"
    assert [gain.counts for gain in (*of_nine, *of_many)] == [False, True, True, True]
    assert result.advice(config, state) == ""


def test_an_answer_that_loses_comes_with_what_to_do():
    told = result.advice(formulas.sweep_config(), answered(80.0, ce=70.0, kd=80.0))
    assert told.startswith("KD, T = 4 does as well without topkd: try more trials")


def test_as_long_as_the_sweep_has_not_ended_nothing_is_advised_by_values_that_may_change():
    state = answered(80.0, ce=70.0, kd=80.0)
    state.apply(Event(state.last_seq + 1, 0.0, Stop(reason="interrupted")))
    assert result.advice(formulas.sweep_config(), state) == ""


def test_the_table_of_several_sweeps_tells_them_apart():
    config = formulas.sweep_config(description="a [small] student")
    console = Console(quiet=False)
    with console.capture() as captured:
        console.print(display.summary_table([(config, answered(80.0)), (config, answered(81.0))]))
    assert captured.get().count("s: a [small] student") == 2


# --- a real sweep -------------------------------------------------------------------------------------------------

SPACE = """
data: {name: digits, val_fraction: 0.25, test_fraction: 0.25}
teacher: {name: digits_cnn, recipe: {epochs: 2, lr: 0.1}}
student: digits_cnn_tiny
recipe: {epochs: 20, batch_size: 64}
space: {k: {low: 1, high: 4}, lr: {low: 0.01, high: 0.5, log: true}}
sweep: {trials: 4, startup_trials: 3, asha: {grace_epochs: 5, reduction_factor: 2}}
baselines: {methods: [ce, kd], trials: 1}
"""


@pytest.fixture
def process(tmp_path, pty):
    """A real sweep on the terminal, in a folder with a blank in its name; killed if it does not end by itself."""
    (tmp_path / "small.yaml").write_text(SPACE)
    command = [sys.executable, ROOT / "launch.py", "run", "small.yaml", "--runs-dir", "my runs"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=pty.slave, stderr=pty.slave, start_new_session=True)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_real_sweep_on_a_terminal_that_is_made_larger(tmp_path, pty, process):
    seen = []

    def appears(*words):
        def holds(lines):
            seen.append("\n".join(lines))
            assert process.poll() is None, seen[-1]
            return all(any(word in line for line in lines) for word in words)

        return pty.wait_for(holds, seconds=200)

    appears("teacher digits_cnn")
    appears("starting Ray")
    appears("epoch ", "val_top1", "━", "/6", "about ", " left")
    pty.resize(160, 50)
    lines = appears("running", "━", " left")
    pty.wait_for(lambda lines: any(len(line) == 159 for line in lines))
    assert lines[0].startswith("sweep small: ")
    assert process.wait(200) == 0
    lines = pty.wait_for(lambda lines: any(line.startswith("next: ") for line in lines))
    screen = "\n".join(lines)
    assert sum("━" in line for line in lines) <= 4, "only the table's rules are left"
    assert "confirm small --runs-dir '" in screen
    assert f"{tmp_path}/my runs'" in screen.replace("\n", "")
    assert not [w for w in ("Configuration for experiment", "raylet", "Traceback", "Warning") if w in pty.written]
    assert pty.screen.unknown == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("before", "reader"),
    [pytest.param("true", "head -3", marks=pytest.mark.long), ("head -c 65536 /dev/zero", "sleep 1000")],
)
def test_a_real_sweep_whose_reader_is_gone_or_asleep_ends_as_ever(tmp_path, before, reader):
    """A pipe holds 65536 bytes: with so many before, the first word of the sweep waits for the reader."""
    (tmp_path / "small.yaml").write_text(
        SPACE.replace("trials: 4", "trials: 2").replace("startup_trials: 3", "startup_trials: 1")
    )
    command = f'{before}; "{sys.executable}" "{ROOT}/launch.py" run small.yaml --runs-dir runs; echo $? > code'
    process = subprocess.Popen(["sh", "-c", f"({command}) 2>&1 | {reader}"], cwd=tmp_path, start_new_session=True)
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "code").exists() or not (tmp_path / "code").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (tmp_path / "code").read_text() == "0\n"
    last = (tmp_path / "runs" / "small" / "ledger.jsonl").read_text().splitlines()[-1]
    assert '"event":"stop","reason":"finished"' in last
