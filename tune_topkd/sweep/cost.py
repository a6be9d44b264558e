"""What a sweep would run and roughly what it would cost, without starting it."""

import math
import time
from collections.abc import Callable
from collections.abc import Iterator

from tune_topkd.config import SweepConfig
from tune_topkd.ledger import Finalists
from tune_topkd.space import Space
from tune_topkd.sweep.preflight import usable_parameters
from tune_topkd.sweep.remaining import baseline_total
from tune_topkd.sweep.remaining import expected_epochs
from tune_topkd.sweep.remaining import finalist_total
from tune_topkd.sweep.wording import duration

_TIMED_STEPS = 10
_TIMED_SECONDS = 5.0
_TIMED_VALUES = 2**19
"""Values of the images in a timed step: of a large batch a part is timed."""


_SHARE_OF_FORWARD = 1 / 3
"""Of a step's time, what the evaluation of as many images takes: no backward pass."""
_SECONDS_AROUND_AN_EPOCH = 0.035
"""What report, ledger and checkpoint take of an epoch: measured by benchmarks/sweep_overhead on 2 cores."""
_SECONDS_OF_THE_START = 20.0
"""Of Ray and the first workers."""
_TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "tiny_imagenet": 100_000, "imagenet": 1_281_167}
"""Of the datasets whose size is known without their files; a part of them is held back for validation."""


def _earlier_ends(config: SweepConfig) -> Iterator[str]:
    """What may end the sweep, or its search, before that."""
    for what, hours in (("GPU", config.sweep.gpu_hours), ("CPU", config.sweep.cpu_hours)):
        if hours is not None:
            yield f"the sweep stops after {hours:g} {what} hours of training"
    if (plateau := config.sweep.plateau) is not None:
        yield f"the search ends when its newest {plateau.newest} trials bring less than {plateau.points:g} points of top-1"


def describe(config: SweepConfig) -> Iterator[str]:
    """Lines that say what would run: the pair, the space, the trials, the epochs, the time of an epoch here."""
    from tune_topkd.data import dataset_info
    from tune_topkd.data import load_dataset
    from tune_topkd.data import missing_data
    from tune_topkd.models import build_configured
    from tune_topkd.models import count_parameters
    from tune_topkd.teacher import bank_size

    info = dataset_info(config.data)
    networks = [config.teacher.model, config.student] if config.teacher else [config.student]
    sizes = [
        f"{model.name} ({count_parameters(build_configured(model, num_classes=info.num_classes)):,} parameters)"
        for model in networks
    ]
    yield f"{config.method} on {config.data.name} ({info.num_classes} classes)"
    yield f"teacher {sizes[0]} → {sizes[1]}" if config.teacher else f"no teacher; {sizes[0]}"
    for axis in Space.of(config).axes():
        given = config.space[axis.name]
        bounds = f"one of {list(axis.choices)}" if axis.choices else f"{_bound(given.low)} … {_bound(given.high)}"
        yield f"  {axis.name}: {bounds}{' (log)' if given.log else ''}"
    trials, baselines, epochs = config.sweep.trials, baseline_total(config), config.recipe.epochs
    yield f"{trials} trials and {baselines} baseline runs of up to {epochs} epochs"
    repeats = finalist_total(config, Finalists.configured(config.sweep.finalists), trials)
    if (finalists := config.sweep.finalists) is not None:
        bases = " and the best of each baseline" if baselines else ""
        best = f"the best {min(finalists.count, trials)} trials{bases}, on {finalists.seeds} fresh seeds each"
        yield f"then {repeats} runs of the finalists: {best}"
    most = (trials + baselines + repeats) * epochs
    asha = config.sweep.asha
    likely = most if asha is None else round(trials * _expected_epochs(config)) + (baselines + repeats) * epochs
    yield f"at most {most} epochs" + (f", about {likely} with ASHA stopping the losers" if likely < most else "")
    yield from _earlier_ends(config)
    step, asking = _seconds_per_step(config)
    if not missing_data(config.data):
        dataset = load_dataset(config.data)
        bank = bank_size(config.data, config.recipe, dataset) if _has_bank(config) else None
        if bank is not None:
            rows = f"{bank.images:,} images × {bank.views} views"
            yield f"teacher logits: {rows}, {_size(bank.bytes)} on the disk, asked for once by all trials"
        elif config.teacher:
            yield "teacher logits: asked for every batch of every trial"
        images = len(dataset.train), len(dataset.val)
    elif config.data.name in _TRAINING_IMAGES:
        held_back = round(_TRAINING_IMAGES[config.data.name] * config.data.val_fraction)
        images = _TRAINING_IMAGES[config.data.name] - held_back, held_back
    else:
        yield f"about {step:.2g} s per step of {config.recipe.batch_size} images on this machine"
        return
    yield _time(config, likely, step, asking, images)


