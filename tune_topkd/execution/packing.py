"""How many trials to put on a GPU, or on a node's CPUs: measured, by running so many beside one another.

What is best depends on the networks, the batch and the machine: a small student leaves a large GPU idle alone, and too many
share its time and memory. So `auto` tries 1, 2, 4 and 8, on the node with the most, and takes what trains the most images
per second over all of them.
"""

import logging
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_topkd.config import SweepConfig
from tune_topkd.config import SweepSettings
from tune_topkd.config import TrialConfig
from tune_topkd.execution.cluster import ResourceError
from tune_topkd.execution.cluster import in_one_line
from tune_topkd.execution.cluster import resources
from tune_topkd.execution.cluster import trial_part
from tune_topkd.execution.nodes import longest_start
from tune_topkd.ledger import Share

NUMBERS = (1, 2, 4, 8)
"""Of trials on one GPU that are tried; on CPUs it goes on as long as each has one."""
SECONDS = 5.0
"""That each number is run for, after a start and a few steps."""
WORTH_IT = 1.03
"""More trials at once must bring so much more, or ASHA decides on less for nothing."""
MEMORY_USED = 0.9
"""Of all there is, at most: what is measured in seconds may grow in hours."""
NO_NODE = Share(0.0, 0.0)

_log = logging.getLogger(__name__)


class Speed(Protocol):
    """What a probe gives."""

    @property
    def images_per_second(self) -> float:
        """Of one training."""

    @property
    def peak_bytes(self) -> int:
        """The most memory one training took."""

    @property
    def total_bytes(self) -> int:
        """What the GPU, or the machine, has of it."""


class Probe(Protocol):
    """Starts a training for its speed alone; what it gives runs it for so many seconds."""

    def __call__(self, config: TrialConfig, /) -> Callable[[float], Speed]:
        """Build all of it and take the first steps."""


@dataclass(frozen=True)
class Packed:
    """One share that was tried."""

    share: Share
    at_once: int
    """Trials that have it, on one node."""
    images_per_second: float
    """Of all of them together."""
    memory: float
    """What they took of the node's, or their GPU's, memory: a share of it, were all at their most at once."""


def pack(config: SweepConfig, trial: TrialConfig, probe: Probe) -> list[Packed]:
    """Try numbers of trials beside one another, on a running Ray; the best one comes first.

    Args:
        config: the sweep's; `cpus_per_trial`, `gpus_per_trial` or both are `auto`.
        trial: a training like those of the sweep.
        probe: runs it for its speed.

    Raises:
        ResourceError: no node has a GPU, or not even one trial can be run.
    """
    nodes = {node["NodeID"]: resources(node) for node in ray.nodes() if node["Alive"]}
    node = _largest(config.sweep, list(nodes.values()))
    node_id = next(node_id for node_id, its in nodes.items() if its == node)
    tried: list[Packed] = []
    for share in shares(config.sweep, list(nodes.values())):
        at_once = share.times_on(node)
        try:
            tried.append(_tried(share, at_once, trial, probe, node_id, longest_start(config)))
        except (ray.exceptions.RayError, TimeoutError) as error:
            if tried:
                _log.warning("%d trials at once cannot be run: %s", at_once, in_one_line(error))
                break
            raise ResourceError(f"no trial can be run to see how many fit: {in_one_line(error)}") from error
        if _is_enough(tried):
            break
    most = max(packed.images_per_second for packed in tried)
    best = next(packed for packed in tried if packed.images_per_second * WORTH_IT >= most)
    return [best, *(packed for packed in tried if packed is not best)]


def shares(settings: SweepSettings, nodes: Sequence[Share]) -> list[Share]:
    """The shares that are tried where a sweep says `auto`, one after the other: of a node less and less for a trial.

    Args:
        settings: the sweep's; `cpus_per_trial`, `gpus_per_trial` or both are `auto`.
        nodes: what each node of the cluster has.

    Raises:
        ResourceError: no node has a GPU where one is asked for, or a CPU.
    """
    node = _largest(settings, nodes)
    most = settings.max_concurrent or math.inf
    return [share for number, share in enumerate(_shares(settings, node)) if not number or share.times_on(node) <= most]


def _largest(settings: SweepSettings, nodes: Sequence[Share]) -> Share:
    """Of the nodes the one with the most of what trials need.

    Raises:
        ResourceError: as `shares`.
    """
    node = max(nodes, key=lambda n: (n.gpus if settings.gpus_per_trial else 0, n.cpus), default=NO_NODE)
    needed = 1.0 if isinstance(settings.gpus_per_trial, str) else settings.gpus_per_trial
    if node.gpus < needed:
        rule = f"no node has as many GPUs; the most are {node.gpus:g}, and 0 trains on the CPU"
        raise ResourceError(f"sweep.gpus_per_trial = {settings.gpus_per_trial}: {rule}")
    if node.cpus < 1:
        raise ResourceError(f"sweep.cpus_per_trial = {settings.cpus_per_trial}: no node has a CPU")
    return node


def _is_enough(tried: list[Packed]) -> bool:
    """Whether more at once cannot be better: it went down, or twice as many have no memory."""
    falls = len(tried) > 1 and tried[-1].images_per_second < tried[-2].images_per_second
    return falls or 2 * tried[-1].memory > MEMORY_USED


def _shares(settings: SweepSettings, node: Share) -> Iterator[Share]:
    """What one trial has of a node, less and less."""
    cpus, gpus = settings.cpus_per_trial, settings.gpus_per_trial
    if gpus == 0:
        number = 1
        while number <= node.cpus:
            yield Share(float(node.cpus // number), 0.0)
            number *= 2
        return
    for part in [1 / number for number in NUMBERS] if isinstance(gpus, str) else [gpus]:
        its_cpus = node.cpus / node.gpus * part
        yield Share(its_cpus if isinstance(cpus, str) else min(cpus, its_cpus), part)


def _tried(share: Share, at_once: int, trial: TrialConfig, probe: Probe, node_id: str, patience: float) -> Packed:
    """Run as many as fit on the node at once; their start has so many seconds, and so has their run."""

    class Prober:
        def build(self, config: dict[str, Any]) -> None:
            self._run = probe(TrialConfig.model_validate(config))

        def run(self, seconds: float) -> tuple[float, int, int]:
            speed = self._run(seconds)
            return speed.images_per_second, speed.peak_bytes, speed.total_bytes

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    remote = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, scheduling_strategy=there)(Prober)
    config = trial.model_copy(update=trial_part(share)).model_dump(mode="json")
    probers = [remote.remote() for _ in range(at_once)]
    try:
        ray.get([prober.build.remote(config) for prober in probers], timeout=patience)
        results = ray.get([prober.run.remote(SECONDS) for prober in probers], timeout=patience)
    finally:
        for prober in probers:
            ray.kill(prober)
    rates, peaks, totals = zip(*results, strict=True)
    share_memory = min(share.gpus, 1.0) or 1 / at_once
    return Packed(share, at_once, sum(rates), max(peaks) / min(totals) / share_memory)
