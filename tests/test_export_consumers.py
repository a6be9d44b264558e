"""The formats of several files, each run by the framework that it is for, and where they are written."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

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
from tune_topkd.sweep.result import export_bundle

CHANGED = {"k": 3, "temperature": 2.5, "beta": 3.0, "ce_weight": 0.7, "base_temperature": 3.5}
"""What a sweep found, for the methods that have it."""


SECOND = [pytest.mark.slow, pytest.mark.long]
"""What a way is tested with besides its first case."""


def second_case(*values):
    return pytest.param(*values, marks=SECOND)


def second(test):
    for mark in SECOND:
        test = mark(test)
    return test


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
        f"-o: {tmp_path / 'b.py'}: is not of an export to a folder (its first line does not say so), so it is not replaced: "
        "move it away, or name another folder"
    )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("b.py", mine)]


def test_a_folder_of_the_name_of_a_file_is_not_replaced(tmp_path):
    (tmp_path / "a.py").mkdir()
    with pytest.raises(ConfigError, match="is not of an export to a folder"):
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
        assert name == "tuned.py" or re.search("To fill in, marked FILL IN: |Nothing is to be filled in", head)


@pytest.mark.parametrize("format_", ["torchdistill", "mdistiller", "timm"])
def test_without_a_teacher_there_is_nothing_to_distil(format_):
    with pytest.raises(ConfigError) as refused:
        BUNDLES[format_](answer("ce", teacher=None))
    known = "known formats without one: yaml, json, python, pytorch"
    assert str(refused.value) == f"--format: method ce: has no teacher, which {format_} needs: {known}"


@pytest.mark.parametrize("format_", BUNDLES)
def test_what_of_the_sweep_an_export_has_not_is_told(format_):
    student = {"name": "digits_cnn_tiny", "checkpoint": "c.pt", "linear_probe": True}
    data = {"name": "cifar100", "augment": {"mixup": 0.3, "pad": 4}}
    texts = BUNDLES[format_](answer("kd", data=data, student=student, ema={"decay_epochs": 0.4}))
    told = " ".join(" ".join(text.replace("#", " ").split()) for name, text in texts.items() if name != "tuned.py")
    told = told[told.index("Not here, and in the sweep: ") :]
    assert (
        "the student began with the weights of a checkpoint, all but its head's; only the student's head was trained."
        in told
    )
    assert ("mixup" in told) == (format_ != "pytorch")  # the script has it
    assert ("a moving average of the weights was measured besides" in told) == (format_ != "pytorch")


def test_a_loss_without_parameters_is_written_too(tmp_path, monkeypatch):
    (tmp_path / "plain_loss.py").write_text(
        "def loss(student, teacher, labels):\n    return (student - teacher).square().mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for format_ in BUNDLES:
        texts = BUNDLES[format_](answer("plain_loss:loss"))
        assert '    return CallableLoss(functools.partial(plain_loss.loss), "plain_loss:loss")\n' in texts["tuned.py"]
        assert all(yaml.load(text, _Loose) for name, text in texts.items() if name.endswith(".yaml"))
    config = yaml.safe_load(BUNDLES["mdistiller"](answer("plain_loss:loss"))["tuned_mdistiller.yaml"])
    assert config["TUNED_PLAIN_LOSS_LOSS"] == {}


class _Loose(yaml.SafeLoader):
    """Reads torchdistill's calls as mappings."""


_Loose.add_multi_constructor("!import", lambda loader, _, node: loader.construct_mapping(node))


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


@pytest.mark.parametrize(("method", "warmup"), [("dkd+topkd", 4), second_case("topkd", None), second_case("ce", None)])
def test_torchdistill_trains_by_it(tmp_path, torchdistill, method, warmup):
    tuned = answer(method, distill_warmup=warmup, clip_grad=0.5, milestones=[1])
    done = distilled(tmp_path, tuned)
    steps = torch.load(tmp_path / "steps.pt")
    assert [step["epoch"] for step in steps] == [1, 1, 1, 2, 2, 2]
    check_steps(steps, tuned)
    assert done["rates"] == pytest.approx([0.05, 0.005])
    assert (done["moved"], done["teacher_kept"], done["seen"], done["clip"]) == (True, True, 3, 0.5)
    assert done["optimizer"] == "SGD"


