"""The ledger: what it keeps, what it refuses, and what is left of it after a kill at any byte."""

import contextlib
import fcntl
import json
import math
import os
import re
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from tune_topkd.ledger import LEDGER_VERSION
from tune_topkd.ledger import Content
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Driver
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Plateau
from tune_topkd.ledger import Prepared
from tune_topkd.ledger import Report
from tune_topkd.ledger import Retry
from tune_topkd.ledger import Share
from tune_topkd.ledger import Start
from tune_topkd.ledger import Stop
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TeacherFile
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import is_driven
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_header
from tune_topkd.ledger import read_state
from tune_topkd.ledger import tell_all
from tune_topkd.ledger.events import decode
from tune_topkd.ledger.events import encode

SWEEP = {"sweep": "digits", "id": "abc", "seed": 7, "trials": 3, "epochs": 2}
HEADER = Header(**SWEEP)
FIRST = TrialKey("search", 0)


def suggest(number, arm="search"):
    return Suggest(key=TrialKey(arm, number), proposal={"k": 0.5}, params={"k": 5})


def start(number, attempt=1):
    return Start(key=TrialKey("search", number), attempt=attempt)


def report(number, epoch, top1=50.0, decision=Decision.CONTINUE):
    metrics = {"val_top1": top1, "train_loss": 0.25}
    return Report(key=TrialKey("search", number), epoch=epoch, metrics=metrics, decision=decision)


def end(number, value=50.0, status=TrialStatus.COMPLETED, arm="search", reason="full budget", error=""):
    return End(key=TrialKey(arm, number), epoch=2, status=status, reason=reason, error=error, value=value)


def retry(number, reason="crash", share=None):
    return Retry(key=TrialKey("search", number), reason=reason, error="it died", share=share)


