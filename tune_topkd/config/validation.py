"""From plain data to the models, or to one `ConfigError` with every problem found."""

import re
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TypeVar
from typing import get_args
from typing import get_origin

from pydantic import BaseModel
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tune_topkd.config.errors import ConfigError
from tune_topkd.config.errors import Override
from tune_topkd.config.errors import Problem
from tune_topkd.config.errors import unknown_choice
from tune_topkd.config.rules import problems_of_new_sweep
from tune_topkd.config.rules import problems_of_pair
from tune_topkd.config.rules import problems_of_sweep
from tune_topkd.config.sections import PairConfig
from tune_topkd.config.sections import SweepConfig

_ModelT = TypeVar("_ModelT", bound=BaseModel)


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


def validated_sweep(
    raw: Mapping[str, Any], source: str, overrides: Sequence[Override], *, is_new: bool = False
) -> SweepConfig:
    """Plain data as a `SweepConfig` whose sections fit together.

    Args:
        raw: the data.
        source: stands in the error.
        overrides: where values of it come from, for the error.
        is_new: the sweep has not begun, so the rules hold that a sweep of an older version may break.

    Raises:
        ConfigError: as `validated`; also if a rule between sections is broken.
    """
    config = validated(SweepConfig, raw, source, overrides)
    if problems := [*problems_of_sweep(config), *(problems_of_new_sweep(config) if is_new else [])]:
        raise ConfigError(source, _with_origin(problems, overrides))
    return config


def validated_pair(raw: Mapping[str, Any], source: str, overrides: Sequence[Override]) -> PairConfig:
    """Plain data as a `PairConfig`, what a `SweepConfig` has besides left out, whose sections fit together.

    Raises:
        ConfigError: as `validated_sweep`.
    """
    only_sweeps = SweepConfig.model_fields.keys() - PairConfig.model_fields.keys()
    searched = [o for o in overrides if o.key.partition(".")[0] in only_sweeps and o.came_from.startswith("--")]
    if searched:
        rule = "a single training searches nothing; loss.NAME and recipe.NAME fix its parameters"
        raise ConfigError(source, [Problem(key=searched[0].came_from, rule=rule)])
    config = validated(PairConfig, {k: v for k, v in raw.items() if k not in only_sweeps}, source, overrides)
    if problems := problems_of_pair(config):
        raise ConfigError(source, _with_origin(problems, overrides))
    return config


def _with_origin(problems: Sequence[Problem], overrides: Sequence[Override]) -> list[Problem]:
    last = {override.key: override.came_from for override in overrides}
    found = []
    for problem in problems:
        origins = [o for key, o in last.items() if f"{problem.key}.".startswith(f"{key}.")]
        origins += [o for key, o in last.items() if key.startswith(f"{problem.key}.")]
        key = f"{problem.key} (from {', '.join(dict.fromkeys(origins))})" if origins else problem.key
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
        near = [f"{known!r}" for known in sorted(_keys_ending_in(root, str(loc[-1])), key=_depth)]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        choices = _fields_at(root, loc[:-1])
        rule = f"{hint}known: {', '.join(sorted(choices))}" if near else unknown_choice(str(loc[-1]), choices)
        return Problem(key=key, rule=f"unknown key; {rule}")
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


def _depth(key: str) -> int:
    return key.count(".")


def _keys_ending_in(model: type[BaseModel], name: str, parent: str = "") -> Iterator[str]:
    """The dotted keys of a model's sections whose last part is this name."""
    for field, info in model.model_fields.items():
        if field == name:
            yield f"{parent}{field}"
        below = f"{parent}{field}.NAME." if get_origin(info.annotation) is dict else f"{parent}{field}."
        for inner in (info.annotation, *get_args(info.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _keys_ending_in(inner, name, below)


def _fields_at(root: type[BaseModel], loc: Sequence[object]) -> list[str]:
    model: Any = root
    for part in loc:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else model
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)
