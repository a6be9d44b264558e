"""`init`: a search space for somebody's own dataset and networks, that runs as it is written."""

import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tune_topkd.cli.app import main
from tune_topkd.config import ConfigError
from tune_topkd.config import load_config
from tune_topkd.data import DataError
from tune_topkd.data import DatasetInfo
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import drafting
from tune_topkd.sweep.drafting import draft

NETWORK = """
from torch import nn

def small(num_classes, width=4):
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), *pooled, nn.Linear(width, num_classes))
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder with images of three classes, a network's file and a teacher's weights."""
    drawn = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 10)):
        for channel, name in enumerate(("cat", "dog", "owl")):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = drawn.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 100  # a class is a colour
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "drafted_networks.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import drafted_networks

    torch.save(knowing(drafted_networks.small(3, width=3)).state_dict(), tmp_path / "teacher.pt")
    torch.save(drafted_networks.small(3, width=8).state_dict(), tmp_path / "wider.pt")
    yield tmp_path
    sys.modules.pop("drafted_networks", None)


def knowing(network):
    """The network with weights that tell the colours: each channel's mean is its class's logit."""
    convolution, head = network[0], network[-1]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for channel in range(3):
            convolution.weight[channel, channel] = 1.0
            head.weight[channel, channel] = 1.0
    return network


