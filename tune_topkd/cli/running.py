"""A sweep from a checked config to the exported answer: the folder, the teacher, the ledger, Ray, the trackers."""

import contextlib
import logging
import os
import subprocess
import uuid
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import TextIO

from tune_topkd import __version__
from tune_topkd.cli import calling
from tune_topkd.cli import display
from tune_topkd.cli import identity
from tune_topkd.cli import preflight
from tune_topkd.cli.interruption import Interruption
from tune_topkd.cli.interruption import listening
from tune_topkd.cli.terminal import Console
from tune_topkd.config import AUTO
from tune_topkd.config import NO_FILES
from tune_topkd.config import SWEEP_NAME
from tune_topkd.config import ConfigError
from tune_topkd.config import Override
from tune_topkd.config import PairConfig
from tune_topkd.config import Problem
from tune_topkd.config import SharedFiles
from tune_topkd.config import SweepConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import config_from
from tune_topkd.config import dump_config
from tune_topkd.config import read_yaml
from tune_topkd.config import unknown_choice
from tune_topkd.export import TUNED_FILE
from tune_topkd.export import TunedConfig
from tune_topkd.export import as_yaml
from tune_topkd.export import tuned_config
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import LEDGER_VERSION
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Prepared
from tune_topkd.ledger import Share
from tune_topkd.ledger import Stop
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TeacherFile
from tune_topkd.ledger import is_driven
from tune_topkd.ledger import read_state
from tune_topkd.space import Space
from tune_topkd.space import digest
from tune_topkd.storage import file_hash
from tune_topkd.storage import write_text

if TYPE_CHECKING:
    from tune_topkd.teacher import Teacher

CONFIG_FILE = "sweep.yaml"
DATASET_FILE = "dataset.pt"
LOG_FILE = "sweep.log"
DONE, USER_ERROR, NO_SUCCESS = 0, 2, 3
_FIRST_WITHOUT_PLACES = 3  # the ledger version whose digest leaves out where files are
WARM_STARTS = 3
"""How many of another sweep's best trials `--warm-start` tries first."""

