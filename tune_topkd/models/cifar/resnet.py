"""Residual networks: three stages (arXiv 1512.03385, section 4.2) and four (its ImageNet networks, for small images)."""

from collections.abc import Callable
from collections.abc import Sequence

from torch import Tensor
from torch import nn
from torch.nn import functional

from tune_topkd.models.initial_weights import draw_he_normal


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The identity where the shape stays."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(_conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class _BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which the state dict calls `name`."""

    def __init__(self, inputs: int, width: int, stride: int, *, name: str) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut_name = name
        self.add_module(name, _projection(inputs, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return functional.relu(y + getattr(self, self.shortcut_name)(x), inplace=True)


class _Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions to `4 * width` channels beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv1x1(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv1x1(width, 4 * width)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = _projection(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return functional.relu(y + self.shortcut(x), inplace=True)


class ThreeStageResNet(nn.Module):
    """`depth - 2` convolutions in three stages of basic blocks, projected shortcuts where the shape changes.

    Args:
        num_classes: number of logits.
        depth: 6n + 2 for n blocks a stage.
        widths: channels of the stem and the three stages.
    """

    def __init__(self, *, num_classes: int, depth: int, widths: Sequence[int]) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        stem, *stages = widths
        self.conv1 = _conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _basic_stage(stem, stages[0], blocks, 1, name="downsample")
        self.layer2 = _basic_stage(stages[0], stages[1], blocks, 2, name="downsample")
        self.layer3 = _basic_stage(stages[1], stages[2], blocks, 2, name="downsample")
        self.fc = nn.Linear(stages[2], num_classes)
        draw_he_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, H, W)`."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class FourStageResNet(nn.Module):
    """ImageNet's residual networks with a 3×3 stem and without its pooling, for images of about 32 pixels.

    Args:
        num_classes: number of logits.
        blocks: number of blocks in each stage.
        bottleneck: whether the blocks are bottlenecks.
    """

    def __init__(self, *, num_classes: int, blocks: Sequence[int], bottleneck: bool) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        stages: list[nn.Sequential] = []
        channels = 64
        for depth, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True)):
            stride = 2 if depth else 1
            if bottleneck:
                first = _Bottleneck(channels, width, stride)
                channels = 4 * width
                stages.append(nn.Sequential(first, *(_Bottleneck(channels, width, 1) for _ in range(count - 1))))
            else:
                stages.append(_basic_stage(channels, width, count, stride, name="shortcut"))
                channels = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(channels, num_classes)
        draw_he_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, H, W)`."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _basic_stage(inputs: int, width: int, count: int, stride: int, *, name: str) -> nn.Sequential:
    first = _BasicBlock(inputs, width, stride, name=name)
    return nn.Sequential(first, *(_BasicBlock(width, width, 1, name=name) for _ in range(count - 1)))


def _three_stages(depth: int, *widths: int) -> Callable[..., nn.Module]:
    def build(*, num_classes: int) -> nn.Module:
        return ThreeStageResNet(num_classes=num_classes, depth=depth, widths=widths)

    return build


def _four_stages(*blocks: int, bottleneck: bool) -> Callable[..., nn.Module]:
    def build(*, num_classes: int) -> nn.Module:
        return FourStageResNet(num_classes=num_classes, blocks=blocks, bottleneck=bottleneck)

    return build


RESNETS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": _three_stages(depth, 16, 16, 32, 64) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": _three_stages(depth, 32, 64, 128, 256) for depth in (8, 32)},
    "ResNet18": _four_stages(2, 2, 2, 2, bottleneck=False),
    "ResNet50": _four_stages(3, 4, 6, 3, bottleneck=True),
}
