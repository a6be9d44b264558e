"""What the GPUs are doing of the nodes on which a sweep's trials are at work.

Ray itself knows it only where its dashboard is installed and runs. So each of these nodes has an actor that takes no
resources and asks NVIDIA's library. It ends with the sweep, or once the node has had no trial of it for a while: an
autoscaler takes a node with an actor for one in use.
"""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_topkd import machine
from tune_topkd.execution.cluster import in_one_line
from tune_topkd.machine import NodeGpus

SECONDS_BETWEEN_QUESTIONS = 3.0
LONGEST_USE = 10.0
"""Seconds after which an answer is not told any more."""

_SECONDS_BETWEEN_LOOKS = 0.5  # whether an answer is there
_SECONDS_WITHOUT_A_TRIAL = 30.0  # after which a node is let go: between two trials its line stays
_SECONDS_BEFORE_ANOTHER_TRY = 30.0  # at a node whose actor has died, or could not be begun
_LONGEST_END = 4.0
_log = logging.getLogger(__name__)


class GpuWatch:
    """Asks nodes what their GPUs are doing.

    **Threads.** One of its own asks and tells; the sweep's calls `look_at`, which waits for nothing.
    **Failures.** A node that does not answer is not told of; its reason is in the log. No other node waits for it.
    """

    def __init__(self, tell: Callable[[Sequence[NodeGpus]], None]) -> None:
        """Nothing is asked yet.

        Args:
            tell: is given what the nodes have lately answered, by their names, every few seconds.
        """
        self._tell = tell
        self._wanted: Mapping[str, str] = {}
        self._nodes: dict[str, _Node] = {}
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-watch", daemon=True)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """As long as this lasts, ask; then the actors are gone."""
        self._thread.start()
        try:
            yield
        finally:
            self._is_closing.set()
            self._thread.join(_LONGEST_END)

    def look_at(self, nodes: Mapping[str, str]) -> None:
        """From now on ask these nodes: their names by their ids."""
        self._wanted = nodes

    def _run(self) -> None:
        told_at = time.monotonic()
        try:
            while not self._is_closing.wait(_SECONDS_BETWEEN_LOOKS):
                now = time.monotonic()
                self._look(now)
                if now - told_at >= SECONDS_BETWEEN_QUESTIONS:
                    told_at = now
                    answers = [node.answer for node in self._nodes.values() if node.answer is not None]
                    self._tell(sorted(answers, key=lambda answer: answer.name))
        except Exception:  # noqa: BLE001 (observing may fail, work goes on)
            _log.exception("what the nodes' GPUs are doing is not told any more")
        finally:
            for node in self._nodes.values():
                node.end()
            self._nodes.clear()  # no reference into Ray is left for another thread to drop

    def _look(self, now: float) -> None:
        for node, name in self._wanted.items():
            self._nodes.setdefault(node, _Node(node, name)).wanted_at = now
        for key, asked in list(self._nodes.items()):
            asked.look(now)
            if now - asked.wanted_at > _SECONDS_WITHOUT_A_TRIAL:
                self._nodes.pop(key).end()


class _Node:
    """A node: its actor, and what it has last said."""

    def __init__(self, node: str, name: str) -> None:
        self.wanted_at = 0.0
        """When it was last to be asked."""
        self._id, self._name = node, name
        self._actor: Any = None
        self._asked: Any = None
        """The question that is not answered yet."""
        self._next_question = 0.0
        self._answer: NodeGpus | None = None

    @property
    def answer(self) -> NodeGpus | None:
        """What it has lately said, if it has any GPU."""
        said = self._answer
        return said if said is not None and said.gpus and time.time() - said.at < LONGEST_USE else None

    def look(self, now: float) -> None:
        """Take its answer, if there is one, and ask it, if it is time; a question that is not answered is not repeated."""
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            self._take(now)
        if self._asked is None and now >= self._next_question:
            self._next_question = now + SECONDS_BETWEEN_QUESTIONS
            if self._actor is None:
                there = NodeAffinitySchedulingStrategy(self._id, soft=False)
                self._actor = ray.remote(num_cpus=0, scheduling_strategy=there)(_asker()).remote()
            self._asked = self._actor.gpus.remote()

    def end(self) -> None:
        """Its actor is gone, also one that hangs."""
        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = self._asked = None

    def _take(self, now: float) -> None:
        try:
            self._answer = NodeGpus(self._name, time.time(), tuple(ray.get(self._asked, timeout=0)))
            self._asked = None
        except ray.exceptions.RayError as error:
            _log.info("node %s does not say what its GPUs are doing: %s", self._name, in_one_line(error))
            self.end()
            self._next_question = now + _SECONDS_BEFORE_ANOTHER_TRY


def _asker() -> Any:
    """The actor's class. It is made here, so that Ray sends it as it is, and its process loads `machine` alone of ours."""

    class Asker:
        def gpus(self) -> list[machine.Gpu]:
            return machine.gpus()

    return Asker
