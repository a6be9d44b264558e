"""What a run of a sweep came to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tune_topkd.config import SweepConfig
from tune_topkd.config import unknown_choice
from tune_topkd.errors import TuneTopKDError
from tune_topkd.export import WRITERS
from tune_topkd.export import TunedConfig
from tune_topkd.export import tuned_config
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.storage import write_text
from tune_topkd.sweep.wording import short

BASELINE_NAMES = {"ce": "cross-entropy", "kd": "KD, T = 4"}


@dataclass(frozen=True)
class Gain:
    """By how much the best trial is above a baseline."""

    sentence: str
    counts: bool
    """Whether it is more than one image of the validation split."""


@dataclass(frozen=True)
class Result:
    """How one run of a sweep ended, and what the sweep has found so far."""

    name: str
    folder: Path
    """The sweep's."""
    config: SweepConfig
    """The frozen one, complete."""
    state: SweepState
    """All that the ledger tells: every trial, its parameters and its reports."""
    reason: str
    """Why it stopped: `finished`, `interrupted`, `time_budget`, or `failed` with an error that every trial would make."""
    mlflow_trouble: str = ""
    """Why MLflow has not got all of the sweep; empty if it has."""

    @property
    def is_interrupted(self) -> bool:
        """Whether a person, or the machine, ended the run early."""
        return self.reason == "interrupted"

    @property
    def best(self) -> TrialRecord | None:
        """The best trial of the full budget: its `params` and, in percent, its `value`; None if there is none."""
        return self.state.best()

    @property
    def answer(self) -> TunedConfig:
        """The tuned config.

        Raises:
            NoAnswerError: no trial reached the full budget.
        """
        return answer(self.config, self.state)

    def export(self, path: str | Path, format: str = "yaml") -> None:
        """Write the tuned config for another project.

        Args:
            path: the file, which is replaced if it is there.
            format: `yaml`, `json` or `python`.

        Raises:
            NoAnswerError: no trial reached the full budget.
            TuneTopKDError: there is no such format.
            OSError: the file cannot be written.
        """
        write_text(Path(path), in_format(self.answer, format))

    def gains(self) -> list[Gain]:
        """What the best trial is worth beside each baseline, in points and in images of the validation split."""
        if self.best is None or not any(map(self.state.best, _baselines(self.config))):
            return []
        from tune_topkd.data import load_dataset

        return gains(self.config, self.state, len(load_dataset(self.config.data).val))

    def advice(self) -> str:
        """What to do where a baseline is as good as the answer; nothing where none is."""
        return advice(self.config, self.state)


def gains(config: SweepConfig, state: SweepState, images: int) -> list[Gain]:
    """What the best trial is worth beside each baseline, in points and in images.

    Args:
        config: the sweep's.
        state: the sweep.
        images: of the validation split.
    """
    best = state.best()
    found = []
    for method in _baselines(config) if best else ():
        base = state.best(method)
        if base is not None and best is not None:
            points = (best.value or 0.0) - (base.value or 0.0)
            worth = round(points / 100 * images)
            rate = f", lr {short(base.params['lr'])}" if "lr" in base.params else ""
            over = f"{points:+.2f} points over {BASELINE_NAMES[method]} ({base.value:.2f} %{rate})"
            found.append(Gain(f"{over}: {worth:+d} of {images:,} validation images", abs(worth) > 1))
    return found


def _baselines(config: SweepConfig) -> Sequence[str]:
    return config.baselines.methods if config.baselines else ()


def advice(config: SweepConfig, state: SweepState) -> str:
    """What to do where a baseline is as good as the answer; nothing where none is."""
    best = state.best()
    bases = [(record.value or 0.0, m) for m in BASELINE_NAMES if (record := state.best(m)) is not None]
    if best is None or not bases or max(bases)[0] < (best.value or 0.0):
        return ""
    name = BASELINE_NAMES[max(bases)[1]]
    more = (
        "more trials (`resume --trials N`)" if state.stop_reason == "finished" else "the rest of the trials (`resume`)"
    )
    return f"{name} does as well without {config.method}: try {more}, a wider space or longer trials, or use it instead"


def answer(config: SweepConfig, state: SweepState) -> TunedConfig:
    """The tuned config of a sweep.

    Raises:
        NoAnswerError: no trial reached the full budget.
    """
    from tune_topkd.sweep.preflight import loss_defaults

    return tuned_config(config, state, loss_defaults(config))


def in_format(tuned: TunedConfig, name: str) -> str:
    """A tuned config as text.

    Raises:
        TuneTopKDError: there is no such format.
    """
    if name not in WRITERS:
        raise TuneTopKDError(f"format: there is no {name!r}; {unknown_choice(name, WRITERS)}")
    return WRITERS[name](tuned)
