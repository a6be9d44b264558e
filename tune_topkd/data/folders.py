"""Datasets that are folders of image files: Tiny-ImageNet, ImageNet, and any with a folder for each class."""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tune_topkd.config import DataConfig
from tune_topkd.data.errors import DataError
from tune_topkd.data.identity import many_files
from tune_topkd.data.notes import image_notes
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
from tune_topkd.data.walking import ENDINGS
from tune_topkd.data.walking import Listing
from tune_topkd.data.walking import composed
from tune_topkd.data.walking import has_image
from tune_topkd.data.walking import in_both
from tune_topkd.data.walking import listing
from tune_topkd.data.walking import subfolders

_DECODED_AT_ONCE = 256
_PROBED = 200
"""Images whose size is checked before anything is loaded; when they are loaded, all are checked."""


def _missing_parts(config: DataConfig, folder: Path, remedy: str) -> str | None:
    """The message about a folder without train or val; None if it has both."""
    absent = [name for name in ("train", "val") if not (folder / name).is_dir()]
    return put_there(config, f"{folder} has no {' and no '.join(absent)}", remedy) if absent else None


class Images:
    """The image files of a part: a path and a class number for each, and the listings that they were found in."""

    def __init__(self, found: Iterable[tuple[str, int]], listings: Sequence[Listing], classes: Sequence[str]) -> None:
        pairs = list(found)
        self.paths = tuple(path for path, _ in pairs)
        self.labels = [label for _, label in pairs]
        self.listings = tuple(listings)
        self.classes = tuple(classes)

    def split(self, size: tuple[int, int], *, fitted: bool, workers: int) -> FileSplit:
        """The part as a split that decodes them batch by batch."""
        return FileSplit(self.paths, torch.tensor(self.labels), size, fitted, workers)

    def others(self) -> Counter[str]:
        """Number of files beside the images that are neither images nor texts, by their ending."""
        return sum((found.others for found in self.listings), Counter())


def _all_paths(parts: Iterable[Images]) -> Iterable[str]:
    return (path for images in parts for path in images.paths)


# --- Tiny-ImageNet --------------------------------------------------------------------------------------------------


class TinyImageNet(Source):
    """Tiny-ImageNet: images of 64 × 64, decoded into memory once; its labelled `val` is the test part.

    `val` may have the published layout, with `val_annotations.txt`, or a folder for each class; the images of a class
    are in its folder or in a subfolder `images`. Classes are numbered in the order of their sorted names.
    """

    kwargs = frozenset({"num_classes"})
    constants = Constants((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))
    _side = 64

    def info(self, config: DataConfig) -> DatasetInfo:
        """Known beforehand."""
        return DatasetInfo(class_count(config, 200), (3, self._side, self._side))

    def folder(self, config: DataConfig) -> Path:
        """The folder that the archive unpacks to."""
        return data_root(config) / "tiny-imagenet-200"

    def missing(self, config: DataConfig) -> str | None:
        """Looks for train and val."""
        folder = self.folder(config)
        remedy = f"unpack tiny-imagenet-200.zip (http://cs231n.stanford.edu/tiny-imagenet-200.zip) into {folder.parent}"
        return _missing_parts(config, folder, remedy)

    def identity(self, config: DataConfig) -> object:
        """The images, and the lists if there are any."""
        folder, images = self.folder(config), self.images(config)
        lists = [folder / "wnids.txt", folder / "val" / "val_annotations.txt"]
        return many_files(folder, _all_paths(images), [str(path) for path in lists if path.is_file()])

    def notes(self, config: DataConfig) -> Iterable[str]:
        """Notes on the images."""
        return image_notes(self.images(config))

    def read(self, config: DataConfig) -> Parts:
        """All images, decoded by `data.workers` processes."""
        images = self.images(config)
        train, test = (_in_memory(part, self._side, config.workers or 0) for part in images)
        return Parts(train, test, images[0].classes)

    def images(self, config: DataConfig) -> tuple[Images, Images]:
        """The image files of the training and the test part."""
        folder, count = self.folder(config), class_count(config, 200)
        folders = class_folders(folder / "train")
        listed = folder / "wnids.txt"
        if listed.is_file():
            expected = sorted(set(composed(_text(listed)).split()))
            if expected != list(folders):
                raise DataError(
                    f"{folder / 'train'}: its classes are not those of wnids.txt: {_unlike(list(folders), expected)}; "
                    "unpack it again"
                )
        _check_count(folder / "train", folders, count)
        train = images_by_class(folders)
        return train, _apart(self._val(folder / "val", list(folders)), train)

    def _val(self, folder: Path, names: Sequence[str]) -> Images:
        there = subfolders(folder)
        flat = there.pop("images", None)
        raw = listing(flat, deep=False) if flat else Listing("", "")
        within = subfolders(flat) if flat else {}
        if bool(there) + bool(within) + bool(raw.images) > 1:
            kinds = [f"{len(raw.images)} images lie in images/"] if raw.images else []
            kinds += ["others in folders of classes"] if there else []
            kinds += ["others in folders of classes in images/"] if within else []
            raise DataError(f"{folder}: is half sorted: {' and '.join(kinds)}; unpack it again, or finish sorting")
        if there or within:
            _check_same_classes(folder, there or within, folder.parent / "train", names)
            return images_by_class(there or within)
        return self._annotated(folder, names, raw)

    def _annotated(self, folder: Path, names: Sequence[str], raw: Listing) -> Images:
        """`val` in its published layout, where a list names the class of each file."""
        listed = folder / "val_annotations.txt"
        if not listed.is_file():
            raise DataError(
                f"{folder}: has neither val_annotations.txt, which says the class of each of images/, nor a folder for "
                "each class; unpack tiny-imagenet-200.zip again"
            )
        classes = _annotations(listed, names)
        found = {composed(Path(path).name): path for path in raw.images}
        if classes.keys() != found.keys():
            raise DataError(
                f"{listed}: its files are not those of images/: {_unlike(sorted(classes), sorted(found))}; unpack it again"
            )
        return Images(((found[file], classes[file]) for file in sorted(found)), [raw], names)


