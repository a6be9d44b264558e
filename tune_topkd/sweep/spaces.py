"""The search spaces that have names, and where they are."""

import difflib
import errno
import itertools
import os
import textwrap
from pathlib import Path

from tune_topkd.config import ConfigError
from tune_topkd.config import Problem

SPACES = "search_spaces"
"""The folder of the search spaces that have names."""


def space_names() -> list[str]:
    """The search spaces that can be had by their bare names: those of the working directory and the project's own."""
    return sorted({path.stem for folder in space_folders() for path in folder.glob("*.yaml")})


def space_folders() -> tuple[Path, ...]:
    """Where spaces are, the nearest first: beside the user, in the checkout, in the installed package."""
    package = Path(__file__).resolve().parents[1]
    return Path(SPACES), package.parent / SPACES, package / SPACES


def space_path(source: str) -> Path:
    """The path of a search space that is given by its path, its bare name or its file's name.

    Raises:
        ConfigError: there is none; names those that there are.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = source if not path.suffix else path.stem if path.parts in ((path.name,), (SPACES, path.name)) else ""
    for folder in space_folders():
        if name and (found := folder / f"{name}.yaml").exists():
            return found
    raise ConfigError(
        source, [Problem(key="", rule=f"cannot be read: {os.strerror(errno.ENOENT)}; {_known_spaces(path.stem)}")]
    )


def _known_spaces(name: str) -> str:
    """The known spaces as text, those with similar names first, the others grouped by dataset."""
    names = space_names()
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    datasets = itertools.groupby(names, key=lambda known: known.partition("-")[0])
    lines = [
        textwrap.fill(", ".join(group), 110, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)
        for _, group in datasets
    ]
    return "\n".join([f"{hint}known by name:" if names else "known by name: none", *lines])
