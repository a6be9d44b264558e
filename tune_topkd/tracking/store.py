"""MLflow's store: opening it, and finding a sweep's runs in it."""

import contextlib
import logging
import os
import re
import shlex
import threading
from collections import Counter
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from typing import Protocol
from urllib.parse import urlsplit

from tune_topkd.config import ConfigError
from tune_topkd.config import Problem
from tune_topkd.errors import TuneTopKDError
from tune_topkd.ledger import LedgerError
from tune_topkd.tracking.masking import mask_record
from tune_topkd.tracking.masking import masked
from tune_topkd.tracking.masking import reason_of
from tune_topkd.tracking.projection import run_in

# MLflow reads these at import or at a request; what the user has set wins. Its own patience with a server that is down
# is minutes per call; ours is the retry loop below. It must not repeat a request by itself: `create_run`, repeated after
# its answer was lost, makes a second run. And it prints a link with the credentials of the URI at the end of each run, and
# bars while files are copied.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

EXPERIMENT = "tune_topkd"
# The kind of an experiment in which models are trained. By it MLflow's page opened on the runs; that of 3.17 goes by what
# was last chosen in the browser, or by `workflowType` in the URL (docs/mlflow.md).
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
_PERCENT_CODE = re.compile(r"%(?=[0-9A-Fa-f]{2})")
_RUNS_PER_QUERY = 500
_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
_MODEL_REGISTRIES = ("databricks-uc", "uc")
_ALL_ROWS = 2**31 - 1
_joining = threading.Lock()

_Row = tuple[str, int, float, int]


class TrackingError(TuneTopKDError):
    """MLflow has failed; with the reason in one line, credentials masked."""


class Client(Protocol):
    """The part of `mlflow.MlflowClient` that is used here."""

    def search_experiments(self, *, max_results: int) -> Any: ...  # noqa: D102
    def get_experiment_by_name(self, name: str) -> Any: ...  # noqa: D102
    def create_experiment(self, name: str, artifact_location: str | None = None, tags: Any = None) -> str: ...  # noqa: D102
    def set_experiment_tag(self, experiment_id: str, key: str, value: Any) -> None: ...  # noqa: D102
    def search_runs(  # noqa: D102
        self, experiment_ids: list[str], filter_string: str, *, max_results: int, page_token: Any
    ) -> Any: ...
    def create_run(self, experiment_id: str, start_time: int, tags: dict[str, str], run_name: str) -> Any: ...  # noqa: D102
    def get_run(self, run_id: str) -> Any: ...  # noqa: D102
    def delete_run(self, run_id: str) -> None: ...  # noqa: D102
    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> Any: ...  # noqa: D102
    def set_terminated(self, run_id: str, status: str, end_time: int | None = None) -> None: ...  # noqa: D102
    def update_run(self, run_id: str, status: str) -> None: ...  # noqa: D102
    def get_metric_history(self, run_id: str, key: str) -> Any: ...  # noqa: D102
    def log_inputs(self, run_id: str, datasets: Any = None) -> None: ...  # noqa: D102
    def log_text(self, run_id: str, text: str, artifact_file: str) -> None: ...  # noqa: D102
    def list_artifacts(self, run_id: str) -> Any: ...  # noqa: D102


def client_of(uri: str) -> Client:
    """A client of the store at a URI; what it logs is masked.

    Raises:
        TrackingError: the database is of another version of MLflow.
        Exception: a database that is down; MLflow itself would try for minutes before it says so.
    """
    from mlflow import MlflowClient  # costs seconds: only where MLflow is used

    for handler in logging.getLogger("mlflow").handlers:
        handler.addFilter(mask_record)
    if uri.startswith(("postgresql", "mysql", "mssql")):
        import sqlalchemy

        sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect().close()
    try:
        client: Client = MlflowClient(tracking_uri=uri)
    except Exception as error:
        if found := re.search(r"database schema \(found version (\w+)", str(error)):
            raise TrackingError(_other_schema(found[1], uri)) from None
        raise
    return client


def _other_schema(found: str, uri: str) -> str:
    """What to do about a database of another version of MLflow; MLflow itself takes each for an older one."""
    import mlflow

    versions = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    if any(versions.glob(f"{found}_*.py")):
        command = f"mlflow db upgrade {shlex.quote(masked(uri))}"
        return f"the database was made by an older MLflow than this one ({mlflow.__version__}): back it up, then `{command}`"
    return (
        f"the database was made by a newer MLflow than this one ({mlflow.__version__}; its schema {found} is not known "
        "here): `pip install --upgrade mlflow`, or give another --mlflow-uri"
    )


