"""One process's turn at a sweep: from its claim on the ledger to the `stop` line, whatever comes between."""

import contextlib
import dataclasses
import logging
import os
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from tune_topkd.config import NO_FILES
from tune_topkd.config import ConfigError
from tune_topkd.config import Override
from tune_topkd.config import Problem
from tune_topkd.config import SharedFiles
from tune_topkd.config import SweepConfig
from tune_topkd.config import budget_problems
from tune_topkd.config import config_from
from tune_topkd.config import dump_config
from tune_topkd.export import TUNED_FILE
from tune_topkd.export import NoAnswerError
from tune_topkd.export import as_yaml
from tune_topkd.interruption import Interruption
from tune_topkd.interruption import listening
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import Confirm
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Finalists
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Mirror
from tune_topkd.ledger import Prepared
from tune_topkd.ledger import Share
from tune_topkd.ledger import Stop
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TeacherFile
from tune_topkd.ledger import is_confirmed
from tune_topkd.machine import NodeGpus
from tune_topkd.space import Space
from tune_topkd.storage import file_hash
from tune_topkd.storage import write_text
from tune_topkd.sweep import identity
from tune_topkd.sweep import prepare
from tune_topkd.sweep.callbacks import SILENT
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.confirm import Plan
from tune_topkd.sweep.confirm import cost
from tune_topkd.sweep.confirm import request
from tune_topkd.sweep.documents import author_of
from tune_topkd.sweep.documents import without_artifacts
from tune_topkd.sweep.gpus import gpus_file
from tune_topkd.sweep.preflight import Checked
from tune_topkd.sweep.preflight import check_again
from tune_topkd.sweep.preflight import first_proposals
from tune_topkd.sweep.pruning import banks_of
from tune_topkd.sweep.pruning import is_named
from tune_topkd.sweep.register import register
from tune_topkd.sweep.register import skipped
from tune_topkd.sweep.remaining import baseline_total
from tune_topkd.sweep.result import Result
from tune_topkd.sweep.versions import git_commit
from tune_topkd.sweep.versions import versions
from tune_topkd.sweep.workspace import CONFIG_FILE
from tune_topkd.sweep.workspace import TEST_DATASET_FILE
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.sweep.workspace import config_digest
from tune_topkd.sweep.workspace import driver_elsewhere
from tune_topkd.sweep.workspace import frozen_config
from tune_topkd.sweep.workspace import may_begin_again

if TYPE_CHECKING:
    from tune_topkd.execution import Executor
    from tune_topkd.execution import RemoteSweep

GIVEN_UP = 2
"""The exit code of a process that cannot go on, and cannot say so by an exception."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What ends a sweep that is resumed. What is None stays as it was; without a time budget there is none."""

    trials: int | None = None
    time_budget: float | None = None
    """In seconds from now."""
    gpu_hours: float | None = None
    """Of the whole sweep, what it has had included."""
    cpu_hours: float | None = None


