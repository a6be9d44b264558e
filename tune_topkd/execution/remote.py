"""A sweep that lies in a store, as its workers see it: its checkpoints by attempt, and the files that its trials share.

    <sweep>/trials/0007/0002-0001/start.json          from which checkpoint the attempt went on
                                  epoch-0003/…        what `save` wrote, then report.json, which makes it count
    files/<sha256>                                    a file that trials share: the teacher's weights, the dataset
    teachers/<key>/bank-<hash>.f16                    the bank of a teacher's logits, if one was filled ahead

An *attempt* is one worker's turn at a trial, named by the number of the driver and of its turn, so no two have one name.
A worker goes on from the newest whole checkpoint of the attempt before its own, or from where that one began if it has none.
So what a worker still writes after the next has begun is never used.
"""

import contextlib
import functools
import json
import logging
import re
import shutil
import socket
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any
from typing import Self

from tune_topkd.execution.checkpoints import GENERATIONS
from tune_topkd.execution.checkpoints import REPORT_FILE
from tune_topkd.execution.checkpoints import checkpoints
from tune_topkd.execution.checkpoints import drop
from tune_topkd.execution.checkpoints import is_whole
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import header_of
from tune_topkd.storage import NoObjectError
from tune_topkd.storage import Store
from tune_topkd.storage import StoreError
from tune_topkd.storage import StoreNameError
from tune_topkd.storage import cache_folder
from tune_topkd.storage import copy_of
from tune_topkd.storage import file_hash
from tune_topkd.storage import lock
from tune_topkd.storage import open_store
from tune_topkd.storage import publish
from tune_topkd.storage import write_text

LARGEST_SHARE_OF_FREE_DISK = 0.5
"""Fraction of a node's free disk: a bank that would take more is not fetched."""

STORE_FILE = ".store.json"
"""In a copy of runs: of which store it is one."""

_START = "start.json"
_DRIVER_FILE = ".driver"
_FETCHING = ".fetching"  # whose lock is held while a bank is fetched
_OBJECT = re.compile(r"(?P<attempt>[0-9]{4,}-[0-9]{4,})/(?:start\.json|epoch-(?P<epoch>[0-9]+)/(?P<file>[^/]+))")
_log = logging.getLogger(__name__)


class OutdatedAttemptError(RuntimeError):
    """A later attempt at the trial has begun: this one is no longer the trial's."""


