"""The loss of a tuned config as source text that stands alone: that of `tune_topkd.loss`, our imports dropped.

So there is no second copy of a formula. Of the source only what the method needs is taken, and what its docstrings refer to.
"""

import ast
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from tune_topkd.config import Scalar
from tune_topkd.errors import TuneTopKDError

_MODULES = ("precision", "checks", "interface", "scaling", "functional", "baselines", "topkd", "methods")
"""Of `tune_topkd.loss`, those that losses are made of, each after what it imports; no two define the same name."""
_OF_METHODS = "CallableLoss"
"""What is taken of `methods`, which otherwise finds losses by name."""
_REFERENCE = re.compile(r"(?<!`)`(\w+)`(?!`)")
_PLUGIN = "+topkd"
_BASE = "base_"
_WIDTH = 120


class NotAloneError(TuneTopKDError):
    """A loss that has a part which no file can hold that stands alone."""


@dataclass(frozen=True)
class Standalone:
    """Source text of a loss that imports nothing of this project."""

    imports: list[str]
    """Import statements that the other texts need."""
    definitions: str
    """Classes, functions and constants, each after what it needs when it is defined."""
    construction: str
    """The expression that constructs the loss from a mapping `values` of its parameters, to follow a `return`."""
    kind: str
    """What that gives: the name of its class, or of the one in `definitions` that it derives from."""


def standalone(method: str, loss: Mapping[str, Scalar]) -> Standalone:
    """The source of what `tune_topkd.loss.build_loss(method, loss)` constructs.

    A loss of the user's, `package.module:loss`, is imported from where it is; all else is there as text.

    Args:
        method: as `build_loss` takes it.
        loss: the parameters; the text reads their values from `values`.

    Raises:
        NotAloneError: the scaling rule is the user's.
        ValueError: as `build_loss` does.
    """
    if ":" in str(rule := loss.get("scaling_rule", "")):
        raise NotAloneError(
            f"loss.scaling_rule = {rule!r}: a rule of your own is no part of a file that stands alone; the formats yaml and "
            "json name it, for tune_topkd.export.load_tuned_config"
        )
    construction, kind = _construction(method, loss)
    needed, text = _kept(_names(ast.parse(construction)) | {kind}, *_source())
    if ":" in method:
        needed.append(f"import {method.partition(':')[0]}")
    return Standalone(needed, text, construction, kind)


def sorted_imports(statements: Iterable[str]) -> str:
    """Import statements as text, each once, the standard library's before the others."""
    groups: dict[bool, list[str]] = {True: [], False: []}
    for statement in sorted(set(statements), key=lambda each: (each.startswith("from"), each)):
        groups[statement.split()[1].partition(".")[0] in sys.stdlib_module_names].append(statement)
    return "\n\n".join("\n".join(group) for group in groups.values() if group)


def literal(value: Any, before: int = 0) -> str:
    """A value of a config as Python source, on several lines where it does not fit on one.

    Args:
        value: of mappings, lists, texts, numbers, truths and None.
        before: characters on its line, before and after it.
    """
    return _literal(value, before, 0)


def _literal(value: Any, before: int, indent: int) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, Mapping | list | tuple):
        return repr(value)
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    items = (
        [(f"{literal(key)}: ", each) for key, each in value.items()]
        if isinstance(value, Mapping)
        else [("", each) for each in value]
    )
    flat = opening + ", ".join(name + _literal(each, -sys.maxsize, 0) for name, each in items) + closing
    if not items or before + len(flat) <= _WIDTH:
        return flat
    deeper = indent + 4
    lines = [f"{' ' * deeper}{name}{_literal(each, deeper + len(name) + 1, deeper)}," for name, each in items]
    return "\n".join([opening, *lines, " " * indent + closing])


def _call(function: str, arguments: Sequence[str], indent: int, beside: str) -> str:
    """A call as source, an argument a line where it does not fit on one with what stands beside it."""
    flat = f"{function}({', '.join(arguments)})"
    if "\n" not in flat and indent + len(beside) + len(flat) <= _WIDTH:
        return flat
    return "\n".join([f"{function}(", *(f"{' ' * (indent + 4)}{each}," for each in arguments), f"{' ' * indent})"])


# --- how it is constructed ------------------------------------------------------------------------------------------


