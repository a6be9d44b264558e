"""Whose code a name is, and what identifies it."""

import sys

import pytest

from tune_topkd.user_code import UserCodeError
from tune_topkd.user_code import code_hash
from tune_topkd.user_code import is_users
from tune_topkd.user_code import resolve
from tune_topkd.user_code import user_modules


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", False),
        ("cifar:resnet20", False),
        ("torchvision:resnet18", False),
        ("timm:pit_ti_224", False),
        ("mine:network", True),
        ("mine.networks:small", True),
        ("cifar_of_mine:network", True),
        ("topkd", False),
    ],
)
def test_a_name_is_the_users_if_it_has_a_colon_and_no_librarys_prefix(name, expected):
    assert is_users(name) == expected


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user's with two modules, and its name."""
    name = f"package_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "networks.py").write_text(f"from {name} import layers\n\nsmall = layers.WIDTH\n")
    (folder / "layers.py").write_text("WIDTH = 4\n")
    (folder / "unused.py").write_text("")
    (folder / "broken.py").write_text("raise RuntimeError('no\\nluck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def test_the_object_is_imported_and_its_package_is_what_was_imported_with_it(package, tmp_path):
    name = f"{package}.networks:small"
    assert user_modules(name) == {}
    assert resolve(name) == 4
    assert user_modules(name) == {
        package: tmp_path / package / "__init__.py",
        f"{package}.layers": tmp_path / package / "layers.py",
        f"{package}.networks": tmp_path / package / "networks.py",
    }


@pytest.mark.parametrize("name", ["resnet20", "torchvision:resnet18", "no_such_package:network"])
def test_what_is_not_the_users_or_not_imported_has_no_modules(name):
    assert user_modules(name) == {}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_package:x", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("{}.networks:large", "cannot be imported: AttributeError: module '{}.networks' has no attribute 'large'"),
        ("{}.broken:x", "cannot be imported: RuntimeError: no luck"),
        ("not a name:x", "cannot be imported: invalid format: 'not a name:x'"),
    ],
)
def test_what_cannot_be_imported_is_told_in_one_line(package, name, reason):
    with pytest.raises(UserCodeError) as told:
        resolve(name.format(package))
    assert str(told.value) == reason.format(package)


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ("x = 1\n\n\ndef f():\n    return x\n", True),
        ("# a remark\nx = 1\ndef f():\n    return (x)\n", True),
        ('"""A module."""\nx = 1\ndef f():\n    """Say it."""\n    return x\n', True),
        ("x = 2\ndef f():\n    return x\n", False),
        ("x = 1\ndef f():\n    return x +\n", False),
    ],
)
def test_the_hash_of_code_is_of_what_it_does(tmp_path, change, is_same):
    (tmp_path / "a.py").write_text("x = 1\ndef f():\n    return x\n")
    (tmp_path / "b.py").write_text(change)
    assert (code_hash(tmp_path / "a.py") == code_hash(tmp_path / "b.py")) == is_same
