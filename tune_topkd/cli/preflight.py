"""What can be known to be wrong before anything starts: a config against the datasets, networks, losses and machine.

`config` checks what a YAML says by itself; here it meets the rooms it names. All problems are reported at once.
"""

import difflib
import errno
import importlib.util
import itertools
import math
import os
import re
import textwrap
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tune_topkd import machine
from tune_topkd.config import RECIPE_PARAMETERS
from tune_topkd.config import ConfigError
from tune_topkd.config import ModelConfig
from tune_topkd.config import Override
from tune_topkd.config import PairConfig
from tune_topkd.config import ParameterRange
from tune_topkd.config import Problem
from tune_topkd.config import RecipeConfig
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.config import load_config
from tune_topkd.config import load_pair
from tune_topkd.config import unknown_choice
from tune_topkd.space import Axis
from tune_topkd.space import Space

SPACES = "search_spaces"
"""The folder of the search spaces that have names."""

CORNERS_CHECKED = 4096  # all of a space of eleven ranges; of a larger one the first so many


@dataclass(frozen=True)
class Checked:
    """A config that has been found to fit, and what is worth saying about it."""

    config: SweepConfig
    source: str
    warnings: tuple[str, ...] = ()
    is_reviewed: bool = False
    """Whether it is one of the project's own spaces as it is: its warnings are known, and `check` tells them."""


def load_checked(source: str, overrides: Sequence[Override] = ()) -> Checked:
    """Read a search space and check it against the rooms it names.

    Args:
        source: a YAML's path, or the bare name of one in `search_spaces/`.
        overrides: values from the command line.

    Raises:
        ConfigError: with every problem found.
    """
    path = _space_path(source)
    config = _with_absolute_paths(load_config(path, overrides))
    if problems := [*_problems(config), *_idle_problems(config)]:
        raise ConfigError(str(path), problems)
    is_reviewed = not overrides and path.resolve().parent == _space_folders()[1]
    return Checked(config, str(path), tuple(_warnings(config)), is_reviewed)


def check_again(config: SweepConfig, source: str, begun_in: str | None) -> None:
    """Check the frozen config of a sweep against the rooms it names, as they are now.

    Args:
        config: with its files where they are now.
        source: stands in the error.
        begun_in: the working directory that the sweep was last driven from: a user's modules may lie there.

    Raises:
        ConfigError: with every problem found.
    """
    problems = list(_problems(config))
    if problems and begun_in is not None and begun_in != os.getcwd():
        problems.append(_problem("", f"the sweep was driven from {begun_in}: what it imports may be found there only"))
    if problems:
        raise ConfigError(source, problems)


def load_checked_pair(source: str, overrides: Sequence[Override] = ()) -> PairConfig:
    """Read a search space for a single training and check it, as `load_checked` does for a sweep.

    Raises:
        ConfigError: with every problem found.
    """
    path = _space_path(source)
    config = _with_absolute_paths(load_pair(path, overrides))
    if problems := list(_pair_problems(config)):
        raise ConfigError(str(path), problems)
    return config


_PairT = TypeVar("_PairT", bound=PairConfig)


def _with_absolute_paths(config: _PairT) -> _PairT:
    """The config with its files where they are now: trials run in other folders."""
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
    """Check that this machine has room for one trial, before Ray is started for it.

    Raises:
        ConfigError: it has not.
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
    """Make sure that files can be made in `folder`, which is made if need be.

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
    """Check the form of a tracking URI; whether anything answers there is the tracker's to find out.

    Raises:
        ConfigError: MLflow would keep no runs there.
    """
    from tune_topkd.tracking import masked
    from tune_topkd.tracking import uri_problem

    if rule := uri_problem(uri):
        raise ConfigError("--mlflow-uri", [_problem(masked(uri), rule)])


def loss_defaults(config: PairConfig) -> dict[str, Scalar]:
    """The defaults of the method's loss."""
    from tune_topkd.loss import loss_parameters

    return {name: value for name, value in loss_parameters(config.method).items() if isinstance(value, Scalar)}


