"""What the formats of several files share: their opening, the file with the loss, values as YAML."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from tune_topkd.config import ConfigError
from tune_topkd.config import ModelConfig
from tune_topkd.config import Problem
from tune_topkd.export.tuned import TunedConfig
from tune_topkd.export.writers import as_python
from tune_topkd.export.writers import figures
from tune_topkd.export.writers import pair

LOSS_FILE = "tuned.py"
"""The loss and its values: what the format `python` writes."""
FILL_IN = "FILL IN"
"""What marks a place that has to be filled in."""


def loss_file(tuned: TunedConfig) -> dict[str, str]:
    """The file that each of the formats has beside its own."""
    return {LOSS_FILE: as_python(tuned)}


def opening(tuned: TunedConfig, what: str, use: Sequence[str], to_fill_in: Sequence[str]) -> str:
    """What a file says of itself.

    Args:
        tuned: what it is of.
        what: the file is, such as `a training script`.
        use: the lines to type.
        to_fill_in: what the user has to.
    """
    evidence = tuned.evidence
    lines = [
        f"{tuned.method} tuned for {pair(tuned)} on {tuned.data.name}: {what}.",
        "",
        f"From sweep {evidence.sweep}, trial {evidence.trial}: validation top-1 {figures(evidence)}.",
        "",
        *(f"    {line}" for line in use),
    ]
    filled = (
        [f"To fill in, marked {FILL_IN}: {'; '.join(to_fill_in)}."] if to_fill_in else ["Nothing is to be filled in."]
    )
    return "\n".join([*lines, "", *(line for text in filled for line in textwrap.wrap(text, 115))])


def as_comments(text: str, indent: int = 0) -> str:
    """Lines of text as comments of YAML or Python."""
    return "\n".join(f"{' ' * indent}# {line}".rstrip() for line in text.splitlines())


def flow(value: Any) -> str:
    """A value as YAML on one line, which every loader reads as the same type."""
    return yaml.safe_dump(
        [value], default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False
    ).strip()[1:-1]


def of_the_student(tuned: TunedConfig) -> list[str]:
    """What the sweep did with its student and no export does, in words."""
    student = tuned.student
    begun = ["the student began with the weights of a checkpoint, all but its head's"] if student.checkpoint else []
    return begun + (["only the student's head was trained"] if student.linear_probe else [])


def the_teacher(tuned: TunedConfig, format_: str) -> ModelConfig:
    """The teacher.

    Raises:
        ConfigError: the sweep had none.
    """
    if tuned.teacher is None:
        rule = f"has no teacher, which {format_} needs: known formats without one: yaml, json, python, pytorch"
        raise ConfigError("--format", [Problem(key=f"method {tuned.method}", rule=rule)])
    return tuned.teacher
