"""Which nodes trials go to: looking at them, setting them aside, and who is to blame for an error."""

import json
import pickle
import time
from types import SimpleNamespace

import formulas
import pytest
import ray

from tune_topkd.execution import ResourceError
from tune_topkd.execution import nodes
from tune_topkd.execution.nodes import MOST_MOVES
from tune_topkd.execution.nodes import Nodes
from tune_topkd.execution.worker import Worker
from tune_topkd.execution.worker import _is_surroundings
from tune_topkd.execution.worker import folder_trouble
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Share
from tune_topkd.ledger import TrialKey

FIRST, SECOND = TrialKey("search", 0), TrialKey("search", 1)
MISSING = "FileNotFoundError: /data/train is not there"
WRONG = "ValueError: k must be at most 10"


class FakeRay:
    """A cluster of nodes that answer as the test says: a text, an exception, or nothing."""

    exceptions = ray.exceptions
    cloudpickle = SimpleNamespace(dumps=pickle.dumps)

    def __init__(self):
        self.answers = {}
        self.dead = set()
        self.asked = []

    def nodes(self):
        return [
            {"NodeID": n, "NodeName": f"name-{n}", "Alive": n not in self.dead, "Resources": {"CPU": 2.0}}
            for n in self.answers
        ]

    def remote(self, num_cpus, scheduling_strategy):
        def ask(*arguments):
            self.asked.append(scheduling_strategy.node_id)
            return scheduling_strategy.node_id

        return lambda function: SimpleNamespace(remote=ask)

    def wait(self, references, timeout):
        return ([r for r in references if self.answers[r] is not None], [])

    def get(self, reference, timeout):
        answer = self.answers[reference]
        if answer is None:
            raise ray.exceptions.GetTimeoutError("no answer")
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def fake(monkeypatch):
    fake = FakeRay()
    monkeypatch.setattr(nodes, "ray", fake)
    strategy = lambda node, soft: SimpleNamespace(node_id=node)  # noqa: E731
    monkeypatch.setattr(nodes, "NodeAffinitySchedulingStrategy", strategy)
    return fake


@pytest.fixture
def told():
    return []


@pytest.fixture
def at(fake, told, tmp_path):
    """The nodes of a cluster, which answer so."""

    def at(**answers):
        fake.answers = answers
        return Nodes(Worker(formulas.rising), tmp_path, "i", Share(1.0, 0.0), told.append)

    return at


@pytest.fixture
def three(at):
    found = at(a="", b="", c="")
    found.wait_for_one()
    return found


def avoided(found):
    return None if found.placement is None else found.placement[0]["ray.io/node-id"]


# --- looking ------------------------------------------------------------------------------------------------------


def test_where_all_are_ready_trials_go_anywhere(three, told):
    assert three.placement is None
    assert three.cluster.nodes == (Share(2.0, 0.0),) * 3
    assert told == []


def test_a_node_that_lacks_something_is_named_and_gets_no_trials(at, told):
    found = at(a="", b="/runs/s is not there")
    found.wait_for_one()
    assert avoided(found) == "!in(b)"
    assert found.cluster.nodes == (Share(2.0, 0.0),)
    assert told == ["node name-b gets no trials: /runs/s is not there"]
    assert found.set_aside == "node name-b: /runs/s is not there"


def test_none_that_is_ready_is_refused_with_the_reasons(at):
    found = at(a="/runs/s is not there", b="no module named x")
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"^node name-a: /runs/s is not there; node name-b: no module named x$"):
        found.wait_for_one()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "answer", [None, ray.exceptions.RaySystemError("not schedulable"), ray.exceptions.NodeDiedError("x")]
)
def test_one_that_is_about_to_die_keeps_nobody_from_beginning(at, monkeypatch, answer):
    monkeypatch.setattr(nodes, "PATIENCE_WITH_THE_REST", 0.1)
    found = at(a="", b=answer)
    found.wait_for_one()
    assert avoided(found) == "!in(b)"


def test_one_that_could_not_be_asked_is_asked_again_at_once(at, fake, monkeypatch):
    monkeypatch.setattr(nodes, "_SECONDS_BEFORE_ANOTHER_TRY", 0.0)
    found = at(a=ray.exceptions.RaySystemError("not schedulable"))
    found.look()
    fake.answers["a"] = ""
    found.wait_for_one()
    assert fake.asked.count("a") >= 2
    assert found.placement is None


def test_none_that_can_be_asked_is_given_up_after_a_while(at, monkeypatch):
    monkeypatch.setattr(nodes, "LONGEST_START_OF_A_WORKER", 0.3)
    with pytest.raises(ResourceError, match="name-a: it cannot start a worker: System error: no room"):
        at(a=ray.exceptions.RaySystemError("no\nroom")).wait_for_one()


