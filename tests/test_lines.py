"""`--json`: a sweep for another program, a JSON object in a line of stdout for each thing that happens."""

import json
import os
import re
import sys
import threading
import time

import formulas
import pytest

from tune_topkd import terminal
from tune_topkd.cli.app import main
from tune_topkd.cli.lines import JsonCallback
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.execution.simulated import WorkerLostError
from tune_topkd.ledger import read_state
from tune_topkd.sweep import driver
from tune_topkd.terminal import Lines

SPACE = """
data: {name: digits}
teacher: null
method: ce
student: digits_linear
recipe: {epochs: 9, lr: 0.1}
space: {lr: {low: 0.01, high: 1.0, log: true}}
sweep: {trials: 6, startup_trials: 3, asha: {grace_epochs: 1, reduction_factor: 3},
  cpus_per_trial: 1, finalists: {count: 2, seeds: 2}}
baselines: {methods: [ce], trials: 1}
"""
LOST = []


def measured(trial, epoch):
    if trial.record.key == ("ce", 0) and epoch == 3 and not LOST:
        LOST.append(1)
        raise WorkerLostError("crash", "killed")
    if trial.record.key == ("search", 2) and epoch == 1:
        return {"val_top1": float("nan")}
    os.write(1, b"a library says something\n")
    name = "test_top1" if trial.record.key.arm == "test" else "val_top1"
    return (
        {name: formulas.value(trial.config, epoch) + 0.01 * trial.config.seed}
        if name == "val_top1" or epoch == 9
        else {}
    )


@pytest.fixture
def called(tmp_path, monkeypatch, capfd):
    """Calls the command line with formulas for trials; gives the exit code, the lines of stdout and stderr."""
    (tmp_path / "small.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "_ray", lambda workspace, interruption: SimulatedExecutor(measured))
    LOST.clear()

    def called(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(
            sys, "argv", ["launch.py", *arguments, "--runs-dir", "runs", "--mlflow-uri", "sqlite:///m.db"]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code, [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()], err

    return called


def of(lines, event):
    return [line for line in lines if line["event"] == event]


@pytest.mark.filterwarnings("ignore")
def test_a_run_and_its_confirmation_are_told_line_by_line(called):
    code, lines, err = called("run", "small.yaml", "--json")
    assert code == 0, err
    state = read_state("runs/small/ledger.jsonl")
    assert {line["sweep"] for line in lines} == {"small"}
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert of(lines, "phase")[0]["text"] == "reading the data"
    (begin,) = of(lines, "begin")
    assert (begin["trials"], begin["ended"], begin["epochs"], begin["rungs"]) == (6, 0, 9, [1, 3])
    assert [line["trial"] for line in of(lines, "trial")] == [str(record.key) for record in state.ended]
    for line, record in zip(of(lines, "trial"), state.ended, strict=True):
        assert (line["status"], line["value"], line["epoch"]) == (record.status, record.value, record.epoch)
        assert line["params"] == record.params
        assert (line["repeats"], line["seed"]) == (record.of_trial and str(record.of_trial), record.seed)
    arrived = {(f"{r.key}", epoch) for r in state.arm("search") for epoch in (1, 3) if epoch in r.reports}
    assert {(line["trial"], line["epoch"]) for line in of(lines, "rung")} == arrived
    assert [line["value"] for line in of(lines, "rung") if line["trial"] == "0002"] == [None], "NaN is no JSON"
    assert [(line["trial"], line["reason"]) for line in of(lines, "retry")] == [("ce-0000", "crash")]
    assert [(line["done"], line["of"]) for line in of(lines, "finalists")] == [(n, 6) for n in range(1, 7)]
    assert lines[-1]["event"] == "answer"
    assert (lines[-1]["state"], lines[-1]["reason"]) == ("finished", "finished")
    assert lines[-1]["tuned"].endswith("runs/small/tuned.yaml")
    code, lines, err = called("confirm", "small", "--seeds", "2", "--finalists", "2", "--json")
    assert code == 0, err
    assert [(line["done"], line["of"]) for line in of(lines, "test")] == [(n, 4) for n in range(1, 5)]
    assert lines[-1]["test"]["sentence"].startswith("Tuned ce has ")


def test_people_read_stderr_as_ever_and_without_json_stdout_is_empty(called):
    code, lines, err = called("run", "small.yaml", "--name", "other")
    assert (code, lines) == (0, [])
    assert "the answer" in err


def test_what_keeps_a_sweep_from_running_is_told_on_stderr(called):
    code, lines, err = called("run", "small.yaml", "--trials", "0", "--json")
    assert (code, lines) == (2, [])
    assert err.count("\n") == 1


def test_a_reader_that_is_asleep_slows_nothing_and_misses_nothing(monkeypatch):
    reading, writing = os.pipe()
    saved = os.dup(1)
    os.dup2(writing, 1)
    try:
        lines = Lines()
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(writing)
    began = time.monotonic()
    for number in range(5000):
        lines.put(json.dumps({"n": number, "text": "x" * 100}))
    assert time.monotonic() - began < 30, "it would wait for ever"
    found = []

    def read():
        with os.fdopen(reading) as stream:
            found.extend(stream)

    reader = threading.Thread(target=read)
    reader.start()
    lines.close()
    reader.join()
    assert [json.loads(line)["n"] for line in found] == list(range(5000))


def test_a_reader_that_is_gone_ends_nothing(monkeypatch, caplog):
    reading, writing = os.pipe()
    os.close(reading)
    saved = os.dup(1)
    os.dup2(writing, 1)
    lines = Lines()
    os.dup2(saved, 1)
    os.close(saved)
    os.close(writing)
    for number in range(100):
        lines.put(str(number))
    lines.close()
    assert "stdout cannot be written any more" in caplog.text


def test_stdout_that_is_closed_is_an_error_before_anything_is_spent(monkeypatch):
    monkeypatch.setattr(terminal, "_closed", {1})
    with pytest.raises(OSError, match="is closed, and the result goes there"):
        Lines()


def test_the_events_are_those_that_its_help_names():
    told = set(re.findall(r"`(\w+)`(?:, `(\w+)`)?: ", JsonCallback.__doc__))
    assert {name for pair in told for name in pair if name} == {
        "phase", "message", "begin", "rung", "retry", "trial", "finalists", "test", "answer",
    }  # fmt: skip
