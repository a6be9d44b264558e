"""The rule by which sweeps share a cluster, and the book that the broker keeps, on a clock that is set by hand."""

import heapq
import itertools
import random
import threading
import time
from dataclasses import dataclass
from dataclasses import field

import pytest
import ray
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from tune_topkd.execution import broker
from tune_topkd.execution.sharing import LEASE
from tune_topkd.execution.sharing import SETTLING
from tune_topkd.execution.sharing import Book
from tune_topkd.execution.sharing import Claim
from tune_topkd.execution.sharing import _beside
from tune_topkd.execution.sharing import rooms
from tune_topkd.ledger import Share

CPU = (1.0, 0.0)
EIGHT = [(8.0, 0.0)]
MANY = 10**6


def of(priority, most=MANY, size=CPU, **more):
    return Claim(size, priority, most, **more)


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ([], []),
        ([of(1)], [8]),
        ([of(0.01)], [8]),
        ([of(3), of(1)], [6, 2]),
        ([of(1), of(3)], [2, 6]),
        ([of(1), of(1)], [4, 4]),
        ([of(3), of(1), of(1)], [5, 2, 1]),  # of 4.8, 1.6 and 1.6
        ([of(100), of(1)], [7, 1]),  # one place at least
        ([of(2), of(1)], [5, 3]),  # of 5.33 and 2.67
        ([of(1, most=1), of(1)], [1, 7]),  # what one cannot use is the other's
        ([of(3, most=2), of(1), of(1)], [2, 3, 3]),
        ([of(1, most=0), of(1)], [0, 8]),
        ([of(1, size=(2.0, 0.0)), of(1)], [2, 4]),  # the same part of the cluster, not the same number
        ([of(1, size=(8.0, 0.0)), of(1)], [0, 8]),
        ([of(1), of(1, size=(8.0, 0.0))], [8, 0]),
        ([of(1, ahead=5.0), of(1, size=(8.0, 0.0))], [0, 1]),  # it has waited
        ([of(1, size=(9.0, 0.0)), of(1)], [0, 8]),
    ],
)
def test_the_places_of_eight_cpus(claims, expected):
    assert rooms(EIGHT, claims) == expected


def test_more_sweeps_than_places_have_them_in_turn():
    assert rooms(EIGHT, [of(1)] * 10) == [1] * 8 + [0, 0]
    assert rooms(EIGHT, [of(1, ahead=0.5)] * 9 + [of(1)])[9] == 1
    assert rooms(EIGHT, [of(1, held=1, ahead=0.4)] * 8 + [of(1)])[8] == 0  # not before it is worth a worker's start
    assert rooms(EIGHT, [of(1, held=1, ahead=0.6)] * 8 + [of(1)])[8] == 1
    assert rooms([(1.0, 0.0)], [of(3, ahead=1.0), of(1)]) == [1, 0], "an hour weighs less where the priority is 3"


def test_who_is_furthest_behind_has_what_comes_free_and_places_do_not_move_at_every_breath():
    assert rooms(EIGHT, [of(2, ahead=1.0), of(1)]) == [5, 3]
    assert rooms(EIGHT, [of(2), of(1, ahead=1.0)]) == [6, 2]
    assert rooms(EIGHT, [of(3, ahead=12.0), of(1)]) == [3, 5]
    three = [(3.0, 0.0)]
    for held in ([2, 1], [1, 2]):
        assert rooms(three, [of(1, held=held[0], ahead=0.2), of(1, held=held[1])]) == held
        assert rooms(three, [of(1, held=held[0], ahead=1.1), of(1, held=held[1])]) == [1, 2]


def test_each_is_measured_by_the_resource_it_takes_most_of():
    nodes = [(16.0, 2.0)]
    on_gpus, on_cpus = of(1, size=(1.0, 0.5)), of(1, size=(2.0, 0.0))
    assert rooms(nodes, [on_gpus, on_cpus]) == [4, 6]
    assert rooms(nodes, [on_gpus, of(1, size=(1.0, 0.5))]) == [2, 2]


def test_a_part_of_a_gpu_lies_on_one_gpu_and_a_trial_on_one_node():
    assert rooms([(16.0, 2.0)], [of(1, size=(1.0, 0.6))]) == [2]
    assert rooms([(16.0, 4.0), (16.0, 3.0)], [of(1, size=(1.0, 2.0))]) == [3]
    assert rooms([(3.0, 0.0)] * 4, [of(1, size=(2.0, 0.0))]) == [4]


