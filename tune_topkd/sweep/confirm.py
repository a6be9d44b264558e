"""Confirming a sweep's answer: what is asked for, whether it can be, and what it will cost."""

import statistics
from collections import Counter
from dataclasses import dataclass

from tune_topkd.config import LARGEST_SEED
from tune_topkd.config import ConfigError
from tune_topkd.config import Problem
from tune_topkd.config import SweepConfig
from tune_topkd.ledger import MOST_SEEDS
from tune_topkd.ledger import REPEAT
from tune_topkd.ledger import TEST
from tune_topkd.ledger import Confirm
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import baseline_trials
from tune_topkd.ledger import baselines_to_repeat
from tune_topkd.ledger import candidates
from tune_topkd.ledger import confirmation
from tune_topkd.ledger import different
from tune_topkd.ledger import finalists_done
from tune_topkd.ledger import has_looked
from tune_topkd.ledger import is_searched
from tune_topkd.ledger import largest_seed
from tune_topkd.ledger import to_measure
from tune_topkd.ledger import unrepeated
from tune_topkd.sweep.wording import counted
from tune_topkd.sweep.wording import duration


@dataclass(frozen=True)
class Plan:
    """What a person asks for."""

    finalists: int = 3
    """Of the search's trials, that are compared on fresh seeds."""
    seeds: int = 5
    """Of each of the two stages."""
    again: bool = False
    """Whether the test set may be read once more."""


def request(config: SweepConfig, state: SweepState, plan: Plan) -> Confirm | None:
    """The line that the ledger is to have; None where it has it, and what is left is done.

    Raises:
        ConfigError: the search is not over, has too few trials, or its test set has been read, and `again` is not said.
    """
    name, known = state.header.sweep, state.confirm
    _check_numbers(plan, state)
    wanted = (plan.finalists, plan.seeds, plan.seeds)
    is_same = known is not None and (len(known.finalists), known.seeds, known.test_seeds) == wanted
    if is_same and not plan.again and not _has_gone_on(state):
        return None
    if not is_searched(config, state):
        done = f"{state.counts()['completed']} of {state.target} trials reached the full budget"
        raise _refused("SWEEP", name, f"its search is not over ({done}): `resume {name}` first")
    if known is None and (repeats := finalists_done(state)) and repeats[0] < repeats[1]:
        rule = f"its finalists are not done ({repeats[0]} of {repeats[1]} trainings): `resume {name}` first"
        raise _refused("SWEEP", name, rule)
    if has_looked(state) and not plan.again:
        look = state.looks[-1]
        rule = (
            f"its test set has been read, for {counted(len(look.trials), 'config')} on {counted(len(look.seeds), 'seed')}: "
            "what a further look shows may have been chosen by the first. `--again` takes one, and the result is marked as "
            "one for ever"
        )
        raise _refused("SWEEP", name, rule)
    if state.running():
        raise _refused("SWEEP", name, f"trainings of it are under way: `resume {name}` first")
    there = len(different(candidates(state), plan.finalists))
    if not there:
        raise _refused("SWEEP", name, "no trial reached the full budget: there is nothing to confirm")
    if there < plan.finalists:
        rule = f"must be at most {there}, the trials of the full budget with parameters of their own"
        raise _refused("--finalists", plan.finalists, rule)
    return confirmation(state, plan.finalists, plan.seeds, plan.seeds)


def _has_gone_on(state: SweepState) -> bool:
    """Whether the search has had more trials since its answer was to be confirmed."""
    return state.confirm is not None and state.size() != state.confirm.of_trials


def _check_numbers(plan: Plan, state: SweepState) -> None:
    if plan.finalists < 1:
        raise _refused("--finalists", plan.finalists, "must be at least 1")
    if plan.seeds < 2:
        rule = (
            "must be at least 2: one training says nothing of how much the seed matters, so nothing could be told apart"
        )
        raise _refused("--seeds", plan.seeds, rule)
    if plan.seeds > MOST_SEEDS:
        raise _refused("--seeds", plan.seeds, f"must be at most {MOST_SEEDS}")
    if largest_seed(state, plan.seeds) > LARGEST_SEED:
        rule = f"needs seeds above {LARGEST_SEED:,}: begin the sweep with a lower sweep.seed"
        raise _refused("SWEEP", state.header.seed, rule)


def _refused(key: str, value: object, rule: str) -> ConfigError:
    return ConfigError("confirm", [Problem(key=key, rule=rule, value=value, has_value=True)])


@dataclass(frozen=True)
class Cost:
    """What confirming an answer will take."""

    to_choose: int
    """Trainings of the finalists and the baselines, that there are not yet."""
    to_measure: int
    """Trainings of the answer and the baselines for the test set."""
    trains_teacher: bool
    """Whether the teacher is trained again, on the images that the latter learn from."""
    seconds: float | None
    """Wall time, by the sweep's own trainings; none where they do not say."""

    def sentence(self) -> str:
        """In words."""
        about = "" if self.seconds is None else f"; about {duration(self.seconds)}, going by the sweep's own trainings"
        then = "then, after one of the teacher," if self.trains_teacher else "then"
        return (
            f"{counted(self.to_choose, 'training')} to choose among the finalists; {then} {self.to_measure} on all images "
            f"but the test set's, which is read once{about}"
        )


def cost(config: SweepConfig, state: SweepState, line: Confirm | None) -> Cost:
    """What is left to do.

    Args:
        config: the sweep's.
        state: the sweep.
        line: what `request` gave.
    """
    confirm = line or state.confirm
    assert confirm is not None, "it is asked for, or it is in the ledger"
    bases = baseline_trials(state)
    first, count = state.header.seed + 1, max(confirm.seeds, state.finalists.seeds if state.finalists else 0)
    chosen = [*(state.trials[key] for key in confirm.finalists), *baselines_to_repeat(state, confirm.baselines)]
    under_way = Counter(record.key.arm for record in state.running())
    to_choose = len(unrepeated(state, chosen, range(first, first + count))) + under_way[REPEAT]
    is_begun = line is None and has_looked(state)
    ahead = len(to_measure(state)) + under_way[TEST] if is_begun else (1 + len(bases)) * confirm.test_seeds
    each = _seconds_each(state)
    longer = 1 / (1 - config.data.val_fraction)  # the images of the validation split are trained on too
    is_trained = config.teacher is not None and config.teacher.recipe is not None and confirm is line
    return Cost(to_choose, ahead, is_trained, None if each is None else (to_choose + longer * ahead) * each)


def _seconds_each(state: SweepState) -> float | None:
    """Wall seconds of a training of the full budget, divided by how many run at once; none where no trial says."""
    done = [
        (r.suggested_at, r.ended_at)
        for r in state.trials.values()
        if r.ended_at is not None and r.status is TrialStatus.COMPLETED
    ]
    lasted = [end - begin for begin, end in done if end > begin]
    if not lasted:
        return None
    ended = [(r.suggested_at, r.ended_at) for r in state.trials.values() if r.ended_at is not None]
    at_once = [sum(begin < end <= other for begin, other in ended) for _, end in done]
    return statistics.median(lasted) / max(statistics.median(at_once), 1.0)
