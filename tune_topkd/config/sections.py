"""The sections of a search-space YAML, and what a single training needs, as pydantic models."""

import re
from collections.abc import Mapping
from typing import Annotated
from typing import Any
from typing import Literal
from typing import Self
from typing import TypeAlias
from typing import TypeVar

from pydantic import AfterValidator
from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import WithJsonSchema
from pydantic import field_validator
from pydantic import model_validator

from tune_topkd.config.choices import ASHA
from tune_topkd.config.choices import Method
from tune_topkd.config.choices import SamplerConfig
from tune_topkd.config.choices import SchedulerConfig
from tune_topkd.config.placement import FILE
from tune_topkd.config.placement import LATER
from tune_topkd.config.placement import PATH
from tune_topkd.config.placement import WHERE

Scalar: TypeAlias = bool | int | float | str
"""A value that a parameter of a loss or a recipe can take."""

INTEGER_PARAMETERS = frozenset({"k", "batch_size"})
"""Parameters whose range is of integers without saying `type: int`; every other range is of floats."""

OBJECTIVE = "val_top1"
"""The metric that a sweep maximises, at the last epoch of the full budget."""

OBJECTIVE_EMA = "val_top1_ema"
"""The same of the moving average of the weights, where `recipe.ema` is set."""

OBJECTIVE_TEST = "test_top1"
"""The metric of a training that is measured on the test set, where the data's selection says so."""

LARGEST_SEED = 2**63 - 1

SWEEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_ListT = TypeVar("_ListT", bound=list[Any])


def _each_once(value: _ListT) -> _ListT:
    if len(set(value)) < len(value):
        raise ValueError("must name each once")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=False,
        use_attribute_docstrings=True,  # the reference and the JSON Schema tell them
    )


class RandAugmentConfig(_Section):
    """RandAugment (Cubuk et al., arXiv 1909.13719): `ops` random operations of strength `magnitude`, of 0 to 30."""

    ops: int = Field(2, ge=1, le=16)
    """How many operations, drawn anew for each view."""
    magnitude: int = Field(9, ge=0, le=30)
    """How strong they are."""


