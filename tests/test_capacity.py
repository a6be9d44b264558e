"""What a cluster is told to have for a sweep before it is begun: nodes, what they lack, how many trials fit, how long."""

import contextlib
import importlib
import os
import subprocess
from pathlib import Path

import formulas
import pytest
import test_cli
import test_faults
import torch
import yaml

from tune_topkd.config import new_config
from tune_topkd.execution import survey
from tune_topkd.execution.survey import Answers
from tune_topkd.execution.survey import Node
from tune_topkd.execution.survey import Trouble
from tune_topkd.ledger import Share
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import capacity
from tune_topkd.sweep import cost
from tune_topkd.sweep import doctor
from tune_topkd.sweep import preflight
from tune_topkd.sweep import versions
from tune_topkd.sweep.capacity import Capacity
from tune_topkd.sweep.capacity import Fit
from tune_topkd.sweep.capacity import Seen
from tune_topkd.sweep.capacity import Surveyed
from tune_topkd.sweep.cost import Step
from tune_topkd.sweep.preflight import Checked

inside = test_cli.inside
app = importlib.import_module("tune_topkd.cli.app")  # the package has a name `app` of its own

TESTS = Path(__file__).parent
CIFAR = {
    "teacher": None,
    "method": "ce",
    "student": "small_cnn",
    "recipe": {"epochs": 9},
    "space": {"lr": [0.1, 0.2]},
    "baselines": None,
}
STEP = Step(student=1.0, teacher=0.0)
SLOW = Step(student=3.0, teacher=0.0)


def config(**sweep):
    """Of 12 trials and 4 baseline trials, all to the end; without a teacher to be asked."""
    about = {"asha": None, "max_concurrent": None, "finalists": None, "trials": 12, **sweep}
    return formulas.sweep_config(sweep=about, baselines={"methods": ["ce"], "trials": 4})


def on(name, cpus=2.0, gpus=0.0, trouble="", is_alive=True, models=(), versions=None):
    """A node that has said this of itself."""
    node = Node(name, name, f"10.0.0.{ord(name[0]) - 96}", Share(cpus, gpus), is_alive)
    seen = Seen(memory=8_000_000_000, gpus=models, versions=versions or {})
    return Surveyed(node, seen if is_alive else None, trouble)


def told(config, *nodes):
    return capacity._capacity(config, nodes, lambda what: contextlib.nullcontext())


@pytest.fixture
def steps(monkeypatch):
    """The step that each node has, or why it has none; by default all have the same. Whom it asked, and for how much."""
    steps, asked = {}, {}

    def ask(calls, patience, shares):
        asked.update(shares)
        given = {node: steps.get(node, STEP) for node in calls}
        troubles = {node: step for node, step in given.items() if isinstance(step, Trouble)}
        return Answers({node: step for node, step in given.items() if node not in troubles}, troubles)

    monkeypatch.setattr(survey, "ask", ask)
    steps["asked"] = asked
    return steps


# --- how many fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has", "shares", "fit"),
    [
        (Share(8, 0), [Share(1, 0)], Fit(8, 8)),
        (Share(8, 0), [Share(3, 0)], Fit(2, 2)),
        (Share(8, 2), [Share(1, 0.25)], Fit(8, 8)),
        (Share(64, 2), [Share(1, 0.25)], Fit(8, 8)),
        (Share(64, 5), [Share(1, 2)], Fit(2, 2)),
        (Share(4, 0), [Share(1, 1)], Fit(0, 0, "it has no GPU, a trial takes 1 (sweep.gpus_per_trial)")),
        (Share(4, 0), [Share(1, 0.25)], Fit(0, 0, "it has no GPU, a trial takes 0.25 (sweep.gpus_per_trial)")),
        (Share(4, 1), [Share(1, 2)], Fit(0, 0, "it has 1 GPU, a trial takes 2 (sweep.gpus_per_trial)")),
        (Share(0, 2), [Share(1, 1)], Fit(0, 0, "it has no CPU, a trial takes 1 (sweep.cpus_per_trial)")),
        (Share(4, 0), [Share(8, 0)], Fit(0, 0, "it has 4 CPUs, a trial takes 8 (sweep.cpus_per_trial)")),
        (Share(2, 0), [Share(4, 0), Share(2, 0), Share(1, 0)], Fit(0, 2)),
    ],
)
def test_a_node_has_room_for_so_many_trials_or_there_is_a_reason(has, shares, fit):
    assert Fit.of(has, shares) == fit


