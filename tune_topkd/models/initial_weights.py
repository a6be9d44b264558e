"""How the distillation field's networks draw their first weights."""

from torch import nn


def draw_he_normal(network: nn.Module) -> None:
    """He's normal weights by fan-out and no bias for all convolutions; other layers keep torch's own."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def draw_small_linear(network: nn.Module) -> None:
    """Normal weights of deviation 0.01 and no bias for all linear maps."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
