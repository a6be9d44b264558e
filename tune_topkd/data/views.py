"""Views of images, which are what augmentation makes of them: each is a function of (seed, epoch, index) alone.

Images are padded, cropped and flipped in whole batches, on their device. All other augmentation is torchvision's: one
image at a time on the CPU, in worker processes if there are any, with torch's generator seeded for each image.
"""

import os
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tune_topkd.config import AugmentConfig
from tune_topkd.data.decoding import decoded
from tune_topkd.data.errors import DataError
from tune_topkd.data.randomness import DETAIL
from tune_topkd.data.randomness import DRAW
from tune_topkd.data.randomness import DRAW_BITS
from tune_topkd.data.randomness import VIEW
from tune_topkd.data.randomness import random_bits
from tune_topkd.data.splits import AnySplit
from tune_topkd.data.splits import Mapped
from tune_topkd.data.splits import Split
from tune_topkd.data.workers import Made
from tune_topkd.data.workers import made_by_workers

EVAL_MARGIN = 8 / 7
"""The shorter side of an image file before its centre is cropped, in units of the crop's side: the usual 256 / 224."""


def view(
    images: Tensor, indices: Tensor, *, augment: AugmentConfig, seed: int, epoch: int, image_size: int | None = None
) -> Tensor:
    """The random views of some images in one epoch.

    Args:
        images: all images of the split, `(N, C, H, W)` uint8.
        indices: which of them, `(B,)` int64.
        augment: how views are made; without its erasing, which comes after normalising.
        seed: of the training.
        epoch: absolute, from 1.
        image_size: side that the views are resized to; by default the images' own.

    Returns:
        `(B, C, H, W)` uint8.
    """
    if goes_by_batch(augment):
        numbers = view_numbers(indices, augment=augment, seed=seed, epoch=epoch)
        views = numbered_views(images[indices], numbers, augment)
    else:
        drawn = _Views(None, images.cpu(), augment, seed, epoch, image_size)
        views = torch.stack([image for image, _ in drawn.drawn(indices.tolist())]).to(images.device)
    return resized(views, image_size)


def goes_by_batch(augment: AugmentConfig) -> bool:
    """Whether everything that it asks for can be done to a whole batch at once."""
    return not (augment.crop_scale or augment.rotate or augment.rand_augment or augment.erase)


def resized(images: Tensor, side: int | None) -> Tensor:
    """Images `(B, C, H, W)` uint8 resized to this side, bilinear and antialiased; unchanged if it is theirs, or
    None."""
    if side is None or images.shape[-2:] == (side, side):
        return images
    from torchvision.transforms.v2.functional import resize  # imported late: slow, and most runs do without

    return resize(images, [side, side], antialias=True)  # type: ignore[no-any-return]


def view_count(augment: AugmentConfig) -> int | None:
    """The number of different views of an image; None where they cannot be counted."""
    if not goes_by_batch(augment):
        return None
    offsets: int = 2 * augment.pad + 1
    return offsets * offsets * (2 if augment.flip else 1)


def view_numbers(indices: Tensor, *, augment: AugmentConfig, seed: int, epoch: int) -> Tensor:
    """The number of the view, below `view_count`, that each image has in an epoch: `(B,)` int64."""
    return _numbers(random_bits(indices, seed, epoch, VIEW), augment)


