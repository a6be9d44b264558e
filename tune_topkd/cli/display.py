"""What a person sees: the live progress of a sweep, a line per finished trial, and the tables at the end."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from typing import cast

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tune_topkd.cli import terminal
from tune_topkd.cli.remaining import Pace
from tune_topkd.cli.remaining import baseline_total as baseline_total
from tune_topkd.cli.remaining import duration as duration
from tune_topkd.cli.terminal import Console
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Report
from tune_topkd.ledger import Retry
from tune_topkd.ledger import Start
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import read_events

BASELINE_NAMES = {"ce": "cross-entropy", "kd": "KD, T = 4"}
STATUS_STYLES = {"completed": "green", "pruned": "yellow", "failed": "red", "running": "cyan"}
SECONDS_PER_FRAME = 0.5
LONGEST_CLOSE = 3.0
"""Seconds that the end of a sweep waits for the display's last word."""

_RETRIES = {"crash": "its worker died", "oom": "out of memory", "node": "its node was lost"}
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def chatter_into(log: Path) -> Iterator[TextIO]:
    """Send all that this process and the libraries below it print into a file; gives the real stderr."""
    real = cast(TextIO, terminal.stderr())
    with open(log, "ab") as target, terminal.streams_into(target):
        yield real


class ProgressDisplay:
    """Shows a running sweep: live on a terminal, else one plain line per finished trial; a `Tracker`.

    **Threads.** It follows the ledger on a thread of its own, with a state of its own: whatever becomes of it there, the
    sweep neither waits nor ends. What a reader that is asleep misses is printed when it is awake again.
    """

    def __init__(self, config: SweepConfig, ledger: Path, seen: int, console: Console) -> None:
        """Start following.

        Args:
            config: the sweep's.
            ledger: its ledger file.
            seen: the number of the last event before this driver's trials; what it and those before it tell is old.
            console: where to.
        """
        self._config = config
        self._ledger = ledger
        self._seen = seen
        self._console = console
        self._state = SweepState()
        self._offset = 0
        self._pace = Pace()
        self._began = time.time()
        self._has_started = False
        """Whether a trial was started by this driver: Ray's own start takes seconds."""
        self._news = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="display", daemon=True)
        self._thread.start()

    def notify(self, event: Event) -> None:
        """Something is new in the ledger; the thread will see it."""
        self._news.set()

    def close(self) -> None:
        """Print what is left to print and take the live part off the screen."""
        self._closing.set()
        self._news.set()
        self._thread.join(LONGEST_CLOSE)
        self._console.show(None)

    def _follow(self) -> None:
        try:
            while not self._closing.is_set():
                self._catch_up()
                if self._console.is_live:
                    self._console.show(self._frame())
                    self._closing.wait(SECONDS_PER_FRAME)
                else:
                    self._news.wait()
                    self._news.clear()
            self._catch_up()
        except BaseException:  # noqa: BLE001 (observing may fail, work goes on; rich may end the process)
            _log.exception("the display has failed; the sweep goes on without it")

    def _catch_up(self) -> None:
        events, self._offset = read_events(self._ledger, self._offset)
        for event in events:
            self._state.apply(event)
            if event.seq > self._seen:
                self._take(event)

    def _take(self, event: Event) -> None:
        match event.content:
            case Start():
                self._has_started = True
            case Report(key=key):
                self._pace.reported(key, event.time)
            case End(key=key) if not self._console.is_live:
                self._console.print(self._line(self._state.trials[key]), soft_wrap=True)
            case Retry(key=key, reason=reason):
                text = f"trial {key}: {_RETRIES[reason]}; it goes on from its checkpoint"
                self._console.print(text, soft_wrap=True)

    def _frame(self) -> Group | Text:
        if not self._has_started:
            return Text(f"starting Ray and its workers: {duration(time.time() - self._began)}", "dim")
        return Group(self._summary(), *self._running(), self._bar())

    def _total(self) -> int:
        return self._state.target + baseline_total(self._config)

    def _ended(self) -> int:
        return sum(record.status.is_end for record in self._state.trials.values())

    def _bar(self) -> Table:
        ended, total = self._ended(), self._total()
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_column(no_wrap=True)
        left = self._time_left()
        bar.add_row("trials", ProgressBar(max(total, 1), ended), f"{ended}/{total}", left)
        return bar

    def _time_left(self) -> str:
        seconds = self._pace.seconds_left(self._config, self._state, time.time())
        passed = time.time() - self._began
        budget = self._config.sweep.time_budget
        if budget is not None:
            seconds = min(budget - passed, budget if seconds is None else seconds)
        if seconds is None:
            return f"{duration(passed)} so far"
        return f"about {duration(max(seconds, 0.0))} left"

    def _summary(self) -> Text:
        counts = self._state.counts()
        text = Text.assemble(
            *((f"{counts[status]} {status}  ", style) for status, style in STATUS_STYLES.items() if counts[status])
        )
        best = self._state.best()
        if best is not None:
            k = f", K = {best.params['k']}" if "k" in best.params else ""
            text.append(f"best {best.value:.2f} % (trial {best.key.number}{k})", "bold")
        return text

    def _running(self) -> Iterator[Table | Text]:
        """The trials at work, as many as the screen has lines for."""
        table = Table.grid(padding=(0, 2))
        running = self._state.running()
        room = max(self._console.height - 5, 1)
        for record in running[:room]:
            value = record.reports.get(record.epoch, {}).get("val_top1")
            table.add_row(
                Text(f"  {record.key}", no_wrap=True),
                Text(f"epoch {record.epoch}/{self._config.recipe.epochs}" if record.epoch else "starts", no_wrap=True),
                Text("" if value is None else f"val_top1 {value:.2f} %", no_wrap=True),
                Text(short_params(record.params), "dim", overflow="ellipsis", no_wrap=True),
            )
        yield table
        if len(running) > room:
            yield Text(f"  and {len(running) - room} more")

    def _line(self, record: TrialRecord) -> str:
        value = f"val_top1 {record.value:.2f} %" if record.value is not None else record.error or record.reason
        best = self._state.best()
        tail = f"; best {best.value:.2f} % (trial {best.key.number})" if best else ""
        name = f"trial {record.key}" if record.key.arm == SEARCH else f"baseline {record.key}"
        what = f"{name} {record.status} at epoch {record.epoch}: {value}  {short_params(record.params)}"
        return f"[{self._ended()}/{self._total()}] {what}{tail}"


