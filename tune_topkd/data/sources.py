"""What a dataset has to offer to be known by name: its shape, its files, and how they are read."""

import json
import os
from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from typing import NamedTuple

from tune_topkd.config import DataConfig
from tune_topkd.config import unknown_choice
from tune_topkd.data.errors import DataError
from tune_topkd.data.identity import tensors
from tune_topkd.data.splits import AnySplit
from tune_topkd.data.splits import DatasetInfo
from tune_topkd.data.splits import Split

ROOT_VARIABLE = "TUNE_TOPKD_DATA_DIR"
"""Names the folder the datasets lie in where `data.root` does not."""


class Parts(NamedTuple):
    """All images of a dataset; `test` is None where there is no test part of its own. `classes` are names, if known."""

    train: AnySplit
    test: AnySplit | None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Constants:
    """Per channel, with pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Source(ABC):
    """A dataset: all that its name stands for. `config.name` is only there for messages."""

    kwargs: ClassVar[frozenset[str]] = frozenset()
    """What `data.kwargs` may hold."""
    constants: Constants | None = None
    """What the field normalises with; None: those of the training split."""

    @abstractmethod
    def info(self, config: DataConfig) -> DatasetInfo:
        """Class count and shape of the images as they are stored; looks at the disk only if it must.

        Raises:
            DataError: they cannot be known, since the files are missing or of different sizes.
        """

    @abstractmethod
    def read(self, config: DataConfig) -> Parts:
        """All images.

        Raises:
            DataError: a file is damaged or does not fit the others; the message names it.
        """

    def on_disk(self, config: DataConfig) -> bool:
        """Whether it is read from files below `data_root`."""
        return True

    def folder(self, config: DataConfig) -> Path:
        """Where the files lie, or have to."""
        return data_root(config)

    def missing(self, config: DataConfig) -> str | None:
        """What must be put where; None if the files are there, by a look at names alone."""
        return None

    @abstractmethod
    def identity(self, config: DataConfig) -> object:
        """What tells the images and labels from others, wherever they lie, as JSON has it; `config.kwargs` aside.

        Raises:
            DataError: files that are missing, cannot be read, or are not laid out as they must be.
        """

    def notes(self, config: DataConfig) -> Iterable[str]:
        """What is worth saying of files that are there.

        Raises:
            DataError: some are not laid out as they must be, or cannot be decoded.
        """
        return ()

    def download(self, config: DataConfig) -> bool:
        """Fetch the files; False if that has to be done by hand.

        Raises:
            OSError or others: whatever torchvision raises.
        """
        return False


@dataclass(frozen=True)
class Generated(Source):
    """A dataset that is made, or ships with a library, whole and without a test part."""

    shape: DatasetInfo
    make: Callable[[], Split]
    hashed: Callable[[], str] | None = None
    """A hash of what `make` gives that takes less time than making it."""

    def info(self, config: DataConfig) -> DatasetInfo:
        """As given."""
        return self.shape

    def on_disk(self, config: DataConfig) -> bool:
        """It is not."""
        return False

    def read(self, config: DataConfig) -> Parts:
        """As made."""
        return Parts(self.make(), None)

    def identity(self, config: DataConfig) -> object:
        """A hash of what is made."""
        if self.hashed is not None:
            return self.hashed()
        made = self.make()
        return tensors([made.images, made.labels])


def data_root(config: DataConfig) -> Path:
    """Absolute path of the folder the datasets lie in."""
    return Path(config.root or os.environ.get(ROOT_VARIABLE) or "data").expanduser().absolute()


def check_kwargs(config: DataConfig, known: Iterable[str]) -> None:
    """Refuse arguments that a dataset does not have.

    Raises:
        DataError: the first one.
    """
    for name in config.kwargs:
        if name not in known:
            raise DataError(f"dataset {config.name!r}: data.kwargs.{name}: unknown; {unknown_choice(name, known)}")


def class_count(config: DataConfig, default: int) -> int:
    """`num_classes` of the arguments.

    Raises:
        DataError: it is no whole number of at least 2.
    """
    count = config.kwargs.get("num_classes", default)
    if type(count) is not int or count < 2:
        raise DataError(
            f"dataset {config.name!r}: data.kwargs.num_classes must be a whole number of at least 2, "
            f"but got {json.dumps(count, default=repr)}"
        )
    return count


def put_there(config: DataConfig, what: str, remedy: str) -> str:
    """The message for files that are not there."""
    return (
        f"dataset {config.name!r}: {what}; {remedy} "
        f"(data.root or {ROOT_VARIABLE} names the folder that holds the datasets, now {data_root(config)})"
    )