@second
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


@second
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


# --- mdistiller -----------------------------------------------------------------------------------------------------

STAND_IN = {
    "mdistiller/__init__.py": "",
    "mdistiller/distillers/__init__.py": "distiller_dict = {}",
    "mdistiller/distillers/_base.py": """
from torch import nn

class Distiller(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self):
        return list(self.student.parameters())

    def get_extra_parameters(self):
        return 0

    def forward(self, **kwargs):
        return self.forward_train(**kwargs) if self.training else self.student(kwargs["image"])[0]
""",
    "mdistiller/engine/__init__.py": """
from mdistiller.engine.trainer import BaseTrainer

trainer_dict = {"base": BaseTrainer}
""",
    "mdistiller/engine/cfg.py": """
from yacs.config import CfgNode

CFG = CfgNode(dict(
    EXPERIMENT=dict(PROJECT="distill", NAME="", TAG="default"),
    DATASET=dict(TYPE="cifar100", NUM_WORKERS=2, TEST=dict(BATCH_SIZE=64)),
    DISTILLER=dict(TYPE="NONE", TEACHER="ResNet50", STUDENT="resnet32"),
    SOLVER=dict(TRAINER="base", BATCH_SIZE=64, EPOCHS=240, LR=0.05, LR_DECAY_STAGES=[150, 180, 210], LR_DECAY_RATE=0.1,
                WEIGHT_DECAY=0.0001, MOMENTUM=0.9, TYPE="SGD"),
    LOG=dict(PREFIX="./output", WANDB=True),
    KD=dict(TEMPERATURE=4, LOSS=dict(CE_WEIGHT=0.1, KD_WEIGHT=0.9)),
))
""",
    "mdistiller/engine/trainer.py": """
import torch

def adjust_learning_rate(epoch, cfg, optimizer):
    rate = cfg.SOLVER.LR * cfg.SOLVER.LR_DECAY_RATE ** sum(epoch > stage for stage in cfg.SOLVER.LR_DECAY_STAGES)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate

class BaseTrainer:
    def __init__(self, experiment_name, distiller, train_loader, val_loader, cfg):
        self.cfg, self.distiller, self.train_loader = cfg, distiller, train_loader
        self.optimizer = self.init_optimizer(cfg)

    def init_optimizer(self, cfg):
        if cfg.SOLVER.TYPE != "SGD":
            raise NotImplementedError(cfg.SOLVER.TYPE)
        return torch.optim.SGD(self.distiller.module.get_learnable_parameters(), lr=cfg.SOLVER.LR,
                               momentum=cfg.SOLVER.MOMENTUM, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    def train(self, resume=False):
        self.rates, self.norms, self.steps = [], [], []
        for epoch in range(1, self.cfg.SOLVER.EPOCHS + 1):
            self.rates.append(float(adjust_learning_rate(epoch, self.cfg, self.optimizer)))
            self.distiller.train()
            for image, target in self.train_loader:
                self.optimizer.zero_grad()
                preds, losses = self.distiller(image=image, target=target, epoch=epoch)
                with torch.no_grad():
                    teacher = self.distiller.module.teacher(image)[0]
                total = sum(loss.mean() for loss in losses.values())
                total.backward()
                self.optimizer.step()
                grads = [weight.grad for group in self.optimizer.param_groups for weight in group["params"]]
                self.norms.append(torch.nn.utils.get_total_norm(grads).item())
                self.steps.append(dict(student=preds.detach(), teacher=teacher, labels=target, epoch=epoch,
                                       value=total.detach(), names=list(losses)))
""",
    "tools/train.py": """
import json
import torch
from mdistiller.distillers import distiller_dict
from mdistiller.engine import trainer_dict

class Network(torch.nn.Module):  # like all of them it returns its features too
    def __init__(self, name):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Conv2d(3, len(name), 3), torch.nn.BatchNorm2d(len(name)),
                                         torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(len(name), 20))

    def forward(self, image):
        return self.inner(image), {}

def main(cfg, resume, opts):
    assert cfg.is_frozen()
    torch.manual_seed(0)
    teacher, student = Network(cfg.DISTILLER.TEACHER), Network(cfg.DISTILLER.STUDENT)
    loader = [(torch.randn(cfg.SOLVER.BATCH_SIZE, 3, 8, 8), torch.arange(cfg.SOLVER.BATCH_SIZE) % 20) for _ in range(2)]
    distiller = torch.nn.DataParallel(distiller_dict[cfg.DISTILLER.TYPE](student, teacher, cfg))
    trainer = trainer_dict[cfg.SOLVER.TRAINER](cfg.EXPERIMENT.TAG, distiller, loader, None, cfg)
    trainer.train(resume=resume)
    torch.save(trainer.steps, "steps.pt")
    groups = [[len(group["params"]), group["weight_decay"]] for group in trainer.optimizer.param_groups]
    print(json.dumps(dict(rates=trainer.rates, norms=trainer.norms, groups=groups, opts=opts,
                          extra=distiller.module.get_extra_parameters(), optimizer=str(trainer.optimizer))))
""",
}
"""What a plug-in of mdistiller's meets there: its names and its contract, written anew."""


