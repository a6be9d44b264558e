"""Ray: what its nodes have, and whether trials can be had there."""

import contextlib
import ctypes
import gc
import logging
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray reads these at import or start; what the user has set wins.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # no CSV, JSON and TensorBoard copies of the ledger
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")  # its snapshots are of no use to us
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1000")  # how many are out is ours to say; with fewer, workers idle
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a trial without a GPU leaves CUDA_VISIBLE_DEVICES

import ray
from ray import _raylet
from ray._private import ray_constants
from ray._private import utils as ray_utils
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # its stub lacks it
from ray._raylet import Config  # type: ignore[attr-defined]  # its stub lacks it
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub lacks it

from tune_topkd import machine
from tune_topkd.config import SweepConfig
from tune_topkd.errors import TuneTopKDError
from tune_topkd.execution.scratch import NoScratchError
from tune_topkd.execution.scratch import scratch_folder
from tune_topkd.ledger import Share

LONGEST_SILENCE_OF_THE_HEAD = 25.0
"""Seconds without an answer after which Ray's head counts as lost."""

_SECONDS_BETWEEN_KNOCKS = 2.0
_LONGEST_KNOCK = 4.0
_KEPT_IN = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH (a file) or ~/.ray/auth_token"
_CORES_HANDLER = "_ZN3ray6RayLog27InstallFailureSignalHandlerEPKcb"
_OF_ANOTHER_CLUSTER = ("RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")


class ResourceError(TuneTopKDError):
    """The cluster can never give a trial what it asks for, or cannot be reached."""


@dataclass(frozen=True)
class Cluster:
    """A running Ray that this process is attached to, as what its nodes have."""

    nodes: tuple[Share, ...]

    @classmethod
    @contextmanager
    def attached(cls, address: str | None = None, on_loss: Callable[[str], None] | None = None) -> Iterator["Cluster"]:
        """Start a private Ray on this machine, or attach to the one at `address`; let go of it at the end.

        A private one has what this process may use of the machine, and leaves nothing behind. Only this process and what
        it starts can join it: its token is in a file of its own that nobody else may read.

        Args:
            address: HOST:PORT of a Ray head.
            on_loss: called on a thread, with what happened, when Ray's head is gone: every call of Ray then blocks, and
                after a minute it ends this process silently, so this has to end it. By default the message goes
                to stderr, and the exit code is 2.

        Raises:
            ResourceError: nothing answers at `address`, it asks for another token, or Ray cannot be started.
        """
        if address:
            check_address(address)
        with _running(address):
            watch = _HeadWatch(on_loss or _die)
            try:
                yield cls.now()
            finally:
                watch.stop()

    @classmethod
    def now(cls) -> "Cluster":
        """The nodes there are at this moment."""
        return cls(tuple(resources(node) for node in ray.nodes() if node["Alive"]))

    def room(self, config: SweepConfig) -> int:
        """How many trials fit at once.

        Raises:
            ResourceError: not even one does.
        """
        share = share_of(config)
        room = self.room_for(share)
        if room == 0:
            columns = zip(*self.nodes, strict=True) if self.nodes else ((0.0,), (0.0,))
            most = Share(*map(max, columns))
            key = "gpus_per_trial" if share.gpus > most.gpus else "cpus_per_trial"
            rule = f"no node has room for a trial: the largest has {most.cpus:g} CPUs and {most.gpus:g} GPUs"
            raise ResourceError(f"sweep.{key} = {getattr(config.sweep, key):g}: {rule}")
        return min(room, config.sweep.max_concurrent or room)

    def room_for(self, share: Share) -> int:
        """How many trials of this share fit at once."""
        return sum(share.times_on(node) for node in self.nodes)

    def larger(self, share: Share) -> Share | None:
        """The next larger share of a node: twice as much of what a trial shares with others; none if it has all.

        Trials on a node share its memory, or a GPU's, in proportion to what they were given.
        """
        cpus, gpus = 2 * share.cpus, min(2 * share.gpus, 1.0) if share.gpus < 1 else share.gpus
        candidates = [Share(cpus, gpus), Share(share.cpus, gpus), *(Share(n.cpus, gpus) for n in self.nodes)]
        return next((c for c in candidates if c > share and self.room_for(c)), None)


