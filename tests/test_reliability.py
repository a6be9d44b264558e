"""docs/reliability.md: each test that a promise is shown by is there."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = [line for line in (TESTS.parent / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")]
SHOWN = sorted({shown for row in ROWS for shown in re.findall(r"`(test_\w+\.py[^`]*)`", row)})


def test_every_promise_names_its_tests():
    faults = [row for row in ROWS if not row.startswith(("| **", "| fault", "| sweep", "| seed", "| all"))]
    assert len(faults) > 60
    assert [row for row in faults if not re.search(r"`…?\w*test_\w+\.py", row)] == []


@pytest.mark.parametrize("shown", SHOWN)
def test_a_test_that_is_named_is_there(shown):
    module, _, name = shown.partition("::")
    names = re.findall(r"^def (test_\w+)", (TESTS / module).read_text(), re.M)
    pattern = re.escape(name).replace("…", r"\w*") if name else r"\w+"
    assert any(re.fullmatch(pattern, there) for there in names), f"{module} has no test like {name}"
