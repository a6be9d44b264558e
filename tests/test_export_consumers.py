"""The formats of several files, each run by the framework that it is for, and where they are written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tune_topkd.config import ConfigError
from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.config import RecipeConfig
from tune_topkd.config import StudentConfig
from tune_topkd.export import BUNDLES
from tune_topkd.export import Evidence
from tune_topkd.export import TunedConfig
from tune_topkd.export import as_python
from tune_topkd.export import write_files
from tune_topkd.export.folders import MARK
from tune_topkd.loss import build_loss
from tune_topkd.loss import loss_parameters
from tune_topkd.models import build_model

CHANGED = {"k": 3, "temperature": 2.5, "beta": 3.0, "ce_weight": 0.7, "base_temperature": 3.5}
"""What a sweep found, for the methods that have it."""


def answer(method="dkd+topkd", data=None, teacher="digits_cnn", student=None, **recipe):
    """A tuned config, as a sweep would leave it."""
    known = loss_parameters(method)
    evidence = Evidence(
        val_top1=94.25,
        trial=1,
        trials={"completed": 2, "pruned": 0, "failed": 0},
        baselines={},
        seeds=[0],
        sweep="digits",
        sweep_id="0123456789abcdef",
        digest="12345678e9012345",
        space_digest="826d8589ff6df042",
        teacher={},
        versions={"torch": torch.__version__},
    )
    return TunedConfig(
        method=method,
        loss=known | {name: value for name, value in CHANGED.items() if name in known},
        recipe=RecipeConfig(**{"epochs": 2, "batch_size": 16, "lr": 0.05, "distill_warmup": 4} | recipe),
        data=DataConfig(**data or {"name": "digits", "augment": {"pad": 1}}),
        teacher=ModelConfig.model_validate(teacher) if teacher else None,
        student=StudentConfig.model_validate(student or {"name": "digits_cnn_tiny", "kwargs": {"widths": [4, 8]}}),
        evidence=evidence,
    )


def written(folder, format_, tuned):
    """The folder with an export in which the networks are filled in as its comments say."""
    write_files(folder, BUNDLES[format_](tuned))
    for path in folder.glob("tuned_*.py"):
        path.write_text(filled_in(path.read_text()))
    return folder


def filled_in(text):
    """A module whose networks are constructed as the comments at their places say."""

    def code(match):
        lines = match.group(1).splitlines() + match.group(2).splitlines()
        return "".join(f"    {re.sub('^ *# *', '', line)}\n" for line in lines)

    return re.sub(r"    # FILL IN: construct it.*\n((?:    #     .*\n)+)    raise .*\n((?:    # .*\n)+)", code, text)


def outcome(script, folder, *arguments, ours=()):
    """What a script prints last, as JSON, in a Python of its own; warnings of our modules are errors."""
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[1]), *sys.path])
    strict = [option for module in ("tuned", *ours) for option in ("-W", f"error:::{module}")]
    command = [sys.executable, *strict, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_steps(steps, tuned):
    """Each recorded step has the value of the sweep's loss on the same logits in the same epoch, to the last bit."""
    loss = build_loss(tuned.method, tuned.loss)
    for step in steps:
        terms = loss.terms(step["student"], step["teacher"], step["labels"])
        share = tuned.recipe.distill_share(step["epoch"], tuned.method)
        total = loss.total({name: term if name == "ce" else share * term for name, term in terms.items()})
        assert torch.equal(total, step["value"])
        assert step["student"].std() > 0


# --- where they are written -----------------------------------------------------------------------------------------


def test_files_are_written_with_a_mark_by_which_they_are_replaced_later(tmp_path):
    folder = tmp_path / "made" / "here"
    paths = write_files(folder, {"a.py": "A = 1\n", "b.yaml": "b: 1\n"})
    assert [path.read_text() for path in paths] == [f"{MARK}\nA = 1\n", f"{MARK}\nb: 1\n"]
    (folder / "own.txt").write_text("mine")
    write_files(folder, {"a.py": "A = 2\n"})
    assert (folder / "a.py").read_text() == f"{MARK}\nA = 2\n"
    assert sorted(path.name for path in folder.iterdir()) == ["a.py", "b.yaml", "own.txt"]


@pytest.mark.parametrize("mine", ["", "A = 3\n", f"#\n{MARK}\n", MARK[:-1], MARK + "x"])
def test_a_file_of_another_origin_is_not_replaced_and_nothing_is_written(tmp_path, mine):
    (tmp_path / "b.py").write_text(mine)
    with pytest.raises(ConfigError) as refused:
        write_files(tmp_path, {"a.py": "A = 1\n", "b.py": "B = 1\n"})
    assert str(refused.value) == (
        f"-o: {tmp_path / 'b.py'}: is not of an export, so it is not replaced: move it away, or name another folder"
    )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("b.py", mine)]


