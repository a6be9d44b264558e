"""How good a network is on a split of a dataset: one function, for students and teachers alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

import torch
from torch import nn

from tune_topkd.data import AnySplit
from tune_topkd.data import eval_batches


@dataclass(frozen=True)
class Evaluation:
    """What was found of a network on a split."""

    top1: float
    """Percent of the images whose label has the largest logit."""
    top5: float | None
    """Percent of the images with the label among the five largest logits; None of five classes or fewer."""
    largest_logit: float
    """The largest magnitude of all logits; NaN if one of them is."""
    hits: torch.Tensor | None = field(default=None, repr=False, compare=False)
    """`(N,)` bool on the split's device: of which images the label has the largest logit, in the order of the split."""


def evaluate(model: nn.Module, split: AnySplit, *, mean: Sequence[float], std: Sequence[float]) -> Evaluation:
    """Show a network all images of a split, normalised and not augmented, in eval mode and without gradients.

    A GPU is waited for once, at the end. The model is left in the mode it was in.

    Args:
        model: takes `(B, C, H, W)` float32 and gives logits `(B, classes)`.
        split: at least one image, on the model's device.
        mean: per channel, with pixels from 0 to 1.
        std: likewise.

    Raises:
        DataError: as `eval_batches`.
    """
    was_training = model.training
    model.eval()
    hits = torch.zeros(2, dtype=torch.int64, device=split.device)
    largest = torch.zeros((), device=split.device)
    classes, firsts = 0, []
    with torch.no_grad():
        for batch in eval_batches(split, mean=mean, std=std):
            logits = model(batch.images)
            classes = logits.shape[1]
            hit = logits.topk(min(5, classes)).indices == batch.labels[:, None]
            hits += torch.stack([hit[:, 0].sum(), hit.sum()])
            firsts.append(hit[:, 0])
            largest = torch.maximum(largest, logits.abs().max())  # NaN stays NaN
    model.train(was_training)
    first, first_five, largest_logit = torch.cat([hits.double(), largest.double()[None]]).tolist()
    top1, top5 = (100 * count / len(split) for count in (first, first_five))
    return Evaluation(top1, top5 if classes > 5 else None, largest_logit, torch.cat(firsts))
