"""How many trials run beside one another where a config says `auto`: measured on a real Ray, with made-up speeds."""

import gc
import json
import logging
import os
import re
import time
from collections import Counter
from pathlib import Path

import formulas
import pytest
import ray
import test_cli
import test_sweep
import torch

from tune_topkd.config import ConfigError
from tune_topkd.config import config_from
from tune_topkd.config import dump_config
from tune_topkd.config import load_config
from tune_topkd.config import read_yaml
from tune_topkd.execution import ResourceError
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.execution import cluster
from tune_topkd.execution import packing
from tune_topkd.execution import run_sweep
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Share
from tune_topkd.ledger import TrialStatus
from tune_topkd.search import Search
from tune_topkd.sweep import Callback
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import doctor
from tune_topkd.sweep import preflight
from tune_topkd.sweep import workspace
from tune_topkd.sweep.api import as_overrides
from tune_topkd.train import Probe

pytestmark = test_sweep.pytestmark
inside = test_cli.inside
space = test_cli.space

SECONDS = 0.01
LONGEST_WAIT = 60
"""Seconds for Ray to take back what a killed worker had."""


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """What the one node of a private Ray has; its GPUs are made up, and so may be its CPUs."""
    node = Share(4.0, 2.0)
    with pytest.MonkeyPatch.context() as patch, cluster.scratch_folder() as scratch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the workers are to find the formulas
        patch.setenv("TUNE_TOPKD_CACHE_DIR", str(tmp_path_factory.mktemp("cache-of-workers")))
        ray.init(
            address="local",
            num_cpus=int(node.cpus),
            num_gpus=int(node.gpus),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=scratch,
        )
        try:
            yield node
        finally:
            gc.collect()
            ray.shutdown()


@pytest.fixture
def pack(node, tmp_path, monkeypatch):
    """Packs trials of made-up speeds under some settings of a sweep, by default on the CPUs."""
    monkeypatch.setattr(packing, "SECONDS", SECONDS)

    def pack(rates, settings=None, **what):
        settings = {"max_concurrent": None} | (settings or {"cpus_per_trial": "auto"})
        trial = formulas.probed(tmp_path, node, rates, **what)
        return packing.pack(formulas.sweep_config(sweep=settings), trial, formulas.probe)

    yield pack
    wait_until_all_is_given_back(node)


