"""Image files as RGB of 8 bits: what cannot be brought to that without loss is refused by name.

As torchvision has it: of several frames the first counts, what is beneath transparency is shown, neither the camera's
orientation (Exif) nor colour profiles are applied, and 16 bits become 8 by their higher byte.
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
"""Tag of a TIFF that says how many bits a value has."""


class ImageFileError(DataError):
    """An image file that cannot be used; the message names it, and says why and what to do."""


def decoded(path: str) -> Tensor:
    """An image file as RGB, `(3, H, W)` uint8.

    Raises:
        ImageFileError: it cannot be read, decoded, or brought to 8 bits without loss.
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
    """Whether an image has an alpha channel, or a colour that stands for none."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def is_deep(image: "Image.Image") -> bool:
    """Whether an image has 16 bits of grey, which Pillow by itself would clip to 8."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def depth(image: "Image.Image") -> int:
    """Bits of a value of an image that `is_deep`."""
    tags: Any = getattr(image, "tag_v2", {})
    return int(tags.get(_TIFF_BITS, (16,))[0])


def _rgb(image: "Image.Image", path: str) -> "Image.Image":
    if is_deep(image):
        return _grey(np.asarray(image).astype(np.int64) >> depth(image) - 8)
    if image.mode == "F":
        return _grey(_scaled(np.asarray(image), path))
    if image.mode == "I":
        raise ImageFileError(
            f"{path}: has whole numbers of 32 bits (mode I), of which nothing says what white is; convert it to 8 or 16 bits"
        )
    if has_transparency(image):
        return _opaque(image, path)
    return image.convert("RGB")


def _grey(values: "np.ndarray[Any, Any]") -> "Image.Image":
    from PIL import Image

    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _scaled(values: "np.ndarray[Any, Any]", path: str) -> "np.ndarray[Any, Any]":
    """Floats from 0 to 1, as they are usual, from 0 to 255."""
    if values.min() >= 0 and values.max() <= 1:  # neither holds of NaN
        scaled: np.ndarray[Any, Any] = np.rint(values * 255)
        return scaled
    raise ImageFileError(
        f"{path}: has floating-point pixels (mode F) from {values.min():g} to {values.max():g}; only 0 to 1 is known to "
        "mean black to white: scale it to that, or convert it to 8 or 16 bits"
    )


def _opaque(image: "Image.Image", path: str) -> "Image.Image":
    whole = image.convert("RGBA")
    is_even = [channel.getextrema()[0] == channel.getextrema()[1] for channel in whole.split()]
    if is_even == [True, True, True, False]:
        raise ImageFileError(
            f"{path}: is drawn in its transparency alone: its colour is the same everywhere, and transparency is left out; "
            "flatten it onto a background of another colour"
        )
    return whole.convert("RGB")
