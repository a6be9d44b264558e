"""What comes before the first batch: the stratified split of ImageNet's labels, and a batch from a worker process.

The split in CPU time on one thread, against the same split made class by class. A batch of 64 images of 224 × 224 in wall
time from a process that has it ready, against one that is sent as an object of `multiprocessing`.
"""

import math
import multiprocessing
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from benchmarks.ratio import Ratio
from benchmarks.ratio import cpu_seconds
from benchmarks.ratio import in_turns
from tune_topkd.data.randomness import SPLIT
from tune_topkd.data.randomness import random_order
from tune_topkd.data.splits import stratified
from tune_topkd.data.workers import made_by_workers

IMAGES, CLASSES = 1_281_167, 1000
SHAPE = (64, 3, 224, 224)


def run(quick: bool) -> list[Ratio]:
    """Both."""
    torch.set_num_threads(1)
    images, classes, turns, batches = (20_000, 50, 1, 4) if quick else (IMAGES, CLASSES, 1, 50)
    labels = torch.arange(images) % classes
    assert all(map(torch.equal, stratified(labels, (0.1,), 0), class_by_class(labels, 0.1)))
    split = in_turns(
        {
            "sorted": partial(cpu_seconds, partial(stratified, labels, (0.1,), 0), 1),
            "plain": partial(cpu_seconds, partial(class_by_class, labels, 0.1), 1),
        },
        turns,
    )
    handed = in_turns({"pipe": partial(through_pipes, batches), "object": partial(as_objects, batches)}, turns)
    return [
        Ratio(f"split of {images:,} labels", "class by class", split["sorted"], split["plain"], "s", "below 1 s"),
        Ratio("a batch from a worker", "sent as an object", handed["pipe"], handed["object"], "s"),
    ]


def class_by_class(labels: Tensor, fraction: float) -> list[Tensor]:
    """The plain form: each class is looked for among all labels."""
    shuffled = random_order(len(labels), 0, 0, SPLIT, labels.device)
    parts: list[list[Tensor]] = [[], []]
    for label in torch.unique(labels).tolist():
        members = shuffled[labels[shuffled] == label]
        pieces = members.tensor_split([round(math.fsum([fraction]) * len(members))])
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


class Ready:
    """A batch that costs nothing to make."""

    def __init__(self) -> None:
        self.images = torch.zeros(SHAPE, dtype=torch.uint8)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, None]:
        return self.images, None


def through_pipes(count: int) -> float:
    """Seconds for a batch, once the first is there."""
    return _seconds_each(made_by_workers(Ready(), [[0]] * (count + 1), 1), count)


def as_objects(count: int) -> float:
    """Seconds for a batch."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(target=_send, args=(theirs, count + 1), daemon=True)
    process.start()
    theirs.close()
    seconds = _seconds_each((ours.recv() for _ in range(count + 1)), count)
    process.join()
    return seconds


def _seconds_each(batches: Iterator[object], count: int) -> float:
    next(batches)
    started = time.perf_counter()
    for _ in batches:
        pass
    return (time.perf_counter() - started) / count


def _send(pipe: Connection, count: int) -> None:
    images = torch.zeros(SHAPE, dtype=torch.uint8).numpy()
    for _ in range(count):
        pipe.send(images)
