"""The HTML page of a sweep and of a campaign: what it says, that it is whole, escaped and small, how it works."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import formulas
import numpy as np
import pytest
import test_confirm
from test_confirm import PLAIN
from test_confirm import planted
from test_confirm import state_of

from tune_topkd.cli.app import main
from tune_topkd.config import config_from
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.execution.simulated import VirtualClock
from tune_topkd.execution.simulated import simulate
from tune_topkd.findings import Importance
from tune_topkd.findings import Row
from tune_topkd.importance import MOST
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Driver
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Finalists
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Report
from tune_topkd.ledger import Start
from tune_topkd.ledger import Stop
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.report.page import campaign_page
from tune_topkd.report.page import sweep_page
from tune_topkd.report.page.assembly import campaign_lead
from tune_topkd.report.page.course_figures import curves_figure
from tune_topkd.report.page.data import MOST_CURVES
from tune_topkd.report.page.data import ends
from tune_topkd.report.page.data import parameters_of
from tune_topkd.report.page.figure import ticks
from tune_topkd.search import Search
from tune_topkd.space import Space
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import page as page_of_a_sweep
from tune_topkd.sweep.confirm import Plan
from tune_topkd.sweep.confirm import request
from tune_topkd.sweep.documents import description
from tune_topkd.sweep.page import findings_from
from tune_topkd.sweep.result import gains
from tune_topkd.verdict import Interval
from tune_topkd.verdict import guessing
from tune_topkd.verdict import verdict_of_answer

searched, confirmed = test_confirm.searched, test_confirm.confirmed  # fixtures

MIB = 1024**2
MOST_BYTES = 3_000_000
FIGURES = {
    "gains", "k", "weights", "test", "finalists", "history", "importance", "slices", "parallel", "curves", "rungs",
    "spend", "timeline",
}  # fmt: skip
EVIL = '</script><script>document.title = 1</script><img src=x onerror="document.title=1"> & \'"` \u2028 @ink {{ 7*7 }}'


# --- sweeps to tell of ------------------------------------------------------------------------------------------------


def by_k(trial, epoch):
    """Rises with the epoch to a top that is best near K = 4; each seed has its noise; the test set is easier."""
    record, seed, budget = trial.record, trial.config.seed, trial.config.recipe.epochs
    noise = 0.3 * float(np.random.default_rng([seed, record.origin.number]).standard_normal())
    value = formulas.value(trial.config, epoch) + noise
    if record.origin.arm != SEARCH:
        value = 84.0 + noise - 20 / epoch
    if trial.config.data.selection == "test_at_end":
        return {"test_top1": value + 3, "epoch_seconds": 0.5} if epoch == budget else {"epoch_seconds": 0.5}
    return {"val_top1": value, "epoch_seconds": 0.5}


def swept(path, config, formula=by_k, plan=None, reports=None, name="t"):
    """A sweep's state: run, and confirmed by a plan."""
    about = {
        "trials": config.sweep.trials, "num_classes": 10, "epochs": config.recipe.epochs, "method": config.method,
        "digest": "d" * 16, "versions": {"python": "3.11"}, "git_commit": "c" * 40,
    }  # fmt: skip
    clock = VirtualClock()
    header = Header(sweep=name, id="i", seed=config.sweep.seed, **about)
    with Ledger.create(path, header, is_durable=False, clock=clock) as ledger:
        ledger.append(Driver.here(trials=config.sweep.trials, finalists=Finalists.configured(config.sweep.finalists)))
        simulate(Search(config, ledger), formula, at_once=2, clock=clock, reports=reports)
        if plan is not None:
            ledger.append(request(config, ledger.state, plan))
            simulate(Search(config, ledger), formula, at_once=2, clock=clock)
        return ledger.state


def told(config, state, how="finished"):
    return findings_from(config, state, Path("runs/t"), how, lambda *words: " ".join(["tune-topkd", *words]))


def renamed(found, name):
    return dataclasses.replace(found, row=dataclasses.replace(found.row, sweep=name))


def of_events(config, contents):
    """A state out of lines."""
    header = Header(
        sweep="t", id="i", seed=0, trials=12, epochs=config.recipe.epochs, method=config.method, num_classes=10
    )
    state = SweepState()
    for seq, content in enumerate([header, Driver.here(trials=header.trials), *contents]):
        state.apply(Event(seq, 1.7e9 + seq, content))
    return state


