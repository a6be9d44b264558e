import json
import logging
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import tune_topkd.models as models
from tune_topkd.config import ModelConfig
from tune_topkd.config import SweepConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import config_from
from tune_topkd.data import Dataset
from tune_topkd.data import Split
from tune_topkd.data import load_dataset
from tune_topkd.evaluate import Evaluation
from tune_topkd.evaluate import evaluate
from tune_topkd.models import build_model
from tune_topkd.models import save_weights
from tune_topkd.storage import files
from tune_topkd.storage import write_atomically
from tune_topkd.teacher import ensure_teacher
from tune_topkd.teacher import load_teacher
from tune_topkd.teacher import teacher_key
from tune_topkd.teacher import training
from tune_topkd.teacher.training import _checked_accuracy
from tune_topkd.train import train

RAW = {
    "data": {"name": "digits", "val_fraction": 0.3, "test_fraction": 0.3},
    "teacher": {
        "name": "digits_linear",
        "recipe": {"epochs": 2, "lr": 0.05, "schedule": "constant"},
    },
    "student": "digits_cnn_tiny",
    "recipe": {"epochs": 3, "schedule": "constant"},
    "space": {"k": {"low": 1, "high": 9}},
}


def sweep(**changes) -> SweepConfig:
    """`RAW` with some sections changed: `teacher={"seed": 1}`."""
    raw = {key: {**value, **changes.pop(key, {})} if isinstance(value, dict) else value for key, value in RAW.items()}
    return config_from({**raw, **changes}, "test")


@dataclass
class Outcome:
    epoch: int
    model: nn.Module
    diverged: bool = False


class CountingTrain:
    """The real training, counted."""

    def __init__(self):
        self.calls: list[TrialConfig] = []

    def __call__(self, config, report, resume_from=None):
        self.calls.append(config)
        return train(config, report, resume_from)


# --- the key --------------------------------------------------------------------------------------------------------


def test_key_does_not_depend_on_the_student_or_the_search():
    key = teacher_key(sweep())
    assert teacher_key(sweep(student="digits_linear", method="kd", description="x", recipe={"epochs": 9})) == key
    assert len(key) == 16
    assert int(key, 16) >= 0


def test_key_changes_with_all_that_the_teacher_depends_on():
    changes = [
        {},
        {"teacher": {"name": "digits_cnn"}},
        {"teacher": {"name": "digits_cnn", "kwargs": {"widths": [2]}}},
        {"teacher": {"seed": 1}},
        {"teacher": {"recipe": {"epochs": 3, "lr": 0.05, "schedule": "constant"}}},
        {"data": {"split_seed": 1}},
        {"data": {"val_fraction": 0.2}},
        {"data": {"augment": {"pad": 1}}},
    ]
    assert len({teacher_key(sweep(**change)) for change in changes}) == len(changes)


def test_key_is_of_the_data_and_not_of_where_it_lies(tmp_path: Path):
    def key(root: str, **data) -> str:
        named = {"name": "stl10", "root": str(tmp_path / root), **data}
        return teacher_key(sweep(data=named, teacher={"name": "small_cnn"}))

    for root, byte in (("a", b"1"), ("b", b"1"), ("c", b"22")):
        folder = tmp_path / root / "stl10_binary"
        folder.mkdir(parents=True)
        for name in ("train_X", "train_y", "test_X", "test_y"):
            (folder / f"{name}.bin").write_bytes(byte)
    first = key("a")
    assert key("b") == key("a", workers=2) == key("a", download=True) == first
    assert len({first, key("c"), key("a", image_size=32)}) == 3
    with pytest.raises(ValueError, match=r"'stl10': .*/none/stl10_binary has no train_X\.bin"):
        key("none")


def test_key_of_a_checkpoint_is_its_content(tmp_path: Path):
    keys = []
    for name, content in (("a.pt", b"1"), ("b.pt", b"1"), ("c.pt", b"2")):
        (tmp_path / name).write_bytes(content)
        keys.append(teacher_key(sweep(teacher={"checkpoint": str(tmp_path / name), "recipe": None})))
    assert keys[0] == keys[1] != keys[2]


