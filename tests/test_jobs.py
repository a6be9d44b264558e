"""Sweeps submitted to a Ray cluster: what travels, what is refused, and the whole way on a real head with a token."""

import contextlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import yaml
from servers import free_port
from typer.testing import CliRunner

from tune_topkd.cli import app
from tune_topkd.config import ConfigError
from tune_topkd.config import load_config
from tune_topkd.execution import ResourceError
from tune_topkd.execution import cluster
from tune_topkd.execution.jobs import Job
from tune_topkd.execution.jobs import JobError
from tune_topkd.ledger import read_events
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import audit
from tune_topkd.sweep import jobs as submitting
from tune_topkd.sweep.jobs import SPACES
from tune_topkd.sweep.jobs import Submission
from tune_topkd.sweep.jobs import copy_code
from tune_topkd.sweep.jobs import jobs_at
from tune_topkd.tracking import sqlite_uri

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


# --- what travels ---------------------------------------------------------------------------------------------------


def write(path, content="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_code_travels_and_data_caches_environments_and_runs_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(submitting, "LARGEST_FILE", 100)
    user, place = tmp_path / "user", tmp_path / "place"
    place.mkdir()
    for name in ("networks.py", "losses/mine.py", "labels.csv", "tune_topkd/__init__.py"):
        write(user / name)
    for name in (".git/config", ".env", "__pycache__/a.pyc", "env/pyvenv.cfg", "env/lib/a.py", "runs/s/ledger.jsonl"):
        write(user / name)
    write(user / "data" / "train.bin", b"0" * 101)
    (user / "again").symlink_to(user)
    notes = copy_code(user, place, str(user / "runs"))
    assert names_in(place) == {"networks.py", "losses/mine.py", "labels.csv", "tune_topkd/__init__.py"}
    assert notes == ["too large to travel with the job, over 0 MiB: data/train.bin"]


def test_this_package_travels_where_the_user_has_none_of_his_own(tmp_path):
    write(tmp_path / "user" / "net.py")
    (tmp_path / "place").mkdir()
    assert copy_code(tmp_path / "user", tmp_path / "place", "/runs") == []
    assert {"net.py", "tune_topkd/__main__.py", "tune_topkd/sweep/jobs.py"} <= names_in(tmp_path / "place")
    assert not any("__pycache__" in name for name in names_in(tmp_path / "place"))


def test_a_folder_that_is_too_large_is_refused_with_what_makes_it_so(tmp_path, monkeypatch):
    monkeypatch.setattr(submitting, "MOST_BYTES", 1000)
    for number in range(5):
        write(tmp_path / "images" / "a" / f"{number}.png", b"0" * 300)
    (tmp_path / "place").mkdir()
    with pytest.raises(ConfigError, match=r"the working directory: .*more than 0 MiB \(most of it in images\)"):
        copy_code(tmp_path, tmp_path / "place", "/runs")


class Submitted:
    """Stands for a cluster's jobs: keeps what it is given."""

    def submit(self, words, sweeps, runs, folder, variables):
        self.words, self.sweeps, self.runs, self.variables = words, sweeps, runs, variables
        self.spaces = {path.stem: load_config(path) for path in (folder / SPACES).glob("*.yaml")}
        return Job("j", tuple(sweeps), runs, "pending", "", 0.0, None)


def test_a_space_travels_complete_with_what_it_extends_and_what_was_set(tmp_path):
    from tune_topkd.config import parse_set

    overrides = [parse_set("sweep.trials=7"), parse_set("recipe.epochs=12")]
    cluster = Submitted()
    submission = Submission.of(["glyphs", "digits"], ["one", "two"], overrides, "/shared/runs", "http://tracker", 3.0)
    job, notes = submission.to(cluster, tmp_path)
    assert (job.id, notes) == ("j", [])
    assert cluster.words == [
        "run",
        f"{SPACES}/one.yaml",
        f"{SPACES}/two.yaml",
        "--or-resume",
        "--runs-dir",
        "/shared/runs",
        "--priority",
        "3",
    ]
    assert (cluster.sweeps, cluster.variables) == (["one", "two"], {"MLFLOW_TRACKING_URI": "http://tracker"})
    assert cluster.spaces["one"] == load_config(ROOT / "search_spaces" / "glyphs.yaml", overrides)
    assert {name: config.sweep.trials for name, config in cluster.spaces.items()} == {"one": 7, "two": 7}


def test_a_trials_share_is_given_to_submit_as_to_run(tmp_path, monkeypatch):
    cluster = Submitted()
    monkeypatch.setattr(app, "jobs_at", lambda address: cluster)
    monkeypatch.chdir(tmp_path)
    words = ["--gpus-per-trial", "2", "--cpus-per-trial", "8", "--runs-dir", "/shared", "--address", "http://x:8265"]
    assert CliRunner().invoke(app.app, ["submit", "digits", *words]).exit_code == 0
    share = cluster.spaces["digits"].sweep
    assert (share.gpus_per_trial, share.cpus_per_trial) == (2.0, 8.0)


def test_paths_must_mean_something_on_the_cluster(tmp_path):
    with pytest.raises(ConfigError, match="--runs-dir: runs: must be an absolute path, of a folder that all"):
        Submission.of(["digits"], ["s"], [], "runs")
    space = yaml.safe_load((ROOT / "search_spaces" / "digits-linear.yaml").read_text())
    space["student"] = {"name": "digits_linear", "checkpoint": "weights/a.pt"}
    write(tmp_path / "space.yaml", yaml.safe_dump(space))
    with pytest.raises(ConfigError, match=r"student\.checkpoint = 'weights/a\.pt': must be an absolute path"):
        Submission.of([str(tmp_path / "space.yaml")], ["s"], [], "/runs")
    with pytest.raises(ConfigError, match="known by name"):
        Submission.of(["nothing"], ["s"], [], "/runs")


# --- who answers --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(status, content):
    """An HTTP server that gives one answer."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_what_is_no_dashboard_is_told_in_one_line(monkeypatch):
    pytest.importorskip("aiohttp_cors", reason="needs ray[default]: pip install '.[sweep,cluster]'")
    for status, content in ((200, b"<html>hello</html>"), (404, b""), (500, b"")):
        with (
            serving(status, content) as url,
            pytest.raises(ResourceError, match="is no Ray dashboard; it is http://HOST"),
        ):
            jobs_at(url)
    with pytest.raises(ResourceError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:1: .*refused"):
        jobs_at("http://127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("tune_topkd.execution.jobs._LONGEST_KNOCK", 0.3)
        with pytest.raises(ResourceError, match=r"no Ray dashboard answers at .*timed out"):
            jobs_at(f"http://127.0.0.1:{silent.getsockname()[1]}")
    with pytest.raises(ResourceError, match="no Ray cluster answers there"):
        jobs_at("127.0.0.1:1")
    with pytest.raises(ConfigError, match="--address: must be given: http://HOST:8265"):
        jobs_at(None)


# --- the whole way ------------------------------------------------------------------------------------------------------

TOKEN = "a-token-of-at-least-thirty-two-characters"


class Head:
    """A Ray head with a dashboard and a token, and how to talk to it from outside."""

    def __init__(self, folder, agent_port=0):
        self.folder, self.port, self.dashboard_port, self.agent_port = folder, free_port(), free_port(), agent_port
        self.url = f"http://127.0.0.1:{self.dashboard_port}"
        self.token = folder / "token"
        self.token.write_text(TOKEN)
        self.runs, self.user = folder / "runs", folder / "user"
        self.user.mkdir()
        binaries = str(Path(sys.executable).parent)
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.environment.pop("RAY_ADDRESS", None)

    def start(self):
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={self.port}", "--num-cpus=2"]
        command += [f"--dashboard-port={self.dashboard_port}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
        command += [f"--temp-dir={self.folder / 'r'}", "--disable-usage-stats", "--block"]
        command += [f"--dashboard-agent-listen-port={self.agent_port}"]  # another Ray's may hold the usual one
        log = self.folder / "head.log"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, start_new_session=True, cwd=self.user
            )
        until = time.monotonic() + 120
        while True:
            assert self.process.poll() is None, log.read_text()
            with contextlib.suppress(ResourceError, JobError):
                return jobs_at(self.url)
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.5)

    def stop(self):
        import psutil

        family = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        self.process.wait()

    def said(self, *words, rc=0, **variables):
        """What a command says, from a folder that is not the project's."""
        command = [sys.executable, str(ROOT / "launch.py"), *map(str, words)]
        environment = {k: v for k, v in (self.environment | variables).items() if v is not None}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=self.user, timeout=280)
        assert done.returncode == rc, done.stdout + done.stderr
        return done

    def submit(self, name, trials):
        words = ("--trials", trials, "--epochs", 3, "--set", "baselines=null", "--set", "sweep.asha=null")
        done = self.said("submit", "space.yaml", "--name", name, *words, "--runs-dir", self.runs, "--address", self.url)
        return done.stdout.strip()

    def ended(self, name):
        """The trials that have ended, by the ledger, each as often as it has."""
        path = self.runs / name / "ledger.jsonl"
        return [e.key.number for e in read_events(path)[0] if e.name == "end"] if path.exists() else []

    def wait_for(self, name, more_than):
        until = time.monotonic() + 200
        while len(self.ended(name)) <= more_than:
            assert time.monotonic() < until, self.said("logs", name, "--address", self.url).stdout
            time.sleep(0.5)


