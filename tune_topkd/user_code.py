"""The user's own code, which a config names as `package.module:object`: whose code a name is, and what identifies it."""

import ast
import hashlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

from tune_topkd.errors import TuneTopKDError

LIBRARIES = ("cifar", "torchvision", "timm")
"""Prefixes, before the colon, of networks that this project or a library has."""


class UserCodeError(TuneTopKDError):
    """A name that cannot be imported; the message says why in one line."""


def is_users(name: str) -> bool:
    """Whether a name is that of the user's code, and not one that this project or a library knows."""
    prefix, colon, _ = name.partition(":")
    return bool(colon) and prefix not in LIBRARIES


def resolve(name: str) -> Any:
    """The object that `package.module:object` names; imports its module.

    Raises:
        UserCodeError: the module cannot be imported, or has no such object.
    """
    try:
        return pkgutil.resolve_name(name)
    except Exception as error:  # importing runs others' code, which can raise anything
        raise UserCodeError(f"cannot be imported: {one_line(error)}") from error


def user_modules(name: str) -> dict[str, Path]:
    """The imported modules of the package that a name of the user's is in, and their files; empty for other names."""
    if not is_users(name):
        return {}
    package = name.partition(":")[0].partition(".")[0]
    loaded = {m: sys.modules[m] for m in sorted(sys.modules) if m == package or m.startswith(f"{package}.")}
    files = {module: getattr(there, "__file__", None) or "" for module, there in loaded.items()}
    return {module: Path(file) for module, file in files.items() if file.endswith(".py")}


def code_hash(path: Path) -> str:
    """16 hex digits of a Python file that comments, docstrings and line breaks do not change.

    Raises:
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        tree = ast.parse(content)
    except SyntaxError:  # being edited right now
        return hashlib.sha256(content).hexdigest()[:16]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node) is not None :] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def one_line(error: Exception) -> str:
    """An exception's type and message in one line; of a plain `ValueError` the message alone."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removeprefix("ValueError: ")
