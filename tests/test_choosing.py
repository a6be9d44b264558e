"""Samplers and schedulers by the names that a config gives: ours, and the user's."""

import random
import re
import sys
from importlib import metadata
from pathlib import Path

import formulas
import pytest
import yaml
from test_outside import raw_space
from test_samplers import SAMPLER_CASES
from test_samplers import SWEEP_CASES
from test_search import told
from test_simulated import config
from test_simulated import rising
from test_simulated import sweep_of

from tune_topkd.cli import main
from tune_topkd.config import SCHEDULERS
from tune_topkd.config import ConfigError
from tune_topkd.config import config_from
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.search import Asha
from tune_topkd.search import ChoiceError
from tune_topkd.search import RandomSampler
from tune_topkd.search import Search
from tune_topkd.search import TpeSampler
from tune_topkd.search import audit_decisions
from tune_topkd.search import choice_problems
from tune_topkd.search import sampler_of
from tune_topkd.search import scheduler_of
from tune_topkd.search.conformance import AXES
from tune_topkd.search.conformance import check_sampler
from tune_topkd.search.conformance import check_scheduler
from tune_topkd.search.search import UndecidedError
from tune_topkd.space import Space
from tune_topkd.sweep import audit_sweep
from tune_topkd.sweep import identity
from tune_topkd.sweep import preflight

MODULE = """
import random
from tune_topkd.ledger import Decision

class Nearby:
    def __init__(self, axes, seed, keep=0.7):
        self.axes, self.seed, self.keep, self.best = axes, seed, keep, None

    def ask(self, number):
        draw = random.Random(f"{self.seed} {number}")
        point = {axis.name: axis.at(draw.random()) for axis in self.axes}
        kept = {} if self.best is None else self.best[1]
        return point | {name: value for name, value in kept.items() if draw.random() < self.keep}

    def take(self, number, proposal):
        return dict(proposal)

    def tell(self, record):
        if record.value is not None and (self.best is None or record.value > self.best[0]):
            self.best = record.value, dict(record.proposal)

class Halving:
    def __init__(self, config, *, first=2):
        self.first, self.values = first, {}

    def decide(self, key, epoch, value):
        seen = self.values.setdefault(epoch, [])
        seen.append(value)
        return Decision.PRUNE if epoch >= self.first and value < sorted(seen)[len(seen) // 2] else "continue"

    def replay(self, state):
        for record in state.arm("search"):
            for epoch, metrics in record.reports.items():
                self.values.setdefault(epoch, []).append(metrics["val_top1"])

class Lasting(Nearby):
    def ask(self, number):
        if number == 9:
            raise ArithmeticError("no\\nmore")
        return super().ask(number)

class Outside(Nearby):
    def ask(self, number):
        return super().ask(number) | {"k": 21}

class Unseeded(Nearby):
    def ask(self, number):
        return super().ask(number) | {"lr": random.uniform(0.1, 0.2)}

class Refusing(Nearby):
    def __init__(self, axes, seed, keep):
        raise ValueError(f"keep must be at most 1, but got {keep}")

class Enthusiast(Halving):
    def decide(self, key, epoch, value):
        return True

def anything(*arguments, **options):
    return options

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's; it is forgotten afterwards."""
    name = f"choosing_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def edited(module: str, tmp_path: Path, old: str, new: str) -> None:
    """The module with another text in it, as another process would find it."""
    path = tmp_path / f"{module}.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    sys.modules.pop(module, None)


def choices(module, sampler="Nearby", scheduler="Halving"):
    """The settings that name both."""
    return {"sampler": {"name": f"{module}:{sampler}"}, "scheduler": f"{module}:{scheduler}", "asha": None}


# --- ours -----------------------------------------------------------------------------------------------------------


def test_by_default_tpe_proposes_and_asha_stops():
    plain = formulas.sweep_config()
    assert (plain.sweep.sampler.name, plain.sweep.scheduler.name) == ("tpe", "asha")
    sampler = sampler_of(plain)(AXES, 0)
    assert isinstance(sampler, TpeSampler)
    assert sampler.ask(0) == TpeSampler(AXES, 0).ask(0)
    assert isinstance(scheduler_of(plain), Asha)


@pytest.mark.parametrize("name", SWEEP_CASES)
def test_each_sampler_conforms_and_a_sweep_by_it_is_right(tmp_path, name):
    axes = AXES[1:3] if name == "gp" else AXES  # whole numbers cost it most; the sweep below has them
    check_sampler(sampler_of(config(sampler=name)), axes)
    settings = {"sampler": name, "trials": 9}
    assert list(choice_problems(config(**settings))) == []
    _, state, reason = sweep_of(tmp_path / "l", **settings)
    assert (reason, state.running()) == ("finished", [])
    assert audit_decisions(config(**settings), read_events(tmp_path / "l")[0])[0] == []


