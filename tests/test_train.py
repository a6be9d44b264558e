import importlib
import json
import math
import os
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional

import tune_topkd.data.datasets as datasets
import tune_topkd.loss
import tune_topkd.models as models
from tune_topkd.config import AugmentConfig
from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.config import RecipeConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import load_config
from tune_topkd.data import DatasetInfo
from tune_topkd.data import Split
from tune_topkd.data import dataset_info
from tune_topkd.data import load_dataset
from tune_topkd.data import train_batches
from tune_topkd.data.sources import Generated
from tune_topkd.evaluate import evaluate
from tune_topkd.loss import build_loss
from tune_topkd.loss import loss_parameters
from tune_topkd.models import build_configured
from tune_topkd.models import build_model
from tune_topkd.models import count_parameters
from tune_topkd.models import save_weights
from tune_topkd.teacher import load_teacher
from tune_topkd.train import CHECKPOINT_NAME
from tune_topkd.train import CheckpointError
from tune_topkd.train import checkpoint_metrics
from tune_topkd.train import train
from tune_topkd.train.loop import draw_mixup
from tune_topkd.train.optim import build_optimizer
from tune_topkd.train.optim import build_scheduler
from tune_topkd.train.optim import lr_factor

DIGITS = DataConfig.model_validate(
    {"name": "digits", "val_fraction": 0.4, "test_fraction": 0.4, "augment": {"pad": 1, "flip": True}}
)
SMALL_GLYPHS = DataConfig(name="glyphs", kwargs={"train_images": 600, "test_images": 100})
TINY = ModelConfig(name="digits_cnn_tiny", kwargs={"widths": [3, 4]})
TIMES = {"epoch_seconds", "images_per_second", "cpu_percent", "memory_mb"}


