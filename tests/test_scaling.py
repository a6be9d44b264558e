"""The rules of the scaling module: the linear one, and a user's."""

import sys

import formulas
import pytest
import torch

from tune_topkd.config import ConfigError
from tune_topkd.errors import TuneTopKDError
from tune_topkd.execution.simulated import SimulatedExecutor
from tune_topkd.export import load_tuned_config
from tune_topkd.export.standalone import standalone
from tune_topkd.loss import SCALING_RULES
from tune_topkd.loss import TopKDLoss
from tune_topkd.loss import TopKDPlugin
from tune_topkd.loss import build_loss
from tune_topkd.loss import check_scaling_rule
from tune_topkd.loss import linear_scaling
from tune_topkd.loss import top_k_scaling
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import identity
from tune_topkd.sweep import preflight

MODULE = """
import torch

def halving(teacher, order, *, scale_top, scale_last, shift):
    ranks = torch.arange(order.shape[1], dtype=teacher.dtype, device=teacher.device)
    return 1 + (scale_top - 1) * 0.5**ranks, torch.full_like(teacher[:, :1], shift)

def by_sample(teacher, order, *, scale_top, scale_last, shift):
    weights = torch.full(order.shape, scale_top, dtype=teacher.dtype)
    return weights, shift * teacher.gather(1, order[:, :1])

def long_weights(teacher, order, **scales):
    return torch.ones(order.shape[1] + 1), teacher[:, :1]

def negative(teacher, order, **scales):
    return -torch.ones(order.shape[1]), teacher[:, :1]

def infinite(teacher, order, **scales):
    return torch.ones(order.shape[1]), teacher[:, :1] / 0

def flat_delta(teacher, order, **scales):
    return torch.ones(order.shape[1]), teacher[:, 0]

def wide(teacher, order, **scales):
    return torch.ones(order.shape[1], dtype=torch.float64), teacher[:, :1]

def numbers(teacher, order, **scales):
    return [1.0], teacher[:, :1]

def one(teacher, order, **scales):
    return torch.ones(order.shape[1])

def raising(teacher, order):
    return None

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's; it is forgotten afterwards."""
    name = f"rules_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def case(rows=4, classes=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(rows, classes, generator=generator, dtype=dtype) for _ in range(2))
    return student, teacher, torch.arange(rows)


SCALES = {"k": 3, "scale_top": 3.0, "scale_last": 1.0, "scale_gt": 4.0, "shift": 0.5}


def test_the_linear_rule_is_the_default_by_any_name():
    student, teacher, labels = case()
    expected = TopKDLoss()(student, teacher, labels)
    for rule in ("linear", linear_scaling):
        assert torch.equal(TopKDLoss(scaling_rule=rule)(student, teacher, labels), expected)
    assert torch.equal(
        top_k_scaling(teacher, labels, **SCALES), top_k_scaling(teacher, labels, **SCALES, rule=linear_scaling)
    )
    assert {"linear": linear_scaling} == SCALING_RULES


def test_the_linear_rule_by_hand():
    teacher = torch.tensor([[6.0, 4.0, 2.0, 0.0]])
    weights, delta = linear_scaling(teacher, torch.tensor([[0, 1, 2]]), scale_top=3.0, scale_last=1.0, shift=0.5)
    assert weights.tolist() == [3.0, 2.0, 1.0]
    assert delta.tolist() == [[2.0]], "half of the gap between 4 and 0"
    _, none = linear_scaling(teacher, torch.tensor([[0, 1, 2, 3]]), scale_top=3.0, scale_last=1.0, shift=0.5)
    assert none.tolist() == [[0.0]]


def test_a_rule_of_the_users_gives_weights_and_shift(module):
    teacher = torch.tensor([[6.0, 4.0, 2.0, 0.0]])
    rule = sys.modules.get(module) or __import__(module)
    scaled = top_k_scaling(teacher, torch.tensor([0]), **SCALES, rule=rule.halving)
    assert scaled.tolist() == [[6 * 3 + 0.5, 4 * 2 + 0.5, 2 * 1.5 + 0.5, 0.0]]
    of_each = top_k_scaling(teacher, torch.tensor([3]), **SCALES, rule=rule.by_sample)
    assert of_each.tolist() == [[6 * 3 + 3, 4 * 3 + 3, 2 * 3 + 3, 0 * 4 + 3]], "a missed ground truth keeps scale_gt"


@pytest.mark.parametrize("method", ["topkd", "kd+topkd", "dkd+topkd"])
@pytest.mark.parametrize("rule", ["halving", "by_sample"])
def test_a_loss_takes_a_rule_by_its_name(module, method, rule):
    student, teacher, labels = case(dtype=torch.float64)
    student.requires_grad_()
    named = build_loss(method, {"scaling_rule": f"{module}:{rule}", "k": 3})
    value = named(student, teacher, labels)
    assert value.dtype == torch.float64
    assert not torch.equal(value, build_loss(method, {"k": 3})(student, teacher, labels))
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.isfinite(gradient).all()
    assert f"scaling_rule='{module}:{rule}'" in repr(named)


