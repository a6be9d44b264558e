"""Files of weights: those of this project, and those that the distillation field has published."""

from collections import Counter
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NamedTuple

import torch
from torch import Tensor
from torch import nn

from tune_topkd.models.building import find_head
from tune_topkd.models.reading import read_checkpoint
from tune_topkd.storage import write_atomically

WEIGHTS_KEY = "model"
"""The key of the state dict in a file of weights, as is usual in the distillation field."""

_STUDENT = "student"
_COUNTER = ".num_batches_tracked"
_DEEPEST = 3
"""Levels of nested mappings that are searched for weights."""


def save_weights(model: nn.Module, path: Path) -> None:
    """Write `{"model": state_dict}` with the tensors on the CPU; at any moment `path` is absent, the old or the new."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    write_atomically(path, lambda file: torch.save({WEIGHTS_KEY: state}, file))


def load_weights(model: nn.Module, path: Path, key: str | None = None) -> None:
    """Fill `model` with the weights of a file; the model is unchanged if that fails.

    The file is one of torch, zip or legacy, or of safetensors. The state dict is its content, or lies under any key or
    keys of it (`model`, `state_dict`, `model_state_dict`, `net`, …). Its names may have any prefix before the
    network's, such as `module.` or Lightning's `model.`; entries with another prefix are ignored. Keys and shapes below
    one prefix must be the network's; only the counters `num_batches_tracked`, which old files lack, may be missing.

    Of a distiller, with keys `student.…` and `teacher.…`, the student is loaded, which is what was trained. Where
    several sets of weights fit, such as those of a training and their moving average (EMA), `key` must say which.

    Args:
        model: the network to fill.
        path: of the file.
        key: where in the file the weights are, such as `state_dict_ema`, or the beginning of it; a dot leads into a
            mapping, or to a prefix of the names.

    Raises:
        ValueError: names the path and the reason: missing, unreadable, another layout, another number of classes,
            other keys or shapes, or several sets of weights to choose from.
    """
    _load(model, path, key, {})


def load_backbone(model: nn.Module, path: Path, key: str | None = None) -> None:
    """As `load_weights`, except that the head, `find_head(model)`, stays as it is whatever the file has for it.

    Raises:
        ValueError: as `load_weights`; also if the network has no head.
    """
    head, _ = find_head(model)
    _load(model, path, key, {n: value for n, value in model.state_dict().items() if n.rpartition(".")[0] == head})


# --- the state dict -------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """Tensors of a file under the network's names; `place` is where in the file they are."""

    place: str
    state: dict[str, Tensor]


def _load(model: nn.Module, path: Path, key: str | None, kept: Mapping[str, Tensor]) -> None:
    """Fill the model except for the entries in `kept`, which must be all entries of a layer."""
    own = model.state_dict()
    layers = {name.rpartition(".")[0] for name in kept}
    counters = {name: value for name, value in own.items() if name.endswith(_COUNTER)}
    candidates = [
        _Found(place, counters | {n: v for n, v in state.items() if n.rpartition(".")[0] not in layers} | dict(kept))
        for place, state in _named(path, _candidates(path, own), key)
    ]
    fitting = [found for found in candidates if not _differences(found.state, own)]
    if not fitting:
        nearest = max(candidates, key=lambda found: len(found.state.keys() & own.keys()))
        raise ValueError(f"{path}: the weights do not fit the network: {_misfit(model, nearest, own)}")
    model.load_state_dict(_only(path, fitting).state)


def _named(path: Path, candidates: Sequence[_Found], key: str | None) -> Sequence[_Found]:
    """The candidates at a key or below it."""
    if key is None:
        return candidates
    named = [found for found in candidates if f"{found.place}.".startswith(f"{key}.")]
    if not named:
        places = ", ".join(sorted({repr(found.place) for found in candidates if found.place})[:5]) or "no key"
        raise ValueError(f"{path}: checkpoint_key {key!r} leads to no weights; known: {places}")
    return named


def _only(path: Path, fitting: Sequence[_Found]) -> _Found:
    """The set of weights to load: the only one, the student's, or the first where all are equal."""
    if len(fitting) > 1:
        students = [found for found in fitting if found.place.rpartition(".")[2] == _STUDENT]
        fitting = students if len(students) == 1 else fitting
    first = fitting[0]
    if all(torch.equal(value, first.state[n]) for found in fitting[1:] for n, value in found.state.items()):
        return first
    places = " and ".join(repr(found.place or "the file itself") for found in fitting)
    raise ValueError(
        f"{path}: holds several sets of weights that fit the network, at {places}: checkpoint_key must name one of "
        "them (an average over the training, EMA, is often the better one)"
    )


def _candidates(path: Path, own: Mapping[str, Tensor]) -> list[_Found]:
    """The tensors of a file whose names are the network's after some prefix; if there are none, all its tensors."""
    content = read_checkpoint(path)
    mappings = list(_mappings(content))
    if not mappings:
        shown = ", ".join(repr(key) for key in list(content)[:5]) or "nothing"
        raise ValueError(
            f"{path}: must hold a state dict, by itself or under a key such as {WEIGHTS_KEY!r}, but holds {shown}"
        )
    found = [part for place, held in mappings for part in _unwrapped(place, held, own)]
    return found or [_Found(place, held) for place, held in mappings]


def _mappings(content: Mapping[Any, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of a mapping and of the mappings in it, with the dotted key that leads to them."""
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    if held := {name: value for name, value in named.items() if isinstance(value, Tensor)}:
        yield ".".join(place), held
    if len(place) < _DEEPEST:
        for name, value in named.items():
            if isinstance(value, Mapping):
                yield from _mappings(value, (*place, name))


def _unwrapped(place: str, held: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[_Found]:
    """The tensors below each prefix that is followed by names of the network; prefixes with few of them are left
    out."""
    prefixes: Counter[str] = Counter()
    for name in held:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                prefixes[".".join([*parts[:start], ""])] += 1
    most = max(prefixes.values(), default=0)
    for prefix in (prefix for prefix, count in prefixes.items() if 2 * count >= most):
        state = {name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)}
        yield _Found(".".join(filter(None, (place, prefix.removesuffix(".")))), state)


def _misfit(model: nn.Module, found: _Found, own: Mapping[str, Tensor]) -> str:
    """How tensors differ from those of the network, in a few words."""
    differences = _differences(found.state, own)
    shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
    return _classes(model, found.state, own) or shown


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
    """The difference if it is only the number of classes; else empty."""
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