def trial(method: str = "ce", **changes) -> TrialConfig:
    recipe = {"epochs": 4, "batch_size": 64, "lr": 0.05, "schedule": "constant", **changes.pop("recipe", {})}
    return TrialConfig(
        **{"data": DIGITS, "student": TINY, "method": method, "recipe": RecipeConfig(**recipe), **changes}
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> dict:
    """What a config of a method that needs a teacher has more: one of another architecture, not trained."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    config = ModelConfig(name="digits_cnn", kwargs={"widths": [6]})
    torch.manual_seed(0)
    model = build_configured(config, num_classes=10)
    model(torch.rand(9, 1, 8, 8))  # running statistics that differ from a batch's
    save_weights(model, path)
    return {"teacher": config, "teacher_checkpoint": str(path)}


@pytest.fixture
def dropout(monkeypatch) -> ModelConfig:
    def factory(*, num_classes):
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, num_classes))

    monkeypatch.setitem(models._REGISTRY, "dropout", factory)
    return ModelConfig(name="dropout")


class Recorder:
    """Keeps all reports; saves after the epochs in `save_at`, each into its folder under `root`; draws at random."""

    def __init__(self, root: Path | None = None, save_at=()):
        self.root, self.save_at = root, save_at
        self.epochs: list[int] = []
        self.metrics: list[dict[str, float]] = []

    def __call__(self, epoch, metrics, save):
        self.epochs.append(epoch)
        self.metrics.append(dict(metrics))
        torch.rand(3)
        if epoch in self.save_at:
            save(self.root / str(epoch))


def without_times(metrics) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key not in TIMES}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- what is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ce", "kd"])
def test_training_is_that_of_a_plain_loop(method, teacher):
    config = trial(
        method,
        **(teacher if method == "kd" else {}),
        recipe={"nesterov": True, "weight_decay": 0.01, "schedule": "step", "milestones": [1, 2], "gamma": 0.5},
        seed=3,
    )
    result = train(config)

    dataset = load_dataset(DIGITS)
    torch.manual_seed(3)
    model = build_configured(TINY, num_classes=10)
    taught_by = load_teacher(teacher["teacher"], Path(teacher["teacher_checkpoint"]), num_classes=10)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for epoch, lr in enumerate([0.05, 0.025, 0.0125, 0.0125], 1):
        for batch in train_batches(
            dataset.train,
            batch_size=64,
            seed=3,
            epoch=epoch,
            augment=DIGITS.augment,
            mean=dataset.mean,
            std=dataset.std,
        ):
            logits = model(batch.images)
            loss = functional.cross_entropy(logits, batch.labels)
            if method == "kd":
                soft = functional.softmax(taught_by(batch.images) / 4, dim=1)
                log_student = functional.log_softmax(logits / 4, dim=1)
                loss = 0.1 * loss + 0.9 * 16 * functional.kl_div(log_student, soft, reduction="batchmean")
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter, speed in zip(model.parameters(), velocity, strict=True):
                    step = parameter.grad + 0.01 * parameter
                    speed.mul_(0.9).add_(step)
                    parameter -= lr * (step + 0.9 * speed)
    for ours, plain in zip(result.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, plain, atol=1e-4)


def test_training_learns():
    recorder = Recorder()
    train(trial(student=ModelConfig(name="digits_linear"), recipe={"epochs": 8}), recorder)
    assert recorder.metrics[-1]["val_top1"] > 60
    assert recorder.metrics[-1]["train_loss"] < 0.7 * recorder.metrics[0]["train_loss"]


def test_same_config_gives_the_same_bits_whatever_the_global_generator(dropout):
    config = trial(student=dropout, seed=5)
    torch.manual_seed(1)
    first = train(config)
    torch.manual_seed(2)
    torch.rand(7)
    second = train(config, Recorder())
    assert same_weights(first.model, second.model)
    assert without_times(first.metrics) == without_times(second.metrics)


def test_training_leaves_the_global_generator_alone():
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    train(trial(recipe={"epochs": 1}), Recorder())
    assert torch.equal(torch.rand(2), expected)


def test_another_seed_gives_other_weights_and_an_enormous_one_works():
    first, second = (train(trial(seed=seed, recipe={"epochs": 1})).model for seed in (0, 2**70 + 1))
    assert not same_weights(first, second)


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        ({"schedule": "constant"}, [0.4] * 4),
        ({"schedule": "step", "milestones": [1, 3], "gamma": 0.5}, [0.4, 0.2, 0.2, 0.1]),
        ({"schedule": "step", "milestones": [0.5, 0.55]}, [0.4, 0.4, 0.004, 0.004]),
        ({"schedule": "cosine"}, [0.2 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]),
    ],
)
def test_schedules_by_epoch(recipe, rates):
    recorder = Recorder()
    train(trial(student=ModelConfig(name="digits_linear"), recipe={"lr": 0.4, **recipe}), recorder)
    assert [metrics["lr"] for metrics in recorder.metrics] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("epochs", "rates"),
    [(1, [0.2]), (2, [0.2, 0.002]), (3, [0.2, 0.02, 0.002]), (4, [0.2, 0.02, 0.002, 0.002])],
)
def test_the_first_epoch_has_the_whole_learning_rate_however_short_a_training_is(epochs, rates):
    recipe = RecipeConfig(epochs=epochs, lr=0.2, milestones=[0.3, 0.6, 0.9])  # ImageNet's
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler = build_scheduler(optimizer, recipe)
    found = []
    for _ in range(epochs):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(rates)


# --- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("ce", {"ce"}),
        ("kd", {"ce", "kd"}),
        ("topkd", {"ce", "tdl", "contrastive"}),
    ],
)
def test_metrics_have_the_agreed_names_and_are_floats(method, terms, teacher):
    recorder = Recorder()
    train(trial(method, **(teacher if method != "ce" else {}), recipe={"epochs": 1}), recorder)
    (metrics,) = recorder.metrics
    expected = {"train_loss", "val_top1", "val_top5", "lr", *TIMES} | {f"train_{term}" for term in terms}
    assert metrics.keys() == expected
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert metrics["epoch_seconds"] > 0
    assert 0 < metrics["cpu_percent"] < 100 * (os.cpu_count() or 1) + 50
    assert 50 < metrics["memory_mb"] < psutil.virtual_memory().total / 1e6


def test_the_terms_are_unweighted_and_make_up_the_loss(teacher):
    loss = {"ce_weight": 0.5, "tdl_weight": 2.0, "contrastive_weight": 0.25}
    metrics = train(trial("topkd", **teacher, loss=loss, recipe={"epochs": 1})).metrics
    total = 0.5 * metrics["train_ce"] + 2 * metrics["train_tdl"] + 0.25 * metrics["train_contrastive"]
    assert metrics["train_loss"] == pytest.approx(total, rel=1e-5)


def test_validation_is_in_percent_of_the_validation_images():
    result = train(trial(student=ModelConfig(name="digits_linear"), recipe={"epochs": 2}))
    dataset = load_dataset(DIGITS)
    images = (dataset.val.images.float() / 255 - dataset.mean[0]) / dataset.std[0]
    ranked = result.model(images).argsort(1, descending=True)
    hits = (ranked == dataset.val.labels[:, None]).double()
    assert result.metrics["val_top1"] == pytest.approx(100 * hits[:, 0].mean().item())
    assert result.metrics["val_top5"] == pytest.approx(100 * hits[:, :5].sum(1).mean().item())


def test_loss_is_the_mean_over_the_batches():
    """With the linear student at a vanishing learning rate every batch sees the same weights."""
    config = trial(student=ModelConfig(name="digits_linear"), recipe={"epochs": 1, "lr": 1e-30, "weight_decay": 0.0})
    result = train(config)
    dataset = load_dataset(DIGITS)
    losses = [
        functional.cross_entropy(result.model(batch.images), batch.labels).item()
        for batch in train_batches(
            dataset.train, batch_size=64, seed=0, epoch=1, augment=DIGITS.augment, mean=dataset.mean, std=dataset.std
        )
    ]
    assert result.metrics["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.fixture
def three_classes(monkeypatch):
    labels = torch.arange(30) % 3
    images = (labels * 80).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
    images[:, 0, 0, 0] = torch.arange(30)
    source = Generated(DatasetInfo(3, (1, 8, 8)), lambda: Split(images, labels))
    monkeypatch.setitem(datasets.SOURCES, "three", source)
    yield DataConfig(name="three", val_fraction=0.3, test_fraction=0.3)
    datasets._loaded.cache_clear()


def test_few_classes_have_no_top5_and_fewer_images_than_a_batch_will_do(three_classes, teacher):
    metrics = train(trial(data=three_classes)).metrics
    assert "val_top5" not in metrics
    assert metrics["val_top1"] > 0


# --- reports and checkpoints ----------------------------------------------------------------------------------------


def test_every_epoch_is_reported_once_counted_from_one(tmp_path: Path):
    recorder = Recorder()
    result = train(trial(), recorder)
    assert recorder.epochs == [1, 2, 3, 4]
    assert (result.epoch, result.diverged) == (4, False)
    assert result.metrics == recorder.metrics[-1]
    assert not result.model.training


def test_a_checkpoint_is_written_only_where_the_caller_asks(tmp_path: Path):
    recorder = Recorder(tmp_path, save_at=[2])
    train(trial(), recorder)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "2",
        f"2/{CHECKPOINT_NAME}",
    ]
    assert checkpoint_metrics(tmp_path / "2") == (2, recorder.metrics[1])


@pytest.mark.parametrize("schedule", ["step", "cosine"])
@pytest.mark.parametrize("method", ["ce", "topkd"])
def test_two_epochs_and_two_more_equal_four(tmp_path: Path, method, schedule, teacher, dropout):
    needs = teacher if method == "topkd" else {}
    recipe = {"schedule": schedule, "milestones": [1, 3], "nesterov": True}
    for student in (TINY, dropout):
        config = trial(method, **needs, student=student, recipe=recipe, seed=2)
        whole, rest = Recorder(tmp_path / student.name, save_at=[2]), Recorder()
        at_once = train(config, whole)
        resumed = train(config, rest, resume_from=tmp_path / student.name / "2")
        assert same_weights(resumed.model, at_once.model)
        assert rest.epochs == [3, 4]
        assert list(map(without_times, rest.metrics)) == list(map(without_times, whole.metrics[2:]))


def test_checkpoints_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Path):
    config = trial(recipe={"schedule": "cosine"})
    train(config, Recorder(tmp_path / "whole", save_at=[2, 4]))
    train(config, Recorder(tmp_path / "resumed", save_at=[4]), resume_from=tmp_path / "whole" / "2")
    a, b = (torch.load(tmp_path / run / "4" / CHECKPOINT_NAME, weights_only=True) for run in ("whole", "resumed"))
    assert a.keys() == b.keys() >= {"model", "optimizer", "scheduler", "rng", "epoch", "metrics"}
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    momentum = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*momentum, strict=True))
    assert a["scheduler"] == b["scheduler"]
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


def test_resuming_after_the_last_epoch_trains_and_reports_nothing(tmp_path: Path):
    first = train(trial(), Recorder(tmp_path, save_at=[4]))
    recorder = Recorder()
    second = train(trial(), recorder, resume_from=tmp_path / "4")
    assert recorder.epochs == []
    assert (second.epoch, second.metrics) == (4, first.metrics)
    assert same_weights(first.model, second.model)


def test_resuming_with_another_config_is_refused_and_says_what_differs(tmp_path: Path):
    train(trial(), Recorder(tmp_path, save_at=[1]))
    other = trial(recipe={"lr": 0.06, "epochs": 5})
    with pytest.raises(
        ValueError, match=r"another config: recipe\.epochs was 4 and is now 5; recipe\.lr was 0\.05 and"
    ):
        train(other, resume_from=tmp_path / "1")


def test_the_teacher_may_move_but_not_change(tmp_path: Path, teacher):
    train(trial("kd", **teacher), Recorder(tmp_path, save_at=[3]))
    moved = tmp_path / "moved.pt"
    moved.write_bytes(Path(teacher["teacher_checkpoint"]).read_bytes())
    config = trial("kd", teacher=teacher["teacher"], teacher_checkpoint=str(moved))
    assert train(config, resume_from=tmp_path / "3").epoch == 4
    save_weights(build_configured(teacher["teacher"], num_classes=10), moved)
    with pytest.raises(ValueError, match="another config: teacher_checkpoint was"):
        train(config, resume_from=tmp_path / "3")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (cut, "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (
            lambda path: save_weights(build_model("digits_linear", num_classes=2), path),
            "is no checkpoint of a training",
        ),
    ],
)
def test_a_bad_checkpoint_is_an_error_that_names_it(tmp_path: Path, damage, said):
    train(trial(recipe={"epochs": 1}), Recorder(tmp_path, save_at=[1]))
    damage(tmp_path / "1" / CHECKPOINT_NAME)
    with pytest.raises(CheckpointError, match=rf"1/checkpoint\.pt: {said}"):
        checkpoint_metrics(tmp_path / "1")
    with pytest.raises(CheckpointError, match=said):
        train(trial(recipe={"epochs": 1}), resume_from=tmp_path / "1")


# --- ends -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_training_after_its_epoch_is_reported(tmp_path: Path):
    config = trial(student=ModelConfig(name="digits_linear"), recipe={"lr": 1e30})
    recorder = Recorder(tmp_path, save_at=[1])
    result = train(config, recorder)
    assert recorder.epochs == [1]
    assert not math.isfinite(recorder.metrics[0]["train_loss"])
    assert math.isfinite(recorder.metrics[0]["val_top1"])
    assert (result.epoch, result.diverged) == (1, True)
    again = train(config, resume_from=tmp_path / "1")
    assert (again.epoch, again.diverged) == (1, True)


def test_what_a_reporter_raises_ends_training():
    def stop(epoch, metrics, save):
        raise StopIteration(epoch)

    with pytest.raises(StopIteration, match="1"):
        train(trial(), stop)


@pytest.mark.parametrize("leave_out", ["teacher", "teacher_checkpoint"])
def test_only_cross_entropy_can_do_without_a_teacher(leave_out, teacher):
    with pytest.raises(ValueError, match="method 'kd' needs both teacher and teacher_checkpoint"):
        train(trial("kd", **{**teacher, leave_out: None}))


# --- recipes --------------------------------------------------------------------------------------------------------


def rates(**recipe) -> list[float]:
    seen = Recorder()
    train(trial(recipe={"epochs": 6, "batch_size": 512, "lr": 0.08, **recipe}), seen)
    return [metrics["lr"] for metrics in seen.metrics]


def test_warm_up_is_a_ramp_times_the_schedule():
    ramp = [0.1, 0.1 + 0.9 / 3, 0.1 + 1.8 / 3, 1, 1, 1]
    cosine = [0.02 + 0.06 * (1 + math.cos(math.pi * e / 6)) / 2 for e in range(6)]
    warm = {"warmup_epochs": 3, "warmup_start": 0.1}
    assert rates(schedule="cosine", min_lr=0.02, **warm) == pytest.approx(
        [r * c for r, c in zip(ramp, cosine, strict=True)]
    )
    steps = [0.08, 0.08, 0.08, 0.08, 0.04, 0.04]
    assert rates(schedule="step", milestones=[4], gamma=0.5, **warm) == pytest.approx(
        [r * s for r, s in zip(ramp, steps, strict=True)]
    )
    assert rates(schedule="constant", **warm) == pytest.approx([0.08 * r for r in ramp])


def test_adamw_warms_up_to_its_rate_before_the_schedule():
    """As timm's CosineLRScheduler with `warmup_t=3`, `t_initial=6`."""
    ramp = [0.08 * (0.1 + 0.9 * e / 3) for e in range(3)]
    cosine = [0.02 + 0.06 * (1 + math.cos(math.pi * e / 6)) / 2 for e in range(3, 6)]
    warm = {"optimizer": "adamw", "warmup_epochs": 3, "warmup_start": 0.1}
    assert rates(schedule="cosine", min_lr=0.02, **warm) == pytest.approx(ramp + cosine)


def test_the_rates_of_the_vision_transformers_are_those_of_their_public_code():
    timm = pytest.importorskip("timm.scheduler.cosine_lr")
    recipe = load_config("search_spaces/cifar100-resnet56-deit_tiny.yaml").recipe
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=5e-4)
    published = timm.CosineLRScheduler(optimizer, t_initial=300, lr_min=5e-6, warmup_t=20, warmup_lr_init=1e-3 * 5e-4)
    for epoch in range(300):
        assert recipe.lr * lr_factor(epoch, recipe) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        published.step(epoch + 1)


