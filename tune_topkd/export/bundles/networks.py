"""Networks as source text: a function for each that constructs it, or says what has to be filled in."""

import re
from collections.abc import Mapping

from tune_topkd.config import ModelConfig
from tune_topkd.export.bundles.common import FILL_IN
from tune_topkd.export.standalone import literal

_LIBRARIES = ("torchvision", "timm")


def is_known(config: ModelConfig, elsewhere: Mapping[str, str]) -> bool:
    """Whether a network can be constructed without this project: it is a library's or the user's, or `elsewhere` has it."""
    return ":" in _name(config) or _name(config) in elsewhere


def network_function(
    config: ModelConfig, role: str, classes: int | None, decorator: str, elsewhere: Mapping[str, str]
) -> tuple[list[str], str]:
    """A function that constructs a network.

    Args:
        config: which.
        role: its name: `student` or `teacher`.
        classes: the default of its argument `num_classes`; None gives it none.
        decorator: the line before it; may be empty.
        elsewhere: where the framework has networks of this project's names: `module.function` by name.

    Returns:
        The import statements that it needs, and its text.
    """
    name = _name(config)
    library, _, model = name.partition(":")
    arguments = "".join(f", {key}={literal(value)}" for key, value in config.kwargs.items())
    imports = ["from torch import nn"]
    if library in _LIBRARIES and model:
        make = {"torchvision": "torchvision.models.get_model", "timm": "timm.create_model"}[library]
        imports.append(f"import {library}")
        made = [f'    network = {make}("{model}", num_classes=num_classes{arguments})']
    elif model:
        imports.append(f"import {library}")
        made = [f"    network = {library}.{model}(num_classes=num_classes{arguments})"]
    elif name in elsewhere:
        imports.append(f"import {elsewhere[name].rpartition('.')[0]}")
        made = [f"    network = {elsewhere[name]}(num_classes=num_classes{arguments})"]
    else:
        made = [
            f"    # {FILL_IN}: construct it. Where tune_topkd is installed, this does:",
            "    #     from tune_topkd.models import build_model",
            f'    #     network = build_model("{name}", num_classes=num_classes{arguments})',
            f'    raise NotImplementedError("{FILL_IN}: the network {name}, in {role}()")',
        ]
    is_made = "raise" not in made[-1]
    resized = ""
    if config.image_size is not None:
        imports += ["from torch.nn import functional", "from torch import Tensor", "from typing import Any"]
        hook = f"network.register_forward_pre_hook(resizing({config.image_size}))"
        made += [f"    {hook}"] if is_made else [f"    # {hook}"]
        resized = f"; its images are resized to {config.image_size} pixels"
    made += ["    return network"] if is_made else ["    # return network"]
    default = "" if classes is None else f" = {classes}"
    lines = [
        *([decorator] if decorator else []),
        f"def {role}(num_classes: int{default}) -> nn.Module:",
        f'    """Construct the {role}, {name}{resized}; it returns logits alone."""',
        *made,
    ]
    return imports, "\n".join(lines)


RESIZING = '''def resizing(side: int) -> Any:
    """Return a hook that resizes the images that a network is given to a side, as the sweep did."""

    def resize(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images, *others = inputs
        images = functional.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return (images, *others)

    return resize'''


def _name(config: ModelConfig) -> str:
    return re.sub("^cifar:", "", config.name)
