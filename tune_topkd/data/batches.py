"""Batches of a split on its device: shuffled and augmented for training, in order and plain for evaluation."""

import dataclasses
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tune_topkd.config import AugmentConfig
from tune_topkd.config import TrialConfig
from tune_topkd.data.randomness import ORDER
from tune_topkd.data.randomness import random_order
from tune_topkd.data.splits import AnySplit
from tune_topkd.data.splits import Dataset
from tune_topkd.data.splits import FileSplit
from tune_topkd.data.splits import Split
from tune_topkd.data.views import goes_by_batch
from tune_topkd.data.views import numbered_views
from tune_topkd.data.views import resized
from tune_topkd.data.views import view
from tune_topkd.data.views import views_of

CHUNK_BYTES = 2**24
"""Size of the float images that are prepared at once: with small images, the calls for one batch cost more than the
work on it. Chunks that are larger than what the allocator reuses take twice as long."""

EVAL_BATCH = 512
"""Images per batch of an evaluation, fewer where their float pixels would exceed `EVAL_BYTES`."""
EVAL_BYTES = 2**26
"""The largest size of a batch of an evaluation, unless a single image exceeds it."""


class Batch(NamedTuple):
    """Normalised images `(B, C, H, W)` float32, labels `(B,)` int64, and the images' indices in the split `(B,)`
    int64."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class Part(NamedTuple):
    """Which of the equal parts of each batch a process makes, where several train together."""

    number: int = 0
    """From 0, in the order of the batch."""
    parts: int = 1

    def size(self, batch_size: int) -> int:
        """Images of a part.

        Raises:
            ValueError: the batch cannot be divided so.
        """
        if batch_size % self.parts:
            raise ValueError(f"a batch of {batch_size} images cannot be divided into {self.parts} equal parts")
        return batch_size // self.parts


WHOLE = Part()
"""The whole batch."""


def train_batches(
    split: AnySplit,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: AugmentConfig,
    mean: Sequence[float],
    std: Sequence[float],
    part: Part = WHOLE,
) -> Iterator[Batch]:
    """The batches of one epoch, shuffled and augmented, on the device of `split`.

    Every batch has `batch_size` images. The last images of the order, too few for a batch, are left out, other ones in
    each epoch: the contrastive loss and batch norm depend on the batch size, and a batch of one image has neither
    contrast nor variance. A split smaller than a batch is one batch.

    Args:
        split: what to train on.
        batch_size: images per batch.
        seed: order and views are functions of it and of `epoch`.
        epoch: absolute, from 1.
        augment: how views are made.
        mean: per channel, with pixels from 0 to 1.
        std: likewise.
        part: of each batch; the parts make up the batch, view for view.

    Raises:
        DataError: an image file cannot be decoded, or has another size than the others; it is named.
        ValueError: a batch cannot be divided into such parts.
    """
    order = epoch_order(split, batch_size=batch_size, seed=seed, epoch=epoch, part=part)
    batch_size = part.size(batch_size)
    normalise = _normaliser(mean, std, split.device)
    if isinstance(split, FileSplit) or not goes_by_batch(augment):
        batches = torch.split(order, batch_size)
        made = views_of(split, batches, augment=augment, seed=seed, epoch=epoch)
        side = view_side(split)
        for indices, (images, kept) in zip(batches, made, strict=True):
            pixels = normalise(resized(images.to(split.device, non_blocking=True), side))
            if kept is not None:
                pixels.masked_fill_(~kept.to(split.device, non_blocking=True), 0.0)
            yield Batch(pixels, split.labels[indices], indices)
        return
    batches_at_once = max(1, CHUNK_BYTES // (batch_size * _image_bytes(split)))
    for indices in torch.split(order, batch_size * batches_at_once):
        views = view(split.images, indices, augment=augment, seed=seed, epoch=epoch, image_size=split.image_size)
        parts = (normalise(views), split.labels[indices], indices)
        yield from map(Batch, *(torch.split(part, batch_size) for part in parts))


def batches_of(
    config: TrialConfig, dataset: Dataset, split: AnySplit, epoch: int, part: Part = WHOLE
) -> Iterator[Batch]:
    """The batches of one epoch of a training: `train_batches` with the values of its config.

    Args:
        config: the training's.
        dataset: its dataset.
        split: the training split, on the device of the batches.
        epoch: absolute, from 1.
        part: of each batch.

    Raises:
        DataError: as `train_batches`.
        ValueError: likewise.
    """
    return train_batches(
        split,
        batch_size=config.recipe.batch_size,
        seed=config.seed,
        epoch=epoch,
        augment=config.data.augment,
        mean=dataset.mean,
        std=dataset.std,
        part=part,
    )


def epoch_order(split: AnySplit, *, batch_size: int, seed: int, epoch: int, part: Part = WHOLE) -> Tensor:
    """The indices of an epoch's images in the order of its batches, `(n,)` int64 on the device of `split`.

    Args:
        split: of which.
        batch_size: images of a whole batch.
        seed: the order is a function of it and of `epoch`.
        epoch: absolute, from 1.
        part: of each batch.

    Raises:
        ValueError: a batch cannot be divided into such parts.
    """
    order = random_order(len(split), seed, epoch, ORDER, split.device)
    order = order[: len(split) - len(split) % batch_size or len(split)]
    if part == WHOLE:
        return order
    size = part.size(min(batch_size, len(order)))
    return order.view(-1, part.parts, size)[:, part.number].flatten()


def plain_images(split: AnySplit, indices: Tensor) -> Tensor:
    """Some images as they are stored, those of files decoded: `(B, C, H, W)` uint8 on the device of `split`.

    Args:
        split: of which.
        indices: which images, `(B,)` int64 on the CPU.

    Raises:
        DataError: as `train_batches`.
    """
    if isinstance(split, Split):
        return split.images[indices.to(split.device)]
    ((images, _),) = views_of(dataclasses.replace(split, workers=0), [indices])
    return images.to(split.device)


def view_side(split: AnySplit) -> int | None:
    """The side that the views of a split are resized to; None where they have it."""
    return split.image_size if isinstance(split, Split) else None


def normalised_views(
    images: Tensor,
    numbers: Tensor,
    *,
    augment: AugmentConfig,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | None = None,
) -> Tensor:
    """Numbered views of images as `train_batches` shows them.

    Args:
        images: `(B, C, H, W)` uint8.
        numbers: of the views, `(B,)` int64 on the images' device.
        augment: with countable views.
        mean: per channel, with pixels from 0 to 1.
        std: likewise.
        image_size: side that the views are resized to; by default the images' own.

    Returns:
        `(B, C, H, W)` float32, normalised.
    """
    views = resized(numbered_views(images, numbers, augment), image_size)
    return _normaliser(mean, std, images.device)(views)


def eval_batches(
    split: AnySplit, *, mean: Sequence[float], std: Sequence[float], batch_size: int | None = None
) -> Iterator[Batch]:
    """All images of a split in their order, normalised and not augmented, on its device; the last batch may be smaller.

    An image file that has not the split's size is resized until its shorter side is 8/7 of it, and its centre is
    cropped, as 256 and 224 are usual.

    Args:
        split: of which.
        mean: per channel, with pixels from 0 to 1.
        std: likewise.
        batch_size: images per batch; by default `EVAL_BATCH`, fewer of large images.

    Raises:
        DataError: as `train_batches`.
    """
    normalise = _normaliser(mean, std, split.device)
    size = batch_size or min(EVAL_BATCH, max(1, EVAL_BYTES // _image_bytes(split)))
    for images, indices in raw_batches(split, size):
        yield Batch(normalise(images), split.labels[indices], indices)


def raw_batches(split: AnySplit, batch_size: int = EVAL_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of `eval_batches` as `(B, C, H, W)` uint8, and their indices."""
    batches = torch.split(torch.arange(len(split), device=split.device), batch_size)
    if isinstance(split, FileSplit):
        for indices, (images, _) in zip(batches, views_of(split, batches), strict=True):
            yield images.to(split.device, non_blocking=True), indices
    else:
        for images, indices in zip(torch.split(split.images, batch_size), batches, strict=True):
            yield resized(images, split.image_size), indices


def _image_bytes(split: AnySplit) -> int:
    channels, height, width = split.batch_shape
    return 4 * channels * height * width


def _normaliser(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    shift, scale = (255 * torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
    return lambda images: images.to(torch.float32).sub_(shift).div_(scale)