def test_two_sets_of_weights_in_one_file_are_two_teachers(tmp_path: Path):
    plain, averaged = (build_model("digits_linear", num_classes=10) for _ in range(2))
    path = tmp_path / "w.pt"
    torch.save({"model": plain.state_dict(), "model_ema": averaged.state_dict()}, path)
    keys = {None: plain, "model": plain, "model_ema": averaged}
    network = {"name": "digits_linear", "kwargs": {}, "checkpoint": str(path), "recipe": None}
    configs = [sweep(teacher=network | {"checkpoint_key": key}) for key in keys]
    assert len({teacher_key(config) for config in configs}) == 3
    for config, expected in list(zip(configs, keys.values(), strict=True))[1:]:
        assert torch.equal(load_teacher(config.teacher.model, path, num_classes=10)[1].weight, expected[1].weight)


# --- trained --------------------------------------------------------------------------------------------------------


def test_teacher_is_trained_once_and_then_found(tmp_path: Path):
    train, config = CountingTrain(), sweep()
    first = ensure_teacher(config, tmp_path, train)
    second = ensure_teacher(config, tmp_path, train)
    assert len(train.calls) == 1
    assert (first.was_cached, second.was_cached) == (False, True)
    assert (second.path, second.key, second.val_top1) == (first.path, first.key, first.val_top1)
    assert first.path == tmp_path / teacher_key(config) / "teacher.pt"
    assert first.val_top1 > 50


def test_teacher_is_trained_with_cross_entropy_by_its_own_recipe(tmp_path: Path):
    train, config = CountingTrain(), sweep(teacher={"seed": 7})
    ensure_teacher(config, tmp_path, train)
    (trial,) = train.calls
    assert (trial.method, trial.seed, trial.teacher) == ("ce", 7, None)
    assert (trial.student.name, trial.student.kwargs) == (config.teacher.name, config.teacher.kwargs)
    assert (trial.recipe, trial.data) == (config.teacher.recipe, config.data)


def test_record_says_what_the_teacher_is(tmp_path: Path):
    teacher = ensure_teacher(sweep(), tmp_path, train)
    record = json.loads((teacher.path.parent / "teacher.json").read_text())
    assert record["key"] == teacher.key
    assert record["val_top1"] == teacher.val_top1
    assert record["epochs"] == 2
    assert record["config"]["teacher"]["recipe"]["lr"] == 0.05
    assert record["versions"]["torch"] == torch.__version__
    assert record["seconds"] > 0


def test_recorded_accuracy_is_that_of_the_saved_weights(tmp_path: Path):
    teacher = ensure_teacher(sweep(), tmp_path, train)
    dataset = load_dataset(sweep().data)
    model = load_teacher(ModelConfig(name="digits_linear"), teacher.path, num_classes=10)
    images = (dataset.val.images.double() / 255 - dataset.mean[0]) / dataset.std[0]
    right = model(images.float()).argmax(1) == dataset.val.labels
    assert teacher.val_top1 == pytest.approx(100 * right.double().mean().item())


def test_progress_is_told_of_every_epoch_of_a_training_and_of_nothing_else(tmp_path: Path):
    seen: list[int] = []
    for _ in range(2):
        ensure_teacher(sweep(), tmp_path, train, progress=lambda epoch, metrics: seen.append((epoch, "lr" in metrics)))
    assert seen == [(1, True), (2, True)]


def test_a_training_that_was_killed_leaves_nothing_that_is_taken_for_a_teacher(tmp_path: Path, monkeypatch):
    """At whichever write it was killed."""
    for whole_writes in (0, 1):
        writes = []

        def write(path, content, killed_at=whole_writes, writes=writes, **options):
            if len(writes) == killed_at:
                path.with_name(f".{path.name}.tmp").write_bytes(b"half")
                raise KeyboardInterrupt
            writes.append(path.name)
            write_atomically(path, content, **options)

        with monkeypatch.context() as patch:
            patch.setattr("tune_topkd.models.checkpoints.write_atomically", write)
            patch.setattr(files, "write_atomically", write)  # as `write_text` calls it
            with pytest.raises(KeyboardInterrupt):
                ensure_teacher(sweep(), tmp_path, train)
        counting = CountingTrain()
        assert not ensure_teacher(sweep(), tmp_path, counting).was_cached
        assert len(counting.calls) == 1
        (tmp_path / teacher_key(sweep()) / "teacher.json").unlink()


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "teacher.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "teacher.pt").write_bytes(bytes(content))


