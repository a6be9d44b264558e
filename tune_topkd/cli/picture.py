"""A sweep under way in a few lines, drawn from what its ledger tells: for the live display, and for `status --watch`."""

import time
from collections.abc import Iterator
from collections.abc import Sequence

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tune_topkd.config import SweepConfig
from tune_topkd.ledger import REPEAT
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Event
from tune_topkd.ledger import HoursSpent
from tune_topkd.ledger import Prepared
from tune_topkd.ledger import Report
from tune_topkd.ledger import Share
from tune_topkd.ledger import Start
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import baseline_trials
from tune_topkd.ledger import finalists_done
from tune_topkd.ledger import measured_done
from tune_topkd.ledger import winner_of
from tune_topkd.machine import Gpu
from tune_topkd.machine import NodeGpus
from tune_topkd.sweep.remaining import Pace
from tune_topkd.sweep.remaining import epochs_ahead
from tune_topkd.sweep.remaining import seconds_to_limit
from tune_topkd.sweep.remaining import training_total
from tune_topkd.sweep.wording import counted
from tune_topkd.sweep.wording import duration
from tune_topkd.sweep.wording import short_params
from tune_topkd.verdict import fresh_gains

STATUS_STYLES = {"completed": "green", "pruned": "yellow", "failed": "red", "running": "cyan"}
FEWEST_ENDED = 3
"""Trainings that this driver must have seen the end of before it tells how many an hour there are."""

_AGE_OF_NOW = 20.0
"""Seconds up to which what nodes have said is told as what is; of older figures the age is told."""
_LONGEST_NAME = 24
"""Characters of a node's name: beside the figures there is room for so many in 80 columns. Names of one kind end unlike."""