def share_of(config: SweepConfig) -> Share:
    """What each trial is given of a node."""
    cpus, gpus = config.sweep.cpus_per_trial, config.sweep.gpus_per_trial
    assert not isinstance(cpus, str), "auto is measured before a sweep begins"
    assert not isinstance(gpus, str), "auto is measured before a sweep begins"
    return Share(cpus, gpus)


def trial_part(share: Share) -> dict[str, Any]:
    """What a trial is told of its share: the fields of a `TrialConfig`."""
    return {"threads": max(int(share.cpus), 1), "gpu_share": min(share.gpus, 1.0), "ranks": max(int(share.gpus), 1)}


def check_address(address: str) -> None:
    """Knock at the door: Ray itself waits more than a minute for a cluster that is not there.

    Raises:
        ResourceError: no address, nothing answers there, or it is no Ray head that lets this process in.
    """
    what = _named(address)
    if address.startswith("ray://"):
        rule = "a sweep does not run through the Ray client: start it on a machine of the cluster, with the head's HOST:PORT"
        raise ResourceError(f"{what}: {rule}")
    if address.startswith(("http://", "https://")):
        rule = (
            "this is a dashboard, which takes jobs; a sweep needs the head's HOST:PORT (6379, if nobody has changed it)"
        )
        raise ResourceError(f"{what}: {rule}; --address local starts a private Ray")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        if address != "auto":
            raise ResourceError(f"{what}: must be HOST:PORT of a Ray head, auto, or local for a private one")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, OverflowError) as error:
        rule = f"no Ray cluster answers there: {error}; --address local starts a private Ray"
        raise ResourceError(f"{what}: {rule}") from error
    _check_credentials(address)


def _named(address: str) -> str:
    """An address and where it comes from."""
    is_option = address != os.environ.get("RAY_ADDRESS")
    return f"{'--address' if is_option else 'RAY_ADDRESS'} {address}"


def _check_credentials(address: str) -> None:
    """Ask a head for its cluster's id, with the token that Ray would show it.

    Raises:
        ResourceError: it asks for another one, or does not speak Ray's language.
    """
    check_token(address)
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(GcsClient(address=address) and None)
        except Exception as error:  # noqa: BLE001 (told by whoever waits)
            answers.put(error)

    threading.Thread(target=ask, name="ray-knock", daemon=True).start()  # Ray's own patience is 40 s
    try:
        error = answers.get(timeout=_LONGEST_KNOCK)
    except queue.Empty:
        raise ResourceError(f"{_named(address)}: what answers there is no Ray head") from None
    if isinstance(error, ray.exceptions.AuthenticationError):
        raise ResourceError(f"{_named(address)}: {token_problem()}") from error
    if error is not None:
        raise ResourceError(f"{_named(address)}: no Ray cluster answers there: {in_one_line(error)}") from error


def check_token(address: str) -> None:
    """Look for the token that Ray would show at an address.

    Raises:
        ResourceError: there is none, or it cannot be read.
    """
    _check_token_file()
    if _shows_token() and not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        rule = f"RAY_AUTH_MODE is token, and there is none: put the cluster's into {_KEPT_IN}"
        raise ResourceError(f"{_named(address)}: {rule}")


def _shows_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def token_problem() -> str:
    """What to do about a cluster that has refused this process."""
    if _shows_token():
        return f"the cluster refuses this token: {_token_source()} must be the cluster's own"
    return f"the cluster asks for a token: set RAY_AUTH_MODE=token, and put the cluster's into {_KEPT_IN}"


def _check_token_file() -> None:
    """Read the token's file as Ray would, which ends the whole process if it cannot.

    Raises:
        ResourceError: it cannot be read, or is empty.
    """
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path or os.environ.get("RAY_AUTH_TOKEN"):
        return
    try:
        is_empty = not Path(path).read_bytes().strip()
    except OSError as error:
        raise ResourceError(f"RAY_AUTH_TOKEN_PATH = {path}: cannot be read: {error.strerror}") from error
    if is_empty:
        raise ResourceError(f"RAY_AUTH_TOKEN_PATH = {path}: is empty; it must hold the cluster's token")