def test_nodes_are_what_ray_says_of_them():
    entry = {
        "NodeID": "i",
        "NodeName": "n",
        "NodeManagerAddress": "10.0.0.1",
        "Alive": True,
        "Resources": {"CPU": 2.0, "GPU": 1.0, "node:__internal_head__": 1.0},
    }
    assert Node.of(entry) == Node("i", "n", "10.0.0.1", Share(2.0, 1.0), is_alive=True, is_head=True)
    gone = Node.of({**entry, "Alive": False, "Resources": {}})
    assert gone == Node("i", "n", "10.0.0.1", Share(0.0, 0.0), is_alive=False, is_head=False)


def test_the_head_comes_first_and_what_is_gone_last(monkeypatch):
    def entry(name, alive, **resources):
        return {"NodeID": name, "NodeName": name, "NodeManagerAddress": "", "Alive": alive, "Resources": resources}

    there = [entry("a", False), entry("c", True), entry("d", True, **{"node:__internal_head__": 1.0}), entry("b", True)]
    monkeypatch.setattr(survey.ray, "nodes", lambda: there)
    assert [node.name for node in survey.known_nodes()] == ["d", "b", "c", "a"]


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ({}, "node b (10.0.0.2): 2 CPUs, 0 GPUs, 8 GB"),
        (
            {"gpus": 2.0, "models": ("NVIDIA A100", "NVIDIA A100")},
            "node b (10.0.0.2): 2 CPUs, 2 GPUs (NVIDIA A100), 8 GB",
        ),
        ({"trouble": "/runs is not there"}, "node b (10.0.0.2): 2 CPUs, 0 GPUs, 8 GB: /runs is not there"),
        ({"is_alive": False, "trouble": "is gone"}, "node b (10.0.0.2): is gone"),
    ],
)
def test_a_node_s_line_says_what_it_has_and_what_is_wrong(about, line):
    assert capacity.line_of(on("b", **about)) == line


def test_another_version_of_what_results_depend_on_is_named(monkeypatch):
    monkeypatch.setattr(capacity, "versions", lambda: {"torch": "2.9.0", "numpy": "2.3.0"})
    node = on("b", versions={"torch": "2.8.0", "numpy": "2.3.0", "scipy": "1.0"})
    assert capacity.line_of(node, Fit(2, 2)).endswith("2 trials at once; torch 2.8.0 there, 2.9.0 here")
    assert on("b", versions={"torch": "2.9.0"}).other_versions == ""


# --- on the whole cluster -------------------------------------------------------------------------------------------


def test_the_whole_cluster_is_added_up_from_the_nodes_that_can_run_trials(steps):
    head, bare = on("a", cpus=0.0), on("c", cpus=4.0, trouble="/runs is not there")
    found = told(config(), head, on("b"), bare, on("d", cpus=3.0), on("e", is_alive=False, trouble="is gone"))
    assert found.error == ""
    *lines, total, time = found.lines
    assert lines[0].endswith("no trial: it has no CPU, a trial takes 1 (sweep.cpus_per_trial)")
    assert lines[1].startswith("node b (10.0.0.2): 2 CPUs, 0 GPUs, 8 GB: 2 trials at once; about")
    assert lines[2].endswith(": no trial: /runs is not there")
    assert lines[3].startswith("node d (10.0.0.4): 3 CPUs, 0 GPUs, 8 GB: 3 trials at once; about")
    assert lines[4] == "node e (10.0.0.5): is gone"
    assert total == "5 trials at once, on 2 nodes"
    images = cost.image_counts(config())
    assert time.startswith(f"about {capacity.duration(cost.sweep_seconds(config(), images, [STEP] * 5))}, by a step")
    assert steps["asked"] == {"b": Share(1.0, 0.0), "d": Share(1.0, 0.0)}


