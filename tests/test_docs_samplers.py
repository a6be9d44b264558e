"""docs/samplers.md is true: its classes pass the checks, its sections are a config's, and a sweep runs by them."""

import re
import sys
from pathlib import Path

import formulas
import pytest
import yaml
from test_simulated import sweep_of

from tune_topkd.config import dump_config
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_events
from tune_topkd.search import audit_decisions

TEXT = (Path(__file__).parents[1] / "docs" / "samplers.md").read_text()
SAMPLER, SCHEDULER, TEST = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
DEFAULT, *CHOSEN = [
    yaml.safe_load(section)["sweep"] for section in re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S)
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with both modules."""
    (tmp_path / "nearby.py").write_text(SAMPLER)
    (tmp_path / "halving.py").write_text(SCHEDULER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for module in ("nearby", "halving"):
        sys.modules.pop(module, None)


def test_the_first_section_is_the_default():
    config = formulas.sweep_config()
    assert formulas.sweep_config(sweep=DEFAULT) == config


def test_a_sweep_runs_by_what_the_sections_name(here):
    chosen = CHOSEN[0] | CHOSEN[1] | {"asha": None}
    _, state, reason = sweep_of(here / "l.jsonl", **chosen)
    assert (reason, state.running()) == ("finished", [])
    pruned = {record.reason for record in state.arm("search") if record.status is TrialStatus.PRUNED}
    assert pruned
    assert all(re.fullmatch(r"halving:Halving at epoch [5-8]", reason) for reason in pruned)
    assert audit_decisions(formulas.sweep_config(sweep=chosen), read_events(here / "l.jsonl")[0])[0] == []


def test_the_tests_that_it_shows_pass(here):
    (here / "space.yaml").write_text(dump_config(formulas.sweep_config()))
    names: dict[str, object] = {}
    exec(TEST, names)
    names["test_nearby"]()
    names["test_halving"]()


def test_its_sampler_is_short_and_simulate_is_where_it_says():
    assert len(SAMPLER.splitlines()) <= 25
    assert simulate.__module__ in TEXT
