"""Datasets in the formats they lie on disks in: small ones, written byte by byte as the published ones are."""

import hashlib
import logging
import os
import pickle
import shutil
import struct
import unicodedata
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import tune_topkd.data.datasets as datasets
from tune_topkd.config import DataConfig
from tune_topkd.data import FileSplit
from tune_topkd.data import data_root
from tune_topkd.data import dataset_info
from tune_topkd.data import dataset_names
from tune_topkd.data import eval_batches
from tune_topkd.data import fingerprint
from tune_topkd.data import glyphs
from tune_topkd.data import identity
from tune_topkd.data import load_dataset
from tune_topkd.data import missing_data
from tune_topkd.data import needs_files


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch):
    monkeypatch.delenv("TUNE_TOPKD_DATA_DIR", raising=False)
    yield
    datasets._loaded.cache_clear()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(label: int, number: int, height: int, width: int) -> Image.Image:
    """A picture that JPEG changes little: two colours that say the class and the number."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[...] = (20 * label, 10 * number, 200)
    pixels[: height // 2] = (240 - 20 * label, 10 * number, 50)
    return Image.fromarray(pixels)


def write_image(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def pixels_of(dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of a dataset, in the order of their bytes."""
    images = torch.cat([split.images for split in (dataset.train, dataset.val, dataset.test)])
    labels = torch.cat([split.labels for split in (dataset.train, dataset.val, dataset.test)])
    order = sorted(range(len(images)), key=lambda i: images[i].numpy().tobytes())
    return images[order], labels[order]


# --- CIFAR ----------------------------------------------------------------------------------------------------------


def python2_pickle(data: np.ndarray, key: str, labels: list[int]) -> bytes:
    """What Python 2 with an old numpy wrote: protocol 2, byte strings, `numpy.core`, and 0 and 1 for booleans."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    shape = b"J" + struct.pack("<i", data.shape[0]) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content = b"T" + struct.pack("<I", data.nbytes) + data.tobytes()
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    name = b"U" + bytes([len(key)]) + key.encode()
    return (
        b"\x80\x02}(U\x04data" + array + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb" + name + listed + b"u."
    )


CIFAR100 = {"train": 500, "test": 200}
CIFAR10 = {**{f"data_batch_{i}": 20 for i in range(1, 6)}, "test_batch": 30}


def write_cifar100(root: Path) -> dict[str, np.ndarray]:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    written = {}
    for name, count in CIFAR100.items():
        written[name] = noise(count, 3072, seed=count)
        labels = [i % 100 for i in range(count)]
        (folder / name).write_bytes(python2_pickle(written[name], "fine_labels", labels))
    return written


def write_cifar10(root: Path) -> dict[str, np.ndarray]:
    """As Python 3 writes them: keys that are bytes."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    written = {}
    for seed, (name, count) in enumerate(CIFAR10.items()):
        written[name] = noise(count, 3072, seed=seed)
        content = {b"batch_label": b"x", b"data": written[name], b"labels": [i % 10 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2 if seed else 5))
    return written


def cifar100(root: Path, **changes) -> DataConfig:
    return DataConfig(**{"name": "cifar100", "root": str(root), "val_fraction": 0.2, **changes})


def test_cifar100_is_read_as_it_is_published(tmp_path: Path):
    written = write_cifar100(tmp_path)
    dataset = load_dataset(cifar100(tmp_path))
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [400, 100, 200]
    assert torch.equal(dataset.test.images.flatten(1), torch.from_numpy(written["test"]))
    assert dataset.test.labels.tolist() == [i % 100 for i in range(200)]
    train = {row.tobytes(): i % 100 for i, row in enumerate(written["train"])}
    for split in (dataset.train, dataset.val):
        assert [train.pop(image.numpy().tobytes()) for image in split.images] == split.labels.tolist()
    assert not train
    assert (dataset.mean, dataset.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def test_cifar10_is_all_its_batches(tmp_path: Path):
    written = write_cifar10(tmp_path)
    dataset = load_dataset(DataConfig(name="cifar10", root=str(tmp_path), val_fraction=0.1))
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [90, 10, 30]
    assert torch.equal(dataset.test.images.flatten(1), torch.from_numpy(written["test_batch"]))
    assert {row.tobytes() for name in CIFAR10 for row in written[name]} == {
        image.numpy().tobytes() for split in (dataset.train, dataset.val, dataset.test) for image in split.images
    }


def test_files_that_are_not_the_official_ones_are_named_and_used(tmp_path: Path, caplog, monkeypatch):
    write_cifar100(tmp_path)
    test = (tmp_path / "cifar-100-python" / "test").read_bytes()
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "test_list", [["test", hashlib.md5(test).hexdigest()]])
    with caplog.at_level(logging.WARNING):
        load_dataset(cifar100(tmp_path))
    assert len(caplog.messages) == 1
    assert "cifar-100-python/train is not the official file" in caplog.text


@pytest.mark.parametrize("labels", [list, np.array, lambda labels: np.array(labels, dtype=np.uint8)])
def test_files_that_numpy_wrote_anew_are_read(tmp_path: Path, labels):
    """With labels as a list or an array, by a numpy of today."""
    written = write_cifar100(tmp_path)
    expected = load_dataset(cifar100(tmp_path)).test
    content = {"data": written["test"], "fine_labels": labels([i % 100 for i in range(200)])}
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps(content))
    datasets._loaded.cache_clear()
    assert torch.equal(load_dataset(cifar100(tmp_path)).test.labels, expected.labels)


class Evil:
    def __reduce__(self):
        return print, ("run",)


