"""Students and teachers by name, and the files their weights are kept in.

Every network takes float images `(B, C, H, W)` and gives logits `(B, num_classes)`. Weights are drawn from torch's
global generator, which the caller seeds. `build_model` knows these names:

- `digits_cnn`, `digits_cnn_tiny` and `digits_linear` for the images `(B, 1, 8, 8)` of the default dataset, and
  `small_cnn` for any small images;
- the distillation field's networks for CIFAR, such as `resnet56` or `wrn_40_2`, also as `cifar:resnet56`, in the layout
  of the published checkpoints;
- `mobilenet_v1` and `deit_tiny` for ImageNet's images;
- `torchvision:NAME` and `timm:NAME`, the networks of these libraries;
- `package.module:FACTORY`, any function that takes `num_classes` and gives a network.

Inside: `building` finds and builds a network, `checkpoints` loads and saves its weights, `reading` reads the files that
hold them, `fingerprint` tells whether a network is still the same; `small`, `cifar` and `imagenet` are the networks,
`initial_weights` draws their first weights.
"""

from tune_topkd.models.building import _REGISTRY as _REGISTRY
from tune_topkd.models.building import ModelNameError
from tune_topkd.models.building import OutputError
from tune_topkd.models.building import build_configured
from tune_topkd.models.building import build_model
from tune_topkd.models.building import check_model
from tune_topkd.models.building import count_parameters
from tune_topkd.models.building import find_head
from tune_topkd.models.building import freeze_backbone
from tune_topkd.models.building import model_names
from tune_topkd.models.building import to_channels_last
from tune_topkd.models.checkpoints import WEIGHTS_KEY
from tune_topkd.models.checkpoints import load_backbone
from tune_topkd.models.checkpoints import load_weights
from tune_topkd.models.checkpoints import save_weights
from tune_topkd.models.fingerprint import network_fingerprint
from tune_topkd.models.reading import read_checkpoint
from tune_topkd.models.small import SmallCNN

__all__ = [
    "WEIGHTS_KEY",
    "ModelNameError",
    "OutputError",
    "SmallCNN",
    "build_configured",
    "build_model",
    "check_model",
    "count_parameters",
    "find_head",
    "freeze_backbone",
    "load_backbone",
    "load_weights",
    "model_names",
    "network_fingerprint",
    "read_checkpoint",
    "save_weights",
    "to_channels_last",
]