def _annotations(listed: Path, names: Sequence[str]) -> dict[str, int]:
    """The class number of each file: a line has the file's name, a tab or blanks, its class, and fields not needed
    here."""
    label = {name: number for number, name in enumerate(names)}
    found: dict[str, int] = {}
    for number, line in enumerate(composed(_text(listed)).splitlines(), start=1):
        if not line.strip():
            continue
        fields = [part.strip() for part in line.split("\t")] if "\t" in line else line.split()
        file, wnid, *_ = [*fields, ""]
        if wnid not in label:
            raise DataError(f"{listed}: line {number}: the class {wnid!r} of {file!r} is not a class of train")
        if found.setdefault(file, label[wnid]) != label[wnid]:
            raise DataError(
                f"{listed}: line {number}: {file!r} has another class in an earlier line; one of them is wrong"
            )
    return found


def _in_memory(images: Images, side: int, workers: int) -> Split:
    split = images.split((side, side), fitted=False, workers=workers)
    pixels = torch.empty(len(split), 3, side, side, dtype=torch.uint8)
    batches = torch.split(torch.arange(len(split)), _DECODED_AT_ONCE)
    for indices, (decoded, _) in zip(batches, views_of(split, batches), strict=True):
        pixels[indices] = decoded
    return Split(pixels, split.labels)


# --- ImageNet -------------------------------------------------------------------------------------------------------