GOOD = noise(300, 3072)
DAMAGE = {
    "truncated": (lambda good: good[:-400], "is damaged"),
    "empty": (lambda good: b"", "is damaged"),
    "code": (lambda good: pickle.dumps({"data": Evil()}), r"is damaged \(UnpicklingError: asks for builtins.print\)"),
    "a list": (lambda good: pickle.dumps([1]), "holds no mapping but a list"),
    "no data": (lambda good: pickle.dumps({"fine_labels": [1]}), "no rows of 3072 bytes under 'data'"),
    "other rows": (lambda good: python2_pickle(noise(3, 1024), "fine_labels", [1] * 3), "no rows of 3072 bytes"),
    "other key": (lambda good: python2_pickle(GOOD, "labels", [1] * 300), "whole numbers under 'fine_labels'"),
    "half a label": (
        lambda good: pickle.dumps({"data": GOOD, "fine_labels": [1.5] * 300}),
        "no list of whole numbers under 'fine_labels'",
    ),
    "a negative label": (
        lambda good: pickle.dumps({"data": GOOD, "fine_labels": np.array([-1] * 300)}),
        "label -1 of image 0 is not from 0 to 99",
    ),
    "a label too few": (lambda good: python2_pickle(GOOD, "fine_labels", [1] * 299), "has 299 labels for 300 images"),
    "a label too high": (
        lambda good: python2_pickle(GOOD, "fine_labels", [1] * 299 + [100]),
        "label 100 of image 299 is not from 0 to 99",
    ),
    "no images": (lambda good: python2_pickle(noise(0, 3072), "fine_labels", []), "has no images"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cifar_file_is_named(tmp_path: Path, damage, capsys):
    write_cifar100(tmp_path)
    path = tmp_path / "cifar-100-python" / "test"
    change, rule = DAMAGE[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{path}: .*{rule}"):
        load_dataset(cifar100(tmp_path))
    assert capsys.readouterr().out == ""


# --- missing files and downloads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("cifar10", ["cifar-10-batches-py has no data_batch_1", "cifar-10-python.tar.gz", "data.download: true"]),
        ("cifar100", ["cifar-100-python has no train, test", "cifar-100-python.tar.gz", "data.download: true"]),
        ("stl10", ["stl10_binary has no train_X.bin", "stl10_binary.tar.gz", "data.download: true"]),
        ("tiny_imagenet", ["tiny-imagenet-200 has no train and no val", "tiny-imagenet-200.zip"]),
        ("imagenet", ["imagenet has no train and no val", "imagenet/train/<wnid>", "imagenet/val/<wnid>"]),
    ],
)
def test_missing_files_are_said_to_be_put_where(tmp_path: Path, name, parts):
    config = DataConfig(name=name, root=str(tmp_path))
    text = missing_data(config)
    assert all(part in text for part in [*parts, str(tmp_path), "TUNE_TOPKD_DATA_DIR"])
    assert len(text.splitlines()) == 1
    for call in (load_dataset, fingerprint):
        with pytest.raises(ValueError, match="has no") as error:
            call(config)
        assert str(error.value) == text


def test_the_root_is_the_config_s_or_the_environment_s_or_data(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_root(DataConfig(name="cifar10")) == tmp_path / "data"
    monkeypatch.setenv("TUNE_TOPKD_DATA_DIR", "/there")
    assert data_root(DataConfig(name="cifar10")) == Path("/there")
    assert data_root(DataConfig(name="cifar10", root="x")) == tmp_path / "x"


def test_which_datasets_need_files():
    assert {name for name in dataset_names() if not needs_files(DataConfig(name=name, root="x"))} == {
        "digits",
        "glyphs",
    }
    assert not needs_files(DataConfig(name="image_folder"))
    assert not needs_files(DataConfig(name="unknown"))


def test_a_download_that_fails_is_one_clear_error(tmp_path: Path, monkeypatch):
    def fail(self, root, download):
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets.CIFAR100, "__init__", fail)
    config = cifar100(tmp_path, download=True)
    assert missing_data(config) is None
    with pytest.raises(
        ValueError, match=r"has no train, test; .*; downloading failed: <urlopen error no route to host>$"
    ):
        load_dataset(config)


def test_what_is_missing_is_downloaded_once_and_only_if_asked(tmp_path: Path, monkeypatch):
    fetched = []

    def fetch(self, root, download):
        fetched.append(download)
        write_cifar100(Path(root))

    monkeypatch.setattr(torchvision.datasets.CIFAR100, "__init__", fetch)
    with pytest.raises(ValueError, match="has no train, test"):
        load_dataset(cifar100(tmp_path))
    assert not fetched
    fingerprint(cifar100(tmp_path, download=True))
    load_dataset(cifar100(tmp_path, download=True))
    assert fetched == [True]


def test_what_cannot_be_downloaded_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no train and no val; .*; it cannot be downloaded by itself$"):
        load_dataset(DataConfig(name="imagenet", root=str(tmp_path), download=True))


# --- STL-10 ---------------------------------------------------------------------------------------------------------


def write_stl10(root: Path) -> np.ndarray:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for name, count in (("train", 30), ("test", 20)):
        images = noise(count, 3, 96, 96, seed=count)
        images.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")  # column by column
        (folder / f"{name}_y.bin").write_bytes(bytes(1 + i % 10 for i in range(count)))
    return images


def stl10(root: Path, **changes) -> DataConfig:
    return DataConfig(name="stl10", root=str(root), val_fraction=0.4, **changes)


def test_stl10_is_turned_upright_and_counted_from_zero(tmp_path: Path):
    test = write_stl10(tmp_path)
    dataset = load_dataset(stl10(tmp_path))
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [20, 10, 20]
    assert torch.equal(dataset.test.images, torch.from_numpy(test))
    assert dataset.test.labels.tolist() == [i % 10 for i in range(20)]
    assert (dataset.mean, dataset.std) == ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2712))


@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        ("test_X.bin", lambda content: content[:-1], "is truncated: 552959 bytes"),
        ("train_y.bin", lambda content: content[:-1], "has 29 labels for 30 images"),
        ("train_y.bin", lambda content: content[:-1] + b"\x00", "label 0 of image 29 is not from 1 to 10"),
        ("test_y.bin", lambda content: b"\x0b" + content[1:], "label 11 of image 0 is not from 1 to 10"),
    ],
)
def test_a_damaged_stl10_file_is_named(tmp_path: Path, name, change, rule):
    write_stl10(tmp_path)
    path = tmp_path / "stl10_binary" / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{path}: {rule}"):
        load_dataset(stl10(tmp_path))


# --- Tiny-ImageNet --------------------------------------------------------------------------------------------------

WNIDS = ["n03", "n01", "n02"]
"""Not in their order."""