def test_small_trials_leave_a_node_to_large_ones():
    assert rooms([(4.0, 0.0)] * 2, [of(1, most=2), of(1, most=2), of(1, size=(4.0, 0.0))]) == [2, 2, 1]


sizes = st.tuples(st.sampled_from([0.5, 1.0, 2.0, 4.0, 7.0]), st.sampled_from([0.0, 0.0, 0.25, 0.4, 1.0, 2.0]))
clusters = st.lists(st.tuples(st.integers(0, 12).map(float), st.integers(0, 4).map(float)), min_size=1, max_size=4)
claims = st.lists(
    st.builds(
        Claim,
        sizes,
        st.sampled_from([0.1, 1.0, 2.0, 3.0, 50.0]),
        st.integers(0, 20),
        st.integers(0, 20),
        st.floats(0, 9),
    ),
    max_size=6,
)


@given(clusters, claims)
@settings(max_examples=100, deadline=None)
def test_never_more_than_the_cluster_has_and_nothing_idle_that_somebody_can_use(nodes, claims):
    found = rooms(nodes, claims)
    for column in (0, 1):
        taken = sum(count * claim.size[column] for count, claim in zip(found, claims, strict=True))
        assert taken <= sum(node[column] for node in nodes) + 1e-6
    for count, claim in zip(found, claims, strict=True):
        assert 0 <= count <= min(claim.most, sum(Share(*claim.size).times_on(Share(*node)) for node in nodes))
    if len(claims) == 1:
        alone = sum(Share(*claims[0].size).times_on(Share(*node)) for node in nodes)
        assert found == [min(claims[0].most, alone)]
    if any(found):
        return
    assert all(_beside(nodes, [], claim.size) == 0 for claim in claims if claim.most)


@given(st.integers(1, 40), st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 50), st.floats(0, 9)), max_size=8))
@settings(max_examples=100, deadline=None)
def test_trials_of_one_size_fill_the_cluster_by_priority_to_less_than_a_place(cpus, about):
    claims = [of(priority, most, ahead=ahead) for priority, most, ahead in about]
    found = rooms([(float(cpus), 0.0)], claims)
    assert sum(found) == min(cpus, sum(claim.most for claim in claims)), "work-conserving"
    wanting = sum(claim.most > 0 for claim in claims)
    if wanting <= cpus:
        assert all(count >= 1 for count, claim in zip(found, claims, strict=True) if claim.most), "no starvation"
    for one, other in itertools.permutations(range(len(claims)), 2):
        if found[one] < claims[one].most and found[other] > 1:  # who wants more has no less, but for one place
            least, most = found[one] + 1 + claims[one].ahead, found[other] - 1 + claims[other].ahead
            assert least / claims[one].priority >= most / claims[other].priority - 1e-9


# --- the book -----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@dataclass
class Sweep:
    """One of the sweeps of `Simulated`: what it asks for, how late it is, and what it knows and has."""

    priority: float = 1.0
    most: int = MANY
    size: tuple = CPU
    seconds: float = 6.0
    """How long a trial is, on average."""
    refill: float = 0.0
    """Until the next trial is proposed, once one has ended and there is room: on average."""
    silence: float = 1.0
    """Between an answer and the next report, at most."""
    answer: float = 0.0
    """Until an answer is there, at most."""
    start: float = 0.0
    """Of a worker that is not there yet."""

    room: int | None = None
    ahead: float = 0.0
    at_work: int = 0
    workers: int = 0
    used: float = 0.0
    used_at: float = 0.0
    begun: list = field(default_factory=list)
    marks: list = field(default_factory=list)
    is_gone: bool = False


