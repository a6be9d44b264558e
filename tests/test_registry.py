"""The student of a confirmed sweep in MLflow's model registry: registered once, judged by intervals, loaded elsewhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from scipy import stats
from servers import free_port
from servers import mlflow_server
from test_export_student import all_images
from test_export_student import called
from test_export_student import networks_logits

from tune_topkd.data import load_dataset
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.execution.checkpoints import newest_checkpoint
from tune_topkd.execution.checkpoints import write_checkpoint
from tune_topkd.export import WRITERS
from tune_topkd.export import load_tuned_config
from tune_topkd.ledger import TEST
from tune_topkd.ledger import TrialKey
from tune_topkd.space import digest
from tune_topkd.sweep import Callback
from tune_topkd.sweep import Kind
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import audit
from tune_topkd.sweep import registered as tuned_of
from tune_topkd.sweep import track
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.register import _compared
from tune_topkd.sweep.student import student_trial
from tune_topkd.tracking import Registry
from tune_topkd.tracking import TrackingError
from tune_topkd.tracking import Version
from tune_topkd.tracking import model_name
from tune_topkd.train import train
from tune_topkd.verdict import welch_interval

SPACE = {
    "data": {"name": "digits"},
    "teacher": None,
    "method": "ce",
    "student": {"name": "digits_cnn_tiny", "kwargs": {"widths": [2, 3]}},
    "recipe": {"epochs": 1, "lr": 0.1},
    "space": {"lr": {"low": 0.003, "high": 0.3, "log": True}},
    "sweep": {"trials": 2, "asha": None, "gpus_per_trial": 0, "points": [{"lr": 0.003}, {"lr": 0.1}]},
    "baselines": {"methods": ["ce"], "trials": 1},
}
NAME = "topkd.digits.none.digits_cnn_tiny"
SEEDS = 3


STUDENT = TrialKey(TEST, 0)
"""The training whose weights are registered: the answer's first one of the first look."""


class Planted:
    """Trains the student of a confirmed sweep, in this process; other trainings, and all values of the test set, are told.

    The values are in percent; they depend on the seed, and are 5 points higher than those of cross-entropy.
    """

    measure = SimulatedExecutor.measure

    def __init__(self, test_top1):
        self.test_top1 = test_top1

    def run(self, search, work):
        while (record := search.next_trial()) is not None:
            search.started(record.key)
            folder, config = work.folder / "trials" / str(record.key), search.trial_config(record)
            folder.mkdir(parents=True)
            value = self.test_top1 - 5.0 * (record.origin.arm == "ce") + 0.1 * (config.seed % 3)
            is_test = config.data.selection == "test_at_end"
            told = {"test_top1": value} if is_test else {"val_top1": 50.0 + record.origin.number}

            def report(epoch, metrics, save, key=record.key, folder=folder, told=told):
                if save is not None:
                    write_checkpoint(folder, epoch, told, save)
                search.reported(key, epoch, told)

            if is_test and (record.origin.arm, config.seed % 10_000) == ("search", 0):
                train(config, report)
            else:
                report(1, {}, None)
        return search.stopped()


class Told(Callback):
    """What is said."""

    def __init__(self):
        self.lines = []

    def on_message(self, text, kind):
        self.lines.append((kind, text))

    def of(self, kind):
        return [text for found, text in self.lines if found is kind]


def confirmed(name, runs, uri, test_top1=90.0, **overrides):
    """A confirmed sweep with its weights, and what was told while it was confirmed."""
    about = {"runs_dir": runs, "mlflow_uri": uri, "address": "local"}
    Sweep.create(SPACE, name=name, overrides=overrides, **about).run(executor=Planted(test_top1))
    told = Told()
    result = Sweep.open(name, **about).confirm([told], finalists=2, seeds=SEEDS, executor=Planted(test_top1))
    assert result.verdict.is_done
    return result, told


def tracked(name, runs, uri):
    told = Told()
    track(name, Workspace.at(runs, uri, "local"), Watchers([told]))
    return told


@pytest.fixture(scope="module")
def unregistered(tmp_path_factory):
    """A confirmed sweep `s` that MLflow has nothing of; not to be changed."""
    result, told = confirmed("s", tmp_path_factory.mktemp("runs"), "")
    assert not [text for text in told.of(Kind.NOTE) if "registry" in text]
    return result