class AugmentConfig(_Section):
    """Random views of a training image, in this order: crop, flip, rotation, RandAugment, erasing."""

    pad: int = Field(0, ge=0, le=64)
    """Zero-pad by so many pixels on all sides and crop back at a random offset."""
    crop_scale: list[float] | None = None
    """Instead: crop a random part of this share of the area, lowest and highest, and resize it to the image's size."""
    flip: bool = False
    """Mirror left to right, one time in two."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Turn by a random angle of at most so many degrees, either way."""
    rand_augment: RandAugmentConfig | None = None
    """RandAugment, with its options; `{}` takes their defaults."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability of erasing a random rectangle (Zhong et al., arXiv 1708.04896) of the normalised image."""
    mixup: float = Field(0.0, ge=0)
    """α of mixup (Zhang et al., arXiv 1710.09412); 0 mixes nothing. The loss is that of both labels, weighed alike."""

    @field_validator("crop_scale")
    @classmethod
    def _shares(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and (len(value) != 2 or not 0 < value[0] <= value[1] <= 1):
            raise ValueError("must be two shares of the area, 0 < lowest <= highest <= 1")
        return value

    @model_validator(mode="after")
    def _one_crop(self) -> Self:
        if self.pad and self.crop_scale is not None:
            raise ValueError("at most one of pad and crop_scale can be given")
        return self


class DataConfig(_Section):
    """A dataset by name and how it is split; the split is stratified and a function of `split_seed`."""

    name: str
    """A dataset of this project, or `package.module:source`, one of the user's."""
    root: Annotated[str | None, PATH] = None
    """Folder the datasets lie in; by default `$TUNE_TOPKD_DATA_DIR`, or `data` in the working directory."""
    download: Annotated[bool, WHERE] = False
    """Fetch what is missing, where torchvision can."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that dataset."""
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the images (of the training part, where there is a test part) that a trial may be chosen by."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share kept back for the final evaluation, where the dataset has no test part of its own."""
    split_seed: int = Field(0, ge=0)
    """Which images the validation split has, and the test split where it is drawn."""
    selection: Literal["validation", "test_at_end", "all_training", "best_test_epoch"] = "validation"
    """What a training is measured on: `validation`, by which trials are chosen. `test_at_end` trains on the images of the
    validation split too, and reads the test part once, after the last epoch; `all_training` does not read it: its
    `val_top1` is of images that it has learnt from. `best_test_epoch` reads it after every epoch and reports the best one,
    as many published rows do; it marks the result. A sweep refuses all three."""
    image_size: int | None = Field(None, ge=1)
    """Side in pixels that images are resized to; by default the dataset's own."""
    mean: list[float] | None = None
    """Mean of the pixels, from 0 to 1, per channel, by which images are normalised; by default the field's constants or the
    training split's own."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """Standard deviation of the pixels, per channel; given together with `mean`."""
    workers: Annotated[int | None, WHERE] = Field(None, ge=0)
    """Processes that decode and augment images one by one; 0 does it in the trial's own. By default as many as the trial
    was given CPUs, if these are two or more and images are decoded."""
    augment: AugmentConfig = AugmentConfig()
    """The random views that a student is trained on."""

    @model_validator(mode="after")
    def _some_left_to_train_on(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction + test_fraction must be below 1, but got {self.val_fraction:g} + {self.test_fraction:g}"
            )
        return self

    @model_validator(mode="after")
    def _both_constants(self) -> Self:
        if (self.mean is None) != (self.std is None) or len(self.mean or []) != len(self.std or []):
            raise ValueError("mean and std must be given together, one number per channel each")
        return self


class ModelConfig(_Section):
    """A network by name; `kwargs` go to its constructor. A bare name may stand for the whole section."""

    name: str
    """A network of this project, `torchvision:NAME`, `timm:NAME`, or `package.module:factory`, a function of the user's."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor, besides the number of classes."""
    image_size: int | None = Field(None, ge=1)
    """Side that images are resized to (bilinear, antialiased) before this network sees them."""
    checkpoint_key: str | None = None
    """Where in its checkpoint the weights lie, such as `state_dict_ema`; needed only where several sets of them fit."""

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        if isinstance(value, ModelConfig) and not isinstance(value, cls):
            return value.model_dump()
        return {"name": value} if isinstance(value, str) else value


class StudentConfig(ModelConfig):
    """The network that learns."""

    checkpoint: Annotated[str | None, FILE] = None
    """Weights to start from, all but those of the head, which starts fresh; relative to the working directory."""
    linear_probe: bool = False
    """Train the head alone: the other weights of `checkpoint`, and its batch norms' statistics, stay as they are."""

    @model_validator(mode="after")
    def _something_to_look_in(self) -> Self:
        if self.checkpoint_key is not None and self.checkpoint is None:
            raise ValueError("checkpoint_key needs a checkpoint")
        return self

    @model_validator(mode="after")
    def _something_to_probe(self) -> Self:
        if self.linear_probe and self.checkpoint is None:
            raise ValueError("linear_probe needs the checkpoint of the network to probe")
        return self


class EmaConfig(_Section):
    """An exponential moving average of the student's weights, which tells good trainings from bad ones earlier."""

    decay_epochs: float = Field(0.4, gt=0)
    """After so many epochs a step counts 1/e of what the newest counts."""


class RecipeConfig(_Section):
    """How a network is trained: an optimiser with a learning-rate schedule by epoch."""

    epochs: int = Field(ge=1)
    """Epochs of a full training."""
    batch_size: int = Field(64, ge=1)
    """Images of a step. The contrastive loss compares those of a batch with one another: see `contrastive_batch`."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = Field(0.05, gt=0)
    """The learning rate that the schedule starts from, after a warm-up."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD; AdamW has its usual betas, 0.9 and 0.999."""
    nesterov: bool = False
    """Nesterov's momentum, of SGD."""
    weight_decay: float = Field(5e-4, ge=0)
    """Decay of all weights with SGD, a loss's own too; AdamW spares vectors, biases, tokens and embeddings of positions."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """How the learning rate falls: times `gamma` at each of the `milestones`, along a cosine to `min_lr`, or not at all."""
    milestones: list[float] = Field(default_factory=lambda: [0.625, 0.75, 0.875])
    """Epochs after which the learning rate is multiplied by `gamma`; below 1 they are shares of `epochs`.
    The default is the field's 150, 180, 210 of 240."""
    gamma: float = Field(0.1, gt=0, le=1)
    """What the learning rate is multiplied by at a milestone."""
    min_lr: float = Field(0.0, ge=0)
    """The learning rate that the cosine ends at."""
    warmup_epochs: int = Field(0, ge=0)
    """Epochs in which the learning rate rises linearly, from `warmup_start` times `lr`: with SGD as a factor of what the
    schedule says, with AdamW to `lr`, and the schedule comes after, its epochs counted from the first."""
    warmup_start: float = Field(0.001, gt=0, le=1)
    """The share of `lr` that a warm-up begins with."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the network's layers, where it is safe (torch's autocast); weights, loss and the teacher's logits
    stay float32."""
    clip_grad: Annotated[float | None, LATER] = Field(None, gt=0)
    """Scale the gradient of all trained weights down to this norm where it is longer."""
    ema: Annotated[EmaConfig | None, LATER] = None
    """Also measure a moving average of the weights, as `val_top1_ema`; the training is the same with it and without."""
    log_grad_norms: Annotated[bool, WHERE] = False
    """Also report the norm of the gradient, as `train_grad_norm`, and that of each term of the loss. It takes a backward
    pass more for each term, and the training is the same with it and without."""
    distill_warmup: int | None = Field(None, ge=0)
    """Epochs in which the weight of all terms but the cross-entropy rises linearly: min(epoch / distill_warmup, 1).
    By default that of the method: for DKD the field's 20 of 240 epochs, as a share of `epochs`; for the others 0."""

    @field_validator("milestones")
    @classmethod
    def _rising(cls, value: list[float]) -> list[float]:
        if any(v <= 0 for v in value) or sorted(value) != value or (value and (value[0] < 1) != (value[-1] < 1)):
            raise ValueError("must rise, be positive, and be all shares below 1 or all epochs")
        return value

    def milestone_epochs(self) -> list[int]:
        """The milestones as whole epochs, none before the end of the first; those that fall together count once each."""
        return [max(1, round(m * self.epochs)) if m < 1 else int(m) for m in self.milestones]

    def distill_share(self, epoch: int, method: str) -> float:
        """What the distillation terms of `method` are multiplied by in an epoch, from 1."""
        warmup = self.distill_warmup
        if warmup is None:
            warmup = round(self.epochs * 20 / 240) if method.removesuffix("+topkd") == "dkd" else 0
        return min(epoch / warmup, 1.0) if warmup else 1.0


class TeacherConfig(_Section):
    """The network that teaches: given as a `checkpoint`, or trained once with cross-entropy by `recipe`."""

    name: str
    """A network of this project, `torchvision:NAME`, `timm:NAME`, or `package.module:factory`, a function of the user's."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor, besides the number of classes."""
    checkpoint: Annotated[str | None, FILE] = None
    """Path of a checkpoint to load; relative paths are relative to the working directory."""
    checkpoint_key: str | None = None
    """Where in the checkpoint the weights lie, such as `state_dict_ema`; needed only where several sets of them fit."""
    recipe: RecipeConfig | None = None
    """How it is trained, once in a runs folder, where there is no checkpoint: the keys of the student's recipe."""
    augment: AugmentConfig | None = None
    """The views that `recipe` trains it on; by default those of the data."""
    seed: int = Field(0, ge=0)
    """Seed of its training by `recipe`."""
    image_size: int | None = Field(None, ge=1)
    """Side that the student's images are resized to before the teacher sees them."""
    bank: bool = True
    """Cache its logits on disk, where there is room, for all trials; `false` runs it on every batch."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.checkpoint is None) == (self.recipe is None):
            raise ValueError("exactly one of checkpoint and recipe must be given")
        if self.checkpoint_key is not None and self.checkpoint is None:
            raise ValueError("checkpoint_key needs a checkpoint")
        return self

    @property
    def model(self) -> ModelConfig:
        """The network without the file that its weights come from."""
        return ModelConfig(
            name=self.name, kwargs=self.kwargs, image_size=self.image_size, checkpoint_key=self.checkpoint_key
        )


class ParameterRange(_Section):
    """The values one parameter may take: `low` to `high`, both included, or a list of `choices`.

    A bound may be the name of another parameter of the space: `high: scale_top`.
    """

    low: float | str | None = None
    """The lowest value, or the name of another parameter of the space."""
    high: float | str | None = None
    """The highest value, which is among those that are drawn, or the name of another parameter."""
    log: bool = False
    """Draw uniformly in the logarithm; both bounds must then be positive."""
    type: Literal["int", "float"] | None = None
    """By default `int` for `k` and `batch_size`, and `float` for all others."""
    choices: list[Scalar] | None = None
    """The values themselves, instead of a range."""

    @field_validator("choices")
    @classmethod
    def _distinct(cls, value: list[Scalar] | None) -> list[Scalar] | None:
        if value is not None and (not value or len(set(value)) < len(value)):  # 1, 1.0 and true are the same to Optuna
            raise ValueError("choices must be at least one value, each once")
        return value

    @model_validator(mode="before")
    @classmethod
    def _bare_list(cls, value: Any) -> Any:
        if isinstance(value, bool | int | float | str) or value is None:
            raise ValueError(
                "must be {low: …, high: …} or a list of choices; a fixed value belongs under loss or recipe"
            )
        return {"choices": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.type:
                raise ValueError("choices cannot be combined with low, high, log or type")
            return self
        if self.low is None or self.high is None:
            raise ValueError("both low and high must be given (inclusive), or a list of choices")
        bounds = [b for b in (self.low, self.high) if not isinstance(b, str)]
        if self.log and any(b <= 0 for b in bounds):
            raise ValueError(f"log: true needs bounds above 0, but got {min(bounds):g}")
        if len(bounds) == 2 and bounds[0] > bounds[1]:
            raise ValueError(f"low <= high must hold, but got low = {bounds[0]:g}, high = {bounds[1]:g}")
        return self

    def bound_names(self) -> list[str]:
        """The parameters this range's bounds name."""
        return [b for b in (self.low, self.high) if isinstance(b, str)]


class RelativeConfig(_Section):
    """Loss weights that are drawn freely and then scaled to a fixed `sum`, so that only their ratios are searched.

    Under SGD the sum of the weights multiplies the step size: without this a search over weights is partly a search
    over the learning rate.
    """

    sum: float = Field(3.0, gt=0)
    """What the weights add up to in each trial."""
    of: Annotated[list[str], AfterValidator(_each_once)] = Field(min_length=2)
    """The names of the weights, each searched by the space."""
    units: Annotated[Literal["effect"] | None, LATER] = None
    """`effect` draws what a term does to the student, in that of the term at its defaults and weight 1: the weight times
    1 + alpha + beta for `tdl_weight`, over the temperature for `contrastive_weight`. By default the weights are drawn."""


EFFECTS: Mapping[str, Mapping[str, float]] = {
    "tdl_weight": {"alpha": 1.0, "beta": 1.0},
    "contrastive_weight": {"temperature": 0.1},
}
"""The parameters of TopKD that a term's gradient grows or shrinks with, besides its weight, and their defaults.

That of the decoupled loss grows with 1 + α + β, the sum of its groups' weights; that of the contrastive loss with 1 / τ.
"""


def weight_of_effect(name: str, values: Mapping[str, Scalar]) -> float:
    """The weight that gives a term the effect that it has at its defaults and weight 1; 1 for terms not in `EFFECTS`.

    Args:
        name: of the weight.
        values: of the loss's parameters; one that is left out has its default.
    """
    defaults = EFFECTS.get(name, {})
    given = {other: float(values.get(other, default)) for other, default in defaults.items()}
    if name == "tdl_weight":
        return (1.0 + defaults["alpha"] + defaults["beta"]) / (1.0 + given["alpha"] + given["beta"])
    return given["temperature"] / defaults["temperature"] if name == "contrastive_weight" else 1.0


class AshaConfig(_Section):
    """Asynchronous successive halving (Li et al., arXiv 1810.05934) on the epoch.

    Rungs are at `grace_epochs` × `reduction_factor`^i; at each the best 1 / `reduction_factor` go on.
    """

    grace_epochs: int = Field(3, ge=1)
    """Epochs that every trial may train: the first rung."""
    reduction_factor: int = Field(3, ge=2)
    """One trial in so many goes on at a rung; the next rung is so many times as far."""

    def rungs(self, epochs: int) -> list[int]:
        """The epochs of the rungs of trials with so many; the last epoch is none."""
        found, rung = [], self.grace_epochs
        while rung < epochs:
            found.append(rung)
            rung *= self.reduction_factor
        return found


DEFAULTS = "defaults"
"""The baseline that is the search's own method, untuned."""


BASELINE_SPACES: Mapping[str, tuple[Mapping[str, tuple[float, float, float]], RelativeConfig | None]] = {
    "kd": (
        {"temperature": (1.0, 4.0, 16.0), "ce_weight": (0.05, 0.1, 1.0), "kd_weight": (0.5, 0.9, 1.0)},
        RelativeConfig(sum=1.0, of=["ce_weight", "kd_weight"]),
    ),
    "dkd": ({"temperature": (1.0, 4.0, 8.0), "alpha": (0.25, 1.0, 4.0), "beta": (0.5, 8.0, 16.0)}, None),
    "lskd": (
        {"temperature": (1.0, 2.0, 8.0), "ce_weight": (0.02, 0.1, 2.0), "kd_weight": (4.0, 9.0, 9.0)},
        RelativeConfig(sum=9.1, of=["ce_weight", "kd_weight"]),
    ),
}
"""What a baseline that is tuned alike is searched for over, logarithmically: by parameter the lowest value, the default and
the highest value; and the weights of which only the ratio is searched, which then have the sum of their defaults."""


class BaselinesConfig(_Section):
    """What the tuned student is compared with: each method at its defaults, with the recipe's part of the space.

    Each method gets `trials` runs over the same learning-rate range that the search has, all to the full budget.
    """

    methods: Annotated[list[Literal["ce", "kd", "dkd", "lskd", "defaults"]], AfterValidator(_each_once)] = [
        "ce",
        "kd",
        "defaults",
    ]
    """`defaults` is the method that is tuned, with what `loss` fixes and its defaults for the rest."""
    trials: int = Field(6, ge=1)
    """How many runs each method has."""
    match: Annotated[bool | None, LATER] = None
    """Tune KD, DKD and logit-standardised KD as the search tunes its method: over their own parameters and the recipe's
    part of the space, with the same sampler, and with as many full trainings as the search trains epochs."""

    def is_tuned_alike(self, method: str) -> bool:
        """Whether a baseline is searched for over more than the recipe."""
        return bool(self.match) and method in BASELINE_SPACES


AUTO = "auto"
"""In place of a trial's share of a machine: measure how much is best."""


_SOME_CPUS = WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": AUTO}]})
_SOME_GPUS = WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"const": AUTO}]})


