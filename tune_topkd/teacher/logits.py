"""What a student is taught: the teacher's logits, batch by batch, out of the bank as far as it has them."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn

from tune_topkd.config import DataConfig
from tune_topkd.config import RecipeConfig
from tune_topkd.config import TrialConfig
from tune_topkd.data import AnySplit
from tune_topkd.data import Dataset
from tune_topkd.data import Split
from tune_topkd.data import batches_of
from tune_topkd.data import epoch_order
from tune_topkd.data import fingerprint
from tune_topkd.data import load_dataset
from tune_topkd.data import shown
from tune_topkd.data import view_count
from tune_topkd.data import view_numbers
from tune_topkd.models import laid_out
from tune_topkd.teacher.bank import BankSize
from tune_topkd.teacher.bank import LogitBank
from tune_topkd.teacher.bank import bank_path
from tune_topkd.teacher.training import file_hash
from tune_topkd.teacher.training import load_teacher

_IMAGES_AT_ONCE = 512

_log = logging.getLogger(__name__)


class TeacherLogits:
    """The teacher's logits for one training: from the bank where there is one, else asked for every batch."""

    def __init__(self, config: TrialConfig, dataset: Dataset, split: AnySplit) -> None:
        """Open the bank, or load the teacher.

        Args:
            config: the training's.
            dataset: its dataset.
            split: the training split, on the device of the batches.

        Raises:
            ValueError: the config names no teacher, or one that cannot be loaded.
        """
        if config.teacher is None or config.teacher_checkpoint is None:
            raise ValueError(f"method {config.method!r} needs both teacher and teacher_checkpoint")
        self._config = config
        self._num_classes = dataset.num_classes
        self._split = split
        self._model: nn.Module | None = None
        self._bank = open_bank(config, dataset)
        self._places = self._views = torch.empty(0, dtype=torch.int64)
        self._epoch = 0
        self._known = torch.empty(0)
        self._is_known: Tensor | None = None
        self._on_device: Tensor | None = None
        if self._bank is None:
            self._loaded()

    def begin(self, epoch: int) -> None:
        """Look up all logits of an epoch at once: nothing is waited for within it when they are there."""
        if self._bank is None:
            return
        config, self._epoch = self._config, epoch
        order = epoch_order(self._split, batch_size=config.recipe.batch_size, seed=config.seed, epoch=epoch).cpu()
        self._places, self._views = order, bank_views(config, order, epoch)
        self._known, is_known = self._bank.read(self._places, self._views)
        self._is_known = None if bool(is_known.all()) else is_known
        self._on_device = self._known.to(self._split.device) if self._is_known is None else None

    def logits(self, images: Tensor, number: int) -> Tensor:
        """The logits `(B, C)` of the epoch's batch `number`."""
        if self._bank is None:
            return self.ask(images)
        config = self._config
        size = config.recipe.batch_size
        part = slice(number * size, number * size + len(images))
        if self._is_known is None:
            assert self._on_device is not None, "begin has put it there"
            return self._on_device[part].float()
        lacking = (~self._is_known[part]).nonzero()[:, 0]
        known = self._known[part]
        if len(lacking):
            with self._bank.claimed((config.seed, size, self._epoch, number)):
                known[lacking] = self._asked_or_found(images, self._places[part], self._views[part], lacking)
        return known.to(images.device).float()

    def _asked_or_found(self, images: Tensor, places: Tensor, views: Tensor, lacking: Tensor) -> Tensor:
        """The logits of what a batch lacked when its epoch began: another may have filled them since."""
        assert self._bank is not None, "what lacks is of a bank"
        given, is_there = self._bank.read(places[lacking], views[lacking])
        left = lacking[~is_there]
        if len(left):
            shown = images[left.to(images.device)]
            asked = self._bank.fill(places[left], views[left], lambda some: self.ask(shown[some.to(shown.device)]))
            given[~is_there] = asked
        return given

    def ask(self, images: Tensor) -> Tensor:
        """What the teacher says of normalised images `(B, C, H, W)`: `(B, classes)`, not kept."""
        with torch.no_grad():
            logits: Tensor = self._loaded()(images)
            return logits

    def _loaded(self) -> nn.Module:
        """The network, which a full bank makes needless."""
        if self._model is None:
            assert self._config.teacher is not None, "checked at the start"
            path = Path(self._config.teacher_checkpoint or "")
            with torch.random.fork_rng(devices=[]):  # the training's random numbers are the same with a full bank
                model = load_teacher(self._config.teacher, path, num_classes=self._num_classes).to(self._split.device)
            self._model = laid_out(model, self._split.batch_shape[0])
        return self._model


