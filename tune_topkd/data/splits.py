"""The splits of a dataset, in memory or in files, and how its images are divided among them."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tune_topkd.data.randomness import SPLIT
from tune_topkd.data.randomness import random_order


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset without loading it."""

    num_classes: int
    image_shape: tuple[int, int, int]
    """(channels, height, width)"""


@dataclass(frozen=True)
class Mapped:
    """The place of a split's images in a file of `save_dataset`, from which another process can map them."""

    path: str
    split: str

    def images(self) -> Tensor:
        """The images, mapped into memory: pages are read when they are needed.

        Raises:
            OSError: the file is gone.
        """
        content = torch.load(self.path, mmap=True, weights_only=True)
        images: Tensor = content["splits"][self.split]["images"]
        return images


@dataclass(frozen=True)
class Split:
    """Images `(N, C, H, W)` uint8 and labels `(N,)` int64 on one device; shared by trainings, so never written to."""

    images: Tensor
    labels: Tensor
    image_size: int | None = None
    """Side in pixels that batches are resized to; None leaves the images as they are."""
    workers: int = 0
    """Processes that augment images one by one, where the augmentation needs that; 0 does it in this process."""
    host: Tensor | None = dataclasses.field(default=None, repr=False, compare=False)
    """The same images on the CPU, for augmentation one by one."""
    file: Mapped | None = dataclasses.field(default=None, repr=False, compare=False)
    """The file that the images are mapped from, if they are."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """The device of the batches."""
        return self.labels.device

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images of a batch."""
        channels, height, width = self.images.shape[1:]
        return (channels, self.image_size or height, self.image_size or width)

    def to(self, device: torch.device) -> "Split":
        """The same split on `device`."""
        images = self.images.to(device)
        host = self.images if self.host is None else self.host
        return dataclasses.replace(self, images=images, labels=self.labels.to(device), host=host)

    def subset(self, indices: Tensor) -> "Split":
        """The images with these indices, `(n,)` int64, in this order."""
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices], host=None, file=None)


@dataclass(frozen=True)
class FileSplit:
    """Image files, which are decoded to RGB batch by batch, and labels `(N,)` int64 on the device of the batches."""

    paths: tuple[str, ...]
    labels: Tensor
    size: tuple[int, int]
    """Height and width of the images of a batch."""
    fitted: bool
    """True resizes and crops images to `size`; False makes an image of another size an error."""
    workers: int = 0
    """Processes that decode and augment; 0 does it in this process."""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def device(self) -> torch.device:
        """The device of the batches."""
        return self.labels.device

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images of a batch."""
        return (3, *self.size)

    def to(self, device: torch.device) -> "FileSplit":
        """The same split with its batches on `device`."""
        return dataclasses.replace(self, labels=self.labels.to(device))

    def subset(self, indices: Tensor) -> "FileSplit":
        """The images with these indices, `(n,)` int64, in this order."""
        paths = tuple(self.paths[index] for index in indices.tolist())
        return dataclasses.replace(self, paths=paths, labels=self.labels[indices])


AnySplit: TypeAlias = Split | FileSplit


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, and the constants `mean` and `std` that images are normalised with.

    The constants are per channel, with pixels from 0 to 1. With the `selection` "test_at_end" or "best_test_epoch", `train`
    has all training images and `val` is the test split: a result that is chosen by it must be marked so.
    """

    train: AnySplit
    val: AnySplit
    test: AnySplit
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    selection: str = "validation"


def stratified(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Divide images at random into parts that each get the same fraction of every class, to the nearest image.

    Args:
        labels: `(N,)` int64.
        fractions: of the images that each part gets; what is left is one more part.
        seed: the division is a function of it.

    Returns:
        The indices of the images of each part, sorted, int64.
    """
    shuffled = random_order(len(labels), seed, 0, SPLIT, labels.device)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = torch.unique(labels, return_counts=True)[1].tolist()
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for members in torch.split(by_class, sizes):
        ends = [round(math.fsum(fractions[: i + 1]) * len(members)) for i in range(len(fractions))]
        for part, piece in zip(parts, members.tensor_split(ends), strict=True):
            part.append(piece)
    return [_sorted(torch.cat(part), len(labels)) for part in parts]


def _sorted(indices: Tensor, size: int) -> Tensor:
    """Distinct numbers below `size`, sorted; marking each in a mask is much faster than sorting."""
    is_in = torch.zeros(size, dtype=torch.bool, device=indices.device)
    is_in[indices] = True
    return is_in.nonzero().flatten()
