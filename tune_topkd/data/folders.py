"""Datasets that are folders of image files: Tiny-ImageNet, ImageNet, and any with a folder for each class."""

import os
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from tune_topkd.config import DataConfig
from tune_topkd.data.sources import Constants
from tune_topkd.data.sources import Parts
from tune_topkd.data.sources import Source
from tune_topkd.data.sources import class_count
from tune_topkd.data.sources import data_root
from tune_topkd.data.sources import put_there
from tune_topkd.data.splits import DatasetInfo
from tune_topkd.data.splits import FileSplit
from tune_topkd.data.splits import Split
from tune_topkd.data.views import views_of

_DECODED_AT_ONCE = 256
_PROBED = 200
"""Images whose size is looked at before anything is loaded; of those that are loaded, all are."""


def _missing_parts(config: DataConfig, folder: Path, remedy: str) -> str | None:
    """What to do about a folder without train or val; None if it has both."""
    absent = [name for name in ("train", "val") if not (folder / name).is_dir()]
    return put_there(config, f"{folder} has no {' and no '.join(absent)}", remedy) if absent else None


class Images:
    """Paths of image files and the numbers of their classes, in step."""

    def __init__(self, found: Iterable[tuple[str, int]]) -> None:
        pairs = list(found)
        self.paths = tuple(path for path, _ in pairs)
        self.labels = [label for _, label in pairs]

    def split(self, size: tuple[int, int], *, fitted: bool, workers: int) -> FileSplit:
        """As they come into batches."""
        return FileSplit(self.paths, torch.tensor(self.labels), size, fitted, workers)


# --- Tiny-ImageNet --------------------------------------------------------------------------------------------------


class TinyImageNet(Source):
    """Tiny-ImageNet: all images 64 × 64; its labelled `val` is the test part. Decoded once, into memory.

    `val` may lie as it was published, with `val_annotations.txt`, or be sorted into a folder for each class; the images
    of a class lie in its folder or in `images` there. Classes count in the order of their sorted names.
    """

    kwargs: ClassVar[frozenset[str]] = frozenset({"num_classes"})
    constants = Constants((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))
    _side = 64

    def info(self, config: DataConfig) -> DatasetInfo:
        """Known beforehand."""
        return DatasetInfo(class_count(config, 200), (3, self._side, self._side))

    def folder(self, config: DataConfig) -> Path:
        """As it unpacks."""
        return data_root(config) / "tiny-imagenet-200"

    def missing(self, config: DataConfig) -> str | None:
        """Looks for train and val."""
        folder = self.folder(config)
        remedy = f"unpack tiny-imagenet-200.zip (http://cs231n.stanford.edu/tiny-imagenet-200.zip) into {folder.parent}"
        return _missing_parts(config, folder, remedy)

    def files(self, config: DataConfig) -> Iterable[Path]:
        """The images and, where they are read, the lists."""
        train, test = self._images(config)
        lists = [self.folder(config) / "wnids.txt", self.folder(config) / "val" / "val_annotations.txt"]
        return [Path(path) for path in (*train.paths, *test.paths)] + [path for path in lists if path.is_file()]

    def read(self, config: DataConfig) -> Parts:
        """Decodes by as many processes as `data.workers` says."""
        train, test = (_in_memory(images, self._side, config.workers or 0) for images in self._images(config))
        return Parts(train, test)

    def _images(self, config: DataConfig) -> tuple[Images, Images]:
        folder, count = self.folder(config), class_count(config, 200)
        names = class_names(folder / "train")
        listed = folder / "wnids.txt"
        if listed.is_file():
            expected = sorted(set(_text(listed).split()))
            if expected != names:
                raise ValueError(
                    f"{folder / 'train'}: its classes are not those of wnids.txt: {_unlike(names, expected)}; "
                    "unpack it again"
                )
        _check_count(folder / "train", names, count)
        return images_by_class(folder / "train", names), self._val(folder / "val", names)

    def _val(self, folder: Path, names: Sequence[str]) -> Images:
        sorted_in = [name for name in _subfolders(folder) if name != "images"]
        raw = sorted(p.name for p in folder.glob("images/*") if _is_image(p.name))
        if sorted_in and raw:
            raise ValueError(
                f"{folder}: is half sorted: {len(raw)} images lie in images/ and others in folders of classes; "
                "unpack it again, or finish sorting"
            )
        if sorted_in:
            _check_same_classes(folder, sorted_in, folder.parent / "train", names)
            return images_by_class(folder, names)
        return self._annotated(folder, names, raw)

    def _annotated(self, folder: Path, names: Sequence[str], files: Sequence[str]) -> Images:
        """`val` as it was published: the class of each file is in a list."""
        listed = folder / "val_annotations.txt"
        if not listed.is_file():
            raise ValueError(
                f"{folder}: has neither val_annotations.txt, which says the class of each of images/, nor a folder for "
                "each class; unpack tiny-imagenet-200.zip again"
            )
        label = {name: number for number, name in enumerate(names)}
        found: dict[str, int] = {}
        for number, line in enumerate(_text(listed).splitlines(), start=1):
            file, wnid, *_ = [*line.split("\t"), "", ""]
            if wnid not in label:
                raise ValueError(f"{listed}: line {number}: the class {wnid!r} of {file!r} is none of train's")
            found[file] = label[wnid]
        if found.keys() != set(files):
            raise ValueError(
                f"{listed}: its files are not those of images/: {_unlike(sorted(found), files)}; unpack it again"
            )
        return Images((str(folder / "images" / file), found[file]) for file in sorted(found))