STORY = [
    Driver(host="here", pid=1, trials=3),
    suggest(0),
    suggest(1),
    start(0),
    report(0, 1),
    start(1),
    report(1, 1, math.nan, Decision.DIVERGED),
    end(1, None, TrialStatus.FAILED, reason="diverged", error="é → \r\n\u2028 NaN"),
    retry(0),
    start(0, 2),
    retry(0, "oom", Share(2.0, 0.5)),
    start(0, 3),
    report(0, 2, 60.0, Decision.COMPLETE),
    end(0, 60.0),
    suggest(2),
    suggest(0, "kd"),
    Stop(reason="interrupted"),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def ledger(path):
    with Ledger.create(path, HEADER) as ledger:
        yield ledger


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The bytes of a whole ledger and the state after each of its lines."""
    path = tmp_path_factory.mktemp("story") / "ledger.jsonl"
    with Ledger.create(path, HEADER) as ledger:
        states = [snapshot(ledger.state)]
        for event in STORY:
            ledger.append(event)
            states.append(snapshot(ledger.state))
    return path.read_bytes(), states


def snapshot(state):
    """All that a state tells, as text: equal texts are equal states, NaN included."""
    return repr(vars(state))


def line(seq, event, **data):
    """A line with a right checksum, whatever it says."""
    body = json.dumps({"seq": seq, "time": 0.0, "event": event, **data}, separators=(",", ":")).encode()[:-1]
    return b'%s,"crc":"%08x"}\n' % (body, zlib.crc32(body))


# --- writing and reading again --------------------------------------------------------------------------------------


def test_a_reopened_ledger_has_the_same_state(path):
    with Ledger.create(path, HEADER) as ledger:
        ledger.append(*STORY)
        written = snapshot(ledger.state)
    assert snapshot(read_state(path)) == written
    with Ledger.open(path) as ledger:
        assert snapshot(ledger.state) == written


def test_a_state_tells_what_happened(ledger):
    ledger.append(*STORY)
    state = ledger.state
    done, failed = state.trials[FIRST], state.trials[TrialKey("search", 1)]
    assert (state.header.sweep, state.target, state.stop_reason) == ("digits", 3, "interrupted")
    assert (done.status, done.value, done.epoch, done.attempts) == (TrialStatus.COMPLETED, 60.0, 2, 3)
    assert (done.params, done.proposal, done.decision) == ({"k": 5}, {"k": 0.5}, Decision.COMPLETE)
    assert done.reports == {1: {"val_top1": 50.0, "train_loss": 0.25}, 2: {"val_top1": 60.0, "train_loss": 0.25}}
    assert (failed.reason, failed.value, failed.error) == ("diverged", None, "é → \r\n\u2028 NaN")
    assert math.isnan(failed.reports[1]["val_top1"])
    assert done.suggested_at <= done.ended_at
    assert [record.key for record in state.running()] == [TrialKey("search", 2), TrialKey("kd", 0)]


def test_a_line_is_json_with_place_time_event_and_checksum(ledger, path):
    ledger.append(suggest(0), report(0, 1, math.inf))
    lines = path.read_bytes().splitlines()
    for seq, (text, name) in enumerate(zip(lines, ["sweep", "suggest", "report"], strict=True)):
        told = json.loads(text)
        assert list(told)[:3] == ["seq", "time", "event"]
        assert (told["seq"], told["event"]) == (seq, name)
        body = text[: text.rindex(b',"crc"')]
        assert told["crc"] == f"{zlib.crc32(body):08x}"
    assert json.loads(lines[0])["version"] == LEDGER_VERSION
    assert json.loads(lines[2])["metrics"]["val_top1"] == "inf"


FULL_HEADER = Header(
    sweep="s", id="i", seed=7, trials=3, baselines=2, epochs=9, metric="val_top1", dataset="digits", num_classes=10,
    teacher="cnn", student="é", method="topkd", digest="d", space_digest="e", first=[{"k": 5, "lr": 0.1}],
    versions={"torch": "2.11"}, git_commit=None,
)  # fmt: skip
KEY = '"arm":"search","number":0'
PREPARED = Prepared(digest="d", identity_version=1, share=Share(1.0, 0.0))
DIVERGED = {"reason": "diverged", "error": "NaN"}
LINES = [
    (FULL_HEADER,
     '"sweep","version":3,"sweep":"s","id":"i","seed":7,"trials":3,"baselines":2,"epochs":9,"metric":"val_top1","dataset":'
     '"digits","num_classes":10,"teacher":"cnn","student":"é","method":"topkd","digest":"d","space_digest":"e",'
     '"first":[{"k":5,"lr":0.1}],"versions":{"torch":"2.11"},"git_commit":null'),
    (Driver(host="h", pid=1, trials=3, folder="/x", versions={}, places={"data.download": True}),
     '"driver","host":"h","pid":1,"trials":3,"folder":"/x","versions":{},"places":{"data.download":true}'),
    (replace(PREPARED, teacher_file=TeacherFile("t", 9.5), identities={"data": "x"}, share=Share(1, 0.0)),
     '"prepared","digest":"d","teacher_file":{"key":"t","val_top1":9.5},"identities":{"data":"x"},"identity_version":1,'
     '"share":[1,0.0]'),
    (PREPARED,
     '"prepared","digest":"d","teacher_file":{},"identities":{},"identity_version":1,"share":[1.0,0.0]'),
    (suggest(0), f'"suggest",{KEY},"proposal":{{"k":0.5}},"params":{{"k":5}}'),
    (start(0, 2), f'"start",{KEY},"attempt":2'),
    (report(0, 1, math.nan, Decision.DIVERGED),
     f'"report",{KEY},"epoch":1,"metrics":{{"val_top1":"nan","train_loss":0.25}},"decision":"diverged"'),
    (retry(0), f'"retry",{KEY},"reason":"crash","error":"it died","share":null'),
    (retry(0, "oom", Share(2.0, 0.5)), f'"retry",{KEY},"reason":"oom","error":"it died","share":[2.0,0.5]'),
    (end(0), f'"end",{KEY},"epoch":2,"status":"completed","reason":"full budget","value":50.0'),
    (end(0, 50.0, TrialStatus.PRUNED), f'"end",{KEY},"epoch":2,"status":"pruned","reason":"full budget","value":50.0'),
    (end(0, None, TrialStatus.FAILED, **DIVERGED),
     f'"end",{KEY},"epoch":2,"status":"failed","reason":"diverged","error":"NaN","value":null'),
    (end(0, None, TrialStatus.FAILED, reason="oom", error="\udce9"),
     f'"end",{KEY},"status":"failed","reason":"oom","error":"\\udce9","epoch":2,"value":null'),
    (Driver(host="h", pid=1, trials=3, gpu_hours=1.5),
     '"driver","host":"h","pid":1,"trials":3,"folder":null,"versions":{},"places":{},"gpu_hours":1.5'),
    (Plateau(trials=9, best=61.5, gained=0.25, newest=5, points=1.0),
     '"plateau","trials":9,"best":61.5,"gained":0.25,"newest":5,"points":1.0'),
    (Stop(reason="finished"), '"stop","reason":"finished","error":""'),
]  # fmt: skip


@pytest.mark.parametrize(("content", "text"), LINES, ids=[f"{n} {c.NAME}" for n, (c, _) in enumerate(LINES)])
def test_a_line_of_each_event_is_as_version_3_has_it_byte_for_byte(content, text):
    event = Event(4, 1.5, content)
    written = encode(event)
    body = f'{{"seq":4,"time":1.5,"event":{text}'.encode()
    assert written == b'%s,"crc":"%08x"}\n' % (body, zlib.crc32(body))
    assert repr(decode(written[:-1], "line 5")) == repr(event)


@pytest.mark.parametrize("version", [1, 2])
def test_the_header_of_an_older_version_is_read_whole(path, version):
    """With the key that has moved to `prepared`, and with one that no version has."""
    said = {
        **Event(0, 0.0, FULL_HEADER).data,
        "version": version,
        "teacher_file": {"key": "t", "val_top1": 9.5},
        "odd": 1,
    }
    path.write_bytes(line(0, "sweep", **said))
    header = replace(FULL_HEADER, version=version, teacher_file=TeacherFile("t", 9.5))
    assert read_state(path).header == read_header(path) == header


def test_the_first_line_is_read_alone(ledger, path):
    path.write_bytes(path.read_bytes() + b"damaged\n")
    assert read_header(path) == HEADER
    path.write_bytes(line(0, "stop", reason="x"))
    with pytest.raises(LedgerError, match="line 1 is no `sweep` event"):
        read_header(path)
    path.write_bytes(b'{"seq":0')
    with pytest.raises(LedgerError, match="line 1 is not as it was written"):
        read_header(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_lacks_comes_back_as_a_number(ledger, path, value):
    ledger.append(suggest(0), report(0, 1, value), end(0, value, TrialStatus.FAILED))
    record = read_state(path).trials[FIRST]
    assert repr(record.reports[1]["val_top1"]) == repr(record.value) == repr(value)


def test_append_returns_the_events_as_readers_see_them(ledger, path):
    written = ledger.append(*STORY[:3])
    assert read_events(path)[0][1:] == written
    assert [(event.seq, event.name) for event in written] == [(1, "driver"), (2, "suggest"), (3, "suggest")]
    assert written[1].key == FIRST


def test_a_text_that_is_no_unicode_does_not_stop_the_sweep(ledger, path):
    ledger.append(suggest(0), end(0, None, TrialStatus.FAILED, error="no file \udce9.pt"))
    assert read_state(path).trials[FIRST].error == "no file \udce9.pt"


def test_a_retry_says_why_and_with_which_share(path, ledger):
    ledger.append(suggest(0), start(0), retry(0))
    assert (ledger.state.trials[FIRST].retries, ledger.state.trials[FIRST].share) == (["crash"], None)
    ledger.append(start(0, 2), retry(0, "oom", Share(2.0, 0.5)))
    record = read_state(path).trials[FIRST]
    assert (record.retries, record.share) == (["crash", "oom"], Share(2.0, 0.5))
    assert record.status is TrialStatus.RUNNING


def test_a_ledger_of_the_version_before_is_read(path):
    path.write_bytes(line(0, "sweep", version=1, **SWEEP))
    with Ledger.open(path) as ledger:
        ledger.append(suggest(0))
    assert read_state(path).header.version == 1


def test_a_new_driver_clears_the_stop_and_moves_the_target(path, ledger):
    ledger.append(*STORY, Driver.here(trials=9))
    state = read_state(path)
    assert (state.stop_reason, state.target, state.last_driver.pid) == ("", 9, os.getpid())


def test_an_existing_ledger_is_never_overwritten(path, ledger):
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"ledger\.jsonl: exists already$"):
        Ledger.create(path, HEADER)
    assert path.read_bytes() == before


def test_one_that_may_be_replaced_is_begun_anew_unless_a_process_drives_it(path):
    with Ledger.create(path, HEADER), pytest.raises(LedgerError, match="is being driven by"):
        Ledger.create(path, HEADER, may_replace=lambda state: True)
    larger = replace(HEADER, trials=77)
    Ledger.create(path, larger, may_replace=lambda state: not state.is_prepared).close()
    assert read_state(path).target == 77


def test_what_is_done_before_the_first_line_is_done_by_the_owner_alone(path, ledger):
    done = []
    for may_replace in (lambda state: True, lambda state: False):
        with pytest.raises(LedgerError):
            Ledger.create(path, HEADER, before=lambda: done.append(1), may_replace=may_replace)
    assert not done


@pytest.mark.parametrize("left", [b"", b'{"seq":0,"ti'])
def test_a_file_that_a_kill_left_without_a_whole_line_is_no_ledger(path, left):
    path.write_bytes(left)
    Ledger.create(path, HEADER).close()
    assert read_state(path).last_seq == 0


def test_of_many_processes_that_begin_one_ledger_one_succeeds(path):
    script = (
        "import pathlib, sys\n"
        "from tune_topkd.ledger import Header, Ledger, LedgerError\n"
        "header = Header(sweep=sys.argv[2], id='i', seed=0, trials=1)\n"
        "try:\n"
        "    ledger = Ledger.create(pathlib.Path(sys.argv[1]), header)\n"
        "    print('mine', flush=True)\n"
        "    sys.stdin.read()\n"
        "except LedgerError as error:\n"
        "    print(error, flush=True)\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path), str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for n in range(4)
    ]
    said = [process.stdout.readline().strip() for process in started]
    for process in started:
        process.communicate()
    assert said.count("mine") == 1
    assert all("exists already" in text or "is being driven" in text for text in said if text != "mine")
    assert read_state(path).header.sweep == str(said.index("mine"))


def test_what_was_prepared_and_where_files_are_now_is_in_the_state(path, ledger):
    assert not ledger.state.is_prepared
    ledger.append(
        Prepared(teacher_file=TeacherFile("t", 9.0), identities={"data": "d"}, share=Share(1, 0)),
        Driver.here(trials=3, places={"data.root": "a", "teacher.checkpoint": "t"}),
        Driver.here(trials=3, places={"data.root": "b"}),
    )
    state = read_state(path)
    assert state.is_prepared
    assert state.teacher_file == TeacherFile("t", 9.0)
    assert (state.identities, state.prepared.share) == ({"data": "d"}, Share(1, 0))
    assert state.places == {"data.root": "b", "teacher.checkpoint": "t"}
    with pytest.raises(LedgerError, match="a second `prepared` event"):
        ledger.append(Prepared())


def test_a_sweep_of_an_older_version_counts_as_prepared(path):
    path.write_bytes(line(0, "sweep", version=2, **SWEEP, teacher_file={"key": "t", "val_top1": 9.0}))
    assert read_state(path).is_prepared
    assert read_state(path).teacher_file == TeacherFile("t", 9.0)
    path.write_bytes(line(0, "sweep", version=2, **SWEEP, teacher_file={}))
    assert read_state(path).teacher_file is None


def test_a_missing_ledger_is_told(path):
    with pytest.raises(LedgerError, match="cannot be opened: No such file or directory"):
        Ledger.open(path)
    with pytest.raises(LedgerError, match="cannot be read: No such file or directory"):
        read_state(path)


@pytest.mark.parametrize("content", [b"", b'{"seq":0,"time":1'])
def test_a_ledger_without_its_first_line_never_began(path, content):
    path.write_bytes(content)
    for opened in (Ledger.open, read_state):
        with pytest.raises(LedgerError, match="has no `sweep` event; the sweep never began"):
            opened(path)
    assert path.read_bytes() == content


# --- torn and damaged -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(share=st.floats(0, 1))
def test_a_ledger_cut_at_any_byte_goes_on_from_a_prefix_of_the_truth(tmp_path_factory, story, share):
    content, states = story
    cut = content[: round(share * len(content))]
    whole = cut.count(b"\n")
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(cut)
    if whole == 0:
        with pytest.raises(LedgerError, match="never began"):
            Ledger.open(path)
        return
    assert snapshot(read_state(path)) == states[whole - 1]
    with Ledger.open(path) as ledger:
        assert snapshot(ledger.state) == states[whole - 1]
        assert path.read_bytes() == cut[: cut.rindex(b"\n") + 1]
        ledger.append(suggest(100))
        went_on = snapshot(ledger.state)
    assert snapshot(read_state(path)) == went_on


def test_a_ledger_cut_after_each_byte_has_the_state_of_its_whole_lines(tmp_path, story):
    content, states = story
    path = tmp_path / "cut.jsonl"
    for length in range(content.index(b"\n") + 1, len(content) + 1, 7):
        path.write_bytes(content[:length])
        assert snapshot(read_state(path)) == states[content[:length].count(b"\n") - 1]


@settings(deadline=None)
@given(data=st.data())
def test_a_flipped_byte_in_any_whole_line_is_an_error_with_the_line(tmp_path_factory, story, data):
    content, _ = story
    place = data.draw(st.integers(0, len(content) - 2))  # without its last newline, the last line is torn, not whole
    damaged = bytearray(content)
    damaged[place] ^= data.draw(st.integers(1, 255))
    number = content[:place].count(b"\n") + 1
    path = tmp_path_factory.getbasetemp() / "flipped.jsonl"
    path.write_bytes(damaged)
    for opened in (Ledger.open, read_state, read_events):
        with pytest.raises(LedgerError, match=rf"flipped\.jsonl: line {number} is not as it was written"):
            opened(path)
    assert path.read_bytes() == bytes(damaged)


@pytest.mark.parametrize("ending", [b"\r", b"\r\n", b"\x0b", b"\x85", b"\n\n"])
def test_lines_end_in_a_newline_and_nothing_else(path, story, ending):
    lines = story[0].split(b"\n")
    path.write_bytes(lines[0] + b"\n" + lines[1] + ending + b"\n".join(lines[2:]))
    with pytest.raises(LedgerError, match=r"line [23] is not as it was written"):
        Ledger.open(path)


CHANGES = {
    "a line removed": (lambda lines: lines[:3] + lines[4:], 5),
    "the first line removed": (lambda lines: lines[1:], 2),
    "a line doubled": (lambda lines: lines[:4] + lines[3:], 4),
    "two lines swapped": (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], 5),
    "a line of another ledger": (lambda lines: [*lines[:3], line(9, "stop", reason="x"), *lines[4:]], 10),
}


@pytest.mark.parametrize(("change", "number"), CHANGES.values(), ids=CHANGES)
def test_lines_that_do_not_follow_are_an_error_with_the_line(path, story, change, number):
    path.write_bytes(b"".join(change(story[0].splitlines(keepends=True))))
    for opened in (Ledger.open, read_state):
        with pytest.raises(LedgerError, match=rf"ledger\.jsonl: line {number}: follows line .*missing or doubled"):
            opened(path)


def test_a_ledger_of_another_version_is_named_and_left_alone(path):
    content = line(0, "sweep", version=4, trials=3) + b'{"torn'
    path.write_bytes(content)
    for opened in (Ledger.open, read_state):
        with pytest.raises(
            LedgerError, match="line 1: this is ledger version 4; this program reads versions 1, 2 and 3"
        ):
            opened(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (line(1, "dance"), "line 2: unknown event 'dance'"),
        (line(1, "sweep", version=1, **SWEEP), "line 2: a second `sweep` event"),
        (line(1, "stop"), "line 2: `stop` is incomplete: KeyError"),
        (line(1, "sweep", version=1, trials=3), "line 2: `sweep` is incomplete: KeyError('sweep')"),
        (line(1, "suggest", arm="search", number=0), "line 2: `suggest` is incomplete: KeyError"),
        (
            line(1, "report", arm="search", number=0, epoch=1, metrics={}, decision="maybe"),
            "line 2: `report` is incomplete: ValueError(\"'maybe' is not a valid Decision\")",
        ),
        (line(1, "stop", reason="x").replace(b'"seq":1,', b""), "line 2 is not as it was written"),
    ],
)
def test_a_line_that_no_driver_writes_is_an_error_with_the_line(path, ledger, second, told):
    ledger.close()
    path.write_bytes(path.read_bytes() + second)
    with pytest.raises(LedgerError, match=re.escape(f"ledger.jsonl: {told}")):
        Ledger.open(path)


def test_a_line_with_a_right_checksum_but_no_event_is_an_error_with_the_line(path, ledger):
    body = b'{"time":0.0'
    path.write_bytes(path.read_bytes() + b'%s,"crc":"%08x"}\n' % (body, zlib.crc32(body)))
    with pytest.raises(LedgerError, match="line 2 is no event: KeyError"):
        read_state(path)


# --- one driver -----------------------------------------------------------------------------------------------------


def test_a_second_opener_is_refused_with_the_firsts_host_and_process(path):
    script = (
        "import sys, pathlib\n"
        "from tune_topkd.ledger import Driver, Header, Ledger\n"
        "ledger = Ledger.create(pathlib.Path(sys.argv[1]), Header(sweep='s', id='i', seed=0, trials=1))\n"
        "ledger.append(Driver.here(trials=1))\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        before = path.read_bytes()
        assert is_driven(path)
        told = re.escape(f"is being driven by process {other.pid} on {os.uname().nodename}")
        with pytest.raises(LedgerError, match=told):
            Ledger.open(path)
        assert read_state(path).last_driver.pid == other.pid  # reading is free
        assert path.read_bytes() == before
        other.kill()
    assert not is_driven(path)
    with Ledger.open(path) as ledger:
        assert ledger.state.last_driver.pid == other.pid


def test_a_driver_that_has_let_go_is_not_named_for_the_one_at_work(path, ledger):
    ledger.append(*STORY)
    with pytest.raises(LedgerError, match=r"is being driven by another process$"):
        Ledger.open(path)


def test_a_ledger_held_before_its_first_line_is_driven_too(path):
    with open(path, "wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(LedgerError, match=r"is being driven by another process$"):
            Ledger.open(path)


def test_who_only_looks_does_not_keep_a_driver_out(path, ledger, monkeypatch):
    ledger.close()
    looker = open(path, "rb")
    fcntl.flock(looker, fcntl.LOCK_SH)  # as `is_driven` does, for an instant
    monkeypatch.setattr(time, "sleep", lambda _: looker.close())
    Ledger.open(path).close()
    assert looker.closed


def test_it_is_driven_while_it_is_open(path, ledger):
    assert is_driven(path)
    ledger.close()
    assert not is_driven(path)


# --- following ------------------------------------------------------------------------------------------------------


def test_a_follower_sees_each_event_once_however_the_file_grows(path, story):
    content, states = story
    seen, offset, state = [], 0, SweepState()
    for length in [*range(0, len(content), 37), len(content), len(content)]:
        path.write_bytes(content[:length])
        events, offset = read_events(path, offset)
        assert offset == content[:length].rfind(b"\n") + 1
        for event in events:
            state.apply(event)
        seen += events
    assert [event.seq for event in seen] == list(range(len(states)))
    assert snapshot(state) == states[-1]


def test_a_follower_finds_damage_after_its_offset(path, ledger):
    _, offset = read_events(path)
    ledger.append(suggest(0))
    path.write_bytes(path.read_bytes()[:-20] + b"x" * 19 + b"\n")
    with pytest.raises(LedgerError, match="a line read later is not as it was written"):
        read_events(path, offset)


# --- a disk that refuses --------------------------------------------------------------------------------------------


@pytest.fixture
def failing_sync(monkeypatch):
    """A context in which every fsync raises the given error."""

    @contextlib.contextmanager
    def failing(error):
        def fsync(_):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            yield

    return failing


FULL = OSError(28, "No space left on device")


INTERRUPTIONS = [KeyboardInterrupt(), SystemExit(1), MemoryError(), FULL]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=repr)
def test_a_write_that_fails_keeps_nothing_and_the_next_one_is_whole(path, ledger, failing_sync, error):
    ledger.append(*STORY[:4])
    before, state = path.read_bytes(), snapshot(ledger.state)
    record = ledger.state.trials[FIRST]
    with failing_sync(error), pytest.raises(type(error)):
        ledger.append(report(0, 5), end(0), suggest(7), suggest(9, "ce"))
    assert (path.read_bytes(), snapshot(ledger.state)) == (before, state)
    assert ledger.state.trials[FIRST] is record, "who holds a record sees what is written later"
    ledger.append(report(0, 5), Stop(reason="interrupted"))
    assert record.epoch == 5
    assert snapshot(read_state(path)) == snapshot(ledger.state)


@pytest.mark.parametrize("after", range(0, 400, 13))
def test_a_disk_that_fills_in_the_middle_of_a_line_takes_the_next_one_when_it_has_room(path, ledger, after):
    class Full:
        """Takes so many bytes and no more."""

        def __init__(self, stream):
            self._stream, self._left = stream, after

        def write(self, view):
            if not self._left:
                raise FULL
            taken = self._stream.write(view[: self._left])
            self._left -= taken
            return taken

        def __getattr__(self, name):
            return getattr(self._stream, name)

    stream, before = ledger._stream, path.read_bytes()
    ledger._stream = Full(stream)
    with pytest.raises(OSError, match="No space left"):
        ledger.append(*STORY)
    assert path.read_bytes() == before
    ledger._stream = stream
    ledger.append(*STORY)
    assert snapshot(read_state(path)) == snapshot(ledger.state)


SIGNALS = """
import pathlib, random, signal, sys
from tune_topkd.ledger import Header, Ledger, Stop, Suggest, TrialKey, read_state

chance, caught = random.Random(0), 0
ledger = Ledger.create(pathlib.Path(sys.argv[1]), Header(sweep="s", id="i", seed=0, trials=9999))
for number in (signal.SIGINT, signal.SIGTERM):  # a shell's job in the background ignores SIGINT
    signal.signal(number, signal.default_int_handler)
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(chance.choice([signal.SIGINT, signal.SIGTERM])))
while caught < 500:
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 2e-3))
        while True:
            number = len(ledger.state.trials)
            ledger.append(Suggest(key=TrialKey("search", number), proposal={}, params={}))
    except KeyboardInterrupt:
        caught += 1
