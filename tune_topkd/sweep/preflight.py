"""Checks of a config before anything starts: against the datasets, networks, losses and machine that it names.

`config` checks a YAML by itself; here it is checked against the data, networks and losses that it names. All problems are
reported at once.
"""

import contextlib
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any
from typing import TypeVar

import yaml

from tune_topkd import machine
from tune_topkd.config import DEFAULTS
from tune_topkd.config import INTEGER_PARAMETERS
from tune_topkd.config import RECIPE_PARAMETERS
from tune_topkd.config import ConfigError
from tune_topkd.config import Override
from tune_topkd.config import PairConfig
from tune_topkd.config import ParameterRange
from tune_topkd.config import Problem
from tune_topkd.config import RecipeConfig
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.config import load_config
from tune_topkd.config import load_pair
from tune_topkd.config import loss_part
from tune_topkd.config import new_config
from tune_topkd.config import unknown_choice
from tune_topkd.space import Axis
from tune_topkd.space import Space
from tune_topkd.sweep.spaces import space_folders
from tune_topkd.sweep.spaces import space_path
from tune_topkd.sweep.wording import changes
from tune_topkd.sweep.wording import is_same
from tune_topkd.sweep.wording import short
from tune_topkd.user_code import is_users

GIVEN = "the search space"
"""Names a space that came from no file."""

CORNERS_CHECKED = 4096
"""Corners of a space at which the loss is built: all of a space of up to twelve ranges."""


@dataclass(frozen=True)
class Checked:
    """A config without problems, and what a person should know about it."""

    config: SweepConfig
    source: str
    warnings: tuple[str, ...] = ()
    is_reviewed: bool = False
    """Whether it is one of this project's spaces, unchanged: only `check` tells its warnings, which are known."""


def load_checked(source: str | Path | Mapping[str, Any], overrides: Sequence[Override] = ()) -> Checked:
    """Read the search space of a new sweep and check it against the data, networks and losses that it names.

    Args:
        source: the path of a YAML, the bare name of one in `search_spaces/`, or what would stand in one.
        overrides: values that replace its own.

    Raises:
        ConfigError: with every problem found.
    """
    if isinstance(source, Mapping):
        return _checked(new_config(source, GIVEN, overrides), GIVEN)
    path = space_path(str(source))
    checked = _checked(load_config(path, overrides), str(path))
    is_reviewed = not overrides and path.resolve().parent == space_folders()[1]
    return replace(checked, is_reviewed=is_reviewed)


def _checked(config: SweepConfig, source: str) -> Checked:
    config = _with_absolute_paths(config)
    notes: list[str] = []
    if problems := list(_problems(config, notes)):
        raise ConfigError(source, problems)
    config = _with_baselines_that_train(config, source, notes)
    return Checked(config, source, (*_warnings(config), *notes))


def check_again(config: SweepConfig, source: str, begun_in: str | None) -> None:
    """Check the frozen config of a sweep against the data, networks and losses that it names, as they are now.

    Args:
        config: the frozen config, with the present places of its files.
        source: names the config in the error.
        begun_in: the working directory that the sweep was last run from, where the user's modules may be.

    Raises:
        ConfigError: with every problem found.
    """
    problems = list(_problems(config))
    if problems and begun_in is not None and begun_in != os.getcwd():
        problems.append(_problem("", f"the sweep was run from {begun_in}: what it imports may be found only there"))
    if problems:
        raise ConfigError(source, problems)


def load_checked_pair(source: str, overrides: Sequence[Override] = (), *, with_loss: bool = True) -> PairConfig:
    """Read a search space for a single training and check it, as `load_checked` does for a sweep.

    Args:
        source: the space's name or file.
        overrides: as `load_config` takes them.
        with_loss: check the loss at its defaults too, which a teacher has no need of.

    Raises:
        ConfigError: with every problem found.
    """
    path = space_path(source)
    return checked_pair(load_pair(path, overrides), str(path), with_loss=with_loss)


