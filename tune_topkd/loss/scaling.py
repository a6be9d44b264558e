"""How much the scaling module raises each rank: the rules for its weights w_i and its shift, by name."""

import pkgutil
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ScalingRule = Callable[..., tuple[Tensor, Tensor]]
"""Called as ``rule(teacher, order, scale_top=…, scale_last=…, shift=…)``; see `linear_scaling`."""


def linear_scaling(
    teacher: Tensor, order: Tensor, *, scale_top: float, scale_last: float, shift: float
) -> tuple[Tensor, Tensor]:
    """Weights that fall linearly with the rank, and a shift in proportion to the gap below the Top-K.

    ``w_i`` goes from ``scale_top`` at rank 1 to ``scale_last`` at rank K; with K = 1 it is ``scale_top`` (**ours**: the
    **paper**, arXiv 2508.04539, says only that it falls with the rank). ``delta`` is ``shift`` times the gap between the
    mean of the Top-K and that of the other logits (**paper**: in proportion to it); with K = C it is 0 (**ours**).

    Args:
        teacher: logits, ``(B, C)``, float32 or wider, detached.
        order: the classes of the Top-K, rank 1 first, ``(B, K)`` int64.
        scale_top: weight of rank 1.
        scale_last: weight of rank K, at least 1 and at most ``scale_top``.
        shift: coefficient of ``delta``, at least 0.

    Returns:
        The weights, ``(K,)``, or ``(B, K)`` where they differ by sample, by rank; and ``delta``, ``(B, 1)``: what is
        added to each amplified logit.
    """
    k = order.shape[1]
    mean = teacher.gather(1, order).mean(1, keepdim=True)
    left = teacher.shape[1] - k
    others = teacher.scatter(1, order, 0.0).sum(1, keepdim=True) / left if left else mean  # a mean of none would be NaN
    weights = torch.linspace(scale_top, scale_last, k, dtype=teacher.dtype, device=teacher.device)
    return weights, shift * (mean - others)


SCALING_RULES: Mapping[str, ScalingRule] = {"linear": linear_scaling}
"""The rules by name."""


def find_scaling_rule(rule: object) -> ScalingRule:
    """The rule of a name: one of `SCALING_RULES`, or ``package.module:rule``, a callable of the user's; or itself.

    Raises:
        ValueError: there is none of this name, or it is nothing that can be called.
    """
    if not isinstance(rule, str):
        if not callable(rule):
            raise ValueError(f"`scaling_rule` must be a name or a callable, but got {rule!r}")
        return rule
    if rule in SCALING_RULES:
        return SCALING_RULES[rule]
    known = f"known: {', '.join(SCALING_RULES)}; or a callable of your own: package.module:rule"
    if ":" not in rule:
        raise ValueError(f"unknown `scaling_rule` {rule!r}; {known}")
    try:
        found: Any = pkgutil.resolve_name(rule)
    except Exception as error:  # importing runs the user's code, which can raise anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"`scaling_rule` {rule!r} cannot be imported: {text}; {known}") from error
    if not callable(found):
        raise ValueError(f"`scaling_rule` {rule!r} must be callable, but is a {type(found).__name__}")
    made: ScalingRule = found
    return made


def check_scaling_rule(rule: ScalingRule, *, k: int, scale_top: float, scale_last: float, shift: float) -> None:
    """Call a rule once, on three samples of K + 2 classes, and check what it gives.

    Raises:
        ValueError: it raises, or gives no finite weights above 0 of shape ``(K,)`` or ``(B, K)`` and a finite ``delta`` of
            shape ``(B, 1)``, both in the dtype of the logits.
    """
    teacher = torch.linspace(4.0, -2.0, 3 * (k + 2)).reshape(3, k + 2)
    order = torch.arange(k).expand(3, k)
    label = f"`scaling_rule` {getattr(rule, '__qualname__', type(rule).__name__)}"
    try:
        found = rule(teacher, order, scale_top=scale_top, scale_last=scale_last, shift=shift)
    except Exception as error:  # others' code can raise anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{label} raised {text}") from error
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(f"{label} must return the weights and delta, but returned a {type(found).__name__}")
    for name, value, shapes in (("weights", found[0], [(k,), (3, k)]), ("delta", found[1], [(3, 1)])):
        if not isinstance(value, Tensor):
            raise ValueError(f"{label}: its {name} must be a tensor, but are a {type(value).__name__}")
        if tuple(value.shape) not in shapes or value.dtype != teacher.dtype:
            wanted = " or ".join(map(str, shapes))
            got = f"{tuple(value.shape)} of {value.dtype}"
            raise ValueError(f"{label}: its {name} must be of shape {wanted} and {teacher.dtype}, but got {got}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{label}: its {name} must be finite, but got {value.flatten().tolist()}")
    if not bool((found[0] > 0).all()):
        raise ValueError(f"{label}: its weights must be above 0, but the lowest is {found[0].min():g}")
