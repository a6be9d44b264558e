"""Folders for what is temporary: where they can be, whose they are, and what may lie beside them."""

import errno
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tune_topkd.execution import scratch
from tune_topkd.execution.scratch import NoScratchError
from tune_topkd.execution.scratch import scratch_folder

HOLD = """
import sys
from tune_topkd.execution.scratch import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def base(monkeypatch):
    """An empty folder with a short path, the only place there is."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    for name in scratch.CHOSEN_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(scratch, "OTHERWISE", (str(folder),))
    monkeypatch.setattr(scratch, "_told", set())
    yield folder
    shutil.rmtree(folder)


def left(base, name="ttk-left", content=b""):
    """What a process that was killed has left."""
    (base / name).mkdir()
    (base / name / "owner").write_bytes(content)
    return base / name


def test_it_is_for_this_user_alone_and_gone_at_the_end(base):
    with scratch_folder() as folder:
        assert Path(folder).parent == base
        assert os.stat(folder).st_mode & 0o777 == 0o700
        (Path(folder) / "more").write_text("x")
    assert not list(base.iterdir())


@pytest.mark.parametrize("variable", scratch.CHOSEN_BY_USER)
def test_where_the_user_says_comes_first(base, variable, monkeypatch):
    (base / "mine").mkdir()
    monkeypatch.setenv(variable, str(base / "mine"))
    with scratch_folder() as folder:
        assert Path(folder).parent == base / "mine"


def too_long(base):
    path = base / ("x" * 110)
    path.mkdir()
    return path


def missing(base):
    return base / "missing"


def a_file(base):
    (base / "file").write_text("x")
    return base / "file"


@pytest.mark.parametrize(
    ("unusable", "why"),
    [(too_long, "room for the names of sockets"), (missing, "No such file"), (a_file, "Not a directory")],
)
def test_where_it_cannot_be_is_passed_over_with_one_note(base, unusable, why, monkeypatch, caplog):
    place = unusable(base)
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with scratch_folder() as folder:
                assert Path(folder).parent == base
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"RAY_TMPDIR is not used for temporary files: {place}: ")
    assert why in caplog.messages[0]
    assert not place.is_dir() or not list(place.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_place_that_refuses_is_passed_over(base, monkeypatch, number):
    full, made = base / "full", tempfile.mkdtemp
    full.mkdir()
    monkeypatch.setenv("TMPDIR", str(full))

    def refusing(prefix, dir):
        if Path(dir) == full:
            raise OSError(number, os.strerror(number))
        return made(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "mkdtemp", refusing)
    with scratch_folder() as folder:
        assert Path(folder).parent == base


def test_a_full_disk_is_passed_over_and_left_clean(base, monkeypatch):
    full, write = base / "full", Path.write_bytes
    full.mkdir()
    monkeypatch.setenv("TMPDIR", str(full))

    def refusing(path, content):
        if path.is_relative_to(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refusing)
    with scratch_folder() as folder:
        assert Path(folder).parent == base
    assert not list(full.iterdir())


def test_nowhere_at_all_is_one_line_with_each_reason(base, monkeypatch):
    monkeypatch.setattr(scratch, "OTHERWISE", (str(too_long(base)),))
    monkeypatch.setenv("TMPDIR", str(base / "missing"))
    told = r"missing: No such .*; .*xxx: its path has .* RAY_TMPDIR names"
    with pytest.raises(NoScratchError, match=told) as raised, scratch_folder():
        pass
    assert "\n" not in str(raised.value)


def test_what_a_killed_process_left_is_removed_and_what_is_held_stays(base):
    old = left(base)
    environment = os.environ | {"RAY_TMPDIR": str(base)}
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        held = Path(other.stdout.readline().strip())
        assert held.parent == base
        assert not old.exists()
        with scratch_folder():
            assert held.exists()
        other.kill()
    with scratch_folder() as folder:
        assert not held.exists()
        assert list(base.iterdir()) == [Path(folder)]


def a_pipe(base):
    (base / "ttk-pipe").mkdir()
    os.mkfifo(base / "ttk-pipe" / "owner")
    return base / "ttk-pipe"


def a_link_to_a_file(base):
    (base / "ttk-link").mkdir()
    (base / "precious").write_text("x")
    (base / "ttk-link" / "owner").symlink_to(base / "precious")
    return base / "precious"


def a_link_to_a_folder(base):
    other = left(base, "elsewhere")
    (base / "ttk-link").symlink_to(other)
    return other


def a_socket(base):
    import socket

    (base / "ttk-sock").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(base / "ttk-sock" / "owner"))
    return base / "ttk-sock"


def a_folder_for_an_owner(base):
    (base / "ttk-dir" / "owner").mkdir(parents=True)
    return base / "ttk-dir"


def of_another_user(base):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    other = left(base, "ttk-theirs")
    os.chown(other, 12345, 12345)
    return other


def with_another_user_s_owner_file(base):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    other = left(base, "ttk-theirs")
    os.chown(other / "owner", 12345, 12345)
    return other


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "put",
    [
        a_pipe,
        a_link_to_a_file,
        a_link_to_a_folder,
        a_socket,
        a_folder_for_an_owner,
        of_another_user,
        with_another_user_s_owner_file,
    ],
)
def test_what_anybody_can_put_there_keeps_nothing_waiting_and_is_left_alone(base, put):
    stays = put(base)
    with scratch_folder() as folder:
        assert Path(folder).is_dir()
    assert stays.exists()


def test_a_place_that_cannot_be_listed_is_used_all_the_same(base, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(scratch.os, "scandir", refused)
        folder = scratch._made()
        scratch._remove_left(base)
    assert folder.parent == base