def checked_pair(config: PairConfig, source: str, *, with_loss: bool = True) -> PairConfig:
    """A config of a single training with absolute paths, checked as `load_checked_pair` does; `source` stands in errors.

    Raises:
        ConfigError: with every problem found.
    """
    config = _with_absolute_paths(config)
    if problems := list(_pair_problems(config, with_loss=with_loss)):
        raise ConfigError(source, problems)
    return config


_PairT = TypeVar("_PairT", bound=PairConfig)


def _with_absolute_paths(config: _PairT) -> _PairT:
    """The config with absolute paths, since trials run in other folders."""
    from tune_topkd.data import data_root
    from tune_topkd.data import needs_files

    changes: dict[str, object] = {}
    if needs_files(config.data):
        changes["data"] = config.data.model_copy(update={"root": str(data_root(config.data))})
    if config.student.checkpoint is not None:
        path = str(Path(config.student.checkpoint).expanduser().absolute())
        changes["student"] = config.student.model_copy(update={"checkpoint": path})
    if config.teacher is not None and config.teacher.checkpoint is not None:
        path = str(Path(config.teacher.checkpoint).expanduser().absolute())
        changes["teacher"] = config.teacher.model_copy(update={"checkpoint": path})
    return config.model_copy(update=changes)


def check_machine(config: SweepConfig, source: str) -> None:
    """Check that this machine has the CPUs and GPUs for one trial, before Ray is started.

    Raises:
        ConfigError: it has fewer.
    """
    import torch

    settings = config.sweep
    problems = []
    gpus = torch.cuda.device_count() if settings.gpus_per_trial else 0
    if gpus < (1 if isinstance(settings.gpus_per_trial, str) else settings.gpus_per_trial):
        rule = f"this machine has {gpus} GPUs that torch can use; 0 trains on the CPU, --address uses a cluster"
        problems.append(_problem("sweep.gpus_per_trial", rule, settings.gpus_per_trial))
    cpus = machine.cpus()
    if not isinstance(settings.cpus_per_trial, str) and settings.cpus_per_trial > cpus:
        rule = f"this process may use {cpus} CPUs of this machine; --address uses a cluster"
        problems.append(_problem("sweep.cpus_per_trial", rule, settings.cpus_per_trial))
    if problems:
        raise ConfigError(source, problems)


def check_writable(folder: Path) -> None:
    """Check that files can be written in `folder`, which is made if need be.

    Raises:
        ConfigError: they cannot; nothing is left behind.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        rule = f"must be a folder that can be written to: {error.strerror}; --runs-dir or TUNE_TOPKD_RUNS_DIR moves it"
        raise ConfigError("--runs-dir", [_problem(str(folder), rule)]) from error


def check_mlflow_uri(uri: str) -> None:
    """Check the form of a tracking URI, without connecting to it.

    Raises:
        ConfigError: MLflow keeps no runs at such a URI.
    """
    from tune_topkd.tracking import masked
    from tune_topkd.tracking import uri_problem

    if rule := uri_problem(uri):
        raise ConfigError("--mlflow-uri", [_problem(masked(uri), rule)])


def default_k() -> int:
    """TopKD's default K."""
    from tune_topkd.loss import loss_parameters

    k = loss_parameters("topkd")["k"]
    assert isinstance(k, int), "it is the loss's own"
    return k


def loss_defaults(config: PairConfig) -> dict[str, Scalar]:
    """The defaults of the method's loss that a tuned config can hold; numbers of numpy and torch become Python's."""
    from tune_topkd.loss import loss_parameters

    defaults = ((name, _plain(value)) for name, value in loss_parameters(config.method).items())
    return {name: value for name, value in defaults if value is not None and _can_be_kept(value)}


def _plain(value: object) -> Scalar | None:
    """A default as a plain value that a config can hold; None if there is none."""
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        value = item()
    return value if isinstance(value, Scalar) and type(value) in (bool, int, float, str) else None


