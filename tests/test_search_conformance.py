"""The checks that samplers and schedulers are run against, on ours and on ones that break each rule."""

import itertools
import random

import pytest
from test_simulated import config

from tune_topkd.config import OBJECTIVE
from tune_topkd.ledger import Decision
from tune_topkd.search import Asha
from tune_topkd.search import RandomSampler
from tune_topkd.search import TpeSampler
from tune_topkd.search.conformance import check_sampler
from tune_topkd.search.conformance import check_scheduler


class Evolving:
    """A sampler as somebody else might write it: a small change of the best trial so far."""

    def __init__(self, axes, seed):
        self.axes, self.seed, self.best = axes, seed, None

    def ask(self, number):
        draw = random.Random(f"{self.seed} {number}")
        point = {axis.name: axis.at(draw.random()) for axis in self.axes}
        return point if self.best is None else self.best[1] | dict([draw.choice(list(point.items()))])

    def take(self, number, proposal):
        return dict(proposal)

    def tell(self, record):
        if record.value is not None and (self.best is None or record.value > self.best[0]):
            self.best = (record.value, dict(record.proposal))


class Counting(Evolving):
    calls = itertools.count()

    def ask(self, number):
        return super().ask(next(self.calls))


class Outside(Evolving):
    def ask(self, number):
        return super().ask(number) | {"k": 21}


class OfAnotherType(Evolving):
    def ask(self, number):
        return super().ask(number) | {"scale_top": 2}


class Forgetful(Evolving):
    def ask(self, number):
        return dict(list(super().ask(number).items())[:-1])


class Unseeded(Evolving):
    def __init__(self, axes, seed):
        super().__init__(axes, 0)


class Impatient(Evolving):
    """Learns at once that it was asked, so that it says something else the next time."""

    def ask(self, number):
        found = super().ask(number)
        self.seed += 1
        return found


@pytest.mark.parametrize("make", [lambda axes, seed: TpeSampler(axes, seed, 4), RandomSampler, Evolving])
def test_samplers_that_conform(make):
    check_sampler(make)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (Counting, "same seed and the same history"),
        (Outside, "k must be from 1 to 20, not 21"),
        (OfAnotherType, "scale_top must be of type float, not int"),
        (Forgetful, "must name every axis"),
        (Unseeded, "another seed"),
        (Impatient, "asking must enter nothing"),
    ],
)
def test_samplers_that_do_not(make, rule):
    with pytest.raises(AssertionError, match=rule):
        check_sampler(make)


class Median:
    """Stops what is below the median at its epoch."""

    def __init__(self):
        self.values = {}

    def decide(self, key, epoch, value):
        seen = self.values.setdefault(epoch, [])
        seen.append(value)
        return Decision.PRUNE if value < sorted(seen)[len(seen) // 2] else Decision.CONTINUE

    def replay(self, state):
        for record in state.arm("search"):
            for epoch, metrics in record.reports.items():
                self.values.setdefault(epoch, []).append(metrics[OBJECTIVE])


class WithoutReplay(Median):
    def replay(self, state):
        pass


class Completing(Median):
    def decide(self, key, epoch, value):
        return Decision.COMPLETE


def test_schedulers_that_conform():
    check_scheduler(lambda: Asha(config()))
    check_scheduler(lambda: Asha(config(asha=None)))
    check_scheduler(Median)


@pytest.mark.parametrize(("make", "rule"), [(WithoutReplay, "after a replay"), (Completing, "continue or prune")])
def test_schedulers_that_do_not(make, rule):
    with pytest.raises(AssertionError, match=rule):
        check_scheduler(make)