class Embedded(nn.Module):
    """Says itself what does not decay."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.ones(2, 3))

    def no_weight_decay(self):
        return {"places"}


def test_adamw_spares_tokens_and_positions():
    network = nn.Module()
    network.encoder = nn.Linear(3, 3)
    network.encoder.pos_embedding = nn.Parameter(torch.ones(1, 2, 3))
    network.class_token = nn.Parameter(torch.ones(1, 1, 3))
    network.table = nn.Module()
    network.table.relative_position_bias_table = nn.Parameter(torch.ones(4, 2))
    network.embedded = Embedded()
    network.norm = nn.LayerNorm(3)
    recipe = RecipeConfig(epochs=1, optimizer="adamw", weight_decay=0.3)
    decaying, spared = build_optimizer([network], recipe, torch.device("cpu")).param_groups
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert [w is network.encoder.weight for w in decaying["params"]] == [True]
    assert len(spared["params"]) == 7


@pytest.mark.parametrize("name", ["deit_tiny", "torchvision:swin_t", "timm:pit_ti_224", "timm:pvt_v2_b0"])
def test_only_matrices_of_a_vision_transformer_decay(name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    network = build_model(name, num_classes=3)
    recipe = RecipeConfig(epochs=1, optimizer="adamw")
    decaying = set(map(id, build_optimizer([network], recipe, torch.device("cpu")).param_groups[0]["params"]))
    assert {n.rpartition(".")[2] for n, w in network.named_parameters() if id(w) in decaying} <= {
        "weight",
        "in_proj_weight",
    }
    assert all(id(m.weight) in decaying for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def test_an_adamw_checkpoint_of_other_rules_is_refused(tmp_path):
    config = trial(recipe={"optimizer": "adamw", "epochs": 1}, threads=1)
    train(config, Recorder(tmp_path, save_at=[1]))
    path = tmp_path / "1" / CHECKPOINT_NAME
    content = torch.load(path, weights_only=True)
    identity = json.loads(content["config"])
    del identity["adamw"]
    torch.save(content | {"config": json.dumps(identity)}, path)
    with pytest.raises(
        ValueError, match="of another config: adamw was None and is now 'tokens and positions do not decay"
    ):
        train(config, resume_from=tmp_path / "1")


def test_a_cosine_ends_at_its_floor():
    assert rates(schedule="cosine", min_lr=0.02) == pytest.approx(
        [0.02 + 0.06 * (1 + math.cos(math.pi * e / 6)) / 2 for e in range(6)]
    )


def test_adamw_lets_matrices_decay_and_vectors_not(teacher):
    def weights(weight_decay):
        recipe = {"optimizer": "adamw", "lr": 1e-9, "weight_decay": weight_decay, "epochs": 1}
        return train(trial("kd", **teacher, recipe=recipe)).model.state_dict()

    still, decayed = weights(0.0), weights(1e8)  # each of the 5 steps takes a tenth
    for name, value in still.items():
        if "weight" in name and value.ndim > 1:
            torch.testing.assert_close(decayed[name], value * 0.9**5, rtol=1e-3, atol=1e-6)
        elif "running" not in name:
            torch.testing.assert_close(decayed[name], value)


def test_dkd_warms_up_as_the_field_does_and_the_recipe_can_say_otherwise():
    recipe = RecipeConfig(epochs=240)
    assert [recipe.distill_share(e, "dkd") for e in (1, 10, 20, 240)] == [0.05, 0.5, 1.0, 1.0]
    assert recipe.distill_share(5, "dkd+topkd") == 0.25
    assert {recipe.distill_share(1, m) for m in ("kd", "topkd", "lskd+topkd", "ce")} == {1.0}
    assert RecipeConfig(epochs=240, distill_warmup=4).distill_share(1, "kd") == 0.25
    assert RecipeConfig(epochs=240, distill_warmup=0).distill_share(1, "dkd") == 1.0


def test_the_warm_up_weighs_the_distillation_terms_and_not_the_cross_entropy(teacher):
    def first_epoch(**recipe):
        seen = Recorder()
        recipe = {"epochs": 4, "lr": 1e-9, "batch_size": 512} | recipe
        train(trial("dkd", **teacher, recipe=recipe, loss={"alpha": 2.0, "beta": 3.0}), seen)
        return seen.metrics

    for metrics, share in zip(first_epoch(distill_warmup=2), (0.5, 1.0, 1.0, 1.0), strict=True):
        distilled = 2 * metrics["train_tckd"] + 3 * metrics["train_nckd"]
        assert metrics["train_loss"] == pytest.approx(metrics["train_ce"] + share * distilled, rel=1e-5)


def test_mixup_mixes_images_and_the_loss_of_both_labels(teacher):
    """With a learning rate of nothing the loss of a mixed batch can be counted again from what was mixed."""
    data = DIGITS.model_copy(update={"augment": DIGITS.augment.model_copy(update={"mixup": 0.7})})
    config = trial("kd", **teacher, data=data, recipe={"epochs": 1, "lr": 1e-12}, seed=5)
    result = train(config)

    dataset = load_dataset(data)
    torch.manual_seed(5)
    model = build_configured(TINY, num_classes=10)
    taught_by = load_teacher(teacher["teacher"], Path(teacher["teacher_checkpoint"]), num_classes=10)
    loss, totals, shares = build_loss("kd", {}), [], []
    batches = train_batches(
        dataset.train, batch_size=64, seed=5, epoch=1, augment=data.augment, mean=dataset.mean, std=dataset.std
    )
    for number, batch in enumerate(batches):
        share, other = draw_mixup(len(batch.labels), 0.7, (5, 1, number))
        shares.append(share)
        assert sorted(other.tolist()) == list(range(64))
        images = share * batch.images + (1 - share) * batch.images[other]
        logits, taught = model(images), taught_by(images)
        one, two = loss(logits, taught, batch.labels), loss(logits, taught, batch.labels[other])
        totals.append(float((share * one + (1 - share) * two).detach()))
    assert len({round(share, 6) for share in shares}) == len(shares)
    assert result.metrics["train_loss"] == pytest.approx(sum(totals) / len(totals), rel=1e-5)


@pytest.fixture
def pretrained(tmp_path):
    """A checkpoint of the tiny network for 7 classes."""
    torch.manual_seed(9)
    model = build_configured(TINY, num_classes=7)
    model(torch.rand(32, 1, 8, 8) * 3)  # running statistics
    save_weights(model, tmp_path / "pretrained.pt")
    return model, tmp_path / "pretrained.pt"


def test_a_linear_probe_trains_the_head_alone_and_keeps_the_batch_norms(pretrained):
    model, path = pretrained
    student = {"name": TINY.name, "kwargs": TINY.kwargs, "checkpoint": str(path), "linear_probe": True}
    seen = Recorder()
    result = train(trial(student=student, recipe={"lr": 0.1, "weight_decay": 0.0, "epochs": 6}), seen)
    before, after = model.state_dict(), result.model.state_dict()
    assert after["classifier.weight"].shape == (10, 4)
    for name, value in before.items():
        if not name.startswith("classifier"):
            assert torch.equal(after[name], value), name
    assert seen.metrics[-1]["train_loss"] < seen.metrics[0]["train_loss"] - 0.01


def test_a_student_can_start_from_a_checkpoint_all_but_its_head(pretrained, tmp_path):
    model, path = pretrained
    student = {"name": TINY.name, "kwargs": TINY.kwargs, "checkpoint": str(path)}
    result = train(trial(student=student, recipe={"lr": 1e-12, "epochs": 1}))
    assert torch.equal(result.model.features[0].weight, model.features[0].weight)
    assert not torch.equal(result.model.features[1].running_mean, model.features[1].running_mean)
    with pytest.raises(ValueError, match=r"gone\.pt: cannot be read"):
        train(trial(student=student | {"checkpoint": str(tmp_path / "gone.pt")}))


def test_the_students_checkpoint_may_move_but_not_change(pretrained, tmp_path):
    _, path = pretrained
    student = {"name": TINY.name, "kwargs": TINY.kwargs, "checkpoint": str(path)}
    train(trial(student=student, recipe={"epochs": 1}), Recorder(tmp_path, save_at={1}))
    moved = path.rename(tmp_path / "moved.pt")
    config = trial(student=student | {"checkpoint": str(moved)}, recipe={"epochs": 1})
    assert train(config, resume_from=tmp_path / "1").epoch == 1
    save_weights(build_configured(TINY, num_classes=7), moved)
    with pytest.raises(ValueError, match=r"student\.checkpoint was"):
        train(config, resume_from=tmp_path / "1")


def test_the_students_averaged_weights_can_be_chosen(tmp_path):
    plain, averaged = (build_configured(TINY, num_classes=7) for _ in range(2))
    torch.save({"model": plain.state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "w.pt")
    student = {"name": TINY.name, "kwargs": TINY.kwargs, "checkpoint": str(tmp_path / "w.pt")}
    chosen = trial(student=student | {"checkpoint_key": "model_ema"}, recipe={"lr": 1e-12, "epochs": 1})
    assert torch.equal(train(chosen).model.features[0].weight, averaged.features[0].weight)
    with pytest.raises(ValueError, match=r"at 'model' and 'model_ema': checkpoint_key must name one"):
        train(trial(student=student))


def test_the_best_test_epoch_is_named_so_and_trains_on_all_training_images(tmp_path):
    data = DIGITS.model_copy(update={"selection": "best_test_epoch"})
    seen = Recorder(tmp_path, save_at={2})
    result = train(trial(data=data, recipe={"lr": 0.8, "epochs": 5}), seen)
    accuracies = [metrics["test_top1"] for metrics in seen.metrics]
    assert [metrics["best_epoch_test_top1"] for metrics in seen.metrics] == [max(accuracies[:n]) for n in range(1, 6)]
    assert not [name for name in result.metrics if name.startswith("val_")]
    dataset, usual = load_dataset(data), load_dataset(DIGITS)
    found = evaluate(result.model, usual.test, mean=dataset.mean, std=dataset.std)
    assert accuracies[-1] == pytest.approx(found.top1)
    assert len(dataset.train) == len(usual.train) + len(usual.val)
    again = Recorder()
    train(trial(data=data, recipe={"lr": 0.8, "epochs": 5}), again, resume_from=tmp_path / "2")
    assert again.metrics[-1]["best_epoch_test_top1"] == max(accuracies)


def test_another_teacher_or_another_split_is_not_taken_for_the_known_one(teacher, tmp_path):
    teacher = teacher | {"teacher_bank": str(tmp_path)}
    still = DIGITS.model_copy(update={"augment": AugmentConfig()})
    first = train(trial("kd", **teacher, data=still, recipe={"epochs": 1}))
    other = tmp_path / "other.pt"
    torch.manual_seed(77)
    save_weights(build_configured(teacher["teacher"], num_classes=10), other)
    second = train(trial("kd", **(teacher | {"teacher_checkpoint": str(other)}), data=still, recipe={"epochs": 1}))
    assert second.metrics["train_kd"] != pytest.approx(first.metrics["train_kd"], rel=1e-3)
    apart = still.model_copy(update={"split_seed": 4})
    third = train(trial("kd", **teacher, data=apart, recipe={"epochs": 1, "lr": 1e-12}))
    dataset = load_dataset(apart)
    taught_by = load_teacher(teacher["teacher"], Path(teacher["teacher_checkpoint"]), num_classes=10)
    torch.manual_seed(0)
    student = build_configured(TINY, num_classes=10)
    batches = train_batches(
        dataset.train, batch_size=64, seed=0, epoch=1, augment=apart.augment, mean=dataset.mean, std=dataset.std
    )
    terms = [build_loss("kd", {}).terms(student(b.images), taught_by(b.images), b.labels)["kd"] for b in batches]
    assert third.metrics["train_kd"] == pytest.approx(float(torch.stack(terms).mean().detach()), rel=1e-4)


SMALL_CNN = ModelConfig(name="small_cnn", kwargs={"widths": [4, 8], "strides": [2, 2]})


@pytest.mark.parametrize(("data", "student", "is_last"), [(DIGITS, TINY, False), (SMALL_GLYPHS, SMALL_CNN, True)])
def test_colour_images_are_convolved_with_the_channels_last(data, student, is_last):
    result = train(trial(data=data, student=student, recipe={"epochs": 1}))
    layouts = {w.is_contiguous(memory_format=torch.channels_last) for w in result.model.parameters() if w.ndim == 4}
    assert layouts >= {is_last}


def test_a_users_loss_trains(teacher, tmp_path, monkeypatch):
    (tmp_path / "a_users_loss.py").write_text(
        "def pull(student, teacher, labels, strength=1.0):\n    return strength * (student - teacher).square().mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seen = Recorder()
    train(trial("a_users_loss:pull", **teacher, loss={"strength": 0.5}, recipe={"lr": 0.01}), seen)
    assert seen.metrics[-1]["train_loss"] < seen.metrics[0]["train_loss"]


USERS = """
import torch
from torch import nn
from tune_topkd.loss import KDLoss

