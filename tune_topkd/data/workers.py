"""Worker processes that make batches, and their failures.

Each worker sends its batches through a pipe of its own. There is no shared memory, of which a container may have
little, and no lock or queue that a killed process could leave held. The pipe of a process that dies closes, and a
worker that sends nothing for long is given up, so nothing waits for ever.
"""

import contextlib
import fcntl
import logging
import multiprocessing
import os
import pickle
import signal
import struct
import time
import traceback
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import IO
from typing import Any
from typing import NamedTuple
from typing import Protocol
from typing import TypeAlias

import torch
from torch import Tensor

from tune_topkd.data.errors import DataError

SILENCE = 300.0
"""Seconds to wait for a silent worker: longer than a file system takes to recover."""

PRELOADED = ("tune_topkd.data.views", "torchvision.transforms.v2")
"""Modules that are imported once for all workers."""

_ATTEMPTS = 5
_PIPE_BYTES = 2**20

_LENGTH = struct.Struct("<Q")

_log = logging.getLogger(__name__)

Made: TypeAlias = tuple[Tensor, Tensor | None]
"""Images `(B, C, H, W)` uint8, and which pixels `(B, 1, H, W)` bool are kept after normalising; None keeps all."""


class Maker(Protocol):
    """Makes a batch of the indices of its images; worker processes get it pickled."""

    def __getitem__(self, indices: list[int]) -> Made | str:
        """The batch, or the message of an error in the user's data."""


class WorkerError(DataError):
    """A worker process died, stopped responding, or raised an unexpected exception."""


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


def made_by_workers(
    maker: Maker, lists: Sequence[list[int]], workers: int, *, pinned: bool = False
) -> Iterator[Made | str]:
    """The batches of some lists of indices, in their order, made by as many processes as can be started.

    Where no process can be started, this one makes them, which gives the same batches.

    Args:
        maker: a pure function, so that it does not matter which process makes a batch.
        lists: the indices of each batch.
        workers: how many processes, at most one for each batch.
        pinned: put the batches into pinned memory, which a GPU reads directly.

    Raises:
        WorkerError: a process died, stopped responding, or raised an unexpected exception.
    """
    started = _start(maker, lists, min(workers, len(lists)))
    if not started:
        yield from map(maker.__getitem__, lists)
        return
    try:
        for number in range(len(lists)):
            yield _receive(started[number % len(started)], pinned)
    finally:
        _stop(started)


# --- in this process ------------------------------------------------------------------------------------------------


def _start(maker: Maker, lists: Sequence[list[int]], count: int) -> list[_Worker]:
    """As many workers as can be started; worker n makes batches n, n + `count`, n + 2 `count`, …"""
    started: list[_Worker] = []
    try:
        for number in range(count):
            started.append(_started(maker, lists[number::count]))
    except (OSError, EOFError, RuntimeError) as error:  # too few file descriptors, processes or memory
        _stop(started)
        left = f"{len(started)} are used" if started else "this process makes the batches itself, more slowly"
        _log.warning("only %d of %d data workers can be started: %s; %s", len(started), count, error, left)
        return _start(maker, lists, len(started))
    return started


def _started(maker: Maker, lists: Sequence[list[int]]) -> _Worker:
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)  # not fork: this process may have threads, or hold a GPU
    if method == "forkserver":
        context.set_forkserver_preload(list(PRELOADED))  # once, not by each worker
    ours, theirs = context.Pipe(duplex=False)
    with contextlib.suppress(OSError):  # fewer and larger pieces take two thirds of the time
        fcntl.fcntl(ours.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    try:
        for attempts_left in reversed(range(_ATTEMPTS)):
            process = context.Process(target=_work, args=(maker, lists, theirs), daemon=True)
            try:
                process.start()
                break
            except ConnectionError:  # the fork server is about to end, and is replaced once it has
                if not attempts_left:
                    raise
                time.sleep(1.0)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()  # if it stayed open here, a worker's death would not close the pipe
    return _Worker(process, ours)


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
        worker.process.kill()  # a worker that is done has ended by itself
    for worker in workers:
        worker.process.join(10)  # not for ever: a process that waits for a dead disk cannot even be killed


def _receive(worker: _Worker, pinned: bool) -> Made | str:
    """The next batch of a worker, or the message of an error in the user's data.

    Raises:
        WorkerError: the worker died, stopped responding, or raised an unexpected exception.
    """
    length = bytearray(_LENGTH.size)
    _read_into(worker, memoryview(length))
    header = bytearray(_LENGTH.unpack(length)[0])
    _read_into(worker, memoryview(header))
    kind, content = pickle.loads(header)  # noqa: S301 (from a process of ours)
    if kind == "raised":
        raise WorkerError(f"a data worker raised {content}")
    if kind == "wrong":
        wrong: str = content
        return wrong
    images, kept = (shape and torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for shape in content)
    for part in (images, kept):
        if part is not None:
            _read_into(worker, part.numpy().data.cast("B"))
    return images, None if kept is None else kept.view(torch.bool)


def _read_into(worker: _Worker, view: memoryview) -> None:
    """Read from a worker's pipe straight into memory; `Connection.recv_bytes` takes four times as long."""
    while view:
        if not worker.pipe.poll(SILENCE):
            raise WorkerError(
                f"a data worker (process {worker.process.pid}) has sent nothing for {SILENCE:g} s: it is stopped, or "
                "the disk that it reads from does not respond; data.workers: 0 reads in the trial's own process"
            )
        read = os.readv(worker.pipe.fileno(), [view])
        if not read:
            raise WorkerError(_death(worker.process))
        view = view[read:]


def _death(process: BaseProcess) -> str:
    process.join(10)
    code = process.exitcode
    if code is None or code >= 0:
        how = f"ended (exit code {code}) with batches still to be made; its error is in the log"
    else:
        how = f"was killed ({signal.Signals(-code).name})"
        if code == -signal.SIGKILL:
            how += "; if nobody killed it, the machine ran out of memory: a lower data.workers needs less"
    return f"a data worker {how}"


# --- in a worker ----------------------------------------------------------------------------------------------------


def _work(maker: Maker, lists: Sequence[list[int]], pipe: Connection) -> None:
    """Make the batches, and send each while the next is made, as long as anybody receives them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training, which ends its workers
    torch.set_num_threads(1)
    sending: Future[None] | None = None
    with open(pipe.fileno(), "wb", closefd=False) as stream, ThreadPoolExecutor(1) as sender:
        try:
            for indices in lists:
                message = _message(maker, indices)
                if sending is not None:
                    sending.result()
                sending = sender.submit(_send, stream, *message)
            if sending is not None:
                sending.result()
        except BrokenPipeError:
            os._exit(0)  # nobody receives; closing the stream would try to send the rest


def _message(maker: Maker, indices: list[int]) -> tuple[tuple[str, Any], tuple[Tensor, ...]]:
    """The message for a batch: a header, and the tensors whose bytes follow it."""
    try:
        made = maker[indices]
    except Exception:  # noqa: BLE001 (the training raises it)
        return ("raised", traceback.format_exc()), ()
    if isinstance(made, str):
        return ("wrong", made), ()
    images, kept = made
    shapes = (tuple(images.shape), None if kept is None else tuple(kept.shape))
    return ("made", shapes), (images,) if kept is None else (images, kept)


def _send(stream: IO[bytes], header: tuple[str, Any], tensors: tuple[Tensor, ...]) -> None:
    pickled = pickle.dumps(header)
    stream.write(_LENGTH.pack(len(pickled)) + pickled)
    for tensor in tensors:
        stream.write(tensor.contiguous().numpy().data.cast("B"))
    stream.flush()
