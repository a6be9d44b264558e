"""Asking a cluster that has an autoscaler for nodes.

An autoscaler adds nodes for what waits and fits nowhere. A sweep proposes a trial only for a place that is there, so of
the sweep itself nothing waits. It asks with placement groups: one for each trial that it could start and has no place
for. One that gets a place gives it up for a trial, or at the next look. The groups are this process's: however it ends,
nothing asks any more.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import ray
from ray.util import placement_group
from ray.util import placement_group_table
from ray.util import remove_placement_group

from tune_topkd.ledger import Share

LONGEST_WAIT_FOR_A_NODE = 1800.0
"""Seconds that a sweep which asks for nodes waits, with no trial at work, for one that has room for a trial."""

Selector = list[dict[str, str]]
"""The labels that a node must have, or must not, as Ray takes them for one bundle; empty if any node will do."""


class Growth:
    """What a sweep asks an autoscaler for.

    **Threads.** Not thread-safe: one thread calls it.
    """

    def __init__(self, share: Share, note: Callable[[str], None]) -> None:
        """Nothing is asked for yet.

        Args:
            share: what a trial takes.
            note: is told when the sweep begins to ask.
        """
        self._bundle = {name: part for name, part in (("CPU", share.cpus), ("GPU", share.gpus)) if part}
        self._note = note
        self._asking: list[Any] = []
        self._selector: Selector = []

    def want(self, places: int, selector: Selector) -> None:
        """Ask for room for so many trials beside the room that there is; 0 asks for none.

        Args:
            places: of one trial each.
            selector: the nodes that will do.
        """
        if places and not self._asking:
            self._note(f"the cluster's autoscaler is asked for room for {places} more trial{'s' * (places > 1)}")
        self._keep(self._waiting()[:places] if selector == self._selector else [])
        self._selector = selector
        while len(self._asking) < places:
            self._asking.append(placement_group([self._bundle], bundle_label_selector=selector or None))

    def give_way(self) -> None:
        """Give up what has got a place, for a trial: were both to ask for it, the autoscaler would add another node.

        A place counts as free a second or so after it was given up.
        """
        self._keep(self._waiting())

    def close(self) -> None:
        """Ask for nothing any more."""
        with contextlib.suppress(ray.exceptions.RayError):  # a Ray that is gone has let go of them
            self._keep([])

    def _waiting(self) -> list[Any]:
        table = placement_group_table() if self._asking else {}
        return [group for group in self._asking if table.get(group.id.hex(), {}).get("state") != "CREATED"]

    def _keep(self, groups: list[Any]) -> None:
        for group in self._asking:
            if group not in groups:
                remove_placement_group(group)
        self._asking = groups
