"""A sweep, as a Python program has it: created, run, resumed, asked."""

from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import TypeVar

from tune_topkd.config import ConfigError
from tune_topkd.config import Override
from tune_topkd.config import Problem
from tune_topkd.config import SweepConfig
from tune_topkd.config import read_yaml
from tune_topkd.export import TunedConfig
from tune_topkd.findings import Findings
from tune_topkd.findings import Row
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import Winner
from tune_topkd.ledger import baseline_trial
from tune_topkd.ledger import finalists_done
from tune_topkd.ledger import read_state
from tune_topkd.ledger import winner_of
from tune_topkd.sweep import preflight
from tune_topkd.sweep.callbacks import Callback
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.campaign import figures_of
from tune_topkd.sweep.campaign import hours_of
from tune_topkd.sweep.campaign import row_of
from tune_topkd.sweep.confirm import Plan
from tune_topkd.sweep.continuing import Continuation
from tune_topkd.sweep.continuing import continuation
from tune_topkd.sweep.driver import Limits
from tune_topkd.sweep.driver import Turn
from tune_topkd.sweep.recommending import Searched
from tune_topkd.sweep.result import Result
from tune_topkd.sweep.result import answer
from tune_topkd.sweep.spend import Spend
from tune_topkd.sweep.spend import spend
from tune_topkd.sweep.warm_start import warm_starts
from tune_topkd.sweep.workspace import CONFIG_FILE
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.sweep.workspace import condition
from tune_topkd.sweep.workspace import frozen_config
from tune_topkd.sweep.workspace import moved_places
from tune_topkd.verdict import Verdict
from tune_topkd.verdict import verdict_of

if TYPE_CHECKING:
    from tune_topkd.execution import Executor
    from tune_topkd.sweep.page import CommandLine

Overrides = Mapping[str, Any] | Sequence[Override]
"""Values by dotted key, such as `{"sweep.trials": 8}`, or with where each came from."""


@dataclass(frozen=True)
class Status:
    """How a sweep stands."""

    sweep: str
    condition: str
    """`running`, `finished`, `failed`, `interrupted`, `out of time`, `out of GPU hours`, `out of CPU hours`,
    `stopped by trouble` or `killed`."""
    error: str
    """What stopped it, if an error did."""
    plateau: str
    """Why its search ended before its last trial, in a sentence; empty if it did not."""
    trials: dict[str, int]
    """How many are completed, pruned, failed, running; interrupted instead, where nobody runs them."""
    target: int
    """The trials that the search is to have."""
    best: TrialRecord | None
    """The trial that is the answer so far; `winner` has its fresh seeds."""
    baselines: dict[str, TrialRecord]
    """The trial that stands for each baseline: its best, on fresh seeds where several of its trials have them."""
    baseline_trials: dict[str, int]
    """As `trials`, of all baselines together."""
    spend: Spend
    """What its trainings have cost."""
    description: str
    """The one of its YAML; empty where that cannot be read."""
    begun: float
    """In Unix seconds."""
    figures: dict[str, Any]
    """The answer's `top1`, what that was `measured_on` and its `gains`, as a `Row` has them; empty without an answer."""
    cpu_hours: float
    """Of all its trainings."""
    gpu_hours: float
    winner: Winner | None = None
    """The answer, with what its fresh seeds gave, if it was chosen by them."""
    finalists: tuple[int, int] | None = None
    """How many of the finalists' trainings have ended, and of how many; None if none are to be."""
    verdict: Verdict | None = None
    """What the newest look at the test set says; None if there was none."""


