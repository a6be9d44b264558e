"""What a student's size is counted as, and which of several sweeps give the most top-1 for it."""

import csv
import io
import json
from dataclasses import replace

import formulas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies

from tune_topkd.config import ModelConfig
from tune_topkd.data import DatasetInfo
from tune_topkd.findings import Figure
from tune_topkd.findings import Row
from tune_topkd.findings import Size
from tune_topkd.sweep.campaign import as_csv
from tune_topkd.sweep.campaign import as_json
from tune_topkd.sweep.campaign import as_markdown
from tune_topkd.sweep.size import on_front
from tune_topkd.sweep.size import size_of
from tune_topkd.sweep.size import with_sizes

CIFAR = DatasetInfo(100, (3, 32, 32))


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("resnet20", 278_324, 41.2e6),  # as the field's tables have them: 0.28 M, 41 M
        ("resnet8x4", 1_233_540, 177.9e6),
        ("wrn_16_2", 703_284, 101.1e6),
    ],
)
def test_sizes_are_those_of_the_tables(name, parameters, multiply_adds):
    found = size_of(ModelConfig(name=name), CIFAR)
    assert found.parameters == parameters
    assert found.multiply_adds == pytest.approx(multiply_adds, rel=0.02)


def test_counting_draws_no_random_numbers_and_what_cannot_be_built_has_none():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert size_of(ModelConfig(name="digits_cnn_tiny"), DatasetInfo(10, (1, 8, 8))) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert size_of(ModelConfig(name="nowhere:network"), CIFAR) is None
    assert size_of(ModelConfig(name="resnet20"), DatasetInfo(100, (1, 32, 32))) is None


def row(sweep, top1, weights, **more):
    size = None if weights is None else Size(weights, 10 * weights)
    figure = None if top1 is None else Figure(top1)
    about = {"dataset": "d", "teacher": "t", "student": f"s{weights}", "method": "topkd", "state": "finished"}
    return Row(sweep=sweep, top1=figure, size=size, **about | {"measured_on": "test set"} | more)


def test_the_front():
    rows = [row("small", 60.0, 10), row("worse", 59.0, 20), row("middle", 65.0, 30), row("large", 70.0, 99)]
    assert on_front(rows) == {"small", "middle", "large"}
    assert on_front([*rows, row("best", 71.0, 5)]) == {"best"}
    assert on_front([row("one", 60.0, 10), row("equal", 60.0, 10)]) == {"one", "equal"}
    assert on_front([row("one", 60.0, 10)]) == set()
    others = [
        row("a", 90.0, 1, dataset="e"),
        row("b", 90.0, 1, measured_on="one seed"),
        row("c", None, 1),
        row("d", 9.0, None),
    ]
    assert on_front([*rows, *others]) == {"small", "middle", "large"}


@given(
    strategies.lists(strategies.tuples(strategies.integers(0, 5), strategies.integers(1, 5)), min_size=2, max_size=8)
)
def test_no_sweep_on_the_front_is_beaten_and_every_other_is(points):
    rows = [row(str(n), float(top1), weights) for n, (top1, weights) in enumerate(points)]
    front = on_front(rows)
    assert front
    for number, (top1, weights) in enumerate(points):
        beaten = any(a >= top1 and w <= weights and (a, w) != (top1, weights) for a, w in points)
        assert (str(number) in front) is not beaten


def test_students_of_one_size_are_not_counted_and_others_are_in_every_table():
    config = formulas.sweep_config()
    rows = [row("a", 95.0, None), row("b", 90.0, None)]
    assert with_sizes(rows, [config, config]) == rows
    assert "front" not in as_markdown(rows)
    other = config.model_copy(update={"student": ModelConfig(name="digits_linear")})
    one, two = sized = with_sizes(rows, [config, other])
    assert two.size.parameters > one.size.parameters > 0
    assert replace(one, size=None) == rows[0]
    table = as_markdown(sized)
    assert "| weights | multiply-adds | front |" in table
    assert "front: no other of these sweeps" in table
    assert [line["on_front"] for line in csv.DictReader(io.StringIO(as_csv(sized)))] == ["True", "False"]
    told = json.loads(as_json(sized))["sweeps"]
    assert [line["on_front"] for line in told] == [True, False]
    assert told[0]["size"] == {"parameters": one.size.parameters, "multiply_adds": one.size.multiply_adds}