class Simulated:
    """Sweeps on a cluster in virtual time that report to a book as `Client` does, and may be as late as they like."""

    def __init__(self, nodes, seed=0):
        self.nodes, self.random = nodes, random.Random(seed)
        self.clock = Clock()
        self.book = Book(self.clock)
        self.sweeps, self._events, self._count = {}, [], itertools.count()
        self.most_taken = 0.0

    def add(self, name, priority=1.0, **about):
        sweep = self.sweeps[name] = Sweep(priority, used_at=self.clock.now, **about)
        sweep.most = min(sweep.most, sum(Share(*sweep.size).times_on(Share(*node)) for node in self.nodes))
        self._after(0.0, self._report, name, sweep)
        return sweep

    def kill(self, name):
        """Its driver and its trials are gone; the broker finds out."""
        self.sweeps.pop(name).is_gone = True
        self.book.gone({name})

    def run(self, seconds):
        until = self.clock.now + seconds
        while self._events and self._events[0][0] <= until:
            self.clock.now, _, what, name, sweep, *about = heapq.heappop(self._events)
            if not sweep.is_gone:
                what(name, sweep, *about)
        self.clock.now = until
        for sweep in self.sweeps.values():
            self._use(sweep)
            sweep.marks.append((until, sweep.used))

    def trials(self, name, since=0.0):
        return sum(began >= since for began in self.sweeps[name].begun)

    def used(self, name, since=0.0):
        marks = dict(self.sweeps[name].marks)
        return self.sweeps[name].used - marks.get(since, 0.0)

    def _after(self, seconds, *what):
        function, name, *about = what
        heapq.heappush(self._events, (self.clock.now + seconds, next(self._count), function, name, *about))

    def _use(self, sweep):
        sweep.used += sweep.at_work * (self.clock.now - sweep.used_at)
        sweep.used_at = self.clock.now

    def _report(self, name, sweep):
        self._use(sweep)
        about = {"size": sweep.size, "priority": sweep.priority, "at_work": sweep.at_work, "job": name}
        about |= {"most": sweep.most, "used": sweep.used, "ended": len(sweep.begun) - sweep.at_work}
        answer = self.book.report(self.nodes, name, **about, room=sweep.room, ahead=sweep.ahead)
        self._after(self.random.uniform(0, sweep.answer), self._hear, name, sweep, answer)

    def _hear(self, name, sweep, answer):
        had = sweep.room or 0
        sweep.room, _, sweep.ahead, is_due = answer
        sweep.workers = min(sweep.workers, max(sweep.room, sweep.at_work))
        self._fill(name, sweep)
        is_soon = is_due or sweep.room < had > sweep.at_work
        self._after(0.3 if is_soon else self.random.uniform(0.3, sweep.silence), self._report, name, sweep)

    def _fill(self, name, sweep):
        while sweep.at_work < min(sweep.room, sweep.most):
            self._use(sweep)
            sweep.at_work += 1
            sweep.begun.append(self.clock.now)
            length = sweep.seconds * self.random.uniform(0.7, 1.3)
            if sweep.workers < sweep.at_work:
                sweep.workers, length = sweep.at_work, length + sweep.start
            self._after(length, self._end, name, sweep)
            taken = sum(other.at_work * other.size[0] for other in self.sweeps.values())
            self.most_taken = max(self.most_taken, taken)

    def _end(self, name, sweep):
        self._use(sweep)
        sweep.at_work -= 1
        sweep.workers = min(sweep.workers, max(sweep.room, sweep.at_work))
        self._after(self.random.uniform(0, 2 * sweep.refill), self._fill, name, sweep)


late = st.builds(
    dict,
    refill=st.sampled_from([0.0, 1.0, 3.0]),
    silence=st.sampled_from([1.0, 5.0, 15.0]),
    answer=st.sampled_from([0.0, 1.0, 4.0]),
    start=st.sampled_from([0.0, 3.0, 10.0]),
)


@given(late, late, st.integers(0, 2**16))
@settings(max_examples=12, deadline=None)
def test_priorities_of_3_and_1_have_what_they_use_in_that_proportion_however_late_they_are(one, other, seed):
    there = Simulated(EIGHT, seed)
    there.add("a", 3.0, **one)
    there.run(20)
    there.add("b", 1.0, **other)
    there.run(100)
    since = there.clock.now
    there.run(120)
    assert there.used("a", since) / there.used("b", since) == pytest.approx(3, rel=0.15)


