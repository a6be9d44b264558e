"""Exports of several files: written into a folder together, and never over a file of somebody else's."""

from collections.abc import Mapping
from pathlib import Path

from tune_topkd.config import ConfigError
from tune_topkd.config import Problem
from tune_topkd.storage import write_text

MARK = "# Written by an export of tune_topkd; without this line a later export leaves the file alone."
"""The first line of every file of such an export, by which a later one knows what it may replace."""


def write_files(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write texts into a folder, which is made if need be.

    Args:
        folder: where to.
        texts: by file name, each without `MARK`.

    Returns:
        The files.

    Raises:
        ConfigError: the folder is something else, or a file in it that would be replaced has not `MARK` as its first line;
            then nothing is written.
        OSError: a file cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError("-o", [_problem(folder, "is not a folder, and this format is several files; name a folder")])
    paths = {folder / name: text for name, text in texts.items()}
    rule = (
        "is not of an export to a folder (its first line does not say so), so it is not replaced: move it away, or name "
        "another folder"
    )
    if foreign := [_problem(path, rule) for path in paths if path.exists() and not _is_ours(path)]:
        raise ConfigError("-o", foreign)
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in paths.items():
        write_text(path, f"{MARK}\n{text}")
    return list(paths)


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.readline(len(MARK) + 2).strip() == MARK.encode()


def _problem(path: Path, rule: str) -> Problem:
    return Problem(key=str(path), rule=rule)
