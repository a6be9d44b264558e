"""How sweeps stand, as `status` prints it: one in a line, several in a table."""

import json
import re
import time

import pytest
from test_confirm import PLAIN
from test_confirm import planted

from tune_topkd.cli.standing import gains_in_short
from tune_topkd.cli.standing import line_of
from tune_topkd.cli.standing import standing
from tune_topkd.cli.standing import table_of
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.ledger import read_state
from tune_topkd.sweep import Sweep

ENTRY = {
    "sweep": "digits", "description": "a small\nCNN on [digits]", "state": "finished", "begun": "2026-11-30T12:34:56+0000",
    "error": "", "plateau": "", "trials": {"completed": 20, "pruned": 55, "failed": 1, "running": 2}, "target": 80,
    "baseline_trials": {"completed": 6, "failed": 0, "running": 1},
    "best": {"number": 7, "val_top1": 91.5, "params": {"k": 5, "lr": 0.1}},
    "top1": {"mean": 91.234, "interval": [90.734, 91.734], "measured_on": "test set"},
    "gains": {"ce": {"mean": 1.4, "interval": [0.5, 2.3]}, "kd": {"mean": 0.1, "interval": [-0.5, 0.7]}},
    "cpu_hours": 1.256, "gpu_hours": 0.0,
}  # fmt: skip


def columns(text):
    """The cells of a table's rows by heading; cells are two blanks apart at least."""
    heading, *rows = [line for line in text.splitlines() if line]
    starts = [(match.group(), match.start()) for match in re.finditer(r"\S+( \S+)*", heading)]
    found = []
    for row in rows:
        cells = re.findall(r"\S+(?: \S+)*", row)
        found.append(dict(zip([name for name, _ in starts], cells, strict=False)))
    return found


def test_a_row_has_all_that_is_worth_knowing_of_a_sweep():
    (row,) = columns(table_of([ENTRY]))
    assert row == {
        "sweep": "digits",
        "state": "finished",
        "begun": "2026-11-30 12:34",
        "trials": "76/80",
        "top-1 %": "91.23 (90.73 to 91.73)",
        "K": "5",
        "on": "test set",
        "gain over": "ce +1.40, kd not told apart",
        "CPU h": "1.26",
        "description": "a small CNN on [digits]",
    }


def test_gpu_hours_have_a_column_where_there_are_any():
    assert "GPU h" not in table_of([ENTRY])
    rows = columns(table_of([ENTRY, ENTRY | {"gpu_hours": 2.5}]))
    assert [row["GPU h"] for row in rows] == ["0.00", "2.50"]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (160, ["begun", "gain over", "CPU h", "description"]),
        (120, ["begun", "gain over", "CPU h"]),
        (80, ["gain over"]),
        (60, []),
    ],
)
def test_a_table_is_as_wide_as_the_terminal_and_leaves_out_what_is_less_important(width, shown):
    lines = table_of([ENTRY | {"description": "words " * 40}, ENTRY], width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line.startswith(name) for line, name in zip(lines, ["sweep", "digits", "digits"], strict=True))
    assert all(name in lines[0] for name in ("state", "trials", "top-1 %", "K", *shown))
    assert ("description" in lines[0]) is ("description" in shown)
    assert lines[1].endswith("…") is ("description" in shown)
    assert "91.23 (90.73 to 91.73)" in lines[1]


def test_a_table_in_a_file_has_all_of_it():
    assert table_of([ENTRY | {"description": "words " * 40}]).splitlines()[1].endswith("words words")


def test_what_is_wrong_is_told_below():
    damaged = {"sweep": "b", "state": "damaged", "error": "its checksum is wrong"}
    lines = table_of([ENTRY, damaged, ENTRY | {"sweep": "c", "state": "failed", "error": "no data"}]).splitlines()
    assert lines[-3:] == ["", "b: damaged; its checksum is wrong", "c: failed; no data"]


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        (None, "ce -1.00"),
        ([-2.0, -0.1], "ce -1.00"),
        ([-2.0, 0.0], "ce not told apart"),
        ([-2.0, 0.1], "ce not told apart"),
    ],
)
def test_a_gain_that_may_be_none_is_not_told_as_one(interval, told):
    assert gains_in_short({"ce": {"mean": -1.0, "interval": interval}}) == told


def test_the_baselines_are_counted_until_the_sweep_is_over():
    assert "baselines" not in line_of(ENTRY)
    told = line_of(ENTRY | {"state": "running", "trials": {"completed": 0, "running": 0}, "best": None})
    assert told.startswith("digits: running, none of 80 trials; baselines: 6 completed, 1 running; ")


def test_the_trials_of_all_baselines_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = {"baselines.methods": ["ce", "defaults"], "baselines.trials": 2}
    sweep = Sweep.create(PLAIN, name="s", overrides=both, mlflow_uri="", address="local")
    state = sweep.run(executor=SimulatedExecutor(planted)).state
    counts = [state.counts(method)["completed"] for method in state.baseline_methods()]
    assert len(counts) > 1
    assert standing("s", sweep.workspace)["baseline_trials"]["completed"] == sum(counts)


def test_a_sweep_is_told_by_the_best_evidence_that_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = {"mlflow_uri": "", "address": "local"}
    sweep = Sweep.create(PLAIN | {"description": "told apart"}, name="s", **about)
    result = sweep.run(executor=SimulatedExecutor(planted))
    entry = standing("s", sweep.workspace)
    assert entry["description"] == "told apart"
    assert time.mktime(time.strptime(entry["begun"][:19], "%Y-%m-%dT%H:%M:%S")) == int(result.state.started_at)
    assert entry["top1"] == {"mean": result.best.value, "interval": None, "measured_on": "one seed"}
    assert entry["gains"]["ce"] == {"mean": result.best.value - result.state.best("ce").value, "interval": None}
    assert f"; gain over ce {entry['gains']['ce']['mean']:+.2f}" in line_of(entry)
    Sweep.open("s", **about).confirm(seeds=3, executor=SimulatedExecutor(planted))
    entry = json.loads(json.dumps(standing("s", sweep.workspace)))
    assert entry["top1"]["measured_on"] == "test set"
    assert entry["top1"]["mean"] == entry["test"]["top1"]
    assert entry["gains"]["ce"]["mean"] == pytest.approx(entry["test"]["gains"]["ce"]["points"])
    (row,) = columns(table_of([entry]))
    assert (row["on"], row["description"]) == ("test set", "told apart")


def test_a_config_that_cannot_be_read_costs_the_description_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = Sweep.create(PLAIN, name="s", mlflow_uri="", address="local")
    sweep.run(executor=SimulatedExecutor(planted))
    (sweep.folder / "sweep.yaml").write_text("[")
    entry = standing("s", sweep.workspace)
    assert (entry["state"], entry["description"]) == ("finished", "")
    assert entry["best"]["number"] == read_state(sweep.folder / "ledger.jsonl").best().key.number