class ImageNet(Source):
    """ImageNet-1k: `train/<wnid>` and `val/<wnid>`, the test part. Classes are numbered in the order of their names."""

    kwargs = frozenset({"num_classes"})
    constants = Constants((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    _side = 224

    def info(self, config: DataConfig) -> DatasetInfo:
        """Known beforehand."""
        return DatasetInfo(class_count(config, 1000), (3, self._side, self._side))

    def folder(self, config: DataConfig) -> Path:
        """`imagenet` below the root."""
        return data_root(config) / "imagenet"

    def missing(self, config: DataConfig) -> str | None:
        """Looks for train and val."""
        folder = self.folder(config)
        remedy = (
            f"put the images of ILSVRC2012 (https://image-net.org) into {folder}/train/<wnid> and {folder}/val/<wnid>"
        )
        return _missing_parts(config, folder, remedy)

    def identity(self, config: DataConfig) -> object:
        """The images."""
        return many_files(self.folder(config), _all_paths(self.images(config)))

    def notes(self, config: DataConfig) -> Iterable[str]:
        """Notes on the images."""
        return image_notes(self.images(config))

    def read(self, config: DataConfig) -> Parts:
        """The paths; images are decoded when they come into a batch."""
        side = config.image_size or self._side
        images = self.images(config)
        train, test = (part.split((side, side), fitted=True, workers=config.workers or 0) for part in images)
        return Parts(train, test, images[0].classes)

    def images(self, config: DataConfig) -> tuple[Images, Images]:
        """The image files of the training and the test part."""
        train, val = self.folder(config) / "train", self.folder(config) / "val"
        folders, tested = class_folders(train), class_folders(val)
        _check_count(train, folders, class_count(config, 1000))
        _check_same_classes(val, tested, train, list(folders))
        images = images_by_class(folders)
        return images, _apart(images_by_class(tested), images)


# --- a folder for each class ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    train: Path
    test: Path | None


class ImageFolder(Source):
    """Images in a folder for each class: `train/<class>` and `val/<class>` or `test/<class>`, or `<class>` alone.

    `data.root` is the folder of these folders. Classes are numbered in the order of their sorted names. Where the names
    do not tell parts from classes, `data.kwargs` does: `{train: …, test: …}` names the parts, `{train: .}` makes all
    folders classes.
    """

    kwargs = frozenset({"train", "test"})

    def info(self, config: DataConfig) -> DatasetInfo:
        """The number of classes, and data.image_size or the size of the images, of which some are looked at."""
        text = self.missing(config)
        if text is not None:
            raise DataError(text)
        train = self._layout(config).train
        folders = class_folders(train)
        side = config.image_size
        size = (side, side) if side else _common_size(images_by_class(folders).paths, at_most=_PROBED)
        return DatasetInfo(len(folders), (3, *size))

    def on_disk(self, config: DataConfig) -> bool:
        """Only if the root is given: by default it is the folder of all datasets, which looks like a folder of
        classes."""
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
            return f"dataset {config.name!r}: {self.folder(config)} is not a folder; {remedy}"
        return None

    def identity(self, config: DataConfig) -> object:
        """The images."""
        return many_files(self.folder(config), _all_paths(self.images(config)))

    def notes(self, config: DataConfig) -> Iterable[str]:
        """Notes on the images."""
        return image_notes(self.images(config))

    def read(self, config: DataConfig) -> Parts:
        """The paths; images are decoded when they come into a batch."""
        images = self.images(config)
        side = config.image_size
        size = (side, side) if side else _common_size([path for part in images for path in part.paths])
        parts = [part.split(size, fitted=side is not None, workers=config.workers or 0) for part in images]
        return Parts(parts[0], parts[1] if len(parts) == 2 else None, images[0].classes)

    def images(self, config: DataConfig) -> tuple[Images, ...]:
        """The image files of the training part, and of the test part if there is one."""
        layout = self._layout(config)
        folders = class_folders(layout.train)
        train = images_by_class(folders)
        if layout.test is None:
            return (train,)
        tested = class_folders(layout.test)
        _check_same_classes(layout.test, tested, layout.train, list(folders))
        return train, _apart(images_by_class(tested), train)

    def _layout(self, config: DataConfig) -> _Layout:
        root = self.folder(config)
        given = {part: _part(config, root, part, name) for part, name in config.kwargs.items()}
        if given.get("train") == root:
            if "test" in given:
                raise DataError(
                    f"dataset {config.name!r}: data.kwargs.test: with train: . each folder of {root} is a class, and "
                    "there is no test part; leave it out, or move the test part elsewhere"
                )
            return _Layout(root, None)
        if not given:
            _check_unambiguous(root)
        tests = [given["test"]] if "test" in given else [root / n for n in ("val", "test") if (root / n).is_dir()]
        if len(tests) == 2:
            raise DataError(
                f"{root}: has both val and test; say which is the test part: data.kwargs: {{test: test}} or {{test: val}}"
            )
        test = tests[0] if tests else None
        if "train" in given or (root / "train").is_dir():
            return _Layout(given.get("train", root / "train"), test)
        if test is not None:
            raise DataError(
                f"{root}: has {test.name} but no train; say which folder is the training part: data.kwargs: {{train: …}}, "
                "or, if each folder is a class, {train: .}"
            )
        return _Layout(root, None)


_PARTS = ("train", "val", "test")
_LIKE_PARTS = frozenset({*_PARTS, "training", "valid", "validation", "dev", "testing", "eval", "evaluation"})


def _part(config: DataConfig, root: Path, part: str, name: object) -> Path:
    if not isinstance(name, str) or not (root / name).is_dir():
        raise DataError(
            f"dataset {config.name!r}: data.kwargs.{part} = {name!r}: must be the name of a folder in {root}"
        )
    return root / name


def _check_unambiguous(root: Path) -> None:
    """Refuse folders whose names do not say whether they are parts or classes: train, bus and car, or Train and Test.

    They are parts if train holds nothing but folders for classes, and another part holds the same ones or no other
    folder holds an image.
    """
    folders = subfolders(root)
    parts = [name for name in folders if name in _PARTS]
    if parts and "train" in folders:
        within = subfolders(folders["train"])
        is_clean = bool(within) and not listing(folders["train"], deep=False).images
        has_twin = any(list(subfolders(folders[name])) == list(within) for name in parts if name != "train")
        others = [name for name in folders if name not in parts and has_image(folders[name])]
        if is_clean and (has_twin or not others):
            return
    elif parts or not folders or not all(name.lower() in _LIKE_PARTS for name in folders):
        return
    raise DataError(
        f"{root}: its folders ({_some(list(folders))}) may be parts of the dataset or classes; say which: data.kwargs: "
        "{train: …, test: …} names the folders of the parts, in each of which is a folder for each class (test may be "
        "left out), {train: .} takes each folder for a class"
    )


# --- files ----------------------------------------------------------------------------------------------------------


def class_folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder, its classes, by their sorted names.

    Raises:
        DataError: there are fewer than two, as where the images of all classes lie in one folder.
    """
    found = subfolders(folder)
    if len(found) >= 2:
        return found
    loose = len(listing(folder, deep=False).images)
    there = f"only the folder {next(iter(found))}" if found else "no folders"
    raise DataError(
        f"{folder}: has {there}{f' and {loose} loose images' if loose else ''}, but must have a folder for each class; "
        "sort the images into them"
    )


def images_by_class(folders: Mapping[str, Path]) -> Images:
    """All image files at any depth below the folders of the classes, sorted.

    Raises:
        DataError: a class has no image, or links put an image into two classes.
    """
    listings = [listing(folder) for folder in folders.values()]
    for found in listings:
        if not found.images:
            raise DataError(f"{found.folder}: has no image ({', '.join(ENDINGS)}); add some or remove the folder")
    twice = in_both(listings)
    if twice is not None:
        raise DataError(f"{twice[1]}: is the same file as {twice[0]}, which is in another class; remove one of them")
    pairs = ((path, number) for number, found in enumerate(listings) for path in found.images)
    return Images(pairs, listings, list(folders))


def _apart(test: Images, train: Images) -> Images:
    """The test part, checked to share no file with the training part."""
    twice = in_both([*train.listings, *test.listings])
    if twice is not None:
        raise DataError(
            f"{twice[1]}: is the same file as {twice[0]}: what is trained on cannot be tested on; remove one of them"
        )
    return test


def _text(path: Path) -> str:
    """A text in UTF-8, or in UTF-16 if its first bytes say so."""
    try:
        content = path.read_bytes()
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _check_count(folder: Path, names: Mapping[str, Path], expected: int) -> None:
    if len(names) != expected:
        raise DataError(
            f"{folder}: has {len(names)} classes, not {expected}; complete it, or, if it is a part of the dataset, "
            f"set data.kwargs: {{num_classes: {len(names)}}}"
        )


def _check_same_classes(folder: Path, names: Iterable[str], train: Path, expected: Sequence[str]) -> None:
    names = list(names)
    if names != list(expected):
        raise DataError(
            f"{folder}: its classes are not those of {train}, by whose order they are numbered: "
            f"{_unlike(names, expected)}; make the folders the same"
        )


def _unlike(names: Sequence[str], expected: Sequence[str]) -> str:
    """How two lists of names differ, by a few examples."""
    sides = {"lacks": sorted(set(expected) - set(names)), "has besides": sorted(set(names) - set(expected))}
    return ", ".join(f"{verb} {_some(some)}" for verb, some in sides.items() if some)


def _some(names: Sequence[str]) -> str:
    """The first three names, and the number of the others."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _common_size(paths: Sequence[str], at_most: int | None = None) -> tuple[int, int]:
    """Height and width of the images, which all of them, or `at_most` evenly spaced ones, must have."""
    step = max(1, len(paths) // at_most) if at_most else 1
    first = paths[0]
    size = _stored_size(first)
    for path in paths[::step]:
        if _stored_size(path) != size:
            raise DataError(
                f"{path}: has not the size of {first}, {size[1]} × {size[0]} pixels; "
                "set data.image_size, to which all are resized"
            )
    return size


def _stored_size(path: str) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}; replace or remove the file") from error
