"""Networks for ImageNet's images `(B, 3, 224, 224)` that torchvision does not have under these keys or sizes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch import nn

# Channels and stride of each depthwise-separable convolution.
_SEPARABLE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class MobileNetV1(nn.Module):
    """A stem and 13 depthwise-separable convolutions (arXiv 1704.04861), in the layout of the distillation field.

    Args:
        num_classes: number of logits.
    """

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        layers, channels = [nn.Sequential(*_conv_bn_relu(3, 32, 3, stride=2))], 32
        for width, stride in _SEPARABLE:
            filters = _conv_bn_relu(channels, channels, 3, stride=stride, groups=channels)
            layers.append(nn.Sequential(*filters, *_conv_bn_relu(channels, width, 1)))
            channels = width
        self.model = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, H, W)`."""
        logits: Tensor = self.fc(self.model(images).mean((2, 3)))
        return logits


def _conv_bn_relu(inputs: int, outputs: int, side: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def deit_tiny(*, num_classes: int, image_size: int = 224, patch_size: int = 16, drop_path: float = 0.0) -> nn.Module:
    """DeiT-Ti without distillation token (arXiv 2012.12877): torchvision's class and keys, DeiT's size and first
    weights.

    Args:
        num_classes: number of logits.
        image_size: side of the images, which must be square.
        patch_size: side of the patches; divides `image_size`.
        drop_path: share of the images for which the last layer's branches are left out in training; grows from 0 at
            the first layer.

    Raises:
        ValueError: a size is no positive integer or does not divide, or `drop_path` is not in [0, 1).
    """
    from torchvision.models import VisionTransformer

    for name, value in (("image_size", image_size), ("patch_size", patch_size)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, but got {value!r}")
    if image_size % patch_size:
        raise ValueError(f"patch_size must divide image_size = {image_size}, but got {patch_size}")
    if isinstance(drop_path, bool) or not isinstance(drop_path, int | float) or not 0 <= drop_path < 1:
        raise ValueError(f"drop_path must be a number in [0, 1), but got {drop_path!r}")
    layers = 12
    transformer: Any = VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        num_layers=layers,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=num_classes,
    )
    _draw_deit(transformer)
    for depth, layer in enumerate(transformer.encoder.layers):
        _drop_branches(layer, drop_path * depth / (layers - 1))
    network: nn.Module = transformer
    return network


def _draw_deit(network: Any) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.MultiheadAttention):
            nn.init.trunc_normal_(layer.in_proj_weight, std=0.02)
    for token in (network.class_token, network.encoder.pos_embedding):
        nn.init.trunc_normal_(token, std=0.02)


def _drop_branches(layer: Any, share: float) -> None:
    """Leave out both branches of a transformer layer for a share of the images.

    torchvision's layer ends each branch in a dropout, which has no weights: replacing it keeps the keys.
    """
    from torchvision.ops import StochasticDepth

    layer.dropout = StochasticDepth(share, mode="row")
    layer.mlp[-1] = StochasticDepth(share, mode="row")


IMAGENET: dict[str, Callable[..., nn.Module]] = {"deit_tiny": deit_tiny, "mobilenet_v1": MobileNetV1}