ledger.append(Stop(reason="interrupted"))
assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.default_int_handler
ledger.close()
state = read_state(ledger.path)
assert repr(vars(state)) == repr(vars(ledger.state))
print(caught, len(state.trials))
"""


def test_signals_at_any_instant_of_a_write_leave_a_ledger_that_takes_a_stop(path):
    done = subprocess.run([sys.executable, "-c", SIGNALS, str(path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 10


def test_a_torn_line_that_cannot_be_taken_back_is_dropped_at_the_next_opening(path, ledger):
    class Dying:
        """Takes half a line and then nothing more, not even a truncation."""

        def __init__(self, stream):
            self.tell, self.close, self._stream = stream.tell, stream.close, stream
            self._left = 30

        def write(self, view):
            if not self._left:
                raise FULL
            taken, self._left = self._stream.write(view[: self._left]), 0
            return taken

        def truncate(self, _):
            raise FULL

    ledger._stream = Dying(ledger._stream)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        ledger.append(suggest(0))
    with pytest.raises(LedgerError, match="an earlier write has failed"):
        ledger.append(suggest(0))
    ledger.close()
    assert len(path.read_bytes()) == len(before) + 30
    Ledger.open(path).close()
    assert path.read_bytes() == before


def test_a_write_in_pieces_is_whole(path, ledger):
    class Slow:
        """Takes seven bytes at a time, as a disk may."""

        def __init__(self, stream):
            self._stream = stream

        def write(self, view):
            return self._stream.write(view[:7])

        def __getattr__(self, name):
            return getattr(self._stream, name)

    ledger._stream = Slow(ledger._stream)
    ledger.append(*STORY)
    assert snapshot(read_state(path)) == snapshot(ledger.state)


def test_a_full_disk_leaves_whole_lines_and_the_sweep_goes_on_after_room_is_made(path):
    script = (
        "import resource, signal, sys, pathlib\n"
        "from tune_topkd.ledger import Header, Ledger, Suggest, TrialKey\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "ledger = Ledger.create(pathlib.Path(sys.argv[1]), Header(sweep='s', id='i', seed=0, trials=9999))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "number = 0\n"
        "try:\n"
        "    while True:\n"
        "        ledger.append(Suggest(key=TrialKey('search', number), proposal={}, params={}))\n"
        "        number += 1\n"
        "except OSError:\n"
        "    print(number)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    kept = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert kept > 3
    assert path.read_bytes().endswith(b"\n")
    with Ledger.open(path) as ledger:
        assert len(ledger.state.trials) == kept
        ledger.append(suggest(kept))
    assert len(read_state(path).trials) == kept + 1


def test_a_ledger_that_cannot_be_begun_leaves_no_file(path, failing_sync):
    with failing_sync(FULL), pytest.raises(OSError, match="No space left"):
        Ledger.create(path, HEADER)
    assert not path.exists()
    Ledger.create(path, HEADER).close()


def test_every_append_is_synced(ledger, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    ledger.append(suggest(0))
    ledger.append(report(0, 1), report(0, 2), end(0))
    assert synced == sorted(set(synced))
    assert (len(synced), synced[-1]) == (2, ledger.path.stat().st_size)


def test_a_simulations_appends_have_its_clock_and_wait_for_no_disk(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with Ledger.create(path, HEADER, clock=lambda: 7.0, is_durable=False) as ledger:
        ledger.append(suggest(0))
    with Ledger.open(path, clock=lambda: 8.0, is_durable=False) as ledger:
        ledger.append(report(0, 1))
    assert [event.time for event in read_events(path)[0]] == [7.0, 7.0, 8.0]
    assert str(path) not in synced


# --- events that cannot follow --------------------------------------------------------------------------------------


class Dance(Content):
    """What no ledger tells of."""

    NAME = "dance"


INVALID = {
    "a report of an unknown trial": ([report(7, 1)], "`report` for trial 0007, which was never suggested"),
    "a start of an unknown trial": ([start(7)], "`start` for trial 0007, which was never suggested"),
    "an end in another arm": ([suggest(0), end(0, arm="kd")], "`end` for trial kd-0000, which was never suggested"),
    "a trial twice": ([suggest(0), suggest(0)], "trial 0000 is suggested a second time"),
    "two ends": ([suggest(0), end(0), end(0)], "`end` for trial 0000, which is already completed"),
    "a report after the end": ([suggest(0), end(0), report(0, 3)], "`report` for trial 0000, which is already"),
    "an epoch again": ([suggest(0), report(0, 1), report(0, 1)], "trial 0000 reports epoch 1 again"),
    "a second header": ([replace(HEADER, version=1)], "a second `sweep` event"),
    "an unknown event": ([Dance()], "unknown event 'dance'"),
}


@pytest.mark.parametrize(("events", "told"), INVALID.values(), ids=INVALID)
def test_an_event_that_cannot_follow_is_refused_and_not_written(path, ledger, events, told):
    *valid, invalid = events
    ledger.append(*valid)
    before, state = path.read_bytes(), snapshot(ledger.state)
    with pytest.raises(LedgerError, match=rf"line {len(events) + 1}: {re.escape(told)}"):
        ledger.append(invalid)
    assert (path.read_bytes(), snapshot(ledger.state)) == (before, state)
    ledger.append(suggest(1))  # a refused event leaves state and disk as one
    assert snapshot(read_state(path)) == snapshot(ledger.state)


@pytest.mark.parametrize(("events", "told"), INVALID.values(), ids=INVALID)
def test_of_events_in_one_piece_all_are_written_or_none(path, ledger, events, told):
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=re.escape(told)):
        ledger.append(suggest(5), *events)
    assert path.read_bytes() == before
    ledger.append(suggest(5))  # what was before it in the piece has left no trace
    assert snapshot(read_state(path)) == snapshot(ledger.state)


@pytest.mark.parametrize("value", [object(), {1, 2}])
def test_what_is_no_json_is_refused_and_not_written(path, ledger, value):
    before = path.read_bytes()
    with pytest.raises(TypeError):
        ledger.append(suggest(0), Stop(reason=value))
    assert (path.read_bytes(), ledger.state.trials) == (before, {})
    ledger.append(suggest(0))
    assert list(read_state(path).trials) == [FIRST]


def test_a_report_with_an_unknown_decision_changes_nothing(ledger):
    ledger.append(suggest(0))
    with pytest.raises(ValueError, match="'maybe' is not a valid Decision"):
        ledger.append(report(0, 1, decision="maybe"))
    assert ledger.state.trials[FIRST].reports == {}
    ledger.append(report(0, 1))


# --- views ----------------------------------------------------------------------------------------------------------


def test_the_best_are_full_trials_the_earlier_of_equals_first(ledger):
    outcomes = [
        (50.0, TrialStatus.COMPLETED),
        (99.0, TrialStatus.PRUNED),
        (70.0, TrialStatus.COMPLETED),
        (None, TrialStatus.FAILED),
        (0.0, TrialStatus.COMPLETED),
        (70.0, TrialStatus.COMPLETED),
    ]
    for number in reversed(range(len(outcomes))):
        ledger.append(suggest(number))
        ledger.append(end(number, *outcomes[number]))
    ledger.append(suggest(0, "kd"), end(0, 98.0, arm="kd"), suggest(6))
    state = ledger.state
    assert [record.key.number for record in state.ranked()] == [2, 5, 0, 4]
    assert state.best() is state.trials[TrialKey("search", 2)]
    assert [record.key for record in state.ranked("kd")] == [TrialKey("kd", 0)]
    assert state.best("ce") is None


def test_counts_are_of_one_arm_and_name_every_status(ledger):
    for number, status in enumerate(["completed", "completed", "pruned", "failed"]):
        ledger.append(suggest(number), end(number, status=TrialStatus(status)))
    ledger.append(suggest(4), suggest(0, "kd"), end(0, arm="kd"))
    assert ledger.state.counts() == {"running": 1, "completed": 2, "pruned": 1, "failed": 1}
    assert ledger.state.counts("kd") == {"running": 0, "completed": 1, "pruned": 0, "failed": 0}


def test_an_arm_is_in_the_order_of_its_numbers(ledger):
    ledger.append(suggest(10), suggest(2), suggest(1, "kd"), suggest(0, "kd"))
    assert [record.key.number for record in ledger.state.arm("search")] == [2, 10]
    assert [str(record.key) for record in ledger.state.arm("kd")] == ["kd-0000", "kd-0001"]


@pytest.mark.parametrize("status", TrialStatus)
def test_every_status_but_running_is_an_end(status):
    assert status.is_end is (status != "running")


def test_trackers_are_told_in_turn_and_those_that_raised_are_returned():
    told, error = [], RuntimeError("down")

    def broken(_):
        raise error

    trackers = [SimpleNamespace(notify=each) for each in (told.append, broken, told.append)]
    event = Event(0, 0.0, Stop(reason="finished"))
    assert tell_all(trackers, event) == [(trackers[1], error)]
    assert told == [event, event]