@dataclass(frozen=True)
class Sweep:
    """A search for the best hyperparameters of one dataset, teacher and student.

        sweep = Sweep.create("digits", name="tonight", overrides={"sweep.trials": 16})
        result = sweep.run()
        print(result.best.params)

    What it does is what the command line does: the same folder, ledger and MLflow runs, so each can go on with what the
    other began. It prints nothing; a `Callback` is told of all there is to tell.

    Attributes:
        name: its folder in the runs folder.
        workspace: where it lies and runs.
        notes: what should be known of its config before it is run.
    """

    name: str
    workspace: Workspace
    notes: tuple[str, ...] = ()
    _new: preflight.Checked | None = field(default=None, repr=False)
    _first: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    _begun: Continuation | None = field(default=None, repr=False)

    @classmethod
    def create(
        cls,
        space: str | Path | Mapping[str, Any],
        *,
        name: str | None = None,
        runs_dir: str | Path | None = None,
        overrides: Overrides = (),
        mlflow_uri: str | None = None,
        address: str | None = None,
        priority: float = 1.0,
        warm_start: str | Sequence[str] = (),
        or_resume: bool = False,
    ) -> "Sweep":
        """A new sweep, checked as far as can be before anything is spent; nothing is written before it is run.

        Args:
            space: the path of a search-space YAML, the bare name of one, or what would stand in one.
            name: of the sweep; by default the YAML's.
            runs_dir: where sweeps lie, a folder or the URI of a store (`s3://BUCKET/PREFIX`); by default
                `TUNE_TOPKD_RUNS_DIR`, or `runs`.
            overrides: values that replace the space's.
            mlflow_uri: MLflow's; by default `MLFLOW_TRACKING_URI`, or SQLite in the runs folder. Empty for no MLflow.
            address: a running Ray cluster; by default `RAY_ADDRESS`. `local`, and none at all, is a private one.
            priority: above 0, among the sweeps on that cluster: with 3 a sweep gets three times what one with 1 gets.
            warm_start: a sweep of the runs folder, or several, whose best trials are tried first.
            or_resume: if the sweep has begun, `run` goes on with it: with as many trials as are asked for now if these
                are more, with this time budget, and with its files where they are now.

        Raises:
            ConfigError: with every problem of the config, the name and this machine; with `or_resume` also each key
                that differs from those of the sweep that has begun.
        """
        workspace = Workspace.at(runs_dir, mlflow_uri, address, priority)
        return cls.new(space, name, workspace, as_overrides(overrides), warm_start, or_resume)

    @classmethod
    def new(
        cls,
        space: str | Path | Mapping[str, Any],
        name: str | None,
        workspace: Workspace,
        overrides: Sequence[Override] = (),
        warm_start: str | Sequence[str] = (),
        or_resume: bool = False,
    ) -> "Sweep":
        """As `create`, in a workspace that there is."""
        name = name or default_name(space)

        def checked() -> preflight.Checked:
            found = preflight.load_checked(space, overrides)
            if workspace.address is None:
                preflight.check_machine(found.config, found.source)
            return found

        found, _ = all_of([checked, lambda: None if or_resume else workspace.check_free(name)])
        assert isinstance(found, preflight.Checked), "the first of the two"
        if or_resume and (begun := continuation(found.config, found.source, name, workspace)) is not None:
            return cls(name, workspace, _begun=begun)
        workspace.check_free(name)
        notes = [] if found.is_reviewed else list(found.warnings)
        others = [warm_start] if isinstance(warm_start, str) else warm_start
        first = warm_starts(others, workspace, found.config, notes.append)
        return cls(name, workspace, tuple(notes), found, tuple(first))

    @classmethod
    def open(
        cls,
        name: str,
        *,
        runs_dir: str | Path | None = None,
        mlflow_uri: str | None = None,
        address: str | None = None,
        priority: float = 1.0,
    ) -> "Sweep":
        """A sweep that has begun; the arguments are those of `create`.

        Raises:
            ConfigError: there is none of this name.
        """
        workspace = Workspace.at(runs_dir, mlflow_uri, address, priority)
        workspace.existing(name)
        return cls(name, workspace)

    @property
    def source(self) -> str:
        """Where its config comes from: the path of a YAML."""
        return self._new.source if self._new is not None else str(self.folder / CONFIG_FILE)

    @property
    def folder(self) -> Path:
        """Where its ledger, its checkpoints and its answer lie."""
        return self.workspace.folder(self.name)

    @property
    def config(self) -> SweepConfig:
        """The complete config: of a sweep that has begun the frozen one.

        Raises:
            ConfigError: it has been changed by hand, or is gone.
            LedgerError: the ledger is damaged.
        """
        if self._new is not None and not self.workspace.has_begun(self.name):
            return self._new.config
        return frozen_config(self.folder, read_state(self.folder / LEDGER_FILE))

    def run(self, callbacks: Sequence[Callback] = (), *, executor: "Executor | None" = None) -> Result:
        """Run a sweep that `create` gave to its end, an interruption or its time budget; with `or_resume` what is left.

        On the main thread Ctrl-C, SIGTERM and SIGHUP end it cleanly: the result says `interrupted`, and `resume` goes on.

        Args:
            callbacks: watch it.
            executor: where trials run; by default the workspace's Ray.

        Raises:
            ConfigError: the data or the teacher cannot be had as the config says, or the sweep has been run.
            LedgerError: another process has begun a sweep of this name.
            TuneTopKDError: the sweep cannot go on; what it has is safe.
            OSError: the disk is full or read-only; what it has is safe.
        """
        if (begun := self._begun) is not None:
            turn = Turn(self.workspace, Watchers(callbacks), executor, begun.places)
            return turn.resume(self.name, begun.limits)
        if self._new is None:
            rule = "is there already: `resume` goes on with it"
            raise ConfigError("SWEEP", [Problem(key=self.name, rule=rule)])
        preflight.check_writable(self.workspace.runs)
        watchers = Watchers(callbacks)
        for text in self.notes:
            watchers.note(text)
        return Turn(self.workspace, watchers, executor).start(self._new, self.name, self._first)

    def resume(
        self,
        callbacks: Sequence[Callback] = (),
        *,
        trials: int | None = None,
        time_budget: float | None = None,
        gpu_hours: float | None = None,
        cpu_hours: float | None = None,
        moved: Overrides = (),
        executor: "Executor | None" = None,
    ) -> Result:
        """Run what is left of the sweep; finished trials are not run again.

        Args:
            callbacks: watch it.
            trials: instead of the number that it was to have.
            time_budget: in seconds; it had its own, if any.
            gpu_hours: of the whole sweep, those it has had included, instead of its limit so far.
            cpu_hours: likewise.
            moved: where its files are now, such as `{"data.root": "/data"}`; the space never changes.
            executor: where trials run; by default the workspace's Ray.

        Raises:
            ConfigError: the sweep, its config or what it depends on is not as it was when it began, or an argument is
                not as it must be. Nothing has then been written.
            LedgerError: the ledger is damaged, or another process drives the sweep.
            TuneTopKDError: the sweep cannot go on; what it has is safe.
            OSError: the disk is full or read-only; what it has is safe.
        """
        places = moved_places(as_overrides(moved))
        limits = Limits(trials, time_budget, gpu_hours, cpu_hours)
        return Turn(self.workspace, Watchers(callbacks), executor, places).resume(self.name, limits)

    def confirm(
        self,
        callbacks: Sequence[Callback] = (),
        *,
        finalists: int = 3,
        seeds: int = 5,
        again: bool = False,
        moved: Overrides = (),
        executor: "Executor | None" = None,
    ) -> Result:
        """Confirm the answer of a sweep that is over: choose it on fresh seeds, then measure it on the test set, once.

        First the most promising trials and the best one of each baseline are trained again on the same fresh seeds; the
        trial with the best mean on the validation split is the answer. Then the answer and the baselines are trained on
        further seeds, on the images of the validation split too, and evaluated on the test set after their last epoch.
        What an interruption leaves, this goes on with, and so does `resume`.

        Args:
            callbacks: watch it.
            finalists: trials that are compared.
            seeds: of each of the two stages.
            again: look at a test set that has been read; the result is marked as of a further look.
            moved: as for `resume`.
            executor: where trainings run; by default the workspace's Ray.

        Raises:
            ConfigError: the search is not over or has too few trials of the full budget, the test set has been read, or
                as for `resume`. Nothing has then been written.
            LedgerError: the ledger is damaged, or another process drives the sweep.
            TuneTopKDError: it cannot go on; what it has is safe.
            OSError: the disk is full or read-only; what it has is safe.
        """
        turn = Turn(self.workspace, Watchers(callbacks), executor, moved_places(as_overrides(moved)))
        return turn.confirm(self.name, Plan(finalists, seeds, again))

    def status(self) -> Status:
        """How it stands.

        Raises:
            ConfigError: it has not begun.
            LedgerError: its ledger is damaged.
        """
        folder = self.workspace.existing(self.name)
        return status_of(self.name, folder, read_state(folder / LEDGER_FILE))

    def row(self) -> Row:
        """What it found, as a row of a campaign's table.

        Raises:
            ConfigError: it has not begun, or its config has been changed by hand.
            LedgerError: its ledger is damaged.
        """
        found = self.searched()
        return row_of(found.config, found.state, found.complete)

    def searched(self) -> Searched:
        """What it was searched over, and what became of its trials.

        Raises:
            ConfigError: it has not begun, or its config has been changed by hand.
            LedgerError: its ledger is damaged.
        """
        folder = self.workspace.existing(self.name)
        state = read_state(folder / LEDGER_FILE)
        config = frozen_config(folder, state)
        return Searched(config, state, preflight.known_parameters(config))

    def findings(self, command: "CommandLine | None" = None) -> Findings:
        """All that a report page tells of it; `tune_topkd.report.page.sweep_page` makes the page.

        Args:
            command: makes the command lines that the page names; by default they are those of `tune-topkd`.

        Raises:
            ConfigError: it has not begun, or its config has been changed by hand.
            LedgerError: its ledger is damaged.
        """
        from tune_topkd.sweep.page import findings_from
        from tune_topkd.sweep.page import plain_command

        found, folder = self.searched(), self.folder
        how = condition(folder, found.state)
        return findings_from(found.config, found.state, folder, how, command or plain_command(self.workspace))

    def answer(self) -> TunedConfig:
        """The tuned config.

        Raises:
            NoAnswerError: no trial reached the full budget.
            ConfigError: it has not begun, or its config has been changed by hand.
            LedgerError: its ledger is damaged.
        """
        folder = self.workspace.existing(self.name)
        state = read_state(folder / LEDGER_FILE)
        return answer(frozen_config(folder, state), state)

    def export(self, path: str | Path, format: str = "yaml") -> None:
        """Write the tuned config or the student for another project, as `Result.export` does.

        Raises:
            ConfigError: it has not begun, or its config has been changed by hand.
            LedgerError: its ledger is damaged.
            TuneTopKDError: as `Result.export`; so is what follows.
            OSError: the file cannot be written.
        """
        folder = self.workspace.existing(self.name)
        state = read_state(folder / LEDGER_FILE)
        Result(self.name, folder, frozen_config(folder, state), state, state.stop_reason).export(path, format)


