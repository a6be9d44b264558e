"""A dataset in one file that is mapped into memory, so that the trainings on a machine share one copy of its images."""

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


def is_in_memory(dataset: Dataset) -> bool:
    """Whether a dataset's images are in memory, so that `save_dataset` writes them; else each is read from its own file."""
    return all(isinstance(getattr(dataset, name), Split) for name in _SPLITS)


def save_dataset(config: DataConfig, dataset: Dataset, path: Path) -> bool:
    """Write a dataset whose images are in memory; the file is replaced in one step.

    Args:
        config: of the dataset.
        dataset: what `load_dataset` gave for it.
        path: of the file.

    Returns:
        Whether it was written: images in files need no copy.

    Raises:
        OSError: the disk is full, or the file cannot be made.
    """
    if not is_in_memory(dataset):
        return False
    splits = {name: getattr(dataset, name) for name in _SPLITS}
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
    """The dataset that `save_dataset` wrote, mapped into memory: pages are read when needed and shared by processes.

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
        pass  # the disk's errors reach the caller as they are
    try:
        content = torch.load(path, mmap=True, weights_only=True)
    except Exception as error:  # torch can raise anything of a file that is not its own
        raise DataError(f"{path}: is not a dataset that was saved here: {error}") from error
    if not isinstance(content, dict) or content.keys() != _KEYS:
        raise DataError(f"{path}: is not a dataset that was saved here")
    return content


def _whole(values: Tensor) -> Tensor:
    """The values alone in their storage, since a storage is written whole."""
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()
