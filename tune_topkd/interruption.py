"""The signals that ask this process to end: Ctrl-C, a polite kill, a terminal that closes."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_IMPATIENT = 3
_SECONDS_UNTIL_REPEATED = 1.0
_SECONDS_UNTIL_IMPORTED = 0.05

_log = logging.getLogger(__name__)


class Interruption:
    """Makes one clean end of SIGINT, SIGTERM and SIGHUP, which each say so at once.

    By default the first signal raises `KeyboardInterrupt`, again and again until it gets through: a library may swallow
    it, as a callback from C does. It waits for the end of an import, which would leave a library half loaded, to be
    loaded again by whoever comes next, and many cannot be. While `deferred`, it only sets `is_asked`, since an exception
    would come out of the middle of Ray's start or loop; a second signal raises. A third ends the process on the spot:
    what is in a ledger is on the disk.
    """

    def __init__(self) -> None:
        self.say: Callable[[str], None] = _log.warning
        """Takes the line that a person is told; called on a thread of its own, as a terminal may not take it."""
        self.advice = ""
        """What that line adds: how to go on."""
        self._number = 0
        self._count = 0
        self._is_deferred = False
        self._is_over = False
        self._is_repeated = False
        self._imports = 0

    @property
    def is_asked(self) -> bool:
        """Whether a signal has come."""
        return self._count > 0

    @property
    def exit_code(self) -> int:
        """That of a process which a signal ended: 129 for a closed terminal, else 130."""
        return 128 + signal.SIGHUP if self._number == signal.SIGHUP else 128 + signal.SIGINT

    def install(self) -> None:
        """Listen; who ignores SIGHUP (nohup) goes on doing so."""
        self._imports = _imports(sys._getframe())
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """The first signal raises nothing while this lasts: who runs below looks at `is_asked`."""
        before, self._is_deferred = self._is_deferred, True
        try:
            yield
        finally:
            self._is_deferred = before

    def check(self) -> None:
        """Raise `KeyboardInterrupt` for a signal that came while it was deferred."""
        if self.is_asked:
            raise KeyboardInterrupt

    def close(self) -> None:
        """The process ends by itself from here on: no signal is raised again."""
        self._is_over = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_repeated:
            self._is_repeated = False
            if not self._is_over and not self._is_deferred:
                self._raise(frame)
            return
        self._count += 1
        self._number = self._number or number
        if self._count >= _IMPATIENT:
            os._exit(self.exit_code)
        if self._count == 1:
            text = f"interrupted: stopping{self.advice}; a second interruption ends it at once"
            threading.Thread(target=self.say, args=(text,), daemon=True).start()
        if self._count > 1 or not self._is_deferred:
            self._raise(frame)

    def _raise(self, frame: FrameType | None) -> None:
        """Raise where nothing is imported or being wound up already, and see later whether it got through."""
        is_importing = _imports(frame) > self._imports
        again = threading.Timer(_SECONDS_UNTIL_IMPORTED if is_importing else _SECONDS_UNTIL_REPEATED, self._repeat)
        again.daemon = True
        again.start()
        if is_importing:
            return
        error: BaseException | None = sys.exc_info()[1]
        while error is not None:
            if isinstance(error, KeyboardInterrupt):
                return
            error = error.__context__
        raise KeyboardInterrupt

    def _repeat(self) -> None:
        if not self._is_over:
            self._is_repeated = True
            os.kill(os.getpid(), self._number)


def _imports(frame: FrameType | None) -> int:
    """How many imports are at work in this frame."""
    number = 0
    while frame is not None:
        code = frame.f_code
        number += (code.co_filename, code.co_name) == ("<frozen importlib._bootstrap>", "_find_and_load")
        frame = frame.f_back
    return number


_current: Interruption | None = None


@contextlib.contextmanager
def listening() -> Iterator[Interruption]:
    """The process's `Interruption`, listening; the handlers of before come back when the outermost of these ends.

    On a thread that is not the main one nothing can be installed, and nothing is.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or Interruption()
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _current = Interruption()
    _current.install()
    try:
        yield _current
    finally:
        _current.close()
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler)