class Learnt(nn.Module):
    # Learns a map and a scale, keeps a centre as DINO does, and counts its calls.
    def __init__(self, speed=0.9):
        super().__init__()
        self.map = nn.Linear(10, 10)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.still = nn.Parameter(torch.ones(10), requires_grad=False)
        self.register_buffer("centre", torch.zeros(10))
        self.register_buffer("seen", torch.zeros(3), persistent=False)
        self.speed, self.calls, self.largest = speed, 0, [0.0]

    def forward(self, student, teacher, labels):
        centred = teacher - self.centre
        if self.training:
            self.centre = self.speed * self.centre + (1 - self.speed) * teacher.mean(0)
            self.seen += 1
            self.calls += 1
            self.largest.append(float(teacher.max()))
        pulled = (self.map(student) - self.scale * centred) * self.still
        return pulled.square().mean() * (1 + 0.1 * self.calls) + 0.1 * student.square().mean()

class Terms(KDLoss):
    def __init__(self, *, kd_weight=0.9):
        super().__init__(kd_weight=kd_weight)
        self.map = nn.Linear(10, 10)

    def _terms(self, student, teacher, labels):
        self.kd_weight = self.kd_weight * 0.99
        return super()._terms(student, teacher + self.map(teacher), labels)

class Plain:
    def __init__(self, speed=0.9):
        self.centre, self.speed, self.calls = torch.zeros(10), speed, 0

    def __call__(self, student, teacher, labels):
        self.calls += 1
        self.centre = self.speed * self.centre + (1 - self.speed) * teacher.mean(0)
        return (student - teacher + self.centre).square().mean() / self.calls

