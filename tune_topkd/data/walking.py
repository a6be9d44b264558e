"""The files in a folder of images: one walk for all datasets that are folders.

Links are followed, and a folder that they lead back to is entered once. What programs leave beside images is skipped at
any depth: hidden names (`.ipynb_checkpoints`, `.DS_Store`, `._x.png`) and those of `LEFTOVERS`. Names are compared and
sorted in Unicode's composed form (NFC), so that a copy made on a Mac numbers the classes alike.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

from tune_topkd.data.errors import DataError

ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".dib", ".tif", ".tiff", ".webp",
    ".gif", ".avif",
)  # fmt: skip
"""Endings of the files that are read, in upper or lower case: torchvision's, and others that Pillow reads as well."""

LEFTOVERS = frozenset({
    "__macosx", "__pycache__", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information",
    "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
})  # fmt: skip
"""Names, in lower case, that archives, file systems and desktops leave behind."""

_TEXTS = (".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".log")


@dataclass
class Listing:
    """What a walk through `folder` found."""

    folder: str
    real: str
    """The folder without links."""
    images: list[str] = field(default_factory=list)
    """Paths of the image files, by their folder and then by their name."""
    linked: dict[str, str] = field(default_factory=dict)
    """The real places of the images that links below the folder lead to, by path."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of other files by their ending; text files are not counted."""

    def place(self, path: str) -> str:
        """The real place of an image of the listing, without links."""
        return self.linked.get(path) or self.real + path[len(self.folder) :]


def composed(name: str) -> str:
    """The name in Unicode's composed form."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def is_image(name: str) -> bool:
    """Whether a name is that of an image file."""
    return name.lower().endswith(ENDINGS) and not _is_leftover(name)


def subfolders(folder: Path) -> dict[str, Path]:
    """The folders in a folder by their composed names, sorted by these.

    Raises:
        DataError: the folder cannot be read, or two names in it are one.
    """
    found: dict[str, Path] = {}
    for entry in _entries(str(folder)):
        if entry.is_dir():
            name = composed(entry.name)
            if name in found:
                raise DataError(
                    f"{folder}: has two folders named {name}, in two of Unicode's forms; rename one of them"
                )
            found[name] = Path(entry.path)
    return found


def listing(folder: Path, *, deep: bool = True) -> Listing:
    """The files of a folder and, unless `deep` is False, at any depth below it; each file once.

    Raises:
        DataError: a folder that cannot be read, or an image that is a link to nothing.
    """
    found = Listing(str(folder), os.path.realpath(folder))
    for path, place, files in sorted(_walk(found, deep), key=lambda item: composed(item[0])):
        is_linked = place != found.place(path)
        for entry in files:
            _take(found, entry, os.path.join(place, entry.name) if is_linked else None)
    _drop_doubles(found)
    return found


def has_image(folder: Path) -> bool:
    """Whether there is an image file in a folder, at any depth."""
    walk = _walk(Listing(str(folder), os.path.realpath(folder)), True)
    return any(is_image(entry.name) for _, _, files in walk for entry in files)


def in_both(listings: Sequence[Listing]) -> tuple[str, str] | None:
    """Two paths of the same file in two of the listings, where links lead to it; None if there is no such file."""
    reals = {found.real for found in listings}
    is_apart = len(reals) == len(listings) and not any(
        found.linked or reals.intersection(map(str, Path(found.real).parents)) for found in listings
    )
    if is_apart:  # saves comparing the places of a million files
        return None
    first: dict[str, tuple[str, int]] = {}
    for number, found in enumerate(listings):
        for path in found.images:
            other, where = first.setdefault(found.place(path), (path, number))
            if where != number:
                return other, path
    return None


def _is_leftover(name: str) -> bool:
    return name.startswith(".") or name.lower() in LEFTOVERS


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder without leftovers, sorted by composed names."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not _is_leftover(e.name)), key=lambda e: (composed(e.name), e.name))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error


def _walk(found: Listing, deep: bool) -> Iterator[tuple[str, str, list[os.DirEntry[str]]]]:
    """Each folder once: its path, its real place, and its entries that are not folders."""
    entered = {found.real, *map(str, Path(found.real).parents)}
    waiting = [(found.folder, found.real)]
    while waiting:
        path, place = waiting.pop()
        files = []
        for entry in _entries(path):
            if not entry.is_dir():
                files.append(entry)
            elif deep:
                below = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(place, entry.name)
                if below not in entered:
                    entered.add(below)
                    waiting.append((entry.path, below))
        yield path, place, files


def _take(found: Listing, entry: os.DirEntry[str], place: str | None) -> None:
    """Add a file to the listing; `place` is its real place if that does not follow from its path."""
    ending = os.path.splitext(entry.name)[1].lower()
    if not is_image(entry.name):
        if ending not in _TEXTS:
            found.others[ending] += 1
        return
    if not entry.is_file():
        if entry.is_symlink():
            raise DataError(
                f"{entry.path}: is a link to {os.readlink(entry.path)}, where no file is; mend or remove it"
            )
        found.others[ending] += 1  # a pipe, a device
        return
    found.images.append(entry.path)
    if entry.is_symlink():
        place = os.path.realpath(entry.path)
    if place is not None:
        found.linked[entry.path] = place


def _drop_doubles(found: Listing) -> None:
    """Remove links to files that are in the listing themselves, or by an earlier link."""
    if not found.linked:
        return
    seen = {found.place(path) for path in found.images if path not in found.linked}
    kept = []
    for path in found.images:
        real = found.linked.get(path)
        if real in seen:
            del found.linked[path]
            continue
        kept.append(path)
        if real is not None:
            seen.add(real)
    found.images = kept
