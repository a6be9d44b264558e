"""The losses that TopKD is compared with: cross-entropy, KD, DKD and logit-standardised KD."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tune_topkd.loss.checks import check_numbers
from tune_topkd.loss.checks import check_temperature
from tune_topkd.loss.interface import DistillationLoss
from tune_topkd.loss.precision import safe_length


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
        check_numbers(0, ce_weight=ce_weight)
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
        check_numbers(0, ce_weight=ce_weight, kd_weight=kd_weight)
        check_temperature(temperature)
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
        check_numbers(0, ce_weight=ce_weight, alpha=alpha, beta=beta)
        check_temperature(temperature)
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


# --- arithmetic, on checked input ---------------------------------------------------------------------------


def _standardised(logits: Tensor) -> Tensor:
    mean = logits.mean(1, keepdim=True)
    centred, freedom = logits - mean, math.sqrt(logits.shape[1] - 1)
    rounding = 16 * torch.finfo(logits.dtype).eps * freedom * mean.detach().abs().squeeze(1)
    return centred / safe_length(centred, rounding).unsqueeze(1) * freedom


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