class Recurrent(nn.Module):
    # torch keeps a list of its weights beside them.
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(10, 10)

    def forward(self, student, teacher, labels):
        return (self.cell(student[None])[0][0] - teacher).square().mean()

class Late(nn.Module):
    def forward(self, student, teacher, labels):
        if not hasattr(self, "map"):
            self.map = nn.Linear(10, 10)
        return self.map(student).square().mean()

class Unkept:
    def __init__(self):
        import random
        self.draws = random.Random(0)

    def __call__(self, student, teacher, labels):
        return (student - teacher).square().mean() * self.draws.random()

def cut_off(student, teacher, labels):
    return (student.detach() - teacher).square().mean()

class CutOff(Learnt):
    def forward(self, student, teacher, labels):
        return super().forward(student.detach(), teacher, labels)
"""


@pytest.fixture
def users(tmp_path, monkeypatch) -> str:
    """The name of a module with losses of a user's."""
    name = f"users_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def kept(folder: Path) -> dict:
    return torch.load(folder / CHECKPOINT_NAME, weights_only=True).get("loss", {})


def quick(method: str, **changes) -> TrialConfig:
    """A trial of two epochs of two steps."""
    recipe = {"lr": 0.01, "epochs": 2, "batch_size": 128} | changes.pop("recipe", {})
    return trial(method, recipe=recipe, threads=1, **changes)


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("Learnt", "sgd"), ("Learnt+topkd", "adamw"), ("Terms", "sgd"), ("Plain+topkd", "sgd"), ("Recurrent", "sgd")],
)
def test_what_a_users_loss_keeps_is_that_of_an_uninterrupted_training(teacher, users, tmp_path, method, optimizer):
    config = quick(f"{users}:{method}", **teacher, seed=2, recipe={"optimizer": optimizer})
    whole = train(config, Recorder(tmp_path / "whole", save_at=[1, 2]))
    rest = train(config, Recorder(tmp_path / "rest", save_at=[2]), resume_from=tmp_path / "whole" / "1")
    assert same_weights(whole.model, rest.model)
    assert without_times(whole.metrics) == without_times(rest.metrics)
    half, *ends = (
        {name: torch.as_tensor(value) for held in kept(tmp_path / folder).values() for name, value in held.items()}
        for folder in ("whole/1", "whole/2", "rest/2")
    )
    assert ends[0].keys() == ends[1].keys() != set()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not all(torch.equal(value, half[name]) for name, value in ends[0].items())