def trial(number, values, status, params=None, reason="", error="", arm=SEARCH):
    """The lines of a trial, by default of the search."""
    key = TrialKey(arm, number)
    yield Suggest(key=key, proposal={}, params=params or formulas.DEFAULTS)
    yield Start(key=key, attempt=1)
    for epoch, value in enumerate(values, 1):
        yield Report(
            key=key, epoch=epoch, metrics={"val_top1": value, "epoch_seconds": 1.0}, decision=Decision.CONTINUE
        )
    if status.is_end:
        value = values[-1] if values and status is not TrialStatus.FAILED else None
        yield End(key=key, epoch=len(values), status=status, reason=reason, error=error, value=value)


def test_a_training_that_fell_has_its_highest_epoch_on_the_axis():
    config = formulas.sweep_config()
    fell = trial(0, [20.0, 60.0, 90.0, *[40.0] * (formulas.EPOCHS - 3)], TrialStatus.COMPLETED)
    found = told(config, of_events(config, [*fell, *trial(1, [39.0] * formulas.EPOCHS, TrialStatus.COMPLETED)]))
    (spec,) = curves_figure(found).specs()
    scaled = [layer["encoding"]["y"] for layer in spec["layer"] if "scale" in layer["encoding"].get("y", {})]
    low, high = scaled[0]["scale"]["domain"]
    assert low < 40 < 90 < high