def status_of(name: str, folder: Path, state: SweepState) -> Status:
    """How a sweep stands.

    Args:
        name: the sweep's.
        folder: the sweep's.
        state: what its ledger tells.
    """
    how, of_baselines = condition(folder, state), Counter[str]()
    for method in state.baseline_methods():
        of_baselines.update(state.counts(method))
    winner, spent = winner_of(state), spend(state)
    cpu_hours, gpu_hours = hours_of(state, spent)
    return Status(
        sweep=name,
        condition=how,
        error=state.stop_error,
        plateau="" if state.plateau is None else state.plateau.sentence,
        trials=_by_status(state.counts(), how),
        target=state.target,
        best=None if winner is None else winner.record,
        baselines={m: record for m in state.baseline_methods() if (record := baseline_trial(state, m)) is not None},
        baseline_trials=_by_status(of_baselines, how),
        winner=winner,
        finalists=finalists_done(state),
        verdict=verdict_of(state),
        spend=spent,
        description=_description(folder),
        begun=state.started_at,
        figures=figures_of(state),
        cpu_hours=cpu_hours,
        gpu_hours=gpu_hours,
    )


def _by_status(counts: Mapping[str, int], how: str) -> dict[str, int]:
    """How many trials have each status; those at work are interrupted where nobody runs them."""
    told = {s.value: counts[s] for s in (TrialStatus.COMPLETED, TrialStatus.PRUNED, TrialStatus.FAILED)}
    running = counts[TrialStatus.RUNNING]
    return told | ({"running": running} if how == "running" else {"running": 0, "interrupted": running})