def of_another_key(folder: Path) -> None:
    record = json.loads((folder / "teacher.json").read_text())
    (folder / "teacher.json").write_text(json.dumps({**record, "key": "0" * 16}))


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        of_another_key,
        lambda folder: (folder / "teacher.pt").write_bytes(b""),
        lambda folder: (folder / "teacher.pt").unlink(),
        lambda folder: (folder / "teacher.json").write_text('{"key": "'),
        lambda folder: (folder / "teacher.json").write_text("[]"),
    ],
)
def test_a_damaged_teacher_is_trained_again_with_a_warning(tmp_path: Path, caplog, damage):
    first = ensure_teacher(sweep(), tmp_path, train)
    weights = first.path.read_bytes()
    damage(first.path.parent)
    with caplog.at_level(logging.WARNING):
        second = ensure_teacher(sweep(), tmp_path, train)
    assert not second.was_cached
    assert f"{first.path.parent} is damaged and is trained again" in caplog.text
    assert second.path.read_bytes() == weights
    assert ensure_teacher(sweep(), tmp_path, train).was_cached


def test_two_at_once_train_it_once(tmp_path: Path):
    calls, results = [], []

    def slow_train(config, report):
        calls.append(config)
        time.sleep(0.3)
        return train(config, report)

    threads = [
        threading.Thread(target=lambda: results.append(ensure_teacher(sweep(), tmp_path, slow_train))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sorted(result.was_cached for result in results) == [False, True]


def test_a_failed_training_gives_the_lock_back(tmp_path: Path):
    def broken(config, report):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        ensure_teacher(sweep(), tmp_path, broken)
    assert not ensure_teacher(sweep(), tmp_path, train).was_cached


def constant(num_classes: int, answer: int) -> nn.Module:
    model = build_model("digits_linear", num_classes=num_classes)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.arange(num_classes) == answer)
    return model


def test_a_teacher_no_better_than_chance_is_refused_and_not_kept(tmp_path: Path):
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"'digits_linear': 10\.\d % top-1 .*hardly better than chance \(10\.0 %\)"
        ):
            ensure_teacher(sweep(), tmp_path, lambda config, report: Outcome(2, constant(10, 3)))
    assert not list(tmp_path.glob("*/teacher.*"))


@pytest.mark.parametrize(("classes", "limit"), [(10, 20.0), (3, 200 / 3), (2, 75.0)])
def test_the_teacher_must_be_better_than_twice_chance_or_half_way_to_perfect(monkeypatch, classes, limit):
    val = Split(torch.zeros(1200, 1, 1, 1, dtype=torch.uint8), torch.zeros(1200, dtype=torch.int64))
    dataset = Dataset(train=val, val=val, test=val, num_classes=classes, mean=(0.0,), std=(1.0,))
    hits = [round(12 * limit), round(12 * limit) + 1]
    monkeypatch.setattr("tune_topkd.teacher.training.load_dataset", lambda config: dataset)
    monkeypatch.setattr(
        "tune_topkd.teacher.training.evaluate", lambda *args, **kwargs: Evaluation(hits.pop(0) / 12, None, 1.0)
    )
    with pytest.raises(ValueError, match=rf"more than {limit:.1f} % is needed"):
        _checked_accuracy(constant(classes, 0), sweep().data, "x")
    assert _checked_accuracy(constant(classes, 0), sweep().data, "x") > limit


def test_a_diverged_training_is_refused(tmp_path: Path):
    config = sweep(teacher={"recipe": {"epochs": 2, "lr": 1e30, "schedule": "constant"}})
    with pytest.raises(ValueError, match="teacher 'digits_linear': its training diverged in epoch 1; lower its lr"):
        ensure_teacher(config, tmp_path, train)


