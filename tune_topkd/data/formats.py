"""Datasets that come as a few binary files: CIFAR-10, CIFAR-100 and STL-10, where torchvision keeps them."""

import hashlib
import io
import logging
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tune_topkd.config import DataConfig
from tune_topkd.data.errors import DataError
from tune_topkd.data.identity import whole_files
from tune_topkd.data.sources import Constants
from tune_topkd.data.sources import Parts
from tune_topkd.data.sources import Source
from tune_topkd.data.sources import data_root
from tune_topkd.data.sources import put_there
from tune_topkd.data.splits import DatasetInfo
from tune_topkd.data.splits import Split

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Official(Source):
    """A dataset whose folder, files and MD5 a class of torchvision knows."""

    vision: str
    num_classes: int
    side: int
    constants: Constants | None

    def info(self, config: DataConfig) -> DatasetInfo:
        """Known beforehand."""
        return DatasetInfo(self.num_classes, (3, self.side, self.side))

    def folder(self, config: DataConfig) -> Path:
        """torchvision's folder below the root."""
        return data_root(config) / str(self._class.base_folder)

    def missing(self, config: DataConfig) -> str | None:
        """Names the files that are not there."""
        absent = [path.name for path in self.files(config) if not path.is_file()]
        if not absent:
            return None
        remedy = (
            f"unpack {self._class.filename} ({self._class.url}) into {data_root(config)}, or set data.download: true"
        )
        return put_there(config, f"{self.folder(config)} has no {', '.join(absent)}", remedy)

    def identity(self, config: DataConfig) -> object:
        """The content of all files that hold labelled images."""
        return whole_files(self.folder(config), map(str, self.files(config)))

    def files(self, config: DataConfig) -> Iterable[Path]:
        """The files that hold labelled images."""
        return [self.folder(config) / name for name in (*self._hashes(train=True), *self._hashes(train=False))]

    def download(self, config: DataConfig) -> bool:
        """Download by torchvision."""
        self._class(str(data_root(config)), download=True)
        return True

    def read(self, config: DataConfig) -> Parts:
        """Both parts; a file that is not the official one is used with a warning."""
        train, test = (self._part(self.folder(config), self._hashes(train=train)) for train in (True, False))
        return Parts(train, test)

    @property
    def _class(self) -> Any:
        import torchvision.datasets  # imported late: slow

        return getattr(torchvision.datasets, self.vision)

    def _hashes(self, *, train: bool) -> dict[str, str]:
        """The MD5 of each file that is read, by name."""
        return dict(self._class.train_list if train else self._class.test_list)

    def _part(self, folder: Path, hashes: dict[str, str]) -> Split:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Cifar(_Official):
    """CIFAR-10 or CIFAR-100: pickled rows of 3 × 32 × 32 bytes; `key` is that of the labels."""

    key: str

    def _part(self, folder: Path, hashes: dict[str, str]) -> Split:
        images, labels = zip(*(self._batch(folder / name, md5) for name, md5 in hashes.items()), strict=True)
        return Split(torch.cat(images), torch.cat(labels))

    def _batch(self, path: Path, md5: str) -> tuple[Tensor, Tensor]:
        content = _unpickled(path, _checked_bytes(path, md5))
        data, labels = content.get("data"), content.get(self.key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise DataError(f"{path}: has no rows of 3072 bytes under 'data'; unpack the official file again")
        if isinstance(labels, np.ndarray) and labels.ndim == 1:
            labels = labels.tolist()
        if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
            raise DataError(f"{path}: has no list of whole numbers under {self.key!r}; unpack the official file again")
        images = torch.from_numpy(data.reshape(-1, 3, 32, 32).copy())
        return images, _checked_labels(path, labels, len(images), self.num_classes)


@dataclass(frozen=True, kw_only=True)
class Stl10(_Official):
    """The labelled parts of STL-10: bytes of 3 × 96 × 96, each channel column by column, and labels from 1."""

    def _hashes(self, *, train: bool) -> dict[str, str]:
        return {name: md5 for name, md5 in super()._hashes(train=train).items() if not name.startswith("unlabeled")}

    def _part(self, folder: Path, hashes: dict[str, str]) -> Split:
        (pixels_name, pixels_md5), (labels_name, labels_md5) = hashes.items()
        pixels = np.frombuffer(_checked_bytes(folder / pixels_name, pixels_md5), dtype=np.uint8)
        if len(pixels) % (3 * 96 * 96):
            raise DataError(
                f"{folder / pixels_name}: is truncated: {len(pixels)} bytes are no whole number of images of "
                f"{3 * 96 * 96}; unpack the official file again"
            )
        images = torch.from_numpy(pixels.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2).copy())
        path = folder / labels_name
        labels = [byte - 1 for byte in _checked_bytes(path, labels_md5)]
        return Split(images, _checked_labels(path, labels, len(images), self.num_classes, first=1))


def _checked_bytes(path: Path, md5: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        _log.warning("%s is not the official file (its MD5 is not %s); it is used as it is", path, md5)
    return content


def _checked_labels(path: Path, labels: list[int], images: int, num_classes: int, first: int = 0) -> Tensor:
    if len(labels) != images:
        raise DataError(f"{path}: has {len(labels)} labels for {images} images; unpack the official files again")
    if not labels:
        raise DataError(f"{path}: has no images; unpack the official files again")
    for number, label in enumerate(labels):
        if not 0 <= label < num_classes:
            raise DataError(
                f"{path}: label {label + first} of image {number} is not from {first} to {num_classes - 1 + first}; "
                "unpack the official files again"
            )
    return torch.tensor(labels)


# --- pickles --------------------------------------------------------------------------------------------------------


def _unpickled(path: Path, content: bytes) -> dict[Any, Any]:
    """The mapping in a pickle of Python 2 or 3, its keys as text."""
    try:
        found = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle is run as a program and can raise anything
        raise DataError(
            f"{path}: is damaged ({type(error).__name__}: {error}); unpack the official file again"
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no mapping but a {type(found).__name__}; unpack the official file again")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in found.items()}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and nothing else, since a pickle can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        place = (module.replace("numpy.core", "numpy._core"), name)
        if place == ("numpy", "dtype"):
            return _dtype
        if place == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, encoding="latin1": text.encode(encoding)
        if place == ("numpy", "ndarray"):
            return np.ndarray
        if place in (("numpy._core.multiarray", "_reconstruct"), ("numpy._core.numeric", "_frombuffer")):
            return super().find_class(*place)
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def _dtype(kind: str, align: int = 0, copy: int = 0) -> "np.dtype[Any]":
    return np.dtype(kind, bool(align), bool(copy))  # numpy warns of the numbers that old pickles have for these flags
