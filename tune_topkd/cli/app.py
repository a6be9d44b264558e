"""The commands. Output for people goes to stderr, results for programs to stdout.

Exit codes: 0 done; 1 an audit found something; 2 the input is wrong or the machine in the way (one message, no traceback);
3 the sweep ended without one successful trial, or with an error that all further trials would make; 130 interrupted (129
if the terminal was closed), and `resume` goes on.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from typing import Any

import typer
from rich.console import Console

from tune_topkd.cli import preflight
from tune_topkd.cli import running
from tune_topkd.config import SWEEP_NAME
from tune_topkd.config import ConfigError
from tune_topkd.config import Override
from tune_topkd.config import Problem
from tune_topkd.config import dump_config
from tune_topkd.config import parse_set
from tune_topkd.export import WRITERS
from tune_topkd.export import write_text
from tune_topkd.trials import LEDGER_FILE
from tune_topkd.trials import TrialStatus
from tune_topkd.trials import read_state

DEFAULT_SPACE = "search_spaces/digits.yaml"
FINDINGS = 1

Format = StrEnum("Format", {name: name for name in WRITERS})  # type: ignore[misc]  # the choices are the writers
YAML = Format("yaml")

app = typer.Typer(
    help="Find the best K, scaling factors, loss weights and learning rate for a TopKD distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunsDir = Annotated[
    Path, typer.Option("--runs-dir", envvar="TUNE_TOPKD_RUNS_DIR", help="Where sweeps, teachers and mlflow.db lie.")
]
MlflowUri = Annotated[
    str | None,
    typer.Option("--mlflow-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow's URI [default: SQLite in the runs dir]."),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_ADDRESS",
        help="A running Ray cluster, or local [default: a private one on this machine].",
    ),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the YAML; may be repeated.")
]
Spaces = Annotated[list[str] | None, typer.Argument(metavar="[SPACE.yaml]...", help=f"[default: {DEFAULT_SPACE}]")]
Trials = Annotated[int | None, typer.Option(help="Trials of the search; the baselines come on top.")]
TimeBudget = Annotated[float | None, typer.Option(help="Seconds after which no trial goes on.")]


def main() -> None:
    """Run the command line and exit with its code; a user's mistake is one message on stderr."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where package.module:loss of a user's project is found
    try:
        app(standalone_mode=True)
    except Exception as error:  # noqa: BLE001 (what is not for the user is raised again)
        _tell(_told(error))
        sys.exit(running.USER_ERROR)


def _told(error: Exception) -> str:
    """What a person is told of an error that is theirs or their machine's.

    Raises:
        Exception: the error itself, if it is neither: a fault of ours.
    """
    if isinstance(error, OSError):
        return f"{error.filename or 'the disk'}: {error.strerror or error}"
    if isinstance(error, ValueError) and type(error).__module__.partition(".")[0] == "tune_topkd":
        return str(error)
    raise error


@app.command()
def run(
    spaces: Spaces = None,
    name: Annotated[str | None, typer.Option(help="The sweep's name [default: the YAML's].")] = None,
    trials: Trials = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of a full trial.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the proposals and of every trial.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Trials at once [default: what fits].")] = None,
    cpus_per_trial: Annotated[str | None, typer.Option(metavar="N|auto", help="auto: measured.")] = None,
    gpus_per_trial: Annotated[
        str | None,
        typer.Option(metavar="N|auto", help="May be a fraction: 0.25 shares a GPU by four. auto: measured."),
    ] = None,
    time_budget: TimeBudget = None,
    runs_dir: RunsDir = Path("runs"),
    mlflow_uri: MlflowUri = None,
    address: Address = None,
    warm_start: Annotated[str | None, typer.Option(metavar="SWEEP", help="Try that sweep's best first.")] = None,
    set_: Sets = None,
) -> None:
    """Search each SPACE.yaml and export its tuned config."""
    options = {
        "sweep.trials": ("--trials", trials),
        "recipe.epochs": ("--epochs", epochs),
        "sweep.seed": ("--seed", seed),
        "sweep.max_concurrent": ("--max-concurrent", max_concurrent),
        "sweep.cpus_per_trial": ("--cpus-per-trial", _number(cpus_per_trial)),
        "sweep.gpus_per_trial": ("--gpus-per-trial", _number(gpus_per_trial)),
        "sweep.time_budget": ("--time-budget", time_budget),
    }
    overrides = [parse_set(text) for text in set_ or []]
    overrides += [Override(key, value, option) for key, (option, value) in options.items() if value is not None]
    sources = spaces or [DEFAULT_SPACE]
    place, console = _place(runs_dir, mlflow_uri, address), _stderr()
    sweeps = _named(_all_checked(sources, overrides), name)
    for sweep, checked in sweeps.items():
        running.check_name(sweep, place)
        if place.address is None:
            preflight.check_machine(checked.config, checked.source)
    warm = {s: running.warm_starts(warm_start, place, c.config) if warm_start else [] for s, c in sweeps.items()}
    preflight.check_writable(place.runs)
    _conclude(_each_run(sweeps, warm, place, console), console)


