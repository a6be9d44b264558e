"""The most memory that processes take while something runs."""

import threading
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def peak_megabytes(process: psutil.Process | None, seconds: float = 1.0) -> Iterator[list[float]]:
    """Look every so many seconds at a process, or, without one, at all that this one has started.

    Pages that processes share count once (PSS), spread over them.

    Yields:
        A list whose one item is, at the end, the most that all of them took at once, in MB.
    """
    peak = [0.0]

    def look() -> None:
        watched = [process] if process else psutil.Process().children(recursive=True)
        peak[0] = max(peak[0], sum(map(_megabytes, watched)))

    with every(seconds, look):
        yield peak


@contextmanager
def every(seconds: float, look: Callable[[], None]) -> Iterator[None]:
    """Call a function every so many seconds, on a thread of its own, as long as this lasts."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(seconds):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _megabytes(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().pss) / 1e6
    except psutil.Error:  # it has just ended
        return 0.0
