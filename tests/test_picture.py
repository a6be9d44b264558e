"""A sweep under way in a few lines: the rungs, the best and its gains, the cost, the phases, the GPUs, at any size."""

import ctypes
import io

import formulas
import pytest
from rich.console import Console

from tune_topkd import machine
from tune_topkd.cli.picture import Picture
from tune_topkd.ledger import REPEAT
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Driver
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Finalists
from tune_topkd.ledger import Header
from tune_topkd.ledger import Prepared
from tune_topkd.ledger import Repeat
from tune_topkd.ledger import Report
from tune_topkd.ledger import Share
from tune_topkd.ledger import Start
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.machine import Gpu
from tune_topkd.machine import NodeGpus

EPOCHS = formulas.EPOCHS
SIZES = [(80, 24), (160, 50)]


class Drawn:
    """A sweep that is told to a picture, on a clock that stands still but for what is said."""

    def __init__(self, share=(1.0, 0.0), plan=None, trials=20, **limits):
        about = {"cpus_per_trial": share[0], "gpus_per_trial": share[1]}
        self.config = formulas.sweep_config(sweep={"trials": trials, **about, **limits})
        self.picture, self.now, self._seq = Picture(self.config), 1000.0, 0
        self.take(Header(sweep="s", id="i", seed=0, trials=trials, num_classes=10))
        hours = {name: value for name, value in limits.items() if name.endswith("_hours")}
        self.take(Driver(host="h", pid=1, trials=trials, finalists=plan, **hours))
        self._share = share

    def prepare(self):
        self.take(Prepared(share=Share(*self._share)))

    def take(self, *contents):
        for content in contents:
            self.picture.take(Event(self._seq, self.now, content))
            self._seq += 1

    def train(self, arm, number, value, stop_at=EPOCHS, seconds=10.0, of_trial=None):
        """A training to an epoch, where it is completed or stopped; None leaves it at work."""
        key = TrialKey(arm, number)
        params = formulas.DEFAULTS if arm == SEARCH else {"lr": 0.1}
        made = Suggest(key=key, proposal={}, params=params)
        self.take(made if of_trial is None else Repeat(key=key, of_trial=of_trial, seed=1 + number % 2))
        self.take(Start(key=key, attempt=1))
        for epoch in range(1, stop_at + 1):
            self.now += seconds
            metrics = {"val_top1": value, "epoch_seconds": seconds}
            self.take(Report(key=key, epoch=epoch, metrics=metrics, decision=Decision.CONTINUE))

    def end(self, arm, number, value, epoch=EPOCHS):
        status = TrialStatus.COMPLETED if epoch == EPOCHS else TrialStatus.PRUNED
        self.take(End(key=TrialKey(arm, number), epoch=epoch, status=status, reason="x", value=value))

    def lines(self, columns=80, height=24, gpus=()):
        text = io.StringIO()
        console = Console(file=text, width=columns, color_system=None)
        console.print(self.picture.frame(height, self.now, gpus), no_wrap=True, overflow="ellipsis", crop=True)
        return [line.rstrip() for line in text.getvalue().splitlines()]


@pytest.fixture
def sweep():
    """Six trials: two completed, two stopped at the first rung, one at the second, one at work; and two baselines."""
    drawn = Drawn()
    drawn.prepare()
    for number, (value, epoch) in enumerate([(80.0, EPOCHS), (70.0, 1), (75.0, 3), (82.5, EPOCHS), (60.0, 1)]):
        drawn.train(SEARCH, number, value, epoch)
        drawn.end(SEARCH, number, value, epoch)
    for arm, value in (("ce", 78.0), ("kd", 83.0)):
        drawn.train(arm, 0, value)
        drawn.end(arm, 0, value)
    drawn.train(SEARCH, 5, 71.0, 2)
    return drawn


# --- before the first trial -------------------------------------------------------------------------------------------


