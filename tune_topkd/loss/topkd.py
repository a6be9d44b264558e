"""TopKD as modules: its objective, and the plug-in that adds it to another method."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from tune_topkd.loss.checks import check_flag
from tune_topkd.loss.checks import check_group
from tune_topkd.loss.checks import check_k_fits
from tune_topkd.loss.checks import check_numbers
from tune_topkd.loss.checks import check_scaling
from tune_topkd.loss.checks import check_temperature
from tune_topkd.loss.functional import contrastive_entropy
from tune_topkd.loss.functional import decoupled_distance
from tune_topkd.loss.functional import scaled_teacher
from tune_topkd.loss.interface import DistillationLoss
from tune_topkd.loss.scaling import ScalingRule
from tune_topkd.loss.scaling import check_scaling_rule
from tune_topkd.loss.scaling import find_scaling_rule
from tune_topkd.loss.scaling import linear_scaling


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
        scaling_rule: str | ScalingRule,
    ) -> None:
        """Check and keep the parameters."""
        super().__init__()
        check_scaling(k, scale_top, scale_last, scale_gt, shift)
        self._rule = find_scaling_rule(scaling_rule)
        if self._rule is not linear_scaling:
            check_scaling_rule(self._rule, k=k, scale_top=scale_top, scale_last=scale_last, shift=shift)
        check_numbers(0, alpha=alpha, beta=beta)
        self.k = k
        self.scale_top = scale_top
        self.scale_last = scale_last
        self.scale_gt = scale_gt
        self.shift = shift
        self.alpha = alpha
        self.beta = beta
        self.scaling_rule = scaling_rule

    def _scaled_teacher(self, teacher: Tensor, labels: Tensor) -> Tensor:
        check_k_fits(self.k, teacher)
        scales = self.scale_top, self.scale_last, self.scale_gt
        return scaled_teacher(teacher, labels, self.k, *scales, self.shift, self._rule)

    def _tdl(self, student: Tensor, scaled: Tensor) -> Tensor:
        return decoupled_distance(student, scaled, self.k, self.alpha, self.beta)


class TopKDLoss(_TopK):
    """The objective of TopKD: ``ce_weight * CE + tdl_weight * L_TDL + contrastive_weight * L_con``.

    **Paper** (arXiv 2508.04539): ``L_con + L_TDL``, the decoupled loss on the scaled teacher logits, the
    contrastive loss on the unscaled ones. **Ours**: the cross-entropy with the labels and the three weights,
    all 1 by default. Under SGD the sum of the weights multiplies the step size. The contrastive term depends
    on the batch size unless ``contrastive_batch`` fixes it.

    Terms: ``ce``, ``tdl``, ``contrastive``.

    Args:
        k: K, how many classes are Top-K; from 1 to C. With ``2 * k >= C`` the rest group can be empty.
        scale_top: weight of the teacher's first choice, at least ``scale_last``.
        scale_last: weight at rank K, at least 1.
        scale_gt: weight of a ground truth that the teacher missed, at least ``scale_top``.
        shift: coefficient of the shift, at least 0; see `top_k_scaling` for these five.
        alpha: weight of the positive group, at least 0.
        beta: weight of the negative group, at least 0; see `top_k_decoupled_loss`.
        scaling_rule: gives the weights by rank and the shift: ``linear``, which is `linear_scaling`, or a callable of its
            signature, or the name of one, ``package.module:rule``. It is tried once when the loss is made.
        temperature: of the contrastive loss, above 0.
        normalize: whether the contrastive loss normalises the rows; see `contrastive_loss`.
        contrastive_batch: samples that are contrasted with one another: the batch is cut into groups of so many, so
            that the term means the same at another batch size. 0, the default, is the whole batch (**paper**).
        ce_weight: at least 0, as are the other two.
        tdl_weight: weight of the decoupled loss.
        contrastive_weight: weight of the contrastive loss.

    Raises:
        ValueError: a parameter out of its range, or a rule that cannot be had or gives what it must not; at call time also
            k > C.
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
        scaling_rule: str | ScalingRule = "linear",
        temperature: float = 0.1,
        normalize: bool = True,
        contrastive_batch: int = 0,
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
            scaling_rule=scaling_rule,
        )
        check_temperature(temperature)
        check_flag(normalize=normalize)
        check_group(contrastive_batch=contrastive_batch)
        check_numbers(0, ce_weight=ce_weight, tdl_weight=tdl_weight, contrastive_weight=contrastive_weight)
        self.temperature = temperature
        self.normalize = normalize
        self.contrastive_batch = contrastive_batch
        self.ce_weight = ce_weight
        self.tdl_weight = tdl_weight
        self.contrastive_weight = contrastive_weight

    def _terms(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {
            "ce": functional.cross_entropy(student, labels),
            "tdl": self._tdl(student, self._scaled_teacher(teacher, labels)),
            "contrastive": contrastive_entropy(
                student, teacher, self.temperature, self.normalize, self.contrastive_batch
            ),
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
        scaling_rule: see `TopKDLoss`.
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
        scaling_rule: str | ScalingRule = "linear",
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
            scaling_rule=scaling_rule,
        )
        if not callable(base):
            raise ValueError(f"`base` must be callable with (student, teacher, labels), but got {base!r}")
        check_numbers(0, ce_weight=ce_weight, base_weight=base_weight, tdl_weight=tdl_weight)
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
