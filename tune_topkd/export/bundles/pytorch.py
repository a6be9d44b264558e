"""The format `pytorch`: a training script of plain torch with the recipe and the loss of a tuned config."""

import textwrap

from tune_topkd.config import RecipeConfig
from tune_topkd.export.bundles.common import FILL_IN
from tune_topkd.export.bundles.common import loss_file
from tune_topkd.export.bundles.common import of_the_student
from tune_topkd.export.bundles.common import opening
from tune_topkd.export.bundles.datasets import Call
from tune_topkd.export.bundles.datasets import KnownDataset
from tune_topkd.export.bundles.datasets import known_dataset
from tune_topkd.export.bundles.networks import RESIZING
from tune_topkd.export.bundles.networks import is_known
from tune_topkd.export.bundles.networks import network_function
from tune_topkd.export.bundles.recipes import DECAY_GROUPS
from tune_topkd.export.bundles.recipes import lr_factor
from tune_topkd.export.bundles.recipes import schedule_of
from tune_topkd.export.bundles.recipes import without_decay
from tune_topkd.export.standalone import literal
from tune_topkd.export.standalone import sorted_imports
from tune_topkd.export.tuned import TunedConfig

MODULE = "tuned_train"
_USE = [
    f"python {MODULE}.py --dry-run  # a few steps with random images and, unless they are named, tiny networks",
    f"python {MODULE}.py --data DATA --student package.module:factory --teacher package.module:factory \\",
    "    --teacher-checkpoint FILE --output OUT",
]


def as_pytorch(tuned: TunedConfig) -> dict[str, str]:
    """The files of a tuned config for plain torch, by name."""
    return {f"{MODULE}.py": _script(tuned, known_dataset(tuned.data, root="./data"))} | loss_file(tuned)


def _script(tuned: TunedConfig, data: KnownDataset) -> str:
    recipe, mixup = tuned.recipe, tuned.data.augment.mixup
    imports = [
        "import argparse",
        "import pkgutil",
        "from collections.abc import Iterable",
        "from pathlib import Path",
        "import torch",
        "import tuned",
        "from torch import Tensor",
        "from torch import nn",
        "from torch.optim import Optimizer",
        "from torch.optim.lr_scheduler import LRScheduler",
        "from torch.utils.data import DataLoader",
        "from torch.utils.data import TensorDataset",
    ]
    roles = {"student": tuned.student} | ({"teacher": tuned.teacher} if tuned.teacher else {})
    constants = [
        f"CLASSES = {data.classes or 10}{'' if data.classes else f'  # {FILL_IN}'}",
        f"IMAGE = {data.shape!r}  # channels, height, width",
        f"EPOCHS = {recipe.epochs}",
        f"BATCH_SIZE = {recipe.batch_size}",
    ]
    parts = ["\n".join(constants)]
    for role, config in roles.items():
        needed, text = network_function(config, role, data.classes, "", {})
        imports += needed
        parts.append(text)
    if any(config.image_size is not None for config in roles.values()):
        parts.append(RESIZING)
        imports.append("from typing import Any")
    parts.append(_loaders(tuned, data, imports))
    parts += [_DRY, _NETWORK]
    parts += _optimizer(recipe, imports)
    parts += _scheduler(recipe, imports)
    parts += [_BOTH[recipe.precision], _MIXED_STEP.format(alpha=mixup) if mixup else _STEP]
    if recipe.ema is not None:
        imports += [
            "import math",
            "from torch.optim.swa_utils import AveragedModel",
            "from torch.optim.swa_utils import get_ema_multi_avg_fn",
        ]
        parts.append(_AVERAGED.format(epochs=recipe.ema.decay_epochs))
    clip = "" if recipe.clip_grad is None else _CLIP.format(norm=recipe.clip_grad)
    parts.append(_EPOCH.format(clip=clip))
    average = (
        "None" if recipe.ema is None else "averaged(student_network, math.ceil(len(train_loader.dataset) / BATCH_SIZE))"
    )
    has_teacher = tuned.teacher is not None
    parts.append(
        _MAIN.format(
            teacher_options=_TEACHER_OPTIONS if has_teacher else "",
            teacher=_WITH_TEACHER if has_teacher else "    teacher_network = None\n",
            average=average,
        )
    )
    to_fill_in = [f"the network of {role}(), or --{role}" for role, config in roles.items() if not is_known(config, {})]
    to_fill_in += ["loaders()"] if data.train is None else []
    opened = opening(tuned, "a training script", _USE, to_fill_in)
    if users := _users_modules(tuned):
        text = (
            f"Code of your own has to be importable ({', '.join(users)}): unless it is installed or lies beside this file, "
            f"type PYTHONPATH=FOLDER python {MODULE}.py, with the folder that it lies in."
        )
        opened += "\n" + "\n".join(textwrap.wrap(text, 115))
    if lacking := _lacking(tuned, data):
        opened += "\n" + "\n".join(textwrap.wrap("Not here, and in the sweep: " + "; ".join(lacking) + ".", 115))
    text = "\n\n\n".join(parts)
    return f'r"""{opened}\n"""\n\n{sorted_imports(imports)}\n\n{text}\n'


