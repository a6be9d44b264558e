"""The benchmarks run, and give a table of ratios; what the ratios are is nothing a test can hold."""

import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def benchmarks(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=800)


@pytest.fixture
def inside(monkeypatch, capsys):
    """The same within this process, which has torch imported."""
    monkeypatch.syspath_prepend(ROOT)

    def inside(*arguments):
        from benchmarks.__main__ import main

        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return inside


def ratios(page):
    """The cells of the table's lines: what, against, ratio, spread, turns, medians, goal."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    return [cells for cells in lines if cells[0] != "what" and set(cells[0]) != {"-"}]


def check(done, names):
    """Every line that is to be there is, with a ratio that lies within its spread."""
    assert done.returncode == 0, done.stderr
    found = ratios(done.stdout)
    for name in names:
        assert any(name in cells[0] for cells in found), f"no line has {name!r}"
    for what, against, ratio, spread, turns, medians, _ in found:
        low, high = map(float, spread.split(" – "))
        assert 0 < low <= float(ratio) <= high < math.inf, what
        assert int(turns) >= 1
        assert len(medians.split(" / ")) == 2
        assert against


def test_what_reading_a_bank_takes(inside):
    before = set(RESULTS.glob("*"))
    done = inside("--quick", "reading")
    check(done, ("peak memory", "CPU time"))
    assert set(RESULTS.glob("*")) == before, "a table is kept only if it is asked for"
    assert re.search(r"^- .+, \d+ cores; load average at the start \d", done.stdout, re.MULTILINE)
    assert re.search(r"torch \S+, ray \S+, optuna \S+, mlflow \S+", done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cost_of_the_losses():
    losses = ("TopKDLoss", "KDLoss", "DKDLoss", "LogitStandardKDLoss")
    names = [f"{loss}, {classes} classes" for loss in losses for classes in (10, 100, 1000)]
    done = benchmarks("--quick", "loss_cost")
    check(done, [*names, "TopKDLoss alone, digits_cnn_tiny", "TopKDLoss alone, resnet18"])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_overhead_of_a_sweep():
    done = benchmarks("--quick", "sweep_overhead")
    names = ("wall time of 20 trials", "seconds per trial", "peak memory", "a proposal after 1,000", "taking the end")
    check(done, names)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_a_moving_average_costs():
    check(benchmarks("--quick", "ema"), ("a training of digits with a moving average", "a training of glyphs"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cost_of_an_audit():
    check(benchmarks("--quick", "audit"), ("of an audit of 200 trials",))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_simulated_sweep_takes():
    names = [f"200 trials, 50 at once, by the sampler {name}" for name in ("random", "tpe")]
    check(benchmarks("--quick", "simulation"), names)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_cost_of_a_step():
    kinds = ("bank", "bfloat16", "plain", "live")
    names = ("bank filled", "bank filled, bfloat16", "the data path alone", *(f"peak memory, {kind}" for kind in kinds))
    check(benchmarks("--quick", "step"), names)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_trials_train_together():
    check(benchmarks("--quick", "packing"), ("at once", "its memory"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_the_bank_is_worth_to_a_sweep():
    check(benchmarks("--quick", "bank"), ("glyphs, 4 trials", "the same", "its peak memory"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_catching_up_costs():
    check(benchmarks("--quick", "mlflow_catch_up"), ("catching up, 20 trials", "the same again", "comparing all"))


def test_an_unknown_benchmark_is_refused(inside):
    done = inside("loss_costs")
    assert done.returncode == 2
    assert (
        "unknown benchmark loss_costs; known are loss_cost, data, step, reading, bank, packing, sweep_overhead"
        in done.stderr
    )


def quick_page(module):
    """What a benchmark with a page of its own prints in its quick form, and the cells of its tables; it writes nothing."""
    before = set(RESULTS.glob("*"))
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=800)
    assert done.returncode == 0, done.stderr
    assert set(RESULTS.glob("*")) == before
    tables = [line.split("|")[1:-1] for line in done.stdout.splitlines() if "|" in line]
    return done.stdout, [[cell.strip() for cell in cells] for cells in tables]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_which_trainings_fall_apart_and_how_early_good_ones_show():
    _, lines = quick_page("stability")
    clipped = {(cells[0], cells[1]): cells[2:] for cells in lines if len(cells) == 5 and "±" in cells[2]}
    assert clipped.keys() == {(m, c) for m in ("cross-entropy", "KD, T = 4", "TopKD, defaults") for c in ("–", "1")}
    for cells in clipped.values():
        means = [float(cell.partition(" ")[0]) for cell in cells[:-1]]
        assert float(cells[-1]) == max(means)
    told = [cells for cells in lines if cells[1:2] == ["6"]]
    assert [cells[2] for cells in told] == ["1 of 4", "2 of 4", "3 of 4"] * 2
    assert all(-1 <= float(value) <= 1 for cells in told for value in cells[3:])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_parts_of_topkd_on_glyphs():
    page, lines = quick_page("glyphs")
    table = {cells[0]: cells[1:] for cells in lines}
    for row in ("cross-entropy", "KD, T = 4", "TopKD, defaults", "TopKD, tuned"):
        lr, val, test, over_kd, seeds, others = table[row]
        assert {lr, others.partition(":")[0]} - {""} <= {"0.1", "0.4"}, row
        assert 0 <= float(val) <= 100
        assert float(test) - float(table["KD, T = 4"][2]) == pytest.approx(float(over_kd), abs=0.11)
        assert seeds == "1"
    assert sum(name.startswith("– ") for name in table) == 4
    assert {"1", "20"} <= table.keys(), "the table of K"
    assert re.search(r"^- 13 trainings of 2 epochs, \d+ at once: ", page, re.MULTILINE)


def test_ways_to_hold_the_gradient_are_the_loss_where_they_hold_nothing(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.bounded import by_term
    from benchmarks.bounded import floored
    from tune_topkd.loss import TopKDLoss

    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(8, 20, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(20, (8,), generator=draw)

    def gradient(loss, scale=1.0):
        logits = (student * scale).requires_grad_()
        value = loss(logits, teacher, labels)
        value.backward()
        return value.detach(), logits.grad

    whole, of_whole = gradient(TopKDLoss())
    value, held = gradient(lambda *batch: floored(*batch, floor=1e-9))
    assert torch.allclose(value, whole)
    assert torch.allclose(held, of_whole)
    assert torch.allclose(gradient(by_term)[0], whole), "only the gradient is held"
    assert gradient(TopKDLoss(), 1e-3)[1].norm(dim=1).max() > 100, "the smaller the logits, the longer"
    for loss in (by_term, lambda *batch: floored(*batch, floor=10.0)):
        assert gradient(loss, 1e-3)[1].norm(dim=1).max() < 3 * math.sqrt(2) / len(student)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_ways_to_hold_the_gradient_side_by_side():
    page, lines = quick_page("bounded")
    ends = {cells[0]: float(cells[-1]) for cells in lines if len(cells) == 3 and cells[0] and set(cells[0]) != {"-"}}
    assert list(ends) == ["as it is", "clipped at 1.0", "a floor of 3", "a floor of 10", "warm-up", "by term"]
    assert all(0 <= end <= 100 for end in ends.values())
    assert "- 6 trainings of 4 epochs, " in page


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_how_large_a_sweep_may_get():
    page, lines = quick_page("scale")
    table = {cells[0]: cells[1:] for cells in lines}
    for name in ("this project", "plain Ray Tune, which tracks nothing"):
        trials, floor, seconds, ratio = map(float, table[name][:4])
        assert (trials, floor) == (8, 4), "eight seconds of trials on two slots"
        assert ratio == pytest.approx(seconds / floor, abs=0.15)
        assert ratio >= 1
    floor, seconds, ratio, workers = map(float, table["1"][:4])
    assert (floor, workers >= 2) == (1 + 6 / 2, True), "a start of a second, and six seconds of trials on two slots"
    assert ratio == pytest.approx(seconds / floor, abs=0.02)
    assert "4 trials at once on 4 nodes." in page
    assert 0 < float(table["8"][0]) <= 1.3 * 8, "no more reports can be taken than are sent"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sweep_in_a_store_while_nodes_come_and_go():
    page, lines = quick_page("remote")
    (row,) = [cells for cells in lines if len(cells) == 5 and cells[0].isdecimal()]
    had, slept = float(row[1]), float(row[2])
    assert 0 < slept < had <= 3 * float(row[0]) + 3
    assert row[3] == f"{100 * slept / had:.0f} %"
    assert "20 objects: " in page


@pytest.fixture(scope="module")
def replay():
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module("benchmarks.replay")
    sys.path.remove(str(ROOT))
    return module


def test_a_drawn_training_is_like_recorded_ones_and_the_same_for_the_same_seed(replay):
    model = replay.surrogate("default")
    known = model.known
    assert all("clip_grad" in params for params in known.params)
    at = int(known.raw[:, -1].argmax())
    (expected,) = model.mean([known.params[at]])
    assert known.raw[:, -1].min() < expected < known.raw[:, -1].max()
    raw, ema = model.curve(known.params[at], seed=3)
    again, _ = model.curve(known.params[at], seed=3)
    other, _ = model.curve(known.params[at], seed=4)
    assert (raw == again).all()
    assert (raw != other).any()
    assert raw.shape == ema.shape == (known.raw.shape[1],)
    ends = [model.curve(known.params[at], seed)[0][-1] for seed in range(200)]
    assert abs(sum(ends) / len(ends) - expected) < 1.0, "drawn trainings are about what is expected"
    assert ema[4] > raw[4], "in the record the average is ahead of the weights"


def test_what_trees_know_of_a_training_leaves_that_training_out(replay):
    model = replay.surrogate("default")
    known = model.known.raw[:, -1]
    seen = model.mean(model.known.params)
    left_out = abs(model.expected[:, -1] - known).mean()
    assert abs(seen - known).mean() < 0.8 * left_out, "else nothing was left out"


def test_a_replayed_sweep_keeps_to_its_budget_and_is_the_same_again(replay, monkeypatch):
    (variant,) = (v for v in replay.VARIANTS if (v.name, v.budget) == ("default", 20))
    curves = []
    curve = replay.surrogate("default").curve
    monkeypatch.setattr(replay.Surrogate, "curve", lambda self, *of: curves.append(of) or curve(*of))
    found = replay.sweep(variant, 1)
    assert found == replay.sweep(variant, 1)
    assert found != replay.sweep(variant, 2)
    trials = len(curves) // 3
    assert trials > variant.budget, "some were stopped early"
    space = replay.config_of(variant, 1).space
    assert set(found.params) == set(space)


@pytest.mark.parametrize("source", ["unclipped", pytest.param("default", marks=pytest.mark.slow)])
def test_a_replayed_warm_start_begins_with_what_the_other_found(replay, monkeypatch, source):
    (variant,) = (v for v in replay.VARIANTS if v.warm and v.warm.space == source and v.budget == 10)
    begun = []
    run = replay._run
    seeds = []
    monkeypatch.setattr(replay, "_run", lambda *of: begun.append(list(of[2])) or seeds.append(of[3]) or run(*of))
    replay.sweep(variant, 0)
    of_source, first = begun
    assert of_source == []
    assert seeds == [replay.ANOTHER, 0]
    assert len(first) == 1 + replay.WARM_STARTS


def test_a_flat_curve_over_k_is_called_flat_and_an_optimum_is_found():
    from benchmarks.k_curve import table

    flat = {k: {seed: 70.0 + (seed * 7 + k * 3) % 5 / 10 for seed in range(5)} for k in (1, 5, 9)}
    lines = list(table(flat))
    assert lines[-1].startswith("Flat: no K is told apart from K = ")
    peaked = {k: {seed: value - 3.0 * (k != 5) for seed, value in flat[k].items()} for k in flat}
    *rows, overall, sentence = table(peaked)
    assert sentence == "Told apart from K = 5: K = 1, 9. The optimum lies inside the range."
    assert overall.endswith("p = 0.00.")
    assert rows[3].endswith("| the best |")
    rising = {k: {seed: value + k for seed, value in by_seed.items()} for k, by_seed in flat.items()}
    assert list(table(rising))[-1].endswith("The optimum lies up to an end of the range.")
