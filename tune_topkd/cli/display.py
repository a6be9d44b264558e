"""What a person sees: the live progress of a sweep, a line per finished trial, and the tables at the end."""

import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tune_topkd import terminal
from tune_topkd.cli.calling import command_for
from tune_topkd.cli.calling import notebooks_command
from tune_topkd.cli.picture import Picture
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.export import TUNED_FILE
from tune_topkd.ledger import CPU_HOURS
from tune_topkd.ledger import GPU_HOURS
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Finalist
from tune_topkd.ledger import Retry
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import Winner
from tune_topkd.ledger import baseline_trial
from tune_topkd.ledger import finalists
from tune_topkd.ledger import former_finalists
from tune_topkd.ledger import read_events
from tune_topkd.ledger import standings
from tune_topkd.ledger import winner_of
from tune_topkd.machine import Gpu
from tune_topkd.machine import NodeGpus
from tune_topkd.machine import gpus
from tune_topkd.sweep import Callback
from tune_topkd.sweep import Kind
from tune_topkd.sweep import Result
from tune_topkd.sweep.gpus import node_gpus
from tune_topkd.sweep.wording import counted
from tune_topkd.sweep.wording import short
from tune_topkd.sweep.wording import short_params
from tune_topkd.sweep.wording import title
from tune_topkd.sweep.workspace import LOG_FILE
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.terminal import Console
from tune_topkd.verdict import LEVEL
from tune_topkd.verdict import Interval
from tune_topkd.verdict import Verdict
from tune_topkd.verdict import guessing
from tune_topkd.verdict import verdict_of_answer

SECONDS_PER_FRAME = 0.5
SECONDS_PER_LOOK = 2.0
"""Between two looks at the GPUs."""
LONGEST_CLOSE = 3.0
"""Seconds that the end of a sweep waits for the display's last word."""

_MOST_SINGLE = 150
"""Ends of trials that each have a line where nobody looks at a terminal; of a larger sweep some hundred lines tell."""
_MOST_TROUBLES = 20
"""Failed trials, and trials begun again, that have a line each in a larger sweep."""
_RETRIES = {"crash": "its worker died", "oom": "out of memory", "node": "its node was lost"}
_log = logging.getLogger(__name__)


class ConsoleCallback(Callback):
    """Shows a sweep on the console: what it prepares, its trials as they run, what it found.

    While trials run, what this process and its libraries print goes into the sweep's log.
    """

    def __init__(self, console: Console, workspace: Workspace) -> None:
        self._console = console
        self._workspace = workspace
        self._progress: ProgressDisplay | None = None
        self._open = contextlib.ExitStack()

    def on_message(self, text: str, kind: Kind) -> None:
        """A line; of an error it is seen to that it is read, since the process ends."""
        match kind:
            case Kind.INFO:
                self._console.print(text, soft_wrap=True)
            case Kind.NOTE:
                self._console.print(f"note: {text}", style="yellow", soft_wrap=True)
            case Kind.ERROR:
                self._console.terminal.write(f"\nerror: {text}\n")
                self._console.terminal.flush()

    def on_phase(self, text: str) -> None:
        """On a terminal the line at the bottom."""
        if self._progress is not None:
            self._progress.show_phase(text)
        else:
            self._console.show(Text(f"{text} …", "dim") if text else None)

    def on_trials_begin(self, config: SweepConfig, folder: Path, state: SweepState) -> None:
        """The live display starts, and the libraries go silent."""
        try:
            self._open.enter_context(terminal.chatter_into(folder / LOG_FILE))
        except OSError as error:
            self.on_message(f"what the libraries print is not kept: {error}", Kind.NOTE)
        self._progress = ProgressDisplay(
            config, folder / LEDGER_FILE, state.last_seq, self._console, is_here=self._workspace.address is None
        )
        self._open.callback(self._progress.close)

    def on_event(self, event: Event) -> None:
        """The display reads it from the ledger, on its own thread."""
        if self._progress is not None:
            self._progress.notify(event)

    def on_trials_end(self) -> None:
        """The display is taken off the screen."""
        self._open.close()
        self._progress = None

    def on_end(self, result: Result) -> None:
        """What was found, where it lies and what to do next."""
        tell_result(result, self._workspace, self._console)


def progress_of(console: Console) -> Callable[[str], AbstractContextManager[Any]]:
    """Shows on a terminal what is being done, while it is; says it in a line elsewhere."""

    def progress(what: str) -> AbstractContextManager[Any]:
        if console.is_live:
            return console.phase(what)
        console.print(f"{what} …", soft_wrap=True)
        return nullcontext()

    return progress


