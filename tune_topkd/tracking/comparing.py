"""What MLflow has of a sweep, compared with what the ledger says it should have."""

from collections import Counter
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tune_topkd.ledger import read_events
from tune_topkd.tracking.documents import missing
from tune_topkd.tracking.projection import PARENT_TAG
from tune_topkd.tracking.projection import Batch
from tune_topkd.tracking.projection import Projection
from tune_topkd.tracking.projection import Row
from tune_topkd.tracking.projection import milliseconds
from tune_topkd.tracking.projection import run_name
from tune_topkd.tracking.sending import datasets_of
from tune_topkd.tracking.store import Client
from tune_topkd.tracking.store import client_of
from tune_topkd.tracking.store import find_experiment
from tune_topkd.tracking.store import masked_errors
from tune_topkd.tracking.store import rows_in_bulk
from tune_topkd.tracking.store import runs_by_trial

FINDINGS_PER_RUN = 5


def disagreements(ledger: Path, uri: str, *, documents: bool = False) -> list[str]:
    """Where MLflow differs from what the ledger says it should have; nothing is written.

    Looks at the parent and at one run per training, each there once: status, times, params, dataset and tags as far as they
    are written here, the metrics' latest values as MLflow shows them, and exactly the metric rows. A killed driver's running
    trials may also be shown as interrupted. Rows that an earlier version wrote and this one would not are passed over
    where they hide nothing.

    Args:
        ledger: the sweep's ledger file.
        uri: MLflow's tracking URI.
        documents: whether the sweep's run is to have its artifacts too.

    Returns:
        A line for each finding, which names the trial; at most five a trial, and how many more there are.

    Raises:
        LedgerError: the ledger is damaged.
        TrackingError: MLflow fails.
    """
    projection, should_be, abandoned = Projection(), Batch(), Batch()
    for event in read_events(ledger)[0]:
        projection.take(event, should_be)
    if not projection.state.has_begun:
        return []
    projection.abandon(abandoned)
    with masked_errors(uri):
        client = client_of(uri)
        experiment = find_experiment(client, uri)
        sweep_id = projection.state.header.id
        found = runs_by_trial(client, experiment.experiment_id, sweep_id) if experiment else {}
        parents = {run.info.run_id for run in found.get("", [])}
        rows = _rows(client, [run for copies in found.values() for run in copies], should_be)
        findings = []
        for run in [*should_be.opened, *sorted(set(found) - set(should_be.opened))]:
            copies = found.get(run, [])
            if len(copies) != 1:
                lines = [f"has {len(copies)} runs in MLflow" if copies else "has no run in MLflow"]
            elif run not in should_be.opened:
                lines = ["has a run in MLflow, but is not in the ledger"]
            else:
                shown = _latest(should_be.points[run]) | ({} if run else projection.summary())
                lines = list(_differences(copies[0], run, should_be, abandoned, parents))
                lines += _metric_differences(copies[0], run, should_be, shown, rows[copies[0].info.run_id])
                lines += missing(client, uri, copies[0], projection.milestone) if documents and not run else []
            if len(lines) > FINDINGS_PER_RUN:
                lines[FINDINGS_PER_RUN:] = [f"and {len(lines) - FINDINGS_PER_RUN} more"]
            findings += [f"{run_name(run) if run else 'the sweep'}: {line}" for line in lines]
    return findings


def _differences(found: Any, run: str, should_be: Batch, abandoned: Batch, parents: set[str]) -> Iterator[str]:
    """What is wrong with a run but for its metrics, a line each."""
    opening, tags = should_be.opened[run], should_be.tags[run]
    status, ended = should_be.status.get(run, ("RUNNING", None))
    if run in abandoned.status and found.info.status == abandoned.status[run][0]:
        (status, ended), tags = abandoned.status[run], tags | abandoned.tags[run]
    if found.info.status != status:
        yield f"status is {found.info.status}, should be {status}"
    elif status != "RUNNING" and ended is not None and found.info.end_time != milliseconds(ended):
        yield f"end time is {found.info.end_time}, should be {milliseconds(ended)}"
    if found.info.start_time != milliseconds(opening.time):
        yield f"start time is {found.info.start_time}, should be {milliseconds(opening.time)}"
    for what, has, wants in (("param", found.data.params, opening.params), ("tag", found.data.tags, tags)):
        for name, text in wants.items():
            if name not in has:
                yield f"{what} {name} is missing"
            elif has[name] != text:
                yield f"{what} {name} is {has[name][:80]!r}, should be {text[:80]!r}"
    images = should_be.inputs.get(run)
    if images is not None and (images.name, images.digest) not in datasets_of(found):
        yield f"dataset {images.name} is missing"
    if run and found.data.tags.get(PARENT_TAG) not in parents:
        yield "is not under the sweep's run"


def _metric_differences(
    found: Any, run: str, should_be: Batch, shown: Mapping[str, float], rows: "Counter[tuple[str, int, float, int]]"
) -> Iterator[str]:
    """What is wrong with a run's metrics: the values that MLflow's pages and tables show, and then all others."""
    has = found.data.metrics
    tails = {n: f"shown as {has[n]:g}, should be {v:g}" for n, v in shown.items() if has.get(n, v) != v}
    wanted: Counter[tuple[str, int, float, int]] = Counter(should_be.points[run])
    surplus = rows - wanted - Counter(should_be.superseded[run])
    for what, lines in (("missing", wanted - rows), ("too many", surplus)):
        for name in sorted({name for name, *_ in lines}):
            steps = sorted(step for n, step, *_ in lines.elements() if n == name)
            tail = f"; {tails.pop(name)}" if name in tails else ""
            yield f"metric {name}: {len(steps)} rows {what}, the first at step {steps[0]}{tail}"
    for name, tail in sorted(tails.items()):
        yield f"metric {name}: {tail}"


def _latest(rows: Sequence[Row]) -> dict[str, float]:
    """The value that MLflow shows of each metric."""
    return {row.name: row.value for row in sorted(rows, key=lambda row: (row.step, row.at, row.value))}


def _rows(client: Client, runs: Sequence[Any], should_be: Batch) -> "dict[str, Counter[tuple[str, int, float, int]]]":
    """The metric rows in MLflow by run id; where it must be, with a request for each run and name."""
    ids = [run.info.run_id for run in runs]
    expected = {row.name for rows in should_be.points.values() for row in rows}
    rows = rows_in_bulk(client, ids, sorted(expected.union(*(run.data.metrics for run in runs))))
    if rows is not None:
        return rows
    rows = {run_id: Counter() for run_id in ids}
    for run in runs:
        for name in sorted(run.data.metrics):  # a metric that has rows has a latest one
            for point in client.get_metric_history(run.info.run_id, name):
                rows[run.info.run_id][point.key, point.step, point.value, point.timestamp] += 1
    return rows
