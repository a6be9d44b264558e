"""Real servers for the tests: `mlflow server`, PostgreSQL and moto's S3, as processes that can be killed, stopped and
started again."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from tune_topkd.execution import cluster

PASSWORD = "hunter2-of-the-tracker"
PATIENCE = 120
"""Seconds for a server to come up: a guard, far more than it takes."""


@contextlib.contextmanager
def mlflow_server(store, *options):
    """`mlflow server` over a store, on a loopback port; `options` are further ones of its command line."""
    server = MlflowServer(store, options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class MlflowServer:
    """A server in a process group of its own; it keeps its port when it is killed and started again."""

    def __init__(self, store, options=()):
        self._store = store
        self._options = options
        self._port = free_port()
        self._process = None
        self.uri = f"http://tracker:{PASSWORD}@127.0.0.1:{self._port}"
        """With credentials, which it does not ask for: tests look where they turn up."""

    def start(self):
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self._store, "--workers", "1"]
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self._port), *self._options],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self.answers, self._process)

    def answers(self):
        """Whether it is there."""
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5).close()
        except OSError:
            return False
        return True

    def kill(self):
        """SIGKILL it with its workers; nothing is done if it is dead."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self):
        """It hangs: connections are taken, and nothing is answered."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self):
        """It hangs no more."""
        os.killpg(self._process.pid, signal.SIGCONT)
        wait_for(self.answers, self._process)


def postgres_binaries():
    """The folder of PostgreSQL's server, or none."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@contextlib.contextmanager
def postgres_server():
    """PostgreSQL with an empty cluster of its own, which does not wait for the disk."""
    # Not below pytest's folder, which only its owner may enter: PostgreSQL refuses to be root.
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        server = PostgresServer(Path(folder), postgres_binaries())
        server.start()
        try:
            yield server
        finally:
            server.kill()


