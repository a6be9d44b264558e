"""What preflight finds by showing images to the networks of a config and logits to its loss."""

import copy
import importlib
import random

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from tune_topkd.config import ConfigError
from tune_topkd.models import build_model
from tune_topkd.models import save_weights
from tune_topkd.sweep import preflight

SPACE = {
    "data": {"name": "digits"},
    "teacher": {"name": "digits_linear", "recipe": {"epochs": 2}},
    "student": "digits_linear",
    "method": "kd",
    "recipe": {"epochs": 2},
    "space": {"lr": {"low": 0.01, "high": 0.5, "log": True}},
    "sweep": {"asha": None},
}

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, side=8, hidden=64):
        super().__init__()
        self.body, self.head = nn.Linear(side * side, hidden), nn.Linear(hidden, num_classes)

    def forward(self, images):
        feats = self.body(images.flatten(1)).relu()
        logits = self.head(feats)
        return logits
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a text as a module that can be imported, under a name of its own."""
    monkeypatch.syspath_prepend(tmp_path)

    def module(text):
        name = f"mine_{random.getrandbits(60):x}"
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    return module


@pytest.fixture
def checked(tmp_path):
    """Check a space with some keys changed, as a sweep or as a single training."""

    def checked(changes, load=preflight.load_checked):
        content = copy.deepcopy(SPACE) | changes
        (tmp_path / "space.yaml").write_text(yaml.safe_dump(content))
        return load(str(tmp_path / "space.yaml"))

    return checked


def problems(checked, changes, load=preflight.load_checked):
    with pytest.raises(ConfigError) as caught:
        checked(changes, load)
    return [str(problem) for problem in caught.value.problems]


# --- networks -------------------------------------------------------------------------------------------------------

GIVES = {
    "a tuple": "return logits, {'feats': feats, 'pooled': logits}",
    "features first": "return [feats], logits",
    "a dict": "return {'logits': logits, 'aux': logits + 1}",
    "a dict by shape": "return {'feats': feats, 'out': logits}",
    "an object": "from types import SimpleNamespace\n        return SimpleNamespace(logits=logits, loss=None)",
}


@pytest.mark.parametrize("gives", GIVES)
def test_logits_are_found_among_what_a_network_gives(checked, module, gives):
    name = module(NET.replace("return logits", GIVES[gives]))
    both = {"student": f"{name}:Net", "teacher": {"name": f"{name}:Net", "recipe": {"epochs": 2}}}
    assert checked(both).warnings == ()


WRONG = {
    "two of the shape of logits": ("return logits", "return logits, -logits", "name", "2 tensors of the shape (2, 10)"),
    "features alone": ("return logits", "return (feats,)", "name", "no tensor of the shape (2, 10) of logits"),
    "nothing": ("return logits", "return None", "name", "gives a NoneType of nothing"),
    "another number of classes": (
        "(hidden, num_classes)",
        "(hidden, 1000)",
        "name",
        "(2, 1000); does its code use num",
    ),
    "not a number": ("return logits", "return logits / 0 * 0", "name", "not finite"),
    "classes": ("return logits", "return (logits * 9).long()", "name", "floating point, but gives torch.int64"),
    "a map": ("return logits", "return logits[..., None]", "name", "gives (2, 10, 1)"),
    "a single image squeezed": (
        "return logits",
        "return logits.squeeze(0)",
        "name",
        "(1, 10) for 1 images, but gives (10,)",
    ),
    "only large batches": (
        "return logits",
        "assert len(images) > 1, 'no'\n        return logits",
        "name",
        "takes no 1 images",
    ),
    "images of another size": ("side=8", "side=32", "image_size", "takes no 2 images of the shape (1, 8, 8)"),
    "colour": ("images.flatten(1)", "images[:, [2, 1, 0]].mean(1).flatten(1)", "name", "it takes 3 channels"),
    "lazy": ("nn.Linear(side * side, hidden)", "nn.LazyLinear(hidden)", "name", "lazy layers"),
    "changed images": ("images.flatten(1)", "images.mul_(2).flatten(1)", "name", "changes the images in place"),
    "no gradient": ("return logits", "return logits.detach()", "name", "depend on none of its weights"),
    "failing in training": (
        "return logits",
        "assert not self.training, 'oh'\n        return logits",
        "name",
        "AssertionError: oh",
    ),
    "other logits in training": (
        "return logits",
        "return logits[:, :5] if self.training else logits",
        "name",
        "in training mode",
    ),
    "a tuple in training": (
        "return logits",
        "return (logits, logits) if self.training else logits",
        "name",
        "2 tensors",
    ),
    "an argument": ("side=8", "side", "kwargs", "missing 1 required positional argument: 'side'"),
    "nothing to train": (
        "        self.body, self.head =",
        "        self.body = self.head = lambda x: x[:, :10]\n        return\n        self.body, self.head =",
        "name",
        "has no weights that can be trained",
    ),
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_network_that_does_not_fit_is_a_problem_of_its_key(checked, module, wrong, role):
    old, new, key, told = WRONG[wrong]
    assert old in NET
    network = {"name": f"{module(NET.replace(old, new))}:Net"}
    changes = {"student": network} if role == "student" else {"teacher": network | {"recipe": {"epochs": 2}}}
    if (wrong, role) == ("changed images", "teacher"):  # nobody is shown them after the teacher
        assert checked(changes).warnings == ()
        return
    found = problems(checked, changes)
    assert len(found) == 1
    assert found[0].startswith(f"{role}.{key}")
    assert told in found[0]


def test_an_image_size_that_a_network_takes_is_told(checked, module):
    student = {"name": f"{module(NET)}:Net", "kwargs": {"side": 64}}
    (found,) = problems(checked, {"student": student})
    assert found.startswith("student.image_size = None: takes no 2 images of the shape (1, 8, 8) (RuntimeError: ")
    assert found.endswith("; with 64 it would")
    assert checked({"student": student | {"image_size": 64}}).warnings == ()
    (found,) = problems(checked, {"student": student | {"image_size": 32}})
    assert found.startswith("student.image_size = 32: ")


def test_a_network_for_colour_is_told_apart_by_trying(checked):
    (found,) = problems(checked, {"student": "resnet8"})
    assert found.startswith("student.name = 'resnet8': takes no 2 images of the shape (1, 8, 8) (RuntimeError: ")
    assert found.endswith("it takes 3 channels, and those of the dataset have 1")


def test_all_that_does_not_fit_is_told_at_once_and_of_a_single_training_too(checked, module):
    name = module(NET.replace("(hidden, num_classes)", "(hidden, 7)"))
    changes = {"student": f"{name}:Net", "teacher": {"name": "resnet8", "recipe": {"epochs": 2}}, "method": "topkd"}
    changes["loss"] = {"k": 11}
    for load in (preflight.load_checked, preflight.load_checked_pair):
        keys = [found.partition(" ")[0].rstrip(":") for found in problems(checked, changes, load)]
        assert keys == ["teacher.name", "student.name", "loss.k"]


FLAT = NET.replace(
    "(images.flatten(1)).relu()", "(images.flatten(1)).relu()\n        feats = self.norm(feats)"
).replace("super().__init__()", "super().__init__()\n        self.norm = nn.BatchNorm1d(hidden)")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"recipe": {"epochs": 2, "batch_size": 1}}, "recipe.batch_size"),
        ({"space": {"batch_size": {"low": 1, "high": 8}}}, "space.batch_size"),
        ({"space": {"batch_size": [4, 1]}}, "space.batch_size"),
    ],
)
def test_batches_of_one_are_refused_where_the_network_cannot_be_trained_on_them(checked, module, changes, key):
    (found,) = problems(checked, changes | {"student": f"{module(FLAT)}:Net"})
    assert found.startswith(f"{key}: must be at least 2: the student cannot be trained on a single image (ValueError")


def test_what_a_network_prints_is_no_result(checked, module, capfd):
    checked({"student": f"{module(NET.replace('feats = ', 'print(1234567); feats = '))}:Net"})
    out, err = capfd.readouterr()
    assert (out, "1234567" in err) == ("", True)


def test_weights_that_nothing_depends_on_are_a_note(checked, module):
    name = module(NET.replace("super().__init__()", "super().__init__()\n        self.aux = nn.Linear(3, 4)"))
    (note,) = checked({"student": f"{name}:Net"}).warnings
    assert note.endswith("weights of the student, which stay as they are: aux.weight, aux.bias")


def test_a_check_draws_nothing_from_the_global_generator(checked):
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    checked({})
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    save_weights(build_model("digits_cnn_tiny", num_classes=10), tmp_path / "w.pt")
    return tmp_path / "w.pt"


@pytest.mark.parametrize("load", [preflight.load_checked, preflight.load_checked_pair])
def test_a_checkpoint_is_read_before_anything_is_spent_on_it(checked, weights, load):
    teacher = {"name": "digits_cnn_tiny", "checkpoint": str(weights)}
    student = {"name": "digits_cnn_tiny", "checkpoint": str(weights)}
    assert checked({"teacher": teacher, "student": student}, load)
    weights.write_bytes(weights.read_bytes()[:-900])
    found = problems(checked, {"teacher": teacher, "student": student}, load)
    assert [text.partition(":")[0] for text in found] == ["teacher.checkpoint", "student.checkpoint"]
    assert all("w.pt: is damaged or no checkpoint: the file is cut off" in text for text in found)


def test_a_checkpoint_of_other_classes_is_told_of_the_teacher_and_is_a_backbone_for_the_student(checked, tmp_path):
    save_weights(build_model("digits_cnn_tiny", num_classes=7), tmp_path / "w.pt")
    network = {"name": "digits_cnn_tiny", "checkpoint": str(tmp_path / "w.pt")}
    assert checked({"student": network}).warnings == ()
    (found,) = problems(checked, {"teacher": network})
    assert found.startswith("teacher.checkpoint: ")
    assert "a head for 7 classes, the network one for 10 (classifier.weight)" in found


def test_weights_that_are_no_numbers_a_folder_and_a_missing_file_are_told(checked, weights, tmp_path):
    network = build_model("digits_cnn_tiny", num_classes=10)
    nn.init.constant_(network.classifier.weight, float("nan"))
    save_weights(network, weights)
    teacher = {"name": "digits_cnn_tiny", "checkpoint": str(weights)}
    (found,) = problems(checked, {"teacher": teacher})
    assert found.startswith("teacher.checkpoint = 'digits_cnn_tiny': gives logits that are not finite")
    (found,) = problems(checked, {"teacher": teacher | {"checkpoint": str(tmp_path)}})
    assert "but is a folder: name the file of weights in it" in found
    (found,) = problems(checked, {"teacher": teacher | {"checkpoint": "gone.pt"}})
    assert "must be an existing file" in found


def test_all_missing_files_are_told_at_once_also_where_the_images_are_among_them(checked, tmp_path):
    data = {"name": "image_folder", "root": str(tmp_path / "no-images")}
    networks = {key: {"name": "resnet18", "checkpoint": str(tmp_path / key)} for key in ("teacher", "student")}
    images, teacher, student = problems(checked, {"data": data, **networks})
    assert images.startswith(f"data: dataset 'image_folder': {tmp_path / 'no-images'} is not a folder")
    assert teacher == f"teacher.checkpoint = '{tmp_path / 'teacher'}': must be an existing file"
    assert student == f"student.checkpoint = '{tmp_path / 'student'}': must be an existing file"


# --- losses ---------------------------------------------------------------------------------------------------------

FIT = "return torch.nn.functional.cross_entropy(student, labels)"
LOSS = f"""
import torch