def test_a_root_that_cannot_be_written_is_a_value_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/\w+: teachers cannot be kept here: Not a directory"):
        ensure_teacher(sweep(), tmp_path / "file", train)


# --- a network whose code changes -----------------------------------------------------------------------------------


def two_layers(activation):
    return lambda *, num_classes: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), activation(), nn.Linear(32, num_classes)
    )


@pytest.fixture
def edited(monkeypatch):
    """A sweep whose teacher's code can be edited."""
    recipe = {"epochs": 4, "lr": 0.1, "schedule": "constant"}

    def edit(activation):
        monkeypatch.setitem(models._REGISTRY, "edited", two_layers(activation))
        return sweep(teacher={"name": "edited", "recipe": recipe})

    return edit


def test_a_teacher_whose_code_was_edited_is_another(tmp_path: Path, edited):
    first = ensure_teacher(edited(nn.ReLU), tmp_path, train)
    other = ensure_teacher(edited(nn.Hardsigmoid), tmp_path, train)
    assert not other.was_cached
    assert other.key != first.key
    assert ensure_teacher(edited(nn.ReLU), tmp_path, no_training).key == first.key


def test_a_teacher_that_is_no_longer_as_good_is_trained_again(tmp_path: Path, monkeypatch, caplog):
    """Whatever its network depends on besides its code."""
    is_broken = [False]

    class Network(nn.Sequential):
        def forward(self, images):
            logits = super().forward(images)
            return logits.roll(1, 1) if is_broken[0] and len(images) > 100 else logits

    monkeypatch.setitem(
        models._REGISTRY, "odd", lambda *, num_classes: Network(nn.Flatten(), nn.Linear(64, num_classes))
    )
    config = sweep(teacher={"name": "odd"})
    first = ensure_teacher(config, tmp_path, train)
    is_broken[0] = True
    counting = CountingTrain()
    with pytest.raises(ValueError, match="hardly better than chance"):
        ensure_teacher(config, tmp_path, counting)
    assert len(counting.calls) == 1
    assert f"of {first.val_top1:.2f} % when it was trained, and is no longer what it was" in caplog.text


# --- measured -------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """The device of each measurement; all of them count as long ones."""
    found = []

    def counting(model, *arguments, **options):
        found.append(next(model.parameters()).device.type)
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(training, "evaluate", counting)
    monkeypatch.setattr(training, "KEPT_FROM_SECONDS", 0.0)
    return found


def test_a_measurement_that_took_long_is_kept_with_its_date(tmp_path: Path, measured, caplog):
    trained = ensure_teacher(sweep(), tmp_path, train)
    assert ensure_teacher(sweep(), tmp_path, no_training).measured is not None
    assert len(measured) == 1
    config, root = given(trained.path), tmp_path / "given"
    first, second = (ensure_teacher(config, root, no_training) for _ in range(2))
    assert (first.measured, len(measured)) == (None, 2)
    assert second.val_top1 == first.val_top1
    assert second.measured.startswith("20")
    ensure_teacher(config, root, no_training, measure=True)
    assert len(measured) == 3
    ensure_teacher(given(trained.path, augment={"pad": 1}), root, no_training)  # the same images are evaluated
    assert len(measured) == 3
    ensure_teacher(config.model_copy(update={"data": config.data.model_copy(update={"split_seed": 1})}), root, train)
    assert len(measured) == 4
    for file in root.glob("*/measured-*.json"):
        file.write_text("{")
    assert ensure_teacher(config, root, no_training).val_top1 == first.val_top1
    assert len(measured) == 5
    assert "is damaged, the teacher is measured again" in caplog.text


def test_a_measurement_of_other_code_is_not_taken(tmp_path: Path, measured, edited):
    path = ensure_teacher(edited(nn.ReLU), tmp_path, train).path
    found = []
    for activation in (nn.ReLU, nn.Identity, nn.ReLU):
        config = edited(activation)
        checkpoint = config.teacher.model_copy(update={"checkpoint": str(path), "recipe": None})
        config = config.model_copy(update={"teacher": checkpoint})
        found.append(ensure_teacher(config, tmp_path / "given", no_training).val_top1)
    assert len(measured) == 3  # as it was trained, and one for each code
    assert found[0] == found[2] != found[1]


