"""A network by its name: one of this project's, torchvision's or timm's, or one that the user's code makes."""

import difflib
import importlib
import inspect
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

from tune_topkd.config import ModelConfig
from tune_topkd.config import unknown_choice
from tune_topkd.errors import TuneTopKDError
from tune_topkd.models.cifar import CIFAR
from tune_topkd.models.imagenet import IMAGENET
from tune_topkd.models.small import SMALL
from tune_topkd.user_code import LIBRARIES
from tune_topkd.user_code import UserCodeError
from tune_topkd.user_code import is_users
from tune_topkd.user_code import one_line
from tune_topkd.user_code import resolve

_Factory = Callable[..., nn.Module]

_REGISTRY: dict[str, _Factory] = {**SMALL, **CIFAR, **IMAGENET}

_COLOURS = 3

_FORMS = "or cifar:NAME, torchvision:NAME, timm:NAME, package.module:FACTORY"


class ModelNameError(TuneTopKDError):
    """Nothing can be built under this name, whatever the arguments."""


class OutputError(TuneTopKDError):
    """The output of a network is not logits, and does not hold them where they can be told from the rest."""


def model_names() -> list[str]:
    """The names without a prefix that `build_model` knows."""
    return sorted(_REGISTRY)


def build_model(name: str, /, *, num_classes: int, **kwargs: Any) -> nn.Module:
    """A freshly initialised network on torch's default device, in training mode.

    Args:
        name: one of `model_names()`; `cifar:`, `torchvision:` or `timm:` and a name there; or `package.module:FACTORY`,
            which is called as `FACTORY(num_classes=num_classes, **kwargs)`.
        num_classes: number of logits.
        kwargs: arguments of that network. Published weights are not one of them: they come from a checkpoint.

    Raises:
        ModelNameError: the name is unknown, its library is not installed, or its factory cannot be imported, is not
            callable or does not give a `torch.nn.Module`.
        ValueError: the network does not take an argument or a value, or the library or the factory raised an exception.
    """
    return _network(name, _factory(name), num_classes, kwargs)


def build_configured(config: ModelConfig, *, num_classes: int) -> nn.Module:
    """The network of a config, for a dataset of `num_classes`; with an `image_size` it resizes its images to that side.

    Resizing is bilinear with antialiasing, and not in the state dict. The network gives its logits alone, even if its
    forward pass gives features besides, as in mdistiller and many other projects: of a tuple, a list or a mapping it
    gives the part named `logits`, else the only tensor `(B, num_classes)`. Any other output raises an `OutputError`
    when the network is called.

    Raises:
        ValueError: as `build_model`; also if the kwargs set `num_classes`.
    """
    return _configured(config, _factory(config.name), num_classes)


def check_model(config: ModelConfig, *, num_classes: int) -> None:
    """Raise what `build_configured` would, where possible without allocating the weights.

    Raises:
        ModelNameError: nothing can be built under this name.
        ValueError: the arguments do not fit.
    """
    factory = _factory(config.name)  # imported before: tensors that its module makes must not be on the meta device
    if not is_users(config.name):
        try:
            with torch.device("meta"):
                _configured(config, factory, num_classes)
            return
        except ValueError:
            pass  # some networks compute with their first weights, which have no values on the meta device
    _configured(config, factory, num_classes)


def count_parameters(model: nn.Module) -> int:
    """Number of weights; running statistics and other buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the classifier head: the linear layer that was added last.

    Raises:
        ValueError: the network has no linear layer.
    """
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no head: it holds no torch.nn.Linear")
    return linear[-1]


def to_channels_last(model: nn.Module, channels: int) -> nn.Module:
    """The network with its weights in the memory layout channels-last, unless its images have a single channel.

    Convolutions of colour images are a fifth faster in this layout, some twice as fast; results are the same up to
    rounding. With one channel they are slower.
    """
    layout = torch.channels_last if channels >= _COLOURS else torch.contiguous_format
    return model.to(memory_format=layout)


def freeze_backbone(model: nn.Module) -> None:
    """Freeze all weights but those of the head, `find_head(model)`.

    Raises:
        ValueError: the network has no head.
    """
    head = find_head(model)[1]
    model.requires_grad_(False)
    head.requires_grad_(True)


# --- building -------------------------------------------------------------------------------------------------------


def _configured(config: ModelConfig, factory: _Factory, num_classes: int) -> nn.Module:
    if "num_classes" in config.kwargs:
        raise ValueError(f"model {config.name!r}: kwargs must not set num_classes, which the dataset decides")
    network = _network(config.name, factory, num_classes, config.kwargs)
    if config.image_size is not None:
        network.register_forward_pre_hook(partial(_resize, config.image_size))
    network.register_forward_hook(partial(_logits_alone, config.name, num_classes))
    return network


