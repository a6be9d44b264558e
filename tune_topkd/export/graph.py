"""The student as a graph that takes images as they are: its network with the preprocessing inside."""

import json
import math
from collections.abc import Callable
from typing import IO

import torch
from torch import Tensor
from torch import nn
from torch.export import Dim
from torch.export import ExportedProgram
from torch.nn import functional

from tune_topkd.data import plain_images
from tune_topkd.export.student import Student
from tune_topkd.export.student import StudentError

METADATA_FILE = "metadata.json"
"""The extra file of a torch.export archive that holds the metadata."""

TOLERANCE = 1e-4
"""How far the logits of a graph may be from the network's, as a share of the largest one where that is above 1."""

_SHOWN = 3
"""Images that a graph is compared on, all at once and the first alone: it was made of another number of them."""

_ANY_BATCH = {"images": {0: Dim("batch")}}

_TIE = 2.0**-10
"""Resized pixels so far below a half are rounded up. Many lie on a half but for the arithmetic's error, which is smaller
and differs between libraries."""


class Preprocessed(nn.Module):
    """A network behind the preprocessing that it was evaluated with: images `(B, C, H, W)` uint8 to its logits.

    Args:
        network: takes normalised images `(B, C, H, W)` float32.
        mean: `(C,)`, with pixels from 0 to 1.
        std: likewise.
        image_size: side that images are resized to, as whole pixels; None leaves them as they are.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor, image_size: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.image_size = image_size
        self.register_buffer("shift", 255 * mean.view(-1, 1, 1))
        self.register_buffer("scale", 255 * std.view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, classes)` float32."""
        pixels = images.to(torch.float32)
        side = self.image_size
        if side is not None and images.shape[-2:] != (side, side):
            pixels = functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
            pixels = (pixels + (0.5 + _TIE)).floor().clamp(0, 255)
        logits: Tensor = self.network((pixels - self.shift) / self.scale)
        return logits


def save_program(student: Student, stream: IO[bytes]) -> None:
    """Write the exported program of a student, as `student.write_torch_export` says."""
    model, shown = _model(student), shown_images(student)
    program = _program(student, model, shown, "torch_export")
    _check(student, model, shown, program.module(), "torch_export")
    torch.export.save(program, stream, extra_files={METADATA_FILE: json.dumps(student.metadata, indent=2)})


def save_onnx(student: Student, stream: IO[bytes]) -> None:
    """Write the ONNX model of a student, as `student.write_onnx` says."""
    import onnxruntime

    model, shown = _model(student), shown_images(student)
    program = _program(student, model, shown, "onnx")
    try:
        made = torch.onnx.export(
            program, input_names=["images"], output_names=["logits"], dynamic_shapes=_ANY_BATCH, verbose=False
        )
        assert made is not None, "it gives the program where it is to write no file"
        made.model.metadata_props.update(student.metadata)
        content = made.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # what an operator lacks can raise anything
        raise _refused("onnx", student, _reason(error)) from error

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    _check(student, model, shown, run, "onnx")
    stream.write(content)


# --- making a graph, and comparing it -------------------------------------------------------------------------------


def _model(student: Student) -> nn.Module:
    mean, std = map(torch.tensor, (student.dataset.mean, student.dataset.std))
    return Preprocessed(student.network(), mean, std, student.data.image_size).eval()


def shown_images(student: Student) -> Tensor:
    """A few validation images as they are stored, `(B, C, H, W)` uint8."""
    images = student.dataset.val
    return plain_images(images, torch.arange(min(_SHOWN, len(images))))


def _program(student: Student, model: nn.Module, shown: Tensor, format_: str) -> ExportedProgram:
    traced = shown[:1].repeat(2, 1, 1, 1)  # of a batch of one, torch.export takes the number for a constant
    try:
        return torch.export.export(model, (traced,), dynamic_shapes=_ANY_BATCH)
    except Exception as error:  # what a network does that cannot be traced can raise anything
        raise _refused(format_, student, _reason(error)) from error


def _check(student: Student, model: nn.Module, shown: Tensor, graph: Callable[[Tensor], Tensor], format_: str) -> None:
    """Compare the logits of a graph with the network's.

    Raises:
        StudentError: they differ, or the graph takes another number of images only.
    """
    for images in (shown, shown[:1]):
        expected = model(images)
        try:
            found = graph(images)
        except Exception as error:  # a runtime can raise anything
            raise _refused(format_, student, f"of {len(images)} images it makes {_reason(error)}") from error
        largest = float(expected.abs().max())
        apart = float((found - expected).abs().max()) if found.shape == expected.shape else math.inf
        if not apart <= TOLERANCE * max(1.0, largest):
            raise _refused(
                format_, student, f"its logits are {apart:.2g} away from the network's, of up to {largest:.2g}"
            )


def _reason(error: Exception) -> str:
    """An error in its first line: what comes after is for who writes the library."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


def _refused(format_: str, student: Student, reason: str) -> StudentError:
    return StudentError(
        f"format {format_}: no graph can be made of network {student.model.name!r}: {reason}; "
        "checkpoint and safetensors take the weights of any network"
    )
