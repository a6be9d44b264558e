"""`status --watch`: a sweep that another process drives, as its own display shows it, until it ends."""

import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tune_topkd import terminal
from tune_topkd.cli.picture import Picture
from tune_topkd.cli.standing import entry_of
from tune_topkd.cli.standing import line_of
from tune_topkd.config import ConfigError
from tune_topkd.config import Problem
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.machine import Gpu
from tune_topkd.machine import NodeGpus
from tune_topkd.machine import gpus
from tune_topkd.sweep import Workspace
from tune_topkd.sweep.api import Status
from tune_topkd.sweep.api import status_of
from tune_topkd.sweep.gpus import node_gpus
from tune_topkd.sweep.workspace import frozen_config
from tune_topkd.sweep.workspace import is_under_way
from tune_topkd.sweep.workspace import stopped_as
from tune_topkd.terminal import Console


def watch(name: str, workspace: Workspace, every: float, console: Console) -> None:
    """Show a sweep until nobody drives it any more; then how it ended, in a line of stdout.

    On a terminal the picture is drawn anew; elsewhere stdout gets a line when trials have ended or begun, or the best has
    changed.

    Args:
        name: the sweep's.
        workspace: where it lies.
        every: seconds between two looks.
        console: where the picture goes.

    Raises:
        ConfigError: there is no such sweep, or its config has been changed by hand.
        LedgerError: its ledger is damaged.
    """
    folder = workspace.existing(name)
    ledger = folder / LEDGER_FILE
    picture, offset, before = Picture(frozen_config(folder, read_state(ledger))), 0, None
    is_live = console.is_live and sys.stdout.isatty()
    try:
        while True:
            workspace.existing(name)  # runs in a store are copied anew
            is_driven = is_under_way(folder)  # asked first: what it has written until it let go is then read
            events, offset = read_events(ledger, offset)
            for event in events:
                picture.take(event)
            state = picture.state
            if not is_driven or state.stop_reason:
                break
            if is_live:
                now = time.time()
                console.show(picture.frame(console.height, now, _gpus_of(folder, state, now)))
            elif (found := status_of(name, folder, state)) and _told(found) != before:
                before = _told(found)
                terminal.result(f"{line_of(entry_of(found))}\n")
            time.sleep(every)
    finally:
        console.show(None)
        console.terminal.flush()  # stdout may be the same screen: what is written there must not be taken for the picture
    entry = entry_of(status_of(name, folder, picture.state))
    if picture.state.stop_reason:  # its driver may hold the ledger for a moment still
        entry["state"] = stopped_as(picture.state)
    terminal.result(f"{line_of(entry)}\n")


def running(workspace: Workspace) -> str:
    """The one sweep of a runs folder that is under way.

    Raises:
        ConfigError: there is none, or there are several.
    """
    found = [name for name in workspace.sweeps() if is_under_way(workspace.folder(name))]
    if len(found) != 1:
        none = Problem(key="", rule=f"no sweep in {workspace.place} is under way")
        several = Problem(key="SWEEP", rule=f"must be one of those under way: {', '.join(found)}")
        raise ConfigError("--watch", [several if found else none])
    return found[0]


def _gpus_of(folder: Path, state: SweepState, now: float) -> Sequence[Gpu | NodeGpus]:
    """What the GPUs are doing: those of its nodes as the driver was last told, or this machine's, if it runs here."""
    if (nodes := node_gpus(folder, now)) is not None:
        return nodes
    is_here = state.last_driver is not None and state.last_driver.host == socket.gethostname()
    return gpus() if is_here else ()


def _told(found: Status) -> tuple[object, ...]:
    """What is worth a new line when it changes."""
    winner = None if found.winner is None else (found.winner.record.key, found.winner.value)
    verdict = None if found.verdict is None else found.verdict.trainings
    return found.condition, tuple(found.trials.items()), winner, found.finalists, verdict
