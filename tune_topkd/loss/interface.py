"""What all losses share: checked input, named terms, their weighted sum."""

import functools
import inspect
from collections.abc import Callable
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch import nn

from tune_topkd.loss.checks import check_labels
from tune_topkd.loss.checks import check_pair
from tune_topkd.loss.precision import autocast_off
from tune_topkd.loss.precision import widened


class DistillationLoss(nn.Module):
    """What all losses here share: a weighted sum of named terms. Subclasses say which.

    The constructor's parameters are attributes of the same names and are read at every call, so that a
    trainer may change a weight during training. The losses of this project have no weights of their own and no
    state; a subclass may have both, see `build_loss`.
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
        check_pair(student_logits, teacher_logits)
        check_labels(labels, student_logits)
        student, teacher = widened(student_logits, teacher_logits.detach())
        with autocast_off(student):
            return self._terms(student, teacher, labels.long())

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of what `terms` returned: the scalar to minimise.

        Raises:
            ValueError: the names of the terms are not those that this loss has.
        """
        if terms.keys() != self._weight_of.keys():
            known, got = ", ".join(self._weight_of), ", ".join(terms)
            raise ValueError(f"`terms` must have exactly the keys {known}, but got {got or 'none'}")
        for name, term in terms.items():
            if not isinstance(term, Tensor) or term.ndim != 0:
                got = f"of shape {tuple(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
                raise ValueError(f"term {name!r} must be a scalar tensor, but is {got}")
        weights: dict[str, float] = {name: getattr(self, weight) for name, weight in self._weight_of.items()}
        weighted: list[Tensor] = [weights[name] * terms[name] for name in weights]
        return functools.reduce(torch.add, weighted)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar: `total` of `terms`."""
        return self.total(self.terms(student_logits, teacher_logits, labels))

    def extra_repr(self) -> str:
        """Show the parameters."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in defaults(type(self)))

    def _terms(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the terms of checked input: one float dtype of 32 bits or more, labels int64."""
        raise NotImplementedError


def defaults(loss: Callable[..., DistillationLoss]) -> dict[str, object]:
    """Return a constructor's parameters that have a default, with it, in their order."""
    parameters = inspect.signature(loss).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}
