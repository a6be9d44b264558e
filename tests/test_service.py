"""A sweep from Python: created, watched, run, resumed, asked; trials are formulas, without Ray or MLflow."""

import threading
from dataclasses import replace

import formulas
import pytest
import yaml

from tune_topkd.config import ConfigError
from tune_topkd.errors import TuneTopKDError
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.execution import SweepTroubleError
from tune_topkd.execution.simulated import WorkerLostError
from tune_topkd.export import NoAnswerError
from tune_topkd.export import load_tuned_config
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.sweep import Callback
from tune_topkd.sweep import Kind
from tune_topkd.sweep import Sweep
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.tracking import sqlite_uri

SPACE = {
    "data": {"name": "digits"},
    "teacher": None,
    "method": "ce",
    "student": "digits_linear",
    "recipe": {"epochs": formulas.EPOCHS, "lr": 0.1},
    "space": {"lr": {"low": 0.01, "high": 1.0, "log": True}},
    "sweep": {"trials": 4, "asha": None},
    "baselines": None,
}


def measured(trial, epoch):
    return {"val_top1": 90.0 - 20.0 * abs(trial.config.recipe.lr - 0.3) + epoch / 100}


@pytest.fixture
def create(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def create(space=SPACE, name="s", **arguments):
        return Sweep.create(space, name=name, mlflow_uri="", address="local", **arguments)

    return create


class Watch(Callback):
    """Notes which of its methods were called, with what is short of it."""

    def __init__(self):
        self.heard = []

    def on_message(self, text, kind):
        self.heard.append((kind, text))

    def on_phase(self, text):
        self.heard.append(("phase", text))

    def on_trials_begin(self, config, folder, state):
        self.heard.append(("begin", config.sweep.trials, folder.name, len(state.trials)))

    def on_event(self, event):
        self.heard.append(("event", event.name))

    def on_report(self, trial):
        self.heard.append(("report", trial.key.number, trial.epoch, trial.reports[trial.epoch]["val_top1"]))

    def on_trial_end(self, trial):
        self.heard.append(("end", trial.key.number, str(trial.status), trial.value))

    def on_trials_end(self):
        self.heard.append(("trials end",))

    def on_end(self, result):
        self.heard.append(("result", result.reason, result.best and result.best.key.number))

    def of(self, *names):
        return [heard for heard in self.heard if heard[0] in names]


def test_a_sweep_runs_from_python_and_prints_nothing(create, tmp_path, capfd):
    result = create(overrides={"sweep.trials": 3, "sweep.seed": 7}).run(executor=SimulatedExecutor(measured))
    assert (result.reason, result.state.counts()["completed"], result.config.sweep.seed) == ("finished", 3, 7)
    assert result.best.value == max(trial.value for trial in result.state.trials.values())
    result.export(tmp_path / "tuned.json", format="json")
    assert result.answer.recipe.lr == result.best.params["lr"]
    assert load_tuned_config(result.folder / "tuned.yaml") == result.answer == Sweep.open("s").answer()
    assert "".join(capfd.readouterr()) == ""


def test_a_callback_hears_of_all_in_order(create):
    watch = Watch()
    result = create().run([watch], executor=SimulatedExecutor(measured))
    last = [(n, f"{record.value:.6f}") for n, record in enumerate(result.state.trials.values())]
    assert watch.of("begin", "trials end", "result") == [
        ("begin", 4, "s", 0),
        ("trials end",),
        ("result", "finished", result.best.key.number),
    ]
    assert watch.heard[-2:] == watch.of("trials end", "result")
    assert [(n, f"{value:.6f}") for _, n, status, value in watch.of("end") if status == "completed"] == last
    assert len(watch.of("report")) == 4 * formulas.EPOCHS
    written = [event.name for event in read_events(result.folder / "ledger.jsonl")[0]]
    assert [name for _, name in watch.of("event")] == written[written.index("prepared") + 1 :]
    phases = watch.of("phase")
    assert phases[0] == ("phase", "reading the data")
    assert phases[-1] == ("phase", ""), "what is over is taken away"


class Broken(Watch):
    def __init__(self, method):
        super().__init__()
        setattr(self, method, self.fail)

    def fail(self, *arguments):
        self.heard.append(("failed",))
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    "method", ["on_message", "on_phase", "on_trials_begin", "on_event", "on_report", "on_trial_end", "on_end"]
)
def test_a_callback_that_raises_is_named_and_ends_nothing(create, method, caplog):
    broken, watch = Broken(method), Watch()
    sweep = replace(create(), notes=("known",))
    result = sweep.run([broken, watch], executor=SimulatedExecutor(measured))
    assert result.reason == "finished"
    assert broken.of("failed") == [("failed",)], "it is not called again"
    assert watch.of("result")
    assert f"Broken.{method} raised, and is not called again in this run: RuntimeError('not today')" in caplog.text


