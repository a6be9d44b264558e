"""Datasets by name, their splits, and batches of them on the device.

Images stay uint8 where the split lies (in the GPU's memory, if that is where it was moved) and are normalised batch by
batch. All randomness is a counter-based hash in integer arithmetic, not a generator with a state: the order of an epoch
depends on nothing but (seed, epoch) and the view of an image on nothing but (seed, epoch, index), so that it is the
same on every device and for every batch size, and a resumed or repeated epoch is the same epoch.
"""

import functools
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

from tune_topkd.config import AugmentConfig
from tune_topkd.config import DataConfig
from tune_topkd.config import unknown_choice


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset without loading it; `image_shape` is (channels, height, width)."""

    num_classes: int
    image_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Split:
    """Images `(N, C, H, W)` uint8 and labels `(N,)` int64, on one device. Shared: not to be written to."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits; `mean` and `std` are per channel of the training split, with pixels from 0 to 1."""

    train: Split
    val: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Batch(NamedTuple):
    """Normalised images `(B, C, H, W)` float32, labels `(B,)` int64, and the images' indices in the split `(B,)` int64."""

    images: Tensor
    labels: Tensor
    indices: Tensor


# --- datasets -------------------------------------------------------------------------------------------------------


def dataset_names() -> list[str]:
    """The names `load_dataset` knows."""
    return sorted(_SOURCES)


def dataset_info(name: str) -> DatasetInfo:
    """Class count and image shape of a dataset; loads nothing.

    Raises:
        ValueError: an unknown name.
    """
    return _source(name).info


def load_dataset(config: DataConfig) -> Dataset:
    """The dataset of a config, on the CPU, split as it says; kept in memory for the next call.

    Raises:
        ValueError: an unknown name, or fractions that leave a split without an image of some class.
    """
    return _loaded(config.name, config.val_fraction, config.test_fraction, config.split_seed)


@functools.lru_cache(maxsize=2)  # the trials of a sweep share a process and a dataset
def _loaded(name: str, val_fraction: float, test_fraction: float, split_seed: int) -> Dataset:
    source = _source(name)
    whole = source.load()
    parts = _stratified(whole.labels, (val_fraction, test_fraction), split_seed)
    val, test, train = (Split(whole.images[part], whole.labels[part]) for part in parts)
    for kind, split in {"training": train, "validation": val, "test": test}.items():
        if len(torch.unique(split.labels)) < source.info.num_classes:
            raise ValueError(
                f"dataset {name!r}: val_fraction = {val_fraction:g} and test_fraction = {test_fraction:g} leave "
                f"the {kind} split without an image of some class"
            )
    mean, std = _channel_statistics(train.images)
    return Dataset(train=train, val=val, test=test, num_classes=source.info.num_classes, mean=mean, std=std)


@dataclass(frozen=True)
class _Source:
    info: DatasetInfo
    load: Callable[[], Split]


def _source(name: str) -> _Source:
    if name not in _SOURCES:
        raise ValueError(f"unknown dataset {name!r}; {unknown_choice(name, _SOURCES)}")
    return _SOURCES[name]


def _load_digits() -> Split:
    from sklearn.datasets import load_digits  # imported here: slow, and only this dataset needs it

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)
    return Split(images[:, None].contiguous(), torch.from_numpy(bunch.target).long())


_SOURCES = {"digits": _Source(DatasetInfo(num_classes=10, image_shape=(1, 8, 8)), _load_digits)}


