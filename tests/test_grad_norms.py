"""The norms of the gradient by term: what they are, and that asking for them changes nothing."""

import math
import sys

import pytest
import torch
from test_train import DIGITS
from test_train import Recorder
from test_train import same_weights
from test_train import trial
from test_train import without_times

from tune_topkd.config import AugmentConfig
from tune_topkd.config import ConfigError
from tune_topkd.config import EmaConfig
from tune_topkd.config import ModelConfig
from tune_topkd.config import config_from
from tune_topkd.config import what
from tune_topkd.models import build_configured
from tune_topkd.models import save_weights
from tune_topkd.sweep.workspace import PLACES
from tune_topkd.train import GRAD_NORM
from tune_topkd.train import train
from tune_topkd.train.loop import Training
from tune_topkd.train.optim import trained_weights

LOG = {"log_grad_norms": True}
TERMS = {
    "topkd": ("ce", "tdl", "contrastive"),
    "kd+topkd": ("ce", "base", "tdl"),
    "kd": ("ce", "kd"),
    "ce": ("ce",),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """What a config of a method that needs a teacher has more: one that is not trained."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    config = ModelConfig(name="digits_cnn", kwargs={"widths": [6]})
    torch.manual_seed(0)
    save_weights(build_configured(config, num_classes=10), path)
    return {"teacher": config, "teacher_checkpoint": str(path)}


def without_norms(metrics):
    return {name: value for name, value in without_times(metrics).items() if not name.startswith(GRAD_NORM)}


@pytest.mark.parametrize(("method", "terms"), TERMS.items())
def test_the_training_is_the_same_bit_for_bit_with_them_and_without(teacher, method, terms):
    ran, given = [], {} if method == "ce" else teacher
    for recipe in ({}, LOG):
        recorder = Recorder()
        ran.append((train(trial(method, recipe=recipe, **given), recorder).model, recorder.metrics))
    (plain, before), (logged, after) = ran
    assert same_weights(plain, logged)
    assert [without_times(metrics) for metrics in before] == [without_norms(metrics) for metrics in after]
    names = {GRAD_NORM, *(f"{GRAD_NORM}_{term}" for term in terms)}
    for metrics in after:
        assert {name for name in metrics if name.startswith(GRAD_NORM)} == names
        assert all(metrics[name] > 0 for name in names)


def test_it_is_so_with_all_that_touches_the_gradient(teacher, tmp_path):
    """Clipping, a warm-up of the distillation, mixed-up images, a moving average, an interruption."""
    recipe = {"clip_grad": 0.5, "distill_warmup": 2, "ema": EmaConfig(decay_epochs=0.5)}
    given = teacher | {"data": DIGITS.model_copy(update={"augment": AugmentConfig(mixup=0.4)})}
    plain = train(trial("kd", recipe=recipe, **given))
    logged = train(trial("kd", recipe=recipe | LOG, **given), Recorder(tmp_path, save_at=(2,)))
    assert same_weights(plain.model, logged.model)
    resumed = train(trial("kd", recipe=recipe, **given), resume_from=tmp_path / "2")
    assert same_weights(plain.model, resumed.model), "a checkpoint is gone on from with them or without"


def test_the_norms_are_those_of_the_gradients(teacher):
    weighted = {"ce": 1.0, "tdl": 2.0, "contrastive": 0.5}
    loss = {f"{name}_weight": weight for name, weight in weighted.items()}
    training = Training(trial("topkd", recipe=LOG | {"clip_grad": 1e-3}, loss=loss, **teacher))
    expected, measure = {}, training._term_grad_norms

    def by_two_ways(terms):
        expected.update(by_hand(training, terms, weighted))
        return measure(terms)

    training._term_grad_norms = by_two_ways
    next(iter(training.steps()))
    (measured,) = training.grad_norms
    assert measured.tolist() == pytest.approx([expected[name] for name in ("all", *weighted)], rel=1e-5)
    assert measured[0] > 1e-3, "before it is clipped"


def test_what_the_loss_itself_learns_is_part_of_the_gradient(teacher, monkeypatch):
    class Learning(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, student, teacher, labels):
            return (self.scale * 100 - student.mean()).square()

    monkeypatch.setattr(sys.modules[__name__], "Learning", Learning, raising=False)
    training = Training(trial(f"{__name__}:Learning", recipe=LOG, **teacher))
    next(iter(training.steps()))
    (measured,) = training.grad_norms
    assert measured.shape == (2,)
    assert measured[0] == measured[1]
    assert measured[1] >= training.loss.loss.scale.grad.abs() > 1e3


def by_hand(training, terms, weighted):
    """The lengths of the gradients of these terms, times their weights, and of their sum."""
    weights = trained_weights([training.model])
    grads = {
        name: torch.cat([g.flatten() for g in torch.autograd.grad(w * terms[name], weights, retain_graph=True)])
        for name, w in weighted.items()
    }
    return {name: float(grad.norm()) for name, grad in grads.items()} | {"all": float(sum(grads.values()).norm())}


def test_a_term_without_a_weight_has_no_gradient(teacher):
    metrics = train(trial("topkd", recipe=LOG | {"epochs": 1}, loss={"contrastive_weight": 0.0}, **teacher)).metrics
    assert metrics[f"{GRAD_NORM}_contrastive"] == 0.0
    assert metrics[f"{GRAD_NORM}_tdl"] > 0.0


def test_a_norm_that_is_not_finite_is_left_out():
    """A metric that is not finite ends a trial as diverged, which nothing that is only looked at may do."""
    training = Training(trial(recipe=LOG))
    training.grad_norms = [torch.tensor([1.0, math.inf, 2.0, math.nan])]
    found = training._mean_grad_norms(["train_loss", "train_ce", "train_tdl", "train_contrastive"])
    assert found == {GRAD_NORM: 1.0, f"{GRAD_NORM}_tdl": 2.0}


def test_it_is_a_key_that_changes_no_result():
    assert what(trial(recipe=LOG)) == what(trial())
    assert "recipe.log_grad_norms" in PLACES


def test_a_teacher_that_reports_nothing_is_not_asked_for_them():
    raw = {
        "data": {"name": "digits"},
        "teacher": {"name": "digits_cnn", "recipe": {"epochs": 1, "log_grad_norms": True}},
        "student": "digits_cnn_tiny",
        "recipe": {"epochs": 2, "milestones": [1]},
        "space": {"lr": {"low": 0.1, "high": 1.0}},
    }
    with pytest.raises(ConfigError, match=r"teacher\.recipe\.log_grad_norms = True: is of the student's trainings"):
        config_from(raw, "test")
