"""What is known of a dataset: its classes, and how torchvision reads and augments it."""

from dataclasses import dataclass
from typing import Any

from tune_topkd.config import DataConfig
from tune_topkd.errors import TuneTopKDError

_VISION = "torchvision.transforms."


@dataclass(frozen=True)
class Call:
    """A call of torchvision's."""

    place: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class KnownDataset:
    """What a framework has to know of a dataset."""

    classes: int | None
    """None where the config does not tell it."""
    shape: tuple[int, int, int]
    """Of an image, channels first; of three channels and 32 pixels where the config does not tell it."""
    train: Call | None
    """torchvision's dataset without its transforms; None where it has none."""
    test: Call | None
    train_transforms: list[Call]
    test_transforms: list[Call]
    mean: list[float] | None
    std: list[float] | None
    lacking: list[str]
    """What of the sweep's data these do not do, in words."""


def known_dataset(data: DataConfig, root: str) -> KnownDataset:
    """What is known of a dataset.

    Args:
        data: the sweep's.
        root: the folder that torchvision's datasets lie in.
    """
    from tune_topkd.data.datasets import SOURCES
    from tune_topkd.data.datasets import dataset_info

    try:
        info = dataset_info(data)
        classes, shape = info.num_classes, info.image_shape
    except (TuneTopKDError, ValueError, OSError):  # a folder of images, or the user's own, that is not here
        side = data.image_size or 32
        classes, shape = None, (3, side, side)
    constants = getattr(SOURCES.get(data.name), "constants", None)
    mean, std = data.mean, data.std
    if mean is None and constants is not None:
        mean, std = list(constants.mean), list(constants.std)
    train, test = _datasets(data.name, root)
    lacking = [] if mean is not None else ["its images are normalised by their own mean and deviation there"]
    if train is not None:
        lacking.append("the sweep kept a part of the training images apart to choose by; here all are trained on")
    if data.augment.mixup:
        lacking.append(f"mixup with α = {data.augment.mixup:g}")
    return KnownDataset(
        classes,
        shape,
        train,
        test,
        _train_transforms(data, shape[-1], mean, std),
        _test_transforms(data, shape[-1], mean, std),
        mean,
        std,
        lacking,
    )


def _datasets(name: str, root: str) -> tuple[Call | None, Call | None]:
    def both(place: str, argument: str, values: tuple[Any, Any], **others: Any) -> tuple[Call, Call]:
        first, second = ({"root": root, argument: value} | others for value in values)
        return Call(f"torchvision.datasets.{place}", first), Call(f"torchvision.datasets.{place}", second)

    if name in ("cifar10", "cifar100"):
        return both(name.upper(), "train", (True, False), download=False)
    if name == "stl10":
        return both("STL10", "split", ("train", "test"), download=False)
    if name == "imagenet":
        folders = (f"{root}/imagenet/train", f"{root}/imagenet/val")
        return both("ImageFolder", "root", folders)
    return None, None


def _train_transforms(data: DataConfig, side: int, mean: list[float] | None, std: list[float] | None) -> list[Call]:
    augment, found = data.augment, []
    if augment.crop_scale is not None:
        found.append(Call(f"{_VISION}RandomResizedCrop", {"size": side, "scale": augment.crop_scale}))
    elif data.image_size is not None or data.name == "imagenet":
        found.append(Call(f"{_VISION}Resize", {"size": [side, side]}))
    if augment.pad:
        found.append(Call(f"{_VISION}RandomCrop", {"size": side, "padding": augment.pad}))
    if augment.flip:
        found.append(Call(f"{_VISION}RandomHorizontalFlip", {}))
    if augment.rotate:
        found.append(Call(f"{_VISION}RandomRotation", {"degrees": augment.rotate}))
    if augment.rand_augment:
        chosen = {"num_ops": augment.rand_augment.ops, "magnitude": augment.rand_augment.magnitude}
        found.append(Call(f"{_VISION}RandAugment", chosen))
    found += _tensors(mean, std)
    if augment.erase:
        found.append(Call(f"{_VISION}RandomErasing", {"p": augment.erase, "value": 0}))
    return found


def _test_transforms(data: DataConfig, side: int, mean: list[float] | None, std: list[float] | None) -> list[Call]:
    found = []
    if data.name == "imagenet":
        found += [
            Call(f"{_VISION}Resize", {"size": round(side * 256 / 224)}),
            Call(f"{_VISION}CenterCrop", {"size": side}),
        ]
    elif data.image_size is not None:
        found.append(Call(f"{_VISION}Resize", {"size": [side, side]}))
    return found + _tensors(mean, std)


def _tensors(mean: list[float] | None, std: list[float] | None) -> list[Call]:
    found = [Call(f"{_VISION}ToTensor", {})]
    return found if mean is None else [*found, Call(f"{_VISION}Normalize", {"mean": mean, "std": std})]
