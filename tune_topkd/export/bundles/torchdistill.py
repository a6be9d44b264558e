"""The format `torchdistill`: a config for torchdistill 1.1.5 and a module of what it names.

torchdistill hands a loss neither epoch nor step, so a registered process before each epoch tells it the epoch.
"""

import textwrap

from tune_topkd.config import RecipeConfig
from tune_topkd.export.bundles.common import FILL_IN
from tune_topkd.export.bundles.common import as_comments
from tune_topkd.export.bundles.common import flow
from tune_topkd.export.bundles.common import loss_file
from tune_topkd.export.bundles.common import of_the_student
from tune_topkd.export.bundles.common import opening
from tune_topkd.export.bundles.common import the_teacher
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
from tune_topkd.export.standalone import sorted_imports
from tune_topkd.export.tuned import TunedConfig
from tune_topkd.export.writers import distill_warmup

MODULE = "tuned_torchdistill"
_ZOO = {f"resnet{depth}": f"torchdistill.models.classification.resnet.resnet{depth}" for depth in (20, 32, 44, 56, 110)}
"""Networks of this project's names, with the same weights' names and shapes."""
_USE = [
    "# in this folder, with torchdistill 1.1.5 and its examples/torchvision/image_classification.py:",
    f"PYTHONPATH=. python image_classification.py --config {MODULE}.yaml --run_log train.log",
]


def as_torchdistill(tuned: TunedConfig) -> dict[str, str]:
    """The files of a tuned config for torchdistill, by name.

    Raises:
        ConfigError: the sweep had no teacher.
    """
    data = known_dataset(tuned.data, root="./data")
    return {f"{MODULE}.yaml": _yaml(tuned, data), f"{MODULE}.py": _module(tuned, data)} | loss_file(tuned)


def _module(tuned: TunedConfig, data: KnownDataset) -> str:
    teacher, student, recipe = the_teacher(tuned, "torchdistill"), tuned.student, tuned.recipe
    imports = [
        "import tuned",
        "from typing import Any",
        "from torch import Tensor",
        "from torch import nn",
        "from torchdistill.core.interfaces.pre_epoch_proc import default_pre_epoch_process_with_teacher",
        "from torchdistill.core.interfaces.registry import register_pre_epoch_proc_func",
        "from torchdistill.losses.registry import register_mid_level_loss",
        "from torchdistill.models.registry import register_model",
    ]
    parts = []
    for config, role in ((teacher, "teacher"), (student, "student")):
        needed, text = network_function(config, role, data.classes, f'@register_model(key="tuned_{role}")', _ZOO)
        imports += needed
        parts.append(text)
    if teacher.image_size is not None or student.image_size is not None:
        parts.append(RESIZING)
    parts.append(_LOSS)
    if recipe.optimizer == "adamw":
        needed, text = without_decay()
        imports += [
            *needed,
            "from torch.optim import AdamW",
            "from torchdistill.optim.registry import register_optimizer",
        ]
        parts += [text, DECAY_GROUPS, _ADAMW]
    if recipe.warmup_epochs:
        imports += [
            "import math",
            "from torch.optim import Optimizer",
            "from torch.optim.lr_scheduler import LambdaLR",
            "from torchdistill.optim.registry import register_scheduler",
        ]
        parts += [lr_factor(recipe), _SCHEDULE]
    to_fill_in = [
        f"the network of {role}()"
        for config, role in ((teacher, "teacher"), (student, "student"))
        if not is_known(config, _ZOO)
    ]
    text = "\n\n\n".join(parts)
    used = [line for line in imports if line != "import math" or "math." in text]
    opened = opening(tuned, "what its config for torchdistill names", _USE, to_fill_in)
    return f'"""{opened}\n"""\n\n{sorted_imports(used)}\n\n\n{text}\n'


_LOSS = '''@register_mid_level_loss(key="tuned_loss")
class TunedLoss(nn.Module):
    """The tuned loss of both networks' logits, cross-entropy included; what is given are changes of its values.

    torchdistill tells a loss no epoch: `tuned_pre_epoch` sets `epoch`, from 1, by which the distillation terms rise.
    """

    def __init__(self, **changes: Any) -> None:
        """Construct the loss."""
        super().__init__()
        self.loss = tuned.criterion(**changes)
        self.epoch = 1

    def forward(self, student_io_dict: dict, teacher_io_dict: dict, targets: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the weighted sum of the terms, a scalar."""
        student_logits, teacher_logits = student_io_dict["."]["output"], teacher_io_dict["."]["output"]
        return sum(tuned.weighted_terms(self.loss, student_logits, teacher_logits, targets, self.epoch).values())


@register_pre_epoch_proc_func
def tuned_pre_epoch(self: Any, epoch: int | None = None, **kwargs: Any) -> None:
    """Do what torchdistill does before an epoch, counted from 0, and tell the loss which it is.

    The teacher is set to evaluation too: torchdistill leaves its batch norms in training.
    """
    if epoch is None:
        raise ValueError("training_box.pre_epoch_process needs epoch=..., by which the distillation terms rise")
    default_pre_epoch_process_with_teacher(self, epoch=epoch, **kwargs)
    self.teacher_model.eval()
    for criterion, _ in self.criterion.term_dict.values():
        if isinstance(criterion, TunedLoss):
            criterion.epoch = epoch + 1'''

_ADAMW = '''@register_optimizer(key="tuned_adamw")
def tuned_adamw(module: nn.Module, lr: float, weight_decay: float) -> AdamW:
    """Return AdamW as the sweep had it; it needs the network itself, so its config has `filters_params: False`."""
    return AdamW(decay_groups(module, weight_decay), lr=lr)'''

