"""What it takes to bring MLflow to where a ledger is: for the first time, once more with nothing new, and to audit it.

A ledger of trials that end after 1, 1, 3 or 9 epochs of ten metrics each, written into an SQLite store that has MLflow's
tables. The baseline is MLflow's client by itself: each trial's run made, its rows, parameters and tags sent in one
`log_batch`, its end set. In each turn both start from an empty store.
"""

import random
import shutil
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.entities import Param
from mlflow.entities import RunTag

from benchmarks.ratio import Ratio
from benchmarks.ratio import in_turns
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Content
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Driver
from tune_topkd.ledger import End
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Report
from tune_topkd.ledger import Stop
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_state
from tune_topkd.tracking import catch_up
from tune_topkd.tracking import check_uri
from tune_topkd.tracking import disagreements
from tune_topkd.tracking import sqlite_uri

EPOCHS = (1, 1, 3, 9)
METRICS = tuple(f"metric_{number}" for number in range(9))
PARAMS = tuple(f"param_{number}" for number in range(8))
PLAIN = "MLflow's client by itself"


def run(quick: bool) -> list[Ratio]:
    """A ledger of 500 trials, three turns (quick: of 20 trials, one)."""
    trials, turns = (20, 1) if quick else (500, 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger = _ledger(folder, trials)
        check_uri(sqlite_uri(folder / "empty.db"))
        numbers = count()

        def measure(what: Any) -> dict[str, float]:
            store = folder / f"{next(numbers)}.db"
            shutil.copy(folder / "empty.db", store)
            return dict(what(ledger, sqlite_uri(store)))

        measure(_plain)  # imports
        found = in_turns({"here": partial(measure, _here), "plain": partial(measure, _plain)}, turns)
    plain = [turn["first"] for turn in found["plain"]]
    goals = {"first": "a third", "again": "near 0", "audit": "near 0"}
    names = {
        "first": "catching up",
        "again": "the same again, with nothing new",
        "audit": "comparing all with the ledger",
    }
    return [
        Ratio(
            f"{names[what]}, {trials} trials, SQLite", PLAIN, [t[what] for t in found["here"]], plain, "s", goals[what]
        )
        for what in names
    ]


def _ledger(folder: Path, trials: int) -> Path:
    draw = random.Random(0)
    with Ledger.create(folder / LEDGER_FILE, Header(sweep="s", id="abc", seed=0, trials=trials)) as ledger:
        ledger.append(Driver(host="h", pid=1, trials=trials))
        for number in range(trials):
            key = TrialKey(SEARCH, number)
            params, epochs = {name: draw.random() for name in PARAMS}, draw.choice(EPOCHS)
            contents: list[Content] = [Suggest(key=key, proposal=params, params=params)]
            for epoch in range(1, epochs + 1):
                metrics = {name: draw.random() for name in (*METRICS, "val_top1")}
                contents.append(Report(key=key, epoch=epoch, metrics=metrics, decision=Decision.CONTINUE))
            status = TrialStatus.COMPLETED if epochs == max(EPOCHS) else TrialStatus.PRUNED
            contents.append(End(key=key, epoch=epochs, status=status, reason="", value=metrics["val_top1"]))
            ledger.append(*contents)
        ledger.append(Stop(reason="finished"))
    return ledger.path


def _here(ledger: Path, uri: str) -> dict[str, float]:
    seconds = {}
    for what, act in (("first", catch_up), ("again", catch_up), ("audit", disagreements)):
        started = time.perf_counter()
        found = act(ledger, uri)
        seconds[what] = time.perf_counter() - started
    assert found == [], found
    return seconds


def _plain(ledger: Path, uri: str) -> dict[str, float]:
    state = read_state(ledger)
    started = time.perf_counter()
    client = MlflowClient(uri)
    experiment = client.create_experiment("plain")
    for record in state.arm(SEARCH):
        run_id = client.create_run(experiment, tags={"trial_number": str(record.key.number)}).info.run_id
        rows = [Metric(n, v, 0, epoch) for epoch, row in record.reports.items() for n, v in row.items()]
        params = [Param(name, str(value)) for name, value in record.params.items()]
        client.log_batch(run_id, rows, params, [RunTag("trial_status", record.status)])
        client.set_terminated(run_id)
    return {"first": time.perf_counter() - started}