def write_tiny(root: Path, train: str = "train/{wnid}/images/{wnid}_{i}.JPEG", val: str | None = None) -> Path:
    """The published tree, or one with other places for the images."""
    folder = root / "tiny-imagenet-200"
    annotations = []
    for wnid in WNIDS:
        label = sorted(WNIDS).index(wnid)
        for i in range(4):
            image = smooth(label, i, 64, 64)
            gray = image.convert("L") if i == 3 else image
            write_image(folder / train.format(wnid=wnid, i=i), gray)
            (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
            name = f"val_{4 * (2 - label) + i}.JPEG"
            write_image(
                folder / (val or "val/images/{name}").format(wnid=wnid, name=name), smooth(label, 10 + i, 64, 64)
            )
            annotations.append(f"{name}\t{wnid}\t0\t0\t63\t63\n")
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (folder / "words.txt").write_text("n01\tone\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(annotations))
    write_image(folder / "test" / "images" / "test_0.JPEG", smooth(0, 0, 64, 64))
    return folder


def tiny(root: Path, **changes) -> DataConfig:
    arguments = {"kwargs": {"num_classes": 3}, "val_fraction": 0.25, **changes}
    return DataConfig(name="tiny_imagenet", root=str(root), **arguments)


def test_tiny_imagenet_is_read_as_it_is_published(tmp_path: Path):
    write_tiny(tmp_path)
    dataset = load_dataset(tiny(tmp_path))
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [9, 3, 12]
    for split in (dataset.train, dataset.val, dataset.test):
        colour = split.images.double().mean((2, 3))
        gray = (colour[:, 0] == colour[:, 1]) & (colour[:, 1] == colour[:, 2])
        bottom = split.images[:, 0, 40:].double().mean((1, 2))
        assert torch.all(gray | ((bottom - 20 * split.labels).abs() < 6))  # the colour says the class
    assert (dataset.mean, dataset.std) == ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))


@pytest.mark.parametrize("train", ["train/{wnid}/{wnid}_{i}.JPEG", "train/{wnid}/images/{wnid}_{i}.JPEG"])
@pytest.mark.parametrize("val", ["val/{wnid}/{name}", "val/{wnid}/images/{name}"])
@pytest.mark.parametrize("left_over", [True, False])
def test_reorganised_trees_of_tiny_imagenet_hold_the_same(tmp_path: Path, train, val, left_over):
    write_tiny(tmp_path / "a")
    folder = write_tiny(tmp_path / "b", train, val)
    if left_over:
        (folder / "val" / "images").mkdir()
    else:
        (folder / "val" / "val_annotations.txt").unlink()
        (folder / "wnids.txt").unlink()
    one, two = (pixels_of(load_dataset(tiny(tmp_path / name))) for name in "ab")
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("val", ["val/images/{wnid}/{name}", "val/images/{wnid}/images/{name}"])
def test_val_sorted_within_its_images_folder_holds_the_same(tmp_path: Path, val):
    write_tiny(tmp_path / "a")
    write_tiny(tmp_path / "b", val=val)
    one, two = (pixels_of(load_dataset(tiny(tmp_path / name))) for name in "ab")
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


SPELLINGS = {
    "a blank last line": lambda text: text.encode() + b"\n  \t\n",
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "blanks for tabs": lambda text: text.replace("\t", "  ").encode(),
    "lines of Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "UTF-16 of Windows": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "names and classes alone": lambda text: "".join(
        f"{line.split()[0]} {line.split()[1]} \n" for line in text.splitlines()
    ).encode(),
    "no line end at the end": lambda text: text.rstrip().encode(),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_lists_of_tiny_imagenet_may_have_been_through_an_editor(tmp_path: Path, spelling):
    folder = write_tiny(tmp_path)
    expected = load_dataset(tiny(tmp_path)).test
    for listed in (folder / "val" / "val_annotations.txt", folder / "wnids.txt"):
        text = listed.read_text()
        if listed.name != "wnids.txt" or spelling != "names and classes alone":
            listed.write_bytes(SPELLINGS[spelling](text))
    datasets._loaded.cache_clear()
    found = load_dataset(tiny(tmp_path)).test
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.images, expected.images)


def two_classes_of_one(folder: Path) -> None:
    path = folder / "val" / "val_annotations.txt"
    path.write_text(path.read_text() + "val_0.JPEG\tn01\t0\t0\t63\t63\n")


def half_a_line(folder: Path) -> None:
    path = folder / "val" / "val_annotations.txt"
    path.write_text(path.read_text() + "val_12.JPEG")


def half_sorted_in_images(folder: Path) -> None:
    (folder / "val" / "images" / "n01").mkdir()
    (folder / "val" / "images" / "val_8.JPEG").rename(folder / "val" / "images" / "n01" / "val_8.JPEG")


def no_annotations(folder: Path) -> None:
    (folder / "val" / "val_annotations.txt").unlink()


def half_sorted(folder: Path) -> None:
    (folder / "val" / "n01").mkdir()
    (folder / "val" / "images" / "val_8.JPEG").rename(folder / "val" / "n01" / "val_8.JPEG")


def another_list(folder: Path) -> None:
    (folder / "wnids.txt").write_text("n01\nn02\nn04\n")


def another_annotation(folder: Path) -> None:
    path = folder / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n02", "n09", 1))


def a_line_too_few(folder: Path) -> None:
    path = folder / "val" / "val_annotations.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def an_image_too_few(folder: Path) -> None:
    (folder / "val" / "images" / "val_5.JPEG").unlink()


def a_class_too_few(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "n02")
    (folder / "wnids.txt").write_text("n01\nn03\n")


def truncated_image(folder: Path) -> None:
    path = folder / "train" / "n01" / "images" / "n01_2.JPEG"
    path.write_bytes(path.read_bytes()[:-300])


def not_an_image(folder: Path) -> None:
    (folder / "train" / "n01" / "images" / "n01_2.JPEG").write_text("<html>")