def test_a_measurement_that_took_no_time_is_taken_again(tmp_path: Path, measured, monkeypatch):
    monkeypatch.setattr(training, "KEPT_FROM_SECONDS", 3600.0)
    for count in (1, 2, 3):
        ensure_teacher(sweep(), tmp_path, train)
        assert len(measured) == count
    assert not list(tmp_path.glob("*/measured-*"))


def test_where_nothing_can_be_written_a_given_teacher_is_measured_and_a_kept_one_is_found(
    tmp_path: Path, measured, monkeypatch, caplog
):
    trained = ensure_teacher(sweep(), tmp_path, train)

    def refusing(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(training, "write_text", refusing)
    monkeypatch.setattr(training, "_locked", refusing)
    assert ensure_teacher(sweep(), tmp_path, no_training).path == trained.path
    assert ensure_teacher(given(trained.path), tmp_path / "other", no_training).val_top1 == trained.val_top1
    assert "the teacher is measured again the next time" in caplog.text


@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_a_teacher_with_logits_that_float16_has_not_is_refused(tmp_path: Path, value):
    model = constant(10, 3)
    with torch.no_grad():
        model[1].bias[5] = value
    save_weights(model, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"w\.pt: gives a logit of {value:g}, .*at most 65,504"):
        ensure_teacher(given(tmp_path / "w.pt"), tmp_path, no_training)


# --- interrupted ----------------------------------------------------------------------------------------------------


def interrupted(root: Path, after: int) -> Path:
    """A teacher's folder whose training was interrupted after some epoch."""

    def progress(epoch, metrics):
        if epoch == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_teacher(longer(), root, train, progress)
    return root / teacher_key(longer())


def longer() -> SweepConfig:
    return sweep(teacher={"recipe": {"epochs": 4, "lr": 0.05, "schedule": "cosine"}})


def epochs_of(root: Path) -> list[int]:
    epochs: list[int] = []
    ensure_teacher(longer(), root, train, lambda epoch, metrics: epochs.append(epoch))
    return epochs


def test_a_training_that_was_interrupted_goes_on_and_comes_to_the_same_bits(tmp_path: Path):
    whole = ensure_teacher(longer(), tmp_path / "whole", train)
    folder = interrupted(tmp_path / "cut", 1)
    assert (folder / "checkpoint").is_dir()
    interrupted(tmp_path / "cut", 3)
    assert epochs_of(tmp_path / "cut") == [4]
    assert (folder / "teacher.pt").read_bytes() == whole.path.read_bytes()
    assert not (folder / "checkpoint").exists()


def cut_off(checkpoint: Path) -> None:
    (file,) = checkpoint.iterdir()
    file.write_bytes(file.read_bytes()[:-100])


def of_another_config(checkpoint: Path) -> None:
    other = checkpoint.parent.parent / "other"
    trial = TrialConfig(
        data=longer().data, student="digits_linear", method="ce", recipe={"epochs": 1, "lr": 0.01}, seed=3
    )
    train(trial, lambda epoch, metrics, save: save(other))
    shutil.rmtree(checkpoint)
    other.rename(checkpoint)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut_off, "the file is cut off|is damaged"),
        (of_another_config, "is of another config"),
        (lambda checkpoint: [file.unlink() for file in checkpoint.iterdir()], "cannot be read"),
    ],
)
def test_a_checkpoint_that_cannot_be_gone_on_from_is_passed_over_with_a_word(tmp_path: Path, caplog, damage, why):
    folder = interrupted(tmp_path, 2)
    damage(folder / "checkpoint")
    assert epochs_of(tmp_path) == [1, 2, 3, 4]
    assert re.search(rf"from the start, not from its last checkpoint: .*({why})", caplog.text)
    assert not (folder / "checkpoint").exists()


# --- of an older version --------------------------------------------------------------------------------------------


