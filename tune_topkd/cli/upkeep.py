"""After a sweep: bring MLflow to where the ledger is, and check that all that is told of the sweep agrees."""

from collections.abc import Iterator

from tune_topkd.cli import running
from tune_topkd.config import ConfigError
from tune_topkd.config import Problem
from tune_topkd.export import TUNED_FILE
from tune_topkd.export import NoAnswerError
from tune_topkd.export import as_yaml
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import is_driven
from tune_topkd.ledger import read_state


def track(sweep: str, place: running.Place) -> None:
    """Write into MLflow what it lacks of a sweep; any number of times gives the same.

    Raises:
        ConfigError: there is no such sweep, a process drives it at the moment, or MLflow cannot be written.
        LedgerError: the ledger is damaged.
    """
    from tune_topkd.tracking import TrackingError
    from tune_topkd.tracking import catch_up
    from tune_topkd.tracking import masked

    ledger = place.existing(sweep) / LEDGER_FILE
    _check_at_rest(sweep, place, "it writes to MLflow itself, and catches up before it ends")
    state = read_state(ledger)
    try:
        catch_up(ledger, place.mlflow_uri, abandoned=not state.stop_reason)
    except TrackingError as error:
        raise ConfigError("--mlflow-uri", [Problem(key=masked(place.mlflow_uri), rule=str(error))]) from None


def audit(sweep: str, place: running.Place, with_mlflow: bool) -> list[str]:
    """What does not hold of a sweep, a line each; empty if all agrees.

    Raises:
        ConfigError: there is no such sweep, or a process drives it at the moment.
    """
    place.existing(sweep)
    _check_at_rest(sweep, place, "audit it when it is done")
    return list(_findings(sweep, place, with_mlflow))


def _findings(sweep: str, place: running.Place, with_mlflow: bool) -> Iterator[str]:
    from tune_topkd.sweep import audit_sweep

    folder = place.existing(sweep)
    try:
        state = read_state(folder / LEDGER_FILE)
        config = running.begun_config(folder, state)
    except (ConfigError, LedgerError) as error:
        yield str(error)
        return
    yield from audit_sweep(config, folder)
    try:
        yield from map(str, running.changed_since(config, state, place))
    except (ConfigError, OSError) as error:
        yield f"what the sweep depends on cannot be compared with what it was: {error}"
    tuned = folder / TUNED_FILE
    try:
        if tuned.exists() and tuned.read_text() != as_yaml(running.answer(config, state)):
            yield f"{tuned}: is not the answer that the ledger gives; `export {sweep} -o {tuned}` writes it anew"
    except NoAnswerError:
        yield f"{tuned}: is an answer, but no trial reached the full budget"
    if with_mlflow:
        yield from _mlflow_findings(sweep, place)


def _mlflow_findings(sweep: str, place: running.Place) -> Iterator[str]:
    from tune_topkd.tracking import TrackingError
    from tune_topkd.tracking import disagreements

    try:
        found = disagreements(place.existing(sweep) / LEDGER_FILE, place.mlflow_uri)
    except TrackingError as error:
        yield str(error)
        return
    yield from found
    if found:
        yield f"`track {sweep}` writes what MLflow lacks"


def _check_at_rest(sweep: str, place: running.Place, advice: str) -> None:
    if is_driven(place.folder(sweep) / LEDGER_FILE):
        raise ConfigError("SWEEP", [Problem(key=sweep, rule=f"a process drives it at the moment; {advice}")])
