"""The samplers besides TPE: what each is to do beyond the protocol, which `test_choosing.py` holds all of them to."""

import math
import random
import subprocess
import sys

import numpy as np
import optuna
import pytest

from tune_topkd.config import OBJECTIVE
from tune_topkd.config import OBJECTIVE_EMA
from tune_topkd.config import SAMPLERS
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.search import CmaesSampler
from tune_topkd.search import GpSampler
from tune_topkd.search import QmcSampler
from tune_topkd.search import RandomSampler
from tune_topkd.search import TpeSampler
from tune_topkd.search.conformance import AXES
from tune_topkd.space import Axis
from tune_topkd.space import startup_trials_of

with_gp = pytest.mark.skipif(int(optuna.__version__.partition(".")[0]) < 5, reason="the sampler gp needs Optuna 5")
SAMPLER_CASES = [pytest.param(name, marks=with_gp if name == "gp" else ()) for name in SAMPLERS]
"""The samplers by name, those left out that the installed Optuna is too old for."""
SWEEP_CASES = [pytest.param(name, marks=(with_gp, pytest.mark.slow) if name == "gp" else ()) for name in SAMPLERS]
"""The same for whole sweeps, of which those of the Gaussian process take long."""

PLANE = (Axis("x", "float", 0.0, 1.0), Axis("y", "float", 0.01, 100.0, log=True))
CHOICES = (Axis("kind", "choice", choices=("a", "b", "c")),)


def height(proposal):
    """Best at x = 0.8, y = 10."""
    return 90 - 40 * abs(proposal["x"] - 0.8) - 10 * abs(math.log10(proposal["y"]) - 1)


def record_of(number, proposal, status=TrialStatus.COMPLETED, value=None, epochs=9):
    record = TrialRecord(TrialKey(SEARCH, number), params=dict(proposal), proposal=dict(proposal), status=status)
    if status is not TrialStatus.FAILED:
        record.reports = {epoch: {OBJECTIVE: value, OBJECTIVE_EMA: value} for epoch in range(1, epochs + 1)}
        record.value = value
    return record


def search(sampler, trials, value=height, at_once=1):
    """The proposals of a search in which trials end in the order of their beginnings, so many at once."""
    at_work, proposals = [], []
    for number in range(trials):
        proposals.append(sampler.take(number, sampler.ask(number)))
        at_work.append((number, proposals[-1]))
        if len(at_work) == at_once:
            ended, proposal = at_work.pop(0)
            sampler.tell(record_of(ended, proposal, value=value(proposal)))
    return proposals


def test_nothing_of_torch_is_imported_with_the_samplers():
    code = "import sys, tune_topkd.search; sys.exit(bool({'torch', 'cmaes'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("axis", [*AXES[:4], *PLANE, Axis("one", "float", 2.0, 2.0)])
def test_the_share_of_a_value_leads_back_to_it(axis):
    for share in (0.0, 0.21, 0.5, 1.0):
        value = axis.at(share)
        assert axis.at(axis.share(value)) == pytest.approx(value)
    assert 0.0 <= axis.share(axis.low) <= axis.share(axis.high) <= 1.0


@pytest.mark.parametrize(("axes", "startup"), [(1, 10), (5, 10), (6, 12), (14, 28)])
def test_there_are_two_random_proposals_for_each_axis_and_at_least_ten(axes, startup):
    many = [Axis(f"x{n}", "float") for n in range(axes)]
    assert startup_trials_of(axes) == startup
    assert TpeSampler(many, 0)._startup_trials == GpSampler(many, 0)._startup_trials == startup
    assert TpeSampler(many, 0, startup_trials=3)._startup_trials == 3


# --- QMC ------------------------------------------------------------------------------------------------------------


def test_the_points_of_qmc_are_those_of_the_sequence_by_number():
    sampler = QmcSampler(PLANE, 3)
    points = [sampler.ask(number)["x"] for number in range(64)]
    for n in range(64):  # of a power of two of points there is one in each interval of that many
        assert sum(n / 64 <= x < (n + 1) / 64 for x in points) == 1, n
    other = QmcSampler(PLANE, 3)
    assert [other.ask(n)["x"] for n in (40, 7, 63)] == [points[n] for n in (40, 7, 63)], "whatever was asked before"


def test_qmc_is_even_over_choices_too():
    sampler = QmcSampler([*PLANE, *CHOICES], 0)
    drawn = [sampler.ask(number)["kind"] for number in range(63)]
    assert {kind: drawn.count(kind) for kind in "abc"}.keys() == set("abc")
    assert all(19 <= drawn.count(kind) <= 23 for kind in "abc")


# --- CMA-ES ---------------------------------------------------------------------------------------------------------


def test_cmaes_comes_to_the_better_region():
    late = [search(CmaesSampler(PLANE, seed), 60)[-15:] for seed in range(3)]
    rnd = [search(RandomSampler(PLANE, seed), 60)[-15:] for seed in range(3)]
    of_cmaes, of_random = (np.mean([height(p) for ps in found for p in ps]) for found in (late, rnd))
    assert of_cmaes > of_random + 10


def test_cmaes_starts_around_the_first_trial():
    sampler = CmaesSampler(PLANE, 0)
    sampler.take(0, {"x": 0.2, "y": 0.1})
    drawn = [sampler.ask(number) for number in range(1, 200)]
    assert np.mean([p["x"] for p in drawn]) == pytest.approx(0.2, abs=0.06)
    assert np.mean([math.log10(p["y"]) for p in drawn]) == pytest.approx(-1, abs=0.3)


