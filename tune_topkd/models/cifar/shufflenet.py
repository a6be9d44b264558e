"""ShuffleNet (arXiv 1707.01083, 3 groups) and ShuffleNetV2 (arXiv 1807.11164, 1×) with 1×1 stems, for small images."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

_STEM = 24


def _shuffled(x: Tensor, groups: int) -> Tensor:
    """The channels of `(B, C, H, W)` dealt out anew: channel j of group i goes to place `j * groups + i`."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


def _pointwise(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


class _GroupedUnit(nn.Module):
    """ShuffleNet's bottleneck; with stride 2 the pooled input is put beside its `outputs` channels, else added."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        middle = outputs // 4
        self.first_groups = 1 if inputs == _STEM else groups  # the stem has too few channels to be split
        self.strided = stride == 2
        self.conv1 = _pointwise(inputs, middle, self.first_groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = _depthwise(middle, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = _pointwise(middle, outputs, groups)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(_shuffled(y, self.first_groups))), inplace=True)
        y = self.bn3(self.conv3(y))
        if self.strided:
            y = torch.cat([y, functional.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        else:
            y = y + x
        return functional.relu(y, inplace=True)


class ShuffleNetV1(nn.Module):
    """ShuffleNet with 3 groups: stages of 4, 8 and 4 units, 240, 480 and 960 channels wide.

    Args:
        num_classes: number of logits.
    """

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _pointwise(3, _STEM)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layer1 = self._stage(_STEM, 240, 4)
        self.layer2 = self._stage(240, 480, 8)
        self.layer3 = self._stage(480, 960, 4)
        self.linear = nn.Linear(960, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, H, W)`."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits

    @staticmethod
    def _stage(inputs: int, width: int, count: int) -> nn.Sequential:
        first = _GroupedUnit(inputs, width - inputs, 2, 3)
        return nn.Sequential(first, *(_GroupedUnit(width, width, 1, 3) for _ in range(count - 1)))


class _SplitUnit(nn.Module):
    """ShuffleNetV2's unit: one half of the channels passes, the other is convolved, both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _pointwise(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _pointwise(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        passed, y = x.chunk(2, dim=1)
        y = functional.relu(self.bn1(self.conv1(y)), inplace=True)
        y = self.bn2(self.conv2(y))
        y = functional.relu(self.bn3(self.conv3(y)), inplace=True)
        return _shuffled(torch.cat([passed, y], dim=1), 2)


class _DownUnit(nn.Module):
    """ShuffleNetV2's unit of stride 2: both branches see all channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = _depthwise(inputs, 2)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = _pointwise(inputs, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _pointwise(inputs, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _pointwise(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = functional.relu(self.bn2(self.conv2(left)), inplace=True)
        right = functional.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = functional.relu(self.bn5(self.conv5(right)), inplace=True)
        return _shuffled(torch.cat([left, right], dim=1), 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 1×: stages of 4, 8 and 4 units, 116, 232 and 464 channels wide, then 1024 features.

    Args:
        num_classes: number of logits.
    """

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _pointwise(3, _STEM)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layer1 = self._stage(_STEM, 116, 4)
        self.layer2 = self._stage(116, 232, 8)
        self.layer3 = self._stage(232, 464, 4)
        self.conv2 = _pointwise(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, H, W)`."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = functional.relu(self.bn2(self.conv2(x)), inplace=True)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits

    @staticmethod
    def _stage(inputs: int, width: int, count: int) -> nn.Sequential:
        return nn.Sequential(_DownUnit(inputs, width), *(_SplitUnit(width) for _ in range(count - 1)))


SHUFFLENETS: dict[str, Callable[..., nn.Module]] = {"ShuffleV1": ShuffleNetV1, "ShuffleV2": ShuffleNetV2}
