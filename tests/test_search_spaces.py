"""The checked-in search spaces: what their headers say is true of them, and each of them can be run."""

import contextlib
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tune_topkd.config import RECIPE_PARAMETERS
from tune_topkd.config import AugmentConfig
from tune_topkd.config import Override
from tune_topkd.config import SharedFiles
from tune_topkd.config import load_config
from tune_topkd.config import read_yaml
from tune_topkd.data import dataset_info
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.loss import build_loss
from tune_topkd.models import build_configured
from tune_topkd.models import find_head
from tune_topkd.models import save_weights
from tune_topkd.search import Search
from tune_topkd.space import Space
from tune_topkd.sweep.cost import _expected_epochs
from tune_topkd.sweep.preflight import first_proposals
from tune_topkd.sweep.preflight import load_checked
from tune_topkd.sweep.remaining import baseline_total
from tune_topkd.train import train

FOLDER = Path(__file__).parents[1] / "search_spaces"
SPACES = sorted(FOLDER.glob("*.yaml"))
BASES = sorted(FOLDER.glob("bases/*.yaml"))
every_space = pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
OF_EACH_KIND = {
    "digits",
    "digits-linear",
    "glyphs",
    "cifar100-resnet56-resnet20",
    "cifar100-resnet56-deit_tiny",
    "stl10-probe-wrn_16_2",
    "tiny_imagenet-resnet18-mobilenetv2",
    "imagenet-resnet34-resnet18",
}
"""A space of each dataset or kind of network: the others take their time in the slow tests."""


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another on a busy machine take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def header(path):
    """The comment at the top, as one line for each of its paragraphs, by their first words."""
    lines = [line.removeprefix("# ") for line in path.read_text().split("\n\n")[0].splitlines()]
    paragraphs = {}
    for line in lines:
        if start := re.match(r"([A-Z]\w+)\s{2,}", line):
            key = start[1]
            paragraphs[key] = []
        if paragraphs:
            paragraphs[key].append(line.strip())
    return {key: " ".join(" ".join(texts).split()) for key, texts in paragraphs.items()}


def needed(config, folder):
    """Overrides for the checkpoints that a space expects the user to have; the files are made."""
    overrides = []
    given = {"student": (config.student, config.student.checkpoint)}
    if config.teacher:
        given["teacher"] = config.teacher.model, config.teacher.checkpoint
    for key, (model, checkpoint) in given.items():
        if checkpoint is not None:
            network = build_configured(model, num_classes=dataset_info(config.data).num_classes)
            save_weights(network, folder / f"{key}.pt")
            overrides.append(Override(f"{key}.checkpoint", str(folder / f"{key}.pt"), "the test"))
    return overrides


def skip_without_timm(config):
    if config.student.name.startswith("timm:"):
        pytest.importorskip("timm")


# --- headers --------------------------------------------------------------------------------------------------------


@every_space
def test_header_says_source_and_the_cost_that_the_config_has(path):
    told, config = header(path), load_config(path)
    assert told["Source"]
    trials, epochs = config.sweep.trials, config.recipe.epochs
    runs = f"{trials} trials and {baseline_total(config)} baseline runs" if config.baselines else f"{trials} trials"
    assert f"{runs} of up to {epochs} epochs" in told["Cost"]
    most = (trials + baseline_total(config)) * epochs
    for figure in re.findall(r"at most ([\d,]+) epochs", told["Cost"]):
        assert figure == f"{most:,}"
    for figure in re.findall(r"about ([\d,]+) with ASHA", told["Cost"]):
        assert figure == f"{round(trials * _expected_epochs(config)) + baseline_total(config) * epochs:,}"
    if config.teacher and config.teacher.recipe:
        for figure in re.findall(r"([\d,]+) more for the teacher", told["Cost"]):
            assert int(figure) == config.teacher.recipe.epochs
    for name in re.findall(r"launch.py check ([\w-]+)`", told["Cost"]):
        assert name == path.stem