def another_size(folder: Path) -> None:
    write_image(folder / "train" / "n01" / "images" / "n01_2.JPEG", smooth(0, 0, 60, 64))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (no_annotations, r"/val: has neither val_annotations.txt.* nor a folder for each class"),
        (half_sorted, r"/val: is half sorted: 11 images lie in images/"),
        (half_sorted_in_images, r"/val: is half sorted: 11 images lie in images/ and others in folders .* in images/"),
        (two_classes_of_one, r"/val/val_annotations.txt: line 13: 'val_0.JPEG' has another class in an earlier line"),
        (half_a_line, r"/val/val_annotations.txt: line 13: the class '' of 'val_12.JPEG' is not a class of train"),
        (another_list, r"/train: its classes are not those of wnids.txt: lacks n04, has besides n03"),
        (
            another_annotation,
            r"/val/val_annotations.txt: line 9: the class 'n09' of 'val_4.JPEG' is not a class of train",
        ),
        (a_line_too_few, r"/val/val_annotations.txt: its files are not those of images/: lacks val_0.JPEG"),
        (an_image_too_few, r"/val/val_annotations.txt: its files are not those of images/: has besides val_5.JPEG"),
        (a_class_too_few, r"/train: has 2 classes, not 3; .*num_classes: 2"),
        (truncated_image, r"/train/n01/images/n01_2.JPEG: cannot be read as an image: .*[Tt]runcated"),
        (not_an_image, r"/train/n01/images/n01_2.JPEG: cannot be read as an image"),
        (another_size, r"/train/n01/images/n01_2.JPEG: is 64 × 60 pixels, not 64 × 64"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_tiny_imagenet_says_where(tmp_path: Path, change, rule):
    folder = write_tiny(tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=rf"^{folder}{rule}") as error:
        load_dataset(tiny(tmp_path))
    assert len(str(error.value).splitlines()) == 1


def test_all_of_tiny_imagenet_is_expected_unless_said_otherwise(tmp_path: Path):
    write_tiny(tmp_path)
    with pytest.raises(ValueError, match=r"/train: has 3 classes, not 200; .*data.kwargs: {num_classes: 3}"):
        load_dataset(tiny(tmp_path, kwargs={}))
    with pytest.raises(ValueError, match="num_classes must be a whole number of at least 2, but got 1"):
        load_dataset(tiny(tmp_path, kwargs={"num_classes": 1}))


def test_what_a_mac_leaves_beside_the_images_of_tiny_imagenet_is_no_image(tmp_path: Path):
    folder = write_tiny(tmp_path)
    expected = load_dataset(tiny(tmp_path))
    for path in (*folder.glob("val/images/*"), *folder.glob("train/*/images/*"), *folder.glob("train/*")):
        (path.parent / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
    datasets._loaded.cache_clear()
    found = load_dataset(tiny(tmp_path))
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(found, name).images, getattr(expected, name).images)


# --- ImageNet -------------------------------------------------------------------------------------------------------


def write_imagenet(root: Path) -> Path:
    folder = root / "imagenet"
    for label, wnid in enumerate(("n01440764", "n01443537", "n01484850")):
        for i in range(4):
            write_image(folder / "train" / wnid / f"{wnid}_{i}.JPEG", smooth(label, i, 40 + i, 60))
        for i in range(2):
            write_image(folder / "val" / wnid / f"ILSVRC2012_val_{i:08}.JPEG", smooth(label, 10 + i, 50, 40))
    return folder


def imagenet(root: Path, **changes) -> DataConfig:
    arguments = {"kwargs": {"num_classes": 3}, "val_fraction": 0.25, **changes}
    return DataConfig(name="imagenet", root=str(root), **arguments)


def test_imagenet_stays_in_its_files_until_a_batch_needs_them(tmp_path: Path):
    write_imagenet(tmp_path)
    dataset = load_dataset(imagenet(tmp_path, workers=1))
    assert all(isinstance(split, FileSplit) for split in (dataset.train, dataset.val, dataset.test))
    assert (dataset.train.size, dataset.train.workers) == ((224, 224), 1)
    small = load_dataset(imagenet(tmp_path, image_size=24))
    (batch,) = eval_batches(small.test, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert batch.images.shape == (6, 3, 24, 24)
    assert batch.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert ((batch.images[:, 0, -6:].mean((1, 2)) - 20 * batch.labels).abs() < 6).all()
    assert dataset.mean == (0.485, 0.456, 0.406)


def test_a_flat_val_of_imagenet_is_refused(tmp_path: Path):
    folder = write_imagenet(tmp_path)
    for path in list((folder / "val").glob("*/*")):
        path.rename(folder / "val" / f"{path.parent.name}_{path.name}")
    for path in (
        list((folder / "val").glob("n*0")) + list((folder / "val").glob("n*7")) + [folder / "val" / "n01440764"]
    ):
        if path.is_dir():
            path.rmdir()
    with pytest.raises(ValueError, match=rf"^{folder}/val: has no folders and 6 loose images, but must have a folder"):
        load_dataset(imagenet(tmp_path))


def test_classes_of_imagenet_that_train_lacks_are_refused(tmp_path: Path):
    folder = write_imagenet(tmp_path)
    (folder / "val" / "n01443537").rename(folder / "val" / "n09999999")
    with pytest.raises(
        ValueError, match=rf"^{folder}/val: its classes are not those of .*: lacks n01443537, has besides n09999999"
    ):
        load_dataset(imagenet(tmp_path))
    with pytest.raises(ValueError, match="has 3 classes, not 1000"):
        load_dataset(imagenet(tmp_path, kwargs={}))


# --- a folder for each class ----------------------------------------------------------------------------------------


def write_folder(root: Path, *parts: str, classes=("cat", "ant", "bee"), count: int = 5, size=(24, 32)) -> Path:
    for part in parts or ("",):
        for name in classes:
            for i in range(count):
                write_image(root / part / name / f"{i}.png", smooth(sorted(classes).index(name), i, *size))
    return root


def folder(root: Path, **changes) -> DataConfig:
    return DataConfig(name="image_folder", root=str(root), **{"val_fraction": 0.2, "test_fraction": 0.4, **changes})


def names_of(split: FileSplit) -> list[str]:
    return [str(Path(path).parent) for path in split.paths]


@pytest.mark.parametrize("test", ["val", "test"])
def test_a_folder_with_a_test_part_keeps_it_whole(tmp_path: Path, test):
    write_folder(tmp_path, "train", test)
    dataset = load_dataset(folder(tmp_path))
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [12, 3, 15]
    assert set(names_of(dataset.test)) == {str(tmp_path / test / name) for name in ("ant", "bee", "cat")}
    assert [Path(name).name for name in names_of(dataset.test)] == ["ant"] * 5 + ["bee"] * 5 + ["cat"] * 5
    assert dataset.test.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert dataset_info(folder(tmp_path)) == datasets.DatasetInfo(3, (3, 24, 32))


@pytest.mark.parametrize("parts", [(), ("train",)])
def test_a_folder_without_a_test_part_is_split_in_three(tmp_path: Path, parts):
    write_folder(tmp_path, *parts)
    (tmp_path / ".hidden").mkdir()
    dataset = load_dataset(folder(tmp_path))
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [6, 3, 6]
    paths = [path for split in (dataset.train, dataset.val, dataset.test) for path in split.paths]
    assert len(set(paths)) == 15


def test_the_folders_of_the_parts_can_be_named(tmp_path: Path):
    write_folder(tmp_path, "fit", "holdout", "val", "test")
    dataset = load_dataset(folder(tmp_path, kwargs={"train": "fit", "test": "holdout"}))
    assert {Path(name).parent.name for name in names_of(dataset.train)} == {"fit"}
    assert {Path(name).parent.name for name in names_of(dataset.test)} == {"holdout"}


@pytest.mark.parametrize("call", [load_dataset, dataset_info])
@pytest.mark.parametrize(
    ("parts", "kwargs", "rule"),
    [
        (("train", "val", "test"), {}, "has both val and test; say which is the test part"),
        (("fit", "val"), {}, "has val but no train; say which folder is the training part"),
        (("fit",), {}, "has only the folder fit, but must have a folder for each class"),
        (("train",), {"train": "fit"}, "data.kwargs.train = 'fit': must be the name of a folder"),
        (("train",), {"trian": "train"}, "data.kwargs.trian: unknown; did you mean 'train'"),
    ],
)
def test_a_layout_that_could_be_misread_is_refused(tmp_path: Path, call, parts, kwargs, rule):
    write_folder(tmp_path, *parts)
    with pytest.raises(ValueError, match=rule):
        call(folder(tmp_path, kwargs=kwargs))


VEHICLES = ("bus", "car", "train")
ASKS = r"its folders \({}\) may be parts of the dataset or classes; say which: .*{{train: …, test: …}} .*{{train: \.}}"


@pytest.mark.parametrize("call", [load_dataset, dataset_info])
@pytest.mark.parametrize(
    ("classes", "below"),
    [
        (VEHICLES, ""),
        (VEHICLES, "2019"),  # would be the one class of the part train
        (("test", "train"), ""),
        (("Test", "Train"), "a"),
        (("training", "validation"), "a"),
        (("train", "validation"), "a"),
    ],
)
def test_folders_that_may_be_parts_or_classes_are_asked_about(tmp_path: Path, call, classes, below):
    for name in classes:
        for extra in (below, f"{below}b"):
            write_image(tmp_path / name / extra / "1.png", smooth(classes.index(name), 1, 8, 8))
    with pytest.raises(ValueError, match=rf"^{tmp_path}: {ASKS.format(', '.join(classes))}") as error:
        call(folder(tmp_path))
    assert len(str(error.value).splitlines()) == 1


def test_a_class_may_be_named_as_a_part_if_the_config_says_so(tmp_path: Path):
    write_folder(tmp_path, classes=VEHICLES)
    dataset = load_dataset(folder(tmp_path, kwargs={"train": "."}))
    assert dataset.num_classes == 3
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [6, 3, 6]
    with pytest.raises(ValueError, match=r"data\.kwargs\.test: with train: \. each folder of .* is a class"):
        load_dataset(folder(tmp_path, kwargs={"train": ".", "test": "car"}))
    write_folder(tmp_path / "b", classes=("test", "control"))
    with pytest.raises(ValueError, match=r"has test but no train; .* or, if each folder is a class, {train: \.}"):
        load_dataset(folder(tmp_path / "b"))
    assert load_dataset(folder(tmp_path / "b", kwargs={"train": "."})).num_classes == 2


def test_parts_beside_folders_of_something_else_are_still_parts(tmp_path: Path):
    write_folder(tmp_path, "train", "val", "unlabelled")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "boxes.txt").write_text("")
    dataset = load_dataset(folder(tmp_path))
    assert {Path(name).parent.name for name in names_of(dataset.test)} == {"val"}
    shutil.rmtree(tmp_path / "unlabelled")
    shutil.rmtree(tmp_path / "val")
    assert {Path(name).parent.name for name in names_of(load_dataset(folder(tmp_path, val_fraction=0.3)).test)} == {
        "train"
    }


def test_classes_are_the_same_in_both_of_unicode_s_forms(tmp_path: Path):
    for part, form in (("train", "NFC"), ("val", "NFD")):
        write_folder(tmp_path, part, classes=[unicodedata.normalize(form, name) for name in ("eland", "élan", "zebra")])
    dataset = load_dataset(folder(tmp_path))
    assert [unicodedata.normalize("NFC", Path(name).name) for name in names_of(dataset.test)][::5] == [
        "eland", "zebra", "élan"
    ]  # fmt: skip
    first = fingerprint(folder(tmp_path))
    (tmp_path / "val" / unicodedata.normalize("NFD", "élan")).rename(tmp_path / "val" / "élan")
    assert fingerprint(folder(tmp_path)) == first


def test_copies_that_a_notebook_or_a_link_made_do_not_cross_the_splits(tmp_path: Path):
    write_folder(tmp_path)
    expected = load_dataset(folder(tmp_path))
    for name in ("cat", "ant", "bee"):
        shutil.copytree(tmp_path / name, tmp_path / name / ".ipynb_checkpoints")
        (tmp_path / name / "again").symlink_to("..", target_is_directory=True)
    datasets._loaded.cache_clear()
    found = load_dataset(folder(tmp_path))
    for part in ("train", "val", "test"):
        assert getattr(found, part).paths == getattr(expected, part).paths


@pytest.mark.parametrize(
    ("link", "target", "rule"),
    [
        (
            "train/bee/x.png",
            "train/cat/1.png",
            r"/train/cat/1\.png: is the same file as .*/train/bee/x\.png, which is in another",
        ),
        (
            "val/bee/x.png",
            "train/bee/1.png",
            r"/val/bee/x\.png: is the same file as .*/train/bee/1\.png: what is trained on",
        ),
        ("val", "train", r"/val/ant/0\.png: is the same file as .*/train/ant/0\.png: what is trained on"),
    ],
)
def test_a_file_that_a_link_puts_elsewhere_too_is_refused(tmp_path: Path, link, target, rule):
    write_folder(tmp_path, *(("train",) if link == "val" else ("train", "val")))
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=rf"^{tmp_path}{rule}"):
        load_dataset(folder(tmp_path))