def free(node):
    resources = ray.available_resources()
    return Share(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def wait_until_all_is_given_back(node):
    deadline = time.monotonic() + LONGEST_WAIT
    while free(node) != node:
        assert time.monotonic() < deadline, free(node)
        time.sleep(0.02)


def at_once(tried):
    return [packed.at_once for packed in tried]


def notes(folder):
    """What the trainings that were at work have noted, by how many there were at once."""
    found = {}
    for path in sorted(folder.glob("[0-9]*")):
        found.setdefault(int(path.name.partition("-")[0]), []).append(json.loads(path.read_text()))
    return found


# --- which is best ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_trains_the_most_images_together_comes_first(pack, tmp_path):
    tried = pack({1: 100.0, 2: 80.0}, {"cpus_per_trial": "auto", "max_concurrent": 2}, peak_bytes=30)
    assert at_once(tried) == [2, 1]
    assert [packed.images_per_second for packed in tried] == [160.0, 100.0]
    assert [packed.share for packed in tried] == [Share(2.0, 0.0), Share(4.0, 0.0)]
    assert [packed.memory for packed in tried] == pytest.approx([0.06, 0.03])
    for number, each in notes(tmp_path).items():
        cpus = 4 // number
        assert {(note["given"]["CPU"], note["threads"], note["gpu_share"]) for note in each} == {(cpus, cpus, 0.0)}
        assert {note["seconds"] for note in each} == {SECONDS}
    assert {number: len(each) for number, each in notes(tmp_path).items()} == {1: 1, 2: 2}


# --- on GPUs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trials_share_each_gpu_and_its_part_of_the_cpus(pack, tmp_path):
    settings = {"cpus_per_trial": "auto", "gpus_per_trial": "auto"}
    tried = pack({2: 100.0, 4: 60.0}, settings, peak_bytes=230)
    assert at_once(tried) == [4, 2]
    assert [packed.images_per_second for packed in tried] == [240.0, 200.0]
    assert [packed.share for packed in tried] == [Share(1.0, 0.5), Share(2.0, 1.0)]
    assert [packed.memory for packed in tried] == pytest.approx([0.46, 0.23])
    found = notes(tmp_path)
    assert found.keys() == {2, 4}
    for number, each in found.items():
        assert [note["given"] for note in each] == [{"CPU": 4 / number, "GPU": 2 / number}] * number
        assert {(note["threads"], note["gpu_share"]) for note in each} == {(4 // number, 2 / number)}
        assert Counter(note["gpus"] for note in each) == {"0": number // 2, "1": number // 2}


@pytest.mark.slow
def test_the_cpus_of_a_trial_are_at_most_its_gpus_part(pack, tmp_path):
    tried = pack({2: 100.0}, {"cpus_per_trial": 3.0, "gpus_per_trial": "auto", "max_concurrent": 2})
    assert [packed.share for packed in tried] == [Share(2.0, 1.0)]
    assert [note["given"] for note in notes(tmp_path)[2]] == [{"CPU": 2.0, "GPU": 1.0}] * 2


@pytest.mark.slow
def test_a_trial_of_several_gpus_has_the_cpus_of_all_of_them(pack, tmp_path):
    tried = pack({1: 100.0}, {"cpus_per_trial": "auto", "gpus_per_trial": 2.0}, peak_bytes=300)
    assert [(packed.share, packed.at_once) for packed in tried] == [(Share(4.0, 2.0), 1)]
    assert tried[0].memory == pytest.approx(0.3)
    (note,) = notes(tmp_path)[1]
    assert (note["given"], note["gpus"], note["gpu_share"]) == ({"CPU": 4.0, "GPU": 2.0}, "0,1", 1.0)


@pytest.mark.slow
def test_more_gpus_than_a_node_has_are_refused(pack):
    with pytest.raises(ResourceError, match=r"sweep\.gpus_per_trial = 4.*the most are 2"):
        pack({}, {"cpus_per_trial": "auto", "gpus_per_trial": 4.0})


# --- what is tried, on nodes and at speeds that are made up ------------------------------------------------------


def nodes(*shares):
    """As `ray.nodes` gives them; the last one is gone."""
    alive = [
        {"NodeID": str(i), "Alive": i < len(shares) - 1, "Resources": {"CPU": s.cpus, "GPU": s.gpus}}
        for i, s in enumerate(shares)
    ]
    return lambda: alive


@pytest.fixture
def tried_where(monkeypatch):
    """On which nodes trials are tried, none really."""
    where = []

    def tried(share, at_once, trial, probe, node_id, patience):
        where.append((node_id, at_once))
        return packing.Packed(share, at_once, 100.0, 0.01)

    monkeypatch.setattr(packing, "_tried", tried)
    return where


@pytest.fixture
def made_up(monkeypatch):
    """Packs on a node of four CPUs trials of these speeds and this memory: which came first, in which order tried."""
    monkeypatch.setattr(ray, "nodes", nodes(Share(4.0, 0.0), Share(99.0, 0.0)))

    def made_up(rates, memory=0.001, **settings):
        order = []

        def tried(share, at_once, *rest):
            order.append(at_once)
            return packing.Packed(share, at_once, at_once * rates[at_once], at_once * memory)

        monkeypatch.setattr(packing, "_tried", tried)
        settings = {"cpus_per_trial": "auto", "max_concurrent": None} | settings
        return at_once(packing.pack(formulas.sweep_config(sweep=settings), None, None)), order

    return made_up


def test_the_best_comes_first_and_the_others_as_they_were_tried(made_up):
    assert made_up({1: 100.0, 2: 80.0, 4: 50.0}) == ([4, 1, 2], [1, 2, 4])


@pytest.mark.parametrize(("of_two", "best"), [(51.4, [1, 2]), (51.6, [2, 1])])
def test_more_at_once_must_be_worth_it(made_up, of_two, best):
    assert made_up({1: 100.0, 2: of_two}, max_concurrent=2) == (best, [1, 2])


def test_it_stops_when_more_at_once_are_slower_together(made_up):
    assert made_up({1: 100.0, 2: 49.9, 4: 1000.0}) == ([1, 2], [1, 2])


@pytest.mark.parametrize(("memory", "numbers"), [(0.46, [1]), (0.23, [1, 2])])
def test_it_stops_when_twice_as_many_would_have_no_memory(made_up, memory, numbers):
    assert made_up({1: 100.0, 2: 100.0, 4: 100.0}, memory)[1] == numbers


@pytest.mark.parametrize(("limit", "numbers"), [(1, [1]), (3, [1, 2])])
def test_no_more_are_tried_than_may_run_at_once(made_up, limit, numbers):
    assert made_up({1: 100.0, 2: 100.0, 4: 100.0}, max_concurrent=limit)[1] == numbers


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"gpus_per_trial": "auto"}, r"sweep\.gpus_per_trial = auto: no node has as many GPUs; the most are 0"),
        ({"cpus_per_trial": "auto", "gpus_per_trial": 1.0}, r"sweep\.gpus_per_trial = 1.*the most are 0"),
    ],
)
def test_a_gpu_that_no_node_has_is_refused_and_nothing_tried(monkeypatch, tried_where, settings, told):
    monkeypatch.setattr(ray, "nodes", nodes(Share(4.0, 0.0), Share(99.0, 8.0)))
    with pytest.raises(ResourceError, match=told):
        packing.pack(formulas.sweep_config(sweep=settings), None, None)
    assert tried_where == []