def _token_source() -> str:
    """Where Ray finds the token that it shows."""
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return next((name for name in names if os.environ.get(name)), "~/.ray/auth_token")


@contextmanager
def _running(address: str | None) -> Iterator[None]:
    """Ray, in this process: attached to the cluster at `address`, or a private one."""
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            options |= {"address": address}
        else:
            try:
                scratch = stack.enter_context(scratch_folder())
            except NoScratchError as error:
                raise ResourceError(f"Ray cannot be started: {error}") from error
            stack.enter_context(_private_environment(Path(scratch)))
            rays = str(Path(scratch, "r"))  # Ray opens its own folder to everybody, who cannot come this far
            options |= {"address": "local", "include_dashboard": False, "_temp_dir": rays, "num_cpus": machine.cpus()}
            options |= _visible_gpus()
        stack.callback(_shutdown)
        try:
            with _no_uv_hook(is_private=not address), _own_signal_handler():
                ray.init(**options)
        except Exception as error:  # Ray has no type for a start that took too long
            what = f"{_named(address)}: cannot be attached to" if address else "Ray cannot be started"
            raise ResourceError(f"{what}: {in_one_line(error)}") from error
        yield


def in_one_line(error: BaseException) -> str:
    """An exception of Ray's as a person can be told of it; of one that a task raised, the task's."""
    error = getattr(error, "cause", None) or error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _visible_gpus() -> dict[str, int]:
    """The option that lets Ray count as CUDA does, for which the first number below 0 ends the list."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    hidden_from = next((place for place, name in enumerate(visible) if name.strip().startswith("-")), None)
    return {} if hidden_from is None else {"num_gpus": hidden_from}


@contextmanager
def _private_environment(scratch: Path) -> Iterator[None]:
    """The variables by which a private Ray and its workers find one another, and no other cluster; then as before."""
    token = scratch / "token"
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))
    before = {name: os.environ.get(name) for name in (*_OF_ANOTHER_CLUSTER, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    for name in _OF_ANOTHER_CLUSTER:
        os.environ.pop(name, None)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    _read_credentials()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_credentials()


def _read_credentials() -> None:
    """Have Ray read its variables again: it does so once, at import. The mode first: a thread may ask in between."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _no_uv_hook(*, is_private: bool) -> Iterator[None]:
    """Under `uv run`, Ray would pack the working directory for its workers, which on this machine see it anyway."""
    before = ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    if is_private and "RAY_ENABLE_UV_RUN_RUNTIME_ENV" not in os.environ:
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    try:
        yield
    finally:
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = before


@contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Who handles SIGTERM goes on doing so: Ray has a handler in Python and one in C++, and both end the process."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler in (signal.SIG_DFL, None) or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda handler: None
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # one that comes between the next two waits
    try:
        with contextlib.suppress(AttributeError):  # it is put once in a process: now, and not while Ray's core starts
            getattr(ctypes.CDLL(_raylet.__file__), _CORES_HANDLER)(None, False)
        signal.signal(signal.SIGTERM, handler)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = before
        signal.signal(signal.SIGTERM, handler)


class _HeadWatch:
    """A thread that knocks at Ray's head now and then."""

    def __init__(self, on_loss: Callable[[str], None]) -> None:
        self._head = ray.get_runtime_context().gcs_address
        self._on_loss = on_loss
        self._stopping = threading.Event()
        threading.Thread(target=self._watch, name="ray-head-watch", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()

    def _watch(self) -> None:
        host, _, port = self._head.rpartition(":")
        answered = time.monotonic()
        while not self._stopping.wait(_SECONDS_BETWEEN_KNOCKS):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
                answered = time.monotonic()
            except OSError as error:
                if time.monotonic() - answered > LONGEST_SILENCE_OF_THE_HEAD and not self._stopping.is_set():
                    self._on_loss(f"Ray's head at {self._head} is gone: {error.strerror or error}")
                    return


def _die(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(2)


def _shutdown() -> None:
    """Let go of Ray with no garbage left that holds references into it.

    A reference that another thread's garbage collection drops while Ray shuts down ends the whole process from C++.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if was_enabled:
            gc.enable()


def resources(node: dict[str, Any]) -> Share:
    """What one of Ray's nodes has."""
    return Share(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
