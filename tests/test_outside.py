"""Datasets of the user's own: found by name, held to what a source promises, trained on."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import tune_topkd.data.datasets as datasets
from tune_topkd.cli import main
from tune_topkd.config import ConfigError
from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.config import RecipeConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import config_from
from tune_topkd.data import DataError
from tune_topkd.data import DatasetNameError
from tune_topkd.data import check_readable
from tune_topkd.data import data_notes
from tune_topkd.data import dataset_info
from tune_topkd.data import eval_batches
from tune_topkd.data import fingerprint
from tune_topkd.data import load_dataset
from tune_topkd.data import load_saved
from tune_topkd.data import missing_data
from tune_topkd.data import needs_files
from tune_topkd.data import save_dataset
from tune_topkd.sweep import preflight
from tune_topkd.teacher import teacher_key
from tune_topkd.train import train

SQUARES = """
import torch
from tune_topkd.data import DatasetInfo, Parts, Source, Split

class Squares(Source):
    '''A bright square whose corner is the class.'''

    kwargs = frozenset({"count"})

    def info(self, config):
        return DatasetInfo(num_classes=4, image_shape=(1, 8, 8))

    def on_disk(self, config):
        return False

    def read(self, config):
        labels = torch.arange(config.kwargs.get("count", 400)) % 4
        images = torch.arange(len(labels)).remainder(50).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
        for image, label in zip(images, labels.tolist()):
            image[0, 4 * (label // 2) :][:4, 4 * (label % 2) :][:, :4] += 150
        return Parts(Split(images, labels))

made = Squares()
number = 3
"""

FILES = """
import csv
import torch
from tune_topkd.data import DatasetInfo, FileSplit, Parts, Source

class Listed(Source):
    '''Images in one folder, their classes in a list.'''

    def info(self, config):
        return DatasetInfo(num_classes=2, image_shape=(3, 8, 8))

    def missing(self, config):
        return None if (self.folder(config) / "list.csv").is_file() else f"put list.csv\\ninto {self.folder(config)}"

    def read(self, config):
        with open(self.folder(config) / "list.csv", newline="") as file:
            rows = list(csv.reader(file))
        paths = tuple(str(self.folder(config) / name) for name, _ in rows)
        return Parts(FileSplit(paths, torch.tensor([int(label) for _, label in rows]), size=(8, 8), fitted=False))

    def notes(self, config):
        yield "a list and no folders"
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's and gives its name; the module is forgotten afterwards."""
    names = []

    def write(text: str) -> str:
        name = f"data_{tmp_path.name.replace('-', '_')}_{len(names)}"
        (tmp_path / f"{name}.py").write_text(text)
        names.append(name)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def squares(module):
    return module(SQUARES)


@pytest.fixture
def listed(module, tmp_path) -> DataConfig:
    """A dataset of 40 image files."""
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    rows = []
    for number in range(40):
        color = (200 * (number % 2), 5 * number, 6 * number)
        Image.new("RGB", (8, 8), color).save(root / "images" / f"{number}.png")
        rows.append(f"images/{number}.png,{number % 2}\n")
    (root / "list.csv").write_text("".join(rows))
    return DataConfig(name=f"{module(FILES)}:Listed", root=str(root), val_fraction=0.25, test_fraction=0.25)


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# --- found by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["Squares", "made"])
def test_a_source_of_the_users_is_a_dataset_like_ours(squares, named):
    config = DataConfig(name=f"{squares}:{named}", val_fraction=0.2, test_fraction=0.3)
    dataset = load_dataset(config)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [200, 80, 120]
    assert dataset_info(config).num_classes == dataset.num_classes == 4
    assert dataset.train.batch_shape == dataset_info(config).image_shape == (1, 8, 8)
    assert missing_data(config) is None
    assert not needs_files(config)
    assert dataset.train.labels.bincount().tolist() == [50] * 4


def test_it_takes_the_arguments_that_it_names(squares):
    config = DataConfig(name=f"{squares}:Squares", kwargs={"count": 40})
    assert len(load_dataset(config).train) == 28
    assert fingerprint(config) != fingerprint(config.model_copy(update={"kwargs": {"count": 44}}))
    with pytest.raises(DataError, match=r"data\.kwargs\.cuont: unknown; did you mean 'count'"):
        load_dataset(config.model_copy(update={"kwargs": {"cuont": 40}}))


def test_images_can_be_resized(squares):
    config = DataConfig(name=f"{squares}:Squares", image_size=16)
    assert dataset_info(config).image_shape == load_dataset(config).train.batch_shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_package:source", r"cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("{}:Sqares", r"cannot be imported: AttributeError: module '{}' has no attribute 'Sqares'"),
        ("{}:number", r"must be a tune_topkd\.data\.Source or give one when it is called, but is a int"),
        ("{}:DatasetInfo", r"cannot be made: TypeError: .*missing 2 required positional arguments"),
        ("{}:torch.tensor", r"cannot be made: TypeError"),
        (
            "{}:torch.nn.Identity",
            r"must be a tune_topkd\.data\.Source or give one when it is called, but is a Identity",
        ),
        ("{}:Source", r"cannot be made: TypeError: Can't instantiate abstract class Source"),
        (
            "timm:imagenet",
            r"unknown dataset 'timm:imagenet'; .*known: cifar10, .*; or a source of your own: package\.",
        ),
    ],
)
@pytest.mark.parametrize("call", [dataset_info, load_dataset, missing_data, fingerprint])
def test_what_is_no_source_is_told_in_one_line(squares, call, name, told):
    with pytest.raises(DatasetNameError, match=told.format(squares)) as error:
        call(DataConfig(name=name.format(squares)))
    assert len(str(error.value).splitlines()) == 1
    assert not needs_files(DataConfig(name=name.format(squares)))


