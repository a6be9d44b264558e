"""What the nodes of a cluster have, and what each of them says when it is asked, before anything is begun there."""

import time
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from typing import Generic
from typing import NamedTuple
from typing import TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_topkd.execution.cluster import in_one_line
from tune_topkd.execution.cluster import resources
from tune_topkd.execution.nodes import why_no_answer
from tune_topkd.ledger import Share

_HEAD = "node:__internal_head__"  # a resource that Ray gives to its head alone

FoundT = TypeVar("FoundT")


@dataclass(frozen=True)
class Node:
    """A node that Ray knows."""

    id: str
    name: str
    address: str
    has: Share
    is_alive: bool = True
    is_head: bool = False

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Node":
        """From an entry of `ray.nodes()`."""
        return cls(
            id=entry["NodeID"],
            name=entry["NodeName"],
            address=entry["NodeManagerAddress"],
            has=resources(dict(entry)),
            is_alive=entry["Alive"],
            is_head=_HEAD in entry["Resources"],
        )


class Trouble(NamedTuple):
    """Why a node gave no answer."""

    text: str
    is_late: bool
    """It may only be busy."""


@dataclass(frozen=True)
class Answers(Generic[FoundT]):
    """What the nodes that were asked have said, by their ids."""

    found: Mapping[str, FoundT]
    troubles: Mapping[str, Trouble]


def known_nodes() -> list[Node]:
    """The nodes of the Ray that this process is attached to: the head first, those that are gone last."""
    nodes = [Node.of(entry) for entry in ray.nodes()]
    return sorted(nodes, key=lambda node: (not node.is_alive, not node.is_head, node.name, node.id))


def ask(
    calls: Mapping[str, Callable[[], FoundT]], patience: float, shares: Mapping[str, Share] = MappingProxyType({})
) -> Answers[FoundT]:
    """Have nodes call functions, all at the same time.

    Args:
        calls: what each node calls, by its id; picklable. What it raises is the node's trouble.
        patience: seconds after which a node that has not answered is late.
        shares: what the call takes of a node, by its id; of one that is not named nothing, so that it waits for no trial.
    """

    def there(pickled: bytes) -> tuple[Any, str]:  # travels by value: a node can say that it does not have this package
        try:
            call = ray.cloudpickle.loads(pickled)
        except Exception as error:  # noqa: BLE001 (whatever importing raises is the answer)
            return None, f"the sweep's code cannot be imported there: {type(error).__name__}: {error}"
        return call(), ""

    def asked_of(node: str) -> Any:
        share, only = shares.get(node, Share(0.0, 0.0)), NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_retries": 0, "scheduling_strategy": only}
        return ray.remote(**options)(there).remote(ray.cloudpickle.dumps(calls[node]))

    asked = {node: asked_of(node) for node in calls}
    until = time.monotonic() + patience
    found: dict[str, FoundT] = {}
    troubles: dict[str, Trouble] = {}
    for node, answer in asked.items():
        try:
            value, trouble = ray.get(answer, timeout=max(until - time.monotonic(), 0.0))
        except ray.exceptions.GetTimeoutError:
            ray.cancel(answer, force=True)
            troubles[node] = Trouble(f"it has not answered in {patience:g} s and may be too busy", is_late=True)
        except ray.exceptions.RayTaskError as error:
            troubles[node] = Trouble(in_one_line(error), is_late=False)
        except ray.exceptions.RayError as error:
            troubles[node] = Trouble(why_no_answer(error, patience), is_late=False)
        else:
            if trouble:
                troubles[node] = Trouble(trouble, is_late=False)
            else:
                found[node] = value
    return Answers(found, troubles)