@dataclass(frozen=True)
class RemoteSweep:
    """Where a sweep lies whose runs are in a store: what its workers are told of it."""

    uri: str
    """Of the runs."""
    sweep: str
    """Its name."""
    first_segment: str
    """The object that has its ledger's first line."""
    runs: str
    """The driver's copy of the runs."""
    token: str
    """What the driver has written into its copy, so that a worker knows whether it sees the driver's disk."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Files that trials share, by their path on the driver's machine: the SHA-256 that names them in the store."""
    banks: Mapping[str, int] = field(default_factory=dict)
    """Banks of teachers' logits that the store has for these trainings: their size in bytes by the object's name."""

    @classmethod
    def driven(cls, uri: str, sweep: str, first_segment: str, folder: Path, token: str) -> Self:
        """As the process sees it that drives it from this folder.

        Raises:
            OSError: the folder cannot be written to.
        """
        write_text(folder / _DRIVER_FILE, token)
        return cls(uri, sweep, first_segment, str(folder.parent), token)

    def as_json(self) -> dict[str, Any]:
        """For a trial's description; the constructor takes it."""
        return asdict(self)

    def open(self) -> Store:
        """Its store, from this process."""
        return _opened(self.uri, copy_of(self.uri))

    def trial(self, label: str) -> str:
        """Where a trial's objects lie."""
        return trial_objects(self.sweep, label)

    def trouble(self, sweep_id: str) -> str:
        """What keeps this node from working on the sweep; empty if nothing does."""
        try:
            found = header_of(self.open().get(self.first_segment)).id
        except (StoreError, StoreNameError, LedgerError) as error:
            return f"{error} (seen from {socket.gethostname()})"
        return "" if found == sweep_id else f"{self.uri}: another sweep is called {self.sweep} there by now"

    @property
    def is_drivers_disk(self) -> bool:
        """Whether this process sees the files of the driver, under the same paths."""
        try:
            return (Path(self.runs) / self.sweep / _DRIVER_FILE).read_text() == self.token
        except OSError:
            return False

    def folder_of(self, label: str) -> Path:
        """This node's folder of a trial, made if need be."""
        runs = Path(self.runs) if self.is_drivers_disk else copy_of(self.uri)
        folder = runs / self.sweep / "trials" / label
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    def located(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's config with the files that it shares where this node has them, fetched if need be.

        Raises:
            StoreError: they cannot be fetched.
            OSError: the disk refused.
        """
        found = dict(config)
        if not self.is_drivers_disk:
            found |= self._fetched(config)
        self._bring_banks(found["teacher_bank"])
        return found

    def _fetched(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What of a trial's config is elsewhere on this node than on the driver's machine."""
        student = config["student"]
        found: dict[str, Any] = {}
        for key in ("teacher_checkpoint", "dataset_file"):
            found[key] = self._here(config[key])
        if student.get("checkpoint") is not None:
            found["student"] = {**student, "checkpoint": self._here(student["checkpoint"])}
        if (bank := config["teacher_bank"]) is not None:  # each node has its own: a bank is not mapped over a network
            found["teacher_bank"] = str(copy_of(self.uri) / Path(bank).relative_to(self.runs))
        return found

    def _bring_banks(self, there: str | None) -> None:
        """Fetch the banks that the store has and this node lacks. Without them trials do the same, and take longer."""
        if there is None:
            return
        folder = Path(there)
        for name, size in self.banks.items():
            target = folder / Path(name).name
            if Path(name).parent.name != folder.name:  # another teacher's
                continue
            try:
                with _one_at_a_time(folder / _FETCHING):
                    if target.exists():
                        continue
                    if size > LARGEST_SHARE_OF_FREE_DISK * shutil.disk_usage(folder).free:
                        _log.warning("%s is not fetched: it would take more than half of the free disk", name)
                        continue
                    self.open().get_file(name, target)
            except OSError as error:
                _log.warning("%s is not fetched, the teacher runs again: %s", name, error)

    def hashes_here(self, hashes: Mapping[str, str]) -> dict[str, str]:
        """Those of files that must be what they were, by their paths on this node; what was fetched has been compared."""
        is_here = self.is_drivers_disk
        return {path: expected for path, expected in hashes.items() if is_here or path not in self.shared}

    def _here(self, path: str | None) -> str | None:
        """A shared file on this node, fetched by the first that asks for it; the others wait."""
        if path is None or path not in self.shared:
            return path
        digest = self.shared[path]
        folder = cache_folder() / "files" / digest
        target = folder / Path(path).name
        with _one_at_a_time(folder / ".lock"):
            if not target.exists():
                self.open().get_file(shared_object(digest), target)
                if file_hash(target) != digest:
                    target.unlink()
                    raise StoreError(f"{self.uri}/{shared_object(digest)}", "is not as it was written")
        return str(target)


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of a node; its file and folder are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as stream:
        lock(stream, waits=True)
        yield


@functools.cache
def _opened(uri: str, copy: Path) -> Store:
    """The store of a URI, once for each process and endpoint: making boto3's client takes longer than a request."""
    return open_store(uri)


def trial_objects(sweep: str, label: str) -> str:
    """Where a trial's objects lie."""
    return f"{sweep}/trials/{label}"


def shared_object(digest: str) -> str:
    """The name of a file that trials share."""
    return f"files/{digest}"


def share(store: Store, paths: Iterable[str]) -> dict[str, str]:
    """Put files into the store under their content, if they are not there: their SHA-256 by path.

    Raises:
        StoreError: the store refuses.
        FileError: a file cannot be read.
    """
    there = set(store.list("files/"))
    found = {path: file_hash(Path(path)) for path in paths}
    for path, digest in found.items():
        if shared_object(digest) not in there:
            store.put(shared_object(digest), Path(path))
    return found


class Attempt:
    """One worker's turn at a trial, in the store."""

    def __init__(self, store: Store, trial: str, name: str) -> None:
        """Nothing is asked for yet.

        Args:
            store: where the sweep lies.
            trial: where the trial's objects lie.
            name: the attempt's; of two the later one's is the greater.
        """
        self._store = store
        self._trial = trial
        self._name = name
        self._kept: list[tuple[str, list[str]]] = []
        """The checkpoints that this attempt has stored and not dropped, the oldest first, with their objects."""
        self._has_earlier = False

    def begin(self, folder: Path) -> None:
        """Bring the checkpoint to go on from into `folder`, and write down which it is; others there are removed.

        Args:
            folder: this node's of the trial, held by this process.

        Raises:
            OutdatedAttemptError: a later attempt has begun.
            StoreError: the store cannot be reached.
            OSError: the disk refused.
        """
        attempts = _attempts(self._store, self._trial)
        if later := [name for name in attempts if name >= self._name]:
            raise OutdatedAttemptError(f"{self._trial}: attempt {max(later)} has begun, this is {self._name}")
        self._has_earlier = bool(attempts)
        origin = _bring_newest(self._store, self._trial, attempts, folder)
        for left in checkpoints(folder):
            if not origin or left.name != origin.rpartition("/")[2]:
                drop(left)
        content = json.dumps({"from": origin, "host": socket.gethostname()}).encode()
        if not self._store.put_new(f"{self._trial}/{self._name}/{_START}", content):
            raise OutdatedAttemptError(f"{self._trial}: attempt {self._name} has begun already")

    def keep(self, checkpoint: Path) -> None:
        """Return when a whole checkpoint is in the store; of this attempt's the last two stay, then no earlier one's.

        Raises:
            StoreError: the store cannot be reached.
        """
        there = f"{self._trial}/{self._name}/{checkpoint.name}"
        files = sorted(path.name for path in checkpoint.iterdir() if path.name != REPORT_FILE)
        for name in files:
            self._store.put(f"{there}/{name}", checkpoint / name)
        self._store.put(f"{there}/{REPORT_FILE}", (checkpoint / REPORT_FILE).read_bytes())  # from now on it counts
        self._kept.append((there, files))
        while len(self._kept) > GENERATIONS:
            old, names = self._kept.pop(0)
            for name in (REPORT_FILE, *names):  # first it no longer counts
                self._store.delete(f"{old}/{name}")
        if self._has_earlier and len(self._kept) == GENERATIONS:
            self._has_earlier = False
            for name, attempt in _attempts(self._store, self._trial).items():
                if name < self._name:
                    attempt.drop_checkpoints(self._store)


@dataclass
class _Found:
    """What the store has of an attempt."""

    folder: str
    has_start: bool = False
    files: dict[int, list[str]] = field(default_factory=dict)
    """Names of files by epoch."""

    def committed(self) -> list[int]:
        """The epochs of the checkpoints that count, the newest first."""
        return sorted((epoch for epoch, names in self.files.items() if REPORT_FILE in names), reverse=True)

    def checkpoint(self, epoch: int) -> str:
        return f"{self.folder}/epoch-{epoch:04d}"

    def drop_checkpoints(self, store: Store) -> None:
        """Remove all of them; each stops counting first."""
        for epoch, names in self.files.items():
            for name in sorted(names, key=lambda name: name != REPORT_FILE):
                store.delete(f"{self.checkpoint(epoch)}/{name}")


def _attempts(store: Store, trial: str) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    for name in store.list(f"{trial}/"):
        parts = _OBJECT.fullmatch(name.removeprefix(f"{trial}/"))
        if parts is None:
            continue
        attempt = found.setdefault(parts["attempt"], _Found(f"{trial}/{parts['attempt']}"))
        if parts["epoch"] is None:
            attempt.has_start = True
        else:
            attempt.files.setdefault(int(parts["epoch"]), []).append(parts["file"])
    return found


def _bring_newest(store: Store, trial: str, attempts: Mapping[str, _Found], folder: Path) -> str:
    """Bring the checkpoint that the next attempt goes on from into `folder`.

    Returns:
        Where it lies below the trial's objects, `ATTEMPT/epoch-0003`; empty if there is none.
    """
    for name in sorted(attempts, reverse=True):
        attempt = attempts[name]
        for epoch in attempt.committed():
            if _bring(store, attempt.checkpoint(epoch), attempt.files[epoch], folder):
                return attempt.checkpoint(epoch).removeprefix(f"{trial}/")
        if attempt.has_start:
            origin = str(json.loads(store.get(f"{trial}/{name}/{_START}"))["from"])
            before, _, checkpoint = origin.partition("/")
            epoch = int(checkpoint.partition("-")[2] or 0)
            files = attempts[before].files.get(epoch, []) if before in attempts else []
            return origin if REPORT_FILE in files and _bring(store, f"{trial}/{origin}", files, folder) else ""
    return ""


def _bring(store: Store, there: str, files: Iterable[str], folder: Path) -> bool:
    """Bring one checkpoint, unless it is here; whether it is here, and whole."""
    name = there.rpartition("/")[2]
    final, partial = folder / name, folder / f".{name}.partial"
    try:
        report = store.get(f"{there}/{REPORT_FILE}")
        if final.is_dir() and is_whole(final) and (final / REPORT_FILE).read_bytes() == report:
            return True
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for file in files:
            store.get_file(f"{there}/{file}", partial / file)
    except NoObjectError:  # it has just been dropped
        shutil.rmtree(partial, ignore_errors=True)
        return False
    drop(final)
    publish(partial, final)
    if is_whole(final):
        return True
    drop(final)
    return False


def bring_checkpoints(folder: Path, labels: Iterable[str]) -> None:
    """Bring the newest checkpoints of trials here, if the sweep lies in a store.

    Args:
        folder: the sweep's.
        labels: the trials'.

    Raises:
        StoreError: the store cannot be reached.
        OSError: the disk refused.
    """
    if (uri := store_uri(folder.parent)) is None:
        return
    store = _opened(uri, copy_of(uri))
    for label in labels:
        trial = trial_objects(folder.name, label)
        _bring_newest(store, trial, _attempts(store, trial), folder / "trials" / label)


def drop_checkpoints(store: Store, sweep: str, label: str) -> None:
    """Remove a trial's checkpoints from the store.

    Raises:
        StoreError: the store cannot be reached.
    """
    for attempt in _attempts(store, trial_objects(sweep, label)).values():
        attempt.drop_checkpoints(store)


def store_uri(runs: Path) -> str | None:
    """Of which store a folder of runs is the copy; None if it is none."""
    with contextlib.suppress(FileNotFoundError):
        return str(json.loads((runs / STORE_FILE).read_text())["uri"])
    return None