class PostgresServer:
    """A PostgreSQL on a loopback port."""

    def __init__(self, folder, binaries):
        self._data = folder / "data"
        self._binaries = binaries
        self._port = free_port()
        self._process = None
        self._dsn = {"host": "127.0.0.1", "port": self._port, "user": "tracker", "dbname": "postgres"}
        self._user = {"user": _other_user(), "group": None, "extra_groups": []} if os.geteuid() == 0 else {}
        if self._user:
            entry = pwd.getpwnam(self._user["user"])
            self._user["group"] = entry.pw_gid
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        command = [binaries / "initdb", "--pgdata", self._data, "--username", "tracker", "--auth", "trust", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, timeout=PATIENCE, **self._user)

    def uri(self, database):
        """The URI of a database; the server takes any password."""
        return f"postgresql://tracker:{PASSWORD}@127.0.0.1:{self._port}/{database}"

    def start(self):
        """Start it, and wait until it answers."""
        options = {"port": self._port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        self._process = subprocess.Popen(
            [self._binaries / "postgres", "-D", self._data, *settings],
            cwd=self._data,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **self._user,
        )
        wait_for(self.answers, self._process)

    def answers(self):
        """Whether it is there."""
        import psycopg

        try:
            psycopg.connect(**self._dsn).close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self):
        """SIGKILL it with its backends, each of which is a group of its own; nothing is done if it is dead."""
        if self._process is not None:
            first = psutil.Process(self._process.pid)
            family = [first, *first.children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
            self._process = None
            psutil.wait_procs(family, timeout=PATIENCE)

    def run(self, *statements):
        """Run statements that are no transaction."""
        import psycopg

        connection = psycopg.connect(**self._dsn)
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
        finally:
            connection.close()

    def copy(self, template, database):
        """Make a database as a copy of another one."""
        self.run(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{template}'",
            f"CREATE DATABASE {database} TEMPLATE {template}",
        )


_S3 = """
import contextlib, socket, sys, threading
from moto.server import ThreadedMotoServer

inside = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
inside.start()
door, passing = None, set()

def ended(end):
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)

def copy(one, other):
    with contextlib.suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(data)
    ended(one)
    ended(other)

def let_in(door):
    with contextlib.suppress(OSError):
        while True:
            ends = door.accept()[0], socket.create_connection(inside.get_host_and_port())
            passing.update(ends)
            for pair in (ends, ends[::-1]):
                threading.Thread(target=copy, args=pair, daemon=True).start()

def on():
    global door
    door = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    threading.Thread(target=let_in, args=(door,), daemon=True).start()

def off():
    ended(door)
    door.close()
    for end in list(passing):
        ended(end)
    passing.clear()

on()
for word in sys.stdin:
    off() if word.strip() == "off" else on()
"""


@contextlib.contextmanager
def s3_server():
    """moto's S3 behind a loopback port, with nothing in it."""
    server = S3Server()
    try:
        wait_for(server.answers, server.process)
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


class S3Server:
    """A server that can be gone for a while, and then has what it had."""

    def __init__(self):
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        command = [sys.executable, "-c", _S3, str(self._port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, bufsize=1, **quiet)
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def answers(self):
        """Whether it is there."""
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=5).close()
        except OSError:
            return False
        return True

    def go(self):
        """Its port is closed, and so are all connections."""
        self.process.stdin.write("off\n")
        wait_for(lambda: not self.answers(), self.process)

    def come_back(self):
        """Its port is open again."""
        self.process.stdin.write("on\n")
        wait_for(self.answers, self.process)

    def make_bucket(self, name):
        """An empty bucket: its name."""
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        return name


class RayHead:
    """A Ray head with a token, on a loopback port, which processes of its `environment` find their way into."""

    def __init__(self, folder, *options, **environment):
        """Nothing is started. `options` are those of `ray start`; `environment` is put beside this process's own."""
        tests = Path(__file__).parent
        self.folder, self.address, self._options = folder, f"127.0.0.1:{free_port()}", options
        self.environment = os.environ | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
            "OMP_NUM_THREADS": "1",
        }
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
            self.environment.pop(name, None)
        token = folder / "token"
        token.write_text("a-token-of-at-least-thirty-two-characters")
        self.credentials = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment |= self.credentials | environment

    @contextlib.contextmanager
    def running(self):
        """Start it, and have this process show its token; in the end it is gone, and so is its folder."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.credentials.items():
                patch.setenv(name, value)
            for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
                patch.delenv(name, raising=False)
            cluster._read_credentials()
            try:
                self.start()
                yield self
            finally:
                self.stop()
                shutil.rmtree(self.folder, ignore_errors=True)
        cluster._read_credentials()

    def start(self):
        """Start the head; on a loaded machine it may give up by itself before its processes are there."""
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={self.address[10:]}"]
        command += ["--num-gpus=0", "--include-dashboard=false", f"--temp-dir={self.folder / 'r'}", *self._options]
        command += ["--dashboard-agent-listen-port=0", "--disable-usage-stats", "--block"]
        log = self.folder / "head.log"
        for _ in range(5):
            with log.open("w") as output:
                options = {"env": self.environment, "stdout": output, "stderr": output, "start_new_session": True}
                self.head = subprocess.Popen(command, **options)
            while self.head.poll() is None:
                if "Ray runtime started" in log.read_text():
                    return cluster.check_address(self.address)
                time.sleep(0.5)
        raise AssertionError(log.read_text())

    def stop(self, *others):
        """Kill it with all that it has started, and other processes too."""
        family = [self.head, *psutil.Process(self.head.pid).children(recursive=True)]
        for process in (*others, *family):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        for process in (*others, self.head):
            process.wait()


def _other_user():
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


def free_port():
    """A loopback port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(condition, process=None):
    """Wait until it holds.

    Raises:
        AssertionError: it does not, for long, or the process has ended.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process is None or process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.1)
