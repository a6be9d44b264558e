"""The rule by which sweeps share a cluster, and the book that the broker keeps, on a clock that is set by hand."""

import heapq
import itertools
import threading
import time

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from tune_topkd.execution import broker
from tune_topkd.execution.cluster import fitting
from tune_topkd.execution.sharing import LEASE
from tune_topkd.execution.sharing import TURN
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
        ([of(1, size=(8.0, 0.0)), of(1)], [1, 0]),
        ([of(1), of(1, size=(8.0, 0.0))], [8, 0]),
        ([of(1), of(1, size=(8.0, 0.0), behind=1.0)], [0, 1]),  # it has waited
        ([of(1, size=(9.0, 0.0)), of(1)], [0, 8]),
    ],
)
def test_the_places_of_eight_cpus(claims, expected):
    assert rooms(EIGHT, claims) == expected


def test_more_sweeps_than_places_have_them_in_turn():
    assert rooms(EIGHT, [of(1)] * 10) == [1] * 8 + [0, 0]
    assert rooms(EIGHT, [of(1)] * 9 + [of(1, behind=0.5)])[9] == 1
    assert rooms(EIGHT, [of(1, at_work=1)] * 8 + [of(1, behind=0.1)])[8] == 0  # not before it is worth a worker's start


def test_rounding_is_in_favour_of_who_is_behind_and_not_at_every_breath():
    assert rooms(EIGHT, [of(2, behind=1.0), of(1, behind=-1.0)]) == [6, 2]
    assert rooms(EIGHT, [of(2, behind=-1.0), of(1, behind=1.0)]) == [5, 3]
    three = [(3.0, 0.0)]
    for held in ([2, 1], [1, 2]):
        assert rooms(three, [of(1, at_work=held[0], behind=0.05), of(1, at_work=held[1], behind=-0.05)]) == held
        assert rooms(three, [of(1, at_work=held[0], behind=-0.5), of(1, at_work=held[1], behind=0.5)]) == [1, 2]


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
        st.floats(-5, 5),
    ),
    max_size=6,
)


@given(clusters, claims)
@settings(max_examples=300, deadline=None)
def test_never_more_than_the_cluster_has_and_nothing_idle_that_somebody_can_use(nodes, claims):
    found = rooms(nodes, claims)
    for column in (0, 1):
        taken = sum(count * claim.size[column] for count, claim in zip(found, claims, strict=True))
        assert taken <= sum(node[column] for node in nodes) + 1e-6
    for count, claim in zip(found, claims, strict=True):
        assert 0 <= count <= min(claim.most, sum(fitting(Share(*node), Share(*claim.size)) for node in nodes))
    if len(claims) == 1:
        alone = sum(fitting(Share(*node), Share(*claims[0].size)) for node in nodes)
        assert found == [min(claims[0].most, alone)]
    if any(found):
        return
    assert all(_beside(nodes, [], claim.size) == 0 for claim in claims if claim.most)


@given(st.integers(1, 40), st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 50), st.floats(-3, 3)), max_size=8))
@settings(max_examples=300, deadline=None)
def test_trials_of_one_size_fill_the_cluster_by_priority_to_less_than_a_place(cpus, about):
    claims = [of(priority, most, behind=behind) for priority, most, behind in about]
    found = rooms([(float(cpus), 0.0)], claims)
    assert sum(found) == min(cpus, sum(claim.most for claim in claims)), "work-conserving"
    wanting = sum(claim.most > 0 for claim in claims)
    if wanting <= cpus:
        assert all(count >= 1 for count, claim in zip(found, claims, strict=True) if claim.most), "no starvation"
    for one, other in itertools.permutations(range(len(claims)), 2):
        if found[one] < claims[one].most and found[other] > 1:  # who wants more has no less, but for one place
            assert (found[one] + 1) / claims[one].priority >= (found[other] - 1) / claims[other].priority - 1e-9


