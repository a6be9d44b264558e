"""Stdout and stderr as they may be: closed, broken, stalled, resized, of an old encoding.

What is said to people goes to stderr through one `Terminal`, whose thread writes: a reader that is gone or asleep ends
and slows nothing. Results for programs go to stdout by `result`.
"""

import contextlib
import errno
import io
import logging
import os
import queue
import re
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from typing import Any
from typing import cast

from rich import console as rich
from rich.cells import cell_len
from rich.console import ConsoleDimensions
from rich.console import RenderableType
from rich.text import Text

MOST_BYTES_KEPT = 2**18
"""What waits for a reader that is asleep; of more the oldest is left out."""
PATIENCE = 1.0
"""Seconds that the work waits for a reader, once; it is asleep then, until it reads again."""
PATIENCE_AT_END = 10.0
"""Seconds without a byte read after which the end of the program waits no longer."""
PIPE_WIDTH = 160
"""Columns of a table where no terminal says how many there are."""

_CHUNK = 4096
_MOST_BEFORE_A_FRAME = 2
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_closed: set[int] = set()
"""The standard streams that this program was started without."""


def open_standard_streams() -> None:
    """Make the descriptors 0 to 2 exist: what is opened next would take the place of a closed one, and be written to."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _closed.add(descriptor)
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)  # takes the lowest free one
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def result(text: str, *, is_document: bool = False) -> None:
    """Write a result to stdout; a reader that has seen enough (`| head`) is no error.

    Args:
        text: whole lines.
        is_document: a YAML or JSON, which is UTF-8 wherever it goes.

    Raises:
        OSError: stdout is closed or cannot be written.
    """
    if 1 in _closed:
        raise OSError(errno.EBADF, "is closed, and the result goes there", "stdout")
    encoding = "utf-8" if is_document else sys.stdout.encoding
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode(encoding, "backslashreplace"))
        sys.stdout.buffer.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try once more as it ends
        if not isinstance(error, BrokenPipeError):
            error.filename = "stdout"
            raise


def columns_of_stdout() -> int | None:
    """How wide the terminal is that stdout is; None where it is none, and a table may be as wide as it takes."""
    try:
        return os.get_terminal_size(1).columns or None
    except OSError:
        return None


class Lines:
    """Stdout for a program that reads line by line, written by a thread of its own.

    It is stdout as it was when this was made, so it may be sent into a log meanwhile. **Failures.** `put` neither waits nor
    raises; a reader that is gone gets nothing more.
    """

    def __init__(self) -> None:
        """Take a copy of the descriptor.

        Raises:
            OSError: stdout is closed.
        """
        if 1 in _closed:
            raise OSError(errno.EBADF, "is closed, and the result goes there", "stdout")
        self._fd = os.dup(1)
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._written = 0
        self._thread = threading.Thread(target=self._write_all, name="stdout", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Write a line; its end is added."""
        self._queue.put(f"{line}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        """Write what is left, as long as somebody reads it."""
        self._queue.put(None)
        before, moved_at = -1, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - moved_at < PATIENCE_AT_END:
            self._thread.join(0.1)
            if self._written != before:
                before, moved_at = self._written, time.monotonic()

    def _write_all(self) -> None:
        try:
            while (content := self._queue.get()) is not None:
                while content:
                    written = os.write(self._fd, content[:_CHUNK])
                    self._written += written
                    content = content[written:]
        except OSError as error:  # the reader is gone; a sweep goes on without it
            logging.getLogger(__name__).warning("stdout cannot be written any more: %s", error)
        finally:
            os.close(self._fd)


class Terminal(io.TextIOBase):
    """Stderr, written to by a thread of its own; on a terminal its last lines may be a live region.

    **Threads.** Any thread may write. **Failures.** Writing never raises. A reader that is gone gets nothing more; one that
    is asleep is waited for once, for a second, and then `MOST_BYTES_KEPT` is kept for it.
    """

    def __init__(self, descriptor: int) -> None:
        """Take a copy of the descriptor: it stays what it is when stderr is sent into a log."""
        self._fd = os.dup(descriptor)
        self._has_cursor = os.isatty(self._fd) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
        self._encoding = (sys.stderr and sys.stderr.encoding) or "utf-8"
        self._changed = threading.Condition()
        self._queue: deque[bytes] = deque()
        self._left_out = 0
        self._region: list[str] = []
        self._is_writing = self._is_asleep = self._is_gone = self._is_closing = False
        self._moved_at = time.monotonic()
        self._thread: threading.Thread | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read only, as a file's is
        """Stderr's."""
        return self._encoding

    @property
    def has_cursor(self) -> bool:
        """Whether lines can be drawn again: a terminal that moves its cursor."""
        return self._has_cursor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """Yes."""
        return True

    def size(self) -> tuple[int, int] | None:
        """Columns and lines as they are at this moment; none if it is no terminal, or one that does not say."""
        try:
            columns, lines = os.get_terminal_size(self._fd)
        except OSError:
            return None
        return (columns, lines) if columns > 0 and lines > 0 else None

    def write(self, text: str) -> int:
        """Write; on a terminal with a live region, above it."""
        with self._changed:
            if self._region and text:
                ended = text if text.endswith("\n") else f"{text}\n"
                self._put(f"{self._to_region()}\x1b[J{ended}{_drawn(self._region)}")
            elif text:
                self._put(text)
        return len(text)

    def flush(self) -> None:
        """Wait until all is written, if there is a reader that is awake."""
        with self._changed:
            if not self._is_asleep and not self._changed.wait_for(self._is_idle, PATIENCE):
                self._is_asleep = True

    def show(self, lines: str) -> None:
        """Make these the live region, in place of the one there is; no lines take it away.

        Left out while much is still on its way: the next one comes soon.
        """
        with self._changed:
            if self._has_cursor and not (lines and len(self._queue) > _MOST_BEFORE_A_FRAME):
                before, self._region = self._to_region(), lines.splitlines()
                if before or self._region:
                    self._put(f"{before}{_drawn(self._region)}\x1b[J")

    def close(self) -> None:
        """Write what is left, as long as somebody reads it."""
        with self._changed:
            self._moved_at = time.monotonic()
            while not self._changed.wait_for(self._is_idle, 0.2):
                if time.monotonic() - self._moved_at > PATIENCE_AT_END:
                    break
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(PATIENCE)
        if self._is_idle() and not self.closed:
            os.close(self._fd)
        super().close()

    def _is_idle(self) -> bool:
        return self._is_gone or not (self._queue or self._is_writing)

    def _to_region(self) -> str:
        """To the first column of the live region: a terminal that was made narrower has broken its lines in two."""
        columns = (self.size() or (PIPE_WIDTH, 0))[0]
        rows = sum(max(1, -(-cell_len(_COLOURS.sub("", line)) // columns)) for line in self._region)
        return f"\r\x1b[{rows - 1}A" if rows > 1 else "\r" if rows else ""

    def _put(self, text: str) -> None:
        if self._is_gone or self._is_closing:
            return
        self._queue.append(text.encode(self._encoding, "backslashreplace"))
        while len(self._queue) > 1 and sum(map(len, self._queue)) > MOST_BYTES_KEPT:
            self._left_out += self._queue.popleft().count(b"\n")
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="terminal", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closing)
                if not self._queue:
                    return
                self._is_writing, content = True, self._queue.popleft()
                if self._left_out:
                    content = b"(%d lines left out: nobody read them)\n" % self._left_out + content
                    self._left_out = 0
            is_written = self._write_out(content)
            with self._changed:
                self._is_writing, self._is_gone = False, not is_written
                self._changed.notify_all()
            if self._is_gone:
                return

    def _write_out(self, content: bytes) -> bool:
        while content:
            try:
                content = content[os.write(self._fd, content[:_CHUNK]) :]
            except BlockingIOError:  # another program has made the terminal non-blocking
                select.select([], [self._fd], [])
            except OSError:
                return False
            self._moved_at, self._is_asleep = time.monotonic(), False
        return True


def _drawn(lines: list[str]) -> str:
    return "\n".join(f"\r\x1b[2K{line}" for line in lines)


class Console(rich.Console):
    """Rich on a `Terminal`: for texts of any origin, so nothing in them is markup; as wide as the terminal is just then."""

    def __init__(self, terminal: Terminal | None = None, quiet: bool = False) -> None:
        self.terminal = terminal or stderr()
        super().__init__(
            file=cast(IO[str], self.terminal), markup=False, highlight=False, emoji=False, soft_wrap=False, quiet=quiet
        )

    @property
    def size(self) -> ConsoleDimensions:
        """The terminal's, asked anew each time."""
        return ConsoleDimensions(*(self.terminal.size() or (PIPE_WIDTH, 25)))

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        raise AssertionError("the terminal has the size it has")

    @property
    def is_live(self) -> bool:
        """Whether there is a live region to show something in."""
        return self.terminal.has_cursor and not self.quiet

    def show(self, content: RenderableType | None) -> None:
        """Make this the live region; nothing takes it away."""
        if not self.is_live:
            return
        text = ""
        if content is not None:
            with self.capture() as captured:  # a column is left free: a full line would break at the next character
                self.print(content, no_wrap=True, overflow="ellipsis", crop=True, width=max(self.width - 1, 1))
            text = captured.get()
        self.terminal.show(text)

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show one line on a terminal as long as something lasts; gives what changes the line."""

        def show(words: str) -> None:
            self.show(Text(f"{words} …", "dim"))

        show(text)
        try:
            yield show
        finally:
            self.show(None)


_open: Terminal | None = None


def stderr() -> Terminal:
    """The one terminal of this process: stderr as it was when the program began."""
    global _open
    if _open is None or _open.closed:
        _open = Terminal(2)
    return _open


def close_stderr() -> None:
    """Write what is left; the end of the program."""
    global _open
    if _open is not None:
        _open.close()
    _open = None


@contextlib.contextmanager
def chatter_into(log: Path) -> Iterator[None]:
    """Send all that this process and the libraries below it print or log into a file."""
    with open(log, "ab") as target, streams_into(target), _logging_to_stderr():
        yield


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Python's logging goes where stderr goes now: the sweep's log."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


@contextlib.contextmanager
def streams_into(log: IO[Any]) -> Iterator[None]:
    """Send all that this process and the libraries below it print into a file.

    Ray's core prints from C++, so the descriptors are redirected, not only Python's streams.
    """
    _flush()
    saved = os.dup(1), os.dup(2)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        _flush()
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the log's disk is full: what the libraries said is lost, the rest is not
            stream.flush()