@functools.lru_cache(maxsize=256)  # called at each corner of a space
def _can_be_kept(value: Scalar) -> bool:
    """Whether a value survives being written to a YAML and read again."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    try:
        text = yaml.safe_dump({"value": value}, allow_unicode=True).encode()
        return bool(yaml.safe_load(text)["value"] == value)
    except (yaml.YAMLError, ValueError):  # a text that no file can hold, a number with too many digits
        return False


def usable_parameters(config: PairConfig) -> dict[str, Scalar] | None:
    """Parameters with which the loss can be built: the defaults, else those of a corner of the space; None if none
    can."""
    num_classes, fixed = _num_classes(config), loss_defaults(config) | config.loss
    if not _refusal(config, {}, num_classes):
        return fixed
    if isinstance(config, SweepConfig):
        with contextlib.suppress(ValueError):  # a conditional range that is empty, which another check reports
            for corner in itertools.islice(Space.of(config).corners(), CORNERS_CHECKED):
                if not _refusal(config, corner, num_classes):
                    return fixed | loss_part(corner)
    return None


def first_proposals(config: SweepConfig) -> list[dict[str, Scalar]]:
    """The parameters that a search begins with: the defaults, if all searched parameters have one, and the user's points.

    A point that is there already is left out.
    """
    space, defaults = Space.of(config), _defaults(config)
    first = [defaults] if set(defaults) == set(config.space) else []
    for point in config.sweep.points or ():
        params = space.params(space.proposal(defaults | point))
        if not any(is_same(params, space.params(space.proposal(other))) for other in first):
            first.append(params)
    return first


def _defaults(config: SweepConfig) -> dict[str, Scalar]:
    """The defaults of the searched parameters that have one, in the order of the space."""
    known = complete_parameters(config)
    return {name: known[name] for name in config.space if name in known}


def complete_parameters(config: SweepConfig) -> dict[str, Scalar]:
    """The parameters of loss and recipe as a config has them, those that it searches at their defaults."""
    recipe = config.recipe.model_dump(include=set(RECIPE_PARAMETERS), exclude_none=True)
    return loss_defaults(config) | config.loss | recipe


def known_parameters(config: SweepConfig) -> dict[str, Scalar]:
    """The same, but for the defaults of a loss of the user's whose code is not here."""
    try:
        return complete_parameters(config)
    except ValueError:
        return config.loss | config.recipe.model_dump(include=set(RECIPE_PARAMETERS), exclude_none=True)


def _point_problems(config: SweepConfig, space: Space) -> Iterator[Problem]:
    """What is wrong with the points that the user wants tried first."""
    kinds = {axis.name: axis.kind for axis in space.axes()}
    weights = config.relative.of if config.relative else []
    for number, point in enumerate(config.sweep.points or ()):
        key, complete = f"sweep.points.{number}", _defaults(config) | point
        if missing := [name for name in config.space if name not in complete]:
            yield _problem(key, f"must give {', '.join(missing)}: searched here, and without a default")
            continue
        if texts := [n for n, v in point.items() if kinds[n] != "choice" and isinstance(v, bool | str)]:
            yield from (_problem(f"{key}.{name}", "must be a number", point[name]) for name in texts)
            continue
        yield from (
            _problem(f"{key}.{name}", "a relative weight must be above 0", point[name])
            for name in weights
            if name in point and float(point[name]) <= 0
        )
        here = space.params(space.proposal(complete))
        for name in (name for name in point if name not in weights):
            if list(changes({name: point[name]}, {name: here[name]})):
                rule = f"is no value of its range; the nearest is {short(here[name])}"
                yield _problem(f"{key}.{name}", rule, point[name])


def _problem(key: str, rule: str, *value: object) -> Problem:
    return Problem(key=key, rule=rule, value=value[0] if value else None, has_value=bool(value))


