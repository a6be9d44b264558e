"""The pages of the reference, made of what they are about: config models, command line, packages, measurements."""

import ast
import functools
import inspect
import json
import re
import typing
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer.main
import yaml
from pydantic import BaseModel

from tune_topkd.cli.app import app
from tune_topkd.config import METHODS
from tune_topkd.config import RECIPE_PARAMETERS
from tune_topkd.config import ChoiceConfig
from tune_topkd.config import SweepConfig
from tune_topkd.config import json_schema
from tune_topkd.config import placements
from tune_topkd.export import TunedConfig
from tune_topkd.export import json_schema as tuned_schema
from tune_topkd.loss import loss_parameters

ROOT = Path(__file__).parents[2]

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "sweep": (),
    "loss": (),
    "export": (),
    "config": (),
    "data": ("tune_topkd.data.conformance.check_source",),
    "models": (),
    "search": ("tune_topkd.search.conformance.check_sampler", "tune_topkd.search.conformance.check_scheduler"),
    "ledger": (),
    "report": (
        "tune_topkd.report.page.sweep_page",
        "tune_topkd.report.page.campaign_page",
        "tune_topkd.findings.Findings",
    ),
    "train": (),
    "teacher": (),
    "execution": ("tune_topkd.execution.simulated.simulate",),
    "tracking": (),
    "storage": (),
}
"""The packages, those that a user's code needs most first, and what the docs name besides their exports."""


@functools.cache
def pages() -> dict[str, str]:
    """The content of each page, by its path in docs/."""
    made = {
        "reference/keys.md": keys_page(),
        "reference/tuned.md": tuned_page(),
        "reference/space.schema.json": json.dumps(json_schema(), indent=2) + "\n",
        "reference/commands.md": commands_page(),
        "reference/api/index.md": packages_page(),
        "measurements.md": measurements_page(),
    }
    return made | {f"reference/api/{name}.md": package_page(name, more) for name, more in PACKAGES.items()}


# --- keys -------------------------------------------------------------------------------------------------------------


