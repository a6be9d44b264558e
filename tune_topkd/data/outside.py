"""Datasets of the user's own, `package.module:source`: found by their name, and held to what `Source` promises."""

import itertools
import json
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import NoReturn

import torch
from torch import Tensor

from tune_topkd.config import DataConfig
from tune_topkd.data.errors import DataError
from tune_topkd.data.errors import DatasetNameError
from tune_topkd.data.sources import Constants
from tune_topkd.data.sources import Parts
from tune_topkd.data.sources import Source
from tune_topkd.data.splits import AnySplit
from tune_topkd.data.splits import DatasetInfo
from tune_topkd.data.splits import FileSplit
from tune_topkd.data.splits import Split
from tune_topkd.user_code import UserCodeError
from tune_topkd.user_code import code_hash
from tune_topkd.user_code import one_line
from tune_topkd.user_code import resolve
from tune_topkd.user_code import user_modules


def outside_source(name: str) -> Source:
    """The dataset that `package.module:source` names: a `Source`, or a callable that gives one, such as its class.

    Raises:
        DatasetNameError: it cannot be imported or made, or is something else.
    """
    try:
        found = resolve(name)
    except UserCodeError as error:
        raise DatasetNameError(f"unknown dataset {name!r}: {error}") from error
    return CheckedSource(made_source(found, name), name)


def made_source(found: object, name: str) -> Source:
    """The source itself, or what a callable gives that takes no arguments.

    Raises:
        DatasetNameError: that is no `Source`.
    """
    if callable(found) and not isinstance(found, Source):
        try:
            found = found()
        except Exception as error:  # others' code can raise anything
            raise DatasetNameError(f"dataset {name!r}: cannot be made: {one_line(error)}") from error
    if not isinstance(found, Source):
        kind = type(found).__name__
        raise DatasetNameError(
            f"dataset {name!r}: must be a tune_topkd.data.Source or give one when it is called, but is a {kind}"
        )
    return found


class CheckedSource(Source):
    """A user's source: whatever it raises, or gives that `Source` does not allow, becomes a `DataError` of one line."""

    def __init__(self, source: Source, name: str) -> None:
        """Keep the source, and the name for messages."""
        self._source = source
        self._name = name
        self.kwargs = frozenset(self._attribute("kwargs", (frozenset, set)))
        self.constants = self._attribute("constants", (Constants, type(None)))

    def info(self, config: DataConfig) -> DatasetInfo:
        """At least two classes, and a shape of three positive numbers."""
        info: DatasetInfo = self._answer("info", self._source.info, config, DatasetInfo)
        classes, shape = info.num_classes, info.image_shape
        if type(classes) is not int or classes < 2:
            self._refuse("info", f"num_classes must be a whole number of at least 2, but is {classes!r}")
        is_shape = isinstance(shape, tuple) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
        if not is_shape:
            self._refuse("info", f"image_shape must be (channels, height, width), but is {shape!r}")
        return info

    def read(self, config: DataConfig) -> Parts:
        """Parts whose images and labels are those of `info`."""
        info = self.info(config)
        parts: Parts = self._answer("read", self._source.read, config, Parts)
        for kind, part in {"train": parts.train, "test": parts.test}.items():
            if part is not None or kind == "train":
                self._check_part(kind, part, info, config.image_size)
        if parts.classes and len(parts.classes) != info.num_classes:
            self._refuse("read", f"classes must be {info.num_classes} names or none, but are {len(parts.classes)}")
        return parts

    def on_disk(self, config: DataConfig) -> bool:
        """As the source says."""
        answer: bool = self._answer("on_disk", self._source.on_disk, config, bool)
        return answer

    def folder(self, config: DataConfig) -> Path:
        """As the source says."""
        folder: Path = self._answer("folder", self._source.folder, config, Path)
        return folder

    def missing(self, config: DataConfig) -> str | None:
        """As the source says, in one line."""
        text: str | None = self._answer("missing", self._source.missing, config, (str, type(None)))
        return text and " ".join(text.split())

    def identity(self, config: DataConfig) -> object:
        """The source's own identity and its code, which may read the same files in another way."""
        own: object = self._answer("identity", self._source.identity, config, object)
        if own is None:
            return None
        try:
            json.dumps(own)
        except (TypeError, ValueError) as error:
            self._refuse("identity", f"must be None or what JSON can hold, but is not: {error}")
        return [own, self._code()]

    def notes(self, config: DataConfig) -> Iterable[str]:
        """As the source says."""
        notes: list[str] = self._answer(
            "notes", lambda config: list(map(str, self._source.notes(config))), config, list
        )
        return notes

    def download(self, config: DataConfig) -> bool:
        """As the source says."""
        answer: bool = self._answer("download", self._source.download, config, bool)
        return answer

    def _code(self) -> dict[str, str]:
        """Hashes of the user's modules that the source's class and its bases are in."""
        classes = {each.__module__ for each in type(self._source).__mro__}
        files = {module: path for module, path in user_modules(self._name).items() if module in classes}
        return {module: code_hash(path) for module, path in files.items()}

    def _answer(
        self, method: str, ask: Callable[[DataConfig], object], config: DataConfig, kind: type | tuple[type, ...]
    ) -> Any:
        """What a method of the source gives, if it is of the kind that it has to be."""
        on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = [torch.cuda.current_device()] if on_gpu else []
        try:
            with torch.random.fork_rng(devices):  # a training draws its weights after it has read the dataset
                answer = ask(config)
        except DataError:
            raise
        except Exception as error:  # others' code can raise anything
            raise DataError(f"dataset {self._name!r}: {method}() fails: {one_line(error)}") from error
        if not isinstance(answer, kind):
            self._refuse(method, f"must give {_names(kind)}, but gives a {type(answer).__name__}")
        return answer

    def _attribute(self, attribute: str, kind: tuple[type, ...]) -> Any:
        value = getattr(self._source, attribute)
        if not isinstance(value, kind):
            rule = f"{attribute} must be {_names(kind)}, but is a {type(value).__name__}"
            raise DatasetNameError(f"dataset {self._name!r}: {rule}")
        return value

    def _check_part(self, kind: str, part: object, info: DatasetInfo, side: int | None) -> None:
        if not isinstance(part, AnySplit):
            self._refuse("read", f"{kind} must be a Split or a FileSplit, but is a {type(part).__name__}")
        images = _image_problems(part, info) if isinstance(part, Split) else _file_problems(part, info, side)
        for problem in itertools.chain(images, _label_problems(part, info)):
            self._refuse("read", f"{kind}.{problem}")

    def _refuse(self, method: str, rule: str) -> NoReturn:
        raise DataError(f"dataset {self._name!r}: {method}(): {rule}")


