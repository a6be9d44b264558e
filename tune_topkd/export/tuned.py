"""The tuned config: its schema, where it comes from, and its loader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import Literal

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import SerializerFunctionWrapHandler
from pydantic import model_serializer

from tune_topkd.config import ConfigError
from tune_topkd.config import DataConfig
from tune_topkd.config import Method
from tune_topkd.config import ModelConfig
from tune_topkd.config import Problem
from tune_topkd.config import RecipeConfig
from tune_topkd.config import Scalar
from tune_topkd.config import StudentConfig
from tune_topkd.config import SweepConfig
from tune_topkd.config import loss_part
from tune_topkd.config import read_yaml
from tune_topkd.config import recipe_part
from tune_topkd.config import validated
from tune_topkd.errors import TuneTopKDError
from tune_topkd.ledger import Finalist
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import Winner
from tune_topkd.ledger import finalists
from tune_topkd.ledger import winner_of

SCHEMA_VERSION = 1
TUNED_FILE = "tuned.yaml"


class NoAnswerError(TuneTopKDError):
    """The sweep has no trial that reached the full budget."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FreshEvidence(_Part):
    """What trainings of the same config on seeds that took no part in choosing it gave."""

    val_top1: float
    """The mean, in percent, at the last epoch."""
    error: float | None
    """The standard error of the mean; none of one value."""
    seeds: list[int]
    values: list[float | None]
    """By seed; none of a training that failed."""

    @classmethod
    def of(cls, finalist: Finalist | None) -> "FreshEvidence | None":
        """What there is of a finalist, if there is a value."""
        if finalist is None or finalist.mean is None:
            return None
        values, seeds = finalist.values, list(finalist.seeds)
        values_by_seed = [values.get(seed) for seed in seeds]
        return cls(val_top1=finalist.mean, error=finalist.error, seeds=seeds, values=values_by_seed)


class _WithFresh(_Part):
    """A part with what fresh seeds gave, which is written only where there are any."""

    fresh: FreshEvidence | None = None

    @model_serializer(mode="wrap")
    def _only_where_there_are(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        fresh = content.pop("fresh")
        return content if fresh is None else content | {"fresh": fresh}


class BaselineEvidence(_WithFresh):
    """The best of one baseline's trials: the method at its defaults over the same learning-rate range."""

    val_top1: float
    """In percent, at the last epoch."""
    recipe: dict[str, Scalar]
    """The searched part of its recipe."""
    trials: int
    """Trials that reached the full budget."""


class Evidence(_WithFresh):
    """Where the tuned config comes from, and how far to trust it.

    `val_top1` was used to choose among the trials, so it is optimistic; it comes from one seed. `fresh`, where the sweep had
    finalists, is what the config then gave on other seeds, and what it was chosen by among the finalists.
    """

    val_top1: float
    """In percent, on the validation split, at the last epoch of the full budget."""
    trial: int
    """The number of the winning trial."""
    trials: dict[str, int]
    """How many trials were completed, pruned and failed."""
    baselines: dict[str, BaselineEvidence]
    seeds: list[int]
    sweep: str
    sweep_id: str
    digest: str
    """Of the sweep's whole config."""
    space_digest: str
    """Of the searched space."""
    teacher: dict[str, Any]
    """The teacher's key (content hash) and validation top-1 in percent."""
    versions: dict[str, str]
    git_commit: str | None = None


class TunedConfig(_Part):
    """What a sweep found: the loss and the recipe that won, complete, with the evidence."""

    schema_version: Literal[1] = 1
    method: Method
    loss: dict[str, Scalar]
    """Every parameter of the loss, the weights absolute: `tune_topkd.loss.build_loss(method, loss)` is the loss."""
    recipe: RecipeConfig
    data: DataConfig
    teacher: ModelConfig | None
    student: StudentConfig
    evidence: Evidence = Field(repr=False)


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
    recipe = config.recipe.model_dump() | recipe_part(params)
    return TunedConfig(
        method=config.method,
        loss=dict(loss_defaults) | config.loss | loss_part(params),
        recipe=RecipeConfig.model_validate(recipe),
        data=config.data.model_copy(update={"root": None}),  # a place on this machine
        teacher=config.teacher.model if config.teacher else None,
        student=config.student,
        evidence=_evidence(config, state, winner),
    )


def load_tuned_config(path: Path | str) -> TunedConfig:
    """Read a tuned config, from YAML or JSON; needs no more than the base install.

    Raises:
        ConfigError: the file is missing, is of another schema version, or a key or value breaks a rule.
    """
    raw = read_yaml(path)
    version = raw.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:  # alone: what else such a file says may be right
        rule = f"is not the schema version that this tune_topkd reads: known: {SCHEMA_VERSION}"
        raise ConfigError(str(path), [Problem(key="schema_version", rule=rule, value=version, has_value=True)])
    return validated(TunedConfig, raw, str(path))


def _evidence(config: SweepConfig, state: SweepState, winner: Winner) -> Evidence:
    header = state.header
    counts = state.counts()
    fresh = {f.record.key: f for f in finalists(state)} if winner.finalist is not None else {}
    baselines: dict[str, BaselineEvidence] = {}
    for method in config.baselines.methods if config.baselines else []:
        ranked = state.ranked(method)
        if ranked and ranked[0].value is not None:
            baselines[method] = BaselineEvidence(
                val_top1=ranked[0].value,
                recipe=recipe_part(ranked[0].params),
                trials=len(ranked),
                fresh=FreshEvidence.of(fresh.get(ranked[0].key)),
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
        fresh=FreshEvidence.of(winner.finalist),
    )