BROKEN = {
    "nothing": (
        "cubic",
        r"unknown `scaling_rule` 'cubic'; known: linear; or a callable of your own: package\.module:rule",
    ),
    "no module": ("no_such:rule", r"'no_such:rule' cannot be imported: ModuleNotFoundError: .*; known: linear; or"),
    "no object": ("{}:halvin", "cannot be imported: AttributeError"),
    "a number": ("{}:number", "must be callable, but is a int"),
    "raising": ("{}:raising", "`scaling_rule` raising raised TypeError"),
    "one thing": ("{}:one", "must return the weights and delta, but returned a Tensor"),
    "a list": ("{}:numbers", "its weights must be a tensor, but are a list"),
    "too many": (
        "{}:long_weights",
        r"weights must be of shape \(5,\) or \(3, 5\) and torch.float32, but got \(6,\) of",
    ),
    "another dtype": ("{}:wide", r"but got \(5,\) of torch.float64"),
    "a flat delta": ("{}:flat_delta", r"delta must be of shape \(3, 1\) and torch.float32, but got \(3,\)"),
    "below 0": ("{}:negative", "its weights must be above 0, but the lowest is -1"),
    "infinite": ("{}:infinite", "its delta must be finite, but got"),
}


@pytest.mark.parametrize(("name", "rule"), BROKEN.values(), ids=BROKEN)
def test_a_rule_that_cannot_be_had_or_breaks_a_rule_is_one_line(module, name, rule):
    with pytest.raises(ValueError, match=rule) as told:
        TopKDLoss(scaling_rule=name.format(module))
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=rule):
        TopKDPlugin(torch.nn.functional.mse_loss, scaling_rule=name.format(module))


def test_a_rule_that_is_no_name_and_no_callable_is_refused():
    with pytest.raises(ValueError, match="`scaling_rule` must be a name or a callable, but got 3"):
        TopKDLoss(scaling_rule=3)


def test_the_check_is_of_one_call_and_for_all_k():
    calls = []

    def counted(teacher, order, **scales):
        calls.append(tuple(order.shape))
        return linear_scaling(teacher, order, **scales)

    for k in (1, 4):
        check_scaling_rule(counted, k=k, scale_top=2.0, scale_last=1.0, shift=0.1)
    assert calls == [(3, 1), (3, 4)]


# --- in a sweep ---------------------------------------------------------------------------------------------------


def test_a_rule_is_part_of_what_results_depend_on(module, tmp_path):
    config = formulas.sweep_config(loss={"scaling_rule": f"{module}:halving"})
    plain = formulas.sweep_config()
    before = identity.identities(config, None)
    assert before.keys() - identity.identities(plain, None).keys() == {f"code {module}"}
    path = tmp_path / f"{module}.py"
    path.write_text(path.read_text().replace("0.5**ranks", "0.7**ranks"))
    sys.modules.pop(module, None)
    (problem,) = identity.changes(before, identity.identities(config, None), config)
    assert problem.key == f"code {module}"


def test_a_rule_is_not_searched():
    with pytest.raises(
        ConfigError, match=r"space\.scaling_rule: is code, which is not searched: name one under loss\."
    ):
        formulas.sweep_config(space={"scaling_rule": ["linear", "mine:rule"]})


def test_a_file_that_stands_alone_has_the_linear_rule_and_refuses_a_users():
    text = standalone("topkd", {"scaling_rule": "linear"})
    assert "def linear_scaling(" in text.definitions
    for method in ("topkd", "kd+topkd"):
        with pytest.raises(
            ValueError, match=r"loss\.scaling_rule = 'mine:rule': a rule of your own is no part of a file"
        ):
            standalone(method, {"scaling_rule": "mine:rule"})


SPACE = """
data: {{name: digits}}
teacher: {{name: digits_cnn, recipe: {{epochs: 1}}}}
student: digits_cnn_tiny
loss: {{scaling_rule: "{rule}"}}
recipe: {{epochs: 2, milestones: [1]}}
space:
  k: {{low: 1, high: 5}}
sweep: {{trials: 3, asha: null}}
baselines: null
"""


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("cubic", "unknown `scaling_rule` 'cubic'; known: linear; or a callable of your own: package.module:rule"),
        ("{}:negative", "`scaling_rule` negative: its weights must be above 0, but the lowest is -1"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused_before_anything_starts(module, tmp_path, rule, told):
    path = tmp_path / "space.yaml"
    path.write_text(SPACE.format(rule=rule.format(module)))
    with pytest.raises(ConfigError) as error:
        preflight.load_checked(str(path))
    name = rule.format(module)
    assert str(error.value) == f"{path}: loss.scaling_rule = {name!r}: {told}"


def test_a_sweep_with_a_rule_is_exported_as_yaml_and_json_and_not_as_python(module, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(SPACE.format(rule=f"{module}:halving"))
    checked = preflight.load_checked(str(path))
    sweep = Sweep.create(path, runs_dir=tmp_path / "runs", mlflow_uri="")
    result = sweep.run(executor=SimulatedExecutor(lambda trial, epoch: {"val_top1": 50.0}))
    assert checked.config.loss == {"scaling_rule": f"{module}:halving"}
    for name in ("yaml", "json"):
        result.export(tmp_path / f"tuned.{name}", name)
        tuned = load_tuned_config(tmp_path / f"tuned.{name}")
        assert build_loss(tuned.method, tuned.loss)._rule is sys.modules[module].halving
    assert f"; imports {module}" in (tmp_path / "tuned.yaml").read_text()
    for name in ("python", "mdistiller"):
        with pytest.raises(TuneTopKDError, match="a rule of your own is no part of a file that stands alone"):
            result.export(tmp_path / name, name)
        assert not (tmp_path / name).exists()
