"""From proposals to parameters and back: what holds for every space, every proposal."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from tune_topkd.config import EFFECTS
from tune_topkd.config import ParameterRange
from tune_topkd.config import RelativeConfig
from tune_topkd.config import config_from
from tune_topkd.config import weight_of_effect
from tune_topkd.loss import loss_parameters
from tune_topkd.space import Axis
from tune_topkd.space import Space
from tune_topkd.space import digest
from tune_topkd.space import lattice

SHARES = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])
unhurried = settings(deadline=None)  # a busy machine is no failure


def space(relative=None, **ranges):
    made = {name: ParameterRange.model_validate(given) for name, given in ranges.items()}
    return Space(made, RelativeConfig(**relative) if relative else None)


def proposed(of, shares):
    """The proposal at these shares of the axes."""
    return {axis.name: axis.at(share) for axis, share in zip(of.axes(), shares, strict=True)}


def low_high(given, params):
    """The bounds of a range of the test's own making, for these parameters."""
    return tuple(params[given[side]] if isinstance(given[side], str) else given[side] for side in ("low", "high"))


@st.composite
def numbers(draw, *, positive, whole):
    low = draw(st.integers(1 if positive else -50, 50)) if whole else draw(st.floats(1e-6 if positive else -1e3, 1e3))
    high = draw(st.integers(low, low + 60)) if whole else draw(st.floats(low, low + 1e3))
    return low, high


@st.composite
def valid_ranges(draw):
    """The ranges of a valid space, by name, as YAML would give them; some bounds name an earlier range."""
    ranges, reach = {}, {}  # reach: the least and the greatest value a range can give, and whether it is exact
    for name in "abcdef"[: draw(st.integers(1, 6))]:
        log, whole = draw(st.booleans()), draw(st.booleans())
        low, high = draw(numbers(positive=log, whole=whole))
        given = {"low": low, "high": high, "log": log, "type": "int" if whole else "float"}
        bounds = [n for n, (least, _, exact) in reach.items() if (exact or not whole) and (least > 0 or not log)]
        kind = draw(st.sampled_from(["plain", "choices", "below", "above"]))
        if kind == "choices":
            ranges[name] = {"choices": draw(st.sampled_from([[True, False], [1, 5, 10], ["a"], [0.1, 1.0]]))}
            continue
        exact = True
        if kind != "plain" and bounds:
            bound = draw(st.sampled_from(bounds))
            least, most, _ = reach[bound]
            if kind == "below" and (not log or math.floor(least) > 0 or not whole):
                given |= {
                    "low": math.floor(least) if whole else least / 2 or least if least > 0 else least - 1,
                    "high": bound,
                }
                low, high = given["low"], most
            else:
                given |= {"low": bound, "high": math.ceil(most) + draw(st.integers(0, 9))}
                low, high = least, given["high"]
            exact = whole
        ranges[name], reach[name] = given, (low, high, exact)
    return ranges


def test_a_log_range_over_all_numbers_gives_back_what_it_is_made_from():
    wide = space(a={"low": 5e-324, "high": 1e300, "log": True})
    for value in (5e-324, 1e-200, 1.0, 1e300):
        assert wide.params(wide.proposal({"a": value}))["a"] == pytest.approx(value, rel=1e-9)


# --- what holds in every proposal -----------------------------------------------------------------------------------


@unhurried
@given(
    bounds=st.lists(st.floats(0.1, 10), min_size=4, max_size=4).map(sorted),
    shares=st.tuples(SHARES, SHARES, SHARES),
    log=st.booleans(),
)
def test_the_scales_are_in_order_in_every_proposal(bounds, shares, log):
    least, low, high, most = bounds
    scales = space(
        scale_gt={"low": "scale_top", "high": most, "log": log},
        scale_last={"low": least, "high": "scale_top", "log": log},
        scale_top={"low": low, "high": high, "log": log},
    )
    params = scales.params(proposed(scales, shares))
    assert least <= params["scale_last"] <= params["scale_top"] <= params["scale_gt"] <= most


