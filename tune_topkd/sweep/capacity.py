"""What a cluster has for a sweep before it is begun: which nodes lack something, how many trials fit, how long it takes.

The nodes themselves are asked, each by a task: for what a trial needs there, and then for the time of a step.
"""

import contextlib
import functools
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from tune_topkd import machine
from tune_topkd.config import AUTO
from tune_topkd.config import ConfigError
from tune_topkd.config import SweepConfig
from tune_topkd.ledger import Share
from tune_topkd.storage import StoreError
from tune_topkd.storage import StoreNameError
from tune_topkd.storage import check_store
from tune_topkd.storage import open_store
from tune_topkd.sweep import cost
from tune_topkd.sweep import preflight
from tune_topkd.sweep.identity import STUDENT
from tune_topkd.sweep.identity import TEACHER
from tune_topkd.sweep.preflight import Checked
from tune_topkd.sweep.versions import versions
from tune_topkd.sweep.wording import counted
from tune_topkd.sweep.wording import duration
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.sweep.workspace import with_share

if TYPE_CHECKING:
    from tune_topkd.execution.survey import Node

LONGEST_MEASUREMENT = 60.0
"""Seconds that a node has for the time of a step; one whose places are all taken has none to give."""

Progress = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Seen:
    """What a node says of itself."""

    memory: int
    """Bytes that a process there may take."""
    gpus: tuple[str, ...] = ()
    """The names of its NVIDIA GPUs."""
    versions: Mapping[str, str] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    """What a trial needs and does not find there."""


@dataclass(frozen=True)
class Surveyed:
    """A node, and what it has said."""

    node: "Node"
    seen: Seen | None = None
    """None if it has not answered."""
    trouble: str = ""
    """Why trials could not run there; empty if nothing is known against it."""

    @property
    def title(self) -> str:
        """What it is called, where it is and what it has."""
        node, seen = self.node, self.seen
        name = node.name if node.name == node.address else f"{node.name} ({node.address})"
        what = [counted(node.has.cpus, "CPU"), counted(node.has.gpus, "GPU")]
        if seen is not None and seen.gpus and node.has.gpus:
            what[1] += f" ({', '.join(dict.fromkeys(seen.gpus))})"
        if seen is not None:
            what.append(f"{seen.memory / 1e9:.0f} GB")
        return f"node {name}{', the head' if node.is_head else ''}: {', '.join(what) if node.is_alive else 'is gone'}"

    @property
    def other_versions(self) -> str:
        """The packages that results depend on of which it has other versions than this machine; empty if there are none."""
        here, there = versions(), {} if self.seen is None else self.seen.versions
        differing = [p for p, version in there.items() if here.get(p, version) != version]
        return ", ".join(f"{package} {there[package]} there, {here[package]} here" for package in differing)


@dataclass(frozen=True)
class Capacity:
    """What a cluster has for one search space."""

    lines: tuple[str, ...]
    error: str = ""
    """Why no trial could run there; empty if some can."""


@dataclass(frozen=True)
class Fit:
    """How many trials a node has room for at once; where their share is `auto`, from the largest share to the smallest."""

    least: int
    most: int
    why_none: str = ""

    @classmethod
    def of(cls, has: Share, shares: Sequence[Share]) -> "Fit":
        """How many trials of these shares a node with so much has room for.

        Args:
            has: what the node has.
            shares: of a trial, the largest first; one, but where it is measured.
        """
        numbers = [share.times_on(has) for share in shares]
        return cls(min(numbers), max(numbers), "" if max(numbers) else _why_none(has, shares[-1]))


def _why_none(has: Share, share: Share) -> str:
    """Why not one trial has room on a node."""
    is_gpu = share.gpus > has.gpus
    what, key = ("GPU", "gpus_per_trial") if is_gpu else ("CPU", "cpus_per_trial")
    there, asked = (has.gpus, share.gpus) if is_gpu else (has.cpus, share.cpus)
    return f"it has {counted(there, what) if there else f'no {what}'}, a trial takes {asked:g} (sweep.{key})"


