"""The tuned config: its schema, where it comes from, and its loader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import ClassVar
from typing import Literal

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import SerializerFunctionWrapHandler
from pydantic import model_serializer

from tune_topkd.config import AugmentConfig
from tune_topkd.config import ConfigError
from tune_topkd.config import DataConfig
from tune_topkd.config import Method
from tune_topkd.config import ModelConfig
from tune_topkd.config import Problem
from tune_topkd.config import RecipeConfig
from tune_topkd.config import Scalar
from tune_topkd.config import StudentConfig
from tune_topkd.config import SweepConfig
from tune_topkd.config import TeacherConfig
from tune_topkd.config import loss_part
from tune_topkd.config import read_yaml
from tune_topkd.config import recipe_part
from tune_topkd.config import validated
from tune_topkd.errors import TuneTopKDError
from tune_topkd.ledger import Finalist
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import Winner
from tune_topkd.ledger import baseline_trial
from tune_topkd.ledger import finalists
from tune_topkd.ledger import winner_of
from tune_topkd.verdict import Gain
from tune_topkd.verdict import Measured
from tune_topkd.verdict import verdict_of_answer

SCHEMA_VERSION = 2
_READABLE_VERSIONS = (1, 2)
"""A file of version 1 is one of version 2 that lacks what came with it."""
TUNED_FILE = "tuned.yaml"
SCHEMA_FILE = Path(__file__).with_name("tuned.schema.json")
"""For programs that check or write such a file without this one."""


class NoAnswerError(TuneTopKDError):
    """The sweep has no trial that reached the full budget."""


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class FreshEvidence(_Part):
    """What trainings of the same config on seeds that took no part in choosing it gave."""

    val_top1: float
    """The mean, in percent, at the last epoch."""
    error: float | None
    """The standard error of the mean; none of one value."""
    seeds: list[int]
    """The seeds of the trainings."""
    values: list[float | None]
    """The value of each seed, in percent; none of a training that failed."""

    @classmethod
    def of(cls, finalist: Finalist | None) -> "FreshEvidence | None":
        """What there is of a finalist, if there is a value."""
        if finalist is None or finalist.mean is None:
            return None
        values, seeds = finalist.values, list(finalist.seeds)
        values_by_seed = [values.get(seed) for seed in seeds]
        return cls(val_top1=finalist.mean, error=finalist.error, seeds=seeds, values=values_by_seed)


class TestEvidence(_Part):
    """What trainings on all images but the test set's gave on the test set, after their last epoch.

    Their seeds had no part in any choice. `interval` is that of the mean, at 95 %: Student's t over seeds.
    """

    test_top1: float
    """The mean, in percent."""
    sd: float | None
    """The standard deviation over seeds, in points; none of one value."""
    interval: list[float] | None
    """The lowest and the highest mean that the values agree with, in percent."""
    look: int
    """Which look at the test set it was, from 1: a later one may have been prompted by what an earlier one showed."""
    seeds: list[int]
    """The seeds of the trainings."""
    values: list[float | None]
    """The value of each seed, in percent; none of a training that failed."""
    teacher: str | None = None
    """A hash of the weights of the teacher that was asked, in hex; none without a teacher."""

    @classmethod
    def of(cls, measured: Measured, look: int, teacher: str | None) -> "TestEvidence | None":
        """What there is of a config, if there is a value."""
        finalist = measured.finalist
        if finalist.mean is None:
            return None
        seeds = list(finalist.seeds)
        return cls(
            test_top1=finalist.mean,
            sd=measured.spread,
            interval=None if measured.interval is None else list(measured.interval),
            look=look,
            seeds=seeds,
            values=[finalist.values.get(seed) for seed in seeds],
            teacher=teacher,
        )


class GainEvidence(_Part):
    """By how much the tuned config is above a baseline on the test set, on the same seeds."""

    points: float
    """The mean over seeds."""
    interval: list[float] | None
    """The lowest and the highest: at 95 % for all baselines together."""
    is_told_apart: bool
    """Whether the interval lies on one side of zero."""

    @classmethod
    def of(cls, gain: Gain) -> "GainEvidence":
        """As it was found."""
        interval = None if gain.interval is None else list(gain.interval)
        return cls(points=gain.mean, interval=interval, is_told_apart=gain.is_told_apart)


class _Measurable(_Part):
    """A part with what fresh seeds gave, which is written only where there are any."""

    fresh: FreshEvidence | None = None
    """What fresh seeds gave on the validation split, where the sweep had finalists."""
    test: TestEvidence | None = None
    """What further seeds gave on the test set, where the sweep was confirmed."""
    _LATER: ClassVar[tuple[str, ...]] = ("fresh", "test")

    @model_serializer(mode="wrap")
    def _only_where_there_are(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        later = {name: content.pop(name) for name in self._LATER if name in content}
        return content | {name: value for name, value in later.items() if value not in (None, {})}


class BaselineEvidence(_Measurable):
    """The trial that stands for a baseline: its best, on fresh seeds where several of its trials have them.

    That is the method at its defaults over the same learning-rate range, or, with a `loss` of its own, one that was
    tuned as the answer was.
    """

    _LATER: ClassVar[tuple[str, ...]] = ("loss", "fresh", "test", "gain")

    val_top1: float
    """Validation top-1 in percent, at the last epoch."""
    recipe: dict[str, Scalar]
    """The searched part of its recipe."""
    trials: int
    """Trials that reached the full budget."""
    loss: dict[str, Scalar] = Field(default_factory=dict)
    """The searched part of its loss; empty where it has its defaults."""
    gain: GainEvidence | None = None
    """By how much the tuned config is above it on the test set."""


class Evidence(_Measurable):
    """Where the tuned config comes from, and how far to trust it.

    `val_top1` was used to choose among the trials, so it is optimistic; it comes from one seed. `fresh`, where the sweep had
    finalists, is what the config then gave on other seeds, and what it was chosen by among the finalists. `test`, where the
    sweep was confirmed, is of seeds that had no part in any choice: the figure to expect.
    """

    _LATER: ClassVar[tuple[str, ...]] = ("identities", "fresh", "test")

    val_top1: float
    """Validation top-1 in percent, at the last epoch of the full budget."""
    trial: int
    """The number of the winning trial."""
    trials: dict[str, int]
    """How many trials were completed, pruned and failed."""
    baselines: dict[str, BaselineEvidence]
    """The best of each baseline, by its method."""
    seeds: list[int]
    """The seed of the search's trainings."""
    sweep: str
    """The sweep's name."""
    sweep_id: str
    """The sweep's identity, which no other has."""
    digest: str
    """A hash of the sweep's whole config."""
    space_digest: str
    """A hash of the searched space."""
    teacher: dict[str, Any]
    """The teacher's key (content hash) and validation top-1 in percent."""
    versions: dict[str, str]
    """Versions of the packages that the results depend on."""
    git_commit: str | None = None
    """The commit of the checkout that the sweep was run from, with a + if files differed from it; none of an installed
    package."""
    identities: dict[str, str] = Field(default_factory=dict)
    """What the results depend on, by content: the data, the teacher's weights, the networks, a user's code."""


