"""Image files as RGB of 8 bits; files that would be misread are refused.

As in torchvision, the first of several frames is read, transparency is dropped, neither the orientation (Exif) nor a
colour profile is applied, and of 16 bits the higher 8 are kept.
"""

import struct
import zlib
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from torch import Tensor

from tune_topkd.data.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_TIFF_BITS = 258
"""Tag of a TIFF file for the number of bits of a value."""


class ImageFileError(DataError):
    """An image file cannot be used; the message names it and says why and what to do."""


def decoded(path: str) -> Tensor:
    """An image file as RGB, `(3, H, W)` uint8.

    Raises:
        ImageFileError: it cannot be read or decoded, or nothing says how to bring its values to 8 bits.
    """
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    damage = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
    try:
        with Image.open(path) as image:
            return pil_to_tensor(_rgb(image, path))  # type: ignore[no-any-return]
    except ImageFileError:
        raise
    except damage as error:
        raise ImageFileError(f"{path}: cannot be read as an image: {error}; replace or remove the file") from error


def has_transparency(image: "Image.Image") -> bool:
    """Whether an image has an alpha channel, or a colour that stands for transparency."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def is_deep(image: "Image.Image") -> bool:
    """Whether an image has up to 16 bits of grey, which Pillow by itself would clip to 8."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def depth(image: "Image.Image") -> int:
    """Bits per value of an image that `is_deep`."""
    tags: Any = getattr(image, "tag_v2", {})
    return int(tags.get(_TIFF_BITS, (16,))[0])


def _rgb(image: "Image.Image", path: str) -> "Image.Image":
    if is_deep(image):
        return _grey(np.asarray(image).astype(np.int64) >> depth(image) - 8)
    if image.mode == "F":
        return _grey(_scaled(np.asarray(image), path))
    if image.mode == "I":
        raise ImageFileError(
            f"{path}: has integers of 32 bits (mode I), and nothing says which value is white; convert it to 8 or 16 bits"
        )
    if has_transparency(image):
        return _opaque(image, path)
    return image.convert("RGB")


def _grey(values: "np.ndarray[Any, Any]") -> "Image.Image":
    from PIL import Image

    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _scaled(values: "np.ndarray[Any, Any]", path: str) -> "np.ndarray[Any, Any]":
    """Floats from 0 to 1, scaled to 0 to 255."""
    if values.min() >= 0 and values.max() <= 1:  # neither holds of NaN
        scaled: np.ndarray[Any, Any] = np.rint(values * 255)
        return scaled
    raise ImageFileError(
        f"{path}: has floating-point pixels (mode F) from {values.min():g} to {values.max():g}; only floats from 0 "
        "(black) to 1 (white) are read: scale it to that, or convert it to 8 or 16 bits"
    )


def _opaque(image: "Image.Image", path: str) -> "Image.Image":
    whole = image.convert("RGBA")
    is_even = [channel.getextrema()[0] == channel.getextrema()[1] for channel in whole.split()]
    if is_even == [True, True, True, False]:
        raise ImageFileError(
            f"{path}: has the same colour everywhere and is drawn by its transparency alone, which is ignored; flatten it "
            "onto a background of another colour"
        )
    return whole.convert("RGB")