_SCHEDULE = '''@register_scheduler(key="tuned_schedule")
def tuned_schedule(optimizer: Optimizer) -> LambdaLR:
    """Return the recipe's schedule with its warm-up, stepped once per epoch."""
    return LambdaLR(optimizer, lr_factor)'''


# --- the config -----------------------------------------------------------------------------------------------------


def _yaml(tuned: TunedConfig, data: KnownDataset) -> str:
    recipe = tuned.recipe
    lacking = [*data.lacking, *_lacking(recipe), *of_the_student(tuned)]
    to_fill_in = [f"{data_} of {tuned.data.name}" for data_ in ("the datasets",) if data.train is None]
    to_fill_in += ["the teacher's checkpoint", f"what {MODULE}.py marks"]
    said = as_comments(opening(tuned, "config for torchdistill 1.1.5", _USE, to_fill_in))
    differs = as_comments("\n".join(textwrap.wrap("Not here, and in the sweep: " + "; ".join(lacking) + ".", 115)))
    classes = data.classes or 10
    warmup = distill_warmup(tuned)
    rising = f"its distillation terms rise for {warmup}" if warmup else "here without effect, for no term rises"
    return f"""{said}
{differs if lacking else "#"}

dependencies:
  - name: {MODULE}

datasets:
{_datasets(tuned, data, classes)}

models:
  teacher_model:
    key: tuned_teacher
    kwargs: {{num_classes: {classes}}}
    src_ckpt: null  # {FILL_IN}: the file of the teacher's weights, a state dict or one under the key `model`
  student_model:
    key: tuned_student
    kwargs: {{num_classes: {classes}}}
    src_ckpt: null
    dst_ckpt: ./ckpt/student.pt  # of the epoch with the best accuracy on val_data_loader

train:
  log_freq: 100
  num_epochs: {recipe.epochs}
  pre_epoch_process: tuned_pre_epoch  # tells the loss the epoch: {rising}
  train_data_loader:
    dataset_id: *train
    sampler: {{class_or_func: !import_get {{key: torch.utils.data.RandomSampler}}, kwargs: null}}
    kwargs: {{batch_size: {recipe.batch_size}, num_workers: 2, drop_last: True}}
  val_data_loader: &val
    dataset_id: *test
    sampler: {{class_or_func: !import_get {{key: torch.utils.data.SequentialSampler}}, kwargs: null}}
    kwargs: {{batch_size: {recipe.batch_size}, num_workers: 2}}
  teacher:
    forward_proc: forward_batch_only
    sequential: []
    wrapper: null
    requires_grad: False
    frozen_modules: []
  student:
    forward_proc: forward_batch_only
    adaptations: null
    sequential: []
    wrapper: null
    requires_grad: True
    frozen_modules: []
  optimizer:
{_optimizer(recipe)}
{_schedule(recipe)}
  criterion:
    key: WeightedSumLoss
    kwargs:
      sub_terms:
        tuned:  # all terms with their weights, cross-entropy included
          criterion: {{key: tuned_loss, kwargs: {{}}}}  # kwargs change single values
          weight: 1.0

test:
  test_data_loader: *val
"""


def _lacking(recipe: RecipeConfig) -> list[str]:
    """What of a recipe torchdistill's example does not do, in words."""
    found = []
    if recipe.precision == "bfloat16":
        found.append("the networks' layers ran in bfloat16 (autocast)")
    if recipe.ema is not None:
        found.append("a moving average of the weights was measured besides, which changes no training")
    return found


def _datasets(tuned: TunedConfig, data: KnownDataset, classes: int) -> str:
    parts = []
    for name, call, transforms in (
        ("train", data.train, data.train_transforms),
        ("test", data.test, data.test_transforms),
    ):
        head = f"  &{name} {tuned.data.name}/{name}: !import_call"
        note = ""
        if call is None:
            note = f"  # {FILL_IN}: {tuned.data.name}, its {name} part; this stands for it with random images\n"
            call = Call("torchvision.datasets.FakeData", {"image_size": list(data.shape), "num_classes": classes})
            if name == "test":
                call.kwargs["random_offset"] = 1
        lines = [f"    key: {call.place}", "    init:", "      kwargs:"]
        lines += [f"        {key}: {flow(value)}" for key, value in call.kwargs.items()]
        lines += [
            "        transform: !import_call",
            "          key: torchvision.transforms.Compose",
            "          init:",
            "            kwargs:",
            "              transforms:",
        ]
        for transform in transforms:
            init = flow({"kwargs": transform.kwargs}) if transform.kwargs else "null"
            lines.append(f"                - !import_call {{key: {transform.place}, init: {init}}}")
        parts.append(note + "\n".join([head, *lines]))
    return "\n".join(parts)


def _optimizer(recipe: RecipeConfig) -> str:
    lines = []
    if recipe.optimizer == "adamw":
        lines += ["    key: tuned_adamw  # spares biases, norms, tokens and embeddings of positions from decay"]
        lines += ["    filters_params: False"]
        values: dict[str, object] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    else:
        lines += ["    key: SGD"]
        values = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
        values |= {"nesterov": True} if recipe.nesterov else {}
    lines.append(f"    kwargs: {flow(values)}")
    if recipe.clip_grad is not None:
        lines.append(f"    max_grad_norm: {flow(recipe.clip_grad)}")
    return "\n".join(lines)


def _schedule(recipe: RecipeConfig) -> str:
    schedule = schedule_of(recipe)
    if schedule is None:
        return "  scheduler: {key: tuned_schedule, kwargs: {}}"
    return f"  scheduler: {{key: {schedule.key}, kwargs: {flow(schedule.kwargs)}}}"
