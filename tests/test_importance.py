"""Which parameters mattered, by trials whose values are a formula of one."""

import formulas
import numpy as np
import pytest

from tune_topkd.importance import MOST
from tune_topkd.importance import importances
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Decision
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Header
from tune_topkd.ledger import Report
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.space import Space

CONFIG = formulas.sweep_config()
EPOCHS = CONFIG.recipe.epochs


def state_of(trials, value, pruned=lambda number: number % 3):
    """Of so many random trials; all have the first epoch."""
    space, numbers = Space.of(CONFIG), np.random.default_rng(0)
    contents = [Header(sweep="s", id="0", seed=0, trials=trials, epochs=EPOCHS)]
    for number in range(trials):
        key = TrialKey(SEARCH, number)
        params = space.params({axis.name: axis.at(float(numbers.random())) for axis in space.axes()})
        status, last = (TrialStatus.PRUNED, 1) if pruned(number) else (TrialStatus.COMPLETED, EPOCHS)
        contents.append(Suggest(key=key, proposal={}, params=params))
        for epoch in range(1, last + 1):
            metrics = {"val_top1": value(params)}
            contents.append(Report(key=key, epoch=epoch, metrics=metrics, decision=Decision.CONTINUE))
        contents.append(End(key=key, epoch=last, status=status, reason="", value=value(params)))
    state = SweepState()
    for seq, content in enumerate(contents):
        state.apply(Event(seq, 0.0, content))
    return state


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", lambda params: 80.0 - params["k"]),
        ("lr", lambda params: 80.0 - 5 * abs(np.log10(params["lr"]) + 1)),
        ("normalize", lambda params: 80.0 + params["normalize"]),
    ],
)
def test_the_parameter_that_values_depend_on_is_the_most_important(name, value):
    found = importances(CONFIG, state_of(90, value))
    assert [(each.measure, each.trials, each.of) for each in found] == [
        ("fANOVA, full budget", 30, 30),
        ("fANOVA, at epoch 1", 90, 90),
        ("PED-ANOVA, at epoch 1", 90, 90),
    ]
    for each in found:
        assert max(each.shares, key=each.shares.__getitem__) == name
        assert set(each.shares) <= set(CONFIG.space)
        assert sum(each.shares.values()) == pytest.approx(1.0)


def test_of_many_trials_a_part_is_taken_and_that_is_said():
    first, second, _ = importances(CONFIG, state_of(400, lambda params: 80.0 - params["k"], lambda number: number % 8))
    assert (first.trials, first.of) == (50, 50)
    assert (second.trials, second.of) == (MOST, 400)


def test_few_trials_and_equal_values_say_nothing():
    assert importances(CONFIG, state_of(6, lambda params: 80.0 - params["k"])) == []
    assert importances(CONFIG, state_of(60, lambda params: 80.0)) == []
    assert importances(CONFIG, SweepState()) == []


def test_without_rungs_both_measures_are_of_the_full_budget():
    config = formulas.sweep_config(sweep={"asha": None})
    found = importances(config, state_of(40, lambda params: 80.0 - params["k"], lambda number: False))
    assert [each.measure for each in found] == ["fANOVA", "PED-ANOVA"]