# Test top-1 in %. Figures that nobody has checked, ReviewKD's of some pairs, are not in it and not to be printed.
NAMES = ["teacher", "student", "KD", "CRD", "ReviewKD", "DKD", "KD+LS", "DKD+LS", "MLKD", "MLKD+LS", "WTTM"]
CIFAR100 = """
    wrn_40_2→wrn_16_2      75.61 73.26 74.92 75.48 -     76.24 76.11 76.39 76.63 76.95 76.37
    wrn_40_2→wrn_40_1      75.61 71.98 73.54 74.14 75.09 74.81 74.37 74.89 75.35 75.56 74.58
    resnet56→resnet20      72.34 69.06 70.66 71.16 71.89 71.97 71.43 72.32 72.19 72.33 71.92
    resnet110→resnet20     74.31 69.06 70.67 71.46 -     71.06 71.48 71.85 71.89 72.27 71.67
    resnet110→resnet32     74.31 71.14 73.08 73.48 -     74.11 74.17 74.29 74.11 74.32 74.13
    resnet32x4→resnet8x4   79.42 72.50 73.33 75.51 75.63 76.32 76.62 77.01 77.08 78.28 76.06
    vgg13→vgg8             74.64 70.36 72.98 73.94 -     74.68 74.36 74.81 75.18 75.22 74.44
    vgg13→MobileNetV2      74.64 64.60 67.37 69.73 -     69.71 68.61 69.98 70.57 70.94 69.16
    ResNet50→MobileNetV2   79.34 64.60 67.35 69.11 69.89 70.35 69.02 70.45 71.04 71.19 69.59
    ResNet50→vgg8          79.34 70.36 73.81 74.30 -     -     -     -     -     -     74.82
    resnet32x4→ShuffleV1   79.42 70.50 74.07 75.11 77.45 76.45 -     -     -     -     74.37
    resnet32x4→ShuffleV2   79.42 71.82 74.45 75.65 77.78 77.07 75.56 77.37 78.44 78.76 76.55
    wrn_40_2→ShuffleV1     75.61 70.50 74.83 76.05 -     76.70 -     -     -     -     75.42
    resnet32x4→wrn_16_2    79.42 73.26 74.90 -     -     75.70 75.26 76.19 76.52 77.53 -
    resnet32x4→wrn_40_2    79.42 75.61 77.70 -     -     78.46 77.92 78.95 79.26 79.66 -
    wrn_40_2→resnet8x4     75.61 72.50 73.97 -     -     75.56 77.11 76.75 77.33 77.68 -
    wrn_40_2→MobileNetV2   75.61 64.60 68.36 -     -     69.28 69.23 70.01 70.78 71.61 -
"""
DOT = {"resnet32x4→resnet8x4": 75.12, "vgg13→vgg8": 73.77, "resnet32x4→ShuffleV2": 75.55}
PAIRS = {row.split()[0]: dict(zip(NAMES, row.split()[1:], strict=True)) for row in CIFAR100.split("\n") if row.strip()}


def published(path):
    """The figures of a header by name; a name may come once."""
    found = re.findall(r"([A-Za-z+]+) (\d\d\.\d\d)", header(path)["Published"])
    assert len(dict(found)) == len(found)
    return {name: float(figure) for name, figure in found}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_cifar100_pair_has_its_published_figures_and_recipe(pair):
    teacher, student = pair.split("→")
    path = FOLDER / f"cifar100-{teacher}-{student}.yaml".lower()
    figures = {name: float(figure) for name, figure in PAIRS[pair].items() if figure != "-"}
    assert published(path) == figures | ({"KD+DOT": DOT[pair]} if pair in DOT else {})
    assert "mix protocols" in header(path)["Published"]

    config = load_config(path)
    assert (config.teacher.name, config.student.name, config.method) == (teacher, student, "topkd")
    assert config.data.model_dump(include={"name", "val_fraction", "selection"}) == {
        "name": "cifar100",
        "val_fraction": 0.1,
        "selection": "validation",
    }
    assert (config.data.augment.pad, config.data.augment.flip) == (4, True)
    light = student in ("MobileNetV2", "ShuffleV1", "ShuffleV2")
    for recipe, lr in ((config.recipe, 0.01 if light else 0.05), (config.teacher.recipe, 0.05)):
        assert (recipe.optimizer, recipe.schedule, recipe.lr, recipe.batch_size) == ("sgd", "step", lr, 64)
        assert (recipe.epochs, recipe.milestone_epochs(), recipe.gamma) == (240, [150, 180, 210], 0.1)
        assert (recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.9, False, 5e-4)


