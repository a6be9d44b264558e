"""Tables and figures, checked by what they hold and draw."""

import itertools
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from tune_topkd import report

BASELINES = {"ce": 93.0, "kd": 94.0}

SHARES = {"fANOVA": {"lr": 0.2, "k": 0.7, "alpha": 0.1}, "PED-ANOVA": {"k": 0.4, "lr": 0.6, "alpha": np.nan}}


def make_trials():
    """Ten trials: five completed (two of them equal and best), three pruned, one failed, one running."""
    status = ["completed"] * 5 + ["pruned"] * 3 + ["failed", "running"]
    return pd.DataFrame(
        {
            "number": range(10),
            "status": status,
            "reason": "",
            "k": [1, 3, 3, 3, 9, 1, 1, 5, 2, 4],
            "alpha": [0.1, 0.3, 1.0, 3.0, 10.0, 0.2, 0.5, 5.0, 2.0, 0.7],
            "shift": [0.001, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
            "normalize": [True, False] * 5,
            "val_top1": [94.5, 96.0, 95.0, 95.5, 96.0, 95.2, 60.0, 70.0, 50.0, np.nan],
            "epochs": [9, 9, 9, 9, 9, 3, 1, 1, 2, 0],
        }
    )


def make_curves(trials):
    rows = [
        (trial.number, epoch, trial.val_top1 - 5 * (trial.epochs - epoch))
        for trial in trials.itertuples()
        for epoch in range(1, int(trial.epochs) + 1)
    ]
    return pd.DataFrame(rows, columns=["number", "epoch", "val_top1"])


@pytest.fixture
def trials():
    return make_trials()


@pytest.fixture
def curves(trials):
    return make_curves(trials)


def drawn(figure, gid):
    """The artists that the figure has under this name."""
    return [artist for artist in figure.findobj() if artist.get_gid() == gid]


def points(figure, gid):
    """The offsets of the one scatter of this name."""
    (scatter,) = drawn(figure, gid)
    return scatter.get_offsets().data


def legend(figure, axes=0):
    box = figure.axes[axes].get_legend()
    return [text.get_text() for text in box.get_texts()] if box else []


def texts(figure):
    """All that can be read on the figure, once it has been laid out."""
    figure.draw_without_rendering()
    return [t.get_text() for t in figure.findobj(mpl.text.Text) if t.get_text().strip() and t.get_visible()]


class TestTrialsTable:
    def runs(self, **columns):
        """What MLflow gives for the sweep's own run and two trials; all it gives are texts, but for the metrics."""
        base = {
            "run_id": ["p", "b", "a"],
            "tags.sweep_id": ["s", "s", "s"],
            "tags.trial_number": [None, "11", "2"],
            "tags.trial_status": [None, "pruned", "completed"],
            "tags.reason": [None, "asha at epoch 3", "full budget"],
            "params.epochs": ["27", None, None],
            "params.trials": ["40", None, None],
            "params.lr": [None, "1e-05", "0.05"],
            "params.k": [None, "10", "4"],
            "params.normalize": [None, "True", "False"],
            "metrics.val_top1": [np.nan, 60.5, 95.25],
            "metrics.lr": [np.nan, 0.1, 0.2],
        }
        return pd.DataFrame(base | columns)

    def test_has_a_row_for_each_trial_by_number(self):
        table = report.trials_table(self.runs())
        assert list(table.columns) == [
            "number", "status", "reason", "k", "normalize", "lr", "val_top1", "epochs",
        ]  # fmt: skip
        assert table.to_dict("list") == {
            "number": [2, 11],
            "status": ["completed", "pruned"],
            "reason": ["full budget", "asha at epoch 3"],
            "k": [4, 10],
            "normalize": [False, True],
            "lr": [0.05, 1e-05],
            "val_top1": [95.25, 60.5],
            "epochs": [27, 3],
        }

    def test_restores_types(self):
        dtypes = report.trials_table(self.runs()).dtypes
        assert [str(dtypes[name]) for name in ("number", "k", "normalize", "lr")] == [
            "int64",
            "int64",
            "bool",
            "float64",
        ]

    @pytest.mark.parametrize(
        ("texts", "dtype", "values"),
        [
            (["4", None], "Int64", [4, pd.NA]),
            (["True", None], "boolean", [True, pd.NA]),
            (["0.5", None], "float64", [0.5, np.nan]),
            (["1", "2.5"], "float64", [1.0, 2.5]),
            (["step", "cosine"], "str", ["step", "cosine"]),
            (["True", "2"], "str", ["True", "2"]),
        ],
    )
    def test_restores_mixed_and_missing_values(self, texts, dtype, values):
        table = report.trials_table(self.runs(**{"params.x": [None, *texts]}).iloc[[0, 1, 2]])
        column = table.sort_values("number", ascending=False)["x"]
        assert column.dtype == (pd.Series(["a"]).dtype if dtype == "str" else dtype), (
            "text has its own type from pandas 3 on"
        )
        for value, expected in zip(column, values, strict=True):
            assert value is expected or value == expected or (pd.isna(value) and pd.isna(expected))

    def test_counts_epochs_from_curves(self):
        curves = pd.DataFrame({"number": [2, 2, 11], "epoch": [1, 2, 1], "val_top1": 1.0})
        assert report.trials_table(self.runs(), curves)["epochs"].to_list() == [2, 1]

    def test_leaves_epochs_out_that_nothing_tells(self):
        runs = self.runs(**{"tags.trial_status": [None, "failed", "completed"], "tags.reason": [None, "error", ""]})
        assert report.trials_table(runs.iloc[1:])["epochs"].isna().all()

    def test_does_without_columns_that_no_run_has(self):
        table = report.trials_table(self.runs().drop(columns=["tags.reason", "metrics.val_top1"]))
        assert table["reason"].to_list() == ["", ""]
        assert table["val_top1"].isna().all()

    @pytest.mark.parametrize("runs", [pd.DataFrame(), pd.DataFrame({"run_id": ["p"], "tags.sweep_id": ["s"]})])
    def test_is_empty_without_trials(self, runs):
        table = report.trials_table(runs)
        assert table.empty
        assert {"number", "status", "val_top1", "epochs"} <= set(table.columns)
        assert isinstance(report.k_figure(table), Figure)

    def test_refuses_two_sweeps(self):
        with pytest.raises(ValueError, match="must be of one sweep"):
            report.trials_table(self.runs(**{"tags.sweep_id": ["s", "s", "t"]}))


class TestAnswer:
    def test_best_is_the_earliest_of_equals(self, trials):
        assert report.best_trial(trials)["number"] == 1

    def test_best_ignores_values_of_shorter_budgets(self, trials):
        trials.loc[5, "val_top1"] = 99.0
        assert report.best_trial(trials)["number"] == 1

    def test_there_is_none_without_a_completed_trial(self, trials):
        assert report.best_trial(trials[5:]) is None
        assert report.headline(trials[5:], BASELINES) == "No trial reached the full budget"

    def test_headline(self, trials):
        assert report.headline(trials, BASELINES) == "K = 3, 96.0 % (+2.0 over KD, +3.0 over CE)"
        assert report.headline(trials, {"kd": 97.0, "ce": np.nan}) == "K = 3, 96.0 % (-1.0 over KD)"
        assert report.headline(trials, {"defaults": 95.0}) == "K = 3, 96.0 % (+1.0 over untuned)"
        assert report.headline(trials.drop(columns="k")) == "96.0 %"


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("lr", [0.01, 1.0], True),
        ("lr", [0.1, 1.0], False),
        ("lr", [0.5], False),
        ("lr", [0.0, 1.0], False),
        ("lr", [np.nan, np.nan], False),
        ("lr", [0.01, np.nan, 1.0], True),
        ("shift", [0.001, 1.0], False),
        ("normalize", [True, False], False),
        ("schedule", ["a", "b"], False),
        ("batch_size", [16, 1024], True),
    ],
)
def test_is_log_scaled(name, values, expected):
    assert report.is_log_scaled(pd.Series(values, name=name)) is expected