def test_it_is_measured_on_the_node_with_the_most_gpus(monkeypatch, tried_where):
    monkeypatch.setattr(ray, "nodes", nodes(Share(64.0, 1.0), Share(16.0, 4.0), Share(32.0, 4.0), Share(99.0, 8.0)))
    config = formulas.sweep_config(sweep={"gpus_per_trial": "auto", "max_concurrent": None})
    packing.pack(config, None, None)
    assert tried_where == [("2", 4), ("2", 8), ("2", 16), ("2", 32)]


def test_without_gpus_it_is_measured_on_the_node_with_the_most_cpus(monkeypatch, tried_where):
    monkeypatch.setattr(ray, "nodes", nodes(Share(2.0, 1.0), Share(8.0, 0.0), Share(99.0, 0.0)))
    config = formulas.sweep_config(sweep={"cpus_per_trial": "auto", "max_concurrent": None})
    packing.pack(config, None, None)
    assert tried_where == [("1", 1), ("1", 2), ("1", 4), ("1", 8)]


@pytest.mark.parametrize("shares", [[], [Share(0.0, 0.0)]])
def test_a_cluster_without_cpus_is_refused(monkeypatch, tried_where, shares):
    monkeypatch.setattr(ray, "nodes", nodes(*shares, Share(99.0, 0.0)))
    config = formulas.sweep_config(sweep={"cpus_per_trial": "auto"})
    with pytest.raises(ResourceError, match=r"sweep\.cpus_per_trial = auto"):
        packing.pack(config, None, None)
    assert tried_where == []


