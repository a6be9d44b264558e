"""The private Ray, the way to another one, and who may come in."""

import json
import os
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tune_topkd.execution import ResourceError
from tune_topkd.execution import check_address
from tune_topkd.execution import cluster
from tune_topkd.ledger import Share

pytestmark = [
    pytest.mark.ray,
    # Ray 2.60 itself: its own deprecated calls, and sockets it leaves to the collector
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PRIVATE = """
import json, os, signal, sys
import ray
from tune_topkd.execution import Cluster

before, asked = dict(os.environ), []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
print("ready", flush=True)
with Cluster.attached() as cluster:
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    there = ray.remote(num_cpus=0)(lambda: [os.environ.get("RAY_ADDRESS"), len(os.sched_getaffinity(0))]).remote()
    facts = {
        "address": ray.get_runtime_context().gcs_address,
        "token": token,
        "nodes": cluster.nodes,
        "worker": ray.get(there),
        "asked": len(asked),
    }
    print(json.dumps(facts), flush=True)
    sys.stdin.read()
changed = [name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)]
print(json.dumps([name for name in changed if name.startswith(("RAY_A", "RAY_JOB", "HOME", "TMP"))]), flush=True)
"""


class Private:
    """A private Ray of a process that has one CPU, no home, a temporary folder too long, another cluster's address.

    While it starts it is sent SIGTERM all the time.
    """

    def __init__(self, folder):
        self.home = folder / "home"
        self.home.mkdir(mode=0o500)
        far = folder / ("x" * 118)
        far.mkdir()
        environment = os.environ | {
            "HOME": "/proc/no-home" if os.geteuid() == 0 else str(self.home),
            "RAY_TMPDIR": str(far),
            "RAY_ADDRESS": "127.0.0.1:1",
            "RAY_AUTH_TOKEN": "of-another-cluster",
        }
        environment.pop("RAY_AUTH_MODE", None)
        self._process = subprocess.Popen(
            ["taskset", "-c", "0", sys.executable, "-c", PRIVATE],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "ready\n", self._process.communicate()[1]
        self.asked = 0
        while not select.select([self._process.stdout], [], [], 0.0003)[0]:
            self._process.terminate()
            self.asked += 1
        first = self._process.stdout.readline()
        assert first, self._process.communicate()[1]
        self.facts = json.loads(first)

    @property
    def token(self):
        return Path(self.facts["token"])

    def end(self):
        """Let it end: its last line."""
        return json.loads(self._process.communicate("", timeout=120)[0])

    def kill(self):
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def private():
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    ray = Private(folder)
    yield ray
    ray.kill()
    shutil.rmtree(folder)


@pytest.fixture
def credentials(monkeypatch, tmp_path):
    """Sets what this process shows to a head; a home of its own."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def credentials(at_home=None, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        if at_home is not None:
            (home / ".ray" / "auth_token").write_text(at_home)
        cluster._read_credentials()

    credentials()
    yield credentials
    monkeypatch.undo()
    cluster._read_credentials()


def test_a_private_ray_has_what_its_process_may_use(private):
    assert private.facts["nodes"] == [[1.0, 0.0]]
    assert private.facts["worker"] == [None, 1]


def test_a_process_that_handles_sigterm_does_so_at_every_instant_of_ray_s_start(private):
    assert private.asked > 50
    assert 0 < private.facts["asked"] <= private.asked


def test_its_token_is_in_a_folder_and_a_file_of_this_user_alone(private):
    assert stat.S_IMODE(private.token.stat().st_mode) == 0o600
    assert stat.S_IMODE(private.token.parent.stat().st_mode) == 0o700
    assert len(private.token.read_text()) == 64
    assert not list(private.home.iterdir())


def test_only_who_has_the_token_comes_in(private, credentials):
    address = private.facts["address"]
    refused = [
        ({}, "the cluster asks for a token: set RAY_AUTH_MODE=token, and put the cluster's into RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "wrong"}, "set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": private.token.read_text(), "RAY_AUTH_MODE": "disabled"}, "set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"}, "refuses this token: RAY_AUTH_TOKEN must be"),
    ]
    for variables, told in refused:
        credentials(**variables)
        began = time.monotonic()
        with pytest.raises(ResourceError, match=told) as raised:
            check_address(address)
        assert str(raised.value).startswith(f"--address {address}: ")
        assert "\n" not in str(raised.value)
        assert time.monotonic() - began < 5
    credentials(RAY_AUTH_TOKEN=private.token.read_text())
    check_address(address)


def test_a_wrong_token_in_a_file_is_named_by_its_variable(private, credentials, tmp_path):
    (tmp_path / "token").write_text("wrong")
    credentials(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    with pytest.raises(ResourceError, match="refuses this token: RAY_AUTH_TOKEN_PATH must be"):
        check_address(private.facts["address"])
    credentials(RAY_AUTH_TOKEN_PATH=private.facts["token"])
    check_address(private.facts["address"])


def test_a_wrong_token_at_home_is_named(private, credentials):
    credentials(at_home="wrong", RAY_AUTH_MODE="token")
    with pytest.raises(ResourceError, match=r"refuses this token: ~/\.ray/auth_token must be"):
        check_address(private.facts["address"])


def test_no_token_where_the_mode_asks_for_one_is_named(private, credentials):
    credentials(RAY_AUTH_MODE="token")
    with pytest.raises(ResourceError, match="RAY_AUTH_MODE is token, and there is none"):
        check_address(private.facts["address"])


def test_a_token_file_that_is_not_there_is_named(private, credentials, tmp_path):
    credentials(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(tmp_path / "missing"))
    with pytest.raises(ResourceError, match=r"RAY_AUTH_TOKEN_PATH .*missing"):
        check_address(private.facts["address"])


def test_an_address_of_the_environment_is_named_as_such(credentials):
    credentials(RAY_ADDRESS="127.0.0.1:1")
    with pytest.raises(ResourceError, match=r"^RAY_ADDRESS 127\.0\.0\.1:1: no Ray cluster answers there"):
        check_address("127.0.0.1:1")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://127.0.0.1:8265", "a dashboard, which takes jobs"),
        ("ray://127.0.0.1:10001", "does not run through the Ray client"),
        ("somewhere", "must be HOST:PORT of a Ray head, auto, or local"),
        ("host:99999", "no Ray cluster answers there"),
    ],
)
def test_what_is_no_head_s_address_is_told_what_it_is(credentials, address, told):
    with pytest.raises(ResourceError, match=told):
        check_address(address)


def test_who_answers_and_is_no_ray_is_not_waited_for(credentials, monkeypatch):
    monkeypatch.setattr(cluster, "_LONGEST_KNOCK", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(ResourceError, match="what answers there is no Ray head"):
            check_address(f"127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - began < 20


def test_an_address_attaches_to_a_running_cluster_and_leaves_it_running(private, credentials):
    credentials(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=private.token.read_text())
    for _ in range(2):
        with cluster.Cluster.attached(private.facts["address"]) as attached:
            assert attached.nodes == (Share(1.0, 0.0),)
    with pytest.raises(ResourceError, match="no Ray cluster answers there"), cluster.Cluster.attached("127.0.0.1:1"):
        pass


def test_in_the_end_nothing_is_left_and_the_environment_is_as_it_was(private):
    """The last test that needs the private Ray: it ends here."""
    assert private.token.parent.is_dir()
    assert private.end() == []
    assert not private.token.parent.exists()
    assert not list(private.home.iterdir())


@pytest.mark.parametrize(
    ("visible", "option"), [("", {}), ("0,1", {}), ("-1", {"num_gpus": 0}), ("0,-1,1", {"num_gpus": 1})]
)
def test_gpus_are_counted_as_cuda_does(monkeypatch, visible, option):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cluster._visible_gpus() == option


@pytest.mark.parametrize(
    "error", [cluster.ray.exceptions.RuntimeEnvSetupError, cluster.ray.exceptions.AuthenticationError, Exception]
)
def test_what_ray_raises_at_its_start_is_one_line(monkeypatch, error):
    def init(**options):
        raise error("the package\nis too large")

    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(ResourceError, match="Ray cannot be started: ") as raised, cluster.Cluster.attached():
        pass
    assert "\n" not in str(raised.value)
    assert "the package is too large" in str(raised.value)


@pytest.mark.parametrize(("variables", "is_used"), [({}, False), ({"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1"}, True)])
def test_ray_does_not_pack_the_working_directory_under_uv_unless_asked_to(monkeypatch, variables, is_used):
    monkeypatch.delenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster.ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    with cluster._no_uv_hook(is_private=True):
        assert cluster.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV is is_used
    with cluster._no_uv_hook(is_private=False):
        assert cluster.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    assert cluster.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