def tell_result(result: Result, workspace: Workspace, console: Console) -> None:
    """Say how a run ended: the best configs beside the baselines, or why there are none."""
    state, name = result.state, result.name
    words = {"running": "interrupted"}  # nothing of it runs any more; `status` says the same
    counts = ", ".join(f"{n} {words.get(status, status)}" for status, n in state.counts().items() if n)
    if result.best is not None:
        console.print(result_table(result.config, state))
        if told := result.finalists():
            console.print(f"  trial {result.best.key.number}: {told}", soft_wrap=True)
        for gain in result.gains():
            console.print(f"  {gain.sentence}", style="bold" if gain.counts else "", soft_wrap=True)
        if (verdict := result.verdict) is not None:
            console.print(verdict_table(verdict))
            console.print(f"  {verdict.sentence}", style="bold", soft_wrap=True)
            if (images := result.image_spread()) is not None:
                console.print(f"  {images.sentence(verdict)}", soft_wrap=True)
        elif advice := result.advice():
            console.print(f"  {advice}", soft_wrap=True)
        if verdict_of_answer(state) is None and (told := guessing(state)):  # else its sentence says it
            console.print(f"  {told}", style="yellow", soft_wrap=True)
        ended = "" if state.plateau is None else state.plateau.sentence
        for told in filter(
            None, (ended, *(rung.sentence() for rung in result.rung_ranks()), result.spend().sentence())
        ):
            console.print(f"  {told}", soft_wrap=True)
        console.print(f"{name}: {counts}; {state.stop_reason.replace('_', ' ')}", soft_wrap=True)
        _tell_where(result, workspace, console)
    elif state.stop_reason in ("interrupted", "time_budget", GPU_HOURS, CPU_HOURS) and not state.counts()["failed"]:
        done = f"{counts or 'no trials'} so far, none of them of the full budget"
        console.print(f"{name}: {done}; {state.stop_reason.replace('_', ' ')}", soft_wrap=True)
    else:
        console.print(f"{name}: no trial reached the full budget ({counts or 'no trials'})", style="bold red")
        for error in sorted({f"{r.reason}: {r.error}" for r in state.trials.values() if r.error})[:3]:
            console.print(f"  {error}", style="red", soft_wrap=True)
        folder = result.folder
        traces = f"  traces are in {folder}/trials/*/error.txt, the libraries' output in {folder / LOG_FILE}"
        console.print(traces, soft_wrap=True)
    if result.mlflow_trouble:
        remedy = f"`{command_for(workspace, 'track', name)}` writes what is missing"
        text = f"note: MLflow has not got all of this sweep ({result.mlflow_trouble}); {remedy}"
        console.print(text, style="yellow", soft_wrap=True)


def _tell_where(result: Result, workspace: Workspace, console: Console) -> None:
    from tune_topkd.tracking import ui_command

    state, name, folder = result.state, result.name, result.folder
    if state.stop_reason == "failed":
        text = f"  given up     the newest trials all ended on {state.ended[-1].error}"
        console.print(text, style="red", soft_wrap=True)
    console.print(f"  the answer   {folder / TUNED_FILE}", soft_wrap=True)
    console.print(f"  the truth    {folder / LEDGER_FILE}", soft_wrap=True)
    console.print(f"  the page     {command_for(workspace, 'report', name, '--format', 'html')}", soft_wrap=True)
    if workspace.mlflow_uri:
        console.print(f"  MLflow       {ui_command(workspace.mlflow_uri)}", soft_wrap=True)
    if Path("analysis/01-one-sweep.ipynb").exists():
        console.print(f"  the analysis {notebooks_command(workspace, name)}", soft_wrap=True)
    if state.stop_reason != "finished":
        following: tuple[str, ...] = ("resume", name)
        limits = {GPU_HOURS: state.gpu_hours, CPU_HOURS: state.cpu_hours}
        if (hours := limits.get(state.stop_reason)) is not None:  # with the same ones it would stop at once
            following += (f"--{state.stop_reason.replace('_', '-')}", f"{2 * hours:g}")
    else:
        following = ("confirm", name) if result.verdict is None else ("export", name, "--format", "python")
    console.print(f"next: {command_for(workspace, *following)}", style="bold", soft_wrap=True)


