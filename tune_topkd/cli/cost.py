"""What a sweep would run and roughly what it would cost, without starting it."""

import time
from collections.abc import Iterator

from tune_topkd.cli.display import baseline_total
from tune_topkd.cli.display import duration
from tune_topkd.cli.preflight import loss_defaults
from tune_topkd.config import SweepConfig
from tune_topkd.space import Space

_TIMED_STEPS = 10


def describe(config: SweepConfig) -> Iterator[str]:
    """Lines that say what would run: the pair, the space, the trials, the epochs, the time of an epoch here."""
    from tune_topkd.data import dataset_info
    from tune_topkd.models import build_configured
    from tune_topkd.models import count_parameters

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
    most = (trials + baselines) * epochs
    asha = config.sweep.asha
    likely = most if asha is None else round(trials * _expected_epochs(config)) + baselines * epochs
    yield f"at most {most} epochs" + (f", about {likely} with ASHA stopping the losers" if likely < most else "")
    seconds = _seconds_per_epoch(config)
    yield f"about {seconds:.2g} s per epoch on this machine, so about {duration(likely * seconds)} one at a time"


def _expected_epochs(config: SweepConfig) -> float:
    """Epochs of a mean trial if each rung lets its share of them on."""
    assert config.sweep.asha is not None, "only where ASHA stops trials"
    rung, factor = config.sweep.asha.grace_epochs, config.sweep.asha.reduction_factor
    expected, share, before = 0.0, 1.0, 0
    while rung < config.recipe.epochs:
        expected, before = expected + share * (rung - before), rung
        share, rung = share / factor, rung * factor
    return expected + share * (config.recipe.epochs - before)


def _seconds_per_epoch(config: SweepConfig) -> float:
    """Time a few steps on noise of the dataset's shape, and scale them up to an epoch."""
    import torch

    from tune_topkd.data import dataset_info
    from tune_topkd.data import load_dataset
    from tune_topkd.loss import build_loss
    from tune_topkd.models import build_configured

    info, batch = dataset_info(config.data), config.recipe.batch_size
    teacher = config.teacher and build_configured(config.teacher.model, num_classes=info.num_classes).eval()
    student = build_configured(config.student, num_classes=info.num_classes)
    fixed = {name: value for name, value in config.loss.items() if name not in config.space}
    loss = build_loss(config.method, loss_defaults(config) | fixed)
    images, labels = torch.randn(batch, *info.image_shape), torch.arange(batch) % info.num_classes
    steps = max(len(load_dataset(config.data).train) // batch, 1)
    torch.set_num_threads(max(int(config.sweep.cpus_per_trial), 1))
    seconds = []
    for _ in range(_TIMED_STEPS):
        started = time.perf_counter()
        with torch.no_grad():
            target = teacher(images) if teacher else torch.zeros(batch, info.num_classes)
        loss(student(images), target, labels).backward()
        seconds.append(time.perf_counter() - started)
    return min(seconds) * steps  # the least disturbed one


def _bound(bound: float | str | None) -> str:
    return bound if isinstance(bound, str) else f"{bound:g}"
