"""The format `timm`: arguments for timm's train.py, and a task for it whose loss is the tuned one.

train.py's own distillation knows one loss, so a file of arguments alone cannot carry another: the module is the task, and,
run as a script, train.py with this task.
"""

import textwrap
from typing import Any

from tune_topkd.config import RecipeConfig
from tune_topkd.export.bundles.common import FILL_IN
from tune_topkd.export.bundles.common import as_comments
from tune_topkd.export.bundles.common import flow
from tune_topkd.export.bundles.common import loss_file
from tune_topkd.export.bundles.common import of_the_student
from tune_topkd.export.bundles.common import opening
from tune_topkd.export.bundles.common import the_teacher
from tune_topkd.export.bundles.datasets import KnownDataset
from tune_topkd.export.bundles.datasets import known_dataset
from tune_topkd.export.bundles.networks import RESIZING
from tune_topkd.export.bundles.networks import is_known
from tune_topkd.export.bundles.networks import network_function
from tune_topkd.export.standalone import literal
from tune_topkd.export.standalone import sorted_imports
from tune_topkd.export.tuned import TunedConfig

MODULE = "tuned_timm"
_USE = [
    "# in this folder, with timm 1.0.31 and the train.py of its repository:",
    f"python {MODULE}.py PATH/TO/train.py -c {MODULE}.yaml --data-dir DATA",
]


def as_timm(tuned: TunedConfig) -> dict[str, str]:
    """The files of a tuned config for timm, by name.

    Raises:
        ConfigError: the sweep had no teacher.
    """
    data = known_dataset(tuned.data, root="./data")
    return {f"{MODULE}.yaml": _yaml(tuned, data), f"{MODULE}.py": _module(tuned, data)} | loss_file(tuned)


def _of_timm(tuned: TunedConfig) -> str:
    """The student's name in timm; empty if it is not timm's as it is."""
    library, _, name = tuned.student.name.partition(":")
    return name if library == "timm" and tuned.student.image_size is None else ""


# --- the task -------------------------------------------------------------------------------------------------------


def _module(tuned: TunedConfig, data: KnownDataset) -> str:
    teacher, student = the_teacher(tuned, "timm"), tuned.student
    imports = [
        "import importlib.util",
        "import sys",
        "from typing import Any",
        "import torch",
        "import tuned",
        "from timm.task import LogitDistillationTask",
        "from torch import Tensor",
        "from torch import nn",
    ]
    roles = {"teacher": teacher} if _of_timm(tuned) else {"teacher": teacher, "student": student}
    parts = [_CHECKPOINT]
    for role, config in roles.items():
        needed, text = network_function(config, role, data.classes, "", {})
        imports += needed
        parts.append(text)
    if any(config.image_size is not None for config in roles.values()):
        parts.append(RESIZING)
    if "student" in roles:
        imports.append("from timm.models import register_model")
        described: dict[str, Any] = {"input_size": list(data.shape), "interpolation": "bilinear", "crop_pct": 1.0}
        described |= {"mean": data.mean or [0.5] * data.shape[0], "std": data.std or [0.5] * data.shape[0]}
        parts.append(_STUDENT.format(channels=data.shape[0], described=literal(described, len("DESCRIBED = "))))
    parts.append(_TASK)
    to_fill_in = [f"the network of {role}()" for role, config in roles.items() if not is_known(config, {})]
    opened = opening(tuned, "a task for timm, and train.py with it", _USE, [*to_fill_in, "TEACHER_CHECKPOINT"])
    text = "\n\n\n".join(parts)
    return f'"""{opened}\n"""\n\n{sorted_imports(imports)}\n\n{text}\n'


_CHECKPOINT = f"TEACHER_CHECKPOINT = None  # {FILL_IN}: the file of the teacher's weights"

_STUDENT = '''DESCRIBED = {described}


@register_model
def tuned_student(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return the student with what timm asks its models for."""
    network = student(kwargs["num_classes"])
    network.num_classes, network.in_chans = kwargs["num_classes"], {channels}
    network.pretrained_cfg = network.default_cfg = {{**DESCRIBED, "num_classes": kwargs["num_classes"]}}
    return network'''

