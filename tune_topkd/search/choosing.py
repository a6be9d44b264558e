"""The sampler and the scheduler that a sweep's config names: of this project, or of the user's code.

What is the user's is held to its protocol: whatever it raises, or gives that the protocol does not allow, becomes a
`ChoiceError` of one line.
"""

import inspect
import re
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import Any
from typing import NoReturn

from tune_topkd.config import SAMPLERS
from tune_topkd.config import SCHEDULERS
from tune_topkd.config import ChoiceConfig
from tune_topkd.config import Problem
from tune_topkd.config import SamplerConfig
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.config import unknown_choice
from tune_topkd.errors import TuneTopKDError
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Decision
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialRecord
from tune_topkd.search.samplers import CmaesSampler
from tune_topkd.search.samplers import GpSampler
from tune_topkd.search.samplers import QmcSampler
from tune_topkd.search.samplers import RandomSampler
from tune_topkd.search.samplers import SamplerFactory
from tune_topkd.search.samplers import TpeSampler
from tune_topkd.search.samplers import proposal_problem
from tune_topkd.search.schedulers import Asha
from tune_topkd.search.schedulers import Scheduler
from tune_topkd.space import Axis
from tune_topkd.space import Space
from tune_topkd.user_code import UserCodeError
from tune_topkd.user_code import one_line
from tune_topkd.user_code import resolve


class ChoiceError(TuneTopKDError):
    """A sampler or a scheduler that a config names cannot be had, or breaks a rule of its protocol."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


PACKAGES: Mapping[str, tuple[str, ...]] = {
    "cmaes": ("cmaes", "numpy"),
    "gp": ("optuna", "torch", "scipy"),
    "qmc": ("scipy",),
    "random": (),
    "tpe": ("optuna",),
}
"""What each of `SAMPLERS` proposes by: with another version of one of these it may propose something else."""

_OLDEST = {"gp": ("optuna", 5), "cmaes": ("cmaes", 0), "qmc": ("scipy", 1)}
"""The package that a sampler cannot do without, and its major version: older processes of Optuna's do not see the trials
that are at work, and several at once would be the same point."""


def sampler_of(config: SweepConfig) -> SamplerFactory:
    """What makes the sampler that a sweep's config names; one of the user's raises `ChoiceError`.

    Raises:
        ChoiceError: a package that it needs is not installed.
    """
    chosen, startup = config.sweep.sampler, config.sweep.startup_trials
    ours: dict[str, SamplerFactory] = {
        "cmaes": partial(CmaesSampler, rung_metric=config.rung_metric),
        "gp": partial(GpSampler, startup_trials=startup, rung_metric=config.rung_metric),
        "qmc": QmcSampler,
        "random": RandomSampler,
        "tpe": partial(TpeSampler, startup_trials=startup, rung_metric=config.rung_metric),
    }
    if chosen.name not in ours:
        return partial(_CheckedSampler, chosen)
    package, oldest = _OLDEST.get(chosen.name, ("optuna", 0))
    if (found := _major(package)) is None or found < oldest:
        needed = f"{package} {oldest} or newer" if oldest > 1 else package
        have = "is not installed" if found is None else f"here it is {metadata.version(package)}"
        rule = f"needs the package {needed}, and {have}: pip install --upgrade {package}"
        raise ChoiceError(_problem(chosen, rule))
    return ours[chosen.name]


def _major(package: str) -> int | None:
    """The first number of an installed package's version; None if it is not there."""
    try:
        found = re.match(r"\d+", metadata.version(package))
    except metadata.PackageNotFoundError:
        return None
    return int(found[0]) if found else 0


def scheduler_of(config: SweepConfig) -> Scheduler:
    """The scheduler that a sweep's config names; it has seen nothing.

    Raises:
        ChoiceError: it is the user's, and cannot be had; its methods raise it too.
    """
    return Asha(config) if config.sweep.scheduler.name in SCHEDULERS else _CheckedScheduler(config)


def choice_problems(config: SweepConfig) -> Iterator[Problem]:
    """What can be known to be wrong with a config's sampler and scheduler before a sweep begins."""
    for look_at in (_try_sampler, _try_scheduler):
        try:
            look_at(config)
        except ChoiceError as error:
            yield error.problem


def _try_sampler(config: SweepConfig) -> None:
    """Have two samplers made anew propose a first trial."""
    axes, make = Space.of(config).axes(), sampler_of(config)
    first, again = (make(axes, config.sweep.seed).ask(0) for _ in range(2))
    if first != again:
        rule = f"ask() must propose the same for the same seed and trials, but proposed {first} and {again}"
        raise ChoiceError(_problem(config.sweep.sampler, rule))