@unhurried
@given(ranges=valid_ranges(), data=st.data())
def test_every_value_is_of_its_kind_and_within_its_bounds(ranges, data):
    of = space(**ranges)
    params = of.params(proposed(of, [data.draw(SHARES) for _ in of.axes()]))
    assert set(params) == set(ranges)
    for name, given_range in ranges.items():
        if "choices" in given_range:
            assert params[name] in given_range["choices"]
            continue
        low, high = low_high(given_range, params)
        assert low <= params[name] <= high
        assert type(params[name]) is (int if given_range["type"] == "int" else float)


@unhurried
@given(ranges=valid_ranges(), share=st.sampled_from([0.0, 1.0]))
def test_both_ends_of_every_range_are_reached_exactly(ranges, share):
    of = space(**ranges)
    params = of.params(proposed(of, [share] * len(of)))
    for name, given_range in ranges.items():
        if "choices" not in given_range:
            low, high = low_high(given_range, params)
            ends = (math.ceil(low), math.floor(high)) if given_range["type"] == "int" else (low, high)
            assert params[name] == ends[int(share)]


@unhurried
@given(ranges=valid_ranges(), data=st.data())
def test_a_proposal_gives_back_the_parameters_it_is_made_from(ranges, data):
    of = space(**ranges)
    params = of.params(proposed(of, [data.draw(SHARES) for _ in of.axes()]))
    again = of.params(of.proposal(params))
    for name, value in params.items():
        if isinstance(value, float):
            size = max(abs(bound) for bound in low_high(ranges[name], params)) if "low" in ranges[name] else 1.0
            assert again[name] == pytest.approx(value, rel=1e-9, abs=1e-9 * size)
        else:
            assert (again[name], type(again[name])) == (value, type(value))


@unhurried
@given(ranges=valid_ranges(), data=st.data())
def test_the_order_of_the_keys_changes_no_parameter(ranges, data):
    of = space(**ranges)
    proposal = proposed(of, [data.draw(SHARES) for _ in of.axes()])
    other = space(**{name: ranges[name] for name in data.draw(st.permutations(list(ranges)))})
    assert other.params(proposal) == of.params(proposal)
    assert other.digest() == of.digest()
    places = {axis.name: place for place, axis in enumerate(other.axes())}
    for name, given_range in ranges.items():
        assert all(places[b] < places[name] for b in given_range.values() if isinstance(b, str) and b in ranges)


@unhurried
@given(
    ends=st.tuples(*2 * [st.floats(allow_nan=False, allow_infinity=False)]).map(sorted),
    shares=st.tuples(SHARES, SHARES),
)
def test_an_axis_rises_from_exactly_low_to_exactly_high(ends, shares):
    low, high = ends
    for log in (False, True) if low > 0 else (False,):
        axis = Axis("a", "float", low, high, log)
        first, second = sorted(shares)
        assert (axis.at(0.0), axis.at(1.0)) == (low, high)
        assert low <= axis.at(first) <= axis.at(second) <= high


def test_a_log_axis_is_even_in_the_logarithm():
    assert Axis("a", "float", 0.01, 100.0, log=True).at(0.5) == pytest.approx(1.0)
    of = space(a={"low": 0.01, "high": 100}, b={"low": 0.01, "high": "a", "log": True})
    assert of.params({"a": 100.0, "b": 0.75})["b"] == pytest.approx(10.0)