def sections(root: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections of a YAML by dotted path, each model once: where its path is shortest."""
    found: dict[type[BaseModel], str] = {}
    for path, model in _sections(root, ""):
        if model not in found or path.count(".") < found[model].count("."):
            found[model] = path
    return {path: model for model, path in found.items()}


def _sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        below = f"{path}.{name}" if path else name
        if typing.get_origin(field.annotation) is dict:
            below += ".NAME"
        for kind in _models(field.annotation):
            yield from _sections(kind, below)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)


def keys_page() -> str:
    """Every key of a search-space YAML, and the parameters of the losses."""
    rows = [(f"`{method}`", _parameters(method)) for method in METHODS]
    parameters = _table(("method", "parameters and their defaults"), rows)
    return "\n".join([_KEYS_OPENING, *_tables(SweepConfig, json_schema(), {}), _PARAMETERS_OPENING, parameters])


def tuned_page() -> str:
    """Every key of a tuned config that is none of a search space's."""
    elsewhere = {model: f"keys.md{_anchor(path)}" for path, model in sections(SweepConfig).items() if path}
    return "\n".join([_TUNED_OPENING, *_tables(TunedConfig, tuned_schema(), elsewhere)])


def _tables(
    root: type[BaseModel], schema: Mapping[str, Any], elsewhere: Mapping[type[BaseModel], str]
) -> Iterator[str]:
    """A table for each section but those that are told elsewhere."""
    found = sections(root)
    where = set(placements(root))
    links = {model.__name__: (path, elsewhere.get(model, _anchor(path))) for path, model in found.items()}
    first = list(root.model_fields)
    for path, model in sorted(found.items(), key=lambda e: (first.index(e[0].split(".")[0]) if e[0] else -1, e[0])):
        if model in elsewhere:
            continue
        if path:
            yield f"## {path}\n\n{_told(inspect.getdoc(model) or '')}\n"
        section = schema if model is root else schema["$defs"][model.__name__]
        properties = section.get("properties") or section["anyOf"][0]["properties"]
        rows = []
        for name, field in model.model_fields.items():
            key = f"{path}.{name}".lstrip(".")
            meaning = _told(field.description or "")
            if root is SweepConfig and key in where:
                meaning += " *Changes no result.*"
            if path == "recipe" and name in RECIPE_PARAMETERS:
                meaning += " *A space can search it.*"
            default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
            rows.append((f"`{key}`", _kind(properties[name], links), default, meaning))
        yield _table(("key", "type", "default", "meaning"), rows)


def _anchor(path: str) -> str:
    return f"#{path.lower().replace('.', '')}"


_TUNED_OPENING = """# Keys of a tuned config

What `tuned.yaml` holds, the answer of a sweep: made of the model that reads it (`tune_topkd.export.TunedConfig`).
Sections that a search space has too are told [there](keys.md). Programs in other languages can check a file by its
[JSON Schema](../../tune_topkd/export/tuned.schema.json).
"""

_KEYS_OPENING = """# Keys of a search space

Everything that a search-space YAML may say, made of the models that check it (`tune_topkd.config`). A key in a section
is written with dots, as `--set` takes it: `recipe.lr`. A key with a default may be left out. A *value* is a number, a
text, `true` or `false`. [In an editor](../editor.md) these keys are completed and explained as you type;
[the search spaces](../../search_spaces/README.md) explains `extends`, by which a file starts from others.

Keys marked *changes no result* say where something is or how it is run: `resume --set` may change them.
"""

_PARAMETERS_OPENING = f"""## Parameters of the loss

What may stand under `loss` (a fixed value) or `space` (searched), by `method`. [The glossary](../glossary.md) says what
those of TopKD mean. A loss of your own has [the parameters of its function](../losses.md). `space` also takes these keys
of the recipe: {", ".join(f"`{name}`" for name in RECIPE_PARAMETERS)}.
"""


def _parameters(method: str) -> str:
    return ", ".join(f"`{name}` = {_default(value)}" for name, value in loss_parameters(method).items()) or "none"


def _default(value: Any) -> str:
    if isinstance(value, ChoiceConfig):
        return f"`{value.name}`"
    if isinstance(value, BaseModel):
        return "its defaults"
    if value == "":
        return "empty"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return f"`{text}`"


_PLAIN = {
    "string": "text",
    "number": "number",
    "integer": "integer",
    "boolean": "`true` or `false`",
    "object": "mapping",
    "null": "`null`",
}
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _kind(value: Mapping[str, Any], links: Mapping[str, tuple[str, str]]) -> str:
    """What a JSON Schema allows, in words."""
    if "$ref" in value:
        path, link = links[value["$ref"].rpartition("/")[2]]
        return f"section [`{path}`]({link})"
    if {"boolean", "number", "string"} <= {part.get("type") for part in value.get("anyOf", ())}:
        return "value" + " or `null`" * ({"type": "null"} in value["anyOf"])
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_kind(part, links) for part in value["anyOf"]))
    if "enum" in value or "const" in value:
        return ", ".join(f"`{choice}`" for choice in value.get("enum", [value.get("const")]))
    if value.get("pattern"):
        return "`package.module:object`"
    if value.get("type") == "array":
        least = f", at least {value['minItems']}" if "minItems" in value else ""
        return f"list of {_several(_kind(value['items'], links))}{least}"
    if isinstance(value.get("additionalProperties"), dict):
        return f"mapping of names to {_several(_kind(value['additionalProperties'], links))}"
    limits = [f"{words} {value[name]:g}" for name, words in _LIMITS.items() if name in value and value[name] < 2**62]
    return ", ".join([_PLAIN.get(value.get("type", ""), "anything"), *limits])


def _several(kind: str) -> str:
    return re.sub(r"^(section|number|integer|text|value|mapping)\b", r"\1s", kind)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its arguments and options."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = [_COMMANDS_OPENING]
    for registered in app.registered_commands:
        assert registered.callback is not None, "a command is a function"
        name = registered.name or registered.callback.__name__
        kinds = typing.get_type_hints(registered.callback)
        params = commands[name].params
        usage = ["tune-topkd", name, "[OPTIONS]", *(_metavar(p, kinds) for p in params if not _is_option(p))]
        text.append(f"## {name}\n\n```text\n{' '.join(usage)}\n```\n\n{_told(commands[name].help or '', lines=True)}\n")
        rows = []
        for param in params:
            if _is_option(param):
                value = "" if param.is_flag else f" {_metavar(param, kinds)}"
                names = ", ".join(f"`{option}{value}`" for option in (*param.opts, *param.secondary_opts))
            else:
                names = f"`{_metavar(param, kinds)}`"
            rows.append((names, _given(param), _meaning(param, kinds)))
        text.append(_table(("argument or option", "default", "meaning"), rows))
    return "\n".join(text)


_COMMANDS_OPENING = """# Commands

`python launch.py` in a checkout is `tune-topkd` where the package is installed. `--help` of each command tells the same.
Results for programs go to stdout, what is said to people goes to stderr.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | an audit found something, a promise does not hold, a job has failed |
| 2 | the input is wrong or the machine in the way: one message says which |
| 3 | the sweep ended without one successful trial, or with an error that all further trials would make |
| 129, 130 | interrupted, by a closed terminal or by Ctrl-C: `resume` goes on |
"""


