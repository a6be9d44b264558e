"""The one error for what a user wrote and cannot be run."""

import difflib
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass

from tune_topkd.errors import TuneTopKDError


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


class ConfigError(TuneTopKDError):
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


@dataclass(frozen=True)
class Override:
    """A value that replaces one of the YAML's: the dotted `key`, and the option it `came_from`."""

    key: str
    value: object
    came_from: str
