"""The student of a sweep in other projects' files: the weights of the answer, and graphs that give its logits."""

import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tune_topkd.cli.app import main
from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.data import DataError
from tune_topkd.data import Dataset
from tune_topkd.data import Split
from tune_topkd.data import eval_batches
from tune_topkd.data import load_dataset
from tune_topkd.data import plain_images
from tune_topkd.errors import TuneTopKDError
from tune_topkd.evaluate import evaluate
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.execution.checkpoints import newest_checkpoint
from tune_topkd.execution.checkpoints import write_checkpoint
from tune_topkd.export import STUDENT_WRITERS
from tune_topkd.export import NoAnswerError
from tune_topkd.export import Student
from tune_topkd.export import StudentError
from tune_topkd.export import load_tuned_config
from tune_topkd.export.graph import Preprocessed
from tune_topkd.models import build_configured
from tune_topkd.models import network_fingerprint
from tune_topkd.space import digest
from tune_topkd.storage import file_hash
from tune_topkd.sweep import Sweep
from tune_topkd.sweep.student import student_trial
from tune_topkd.train import train

EPOCHS = 2
SPACE = {
    "data": {"name": "digits", "augment": {"pad": 1}},
    "teacher": None,
    "method": "ce",
    "student": {"name": "digits_cnn_tiny", "kwargs": {"widths": [4, 6]}},
    "recipe": {"epochs": EPOCHS, "lr": 0.1, "ema": {"decay_epochs": 0.4}},
    "space": {"lr": {"low": 0.003, "high": 0.3, "log": True}},
    "sweep": {"trials": 2, "asha": None, "gpus_per_trial": 0, "points": [{"lr": 0.003}, {"lr": 0.1}]},
    "baselines": None,
}


class Trains:
    """Trains the trials of a sweep for real, in this process, one after the other."""

    measure = SimulatedExecutor.measure

    def run(self, search, work):
        while (record := search.next_trial()) is not None:
            search.started(record.key)
            folder = work.folder / "trials" / str(record.key)
            folder.mkdir(parents=True)

            def report(epoch, metrics, save, record=record, folder=folder):
                write_checkpoint(folder, epoch, metrics, save)
                search.reported(record.key, epoch, metrics)

            train(search.trial_config(record), report)
        return search.stopped()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep whose trials were trained, the second being the better one."""
    runs = tmp_path_factory.mktemp("runs")
    sweep = Sweep.create(SPACE, name="s", runs_dir=runs, mlflow_uri="", address="local")
    result = sweep.run(executor=Trains())
    values = [trial.value for trial in result.state.trials.values()]
    assert (len(values), result.best.key.number) == (2, values.index(max(values)))
    assert values[0] != values[1]
    return result


@pytest.fixture
def copied(swept, tmp_path):
    """The same sweep in a folder of its own, to be damaged."""
    shutil.copytree(swept.folder, tmp_path / "runs" / "s")
    return Sweep.open("s", runs_dir=tmp_path / "runs", mlflow_uri="", address="local")


def exported(result, folder, format_):
    path = folder / "student"
    result.export(path, format_)
    return path


def newest(result):
    """The newest checkpoint of the answer, as `torch.load` gives it."""
    folder = newest_checkpoint(result.folder / "trials" / str(result.best.key))
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def networks_logits(config, weights, dataset):
    """The logits of our network for the validation images as trainings evaluate them."""
    network = build_configured(config, num_classes=dataset.num_classes)
    network.load_state_dict(weights, strict=True)
    network.eval()
    with torch.no_grad():
        batches = eval_batches(dataset.val, mean=dataset.mean, std=dataset.std)
        return torch.cat([network(batch.images) for batch in batches])


def program(path):
    return torch.export.load(path).module()


def runtime(path):
    """An ONNX model as a function of images, run by ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


GRAPHS = {"torch_export": program, "onnx": runtime}
GRAPH = pytest.mark.parametrize("format_", GRAPHS)


def all_images(dataset):
    return plain_images(dataset.val, torch.arange(len(dataset.val)))


