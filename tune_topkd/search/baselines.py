"""The baselines' spaces, and the samplers of those that are tuned as the search tunes its method."""

from tune_topkd.config import BASELINE_SPACES
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.search.samplers import Sampler
from tune_topkd.search.samplers import SamplerFactory
from tune_topkd.space import Space


def baseline_spaces(config: SweepConfig) -> dict[str, Space]:
    """What each baseline is searched over."""
    methods = config.baselines.methods if config.baselines else []
    return {method: Space.of_baseline(config, method) for method in methods}


def baseline_samplers(config: SweepConfig, factory: SamplerFactory) -> dict[str, Sampler]:
    """A sampler for each baseline that is tuned alike, of the search's kind and seed."""
    return {
        method: factory(space.axes(), config.sweep.seed)
        for method, space in baseline_spaces(config).items()
        if config.baselines is not None and config.baselines.is_tuned_alike(method)
    }


def first_of_baseline(config: SweepConfig, method: str) -> dict[str, Scalar] | None:
    """What the search for a baseline begins with: its defaults, if all that is searched has one."""
    own, _ = BASELINE_SPACES[method]
    recipe = {name: value for name, value in config.recipe.model_dump().items() if value is not None}
    known = recipe | {name: default for name, (_, default, _) in own.items()}
    space = Space.of_baseline(config, method)
    names = [axis.name for axis in space.axes()]
    if not all(name in known for name in names):
        return None
    return space.proposal({name: known[name] for name in names})
