"""The losses by name."""

from collections.abc import Callable
from collections.abc import Mapping

from tune_topkd.loss.baselines import CELoss
from tune_topkd.loss.baselines import DKDLoss
from tune_topkd.loss.baselines import KDLoss
from tune_topkd.loss.baselines import LogitStandardKDLoss
from tune_topkd.loss.interface import DistillationLoss
from tune_topkd.loss.interface import defaults
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


def loss_parameters(method: str) -> dict[str, object]:
    """Return the parameters that `build_loss` takes for a method, with their defaults.

    They come in the constructor's order; those of a plug-in's base follow with the prefix ``base_``, except
    ``ce_weight``: see `build_loss`.

    Raises:
        ValueError: the method is not one of `METHODS`.
    """
    if method in _LOSSES:
        return defaults(_LOSSES[method])
    if method not in _PLUGINS:
        raise ValueError(f"unknown method {method!r}; known methods: {', '.join(METHODS)}")
    base = defaults(_LOSSES[_PLUGINS[method]])
    return defaults(TopKDPlugin) | {_BASE + name: base[name] for name in base if name != "ce_weight"}


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
    own = {name: value for name, value in parameters.items() if name in defaults(TopKDPlugin)}
    rest = {name.removeprefix(_BASE): value for name, value in parameters.items() if name not in own}
    plugin: Callable[..., DistillationLoss] = TopKDPlugin
    return plugin(_LOSSES[_PLUGINS[method]](ce_weight=0.0, **rest), **own)