class TunedTeacher(ModelConfig):
    """The network that taught, and how it was trained, where the sweep trained it; else its weights are a checkpoint's."""

    recipe: RecipeConfig | None = None
    """How the sweep trained it; none if its weights are a checkpoint's."""
    augment: AugmentConfig | None = None
    """The views that `recipe` trains it on; by default those of the data."""
    seed: int = Field(0, ge=0)
    """Seed of its training."""

    @classmethod
    def of(cls, config: TeacherConfig | None) -> "TunedTeacher | None":
        """A sweep's teacher without where its weights lie."""
        if config is None:
            return None
        return cls(**config.model.model_dump(), recipe=config.recipe, augment=config.augment, seed=config.seed)


class TunedConfig(_Part):
    """What a sweep found: the loss and the recipe that won, complete, with the evidence."""

    schema_version: Literal[2] = 2
    """The version of this layout."""
    method: Method
    """The loss's name, for `tune_topkd.loss.build_loss`."""
    loss: dict[str, Scalar]
    """Every parameter of the loss, the weights absolute: `tune_topkd.loss.build_loss(method, loss)` is the loss."""
    recipe: RecipeConfig
    """How the student was trained, what was searched of it included."""
    data: DataConfig
    """The dataset and how it was split."""
    teacher: TunedTeacher | None
    """The network that taught, without its weights."""
    student: StudentConfig
    """The network that was trained."""
    evidence: Evidence = Field(repr=False)
    """Where the config comes from, and how far to trust it."""