def _problems(config: SweepConfig, notes: list[str] | None = None) -> Iterator[Problem]:
    """Every problem of a sweep's config; what is no problem but should be known is added to the notes."""
    yield from _choice_problems(config)
    problems = list(_pair_problems(config, notes))
    yield from problems
    if problems:
        return
    num_classes = _num_classes(config)
    names = list(_space_name_problems(config))
    yield from names or _range_problems(config, num_classes)


def _with_baselines_that_train(config: SweepConfig, source: str, notes: list[str]) -> SweepConfig:
    """The config without the untuned method as a baseline if its K is above the classes: all its trainings would fail.

    Raises:
        ConfigError: the user has asked for it.
    """
    baselines = config.baselines
    if baselines is None or DEFAULTS not in baselines.methods or not _has_top_k(config):
        return config
    k, num_classes = (loss_defaults(config) | config.loss)["k"], _num_classes(config)
    if not isinstance(k, int) or k <= num_classes:
        return config
    left = [method for method in baselines.methods if method != DEFAULTS]
    what = f"`{DEFAULTS}` trains with K = {k}, which must be at most {num_classes}, the number of classes"
    if "methods" in baselines.model_fields_set:
        raise ConfigError(source, [_problem("baselines.methods", f"{what}; take it out: {left}")])
    notes.append(f"the baseline {what}: it is left out")
    return config.model_copy(update={"baselines": baselines.model_copy(update={"methods": left})})


def _choice_problems(config: SweepConfig) -> Iterator[Problem]:
    """Problems of a sampler and a scheduler; the usual ones have none, and take Optuna and Ray to import."""
    if config.sweep.sampler.name not in ("random", "tpe") or is_users(config.sweep.scheduler.name):
        from tune_topkd.search import choice_problems

        yield from choice_problems(config)


def _pair_problems(config: PairConfig, notes: list[str] | None = None, *, with_loss: bool = True) -> Iterator[Problem]:
    yield from _missing_packages(config)
    from tune_topkd.data import DatasetNameError
    from tune_topkd.data import check_readable
    from tune_topkd.data import dataset_info
    from tune_topkd.sweep.fitting import missing_checkpoints
    from tune_topkd.sweep.fitting import try_on

    try:
        info = dataset_info(config.data)
    except ValueError as error:
        yield _problem("data.name" if isinstance(error, DatasetNameError) else "data", str(error))
        yield from missing_checkpoints(config)  # all else needs to know what the images and classes are
        return
    try:
        check_readable(config.data)
    except ValueError as error:
        yield _problem("data", str(error))
    of_loss = list(_loss_problems(config, info.num_classes, notes)) if with_loss else []
    found = try_on(config, info, None if of_loss or not with_loss else usable_parameters(config))
    yield from [*found.problems, *of_loss]
    if notes is not None:
        notes += found.notes


def _num_classes(config: PairConfig) -> int:
    from tune_topkd.data import dataset_info

    return dataset_info(config.data).num_classes


def _missing_packages(config: PairConfig) -> Iterator[Problem]:
    if config.data.name == "digits" and importlib.util.find_spec("sklearn") is None:
        yield _problem("data.name", "needs scikit-learn: pip install 'tune_topkd[sweep]'", config.data.name)


def _loss_problems(config: PairConfig, num_classes: int, notes: list[str] | None) -> Iterator[Problem]:
    from tune_topkd.loss import loss_parameters

    try:
        known = loss_parameters(config.method)
    except (ValueError, TypeError) as error:  # a callable of the user's that cannot be imported
        yield _problem("method", str(error))
        return
    unknown = [name for name in config.loss if name not in known]
    for name in unknown:
        rule = f"is no parameter of method {config.method}; {unknown_choice(name, known)}"
        yield _problem(f"loss.{name}", rule)
    if _has_top_k(config) and "scaling_rule" in config.loss and (rule := _rule_problem(config)):
        yield _problem("loss.scaling_rule", rule, config.loss["scaling_rule"])
        return
    above = list(_k_problems(config, num_classes))
    yield from above
    if isinstance(config, SweepConfig):
        yield from _default_problems(config, known, notes)
    elif not unknown and not above and (rule := _refusal(config, {}, num_classes)):
        yield _problem("loss", rule)


