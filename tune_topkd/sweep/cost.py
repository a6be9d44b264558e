"""What a sweep would run and roughly what it would cost, without starting it."""

import heapq
import math
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from typing import NamedTuple

from tune_topkd import machine
from tune_topkd.config import SweepConfig
from tune_topkd.errors import TuneTopKDError
from tune_topkd.ledger import Finalists
from tune_topkd.ledger import Share
from tune_topkd.space import Space
from tune_topkd.space import random_proposals
from tune_topkd.sweep.preflight import usable_parameters
from tune_topkd.sweep.remaining import baseline_total
from tune_topkd.sweep.remaining import expected_epochs
from tune_topkd.sweep.remaining import finalist_total
from tune_topkd.sweep.wording import counted
from tune_topkd.sweep.wording import duration
from tune_topkd.verdict import listed

if TYPE_CHECKING:
    import torch

COUNTED = "the start of Ray and its workers counted, a teacher's training not"
"""What is in the time of a sweep."""

_TIMED_STEPS = 10
_TIMED_SECONDS = 5.0
_TIMED_VALUES = 2**19
"""Values of the images in a timed step on the CPU: of a large batch a part is timed."""


_SHARE_OF_FORWARD = 1 / 3
"""Of a step's time, what the evaluation of as many images takes: no backward pass."""
_SECONDS_AROUND_AN_EPOCH = 0.035
"""What report, ledger and checkpoint take of an epoch: measured by benchmarks/sweep_overhead on 2 cores."""
_SECONDS_OF_THE_START = 20.0
"""Of Ray and the first workers."""
_TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "tiny_imagenet": 100_000, "imagenet": 1_281_167}
"""Of the datasets whose size is known without their files; a part of them is held back for validation."""


class NoDeviceError(TuneTopKDError):
    """A step cannot be timed: torch does not see the device that trials are to have."""


class Step(NamedTuple):
    """Seconds that a batch takes."""

    student: float
    """Forward and backward, its loss with it."""
    teacher: float
    """Forward; 0 without one."""


def _earlier_ends(config: SweepConfig) -> Iterator[str]:
    """What may end the sweep, or its search, before that."""
    for what, hours in (("GPU", config.sweep.gpu_hours), ("CPU", config.sweep.cpu_hours)):
        if hours is not None:
            yield f"the sweep stops after {hours:g} {what} hours of training"
    if (plateau := config.sweep.plateau) is not None:
        yield f"the search ends when its newest {plateau.newest} trials bring less than {plateau.points:g} points of top-1"


def describe(config: SweepConfig, *, with_time: bool = True) -> Iterator[str]:
    """Lines that say what would run: the pair, the space, the trials, the epochs, the time on this machine's CPU.

    Args:
        config: the sweep's, checked.
        with_time: measure a step here, and tell how long the sweep would take.
    """
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
    yield from _rungs(config)
    startup = random_proposals(config)
    if config.sweep.sampler.name in ("tpe", "gp") and startup >= trials:
        name = config.sweep.sampler.name
        advice = "sweep.startup_trials; a third of the trials is a good number"
        yield f"  all {trials} are drawn at random: {name} proposes after the first {startup} ({advice})"
    repeats = finalist_total(config, Finalists.configured(config.sweep.finalists), trials)
    if (finalists := config.sweep.finalists) is not None:
        several = f"{finalists.baselines} of each baseline" if finalists.baselines > 1 else "of each baseline"
        bases = f" and the best {several}" if baselines else ""
        best = f"the best {min(finalists.count, trials)} trials{bases}, on {finalists.seeds} fresh seeds each"
        yield f"then {repeats} runs of the finalists: {best}"
    most, likely = (trials + baselines + repeats) * epochs, round(sum(map(sum, _trainings(config))))
    yield f"at most {most:,} epochs" + (f", about {likely:,} with ASHA stopping the losers" if likely < most else "")
    yield from _earlier_ends(config)
    if not missing_data(config.data):
        dataset = load_dataset(config.data)
        bank = bank_size(config.data, config.recipe, dataset) if _has_bank(config) else None
        if bank is not None:
            rows = f"{bank.images:,} images × {bank.views} views"
            yield f"teacher logits: {rows}, {_size(bank.bytes)} on the disk, asked for once by all trials"
        elif config.teacher:
            yield "teacher logits: asked for every batch of every trial"
    if with_time:
        yield from _room_here(config)
        yield _time_here(config)


