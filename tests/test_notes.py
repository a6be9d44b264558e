"""What is said of a dataset that can be used, before anything is trained on it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tune_topkd.config import DataConfig
from tune_topkd.data import data_notes
from tune_topkd.data import notes
from tune_topkd.sweep.preflight import load_checked


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (16, 16, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> DataConfig:
    """Three classes of six images."""
    for label, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.fromarray(noise(10 * label + number)).save(tmp_path / name / f"{number}.png")
    return DataConfig(name="image_folder", root=str(tmp_path), val_fraction=0.2, test_fraction=0.2)


def test_there_is_nothing_to_say_of_plain_images(folder, tmp_path: Path):
    (tmp_path / "ant" / "README.txt").write_text("six ants")
    assert data_notes(folder) == []
    for name in ("digits", "cifar100", "tiny_imagenet", "imagenet"):
        assert data_notes(DataConfig(name=name, root=str(tmp_path / "none"))) == []
    assert data_notes(DataConfig(name="image_folder", root=str(tmp_path / "none"))) == []


def test_files_that_are_not_read_are_counted(folder, tmp_path: Path):
    for number in range(3):
        (tmp_path / "ant" / f"{number}.HEIC").write_bytes(b"x")
    (tmp_path / "bee" / "x.png.part").write_bytes(b"x")
    (told,) = data_notes(folder)
    assert told == "4 files beside the 18 images are not read (3 .heic, 1 .part)"


def transparent(image: Image.Image, path: Path) -> None:
    image.putalpha(Image.fromarray(noise(1, 16, 16)))
    image.save(path)


def turned(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def animated(image: Image.Image, path: Path) -> None:
    image.save(path, format="GIF", save_all=True, append_images=[Image.fromarray(noise(2))])


@pytest.mark.parametrize(
    ("save", "told"), [(transparent, "have transparency"), (turned, "(Exif)"), (animated, "have several frames")]
)
def test_images_of_which_something_is_left_out_are_counted(folder, tmp_path: Path, save, told):
    for number in (2, 4):
        save(Image.fromarray(noise(100 + number)), tmp_path / "bee" / f"{number}.png")
    (note,) = data_notes(folder)
    assert note.startswith("2 of 18 images looked at ")
    assert note.endswith(f"(as {tmp_path}/bee/2.png)")
    assert told in note


def test_an_alpha_channel_that_hides_nothing_is_no_news(folder, tmp_path: Path):
    Image.fromarray(noise(7)).convert("RGBA").save(tmp_path / "ant" / "1.png")
    assert data_notes(folder) == []


@pytest.mark.parametrize(("most", "is_told"), [(4096, True), (65536, False)])
def test_deep_images_of_which_few_greys_are_left_are_told_of(folder, tmp_path: Path, most, is_told):
    """As a camera of 12 bits writes them."""
    for seed, path in enumerate(tmp_path.glob("*/*.png")):
        Image.fromarray(np.random.default_rng(seed).integers(0, most, (16, 16), dtype=np.uint16)).save(path)
    told = data_notes(folder)
    assert len(told) == is_told
    assert all("the images of 16 bits use less than 6.2% of their range" in note for note in told)


def test_copies_are_told_of(folder, tmp_path: Path, monkeypatch):
    for source, copy in (("ant/1", "ant/7"), ("ant/1", "cat/8"), ("bee/3", "bee/9")):
        (tmp_path / f"{copy}.png").write_bytes((tmp_path / f"{source}.png").read_bytes())
    (told,) = data_notes(folder)
    assert told.startswith("3 images are copies of others, 1 of them under another class (as ")
    monkeypatch.setattr(notes, "COMPARED_BYTES", 100)
    assert data_notes(folder) == []


def test_a_damaged_image_among_those_looked_at_is_named_at_once(folder, tmp_path: Path):
    path = tmp_path / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"^{path}: cannot be read as an image: .*replace or remove the file$"):
        data_notes(folder)


def test_the_notes_reach_who_starts_a_sweep(folder, tmp_path: Path):
    (tmp_path / "ant" / "1.heic").write_bytes(b"x")
    space = tmp_path / "space.yaml"
    space.write_text(
        f"method: ce\ndata: {{name: image_folder, root: {tmp_path}, val_fraction: 0.2, test_fraction: 0.2}}\n"
        "student: {name: small_cnn, kwargs: {widths: [4, 8], strides: [2, 2]}}\nrecipe: {epochs: 1, batch_size: 4}\n"
        "space: {lr: {low: 0.01, high: 0.1, log: true}}\nsweep: {trials: 1, asha: null}\nbaselines: null\n"
    )
    assert "1 file beside the 18 images is not read (1 .heic)" in load_checked(str(space)).warnings
