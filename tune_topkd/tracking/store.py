"""MLflow's store: opening it, and finding a sweep's runs in it."""

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import Protocol

from tune_topkd.tracking.masking import mask_record
from tune_topkd.tracking.masking import masked
from tune_topkd.tracking.masking import reason_of
from tune_topkd.trials import LedgerError

# MLflow reads these at import or at a request; what the user has set wins. Its own patience with a server that is down
# is minutes per call; ours is the retry loop below. It must not repeat a request by itself: `create_run`, repeated after
# its answer was lost, makes a second run. And it prints a link with the credentials of the URI at the end of each run.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

EXPERIMENT = "tune_topkd"


class TrackingError(RuntimeError):
    """MLflow has failed; with the reason in one line, credentials masked."""


class Client(Protocol):
    """The part of `mlflow.MlflowClient` that is used here."""

    def search_experiments(self, *, max_results: int) -> Any: ...  # noqa: D102
    def get_experiment_by_name(self, name: str) -> Any: ...  # noqa: D102
    def create_experiment(self, name: str, artifact_location: str | None = None) -> str: ...  # noqa: D102
    def search_runs(  # noqa: D102
        self, experiment_ids: list[str], filter_string: str, *, max_results: int, page_token: Any
    ) -> Any: ...
    def create_run(self, experiment_id: str, start_time: int, tags: dict[str, str], run_name: str) -> Any: ...  # noqa: D102
    def delete_run(self, run_id: str) -> None: ...  # noqa: D102
    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> Any: ...  # noqa: D102
    def set_terminated(self, run_id: str, status: str, end_time: int | None = None) -> None: ...  # noqa: D102
    def update_run(self, run_id: str, status: str) -> None: ...  # noqa: D102
    def get_metric_history(self, run_id: str, key: str) -> Any: ...  # noqa: D102


def client_of(uri: str) -> Client:
    """A client of the store at a URI; what it logs is masked.

    Raises:
        Exception: a database that is down; MLflow itself would try for minutes before it says so.
    """
    from mlflow import MlflowClient  # costs seconds: only where MLflow is used

    for handler in logging.getLogger("mlflow").handlers:
        handler.addFilter(mask_record)
    if uri.startswith(("postgresql", "mysql", "mssql")):
        import sqlalchemy

        sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect().close()
    client: Client = MlflowClient(tracking_uri=uri)
    return client


def check_uri(uri: str) -> None:
    """Open the tracking store once.

    Raises:
        ValueError: it cannot be opened; with the reason, credentials masked.
    """
    try:
        client_of(uri).search_experiments(max_results=1)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is told)
        reason = reason_of(error, uri)
        # The cause would show the URI in a traceback.
        raise ValueError(f"MLflow at {masked(uri)} cannot be used: {reason}") from None


@contextlib.contextmanager
def masked_errors(uri: str) -> Iterator[None]:
    """Turn whatever MLflow raises into a `TrackingError` without credentials; not what is wrong with the ledger."""
    try:
        yield
    except LedgerError:
        raise
    except Exception as error:  # noqa: BLE001 (MLflow raises what its libraries raise)
        raise TrackingError(f"MLflow at {masked(uri)} fails: {reason_of(error, uri)}") from None


def experiment_name() -> str:
    """The user's, or ours."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def experiment_id(client: Client, uri: str) -> str:
    """The id of the experiment, which is created if need be."""
    experiment = client.get_experiment_by_name(experiment_name())
    if experiment:
        return str(experiment.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):  # by default artifacts would go to the working directory
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
    return client.create_experiment(experiment_name(), artifact_location=location)


def runs_by_trial(client: Client, experiment: str, sweep_id: str) -> dict[str, list[Any]]:
    """The sweep's runs by trial number, the parent's under ""; more than one where a run is doubled."""
    runs: dict[str, list[Any]] = defaultdict(list)
    token = None
    while True:
        page = client.search_runs([experiment], f"tags.sweep_id = '{sweep_id}'", max_results=1000, page_token=token)
        for run in page:
            runs[run.data.tags.get("trial_number", "")].append(run)
        token = page.token
        if not token:
            return dict(runs)
