"""Who watches a sweep."""

from collections.abc import Iterable
from typing import Protocol

from tune_topkd.ledger.events import Event


class Tracker(Protocol):
    """Something that watches a sweep: an MLflow logger, a progress display.

    **Threads.** `notify` is called on the sweep's own thread, once for each event, in order, after the event is on disk;
    it must return at once. **Failures.** A tracker that raises is reported once and not called again in this run: it
    never ends or slows a sweep. What it missed is in the ledger.
    """

    def notify(self, event: Event) -> None:
        """An event has been written."""

    def close(self) -> None:
        """The sweep's run is over; called once."""


def tell_all(trackers: Iterable[Tracker], event: Event) -> list[tuple[Tracker, Exception]]:
    """Notify each tracker; those that raised are returned with what they raised, to be dropped and named."""
    failed = []
    for tracker in trackers:
        try:
            tracker.notify(event)
        except Exception as error:  # noqa: BLE001 (observing may fail; the caller says so and drops it)
            failed.append((tracker, error))
    return failed