@pytest.mark.parametrize(
    ("stem", "figures"),
    [
        ("cifar100-resnet56-deit_tiny", {"student": 65.08, "Guidance": 78.15, "KD+LS": 78.55}),
        ("cifar100-resnet56-pit_ti", {"student": 73.58, "Guidance": 78.48, "KD+LS": 78.76}),
        ("cifar100-resnet56-pvt_v2_b0", {"student": 77.44, "Guidance": 79.30}),
        ("tiny_imagenet-resnet18-mobilenetv2", {"KD": 58.35, "KD+DOT": 64.01}),
        ("tiny_imagenet-resnet18-shufflev2", {"KD": 62.26, "KD+DOT": 65.75}),
        (
            "imagenet-resnet50-mobilenet_v1",
            {
                "teacher": 76.16,
                "student": 68.87,
                "KD": 70.50,
                "CRD": 71.37,
                "ReviewKD": 72.56,
                "DKD": 72.05,
                "DIST": 73.24,
                "WTTM": 73.09,
                "KD+DOT": 73.09,
                "TopKD": 73.51,
            },
        ),
    ],
)
def test_other_pairs_have_their_published_figures(stem, figures):
    assert published(FOLDER / f"{stem}.yaml") == figures


def test_resnet34_to_resnet18_has_the_figures_of_each_source():
    told = header(FOLDER / "imagenet-resnet34-resnet18.yaml")["Published"]
    figures = " ".join(re.findall(r"\d\d\.\d\d", told))
    assert figures == "73.31 69.76 70.66 71.17 71.61 71.70 72.07 72.19 71.03 71.72 71.37 71.26 71.45"


STEP = {"optimizer": "sgd", "momentum": 0.9, "schedule": "step", "gamma": 0.1, "warmup_epochs": 0, "nesterov": False}
IMAGENET = STEP | {"epochs": 100, "batch_size": 512, "lr": 0.2, "weight_decay": 1e-4, "milestones": [30, 60, 90]}
TINY = STEP | {"epochs": 200, "batch_size": 256, "lr": 0.2, "weight_decay": 5e-4, "milestones": [60, 120, 160]}
PROBE = STEP | {"epochs": 120, "batch_size": 64, "lr": 0.05, "weight_decay": 0.0, "milestones": [30, 60, 90]}
COSINE = {"epochs": 300, "batch_size": 128, "schedule": "cosine"}
VIT = COSINE | {"optimizer": "adamw", "lr": 5e-4, "min_lr": 5e-6, "weight_decay": 0.05, "warmup_epochs": 20}
VIT_TEACHER = COSINE | {"optimizer": "sgd", "lr": 0.1, "nesterov": True, "weight_decay": 5e-4, "warmup_epochs": 0}
VIT_VIEWS = {"crop_scale": [0.08, 1.0], "flip": True, "rand_augment": {"ops": 2, "magnitude": 9}, "erase": 0.25}


@pytest.mark.parametrize(
    ("pattern", "student", "teacher", "views"),
    [
        ("imagenet-*.yaml", IMAGENET, None, {"crop_scale": [0.08, 1.0], "flip": True}),
        ("tiny_imagenet-*.yaml", TINY, TINY, {"rotate": 20.0, "flip": True}),
        ("cifar100-resnet56-[dp]*.yaml", VIT, VIT_TEACHER, VIT_VIEWS),
        ("stl10-probe-*.yaml", PROBE, None, {"pad": 4, "flip": True}),
    ],
)
def test_other_pairs_have_the_published_recipe(pattern, student, teacher, views):
    for path in FOLDER.glob(pattern):
        config = load_config(path)
        for recipe, wanted in ((config.recipe, student), (config.teacher and config.teacher.recipe, teacher)):
            if wanted is None:
                assert recipe is None
                continue
            has = recipe.model_dump() | {"milestones": recipe.milestone_epochs()}
            assert {name: has[name] for name in wanted} == wanted
        assert config.data.augment == AugmentConfig.model_validate(views)
        assert config.data.selection == "validation"


def test_readme_names_every_parent_and_every_space_and_no_other():
    readme = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \|", readme, re.M)
    patterns = [re.sub("[A-Z]{2,}", "*", pattern) for row in rows for pattern in re.findall(r"`([^`]+)`", row)]
    named = {pattern: set(FOLDER.glob(pattern)) for pattern in patterns}
    assert [pattern for pattern, files in named.items() if not files] == []
    assert set().union(*named.values()) == {*SPACES, *BASES}


