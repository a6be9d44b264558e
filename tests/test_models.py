import os
from pathlib import Path

import pytest
import torch

from tune_topkd.config import ModelConfig
from tune_topkd.models import build_configured
from tune_topkd.models import build_model
from tune_topkd.models import count_parameters
from tune_topkd.models import load_weights
from tune_topkd.models import model_names
from tune_topkd.models import read_checkpoint
from tune_topkd.models import save_weights
from tune_topkd.models import write_atomically


@pytest.mark.parametrize("name", model_names())
def test_every_model_gives_logits_of_digits_and_a_gradient_for_each_weight(name):
    model = build_model(name, num_classes=7)
    logits = model(torch.rand(5, 1, 8, 8))
    assert logits.shape == (5, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_students_are_much_smaller_than_the_teacher():
    teacher, tiny, linear = (
        count_parameters(build_model(name, num_classes=10))
        for name in ("digits_cnn", "digits_cnn_tiny", "digits_linear")
    )
    assert linear == 64 * 10 + 10
    assert tiny * 20 < teacher
    assert linear * 20 < teacher


def test_count_parameters_leaves_out_running_statistics():
    # One 3×3 convolution without bias to 2 channels, its batch norm's scale and shift, and the linear map to 10.
    assert count_parameters(build_model("digits_cnn", num_classes=10, widths=[2])) == 18 + 4 + 30


def test_kwargs_reach_the_network():
    wide = build_configured(ModelConfig(name="digits_cnn", kwargs={"widths": [3, 5, 9]}), num_classes=4)
    assert wide.classifier.in_features == 9
    assert wide.classifier.out_features == 4


def test_unknown_name_tells_the_near_and_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown model 'digits_cn'; did you mean 'digits_cnn'.*known: .*digits_linear"
    ):
        build_model("digits_cn", num_classes=10)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("digits_cnn", {"width": 3}, "model 'digits_cnn': .*'width'; known kwargs: widths"),
        ("digits_linear", {"widths": [3]}, "model 'digits_linear': .*'widths'; known kwargs: none"),
        ("digits_cnn", {"widths": []}, r"widths must be .* but got \[\]"),
        ("digits_cnn", {"widths": 8}, "widths must be .* but got 8"),
        ("digits_cnn_tiny", {"widths": [4, 0]}, r"widths must be .* but got \[4, 0\]"),
        ("digits_cnn_tiny", {"widths": [True]}, "widths must be"),
        ("digits_cnn_tiny", {"num_classes": 3}, "must not set num_classes"),
        ("digits_cnn_tiny", {"name": 3}, "known kwargs: widths"),
    ],
)
def test_kwargs_that_do_not_fit_are_value_errors(name, kwargs, said):
    with pytest.raises(ValueError, match=said):
        build_configured(ModelConfig(name=name, kwargs=kwargs), num_classes=10)


def test_weights_survive_the_round_trip(tmp_path: Path):
    model, other = (build_model("digits_cnn_tiny", num_classes=10) for _ in range(2))
    model(torch.rand(4, 1, 8, 8))  # moves the running statistics
    save_weights(model, tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.load(tmp_path / "w.pt", weights_only=True).keys() == {"model"}
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_saved_weights_can_be_read_by_others_as_the_umask_says(tmp_path: Path):
    previous = os.umask(0o022)
    try:
        save_weights(build_model("digits_linear", num_classes=2), tmp_path / "w.pt")
    finally:
        os.umask(previous)
    assert (tmp_path / "w.pt").stat().st_mode & 0o777 == 0o644


def test_weights_of_another_network_are_refused_and_leave_the_model_alone(tmp_path: Path):
    save_weights(build_model("digits_cnn_tiny", num_classes=9), tmp_path / "w.pt")
    model = build_model("digits_cnn_tiny", num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"w\.pt: .*classifier\.weight is \(9, 8\) in the file and \(10, 8\) in"):
        load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_missing_and_surplus_weights_are_both_told(tmp_path: Path):
    state = build_model("digits_linear", num_classes=10).state_dict()
    state["2.weight"] = state.pop("1.bias")
    torch.save({"model": state}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"1\.bias is missing; 2\.weight is not one of its weights"):
        load_weights(build_model("digits_linear", num_classes=10), tmp_path / "w.pt")


@pytest.mark.parametrize("content", [{"state": {}}, {"model": 3}, {"model": {"w": 1.0}}, [1, 2]])
def test_another_layout_is_refused(tmp_path: Path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: must hold"):
        load_weights(build_model("digits_linear", num_classes=10), tmp_path / "w.pt")


def test_missing_file_and_folder_are_value_errors(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.pt: cannot be read: No such file"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_checkpoint(tmp_path)


def test_any_damage_is_a_value_error(tmp_path: Path):
    path = tmp_path / "w.pt"
    model = build_model("digits_linear", num_classes=10)
    save_weights(model, path)
    whole = path.read_bytes()
    pixels = whole.index(model.state_dict()["1.weight"].numpy().tobytes())
    flipped = bytearray(whole)
    flipped[pixels + 100] ^= 1
    for damaged in (b"", b"no checkpoint", whole[: len(whole) // 2], whole[:-10], bytes(flipped), whole[100:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"w\.pt: is damaged or no checkpoint"):
            load_weights(model, path)


def test_reading_a_checkpoint_runs_no_code(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"model": Trap()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        read_checkpoint(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        assert path.read_bytes() == b"old"
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
