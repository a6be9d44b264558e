"""The format `mdistiller`: a config and a plug-in for mdistiller and the projects that are built on it.

Their configs are strict: a section that no code has declared is refused, and a value of another type than the declared one.
The plug-in declares the section and registers the method, then calls their `tools.train.main`.
"""

import re
import textwrap

from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.config import RecipeConfig
from tune_topkd.export.bundles.common import FILL_IN
from tune_topkd.export.bundles.common import as_comments
from tune_topkd.export.bundles.common import flow
from tune_topkd.export.bundles.common import loss_file
from tune_topkd.export.bundles.common import of_the_student
from tune_topkd.export.bundles.common import opening
from tune_topkd.export.bundles.common import the_teacher
from tune_topkd.export.bundles.recipes import DECAY_GROUPS
from tune_topkd.export.bundles.recipes import lr_factor
from tune_topkd.export.bundles.recipes import without_decay
from tune_topkd.export.standalone import sorted_imports
from tune_topkd.export.tuned import TunedConfig

MODULE = "tuned_mdistiller"
_USE = [
    "# in the root of mdistiller, or of a project built on it; FOLDER is where this file lies:",
    f"PYTHONPATH=. python FOLDER/{MODULE}.py --cfg FOLDER/{MODULE}.yaml",
]
_IMAGENET = {
    "torchvision:resnet18": "ResNet18",
    "torchvision:resnet34": "ResNet34",
    "torchvision:resnet50": "ResNet50",
    "torchvision:resnet101": "ResNet101",
    "mobilenet_v1": "MobileNetV1",
}
_CIFAR = frozenset(
    [
        *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
        *("resnet8x4", "resnet32x4", "ResNet18", "ResNet50"),
        *("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"),
        *("vgg8", "vgg11", "vgg13", "vgg16", "vgg19"),
        *("MobileNetV2", "ShuffleV1", "ShuffleV2"),
    ]
)
"""Networks that have the same name here and there."""
_AUGMENTED = {
    "cifar100": {"pad": 4, "flip": True},
    "imagenet": {"crop_scale": [0.08, 1.0], "flip": True},
    "tiny_imagenet": {"rotate": 20.0, "flip": True},
}
"""Its datasets, and how it augments them."""


def as_mdistiller(tuned: TunedConfig) -> dict[str, str]:
    """The files of a tuned config for mdistiller, by name.

    Raises:
        ConfigError: the sweep had no teacher.
    """
    return {f"{MODULE}.yaml": _yaml(tuned), f"{MODULE}.py": _module(tuned)} | loss_file(tuned)


def _section(tuned: TunedConfig) -> str:
    """The name of the method in a config, which none of mdistiller's has."""
    return "TUNED_" + re.sub(r"\W+", "_", tuned.method).upper()


# --- the plug-in ----------------------------------------------------------------------------------------------------


def _module(tuned: TunedConfig) -> str:
    teacher = the_teacher(tuned, "mdistiller")
    imports = [
        "import argparse",
        "from typing import Any",
        "import torch",
        "import tuned",
        "from mdistiller.distillers import distiller_dict",
        "from mdistiller.distillers._base import Distiller",
        "from mdistiller.engine.cfg import CFG",
        "from torch import Tensor",
        "from torch import nn",
        "from yacs.config import CfgNode",
    ]
    parts = [_DISTILLER.format(section=_section(tuned), teachers=_resized(teacher, imports))]
    if _needs_trainer(tuned.recipe):
        parts += _trainer(tuned.recipe, imports)
    parts.append(_MAIN)
    text = "\n\n\n".join(parts)
    opened = opening(tuned, "a plug-in for mdistiller", _USE, [])
    opened = opened.replace("Nothing is to be filled in.", f"Nothing is to be filled in here; see {MODULE}.yaml.")
    return f'"""{opened}\n"""\n\n{sorted_imports(imports)}\n\n{text}\n'


def _resized(config: ModelConfig, imports: list[str]) -> str:
    """What a network is shown."""
    if config.image_size is None:
        return "image"
    imports.append("from torch.nn import functional")
    side = config.image_size
    resized = f'functional.interpolate(image, ({side}, {side}), mode="bilinear", antialias=True, align_corners=False)'
    return f"\n                {resized}\n            "