# --- a sweep's student ----------------------------------------------------------------------------------------------


def test_the_checkpoint_is_the_answers_state_dict_under_model_and_as_good_as_the_ledger_says(swept, tmp_path):
    content = torch.load(exported(swept, tmp_path, "checkpoint"), weights_only=True)
    assert list(content) == ["model"]
    network = build_configured(swept.config.student, num_classes=10)
    network.load_state_dict(content["model"], strict=True)
    dataset = load_dataset(swept.config.data)
    assert evaluate(network, dataset.val, mean=dataset.mean, std=dataset.std).top1 == swept.best.value
    assert student_trial(swept.state) is swept.best


def test_it_is_the_student_itself_not_its_moving_average(swept, tmp_path):
    written = torch.load(exported(swept, tmp_path, "checkpoint"), weights_only=True)["model"]
    kept = newest(swept)
    average = {name.removeprefix("module."): value for name, value in kept["ema"].items() if name != "n_averaged"}
    assert written.keys() == kept["model"].keys() == average.keys()
    assert all(torch.equal(written[name], kept["model"][name]) for name in written)
    assert not torch.equal(written["classifier.weight"], average["classifier.weight"])


def test_safetensors_hold_the_same_weights_and_say_what_they_are(swept, tmp_path):
    from safetensors import safe_open

    with safe_open(exported(swept, tmp_path, "safetensors"), "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        said = file.metadata()
    kept = newest(swept)["model"]
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) and found[name].dtype == kept[name].dtype for name in kept)
    assert "running_var" in " ".join(found)
    dataset = load_dataset(swept.config.data)
    assert json.loads(said.pop("mean")) == list(dataset.mean)
    assert json.loads(said.pop("std")) == list(dataset.std)
    assert json.loads(said.pop("network_kwargs")) == {"widths": [4, 6]}
    tuned = load_tuned_config(swept.folder / "tuned.yaml")
    assert said == {
        "format": "pt",
        "network": "digits_cnn_tiny",
        "num_classes": "10",
        "dataset": "digits",
        "sweep": "s",
        "sweep_id": swept.state.header.id,
        "trial": str(swept.best.key),
        "seed": str(swept.config.sweep.seed),
        "val_top1": str(swept.best.value),
        "tuned_config": digest(tuned.model_dump(mode="json")),
    }


@GRAPH
def test_a_graph_takes_stored_images_and_gives_the_students_logits(swept, tmp_path, format_):
    graph = GRAPHS[format_](exported(swept, tmp_path, format_))
    dataset = load_dataset(swept.config.data)
    images = all_images(dataset)
    assert images.dtype == torch.uint8
    expected = networks_logits(swept.config.student, newest(swept)["model"], dataset)
    found = graph(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    top1 = 100 * (found.argmax(1) == dataset.val.labels).double().mean().item()
    assert top1 == pytest.approx(swept.best.value)
    for count in (1, 2, 7):
        torch.testing.assert_close(graph(images[:count]), expected[:count], rtol=0, atol=1e-4)


def test_a_graph_says_what_it_is(swept, tmp_path):
    onnx = pytest.importorskip("onnx")
    files = {"metadata.json": ""}
    torch.export.load(exported(swept, tmp_path, "torch_export"), extra_files=files)
    said = json.loads(files["metadata.json"])
    model = onnx.load(exported(swept, tmp_path, "onnx"))
    assert {entry.key: entry.value for entry in model.metadata_props}.items() >= said.items()
    assert (said["network"], said["num_classes"], said["trial"]) == ("digits_cnn_tiny", "10", str(swept.best.key))
    (images,), (logits,) = model.graph.input, model.graph.output
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (images, logits)
    ]
    assert (images.name, logits.name, shapes) == ("images", "logits", [["batch", 1, 8, 8], ["batch", 10]])
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.slow
def test_other_processes_read_them_without_this_project(swept, tmp_path):
    image = all_images(load_dataset(swept.config.data))[:1]
    torch.save(image, tmp_path / "image.pt")
    swept.export(tmp_path / "a.pt2", "torch_export")
    swept.export(tmp_path / "b", "checkpoint")
    script = (
        "import sys, torch\n"
        "image = torch.load('image.pt')\n"
        "print(torch.export.load('a.pt2').module()(image).argmax().item(), len(torch.load('b')['model']))\n"
        "assert not [name for name in sys.modules if name.startswith('tune_topkd')]\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PYTHONPATH": ""})
    kept = newest(swept)["model"]
    label = networks_logits(swept.config.student, kept, load_dataset(swept.config.data))[0].argmax().item()
    assert done.stdout.split() == [str(label), str(len(kept))]


