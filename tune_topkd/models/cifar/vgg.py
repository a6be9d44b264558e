"""VGG networks (arXiv 1409.1556) with batch norm and a single linear map as the head."""

from collections.abc import Callable
from collections.abc import Sequence

from torch import Tensor
from torch import nn
from torch.nn import functional

from tune_topkd.models.initial_weights import draw_he_normal
from tune_topkd.models.initial_weights import draw_small_linear

_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five blocks of 3×3 convolutions, 64, 128, 256, 512 and 512 channels wide.

    Args:
        num_classes: number of logits.
        depths: number of convolutions in each block.
    """

    def __init__(self, *, num_classes: int, depths: Sequence[int]) -> None:
        super().__init__()
        inputs = (3, *_WIDTHS)
        blocks = [_block(*shape) for shape in zip(inputs, _WIDTHS, depths, strict=False)]
        self.block0, self.block1, self.block2, self.block3, self.block4 = blocks
        self.classifier = nn.Linear(_WIDTHS[-1], num_classes)
        draw_he_normal(self)
        draw_small_linear(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, H, W)`; between the last two blocks only H = 64 is pooled."""
        x = functional.max_pool2d(self.block0(images), 2)
        x = functional.max_pool2d(self.block1(x), 2)
        x = functional.max_pool2d(self.block2(x), 2)
        x = self.block3(x)
        if images.shape[2] == 64:  # as the published networks do for Tiny-ImageNet
            x = functional.max_pool2d(x, 2)
        logits: Tensor = self.classifier(self.block4(x).mean((2, 3)))
        return logits


def _block(inputs: int, width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for place in range(depth):
        convolution = nn.Conv2d(width if place else inputs, width, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _vgg(*depths: int) -> Callable[..., nn.Module]:
    def build(*, num_classes: int) -> nn.Module:
        return VGG(num_classes=num_classes, depths=depths)

    return build


VGGS: dict[str, Callable[..., nn.Module]] = {
    "vgg8": _vgg(1, 1, 1, 1, 1),
    "vgg11": _vgg(1, 1, 2, 2, 2),
    "vgg13": _vgg(2, 2, 2, 2, 2),
    "vgg16": _vgg(2, 2, 3, 3, 3),
    "vgg19": _vgg(2, 2, 4, 4, 4),
}
