"""Which keys of a config say where something is or how it is run, and never what comes out.

Such a field is marked where it is declared: `root: Annotated[str | None, WHERE] = None`. Whatever names a result (a digest,
a teacher's key, a bank's name, a checkpoint's config) asks here, so no list of exceptions exists anywhere.
"""

import typing
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Placement:
    """Marks a field whose value changes no result."""

    has_content: bool = False
    """Whether it is the path of a file whose content does."""
    must_exist: bool = False
    """Whether it is a path that a trial needs."""


@dataclass(frozen=True)
class Later:
    """Marks a field that came after files were named by their configs: None gives the results of the versions before."""


LATER = Later()
WHERE = Placement()
PATH = Placement(must_exist=True)
FILE = Placement(has_content=True, must_exist=True)


def placements(section: type[BaseModel]) -> dict[str, Placement]:
    """The fields of a section and those within it that say where, by dotted key, in the order they are declared."""
    return {key: mark for key, mark in _marked(section, "") if isinstance(mark, Placement)}


def _marked(section: type[BaseModel], parent: str) -> Iterator[tuple[str, Placement | Later]]:
    for name, field in section.model_fields.items():
        yield from ((f"{parent}{name}", mark) for mark in field.metadata if isinstance(mark, Placement | Later))
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _marked(kind, f"{parent}{name}.")


def what(section: BaseModel) -> dict[str, Any]:
    """A section as JSON can hold it, without the keys that change no result; a file's content is for the caller to add."""
    content, marked = section.model_dump(mode="json"), _marked(type(section), "")
    left_out = (key for key, mark in marked if isinstance(mark, Placement) or value_at(content, key) is None)
    return without(content, left_out)


def without(content: Mapping[str, Any], keys: typing.Iterable[str]) -> dict[str, Any]:
    """Plain data without these dotted keys; it may lack them."""
    left = dict(content)
    for key in keys:
        first, _, rest = key.partition(".")
        if not rest:
            left.pop(first, None)
        elif isinstance(left.get(first), Mapping):
            left[first] = without(left[first], [rest])
    return left


def value_at(content: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of plain data; None if there is none."""
    value: Any = content
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