def test_a_runtime_environment_that_cannot_be_set_up_is_not_tried_for_long(at):
    with pytest.raises(ResourceError, match=r"runtime environment: .*the package is too large"):
        at(a=ray.exceptions.RuntimeEnvSetupError("the package\nis too large")).wait_for_one()


def test_one_that_never_answers_is_given_up_after_a_while(at, monkeypatch):
    monkeypatch.setattr(nodes, "LONGEST_START_OF_A_WORKER", 0.2)
    with pytest.raises(ResourceError, match=r"worker(: none was there after| in) 0\.2 s \(sweep\.start_timeout\); the"):
        at(a=None).wait_for_one()


def test_the_sweep_says_how_long_a_worker_may_take_to_start(at, told, tmp_path):
    assert nodes.longest_start(formulas.sweep_config()) == nodes.LONGEST_START_OF_A_WORKER
    patience = nodes.longest_start(formulas.sweep_config(sweep={"start_timeout": 0.2}))
    at(a=None)
    found = Nodes(Worker(formulas.rising), tmp_path, "i", Share(1.0, 0.0), told.append, longest_start=patience)
    with pytest.raises(
        ResourceError, match=r"0\.2 s \(sweep\.start_timeout\); the machine may be too busy, or the disk"
    ):
        found.wait_for_one()


def test_a_late_node_is_looked_at_before_it_gets_trials(three, fake):
    fake.answers["d"] = None
    three.look()
    assert avoided(three) == "!in(d)"
    fake.answers["d"] = ""
    three.look()
    assert three.placement is None
    assert len(three.cluster.nodes) == 4


def test_a_late_node_without_the_folder_gets_none(three, fake, told):
    fake.answers["d"] = "/runs/s is not there"
    three.look()
    three.look()
    assert avoided(three) == "!in(d)"
    assert told == ["node name-d gets no trials: /runs/s is not there"]


def test_a_folder_that_is_mounted_after_ray_has_started_is_found(three, fake, told, monkeypatch):
    monkeypatch.setattr(nodes, "_SECONDS_BETWEEN_LOOKS", 0.0)
    fake.answers["d"] = "/runs/s is not there"
    three.look()
    fake.answers["d"] = ""
    three.look()
    three.look()
    assert three.placement is None
    assert told[-1] == "node name-d is ready"


def test_a_node_that_is_gone_is_forgotten_and_asked_anew_when_it_is_back(three, fake):
    fake.dead = {"b"}
    three.look()
    assert three.placement is None
    assert len(three.cluster.nodes) == 2
    fake.dead = set()
    fake.answers["b"] = None
    three.look()
    assert avoided(three) == "!in(b)"


def test_ray_takes_the_selector():
    from ray._private.label_utils import validate_label_selector

    found = SimpleNamespace(_alive=lambda: dict.fromkeys(["f" * 56, "0" * 56]), _usable=set())
    (selector,) = Nodes.placement.fget(found)
    assert validate_label_selector(selector) is None


# --- who is to blame ----------------------------------------------------------------------------------------------


def blamed(found, key, node, error, is_surroundings=False):
    return found.is_to_blame(key, node, error, is_surroundings=is_surroundings)


def test_what_fails_where_no_trial_got_anywhere_counts_against_the_node(three, told):
    assert blamed(three, FIRST, "b", MISSING)
    assert avoided(three) == "!in(b)"
    assert told == [f"node name-b is set aside, its trials go elsewhere: {MISSING}"]
    assert blamed(three, SECOND, "b", MISSING)  # it was on its way there
    assert len(told) == 1


def test_what_fails_where_others_do_well_counts_against_the_trial(three):
    three.reported("b")
    assert not blamed(three, FIRST, "b", WRONG)
    assert three.placement is None


def test_what_is_the_surroundings_by_its_kind_counts_against_a_node_that_did_well_before(three):
    three.reported("b")
    assert blamed(three, FIRST, "b", MISSING, is_surroundings=True)
    assert avoided(three) == "!in(b)"


def test_two_nodes_that_lack_the_data_are_both_set_aside(three):
    assert blamed(three, FIRST, "a", MISSING)
    assert blamed(three, FIRST, "b", MISSING)
    three.reported("c")
    assert avoided(three) == "!in(a,b)"