# --- held to what it promises ---------------------------------------------------------------------------------------

BROKEN = {
    "float images": ("Split(images,", "Split(images.float(),", "read.*train.images must be .N, C, H, W. uint8"),
    "no channels": ("Split(images,", "Split(images[:, 0],", "but are .400, 8, 8. uint8 on cpu"),
    "arrays": ("Split(images,", "Split(images.numpy(),", "but are a ndarray"),
    "another size": ("(1, 8, 8)", "(1, 9, 9)", r"images must be \(1, 9, 9\), as info\(\) gives, but are \(1, 8, 8\)"),
    "short labels": (
        "images, labels)",
        "images, labels.short())",
        r"labels must be \(N,\) int64.*but are \(400,\) int16",
    ),
    "too few labels": (
        "images, labels)",
        "images, labels[1:])",
        "one for each of the 400 images, but are 399",
    ),
    "a label too large": (
        "images, labels)",
        "images, labels + 1)",
        "labels must be from 0 to 3, but that of image 3 is 4",
    ),
    "a label below 0": (
        "images, labels)",
        "images, labels - 1)",
        "labels must be from 0 to 3, but that of image 0 is -1",
    ),
    "no images": ("Split(images, labels)", "Split(images[:0], labels[:0])", "there is none"),
    "a tuple": ("return Parts(Split(images, labels))", "return images, labels", "must give a Parts, but gives a tuple"),
    "tensors in parts": ("Split(images, labels)", "images, labels", "train must be a Split or a FileSplit, but is a"),
    "a broken test part": ("Split(images, labels)", "*[Split(images, labels), 5]", "test must be a Split or a File"),
    "names of too few classes": (
        "images, labels)",
        "images, labels), None, ('a', 'b')",
        "classes must be 4 names or none, but are 2",
    ),
    "one class": ("num_classes=4", "num_classes=1", r"info\(\): num_classes must be a whole number of at least 2"),
    "a class count of another kind": ("num_classes=4", "num_classes='4'", "num_classes must be a whole number"),
    "a shape of another kind": ("(1, 8, 8))", "[1, 8, 8])", r"image_shape must be \(channels, height, width\), but"),
    "a dict as info": ("return DatasetInfo(", "return dict(", r"info\(\): must give a DatasetInfo, but gives a dict"),
    "an exception": ("return Parts", "raise KeyError('x\\ny')\n        return Parts", r"read\(\) fails: KeyError: "),
    "an exit": ("return Parts", "return 1 / 0\n        return Parts", r"read\(\) fails: ZeroDivisionError: division"),
    "a class without images": ("% 4", "% 3", "leave the .* split without an image of class 3"),
}