def uri_problem(uri: str) -> str:
    """Why MLflow could keep no runs at a tracking URI of this form, and what to do; nothing if it could."""
    scheme, is_whole = urlsplit(uri).scheme, "://" in uri
    family = scheme.partition("+")[0]
    plugins = {entry.name for entry in entry_points(group="mlflow.tracking_store")}
    if uri == "databricks" or (is_whole and family in _SCHEMES) or (scheme or uri) in plugins:
        return _in_memory_problem(uri) if family == "sqlite" else ""
    if uri in _MODEL_REGISTRIES or scheme in _MODEL_REGISTRIES:
        return "is a registry of models and keeps no runs: `databricks` or `databricks://<profile>` does"
    if not scheme or scheme == "file":
        return _file_problem(uri)
    known = ", ".join([*(f"{name}://" for name in _SCHEMES), "databricks", *sorted(plugins)])
    renamed = "; SQLAlchemy calls it postgresql://" if family == "postgres" else ""
    return f"must be a tracking URI scheme://…{renamed}; known: {known}"


def _in_memory_problem(uri: str) -> str:
    is_file = uri.removeprefix("sqlite://").strip("/").partition("?")[0] not in ("", ":memory:")
    return (
        ""
        if is_file
        else "is a database in memory, which is gone with the process: sqlite:///<folder>/mlflow.db is kept"
    )


def _file_problem(uri: str) -> str:
    """MLflow refuses to keep runs in plain files since it does not develop that any further, unless it is told to."""
    try:
        from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE
    except ImportError:  # an MLflow from before that
        return ""
    with contextlib.suppress(ValueError):
        if MLFLOW_ALLOW_FILE_STORE.get():
            return ""
    folder = uri.removeprefix("file:").removeprefix("//") or "mlruns"
    return (
        "is a folder of plain files, in which the installed MLflow keeps no runs: must be a tracking URI such as "
        f"sqlite:///{folder}/mlflow.db. `mlflow migrate-filestore` moves what is there into a database; "
        "MLFLOW_ALLOW_FILE_STORE=true lets MLflow use the folder"
    )


def ui_command(uri: str) -> str:
    """How to open MLflow's pages on a store: a command for a shell, or where to look."""
    if uri.startswith("databricks"):
        return "the page Experiments of the Databricks workspace"
    if uri.startswith(("http://", "https://")):
        return masked(uri)
    return f"mlflow ui --backend-store-uri {shlex.quote(masked(uri))}"


def check_uri(uri: str) -> None:
    """Open the tracking store once, and look whether the experiment can be used.

    Raises:
        ValueError: one of them cannot; with the reason, credentials masked.
    """
    try:
        client = client_of(uri)
        client.search_experiments(max_results=1)
        find_experiment(client, uri)
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


def find_experiment(client: Client, uri: str) -> Any:
    """The experiment, or none if there was never one.

    Raises:
        TrackingError: it was deleted; with what brings it back.
    """
    experiment = client.get_experiment_by_name(experiment_name())
    if experiment is not None and experiment.lifecycle_stage != "active":
        command = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise TrackingError(
            f"the experiment {experiment_name()!r} was deleted in MLflow. `MLFLOW_TRACKING_URI={shlex.quote(masked(uri))} "
            f"{command}` brings it back with its runs; MLFLOW_EXPERIMENT_NAME=<another name> leaves it deleted"
        )
    return experiment


def experiment_id(client: Client, uri: str) -> str:
    """The id of the experiment, which is created if need be.

    Raises:
        TrackingError: it was deleted, or cannot have this name.
    """
    experiment, name = find_experiment(client, uri), experiment_name()
    if experiment is not None:
        if name == EXPERIMENT and KIND_TAG not in experiment.tags:  # made by an earlier version
            client.set_experiment_tag(experiment.experiment_id, KIND_TAG, KIND)
        return str(experiment.experiment_id)
    if uri.startswith("databricks") and not name.startswith("/"):
        rule = f"there is no experiment {name!r}, and Databricks takes absolute paths as names only"
        raise TrackingError(f"{rule}: set MLFLOW_EXPERIMENT_NAME=/Users/<you>/{name}")
    file = sqlite_file(uri)  # by default artifacts would go to the working directory
    location = (file.resolve().parent / "mlartifacts").as_uri() if file is not None else None
    try:
        return client.create_experiment(name, artifact_location=location, tags={KIND_TAG: KIND})
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise
        return str(find_experiment(client, uri).experiment_id)  # another process has just made it