def _cpus(value: float | str) -> float | str:
    if isinstance(value, str) and value != AUTO:
        raise ValueError("must be a number or auto")
    if not isinstance(value, str) and value <= 0:
        raise ValueError("must be greater than 0")
    return value


def _gpus(value: float | str) -> float | str:
    if isinstance(value, str):
        return _cpus(value)
    if value < 0:
        raise ValueError("must be greater than or equal to 0")
    if value > 1 and value != int(value):
        raise ValueError("must be a fraction up to 1, a whole number, or auto")
    return value


class FinalistsConfig(_Section):
    """The end of a sweep: its best trials, and the best of each baseline, are trained again on fresh seeds.

    The answer is then the one with the best mean over these, not the luckiest of one seed; so is what stands for a baseline.
    """

    count: int = Field(3, ge=1)
    """How many of the search's trials are trained again."""
    seeds: int = Field(2, ge=2)
    """How often each is trained again, on the seeds that follow the sweep's own."""
    baselines: int = Field(1, ge=1)
    """How many of each baseline's trials are trained again, if it has so many. As many as of the search is the fairest."""


class PlateauConfig(_Section):
    """When a search has found what it will find: its newest trials have brought less than the noise.

    A bare number may stand for the whole section.
    """

    points: float = Field(gt=0)
    """Percentage points of top-1: the search ends if its newest trials raised the best by less. What cannot be told from
    noise is a good value, such as the standard deviation of a config over seeds."""
    newest: int = Field(20, ge=2)
    """How many trials are the newest."""

    @model_validator(mode="before")
    @classmethod
    def _bare_number(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"points": float(value)} if is_number else value