@pytest.mark.parametrize(("old", "new", "told"), BROKEN.values(), ids=BROKEN)
def test_a_promise_that_is_broken_is_told_in_one_line(module, old, new, told):
    assert old in SQUARES
    config = DataConfig(name=f"{module(SQUARES.replace(old, new))}:Squares")
    with pytest.raises(DataError, match=told) as error:
        load_dataset(config)
    assert len(str(error.value).splitlines()) == 1
    assert config.name in str(error.value)
    with pytest.raises(DataError, match=told):
        check_readable(config)


@pytest.mark.parametrize(
    ("attribute", "told"),
    [
        ("kwargs = ['count']", "kwargs must be a frozenset or a set, but is a list"),
        ("constants = 0.5", "constants must be a Constants or None, but is a float"),
    ],
)
def test_an_attribute_of_another_kind_is_told(module, attribute, told):
    name = module(SQUARES.replace('kwargs = frozenset({"count"})', attribute))
    with pytest.raises(DatasetNameError, match=told):
        dataset_info(DataConfig(name=f"{name}:Squares"))


def test_a_source_that_draws_at_random_leaves_torch_s_generator_alone(module):
    name = module(SQUARES.replace("return Parts", "torch.manual_seed(1)\n        return Parts"))
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    load_dataset(DataConfig(name=f"{name}:Squares"))
    assert torch.equal(torch.rand(2), expected)


def test_files_that_are_missing_are_not_read(listed):
    (Path(listed.root) / "list.csv").unlink()
    assert missing_data(listed) == f"put list.csv into {listed.root}"
    check_readable(listed)
    with pytest.raises(DataError, match=r"^put list\.csv into"):
        load_dataset(listed)


# --- files ----------------------------------------------------------------------------------------------------------


def test_image_files_are_decoded_as_they_come_into_a_batch(listed):
    dataset = load_dataset(listed.model_copy(update={"workers": 2}))
    assert [split.workers for split in (dataset.train, dataset.val, dataset.test)] == [2] * 3
    (batch,) = eval_batches(load_dataset(listed).val, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert batch.images.shape == (10, 3, 8, 8)
    assert torch.equal(batch.images[:, 0, 0, 0].round() / 200, batch.labels.float())
    assert needs_files(listed)
    assert data_notes(listed) == ["a list and no folders"]


def test_image_files_are_fitted_to_the_size_that_the_config_asks_for(listed):
    dataset = load_dataset(listed.model_copy(update={"image_size": 6}))
    (batch,) = eval_batches(dataset.val, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert batch.images.shape == (10, 3, 6, 6)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("tuple(str(self", "list(str(self", "paths must be a tuple of texts, but are a list"),
        (
            "tuple(str(self.folder(config) / name)",
            "tuple(self.folder(config) / name",
            "a tuple of texts, but are a tuple",
        ),
        (
            "size=(8, 8)",
            "size=(8, 9)",
            r"size must give images of \(3, 8, 8\), as info\(\) gives, but gives \(3, 8, 9\)",
        ),
        ("[int(label)", "[2 * int(label)", "labels must be from 0 to 1, but that of image 1 is 2"),
    ],
)
def test_files_that_are_not_as_promised_are_told(listed, module, old, new, told):
    assert old in FILES
    name = f"{module(FILES.replace(old, new))}:Listed"
    with pytest.raises(DataError, match=told):
        load_dataset(listed.model_copy(update={"name": name}))