class Picture:
    """A sweep as it is drawn. `take` takes the events of its ledger in order, `frame` draws it at any time."""

    def __init__(self, config: SweepConfig, began: float | None = None) -> None:
        """Begin before the first event.

        Args:
            config: the sweep's.
            began: when its driver began with the trials, in Unix seconds; None if the ledger is to tell.
        """
        self.config = config
        self.state = SweepState()
        self.pace = Pace()
        self.phase = ""
        """What is done beside or after the trials, if anything is; it stands below."""
        self._tells_began = began is None
        self._began = time.time() if began is None else began
        self._has_started = False
        """Whether a trial was started by this driver: Ray's own start takes seconds."""
        self._hours = HoursSpent(Share(1.0, 0.0))
        self._share = Share(1.0, 0.0)
        self._epochs = 0
        """Of all trainings."""
        self._ended_before = 0
        """Trainings that had ended when this driver began."""

    def take(self, event: Event) -> None:
        """Take the next event.

        Raises:
            LedgerError: it cannot follow the ones before it.
        """
        self.state.apply(event)
        match event.content:
            case Driver():
                self.pace, self._has_started, self._ended_before = Pace(), False, len(self.state.ended)
                self._began = event.time if self._tells_began else self._began
            case Prepared(share=share):
                self._share = share or self._share
                self._hours = HoursSpent(self._share)
                self._began = event.time if self._tells_began else self._began
            case Start():
                self._has_started = True
            case Report(key=key, metrics=metrics):
                self.pace.reported(key, event.time)
                self._hours.take(self.state.trials[key], metrics)
                self._epochs += 1

    def frame(self, height: int, now: float, gpus: Sequence[Gpu | NodeGpus] = ()) -> Group | Text:
        """The sweep at a time.

        Args:
            height: lines of the terminal; trials at work that do not fit are counted.
            now: in Unix seconds.
            gpus: of this machine, a line for each, or of the nodes of a cluster, a line for each node as far as a quarter of
                the terminal has room, and one for the others.
        """
        if not self._has_started and not self.phase:
            passed = duration(max(now - self._began, 0.0))
            if not self.state.is_prepared:
                return Text(f"preparing what trials share (the data, the teacher, its bank of logits): {passed}", "dim")
            return Text(f"starting Ray and its workers: {passed}", "dim")
        about, most = list(self._about(now)), max(height - 5, 1)
        above = [*about, *_of_gpus(gpus, now, min(height // 4, most - len(about)))][:most]
        below = [Text(f"{self.phase} …", "dim")] if self.phase else []
        room = max(height - len(above) - len(below) - 4, 1)
        return Group(*above, *self._running(room), self._bar(now), *below)

    def ended(self) -> int:
        """Trainings of all arms that are over."""
        return len(self.state.ended)

    def total(self) -> int:
        """Trainings that there are and that are expected."""
        return training_total(self.config, self.state)

    def _about(self, now: float) -> Iterator[Text]:
        """What is known of all trials: how many there are, the rungs, the best so far, the cost."""
        yield self._counts()
        rungs = list(self._rungs())
        if rungs:
            yield _labelled("rungs", "   ".join(rungs))
        if winner_of(self.state) is not None:
            yield self._best()
        if cost := self._cost(now):
            yield _labelled("pace", cost)

    def _counts(self) -> Text:
        counts = self.state.counts()
        text = _labelled("trials", "")
        for status, style in STATUS_STYLES.items():
            text.append(f"{counts[status]} {status}  " if counts[status] else "", style)
        text.append(f"of {self.state.target}  ", "dim")
        baselines = sum(self.state.size(method) for method in self.state.baseline_methods())
        if baselines:
            text.append(f"baselines {baselines}  ", "dim")
        if self.state.size(REPEAT) and (done := finalists_done(self.state)) is not None:
            text.append(f"finalists {done[0]}/{done[1]}  ", "dim")
        if (done := measured_done(self.state)) is not None:
            text.append(f"test {done[0]}/{done[1]}", "dim")
        text.rstrip()
        return text

    def _rungs(self) -> Iterator[str]:
        """How many of the trials that have come to a rung went on."""
        if self.config.sweep.asha is None:
            return
        search = self.state.arm(SEARCH)
        for epoch in self.config.sweep.asha.rungs(self.config.recipe.epochs):
            arrived = [record for record in search if epoch in record.reports]
            stopped = sum(record.status is TrialStatus.PRUNED and record.epoch == epoch for record in arrived)
            if arrived:
                yield f"epoch {epoch}: {len(arrived) - stopped} of {len(arrived)} went on"

    def _best(self) -> Text:
        """The answer so far, and by how much it is above the best run of each baseline."""
        winner = winner_of(self.state)
        assert winner is not None, "there is one"
        k = f", K = {winner.record.params['k']}" if "k" in winner.record.params else ""
        text = _labelled("best", "")
        text.append(f"{winner.figure} (trial {winner.record.key.number}{k})", "bold")
        told = []
        if winner.finalist is None:
            for base in baseline_trials(self.state):
                told.append(f"{(winner.record.value or 0.0) - (base.value or 0.0):+.2f} over {base.key.arm}")
        for arm, apart in fresh_gains(self.state).items():
            doubt = "" if apart.is_told_apart else " (not told apart)"
            told.append(f"{apart.mean:+.2f} over {arm}{doubt}")
        text.append(f"  {', '.join(told)}" if told else "")
        return text

    def _cost(self, now: float) -> str:
        """How many trainings end in an hour, what all have cost, and what the rest will; what cannot be told is left out."""
        told = []
        ended, passed = len(self.state.ended) - self._ended_before, now - self._began
        if ended >= FEWEST_ENDED and passed > 0:
            told.append(f"{3600 * ended / passed:.0f} trainings an hour")
        kind, spent = ("GPU", self._hours.hours.gpu) if self._share.gpus else ("CPU", self._hours.hours.cpu)
        if spent:
            left = self._hours_left(now, spent, kind)
            rest = "" if not left else f", about {_hours(left)} left"
            told.append(f"{_hours(spent)} {kind} h spent{rest}")
        return "   ".join(told)

    def _hours_left(self, now: float, spent: float, kind: str) -> float | None:
        """What the trainings to come are expected to cost, at the cost of an epoch so far; None before it can be told."""
        if self.pace.seconds_left(self.config, self.state, now) is None or not self._epochs:
            return None
        left = spent / self._epochs * sum(epochs_ahead(self.config, self.state))
        limit = self.state.gpu_hours if kind == "GPU" else self.state.cpu_hours
        return left if limit is None else min(left, max(limit - spent, 0.0))

    def time_left(self, now: float) -> str:
        """How long the sweep will still take, in words; how long it has taken, before that can be told and at the end."""
        seconds = self.pace.seconds_left(self.config, self.state, now)
        passed = max(now - self._began, 0.0)
        budget = self.config.sweep.time_budget
        if budget is not None:
            seconds = min(budget - passed, budget if seconds is None else seconds)
        if (to_limit := seconds_to_limit(self.config, self.state)) is not None:
            seconds = to_limit if seconds is None else min(seconds, to_limit)
        if seconds is None:
            return f"{duration(passed)} so far"
        if not seconds and self.ended() == self.total():
            return f"in {duration(passed)}"
        return f"about {duration(max(seconds, 0.0))} left"

    def _running(self, room: int) -> Iterator[Table | Text]:
        """The trials at work, as many as there is room for."""
        table = Table.grid(padding=(0, 2))
        running = self.state.running()
        for record in running[:room]:
            value = record.reports.get(record.epoch, {}).get(record.key.metric)
            table.add_row(
                Text(f"  {_short_title(record)}", no_wrap=True),
                Text(f"epoch {record.epoch}/{self.config.recipe.epochs}" if record.epoch else "starts", no_wrap=True),
                Text("" if value is None else f"{record.key.metric} {value:.2f} %", no_wrap=True),
                Text(short_params(record.params), "dim", overflow="ellipsis", no_wrap=True),
            )
        if running:
            yield table
        if len(running) > room:
            yield Text(f"  and {len(running) - room} more")

    def _bar(self, now: float) -> Table:
        ended, total = self.ended(), self.total()
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_column(no_wrap=True)
        bar.add_row("trainings", ProgressBar(max(total, 1), ended), f"{ended}/{total}", self.time_left(now))
        return bar


def _labelled(label: str, text: str) -> Text:
    return Text.assemble((f"{label:<7}", "dim"), text)


def _of_gpus(gpus: Sequence[Gpu | NodeGpus], now: float, most: int) -> Iterator[Text]:
    """A line for each GPU of this machine; of a cluster's nodes as many lines as there is room for."""
    yield from (_of_gpu(gpu) for gpu in gpus if isinstance(gpu, Gpu))
    nodes = [node for node in gpus if isinstance(node, NodeGpus)]
    if not nodes or most < 1:
        return
    if (age := now - min(node.at for node in nodes)) > _AGE_OF_NOW:
        if most < 2:  # no figures without their age
            return
        yield _labelled("gpu", f"as the nodes' were {duration(age)} ago:")
        most -= 1
    alone = nodes if len(nodes) <= most else nodes[: most - 1]
    for node in alone:
        name = node.name if len(node.name) <= _LONGEST_NAME else f"…{node.name[1 - _LONGEST_NAME :]}"
        yield _labelled("gpu", f"{name}: {_together(node.gpus)}")
    if rest := nodes[len(alone) :]:
        others = f"{len(rest)} more nodes" if alone else f"{len(rest)} nodes"
        yield _labelled("gpu", f"{others}: {_together([gpu for node in rest for gpu in node.gpus])}")


def _together(gpus: Sequence[Gpu]) -> str:
    """What several GPUs are doing, each figure from the lowest to the highest."""
    busy = [gpu.busy for gpu in gpus if gpu.busy is not None]
    told = [counted(len(gpus), "GPU"), f"{_from_to(busy)} % busy" if busy else ""]
    used, total = ([getattr(gpu, name) / 2**30 for gpu in gpus] for name in ("used", "total"))
    return ", ".join(filter(None, [*told, f"{_from_to(used)} of {_from_to(total)} GiB"]))


def _from_to(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low}–{high}"


def _of_gpu(gpu: Gpu) -> Text:
    busy = "" if gpu.busy is None else f", {gpu.busy} % busy"
    return _labelled("gpu", f"{gpu.name}: {gpu.used / 2**30:.1f} of {gpu.total / 2**30:.0f} GiB{busy}")


def _hours(hours: float) -> str:
    """Hours with two digits that count."""
    return f"{hours:.2g}" if hours < 10 else f"{hours:.0f}"


def _short_title(record: TrialRecord) -> str:
    return str(record.key) if record.of_trial is None else f"{record.origin}, seed {record.seed}"