def _description(folder: Path) -> str:
    try:
        return str(read_yaml(folder / CONFIG_FILE).get("description") or "")
    except (ConfigError, OSError):  # how a sweep stands can be told without it
        return ""


def default_name(space: str | Path | Mapping[str, Any]) -> str:
    """The name of a sweep that is given none: the YAML's.

    Raises:
        ConfigError: there is no YAML.
    """
    if isinstance(space, Mapping):
        raise ConfigError("name", [Problem(key="", rule="must be given: the search space comes from no file")])
    return Path(space).stem


def as_overrides(overrides: Overrides) -> list[Override]:
    """Overrides, also of plain values by key."""
    if isinstance(overrides, Mapping):
        return [Override(key, value, f"overrides: {key}") for key, value in overrides.items()]
    return list(overrides)


_ResultT = TypeVar("_ResultT")
_SEVERAL = "what was asked for"


def all_of(calls: Iterable[Callable[[], _ResultT]]) -> list[_ResultT]:
    """The results of all calls, or one error with the problems that any of them finds."""
    results: list[_ResultT] = []
    errors: list[ConfigError] = []
    for call in calls:
        try:
            results.append(call())
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        told = [e.problems if e.source == _SEVERAL else [Problem(key="", rule=str(e))] for e in errors]
        raise ConfigError(_SEVERAL, [problem for problems in told for problem in problems])
    return results
