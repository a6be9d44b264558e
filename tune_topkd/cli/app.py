"""The commands. Output for people goes to stderr, results for programs to stdout.

Exit codes: 0 done; 1 `audit` or `verify` found something, or a followed job failed; 2 the input is wrong or the machine
in the way (one message, no traceback); 3 the sweep ended without one successful trial, or with an error that all further
trials would make; 130 interrupted (129 if the terminal was closed), and `resume` goes on.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from typing import Any
from typing import TypeVar

import typer

from tune_topkd import __version__
from tune_topkd import terminal
from tune_topkd.cli.calling import command
from tune_topkd.cli.calling import command_for
from tune_topkd.cli.standing import DAMAGED
from tune_topkd.cli.standing import line_of
from tune_topkd.cli.standing import line_of_job
from tune_topkd.cli.standing import standing
from tune_topkd.cli.standing import standing_or_damage
from tune_topkd.cli.standing import table_of
from tune_topkd.config import SWEEP_NAME
from tune_topkd.config import ConfigError
from tune_topkd.config import Override
from tune_topkd.config import Problem
from tune_topkd.config import dump_config
from tune_topkd.config import json_schema
from tune_topkd.config import parse_set
from tune_topkd.errors import TuneTopKDError
from tune_topkd.export import BUNDLES
from tune_topkd.export import STUDENT_WRITERS
from tune_topkd.export import WRITERS
from tune_topkd.export import TunedConfig
from tune_topkd.interruption import listening
from tune_topkd.storage import write_text
from tune_topkd.sweep import Result
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import preflight
from tune_topkd.sweep.api import all_of
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.campaign import FORMATS
from tune_topkd.sweep.campaign import row_of
from tune_topkd.sweep.jobs import JOBS_VARIABLE
from tune_topkd.sweep.jobs import Submission
from tune_topkd.sweep.jobs import jobs_at
from tune_topkd.sweep.recommending import Searched
from tune_topkd.sweep.recommending import recommended
from tune_topkd.sweep.register import MODELS
from tune_topkd.sweep.register import registered
from tune_topkd.sweep.result import export_bundle
from tune_topkd.sweep.size import with_sizes
from tune_topkd.sweep.spaces import space_names
from tune_topkd.sweep.study import STUDY
from tune_topkd.sweep.workspace import DEFAULT_RUNS
from tune_topkd.sweep.workspace import MLFLOW_VARIABLE
from tune_topkd.sweep.workspace import NO_MLFLOW
from tune_topkd.sweep.workspace import PRIVATE
from tune_topkd.sweep.workspace import RAY_VARIABLE
from tune_topkd.sweep.workspace import RUNS_DIR_VARIABLE
from tune_topkd.sweep.workspace import moved_places
from tune_topkd.terminal import Console
from tune_topkd.terminal import Lines

DEFAULT_SPACE = "search_spaces/digits.yaml"
DONE, FINDINGS, USER_ERROR, NO_SUCCESS = 0, 1, 2, 3
Format = StrEnum("Format", {name: name for name in (*WRITERS, *BUNDLES, *STUDENT_WRITERS, STUDY)})  # type: ignore[misc]
YAML = Format("yaml")
PAGE = "html"
Table = StrEnum("Table", {name: name for name in (*FORMATS, PAGE)})  # type: ignore[misc]
MARKDOWN, JSON = Table("markdown"), Table("json")
Side = StrEnum("Side", {name: name for name in FORMATS})  # type: ignore[misc]
SIDE_BY_SIDE = Side("markdown")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",  # what stands in brackets is no markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _sweeps() -> list[str]:
    """For the shell's completion: the sweeps of the runs folder that is meant if none is given."""
    return Workspace.at(mlflow_uri=NO_MLFLOW, address=PRIVATE).sweeps()


RunsDir = Annotated[
    str,
    typer.Option(
        "--runs-dir",
        envvar=RUNS_DIR_VARIABLE,
        metavar="FOLDER|URI",
        help="Folder of the sweeps, the teachers and mlflow.db, or s3://BUCKET/PREFIX.",
    ),
]
MlflowUri = Annotated[
    str | None,
    typer.Option("--mlflow-uri", envvar=MLFLOW_VARIABLE, help="MLflow's URI [default: SQLite in the runs dir]."),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar=RAY_VARIABLE,
        help="A running Ray cluster, or local [default: a private one on this machine].",
    ),
]
Priority = Annotated[
    float,
    typer.Option(help="Among the sweeps on a cluster: with 3 a sweep gets three times what one with 1 gets."),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the YAML; may be repeated.")
]
Moved = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Where files are (data.root=PATH), or how it is run; may be repeated."
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="A JSON object in a line of stdout for each thing that happens; people read stderr."),
]
SweepName = Annotated[str, typer.Argument(metavar="SWEEP", help="The name of a sweep.", autocompletion=_sweeps)]
Spaces = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SPACE.yaml]...",
        help=f"Search spaces: files, or names of this project's [default: {DEFAULT_SPACE}].",
        autocompletion=space_names,
    ),
]
Trials = Annotated[int | None, typer.Option(help="Trials of the search; the baselines come on top.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs of a full trial.")]
TimeBudget = Annotated[
    float | None, typer.Option(help="Stop after so many seconds; a teacher is trained before they begin.")
]
CpusPerTrial = Annotated[str | None, typer.Option(metavar="N|auto", help="CPUs of a trial. auto: measured.")]
GpusPerTrial = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto", help="GPUs of a trial; 0: the CPU; 0.25: four share one; 2: trains on both. auto: measured."
    ),
]
GpuHours = Annotated[
    float | None, typer.Option(help="Stop after so many GPU hours (training time × a trial's GPUs), over all resumes.")
]
CpuHours = Annotated[float | None, typer.Option(help="The same for CPU hours (training time × a trial's CPUs).")]