def bank_size(data: DataConfig, recipe: RecipeConfig, dataset: Dataset) -> BankSize | None:
    """The bank that the views of a training make; None where each is seen once, as with mixup."""
    if data.augment.mixup:
        return None
    views = view_count(data.augment)
    return BankSize(len(dataset.train), recipe.epochs if views is None else views, dataset.num_classes)


def bank_views(config: TrialConfig, indices: Tensor, epoch: int) -> Tensor:
    """The numbers of the views that images are shown in an epoch; where views are endless, the epoch's."""
    augment = config.data.augment
    if view_count(augment) is None:
        return torch.full_like(indices, epoch - 1)
    return view_numbers(indices, augment=augment, seed=config.seed, epoch=epoch)


def bank_file(config: TrialConfig, dataset: Dataset) -> Path:
    """The file of a training's bank, named by all that its logits depend on."""
    assert config.teacher is not None, "only a teacher has a bank"
    assert config.teacher_bank is not None, "asked for only where there may be one"
    augment = config.data.augment
    is_endless = view_count(augment) is None
    content = {
        "teacher": teacher_identity(config),
        "data": config.data.model_dump(mode="json", exclude={"root", "download", "workers", "augment"}),
        "files": fingerprint(config.data),
        "mean": dataset.mean,
        "std": dataset.std,
        "augment": augment.model_dump(mode="json") if is_endless else [augment.pad, augment.flip],
        "seeded": [config.seed, config.recipe.epochs] if is_endless else None,
    }
    return bank_path(Path(config.teacher_bank), content)


def open_bank(config: TrialConfig, dataset: Dataset) -> LogitBank | None:
    """The bank of a training's teacher; None where there is to be none, or the disk has no room for it."""
    size = bank_size(config.data, config.recipe, dataset)
    if config.teacher_bank is None or size is None:
        return None
    try:
        return LogitBank(bank_file(config, dataset), size)
    except OSError as error:
        _log.warning("no bank of the teacher's logits, it is asked for every batch: %s", error)
        return None


def fill_bank(config: TrialConfig, device: torch.device, progress: Callable[[float], None]) -> LogitBank:
    """Show the teacher all that a bank lacks; may be killed and gone on with.

    Args:
        config: of a training that uses the bank.
        device: where the teacher works.
        progress: told the share that is done, now and then.

    Raises:
        ValueError: there is no such bank, or no room for it.
    """
    dataset = load_dataset(config.data)
    bank = open_bank(config, dataset)
    if bank is None:
        raise ValueError(
            "there is no bank for this space: it is switched off, images are mixed, or the disk has no room"
        )
    split = dataset.train.to(device)
    taught = TeacherLogits(config, dataset, split)
    if view_count(config.data.augment) is None:
        for epoch in range(1, config.recipe.epochs + 1):
            taught.begin(epoch)
            for number, batch in enumerate(batches_of(config, dataset, split, epoch)):
                taught.logits(batch.images, number)
            progress(epoch / config.recipe.epochs)
        return bank
    assert isinstance(split, Split), "files have endless views"
    augment, mean, std = config.data.augment, dataset.mean, dataset.std
    chunks = torch.split(torch.arange(len(split)), _IMAGES_AT_ONCE)
    for done, chunk in enumerate(chunks):
        for view in range(bank.size.views):
            images = chunk[~bank.read(chunk, torch.full_like(chunk, view))[1]]
            views = torch.full_like(images, view)

            def ask(some: Tensor, images: Tensor = images, views: Tensor = views) -> Tensor:
                places = images[some].to(device), views[some].to(device)
                return taught.ask(shown(split, *places, augment=augment, mean=mean, std=std))

            if len(images):
                bank.fill(images, views, ask)
        progress((done + 1) / len(chunks))
    return bank


def teacher_identity(config: TrialConfig) -> tuple[Any, str | None]:
    """The teacher's network, and its file by content."""
    path = config.teacher_checkpoint
    return config.teacher and config.teacher.model_dump(mode="json"), path and file_hash(Path(path))
