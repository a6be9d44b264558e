"""The table of a campaign: a row for each sweep, its best K and those equal to it, its figure and what it is worth."""

import csv
import io
import json
import sys

import pytest
import test_confirm
from test_confirm import EPOCHS
from test_confirm import PLAIN
from test_confirm import SEED
from test_confirm import config
from test_confirm import drive
from test_confirm import planted
from test_confirm import state_of

from tune_topkd.cli.app import main
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.findings import EqualK
from tune_topkd.findings import Figure
from tune_topkd.findings import Row
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import standings
from tune_topkd.sweep import Sweep
from tune_topkd.sweep.campaign import FORMATS
from tune_topkd.sweep.campaign import equal_k
from tune_topkd.sweep.campaign import notes
from tune_topkd.sweep.campaign import ranges
from tune_topkd.sweep.campaign import row_of
from tune_topkd.verdict import Interval
from tune_topkd.verdict import verdict_of

searched, confirmed = test_confirm.searched, test_confirm.confirmed  # fixtures

KNOWN = {"k": 5, "lr": 0.1}


def of_k(count=3, seeds=5, **about):
    """A config whose only axis is K."""
    plan = {"finalists": {"count": count, "seeds": seeds}} if count else {}
    return config(
        space={"lr": {"low": 0.1, "high": 0.1}, "k": {"low": 1, "high": 9}}, sweep={"trials": 9, **plan}, **about
    )


def by_k(values, noise=0.2):
    """A formula: a value for each K, and each seed's noise."""

    def formula(trial, epoch):
        k = trial.config.loss.get("k")
        base = values.get(k, 50.0)
        return {"val_top1": base + test_confirm.noise(trial.config.seed, trial.record.origin, noise)}

    return formula


# --- a row --------------------------------------------------------------------------------------------------------------


def test_a_confirmed_sweep_has_the_test_sets_figure_and_the_gains_that_go_with_it(confirmed):
    state = state_of(confirmed)
    row, found = row_of(config(), state, KNOWN), verdict_of(state)
    assert (row.measured_on, row.top1.mean) == ("test set", pytest.approx(found.answer.finalist.mean))
    assert row.top1.interval == found.answer.interval
    assert {name: gain.interval for name, gain in row.gains.items()} == {g.base.name: g.interval for g in found.gains}
    assert (row.sweep, row.dataset, row.teacher, row.student) == ("t", "digits", "digits_cnn", "digits_linear")
    assert (row.trials, row.trainings) == (6, 6 + 3 + 24 + 16)
    assert row.params == {"k": 5, "lr": state.trials[test_confirm.CHOSEN].params["lr"]}


def test_a_sweep_that_is_not_confirmed_has_a_figure_of_one_seed_and_it_is_said(searched):
    row = row_of(config(), state_of(searched), KNOWN)
    assert (row.measured_on, row.top1) == ("one seed", Figure(80.0))
    assert row.gains["cross-entropy"] == Figure(10.0)
    assert any("is too high: `confirm` it" in note for note in notes([row]))
    assert not any(
        "too high" in note for note in notes([Row("s", "d", "t", "u", "m", "finished", measured_on="test set")])
    )


def test_finalists_give_a_figure_of_fresh_seeds(tmp_path):
    plan = of_k(seeds=3)
    state = with_finalists(tmp_path / "ledger.jsonl", plan, by_k({5: 80.0}))
    row = row_of(plan, state, KNOWN)
    assert row.measured_on == "fresh seeds"
    assert row.top1.mean == pytest.approx(80.0, abs=0.5)
    assert row.top1.interval.low < row.top1.mean < row.top1.interval.high
    assert set(row.gains) == {"cross-entropy", "KD, T = 4", "the untuned method"}


def with_finalists(path, plan, formula):
    """Its state after a sweep with finalists."""
    from tune_topkd.execution.simulated import simulate
    from tune_topkd.ledger import Driver
    from tune_topkd.ledger import Finalists
    from tune_topkd.ledger import Header
    from tune_topkd.ledger import Ledger
    from tune_topkd.search import Search

    about = {"trials": plan.sweep.trials, "num_classes": 10, "epochs": EPOCHS, "method": "topkd"}
    with Ledger.create(path, Header(sweep="t", id="i", seed=SEED, **about), is_durable=False) as ledger:
        ledger.append(Driver.here(trials=plan.sweep.trials, finalists=Finalists.configured(plan.sweep.finalists)))
        simulate(Search(plan, ledger), formula, at_once=1)
        return ledger.state


def test_a_sweep_without_an_answer_has_a_row_that_says_how_it_stands():
    row = row_of(config(), SweepState(), KNOWN)
    assert (row.state, row.params, row.top1, row.equal_k) == ("under way", {}, None, None)
    for write in FORMATS.values():
        assert write([row], None)


# --- the K that are equal -----------------------------------------------------------------------------------------------


def test_k_is_equal_where_fresh_seeds_do_not_tell_its_finalist_from_the_best(tmp_path):
    plan = of_k()
    state = with_finalists(tmp_path / "a", plan, by_k({k: 70.0 + k / 100 for k in range(1, 10)}))
    found = equal_k(state)
    assert found.how == "finalists on fresh seeds"
    assert found.values == sorted({int(finalist.record.params["k"]) for finalist in standings(state)})
    state = with_finalists(tmp_path / "b", plan, by_k({k: 70.0 + 3 * k for k in range(1, 10)}))
    assert equal_k(state).values == [max(int(r.params["k"]) for r in state.arm("search"))]