@given(
    st.integers(2, 16),
    st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0, 5.0]), st.floats(2.0, 40.0), late), min_size=2, max_size=4),
    st.integers(0, 2**16),
)
@settings(max_examples=12, deadline=None)
def test_however_long_it_takes_nobody_gets_further_from_his_part_than_in_the_first_trials(cpus, sweeps, seed):
    """As long as every part is a place at least, which each has anyway."""
    total = sum(priority for priority, _, _ in sweeps)
    sweeps = [about for about in sweeps if cpus * about[0] / total >= 1]
    longest = max((seconds + about["start"] for _, seconds, about in sweeps), default=1.0)
    there = Simulated([(float(cpus), 0.0)], seed)
    for name, (priority, seconds, about) in enumerate(sweeps):
        there.add(str(name), priority, seconds=seconds, **about)
    for _ in range(6):
        there.run(3 * longest)
        assert there.most_taken <= cpus
        had = [there.used(str(name)) / priority for name, (priority, _, _) in enumerate(sweeps)]
        lowest = min((priority for priority, _, _ in sweeps), default=1.0)
        assert (max(had, default=0.0) - min(had, default=0.0)) * lowest <= 2 * cpus * longest


@pytest.mark.parametrize(("priorities", "cpus"), [((2, 1), 8), ((1, 1), 3), ((5, 3), 4), ((1, 1, 1), 8)])
def test_what_rounding_takes_comes_back_in_turns(priorities, cpus):
    there = Simulated([(float(cpus), 0.0)])
    for name, priority in enumerate(priorities):
        there.add(str(name), priority)
    there.run(1200)
    for name, priority in enumerate(priorities):
        expected = sum(there.trials(str(other)) for other in range(len(priorities))) * priority / sum(priorities)
        assert there.trials(str(name)) == pytest.approx(expected, rel=0.07)
    assert sum(there.used(str(name)) for name in range(len(priorities))) > 0.9 * 1200 * cpus


def test_a_lone_sweep_has_all_places_at_once_and_is_never_made_to_wait():
    there = Simulated(EIGHT)
    there.add("a", most=8, answer=4.0)
    there.run(4.5)
    since = there.clock.now
    there.run(1000)
    assert there.used("a", since) == pytest.approx(8 * 1000)


def test_more_sweeps_than_places_all_have_trials():
    there = Simulated([(2.0, 0.0)])
    for name in range(5):
        there.add(str(name), seconds=20.0)
    there.run(1200)
    counts = [there.trials(str(name)) for name in range(5)]
    assert min(counts) > 0.7 * max(counts)


def test_a_trial_of_a_whole_node_has_its_turn_beside_small_ones():
    there = Simulated(EIGHT)
    there.add("small", seconds=20.0)
    there.run(30)
    there.add("large", size=(8.0, 0.0), seconds=20.0)
    there.run(600)
    assert there.trials("large") >= 8
    assert there.trials("small", since=30) >= 60


def test_a_third_sweep_begins_when_the_next_trial_ends_and_takes_nothing_back():
    there = Simulated(EIGHT)
    there.add("a", 3.0)
    there.run(3600)
    there.add("b", 1.0)
    there.run(60)
    there.add("c")
    came = there.clock.now
    there.run(20)
    assert there.sweeps["c"].begun[0] - came < 1.2 * 6.0
    there.run(600)
    used = [there.used(name, came) for name in "abc"]
    assert [part / sum(used) for part in used] == pytest.approx([0.6, 0.2, 0.2], rel=0.1)


def test_who_was_stuck_for_long_is_owed_a_few_trials_and_not_all_that_time():
    there = Simulated(EIGHT)
    there.add("a", 1.0)
    there.add("b", 1.0)
    there.run(60)
    there.sweeps["b"].refill = 600.0
    there.run(600)
    there.sweeps["b"].refill = 0.0
    while there.sweeps["b"].at_work < 4:
        there.run(10)
    back = there.clock.now
    there.run(60)
    assert there.used("a", back) > 0.2 * there.used("b", back)
    since = there.clock.now
    there.run(120)
    assert there.used("a", since) / there.used("b", since) == pytest.approx(1, rel=0.15)


def test_the_places_of_a_driver_that_is_gone_are_the_others_at_once():
    there = Simulated(EIGHT)
    there.add("a", 3.0)
    there.add("b", 1.0)
    there.run(60)
    there.kill("a")
    there.run(2)
    assert there.sweeps["b"].at_work == 8