def _try_scheduler(config: SweepConfig) -> None:
    """Have one that is then thrown away decide on a first report."""
    scheduler = scheduler_of(config)
    if config.recipe.epochs > 1:
        scheduler.decide(TrialKey(SEARCH, 0), 1, 50.0)


class _Outside:
    """A sampler or a scheduler of the user's code."""

    METHODS: tuple[str, ...]

    def __init__(self, chosen: ChoiceConfig, *arguments: object) -> None:
        self._chosen = chosen
        self._made = self._called(arguments)
        if missing := [name for name in self.METHODS if not callable(getattr(self._made, name, None))]:
            protocol = "Sampler" if isinstance(chosen, SamplerConfig) else "Scheduler"
            kind = type(self._made).__name__
            self._refuse(f"must give a tune_topkd.search.{protocol}, but gives a {kind}, without {', '.join(missing)}")

    def _called(self, arguments: Sequence[object]) -> Any:
        """What the factory gives."""
        known = SAMPLERS if isinstance(self._chosen, SamplerConfig) else SCHEDULERS
        try:
            factory = resolve(self._chosen.name)
        except UserCodeError as error:
            self._refuse(
                f"{error}; known: {', '.join(known)}; or package.module:factory, found from the working directory"
            )
        if not callable(factory):
            self._refuse(f"must be a factory, which is called, but is a {type(factory).__name__}")
        self._check_options(factory, len(arguments))
        try:
            return factory(*arguments, **self._chosen.options)
        except Exception as error:  # noqa: BLE001 (others' code can raise anything)
            self._refuse(f"cannot be made with {self._chosen.options or 'no options'}: {one_line(error)}", error)

    def _check_options(self, factory: Callable[..., Any], arguments: int) -> None:
        """Refuse an option that the factory does not name."""
        known = _options(factory, arguments)
        for option, value in self._chosen.options.items():
            if known is not None and option not in known:
                rule = f"is no option of {self._chosen.name}; {unknown_choice(option, known)}"
                raise ChoiceError(_problem(self._chosen, rule, option, value))

    def _answer(self, method: str, *arguments: object) -> Any:
        try:
            return getattr(self._made, method)(*arguments)
        except Exception as error:  # noqa: BLE001 (others' code can raise anything)
            self._refuse(f"{method}() raised {one_line(error)}", error)

    def _refuse(self, rule: str, cause: Exception | None = None) -> NoReturn:
        raise ChoiceError(_problem(self._chosen, rule)) from cause


class _CheckedSampler(_Outside):
    """A user's sampler, whose proposals are looked at before they are taken."""

    METHODS = ("ask", "take", "tell")

    def __init__(self, chosen: SamplerConfig, axes: Sequence[Axis], seed: int) -> None:
        self._axes = axes
        super().__init__(chosen, axes, seed)

    def ask(self, number: int) -> dict[str, Scalar]:
        """What it proposes."""
        return self._checked("ask", number)

    def take(self, number: int, proposal: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """What it enters."""
        return self._checked("take", number, proposal)

    def tell(self, record: TrialRecord) -> None:
        """It learns from it."""
        self._answer("tell", record)

    def _checked(self, method: str, *arguments: object) -> dict[str, Scalar]:
        proposal = self._answer(method, *arguments)
        if problem := proposal_problem(proposal, self._axes):
            self._refuse(f"{method}(): {problem}")
        return dict(proposal)


class _CheckedScheduler(_Outside):
    """A user's scheduler, whose decisions are looked at before they are taken."""

    METHODS = ("decide", "replay")

    def __init__(self, config: SweepConfig) -> None:
        super().__init__(config.sweep.scheduler, config)

    def decide(self, key: TrialKey, epoch: int, value: float) -> Decision:
        """What it decides."""
        decision = self._answer("decide", key, epoch, value)
        if not isinstance(decision, str) or decision not in (Decision.CONTINUE, Decision.PRUNE):
            self._refuse(f"decide() must give Decision.CONTINUE or Decision.PRUNE, but gives {decision!r}")
        return Decision(decision)

    def replay(self, state: SweepState) -> None:
        """It learns from it."""
        self._answer("replay", state)


def _options(factory: Callable[..., Any], arguments: int) -> list[str] | None:
    """The names that a factory takes by keyword besides so many arguments; None if it takes any, or does not tell."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    given = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:arguments]
    return [p.name for p in parameters if p not in given and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _problem(chosen: ChoiceConfig, rule: str, option: str = "name", value: object = None) -> Problem:
    key = "sweep.sampler" if isinstance(chosen, SamplerConfig) else "sweep.scheduler"
    value = chosen.name if option == "name" else value
    return Problem(key=f"{key}.{option}", rule=rule, value=value, has_value=True)