def test_without_several_k_among_finalists_it_is_the_noise_of_a_seed_that_decides(tmp_path):
    plan = of_k(count=1, seeds=4)
    state = with_finalists(tmp_path / "a", plan, by_k(dict.fromkeys(range(1, 10), 70.0), noise=1.0))
    found = equal_k(state)
    assert found.how == "full trials within what another seed may change"
    assert len(found.values) >= 3
    state = with_finalists(tmp_path / "b", plan, by_k({k: 70.0 - 10 * abs(k - 5) for k in range(1, 10)}, noise=0.1))
    assert equal_k(state).values == [5]


def test_where_nothing_was_repeated_no_k_is_called_equal(tmp_path):
    state = drive(tmp_path / "a", of_k(count=0), by_k(dict.fromkeys(range(1, 10), 70.0)))
    assert equal_k(state).how == "the best trial alone: nothing was repeated"
    assert len(equal_k(state).values) == 1


def test_a_sweep_that_does_not_search_k_has_none(searched):
    assert equal_k(state_of(searched)) is None


def test_whole_numbers_in_a_row_are_a_range():
    assert [ranges(values) for values in ([1], [1, 2], [1, 3, 4, 5, 9], [])] == ["1", "1–2", "1, 3–5, 9", ""]


# --- the formats ----------------------------------------------------------------------------------------------------------

ROWS = [
    Row(
        sweep="a_b",
        dataset="d|1",
        teacher="t",
        student="s&co",
        method="topkd",
        state="finished",
        params={"k": 5, "lr": 0.123456, "ce_weight": 1.5},
        equal_k=EqualK([4, 5, 9], "finalists on fresh seeds"),
        top1=Figure(90.0, Interval(89.0, 91.5)),
        measured_on="test set",
        gains={"KD, T = 4": Figure(-0.5, Interval(-1.0, 0.0))},
        trials=10,
        trainings=30,
        cpu_hours=1.25,
    ),
    Row(sweep="c", dataset="e", teacher="–", student="u", method="ce", state="interrupted", trials=3, trainings=3),
]


def test_markdown_has_a_cell_for_each_heading():
    lines = FORMATS["markdown"](ROWS, None).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    figures = "90.00 (89.00 to 91.50) | test set | -0.50 (-1.00 to +0.00)"
    assert f"| a_b | d\\|1 | t | s&co | 5 | 4–5, 9 | 1.5 | 0.123 | {figures} | 10 | 1.25 | 0.00 |" in table
    assert "interrupted" in table[3]
    assert "- equal K of a_b: finalists on fresh seeds" in lines


def test_csv_has_whole_numbers_and_intervals_apart():
    first, second = csv.DictReader(io.StringIO(FORMATS["csv"](ROWS, None)))
    assert (first["k"], first["lr"], first["equal_k"]) == ("5", "0.123456", "4 5 9")
    assert (first["top1"], first["top1, low"], first["top1, high"]) == ("90.0", "89.0", "91.5")
    assert (first["gain over KD, T = 4"], first["gain over KD, T = 4, high"]) == ("-0.5", "0.0")
    assert (second["sweep"], second["k"], second["top1"], second["gain over KD, T = 4"]) == ("c", "", "", "")


def test_json_is_what_a_row_is():
    first, second = json.loads(FORMATS["json"](ROWS, None))["sweeps"]
    assert first["gains"] == {"KD, T = 4": {"mean": -0.5, "interval": [-1.0, 0.0]}}
    assert first["equal_k"] == {"values": [4, 5, 9], "how": "finalists on fresh seeds"}
    assert (second["top1"], second["params"]) == (None, {})


def test_latex_is_a_tabular_with_its_signs_escaped():
    text = FORMATS["latex"](ROWS, None)
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {body[0].count(" & ")}
    assert r"a\_b & d|1 & t & s\&co & 5 & 4--5, 9" in text
    assert "90.00 (89.00 to 91.50)" in text
    assert text.count(r"\begin{tabular}{llll" + "r" * (body[0].count(" & ") - 3) + "}") == 1


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_tabulates_all_sweeps_and_says_which_are_left_out(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        sweep = Sweep.create(PLAIN, name=name, mlflow_uri="", address="local")
        sweep.run(executor=SimulatedExecutor(planted))
    sweep.confirm(seeds=2, executor=SimulatedExecutor(planted))
    runs = sweep.workspace.runs
    ledger = runs / "damaged" / "ledger.jsonl"
    ledger.parent.mkdir()
    ledger.write_text("{}\n")
    monkeypatch.setattr(sys, "argv", ["launch.py", "report", "--format", "json", "--runs-dir", str(runs)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert ended.value.code == 0
    content = json.loads(said.out)
    assert {r["sweep"]: r["measured_on"] for r in content["sweeps"]} == {"one": "one seed", "two": "test set"}
    assert content["recommended"]["why_none"] == "one has 6 full trials of its method, and a model needs 8"
    assert said.err.startswith("note: damaged is left out: ")
    monkeypatch.setattr(sys, "argv", ["launch.py", "status", "--campaign", "--json", "--runs-dir", str(runs)])
    with pytest.raises(SystemExit):
        main()
    assert json.loads(capfd.readouterr().out) == content
    monkeypatch.setattr(sys, "argv", ["launch.py", "report", "two", "-o", "table.md", "--runs-dir", str(runs)])
    with pytest.raises(SystemExit):
        main()
    assert (tmp_path / "table.md").read_text().startswith("| sweep | dataset |")
    for arguments, told in (
        (["nothing", "--runs-dir", str(runs)], "nothing"),
        (["--runs-dir", "empty"], "report: SWEEP: there is none in "),
    ):
        monkeypatch.setattr(sys, "argv", ["launch.py", "report", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert told in capfd.readouterr().err