# --- parents --------------------------------------------------------------------------------------------------------


def parents(path):
    """All that a file extends."""
    named = read_yaml(path).get("extends", [])
    direct = [(path.parent / parent).resolve() for parent in ([named] if isinstance(named, str) else named)]
    return set(direct).union(*map(parents, direct))


def test_no_parent_is_an_orphan():
    assert {base.resolve() for base in BASES} <= set().union(*map(parents, SPACES))


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.stem)
def test_a_parent_says_what_it_is_and_is_no_search_space(path):
    assert path.read_text().startswith("# ")
    assert not {"data", "student", "recipe", "space"} <= read_yaml(path).keys()


# --- spaces ---------------------------------------------------------------------------------------------------------


def test_a_space_of_each_kind_is_there():
    assert {path.stem for path in SPACES} >= OF_EACH_KIND
    assert {load_config(path).data.name for path in SPACES if path.stem in OF_EACH_KIND} == {
        load_config(path).data.name for path in SPACES
    }


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in OF_EACH_KIND else pytest.mark.slow, id=p.stem) for p in SPACES],
)
def test_every_space_passes_preflight_and_a_step_reaches_every_weight(path, tmp_path):
    skip_without_timm(load_config(path))
    checked = load_checked(str(path), needed(load_config(path), tmp_path))
    config = checked.config
    others = [w for w in checked.warnings if "the data is not there yet" not in w and "Top-K groups" not in w]
    assert others == []
    assert dataset_info(config.data).num_classes > config.space["k"].high if "k" in config.space else True


@every_space
def test_the_recipes_learning_rate_is_searched_around(path):
    config = load_config(path)
    lr = config.space["lr"]
    assert lr.log
    assert lr.low < config.recipe.lr < lr.high
    if not path.stem.startswith(("digits", "glyphs")):
        assert math.sqrt(lr.low * lr.high) == pytest.approx(config.recipe.lr)


@every_space
def test_the_search_begins_with_the_defaults_and_their_weights_keep_their_sum(path):
    config = load_config(path)
    (first,) = first_proposals(config)
    space = Space.of(config)
    assert space.params(space.proposal(first)) == pytest.approx(first)


def test_every_corner_of_every_space_builds_its_loss():
    built = set()
    for path in SPACES:
        config = load_config(path)
        searched = {name: r for name, r in config.space.items() if name not in RECIPE_PARAMETERS}
        space = Space(searched, config.relative, config.loss)
        key = (config.method, space.digest(), str(config.loss))
        if key not in built:
            built.add(key)
            for corner in space.corners():
                build_loss(config.method, config.loss | corner)
    assert len(built) >= 4


@every_space
def test_a_batch_of_another_size_than_64_has_a_contrastive_loss_of_64(path):
    config = load_config(path)
    if config.method == "topkd" and not path.stem.startswith(("digits", "glyphs")):
        assert (config.loss.get("contrastive_batch") or config.recipe.batch_size) == 64


def test_the_plug_ins_search_no_more_than_they_have():
    for base, fixed in {"kd": 0.9, "dkd": 8.0, "lskd": 9.0}.items():
        config = load_config(FOLDER / f"cifar100-resnet32x4-resnet8x4-{base}-topkd.yaml")
        assert config.method == f"{base}+topkd"
        assert not {"temperature", "normalize", "contrastive_weight"} & config.space.keys()
        assert config.loss["base_beta" if base == "dkd" else "base_kd_weight"] == fixed


# --- one epoch ------------------------------------------------------------------------------------------------------

PER_CLASS = 2
"""Training images: one to train on, one to choose by."""


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_cifar100(root):
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, each in (("train", PER_CLASS), ("test", 1)):
        labels = [label for label in range(100) for _ in range(each)]
        content = {"data": noise(len(labels), 3072), "fine_labels": labels, "coarse_labels": [0] * len(labels)}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{i}" for i in range(100)]}, protocol=2))


def write_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    for name, each in (("train", 20), ("test", 1)):
        labels = np.repeat(np.arange(1, 11, dtype=np.uint8), each)
        labels.tofile(folder / f"{name}_y.bin")
        noise(len(labels), 3, 96, 96).tofile(folder / f"{name}_X.bin")


