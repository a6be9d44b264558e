"""What a process may use of its machine, under affinities and in cgroups of both versions."""

import os
import subprocess
import sys

import pytest

from tune_topkd import machine

CODE = "from tune_topkd import machine; print(machine.cpus())"


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Makes cgroups of some version with some files, in one of which this process is; it may run on 8 CPUs."""

    def cgroup(version, files, inside="/job/step", root="/"):
        kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,cpu,cpuacct,memory"
        (tmp_path / "cgroup").write_text(f"0::{inside}\n" if version == 2 else f"3:cpu,cpuacct,memory:{inside}\n0::/\n")
        mounts = f"1 2 0:3 / /proc rw - proc proc rw\n4 5 0:6 {root} {tmp_path}/fs rw,nosuid shared:9 - {kind}\n"
        (tmp_path / "mountinfo").write_text(mounts)
        for name, content in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    return cgroup


def test_a_process_that_is_kept_to_one_cpu_has_one():
    done = subprocess.run(["taskset", "-c", "0", sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize(
    ("version", "files", "cpus"),
    [
        (2, {"job/step/cpu.max": "300000 100000\n"}, 3),
        (2, {"job/step/cpu.max": "max 100000\n"}, 8),
        (2, {"job/cpu.max": "250000 100000\n", "job/step/cpu.max": "max 100000\n"}, 2),
        (2, {"job/step/cpu.max": "50000 100000\n"}, 1),
        (2, {"job/step/cpu.max": "6400000 100000\n"}, 8),
        (2, {}, 8),
        (1, {"job/step/cpu.cfs_quota_us": "400000\n", "job/step/cpu.cfs_period_us": "100000\n"}, 4),
        (1, {"job/step/cpu.cfs_quota_us": "-1\n", "job/step/cpu.cfs_period_us": "100000\n"}, 8),
        (1, {"job/cpu.cfs_quota_us": "200000\n", "job/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_cgroup_caps_the_cpus(cgroup, version, files, cpus):
    cgroup(version, files)
    assert machine.cpus() == cpus


@pytest.mark.parametrize(
    ("version", "files"),
    [
        (2, {"job/memory.max": "1000000\n", "job/step/memory.max": "max\n"}),
        (1, {"job/memory.limit_in_bytes": "1000000\n", "memory.limit_in_bytes": "9223372036854771712\n"}),
    ],
)
def test_a_cgroup_caps_the_memory(cgroup, version, files):
    cgroup(version, files)
    assert machine.memory() == 1_000_000


def test_a_container_s_cgroup_is_mounted_without_those_above_it(cgroup):
    cgroup(2, {"cpu.max": "200000 100000\n"}, inside="/docker/abc", root="/docker/abc")
    assert machine.cpus() == 2


def test_without_cgroups_there_is_what_the_machine_has(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "none")
    monkeypatch.setattr(machine, "_MOUNTS", tmp_path / "none")
    assert machine.cpus() == len(os.sched_getaffinity(0))
    assert machine.memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
