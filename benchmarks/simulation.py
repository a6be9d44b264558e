"""What a simulated sweep of many trials takes: 10,000 formula trials, 200 at once, by each sampler, on one core.

No Ray and no networks: what is measured is proposing, ASHA, the ledger (its disk is not waited for) and the clock. The
trials are of 9 epochs over 8 axes, some of them slower than others, so their reports interleave. In CPU seconds. Each turn
runs the same sweep anew, and must write the same ledger to the byte, or the benchmark fails. TPE's proposals are Optuna's,
asked for one after the other, each beside up to 500 trials and those at work.
"""

import tempfile
from functools import partial
from itertools import count
from pathlib import Path

from benchmarks import formula
from benchmarks.ratio import Ratio
from benchmarks.ratio import cpu_seconds
from benchmarks.ratio import in_turns
from tune_topkd.execution.simulated import SimulatedTrial
from tune_topkd.execution.simulated import VirtualClock
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.search import Search

MINUTE = 60.0
MEASURED = ("random", "tpe")
"""Samplers: what a sweep of many trials costs beside proposing, and with what proposes by default."""


def run(quick: bool) -> list[Ratio]:
    """Sweeps of 10,000 trials, 200 at once (quick: of 200, 50 at once)."""
    trials, at_once = (200, 50) if quick else (10_000, 200)
    with tempfile.TemporaryDirectory() as folder:
        _sweep(Path(folder) / "imports", "tpe", 20, 5)
        measures = {name: partial(_seconds, Path(folder), name, trials, at_once, count()) for name in MEASURED}
        taken = in_turns(measures, turns=2)
    what = f"{trials:,} trials, {at_once} at once"
    return [
        *(
            Ratio(f"{what}, by the sampler {name}", "a minute", seconds, [MINUTE] * len(seconds), "s", "at most 1")
            for name, seconds in taken.items()
        ),
        Ratio(f"{what}, by the sampler tpe", "random", taken["tpe"], taken["random"], "s"),
    ]


def _seconds(folder: Path, sampler: str, trials: int, at_once: int, turns: "count[int]") -> float:
    """CPU seconds of a sweep, whose ledger must be that of the first turn."""
    path = folder / f"{sampler}-{next(turns)}.jsonl"
    seconds = cpu_seconds(lambda: _sweep(path, sampler, trials, at_once), 1)
    assert path.read_bytes() == (folder / f"{sampler}-0.jsonl").read_bytes(), "twice the same sweep is the same ledger"
    return seconds


def _sweep(path: Path, sampler: str, trials: int, at_once: int) -> None:
    config = formula.sweep_config(trials, formula.MORE_AXES, asha={"grace_epochs": 1}, sampler=sampler)
    clock = VirtualClock()
    header = Header(sweep="simulation", id="0", seed=config.sweep.seed, trials=trials)
    with Ledger.create(path, header, clock=clock, is_durable=False) as ledger:
        ledger.append(Driver.here(trials=trials))
        search = Search(config, ledger, clock=clock)
        reason = simulate(search, formula.simulated, at_once=at_once, clock=clock, seconds=_epoch_seconds)
    assert (reason, len(ledger.state.ended)) == ("finished", trials)


def _epoch_seconds(trial: SimulatedTrial, epoch: int) -> float:
    return 1.0 + trial.record.key.number % 7