# --- weights that are not there -------------------------------------------------------------------------------------


def damaged(sweep, how):
    result = sweep.status()
    trial = sweep.folder / "trials" / str(result.best.key)
    last = trial / f"epoch-{EPOCHS:04d}"
    if how == "gone":
        shutil.rmtree(trial)
        return f"{trial}: has no checkpoint: the weights of trial {result.best.key}, the answer, are gone"
    if how == "damaged":
        content = bytearray((last / "checkpoint.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (last / "checkpoint.pt").write_bytes(bytes(content))
        return f"{last}: is not as it was written: the weights of the answer are damaged"
    shutil.rmtree(last)
    return f"{trial / 'epoch-0001'}: is of epoch 1, but the answer is what trial {result.best.key} gave after epoch 2"


@pytest.mark.parametrize("how", ["gone", "damaged", "too early"])
@pytest.mark.parametrize("format_", STUDENT_WRITERS)
def test_weights_that_are_not_the_answers_are_refused_with_their_folder(copied, tmp_path, format_, how):
    (tmp_path / "student").write_text("before")
    told = damaged(copied, how)
    with pytest.raises(StudentError) as caught:
        copied.export(tmp_path / "student", format_)
    assert str(caught.value).startswith(told)
    assert "train the tuned config" in str(caught.value)
    assert (tmp_path / "student").read_text() == "before"
    copied.export(tmp_path / "tuned.yaml")
    assert load_tuned_config(tmp_path / "tuned.yaml") == copied.answer()


def test_a_sweep_without_an_answer_has_no_student(tmp_path):
    def failing(trial, epoch):
        raise RuntimeError("no luck")

    sweep = Sweep.create(SPACE, name="s", runs_dir=tmp_path, mlflow_uri="", address="local")
    result = sweep.run(executor=SimulatedExecutor(failing))
    assert student_trial(result.state) is None
    with pytest.raises(NoAnswerError, match="no trial reached the full budget"):
        result.export(tmp_path / "student", "checkpoint")


def test_a_format_that_fails_leaves_what_was_there(swept, tmp_path, monkeypatch):
    def failing(student, stream):
        stream.write(b"half")
        raise StudentError("no") from OSError(5, "of another file")

    monkeypatch.setitem(STUDENT_WRITERS, "checkpoint", failing)
    (tmp_path / "student").write_text("before")
    with pytest.raises(StudentError, match=r"^no$"):
        swept.export(tmp_path / "student", "checkpoint")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    ("format_", "absent", "told"),
    [
        ("onnx", "onnx", r"^format onnx: needs onnx: pip install 'tune_topkd\[onnx\]'"),
        ("onnx", "onnxscript", r"^format onnx: needs onnxscript: pip install 'tune_topkd\[onnx\]'"),
        ("onnx", "onnxruntime", r"^format onnx: needs onnxruntime: pip install 'tune_topkd\[onnx\]'"),
        ("safetensors", "safetensors.torch", r"^format safetensors: needs safetensors.torch: pip install .*\[sweep\]'"),
    ],
)
def test_without_its_library_a_format_says_what_to_install(swept, tmp_path, monkeypatch, format_, absent, told):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(StudentError, match=told):
        swept.export(tmp_path / "student", format_)
    assert not list(tmp_path.iterdir())


# --- the command ----------------------------------------------------------------------------------------------------


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_command_writes_it_over_what_was_there(swept, tmp_path, monkeypatch, capfd):
    path = tmp_path / "student_best"
    path.write_text("before")
    about = ("export", "s", "--runs-dir", swept.folder.parent, "--format", "checkpoint")
    assert called(monkeypatch, *about, "-o", path) == 0
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", f"written: {path}\n")
    swept.export(tmp_path / "other", "checkpoint")
    assert file_hash(path) == file_hash(tmp_path / "other")
    assert called(monkeypatch, *about) == 2
    assert capfd.readouterr() == ("", "error: --output: must be given: checkpoint is no text\n")


# --- networks -------------------------------------------------------------------------------------------------------


def student_of(
    name, num_classes=100, side=32, channels=3, network_side=None, image_size=None, fingerprint=None, **kwargs
):
    """A student with random weights, for random images, whose statistics its batch norms have taken."""
    config = ModelConfig(name=name, kwargs=kwargs, image_size=network_side)
    drawn = torch.Generator().manual_seed(0)
    coarse, fine = (
        torch.randint(0, high, (6, channels, rows, rows), generator=drawn) for high, rows in ((192, 4), (64, side))
    )
    images = (coarse.repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3) + fine).to(torch.uint8)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = build_configured(config, num_classes=num_classes)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # the mean over all batches, of which there is one
        network((images - 128.0) / 64)
    split = Split(images, torch.arange(6), image_size=image_size)
    mean, std = [0.5, 0.4, 0.3][:channels], [0.2, 0.3, 0.25][:channels]
    data = DataConfig(name="cifar100", image_size=image_size, mean=mean, std=std)
    weights = network.to(memory_format=torch.channels_last).state_dict()
    student = Student(config, data, weights, {"sweep": "s"}, fingerprint)
    vars(student)["dataset"] = Dataset(split, split, split, num_classes, tuple(mean), tuple(std))
    return student