def test_what_a_loss_learns_is_trained_as_the_networks_weights_are(teacher, users, tmp_path):
    config = quick(f"{users}:Learnt", **teacher, recipe={"weight_decay": 0.5})
    train(config, Recorder(tmp_path, save_at=[1, 2]))
    first, second = (kept(tmp_path / epoch)["tensors"] for epoch in "12")
    for name in ("map.weight", "map.bias", "scale", "centre", "seen"):
        assert not torch.equal(first[f"loss.{name}"], second[f"loss.{name}"]), name
    assert torch.equal(first["loss.still"], second["loss.still"])
    groups = torch.load(tmp_path / "1" / CHECKPOINT_NAME, weights_only=True)["optimizer"]["param_groups"]
    student = len(list(build_configured(TINY, num_classes=10).parameters()))
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(student + 3, 0.5)]
    adamw = quick(f"{users}:Learnt", **teacher, recipe={"optimizer": "adamw", "epochs": 1})
    train(adamw, Recorder(tmp_path / "adamw", save_at=[1]))
    groups = torch.load(tmp_path / "adamw" / "1" / CHECKPOINT_NAME, weights_only=True)["optimizer"]["param_groups"]
    matrices = sum(w.ndim > 1 for w in build_configured(TINY, num_classes=10).parameters())
    assert [len(group["params"]) for group in groups] == [matrices + 1, student - matrices + 2]