FULL = formulas.sweep_config(description="eight by eight & more")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What there is to tell of a confirmed sweep that has everything."""
    config = formulas.sweep_config(
        sweep={"trials": 40, "finalists": {"count": 3, "seeds": 2}}, description="eight by eight"
    )
    return told(config, swept(tmp_path_factory.mktemp("whole") / "ledger.jsonl", config, plan=Plan(3, 4)))


@pytest.fixture(scope="module")
def page(whole):
    return sweep_page(whole)


# --- reading a page ---------------------------------------------------------------------------------------------------


class _Text(HTMLParser):
    """What a reader sees without scripts, and the tags that there are."""

    def __init__(self):
        super().__init__()
        self.words, self.tags, self.ids, self._silent = [], [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._silent = False if tag in ("script", "style") else self._silent

    def handle_data(self, data):
        self.words += [] if self._silent else [data]


def parsed(page):
    found = _Text()
    found.feed(page)
    return found


def text(page):
    return re.sub(r"\s+", " ", "".join(parsed(page).words))


def embedded(page, name):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)[1])


def is_whole(page):
    """Check what holds for every page: one file, small, its ids and data in order, nothing that loads."""
    found = parsed(page)
    assert len(page.encode()) < MOST_BYTES
    assert len(found.ids) == len(set(found.ids))
    assert {href[1:] for tag, attrs in found.tags if (href := attrs.get("href", "")).startswith("#")} <= set(found.ids)
    charts, data = embedded(page, "charts"), embedded(page, "data")
    keys = [attrs["data-chart"] for _, attrs in found.tags if "data-chart" in attrs]
    assert sorted(keys) == sorted(charts)
    for chart in charts.values():
        assert set(chart["data"].values()) <= set(data)
        assert set(re.findall(r'"data": \{"name": "([^"]+)"', json.dumps(chart["spec"]))) <= set(chart["data"])
    for columns in data.values():
        assert len({len(column) for column in columns.values()}) <= 1
    for tag, attrs in found.tags:
        assert not attrs.get("src")
        assert tag not in ("iframe", "object", "embed", "base")
        assert tag != "link" or attrs["href"] == "data:,"
        assert not str(attrs.get("href", "")).startswith(("http", "//"))
        if attrs.get("role") == "img":
            assert attrs["aria-label"].strip()
    addresses = set(re.findall(r"https?://[\w./-]+", page))
    known = ("http://www.w3.org/", "https://github.com/vega/vega-lite/issues/", "https://vega.github.io/")
    assert all(address.startswith(known) for address in addresses), "namespaces, and what Vega says in messages"
    assert "@import" not in page.split("<body>")[0]
    return found


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_long_intervals_of_two_seeds_leave_the_axis_to_the_values():
    spans = [{"low": -59.7, "high": 125.6}, {"low": 24.0, "high": 27.0}]
    assert ends([20.0, 40.0], spans) == [0.0, 60.0, 24.0, 27.0]
    assert ends([], spans) == []


def test_a_confirmed_sweep_has_the_verdict_on_top_and_every_figure(whole, page):
    found, words = is_whole(page), text(page)
    assert set(found.ids) >= FIGURES
    assert not any("missing" in attrs.get("class", "") for _, attrs in found.tags)
    assert whole.sentence in words
    assert words.index(whole.lead) < words.index(whole.sentence) < words.rindex("Reproduce it")
    top1 = whole.row.top1
    assert f"{top1.mean:.2f} % tuned topkd with K = " in words, "± is a standard error elsewhere"
    assert "top-1 on the test set; 95 % interval" in words
    for command in (
        "run runs/t/sweep.yaml --name t-again",
        "confirm t-again --finalists 3 --seeds 4",
        "verify runs/t/tuned.yaml",
    ):
        assert f"tune-topkd {command}" in words
    assert "export t --format python -o tuned.py" in words
    assert "eight by eight" in words
    assert "One seed" not in words


def test_the_command_that_verifies_says_where_the_files_are(whole):
    config = whole.config.model_copy(update={"data": whole.config.data.model_copy(update={"root": "/my photos"})})
    found = findings_from(config, whole.state, Path("runs/t"), "finished", lambda *words: shlex.join(words))
    (line,) = (each.text for each in found.commands if each.text.startswith("verify "))
    assert line == "verify runs/t/tuned.yaml --set 'data.root=/my photos'"


def test_a_page_that_is_written_during_the_confirmation_says_so(whole, tmp_path):
    found = told(whole.config, whole.state, "running")
    assert found.notes[0].title == "The answer is being confirmed"
    assert '<span class="state busy">confirming</span>' in sweep_page(found)
    assert "trainings on fresh seeds have ended, and " in found.notes[0].text
    searched = told(FULL, swept(tmp_path / "ledger.jsonl", FULL), "running")
    assert searched.notes[0].title == "The sweep is running"
    assert searched.condition == "running"
    assert "confirm t" in [command.text.removeprefix("tune-topkd ") for command in searched.commands]


AT_CHANCE = "op-1 is at chance (10 % with 10 classes): the student has learnt nothing"


@pytest.mark.parametrize(("level", "is_told"), [(10.5, True), (14.0, True), (30.0, False)])
def test_a_student_that_has_learnt_nothing_is_said_to_be_at_chance(level, is_told):
    config = FULL
    done = list(trial(0, [level] * config.recipe.epochs, TrialStatus.COMPLETED))
    found = told(config, of_events(config, done))
    assert any(AT_CHANCE in note.text for note in found.notes) == is_told
    assert bool(guessing(found.state)) == is_told


def test_the_verdict_of_a_student_at_chance_says_so(tmp_path, whole):
    def guesses(trial, epoch):
        return {name: 10.0 + 0.1 * (trial.config.seed % 3) for name in by_k(trial, epoch) if "top1" in name}

    config = formulas.sweep_config(sweep={"trials": 4})
    state = swept(tmp_path / "ledger.jsonl", config, guesses, Plan(1, 4))
    assert AT_CHANCE in verdict_of_answer(state).sentence
    assert AT_CHANCE not in whole.sentence
    assert AT_CHANCE in description(told(config, state))


def test_the_trials_of_all_arms_are_in_the_page(whole, page):
    found = parsed(page)
    (table,) = [attrs for tag, attrs in found.tags if tag == "table" and attrs.get("id") == "all"]
    data = embedded(page, "data")
    trials = [name for key in json.loads(table["data-rows"]) for name in data[key]["trial"]]
    assert sorted(trials) == sorted(map(str, whole.state.trials))
    names = [column["name"] for column in json.loads(table["data-columns"])]
    assert names[:3] == ["trial", "status", "top-1 %"]
    assert set(names) >= set(whole.config.space)


def test_a_sweep_of_one_seed_says_that_its_figure_is_optimistic(searched):
    found = told(test_confirm.config(), state_of(searched))
    words = text(sweep_page(found))
    assert "On one seed the best of 6 trials is trial 2: 80.00 %. " in words
    assert "That is +10.00 points against cross-entropy, " in words
    assert "One seed: this figure is optimistic. The figure is of one training, on the images that chose it" in words
    assert "Only 6 trials reached the full budget" in words
    assert "K was not searched: it is 5 in every trial." in words
    assert "The test set has not been read; confirm reads it, once." in words
    assert "No trial was trained again on fresh seeds" in words


def test_fresh_seeds_say_what_they_are_not(tmp_path):
    config = formulas.sweep_config(sweep={"trials": 12, "finalists": {"count": 2, "seeds": 3}})
    found = told(config, swept(tmp_path / "ledger.jsonl", config))
    words = text(sweep_page(found))
    assert "validation top-1 on fresh seeds; 95 % interval" in words
    assert "Not measured on the test set." in words
    assert found.lead == "Tuned topkd is the best of these."


@pytest.mark.parametrize(
    ("gap", "title"),
    [
        (4.0, "{} is the better choice here. It is "),
        (0.1, "{} has the higher mean. "),
        (-0.1, "Not told apart from {}. The gain on the test set may lie anywhere from "),
    ],
)
def test_a_baseline_that_is_as_good_is_said_in_a_note(tmp_path, searched, gap, title):
    def formula(trial, epoch):
        value = planted(trial, epoch)
        if trial.record.origin.arm != "kd" or trial.config.seed == test_confirm.SEED:
            return value
        own = test_confirm.TRUE["search"][3] + test_confirm.noise(trial.config.seed, test_confirm.CHOSEN)
        apart = gap + 0.5 * (-1) ** trial.config.seed  # by turns above and below
        return {name: own + apart + 5 * (name == "test_top1") for name in value}

    path = tmp_path / "ledger.jsonl"
    path.write_bytes(searched.read_bytes())
    state = test_confirm.drive(path, test_confirm.config(), formula, plan=Plan(2, 6))
    words = text(sweep_page(told(test_confirm.config(), state)))
    assert title.format("KD, T = 4") in words


def test_k_that_hardly_mattered_is_said_with_its_share(tmp_path):
    def flat(trial, epoch):
        return {"val_top1": 80 - 10 * abs(math.log10(trial.config.recipe.lr) + 1) - 5 / epoch}

    config = formulas.sweep_config(sweep={"trials": 40, "asha": None}, baselines={"methods": ["ce"], "trials": 1})
    found = told(config, swept(tmp_path / "ledger.jsonl", config, flat))
    note = next(note for note in found.notes if note.title == "K hardly mattered")
    assert re.fullmatch(
        r"\d+(–\d+)? % of the variation in top-1 goes with it, by fANOVA over up to \d+ trials\.", note.text
    )
    assert not any(
        note.title == "K hardly mattered" for note in told(config, swept(tmp_path / "b", config, by_k_alone)).notes
    )


def test_where_only_a_rung_tells_of_k_that_is_said():
    early = Importance("fANOVA, at epoch 4", 12, 12, {"k": 0.07, "lr": 0.93})
    (note,) = page_of_a_sweep._what_k_did(Row("t", "d", "t", "s", "topkd", "finished"), [early])
    assert note.title == "K hardly mattered at epoch 4"
    assert note.text.endswith("Too few trials have reached the end to say it of that.")
    late = dataclasses.replace(early, measure="fANOVA, full budget")
    (note,) = page_of_a_sweep._what_k_did(Row("t", "d", "t", "s", "topkd", "finished"), [early, late])
    assert note.title == "K hardly mattered"


def by_k_alone(trial, epoch):
    return {"val_top1": 80 - 4 * abs(trial.config.loss.get("k", 1) - 4) - 5 / epoch}


def test_an_answer_at_the_end_of_its_range_is_said():
    config = formulas.sweep_config()
    lines = list(trial(0, [50.0] * 9, TrialStatus.COMPLETED, {**formulas.DEFAULTS, "lr": 0.99}))
    found = told(config, of_events(config, lines))
    assert "lr lies at the upper end of its range" in [note.title for note in found.notes]


@pytest.mark.parametrize(("lr", "end"), [(0.01, "lower"), (0.1, ""), (1.0, "upper")])
def test_a_baseline_whose_best_lies_at_the_end_of_what_was_tried_is_said(lr, end):
    """It may be better beyond, and the gain over it smaller."""
    config = formulas.sweep_config(baselines={"methods": ["kd"], "trials": 3})
    lines = list(trial(0, [50.0] * 9, TrialStatus.COMPLETED, {**formulas.DEFAULTS, "lr": 0.3}))
    for number, rate in enumerate((0.01, 0.1, 1.0)):
        lines += trial(number, [40.0 + (rate == lr)] * 9, TrialStatus.COMPLETED, {"lr": rate}, arm="kd")
    state = of_events(config, lines)
    notes = {note.title: note.text for note in told(config, state).notes}
    (gain,) = gains(config, state, 1000)
    assert (f"lr {lr:g}, the end of its range)" in gain.sentence) == bool(end)
    told_of = [title for title in notes if "KD, T = 4" in title and "range" in title]
    assert told_of == ([f"The lr of KD, T = 4 lies at the {end} end of its range"] if end else [])
    if end:
        assert notes[told_of[0]].startswith(f"The best of 3 trainings of KD, T = 4 has lr = {lr:g}, and 0.01 ")
        assert notes[told_of[0]].endswith("the baseline may be better, and the gain over it smaller.")


# --- odd sweeps -------------------------------------------------------------------------------------------------------

PULLS = ["<b>weak</b>", "strong"]
NO_K = config_from(
    {
        "data": {"name": "digits"}, "teacher": None, "student": "digits_linear", "method": "ce",
        "recipe": {"epochs": 9, "lr": 0.1}, "space": {"lr": {"low": 0.01, "high": 1.0, "log": True}},
        "sweep": {"trials": 3, "asha": None}, "baselines": None,
    },
    "test",
)  # fmt: skip
CUSTOM = config_from(
    {
        "data": {"name": "digits"}, "teacher": {"name": "digits_cnn", "recipe": {"epochs": 1}},
        "student": "digits_linear",
        "method": "not_installed_here:loss", "recipe": {"epochs": 9, "lr": 0.1},
        "space": {"lr": {"low": 0.01, "high": 1.0, "log": True}, "pull": PULLS},
        "sweep": {"trials": 3, "asha": None}, "baselines": {"methods": ["ce"], "trials": 1},
    },
    "test",
)  # fmt: skip
DONE, PRUNED, FAILED, RUNNING = TrialStatus.COMPLETED, TrialStatus.PRUNED, TrialStatus.FAILED, TrialStatus.RUNNING
ODD = {
    "empty, running": (FULL, [], "running", "The sweep is running; its first trial has not begun."),
    "empty, killed": (FULL, [], "killed", "No trial has begun."),
    "running, with an answer": (
        FULL,
        [*trial(0, [50.0] * 9, DONE), *trial(1, [], RUNNING)],
        "running",
        "best of 2 trials so far is trial 0",
    ),
    "running": (FULL, [*trial(0, [50.0, 60.0], RUNNING), *trial(1, [], RUNNING)], "running", "No trial has reached"),
    "all failed": (
        FULL,
        [*trial(0, [1.0], FAILED, reason="error", error="OSError: no data"), Stop(reason="failed", error="no data")],
        "failed",
        "Every trial has failed (1 trial): there is no answer.",
    ),
    "pruned only": (FULL, [*trial(0, [50.0], PRUNED, reason="asha"), Stop(reason="finished")], "finished", "No trial"),
    "diverged": (
        FULL,
        [*trial(0, [50.0, math.nan], FAILED, reason="diverged"), *trial(1, [50.0] * 9, DONE)],
        "interrupted",
        "On one seed the best of 2 trials is trial 1 (K = 5): 50.00 %.",
    ),
    "one trial": (FULL, [*trial(0, [50.0] * 9, DONE)], "finished", "the best of 1 trial is trial 0 (K = 5)"),
    "equal values": (
        FULL,
        [line for n in range(30) for line in trial(n, [50.0] * 9, DONE)],
        "finished",
        "best of 30 trials is trial 0",
    ),
    "without K": (
        NO_K,
        [line for n in range(3) for line in trial(n, [40.0 + n] * 9, DONE, {"lr": 0.1 * (n + 1)})],
        "finished",
        "best of 3 trials is trial 2: 42.00 %.",
    ),
    "a custom method whose code is not here": (
        CUSTOM,
        [line for n in range(8) for line in trial(n, [40.0 + n] * 9, DONE, {"lr": 0.1, "pull": PULLS[n % 2]})],
        "finished",
        "best of 8 trials is trial 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", ODD)
def test_odd_sweeps_have_pages_that_say_what_is_missing(which):
    config, lines, how, lead = ODD[which]
    found = told(config, of_events(config, list(lines)), how)
    page = sweep_page(found)
    assert set(is_whole(page).ids) >= {"answer", "commands", "trainings", "k-title", "test-title", "finalists-title"}
    assert lead in text(page)
    assert campaign_page([found, renamed(found, "u")])


def test_what_is_missing_is_said():
    found = told(NO_K, of_events(NO_K, []))
    words = text(sweep_page(found))
    assert "The method ce has no parameter of this name." in words
    assert "This sweep stops no trial by rungs of ASHA's." in words
    assert "No epoch has been reported." in words


def test_failures_are_told_by_their_cause():
    config = formulas.sweep_config()
    lines = [
        line
        for n in range(5)
        for line in trial(n, [9.0], FAILED, reason="error" if n < 3 else "oom", error=f"E{n // 2}")
    ]
    found = told(config, of_events(config, [*lines, *trial(5, [50.0] * 9, DONE)]))
    note = next(note for note in found.notes if note.title == "5 of 6 trials failed")
    assert note.text == "error: E0 (2); error: E1 (1); oom: E1 (1); and 1 other reasons."


def test_what_users_write_is_never_markup():
    config = FULL.model_copy(update={"description": EVIL + "\ud800\x00"})
    lines = [*trial(0, [50.0] * 9, DONE), *trial(1, [5.0], FAILED, reason="error", error=EVIL + "\udcff")]
    found = told(config, of_events(config, [*lines, Stop(reason="failed", error=EVIL)]), "failed")
    for page in (
        sweep_page(found),
        campaign_page([found, renamed(found, "u")]),
    ):
        page.encode()
        parsed_page = is_whole(page)
        assert not [tag for tag, _ in parsed_page.tags if tag == "img"]
        assert sum(tag == "script" for tag, _ in parsed_page.tags) == 5
        assert " ".join(EVIL.split()) in text(page)
    assert EVIL in "".join(embedded(sweep_page(found), "data")["d0"]["reason"])


def test_choices_are_shown_as_they_are_written():
    config, lines, how, _ = ODD["a custom method whose code is not here"]
    page = sweep_page(told(config, of_events(config, list(lines)), how))
    assert "<b>weak" not in page
    assert "<b>weak</b>, strong" in text(page)


# --- large sweeps -----------------------------------------------------------------------------------------------------


def of_many(trials, epochs=30):
    """A sweep of so many trials, two thirds of them pruned."""
    config = formulas.sweep_config(recipe={"epochs": epochs}, sweep={"trials": trials, "asha": {"grace_epochs": 3}})
    space, numbers = Space.of(config), np.random.default_rng(0)
    lines = []
    for number in range(trials):
        params = space.params({axis.name: axis.at(float(numbers.random())) for axis in space.axes()})
        top = 90 - 2 * abs(float(params["k"]) - 4) + float(numbers.normal())
        length = (3, 9, epochs)[number % 3]
        values = [top - 20 / (epoch + 1) for epoch in range(length)]
        lines += trial(number, values, DONE if length == epochs else PRUNED, params, "" if length == epochs else "asha")
    return config, of_events(config, [*lines, Stop(reason="finished")])


@pytest.fixture(scope="module")
def large():
    return told(*of_many(2000))


@pytest.mark.slow
def test_a_page_of_two_thousand_trials_is_small_and_says_what_it_left_out(large):
    page = sweep_page(large)
    is_whole(page)
    words, data = text(page), embedded(page, "data")
    assert f"{MOST_CURVES} of 2,000 trials are drawn: the best, and others evenly over the search" in words
    assert f"over {MOST} trials of 2,000" in words
    assert max(len(column) for columns in data.values() for column in columns.values()) < 10_000
    everyone = [name for columns in data.values() if "trial" in columns for name in columns["trial"]]
    assert {f"{number:04d}" for number in range(2000)} <= set(everyone)


def test_ticks_are_round_and_within():
    k, lr = (next(p for p in parameters_of(FULL) if p.name == name) for name in ("k", "lr"))
    top = next(p for p in parameters_of(FULL) if p.name == "scale_top")
    assert ticks(k, [1, 20]) == [1, 2, 5, 10, 20]
    assert ticks(lr, [0.01, 1.0]) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    assert ticks(top, [1.0, 4.0]) == [1, 2, 3, 4]
    assert ticks(top, [2.0, 2.0]) == [2.0]
    for low, high in ((0.0301, 0.0302), (1e-8, 10.0), (3.1, 3.2)):
        assert all(low <= tick <= high for tick in ticks(lr, [low, high]))


# --- campaigns --------------------------------------------------------------------------------------------------------


def test_a_campaign_has_a_row_and_a_part_for_each_sweep(whole, large, searched):
    others = [
        renamed(found, name)
        for name, found in (("large", large), ("plain", told(test_confirm.config(), state_of(searched))))
    ]
    page = campaign_page([whole, *others])
    found, words = is_whole(page), text(page)
    assert {"sweep-0", "sweep-1", "sweep-2", "campaign-gains", "campaign-k", "sweep-0-k", "sweep-2-history"} <= set(
        found.ids
    )
    assert "3 sweeps" in words
    assert "Of 3 sweeps: " in words
    assert "400 of 2,000 trials are drawn" in words or "401 of 2,000 trials are drawn" in words
    assert whole.sentence in words


def test_a_campaigns_lead_counts_what_the_sweeps_say():
    def row(name, *spans, top1=True):
        from tune_topkd.findings import Figure

        gains = {f"b{i}": Figure(0.0, Interval(*span) if span else None) for i, span in enumerate(spans)}
        return Row(name, "d", "t", "s", "topkd", "finished", top1=Figure(1.0) if top1 else None, gains=gains)

    rows = [
        row("a", (1, 2), (1, 3)),
        row("b", (1, 2), (-1, 1)),
        row("c", (-2, -1), (1, 2)),
        row("d", None),
        row("e", top1=False),
    ]
    assert campaign_lead(rows) == (
        "Of 5 sweeps: in 1 the tuned method is better than every baseline (a); in 1 a baseline is the better choice "
        "(c); in 1 the seeds do not tell the tuned method from some baseline (b); in 1 there is one seed only, which "
        "tells nothing apart (d); in 1 there is no answer yet (e)."
    )
    assert campaign_lead(rows[:1] * 2) == "In all 2 sweeps the tuned method is better than every baseline."


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_pages_where_they_are_looked_for(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        Sweep.create(PLAIN, name=name, mlflow_uri="", address="local").run(executor=SimulatedExecutor(planted))
    runs = Sweep.open("one", mlflow_uri="", address="local").workspace.runs
    (runs / "damaged").mkdir()
    (runs / "damaged" / "ledger.jsonl").write_text("{}\n")

    def report(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(
            sys, "argv", ["launch.py", "report", "--format", "html", "--runs-dir", str(runs), *arguments]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capfd.readouterr().err

    before = sorted(runs.rglob("*"))
    assert report("one") == (0, f"written: {runs}/one/report.html\n")
    assert report("one", "-o", "page.html") == (0, "written: page.html\n")
    code, said = report()
    assert code == 0
    assert said.startswith("note: damaged is left out: ")
    assert said.endswith(f"written: {runs}/report.html\n")
    assert sorted(set(runs.rglob("*")) - set(before)) == [runs / "one" / "report.html", runs / "report.html"]
    page = (runs / "one" / "report.html").read_text()
    is_whole(page)
    assert "launch.py export one --format python -o tuned.py" in text(page)
    assert "launch.py verify" not in page
    assert "2 sweeps" in text((runs / "report.html").read_text())
    assert report("nothing")[0] == 2


def test_a_sweep_has_its_findings_for_a_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = Sweep.create(PLAIN, name="s", mlflow_uri="", address="local")
    sweep.run(executor=SimulatedExecutor(planted))
    found = sweep.findings()
    assert (found.row.sweep, found.condition) == ("s", "finished")
    assert any(command.text.startswith("tune-topkd confirm s") for command in found.commands)
    is_whole(sweep_page(found))


def test_what_the_docs_show_works(tmp_path, monkeypatch):
    docs = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", docs, re.S)
    monkeypatch.chdir(tmp_path)
    Sweep.create(PLAIN, name="digits", mlflow_uri="", address="local").run(executor=SimulatedExecutor(planted))
    names = {}
    exec(code, names)  # the docs' own
    is_whole(names["text"])
    commands, of_the_notebooks = re.findall(r"```bash\n(.*?)```", docs, re.S)
    assert "jupyter nbconvert --execute" in of_the_notebooks
    assert all(line.startswith("python launch.py report ") for line in commands.splitlines())


# --- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRAWN = "document.documentElement.dataset.drawn"
MARKS = """() => Object.fromEntries([...tuneTopkd.views].map(([element, result]) => {
  const within = (item) => item.items ? item.items.reduce((n, each) => n + count(each), 0) : 1;
  const count = (mark) => mark.items.reduce((n, item) => n + within(item), 0);
  const found = (mark) => mark.role === "mark" ? count(mark)
    : mark.items.reduce((n, item) => n + (item.items ?? []).reduce((m, each) => m + found(each), 0), 0);
  return [element.dataset.chart, found(result.view.scenegraph().root)];
}))"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page; whatever it says on its console, and whatever it asks the network for, is an error."""
    contexts, wrong = [], []

    def opened(page, width=1280, scheme="light"):
        path = tmp_path / f"page-{len(contexts)}.html"
        path.write_text(page, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        allowed = (path.as_uri(), "data:", "blob:")
        tab.on("request", lambda request: None if request.url.startswith(allowed) else wrong.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_function(DRAWN)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def together(whole, searched):
    found = told(test_confirm.config(), state_of(searched))
    return campaign_page([whole, renamed(found, "plain")])


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_has_marks_in_both_schemes(opened, page, together, scheme):
    for content in (page, together):
        tab = opened(content, scheme=scheme)
        marks = tab.evaluate(MARKS)
        assert marks.keys() == embedded(content, "charts").keys()
        assert all(marks.values()), marks
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        ink = tab.evaluate("getComputedStyle(document.querySelector('[data-chart] .role-axis-label text')).fill")
        assert ink == {"light": "rgb(34, 34, 34)", "dark": "rgb(230, 232, 235)"}[scheme]


@pytest.mark.slow
@pytest.mark.browser
def test_the_pages_of_odd_sweeps_are_drawn_without_a_word(opened):
    for config, lines, how, _ in ODD.values():
        tab = opened(sweep_page(told(config, of_events(config, list(lines)), how)), width=1024)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1024


@pytest.mark.slow
@pytest.mark.browser
def test_the_figures_follow_a_change_of_scheme(opened, page):
    tab = opened(page)
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_function(f"{DRAWN} === 'dark'")
    assert all(tab.evaluate(MARKS).values())


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1024, 1920])
def test_no_page_scrolls_sideways(opened, page, together, width):
    for content in (page, together):
        tab = opened(content, width=width)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for chart in tab.locator("[data-chart] svg.marks").all():
            assert chart.bounding_box()["width"] > 100