def loss(student, teacher, labels, strength=1.0):
    {FIT}
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (FIT, "return student.sum(1)", "must return a scalar tensor, but returned shape (64,)"),
        (FIT, "return student.mean().item()", "must return a scalar tensor, but returned float"),
        (FIT, "return teacher.square().mean()", "RuntimeError: element 0 of tensors does not require grad"),
        (FIT, "return student.mean() / 0", "is not finite"),
        (FIT, "return (student - student).norm()", ""),
        (FIT, "return (student - student).abs().mean().sqrt()", "its gradient is not finite"),
        (FIT, "return undefined", "NameError: name 'undefined' is not defined"),
        ("strength=1.0", "*, strength", "TypeError: loss() missing 1 required keyword-only argument: 'strength'"),
        ("strength=1.0", "strength", "TypeError: loss() missing 1 required positional argument: 'strength'"),
        (
            "student, teacher, labels, strength=1.0",
            "student, teacher",
            "TypeError: loss() takes 2 positional arguments",
        ),
    ],
)
def test_a_loss_that_fails_is_a_problem_before_anything_is_spent(checked, module, old, new, told):
    method = f"{module(LOSS.replace(old, new))}:loss"
    if not told:
        assert checked({"method": method}).warnings == ()
        return
    (found,) = problems(checked, {"method": method})
    assert found.startswith("method: ")
    assert told in found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (FIT, "return student.topk(50, dim=0).values.mean()"),  # needs a whole batch
        ("labels, strength=1.0", "labels=None, k=100"),  # no TopKD's
        ("strength=1.0", "*others, strength=1.0, **more"),
        ("labels, strength=1.0", "labels, /, strength=None"),
    ],
)
def test_a_loss_may_be_written_in_any_way_that_can_be_called(checked, module, old, new):
    assert checked({"method": f"{module(LOSS.replace(old, new))}:loss"}).warnings == ()