def said(monkeypatch, capfd, *words):
    monkeypatch.setattr(sys, "argv", ["launch.py", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capfd.readouterr().err


TEACHER = "drafted_networks:small"
OWN = ("--data", "photos", "--teacher", TEACHER, "--student", "drafted_networks:small")


@pytest.fixture
def begun(user, monkeypatch, capfd):
    """What is told as `init` writes a space from the user's folder, networks and checkpoint."""
    text = (user / "drafted_networks.py").read_text()
    (user / "drafted_networks.py").write_text(text + "\ndef taught(num_classes):\n    return small(num_classes, 3)\n")
    sys.modules.pop("drafted_networks")
    own = ("--data", "photos", "--teacher", "drafted_networks:taught", "--student", "drafted_networks:small")
    code, told = said(monkeypatch, capfd, "init", *own, "--checkpoint", "teacher.pt", "--epochs", "18")
    assert code == 0
    return told


def test_a_folder_a_network_and_a_checkpoint_become_a_space_that_runs(user, begun):
    told = begun
    assert "3 classes, 120 training images of 32 × 32 pixels, 30 images in the test set" in told
    assert "36 of the training images choose the trials: a point of top-1 is 0.4 of them" in told
    assert "can be the luck of 36 images" in told
    assert "write its data.mean and data.std into the file" in told
    assert "next: " in told
    config = load_config("space.yaml")
    assert (config.data.name, config.data.root) == ("image_folder", str(user / "photos"))
    assert config.teacher.checkpoint == str(user / "teacher.pt")
    assert (config.recipe.epochs, config.sweep.asha.grace_epochs, config.space["k"].high) == (18, 2, 2)
    sweep = Sweep.create("space.yaml", name="own", mlflow_uri="", address="local", overrides={"sweep.trials": 3})
    values = SimulatedExecutor(lambda trial, epoch: {"val_top1": 50.0 + epoch, "val_top1_ema": 50.0 + epoch})
    assert sweep.run(executor=values).reason == "finished"


def test_fewer_classes_than_topkds_default_k_have_no_baseline_that_can_only_fail(begun, monkeypatch, capfd):
    assert load_config("space.yaml").baselines.methods == ["ce", "kd"]
    of_ten = draft("digits", "digits_cnn", "digits_cnn_tiny")
    assert "\nbaselines: {methods: [ce, kd, defaults], trials: 6}" in of_ten.text
    code, told = said(monkeypatch, capfd, "check", "space.yaml", "--set", "baselines.methods=[ce, defaults]")
    assert code == 2
    words = "`defaults` trains with K = 5, which must be at most 3, the number of classes; take it out: ['ce']"
    assert words in told


@pytest.mark.parametrize(
    ("classes", "widest"), [(2, None), (3, 2), (4, 3), (5, 3), (8, 3), (9, 4), (41, 20), (1000, 20)]
)
def test_k_has_a_range_up_to_half_of_the_classes_and_of_two_classes_its_one_value(classes, widest):
    info = DatasetInfo(classes, (3, 32, 32))
    content = drafting._content({"name": "d"}, info, 18, 10, "t", "s", None)
    if widest is None:
        assert ("k" in content["space"], content["loss"]) == (False, {"k": 1})
    else:
        assert content["space"]["k"] == {"low": 1, "high": widest, "log": True}
        assert "loss" not in content


def test_a_teacher_needs_no_loss(begun, monkeypatch, capfd):
    code, told = said(monkeypatch, capfd, "teacher", "space.yaml", "--runs-dir", "runs")
    assert code == 0, told
    code, told = said(monkeypatch, capfd, "train", "space.yaml", "--runs-dir", "runs")
    assert (code, "k must be at most 3, the number of classes, but got 5" in told) == (2, True)


def test_without_a_checkpoint_the_teacher_is_trained_and_every_section_is_explained(user):
    found = draft("photos", TEACHER, "drafted_networks:small", image_size=128)
    config = yaml.safe_load(found.text)
    assert config["teacher"]["recipe"]["epochs"] == config["recipe"]["epochs"] == 100
    assert config["data"]["augment"] == {"crop_scale": [0.08, 1.0], "flip": True}, "as images of this size are"
    lines = found.text.splitlines()
    assert not any("mean" in note for note in found.notes)
    for section in ("data:", "teacher:", "student:", "recipe:", "space:", "relative:", "sweep:", "baselines:"):
        (place,) = [n for n, line in enumerate(lines) if line.startswith(section)]
        assert lines[place - 1].startswith("# "), section


def test_a_small_set_has_steps_enough_before_a_training_counts_as_collapsed(user):
    short = draft("photos", TEACHER, TEACHER, epochs=18)  # of 84 images, one batch
    assert "collapse_epochs" not in yaml.safe_load(short.text)["sweep"]
    assert any("a full training has 18 steps of 64 images" in note for note in short.notes)
    assert any("most need some thousands" in note for note in short.notes)
    long = draft("photos", TEACHER, TEACHER, epochs=600)
    assert yaml.safe_load(long.text)["sweep"]["collapse_epochs"] == 200
    assert ["collapse_epochs is ended" in found.text for found in (short, long)] == [False, True]
    assert not any("steps" in note for note in long.notes)


def test_a_draft_says_what_images_a_checkpoint_needs(user):
    assert "# normalised as in its own training: `data.mean` and `data.std`" in draft("photos", TEACHER, TEACHER).text


def test_a_named_dataset_has_its_validation_split_made_large_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # of something else: the name of a dataset is one
    found = draft("digits", "digits_cnn", "digits_cnn_tiny")
    config = yaml.safe_load(found.text)
    assert config["data"] == {"name": "digits", "val_fraction": 0.3, "augment": {"pad": 1, "flip": True}}
    assert config["space"]["k"] == {"low": 1, "high": 4, "log": True}
    assert "539 of the training images choose" in found.lines[1]
    monkeypatch.setattr(drafting, "GOOD_VALIDATION", 200)
    enough = draft("digits", "digits_cnn", "digits_cnn_tiny", epochs=9)
    assert yaml.safe_load(enough.text)["data"]["val_fraction"] == 0.12
    assert not any("luck" in note for note in enough.notes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": "fotos"}, r"--data: fotos: is no folder, and no dataset: .*digits.*package\.module:source"),
        ({"teacher": "drafted_networks:larger"}, "larger"),
        ({"student": "resnet9"}, r"student.*resnet9.*did you mean"),
        ({"checkpoint": "gone.pt"}, "gone.pt"),
        ({"checkpoint": "wider.pt"}, r"teacher\.checkpoint"),
        ({"root": "elsewhere"}, "not beside a folder of images"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_what_does_not_fit_is_one_error_and_nothing_is_written(user, change, told):
    given = {"data": "photos", "teacher": TEACHER, "student": TEACHER} | change
    with pytest.raises((ConfigError, DataError), match=told):
        draft(given.pop("data"), given.pop("teacher"), given.pop("student"), **given)


def test_a_file_that_is_there_is_not_written_over(user, monkeypatch, capfd):
    (user / "space.yaml").write_text("mine")
    code, told = said(monkeypatch, capfd, "init", *OWN)
    assert (code, (user / "space.yaml").read_text()) == (2, "mine")
    assert told == "error: --output: space.yaml: is there already; nothing is written over it\n"
