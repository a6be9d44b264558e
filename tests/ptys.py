"""A terminal for tests: a real pty, and a screen that shows what was written to it."""

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import termios
import threading
import time

PIECES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """The lines of a terminal that knows what this project sends: colours, carriage return, cursor up, erasing.

    One that is made narrower breaks its lines, as most terminals do.
    """

    def __init__(self, columns, lines):
        self.columns, self.lines = columns, lines
        self.rows, self.row, self.column = [""], 0, 0
        self.unknown = []

    def feed(self, text):
        """Take what was written."""
        for argument, letter, control, words in PIECES.findall(text):
            if control == "\r":
                self.column = 0
            elif control == "\n":
                self._next_row()
            elif words:
                for character in words:
                    self._put(character)
            elif letter == "A":
                top = max(len(self.rows) - self.lines, 0)  # what has left the screen is not reached
                self.row = max(self.row - int(argument or 1), top)
            elif letter == "J" and argument in ("", "0"):
                self.rows[self.row] = self.rows[self.row][: self.column]
                del self.rows[self.row + 1 :]
            elif letter == "K" and argument == "2":
                self.rows[self.row] = " " * self.column
            elif letter != "m":
                self.unknown.append((argument, letter))

    def resize(self, columns, lines):
        """Become larger or smaller."""
        rows = []
        for number, row in enumerate(self.rows):
            row = row.rstrip() if number != self.row else row
            pieces = [row[at : at + columns] for at in range(0, len(row), columns)] or [""]
            if number == self.row:
                at, self.column = len(rows) + self.column // columns, self.column % columns
            rows += pieces
        self.columns, self.lines, self.rows, self.row = columns, lines, rows, at

    def visible(self):
        """The lines on the screen."""
        return [row.rstrip() for row in self.rows[-self.lines :]]

    def _put(self, character):
        if self.column == self.columns:
            self._next_row()
            self.column = 0
        row = self.rows[self.row].ljust(self.column)
        self.rows[self.row] = row[: self.column] + character + row[self.column + 1 :]
        self.column += 1

    def _next_row(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")


class Pty:
    """A pty whose other end is read all the time onto a `Screen`."""

    def __init__(self, columns, lines):
        self.screen = Screen(columns, lines)
        self._master, self.slave = pty.openpty()
        self.written = ""
        self._lock = threading.Lock()
        self._is_open = True
        self._set_size(columns, lines)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def resize(self, columns, lines):
        """Make the terminal another size; its programs get a SIGWINCH."""
        with self._lock:
            self.screen.resize(columns, lines)
            self._set_size(columns, lines)

    def visible(self):
        """The lines on the screen."""
        with self._lock:
            return self.screen.visible()

    def wait_for(self, holds, seconds=60):
        """Wait until something holds of the visible lines, and give these."""
        deadline = time.monotonic() + seconds
        while not holds(lines := self.visible()):
            assert time.monotonic() < deadline, "\n".join(lines)
            time.sleep(0.02)
        return lines

    def close(self):
        """Let go of both ends."""
        self._is_open = False
        self._thread.join()
        for descriptor in (self._master, self.slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _set_size(self, columns, lines):
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _read(self):
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest = ""
        while self._is_open:
            if not select.select([self._master], [], [], 0.05)[0]:
                continue
            text = rest + decoder.decode(os.read(self._master, 65536))
            cut = text.rfind("\x1b")  # a sequence may come in two pieces
            cut = cut if cut >= 0 and not re.match(r"\x1b\[[?\d;]*[A-Za-z]", text[cut:]) else len(text)
            text, rest = text[:cut], text[cut:]
            with self._lock:
                self.written += text
                self.screen.feed(text)
