"""Image files of every kind that Pillow tells apart: their light comes out right, or they are refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tune_topkd.data.decoding import ImageFileError
from tune_topkd.data.decoding import decoded

RAMP = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
"""Each grey once."""


def grey_of(path: Path) -> np.ndarray:
    image = decoded(str(path))
    assert (image.dtype, image.shape[0]) == (torch.uint8, 3)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    return image[0].numpy()


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_become_eight_by_their_higher_byte(tmp_path: Path, ending):
    deep = RAMP.astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(grey_of(saved(Image.fromarray(deep), tmp_path / f"x.{ending}")), RAMP)


def test_sixteen_bits_of_another_byte_order_are_read_alike(tmp_path: Path):
    deep = Image.frombytes("I;16B", (16, 16), (RAMP.astype(np.uint16) * 256 + 77).astype(">u2").tobytes())
    np.testing.assert_array_equal(grey_of(saved(deep, tmp_path / "x.tif")), RAMP)


def test_twelve_bits_of_a_tiff_use_all_greys(tmp_path: Path):
    """Pillow reads them but does not write them: two values in three bytes."""
    values = RAMP.astype(int).ravel() * 16 + 5
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    tags = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 16, 279: 384}
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\x04\x00\x01\x00\x00\x00" + value.to_bytes(4, "little")
        for tag, value in tags.items()
    )
    head = b"II*\x00\x08\x00\x00\x00" + len(tags).to_bytes(2, "little") + entries + b"\x00" * 4
    (tmp_path / "x.tif").write_bytes(head + packed.astype(np.uint8).tobytes())
    with Image.open(tmp_path / "x.tif") as image:
        assert image.mode == "I;16"
        assert np.asarray(image).max() == 255 * 16 + 5
    np.testing.assert_array_equal(grey_of(tmp_path / "x.tif"), RAMP)


def test_floats_from_0_to_1_are_black_to_white(tmp_path: Path):
    path = saved(Image.fromarray(RAMP.astype(np.float32) / 255), tmp_path / "x.tif")
    np.testing.assert_array_equal(grey_of(path), RAMP)


@pytest.mark.parametrize(
    ("pixels", "rule"),
    [
        (RAMP.astype(np.float32), r"floating-point pixels \(mode F\) from 0 to 255; only floats from 0"),
        (RAMP.astype(np.float32) / 255 - 0.5, r"from -0\.5 to 0\.5"),
        (np.where(RAMP > 9, np.nan, 0.5).astype(np.float32), "from nan to nan"),
        (RAMP.astype(np.int32) * 1000, r"integers of 32 bits \(mode I\)"),
    ],
)
def test_what_nothing_says_the_white_of_is_refused_by_name(tmp_path: Path, pixels, rule):
    path = saved(Image.fromarray(pixels), tmp_path / "x.tif")
    with pytest.raises(ImageFileError, match=rf"^{path}: has .*{rule}.* convert it to 8 or 16 bits$"):
        decoded(str(path))


@pytest.mark.parametrize(
    ("mode", "ending"),
    [(m, e) for m in ("1", "L", "RGB", "YCbCr", "CMYK") for e in ("png", "tif", "jpg") if e != "png" or len(m) < 4],
)
def test_other_images_are_what_pillow_makes_of_them(tmp_path: Path, mode, ending):
    path = saved(Image.fromarray(RAMP).convert(mode), tmp_path / f"x.{ending}")
    with Image.open(path) as stored:
        expected = np.asarray(stored.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded(str(path)).numpy(), expected)
    assert len(np.unique(expected)) >= (2 if mode == "1" else 200)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_the_colours_beneath_transparency_are_shown(tmp_path: Path, mode):
    alpha = Image.fromarray(255 - RAMP)
    if mode in ("RGBA", "LA"):
        image = Image.fromarray(RAMP).convert(mode)
        image.putalpha(alpha)
        path = saved(image, tmp_path / "x.png")
    else:
        image = Image.fromarray(RAMP)
        if mode == "P":
            image = image.convert("P")
            image.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
        path = saved(image, tmp_path / "x.png", transparency=bytes(range(256)) if mode == "P" else 9)
    np.testing.assert_array_equal(grey_of(path), RAMP)


def test_an_image_drawn_in_its_transparency_alone_is_refused(tmp_path: Path):
    image = Image.new("RGBA", (16, 16))
    image.putalpha(Image.fromarray(RAMP))
    path = saved(image, tmp_path / "x.png")
    with pytest.raises(
        ImageFileError, match=rf"^{path}: has the same colour everywhere and is drawn by its transparency alone"
    ):
        decoded(str(path))
    for alpha in (0, 200, 255):
        assert decoded(str(saved(Image.new("RGBA", (4, 4), (1, 1, 1, alpha)), path))).unique().tolist() == [1]


def test_the_camera_s_orientation_is_left_aside_as_torchvision_does(tmp_path: Path):
    from torchvision.datasets.folder import pil_loader

    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(Image.fromarray(RAMP[:8]), tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(decoded(str(path)).numpy().transpose(1, 2, 0), np.asarray(pil_loader(str(path))))
    np.testing.assert_array_equal(grey_of(path), RAMP[:8])


def test_of_several_frames_the_first_counts(tmp_path: Path):
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    for ending in ("gif", "tif"):
        path = tmp_path / f"x.{ending}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert grey_of(path).max() == 10


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_image_is_named(tmp_path: Path, content):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageFileError, match=rf"^{path}: cannot be read as an image: .*replace or remove the file$"):
        decoded(str(path))
