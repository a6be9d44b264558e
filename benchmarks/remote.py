"""`python -m benchmarks.remote [--trials N] [--epoch S] [--quick] [--write]`: a sweep in S3, on nodes that come and go.

**Throughput.** Three Ray nodes of one slot each, on this machine, that share nothing but the URI: each has a cache folder
of its own. Formula trials of three epochs save a checkpoint to the store after each. After a third of the reports one node
is killed, after two thirds another one joins. What the trials have slept, by the ledger, over what the live slots have had,
from the first trial's start to the last proposal: the start of workers, the loss of a node, uploads and the driver are what
is missing to 100 %.

**Segments.** The driver waits for each write of the ledger to be in the store. So many new objects of a kilobyte can be
put one after the other.

The store is moto's, in a process of its own on this machine: it keeps objects in memory, and has the same cores as all
else here.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import boto3
import ray.cluster_utils

from benchmarks.__main__ import cores
from benchmarks.__main__ import machine
from benchmarks.formula import Paced
from benchmarks.pages import give
from tune_topkd.execution import RayExecutor
from tune_topkd.interruption import Interruption
from tune_topkd.interruption import listening
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import Event
from tune_topkd.ledger import read_events
from tune_topkd.storage import open_store
from tune_topkd.sweep import Callback
from tune_topkd.sweep import Sweep

URI = "s3://runs/benchmark"
SPACE = {
    "data": {"name": "digits"},
    "teacher": None,
    "method": "ce",
    "student": "digits_linear",
    "recipe": {"epochs": 3, "lr": 0.1},
    "space": {"lr": {"low": 0.01, "high": 1.0, "log": True}},
    "sweep": {"asha": None, "cpus_per_trial": 1},
    "baselines": None,
}
SERVER = """
import sys, threading
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
threading.Event().wait()
"""


@contextmanager
def store() -> Iterator[None]:
    """An empty bucket, that this process and all it starts find by their environment."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        try:
            os.environ |= {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}",
                "AWS_ACCESS_KEY_ID": "benchmark",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            boto3.client("s3").create_bucket(Bucket="runs")
            yield
        finally:
            server.kill()


class Sleeping(RayExecutor):
    """Ray, with trials that sleep."""

    def __init__(self, seconds: float, interruption: Interruption, address: str) -> None:
        super().__init__(interruption, address)
        self._sleep = Paced(seconds)

    def run(self, search: Any, work: Any) -> Any:
        """As Ray's, with another train function."""
        return super().run(search, dataclasses.replace(work, train=self._sleep))


class Nodes(Callback):
    """The nodes: one is killed after a third of so many reports, one joins after two thirds."""

    def __init__(self, folder: Path, reports: int) -> None:
        self._folder, self._reports, self._count = folder, reports, 0
        self.cluster = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.moves: list[tuple[float, int]] = []
        """When a node of one slot was killed (-1) or has joined (1)."""
        self._nodes = [self._join(name) for name in "abc"]
        self._threads: list[threading.Thread] = []

    def _join(self, name: str) -> Any:
        cache = {"TUNE_TOPKD_CACHE_DIR": str(self._folder / name)}
        return self.cluster.add_node(num_cpus=1, node_name=name, env_vars=cache)

    def on_event(self, event: Event) -> None:
        """Count the reports, and move at a third and two thirds of them."""
        self._count += event.name == "report"
        if event.name == "report" and self._count in (self._reports // 3, 2 * self._reports // 3):
            self._threads.append(
                threading.Thread(target=self._kill if self._count == self._reports // 3 else self._add)
            )
            self._threads[-1].start()

    def _kill(self) -> None:
        self.moves.append((time.time(), -1))
        self.cluster.remove_node(self._nodes[1], allow_graceful=False)

    def _add(self) -> None:
        self._join("d")
        self.moves.append((time.time(), 1))

    def close(self) -> None:
        """End all of them."""
        for thread in self._threads:
            thread.join()
        self.cluster.shutdown()


def throughput(folder: Path, trials: int, seconds: float) -> Iterator[str]:
    """The table of a sweep while nodes come and go."""
    nodes = Nodes(folder, 3 * trials)
    with contextlib.closing(nodes):
        settings = {"sweep.trials": trials}
        address = nodes.cluster.address
        sweep = Sweep.create(SPACE, name="s", overrides=settings, runs_dir=URI, mlflow_uri="", address=address)
        with listening() as interruption:
            result = sweep.run([nodes], executor=Sleeping(seconds, interruption, address))
    assert result.reason == "finished", result.reason
    events = read_events(sweep.folder / LEDGER_FILE)[0]
    first = next(event.time for event in events if event.name == "start")
    last = max(event.time for event in events if event.name == "suggest")
    slept = seconds * sum(event.name == "report" and first <= event.time <= last for event in events)
    had = 3 * (last - first) + sum(slots * max(last - at, 0.0) for at, slots in nodes.moves)
    retries = sum(event.name == "retry" for event in events)
    yield f"{trials} trials of three epochs of {seconds:g} s."
    yield ""
    yield "| seconds to the last proposal | slot-seconds that were live | slept | of them | trials begun again |"
    yield "|--:|--:|--:|--:|--:|"
    yield f"| {last - first:.0f} | {had:.0f} | {slept:.0f} | {100 * slept / had:.0f} % | {retries} |"


def segments(count: int) -> Iterator[str]:
    """The line of what the store takes."""
    there, times = open_store(f"{URI}/segments"), []
    for number in range(count):
        began = time.perf_counter()
        assert there.put_new(f"{number:08d}", b"x" * 1024)
        times.append(time.perf_counter() - began)
    middle = statistics.median(times)
    yield f"{count} objects: {1e3 * middle:.1f} ms each (median), {count / sum(times):.0f} a second."


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.remote", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=36, metavar="N")
    parser.add_argument("--epoch", type=float, default=5.0, metavar="S", help="seconds of an epoch")
    parser.add_argument("--quick", action="store_true", help="small and rough: shows that it runs")
    parser.add_argument("--write", action="store_true", help="keep the page in benchmarks/results")
    args = parser.parse_args()
    if args.quick:
        args.trials, args.epoch = 6, 0.5
    lines = [f"# A sweep whose runs lie in S3, {date.today()}", "", *machine(), ""]
    with tempfile.TemporaryDirectory() as scratch, store():
        os.environ["TUNE_TOPKD_CACHE_DIR"] = str(Path(scratch, "driver"))
        lines += ["## Segments", "", *segments(20 if args.quick else 300), ""]
        lines += ["## Throughput", "", *throughput(Path(scratch), args.trials, args.epoch), ""]
    lines += (__doc__ or "").splitlines()[2:]
    give(lines, f"remote-{cores()}-cores", args.write)


if __name__ == "__main__":
    main()
