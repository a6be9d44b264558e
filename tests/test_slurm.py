"""deploy/slurm/sweep.sbatch on a real Slurm of two nodes, which are namespaces of this machine: preempted and continued."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml

from tune_topkd.ledger import read_events
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import audit
from tune_topkd.tracking import sqlite_uri

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "deploy" / "slurm" / "sweep.sbatch"
NODES = {"n1": "10.77.0.1", "n2": "10.77.0.2"}
TRIALS = 60
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")

CONFIG = """
ClusterName=test
SlurmctldHost={host}({first})
SlurmctldPort=17000
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
KillWait=15
SchedulerParameters=sched_interval=2
NodeName=n1 NodeHostname={host} NodeAddr={first} Port=17001 CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr={second} Port=17002 CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 State=UP
"""


class Slurm:
    """Two nodes, each with a network, processes and a temporary folder of its own; a controller beside the first."""

    def __init__(self, folder):
        self.folder = folder
        self.spaces = {node: f"tt{os.getpid()}{node}" for node in NODES}
        self.processes = []
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHON": sys.executable,
            "RAY_TMPDIR": str(folder / "tmp"),
        }
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "TUNE_TOPKD_RUNS_DIR"):
            self.environment.pop(name, None)

    def start(self):
        for node in NODES:
            called("ip", "netns", "add", self.spaces[node])
        first, second = self.spaces.values()
        called("ip", "-n", first, "link", "add", "ve", "type", "veth", "peer", "name", "ve", "netns", second)
        for node, address in NODES.items():
            called("ip", "-n", self.spaces[node], "addr", "add", f"{address}/24", "dev", "ve")
            for device in ("lo", "ve"):
                called("ip", "-n", self.spaces[node], "link", "set", device, "up")
        (self.folder / "tmp").mkdir()
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        about = dict(zip(("first", "second"), NODES.values(), strict=True))
        config = CONFIG.format(host=socket.gethostname(), folder=self.folder, **about)
        (self.folder / "slurm.conf").write_text(config)
        files = [f"--{kind}={self.folder}/munge.{ending}" for kind, ending in (("key-file", "key"), ("socket", "sock"))]
        files += [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("pid", "log", "seed")]
        self.beside("munged", "--foreground", "--force", *files)
        self.beside("nsenter", f"--net=/run/netns/{first}", "slurmctld", "-D")
        for node, space in self.spaces.items():
            (self.folder / f"spool-{node}").mkdir()
            own = f"mount -t tmpfs tmpfs {self.folder}/tmp && exec slurmd -D -N {node}"
            apart = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
            self.beside("nsenter", f"--net=/run/netns/{space}", *apart, "bash", "-c", own)
        self.wait_for(lambda: self.said("sinfo", "-h", "-o", "%t %D").split() == ["idle", "2"], 60)

    def beside(self, *command):
        log = (self.folder / f"{len(self.processes)}.log").open("w")
        process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self.processes.append(process)

    def said(self, *command):
        """What a command of Slurm's says on the first node."""
        inside = ("nsenter", f"--net=/run/netns/{self.spaces['n1']}", *map(str, command))
        return subprocess.run(
            inside, env=self.environment, capture_output=True, text=True, cwd=self.folder, timeout=60
        ).stdout

    def submitted(self, *command):
        return self.said("sbatch", "--parsable", "--nodes=2", *command).strip()

    def state(self, job):
        """Slurm's word for how a job stands, and how often it was begun again."""
        words = dict(
            part.split("=", 1) for part in self.said("scontrol", "-o", "show", "job", job).split() if "=" in part
        )
        return words.get("JobState"), int(words.get("Restarts", 0))

    def wait_for(self, holds, seconds):
        until = time.monotonic() + seconds
        while not holds():
            outputs = "\n".join(path.read_text()[-3000:] for path in self.folder.glob("*.log"))
            outputs += "\n".join(path.read_text()[-6000:] for path in self.folder.glob("slurm-*.out"))
            assert time.monotonic() < until, outputs
            time.sleep(0.5)

    def stop(self):
        self.said("scancel", "-u", "root", "--signal=KILL")
        for process in reversed(self.processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            process.wait()
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def called(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no namespaces here: {' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def slurm():
    if os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)):
        pytest.skip("needs Slurm, as root: apt-get install slurm-wlm munge iproute2")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o711)  # munge's socket is everybody's
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)


