"""Datasets by name: their shape, whether their files are there, and how they are split."""

import dataclasses
import functools
import hashlib
import http.client
import importlib.util
import inspect
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_topkd.config import DataConfig
from tune_topkd.config import unknown_choice
from tune_topkd.config import what
from tune_topkd.config import without
from tune_topkd.data import glyphs
from tune_topkd.data.batches import EVAL_BATCH
from tune_topkd.data.batches import raw_batches
from tune_topkd.data.errors import DataError
from tune_topkd.data.errors import DatasetNameError
from tune_topkd.data.folders import ImageFolder
from tune_topkd.data.folders import ImageNet
from tune_topkd.data.folders import TinyImageNet
from tune_topkd.data.formats import Cifar
from tune_topkd.data.formats import Stl10
from tune_topkd.data.identity import content_hash
from tune_topkd.data.identity import split_content
from tune_topkd.data.identity import tensors
from tune_topkd.data.outside import outside_source
from tune_topkd.data.randomness import SAMPLE
from tune_topkd.data.randomness import random_order
from tune_topkd.data.sources import Constants
from tune_topkd.data.sources import Generated
from tune_topkd.data.sources import Parts
from tune_topkd.data.sources import Source
from tune_topkd.data.sources import check_kwargs
from tune_topkd.data.sources import data_root
from tune_topkd.data.splits import AnySplit
from tune_topkd.data.splits import Dataset
from tune_topkd.data.splits import DatasetInfo
from tune_topkd.data.splits import FileSplit
from tune_topkd.data.splits import Split
from tune_topkd.data.splits import stratified
from tune_topkd.data.views import resized
from tune_topkd.user_code import is_users

MEASURED_FILES = 10_000
"""Image files that mean and standard deviation are measured on: a random sample of the training split, if it has
more."""

CHECKED_IMAGES = 32
"""Training images that are checked where mean and standard deviation are known."""

_RESIZED_AT_ONCE = 4096


def dataset_names() -> list[str]:
    """The datasets of this project, by the names that `load_dataset` knows."""
    return sorted(SOURCES)


def dataset_info(config: DataConfig) -> DatasetInfo:
    """Number of classes and shape of the images of batches; loads no images, and reads the disk only for image_folder.

    Raises:
        DataError: an unknown name or argument, or what is needed from the disk is not there.
    """
    info = _source(config).info(config)
    if config.image_size is None:
        return info
    return DatasetInfo(info.num_classes, (info.image_shape[0], config.image_size, config.image_size))


def needs_files(config: DataConfig) -> bool:
    """Whether the dataset is read from files below `data_root`; False of one that cannot be used."""
    try:
        return _named(config.name).on_disk(config)
    except DataError:
        return False


def missing_data(config: DataConfig) -> str | None:
    """What must be put where before the dataset can be loaded; None if the files are there or can be downloaded.

    Looks at names alone; the files may still be damaged.

    Raises:
        DataError: an unknown name or argument.
    """
    return None if config.download else _source(config).missing(config)


def data_notes(config: DataConfig) -> list[str]:
    """What a person should know of a dataset: files that are not read, or lose something; empty if the files are
    missing.

    Raises:
        DataError: an unknown name or argument, files that are not laid out as they must be, or an image that cannot be
            decoded among those that are looked at.
    """
    source = _source(config)
    return [] if source.missing(config) is not None else list(source.notes(config))