def _rungs(config: SweepConfig) -> Iterator[str]:
    """When trials are stopped early, and by what."""
    if (asha := config.sweep.asha) is None:
        return
    rungs = [str(epoch) for epoch in asha.rungs(config.recipe.epochs)]
    if not rungs:
        yield f"  no trial is stopped early: ASHA's first rung, epoch {asha.grace_epochs}, is not before the last"
        return
    at = f"epoch {rungs[0]}" if len(rungs) == 1 else f"epochs {listed(rungs)}"
    yield f"  at {at} about one trial in {asha.reduction_factor} goes on, by {config.rung_metric}"


def _room_here(config: SweepConfig) -> Iterator[str]:
    """How many trials this machine has room for at once, where each one's share is a number."""
    cpus, gpus = config.sweep.cpus_per_trial, config.sweep.gpus_per_trial
    if isinstance(cpus, str) or isinstance(gpus, str):
        yield "how many trials run at once is measured before the first begins"
        return
    here = Share(machine.cpus(), len(machine.gpus()))
    room = min(Share(cpus, gpus).times_on(here), config.sweep.max_concurrent or math.inf)
    what = f"{counted(here.cpus, 'CPU')} and {counted(here.gpus, 'GPU')}" if gpus else counted(here.cpus, "CPU")
    yield f"this machine has room for {counted(int(room), 'trial')} at once ({what})"


def _time_here(config: SweepConfig) -> str:
    """About how long the sweep takes on this machine's CPU."""
    cpus = config.sweep.cpus_per_trial
    step = step_here(config, Share(1.0 if isinstance(cpus, str) else cpus, 0.0))
    if (images := image_counts(config)) is None:
        return f"about {step.student:.2g} s per step of {config.recipe.batch_size} images on this machine"
    return (
        f"about {epoch_seconds(config, images, step):.2g} s per epoch on this machine, with its evaluation and "
        f"checkpoint; about {duration(sweep_seconds(config, images, [step]))} one trial at a time, {COUNTED}"
    )


def image_counts(config: SweepConfig) -> tuple[int, int] | None:
    """The images that are trained on and evaluated in an epoch; None if that is not known without the files."""
    from tune_topkd.data import load_dataset
    from tune_topkd.data import missing_data

    if not missing_data(config.data):
        dataset = load_dataset(config.data)
        return len(dataset.train), len(dataset.val)
    if (known := _TRAINING_IMAGES.get(config.data.name)) is None:
        return None
    held_back = round(known * config.data.val_fraction)
    return known - held_back, held_back


def epoch_seconds(config: SweepConfig, images: tuple[int, int], step: Step) -> float:
    """Of a trial's epoch, with its evaluation, report and checkpoint; without what the teacher is asked for."""
    steps, evaluated = _batches(config, images)
    return steps * step.student + evaluated * step.student * _SHARE_OF_FORWARD + _SECONDS_AROUND_AN_EPOCH


def sweep_seconds(config: SweepConfig, images: tuple[int, int], places: Sequence[Step]) -> float:
    """About how long a sweep takes that nothing ends early.

    Args:
        config: the sweep's.
        images: that are trained on, and evaluated.
        places: for each trial that there is room for at once, what a batch takes there.
    """
    from tune_topkd.data import view_count

    search, repeats = _trainings(config)
    epochs, steps = sum(search) + sum(repeats), _batches(config, images)[0]
    finalists = config.sweep.finalists
    seeds = 1 if finalists is None else 1 + finalists.seeds  # all trainings of one seed are shown the same views
    views = view_count(config.data.augment)
    asked = min(config.recipe.epochs * seeds, views or math.inf) if _has_bank(config) else epochs
    speeds = [epoch_seconds(config, images, step) + asked / epochs * steps * step.teacher for step in places]
    longest = config.recipe.epochs * min(speeds)  # some trial is trained to its end, however many there are at once
    return _SECONDS_OF_THE_START + sum(max(_makespan(stage, speeds), longest) for stage in (search, repeats) if stage)


