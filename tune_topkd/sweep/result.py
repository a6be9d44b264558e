"""What a run of a sweep came to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tune_topkd.config import DEFAULTS
from tune_topkd.config import RECIPE_PARAMETERS
from tune_topkd.config import ConfigError
from tune_topkd.config import Problem
from tune_topkd.config import SweepConfig
from tune_topkd.config import unknown_choice
from tune_topkd.errors import TuneTopKDError
from tune_topkd.export import BUNDLES
from tune_topkd.export import STUDENT_WRITERS
from tune_topkd.export import WRITERS
from tune_topkd.export import TunedConfig
from tune_topkd.export import tuned_config
from tune_topkd.export import write_files
from tune_topkd.ledger import REPEAT
from tune_topkd.ledger import Finalist
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import Winner
from tune_topkd.ledger import baseline_trial
from tune_topkd.ledger import finalists
from tune_topkd.ledger import finalists_done
from tune_topkd.ledger import winner_of
from tune_topkd.space import end_of_range
from tune_topkd.storage import write_text
from tune_topkd.sweep.images import ImageSpread
from tune_topkd.sweep.images import image_spread
from tune_topkd.sweep.spend import RungRank
from tune_topkd.sweep.spend import Spend
from tune_topkd.sweep.spend import rung_ranks
from tune_topkd.sweep.spend import spend
from tune_topkd.sweep.student import write_student
from tune_topkd.sweep.study import STUDY
from tune_topkd.sweep.study import write_study
from tune_topkd.sweep.wording import short
from tune_topkd.verdict import Apart
from tune_topkd.verdict import Verdict
from tune_topkd.verdict import baseline_name
from tune_topkd.verdict import fresh_gains
from tune_topkd.verdict import verdict_of


@dataclass(frozen=True)
class Gain:
    """By how much the answer is above a baseline."""

    sentence: str
    counts: bool
    """Whether it is more than one image of the validation split, and, on fresh seeds, told apart from none."""


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
    """Why it stopped: `finished`, `interrupted`, `time_budget`, `gpu_hours`, `cpu_hours`, or `failed` with an error that
    every trial would make."""
    mlflow_trouble: str = ""
    """Why MLflow has not got all of the sweep; empty if it has."""

    @property
    def is_interrupted(self) -> bool:
        """Whether a person, or the machine, ended the run early."""
        return self.reason == "interrupted"

    @property
    def best(self) -> TrialRecord | None:
        """The trial that is the answer: its `params` and, in percent, its own `value`; None if there is none.

        It is the first of the finalists where they are done, else the best of the full budget. `winner` has its fresh seeds.
        """
        winner = self.winner
        return None if winner is None else winner.record

    @property
    def winner(self) -> Winner | None:
        """The same trial with what its fresh seeds gave, if it was chosen by them."""
        return winner_of(self.state)

    @property
    def answer(self) -> TunedConfig:
        """The tuned config.

        Raises:
            NoAnswerError: no trial reached the full budget.
        """
        return answer(self.config, self.state)

    def export(self, path: str | Path, format: str = "yaml") -> None:
        """Write the tuned config, or the student that was trained with it, for another project.

        Args:
            path: the file, which is replaced if it is there; of several files the folder, where only those of such an export
                are replaced.
            format: `yaml`, `json` or `python`, one file; `torchdistill`, `mdistiller`, `timm` or `pytorch`, several; of the
                student `checkpoint`, `safetensors`, `torch_export` or `onnx`; `optuna`, all trials as Optuna studies.

        Raises:
            NoAnswerError: no trial reached the full budget.
            StudentError: the student's weights are not there, or cannot be written in this format.
            DataError: the dataset, which all formats of the student but `checkpoint` need, cannot be had.
            TuneTopKDError: there is no such format, or the folder holds a file of another origin that would be replaced.
            OSError: a file cannot be written.
        """
        if format == STUDY:
            write_study(Path(path), self.config, self.state)
        elif format in STUDENT_WRITERS:
            write_student(Path(path), format, self.config, self.state, self.folder, self.answer)
        elif format in BUNDLES:
            export_bundle(self.answer, format, Path(path), self.config.data.root)
        else:
            write_text(Path(path), in_format(self.answer, format))

    def gains(self) -> list[Gain]:
        """What the answer is worth beside each baseline, in points and in images of the validation split."""
        if self.best is None or not any(map(self.state.best, _baselines(self.config))):
            return []
        from tune_topkd.data import load_dataset

        return gains(self.config, self.state, len(load_dataset(self.config.data).val))

    def finalists(self) -> str:
        """What the finalists' fresh seeds gave, or that they are not done, in a sentence; nothing where none are to be."""
        return finalists_sentence(self.state)

    @property
    def verdict(self) -> Verdict | None:
        """What the newest look at the test set says; None if there was none."""
        return verdict_of(self.state)

    def image_spread(self) -> ImageSpread | None:
        """How much the verdict depends on which images the test set has; None before it is done, or without checkpoints."""
        verdict = self.verdict
        return None if verdict is None or not verdict.is_done else image_spread(self.folder, verdict)

    def spend(self) -> Spend:
        """What its trainings have cost, and what stopping some of them early has saved."""
        return spend(self.state)

    def rung_ranks(self) -> list[RungRank]:
        """How well each of ASHA's rungs foresaw the end; none where few trials reached it."""
        return rung_ranks(self.config, self.state)

    def advice(self) -> str:
        """What to do where a baseline is as good as the answer; nothing where none is, or the sweep is not finished."""
        return advice(self.config, self.state)