def test_max_concurrent_is_the_most_there_are_and_said(steps):
    found = told(config(max_concurrent=2), on("b"), on("d", cpus=3.0))
    *_, total, time = found.lines
    assert total == "2 trials at once, on 2 nodes, sweep.max_concurrent = 2"
    expected = cost.sweep_seconds(config(), cost.image_counts(config()), [STEP] * 2)
    assert time.startswith(f"about {capacity.duration(expected)}, ")


def test_what_an_autoscaler_is_asked_for_is_said_and_no_node_yet_is_no_error(steps):
    asked = "; the autoscaler is asked for room for 8 trials (sweep.autoscale_to)"
    *_, total, _ = told(config(autoscale_to=8), on("b"), on("d", cpus=3.0)).lines
    assert total == f"5 trials at once, on 2 nodes{asked}"
    *_, total, _ = told(config(autoscale_to=5), on("b"), on("d", cpus=3.0)).lines
    assert total == "5 trials at once, on 2 nodes"
    found = told(config(autoscale_to=8), on("a", cpus=0.0))
    assert found.error == ""
    assert found.lines[1:] == (f"no node has room for a trial yet{asked}",)
    assert told(config(autoscale_to=8, cpus_per_trial="auto"), on("a", cpus=0.0)).error


def test_what_fits_nowhere_is_one_error_and_no_step_is_timed(steps):
    found = told(config(gpus_per_trial=1), on("b"), on("d", trouble="/runs is not there"))
    assert found.error == "sweep.gpus_per_trial = 1: no node has room for a trial: the largest has 2 CPUs and 0 GPUs"
    reason = "no trial: it has no GPU, a trial takes 1 (sweep.gpus_per_trial)"
    assert found.lines[0].endswith(f"8 GB: {reason}")
    assert found.lines[1].endswith(f"8 GB: {reason}; /runs is not there")
    assert steps["asked"] == {}


def test_where_all_that_have_room_lack_something_it_is_an_error_with_the_reasons(steps):
    found = told(config(), on("b", trouble="/runs is not there"), on("c", cpus=0.0))
    assert found.error == "no node that has room for a trial can run one: node b: /runs is not there"
    assert not any("at once" in line for line in found.lines)


def test_a_node_that_cannot_take_a_step_gets_no_trials(steps):
    steps["b"] = Trouble("NoDeviceError: torch 2.9.0+cpu sees no CUDA device", is_late=False)
    found = told(config(gpus_per_trial=1), on("b", gpus=1.0), on("c", gpus=2.0))
    assert "8 GB: no trial: a step cannot be taken: NoDeviceError: torch" in found.lines[0]
    assert found.lines[2] == "2 trials at once, on 1 node"
    steps["c"] = steps["b"]
    found = told(config(gpus_per_trial=1), on("b", gpus=1.0), on("c", gpus=2.0))
    assert found.error.count("a step cannot be taken") == 2


def test_a_node_that_is_busy_counts_with_the_slowest_step_that_is_known(steps):
    steps |= {"b": Trouble("it has not answered", is_late=True), "c": SLOW}
    found = told(config(), on("a"), on("b", cpus=6.0), on("c"))
    assert found.lines[1].endswith("6 trials at once; a step was not timed: it has not answered")
    expected = cost.sweep_seconds(config(), cost.image_counts(config()), [STEP] * 2 + [SLOW] * 8)
    assert found.lines[-1].startswith(f"about {capacity.duration(expected)}, ")
    steps |= dict.fromkeys("abc", steps["b"])
    found = told(config(), on("a"), on("b"), on("c"))
    assert found.lines[-1] == "6 trials at once, on 3 nodes", "no time is told that nobody has measured"