def sweep(slurm, name, trials, *options):
    """Submit a sweep to the partition that others may take the nodes from; its job and its ledger."""
    space = yaml.safe_load((ROOT / "search_spaces" / "digits-linear.yaml").read_text())
    space["teacher"]["recipe"]["epochs"] = 2
    (slurm.folder / "space.yaml").write_text(yaml.safe_dump(space | {"baselines": None}))
    words = ("space.yaml", "--name", name, "--trials", trials, "--epochs", 3, "--set", "sweep.asha=null")
    runs = slurm.folder / "runs"
    job = slurm.submitted("--partition=low", "--time=20", *options, SCRIPT, *words, "--runs-dir", runs)
    return job, runs / name / "ledger.jsonl"


def ends(ledger):
    return [e.key.number for e in read_events(ledger)[0] if e.name == "end"] if ledger.exists() else []


def check_finished(slurm, name, ledger):
    events = read_events(ledger)[0]
    assert events[-1].data["reason"] == "finished"
    assert sorted(ends(ledger)) == list(range(TRIALS)), "each trial ended once"
    reports = Counter((e.key.number, e.data["epoch"]) for e in events if e.name == "report")
    assert set(reports.values()) == {1}
    runs = ledger.parents[1]
    assert audit(name, Workspace.at(runs, sqlite_uri(runs / "mlflow.db"), "local")) == []
    assert not list(slurm.folder.glob(".tune-topkd-*")), "what the script needed is gone"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_preempted_sweep_is_begun_again_and_finished_on_both_nodes(slurm):
    job, ledger = sweep(slurm, "preempted", TRIALS)
    slurm.wait_for(lambda: len(ends(ledger)) >= 2, 200)
    other = slurm.submitted("--partition=high", "--time=5", "--wrap", "sleep 300")
    slurm.wait_for(lambda: slurm.state(other)[0] == "RUNNING", 90)
    before = ends(ledger)
    assert len(before) < TRIALS
    assert slurm.state(job)[1] == 1
    slurm.said("scancel", other)
    slurm.said("scontrol", "update", f"JobId={job}", "StartTime=now")
    slurm.wait_for(lambda: slurm.state(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"), 250)
    output = (slurm.folder / f"slurm-{job}.out").read_text()
    assert slurm.state(job)[0] == "COMPLETED", output
    assert ends(ledger)[: len(before)] == before
    check_finished(slurm, "preempted", ledger)
    assert "Ray: the cluster at 10.77.0.1:" in output


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_before_its_time_is_up_it_stops_cleanly_and_asks_to_be_run_again(slurm):
    job, ledger = sweep(slurm, "timed", TRIALS)
    slurm.wait_for(lambda: len(ends(ledger)) >= 2, 200)
    slurm.said("scancel", "--batch", "--signal=TERM", job)
    slurm.wait_for(lambda: slurm.state(job)[0] == "PENDING", 100)
    assert read_events(ledger)[0][-1].data["reason"] == "interrupted"
    slurm.said("scontrol", "update", f"JobId={job}", "StartTime=now")
    slurm.wait_for(lambda: slurm.state(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"), 250)
    check_finished(slurm, "timed", ledger)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_mistake_ends_the_job_and_is_not_tried_again(slurm):
    job, _ = sweep(slurm, "wrong", 0)
    slurm.wait_for(lambda: slurm.state(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"), 200)
    assert slurm.state(job) == ("FAILED", 0)
    output = (slurm.folder / f"slurm-{job}.out").read_text()
    assert "error: space.yaml: sweep.trials" in output, output
