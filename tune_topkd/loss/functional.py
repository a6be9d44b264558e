"""The three parts of TopKD, as functions: scaling module, decoupled loss, contrastive loss."""

import torch
from torch import Tensor

from tune_topkd.loss.checks import check_flag
from tune_topkd.loss.checks import check_k
from tune_topkd.loss.checks import check_k_fits
from tune_topkd.loss.checks import check_labels
from tune_topkd.loss.checks import check_logits
from tune_topkd.loss.checks import check_numbers
from tune_topkd.loss.checks import check_pair
from tune_topkd.loss.checks import check_scaling
from tune_topkd.loss.checks import check_temperature
from tune_topkd.loss.precision import autocast_off
from tune_topkd.loss.precision import safe_length
from tune_topkd.loss.precision import widened
from tune_topkd.loss.scaling import ScalingRule
from tune_topkd.loss.scaling import linear_scaling


def top_k_scaling(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    k: int,
    scale_top: float,
    scale_last: float,
    scale_gt: float,
    shift: float,
    rule: ScalingRule = linear_scaling,
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
        rule: gives the weights by rank and ``delta``; as `linear_scaling`, which is described above.

    Returns:
        The scaled logits, ``(B, C)``, float32 or wider, detached.

    Raises:
        ValueError: a parameter out of its range, or logits or labels of the wrong shape or dtype.
    """
    check_scaling(k, scale_top, scale_last, scale_gt, shift)
    check_logits("teacher_logits", teacher_logits)
    check_labels(labels, teacher_logits)
    check_k_fits(k, teacher_logits)
    (teacher,) = widened(teacher_logits.detach())
    return scaled_teacher(teacher, labels.long(), k, scale_top, scale_last, scale_gt, shift, rule)


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
    check_k(k)
    check_numbers(0, alpha=alpha, beta=beta)
    check_pair(student_logits, scaled_teacher_logits, "scaled_teacher_logits")
    check_k_fits(k, student_logits)
    student, scaled = widened(student_logits, scaled_teacher_logits.detach())
    with autocast_off(student):
        return decoupled_distance(student, scaled, k, alpha, beta)


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
    check_temperature(temperature)
    check_flag(normalize=normalize)
    check_pair(student_logits, teacher_logits)
    student, teacher = widened(student_logits, teacher_logits.detach())
    with autocast_off(student):
        return contrastive_entropy(student, teacher, temperature, normalize)


# --- arithmetic, on checked input ---------------------------------------------------------------------------


def scaled_teacher(
    teacher: Tensor,
    labels: Tensor,
    k: int,
    scale_top: float,
    scale_last: float,
    scale_gt: float,
    shift: float,
    rule: ScalingRule = linear_scaling,
) -> Tensor:
    """Compute `top_k_scaling` of checked input."""
    order = _ranking(teacher).topk(k).indices
    weights, delta = rule(teacher, order, scale_top=scale_top, scale_last=scale_last, shift=shift)
    scaled = teacher.scatter(1, order, _amplified(teacher.gather(1, order), weights) + delta)

    target = labels.unsqueeze(1)
    missed = order[:, :1] != target
    raised = _amplified(teacher.gather(1, target), scale_gt) + delta
    return scaled.scatter(1, target, torch.where(missed, raised, scaled.gather(1, target)))


def _ranking(logits: Tensor) -> Tensor:
    """Return distinct integers for each row that rank its logits; of equal logits the first class ranks highest.

    Their `topk` is what a stable sort puts first, much faster; that of the logits would leave the order of ties open.
    """
    later = torch.arange(logits.shape[-1] - 1, -1, -1, device=logits.device)
    if logits.dtype != torch.float32:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        return torch.empty_like(order).scatter_(-1, order, later.expand_as(order))
    bits = logits.view(torch.int32)  # a sign and a magnitude, which rises with that of the float
    ordered = torch.where(bits < 0, torch.iinfo(torch.int32).min - bits, bits)
    return (ordered.long() << 32) | later


def _amplified(logits: Tensor, weight: Tensor | float) -> Tensor:
    return torch.where(logits >= 0, logits * weight, logits / weight)


def decoupled_distance(student: Tensor, scaled: Tensor, k: int, alpha: float, beta: float) -> Tensor:
    """Compute `top_k_decoupled_loss` of checked input."""
    groups = _groups(scaled, k)
    student, scaled = groups * student, groups * scaled
    cosine = (student * scaled).sum(-1) / safe_length(student) / safe_length(scaled)
    filled = groups.amax(-1)  # an empty group has no distance
    positive, negative, rest = (filled - filled * cosine).mean(1).unbind()
    return alpha * positive + beta * negative + rest


def _groups(scaled: Tensor, k: int) -> Tensor:
    """Return masks of zeros and ones of the positive, the negative and the rest group, ``(3, B, C)``.

    They are those that a stable sort would put first.
    """
    signed = torch.stack((scaled, -scaled))
    ranking = _ranking(signed)
    chosen = (ranking >= ranking.topk(k).values[..., -1:]) & (signed > 0)
    masks = chosen.to(scaled.dtype)  # multiplying by floats is faster than selecting by booleans
    return torch.cat((masks, 1 - masks.sum(0, keepdim=True)))


def contrastive_entropy(
    student: Tensor, teacher: Tensor, temperature: float, normalize: bool, group: int = 0
) -> Tensor:
    """Compute `contrastive_loss` of checked input, within groups of so many samples if that is not 0."""
    if normalize:
        student, teacher = _unit(student), _unit(teacher)
    groups = zip(torch.split(student, group or len(student)), torch.split(teacher, group or len(teacher)), strict=True)
    own = []
    for one, other in groups:
        similarity = one @ other.T / temperature
        own.append((similarity.log_softmax(0) + similarity.log_softmax(1)).diagonal())
    return -torch.cat(own).mean() / 2


def _unit(vectors: Tensor) -> Tensor:
    return vectors / safe_length(vectors).unsqueeze(-1)