def _image_problems(part: Split, info: DatasetInfo) -> Iterator[str]:
    images: object = part.images
    if not _is_tensor(images, torch.uint8, 4):
        yield f"images must be (N, C, H, W) uint8 on the CPU, but are {_described(images)}"
    elif part.images.shape[1:] != info.image_shape:
        yield f"images must be {info.image_shape}, as info() gives, but are {tuple(part.images.shape[1:])}"


def _file_problems(part: FileSplit, info: DatasetInfo, side: int | None) -> Iterator[str]:
    """What is wrong with image files, which may be read at the config's image size right away."""
    paths: object = part.paths
    if not isinstance(paths, tuple) or not all(isinstance(path, str) for path in paths):
        yield f"paths must be a tuple of texts, but are {_described(paths)}"
    elif part.batch_shape not in (info.image_shape, (3, side, side)):
        yield f"size must give images of {info.image_shape}, as info() gives, but gives {part.batch_shape}"


def _label_problems(part: AnySplit, info: DatasetInfo) -> Iterator[str]:
    """What is wrong with the labels of a part whose images are sound."""
    labels: object = part.labels
    count = len(part.images) if isinstance(part, Split) else len(part.paths)
    if not _is_tensor(labels, torch.int64, 1):
        yield f"labels must be (N,) int64 on the CPU, but are {_described(labels)}"
    elif len(part.labels) != count:
        yield f"labels must be one for each of the {count} images, but are {len(part.labels)}"
    elif not count:
        yield "images must be at least one, but there is none"
    elif len(wrong := ((part.labels < 0) | (part.labels >= info.num_classes)).nonzero()):
        index = int(wrong[0])
        yield f"labels must be from 0 to {info.num_classes - 1}, but that of image {index} is {int(part.labels[index])}"


def _is_tensor(value: object, dtype: torch.dtype, ndim: int) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.dtype == dtype and value.ndim == ndim and value.device.type == "cpu"


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device.type}"


def _names(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("None" if each is type(None) else f"a {each.__name__}" for each in kinds)
