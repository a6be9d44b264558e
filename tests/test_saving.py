"""The dataset in one file that the trainings on a machine map: what was written is what is read, and nothing is copied."""

import dataclasses
import errno
import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tune_topkd.config import AugmentConfig
from tune_topkd.config import DataConfig
from tune_topkd.data import Dataset
from tune_topkd.data import FileSplit
from tune_topkd.data import Split
from tune_topkd.data import load_dataset
from tune_topkd.data import load_saved
from tune_topkd.data import save_dataset
from tune_topkd.data import saving
from tune_topkd.data import train_batches
from tune_topkd.evaluate import evaluate
from tune_topkd.models import build_model

CPU = torch.device("cpu")
SPLITS = ("train", "val", "test")
DIGITS = DataConfig(name="digits")
GLYPHS = DataConfig(name="glyphs", val_fraction=0.5, kwargs={"train_images": 200, "test_images": 100})
CONFIGS = {
    "digits": DIGITS,
    "colour": GLYPHS,
    "resized once": DIGITS.model_copy(update={"image_size": 6}),
    "resized batch by batch": DIGITS.model_copy(update={"image_size": 12}),
    "its own constants": DIGITS.model_copy(update={"mean": [0.25], "std": [0.5]}),
    "best test epoch": GLYPHS.model_copy(update={"selection": "best_test_epoch"}),
}


def saved(config: DataConfig, path: Path, dataset: Dataset | None = None) -> Dataset:
    """Writes a dataset, the config's own if no other is given, and gives it back as it was."""
    dataset = dataset or load_dataset(config)
    assert save_dataset(config, dataset, path)
    with open(path, "rb") as file:  # a page that is not on the disk yet counts as private and dirty
        os.fdatasync(file)
    return dataset


def assert_same(dataset: Dataset, other: Dataset) -> None:
    for name in SPLITS:
        split, twin = getattr(dataset, name), getattr(other, name)
        for field in ("images", "labels"):
            ours, theirs = getattr(split, field), getattr(twin, field)
            assert ours.dtype == theirs.dtype
            assert ours.device == theirs.device
            assert torch.equal(ours, theirs), (name, field)
        assert (split.image_size, split.batch_shape, split.workers) == (twin.image_size, twin.batch_shape, twin.workers)
    names = {field.name for field in dataclasses.fields(Dataset)} - set(SPLITS)
    assert names == {"num_classes", "mean", "std", "selection"}
    for name in names:
        ours, theirs = getattr(dataset, name), getattr(other, name)
        assert (type(ours), ours) == (type(theirs), theirs), name


def negative(dataset: Dataset) -> Dataset:
    """The same with every image turned to its negative."""
    changes = {}
    for name in SPLITS:
        split = getattr(dataset, name)
        changes[name] = dataclasses.replace(split, images=255 - split.images)
    return dataclasses.replace(dataset, **changes)


# --- what is written and read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_saved_is_loaded_equal_in_every_field(tmp_path: Path, name):
    config = CONFIGS[name]
    dataset = saved(config, tmp_path / "d.pt")
    assert dataset.test.image_size == (12 if name == "resized batch by batch" else None)
    assert dataset.selection == ("best_test_epoch" if name == "best test epoch" else "validation")
    assert_same(load_saved(config, tmp_path / "d.pt"), dataset)
    assert [path.name for path in tmp_path.iterdir()] == ["d.pt"]


def test_a_test_part_that_chooses_as_well_is_in_the_file_once(tmp_path: Path):
    config = CONFIGS["best test epoch"]
    dataset = saved(config, tmp_path / "d.pt")
    loaded = load_saved(config, tmp_path / "d.pt")
    assert loaded.val.images.data_ptr() == loaded.test.images.data_ptr()
    once = sum(split.images.nbytes + split.labels.nbytes for split in (dataset.train, dataset.test))
    assert once <= (tmp_path / "d.pt").stat().st_size < once + dataset.test.images.nbytes // 2


def test_a_view_of_a_larger_storage_is_written_without_the_rest(tmp_path: Path):
    dataset = load_dataset(DIGITS)
    large = torch.arange(10_000 * 64).to(torch.uint8).view(10_000, 1, 8, 8)
    labels = torch.arange(10_000) % 10
    view = dataclasses.replace(dataset, test=Split(large[40:60], labels[40:60]))
    alone = dataclasses.replace(dataset, test=Split(large[40:60].clone(), labels[40:60].clone()))
    saved(DIGITS, tmp_path / "view.pt", view)
    saved(DIGITS, tmp_path / "alone.pt", alone)
    assert (tmp_path / "view.pt").stat().st_size == (tmp_path / "alone.pt").stat().st_size < large.nbytes
    assert_same(load_saved(DIGITS, tmp_path / "view.pt"), alone)


