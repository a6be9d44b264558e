"""Checks of arguments: rule, then what came, as a `ValueError`."""

import math
from numbers import Integral
from numbers import Real

import torch
from torch import Tensor


def check_numbers(minimum: float, **values: object) -> None:
    """Check that every value is a finite number, at least the minimum."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, but got {value!r}")
        if value < minimum:
            raise ValueError(f"`{name} >= {minimum}` must hold, but got {name}={value!r}")


def check_temperature(temperature: object) -> None:
    """Check that the temperature is a finite number above 0."""
    check_numbers(-math.inf, temperature=temperature)
    if isinstance(temperature, Real) and temperature <= 0:
        raise ValueError(f"`temperature > 0` must hold, but got temperature={temperature!r}")


def check_flag(**values: object) -> None:
    """Check that every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` must be True or False, but got {value!r}")


def check_group(**values: object) -> None:
    """Check that every value is an integer, at least 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"`{name}` must be an integer, but got {value!r}")
        if value < 0:
            raise ValueError(f"`{name} >= 0` must hold, but got {name}={value!r}")


def check_k(k: object) -> None:
    """Check that K is an integer, at least 1."""
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise ValueError(f"`k` must be an integer, but got {k!r}")
    if k < 1:
        raise ValueError(f"`k >= 1` must hold, but got k={k!r}")


def check_scaling(k: object, scale_top: float, scale_last: float, scale_gt: float, shift: float) -> None:
    """Check that the parameters of `top_k_scaling` are in their ranges."""
    check_k(k)
    check_numbers(1, scale_last=scale_last)
    check_numbers(0, scale_top=scale_top, scale_gt=scale_gt, shift=shift)
    _check_order(scale_top=scale_top, scale_last=scale_last)
    _check_order(scale_gt=scale_gt, scale_top=scale_top)


def _check_order(**values: float) -> None:
    (high, upper), (low, lower) = values.items()
    if upper < lower:
        raise ValueError(f"`{high} >= {low}` must hold, but got {high}={upper!r}, {low}={lower!r}")


def check_logits(name: str, logits: object) -> None:
    """Check that logits are ``(B, C)`` floats."""
    if not isinstance(logits, Tensor):
        hint = "; of what a network returns, hand over the logits alone" if isinstance(logits, tuple | dict) else ""
        raise ValueError(f"`{name}` must be a torch.Tensor, but got {_kind(logits)}{hint}")
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"`{name}` must have the shape (B, C), neither 0, but got {tuple(logits.shape)}")
    if not logits.dtype.is_floating_point:
        raise ValueError(f"`{name}` must be floating point, but got {logits.dtype}")
    if logits.dtype.itemsize < 2:  # torch promotes no float of 8 bits
        raise ValueError(f"`{name}` must have 16 bits or more, but got {logits.dtype}; {name}.float() has 32")
    if logits.layout != torch.strided:
        raise ValueError(f"`{name}` must be dense, but got {logits.layout}")


def check_pair(student: Tensor, teacher: Tensor, teacher_name: str = "teacher_logits") -> None:
    """Check that the logits of student and teacher are ``(B, C)`` floats of one shape on one device."""
    check_logits("student_logits", student)
    check_logits(teacher_name, teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"`student_logits` and `{teacher_name}` must have the same shape, "
            f"but got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    _check_device(teacher_name, teacher, student)


def check_labels(labels: object, logits: Tensor) -> None:
    """Check that labels are ``(B,)`` integers and, where that costs no wait, classes of the logits."""
    batch, classes = logits.shape
    if not isinstance(labels, Tensor):
        hint = "; torch.as_tensor(labels) makes one" if hasattr(labels, "__len__") else ""
        raise ValueError(f"`labels` must be a torch.Tensor, but got {_kind(labels)}{hint}")
    hint = "; the classes of one-hot rows are labels.argmax(1)" if labels.shape == logits.shape else ""
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must be integers, but got {labels.dtype}{hint}")
    if labels.shape != (batch,):
        raise ValueError(f"`labels` must have the shape ({batch},), but got {tuple(labels.shape)}{hint}")
    _check_device("labels", labels, logits)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU this would wait for it
        for extreme in map(int, torch.aminmax(labels.long())):  # not every unsigned dtype has an aminmax
            if not 0 <= extreme < classes:
                raise ValueError(f"`labels` must be from 0 to {classes - 1}, but got {extreme}")


def _check_device(name: str, tensor: Tensor, student: Tensor) -> None:
    if tensor.device != student.device:
        raise ValueError(f"`{name}` must be where the other logits are, on {student.device}, but is on {tensor.device}")


def _kind(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def check_k_fits(k: int, logits: Tensor) -> None:
    """Check that K is at most C."""
    if k > logits.shape[1]:
        raise ValueError(f"`k <= C` must hold, but got k={k} and C={logits.shape[1]}")
