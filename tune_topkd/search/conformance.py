"""What every sampler and every scheduler must hold, to be run against a class of one's own.

from tune_topkd.search.conformance import check_sampler

def test_mine():
    check_sampler(MySampler)
"""

import random
from collections.abc import Callable
from collections.abc import Sequence

from tune_topkd.config import OBJECTIVE
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Content
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Event
from tune_topkd.ledger import Header
from tune_topkd.ledger import Report
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.search.samplers import Sampler
from tune_topkd.search.samplers import SamplerFactory
from tune_topkd.search.samplers import proposal_problem
from tune_topkd.search.schedulers import Scheduler
from tune_topkd.space import Axis

AXES = (
    Axis("k", "int", 1, 20, log=True),
    Axis("scale_top", "float", 1.0, 4.0),
    Axis("lr", "float", 0.01, 0.5, log=True),
    Axis("batch_size", "int", 32, 256),
    Axis("normalize", "choice", choices=(True, False)),
)
"""One of each kind."""

_TRIALS = 24
_EPOCHS = 9
_STOPPABLE = 12


def check_sampler(make: SamplerFactory, axes: Sequence[Axis] = AXES) -> None:
    """Run a sampler against the protocol.

    Args:
        make: makes one for axes and a seed.
        axes: that it is to propose on.

    Raises:
        AssertionError: it breaks a rule; says which.
    """
    history = _history(make, axes, seed=1)
    for record in history:
        problem = proposal_problem(record.proposal, axes)
        assert not problem, problem
    assert [r.proposal for r in _history(make, axes, seed=1)] == [r.proposal for r in history], (
        "the same seed and the same history must give the same proposals"
    )
    assert [r.proposal for r in _history(make, axes, seed=2)] != [r.proposal for r in history], (
        "another seed must give other proposals"
    )
    for length in (0, 1, _TRIALS // 2, _TRIALS):
        rebuilt, again = (_rebuilt(make(axes, 1), history[:length]) for _ in range(2))
        asked = rebuilt.ask(length)
        assert rebuilt.ask(length) == asked, "asking must enter nothing: asked again it must propose the same"
        assert again.ask(length) == asked, "made anew from the same trials it must propose the same"


def check_scheduler(make: Callable[[], Scheduler]) -> None:
    """Run a scheduler against the protocol.

    Args:
        make: makes one that has seen nothing, for trials of 9 epochs.

    Raises:
        AssertionError: it breaks a rule; says which.
    """
    first, decisions = make(), []
    contents: list[Content] = [Suggest(key=TrialKey(SEARCH, n), proposal={}, params={}) for n in range(_STOPPABLE)]
    stopped: set[TrialKey] = set()
    for key, epoch, value in _reports():
        if key in stopped:
            continue
        decisions.append(first.decide(key, epoch, value))
        contents.append(Report(key=key, epoch=epoch, metrics={OBJECTIVE: value}, decision=decisions[-1]))
        if decisions[-1] is not Decision.CONTINUE:
            stopped.add(key)
    known = {Decision.CONTINUE, Decision.PRUNE}
    assert set(decisions) <= known, f"a decision must be continue or prune, but there is {set(decisions) - known}"
    replayed = make()
    replayed.replay(_state_of(contents))
    after = [(TrialKey(SEARCH, 100 + n), epoch, 5.0 * n) for n in range(10) for epoch in range(1, _EPOCHS)]
    assert [first.decide(*report) for report in after] == [replayed.decide(*report) for report in after], (
        "after a replay of the ledger it must decide as the one that took the reports"
    )


def _state_of(contents: Sequence[Content]) -> SweepState:
    state = SweepState()
    for seq, content in enumerate([Header(sweep="s", id="0", seed=0, trials=len(contents)), *contents]):
        state.apply(Event(seq, 0.0, content))
    return state


def _history(make: SamplerFactory, axes: Sequence[Axis], seed: int) -> list[TrialRecord]:
    """Trials as a sampler proposes them, of which some fail, some are stopped, and up to three are at work at once."""
    sampler, chance = make(axes, seed), random.Random(0)  # noqa: S311 (no secret)
    records: list[TrialRecord] = []
    at_work: list[TrialRecord] = []
    for number in range(_TRIALS):
        proposal = sampler.take(number, sampler.ask(number))
        records.append(TrialRecord(TrialKey(SEARCH, number), params=proposal, proposal=proposal))
        at_work.append(records[-1])
        if len(at_work) == 3:
            ended = at_work.pop(chance.randrange(3))
            _end(ended, chance)
            sampler.tell(ended)
    return records


def _end(record: TrialRecord, chance: random.Random) -> None:
    record.status = chance.choice([TrialStatus.COMPLETED, TrialStatus.PRUNED, TrialStatus.FAILED])
    epochs = _EPOCHS if record.status is TrialStatus.COMPLETED else chance.randrange(_EPOCHS)
    record.reports = {epoch: {OBJECTIVE: chance.uniform(10, 90)} for epoch in range(1, epochs + 1)}
    if record.status is not TrialStatus.FAILED and record.reports:
        record.value = record.reports[epochs][OBJECTIVE]


def _rebuilt(sampler: Sampler, records: Sequence[TrialRecord]) -> Sampler:
    """As `Search` brings a new sampler to where a ledger is."""
    for record in records:
        sampler.take(record.key.number, record.proposal)
        if record.status.is_end:
            sampler.tell(record)
    return sampler


def _reports() -> list[tuple[TrialKey, int, float]]:
    """Of trials beside one another, in the order in which they come."""
    chance = random.Random(0)  # noqa: S311 (no secret)
    epochs = [number for number in range(_STOPPABLE) for _ in range(1, _EPOCHS)]
    chance.shuffle(epochs)
    at = dict.fromkeys(range(_STOPPABLE), 0)
    found = []
    for number in epochs:
        at[number] += 1
        found.append((TrialKey(SEARCH, number), at[number], chance.uniform(0, 100)))
    return found
