"""docs/losses.md is true: its loss is what it says, its space passes the check, and a student learns by it."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional

from tune_topkd.config import ConfigError
from tune_topkd.loss import build_loss
from tune_topkd.loss import loss_parameters
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import preflight
from tune_topkd.sweep.callbacks import SILENT
from tune_topkd.sweep.single import train_one

TEXT = (Path(__file__).parents[1] / "docs" / "losses.md").read_text()
LOSS, RULE = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
SPACE, CHOSEN = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the module and the space."""
    (tmp_path / "soft_margin.py").write_text(LOSS)
    (tmp_path / "halving_rule.py").write_text(RULE)
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("soft_margin", None)
    sys.modules.pop("halving_rule", None)


def test_its_parameters_are_those_after_the_star(here):
    assert loss_parameters("soft_margin:loss") == {"pull": 1.0, "margin": 0.5}


def test_it_is_called_as_it_says(here):
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.25, 2.0]])
    value = build_loss("soft_margin:loss", {"pull": 2.0, "margin": 0.5})(student, teacher, torch.tensor([0]))
    assert value.item() == pytest.approx(functional.cross_entropy(student, torch.tensor([0])).item() + 2.0 * 1.5 / 2)


@pytest.mark.parametrize(("method", "prefix"), [("soft_margin:loss", ""), ("soft_margin:loss+topkd", "base_")])
def test_its_space_passes_the_check(here, method, prefix):
    raw = yaml.safe_load(SPACE) | {"method": method, "loss": {f"{prefix}margin": 0.25}}
    raw["space"][f"{prefix}pull"] = raw["space"].pop("pull")
    assert set(preflight.load_checked(raw).config.space) == {f"{prefix}pull", "lr"}
    with pytest.raises(ConfigError, match=rf"space\.{prefix}pul: .*did you mean '{prefix}pull'"):
        preflight.load_checked(raw | {"space": {f"{prefix}pul": {"low": 0.1, "high": 1.0}}})


def test_a_student_learns_by_it(here, monkeypatch):
    monkeypatch.setattr("tune_topkd.tracking.log_training", lambda *_, **__: "")
    raw = yaml.safe_load(SPACE)
    raw["teacher"] = {"name": "digits_linear", "recipe": {"epochs": 1}}
    raw["recipe"] = {"epochs": 2}
    (here / "short.yaml").write_text(yaml.safe_dump({key: raw[key] for key in raw if key != "space"}))
    config = preflight.load_checked_pair("short.yaml")
    said = train_one(config, "short", 0, Workspace(here / "runs", mlflow_uri=""), SILENT)
    assert said["epochs"] == 2
    assert not said["diverged"]


def test_its_rule_passes_the_check_and_is_what_it_says(here):
    chosen = yaml.safe_load(CHOSEN)["loss"]
    raw = yaml.safe_load(SPACE) | {"method": "topkd", "space": {"k": {"low": 1, "high": 5}}}
    for rule in (chosen, {"scaling_rule": "halving_rule:rule"}):
        assert preflight.load_checked(raw | {"loss": rule}).config.loss == rule
    found = importlib.import_module("halving_rule").rule
    teacher, order = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[0, 1, 2]])
    weights, shift = found(teacher, order, scale_top=3.0, scale_last=1.0, shift=0.5)
    assert (weights.tolist(), shift.tolist()) == ([3.0, 2.0, 1.5], [[0.5]])