def as_version_one(trained: Path, config: SweepConfig, **changes) -> Path:
    """The folder as version 1 would have left it."""
    record = json.loads((trained / "teacher.json").read_text())
    inputs = {name: value for name, value in record["config"].items() if name != "network"}
    old = trained.with_name("0123456789abcdef")
    trained.rename(old)
    record |= {"key": old.name, "config": {**inputs, "format": 1, "files": "f" * 16}, **changes}
    (old / "teacher.json").write_text(json.dumps(record))
    return old


def test_a_teacher_of_an_older_version_is_found_if_it_is_as_good_as_it_was(tmp_path: Path):
    first = ensure_teacher(sweep(), tmp_path, train)
    old = as_version_one(first.path.parent, sweep())
    found = ensure_teacher(sweep(), tmp_path, no_training)
    assert (found.path, found.key, found.val_top1) == (old / "teacher.pt", old.name, first.val_top1)
    assert not ensure_teacher(sweep(teacher={"seed": 4}), tmp_path, train).was_cached


def test_a_teacher_of_an_older_version_that_is_not_as_good_is_not_used(tmp_path: Path, caplog):
    first = ensure_teacher(sweep(), tmp_path, train)
    as_version_one(first.path.parent, sweep(), val_top1=12.0)
    assert not ensure_teacher(sweep(), tmp_path, train).was_cached
    assert "of 12.00 % when it was trained, and is no longer what it was" in caplog.text
    assert "it is not used, and another is trained" in caplog.text


# --- given ----------------------------------------------------------------------------------------------------------


def given(path: Path, **changes) -> SweepConfig:
    return sweep(teacher={"checkpoint": str(path), "recipe": None, **changes})


def no_training(config, report):
    raise AssertionError("a given teacher is not trained")


def test_a_given_checkpoint_is_evaluated_and_left_where_it_is(tmp_path: Path):
    trained = ensure_teacher(sweep(), tmp_path / "teachers", train)
    teacher = ensure_teacher(given(trained.path), tmp_path / "other", no_training)
    assert teacher.path == trained.path
    assert teacher.was_cached
    assert teacher.val_top1 == trained.val_top1
    assert not (tmp_path / "other").exists()


def test_a_given_relative_path_comes_back_absolute(tmp_path: Path, monkeypatch):
    trained = ensure_teacher(sweep(), tmp_path, train)
    monkeypatch.chdir(trained.path.parent)
    assert ensure_teacher(given(Path("teacher.pt")), tmp_path, no_training).path == trained.path


def test_a_given_checkpoint_that_is_missing_or_of_another_network_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.pt: cannot be read"):
        ensure_teacher(given(tmp_path / "none.pt"), tmp_path, no_training)
    save_weights(build_model("digits_linear", num_classes=7), tmp_path / "seven.pt")
    with pytest.raises(ValueError, match=r"seven\.pt: the weights do not fit the network"):
        ensure_teacher(given(tmp_path / "seven.pt"), tmp_path, no_training)


def test_a_given_checkpoint_no_better_than_chance_is_refused(tmp_path: Path):
    save_weights(constant(10, 0), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: .*hardly better than chance"):
        ensure_teacher(given(tmp_path / "w.pt"), tmp_path, no_training)


def test_a_loaded_teacher_is_in_eval_mode_and_asks_for_no_gradient(tmp_path: Path):
    save_weights(build_model("digits_cnn_tiny", num_classes=10), tmp_path / "w.pt")
    teacher = load_teacher(ModelConfig(name="digits_cnn_tiny"), tmp_path / "w.pt", num_classes=10)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_may_be_trained_on_other_views_than_the_students(tmp_path):
    usual, own = sweep(), sweep(teacher={"augment": {"pad": 1, "flip": True}})
    assert own.data.augment == usual.data.augment != own.teacher.augment
    trains = CountingTrain()
    keys = {ensure_teacher(config, tmp_path, trains).key for config in (usual, own)}
    assert len(keys) == 2
    assert [trial.data.augment for trial in trains.calls] == [usual.data.augment, own.teacher.augment]
    assert trains.calls[1].data.model_copy(update={"augment": usual.data.augment}) == usual.data