def tuned_config(config: SweepConfig, state: SweepState, loss_defaults: Mapping[str, Scalar]) -> TunedConfig:
    """The answer of a sweep.

    Args:
        config: the sweep's frozen config.
        state: its trials.
        loss_defaults: the defaults of the method's loss, for what is neither fixed nor searched.

    Raises:
        NoAnswerError: no trial reached the full budget.
    """
    winner = winner_of(state)
    if winner is None:
        counts = ", ".join(f"{n} {status}" for status, n in state.counts().items() if n)
        raise NoAnswerError(f"sweep {state.header.sweep}: no trial reached the full budget ({counts or 'no trials'})")
    params = winner.record.params
    recipe = config.recipe.model_dump() | recipe_part(params) | {"log_grad_norms": False}
    return TunedConfig(
        method=config.method,
        loss=dict(loss_defaults) | config.loss | loss_part(params),
        recipe=RecipeConfig.model_validate(recipe),
        data=config.data.model_copy(update={"root": None}),  # a place on this machine
        teacher=TunedTeacher.of(config.teacher),
        student=config.student,
        evidence=_evidence(config, state, winner),
    )


def load_tuned_config(path: Path | str) -> TunedConfig:
    """Read a tuned config, from YAML or JSON, also of an older schema version; needs no more than the base install.

    Raises:
        ConfigError: the file is missing, is of a schema version not known here, or a key or value breaks a rule.
    """
    raw = read_yaml(path)
    version = raw.get("schema_version", SCHEMA_VERSION)
    if isinstance(version, bool) or version not in _READABLE_VERSIONS:  # alone: what else such a file says may be right
        known = " and ".join(map(str, _READABLE_VERSIONS))
        is_newer = isinstance(version, int) and version > SCHEMA_VERSION
        cure = "; a newer tune_topkd wrote it: update this one" if is_newer else ""
        rule = f"is not a schema version that this tune_topkd reads: known: {known}{cure}"
        raise ConfigError(str(path), [Problem(key="schema_version", rule=rule, value=version, has_value=True)])
    return validated(TunedConfig, {**raw, "schema_version": SCHEMA_VERSION}, str(path))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a tuned config's file; `SCHEMA_FILE` of this package has it too."""
    schema = TunedConfig.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _evidence(config: SweepConfig, state: SweepState, winner: Winner) -> Evidence:
    header = state.header
    counts = state.counts()
    fresh = {f.record.key: f for f in finalists(state)} if winner.finalist is not None else {}
    verdict = verdict_of_answer(state)
    teacher = state.confirm.teacher if state.confirm else None
    measured = {base.record.key: base for base in verdict.baselines} if verdict else {}
    gains = {gain.base.record.key: gain for gain in verdict.gains} if verdict else {}
    baselines: dict[str, BaselineEvidence] = {}
    for method in config.baselines.methods if config.baselines else []:
        record = baseline_trial(state, method)
        if record is not None and record.value is not None:
            key, params = record.key, record.params
            baselines[method] = BaselineEvidence(
                val_top1=record.value,
                recipe=recipe_part(params),
                trials=len(state.ranked(method)),
                loss=loss_part(params),
                fresh=FreshEvidence.of(fresh.get(key)),
                test=TestEvidence.of(measured[key], verdict.look, teacher) if verdict and key in measured else None,
                gain=GainEvidence.of(gains[key]) if key in gains else None,
            )
    return Evidence(
        val_top1=winner.record.value or 0.0,
        trial=winner.record.key.number,
        trials={status: counts[status] for status in ("completed", "pruned", "failed")},
        baselines=baselines,
        seeds=[config.sweep.seed],
        sweep=header.sweep,
        sweep_id=header.id,
        digest=header.digest,
        space_digest=header.space_digest,
        teacher={} if state.teacher_file is None else state.teacher_file._asdict(),
        versions=dict(header.versions),
        git_commit=header.git_commit,
        identities=dict(state.identities),
        fresh=FreshEvidence.of(winner.finalist),
        test=None if verdict is None else TestEvidence.of(verdict.answer, verdict.look, teacher),
    )