def test_images_in_files_are_not_saved(tmp_path: Path):
    for label in range(3):
        for number in range(5):
            path = tmp_path / "images" / f"class{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (80 * label, 10 * number, number)).save(path)
    root = str(tmp_path / "images")
    config = DataConfig(name="image_folder", root=root, val_fraction=0.2, test_fraction=0.4)
    dataset = load_dataset(config)
    assert isinstance(dataset.train, FileSplit)
    assert not save_dataset(config, dataset, tmp_path / "d.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


# --- one copy for all -----------------------------------------------------------------------------------------------


def mapping(tensor: Tensor) -> tuple[str, int]:
    """The file that a tensor's memory is a mapping of, and how many kB of the mapping are this process's own."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    path, is_there = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            is_there, path = low <= start < end <= high, " ".join(rest.split()[4:])
        elif is_there and first == "Private_Dirty:":
            return path, int(rest.split()[0])
    raise AssertionError("no mapping has all of it")


def test_the_images_are_the_file_itself_and_stay_so_when_they_are_used(tmp_path: Path):
    path = tmp_path / "d.pt"
    saved(DIGITS, path)
    loaded = load_saved(DIGITS, path)
    for name in SPLITS:
        split = getattr(loaded, name)
        moved = split.to(CPU)
        assert moved.images.data_ptr() == moved.host.data_ptr() == split.images.data_ptr()
        for tensor in (moved.images, moved.labels):
            assert mapping(tensor) == (str(path), 0)
    augment, constants = AugmentConfig(pad=1, flip=True), {"mean": loaded.mean, "std": loaded.std}
    train = loaded.train.to(CPU)
    seen = [len(b.labels) for b in train_batches(train, batch_size=64, seed=0, epoch=1, augment=augment, **constants)]
    assert sum(seen) > 1000
    evaluate(build_model("digits_linear", num_classes=10), loaded.val.to(CPU), **constants)
    assert mapping(train.images) == (str(path), 0)
    assert mapping(load_dataset(DIGITS).train.images)[0] != str(path)


def test_the_trainings_of_a_process_map_the_file_once(tmp_path: Path):
    saved(DIGITS, tmp_path / "d.pt")
    first, second = (load_saved(DIGITS, tmp_path / "d.pt") for _ in range(2))
    assert first.train.images.data_ptr() == second.train.images.data_ptr()


def turned(split: Split, dataset: Dataset, workers: int) -> list[Tensor]:
    """The images of an epoch of three batches or fewer that are augmented one by one, in processes of their own."""
    split = dataclasses.replace(split, workers=workers)
    augment = AugmentConfig(rotate=10.0)
    constants = {"augment": augment, "mean": dataset.mean, "std": dataset.std}
    return [batch.images for batch in train_batches(split, batch_size=400, seed=0, epoch=1, **constants)]


@pytest.mark.parametrize(
    "happening", [pytest.param("nothing", marks=pytest.mark.slow), "a part of it", "the file is gone"]
)
def test_worker_processes_map_the_file_too_and_see_the_same_images(tmp_path: Path, happening):
    path = tmp_path / "d.pt"
    saved(DIGITS, path)
    loaded = load_saved(DIGITS, path)
    split = loaded.train.to(CPU)
    if happening == "a part of it":
        split = split.subset(torch.arange(500, 950).flip(0))
    elif happening == "the file is gone":
        path.unlink()
    here, there = (turned(split, loaded, workers) for workers in (0, 1))
    assert len(here) == len(there) >= 1
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))
    if happening == "nothing":
        assert mapping(split.images) == (str(path), 0)


def test_who_writes_into_the_images_changes_them_for_nobody_else(tmp_path: Path):
    path = tmp_path / "d.pt"
    dataset = saved(DIGITS, path)
    content = path.read_bytes()
    mapped = load_saved(DIGITS, path)
    saving._mapped.cache_clear()  # as another process would map it
    written_to = load_saved(DIGITS, path)
    assert written_to.train.images.data_ptr() != mapped.train.images.data_ptr()
    written_to.train.images.fill_(7)
    saving._mapped.cache_clear()
    assert_same(mapped, dataset)
    assert_same(load_saved(DIGITS, path), dataset)
    assert path.read_bytes() == content


def test_after_a_second_write_the_first_is_still_there_for_who_has_it(tmp_path: Path):
    path = tmp_path / "d.pt"
    first = saved(DIGITS, path)
    mapped = load_saved(DIGITS, path)
    second = saved(DIGITS, path, negative(first))
    assert_same(mapped, first)
    assert_same(load_saved(DIGITS, path), second)
    path.unlink()
    assert_same(mapped, first)


# --- another dataset ------------------------------------------------------------------------------------------------

OTHERS = {
    "split_seed": {"split_seed": 1},
    "val_fraction": {"val_fraction": 0.4},
    "kwargs": {"kwargs": {"train_images": 300, "test_images": 100}},
    "name": {"name": "digits"},
    "image_size": {"image_size": 16},
    "selection": {"selection": "best_test_epoch"},
    "mean and std": {"mean": [0.5] * 3, "std": [0.5] * 3},
}


@pytest.mark.parametrize("key", OTHERS)
def test_another_dataset_than_the_configs_is_refused_and_the_file_named(tmp_path: Path, key):
    path = tmp_path / "d.pt"
    saved(GLYPHS, path)
    other = GLYPHS.model_copy(update=OTHERS[key])
    with pytest.raises(ValueError, match=rf"^{path}: holds another dataset than '{other.name}'"):
        load_saved(other, path)
    assert load_saved(GLYPHS, path).num_classes == 100


@pytest.mark.parametrize(
    "change",
    [
        {"augment": AugmentConfig(pad=2, flip=True)},
        {"root": "/another/machine's/data"},
        {"download": True},
        {"workers": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_no_image_may_differ_between_writer_and_reader(tmp_path: Path, change, monkeypatch):
    path = tmp_path / "d.pt"
    changed = DIGITS.model_copy(update=change)
    dataset = load_dataset(DIGITS)
    for writer, reader in ((DIGITS, changed), (changed, DIGITS)):
        saved(writer, path)
        monkeypatch.chdir(tmp_path)  # where a root that the config does not name is looked for
        loaded = load_saved(reader, path)
        assert {getattr(loaded, name).workers for name in SPLITS} == {reader.workers or 0}
        for name in SPLITS:
            assert torch.equal(getattr(loaded, name).images, getattr(dataset, name).images)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_file_that_is_gone_is_told_from_one_that_is_damaged(tmp_path: Path):
    saved(DIGITS, tmp_path / "d.pt")
    load_saved(DIGITS, tmp_path / "d.pt")
    (tmp_path / "d.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"d\.pt"):
        load_saved(DIGITS, tmp_path / "d.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello"])
def test_what_is_no_file_of_torch_is_named(tmp_path: Path, content):
    path = tmp_path / "d.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: is not a dataset that was saved here"):
        load_saved(DIGITS, path)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_named(tmp_path: Path, share):
    path = tmp_path / "d.pt"
    saved(DIGITS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"^{path}: "):
        load_saved(DIGITS, path)


@pytest.mark.parametrize(
    "content",
    [{"model": {}}, {"config": ""}, [1, 2], torch.zeros(3), "text"],
    ids=lambda content: type(content).__name__,
)
def test_something_else_that_torch_saved_is_named(tmp_path: Path, content):
    path = tmp_path / "d.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"^{path}: "):
        load_saved(DIGITS, path)


class Full(io.FileIO):
    """A file on a disk that has room for so many bytes."""

    room = 2**30

    def write(self, content) -> int:
        written = memoryview(content).nbytes
        if self.tell() + written > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


@pytest.mark.parametrize("room", [0, 5_000, 100_000, 2**30])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch, room):
    path = tmp_path / "d.pt"
    first = saved(DIGITS, path)
    content = path.read_bytes()
    assert len(content) > 110_000
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: Full(self, mode))
        patch.setattr(Full, "room", room)
        if room > len(content):  # the disk of the test takes what fits
            assert save_dataset(DIGITS, negative(first), path)
        else:
            with pytest.raises(OSError, match="No space left on device") as raised:
                save_dataset(DIGITS, negative(first), path)
            assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["d.pt"]
    if room < len(content):
        assert path.read_bytes() == content
    assert_same(load_saved(DIGITS, path), first if room < len(content) else negative(first))