def test_before_the_first_trial_it_is_told_what_is_done():
    drawn = Drawn()
    drawn.now += 40
    assert drawn.lines() == ["preparing what trials share (the data, the teacher, its bank of logits): 40 s"]
    drawn.prepare()
    drawn.now += 5
    assert drawn.lines() == ["starting Ray and its workers: 5 s"]
    drawn.take(Suggest(key=TrialKey(SEARCH, 0), proposal={}, params=formulas.DEFAULTS))
    drawn.take(Start(key=TrialKey(SEARCH, 0), attempt=1))
    lines = drawn.lines()
    assert (lines[0], lines[1].split()[:2]) == ("trials 1 running  of 20", ["0000", "starts"])
    assert lines[-1].endswith(" 0/24 5 s so far"), "nothing is foreseen before anything was reported"
    assert not any(line.startswith(("rungs", "best", "pace")) for line in lines)


def test_the_next_driver_begins_anew(sweep):
    sweep.take(Driver(host="h", pid=2, trials=20))
    sweep.now += 7
    assert sweep.lines() == ["starting Ray and its workers: 7 s"]


# --- what is known of all trials --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "height"), SIZES)
def test_the_rungs_the_best_its_gains_and_the_cost_are_shown(sweep, columns, height):
    lines = sweep.lines(columns, height)
    assert lines[0] == "trials 2 completed  3 pruned  1 running  of 20  baselines 2"
    assert lines[1] == "rungs  epoch 1: 4 of 6 went on   epoch 3: 2 of 3 went on"
    assert lines[2] == "best   82.50 % (trial 3, K = 5)  +4.50 over ce, -0.50 over kd"
    assert lines[3].startswith("pace   59 trainings an hour   0.12 CPU h spent, about 0.")
    assert lines[4].startswith("  0005  epoch 2/9  val_top1 71.00 %  k=5 scale_top=2")
    assert lines[5].startswith("trainings ━")
    assert lines[5].endswith(" left")
    assert max(map(len, lines)) <= columns


def test_what_is_left_to_spend_is_what_epochs_have_cost(sweep):
    from tune_topkd.sweep.remaining import epochs_ahead

    ahead = sum(epochs_ahead(sweep.config, sweep.picture.state))
    assert f"about {ahead * 10 / 3600:.2g} left" in sweep.lines()[3]


def test_gpu_hours_are_told_where_trials_have_gpus_and_their_limit_is_kept():
    drawn = Drawn(share=(2.0, 0.5), gpu_hours=0.02)
    drawn.prepare()
    for number in range(3):
        drawn.train(SEARCH, number, 70.0, 3)
        drawn.end(SEARCH, number, 70.0, 3)
    drawn.train(SEARCH, 3, 70.0, 3)
    (cost,) = [line for line in drawn.lines() if line.startswith("pace")]
    assert cost.endswith("0.017 GPU h spent, about 0.0033 left")


def test_no_rate_is_told_of_fewer_than_three_trainings():
    drawn = Drawn()
    drawn.prepare()
    for number in range(2):
        drawn.train(SEARCH, number, 70.0, 3)
        drawn.end(SEARCH, number, 70.0, 3)
    assert not any("an hour" in line for line in drawn.lines())
    drawn.train(SEARCH, 2, 70.0, 3)
    drawn.end(SEARCH, 2, 70.0, 3)
    assert any("120 trainings an hour" in line for line in drawn.lines())


