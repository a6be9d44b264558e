"""Where something is changes no result: each key is marked once, and whatever names a result asks for the marks."""

from pathlib import Path

import formulas
import pytest

from tune_topkd.config import DataConfig
from tune_topkd.config import SweepConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import placements
from tune_topkd.config import value_at
from tune_topkd.config import what
from tune_topkd.config import without
from tune_topkd.data import dataset_info
from tune_topkd.data import load_dataset
from tune_topkd.data.datasets import read_as
from tune_topkd.sweep.workspace import PLACES
from tune_topkd.sweep.workspace import config_digest
from tune_topkd.teacher.logits import in_config
from tune_topkd.train.checkpoint import config_identity

SWEEP = formulas.sweep_config()
TRIAL = TrialConfig(data=SWEEP.data, student=SWEEP.student, method="ce", recipe=SWEEP.recipe)
ELSEWHERE = {
    "data.root": "/elsewhere",
    "data.download": True,
    "data.workers": 3,
    "threads": 2,
    "gpu_share": 0.5,
    "ranks": 2,
    "teacher_bank": "/elsewhere/bank",
    "dataset_file": "/elsewhere/dataset.pt",
    "recipe.log_grad_norms": True,
}
OF_A_SWEEP = {"sweep.autoscale_to": 8, "sweep.start_timeout": 600.0}
FILES = ("teacher_checkpoint", "student.checkpoint")


def moved(config, key, value):
    content = config.model_dump(mode="json")
    *sections, name = key.split(".")
    target = content
    for section in sections:
        target = target[section]
    target[name] = value
    return type(config).model_validate(content)


def test_these_keys_say_where_and_no_others():
    assert list(PLACES) == [
        "data.root",
        "data.download",
        "data.workers",
        "teacher.checkpoint",
        "teacher.recipe.log_grad_norms",
        "student.checkpoint",
        "recipe.log_grad_norms",
        "sweep.autoscale_to",
        "sweep.start_timeout",
    ]
    assert placements(SweepConfig) == PLACES
    assert set(placements(TrialConfig)) == {*ELSEWHERE, *FILES}
    needed = {key for key, mark in placements(TrialConfig).items() if mark.must_exist}
    assert needed == {"data.root", "dataset_file", *FILES}


@pytest.mark.parametrize(("key", "value"), ELSEWHERE.items())
def test_a_trial_elsewhere_is_the_same_trial(key, value):
    dataset = load_dataset(SWEEP.data)
    there = moved(TRIAL, key, value)
    assert value_at(there.model_dump(mode="json"), key) == value
    assert what(there) == what(TRIAL)
    assert config_identity(there, dataset) == config_identity(TRIAL, dataset)
    assert read_as(there.data) == read_as(TRIAL.data)
    assert in_config(there.data, SWEEP.teacher.model, 0) == in_config(TRIAL.data, SWEEP.teacher.model, 0)


@pytest.mark.parametrize("key", [key for key, mark in PLACES.items() if not mark.has_content])
def test_a_sweep_elsewhere_is_the_same_sweep(key):
    content = SWEEP.model_dump(mode="json")
    value = (ELSEWHERE | OF_A_SWEEP)[key.removeprefix("teacher.")]  # a teacher's recipe has what a student's has
    there = moved(SWEEP, key, value).model_dump(mode="json")
    assert there != content
    assert config_digest(there) == config_digest(content)
    assert config_digest(there, version=2) != config_digest(content, version=2), "as that version took it"


def test_what_is_trained_is_another_trial():
    assert what(moved(TRIAL, "recipe.lr", 0.7)) != what(TRIAL)
    assert what(moved(TRIAL, "seed", 7)) != what(TRIAL)
    content = SWEEP.model_dump(mode="json")
    assert config_digest(moved(SWEEP, "recipe.lr", 0.7).model_dump(mode="json")) != config_digest(content)


def test_a_file_that_is_given_counts_as_given_wherever_it_lies(tmp_path: Path):
    content = SWEEP.model_dump(mode="json")
    given = [moved(SWEEP, "student.checkpoint", path).model_dump(mode="json") for path in ("a.pt", "b.pt")]
    assert config_digest(given[0]) == config_digest(given[1]) != config_digest(content)


def test_the_cut_leaves_the_rest_and_what_is_not_there():
    content = {"a": {"b": 1, "c": 2}, "d": None}
    assert without(content, ["a.b", "d.e", "x"]) == {"a": {"c": 2}, "d": None}
    assert content == {"a": {"b": 1, "c": 2}, "d": None}
    assert [value_at(content, key) for key in ("a.c", "d.e", "x.y")] == [2, None, None]


def test_marks_change_nothing_that_a_config_may_say():
    config = DataConfig.model_validate({"name": "digits", "workers": 0})
    assert dataset_info(config).num_classes == 10
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        DataConfig.model_validate({"name": "digits", "workers": -1})