@pytest.mark.parametrize(
    ("settings", "node", "shares"),
    [
        ({"cpus_per_trial": "auto"}, Share(2.0, 0.0), [(2, 0), (1, 0)]),
        ({"cpus_per_trial": "auto"}, Share(6.0, 0.0), [(6, 0), (3, 0), (1, 0)]),
        ({"cpus_per_trial": "auto"}, Share(16.0, 0.0), [(16, 0), (8, 0), (4, 0), (2, 0), (1, 0)]),
        ({"cpus_per_trial": "auto"}, Share(4.0, 2.0), [(4, 0), (2, 0), (1, 0)]),
        (
            {"cpus_per_trial": "auto", "gpus_per_trial": "auto"},
            Share(8.0, 1.0),
            [(8, 1), (4, 0.5), (2, 0.25), (1, 0.125)],
        ),
        (
            {"cpus_per_trial": "auto", "gpus_per_trial": "auto"},
            Share(2.0, 1.0),
            [(2, 1), (1, 0.5), (0.5, 0.25), (0.25, 0.125)],
        ),
        (
            {"cpus_per_trial": "auto", "gpus_per_trial": "auto"},
            Share(64.0, 8.0),
            [(8, 1), (4, 0.5), (2, 0.25), (1, 0.125)],
        ),
        (
            {"cpus_per_trial": 2.0, "gpus_per_trial": "auto"},
            Share(8.0, 1.0),
            [(2, 1), (2, 0.5), (2, 0.25), (1, 0.125)],
        ),
        ({"cpus_per_trial": "auto", "gpus_per_trial": 0.5}, Share(8.0, 1.0), [(4, 0.5)]),
        ({"cpus_per_trial": "auto", "gpus_per_trial": 1.0}, Share(24.0, 4.0), [(6, 1)]),
        ({"cpus_per_trial": "auto", "gpus_per_trial": 2.0}, Share(24.0, 4.0), [(12, 2)]),
    ],
)
def test_the_shares_that_are_tried(settings, node, shares):
    assert list(packing._shares(formulas.sweep_config(sweep=settings).sweep, node)) == shares


# --- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at_start", "at_work"])
def test_a_training_that_cannot_be_is_refused_with_its_cause(pack, node, when):
    with pytest.raises(ResourceError) as refused:
        pack({}, ends={1: ("raises", when)})
    message = str(refused.value)
    assert message.startswith("no trial can be run to see how many fit: ")
    assert "ValueError: there is no network of this name, said one of 1" in message
    assert "\n" not in message
    assert "\x1b" not in message
    wait_until_all_is_given_back(node)


@pytest.mark.slow
def test_a_training_that_dies_alone_is_refused(pack):
    with pytest.raises(ResourceError, match=r"no trial can be run to see how many fit: .*[Dd]ied"):
        pack({}, ends={1: ("dies", "at_work")})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "when"),
    [
        ("raises", "at_start"),
        ("dies", "at_work"),
        pytest.param("raises", "at_work", marks=pytest.mark.slow),
        pytest.param("dies", "at_start", marks=pytest.mark.slow),
    ],
)
def test_what_runs_alone_and_not_beside_others_is_taken_alone(pack, node, tmp_path, caplog, how, when):
    assert at_once(pack({1: 100.0, 4: 100.0}, ends={2: (how, when)})) == [1]
    assert 4 not in notes(tmp_path)
    assert "2 trials at once cannot be run" in caplog.text
    wait_until_all_is_given_back(node)


@pytest.fixture
def occupied(node):
    """Takes CPUs away for as long as the test lasts."""
    occupants = []

    class Occupant:
        def is_there(self):
            return True

    def occupied(cpus):
        occupants.append(ray.remote(num_cpus=cpus)(Occupant).remote())
        assert ray.get(occupants[-1].is_there.remote(), timeout=LONGEST_WAIT)

    yield occupied
    for occupant in occupants:
        ray.kill(occupant)


