"""How much a confirmed answer's figures depend on which images the test set happens to have."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tune_topkd.ledger import Finalist
from tune_topkd.ledger import TrialKey
from tune_topkd.verdict import Verdict

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImageSpread:
    """Standard errors over test images, in points; those over seeds are apart from them."""

    images: int
    answer: float
    """Of the answer's mean over seeds."""
    gains: dict[TrialKey, float]
    """Of the gain over each baseline, by its trial."""

    def sentence(self, verdict: Verdict) -> str:
        """In words."""
        named = [(base.name, self.gains.get(base.record.key)) for base in verdict.baselines]
        each = "".join(f", of the gain over {name} {error:.2f}" for name, error in named if error is not None)
        return (
            f"over test images, of which there are {self.images:,}, the standard error of the answer is {self.answer:.2f} "
            f"points{each}; the intervals are over seeds, for these images"
        )


def image_spread(folder: Path, verdict: Verdict) -> ImageSpread | None:
    """By what the trainings' last checkpoints have of each test image; none where one of them is gone.

    It is the standard error of a mean over images of what each image adds to it: 100 or 0 a training, averaged over seeds;
    to a gain the difference of two of these. A bootstrap over images tends to the same.

    Args:
        folder: the sweep's.
        verdict: of its newest look, done.
    """
    import torch

    answer = _hits(folder, verdict.answer.finalist)
    if not answer:
        return None
    gains = {}
    for base in verdict.baselines:
        hits = _hits(folder, base.finalist)
        if common := sorted(answer.keys() & hits.keys()):
            gains[base.record.key] = _error(torch.stack([answer[seed] - hits[seed] for seed in common]))
    of_answer = torch.stack(list(answer.values()))
    return ImageSpread(of_answer.shape[1], _error(of_answer), gains)


def _error(values: "Tensor") -> float:
    """The standard error over images of `(seeds, images)` float64."""
    by_image = values.mean(0)
    return float(by_image.std()) / math.sqrt(len(by_image))


def _hits(folder: Path, finalist: Finalist) -> "dict[int, Tensor]":
    """By seed, 100 for each test image that the training is right about, else 0; empty if one of them has left nothing."""
    from tune_topkd.execution.checkpoints import newest_checkpoint
    from tune_topkd.execution.remote import bring_checkpoints
    from tune_topkd.train.checkpoint import HITS_KEY
    from tune_topkd.train.checkpoint import CheckpointError
    from tune_topkd.train.checkpoint import load_checkpoint

    found = {}
    bring_checkpoints(folder, [str(finalist.repeats[seed].key) for seed in finalist.values])
    for seed in finalist.values:
        checkpoint = newest_checkpoint(folder / "trials" / str(finalist.repeats[seed].key))
        try:
            content = {} if checkpoint is None else load_checkpoint(checkpoint)
        except CheckpointError:
            content = {}
        if HITS_KEY not in content:
            return {}
        found[seed] = 100.0 * content[HITS_KEY].double()
    return found