def test_a_folder_of_the_name_of_a_file_is_not_replaced(tmp_path):
    (tmp_path / "a.py").mkdir()
    with pytest.raises(ConfigError, match="is not of an export"):
        write_files(tmp_path, {"a.py": "A = 1\n"})


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    path = tmp_path / "tuned.yaml"
    path.write_text(f"{MARK}\n")
    with pytest.raises(ConfigError, match="is not a folder, and this format is several files; name a folder"):
        write_files(path, {"a.py": "A = 1\n"})


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", BUNDLES)
def test_each_has_the_file_with_the_loss_and_says_what_it_is(format_):
    tuned = answer()
    texts = BUNDLES[format_](tuned)
    assert texts["tuned.py"] == as_python(tuned)
    for name, text in texts.items():
        head = text[:1500]
        assert "dkd+topkd tuned for digits_cnn -> digits_cnn_tiny on digits: " in head, name
        assert "sweep digits" in head
        assert "94.25 %" in head
        assert name == "tuned.py" or "To fill in, marked FILL IN: " in head


MANY = {
    "plain": {},
    "cifar": {
        "data": {"name": "cifar100", "augment": {"pad": 4, "flip": True}},
        "teacher": "resnet56",
        "student": "resnet20",
    },
    "vit": {
        "data": {
            "name": "cifar100",
            "image_size": 224,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "augment": {
                "crop_scale": [0.08, 1.0],
                "flip": True,
                "rotate": 5.0,
                "rand_augment": {"ops": 2, "magnitude": 9},
                "erase": 0.25,
                "mixup": 0.2,
            },
        },
        "teacher": {"name": "resnet56", "image_size": 32},
        "student": "timm:deit_tiny_patch16_224",
        "optimizer": "adamw",
        "schedule": "cosine",
        "min_lr": 1e-5,
        "warmup_epochs": 20,
        "clip_grad": 1.0,
        "precision": "bfloat16",
        "ema": {"decay_epochs": 0.4},
    },
    "imagenet": {
        "method": "topkd",
        "data": {"name": "imagenet", "augment": {"crop_scale": [0.08, 1.0], "flip": True}},
        "teacher": "torchvision:resnet34",
        "student": "torchvision:resnet18",
        "nesterov": True,
        "warmup_epochs": 3,
    },
    "own": {
        "method": "kd",
        "data": {"name": "some.where:Source"},
        "teacher": "my.networks:big",
        "student": {"name": "my.networks:small", "kwargs": {"width": 4}},
        "schedule": "constant",
        "warmup_epochs": 1,
    },
}
"""Arguments of `answer` whose exports differ in what is known, and in the parts of the recipe."""


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize("format_", BUNDLES)
def test_each_is_written_as_one_would_write_it(tmp_path, format_, kind):
    """No name is unknown or imported in vain, the formatter would change nothing, and the YAML has no doubt in it."""
    folder = tmp_path / "export"
    write_files(folder, BUNDLES[format_](answer(**MANY[kind])))
    for command in (["check", "--select", "F,D1"], ["format", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "120", folder], capture_output=True
        )
        assert done.returncode == 0, done.stdout.decode()
    for path in folder.glob("*.yaml"):
        assert "1e-05" not in path.read_text()  # a text to YAML


# --- torchdistill ---------------------------------------------------------------------------------------------------

TORCHDISTILL = """
import json, sys, torch
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies
from torchdistill.core.distillation import get_distillation_box
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

torch.manual_seed(0)
config = yaml_util.load_yaml_file(sys.argv[1])
import_dependencies(config["dependencies"])
networks = []
for role in ("teacher_model", "student_model"):
    said = config["models"][role]
    network = get_image_classification_model(said)
    networks.append(get_model(said["key"], None, **said["kwargs"]) if network is None else network)
teacher, student = networks
before = [weight.detach().clone() for weight in student.parameters()]
kept = {name: value.clone() for name, value in teacher.state_dict().items()}
box = get_distillation_box(teacher, student, config["datasets"], config["train"], torch.device("cpu"), None, False, 1)

import tuned_torchdistill
forward, steps = tuned_torchdistill.TunedLoss.forward, []

def recorded(self, student_io, teacher_io, targets, *args, **kwargs):
    value = forward(self, student_io, teacher_io, targets, *args, **kwargs)
    logits = [io["."]["output"].detach() for io in (student_io, teacher_io)]
    epoch = self.epoch
    steps.append(dict(student=logits[0], teacher=logits[1], labels=targets, epoch=epoch, value=value.detach()))
    return value

tuned_torchdistill.TunedLoss.forward = recorded
rates = []
for epoch in range(box.num_epochs):
    box.pre_epoch_process(epoch=epoch)
    rates.append(box.optimizer.param_groups[0]["lr"])
    for batch, targets, supp in box.train_data_loader:
        box.post_forward_process(loss=box.forward_process(batch, targets, supp))
    box.student_model.eval()
    with torch.inference_mode():
        seen = [box.student_model(batch).shape for batch, _ in box.val_data_loader]
    box.post_epoch_process()
torch.save(steps, "steps.pt")
moved = any(not torch.equal(a, b) for a, b in zip(before, student.parameters()))
same = all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
groups = [(len(group["params"]), group["weight_decay"]) for group in box.optimizer.param_groups]
kind = type(box.optimizer).__name__
print(json.dumps(dict(rates=rates, moved=moved, teacher_kept=same, groups=groups, optimizer=kind, seen=len(seen),
                      clip=box.max_grad_norm)))
"""