def _trainings(config: SweepConfig) -> tuple[list[float], list[float]]:
    """The epochs that each training is expected to have: of the search with its baselines, and then of the finalists."""
    epochs, trials, asha = float(config.recipe.epochs), config.sweep.trials, config.sweep.asha
    of_one = epochs if asha is None else _expected_epochs(config)
    repeats = finalist_total(config, Finalists.configured(config.sweep.finalists), trials)
    return [of_one] * trials + [epochs] * baseline_total(config), [epochs] * repeats


def _makespan(trainings: Sequence[float], speeds: Sequence[float]) -> float:
    """Seconds until all have ended, if each is begun in the place that is free first.

    Args:
        trainings: the epochs of each.
        speeds: seconds per epoch in each place.
    """
    free = [(0.0, seconds) for seconds in sorted(speeds)]
    for epochs in trainings:
        at, seconds = free[0]
        heapq.heapreplace(free, (at + epochs * seconds, seconds))
    return max(at for at, _ in free)


def _batches(config: SweepConfig, images: tuple[int, int]) -> tuple[float, float]:
    """Of an epoch's training, and of its evaluation."""
    steps, evaluated = (max(count / config.recipe.batch_size, 1) for count in images)
    return steps, evaluated


def _has_bank(config: SweepConfig) -> bool:
    return config.teacher is not None and config.teacher.bank and not config.data.augment.mixup


def _size(count: int) -> str:
    if count < 1e6:
        return f"{count / 1e3:,.1f} kB"
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _expected_epochs(config: SweepConfig) -> float:
    """Epochs of a mean trial if each rung lets its share of them on."""
    assert config.sweep.asha is not None, "only where ASHA stops trials"
    return expected_epochs(config.sweep.asha, config.recipe.epochs)


def step_here(config: SweepConfig, share: Share) -> Step:
    """Time a few steps on noise of the dataset's shape, on what a trial of this share would have of this machine.

    The making of views is not in it, nor what several GPUs of a trial tell one another.

    Raises:
        NoDeviceError: the share has a GPU, and torch sees none.
    """
    import torch

    from tune_topkd.data import dataset_info
    from tune_topkd.loss import build_loss
    from tune_topkd.models import build_configured
    from tune_topkd.models import freeze_backbone

    if share.gpus and not torch.cuda.is_available():
        raise NoDeviceError(f"torch {torch.__version__} sees no CUDA device")
    device = torch.device("cuda" if share.gpus else "cpu")
    info = dataset_info(config.data)
    most = math.ceil(config.recipe.batch_size / max(share.gpus, 1))  # each GPU has its part of a batch
    batch = max(most if share.gpus else min(most, _TIMED_VALUES // math.prod(info.image_shape)), 2)
    student = build_configured(config.student, num_classes=info.num_classes).to(device)
    if config.student.linear_probe:
        freeze_backbone(student)
    parameters = usable_parameters(config)
    assert parameters is not None, "the config has been checked"
    loss = build_loss(config.method, parameters).to(device)
    images = torch.randn(batch, *info.image_shape, device=device)
    labels = torch.arange(batch, device=device) % info.num_classes
    teacher_logits = torch.randn(batch, info.num_classes, device=device)
    whole = most / batch
    with _threads(max(int(share.cpus), 1)):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.recipe.precision == "bfloat16"):
            step = whole * _least_seconds(lambda: loss(student(images), teacher_logits, labels).backward(), device)
        if config.teacher is None:
            return Step(step, 0.0)
        teacher = build_configured(config.teacher.model, num_classes=info.num_classes).to(device).eval()
        with torch.no_grad():
            return Step(step, whole * _least_seconds(lambda: teacher(images), device))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many of torch's threads; then as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _least_seconds(call: Callable[[], object], device: "torch.device") -> float:
    """Of a call, the least disturbed of a few."""
    import torch

    seconds: list[float] = []
    while len(seconds) < _TIMED_STEPS and sum(seconds) < _TIMED_SECONDS:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the call returns when its kernels are queued
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _bound(bound: float | str | None) -> str:
    return bound if isinstance(bound, str) else f"{bound:g}"