def numbered_views(picked: Tensor, numbers: Tensor, augment: AugmentConfig) -> Tensor:
    """The views with these numbers, `(B,)`, of images `(B, C, H, W)`: padded, cropped back and flipped."""
    if not augment.pad and not augment.flip:
        return picked
    channels, height, width = picked.shape[1:]
    offsets = 2 * augment.pad + 1
    sides = 2 if augment.flip else 1
    top, left = (numbers // sides // offsets)[:, None], (numbers // sides % offsets)[:, None]
    rows = top + torch.arange(height, device=picked.device)
    columns = left + torch.arange(width, device=picked.device)
    if augment.flip:
        flipped = (numbers % 2).bool()[:, None]
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = functional.pad(picked, (augment.pad,) * 4)
    cropped = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
    return cropped.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


def _numbers(bits: Tensor, augment: AugmentConfig) -> Tensor:
    """The number of each image's view from 64 random bits: the low 40 give the offsets, the next one the flip."""
    offsets = 2 * augment.pad + 1
    top, left = ((bits >> shift & DRAW) * offsets >> DRAW_BITS for shift in (0, DRAW_BITS))
    number: Tensor = top * offsets + left
    return 2 * number + (bits >> 2 * DRAW_BITS & 1) if augment.flip else number


# --- one image at a time --------------------------------------------------------------------------------------------


def views_of(
    split: AnySplit,
    batches: Sequence[Tensor],
    *,
    augment: AugmentConfig | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> Iterator[Made]:
    """Batches of a split that are made image by image on the CPU, by as many processes as the split has workers.

    Args:
        split: of which.
        batches: the indices of each batch, `(B,)` int64.
        augment: how views are made; None gives the plain images that networks are evaluated on.
        seed: of the training.
        epoch: absolute, from 1.

    Raises:
        DataError: an image file cannot be decoded, or has another size than the split; it is named.
        WorkerError: a process died or stopped responding.
    """
    if isinstance(split, Split):
        images = split.images if split.host is None else split.host
        views = _Views(None, images.cpu(), augment, seed, epoch, split.image_size, file=split.file)
    else:
        views = _Views(split.paths, None, augment, seed, epoch, None, split.size, split.fitted)
    lists: list[list[int]] = [indices.tolist() for indices in batches]
    if split.workers:
        made = made_by_workers(views, lists, split.workers, pinned=split.device.type == "cuda")
    else:
        made = map(views.__getitem__, lists)
    for result in made:
        if isinstance(result, str):
            raise DataError(result)
        yield result


class _Views:
    """Makes a batch of a list of indices; worker processes get it pickled."""

    def __init__(
        self,
        paths: Sequence[str] | None,
        images: Tensor | None,
        augment: AugmentConfig | None,
        seed: int,
        epoch: int,
        image_size: int | None,
        size: tuple[int, int] | None = None,
        fitted: bool = False,
        file: Mapped | None = None,
    ) -> None:
        self.paths, self.images, self.file = paths, images, file
        self.augment, self.seed, self.epoch = augment, seed, epoch
        self.size, self.fitted = size, fitted
        if image_size is not None:
            size = (image_size, image_size)
        elif images is not None:
            size = (images.shape[-2], images.shape[-1])
        assert size is not None, "files come with their size"
        self.final_size = size

    def __getstate__(self) -> dict[str, Any]:
        """Leave mapped images out, which another process maps itself; shared memory would take a copy for every
        trial."""
        is_mapped = self.file is not None and os.path.exists(self.file.path)
        return self.__dict__ | ({"images": None} if is_mapped else {"file": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self.file is not None:
            self.images = self.file.images()

    def __getitem__(self, indices: list[int]) -> Made | str:
        """The batch, or an error's message: an exception from a worker would carry the worker's traceback."""
        try:
            images, kept = zip(*self.drawn(indices), strict=True)
        except ValueError as error:
            return str(error)
        return torch.stack(images), None if kept[0] is None else torch.stack(kept)

    def drawn(self, indices: list[int]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each image, and which of its pixels erasing keeps; torch's generator is left as it was.

        Raises:
            DataError: an image file cannot be decoded, or has the wrong size.
        """
        if self.augment is None:
            for index in indices:
                yield self._plain(index), None
            return
        bits, seeds = (random_bits(torch.tensor(indices), self.seed, self.epoch, stream) for stream in (VIEW, DETAIL))
        crop, detail, erase = _transforms(self.augment, self.final_size)
        for number, index in enumerate(indices):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(seeds[number]))  # torch.manual_seed would seed the GPU's too
                image = self._plain(index) if crop is None else crop(self._read(index))
                image = numbered_views(image[None], _numbers(bits[number : number + 1], self.augment), self.augment)[0]
                for transform in detail:
                    image = transform(image)
                kept = None if erase is None else erase(torch.ones(1, *self.final_size, dtype=torch.uint8)).bool()
            yield image, kept

    def _read(self, index: int) -> Tensor:
        if self.images is not None:
            return self.images[index]
        assert self.paths is not None, "images are in memory or in files"
        return decoded(self.paths[index])

    def _plain(self, index: int) -> Tensor:
        """The image without augmentation, that of a file at the split's size."""
        image = self._read(index)
        if self.size is None or image.shape[-2:] == self.size:
            return image
        if not self.fitted:
            assert self.paths is not None, "images in memory have their size"
            raise DataError(
                f"{self.paths[index]}: is {image.shape[-1]} × {image.shape[-2]} pixels, not {self.size[1]} × "
                f"{self.size[0]}; all images must be of that size unless data.image_size is given"
            )
        from torchvision.transforms.v2.functional import center_crop
        from torchvision.transforms.v2.functional import resize

        side = round(self.size[0] * EVAL_MARGIN)
        return center_crop(resize(image, [side], antialias=True), list(self.size))  # type: ignore[no-any-return]


def _transforms(augment: AugmentConfig, size: tuple[int, int]) -> tuple[Any, list[Any], Any]:
    """torchvision's transforms: the random crop or None, those after the flip, and the erasing or None."""
    from torchvision.transforms import v2

    crop = augment.crop_scale and v2.RandomResizedCrop(size, scale=tuple(augment.crop_scale), antialias=True)
    detail: list[Any] = []
    if augment.rotate:
        detail.append(v2.RandomRotation(augment.rotate))
    if augment.rand_augment:
        detail.append(v2.RandAugment(augment.rand_augment.ops, augment.rand_augment.magnitude))
    return crop, detail, v2.RandomErasing(augment.erase, value=0) if augment.erase else None