def test_a_trial_that_fails_everywhere_is_to_blame_itself_and_the_nodes_are_used_again(three, told):
    assert blamed(three, FIRST, "a", "ValueError: trial 17 has no k")
    assert blamed(three, FIRST, "b", "ValueError: trial 17 has no k")
    assert not blamed(three, FIRST, "c", "ValueError: trial 17 has no k")
    assert three.placement is None
    assert told[-1].startswith("node name-")
    assert "is used again" in told[-1]
    assert not blamed(three, SECOND, "a", "ValueError: trial 18 has no k")  # as is known by now


def test_a_trial_that_fails_of_the_same_on_a_good_node_is_to_blame_itself(three):
    assert blamed(three, FIRST, "a", WRONG)
    three.reported("b")
    assert not blamed(three, FIRST, "b", WRONG)
    assert three.placement is None


def test_what_is_missing_on_all_that_did_well_is_not_carried_from_node_to_node(three):
    for node in "abc":
        three.reported(node)
    assert blamed(three, FIRST, "a", MISSING, is_surroundings=True)
    assert not blamed(three, FIRST, "b", MISSING, is_surroundings=True)
    assert three.placement is None


def test_the_only_node_is_not_set_aside(at):
    found = at(a="")
    found.wait_for_one()
    assert not blamed(found, FIRST, "a", MISSING, is_surroundings=True)
    assert found.placement is None


def test_a_trial_is_carried_about_so_often_and_no_more(at):
    found = at(**{f"n{number}": "" for number in range(9)})
    found.wait_for_one()
    moved = [blamed(found, FIRST, f"n{number}", MISSING) for number in range(5)]
    assert moved == [True] * MOST_MOVES + [False] * (5 - MOST_MOVES)


def test_nor_is_it_sent_to_the_same_node_for_ever(three):
    assert [blamed(three, FIRST, "a", MISSING) for _ in range(5)] == [True] * MOST_MOVES + [False] * (5 - MOST_MOVES)


def test_an_unknown_node_is_not_to_blame(three):
    assert not blamed(three, FIRST, "", MISSING)


# --- what a worker sees -------------------------------------------------------------------------------------------


def test_the_sweep_s_folder_is_known_by_its_ledger(tmp_path):
    shared = "--runs-dir must be on storage that all nodes share"
    assert folder_trouble(tmp_path, "i") == f"{tmp_path} is not there: {shared}"
    with Ledger.create(tmp_path / "ledger.jsonl", Header(sweep="s", id="i", seed=0, trials=1)):
        pass
    assert folder_trouble(tmp_path, "i") == ""
    assert folder_trouble(tmp_path, "j") == f"{tmp_path} is another sweep's there: {shared}"
    (tmp_path / "ledger.jsonl").write_bytes(b"")
    assert "cannot be read" in folder_trouble(tmp_path, "i")


def test_a_worker_makes_no_folder_where_the_sweep_s_is_not(tmp_path, monkeypatch):
    from ray import tune

    sent = []
    monkeypatch.setattr(tune, "report", lambda metrics: sent.append(json.loads(metrics["message"])))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "b"))
    folder = tmp_path / "runs" / "s" / "trials" / "0000"
    Worker(formulas.rising)({"folder": str(folder), "sweep_id": "i", "config": {}, "timeout": None})
    (message,) = sent
    assert (message["kind"], message["node"]) == ("storage", "b")
    assert message["error"].startswith(f"{folder.parents[1]} is not there")
    assert not (tmp_path / "runs").exists()


def failed(cause):
    try:
        try:
            raise cause
        except type(cause) as error:
            raise ValueError("the dataset cannot be had") from error
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "is_surroundings"),
    [
        (FileNotFoundError("x"), True),
        (failed(PermissionError("x")), True),
        (ModuleNotFoundError("timm"), True),
        (RuntimeError("No CUDA GPUs are available"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (ValueError("k must be at most 10"), False),
        (RuntimeError("shapes do not fit"), False),
        (ZeroDivisionError(), False),
    ],
)
def test_what_is_the_surroundings_by_its_kind(error, is_surroundings):
    assert _is_surroundings(error, {}) is is_surroundings


@pytest.mark.parametrize("place", ["data", "student", "teacher_checkpoint", "dataset_file"])
def test_an_error_where_a_file_of_the_trial_is_not_there_is_the_surroundings(tmp_path, place):
    def config(path):
        values = {"data": {"root": path}, "student": {"checkpoint": path}}
        return {"data": {"root": None}, "student": {"checkpoint": None}} | {place: values.get(place, path)}

    assert _is_surroundings(ValueError("no"), config(str(tmp_path / "gone")))
    assert not _is_surroundings(ValueError("no"), config(str(tmp_path)))