def _in_memory(images: Images, side: int, workers: int) -> Split:
    split = images.split((side, side), fitted=False, workers=workers)
    pixels = torch.empty(len(split), 3, side, side, dtype=torch.uint8)
    batches = torch.split(torch.arange(len(split)), _DECODED_AT_ONCE)
    for indices, (decoded, _) in zip(batches, views_of(split, batches), strict=True):
        pixels[indices] = decoded
    return Split(pixels, split.labels)


# --- ImageNet -------------------------------------------------------------------------------------------------------


class ImageNet(Source):
    """ImageNet-1k: `train/<wnid>` and `val/<wnid>`, which is the test part. Classes count in the order of their names."""

    kwargs: ClassVar[frozenset[str]] = frozenset({"num_classes"})
    constants = Constants((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    _side = 224

    def info(self, config: DataConfig) -> DatasetInfo:
        """Known beforehand."""
        return DatasetInfo(class_count(config, 1000), (3, self._side, self._side))

    def folder(self, config: DataConfig) -> Path:
        """Below the root."""
        return data_root(config) / "imagenet"

    def missing(self, config: DataConfig) -> str | None:
        """Looks for train and val."""
        folder = self.folder(config)
        remedy = (
            f"put the images of ILSVRC2012 (https://image-net.org) into {folder}/train/<wnid> and {folder}/val/<wnid>"
        )
        return _missing_parts(config, folder, remedy)

    def files(self, config: DataConfig) -> Iterable[Path]:
        """The images."""
        return [Path(path) for images in self._images(config) for path in images.paths]

    def read(self, config: DataConfig) -> Parts:
        """Paths; images are decoded when they come into a batch."""
        side = config.image_size or self._side
        train, test = (i.split((side, side), fitted=True, workers=config.workers or 0) for i in self._images(config))
        return Parts(train, test)

    def _images(self, config: DataConfig) -> tuple[Images, Images]:
        train, val = self.folder(config) / "train", self.folder(config) / "val"
        names = class_names(train)
        _check_count(train, names, class_count(config, 1000))
        _check_same_classes(val, class_names(val), train, names)
        return images_by_class(train, names), images_by_class(val, names)


# --- a folder for each class ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    train: Path
    test: Path | None


class ImageFolder(Source):
    """Any images in a folder for each class: `train/<class>` and `val/<class>` or `test/<class>`, or `<class>` alone.

    `data.root` is that folder itself. Classes count in the order of their sorted names.
    """

    kwargs: ClassVar[frozenset[str]] = frozenset({"train", "test"})

    def info(self, config: DataConfig) -> DatasetInfo:
        """Counts the classes and, unless data.image_size is given, looks at the size of some images."""
        text = self.missing(config)
        if text is not None:
            raise ValueError(text)
        train = self._layout(config).train
        names = class_names(train)
        side = config.image_size
        size = (side, side) if side else _common_size(images_by_class(train, names).paths, at_most=_PROBED)
        return DatasetInfo(len(names), (3, *size))

    def on_disk(self, config: DataConfig) -> bool:
        """Only where the root is given: the folder of all datasets, its default, would look like one of classes."""
        return config.root is not None

    def folder(self, config: DataConfig) -> Path:
        """The root itself."""
        return data_root(config)

    def missing(self, config: DataConfig) -> str | None:
        """Looks for the folder."""
        remedy = "put the images into a folder for each class there, or into train/<class> and test/<class>"
        if config.root is None:
            return f"dataset {config.name!r}: data.root must name the folder of the images; {remedy}"
        if not self.folder(config).is_dir():
            return f"dataset {config.name!r}: {self.folder(config)} is no folder; {remedy}"
        return None

    def files(self, config: DataConfig) -> Iterable[Path]:
        """The images."""
        train, test = self._images(config)
        return [Path(path) for path in (*train.paths, *(test.paths if test else ()))]

    def read(self, config: DataConfig) -> Parts:
        """Paths; images are decoded when they come into a batch."""
        train, test = self._images(config)
        side = config.image_size
        size = (side, side) if side else _common_size((*train.paths, *(test.paths if test else ())))
        fitted = side is not None
        return Parts(
            train.split(size, fitted=fitted, workers=config.workers or 0),
            None if test is None else test.split(size, fitted=fitted, workers=config.workers or 0),
        )

    def _images(self, config: DataConfig) -> tuple[Images, Images | None]:
        layout = self._layout(config)
        names = class_names(layout.train)
        train = images_by_class(layout.train, names)
        if layout.test is None:
            return train, None
        _check_same_classes(layout.test, class_names(layout.test), layout.train, names)
        return train, images_by_class(layout.test, names)

    def _layout(self, config: DataConfig) -> _Layout:
        root = self.folder(config)
        given: dict[str, Path] = {}
        for part, name in config.kwargs.items():
            if not isinstance(name, str) or not (root / name).is_dir():
                raise ValueError(
                    f"dataset {config.name!r}: data.kwargs.{part} = {name!r}: must be the name of a folder in {root}"
                )
            given[part] = root / name
        tests = [given["test"]] if "test" in given else [root / n for n in ("val", "test") if (root / n).is_dir()]
        if len(tests) == 2:
            raise ValueError(
                f"{root}: has both val and test; say which is the test part: data.kwargs: {{test: test}} or {{test: val}}"
            )
        test = tests[0] if tests else None
        if "train" in given or (root / "train").is_dir():
            return _Layout(given.get("train", root / "train"), test)
        if test is not None:
            raise ValueError(
                f"{root}: has {test.name} but no train; say which folder is the training part: data.kwargs: {{train: …}}"
            )
        return _Layout(root, None)


# --- files ----------------------------------------------------------------------------------------------------------


def class_names(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted: its classes.

    Raises:
        ValueError: fewer than two; the images of all classes in one folder would otherwise pass for a single class.
    """
    names = _subfolders(folder)
    if len(names) >= 2:
        return names
    loose = sum(1 for entry in os.scandir(folder) if _is_image(entry.name))
    found = f"only the folder {names[0]}" if names else "no folders"
    raise ValueError(
        f"{folder}: has {found}{f' and {loose} loose images' if loose else ''}, but must have a folder for each class; "
        "sort the images into them"
    )


def images_by_class(folder: Path, names: Sequence[str]) -> Images:
    """All image files at any depth below the folders of the classes, sorted.

    Raises:
        ValueError: a class without an image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS
    from torchvision.datasets.folder import make_dataset

    numbers = {name: number for number, name in enumerate(names)}
    found = Images(make_dataset(folder, numbers, extensions=IMG_EXTENSIONS, allow_empty=True))
    empty = sorted(set(range(len(names))) - set(found.labels))
    if empty:
        raise ValueError(
            f"{folder / names[empty[0]]}: has no image ({', '.join(IMG_EXTENSIONS)}); add some or remove the folder"
        )
    return found


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read: {error.strerror or error}") from error


def _is_image(name: str) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return name.lower().endswith(IMG_EXTENSIONS)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _check_count(folder: Path, names: Sequence[str], expected: int) -> None:
    if len(names) != expected:
        raise ValueError(
            f"{folder}: has {len(names)} classes, not {expected}; complete it, or, if it is a part of the dataset, "
            f"set data.kwargs: {{num_classes: {len(names)}}}"
        )


def _check_same_classes(folder: Path, names: Sequence[str], train: Path, expected: Sequence[str]) -> None:
    if list(names) != list(expected):
        raise ValueError(
            f"{folder}: its classes are not those of {train}, by whose order they are numbered: "
            f"{_unlike(names, expected)}; make the folders the same"
        )


def _unlike(names: Sequence[str], expected: Sequence[str]) -> str:
    """How two lists of names differ, by a few examples."""
    sides = {"lacks": sorted(set(expected) - set(names)), "has besides": sorted(set(names) - set(expected))}
    return ", ".join(
        f"{verb} {', '.join(some[:3])}{f' and {len(some) - 3} more' if len(some) > 3 else ''}"
        for verb, some in sides.items()
        if some
    )


def _common_size(paths: Sequence[str], at_most: int | None = None) -> tuple[int, int]:
    """Height and width of all images, or of some evenly spaced ones, by their headers."""
    step = max(1, len(paths) // at_most) if at_most else 1
    first = paths[0]
    size = _stored_size(first)
    for path in paths[::step]:
        if _stored_size(path) != size:
            raise ValueError(
                f"{path}: is not of the size of {first}, {size[1]} × {size[0]} pixels; "
                "set data.image_size, the side that all are to have"
            )
    return size


def _stored_size(path: str) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}; replace or remove the file") from error