@pytest.mark.parametrize("name", SWEEP_CASES)
def test_a_sweep_by_each_sampler_cut_anywhere_goes_on_as_if_it_had_not_been(tmp_path, name):
    """With one trial at a time to the same lines; with several every new proposal is still what an audit draws."""
    settings = {"sampler": name, "trials": 7, "startup_trials": 2}
    for at_once in (1, 3):
        whole = tmp_path / f"whole{at_once}"
        sweep_of(whole, at_once=at_once, **settings)
        lines = whole.read_bytes().splitlines(keepends=True)
        for cut in random.Random(name).sample(range(2, len(lines)), 2):
            part = tmp_path / "part"
            part.write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
            sweep_of(part, at_once=at_once, **settings)
            if at_once == 1:
                assert told(part) == told(whole), cut
            assert audit_decisions(config(**settings), read_events(part)[0])[0] == [], (at_once, cut)


@pytest.mark.parametrize("name", SAMPLER_CASES)
def test_a_baseline_that_is_tuned_alike_has_the_searchs_sampler(tmp_path, name):
    alike = {"methods": ["kd"], "trials": 1, "match": True}
    settings = {"sampler": name, "trials": 5, "startup_trials": 2, "asha": None}
    plan = formulas.sweep_config(sweep=settings, baselines=alike, recipe={"epochs": 2})
    with Ledger.create(tmp_path / "l", Header(sweep="s", id="0", seed=0, trials=5), is_durable=False) as ledger:
        ledger.append(Driver.here(trials=5))
        simulate(Search(plan, ledger), rising, at_once=1)
        kd = ledger.state.arm("kd")
    assert len(kd) == 5
    sampler = sampler_of(plan)(Space.of_baseline(plan, "kd").axes(), 0)
    for record in kd:
        assert record.key.number == 0 or record.proposal == sampler.ask(record.key.number)
        sampler.take(record.key.number, record.proposal)
        sampler.tell(record)
    assert audit_decisions(plan, read_events(tmp_path / "l")[0])[0] == []


@pytest.mark.parametrize("name", SAMPLER_CASES)
def test_an_audit_finds_a_proposal_that_is_another_samplers(tmp_path, name):
    other = "qmc" if name == "random" else "random"
    sweep_of(tmp_path / "l", sampler=other, trials=8, startup_trials=2)
    found, _ = audit_decisions(config(sampler=name, trials=8, startup_trials=2), read_events(tmp_path / "l")[0])
    assert any("is not what the sampler proposes" in finding for finding in found)


@pytest.mark.parametrize(("name", "package"), [("cmaes", "cmaes"), ("gp", "optuna"), ("qmc", "scipy")])
def test_a_sampler_without_its_package_is_one_problem(monkeypatch, name, package):
    version = metadata.version

    def without(asked):
        if asked == package:
            raise metadata.PackageNotFoundError(asked)
        return version(asked)

    monkeypatch.setattr(metadata, "version", without)
    (problem,) = choice_problems(config(sampler=name))
    assert (problem.key, problem.value) == ("sweep.sampler.name", name)
    assert problem.rule.endswith(f"and is not installed: pip install --upgrade {package}")


