"""When the same failure, trial after trial, says that the rest would fail too."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tune_topkd.ledger import FELL_APART
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus

SAME_ERRORS_THAT_END_A_SWEEP = 3
"""Failed trials in a row, of the same error, that end a sweep in which no trial has done better than to fail."""

SAME_ERRORS_AFTER_A_SUCCESS = 20
"""The same once a trial has done better: then the cause may be a region of the space that fails. Where half of a space
does, the longest row in 60 simulated sweeps was 7 trials, as TPE leaves that half, and by random search one sweep of 200
trials in 20,000 has a row of 20. Where three quarters fail the longest in 40 was 19."""

_TELLING = 200  # characters of an error that are compared: where it was cut depends on the length of its paths
_QUOTED_PATH = re.compile(r"""(['"])[^'"]*[/\\][^'"]*\1""")
_PATH = re.compile(r"[^\s'\"(\[<=,;]*[/\\][^\s'\",;)\]>]*")
_ID = re.compile(r"\b0x[0-9a-f]+\b|\b(?=[0-9a-f-]*\d)[0-9a-f]{8,}(?:-[0-9a-f]{4,})*\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Cause:
    """A failed trial's error without what is this trial's or this process's own: paths, ids, addresses, numbers."""

    text: str
    numbers: tuple[float, ...] = ()
    """Those that were in it."""
    given: frozenset[float] = frozenset()
    """The numbers that are the trial's parameters."""

    @classmethod
    def of(cls, record: TrialRecord) -> "Cause":
        """That of a failed trial."""
        text = record.error.replace(str(record.key), "#")
        text = _ID.sub("#", _PATH.sub("/…", _QUOTED_PATH.sub(r"\1/…\1", text)))
        params = (v for v in record.params.values() if isinstance(v, int | float) and not isinstance(v, bool))
        numbers = tuple(float(number) for number in _NUMBER.findall(text))
        return cls(f"{record.reason}: {_NUMBER.sub('#', text)}"[:_TELLING], numbers, frozenset(map(float, params)))

    def depends_on_the_space(self, other: "Cause") -> bool:
        """Whether two errors of the same text differ in a number that one of the trials was given: k = 13, k = 17."""
        pairs = zip(self.numbers, other.numbers, strict=False)
        return any(a != b and (a in self.given or b in other.given) for a, b in pairs)


class CommonError:
    """Looks for the one error that every trial makes; takes the trials in the order of their ends.

    A function of that order alone, so a resumed sweep finds what the one before found. What a driver has ended as `failed`
    does not count for the next: a person has gone on, and may have mended the cause.
    """

    def __init__(self) -> None:
        self.error = ""
        """That of the newest trial, once it is clear that the rest would make it too."""
        self._has_success = False
        self._last = _NONE
        self._alike = self._wherever = 0
        """How many in a row have this cause; how many of these whatever they were given."""

    @classmethod
    def of(cls, state: SweepState) -> "CommonError":
        """What a sweep's ledger tells."""
        found = cls()
        found._take_all(state.ended[: state.forgiven])
        found.forgive()
        found._take_all(state.ended[state.forgiven :])
        return found

    def take(self, record: TrialRecord) -> None:
        """The next trial that is over. A repeat says nothing of the others: it counts against its finalist alone."""
        if record.of_trial is not None:
            return
        if record.status is not TrialStatus.FAILED:
            self._has_success, self._last = True, _NONE
            return
        cause = Cause.of(record)
        is_same = cause.text == self._last.text
        self._alike = self._alike + 1 if is_same else 1
        self._wherever = self._wherever + 1 if is_same and not cause.depends_on_the_space(self._last) else 1
        self._last = cause
        is_first = not self._has_success and record.reason not in FELL_APART
        if (is_first and self._wherever >= SAME_ERRORS_THAT_END_A_SWEEP) or self._alike >= SAME_ERRORS_AFTER_A_SUCCESS:
            self.error = self.error or record.error

    def forgive(self) -> None:
        """Another driver goes on where one had given up: what came before does not count."""
        self.error, self._last = "", _NONE

    def _take_all(self, records: Sequence[TrialRecord]) -> None:
        for record in records:
            self.take(record)


_NONE = Cause("")
