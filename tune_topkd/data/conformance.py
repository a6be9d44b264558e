"""Whether a dataset keeps what `Source` promises: for the tests of whoever writes one."""

import json
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import torch

from tune_topkd.config import DataConfig
from tune_topkd.data.batches import raw_batches
from tune_topkd.data.datasets import split_dataset
from tune_topkd.data.errors import DataError
from tune_topkd.data.identity import split_content
from tune_topkd.data.outside import CheckedSource
from tune_topkd.data.outside import made_source
from tune_topkd.data.sources import Parts
from tune_topkd.data.sources import Source
from tune_topkd.data.sources import check_kwargs

_SHOWN = 8
"""Images of each split that are decoded."""


def check_source(source: Source | Callable[[], Source], **data: Any) -> None:
    """Ask a dataset everything that a sweep asks of it, some of it twice.

        check_source(Flowers, root="tests/flowers", kwargs={"fold": 1})

    Args:
        source: a `Source`, or what gives one without arguments, such as its class.
        data: the `data` section of a config without its name. The files must be there, and each split must get an image
            of every class: for a small dataset, raise `val_fraction` and `test_fraction`.

    Raises:
        DataError: with every promise that is broken, a line each.
    """
    name = f"{getattr(source, '__module__', '')}:{getattr(source, '__qualname__', type(source).__qualname__)}"
    config = DataConfig(name=name, **data)
    if problems := list(_problems(made_source(source, name), config)):
        raise DataError("\n".join(problems))


def _problems(source: Source, config: DataConfig) -> Iterator[str]:
    """What is wrong, as far as the questions can be asked."""
    try:
        checked = CheckedSource(source, config.name)
        check_kwargs(config, checked.kwargs)
        if (text := checked.missing(config)) is not None:
            yield f"dataset {config.name!r}: missing(): its files must be there to be checked: {text}"
            return
        if checked.info(config) != checked.info(config):
            yield f"dataset {config.name!r}: info(): must give the same each time"
        parts = checked.read(config)
    except DataError as error:
        yield str(error)
        return
    for check in (_check_repeatable, _check_identity, _check_splits, _check_the_rest):
        try:
            check(checked, config, parts)
        except DataError as error:
            yield str(error)


def _check_repeatable(source: CheckedSource, config: DataConfig, parts: Parts) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # a source must not depend on the state of the generator
        again = source.read(config)
    if _content(again, source, config) != _content(parts, source, config):
        raise DataError(f"dataset {config.name!r}: read(): must give the same images and labels each time")


def _check_identity(source: CheckedSource, config: DataConfig, parts: Parts) -> None:
    texts = {json.dumps(source.identity(config), sort_keys=True) for _ in range(2)}
    otherwise = config.model_copy(update={"split_seed": config.split_seed + 1, "workers": 1, "image_size": 7})
    texts.add(json.dumps(source.identity(otherwise), sort_keys=True))
    if len(texts) > 1:
        rule = "must be the same each time, and depend on nothing but the images and labels"
        raise DataError(f"dataset {config.name!r}: identity(): {rule}")


def _check_splits(source: CheckedSource, config: DataConfig, parts: Parts) -> None:
    """Split the dataset, and decode some images of each split."""
    shape = source.info(config).image_shape
    for given in (config, config.model_copy(update={"image_size": max(shape[1:]) + 1})):
        dataset = split_dataset(source, given)
        for split in (dataset.train, dataset.val, dataset.test):
            some = split.subset(torch.arange(min(_SHOWN, len(split))))
            for images, _ in raw_batches(some):
                assert images.shape[1:] == some.batch_shape, "a split decodes to its own shape"


def _check_the_rest(source: CheckedSource, config: DataConfig, parts: Parts) -> None:
    channels = source.info(config).image_shape[0]
    constants = source.constants
    if constants is not None and not len(constants.mean) == len(constants.std) == channels:
        raise DataError(f"dataset {config.name!r}: constants must be one number for each of the {channels} channels")
    source.on_disk(config)
    source.folder(config)
    list(source.notes(config))


def _content(parts: Parts, source: CheckedSource, config: DataConfig) -> list[object]:
    return [part and split_content(part, source.folder(config)) for part in (parts.train, parts.test)]
