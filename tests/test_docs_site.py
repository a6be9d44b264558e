"""The docs site: it builds without a warning, loads nothing from elsewhere, and its reference lacks nothing."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer.main
from pydantic import BaseModel

from tune_topkd.cli.app import app
from tune_topkd.config import SweepConfig
from tune_topkd.export import TunedConfig

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent.name for path in (ROOT / "tune_topkd").glob("*/__init__.py"))
WITHOUT_A_PAGE = {"cli"}
"""The command line has a page of its own."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Page(HTMLParser):
    """What a page shows as code, its anchors, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.code, self.ids, self.loads, self._within = [], set(), [], 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "code":
            self._within += 1
            self.code.append("")
        if tag in ("script", "img", "iframe", "source", "video", "object", "embed"):
            self.loads += [found[name] for name in ("src", "data") if found.get(name)]
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(found["href"])

    def handle_endtag(self, tag):
        self._within -= tag == "code"

    def handle_data(self, data):
        if self._within:
            self.code[-1] += data


@pytest.mark.slow
def test_every_page_is_there_and_loads_what_lies_beside_it(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    for path in pages:
        for loaded in Page(path).loads:
            assert not re.match(r"(https?:)?//", loaded), f"{path.name} loads {loaded}"
            if path.name != "404.html" and not loaded.startswith("data:"):
                assert (path.parent / loaded.partition("?")[0]).is_file(), f"{path.name}: {loaded}"
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", path.read_text()), path.name
    assert not (site / "building").exists()


def keys(model=SweepConfig, path=""):
    """Every key of a search space; what is under `teacher.recipe` is under `recipe` too, and is told there."""
    for name, field in model.model_fields.items():
        key = f"{path}{name}"
        yield key
        for kind in models(field.annotation):
            is_named = getattr(field.annotation, "__origin__", None) is dict
            yield from keys(kind, f"{key}.NAME." if is_named else f"{key}.")


def models(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from models(part)


@pytest.mark.slow
def test_every_key_is_in_the_reference(site):
    told = set(Page(site / "reference" / "keys.html").code)
    same = ("teacher.recipe.", "recipe."), ("teacher.augment.", "data.augment.")
    for key in keys():
        for inner, elsewhere in same:
            key = key.replace(inner, elsewhere) if key.startswith(inner) else key
        assert key in told, key


@pytest.mark.slow
def test_every_key_of_a_tuned_config_is_in_the_reference(site):
    pages = [Page(site / "reference" / f"{name}.html").code for name in ("keys", "tuned")]
    told = set().union(*pages)
    same = ("teacher.recipe.", "recipe."), ("teacher.augment.", "data.augment.")
    same += tuple((f"evidence.baselines.NAME.{part}.", f"evidence.{part}.") for part in ("fresh", "test"))
    for key in keys(TunedConfig):
        for inner, elsewhere in same:
            key = key.replace(inner, elsewhere) if key.startswith(inner) else key
        assert key in told, key


@pytest.mark.slow
def test_every_key_says_its_type_its_default_and_its_meaning(site):
    rows = re.findall(r"<tr>\s*(<td>.*?)</tr>", (site / "reference" / "keys.html").read_text(), re.S)
    of_keys = [
        [re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<td>(.*?)</td>", row, re.S)] for row in rows
    ]
    assert len([row for row in of_keys if len(row) == 4]) > 80
    assert [row for row in of_keys if not all(row)] == []
    assert "anything" not in {row[1] for row in of_keys}


@pytest.mark.slow
def test_every_command_and_every_option_is_in_the_reference(site):
    page = Page(site / "reference" / "commands.html")
    told = [code.partition(" ")[0] for code in page.code]
    for name, command in typer.main.get_command(app).commands.items():
        assert name in page.ids, name
        for param in command.params:
            if param.param_type_name == "option":
                assert {*param.opts, *param.secondary_opts} <= set(told), f"{name}: {param.opts}"


@pytest.mark.slow
def test_every_option_says_what_it_means(site):
    rows = re.findall(r"<tr>\s*(<td>.*?)</tr>", (site / "reference" / "commands.html").read_text(), re.S)
    of_options = [row for row in (re.findall(r"<td>(.*?)</td>", row, re.S) for row in rows) if len(row) == 3]
    assert len(of_options) > 80
    assert [name for name, _, meaning in of_options if not meaning.strip()] == []


@pytest.mark.slow
@pytest.mark.parametrize("package", [name for name in PACKAGES if name not in WITHOUT_A_PAGE])
def test_every_public_name_is_in_the_reference(site, package):
    exported = importlib.import_module(f"tune_topkd.{package}").__all__
    told = Page(site / "reference" / "api" / f"{package}.html").ids
    assert [name for name in exported if f"tune_topkd.{package}.{name}" not in told] == []


def test_the_pictures_are_drawn_by_the_functions_of_the_loss(tmp_path):
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "building" / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    drawn = {path.name for path in pictures.draw(tmp_path)}
    named = set(re.findall(r"\(pictures/([\w.]+)\)", (ROOT / "docs" / "glossary.md").read_text()))
    assert drawn == named == {path.name for path in (ROOT / "docs" / "pictures").iterdir()}


def test_every_parameter_of_topkd_is_in_the_glossary():
    from tune_topkd.loss import loss_parameters

    headings = set(re.findall(r"^### (\w+)$", (ROOT / "docs" / "glossary.md").read_text(), re.M))
    own = {name for name in loss_parameters("kd+topkd") if not name.startswith("base_")} | {"base_weight"}
    assert loss_parameters("topkd").keys() | own <= headings