def _users_modules(tuned: TunedConfig) -> list[str]:
    """The modules of the user's that the script or its loss imports."""
    names = [tuned.method, tuned.student.name, *([tuned.teacher.name] if tuned.teacher else [])]
    modules = {name.partition(":")[0] for name in names if ":" in name}
    return sorted(modules - {"torchvision", "timm"})


def _lacking(tuned: TunedConfig, data: KnownDataset) -> list[str]:
    """What of the sweep the script does not do, in words."""
    return [*(line for line in data.lacking if "mixup" not in line), *of_the_student(tuned)]


# --- data and networks ----------------------------------------------------------------------------------------------


def _loaders(tuned: TunedConfig, data: KnownDataset, imports: list[str]) -> str:
    head = [
        "def loaders(folder: str) -> tuple[DataLoader, DataLoader]:",
        f'    """Return batches of {tuned.data.name} to train on, shuffled, and to test on; its files lie in the folder."""',
    ]
    ending = [
        "    train_loader = DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, num_workers=4, pin_memory=True)",
        "    return train_loader, DataLoader(test, BATCH_SIZE, num_workers=4, pin_memory=True)",
    ]
    body = []
    for part, call, transforms in (
        ("train", data.train, data.train_transforms),
        ("test", data.test, data.test_transforms),
    ):
        listed = [f"        {_called(transform, '')}," for transform in transforms]
        body += [f"    {part}_views = [", *listed, "    ]"]
        if call is not None:
            body.append(f"    {part} = {_called(call, f'transform=transforms.Compose({part}_views)')}")
    if data.train is None:
        body = [
            f"    # {FILL_IN}: {tuned.data.name}, as two datasets of (image, class); the views of its images were those of",
            "    # torchvision.transforms:",
            *(f"    # {line}".rstrip() for line in body),
            f'    raise NotImplementedError("{FILL_IN}: {tuned.data.name}, in loaders()")',
        ]
        return "\n".join([*head, *body, *(f"    # {line.strip()}" for line in ending)])
    imports += ["from torchvision import datasets", "from torchvision import transforms"]
    return "\n".join([*head, *body, *ending])


def _called(call: Call, also: str) -> str:
    """A call of torchvision's as source; the root of a dataset is the argument `folder`."""
    place = call.place.removeprefix("torchvision.")
    given = []
    for name, value in call.kwargs.items():
        text = literal(value)
        if name == "root":
            beyond = str(value).removeprefix("./data")
            text = f'f"{{folder}}{beyond}"' if beyond else "folder"
        given.append(f"{name}={text}")
    return f"{place}({', '.join([*given, *([also] if also else [])])})"


