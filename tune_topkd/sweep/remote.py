"""Runs that lie in a store: what is put there, and how this machine's copy of them comes about.

    .sweeps/<sweep>                 that there is such a sweep
    <sweep>/ledger/0000-0000000012.jsonl   the lines of one append, by the number of the first (`ledger.mirror`)
    <sweep>/config/<digest>.yaml    the frozen config, as it began and as it was prepared
    <sweep>/tuned.yaml              the answer
    <sweep>/driver.json             which process drives it, and what its nodes' GPUs are doing, put anew every few seconds
    <sweep>/trials/…, files/…       checkpoints, and files that trials share (`execution.remote`)
    teachers/<key>/…                trained teachers
    teachers/<key>/bank-<hash>.f16  a bank of logits that was filled ahead of a sweep, and what is in it: bank-<hash>.json

The copy has the layout of a folder of runs, so all that reads a sweep reads the copy, after `pull`.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_topkd.export import TUNED_FILE
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Mirror
from tune_topkd.ledger import is_driven
from tune_topkd.ledger import read_state
from tune_topkd.storage import NoObjectError
from tune_topkd.storage import Store
from tune_topkd.storage import StoreError
from tune_topkd.storage import check_store
from tune_topkd.storage import copy_of
from tune_topkd.storage import open_store
from tune_topkd.storage import write_text
from tune_topkd.sweep.gpus import gpus_content
from tune_topkd.sweep.workspace import CONFIG_FILE
from tune_topkd.sweep.workspace import DRIVER_FILE
from tune_topkd.sweep.workspace import TEACHERS

_PATIENCE_WITH_READERS = 5.0  # of this machine, which hold the copy while they bring it to where the store is
_SECONDS_BETWEEN_SIGNS = 10.0
_LONGEST_WAIT_FOR_THE_LAST = 5.0
_RECORD = "teacher.json"  # comes last: without it the weights do not count
_BANK = "bank-"
"""How the names of the files of banks begin, which do not come and go with their teacher."""
_BYTES = "bytes"


@dataclass(frozen=True)
class Remote:
    """Runs in a store, with this machine's copy."""

    uri: str
    store: Store
    runs: Path
    """The copy."""

    @classmethod
    def at(cls, uri: str) -> "Remote":
        """The runs of a URI; the copy's folder is made.

        Raises:
            StoreNameError: it names no store.
            OSError: the copy cannot be made.
        """
        from tune_topkd.execution.remote import STORE_FILE

        uri = uri.rstrip("/")
        store, runs = open_store(uri), copy_of(uri)
        runs.mkdir(parents=True, exist_ok=True)
        if not (runs / STORE_FILE).exists():
            write_text(runs / STORE_FILE, json.dumps({"uri": uri}))
        return cls(uri, store, runs)

    def check(self) -> None:
        """Try that the store can be written to, and keeps two drivers of a sweep apart.

        Raises:
            StoreError: it cannot, or does not.
        """
        check_store(self.store)

    def sweeps(self) -> list[str]:
        """The names of the sweeps that have begun, each pulled.

        Raises:
            as `pull`.
        """
        return [name for name in Mirror.sweeps(self.store) if self.pull(name)]

    def pull(self, sweep: str) -> bool:
        """Bring this machine's copy of a sweep to where the store is, but for checkpoints.

        Nothing is changed while a process of this machine drives the sweep: the copy is then the newest there is.

        Returns:
            Whether the sweep has begun.

        Raises:
            LedgerError: only the copy has the sweep.
            StoreError: the store cannot be read.
            OSError: the disk refused.
        """
        folder = self.runs / sweep
        path = folder / LEDGER_FILE
        if not Mirror(self.store, sweep).pull(path):
            return False
        if not is_driven(path):
            with contextlib.suppress(LedgerError):  # it is damaged: whoever reads it is told
                state = read_state(path)
                digest = (state.prepared and state.prepared.digest) or state.header.digest
                for name, there in ((CONFIG_FILE, _config(sweep, digest)), (TUNED_FILE, f"{sweep}/{TUNED_FILE}")):
                    with contextlib.suppress(NoObjectError):
                        self.store.get_file(there, folder / name)
            try:
                self.store.get_file(f"{sweep}/{DRIVER_FILE}", folder / DRIVER_FILE)
            except NoObjectError:
                (folder / DRIVER_FILE).unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def sign_of_life(self, sweep: str) -> Iterator[None]:
        """Say in the store, as long as this lasts, that this process drives the sweep, and what its nodes' GPUs are doing.

        Nothing is decided by it but what a person is told: two drivers are kept apart by the ledger.
        """
        name, over, is_there = f"{sweep}/{DRIVER_FILE}", threading.Event(), True

        def beat() -> None:
            while True:
                content = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
                content |= gpus_content(self.runs / sweep)
                with contextlib.suppress(StoreError):  # the ledger's next line tells of it
                    self.store.put(name, json.dumps(content).encode())
                if over.wait(_SECONDS_BETWEEN_SIGNS):
                    return

        thread = threading.Thread(target=beat, name="sign of life", daemon=True)
        thread.start()
        try:
            yield
        except StoreError:
            is_there = False
            raise
        finally:
            over.set()
            thread.join(_LONGEST_WAIT_FOR_THE_LAST)
            if is_there:
                with contextlib.suppress(StoreError):
                    self.store.delete(name)

    def mirror(self, sweep: str) -> Mirror:
        """The ledger of a sweep in the store, pulled, for the process that is to drive it.

        Raises:
            as `pull`.
        """
        mirror, give_up = Mirror(self.store, sweep), time.monotonic() + _PATIENCE_WITH_READERS
        while True:
            mirror.pull(self.runs / sweep / LEDGER_FILE)
            if mirror.is_pulled or time.monotonic() > give_up:
                return mirror  # not pulled: a process of this machine drives it, and opening the ledger says so
            time.sleep(0.1)

    def put_config(self, sweep: str, digest: str, text: str) -> None:
        """Keep a frozen config, by its digest: nobody else's of this name is touched.

        Raises:
            StoreError: the store refuses.
        """
        self.store.put(_config(sweep, digest), text.encode())

    def put_answer(self, sweep: str, text: str) -> None:
        """Keep the tuned config.

        Raises:
            StoreError: the store refuses.
        """
        self.store.put(f"{sweep}/{TUNED_FILE}", text.encode())

    def bring_teacher(self, key: str) -> None:
        """Bring a teacher that the store has and this machine has not, but for the banks of its logits.

        Raises:
            StoreError: the store cannot be read.
            OSError: the disk refused.
        """
        folder = self.runs / TEACHERS / key
        for name in self.store.list(f"{TEACHERS}/{key}/"):
            path = folder / Path(name).name
            if not path.exists() and not path.name.startswith(_BANK):
                folder.mkdir(parents=True, exist_ok=True)
                self.store.get_file(name, path)

    def put_teacher(self, key: str, *, is_new: bool) -> None:
        """Keep a teacher's files, but for the banks of its logits.

        Args:
            key: the teacher's.
            is_new: it has just been trained: what the store has under this key is replaced.

        Raises:
            StoreError: the store refuses.
        """
        folder = self.runs / TEACHERS / key
        there = set(self.store.list(f"{TEACHERS}/{key}/"))
        files = [p for p in folder.glob("*") if p.is_file() and not p.name.startswith((".", _BANK))]
        for path in sorted(files, key=lambda p: (p.name == _RECORD, p.name)):
            name = f"{TEACHERS}/{key}/{path.name}"
            if is_new or name not in there:
                self.store.put(name, path)

    def put_bank(self, path: Path) -> bool:
        """Keep a bank that is filled, if the store has none of this name and size: two of them are the same.

        Args:
            path: the bank's file, in the folder of its teacher, with its description beside it.

        Returns:
            Whether it was put.

        Raises:
            StoreError: the store refuses.
            OSError: it cannot be read.
        """
        folder, described = f"{TEACHERS}/{path.parent.name}", path.with_suffix(".json")
        content = json.loads(described.read_bytes()) | {_BYTES: path.stat().st_size}
        if self._described(f"{folder}/{described.name}").get(_BYTES) == content[_BYTES]:
            return False
        self.store.put(f"{folder}/{path.name}", path)
        self.store.put(f"{folder}/{described.name}", json.dumps(content).encode())  # from now on it counts
        return True

    def bring_bank(self, path: Path) -> None:
        """Bring a bank that the store has and this machine has not.

        Raises:
            StoreError: the store cannot be read.
            OSError: the disk refused.
        """
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(NoObjectError):
                self.store.get_file(f"{TEACHERS}/{path.parent.name}/{path.name}", path)

    def banks(self) -> "Iterator[RemoteBank]":
        """The banks that the store has, of all teachers.

        Raises:
            StoreError: the store cannot be read.
        """
        for name in self.store.list(f"{TEACHERS}/"):
            if name.endswith(".json") and Path(name).name.startswith(_BANK):
                content = self._described(name)
                yield RemoteBank(name.removesuffix(".json") + ".f16", int(content.get(_BYTES, 0)), content)

    def remove_bank(self, bank: "RemoteBank") -> None:
        """Remove a bank; it stops counting first.

        Raises:
            StoreError: the store refuses.
        """
        self.store.delete(bank.name.removesuffix(".f16") + ".json")
        self.store.delete(bank.name)

    def _described(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads(self.store.get(name))
        except (NoObjectError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class RemoteBank:
    """A bank that lies in a store."""

    name: str
    """The object's."""
    bytes: int
    content: Mapping[str, Any]
    """What its logits depend on."""


def _config(sweep: str, digest: str) -> str:
    return f"{sweep}/config/{digest}.yaml"