def test_the_best_is_told_by_its_fresh_seeds_once_they_are_done():
    drawn = Drawn(plan=Finalists(1, 2), trials=2)
    drawn.prepare()
    for number, value in enumerate((80.0, 70.0)):
        drawn.train(SEARCH, number, value)
        drawn.end(SEARCH, number, value)
    drawn.train("kd", 0, 75.0)
    drawn.end("kd", 0, 75.0)
    repeats = [((SEARCH, 0), 78.0), (("kd", 0), 77.0), ((SEARCH, 0), 79.0), (("kd", 0), 76.0)]
    for number, (origin, value) in enumerate(repeats):
        key = TrialKey(REPEAT, number)
        drawn.take(Repeat(key=key, of_trial=TrialKey(*origin), seed=1 + number // 2), Start(key=key, attempt=1))
        if number == 3:
            assert any(line.startswith("best   80.00 % (trial 0, K = 5)  +5.00 over kd") for line in drawn.lines())
        drawn.end(REPEAT, number, value)
    lines = drawn.lines()
    assert "finalists 4/4" in lines[0]
    assert any(line == "best   78.50 ± 0.50 % (trial 0, K = 5)  +2.00 over kd (not told apart)" for line in lines)


@pytest.mark.parametrize(("columns", "height"), [*SIZES, (40, 10), (40, 6)])
def test_many_trials_at_work_do_not_leave_the_screen(sweep, columns, height):
    for number in range(6, 60):
        sweep.train(SEARCH, number, 50.0, 1)
    gpus = [Gpu("NVIDIA H200", 12 * 2**30, 140 * 2**30, 87)] * 2
    lines = sweep.lines(columns, height, gpus)
    assert max(map(len, lines)) <= columns
    assert len(lines) <= height
    assert lines[-1].startswith("trainings")
    shown = sum(line.startswith("  00") for line in lines)
    assert f"  and {55 - shown} more" in lines


def test_at_the_end_nothing_is_left():
    drawn = Drawn(trials=1)
    drawn.prepare()
    for arm, number in ((SEARCH, 0), ("ce", 0), ("ce", 1), ("kd", 0), ("kd", 1)):
        drawn.train(arm, number, 70.0)
        drawn.end(arm, number, 70.0)
    lines = drawn.lines()
    assert lines[-1].endswith(" 5/5 in 8 min")
    assert lines[-2] == "pace   40 trainings an hour   0.12 CPU h spent"


def test_what_is_done_after_the_trials_stands_below(sweep):
    sweep.picture.phase = "writing what is left into MLflow"
    lines = sweep.lines()
    assert lines[-2].startswith("trainings")
    assert lines[-1] == "writing what is left into MLflow …"


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_gpus_are_shown_with_their_memory_and_how_busy_they_are(sweep):
    busy = Gpu("NVIDIA H200", int(12.34 * 2**30), 140 * 2**30, 87)
    lines = sweep.lines(gpus=[busy, Gpu("A part of one", 0, 2**30, None)])
    assert lines[4:6] == ["gpu    NVIDIA H200: 12.3 of 140 GiB, 87 % busy", "gpu    A part of one: 0.0 of 1 GiB"]


def node(name, *gpus, age=0.0):
    """A node whose GPUs have so many GiB in use, of so many, and are so busy, as it said so many seconds ago."""
    found = [Gpu("NVIDIA H100", int(used * 2**30), total * 2**30, busy) for used, total, busy in gpus]
    return NodeGpus(name, 0.0 - age, tuple(found))


def node_lines(sweep, *nodes, columns=80, height=24):
    sweep.now, now = 0.0, sweep.now
    try:
        lines = sweep.lines(columns, height, nodes)
    finally:
        sweep.now = now
    assert max(map(len, lines)) <= columns
    assert len(lines) <= height
    assert lines[-1].startswith("trainings")
    return [line for line in lines if line.startswith("gpu")]


@pytest.mark.parametrize(("columns", "height"), SIZES)
def test_each_node_of_a_cluster_has_a_line_in_which_its_gpus_are_told_together(sweep, columns, height):
    told = node_lines(
        sweep,
        node("10.0.0.2", *[(40 + 3 * n, 80, 71 + n) for n in range(8)]),
        node("gpu-1", (12.3, 140, 87)),
        node("mixed", (1, 40, 5), (1, 80, 5), (1, 80, None)),
        node("parts", (0, 20, None), (20, 20, None)),
        columns=columns,
        height=height,
    )
    assert told == [
        "gpu    10.0.0.2: 8 GPUs, 71–78 % busy, 40–61 of 80 GiB",
        "gpu    gpu-1: 1 GPU, 87 % busy, 12 of 140 GiB",
        "gpu    mixed: 3 GPUs, 5 % busy, 1 of 40–80 GiB",
        "gpu    parts: 2 GPUs, 0–20 of 20 GiB",
    ]


@pytest.mark.parametrize(
    ("columns", "height", "shown"), [(80, 24, 6), (160, 50, 12), (80, 11, 2), (80, 10, 1), (80, 9, 0)]
)
def test_nodes_for_which_there_is_no_room_are_told_in_one_line(sweep, columns, height, shown):
    for number in range(6, 60):
        sweep.train(SEARCH, number, 50.0, 1)
    told = node_lines(sweep, *[node(f"n{n:02}", (n, 80, n)) for n in range(40)], columns=columns, height=height)
    assert len(told) == shown
    assert told[:-1] == [f"gpu    n{n:02}: 1 GPU, {n} % busy, {n} of 80 GiB" for n in range(shown - 1)]
    rest, more = max(shown - 1, 0), " more" if shown > 1 else ""
    of_the_rest = f"gpu    {40 - rest}{more} nodes: {40 - rest} GPUs, {rest}–39 % busy, {rest}–39 of 80 GiB"
    assert told[-1:] == ([of_the_rest] if shown else [])


def test_as_many_nodes_as_there_is_room_for_have_a_line_each(sweep):
    told = node_lines(sweep, *[node(f"n{n}", (1, 80, 1)) for n in range(6)])
    assert told == [f"gpu    n{n}: 1 GPU, 1 % busy, 1 of 80 GiB" for n in range(6)]


def test_of_a_long_name_the_end_stays_and_its_figures_do_too(sweep):
    of_a_pod = "raycluster-topkd-worker-gpu-group-x7k2p"
    (told,) = node_lines(sweep, node(of_a_pod, *[(n % 140, 80 + n % 61, n % 101) for n in range(140)]))
    assert told == "gpu    …-worker-gpu-group-x7k2p: 140 GPUs, 0–100 % busy, 0–139 of 80–140 GiB"


def test_of_figures_that_are_not_of_now_the_age_is_told(sweep):
    assert node_lines(sweep, node("a", (1, 80, 1), age=19.0))[0].startswith("gpu    a: ")
    told = node_lines(sweep, node("a", (1, 80, 1), age=30.0), node("b", (1, 80, 1)))
    assert told[0] == "gpu    as the nodes' were 30 s ago:"
    assert [line[7] for line in told[1:]] == ["a", "b"]
    assert node_lines(sweep, node("a", (1, 80, 1), age=30.0), height=10) == [], "no figures without their age"


class Nvml:
    """NVIDIA's library with two GPUs, of which the second does not say how busy it is."""

    def __init__(self, fails=()):
        self._fails = fails

    def _answer(self, name):
        return 1 if name in self._fails else 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return self._answer("count")

    def nvmlDeviceGetHandleByIndex_v2(self, number, handle):
        handle._obj.value = number.value + 1
        return self._answer(f"handle {number.value}")

    def nvmlDeviceGetName(self, handle, name, length):
        text = b"GPU %d" % handle.value
        assert length.value > len(text)
        ctypes.memmove(name, text, len(text))
        return self._answer("name")

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.total, memory._obj.free, memory._obj.used = 100, 60, 40
        return self._answer("memory")

    def nvmlDeviceGetUtilizationRates(self, handle, rates):
        rates._obj.gpu, rates._obj.memory = 87, 5
        return 3 if handle.value == 2 else self._answer("rates")


@pytest.mark.parametrize(
    ("fails", "found"),
    [
        ((), [Gpu("GPU 1", 40, 100, 87), Gpu("GPU 2", 40, 100, None)]),
        (("handle 0",), [Gpu("GPU 2", 40, 100, None)]),
        (("memory",), []),
        (("count",), []),
    ],
)
def test_the_gpus_of_this_machine_are_asked_of_nvidias_library(monkeypatch, fails, found):
    monkeypatch.setattr(machine, "_nvml", lambda: Nvml(fails))
    assert machine.gpus() == found


def test_a_machine_without_nvidias_library_has_no_gpus(monkeypatch):
    machine._nvml.cache_clear()

    def missing(name):
        raise OSError("no such file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert machine.gpus() == []
    machine._nvml.cache_clear()
