"""How large the students of several sweeps are, and which give the most for it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tune_topkd.config import ModelConfig
from tune_topkd.config import SweepConfig
from tune_topkd.errors import TuneTopKDError
from tune_topkd.findings import Row
from tune_topkd.findings import Size

if TYPE_CHECKING:
    from tune_topkd.data import DatasetInfo


def with_sizes(rows: Sequence[Row], configs: Sequence[SweepConfig]) -> list[Row]:
    """The rows with their students' sizes, where not all have the same student; else as they are.

    Args:
        rows: of some sweeps.
        configs: theirs, in the same order.
    """
    students = [(config.student.model_dump_json(), config.data.name) for config in configs]
    if len(set(students)) < 2:
        return list(rows)
    known = {student: _size(config) for student, config in zip(students, configs, strict=True)}
    return [replace(row, size=known[student]) for row, student in zip(rows, students, strict=True)]


def _size(config: SweepConfig) -> Size | None:
    from tune_topkd.data import dataset_info

    try:
        return size_of(config.student, dataset_info(config.data))
    except TuneTopKDError:  # a dataset that is not here
        return None


def size_of(student: ModelConfig, info: "DatasetInfo") -> Size | None:
    """The student's weights and its work for one image; None where it cannot be built here.

    The work is counted by PyTorch over convolutions and matrix products, as the field's tables have it: a multiplication
    with its addition counts once. It is the same on every device, and stands for latency and energy, which are not.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tune_topkd.models import build_configured
    from tune_topkd.models import count_parameters

    try:
        with torch.random.fork_rng(devices=[]):
            network = build_configured(student, num_classes=info.num_classes).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *info.image_shape))
    except (TuneTopKDError, ImportError, RuntimeError, TypeError):  # code that is not here, or not for such images
        return None
    return Size(count_parameters(network), counter.get_total_flops() // 2)


def on_front(rows: Sequence[Row]) -> set[str]:
    """The sweeps beside which no other one has a student as small with a top-1 as high, by name.

    By the means: whether two of them are told apart is another question. Sweeps are compared that have a figure on the same
    images, the test set or the validation split of a dataset; one that has none to be compared with is on no front.
    """
    found = set()
    for row in rows:
        others = [other for other in rows if other is not row and _are_comparable(row, other)]
        if row.top1 is not None and row.size is not None and others and not any(_beats(o, row) for o in others):
            found.add(row.sweep)
    return found


def _are_comparable(one: Row, other: Row) -> bool:
    is_measured = None not in (one.top1, other.top1, one.size, other.size)
    return is_measured and (one.dataset, one.measured_on) == (other.dataset, other.measured_on)


def _beats(one: Row, other: Row) -> bool:
    assert one.top1 is not None and other.top1 is not None, "both have a figure"  # noqa: PT018
    assert one.size is not None and other.size is not None, "both have a size"  # noqa: PT018
    mine, theirs = (one.top1.mean, -one.size.parameters), (other.top1.mean, -other.size.parameters)
    return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))