def survey(workspace: Workspace, checked: Checked | None = None) -> list[Surveyed]:
    """Ask all nodes of the cluster that this process is attached to what they have, and what trials would lack there.

    Args:
        workspace: where the sweep would lie; a folder is looked for on each node by a file that is put there meanwhile.
        checked: the search space whose code, data and files are looked for; without it only those of this package.

    Raises:
        ConfigError: no file can be put there.
    """
    from tune_topkd.execution import nodes
    from tune_topkd.execution.survey import ask
    from tune_topkd.execution.survey import known_nodes

    known = known_nodes()
    alive = [node.id for node in known if node.is_alive]
    uri = None if workspace.remote is None else workspace.remote.uri
    with contextlib.nullcontext() if uri is not None else _mark(workspace.runs) as mark:
        needs_files = checked is not None and _needs_files(checked.config)
        call = functools.partial(look, checked, mark, uri, needs_files=needs_files)
        given = nodes.LONGEST_START_OF_A_WORKER if checked is None else nodes.longest_start(checked.config)
        answers = ask(dict.fromkeys(alive, call), given)
    found = []
    for node in known:
        seen, trouble = answers.found.get(node.id), answers.troubles.get(node.id)
        why = "; ".join(seen.lacks) if seen is not None else "is gone" if trouble is None else trouble.text
        found.append(Surveyed(node, seen, why))
    return found


def look(checked: Checked | None, mark: Path | None, uri: str | None, *, needs_files: bool) -> Seen:
    """What this machine has, and what trials would lack on it: called on a node.

    Args:
        checked: the search space, whose problems are none where it was checked.
        mark: a file in the folder of runs, which all nodes must see.
        uri: of the runs, if they lie in a store.
        needs_files: each node reads the dataset's own files.
    """
    return Seen(
        memory=machine.memory(),
        gpus=tuple(gpu.name for gpu in machine.gpus()),
        versions=versions(),
        lacks=tuple(_lacking(checked, mark, uri, needs_files=needs_files)),
    )


def _lacking(checked: Checked | None, mark: Path | None, uri: str | None, *, needs_files: bool) -> Iterator[str]:
    from tune_topkd.execution.worker import place_trouble

    try:
        from tune_topkd.train import train  # noqa: F401 (what a trial runs)
    except (ImportError, OSError, RuntimeError) as error:
        yield f"the train function cannot be imported: {type(error).__name__}: {error}"
        return
    if mark is not None and (trouble := place_trouble(mark)):
        yield trouble
    if uri is not None:
        try:
            check_store(open_store(uri))
        except (StoreError, StoreNameError) as error:
            yield str(error)
    if checked is None:
        return
    brought = (TEACHER, STUDENT) if uri is not None else ()  # from the store, when the sweep begins
    try:
        preflight.check_again(checked.config, checked.source, None)
    except ConfigError as error:
        yield from (str(problem) for problem in error.problems if problem.key not in brought)
    else:
        from tune_topkd.data import missing_data

        if needs_files and (missing := missing_data(checked.config.data)):
            yield f"the data is not there: {missing}"


@contextlib.contextmanager
def _mark(runs: Path) -> Iterator[Path]:
    """A file in a folder of runs while this lasts, or, if that is not there yet, in the one that it will be made in.

    Raises:
        ConfigError: it cannot be written.
    """
    folder = next(place for place in (runs, *runs.parents) if place.is_dir())
    preflight.check_writable(folder)
    mark = folder / f".probe-{uuid.uuid4().hex}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _needs_files(config: SweepConfig) -> bool:
    """Whether trials read the dataset's files, where they are: images that are in memory come with the sweep's folder."""
    from tune_topkd.data import is_in_memory
    from tune_topkd.data import load_dataset
    from tune_topkd.data import missing_data

    return not missing_data(config.data) and not is_in_memory(load_dataset(config.data))