def test_a_parameter_without_a_number_for_a_default_can_be_set_and_searched(checked, module):
    method = f"{module(LOSS.replace('strength=1.0', 'strength=None'))}:loss"
    assert checked({"method": method, "loss": {"strength": 0.5}}).config.loss == {"strength": 0.5}
    assert "strength" in checked({"method": method, "space": {"strength": {"low": 0.1, "high": 1.0}}}).config.space


@pytest.mark.parametrize("name", ["gamma", "lr", "momentum", "weight_decay", "batch_size"])
def test_a_parameter_of_the_loss_and_of_the_recipe_is_not_searched_without_a_word(checked, module, name):
    method = f"{module(LOSS.replace('strength=1.0', f'{name}=0.5'))}:loss"
    searched = {"space": {name: [1, 2] if name == "batch_size" else [0.1, 0.2]}}
    (found,) = problems(checked, {"method": method} | searched)
    assert found.startswith(f"space.{name}: is a parameter of both the recipe and method {method}")
    other = {"space": {"weight_decay" if name != "weight_decay" else "momentum": [0.1, 0.2]}}
    assert checked({"method": method, "loss": {name: 0.25}} | other).config.loss == {name: 0.25}


def test_a_base_whose_parameter_is_called_as_the_plug_ins_is_refused(checked, module):
    method = f"{module(LOSS.replace('strength', 'weight'))}:loss+topkd"
    (found,) = problems(checked, {"method": method})
    assert "base_weight is the plug-in's own: give weight of the base another name" in found


