"""A dataset in one file that is mapped into memory: the trainings on a machine share one copy of its images."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_topkd.config import DataConfig
from tune_topkd.data.datasets import read_as
from tune_topkd.data.errors import DataError
from tune_topkd.data.splits import Dataset
from tune_topkd.data.splits import Mapped
from tune_topkd.data.splits import Split
from tune_topkd.storage import write_atomically

_SPLITS = ("train", "val", "test")
_KEYS = {"config", "splits", "num_classes", "constants", "selection"}


def save_dataset(config: DataConfig, dataset: Dataset, path: Path) -> bool:
    """Write a dataset whose images are in memory, replacing the file in one step.

    Args:
        config: what it was loaded by.
        dataset: what `load_dataset` gave.
        path: the file.

    Returns:
        Whether it was written: of images in files there is nothing to share.

    Raises:
        OSError: the disk is full, or the file cannot be made.
    """
    splits = {name: getattr(dataset, name) for name in _SPLITS}
    if not all(isinstance(split, Split) for split in splits.values()):
        return False
    content = {
        "config": read_as(config),
        "splits": {
            name: {"images": _whole(split.images), "labels": _whole(split.labels), "image_size": split.image_size}
            for name, split in splits.items()
        },
        "num_classes": dataset.num_classes,
        "constants": [list(dataset.mean), list(dataset.std)],
        "selection": dataset.selection,
    }
    write_atomically(path, lambda file: torch.save(content, file))
    return True


def load_saved(config: DataConfig, path: Path) -> Dataset:
    """The dataset that `save_dataset` wrote, mapped: pages are read as they are needed and shared with other processes.

    Raises:
        OSError: the file is not there.
        DataError: it is damaged, or of another dataset.
    """
    state = path.stat()
    content = _mapped(str(path), state.st_ino, state.st_mtime_ns)
    if content["config"] != read_as(config):
        raise DataError(f"{path}: holds another dataset than {config.name!r} as this config has it")
    splits = {
        name: Split(**split, workers=config.workers or 0, file=Mapped(str(path.absolute()), name))
        for name, split in content["splits"].items()
    }
    mean, std = map(tuple, content["constants"])
    return Dataset(
        **splits, num_classes=content["num_classes"], mean=mean, std=std, selection=content["selection"]
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def _mapped(path: str, inode: int, time: int) -> dict[str, Any]:
    with open(path, "rb"):
        pass  # what the disk refuses is said as it is
    try:
        content = torch.load(path, mmap=True, weights_only=True)
    except Exception as error:  # whatever torch raises of what is not its own
        raise DataError(f"{path}: is no dataset that was saved here: {error}") from error
    if not isinstance(content, dict) or content.keys() != _KEYS:
        raise DataError(f"{path}: is no dataset that was saved here")
    return content


def _whole(values: Tensor) -> Tensor:
    """With nothing beside it in its storage, which is written whole."""
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()
