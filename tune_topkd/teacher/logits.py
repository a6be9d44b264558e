"""The teacher's logits for a training, batch by batch: from the bank where it has them, else from the teacher's
network."""

import functools
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.config import RecipeConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import what
from tune_topkd.config import without
from tune_topkd.data import WHOLE
from tune_topkd.data import AnySplit
from tune_topkd.data import Dataset
from tune_topkd.data import Part
from tune_topkd.data import batches_of
from tune_topkd.data import epoch_order
from tune_topkd.data import fingerprint
from tune_topkd.data import load_dataset
from tune_topkd.data import normalised_views
from tune_topkd.data import plain_images
from tune_topkd.data import view_count
from tune_topkd.data import view_numbers
from tune_topkd.data import view_side
from tune_topkd.models import network_fingerprint
from tune_topkd.models import to_channels_last
from tune_topkd.storage import file_hash
from tune_topkd.teacher.bank import BankSize
from tune_topkd.teacher.bank import LogitBank
from tune_topkd.teacher.bank import bank_path
from tune_topkd.teacher.bank import describe
from tune_topkd.teacher.bank import has_room
from tune_topkd.teacher.network import TeacherNetwork
from tune_topkd.teacher.training import load_teacher

GROUP_BYTES = 2**25
"""Size of the logits that are read from the bank at once: those of the next batches."""

_IMAGES_AT_ONCE = 512
_CPU = torch.device("cpu")

_log = logging.getLogger(__name__)