@dataclass(frozen=True)
class Turn:
    """What a process brings to a sweep."""

    workspace: Workspace
    watchers: Watchers = SILENT
    executor: "Executor | None" = None
    """Where trials run; by default the workspace's Ray."""
    places: Mapping[str, Any] = field(default_factory=dict)
    """Where the sweep's files are now, by config key, if not where they were."""

    def start(self, checked: Checked, name: str, warm: Sequence[dict[str, Any]] = ()) -> Result:
        """Run a new sweep to its end, an interruption or its time budget.

        The sweep exists from the first: its ledger is claimed before the teacher is trained, and nothing of another sweep
        of this name is touched. What is refused before the first trial leaves nothing behind.

        Raises:
            ConfigError: the data or the teacher cannot be had as the config says.
            LedgerError: another process has begun a sweep of this name.
        """
        folder, config = self.workspace.folder(name), checked.config
        folder.mkdir(parents=True, exist_ok=True)
        text = dump_config(config)
        header = _header(checked, name, warm, config_digest(config.model_dump(mode="json")))

        mirror, remote = self._mirror(name), self.workspace.remote

        def freeze() -> None:
            write_text(folder / CONFIG_FILE, text)
            if remote is not None:
                remote.put_config(name, header.digest, text)

        def thaw() -> None:
            (folder / CONFIG_FILE).unlink(missing_ok=True)

        path = folder / LEDGER_FILE
        try:
            with (
                listening() as interruption,
                Ledger.create(
                    path, header, before=freeze, may_replace=may_begin_again, undo=thaw, mirror=mirror
                ) as ledger,
            ):
                try:
                    return self._carry_on(config, ledger, interruption)
                except (ValueError, OSError):
                    if not ledger.state.is_prepared:
                        thaw()
                        ledger.withdraw()
                    raise
        except (ValueError, OSError):
            with contextlib.suppress(OSError):  # it is not empty: what began stays, and so does what is the user's
                folder.rmdir()
            raise

    def resume(self, name: str, limits: "Limits") -> Result:
        """Run what is left of a sweep.

        Args:
            name: the sweep's.
            limits: what is to end it, instead of what did.

        Raises:
            ConfigError: the sweep, its config or what it depends on is not as it was when it began, or an argument is
                not as it must be. Nothing has then been written.
            LedgerError: the ledger is damaged, or another process drives the sweep.
        """
        folder = self.workspace.existing(name)
        mirror = self._mirror(name)
        with listening() as interruption, Ledger.open(folder / LEDGER_FILE, mirror=mirror) as ledger:
            state, source = ledger.state, str(folder / CONFIG_FILE)
            config = _resumed(frozen_config(folder, state), source, self.places, state, limits)
            began_in = state.last_driver.folder if state.last_driver is not None else None
            check_again(config, source, began_in)
            self._check_unchanged(config, state)
            return self._carry_on(config, ledger, interruption)

    def confirm(self, name: str, plan: Plan) -> Result:
        """Train the finalists of a sweep that is over on fresh seeds, and measure the best of them on the test set.

        Raises:
            ConfigError: as `resume`, or the answer cannot be confirmed as the plan says. Nothing has then been written.
            LedgerError: the ledger is damaged, or another process drives the sweep.
        """
        folder = self.workspace.existing(name)
        mirror = self._mirror(name)
        with listening() as interruption, Ledger.open(folder / LEDGER_FILE, mirror=mirror) as ledger:
            state, source = ledger.state, str(folder / CONFIG_FILE)
            config = _resumed(frozen_config(folder, state), source, self.places, state, Limits())
            line = request(config, state, plan)
            began_in = state.last_driver.folder if state.last_driver is not None else None
            check_again(config, source, began_in)
            self._check_unchanged(config, state)
            self.watchers.info(f"confirm {name}: {cost(config, state, line).sentence()}")
            return self._carry_on(config, ledger, interruption, line)

    def _mirror(self, name: str) -> Mirror | None:
        """Of a sweep in a store: its ledger there; the store has been tried.

        Raises:
            StoreError: it cannot be read or written to.
            LedgerError: only this machine's copy has the sweep.
        """
        if self.workspace.remote is not None:
            self.workspace.remote.check()
        return self.workspace.mirror(name)

    def _check_unchanged(self, config: SweepConfig, state: SweepState) -> None:
        """Compare what the sweep's results depend on with what it was when the sweep was prepared.

        Raises:
            ConfigError: something has changed; names each.
        """
        if problems := list(changed_since(config, state, self.workspace)):
            raise ConfigError(state.header.sweep, problems)
        now = versions()
        for package, before in state.header.versions.items():
            if now.get(package, before) != before:
                self.watchers.note(f"the sweep began with {package} {before}, this is {now[package]}")

    def _carry_on(
        self, config: SweepConfig, ledger: Ledger, interruption: Interruption, confirm: Confirm | None = None
    ) -> Result:
        """From the ledger's `driver` event, and what is to be confirmed, to its `stop` and the answer."""
        if (remote := self.workspace.remote) is None:
            return self._driven(config, ledger, interruption, confirm)
        if (other := driver_elsewhere(ledger.path.parent)) is not None:
            self.watchers.note(f"taken over from {other}: if it still runs, it ends at its next line")
        with remote.sign_of_life(ledger.state.header.sweep):
            return self._driven(config, ledger, interruption, confirm)

    def _driven(
        self, config: SweepConfig, ledger: Ledger, interruption: Interruption, confirm: Confirm | None
    ) -> Result:
        finalists = ledger.state.finalists or Finalists.configured(config.sweep.finalists)
        about = {"trials": config.sweep.trials, "finalists": finalists, "places": self.places}
        hours = {"gpu_hours": config.sweep.gpu_hours, "cpu_hours": config.sweep.cpu_hours}
        ledger.append(Driver.here(folder=os.getcwd(), versions=versions(), **about, **hours))
        try:
            executor = self.executor or _ray(self.workspace, interruption)
            config, files = self._prepare(config, ledger, executor)
            if (test := self._prepare_test(config, ledger.state, confirm)) is not None and confirm is not None:
                ledger.append(dataclasses.replace(confirm, teacher=test.teacher))
            reason, trouble = self._run(config, files, test, ledger, executor)
        except KeyboardInterrupt:
            interruption.close()
            reason, trouble = _stopped(ledger, "interrupted"), ""
        except BaseException as error:
            with contextlib.suppress(OSError, LedgerError):  # they may be what went wrong
                _stopped(ledger, "trouble", " ".join(str(error).split()) or type(error).__name__)
            raise
        folder, state = ledger.path.parent, ledger.state
        result = Result(state.header.sweep, folder, frozen_config(folder, state), state, reason, trouble)
        with contextlib.suppress(NoAnswerError):
            tuned = as_yaml(result.answer)
            write_text(folder / TUNED_FILE, tuned)
            if self.workspace.remote is not None:
                self.workspace.remote.put_answer(result.name, tuned)
        if reason == "finished":
            try:
                register(result.config, state, folder, self.workspace.mlflow_uri, self.watchers, trouble)
            except KeyboardInterrupt:  # all of the sweep is done
                interruption.close()
                self.watchers.note(skipped(result.name, "interrupted", self.workspace.mlflow_uri))
        self.watchers.ended(result)
        return result

    def _prepare(self, config: SweepConfig, ledger: Ledger, executor: "Executor") -> tuple[SweepConfig, SharedFiles]:
        """What all trials share, and the config with each trial's share of a node; the ledger gets its `prepared` event.

        Raises:
            ConfigError: the data or the teacher cannot be had, or the teacher is not the one that earlier trials had.
            ResourceError: no trial can be run.
        """
        state = ledger.state
        with self.watchers.phase("reading the data"):
            prepare.ready_data(config)
        watchers = SILENT if state.is_prepared else self.watchers
        images = prepare.image_counts(config)
        watchers.info(prepare.data_line(config, images))
        teacher = prepare.ready_teacher(config, self.workspace, watchers)
        files = prepare.teacher_files(teacher, config, self.workspace, self.watchers, config.sweep.seed)
        if state.is_prepared:
            if teacher is not None and state.identities:
                now = identity.identities(config, teacher.path)
                if problems := identity.changes(state.identities, now, config):
                    raise ConfigError(state.header.sweep, problems)
            return config, files
        config = prepare.packed(config, files, executor, self.watchers)
        cpus, gpus = config.sweep.cpus_per_trial, config.sweep.gpus_per_trial
        assert not isinstance(cpus, str), "it has just been measured"
        assert not isinstance(gpus, str), "it has just been measured"
        if problems := list(budget_problems(config)):
            raise ConfigError(state.header.sweep, problems)
        prepared = Prepared(
            digest=config_digest(config.model_dump(mode="json")),
            teacher_file=TeacherFile(teacher.key, teacher.val_top1) if teacher else None,
            identities=identity.identities(config, teacher.path if teacher else None),
            identity_version=identity.VERSION,
            share=Share(cpus, gpus),
            images=images,
        )
        text = dump_config(config)  # with the share as a number
        if self.workspace.remote is not None:
            self.workspace.remote.put_config(state.header.sweep, prepared.digest or "", text)
        ledger.append(prepared)
        write_text(ledger.path.parent / CONFIG_FILE, text)
        return config, files

    def _prepare_test(self, config: SweepConfig, state: SweepState, confirm: Confirm | None) -> "_Test | None":
        """What trainings for the test set share; None where none are to come.

        Raises:
            ConfigError: the teacher cannot be had, or is not the one that earlier trainings had.
        """
        known = confirm or state.confirm
        if known is None or (confirm is None and is_confirmed(state)):
            return None
        pair = prepare.for_the_test(config)
        with self.watchers.phase("reading the data"):
            prepare.ready_data(pair)
        teacher = prepare.test_teacher(config, self.workspace, self.watchers)
        files = prepare.teacher_files(teacher, pair, self.workspace, self.watchers, config.sweep.seed)
        found = None if teacher is None else file_hash(teacher.path)
        if confirm is None and known.teacher != found:
            rule = (
                "the teacher of the trainings for the test set is not the one that they began with; restore its weights in "
                f"{self.workspace.teachers}"
            )
            raise ConfigError(state.header.sweep, [Problem(key=identity.TEACHER, rule=rule)])
        hashes = {} if teacher is None or found is None else {str(teacher.path): found}
        return _Test(pair, files, found, hashes)

    def _run(
        self, config: SweepConfig, files: SharedFiles, test: "_Test | None", ledger: Ledger, executor: "Executor"
    ) -> tuple[str, str]:
        """Run the trials; why the sweep stopped, and what MLflow lacks."""
        folder, watchers = ledger.path.parent, self.watchers
        with (
            gpus_file(folder, is_cluster=self.workspace.address is not None) as on_gpus,
            watchers.trials(config, folder, ledger.state),
            _mlflow(ledger.state.header.sweep, self.workspace, watchers) as mlflow,
            prepare.dataset_file(config, folder, watchers.note) as dataset_file,
            contextlib.ExitStack() as stack,
        ):
            files = files.model_copy(update={"dataset_file": dataset_file})
            if test is not None:
                of_test = prepare.dataset_file(test.config, folder, watchers.note, TEST_DATASET_FILE)
                shared = test.files.model_copy(update={"dataset_file": stack.enter_context(of_test)})
                test = dataclasses.replace(test, files=shared)
            reason = self._search(config, files, test, ledger, executor, [*mlflow, watchers], on_gpus)
        return reason, "".join(tracker.trouble for tracker in mlflow)

    def _search(
        self,
        config: SweepConfig,
        files: SharedFiles,
        test: "_Test | None",
        ledger: Ledger,
        executor: "Executor",
        trackers: Sequence[Any],
        on_gpus: Callable[[Sequence[NodeGpus]], None],
    ) -> str:
        from tune_topkd.execution import Work
        from tune_topkd.search import Search
        from tune_topkd.train import train

        def note(text: str) -> None:
            _log.warning("%s", text)
            self.watchers.note(text)

        def give_up(message: str) -> None:
            """End the process where it hangs: what is in the ledger is on the disk."""
            self.watchers.error(f"{message}; nothing is lost: `resume {ledger.state.header.sweep}` goes on")
            os._exit(GIVEN_UP)

        search = Search(config, ledger, trackers)
        if search.is_finished or search.fatal:
            return search.stopped()
        weights = Path(files.teacher_checkpoint) if files.teacher_checkpoint else None
        hashes = identity.file_hashes(config, ledger.state.identities, weights)
        test_files = NO_FILES if test is None else test.files
        hashes |= {} if test is None else test.hashes
        needed = [*hashes, *(f.dataset_file for f in (files, test_files) if f.dataset_file is not None)]
        remote = self._remote_sweep(ledger, needed, config)
        work = Work(ledger.path.parent, train, files, hashes, note, give_up, test_files, remote, on_gpus)
        return executor.run(search, work)

    def _remote_sweep(self, ledger: Ledger, needed: Sequence[str], config: SweepConfig) -> "RemoteSweep | None":
        """What workers are told of a sweep in a store; what they need is put there if some may be on other machines."""
        if (remote := self.workspace.remote) is None:
            return None
        from tune_topkd.execution import RemoteSweep
        from tune_topkd.execution.remote import share

        assert ledger.mirror is not None, "the ledger of such a sweep is in the store"
        shared = {} if self.workspace.address is None else share(remote.store, needed)
        name, first = ledger.state.header.sweep, ledger.mirror.first_segment
        found = RemoteSweep.driven(remote.uri, name, first, ledger.path.parent, uuid.uuid4().hex)
        named = list(banks_of(config))
        banks = {bank.name: bank.bytes for bank in remote.banks() if is_named(bank.content, named)}
        return dataclasses.replace(found, shared=shared, banks=banks)