class ProgressDisplay:
    """Shows a running sweep: live on a terminal, else one plain line per finished trial.

    **Threads.** It follows the ledger on a thread of its own, with a state of its own: whatever becomes of it there, the
    sweep neither waits nor ends. What a reader that is asleep misses is printed when it is awake again.
    """

    def __init__(self, config: SweepConfig, ledger: Path, seen: int, console: Console, *, is_here: bool = True) -> None:
        """Start following.

        Args:
            config: the sweep's.
            ledger: its ledger file.
            seen: the number of the last event before this driver's trials; what it and those before it tell is old.
            console: where to.
            is_here: whether trials run on this machine, so that its GPUs are shown; else the cluster's nodes' are.
        """
        self._ledger = ledger
        self._seen = seen
        self._console = console
        self._picture = Picture(config, time.time())
        self._offset = 0
        self._is_here = is_here
        self._gpus: Sequence[Gpu | NodeGpus] = ()
        self._looked_at = 0.0
        self._untold: Counter[str] = Counter()
        self._troubles = 0
        self._total = 0
        self._best: float | None = None
        self._news = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="display", daemon=True)
        self._thread.start()

    def notify(self, event: Event) -> None:
        """Something is new in the ledger; the thread will see it."""
        self._news.set()

    def show_phase(self, text: str) -> None:
        """Say below what is being done beside the trials; empty once that is done."""
        self._picture.phase = text

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
            self._tell_untold()
        except BaseException:  # noqa: BLE001 (observing may fail, work goes on; rich may end the process)
            _log.exception("the display has failed; the sweep goes on without it")

    def _catch_up(self) -> None:
        events, self._offset = read_events(self._ledger, self._offset)
        for event in events:
            self._picture.take(event)
            if event.seq > self._seen:
                self._take(event)

    def _take(self, event: Event) -> None:
        match event.content:
            case End(key=key) if not self._console.is_live:
                self._tell_end(self._picture.state.trials[key])
            case Retry(key=key, reason=reason) if self._console.is_live or self._has_room_for_trouble():
                text = f"{title(self._picture.state.trials[key])}: {_RETRIES[reason]}; it goes on from its checkpoint"
                self._console.print(text, soft_wrap=True)

    def _has_room_for_trouble(self) -> bool:
        self._troubles += 1
        return self._step() == 1 or self._troubles <= _MOST_TROUBLES

    def _step(self) -> int:
        """How many ends of trials a line tells, in a sweep as large as it was when the last line was told."""
        self._total = self._total or self._picture.total()
        return math.ceil(self._total / _MOST_SINGLE)

    def _tell_end(self, record: TrialRecord) -> None:
        """A line for a trial that is over, or, in a large sweep, one now and then for those since the last."""
        is_news = self._step() == 1 or record.of_trial is not None
        if record.status is TrialStatus.FAILED:
            is_news |= self._has_room_for_trouble()
        elif record.status is TrialStatus.COMPLETED and record.key.arm == SEARCH:
            is_best = self._best is None or (record.value or 0.0) > self._best
            self._best, is_news = (record.value or 0.0) if is_best else self._best, is_news or is_best
        if is_news:
            self._tell_untold()
            self._console.print(self._line(record), soft_wrap=True)
            return
        self._untold[record.status] += 1
        if self._untold.total() >= self._step():
            self._tell_untold()

    def _tell_untold(self) -> None:
        if not self._untold:
            return
        how = ", ".join(f"{count} {status}" for status, count in self._untold.items())
        self._untold.clear()
        self._console.print(f"{self._place()} {how}{self._tail()}", soft_wrap=True)

    def _frame(self) -> Group | Text:
        now = time.time()
        if now - self._looked_at >= SECONDS_PER_LOOK:
            self._gpus = gpus() if self._is_here else node_gpus(self._ledger.parent, now) or ()
            self._looked_at = now
        return self._picture.frame(self._console.height, now, self._gpus)

    def _line(self, record: TrialRecord) -> str:
        metric, found = record.key.metric, record.value
        if record.status is TrialStatus.PRUNED:  # by another one, which may be the higher or the lower
            metric = self._picture.config.rung_metric
            found = record.reports[record.epoch].get(metric)
        value = f"{metric} {found:.2f} %" if found is not None else record.error or record.reason
        what = f"{title(record)} {record.status} at epoch {record.epoch}: {value}  {short_params(record.params)}"
        return f"{self._place()} {what}{self._tail()}"

    def _place(self) -> str:
        self._total = self._picture.total()
        return f"[{self._picture.ended()}/{self._total} trainings]"

    def _tail(self) -> str:
        best = winner_of(self._picture.state)
        return f"; best {best.figure} (trial {best.record.key.number})" if best else ""