def test_images_of_every_ending_that_can_be_decoded_are_read(tmp_path: Path):
    for label, name in enumerate(("ant", "bee")):
        for number, ending in enumerate(("jfif", "gif", "AVIF", "webp", "PNG", "tif", "pbm")):
            kind = {"jfif": "JPEG", "tif": "TIFF", "pbm": "PPM"}.get(ending, ending)
            path = tmp_path / name / f"{number}.{ending}"
            path.parent.mkdir(exist_ok=True)
            smooth(label, number, 24, 24).save(path, kind)
    dataset = load_dataset(folder(tmp_path))
    assert sum(len(split) for split in (dataset.train, dataset.val, dataset.test)) == 14


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("constants", [{}, {"mean": [0.5] * 3, "std": [0.5] * 3}])
def test_images_of_one_colour_are_refused(tmp_path: Path, value, constants):
    write_folder(tmp_path)
    for path in tmp_path.glob("*/*"):
        Image.new("L", (32, 24), value).save(path)
    with pytest.raises(
        ValueError,
        match=rf"the 6 training images looked at \(the first of them: {tmp_path}/.*\.png\) are all of one colour, "
        rf"{value} of 255",
    ):
        load_dataset(folder(tmp_path, **constants))


def test_a_channel_that_never_changes_needs_constants(tmp_path: Path):
    write_folder(tmp_path)
    for seed, path in enumerate(sorted(tmp_path.glob("*/*"))):
        pixels = noise(24, 32, 3, seed=seed)
        pixels[..., 1] = 40
        Image.fromarray(pixels).save(path)
    with pytest.raises(ValueError, match=r"all have 40 in channel 2 of 3, .*; set data\.mean and data\.std$"):
        load_dataset(folder(tmp_path))
    assert load_dataset(folder(tmp_path, mean=[0.5] * 3, std=[0.5] * 3)).mean == (0.5,) * 3


