"""What mkdocs runs as it builds the site: pages of the reference are made, and files that pages link to come along.

A page of docs/ links to what it names by the path in the checkout, as `../benchmarks/results/x.md`, so that the link holds
wherever the checkout is read. Such a file has a place in the site too: a Markdown file is a page, any other is a copy.
"""

import posixpath
import re
from pathlib import Path

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File
from mkdocs.structure.files import Files
from mkdocs.structure.files import InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = "docs/"

_LINK = re.compile(r"(\]\()([^)#\s]+)")
_brought: set[str] = set()
"""The files from outside docs/ that are in the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the reference, what the navigation names outside docs/, and what any of them link to there."""
    _brought.clear()
    made = reference.pages()
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    in_nav = [path for path in _named_in(config.nav) if files.get_file_from_path(path) is None]
    left = [DOCS + file.src_uri for file in files.documentation_pages()] + in_nav
    while left:
        path = left.pop()
        if path.startswith(DOCS):
            text = made.get(path.removeprefix(DOCS)) or (ROOT / path).read_text()
        elif path in _brought or not (ROOT / path).is_file():  # what is not there is for mkdocs to say
            continue
        else:
            _brought.add(path)
            file = File.generated(config, path, abs_src_path=str(ROOT / path))
            file.inclusion = InclusionLevel.INCLUDED if path in in_nav else InclusionLevel.NOT_IN_NAV
            files.append(file)
            text = (ROOT / path).read_text() if path.endswith(".md") else ""
        left += [target for _, link in _LINK.findall(text) if not (target := _target(path, link)).startswith(DOCS)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links from file to file of the checkout into links from page to page of the site."""
    here = page.file.src_uri
    path = here if here in _brought else DOCS + here

    def moved(match: re.Match[str]) -> str:
        opening, link = match.groups()
        place = _target(path, link).removeprefix(DOCS)
        if files.get_file_from_path(place) is None:
            return match.group()
        return opening + posixpath.relpath(place, posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Name the theme's search for those who hear the page."""
    return output.replace('role="dialog">', 'role="dialog" aria-label="Search">', 1)


def _target(path: str, link: str) -> str:
    """The path in the checkout that a link of the file at `path` names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _named_in(nav: object) -> list[str]:
    """The files that the navigation names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else []
    return [name for part in parts for name in _named_in(part)]