def capacities(workspace: Workspace, spaces: Sequence[Checked], progress: Progress) -> list[Capacity]:
    """What the workspace's cluster has for each search space; nothing is begun there but tasks of seconds.

    Args:
        workspace: names the cluster, and where the sweeps would lie.
        spaces: that have been checked here.
        progress: told what is being done; held until it is.

    Raises:
        ConfigError: the runs folder cannot be written to.
        ResourceError: nothing answers at the address, or it asks for another token.
    """
    from tune_topkd.execution import Cluster

    found = []
    with contextlib.ExitStack() as stack:
        with progress("attaching to the cluster"):
            stack.enter_context(Cluster.attached(workspace.address))
        for checked in spaces:
            with progress("asking the cluster's nodes"):
                nodes = survey(workspace, checked)
            found.append(_capacity(checked.config, nodes, progress))
    return found


def _capacity(config: SweepConfig, nodes: Sequence[Surveyed], progress: Progress) -> Capacity:
    from tune_topkd.execution import ResourceError

    alive = [surveyed for surveyed in nodes if surveyed.node.is_alive]
    fits: dict[str, Fit] = {}
    try:
        shares = shares_of(config, [surveyed.node.has for surveyed in alive])
        fits = {surveyed.node.id: Fit.of(surveyed.node.has, shares) for surveyed in alive}
        _rooms(config, shares, alive)
    except ResourceError as error:
        of_nodes = [line_of(surveyed, fits.get(surveyed.node.id)) for surveyed in nodes]
        if config.sweep.autoscale_to and not _is_auto(config):  # which is measured on a node that is there
            return Capacity((*of_nodes, f"no node has room for a trial yet{_asked_for(config)}"))
        return Capacity(tuple(of_nodes), str(error))
    with progress("timing a step on the nodes that have room"):
        timed = _timed(config, nodes, shares)
    images = cost.image_counts(config)
    lines = [line_of(one.surveyed, fits.get(one.surveyed.node.id)) + _step_told(config, images, one) for one in timed]
    usable = [one for one in timed if one.share is not None and not one.surveyed.trouble]
    if not usable:
        reasons = [f"node {t.surveyed.node.name}: {t.surveyed.trouble}" for t in timed if t.share is not None]
        return Capacity(tuple(lines), f"no node that has room for a trial can run one: {'; '.join(reasons)}")
    lines.append(_summary(config, _rooms(config, shares, [one.surveyed for one in usable]), len(usable)))
    if images is not None and any(one.step is not None for one in usable):
        lines.append(_time(config, images, usable))
    return Capacity(tuple(lines))


def shares_of(config: SweepConfig, nodes: Sequence[Share]) -> list[Share]:
    """What a trial may be given of a node, the largest first: one share, but where the sweep says `auto`.

    Args:
        config: the sweep's.
        nodes: what each node of the cluster has.

    Raises:
        ResourceError: `auto` on a cluster without what it is to be measured on.
    """
    from tune_topkd.execution.cluster import share_of
    from tune_topkd.execution.packing import shares

    return shares(config.sweep, nodes) if _is_auto(config) else [share_of(config)]


def _is_auto(config: SweepConfig) -> bool:
    return AUTO in (config.sweep.cpus_per_trial, config.sweep.gpus_per_trial)


def _rooms(config: SweepConfig, shares: Sequence[Share], nodes: Sequence[Surveyed]) -> list[int]:
    """How many trials the nodes have room for at once, for each share that any has room for.

    Raises:
        ResourceError: for none.
    """
    from tune_topkd.execution import Cluster

    cluster = Cluster(tuple(surveyed.node.has for surveyed in nodes))
    with_room = [share for share in shares if cluster.room_for(share)] or shares[-1:]
    return [cluster.room(with_share(config, share)) for share in with_room]


def line_of(surveyed: Surveyed, fit: Fit | None = None) -> str:
    """What a person is told of a node: what it has, what is wrong with it, and how many trials it has room for.

    Args:
        surveyed: the node.
        fit: where trials are to run there.
    """
    trouble = [surveyed.trouble] if surveyed.node.is_alive and surveyed.trouble else []
    if fit is None:
        parts = trouble
    elif trouble or not fit.most:
        parts = [f"no trial: {'; '.join([fit.why_none] * (not fit.most) + trouble)}"]
    else:
        number = f"{fit.least} to {fit.most}" if fit.least < fit.most else f"{fit.most}"
        parts = [f"{number} trial{'s' * (fit.most > 1)} at once"]
    parts += filter(None, [surveyed.other_versions])
    return f"{surveyed.title}: {'; '.join(parts)}" if parts else surveyed.title