def _time(config: SweepConfig, epochs: int, step: float, asking: float, images: tuple[int, int]) -> str:
    """About how long the epochs of a sweep take, by the seconds per batch of student and teacher."""
    from tune_topkd.data import view_count

    steps, evaluated = (max(count / config.recipe.batch_size, 1) for count in images)
    views = view_count(config.data.augment)
    finalists = config.sweep.finalists
    seeds = 1 if finalists is None else 1 + finalists.seeds  # all trainings of one seed are shown the same views
    asked = min(config.recipe.epochs * seeds, views or math.inf) if _has_bank(config) else epochs
    epoch = steps * step + evaluated * step * _SHARE_OF_FORWARD + _SECONDS_AROUND_AN_EPOCH
    seconds = _SECONDS_OF_THE_START + epochs * epoch + asked * steps * asking
    return (
        f"about {epoch:.2g} s per epoch on this machine, with its evaluation and checkpoint; about {duration(seconds)} "
        "one trial at a time, the start of Ray and its workers counted, a teacher's training not"
    )


def _has_bank(config: SweepConfig) -> bool:
    return config.teacher is not None and config.teacher.bank and not config.data.augment.mixup


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _expected_epochs(config: SweepConfig) -> float:
    """Epochs of a mean trial if each rung lets its share of them on."""
    assert config.sweep.asha is not None, "only where ASHA stops trials"
    return expected_epochs(config.sweep.asha, config.recipe.epochs)


def _seconds_per_step(config: SweepConfig) -> tuple[float, float]:
    """Of the student, and of the teacher: a few steps on noise of the dataset's shape, not the making of views."""
    import torch

    from tune_topkd.data import dataset_info
    from tune_topkd.loss import build_loss
    from tune_topkd.models import build_configured
    from tune_topkd.models import freeze_backbone

    info = dataset_info(config.data)
    batch = max(min(config.recipe.batch_size, _TIMED_VALUES // math.prod(info.image_shape)), 2)
    student = build_configured(config.student, num_classes=info.num_classes)
    if config.student.linear_probe:
        freeze_backbone(student)
    parameters = usable_parameters(config)
    assert parameters is not None, "the config has been checked"
    loss = build_loss(config.method, parameters)
    images, labels = torch.randn(batch, *info.image_shape), torch.arange(batch) % info.num_classes
    teacher_logits = torch.randn(batch, info.num_classes)
    cpus = config.sweep.cpus_per_trial
    torch.set_num_threads(1 if isinstance(cpus, str) else max(int(cpus), 1))
    whole = config.recipe.batch_size / batch
    with torch.autocast("cpu", torch.bfloat16, enabled=config.recipe.precision == "bfloat16"):
        step = whole * _least_seconds(lambda: loss(student(images), teacher_logits, labels).backward())
    if config.teacher is None:
        return step, 0.0
    teacher = build_configured(config.teacher.model, num_classes=info.num_classes).eval()
    with torch.no_grad():
        return step, whole * _least_seconds(lambda: teacher(images))


def _least_seconds(call: Callable[[], object]) -> float:
    """Of a call, the least disturbed of a few."""
    seconds: list[float] = []
    while len(seconds) < _TIMED_STEPS and sum(seconds) < _TIMED_SECONDS:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _bound(bound: float | str | None) -> str:
    return bound if isinstance(bound, str) else f"{bound:g}"
