"""After a sweep: bring MLflow to where the ledger is, and check that all that is kept of it agrees."""

from collections.abc import Iterator
from pathlib import Path

from tune_topkd.config import ConfigError
from tune_topkd.config import Problem
from tune_topkd.config import SweepConfig
from tune_topkd.export import TUNED_FILE
from tune_topkd.export import NoAnswerError
from tune_topkd.export import as_yaml
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.sweep.callbacks import SILENT
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.documents import author_of
from tune_topkd.sweep.documents import without_artifacts
from tune_topkd.sweep.driver import changed_since
from tune_topkd.sweep.register import register
from tune_topkd.sweep.register import skipped
from tune_topkd.sweep.result import answer
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.sweep.workspace import frozen_config
from tune_topkd.sweep.workspace import is_under_way


def track(sweep: str, workspace: Workspace, watchers: Watchers = SILENT) -> None:
    """Write into MLflow what it lacks of a sweep, its registered student included; any number of times gives the same.

    Args:
        sweep: its name.
        workspace: where it lies, and MLflow.
        watchers: are told of the student.

    Raises:
        ConfigError: there is no such sweep, a process drives it at the moment, or MLflow cannot be written.
        LedgerError: the ledger is damaged.
    """
    from tune_topkd.tracking import TrackingError
    from tune_topkd.tracking import catch_up
    from tune_topkd.tracking import masked

    folder = workspace.existing(sweep)
    ledger = folder / LEDGER_FILE
    _check_at_rest(sweep, workspace, "it writes to MLflow itself, and catches up before it ends")
    state = read_state(ledger)
    try:
        author = author_of(sweep, workspace)
        skipped_for = catch_up(ledger, workspace.mlflow_uri, abandoned=not state.stop_reason, author=author)
    except TrackingError as error:
        raise ConfigError("--mlflow-uri", [Problem(key=masked(workspace.mlflow_uri), rule=str(error))]) from None
    if skipped_for:
        watchers.note(without_artifacts(sweep, skipped_for))
    if state.looks:
        try:
            config = frozen_config(folder, state)
        except ConfigError as error:
            watchers.note(skipped(sweep, str(error), workspace.mlflow_uri))
        else:
            register(config, state, folder, workspace.mlflow_uri, watchers)


def audit(sweep: str, workspace: Workspace, with_mlflow: bool = True) -> list[str]:
    """What does not hold of a sweep, a line each; empty if all agrees.

    Args:
        sweep: its name.
        workspace: where it lies.
        with_mlflow: compare MLflow with the ledger too.

    Raises:
        ConfigError: there is no such sweep, or a process drives it at the moment.
    """
    workspace.existing(sweep)
    _check_at_rest(sweep, workspace, "audit it when it is done")
    return list(_findings(sweep, workspace, with_mlflow))


def _findings(sweep: str, workspace: Workspace, with_mlflow: bool) -> Iterator[str]:
    folder = workspace.existing(sweep)
    try:
        state = read_state(folder / LEDGER_FILE)
        config = frozen_config(folder, state)
    except (ConfigError, LedgerError) as error:
        yield str(error)
        return
    yield from audit_sweep(config, folder)
    try:
        yield from map(str, changed_since(config, state, workspace))
    except (ConfigError, OSError) as error:
        yield f"what the sweep depends on cannot be compared with what it was: {error}"
    tuned = folder / TUNED_FILE
    try:
        if tuned.exists() and tuned.read_text() != as_yaml(answer(config, state)):
            yield f"{tuned}: is not the answer that the ledger gives; `export {sweep} -o {tuned}` writes it anew"
    except NoAnswerError:
        yield f"{tuned}: is an answer, but no trial reached the full budget"
    if with_mlflow:
        yield from mlflow_findings(sweep, workspace)


def audit_sweep(config: SweepConfig, folder: Path) -> list[str]:
    """Check the ledger and the checkpoints of a sweep that no process drives at the moment.

    Args:
        config: the sweep's frozen config.
        folder: the sweep's.

    Returns:
        What is wrong, a line each; empty if nothing is.
    """
    from tune_topkd.execution.checkpoints import checkpoint_findings
    from tune_topkd.execution.remote import bring_checkpoints
    from tune_topkd.search import ChoiceError
    from tune_topkd.search import audit_decisions

    try:
        findings, state = audit_decisions(config, read_events(folder / LEDGER_FILE)[0])
    except (ChoiceError, LedgerError) as error:
        return [str(error)]
    lost = (TrialStatus.PRUNED, TrialStatus.FAILED)
    bring_checkpoints(folder, [str(r.key) for r in state.trials.values() if r.status not in lost and r.epoch])
    return findings + list(checkpoint_findings(state, folder))


def mlflow_findings(sweep: str, workspace: Workspace) -> Iterator[str]:
    """Where MLflow says another thing of a sweep than its ledger, a line each."""
    from tune_topkd.tracking import TrackingError
    from tune_topkd.tracking import disagreements

    try:
        found = disagreements(workspace.existing(sweep) / LEDGER_FILE, workspace.mlflow_uri, documents=True)
    except TrackingError as error:
        yield str(error)
        return
    yield from found
    if found:
        yield f"`track {sweep}` writes what MLflow lacks"


def _check_at_rest(sweep: str, workspace: Workspace, advice: str) -> None:
    if is_under_way(workspace.folder(sweep)):
        raise ConfigError("SWEEP", [Problem(key=sweep, rule=f"a process drives it at the moment; {advice}")])