_TASK = '''class TunedTask(LogitDistillationTask):
    """The tuned loss as a task of timm's: train.py's `LogitDistillationTask` with another loss.

    Both networks see the same images, as in the sweep. Targets are classes: with mixup, or smoothed by the loader, the loss
    refuses them. `epoch`, from 1, is set before each epoch: by it the distillation terms rise.

    Args:
        student_model: a model of timm's.
        teacher_model: a network; of a text the task makes that of `teacher`, with the weights of `TEACHER_CHECKPOINT`.
        criterion: as the others, not used.
        kwargs: as `LogitDistillationTask` takes them; the device counts.
    """

    def __init__(
        self, student_model: nn.Module, teacher_model: Any = "tuned_teacher", criterion: Any = None, **kwargs: Any
    ) -> None:
        """Construct teacher and loss."""
        if isinstance(teacher_model, str):
            teacher_model = teacher(student_model.num_classes)
            if TEACHER_CHECKPOINT is not None:
                state = torch.load(TEACHER_CHECKPOINT, map_location="cpu", weights_only=True)
                teacher_model.load_state_dict(state.get("model", state.get("state_dict", state)))
            teacher_model.requires_grad_(False).to(kwargs.get("device"))
        super().__init__(student_model, teacher_model, nn.CrossEntropyLoss(), **{**kwargs, "verbose": False})
        self.loss = tuned.criterion()
        self.epoch = None

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the loss, the student's logits, and the loss's two parts: cross-entropy, and all else."""
        if self.epoch is None and tuned.DISTILL_WARMUP:
            raise ValueError("set `task.epoch`, from 1, before each epoch: by it the distillation terms rise")
        student_logits = self.trainable_module(input)
        with torch.no_grad():
            teacher_logits = self.teacher(input)
        terms = tuned.weighted_terms(self.loss, student_logits, teacher_logits, target, self.epoch or 1)
        total = sum(terms.values())
        task_loss = terms.pop("ce", torch.zeros_like(total))
        kd_loss = sum(terms.values(), torch.zeros_like(total))
        return {"loss": total, "output": student_logits, "task_loss": task_loss, "kd_loss": kd_loss}


def main() -> None:
    """Run a train.py with the task, and tell it each epoch."""
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
        sys.exit(f"{__doc__}\\nThe first argument must be the path of timm's train.py.")
    path = sys.argv.pop(1)
    spec = importlib.util.spec_from_file_location("train", path)
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    if not hasattr(train, "LogitDistillationTask"):
        sys.exit(f"{path}: has no distillation tasks; take the train.py of timm 1.0.31")
    train_one_epoch = train.train_one_epoch

    def told(epoch: int, *args: Any, task: TunedTask, **kwargs: Any) -> Any:
        task.epoch = epoch + 1
        return train_one_epoch(epoch, *args, task=task, **kwargs)

    train.LogitDistillationTask, train.train_one_epoch = TunedTask, told
    train.main()


if __name__ == "__main__":
    main()'''


# --- the arguments --------------------------------------------------------------------------------------------------


def _yaml(tuned: TunedConfig, data: KnownDataset) -> str:
    recipe, name = tuned.recipe, _of_timm(tuned)
    known = {"cifar10": "torch/cifar10", "cifar100": "torch/cifar100", "imagenet": ""}
    dataset = known.get(tuned.data.name)
    to_fill_in = [f"the dataset, {tuned.data.name}"] if dataset is None else []
    to_fill_in += [] if data.mean is not None else ["mean and std"]
    said = opening(tuned, "arguments for timm's train.py", _USE, [*to_fill_in, f"what {MODULE}.py marks"])
    said += "\n" + "\n".join(
        textwrap.wrap("Not here, and in the sweep: " + "; ".join(_lacking(tuned, data)) + ".", 115)
    )
    mark = f"  # {FILL_IN}"
    lines = [
        as_comments(said),
        "",
        f"model: {flow(name or 'tuned_student')}",
        *([f"model_kwargs: {flow(tuned.student.kwargs)}"] if name and tuned.student.kwargs else []),
        f"num_classes: {data.classes or 10}{'' if data.classes else mark}",
        f"kd_model_name: tuned_teacher  # that of {MODULE}.py, which computes the loss too",
        "kd_distill_type: logit",
        "",
        f"dataset: {flow(dataset or '')}{'' if dataset is not None else mark}",
        f"input_size: {flow(list(data.shape))}",
        f"in_chans: {data.shape[0]}",
        f"mean: {flow(data.mean)}{'' if data.mean is not None else mark}",
        f"std: {flow(data.std)}{'' if data.std is not None else mark}",
        "",
        *(f"{key}: {flow(value)}" for key, value in _recipe(recipe).items()),
        "",
        *(f"{key}: {flow(value)}" for key, value in _augmentation(tuned).items()),
    ]
    return "\n".join(lines) + "\n"