@pytest.fixture
def mdistiller(tmp_path):
    """A folder with the stand-in; skip where yacs is not."""
    pytest.importorskip("yacs", reason="needs yacs: pip install '.[consumers]'")
    for name, text in STAND_IN.items():
        path = tmp_path / "mdistiller" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "mdistiller"


def plugged(root, tuned, *options):
    """What the stand-in says of a training by an export."""
    folder = root.parent / "export"
    write_files(folder, BUNDLES["mdistiller"](tuned))
    script = "import os, runpy, sys; sys.argv.pop(0); sys.path.insert(0, os.path.dirname(sys.argv[0])); "
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    module, config = folder / "tuned_mdistiller.py", folder / "tuned_mdistiller.yaml"
    done = outcome(script, root, module, "--cfg", config, *options, ours=["__main__"])
    return done, torch.load(root / "steps.pt")


CIFAR = {"name": "cifar100", "augment": {"pad": 4, "flip": True}}


@pytest.mark.parametrize(("method", "names"), [("dkd+topkd", ["loss_ce", "loss_kd"]), second_case("ce", ["loss_ce"])])
def test_mdistiller_takes_its_config_and_trains_by_it(mdistiller, method, names):
    tuned = answer(method, data=CIFAR, teacher="resnet32x4", student="resnet8x4", milestones=[1.0], lr=1e-05)
    done, steps = plugged(mdistiller, tuned)
    assert [step["epoch"] for step in steps] == [1, 1, 2, 2]
    assert all(step["names"] == names for step in steps)
    for step in steps:
        check_close(step, tuned)
    assert done["rates"] == pytest.approx(rates_of(tuned.recipe))
    assert (done["extra"], len(done["groups"])) == (0, 1)


def check_close(step, tuned):
    """The value is that of the sweep's loss, up to the order in which its terms are added."""
    loss, share = build_loss(tuned.method, tuned.loss), tuned.recipe.distill_share(step["epoch"], tuned.method)
    terms = loss.terms(step["student"], step["teacher"], step["labels"])
    total = loss.total({name: term if name == "ce" else share * term for name, term in terms.items()})
    torch.testing.assert_close(step["value"], total, rtol=1e-6, atol=0)


