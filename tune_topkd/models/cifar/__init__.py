"""The distillation field's networks for CIFAR images `(B, 3, 32, 32)`.

Names, state-dict keys and shapes are those of the published checkpoints, which therefore load as they are. Pooling
before the head is over all positions, so that larger images work too.
"""

from collections.abc import Callable

from torch import nn

from tune_topkd.models.cifar.mobilenet import MOBILENETS
from tune_topkd.models.cifar.resnet import RESNETS
from tune_topkd.models.cifar.shufflenet import SHUFFLENETS
from tune_topkd.models.cifar.vgg import VGGS
from tune_topkd.models.cifar.wide_resnet import WIDE_RESNETS

CIFAR: dict[str, Callable[..., nn.Module]] = {**RESNETS, **WIDE_RESNETS, **VGGS, **MOBILENETS, **SHUFFLENETS}

__all__ = ["CIFAR"]