@pytest.mark.slow
def test_so_many_as_cannot_be_placed_are_not_to_be_had(pack, occupied, tmp_path, monkeypatch):
    occupied(1)
    really_tried = packing._tried

    def tried(share, at_once, *rest):
        if at_once > 2:  # which never fit: the time to wait is all the same, and those before need theirs
            rest = (*rest[:-1], 0.5)
        return really_tried(share, at_once, *rest)

    monkeypatch.setattr(packing, "_tried", tried)
    settings = {"cpus_per_trial": 1.0, "gpus_per_trial": "auto"}
    assert at_once(pack({2: 100.0, 4: 100.0}, settings)) == [2]
    assert notes(tmp_path).keys() == {2}


@pytest.mark.slow
def test_where_not_even_one_can_be_placed_it_is_refused(pack, occupied, monkeypatch):
    occupied(4)
    monkeypatch.setattr("tune_topkd.execution.nodes.LONGEST_START_OF_A_WORKER", 0.5)
    with pytest.raises(ResourceError, match=r"no trial can be run to see how many fit: .*[Tt]imeout"):
        pack({2: 100.0}, {"cpus_per_trial": 1.0, "gpus_per_trial": "auto"})


# --- what trials are told of their share --------------------------------------------------------------------------


@pytest.fixture
def sweep(node, tmp_path):
    """Runs small sweeps whose trials tell of their share and have too little memory on one CPU; gives their records."""

    def train(config, report, resume_from=None):
        for epoch in range(1 if resume_from is None else 2, config.recipe.epochs + 1):
            if epoch == 2 and config.threads == 1:
                raise MemoryError
            told = {"val_top1": 1.0, "threads": float(config.threads), "gpu_share": config.gpu_share}
            report(epoch, told, lambda folder: (folder / "state").touch())

    def sweep(epochs=1, **settings):
        settings = {"trials": 2, "asha": None, **settings}
        config = formulas.sweep_config(baselines=None, recipe={"epochs": epochs}, sweep=settings)
        header = Header(sweep="s", id="s", seed=0, trials=settings["trials"])
        with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
            run_sweep(Search(config, ledger), cluster=cluster.Cluster.now(), folder=tmp_path, train=train)
            return ledger.state.arm("search")

    return sweep


@pytest.mark.slow
def test_the_trials_of_a_sweep_are_told_their_share(sweep):
    records = sweep(cpus_per_trial=2.0)
    assert [record.status for record in records] == [TrialStatus.COMPLETED] * 2, records
    assert [(r.reports[1]["threads"], r.reports[1]["gpu_share"]) for r in records] == [(2, 0.0)] * 2


@pytest.mark.slow
def test_a_trial_that_ran_out_of_memory_is_told_its_larger_share(sweep):
    (record,) = sweep(epochs=2, trials=1, cpus_per_trial=1.0, gpus_per_trial=0.25)
    assert (record.status, record.retries) == (TrialStatus.COMPLETED, ["oom"]), record
    assert [(r["threads"], r["gpu_share"]) for r in record.reports.values()] == [(1, 0.25), (2, 0.5)]


# --- what a config may say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["auto", 4, 0.5])
def test_a_share_is_a_number_or_auto_and_stays_it(tmp_path, value):
    config = formulas.sweep_config(sweep={"cpus_per_trial": value, "gpus_per_trial": value})
    assert (config.sweep.cpus_per_trial, config.sweep.gpus_per_trial) == (value, value)
    (tmp_path / "sweep.yaml").write_text(dump_config(config))
    assert config_from(read_yaml(tmp_path / "sweep.yaml"), "test") == config


