"""When the same failure, trial after trial, says that the rest would fail too."""

import re
from collections.abc import Sequence

from tune_topkd.trials import SweepState
from tune_topkd.trials import TrialRecord
from tune_topkd.trials import TrialStatus

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


class CommonError:
    """Looks for the one error that every trial makes; takes the trials in the order of their ends.

    A function of that order alone, so a resumed sweep finds what the one before found. What a driver has ended as `failed`
    does not count for the next: a person has gone on, and may have mended the cause.
    """

    def __init__(self) -> None:
        self.error = ""
        """That of the newest trial, once it is clear that the rest would make it too."""
        self._has_success = False
        self._exact, self._alike = "", ""
        self._exactly = self._alikes = 0

    @classmethod
    def of(cls, state: SweepState) -> "CommonError":
        """What a sweep's ledger tells."""
        found = cls()
        found._take_all(state.ended[: state.forgiven])
        found._forgive()
        found._take_all(state.ended[state.forgiven :])
        return found

    def take(self, record: TrialRecord) -> None:
        """The next trial that is over."""
        if record.status is not TrialStatus.FAILED:
            self._has_success = True
            self._exact = self._alike = ""
            self._exactly = self._alikes = 0
            return
        exact, alike = cause(record, keeping_parameters=True), cause(record)
        self._exactly = self._exactly + 1 if exact == self._exact else 1
        self._alikes = self._alikes + 1 if alike == self._alike else 1
        self._exact, self._alike = exact, alike
        is_new = not self._has_success and record.reason != "diverged"
        if (is_new and self._exactly >= SAME_ERRORS_THAT_END_A_SWEEP) or self._alikes >= SAME_ERRORS_AFTER_A_SUCCESS:
            self.error = self.error or record.error

    def _take_all(self, records: Sequence[TrialRecord]) -> None:
        for record in records:
            self.take(record)

    def _forgive(self) -> None:
        self.error = self._exact = self._alike = ""
        self._exactly = self._alikes = 0


def cause(record: TrialRecord, *, keeping_parameters: bool = False) -> str:
    """A failed trial's error without what is this trial's or this process's own: paths, ids, addresses, numbers.

    Args:
        record: the trial.
        keeping_parameters: leave the numbers that are values of its parameters: such an error speaks of the space.
    """
    params = record.params.values() if keeping_parameters else ()
    given = {float(value) for value in params if isinstance(value, int | float) and not isinstance(value, bool)}

    def number(found: re.Match[str]) -> str:
        return found[0] if float(found[0]) in given else "#"

    text = record.error.replace(str(record.key), "#")
    text = _PATH.sub("/…", _QUOTED_PATH.sub(r"\1/…\1", text))
    return f"{record.reason}: {_NUMBER.sub(number, _ID.sub('#', text))}"[:_TELLING]