def fingerprint(config: DataConfig, dataset: Dataset | None = None) -> str:
    """16 hex digits for the images and labels, wherever they lie; downloads if told to.

    Of the few files of CIFAR and STL-10, and of the digits, all bytes count. Of folders of images, all names and sizes
    and the bytes of lists and of `identity.SAMPLED` images count: an image outside the sample that is replaced by
    another of the same size goes unnoticed. Of glyphs, the fonts and some images count. Of a user's dataset, what its
    `Source.identity` says. A file whose times have not changed is not hashed again by the same process.

    Args:
        config: names the dataset.
        dataset: what `load_dataset` or `load_saved` gave for it; spares reading a user's dataset that has no identity of
            its own.

    Raises:
        DataError: an unknown name or argument, or files that are missing, empty or not laid out as they must be.
    """
    source = _source(config)
    _get(source, config)
    identity = source.identity(config)
    if identity is None:
        whole, folder = dataset or load_dataset(config), source.folder(config)
        identity = [split_content(split, folder) for split in (whole.train, whole.val, whole.test)]
    text = json.dumps([config.kwargs, identity], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_readable(config: DataConfig) -> None:
    """Read a user's dataset whose files are there, which shows whether it keeps to what `Source` asks of it.

    Raises:
        DataError: it does not, or it cannot be split as the config says.
    """
    if is_users(config.name) and _source(config).missing(config) is None:
        load_dataset(config)


def load_dataset(config: DataConfig) -> Dataset:
    """The dataset of a config, on the CPU, split as the config says; cached in memory.

    The validation split is drawn from the training part; so is the test split where the dataset has no test part.

    Raises:
        DataError: an unknown name or argument; files that are missing, cannot be downloaded, are damaged or not laid
            out as they must be; or fractions that leave a split without an image of some class.
    """
    _get(_source(config), config)
    root = str(data_root(config)) if needs_files(config) else ""  # each trial has its own working directory
    return _loaded(read_as(config), root, config.workers or 0)


def read_as(config: DataConfig) -> str:
    """Everything in a config that the images, labels and splits of a dataset depend on besides its files, as JSON."""
    return json.dumps(without(what(config), ["augment"]))


@functools.lru_cache(maxsize=2)  # the trials of a sweep share a process and a dataset
def _loaded(text: str, root: str, workers: int) -> Dataset:
    config = DataConfig.model_validate_json(text).model_copy(update={"root": root, "workers": workers})
    return split_dataset(_source(config), config)


def split_dataset(source: Source, config: DataConfig) -> Dataset:
    """The images of a source, split and prepared as a config says; `load_dataset` without its cache.

    Raises:
        DataError: as `load_dataset`, but that the files must be there.
    """
    whole, own_test, classes = source.read(config)
    num_classes = source.info(config).num_classes
    fractions = (config.val_fraction,) if own_test is not None else (config.val_fraction, config.test_fraction)
    indices = stratified(whole.labels, fractions, config.split_seed)
    test = whole.subset(indices[1]) if own_test is None else own_test
    val, train = whole.subset(indices[0]), whole.subset(indices[-1])
    searched = train  # what a search with this config trains on
    if config.selection != "validation":
        train = whole.subset(torch.cat([indices[0], indices[-1]]).sort().values)
    is_val_test = config.selection in ("test_at_end", "best_test_epoch")
    names = classes or tuple(map(str, range(num_classes)))
    counts = whole.labels.bincount(minlength=num_classes).tolist()
    del whole
    for kind, split in {"training": train, "validation": val, "test": test}.items():
        lacking = [label for label, count in enumerate(split.labels.bincount(minlength=num_classes)) if not count]
        if lacking and split is own_test:
            told = _told([f"{names[label]}" for label in lacking])
            raise DataError(f"dataset {config.name!r}: its test part has no image of {told}; complete it")
        if lacking:
            told = _told([f"{names[label]} ({counts[label]} in all)" for label in lacking])
            raise DataError(_left_without(config, kind, told, has_own_test=own_test is not None))
    train, test = _prepared(train, config), _prepared(test, config)
    val = test if is_val_test else _prepared(val, config)
    of_all = config.selection in ("validation", "best_test_epoch")
    constants = _constants(source, config, train if of_all else _prepared(searched, config))
    return Dataset(train, val, test, num_classes, constants.mean, constants.std, config.selection)


def _told(classes: list[str]) -> str:
    more = f" and {len(classes) - 3} more" if len(classes) > 3 else ""
    return f"{'class' if len(classes) == 1 else 'classes'} {', '.join(classes[:3])}{more}"


def _left_without(config: DataConfig, kind: str, classes: str, *, has_own_test: bool) -> str:
    """The message about fractions that leave a split without an image of some classes."""
    fractions = {"val_fraction": config.val_fraction}
    if not has_own_test:
        fractions["test_fraction"] = config.test_fraction
    asked_for = " and ".join(f"{name} = {value:g}" for name, value in fractions.items())
    change = {
        "training": f"lower {' or '.join(f'data.{name}' for name in fractions)}",
        "validation": "raise data.val_fraction",
        "test": "raise data.test_fraction",
    }
    return (
        f"dataset {config.name!r}: {asked_for} {'leaves' if has_own_test else 'leave'} the {kind} split without an image "
        f"of {classes}; {change[kind]}, add images, or remove what has too few"
    )


def _prepared(split: AnySplit, config: DataConfig) -> AnySplit:
    """The split with the config's image size and workers.

    Images in memory that are larger than that size are resized once, smaller ones batch by batch.
    """
    side = config.image_size
    if isinstance(split, FileSplit):
        size = split.size if side is None else (side, side)
        return dataclasses.replace(
            split, size=size, fitted=split.fitted or side is not None, workers=config.workers or 0
        )
    if side is not None and max(split.images.shape[-2:]) > side:
        images = torch.cat([resized(some, side) for some in torch.split(split.images, _RESIZED_AT_ONCE)])
        return Split(images, split.labels, workers=config.workers or 0)
    if split.images.shape[-2:] == (side, side):
        side = None
    return dataclasses.replace(split, image_size=side, workers=config.workers or 0)


def _get(source: Source, config: DataConfig) -> None:
    """Make sure that the files are there; download them if the config says so."""
    text = source.missing(config)
    if text is None:
        return
    failure = ""
    if config.download:
        try:
            failure = "" if source.download(config) else "; it cannot be downloaded by itself"
        except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
            failure = f"; downloading failed: {' '.join(str(error).split()) or type(error).__name__}"
        text = source.missing(config)
    if text is not None or failure:
        raise DataError(f"{text or f'dataset {config.name!r}'}{failure}")


# --- constants of the normalisation ---------------------------------------------------------------------------------


def _constants(source: Source, config: DataConfig, train: AnySplit) -> Constants:
    """The constants of the config, those of the field, or else those of the training split; its pixels are checked."""
    known = _known_constants(source, config, train.batch_shape[0])
    if known is None and isinstance(train, Split):
        looked_at: AnySplit = train
        batches = iter(torch.split(train.images, EVAL_BATCH))
    else:
        most = MEASURED_FILES if known is None else CHECKED_IMAGES
        looked_at = train.subset(random_order(len(train), config.split_seed, 0, SAMPLE, train.device)[:most])
        if known is not None:
            looked_at = dataclasses.replace(looked_at, workers=0)  # starting a process takes longer
        batches = (images for images, _ in raw_batches(looked_at, 64))
    mean, std = _channel_statistics(batches)
    if known is None or not any(std):
        _check_pixels(config, mean, std, looked_at)
    return known or Constants(mean, std)


def _known_constants(source: Source, config: DataConfig, channels: int) -> Constants | None:
    if config.mean is None or config.std is None:
        return source.constants
    if len(config.mean) != channels:
        raise DataError(
            f"dataset {config.name!r}: data.mean and data.std need one number per channel, {channels}, "
            f"but have {len(config.mean)}"
        )
    return Constants(tuple(config.mean), tuple(config.std))


def _check_pixels(config: DataConfig, mean: tuple[float, ...], std: tuple[float, ...], looked_at: AnySplit) -> None:
    """Refuse images that are all of one colour, and a channel without variance where the statistics are the images'
    own."""
    file = f" (the first of them: {looked_at.paths[0]})" if isinstance(looked_at, FileSplit) else ""
    start = f"dataset {config.name!r}: the {len(looked_at):,} training images looked at{file}"
    values = [round(255 * value) for value in mean]
    if not any(std):
        shown = values[0] if len(set(values)) == 1 else tuple(values)
        raise DataError(f"{start} are all of one colour, {shown} of 255; look at how they were written")
    for channel, value in enumerate(values):
        if not std[channel]:
            raise DataError(
                f"{start} all have {value} in channel {channel + 1} of {len(values)}, which cannot be brought to a standard "
                "deviation of 1; set data.mean and data.std"
            )


def _channel_statistics(batches: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, with pixels from 0 to 1.

    The sums are of integers, so that they depend neither on how the images are batched nor on the number of threads.
    """
    total, squares, count = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64), 0
    for images in batches:
        pixels = images.transpose(0, 1).flatten(1).long()
        total, squares, count = total + pixels.sum(1), squares + pixels.square().sum(1), count + pixels.shape[1]
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp_min(0).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


# --- the registry ---------------------------------------------------------------------------------------------------


def _load_digits() -> Split:
    from sklearn.datasets import load_digits  # imported here: slow, and only this dataset needs it

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)
    return Split(images[:, None].contiguous(), torch.from_numpy(bunch.target).long())


def _digits_hash() -> str:
    """A hash of the file that scikit-learn reads, without importing it; if the file is elsewhere, of the digits."""
    spec = importlib.util.find_spec("sklearn")
    for place in (spec and spec.submodule_search_locations) or ():
        path = Path(place) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return content_hash(str(path))
    made = _load_digits()
    return tensors([made.images, made.labels])


class _Glyphs(Source):
    """Rendered characters with a test part of their own; takes the arguments of `glyphs.load`."""

    kwargs = frozenset(inspect.signature(glyphs.load).parameters)

    def info(self, config: DataConfig) -> DatasetInfo:
        return DatasetInfo(len(glyphs.CHARACTERS), (3, glyphs.SIDE, glyphs.SIDE))

    def on_disk(self, config: DataConfig) -> bool:
        return False

    def read(self, config: DataConfig) -> Parts:
        arguments: dict[str, Any] = config.kwargs
        train, test = glyphs.load(**arguments)
        return Parts(Split(*train), Split(*test))

    def identity(self, config: DataConfig) -> object:
        """A hash of the fonts and of an image of each class, which changes with Pillow and numpy."""
        return glyphs.identity(config.kwargs.get("seed", 0))


CIFAR100_CONSTANTS = Constants((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
CIFAR10_CONSTANTS = Constants((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
STL10_CONSTANTS = Constants((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2712))

SOURCES: dict[str, Source] = {
    "cifar10": Cifar(vision="CIFAR10", num_classes=10, side=32, constants=CIFAR10_CONSTANTS, key="labels"),
    "cifar100": Cifar(vision="CIFAR100", num_classes=100, side=32, constants=CIFAR100_CONSTANTS, key="fine_labels"),
    "digits": Generated(DatasetInfo(num_classes=10, image_shape=(1, 8, 8)), _load_digits, _digits_hash),
    "glyphs": _Glyphs(),
    "image_folder": ImageFolder(),
    "imagenet": ImageNet(),
    "stl10": Stl10(vision="STL10", num_classes=10, side=96, constants=STL10_CONSTANTS),
    "tiny_imagenet": TinyImageNet(),
}


def _source(config: DataConfig) -> Source:
    source = _named(config.name)
    check_kwargs(config, source.kwargs)
    return source


def _named(name: str) -> Source:
    if is_users(name):
        return outside_source(name)
    if name not in SOURCES:
        hint = f"{unknown_choice(name, SOURCES)}; or a source of your own: package.module:source"
        raise DatasetNameError(f"unknown dataset {name!r}; {hint}")
    return SOURCES[name]