def test_the_gaussian_process_asks_for_an_optuna_that_sees_trials_at_work(monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.6.0" if name == "optuna" else version(name))
    (problem,) = choice_problems(config(sampler="gp"))
    assert problem.rule == "needs the package optuna 5 or newer, and here it is 4.6.0: pip install --upgrade optuna"
    assert list(choice_problems(config(sampler="tpe"))) == []


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_scheduler_conforms(name):
    check_scheduler(lambda: scheduler_of(config(scheduler=name)))


def test_a_sweep_has_the_sampler_that_its_config_names(tmp_path):
    settings = config(sampler="random")
    _, state, _ = sweep_of(tmp_path / "l", sampler="random")
    sampler = RandomSampler(Space.of(settings).axes(), settings.sweep.seed)
    proposals = [record.proposal for record in state.arm("search")]
    assert proposals == [sampler.ask(number) for number in range(len(proposals))]
    found, _ = audit_decisions(config(), read_events(tmp_path / "l")[0])
    assert any("is not what the sampler proposes" in finding for finding in found), (
        "the audit has another by this config"
    )


# --- the user's -----------------------------------------------------------------------------------------------------


def test_both_of_the_users_conform(module):
    settings = config(**choices(module))
    check_sampler(sampler_of(settings))
    check_scheduler(lambda: scheduler_of(settings))
    assert list(choice_problems(settings)) == []


@pytest.mark.parametrize("at_once", [1, 5])
def test_a_sweep_by_them_is_right_and_twice_the_same(module, tmp_path, at_once):
    for name in ("one", "other"):
        _, state, reason = sweep_of(tmp_path / name, at_once=at_once, **choices(module))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert (reason, len(state.arm("search"))) == ("finished", state.target)
    pruned = [record.reason for record in state.arm("search") if record.status is TrialStatus.PRUNED]
    assert set(pruned) <= {f"{module}:Halving at epoch {epoch}" for epoch in range(2, formulas.EPOCHS)}
    assert len(pruned) > 3
    assert audit_decisions(config(**choices(module)), read_events(tmp_path / "one")[0])[0] == []


def test_a_sweep_by_them_cut_anywhere_goes_on_as_if_it_had_not_been(module, tmp_path):
    settings = {"trials": 8, **choices(module)}
    sweep_of(tmp_path / "whole", at_once=1, **settings)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for cut in range(2, len(lines), 3):
        part = tmp_path / "part"
        part.write_bytes(b"".join(lines[:cut]))
        sweep_of(part, at_once=1, **settings)
        assert told(part) == told(tmp_path / "whole"), cut
    assert audit_decisions(config(**settings), read_events(part)[0])[0] == []


def test_options_go_to_the_factory(module, tmp_path):
    proposals = []
    for keep in (0.1, 0.9):
        settings = {"sampler": {"name": f"{module}:Nearby", "keep": keep}}
        _, state, _ = sweep_of(tmp_path / str(keep), **settings)
        proposals.append([record.proposal for record in state.arm("search")])
    assert proposals[0][0] == proposals[1][0]
    assert proposals[0] != proposals[1]
    late = config(scheduler={"name": f"{module}:Halving", "first": 8}, asha=None)
    sweep_of(tmp_path / "late", scheduler={"name": f"{module}:Halving", "first": 8}, asha=None)
    ends = {r.epoch for r in read_state(tmp_path / "late").arm("search") if r.status is TrialStatus.PRUNED}
    assert ends == {8}
    assert audit_decisions(late, read_events(tmp_path / "late")[0])[0] == []


# --- held to their protocols ----------------------------------------------------------------------------------------

BROKEN = {
    "no module": (
        "sampler",
        "no_such_package:x",
        r"cannot be imported: ModuleNotFoundError.*; known: cmaes, gp, qmc, random, tpe; or",
    ),
    "no scheduler": ("scheduler", "{}:Halvin", r"has no attribute 'Halvin'; known: asha; or package\.module:factory"),
    "no factory": ("sampler", "{}:number", r"must be a factory, which is called, but is a int"),
    "no sampler": (
        "sampler",
        "{}:anything",
        r"must give a tune_topkd\.search\.Sampler, but gives a dict, without ask, take, tell",
    ),
    "no replay": ("scheduler", "{}:anything", r"Scheduler, but gives a dict, without decide, replay"),
    "an argument": ("sampler", "{}:Refusing", r"cannot be made with no options: TypeError: .* missing 1 .* 'keep'"),
    "too far": ("sampler", "{}:Outside", r"ask\(\): k must be from 1 to 20, not 21"),
    "by chance": ("sampler", "{}:Unseeded", r"must propose the same for the same seed and trials, but proposed"),
    "no decision": ("scheduler", "{}:Enthusiast", r"must give Decision\.CONTINUE or Decision\.PRUNE, but gives True"),
}


@pytest.mark.parametrize(("which", "name", "rule"), BROKEN.values(), ids=BROKEN)
def test_what_breaks_a_rule_is_one_problem(module, which, name, rule):
    settings = config(**{which: name.format(module), "asha": None})
    (problem,) = choice_problems(settings)
    assert (problem.key, problem.value) == (f"sweep.{which}.name", name.format(module))
    assert re.search(rule, problem.rule)
    assert len(str(problem).splitlines()) == 1


OPTIONS = {
    "unknown": ({"name": "{}:Nearby", "kep": 1}, "kep", "is no option of .*:Nearby; did you mean 'keep'. known: keep"),
    "ours": ({"name": "{}:Nearby", "seed": 1}, "seed", "is no option of .*:Nearby; known: keep"),
    "refused": (
        {"name": "{}:Refusing", "keep": 2},
        "name",
        "cannot be made with .'keep': 2.: keep must be at most 1, but",
    ),
}


@pytest.mark.parametrize(("chosen", "option", "rule"), OPTIONS.values(), ids=OPTIONS)
def test_an_option_that_is_not_taken_is_one_problem(module, chosen, option, rule):
    (problem,) = choice_problems(config(sampler=chosen | {"name": chosen["name"].format(module)}))
    assert problem.key == f"sweep.sampler.{option}"
    assert re.search(rule, problem.rule)


def test_a_factory_that_takes_any_option_is_given_it(module):
    (problem,) = choice_problems(config(sampler={"name": f"{module}:anything", "x": 1}))
    assert "without ask, take, tell" in problem.rule


def test_what_is_raised_in_the_middle_of_a_sweep_is_one_line_that_names_it(module, tmp_path):
    settings = {"sampler": f"{module}:Lasting"}
    with pytest.raises(ChoiceError) as told:
        sweep_of(tmp_path / "l", **settings)
    text = f"sweep.sampler.name = '{module}:Lasting': ask() raised ArithmeticError: no more"
    assert str(told.value) == text
    assert str(UndecidedError.of(told.value)) == f"what comes next cannot be decided: {text}"
    assert len(read_state(tmp_path / "l").arm("search")) == 9


def test_a_ledger_that_the_users_code_does_not_take_is_told_in_one_line(module, tmp_path):
    settings = config(**choices(module))
    sweep_of(tmp_path / "l", **choices(module))
    edited(module, tmp_path, "def replay(self, state):", "def replay(self, state, more):")
    with (
        Ledger.open(tmp_path / "l") as ledger,
        pytest.raises(
            UndecidedError, match=r"cannot be decided: sweep\.scheduler\.name = .*replay\(\) raised TypeError"
        ),
    ):
        Search(settings, ledger)


# --- resume and audit -----------------------------------------------------------------------------------------------


def findings(folder, settings):
    """What an audit finds, but for the checkpoints, which simulated trials have none of."""
    return [finding for finding in audit_sweep(settings, folder) if "checkpoint" not in finding]


def test_an_audit_takes_the_decisions_by_the_users_code_as_it_is_now(module, tmp_path):
    settings = config(**choices(module))
    sweep_of(tmp_path / "ledger.jsonl", **choices(module))
    assert findings(tmp_path, settings) == []
    edited(module, tmp_path, "draw.random() < self.keep", "draw.random() > self.keep")
    assert any("is not what the sampler proposes" in finding for finding in findings(tmp_path, settings))
    edited(module, tmp_path, "draw.random() > self.keep", "draw.random() < self.keep")
    edited(module, tmp_path, "and value < sorted", "and value > sorted")
    assert any("where prune is right" in finding for finding in findings(tmp_path, settings))


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("class Nearby:", "class Near:", "has no attribute 'Nearby'"),
        ("draw = random", "draw = rundom", "ask() raised NameError"),
    ],
)
def test_an_audit_by_code_that_fails_says_so(module, tmp_path, old, new, rule):
    settings = choices(module, sampler="Nearby")
    sweep_of(tmp_path / "ledger.jsonl", **settings)
    edited(module, tmp_path, old, new)
    if old.startswith("class"):
        edited(module, tmp_path, "(Nearby)", "(Near)")
    (finding,) = findings(tmp_path, config(**settings))
    assert rule in finding


