"""A fingerprint of what a network computes: the code behind its name may change, and with it every result."""

import hashlib
import json
import math

import torch
from torch import Tensor
from torch import nn

from tune_topkd.config import ModelConfig
from tune_topkd.models.building import build_configured

_SUMS = 8
"""Numbers that the logits are reduced to; the fewer, the more rarely one lies on the edge of rounding."""
_DIGITS = {torch.float64: 6, torch.float32: 2}
"""Decimal digits of a sum that other kernels and numbers of threads agree on, with a margin."""
_SHOWN_IN_TRAINING = ("p", "dropout", "drop_rate", "drop_prob", "momentum")
"""Attributes of layers that change a training but no logit in eval mode."""


def network_fingerprint(model: ModelConfig, *, num_classes: int, image_shape: tuple[int, int, int]) -> str:
    """16 hex digits for the network that a config builds, as its code is now.

    It is a hash of the keys and shapes of the state dict, of the logits in eval mode for an image and weights set by a
    formula, and of dropout rates and the momentum of norms. So another architecture, activation or forward pass has
    another fingerprint, while comments and names change nothing. Logits are rounded, so that it depends neither on
    torch's global generator nor on the number of threads or the machine.

    Args:
        model: names the network; its weights do not matter.
        num_classes: of the dataset.
        image_shape: of the dataset's images, (C, H, W).

    Raises:
        ValueError: the network cannot be built, or takes no such images.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # more take longer for one image, above all beside other processes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build_configured(model, num_classes=num_classes)
            shapes = [[name, list(value.shape)] for name, value in network.state_dict().items()]
            _fill(network)
            content = [shapes, _rates(network), _sums(network, image_shape)]
    finally:
        torch.set_num_threads(threads)
    text = json.dumps(content, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rates(network: nn.Module) -> list[list[object]]:
    return [
        [name, rate, value]
        for name, layer in network.named_modules()
        for rate in _SHOWN_IN_TRAINING
        if isinstance(value := getattr(layer, rate, None), int | float)
    ]


def _fill(network: nn.Module) -> None:
    """Set the weights to values with which activations neither vanish nor explode with depth."""
    for number, (name, value) in enumerate(network.state_dict().items()):
        if not value.is_floating_point():
            continue  # counters, tables of positions
        spread = _spread(number, value.numel()).reshape(value.shape)
        if value.ndim > 1:
            spread *= math.sqrt(3 / max(value.shape[1:].numel(), 1))
        else:
            spread = (0.0 if name.endswith(("bias", "running_mean")) else 1.0) + 0.25 * spread
        value.copy_(spread)


def _spread(number: int, count: int) -> Tensor:
    """Pseudo-random values between -1 and 1 from integer arithmetic, the same on every machine."""
    places = torch.arange(count, dtype=torch.int64)
    mixed = (places + 1) * 2654435761 + (number + 1) * 40503
    mixed = ((mixed ^ (mixed >> 15)) * 73244475) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 16)) * 73244475) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)).double() / 2**31 - 1


def _sums(network: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """A few weighted sums of the logits, rounded, as text."""
    network.eval()
    images = 2 * _spread(-1, math.prod(image_shape)).reshape(1, *image_shape)
    try:
        logits = _logits(network.double(), images)
    except Exception:  # noqa: BLE001 (a layer that knows one precision only can raise anything)
        try:
            logits = _logits(network.float(), images.float())
        except Exception as error:
            raise ValueError(
                f"{type(network).__name__} takes no images of the shape {tuple(image_shape)}: {error}"
            ) from error
    values = logits.double().flatten()
    weights = torch.stack([_spread(-2 - number, len(values)) for number in range(_SUMS)])
    scale = float(values.abs().max())
    digits = _DIGITS[logits.dtype] if logits.dtype in _DIGITS else _DIGITS[torch.float32]
    if not 0 < scale < math.inf:
        return [f"{scale}"]
    sums = weights @ (values / scale) / math.sqrt(len(values))
    return [f"{scale:.{digits - 1}e}", *(f"{round(value, digits) + 0.0:.{digits}f}" for value in sums.tolist())]


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(images)
    return logits