def test_a_sweep_that_says_nothing_keeps_what_is_at_work_and_gives_back_what_is_not():
    clock = Clock()
    book = Book(clock)

    def ask(name, at_work=0, room=None):
        about = {"size": CPU, "priority": 1.0, "most": MANY, "used": 0.0, "ended": 0}
        return book.report(EIGHT, name, at_work=at_work, room=room, job=f"of {name}", **about)[0]

    assert ask("a") == MANY, "a lone sweep decides by itself"
    assert ask("b") == 0  # all places are given, and a's trials are not stopped
    assert ask("a", 8, MANY) == 4
    assert ask("b", 0, 0) == 0
    assert ask("a", 7, 4) == 4
    assert ask("b", 0, 0) == 1
    assert ask("a", 2, 4) == 4
    clock.now = LEASE / 2
    assert sorted(book.silent()) == ["of a", "of b"]
    assert ask("b", 1, 1) == 4
    assert book.silent() == ["of a"]
    clock.now = LEASE + 0.1
    assert ask("b", 4, 4) == 6
    book.gone({"of a"})
    assert ask("b", 6, 6) == MANY
    book.leave("b")
    assert book.is_empty


def test_a_broker_that_was_begun_again_gives_nothing_before_all_have_told_what_they_have():
    clock = Clock()
    book = Book(clock)

    def ask(name, at_work, room=None, ahead=0.0):
        about = {"size": CPU, "priority": 1.0, "most": MANY, "used": 9.0, "ended": 0}
        return book.report(EIGHT, name, at_work=at_work, room=room, ahead=ahead, **about)

    assert ask("a", 4, 4)[:2] == (4, 1)
    assert ask("c", 0)[:2] == (0, 2)
    assert ask("b", 3, 4)[0] <= 4
    for clock.now in (SETTLING - 1, SETTLING + 1):
        ask("a", 3, 4)
        ask("b", 3, 3)
        room = ask("c", 0, 0)[0]
        assert (room > 0) == (clock.now > SETTLING)


def test_a_broker_that_was_begun_again_is_told_who_was_ahead():
    clock = Clock()
    book = Book(clock)

    def ask(name, used, ahead):
        about = {"size": CPU, "priority": 1.0, "most": MANY, "used": used, "ended": 100}
        return book.report(EIGHT, name, at_work=4, room=4, ahead=ahead, **about)

    ask("a", 900.0, 3.0)
    ask("b", 900.0, 0.0)
    clock.now = SETTLING + 1
    (room, _, ahead, _), (_, _, behind, _) = (ask(name, 900.0 + 4 * clock.now, 9.0) for name in "ab")
    assert room < 4
    assert (ahead, behind) == (pytest.approx(3.0), pytest.approx(0.0))


# --- a sweep's side -----------------------------------------------------------------------------------------------------


class Answers:
    """Stands for the broker: answers what it is set to, when it is let; an exception is raised."""

    def __init__(self, monkeypatch, room, sweeps=1, ahead=0.0, is_due=False):
        self.answer, self.asked, self.gone, self.looked_for = (room, sweeps, ahead, is_due), [], [], 0
        self.is_let = threading.Event()
        self.is_let.set()
        self.report = self.leave = self
        monkeypatch.setattr(broker, "_broker", self.found)
        monkeypatch.setattr(broker, "_job", lambda: "01000000")
        monkeypatch.setattr(broker.ray, "get", lambda call, timeout: call())
        monkeypatch.setattr(broker, "_SECONDS_BETWEEN_REPORTS", 0.02)

    def found(self):
        self.looked_for += 1
        return self

    def remote(self, sweep, **stand):
        def call():
            if not stand:
                return self.gone.append(sweep)
            self.asked.append(stand)
            self.is_let.wait(20)
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

        return call

    def client(self, note=print, priority=3.0):
        return broker.Client("s", Share(1.0, 0.0), priority, note)

    def wait_for_report(self):
        before = len(self.asked)
        wait_until(lambda: len(self.asked) > before + 1)
        return self.asked[-1]


