"""The optimiser and the learning-rate schedule of a recipe."""

import functools
import math
from collections.abc import Iterator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import nn
from torch.optim import SGD
from torch.optim import AdamW
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.lr_scheduler import MultiStepLR
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tune_topkd.config import EmaConfig
from tune_topkd.config import RecipeConfig

_TOKENS = ("cls_token", "class_token", "dist_token", "distill_token", "reg_token")
_POSITIONS = ("pos_embed", "pos_embedding", "relative_position_bias_table")


def build_optimizer(modules: Sequence[nn.Module], recipe: RecipeConfig, device: torch.device) -> Optimizer:
    """The optimiser of all trainable weights of some modules: a student and its loss.

    Args:
        modules: whose weights, on `device`.
        recipe: names the optimiser and its settings.
        device: on a GPU the optimiser is fused.
    """
    fused = device.type == "cuda"  # one kernel for all weights; on the CPU it gains nothing
    weights = trained_weights(modules)
    if recipe.optimizer == "adamw":
        spared = {id(weight) for module in modules for weight in _without_decay(module)}
        groups = [
            {"params": [w for w in weights if id(w) not in spared], "weight_decay": recipe.weight_decay},
            {"params": [w for w in weights if id(w) in spared], "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=recipe.lr, fused=fused)
    return SGD(
        weights,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )


def trained_weights(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The weights of some modules that are trained."""
    return [weight for module in modules for weight in module.parameters() if weight.requires_grad]


def averaged(model: nn.Module, ema: EmaConfig, steps: int) -> AveragedModel:
    """A network whose weights and buffers are an exponential moving average of another's.

    After the step t it has w_t = d · w_(t-1) + (1 - d) · model_t with d = exp(-1 / (decay_epochs · steps)); the first step
    counts in full.

    Args:
        model: the one that is trained; `update_parameters(model)` after each step.
        ema: how fast older steps are forgotten.
        steps: of an epoch.
    """
    decay = math.exp(-1 / (ema.decay_epochs * steps))
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def _without_decay(module: nn.Module) -> Iterator[Tensor]:
    """The weights that AdamW does not decay, as is usual for vision transformers.

    They are vectors, biases, tokens and position embeddings, and what a network or a part of it names in
    `no_weight_decay()`, as timm's networks do.
    """
    own = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if callable(names := getattr(part, "no_weight_decay", None))
        for name in names()
    }
    for name, weight in module.named_parameters():
        leaf = name.rpartition(".")[2]
        if weight.ndim <= 1 or leaf in ("bias", *_TOKENS, *_POSITIONS) or name in own:
            yield weight


def build_scheduler(optimizer: Optimizer, recipe: RecipeConfig) -> LRScheduler:
    """The learning-rate schedule of a recipe, to be stepped once per epoch."""
    if recipe.warmup_epochs:
        return LambdaLR(optimizer, functools.partial(lr_factor, recipe=recipe))
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=recipe.epochs, eta_min=recipe.min_lr)
    milestones = recipe.milestone_epochs() if recipe.schedule == "step" else []
    return MultiStepLR(optimizer, milestones, recipe.gamma)


def lr_factor(done: int, recipe: RecipeConfig) -> float:
    """The learning rate of a recipe with a warm-up, in units of the recipe's `lr`.

    With SGD the factors of schedule and warm-up are multiplied. With AdamW, as in timm, the warm-up rises to `lr` and
    the schedule follows it, its epochs counted from the first epoch of the training.

    Args:
        done: epochs that are over, from 0.
        recipe: the recipe.
    """
    if recipe.optimizer == "adamw" and done < recipe.warmup_epochs:
        return recipe.warmup_start + (1 - recipe.warmup_start) * done / recipe.warmup_epochs
    factor = 1.0
    if recipe.schedule == "cosine":
        floor = recipe.min_lr / recipe.lr
        factor = floor + (1 - floor) * (1 + math.cos(math.pi * done / recipe.epochs)) / 2
    elif recipe.schedule == "step":
        factor = recipe.gamma ** sum(done >= milestone for milestone in recipe.milestone_epochs())
    ramp = min(done / recipe.warmup_epochs, 1.0)
    return factor * (recipe.warmup_start * (1 - ramp) + ramp)