_DISTILLER = '''SECTION = "{section}"
CFG[SECTION] = CfgNode({{name.upper(): value for name, value in tuned.LOSS.items()}})  # its types are strict


class TunedDistiller(Distiller):
    """The tuned loss as a method of mdistiller."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        """Construct the loss with the values of the config's section."""
        super().__init__(student, teacher)
        self.loss = tuned.criterion(**{{name: cfg[SECTION][name.upper()] for name in tuned.LOSS}})

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """Return the student's weights, and the loss's, if it has any."""
        return [*super().get_learnable_parameters(), *self.loss.parameters()]

    def get_extra_parameters(self) -> int:
        """Return the number of the loss's weights."""
        return sum(weight.numel() for weight in self.loss.parameters())

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the student's logits and the weighted losses, of which mdistiller takes the sum; epochs count from 1."""
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher({teachers})
        terms = tuned.weighted_terms(self.loss, logits_student, logits_teacher, target, kwargs["epoch"])
        losses = {{"loss_ce": terms.pop("ce")}} if "ce" in terms else {{}}
        if terms:
            losses["loss_kd"] = sum(terms.values())
        return logits_student, losses


distiller_dict[SECTION] = TunedDistiller'''

_MAIN = """if __name__ == "__main__":
    from tools.train import main

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="the config")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the config")
    arguments = parser.parse_args()
    CFG.merge_from_file(arguments.cfg)
    CFG.merge_from_list(arguments.opts)
    CFG.freeze()
    main(CFG, arguments.resume, arguments.opts)"""


def _needs_trainer(recipe: RecipeConfig) -> bool:
    """Whether mdistiller's own trainer cannot do what the recipe says: it has SGD with steps of the learning rate."""
    plain = recipe.optimizer == "sgd" and not recipe.nesterov and recipe.schedule != "cosine"
    return not plain or bool(recipe.warmup_epochs) or recipe.clip_grad is not None


def _trainer(recipe: RecipeConfig, imports: list[str]) -> list[str]:
    """The parts of a trainer of the recipe, whose imports are added to the given ones."""
    imports += ["import mdistiller.engine.trainer", "from mdistiller.engine import trainer_dict"]
    parts = [lr_factor(recipe)]
    if "math." in parts[0]:
        imports.append("import math")
    if recipe.optimizer == "adamw":
        needed, text = without_decay()
        imports += [*needed, "from torch.optim import AdamW"]
        parts += [text, DECAY_GROUPS]
        made = [
            "groups = decay_groups(self.distiller.module.student, cfg.SOLVER.WEIGHT_DECAY)",
            'groups.append({"params": list(self.distiller.module.loss.parameters())})',
            'optimizer = AdamW([group for group in groups if group["params"]], lr=cfg.SOLVER.LR)',
        ]
    else:
        imports.append("from torch.optim import SGD")
        made = [
            "optimizer = SGD(",
            "    self.distiller.module.get_learnable_parameters(),",
            "    lr=cfg.SOLVER.LR,",
            "    momentum=cfg.SOLVER.MOMENTUM,",
            "    weight_decay=cfg.SOLVER.WEIGHT_DECAY,",
            *(["    nesterov=True,"] if recipe.nesterov else []),
            ")",
        ]
    if recipe.clip_grad is not None:
        made.append("optimizer.register_step_pre_hook(clip)")
        parts.append(_CLIP.format(norm=recipe.clip_grad))
    imports.append("from torch.optim import Optimizer")
    body = textwrap.indent("\n".join(made), " " * 8)
    parts.append(_TRAINER.format(body=body))
    return parts


_CLIP = '''def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Scale the gradient down to the recipe's norm where it is longer, before a step."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    nn.utils.clip_grad_norm_(weights, {norm!r})'''

_TRAINER = '''def adjust_learning_rate(epoch: int, cfg: CfgNode, optimizer: Optimizer) -> float:
    """Set the learning rate of an epoch, from 1, in place of mdistiller's steps."""
    rate = cfg.SOLVER.LR * lr_factor(epoch - 1)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


class TunedTrainer(mdistiller.engine.trainer.BaseTrainer):
    """mdistiller's trainer with the optimiser of the recipe."""

    def init_optimizer(self, cfg: CfgNode) -> Optimizer:
        """Construct the optimiser."""
{body}
        return optimizer


mdistiller.engine.trainer.adjust_learning_rate = adjust_learning_rate
trainer_dict["tuned"] = TunedTrainer'''


# --- the config -----------------------------------------------------------------------------------------------------


