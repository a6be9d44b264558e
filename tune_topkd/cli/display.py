"""What a person sees: the live progress of a sweep, a line per finished trial, and the tables at the end."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text

from tune_topkd.config import RECIPE_PARAMETERS
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.trials import SEARCH
from tune_topkd.trials import Event
from tune_topkd.trials import SweepState
from tune_topkd.trials import TrialRecord

BASELINE_NAMES = {"ce": "cross-entropy", "kd": "KD, T = 4"}
STATUS_STYLES = {"completed": "green", "pruned": "yellow", "failed": "red", "running": "cyan"}


@contextlib.contextmanager
def chatter_into(log: Path) -> Iterator[TextIO]:
    """Send all that this process and the libraries below it print into a file; gives the real stderr.

    Ray's core prints from C++, so the file descriptors are redirected, not only Python's streams.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(log, "ab") as target, os.fdopen(os.dup(saved[1]), "w") as terminal:
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


class ProgressDisplay:
    """Shows a running sweep: live on a terminal, else one plain line per finished trial; a `Tracker`."""

    def __init__(self, config: SweepConfig, state: SweepState, console: Console) -> None:
        self._config = config
        self._state = state
        self._console = console
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._ended_before = sum(r.status.is_end for r in state.trials.values())
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("trials", total=self._total(), left="")
        self._live = Live(self._bar, console=console, refresh_per_second=4) if console.is_terminal else None
        if self._live:
            self._live.start()

    def notify(self, event: Event) -> None:
        """Show an event; called on the sweep's thread, so it only draws what has changed."""
        if event.name == "end" and self._live is None:
            self._console.print(self._line(self._state.trials[event.key]), soft_wrap=True, highlight=False)
        if event.name == "retry":
            reason = {"crash": "its worker died", "oom": "out of memory", "node": "its node was lost"}[
                event.data["reason"]
            ]
            self._console.print(f"trial {event.key}: {reason}; it goes on from its checkpoint", highlight=False)
        if self._live is not None and event.name in ("suggest", "start", "report", "end"):
            ended = sum(r.status.is_end for r in self._state.trials.values())
            self._bar.update(self._task, completed=ended, total=self._total(), left=self._time_left(ended))
            self._live.update(Group(self._summary(), self._running_table(), self._bar))

    def close(self) -> None:
        """Take the live part off the screen."""
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()

    def _total(self) -> int:
        return self._state.target + baseline_total(self._config)

    def _time_left(self, ended: int) -> str:
        here = ended - self._ended_before
        if here < 1:
            return ""
        seconds = (time.monotonic() - self._started) / here * (self._total() - ended)
        return f"about {duration(seconds)} left"

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

    def _running_table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for record in self._state.running():
            value = record.reports.get(record.epoch, {}).get("val_top1")
            table.add_row(
                f"  {record.key}",
                f"epoch {record.epoch}/{self._config.recipe.epochs}",
                "" if value is None else f"val_top1 {value:.2f} %",
                Text(short_params(record.params), "dim", overflow="ellipsis", no_wrap=True),
            )
        return table

    def _line(self, record: TrialRecord) -> str:
        ended = sum(r.status.is_end for r in self._state.trials.values())
        value = f"val_top1 {record.value:.2f} %" if record.value is not None else record.error or record.reason
        best = self._state.best()
        tail = f"; best {best.value:.2f} % (trial {best.key.number})" if best else ""
        name = f"trial {record.key}" if record.key.arm == SEARCH else f"baseline {record.key}"
        what = f"{name} {record.status} at epoch {record.epoch}: {value}  {short_params(record.params)}"
        return f"[{ended}/{self._total()}] {what}{tail}"


def baseline_total(config: SweepConfig) -> int:
    """How many baseline trials a sweep has."""
    if config.baselines is None:
        return 0
    searched = any(name in RECIPE_PARAMETERS for name in config.space)
    return len(config.baselines.methods) * (config.baselines.trials if searched else 1)


def result_table(config: SweepConfig, state: SweepState, top: int = 4) -> Table:
    """The best configs, and the baselines they are measured against: a column each."""
    ranked = state.ranked()[:top]
    bases = [(m, state.best(m)) for m in (config.baselines.methods if config.baselines else ())]
    shown = [(str(r.key.number), r) for r in ranked] + [(method, r) for method, r in bases if r is not None]
    names = list(ranked[0].params) if ranked else list(config.space)
    table = Table(title=f"{state.header['sweep']}: best of {state.counts()['completed']} full trials")
    table.add_column("trial")
    for number, (title, _) in enumerate(shown):
        table.add_column(title, justify="right", style="bold" if number == 0 else "")
    table.add_row("val top-1 %", *(f"{record.value:.2f}" for _, record in shown), end_section=True)
    for name in names:
        table.add_row(name, *(short(record.params[name]) if name in record.params else "" for _, record in shown))
    return table


def gains(config: SweepConfig, state: SweepState) -> list[str]:
    """A sentence for each baseline: by how many points the best trial is above it."""
    best = state.best()
    sentences = []
    for method in config.baselines.methods if config.baselines and best else ():
        base = state.best(method)
        if base is not None and best is not None:
            points = (best.value or 0.0) - (base.value or 0.0)
            rate = f", lr {short(base.params['lr'])}" if "lr" in base.params else ""
            sentences.append(f"{points:+.2f} points over {BASELINE_NAMES[method]} ({base.value:.2f} %{rate})")
    return sentences


def summary_table(results: Sequence[tuple[SweepConfig, SweepState]]) -> Table:
    """Several sweeps side by side: dataset × pair → best K, scales, weights, top-1, gain."""
    table = Table(title="all sweeps")
    table.add_column("dataset")
    table.add_column("teacher → student", overflow="fold")
    for column in ("K", "scale top/last/gt", "weight ce/tdl/contr.", "lr", "top-1 %", "over CE/KD"):
        table.add_column(column, justify="right", overflow="fold")
    for config, state in results:
        best = state.best()
        params: Mapping[str, Scalar] = config.loss | (best.params if best else {})
        bases = (state.best("ce"), state.best("kd"))
        table.add_row(
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


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