@contextlib.contextmanager
def running(agent_port=0):
    pytest.importorskip("aiohttp_cors", reason="needs ray[default]: pip install '.[sweep,cluster]'")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path may not be long
    head = Head(folder, agent_port)
    space = yaml.safe_load((ROOT / "search_spaces" / "digits-linear.yaml").read_text())
    space["teacher"]["recipe"]["epochs"] = 2
    write(head.user / "space.yaml", yaml.safe_dump(space))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            patch.setenv(name, head.environment[name])
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster._read_credentials()
        try:
            head.jobs = head.start()
            yield head
        finally:
            head.stop()
            shutil.rmtree(folder, ignore_errors=True)
    cluster._read_credentials()


@pytest.fixture(scope="module")
def head():
    with running() as head:
        yield head


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_sweep_outlives_the_terminal_is_stopped_cleanly_and_goes_on(head):
    first = head.submit("long", 200)
    refused = head.said("submit", "space.yaml", "--name", "long", "--runs-dir", head.runs, "--address", head.url, rc=2)
    assert f"long: job {first} runs it already" in refused.stderr
    head.wait_for("long", 2)
    head.said("stop", "long", "--address", head.url)
    events = read_events(head.runs / "long" / "ledger.jsonl")[0]
    assert (events[-1].name, events[-1].data["reason"]) == ("stop", "interrupted")
    ended = head.ended("long")
    second = head.submit("long", 200)
    assert second != first
    head.wait_for("long", len(ended))
    head.said("stop", second, "--address", head.url)
    assert head.ended("long")[: len(ended)] == ended
    assert len(set(head.ended("long"))) == len(head.ended("long")), "no trial ended twice"
    assert audit("long", Workspace.at(head.runs, sqlite_uri(head.runs / "mlflow.db"), "local")) == []
    assert "is over already (stopped)" in head.said("stop", second, "--address", head.url, rc=2).stderr
    listed = json.loads(head.said("jobs", "--json", "--address", head.url).stdout)
    assert [(job["id"], job["sweeps"], job["status"]) for job in listed] == [
        (first, ["long"], "stopped"),
        (second, ["long"], "stopped"),
    ]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_job_is_followed_to_its_end_and_the_same_submission_finds_it_finished(head):
    head.submit("short", 3)
    done = head.said("logs", "-f", "short", "--address", f"127.0.0.1:{head.port}")  # the head knows its dashboard
    assert f"Ray: the cluster at 127.0.0.1:{head.port}" in done.stdout or "as RAY_ADDRESS says" in done.stdout
    assert "[3/3 trainings] trial" in done.stdout
    assert "short, succeeded after" in done.stderr
    ended = head.ended("short")
    assert sorted(ended) == [0, 1, 2]
    again = head.submit("short", 3)
    assert "short: 3 completed; finished" in head.said("logs", "-f", again, "--address", head.url).stdout
    assert head.ended("short") == ended
    assert (head.runs / "short" / "tuned.yaml").exists()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_job_that_fails_says_why(head):
    text = (head.user / "space.yaml").read_text()
    write(head.user / "broken.yaml", text.replace("name: digits_linear", "name: 'nowhere:network'"))
    done = head.said("submit", "broken.yaml", "--name", "b", "--runs-dir", head.runs, "--address", head.url)
    assert "submitted: b;" in done.stderr
    failed = head.said("logs", "-f", "b", "--address", head.url, rc=1)
    assert "nowhere" in failed.stdout
    assert "b, failed after" in failed.stderr


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_head_whose_agent_has_no_port_takes_no_jobs_and_the_line_says_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as taken, running(taken.getsockname()[1]) as head:
        words = ("space.yaml", "--name", "s", "--runs-dir", head.runs, "--address", head.url)
        refused = head.said("submit", *words, rc=2).stderr
        assert "start the head with `ray start --head --dashboard-agent-listen-port=0`" in refused
        assert len(refused.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_each_mistake_with_a_token_is_one_line_that_names_the_variable(head, tmp_path):
    wrong, empty = tmp_path / "wrong", tmp_path / "empty"
    wrong.write_text("b" * 40)
    empty.write_text("\n")
    asks = "the cluster asks for a token: set RAY_AUTH_MODE=token, and put the cluster's into RAY_AUTH_TOKEN"
    mistakes = (
        ({"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None}, asks),
        ({"RAY_AUTH_MODE": "disabled"}, asks),
        ({"RAY_AUTH_TOKEN_PATH": None, "HOME": str(tmp_path)}, "RAY_AUTH_MODE is token, and there is none"),
        ({"RAY_AUTH_TOKEN": "b" * 40}, "the cluster refuses this token: RAY_AUTH_TOKEN must be"),
        ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, "the cluster refuses this token: RAY_AUTH_TOKEN_PATH must be"),
        ({"RAY_AUTH_TOKEN_PATH": str(empty)}, f"RAY_AUTH_TOKEN_PATH = {empty}: is empty"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/file"}, "RAY_AUTH_TOKEN_PATH = /no/file: cannot be read: No such file"),
    )
    at_the_head = f"127.0.0.1:{head.port}"
    for address, (variables, told) in (
        *((head.url, m) for m in mistakes),
        (at_the_head, mistakes[0]),
        (at_the_head, mistakes[4]),
    ):
        said = head.said("jobs", "--address", address, rc=2, **variables).stderr
        assert told in said
        lines = [line for line in said.splitlines() if "gcs_client.cc" not in line]  # Ray's core says so itself
        assert len(lines) == 1, said
    refused = head.said("jobs", "--address", "ray://127.0.0.1:1", rc=2).stderr
    assert "a sweep does not run through the Ray client" in refused
