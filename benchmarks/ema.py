"""What the moving average of the student's weights costs: CPU seconds of a training with `recipe.ema` against one without.

One thread, batches of 64, TopKD by a teacher whose logits come out of the bank; hardly any validation images, so it is the
steps that are compared: the average's own evaluation comes on top, once an epoch. Both trainings give the same weights.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.ratio import Ratio
from benchmarks.ratio import cpu_seconds
from benchmarks.ratio import in_turns
from tune_topkd.config import EmaConfig
from tune_topkd.config import SharedFiles
from tune_topkd.config import SweepConfig
from tune_topkd.config import load_config
from tune_topkd.sweep.prepare import trial_with
from tune_topkd.teacher import ensure_teacher
from tune_topkd.train import train

SPACES = Path(__file__).parents[1] / "search_spaces"
GOAL = "at most 1.05"


def run(quick: bool) -> list[Ratio]:
    """Digits and glyphs."""
    torch.set_num_threads(1)
    return [_of("digits", 3 if quick else 11, 1 if quick else 10), _of("glyphs", 1 if quick else 7, 1)]


def _of(space: str, turns: int, epochs: int) -> Ratio:
    config = load_config(SPACES / f"{space}.yaml")
    assert config.teacher is not None, "the space has a teacher"
    assert config.teacher.recipe is not None, "which is trained"
    recipe = config.teacher.recipe.model_copy(update={"epochs": 1})
    few = {"data": config.data.model_copy(update={"val_fraction": 0.02})}
    config = config.model_copy(update=few | {"teacher": config.teacher.model_copy(update={"recipe": recipe})})
    with tempfile.TemporaryDirectory() as folder:
        teacher = ensure_teacher(config, Path(folder), train)
        files = SharedFiles(teacher_checkpoint=str(teacher.path), teacher_bank=str(Path(folder) / "bank"))
        _train(config, files, epochs, None)  # fills the bank
        measures = {
            name: partial(cpu_seconds, partial(_train, config, files, epochs, ema), 1)
            for name, ema in (("with", EmaConfig()), ("without", None))
        }
        taken = in_turns(measures, turns)
    what = f"a training of {space} with a moving average"
    return Ratio(what, "the same without", taken["with"], taken["without"], "s", GOAL)


def _train(config: SweepConfig, files: SharedFiles, epochs: int, ema: EmaConfig | None) -> None:
    recipe = config.recipe.model_copy(update={"epochs": epochs, "ema": ema})
    train(trial_with(config.model_copy(update={"recipe": recipe}), files, 0), lambda epoch, metrics, save: None)