def test_auto_is_told_as_what_it_will_be_measured_between(steps):
    found = told(config(cpus_per_trial="auto"), on("b", cpus=4.0), on("c", cpus=2.0))
    *lines, total, time = found.lines
    assert ": 1 to 4 trials at once; about" in lines[0]
    assert ": 0 to 2 trials at once; about" in lines[1]
    assert total == "1 to 6 trials at once, on 2 nodes, how many is measured as the sweep begins (auto)"
    assert time.startswith("at most about ")
    assert steps["asked"] == {"b": Share(4.0, 0.0), "c": Share(2.0, 0.0)}, "of each node all that a trial may be given"


def test_auto_where_there_is_nothing_to_measure_it_on_is_one_error(steps):
    found = told(config(gpus_per_trial="auto"), on("b"))
    assert (
        found.error == "sweep.gpus_per_trial = auto: no node has as many GPUs; the most are 0, and 0 trains on the CPU"
    )


# --- how long -------------------------------------------------------------------------------------------------------


def seconds(config, *places):
    """Of the trainings alone."""
    start = cost._SECONDS_OF_THE_START
    return cost.sweep_seconds(config, (256, 256), places) - start


def test_trials_at_once_divide_the_time_as_far_as_whole_trials_go():
    epoch = cost.epoch_seconds(config(), (256, 256), STEP)
    one = 9 * epoch
    assert seconds(config(), STEP) == pytest.approx(16 * one)
    assert seconds(config(), *[STEP] * 4) == pytest.approx(4 * one)
    assert seconds(config(), *[STEP] * 5) == pytest.approx(4 * one), "the last of sixteen waits for a fourth turn"
    assert seconds(config(), *[STEP] * 100) == pytest.approx(one), "no trial is shorter beside others"


def test_places_that_are_faster_do_more_of_the_trials():
    epoch = cost.epoch_seconds(config(), (256, 256), STEP)
    slow = cost.epoch_seconds(config(), (256, 256), SLOW)
    assert slow == pytest.approx(3 * epoch, rel=0.1)
    assert seconds(config(), STEP, SLOW) == pytest.approx(12 * 9 * epoch, rel=0.1), "twelve here, four there"


def test_finalists_begin_when_the_search_has_ended():
    with_finalists = config(finalists={"count": 1, "seeds": 2})
    epoch = cost.epoch_seconds(config(), (256, 256), STEP)
    more = seconds(with_finalists, *[STEP] * 20) - seconds(config(), *[STEP] * 20)
    assert more == pytest.approx(9 * epoch), "four trainings for which there is room beside the sixteen of the search"


def test_a_search_lasts_as_long_as_one_trial_that_asha_lets_on():
    stopped = config(asha={"grace_epochs": 1, "reduction_factor": 3}, trials=1)
    alone = stopped.model_copy(update={"baselines": None})
    assert seconds(alone, STEP) == pytest.approx(9 * cost.epoch_seconds(alone, (256, 256), STEP))


def test_the_time_of_one_place_is_that_of_the_epochs_that_check_tells():
    digits = preflight.load_checked("digits").config
    told = list(cost.describe(digits, with_time=False))
    assert any("about 2,338 with ASHA" in line for line in told)
    assert sum(map(sum, cost._trainings(digits))) == pytest.approx(2338, abs=0.5)
    assert not any("on this machine" in line for line in told)


def test_a_step_uses_the_threads_of_a_trial_and_gives_them_back(monkeypatch):
    before, seen = torch.get_num_threads(), set()
    monkeypatch.setattr(cost, "_TIMED_STEPS", 1)
    measured = cost._least_seconds

    def least(call, device):
        seen.add((torch.get_num_threads(), device.type))
        return measured(call, device)

    monkeypatch.setattr(cost, "_least_seconds", least)
    step = cost.step_here(preflight.load_checked("digits").config, Share(before + 1.0, 0.0))
    assert seen == {(before + 1, "cpu")}
    assert torch.get_num_threads() == before
    assert step.student > 0
    assert step.teacher > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_step_on_a_gpu_that_torch_does_not_see_is_refused():
    with pytest.raises(cost.NoDeviceError, match="sees no CUDA device"):
        cost.step_here(preflight.load_checked("digits").config, Share(1.0, 0.5))