def wait_until(holds):
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_no_trial_begins_without_a_place_and_all_room_is_given_back(monkeypatch):
    there, notes = Answers(monkeypatch, 2), []
    client = there.client(notes.append)
    assert not client.take(), "nobody has been asked"
    with client.reporting():
        client.tell(0, 8)
        wait_until(client.has_room)
        assert client.take()
        assert client.take()
        assert not client.take()
        client.tell(1, 8)  # one of them was not begun
        assert client.has_room()
        assert there.wait_for_report().items() >= {"at_work": 1, "most": 8, "room": 2, "ended": 0}.items()
        assert there.asked[0]["room"] is None
        assert there.asked[0].items() >= {"size": (1.0, 0.0), "priority": 3.0, "job": "01000000"}.items()
        assert not client.is_full()
        there.answer = (1, 2, 0.0, False)
        wait_until(client.is_full)
        client.tell(1, 8)
        assert notes == ["2 sweeps share the cluster; trials at once: 1"]
    assert there.gone == ["s"]


def test_a_place_of_its_own_is_used_again_while_an_answer_is_on_its_way(monkeypatch):
    there = Answers(monkeypatch, 8, 2)
    client = there.client()
    with client.reporting():
        client.tell(8, 8)
        wait_until(lambda: client.is_full() and not client.has_room())
        there.is_let.clear()
        there.answer = (6, 2, 0.5, False)
        before = len(there.asked)
        wait_until(lambda: len(there.asked) > before)
        client.tell(7, 8)
        assert client.take()
        assert not client.take()
        there.is_let.set()
        client.tell(7, 8)
        wait_until(lambda: not client.has_room())
        assert there.wait_for_report().items() >= {"room": 6, "ahead": 0.5, "at_work": 7, "ended": 1}.items()


def test_what_trials_have_used_is_added_up(monkeypatch):
    there = Answers(monkeypatch, 8)
    client = there.client()
    with client.reporting():
        client.tell(0, 8)
        assert there.wait_for_report()["used"] == 0.0
        began = time.monotonic()
        client.tell(3, 8)
        told = time.monotonic()
        used = there.wait_for_report()["used"]
        assert 0 < used <= 3 * (time.monotonic() - began)
        client.tell(0, 8)
        used = there.wait_for_report()
        assert used["used"] <= 3 * (time.monotonic() - began)
        assert used["ended"] == 3
        assert there.wait_for_report()["used"] == used["used"]
        assert told >= began


def test_a_lone_sweep_asks_nobody_before_a_trial(monkeypatch):
    there = Answers(monkeypatch, 8)
    monkeypatch.setattr(broker, "_SECONDS_BETWEEN_REPORTS", 3600.0)
    client = there.client()
    with client.reporting():
        client.tell(0, 8)
        wait_until(client.has_room)
        for at_work in range(8):
            assert client.take()
            client.tell(at_work + 1, 8)
        for _ in range(1000):
            client.tell(7, 8)
            assert client.take()
            client.tell(8, 8)
        assert len(there.asked) <= 2


@pytest.mark.parametrize(
    ("error", "patience"), [(ValueError("refused"), 3600.0), (ray.exceptions.GetTimeoutError("late"), 0.2)]
)
def test_a_sweep_that_can_have_no_broker_says_so_once_and_takes_what_it_finds(monkeypatch, error, patience):
    monkeypatch.setattr(broker, "PATIENCE", patience)
    monkeypatch.setattr(broker, "_LONGEST_REFUSAL", 0.2)
    there, notes = Answers(monkeypatch, 1), []
    answer, there.answer = there.answer, error
    client = there.client(notes.append)
    assert not client.take()
    with client.reporting():
        wait_until(client.take)
        for _ in range(3):
            client.tell(1, 8)
        assert len(notes) == 1
        assert str(error) in notes[0]
        assert not client.is_full()
        assert there.wait_for_report()["room"] is None
        there.answer = answer
        wait_until(lambda: not client.has_room())


def test_a_broker_that_has_died_is_looked_for_again_and_told_what_the_sweep_had(monkeypatch):
    there, notes = Answers(monkeypatch, 2, 2, ahead=1.5), []
    client = there.client(notes.append)
    with client.reporting():
        client.tell(2, 8)
        wait_until(client.is_full)
        there.answer = ray.exceptions.ActorDiedError()
        before = there.looked_for
        wait_until(lambda: there.looked_for > before + 1)
        client.tell(1, 8)
        assert client.take(), "its own place"
        assert not client.take()
        assert there.asked[-1].items() >= {"room": 2, "ahead": 1.5}.items()
        assert notes == ["2 sweeps share the cluster; trials at once: 2"]
