"""All that a search-space YAML may say, as pydantic models, and the one error for what it may not.

A YAML is read by `load_config`, which reports every problem it finds at once: file, key, value, rule, known choices.
What needs a look at data, networks or losses (class counts, model names) is checked by the command line's preflight.
"""

import difflib
import re
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from typing import Any
from typing import Literal
from typing import Self
from typing import TypeAlias
from typing import TypeVar
from typing import get_args

import yaml
from pydantic import AfterValidator
from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import ValidationError
from pydantic import field_validator
from pydantic import model_validator
from pydantic_core import ErrorDetails

Scalar: TypeAlias = bool | int | float | str
"""A value that a parameter of a loss or a recipe can take."""

Method = Literal["topkd", "kd", "dkd", "lskd", "kd+topkd", "dkd+topkd", "lskd+topkd", "ce"]
METHODS: tuple[str, ...] = get_args(Method)

INTEGER_PARAMETERS = frozenset({"k", "batch_size"})
"""Parameters whose range is of integers without saying `type: int`; every other range is of floats."""

SWEEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: where, and which rule it breaks."""

    key: str
    rule: str
    value: object = None
    has_value: bool = False

    def __str__(self) -> str:
        got = f" = {self.value!r}" if self.has_value else ""
        return f"{self.key}{got}: {self.rule}" if self.key else self.rule


class ConfigError(ValueError):
    """What the user wrote cannot be run; the message names the source and every problem found in it."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        assert problems, "a ConfigError needs at least one problem"
        self.source = source
        self.problems = tuple(problems)
        if len(problems) == 1:
            text = f"{source}: {problems[0]}"
        else:
            text = "\n".join([f"{source}: {len(problems)} problems", *(f"  {problem}" for problem in problems)])
        super().__init__(text)


def unknown_choice(value: str, known: Iterable[str]) -> str:
    """The rule text for a name that is not among the `known` ones, the near ones first."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


_ModelT = TypeVar("_ModelT", bound=BaseModel)
_ListT = TypeVar("_ListT", bound=list[Any])


def _each_once(value: _ListT) -> _ListT:
    if len(set(value)) < len(value):
        raise ValueError("must name each once")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=False)


class AugmentConfig(_Section):
    """Random views of a training image: zero-pad by `pad`, crop back at a random offset, flip left to right."""

    pad: int = Field(0, ge=0, le=64)
    flip: bool = False


class DataConfig(_Section):
    """A dataset by name and how it is split; the split is stratified and a function of `split_seed`."""

    name: str
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the images that a trial may be chosen by."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share kept back for the final evaluation, where the dataset has no test set of its own."""
    split_seed: int = Field(0, ge=0)
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _some_left_to_train_on(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction + test_fraction must be below 1, but got {self.val_fraction:g} + {self.test_fraction:g}"
            )
        return self


class ModelConfig(_Section):
    """A network by name; `kwargs` go to its constructor. A bare name may stand for the whole section."""

    name: str
    kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class RecipeConfig(_Section):
    """How a network is trained: stochastic gradient descent with a learning-rate schedule by epoch."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: list[float] = Field(default_factory=lambda: [0.625, 0.75, 0.875])
    """Epochs after which the learning rate is multiplied by `gamma`; below 1 they are shares of `epochs`.
    The default is the field's 150, 180, 210 of 240."""
    gamma: float = Field(0.1, gt=0, le=1)

    @field_validator("milestones")
    @classmethod
    def _rising(cls, value: list[float]) -> list[float]:
        if any(v <= 0 for v in value) or sorted(value) != value or (value and (value[0] < 1) != (value[-1] < 1)):
            raise ValueError("must rise, be positive, and be all shares below 1 or all epochs")
        return value

    def milestone_epochs(self) -> list[int]:
        """The milestones as whole epochs, those that fall together counted once each."""
        return [round(m * self.epochs) if m < 1 else int(m) for m in self.milestones]