@pytest.fixture(scope="module")
def registered(tmp_path_factory, unregistered, empty_store):
    """The same sweep, and the URI of an MLflow that has it and its student; not to be changed."""
    folder = tmp_path_factory.mktemp("registered")
    shutil.copytree(unregistered.folder, folder / "runs" / "s")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    told = tracked("s", folder / "runs", uri)
    assert told.lines == [(Kind.INFO, f"registered as models:/{NAME}/1: it is the champion")]
    return folder / "runs", uri


@pytest.fixture
def store(tmp_path, empty_store):
    """An empty MLflow's URI."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def copied(unregistered, tmp_path):
    """The runs folder of the same sweep, to be changed."""
    shutil.copytree(unregistered.folder, tmp_path / "runs" / "s")
    return tmp_path / "runs"


def client(uri):
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def aliases(uri):
    return Registry(uri).aliases(NAME)


# --- what is registered ---------------------------------------------------------------------------------------------


def test_a_version_says_where_it_comes_from_and_what_it_is_worth(registered, unregistered):
    found = client(registered[1]).get_model_version_by_alias(NAME, "champion")
    tuned, verdict = unregistered.answer, unregistered.verdict
    test = tuned.evidence.test
    assert found.description.startswith(f"{verdict.sentence}\n\n- Sweep `s`, trial {tuned.evidence.trial};")
    tags = dict(found.tags)
    assert json.loads(tags.pop("interval")) == list(verdict.answer.interval)
    assert json.loads(tags.pop("values")) == verdict.answer.values
    assert json.loads(tags.pop("seeds")) == [10_000, 10_001, 10_002]
    assert json.loads(tags.pop("gains"))["ce"]["points"] == pytest.approx(verdict.gains[0].mean)
    assert tags == {
        "sweep": "s",
        "sweep_id": unregistered.state.header.id,
        "look": "1",
        "method": "ce",
        "dataset": "digits",
        "teacher": "",
        "student": "digits_cnn_tiny",
        "test_top1": repr(test.test_top1),
        "tuned_config": digest(tuned.model_dump(mode="json")),
        "data": unregistered.state.identities["data"],
        "network": unregistered.state.identities["student.name"],
        "judged": "it is the champion",
    }
    run = client(registered[1]).get_run(found.run_id)
    assert (run.data.tags["sweep"], "trial_number" in run.data.tags) == ("s", False)
    assert [finding for finding in audit("s", Workspace.at(*registered, "local")) if "MLflow" in finding] == []


@pytest.mark.slow
def test_another_process_loads_the_champion_without_this_project_and_gets_our_logits(
    registered, unregistered, tmp_path
):
    dataset = load_dataset(unregistered.config.data)
    images = all_images(dataset)
    np.save(tmp_path / "images.npy", images.numpy())
    script = (
        "import sys\n"
        "sys.modules['tune_topkd'] = None\n"
        "import mlflow, numpy, torch\n"
        "torch.cuda.is_available = lambda: True\n"  # MLflow would move the program to a GPU, which it cannot
        f"model = mlflow.pyfunc.load_model('models:/{NAME}@champion')\n"
        "images = numpy.load('images.npy')\n"
        "numpy.save('logits.npy', model.predict(images))\n"
        "numpy.save('one.npy', model.predict(images[:1]))\n"
        "print(model.metadata.signature.inputs, model.input_example.shape, model.input_example.dtype)\n"
    )
    environment = {"PYTHONPATH": "", "MLFLOW_TRACKING_URI": registered[1], "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[Tensor('uint8', (-1, 1, 8, 8))] (1, 1, 8, 8) uint8"
    assert student_trial(unregistered.state).key == STUDENT
    folder = newest_checkpoint(unregistered.folder / "trials" / str(STUDENT))
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    expected = networks_logits(unregistered.config.student, weights, dataset).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "one.npy"), expected[:1], rtol=0, atol=1e-5)
    assert np.abs(expected - expected.mean(0)).max() > 0.1, "images make a difference"


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        (("cifar100", "resnet32x4", "resnet8x4"), "topkd.cifar100.resnet32x4.resnet8x4"),
        (("digits", None, "a"), "topkd.digits.none.a"),
        (
            ("my.data:source", "torchvision:resnet50", "timm:ü/x@1"),
            "topkd.my.data-source.torchvision-resnet50.timm-x-1",
        ),
        (("d", "t", "s" * 400), "topkd.d.t." + "s" * 240),
    ],
)
def test_names_are_what_the_registry_and_a_models_uri_take(pair, name, store):
    assert model_name(*pair) == name
    client(store).create_registered_model(name)
    assert Registry(store).aliases(name) == {}


# --- once, and later ------------------------------------------------------------------------------------------------


def test_confirming_registers_and_a_second_time_in_any_way_adds_nothing(copied, store):
    about = {"runs_dir": copied, "mlflow_uri": store, "address": "local"}
    told = Told()
    Sweep.open("s", **about).confirm([told], finalists=2, seeds=SEEDS, executor=Planted(0))
    assert told.of(Kind.INFO)[-1] == f"registered as models:/{NAME}/1: it is the champion"
    client(store).delete_registered_model_alias(NAME, "champion")  # a person's wish, which is kept
    for again in (Sweep.open("s", **about).resume, Sweep.open("s", **about).confirm):
        more = {} if again.__name__ == "resume" else {"finalists": 2, "seeds": SEEDS}
        again([told := Told()], executor=Planted(0), **more)
        assert not [text for _, text in told.lines if "regist" in text]
    assert tracked("s", copied, store).lines == []
    assert [version.number for version in Registry(store).versions(NAME)] == ["1"]
    assert aliases(store) == {}


def test_resume_registers_what_is_missing_and_a_further_look_is_a_version_of_its_own(copied, store):
    about = {"runs_dir": copied, "mlflow_uri": store, "address": "local"}
    Sweep.open("s", **about).resume([told := Told()], executor=Planted(0))
    assert told.of(Kind.INFO) == [f"registered as models:/{NAME}/1: it is the champion"]
    plan = {"finalists": 2, "seeds": SEEDS, "again": True}
    result = Sweep.open("s", **about).confirm([told := Told()], executor=Planted(90.0), **plan)
    assert told.of(Kind.INFO)[-1].startswith(f"registered as models:/{NAME}/2: version 1 stays the champion: ")
    first, second = Registry(store).versions(NAME)
    assert (first.tags["look"], second.tags["look"]) == ("1", "2")
    assert first.tags["sweep_id"] == second.tags["sweep_id"]
    place = Workspace.at(copied, store, "local")
    assert tuned_of(f"models:/{NAME}/2", place) == result.answer
    assert tuned_of(f"models:/{NAME}/1", place).evidence.test.look == 1
    assert "This is look 2 at the test set" in client(store).get_model_version(NAME, "2").description


@pytest.mark.parametrize("method", ["create_registered_model", "log_artifacts", "create_model_version"])
def test_what_mlflow_refuses_is_a_note_and_track_makes_up_for_it(copied, store, monkeypatch, method):
    def refused(*arguments, **named):
        raise MlflowException("You may not do\nthis", error_code=7)

    about = {"runs_dir": copied, "mlflow_uri": store, "address": "local"}
    told = Told()
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, method, refused)
        result = Sweep.open("s", **about).confirm([told], finalists=2, seeds=SEEDS, executor=Planted(0))
    assert result.reason == "finished"
    (note,) = told.of(Kind.NOTE)
    assert re.fullmatch(
        r"the student is not in MLflow's model registry: MLflow at sqlite:\S+ fails: MlflowException: .*You may not do this"
        r"; `track s` registers it later",
        note,
    )
    assert Registry(store).versions(NAME) == []
    assert len(tracked("s", copied, store).of(Kind.INFO)) == 1
    assert aliases(store) == {"champion": "1"}


@pytest.mark.parametrize("method", ["set_registered_model_alias", "set_model_version_tag"])
def test_who_is_killed_between_a_version_and_its_alias_goes_on_with_that_version(copied, store, monkeypatch, method):
    def killed(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, method, killed)
        with pytest.raises(KeyboardInterrupt):
            tracked("s", copied, store)
    assert [version.number for version in Registry(store).versions(NAME)] == ["1"]
    assert tracked("s", copied, store).of(Kind.INFO) == [f"registered as models:/{NAME}/1: it is the champion"]
    assert [version.number for version in Registry(store).versions(NAME)] == ["1"]
    assert aliases(store) == {"champion": "1"}


def test_an_interruption_while_it_is_registered_ends_a_sweep_that_is_done(copied, store, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow.MlflowClient, "create_model_version", interrupted)
    about = {"runs_dir": copied, "mlflow_uri": store, "address": "local"}
    told = Told()
    result = Sweep.open("s", **about).confirm([told], finalists=2, seeds=SEEDS, executor=Planted(0))
    assert (result.reason, result.is_interrupted) == ("finished", False)
    (note,) = told.of(Kind.NOTE)
    assert note == "the student is not in MLflow's model registry: interrupted; `track s` registers it later"


def test_without_mlflow_the_command_is_done_and_says_how_to_register_later(copied, store, monkeypatch, capfd):
    uri = f"http://someone:hunter2-of-the-tracker@127.0.0.1:{free_port()}"
    arguments = ("confirm", "s", "--runs-dir", copied, "--finalists", 2, "--seeds", SEEDS)
    assert called(monkeypatch, *arguments, "--mlflow-uri", uri) == 0
    told = capfd.readouterr()
    (note,) = [line for line in told.err.splitlines() if "model registry" in line]
    assert note.startswith("note: the student is not in MLflow's model registry: MLflow has not got all of the sweep (")
    assert note.endswith("); `track s` registers it later")
    assert "hunter2" not in told.err + told.out
    assert called(monkeypatch, "track", "s", "--runs-dir", copied, "--mlflow-uri", store) in (0, None)
    said = capfd.readouterr().err
    assert said == f"registered as models:/{NAME}/1: it is the champion\nMLflow has all of s\n"
    assert aliases(store) == {"champion": "1"}


def test_a_student_whose_weights_are_gone_is_a_note_that_names_the_folder(copied, store):
    shutil.rmtree(copied / "s" / "trials")
    told = tracked("s", copied, store)
    ((kind, note),) = told.lines
    assert kind is Kind.NOTE
    assert f"{copied}/s/trials/" in note
    assert "has no checkpoint: the weights of trial" in note
    assert Registry(store).versions(NAME) == []
    assert Registry(store).aliases(NAME) is None, "nothing is made in vain"


def test_a_config_that_was_changed_by_hand_is_a_note(copied, store):
    path = copied / "s" / "sweep.yaml"
    path.write_text(path.read_text().replace("digits_cnn_tiny", "digits_linear"))
    _, note = tracked("s", copied, store).of(Kind.NOTE)  # the first one is of the artifacts
    assert "has been changed since the sweep began" in note


def test_a_sweep_that_is_not_confirmed_is_not_registered(tmp_path, store):
    about = {"runs_dir": tmp_path / "runs", "mlflow_uri": store, "address": "local"}
    told = Told()
    Sweep.create(SPACE, name="s", **about).run([told], executor=Planted(0))
    assert tracked("s", tmp_path / "runs", store).lines == []
    assert Registry(store).models() == []


# --- the champion ---------------------------------------------------------------------------------------------------


def test_a_later_answer_replaces_the_champion_only_where_it_is_told_apart_and_above(tmp_path, registered):
    shutil.copytree(registered[0].parent, tmp_path / "all")
    uri = f"sqlite:///{tmp_path / 'all' / 'mlflow.db'}"
    runs = tmp_path / "runs"
    _, told = confirmed("near", runs, uri, 90.05)
    assert told.of(Kind.INFO)[-1].startswith(
        f"registered as models:/{NAME}/2: version 1 stays the champion: +0.05 points"
    )
    assert told.of(Kind.INFO)[-1].endswith("against it are not told apart")
    assert aliases(uri) == {"champion": "1"}
    _, told = confirmed("worse", runs, uri, 80.0)
    assert "version 1 stays the champion: -10.00 points (" in told.of(Kind.INFO)[-1]
    assert aliases(uri) == {"champion": "1"}
    _, told = confirmed("better", runs, uri, 95.0)
    assert "/4: it is the champion, +5.00 points (" in told.of(Kind.INFO)[-1]
    assert aliases(uri) == {"champion": "4", "previous": "1"}
    client(uri).set_registered_model_alias(NAME, "champion", "1")  # a person goes back
    for name in ("near", "worse", "better"):
        assert tracked(name, runs, uri).lines == []
    assert aliases(uri) == {"champion": "1", "previous": "1"}


PAIR = {"dataset": "d", "data": "x", "teacher": "t", "student": "s", "network": "m"}


def version(number, values, **tags):
    text = values if isinstance(values, str) else json.dumps(values)
    return Version("m", str(number), PAIR | {"values": text} | tags)


@pytest.mark.parametrize(
    ("later", "is_better", "told"),
    [
        (
            version(2, [92.0, 92.2, 92.1]),
            True,
            r"it is the champion, \+2\.00 points \(\+1\.77 to \+2\.23\) over version 1",
        ),
        (version(2, [88.0, 88.2, 88.1]), False, r"version 1 stays the champion: -2\.00 points .* against it"),
        (version(2, [80.0, 99.0, 98.0]), False, "not told apart"),
        (version(2, [99.0]), False, "no values of two seeds"),
        (version(2, [99.0, None]), False, "no values of two seeds"),
        (version(2, "[99, "), False, "no values of two seeds"),
        (version(2, "{}"), False, "no values of two seeds"),
        (version(2, [99.0, 99.1], data="y"), False, "of other images or networks"),
        (version(2, [99.0, 99.1], teacher="u"), False, "of other images or networks"),
        (version(2, [99.0, 99.1], network="n"), False, "of other images or networks"),
    ],
)
def test_the_interval_decides(later, is_better, told):
    found = _compared(later, version(1, [90.0, 90.2, 90.1]))
    assert found[0] is is_better
    assert re.search(told, found[1])


def test_two_sweeps_are_told_apart_by_welchs_interval():
    drawn = np.random.default_rng(0)
    for sizes in ((5, 5), (2, 9), (13, 3)):
        first, second = (list(drawn.normal(90, spread, size)) for size, spread in zip(sizes, (0.2, 2.0), strict=True))
        expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
        assert tuple(welch_interval(first, second)) == pytest.approx((expected.low, expected.high))
    assert welch_interval([1.0], [1.0, 2.0]) is None
    assert welch_interval([1.0, 2.0], []) is None
    assert tuple(welch_interval([2.0, 2.0], [1.5, 1.5])) == (0.5, 0.5)


# --- out of the registry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", WRITERS)
@pytest.mark.parametrize("which", ["@champion", "/1"])
def test_export_from_the_registry_is_the_sweeps_tuned_config(
    registered, unregistered, tmp_path, monkeypatch, capfd, format_, which
):
    arguments = ("export", f"models:/{NAME}{which}", "--format", format_, "--mlflow-uri", registered[1])
    assert called(monkeypatch, *arguments) in (0, None)
    told = capfd.readouterr()
    assert (told.out, told.err) == (WRITERS[format_](unregistered.answer), "")
    assert called(monkeypatch, *arguments, "-o", tmp_path / "tuned") in (0, None)
    assert (tmp_path / "tuned").read_text() == WRITERS[format_](unregistered.answer)
    if format_ != "python":
        assert load_tuned_config(tmp_path / "tuned") == unregistered.answer


def test_the_runs_folders_own_mlflow_is_asked_by_default(registered, unregistered, tmp_path, monkeypatch, capfd):
    shutil.copyfile(registered[1].removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    assert called(monkeypatch, "export", f"models:/{NAME}@champion", "--runs-dir", tmp_path) in (0, None)
    assert capfd.readouterr().out == WRITERS["yaml"](unregistered.answer)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered[1])
    assert called(monkeypatch, "export", f"models:/{NAME}/1", "--runs-dir", tmp_path / "none") in (0, None)
    assert capfd.readouterr().out == WRITERS["yaml"](unregistered.answer)


@pytest.mark.parametrize(
    ("model", "more", "told"),
    [
        (f"models:/{NAME}", (), f"models:/{NAME}: must be models:/NAME@ALIAS or models:/NAME/VERSION"),
        (f"models:/{NAME}/0", (), "must be models:/NAME@ALIAS or models:/NAME/VERSION"),
        (f"models:/{NAME}x/1", (), f"there is no model '{NAME}x'; did you mean '{NAME}'?"),
        (f"models:/{NAME}/7", (), "there is no version 7; known: 1"),
        (f"models:/{NAME}@champ", (), "there is no alias 'champ'; did you mean 'champion'?"),
        (
            f"models:/{NAME}/1",
            ("--format", "onnx"),
            "--format: onnx: must be one of yaml, json, python, torchdistill, mdistiller, timm, pytorch for models:/…",
        ),
    ],
)
def test_what_is_not_in_the_registry_is_one_line(registered, monkeypatch, capfd, model, more, told):
    assert called(monkeypatch, "export", model, "--mlflow-uri", registered[1], *more) == 2
    found = capfd.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert told in found.err
    assert found.err.count("\n") == 1


def test_a_registry_that_cannot_be_reached_is_one_line_without_the_password(tmp_path, monkeypatch, capfd):
    port = free_port()
    uri = f"http://someone:hunter2-of-the-tracker@127.0.0.1:{port}"
    assert called(monkeypatch, "export", f"models:/{NAME}@champion", "--mlflow-uri", uri) == 2
    found = capfd.readouterr()
    assert f"MLflow at http://***@127.0.0.1:{port} fails: " in found.err
    assert (found.out, found.err.count("\n"), "hunter2" in found.err) == ("", 1, False)
    assert called(monkeypatch, "export", f"models:/{NAME}@champion", "--runs-dir", tmp_path) == 2
    assert capfd.readouterr().err.rstrip().endswith("/mlflow.db fails: there is no such database")
    assert not list(tmp_path.iterdir())


def test_a_model_that_another_program_made_has_no_tuned_config(registered, tmp_path, monkeypatch, capfd):
    shutil.copyfile(registered[1].removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (tmp_path / "empty").mkdir()
    client(uri).create_registered_model("other")
    client(uri).create_model_version("other", source=(tmp_path / "empty").as_uri())
    assert called(monkeypatch, "export", "models:/other/1", "--mlflow-uri", uri) == 2
    found = capfd.readouterr()
    assert found.err.startswith("error: export: models:/other/1: ")
    assert "tuned.yaml" in found.err
    assert found.err.count("\n") == 1


def test_a_registry_that_fails_says_so_with_its_uri_masked(registered, monkeypatch):
    def failing(*arguments, **named):
        raise RuntimeError("no")

    registry = Registry(registered[1])
    monkeypatch.setattr(mlflow.MlflowClient, "search_model_versions", failing)
    with pytest.raises(TrackingError, match=r"^MLflow at sqlite:\S+ fails: RuntimeError: no$"):
        registry.versions(NAME)


# --- a server, and what the documentation says ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_was_down_gets_the_student_and_serves_it(copied, tmp_path, monkeypatch, empty_store):
    monkeypatch.chdir(tmp_path)  # where it keeps artifacts
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    with mlflow_server("sqlite:///mlflow.db") as server:
        server.kill()
        about = {"runs_dir": copied, "mlflow_uri": server.uri, "address": "local"}
        told = Told()
        result = Sweep.open("s", **about).confirm([told], finalists=2, seeds=SEEDS, executor=Planted(0))
        assert (result.reason, len(told.of(Kind.NOTE))) == ("finished", 1)
        server.start()
        assert tracked("s", copied, server.uri).of(Kind.INFO) == [
            f"registered as models:/{NAME}/1: it is the champion",
        ]
        assert tracked("s", copied, server.uri).lines == []
        assert tuned_of(f"models:/{NAME}@champion", Workspace.at(copied, server.uri, "local")) == result.answer
        script = (
            f"import mlflow, sys; print(mlflow.pyfunc.load_model('models:/{NAME}@champion').metadata.signature.inputs)"
        )
        environment = {"PYTHONPATH": "", "MLFLOW_TRACKING_URI": server.uri}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == "[Tensor('uint8', (-1, 1, 8, 8))]"


PAGE = Path(__file__).parents[1] / "docs" / "confirm.md"


def test_the_page_is_true(registered, unregistered, monkeypatch):
    section = PAGE.read_text().partition("## The registry")[2].partition("\n## ")[0]
    example, own = "topkd.digits.digits_cnn.digits_cnn_tiny", "sqlite:///runs/mlflow.db"
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    assert (example in code, own in code) == (True, True)
    dataset = load_dataset(unregistered.config.data)
    names = {"images": all_images(dataset).numpy()}
    # What it sets would outlive this test.
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered[1])
    exec(code.replace(example, NAME).replace(own, registered[1]), names)
    assert names["logits"].shape == (len(dataset.val), 10)
    (version_,) = Registry(registered[1]).versions(NAME)
    assert set(re.findall(r"`(\w+)`", section)) >= set(version_.tags)
