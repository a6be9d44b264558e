"""The rendered dataset: what is promised of its images, and that they can be told apart."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont

from tune_topkd.config import DataConfig
from tune_topkd.data import dataset_info
from tune_topkd.data import load_dataset
from tune_topkd.data.glyphs import CHARACTERS
from tune_topkd.data.glyphs import FONTS
from tune_topkd.data.glyphs import load
from tune_topkd.data.glyphs import render


def test_there_are_a_hundred_characters_and_every_font_has_each():
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 100
    for font in FONTS:
        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
        assert set(map(ord, CHARACTERS)) <= TTFont(path).getBestCmap().keys(), font


def test_images_are_a_function_of_seed_part_and_index():
    (images, labels), (test_images, test_labels) = load(train_images=130, test_images=100, seed=4)
    assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (130, 3, 32, 32), torch.int64)
    assert labels.tolist() == [n % 100 for n in range(130)]
    assert test_labels.bincount().tolist() == [1] * 100
    np.testing.assert_array_equal(images[117].permute(1, 2, 0).numpy(), render(117, seed=4))
    (more, _), _ = load(train_images=150, test_images=100, seed=4)
    assert torch.equal(more[:130], images), "a larger set begins with the smaller one"
    assert not torch.equal(images[:100], test_images)
    assert not torch.equal(images[0], images[100]), "two images of a class"
    (other, _), _ = load(train_images=100, test_images=100, seed=5)
    assert not torch.equal(other, images[:100])


def test_every_image_shows_something_that_differs_from_its_background():
    for index in range(100):
        image = render(index, seed=0).astype(float)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert image[8:24, 8:24].max() > np.median(border) + 25, CHARACTERS[index]


def test_classes_can_be_told_apart_without_colour_or_noise():
    """The nearest class mean of cleaned images is right far more often than one time in a hundred."""
    (images, labels), (test_images, test_labels) = load(train_images=1000, test_images=300)

    def features(of):
        grey = torch.nn.functional.avg_pool2d(of.float().mean(1, keepdim=True), 3, 2, 1).flatten(1)
        grey = grey - grey.mean(1, keepdim=True)
        return grey / grey.norm(dim=1, keepdim=True)

    means = torch.stack([features(images[labels == label]).mean(0) for label in range(100)])
    nearest = (features(test_images) @ means.T).argmax(1)
    assert (nearest == test_labels).float().mean() > 0.06


def test_the_dataset_has_a_test_part_of_its_own_and_its_arguments_are_checked():
    config = DataConfig(name="glyphs", kwargs={"train_images": 600, "test_images": 200}, val_fraction=0.5)
    assert dataset_info(config).image_shape == (3, 32, 32)
    dataset = load_dataset(config)
    assert (len(dataset.train), len(dataset.val), len(dataset.test), dataset.num_classes) == (300, 300, 200, 100)
    for kwargs, told in (
        ({"train_images": 99}, "train_images must be a whole number of at least 100, but got 99"),
        ({"test_images": 1e3}, r"test_images must be .* but got 1000\.0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, but got -1"),
        ({"images": 200}, "images: unknown; did you mean 't"),
    ):
        with pytest.raises(ValueError, match=told):
            load_dataset(config.model_copy(update={"kwargs": kwargs}))
