"""The moving average of the weights and the clipped gradient: what they are, and that nothing else is changed by them."""

import math

import formulas
import pytest
import torch
from test_simulated import sweep_of
from test_train import Recorder
from test_train import same_weights
from test_train import trial
from test_train import without_times

from tune_topkd.config import ConfigError
from tune_topkd.config import EmaConfig
from tune_topkd.config import RecipeConfig
from tune_topkd.config import what
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.search import Search
from tune_topkd.search import audit_decisions
from tune_topkd.sweep import preflight
from tune_topkd.train import train
from tune_topkd.train.checkpoint import load_checkpoint
from tune_topkd.train.loop import Training
from tune_topkd.train.optim import averaged
from tune_topkd.train.optim import trained_weights

EMA = {"ema": EmaConfig(decay_epochs=0.5)}


# --- the average ----------------------------------------------------------------------------------------------------


def test_the_average_is_the_one_of_its_formula():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ema = averaged(model, EmaConfig(decay_epochs=2.0), steps=5)
    decay, expected = math.exp(-1 / 10), None
    for _ in range(7):
        model(torch.randn(8, 3))  # moves the running statistics
        with torch.no_grad():
            model[0].weight += torch.randn(2, 3)
        ema.update_parameters(model)
        now = [model[0].weight.detach().clone(), model[1].running_mean.clone()]
        expected = (
            now if expected is None else [decay * e + (1 - decay) * n for e, n in zip(expected, now, strict=True)]
        )
    torch.testing.assert_close(ema.module[0].weight.detach(), expected[0])
    torch.testing.assert_close(ema.module[1].running_mean, expected[1])


@pytest.mark.parametrize("augment", [True, False])
def test_the_training_is_the_same_bit_for_bit_with_it_and_without(augment):
    plain, with_ema = Recorder(), Recorder()
    one = train(trial(), plain)
    other = train(trial(recipe=EMA), with_ema)
    assert same_weights(one.model, other.model)
    for before, after in zip(plain.metrics, with_ema.metrics, strict=True):
        assert without_times(before) == {k: v for k, v in without_times(after).items() if k != "val_top1_ema"}
    values = [metrics["val_top1_ema"] for metrics in with_ema.metrics]
    assert len(set(values)) > 1
    assert values != [metrics["val_top1"] for metrics in with_ema.metrics]


def test_a_training_that_was_interrupted_goes_on_with_its_average(tmp_path):
    config, whole, rest = (
        trial(recipe=EMA),
        Recorder(tmp_path, save_at=(2, 4)),
        Recorder(tmp_path / "rest", save_at=(4,)),
    )
    train(config, whole)
    train(config, rest, resume_from=tmp_path / "2")
    assert [without_times(m) for m in rest.metrics] == [without_times(m) for m in whole.metrics[2:]]
    kept = [load_checkpoint(folder / "4")["ema"] for folder in (tmp_path, tmp_path / "rest")]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_a_checkpoint_is_not_resumed_with_another_average(tmp_path):
    train(trial(recipe=EMA), Recorder(tmp_path, save_at=(2,)))
    for other in ({}, {"ema": EmaConfig(decay_epochs=0.9)}):
        with pytest.raises(ValueError, match=r"recipe\.ema"):
            train(trial(recipe=other), resume_from=tmp_path / "2")