class SweepSettings(_Section):
    """How the search is run."""

    trials: int = Field(32, ge=1)
    """Trials of the search, stopped ones too; baselines and finalists come on top."""
    seed: int = Field(0, ge=0, lt=LARGEST_SEED + 1)
    """Seed of the proposals, and of every training of the search."""
    sampler: SamplerConfig = SamplerConfig(name="tpe")
    """What proposes the trials, by name, with its options beside it."""
    scheduler: SchedulerConfig = SchedulerConfig(name=ASHA)
    """What stops trials early, by name, with its options beside it."""
    asha: AshaConfig | None = AshaConfig()
    """Rungs of the scheduler `asha`; `null` lets every trial run to the end. With another scheduler it is `null`."""
    rung_metric: Literal["val_top1", "val_top1_ema"] | None = None
    """What trials are compared by before their last epoch; by default `val_top1_ema` where `recipe.ema` is set."""
    startup_trials: int | None = Field(None, ge=1)
    """Random proposals before the model of `tpe` or `gp` takes over; the first one of all is the defaults. By default two
    for each axis that is searched, at least 10."""
    points: list[dict[str, Scalar]] | None = None
    """Parameters that are tried after the defaults, before anything is proposed; what a point leaves out is the default.
    Of relative weights only the ratios matter."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at once; by default as many as the cluster has room for."""
    autoscale_to: Annotated[int | None, WHERE] = Field(None, ge=1)
    """Trials at once for which a cluster with an autoscaler is asked to grow; by default a sweep asks for no node beside
    those that there are. On a private Ray it has no effect; `resume --set` may change it."""
    cpus_per_trial: Annotated[float | str, AfterValidator(_cpus), _SOME_CPUS] = 1.0
    """CPUs of a trial; `auto` measures how many trials, on how many CPUs each, train the most together."""
    gpus_per_trial: Annotated[float | str, AfterValidator(_gpus), _SOME_GPUS] = 0.0
    """GPUs of a trial, which may be a fraction: 0.25 lets four trials share a GPU; `auto` measures how many do best. With
    2 or more a trial trains on all of them at once, on one node, each with its part of every batch."""
    max_failures: int = Field(3, ge=0)
    """Times that a trial whose worker died is started again from its last checkpoint; a lost node does not count."""
    trial_timeout: float = Field(3600.0, gt=0)
    """Seconds without a report after which a trial counts as hung and is ended; more than the longest epoch."""
    start_timeout: Annotated[float | None, WHERE] = Field(None, gt=0)
    """Seconds that a node has to start a worker, with all that it imports; by default 120. More where many nodes import
    from one slow disk; `resume --set` may change it."""
    time_budget: float | None = Field(None, gt=0)
    """Seconds after which no trial goes on; the sweep can be resumed."""
    gpu_hours: Annotated[float | None, LATER] = Field(None, gt=0)
    """Hours of training, times each trial's GPUs, after which no trial goes on. They are of the whole sweep, by its ledger,
    whoever has resumed it; a trial on a quarter of a GPU takes a quarter."""
    cpu_hours: Annotated[float | None, LATER] = Field(None, gt=0)
    """Hours of training, times each trial's CPUs, after which no trial goes on; counted as `gpu_hours` are."""
    collapse_epochs: Annotated[int | None, LATER] = Field(None, ge=1)
    """End a trial as failed, `collapsed`, after so many epochs in a row that are no better than chance; those of
    `recipe.warmup_epochs` do not count. By default none is ended for that."""
    plateau: Annotated[PlateauConfig | None, LATER] = None
    """End the search where it brings no more; baselines and finalists follow as after its last trial."""
    finalists: Annotated[FinalistsConfig | None, LATER] = None
    """Train the best trials and the best of each baseline again on fresh seeds, when the search is over; `null` leaves the
    answer to the search's own values, of one seed."""

    @model_validator(mode="before")
    @classmethod
    def _no_asha_by_default_with_another_scheduler(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "asha" in value or "scheduler" not in value:
            return value
        chosen = value["scheduler"]
        name = chosen.get("name") if isinstance(chosen, dict) else getattr(chosen, "name", chosen)
        return value if name == ASHA else value | {"asha": None}


class PairConfig(_Section):
    """One (dataset, teacher, student) and how the one learns from the other."""

    description: str = ""
    """A line for people: what is distilled into what."""
    data: DataConfig
    """The dataset and how it is split."""
    teacher: TeacherConfig | None = None
    """Needed by every method but `ce`, and by the baseline `kd`."""
    student: StudentConfig
    """The network that is trained in every trial."""
    method: Method = "topkd"
    """The loss: one of this project, or `package.module:loss`; `+topkd` puts TopKD on top of it."""
    loss: dict[str, Scalar] = Field(default_factory=dict)
    """Fixed parameters of the loss; what neither this nor the space names has the method's default."""
    recipe: RecipeConfig
    """How the student is trained; a space may search some of it."""


class SweepConfig(PairConfig):
    """A pair and the space to search for it."""

    space: dict[str, ParameterRange] = Field(min_length=1)
    """What is searched, by parameter of the loss or the recipe: a range, or a list of choices."""
    relative: RelativeConfig | None = None
    """Weights of the loss of which only the ratios are searched."""
    sweep: SweepSettings = SweepSettings()
    """How the search is run."""
    baselines: BaselinesConfig | None = BaselinesConfig()
    """What the answer is compared with; `null` compares it with nothing."""

    @property
    def rung_metric(self) -> str:
        """The metric that trials are compared by before their last epoch; at the last one it is `val_top1`."""
        return self.sweep.rung_metric or (OBJECTIVE if self.recipe.ema is None else OBJECTIVE_EMA)


class SharedFiles(_Section):
    """What the trainings of a pair share: absolute paths."""

    teacher_checkpoint: Annotated[str | None, FILE] = None
    """The teacher's weights; needed by every method but `ce`."""
    teacher_bank: Annotated[str | None, WHERE] = None
    """The folder that the bank of the teacher's logits lies in; None asks the teacher for every batch."""
    dataset_file: Annotated[str | None, PATH] = None
    """The dataset as `save_dataset` wrote it, which is mapped into memory instead of read anew."""


NO_FILES = SharedFiles()


class TrialConfig(SharedFiles):
    """All that one training needs: what `train` is called with."""

    data: DataConfig
    student: StudentConfig
    teacher: ModelConfig | None = None
    method: Method = "topkd"
    loss: dict[str, Scalar] = Field(default_factory=dict)
    recipe: RecipeConfig
    seed: int = Field(0, ge=0)
    threads: Annotated[int | None, WHERE] = Field(None, ge=1)
    """Of the CPU; None leaves torch's number. The last bits of a result on the CPU may depend on it."""
    gpu_share: Annotated[float | None, WHERE] = Field(None, ge=0, le=1)
    """Of the GPU's memory: wait until this fraction is free, then cap allocations at it. 0 trains on the CPU; None takes of
    the GPU, if there is one, what it needs."""
    ranks: Annotated[int, WHERE] = Field(1, ge=1)
    """Processes that train together, each on a GPU of its own and on its part of every batch. The last bits of a result
    depend on it."""


RECIPE_PARAMETERS = ("lr", "momentum", "weight_decay", "batch_size", "gamma", "clip_grad")
"""The fields of a recipe that a space may search."""


def recipe_part(params: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Of a trial's parameters those of the recipe."""
    return {name: value for name, value in params.items() if name in RECIPE_PARAMETERS}


def loss_part(params: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Of a trial's parameters those of the loss."""
    return {name: value for name, value in params.items() if name not in RECIPE_PARAMETERS}
