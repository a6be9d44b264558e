"""The look at the test set: which trials are measured on it, on which seeds, and what that gave.

A sweep's search and its finalists are chosen by the validation split. Once, at the end, the answer and the best trial of
each baseline are trained again, on seeds that took no part in any choice, on the images of the validation split too; and
each of these trainings is evaluated on the test set after its last epoch. All of it is a function of the ledger.
"""

import statistics
from collections.abc import Sequence

from tune_topkd.ledger.events import TEST
from tune_topkd.ledger.events import Confirm
from tune_topkd.ledger.events import Look
from tune_topkd.ledger.finalists import Finalist
from tune_topkd.ledger.finalists import baseline_trials
from tune_topkd.ledger.finalists import different
from tune_topkd.ledger.finalists import finalist_of
from tune_topkd.ledger.finalists import finalists_to_repeat
from tune_topkd.ledger.finalists import unrepeated
from tune_topkd.ledger.finalists import winner_of
from tune_topkd.ledger.state import SweepState
from tune_topkd.ledger.state import TrialRecord

MOST_SEEDS = 1000
"""That a stage may have, so that no seed is of two stages."""
_SEEDS_APART = 10 * MOST_SEEDS


def candidates(state: SweepState) -> list[TrialRecord]:
    """The search's trials of the full budget, the most promising first, by what is to be expected of each.

    That is the mean of its fresh seeds where it has any. The value of one seed that a trial was found by is too high by what
    it was lucky with: it counts less by the mean luck of those that have fresh seeds. Trials that fell apart on a seed come
    after all that did not.
    """
    ranked = state.ranked()
    known = [
        finalist_of(state, record, range(state.header.seed + 1, state.header.seed + 1 + MOST_SEEDS))
        for record in ranked
    ]
    luck = [finalist.luck for finalist in known if finalist.values]
    usual = statistics.fmean(luck) if luck else 0.0

    def rank(finalist: Finalist) -> tuple[int, float, int]:
        record, mean = finalist.record, finalist.mean
        expected = (record.value or 0.0) - usual if mean is None else mean
        return len(finalist.broken), -expected, record.key.number

    return [finalist.record for finalist in sorted(known, key=rank)]


def confirmation(state: SweepState, count: int, seeds: int, test_seeds: int) -> Confirm:
    """What the ledger is to say where the answer is to be confirmed, as the search stands.

    Args:
        state: the sweep.
        count: finalists; fewer where there are fewer with parameters of their own.
        seeds: on which each is trained again.
        test_seeds: on which the answer is then measured.
    """
    chosen = tuple(record.key for record in different(candidates(state), count))
    look = len(state.looks) + 1
    baselines = 1 if state.finalists is None else state.finalists.baselines
    of = state.size()
    return Confirm(finalists=chosen, seeds=seeds, test_seeds=test_seeds, of_trials=of, look=look, baselines=baselines)


def has_looked(state: SweepState) -> bool:
    """Whether the look at the test set that was asked for last has begun."""
    return state.confirm is not None and any(look.look == state.confirm.look for look in state.looks)


def due_look(state: SweepState) -> Look | None:
    """The look at the test set that comes next; none before the finalists are done, after it, or without an answer."""
    if state.confirm is None or state.running() or finalists_to_repeat(state):
        return None
    winner = winner_of(state)
    if winner is None or winner.finalist is None or has_looked(state):
        return None
    first = state.header.seed + _SEEDS_APART * state.confirm.look
    trials = (winner.record.key, *(record.key for record in baseline_trials(state)))
    return Look(look=state.confirm.look, trials=trials, seeds=tuple(range(first, first + state.confirm.test_seeds)))


def to_measure(state: SweepState) -> list[tuple[TrialRecord, int]]:
    """The trainings of the newest look that have not been begun, in the order in which they are to be."""
    if not state.looks:
        return []
    look = state.looks[-1]
    return unrepeated(state, [state.trials[key] for key in look.trials], look.seeds, TEST)


def is_confirmed(state: SweepState) -> bool:
    """Whether all has been done that was asked for to confirm the answer, as the search stands."""
    done = measured_done(state)
    return has_looked(state) and done is not None and done[0] == done[1]


def largest_seed(state: SweepState, seeds: int) -> int:
    """The largest seed of a look of so many that comes next."""
    return state.header.seed + _SEEDS_APART * (len(state.looks) + 1) + seeds - 1


def measured(state: SweepState) -> list[Finalist]:
    """What the newest look gave, the answer first, then the baselines; empty without one.

    The values are of the test set; those that the trials were found by are still of the validation split.
    """
    if not state.looks:
        return []
    look = state.looks[-1]
    return [finalist_of(state, state.trials[key], look.seeds, TEST) for key in look.trials]


def measured_done(state: SweepState) -> tuple[int, int] | None:
    """How many trainings of the newest look have ended, and of how many; none without one."""
    found = measured(state)
    if not found:
        return None
    return sum(f.repeats[seed].status.is_end for f in found for seed in f.seeds if seed in f.repeats), _total(found)


def _total(found: Sequence[Finalist]) -> int:
    return sum(len(finalist.seeds) for finalist in found)


def is_of_the_answer(state: SweepState) -> bool:
    """Whether the newest look has measured the trial that is the answer now."""
    winner = winner_of(state)
    return bool(state.looks) and winner is not None and state.looks[-1].trials[0] == winner.record.key