def _each_run(
    sweeps: Mapping[str, preflight.Checked],
    warm: Mapping[str, Sequence[dict[str, Any]]],
    place: running.Place,
    console: Console,
) -> dict[str, running.Outcome | str]:
    """How each sweep ended, or what kept it from running; after an interruption the rest is not begun."""
    outcomes: dict[str, running.Outcome | str] = {}
    for sweep, checked in sweeps.items():
        console.print(f"sweep {sweep}: {checked.source}", style="bold", highlight=False)
        try:
            outcomes[sweep] = outcome = running.start(checked, sweep, place, console, warm[sweep])
        except Exception as error:
            if len(sweeps) == 1:
                raise
            outcomes[sweep] = told = _told(error)
            _tell(told)
            continue
        if outcome.is_interrupted:
            break
    return outcomes


@app.command()
def check(
    spaces: Annotated[list[str], typer.Argument(metavar="SPACE.yaml...")],
    set_: Sets = None,
    show: Annotated[bool, typer.Option("--show", help="Print the complete config on stdout.")] = False,
) -> None:
    """Validate search spaces, print what would run and what it would cost; start nothing."""
    from tune_topkd.cli.cost import describe

    console = _stderr()
    for checked in _all_checked(spaces, [parse_set(text) for text in set_ or []]):
        console.print(f"{checked.source}: valid", style="bold green", highlight=False)
        for line in describe(checked.config):
            console.print(f"  {line}", soft_wrap=True, highlight=False)
        for warning in checked.warnings:
            console.print(f"  note: {warning}", style="yellow", soft_wrap=True, highlight=False)
        if show:
            typer.echo(dump_config(checked.config))


@app.command()
def resume(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP")],
    trials: Trials = None,
    time_budget: TimeBudget = None,
    runs_dir: RunsDir = Path("runs"),
    mlflow_uri: MlflowUri = None,
    address: Address = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Where files are now: data.root=PATH; may be repeated."),
    ] = None,
) -> None:
    """Go on with a sweep after any interruption; finished trials are not run again."""
    place = _place(runs_dir, mlflow_uri, address)
    moved = [parse_set(text) for text in set_ or []]
    _conclude({sweep: running.resume(sweep, place, _stderr(), trials, time_budget, moved)}, _stderr())