@pytest.mark.parametrize(("low", "high"), [(1, "top"), ("top", 12)])
def test_every_integer_of_a_conditional_range_has_the_same_share(low, high):
    of = space(top={"low": 1, "high": 8, "type": "int"}, k={"low": low, "high": high})
    found = Counter(of.params({"top": 5, "k": (i + 0.5) / 400})["k"] for i in range(400))
    whole = range(1, 6) if high == "top" else range(5, 13)
    assert found == {value: 400 // len(whole) for value in whole}


def test_integers_between_fractions_stay_between_them():
    of = space(a={"low": 1.5, "high": 1.75}, k={"low": "a", "high": 3})
    assert {of.params({"a": 1.5, "k": i / 10})["k"] for i in range(11)} == {2, 3}


def test_integers_are_k_and_batch_size_and_what_says_so():
    ends = {"low": 1, "high": 8}
    of = space(k=ends, batch_size=ends, alpha=ends, beta={**ends, "type": "int"}, gamma={**ends, "type": "float"})
    kinds = {axis.name: axis.kind for axis in of.axes()}
    assert kinds == {"k": "int", "batch_size": "int", "alpha": "float", "beta": "int", "gamma": "float"}


def test_a_conditional_range_is_a_share_to_the_sampler():
    of = space(top={"low": 1, "high": 4}, last={"low": 1, "high": "top", "log": True})
    assert of.axes() == [Axis("top", "float", 1.0, 4.0), Axis("last", "float", 0.0, 1.0)]


# --- relative weights -----------------------------------------------------------------------------------------------

WEIGHTS = {name: {"low": 0.1, "high": 10, "log": True} for name in ("ce", "tdl", "con")}


@unhurried
@given(shares=st.tuples(SHARES, SHARES, SHARES), total=st.floats(0.5, 10))
def test_relative_weights_sum_up_and_keep_their_ratios(shares, total):
    of = space({"sum": total, "of": list(WEIGHTS)}, **WEIGHTS, lr={"low": 1, "high": 2})
    drawn = proposed(of, [*shares, 0.5])
    params = of.params(drawn)
    assert math.fsum(params[name] for name in WEIGHTS) == pytest.approx(total)
    for one, other in itertools.combinations(WEIGHTS, 2):
        assert params[one] / params[other] == pytest.approx(drawn[one] / drawn[other])
    assert params["lr"] == drawn["lr"] == 1.5


@unhurried
@given(shares=st.tuples(SHARES, SHARES, SHARES), total=st.floats(0.5, 10))
def test_a_proposal_gives_back_relative_weights(shares, total):
    of = space({"sum": total, "of": list(WEIGHTS)}, **WEIGHTS)
    params = of.params(proposed(of, shares))
    proposal = of.proposal(params)
    assert of.params(proposal) == pytest.approx(params)
    assert all(0.1 <= value <= 10 for value in proposal.values())


def test_the_default_weights_are_proposed_as_they_are():
    of = space({"sum": 3.0, "of": list(WEIGHTS)}, **WEIGHTS)
    ones = dict.fromkeys(WEIGHTS, 1.0)
    assert of.proposal(ones) == ones
    assert of.params(ones) == ones


# --- weights by their effect ----------------------------------------------------------------------------------------

TOPKD = dict.fromkeys(("ce_weight", "tdl_weight", "contrastive_weight"), WEIGHTS["ce"])
WITHIN = {name: {"low": 0.1, "high": 10, "log": True} for name in ("alpha", "beta", "temperature")}
BY_EFFECT = {"sum": 3.0, "of": list(TOPKD), "units": "effect"}


def gradient_factors(params):
    """What each term's gradient grows with, of the terms at their defaults, as docs/design.md has it."""
    return (
        params["ce_weight"],
        params["tdl_weight"] * (1 + params["alpha"] + params["beta"]) / 3,
        params["contrastive_weight"] / params["temperature"] * 0.1,
    )


@unhurried
@given(shares=st.tuples(*[SHARES] * 6))
def test_effects_sum_up_and_keep_their_ratios_whatever_else_is_drawn(shares):
    of = space(BY_EFFECT, **TOPKD, **WITHIN)
    drawn = proposed(of, shares)
    effects = gradient_factors(of.params(drawn))
    assert math.fsum(effects) == pytest.approx(3.0)
    for (one, name), (other, name2) in itertools.combinations(zip(effects, TOPKD, strict=True), 2):
        assert one / other == pytest.approx(drawn[name] / drawn[name2])


@unhurried
@given(shares=st.tuples(*[SHARES] * 6))
def test_a_proposal_gives_back_weights_by_their_effect(shares):
    of = space(BY_EFFECT, **TOPKD, **WITHIN)
    params = of.params(proposed(of, shares))
    assert of.params(of.proposal(params)) == pytest.approx(params)


def test_a_parameter_that_is_not_searched_counts_with_its_fixed_value_or_its_default():
    made = {name: ParameterRange.model_validate(given) for name, given in TOPKD.items()}
    ones = dict.fromkeys(TOPKD, 1.0)
    by_default = Space(made, RelativeConfig(**BY_EFFECT))
    assert by_default.params(ones) == ones
    fixed = Space(made, RelativeConfig(**BY_EFFECT), {"temperature": 0.5, "alpha": 4.0, "k": 3})
    assert fixed.params(ones) == pytest.approx({"ce_weight": 1.0, "tdl_weight": 0.5, "contrastive_weight": 5.0})


def test_the_defaults_of_effects_are_those_of_the_loss():
    known = loss_parameters("topkd")
    for name, others in EFFECTS.items():
        assert name in known
        assert others == {other: known[other] for other in others}
        assert weight_of_effect(name, known) == pytest.approx(1.0)


# --- parameters from elsewhere --------------------------------------------------------------------------------------


def test_parameters_beyond_a_range_are_clipped_into_it():
    of = space(k={"low": 1, "high": 5}, top={"low": 1, "high": 4}, last={"low": 1, "high": "top"}, on=[True, False])
    proposal = of.proposal({"k": 9, "top": 0.5, "last": 3.0, "on": "maybe", "unknown": 1})
    assert of.params(proposal) == {"k": 5, "top": 1.0, "last": 1.0, "on": True}
    assert of.params(of.proposal({"k": 2.6, "top": 4, "last": 9, "on": False})) == {
        "k": 3,
        "top": 4.0,
        "last": 4.0,
        "on": False,
    }


def test_an_empty_conditional_range_is_an_error_that_names_it():
    of = space(a={"low": 1, "high": 4}, b={"low": 3, "high": "a"})
    with pytest.raises(ValueError, match=r"^space\.b: low <= high must hold, but .* low = 3, high = 2$"):
        of.params({"a": 2.0, "b": 0.5})
    with pytest.raises(ValueError, match=r"^space\.b: low <= high must hold"):
        of.proposal({"a": 2.0, "b": 3.0})


def test_a_range_of_integers_without_one_is_an_error_that_names_it():
    of = space(a={"low": 1, "high": 2}, k={"low": "a", "high": 1.75, "type": "int"})
    with pytest.raises(ValueError, match=r"^space\.k: low <= high must hold, but .* low = 2, high = 1$"):
        of.params({"a": 1.5, "k": 0.5})


def test_the_logarithm_of_a_bound_at_0_is_an_error_that_names_it():
    of = space(a={"low": 0, "high": 4}, b={"low": "a", "high": 5, "log": True})
    with pytest.raises(ValueError, match=r"^space\.b: log: true needs bounds above 0, but low came out as 0$"):
        of.params({"a": 0.0, "b": 0.5})


TWO_SCALES = {"top": {"low": 1.0, "high": 4.0}, "gt": {"low": "top", "high": 6.0}}


@pytest.mark.parametrize(
    ("ranges", "told"),
    [
        ({"k": {"low": "top", "high": "gt", "type": "int"}}, r"k: low <= high must hold.*, at top = 2.854, gt = 2.854"),
        ({"k": {"low": "top", "high": "gt", "type": "int", "log": True}}, "k: low <= high must hold"),
        ({"k": {"low": "gt", "high": "top"}}, r"k: low <= high must hold.*, at top = 1, gt = 6"),
        ({"k": {"low": 2.0, "high": "top"}}, r"k: low <= high must hold.* low = 2, high = 1, at top = 1$"),
        ({"a": {"low": "top", "high": "gt"}, "k": {"low": "a", "high": "gt", "type": "int"}}, "k: low <= high"),
        (
            {"a": {"low": 0.0, "high": "top"}, "k": {"low": "a", "high": 9.0, "log": True}},
            r"k: log.* came out as 0, at",
        ),
    ],
)
def test_a_range_that_can_be_empty_between_its_corners_is_found_with_a_point_that_shows_it(ranges, told):
    with pytest.raises(ValueError, match=rf"^space\.{told}"):
        space(**TWO_SCALES, **ranges).check()


@pytest.mark.parametrize(
    "ranges",
    [
        {"b": {"low": "top", "high": "gt"}},
        {"k": {"low": 1, "high": "gt", "type": "int"}},
        {"n": {"low": 5, "high": 9, "type": "int"}, "k": {"low": "top", "high": "n", "type": "int"}},
        {"a": {"low": "top", "high": "gt", "log": True}, "k": {"low": "a", "high": 6.0, "log": True}},
        {"on": [1, 2, 3]},
    ],
)
def test_a_space_without_an_empty_range_is_right(ranges):
    space(**TWO_SCALES, **ranges).check()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_what_the_check_lets_through_is_empty_for_no_proposal(data):
    ranges, names = {}, []
    for name in "abcd"[: data.draw(st.integers(2, 4))]:
        bounds = st.one_of(
            st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.25, 5.0]), *([st.sampled_from(names)] if names else [])
        )
        low, high = data.draw(bounds), data.draw(bounds)
        if not isinstance(low, str) and not isinstance(high, str):
            low, high = min(low, high), max(low, high)
        ranges[name] = {"low": low, "high": high}
        if data.draw(st.booleans()) and all(isinstance(b, str) or b == int(b) for b in (low, high)):
            ranges[name]["type"] = "int"
        names.append(name)
    of = space(**ranges)
    try:
        of.check()
    except ValueError:
        return
    chance = data.draw(st.randoms(use_true_random=False))
    for _ in range(100):
        of.params({axis.name: axis.at(chance.choice([0.0, 1.0, chance.random()])) for axis in of.axes()})


