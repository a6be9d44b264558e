"""Wide residual networks (arXiv 1605.07146): batch norm and ReLU come before each convolution."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor
from torch import nn
from torch.nn import functional

from tune_topkd.models.initial_weights import draw_he_normal


class _PreActivationBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        same = inputs == width
        self.convShortcut = None if same else nn.Conv2d(inputs, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.bn1(x), inplace=True)
        y: Tensor = self.conv2(self.dropout(functional.relu(self.bn2(self.conv1(active)), inplace=True)))
        # A projection sees the activated input, the identity the raw one.
        shortcut: Tensor = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + y


class WideResNet(nn.Module):
    """Three stages of pre-activation blocks, `16 * factor`, `32 * factor` and `64 * factor` channels wide.

    Args:
        num_classes: number of logits.
        depth: 6n + 4 for n blocks a stage.
        factor: how many times wider than the narrowest.
        dropout: share of the activations dropped between a block's two convolutions.

    Raises:
        ValueError: `dropout` is not in [0, 1).
    """

    def __init__(self, *, num_classes: int, depth: int, factor: int, dropout: float = 0.0) -> None:
        super().__init__()
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), but got {dropout!r}")
        blocks = (depth - 4) // 6
        widths = (16, 16 * factor, 32 * factor, 64 * factor)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1 = _stage(widths[0], widths[1], blocks, 1, dropout)
        self.block2 = _stage(widths[1], widths[2], blocks, 2, dropout)
        self.block3 = _stage(widths[2], widths[3], blocks, 2, dropout)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        draw_he_normal(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, H, W)`."""
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        x = functional.relu(self.bn1(x), inplace=True)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _stage(inputs: int, width: int, count: int, stride: int, dropout: float) -> nn.Sequential:
    first = _PreActivationBlock(inputs, width, stride, dropout)
    layer = nn.Sequential(first, *(_PreActivationBlock(width, width, 1, dropout) for _ in range(count - 1)))
    return nn.Sequential(OrderedDict(layer=layer))


def _wide(depth: int, factor: int) -> Callable[..., nn.Module]:
    def build(*, num_classes: int, dropout: float = 0.0) -> nn.Module:
        return WideResNet(num_classes=num_classes, depth=depth, factor=factor, dropout=dropout)

    return build


WIDE_RESNETS: dict[str, Callable[..., nn.Module]] = {
    f"wrn_{depth}_{factor}": _wide(depth, factor) for depth in (16, 40) for factor in (1, 2)
}
