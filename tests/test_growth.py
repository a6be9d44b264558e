"""A sweep that asks a cluster's autoscaler for nodes: what it asks for and when, and on Ray's own autoscaler."""

import json
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import formulas
import pytest
import ray
from servers import RayHead

from tune_topkd.execution import bridge
from tune_topkd.execution import growth
from tune_topkd.execution.cluster import Cluster
from tune_topkd.execution.growth import Growth
from tune_topkd.ledger import Share
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state

TESTS = Path(__file__).parent
NOT_A = [{"ray.io/node-id": "!in(a)"}]


class Groups:
    """Ray's placement groups: those that ask for something now, by number."""

    def __init__(self):
        self.states, self.made, self._numbers = {}, [], count()

    def placement_group(self, bundles, bundle_label_selector):
        number = next(self._numbers)
        self.states[number] = "PENDING"
        self.made.append((bundles, bundle_label_selector))
        return SimpleNamespace(id=SimpleNamespace(hex=lambda: f"id {number}"), number=number)

    def placement_group_table(self):
        return {f"id {number}": {"state": state} for number, state in self.states.items()}

    def remove_placement_group(self, group):
        del self.states[group.number]


@pytest.fixture
def groups(monkeypatch):
    groups = Groups()
    for name in ("placement_group", "placement_group_table", "remove_placement_group"):
        monkeypatch.setattr(growth, name, getattr(groups, name))
    return groups


@pytest.fixture
def told():
    return []


@pytest.fixture
def asker(groups, told):
    return Growth(Share(2.0, 0.5), told.append)


# --- asking -------------------------------------------------------------------------------------------------------


def test_each_place_is_asked_for_by_itself(asker, groups, told):
    asker.want(3, [])
    assert groups.made == [([{"CPU": 2.0, "GPU": 0.5}], None)] * 3
    assert told == ["the cluster's autoscaler is asked for room for 3 more trials"]


def test_what_is_asked_for_already_is_not_asked_for_again(asker, groups, told):
    asker.want(3, [])
    asker.want(3, [])
    assert len(groups.made) == 3
    asker.want(4, [])
    assert len(groups.made) == len(groups.states) == 4
    assert len(told) == 1


def test_less_is_asked_for_when_less_is_wanted_and_nothing_in_the_end(asker, groups):
    asker.want(3, [])
    asker.want(1, [])
    assert list(groups.states) == [0]
    asker.want(0, [])
    assert groups.states == {}


def test_what_got_a_place_gives_it_back_and_asks_anew_if_it_is_still_wanted(asker, groups):
    asker.want(2, [])
    groups.states[0] = "CREATED"
    asker.want(1, [])
    assert groups.states == {1: "PENDING"}
    groups.states[1] = "CREATED"
    asker.want(1, [])
    assert groups.states == {2: "PENDING"}


def test_what_got_a_place_gives_way_to_a_trial_and_the_others_go_on_asking(asker, groups):
    asker.want(3, [])
    groups.states[1] = "CREATED"
    asker.give_way()
    assert groups.states == {0: "PENDING", 2: "PENDING"}
    assert len(groups.made) == 3


def test_where_other_nodes_are_wanted_all_is_asked_for_anew(asker, groups):
    asker.want(2, [])
    asker.want(2, NOT_A)
    assert sorted(groups.states) == [2, 3]
    assert [selector for _, selector in groups.made] == [None, None, NOT_A, NOT_A]


def test_a_share_without_gpus_asks_for_none(groups):
    Growth(Share(1.0, 0.0), print).want(1, [])
    assert groups.made == [([{"CPU": 1.0}], None)]


def test_closed_it_asks_for_nothing(asker, groups):
    asker.want(2, [])
    asker.close()
    assert groups.states == {}


# --- how much ------------------------------------------------------------------------------------------------------


class Asked:
    """Stands for `Growth`: how much was asked for last."""

    places = None
    has_given_way = False

    def want(self, places, selector):
        self.places, self.selector = places, selector

    def give_way(self):
        self.has_given_way = True


def asked(at_work, *, startable, nodes, broker=None, set_aside=(), **settings):
    """What a sweep asks for with so many trials at work, and so many that it could start."""
    search = SimpleNamespace(config=formulas.sweep_config(sweep=settings), startable=lambda: startable)
    found = object.__new__(bridge.Bridge)
    there = Cluster(tuple(Share(cpus, 0.0) for cpus in nodes))
    growth = Asked()
    vars(found).update(search=search, _growth=growth, _live=set(range(at_work)), _broker=broker)
    vars(found)["_nodes"] = SimpleNamespace(hoped_for=(there, list(set_aside)))
    found._ask_for_nodes()
    assert growth.has_given_way is (growth.places is None)
    return growth.places