# --- corners, parts, digest -----------------------------------------------------------------------------------------


def test_corners_are_all_combinations_of_ends_and_choices():
    of = space(last={"low": 1, "high": "top"}, top={"low": 2, "high": 4}, k={"low": 1, "high": 5}, on=["x", "y", "z"])
    corners = [(c["top"], c["last"], c["k"], c["on"]) for c in of.corners()]
    scales = [(2.0, 1.0), (2.0, 2.0), (4.0, 1.0), (4.0, 4.0)]
    assert sorted(corners) == sorted((*s, k, on) for s in scales for k in (1, 5) for on in "xyz")


def test_corners_of_relative_weights_are_scaled():
    of = space({"sum": 3.0, "of": ["a", "b"]}, a={"low": 1, "high": 2}, b={"low": 1, "high": 2})
    assert sorted(tuple(c.values()) for c in of.corners()) == [(1.0, 2.0), (1.5, 1.5), (1.5, 1.5), (2.0, 1.0)]


def test_the_recipes_part_is_what_the_baselines_search():
    raw = {
        "data": {"name": "digits"},
        "teacher": {"name": "cnn", "recipe": {"epochs": 4}},
        "student": "tiny",
        "recipe": {"epochs": 8},
        "space": {"a": WEIGHTS["ce"], "lr": {"low": 0.01, "high": 1}, "b": WEIGHTS["ce"], "momentum": [0.8, 0.9]},
        "relative": {"of": ["a", "b"]},
    }
    config = config_from(raw, "test")
    assert [axis.name for axis in Space.of(config).axes()] == ["a", "lr", "b", "momentum"]
    part = Space.of_recipe(config)
    assert part.params({"lr": 0.5, "momentum": 0.8}) == {"lr": 0.5, "momentum": 0.8}
    assert len(part) == 2