class TeacherConfig(_Section):
    """The network that teaches: given as a `checkpoint`, or trained once with cross-entropy by `recipe`."""

    name: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str | None = None
    """Path of a checkpoint to load; relative paths are relative to the working directory."""
    recipe: RecipeConfig | None = None
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.checkpoint is None) == (self.recipe is None):
            raise ValueError("exactly one of checkpoint and recipe must be given")
        return self

    @property
    def model(self) -> ModelConfig:
        """The network without where its weights come from."""
        return ModelConfig(name=self.name, kwargs=self.kwargs)


class ParameterRange(_Section):
    """The values one parameter may take: `low` to `high`, both included, or a list of `choices`.

    A bound may be the name of another parameter of the space: `high: scale_top`.
    """

    low: float | str | None = None
    high: float | str | None = None
    log: bool = False
    """Draw uniformly in the logarithm; both bounds must then be positive."""
    type: Literal["int", "float"] | None = None
    choices: list[Scalar] | None = None

    @field_validator("choices")
    @classmethod
    def _distinct(cls, value: list[Scalar] | None) -> list[Scalar] | None:
        if value is not None and (not value or len(set(value)) < len(value)):  # 1, 1.0 and true are the same to Optuna
            raise ValueError("choices must be at least one value, each once")
        return value

    @model_validator(mode="before")
    @classmethod
    def _bare_list(cls, value: Any) -> Any:
        if isinstance(value, bool | int | float | str) or value is None:
            raise ValueError(
                "must be {low: …, high: …} or a list of choices; a fixed value belongs under loss or recipe"
            )
        return {"choices": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.type:
                raise ValueError("choices cannot be combined with low, high, log or type")
            return self
        if self.low is None or self.high is None:
            raise ValueError("both low and high must be given (inclusive), or a list of choices")
        bounds = [b for b in (self.low, self.high) if not isinstance(b, str)]
        if self.log and any(b <= 0 for b in bounds):
            raise ValueError(f"log: true needs bounds above 0, but got {min(bounds):g}")
        if len(bounds) == 2 and bounds[0] > bounds[1]:
            raise ValueError(f"low <= high must hold, but got low = {bounds[0]:g}, high = {bounds[1]:g}")
        return self

    def bound_names(self) -> list[str]:
        """The parameters this range's bounds name."""
        return [b for b in (self.low, self.high) if isinstance(b, str)]


class RelativeConfig(_Section):
    """Loss weights that are drawn freely and then scaled to a fixed `sum`, so that only their ratios are searched.

    Under SGD the sum of the weights multiplies the step size: without this a search over weights is partly a search
    over the learning rate.
    """

    sum: float = Field(3.0, gt=0)
    of: Annotated[list[str], AfterValidator(_each_once)] = Field(min_length=2)


class AshaConfig(_Section):
    """Asynchronous successive halving (Li et al., arXiv 1810.05934) on the epoch.

    Rungs are at `grace_epochs` × `reduction_factor`^i; at each the best 1 / `reduction_factor` go on.
    """

    grace_epochs: int = Field(3, ge=1)
    reduction_factor: int = Field(3, ge=2)


class BaselinesConfig(_Section):
    """What the tuned student is compared with: each method at its defaults, with the recipe's part of the space.

    Each method gets `trials` runs over the same learning-rate range that the search has, all to the full budget.
    """

    methods: Annotated[list[Literal["ce", "kd"]], AfterValidator(_each_once)] = ["ce", "kd"]
    trials: int = Field(6, ge=1)


class SweepSettings(_Section):
    """How the search is run."""

    trials: int = Field(32, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    asha: AshaConfig | None = AshaConfig()
    """`null` lets every trial run to the end."""
    startup_trials: int = Field(10, ge=1)
    """Random proposals before Optuna's TPE takes over; the first one of all is the defaults."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at once; by default as many as the cluster has room for."""
    cpus_per_trial: float = Field(1.0, gt=0)
    gpus_per_trial: float = Field(0.0, ge=0)
    """May be a fraction: 0.25 lets four trials share a GPU."""
    max_failures: int = Field(3, ge=0)
    """Times that a trial whose worker died is started again from its last checkpoint."""
    time_budget: float | None = Field(None, gt=0)
    """Seconds after which no trial goes on; the sweep can be resumed."""

    @field_validator("gpus_per_trial")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("must be a fraction up to 1 or a whole number")
        return value


class SweepConfig(_Section):
    """One (dataset, teacher, student) and the space to search for it."""

    description: str = ""
    data: DataConfig
    teacher: TeacherConfig
    student: ModelConfig
    method: Method = "topkd"
    loss: dict[str, Scalar] = Field(default_factory=dict)
    """Fixed parameters of the loss; what neither this nor the space names has the method's default."""
    recipe: RecipeConfig
    space: dict[str, ParameterRange] = Field(min_length=1)
    relative: RelativeConfig | None = None
    sweep: SweepSettings = SweepSettings()
    baselines: BaselinesConfig | None = BaselinesConfig()


class TrialConfig(_Section):
    """All that one training needs: what `train` is called with."""

    data: DataConfig
    student: ModelConfig
    teacher: ModelConfig | None = None
    teacher_checkpoint: str | None = None
    """Absolute path of the teacher's weights; needed by every method but `ce`."""
    method: Method = "topkd"
    loss: dict[str, Scalar] = Field(default_factory=dict)
    recipe: RecipeConfig
    seed: int = Field(0, ge=0)


RECIPE_PARAMETERS = ("lr", "momentum", "weight_decay", "batch_size", "gamma")
"""The fields of a recipe that a space may search."""


@dataclass(frozen=True)
class Override:
    """A value that replaces one of the YAML's: the dotted `key`, and the option it `came_from`."""

    key: str
    value: object
    came_from: str


def parse_set(text: str) -> Override:
    """Turn `key=value` of `--set` into an `Override`; the value is read as YAML.

    Raises:
        ConfigError: if there is no `=`, no key, or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
        raise ConfigError("--set", [Problem(key=text, rule="must read key=value, the key dotted: recipe.epochs=10")])
    try:
        return Override(key.strip(), yaml.load(value, Loader=_Loader), f"--set {text}")  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError("--set", [Problem(key=text, rule=f"the value is no YAML: {_one_line(error)}")]) from error


def load_config(path: Path | str, overrides: Sequence[Override] = ()) -> SweepConfig:
    """Read a search-space YAML.

    Args:
        path: the file.
        overrides: values that replace those of the file, applied in order.

    Raises:
        ConfigError: the file is missing or no YAML, or a key or value breaks a rule; all such problems at once.
    """
    raw = read_yaml(path)
    for override in overrides:
        _apply(raw, override, str(path))
    return _validated(raw, str(path), overrides)


def config_from(raw: Mapping[str, Any], source: str) -> SweepConfig:
    """A config from plain data, as `load_config` does from a file; `source` stands in the error."""
    return _validated(raw, source, ())


def dump_config(config: BaseModel) -> str:
    """The config as YAML, complete: every default is written out."""
    content = config.model_dump(mode="json")
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file; duplicate keys and anything but a mapping are errors.

    Raises:
        ConfigError: names the file and what is wrong with it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        known = _known_spaces() if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(str(path), [Problem(key="", rule=f"cannot be read: {reason}{known}")]) from error
    try:
        raw = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [Problem(key="", rule=f"is no valid YAML: {_one_line(error)}")]) from error
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ConfigError(str(path), [Problem(key="", rule="must be a mapping of keys to values")])
    return raw


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.2, and what people mean) and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is written twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # such as the date 2026-02-31
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `_Loader` would read as a number: a digest may be 12345678e9012345."""


for _either in (_Loader, _Dumper):
    _either.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _known_spaces() -> str:
    known = sorted(p.name for p in Path("search_spaces").glob("*.yaml"))
    return f"; known in search_spaces/: {', '.join(known)}" if known else ""


def _apply(raw: dict[str, Any], override: Override, source: str) -> None:
    *parents, last = override.key.split(".")
    target: Any = raw
    for depth, parent in enumerate(parents, start=1):
        section = target.get(parent)
        if section is None:
            section = target[parent] = {}
        elif isinstance(section, str) and parents[:depth] == ["student"]:  # a bare name stands for the section
            section = target[parent] = {"name": section}
        if not isinstance(section, dict):
            key = ".".join(parents[:depth])
            raise ConfigError(source, [Problem(key=override.came_from, rule=f"{key} is a value, not a section")])
        target = section
    target[last] = override.value


def validated(model: type[_ModelT], raw: object, source: str, overrides: Sequence[Override] = ()) -> _ModelT:
    """Plain data as one of the models of this project's files.

    Raises:
        ConfigError: a key or value breaks a rule of the model; all such problems at once, with `source`.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        by_key: dict[str, list[ErrorDetails]] = {}  # a union tells for each of its types
        for details in error.errors():
            by_key.setdefault(_key(details), []).append(details)
        problems = [_problem(key, same, model) for key, same in by_key.items()]
        raise ConfigError(source, _with_origin(problems, overrides)) from error


def _validated(raw: Mapping[str, Any], source: str, overrides: Sequence[Override]) -> SweepConfig:
    config = validated(SweepConfig, raw, source, overrides)
    problems = [*_space_problems(config), *_recipe_problems(config)]
    if problems:
        raise ConfigError(source, _with_origin(problems, overrides))
    return config


def _with_origin(problems: Sequence[Problem], overrides: Sequence[Override]) -> list[Problem]:
    last = {override.key: override.came_from for override in overrides}
    found = []
    for problem in problems:
        origins = [o for key, o in last.items() if f"{problem.key}.".startswith(f"{key}.")]
        origins += [o for key, o in last.items() if key.startswith(f"{problem.key}.")]
        key = f"{problem.key} (from {', '.join(origins)})" if origins else problem.key
        found.append(Problem(key=key, rule=problem.rule, value=problem.value, has_value=problem.has_value))
    return found


_UNION_TAGS = {"float": "a number", "int": "a number", "str": "text", "bool": "true/false"}
_KEY_TAG = "[key]"


def _key(details: ErrorDetails) -> str:
    return ".".join(str(part) for part in details["loc"] if part not in (*_UNION_TAGS, _KEY_TAG))


def _problem(key: str, same: Sequence[ErrorDetails], root: type[BaseModel]) -> Problem:
    details = next((d for d in same if d["type"] == "finite_number"), same[0])
    loc, kind, value = details["loc"], details["type"], details["input"]
    if kind == "extra_forbidden":
        return Problem(key=key, rule=f"unknown key; {unknown_choice(str(loc[-1]), _fields_at(root, loc[:-1]))}")
    if kind == "missing":
        return Problem(key=key, rule="is required but missing")
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", str(details["ctx"]["expected"]))
        return Problem(key=key, rule=unknown_choice(str(value), known), value=value, has_value=True)
    if loc and loc[-1] == _KEY_TAG:
        rule = "a key must be text"
    elif kind in ("model_type", "dict_type"):
        rule = "must be a mapping of keys to values"
    elif len(same) > 1 and kind != "finite_number":
        rule = f"must be {' or '.join(dict.fromkeys(_UNION_TAGS[str(d['loc'][-1])] for d in same))}"
    else:
        rule = re.sub(r"^(Value error|Assertion failed), ", "", details["msg"])
        rule = re.sub(r"^(Input|List|Dictionary) should", "must", rule)
    return Problem(key=key, rule=rule, value=value, has_value=not isinstance(value, dict | BaseModel))


def _fields_at(root: type[BaseModel], loc: Sequence[object]) -> list[str]:
    model: Any = root
    for part in loc:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else model
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)


def _space_problems(config: SweepConfig) -> list[Problem]:
    problems = []
    numbers = {name for name, r in config.space.items() if r.choices is None}
    for name, parameter in config.space.items():
        for bound in parameter.bound_names():
            if bound not in numbers or bound == name:
                others = sorted(numbers - {name})
                rule = f"a bound must be a number or the name of another range of the space; {unknown_choice(bound, others)}"
                problems.append(Problem(key=f"space.{name}", rule=rule, value=bound, has_value=True))
            elif name in RECIPE_PARAMETERS and bound not in RECIPE_PARAMETERS:
                rule = "a range of the recipe, which the baselines search too, cannot be bound to one of the loss"
                problems.append(Problem(key=f"space.{name}", rule=rule, value=bound, has_value=True))
        if name in config.loss:
            problems.append(Problem(key=f"loss.{name}", rule="is both fixed here and searched under space; choose one"))
        kind_int = _is_integer(name, parameter)
        for side in ("low", "high"):
            bound = getattr(parameter, side)
            if kind_int and isinstance(bound, float) and bound != int(bound):
                problems.append(
                    Problem(key=f"space.{name}.{side}", rule="must be a whole number", value=bound, has_value=True)
                )
    if not problems and (cycle := _cycle(config.space)):
        problems.append(
            Problem(key=f"space.{cycle[0]}", rule=f"bounds name one another in a circle: {' → '.join(cycle)}")
        )
    if config.relative:
        problems += _relative_problems(config, config.relative)
    return problems


def _is_integer(name: str, parameter: ParameterRange) -> bool:
    return parameter.type == "int" or (parameter.type is None and name in INTEGER_PARAMETERS)


def _cycle(space: Mapping[str, ParameterRange]) -> list[str]:
    for start in space:
        paths = [[start, name] for name in space[start].bound_names()]
        seen: set[str] = set()
        while paths:
            path = paths.pop()
            if path[-1] == start:
                return path
            if path[-1] not in seen:
                seen.add(path[-1])
                paths += [[*path, name] for name in space[path[-1]].bound_names()]
    return []


def _relative_problems(config: SweepConfig, relative: RelativeConfig) -> list[Problem]:
    problems = []
    for name in relative.of:
        parameter = config.space.get(name)
        if parameter is None:
            rule = f"each must be a range of the space; {unknown_choice(name, config.space)}"
            problems.append(Problem(key="relative.of", rule=rule, value=name, has_value=True))
        elif name in RECIPE_PARAMETERS or parameter.choices is not None or _is_integer(name, parameter):
            rule = "a relative weight must be a range of floats, and of the loss"
            problems.append(Problem(key=f"space.{name}", rule=rule))
        elif isinstance(parameter.low, str) or parameter.low is None or parameter.low <= 0:
            rule = "a relative weight must be above 0"
            problems.append(Problem(key=f"space.{name}.low", rule=rule, value=parameter.low, has_value=True))
    for name, parameter in config.space.items():
        for bound in parameter.bound_names():
            if (name in relative.of) != (bound in relative.of):
                rule = "a bound cannot lead into or out of relative.of: scaling would break it"
                problems.append(Problem(key=f"space.{name}", rule=rule, value=bound, has_value=True))
    return problems


def _recipe_problems(config: SweepConfig) -> list[Problem]:
    problems = []
    recipes = {"recipe": config.recipe, "teacher.recipe": config.teacher.recipe}
    for key, recipe in recipes.items():
        if recipe and recipe.schedule == "step" and any(m >= recipe.epochs for m in recipe.milestones):
            rule = f"a milestone lies at or after the last epoch ({recipe.epochs}); shares below 1 follow the epochs"
            problems.append(Problem(key=f"{key}.milestones", rule=rule, value=recipe.milestones, has_value=True))
    asha = config.sweep.asha
    if asha and asha.grace_epochs > config.recipe.epochs:
        rule = f"must be at most recipe.epochs = {config.recipe.epochs}"
        problems.append(Problem(key="sweep.asha.grace_epochs", rule=rule, value=asha.grace_epochs, has_value=True))
    return problems