def test_the_end_of_trials_is_told_whatever_ends_them(create):
    class Full(SimulatedExecutor):
        def run(self, search, work):
            raise SweepTroubleError("the disk is full")

    watch = Watch()
    with pytest.raises(SweepTroubleError, match="the disk is full"):
        create().run([watch], executor=Full(measured))
    assert watch.heard[-1] == ("trials end",)
    assert Sweep.open("s").status().condition == "stopped by trouble"


def test_what_stops_early_says_so_and_is_resumed(create):
    def interrupted(trial, epoch):
        if trial.record.key.number == 2:
            raise KeyboardInterrupt
        return measured(trial, epoch)

    first = create().run(executor=SimulatedExecutor(interrupted))
    assert (first.is_interrupted, first.state.counts()["completed"]) == (True, 2)
    status = Sweep.open("s").status()
    assert (status.condition, status.target) == ("interrupted", 4)
    assert status.trials == {"completed": 2, "pruned": 0, "failed": 0, "running": 0, "interrupted": 1}
    watch = Watch()
    last = Sweep.open("s").resume([watch], trials=5, executor=SimulatedExecutor(measured))
    assert (last.reason, last.state.counts()["completed"]) == ("finished", 5)
    assert {n for _, n, *_ in watch.of("end")} == {2, 3, 4}, "what had ended is not run again"
    assert Sweep.open("s").status().best == last.best


def test_a_sweep_of_failures_has_no_answer(create):
    def failing(trial, epoch):
        raise WorkerLostError("crash", "no luck") if trial.record.key.number else RuntimeError("no luck")

    result = create().run(executor=SimulatedExecutor(failing))
    assert result.reason in ("finished", "failed")
    assert result.best is None
    with pytest.raises(NoAnswerError, match="no trial reached the full budget"):
        result.export("tuned.py", format="python")
    with pytest.raises(NoAnswerError, match="no trial reached the full budget"):
        Sweep.open("s").answer()


def test_an_unknown_format_is_one_line(create):
    result = create(overrides={"sweep.trials": 1}).run(executor=SimulatedExecutor(measured))
    with pytest.raises(TuneTopKDError, match=r"^format: there is no 'pyhton'; did you mean 'python' or 'pytorch'\?"):
        result.export("tuned.py", format="pyhton")


def test_nothing_is_written_before_a_sweep_is_run(create, tmp_path):
    create()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_run_is_one_error_with_every_problem(create, tmp_path):
    with pytest.raises(ConfigError) as caught:
        create({**SPACE, "student": "resnet8x5"}, name="no/name", overrides={"sweep.trials": 0})
    assert "sweep.trials" in str(caught.value)
    assert "no/name" in str(caught.value)
    assert "overrides: sweep.trials" in str(caught.value), "where the value came from"
    with pytest.raises(ConfigError, match=r"digits_linear"):
        create({**SPACE, "student": "digits_linaer"})
    with pytest.raises(ConfigError, match="must be given: the search space comes from no file"):
        create(name=None)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_and_one_that_is_not_there(create):
    sweep = create(overrides={"sweep.trials": 1})
    sweep.run(executor=SimulatedExecutor(measured))
    with pytest.raises(ConfigError, match="`resume s` goes on"):
        create()
    with pytest.raises(ConfigError, match="is there already: `resume` goes on with it"):
        Sweep.open("s").run()
    with pytest.raises(ConfigError, match=r"no such sweep in .*did you mean 's'|known: s"):
        Sweep.open("t")