def _yaml(tuned: TunedConfig) -> str:
    teacher, student, recipe, section = the_teacher(tuned, "mdistiller"), tuned.student, tuned.recipe, _section(tuned)
    names = [_name(config, tuned.data.name) for config in (teacher, student)]
    dataset = tuned.data.name if tuned.data.name in _AUGMENTED else "cifar100"
    marks = {
        role: "" if known else f"  # {FILL_IN}: the name of {config.name} in mdistiller.models"
        for role, config, (_, known) in zip(("teacher", "student"), (teacher, student), names, strict=True)
    }
    to_fill_in = [f"the {role}'s name" for role, mark in marks.items() if mark]
    if tuned.data.name not in _AUGMENTED:
        to_fill_in.append("the dataset")
    to_fill_in.append("the teacher's weights, where mdistiller looks for them")
    said = opening(tuned, "config for mdistiller", _USE, to_fill_in)
    lacking = _lacking(tuned)
    if lacking:
        said += "\n" + "\n".join(textwrap.wrap("Not here, and in the sweep: " + "; ".join(lacking) + ".", 115))
    solver = {
        "TRAINER": "tuned" if _needs_trainer(recipe) else "base",
        "BATCH_SIZE": recipe.batch_size,
        "EPOCHS": recipe.epochs,
        "LR": float(recipe.lr),
        "LR_DECAY_STAGES": recipe.milestone_epochs() if recipe.schedule == "step" else [],
        "LR_DECAY_RATE": float(recipe.gamma),
        "WEIGHT_DECAY": float(recipe.weight_decay),
        "MOMENTUM": float(recipe.momentum),
        "TYPE": "SGD" if recipe.optimizer == "sgd" else "ADAMW",
    }
    tag = ",".join([section.lower(), *(name for name, _ in names)])
    of_data = "" if dataset == tuned.data.name else f"  # {FILL_IN}: {tuned.data.name}, or what it has of it"
    lines = [
        as_comments(said),
        "",
        "EXPERIMENT:",
        '  NAME: ""',
        f"  TAG: {flow(tag)}",
        f"  PROJECT: {dataset}_tuned",
        "DATASET:",
        f"  TYPE: {dataset}{of_data}",
        "DISTILLER:",
        f"  TYPE: {section}",
        f"  TEACHER: {flow(names[0][0])}{marks['teacher']}",
        f"  STUDENT: {flow(names[1][0])}{marks['student']}",
        "SOLVER:"
        + ("  # the trainer `tuned` has its schedule from the plug-in, not from here" * _needs_trainer(recipe)),
        *(f"  {key}: {flow(value)}" for key, value in solver.items()),
        f"{section}:{'' if tuned.loss else ' {}'}",
        *(f"  {name.upper()}: {flow(value)}" for name, value in tuned.loss.items()),
    ]
    return "\n".join(lines) + "\n"


def _name(config: ModelConfig, dataset: str) -> tuple[str, bool]:
    """The name of a network there, and whether it is one."""
    own = re.sub("^cifar:", "", config.name)
    if dataset == "imagenet":
        return (
            (_IMAGENET[own], True) if own in _IMAGENET and not config.kwargs else (own.partition(":")[2] or own, False)
        )
    return own, own in _CIFAR and not config.kwargs


def _lacking(tuned: TunedConfig) -> list[str]:
    """What of the sweep mdistiller does not do, in words."""
    recipe, data = tuned.recipe, tuned.data
    found = [
        "a part of the training images was kept apart to choose by, where mdistiller takes the best epoch on the test set"
    ]
    if _augmented(data) != _AUGMENTED.get(data.name):
        found.append(f"the augmentation {flow(_augmented(data))}")
    found.append("the last images of an epoch, too few for a batch, were left out")
    if recipe.precision == "bfloat16":
        found.append("the networks' layers ran in bfloat16 (autocast)")
    if recipe.ema is not None:
        found.append("a moving average of the weights was measured besides, which changes no training")
    if tuned.student.image_size is not None:
        found.append(f"the student was shown images of {tuned.student.image_size} pixels")
    if "contrastive_weight" in tuned.loss:
        found.append("the contrastive term saw whole batches, and sees parts of them on several GPUs")
    return found + of_the_student(tuned)


def _augmented(data: DataConfig) -> dict[str, object]:
    return data.augment.model_dump(exclude_defaults=True)
