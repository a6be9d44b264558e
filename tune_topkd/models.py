"""Students and teachers by name, and the files their weights are kept in.

Every network takes float images `(B, C, H, W)` and gives logits `(B, num_classes)`. `build_model` looks a name up;
the embedded default dataset has three networks for its `(B, 1, 8, 8)` images: `digits_cnn`, `digits_cnn_tiny` and
`digits_linear`. Weights are drawn from torch's global generator: the caller seeds it.
"""

import inspect
import os
import uuid
import zipfile
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import IO
from typing import Any

import torch
from torch import Tensor
from torch import nn

from tune_topkd.config import ModelConfig
from tune_topkd.config import unknown_choice

WEIGHTS_KEY = "model"
"""Where the state dict lies in a file of weights, as the distillation field has it."""


class DigitsCNN(nn.Module):
    """3×3 convolutions with batch norm and ReLU, each after the first with stride 2, then mean pooling and a linear map.

    Args:
        num_classes: number of logits.
        widths: channels of each convolution, at least one.

    Raises:
        ValueError: `widths` is not a list of positive integers.
    """

    def __init__(self, *, num_classes: int, widths: Sequence[int] = (32, 64, 64)) -> None:
        super().__init__()
        if not isinstance(widths, Sequence) or not widths or not all(type(w) is int and w >= 1 for w in widths):
            raise ValueError(f"widths must be a list of at least one positive integer, but got {widths!r}")
        layers: list[nn.Module] = []
        for depth, (before, width) in enumerate(zip([1, *widths], widths, strict=False)):
            layers.append(nn.Conv2d(before, width, 3, stride=2 if depth else 1, padding=1, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 1, H, W)`."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


def _digits_cnn_tiny(*, num_classes: int, widths: Sequence[int] = (4, 8)) -> nn.Module:
    return DigitsCNN(num_classes=num_classes, widths=widths)


def _digits_linear(*, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, num_classes))


_REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "digits_cnn": DigitsCNN,
    "digits_cnn_tiny": _digits_cnn_tiny,
    "digits_linear": _digits_linear,
}


def model_names() -> list[str]:
    """The names `build_model` knows."""
    return sorted(_REGISTRY)


def build_model(name: str, /, *, num_classes: int, **kwargs: Any) -> nn.Module:
    """A freshly initialised network on the CPU, in training mode.

    Args:
        name: one of `model_names()`.
        num_classes: number of logits.
        kwargs: arguments of that network.

    Raises:
        ValueError: an unknown name, an argument that the network does not take, or a value that it refuses.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown model {name!r}; {unknown_choice(name, _REGISTRY)}")
    factory = _REGISTRY[name]
    signature = inspect.signature(factory)
    try:
        signature.bind(num_classes=num_classes, **kwargs)
    except TypeError as error:
        known = ", ".join(p for p in signature.parameters if p != "num_classes") or "none"
        raise ValueError(f"model {name!r}: {error}; known kwargs: {known}") from error
    return factory(num_classes=num_classes, **kwargs)


def build_configured(config: ModelConfig, *, num_classes: int) -> nn.Module:
    """The network of a config, for a dataset of `num_classes`.

    Raises:
        ValueError: as `build_model`; also if the kwargs set what the dataset decides.
    """
    if "num_classes" in config.kwargs:
        raise ValueError(f"model {config.name!r}: kwargs must not set num_classes, which the dataset decides")
    return build_model(config.name, num_classes=num_classes, **config.kwargs)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable numbers; running statistics and other buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


# --- files ----------------------------------------------------------------------------------------------------------


def save_weights(model: nn.Module, path: Path) -> None:
    """Write `{"model": state_dict}` with the tensors on the CPU; at any moment `path` is absent, the old or the new."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    write_atomically(path, lambda file: torch.save({WEIGHTS_KEY: state}, file))


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` with the weights of a file as `save_weights` writes it; the model is unchanged if that fails.

    Raises:
        ValueError: names the path and the reason: missing, unreadable, another layout, or other keys or shapes.
    """
    state = read_checkpoint(path).get(WEIGHTS_KEY)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: must hold {{{WEIGHTS_KEY!r}: state dict}}")
    if differences := _differences(state, model.state_dict()):
        shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise ValueError(f"{path}: the weights do not fit the network: {shown}")
    model.load_state_dict(state)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a file of torch's, tensors on the CPU; runs no code from the file.

    Raises:
        ValueError: the file is missing, damaged (checksums are compared), or no dict of plain data and tensors.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    with file:
        try:
            content = _checked_content(file)
        except Exception as error:  # a damaged file can raise anything
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: is damaged or no checkpoint: {type(error).__name__}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a dict, but holds a {type(content).__name__}")
    return content


def _checked_content(file: IO[bytes]) -> object:
    # torch.load does not look at the checksums: it would take flipped bits for weights.
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
    file.seek(0)
    content: object = torch.load(file, map_location="cpu", weights_only=True)
    return content


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace the file at `path` by what `write` writes: in one step, and only once it is on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _differences(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    missing = [f"{name} is missing" for name in own if name not in given]
    unexpected = [f"{name} is not one of its weights" for name in given if name not in own]
    shapes = [
        f"{name} is {tuple(given[name].shape)} in the file and {tuple(own[name].shape)} in the network"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    return [*shapes, *missing, *unexpected]