def _rule_problem(config: PairConfig) -> str:
    """Why the loss cannot have its scaling rule; empty if it can."""
    from tune_topkd.loss import TopKDLoss

    try:
        TopKDLoss(scaling_rule=str(config.loss["scaling_rule"]))
    except ValueError as error:
        return str(error)
    return ""


def _default_problems(config: SweepConfig, known: Mapping[str, object], notes: list[str] | None) -> Iterator[Problem]:
    """Defaults that the tuned config cannot hold, which would otherwise be found at the end of the sweep."""
    for name, default in known.items():
        if name in config.loss or name in config.space or default is None:
            continue
        value = _plain(default)
        if value is None and notes is not None:
            notes.append(
                f"loss.{name} is set by the code of {config.method}: no tuned config can hold its value {default!r:.60}"
            )
        elif value is not None and not _can_be_kept(value):
            rule = "the default cannot be kept in a tuned config: set it here to a finite number, text, true or false"
            yield _problem(f"loss.{name}", rule, value)


def _k_problems(config: PairConfig, num_classes: int) -> Iterator[Problem]:
    """Problems of a K that is not searched, but fixed or the method's default."""
    if (isinstance(config, SweepConfig) and "k" in config.space) or not _has_top_k(config):
        return
    k = (loss_defaults(config) | config.loss)["k"]
    if isinstance(k, int) and k > num_classes:
        by_default = "" if "k" in config.loss else f", the default of method {config.method}"
        rule = f"k must be at most {num_classes}, the number of classes, but got {k}{by_default}"
        yield _problem("loss.k", rule)


def _has_top_k(config: PairConfig) -> bool:
    """Whether `k` is TopKD's K; a user's loss may use the name for something else."""
    return "topkd" in config.method.split("+")


def _space_name_problems(config: SweepConfig) -> Iterator[Problem]:
    from tune_topkd.loss import loss_parameters

    defaults = loss_parameters(config.method)
    for name in config.space:
        if name in defaults and name in RECIPE_PARAMETERS:
            rule = (
                f"is a parameter of both the recipe and method {config.method}, and a space cannot say which: rename "
                f"the loss's in its code, or fix them by loss.{name} and recipe.{name}"
            )
            yield _problem(f"space.{name}", rule)
        elif name not in defaults and name not in RECIPE_PARAMETERS:
            known = [*defaults, *RECIPE_PARAMETERS]
            rule = f"is no parameter of method {config.method} or of the recipe; {unknown_choice(name, known)}"
            yield _problem(f"space.{name}", rule)


def _range_problems(config: SweepConfig, num_classes: int) -> Iterator[Problem]:
    """Build the loss at the corners of the space, so that no trial is refused later."""
    k = config.space.get("k") if _has_top_k(config) else None
    if k is not None and k.choices is None and isinstance(k.high, float | int) and k.high > num_classes:
        rule = f"must be at most {num_classes}, the number of classes of {config.data.name}"
        yield _problem("space.k.high", rule, k.high)
        return
    kinds = list(_kind_problems(config))
    if kinds:
        yield from kinds
        return
    seen: set[str] = set()
    defaults = loss_defaults(config)
    try:
        space = Space.of(config)
        space.check()
        for number, corner in enumerate(space.corners()):
            if number >= CORNERS_CHECKED:
                break
            rule = _refusal(config, corner, num_classes, defaults)
            if rule and rule not in seen:
                seen.add(rule)
                shown = {n: v for n, v in corner.items() if n in rule}
                yield _problem("space" if set(corner) & set(re.findall(r"\w+", rule)) else "loss", rule, shown)
        yield from _point_problems(config, space)
    except ValueError as error:  # a conditional range that is empty at some corner
        key, _, rule = str(error).partition(": ")
        yield _problem(key, rule)


