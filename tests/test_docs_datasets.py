"""docs/datasets.md is true: its dataset passes the check, its section is a config's, and a student trains on it."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.config import RecipeConfig
from tune_topkd.config import TrialConfig
from tune_topkd.data import Source
from tune_topkd.data import missing_data
from tune_topkd.train import train

TEXT = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text()
MODULE, TEST = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
_FOLDER, SECTION = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the module and no data."""
    (tmp_path / "shapes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("shapes", None)


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 120), ("test", 30)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 120, (count, 16, 16, 3), dtype=np.uint8)
        images[np.arange(count), :, :, labels] += 130
        np.savez(folder / f"{part}.npz", images=images, labels=labels)


def test_the_dataset_is_read_and_trained_on(here):
    data = DataConfig.model_validate(yaml.safe_load(SECTION)["data"])
    assert missing_data(data) == f"put train and test.npz into {here / 'data' / 'shapes'}"
    write_images(here / "data" / "shapes")
    assert missing_data(data) is None
    student = ModelConfig(name="small_cnn", kwargs={"widths": [8]})
    torch.manual_seed(0)
    result = train(TrialConfig(data=data, student=student, method="ce", recipe=RecipeConfig(epochs=3, batch_size=16)))
    assert result.metrics["val_top1"] > 90


def test_the_test_that_it_shows_passes(here):
    write_images(here / "data" / "shapes")
    names: dict[str, object] = {}
    exec(TEST, names)
    names["test_shapes"]()


def test_every_method_is_in_its_table():
    told = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `")))
    methods = {name for name, value in vars(Source).items() if callable(value) and not name.startswith("_")}
    assert set(told) == methods