def test_cmaes_is_the_same_in_whatever_order_trials_end_and_goes_by_ranks():
    proposals = search(RandomSampler(PLANE, 5), 30)
    asked = []
    for order, value in (
        (range(30), height),
        (random.Random(0).sample(range(30), 30), height),
        (range(30), lambda p: height(p) ** 3),
    ):
        sampler = CmaesSampler(PLANE, 0)
        for number, proposal in enumerate(proposals):
            sampler.take(number, proposal)
        for number in order:
            sampler.tell(record_of(number, proposals[number], value=value(proposals[number])))
        asked.append(sampler.ask(30))
    assert asked[0] == asked[1] == asked[2]


def test_cmaes_ranks_completed_before_stopped_before_failed():
    sampler = CmaesSampler(PLANE, 0, OBJECTIVE_EMA)
    records = [
        record_of(0, {}, TrialStatus.FAILED),
        record_of(1, {}, TrialStatus.PRUNED, 80.0, epochs=1),
        record_of(2, {}, TrialStatus.PRUNED, 30.0, epochs=3),
        record_of(3, {}, TrialStatus.PRUNED, 40.0, epochs=3),
        record_of(4, {}, value=20.0),
        record_of(5, {}, value=25.0),
    ]
    for record in records:
        sampler.tell(record)
    assert sorted(sampler._ranks, key=sampler._ranks.get) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("axes", [CHOICES, PLANE[:1], (Axis("x", "float", 1.0, 1.0), *PLANE[:1])])
def test_cmaes_takes_any_number_of_axes(axes):
    sampler = CmaesSampler(axes, 0)
    proposals = search(sampler, 20, value=lambda p: 50.0)
    assert proposals == search(CmaesSampler(axes, 0), 20, value=lambda p: 50.0)
    assert len({tuple(p.values()) for p in proposals}) > 1


def test_the_choices_of_cmaes_are_drawn_by_the_seed_and_the_number():
    axes = [*PLANE, *CHOICES]
    sampler = CmaesSampler(axes, 4)
    proposals = search(sampler, 20)
    assert [p["kind"] for p in proposals] == [RandomSampler(axes, 4).ask(number)["kind"] for number in range(20)]


# --- the Gaussian process -------------------------------------------------------------------------------------------


@with_gp
def test_a_gaussian_process_comes_to_the_better_region():
    late = search(GpSampler(PLANE, 0, 5), 16)[-6:]
    assert np.median([height(p) for p in late]) > 80  # it looks at an edge now and then


@with_gp
def test_a_gaussian_process_does_not_propose_the_same_point_to_several_at_once():
    proposals = search(GpSampler(PLANE, 0, 5), 14, at_once=5)
    late = [(p["x"], math.log10(p["y"]) / 4) for p in proposals[9:]]
    nearest = min(math.dist(a, b) for n, a in enumerate(late) for b in late[:n])
    assert nearest > 1e-3


def told(sampler, statuses):
    """A sampler with trials of these statuses and values."""
    rnd = RandomSampler(PLANE, 1)
    for number, (status, value) in enumerate(statuses):
        proposal = sampler.take(number, rnd.ask(number))
        if status is not TrialStatus.RUNNING:
            sampler.tell(record_of(number, proposal, status, value, epochs=3))
    return sampler


@with_gp
def test_a_gaussian_process_is_shown_stopped_and_failed_trials_as_bad_ones():
    sampler = told(
        GpSampler(PLANE, 0, 1),
        [
            (TrialStatus.COMPLETED, 60.0),
            (TrialStatus.PRUNED, 40.0),
            (TrialStatus.PRUNED, 70.0),
            (TrialStatus.FAILED, None),
            (TrialStatus.RUNNING, None),
            (TrialStatus.COMPLETED, 50.0),
        ],
    )
    shown = sampler._shown(sampler._history())
    assert [trial.values for trial in shown] == [[60.0], [40.0], [50.0], [40.0], None, [50.0]]
    assert [trial.state.name for trial in shown] == ["COMPLETE"] * 4 + ["RUNNING", "COMPLETE"]
    assert sampler.study.trials[2].state.name == "PRUNED", "the study itself is told what happened"


@with_gp
def test_a_gaussian_process_leaves_a_region_that_always_fails():
    """Told of completed trials alone it would go on proposing what its process has seen nothing of."""
    sampler, failed = GpSampler(PLANE, 0, 6), []
    for number in range(18):
        proposal = sampler.take(number, sampler.ask(number))
        is_bad = proposal["x"] > 0.5
        failed.append(is_bad)
        status = TrialStatus.FAILED if is_bad else TrialStatus.COMPLETED
        sampler.tell(record_of(number, proposal, status, None if is_bad else 50 + 40 * proposal["x"]))
    assert sum(failed[-6:]) <= 3, failed


@with_gp
def test_a_gaussian_process_of_failures_alone_proposes():
    sampler = told(GpSampler(PLANE, 0, 2), [(TrialStatus.FAILED, None)] * 4)
    assert sampler.ask(4) == sampler.ask(4)


@with_gp
def test_a_gaussian_process_proposes_the_same_whatever_the_number_of_threads_and_leaves_it():
    import torch

    statuses = [(TrialStatus.COMPLETED, 50.0 + n % 7) for n in range(8)] + [(TrialStatus.RUNNING, None)] * 3
    before, asked = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            asked.append(told(GpSampler(PLANE, 0, 2), statuses).ask(11))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert asked[0] == asked[1]