def space_with(module, **sweep):
    """A search space on the digits, by these settings of the sweep."""
    return raw_space("digits", sweep=choices(module) | sweep)


def test_their_code_is_what_a_sweep_depends_on(module, tmp_path):
    settings = config_from(space_with(module), "t")
    before = identity.identities(settings, None)
    assert f"code {module}" in before
    assert identity.identities(config_from(raw_space("digits"), "t"), None).keys() == before.keys() - {f"code {module}"}
    edited(module, tmp_path, "keep=0.7", "keep=0.8")
    (problem,) = identity.changes(before, identity.identities(settings, None), settings)
    assert problem.key == f"code {module}"
    assert "changed since the sweep began" in problem.rule


# --- what check and resume say --------------------------------------------------------------------------------------


def written(tmp_path: Path, raw: dict) -> str:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(raw))
    return str(tmp_path / "space.yaml")


def test_a_space_that_names_them_is_checked_where_the_user_is(module, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    for scheduler, code in (("Halving", 0), ("Halvin", 2)):
        path = written(tmp_path, space_with(module, scheduler=f"{module}:{scheduler}"))
        monkeypatch.setattr(sys, "argv", ["launch.py", "check", path])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"error: {path}: sweep.scheduler.name = '{module}:Halvin': cannot be imported: AttributeError"
    )


def test_all_problems_are_told_at_once_and_again_when_a_sweep_goes_on(module, tmp_path):
    raw = space_with(module, sampler=f"{module}:Outside", scheduler=f"{module}:Enthusiast")
    raw["student"] = "digits_linaer"
    keys = ["sweep.sampler.name", "sweep.scheduler.name", "student.name"]
    with pytest.raises(ConfigError) as error:
        preflight.load_checked(written(tmp_path, raw))
    assert [problem.key for problem in error.value.problems] == keys
    with pytest.raises(ConfigError) as error:
        preflight.check_again(config_from(raw, "t"), "sweep.yaml", None)
    assert [problem.key for problem in error.value.problems] == keys
