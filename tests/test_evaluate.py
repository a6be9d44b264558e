"""How good a network is on a split: networks whose logits are known."""

import math

import pytest
import torch

from tune_topkd.data import Split
from tune_topkd.evaluate import evaluate

BYTES = {"mean": (0.0,), "std": (1 / 255,)}
"""Constants that leave pixels as they are."""


class Ranks(torch.nn.Module):
    """Puts the class (first pixel) first, then the following ones in a circle of 8."""

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        return -((torch.arange(8) - images[:, 0, 0, :1].round()) % 8)


class Constant(torch.nn.Module):
    """The same logits of every image, those of the last one apart."""

    def __init__(self, logits, last):
        super().__init__()
        self.logits, self.last = torch.tensor(logits), torch.tensor(last)

    def forward(self, images):
        logits = self.logits.expand(len(images), -1).clone()
        logits[images[:, 0, 0, 0].round() == 9] = self.last
        return logits


def split_of(labels, last=9):
    """Black images of one pixel with these labels, the last one with another pixel."""
    images = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)
    images[-1] = last
    return Split(images, torch.tensor(labels))


def test_accuracy_is_the_percentage_of_labels_among_the_largest_logits():
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7] * 100)  # more than one batch
    split = Split(torch.zeros(800, 1, 1, 1, dtype=torch.uint8), labels)
    model = Ranks().train()
    found = evaluate(model, split, **BYTES)
    assert (found.top1, found.top5) == (12.5, 62.5)
    assert found.largest_logit == 7.0
    assert model.training


def test_a_model_stays_in_eval_mode():
    model = Ranks().eval()
    evaluate(model, split_of([0, 0]), **BYTES)
    assert not model.training


def test_five_classes_or_fewer_have_no_top5():
    found = evaluate(Constant([1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 1.0, 1.0, 1.0, 1.0]), split_of([4, 3, 0, 1]), **BYTES)
    assert (found.top1, found.top5) == (25.0, None)
    six = evaluate(Constant([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [9.0] + [0.0] * 5), split_of([5, 1, 0, 0]), **BYTES)
    assert (six.top1, six.top5) == (50.0, 75.0)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, -40.0])
def test_the_largest_magnitude_is_that_of_all_images(odd):
    largest = evaluate(Constant([1.0, -2.0], [0.5, odd]), split_of([0] * 1000), **BYTES).largest_logit
    assert largest == pytest.approx(abs(odd), nan_ok=True)
