"""A trial's checkpoints: folders in the trial's own, whole or not there.

`epoch-0003/` has what `save` wrote and `report.json` (that epoch's metrics and the files' SHA-256). It appears under its
name only when it is whole and on the disk, and loses that name before anything in it is removed. The two newest are kept.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialStatus
from tune_topkd.storage import disk_trouble
from tune_topkd.storage import file_hash
from tune_topkd.storage import publish
from tune_topkd.storage import rename

GENERATIONS = 2

REPORT_FILE = "report.json"
"""Says which epoch a checkpoint is of, and what its files are."""
_CHECKPOINT = re.compile(r"epoch-([0-9]+)")


class StorageError(OSError):
    """The trial's folder cannot be written: the disk's trouble, not the trial's."""


def write_checkpoint(folder: Path, epoch: int, metrics: Mapping[str, float], save: Callable[[Path], None]) -> Path:
    """Write the checkpoint of one epoch, whole or not at all, and drop the ones before the last two.

    Returns:
        The checkpoint.

    Raises:
        StorageError: the disk is full, read-only or gone.
        Exception: what `save` raises by itself.
    """
    partial = folder / f".epoch-{epoch:04d}.partial"
    final = folder / f"epoch-{epoch:04d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save(partial)
        files = {p.name: file_hash(p) for p in sorted(partial.iterdir())}
        report = {"epoch": epoch, "metrics": jsonable(metrics), "files": files}
        (partial / REPORT_FILE).write_text(json.dumps(report))
        drop(final)
        publish(partial, final)
    except Exception as error:
        trouble = disk_trouble(error, folder)  # before room is made again
        shutil.rmtree(partial, ignore_errors=True)
        if trouble:
            raise StorageError(trouble) from error
        raise
    for old in checkpoints(folder)[GENERATIONS:]:
        drop(old)
    return final


def drop(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there: a kill in between leaves it whole or without its name."""
    nameless = checkpoint.with_name(f".{checkpoint.name}.dropped")
    _remove(nameless)
    with contextlib.suppress(FileNotFoundError):
        rename(checkpoint, nameless)
    _remove(nameless)


def _remove(path: Path) -> None:
    """Remove a folder, or a file that somebody has put in its place, as far as that goes."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def clear_up(folder: Path, newest: Path | None) -> None:
    """Remove what a killed worker has left beside the checkpoints that are kept; `newest` is the newest whole one."""
    for left in folder.glob(".epoch-*"):
        _remove(left)
    if newest is not None:
        found = checkpoints(folder)
        for old in found[max(GENERATIONS, found.index(newest) + 1) :]:
            drop(old)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written, if any."""
    return next((path for path in checkpoints(folder) if is_whole(path)), None)


def checkpoints(folder: Path) -> list[Path]:
    """A trial's checkpoints, the newest first, whole or not; what only looks like one (`epoch-0003.bak`) is not ours."""
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in folder.glob("epoch-*") if path.is_dir()}
    epochs = {path: int(name[1]) for path, name in found.items() if name}
    return sorted(epochs, key=lambda path: (epochs[path], path.name), reverse=True)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is as it was written."""
    try:
        epoch, _ = read_report(path)
        files = json.loads((path / REPORT_FILE).read_bytes())["files"]
        is_its = epoch == int(path.name.partition("-")[2])
        return is_its and all(file_hash(path / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged report may be of any shape
        return False


def read_report(path: Path) -> tuple[int, dict[str, Any]]:
    """The epoch of a checkpoint and its metrics."""
    report = json.loads((path / REPORT_FILE).read_bytes())
    return report["epoch"], dict(report["metrics"])


def jsonable(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Metrics as plain numbers."""
    return {name: float(value) for name, value in metrics.items()}


def checkpoint_findings(state: SweepState, folder: Path) -> Iterator[str]:
    """What is wrong with the checkpoints of a sweep's trials, a line each.

    Args:
        state: what the sweep's ledger tells.
        folder: the sweep's.
    """
    for record in state.trials.values():
        if record.status in (TrialStatus.PRUNED, TrialStatus.FAILED):
            continue
        found = checkpoints(folder / "trials" / str(record.key))
        damaged = [path for path in found if not is_whole(path)]
        for path in damaged:
            yield f"{path}: is not as it was written"
        if record.epoch and len(damaged) == len(found):
            what = "its weights are lost" if record.status.is_end else "it would begin again"
            yield f"trial {record.key} has no checkpoint that can be read after epoch {record.epoch}: {what}"
