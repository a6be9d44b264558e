"""Does a tuned config keep its promise? Trained again from the exported file alone."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tune_topkd.cli.app import main
from tune_topkd.config import ConfigError
from tune_topkd.export import load_tuned_config
from tune_topkd.sweep import Workspace
from tune_topkd.sweep.callbacks import SILENT
from tune_topkd.sweep.verify import Promise
from tune_topkd.sweep.verify import Verified
from tune_topkd.sweep.verify import promise_of
from tune_topkd.sweep.verify import verify
from tune_topkd.verdict import Interval
from tune_topkd.verdict import prediction_interval

TEST = {
    "test_top1": 90.0,
    "sd": 1.0,
    "interval": [88.0, 92.0],
    "look": 1,
    "seeds": [10_000, 10_001, 10_002],
    "values": [89.0, 90.0, 91.0],
}
FRESH = {"val_top1": 80.0, "error": 1.0, "seeds": [1, 2, 3], "values": [79.0, None, 81.0]}


def written(folder, **changes):
    """A tuned config as a sweep exports it, a student on digits with cross-entropy."""
    content = {
        "schema_version": 2,
        "method": "ce",
        "loss": {"ce_weight": 1.0},
        "recipe": {"epochs": 2, "lr": 0.1},
        "data": {"name": "digits", "val_fraction": 0.3},
        "teacher": None,
        "student": {"name": "digits_linear"},
        "evidence": {
            "val_top1": 82.0,
            "trial": 3,
            "trials": {"completed": 4, "pruned": 0, "failed": 0},
            "baselines": {},
            "seeds": [0],
            "sweep": "s",
            "sweep_id": "0",
            "digest": "d",
            "space_digest": "e",
            "teacher": {},
            "versions": {},
            "fresh": FRESH,
            "test": TEST,
        },
    }
    for key, value in changes.items():
        place = content["evidence"] if key in ("fresh", "test", "identities") else content
        if value is None and key in ("fresh", "test"):
            del place[key]
        else:
            place[key] = value
    path = folder / "tuned.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def verified(path, folder, seeds=2, places=None, watchers=SILENT):
    return verify(path, seeds, Workspace.at(folder / "clean", "", "local"), watchers, places)


# --- what is promised ---------------------------------------------------------------------------------------------------


def test_the_promise_is_the_test_sets_figure_then_that_of_fresh_seeds(tmp_path):
    promise = promise_of(load_tuned_config(written(tmp_path)), "t")
    assert (promise.metric, promise.values, promise.mean) == ("test_top1", [89.0, 90.0, 91.0], 90.0)
    assert promise.seeds == {0, 1, 2, 3, 10_000, 10_001, 10_002}
    promise = promise_of(load_tuned_config(written(tmp_path, test=None)), "t")
    assert (promise.metric, promise.values) == ("val_top1", [79.0, 81.0])


@pytest.mark.parametrize(
    "evidence", [{"test": None, "fresh": None}, {"test": None, "fresh": FRESH | {"values": [79.0, None, None]}}]
)
def test_a_value_that_a_search_chose_by_is_no_promise(tmp_path, evidence):
    path = written(tmp_path, **evidence)
    with pytest.raises(ConfigError) as caught:
        verified(path, tmp_path)
    assert str(caught.value).startswith(f"{path}: evidence: has no figure of two fresh seeds or more")
    assert "`confirm s` and export it again" in str(caught.value)


# --- the trainings --------------------------------------------------------------------------------------------------------


def test_it_trains_on_seeds_that_the_config_has_not_had_as_the_figure_was_found(tmp_path):
    found = verified(written(tmp_path), tmp_path)
    assert list(found.values) == [10_003, 10_004]
    assert found.expected == prediction_interval([89.0, 90.0, 91.0], 2)
    again = verified(written(tmp_path), tmp_path)
    assert again.values == found.values, "the same seeds give the same, bit for bit"
    on_validation = verified(written(tmp_path, test=None), tmp_path)
    assert list(on_validation.values) == [4, 5]
    assert on_validation.promise.metric == "val_top1"


def test_a_promise_that_the_trainings_keep_holds_and_one_that_they_do_not_does_not(tmp_path):
    values = list(verified(written(tmp_path), tmp_path, seeds=3).values.values())
    honest = TEST | {"values": [values[0] - 0.5, values[1], values[2] + 0.5]}
    found = verified(written(tmp_path, test=honest), tmp_path)
    assert found.holds
    assert found.sentence.startswith(f"the promise holds: {found.mean:.2f} % over 2 fresh seeds. ")
    boasting = TEST | {"values": [99.0, 99.1, 99.2]}
    found = verified(written(tmp_path, test=boasting), tmp_path)
    assert not found.holds
    assert "the promise does not hold: " in found.sentence
    assert ", which is less than it leads to expect. 99.10 % test_top1 promised over 3 seeds: " in found.sentence
    modest = TEST | {"values": [10.0, 10.1, 10.2]}
    assert ", which is more than it leads to expect" in verified(written(tmp_path, test=modest), tmp_path).sentence


def test_a_training_that_diverges_breaks_the_promise(tmp_path):
    found = verified(written(tmp_path, recipe={"epochs": 2, "lr": 1e30}), tmp_path)
    assert set(found.values.values()) == {None}
    assert not found.holds
    assert found.sentence.startswith("the promise does not hold: a training diverged (seed 10003, 10004)")
    assert json.loads(json.dumps(found.as_json()))["mean"] is None


def test_what_is_not_as_it_was_is_told(tmp_path):
    assert verified(written(tmp_path, identities={"data": "0"}), tmp_path).differences == [
        "the dataset is not what it was when the config was found: the figure may differ for that reason"
    ]


def test_the_sentence_gives_the_interval_for_as_many_trainings_as_there_were():
    promise = Promise("test_top1", [89.0, 91.0], frozenset({1, 2}))
    found = Verified(promise, {3: 90.0}, Interval(80.0, 100.0), [])
    assert found.sentence == (
        "the promise holds: 90.00 % over 1 fresh seed. 90.00 % test_top1 promised over 2 seeds: 80.00 to 100.00 is where "
        "the mean of 1 training is to be expected (95%)"
    )


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_a_teacher_whose_weights_the_file_has_not_got_is_asked_for(tmp_path):
    path = written(tmp_path, method="kd", loss={}, teacher={"name": "digits_cnn"})
    with pytest.raises(ConfigError) as caught:
        verified(path, tmp_path)
    assert str(caught.value).startswith(f"{path}: teacher: its weights are not in the file")
    assert "--set teacher.checkpoint=PATH" in str(caught.value)
    with pytest.raises(ConfigError, match=r"teacher"):
        verified(path, tmp_path, places={"teacher.checkpoint": str(tmp_path / "none.pt")})


def test_a_teacher_is_trained_by_the_recipe_in_the_file(tmp_path):
    teacher = {"name": "digits_cnn", "recipe": {"epochs": 2, "lr": 0.1}, "seed": 3}
    found = verified(written(tmp_path, method="kd", loss={}, teacher=teacher), tmp_path, seeds=1)
    assert len(found.values) == 1
    assert len(list((tmp_path / "clean" / "teachers").glob("*/*.pt"))) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"schema_version": 3},
            "schema_version = 3: is not a schema version that this tune_topkd reads: known: 1 and 2; a newer",
        ),
        ({"recipe": {"lr": 0.1}}, "recipe.epochs: is required but missing"),
        ({"student": {"name": "digits_lin"}}, "student"),
        ({"loss": {"k": 3}}, "loss.k: is no parameter of method ce"),
    ],
)
def test_a_file_that_cannot_be_trained_from_is_told_by_name_and_key(tmp_path, change, told):
    path = written(tmp_path, **change)
    with pytest.raises(ConfigError) as caught:
        verified(path, tmp_path)
    assert str(caught.value).startswith(f"{path}: {told}")


def test_no_training_at_all_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="verify: --seeds = 0: must be at least 1"):
        verified(written(tmp_path), tmp_path, seeds=0)


# --- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_exits_with_whether_it_holds_and_leaves_nothing_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, test=TEST | {"values": [99.0, 99.1, 99.2]})
    monkeypatch.setattr(sys, "argv", ["launch.py", "verify", str(path), "--seeds", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert ended.value.code == 1
    assert json.loads(said.out)["holds"] is False
    assert "training 1 of 1, seed 10003: test_top1 " in said.err
    assert os.listdir(tmp_path) == ["tuned.yaml"]


@pytest.mark.slow
def test_a_clean_process_needs_the_file_alone(tmp_path):
    path = written(tmp_path)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, os.path.join(root, "launch.py"), "verify", str(path), "--seeds", "1"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    found = json.loads(ended.stdout)
    assert ended.returncode == (0 if found["holds"] else 1), ended.stderr
    assert found["metric"] == "test_top1"


# --- the answer trained again -------------------------------------------------------------------------------------------


def trained(monkeypatch, capfd, *words):
    monkeypatch.setattr(sys, "argv", ["launch.py", "train", *map(str, words), "--mlflow-uri", ""])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    return ended.value.code, said.out, said.err


def test_train_takes_a_tuned_config_as_it_takes_a_search_space(tmp_path, monkeypatch, capfd):
    path, runs = written(tmp_path), tmp_path / "runs"
    code, out, err = trained(monkeypatch, capfd, path, "--seed", 7, "--runs-dir", runs)
    assert code == 0, err
    found = json.loads(out)
    assert (found["name"], found["seed"], found["epochs"]) == ("tuned-seed7", 7, 2)
    config = yaml.safe_load((runs / "trained" / "tuned-seed7" / "config.yaml").read_text())
    assert (config["method"], config["recipe"]["lr"], config["loss"]) == ("ce", 0.1, {"ce_weight": 1.0})
    words = (path, "--runs-dir", runs, "--epochs", 1, "--set", "data.selection=test_at_end")
    again = json.loads(trained(monkeypatch, capfd, *words)[1])
    assert again["epochs"] == 1
    assert again["metrics"].keys() >= {"test_top1"}


def test_train_asks_for_the_teacher_that_a_tuned_config_has_not_got(tmp_path, monkeypatch, capfd):
    path = written(tmp_path, method="kd", teacher={"name": "digits_cnn"})
    code, _, err = trained(monkeypatch, capfd, path, "--runs-dir", tmp_path / "runs")
    assert code == 2
    assert "its weights are not in the file; `--set teacher.checkpoint=PATH` says" in err
    newer = written(tmp_path, schema_version=99)
    assert "99" in trained(monkeypatch, capfd, newer, "--runs-dir", tmp_path / "runs")[2]
