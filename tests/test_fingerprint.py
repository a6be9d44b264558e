"""The fingerprint of a network: what changes it, and what does not."""

import importlib
import random

import pytest
import torch

from tune_topkd.config import ModelConfig
from tune_topkd.models import network_fingerprint

SHAPE = (3, 16, 16)

NET = '''
"""Networks."""

import torch
from torch import nn


class Net(nn.Module):
    """A network."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, momentum=0.1, eps=1e-5)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        features = torch.relu(self.norm(self.conv(images)))
        return self.head(self.drop(features.mean((2, 3))))
'''


@pytest.fixture
def fingerprint_of(tmp_path, monkeypatch):
    """The fingerprint of a network whose code is that of `NET` with a text replaced."""
    monkeypatch.syspath_prepend(tmp_path)

    def fingerprint(old="", new="", kwargs=None):
        assert old in NET
        name = f"net_{random.getrandbits(60):x}"
        (tmp_path / f"{name}.py").write_text(NET.replace(old, new))
        importlib.invalidate_caches()
        config = ModelConfig(name=f"{name}:Net", **(kwargs or {}))
        return network_fingerprint(config, num_classes=5, image_shape=SHAPE)

    return fingerprint


def test_the_same_network_has_the_same_fingerprint_whatever_else_there_is(fingerprint_of):
    first = fingerprint_of("A network.", "The same network with other words about it.")
    assert len(bytes.fromhex(first)) == 8
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.manual_seed(99)
        torch.set_num_threads(2)
        before = torch.get_rng_state()
        assert fingerprint_of() == first
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.relu", "torch.nn.functional.gelu"),
        ("nn.Conv2d(3, 8, 3, padding=1)", "nn.Conv2d(3, 8, 5, padding=2)"),
        ("nn.Conv2d(3, 8, 3, padding=1)", "nn.Conv2d(3, 8, 3, padding=1, padding_mode='reflect')"),
        ("features.mean((2, 3))", "features.amax((2, 3))"),
        ("self.norm(self.conv(images))", "self.conv(images)"),
        ("eps=1e-5", "eps=1e-3"),
        ("momentum=0.1", "momentum=0.2"),
        ("nn.Dropout(0.1)", "nn.Dropout(0.5)"),
        ("self.head =", "self.classifier = self.head ="),
        ("return self.head", "return -self.head"),
        ("return self.head", "return 30 * self.head"),
    ],
)
def test_edited_code_has_another_fingerprint(fingerprint_of, old, new):
    assert fingerprint_of(old, new) != fingerprint_of()


def test_the_config_counts_as_far_as_it_changes_the_network(fingerprint_of):
    assert fingerprint_of(kwargs={"image_size": 16}) == fingerprint_of()
    assert fingerprint_of(kwargs={"image_size": 8}) != fingerprint_of()


def test_features_beside_the_logits_do_not_count(fingerprint_of):
    both = fingerprint_of(
        "return self.head(self.drop(features.mean((2, 3))))",
        "return self.head(self.drop(features.mean((2, 3)))), {'feats': features}",
    )
    assert both == fingerprint_of()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.conv(images)", "self.conv(images.float()).float()"),  # float32 meets weights in float64
        ("self.conv(images)", "torch.matmul(self.conv(images), torch.eye(16))"),
        ("self.drop(features", "self.drop(torch.dropout(features, 0.5, True)"),  # drops in eval mode too
    ],
)
def test_what_knows_float32_alone_or_is_random_has_a_fingerprint_too(fingerprint_of, old, new):
    first = fingerprint_of(old, new)
    torch.rand(7)
    assert fingerprint_of(old, new) == first != fingerprint_of()


def test_what_takes_no_such_images_is_told(fingerprint_of):
    with pytest.raises(ValueError, match=r"Net takes no images of the shape \(3, 16, 16\): "):
        fingerprint_of("nn.Conv2d(3", "nn.Conv2d(1")


def test_no_two_networks_of_the_zoo_have_the_same():
    names = ["resnet8", "resnet14", "resnet8x4", "wrn_16_1", "vgg8", "ShuffleV2", "small_cnn"]
    found = [network_fingerprint(ModelConfig(name=n), num_classes=10, image_shape=(3, 32, 32)) for n in names]
    assert len(set(found)) == len(names)