class TestKFigure:
    def test_draws_every_trial_where_it_belongs(self, trials):
        figure = report.k_figure(trials, BASELINES)
        assert sorted(points(figure, "completed")[:, 1]) == [94.5, 95.0, 95.5, 96.0, 96.0]
        assert points(figure, "pruned").tolist() == [[1.0, 95.2]]
        assert points(figure, "pruned count")[:, 0].tolist() == [1.0, 5.0]
        assert len(points(figure, "failed count")) == 1
        assert points(figure, "best").tolist() == [[3.0, 96.0]]

    def test_says_what_a_pruned_value_is(self, trials):
        assert legend(report.k_figure(trials)) == [
            "completed (5)",
            "best of each K",
            "median of 3 or more",
            "pruned (1): value after fewer epochs",
            "pruned (2), below the axis",
            "failed (1): no value",
        ]

    def test_lines_are_of_completed_trials_only(self, trials):
        figure = report.k_figure(trials)
        (line,) = drawn(figure, "best of K")
        assert line.get_xydata().tolist() == [[1, 94.5], [3, 96.0], [9, 96.0]]
        assert points(figure, "median").tolist() == [[3, 95.5]]

    def test_labels_baselines_and_best(self, trials):
        figure = report.k_figure(trials, BASELINES)
        heights = [drawn(figure, f"baseline {name}")[0].get_ydata()[0] for name in BASELINES]
        assert heights == list(BASELINES.values())
        shown = texts(figure)
        assert {"CE 93.0 %", "KD 94.0 %", "first of 2 equal: K = 3, 96.0 %", report.TOP1_LABEL, "K"} <= set(shown)
        low, high = figure.axes[0].get_ylim()
        assert low < 93.0
        assert high > 96.0

    def test_labels_of_near_baselines_stand_apart(self, trials):
        figure = report.k_figure(trials, {"ce": 94.0, "kd": 94.01})
        figure.draw_without_rendering()
        boxes = [t.get_window_extent() for t in figure.findobj(mpl.text.Text) if t.get_text()[:3] in ("CE ", "KD ")]
        assert len(boxes) == 2
        assert not boxes[0].overlaps(boxes[1])

    def test_leaves_a_nan_baseline_out(self, trials):
        assert not drawn(report.k_figure(trials, {"ce": np.nan}), "baseline ce")

    def test_equal_values_stand_side_by_side(self):
        trials = pd.DataFrame(
            {"number": range(3), "status": "completed", "k": [2, 2, 3], "val_top1": [95.0, 95.0, 94.0]}
        )
        x = sorted(points(report.k_figure(trials), "completed")[:, 0])
        assert x[0] < 2 < x[1] < 2.5
        assert x[2] == 3

    def test_a_very_poor_value_does_not_press_the_others_together(self, trials):
        trials.loc[0, "val_top1"] = 10.0
        figure = report.k_figure(trials)
        assert figure.axes[0].get_ylim()[0] > 80
        assert "completed (1), below the axis" in legend(figure)

    def test_wide_ranges_of_k_get_a_log_axis(self, trials):
        assert report.k_figure(trials).axes[0].get_xscale() == "linear"
        trials.loc[0, "k"] = 20
        axes = report.k_figure(trials).axes[0]
        assert axes.get_xscale() == "log"
        assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "3", "4", "5", "7", "10", "15", "20"]

    def test_without_k_in_the_space(self, trials):
        figure = report.k_figure(trials.drop(columns="k"))
        assert len(points(figure, "completed")) == 5
        assert "K was not searched" in texts(figure)

    def test_one_trial(self, trials):
        figure = report.k_figure(trials[:1])
        assert points(figure, "completed").tolist() == [[1.0, 94.5]]
        assert not drawn(figure, "best of K")
        assert "best: K = 1, 94.5 %" in texts(figure)

    def test_no_completed_trial(self, trials):
        figure = report.k_figure(trials[5:], BASELINES)
        assert "no trial reached the full budget" in texts(figure)
        assert len(points(figure, "pruned")) == 3

    def test_missing_values_are_left_out(self, trials):
        trials["k"] = trials["k"].astype("Int64")
        trials.loc[2, "k"] = pd.NA
        trials.loc[3, "val_top1"] = np.nan
        assert len(points(report.k_figure(trials), "completed")) == 3