def test_what_a_loss_learns_begins_with_the_seed(teacher, users, tmp_path):
    maps = []
    for number, seed in enumerate((0, 0, 1)):
        torch.rand(3)
        config = quick(f"{users}:Learnt", **teacher, seed=seed, recipe={"lr": 1e-30, "epochs": 1})
        train(config, Recorder(tmp_path / str(number), save_at=[1]))
        maps.append(kept(tmp_path / str(number) / "1")["tensors"]["loss.map.weight"])
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


@pytest.mark.parametrize("method", ["ce", "topkd", "dkd+topkd"])
def test_a_loss_that_keeps_nothing_leaves_nothing_in_a_checkpoint(teacher, tmp_path, method):
    train(quick(method, **(teacher if method != "ce" else {})), Recorder(tmp_path, save_at=[1]))
    content = torch.load(tmp_path / "1" / CHECKPOINT_NAME, weights_only=True)
    assert content.keys() == {"model", "optimizer", "scheduler", "rng", "epoch", "metrics", "config"}


def test_a_checkpoint_without_what_the_loss_had_learnt_is_refused(teacher, users, tmp_path):
    config = quick(f"{users}:Learnt", **teacher)
    train(config, Recorder(tmp_path, save_at=[1]))
    path = tmp_path / "1" / CHECKPOINT_NAME
    content = torch.load(path, weights_only=True)
    del content["loss"]
    torch.save(content, path)
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt: cannot be resumed from: the loss has the state loss\.centre, loss\.map"
    ):
        train(config, resume_from=tmp_path / "1")


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (
            "Late",
            r"got a parameter at a call, which is not trained: loss\.map\.bias, loss\.map\.weight; make it in the",
        ),
        ("Late+topkd", r"got a parameter at a call, which is not trained: base\.loss\.map\.bias"),
        ("Unkept", r"attribute loss\.draws, a Random, is changed by its calls and cannot be kept in a checkpoint"),
        ("cut_off", "its loss has no gradient, so nothing can be learnt from it"),
        ("CutOff", "its loss has no gradient for the student"),
    ],
)
def test_a_loss_that_cannot_be_trained_with_is_told(teacher, users, tmp_path, method, told):
    with pytest.raises(ValueError, match=told):
        train(quick(f"{users}:{method}", **teacher), Recorder(tmp_path, save_at=[1]))