def _refusal(
    config: PairConfig, params: Mapping[str, Scalar], num_classes: int, defaults: Mapping[str, Scalar] | None = None
) -> str:
    """The reason for which a training with these parameters would be refused; empty if it would not be."""
    from tune_topkd.loss import build_loss

    values = config.loss | loss_part(params)
    complete = dict(loss_defaults(config) if defaults is None else defaults) | values
    try:
        build_loss(config.method, complete)
        RecipeConfig.model_validate(config.recipe.model_dump() | {n: params[n] for n in set(params) - set(values)})
    except ValueError as error:
        return " ".join(str(error).split())
    k = complete["k"] if _has_top_k(config) else 1
    assert isinstance(k, int), "build_loss has checked it"
    return f"k must be at most {num_classes}, the number of classes, but got {k}" if k > num_classes else ""


def _kind_problems(config: SweepConfig) -> Iterator[Problem]:
    """Integer parameters whose range is not of integers, and boolean ones without a list of choices."""
    defaults = loss_defaults(config)
    for name, parameter in config.space.items():
        default = defaults.get(name)
        if isinstance(default, bool):
            if parameter.choices is None or not all(isinstance(c, bool) for c in parameter.choices):
                yield _problem(f"space.{name}", "must be a list of choices out of true, false")
        elif isinstance(default, int) and not _is_whole(name, parameter):
            yield _problem(f"space.{name}", "takes whole numbers: say `type: int`")


def _is_whole(name: str, parameter: ParameterRange) -> bool:
    if parameter.choices is not None:
        return all(isinstance(c, int) for c in parameter.choices)
    return parameter.type == "int" or (parameter.type is None and name in INTEGER_PARAMETERS)


def _points(config: SweepConfig) -> float:
    """The number of different trials that the space allows."""
    return math.prod(map(_values, Space.of(config).axes()))


def _values(axis: Axis) -> float:
    if axis.kind == "choice":
        return len(set(axis.choices))
    return axis.high - axis.low + 1 if axis.kind == "int" else 1 if axis.low == axis.high else math.inf


def _warnings(config: SweepConfig) -> Iterator[str]:
    from tune_topkd.data import data_notes
    from tune_topkd.data import dataset_info
    from tune_topkd.data import missing_data

    num_classes = dataset_info(config.data).num_classes
    k = config.space.get("k")
    fixed = config.loss.get("k", loss_defaults(config).get("k")) if _has_top_k(config) else None
    highest = k.high if k is not None and isinstance(k.high, float | int) else fixed
    if isinstance(highest, float | int) and not isinstance(highest, bool) and 2 * highest >= num_classes:
        yield f"k up to {highest:g} of {num_classes} classes can leave no class outside the Top-K groups"
    points = _points(config)
    if points < config.sweep.trials:
        repeated = f"{config.sweep.trials - points:,.0f} of {config.sweep.trials:,} trials repeat another"
        yield f"the space has {points:,.0f} points, so {repeated}, with the same seed and result"
    if missing := missing_data(config.data):
        yield f"the data is not there yet: {missing}"
    else:
        yield from data_notes(config.data)
    normalize = config.space.get("normalize")
    if config.method == "topkd" and normalize and normalize.choices and len(normalize.choices) > 1:
        yield (
            "normalize is searched, and unnormalised logits need other temperatures and learning rates: in one space with "
            "normalised ones most of their trials learn nothing (21 of 30 on digits); fix it under loss"
        )
    if "batch_size" in config.space and config.method == "topkd" and not config.loss.get("contrastive_batch"):
        yield (
            "the batch size is searched, and the contrastive loss depends on it; "
            "loss.contrastive_batch fixes the number of samples that it contrasts"
        )