class TestParallelCoordinates:
    def test_draws_a_line_for_each_trial(self, trials):
        figure = report.parallel_coordinates_figure(trials)
        (completed,), (pruned,), (best,) = (drawn(figure, gid) for gid in ("completed", "pruned", "best"))
        assert len(completed.get_segments()) == 5
        assert sorted(completed.get_array()) == [94.5, 95.0, 95.5, 96.0, 96.0]
        assert len(pruned.get_segments()) == 3
        assert len(best.get_xdata()) == 4
        assert legend(figure) == ["pruned (3)", "completed (5)", "best, trial 1: K = 3, 96.0 %"]
        assert len(drawn(figure, "axis")) == 4

    def test_axes_are_logarithmic_where_values_span_decades(self, trials):
        figure = report.parallel_coordinates_figure(trials, ["alpha", "shift"])
        (best,) = drawn(figure, "best")
        alpha, shift = best.get_ydata()
        assert alpha == pytest.approx(np.log10(0.3 / 0.1) / 2)
        assert shift == pytest.approx((0.2 - 0.001) / 0.999)

    def test_takes_parameters_in_the_order_given(self, trials):
        figure = report.parallel_coordinates_figure(trials, ["normalize", "k"])
        figure.draw_without_rendering()
        assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["normalize", "k"]
        assert {"yes", "no"} <= set(texts(figure))

    def test_shows_the_values_of_the_best(self, trials):
        labels = [
            t
            for t in report.parallel_coordinates_figure(trials).findobj(mpl.text.Annotation)
            if t.get_color() == report.BEST_COLOUR
        ]
        assert [t.get_text() for t in labels] == ["3", "0.3", "0.2"]

    def test_constant_parameter(self, trials):
        trials["alpha"] = 2.0
        trials["normalize"] = True
        figure = report.parallel_coordinates_figure(trials, ["alpha", "k", "normalize"])
        (best,) = drawn(figure, "best")
        assert best.get_ydata()[0] == 0.5
        assert best.get_ydata()[2] == pytest.approx(0.5, abs=0.05)

    def test_missing_values_break_the_line_only(self, trials):
        trials.loc[0:3, "alpha"] = np.nan
        trials["shift"] = np.nan
        figure = report.parallel_coordinates_figure(trials)
        assert len(drawn(figure, "completed")[0].get_segments()) == 5
        figure.draw_without_rendering()

    def test_one_trial(self, trials):
        figure = report.parallel_coordinates_figure(trials[:1])
        assert len(drawn(figure, "completed")[0].get_segments()) == 1
        figure.draw_without_rendering()

    def test_no_completed_trial(self, trials):
        figure = report.parallel_coordinates_figure(trials[5:])
        assert "no trial reached the full budget" in texts(figure)
        assert len(drawn(figure, "pruned")[0].get_segments()) == 3

    def test_nothing_to_draw(self, trials):
        assert "no trial yet" in texts(report.parallel_coordinates_figure(trials[:0]))
        plain = trials.drop(columns=["k", "alpha", "shift", "normalize"])
        assert "no parameter was searched" in texts(report.parallel_coordinates_figure(plain))


