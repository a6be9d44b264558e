"""Glyphs: 100 classes of rendered characters, RGB 32 × 32, any number of images; nothing is downloaded.

The characters are rendered in the fonts that ship with matplotlib, and chosen so that every class has look-alikes:
letters with and without accents, Latin and Greek letters, zero and O. Font, colours, size, place, shear, rotation,
clutter, blur and noise are drawn for each image. An image is a function of (seed, part, index) alone, so a larger set
begins with the smaller one.
"""

import functools
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tune_topkd.data.errors import DataError

if TYPE_CHECKING:
    from PIL import Image
    from PIL import ImageFont

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyzàáâäãåçèéêëìíîïñòóôöõùúûüýαβγδεημνρσωÆ"
"""One per class, in the order of the classes."""

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
)
"""Files in matplotlib's font folder that have all of the characters."""

SIDE = 32
_CANVAS = 64
"""Side of the rendering before it is halved, which smooths the edges."""
_TRAIN, _TEST = range(2)


def load(*, train_images: int = 8000, test_images: int = 2000, seed: int = 0) -> tuple[tuple[Tensor, Tensor], ...]:
    """Render a training and a test part.

    Args:
        train_images: their number; the class of an image is its index modulo 100, so a multiple of 100 is balanced.
        test_images: likewise.
        seed: of all random draws.

    Returns:
        Images `(N, 3, 32, 32)` uint8 and labels `(N,)` int64, of the training part and of the test part. The pixels
        also depend on the versions of matplotlib's fonts, Pillow and numpy.

    Raises:
        DataError: a part has fewer images than there are classes, or the seed is negative.
    """
    for name, count in (("train_images", train_images), ("test_images", test_images)):
        if type(count) is not int or count < len(CHARACTERS):
            raise DataError(f"glyphs: {name} must be a whole number of at least {len(CHARACTERS)}, but got {count!r}")
    _check_seed(seed)
    return _part(train_images, seed, _TRAIN), _part(test_images, seed, _TEST)


def identity(seed: int) -> str:
    """A hash of the fonts' files and of the first image of each class.

    Raises:
        DataError: the seed is negative.
    """
    _check_seed(seed)
    return _identity(seed)


def _check_seed(seed: object) -> None:
    if type(seed) is not int or seed < 0:
        raise DataError(f"glyphs: seed must be a whole number of at least 0, but got {seed!r}")


@functools.cache
def _identity(seed: int) -> str:
    found = hashlib.sha256()
    for name in FONTS:
        found.update(_font_file(name).read_bytes())
    for index in range(len(CHARACTERS)):
        found.update(render(index, seed=seed).tobytes())
    return found.hexdigest()


def _part(count: int, seed: int, part: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % len(CHARACTERS)
    pixels = np.stack([render(index, seed=seed, part=part) for index in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


def render(index: int, *, seed: int, part: int = _TRAIN) -> "np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]":
    """The image with this index, `(32, 32, 3)` uint8; its class is the index modulo 100."""
    from PIL import Image
    from PIL import ImageFilter

    random = np.random.default_rng((seed, part, index))
    mask = _glyph(CHARACTERS[index % len(CHARACTERS)], random, size=random.uniform(34, 56), centre=_CANVAS / 2)
    clutter = Image.new("L", (_CANVAS, _CANVAS))
    for _ in range(random.integers(0, 3)):
        angle = random.uniform(0, 2 * math.pi)
        away = _CANVAS * random.uniform(0.42, 0.6)
        place = (_CANVAS / 2 + away * math.cos(angle), _CANVAS / 2 + away * math.sin(angle))
        other = CHARACTERS[random.integers(len(CHARACTERS))]
        piece = _glyph(other, random, size=random.uniform(28, 48), centre=place)
        clutter.paste(255, mask=piece)
    back, ink, third = _colours(random)
    picture = Image.new("RGB", (_CANVAS, _CANVAS), back)
    picture.paste(third, mask=clutter)
    picture.paste(ink, mask=mask)
    picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(0.0, 2.2)))
    small = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    noisy = small + random.normal(0.0, random.uniform(4.0, 32.0), small.shape).astype(np.float32)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _glyph(
    character: str, random: np.random.Generator, *, size: float, centre: float | tuple[float, float]
) -> "Image.Image":
    """A mask of the character, centred near `centre`, sheared and rotated about it."""
    from PIL import Image
    from PIL import ImageDraw

    font = _font(FONTS[random.integers(len(FONTS))], round(size))
    angle, shear = math.radians(random.uniform(-20, 20)), random.uniform(-0.3, 0.3)
    middle = np.broadcast_to(np.asarray(centre, dtype=float), 2) + random.uniform(-5, 5, 2)
    left, top, right, bottom = font.getbbox(character)
    mask = Image.new("L", (_CANVAS, _CANVAS))
    corner = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
    ImageDraw.Draw(mask).text(corner, character, fill=255, font=font)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos, sin], [-sin, cos]]) @ np.array([[1.0, shear], [0.0, 1.0]])
    offset = np.full(2, _CANVAS / 2) - matrix @ middle  # the transform maps the target of a pixel to its origin
    (a, b), (d, e) = matrix.tolist()
    coefficients = (a, b, float(offset[0]), d, e, float(offset[1]))
    return mask.transform(mask.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def _colours(random: np.random.Generator) -> list[tuple[int, int, int]]:
    """The colours of background, character and clutter; the background is darker than the character."""
    back, ink = random.uniform(0, 100), random.uniform(150, 255)
    third = random.uniform(back, ink)
    rows = np.clip(np.array([[back], [ink], [third]]) + random.uniform(-40, 40, (3, 3)), 0, 255)
    return [(int(r), int(g), int(b)) for r, g, b in rows.tolist()]


@functools.cache
def _font(name: str, size: int) -> "ImageFont.FreeTypeFont":
    from PIL import ImageFont

    return ImageFont.truetype(_font_file(name), size, layout_engine=ImageFont.Layout.BASIC)


def _font_file(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