CODE = """
from torch import nn

def network(*, num_classes, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))

def loss(student, teacher, labels, power=2):
    return (student - teacher).abs().pow(power).mean()
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Writes the module of a user's anew, with a text replaced by another, and gives its name."""
    name = f"code_{tmp_path.name.replace('-', '_')}"
    monkeypatch.syspath_prepend(tmp_path)

    def write(old="", new=""):
        (tmp_path / f"{name}.py").write_text(CODE.replace(old, new) if old else CODE)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        return name

    before = sys.dont_write_bytecode
    yield write
    sys.dont_write_bytecode = before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            ("nn.ReLU()", "nn.GELU()"),
            r"another config: code\.student was '\w{16}' and is now '\w{16}' \(code: what the",
        ),
        (("teacher).abs()", "2 * teacher).abs()"), r"another config: code\.method was \["),
        (("student - teacher", "student.detach() - student"), r"another config: code\.method was \["),
    ],
)
def test_a_users_code_may_not_change_under_a_checkpoint(teacher, code, tmp_path, change, told):
    name = code()
    config = quick(f"{name}:loss", **teacher, student=ModelConfig(name=f"{name}:network"))
    train(config, Recorder(tmp_path, save_at=[1]))
    code("\n\ndef loss", "\n\n# a remark\ndef loss")
    assert train(config, resume_from=tmp_path / "1").epoch == 2
    code(*change)
    with pytest.raises(ValueError, match=told):
        train(config, resume_from=tmp_path / "1")


def test_a_checkpoint_that_does_not_know_of_code_is_gone_on_with(teacher, code, tmp_path, caplog):
    name = code()
    config = quick(f"{name}:loss", **teacher, student=ModelConfig(name=f"{name}:network"))
    train(config, Recorder(tmp_path, save_at=[1]))
    path = tmp_path / "1" / CHECKPOINT_NAME
    content = torch.load(path, weights_only=True)
    identity = json.loads(content["config"])
    assert identity.pop("code").keys() == {"student", "method"}
    torch.save(content | {"config": json.dumps(identity)}, path)
    assert train(config, resume_from=tmp_path / "1").epoch == 2
    assert "does not say what was computed by: method, student" in caplog.text


def test_a_loss_that_takes_no_made_up_batch_is_told_of_and_trains(teacher, code, tmp_path, caplog):
    name = code("return (student", "assert student.max() < 2.5\n    return (student")
    assert train(quick(f"{name}:loss", **teacher), Recorder(tmp_path, save_at=[1])).epoch == 2
    assert f"cannot tell whether method {name}:loss was changed" in caplog.text


def test_named_networks_and_losses_have_no_code_in_a_checkpoint(teacher, tmp_path):
    train(quick("topkd", **teacher), Recorder(tmp_path, save_at=[1]))
    content = torch.load(tmp_path / "1" / CHECKPOINT_NAME, weights_only=True)
    assert "code" not in json.loads(content["config"])


# --- the shipped search spaces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(Path("search_spaces").glob("digits*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_space_names_what_exists(path):
    config = load_config(path)
    classes = dataset_info(config.data).num_classes
    student, teacher = (build_configured(m, num_classes=classes) for m in (config.student, config.teacher.model))
    assert count_parameters(student) < count_parameters(teacher) / 5
    assert config.space.keys() - {"lr"} < loss_parameters(config.method).keys()
    assert config.space["k"].high < classes


# --- precision ------------------------------------------------------------------------------------------------------


def test_in_bfloat16_only_the_layers_are_less_exact(teacher, monkeypatch):
    seen = set()
    terms = tune_topkd.loss.TopKDLoss._terms

    def looking(self, student, taught, labels):
        seen.add(("loss", student.dtype, taught.dtype))
        return terms(self, student, taught, labels)

    monkeypatch.setattr(tune_topkd.loss.TopKDLoss, "_terms", looking)
    torch_linear = functional.linear

    def linear(images, weight, bias=None):
        logits = torch_linear(images, weight, bias)
        seen.add(("layer", logits.dtype))
        return logits

    monkeypatch.setattr(functional, "linear", linear)
    result = train(trial("topkd", recipe={"precision": "bfloat16"}, **teacher))
    assert seen == {
        ("layer", torch.bfloat16),  # the student's, training and validating
        ("layer", torch.float32),  # the teacher's
        ("loss", torch.float32, torch.float32),
    }
    assert all(weight.dtype == torch.float32 for weight in result.model.parameters())


def test_in_bfloat16_a_training_comes_to_about_the_same_and_twice_to_the_same(teacher, tmp_path):
    exact = train(trial("topkd", **teacher))
    coarse = train(trial("topkd", recipe={"precision": "bfloat16"}, **teacher), Recorder(tmp_path, save_at=[2]))
    again = train(trial("topkd", recipe={"precision": "bfloat16"}, **teacher), resume_from=tmp_path / "2")
    assert not same_weights(exact.model, coarse.model)
    assert coarse.metrics["train_loss"] == pytest.approx(exact.metrics["train_loss"], rel=0.02)
    assert same_weights(coarse.model, again.model)
    assert without_times(coarse.metrics) == without_times(again.metrics)