@second
def test_mdistiller_lets_single_values_be_changed_and_refuses_another_type(mdistiller):
    tuned = answer("topkd", data=CIFAR, teacher="resnet32x4", student="resnet8x4")
    _, steps = plugged(mdistiller, tuned, "TUNED_TOPKD.K", "2", "SOLVER.EPOCHS", "1")
    assert [step["epoch"] for step in steps] == [1, 1]
    for step in steps:
        check_close(step, tuned.model_copy(update={"loss": tuned.loss | {"k": 2}}))
    with pytest.raises(AssertionError, match="Type mismatch"):
        plugged(mdistiller, tuned, "TUNED_TOPKD.K", "2.5")


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        {"nesterov": True, "clip_grad": 0.01},
        second_case({"schedule": "cosine", "min_lr": 0.001, "warmup_epochs": 2}),
        second_case(
            {"optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 3, "weight_decay": 0.05, "clip_grad": 0.01}
        ),
        second_case({"schedule": "constant", "warmup_epochs": 1}),
        second_case({"schedule": "cosine"}),
        second_case({"schedule": "constant"}),
    ],
)
def test_mdistiller_trains_by_recipes_that_its_own_trainer_has_not(mdistiller, recipe):
    tuned = answer("kd", data=CIFAR, teacher="resnet32x4", student="resnet8x4", **recipe, epochs=5)
    done, steps = plugged(mdistiller, tuned)
    assert len(steps) == 10
    assert done["rates"] == pytest.approx(rates_of(tuned.recipe))
    adamw = recipe.get("optimizer") == "adamw"
    assert done["optimizer"].startswith("AdamW" if adamw else "SGD")
    assert f"nesterov: {recipe.get('nesterov', False)}" in done["optimizer"] or adamw
    assert done["groups"] == ([[2, 0.05], [4, 0.0]] if adamw else [[6, 5e-4]])
    if "clip_grad" in recipe:
        assert max(done["norms"]) == pytest.approx(recipe["clip_grad"], rel=1e-3)


@second
def test_mdistiller_shows_the_teacher_images_of_its_size(mdistiller):
    tuned = answer("kd", data=CIFAR, teacher={"name": "resnet56", "image_size": 6}, student="resnet8x4", epochs=1)
    _, steps = plugged(mdistiller, tuned)
    with pytest.raises(AssertionError, match="not close"):  # the stand-in records what it gives for others
        check_close(steps[0], tuned)


# --- timm -----------------------------------------------------------------------------------------------------------

TIMM = """
import json, sys, torch, yaml
from argparse import Namespace
from timm.data import create_transform
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
import tuned_timm

torch.manual_seed(0)
with open("tuned_timm.yaml") as stream:
    args = Namespace(**yaml.safe_load(stream))
said = vars(args)
model = create_model(args.model, num_classes=args.num_classes, in_chans=args.in_chans, **said.get("model_kwargs", {}))
task = tuned_timm.TunedTask(student_model=model, teacher_model=args.kd_model_name, loss_type="kl", temperature=4.0,
                            device=torch.device("cpu"))
optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **said.get("opt_kwargs", {}))
scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
scheduler.step(0)
steps, rates, same = [], [], True
for epoch in range(epochs):
    task.epoch = epoch + 1
    rates.append(optimizer.param_groups[0]["lr"])
    task.train()
    for _ in range(2):
        images, labels = torch.randn(args.batch_size, *args.input_size), torch.arange(args.batch_size) % args.num_classes
        result = task(images, labels)
        assert set(result) == {"loss", "output", "task_loss", "kd_loss"}
        torch.testing.assert_close(result["loss"], result["task_loss"] + result["kd_loss"])
        with torch.no_grad():
            teacher = task.teacher(images)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        steps.append(dict(student=result["output"].detach(), teacher=teacher, labels=labels, epoch=epoch + 1,
                          value=result["loss"].detach(), task=result["task_loss"].detach()))
    scheduler.step(epoch + 1)
torch.save(steps, "steps.pt")
names = ("scale", "ratio", "hflip", "interpolation", "mean", "std")
transform = create_transform(args.input_size, is_training=True, auto_augment=args.aa, re_prob=args.reprob,
                             re_mode=args.remode, color_jitter=args.color_jitter,
                             **{name: said[name] for name in names if said[name] is not None})
groups = [[len(group["params"]), group["weight_decay"]] for group in optimizer.param_groups]
frozen = not any(weight.requires_grad for weight in task.teacher.parameters())
print(json.dumps(dict(rates=rates, groups=groups, optimizer=str(optimizer), transform=str(transform), frozen=frozen,
                      epochs=epochs)))
"""


