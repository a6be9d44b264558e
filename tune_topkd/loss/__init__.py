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

Inside: `functional` holds the formulas of TopKD, `scaling` the rules for its weights and `topkd` its losses, `baselines`
the losses it is compared with, `methods` finds a loss by name, `state` is what a user's loss keeps between calls. Below
them lie `interface`, which all losses share, `precision` and `checks`.
"""

from tune_topkd.loss.baselines import CELoss
from tune_topkd.loss.baselines import DKDLoss
from tune_topkd.loss.baselines import KDLoss
from tune_topkd.loss.baselines import LogitStandardKDLoss
from tune_topkd.loss.functional import contrastive_loss
from tune_topkd.loss.functional import top_k_decoupled_loss
from tune_topkd.loss.functional import top_k_scaling
from tune_topkd.loss.interface import DistillationLoss
from tune_topkd.loss.methods import METHODS
from tune_topkd.loss.methods import build_loss
from tune_topkd.loss.methods import loss_parameters
from tune_topkd.loss.scaling import SCALING_RULES
from tune_topkd.loss.scaling import ScalingRule
from tune_topkd.loss.scaling import check_scaling_rule
from tune_topkd.loss.scaling import linear_scaling
from tune_topkd.loss.state import LossState
from tune_topkd.loss.topkd import TopKDLoss
from tune_topkd.loss.topkd import TopKDPlugin

__all__ = [
    "METHODS",
    "SCALING_RULES",
    "CELoss",
    "DKDLoss",
    "DistillationLoss",
    "KDLoss",
    "LogitStandardKDLoss",
    "LossState",
    "ScalingRule",
    "TopKDLoss",
    "TopKDPlugin",
    "build_loss",
    "check_scaling_rule",
    "contrastive_loss",
    "linear_scaling",
    "loss_parameters",
    "top_k_decoupled_loss",
    "top_k_scaling",
]