class TestImportance:
    def test_sorts_by_the_mean(self):
        axes = report.importance_figure(SHARES).axes[0]
        assert [t.get_text() for t in axes.get_yticklabels()] == ["alpha", "lr", "k"]  # upwards

    def test_draws_a_group_of_bars_for_each_evaluator(self):
        figure = report.importance_figure(SHARES)
        bars = {c.get_label(): [bar.get_width() for bar in c] for c in figure.axes[0].containers}
        assert bars["fANOVA"] == [0.1, 0.2, 0.7]
        assert bars["PED-ANOVA"][1:] == [0.6, 0.4]
        assert legend(figure) == ["fANOVA", "PED-ANOVA"]
        upper, lower = (container[2].get_y() for container in figure.axes[0].containers)
        assert upper > lower

    @pytest.mark.parametrize("shares", [{}, {"fANOVA": {}}, {"fANOVA": {"k": np.nan}}])
    def test_nothing_to_draw(self, shares):
        assert "too few trials to tell" in texts(report.importance_figure(shares))

    def test_all_zero(self):
        assert report.importance_figure({"fANOVA": {"k": 0.0}}).axes[0].get_xlim()[1] > 0


class TestLearningCurves:
    def test_draws_every_curve(self, curves, trials):
        figure = report.learning_curves_figure(curves, trials, rungs=[1, 3])
        counts = {s: len(drawn(figure, f"{s} curve")[0].get_segments()) for s in ("completed", "pruned", "failed")}
        assert counts == {"completed": 5, "pruned": 3, "failed": 1}
        assert [line.get_xdata()[0] for line in drawn(figure, "rung")] == [1, 3]
        assert legend(figure) == [
            "best, trial 1: K = 3, 96.0 %",
            "completed (5)",
            "stopped early (3)",
            "failed (1)",
            "ASHA decides",
        ]

    def test_marks_where_trials_stopped(self, curves, trials):
        figure = report.learning_curves_figure(curves, trials)
        assert points(figure, "pruned end")[:, 0].tolist() == [3, 1, 1]
        assert points(figure, "pruned end")[0, 1] == 95.2
        low = figure.axes[0].get_ylim()[0]
        assert (points(figure, "failed end")[:, 1] >= low).all()

    def test_a_training_that_fell_has_its_highest_epoch_on_the_axis(self, curves, trials):
        curves["val_top1"] -= 50
        curves.loc[(curves["number"] == 0) & (curves["epoch"] == 5), "val_top1"] = 99.0
        low, high = report.learning_curves_figure(curves, trials).axes[0].get_ylim()
        assert low < 99 < high

    def test_emphasises_the_best(self, curves, trials):
        (best,) = drawn(report.learning_curves_figure(curves, trials), "best curve")
        assert best.get_ydata()[-1] == 96.0
        assert to_rgba(best.get_color()) == to_rgba(report.BEST_COLOUR)

    def test_curves_in_any_order(self, curves, trials):
        shuffled = curves.sample(frac=1, random_state=0)
        (best,) = drawn(report.learning_curves_figure(shuffled, trials), "best curve")
        assert best.get_xdata().tolist() == list(range(1, 10))

    def test_leaves_nan_and_unknown_trials_out(self, curves, trials):
        curves.loc[curves["number"] == 0, "val_top1"] = np.nan
        figure = report.learning_curves_figure(curves, trials[trials["number"] != 2])
        assert len(drawn(figure, "completed curve")[0].get_segments()) == 3

    def test_unfinished_trials(self, curves, trials):
        trials.loc[0:1, "status"] = ["running", "interrupted"]
        assert {"running (1)", "interrupted (1)"} <= set(legend(report.learning_curves_figure(curves, trials)))

    @pytest.mark.parametrize("chosen", [slice(0, 1), slice(5, 8), slice(8, 9), slice(0, 0)])
    def test_few_trials(self, curves, trials, chosen):
        figure = report.learning_curves_figure(curves, trials[chosen])
        shown = [
            c
            for c in figure.findobj(LineCollection)
            if c.get_gid() in ("completed curve", "pruned curve", "failed curve")
        ]
        assert sum(len(c.get_segments()) for c in shown) == len(trials[chosen])
        assert ("no epoch yet" in texts(figure)) is trials[chosen].empty

    def test_budget_of_one_epoch(self, curves, trials):
        figure = report.learning_curves_figure(curves[curves["epoch"] == 1], trials)
        assert len(points(figure, "completed end")) == 5