def _is_option(param: Any) -> bool:
    return bool(param.param_type_name == "option")


def _metavar(param: Any, kinds: Mapping[str, Any]) -> str:
    """What stands for the value of an option or an argument: what it declares, its name, or its type."""
    if param.metavar:
        return str(param.metavar)
    if not _is_option(param):
        return str(param.name.upper())
    kind = _kind_of(param, kinds)
    if issubclass(kind, StrEnum):
        return str(param.name.strip("_").upper())
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def _kind_of(param: Any, kinds: Mapping[str, Any]) -> type:
    return next((k for k in (*typing.get_args(kinds[param.name]), kinds[param.name]) if isinstance(k, type)), str)


def _meaning(param: Any, kinds: Mapping[str, Any]) -> str:
    text = re.sub(r" ?\[default: .*\]\.?$", ".", param.help or "")
    kind = _kind_of(param, kinds)
    choices = f" One of {', '.join(f'`{choice}`' for choice in kind)}." if issubclass(kind, StrEnum) else ""
    return _told(text + choices)


def _given(param: Any) -> str:
    """The default of an option, and the variable of the environment that gives another."""
    told = re.search(r"\[default: (.*)\]", param.help or "")
    default = getattr(param.default, "value", param.default)
    if told:
        text = told.group(1)
    elif param.required:
        text = "required"
    elif default in (None, False) or callable(default):
        text = ""
    else:
        text = f"`{param.opts[0] if default is True else default}`"
    variables = param.envvar if isinstance(param.envvar, list) else [param.envvar] if param.envvar else []
    return " or ".join([text] * bool(text) + [f"`${variable}`" for variable in variables])


# --- packages ---------------------------------------------------------------------------------------------------------


def public_names(package: str) -> list[str]:
    """What a package's `__init__` exports, read without importing it."""
    tree = ast.parse((ROOT / "tune_topkd" / package / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"tune_topkd.{package} has no __all__")


def package_page(package: str, more: tuple[str, ...]) -> str:
    """A page that mkdocstrings fills with signatures and docstrings."""
    name = f"tune_topkd.{package}"
    names = [f"{name}.{exported}" for exported in public_names(package)] + list(more)
    options = "{members: false, show_root_heading: false, show_root_toc_entry: false}"
    opening = f"# {name}\n\n::: {name}\n    options: {options}\n"
    return "\n".join([opening, *(f"::: {each}\n" for each in names)])


def packages_page() -> str:
    """What each package is, and its page."""
    rows = []
    for package in PACKAGES:
        text = (ROOT / "tune_topkd" / package / "__init__.py").read_text()
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].rstrip(":")
        rows.append((f"[`tune_topkd.{package}`]({package}.md)", _told(first)))
    return f"# Python\n\n{_PACKAGES_OPENING}\n{_table(('package', 'what it is'), rows)}"


_PACKAGES_OPENING = """What may be imported, made of signatures and docstrings. `import tune_topkd` by itself imports
nothing. `tune_topkd.loss` and `tune_topkd.export.load_tuned_config` need torch, pydantic and pyyaml only; the rest is
`pip install '.[sweep]'`. A sweep from a program is `tune_topkd.sweep.Sweep`.
"""


# --- measurements -----------------------------------------------------------------------------------------------------


def measurements_page() -> str:
    """The reports of benchmarks/results, the newest first."""
    rows = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.md"), reverse=True):
        day, what = path.stem[:10], path.stem[11:].replace("-", " ")
        title = path.read_text().splitlines()[0].lstrip("# ").removesuffix(f", {day}")
        rows.append((day, f"[{what}](../benchmarks/results/{path.name})", title))
    opening = (
        "What has been measured, with the machine, the baseline in the same run and the command that repeats it.\n"
    )
    return f"# Measurements\n\n{opening}\n{_table(('day', 'what', 'title'), rows)}"


# --- Markdown ---------------------------------------------------------------------------------------------------------


_CODE_OR_BAR = re.compile(r"(`[^`]*`)|\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += ["| " + " | ".join(_CODE_OR_BAR.sub(lambda m: m[1] or "\\|", cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _told(text: str, *, lines: bool = False) -> str:
    """A docstring as Markdown: the double backticks of code become single ones, and lines are joined, or kept."""
    text = text.replace("``", "`")
    return text if lines else " ".join(text.split())
