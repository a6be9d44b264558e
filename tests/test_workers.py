"""Processes that make batches: whatever becomes of them, the training gets the batches or an error, and soon."""

import contextlib
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tune_topkd.data import workers
from tune_topkd.data.workers import WorkerError
from tune_topkd.data.workers import made_by_workers

LISTS = [[number, 2 * number] for number in range(7)]


class Squares:
    """Makes what tells its indices; some of them do something else."""

    def __init__(self, **special) -> None:
        self.special = special  # what is done at which index

    def __getitem__(self, indices):
        for what, index in self.special.items():
            if index in indices:
                if what == "wrong":
                    return "image 6 is damaged"
                if what == "raise":
                    raise KeyError("unforeseen")
                os.kill(os.getpid(), getattr(signal, what))
        large = torch.tensor(indices).view(-1, 1, 1, 1).expand(-1, 3, 600, 800)  # more than a pipe holds
        return large.to(torch.uint8), (large[:, :1] % 2).bool()


def made(maker=None, count: int = 2, **options):
    return list(made_by_workers(maker or Squares(), LISTS, count, **options))


def children() -> list:
    return [process for process in multiprocessing.active_children() if "resource" not in process.name]


def test_batches_come_whole_and_in_their_order():
    for batch, indices in zip(made(count=3), LISTS, strict=True):
        images, kept = batch
        assert (images.dtype, kept.dtype, images.shape, kept.shape) == (
            torch.uint8, torch.bool, (2, 3, 600, 800), (2, 1, 600, 800)
        )  # fmt: skip
        assert [image.unique().tolist() for image in images] == [[index] for index in indices]
        assert [keep.unique().tolist() for keep in kept] == [[index % 2 == 1] for index in indices]
    assert not children()


def test_who_stops_half_way_leaves_no_process():
    batches = made_by_workers(Squares(), LISTS, 2)
    next(batches)
    assert len(children()) == 2
    batches.close()
    assert not children()


def test_a_killed_worker_is_an_error_that_says_how():
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"^a data worker was killed \(SIGKILL\); .* out of memory.*data.workers"):
        made(Squares(SIGKILL=3))
    assert time.monotonic() - started < workers.SILENCE / 2
    assert not children()


def test_a_worker_killed_amid_a_batch_is_an_error_too():
    """Some of a batch is in the pipe, and the worker holds whatever it holds."""
    batches = made_by_workers(Squares(), LISTS, 1)
    next(batches)
    (process,) = children()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"was killed \(SIGKILL\)"):
        list(batches)


def test_a_worker_that_falls_silent_is_given_up(monkeypatch):
    batches = made_by_workers(Squares(SIGSTOP=6), LISTS, 1)
    next(batches)  # it has started
    monkeypatch.setattr(workers, "SILENCE", 1.0)
    with pytest.raises(
        WorkerError, match=r"^a data worker \(process \d+\) has sent nothing for 1 s: it is stopped, or"
    ):
        list(batches)
    assert not children()


def test_what_is_wrong_with_a_batch_is_handed_on_and_what_nobody_foresaw_raised():
    told = made(Squares(wrong=6))
    assert [number for number, batch in enumerate(told) if batch == "image 6 is damaged"] == [3, 6]
    with pytest.raises(WorkerError, match=r"(?s)a data worker raised Traceback.*KeyError: 'unforeseen'"):
        made(Squares(**{"raise": 6}))


@pytest.mark.parametrize("startable", [0, 1])
def test_as_many_workers_as_can_be_started_do_the_work(monkeypatch, caplog, startable):
    start = workers._started
    tried = []

    def refuse(maker, lists):
        tried.append(len(lists))
        if len(tried) == startable + 1:
            raise OSError(24, "Too many open files")
        return start(maker, lists)

    monkeypatch.setattr(workers, "_started", refuse)
    with caplog.at_level(logging.WARNING):
        batches = made(count=2)
    assert [int(images[0, 0, 0, 0]) for images, _ in batches] == list(range(7))
    (told,) = caplog.messages
    assert told.startswith(f"only {startable} of 2 data workers can be started: [Errno 24] Too many open files; ")
    assert not children()


@pytest.mark.parametrize("free", [0, 3, pytest.param(6, marks=pytest.mark.slow)])
def test_too_few_file_descriptors_are_no_end(caplog, free):
    """For real: the limit of this process, of which others have taken all but a few."""
    made(count=1)  # the server that forks is there
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, limits[1]))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for descriptor in taken[:free]:
            os.close(descriptor)
        assert [int(images[0, 0, 0, 0]) for images, _ in made(count=8)] == list(range(7))
    finally:
        for descriptor in taken[free:]:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "of 7 data workers can be started: [Errno 24] Too many open files" in caplog.text
    assert not children()


SMALL_SHM = """
import subprocess
import torch
from tune_topkd.config import AugmentConfig
from tune_topkd.data import Split, train_batches

def total(workers):
    split = Split(images, torch.arange(96) % 3, workers=workers)
    augment, constants = AugmentConfig(rotate=10), dict(mean=(0.0,) * 3, std=(1.0,) * 3)
    batches = train_batches(split, batch_size=32, seed=0, epoch=1, augment=augment, **constants)
    return sum(batch.images.double().sum().item() for batch in batches)

if __name__ == "__main__":
    images = torch.arange(96 * 3 * 64 * 64).view(96, 3, 64, 64).to(torch.uint8)
    print(total(0))
    for size in ("16k", "1300k"):
        subprocess.run(["mount", "-o", f"remount,size={size}", "/dev/shm"], check=True)
        print(total(2))
"""


def with_its_own_shared_memory() -> list[str]:
    """A command that has its own /dev/shm; the test is skipped where such a place cannot be made."""
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    if not shutil.which("unshare") or subprocess.run([*prefix, mount, "sh", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")
    return [*prefix, mount, "sh"]


@pytest.mark.slow
def test_hardly_any_shared_memory_is_enough(tmp_path: Path):
    """Not enough for the images of 1152 kB, and just for these and no batch: a DataLoader waits for ever."""
    script = tmp_path / "epoch.py"
    script.write_text(SMALL_SHM)
    command = [*with_its_own_shared_memory(), sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    here, none_started, started = done.stdout.split()
    assert here == none_started == started
    assert done.stderr.count("0 of 2 data workers can be started") == 1, "with 16k alone"
    assert "Traceback" not in done.stderr