def result_table(config: SweepConfig, state: SweepState, top: int = 4) -> Table:
    """The best configs, and the baselines they are measured against: a column each."""
    ranked = state.ranked()[:top]
    bases = [(m, state.best(m)) for m in (config.baselines.methods if config.baselines else ())]
    shown = [(str(r.key.number), r) for r in ranked] + [(method, r) for method, r in bases if r is not None]
    names = list(ranked[0].params) if ranked else list(config.space)
    table = Table(title=f"{state.header.sweep}: best of {state.counts()['completed']} full trials")
    table.add_column("trial")
    for number, (title, _) in enumerate(shown):
        table.add_column(title, justify="right", style="bold" if number == 0 else "")
    table.add_row("val top-1 %", *(f"{record.value:.2f}" for _, record in shown), end_section=True)
    for name in names:
        table.add_row(name, *(short(record.params[name]) if name in record.params else "" for _, record in shown))
    return table


@dataclass(frozen=True)
class Gain:
    """By how much the best trial is above a baseline."""

    sentence: str
    counts: bool
    """Whether it is more than one image of the validation split."""


def gains(config: SweepConfig, state: SweepState, images: int) -> list[Gain]:
    """What the best trial is worth beside each baseline, in points and in images.

    Args:
        config: the sweep's.
        state: the sweep.
        images: of the validation split.
    """
    best = state.best()
    found = []
    for method in config.baselines.methods if config.baselines and best else ():
        base = state.best(method)
        if base is not None and best is not None:
            points = (best.value or 0.0) - (base.value or 0.0)
            worth = round(points / 100 * images)
            rate = f", lr {short(base.params['lr'])}" if "lr" in base.params else ""
            over = f"{points:+.2f} points over {BASELINE_NAMES[method]} ({base.value:.2f} %{rate})"
            found.append(Gain(f"{over}: {worth:+d} of {images:,} validation images", abs(worth) > 1))
    return found


def advice(config: SweepConfig, state: SweepState) -> str:
    """What to do where a baseline is as good as the answer; nothing where none is."""
    best = state.best()
    bases = [(record.value or 0.0, m) for m in BASELINE_NAMES if (record := state.best(m)) is not None]
    if best is None or not bases or max(bases)[0] < (best.value or 0.0):
        return ""
    name = BASELINE_NAMES[max(bases)[1]]
    more = (
        "more trials (`resume --trials N`)" if state.stop_reason == "finished" else "the rest of the trials (`resume`)"
    )
    return f"{name} does as well without {config.method}: try {more}, a wider space or longer trials, or use it instead"


def is_same(params: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> bool:
    """Whether two sets of parameters are one, but for rounding."""
    return params.keys() == other.keys() and not any(changes(params, other))


def changes(params: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> Iterator[str]:
    """What is different in the other parameters, in words."""
    for name, value in other.items():
        before = params[name]
        if isinstance(value, float) and isinstance(before, float | int):
            is_same_value = math.isclose(value, before, rel_tol=1e-6)
        else:
            is_same_value = value == before
        if not is_same_value:
            yield f"{name} = {short(before)} becomes {short(value)}"


def summary_table(results: Sequence[tuple[SweepConfig, SweepState]]) -> Table:
    """Several sweeps side by side: dataset × pair → best K, scales, weights, top-1, gain."""
    table = Table(title="all sweeps")
    table.add_column("sweep", overflow="fold")
    table.add_column("dataset")
    table.add_column("teacher → student", overflow="fold")
    for column in ("K", "scale top/last/gt", "weight ce/tdl/contr.", "lr", "top-1 %", "over CE/KD"):
        table.add_column(column, justify="right", overflow="fold")
    for config, state in results:
        best = state.best()
        params: Mapping[str, Scalar] = config.loss | (best.params if best else {})
        bases = (state.best("ce"), state.best("kd"))
        about = f"{state.header.sweep}: {config.description}" if config.description else state.header.sweep
        table.add_row(
            about,
            config.data.name,
            f"{config.teacher.name} → {config.student.name}" if config.teacher else config.student.name,
            _joined(params, "k"),
            _joined(params, "scale_top", "scale_last", "scale_gt"),
            _joined(params, "ce_weight", "tdl_weight", "contrastive_weight"),
            _joined(params, "lr"),
            f"{best.value:.2f}" if best else "–",
            "/".join(f"{(best.value or 0) - (b.value or 0):+.2f}" if best and b else "–" for b in bases),
        )
    return table


def _joined(params: Mapping[str, Scalar], *names: str) -> str:
    return "/".join(short(params[name]) if name in params else "–" for name in names)


def short_params(params: Mapping[str, Scalar]) -> str:
    """Parameters in one short line."""
    return " ".join(f"{name}={short(value)}" for name, value in params.items())


def short(value: Scalar) -> str:
    """A value in few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