@pytest.mark.parametrize("default", ["float('inf')", "-float('inf')", "float('nan')", "torch.tensor(float('nan'))"])
def test_a_default_that_no_tuned_config_can_hold_is_found_at_the_start(checked, module, default):
    method = f"{module(LOSS.replace('strength=1.0', f'strength={default}'))}:loss"
    (found,) = problems(checked, {"method": method})
    assert found.startswith("loss.strength = ")
    assert "cannot be kept in a tuned config" in found
    assert checked({"method": method, "loss": {"strength": 1.0}}).warnings == ()
    searched = checked({"method": method, "space": {"strength": {"low": 0.1, "high": 1.0}}}).config
    assert preflight.first_proposals(searched) == []
    assert checked({"method": method}, preflight.load_checked_pair)  # has no tuned config


@pytest.mark.parametrize("default", ["torch.ones(3)", "(1.0, 2.0)", "torch.relu", "b'x'"])
def test_a_default_that_is_no_number_stays_the_codes_and_is_told(checked, module, default):
    method = f"{module(LOSS.replace('strength=1.0', f'strength={default}'))}:loss"
    (note,) = checked({"method": method}).warnings
    assert note.startswith(f"loss.strength is set by the code of {method}: no tuned config can hold ")


def test_numbers_of_numpys_and_torchs_are_pythons(checked, module):
    defaults = "a=numpy.float64(0.5), b=numpy.int64(7), c=torch.tensor(2.5), d=10**300, e=numpy.bool_(True), f='mean'"
    method = f"{module('import numpy' + LOSS.replace('strength=1.0', defaults))}:loss"
    found = preflight.loss_defaults(checked({"method": method}).config)
    assert found == {"a": 0.5, "b": 7, "c": 2.5, "d": 10**300, "e": True, "f": "mean"}
    assert [type(value) for value in found.values()] == [float, int, float, int, bool, str]
    assert not any(isinstance(value, np.generic) for value in found.values())


# --- K --------------------------------------------------------------------------------------------------------------

THREE = {
    "method": "topkd",
    "data": {"name": "tiny_imagenet", "kwargs": {"num_classes": 3}, "root": "nowhere"},
    "teacher": {"name": "small_cnn", "kwargs": {"widths": [4]}, "recipe": {"epochs": 2}},
    "student": {"name": "small_cnn", "kwargs": {"widths": [4]}},
}


@pytest.mark.parametrize("method", ["topkd", "kd+topkd"])
@pytest.mark.parametrize("load", [preflight.load_checked, preflight.load_checked_pair])
def test_k_must_fit_the_classes_wherever_it_comes_from(checked, method, load):
    (found,) = problems(checked, THREE | {"method": method}, load)
    assert found == f"loss.k: k must be at most 3, the number of classes, but got 5, the default of method {method}"
    (found,) = problems(checked, THREE | {"method": method, "loss": {"k": 4}}, load)
    assert found == "loss.k: k must be at most 3, the number of classes, but got 4"
    assert checked(THREE | {"method": method, "loss": {"k": 3}}, load)


def test_k_that_is_searched_must_fit_and_its_default_need_not(checked):
    for k in ({"low": 1, "high": 4}, [1, 4]):
        (found,) = problems(checked, THREE | {"space": {"k": k}})
        assert found.startswith("space")
        assert "at most 3" in found
    found = checked(THREE | {"space": {"k": {"low": 1, "high": 3}}})
    assert (found.config.space["k"].high, found.config.baselines.methods) == (3, ["ce", "kd"])
    assert [note for note in found.warnings if "the baseline `defaults` trains with K = 5" in note]
    asked = THREE | {"space": {"k": {"low": 1, "high": 3}}, "baselines": {"methods": ["defaults", "kd"]}}
    (refused,) = problems(checked, asked)
    assert refused.endswith("must be at most 3, the number of classes; take it out: ['kd']")
    assert checked(THREE | {"method": "kd"}).config.method == "kd"
