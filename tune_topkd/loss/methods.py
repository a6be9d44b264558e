"""The losses by name, and a user's own by `package.module:loss`."""

import copy
import functools
import inspect
import pkgutil
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import ClassVar
from typing import cast

from torch import Tensor
from torch import nn

from tune_topkd.loss.baselines import CELoss
from tune_topkd.loss.baselines import DKDLoss
from tune_topkd.loss.baselines import KDLoss
from tune_topkd.loss.baselines import LogitStandardKDLoss
from tune_topkd.loss.interface import DistillationLoss
from tune_topkd.loss.interface import defaults
from tune_topkd.loss.state import check_made
from tune_topkd.loss.topkd import TopKDLoss
from tune_topkd.loss.topkd import TopKDPlugin

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
_PLUGIN = "+topkd"


class CallableLoss(DistillationLoss):
    """A user's loss as one of this project's.

    Term: ``loss``.

    Args:
        loss: called with (student logits, teacher logits, labels); returns a scalar.
        label: what to call it in errors.

    Raises:
        ValueError: at call time, if what it returns is no scalar tensor.
    """

    _weight_of: ClassVar[Mapping[str, str]] = {"loss": "weight"}

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor], label: str) -> None:
        """Keep the loss; a module's parameters become this one's."""
        super().__init__()
        self.loss = loss
        self.label = label
        self.weight = 1.0

    def extra_repr(self) -> str:
        """Show where the loss comes from."""
        return self.label

    def _terms(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        value = self.loss(student, teacher, labels)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{self.label} must return a scalar tensor, but returned {got}")
        return {"loss": value}


def loss_parameters(method: str) -> dict[str, object]:
    """Return the parameters that `build_loss` takes for a method, with their defaults.

    They come in the constructor's order; those of a plug-in's base follow with the prefix ``base_``, except
    ``ce_weight``: see `build_loss`. Those of a user's loss are its keyword parameters that have a default.

    Raises:
        ValueError: the method is not one of `METHODS`, nor a callable of the user's that can be imported.
    """
    if method in _LOSSES:
        return defaults(_LOSSES[method])
    if ":" in method and not method.endswith(_PLUGIN):
        return _parameters_of(_resolved(method))
    base_name = method.removesuffix(_PLUGIN)
    if method not in _PLUGINS and ":" not in base_name:
        raise ValueError(
            f"unknown method {method!r}; known methods: {', '.join(METHODS)}; or a callable: package.module:loss"
        )
    base = loss_parameters(base_name)
    if taken := [name for name in base if _BASE + name in defaults(TopKDPlugin)]:
        own = ", ".join(_BASE + name for name in taken)
        raise ValueError(
            f"method {method!r}: {own} is the plug-in's own: give {', '.join(taken)} of the base another name"
        )
    return defaults(TopKDPlugin) | {_BASE + name: base[name] for name in base if name != "ce_weight"}


def build_loss(method: str, parameters: Mapping[str, object]) -> DistillationLoss:
    """Construct the loss of a name in `METHODS` or of a user; parameters left out keep their defaults.

    The base of a plug-in gets the parameters that begin with ``base_``, without it (``base_weight`` is the
    plug-in's own); its ``ce_weight``, if it has one, is 0 and cannot be set, because the plug-in counts the
    cross-entropy.

    ``package.module:loss`` is a function of (student logits, teacher logits, labels) that returns a scalar and
    takes its parameters as keywords with defaults, or a class that is constructed with these parameters and then
    called like such a function. A `DistillationLoss` keeps its named terms, anything else has the one term ``loss``.
    The parameters of a ``torch.nn.Module`` are trained with the student, by the same optimiser and with the same
    weight decay; a resumed training restores them, its buffers, and the attributes that its calls have changed.
    ``package.module:loss+topkd`` makes it the base of `TopKDPlugin`.

    Raises:
        ValueError: an unknown method, unknown names among the parameters, or a value out of its range.
    """
    known = loss_parameters(method)
    unknown = [name for name in parameters if name not in known]
    if unknown:
        got, names = ", ".join(map(repr, unknown)), ", ".join(known) or "none"
        raise ValueError(f"unknown parameters of method {method!r}: {got}; known parameters: {names}")
    if method in _LOSSES:
        return _LOSSES[method](**parameters)
    if not method.endswith(_PLUGIN):
        return _user_loss(method, parameters)
    own = {name: value for name, value in parameters.items() if name in defaults(TopKDPlugin)}
    rest = {name.removeprefix(_BASE): value for name, value in parameters.items() if name not in own}
    base = method.removesuffix(_PLUGIN)
    if "ce_weight" in loss_parameters(base):
        rest["ce_weight"] = 0.0
    plugin: Callable[..., DistillationLoss] = TopKDPlugin
    return plugin(build_loss(base, rest), **own)


# --- a user's ---------------------------------------------------------------------------------------------


def _resolved(method: str) -> Callable[..., Any]:
    try:
        found: Any = pkgutil.resolve_name(method)
    except Exception as error:  # importing runs the user's code, which can raise anything
        raise ValueError(f"method {method!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"method {method!r} must be callable, but is a {type(found).__name__}")
    return cast(Callable[..., Any], found)


def _parameters_of(loss: Callable[..., Any]) -> dict[str, object]:
    given = list(inspect.signature(loss).parameters.values())
    if not inspect.isclass(loss):  # logits of both and labels, whatever their defaults
        given = given[sum(each.kind in _BY_PLACE for each in given[:3]) :]
    return {each.name: each.default for each in given if each.default is not each.empty and each.kind in _BY_NAME}


_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _user_loss(method: str, parameters: Mapping[str, object]) -> DistillationLoss:
    found = _resolved(method)
    label = f"method {method!r}"
    if inspect.isroutine(found):
        check_made(found, label)
        return CallableLoss(functools.partial(found, **parameters), method)
    if not inspect.isclass(found):  # an object: each training gets a copy, so that none inherits the state of another
        if isinstance(found, nn.Module) and any(True for _ in found.parameters()):
            raise ValueError(
                f"{label}: is an object whose weights are there before the seed is set; name its class instead"
            )
        found = copy.deepcopy(found)
        check_made(found, label)
        return CallableLoss(functools.partial(found, **parameters) if parameters else found, method)
    try:
        loss = found(**parameters)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{label} cannot be constructed: {type(error).__name__}: {error}") from error
    check_made(loss, label)
    if isinstance(loss, DistillationLoss):
        return loss
    if not callable(loss):
        raise ValueError(f"{label}: its objects must be callable with (student, teacher, labels)")
    return CallableLoss(loss, method)