@given(clusters, claims, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_what_sweeps_are_told_fits_together_at_every_moment(nodes, claims, random):
    """Trials begin and end as they like within their room; nobody is given a place before it is free."""
    claims = [claim for claim in claims if claim.most]
    book = Book(clock := Clock())
    at_work = [0] * len(claims)
    for _ in range(40 if claims else 0):
        clock.now += LEASE / 100  # all leases hold
        number = random.randrange(len(claims))
        claim = claims[number]
        at_work[number] -= random.randint(0, at_work[number])
        room, _ = book.report(nodes, str(number), claim.size, claim.priority, at_work[number], claim.most)
        if at_work[number] < room:
            at_work[number] = random.randint(at_work[number], room)
        for column in (0, 1):
            taken = sum(count * other.size[column] for count, other in zip(at_work, claims, strict=True))
            assert taken <= sum(node[column] for node in nodes) + 1e-6


# --- the book -----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Simulated:
    """Sweeps on a cluster in virtual time, which ask the book every second and when a trial of theirs has ended."""

    def __init__(self, nodes, trial_seconds=6.0):
        self.nodes, self.trial_seconds = nodes, trial_seconds
        self.clock = Clock()
        self.book = Book(self.clock)
        self.sweeps, self.at_work, self.begun, self.room = {}, {}, {}, {}
        self.ends = []
        self._count = itertools.count()

    def add(self, name, priority=1.0, size=CPU, most=MANY):
        self.sweeps[name] = priority, size, most
        self.at_work[name], self.begun[name], self.room[name] = 0, [], 0

    def ask(self, name):
        priority, size, most = self.sweeps[name]
        self.room[name], _ = self.book.report(self.nodes, name, size, priority, self.at_work[name], most)
        self.fill(name)

    def fill(self, name):
        while self.at_work[name] < self.room[name]:
            self.at_work[name] += 1
            self.begun[name].append(self.clock.now)
            length = self.trial_seconds * (0.9 + 0.01 * (next(self._count) * 7 % 20))
            heapq.heappush(self.ends, (self.clock.now + length, next(self._count), name))

    def run(self, seconds):
        until = self.clock.now + seconds
        while self.clock.now < until:
            for name in self.sweeps:
                self.ask(name)
            while self.ends and self.ends[0][0] <= self.clock.now + 1.0:
                self.clock.now, _, name = heapq.heappop(self.ends)
                if name in self.sweeps:
                    self.at_work[name] -= 1
                    self.fill(name)
                    if self.at_work[name] >= self.room[name]:
                        self.ask(name)
            self.clock.now += 1.0

    def trials(self, name, since=0.0):
        return sum(began >= since for began in self.begun[name])


def test_priorities_of_3_and_1_have_trials_in_that_proportion():
    there = Simulated(EIGHT)
    there.add("a", 3.0)
    there.run(20)
    there.add("b", 1.0)
    there.run(120)
    since = there.clock.now - 100
    assert there.trials("a", since) / there.trials("b", since) == pytest.approx(3, rel=0.15)
    assert (there.at_work["a"], there.at_work["b"]) == (6, 2)


@pytest.mark.parametrize(("priorities", "cpus"), [((2, 1), 8), ((1, 1), 3), ((5, 3), 4), ((1, 1, 1), 8)])
def test_what_rounding_takes_comes_back_in_turns(priorities, cpus):
    there = Simulated([(float(cpus), 0.0)])
    for name, priority in enumerate(priorities):
        there.add(str(name), priority)
    there.run(3000)
    for name, priority in enumerate(priorities):
        expected = cpus * priority / sum(priorities) * 3000 / there.trial_seconds
        assert there.trials(str(name)) == pytest.approx(expected, rel=0.08)


def test_more_sweeps_than_places_all_have_trials():
    there = Simulated([(2.0, 0.0)], trial_seconds=20.0)
    for name in range(5):
        there.add(str(name))
    there.run(20 * TURN)
    counts = [there.trials(str(name)) for name in range(5)]
    assert min(counts) > 0.6 * max(counts)


def test_a_trial_of_a_whole_node_has_its_turn_beside_small_ones():
    there = Simulated(EIGHT, trial_seconds=20.0)
    there.add("small")
    there.run(30)
    there.add("large", size=(8.0, 0.0))
    there.run(10 * TURN)
    assert there.trials("large") >= 8
    assert there.trials("small", since=30) >= 60


def test_a_third_sweep_begins_when_the_next_trial_ends():
    there = Simulated(EIGHT)
    there.add("a", 3.0)
    there.add("b", 1.0)
    there.run(60)
    there.add("c")
    came = there.clock.now
    there.run(20)
    assert there.begun["c"][0] - came < 1.2 * there.trial_seconds


def test_a_sweep_that_says_nothing_any_more_has_no_room_and_one_that_ends_none_at_once():
    clock = Clock()
    book = Book(clock)

    def ask(name, at_work=0):
        return book.report(EIGHT, name, CPU, 1.0, at_work, MANY)

    assert ask("a") == (8, 1)
    assert ask("b") == (0, 2)  # all places are given, and a's trials are not stopped
    assert ask("a", 8) == (4, 2)
    assert ask("b") == (0, 2)
    assert ask("a", 7) == (4, 2)
    assert ask("b") == (1, 2)
    clock.now = LEASE / 2
    assert ask("b", 1) == (1, 2)
    clock.now = LEASE + 0.1
    assert ask("b", 1) == (8, 1)
    assert ask("a", 7) == (0, 2)  # back again: what it had is given
    book.leave("b")
    assert ask("a", 7) == (8, 1)


def test_a_broker_that_was_begun_again_gives_nothing_before_all_have_told_what_they_have():
    clock = Clock()
    book = Book(clock)
    assert book.report(EIGHT, "a", CPU, 1.0, 4, MANY, 4) == (4, 1)
    assert book.report(EIGHT, "c", CPU, 1.0, 0, MANY) == (0, 2)
    assert book.report(EIGHT, "b", CPU, 1.0, 3, MANY, 4) == (3, 3)
    for clock.now in (LEASE - 1, LEASE + 1):
        book.report(EIGHT, "a", CPU, 1.0, 3, MANY, 4)
        book.report(EIGHT, "b", CPU, 1.0, 3, MANY, 3)
        room, _ = book.report(EIGHT, "c", CPU, 1.0, 0, MANY, 0)
    assert room == 2


# --- a sweep's side -----------------------------------------------------------------------------------------------------


class Answers:
    """Stands for the broker: answers what it is set to, when it is let; None for no answer at all."""

    def __init__(self, monkeypatch, *answer):
        self.answer, self.asked, self.gone = answer or None, [], []
        self.is_let = threading.Event()
        self.is_let.set()
        self.report = self.leave = self
        monkeypatch.setattr(broker, "_broker", lambda: self)
        monkeypatch.setattr(broker.ray, "get", lambda call, timeout: call())
        monkeypatch.setattr(broker, "_SECONDS_BETWEEN_REPORTS", 0.02)

    def remote(self, *words):
        def call():
            if len(words) == 1:
                return self.gone.append(words[0])
            self.asked.append(words)
            self.is_let.wait(20)
            if self.answer is None:
                raise RuntimeError("there is no broker")
            return self.answer

        return call


def wait_until(holds):
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_no_trial_begins_without_a_place_and_all_room_is_given_back(monkeypatch):
    there, notes = Answers(monkeypatch, 2, 1), []
    client = broker.Client("s", Share(1.0, 0.0), 3.0, notes.append)
    assert not client.take(), "nobody has been asked"
    with client.reporting():
        client.tell(0, 8)
        wait_until(client.has_room)
        assert client.take()
        assert client.take()
        assert not client.take()
        client.tell(1, 8)  # one of them was not begun
        wait_until(client.has_room)
        wait_until(lambda: there.asked[-1] == ("s", (1.0, 0.0), 3.0, 1, 8, 2))
        assert not client.is_full()
        there.answer = (1, 2)
        wait_until(client.is_full)
        client.tell(1, 8)
        assert notes == ["2 sweeps share the cluster; trials at once: 1"]
    assert there.gone == ["s"]


def test_while_an_answer_is_on_its_way_no_place_is_taken_that_it_may_be_about_to_give_away(monkeypatch):
    there = Answers(monkeypatch, 8, 1)
    client = broker.Client("s", Share(1.0, 0.0), 1.0, print)
    with client.reporting():
        client.tell(5, 8)
        wait_until(client.has_room)
        there.is_let.clear()
        wait_until(lambda: not client.has_room())
        client.tell(4, 8)  # a trial has ended: its place is the sweep's own, as far as the broker has been told
        assert client.take()
        assert not client.take()
        there.is_let.set()
        wait_until(client.has_room)


def test_a_sweep_that_gets_no_answer_goes_on_as_if_it_were_alone_until_there_is_one(monkeypatch):
    monkeypatch.setattr(broker, "PATIENCE", 0.3)
    there = Answers(monkeypatch)
    client = broker.Client("s", Share(1.0, 0.0), 1.0, print)
    assert not client.take()
    with client.reporting():
        wait_until(client.take)
        assert not client.is_full()
        there.answer = (1, 1)
        wait_until(lambda: not client.has_room())