@app.command()
def status(
    sweep: Annotated[str | None, typer.Argument(metavar="[SWEEP]", help="[default: all]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout (a list without SWEEP).")] = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Show how sweeps stand."""
    place = _place(runs_dir, None, None)
    names = [sweep] if sweep else place.sweeps()
    found = [_status(name, place) for name in names]
    if as_json:
        typer.echo(json.dumps(found[0] if sweep else found, indent=2))
        return
    if not found:
        _stderr().print(f"no sweeps in {place.runs}")
    for entry in found:
        counts = ", ".join(f"{n} {what}" for what, n in entry["trials"].items() if n)
        best = entry["best"]
        tail = f"; best {best['val_top1']:.2f} % (trial {best['number']})" if best else ""
        typer.echo(f"{entry['sweep']}: {entry['state']}, {counts or 'no trials'} of {entry['target']}{tail}")


@app.command()
def track(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP")],
    runs_dir: RunsDir = Path("runs"),
    mlflow_uri: MlflowUri = None,
) -> None:
    """Write into MLflow what it lacks of a sweep; any number of times gives the same."""
    from tune_topkd.cli.upkeep import track as write

    place = _place(runs_dir, mlflow_uri, None)
    write(sweep, place)
    _stderr().print(f"MLflow has all of {sweep}", highlight=False)


@app.command()
def audit(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP")],
    mlflow: Annotated[bool, typer.Option(help="Compare MLflow with the ledger too.")] = True,
    runs_dir: RunsDir = Path("runs"),
    mlflow_uri: MlflowUri = None,
) -> None:
    """Check every decision of a sweep and all that is told of it against its ledger; exit 1 with a list of what is wrong."""
    from tune_topkd.cli.upkeep import audit as findings_of

    findings = findings_of(sweep, _place(runs_dir, mlflow_uri, None), mlflow)
    for finding in findings:
        typer.echo(finding)
    if findings:
        _stderr().print(f"{sweep}: {len(findings)} findings", style="bold red", highlight=False)
        raise typer.Exit(FINDINGS)
    _stderr().print(f"{sweep}: nothing is wrong", style="bold green", highlight=False)


@app.command()
def export(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP")],
    format_: Annotated[Format, typer.Option("--format")] = YAML,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="[default: stdout]")] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write a sweep's tuned config for other projects."""
    place = _place(runs_dir, None, None)
    folder = place.existing(sweep)
    state = read_state(folder / LEDGER_FILE)
    tuned = running.answer(running.begun_config(folder, state), state)
    text = WRITERS[format_.value](tuned)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_text(output, text)
        _stderr().print(f"written: {output}", highlight=False, soft_wrap=True)


@app.command()
def teacher(
    space: Annotated[str | None, typer.Argument(metavar="SPACE.yaml")] = None,
    set_: Sets = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure it on the validation split again, though it took long before.")
    ] = False,
    fill_bank: Annotated[
        bool, typer.Option("--fill-bank", help="Ask it ahead for all logits that trials need.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove the banks of logits that no sweep in the runs dir names.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the trials, where their views are drawn anew in each epoch.")] = 0,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Train or check the teacher of a search space; prints the path of its weights."""
    if prune:
        from tune_topkd.cli.pruning import prune as remove_banks

        remove_banks(_place(runs_dir, None, None), _stderr())
        if space is None:
            return
    if space is None:
        raise ConfigError("SPACE.yaml", [Problem(key="", rule="must be given, except for --prune")])
    config = preflight.load_checked_pair(space, [parse_set(text) for text in set_ or []])
    place = _place(runs_dir, None, None)
    preflight.check_writable(place.runs)
    if config.teacher is None:
        raise ConfigError(space, [Problem(key="teacher", rule="there is none: this space learns without one")])
    running.ready_data(config)
    taught = running.taught_by(config, place, _stderr(), seed, measure=measure)
    if fill_bank:
        running.fill_bank(config, taught, seed, _stderr())
    typer.echo(taught.teacher_checkpoint)


@app.command()
def train(
    space: Annotated[str, typer.Argument(metavar="SPACE.yaml")],
    set_: Sets = None,
    name: Annotated[str | None, typer.Option(help="[default: the YAML's]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of the training.")] = None,
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    runs_dir: RunsDir = Path("runs"),
    mlflow_uri: MlflowUri = None,
) -> None:
    """Train one config without a sweep: what the YAML and --set say, the method's defaults for the rest."""
    from tune_topkd.cli.training import train_one

    overrides = [parse_set(text) for text in set_ or []]
    overrides += [Override("recipe.epochs", epochs, "--epochs")] if epochs is not None else []
    config = preflight.load_checked_pair(space, overrides)
    label = name or Path(space).stem
    if not SWEEP_NAME.fullmatch(label):
        rule = "must be letters, digits, '.', '_' and '-', and begin with a letter or digit"
        raise ConfigError("--name", [Problem(key=label, rule=rule)])
    place = _place(runs_dir, mlflow_uri, None)
    preflight.check_writable(place.runs)
    result = train_one(config, label, seed, place, _stderr())
    typer.echo(json.dumps(result, indent=2))
    if result["diverged"]:
        raise typer.Exit(running.NO_SUCCESS)


@app.command()
def doctor(runs_dir: RunsDir = Path("runs"), mlflow_uri: MlflowUri = None, address: Address = None) -> None:
    """Tell what is installed, what the cluster has, and what is wrong; exit 2 if something is."""
    from tune_topkd.cli.doctor import examine

    place = dataclasses.replace(_place(runs_dir, mlflow_uri, None), address=_cluster_of(address))
    is_well = True
    for finding in examine(place, _progress_of(_stderr())):
        mark = "ok " if finding.is_well else "BAD"
        typer.echo(f"{mark} {finding.what}: {finding.text}")
        is_well &= finding.is_well
    if not is_well:
        raise typer.Exit(running.USER_ERROR)


def _progress_of(console: Console) -> Callable[[str], AbstractContextManager[Any]]:
    """Shows on a terminal what is being done, while it is; says it in a line elsewhere."""

    def progress(what: str) -> AbstractContextManager[Any]:
        if console.is_terminal:
            return console.status(what)
        console.print(f"{what} …", highlight=False)
        return nullcontext()

    return progress


def _status(name: str, place: running.Place) -> dict[str, Any]:
    folder = place.existing(name)
    state = read_state(folder / LEDGER_FILE)
    condition = running.sweep_state_name(folder, state)
    counts = {s.value: state.counts()[s.value] for s in TrialStatus}
    counts = {key: counts[key] for key in ("completed", "pruned", "failed", "running")}
    if condition != "running":  # nobody is running them; `resume` will
        counts |= {"running": 0, "interrupted": counts["running"]}
    best = state.best()
    return {
        "sweep": name,
        "state": condition,
        "trials": counts,
        "target": state.target,
        "best": best and {"number": best.key.number, "val_top1": best.value, "params": best.params},
        "baselines": {
            method: {"val_top1": record.value, "params": record.params}
            for method in sorted({key.arm for key in state.trials} - {"search"})
            if (record := state.best(method)) is not None
        },
    }


def _all_checked(sources: list[str], overrides: list[Override]) -> list[preflight.Checked]:
    """All search spaces, or one error with the problems of all."""
    checked, errors = [], []
    for source in sources:
        try:
            checked.append(preflight.load_checked(source, overrides))
        except ConfigError as error:
            errors.append(error)
    if len(errors) > 1:
        raise ConfigError("search spaces", [Problem(key="", rule=str(error)) for error in errors])
    if errors:
        raise errors[0]
    return checked


def _named(checked: list[preflight.Checked], name: str | None) -> dict[str, preflight.Checked]:
    if name is not None and len(checked) > 1:
        raise ConfigError("--name", [Problem(key=name, rule="names one sweep, but several search spaces were given")])
    names = [name or Path(c.source).stem for c in checked]
    doubled = sorted({n for n in names if names.count(n) > 1})
    if doubled:
        raise ConfigError("search spaces", [Problem(key=n, rule="two files would give this name") for n in doubled])
    return dict(zip(names, checked, strict=True))


def _conclude(outcomes: Mapping[str, running.Outcome | str], console: Console) -> None:
    """Tell of several sweeps in a table, of those that could not be run as well; exit with the highest code."""
    from tune_topkd.cli.display import summary_table

    ended = {sweep: outcome for sweep, outcome in outcomes.items() if isinstance(outcome, running.Outcome)}
    if len(outcomes) > 1:
        console.print(summary_table([(o.config, o.state) for o in ended.values()]))
        for sweep, error in outcomes.items():
            if isinstance(error, str):
                console.print(f"{sweep}: not run: {error}", style="red", soft_wrap=True, highlight=False)
    for sweep, outcome in ended.items():
        if outcome.is_interrupted:
            console.print(f"interrupted; `python launch.py resume {sweep}` goes on", style="bold")
    codes = [outcome.exit_code for outcome in ended.values()]
    codes += [running.USER_ERROR for _ in outcomes.keys() - ended.keys()]
    raise typer.Exit(max(codes, default=0))


def _number(text: str | None) -> float | str | None:
    """An option's number; what is none is for the config to judge."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _place(runs_dir: Path, mlflow_uri: str | None, address: str | None) -> running.Place:
    from tune_topkd.tracking import sqlite_uri

    runs = runs_dir.expanduser().absolute()
    uri = mlflow_uri or sqlite_uri(runs / "mlflow.db")
    preflight.check_mlflow_uri(uri)
    address = _cluster_of(address)
    if address is not None:
        from tune_topkd.sweep import check_address

        check_address(address)
    return running.Place(runs, uri, address)


def _cluster_of(address: str | None) -> str | None:
    """The address of the Ray to use; None for a private one. That the environment names one is said."""
    if address and address == os.environ.get("RAY_ADDRESS") and address != "local":
        text = f"Ray: the cluster at {address}, as RAY_ADDRESS says; --address local starts a private one"
        _stderr().print(text, highlight=False, soft_wrap=True, markup=False)
    return None if address in (None, "", "local") else address


def _stderr() -> Console:
    width = None if sys.stderr.isatty() else 160
    return Console(stderr=True, width=width)


def _tell(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