def _stratified(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Indices of each fraction, then of what is left; of every class each part gets its share, to the nearest image."""
    shuffled = _random_order(len(labels), seed, 0, _SPLIT, labels.device)
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for label in torch.unique(labels).tolist():
        members = shuffled[labels[shuffled] == label]
        ends = [round(math.fsum(fractions[: i + 1]) * len(members)) for i in range(len(fractions))]
        for part, piece in zip(parts, members.tensor_split(ends), strict=True):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    return tuple(pixels.mean(1).tolist()), tuple(pixels.std(1, correction=0).tolist())


# --- batches --------------------------------------------------------------------------------------------------------

_CHUNK_BYTES = 2**26
"""Size of the float images that are prepared at once: on small images a call per batch costs more than its work."""


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: AugmentConfig,
    mean: Sequence[float],
    std: Sequence[float],
) -> Iterator[Batch]:
    """The batches of one epoch, shuffled and augmented, on the device of `split`.

    Every batch has `batch_size` images; the rest of the epoch's order, fewer than that, is left out: the contrastive
    loss and batch norm depend on the batch size, and a last batch of one would have no contrast and no variance. The
    images left out are others in each epoch. A split smaller than a batch is one batch.

    Args:
        split: what to train on.
        batch_size: images per batch.
        seed: with `epoch`, all that the order and the views depend on.
        epoch: absolute, from 1.
        augment: how views are made.
        mean: per channel, with pixels from 0 to 1.
        std: likewise.
    """
    order = _random_order(len(split), seed, epoch, _ORDER, split.labels.device)
    used = len(split) - len(split) % batch_size or len(split)
    batches_at_once = max(1, _CHUNK_BYTES // (batch_size * 4 * split.images[0].numel()))
    normalise = _normaliser(mean, std, split.images.device)
    for indices in torch.split(order[:used], batch_size * batches_at_once):
        images = normalise(view(split.images, indices, augment=augment, seed=seed, epoch=epoch))
        parts = (images, split.labels[indices], indices)
        yield from map(Batch, *(torch.split(part, batch_size) for part in parts))


def eval_batches(
    split: Split, *, mean: Sequence[float], std: Sequence[float], batch_size: int = 512
) -> Iterator[Batch]:
    """All images in their order, as they are but normalised, on the device of `split`; the last batch may be smaller."""
    normalise = _normaliser(mean, std, split.images.device)
    indices = torch.arange(len(split), device=split.labels.device)
    for images, *rest in zip(
        *(torch.split(part, batch_size) for part in (split.images, split.labels, indices)), strict=True
    ):
        yield Batch(normalise(images), *rest)


def view(images: Tensor, indices: Tensor, *, augment: AugmentConfig, seed: int, epoch: int) -> Tensor:
    """The random views of some images in one epoch: each a function of (seed, epoch, index) alone.

    Args:
        images: all images of the split, `(N, C, H, W)` uint8.
        indices: which of them, `(B,)` int64.
        augment: zero-pad on all sides by `pad`, crop back at a random offset, then flip left to right or not.
        seed: of the training.
        epoch: absolute, from 1.

    Returns:
        `(B, C, H, W)` uint8.
    """
    picked = images[indices]
    if not augment.pad and not augment.flip:
        return picked
    channels, height, width = picked.shape[1:]
    bits = _random_bits(indices, seed, epoch, _VIEW)
    offsets = 2 * augment.pad + 1
    top, left = (((bits >> shift & _DRAW) * offsets >> _DRAW_BITS)[:, None] for shift in (0, _DRAW_BITS))
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    if augment.flip:
        flipped = (bits >> 2 * _DRAW_BITS & 1).bool()[:, None]
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = functional.pad(picked, (augment.pad,) * 4)
    cropped = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
    return cropped.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


def count_hits(model: nn.Module, split: Split, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """How many images have their label first, and among the first five, of the model's logits: `(2,)` int64.

    The model and the split are on one device, on which the result stays: no wait for the GPU. With five classes or
    fewer the second count is of all images. Leaves the model in the mode it was in.
    """
    was_training = model.training
    model.eval()
    hits = torch.zeros(2, dtype=torch.int64, device=split.labels.device)
    with torch.no_grad():
        for batch in eval_batches(split, mean=mean, std=std):
            logits = model(batch.images)
            hit = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
            hits += torch.stack([hit[:, 0].sum(), hit.sum()])
    model.train(was_training)
    return hits


def _normaliser(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    shift, scale = (255 * torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
    return lambda images: images.to(torch.float32).sub_(shift).div_(scale)


# --- randomness -----------------------------------------------------------------------------------------------------

_SPLIT, _ORDER, _VIEW = range(3)
"""Streams: draws for different purposes have nothing to do with one another."""

_DRAW_BITS = 20
_DRAW = 2**_DRAW_BITS - 1


def _random_order(size: int, seed: int, epoch: int, stream: int, device: torch.device) -> Tensor:
    bits = _random_bits(torch.arange(size, device=device), seed, epoch, stream)
    return bits.argsort(stable=True)


def _random_bits(indices: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    """64 random bits for each index, `(B,)` int64: a hash of (seed, epoch, stream, index)."""
    key = torch.zeros((), dtype=torch.int64)
    for word in (seed, epoch, stream):
        key = _mixed(key + _signed(word))
    return _mixed(indices * _signed(0x9E3779B97F4A7C15) + key.item())


def _mixed(z: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): int64 products wrap around as unsigned ones do."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return z >> bits & (1 << 64 - bits) - 1  # >> alone copies the sign


def _signed(word: int) -> int:
    word &= 2**64 - 1
    return word - 2**64 if word >> 63 else word
