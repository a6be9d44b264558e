"""A recipe's optimiser and schedule as source text."""

from dataclasses import dataclass

from tune_topkd.config import RecipeConfig
from tune_topkd.export.standalone import excerpt

_SCHEDULERS = "torch.optim.lr_scheduler"


@dataclass(frozen=True)
class Schedule:
    """A schedule of torch's, stepped once per epoch."""

    key: str
    """Its class."""
    kwargs: dict[str, object]


def schedule_of(recipe: RecipeConfig) -> Schedule | None:
    """The schedule, if one of torch's alone is it; None with a warm-up of the learning rate: see `lr_factor`."""
    if recipe.warmup_epochs:
        return None
    if recipe.schedule == "cosine":
        return Schedule("CosineAnnealingLR", {"T_max": recipe.epochs, "eta_min": recipe.min_lr})
    milestones = recipe.milestone_epochs() if recipe.schedule == "step" else []
    return Schedule("MultiStepLR", {"milestones": milestones, "gamma": recipe.gamma})


def lr_factor(recipe: RecipeConfig) -> str:
    """The function `lr_factor`: the recipe's schedule, its warm-up included."""
    warmup, start = recipe.warmup_epochs, recipe.warmup_start
    lines = [
        "def lr_factor(done: int) -> float:",
        '    """Return the learning rate in units of the recipe\'s, when so many epochs are over, from 0."""',
    ]
    if recipe.optimizer == "adamw" and warmup:
        lines += [f"    if done < {warmup}:", f"        return {start!r} + (1 - {start!r}) * done / {warmup}"]
    if recipe.schedule == "cosine":
        lines += [
            f"    floor = {recipe.min_lr!r} / {recipe.lr!r}",
            f"    factor = floor + (1 - floor) * (1 + math.cos(math.pi * done / {recipe.epochs})) / 2",
        ]
    elif recipe.schedule == "step":
        lines.append(
            f"    factor = {recipe.gamma!r} ** sum(done >= milestone for milestone in {recipe.milestone_epochs()!r})"
        )
    else:
        lines.append("    factor = 1.0")
    if not warmup:
        return "\n".join([*lines, "    return factor"])
    lines += [f"    ramp = min(done / {warmup}, 1.0)", f"    return factor * ({start!r} * (1 - ramp) + ramp)"]
    return "\n".join(lines)


def without_decay() -> tuple[list[str], str]:
    """The import statements and the text of the function that names the weights which AdamW does not decay."""
    return excerpt("train", "optim", ["_without_decay"])


DECAY_GROUPS = '''def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the weights of a network as groups for AdamW: those that decay, and those that do not."""
    spared = {id(weight) for weight in _without_decay(module)}
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    return [
        {"params": [weight for weight in weights if id(weight) not in spared], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if id(weight) in spared], "weight_decay": 0.0},
    ]'''
