"""What a dataset has to offer to be known by its name: its shape, its files, and how they are read."""

import json
import os
from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tune_topkd.config import DataConfig
from tune_topkd.config import unknown_choice
from tune_topkd.data.errors import DataError
from tune_topkd.data.identity import tensors
from tune_topkd.data.splits import AnySplit
from tune_topkd.data.splits import DatasetInfo
from tune_topkd.data.splits import Split

ROOT_VARIABLE = "TUNE_TOPKD_DATA_DIR"
"""Environment variable that names the folder of the datasets where `data.root` does not."""


class Parts(NamedTuple):
    """All images of a dataset on the CPU, as `Source.read` gives them."""

    train: AnySplit
    """The training part; the validation split is drawn from it."""
    test: AnySplit | None = None
    """None where the dataset has no test part of its own: the test split is then drawn from `train` too."""
    classes: tuple[str, ...] = ()
    """The name of each class, for messages; empty where they have none."""


@dataclass(frozen=True)
class Constants:
    """What images are normalised with, per channel, with pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Source(ABC):
    """A dataset: everything that its name stands for. `info` and `read` are enough for one.

    Every method is given the `data` section of the config: `config.kwargs` are the dataset's arguments,
    `data_root(config)` is the folder of the datasets; which images are trained on and how they are augmented is no
    concern of a source.

    **Determinism.** The same config and files give the same answers, in every process: each trial may read the dataset
    by itself. **State.** A source may be made anew for every question, so it keeps nothing between them. **Errors.**
    Raise a `DataError` whose message names the file or key and says what to do; what else a user's source raises is
    told in one line with its type.
    """

    kwargs: frozenset[str] = frozenset()
    """The arguments that `data.kwargs` may hold."""
    constants: Constants | None = None
    """What the field normalises these images with; None takes mean and standard deviation of the training split."""

    @abstractmethod
    def info(self, config: DataConfig) -> DatasetInfo:
        """The number of classes and the shape of the images as they are stored; looks at the disk only if it must.

        Raises:
            DataError: they cannot be known, as the files are missing or of different sizes.
        """

    @abstractmethod
    def read(self, config: DataConfig) -> Parts:
        """All images.

        A part is a `Split`, images in memory, or a `FileSplit`, image files that are decoded when they come into a
        batch. Its images have the shape that `info` says, its labels are from 0 to the number of classes, exclusive.

        Raises:
            DataError: a file is damaged or does not fit the others.
        """

    def on_disk(self, config: DataConfig) -> bool:
        """Whether the dataset is read from files below `data_root`."""
        return True

    def folder(self, config: DataConfig) -> Path:
        """The folder that the files lie in, or must be put into."""
        return data_root(config)

    def missing(self, config: DataConfig) -> str | None:
        """What must be put where, in one line; None if the files are there, as far as their names tell."""
        return None

    def identity(self, config: DataConfig) -> object:
        """What tells these images and labels from others, wherever they lie, as JSON has it.

        Teachers and their cached logits are kept by it. None takes a hash of the images and labels that `read` gives,
        or of the names, sizes and some bytes of the image files. Anything else, such as a hash of the files, must
        change whenever an image or label does; `config.kwargs` and a user's code are added to it.

        Raises:
            DataError: files are missing, cannot be read, or are not laid out as they must be.
        """
        return None

    def notes(self, config: DataConfig) -> Iterable[str]:
        """What a person should know of files that are there, such as files that are not read; a line each.

        Raises:
            DataError: some are not laid out as they must be, or cannot be decoded.
        """
        return ()

    def download(self, config: DataConfig) -> bool:
        """Fetch the files into `folder`; False if that has to be done by hand.

        Raises:
            OSError or others: whatever the download raises.
        """
        return False


@dataclass(frozen=True)
class Generated(Source):
    """A dataset that is generated or ships with a library, without a test part of its own."""

    shape: DatasetInfo
    make: Callable[[], Split]
    hashed: Callable[[], str] | None = None
    """A hash of the images and labels that takes less time than making them."""

    def info(self, config: DataConfig) -> DatasetInfo:
        """The given shape."""
        return self.shape

    def on_disk(self, config: DataConfig) -> bool:
        """False: no files are read."""
        return False

    def read(self, config: DataConfig) -> Parts:
        """The images that `make` gives."""
        return Parts(self.make())

    def identity(self, config: DataConfig) -> object:
        """A hash of the images and labels."""
        if self.hashed is not None:
            return self.hashed()
        made = self.make()
        return tensors([made.images, made.labels])


def data_root(config: DataConfig) -> Path:
    """Absolute path of the folder of the datasets: `data.root`, else `ROOT_VARIABLE`, else `data`."""
    return Path(config.root or os.environ.get(ROOT_VARIABLE) or "data").expanduser().absolute()


def check_kwargs(config: DataConfig, known: Iterable[str]) -> None:
    """Refuse unknown arguments of a dataset.

    Raises:
        DataError: names the first one and the known ones.
    """
    for name in config.kwargs:
        if name not in known:
            raise DataError(f"dataset {config.name!r}: data.kwargs.{name}: unknown; {unknown_choice(name, known)}")


def class_count(config: DataConfig, default: int) -> int:
    """`data.kwargs.num_classes`, or the default.

    Raises:
        DataError: it is not a whole number of at least 2.
    """
    count = config.kwargs.get("num_classes", default)
    if type(count) is not int or count < 2:
        raise DataError(
            f"dataset {config.name!r}: data.kwargs.num_classes must be a whole number of at least 2, "
            f"but got {json.dumps(count, default=repr)}"
        )
    return count


def put_there(config: DataConfig, what: str, remedy: str) -> str:
    """The message about missing files: what is missing, what to do, and where the datasets are looked for."""
    return (
        f"dataset {config.name!r}: {what}; {remedy} "
        f"(data.root or {ROOT_VARIABLE} names the folder that holds the datasets, now {data_root(config)})"
    )