# --- what it is known by --------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_images_and_labels_and_not_of_the_code(module):
    first, same, other, swapped = (
        DataConfig(name=f"{module(text)}:Squares")
        for text in (
            SQUARES,
            SQUARES.replace("'''A bright square", "'''A square").replace("labels = torch", "labels = 1 * torch"),
            SQUARES.replace("+= 150", "+= 151"),
            SQUARES.replace("Split(images, labels)", "Split(images, 3 - labels)"),
        )
    )
    assert fingerprint(first) == fingerprint(same)
    assert len({fingerprint(config) for config in (first, other, swapped)}) == 3


def test_the_fingerprint_of_a_dataset_that_was_loaded_or_mapped_is_the_same(squares, tmp_path):
    config = DataConfig(name=f"{squares}:Squares", image_size=6)
    dataset = load_dataset(config)
    assert save_dataset(config, dataset, tmp_path / "d.pt")
    mapped = load_saved(config, tmp_path / "d.pt")
    assert fingerprint(config) == fingerprint(config, dataset) == fingerprint(config, mapped)


def test_the_fingerprint_sees_the_bytes_the_order_and_the_labels_of_files(listed, tmp_path):
    root = Path(listed.root)

    def taken(place: Path = root) -> str:
        datasets._loaded.cache_clear()  # as another process
        return fingerprint(listed.model_copy(update={"root": str(place)}))

    first = taken()
    root.rename(tmp_path / "moved")
    assert taken(tmp_path / "moved") == first
    (tmp_path / "moved").rename(root)
    found = {first}
    Image.new("RGB", (8, 8), (1, 2, 3)).save(root / "images" / "7.png")
    found.add(taken())
    rows = (root / "list.csv").read_text().splitlines(keepends=True)
    (root / "list.csv").write_text("".join([*rows[2:], *rows[:2]]))
    found.add(taken())
    (root / "list.csv").write_text("".join([*rows[:-2], rows[-2].replace(",0", ",1"), rows[-1]]))
    found.add(taken())
    assert len(found) == 4


def test_an_identity_of_its_own_spares_reading_and_counts_with_the_code(module, tmp_path):
    own = SQUARES.replace("    def read", "    def identity(self, config):\n        return ['v1']\n\n    def read", 1)
    unread = own.replace("return Parts", "raise AssertionError('it is read')\n        return Parts")
    first, second = (DataConfig(name=f"{module(text)}:Squares") for text in (unread, unread.replace("v1", "v2")))
    assert fingerprint(first) != fingerprint(second)
    path = tmp_path / f"{first.name.partition(':')[0]}.py"
    before = fingerprint(first)
    edited(path, "'''A bright", "'''Any bright")
    assert fingerprint(first) == before
    edited(path, "it is read", "it is another")
    assert fingerprint(first) != before


def test_an_identity_that_json_has_not_is_told(module):
    identity = "    def identity(self, config):\n        return {1, 2}\n\n    def read"
    name = module(SQUARES.replace("    def read", identity))
    with pytest.raises(DataError, match=r"identity\(\): must be None or what JSON can hold, but is not: .*set"):
        fingerprint(DataConfig(name=f"{name}:Squares"))


# --- used -----------------------------------------------------------------------------------------------------------


def trial(name: str, **changes) -> TrialConfig:
    recipe = RecipeConfig(epochs=2, lr=0.1, schedule="constant")
    student = ModelConfig(name="digits_linear")
    return TrialConfig(
        **{"data": DataConfig(name=name), "student": student, "method": "ce", "recipe": recipe, **changes}
    )


def test_a_student_trains_on_it(squares):
    result = train(trial(f"{squares}:Squares"))
    assert result.metrics["val_top1"] > 90
    assert "val_top5" not in result.metrics


def test_a_checkpoint_is_of_its_images_and_labels(module, tmp_path):
    name = module(SQUARES)
    train(trial(f"{name}:Squares"), lambda epoch, metrics, save: save(tmp_path / "kept"))
    assert train(trial(f"{name}:Squares"), resume_from=tmp_path / "kept").epoch == 2
    edited(tmp_path / f"{name}.py", "+= 150", "+= 140")
    del sys.modules[name]
    datasets._loaded.cache_clear()  # as another process
    with pytest.raises(ValueError, match=r"is of another config: code\.data was '\w{16}' and is now '\w{16}' \(code: "):
        train(trial(f"{name}:Squares"), resume_from=tmp_path / "kept")