@pytest.mark.gpu
def test_a_step_is_timed_on_the_gpu_that_trials_would_have():
    torch.cuda.reset_peak_memory_stats()
    step = cost.step_here(preflight.load_checked("digits").config, Share(1.0, 0.5))
    assert torch.cuda.max_memory_allocated() > 0
    assert step.student > 0


# --- what a node looks for ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return preflight.load_checked("digits")


def lacks(checked=None, mark=None, uri=None, needs_files=False):
    return list(capacity.look(checked, mark, uri, needs_files=needs_files).lacks)


def test_a_node_that_has_all_lacks_nothing_and_says_what_it_has(digits, tmp_path):
    with capacity._mark(tmp_path) as mark:
        seen = capacity.look(digits, mark, None, needs_files=False)
    assert seen.lacks == ()
    assert seen.memory > 0
    assert seen.versions["torch"] == versions.versions()["torch"]


def test_a_folder_of_runs_is_looked_for_by_a_file_that_is_gone_afterwards(tmp_path):
    runs = tmp_path / "not" / "yet"
    with capacity._mark(runs) as mark:
        assert mark.parent == tmp_path
        assert lacks(mark=mark) == []
    assert list(tmp_path.iterdir()) == [], "nothing is made, nothing is left"
    (trouble,) = lacks(mark=mark)
    assert trouble == f"{tmp_path} is not there, or another folder: --runs-dir must be on storage that all nodes share"


def test_a_folder_of_runs_that_a_node_cannot_write_to_is_named(tmp_path, monkeypatch):
    with capacity._mark(tmp_path) as mark:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert lacks(mark=mark) == [f"{tmp_path} cannot be written to"]


def test_a_store_that_a_node_cannot_use_is_named(tmp_path):
    assert lacks(uri=f"file://{tmp_path}/runs") == []
    (tmp_path / "file").write_text("")
    (trouble,) = lacks(uri=f"file://{tmp_path}/file/runs")
    assert str(tmp_path / "file" / "runs") in trouble


def test_files_and_code_of_the_space_that_a_node_does_not_have_are_named(tmp_path):
    raw = yaml.safe_load(Path("search_spaces/digits.yaml").read_text())
    config = new_config(raw, "test", ())
    student = config.student.model_copy(update={"checkpoint": str(tmp_path / "gone.pt")})
    there = Checked(config.model_copy(update={"student": student}), "s.yaml")
    (trouble,) = lacks(there)
    assert trouble.startswith("student.checkpoint")
    assert "gone.pt" in trouble
    assert lacks(there, uri=f"file://{tmp_path}/runs") == [], "the sweep brings it there"
    (trouble,) = lacks(Checked(config.model_copy(update={"method": "not_there.at_all:loss"}), "s.yaml"))
    assert "not_there" in trouble


def test_data_is_looked_for_where_trials_read_its_files(tmp_path, digits):
    assert not capacity._needs_files(digits.config), "digits come with the sweep's folder"
    elsewhere = Checked(new_config({**CIFAR, "data": {"name": "cifar10", "root": str(tmp_path)}}, "test", ()), "test")
    assert not capacity._needs_files(elsewhere.config), "it is not even here"
    assert lacks(elsewhere, needs_files=False) == []
    (trouble,) = lacks(elsewhere, needs_files=True)
    assert trouble.startswith("the data is not there: ")
    assert str(tmp_path) in trouble


def test_images_in_files_are_read_where_they_are(tmp_path, monkeypatch, digits):
    from tune_topkd import data

    monkeypatch.setattr(data, "is_in_memory", lambda dataset: False)
    assert capacity._needs_files(digits.config)


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch):
    """A cluster that answers: what was asked of it, and what it says."""
    there = {"asked": [], "says": Capacity(("node b: 2 trials at once",))}

    def capacities(workspace, spaces, progress):
        there["asked"].append((workspace.address, str(workspace.runs), [checked.config for checked in spaces]))
        return [there["says"]] * len(spaces)

    monkeypatch.setattr(capacity, "capacities", capacities)
    monkeypatch.setattr("tune_topkd.execution.check_address", lambda address: None)
    return there


