"""The files that weights are kept in: ours, and those that the distillation field has published."""

import os
import re
import uuid
import zipfile
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO
from typing import Any

import torch
from torch import Tensor
from torch import nn

from tune_topkd.models.building import find_head

WEIGHTS_KEY = "model"
"""Where the state dict lies in a file of weights, as the distillation field has it."""

_WEIGHTS_KEYS = (WEIGHTS_KEY, "state_dict", "model_state")
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_STUDENT = "student."
_COUNTER = ".num_batches_tracked"


def save_weights(model: nn.Module, path: Path) -> None:
    """Write `{"model": state_dict}` with the tensors on the CPU; at any moment `path` is absent, the old or the new."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    write_atomically(path, lambda file: torch.save({WEIGHTS_KEY: state}, file))


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` with the weights of a file; the model is unchanged if that fails.

    The file is one of torch's, zip or legacy, or ends in `.safetensors`. The state dict is the file's content or lies
    under `model`, `state_dict` or `model_state`; what else the file has is not looked at. `module.` before all keys is
    dropped. Of a whole distiller, keys `student.…` and `teacher.…`, the student is taken: it is what was trained. Keys
    and shapes must be the network's; only counters `num_batches_tracked`, which old files lack, may be missing.

    Raises:
        ValueError: names the path and the reason: missing, unreadable, another layout, another number of classes, or
            other keys or shapes.
    """
    _fill(model, path, _state(path, model))


def load_backbone(model: nn.Module, path: Path) -> None:
    """As `load_weights`, but for the head, `find_head(model)`: it stays as it is, whatever the file has for it.

    Raises:
        ValueError: as `load_weights`; also if the network has no head.
    """
    head, _ = find_head(model)
    given = _state(path, model)
    own = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] == head}
    _fill(model, path, {name: value for name, value in given.items() if name.rpartition(".")[0] != head} | own)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a file of torch's or, named so, of safetensors; tensors on the CPU; runs no code from the file.

    Raises:
        ValueError: the file is missing, damaged (checksums are compared where there are any), or holds anything but
            a dict of plain data and tensors.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    with file:
        try:
            content = _safetensors(file) if path.suffix == ".safetensors" else _checked_content(file)
        except _Refused as error:
            raise ValueError(f"{path}: {error}") from error
        except Exception as error:  # a damaged file can raise anything
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: is damaged or no checkpoint: {type(error).__name__}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a dict, but holds a {type(content).__name__}")
    return content


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace the file at `path` by what `write` writes: in one step, and only once it is on the disk.

    Raises:
        OSError: the disk refused; it names `path`, and what was there still is. torch hides it in an error of its own.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            cause = cause.__cause__ or cause.__context__
        raise
    finally:
        temporary.unlink(missing_ok=True)


# --- the bytes ------------------------------------------------------------------------------------------------------


class _Refused(Exception):  # noqa: N818 (no error of the file's)
    """The file may be whole, but it is not read."""


def _checked_content(file: IO[bytes]) -> object:
    # torch.load does not look at the checksums: it would take flipped bits for weights.
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
    else:
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":
            raise ValueError("the file is cut off: a zip archive without its end")
    file.seek(0)
    try:
        content: object = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error)):
            raise _Refused(
                f"is refused: it asks for {wanted[1]}, and only tensors and plain data are read, since unpickling "
                f"anything else can run code; write the weights to a file of their own, {{{WEIGHTS_KEY!r}: state dict}}"
            ) from error
        raise
    return content


def _safetensors(file: IO[bytes]) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load
    except ModuleNotFoundError as error:
        raise _Refused("reading it needs safetensors: pip install safetensors") from error
    return load(file.read())


# --- the state dict -------------------------------------------------------------------------------------------------


def _state(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The state dict in a file, its keys as in `model`'s as far as wrappers go."""
    content = read_checkpoint(path)
    held = next((content[key] for key in _WEIGHTS_KEYS if isinstance(content.get(key), Mapping)), content)
    if not held or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items()):
        places = " or ".join(map(repr, _WEIGHTS_KEYS))
        shown = ", ".join(repr(key) for key in list(content)[:5]) or "nothing"
        raise ValueError(f"{path}: must hold a state dict, by itself or under {places}, but holds {shown}")
    state, own = dict(held), model.state_dict().keys()
    while not own & state.keys():
        wrapper = next((w for w in _WRAPPERS if all(name.startswith(w) for name in state)), None)
        if wrapper is None and any(name.startswith(_STUDENT) for name in state):
            wrapper = _STUDENT
        if wrapper is None:
            break
        state = {name.removeprefix(wrapper): value for name, value in state.items() if name.startswith(wrapper)}
    return state


def _fill(model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    complete = {name: value for name, value in own.items() if name.endswith(_COUNTER)} | dict(state)
    if differences := _differences(complete, own):
        shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise ValueError(f"{path}: the weights do not fit the network: {_classes(model, complete, own) or shown}")
    model.load_state_dict(complete)


def _differences(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    missing = [f"{name} is missing" for name in own if name not in given]
    unexpected = [f"{name} is not one of its weights" for name in given if name not in own]
    shapes = [
        f"{name} is {tuple(given[name].shape)} in the file and {tuple(own[name].shape)} in the network"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    return [*shapes, *missing, *unexpected]


def _classes(model: nn.Module, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What is wrong if that is the number of classes alone."""
    try:
        head, linear = find_head(model)
    except ValueError:
        return ""
    weight = given.get(f"{head}.weight")
    if weight is None or weight.shape[1:] != linear.weight.shape[1:] or len(weight) == linear.out_features:
        return ""
    fitting = {
        name: own.get(name, value) if name.rpartition(".")[0] == head else value for name, value in given.items()
    }
    if _differences(fitting, own):
        return ""
    return f"the file has a head for {len(weight)} classes, the network one for {linear.out_features} ({head}.weight)"