def finalists_sentence(state: SweepState) -> str:
    """What the finalists of a sweep gave, or that they are not done; nothing where none are to be."""
    winner, done = winner_of(state), finalists_done(state)
    if winner is None or done is None:
        return ""
    if winner.finalist is not None:
        return winner.finalist.sentence
    ended, total = done
    if ended == total:
        return "no finalist has a value of a fresh seed: the answer is the best of one seed, which is optimistic"
    so_far = f"not done ({ended} of {total} trainings)" if state.size(REPEAT) else "not trained yet"
    rest = "the rest" if state.size(REPEAT) else "them"
    return (
        f"the finalists are {so_far}: the answer is the best of one seed, which is optimistic; `resume` trains {rest}"
    )


def gains(config: SweepConfig, state: SweepState, images: int) -> list[Gain]:
    """What the answer is worth beside each baseline, in points and in images; on the same fresh seeds, if there are any.

    Args:
        config: the sweep's.
        state: the sweep.
        images: of the validation split.
    """
    winner = winner_of(state)
    fresh, apart = {finalist.record.key: finalist for finalist in finalists(state)}, fresh_gains(state)
    found = []
    for method in _baselines(config) if winner else ():
        base = baseline_trial(state, method)
        if base is None or winner is None:
            continue
        rate = f", lr {short(base.params['lr'])}" if "lr" in base.params else ""
        rate += ", the end of its range" if "lr" in ends_of_ranges(config, base) else ""
        if winner.finalist is not None:
            found.append(_fresh_gain(apart.get(method), fresh[base.key], baseline_name(base), rate, images))
            continue
        points = (winner.record.value or 0.0) - (base.value or 0.0)
        worth = round(points / 100 * images)
        over = f"{points:+.2f} points {_over(points)} {baseline_name(base)} ({base.value:.2f} %{rate})"
        found.append(Gain(f"{over}: {worth:+d} of {images:,} validation images", abs(worth) > 1))
    return found


def ends_of_ranges(config: SweepConfig, base: TrialRecord) -> dict[str, str]:
    """The recipe's parameters of a baseline that lie at an end of what was tried, and at which; it may be better beyond."""
    tried = {name: config.space[name] for name in base.params if name in RECIPE_PARAMETERS and name in config.space}
    found = {name: end_of_range(range_, base.params[name]) for name, range_ in tried.items()}
    return {name: end for name, end in found.items() if end}


def _over(points: float) -> str:
    return "against" if points < 0 else "over"


def _fresh_gain(apart: Apart | None, base: Finalist, name: str, rate: str, images: int) -> Gain:
    """By how much the answer is above a baseline on the seeds that both have a value of."""
    if apart is None:
        return Gain(
            f"{name} has no fresh seed to be compared on ({base.record.value:.2f} % on that of the search{rate})", False
        )
    worth = round(apart.mean / 100 * images)
    error = "" if apart.error is None else f" ± {apart.error:.2f}"
    seeds = "one fresh seed" if len(apart.values) == 1 else f"the same {len(apart.values)} fresh seeds"
    over = f"{apart.mean:+.2f}{error} points {_over(apart.mean)} {name} ({base.figure}{rate}) on {seeds}"
    doubt = ""
    if apart.interval is not None and not apart.is_told_apart:
        doubt = "; not told apart ({:+.2f} to {:+.2f})".format(*apart.interval.of_gain)
    elif apart.interval is None:
        doubt = "; of one seed nothing is sure"
    sentence = f"{over}: {worth:+d} of {images:,} validation images{doubt}"
    return Gain(sentence, apart.is_told_apart and abs(worth) > 1)


def _baselines(config: SweepConfig) -> Sequence[str]:
    return config.baselines.methods if config.baselines else ()


def advice(config: SweepConfig, state: SweepState) -> str:
    """What to do where a baseline is as good as the answer; nothing where none is."""
    winner = winner_of(state)
    if winner is None or state.stop_reason != "finished":  # before the end both may still change
        return ""
    fresh = {finalist.record.key: finalist for finalist in finalists(state)} if winner.finalist else {}

    def value(record: TrialRecord) -> float | None:
        return fresh[record.key].mean if fresh else record.value

    found = [record for method in _baselines(config) if (record := baseline_trial(state, method)) is not None]
    bases = [(worth, record) for record in found if record.key.arm != DEFAULTS and (worth := value(record)) is not None]
    best = max(bases, key=lambda base: base[0], default=None)
    if best is None or best[0] < winner.value:
        return ""
    name = baseline_name(best[1])
    more = "more trials (`resume --trials N`), a wider space or longer trials"
    return f"{name} does as well without {config.method}: try {more}, or use it instead"


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
        known = (*WRITERS, *BUNDLES, *STUDENT_WRITERS)
        raise TuneTopKDError(f"format: there is no {name!r}; {unknown_choice(name, known)}")
    return WRITERS[name](tuned)


def export_bundle(tuned: TunedConfig, name: str, folder: Path | None, root: str | None = None) -> list[Path]:
    """Write a tuned config in a format of several files, and return the files.

    Args:
        tuned: the tuned config.
        name: one of `BUNDLES`.
        folder: where to.
        root: where the dataset lies, by which its classes and the size of its images are known; None where nobody knows.

    Raises:
        ConfigError: no folder is named, it is none, or a file in it that would be replaced is not of such an export.
        OSError: a file cannot be written.
    """
    if folder is None:
        rule = "is several files, so it needs a folder: add -o FOLDER"
        raise ConfigError("--format", [Problem(key=name, rule=rule)])
    here = tuned.model_copy(update={"data": tuned.data.model_copy(update={"root": root})})
    return write_files(folder, BUNDLES[name](here))
