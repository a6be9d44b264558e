"""Sending to MLflow what it lacks: what is there is not sent again, and one refused value does not hold up the others."""

import logging
import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from functools import cached_property
from typing import Any

from tune_topkd.tracking.masking import reason_of
from tune_topkd.tracking.projection import Batch
from tune_topkd.tracking.projection import Images
from tune_topkd.tracking.projection import Row
from tune_topkd.tracking.projection import metric_name
from tune_topkd.tracking.projection import milliseconds
from tune_topkd.tracking.store import Client
from tune_topkd.tracking.store import client_of
from tune_topkd.tracking.store import experiment_id
from tune_topkd.tracking.store import rows_in_bulk

_BEFORE_ALL = (-math.inf, -math.inf, -math.inf)
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "REQUEST_LIMIT_EXCEEDED", "DATA_LOSS")

_log = logging.getLogger(__name__)


@dataclass
class KnownRun:
    """A run in MLflow, as far as it is written here."""

    id: str
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    status: str = "RUNNING"
    ended: int | None = None
    datasets: frozenset[tuple[str, str]] = frozenset()
    """The names and digests of its datasets."""
    found: Any = None
    """The run as it was found; none if it was made here, or if all that it had then has been passed."""

    @classmethod
    def of(cls, run: Any) -> "KnownRun":
        """A run that was found."""
        about = (run.info.run_id, dict(run.data.tags), dict(run.data.params), run.info.status, run.info.end_time)
        return cls(*about, datasets_of(run), run)

    def has_passed(self, row: Row) -> bool:
        """Whether this row or a later one of its name is there. Rows are sent in order, so then this one is there too."""
        return (row.step, row.at, row.value) <= self._latest.get(row.name, _BEFORE_ALL)

    @cached_property
    def _latest(self) -> dict[str, tuple[int, int, float]]:
        points = self.found.data.to_proto().metrics if self.found is not None else ()
        return {point.key: (point.step, point.timestamp, point.value) for point in points}


def datasets_of(run: Any) -> frozenset[tuple[str, str]]:
    """The names and digests of a run's datasets."""
    inputs = run.inputs.dataset_inputs if run.inputs is not None else []
    return frozenset((each.dataset.name, each.dataset.digest) for each in inputs)


def dataset_input(images: Images) -> Any:
    """MLflow's object for a sweep's dataset. Where its files are is not told: it is another place on each machine."""
    import json

    from mlflow.entities import Dataset
    from mlflow.entities import DatasetInput
    from mlflow.entities import InputTag

    source = json.dumps({"tags": {"tune_topkd.dataset": images.name}})
    dataset = Dataset(images.name, images.digest, "code", source, profile=images.profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def rows_lacking(client: Client, batch: Batch, runs: Mapping[str, KnownRun]) -> dict[str, list[Row]]:
    """The metric rows of the batch that MLflow may lack, by run."""
    found = {run: runs[run] for run in batch.points if run in runs and runs[run].found is not None}
    names = sorted({row.name for run in found for row in batch.points[run]})
    there = rows_in_bulk(client, [known.id for known in found.values()], names)
    lacking = {run: list(rows) for run, rows in batch.points.items()}
    for run, known in found.items():
        if there is not None:
            lacking[run] = [row for row in batch.points[run] if row not in there[known.id]]
        elif run:  # the sweep's own run has few rows, and of its metrics an earlier version may have sent other ones
            lacking[run] = [row for row in batch.points[run] if not known.has_passed(row)]
    return lacking


def entities(rows: Iterable[Row], params: Mapping[str, str], tags: Mapping[str, str]) -> list[Any]:
    """MLflow's objects for them."""
    from mlflow.entities import Metric
    from mlflow.entities import Param
    from mlflow.entities import RunTag

    metrics = [Metric(row.name, row.value, row.at, row.step) for row in rows]
    return [*metrics, *(Param(*pair) for pair in params.items()), *(RunTag(*pair) for pair in tags.items())]


def log_entities(client: Client, run_id: str, sent: Sequence[Any], say: Callable[[str], None] = _log.warning) -> None:
    """Send them; what MLflow refuses by itself is left out and said.

    Raises:
        Exception: MLflow's, if it fails otherwise, or has the run no more.
    """
    try:
        _log_batch(client, run_id, sent)
    except Exception as error:
        if not is_refusal(error) or client.get_run(run_id).info.lifecycle_stage != "active":
            raise
        if len(sent) == 1:
            say(f"MLflow does not take {_described(sent[0])}: {reason_of(error, '')}")
            return
        for half in (sent[: len(sent) // 2], sent[len(sent) // 2 :]):
            log_entities(client, run_id, half, say)


def _log_batch(client: Client, run_id: str, sent: Sequence[Any]) -> None:
    by_kind: dict[str, list[Any]] = {"Metric": [], "Param": [], "RunTag": []}
    for entity in sent:
        by_kind[type(entity).__name__].append(entity)
    client.log_batch(run_id, metrics=by_kind["Metric"], params=by_kind["Param"], tags=by_kind["RunTag"])


def is_refusal(error: Exception) -> bool:
    """Whether MLflow has understood the request and will refuse it again."""
    return getattr(error, "error_code", None) in _REFUSALS


def _described(entity: Any) -> str:
    kind = {"Metric": "metric", "Param": "parameter", "RunTag": "tag"}[type(entity).__name__]
    return f"the {kind} {entity.key!r} = {str(entity.value)[:40]!r}"


def log_training(
    uri: str,
    name: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    history: Sequence[tuple[int, float, Mapping[str, float]]],
    started: float,
    status: str,
) -> str:
    """Write one training that belongs to no sweep as a run of its own.

    Args:
        uri: MLflow's tracking URI.
        name: the run's.
        params: the run's, by dotted key.
        tags: the run's.
        history: (epoch, Unix seconds, metrics) of each epoch; values that are not finite are left out.
        started: Unix seconds.
        status: MLflow's: FINISHED, FAILED or KILLED.

    Returns:
        What went wrong, in one line without credentials, or nothing: observing may fail, the training is done.
    """
    batch = Batch()
    batch.open("", name, started, params, tags)
    for epoch, at, metrics in history:
        named = {metric_name(metric, params): value for metric, value in metrics.items()}
        batch.metrics("", at, named, step=epoch)
    for note in batch.notes.values():
        _log.warning("MLflow: %s", note)
    opening = batch.opened[""]
    try:
        client = client_of(uri)
        experiment = experiment_id(client, uri)
        run = client.create_run(experiment, milliseconds(started), opening.tags, opening.name).info.run_id
        if sent := entities(batch.points[""], opening.params, {}):
            log_entities(client, run, sent)
        client.set_terminated(run, status)
    except Exception as error:  # noqa: BLE001 (observing may fail; the caller says so)
        return reason_of(error, uri)
    return ""
