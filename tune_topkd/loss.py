"""TopKD (arXiv 2508.04539) and the distillation losses it is compared with; needs nothing but torch.

    from tune_topkd.loss import TopKDLoss

    criterion = TopKDLoss(k=5, temperature=0.1)
    loss = criterion(student_logits, teacher_logits, labels)      # one scalar, or, with the parts:
    terms = criterion.terms(student_logits, teacher_logits, labels)
    loss = criterion.total(terms)                                 # the same scalar, nothing computed twice

Everywhere: logits are ``(B, C)`` floats and labels ``(B,)`` integers. Arithmetic runs in float32 or wider
whatever the autocast state, ``float64`` in gives ``float64`` out, and the teacher never receives a gradient.
Ties between classes go to the lower class index on every device. Logits that are not finite give a loss that
is not finite. Matrix products follow ``torch.set_float32_matmul_precision``, which is "highest" by default,
and their backward the autocast state around ``backward()``, which belongs outside of autocast, as torch says.

Nothing here waits for the GPU. Labels outside ``0 .. C-1`` are therefore reported, as a ``ValueError``, only
where they lie on the CPU and nothing is being compiled; elsewhere they are the caller's responsibility, as
they are with ``torch.nn.CrossEntropyLoss``.

Docstrings mark a formula as **paper** where it is reported of the named paper and as **ours** where the
public text leaves a gap that this project fills.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from collections.abc import Mapping
from numbers import Integral
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

__all__ = [
    "METHODS",
    "CELoss",
    "DKDLoss",
    "DistillationLoss",
    "KDLoss",
    "LogitStandardKDLoss",
    "TopKDLoss",
    "TopKDPlugin",
    "build_loss",
    "contrastive_loss",
    "loss_parameters",
    "top_k_decoupled_loss",
    "top_k_scaling",
]


# --- the three parts of TopKD, as functions -----------------------------------------------------------------


def top_k_scaling(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    k: int,
    scale_top: float,
    scale_last: float,
    scale_gt: float,
    shift: float,
) -> Tensor:
    """Raise the teacher's K largest logits and the ground truth's: the Top-K Scaling Module.

    For class i in the Top-K of the sample, or i = y, ``z'_i = amplify(z_i, w_i) + delta``; other logits stay
    as they are (**paper**, which prints ``z_i * w_i + delta``). ``amplify(z, w)`` is ``z * w`` for ``z >= 0``
    and ``z / w`` for ``z < 0``, so that a weight above 1 always raises the logit (**ours**).

    - The weight falls with the rank (**paper**), linearly from ``scale_top`` at rank 1 to ``scale_last`` at
      rank K; with K = 1 it is ``scale_top`` (**ours**).
    - Where the teacher's first choice is not y, the ground truth is amplified more strongly (**paper**): by
      ``scale_gt``, be y in the Top-K or not (**ours**).
    - ``delta`` grows with the gap between the mean Top-K and the mean other logit (**paper**): it is
      ``shift`` times that gap, of the unscaled logits, y counting as Top-K only where it ranks there; K = C
      gives 0 (**ours**).

    Args:
        teacher_logits: ``(B, C)``, any float dtype.
        labels: ``(B,)``, any integer dtype.
        k: K, from 1 to C.
        scale_top: weight of rank 1, at least ``scale_last``.
        scale_last: weight of rank K, at least 1.
        scale_gt: weight of a ground truth that the teacher missed, at least ``scale_top``.
        shift: coefficient of ``delta``, at least 0.

    Returns:
        The scaled logits, ``(B, C)``, float32 or wider, detached.

    Raises:
        ValueError: a parameter out of its range, or logits or labels of the wrong shape or dtype.
    """
    _check_scaling(k, scale_top, scale_last, scale_gt, shift)
    _check_logits("teacher_logits", teacher_logits)
    _check_labels(labels, teacher_logits)
    _check_k_fits(k, teacher_logits)
    (teacher,) = _raised(teacher_logits.detach())
    return _scaled(teacher, labels.long(), k, scale_top, scale_last, scale_gt, shift)


def top_k_decoupled_loss(
    student_logits: Tensor, scaled_teacher_logits: Tensor, *, k: int, alpha: float, beta: float
) -> Tensor:
    """Align student and scaled teacher in three groups of classes apart: the Top-K Decoupled Loss.

    The groups of a sample, by its scaled teacher logits (**paper**): positive Top-K, the up to K largest that
    are > 0; negative Top-K, the up to K smallest that are < 0; the rest. The loss is the mean over the batch
    of ``alpha * (1 - cos_pos) + beta * (1 - cos_neg) + (1 - cos_rest)`` with the cosine of student and scaled
    teacher restricted to the group. The **paper** prints ``1 - mean(alpha * cos_pos + beta * cos_neg +
    cos_rest)``: the same gradient, another constant.

    **Ours**: an empty group contributes 0. A vector that is all zero inside a group has cosine 0 with
    anything and receives gradient 0 from that group. So does one too short for its squares to fit the dtype
    (length below 3e-16 in float32, 1e-146 in float64). The gradient is of the order 1 / length of the student
    in the group: where that is beyond 65504 a float16 student receives infinity, which a GradScaler skips.

    Args:
        student_logits: ``(B, C)``, any float dtype.
        scaled_teacher_logits: ``(B, C)``, what `top_k_scaling` returns.
        k: K, from 1 to C.
        alpha: weight of the positive group, at least 0.
        beta: weight of the negative group, at least 0.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: a parameter out of its range, or logits of the wrong shape or dtype.
    """
    _check_k(k)
    _check_numbers(0, alpha=alpha, beta=beta)
    _check_pair(student_logits, scaled_teacher_logits, "scaled_teacher_logits")
    _check_k_fits(k, student_logits)
    student, scaled = _raised(student_logits, scaled_teacher_logits.detach())
    with _autocast_off(student):
        return _decoupled(student, scaled, k, alpha, beta)


def contrastive_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    normalize: bool,
) -> Tensor:
    """Tell a sample's own teacher from the other samples' and the reverse: the contrastive loss.

    ``(CE(S / temperature, 0..B-1) + CE(S^T / temperature, 0..B-1)) / 2`` with ``S = student @ teacher^T`` of
    the unscaled logits (**paper**). It depends on the batch size; a batch of one gives 0.

    Args:
        student_logits: ``(B, C)``, any float dtype.
        teacher_logits: ``(B, C)``, the unscaled ones.
        temperature: above 0.
        normalize: True takes S of L2-normalised rows, so that the temperature means the same for every
            architecture; a row of zeros stays zeros and receives gradient 0 (**ours**). False is the formula
            as printed (**paper**).

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: a parameter out of its range, or logits of the wrong shape or dtype.
    """
    _check_temperature(temperature)
    _check_flag(normalize=normalize)
    _check_pair(student_logits, teacher_logits)
    student, teacher = _raised(student_logits, teacher_logits.detach())
    with _autocast_off(student):
        return _contrastive(student, teacher, temperature, normalize)


# --- losses as modules --------------------------------------------------------------------------------------


class DistillationLoss(nn.Module):
    """What all losses here share: a weighted sum of named terms. Subclasses say which.

    The constructor's parameters are attributes of the same names and are read at every call, so that a
    trainer may move a weight during training. Nothing is learnt and nothing is kept between calls.
    """

    _weight_of: ClassVar[Mapping[str, str]]  # name of a term -> name of the attribute that weighs it

    def terms(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the unweighted terms by name, each a scalar in float32 or wider.

        Args:
            student_logits: ``(B, C)``, any float dtype.
            teacher_logits: ``(B, C)``, any float dtype; never receives a gradient.
            labels: ``(B,)``, any integer dtype.

        Raises:
            ValueError: logits or labels of the wrong shape or dtype, or unfit for the loss's parameters.
        """
        _check_pair(student_logits, teacher_logits)
        _check_labels(labels, student_logits)
        student, teacher = _raised(student_logits, teacher_logits.detach())
        with _autocast_off(student):
            return self._terms(student, teacher, labels.long())

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of what `terms` returned: the scalar to minimise.

        Raises:
            ValueError: the names of the terms are not those that this loss has.
        """
        if terms.keys() != self._weight_of.keys():
            known, got = ", ".join(self._weight_of), ", ".join(terms)
            raise ValueError(f"`terms` must have exactly the keys {known}, but got {got or 'none'}")
        weights: dict[str, float] = {name: getattr(self, weight) for name, weight in self._weight_of.items()}
        weighted: list[Tensor] = [weights[name] * terms[name] for name in weights]
        return functools.reduce(torch.add, weighted)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar: `total` of `terms`."""
        return self.total(self.terms(student_logits, teacher_logits, labels))

    def extra_repr(self) -> str:
        """Show the parameters."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in _defaults(type(self)))

    def _terms(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the terms of checked input: one float dtype of 32 bits or more, labels int64."""
        raise NotImplementedError