@pytest.mark.slow
@pytest.mark.browser
def test_a_pointer_on_a_mark_shows_what_it_is(opened, page, together):
    tab = opened(page)
    for figure in ("k", "history", "slices", "gains", "finalists", "test"):
        tab.locator(f"#{figure} [data-chart] svg .mark-symbol.role-mark path").last.hover(force=True)
        tab.locator("#vg-tooltip-element.visible").wait_for()
        assert tab.locator("#vg-tooltip-element").inner_text().strip()
        tab.mouse.move(1, 1)
    for figure in ("importance", "spend", "timeline", "rungs"):
        tab.locator(f"#{figure} [data-chart] svg .mark-rect.role-mark path").first.hover(force=True)
        tab.locator("#vg-tooltip-element.visible").wait_for()
        tab.mouse.move(1, 1)


@pytest.mark.slow
@pytest.mark.browser
def test_the_trainings_are_sorted_filtered_and_shown_in_parts(opened, whole, page):
    tab = opened(page)
    every, rows = len(whole.state.trials), tab.locator("#all tbody tr")
    assert rows.count() == min(every, 50)
    tab.locator("#every").click()
    assert rows.count() == every
    assert not tab.locator("#more").is_visible()
    heading = tab.locator("#all thead th", has_text="top-1 %")
    heading.locator("button").focus()
    tab.keyboard.press("Enter")
    tab.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    values = [float(cell) for cell in tab.locator("#all tbody tr td:nth-child(3)").all_inner_texts() if cell]
    assert values == sorted(values, reverse=True)
    tab.locator("#stage").select_option("search")
    tab.locator("#status").select_option("completed")
    done = whole.state.counts()["completed"]
    tab.locator("#count", has_text=f"{done} of {every} trainings").wait_for()
    tab.locator("#find").fill("nothing has this")
    assert rows.count() == 0
    tab.locator("#find").fill(f"{whole.state.best().value:.2f}")
    assert 1 <= rows.count() < done
    assert tab.locator("#all tbody tr.answer").count() <= 1