def tasked(folder, tuned, script=TIMM):
    pytest.importorskip("timm.task", reason="needs timm 1.0.31: pip install 'timm>=1.0.31'")
    written(folder, "timm", tuned)
    return outcome(script, folder, ours=["tuned_timm"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dkd+topkd", second_case("topkd"), second_case("ce")])
def test_timm_trains_by_it(tmp_path, method):
    done = tasked(tmp_path, tuned := answer(method, milestones=[0.5], weight_decay=1e-3))
    steps = torch.load(tmp_path / "steps.pt")
    assert [step["epoch"] for step in steps] == [1, 1, 2, 2]
    check_steps(steps, tuned)
    for step in steps:
        ce = torch.nn.functional.cross_entropy(step["student"], step["labels"])
        torch.testing.assert_close(step["task"], tuned.loss["ce_weight"] * ce)
    assert done["rates"] == pytest.approx(rates_of(tuned.recipe))
    student = build_model("digits_cnn_tiny", num_classes=10, widths=[4, 8])
    assert done["groups"] == groups_of(student, tuned.recipe)
    assert "nesterov: False" in done["optimizer"]
    assert done["frozen"]


SMALL_VIT = {"name": "timm:vit_tiny_patch16_224", "kwargs": {"img_size": 32, "depth": 1, "patch_size": 8}}


@pytest.mark.parametrize(
    ("recipe", "optimizer"),
    [
        (
            {"optimizer": "adamw", "schedule": "cosine", "min_lr": 1e-5, "warmup_epochs": 2, "weight_decay": 0.05},
            "AdamW",
        ),
        pytest.param({"nesterov": True, "schedule": "constant"}, "nesterov: True", marks=pytest.mark.slow),
        ({"schedule": "cosine", "min_lr": 1e-3}, "SGD"),
    ],
)
def test_timm_has_the_recipes_optimiser_and_schedule(tmp_path, recipe, optimizer):
    data = {"name": "cifar100", "augment": {"crop_scale": [0.5, 1.0], "flip": True, "erase": 0.25}}
    tuned = answer("kd", data=data, teacher="resnet20", student=SMALL_VIT, epochs=5, **recipe)
    done = tasked(tmp_path, tuned)
    check_steps(torch.load(tmp_path / "steps.pt"), tuned)
    assert done["epochs"] == 5
    assert done["rates"] == pytest.approx(rates_of(tuned.recipe))
    assert optimizer in done["optimizer"]
    student = build_model(SMALL_VIT["name"], num_classes=100, **SMALL_VIT["kwargs"])
    if optimizer == "AdamW":
        assert sorted(done["groups"]) == sorted(groups_of(student, tuned.recipe))
    else:  # as its opening says
        assert done["groups"] == [[2, 0.0], [18, 5e-4]]
        assert "no_weight_decay()" in (tmp_path / "tuned_timm.yaml").read_text()
    for part in ("RandomResizedCrop", "scale=(0.5, 1.0)", "RandomHorizontalFlip", "RandomErasing"):
        assert part in done["transform"]
    assert "ColorJitter" not in done["transform"]


@pytest.mark.slow
def test_timm_takes_randaugment_at_the_nearest_magnitude(tmp_path):
    student = {"name": "timm:vit_tiny_patch16_224", "kwargs": {"img_size": 64, "depth": 1}}
    data = {"name": "cifar100", "image_size": 64, "augment": {"rand_augment": {"ops": 2, "magnitude": 9}}}
    tuned = answer("kd", data=data, teacher={"name": "resnet20", "image_size": 32}, student=student, epochs=1)
    done = tasked(tmp_path, tuned)
    assert done["transform"].count("AugmentOp") >= 10
    assert "m=3" in done["transform"]
    assert "n=2" in done["transform"]


@pytest.mark.slow
def test_timms_task_has_to_be_told_the_epoch_where_the_terms_rise(tmp_path):
    with pytest.raises(AssertionError, match=r"set `task\.epoch`, from 1, before each epoch"):
        tasked(tmp_path, answer(), TIMM.replace("task.epoch = epoch + 1", "pass"))


TRAIN = """
import argparse
import torch
import yaml
from timm.models import create_model
from timm.task import LogitDistillationTask

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-c")
    parser.add_argument("--data-dir")
    given = parser.parse_args()
    with open(given.c) as stream:
        args = argparse.Namespace(**yaml.safe_load(stream))
    model = create_model(args.model, num_classes=args.num_classes, in_chans=args.in_chans)
    criterion = torch.nn.CrossEntropyLoss()
    task = LogitDistillationTask(student_model=model, teacher_model=args.kd_model_name, criterion=criterion, loss_type="kl",
                                 distill_loss_weight=None, task_loss_weight=None, temperature=4.0,
                                 device=torch.device("cpu"), dtype=None, verbose=True)
    for epoch in range(args.epochs):
        train_one_epoch(epoch, model, task=task)

def train_one_epoch(epoch, model, task=None):
    result = task(torch.randn(4, 1, 8, 8), torch.arange(4))
    print('"%s"' % [epoch, task.epoch, type(task).__name__, sorted(result)])
"""
"""What `main` of the export meets in timm's train.py, written anew: its names, and how it makes and calls a task."""


@pytest.mark.slow
def test_run_as_a_script_it_is_train_py_with_the_task(tmp_path):
    pytest.importorskip("timm.task", reason="needs timm 1.0.31: pip install 'timm>=1.0.31'")
    written(tmp_path, "timm", answer())
    (tmp_path / "train.py").write_text(TRAIN)
    run = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    last = outcome(run, tmp_path, "tuned_timm.py", "train.py", "-c", "tuned_timm.yaml", "--data-dir", ".")
    assert last == "[1, 2, 'TunedTask', ['kd_loss', 'loss', 'output', 'task_loss']]"
    (tmp_path / "train.py").write_text("def main(): pass\n")
    with pytest.raises(
        AssertionError, match=r"train\.py: has no distillation tasks; take the train\.py of timm 1\.0\.31"
    ):
        outcome(run, tmp_path, "tuned_timm.py", "train.py")
    with pytest.raises(AssertionError, match=r"The first argument must be the path of timm's train\.py"):
        outcome(run, tmp_path, "tuned_timm.py")


# --- plain torch ----------------------------------------------------------------------------------------------------


def ran(folder, *options):
    """What the script prints, warnings being errors."""
    command = [sys.executable, "-W", "error", "tuned_train.py", *map(str, options)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)


def test_the_script_has_the_classes_of_a_folder_of_images_and_not_its_place(tmp_path):
    for name in ("ant", "bee", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (24, 20)).save(tmp_path / "photos" / name / "0.png")
    tuned = answer(data={"name": "image_folder"})
    for root, line in ((None, "CLASSES = 10  # FILL IN"), (str(tmp_path / "photos"), "CLASSES = 3")):
        files = export_bundle(tuned, "pytorch", tmp_path / "out", root)
        assert line in files[0].read_text().splitlines()
        assert not any(str(tmp_path) in path.read_text() for path in files)


def test_the_script_says_how_code_of_the_users_is_found():
    told = BUNDLES["pytorch"](answer(**MANY["own"]))["tuned_train.py"].partition('"""\n\n')[0]
    assert "(my.networks)" in told
    assert "PYTHONPATH=FOLDER python tuned_train.py" in told
    assert "PYTHONPATH" not in BUNDLES["pytorch"](answer())["tuned_train.py"]


DRY_FIRST = "plain"
DRY = {kind: known for kind, known in MANY.items() if kind != "own"} | {
    "ce": {"method": "ce", "teacher": None, "distill_warmup": None},
}


@pytest.mark.parametrize("kind", [DRY_FIRST, *(second_case(kind) for kind in DRY if kind != DRY_FIRST)])
def test_the_script_trains_on_random_images(tmp_path, kind):
    tuned = answer(**DRY[kind])
    data = tuned.data.model_copy(update={"image_size": 32})  # the tiny networks need no more
    write_files(tmp_path, BUNDLES["pytorch"](tuned.model_copy(update={"data": data})))
    done = ran(tmp_path, "--dry-run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    told = re.findall(
        r"^epoch (\d)/2: lr (\S+), loss (\d+\.\d+), top-1 \d+\.\d+ %(, of the average .*)?$", done.stdout, re.M
    )
    assert [epoch for epoch, *_ in told] == ["1", "2"], done.stdout
    assert [float(rate) for _, rate, *_ in told] == pytest.approx(rates_of(tuned.recipe), rel=1e-2)
    assert all(bool(average) == (kind == "vit") for *_, average in told)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["tuned.py", "tuned_train.py"]


NETWORKS = """
import torch

def small(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
"""


@second
def test_the_script_says_what_is_missing_and_writes_the_students_weights(tmp_path):
    write_files(tmp_path, BUNDLES["pytorch"](answer()))
    (tmp_path / "mine.py").write_text(NETWORKS)
    named = ["--student", "mine:small", "--teacher", "mine:small", "--device", "cpu"]
    assert "FILL IN: the network digits_cnn_tiny, in student()" in ran(tmp_path, "--device", "cpu").stderr
    assert "--teacher-checkpoint is needed, except for --dry-run" in ran(tmp_path, *named).stderr
    assert ran(tmp_path, "--dry-run", *named).returncode == 0
    state = {"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}
    torch.save({"model": state}, tmp_path / "teacher.pt")
    named += ["--teacher-checkpoint", "teacher.pt", "--output", tmp_path / "out"]
    assert "FILL IN: digits, in loaders()" in ran(tmp_path, *named).stderr
    script = tmp_path / "tuned_train.py"
    script.write_text(
        re.sub(r"    raise NotImplementedError\(.*loaders.*\n", "    return random_loaders()\n", script.read_text())
    )
    done = ran(tmp_path, *named)
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "out" / "student_last.pt")
    assert (saved["epoch"], saved["model"].keys()) == (2, state.keys())
    assert saved["model"]["1.weight"].abs().max() > 0


def test_the_script_reads_cifar_as_the_sweep_augments_it(tmp_path, monkeypatch):
    from torchvision import datasets

    class Few(datasets.FakeData):
        def __init__(self, root, train, download, transform):
            super().__init__(20, (3, 32, 32), 100, transform=transform)
            seen.append((root, train, download, str(transform)))

    seen = []
    monkeypatch.setattr(datasets, "CIFAR100", Few)
    module = script_of(tmp_path, monkeypatch, answer(**MANY["cifar"]))
    monkeypatch.setattr(module, "DataLoader", lambda *given, **_: torch.utils.data.DataLoader(*given))  # no processes
    for loader in module.loaders("here"):
        images, labels = next(iter(loader))
        assert (images.shape, labels.shape) == ((16, 3, 32, 32), (16,))
    (root, train, _, views), (_, test, _, plain) = seen
    assert (root, train, test) == ("here", True, False)
    assert re.findall(r"\n    (\w+)", views) == ["RandomCrop", "RandomHorizontalFlip", "ToTensor", "Normalize"]
    assert re.findall(r"\n    (\w+)", plain) == ["ToTensor", "Normalize"]
    assert "padding=4" in views
    assert "mean=[0.5071, 0.4867, 0.4408]" in plain


def script_of(folder, monkeypatch, tuned):
    """The script as a module."""
    import importlib

    write_files(folder, BUNDLES["pytorch"](tuned))
    monkeypatch.syspath_prepend(folder)
    for name in ("tuned", "tuned_train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("tuned_train")
    for name in ("tuned", "tuned_train"):
        monkeypatch.delitem(sys.modules, name)
    return module


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("dkd+topkd", {"clip_grad": 0.5, "ema": {"decay_epochs": 0.4}, "milestones": [0.5]}),
        ("topkd", {"schedule": "cosine", "min_lr": 1e-3, "warmup_epochs": 2, "nesterov": True}),
        ("kd", {"optimizer": "adamw", "lr": 1e-3, "schedule": "cosine", "warmup_epochs": 2, "weight_decay": 0.05}),
        ("lskd", {"precision": "bfloat16", "schedule": "constant"}),
        ("ce", {}),
    ],
)
def test_the_script_trains_as_the_sweep_to_the_last_bit(tmp_path, monkeypatch, method, recipe):
    """On the same batches from the same weights."""
    import copy

    from tune_topkd.config import TrialConfig
    from tune_topkd.data import batches_of
    from tune_topkd.train.loop import Training

    cpu = torch.device("cpu")
    tuned = answer(method, **{"epochs": 3, "batch_size": 256} | recipe)
    module = script_of(tmp_path, monkeypatch, tuned)
    torch.manual_seed(0)
    network = build_model("digits_cnn", num_classes=10).eval()
    torch.save({"model": network.state_dict()}, tmp_path / "teacher.pt")

    def teacher(images):
        return network(images).half().float()  # a sweep keeps its teacher's logits so, however they come

    config = TrialConfig(
        data=tuned.data,
        student=tuned.student,
        teacher=tuned.teacher,
        method=method,
        loss=tuned.loss,
        recipe=tuned.recipe,
        teacher_checkpoint=str(tmp_path / "teacher.pt"),
    )
    ours = Training(config, cpu)
    student, loss = copy.deepcopy(ours.model), module.tuned.criterion()
    optimizer = module.optimizer_of(student, loss)
    scheduler = module.scheduler_of(optimizer)
    batches = [[(b.images, b.labels) for b in batches_of(config, ours.dataset, ours.train_split, e)] for e in (1, 2, 3)]
    steps = math.ceil(len(ours.train_split) / tuned.recipe.batch_size)
    average = module.averaged(student, steps) if tuned.recipe.ema else None
    for epoch, of_epoch in enumerate(batches, start=1):
        ours.run_epoch()
        value = module.train_epoch(student, teacher, loss, optimizer, average, of_epoch, epoch, cpu)
        assert value == pytest.approx(ours.metrics["train_loss"], rel=1e-5)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(ours.metrics["lr"], rel=1e-12)
        scheduler.step()
        for name, weights in student.state_dict().items():
            assert torch.equal(weights, ours.model.state_dict()[name]), name
    if average is not None:
        for name, weights in average.state_dict().items():
            assert torch.equal(weights, ours.ema.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_script_has_the_recipes_learning_rate(tmp_path, monkeypatch, optimizer, schedule, warmup):
    tuned = answer("kd", optimizer=optimizer, schedule=schedule, warmup_epochs=warmup, epochs=12, min_lr=1e-4)
    module = script_of(tmp_path, monkeypatch, tuned)
    student = build_model(SMALL_VIT["name"], num_classes=10, **SMALL_VIT["kwargs"])
    made = module.optimizer_of(student, torch.nn.Module())
    scheduler, rates = module.scheduler_of(made), []
    for _ in range(12):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        scheduler.step()
    assert rates == rates_of(tuned.recipe)
    assert [[len(group["params"]), group["weight_decay"]] for group in made.param_groups] == groups_of(
        student, tuned.recipe
    )
