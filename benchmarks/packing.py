"""What several trials at once train together, as `auto` measures and chooses it, against one trial at a time.

resnet32x4 teaches resnet8x4 with the bank filled, as in `step`. On a GPU, if there is one: 1, 2, 4 or 8 trials share it.
Else on the CPUs: one trial with all of them, or more with fewer each. Images per second of all trials together, each in a
Ray worker of its own.
"""

import os
import tempfile
from pathlib import Path

import torch

from benchmarks import formula
from benchmarks import step
from benchmarks.ratio import Ratio
from tune_topkd.config import AUTO
from tune_topkd.execution import Cluster
from tune_topkd.execution import Packed
from tune_topkd.execution import pack
from tune_topkd.train import Probe


def run(quick: bool) -> list[Ratio]:
    """The best number of trials against one, a few times over."""
    on_gpu = torch.cuda.is_available()
    shares = {"cpus_per_trial": AUTO, "gpus_per_trial": AUTO if on_gpu else 0.0}
    config = formula.sweep_config(1, {}, asha=None, **shares)
    best, alone = [], []
    os.environ["PYTHONPATH"] = os.getcwd()  # the workers import the benchmark's modules
    with tempfile.TemporaryDirectory() as folder, Cluster.attached():
        trial = step.trial_config(Path(folder), images=256 if quick else 5120)
        for _ in range(1 if quick else 3):
            tried = pack(config, trial, Probe)
            best.append(tried[0])
            alone.append(min(tried, key=lambda packed: packed.at_once))
    chosen = ", ".join(str(packed.at_once) for packed in best)
    what, against = f"{step.PAIR}, {'GPU' if on_gpu else 'CPUs'}, chosen {chosen} at once", "one trial at a time"
    return [
        Ratio(what, against, _rates(best), _rates(alone), "images/s", "at least 3 on a GPU"),
        Ratio("its memory", against, *([100 * p.memory for p in some] for some in (best, alone)), "% of all"),
    ]


def _rates(some: list[Packed]) -> list[float]:
    return [packed.images_per_second for packed in some]