class _TopK(DistillationLoss):
    """The scaling module and the decoupled loss with their parameters, which loss and plug-in share."""

    def __init__(
        self,
        *,
        k: int,
        scale_top: float,
        scale_last: float,
        scale_gt: float,
        shift: float,
        alpha: float,
        beta: float,
    ) -> None:
        """Check and keep the parameters."""
        super().__init__()
        _check_scaling(k, scale_top, scale_last, scale_gt, shift)
        _check_numbers(0, alpha=alpha, beta=beta)
        self.k = k
        self.scale_top = scale_top
        self.scale_last = scale_last
        self.scale_gt = scale_gt
        self.shift = shift
        self.alpha = alpha
        self.beta = beta

    def _scaled_teacher(self, teacher: Tensor, labels: Tensor) -> Tensor:
        _check_k_fits(self.k, teacher)
        return _scaled(teacher, labels, self.k, self.scale_top, self.scale_last, self.scale_gt, self.shift)

    def _tdl(self, student: Tensor, scaled: Tensor) -> Tensor:
        return _decoupled(student, scaled, self.k, self.alpha, self.beta)


class TopKDLoss(_TopK):
    """The objective of TopKD: ``ce_weight * CE + tdl_weight * L_TDL + contrastive_weight * L_con``.

    **Paper** (arXiv 2508.04539): ``L_con + L_TDL``, the decoupled loss on the scaled teacher logits, the
    contrastive loss on the unscaled ones. **Ours**: the cross-entropy with the labels and the three weights,
    all 1 by default. Under SGD the sum of the weights multiplies the step size. The contrastive term depends
    on the batch size.

    Terms: ``ce``, ``tdl``, ``contrastive``.

    Args:
        k: K, how many classes are Top-K; from 1 to C. With ``2 * k >= C`` the rest group can be empty.
        scale_top: weight of the teacher's first choice, at least ``scale_last``.
        scale_last: weight at rank K, at least 1.
        scale_gt: weight of a ground truth that the teacher missed, at least ``scale_top``.
        shift: coefficient of the shift, at least 0; see `top_k_scaling` for these five.
        alpha: weight of the positive group, at least 0.
        beta: weight of the negative group, at least 0; see `top_k_decoupled_loss`.
        temperature: of the contrastive loss, above 0.
        normalize: whether the contrastive loss normalises the rows; see `contrastive_loss`.
        ce_weight: at least 0, as are the other two.
        tdl_weight: weight of the decoupled loss.
        contrastive_weight: weight of the contrastive loss.

    Raises:
        ValueError: a parameter out of its range; at call time also k > C.
    """

    _weight_of: ClassVar[Mapping[str, str]] = {
        "ce": "ce_weight",
        "tdl": "tdl_weight",
        "contrastive": "contrastive_weight",
    }

    def __init__(
        self,
        *,
        k: int = 5,
        scale_top: float = 2.0,
        scale_last: float = 1.0,
        scale_gt: float = 3.0,
        shift: float = 0.1,
        alpha: float = 1.0,
        beta: float = 1.0,
        temperature: float = 0.1,
        normalize: bool = True,
        ce_weight: float = 1.0,
        tdl_weight: float = 1.0,
        contrastive_weight: float = 1.0,
    ) -> None:
        """Check and keep the parameters."""
        super().__init__(
            k=k,
            scale_top=scale_top,
            scale_last=scale_last,
            scale_gt=scale_gt,
            shift=shift,
            alpha=alpha,
            beta=beta,
        )
        _check_temperature(temperature)
        _check_flag(normalize=normalize)
        _check_numbers(0, ce_weight=ce_weight, tdl_weight=tdl_weight, contrastive_weight=contrastive_weight)
        self.temperature = temperature
        self.normalize = normalize
        self.ce_weight = ce_weight
        self.tdl_weight = tdl_weight
        self.contrastive_weight = contrastive_weight

    def _terms(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {
            "ce": functional.cross_entropy(student, labels),
            "tdl": self._tdl(student, self._scaled_teacher(teacher, labels)),
            "contrastive": _contrastive(student, teacher, self.temperature, self.normalize),
        }


class TopKDPlugin(_TopK):
    """TopKD added to another method: ``ce_weight * CE + base_weight * L_base + tdl_weight * L_TDL``.

    **Paper** (arXiv 2508.04539): an existing method gets the scaled teacher logits in place of the raw ones,
    and the decoupled loss is added. **Ours**: the weights, and that the cross-entropy is a term of its own.

    The cross-entropy is counted here: construct a base that has one of its own without it, as in
    ``TopKDPlugin(KDLoss(ce_weight=0))``; `build_loss` does so.

    Terms: ``ce``, ``base``, ``tdl``.

    Args:
        base: called as ``base(student_logits, scaled_teacher_logits, labels)`` with logits in float32 or
            wider, autocast off, the teacher's detached and the labels int64; returns a scalar. A module
            becomes a child.
        k: as the other parameters down to ``beta``, see `TopKDLoss`.
        scale_top: see `TopKDLoss`.
        scale_last: see `TopKDLoss`.
        scale_gt: see `TopKDLoss`.
        shift: see `TopKDLoss`.
        alpha: see `TopKDLoss`.
        beta: see `TopKDLoss`.
        ce_weight: at least 0, as are the other two.
        base_weight: weight of the base.
        tdl_weight: weight of the decoupled loss.

    Raises:
        ValueError: a parameter out of its range; at call time also k > C, or a base that returns no scalar.
    """

    _weight_of: ClassVar[Mapping[str, str]] = {"ce": "ce_weight", "base": "base_weight", "tdl": "tdl_weight"}

    def __init__(
        self,
        base: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        k: int = 5,
        scale_top: float = 2.0,
        scale_last: float = 1.0,
        scale_gt: float = 3.0,
        shift: float = 0.1,
        alpha: float = 1.0,
        beta: float = 1.0,
        ce_weight: float = 1.0,
        base_weight: float = 1.0,
        tdl_weight: float = 1.0,
    ) -> None:
        """Check and keep the parameters."""
        super().__init__(
            k=k,
            scale_top=scale_top,
            scale_last=scale_last,
            scale_gt=scale_gt,
            shift=shift,
            alpha=alpha,
            beta=beta,
        )
        if not callable(base):
            raise ValueError(f"`base` must be callable with (student, teacher, labels), but got {base!r}")
        _check_numbers(0, ce_weight=ce_weight, base_weight=base_weight, tdl_weight=tdl_weight)
        self.base = base
        self.ce_weight = ce_weight
        self.base_weight = base_weight
        self.tdl_weight = tdl_weight

    def _terms(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scaled = self._scaled_teacher(teacher, labels)
        base = self.base(student, scaled, labels)
        if base.ndim != 0:
            raise ValueError(f"`base` must return a scalar, but got shape {tuple(base.shape)}")
        return {
            "ce": functional.cross_entropy(student, labels),
            "base": base,
            "tdl": self._tdl(student, scaled),
        }


class CELoss(DistillationLoss):
    """Cross-entropy with the labels alone: the baseline without a teacher, whose logits may be None.

    Term: ``ce``.

    Args:
        ce_weight: at least 0.

    Raises:
        ValueError: a weight out of its range.
    """

    _weight_of: ClassVar[Mapping[str, str]] = {"ce": "ce_weight"}

    def __init__(self, *, ce_weight: float = 1.0) -> None:
        """Check and keep the parameters."""
        super().__init__()
        _check_numbers(0, ce_weight=ce_weight)
        self.ce_weight = ce_weight

    def terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """Return ``{"ce": ...}``; the teacher is not looked at. Raises as `DistillationLoss.terms` does."""
        return super().terms(student_logits, student_logits, labels)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
        """Return the weighted cross-entropy; the teacher is not looked at."""
        return self.total(self.terms(student_logits, None, labels))

    def _terms(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"ce": functional.cross_entropy(student, labels)}


class KDLoss(DistillationLoss):
    """Knowledge distillation: ``ce_weight * CE + kd_weight * T^2 * KL(teacher_T || student_T)``.

    **Paper** (Hinton, Vinyals, Dean 2015, arXiv 1503.02531): both softmaxes at temperature T, the factor T^2.
    The defaults are those of the common CIFAR-100 recipe: 0.1, 0.9 and T = 4.

    Terms: ``ce`` and ``kd``, which contains T^2.

    Args:
        ce_weight: at least 0.
        kd_weight: at least 0.
        temperature: T, above 0.

    Raises:
        ValueError: a parameter out of its range.
    """

    _weight_of: ClassVar[Mapping[str, str]] = {"ce": "ce_weight", "kd": "kd_weight"}

    def __init__(self, *, ce_weight: float = 0.1, kd_weight: float = 0.9, temperature: float = 4.0) -> None:
        """Check and keep the parameters."""
        super().__init__()
        _check_numbers(0, ce_weight=ce_weight, kd_weight=kd_weight)
        _check_temperature(temperature)
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.temperature = temperature

    def _terms(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"ce": functional.cross_entropy(student, labels), "kd": self._kd(student, teacher)}

    def _kd(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _softened_kl(student, teacher, self.temperature)


class DKDLoss(DistillationLoss):
    """Decoupled knowledge distillation: ``ce_weight * CE + alpha * TCKD + beta * NCKD``.

    **Paper** (Zhao et al. 2022, arXiv 2203.08679): TCKD is the divergence between the two-way distributions
    "target or not", NCKD that between the distributions over the other classes alone, both at temperature T
    and, as in the authors' code, times T^2. The target is excluded exactly, where that code subtracts 1000.

    The recipe's warm-up, ``min(epoch / 20, 1)`` on both divergences, is the trainer's business: multiply
    ``tckd`` and ``nckd`` (inside a plug-in: ``base``) by it between `terms` and `total`. ``beta`` is set per
    pair: 8 is the common default, 2 or 6 serve some.

    Terms: ``ce``, ``tckd`` and ``nckd``, the latter two containing T^2.

    Args:
        ce_weight: at least 0.
        alpha: weight of TCKD, at least 0.
        beta: weight of NCKD, at least 0.
        temperature: T, above 0.

    Raises:
        ValueError: a parameter out of its range; at call time also logits of a single class.
    """

    _weight_of: ClassVar[Mapping[str, str]] = {"ce": "ce_weight", "tckd": "alpha", "nckd": "beta"}

    def __init__(
        self, *, ce_weight: float = 1.0, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
    ) -> None:
        """Check and keep the parameters."""
        super().__init__()
        _check_numbers(0, ce_weight=ce_weight, alpha=alpha, beta=beta)
        _check_temperature(temperature)
        self.ce_weight = ce_weight
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    def _terms(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if student.shape[1] < 2:
            raise ValueError("decoupled distillation needs C >= 2 classes, but got C=1")
        tckd, nckd = _target_and_other_kl(student, teacher, labels, self.temperature)
        return {"ce": functional.cross_entropy(student, labels), "tckd": tckd, "nckd": nckd}


class LogitStandardKDLoss(KDLoss):
    """Logit-standardised distillation: ``ce_weight * CE + kd_weight * T^2 * KL`` of z-scored logits.

    **Paper** (Sun et al. 2024, arXiv 2403.01427): each row of either network's logits is standardised to mean
    0 and standard deviation 1 before the softmax at base temperature T. The deviation divides by C - 1, as in
    the authors' code, which adds 1e-7 to it. **Ours**: nothing is added, and a row that is constant, up to
    rounding, becomes zeros and receives gradient 0. The defaults are those of the authors' CIFAR-100 recipe.

    Terms: ``ce`` and ``kd``, which contains T^2.

    Args:
        ce_weight: at least 0.
        kd_weight: at least 0.
        temperature: T, above 0.

    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, *, ce_weight: float = 0.1, kd_weight: float = 9.0, temperature: float = 2.0) -> None:
        """Check and keep the parameters."""
        super().__init__(ce_weight=ce_weight, kd_weight=kd_weight, temperature=temperature)

    def _kd(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super()._kd(_standardised(student), _standardised(teacher))


# --- losses by name -----------------------------------------------------------------------------------------

_LOSSES: Mapping[str, Callable[..., DistillationLoss]] = {
    "topkd": TopKDLoss,
    "kd": KDLoss,
    "dkd": DKDLoss,
    "lskd": LogitStandardKDLoss,
    "ce": CELoss,
}
_PLUGINS: Mapping[str, str] = {f"{base}+topkd": base for base in ("kd", "dkd", "lskd")}

METHODS: tuple[str, ...] = (*_LOSSES, *_PLUGINS)
"""The names that `build_loss` knows; ``kd+topkd`` is `TopKDPlugin` on `KDLoss`, and so on."""

_BASE = "base_"


def loss_parameters(method: str) -> dict[str, object]:
    """Return the parameters that `build_loss` takes for a method, with their defaults.

    They come in the constructor's order; those of a plug-in's base follow with the prefix ``base_``, except
    ``ce_weight``: see `build_loss`.

    Raises:
        ValueError: the method is not one of `METHODS`.
    """
    if method in _LOSSES:
        return _defaults(_LOSSES[method])
    if method not in _PLUGINS:
        raise ValueError(f"unknown method {method!r}; known methods: {', '.join(METHODS)}")
    base = _defaults(_LOSSES[_PLUGINS[method]])
    return _defaults(TopKDPlugin) | {_BASE + name: base[name] for name in base if name != "ce_weight"}


def build_loss(method: str, parameters: Mapping[str, object]) -> DistillationLoss:
    """Construct the loss of a name in `METHODS`; parameters left out keep their defaults.

    The base of a plug-in gets the parameters that begin with ``base_``, without it (``base_weight`` is the
    plug-in's own); its ``ce_weight`` is 0 and cannot be set, because the plug-in counts the cross-entropy.

    Raises:
        ValueError: an unknown method, unknown names among the parameters, or a value out of its range.
    """
    known = loss_parameters(method)
    unknown = [name for name in parameters if name not in known]
    if unknown:
        got, names = ", ".join(map(repr, unknown)), ", ".join(known)
        raise ValueError(f"unknown parameters of method {method!r}: {got}; known parameters: {names}")
    if method in _LOSSES:
        return _LOSSES[method](**parameters)
    own = {name: value for name, value in parameters.items() if name in _defaults(TopKDPlugin)}
    rest = {name.removeprefix(_BASE): value for name, value in parameters.items() if name not in own}
    plugin: Callable[..., DistillationLoss] = TopKDPlugin
    return plugin(_LOSSES[_PLUGINS[method]](ce_weight=0.0, **rest), **own)


def _defaults(loss: Callable[..., DistillationLoss]) -> dict[str, object]:
    parameters = inspect.signature(loss).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


# --- arithmetic, on checked input ---------------------------------------------------------------------------


def _raised(*logits: Tensor) -> list[Tensor]:
    """Bring tensors to their common dtype, float32 at least."""
    dtype = torch.float32
    for each in logits:
        dtype = torch.promote_types(dtype, each.dtype)
    return [each.to(dtype) for each in logits]


def _autocast_off(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    kind = tensor.device.type
    # Asked first: torch.autocast is slow to enter, and raises for devices that have none, such as "meta".
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(device_type=kind, enabled=False)


def _scaled(
    teacher: Tensor,
    labels: Tensor,
    k: int,
    scale_top: float,
    scale_last: float,
    scale_gt: float,
    shift: float,
) -> Tensor:
    ranked, order = teacher.sort(dim=1, descending=True, stable=True)  # topk leaves the order of ties open
    top, rest, order = ranked[:, :k], ranked[:, k:], order[:, :k]
    others = rest if k < teacher.shape[1] else top  # K = C leaves no rest, whose mean would be NaN
    delta = shift * (top.mean(1, keepdim=True) - others.mean(1, keepdim=True))
    weights = torch.linspace(scale_top, scale_last, k, dtype=teacher.dtype, device=teacher.device)
    scaled = teacher.scatter(1, order, _amplified(top, weights) + delta)

    target = labels.unsqueeze(1)
    missed = order[:, :1] != target
    raised = _amplified(teacher.gather(1, target), scale_gt) + delta
    return scaled.scatter(1, target, torch.where(missed, raised, scaled.gather(1, target)))


def _amplified(logits: Tensor, weight: Tensor | float) -> Tensor:
    return torch.where(logits >= 0, logits * weight, logits / weight)


def _decoupled(student: Tensor, scaled: Tensor, k: int, alpha: float, beta: float) -> Tensor:
    groups = _groups(scaled, k)
    student, scaled = groups * student, groups * scaled
    cosine = (student * scaled).sum(-1) / _length(student) / _length(scaled)
    filled = groups.amax(-1)  # an empty group has no distance
    positive, negative, rest = (filled - filled * cosine).mean(1).unbind()
    return alpha * positive + beta * negative + rest


def _groups(scaled: Tensor, k: int) -> Tensor:
    """Return masks of zeros and ones of the positive, the negative and the rest group, ``(3, B, C)``.

    A threshold and a running count of the ties at it choose the same classes as a stable sort, much faster.
    """
    signed = torch.stack((scaled, -scaled))
    threshold = signed.topk(k).values[..., -1:]
    above, tied = signed > threshold, signed == threshold
    room = k - above.sum(-1, keepdim=True)
    chosen = (above | (tied & (tied.cumsum(-1) <= room))) & (signed > 0)
    masks = chosen.to(scaled.dtype)  # multiplying by floats is faster than selecting by booleans
    return torch.cat((masks, 1 - masks.sum(0, keepdim=True)))


def _contrastive(student: Tensor, teacher: Tensor, temperature: float, normalize: bool) -> Tensor:
    if normalize:
        student, teacher = _unit(student), _unit(teacher)
    similarity = student @ teacher.T / temperature
    own = (similarity.log_softmax(0) + similarity.log_softmax(1)).diagonal()
    return -own.mean() / 2


def _length(vectors: Tensor, floor: Tensor | float | None = None) -> Tensor:
    """Return the L2 norm over the last dimension, or infinity for a vector that counts as zero.

    Dividing by infinity gives value 0 and gradient 0. Below the default floor squares leave the range.
    """
    if floor is None:
        limits = torch.finfo(vectors.dtype)
        floor = math.sqrt(limits.tiny / limits.eps)
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return length.masked_fill(length <= floor, math.inf)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / _length(vectors).unsqueeze(-1)


def _standardised(logits: Tensor) -> Tensor:
    mean = logits.mean(1, keepdim=True)
    centred, freedom = logits - mean, math.sqrt(logits.shape[1] - 1)
    rounding = 16 * torch.finfo(logits.dtype).eps * freedom * mean.detach().abs().squeeze(1)
    return centred / _length(centred, rounding).unsqueeze(1) * freedom


def _softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return temperature**2 * _kl(student / temperature, teacher / temperature)


def _target_and_other_kl(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    target = labels.unsqueeze(1)
    # Infinity would give inf - inf at the target; half the range leaves room for the log of the softmax.
    excluded = torch.finfo(student.dtype).min / 2
    binary, others = [], []
    for logits in (student / temperature, teacher / temperature):
        other = logits.scatter(1, target, excluded)
        binary.append(torch.cat((logits.gather(1, target), other.logsumexp(1, keepdim=True)), dim=1))
        others.append(other)
    return temperature**2 * _kl(*binary), temperature**2 * _kl(*others)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), summed over the classes, mean over the batch."""
    log_student, log_teacher = student.log_softmax(1), teacher.log_softmax(1)
    return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


# --- checks: rule, then what came ---------------------------------------------------------------------------


def _check_numbers(minimum: float, **values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, but got {value!r}")
        if value < minimum:
            raise ValueError(f"`{name} >= {minimum}` must hold, but got {name}={value!r}")


def _check_temperature(temperature: object) -> None:
    _check_numbers(-math.inf, temperature=temperature)
    if isinstance(temperature, Real) and temperature <= 0:
        raise ValueError(f"`temperature > 0` must hold, but got temperature={temperature!r}")


def _check_flag(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` must be True or False, but got {value!r}")


def _check_k(k: object) -> None:
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise ValueError(f"`k` must be an integer, but got {k!r}")
    if k < 1:
        raise ValueError(f"`k >= 1` must hold, but got k={k!r}")


def _check_scaling(k: object, scale_top: float, scale_last: float, scale_gt: float, shift: float) -> None:
    _check_k(k)
    _check_numbers(1, scale_last=scale_last)
    _check_numbers(0, scale_top=scale_top, scale_gt=scale_gt, shift=shift)
    _check_order(scale_top=scale_top, scale_last=scale_last)
    _check_order(scale_gt=scale_gt, scale_top=scale_top)


def _check_order(**values: float) -> None:
    (high, upper), (low, lower) = values.items()
    if upper < lower:
        raise ValueError(f"`{high} >= {low}` must hold, but got {high}={upper!r}, {low}={lower!r}")


def _check_logits(name: str, logits: Tensor) -> None:
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"`{name}` must have the shape (B, C), neither 0, but got {tuple(logits.shape)}")
    if not logits.dtype.is_floating_point:
        raise ValueError(f"`{name}` must be floating point, but got {logits.dtype}")


def _check_pair(student: Tensor, teacher: Tensor, teacher_name: str = "teacher_logits") -> None:
    _check_logits("student_logits", student)
    _check_logits(teacher_name, teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"`student_logits` and `{teacher_name}` must have the same shape, "
            f"but got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    batch, classes = logits.shape
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must be integers, but got {labels.dtype}")
    if labels.shape != (batch,):
        raise ValueError(f"`labels` must have the shape ({batch},), but got {tuple(labels.shape)}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU this would wait for it
        for extreme in map(int, torch.aminmax(labels)):
            if not 0 <= extreme < classes:
                raise ValueError(f"`labels` must be from 0 to {classes - 1}, but got {extreme}")


def _check_k_fits(k: int, logits: Tensor) -> None:
    if k > logits.shape[1]:
        raise ValueError(f"`k <= C` must hold, but got k={k} and C={logits.shape[1]}")
