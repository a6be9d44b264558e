"""What identifies images and labels, wherever they lie: hashes of values and bytes, and of files' names and sizes."""

import functools
import hashlib
import os
from collections.abc import Iterable
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tune_topkd.data.errors import DataError
from tune_topkd.data.splits import AnySplit
from tune_topkd.data.splits import Split
from tune_topkd.data.walking import composed

SAMPLED = 512
"""Image files whose bytes are hashed, spread evenly over all in the order of their names; of fewer files, all are."""

_BLOCK = 2**20


def whole_files(folder: Path, paths: Iterable[str]) -> list[list[object]]:
    """Name and hash of each file.

    Raises:
        DataError: a file that cannot be read.
    """
    return [[name, content_hash(path)] for name, path in _named(folder, paths)]


def many_files(folder: Path, images: Iterable[str], lists: Iterable[str] = ()) -> list[list[object]]:
    """Name and size of each image file, and the hashes of `SAMPLED` of them and of all lists.

    Other bytes in a file outside the sample go unnoticed if the file keeps its size.

    Raises:
        DataError: a file that cannot be read, or is empty.
    """
    named = _named(folder, images)
    sizes: list[list[object]] = [[name, _size(path)] for name, path in named]
    sample = {len(named) * number // SAMPLED for number in range(SAMPLED)}
    contents: list[list[object]] = [[named[index][0], content_hash(named[index][1])] for index in sorted(sample)]
    return [*sizes, *contents, *whole_files(folder, lists)]


def split_content(split: AnySplit, folder: Path) -> object:
    """What identifies the images and labels of a split, as JSON has it.

    Args:
        split: on the CPU.
        folder: image files are named relative to it.

    Raises:
        DataError: an image file that cannot be read, or is empty.
    """
    if isinstance(split, Split):
        return tensors([split.images, split.labels])
    order = hashlib.sha256("\n".join(_relative(path, folder) for path in split.paths).encode())
    return [order.hexdigest(), tensors([split.labels]), many_files(folder, split.paths)]


def tensors(parts: Sequence[Tensor]) -> str:
    """A hash of shapes, types and values."""
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{part.dtype}{tuple(part.shape)}".encode())
        found.update(part.contiguous().numpy().data.cast("B"))
    return found.hexdigest()


def content_hash(path: str) -> str:
    """SHA-256 of a file's bytes; this process hashes a file only once, unless its times have changed.

    Raises:
        DataError: it cannot be read.
    """
    try:
        state = os.stat(path)
        return _content_hash(path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


@functools.lru_cache(maxsize=8192)
def _content_hash(path: str, *state: int) -> str:
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _named(folder: Path, paths: Iterable[str]) -> list[tuple[str, str]]:
    """Each file's name relative to the folder, and its path, sorted."""
    return sorted((_relative(path, folder), path) for path in paths)


def _relative(path: str, folder: Path) -> str:
    """A path relative to a folder, in Unicode's composed form."""
    start = f"{folder}{os.sep}"  # of a million paths os.path.relpath takes half a minute
    return composed(path.removeprefix(start) if path.startswith(start) else os.path.relpath(path, folder))


def _size(path: str) -> int:
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not size:
        raise DataError(f"{path}: is empty (0 bytes); replace or remove the file")
    return size
