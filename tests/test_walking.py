"""Folders of images as they are found: with leftovers, links, loops, other forms of names, and what is no image."""

import os
import unicodedata
from pathlib import Path

import pytest
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.folder import make_dataset

from tune_topkd.data import walking
from tune_topkd.data.walking import has_image
from tune_topkd.data.walking import in_both
from tune_topkd.data.walking import is_image
from tune_topkd.data.walking import listing
from tune_topkd.data.walking import subfolders


def touched(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def found(folder: Path) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in listing(folder).images]


def test_images_come_in_the_order_of_torchvision(tmp_path: Path):
    names = [
        "b/z.png",
        "b/2/a.JPG",
        "b/2-x/a.png",
        "b/2/q/a.bmp",
        "b/10.png",
        "b/9.png",
        "a/é.png",
        "a/f.webp",
        "a/Z.tif",
    ]
    touched(*(tmp_path / name for name in names), tmp_path / "a" / "x.txt")
    expected = make_dataset(str(tmp_path), {"a": 0, "b": 1}, extensions=IMG_EXTENSIONS)
    ours = [(path, number) for number, name in enumerate("ab") for path in listing(tmp_path / name).images]
    assert ours == expected
    assert len(ours) == len(names)


LEFT = [
    ".ipynb_checkpoints/1-checkpoint.png", "._1.png", ".DS_Store", "__MACOSX/1.png", "__MACOSX/._1.png", "@eaDir/1.jpg",
    "sub/.ipynb_checkpoints/2.png", "sub/.hidden.png", "lost+found/1.png", "$RECYCLE.BIN/1.png", "Thumbs.db",
    "desktop.ini",
]  # fmt: skip


def test_what_programs_leave_beside_images_is_left_out_at_any_depth(tmp_path: Path):
    touched(*(tmp_path / name for name in [*LEFT, "1.png", "sub/2.png"]))
    assert found(tmp_path) == ["1.png", "sub/2.png"]
    assert list(subfolders(tmp_path)) == ["sub"]
    assert not listing(tmp_path).others
    for name in ("1.png", "sub/2.png"):
        (tmp_path / name).unlink()
    assert not has_image(tmp_path)


@pytest.mark.parametrize("target", [".", "..", "../..", "../sub"])
def test_a_link_that_leads_back_is_not_followed(tmp_path: Path, target):
    touched(tmp_path / "class" / "1.png", tmp_path / "class" / "sub" / "2.png", tmp_path / "other" / "3.png")
    (tmp_path / "class" / "sub" / "loop").symlink_to(target, target_is_directory=True)
    assert found(tmp_path / "class") == ["1.png", "sub/2.png"]


def test_a_file_is_there_once_by_its_own_name_if_it_has_one(tmp_path: Path):
    touched(tmp_path / "class" / "m.png", tmp_path / "far" / "1.png", tmp_path / "far" / "2.png")
    folder = tmp_path / "class"
    (folder / "a.png").symlink_to("m.png")
    (folder / "z.png").symlink_to("../far/1.png")
    (folder / "zz.png").symlink_to(tmp_path / "far" / "1.png")
    (folder / "y").symlink_to("../far", target_is_directory=True)
    (folder / "y2").symlink_to("../far", target_is_directory=True)
    assert found(folder) == ["m.png", "z.png", "y/2.png"]
    os.link(folder / "m.png", folder / "n.png")
    assert "n.png" in found(folder), "a hard link is a copy as any other"


def test_a_linked_tree_gives_the_same_as_the_tree(tmp_path: Path):
    touched(*(tmp_path / "real" / name for name in ("1.png", "sub/2.png")))
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    assert found(tmp_path / "link") == found(tmp_path / "real")
    assert not listing(tmp_path / "link").linked
    both = [listing(tmp_path / name) for name in ("real", "link")]
    assert in_both(both) == (str(tmp_path / "real" / "1.png"), str(tmp_path / "link" / "1.png"))


@pytest.mark.parametrize("link", ["b/x.png", "b/x", "b"])
def test_a_file_that_links_put_into_two_listings_is_found(tmp_path: Path, link):
    touched(tmp_path / "a" / "sub" / "1.png", tmp_path / "a" / "2.png")
    if link != "b":
        touched(tmp_path / "b" / "3.png")
        assert in_both([listing(tmp_path / name) for name in "ab"]) is None
    target = tmp_path / "a" / "sub" / ("1.png" if link == "b/x.png" else "")
    (tmp_path / link).symlink_to(target)
    one, other = in_both([listing(tmp_path / name) for name in "ab"])
    assert one == str(tmp_path / "a" / "sub" / "1.png")
    assert other.startswith(str(tmp_path / "b"))


def test_a_link_to_nothing_is_named(tmp_path: Path):
    (tmp_path / "x.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/x.png: is a link to {tmp_path}/gone.png, where no file is"):
        listing(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch):
    """A walk that left it out would leave out a part of a class without a word."""
    touched(tmp_path / "1.png", tmp_path / "sub" / "2.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(walking.os, "scandir", refuse)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/sub: cannot be read: Permission denied$"):
        listing(tmp_path)


def test_names_are_compared_and_sorted_composed(tmp_path: Path):
    names = ["élan", "eland", "zebra"]
    for form in ("NFC", "NFD"):
        for name in names:
            touched(tmp_path / form / unicodedata.normalize(form, name) / "1.png")
    assert list(subfolders(tmp_path / "NFD")) == list(subfolders(tmp_path / "NFC")) == ["eland", "zebra", "élan"]
    (tmp_path / "NFC" / unicodedata.normalize("NFD", "élan")).mkdir()
    with pytest.raises(ValueError, match=r"NFC: has two folders named élan, in two of Unicode's forms"):
        subfolders(tmp_path / "NFC")


def test_what_is_no_image_is_counted_by_its_ending(tmp_path: Path):
    touched(
        *(tmp_path / name for name in ("1.heic", "2.HEIC", "3.npy", "a/4", "5.txt", "6.jpg.part", "7.jfif", "8.GIF"))
    )
    os.mkfifo(tmp_path / "9.png")
    there = listing(tmp_path)
    assert [Path(path).name for path in there.images] == ["7.jfif", "8.GIF"]
    assert there.others == {".heic": 2, ".npy": 1, "": 1, ".part": 1, ".png": 1}


def test_all_that_torchvision_reads_is_read():
    assert all(is_image("x" + ending) and is_image("X" + ending.upper()) for ending in IMG_EXTENSIONS)
    assert not any(map(is_image, ("png", "x.png.zip", ".png", "._x.png", "x")))