def written(student, format_, folder):
    path = folder / "student"
    with path.open("xb") as stream:
        STUDENT_WRITERS[format_](student, stream)
    return path


def test_a_cifar_students_checkpoint_has_the_fields_keys_and_shapes_and_its_statistics(tmp_path):
    student = student_of("resnet8x4")
    content = torch.load(written(student, "checkpoint", tmp_path), weights_only=True)["model"]
    text = "".join(f"{key}:{tuple(content[key].shape)};" for key in sorted(content))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "62372b8b5d82"  # of the field's resnet8x4, 100 classes
    again = build_configured(student.model, num_classes=100)
    again.load_state_dict(content, strict=True)
    assert all(torch.equal(value, student.weights[name]) for name, value in again.state_dict().items())
    assert content["layer2.0.bn1.num_batches_tracked"] == 1
    assert not torch.equal(content["bn1.running_var"], torch.ones(32))


LOADS_STRICT = """
import importlib.util
import sys
import types
from pathlib import Path

import torch

root, name, file = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
package = types.ModuleType("mdistiller")  # its own __init__ wants CUDA libraries that its networks do not
package.__path__ = [str(root / "mdistiller")]
sys.modules["mdistiller"] = package
from mdistiller.models import cifar_model_dict

network = cifar_model_dict[name][0](num_classes=100)
network.load_state_dict(torch.load(file)["model"], strict=True)
images, logits = torch.load(file + ".expected")
with torch.no_grad():
    given = network.eval()(images)[0]
torch.testing.assert_close(given, logits, rtol=1e-4, atol=1e-4)
"""

MDISTILLER = os.environ.get("MDISTILLER", "")


