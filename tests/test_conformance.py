"""The check that a newcomer's dataset is run against: ours pass it, and each broken promise is told."""

import itertools
import random

import pytest
import torch
from test_datasets import WRITERS

from tune_topkd.data import DataError
from tune_topkd.data import DatasetInfo
from tune_topkd.data import FileSplit
from tune_topkd.data import Parts
from tune_topkd.data import Source
from tune_topkd.data import Split
from tune_topkd.data.conformance import check_source
from tune_topkd.data.datasets import SOURCES
from tune_topkd.data.sources import Constants

SPLITS = {"val_fraction": 0.25, "test_fraction": 0.25}


@pytest.mark.parametrize("name", WRITERS)
def test_our_datasets_in_files_keep_what_a_source_promises(tmp_path, name):
    write, config = WRITERS[name]
    write(tmp_path)
    check_source(SOURCES[name], **config(tmp_path).model_dump(exclude={"name", "augment"}))


def test_our_datasets_that_are_made_keep_what_a_source_promises():
    check_source(SOURCES["digits"])
    check_source(SOURCES["glyphs"], kwargs={"train_images": 400, "test_images": 100}, val_fraction=0.25)


class Numbers(Source):
    """Images that are their number, in three classes."""

    def info(self, config):
        return DatasetInfo(num_classes=3, image_shape=(1, 4, 4))

    def read(self, config):
        images = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 4, 4)
        return Parts(Split(images, torch.arange(60) % 3))


def test_a_source_of_info_and_read_is_enough():
    check_source(Numbers, **SPLITS)
    check_source(Numbers(), **SPLITS)


class WithoutItsFiles(Numbers):
    def missing(self, config):
        return "put them there"


class DrawnByTorch(Numbers):
    def read(self, config):
        train = super().read(config).train
        return Parts(Split(torch.randint_like(train.images, 255), train.labels))


class InAnyOrder(Numbers):
    def read(self, config):
        train = super().read(config).train
        return Parts(train.subset(torch.tensor(random.sample(range(60), 60))))


class Forgetful(Numbers):
    counts = itertools.count(3)

    def info(self, config):
        return DatasetInfo(num_classes=next(self.counts), image_shape=(1, 4, 4))


class KnownByItsSplit(Numbers):
    def identity(self, config):
        return [config.split_seed]


class KnownByChance(Numbers):
    def identity(self, config):
        return random.random()


class OfTooFewConstants(Numbers):
    constants = Constants((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))


class WithAnEmptyTest(Numbers):
    def read(self, config):
        train = super().read(config).train
        return Parts(train, train.subset(torch.arange(2)))


class OfFilesThatAreGone(Source):
    def info(self, config):
        return DatasetInfo(num_classes=2, image_shape=(3, 4, 4))

    def read(self, config):
        paths = tuple(f"/nowhere/{number}.png" for number in range(40))
        return Parts(FileSplit(paths, torch.arange(40) % 2, size=(4, 4), fitted=False))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (WithoutItsFiles, r"missing\(\): its files must be there to be checked: put them there"),
        (DrawnByTorch, r"read\(\): must give the same images and labels each time"),
        (InAnyOrder, r"read\(\): must give the same images and labels each time"),
        (Forgetful, r"info\(\): must give the same each time"),
        (KnownByItsSplit, r"identity\(\): must be the same each time, and depend on nothing but"),
        (KnownByChance, r"identity\(\): must be the same each time, and depend on nothing but"),
        (OfTooFewConstants, "constants must be one number for each of the 1 channels"),
        (WithAnEmptyTest, "its test part has no image of class 2"),
        (OfFilesThatAreGone, r"/nowhere/\d+\.png: cannot be read"),
        (Source, "cannot be made: TypeError: Can't instantiate abstract class Source"),
        (dict, r"must be a tune_topkd\.data\.Source or give one when it is called, but is a dict"),
    ],
)
def test_a_broken_promise_is_told(source, told):
    with pytest.raises(DataError, match=told):
        check_source(source, **SPLITS)


def test_all_that_is_broken_is_told_at_once():
    class Broken(KnownByChance, InAnyOrder, OfTooFewConstants):
        pass

    with pytest.raises(DataError) as error:
        check_source(Broken, **SPLITS)
    assert len(str(error.value).splitlines()) == 3


def test_an_unknown_argument_is_told():
    with pytest.raises(DataError, match=r"data\.kwargs\.fold: unknown; known: none"):
        check_source(Numbers, kwargs={"fold": 1})