def raw_space(name: str, **sections) -> dict:
    return {
        "data": {"name": name},
        "teacher": {"name": "digits_cnn", "recipe": {"epochs": 1}},
        "student": "digits_linear",
        "recipe": {"epochs": 2},
        "space": {"k": {"low": 1, "high": 2}},
        "sweep": {"asha": None},
        **sections,
    }


def test_the_teacher_is_of_its_images_and_labels(module):
    first, other = (
        config_from(raw_space(f"{module(t)}:Squares"), "t") for t in (SQUARES, SQUARES.replace("150", "149"))
    )
    assert len({teacher_key(config) for config in (first, first, other)}) == 2


def written(tmp_path: Path, raw: dict) -> str:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(raw))
    return str(tmp_path / "space.yaml")


def test_a_space_with_it_can_be_checked(squares, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["launch.py", "check", written(tmp_path, raw_space(f"{squares}:Squares"))])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"topkd on {squares}:Squares (4 classes)" in capfd.readouterr().err


PREFLIGHT = {
    "no module": ("no_such_package:source", {}, r"data\.name: unknown dataset 'no_such_package:source': cannot be imp"),
    "no attribute": ("{}:Sqares", {}, r"data\.name: unknown dataset .* has no attribute 'Sqares'"),
    "no source": ("{}:number", {}, r"data\.name: dataset .* must be a tune_topkd\.data\.Source"),
    "unknown argument": ("{}:Squares", {"data.kwargs": {"x": 1}}, r"data: dataset .* data\.kwargs\.x: unknown"),
    "too few images": ("{}:Squares", {"data.kwargs": {"count": 8}}, r"data: dataset .* without an image of class"),
}


@pytest.mark.parametrize(("name", "changes", "told"), PREFLIGHT.values(), ids=PREFLIGHT)
def test_what_is_wrong_with_it_is_one_problem_before_anything_starts(squares, tmp_path, name, changes, told):
    raw = raw_space(name.format(squares))
    raw["data"] |= {key.partition(".")[2]: value for key, value in changes.items()}
    with pytest.raises(ConfigError, match=told) as error:
        preflight.load_checked(written(tmp_path, raw))
    assert len(error.value.problems) == 1


def test_broken_labels_do_not_hide_a_network_that_does_not_fit(module, tmp_path):
    name = module(SQUARES.replace("images, labels)", "images, labels + 1)"))
    with pytest.raises(ConfigError) as error:
        preflight.load_checked(written(tmp_path, raw_space(f"{name}:Squares", student="digits_linaer")))
    assert [problem.key for problem in error.value.problems] == ["data", "student.name"]


def test_its_files_lie_where_the_space_was_loaded(listed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = raw_space(listed.name, student={"name": "small_cnn"}, teacher={"name": "small_cnn", "recipe": {"epochs": 1}})
    raw["data"] |= {"root": "root", "val_fraction": 0.25, "test_fraction": 0.25}
    raw["space"] = {"lr": {"low": 0.1, "high": 0.2}}
    raw["loss"] = {"k": 1}
    checked = preflight.load_checked(written(tmp_path, raw))
    assert checked.config.data.root == listed.root
    assert "a list and no folders" in checked.warnings


def test_code_that_changed_is_told_by_its_module(squares, tmp_path):
    from tune_topkd.sweep.identity import identities

    config = config_from(raw_space(f"{squares}:Squares"), "t")
    before = identities(config, None)
    assert before.keys() == {"data", "student.name", "teacher.name", f"code {squares}"}
    edited(tmp_path / f"{squares}.py", "number = 3", "number = 4")
    after = identities(config, None)
    assert {key for key in before if before[key] != after[key]} == {f"code {squares}"}
    assert json.loads(json.dumps(before)) == before
