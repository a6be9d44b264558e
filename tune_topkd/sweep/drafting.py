"""A search space for somebody's dataset, teacher and student, written out with comments, to begin from."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import yaml

from tune_topkd.config import DEFAULTS
from tune_topkd.config import ConfigError
from tune_topkd.config import DataConfig
from tune_topkd.config import Problem
from tune_topkd.config import unknown_choice
from tune_topkd.config import validated
from tune_topkd.sweep import preflight

if TYPE_CHECKING:
    from tune_topkd.data import DatasetInfo

GOOD_VALIDATION = 1000
"""Images of a validation split that a draft goes for: a point of top-1 is then ten of them."""
_LARGEST_SHARE = 0.3
_SMALLEST_SHARE = 0.1
_WIDEST_K = 20
_K_OF_FEW = 3
"""K goes to half of the classes, but so far where they are few: a range needs more than one value."""
_SMALL = 64
"""Pixels of a side up to which images are trained on as CIFAR's are."""
_BATCH_SIZE = 64
_COLLAPSE_EPOCHS = 5
_COLLAPSE_STEPS = 200
"""Steps at chance before which a training is not called collapsed: a small set has few of them in an epoch."""
_FEW_STEPS = 500
"""Steps of a full training below which a draft says that they are few."""
_IMAGE_FOLDER = "image_folder"


@dataclass(frozen=True)
class Draft:
    """A search space as text, and what should be known of it."""

    text: str
    lines: tuple[str, ...]
    """What was found: of the data, of the validation split, of the networks."""
    notes: tuple[str, ...]
    """What should be looked at."""


