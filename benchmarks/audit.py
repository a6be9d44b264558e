"""What the audit of a long sweep costs, a trial: of 5,000 trials against 500, in CPU seconds.

Every decision of a ledger is taken again: each report's by ASHA, and 250 proposals by the sampler. The work for a trial is
to be the same however many there are; of a longer sweep a smaller part of the proposals is drawn again, so it comes to
less. The sweeps are of formula trials, without Ray.
"""

import tempfile
from functools import partial
from pathlib import Path

from benchmarks import formula
from benchmarks.ratio import Ratio
from benchmarks.ratio import cpu_seconds
from benchmarks.ratio import in_turns
from tune_topkd.config import SweepConfig
from tune_topkd.execution.checkpoints import write_checkpoint
from tune_topkd.execution.simulated import SimulatedTrial
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.search import Search
from tune_topkd.sweep import audit_sweep

MORE = {"scale_top": {"low": 1.0, "high": 4.0}, "scale_gt": {"low": "scale_top", "high": 6.0}}


def run(quick: bool) -> list[Ratio]:
    """Audits of 5,000 and 500 trials (quick: 200 and 50)."""
    many, few, turns = (200, 50, 1) if quick else (5_000, 500, 3)
    with tempfile.TemporaryDirectory() as folder:
        sweeps = {trials: _sweep(Path(folder) / str(trials), trials) for trials in (many, few)}
        measures = {str(n): partial(_seconds_per_trial, Path(folder) / str(n), sweeps[n], n) for n in sweeps}
        taken = in_turns(measures, turns)
    values, baseline = taken[str(many)], taken[str(few)]
    what = f"a trial's part of an audit of {many:,} trials ({min(values) * many:.1f} s in all)"
    return [Ratio(what, f"of {few:,} trials", values, baseline, "s", "at most 1")]


def _seconds_per_trial(folder: Path, config: SweepConfig, trials: int) -> float:
    def audit() -> None:
        assert audit_sweep(config, folder) == [], "nothing is wrong with it"

    return cpu_seconds(audit, 1) / trials


def _sweep(folder: Path, trials: int) -> SweepConfig:
    """A finished sweep of formula trials."""
    config = formula.sweep_config(trials, MORE, asha={"grace_epochs": 1})
    folder.mkdir()
    header = Header(sweep="benchmark", id="0", seed=config.sweep.seed, trials=trials)

    def epoch_of(trial: SimulatedTrial, epoch: int) -> dict[str, float]:
        metrics = formula.simulated(trial, epoch)
        if epoch == formula.EPOCHS:  # a completed trial keeps its weights
            at = folder / "trials" / str(trial.record.key)
            at.mkdir(parents=True)
            write_checkpoint(at, epoch, metrics, lambda place: (place / "state").write_text("0"))
        return metrics

    with Ledger.create(folder / LEDGER_FILE, header, is_durable=False) as ledger:
        ledger.append(Driver.here(trials=trials))
        simulate(Search(config, ledger), epoch_of, at_once=1)
    return config
