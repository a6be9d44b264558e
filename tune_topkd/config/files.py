"""Search-space YAMLs: reading with `extends:` and overrides, and writing."""

import re
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NoReturn

import yaml
from pydantic import BaseModel

from tune_topkd.config.errors import ConfigError
from tune_topkd.config.errors import Override
from tune_topkd.config.errors import Problem
from tune_topkd.config.errors import unknown_choice
from tune_topkd.config.sections import PairConfig
from tune_topkd.config.sections import SweepConfig
from tune_topkd.config.validation import validated_pair
from tune_topkd.config.validation import validated_sweep

EXTENDS = "extends"

MOST_BYTES = 2**20
"""Of a YAML that is read: the largest config is a hundredth of it."""
MOST_VALUES = 10_000
"""In a YAML, each alias counted as all that it stands for: a few lines of aliases can stand for billions."""
MOST_LEVELS = 64
"""Of mappings and lists within one another."""


def parse_set(text: str) -> Override:
    """Turn `key=value` of `--set` into an `Override`; the value is read as YAML.

    Raises:
        ConfigError: if there is no `=`, no key, or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
        raise ConfigError("--set", [Problem(key=text, rule="must read key=value, the key dotted: recipe.epochs=10")])
    try:
        return Override(key.strip(), _parsed(value), f"--set {text}")
    except yaml.YAMLError as error:
        raise ConfigError("--set", [Problem(key=text, rule=f"the value is no YAML: {_one_line(error)}")]) from error


def load_config(path: Path | str, overrides: Sequence[Override] = ()) -> SweepConfig:
    """Read a search-space YAML for a new sweep.

    `extends: other.yaml` (or a list of files), relative to the file that says so, starts from those: mappings are
    merged key by key, everything else is replaced, later files win and the file itself wins over all. A `null` in
    `space` or `loss` takes an entry away.

    Args:
        path: the file.
        overrides: values that replace those of the file, applied in order; None takes an entry of `space` or `loss` away,
            which must be there.

    Raises:
        ConfigError: the file is missing or no YAML, or a key or value breaks a rule; all such problems at once.
    """
    raw, origins = _overridden(path, overrides)
    return validated_sweep(raw, str(path), origins, is_new=True)


def load_pair(path: Path | str, overrides: Sequence[Override] = ()) -> PairConfig:
    """Read a search-space YAML for a single training, which its space does not concern; as `load_config` otherwise.

    Raises:
        ConfigError: as `load_config`; also if an override sets what only a sweep has.
    """
    raw, origins = _overridden(path, overrides)
    return validated_pair(raw, str(path), origins)


def pair_from(raw: Mapping[str, Any], source: str, overrides: Sequence[Override] = ()) -> PairConfig:
    """The config of a single training from plain data; `source` stands in the error.

    Raises:
        ConfigError: a key or value breaks a rule; all such problems at once.
    """
    return validated_pair(_applied(raw, source, overrides), source, list(overrides))


def _overridden(path: Path | str, overrides: Sequence[Override]) -> tuple[dict[str, Any], list[Override]]:
    raw, inherited = _extended(Path(path), ())
    for override in overrides:
        _apply(raw, override, str(path))
    origins = [
        Override(key, None, file)
        for key, file in inherited.items()
        if file != str(path) and not any(f"{key}.".startswith(f"{override.key}.") for override in overrides)
    ]
    return raw, [*origins, *overrides]


def config_from(raw: Mapping[str, Any], source: str, overrides: Sequence[Override] = ()) -> SweepConfig:
    """The config of a sweep that has begun, from plain data; `source` stands in the error.

    Raises:
        ConfigError: a key or value breaks a rule; all such problems at once.
    """
    return validated_sweep(_applied(raw, source, overrides), source, overrides)


def new_config(raw: Mapping[str, Any], source: str, overrides: Sequence[Override] = ()) -> SweepConfig:
    """The config of a new sweep from plain data, as `load_config` does from a file; `source` stands in the error.

    Raises:
        ConfigError: a key or value breaks a rule; all such problems at once.
    """
    return validated_sweep(_applied(raw, source, overrides), source, overrides, is_new=True)


def _applied(raw: Mapping[str, Any], source: str, overrides: Sequence[Override]) -> dict[str, Any]:
    content: dict[str, Any] = _unshared(dict(raw))
    for override in overrides:
        _apply(content, override, source)
    return content


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
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8") if len(content) <= MOST_BYTES else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(str(path), [Problem(key="", rule=f"cannot be read: {reason}")]) from error
    if len(content) > MOST_BYTES:
        raise ConfigError(str(path), [Problem(key="", rule=f"is no config: it has more than {MOST_BYTES:,} bytes")])
    try:
        raw = _parsed(text)
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [Problem(key="", rule=f"is no valid YAML: {_one_line(error)}")]) from error
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ConfigError(str(path), [Problem(key="", rule="must be a mapping of keys to values")])
    return raw


def _parsed(text: str) -> Any:
    """What a YAML says, in bounds of size and depth, each value its own object.

    Raises:
        yaml.YAMLError: it is no YAML, or beyond the bounds.
    """
    return _unshared(yaml.load(text, Loader=_Loader))  # noqa: S506 (a SafeLoader)


def _unshared(value: Any) -> Any:
    """A copy in which no two places are one object, as a YAML's anchors and aliases make them."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.2, and what people mean) and refuses a key written twice.

    It keeps to `MOST_VALUES` and `MOST_LEVELS`, and knows so before anything is copied out of an alias.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._level = 0
        self._extents: dict[int, tuple[int, int]] = {}  # of each composed node: its values and its levels

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose as ever; a node is refused as soon as it, or all nodes so far, are beyond the bounds."""
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        self._check(len(self._extents), self._level, event)
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        assert node is not None, "compose_node gives a node wherever there is an event"
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._extents:  # it is not composed to its end
                self._refuse(f"the alias {event.anchor!r} lies within what it stands for", event)
        else:
            self._extents[id(node)] = self._extent(node)
        self._check(*self._extents[id(node)], event)
        return node

    def _extent(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 0
        inner = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        extents = [self._extents[id(n)] for n in inner]
        return 1 + sum(values for values, _ in extents), 1 + max((levels for _, levels in extents), default=0)

    def _check(self, values: int, levels: int, event: yaml.Event) -> None:
        if values > MOST_VALUES:
            self._refuse(f"stands for more than {MOST_VALUES:,} values, aliases counted as what they stand for", event)
        if levels > MOST_LEVELS:
            self._refuse(f"goes more than {MOST_LEVELS} levels deep", event)

    def _refuse(self, problem: str, event: Any) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)

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


def _extended(path: Path, below: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping of a file over those it extends, and the file that each dotted key of it was read from."""
    raw = read_yaml(path)
    parents = raw.pop(EXTENDS, [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        rule = "must be the path of a YAML, relative to this one, or a list of them"
        raise ConfigError(str(path), [Problem(key=EXTENDS, rule=rule, value=parents, has_value=True)])
    seen = (*below, path.resolve())
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for parent in parents:
        other = path.parent / parent
        if other.resolve() in seen:
            raise ConfigError(str(path), [Problem(key=EXTENDS, rule=f"goes in a circle: {parent} extends this file")])
        if not other.is_file():
            rule = f"must be an existing file, relative to {path.parent}"
            raise ConfigError(str(path), [Problem(key=EXTENDS, rule=rule, value=parent, has_value=True)])
        _merge(merged, origins, *_extended(other, seen))
    _merge(merged, origins, raw, dict.fromkeys(_leaves(raw), str(path)))
    return merged, origins


def _merge(into: dict[str, Any], origins: dict[str, str], raw: Mapping[str, Any], its: Mapping[str, str]) -> None:
    replaced = _merged(into, raw, "")
    for key in [k for k in origins if any(f"{k}.".startswith(f"{r}.") for r in replaced)]:
        del origins[key]
    origins.update(its)


def _merged(into: dict[str, Any], raw: Mapping[str, Any], parent: str) -> list[str]:
    """Merge `raw` into `into`; the dotted keys whose old values are gone."""
    replaced = []
    for name, value in raw.items():
        key = f"{parent}{name}"
        there = into.get(name)
        if isinstance(value, dict) and isinstance(there, dict):
            replaced += _merged(there, value, f"{key}.")
        elif value is None and parent in _TAKE_AWAY:
            into.pop(name, None)
            replaced.append(key)
        else:
            into[name] = value
            replaced.append(key)
    return replaced


_TAKE_AWAY = ("space.", "loss.")


def _leaves(raw: Mapping[str, Any], parent: str = "") -> Iterator[str]:
    for name, value in raw.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{parent}{name}.")
        elif value is not None or parent not in _TAKE_AWAY:
            yield f"{parent}{name}"


_BY_BARE_NAME = ("student", "sweep.sampler", "sweep.scheduler")
"""Sections that a bare name may stand for."""


def _apply(raw: dict[str, Any], override: Override, source: str) -> None:
    *parents, last = override.key.split(".")
    target: Any = raw
    for depth, parent in enumerate(parents, start=1):
        section = target.get(parent)
        if section is None:
            section = target[parent] = {}
        elif isinstance(section, str) and ".".join(parents[:depth]) in _BY_BARE_NAME:
            section = target[parent] = {"name": section}
        if not isinstance(section, dict):
            key = ".".join(parents[:depth])
            raise ConfigError(source, [Problem(key=override.came_from, rule=f"{key} is a value, not a section")])
        target = section
    if override.value is None and override.key.startswith(_TAKE_AWAY) and len(parents) == 1:
        if last not in target:
            rule = f"{parents[0]} has no entry {last!r} to take away; {unknown_choice(last, target)}"
            raise ConfigError(source, [Problem(key=override.came_from, rule=rule)])
        del target[last]
    else:
        target[last] = override.value