class TestSummary:
    def test_is_titled_with_the_answer(self, trials, curves):
        figure = report.summary_figure(trials, curves, BASELINES, rungs=[3])
        assert figure.get_suptitle() == "K = 3, 96.0 % (+2.0 over KD, +3.0 over CE)"
        assert len(points(figure, "completed")) == 5
        assert len(drawn(figure, "rung")) == 1

    def test_shows_what_the_finalists_fresh_seeds_gave_and_the_baselines_of_the_same_seeds(self, trials, curves):
        first, second = trials.loc[trials["status"] == "completed", "number"].iloc[:2]
        rows = [(f"{first:04}", "search", False, 90.0, 0.5), (f"{second:04}", "search", True, 92.0, float("nan"))]
        rows += [("ce-0001", "ce", False, 88.0, 0.5)]
        finalists = pd.DataFrame(rows, columns=["trial", "arm", "is_answer", "mean", "error"])
        finalists = finalists.assign(own=93.0, luck=1.0).assign(**{"1": finalists["mean"]}).rename(columns={"1": 1})
        figure = report.summary_figure(trials, curves, BASELINES, [3], finalists)
        assert "92.0 % over 1 fresh seed, 93.0 % in the search\n(+4.0 over CE" in figure.get_suptitle()
        assert len(drawn(figure, "baseline ce")) == 1
        assert not drawn(figure, "baseline kd"), "it has no fresh seed"
        assert [y for _, y in points(figure, "answer")] == [92.0]
        assert not drawn(figure, "best"), "the search's best is not the answer"
        assert drawn(figure, "finalists")

    def test_without_an_answer(self, trials, curves):
        assert report.summary_figure(trials[5:], curves).get_suptitle() == "No trial reached the full budget"


@pytest.mark.parametrize("width", ["short", "long"])
def test_nothing_is_cut_off_and_nothing_overlaps(trials, curves, width):
    if width == "long":
        trials = trials.assign(**{n: trials["alpha"] for n in report.PARAMETER_ORDER if n not in trials})
    figures = [
        report.k_figure(trials, BASELINES),
        report.parallel_coordinates_figure(trials),
        report.learning_curves_figure(curves, trials, [1, 3]),
        report.importance_figure({"fANOVA": dict.fromkeys(report.parameters_of(trials), 0.1)}),
        report.summary_figure(trials, curves, BASELINES, [1, 3]),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        tight = figure.get_tightbbox()
        assert tight.x0 >= -0.01
        assert tight.y0 >= -0.01
        assert tight.x1 <= figure.get_figwidth() + 0.01
        assert tight.y1 <= figure.get_figheight() + 0.01
        for axes in figure.axes:
            labels = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(labels))


def test_figures_can_be_written_without_a_display(trials, curves, tmp_path):
    path = tmp_path / "summary.png"
    report.summary_figure(trials, curves, BASELINES).savefig(path)
    assert path.stat().st_size > 10_000


def test_importing_brings_in_nothing_heavy_and_chooses_no_backend():
    code = (
        "import sys, tune_topkd.report\n"
        "print({'ray', 'optuna', 'torch', 'mlflow', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
