"""Small networks: for the images `(B, 1, 8, 8)` of the default dataset, and for any small images."""

from collections.abc import Callable
from collections.abc import Sequence

from torch import Tensor
from torch import nn


class SmallCNN(nn.Module):
    """3×3 convolutions with batch norm and ReLU, then mean pooling and a linear map.

    Args:
        num_classes: number of logits.
        widths: channels of each convolution, at least one.
        strides: of each convolution; by default 1, then 2 for each after the first.
        channels: of the images.

    Raises:
        ValueError: `widths` is not a list of positive integers, or `strides` not one as long, or `channels` not
            positive.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        widths: Sequence[int] = (32, 64, 64),
        strides: Sequence[int] | None = None,
        channels: int = 3,
    ) -> None:
        super().__init__()
        _check_positive("widths", widths)
        strides = strides if strides is not None else [1] + [2] * (len(widths) - 1)
        _check_positive("strides", strides)
        _check_positive("channels", [channels])
        if len(strides) != len(widths):
            raise ValueError(f"strides must be as many as widths, {len(widths)}, but got {strides!r}")
        layers: list[nn.Module] = []
        for before, width, stride in zip([channels, *widths], widths, strides, strict=False):
            layers.append(nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, channels, H, W)`."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


def _check_positive(name: str, values: object) -> None:
    if not isinstance(values, Sequence) or not values or not all(type(v) is int and v >= 1 for v in values):
        raise ValueError(f"{name} must be a list of at least one positive integer, but got {values!r}")


def _digits_cnn(*, num_classes: int, widths: Sequence[int] = (32, 64, 64)) -> nn.Module:
    return SmallCNN(num_classes=num_classes, widths=widths, channels=1)


def _digits_cnn_tiny(*, num_classes: int, widths: Sequence[int] = (4, 8)) -> nn.Module:
    return SmallCNN(num_classes=num_classes, widths=widths, channels=1)


def _digits_linear(*, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, num_classes))


SMALL: dict[str, Callable[..., nn.Module]] = {
    "digits_cnn": _digits_cnn,
    "digits_cnn_tiny": _digits_cnn_tiny,
    "digits_linear": _digits_linear,
    "small_cnn": SmallCNN,
}
