"""What a person should know of image files that can be used: which are not read, and what is lost in reading them."""

import os
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tune_topkd.data.decoding import decoded
from tune_topkd.data.decoding import depth
from tune_topkd.data.decoding import has_transparency
from tune_topkd.data.decoding import is_deep
from tune_topkd.data.identity import content_hash

if TYPE_CHECKING:
    from PIL import Image

    from tune_topkd.data.folders import Images

LOOKED_AT = 64
"""Image files that are opened, spread evenly over all."""
COMPARED_BYTES = 2**26
"""Files of the same size are compared with one another, unless all such files together are larger than this."""
COMPARED_FILES = 20_000
"""Nor are they compared where there are more image files than this."""

_FEW_GREYS = 64
_ORIENTATION = 0x0112


def image_notes(parts: Sequence["Images"]) -> Iterator[str]:
    """What a person should know of the image files of a dataset's parts.

    Raises:
        DataError: one of the files looked at cannot be decoded.
    """
    yield from _unread(parts)
    paths = [path for images in parts for path in images.paths]
    sample = sorted({len(paths) * number // LOOKED_AT for number in range(LOOKED_AT)})
    yield from _read_in_part([paths[index] for index in sample])
    if len(paths) <= COMPARED_FILES:
        yield from _doubles(parts)


def _unread(parts: Sequence["Images"]) -> Iterator[str]:
    others = sum((images.others() for images in parts), Counter[str]())
    if others:
        kinds = ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in others.most_common(4))
        images = sum(len(images.paths) for images in parts)
        count = sum(others.values())
        start = "1 file" if count == 1 else f"{count:,} files"
        yield f"{start} beside the {images:,} images {'is' if count == 1 else 'are'} not read ({kinds})"


def _read_in_part(paths: Sequence[str]) -> Iterator[str]:
    """Notes on images that lose something when they are read."""
    from PIL import Image

    found: dict[str, list[str]] = {}
    brightest = 0.0
    for path in paths:
        decoded(path)  # an unusable file is named here rather than amid a training
        with Image.open(path) as image:
            for kind in _kinds(image):
                found.setdefault(kind, []).append(path)
            if is_deep(image):
                brightest = max(brightest, float(np.asarray(image).max()) / 2 ** depth(image))
    for kind, some in found.items():
        yield f"{len(some)} of {len(paths)} images looked at {kind} (as {some[0]})"
    if 0 < brightest * 256 <= _FEW_GREYS:
        yield (
            f"the images of 16 bits use less than {brightest:.1%} of their range, which leaves few of 256 greys; "
            "stretch their values first"
        )


def _kinds(image: "Image.Image") -> Iterator[str]:
    if has_transparency(image) and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        yield "have transparency, which is ignored: the colours beneath it are shown"
    if image.getexif().get(_ORIENTATION, 1) not in (0, 1):
        yield "have an orientation (Exif), which is ignored: they are read as they are stored"
    if getattr(image, "n_frames", 1) > 1:
        yield "have several frames, of which only the first is read"


def _doubles(parts: Sequence["Images"]) -> Iterator[str]:
    """Notes on image files that are the same byte by byte."""
    by_size: dict[int, list[tuple[str, str]]] = {}
    for images in parts:
        for path, label in zip(images.paths, images.labels, strict=True):
            by_size.setdefault(os.stat(path).st_size, []).append((path, images.classes[label]))
    alike = {size: some for size, some in by_size.items() if len(some) > 1}
    if sum(size * len(some) for size, some in alike.items()) > COMPARED_BYTES:
        return
    first: dict[str, tuple[str, str]] = {}
    doubles, elsewhere, example = 0, 0, ("", "")
    for path, name in (pair for some in alike.values() for pair in some):
        other, where = first.setdefault(content_hash(path), (path, name))
        if other != path:
            doubles, elsewhere, example = doubles + 1, elsewhere + (where != name), (other, path)
    if doubles:
        classes = f", {elsewhere:,} of them under another class" if elsewhere else ""
        yield (
            f"{doubles:,} images are copies of others{classes} (as {example[1]} of {example[0]}): what is trained on may be "
            "validated or tested on too"
        )