def main() -> None:
    """Run the command line and exit with its code; a user's mistake is one message on stderr."""
    terminal.open_standard_streams()
    try:
        with listening() as interruption:
            interruption.say = lambda text: Console().print(f"\n{text}", soft_wrap=True)
            _find_the_users_code()
            app(standalone_mode=True)
    except Exception as error:  # noqa: BLE001 (what is not for the user is raised again)
        _tell(_told(error))
        sys.exit(USER_ERROR)
    finally:
        terminal.close_stderr()


def _told(error: Exception) -> str:
    """What a person is told of an error that is theirs or their machine's.

    Raises:
        Exception: the error itself, if it is neither: a fault of ours.
    """
    if isinstance(error, OSError):
        return f"{error.filename or 'the disk'}: {error.strerror or error}"
    if isinstance(error, TuneTopKDError):
        return str(error)
    raise error


def _find_the_users_code() -> None:
    """Let package.module:loss of a user's project be found where the user is."""
    try:
        here = os.getcwd()
    except FileNotFoundError as error:
        rule = "has been removed; `cd` into one that exists"
        raise ConfigError("the working directory", [Problem(key="", rule=rule)]) from error
    if here not in sys.path:
        sys.path.append(here)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        terminal.result(f"tune_topkd {__version__}\n")
        raise typer.Exit