@pytest.mark.skipif(not MDISTILLER, reason="needs mdistiller, which is no package: MDISTILLER=its checkout")
@pytest.mark.parametrize(
    "name",
    [
        *(
            "resnet8",
            "resnet20",
            "resnet32",
            "resnet56",
            "resnet110",
            "resnet8x4",
            "resnet32x4",
            "ResNet18",
            "ResNet50",
        ),
        *("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "vgg8", "vgg13", "MobileNetV2", "ShuffleV1", "ShuffleV2"),
    ],
)
def test_mdistillers_own_network_takes_a_student_best_and_gives_its_logits(tmp_path, name):
    student = student_of(name)
    path = written(student, "checkpoint", tmp_path)
    network = build_configured(student.model, num_classes=100).eval()
    network.load_state_dict(student.weights)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.save((images, network(images)), f"{path}.expected")
    command = [sys.executable, "-c", LOADS_STRICT, MDISTILLER, name, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_weights_are_written_one_row_after_the_other(tmp_path):
    from safetensors.torch import load

    student = student_of("resnet8x4")
    assert not student.weights["conv1.weight"].is_contiguous()
    content = torch.load(written(student, "checkpoint", tmp_path), weights_only=True)["model"]
    assert all(value.is_contiguous() for value in content.values())
    stream = io.BytesIO()
    STUDENT_WRITERS["safetensors"](student, stream)
    found = load(stream.getvalue())
    assert all(torch.equal(found[name], value) for name, value in student.weights.items())


@GRAPH
@pytest.mark.parametrize(
    "name",
    [
        "resnet8x4",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "ResNet18")
        ),
    ],
)
def test_a_cifar_students_graph_gives_its_logits(tmp_path, format_, name):
    student = student_of(name)
    expected = networks_logits(student.model, student.weights, student.dataset)
    graph = GRAPHS[format_](written(student, format_, tmp_path))
    images = all_images(student.dataset)
    torch.testing.assert_close(graph(images), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(graph(images[:1]), expected[:1], rtol=1e-4, atol=1e-4)
    assert (expected - expected.mean(0)).abs().max() > 0.1  # images make a difference


@GRAPH
def test_a_vision_transformers_graph_gives_its_logits(tmp_path, format_):
    pytest.importorskip("timm")
    student = student_of("timm:vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
    expected = networks_logits(student.model, student.weights, student.dataset)
    graph = GRAPHS[format_](written(student, format_, tmp_path))
    images = all_images(student.dataset)
    torch.testing.assert_close(graph(images), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(graph(images[:1]), expected[:1], rtol=0, atol=1e-4)


@GRAPH
@pytest.mark.parametrize("network_side", [24, pytest.param(48, marks=pytest.mark.slow)])
def test_a_network_that_resizes_does_so_in_the_graph(tmp_path, format_, network_side):
    student = student_of("resnet8x4", network_side=network_side)
    expected = networks_logits(student.model, student.weights, student.dataset)
    found = GRAPHS[format_](written(student, format_, tmp_path))(all_images(student.dataset))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [24, 48])
def test_resized_pixels_are_whole_and_halves_rounded_up_whatever_the_arithmetics_error(side):
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = Preprocessed(nn.Identity(), torch.zeros(3), torch.full((3,), 1 / 255), side)(images)
    how = {"mode": "bilinear", "antialias": True, "align_corners": False}
    exact = nn.functional.interpolate(images.double(), (side, side), **how)
    assert torch.equal(pixels, (exact + 0.5 + 1e-9).floor().float())
    assert not torch.equal(pixels, exact.round().float())  # which takes halves to the even number


@GRAPH
def test_image_files_are_wanted_at_the_size_of_the_training(tmp_path, format_):
    from PIL import Image

    drawn = np.random.default_rng(0)
    for part, name, number in product(("train", "val"), ("ant", "bee"), range(8)):
        path = tmp_path / "images" / part / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    about = {"root": str(tmp_path / "images"), "image_size": 16, "val_fraction": 0.5}
    config, data = ModelConfig(name="small_cnn"), DataConfig(name="image_folder", **about)
    weights = build_configured(config, num_classes=2).state_dict()
    student = Student(config, data, weights)
    expected = networks_logits(config, weights, student.dataset)
    images = all_images(student.dataset)
    assert images.shape == (len(expected), 3, 16, 16)
    found = GRAPHS[format_](written(student, format_, tmp_path))(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_dataset_that_is_gone_is_told_except_for_the_checkpoint(tmp_path):
    data = DataConfig(name="cifar100", root=str(tmp_path / "gone"))
    student = Student(ModelConfig(name="resnet8x4"), data, {"fc.bias": torch.zeros(100)})
    assert written(student, "checkpoint", tmp_path).stat().st_size
    for format_ in ("safetensors", "torch_export", "onnx"):
        with pytest.raises(DataError, match=f"{tmp_path}/gone"):
            STUDENT_WRITERS[format_](student, io.BytesIO())


@GRAPH
@pytest.mark.parametrize("image_size", [24, pytest.param(48, marks=pytest.mark.slow)])
def test_images_are_resized_in_the_graph_as_the_dataset_is(tmp_path, format_, image_size):
    """Up to rounding to whole pixels: on a CPU, torchvision resizes rows, rounds, and then columns."""
    student = student_of("resnet8x4", image_size=image_size)
    batch = next(eval_batches(student.dataset.val, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25]))
    assert batch.images.shape == (6, 3, image_size, image_size)
    expected = networks_logits(student.model, student.weights, student.dataset)
    found = GRAPHS[format_](written(student, format_, tmp_path))(all_images(student.dataset))
    apart = (found - expected).abs().max() / (expected - expected.mean(0)).abs().max()
    assert apart < 0.03


USERS = """
import torch
from torch import nn
from torch.nn import functional


class Tuple(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, images):
        features = images.flatten(1)
        return self.head(features), {"feats": [features]}


class Branches(Tuple):
    def forward(self, images):
        return self.head(images.flatten(1)) if images.sum() > 0 else self.head(-images.flatten(1))


class Random(Tuple):
    def forward(self, images):
        return functional.dropout(self.head(images.flatten(1)), training=True)


class Doubled(Tuple):
    def forward(self, images):
        return 2 * self.head(images.flatten(1))
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "users_student.py").write_text(USERS)
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("users_student", None)


@GRAPH
def test_a_network_that_gives_features_too_gives_its_logits_alone(tmp_path, users, format_):
    student = student_of("users_student:Tuple")
    expected = networks_logits(student.model, student.weights, student.dataset)
    graph, images = GRAPHS[format_](written(student, format_, tmp_path)), all_images(student.dataset)
    for count in (1, 2, 6):
        torch.testing.assert_close(graph(images[:count]), expected[:count], rtol=0, atol=1e-4)


@GRAPH
@pytest.mark.parametrize(("name", "told"), [("Branches", ""), ("Random", "its logits are .* away from the network's")])
def test_a_network_that_makes_no_graph_of_its_own_logits_is_refused(tmp_path, users, format_, name, told):
    student = student_of(f"users_student:{name}")
    with pytest.raises(StudentError, match=f"^format {format_}: no graph can be made of .*{name}': {told}") as caught:
        written(student, format_, tmp_path)
    assert "checkpoint and safetensors take the weights of any network" in str(caught.value)
    assert "\n" not in str(caught.value)


@GRAPH
def test_a_network_whose_code_has_changed_is_refused_but_for_its_weights(tmp_path, users, format_):
    about = {"num_classes": 100, "image_shape": (3, 32, 32)}
    trained = network_fingerprint(ModelConfig(name="users_student:Tuple"), **about)
    assert written(student_of("users_student:Tuple", fingerprint=trained), format_, tmp_path).stat().st_size
    (tmp_path / "student").unlink()
    student = student_of("users_student:Doubled", fingerprint=trained)
    with pytest.raises(StudentError, match="its code computes something else than when the student was trained"):
        written(student, format_, tmp_path)
    (tmp_path / "student").unlink()
    assert torch.load(written(student, "checkpoint", tmp_path), weights_only=True)["model"].keys() == {
        "head.weight",
        "head.bias",
    }


def test_a_users_sweep_is_told_that_the_code_of_its_student_has_changed(tmp_path, users):
    name, code = "users_student:Tuple", tmp_path / "code" / "users_student.py"
    code.write_text(USERS.replace("3 * 32 * 32", "8 * 8"))
    changes = {"student": name, "recipe": {"epochs": 1}, "sweep": {"trials": 1, "asha": None, "gpus_per_trial": 0}}
    sweep = Sweep.create(SPACE | changes, name="s", runs_dir=tmp_path, mlflow_uri="", address="local")
    result = sweep.run(executor=Trains())
    result.export(tmp_path / "student.pt2", "torch_export")
    code.write_text(USERS.replace("3 * 32 * 32", "8 * 8").replace("features = images", "features = 2 * images"))
    sys.modules.pop("users_student")
    importlib.invalidate_caches()
    with pytest.raises(StudentError, match=f"^student.name = '{name}': its code computes something else"):
        result.export(tmp_path / "student.pt2", "torch_export")
    result.export(tmp_path / "student_best", "checkpoint")
    assert len(torch.load(tmp_path / "student_best", weights_only=True)["model"]) == 2


def test_weights_that_do_not_fit_the_network_are_refused(tmp_path, users):
    student = student_of("users_student:Tuple")
    student.weights["head.weight"] = torch.zeros(100, 5)
    with pytest.raises(StudentError, match="the weights do not fit the network as it is now: size mismatch for head"):
        written(student, "torch_export", tmp_path)


def test_only_tensors_can_be_safetensors(tmp_path, users):
    student = student_of("users_student:Tuple")
    student.weights["head._extra_state"] = {"steps": np.float64(3)}
    with pytest.raises(StudentError, match=r"^format safetensors: head\._extra_state of .* is no tensor but a dict"):
        written(student, "safetensors", tmp_path)
    content = torch.load(written(student, "checkpoint", tmp_path / "code"), weights_only=False)
    assert content["model"]["head._extra_state"] == {"steps": 3}


def test_an_unknown_format_is_told_with_these(swept, tmp_path):
    with pytest.raises(TuneTopKDError, match=r"^format: there is no 'safetensor'; did you mean 'safetensors'\?"):
        swept.export(tmp_path / "student", "safetensor")


# --- what the documentation says --------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[1] / "docs" / "student.md"
FILES = {
    "checkpoint": "student_best",
    "safetensors": "student.safetensors",
    "torch_export": "student.pt2",
    "onnx": "student.onnx",
}


def test_the_page_is_true(swept, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    page = DOCS.read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == list(STUDENT_WRITERS)
    monkeypatch.chdir(tmp_path)
    for format_, name in FILES.items():
        swept.export(name, format_)
    dataset = load_dataset(swept.config.data)
    images = all_images(dataset)
    torch.save(images, "images.pt")
    Image.new("RGB", (4, 3), (255, 0, 7)).save("photo.png")
    mdistiller = ModuleType("mdistiller.models")  # stands for the project's, whose networks give features too
    networks = {"resnet8x4": (lambda num_classes: build_configured(swept.config.student, num_classes=10), None)}
    mdistiller.cifar_model_dict = networks
    monkeypatch.setitem(sys.modules, "mdistiller", ModuleType("mdistiller"))
    monkeypatch.setitem(sys.modules, "mdistiller.models", mdistiller)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(block, names)
        if "photo.png" in block:
            assert (names["images"].shape, names["images"].dtype) == ((1, 3, 3, 4), np.uint8)
            assert names["images"][0, :, 0, 0].tolist() == [255, 0, 7]
    expected = networks_logits(swept.config.student, newest(swept)["model"], dataset)
    assert torch.equal(names["labels"], expected.argmax(1))
    assert np.abs(names["logits"] - expected.numpy()).max() < 1e-4
    assert names["student"].state_dict().keys() == names["weights"].keys()
    assert capsys.readouterr().out.startswith("digits_cnn_tiny [")
    assert json.loads(names["files"]["metadata.json"]).items() <= names["metadata"].items()
    assert set(re.findall(r"`(\w+)`", page)) >= names["metadata"].keys() - {"format"}