def test_the_same_run_begins_goes_on_and_finds_that_all_is_done(create):
    def interrupted(trial, epoch):
        if trial.record.key.number == 2:
            raise KeyboardInterrupt
        return measured(trial, epoch)

    assert create(or_resume=True).run(executor=SimulatedExecutor(interrupted)).is_interrupted
    watch = Watch()
    done = create(or_resume=True).run([watch], executor=SimulatedExecutor(measured))
    assert (done.reason, {n for _, n, *_ in watch.of("end")}) == ("finished", {2, 3})
    events = len(read_events(create(or_resume=True).folder / "ledger.jsonl")[0])
    watch = Watch()
    again = create(or_resume=True).run([watch], executor=SimulatedExecutor(measured))
    assert (again.reason, again.best, watch.of("end")) == ("finished", done.best, [])
    trained = [e.name for e in read_events(create(or_resume=True).folder / "ledger.jsonl")[0][events:]]
    assert set(trained) <= {"driver", "stop"}


def test_a_run_that_goes_on_takes_more_trials_a_time_budget_and_files_that_moved(create):
    create().run(executor=SimulatedExecutor(measured))
    more = create(or_resume=True, overrides={"sweep.trials": 6, "sweep.time_budget": 3600.0, "data.workers": 2})
    result = more.run(executor=SimulatedExecutor(measured))
    assert result.state.counts()["completed"] == 6
    assert result.state.places == {"data.workers": 2}
    fewer = create(or_resume=True).run(executor=SimulatedExecutor(measured))
    assert (fewer.state.target, fewer.state.counts()["completed"]) == (6, 6), "what is there stays"


def test_a_run_that_ended_at_a_plateau_has_ended(create):
    flat = {"sweep.trials": 30, "sweep.startup_trials": 2, "sweep.plateau": {"points": 1.0, "newest": 3}}
    first = create(or_resume=True, overrides=flat).run(
        executor=SimulatedExecutor(lambda trial, epoch: {"val_top1": 50.0})
    )
    assert first.state.plateau is not None
    ended = first.state.size()
    assert ended < 30
    again = create(or_resume=True, overrides=flat).run(executor=SimulatedExecutor(measured))
    assert again.state.size() == ended
    more = create(or_resume=True, overrides={**flat, "sweep.trials": 31}).run(executor=SimulatedExecutor(measured))
    assert more.state.size() > ended


def test_a_run_goes_on_with_no_other_sweep_than_its_own(create):
    create().run(executor=SimulatedExecutor(measured))
    changed = {"sweep.seed": 3, "recipe.lr": 0.2}
    with pytest.raises(ConfigError) as refused:
        create(or_resume=True, overrides=changed)
    message = str(refused.value)
    assert f"{Sweep.open('s').folder} holds another sweep of this name; --name gives this one another" in message
    assert "recipe.lr: was 0.1 and is 0.2" in message
    assert "sweep.seed: was 0 and is 3" in message
    assert message.count("\n") == 3, "nothing else differs"
    many = {f"recipe.{key}": value for key, value in {"momentum": 0.8, "weight_decay": 0.1, "lr": 0.2}.items()}
    with pytest.raises(ConfigError, match="and 1 more"):
        create(or_resume=True, overrides={**many, "sweep.seed": 3, "sweep.startup_trials": 2, "recipe.batch_size": 32})
    assert create(or_resume=True, name="t").run(executor=SimulatedExecutor(measured)).reason == "finished"


def test_a_run_begins_what_was_killed_before_its_first_line(create):
    sweep = create(or_resume=True)
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "ledger.jsonl").write_bytes(b"")
    assert create(or_resume=True).run(executor=SimulatedExecutor(measured)).reason == "finished"