@app.callback()
def general(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find the best K, loss weights, temperature and learning rate (and scaling factors) for a TopKD distillation."""


@app.command()
def run(
    spaces: Spaces = None,
    name: Annotated[
        str | None, typer.Option(help="The sweep's name [default: the YAML's]: its file name without .yaml.")
    ] = None,
    trials: Trials = None,
    epochs: Epochs = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the proposals and of every trial.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Trials at once [default: what fits].")] = None,
    cpus_per_trial: CpusPerTrial = None,
    gpus_per_trial: GpusPerTrial = None,
    time_budget: TimeBudget = None,
    gpu_hours: GpuHours = None,
    cpu_hours: CpuHours = None,
    plateau: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help="End the search when its newest trials raised the best top-1 by less."),
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    mlflow_uri: MlflowUri = None,
    address: Address = None,
    priority: Priority = 1.0,
    warm_start: Annotated[
        list[str] | None, typer.Option(metavar="SWEEP", help="Try that sweep's best trials first; may be repeated.")
    ] = None,
    or_resume: Annotated[
        bool, typer.Option("--or-resume", help="Go on with a sweep that has begun: the same command, again and again.")
    ] = False,
    as_json: AsJson = False,
    set_: Sets = None,
) -> None:
    """Search each SPACE.yaml and export its tuned config."""
    overrides = _overrides(
        set_,
        trials=trials,
        epochs=epochs,
        seed=seed,
        max_concurrent=max_concurrent,
        cpus_per_trial=_number(cpus_per_trial),
        gpus_per_trial=_number(gpus_per_trial),
        time_budget=time_budget,
        gpu_hours=gpu_hours,
        cpu_hours=cpu_hours,
        plateau=plateau,
    )
    workspace, console = _workspace(runs_dir, mlflow_uri or None, address, priority), Console()
    with console.phase("checking what is to run"):
        sources = spaces or [DEFAULT_SPACE]
        named = zip(sources, _names(sources, name), strict=True)
        sweeps = all_of(
            [functools.partial(Sweep.new, s, n, workspace, overrides, warm_start or (), or_resume) for s, n in named]
        )
    with _lines(as_json) as lines:
        results = _each_run(sweeps, workspace, console, lines)
    _conclude(results, workspace, console)


JobsAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar=[JOBS_VARIABLE, RAY_VARIABLE],
        help="The cluster: http://HOST:8265 (its dashboard), or HOST:PORT of its head.",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or a sweep's name: its newest job.")]


@app.command()
def submit(
    spaces: Spaces = None,
    name: Annotated[
        str | None, typer.Option(help="The sweep's name [default: the YAML's]: its file name without .yaml.")
    ] = None,
    trials: Trials = None,
    epochs: Epochs = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the proposals and of every trial.")] = None,
    cpus_per_trial: CpusPerTrial = None,
    gpus_per_trial: GpusPerTrial = None,
    time_budget: TimeBudget = None,
    runs_dir: Annotated[
        str,
        typer.Option(
            "--runs-dir", envvar=RUNS_DIR_VARIABLE, help="An absolute path that all nodes share, or s3://BUCKET/PREFIX."
        ),
    ] = DEFAULT_RUNS,
    mlflow_uri: Annotated[
        str | None, typer.Option("--mlflow-uri", help="MLflow's, as the cluster reaches it [default: the cluster's].")
    ] = None,
    address: JobsAddress = None,
    priority: Priority = 1.0,
    set_: Sets = None,
) -> None:
    """Have a Ray cluster run each SPACE.yaml as a job; the same submission again goes on with what is left.

    The job runs `run --or-resume` in a copy of the working directory. Its id goes to stdout.
    """
    overrides = _overrides(
        set_,
        trials=trials,
        epochs=epochs,
        seed=seed,
        cpus_per_trial=_number(cpus_per_trial),
        gpus_per_trial=_number(gpus_per_trial),
        time_budget=time_budget,
    )
    sources, console = spaces or [DEFAULT_SPACE], Console()
    submission = Submission.of(sources, _names(sources, name), overrides, runs_dir, mlflow_uri, priority)
    job, notes = submission.to(jobs_at(address), Path.cwd())
    for note in notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    follow, stop_it = (command(*words, address=address) for words in (("logs", "-f", job.id), ("stop", job.id)))
    console.print(f"submitted: {', '.join(job.sweeps)}; `{follow}` shows it, `{stop_it}` ends it", soft_wrap=True)
    terminal.result(f"{job.id}\n")


@app.command()
def jobs(
    address: JobsAddress = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects on stdout.")] = False,
) -> None:
    """List the sweeps that were submitted to a cluster, the oldest first."""
    found = jobs_at(address).all()
    if as_json:
        terminal.result(json.dumps([dataclasses.asdict(job) for job in found], indent=2) + "\n", is_document=True)
        return
    terminal.result("".join(f"{line_of_job(job)}\n" for job in found))
    if not found:
        Console().print(f"no sweeps have been submitted to {address}")


@app.command()
def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job is over.")] = False,
    address: JobsAddress = None,
) -> None:
    """Show what a job has written; with -f exit 1 if it fails."""
    jobs = jobs_at(address)
    found = jobs.find(job)
    if not follow:
        terminal.result(jobs.text(found))
        return
    with listening() as interruption:
        interruption.advice = f"; {found.id} goes on"
        try:
            found = jobs.follow(found, terminal.result)
        except KeyboardInterrupt:
            raise typer.Exit(interruption.exit_code) from None
    Console().print(line_of_job(found), style="bold", soft_wrap=True)
    if found.status != "succeeded":
        raise typer.Exit(FINDINGS)


@app.command()
def stop(job: JobName, address: JobsAddress = None) -> None:
    """End a job's sweep cleanly; the same submission, or `resume`, goes on with it."""
    jobs, console = jobs_at(address), Console()
    found = jobs.find(job)
    with console.phase(f"stopping {found.id}"):
        found = jobs.stop(found)
    console.print(line_of_job(found), style="bold", soft_wrap=True)


def _each_run(
    sweeps: Sequence[Sweep], workspace: Workspace, console: Console, lines: Lines | None = None
) -> dict[str, Result | str]:
    """How each sweep ended, or what kept it from running; after an interruption the rest is not begun."""
    results: dict[str, Result | str] = {}
    for sweep in sweeps:
        console.print(f"sweep {sweep.name}: {sweep.source}", style="bold")
        try:
            results[sweep.name] = result = _shown(sweep.run, sweep, console, lines)
        except Exception as error:
            if len(sweeps) == 1:
                raise
            results[sweep.name] = told = _told(error)
            _tell(told)
            continue
        if result.is_interrupted:
            break
    return results


@contextlib.contextmanager
def _lines(as_json: bool) -> Iterator[Lines | None]:
    """Stdout for JSON lines, if there are to be any."""
    if not as_json:
        yield None
        return
    lines = Lines()
    try:
        yield lines
    finally:
        lines.close()


def _shown(
    run: Callable[..., Result],
    sweep: Sweep,
    console: Console,
    lines: Lines | None,
    words: Sequence[str] = (),
    **arguments: Any,
) -> Result:
    """Run a sweep, or go on with it, on the console; an interruption says by which words, by default `resume`, to go on."""
    from tune_topkd.cli.display import ConsoleCallback
    from tune_topkd.cli.lines import JsonCallback

    told = [] if lines is None else [JsonCallback(sweep.name, lines)]

    with listening() as interruption:
        interruption.advice = f"; `{command_for(sweep.workspace, *(words or ('resume', sweep.name)))}` goes on"
        return run([ConsoleCallback(console, sweep.workspace), *told], **arguments)


@app.command()
def init(
    data: Annotated[
        str,
        typer.Option(help="A dataset's name, package.module:source, or a folder with a folder of images per class."),
    ],
    teacher: Annotated[
        str, typer.Option(help="A network by name, torchvision:NAME, timm:NAME or package.module:factory.")
    ],
    student: Annotated[str, typer.Option(help="A network, named as the teacher is.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="The teacher's weights [default: the sweep trains the teacher first].")
    ] = None,
    root: Annotated[str | None, typer.Option(help="The folder that a named dataset's files lie in.")] = None,
    epochs: Epochs = None,
    image_size: Annotated[int | None, typer.Option(help="Side that images are resized to.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path("space.yaml"),
) -> None:
    """Write a search space for your own dataset, teacher and student, with comments, and check it."""
    from tune_topkd.sweep.drafting import draft

    console = Console()
    if output.exists():
        raise ConfigError("--output", [Problem(key=str(output), rule="is there already; nothing is written over it")])
    with console.phase("looking at the data and the networks"):
        found = draft(data, teacher, student, checkpoint=checkpoint, root=root, epochs=epochs, image_size=image_size)
    write_text(output, found.text)
    for line in found.lines:
        console.print(line, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    console.print(f"written: {output}", soft_wrap=True)
    console.print(
        f"next: {command('check', str(output))}, then {command('run', str(output))}", style="bold", soft_wrap=True
    )


@app.command()
def check(
    spaces: Annotated[list[str], typer.Argument(metavar="SPACE.yaml...", help="Search spaces.")],
    trials: Trials = None,
    epochs: Epochs = None,
    set_: Sets = None,
    show: Annotated[bool, typer.Option("--show", help="Print the complete config on stdout.")] = False,
    cpus_per_trial: CpusPerTrial = None,
    gpus_per_trial: GpusPerTrial = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    address: Address = None,
) -> None:
    """Validate search spaces, print what would run and about how long on this machine's CPU; start nothing.

    With --address it asks the cluster's nodes what trials would lack there, times a step on each, and prints how many
    trials fit and about how long it takes on them; exit 2 if none can run. --runs-dir is what nodes are to share.
    """
    from tune_topkd.sweep.cost import describe

    console = Console()
    overrides = _overrides(
        set_,
        trials=trials,
        epochs=epochs,
        cpus_per_trial=_number(cpus_per_trial),
        gpus_per_trial=_number(gpus_per_trial),
    )
    checks = [functools.partial(preflight.load_checked, source, overrides) for source in spaces]
    found = all_of(checks)
    cluster = _cluster_of(address)
    for checked in found:
        console.print(f"{checked.source}: valid", style="bold green")
        for line in describe(checked.config, with_time=cluster is None):
            console.print(f"  {line}", soft_wrap=True)
        for warning in checked.warnings:
            console.print(f"  note: {warning}", style="yellow", soft_wrap=True)
        if show:
            terminal.result(dump_config(checked.config) + "\n", is_document=True)
    if cluster is None:
        return
    from tune_topkd.cli.display import progress_of
    from tune_topkd.sweep.capacity import capacities

    workspace = Workspace.at(runs_dir, NO_MLFLOW, cluster)
    told = capacities(workspace, found, progress_of(console))
    for checked, capacity in zip(found, told, strict=True):
        console.print(f"{checked.source} on the cluster at {cluster}:", style="bold", soft_wrap=True)
        for line in capacity.lines:
            console.print(f"  {line}", soft_wrap=True)
        if capacity.error:
            console.print(f"  error: {capacity.error}", style="red", soft_wrap=True)
    if any(capacity.error for capacity in told):
        raise typer.Exit(USER_ERROR)


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The file [default: stdout].")] = None,
) -> None:
    """Write the JSON Schema of search spaces, by which an editor completes and explains their keys."""
    _give(json.dumps(json_schema(), indent=2) + "\n", output, Console())


@app.command()
def resume(
    sweep: SweepName,
    trials: Trials = None,
    time_budget: TimeBudget = None,
    gpu_hours: GpuHours = None,
    cpu_hours: CpuHours = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    mlflow_uri: MlflowUri = None,
    address: Address = None,
    as_json: AsJson = False,
    priority: Priority = 1.0,
    set_: Moved = None,
) -> None:
    """Resume a sweep after any interruption; finished trials are not run again."""
    moved = [parse_set(text) for text in set_ or []]
    found, console = Sweep(sweep, _workspace(runs_dir, mlflow_uri or None, address, priority)), Console()
    limits: dict[str, Any] = {
        "trials": trials,
        "time_budget": time_budget,
        "gpu_hours": gpu_hours,
        "cpu_hours": cpu_hours,
    }
    with _lines(as_json) as lines:
        result = _shown(found.resume, found, console, lines, **limits, moved=moved)
    _conclude({sweep: result}, found.workspace, console)


@app.command()
def confirm(
    sweep: SweepName,
    finalists: Annotated[int, typer.Option(help="Trials of the search that are compared on fresh seeds.")] = 3,
    seeds: Annotated[int, typer.Option(help="Fresh seeds to choose on, and as many further ones to measure on.")] = 5,
    again: Annotated[
        bool, typer.Option("--again", help="Read a test set that has been read; the result is marked as that.")
    ] = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
    mlflow_uri: MlflowUri = None,
    address: Address = None,
    as_json: AsJson = False,
    priority: Priority = 1.0,
    set_: Moved = None,
) -> None:
    """Choose a finished sweep's answer on fresh seeds, then measure it and the baselines on the test set, once."""
    moved = [parse_set(text) for text in set_ or []]
    found, console = Sweep(sweep, _workspace(runs_dir, mlflow_uri or None, address, priority)), Console()
    words = ("confirm", sweep, "--finalists", str(finalists), "--seeds", str(seeds))
    plan = {"finalists": finalists, "seeds": seeds, "again": again}
    with _lines(as_json) as lines:
        result = _shown(found.confirm, found, console, lines, words, **plan, moved=moved)
    _conclude({sweep: result}, found.workspace, console, words)


@app.command()
def verify(
    tuned: Annotated[Path, typer.Argument(metavar="TUNED.yaml", help="An exported tuned config.")],
    seeds: Annotated[int, typer.Option(help="Trainings, each on a seed that the config has not had.")] = 3,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Where files are: data.root=PATH, teacher.checkpoint=PATH."),
    ] = None,
) -> None:
    """Train a tuned config again from its file alone and say whether its figure holds; exit 1 if it does not."""
    from tune_topkd.sweep.verify import verify as verified

    places = moved_places([parse_set(text) for text in set_ or []])
    with tempfile.TemporaryDirectory(prefix="tune-topkd-verify-") as folder:  # nothing of a sweep's is of use here
        workspace = Workspace.at(folder, NO_MLFLOW, PRIVATE)
        found = verified(tuned, seeds, workspace, _on_console(workspace), places)
    Console().print(found.sentence, style="bold", soft_wrap=True)
    terminal.result(json.dumps(found.as_json(), indent=2) + "\n", is_document=True)
    if not found.holds:
        raise typer.Exit(FINDINGS)


@app.command()
def status(
    sweep: Annotated[str | None, typer.Argument(metavar="[SWEEP]", help="The name of a sweep [default: all].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout (a list without SWEEP).")] = False,
    campaign: Annotated[
        bool, typer.Option("--campaign", help="The table of `report`: what each sweep has found.")
    ] = False,
    is_watched: Annotated[
        bool,
        typer.Option("--watch", help="Show a sweep under way as its own display does, until it ends or Ctrl-C."),
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")] = 2.0,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Show how sweeps stand: a row for each, or one in detail.

    A row has the state, when it was begun, the trials that have ended, the answer's top-1 and K and what that was
    measured on, its gain in points over each baseline, and what it has cost.
    """
    workspace = _workspace(runs_dir)
    if is_watched:
        return _watch(sweep, workspace, every)
    if campaign:
        searched = _searched([sweep] if sweep else None, workspace, Console())
        terminal.result(_table(searched, JSON if as_json else MARKDOWN), is_document=True)
        return
    names = workspace.sweeps() if sweep is None else []
    found = [standing(sweep, workspace)] if sweep else [standing_or_damage(name, workspace) for name in names]
    if as_json:
        terminal.result(json.dumps(found[0] if sweep else found, indent=2) + "\n", is_document=True)
    elif sweep:
        terminal.result("".join(f"{line_of(entry)}\n" for entry in found))
    elif found:
        terminal.result(table_of(found, terminal.columns_of_stdout()))
    if not found:
        Console().print(f"no sweeps in {workspace.place}")
    if any(entry["state"] == DAMAGED for entry in found):
        raise typer.Exit(USER_ERROR)


def _watch(sweep: str | None, workspace: Workspace, every: float) -> None:
    """Show a sweep until it ends; exit 130 where a person has seen enough."""
    from tune_topkd.cli.watching import running
    from tune_topkd.cli.watching import watch

    name = running(workspace) if sweep is None else sweep
    with listening() as interruption:
        interruption.advice = f" this display; the sweep {name} goes on"
        try:
            watch(name, workspace, every, Console())
        except KeyboardInterrupt:
            raise typer.Exit(interruption.exit_code) from None


@app.command()
def report(
    sweeps: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SWEEP]...", help="The names of sweeps [default: all].", autocompletion=_sweeps),
    ] = None,
    format_: Annotated[Table, typer.Option("--format", help="A table; html is a page with plots.")] = MARKDOWN,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The file [default: stdout; of html report.html in the sweep's or the runs folder]."
        ),
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Report on sweeps: a table with a row each, or, as html, a page with the answer, plots and all trainings.

    Below the table of several: the one config that loses least on all of them, and what it loses on each.
    """
    workspace, console = _workspace(runs_dir), Console()
    if format_ != PAGE:
        return _give(_table(_searched(sweeps, workspace, console), format_), output, console)
    from tune_topkd.sweep.page import page_file
    from tune_topkd.sweep.page import page_of

    command = functools.partial(command_for, workspace)
    with console.phase("reading the ledgers"):
        found = _of_each(sweeps, workspace, console, lambda name: Sweep(name, workspace).findings(command))
        text = page_of(found)
    _give(text, output or page_file(found, workspace), console)


@app.command()
def compare(
    sweeps: Annotated[
        list[str], typer.Argument(metavar="SWEEP SWEEP...", help="Two sweeps or more.", autocompletion=_sweeps)
    ],
    format_: Annotated[Side, typer.Option("--format", help="How the table is written.")] = SIDE_BY_SIDE,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="[default: stdout]")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Show sweeps side by side: the config keys that differ, what each found, and whether one answer is better.

    Answers are compared where both were measured on the same test set (`confirm`), by Welch's t over their seeds.
    """
    from tune_topkd.sweep.comparison import FORMATS as WRITTEN
    from tune_topkd.sweep.comparison import compare as compared

    if len(names := list(dict.fromkeys(sweeps))) < 2:
        raise ConfigError("compare", [Problem(key="SWEEP", rule="must be two sweeps or more, each another one")])
    workspace, console = _workspace(runs_dir), Console()
    found = compared(_searched(names, workspace, console))
    _give(WRITTEN[format_.value](found), output, console)


def _searched(sweeps: Sequence[str] | None, workspace: Workspace, console: Console) -> list[Searched]:
    return _of_each(sweeps, workspace, console, lambda name: Sweep(name, workspace).searched())


_FoundT = TypeVar("_FoundT")


def _of_each(
    sweeps: Sequence[str] | None, workspace: Workspace, console: Console, ask: Callable[[str], _FoundT]
) -> list[_FoundT]:
    """What there is to tell of each sweep; of all sweeps those that cannot be read are left out, and that is said.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for name in dict.fromkeys(sweeps or workspace.sweeps()):
        try:
            found.append(ask(name))
        except TuneTopKDError as error:
            if sweeps:
                raise
            console.print(f"note: {name} is left out: {error}", style="yellow", soft_wrap=True)
    if not found:
        raise ConfigError("report", [Problem(key="SWEEP", rule=f"there is none in {workspace.place}")])
    return found


def _table(sweeps: Sequence[Searched], format_: Table) -> str:
    rows = [row_of(s.config, s.state, s.complete) for s in sweeps]
    return FORMATS[format_.value](with_sizes(rows, [s.config for s in sweeps]), recommended(sweeps))


def _give(text: str, output: Path | None, console: Console) -> None:
    """A document, to a file or to stdout."""
    if output is None:
        terminal.result(text, is_document=True)
    else:
        write_text(output, text)
        console.print(f"written: {output}", soft_wrap=True)


@app.command()
def track(
    sweep: SweepName,
    runs_dir: RunsDir = DEFAULT_RUNS,
    mlflow_uri: MlflowUri = None,
) -> None:
    """Send MLflow what it lacks of a sweep; a second time changes nothing."""
    from tune_topkd.sweep import track as write

    workspace = _workspace(runs_dir, mlflow_uri or None)
    write(sweep, workspace, _on_console(workspace))
    Console().print(f"MLflow has all of {sweep}")


@app.command()
def audit(
    sweep: SweepName,
    mlflow: Annotated[bool, typer.Option(help="Compare MLflow with the ledger too.")] = True,
    runs_dir: RunsDir = DEFAULT_RUNS,
    mlflow_uri: MlflowUri = None,
) -> None:
    """Check a sweep's decisions, files and MLflow runs against its ledger; exit 1 with a list of what is wrong."""
    from tune_topkd.sweep import audit as findings_of

    findings = findings_of(sweep, _workspace(runs_dir, mlflow_uri or None), mlflow)
    for finding in findings:
        terminal.result(f"{finding}\n")
    if findings:
        Console().print(f"{sweep}: {len(findings)} finding{'s' * (len(findings) > 1)}", style="bold red")
        raise typer.Exit(FINDINGS)
    Console().print(f"{sweep}: nothing is wrong", style="bold green")


@app.command()
def export(
    sweep: SweepName,
    format_: Annotated[Format, typer.Option("--format", help="Which project is to read it.")] = YAML,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file; a folder where the format is several files [default: stdout]."),
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    mlflow_uri: MlflowUri = None,
) -> None:
    """Write a sweep's tuned config, its student or its trials for others; models:/NAME@ALIAS is one in MLflow's registry."""
    if sweep.startswith(MODELS):
        return _export_registered(sweep, format_, output, _workspace(runs_dir, mlflow_uri or None))
    found = Sweep(sweep, _workspace(runs_dir))
    is_student = format_.value in STUDENT_WRITERS
    if (is_student or format_.value == STUDY) and output is None:
        raise ConfigError("--output", [Problem(key="", rule=f"must be given: {format_.value} is no text")])
    if format_.value == STUDY:
        assert output is not None, "it has been asked for"
        found.export(output, STUDY)
        console = Console()
        console.print(f"written: {output}", soft_wrap=True)
        return console.print(f"look at it: optuna-dashboard {shlex.quote(f'sqlite:///{output}')}", soft_wrap=True)
    tuned, done = found.answer(), found.status().finalists
    if done is not None and done[0] < done[1]:
        note = f"note: the finalists are not done ({done[0]} of {done[1]} trainings): this is the best of one seed"
        Console().print(note, style="yellow", soft_wrap=True)
    if is_student:
        assert output is not None, "it has been asked for"
        found.export(output, format_.value)
        Console().print(f"written: {output}", soft_wrap=True)
    else:
        _export_config(tuned, format_, output, found.searched().config.data.root)


def _export_config(tuned: TunedConfig, format_: Format, output: Path | None, root: str | None = None) -> None:
    """Write a tuned config, as a text or as several files; its dataset lies in `root`, if that is known."""
    console = Console()
    if format_.value in BUNDLES:
        for path in export_bundle(tuned, format_.value, output, root):
            console.print(f"written: {path}", soft_wrap=True)
    else:
        _give(WRITERS[format_.value](tuned), output, console)


def _export_registered(uri: str, format_: Format, output: Path | None, workspace: Workspace) -> None:
    """Write the tuned config of a registered model."""
    if format_.value in (*STUDENT_WRITERS, STUDY):
        known = ", ".join((*WRITERS, *BUNDLES))
        rule = f"must be one of {known} for {MODELS}…: `mlflow.pyfunc.load_model` gives the student itself"
        raise ConfigError("--format", [Problem(key=format_.value, rule=rule)])
    _export_config(registered(uri, workspace), format_, output)


@app.command()
def teacher(
    space: Annotated[str | None, typer.Argument(metavar="SPACE.yaml", help="The search space.")] = None,
    set_: Sets = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure its validation top-1 again, even if it is known.")
    ] = False,
    fill_bank: Annotated[
        bool, typer.Option("--fill-bank", help="Compute all the logits that trials need, ahead of a sweep.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove the banks of logits that no sweep in the runs dir names.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sweep that the bank is filled for.")] = 0,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Train or check the teacher of a search space; prints the path of its weights."""
    from tune_topkd.sweep import prepare

    workspace = _workspace(runs_dir)
    watchers = _on_console(workspace)
    if prune:
        from tune_topkd.sweep.pruning import prune as remove_banks

        remove_banks(workspace, watchers)
        if space is None:
            return
    if space is None:
        raise ConfigError("SPACE.yaml", [Problem(key="", rule="must be given, except for --prune")])
    config = preflight.load_checked_pair(space, [parse_set(text) for text in set_ or []], with_loss=False)
    preflight.check_writable(workspace.runs)
    if config.teacher is None:
        raise ConfigError(space, [Problem(key="teacher", rule="there is none: this space learns without one")])
    prepare.ready_data(config)
    ready = prepare.ready_teacher(config, workspace, watchers, measure=measure)
    files = prepare.teacher_files(ready, config, workspace, watchers, seed)
    if fill_bank:
        prepare.fill_bank(config, files, seed, workspace, watchers)
    terminal.result(f"{files.teacher_checkpoint}\n")


def _on_console(workspace: Workspace) -> Watchers:
    """Tells on the console what the service has to tell."""
    from tune_topkd.cli.display import ConsoleCallback

    return Watchers([ConsoleCallback(Console(), workspace)])


@app.command()
def train(
    space: Annotated[
        str, typer.Argument(metavar="SPACE.yaml|TUNED.yaml", help="A search space, or an exported tuned config.")
    ],
    set_: Sets = None,
    name: Annotated[
        str | None, typer.Option(help="The training's name [default: the YAML's]: its file name without .yaml.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the training.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    runs_dir: RunsDir = DEFAULT_RUNS,
    mlflow_uri: MlflowUri = None,
) -> None:
    """Train one config without a sweep: what the YAML and --set say, the method's defaults for the rest.

    Of a tuned config that is the answer, trained again: on the training split, or, with `--set
    data.selection=test_at_end`, on the validation split too, as `confirm` measures it.
    """
    from tune_topkd.sweep.single import train_one
    from tune_topkd.sweep.verify import is_tuned
    from tune_topkd.sweep.verify import tuned_pair

    overrides = [parse_set(text) for text in set_ or []]
    overrides += [Override("recipe.epochs", epochs, "--epochs")] if epochs is not None else []
    config = tuned_pair(space, overrides) if is_tuned(space) else preflight.load_checked_pair(space, overrides)
    label = name or Path(space).stem
    if not SWEEP_NAME.fullmatch(label):
        rule = "must be letters, digits, '.', '_' and '-', and begin with a letter or digit"
        raise ConfigError("--name", [Problem(key=label, rule=rule)])
    workspace = _workspace(runs_dir, mlflow_uri or None)
    if workspace.remote is not None:
        rule = "must be a folder: a single training keeps its files in one"
        raise ConfigError("--runs-dir", [Problem(key=workspace.place, rule=rule)])
    preflight.check_writable(workspace.runs)
    result = train_one(config, label, seed, workspace, _on_console(workspace))
    terminal.result(json.dumps(result, indent=2) + "\n", is_document=True)
    if result["diverged"]:
        raise typer.Exit(NO_SUCCESS)


@app.command()
def doctor(runs_dir: RunsDir = DEFAULT_RUNS, mlflow_uri: MlflowUri = None, address: Address = None) -> None:
    """Tell what is installed, what the cluster has, and what is wrong; exit 2 if something is."""
    from tune_topkd.cli.display import progress_of
    from tune_topkd.sweep.doctor import examine

    workspace = dataclasses.replace(_workspace(runs_dir, mlflow_uri or None), address=_cluster_of(address))
    is_well = True
    for finding in examine(workspace, progress_of(Console())):
        mark = "ok " if finding.is_well else "BAD"
        terminal.result(f"{mark} {finding.what}: {finding.text}\n")
        is_well &= finding.is_well
    if not is_well:
        raise typer.Exit(USER_ERROR)


_OPTIONS = {"epochs": "recipe.epochs"}
"""The key that an option sets, where it is not `sweep.` and the option's name."""


def _overrides(sets: list[str] | None, **options: float | str | None) -> list[Override]:
    """What `--set` and the options of a command put in place of the YAML's values."""
    given = {name: value for name, value in options.items() if value is not None}
    by_option = [
        Override(_OPTIONS.get(name, f"sweep.{name}"), value, f"--{name.replace('_', '-')}")
        for name, value in given.items()
    ]
    return [parse_set(text) for text in sets or []] + by_option


def _names(sources: list[str], name: str | None) -> list[str]:
    if name is not None and len(sources) > 1:
        raise ConfigError("--name", [Problem(key=name, rule="names one sweep, but several search spaces were given")])
    names = [name or Path(source).stem for source in sources]
    doubled = sorted({n for n in names if names.count(n) > 1})
    if doubled:
        raise ConfigError("search spaces", [Problem(key=n, rule="two files would give this name") for n in doubled])
    return names


def _conclude(
    results: Mapping[str, Result | str], workspace: Workspace, console: Console, words: Sequence[str] = ()
) -> None:
    """Tell of several sweeps in a table, of those that could not be run as well; exit with the highest code."""
    from tune_topkd.cli.display import summary_table

    ended = {name: result for name, result in results.items() if isinstance(result, Result)}
    if len(results) > 1:
        console.print(summary_table([(r.config, r.state) for r in ended.values()]))
        for name, error in results.items():
            if isinstance(error, str):
                console.print(f"{name}: not run: {error}", style="red", soft_wrap=True)
    for name, result in ended.items():
        if result.is_interrupted and (words or result.best is None):  # else it has just been told what comes next
            text = f"interrupted; `{command_for(workspace, *(words or ('resume', name)))}` goes on"
            console.print(text, style="bold", soft_wrap=True)
    codes = [_exit_code(result) for result in ended.values()]
    codes += [USER_ERROR for _ in results.keys() - ended.keys()]
    raise typer.Exit(max(codes, default=DONE))


def _exit_code(result: Result) -> int:
    if result.is_interrupted:
        with listening() as interruption:
            return interruption.exit_code
    return DONE if result.best and result.reason != "failed" else NO_SUCCESS


def _number(text: str | None) -> float | str | None:
    """An option's number; non-numbers are validated by the config."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _workspace(
    runs_dir: str, mlflow_uri: str | None = NO_MLFLOW, address: str | None = None, priority: float = 1.0
) -> Workspace:
    return Workspace.at(runs_dir, mlflow_uri, _cluster_of(address) or PRIVATE, priority)


def _cluster_of(address: str | None) -> str | None:
    """The address of the Ray to use; None for a private one. That the environment names one is said."""
    if address and address == os.environ.get(RAY_VARIABLE) and address != PRIVATE:
        text = f"Ray: the cluster at {address}, as RAY_ADDRESS says; --address local starts a private one"
        Console().print(text, soft_wrap=True)
    return None if address in (None, "", PRIVATE) else address


def _tell(message: str) -> None:
    terminal.stderr().write(f"error: {message}\n")
