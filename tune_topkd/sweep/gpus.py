"""What the GPUs of a cluster's nodes are doing, in a file of the sweep's folder for as long as trials run there.

The driver's display and `status --watch` read it, which may be on another machine. No result depends on it, and it is old
in seconds, so it is not in the ledger, and nobody waits until it is on the disk.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tune_topkd.machine import Gpu
from tune_topkd.machine import NodeGpus
from tune_topkd.storage import write_text
from tune_topkd.sweep.workspace import DRIVER_FILE
from tune_topkd.sweep.workspace import GPUS_FILE

LONGEST_SHOWN = 60.0
"""Seconds after which nobody is told any more what a node has said."""

_NODES = "nodes"
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def gpus_file(folder: Path, *, is_cluster: bool) -> Iterator[Callable[[Sequence[NodeGpus]], None]]:
    """The file, for as long as this lasts; gives what writes it.

    Args:
        folder: the sweep's.
        is_cluster: whether trials run on a cluster; there is no file otherwise.
    """
    path = folder / GPUS_FILE
    is_warned = False

    def write(nodes: Sequence[NodeGpus]) -> None:
        nonlocal is_warned
        try:
            content = json.dumps({_NODES: [dataclasses.asdict(node) for node in nodes]})
            write_text(path, content, is_durable=False)
        except OSError as error:
            if not is_warned:
                _log.warning("what the nodes' GPUs are doing is not shown: %s: %s", path, error.strerror or error)
            is_warned = True

    _remove(path)  # of a driver that was killed
    if is_cluster:
        write([])
    try:
        yield write
    finally:
        _remove(path)


def node_gpus(folder: Path, now: float) -> list[NodeGpus] | None:
    """What the nodes on which a sweep's trials are at work have lately said.

    Args:
        folder: the sweep's; of runs in a store this machine's copy.
        now: in Unix seconds.

    Returns:
        Those that have said it in the last minute; None if no trials are known to run on a cluster.
    """
    for name in (GPUS_FILE, DRIVER_FILE):
        if _NODES in (content := _read(folder / name)):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # else it is of another version
                nodes = [_node(said) for said in content[_NODES]]
                return [node for node in nodes if now - node.at < LONGEST_SHOWN]
    return None


def gpus_content(folder: Path) -> dict[str, Any]:
    """What is in the file, for whoever hands it on; empty if there is none."""
    return _read(folder / GPUS_FILE)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):  # it is not there, or nobody of ours has written it
        return {}
    return content if isinstance(content, dict) else {}


def _node(said: Mapping[str, Any]) -> NodeGpus:
    return NodeGpus(str(said["name"]), float(said["at"]), tuple(Gpu(**gpu) for gpu in said["gpus"]))


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s is left there: %s", path, error.strerror or error)