_DRY = '''def random_loaders() -> tuple[DataLoader, DataLoader]:
    """Return two batches of random images to train on, and to test on."""
    count = 2 * BATCH_SIZE
    images, labels = torch.randn(count, *IMAGE), torch.arange(count) % CLASSES
    return tuple(DataLoader(TensorDataset(images, labels), BATCH_SIZE) for _ in range(2))'''

_NETWORK = '''def network(named: str | None, made: object, dry: bool) -> nn.Module:
    """Return what `package.module:factory` makes, or, if none is named, the network of this file, or a tiny one."""
    if named is not None:
        return pkgutil.resolve_name(named)(num_classes=CLASSES)
    if not dry:
        return made(num_classes=CLASSES)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(pooled, nn.Linear(4 * IMAGE[0], CLASSES))'''


# --- the training ---------------------------------------------------------------------------------------------------


def _optimizer(recipe: RecipeConfig, imports: list[str]) -> list[str]:
    head = [
        "def optimizer_of(student: nn.Module, loss: nn.Module) -> Optimizer:",
        '    """Return the recipe\'s optimiser of the student\'s weights, and of the loss\'s, if it has any."""',
        "    modules = nn.ModuleList([student, loss])",
    ]
    if recipe.optimizer == "adamw":
        needed, text = without_decay()
        imports += [*needed, "from typing import Any", "from torch.optim import AdamW"]
        head.append(f"    return AdamW(decay_groups(modules, {recipe.weight_decay!r}), lr={recipe.lr!r})")
        return [text, DECAY_GROUPS, "\n".join(head)]
    imports.append("from torch.optim import SGD")
    settings = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    settings |= {"nesterov": True} if recipe.nesterov else {}
    head += [
        "    weights = [weight for weight in modules.parameters() if weight.requires_grad]",
        f"    return SGD(weights, {', '.join(f'{name}={value!r}' for name, value in settings.items())})",
    ]
    return ["\n".join(head)]


def _scheduler(recipe: RecipeConfig, imports: list[str]) -> list[str]:
    head = [
        "def scheduler_of(optimizer: Optimizer) -> LRScheduler:",
        '    """Return the recipe\'s schedule, to be stepped once per epoch."""',
    ]
    schedule = schedule_of(recipe)
    if schedule is None:
        factor = lr_factor(recipe)
        imports += ["from torch.optim.lr_scheduler import LambdaLR", *(["import math"] if "math." in factor else [])]
        return [factor, "\n".join([*head, "    return LambdaLR(optimizer, lr_factor)"])]
    imports.append(f"from torch.optim.lr_scheduler import {schedule.key}")
    given = ", ".join(f"{name}={literal(value)}" for name, value in schedule.kwargs.items())
    return ["\n".join([*head, f"    return {schedule.key}(optimizer, {given})"])]


_STEP = '''def loss_of(
    loss: nn.Module, student: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor, epoch: int
) -> Tensor:
    """Return the loss of a batch in an epoch, from 1."""
    logits, teacher_logits = both(student, teacher, images)
    return sum(tuned.weighted_terms(loss, logits, teacher_logits, labels, epoch).values())'''

_MIXED_STEP = '''def loss_of(
    loss: nn.Module, student: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor, epoch: int
) -> Tensor:
    """Return the loss of a batch in an epoch, from 1: of mixed-up images, with the labels of both weighed alike."""
    share = torch.distributions.Beta({alpha!r}, {alpha!r}).sample().item()
    other = torch.randperm(len(images), device=images.device)
    logits, teacher_logits = both(student, teacher, share * images + (1 - share) * images[other])
    one, two = (
        sum(tuned.weighted_terms(loss, logits, teacher_logits, of, epoch).values()) for of in (labels, labels[other])
    )
    return share * one + (1 - share) * two'''

_BOTH = {
    "float32": '''def both(student: nn.Module, teacher: nn.Module | None, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the logits of both networks; None stands for no teacher, and for its logits."""
    logits = student(images)
    with torch.no_grad():
        return logits, None if teacher is None else teacher(images)''',
    "bfloat16": '''def both(student: nn.Module, teacher: nn.Module | None, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the logits of both networks; None stands for no teacher, and for its logits. The student runs in bfloat16."""
    with torch.autocast(images.device.type, torch.bfloat16):
        logits = student(images)
    with torch.no_grad():
        return logits, None if teacher is None else teacher(images)''',
}