# --- the gradient ---------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_too_long_is_scaled_down_and_a_shorter_one_is_left():
    lengths = {}
    for limit in (None, 1e-3, 1e9):
        torch.manual_seed(0)
        training = Training(trial(recipe={"clip_grad": limit, "momentum": 0.0, "weight_decay": 0.0, "lr": 0.5}))
        before = [w.detach().clone() for w in trained_weights([training.model])]
        next(iter(training.steps()))
        after = trained_weights([training.model])
        lengths[limit] = math.sqrt(
            sum(float(((a.detach() - b) / 0.5).square().sum()) for a, b in zip(after, before, strict=True))
        )
    assert lengths[None] == lengths[1e9] > 0.01
    assert lengths[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_a_clipped_training_is_another_one():
    assert not same_weights(train(trial()).model, train(trial(recipe={"clip_grad": 0.1})).model)


def test_what_came_later_names_nothing_new_where_it_is_off():
    """So teachers, banks and checkpoints of versions without it keep their names."""
    content = what(trial())
    assert {"clip_grad", "ema"} & content["recipe"].keys() == set()
    assert what(trial(recipe={"clip_grad": 1.0}))["recipe"]["clip_grad"] == 1.0
    assert what(trial(recipe=EMA))["recipe"]["ema"] == {"decay_epochs": 0.5}


def test_a_space_can_search_the_clip_and_begins_with_the_recipes():
    clip = {"clip_grad": {"low": 0.1, "high": 10.0, "log": True}, "lr": {"low": 0.01, "high": 1.0, "log": True}}
    raw = formulas.sweep_config().model_dump(mode="json") | {"space": clip, "relative": None}
    raw["recipe"]["clip_grad"] = 1.0
    config = preflight.load_checked(raw).config
    assert preflight.first_proposals(config) == [{"clip_grad": 1.0, "lr": 0.1}]
    raw["recipe"]["clip_grad"] = None
    assert preflight.first_proposals(preflight.load_checked(raw).config) == [], "none is no value of the range"


# --- what trials are compared by --------------------------------------------------------------------------------------


def crossed(trial, epoch):
    """Trials whose averages say the opposite of their raw values until the last epoch."""
    top = formulas.value(trial.config, epoch)
    return {"val_top1": top if epoch == formulas.EPOCHS else 100 - top, "val_top1_ema": top}


def ema_sweep(path, formula=crossed, **more):
    return sweep_of(path, formula, recipe={"ema": {"decay_epochs": 0.4}}, **more)


def config_of(**sections):
    return formulas.sweep_config(
        sweep={"trials": 30, "startup_trials": 4, "asha": {"grace_epochs": 1}},
        baselines=None,
        recipe={"ema": {"decay_epochs": 0.4}, **sections},
    )


def test_trials_are_compared_by_the_average_where_there_is_one(tmp_path):
    _, state, reason = ema_sweep(tmp_path / "l.jsonl")
    assert (reason, audit_decisions(config_of(), read_events(tmp_path / "l.jsonl")[0])[0]) == ("finished", [])
    _, by_raw, _ = ema_sweep(tmp_path / "raw.jsonl", rung_metric="val_top1")
    assert state.best().value > by_raw.best().value, "raw values stop the better ones"
    assert state.best().value == max(r.value for r in state.arm("search") if r.decision is Decision.COMPLETE)
    ended = {r.key: r.reports[r.epoch]["val_top1"] for r in state.arm("search")}
    assert {r.key: r.value for r in state.arm("search")} == ended, "what is told of a trial is its objective"


def test_a_sweep_killed_anywhere_decides_by_the_average_as_if_it_had_not_been(tmp_path):
    _, whole, _ = ema_sweep(tmp_path / "whole.jsonl", at_once=1)
    for reports in (1, 7, 40, 90):
        path = tmp_path / f"{reports}.jsonl"
        ema_sweep(path, at_once=1, reports=reports)
        _, state, _ = ema_sweep(path, at_once=1)
        assert [(r.key, r.params, r.status, r.reports) for r in state.arm("search")] == [
            (r.key, r.params, r.status, r.reports) for r in whole.arm("search")
        ]


def test_optuna_is_told_the_average_of_what_was_stopped_and_the_objective_of_what_was_not(tmp_path):
    ema_sweep(tmp_path / "l.jsonl")
    with Ledger.open(tmp_path / "l.jsonl") as ledger:
        told = Search(config_of(), ledger).sampler.study.get_trials(deepcopy=False)
    for record, trial_told in zip(read_state(tmp_path / "l.jsonl").arm("search"), told, strict=True):
        assert trial_told.intermediate_values == {e: m["val_top1_ema"] for e, m in record.reports.items()}
        assert trial_told.value in (None, record.value) or record.decision is Decision.PRUNE


def test_the_average_cannot_be_compared_by_where_there_is_none():
    raw = formulas.sweep_config().model_dump(mode="json")
    raw["sweep"]["rung_metric"] = "val_top1_ema"
    with pytest.raises(ConfigError, match=r"sweep\.rung_metric = 'val_top1_ema': needs recipe\.ema"):
        preflight.load_checked(raw)
    with pytest.raises(ConfigError, match=r"recipe\.clip_grad = 0\.0"):
        preflight.load_checked({**raw, "recipe": {**raw["recipe"], "clip_grad": 0.0}})
    assert RecipeConfig(epochs=1).ema is None