def result_table(config: SweepConfig, state: SweepState, top: int = 4) -> Table:
    """The best configs, and the baselines they are measured against: a column each."""
    former = former_finalists(state)
    fresh = {finalist.record.key: finalist for finalist in (*finalists(state), *former)}
    first = [finalist.record for finalist in standings(state)]
    first += [finalist.record for finalist in former if first and finalist.record.key.arm == SEARCH]
    ranked = [*first, *(record for record in state.ranked() if record not in first)][: max(top, len(first))]
    bases = [(m, baseline_trial(state, m)) for m in (config.baselines.methods if config.baselines else ())]
    shown = [(str(r.key.number), r) for r in ranked] + [(method, r) for method, r in bases if r is not None]
    names = list(ranked[0].params) if ranked else list(config.space)
    table = Table(title=f"{state.header.sweep}: best of {counted(state.counts()['completed'], 'full trial')}")
    table.add_column("trial")
    for number, (heading, _) in enumerate(shown):
        table.add_column(heading, justify="right", style="bold" if number == 0 else "")
    table.add_row("val top-1 %", *(f"{record.value:.2f}" for _, record in shown), end_section=not fresh)
    if fresh:
        means = [_fresh_figure(fresh[r.key]) if r.key in fresh else "" for _, r in shown]
        table.add_row("fresh seeds %", *means, end_section=True)
    for name in names:
        table.add_row(name, *(short(record.params[name]) if name in record.params else "" for _, record in shown))
    return table


def _fresh_figure(finalist: Finalist) -> str:
    """A mean over fresh seeds; over how many, if the finalists are to have more."""
    of = "" if len(finalist.values) == len(finalist.seeds) else f" ({counted(len(finalist.values), 'seed')})"
    return f"{finalist.figure.removesuffix(' %')}{of}"


def verdict_table(verdict: Verdict) -> Table:
    """The answer and the baselines on the test set, a row each."""
    seeds = len(verdict.answer.finalist.seeds)
    table = Table(title=f"test set, look {verdict.look}: trained on all other images, {counted(seeds, 'seed')} each")
    table.add_column("")
    for column in (
        "trial",
        "test top-1 %",
        "sd over seeds",
        f"{LEVEL:.0%} interval",
        "tuned is above by",
        "interval of that",
    ):
        table.add_column(column, justify="right")
    gains = {gain.base.name: gain for gain in verdict.gains}
    for arm in (verdict.answer, *verdict.baselines):
        gain, mean = gains.get(arm.name), arm.finalist.mean
        table.add_row(
            arm.name,
            str(arm.record.key),
            "–" if mean is None else f"{mean:.2f}",
            "–" if arm.spread is None else f"{arm.spread:.2f}",
            _from_to(arm.interval and arm.interval.of_top1),
            f"{gain.mean:+.2f}" if gain else "",
            _from_to(gain.interval and gain.interval.of_gain, "+") if gain else "",
            style="bold" if arm is verdict.answer else "",
        )
    return table


def _from_to(interval: Interval | None, sign: str = "") -> str:
    return "–" if interval is None else f"{interval.low:{sign}.2f} to {interval.high:{sign}.2f}"


def summary_table(results: Sequence[tuple[SweepConfig, SweepState]]) -> Table:
    """Several sweeps side by side: dataset × pair → best K, scales, weights, top-1, gain."""
    table = Table(title="all sweeps")
    table.add_column("sweep", overflow="fold")
    table.add_column("dataset")
    table.add_column("teacher → student", overflow="fold")
    for column in ("K", "scale top/last/gt", "weight ce/tdl/contr.", "lr", "top-1 %", "over CE/KD"):
        table.add_column(column, justify="right", overflow="fold")
    for config, state in results:
        best = winner_of(state)
        params: Mapping[str, Scalar] = config.loss | (best.record.params if best else {})
        bases = (baseline_trial(state, "ce"), baseline_trial(state, "kd"))
        fresh = {f.record.key: f.mean for f in finalists(state)} if best and best.finalist else {}
        about = f"{state.header.sweep}: {config.description}" if config.description else state.header.sweep
        table.add_row(
            about,
            config.data.name,
            f"{config.teacher.name} → {config.student.name}" if config.teacher else config.student.name,
            _joined(params, "k"),
            _joined(params, "scale_top", "scale_last", "scale_gt"),
            _joined(params, "ce_weight", "tdl_weight", "contrastive_weight"),
            _joined(params, "lr"),
            best.figure.removesuffix(" %") if best else "–",
            "/".join(_over(best, fresh.get(b.key, b.value)) if best and b else "–" for b in bases),
        )
    return table


def _over(best: Winner, base: float | None) -> str:
    return "–" if base is None else f"{best.value - base:+.2f}"


def _joined(params: Mapping[str, Scalar], *names: str) -> str:
    return "/".join(short(params[name]) if name in params else "–" for name in names)