def _recipe(recipe: RecipeConfig) -> dict[str, Any]:
    is_sgd = recipe.optimizer == "sgd"
    values: dict[str, Any] = {
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "opt": ("sgd" if recipe.nesterov else "momentum") if is_sgd else "adamw",  # timm's sgd has Nesterov's momentum
        "momentum": recipe.momentum,
        "weight_decay": recipe.weight_decay,
    }
    if is_sgd:
        values["opt_kwargs"] = {"filter_bias_and_bn": False}  # all weights decay
    values |= {"lr": recipe.lr, "sched": {"step": "multistep"}.get(recipe.schedule, recipe.schedule)}
    if recipe.schedule == "step":
        milestones = [
            epoch + 1 for epoch in recipe.milestone_epochs()
        ]  # timm takes a step an epoch before its milestone
        values |= {"decay_milestones": milestones, "decay_rate": recipe.gamma}
    values |= {"min_lr": recipe.min_lr if recipe.schedule == "cosine" else 0.0, "cooldown_epochs": 0}
    values |= {"warmup_epochs": recipe.warmup_epochs, "warmup_lr": recipe.warmup_start * recipe.lr}
    if recipe.clip_grad is not None:
        values |= {"clip_grad": recipe.clip_grad, "clip_mode": "norm"}
    if recipe.precision == "bfloat16":
        values |= {"amp": True, "amp_dtype": "bfloat16"}
    return values


def _augmentation(tuned: TunedConfig) -> dict[str, Any]:
    augment = tuned.data.augment
    return {
        "scale": augment.crop_scale or [1.0, 1.0],
        "ratio": [3 / 4, 4 / 3] if augment.crop_scale else [1.0, 1.0],
        "hflip": 0.5 if augment.flip else 0.0,
        "color_jitter": None,
        "aa": _rand_augment(tuned),
        "reprob": augment.erase,
        "remode": "const",
        "smoothing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "crop_pct": 0.875 if tuned.data.name == "imagenet" else 1.0,
        "interpolation": "bilinear",
        "train_interpolation": "bilinear",
    }


def _rand_augment(tuned: TunedConfig) -> str | None:
    chosen = tuned.data.augment.rand_augment
    return None if chosen is None else f"rand-m{round(chosen.magnitude / 3)}-n{chosen.ops}-mstd0"


def _lacking(tuned: TunedConfig, data: KnownDataset) -> list[str]:
    """What of the sweep train.py does not do, in words."""
    recipe, augment = tuned.recipe, tuned.data.augment
    found = ["a part of the training images was kept apart to choose by"]
    if data.mean is None:
        found.append("the images were normalised by their own mean and deviation")
    if augment.pad:
        found.append(f"crops of the image padded by {augment.pad}")
    if augment.rotate:
        found.append(f"rotations by up to {augment.rotate:g} degrees")
    if augment.rand_augment is not None:
        found.append(
            f"torchvision's RandAugment of magnitude {augment.rand_augment.magnitude} of 30, where timm's goes to 10: the "
            "nearest is taken"
        )
    if augment.mixup:
        found.append(f"mixup with α = {augment.mixup:g}, the loss that of both labels")
    if recipe.warmup_epochs and recipe.optimizer == "sgd":
        found.append("the warm-up of the learning rate was a factor of the schedule, and here comes before it")
    if recipe.optimizer == "sgd" and _of_timm(tuned):
        found.append("all weights decayed, also those that the model's no_weight_decay() names, if it has one")
    if recipe.optimizer == "adamw":
        found.append(
            "AdamW spared tokens and embeddings of positions from decay by their names, timm by the model's word"
        )
    if recipe.ema is not None:
        steps = f"exp(-1 / ({recipe.ema.decay_epochs:g} × the steps of an epoch))"
        found.append(
            f"a moving average of the weights was measured besides, which changes no training: model_ema_decay {steps}"
        )
    return found + of_the_student(tuned)