@dataclass(frozen=True)
class _Test:
    """What the trainings for the test set share."""

    config: SweepConfig
    """The sweep's, with their data."""
    files: SharedFiles
    teacher: str | None
    """The content of the teacher's weights; None without one."""
    hashes: Mapping[str, str]
    """Of files that must still be what they were, by path."""


def _ray(workspace: Workspace, interruption: Interruption) -> "Executor":
    from tune_topkd.execution import RayExecutor

    return RayExecutor(interruption, workspace.address, workspace.priority)


@contextlib.contextmanager
def _mlflow(name: str, workspace: Workspace, watchers: Watchers) -> Iterator[list[Any]]:
    """What keeps MLflow up to date; none without MLflow."""
    if not workspace.mlflow_uri:
        yield []
        return
    from tune_topkd.tracking import MlflowTracker

    ledger = workspace.folder(name) / LEDGER_FILE
    tracker = MlflowTracker(ledger, workspace.mlflow_uri, author_of(name, workspace))
    try:
        yield [tracker]
    finally:
        with watchers.phase("writing what is left, and the report, into MLflow"):
            tracker.close()
        if tracker.skipped:
            watchers.note(without_artifacts(name, tracker.skipped))


def _header(checked: Checked, name: str, warm: Sequence[dict[str, Any]], digest: str) -> Header:
    """What the ledger's first line says of a new sweep."""
    from tune_topkd.data import dataset_info

    config = checked.config
    return Header(
        sweep=name,
        id=uuid.uuid4().hex,
        seed=config.sweep.seed,
        trials=config.sweep.trials,
        baselines=baseline_total(config),
        epochs=config.recipe.epochs,
        metric="val_top1",
        dataset=config.data.name,
        num_classes=dataset_info(config.data).num_classes,
        teacher=config.teacher.name if config.teacher else None,
        student=config.student.name,
        method=config.method,
        digest=digest,
        space_digest=Space.of(config).digest(),
        first=[*first_proposals(config), *warm],
        versions=versions(),
        git_commit=git_commit(),
    )