def first_proposals(config: SweepConfig) -> list[dict[str, Scalar]]:
    """What a search tries before it draws anything: the defaults, as far as they are searched."""
    defaults = loss_defaults(config) | config.recipe.model_dump(include=set(RECIPE_PARAMETERS))
    return [{name: defaults[name] for name in config.space}] if set(config.space) <= set(defaults) else []


def space_names() -> list[str]:
    """The search spaces that can be had by their bare names: those beside the user and those of the checkout."""
    return sorted({path.stem for folder in _space_folders() for path in folder.glob("*.yaml")})


def _space_folders() -> tuple[Path, Path]:
    return Path(SPACES), Path(__file__).resolve().parents[2] / SPACES


def _space_path(source: str) -> Path:
    """Where a search space is: a path, or one of the spaces by name or file, from wherever the user is.

    Raises:
        ConfigError: nowhere; tells which there are.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = source if not path.suffix else path.stem if path.parts in ((path.name,), (SPACES, path.name)) else ""
    for folder in _space_folders():
        if name and (found := folder / f"{name}.yaml").exists():
            return found
    raise ConfigError(
        source, [_problem("", f"cannot be read: {os.strerror(errno.ENOENT)}; {_known_spaces(path.stem)}")]
    )


def _known_spaces(name: str) -> str:
    """The spaces there are, those with names like this one first; the others by their datasets."""
    names = space_names()
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    datasets = itertools.groupby(names, key=lambda known: known.partition("-")[0])
    lines = [
        textwrap.fill(", ".join(group), 110, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)
        for _, group in datasets
    ]
    return "\n".join([f"{hint}known by name:" if names else "known by name: none", *lines])


def _problem(key: str, rule: str, *value: object) -> Problem:
    return Problem(key=key, rule=rule, value=value[0] if value else None, has_value=bool(value))


def _problems(config: SweepConfig) -> Iterator[Problem]:
    problems = list(_pair_problems(config))
    yield from problems
    if problems:
        return
    num_classes = _num_classes(config)
    names = list(_space_name_problems(config))
    yield from names or _range_problems(config, num_classes)


def _idle_problems(config: SweepConfig) -> Iterator[Problem]:
    """What a new sweep would ask for in vain; one that has begun so may go on."""
    gpus = config.sweep.gpus_per_trial
    if not isinstance(gpus, str) and gpus > 1:
        rule = "must be at most 1: a trial trains on one GPU, and others of its own would idle; trials run side by side"
        yield _problem("sweep.gpus_per_trial", rule, gpus)


def _pair_problems(config: PairConfig) -> Iterator[Problem]:
    yield from _missing_packages(config)
    from tune_topkd.data import dataset_names

    if config.data.name not in dataset_names():
        yield _problem("data.name", unknown_choice(config.data.name, dataset_names()), config.data.name)
        return
    try:
        num_classes = _num_classes(config)
    except ValueError as error:
        yield _problem("data", str(error))
        return
    yield from _model_problems(config, num_classes)
    yield from _checkpoint_problems(config)
    yield from _loss_problems(config)


def _num_classes(config: PairConfig) -> int:
    from tune_topkd.data import dataset_info

    return dataset_info(config.data).num_classes


def _missing_packages(config: PairConfig) -> Iterator[Problem]:
    if config.data.name == "digits" and importlib.util.find_spec("sklearn") is None:
        yield _problem("data.name", "needs scikit-learn: pip install 'tune_topkd[sweep]'", config.data.name)


def _model_problems(config: PairConfig, num_classes: int) -> Iterator[Problem]:
    from tune_topkd.models import ModelNameError
    from tune_topkd.models import check_model

    models: dict[str, ModelConfig] = {"student": config.student}
    if config.teacher is not None:
        models = {"teacher": config.teacher.model} | models
    for key, model in models.items():
        try:
            check_model(model, num_classes=num_classes)
        except ModelNameError as error:
            yield _problem(f"{key}.name", str(error))
        except ValueError as error:
            yield _problem(f"{key}.kwargs", str(error), model.kwargs)


def _checkpoint_problems(config: PairConfig) -> Iterator[Problem]:
    given = {"teacher": config.teacher.checkpoint if config.teacher else None, "student": config.student.checkpoint}
    for key, checkpoint in given.items():
        if checkpoint is not None and not Path(checkpoint).is_file():
            yield _problem(f"{key}.checkpoint", "must be an existing file", checkpoint)


def _loss_problems(config: PairConfig) -> Iterator[Problem]:
    try:
        defaults = loss_defaults(config)
    except ValueError as error:  # a callable of the user's that cannot be had
        yield _problem("method", str(error))
        return
    unknown = [name for name in config.loss if name not in defaults]
    for name in unknown:
        rule = f"is no parameter of method {config.method}; {unknown_choice(name, defaults)}"
        yield _problem(f"loss.{name}", rule)
    if type(config) is PairConfig and not unknown and (rule := _refusal(config, {}, _num_classes(config))):
        yield _problem("loss", rule)


def _space_name_problems(config: SweepConfig) -> Iterator[Problem]:
    defaults = loss_defaults(config)
    for name in config.space:
        if name not in defaults and name not in RECIPE_PARAMETERS:
            known = [*defaults, *RECIPE_PARAMETERS]
            rule = f"is no parameter of method {config.method} or of the recipe; {unknown_choice(name, known)}"
            yield _problem(f"space.{name}", rule)


def _range_problems(config: SweepConfig, num_classes: int) -> Iterator[Problem]:
    """Build the loss at every corner of the space: what a trial would be refused for is found here."""
    k = config.space.get("k")
    if k is not None and k.choices is None and isinstance(k.high, float | int) and k.high > num_classes:
        rule = f"must be at most {num_classes}, the number of classes of {config.data.name}"
        yield _problem("space.k.high", rule, k.high)
        return
    kinds = list(_kind_problems(config))
    if kinds:
        yield from kinds
        return
    seen: set[str] = set()
    try:
        space = Space.of(config)
        space.check()
        for number, corner in enumerate(space.corners()):
            if number >= CORNERS_CHECKED:
                break
            rule = _refusal(config, corner, num_classes)
            if rule and rule not in seen:
                seen.add(rule)
                shown = {n: v for n, v in corner.items() if n in rule}
                yield _problem("space" if set(corner) & set(re.findall(r"\w+", rule)) else "loss", rule, shown)
    except ValueError as error:  # a conditional range that is empty at some corner
        key, _, rule = str(error).partition(": ")
        yield _problem(key, rule)


def _refusal(config: PairConfig, params: Mapping[str, Scalar], num_classes: int) -> str:
    from tune_topkd.loss import build_loss

    values = config.loss | {n: v for n, v in params.items() if n not in RECIPE_PARAMETERS}
    try:
        build_loss(config.method, loss_defaults(config) | values)
        RecipeConfig.model_validate(config.recipe.model_dump() | {n: params[n] for n in set(params) - set(values)})
    except ValueError as error:
        return " ".join(str(error).split())
    k = values.get("k", 1)
    assert isinstance(k, int), "build_loss has checked it"
    return f"k must be at most {num_classes}, the number of classes, but got {k}" if k > num_classes else ""


def _kind_problems(config: SweepConfig) -> Iterator[Problem]:
    """A whole-number parameter needs a range of whole numbers, and a yes/no one a choice."""
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
    return parameter.type == "int" or (parameter.type is None and name in ("k", "batch_size"))


def _points(config: SweepConfig) -> float:
    """How many different trials there can be."""
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
    fixed = config.loss.get("k", loss_defaults(config).get("k"))
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
    if "batch_size" in config.space and config.method == "topkd" and not config.loss.get("contrastive_batch"):
        yield (
            "the contrastive loss means another thing at each batch size, which is searched; "
            "loss.contrastive_batch fixes the number of samples it contrasts"
        )