def test_official_files_of_one_colour_are_refused(tmp_path: Path):
    write_stl10(tmp_path)
    path = tmp_path / "stl10_binary" / "train_X.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"'stl10': the 20 training images looked at are all of one colour, 0 of 255"):
        load_dataset(stl10(tmp_path))


def test_sixteen_bit_images_are_told_apart(tmp_path: Path):
    """Pillow alone makes one white image of all."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        for number in range(5):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(rng.integers(300, 65536, (24, 32), dtype=np.uint16)).save(tmp_path / name / f"{number}.png")
    dataset = load_dataset(folder(tmp_path))
    assert dataset.mean == pytest.approx([0.5] * 3, abs=0.02)
    assert dataset.std == pytest.approx([0.29] * 3, abs=0.02)


def test_parts_with_other_classes_are_refused(tmp_path: Path):
    write_folder(tmp_path, "train")
    write_folder(tmp_path, "val", classes=("cat", "ant"))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/val: its classes are not those of .*: lacks bee"):
        load_dataset(folder(tmp_path))


def test_a_class_without_images_is_refused(tmp_path: Path):
    write_folder(tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "x.txt").write_text("")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/dog: has no image \(\.jpg"):
        load_dataset(folder(tmp_path))


def test_images_of_several_sizes_need_an_image_size(tmp_path: Path):
    write_folder(tmp_path)
    write_image(tmp_path / "bee" / "2.png", smooth(1, 2, 25, 32))
    for call in (load_dataset, dataset_info):
        with pytest.raises(ValueError, match=r"bee/2.png: has not the size of .*ant/0.png, 32 × 24 .*data.image_size"):
            call(folder(tmp_path))
    config = folder(tmp_path, image_size=16)
    assert dataset_info(config).image_shape == (3, 16, 16)
    (batch,) = eval_batches(load_dataset(config).train, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert batch.images.shape[1:] == (3, 16, 16)


def test_a_root_must_be_named_and_exist(tmp_path: Path):
    for config, rule in (
        (DataConfig(name="image_folder"), "data.root must name"),
        (folder(tmp_path / "x"), "is not a folder"),
    ):
        assert rule in missing_data(config)
        for call in (load_dataset, dataset_info, fingerprint):
            with pytest.raises(ValueError, match=rule):
                call(config)


def test_a_damaged_header_is_named(tmp_path: Path):
    write_folder(tmp_path)
    (tmp_path / "bee" / "2.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"bee/2\.png: cannot be read as an image: .*; replace or remove the file"):
        load_dataset(folder(tmp_path))


# --- all of them ----------------------------------------------------------------------------------------------------

WRITERS = {
    "cifar10": (write_cifar10, lambda root, **c: DataConfig(name="cifar10", root=str(root), **c)),
    "cifar100": (write_cifar100, cifar100),
    "image_folder": (lambda root: write_folder(root, "train", "val"), folder),
    "imagenet": (write_imagenet, imagenet),
    "stl10": (write_stl10, stl10),
    "tiny_imagenet": (write_tiny, tiny),
}


def shape_of(split) -> tuple[int, ...]:
    return next(eval_batches(split, mean=(0.0,) * 3, std=(1.0,) * 3, batch_size=1)).images.shape[1:]


def test_every_dataset_is_tried_here():
    assert set(dataset_names()) - set(WRITERS) == {"digits", "glyphs"}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("image_size", [None, 48])
def test_the_info_is_that_of_the_batches(tmp_path: Path, name, image_size):
    write, config = WRITERS[name]
    write(tmp_path)
    config = config(tmp_path, image_size=image_size)
    info, dataset = dataset_info(config), load_dataset(config)
    assert missing_data(config) is None
    assert dataset.num_classes == info.num_classes == len(dataset.train.labels.unique())
    assert all(shape_of(split) == info.image_shape for split in (dataset.train, dataset.val, dataset.test))


@pytest.mark.parametrize("name", WRITERS)
def test_the_fingerprint_is_of_the_files_and_not_of_their_place(tmp_path: Path, name):
    write, config = WRITERS[name]
    write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = fingerprint(config(tmp_path / "a"))
    assert fingerprint(config(tmp_path / "b")) == first
    files = sorted(
        p for p in (tmp_path / "b").rglob("*") if p.is_file() and "test/images" not in str(p) and p.suffix != ".txt"
    )
    files[0].write_bytes(files[0].read_bytes() + b"x")
    assert fingerprint(config(tmp_path / "b")) != first


def test_the_fingerprint_of_what_is_made_is_of_its_arguments():
    seeds = [DataConfig(name="glyphs", kwargs={"seed": seed}) for seed in (0, 1)]
    assert len({fingerprint(config) for config in (DataConfig(name="digits"), *seeds)}) == 3
    assert fingerprint(DataConfig(name="digits", val_fraction=0.3, root="x")) == fingerprint(DataConfig(name="digits"))


def rewritten(path: Path, change) -> None:
    """Other bytes of the same size, with the times they had, as rsync leaves them."""
    state, content = path.stat(), path.read_bytes()
    path.write_bytes(change(content))
    assert path.stat().st_size == state.st_size
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("name", WRITERS)
def test_the_fingerprint_sees_other_bytes_of_the_same_size(tmp_path: Path, name):
    write, config = WRITERS[name]
    write(tmp_path)
    seen = {fingerprint(config(tmp_path))}
    files = [p for p in tmp_path.rglob("*") if p.is_file() and "test/images" not in str(p) and p.suffix != ".txt"]
    for path in files[:: max(1, len(files) // 5)]:
        rewritten(path, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(fingerprint(config(tmp_path)))
    assert len(seen) == 1 + len(files[:: max(1, len(files) // 5)])


def test_the_fingerprint_sees_other_labels(tmp_path: Path):
    written = write_cifar100(tmp_path / "c")
    first = fingerprint(cifar100(tmp_path / "c"))
    labels = [(i + 1) % 100 for i in range(500)]
    path = tmp_path / "c" / "cifar-100-python" / "train"
    rewritten(path, lambda content: python2_pickle(written["train"], "fine_labels", labels))
    assert fingerprint(cifar100(tmp_path / "c")) != first
    tree = write_tiny(tmp_path / "t")
    first = fingerprint(tiny(tmp_path / "t"))
    rewritten(tree / "val" / "val_annotations.txt", lambda content: content.replace(b"n01", b"n03"))
    assert fingerprint(tiny(tmp_path / "t")) != first


def test_the_fingerprint_sees_classes_that_change_places(tmp_path: Path):
    write_folder(tmp_path)
    first = fingerprint(folder(tmp_path))
    (tmp_path / "cat").rename(tmp_path / "aardvark")
    assert fingerprint(folder(tmp_path)) != first


def test_the_fingerprint_of_many_images_is_of_names_sizes_and_a_sample(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(identity, "SAMPLED", 4)
    write_folder(tmp_path)
    config, read = folder(tmp_path), []
    hashed = identity.content_hash
    monkeypatch.setattr(identity, "content_hash", lambda path: read.append(Path(path)) or hashed(path))
    first = fingerprint(config)
    assert [f"{path.parent.name}/{path.name}" for path in read] == ["ant/0.png", "ant/3.png", "bee/2.png", "cat/1.png"]
    rewritten(read[2], lambda content: content[:-1] + b"x")
    assert fingerprint(config) != first
    second = fingerprint(config)
    rewritten(tmp_path / "ant" / "1.png", lambda content: content[:-1] + b"x")
    assert fingerprint(config) == second, "which is what it cannot see"
    (tmp_path / "ant" / "1.png").write_bytes(b"another size")
    assert fingerprint(config) != second


def test_the_fingerprint_of_a_linked_tree_is_that_of_the_tree(tmp_path: Path):
    write_folder(tmp_path / "a")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").mkdir()
    for name in ("ant", "bee", "cat"):
        (tmp_path / "c" / name).symlink_to(tmp_path / "a" / name)
    assert len({fingerprint(folder(tmp_path / name)) for name in "abc"}) == 1


def test_an_empty_image_file_is_named_before_anything_is_trained(tmp_path: Path):
    folder = write_imagenet(tmp_path)
    path = folder / "train" / "n01443537" / "n01443537_2.JPEG"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^{path}: is empty \(0 bytes\); replace or remove the file$"):
        fingerprint(imagenet(tmp_path))


def test_the_fingerprint_reads_a_file_once(tmp_path: Path, monkeypatch):
    write_cifar100(tmp_path)
    first = fingerprint(cifar100(tmp_path))
    opened = []
    monkeypatch.setattr("builtins.open", lambda *arguments, **options: opened.append(arguments))
    assert fingerprint(cifar100(tmp_path)) == first
    assert not opened


def test_the_fingerprint_of_what_is_made_is_of_what_is_given(monkeypatch):
    """By another version of scikit-learn, of the fonts, or of Pillow."""
    digits, written = DataConfig(name="digits"), DataConfig(name="glyphs")
    first = fingerprint(digits), fingerprint(written)
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    of_arrays = fingerprint(digits)
    made = datasets._load_digits()
    made.images[7, 0, 3, 3] += 1
    monkeypatch.setattr(datasets, "_load_digits", lambda: made)
    assert len({first[0], of_arrays, fingerprint(digits)}) == 3
    render = glyphs.render
    monkeypatch.setattr(glyphs, "render", lambda index, *, seed: render(index, seed=seed) // (1 + (index == 30)))
    glyphs._identity.cache_clear()
    assert fingerprint(written) != first[1]
    monkeypatch.undo()
    glyphs._identity.cache_clear()
    monkeypatch.setattr(glyphs, "FONTS", ("STIXGeneral", *glyphs.FONTS[1:]))
    assert fingerprint(written) != first[1]
    monkeypatch.undo()
    glyphs._identity.cache_clear()
    assert (fingerprint(digits), fingerprint(written)) == first


def test_glyphs_come_with_their_arguments():
    config = DataConfig(name="glyphs", kwargs={"train_images": 300, "test_images": 100}, val_fraction=0.34)
    dataset = load_dataset(config)
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [200, 100, 100]
    assert dataset_info(config) == datasets.DatasetInfo(100, tuple(dataset.train.images.shape[1:]))
    with pytest.raises(ValueError, match=r"data.kwargs.images: unknown; .*known: seed, test_images, train_images"):
        load_dataset(config.model_copy(update={"kwargs": {"images": 3}}))


def test_a_dataset_is_kept_for_its_config_and_root(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TUNE_TOPKD_DATA_DIR", str(tmp_path / "a"))
    write_stl10(tmp_path / "a")
    write_stl10(tmp_path / "b")
    config = DataConfig(name="stl10", val_fraction=0.4)
    first = load_dataset(config)
    assert load_dataset(stl10(tmp_path / "a")) is first
    assert load_dataset(config.model_copy(update={"download": True})) is first
    monkeypatch.setenv("TUNE_TOPKD_DATA_DIR", str(tmp_path / "b"))
    assert load_dataset(config) is not first


# --- splits, sizes and constants ------------------------------------------------------------------------------------


def test_published_selection_trains_on_all_and_validates_on_the_test_part(tmp_path: Path):
    write_stl10(tmp_path)
    plain, published = (load_dataset(stl10(tmp_path, selection=s)) for s in ("validation", "best_test_epoch"))
    assert (plain.selection, published.selection) == ("validation", "best_test_epoch")
    assert published.val is published.test
    assert torch.equal(published.test.images, plain.test.images)
    assert published.train.labels.tolist() == [i % 10 for i in range(30)]


def test_published_selection_without_a_test_part_keeps_the_same_test_images(tmp_path: Path):
    write_folder(tmp_path)
    plain, published = (load_dataset(folder(tmp_path, selection=s)) for s in ("validation", "best_test_epoch"))
    assert published.val is published.test
    assert published.test.paths == plain.test.paths
    assert sorted(published.train.paths) == sorted(plain.train.paths + plain.val.paths)


def test_a_fraction_that_leaves_a_split_without_a_class_is_refused(tmp_path: Path):
    write_stl10(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"'stl10': val_fraction = 0\.01 leaves the validation split without an image "
        r"of classes 0 \(3 in all\), .* and 7 more; "
        "raise data\\.val_fraction, add images",
    ):
        load_dataset(stl10(tmp_path).model_copy(update={"val_fraction": 0.01}))
    (tmp_path / "stl10_binary" / "test_y.bin").write_bytes(b"\x01" * 20)
    with pytest.raises(
        ValueError, match=r"'stl10': its test part has no image of classes 1, 2, 3 and 6 more; complete"
    ):
        load_dataset(stl10(tmp_path))


def test_the_classes_that_a_fraction_leaves_out_are_named(tmp_path: Path):
    write_folder(tmp_path)
    for number in range(1, 5):
        (tmp_path / "bee" / f"{number}.png").unlink()
    with pytest.raises(
        ValueError,
        match=r"'image_folder': val_fraction = 0\.2 and test_fraction = 0\.4 leave the training split without an image of "
        r"class bee \(1 in all\); lower data\.val_fraction or data\.test_fraction, add images, or remove what has too few$",
    ):
        load_dataset(folder(tmp_path))


def test_larger_images_in_memory_are_resized_once(tmp_path: Path):
    test = torch.from_numpy(write_stl10(tmp_path))
    dataset = load_dataset(stl10(tmp_path, image_size=32))
    assert dataset.test.images.dtype == torch.uint8
    assert dataset.test.image_size is None
    blocks = test.double().unfold(2, 3, 3).unfold(3, 3, 3).mean((4, 5))
    assert dataset.test.images.shape == blocks.shape
    assert (dataset.test.images - blocks).abs().mean() < 15  # close to the mean of 3 × 3 pixels, and not to one of them
    assert (test[:, :, 1::3, 1::3] - blocks).abs().mean() > 40


def test_smaller_images_in_memory_are_resized_batch_by_batch(tmp_path: Path):
    write_stl10(tmp_path)
    dataset = load_dataset(stl10(tmp_path, image_size=144))
    assert dataset.train.images.shape[2:] == (96, 96)
    assert (dataset.train.image_size, dataset.val.image_size) == (144, 144)
    assert load_dataset(stl10(tmp_path, image_size=96)).train.image_size is None


def test_constants_can_be_given(tmp_path: Path):
    write_stl10(tmp_path)
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    dataset = load_dataset(stl10(tmp_path, **given))
    assert (dataset.mean, dataset.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(
        ValueError, match=r"'digits': data.mean and data.std need one number per channel, 1, but have 3"
    ):
        load_dataset(DataConfig(name="digits", **given))


def test_constants_of_image_files_are_those_of_the_training_split(tmp_path: Path):
    write_folder(tmp_path)
    dataset = load_dataset(folder(tmp_path))
    pixels = np.stack([np.asarray(Image.open(path)) for path in dataset.train.paths]).reshape(-1, 3) / 255
    assert dataset.mean == pytest.approx(pixels.mean(0))
    assert dataset.std == pytest.approx(pixels.std(0))


def test_constants_of_many_image_files_are_those_of_a_sample(tmp_path: Path, monkeypatch):
    write_folder(tmp_path)
    for seed, path in enumerate(sorted(tmp_path.glob("*/*"))):
        Image.fromarray(noise(24, 32, 3, seed=seed)).save(path)
    monkeypatch.setattr(datasets, "MEASURED_FILES", 1)
    dataset = load_dataset(folder(tmp_path))
    means = [tuple(np.asarray(Image.open(path)).reshape(-1, 3).mean(0) / 255) for path in dataset.train.paths]
    assert any(dataset.mean == pytest.approx(mean) for mean in means)


def test_the_constants_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            datasets._loaded.cache_clear()
            dataset = load_dataset(DataConfig(name="digits"))
            found.add((dataset.mean, dataset.std))
    finally:
        torch.set_num_threads(before)
        datasets._loaded.cache_clear()
    assert len(found) == 1