def test_check_tells_what_a_cluster_has_in_place_of_the_time_here(cluster, inside, tmp_path):
    options = ["--address", "h:1", "--runs-dir", tmp_path, "--gpus-per-trial", "0.25", "--cpus-per-trial", "2"]
    done = inside("check", "digits", *options)
    assert done.returncode == 0, done.stderr
    ((address, runs, (config,)),) = cluster["asked"]
    assert (address, runs) == ("h:1", str(tmp_path))
    assert (config.sweep.cpus_per_trial, config.sweep.gpus_per_trial) == (2, 0.25)
    assert "digits.yaml on the cluster at h:1:\n  node b: 2 trials at once\n" in done.stderr
    assert "on this machine" not in done.stderr


def test_check_ends_with_2_where_no_trial_could_run(cluster, inside):
    cluster["says"] = Capacity(("node b: no trial",), "no node has room for a trial")
    done = inside("check", "digits", "--address", "h:1")
    assert done.returncode == 2
    assert "node b: no trial" in done.stderr
    assert "error: no node has room for a trial" in done.stderr


@pytest.mark.parametrize(("option", "is_asked"), [((), True), (("--address", "local"), False)])
def test_check_takes_the_environment_s_cluster_and_says_so(cluster, inside, monkeypatch, option, is_asked):
    monkeypatch.setenv("RAY_ADDRESS", "h:2")
    done = inside("check", "digits", *option)
    assert done.returncode == 0, done.stderr
    assert [address for address, _, _ in cluster["asked"]] == ["h:2"] * is_asked
    assert ("Ray: the cluster at h:2, as RAY_ADDRESS says" in done.stderr) is is_asked
    assert ("on this machine" in done.stderr) is not is_asked


def test_check_of_an_address_where_nothing_answers_is_run_s_error(inside):
    done = inside("check", "digits", "--address", "127.0.0.1:1")
    assert done.returncode == 2
    assert "error: --address 127.0.0.1:1: no Ray cluster answers there" in done.stderr
    done = inside("check", "digits", "--address", "ray://127.0.0.1:1")
    assert "a sweep does not run through the Ray client" in done.stderr


def test_doctor_has_a_finding_for_each_node(monkeypatch, tmp_path):
    older = on("d", versions={"torch": "1.0"})
    there = [on("b"), on("c", trouble="/runs is not there"), older, on("e", is_alive=False, trouble="is gone")]
    monkeypatch.setattr(doctor, "survey", lambda workspace: there)
    found = list(doctor._nodes(Workspace(tmp_path, "", "h:1")))
    assert [finding.is_well for finding in found] == [True, False, False, True]
    assert found[0].what == "node b (10.0.0.2)"
    assert found[1].text.endswith("/runs is not there")
    assert "torch 1.0 there" in found[2].text
    assert found[3].text == "is gone"


def test_doctor_says_why_nodes_were_not_asked(monkeypatch):
    monkeypatch.setattr(survey, "known_nodes", list)
    (finding,) = doctor._nodes(Workspace(Path("/proc/runs"), "", "h:1"))
    assert not finding.is_well
    assert "--runs-dir" in finding.text


# --- a real cluster -------------------------------------------------------------------------------------------------

