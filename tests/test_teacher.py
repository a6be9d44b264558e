import json
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from tune_topkd.config import ModelConfig
from tune_topkd.config import SweepConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import config_from
from tune_topkd.data import Dataset
from tune_topkd.data import Split
from tune_topkd.data import load_dataset
from tune_topkd.models import build_model
from tune_topkd.models import save_weights
from tune_topkd.models import write_atomically
from tune_topkd.teacher import ensure_teacher
from tune_topkd.teacher import load_teacher
from tune_topkd.teacher import teacher_key
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

    def __call__(self, config, report):
        self.calls.append(config)
        return train(config, report)


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
        {"teacher": {"kwargs": {"widths": [2]}}},
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
        return teacher_key(sweep(data=named))

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

        def write(path, content, killed_at=whole_writes, writes=writes):
            if len(writes) == killed_at:
                path.with_name(f".{path.name}.tmp").write_bytes(b"half")
                raise KeyboardInterrupt
            writes.append(path.name)
            write_atomically(path, content)

        with monkeypatch.context() as patch:
            patch.setattr("tune_topkd.models.checkpoints.write_atomically", write)
            patch.setattr("tune_topkd.teacher.training.write_atomically", write)
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
        "tune_topkd.teacher.training.count_hits", lambda *args, **kwargs: torch.tensor([hits.pop(0), 1200])
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
