import argparse
import bz2
import gzip
import io
import lzma
import os
import pickle
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tune_topkd.models import build_model
from tune_topkd.models import find_head
from tune_topkd.models import load_backbone
from tune_topkd.models import load_weights
from tune_topkd.models import read_checkpoint
from tune_topkd.models import save_weights


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads wait on one another for small images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def moved(name: str = "resnet8", num_classes: int = 5) -> nn.Module:
    """A network whose running statistics are not those it started with, in eval mode."""
    network = build_model(name, num_classes=num_classes)
    with torch.no_grad():
        network(torch.rand(4, 3, 32, 32))
    return network.eval()


def prefixed(prefix: str, network: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in network.state_dict().items()}


def assert_same_logits(network: nn.Module, other: nn.Module):
    batch = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(batch), other.eval()(batch), rtol=0, atol=1e-6)


# --- our own files --------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"w\.pt: the weights do not fit .*head for 9 classes, the network one for 10"):
        load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_architecture_is_one_short_error(tmp_path: Path):
    save_weights(build_model("resnet14", num_classes=10), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"the weights do not fit the network: layer1\.1\..*; and \d+ more") as caught:
        load_weights(build_model("resnet8", num_classes=10), tmp_path / "w.pt")
    assert len(str(caught.value)) < 600
    with pytest.raises(ValueError, match=r"the weights do not fit the network: (?!.*head for)"):
        load_weights(build_model("vgg8", num_classes=3), tmp_path / "w.pt")


