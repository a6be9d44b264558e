"""One config for several pairs: what it is, and what it loses where."""

import json
import math
import statistics

import pytest
from test_confirm import EPOCHS
from test_confirm import config
from test_confirm import noise

from tune_topkd.config import OBJECTIVE
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Finalists
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import standings
from tune_topkd.ledger import winner_of
from tune_topkd.search import Search
from tune_topkd.sweep.campaign import as_csv
from tune_topkd.sweep.campaign import as_json
from tune_topkd.sweep.campaign import as_latex
from tune_topkd.sweep.campaign import as_markdown
from tune_topkd.sweep.preflight import complete_parameters
from tune_topkd.sweep.recommending import FEWEST
from tune_topkd.sweep.recommending import Loss
from tune_topkd.sweep.recommending import Recommendation
from tune_topkd.sweep.recommending import Searched
from tune_topkd.sweep.recommending import _foretold
from tune_topkd.sweep.recommending import recommended
from tune_topkd.verdict import Interval

WIDE = {"lr": {"low": 0.01, "high": 1.0, "log": True}, "k": {"low": 1, "high": 9}, "normalize": [True, False]}


def value_at(lr, best, width=0.5):
    """80 % at the best learning rate, a point less half a decade away, four a decade away."""
    return 80.0 - (math.log10(lr / best) / width) ** 2