BASE = {"a": {"low": 1, "high": 4}, "b": {"low": 1, "high": "a"}, "c": [1, 5]}
OTHERS = {
    "low": BASE | {"a": {"low": 2, "high": 4}},
    "high": BASE | {"a": {"low": 1, "high": 5}},
    "log": BASE | {"a": {"low": 1, "high": 4, "log": True}},
    "type": BASE | {"a": {"low": 1, "high": 4, "type": "int"}},
    "bound": BASE | {"b": {"low": 1, "high": 4}},
    "a choice more": BASE | {"c": [1, 5, 10]},
    "choices in another order": BASE | {"c": [5, 1]},
    "a choice of another type": BASE | {"c": [True, 5]},
    "a range more": BASE | {"d": {"low": 1, "high": 4}},
    "another name": {"a": BASE["a"], "b": BASE["b"], "d": BASE["c"]},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_the_digest_changes_with_any_range(other):
    assert space(**other).digest() != space(**BASE).digest()


def test_the_digest_changes_with_the_relative_weights():
    digests = {
        space(relative, **BASE).digest()
        for relative in (
            None,
            {"of": ["a", "b"]},
            {"of": ["a", "b"], "sum": 2.0},
            {"of": ["a", "b"], "units": "effect"},
        )
    }
    assert len(digests) == 4


def test_the_digest_is_the_same_tomorrow():  # else sweeps begun before the change could not be resumed
    assert space(**BASE).digest() == "c5a9d4baff1bb355"
    assert space({"of": ["a", "b"]}, **BASE).digest() == "450a22703fc13159"
    assert digest({"b": 1, "a": [1.0, "é"]}) == digest({"a": [1.0, "é"], "b": 1}) == "fb66f45f3d258fc2"


# --- the lattice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 6, 50])
@pytest.mark.parametrize("axis", [Axis("lr", "float", 0.01, 0.7), Axis("lr", "float", 0.01, 0.7, log=True)])
def test_one_axis_is_a_grid_with_both_ends(axis, n):
    values = [point["lr"] for point in lattice([axis], n)]
    assert (values[0], values[-1], len(set(values))) == (0.01, 0.7, n)
    steps = [math.log(b / a) if axis.log else b - a for a, b in itertools.pairwise(values)]
    assert max(steps) == pytest.approx(min(steps))


def test_one_axis_of_integers_or_choices_is_covered():
    assert [p["k"] for p in lattice([Axis("k", "int", 1, 5)], 5)] == [1, 2, 3, 4, 5]
    assert {p["c"] for p in lattice([Axis("c", "choice", choices=("x", "y", "z"))], 6)} == {"x", "y", "z"}


def test_a_lattice_of_one_point_is_the_middle_and_of_no_axis_empty():
    assert lattice([Axis("lr", "float", 0.0, 1.0)], 1) == [{"lr": 0.5}]
    assert lattice([], 2) == [{}, {}]


@pytest.mark.parametrize("dimensions", [2, 3, 5])
def test_many_axes_are_filled_evenly(dimensions):
    axes = [Axis(str(d), "float") for d in range(dimensions)]
    points = lattice(axes, 64)
    assert points == lattice(axes, 64)
    for name in points[0]:
        values = sorted(point[name] for point in points)
        assert len(set(values)) == 64
        assert abs(sum(value < 0.5 for value in values) - 32) <= 3
        assert max(b - a for a, b in itertools.pairwise([0.0, *values, 1.0])) < 5 / 64
    for one, other in itertools.combinations(points[0], 2):
        quarters = Counter((point[one] < 0.5, point[other] < 0.5) for point in points)
        assert all(10 <= quarters[q] <= 22 for q in itertools.product([True, False], repeat=2))
