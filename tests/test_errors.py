"""One tree of errors: whatever is raised at a user is told in one line."""

import importlib
import pkgutil
import re

import pytest

import tune_topkd
from tune_topkd import errors
from tune_topkd.cli import app
from tune_topkd.errors import TuneTopKDError

INTERNAL = {"FolderBusyError", "NotTheFolderError", "OutdatedAttemptError", "StorageError", "WorkerLostError"}
"""Of a worker, which reports them to the driver in words."""


def all_classes():
    """The exceptions of every module of the package."""
    for module in pkgutil.walk_packages(tune_topkd.__path__, "tune_topkd."):
        if module.name != "tune_topkd.__main__":
            found = vars(importlib.import_module(module.name)).values()
            yield from (c for c in found if isinstance(c, type) and issubclass(c, Exception))


@pytest.fixture(scope="module")
def ours():
    """The package's own public ones."""
    return {c for c in all_classes() if c.__module__.startswith("tune_topkd.") and not c.__name__.startswith("_")}


def test_every_error_of_ours_is_in_the_tree_or_a_workers(ours):
    assert {c.__name__ for c in ours if not issubclass(c, TuneTopKDError)} == INTERNAL


def parent(error):
    """The class above it in the tree; a store's error is an `OSError` as well."""
    return next(base for base in error.__bases__ if issubclass(base, ValueError))


def test_the_tree_is_drawn_as_it_is(ours):
    drawn, above = {}, {}
    for indent, name, room in re.findall(r"^( +[│ ├└─]*)(\w+Error) *(?:(\w+):)?", errors.__doc__, re.MULTILINE):
        above[len(indent)] = name
        drawn[name] = (above.get(len(indent) - 4, "ValueError"), room or "errors")
    there = {
        c.__name__: (parent(c).__name__, c.__module__.split(".")[1]) for c in ours if issubclass(c, TuneTopKDError)
    }
    assert drawn == there


def test_a_user_is_told_what_is_theirs_and_the_disks_and_no_fault_of_ours():
    assert app._told(TuneTopKDError("the rule")) == "the rule"
    assert app._told(OSError(28, "No space left on device", "/runs/x")) == "/runs/x: No space left on device"
    fault = ValueError("ours")
    with pytest.raises(ValueError, match="ours") as raised:
        app._told(fault)
    assert raised.value is fault