def _construction(method: str, loss: Mapping[str, Scalar]) -> tuple[str, str]:
    """The expression that constructs a loss, and the name of the class that it is of or derives from."""
    from tune_topkd.loss import TopKDPlugin
    from tune_topkd.loss import build_loss
    from tune_topkd.loss import loss_parameters
    from tune_topkd.loss.interface import defaults

    built = build_loss(method, loss)
    if not method.endswith(_PLUGIN):
        return _made(method, built, ["**values"] if loss else [], 4, "return ")
    assert isinstance(built, TopKDPlugin)
    base, own = method.removesuffix(_PLUGIN), defaults(TopKDPlugin)
    of_base = [f'{name.removeprefix(_BASE)}=values["{name}"]' for name in loss if name not in own]
    if "ce_weight" in loss_parameters(base):
        of_base.insert(0, "ce_weight=0.0")  # the plug-in counts it
    first, _ = _made(base, built.base, of_base, 8, ",")
    mine = [f'{name}=values["{name}"]' for name in loss if name in own]
    return _call("TopKDPlugin", [first, *mine], 4, "return "), "TopKDPlugin"


def _made(method: str, built: object, arguments: list[str], indent: int, beside: str) -> tuple[str, str]:
    """The same of a method that is no plug-in, of which `build_loss` has made `built`."""
    from tune_topkd.loss.methods import CallableLoss

    kind = type(built).__name__
    if ":" not in method:
        return _call(kind, arguments, indent, beside), kind
    place, found = method.replace(":", "."), pkgutil.resolve_name(method)
    if inspect.isclass(found):
        made = _call(place, arguments, indent, beside)
    else:
        place = place if inspect.isroutine(found) else f"copy.deepcopy({place})"
        made = _call("functools.partial", [place, *arguments], indent, beside)
    if isinstance(built, CallableLoss):
        return _call(kind, [made, literal(method)], indent, beside), kind
    return made, "DistillationLoss"


# --- the source -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Definition:
    text: str
    needs: set[str]
    """Names in it, and those that its docstrings refer to."""
    is_constant: bool


def excerpt(room: str, module: str, names: Iterable[str]) -> tuple[list[str], str]:
    """Some definitions of a module of this project, and what they need of it, as they stand there.

    Args:
        room: such as `train`.
        module: of that room.
        names: of classes, functions or constants.

    Returns:
        The import statements that they need, and their text.
    """
    definitions, imports = _read(room, module)
    return _kept(set(names), definitions, imports)


def _kept(
    wanted: set[str], definitions: Mapping[str, _Definition], imports: Mapping[str, str]
) -> tuple[list[str], str]:
    """The import statements and the text of what is wanted and of all that it needs, in order."""
    kept = set[str]()
    while new := (wanted & definitions.keys()) - kept:
        kept |= new
        wanted = wanted.union(*(definitions[name].needs for name in new))
    text, is_after_constant = "", False
    for name, definition in definitions.items():
        if name in kept:
            apart = "\n" if definition.is_constant and is_after_constant else "\n\n\n"
            text += (apart if text else "") + definition.text
            is_after_constant = definition.is_constant
    return [statement for name, statement in imports.items() if name in wanted], text


def _source() -> tuple[dict[str, _Definition], dict[str, str]]:
    """The definitions of `_MODULES` by name, in order, and the import statements by the name that each binds."""
    definitions: dict[str, _Definition] = {}
    imports: dict[str, str] = {}
    for module in _MODULES:
        of_module, imported = _read("loss", module)
        definitions |= {_OF_METHODS: of_module[_OF_METHODS]} if module == "methods" else of_module
        imports |= imported
    return definitions, imports


def _read(room: str, module: str) -> tuple[dict[str, _Definition], dict[str, str]]:
    text = (resources.files("tune_topkd") / room / f"{module}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    return dict(_defined(tree, text.splitlines())), dict(_imported(tree))


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            (alias,) = node.names
            statement = ast.unparse(node)
            if not statement.startswith("from tune_topkd."):
                yield alias.asname or alias.name, statement


def _defined(tree: ast.Module, lines: list[str]) -> Iterator[tuple[str, _Definition]]:
    for node in tree.body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                name, decorators = node.name, node.decorator_list
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                decorators = []
            case _:
                continue
        first = min(each.lineno for each in (node, *decorators))
        assert node.end_lineno is not None
        text = "\n".join(lines[first - 1 : node.end_lineno])
        yield name, _Definition(text, _names(node) | _referred(node), isinstance(node, ast.Assign | ast.AnnAssign))


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _referred(tree: ast.AST) -> set[str]:
    """The names in single backquotes in the docstrings of a definition."""
    documented = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return {name for node in documented for name in _REFERENCE.findall(ast.get_docstring(node) or "")}