def searched(path, best, name="t", space=WIDE, trials=24, finalists=(), formula=None, **sections):
    """A sweep over planted values, run; what became of it."""
    sweep = {"trials": trials, "startup_trials": 8, "asha": None, "max_concurrent": 1}
    if finalists:
        sweep["finalists"] = dict(zip(("count", "seeds"), finalists, strict=True))
    plan = config(space={}, **sections)
    plan = plan.model_copy(update={"space": config(space=space).space}) if space else plan
    plan = type(plan).model_validate(plan.model_dump() | {"sweep": {**plan.sweep.model_dump(), **sweep}})

    def values(trial, epoch):
        lr, loss = trial.config.recipe.lr, trial.config.loss
        value = formula(trial) if formula else value_at(lr, best) - 3 * (not loss.get("normalize", True))
        return {"val_top1": value + noise(trial.config.seed, trial.record.origin, 0.15) - (EPOCHS - epoch)}

    about = {"trials": trials, "num_classes": 10, "epochs": EPOCHS, "method": plan.method}
    with Ledger.create(path, Header(sweep=name, id="i", seed=0, **about), is_durable=False) as ledger:
        ledger.append(Driver.here(trials=trials, finalists=Finalists.configured(plan.sweep.finalists)))
        simulate(Search(plan, ledger), values, at_once=1)
        return Searched(plan, ledger.state, complete_parameters(plan))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two sweeps whose best learning rates are a decade apart."""
    folder = tmp_path_factory.mktemp("two")
    return [searched(folder / "low", 0.05, "low"), searched(folder / "high", 0.5, "high")]


def test_it_is_the_compromise_and_what_it_loses_is_nearly_the_truth(two):
    found = recommended(two)
    lr, best = found.params["lr"], (0.05, 0.5)
    assert found.params["normalize"] is True
    assert 0.08 < lr < 0.32  # each pair's own answer loses 4 points on the other, half way between loses 1
    own = [
        value_at(sweep.params_of(winner_of(sweep.state).record)["lr"], at) for sweep, at in zip(two, best, strict=True)
    ]
    for loss, top, at in zip(found.losses, own, best, strict=True):
        truth = top - value_at(lr, at)
        assert loss.points == pytest.approx(truth, abs=0.6)
        assert loss.how == "model"
        assert loss.interval.low < loss.points < loss.interval.high
        assert loss.interval.high - loss.interval.low < 3
    assert all(rank > 0.7 for rank in found.ranks.values())
    defaults = [value - value_at(0.1, at) for value, at in zip(own, best, strict=True)]
    assert [loss.points for loss in found.of_defaults] == pytest.approx(defaults, abs=0.8)
    assert max(loss.points for loss in found.losses) <= max(loss.points for loss in found.of_defaults)


def test_the_order_of_the_sweeps_changes_nothing_but_the_order(two):
    one, other = recommended(two), recommended(two[::-1])
    assert one.params == other.params
    assert [loss.sweep for loss in one.losses] == [loss.sweep for loss in other.losses][::-1] == ["low", "high"]


def test_what_was_trained_on_the_same_fresh_seeds_is_measured_not_foretold(tmp_path):
    points = [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.05}]
    both = [
        searched(tmp_path / n, at, n, space={"lr": {"low": 0.01, "high": 1.0, "log": True}}, trials=9, finalists=(9, 3),
                 sweep={"points": points}, formula=lambda trial, at=at: value_at(trial.config.recipe.lr, at, 1.0))
        for n, at in (("a", 0.09), ("b", 0.12))
    ]  # fmt: skip
    found = recommended(both)
    shared = found.params["lr"]
    assert {loss.how for loss in found.losses} <= {"seeds", "own"}
    for sweep, loss in zip(both, found.losses, strict=True):
        ranked = {round(f.record.params["lr"], 6): f for f in standings(sweep.state)}
        answer, other = winner_of(sweep.state).finalist, ranked[round(shared, 6)]
        assert loss.points == pytest.approx(answer.mean - other.mean)
        if loss.how == "seeds":
            assert loss.seeds == 3
            apart = [answer.values[s] - other.values[s] for s in answer.values]
            assert loss.points == pytest.approx(statistics.fmean(apart))
    assert "3 fresh seeds" in "\n".join(found.lines()) or "it is the answer there" in "\n".join(found.lines())


def test_a_candidate_lies_in_the_spaces_of_all(tmp_path, two):
    narrow = searched(tmp_path / "narrow", 0.4, "narrow", space={**WIDE, "lr": {"low": 0.3, "high": 1.0, "log": True}})
    found = recommended([*two, narrow])
    assert 0.3 <= found.params["lr"] <= 1.0
    assert found.of_defaults == (), "the defaults' learning rate is not in the third space"
    held = searched(tmp_path / "held", 0.4, "held", space={n: r for n, r in WIDE.items() if n != "k"}, loss={"k": 3})
    assert recommended([*two, held]).params.get("k") in (None, 3)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"trials": 5}, f"s has 6 full trials of its method, and a model needs {FEWEST}"),
        (
            {"space": {**WIDE, "lr": {"low": 2.0, "high": 3.0}}},
            "no full trial of any of them lies in the spaces of all",
        ),
        ({"method": "kd", "space": {"lr": WIDE["lr"]}}, "they are of several methods (kd, topkd)"),
    ],
)
def test_where_none_can_be_recommended_it_is_said_why(tmp_path, two, change, why):
    if "method" in change:
        other = Searched(two[0].config.model_copy(update={"method": "kd"}), two[0].state, two[0].complete)
    else:
        other = searched(tmp_path / "s", 0.4, "s", **change)
    found = recommended([two[0], other])
    assert (found.why_none, found.params) == (why, {})
    assert found.lines() == [f"No config is recommended for all: {why}."]


def test_one_sweep_needs_none(two):
    assert recommended(two[:1]) is None
    assert "One config" not in as_markdown([])


def test_stopped_trials_count_with_what_their_last_epoch_foretells(two):
    done = [r for r in two[0].state.ranked() if r.status is TrialStatus.COMPLETED]
    record = done[0]
    stopped = type(record)(record.key, record.params, record.proposal, reports={1: record.reports[1]})
    assert _foretold(stopped, done, OBJECTIVE) == pytest.approx(record.value)
    assert _foretold(stopped, done[: FEWEST - 1], OBJECTIVE) is None


def test_a_model_that_foresees_little_is_named():
    weak = Recommendation(
        params={"lr": 0.1},
        origin="trial 1 of a",
        losses=[Loss("a", 0.5, Interval(0.0, 1.0), "model"), Loss("b", 1.5, None, "model")],
        ranks={"a": 0.2, "b": 0.9},
    )
    text = "\n".join(weak.lines())
    assert "(rank correlation 0.20 on those left out, which foresees little); not trained there" in text
    assert "(rank correlation 0.90 on those left out); not trained there" in text
    assert "it loses 1.50 points at most, on b." in text


def test_every_format_says_it_but_csv(two):
    found = recommended(two)
    assert "\nOne config for all 2: lr=" in as_markdown([], found)
    assert json.loads(as_json([], found))["recommended"]["params"] == found.params
    assert "% One config for all 2: " in as_latex([], found)
    assert as_csv([], found) == as_csv([])


def test_the_page_of_a_campaign_shows_it(two, tmp_path):
    from tune_topkd.sweep.page import findings_from
    from tune_topkd.sweep.page import page_of

    found = [findings_from(s.config, s.state, tmp_path, "finished", lambda *words: " ".join(words)) for s in two]
    page, told = page_of(found), recommended(two).told()
    assert told.sentence in page
    for row in told.rows:
        assert all(f">{cell}<" in page for cell in row)
    assert "One config for all" not in page_of(found[:1])