FREE = {"max_concurrent": None}


@pytest.mark.parametrize(
    ("at_work", "about", "expected"),
    [
        (2, {"startable": 100, "nodes": [2.0]}, 6),
        (2, {"startable": 3, "nodes": [2.0]}, 3),  # no more than there are trials for
        (2, {"startable": 0, "nodes": [2.0]}, 0),
        (0, {"startable": 100, "nodes": []}, 8),
        (
            4,
            {"startable": 100, "nodes": [2.0, 4.0]},
            2,
        ),  # a node that has just come counts, though its trials start later
        (2, {"startable": 100, "nodes": [16.0]}, 0),
        (2, {"startable": 100, "nodes": [2.0], "max_concurrent": 8}, 6),
        (2, {"startable": 100, "nodes": [8.0], "broker": SimpleNamespace(room=5)}, 3),  # the rest is another sweep's
        (2, {"startable": 100, "nodes": [2.0], "broker": SimpleNamespace(room=float("inf"))}, 6),  # there is no broker
        (0, {"startable": 100, "nodes": [2.0], "broker": SimpleNamespace(room=None)}, None),  # it has not answered
    ],
)
def test_as_much_is_asked_for_as_the_sweep_lacks(at_work, about, expected):
    assert asked(at_work, **({**FREE, "autoscale_to": 8} | about)) == expected


def test_without_limits_a_sweep_could_have_all_trials_that_it_can_start():
    search = SimpleNamespace(config=formulas.sweep_config(sweep=FREE), startable=lambda: 9)
    assert bridge.most_at_once(search, 2) == 11


# --- Ray's own autoscaler -------------------------------------------------------------------------------------------


class Autoscaling(RayHead):
    """A head without CPUs, whose autoscaler adds nodes of two CPUs, on this machine, and takes away those that idle."""

    def __init__(self, folder):
        path = folder / "autoscaler.json"
        options = ["--num-cpus=0", f"--autoscaling-config={path}"]
        super().__init__(folder, *options, AUTOSCALER_UPDATE_INTERVAL_S="1", RAY_FAKE_CLUSTER="1")
        kinds = {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "two": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 8},
        }
        provider = {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True}
        provider |= {"disable_launch_config_check": True, "gcs_address": self.address, "launch_multiple": True}
        config = {
            "cluster_name": "fake",
            "max_workers": 8,
            "provider": provider,
            "available_node_types": kinds,
            "head_node_type": "ray.head.default",
            "upscaling_speed": 10.0,
            "idle_timeout_minutes": 0.1,
            "auth": {},
        }
        config |= {"file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False}
        kinds = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        config |= {f"{kind}_commands": [] for kind in kinds}
        path.write_text(json.dumps(config))


@pytest.fixture
def autoscaling():
    with Autoscaling(Path(tempfile.mkdtemp(prefix="grow-"))).running() as found:  # a short path, for the sockets in it
        yield found


def workers():
    """How many nodes with CPUs there are."""
    return sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_sweep_begins_without_a_node_gets_those_it_asks_for_and_they_go_when_it_has_ended(autoscaling, tmp_path):
    """Of at most eight nodes with two places each it asks for four places, so for two nodes."""
    folder = tmp_path / "s"
    command = [sys.executable, str(TESTS / "sharing_sweep.py"), str(folder), "--address", autoscaling.address]
    command += ["--priority", "1", "--seconds", "6", "--trials", "12", "--autoscale-to", "4"]
    seen = []
    with Cluster.attached(autoscaling.address):
        assert workers() == 0
        options = {"env": autoscaling.environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, **options) as driver:
            try:
                until = time.monotonic() + 400
                while driver.poll() is None and time.monotonic() < until:
                    seen.append(workers())
                    time.sleep(0.5)
            finally:
                driver.kill()
            told = driver.stdout.read()
        assert driver.returncode == 0, told
        deadline = time.monotonic() + 120
        while workers() and time.monotonic() < deadline:
            time.sleep(1)
        assert workers() == 0, "nobody asks for nodes any more"
    assert 2 <= max(seen) <= 4, "an autoscaler may add one before it has counted those that it is starting"
    assert "the cluster's autoscaler is asked for room for 4 more trials\n" in told
    state = read_state(folder / "ledger.jsonl")
    assert (state.stop_reason, state.counts()["completed"]) == ("finished", 12)
    at_once, most = 0, 0
    for event in read_events(folder / "ledger.jsonl")[0]:
        at_once += {"start": 1, "end": -1}.get(event.name, 0)
        most = max(most, at_once)
    assert most >= 4
