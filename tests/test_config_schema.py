"""The JSON Schema of search spaces: it takes what `load_config` takes, and tells of every key what it means."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from tune_topkd.config import SweepConfig
from tune_topkd.config import json_schema
from tune_topkd.config.files import _parsed
from tune_topkd.config.schema import BARE_FORMS

ROOT = Path(__file__).parents[1]
SPACES = sorted(ROOT.glob("search_spaces/**/*.yaml"))
CHECKER = Draft202012Validator(json_schema())


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_it_takes_every_search_space_and_every_parent(path):
    assert list(CHECKER.iter_errors(_parsed(path.read_text()))) == []


@pytest.mark.parametrize(
    "text",
    [
        "recpie: {epochs: 3}",
        "recipe: {epoch: 3}",
        "recipe: {lr: fast}",
        "recipe: {schedule: linear}",
        "data: {val_fraction: 1.5}",
        "method: topk",
        "space: {k: 5}",
        "space: {lr: {lower: 0.1}}",
        "sweep: {finalists: {seeds: 1}}",
    ],
)
def test_it_marks_what_is_no_key_or_no_value(text):
    assert list(CHECKER.iter_errors(_parsed(text)))


@pytest.mark.parametrize(
    "text",
    [
        "student: resnet20",
        "sweep: {sampler: gp, scheduler: asha, plateau: 1.0}",
        "sweep: {sampler: {name: 'nearby:Nearby', keep: 0.5}}",
        "space: {k: [1, 5], lr: null}",
        "loss: {shift: null}",
        "method: soft_margin:loss+topkd",
        "extends: [bases/topkd.yaml, bases/cifar100.yaml]",
        "sweep: {asha: null, cpus_per_trial: auto}",
    ],
)
def test_it_takes_the_short_forms(text):
    assert list(CHECKER.iter_errors(_parsed(text))) == []


def test_each_bare_form_is_of_a_section_that_takes_it():
    example = {"string": "tpe", "number": 1.0, "array": ["a", "b"]}
    for model, form in BARE_FORMS.items():
        value = "asha" if model.__name__ == "SchedulerConfig" else example[form.get("type", "string")]
        model.model_validate(value)


def test_every_key_says_what_it_means():
    for name, section in json_schema()["$defs"].items():
        for form in section.get("anyOf", [section]):
            for key, value in form.get("properties", {}).items():
                assert value.get("description"), f"{name}.{key}: write a docstring below the field"
    for key, field in SweepConfig.model_fields.items():
        assert field.description, f"{key}: write a docstring below the field"


def test_the_command_writes_it(tmp_path):
    path = tmp_path / "space.schema.json"
    subprocess.run([sys.executable, ROOT / "launch.py", "schema", "-o", path], cwd=tmp_path, check=True)
    assert json.loads(path.read_text()) == json_schema()