class TeacherLogits:
    """The teacher's logits for one training: from the bank if there is one, else computed for every batch.

    **Determinism.** They are rounded to float16 wherever they come from, so a training is the same, bit for bit,
    without a bank, with an empty one and with a full one, and as far as they go on any number of threads.
    """

    def __init__(self, config: TrialConfig, dataset: Dataset, split: AnySplit, part: Part = WHOLE) -> None:
        """Open the bank, or load the teacher.

        Args:
            config: the training's.
            dataset: its dataset.
            split: the training split, on the device of the batches.
            part: of each batch, whose logits are asked for; no others are read.

        Raises:
            ValueError: the config names no teacher, or one that cannot be loaded; or batches have no such parts.
        """
        if config.teacher is None or config.teacher_checkpoint is None:
            raise ValueError(f"method {config.method!r} needs both teacher and teacher_checkpoint")
        self._config = config
        self._num_classes = dataset.num_classes
        self._split = split
        self._loaded: TeacherNetwork | None = None
        self._bank = open_bank(config, dataset, split.device)
        self._part = part
        self._batch_size = part.size(config.recipe.batch_size)
        batch_bytes = 2 * dataset.num_classes * self._batch_size
        self._batches_at_once = max(GROUP_BYTES // batch_bytes, 1)
        self._places = self._views = torch.empty(0, dtype=torch.int64)
        self._epoch = 0
        self._group = -1
        self._known = self._is_known = torch.empty(0)
        self._on_device: Tensor | None = None
        if self._bank is None:
            self._network()

    def begin(self, epoch: int) -> None:
        """Begin an epoch: work out which views of the images it shows.

        Raises:
            TeacherError: the teacher's logits in the epoch before were not finite or too large.
        """
        self._epoch, self._group = epoch, -1
        if self._bank is None:
            self._network().check()
            return
        config = self._config
        size, seed = config.recipe.batch_size, config.seed
        order = epoch_order(self._split, batch_size=size, seed=seed, epoch=epoch, part=self._part).cpu()
        self._places, self._views = order, bank_views(config, order, epoch)

    def logits(self, images: Tensor, number: int) -> Tensor:
        """The logits `(B, C)` float32 of the epoch's batch `number`, or of this part of it.

        Raises:
            TeacherError: they are not finite or too large.
        """
        if self._bank is None:
            return self._network().logits(images).float()
        self._look_up(number // self._batches_at_once)
        size = self._batch_size
        start = number % self._batches_at_once * size
        part = slice(start, start + len(images))
        if self._on_device is not None:
            return self._on_device[part].float()
        lacking = (~self._is_known[part]).nonzero()[:, 0]
        known = self._known[part]
        if len(lacking):
            whole = slice(number * size, number * size + len(images))
            work = (self._config.seed, self._config.recipe.batch_size, self._epoch, number)
            with self._bank.claimed(work if self._part == WHOLE else (*work, *self._part)):
                known[lacking] = self._filled(images, self._places[whole], self._views[whole], lacking)
        return known.to(images.device).float()

    def _look_up(self, group: int) -> None:
        """Read the logits of a group of batches; where all are there, they go to the device at once."""
        assert self._bank is not None, "what is looked up is in a bank"
        if group == self._group:
            return
        size = self._batches_at_once * self._batch_size
        part = slice(group * size, (group + 1) * size)
        self._known, self._is_known = self._bank.read(self._places[part], self._views[part])
        self._group, self._on_device = group, None
        if bool(self._is_known.all()):
            self._on_device = self._known.to(self._split.device)
            self._known = self._is_known = torch.empty(0)

    def _filled(self, images: Tensor, places: Tensor, views: Tensor, lacking: Tensor) -> Tensor:
        """The logits of a batch that the bank lacked: those that another trial has not filled in by now are
        computed."""
        assert self._bank is not None, "what lacks is of a bank"
        found, is_there = self._bank.read(places[lacking], views[lacking])
        left = lacking[~is_there]
        if len(left):
            computed = self.compute(images[left.to(images.device)])
            self._bank.write(places[left], views[left], computed)
            found[~is_there] = computed
        return found

    def compute(self, images: Tensor) -> Tensor:
        """Run the teacher on normalised images `(B, C, H, W)`: `(B, classes)` float16 on the CPU, not written to the
        bank.

        Raises:
            TeacherError: a logit is not finite or too large.
        """
        logits = self._network().logits(images)
        self._network().check()
        return logits.cpu()

    def _network(self) -> TeacherNetwork:
        """The teacher's network, loaded when it is first needed: with a full bank it never is."""
        if self._loaded is None:
            assert self._config.teacher is not None, "checked at the start"
            path = Path(self._config.teacher_checkpoint or "")
            with torch.random.fork_rng(devices=[]):  # the training's random numbers are the same with a full bank
                model = load_teacher(self._config.teacher, path, num_classes=self._num_classes).to(self._split.device)
            model = to_channels_last(model, self._split.batch_shape[0])
            self._loaded = TeacherNetwork(model, f"{self._config.teacher.name} ({path})", self._split.device)
        return self._loaded


def bank_size(data: DataConfig, recipe: RecipeConfig, dataset: Dataset) -> BankSize | None:
    """The size of the bank for the views of a training; None where every view is seen once, as with mixup."""
    if data.augment.mixup:
        return None
    views = view_count(data.augment)
    return BankSize(len(dataset.train), recipe.epochs if views is None else views, dataset.num_classes)


def bank_views(config: TrialConfig, indices: Tensor, epoch: int) -> Tensor:
    """The numbers of the views that images are shown in an epoch, `(N,)` int64; where views are endless, the
    epoch's."""
    augment = config.data.augment
    if view_count(augment) is None:
        return torch.full_like(indices, epoch - 1)
    return view_numbers(indices, augment=augment, seed=config.seed, epoch=epoch)


def bank_file(config: TrialConfig, dataset: Dataset, device: torch.device = _CPU) -> Path:
    """The file of a training's bank, whose name is a hash of everything that its logits depend on.

    Args:
        config: the training's, with a `teacher_bank`.
        dataset: its dataset.
        device: where the teacher runs.
    """
    assert config.teacher_bank is not None, "asked for only where there may be one"
    return bank_path(Path(config.teacher_bank), _content(config, dataset, device))


def in_config(data: DataConfig, teacher: ModelConfig, seed: int) -> dict[str, Any]:
    """What a bank's logits depend on as far as a config says it; files and machine come besides."""
    augment = data.augment
    is_endless = view_count(augment) is None
    return {
        "teacher": teacher.model_dump(mode="json"),
        "data": without(what(data), ["augment"]),
        "augment": augment.model_dump(mode="json") if is_endless else [augment.pad, augment.flip],
        "seed": seed if is_endless else None,
    }


def _content(config: TrialConfig, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """Everything that the logits in a training's bank depend on."""
    assert config.teacher is not None, "only a teacher has a bank"
    assert config.teacher_checkpoint is not None, "only a teacher has a bank"
    return in_config(config.data, config.teacher, config.seed) | {
        "weights": file_hash(Path(config.teacher_checkpoint)),
        "network": _fingerprint(config.teacher.model_dump_json(), dataset.num_classes, dataset.train.batch_shape),
        "files": fingerprint(config.data, dataset),
        "mean": dataset.mean,
        "std": dataset.std,
        "computed": computed_by(device),
    }


@functools.lru_cache(maxsize=8)  # the code of a process does not change
def _fingerprint(model: str, num_classes: int, image_shape: tuple[int, int, int]) -> str:
    config = ModelConfig.model_validate_json(model)
    return network_fingerprint(config, num_classes=num_classes, image_shape=image_shape)


def computed_by(device: torch.device) -> dict[str, str]:
    """What the last bits of a network's logits depend on besides its weights: torch's version, and the kernels it uses."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        kernels = f"cuda {torch.version.cuda}, {major}.{minor}"
    else:
        kernels = f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": torch.__version__, "kernels": kernels}


def open_bank(config: TrialConfig, dataset: Dataset, device: torch.device) -> LogitBank | None:
    """The bank of a training's teacher; None where the config wants none, or the disk has no room for it."""
    size = bank_size(config.data, config.recipe, dataset)
    if config.teacher_bank is None or size is None:
        return None
    content = _content(config, dataset, device)
    path = bank_path(Path(config.teacher_bank), content)
    if not has_room(path, size):  # of endless views each seed has a bank, and only one of them was looked at before
        _log.warning(
            "the teacher's logits are not cached, it runs on every batch: banks would take more than half of the disk"
        )
        return None
    try:
        bank = LogitBank(path, size)
    except (OSError, OverflowError) as error:
        _log.warning("the teacher's logits are not cached, it runs on every batch: %s", error)
        return None
    describe(bank.path, content)
    return bank


def fill_bank(config: TrialConfig, device: torch.device, progress: Callable[[float], None]) -> LogitBank:
    """Compute all logits that a bank lacks; may be killed at any time and run again.

    Args:
        config: of a training that uses the bank.
        device: where the teacher runs: a bank is of one kind of device.
        progress: called with the fraction that is done, now and then.

    Raises:
        ValueError: there is no such bank, no room for it, or it is read-only; or the teacher's logits are not finite.
    """
    dataset = load_dataset(config.data)
    bank = open_bank(config, dataset, device)
    if bank is None:
        raise ValueError(
            "there is no bank for this space: it is switched off, images are mixed, or the disk has no room"
        )
    if not bank.is_writable:
        raise ValueError(f"{bank.path}: can be read but not filled: another user's, or the disk is read-only or full")
    split = dataset.train.to(device)
    teacher = TeacherLogits(config, dataset, split)
    if view_count(config.data.augment) is None:
        for epoch in range(1, config.recipe.epochs + 1):
            teacher.begin(epoch)
            for number, batch in enumerate(batches_of(config, dataset, split, epoch)):
                teacher.logits(batch.images, number)
            progress(epoch / config.recipe.epochs)
        return bank
    show = functools.partial(normalised_views, augment=config.data.augment, mean=dataset.mean, std=dataset.std)
    chunks = torch.split(torch.arange(len(split)), _IMAGES_AT_ONCE)
    for done, chunk in enumerate(chunks):
        _fill_chunk(bank, teacher, split, chunk, show)
        progress((done + 1) / len(chunks))
    return bank


def _fill_chunk(
    bank: LogitBank, teacher: TeacherLogits, split: AnySplit, chunk: Tensor, show: Callable[..., Tensor]
) -> None:
    """Compute the logits that a bank lacks of some images, whose views can be counted."""
    pixels: Tensor | None = None
    for view in range(bank.size.views):
        views = torch.full_like(chunk, view)
        lacking = ~bank.read(chunk, views)[1]
        if not bool(lacking.any()):
            continue
        if pixels is None:
            pixels = plain_images(split, chunk)
        numbers = views[lacking].to(split.device)
        images = show(pixels[lacking.to(split.device)], numbers, image_size=view_side(split))
        bank.write(chunk[lacking], views[lacking], teacher.compute(images))


def teacher_identity(config: TrialConfig) -> tuple[Any, str | None]:
    """The config of the teacher's network, and the SHA-256 of its weights' file; None where there is none."""
    path = config.teacher_checkpoint
    return config.teacher and config.teacher.model_dump(mode="json"), path and file_hash(Path(path))