def test_missing_and_surplus_weights_are_both_told(tmp_path: Path):
    state = build_model("digits_linear", num_classes=10).state_dict()
    state["2.weight"] = state.pop("1.bias")
    torch.save({"model": state}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"1\.bias is missing; 2\.weight is not one of its weights"):
        load_weights(build_model("digits_linear", num_classes=10), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({"state": {}}, "but holds 'state'"),
        ({"model": 3, "epoch": 7}, "but holds 'model', 'epoch'"),
        ({"model": {"w": 1.0}}, "but holds 'model'"),
        ({"model": {}}, "but holds 'model'"),
        ({"model": {0: torch.zeros(1)}}, "but holds 'model'"),
        ({}, "but holds nothing"),
        ([1, 2], "but holds a list"),
    ],
)
def test_another_layout_is_refused(tmp_path: Path, content, held):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: must hold .*" + held):
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
    torch.save(torch.load(path, weights_only=True), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    legacy = (tmp_path / "legacy.pt").read_bytes()
    for cut in (1, 100, len(legacy) // 2, len(legacy) - 10):
        path.write_bytes(legacy[:cut])
        with pytest.raises(ValueError, match=r"w\.pt: is damaged or no checkpoint"):
            load_weights(model, path)
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"w\.pt: is damaged or no checkpoint: .*is cut off"):
        load_weights(model, path)
    for damaged in (b"", b"no checkpoint", whole[: len(whole) // 2], whole[:-10], bytes(flipped), whole[100:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"w\.pt: is damaged or no checkpoint"):
            load_weights(model, path)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_reading_a_checkpoint_runs_no_code(tmp_path: Path, zipped, where):
    path, model, trap = tmp_path / "w.pt", build_model("digits_linear", num_classes=10), Trap(tmp_path / "ran")
    content = {"model": model.state_dict(), "opt": trap} if where == "beside" else {"model": {"1.weight": trap}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"w\.pt: is refused: it asks for (posix|nt)\.mkdir, .* can run code"
    ) as caught:
        load_weights(model, path)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_a_pickled_namespace_is_refused_by_name(tmp_path: Path):
    model = build_model("digits_linear", num_classes=10)
    torch.save({"opt": argparse.Namespace(lr=0.1), "model": model.state_dict()}, tmp_path / "resnet8_last.pth")
    with pytest.raises(ValueError, match=r"_last\.pth: is refused: it asks for argparse\.Namespace, and only tensors"):
        load_weights(model, tmp_path / "resnet8_last.pth")


# --- the published layouts ------------------------------------------------------------------------------------------

LAYOUTS = {
    "extras": lambda net: {"epoch": 240, "model": net.state_dict(), "accuracy": torch.tensor(72.3), "optimizer": {}},
    "state_dict": lambda net: {"state_dict": net.state_dict(), "arch": "resnet8"},
    "model_state": lambda net: {"epoch": 3, "model_state": net.state_dict(), "cfg": "a: 1"},
    "plain": lambda net: net.state_dict(),
    "data parallel": lambda net: {"model": nn.DataParallel(net).state_dict()},
    "plain data parallel": lambda net: OrderedDict(prefixed("module.", net)),
    "compiled": lambda net: {"model": prefixed("_orig_mod.", net)},
    "compiled data parallel": lambda net: {"model": prefixed("_orig_mod.module.", net)},
    "distiller": lambda net: {
        "model": prefixed("module.teacher.", moved()) | prefixed("module.student.", net),
        "best_acc": -1,
    },
    "distiller without wrapper": lambda net: {
        "model": prefixed("student.", net) | prefixed("teacher.", moved("resnet14")) | {"fuse.weight": torch.ones(2)},
    },
    "plain training": lambda net: {"model": prefixed("module.student.", net)},
    "model_state_dict": lambda net: {"model_state_dict": net.state_dict(), "optimizer_state_dict": {"state": {}}},
    "net": lambda net: {"net": nn.DataParallel(net).state_dict(), "acc": 93.1, "epoch": 7},
    "any other name": lambda net: {"my_best_resnet": net.state_dict(), "loss": torch.tensor(0.3)},
    "lightning": lambda net: {
        "epoch": 3,
        "pytorch-lightning_version": "2.5",
        "state_dict": prefixed("model.", net) | {"criterion.weight": torch.ones(5)},
        "hyper_parameters": {"lr": 0.1},
    },
    "lightning of a compiled wrapper": lambda net: {"state_dict": prefixed("net._orig_mod.module.", net)},
    "two levels": lambda net: {"checkpoint": {"state_dict": net.state_dict(), "epoch": 3}},
    "average of torch's": lambda net: torch.optim.swa_utils.AveragedModel(net).state_dict(),
    "a number among the weights": lambda net: {**net.state_dict(), "epoch": 3},
    "the same twice": lambda net: {"model": net.state_dict(), "state_dict": net.state_dict()},
    "another's average": lambda net: {"state_dict": net.state_dict(), "state_dict_ema": moved("resnet14").state_dict()},
    "a training of ours": lambda net: {"model": net.state_dict(), "rng": {"cpu": torch.zeros(9)}, "epoch": 3},
    "wider floats": lambda net: {"model": {name: value.double() for name, value in net.state_dict().items()}},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_published_layout_gives_the_same_logits(tmp_path: Path, layout, zipped):
    network, loaded = moved(), build_model("resnet8", num_classes=5)
    torch.save(LAYOUTS[layout](network), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    load_weights(loaded, tmp_path / "w.pth")
    assert_same_logits(loaded, network)


AVERAGED = {
    "state_dict_ema": lambda net, ema: {"state_dict": net.state_dict(), "state_dict_ema": ema.state_dict()},
    "model_ema": lambda net, ema: {"model": net.state_dict(), "model_ema": prefixed("module.", ema)},
    "ema": lambda net, ema: {"ema": {"module": ema.state_dict(), "decay": 0.99}, "model": net.state_dict()},
    "state_dict.ema_model": lambda net, ema: {"state_dict": prefixed("model.", net) | prefixed("ema_model.", ema)},
    "callbacks.EMA": lambda net, ema: {
        "state_dict": prefixed("model.", net),
        "callbacks": {"EMA": {"weights": ema.state_dict()}},
    },
}


@pytest.mark.parametrize("key", AVERAGED)
@pytest.mark.parametrize("load", [load_weights, load_backbone])
def test_averaged_weights_beside_plain_ones_are_asked_about(tmp_path: Path, key, load):
    network, averaged, loaded = moved(), moved(), build_model("resnet8", num_classes=5)
    content = AVERAGED[key](network, averaged)
    torch.save(content, tmp_path / "w.pth")
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    plain = "model" if "model" in content else "state_dict"
    said = rf"w\.pth: holds several sets .* '{plain}[.\w]*'.*: checkpoint_key must name one"
    with pytest.raises(ValueError, match=said) as caught:
        load(loaded, tmp_path / "w.pth")
    assert f"'{key}" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    load(loaded, tmp_path / "w.pth", key)
    assert torch.equal(loaded.conv1.weight, averaged.conv1.weight)
    if key != "state_dict.ema_model":
        load(loaded, tmp_path / "w.pth", plain)
        assert torch.equal(loaded.conv1.weight, network.conv1.weight)


def test_a_key_that_leads_to_no_weights_is_told_with_those_that_do(tmp_path: Path):
    network = moved()
    torch.save({"model": network.state_dict(), "model_ema": network.state_dict(), "lr": 0.1}, tmp_path / "w.pth")
    for key in ("ema", "lr", "mode"):
        with pytest.raises(
            ValueError, match=rf"checkpoint_key '{key}' leads to no weights; known: 'model', 'model_ema'"
        ):
            load_weights(network, tmp_path / "w.pth", key)


def test_the_teacher_of_a_distiller_can_be_had_by_its_key(tmp_path: Path):
    student, teacher, loaded = moved(), moved(), build_model("resnet8", num_classes=5)
    torch.save(
        {"model": prefixed("module.student.", student) | prefixed("module.teacher.", teacher)}, tmp_path / "w.pth"
    )
    load_weights(loaded, tmp_path / "w.pth", "model.module.teacher")
    assert torch.equal(loaded.conv1.weight, teacher.conv1.weight)


# --- what lies beside the weights -----------------------------------------------------------------------------------

NUMBERS = [np.float64(72.25), np.float32(0.5), np.float16(-3), np.int64(-7), np.int32(7), np.uint8(255), np.bool_(True)]


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpys_are_read_as_pythons(tmp_path: Path, zipped):
    network, loaded = moved(), build_model("resnet8", num_classes=5)
    content = {"model": network.state_dict(), "numbers": NUMBERS, "arch": np.str_("résnet8")}
    content["big"] = np.array([1.5], dtype=">f8")[0]
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "w.pth")
    assert read["numbers"] == [number.item() for number in NUMBERS]
    assert [type(number) for number in read["numbers"]] == [float, float, float, int, int, int, bool]
    assert (read["arch"], read["big"]) == ("résnet8", 1.5)
    load_weights(loaded, tmp_path / "w.pth")
    assert_same_logits(loaded, network)
    with pytest.raises(pickle.UnpicklingError):  # what was allowed is not, for others
        torch.load(tmp_path / "w.pth", weights_only=True)


def test_numbers_of_numpy_1_are_read_too(tmp_path: Path):
    torch.save({"accuracy": np.float64(72.25)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "w.pth").read_bytes()
    assert content.count(b"numpy._core.multiarray") == 1
    (tmp_path / "w.pth").write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_checkpoint(tmp_path / "w.pth") == {"accuracy": 72.25}


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.zeros(3), "numpy._core.multiarray._reconstruct"),
        (np.datetime64("2026-01-01"), "a value of numpy's that is no number"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")])[0], "a value of numpy's that is no number"),
        (Path("data"), "pathlib"),
    ],
)
def test_anything_else_of_numpys_is_refused_by_name(tmp_path: Path, value, named):
    torch.save({"model": nn.Linear(2, 3).state_dict(), "value": value}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: is refused: ") as caught:
        read_checkpoint(tmp_path / "w.pth")
    assert named in str(caught.value)


# --- what is no checkpoint ------------------------------------------------------------------------------------------


def zipped(names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return stream.getvalue()


def tarred(compression):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w{compression}") as archive:
        archive.addfile(tarfile.TarInfo("w.pth"), io.BytesIO(b""))
    return stream.getvalue()


def torchscript():
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 3), torch.zeros(1, 2)), stream)
    return stream.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FOREIGN = {
    "git lfs": (lambda: POINTER, "a pointer of Git LFS: `git lfs pull`"),
    "git-annex": (lambda: b"/annex/objects/SHA256E-s3--4d7a.pth\n", "git annex get"),
    "gzip": (lambda: gzip.compress(b"weights"), "compressed by gzip: unpack it first, `gzip -dc"),
    "bzip2": (lambda: bz2.compress(b"weights"), "compressed by bzip2"),
    "xz": (lambda: lzma.compress(b"weights"), "compressed by xz"),
    "html": (lambda: b"\n<!DOCTYPE html><html>Quota exceeded</html>", "a web page, as a download that failed leaves"),
    "xml": (lambda: b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page"),
    "json": (lambda: b'{"error": "not found"}', 'it is a text that begins with \'{"error"'),
    "tar": (lambda: tarred(""), "a tar archive: unpack it"),
    "tar.gz": (lambda: tarred(":gz"), "compressed by gzip"),
    "zip": (
        lambda: zipped(["a/w.pth", "a/x.txt", "b", "c"]),
        "a zip archive of a/w.pth, a/x.txt, b and 1 more: unpack",
    ),
    "an empty zip": (lambda: zipped([]), "a zip archive of nothing"),
    "torchscript": (torchscript, "a TorchScript archive, which holds code: write its weights"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(500), "an HDF5 file"),
    "npy": (lambda: b"\x93NUMPY\x01\x00", "an array of numpy's"),
    "empty": (lambda: b"", "the file is empty"),
    "zeros": (lambda: bytes(10_000), "it begins with zeros alone"),
    "noise": (lambda: b"\xff\x01\x02" * 99, "of no known format"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_told_by_what_it_is(tmp_path: Path, kind, suffix):
    make, said = FOREIGN[kind]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=r"w\.\w+: is ") as caught:
        load_weights(nn.Linear(2, 3), path)
    assert "weights_only" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    if suffix == ".pth" or kind not in ("json", "empty", "zeros", "noise"):
        assert said in str(caught.value)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off_never_brings_torchs_advice(tmp_path: Path, cut, zipped):
    torch.save({"model": nn.Linear(9, 99).state_dict()}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: int(cut * len(content))])
    with pytest.raises(ValueError, match=r"w\.pth: is damaged or no checkpoint: ") as caught:
        read_checkpoint(tmp_path / "w.pth")
    assert "weights_only" not in str(caught.value)


def test_a_pickle_of_anything_is_one_line_without_torchs_advice(tmp_path: Path):
    for value in ({"a": object()}, [nn.Linear(2, 3)], {"f": print}, b"", "text", {1, 2}, 1 + 2j, 10**50):
        (tmp_path / "w.pth").write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match=r"w\.pth: ") as caught:
            read_checkpoint(tmp_path / "w.pth")
        assert "weights_only" not in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("written", ["torch", "safetensors"])
def test_what_a_file_holds_counts_not_its_name(tmp_path: Path, written):
    safetensors = pytest.importorskip("safetensors.torch")
    network, loaded = moved(), build_model("resnet8", num_classes=5)
    path = tmp_path / ("w.safetensors" if written == "torch" else "w.pth")
    if written == "torch":
        torch.save(network.state_dict(), path)
    else:
        safetensors.save_file(network.state_dict(), path)
    load_weights(loaded, path)
    assert_same_logits(loaded, network)


def test_a_folder_is_told(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory; name the file in it that holds the weights"):
        read_checkpoint(tmp_path)


def test_safetensors_give_the_same_logits(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch")
    path, network, loaded = tmp_path / "w.safetensors", moved(), build_model("resnet8", num_classes=5)
    safetensors.save_file(network.state_dict(), path)
    load_weights(loaded, path)
    assert_same_logits(loaded, network)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:200], whole[:-10], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"w\.safetensors: is damaged or no checkpoint"):
            load_weights(loaded, path)
    with pytest.raises(ValueError, match=r"none\.safetensors: cannot be read: No such file"):
        load_weights(loaded, tmp_path / "none.safetensors")


def test_safetensors_that_cannot_be_read_here_say_what_is_needed(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"w\.safetensors: reading it needs safetensors: pip install safetensors"):
        read_checkpoint(tmp_path / "w.safetensors")


def test_counters_may_be_missing_in_old_files(tmp_path: Path):
    network, loaded = moved(), build_model("resnet8", num_classes=5)
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save({"model": state}, tmp_path / "w.pth")
    load_weights(loaded, tmp_path / "w.pth")
    assert_same_logits(loaded, network)
    del state["bn1.running_mean"]
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"do not fit the network: bn1\.running_mean is missing$"):
        load_weights(loaded, tmp_path / "w.pth")


def test_a_network_whose_own_names_look_like_wrappers_is_not_unwrapped(tmp_path: Path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.student = nn.Linear(2, 3), nn.Linear(3, 4)

    own, loaded = Pair(), Pair()
    save_weights(own, tmp_path / "w.pt")
    load_weights(loaded, tmp_path / "w.pt")
    assert torch.equal(own.student.weight, loaded.student.weight)


# --- another number of classes --------------------------------------------------------------------------------------


def test_another_number_of_classes_is_said_in_words(tmp_path: Path):
    torch.save({"model": prefixed("module.", moved(num_classes=100))}, tmp_path / "w.pth")
    said = r"w\.pth: .*: the file has a head for 100 classes, the network one for 10 \(fc\.weight\)$"
    with pytest.raises(ValueError, match=said):
        load_weights(build_model("resnet8", num_classes=10), tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "MobileNetV2", "ShuffleV2"])
@pytest.mark.parametrize("num_classes", [3, 5])
def test_the_backbone_is_loaded_and_the_head_left_alone(tmp_path: Path, name, num_classes):
    network, loaded = moved(name, 5), build_model(name, num_classes=num_classes)
    head = find_head(loaded)[0]
    save_weights(network, tmp_path / "w.pt")
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    load_backbone(loaded, tmp_path / "w.pt")
    for key, value in loaded.state_dict().items():
        expected = before[key] if key.startswith(f"{head}.") else network.state_dict()[key]
        assert torch.equal(value, expected), key


def test_a_backbone_must_fit_and_needs_a_head(tmp_path: Path):
    state = moved().state_dict()
    torch.save(
        {"model": {name: value for name, value in state.items() if not name.startswith("fc.")}}, tmp_path / "b.pt"
    )
    load_backbone(build_model("resnet8", num_classes=3), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"do not fit the network: fc\.weight is missing; fc\.bias is missing"):
        load_weights(build_model("resnet8", num_classes=3), tmp_path / "b.pt")
    other = build_model("resnet14", num_classes=3)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"do not fit the network: layer1\.1\.conv1\.weight is missing"):
        load_backbone(other, tmp_path / "b.pt")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match="has no head"):
        load_backbone(nn.Sequential(nn.Conv2d(1, 1, 1)), tmp_path / "b.pt")


def test_a_network_without_a_head_is_compared_weight_by_weight(tmp_path: Path):
    save_weights(nn.Sequential(nn.Conv2d(1, 2, 1)), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"0\.weight is \(2, 1, 1, 1\) in the file and \(3, 1, 1, 1\) in the network"):
        load_weights(nn.Sequential(nn.Conv2d(1, 3, 1)), tmp_path / "w.pt")
