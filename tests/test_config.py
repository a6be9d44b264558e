"""What a search-space YAML may say, and how each thing it may not is told."""

import copy
import functools
import math
import tracemalloc

import pytest
import yaml
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tune_topkd.config import METHODS
from tune_topkd.config import ConfigError
from tune_topkd.config import Override
from tune_topkd.config import RecipeConfig
from tune_topkd.config import SweepConfig
from tune_topkd.config import config_from
from tune_topkd.config import dump_config
from tune_topkd.config import load_config
from tune_topkd.config import parse_set
from tune_topkd.config import read_yaml

MINIMAL = {
    "data": {"name": "digits"},
    "teacher": {"name": "cnn", "recipe": {"epochs": 4}},
    "student": "tiny",
    "recipe": {"epochs": 8},
    "space": {"k": {"low": 1, "high": 5}},
}
GONE = object()


def changed(changes):
    """`MINIMAL` with the values at these dotted keys replaced, or removed."""
    raw = copy.deepcopy(MINIMAL)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is GONE:
            del section[last]
        else:
            section[last] = value
    return raw


def written(folder, raw):
    path = folder / "space.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
    return path


def refusal(path, overrides=()):
    """What the one ConfigError for this file says; it begins with the file."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


# --- what is valid --------------------------------------------------------------------------------------------------


def test_a_minimal_file_loads_with_every_default(tmp_path):
    config = load_config(written(tmp_path, MINIMAL))
    assert (config.student.name, config.method, config.loss) == ("tiny", "topkd", {})
    assert (config.space["k"].low, config.space["k"].high, config.space["k"].log) == (1.0, 5.0, False)
    assert (config.sweep.trials, config.sweep.asha.reduction_factor, config.baselines.trials) == (32, 3, 6)


def test_dump_writes_every_field_of_every_section():
    def unwritten(section, dumped):
        for name in type(section).model_fields:
            if name not in dumped:
                yield name
            elif isinstance(value := getattr(section, name), BaseModel):
                yield from unwritten(value, dumped[name])

    config = config_from(MINIMAL, "test")
    dumped = yaml.safe_load(dump_config(config))
    assert list(unwritten(config, dumped)) == []
    assert dumped["space"] == {"k": {"low": 1.0, "high": 5.0, "log": False, "type": None, "choices": None}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"space.k": [1, 5, 10], "loss": {"normalize": True, "shift": 0, "alpha": 1.0, "mode": "a"}},
        {"recipe.lr": 1e-7, "recipe.weight_decay": 1e-05, "description": "K, α – and\nmore: 'yes' # no"},
        {"sweep": {"asha": None, "max_concurrent": 2, "time_budget": 1.5}, "baselines": None},
        {"sweep": {"sampler": {"name": "a.b:c", "keep": 1, "of": [1.0, True, {"x": None}]}, "scheduler": "a.b:d"}},
        {"teacher": {"name": "cnn", "checkpoint": "t.pt", "kwargs": {"width": [8, 16], "drop": 1e-3}}},
        {"space": {"top": {"low": 1, "high": 4}, "last": {"low": 1.0, "high": "top", "log": True}}},
    ],
)
def test_a_dumped_config_loads_as_the_same(tmp_path, changes):
    config = config_from(changed(changes), "test")
    again = load_config(written(tmp_path, dump_config(config)))
    assert again == config
    assert dump_config(again) == dump_config(config)  # 1, 1.0 and true are equal in Python, but not in a dump


@pytest.mark.parametrize(
    "text", ["12345678e9012345", "1e3", "1E-3", ".5e1", "0123", "null", "on", "1_0", "2026-01-01", ""]
)
def test_a_text_that_looks_like_something_else_stays_a_text(tmp_path, text):
    config = config_from(changed({"description": text}), "test")
    assert load_config(written(tmp_path, dump_config(config))).description == text


@given(
    text=st.text(
        st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029"), max_size=30
    ),  # PyYAML folds these
    number=st.floats(allow_nan=False, allow_infinity=False),
)
@settings(deadline=None, max_examples=60)  # a busy machine is no failure
def test_any_text_and_number_survives_dump_and_load(tmp_path_factory, text, number):
    config = config_from(changed({"description": text, "loss": {"alpha": number}}), "test")
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.1e-2", "+1e-3", "0.001"])
def test_a_number_with_an_exponent_needs_no_point(tmp_path, text):
    path = written(tmp_path, yaml.safe_dump(MINIMAL).replace("epochs: 8", f"epochs: 8\n  lr: {text}"))
    assert load_config(path).recipe.lr == 0.001


def test_scalars_of_the_loss_keep_their_types(tmp_path):
    path = written(tmp_path, changed({"loss": {"a": True, "b": 1, "c": 1.0, "d": "1"}}))
    assert [(v, type(v)) for v in load_config(path).loss.values()] == [(True, bool), (1, int), (1.0, float), ("1", str)]


def test_merge_keys_and_anchors_are_no_duplicate_keys(tmp_path):
    text = """
        data: {name: digits}
        teacher: {name: cnn, recipe: &plain {epochs: 4, lr: 0.5}}
        student: tiny
        recipe: {<<: *plain, lr: 0.25}
        space: {k: [1, 5]}
        """
    config = load_config(written(tmp_path, text))
    assert (config.recipe.epochs, config.recipe.lr) == (4, 0.25)


def test_a_bare_name_chooses_a_sampler_or_a_scheduler(tmp_path):
    bare = changed({"sweep": {"sampler": "a.b:c", "scheduler": "a.b:d"}})
    whole = changed({"sweep": {"sampler": {"name": "a.b:c"}, "scheduler": {"name": "a.b:d"}, "asha": None}})
    config = load_config(written(tmp_path, bare))
    assert config == load_config(written(tmp_path, whole))
    assert config.sweep.asha is None
    assert load_config(written(tmp_path, changed({"sweep": {"scheduler": "asha"}}))) == config_from(MINIMAL, "test")
    config = load_config(
        written(tmp_path, bare), [parse_set("sweep.sampler.keep=0.5"), parse_set("sweep.scheduler=asha")]
    )
    assert (config.sweep.sampler.name, config.sweep.sampler.options) == ("a.b:c", {"keep": 0.5})
    assert config.sweep.scheduler.name == "asha"


def test_what_a_parent_chooses_is_merged_or_by_a_bare_name_replaced(tmp_path):
    chosen = {"sampler": {"name": "a.b:c", "keep": 0.5}, "asha": {"grace_epochs": 2}}
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump(changed({"sweep": chosen})))
    for own, told in (({"sampler": {"more": 1}}, {"keep": 0.5, "more": 1}), ({"sampler": "a.b:e"}, {})):
        config = load_config(written(tmp_path, {"extends": "parent.yaml", "sweep": own}))
        assert config.sweep.sampler.options == told
    text = refusal(written(tmp_path, {"extends": "parent.yaml", "sweep": {"scheduler": "a.b:f"}}))
    assert text.startswith("sweep.asha (from ")
    config = load_config(written(tmp_path, {"extends": "parent.yaml", "sweep": {"scheduler": "a.b:f", "asha": None}}))
    assert config.sweep.scheduler.name == "a.b:f"


def test_milestones_below_one_follow_the_epochs():
    assert RecipeConfig(epochs=240).milestone_epochs() == [150, 180, 210]
    assert RecipeConfig(epochs=240, milestones=[100, 200]).milestone_epochs() == [100, 200]


@pytest.mark.parametrize("shares", [[0.3, 0.6, 0.9], [0.625, 0.75, 0.875], [0.001]])
def test_no_share_of_the_epochs_lies_before_the_end_of_the_first(shares):
    for epochs in range(1, 301):
        milestones = RecipeConfig(epochs=epochs, milestones=shares).milestone_epochs()
        assert milestones == [max(1, round(share * epochs)) for share in shares]
        assert sorted(milestones) == milestones
        assert 1 <= milestones[0] <= milestones[-1] <= epochs


def test_methods_are_those_of_the_losses():
    from tune_topkd import loss

    assert sorted(METHODS) == sorted(loss.METHODS)


# --- one value that breaks a rule -----------------------------------------------------------------------------------

RANGE = {"low": 1.0, "high": 4.0}
BROKEN = {
    "unknown key": ({"methd": "kd"}, ["methd: unknown key", "did you mean 'method'", "known: baselines, data, "]),
    "unknown key that a section has": (
        {"trials": 5},
        ["trials: unknown key; did you mean 'sweep.trials' or 'baselines.trials'? known: baselines, data, "],
    ),
    "known key in another section": (
        {"recipe.grace_epochs": 5},
        ["recipe.grace_epochs: unknown key; did you mean 'sweep.asha.grace_epochs'? known: batch_size, "],
    ),
    "unknown key that a range has": ({"low": 5}, ["low: unknown key; did you mean 'space.NAME.low'? known: "]),
    "unknown key one down": ({"recipe.epoch": 3}, ["recipe.epoch: unknown key", "'epochs'", "known: batch_size, "]),
    "unknown key two down": (
        {"data.augment.pd": 1},
        ["data.augment.pd: unknown key", "'pad'", "known: crop_scale, erase, "],
    ),
    "unknown key in an optional section": (
        {"sweep.asha.grace": 1},
        ["sweep.asha.grace: unknown key", "known: grace_epochs, "],
    ),
    "unknown key of the teacher's recipe": (
        {"teacher.recipe.epoch": 1},
        ["teacher.recipe.epoch: unknown key", "gamma"],
    ),
    "unknown key of a range": (
        {"space.k.lo": 1},
        ["space.k.lo: unknown key", "'low'", "known: choices, high, log, low, type"],
    ),
    "missing": ({"data": GONE}, ["data: is required but missing"]),
    "missing one down": ({"recipe": {"lr": 1}}, ["recipe.epochs: is required but missing"]),
    "text for a whole number": ({"recipe.epochs": "4"}, ["recipe.epochs = '4': must be a valid integer"]),
    "true for a whole number": ({"recipe.epochs": True}, ["recipe.epochs = True: must be a valid integer"]),
    "a fraction for a whole number": ({"recipe.epochs": 4.5}, ["recipe.epochs = 4.5: must be a valid integer"]),
    "a float for a whole number": ({"sweep.trials": 4.0}, ["sweep.trials = 4.0: must be a valid integer"]),
    "null for a whole number": ({"recipe.epochs": None}, ["recipe.epochs = None: must be a valid integer"]),
    "text for a number": ({"recipe.lr": "0.1"}, ["recipe.lr = '0.1': must be a valid number"]),
    "true for a number": ({"recipe.lr": True}, ["recipe.lr = True: must be a valid number"]),
    "1 for true": ({"recipe.nesterov": 1}, ["recipe.nesterov = 1: must be a valid boolean"]),
    "a number for a text": ({"student": {"name": 5}}, ["student.name = 5: must be a valid string"]),
    "a number for a section": ({"recipe": 5}, ["recipe = 5: must be a mapping of keys to values"]),
    "a number for a network": ({"student": 5}, ["student = 5: must be a mapping of keys to values"]),
    "a list for a parameter": ({"loss": {"alpha": [1]}}, ["loss.alpha = [1]: must be true/false or a number or text"]),
    "null for a parameter": ({"loss": {"alpha": None}}, ["loss.alpha = None: must be true/false or a number or text"]),
    "a number for a key": ({"loss": {1: 2}}, ["loss.1 = 1: a key must be text"]),
    "an unknown method": ({"method": "topdk"}, ["method = 'topdk'", "did you mean 'topkd'", "ce, dkd, dkd+topkd, kd"]),
    "an unknown schedule": ({"recipe.schedule": "cos"}, ["recipe.schedule = 'cos'", "known: constant, cosine, step"]),
    "an unknown baseline": (
        {"baselines.methods": ["ce", "crd"]},
        ["baselines.methods.1 = 'crd'", "known: ce, defaults, dkd, kd, lskd"],
    ),
    "a baseline twice": ({"baselines.methods": ["ce", "ce"]}, ["baselines.methods = ['ce', 'ce']", "once"]),
    "zero": ({"sweep.trials": 0}, ["sweep.trials = 0: must be greater than or equal to 1"]),
    "infinite learning rate": ({"recipe.lr": math.inf}, ["recipe.lr = inf: must be a finite number"]),
    "infinite time": ({"sweep.time_budget": math.inf}, ["sweep.time_budget = inf: must be a finite number"]),
    "NaN in the loss": ({"loss": {"alpha": math.nan}}, ["loss.alpha = nan: must be a finite number"]),
    "no room to train": ({"data": {"name": "d", "val_fraction": 0.9}}, ["data: val_fraction", "below 1", "0.9 + 0.2"]),
    "a third GPU cut in half": (
        {"sweep.gpus_per_trial": 1.5},
        ["sweep.gpus_per_trial = 1.5: must be a fraction up to 1"],
    ),
    "milestones that fall": ({"recipe.milestones": [5, 2]}, ["recipe.milestones = [5, 2]: must rise"]),
    "milestones mixed": ({"recipe.milestones": [0.5, 6]}, ["recipe.milestones = [0.5, 6]: must rise"]),
    "a milestone at 0": ({"recipe.milestones": [0, 6]}, ["recipe.milestones = [0, 6]: must rise"]),
    "a NaN milestone": ({"recipe.milestones": [math.nan]}, ["recipe.milestones.0 = nan: must be a finite number"]),
    "a milestone at the end": ({"recipe.milestones": [4, 8]}, ["recipe.milestones = [4.0, 8.0]", "the last epoch (8)"]),
    "a late one of the teacher": (
        {"teacher.recipe.milestones": [4]},
        ["teacher.recipe.milestones = [4.0]", "epoch (4)"],
    ),
    "grace beyond the end": ({"sweep.asha": {"grace_epochs": 9}}, ["sweep.asha.grace_epochs = 9", "recipe.epochs = 8"]),
    "more nodes than trials at once": (
        {"sweep": {"max_concurrent": 4, "autoscale_to": 5}},
        ["sweep.autoscale_to = 5: must be at most sweep.max_concurrent = 4: nodes that are beyond it would stay idle"],
    ),
    "an unknown sampler": (
        {"sweep": {"sampler": "tep"}},
        [
            "sweep.sampler.name = 'tep': did you mean 'tpe'? known: cmaes, gp, qmc, random, tpe; or a factory of your own: "
        ],
    ),
    "no sampler": (
        {"sweep": {"sampler": None}},
        ["sweep.sampler.name = 'none': known: cmaes, gp, qmc, random, tpe; or a factory of "],
    ),
    "a library's sampler": (
        {"sweep": {"sampler": "timm:tpe"}},
        ["sweep.sampler.name = 'timm:tpe': known: cmaes, gp, qmc, random, tpe"],
    ),
    "a sampler without a name": ({"sweep": {"sampler": {"keep": 1}}}, ["sweep.sampler.name: is required but missing"]),
    "a list for a sampler": ({"sweep": {"sampler": ["tpe"]}}, ["sweep.sampler = ['tpe']: must be a mapping of keys"]),
    "an unknown scheduler": (
        {"sweep": {"scheduler": {"name": "median"}}},
        ["sweep.scheduler.name = 'median': known: asha; or a factory of your own: package.module:factory"],
    ),
    "no scheduler": (
        {"sweep": {"scheduler": "none"}},
        ["sweep.scheduler.name = 'none': is no scheduler; to let every trial run to the end, set sweep.asha to null"],
    ),
    "null for a scheduler": (
        {"sweep": {"scheduler": None}},
        ["sweep.scheduler.name = 'none': is no scheduler; to let every trial run to the end, set sweep.asha to null"],
    ),
    "ASHA beside another scheduler": (
        {"sweep": {"scheduler": "a.b:c", "asha": {"grace_epochs": 2}}},
        ["sweep.asha: is of the scheduler asha, but sweep.scheduler is a.b:c: set it to null"],
    ),
    "an option of TPE": (
        {"sweep": {"sampler": {"name": "tpe", "startup_trials": 5}}},
        ["sweep.sampler.startup_trials = 5: tpe takes no options here; its random proposals are sweep.startup_trials"],
    ),
    "an option of the random sampler": (
        {"sweep": {"sampler": {"name": "random", "n": 5}}},
        ["sweep.sampler.n = 5: random takes no options here; leave it out"],
    ),
    "an option of ASHA": (
        {"sweep": {"scheduler": {"name": "asha", "grace_epochs": 2}}},
        ["sweep.scheduler.grace_epochs = 2: asha takes no options here; its rungs are set under sweep.asha"],
    ),
    "an infinite option": (
        {"sweep": {"sampler": {"name": "a:b", "keep": math.inf}}},
        ["sweep.sampler.keep = inf: must be a finite number"],
    ),
    "a warm-up that never ends": (
        {"recipe.warmup_epochs": 8},
        ["recipe.warmup_epochs = 8: must be below the epochs, 8"],
    ),
    "a distillation that never has its weight": (
        {"recipe.distill_warmup": 9},
        ["recipe.distill_warmup = 9: must be at most the epochs, 8"],
    ),
    "a key and no checkpoint": ({"teacher.checkpoint_key": "ema"}, ["teacher: checkpoint_key needs a checkpoint"]),
    "a student's key": (
        {"student": {"name": "s", "checkpoint_key": "ema"}},
        ["student: checkpoint_key needs a checkpoint"],
    ),
    "two teachers": ({"teacher.checkpoint": "t.pt"}, ["teacher: exactly one of checkpoint and recipe"]),
    "no teacher": ({"teacher.recipe": GONE}, ["teacher: exactly one of checkpoint and recipe"]),
    "an empty space": ({"space": {}}, ["space: must have at least 1 item"]),
    "a scalar in the space": ({"space.lr": 0.1}, ["space.lr = 0.1: must be {low: …, high: …} or a list of choices"]),
    "null in the space": ({"space.lr": None}, ["space.lr = None: must be {low: …, high: …} or a list of choices"]),
    "no high": ({"space.k": {"low": 1}}, ["space.k: both low and high must be given"]),
    "low above high": ({"space.k": {"low": 6, "high": 5}}, ["space.k: low <= high must hold", "low = 6, high = 5"]),
    "half a class": ({"space.k.high": 5.5}, ["space.k.high = 5.5: must be a whole number"]),
    "half an int": ({"space.a": {**RANGE, "low": 1.5, "type": "int"}}, ["space.a.low = 1.5: must be a whole number"]),
    "the logarithm of 0": (
        {"space.a": {**RANGE, "low": 0, "log": True}},
        ["space.a: log: true needs bounds above 0", "0"],
    ),
    "a NaN bound": ({"space.k.low": math.nan}, ["space.k.low = nan: must be a finite number"]),
    "an infinite bound": ({"space.k.high": math.inf}, ["space.k.high = inf: must be a finite number"]),
    "a list for a bound": ({"space.k.low": [1]}, ["space.k.low = [1]: must be a number or text"]),
    "true for a bound": ({"space.k.low": True}, ["space.k.low = True: must be a number or text"]),
    "no choices": ({"space.k": []}, ["space.k.choices = []: choices must be at least one value, each once"]),
    "a choice twice": ({"space.k": [1, 5, 1]}, ["space.k.choices = [1, 5, 1]", "each once"]),
    "one choice in two guises": ({"space.a": [1, 1.0]}, ["space.a.choices = [1, 1.0]", "each once"]),
    "choices and a bound": ({"space.k": {"choices": [1], "low": 1}}, ["space.k: choices cannot be combined with low"]),
    "an unknown bound": ({"space.a": {**RANGE, "high": "kk"}}, ["space.a = 'kk'", "did you mean 'k'? known: k"]),
    "itself as a bound": ({"space.a": {**RANGE, "high": "a"}}, ["space.a = 'a': a bound must be a number or the name"]),
    "a choice as a bound": ({"space.k": [1, 5], "space.a": {**RANGE, "high": "k"}}, ["space.a = 'k'", "known: none"]),
    "fixed and searched": ({"loss": {"k": 5}}, ["loss.k: is both fixed here and searched under space"]),
    "lr bound to the loss": ({"space.lr": {"low": 0, "high": "k"}}, ["space.lr = 'k': a range of the recipe"]),
    "an unknown weight": ({"relative.of": ["a", "kk"], "space.a": RANGE}, ["relative.of = 'kk'", "known: a, k"]),
    "a single weight": ({"relative.of": ["k"]}, ["relative.of = ['k']: must have at least 2 items"]),
    "a weight twice": ({"relative.of": ["a", "a"], "space.a": RANGE}, ["relative.of = ['a', 'a']", "once"]),
    "a weight of 0": (
        {"relative.of": ["a", "b"], "space.a": RANGE, "space.b": {"low": 0, "high": 1}},
        ["space.b.low = 0.0: a relative weight must be above 0"],
    ),
    "a whole-number weight": ({"relative.of": ["a", "k"], "space.a": RANGE}, ["space.k: a relative weight must be"]),
    "a weight as another's bound": (
        {"relative.of": ["a", "b"], "space": {"a": RANGE, "b": RANGE, "c": {"low": 1, "high": "a"}}},
        ["space.c = 'a': a bound cannot lead into or out of relative.of"],
    ),
    "the effect of another method's weights": (
        {
            "method": "kd",
            "loss": {},
            "space": {"a": RANGE, "b": RANGE},
            "relative": {"of": ["a", "b"], "units": "effect"},
        },
        ["relative.units = 'effect': is defined for topkd and what it is plugged into", "method is kd"],
    ),
    "an unknown unit": (
        {"space": {"a": RANGE, "b": RANGE}, "relative": {"of": ["a", "b"], "units": "points"}},
        ["relative.units = 'points'", "effect"],
    ),
    "an effect as another's bound": (
        {"space": {"a": RANGE, "b": {"low": 1, "high": "a"}}, "relative": {"of": ["a", "b"], "units": "effect"}},
        ["space.b = 'a': a weight drawn by its effect has no bound"],
    ),
    "an effect that depends on a text": (
        {
            "loss": {"alpha": "much"},
            "space": {"tdl_weight": RANGE, "b": RANGE},
            "relative": {"of": ["tdl_weight", "b"], "units": "effect"},
        },
        ["loss.alpha = 'much': must be a number, at least 0"],
    ),
    "an effect that depends on choices of a text": (
        {
            "space": {"tdl_weight": RANGE, "b": RANGE, "beta": ["low", 1.0]},
            "relative": {"of": ["tdl_weight", "b"], "units": "effect"},
        },
        ["space.beta = 'low': must be a number, at least 0"],
    ),
}


@pytest.mark.parametrize(("changes", "told"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_told_with_key_value_and_known_choices(tmp_path, changes, told):
    text = refusal(written(tmp_path, changed(changes)))
    assert text.startswith(told[0]), text  # no other problem is told with it
    for part in told:
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize("bounds", [{"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "a"}])
def test_bounds_in_a_circle_are_told_with_the_circle(tmp_path, bounds):
    space = {name: {"low": 1.0, "high": high} for name, high in bounds.items()}
    text = refusal(written(tmp_path, changed({"space": space})))
    assert text.startswith("space.a: bounds name one another in a circle: a → b → ")
    assert text.endswith(" → a")


def test_a_long_chain_of_bounds_is_checked_at_once():
    space = {"p0": RANGE} | {f"p{i}": {"low": f"p{i - 1}", "high": f"p{i - 1}"} for i in range(1, 60)}
    assert len(config_from(changed({"space": space}), "test").space) == 60


def test_all_problems_are_told_at_once(tmp_path):
    changes = {"recipe.epochs": "8", "space.k.lo": 1, "method": "x", "sweep.trials": 0}
    lines = refusal(written(tmp_path, changed(changes))).splitlines()
    assert lines[0] == "4 problems"
    assert [line.split()[0].rstrip(":") for line in lines[1:]] == [
        "method",
        "recipe.epochs",
        "space.k.lo",
        "sweep.trials",
    ]


def test_all_problems_between_sections_are_told_at_once(tmp_path):
    changes = {"loss": {"k": 5}, "sweep": {"asha": {"grace_epochs": 9}}, "relative.of": ["x", "y"]}
    text = refusal(written(tmp_path, changed(changes)))
    assert text.startswith("4 problems")
    for part in ("loss.k", "sweep.asha.grace_epochs", "'x'", "'y'"):
        assert part in text


def test_a_new_sweep_divides_its_batches_among_gpus_and_an_older_one_keeps_what_it_had(tmp_path):
    raw = changed({"sweep.gpus_per_trial": 2.0, "recipe.batch_size": 63})
    with pytest.raises(ConfigError) as error:
        load_config(written(tmp_path, raw | {"sweep": raw["sweep"] | {"asha": {"grace_epochs": 99}}}))
    assert [problem.key for problem in error.value.problems] == ["sweep.asha.grace_epochs", "recipe.batch_size"]
    assert "recipe.batch_size = 63: must be a multiple of 2" in str(error.value)
    assert config_from(raw, "begun").sweep.gpus_per_trial == 2.0


def test_the_error_keeps_its_problems_for_programs():
    with pytest.raises(ConfigError) as caught:
        config_from(changed({"recipe.epochs": "8"}), "here")
    (problem,) = caught.value.problems
    assert (caught.value.source, problem.key, problem.value) == ("here", "recipe.epochs", "8")


@given(
    raw=st.dictionaries(
        st.sampled_from([*SweepConfig.model_fields, "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["name", "k", "low", "of"]), inner, max_size=3)
            ),
            max_leaves=6,
        ),
    )
)
@settings(deadline=None)
def test_whatever_the_data_it_is_a_config_or_a_config_error(raw):
    try:
        config_from(copy.deepcopy(MINIMAL) | raw, "any")
    except ConfigError as error:
        assert str(error).startswith("any: ")  # noqa: PT017 (not raising is right too)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("digit.yaml") == "cannot be read: No such file or directory"


def test_a_directory_is_told(tmp_path):
    assert refusal(tmp_path) == "cannot be read: Is a directory"


def test_a_name_that_no_file_can_have_is_told():
    assert refusal("x" * 300 + ".yaml") == "cannot be read: File name too long"


def test_a_file_that_is_not_utf8_is_told(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_bytes("description: é".encode("latin-1"))
    assert refusal(path) == "cannot be read: is not UTF-8 text"


NOT_YAML = {
    "a list left open": ("data: {}\nspace: [1, 2\n", "line 3, column 1: expected ',' or ']'"),
    "a key written twice": ("data: {}\nrecipe:\n  lr: 1\n  lr: 2\n", "line 4, column 3: the key 'lr' is written twice"),
    "a tab": ("data:\n\tname: x\n", "line 2, column 1: found character '\\t' that cannot start any token"),
    "a template": ("student: {{name}}\n", "line 1, column 11: found unhashable key"),
    "a list as a key": ("[a, b]: 1\n", "line 1, column 1: found unhashable key"),
    "a day that is none": ("data: {}\nname: 2026-02-31\n", "line 2, column 7: day is out of range for month"),
    "a number that is none": ("x: !!int a\n", "line 1, column 4: invalid literal for int()"),
    "a Python object": ("x: !!python/name:os.system\n", "line 1, column 4: could not determine a constructor"),
    "two documents": ("a: 1\n---\nb: 1\n", "line 2, column 1: but found another document"),
    "a control character": ("a: \x07\n", "unacceptable character #x0007"),
}


@pytest.mark.parametrize(("text", "told"), NOT_YAML.values(), ids=NOT_YAML)
def test_what_is_no_yaml_is_told_with_its_line(tmp_path, text, told):
    said = refusal(written(tmp_path, text))
    assert said.startswith("is no valid YAML: ")
    assert told in said
    assert "\n" not in said


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n", "1: 2\n", "null\n"])
def test_anything_but_a_mapping_is_told(tmp_path, text):
    assert refusal(written(tmp_path, text)) == "must be a mapping of keys to values"


def test_a_byte_order_mark_does_not_matter(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8-sig")
    assert read_yaml(path) == MINIMAL


# --- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("recipe.epochs=10", "recipe.epochs", 10),
        ("recipe.lr=1e-3", "recipe.lr", 0.001),
        (" method =kd", "method", "kd"),
        ("space.k=[1, 5]", "space.k", [1, 5]),
        ("space.k={low: 1, high: 3}", "space.k", {"low": 1, "high": 3}),
        ("sweep.asha=", "sweep.asha", None),
        ("description=a=b", "description", "a=b"),
    ],
)
def test_set_reads_the_value_as_yaml(text, key, value):
    assert parse_set(text) == Override(key, value, f"--set {text}")


@pytest.mark.parametrize("text", ["recipe.epochs", "=3", "recipe..epochs=3", ".epochs=3", "recipe.=3", "a b=3", ""])
def test_set_without_a_dotted_key_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--set: .*must read key=value, the key dotted") as caught:
        parse_set(text)
    assert text in str(caught.value)


@pytest.mark.parametrize("value", ["[1", "{{x}}", "2026-02-31", "{a: 1, a: 2}"])
def test_set_of_what_is_no_yaml_is_refused(value):
    with pytest.raises(ConfigError, match=r"^--set: .*the value is no YAML: line 1, column") as caught:
        parse_set(f"space.k={value}")
    assert f"space.k={value}" in str(caught.value)


def test_overrides_replace_values_in_order(tmp_path):
    overrides = [parse_set("recipe.epochs=10"), Override("recipe.epochs", 12, "--epochs")]
    config = load_config(written(tmp_path, MINIMAL), overrides)
    assert config.recipe.epochs == 12


@pytest.mark.parametrize(
    ("start", "text", "of"),
    [
        ({}, "sweep.asha.grace_epochs=2", lambda c: c.sweep.asha.grace_epochs == 2),
        ({"sweep": None}, "sweep.trials=2", lambda c: c.sweep.trials == 2),
        ({"sweep.asha": None}, "sweep.asha.grace_epochs=2", lambda c: c.sweep.asha.grace_epochs == 2),
        ({}, "sweep.asha=", lambda c: c.sweep.asha is None),
        ({}, "space.lr={low: 0.1, high: 1}", lambda c: c.space["lr"].high == 1.0),
        ({}, "student.kwargs.width=8", lambda c: (c.student.name, c.student.kwargs) == ("tiny", {"width": 8})),
        ({}, "student=small", lambda c: c.student.name == "small"),
    ],
)
def test_an_override_makes_the_sections_it_needs(tmp_path, start, text, of):
    assert of(load_config(written(tmp_path, changed(start)), [parse_set(text)]))


def test_null_on_the_command_line_takes_an_entry_away(tmp_path):
    start = {"space.k": [1, 2], "space.lr": [0.1, 0.2], "loss": {"alpha": 0.5}}
    overrides = [parse_set(text) for text in ("loss.k=3", "space.k=null", "loss.alpha=null")]
    config = load_config(written(tmp_path, changed(start)), overrides)
    assert list(config.space) == ["lr"]
    assert config.loss == {"k": 3}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "space.scale_tpo=null",
            "space has no entry 'scale_tpo' to take away; did you mean 'scale_top'? known: lr, scale_top",
        ),
        ("loss.beta=null", "loss has no entry 'beta' to take away; known: none"),
    ],
)
def test_null_takes_nothing_away_that_is_not_there(tmp_path, text, told):
    path = written(tmp_path, changed({"space": {"scale_top": [1.0, 2.0], "lr": [0.1, 0.2]}}))
    assert refusal(path, [parse_set(text)]) == f"--set {text}: {told}"


@pytest.mark.parametrize(
    ("start", "text", "told"),
    [
        ({}, "recipe.epochs.x=1", "--set recipe.epochs.x=1: recipe.epochs is a value, not a section"),
        ({}, "data.name.x=1", "--set data.name.x=1: data.name is a value, not a section"),
        ({"space.k": [1, 2]}, "space.k.low=1", "--set space.k.low=1: space.k is a value, not a section"),
        ({"data.student": "x"}, "data.student.y=1", "--set data.student.y=1: data.student is a value, not a section"),
    ],
)
def test_a_key_under_a_value_is_refused(tmp_path, start, text, told):
    assert refusal(written(tmp_path, changed(start)), [parse_set(text)]) == told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (Override("sweep.trials", 0, "--trials"), "sweep.trials (from --trials) = 0: must be greater"),
        (parse_set("recipe.epoch=1"), "recipe.epoch (from --set recipe.epoch=1): unknown key"),
        (parse_set("recip.epochs=1"), "recip (from --set recip.epochs=1): unknown key; did you mean 'recipe'?"),
        (parse_set("recipe={epochs: x}"), "recipe.epochs (from --set recipe={epochs: x}) = 'x': must be"),
        (parse_set("space.k.low=9"), "space.k (from --set space.k.low=9): low <= high must hold"),
        (parse_set("space.k.low=1.5"), "space.k.low (from --set space.k.low=1.5) = 1.5: must be a whole number"),
    ],
)
def test_a_problem_from_the_command_line_names_the_option(tmp_path, override, told):
    assert refusal(written(tmp_path, MINIMAL), [override]).startswith(told)


def test_a_problem_of_the_file_does_not_name_an_option_beside_it(tmp_path):
    path = written(tmp_path, changed({"recipe.lr": "x"}))
    assert refusal(path, [Override("recipe.epochs", 5, "--epochs")]).startswith("recipe.lr = 'x': ")


def test_of_two_options_for_one_key_the_last_is_named(tmp_path):
    overrides = [parse_set("sweep.trials=3"), Override("sweep.trials", 0, "--trials")]
    assert refusal(written(tmp_path, MINIMAL), overrides).startswith("sweep.trials (from --trials) = 0")


# --- extends --------------------------------------------------------------------------------------------------------

BARE = {name: section for name, section in MINIMAL.items() if name != "recipe"}
PARENT = {"recipe": {"epochs": 8, "lr": 0.5}}


def family(folder, files):
    """Files by name, with folders made for them; the path of `space.yaml`."""
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
    return folder / "space.yaml"


def test_a_file_is_merged_over_the_one_it_extends_key_by_key(tmp_path):
    parent = {"recipe": {"epochs": 8, "lr": 0.5, "milestones": [2, 4, 6]}, "space": {"a": {"low": 1.0, "high": 2.0}}}
    child = {"extends": "parent.yaml", "recipe": {"lr": 0.25, "milestones": [3]}, "space": {"a": {"high": 3.0}}}
    config = load_config(family(tmp_path, {"space.yaml": BARE | child, "parent.yaml": parent}))
    assert (config.recipe.epochs, config.recipe.lr) == (8, 0.25)
    assert config.recipe.milestones == [3]  # a list is replaced whole
    assert (config.space["a"].low, config.space["a"].high) == (1.0, 3.0)


def test_of_several_parents_the_later_wins_and_the_file_over_all(tmp_path):
    files = {
        "space.yaml": BARE | {"extends": ["one.yaml", "two.yaml"], "recipe": {"lr": 0.3}},
        "one.yaml": {"recipe": {"epochs": 1, "lr": 0.1, "momentum": 0.1, "gamma": 0.1}},
        "two.yaml": {"recipe": {"epochs": 2, "lr": 0.2, "momentum": 0.2}, "sweep": {"asha": None}},
    }
    config = load_config(family(tmp_path, files))
    recipe = config.recipe
    assert (recipe.gamma, recipe.momentum, recipe.lr, recipe.epochs) == (0.1, 0.2, 0.3, 2)
    assert config.sweep.asha is None  # outside of space and loss null is a value


def test_a_parent_is_found_relative_to_the_file_that_names_it(tmp_path, monkeypatch):
    files = {
        "space.yaml": BARE | {"extends": "bases/parent.yaml"},
        "bases/parent.yaml": {"extends": ["../other/grand.yaml"], "recipe": {"lr": 0.25}},
        "other/grand.yaml": PARENT,
    }
    path = family(tmp_path, files)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert (load_config(path).recipe.epochs, load_config(path).recipe.lr) == (8, 0.25)


def test_two_parents_of_one_grandparent_are_no_circle(tmp_path):
    files = {
        "space.yaml": BARE | {"extends": ["one.yaml", "two.yaml"]},
        "one.yaml": {"extends": "grand.yaml", "recipe": {"lr": 0.25}},
        "two.yaml": {"extends": "grand.yaml"},
        "grand.yaml": PARENT,
    }
    assert load_config(family(tmp_path, files)).recipe.lr == 0.5  # two brings the grandparent's again, after one


@pytest.mark.parametrize("section", ["space", "loss"])
def test_null_takes_an_inherited_entry_away(tmp_path, section):
    entries = {"a": [1, 2], "b": [1, 2]} if section == "space" else {"a": 1, "b": 2}
    files = {
        "space.yaml": BARE | {"extends": "parent.yaml", section: {"a": None, "c": entries["b"]}},
        "parent.yaml": PARENT | {section: entries},
    }
    assert set(getattr(load_config(family(tmp_path, files)), section)) == {"b", "c"}


def test_what_was_taken_away_can_be_given_again(tmp_path):
    files = {
        "space.yaml": BARE | {"extends": ["one.yaml", "two.yaml", "three.yaml"]},
        "one.yaml": PARENT | {"space": {"a": {"low": 1.0, "high": 2.0}}},
        "two.yaml": {"space": {"a": None}},
        "three.yaml": {"space": {"a": [1, 2]}},
    }
    assert load_config(family(tmp_path, files)).space["a"].choices == [1, 2]


def test_a_range_can_become_choices(tmp_path):
    files = {
        "space.yaml": BARE | {"extends": "parent.yaml", "space": {"k": [1, 5]}},
        "parent.yaml": PARENT | {"space": {"k": {"low": 1, "high": 20, "log": True}}},
    }
    assert load_config(family(tmp_path, files)).space["k"].choices == [1, 5]


def test_the_dumped_config_needs_no_parent(tmp_path):
    config = load_config(family(tmp_path, {"space.yaml": BARE | {"extends": "parent.yaml"}, "parent.yaml": PARENT}))
    (tmp_path / "alone").mkdir()
    assert load_config(written(tmp_path / "alone", dump_config(config))) == config


@pytest.mark.parametrize(
    ("parents", "source", "named"),
    [
        ({}, "space.yaml", "./space.yaml"),
        ({"a.yaml": {"extends": "space.yaml"}}, "a.yaml", "space.yaml"),
        ({"a.yaml": {"extends": "b/b.yaml"}, "b/b.yaml": {"extends": ["../a.yaml"]}}, "b/b.yaml", "../a.yaml"),
    ],
    ids=["itself", "its parent", "two parents"],
)
def test_a_circle_is_told_with_the_file_that_closes_it(tmp_path, parents, source, named):
    first = "a.yaml" if parents else "./space.yaml"
    path = family(tmp_path, {"space.yaml": BARE | {"extends": first}, **parents})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert (tmp_path / source).samefile(caught.value.source)
    assert str(caught.value) == f"{caught.value.source}: extends: goes in a circle: {named} extends this file"


def test_a_missing_parent_is_told_with_where_it_was_looked_for(tmp_path):
    files = {"space.yaml": BARE | {"extends": "bases/a.yaml"}, "bases/a.yaml": {"extends": "b.yaml"}}
    with pytest.raises(ConfigError) as caught:
        load_config(family(tmp_path, files))
    bases = tmp_path / "bases"
    assert str(caught.value) == f"{bases / 'a.yaml'}: extends = 'b.yaml': must be an existing file, relative to {bases}"


def test_a_folder_is_no_parent(tmp_path):
    path = family(tmp_path, {"space.yaml": BARE | {"extends": "bases"}, "bases/a.yaml": PARENT})
    assert refusal(path).startswith("extends = 'bases': must be an existing file")


@pytest.mark.parametrize("parents", [5, True, None, {"a": 1}, ["a.yaml", 5]])
def test_extends_must_be_paths(tmp_path, parents):
    path = family(tmp_path, {"space.yaml": BARE | {"extends": parents}, "a.yaml": PARENT})
    assert refusal(path).startswith(
        f"extends = {parents!r}: must be the path of a YAML, relative to this one, or a list"
    )


def test_a_parent_that_is_no_yaml_is_told_by_its_name(tmp_path):
    path = family(tmp_path, {"space.yaml": BARE | {"extends": "parent.yaml"}, "parent.yaml": "recipe: [1\n"})
    with pytest.raises(ConfigError, match="is no valid YAML") as caught:
        load_config(path)
    assert caught.value.source == str(tmp_path / "parent.yaml")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("recipe.epochs", 0, "recipe.epochs (from {}) = 0: must be greater"),
        ("recipe.epoch", 1, "recipe.epoch (from {}): unknown key"),
        ("recip", {"epochs": 1}, "recip (from {}): unknown key"),
        ("space.a", {"low": 2, "high": 1}, "space.a (from {}): low <= high must hold"),
        ("sweep.asha.grace_epochs", 9, "sweep.asha.grace_epochs (from {}) = 9: must be at most"),
    ],
)
def test_a_bad_value_of_a_parent_is_told_with_that_file(tmp_path, key, value, told):
    *sections, last = key.split(".")
    parent = {last: value}
    for section in reversed(sections):
        parent = {section: parent}
    files = {
        "space.yaml": BARE | {"extends": ["fine.yaml", "bases/bad.yaml"]},
        "fine.yaml": PARENT,
        "bases/bad.yaml": parent,
    }
    path = family(tmp_path, files)
    assert refusal(path).startswith(told.format(tmp_path / "bases" / "bad.yaml"))


def test_a_first_rung_after_the_last_epoch_is_told_with_one_that_fits(tmp_path):
    path = family(tmp_path, {"space.yaml": BARE | {"extends": "parent.yaml"}, "parent.yaml": PARENT})
    short = parse_set("recipe.epochs=18")
    told = refusal(path, [short, parse_set("sweep.asha.grace_epochs=26")])
    assert "must be at most recipe.epochs = 18; --set sweep.asha.grace_epochs=2 has rungs that fit" in told
    load_config(path, [short, parse_set("sweep.asha.grace_epochs=2")])


def test_a_bad_value_of_the_file_itself_is_not_blamed_on_a_parent_that_had_a_good_one(tmp_path):
    files = {"space.yaml": BARE | {"extends": "parent.yaml", "recipe": {"epochs": 0}}, "parent.yaml": PARENT}
    assert refusal(family(tmp_path, files)).startswith("recipe.epochs = 0: must be greater")


def test_a_bad_value_of_an_option_is_not_blamed_on_a_parent_that_had_a_good_one(tmp_path):
    path = family(tmp_path, {"space.yaml": BARE | {"extends": "parent.yaml"}, "parent.yaml": PARENT})
    told = refusal(path, [Override("recipe.epochs", 0, "--epochs")])
    assert told.startswith("recipe.epochs (from --epochs) = 0: must be greater")


def test_options_win_over_parents(tmp_path):
    path = family(tmp_path, {"space.yaml": BARE | {"extends": "parent.yaml"}, "parent.yaml": PARENT})
    recipe = load_config(path, [parse_set("recipe.epochs=3")]).recipe
    assert (recipe.epochs, recipe.lr) == (3, 0.5)


def nested(opening, link, count):
    """A YAML of so many anchors, each of which holds the one before it as often as `link` says."""
    return opening + "".join(link.format(own=n, last=n - 1) for n in range(1, count))


BOMBS = {
    "lists": nested("a0: &a0 [x, x]\n", "a{own}: &a{own} [*a{last}, *a{last}, *a{last}, *a{last}]\n", 40),
    "mappings": nested("a0: &a0 {x: 1}\n", "a{own}: &a{own} {{x: *a{last}, y: *a{last}}}\n", 40),
    "merges": nested("a0: &a0 {x: 1}\n", "a{own}: &a{own} {{<<: [*a{last}, *a{last}, *a{last}], y{own}: 1}}\n", 40),
    "plain": "a: [" + "1, " * 10_001 + "]",
}
DEPTHS = {
    "lists": "a: " + "[" * 2000 + "]" * 2000,
    "mappings": "a: " + "{b: " * 2000 + "1" + "}" * 2000,
    "blocks": "".join(f"{' ' * level}a:\n" for level in range(200)),
    "aliases": nested("a0: &a0 [x]\n", "a{own}: &a{own} [*a{last}]\n", 900),
    "keys": "? " * 900 + "a",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_yaml_that_stands_for_too_much_is_refused_before_it_is_spelt_out(tmp_path, name):
    (tmp_path / "bomb.yaml").write_text(BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=r"bomb\.yaml: is no valid YAML: line .* more than 10,000 values"):
            read_yaml(tmp_path / "bomb.yaml")
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", DEPTHS)
def test_a_yaml_that_goes_too_deep_is_refused(tmp_path, name):
    (tmp_path / "deep.yaml").write_text(DEPTHS[name])
    with pytest.raises(ConfigError, match=r"deep\.yaml: is no valid YAML: line .*: goes more than 64 levels deep"):
        read_yaml(tmp_path / "deep.yaml")


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}", "a: &a [1, {b: [*a]}]"])
def test_a_yaml_that_holds_itself_is_refused(tmp_path, text):
    (tmp_path / "self.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"self\.yaml: .*the alias 'a' lies within what it stands for"):
        read_yaml(tmp_path / "self.yaml")


def test_a_yaml_within_the_bounds_is_read(tmp_path):
    content = {"list": list(range(2000)), "deep": functools.reduce(lambda inner, _: [inner], range(60), 1)}
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(content))
    assert read_yaml(tmp_path / "large.yaml") == content


def test_what_is_too_large_for_a_config_is_not_read_to_its_end():
    with pytest.raises(ConfigError, match=r"^/dev/zero: is no config: it has more than 1,048,576 bytes$"):
        read_yaml("/dev/zero")


@pytest.mark.parametrize("value", ["[" * 900, BOMBS["plain"].removeprefix("a: "), "[&a [*a]]"])
def test_a_value_of_set_has_the_same_bounds(value):
    with pytest.raises(ConfigError, match=r"--set: .*the value is no YAML: "):
        parse_set(f"loss.k={value}")


def test_an_alias_is_a_copy_and_an_override_changes_one_place(tmp_path):
    text = yaml.safe_dump(MINIMAL | {"teacher": {"name": "cnn"}}).replace("  name: cnn", "  name: cnn\n  recipe: *r")
    text = "recipe: &r {epochs: 8}\n" + text.replace("recipe:\n  epochs: 8\n", "")
    config = load_config(written(tmp_path, text), [parse_set("recipe.epochs=5")])
    assert (config.recipe.epochs, config.teacher.recipe.epochs) == (5, 8)


def test_an_override_of_a_whole_section_is_not_blamed_on_the_parent(tmp_path):
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump({"recipe": {"epochs": 40, "lr": 0.1}}))
    child = written(tmp_path, {"extends": "parent.yaml"} | {k: v for k, v in MINIMAL.items() if k != "recipe"})
    assert load_config(child).recipe.epochs == 40
    text = refusal(child, [parse_set("recipe={epochs: 0}")])
    assert text.startswith("recipe.epochs (from --set recipe={epochs: 0}) = 0: "), text