def draft(
    data: str,
    teacher: str,
    student: str,
    *,
    checkpoint: str | None = None,
    root: str | None = None,
    epochs: int | None = None,
    image_size: int | None = None,
) -> Draft:
    """Write a search space for a pair of networks on a dataset, and check it as `run` would.

    Args:
        data: the name of a dataset, `package.module:source`, or a folder of images, one folder for each class.
        teacher: a network by name, or `package.module:factory`.
        student: the same.
        checkpoint: the teacher's weights; without one the sweep trains the teacher first.
        root: the folder that a named dataset's files lie in.
        epochs: of a full training; by default 240 for images of up to 64 pixels, else 100.
        image_size: side that images are resized to.

    Raises:
        ConfigError: with every problem of the space: no such dataset, network, file, or a pair that does not fit.
    """
    from tune_topkd.data import dataset_info
    from tune_topkd.data import load_dataset

    given = _data(data, root, image_size)
    tried = validated(DataConfig, given, "--data")
    info, dataset = dataset_info(tried), load_dataset(tried)
    divided = len(dataset.val) / tried.val_fraction  # the images that a share of them is held back of
    share = min(max(math.ceil(100 * GOOD_VALIDATION / divided) / 100, _SMALLEST_SHARE), _LARGEST_SHARE)
    _, high, wide = info.image_shape
    full = epochs or (240 if max(high, wide) <= _SMALL else 100)
    training = len(dataset.train) + len(dataset.val) - share * divided
    steps = max(1, round(training) // _BATCH_SIZE)  # of an epoch, which leaves out the images short of a batch
    content = _content(given | {"val_fraction": share}, info, full, steps, teacher, student, checkpoint)
    checked = preflight.load_checked(content)
    held = len(load_dataset(checked.config.data).val)
    error = 100 * math.sqrt(0.25 / held)
    lines = (
        f"{info.num_classes} classes, {len(dataset.train) + len(dataset.val):,} training images of {high} × {wide} pixels, "
        f"{len(dataset.test):,} images in the test set",
        f"{held:,} of the training images choose the trials: a point of top-1 is {held / 100:.1f} of them, and the standard "
        f"error of one accuracy is up to {error:.1f} points",
    )
    luck = (
        f"differences below about {2 * error:.0f} points, twice that error, can be the luck of {held} images: `confirm` "
        "says what is sure"
    )
    few = (
        f"a full training has {full * steps:,} steps of {_BATCH_SIZE} images, in which a network learns little: "
        "most need some thousands, by a larger --epochs or a smaller recipe.batch_size"
    )
    constants = (
        "a checkpoint needs images normalised as in its own training: write its data.mean and data.std into the file; "
        "without them it sees them normalised by this training split"
    )
    notes = [luck] * (held < GOOD_VALIDATION) + [few] * (full * steps < _FEW_STEPS)
    notes += [constants] * (checkpoint is not None)
    return Draft(_written(content), lines, (*notes, *checked.warnings))


def _data(data: str, root: str | None, image_size: int | None) -> dict[str, Any]:
    from tune_topkd.data import dataset_names

    found: dict[str, Any] = {"name": data}
    path, is_named = Path(data).expanduser(), data in dataset_names() or ":" in data
    if not is_named and path.is_dir():
        if root is not None:
            raise ConfigError("--root", [Problem(key=root, rule=f"not beside a folder of images, which is {data}")])
        found = {"name": _IMAGE_FOLDER, "root": str(path.absolute())}
    elif not is_named and not path.exists():
        rule = f"is no folder, and no dataset: {unknown_choice(data, dataset_names())}; or package.module:source"
        raise ConfigError("--data", [Problem(key=data, rule=rule)])
    elif root is not None:
        found["root"] = str(Path(root).expanduser().absolute())
    return found | ({} if image_size is None else {"image_size": image_size})


def _content(
    data: dict[str, Any],
    info: "DatasetInfo",
    epochs: int,
    steps: int,
    teacher: str,
    student: str,
    checkpoint: str | None,
) -> dict[str, Any]:
    """The space as plain data; `steps` are those of an epoch."""
    is_small = max(info.image_shape[1:]) <= _SMALL
    pad = max(1, info.image_shape[1] // 8)
    augment = {"pad": pad, "flip": True} if is_small else {"crop_scale": [0.08, 1.0], "flip": True}
    recipe = {"epochs": epochs, "batch_size": _BATCH_SIZE, "lr": 0.05, "weight_decay": 5e-4, "schedule": "cosine"}
    collapse = max(_COLLAPSE_EPOCHS, math.ceil(_COLLAPSE_STEPS / steps))
    widest = min(_WIDEST_K, max((info.num_classes - 1) // 2, min(_K_OF_FEW, info.num_classes - 1)))
    untuned = [DEFAULTS] if preflight.default_k() <= info.num_classes else []
    given = {"recipe": recipe} if checkpoint is None else {"checkpoint": str(Path(checkpoint).expanduser().absolute())}
    return {
        "description": f"{Path(data.get('root') or data['name']).name}, {teacher} → {student}",
        "data": {**data, "augment": augment},
        "teacher": {"name": teacher, **given},
        "student": {"name": student},
        "method": "topkd",
        **({"loss": {"k": 1}} if widest == 1 else {}),
        "recipe": {**recipe, "clip_grad": 1.0, "ema": {"decay_epochs": 0.4}},
        "space": {
            **({"k": {"low": 1, "high": widest, "log": True}} if widest > 1 else {}),
            "temperature": {"low": 0.05, "high": 1.0, "log": True},
            "ce_weight": {"low": 0.1, "high": 2.0, "log": True},
            "tdl_weight": {"low": 0.1, "high": 5.0, "log": True},
            "contrastive_weight": {"low": 0.3, "high": 10.0, "log": True},
            "lr": {"low": 0.0125, "high": 0.2, "log": True},
            "clip_grad": {"low": 0.5, "high": 3.0, "log": True},
        },
        "relative": {"sum": 3.0, "of": ["ce_weight", "tdl_weight", "contrastive_weight"], "units": "effect"},
        "sweep": {
            "trials": 40,
            "startup_trials": 14,
            "asha": {"grace_epochs": max(1, epochs // 9), "reduction_factor": 3},
            **({"collapse_epochs": collapse} if collapse < epochs else {}),
            "finalists": {"count": 3, "seeds": 3},
        },
        "baselines": {"methods": ["ce", "kd", *untuned], "trials": 6},
    }


_COMMENTS = {
    "data": "What is learnt. Part of the training images chooses the trials; the test set is read once, by `confirm`.\n"
    "# Take `flip` out where an image and its mirror image are not of one class, as with letters.",
    "teacher": "A teacher with a recipe is trained once, on the same training images, and kept. A checkpoint needs images\n"
    "# normalised as in its own training: `data.mean` and `data.std`; without them, by the training split's.",
    "student": "The network that learns: a name, torchvision:NAME, timm:NAME, or package.module:factory of yours.",
    "loss": "Of two classes one K is left.",
    "recipe": "How a full trial trains; the values that are searched below replace these.",
    "space": "What is searched. K is how many of the teacher's largest logits are amplified: here up to 20, and\n"
    "# below half of the classes (up to 3 of few), since with more none may be left outside the Top-K groups.\n"
    "# TopKD needs a short gradient at high learning rates, plain KD does not: clip_grad is its longest norm.",
    "relative": "Only the ratios of the three weights are searched, by what each term does to the student.",
    "sweep": "How many configs: the first startup_trials at random, the others by what those have shown. When losers are\n"
    "# stopped: at rungs, after grace_epochs, three times that and so on. The finalists train again, on fresh seeds.",
    "baselines": "What the answer is compared with, each over the same lr and clip_grad; `match: true` tunes KD too.",
}
"""Above each section, what it is."""
_OF_COLLAPSE = "\n# A training that stays at chance for collapse_epochs is ended."


def _written(content: dict[str, Any]) -> str:
    lines = [
        f"# {content['description']}",
        "#",
        "# Every key with its value, defaults too: `tune-topkd check FILE --show`.",
    ]
    for key, section in content.items():
        more = _OF_COLLAPSE if "collapse_epochs" in section else ""
        lines += ["", f"# {_COMMENTS[key]}{more}"] if key in _COMMENTS else ([""] if key == "description" else [])
        lines += _section(key, section)
    return "\n".join(lines) + "\n"


def _section(key: str, section: Any) -> list[str]:
    """A section in YAML: a line for each of its keys, their own values in braces."""
    if not isinstance(section, dict):
        return [f"{key}: {_flow(section)}"]
    one = _flow(section)
    if key in ("relative", "baselines", "student") and len(one) < 110:
        return [f"{key}: {one}"]
    return [f"{key}:", *(f"  {name}: {_flow(value)}" for name, value in section.items())]


def _flow(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
        .split("\n...")[0]
        .strip()
    )
