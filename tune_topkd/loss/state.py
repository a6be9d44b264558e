"""The state of a loss between calls: a user's loss may have parameters, running averages or counts.

Besides parameters and buffers, plain attributes that have changed since the loss was made belong to it, if they are
data. So a resumed training has the loss that an uninterrupted one would have.
"""

import functools
import inspect
import io
import pickle
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn.parameter import UninitializedBuffer
from torch.nn.parameter import UninitializedParameter

_OF_TORCH = frozenset(vars(nn.Module()))  # the attributes that every module has


class LossState:
    """Gives the state of a loss to a checkpoint, and restores it.

    Args:
        loss: the loss; it is moved to the device, and so are tensors in its plain attributes.
        device: where the loss is called.
    """

    def __init__(self, loss: nn.Module, device: torch.device) -> None:
        """Move the loss, and remember what it is when it is made."""
        self._loss = loss.to(device)
        self._device = device
        for _, owner, name, value in _attributes(loss):
            if any(tensor.device != device for tensor in _tensors(value)):
                setattr(owner, name, _moved(value, device))
        self._learnt = {name for name, _ in loss.named_parameters()}
        self._made = {path: _frozen(value) for path, *_, value in _attributes(loss)}

    def check_parameters(self) -> None:
        """Check that the loss has no parameter that came after it was made, which the optimiser does not know.

        Raises:
            ValueError: it has one.
        """
        if late := sorted({name for name, _ in self._loss.named_parameters()} - self._learnt):
            raise ValueError(f"the loss got a parameter at a call, which is not trained: {', '.join(late)}; {_EARLY}")

    def state(self) -> dict[str, Any]:
        """The present state; empty if the loss has none.

        Raises:
            ValueError: a plain attribute holds something that a checkpoint cannot hold.
        """
        tensors = dict(_named_tensors(self._loss))
        known = set(map(id, tensors.values()))
        changed = {
            path: value
            for path, *_, value in _attributes(self._loss)
            if self._made.get(path) != _frozen(value) and not any(id(tensor) in known for tensor in _tensors(value))
        }
        for path, value in changed.items():
            if not _is_data(value):
                rule = "is changed by its calls and cannot be kept in a checkpoint; tensors, numbers and texts can"
                raise ValueError(f"the loss's attribute {path}, a {type(value).__name__}, {rule}")
        return {kind: held for kind, held in (("tensors", tensors), ("attributes", changed)) if held}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state` gave.

        Raises:
            ValueError: it is the state of another loss.
        """
        given: dict[str, Tensor] = state.get("tensors", {})
        own = dict(self._loss.named_parameters())
        needed = own.keys() | {name for name, _ in self._loss.named_buffers()}
        if missing := sorted(needed - given.keys()):
            raise ValueError(f"the loss has the state {', '.join(missing)}, which is not there")
        for name, value in given.items():
            path, _, leaf = name.rpartition(".")
            if name not in own:  # a buffer, whatever its shape
                setattr(self._loss.get_submodule(path), leaf, None)
                self._loss.get_submodule(path).register_buffer(leaf, value.to(self._device))
            elif own[name].shape != value.shape:
                raise ValueError(f"the loss's {name} is {tuple(own[name].shape)}, and was {tuple(value.shape)}")
            else:
                own[name].data.copy_(value)
        owners = dict(_owners(self._loss, ""))
        for full, value in state.get("attributes", {}).items():
            path, _, name = full.rpartition(".")
            setattr(owners[path], name, _moved(value, self._device))


_EARLY = "make it in the constructor"


def check_made(loss: object, label: str) -> None:
    """Check that all weights of a user's loss can be trained.

    Raises:
        ValueError: a weight lies where no optimiser finds it, or has no shape yet.
    """
    for name, value in loss.named_parameters() if isinstance(loss, nn.Module) else ():
        if isinstance(value, UninitializedParameter | UninitializedBuffer):
            raise ValueError(f"{label}: its parameter {name} has no shape before the first call; give it one")
    known = {id(value) for _, value in _named_tensors(loss)} if isinstance(loss, nn.Module) else set()
    held = (
        _closure(loss)
        if isinstance(loss, FunctionType)
        else {path: value for path, *_, value in _attributes(loss)} | _hidden_modules(loss)
    )
    for name, value in held.items():
        if any(tensor.requires_grad and tensor.is_leaf and id(tensor) not in known for tensor in _tensors(value)):
            rule = "which is not trained there: derive the loss from torch.nn.Module and make it a parameter or module"
            raise ValueError(f"{label}: its {name} holds what asks for a gradient, {rule}")


def _hidden_modules(loss: object) -> dict[str, Any]:
    """Modules in attributes of a loss that torch does not register as modules."""
    found: dict[str, Any] = {}
    for path, owner in _owners(loss, ""):
        registered = owner._modules if isinstance(owner, nn.Module) else {}
        inner = {n: v for n, v in _held(owner).items() if isinstance(v, nn.Module) and n not in registered}
        found |= {f"{path}.{name}" if path else name: value for name, value in inner.items()}
    return found


def _closure(function: FunctionType) -> dict[str, Any]:
    found = inspect.getclosurevars(function)
    return {**found.globals, **found.nonlocals}


def _named_tensors(loss: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from loss.named_parameters()
    yield from loss.named_buffers()


def _owners(loss: object, path: str, seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, object]]:
    """The objects that a loss is made of, with their dotted paths: its modules, and the plain callables in them."""
    yield path, loss
    seen |= {id(loss)}
    for name, value in _held(loss).items():
        held: object = value.func if isinstance(value, functools.partial) else value
        is_module = isinstance(loss, nn.Module) and name in loss._modules
        if id(held) not in seen and (is_module or _is_plain_callable(held)):
            yield from _owners(held, f"{path}.{name}" if path else name, seen)


def _is_plain_callable(value: object) -> bool:
    """Whether it is a callable object, which may have attributes of its own, other than a torch module."""
    return callable(value) and not inspect.isroutine(value) and not isinstance(value, type | nn.Module)


def _held(owner: object) -> dict[str, Any]:
    """The values of an object's attributes, modules included, by name."""
    modules = owner._modules if isinstance(owner, nn.Module) else {}
    hidden = _OF_TORCH if isinstance(owner, nn.Module) else ()
    own = {name: value for name, value in getattr(owner, "__dict__", {}).items() if name not in hidden}
    return own | modules


def _attributes(loss: object) -> Iterator[tuple[str, object, str, Any]]:
    """The plain attributes of a loss that may be data: dotted path, object, name and value."""
    for path, owner in _owners(loss, ""):
        for name, value in _held(owner).items():
            if not callable(value):
                yield (f"{path}.{name}" if path else name), owner, name, value


class _Frozen(pickle.Pickler):
    """Pickles the value of an attribute without modules and methods, which may refer to the whole loss."""

    def persistent_id(self, obj: object) -> str | None:
        """Replace modules and code by the name of their type."""
        is_code = isinstance(obj, nn.Module) or inspect.isroutine(obj)
        return repr(type(obj)) if is_code else None


def _frozen(value: object) -> bytes | None:
    """The value as bytes, which tell whether it changes; None if it cannot be pickled."""
    buffer = io.BytesIO()
    try:
        _Frozen(buffer).dump(value)
    except (pickle.PickleError, TypeError, AttributeError, NotImplementedError):  # a lock, a weak reference
        return None
    return buffer.getvalue()


def _is_data(value: object) -> bool:
    if type(value) is dict:
        return all(_is_data(key) and _is_data(inner) for key, inner in value.items())
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return all(map(_is_data, value))
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor)


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a value, in its containers and modules."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from (tensor for _, tensor in _named_tensors(value))
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _tensors(inner)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, nn.Module):
        return value.to(device)
    if type(value) is dict:
        return {key: _moved(inner, device) for key, inner in value.items()}
    kind: Callable[..., Any] = type(value)
    return kind(_moved(inner, device) for inner in value) if kind in (list, tuple) else value
