"""What reading a bank of 1,000 classes takes: memory beside the rows themselves, and time beside copying them.

A trial looks its teacher's logits up by groups of batches. Memory is what torch's allocator holds at its highest; copying is
the same rows taken out of the mapped file without their checksums looked at. In CPU time, turn by turn, on one thread.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.ratio import Ratio
from benchmarks.ratio import cpu_seconds
from benchmarks.ratio import in_turns
from tune_topkd.teacher import BankSize
from tune_topkd.teacher import LogitBank

CLASSES = 1000


def run(quick: bool) -> list[Ratio]:
    """Of 100,000 rows (quick: 5,000)."""
    images, turns = (5_000, 1) if quick else (100_000, 5)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _ratios(LogitBank(Path(folder) / "bank.f16", BankSize(images, 1, CLASSES)), images, turns)
    finally:
        torch.set_num_threads(before)


def _ratios(bank: LogitBank, images: int, turns: int) -> list[Ratio]:
    order, views = torch.randperm(images), torch.zeros(images, dtype=torch.int64)
    bank.write(order, views, torch.randn(images, CLASSES).half())
    peak = _peak_bytes(lambda: bank.read(order, views))
    seconds = in_turns(
        {
            "read": lambda: cpu_seconds(lambda: bank.read(order, views), 1),
            "copy": lambda: cpu_seconds(lambda: bank._rows[order], 1),
        },
        turns,
    )
    what = f"reading {images:,} rows of {CLASSES:,} classes"
    rows = 2 * CLASSES * images
    return [
        Ratio(f"{what}, peak memory", "the rows", [peak / 1e6], [rows / 1e6], "MB", "at most 2"),
        Ratio(f"{what}, CPU time", "copying them", seconds["read"], seconds["copy"], "s"),
    ]


def _peak_bytes(call: Callable[[], object]) -> int:
    """Bytes that torch's CPU allocator held for a call at its highest."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
