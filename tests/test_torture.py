"""Sweeps that are killed at random, again and again: none may tell what happened to it.

What is held against a sweep's ledger is `work.log`, in which the train function itself notes every call and every epoch.
`make torture` runs the whole form: `TUNE_TOPKD_TORTURE_KILLS` kills over six sweeps, and a table at the end.
"""

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections import defaultdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

import pytest
import torture
from test_samplers import with_gp

from tune_topkd.ledger import Ledger
from tune_topkd.search import Search
from tune_topkd.sweep import audit_sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(1500),
    # Ray 2.60 itself: its own deprecated calls, and sockets it leaves to the collector
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SHORT = 8
KILLS = int(os.environ.get("TUNE_TOPKD_TORTURE_KILLS", SHORT))
SWEEPS = [(seed, concurrent) for seed in range(1 if KILLS <= SHORT else 3) for concurrent in (1, 2)]
KILLS_PER_SWEEP = math.ceil(KILLS / len(SWEEPS)) + 1  # a sweep may be done before its last
WORKER_KILLS = 4 if KILLS <= SHORT else 15
TRIALS = 12

POLITE_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
ASKED = [POLITE_SIGNALS] if KILLS <= SHORT else [(number,) * 10 for number in POLITE_SIGNALS]
"""What real sweeps are sent, one after the other."""
ROOT = Path(__file__).parents[1]

MARK = "TUNE_TOPKD_TORTURE"
A_LIFE = 180.0
"""Seconds after which a program that neither ends nor gets on is said to hang."""
A_START = 7.0
"""About the seconds from a program's start to its first new line in the ledger, and a little more."""
GRACE = 30.0
"""Seconds in which all that a program started is to be gone after it has ended by itself."""
GRACE_OF_THE_KILLED = 120.0
"""The same after a kill: Ray's agents, which do nothing then, look for their head for a minute before they end."""
TOLD = ("suggest", "report", "end")