def _resumed(
    config: SweepConfig,
    source: str,
    places: Mapping[str, Any],
    state: SweepState,
    limits: Limits,
) -> SweepConfig:
    """The config with what a resume may change, checked as `run` checks it."""
    overrides = [Override(key, value, f"--set {key}") for key, value in places.items()]
    trials, last = limits.trials, state.last_driver
    overrides += [
        Override("sweep.trials", state.target if trials is None else trials, "--trials"),
        Override("sweep.time_budget", limits.time_budget, "--time-budget"),
    ]
    for name, before in () if last is None else (("gpu_hours", last.gpu_hours), ("cpu_hours", last.cpu_hours)):
        if (hours := getattr(limits, name)) is not None or before is not None:
            value = before if hours is None else hours
            overrides.append(Override(f"sweep.{name}", value, f"--{name.replace('_', '-')}"))
    resumed = config_from(config.model_dump(mode="json"), source, overrides)
    if trials is not None and trials < len(state.arm("search")):
        rule = f"must be at least {len(state.arm('search'))}, the trials there are"
        name = state.header.sweep
        raise ConfigError("--trials", [Problem(key=name, rule=rule, value=trials, has_value=True)])
    return resumed


def changed_since(config: SweepConfig, state: SweepState, workspace: Workspace) -> Iterator[Problem]:
    """What the sweep's results depend on and is no longer what it was when the sweep was prepared.

    A teacher that was trained here and is gone is not compared: it will be trained again.

    Raises:
        ConfigError: something cannot be read.
    """
    before = state.identities
    weights = _teacher_weights(config, state, workspace)
    if not before:
        known, teacher = state.teacher_file, config.teacher
        if known and weights is not None and teacher is not None and teacher.checkpoint is not None:
            before, now = {identity.TEACHER: known.key}, {identity.TEACHER: file_hash(weights)[:16]}
            yield from identity.changes(before, now, config)
        return
    try:
        now = identity.identities(config, weights)
    except ValueError as error:
        raise ConfigError(state.header.sweep, [Problem(key="", rule=str(error))]) from error
    if state.prepared is not None and state.prepared.identity_version == identity.VERSION:
        yield from identity.changes(before, now, config)


def _teacher_weights(config: SweepConfig, state: SweepState, workspace: Workspace) -> Path | None:
    """The file of the teacher's weights, if there is one."""
    if config.teacher is None:
        return None
    if config.teacher.checkpoint is not None:
        return Path(config.teacher.checkpoint)
    from tune_topkd.teacher import WEIGHTS_NAME

    if (known := state.teacher_file) is None:
        return None
    if workspace.remote is not None:
        workspace.remote.bring_teacher(known.key)
    path = workspace.teachers / known.key / WEIGHTS_NAME
    return path if path.exists() else None


def _stopped(ledger: Ledger, reason: str, error: str = "") -> str:
    """See that the ledger has a `stop` line; the reason of it."""
    if not ledger.state.stop_reason:
        ledger.append(Stop(reason=reason, error=error))
    return ledger.state.stop_reason
