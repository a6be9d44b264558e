"""What the bank of teacher logits is worth to a whole sweep: the same one with the bank, cold at its start, and without.

`launch.py run search_spaces/glyphs.yaml` without its baselines, from the first trial to the answer, on a teacher that was
trained before; each in processes of its own, turn by turn. Without the bank the teacher is asked for every batch of every
epoch of every trial, as other loops do. ASHA may stop a few other trials, since float16 rounds the logits: so the epochs
trained in an hour stand beside the trials. Memory is that of all processes together, pages that they share counted once
(PSS), at its highest.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from benchmarks.memory import peak_megabytes
from benchmarks.ratio import Ratio
from benchmarks.ratio import in_turns
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import read_events

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "search_spaces" / "glyphs.yaml"
SMALL = [
    "data.kwargs={train_images: 4000, test_images: 200}",
    "teacher.recipe.epochs=4",
    "teacher.recipe.batch_size=32",
    "recipe.epochs=5",
]


@dataclass(frozen=True)
class _Sweep:
    seconds: float
    trials: int
    epochs: int
    megabytes: float


def run(quick: bool) -> list[Ratio]:
    """Sweeps of 32 trials (quick: 4 of a small form)."""
    trials, turns, settings = (4, 1, SMALL) if quick else (32, 2, [])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _launch("teacher", settings, place / "taught")
        numbers = count()

        def sweep(bank: bool) -> _Sweep:
            runs = place / f"runs-{next(numbers)}"
            shutil.copytree(place / "taught" / "teachers", runs / "teachers")
            return _sweep(trials, [*settings, f"teacher.bank={str(bank).lower()}"], runs)

        found = in_turns({"bank": partial(sweep, True), "live": partial(sweep, False)}, turns)
    bank, live = found["bank"], found["live"]
    what, against = f"glyphs, {trials} trials, bank cold at the start", "the live teacher"
    return [
        Ratio(what, against, *([3600 * s.trials / s.seconds for s in some] for some in (bank, live)), "trials/h",
              "at least 2.5"),
        Ratio("the same", against, *([3600 * s.epochs / s.seconds for s in some] for some in (bank, live)), "epochs/h"),
        Ratio("its peak memory", against, *([s.megabytes for s in some] for some in (bank, live)), "MB"),
    ]  # fmt: skip


def _sweep(trials: int, settings: list[str], runs: Path) -> _Sweep:
    with peak_megabytes(None) as megabytes:
        _launch("run", [*settings, "baselines=null"], runs, "--trials", str(trials), "--name", "sweep")
    events = read_events(runs / "sweep" / LEDGER_FILE)[0]
    times = {
        name: [event.time for event in events if event.name == name] for name in ("driver", "stop", "report", "end")
    }
    assert len(times["end"]) == trials, f"{len(times['end'])} of {trials} trials have ended"
    return _Sweep(times["stop"][-1] - times["driver"][0], trials, len(times["report"]), megabytes[0])


def _launch(command: str, settings: list[str], runs: Path, *more: str) -> None:
    sets = [word for setting in settings for word in ("--set", setting)]
    arguments = [sys.executable, ROOT / "launch.py", command, SPACE, *sets, "--runs-dir", runs, *more]
    done = subprocess.run(
        arguments, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