REFUSED = {
    "cpus: text": (
        ["--cpus-per-trial", "many"],
        "cpus_per_trial (from --cpus-per-trial) = 'many': must be a number or",
    ),
    "cpus: nothing": (["--cpus-per-trial", ""], "cpus_per_trial (from --cpus-per-trial) = '': must be a number or"),
    "cpus: none": (["--cpus-per-trial", "0"], "cpus_per_trial (from --cpus-per-trial) = 0.0: must be greater than 0"),
    "cpus: less": (["--cpus-per-trial=-1"], "cpus_per_trial (from --cpus-per-trial) = -1.0: must be greater than 0"),
    "cpus: no number": (["--cpus-per-trial", "nan"], "cpus_per_trial (from --cpus-per-trial) = nan: must be a finite"),
    "cpus: yes": (
        ["--set", "sweep.cpus_per_trial=true"],
        "cpus_per_trial (from --set sweep.cpus_per_trial=true) = True: must be a number or",
    ),
    "gpus: text": (
        ["--gpus-per-trial", "Auto"],
        "gpus_per_trial (from --gpus-per-trial) = 'Auto': must be a number or",
    ),
    "gpus: 1.5": (
        ["--gpus-per-trial", "1.5"],
        "gpus_per_trial (from --gpus-per-trial) = 1.5: must be a fraction up to 1",
    ),
    "gpus: less": (["--gpus-per-trial=-0.5"], "gpus_per_trial (from --gpus-per-trial) = -0.5: must be greater than or"),
    "gpus: endless": (["--gpus-per-trial", "inf"], "gpus_per_trial (from --gpus-per-trial) = inf: must be a finite"),
    "gpus: several, and nothing to measure": (
        ["--gpus-per-trial", "2", "--cpus-per-trial", "auto"],
        "cpus_per_trial (from --cpus-per-trial) = 'auto': must be a number where a trial has 2 GPUs",
    ),
    "gpus: a list": (
        ["--set", "sweep.gpus_per_trial=[1]"],
        "gpus_per_trial (from --set sweep.gpus_per_trial=[1]) = [1]: must be a number or",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_share_is_one_error_with_its_key(space, tmp_path, inside, case):
    options, words = REFUSED[case]
    done = inside("run", space, *options, "--runs-dir", tmp_path / "runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert f"sweep.{words}" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_sweep_that_was_begun_with_more_gpus_may_go_on(tmp_path):
    config = formulas.sweep_config(sweep={"gpus_per_trial": 2.0})
    (tmp_path / "sweep.yaml").write_text(dump_config(config))
    what = workspace.config_digest(config.model_dump(mode="json"))
    header = Header(sweep="s", id="i", seed=0, trials=1, digest=what)
    with Ledger.create(tmp_path / "ledger.jsonl", header) as ledger:
        assert workspace.frozen_config(tmp_path, ledger.state).sweep.gpus_per_trial == 2.0


@pytest.mark.parametrize("path", sorted(Path("search_spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_shipped_space_needs_several_gpus(path):
    assert load_config(path).sweep.gpus_per_trial <= 1


def test_sharing_a_gpu_that_is_not_there_is_refused_before_ray_starts(space, tmp_path, inside, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    done = inside("run", space, "--gpus-per-trial", "auto", "--runs-dir", tmp_path / "runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sweep.gpus_per_trial = 'auto': this machine has 0 GPUs that torch can use" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_auto_fits_every_machine_that_has_one(monkeypatch):
    config = formulas.sweep_config(sweep={"cpus_per_trial": "auto", "gpus_per_trial": "auto"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    preflight.check_machine(config, "x.yaml")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"sweep\.gpus_per_trial"):
        preflight.check_machine(config, "x.yaml")
    preflight.check_machine(formulas.sweep_config(sweep={"cpus_per_trial": "auto"}), "x.yaml")


def test_a_space_that_says_auto_can_be_checked(space, inside):
    done = inside("check", space, "--set", "sweep.cpus_per_trial=auto", "--set", "sweep.gpus_per_trial=auto", "--show")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("per_trial: auto") == 2


# --- the whole way ------------------------------------------------------------------------------------------------


class MadeUp(SimulatedExecutor):
    """Measures nothing, trains nothing, and notes what it was asked."""

    def __init__(self):
        super().__init__(lambda trial, epoch: {"val_top1": 50.0})
        self.measured, self.driven = [], []

    def measure(self, config, trial, probe):
        self.measured.append((config.sweep.cpus_per_trial, trial, probe))
        best = packing.Packed(Share(2.5, 0.25), 4, 12345.6, 0.1)
        return [best, packing.Packed(Share(10.0, 1.0), 1, 5000.4, 0.1)]

    def run(self, search, work):
        self.driven.append((search.config.sweep.cpus_per_trial, search.config.sweep.gpus_per_trial))
        return super().run(search, work)


class Told(Callback):
    """Keeps what a person is told."""

    def __init__(self):
        self.lines = []

    def on_message(self, text, kind):
        self.lines.append(text)


def test_the_best_number_is_told_frozen_and_kept_by_a_resume(space, tmp_path):
    runs, told, executor = Workspace(tmp_path, mlflow_uri=""), Told(), MadeUp()
    overrides = {"sweep.cpus_per_trial": "auto", "sweep.seed": 5, "space.batch_size": [16, 64, 32]}
    Sweep.new(space, "small", runs, as_overrides(overrides)).run([told], executor=executor)
    line = "packing: 4 trials at once, each on 2.5 CPUs and 0.25 GPUs (trials: images/s of all; 1: 5,000, 4: 12,346)"
    assert line in told.lines
    ((asked, trial, probe),) = executor.measured
    assert (asked, probe) == ("auto", Probe)
    assert (trial.method, trial.seed, trial.recipe.epochs) == ("topkd", 5, 4)
    assert trial.recipe.batch_size == 64, "what takes the most memory"
    assert Path(trial.teacher_checkpoint).is_file()
    assert trial.teacher_bank == str(Path(trial.teacher_checkpoint).parent)
    assert ": auto" not in (tmp_path / "small" / "sweep.yaml").read_text()
    resumed = Sweep("small", runs).resume(trials=40, executor=executor)
    assert resumed.reason == "finished"
    assert len(executor.measured) == 1
    assert executor.driven == [(2.5, 0.25)] * 2


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_measures_once_and_keeps_the_number(tmp_path):
    options = ["--runs-dir", tmp_path, "--set", "baselines=null", "--set", "sweep.asha=null"]
    options += ["--set", "teacher.recipe.epochs=2", "--trials", 2, "--epochs", 1]
    run = test_cli.launch("run", "search_spaces/digits.yaml", "--cpus-per-trial", "auto", *options)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if "packing" in line]
    assert len(lines) == 1, run.stderr
    found = re.fullmatch(
        r"packing: (\d+) trials? at once, each on (\d+) CPUs? \(trials: images/s of all; 1: [\d,]+(, \d+: [\d,]+)*\)",
        lines[0],
    )
    assert found, lines
    frozen = read_yaml(tmp_path / "digits" / "sweep.yaml")["sweep"]
    assert (frozen["cpus_per_trial"], frozen["gpus_per_trial"]) == (float(found[2]), 0.0)
    assert len(os.sched_getaffinity(0)) // int(found[2]) >= int(found[1])
    resumed = test_cli.launch("resume", "digits", "--runs-dir", tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "digits: 2 completed; finished" in resumed.stderr
    assert "packing" not in resumed.stderr


# --- what the doctor says -----------------------------------------------------------------------------------------


@pytest.fixture
def mps(tmp_path, monkeypatch):
    """What the doctor says of CUDA MPS on a machine with so many GPUs."""
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))

    def mps(gpus):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        return [(finding.text, finding.is_well) for finding in doctor._torch() if finding.what == "CUDA MPS"]

    return mps


def test_the_doctor_says_how_trials_on_a_gpu_can_overlap(mps):
    ((text, is_well),) = mps(1)
    assert text.startswith("does not run: ")
    assert "nvidia-cuda-mps-control -d" in text
    assert is_well


def test_the_doctor_sees_mps_run(mps, tmp_path):
    (tmp_path / "control").touch()
    assert mps(2) == [("runs", True)]


def test_without_gpus_the_doctor_says_nothing_of_mps(mps, tmp_path):
    (tmp_path / "control").touch()
    assert mps(0) == []
