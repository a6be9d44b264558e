"""The distilled student of a sweep: which trial's weights it is, and how it gets into another project's file."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_topkd.config import SweepConfig
from tune_topkd.export import STUDENT_WRITERS
from tune_topkd.export import Student
from tune_topkd.export import StudentError
from tune_topkd.export import TunedConfig
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import winner_of
from tune_topkd.space import digest
from tune_topkd.storage import write_atomically
from tune_topkd.verdict import verdict_of_answer


def student_trial(state: SweepState) -> TrialRecord | None:
    """The trial whose newest checkpoint is the sweep's student; None if there is no answer.

    Of a confirmed answer it is its first training on all images but the test set's, whatever the test set said of it: the
    best of several would be chosen by the test set. Else it is the search's own trial.
    """
    winner, verdict = winner_of(state), verdict_of_answer(state)
    if verdict is not None:
        answer = verdict.answer.finalist
        for seed in answer.values:
            return answer.repeats[seed]
    return None if winner is None else winner.record


def student_of(config: SweepConfig, state: SweepState, folder: Path, tuned: TunedConfig) -> Student:
    """The student of a sweep that has an answer.

    Args:
        config: the sweep's frozen config.
        state: its trials.
        folder: the sweep's.
        tuned: its answer.

    Raises:
        StudentError: its checkpoint is gone, damaged or not of the last epoch.
    """
    from tune_topkd.models import WEIGHTS_KEY
    from tune_topkd.train.checkpoint import CODE_KEY

    record = student_trial(state)
    assert record is not None, "there is an answer"
    content = _checkpoint(folder, record, config.recipe.epochs)
    header = state.header
    about = {
        "sweep": header.sweep,
        "sweep_id": header.id,
        "trial": str(record.key),
        "seed": str(config.sweep.seed if record.seed is None else record.seed),
        record.key.metric: str(record.value),
        "tuned_config": digest(tuned.model_dump(mode="json")),
    }
    code = json.loads(content["config"]).get(CODE_KEY, {})
    return Student(config.student, config.data, content[WEIGHTS_KEY], about, code.get("student"))


def write_student(
    path: Path, format: str, config: SweepConfig, state: SweepState, folder: Path, tuned: TunedConfig
) -> None:
    """Write the student of a sweep that has an answer; the file is replaced in one step.

    Args:
        path: the file.
        format: one of `STUDENT_WRITERS`.
        config: the sweep's frozen config.
        state: its trials.
        folder: the sweep's.
        tuned: its answer.

    Raises:
        StudentError: the weights are not there, or cannot be written in this format.
        DataError: the dataset, which all formats but `checkpoint` ask for its constants, cannot be had.
        OSError: the file cannot be written.
    """
    content = io.BytesIO()  # an error of reading data or making a graph is none of the file's
    STUDENT_WRITERS[format](student_of(config, state, folder, tuned), content)
    write_atomically(path, lambda stream: stream.write(content.getbuffer()))


def _checkpoint(folder: Path, record: TrialRecord, epochs: int) -> Mapping[str, Any]:
    from tune_topkd.execution.checkpoints import checkpoints
    from tune_topkd.execution.checkpoints import is_whole
    from tune_topkd.execution.remote import bring_checkpoints
    from tune_topkd.train.checkpoint import load_checkpoint

    bring_checkpoints(folder, [str(record.key)])
    trial = folder / "trials" / str(record.key)
    remedy = "; put the folder back, or train the tuned config (`train`), which keeps its weights"
    newest = next(iter(checkpoints(trial)), None)
    if newest is None:
        raise StudentError(
            f"{trial}: has no checkpoint: the weights of trial {record.key}, the answer, are gone{remedy}"
        )
    if not is_whole(newest):
        raise StudentError(f"{newest}: is not as it was written: the weights of the answer are damaged{remedy}")
    content = load_checkpoint(newest)
    if content["epoch"] != epochs:
        rule = f"is of epoch {content['epoch']}, but the answer is what trial {record.key} gave after epoch {epochs}"
        raise StudentError(f"{newest}: {rule}{remedy}")
    return content