@dataclass
class Program:
    """A sweep's program: started, killed, started again, until the sweep is finished."""

    folder: Path
    scratch: Path
    settings: dict = field(default_factory=dict)
    process: subprocess.Popen | None = None
    marks: list = field(default_factory=list)
    """In the environment of all that a start has started, one for each."""

    @property
    def ledger(self):
        return self.folder / "ledger.jsonl"

    @property
    def config(self):
        settings = {name: v for name, v in self.settings.items() if name not in ("pause", "address")}
        return torture.sweep_config(**settings)

    def start(self):
        self.folder.mkdir(exist_ok=True)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in self.settings.items()]
        self.marks.append(uuid.uuid4().hex)
        environment = os.environ | {MARK: self.marks[-1], "TMPDIR": str(self.scratch)}
        with open(self.folder / "output.txt", "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, torture.__file__, self.folder, *options],
                start_new_session=True,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def kill(self, whom="group"):
        """SIGKILL, of the program's process group, of all processes that it started, or of itself alone."""
        if whom == "group":
            os.killpg(self.process.pid, signal.SIGKILL)
        elif whom == "all":
            for pid in [self.process.pid, *processes(self.marks[-1])]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()

    def ends(self, within=A_LIFE):
        """Wait until the program has ended by itself, and give its exit code."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"hangs: {self.lines(Counter)} {self.words()}")

    def wait_for(self, reached, within=A_LIFE, every=0.002):
        """Wait until `reached()`; false if the program has ended before."""
        give_up = time.monotonic() + within
        while not reached():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > give_up:
                pytest.fail(f"no progress for {within:g} s: {self.lines(Counter)} {self.words()}")
            time.sleep(every)
        return True

    def words(self):
        """The end of what the program has said."""
        return (self.folder / "output.txt").read_text(errors="replace")[-4000:]

    def count(self, *names):
        """How many lines of these events the ledger has, a torn one too."""
        try:
            content = self.ledger.read_bytes()
        except FileNotFoundError:
            return 0
        return sum(content.count(b'"event":"%s"' % name.encode()) for name in names)

    def lines(self, kind=list):
        """The ledger's lines, by no code of the package; or how many of each event."""
        with contextlib.suppress(FileNotFoundError):
            found = [json.loads(line) for line in self.ledger.read_bytes().splitlines()]
            return found if kind is list else kind(line["event"] for line in found)
        return kind()

    def told(self):
        """What was proposed, reported, decided and ended, without times and without who drove it when."""
        return [
            {name: v for name, v in line.items() if name not in ("seq", "time", "crc")}
            for line in self.lines()
            if line["event"] in TOLD
        ]

    def work(self):
        """What the trainings say they did, in the order they did it; a last line may be torn."""
        try:
            content = (self.folder / torture.WORK_LOG).read_bytes()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


SPACE = """
data: {name: digits, val_fraction: 0.25, test_fraction: 0.25}
teacher: {name: digits_cnn, recipe: {epochs: 3, lr: 0.1}}
student: digits_cnn_tiny
recipe: {epochs: 4, batch_size: 128}
space: {k: {low: 1, high: 9, log: true}, lr: {low: 0.01, high: 0.5, log: true}}
sweep: {trials: 8, asha: {grace_epochs: 1, reduction_factor: 2}}
baselines: {methods: [ce, kd], trials: 1}
"""


@dataclass
class CommandLine(Program):
    """A real sweep as a user begins it, and goes on with it once it is there: teacher, Ray, trials, MLflow, answer."""

    @property
    def runs(self):
        return self.folder.parent

    def start(self):
        self.runs.mkdir(exist_ok=True)
        space = self.runs.parent / f"{self.folder.name}.yaml"
        space.write_text(SPACE)
        what = ["resume", self.folder.name] if self.count("driver") else ["run", space]
        self.launch(*what)

    def launch(self, *arguments):
        self.marks.append(uuid.uuid4().hex)
        command = [sys.executable, ROOT / "launch.py", *arguments, "--runs-dir", self.runs]
        environment = os.environ | {MARK: self.marks[-1], "TMPDIR": str(self.scratch)}
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                start_new_session=True,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def output(self):
        return self.runs / "output.txt"

    def words(self):
        return self.output.read_text(errors="replace")[-4000:]

    def mlflow_statuses(self):
        """The statuses of MLflow's runs."""
        with contextlib.closing(sqlite3.connect(self.runs / "mlflow.db")) as database:
            return Counter(status for (status,) in database.execute("select status from runs"))


def processes(*marks):
    """The processes with one of these marks, with their titles."""
    wanted = {f"{MARK}={mark}".encode() for mark in marks}
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if not wanted.isdisjoint((path / "environ").read_bytes().split(b"\0")):
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return found


def children(pid):
    """The processes that this one has started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(path.name))
    return found


def gone(marks, within):
    """Wait until the processes with these marks are gone, and give those that stay."""
    give_up = time.monotonic() + within
    while (left := processes(*marks)) and time.monotonic() < give_up:
        time.sleep(0.2)
    return left


def kill_all(*marks):
    for pid in processes(*marks):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def of_the_killed():
    """The marks of the programs that were killed: in the end nothing of them may be there."""
    marks = []
    yield marks
    left = gone(marks, GRACE_OF_THE_KILLED)
    kill_all(*marks)
    assert not left, f"{GRACE_OF_THE_KILLED:g} s after they were killed programs have left {left}"


@pytest.fixture
def scratch():
    """A temporary folder below which Ray's sockets have paths of at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="ttt-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def program(tmp_path, scratch, of_the_killed):
    """Makes programs; one that is still at work in the end is killed with all that it started."""
    made = []

    def program(folder, **settings):
        made.append(Program(tmp_path / folder, scratch, settings))
        return made[-1]

    yield program
    for one in made:
        if one.process is not None and one.process.poll() is None:
            kill_all(one.marks[-1])
            one.process.wait()
        of_the_killed += one.marks


@pytest.fixture(scope="module")
def table(request):
    """Takes a row for each sweep and shows them at the end."""
    rows = []
    yield rows
    if rows:
        plugins = request.config.pluginmanager
        with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
            for line in ("", *as_table([*rows, total(rows)])):
                plugins.get_plugin("terminalreporter").write_line(line)


def total(rows):
    return {name: sum(r[name] for r in rows) if name != "sweep" else f"all {len(rows)}" for name in rows[0]}


def as_table(rows):
    yield "| " + " | ".join(rows[0]) + " |"
    yield "|---|" + "---:|" * (len(rows[0]) - 1)
    for row in rows:
        yield "| " + " | ".join(str(v) for v in row.values()) + " |"


@dataclass
class Verdict:
    """What is wrong with a finished sweep: nothing, if all but `repeated` are empty."""

    run_again: list = field(default_factory=list)
    """Calls of the train function after the end of the trial."""
    doubled: list = field(default_factory=list)
    """Trials suggested or ended twice, epochs reported twice."""
    lost: list = field(default_factory=list)
    """Trials that are not there, have no end or failed, and epochs that were trained and never reported, or not trained."""
    at_once: list = field(default_factory=list)
    """Trials that two processes trained at the same time."""
    dear: list = field(default_factory=list)
    """Trials that trained more again than what was in flight when they were interrupted."""
    audit: list = field(default_factory=list)
    repeated: int = 0
    """Epochs trained more than once."""

    @property
    def is_clean(self):
        return not (self.run_again or self.doubled or self.lost or self.at_once or self.dear or self.audit)


def verdict(program):
    """Hold a finished sweep's ledger against the work that was done for it.

    A finished trial is run again if the train function is called for it after the time of its `end`. No grace: who
    trains holds the trial's folder, so nobody else can have brought the trial to its end since.
    """
    found, config, lines = Verdict(), program.config, program.lines()
    by_trial = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if "arm" in line:
            by_trial[line["arm"], line["number"]][line["event"]].append(line)
    expected = {("search", n) for n in range(config.sweep.trials)}
    expected |= {(arm, n) for arm in config.baselines.methods for n in range(config.baselines.trials)}
    found.lost += sorted(expected - set(by_trial))
    found.doubled += sorted(set(by_trial) - expected)
    names = trial_ids(program)
    work = defaultdict(list)
    for note in program.work():
        work[names[note["trial"]]].append(note)
    for trial, events in by_trial.items():
        epochs = [line["epoch"] for line in events["report"]]
        if len(events["suggest"]) > 1 or len(events["end"]) > 1 or len(epochs) > len(set(epochs)):
            found.doubled.append(trial)
        if epochs != list(range(1, len(epochs) + 1)):
            found.lost.append((trial, epochs))
        if not events["end"] or events["end"][0]["status"] == "failed":
            found.lost.append((trial, events["end"]))
            continue
        notes, ended = work[trial], events["end"][0]["time"]
        begun = [note["epoch"] for note in notes if note["what"] == "begun"]
        trained = [note["epoch"] for note in notes if note["what"] == "trained"]
        calls = defaultdict(list)
        for note in notes:
            calls[note["call"]].append(note["time"])
        a_tick = 0.001  # the ledger's times are rounded to it
        found.run_again += [(trial, times[0] - ended) for times in calls.values() if times[0] > ended + a_tick]
        if set(trained) != set(epochs):
            found.lost.append((trial, f"reported {epochs}, trained {trained}"))
        in_order = sorted(calls.values())
        if any(before[-1] > after[0] for before, after in itertools.pairwise(in_order)):
            found.at_once.append(trial)
        if len(begun) - len(set(begun)) > len(calls) - 1:
            found.dear.append((trial, begun))
        found.repeated += len(trained) - len(set(trained))
    found.audit = audit_sweep(config, program.folder)
    return found


def trial_ids(program):
    """Which trial a note of the work log means."""
    copy = program.folder / "copy.jsonl"  # a search may write to the ledger that it reads
    shutil.copy(program.ledger, copy)
    with Ledger.open(copy) as ledger:
        search = Search(program.config, ledger)
        trials = ledger.state.trials
        names = {torture.trial_id(search.trial_config(record)): tuple(key) for key, record in trials.items()}
        assert len(names) == len(trials)
    return names


def check_is_right(program):
    """The sweep is finished, and no trial tells that something happened. Gives the verdict."""
    assert program.lines()[-1]["event"] == "stop", program.words()
    assert program.lines()[-1]["reason"] == "finished"
    found = verdict(program)
    assert found.is_clean, found
    left = gone(program.marks[-1:], GRACE)
    assert not left, f"{GRACE:g} s after its end the program has left {left}"
    return found


@dataclass(frozen=True)
class Moment:
    """When to kill: some time after the start, or when the ledger has got some way; and whom."""

    whom: str
    seconds: float
    progress: int = 0
    """Lines that tell something new of a trial, at least one of them this program's."""
    event: str = ""
    """If there is one, the next line of this event after that progress."""

    def comes(self, program):
        """Wait for it; false if the program ends before."""
        began, seen = time.monotonic(), None
        progress = max(self.progress, program.count(*TOLD) + 1) if self.progress else 0

        def reached():
            nonlocal seen
            if program.count(*TOLD) < progress:
                return False
            if seen is None:
                seen = program.count(self.event)
            return not self.event or program.count(self.event) > seen

        if not program.wait_for(reached):
            return False
        since = began if not self.progress else time.monotonic()
        while time.monotonic() < since + self.seconds:
            if program.process.poll() is not None:
                return False
            time.sleep(0.001)
        return program.process.poll() is None


def moments(rng, number, lines):
    """Random moments in a sweep of so many lines, in the order in which they come.

    Three in ten by the clock: in the imports, in Ray's start, in a resume before its first line, or later. Four in ten
    up to 50 ms after any line. Three in ten at once after a line that tells of a beginning, a decision or an end.
    """
    progress = sorted(rng.randrange(1, math.ceil(lines * 0.9)) for _ in range(number))
    found = []
    for at in progress:
        whom = rng.choices(["group", "all", "driver"], [4, 3, 3])[0]
        match rng.choices(["clock", "line", "event"], [3, 4, 3])[0]:
            case "clock":
                found.append(Moment(whom, rng.uniform(0.0, A_START)))
            case "line":
                found.append(Moment(whom, rng.uniform(0.0, 0.05), at))
            case "event":
                found.append(Moment(whom, 0.0, at, rng.choice(["suggest", "start", "report", "end"])))
    return found


@pytest.fixture(scope="module")
def uninterrupted():
    """What a sweep tells that nothing happens to, by seed."""
    told = {}

    def uninterrupted(program, seed):
        if seed not in told:
            whole = program(f"whole-{seed}", concurrent=1, seed=seed)
            whole.start()
            assert whole.ends() == 0, whole.words()
            assert check_is_right(whole).repeated == 0
            told[seed] = whole.told()
        return told[seed]

    return uninterrupted


def test_a_sweep_whose_ray_has_lost_its_head_ends_by_itself_and_can_be_resumed(program):
    sweep = program("head", concurrent=2, pause=0.1)
    sweep.start()
    assert sweep.wait_for(lambda: sweep.count("report") > 5)
    head = next(pid for pid, title in processes(sweep.marks[-1]).items() if "gcs_server" in title.split()[0])
    os.kill(head, signal.SIGKILL)
    assert sweep.ends() != 0
    assert sweep.lines()[-1]["event"] != "stop" or sweep.lines()[-1]["reason"] == "trouble"
    sweep.start()
    assert sweep.ends() == 0, sweep.words()
    check_is_right(sweep)


def kill_at(moments, sweep):
    """Start the program and kill it at each of these moments, unless it is done before.

    Returns:
        How many lines that tell something new each of the killed has left.
    """
    left = []
    for moment in moments:
        before = sweep.count(*TOLD)
        sweep.start()
        if not moment.comes(sweep):
            assert sweep.process.returncode == 0, sweep.words()
            break
        sweep.kill(moment.whom)
        left.append(sweep.count(*TOLD) - before)
    return left


@pytest.mark.parametrize(
    ("seed", "concurrent"), [pytest.param(*s, marks=pytest.mark.long if s == SWEEPS[1] else ()) for s in SWEEPS]
)
def test_a_sweep_killed_at_random_instants_ends_as_if_it_had_not_been(program, uninterrupted, table, seed, concurrent):
    expected = uninterrupted(program, seed)
    sweep = program("killed", concurrent=concurrent, seed=seed)
    kills = kill_at(moments(random.Random(f"{seed} {concurrent}"), KILLS_PER_SWEEP, len(expected)), sweep)
    left_by_killed = set(sweep.scratch.glob("ttk-*"))
    sweep.start()
    assert sweep.ends() == 0, sweep.words()
    left = set(sweep.scratch.glob("ttk-*")) - left_by_killed
    found = verdict(sweep)
    names = ("run_again", "doubled", "lost", "at_once", "dear", "audit")
    row = {"sweep": f"seed {seed}, {concurrent} at once", "kills": len(kills), "before a new line": kills.count(0)}
    row["trials"] = TRIALS + 4
    row |= {name.replace("_", " "): len(getattr(found, name)) for name in names}
    row |= {"epochs": sum(line["event"] == "report" for line in sweep.lines()), "epochs repeated": found.repeated}
    table.append(row | {"folders left by the killed": len(left_by_killed)})
    check_is_right(sweep)
    assert len(kills) >= KILLS_PER_SWEEP // 2
    assert not left
    if concurrent == 1:
        assert sweep.told() == expected


@pytest.mark.long
@pytest.mark.parametrize("sampler", ["cmaes", pytest.param("gp", marks=with_gp), "qmc"])
def test_a_sweep_by_another_sampler_killed_at_random_instants_ends_as_if_it_had_not_been(program, sampler):
    whole = program("whole", concurrent=1, sampler=sampler)
    whole.start()
    assert whole.ends() == 0, whole.words()
    sweep = program("killed", concurrent=1, sampler=sampler)
    assert len(kill_at(moments(random.Random(sampler), 4, len(whole.told())), sweep)) > 1
    sweep.start()
    assert sweep.ends() == 0, sweep.words()
    check_is_right(sweep)
    assert sweep.told() == whole.told()


def polite_moments(rng, number):
    """Half of them by the clock, in the first seconds of a command; the others just after a line of the ledger."""
    for turn in range(number):
        if turn % 2 == 0:
            yield Moment("", rng.uniform(0.0, 2 * A_START))
        else:
            yield Moment("", rng.uniform(0.0, 0.3), 1, rng.choice(["suggest", "start", "report", "end"]))


@pytest.mark.parametrize("numbers", ASKED, ids=lambda numbers: " ".join(n.name for n in dict.fromkeys(numbers)))
def test_a_real_sweep_that_is_asked_to_end_at_any_instant_stops_and_goes_on_to_its_end(tmp_path, scratch, numbers):
    """A kill, a time limit, a terminal that closes: from the imports over the teacher and Ray's start to the trials."""
    sweep, codes = CommandLine(tmp_path / "runs" / "asked", scratch), Counter()
    moments = polite_moments(random.Random(sum(numbers)), len(numbers))
    for number, moment in zip(numbers, moments, strict=True):
        code = 129 if number == signal.SIGHUP else 130
        sweep.start()
        if moment.comes(sweep):
            sweep.process.send_signal(number)
        codes[sweep.ends()] += 1
        assert "Traceback" not in sweep.words()
        if sweep.process.returncode == -number:  # in the first tenths of a second nobody listens yet
            assert not sweep.lines() or sweep.lines()[-1]["event"] == "stop", sweep.words()
            continue
        assert sweep.process.returncode in (code, 0), sweep.words()
        if sweep.lines():
            reason = "finished" if sweep.process.returncode == 0 else "interrupted"
            assert (sweep.lines()[-1]["event"], sweep.lines()[-1]["reason"]) == ("stop", reason), sweep.words()
    assert codes[129] + codes[130] > 0, codes
    sweep.start()
    assert sweep.ends() == 0, sweep.words()
    assert sweep.lines()[-1]["reason"] == "finished"
    assert set(sweep.mlflow_statuses()) <= {"FINISHED", "KILLED", "FAILED"}
    assert sum(line["event"] == "suggest" for line in sweep.lines()) == 8 + 2
    sweep.launch("audit", sweep.folder.name)
    assert sweep.ends() == 0, sweep.words()
    assert not gone(sweep.marks, GRACE_OF_THE_KILLED)


def trial_workers(sweep):
    return [pid for pid, title in processes(sweep.marks[-1]).items() if title.startswith("ray::ImplicitFunc")]


@pytest.mark.parametrize("concurrent", [1, pytest.param(2, marks=pytest.mark.long)])
def test_trials_whose_workers_are_killed_go_on_and_no_kill_counts_twice(program, uninterrupted, concurrent):
    expected = uninterrupted(program, 0)
    sweep = program("workers", concurrent=concurrent, max_failures=50, pause=0.1)
    rng, kills = random.Random(concurrent), []
    sweep.start()
    while len(kills) < WORKER_KILLS:
        until = sweep.count(*TOLD) + rng.randrange(1, 2 * len(expected) // WORKER_KILLS)
        if not sweep.wait_for(lambda until=until: sweep.count(*TOLD) >= until):
            break
        time.sleep(rng.uniform(0.0, 0.2))
        if there := trial_workers(sweep):
            pid = rng.choice(there)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills.append((pid, time.time()))
    assert sweep.ends() == 0, sweep.words()
    check_is_right(sweep)
    retries = [line for line in sweep.lines() if line["event"] == "retry"]
    assert {line["reason"] for line in retries} == {"crash"}
    assert 1 <= hits(sweep, kills) <= len(retries) <= len(kills)
    if concurrent == 1:
        assert sweep.told() == expected


def hits(sweep, kills):
    """How many of the kills came in the middle of a trial, so that it was trained on afterwards."""
    work = sweep.work()
    last = {note["pid"]: note["trial"] for note in work}
    return sum(any(note["trial"] == last.get(pid) and note["time"] > at for note in work) for pid, at in kills)


@pytest.fixture
def cluster(scratch, monkeypatch):
    """Makes clusters of several nodes on this machine: of a head with so many CPUs at first."""
    from ray.cluster_utils import Cluster

    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("RAY_TMPDIR", str(scratch))  # without it every other Ray of this machine would join
    made = []

    def cluster(cpus):
        head = {"num_cpus": cpus, "include_dashboard": False}
        made.append(Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False))
        return made[-1]

    yield cluster
    try:
        for one in made:
            one.shutdown()
    finally:
        kill_all(mark)
        assert not gone([mark], GRACE)


def pid_of(node, service):
    return node.all_processes[service][0].process.pid


def works_on(sweep, node):
    """Whether a trial has been begun on this node."""
    workers = children(pid_of(node, "raylet"))
    return any(note["pid"] in workers for note in sweep.work())


@pytest.mark.parametrize("lost", [pytest.param("raylet and workers", marks=pytest.mark.long), "raylet"])
def test_trials_of_a_lost_node_go_on_on_another_and_a_new_node_gets_trials(program, cluster, lost):
    nodes = cluster(cpus=1)
    second = nodes.add_node(num_cpus=2)
    # trials that take longer than a worker's start: shorter ones are all done by the workers there are
    sweep = program("nodes", trials=6, asha=0, max_failures=0, pause=0.5, address=nodes.address)
    sweep.start()
    assert sweep.wait_for(lambda: works_on(sweep, second), every=0.1)
    raylet = pid_of(second, "raylet")
    for pid in [raylet, *(children(raylet) if lost == "raylet and workers" else ())]:
        os.kill(pid, signal.SIGKILL)
    second.all_processes["raylet"][0].process.wait()  # its workers take one that was not waited for as alive
    so_far = sweep.count("report")
    assert sweep.wait_for(lambda: sweep.count("report") > so_far + 3)
    third = nodes.add_node(num_cpus=2)
    assert sweep.wait_for(lambda: works_on(sweep, third), every=0.1), "a new node got no trial"
    assert sweep.ends() == 0, sweep.words()
    check_is_right(sweep)
    assert {line["reason"] for line in sweep.lines() if line["event"] == "retry"} <= {"node"}


@pytest.mark.long
def test_a_cluster_that_lives_on_takes_the_next_driver_beside_what_the_killed_one_left(program, cluster):
    nodes = cluster(cpus=2)
    sweep = program("address", concurrent=2, pause=0.1, address=nodes.address)
    rng = random.Random(0)
    progress = [10, 25, 40]
    assert len(kill_at([Moment("driver", rng.uniform(0.0, 0.1), at) for at in progress], sweep)) == len(progress)
    sweep.start()
    assert sweep.ends() == 0, sweep.words()
    check_is_right(sweep)


def test_a_head_that_says_nothing_for_some_seconds_costs_no_trial(program, cluster):
    nodes = cluster(cpus=2)
    sweep = program("stopped", concurrent=2, pause=0.2, address=nodes.address)
    sweep.start()
    assert sweep.wait_for(lambda: sweep.count("report") > 5)
    head = pid_of(nodes.head_node, "gcs_server")
    os.kill(head, signal.SIGSTOP)
    time.sleep(5.0)
    os.kill(head, signal.SIGCONT)
    assert sweep.ends() == 0, sweep.words()
    check_is_right(sweep)
    assert sweep.count("retry") == 0


CONFIRM = ("--finalists", "2", "--seeds", "2")
KILLED_AT = (3, 10)
"""After so many ends of the fourteen trainings: one in the choice among the finalists, one in the look at the test set."""


def confirmed_trainings(sweep):
    """The trainings on fresh seeds and what they gave, and how often the test set was to be read."""
    lines = sweep.lines()
    about = {(e["arm"], e["number"]): (*e["of_trial"], e["seed"]) for e in lines if e["event"] == "repeat"}
    ends = [
        (about[key], e["value"]) for e in lines if e["event"] == "end" and (key := (e["arm"], e["number"])) in about
    ]
    assert len(about) == len(set(about.values())) == len(ends) == len(dict(ends))
    return dict(ends), sum(e["event"] == "test" for e in lines)


def test_an_answer_whose_confirmation_is_killed_again_and_again_is_confirmed_by_the_same_trainings(tmp_path, scratch):
    """SIGKILL in either stage: the test set is still read for the same trainings, once, with the same figures."""
    sweep = CommandLine(tmp_path / "runs" / "killed", scratch)
    sweep.start()
    assert sweep.ends() == 0, sweep.words()
    shutil.copytree(sweep.runs, tmp_path / "copy")
    whole = CommandLine(tmp_path / "copy" / "killed", scratch)
    whole.launch("confirm", "killed", *CONFIRM)
    assert whole.ends() == 0, whole.words()
    before = sweep.count("end")
    for ended in KILLED_AT:
        sweep.launch("confirm", "killed", *CONFIRM)
        if sweep.wait_for(lambda ended=ended: sweep.count("end") >= before + ended):
            sweep.kill("all" if ended % 2 else "group")
    sweep.launch("confirm", "killed", *CONFIRM)
    assert sweep.ends() == 0, sweep.words()
    assert sweep.lines()[-1]["reason"] == "finished"
    assert confirmed_trainings(sweep) == confirmed_trainings(whole)
    assert confirmed_trainings(sweep)[1] == 1
    sweep.launch("audit", "killed")
    assert sweep.ends() == 0, sweep.words()
    assert not gone(sweep.marks + whole.marks, GRACE_OF_THE_KILLED)