_WITHOUT_MLFLOW = ("export", "status")
_STATES = {"time_budget": "out of time", "trouble": "stopped by trouble", "": "killed"}
_PACKAGES = ("torch", "torchvision", "ray", "optuna", "mlflow", "pandas", "numpy")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where things are: the runs folder, MLflow, and the Ray cluster to use, if not a private one."""

    runs: Path
    mlflow_uri: str
    address: str | None = None

    def folder(self, sweep: str) -> Path:
        """A sweep's folder."""
        return self.runs / sweep

    def sweeps(self) -> list[str]:
        """The names of the sweeps that have begun, oldest first; those that cannot be looked into are among them."""
        try:
            names = [path.name for path in self.runs.iterdir() if SWEEP_NAME.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        return sorted(filter(self._may_have_begun, names), key=lambda name: (self._changed_at(name), name))

    def command(self, *words: str) -> str:
        """A command line of this program for these runs."""
        from tune_topkd.tracking import sqlite_uri

        is_default = self.mlflow_uri == sqlite_uri(self.runs / "mlflow.db") or words[0] in _WITHOUT_MLFLOW
        uri, address = "" if is_default else self.mlflow_uri, self.address if words[0] == "resume" else None
        return calling.command(*words, runs=self.runs, mlflow_uri=uri, address=address)

    def _may_have_begun(self, sweep: str) -> bool:
        try:
            return self.has_begun(sweep)
        except OSError:
            return True

    def _changed_at(self, sweep: str) -> float:
        try:
            return (self.folder(sweep) / LEDGER_FILE).stat().st_mtime
        except OSError:
            return 0.0

    def has_begun(self, sweep: str) -> bool:
        """Whether the sweep's ledger has a line; a kill may have come between the file and its first one."""
        try:
            with open(self.folder(sweep) / LEDGER_FILE, "rb") as ledger:
                return ledger.readline().endswith(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return False

    def existing(self, sweep: str) -> Path:
        """The folder of a sweep that has begun.

        Raises:
            ConfigError: there is none of this name.
        """
        folder = self.folder(sweep)
        if not self.has_begun(sweep):
            known = self.sweeps()
            rule = f"no such sweep in {self.runs}; " + (unknown_choice(sweep, known) if known else "there are none")
            raise ConfigError("SWEEP", [Problem(key=sweep, rule=rule)])
        return folder


@dataclass(frozen=True)
class Outcome:
    """How one sweep's run ended."""

    config: SweepConfig
    state: SweepState
    reason: str
    exit_code: int

    @property
    def is_interrupted(self) -> bool:
        """Whether a person, or the machine, ended it early."""
        return self.reason == "interrupted"


PLACES = ("data.root", "data.download", "data.workers", "teacher.checkpoint", "student.checkpoint")
"""Keys that say where a sweep's files are and how they are read, not what they are: `resume --set` may change them."""


def _digest(content: Mapping[str, Any], version: int = LEDGER_VERSION) -> str:
    """Of a frozen config as its file has it: of all that a sweep depends on.

    What the file does not name does not count, so a later version may have keys that this one has not.
    """
    content = {key: value for key, value in content.items() if key != "description"}
    if version >= _FIRST_WITHOUT_PLACES:
        for place in PLACES:
            section, _, key = place.partition(".")
            if isinstance(content.get(section), dict):
                left = {k: v for k, v in content[section].items() if k != key}
                is_given = {"has_checkpoint": content[section].get(key) is not None} if key == "checkpoint" else {}
                content[section] = left | is_given
    return digest(content)


def begun_config(folder: Path, state: SweepState) -> SweepConfig:
    """The frozen config, which must still be the one that the sweep was begun with, with its files where they are now.

    Raises:
        ConfigError: it has been changed by hand, or is gone.
    """
    path = folder / CONFIG_FILE
    content = read_yaml(path)
    begun, prepared = state.header.digest, state.prepared
    known = (begun, prepared and prepared.digest)  # a kill may have come before the second was written
    if _digest(content, state.header.version) not in known:
        rule = "has been changed since the sweep began; a changed space is a new sweep: `run` it under another name"
        raise ConfigError(str(path), [Problem(key="", rule=rule)])
    for key, value in state.places.items():
        section, _, name = key.partition(".")
        content[section][name] = value
    config = config_from(content, str(path))
    return config if prepared is None or prepared.share is None else _with_share(config, prepared.share)


def _with_share(config: SweepConfig, share: Share) -> SweepConfig:
    shares = {"cpus_per_trial": share.cpus, "gpus_per_trial": share.gpus}
    return config.model_copy(update={"sweep": config.sweep.model_copy(update=shares)})


def sweep_state_name(folder: Path, state: SweepState) -> str:
    """`running`, or how it ended: `finished`, `failed`, `interrupted`, `out of time`, `stopped by trouble`, `killed`."""
    if is_driven(folder / LEDGER_FILE):
        return "running"
    return _STATES.get(state.stop_reason, state.stop_reason)


def check_name(name: str, place: Place) -> None:
    """Check that a new sweep can have this name.

    Raises:
        ConfigError: it is no name for a folder, or taken.
    """
    if not SWEEP_NAME.fullmatch(name) or name in ("teachers", "trained", "mlartifacts"):
        rule = "must be letters, digits, '.', '_' and '-', begin with a letter or digit, and be no other folder's there"
        raise ConfigError("--name", [Problem(key=name, rule=rule)])
    if not place.has_begun(name):
        return
    folder = place.folder(name)
    state = read_state(folder / LEDGER_FILE)
    what = sweep_state_name(folder, state)
    if _may_begin_again(state) and what != "running":
        return
    rule = (
        f"{folder} holds a sweep of this name ({what}, {len(state.arm('search'))} of {state.target} "
        f"trials); `resume {name}` goes on with it, --name gives the new one another name"
    )
    raise ConfigError("--name", [Problem(key=name, rule=rule)])


def _may_begin_again(state: SweepState) -> bool:
    """Whether nothing is lost if a sweep is begun anew: it ended before its teacher was there."""
    return not state.is_prepared


def start(
    checked: preflight.Checked, name: str, place: Place, console: Console, warm: Sequence[dict[str, Any]] = ()
) -> Outcome:
    """Run a new sweep to its end, an interruption or its time budget.

    The sweep exists from the first: its ledger is claimed before the teacher is trained, and nothing of another sweep of
    this name is touched. What is refused before the first trial leaves nothing behind.

    Raises:
        ConfigError: the data or the teacher cannot be had as the config says.
        LedgerError: another process has begun a sweep of this name.
    """
    folder, config = place.folder(name), checked.config
    for warning in checked.warnings:
        console.print(f"note: {warning}", style="yellow", soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    text = dump_config(config)
    header = _header(checked, name, warm, _digest(config.model_dump(mode="json")))

    def freeze() -> None:
        write_text(folder / CONFIG_FILE, text)

    def thaw() -> None:
        (folder / CONFIG_FILE).unlink(missing_ok=True)

    try:
        with (
            listening() as interruption,
            Ledger.create(
                folder / LEDGER_FILE, header, before=freeze, may_replace=_may_begin_again, undo=thaw
            ) as ledger,
        ):
            try:
                return _carried_on(config, ledger, place, console, interruption)
            except (ValueError, OSError):
                if not ledger.state.is_prepared:
                    thaw()
                    ledger.withdraw()
                raise
    except (ValueError, OSError):
        with contextlib.suppress(OSError):  # it is not empty: what began stays, and so does what is the user's
            folder.rmdir()
        raise


def _header(checked: preflight.Checked, name: str, warm: Sequence[dict[str, Any]], config_digest: str) -> Header:
    """What the ledger's first line says of a new sweep."""
    from tune_topkd.data import dataset_info

    config = checked.config
    return Header(
        sweep=name,
        id=uuid.uuid4().hex,
        seed=config.sweep.seed,
        trials=config.sweep.trials,
        baselines=display.baseline_total(config),
        epochs=config.recipe.epochs,
        metric="val_top1",
        dataset=config.data.name,
        num_classes=dataset_info(config.data).num_classes,
        teacher=config.teacher.name if config.teacher else None,
        student=config.student.name,
        method=config.method,
        digest=config_digest,
        space_digest=Space.of(config).digest(),
        first=[*preflight.first_proposals(config), *warm],
        versions=versions(),
        git_commit=git_commit(),
    )


def resume(
    name: str,
    place: Place,
    console: Console,
    trials: int | None = None,
    time_budget: float | None = None,
    moved: Sequence[Override] = (),
) -> Outcome:
    """Run what is left of a sweep.

    Args:
        name: the sweep's.
        place: where it lies.
        console: for what a person is told.
        trials: instead of the number that it was to have.
        time_budget: in seconds; it had its own, if any.
        moved: where its files are now, of `PLACES`; the space never changes.

    Raises:
        ConfigError: the sweep, its config or what it depends on is not as it was when it began, or an argument is not as
            it must be. Nothing has then been written.
        LedgerError: the ledger is damaged, or another process drives the sweep.
    """
    folder = place.existing(name)
    with listening() as interruption, Ledger.open(folder / LEDGER_FILE) as ledger:
        state = ledger.state
        places = _moved(moved)
        config = begun_config(folder, state)
        config = _resumed(config, str(folder / CONFIG_FILE), places, state, trials, time_budget)
        began_in = state.last_driver.folder if state.last_driver is not None else None
        preflight.check_again(config, str(folder / CONFIG_FILE), began_in)
        _check_unchanged(config, state, place, console)
        return _carried_on(config, ledger, place, console, interruption, places)


def _moved(overrides: Sequence[Override]) -> dict[str, Any]:
    """Where files are now, by key."""
    for override in overrides:
        if override.key not in PLACES:
            rule = f"a sweep that has begun keeps its config; only where its files are may change: {', '.join(PLACES)}"
            raise ConfigError("--set", [Problem(key=override.key, rule=rule)])
    files = {o.key for o in overrides if isinstance(o.value, str)}
    return {o.key: str(Path(str(o.value)).expanduser().absolute()) if o.key in files else o.value for o in overrides}


def _resumed(
    config: SweepConfig,
    source: str,
    places: Mapping[str, Any],
    state: SweepState,
    trials: int | None,
    time_budget: float | None,
) -> SweepConfig:
    """The config with what a resume may change, checked as `run` checks it."""
    overrides = [Override(key, value, f"--set {key}") for key, value in places.items()]
    overrides += [
        Override("sweep.trials", state.target if trials is None else trials, "--trials"),
        Override("sweep.time_budget", time_budget, "--time-budget"),
    ]
    resumed = config_from(config.model_dump(mode="json"), source, overrides)
    if trials is not None and trials < len(state.arm("search")):
        rule = f"must be at least {len(state.arm('search'))}, the trials there are"
        name = state.header.sweep
        raise ConfigError("--trials", [Problem(key=name, rule=rule, value=trials, has_value=True)])
    return resumed


def _check_unchanged(config: SweepConfig, state: SweepState, place: Place, console: Console) -> None:
    """Compare what the sweep's results depend on with what it was when the sweep was prepared.

    Raises:
        ConfigError: something has changed; names each.
    """
    if problems := list(changed_since(config, state, place)):
        raise ConfigError(state.header.sweep, problems)
    now = versions()
    for package, before in state.header.versions.items():
        if now.get(package, before) != before:
            console.print(f"note: the sweep began with {package} {before}, this is {now[package]}", style="yellow")


def changed_since(config: SweepConfig, state: SweepState, place: Place) -> Iterator[Problem]:
    """What the sweep's results depend on and is no longer what it was when the sweep was prepared.

    A teacher that was trained here and is gone is not compared: it will be trained again.

    Raises:
        ConfigError: something cannot be read.
    """
    before = state.identities
    weights = _teacher_weights(config, state, place)
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


def _teacher_weights(config: SweepConfig, state: SweepState, place: Place) -> Path | None:
    """The file of the teacher's weights, if there is one."""
    if config.teacher is None:
        return None
    if config.teacher.checkpoint is not None:
        return Path(config.teacher.checkpoint)
    from tune_topkd.teacher import WEIGHTS_NAME

    if (known := state.teacher_file) is None:
        return None
    path = place.runs / "teachers" / known.key / WEIGHTS_NAME
    return path if path.exists() else None


def _carried_on(
    config: SweepConfig,
    ledger: Ledger,
    place: Place,
    console: Console,
    interruption: Interruption,
    places: Mapping[str, Any] | None = None,
) -> Outcome:
    """From the ledger's `driver` event to its `stop` and the answer, whatever comes between."""
    name = ledger.state.header.sweep
    interruption.say = lambda text: console.print(f"\n{text}", soft_wrap=True)
    interruption.advice = f"; `{place.command('resume', name)}` goes on"
    ledger.append(_driver(config, places or {}))
    try:
        reason, trouble = _conducted(config, ledger, place, console, interruption)
    except KeyboardInterrupt:
        interruption.close()
        reason, trouble = _stopped(ledger, "interrupted"), ""
    except BaseException as error:
        with contextlib.suppress(OSError, LedgerError):  # they may be what went wrong
            _stopped(ledger, "trouble", " ".join(str(error).split()) or type(error).__name__)
        raise
    config = begun_config(ledger.path.parent, ledger.state)
    _finish(config, ledger.state, place, console)
    if trouble:
        console.print(f"note: MLflow has not got all of this sweep ({trouble})", style="yellow", soft_wrap=True)
    return Outcome(config, ledger.state, reason, _exit_code(reason, ledger.state, interruption))


def _stopped(ledger: Ledger, reason: str, error: str = "") -> str:
    """See that the ledger has a `stop` line; the reason of it."""
    if not ledger.state.stop_reason:
        ledger.append(Stop(reason=reason, error=error))
    return ledger.state.stop_reason


def _exit_code(reason: str, state: SweepState, interruption: Interruption) -> int:
    if reason == "interrupted":
        return interruption.exit_code
    return DONE if state.best() and reason != "failed" else NO_SUCCESS


def _conducted(
    config: SweepConfig, ledger: Ledger, place: Place, console: Console, interruption: Interruption
) -> tuple[str, str]:
    """Prepare what trials share, and run them; why the sweep stopped, and what MLflow lacks."""
    config, files = _prepared(config, ledger, place, console)
    return _drive(config, ledger, place, console, files, interruption)


def _drive(
    config: SweepConfig,
    ledger: Ledger,
    place: Place,
    console: Console,
    files: SharedFiles,
    interruption: Interruption,
) -> tuple[str, str]:
    """Run the trials; why the sweep stopped, and what MLflow lacks."""
    folder = ledger.path.parent
    with (
        display.chatter_into(folder / LOG_FILE) as terminal,
        _logging_to_stderr(),
        _trackers(config, ledger, place, console) as trackers,
        _dataset_file(config, folder, console) as dataset_file,
    ):
        files = files.model_copy(update={"dataset_file": dataset_file})
        reason = _search(config, ledger, place, files, trackers, terminal, interruption)
    return reason, trackers[0].trouble


def _say(terminal: TextIO, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone cannot be told
        terminal.write(f"\n{text}\n")
        terminal.flush()


def _prepared(config: SweepConfig, ledger: Ledger, place: Place, console: Console) -> tuple[SweepConfig, SharedFiles]:
    """What all trials share, and the config with each trial's share of a node; the ledger gets its `prepared` event.

    Raises:
        ConfigError: the data or the teacher cannot be had, or the teacher is not the one that earlier trials had.
        ResourceError: no trial can be run.
    """
    state = ledger.state
    was_prepared = state.is_prepared
    with console.phase("reading the data"):
        ready_data(config)
    teacher = _teacher(config, place, Console(quiet=True) if was_prepared else console)
    files = _files_of(teacher, config, place, console, config.sweep.seed)
    if was_prepared:
        before = state.identities
        if teacher is not None and before:
            now = identity.identities(config, teacher.path)
            if problems := identity.changes(before, now, config):
                raise ConfigError(state.header.sweep, problems)
        return config, files
    config = _packed(config, files, place, console)
    text = dump_config(config)
    cpus, gpus = config.sweep.cpus_per_trial, config.sweep.gpus_per_trial
    assert not isinstance(cpus, str), "it has just been measured"
    assert not isinstance(gpus, str), "it has just been measured"
    prepared = Prepared(
        digest=_digest(config.model_dump(mode="json")),
        teacher_file=TeacherFile(teacher.key, teacher.val_top1) if teacher else None,
        identities=identity.identities(config, teacher.path if teacher else None),
        identity_version=identity.VERSION,
        share=Share(cpus, gpus),
    )
    ledger.append(prepared)
    write_text(ledger.path.parent / CONFIG_FILE, text)  # with the share as a number
    return config, files


def ready_data(config: PairConfig) -> None:
    """Read the data once: what is missing or wrong with it is found before anything is spent on it.

    Raises:
        ConfigError: it cannot be had as the config says.
    """
    from tune_topkd.data import load_dataset

    try:
        load_dataset(config.data)
    except ValueError as error:
        raise ConfigError("data", [Problem(key="", rule=str(error))]) from error


def taught_by(
    config: PairConfig, place: Place, console: Console, seed: int = 0, *, measure: bool = False, once: bool = False
) -> SharedFiles:
    """The teacher, trained first if need be, and the folder of the bank of its logits, if there is to be one.

    Args:
        config: whose teacher.
        place: where teachers are kept.
        console: is told of the teacher, and why it is asked for every batch if it is.
        seed: of the trainings; a bank of endless views is for one seed.
        measure: the teacher, even if it took long and was done before.
        once: for one training alone.

    Raises:
        ConfigError: it cannot be had.
    """
    return _files_of(_teacher(config, place, console, measure), config, place, console, seed, once)


def _files_of(
    teacher: "Teacher | None", config: PairConfig, place: Place, console: Console, seed: int, once: bool = False
) -> SharedFiles:
    if teacher is None:
        return NO_FILES
    folder = place.runs / "teachers" / teacher.key
    files = SharedFiles(teacher_checkpoint=str(teacher.path), teacher_bank=str(folder))
    trial = trial_with(config, files, seed)
    why_not = _no_bank(config, trial if once else _on_a_trials_device(config, trial), once)
    if why_not:
        console.print(f"teacher logits: asked for every batch: {why_not}", highlight=False, soft_wrap=True)
    return files.model_copy(update={"teacher_bank": None}) if why_not else files


def trial_with(config: PairConfig, files: SharedFiles, seed: int) -> TrialConfig:
    """The training that a pair's config describes by itself."""
    return TrialConfig(
        data=config.data,
        student=config.student,
        teacher=config.teacher.model if config.teacher and files.teacher_checkpoint else None,
        **files.model_dump(),
        method=config.method,
        loss=config.loss,
        recipe=config.recipe,
        seed=seed,
    )


def _packed(config: SweepConfig, files: SharedFiles, place: Place, console: Console) -> SweepConfig:
    """The config with each trial's share of a node, measured where it says `auto`.

    Raises:
        ResourceError: no trial can be run.
    """
    settings = config.sweep
    if AUTO not in (settings.cpus_per_trial, settings.gpus_per_trial):
        return config
    from tune_topkd.execution import Cluster
    from tune_topkd.execution import pack
    from tune_topkd.train import Probe

    trial = trial_with(config, files, settings.seed)
    if (sizes := config.space.get("batch_size")) is not None:  # the largest takes the most memory
        largest = max(value for value in (*(sizes.choices or ()), sizes.high) if isinstance(value, int | float))
        trial = trial.model_copy(update={"recipe": trial.recipe.model_copy(update={"batch_size": int(largest)})})
    with console.phase("measuring how many trials to run at once"), contextlib.ExitStack() as stack:
        with listening() as interruption, interruption.deferred():
            stack.enter_context(Cluster.attached(place.address))
        interruption.check()
        tried = pack(config, trial, Probe)
    best = tried[0]
    rates = ", ".join(f"{p.at_once}: {p.images_per_second:,.0f}" for p in sorted(tried, key=lambda p: p.at_once))
    text = f"packing: {_counted(best.at_once, 'trial')} at once, each on {_counted(best.share.cpus, 'CPU')}"
    text += f" and {_counted(best.share.gpus, 'GPU')}" if best.share.gpus else ""
    console.print(f"{text} (trials: images/s of all; {rates})", highlight=False, soft_wrap=True)
    return _with_share(config, Share(best.share.cpus, best.share.gpus))


def _counted(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def _on_a_trials_device(config: PairConfig, trial: TrialConfig) -> TrialConfig:
    """A bank is of the kind of device that computed it: the trials' may be the CPU though there is a GPU here."""
    on_cpu = isinstance(config, SweepConfig) and config.sweep.gpus_per_trial == 0
    return trial.model_copy(update={"gpu_share": 0.0}) if on_cpu else trial


def fill_bank(config: PairConfig, files: SharedFiles, seed: int, console: Console) -> None:
    """Ask the teacher for all that its bank lacks; may be killed and gone on with.

    Raises:
        ConfigError: there is to be no bank, or it cannot be filled.
    """
    from tune_topkd.teacher import fill_bank as fill
    from tune_topkd.train import device_of

    if files.teacher_bank is None:
        raise ConfigError("--fill-bank", [Problem(key="teacher", rule="has no bank for this space")])
    trial = _on_a_trials_device(config, trial_with(config, files, seed))
    with console.phase("filling the bank") as show:
        try:
            bank = fill(trial, device_of(trial), lambda share: show(f"filling the bank: {share:.0%}"))
        except ValueError as error:
            raise ConfigError("--fill-bank", [Problem(key="teacher", rule=str(error))]) from error
    console.print(f"bank: {bank.filled():,} views in {bank.path}", highlight=False, soft_wrap=True)


def _no_bank(config: PairConfig, trial: TrialConfig, once: bool = False) -> str:
    """Why there is no bank of the teacher's logits; nothing if there is one."""
    from tune_topkd.data import load_dataset
    from tune_topkd.data import view_count
    from tune_topkd.teacher import bank_file
    from tune_topkd.teacher import bank_size
    from tune_topkd.teacher import has_room
    from tune_topkd.train import device_of

    assert config.teacher is not None, "it has a bank"
    if not config.teacher.bank:
        return "teacher.bank is false"
    dataset = load_dataset(config.data)
    size = bank_size(config.data, config.recipe, dataset)
    if size is None:
        return "mixup shows each image once"
    path = bank_file(trial, dataset, device_of(trial))
    if once and view_count(config.data.augment) is None and not path.exists():
        return "a single training sees each view once"
    if not has_room(path, size):
        prune = calling.command("teacher", "--prune")
        return (
            f"a bank of {size.images:,} images × {size.views} views would take {size.bytes / 1e9:,.1f} GB, and with it "
            f"banks more than half of the disk; `{prune}` removes those that no sweep uses"
        )
    return ""


def _teacher(config: PairConfig, place: Place, console: Console, measure: bool = False) -> "Teacher | None":
    """Train or find the teacher, saying so: a checkpoint that is given is measured on the whole validation split."""
    if config.teacher is None:
        return None
    name, recipe = config.teacher.name, config.teacher.recipe
    from tune_topkd.teacher import ensure_teacher
    from tune_topkd.train import default_device
    from tune_topkd.train import train

    with console.phase(f"teacher {name}") as show:

        def progress(epoch: int, metrics: Any) -> None:
            if recipe is not None:
                top1 = next((f", {n} {v:.2f} %" for n, v in metrics.items() if n.endswith("_top1")), "")
                show(f"training the teacher {name}: epoch {epoch}/{recipe.epochs}{top1}")

        try:
            root, device = place.runs / "teachers", default_device()
            teacher = ensure_teacher(config, root, train, progress, device=device, measure=measure)
        except ValueError as error:
            raise ConfigError("teacher", [Problem(key="", rule=str(error))]) from error
    how = "found" if teacher.was_cached else "trained"
    when = f", measured {teacher.measured}" if teacher.measured else ""
    console.print(f"teacher {name}: {how}, validation top-1 {teacher.val_top1:.2f} %{when}", highlight=False)
    return teacher


def _driver(config: SweepConfig, places: Mapping[str, Any]) -> Driver:
    """Who drives the sweep from now on, from where, to how many trials, with its files where."""
    return Driver.here(trials=config.sweep.trials, folder=os.getcwd(), versions=versions(), places=places)


def _search(
    config: SweepConfig,
    ledger: Ledger,
    place: Place,
    files: SharedFiles,
    trackers: Sequence[Any],
    terminal: TextIO,
    interruption: Interruption,
) -> str:
    from tune_topkd.execution import Cluster
    from tune_topkd.execution import run_sweep
    from tune_topkd.search import Search
    from tune_topkd.train import train

    def give_up(message: str) -> None:
        """End the process where it hangs: what is in the ledger is on the disk."""
        resume = f"`{place.command('resume', ledger.state.header.sweep)}` goes on"
        terminal.write(f"\nerror: {message}; nothing is lost: {resume}\n")
        terminal.flush()
        os._exit(USER_ERROR)

    def note(text: str) -> None:
        """Say what the user should know and need do nothing about at once."""
        _log.warning("%s", text)
        _say(terminal, f"note: {text}")

    search = Search(config, ledger, trackers)
    if search.is_finished or search.fatal:
        return search.stopped()
    weights = Path(files.teacher_checkpoint) if files.teacher_checkpoint else None
    hashes = identity.file_hashes(config, ledger.state.identities, weights)
    with interruption.deferred(), Cluster.attached(place.address, give_up) as cluster:
        return run_sweep(
            search,
            cluster=cluster,
            folder=ledger.path.parent,
            train=train,
            files=files,
            hashes=hashes,
            interruption=interruption,
            note=note,
        )


@contextlib.contextmanager
def _dataset_file(config: SweepConfig, folder: Path, console: Console) -> Iterator[str | None]:
    """The dataset in a file, for as long as this lasts: the trials on a node map it, and hold its images once."""
    from tune_topkd.data import load_dataset
    from tune_topkd.data import save_dataset

    path = folder / DATASET_FILE
    try:
        for left in folder.glob(f".{DATASET_FILE}.*"):  # of a driver that was killed as it wrote
            left.unlink()
        is_written = save_dataset(config.data, load_dataset(config.data), path)
    except OSError as error:
        is_written = False
        text = f"note: each worker reads the dataset by itself: {path}: {error.strerror or error}"
        console.print(text, style="yellow", soft_wrap=True)
    try:
        yield str(path.absolute()) if is_written else None
    finally:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s is left there: %s", path, error.strerror or error)


@contextlib.contextmanager
def _trackers(config: SweepConfig, ledger: Ledger, place: Place, console: Console) -> Iterator[list[Any]]:
    from tune_topkd.tracking import MlflowTracker

    progress = display.ProgressDisplay(config, ledger.path, ledger.state.last_seq, console)
    mlflow = MlflowTracker(ledger.path, place.mlflow_uri)
    try:
        yield [mlflow, progress]
    finally:
        progress.close()
        mlflow.close()


def _finish(config: SweepConfig, state: SweepState, place: Place, console: Console) -> None:
    """Write the answer and say what was found, where it lies and what to do next."""
    from tune_topkd.tracking import ui_command

    name = state.header.sweep
    folder = place.folder(name)
    counts = ", ".join(f"{n} {status}" for status, n in state.counts().items() if n)
    if state.best() is None and state.stop_reason in ("interrupted", "time_budget") and not state.counts()["failed"]:
        done = f"{counts or 'no trials'} so far, none of them of the full budget"
        console.print(f"{name}: {done}; {state.stop_reason.replace('_', ' ')}", soft_wrap=True)
        return
    if state.best() is None:
        errors = sorted({f"{r.reason}: {r.error}" for r in state.trials.values() if r.error})
        console.print(f"{name}: no trial reached the full budget ({counts or 'no trials'})", style="bold red")
        for error in errors[:3]:
            console.print(f"  {error}", style="red", soft_wrap=True)
        traces = f"  traces lie in {folder}/trials/*/error.txt, the libraries' words in {folder / LOG_FILE}"
        console.print(traces, soft_wrap=True)
        return
    write_text(folder / TUNED_FILE, as_yaml(answer(config, state)))
    console.print(display.result_table(config, state))
    images = _validation_images(config)
    for gain in display.gains(config, state, images):
        console.print(f"  {gain.sentence}", style="bold" if gain.counts else "", soft_wrap=True)
    if advice := display.advice(config, state):
        console.print(f"  {advice}", soft_wrap=True)
    console.print(f"{name}: {counts}; {state.stop_reason.replace('_', ' ')}", soft_wrap=True)
    if state.stop_reason == "failed":
        text = f"  given up     the newest trials all ended on {state.ended[-1].error}"
        console.print(text, style="red", soft_wrap=True)
    console.print(f"  the answer   {folder / TUNED_FILE}", soft_wrap=True)
    console.print(f"  the truth    {folder / LEDGER_FILE}", soft_wrap=True)
    console.print(f"  MLflow       {ui_command(place.mlflow_uri)}", soft_wrap=True)
    if Path("analysis/sweep.ipynb").exists():
        console.print("  the analysis analysis/sweep.ipynb")
    following = ("export", name, "--format", "python") if state.stop_reason == "finished" else ("resume", name)
    console.print(f"next: {place.command(*following)}", style="bold", soft_wrap=True)


def _validation_images(config: SweepConfig) -> int:
    from tune_topkd.data import load_dataset

    return len(load_dataset(config.data).val)


def answer(config: SweepConfig, state: SweepState) -> TunedConfig:
    """The tuned config of a sweep.

    Raises:
        NoAnswerError: no trial reached the full budget.
    """
    return tuned_config(config, state, preflight.loss_defaults(config))


def warm_starts(sweep: str, place: Place, config: SweepConfig, console: Console) -> list[dict[str, Any]]:
    """The parameters of another sweep's best trials, to be tried first, brought into this space: each only once.

    Args:
        sweep: the other one.
        place: where it is.
        config: of the sweep that is to begin; its defaults are tried anyway.
        console: is told of each value that is another one here.

    Raises:
        ConfigError: there is no such sweep, or it lacks parameters of this space.
    """
    ranked = read_state(place.existing(sweep) / LEDGER_FILE).ranked()
    missing = sorted(set(config.space) - set(ranked[0].params)) if ranked else []
    if not ranked or missing:
        rule = f"its trials lack {', '.join(missing)}" if missing else "has no trial that reached the full budget"
        raise ConfigError("--warm-start", [Problem(key=sweep, rule=rule)])
    space = Space.of(config)
    tried = [space.params(space.proposal(params)) for params in preflight.first_proposals(config)]
    found: list[dict[str, Any]] = []
    for record in ranked:
        params = space.params(space.proposal(record.params))
        if len(found) < WARM_STARTS and not any(display.is_same(params, other) for other in [*tried, *found]):
            found.append(params)
            scaled = config.relative.of if config.relative else []  # of which only the ratios matter
            kept = {name: value for name, value in params.items() if name not in scaled}
            for told in display.changes(record.params, kept):
                text = f"note: --warm-start {sweep}: trial {record.key.number}: {told}, the nearest in this space"
                console.print(text, style="yellow", soft_wrap=True)
    return found


def versions() -> dict[str, str]:
    """The versions of what a result depends on."""
    found = {"tune_topkd": __version__}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit() -> str | None:
    """The commit of the checkout this program is run from, with a + if files differ from it; none if it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "launch.py").exists():  # a repository around the environment is another project's
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Python's logging goes where stderr goes now: the sweep's log."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