@pytest.mark.slow
@pytest.mark.browser
def test_the_table_of_a_campaign_is_sorted(opened, together):
    tab = opened(together)
    heading = tab.locator("table.sortable thead th", has_text="trials")
    for order in ("ascending", "descending"):
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == order
        column = tab.locator("table.sortable thead th").all_inner_texts().index(heading.inner_text()) + 1
        numbers = [
            int(cell) for cell in tab.locator(f"table.sortable tbody tr > :nth-child({column})").all_inner_texts()
        ]
        assert numbers == sorted(numbers, reverse=order == "descending")


@pytest.mark.slow
@pytest.mark.browser
def test_a_figure_is_saved_and_a_command_copied(opened, page):
    tab = opened(page)
    with tab.expect_download() as saved:
        tab.locator("[data-save=k]").click()
    assert saved.value.suggested_filename == "k.svg"
    assert "<svg" in Path(saved.value.path()).read_text()
    button = tab.locator(".copy").first
    button.click()
    button.filter(has_text=re.compile("Copied|Selected")).wait_for()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened, page, together, scheme):
    from axe_playwright_python.sync_playwright import Axe

    odd = told(FULL, of_events(FULL, list(ODD["diverged"][1])), "interrupted")
    for content in (page, together, sweep_page(odd)):
        found = Axe().run(opened(content, scheme=scheme)).response["violations"]
        serious = [
            f"{each['id']}: {each['nodes'][0]['html'][:200]}"
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
        assert serious == []


@pytest.mark.slow
@pytest.mark.browser
def test_it_is_printed_without_what_paper_cannot_do(opened, page):
    tab = opened(page, scheme="dark")
    tab.emulate_media(media="print", color_scheme="light")
    assert not tab.locator("nav").is_visible()
    assert not tab.locator(".save").first.is_visible()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.slow
@pytest.mark.browser
def test_two_thousand_trials_are_drawn(opened, large):
    tab = opened(sweep_page(large))
    assert all(tab.evaluate(MARKS).values())
    assert "2,000 of 2,000 trainings, 50 shown" in tab.locator("#count").inner_text()


@pytest.mark.slow
@pytest.mark.browser
def test_nothing_of_what_users_write_runs(opened):
    config = FULL.model_copy(update={"description": EVIL})
    lines = [*trial(0, [50.0] * 9, DONE), *trial(1, [5.0], FAILED, reason="error", error=EVIL)]
    tab = opened(sweep_page(told(config, of_events(config, lines), "failed")))
    assert tab.title() == "t – tune_topkd"
    assert EVIL.replace("\u2028", " ") in re.sub(r"\s", " ", tab.locator("#all").inner_text())