TWO_NODES = """
import importlib, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ttk-")
import psutil
import ray.cluster_utils
from tune_topkd.cli import app
from tune_topkd.execution import Cluster, nodes, survey
from tune_topkd.ledger import Share
from tune_topkd.sweep import capacity

runs = sys.argv[1]
nodes.LONGEST_START_OF_A_WORKER = capacity.LONGEST_MEASUREMENT = 600.0  # the machine may have much else to do
ray_command = str(Path(sys.executable).with_name("ray"))
own_disk = 'mount -t tmpfs tmpfs "$0" && exec "$2" start --address="$1" --num-cpus=1 --num-gpus=1 --node-name=b --block'
there = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})

def command(*words):
    sys.argv = ["launch.py", *words, "--address", there.address, "--runs-dir", runs]
    try:
        app.main()
    except SystemExit as end:
        print("exit", end.code, flush=True)

class Unknown:
    def __reduce__(self):
        return importlib.import_module, ("not_there_at_all",)

def raises():
    raise FileNotFoundError("no weights here")

def never():
    time.sleep(3600)

def asked_in_vain():
    head, other = (node.id for node in survey.known_nodes())
    for call in (raises, Unknown()):
        print("trouble", survey.ask({other: call}, 600.0).troubles[other])
    all_of_it = {head: Share(2.0, 0.0)}
    print("trouble", survey.ask({head: never}, 5.0, all_of_it).troubles[head])
    print("afterwards", survey.ask({head: "it is free again".title}, 300.0, all_of_it).found.get(head), flush=True)

def joined():
    for _ in range(5):  # on a loaded machine a node may give up by itself
        process = subprocess.Popen(["unshare", "-rm", "sh", "-c", own_disk, runs, there.address, ray_command])
        while process.poll() is None:
            if len(Cluster.now().nodes) == 2:
                return process
            time.sleep(0.1)
    raise SystemExit("no second node")

os.dup2(1, 2)
try:
    with Cluster.attached(there.address):
        second = joined()
        asked_in_vain()
    command("check", "digits")
    command("check", "digits", "--gpus-per-trial", "1")
    command("doctor")
    for process in [*psutil.Process(second.pid).children(recursive=True), second]:
        process.kill()
    second.wait()
finally:
    there.shutdown()
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3000)
def test_two_real_nodes_of_which_one_does_not_see_the_folder_of_runs(tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    runs = tmp_path / "runs"
    runs.mkdir()
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    printed = [line.strip() for line in test_faults.printed(TWO_NODES, runs, environment=environment, timeout=2900)]
    ends = [place for place, line in enumerate(printed) if line.startswith("exit ")]
    fits, no_gpu, doctors = printed[: ends[0]], printed[ends[0] : ends[1]], printed[ends[1] : ends[2]]
    assert [printed[end] for end in ends] == ["exit 0", "exit 2", "exit 2"], printed
    raised, unknown, late = (line for line in fits if line.startswith("trouble "))
    assert "FileNotFoundError: no weights here" in raised
    assert "the sweep's code cannot be imported there: ModuleNotFoundError" in unknown
    assert "it has not answered in 5 s" in late
    assert [line.endswith("is_late=True)") for line in (raised, unknown, late)] == [False, False, True]
    assert "afterwards It Is Free Again" in fits, "what is late is ended"
    hidden = f"{runs} is not there, or another folder: --runs-dir must be on storage that all nodes share"

    head, second = (line for line in fits if line.startswith("node "))
    assert ", the head: 2 CPUs, 0 GPUs, " in head
    assert ": 2 trials at once; about " in head
    assert second.startswith("node b (")
    assert second.endswith(f": no trial: {hidden}")
    assert "2 trials at once, on 1 node" in fits
    assert any("by a step timed alone on each node" in line for line in fits)

    head, second = (line for line in no_gpu if line.startswith("node "))
    assert head.endswith("no trial: it has no GPU, a trial takes 1 (sweep.gpus_per_trial)")
    assert second.endswith(f": no trial: {hidden}")
    assert f"error: no node that has room for a trial can run one: node b: {hidden}" in no_gpu

    assert any(line.startswith("ok  ray: cluster at ") and "2 node(s), 3 CPUs, 1 GPUs" in line for line in doctors)
    assert any(line.startswith("ok  node ") and ", the head: 2 CPUs" in line for line in doctors)
    assert any(line.startswith("BAD node b (") and line.endswith(hidden) for line in doctors)
    assert list(runs.glob(".probe-*")) == []
