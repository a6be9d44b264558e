"""The pages of docs/ are true: each command is one, with its options; snippets run; messages are the program's own."""

import ast
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_cli
import test_readme
import torch
import typer.main
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from tune_topkd.cli.app import app
from tune_topkd.config import ParameterRange
from tune_topkd.config import SweepConfig
from tune_topkd.config import json_schema
from tune_topkd.config.files import _parsed
from tune_topkd.export import load_tuned_config
from tune_topkd.models import build_model
from tune_topkd.sweep import preflight

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "search_spaces" / "README.md"]
COMMANDS = typer.main.get_command(app).commands
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
inside = test_cli.inside
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")


def blocks(text, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.M | re.S)


def lines(text):
    """The commands of the blocks for a shell, without comments and variables before them."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def told(text):
    """The commands in the running text."""
    for code in re.findall(r"`((?:python launch\.py|tune-topkd) [^`]+)`", text):
        yield shlex.split(code.replace("…", ""))


def prose(text):
    """A page without its blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)


def options_of(name):
    found = {"--help", "-h"}
    for param in COMMANDS[name].params:
        found |= {*param.opts, *param.secondary_opts} if param.param_type_name == "option" else set()
    return found


@every_page
def test_each_command_is_there_and_takes_its_options(page):
    text = page.read_text()
    for words in [*lines(text), *told(text)]:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
        if words[:2] == ["python", "launch.py"]:
            words = words[1:]
        if words[0] not in ("launch.py", "tune-topkd"):
            continue
        name, *arguments = words[1:]
        assert name in COMMANDS, words
        given = {word.partition("=")[0] for word in arguments if re.match(r"-[a-z-]", word)}
        assert given <= options_of(name), words
        for before, word in itertools.pairwise(arguments):
            if before == "--set":
                assert_key(word.partition("=")[0], page)


def assert_key(key, page):
    """A dotted key is one of a search space's; below `space` and `loss` come names of parameters."""
    section = SweepConfig
    for name in key.split("."):
        if section is None or section is ParameterRange:
            section = None
            continue
        field = section.model_fields.get(name)
        assert field is not None, f"{page.name}: {key}"
        section = next((kind for kind in models(field.annotation)), None)


def models(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from models(part)


@every_page
def test_each_option_in_the_text_is_one(page):
    known = set().union(*map(options_of, COMMANDS)) | {"--version"}
    elsewhere = {  # options of other programs
        "--node", "--nodes", "--gpus-per-node", "--time", "--signal", "--requeue", "--exclusive",
        "--dashboard-agent-listen-port", "--samplers", "--dry-run", "--student", "--teacher", "--strict",
        "--no-serve-artifacts",
    }  # fmt: skip
    for code in re.findall(r"`([^`\n]+)`", prose(page.read_text())):
        if code.startswith(
            ("--", "run ", "resume ", "confirm ", "status ", "export ", "report ", "teacher ", "train ")
        ):
            for option in re.findall(r"(?:^| )(--[a-z][a-z-]+)", code):
                assert option in known | elsewhere, f"{page.name}: `{code}`"
        for key in re.findall(r"--set '?([a-z_.]+)=", code):
            assert_key(key, page)


@every_page
def test_each_yaml_is_a_search_space_or_a_part_of_one(page):
    checker = Draft202012Validator(json_schema())
    for block in blocks(page.read_text(), "yaml"):
        assert [error.message for error in checker.iter_errors(_parsed(block))] == [], block


@every_page
def test_what_it_links_to_is_there(page):
    of_the_site = "reference/"  # made as the site is built
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", prose(page.read_text())):
        assert target.startswith(of_the_site) or (page.parent / target).exists(), target


# --- snippets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with the runs of a sweep that was recorded, `small`."""
    folder = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(ROOT / "tests" / "recorded" / "version-3", folder / "runs")
    (folder / "runs" / "digits").mkdir()
    return folder


def test_each_command_of_the_tutorial_runs_here_or_in_the_readmes_test(recorded, inside):
    commands = [" ".join(words) for words in lines(TUTORIAL)]
    assert commands[:2] == ["make sweep", "source .venv/bin/activate"]
    for command in commands[2:]:
        name, *arguments = command.removeprefix("python launch.py ").split()
        if name in ("confirm", "verify"):
            assert command in test_readme.commands()
            continue
        if arguments[0] == "digits":
            arguments = ["small", *arguments[1:], "--runs-dir", "runs"]
        done = inside(name, *arguments, cwd=recorded)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    for path in ("runs/small/report.html", "tuned.py", "mine.yaml"):
        assert (recorded / path).is_file()


def test_the_snippets_of_the_tutorial_run(recorded, inside):
    for name, format_ in (("runs/digits/tuned.yaml", "yaml"), ("tuned.py", "python")):
        done = inside("export", "small", "--format", format_, "-o", name, "--runs-dir", "runs", cwd=recorded)
        assert done.returncode == 0, done.stderr
    first, second = blocks(TUTORIAL, "python")
    said = [
        subprocess.run([sys.executable, "-c", code], cwd=recorded, capture_output=True, text=True, check=True).stdout
        for code in (f"import sys; sys.path.append({str(ROOT)!r})\n{first}", second)
    ]
    k = load_tuned_config(recorded / "runs" / "digits" / "tuned.yaml").loss["k"]
    assert re.fullmatch(rf"K = {k}, learning rate [\d.]+, loss \d+\.\d\d\n", said[0])


def test_the_network_is_built_and_its_space_passes_the_check(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "networks.md").read_text()
    (module,) = blocks(text, "python")
    (section,) = blocks(text, "yaml")
    (tmp_path / "thin.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    network = build_model("thin:network", num_classes=10, width=8)
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    raw = _parsed(test_cli.SPACE) | _parsed(section)
    assert preflight.load_checked(raw).config.student.kwargs == {"width": 8}
    sys.modules.pop("thin")


def test_the_page_is_made_from_python_as_the_report_page_says(recorded):
    (snippet,) = blocks((ROOT / "docs" / "report.md").read_text(), "python")
    names: dict[str, object] = {}
    exec(snippet.replace('"digits"', f'"small", runs_dir={str(recorded / "runs")!r}, mlflow_uri=""'), names)
    assert names["text"].startswith("<!doctype html>")


# --- messages ---------------------------------------------------------------------------------------------------------


def literals():
    """Every text in the package, `…` for what an f-string fills in, with those of the messages that pydantic gives."""
    for path in (ROOT / "tune_topkd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_every_message_of_the_troubleshooting_page_is_one_of_the_programs():
    said = "\n".join(" ".join(text.split()) for text in literals())
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) >= 40
    for row in rows:
        for part in re.split(r"…|; ", row.strip("`")):
            part = part.strip(" '`()?:;,")
            assert len(part) < 4 or part in said, f"{row}: {part!r}"