def write_images(folder, count, side):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(noise(side, side, 3, seed=number)).save(folder / f"{folder.parent.name}_{number}.JPEG")


def write_tiny_imagenet(root):
    names = [f"n{i:08d}" for i in range(200)]
    for name in names:
        write_images(root / "tiny-imagenet-200" / "train" / name / "images", PER_CLASS, 64)
    val = root / "tiny-imagenet-200" / "val"
    write_images(val / "images", len(names), 64)
    (root / "tiny-imagenet-200" / "wnids.txt").write_text("\n".join(names) + "\n")
    rows = [f"val_{i}.JPEG\t{name}\t0\t0\t62\t62" for i, name in enumerate(names)]
    (val / "val_annotations.txt").write_text("\n".join(rows) + "\n")


def write_imagenet(root):
    for i in range(1000):
        write_images(root / "imagenet" / "train" / f"n{i:08d}", PER_CLASS, 40)
        write_images(root / "imagenet" / "val" / f"n{i:08d}", 1, 40)


WRITERS = {
    "cifar100": write_cifar100,
    "stl10": write_stl10,
    "tiny_imagenet": write_tiny_imagenet,
    "imagenet": write_imagenet,
}
SMALL = {
    "imagenet": {"data.image_size": 64},  # at 224 pixels the thousand classes would take minutes
    "glyphs": {"data.kwargs": {"train_images": 400, "test_images": 100}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a few images of all classes of each dataset, in the layout that it is published in."""
    folder = tmp_path_factory.mktemp("data")
    for write in WRITERS.values():
        write(folder)
    return folder


def first_trial(config, folder):
    """What the first trial of a sweep gets; its teacher's weights lie in `folder`."""
    begun = Header(sweep="t", id="i", seed=0, trials=1, first=first_proposals(config))
    with contextlib.closing(Ledger.create(folder / "ledger.jsonl", begun)) as ledger:
        search = Search(config, ledger)
        return search.trial_config(
            search.next_trial(), SharedFiles(teacher_checkpoint=config.teacher and config.teacher.checkpoint)
        )


def a_teacher(config):
    """One that was never trained, its logits as small as a trained one's: those of a deep one exceed float16."""
    info = dataset_info(config.data)
    network = build_configured(config.teacher.model, num_classes=info.num_classes).eval()
    with torch.no_grad():
        largest = network(torch.randn(4, *info.image_shape)).abs().max()
        for weight in find_head(network)[1].parameters():
            weight.div_(largest.clamp(min=1.0))
    return network


@pytest.mark.slow
@every_space
def test_one_epoch(path, root, tmp_path):
    """Reads the data as it lies on the disk, loads the checkpoints, and trains as a trial of a sweep does."""
    config = load_config(path)
    skip_without_timm(config)
    changes = SMALL.get(config.data.name, {}) | {
        "data.root": str(root),
        "data.val_fraction": 0.5,
        "data.workers": 0,
        "recipe.epochs": 1,
        "recipe.milestones": [],
        "recipe.warmup_epochs": 0,
        "recipe.batch_size": 50,
        "sweep.asha": None,
    }
    num_classes = dataset_info(config.data).num_classes
    if config.teacher:
        torch.manual_seed(1)
        save_weights(a_teacher(config), tmp_path / "teacher.pt")
        changes |= {"teacher.recipe": None, "teacher.checkpoint": str(tmp_path / "teacher.pt")}
    if config.student.checkpoint:
        save_weights(build_configured(config.student, num_classes=num_classes + 3), tmp_path / "student.pt")
        changes["student.checkpoint"] = str(tmp_path / "student.pt")
    config = load_config(path, [Override(key, value, "the test") for key, value in changes.items()])
    epochs = {}
    result = train(first_trial(config, tmp_path), lambda epoch, metrics, save: epochs.update({epoch: metrics}))
    assert (result.epoch, result.diverged, list(epochs)) == (1, False, [1])
    terms = {name for name in result.metrics if name.startswith("train_")} - {"train_loss"}
    assert terms == {f"train_{name}" for name in build_loss(config.method, config.loss)._weight_of}
    assert 0 <= result.metrics["val_top1"] <= result.metrics["val_top5"] <= 100
    assert all(weight.isfinite().all() for weight in result.model.parameters())
