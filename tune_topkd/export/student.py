"""The distilled student as a file of another project: its weights, or a graph that takes images as they are.

Only writing one needs torch, and what the student's data and network need.
"""

import importlib
import json
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from functools import cached_property
from typing import IO
from typing import TYPE_CHECKING
from typing import Any

from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.errors import TuneTopKDError

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn

    from tune_topkd.data import Dataset

STUDENT_FILE = "student_best"
"""What mdistiller and its forks call the file that `checkpoint` writes."""


class StudentError(TuneTopKDError):
    """The student of a sweep cannot be written in a format; the message says why, and what to do."""


@dataclass(frozen=True)
class Student:
    """A trained student, with what it takes to show it images."""

    model: ModelConfig
    data: DataConfig
    """What it was trained on, with the place of its files on this machine."""
    weights: Mapping[str, "Tensor"] = field(repr=False)
    """Its state dict, on the CPU."""
    about: Mapping[str, str] = field(default_factory=dict)
    """Where it comes from, to stand in the file."""
    fingerprint: str | None = None
    """Of the network's code as it was trained (`tune_topkd.models.network_fingerprint`); None compares nothing."""

    @cached_property
    def dataset(self) -> "Dataset":
        """What it was trained on.

        Raises:
            DataError: it cannot be had.
        """
        from tune_topkd.data import load_dataset

        return load_dataset(self.data)

    @property
    def metadata(self) -> dict[str, str]:
        """What a file says of it: texts; lists and mappings are JSON. What it has not is left out.

        Raises:
            DataError: the dataset, which has the number of classes and the constants, cannot be had.
        """
        content = {
            "network": self.model.name,
            "network_kwargs": json.dumps(self.model.kwargs),
            "network_image_size": self.model.image_size,
            "num_classes": self.dataset.num_classes,
            "dataset": self.data.name,
            "image_size": self.data.image_size,
            "mean": json.dumps(self.dataset.mean),
            "std": json.dumps(self.dataset.std),
        }
        return {key: str(value) for key, value in content.items() if value is not None} | dict(self.about)

    def network(self) -> "nn.Module":
        """The network with its weights, in eval mode.

        Raises:
            DataError: the dataset cannot be had.
            StudentError: the network is not the one that was trained.
            ValueError: there is no such network any more.
        """
        import torch

        from tune_topkd.models import build_configured
        from tune_topkd.models import network_fingerprint

        classes, shape = self.dataset.num_classes, self.dataset.train.batch_shape
        if self.fingerprint not in (None, network_fingerprint(self.model, num_classes=classes, image_shape=shape)):
            raise StudentError(
                f"student.name = {self.model.name!r}: its code computes something else than when the student was "
                "trained; bring the code back as it was, or write the weights alone, as checkpoint"
            )
        with torch.random.fork_rng(devices=[]):
            network = build_configured(self.model, num_classes=classes)
        try:
            network.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            reason = str(error).split("\n")[-1].strip()
            raise StudentError(
                f"student.name = {self.model.name!r}: the weights do not fit the network as it is now: {reason}"
            ) from error
        return network.eval().requires_grad_(False)


# --- the formats ----------------------------------------------------------------------------------------------------


def write_checkpoint(student: Student, stream: IO[bytes]) -> None:
    """Write `{"model": state_dict}` for `torch.load`, as mdistiller, RepDistiller and their forks keep a student.

    The keys are the network's own; those of the CIFAR networks are the ones of these projects.
    """
    import torch

    from tune_topkd.models import WEIGHTS_KEY

    torch.save({WEIGHTS_KEY: _compact(student.weights)}, stream)


def write_safetensors(student: Student, stream: IO[bytes]) -> None:
    """Write the state dict as safetensors, with `Student.metadata`.

    Raises:
        DataError: the dataset cannot be had.
        StudentError: safetensors is not installed, or the state dict holds what is no tensor.
    """
    import torch

    save = _needed("safetensors.torch", "safetensors", "sweep").save
    for name, value in student.weights.items():
        if not isinstance(value, torch.Tensor):
            raise StudentError(
                f"format safetensors: {name} of network {student.model.name!r} is no tensor but a "
                f"{type(value).__name__}; write it as checkpoint"
            )
    stream.write(save(_compact(student.weights), {"format": "pt"} | student.metadata))


def write_torch_export(student: Student, stream: IO[bytes]) -> None:
    """Write the graph for `torch.export.load`, with the metadata as JSON in the extra file `metadata.json`.

    Its `module()` takes images `(B, C, H, W)` uint8, of any B, and gives logits `(B, classes)` float32.

    Raises:
        DataError: the dataset cannot be had.
        StudentError: the network is not the one that was trained, or torch.export cannot take it.
    """
    from tune_topkd.export.graph import save_program

    save_program(student, stream)


def write_onnx(student: Student, stream: IO[bytes]) -> None:
    """Write the graph as ONNX: input `images` `(batch, C, H, W)` uint8, output `logits` `(batch, classes)` float32.

    Raises:
        DataError: the dataset cannot be had.
        StudentError: what it needs is not installed, the network is not the one that was trained, or it cannot be
            converted to a graph of the same logits.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _needed(name, "onnx", "onnx")
    from tune_topkd.export.graph import save_onnx

    save_onnx(student, stream)


def _compact(weights: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The weights each in a storage of its own, one row after the other, whatever layout they were trained in."""
    import torch

    return {
        name: value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value
        for name, value in weights.items()
    }


def _needed(module: str, format_: str, extra: str) -> Any:
    """A module that only a format needs.

    Raises:
        StudentError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StudentError(f"format {format_}: needs {module}: pip install 'tune_topkd[{extra}]' ({error})") from error


STUDENT_WRITERS: Mapping[str, Callable[[Student, IO[bytes]], None]] = {
    "checkpoint": write_checkpoint,
    "safetensors": write_safetensors,
    "torch_export": write_torch_export,
    "onnx": write_onnx,
}
"""The formats of `export` that hold the student, by name."""
