"""Sweeps side by side: the config keys that differ, what each found, and whether one answer is better."""

import csv
import dataclasses
import io
import json
import statistics
import sys

import pytest
from test_confirm import PLAIN
from test_confirm import planted

from tune_topkd.cli.app import main
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.ledger import SEARCH
from tune_topkd.sweep import Sweep
from tune_topkd.sweep.comparison import FORMATS
from tune_topkd.sweep.comparison import Difference
from tune_topkd.sweep.comparison import _other_test_set
from tune_topkd.sweep.comparison import compare
from tune_topkd.verdict import verdict_of
from tune_topkd.verdict import welch_interval

SEEDS = 4
HIGHER = {"data.split_seed": 0, "recipe.momentum": 0.5, "space.lr.high": 0.7}


def raised(points):
    """The same formula, so many points higher for the search's own trials."""

    def formula(trial, epoch):
        is_of_search = trial.record.origin.arm == SEARCH
        return {name: value + points * is_of_search for name, value in planted(trial, epoch).items()}

    return formula


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder with confirmed sweeps, `near` and `far` above `low`, one of another test set and one not confirmed."""
    folder = tmp_path_factory.mktemp("runs")
    about = {"runs_dir": folder, "mlflow_uri": "", "address": "local"}
    for name, points, overrides, seeds in (
        ("low", 0.0, {}, SEEDS),
        ("near", 0.01, HIGHER, SEEDS),
        ("far", 5.0, HIGHER, SEEDS),
        ("other", 5.0, {"data.split_seed": 1}, SEEDS),
        ("searched", 5.0, {}, 0),
    ):
        executor = SimulatedExecutor(raised(points))
        Sweep.create(PLAIN, name=name, overrides=overrides, **about).run(executor=executor)
        if seeds:
            Sweep.open(name, **about).confirm(seeds=seeds, executor=executor)
    return folder


def found(runs, *names):
    return compare([Sweep.open(name, runs_dir=runs, mlflow_uri="").searched() for name in names])


def values(runs, name):
    return verdict_of(Sweep.open(name, runs_dir=runs, mlflow_uri="").searched().state).answer.values


def test_the_config_keys_that_differ_and_no_others_are_told(runs):
    keys = found(runs, "low", "far").keys
    plain = PLAIN["space"]["lr"]["high"]
    assert keys == {"recipe.momentum": [keys["recipe.momentum"][0], 0.5], "space.lr.high": [plain, 0.7]}
    assert found(runs, "low", "searched").keys == {}


def test_the_difference_is_welchs_on_the_test_set(runs):
    (difference,) = found(runs, "low", "far").differences
    one, base = values(runs, "far"), values(runs, "low")
    assert difference.points == pytest.approx(statistics.fmean(one) - statistics.fmean(base))
    assert difference.interval == welch_interval(one, base)
    low, high = difference.interval
    above = f"far has {difference.points:+.2f} points against low on the same test set"
    assert difference.sentence == f"{above} ({low:+.2f} to {high:+.2f}): far is better."
    (difference,) = found(runs, "far", "low").differences
    assert difference.sentence.endswith("): far is better.")
    (difference,) = found(runs, "low", "near").differences
    assert difference.sentence.endswith("): which is better these seeds do not tell.")


def test_of_several_differences_all_hold_together(runs):
    both = found(runs, "low", "near", "far").differences
    assert [difference.sweep for difference in both] == ["near", "far"]
    for difference in both:
        assert difference.interval == welch_interval(values(runs, difference.sweep), values(runs, "low"), 0.975)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("low", "searched"), "the answer of searched is not measured on the test set; `confirm searched` does it."),
        (("searched", "low"), "the answer of searched is not measured on the test set; `confirm searched` does it."),
        (("low", "other"), "data.split_seed differs, so they may have other test images."),
    ],
)
def test_what_cannot_be_compared_is_said_with_the_reason(runs, names, why):
    comparison = found(runs, *names)
    (difference,) = comparison.differences
    assert difference.points is None
    assert difference.sentence == f"{names[1]} and {names[0]} cannot be compared: {why}"
    assert f"- {difference.sentence}" in FORMATS["markdown"](comparison).splitlines()


def test_of_two_that_are_not_confirmed_both_are_named(runs):
    first, other = (Sweep.open("searched", runs_dir=runs, mlflow_uri="").searched() for _ in range(2))
    other.state.header = dataclasses.replace(other.state.header, sweep="also")
    (difference,) = compare([first, other]).differences
    assert difference.why_not == (
        "the answers of also and searched are not measured on the test set; `confirm also` and `confirm searched` do it"
    )


def test_data_of_other_content_is_another_test_set(runs):
    first, other = (Sweep.open(name, runs_dir=runs, mlflow_uri="").searched() for name in ("low", "far"))
    assert _other_test_set(first, other) == ""
    other.state.prepared.identities["data"] = "other"
    assert "have other content" in _other_test_set(first, other)
    for each in (first, other):
        del each.state.prepared.identities["data"]
    assert "or it is not known" in _other_test_set(first, other)


def test_one_seed_makes_nothing_sure():
    told = "b has +1.50 points against a on the same test set; of one seed, so nothing is sure."
    assert Difference("b", "a", 1.5).sentence == told


def test_each_format_has_the_same(runs):
    comparison = found(runs, "low", "far")
    (difference,) = comparison.differences
    lines = FORMATS["markdown"](comparison).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "|  | low | far |"
    assert "| space.lr.high | 1 | 0.7 |" in table
    assert any(line.startswith("| top-1 % | ") and " to " in line for line in table)
    assert {line.count("|") for line in table} == {4}
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(FORMATS["csv"](comparison)))}
    assert rows[""] == ["low", "far"]
    assert rows["config: space.lr.high"] == ["1.0", "0.7"]
    assert float(rows["over low"][1]) == difference.points
    assert float(rows["over low, low"][1]) == difference.interval.low
    content = json.loads(FORMATS["json"](comparison))
    assert content["config"]["space.lr.high"] == {"low": 1.0, "far": 0.7}
    assert content["differences"][0]["sentence"] == difference.sentence
    assert [sweep["sweep"] for sweep in content["sweeps"]] == ["low", "far"]
    latex = FORMATS["latex"](comparison).splitlines()
    assert latex[0] == f"% {difference.sentence}"
    assert {line.count(" & ") for line in latex if line.endswith(r"\\")} == {2}


def test_the_command_writes_a_table_and_says_what_is_wrong(runs, tmp_path, monkeypatch, capfd):
    def called(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["launch.py", "compare", *arguments, "--runs-dir", str(runs)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capfd.readouterr()

    code, out, _ = called("low", "far")
    assert (code, out) == (0, FORMATS["markdown"](found(runs, "low", "far")))
    code, out, _ = called("low", "far", "--format", "csv", "-o", str(tmp_path / "table.csv"))
    assert (code, out, (tmp_path / "table.csv").read_text()) == (0, "", FORMATS["csv"](found(runs, "low", "far")))
    for names, told in (
        (("low",), "error: compare: SWEEP: must be two sweeps or more, each another one\n"),
        (("low", "low"), "error: compare: SWEEP: must be two sweeps or more, each another one\n"),
        (("low", "none"), "error: SWEEP: none: no such sweep in "),
    ):
        code, _, err = called(*names)
        assert code == 2
        assert err.startswith(told)
        assert err.count("\n") == 1