def sqlite_uri(file: Path) -> str:
    """The URI of an SQLite database, whatever signs its path has.

    SQLAlchemy takes what follows a ? for options, and from 2.1 on decodes %20 and the like. MLflow itself makes the folder
    that the URI names, so nothing is encoded that need not be.

    Raises:
        ConfigError: there is no such URI for the installed SQLAlchemy.
    """
    plain = f"sqlite:///{file}"
    if not re.search(r"[%?]", plain):
        return plain  # without an import
    encoded = f"sqlite:///{_PERCENT_CODE.sub('%25', str(file)).replace('?', '%3F')}"
    for uri in (plain, encoded):
        if sqlite_file(uri) == file:
            return uri
    rule = "the installed SQLAlchemy cannot name a database below a folder with ? in its path; choose another folder"
    raise ConfigError("--runs-dir", [Problem(key=str(file.parent), rule=rule)])


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite URI; none for another store, or for a database in memory."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    return Path(database) if database and database != ":memory:" else None


@contextlib.contextmanager
def one_transaction(client: Client) -> Iterator[None]:
    """What this thread writes in here into an SQLite database is one transaction: the disk is waited for once.

    MLflow makes seven of a trial, and waiting for them is most of the time. What fails in here is undone as a whole.
    """
    store = _inner_store(client)
    is_sqlite = getattr(store, "db_type", None) == "sqlite" and getattr(store, "read_engine", None) is None
    if not is_sqlite or not _joining.acquire(blocking=False):
        yield
        return
    try:
        with store.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            with _sessions_of_this_thread_on(connection, store):
                yield
            connection.commit()
    finally:
        _joining.release()


@contextlib.contextmanager
def _sessions_of_this_thread_on(connection: Any, store: Any) -> Iterator[None]:
    """MLflow's sessions become savepoints of the connection's transaction. A store is shared by all threads."""
    from mlflow.store.db.utils import _get_managed_session_maker
    from sqlalchemy.orm import sessionmaker

    before, owner = store.ManagedSessionMaker, threading.get_ident()
    sessions = sessionmaker(bind=connection, join_transaction_mode="create_savepoint")
    joined = _get_managed_session_maker(sessions, store.db_type)

    def session(*arguments: Any, **named: Any) -> Any:
        return (joined if threading.get_ident() == owner else before)(*arguments, **named)

    store.ManagedSessionMaker = session
    try:
        yield
    finally:
        store.ManagedSessionMaker = before


def _inner_store(client: Client) -> Any:
    """What MLflow's client writes to; none if it is not as the known versions have it."""
    return getattr(getattr(client, "_tracking_client", None), "store", None)


def rows_in_bulk(client: Client, run_ids: Sequence[str], names: Iterable[str]) -> "dict[str, Counter[_Row]] | None":
    """All metric rows of these names by run id; none where the store gives them only run by run, as a server does."""
    read = getattr(_inner_store(client), "get_metric_history_bulk", None)
    if read is None:
        return None
    rows: dict[str, Counter[_Row]] = {run_id: Counter() for run_id in run_ids}
    for name in names:
        for start in range(0, len(run_ids), _RUNS_PER_QUERY):
            for point in read(run_ids[start : start + _RUNS_PER_QUERY], name, _ALL_ROWS):
                rows[point.run_id][point.key, point.step, point.value, point.timestamp] += 1
    return rows


def runs_by_trial(client: Client, experiment: str, sweep_id: str) -> dict[str, list[Any]]:
    """The sweep's runs as `run_in` names them, the parent's under ""; more than one where a run is doubled."""
    runs: dict[str, list[Any]] = defaultdict(list)
    token = None
    while True:
        page = client.search_runs([experiment], f"tags.sweep_id = '{sweep_id}'", max_results=1000, page_token=token)
        for run in page:
            runs[run_in(run.data.tags)].append(run)
        token = page.token
        if not token:
            return dict(runs)