def test_the_environment_names_what_no_argument_does(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SPACE))
    monkeypatch.setenv("TUNE_TOPKD_RUNS_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    sweep = Sweep.create(tmp_path / "mine.yaml", address="local")
    assert (sweep.name, sweep.folder) == ("mine", tmp_path / "elsewhere" / "mine")
    assert (sweep.workspace.mlflow_uri, sweep.workspace.address) == ("http://localhost:5000", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    given = Sweep.create(tmp_path / "mine.yaml", address="local", runs_dir=tmp_path / "here")
    assert given.workspace.mlflow_uri == sqlite_uri(tmp_path / "here" / "mlflow.db")


def test_a_sweep_runs_on_any_thread(create):
    """No signal can be listened to there, and none is."""
    results = []
    sweep = create()
    thread = threading.Thread(target=lambda: results.append(sweep.run(executor=SimulatedExecutor(measured))))
    thread.start()
    thread.join()
    assert [result.reason for result in results] == ["finished"]


def test_the_same_seed_gives_the_same_trials_from_python(create, tmp_path):
    found = []
    for runs in ("one", "two"):
        result = create(runs_dir=tmp_path / runs).run(executor=SimulatedExecutor(measured))
        found.append([(t.params, t.value) for t in result.state.trials.values()])
    assert found[0] == found[1]


def test_messages_have_a_kind():
    watch = Watch()
    watchers = Watchers([watch])
    watchers.info("a")
    watchers.note("b")
    watchers.error("c")
    assert watch.heard == [(Kind.INFO, "a"), (Kind.NOTE, "b"), (Kind.ERROR, "c")]


# --- begun with what others found -----------------------------------------------------------------------------------

TOPKD = {
    **SPACE,
    "teacher": {"name": "digits_cnn", "recipe": {"epochs": 1}},
    "method": "topkd",
    "loss": {"temperature": 0.3},
    "space": {**SPACE["space"], "k": {"low": 1, "high": 9}, "scale_top": {"low": 1.0, "high": 3.0}},
}


def of_k(trial, epoch):
    """Best at K = 7."""
    return {"val_top1": 90.0 - abs(trial.config.loss["k"] - 7) - trial.config.recipe.lr}


def first_of(sweep):
    """The parameters that its ledger begins with."""
    return [dict(p) for p in sweep.run(executor=SimulatedExecutor(of_k)).state.header.first]


def test_a_warm_start_takes_the_nearest_values_says_so_and_tries_nothing_twice(create):
    source = create(TOPKD, "source", overrides={"sweep.trials": 8}).run(executor=SimulatedExecutor(of_k)).state
    best = [record.params for record in source.ranked()]
    space = {**SPACE["space"], "k": [3, 5], "temperature": {"low": 0.5, "high": 1.0}}
    sweep = create({**TOPKD, "loss": {"scale_top": 2.5}, "space": space}, "next", warm_start="source")
    nearest = [min((3, 5), key=lambda choice: abs(choice - params["k"])) for params in best]
    expected = [{"lr": p["lr"], "k": k, "temperature": 0.5} for p, k in zip(best, nearest, strict=True)][:3]
    of_first = [f"--warm-start source: trial {source.best().key.number}: {told}" for told in (
        f"k = {best[0]['k']} becomes {nearest[0]}, the nearest in this space",
        "temperature = 0.3 becomes 0.5, the nearest in this space",
        f"scale_top = {best[0]['scale_top']:.3g} becomes 2.5, as it is not searched here",
    )]  # fmt: skip
    assert best[0]["k"] not in (3, 5), "else the test shows less"
    assert [note for note in sweep.notes if note.startswith("--warm-start")][:3] == of_first
    defaults, *warm = first_of(sweep)
    assert defaults == {"lr": 0.1, "k": 5, "temperature": 0.1}
    assert warm == expected


def test_a_sweep_begins_with_what_several_others_found_each_only_once(create):
    best = {}
    for name, seed in (("one", 0), ("other", 1)):
        done = create(TOPKD, name, overrides={"sweep.seed": seed}).run(executor=SimulatedExecutor(of_k))
        best[name] = [record.params for record in done.state.ranked()]
    both = create(TOPKD, "both", overrides={"sweep.trials": 8}, warm_start=["one", "other", "one"])
    defaults, *warm = first_of(both)
    assert defaults == {"lr": 0.1, "k": 5, "scale_top": 2.0}
    known = [defaults]
    for name in ("one", "other", "one"):
        known += [params for params in best[name] if params not in known][:3]
    assert warm == known[1:]
    assert len(warm) == 6


def test_a_warm_start_needs_trials_that_have_every_parameter_of_the_space(create):
    create(name="ce").run(executor=SimulatedExecutor(measured))
    with pytest.raises(ConfigError, match="ce: its trials lack k, scale_top"):
        create(TOPKD, "next", warm_start="ce")
    with pytest.raises(ConfigError, match="nothing"):
        create(name="next", warm_start=["ce", "nothing"])


def test_the_users_points_come_after_the_defaults_completed_by_them_and_none_twice(create):
    points = [{"k": 9, "lr": 0.02}, {"k": 5}, {"scale_top": 3}, {"k": 9, "lr": 0.02, "scale_top": 2.0}]
    sweep = create({**TOPKD, "sweep": {**TOPKD["sweep"], "points": points}})
    assert first_of(sweep) == [
        {"lr": 0.1, "k": 5, "scale_top": 2.0},
        {"lr": 0.02, "k": 9, "scale_top": 2.0},
        {"lr": 0.1, "k": 5, "scale_top": 3.0},
    ]
    tried = [record.params for record in read_state(sweep.folder / "ledger.jsonl").arm("search")]
    assert [(params["k"], params["scale_top"]) for params in tried[:3]] == [(5, 2.0), (9, 2.0), (5, 3.0)]


WEIGHED = {
    "space": {name: {"low": 0.1, "high": 10.0} for name in ("ce_weight", "tdl_weight")},
    "relative": {"of": ["ce_weight", "tdl_weight"], "sum": 2.0},
}


@pytest.mark.parametrize(
    ("changed", "point", "told"),
    [
        ({}, {"k": 12}, "sweep.points.1.k = 12: is no value of its range; the nearest is 9"),
        ({}, {"k": "five"}, "sweep.points.1.k = 'five': must be a number"),
        ({}, {"kk": 5}, "sweep.points.1.kk = 5: is not searched; did you mean 'k'?"),
        ({"space": {"k": [1, 5]}}, {"k": 3}, "sweep.points.1.k = 3: is no value of its range; the nearest is 1"),
        (WEIGHED, {"tdl_weight": 0}, "sweep.points.1.tdl_weight = 0: a relative weight must be above 0"),
        (
            {"space": {"clip_grad": {"low": 0.5, "high": 2.0}}},
            {},
            "sweep.points.1: must give clip_grad: searched here, and without a default",
        ),
    ],
)
def test_a_point_that_the_space_does_not_have_is_told(create, changed, point, told):
    good = {"clip_grad": 1.0} if "clip_grad" in changed.get("space", {}) else {}
    with pytest.raises(ConfigError) as caught:
        create({**TOPKD, **changed, "sweep": {**TOPKD["sweep"], "points": [good, point]}})
    assert told in str(caught.value)
    assert "points.0" not in str(caught.value)


def test_of_a_points_relative_weights_only_the_ratios_matter(create):
    sweep = create(
        {**TOPKD, **WEIGHED, "sweep": {**TOPKD["sweep"], "points": [{"ce_weight": 30.0, "tdl_weight": 10.0}]}}
    )
    state = sweep.run(executor=SimulatedExecutor(lambda trial, epoch: {"val_top1": 50.0})).state
    assert state.arm("search")[1].params == pytest.approx({"ce_weight": 1.5, "tdl_weight": 0.5})


def test_a_space_that_mixes_normalised_and_unnormalised_logits_is_warned_of(create):
    space = {**TOPKD["space"], "normalize": [True, False]}
    told = "normalize is searched"
    assert any(note.startswith(told) for note in create({**TOPKD, "space": space}).notes)
    for space in (TOPKD["space"], {**TOPKD["space"], "normalize": [True]}):
        assert not any(note.startswith(told) for note in create({**TOPKD, "space": space}).notes)