_AVERAGED = '''def averaged(student: nn.Module, steps: int) -> AveragedModel:
    """Return a moving average of the weights and buffers of a network; an epoch counts as so many steps."""
    decay = math.exp(-1 / ({epochs!r} * steps))
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)'''

_EPOCH = '''def train_epoch(
    student: nn.Module,
    teacher: nn.Module | None,
    loss: nn.Module,
    optimizer: Optimizer,
    average: nn.Module | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    epoch: int,
    device: torch.device,
) -> float:
    """Train an epoch, from 1, and return the mean loss of its batches."""
    student.train()
    losses = []
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        value = loss_of(loss, student, teacher, images, labels, epoch)
        optimizer.zero_grad()
        value.backward()
{clip}        optimizer.step()
        if average is not None:
            average.update_parameters(student)
        losses.append(value.detach())
    return torch.stack(losses).mean().item()


@torch.no_grad()
def top1(student: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Return the percentage of images whose class has the largest logit."""
    student.eval()
    right, count = 0, 0
    for images, labels in batches:
        logits, _ = both(student, None, images.to(device))
        right, count = right + (logits.argmax(1) == labels.to(device)).sum().item(), count + len(labels)
    return 100 * right / count'''

_CLIP = """        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        nn.utils.clip_grad_norm_(weights, {norm!r})
"""

_WITH_TEACHER = """    teacher_network = network(arguments.teacher, teacher, arguments.dry_run).to(device)
    teacher_network.eval().requires_grad_(False)
    if arguments.teacher_checkpoint is not None:
        state = torch.load(arguments.teacher_checkpoint, map_location=device, weights_only=True)
        teacher_network.load_state_dict(state.get("model", state.get("state_dict", state)))
    elif not arguments.dry_run:
        parser.error("--teacher-checkpoint is needed, except for --dry-run: the file of the teacher's weights")
"""

_MAIN = '''def main() -> None:
    """Train the student, and write its weights after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="./data", help="the folder of the dataset's files")
    parser.add_argument("--student", help="package.module:factory, called as factory(num_classes=...)")
{teacher_options}    parser.add_argument("--output", type=Path, default=Path("out"), help="a folder for the weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="train on random images, and write nothing")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    student_network = network(arguments.student, student, arguments.dry_run).to(device)
{teacher}    train_loader, test_loader = random_loaders() if arguments.dry_run else loaders(arguments.data)
    loss = tuned.criterion().to(device)
    optimizer = optimizer_of(student_network, loss)
    scheduler = scheduler_of(optimizer)
    average = {average}
    epochs = min(2, EPOCHS) if arguments.dry_run else EPOCHS
    for epoch in range(1, epochs + 1):
        rate = optimizer.param_groups[0]["lr"]
        value = train_epoch(student_network, teacher_network, loss, optimizer, average, train_loader, epoch, device)
        scheduler.step()
        accuracies = f"top-1 {{top1(student_network, test_loader, device):.2f}} %"
        if average is not None:
            accuracies += f", of the average {{top1(average, test_loader, device):.2f}} %"
        print(f"epoch {{epoch}}/{{epochs}}: lr {{rate:.3g}}, loss {{value:.4f}}, {{accuracies}}", flush=True)
        if not arguments.dry_run:
            arguments.output.mkdir(parents=True, exist_ok=True)
            torch.save({{"model": student_network.state_dict(), "epoch": epoch}}, arguments.output / "student_last.pt")


if __name__ == "__main__":
    main()'''

_TEACHER_OPTIONS = """    parser.add_argument("--teacher", help="the same of the teacher")
    parser.add_argument("--teacher-checkpoint", help="a state dict, or one under the key `model` or `state_dict`")
"""