def _resize(side: int, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    images, *others = inputs
    if images.shape[-2:] != (side, side):
        images = functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return (images, *others)


def _logits_alone(
    name: str, num_classes: int, network: nn.Module, inputs: tuple[Tensor, ...], outputs: object
) -> Tensor:
    """The logits in the output of a network, as `build_configured` says."""
    if isinstance(outputs, Tensor):
        return outputs
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(named, Tensor):
        return named
    parts = list(outputs.values() if isinstance(outputs, Mapping) else outputs) if isinstance(outputs, Iterable) else []
    shape = (inputs[0].shape[0], num_classes)  # not its len, which torch.export takes for a constant
    found = [part for part in parts if isinstance(part, Tensor) and part.shape == shape]
    if len(found) == 1:
        return found[0]
    got = f"{type(outputs).__name__} of {', '.join(map(_described, parts)) or 'nothing'}"
    many = f"{len(found)} tensors of" if found else "no tensor of"
    raise OutputError(
        f"model {name!r}: gives a {got}: {many} the shape {shape} of logits; it must give the logits, "
        "or one such tensor beside others, or name them `logits`"
    )


def _described(part: object) -> str:
    return f"a tensor {tuple(part.shape)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"


def _network(name: str, factory: _Factory, num_classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    if ":" not in name or name.startswith("cifar:"):
        signature = inspect.signature(factory)
        try:
            signature.bind(num_classes=num_classes, **kwargs)
        except TypeError as error:
            known = ", ".join(p for p in signature.parameters if p != "num_classes") or "none"
            raise ValueError(f"model {name!r}: {error}; known kwargs: {known}") from error
        return factory(num_classes=num_classes, **kwargs)
    try:
        network: object = factory(num_classes=num_classes, **kwargs)
    except Exception as error:  # others' code can raise anything
        raise ValueError(f"model {name!r}: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ModelNameError(f"model {name!r}: must give a torch.nn.Module, but gave a {type(network).__name__}")
    return network


# --- finding --------------------------------------------------------------------------------------------------------


def _factory(name: str) -> _Factory:
    prefix, colon, inner = name.partition(":")
    if not colon:
        return _own(name, name, _REGISTRY, _FORMS)
    return _resolved(name) if is_users(name) else _FROM_LIBRARY[prefix](inner)


def _own(name: str, bare: str, known: Mapping[str, _Factory], also: str = "") -> _Factory:
    if bare not in known:
        raise ModelNameError(f"unknown model {name!r}; {unknown_choice(bare, known)}{also and '; '}{also}")
    return known[bare]


def _cifar(bare: str) -> _Factory:
    return _own(f"cifar:{bare}", bare, CIFAR)


# By default both warn, and give a tuple in training mode.
_TORCHVISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def _torchvision(bare: str) -> _Factory:
    library = _library("torchvision", "torchvision.models", "sweep")
    names = library.list_models(module=library)
    _check_listed(f"torchvision:{bare}", bare, names, "torchvision.models.list_models()")

    def build(*, num_classes: int, **kwargs: Any) -> nn.Module:
        _refuse(kwargs, "weights", "weights_backbone", "pretrained")
        chosen = _TORCHVISION_DEFAULTS.get(bare, {}) | kwargs
        network: nn.Module = library.get_model_builder(bare)(weights=None, num_classes=num_classes, **chosen)
        return network

    return build


def _timm(bare: str) -> _Factory:
    library = _library("timm", "timm", "vit")
    _check_listed(f"timm:{bare}", bare, library.list_models(), "timm.list_models()")

    def build(*, num_classes: int, **kwargs: Any) -> nn.Module:
        _refuse(kwargs, "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
        network: nn.Module = library.create_model(bare, pretrained=False, num_classes=num_classes, **kwargs)
        return network

    return build


_FROM_LIBRARY: dict[str, Callable[[str], _Factory]] = {"cifar": _cifar, "torchvision": _torchvision, "timm": _timm}
assert set(_FROM_LIBRARY) == set(LIBRARIES), "every prefix that is not the user's has networks"


def _resolved(name: str) -> _Factory:
    """The factory that `package.module:FACTORY` names."""
    try:
        factory = resolve(name)
    except UserCodeError as error:
        prefix = name.partition(":")[0]
        hint = f"; {unknown_choice(prefix, LIBRARIES)}" if difflib.get_close_matches(prefix, LIBRARIES) else ""
        raise ModelNameError(f"unknown model {name!r}: {error}{hint}") from error
    if not callable(factory):
        raise ModelNameError(f"unknown model {name!r}: must be callable, but is a {type(factory).__name__}")
    found: _Factory = factory
    return found


def _library(name: str, module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library that does not fit torch's version can raise anything
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        reason = f"{name} is not installed: pip install 'tune_topkd[{extra}]'" if missing else one_line(error)
        raise ModelNameError(f"{name}: its networks cannot be built: {reason}") from error


def _check_listed(name: str, bare: str, names: Sequence[str], listing: str) -> None:
    """Refuse a name that a library does not list; of the hundreds that it lists, the message shows the closest."""
    if bare not in names:
        stem = bare.partition(".")[0]  # in timm's names, the part after a dot names published weights
        shown = difflib.get_close_matches(stem, names, n=6, cutoff=0.5) or sorted(names)[:3]
        more = len(names) - len(shown)
        raise ModelNameError(f"unknown model {name!r}; {unknown_choice(stem, shown)} and {more} more: {listing}")


def _refuse(kwargs: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name in kwargs:
            raise ValueError(f"kwargs must not set {name}: nothing is downloaded; weights come from a checkpoint file")