@dataclass(frozen=True)
class _Timed:
    """A node with what a batch takes there."""

    surveyed: Surveyed
    share: Share | None = None
    """What a trial is given of it; None if it has no room for one."""
    step: cost.Step | None = None
    why_none: str = ""
    """Why there is no step of a node that trials can go to."""


def _timed(config: SweepConfig, nodes: Sequence[Surveyed], shares: Sequence[Share]) -> list[_Timed]:
    """Time a step on each node that has room for a trial and lacks nothing, all at once.

    A node that refuses a step lacks something that a trial would fail of too.
    """
    from tune_topkd.execution.survey import ask

    given = {
        surveyed.node.id: share
        for surveyed in nodes
        if surveyed.node.is_alive
        and (share := next((share for share in shares if share.times_on(surveyed.node.has)), None)) is not None
    }
    asked = {
        surveyed.node.id: given[surveyed.node.id]
        for surveyed in nodes
        if surveyed.node.id in given and not surveyed.trouble
    }
    calls = {node: functools.partial(cost.step_here, config, share) for node, share in asked.items()}
    answers = ask(calls, LONGEST_MEASUREMENT, asked)
    found = []
    for surveyed in nodes:
        node, late = surveyed.node.id, ""
        if (trouble := answers.troubles.get(node)) is not None:
            if trouble.is_late:
                late = trouble.text
            else:
                surveyed = replace(surveyed, trouble=f"a step cannot be taken: {trouble.text}")
        found.append(_Timed(surveyed, given.get(node), answers.found.get(node), late))
    return found


def _step_told(config: SweepConfig, images: tuple[int, int] | None, timed: _Timed) -> str:
    """What follows in a node's line: how long an epoch takes there."""
    if timed.why_none:
        return f"; a step was not timed: {timed.why_none}"
    if timed.step is None:
        return ""
    if images is None:
        return f"; about {timed.step.student:.2g} s per step of {config.recipe.batch_size} images"
    return f"; about {cost.epoch_seconds(config, images, timed.step):.2g} s per epoch"


def _summary(config: SweepConfig, rooms: Sequence[int], nodes: int) -> str:
    """How many trials run at once on so many nodes."""
    number = f"{min(rooms)} to {max(rooms)}" if min(rooms) < max(rooms) else f"{max(rooms)}"
    why = ", how many is measured as the sweep begins (auto)" if _is_auto(config) else ""
    why += f", sweep.max_concurrent = {config.sweep.max_concurrent}" if config.sweep.max_concurrent else ""
    more = _asked_for(config) if (config.sweep.autoscale_to or 0) > max(rooms) else ""
    return f"{number} trial{'s' * (max(rooms) > 1)} at once, on {counted(nodes, 'node')}{why}{more}"


def _asked_for(config: SweepConfig) -> str:
    """What follows where a sweep asks an autoscaler for nodes."""
    asked = config.sweep.autoscale_to or 0
    return f"; the autoscaler is asked for room for {counted(asked, 'trial')} (sweep.autoscale_to)"


def _time(config: SweepConfig, images: tuple[int, int], usable: Sequence[_Timed]) -> str:
    """About how long the sweep takes on nodes that are its alone; one whose step was not timed counts as the slowest."""
    known = [one.step for one in usable if one.step is not None]
    slowest = max(known, key=lambda step: cost.epoch_seconds(config, images, step))
    places = [
        one.step or slowest
        for one in usable
        if one.share is not None
        for _ in range(one.share.times_on(one.surveyed.node.has))
    ]
    seconds = cost.sweep_seconds(config, images, places[: config.sweep.max_concurrent])
    most = "at most " if _is_auto(config) else ""
    return f"{most}about {duration(seconds)}, by a step timed alone on each node: {cost.COUNTED}"