def fake(text, size=48):
    """A config for torchdistill whose datasets are few random images."""
    text = re.sub(r"key: torchvision\.datasets\.CIFAR100\n(.*\n.*\n)(?: +(?:root|train|download): .*\n)+", _FAKE, text)
    text = text.replace("num_workers: 2", "num_workers: 0")
    return re.sub(r"( +)(image_size: )", rf"\1size: {size}\n\1\2", text)


_FAKE = r"key: torchvision.datasets.FakeData\n\1        image_size: [3, 32, 32]\n        num_classes: 100\n"


@pytest.fixture
def torchdistill():
    """Skip where torchdistill is not."""
    return pytest.importorskip("torchdistill", reason="needs torchdistill: pip install '.[consumers]'")


def distilled(folder, tuned):
    written(folder, "torchdistill", tuned)
    config = folder / "tuned_torchdistill.yaml"
    config.write_text(fake(config.read_text()))
    return outcome(TORCHDISTILL, folder, config, ours=["tuned_torchdistill"])


@pytest.mark.parametrize(("method", "warmup"), [("dkd+topkd", 4), ("topkd", None), ("ce", None)])
def test_torchdistill_trains_by_it(tmp_path, torchdistill, method, warmup):
    tuned = answer(method, distill_warmup=warmup, clip_grad=0.5, milestones=[1])
    done = distilled(tmp_path, tuned)
    steps = torch.load(tmp_path / "steps.pt")
    assert [step["epoch"] for step in steps] == [1, 1, 1, 2, 2, 2]
    check_steps(steps, tuned)
    assert done["rates"] == pytest.approx([0.05, 0.005])
    assert (done["moved"], done["teacher_kept"], done["seen"], done["clip"]) == (True, True, 3, 0.5)
    assert done["optimizer"] == "SGD"


def test_torchdistill_reads_the_whole_of_a_recipe_for_transformers(tmp_path, torchdistill):
    data = MANY["vit"]["data"] | {"image_size": 64}
    student = {"name": "timm:deit_tiny_patch16_224", "kwargs": {"img_size": 64, "depth": 1}}
    recipe = {"optimizer": "adamw", "schedule": "cosine", "min_lr": 1e-5, "weight_decay": 0.05, "warmup_epochs": 4}
    tuned = answer(data=data, teacher={"name": "resnet20", "image_size": 32}, student=student, **recipe, epochs=3)
    done = distilled(tmp_path, tuned)
    check_steps(torch.load(tmp_path / "steps.pt"), tuned)
    assert done["rates"] == pytest.approx(rates_of(tuned.recipe))
    assert (done["moved"], done["teacher_kept"], done["optimizer"]) == (True, True, "AdamW")
    assert done["groups"] == groups_of(build_model(student["name"], num_classes=100, **student["kwargs"]), tuned.recipe)


def rates_of(recipe):
    """The learning rate of each epoch in the sweep's own trainings."""
    from tune_topkd.train.optim import build_optimizer
    from tune_topkd.train.optim import build_scheduler

    optimizer = build_optimizer([torch.nn.Linear(1, 1)], recipe, torch.device("cpu"))
    scheduler, found = build_scheduler(optimizer, recipe), []
    for _ in range(recipe.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def groups_of(model, recipe):
    """How many weights the sweep's optimiser decays, and by how much."""
    from tune_topkd.train.optim import build_optimizer

    groups = build_optimizer([model], recipe, torch.device("cpu")).param_groups
    return [[len(group["params"]), group["weight_decay"]] for group in groups]


def test_torchdistill_has_networks_of_the_same_names_with_the_same_weights(tmp_path, torchdistill):
    """So a teacher that was trained here is loaded there."""
    write_files(tmp_path, BUNDLES["torchdistill"](answer(**MANY["cifar"])))
    told = outcome(
        "import json, tuned_torchdistill as t\n"
        "shapes = {role: {n: list(v.shape) for n, v in getattr(t, role)().state_dict().items()}"
        " for role in ('teacher', 'student')}\n"
        "print(json.dumps(shapes))",
        tmp_path,
    )
    for role, name in (("teacher", "resnet56"), ("student", "resnet20")):
        own = {n: list(v.shape) for n, v in build_model(name, num_classes=100).state_dict().items()}
        assert told[role] == own
