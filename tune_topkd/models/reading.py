"""Reading a file of weights, or telling what it is instead. No code in a file is ever run."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import IO
from typing import Any

import torch
from torch import Tensor

_HEAD_BYTES = 512

_INSTEAD: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS: `git lfs pull`, where it was cloned, fetches the file itself"),
    (b"/annex/objects/", "a pointer of git-annex: `git annex get` fetches the file itself"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first, `gzip -dc FILE > OTHER`"),
    (b"BZh", "compressed by bzip2: unpack it first, `bzip2 -dc FILE > OTHER`"),
    (b"\xfd7zXZ\0", "compressed by xz: unpack it first, `xz -dc FILE > OTHER`"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first, `zstd -dc FILE > OTHER`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it, and name the file of weights in it"),
    (b"Rar!", "a RAR archive: unpack it, and name the file of weights in it"),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras writes them: only files of PyTorch's and safetensors are read"),
    (b"\x93NUMPY", "an array of numpy's: only files of PyTorch's and safetensors are read"),
)
"""The first bytes of files that users mistake for weights, and what these files are."""

_ZIP, _TAR = b"PK", b"ustar"
_TAR_PLACE = 257
_SAFETENSORS = ".safetensors"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a file of torch or of safetensors, whatever its ending; tensors on the CPU.

    No code in the file is run: it may hold tensors, plain data and numpy scalars, which become Python's.

    Raises:
        ValueError: the file is missing, damaged (checksums are compared where there are any), not a checkpoint, of which
            its first bytes tell the kind, or holds anything but a dict of such data.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        hint = "; name the file in it that holds the weights" if path.is_dir() else ""
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}{hint}") from error
    with file:
        try:
            content = _content(file, path.suffix == _SAFETENSORS)
        except _Refused as error:
            raise ValueError(f"{path}: {error}") from error
        except Exception as error:  # a damaged file can raise anything
            raise ValueError(f"{path}: is damaged or no checkpoint: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a dict, but holds a {type(content).__name__}")
    return content


class _Refused(Exception):  # noqa: N818 (no error of the file's)
    """The file may be whole, but cannot or must not be read."""


class _Damaged(Exception):  # noqa: N818
    """The file is incomplete, or of an unknown kind."""


def _content(file: IO[bytes], is_named_safetensors: bool) -> object:
    head = file.read(_HEAD_BYTES)
    size = file.seek(0, 2)
    file.seek(0)
    for start, what in _INSTEAD:
        if head.startswith(start):
            raise _Refused(f"is no checkpoint but {what}")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise _Refused("is no checkpoint but a web page, as a download that failed leaves: download the file again")
    if head[_TAR_PLACE:].startswith(_TAR):
        raise _Refused("is no checkpoint but a tar archive: unpack it, and name the file of weights in it")
    if _is_safetensors(head, size) or (is_named_safetensors and not head.startswith((_ZIP, b"\x80"))):
        return _safetensors(file)
    if head.startswith(_ZIP) or zipfile.is_zipfile(file):
        _check_archive(file)
    elif not head.startswith(b"\x80"):  # how each pickle begins
        raise _Damaged(_unknown(head, size))
    file.seek(0)
    return _unpickled(file)


def _unknown(head: bytes, size: int) -> str:
    if not size:
        return "the file is empty"
    if not head.strip(b"\0"):
        return "it begins with zeros alone, as a file does that was never written to its end"
    shown = head[:40].decode("utf-8", "replace")
    return f"it is a text that begins with {shown!r}" if shown.isprintable() else "of no known format"


def _reason(error: Exception) -> str:
    """An error in a few words, without torch's advice to read a file without safeguards."""
    text = re.sub(r"(?s).*WeightsUnpickler error: ", "", str(error)).strip().split("\n")[0]
    if isinstance(error, _Damaged):
        return text
    return type(error).__name__ + (f": {text}" if text and "weights_only" not in text else "")


# --- torch's --------------------------------------------------------------------------------------------------------


def _check_archive(file: IO[bytes]) -> None:
    """Compare the checksums of a zip archive; torch does not, and would take flipped bits for weights."""
    if not zipfile.is_zipfile(file):
        raise _Damaged("the file is cut off: a zip archive without its end")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        inner = {name.rpartition("/")[2] for name in names}
        if "constants.pkl" in inner:
            raise _Refused(
                "is no checkpoint but a TorchScript archive, which holds code: write its weights to a file of their "
                "own, torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
            )
        if "data.pkl" not in inner:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise _Refused(
                f"is no checkpoint but a zip archive of {shown or 'nothing'}: unpack it, and name the file of weights"
            )
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")


def _unpickled(file: IO[bytes]) -> object:
    try:
        with torch.serialization.safe_globals(_NUMPY):
            content: object = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error)):
            raise _Refused(
                f"is refused: it asks for {wanted[1]}, and only tensors and plain data are read, since unpickling "
                "anything else can run code; write the weights to a file of their own, {'model': state dict}"
            ) from error
        raise
    return content


class _NumpyType:
    """Takes the place of numpy's dtype while a file is read: its type code and byte order."""

    def __init__(self, code: str, *flags: bool) -> None:
        self.code, self.order = code, ""

    def __setstate__(self, state: Sequence[object]) -> None:
        if state[1] in ("<", ">"):
            self.order = str(state[1])


def _numpy_scalar(kind: _NumpyType, data: bytes) -> bool | float | str:
    """A numpy scalar as Python's own number or text."""
    import numpy as np

    if not isinstance(kind, _NumpyType) or not re.fullmatch(r"[biuf]\d|[SU]\d+", kind.code):
        raise _Refused("is refused: it holds a value of numpy's that is no number, truth value or text")
    value: bool | float | str = np.frombuffer(data, dtype=kind.order + kind.code)[0].item()
    return value


_NUMPY: list[Any] = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # numpy 1
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]
"""What a file may call instead of numpy's functions to hold a scalar, such as a best accuracy beside the weights."""


# --- safetensors ----------------------------------------------------------------------------------------------------


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file begins like safetensors: with the length of the JSON that follows."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _safetensors(file: IO[bytes]) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load
    except ModuleNotFoundError as error:
        raise _Refused("reading it needs safetensors: pip install safetensors") from error
    return load(file.read())
