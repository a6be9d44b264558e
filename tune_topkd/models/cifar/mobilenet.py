"""MobileNetV2 (arXiv 1801.04381) at half its width, for small images."""

from collections.abc import Callable

from torch import Tensor
from torch import nn

from tune_topkd.models.initial_weights import draw_he_normal
from tune_topkd.models.initial_weights import draw_small_linear

# Expansion, channels, number of blocks and first stride of each stage; the channels are those of half the width.
_STAGES = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
_STEM, _LAST = 16, 1280


class _InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; added to the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *_conv_bn_relu(inputs, wide, 1),
            *_conv_bn_relu(wide, wide, 3, stride=stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """The half-width network for images of 32 pixels: stem of stride 2, features of 2×2.

    Args:
        num_classes: number of logits.
    """

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_conv_bn_relu(3, _STEM, 3, stride=2))
        stages, channels = [], _STEM
        for expansion, width, count, stride in _STAGES:
            first = _InvertedResidual(channels, width, stride, expansion)
            stages.append(
                nn.Sequential(first, *(_InvertedResidual(width, width, 1, expansion) for _ in range(count - 1)))
            )
            channels = width
        self.blocks = nn.Sequential(*stages)
        self.conv2 = nn.Sequential(*_conv_bn_relu(channels, _LAST, 1))
        self.classifier = nn.Sequential(nn.Linear(_LAST, num_classes))
        draw_he_normal(self)
        draw_small_linear(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, H, W)`."""
        logits: Tensor = self.classifier(self.conv2(self.blocks(self.conv1(images))).mean((2, 3)))
        return logits


def _conv_bn_relu(inputs: int, outputs: int, side: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


MOBILENETS: dict[str, Callable[..., nn.Module]] = {"MobileNetV2": MobileNetV2}
