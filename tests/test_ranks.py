"""One training in several processes, here on the CPU by gloo: the same as in one, and all of them end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import test_train
import torch

from tune_topkd.config import AugmentConfig
from tune_topkd.config import ConfigError
from tune_topkd.config import ModelConfig
from tune_topkd.config import load_config
from tune_topkd.config import what
from tune_topkd.data import Part
from tune_topkd.data import batches_of
from tune_topkd.data import epoch_order
from tune_topkd.data import load_dataset
from tune_topkd.errors import ProcessLostError
from tune_topkd.execution import worker
from tune_topkd.teacher import TeacherLogits
from tune_topkd.train import CHECKPOINT_NAME
from tune_topkd.train import Training
from tune_topkd.train import ranks
from tune_topkd.train import train
from tune_topkd.train.group import Group

DIGITS = test_train.DIGITS
Recorder = test_train.Recorder
teacher = test_train.teacher
trial = test_train.trial

BATCH = 256
"""One step an epoch: the momentum after the first epoch is the gradient."""
IN_FLOAT64 = {"student": ModelConfig(name="ranked:InFloat64")}
EXACT = {"rtol": 0.0, "atol": 1e-12}
RECIPE = {"batch_size": BATCH, "epochs": 4, "weight_decay": 0.0}
ERASED = DIGITS.model_copy(update={"augment": AugmentConfig(erase=0.5)})
LONGEST_WAIT = 120


def exactly(method, **changes):
    recipe = RECIPE | changes.pop("recipe", {})
    return trial(method, **IN_FLOAT64, gpu_share=0.0, recipe=recipe, **changes)


CASES = {
    "ce": lambda _: exactly("ce"),
    "kd": lambda teacher: exactly("kd", **teacher),
    "dkd": lambda teacher: exactly("dkd", **teacher),
    "lskd": lambda teacher: exactly("lskd", **teacher),
    "topkd": lambda teacher: exactly("topkd", **teacher),
    "kd+topkd": lambda teacher: exactly("kd+topkd", **teacher),
    "in-groups": lambda teacher: exactly("topkd", **teacher, loss={"contrastive_batch": 64}),
    "clipped": lambda teacher: exactly("topkd", **teacher, recipe={"clip_grad": 0.1, "log_grad_norms": True}),
    "averaged": lambda teacher: exactly("kd", **teacher, recipe={"ema": {"decay_epochs": 0.5}, "batch_size": 64}),
    "adamw": lambda _: exactly("ce", recipe={"optimizer": "adamw", "lr": 0.01}),
    "learning": lambda teacher: exactly("ranked:Learning", **teacher),
    "one-by-one": lambda _: exactly("ce", data=ERASED, recipe={"batch_size": 64}),
}
ROUNDED = {
    "bfloat16": lambda teacher: trial(
        "topkd", **teacher, student=ModelConfig(name="digits_linear"), recipe=RECIPE | {"precision": "bfloat16"}
    ),
}


@pytest.fixture
def left():
    """The processes that this one has begun since the test did and that are still there."""
    before = set(psutil.Process().children())
    return lambda: [process for process in psutil.Process().children() if process not in before]


@pytest.fixture(scope="module")
def configs(teacher):
    return {name: make(teacher) for name, make in (CASES | ROUNDED).items()}


@pytest.fixture(scope="module")
def here():
    """An environment in which programs can import what is here."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}


@pytest.fixture(scope="module")
def two_ranks(configs, here, tmp_path_factory):
    """All cases trained by two ranks: a folder with each one's checkpoints by case, rank and epoch."""
    folder = tmp_path_factory.mktemp("ranks")
    raw = json.dumps({name: config.model_dump(mode="json") for name, config in configs.items()})
    program = Path(__file__).parent / "ranked.py"
    command = [sys.executable, "-W", "ignore", program, folder, "2"]
    done = subprocess.run(command, input=raw, text=True, capture_output=True, timeout=250, env=here)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(configs, tmp_path_factory):
    """Trains a case in one process, once: the folder of its checkpoints by epoch."""
    done = {}

    def alone(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name.replace("+", "-"))
            train(configs[name], Recorder(done[name], save_at=range(1, 5)))
        return done[name]

    return alone


def checkpoint(folder):
    return torch.load(folder / CHECKPOINT_NAME, weights_only=True)


def measured(content):
    """What a checkpoint says of losses, accuracies and gradients."""
    return {k: v for k, v in content["metrics"].items() if k not in test_train.TIMES}


# --- the same training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_loss_and_the_gradient_of_one_process(two_ranks, alone, case):
    one, two = checkpoint(alone(case) / "1"), checkpoint(two_ranks / case / "0" / "1")
    assert measured(two) == pytest.approx(measured(one), rel=1e-12)
    assert one["metrics"]["train_loss"] > 0.1
    momenta = [content["optimizer"]["state"] for content in (one, two)]
    torch.testing.assert_close(momenta[1], momenta[0], **EXACT)
    assert len(momenta[0]) >= 4


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_end_with_the_weights_of_one_process(two_ranks, alone, case):
    one, two = checkpoint(alone(case) / "4"), checkpoint(two_ranks / case / "0" / "4")
    assert one.keys() == two.keys()
    for key in one.keys() & {"model", "ema", "loss"}:
        torch.testing.assert_close(two[key], one[key], **EXACT)
    assert measured(two) == pytest.approx(measured(one), rel=1e-11)
    assert (two["epoch"], two["config"], two["scheduler"]) == (one["epoch"], one["config"], one["scheduler"])
    other = checkpoint(two_ranks / case / "1" / "4")
    for key in one.keys() & {"model", "loss", "optimizer"}:
        torch.testing.assert_close(other[key], two[key], rtol=0.0, atol=0.0)


def test_two_ranks_in_bfloat16_are_near_one_process(two_ranks, alone):
    one, two = checkpoint(alone("bfloat16") / "4"), checkpoint(two_ranks / "bfloat16" / "0" / "4")
    torch.testing.assert_close(two["model"], one["model"], rtol=0.0, atol=1e-2)
    assert measured(two)["train_loss"] == pytest.approx(measured(one)["train_loss"], rel=1e-2)


def test_a_loss_of_each_ranks_own_part_would_be_another(configs):
    """Why logits are gathered: the contrastive loss of half a batch is not that of the batch."""
    config = configs["topkd"]
    whole = train(config.model_copy(update={"recipe": config.recipe.model_copy(update={"epochs": 1})})).metrics
    half = config.model_copy(update={"loss": {"contrastive_batch": BATCH // 2}})
    parts = train(half.model_copy(update={"recipe": config.recipe.model_copy(update={"epochs": 1})})).metrics
    assert abs(whole["train_loss"] / parts["train_loss"] - 1) > 0.01


@pytest.mark.slow
def test_a_training_goes_on_in_two_ranks_from_the_checkpoint_of_one_process(configs, alone, tmp_path, left):
    config = configs["topkd"].model_copy(update={"ranks": 2})
    told = Recorder(tmp_path, save_at=[4])
    before = torch.get_rng_state()
    result = train(config, told, resume_from=alone("topkd") / "2")
    assert torch.equal(torch.get_rng_state(), before)
    one = checkpoint(alone("topkd") / "4")
    assert told.epochs == [3, 4]
    assert (result.epoch, result.diverged) == (4, False)
    assert {k: v for k, v in result.metrics.items() if k not in test_train.TIMES} == pytest.approx(measured(one))
    torch.testing.assert_close(result.model.state_dict(), one["model"], **EXACT)
    assert not result.model.training
    saved = checkpoint(tmp_path / "4")
    torch.testing.assert_close(saved["model"], one["model"], **EXACT)
    assert left() == []


@pytest.mark.slow
def test_a_whole_training_of_digits_ends_near_that_of_one_process():
    recipe = {"epochs": 20, "batch_size": 32, "lr": 0.1, "schedule": "cosine"}
    config = exactly("ce", data=DIGITS.model_copy(update={"augment": AugmentConfig()}), recipe=recipe)
    one, two = train(config), train(config.model_copy(update={"ranks": 2}))
    assert one.metrics["val_top1"] > 80
    assert two.metrics["val_top1"] == pytest.approx(one.metrics["val_top1"], abs=0.5)


# --- whose images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [{"pad": 1, "flip": True}, {}, {"rotate": 10.0, "erase": 0.5}])
@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_of_a_batch_are_the_batch(augment, parts):
    config = trial(data=DIGITS.model_copy(update={"augment": AugmentConfig(**augment)}), recipe={"batch_size": 60})
    dataset = load_dataset(config.data)
    whole = list(batches_of(config, dataset, dataset.train, 2))
    shared = [batches_of(config, dataset, dataset.train, 2, Part(number, parts)) for number in range(parts)]
    for batch, *its in zip(whole, *shared, strict=True):
        for there, mine in zip(batch, zip(*its, strict=True), strict=True):
            assert torch.equal(torch.cat(mine), there)
            assert len(mine[0]) == 60 // parts


def test_a_split_smaller_than_a_batch_is_divided_too():
    split = load_dataset(DIGITS).train.subset(torch.arange(10))
    at = {"batch_size": 64, "seed": 0, "epoch": 1}
    assert torch.equal(
        torch.cat([epoch_order(split, **at, part=Part(n, 2)) for n in range(2)]), epoch_order(split, **at)
    )
    with pytest.raises(ValueError, match="a batch of 10 images cannot be divided into 4 equal parts"):
        epoch_order(split, **at, part=Part(0, 4))


def test_a_rank_reads_of_the_bank_the_rows_of_its_own_images(teacher, tmp_path, monkeypatch):
    config = trial("kd", **teacher, teacher_bank=str(tmp_path))
    dataset = load_dataset(config.data)
    one = TeacherLogits(config, dataset, dataset.train)
    one.begin(1)
    expected = [one.logits(b.images, n) for n, b in enumerate(batches_of(config, dataset, dataset.train, 1))]
    read = []
    monkeypatch.setattr(TeacherLogits, "compute", lambda *_: pytest.fail("the bank is full"))
    parts = []
    for part in (Part(0, 2), Part(1, 2)):
        its = TeacherLogits(config, dataset, dataset.train, part)
        bank_read = its._bank.read
        monkeypatch.setattr(its._bank, "read", lambda p, v, real=bank_read: read.append(set(p.tolist())) or real(p, v))
        its.begin(1)
        batches = list(batches_of(config, dataset, dataset.train, 1, part))
        parts.append([its.logits(batch.images, number) for number, batch in enumerate(batches)])
        assert read.pop() == {index for batch in batches for index in batch.indices.tolist()}
        assert read == []
    for whole, *both in zip(expected, *parts, strict=True):
        assert torch.equal(torch.cat(both), whole)


# --- all end together -----------------------------------------------------------------------------------------------


def fateful(notes, fate, **changes):
    """A training whose rank 1 meets its fate in the third epoch, once."""
    loss = {"notes": str(notes), "fate": fate, "steps": 2}
    return exactly("ranked:Fateful", loss=loss, ranks=2, **changes)


@pytest.fixture
def light(monkeypatch):
    """Ranks that import no torch: a program that is given its pipe, the process that started it, and its number."""

    def light(program):
        begin = "import os, signal, sys, time; from multiprocessing.connection import Connection\n"
        begin += "parent, pipe = int(sys.argv[1]), Connection(int(sys.argv[2]))\n"
        begin += "from tune_topkd.machine import end_with; end_with(parent)\n"
        monkeypatch.setattr(ranks, "_PROGRAM", begin + program)

    return light


LIGHT_ENDS = {
    "killed": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        "was killed (SIGKILL); if nobody killed it, the machine ran out",
    ),
    "terminated": ("os.kill(os.getpid(), signal.SIGTERM)", "was killed (SIGTERM)"),
    "exits": ("os._exit(3)", "ended by itself (exit code 3)"),
    "returns": ("", "ended by itself (exit code 0)"),
}


@pytest.mark.parametrize("case", LIGHT_ENDS)
def test_a_rank_that_is_gone_is_named_and_the_others_are_ended(light, case, tmp_path, left):
    end, told = LIGHT_ENDS[case]
    first = tmp_path / "first"
    light(
        f"try:\n    os.close(os.open({str(first)!r}, os.O_CREAT | os.O_EXCL))\n"
        f"except FileExistsError:\n    time.sleep(600)\n{end}"
    )
    with pytest.raises(ProcessLostError) as lost:
        train(exactly("ce", ranks=2))
    assert f"of 2 {told}" in str(lost.value)
    assert len(str(lost.value).splitlines()) == 1
    assert left() == []
    message = worker._failure(lost.value, tmp_path)
    assert (message["kind"], message["reason"]) == ("lost", "crash")


STARTED = """
import sys
from tune_topkd.config import TrialConfig
from tune_topkd.train import train
train(TrialConfig.model_validate_json(sys.argv[1]))
"""


@pytest.mark.slow
def test_no_rank_outlives_the_process_that_started_it(here):
    config = exactly("ce", ranks=2, recipe={"epochs": 10**6})
    with subprocess.Popen([sys.executable, "-c", STARTED, config.model_dump_json()], env=here) as started:
        process = psutil.Process(started.pid)
        deadline = time.monotonic() + LONGEST_WAIT
        while len(found := process.children()) < 2:
            assert time.monotonic() < deadline
            assert started.poll() is None
            time.sleep(0.01)
        started.send_signal(signal.SIGKILL)
        assert psutil.wait_procs(found, timeout=LONGEST_WAIT)[1] == []


def test_an_exception_of_a_rank_is_raised_as_it_was():
    try:
        try:
            raise OSError(28, "No space left on device", "/runs/x")
        except OSError as cause:
            raise Unpicklable("unexpected pos", lambda: None) from cause
    except Unpicklable as error:
        found = ranks._Raised.of(error).error("rank 0 of 2")
    assert (type(found).__name__, str(found)) == ("Unpicklable", str(("unexpected pos", "…")))
    cause = found.__cause__
    assert (type(cause), cause.errno, cause.filename) == (OSError, 28, "/runs/x")
    assert "rank 0 of 2" in str(cause.__cause__)
    assert "in test_an_exception_of_a_rank_is_raised_as_it_was" in str(cause.__cause__)
    memory = ranks._Raised.of(torch.OutOfMemoryError("CUDA out of memory")).error("rank 1 of 2")
    assert type(memory).__name__ == "OutOfMemoryError"


class Unpicklable(Exception):
    """Holds what cannot be pickled."""

    def __str__(self):
        return str((self.args[0], "…"))


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["killed", pytest.param("exits", marks=pytest.mark.long), "raises"])
def test_a_rank_that_ends_in_the_middle_ends_the_attempt_with_one_line(teacher, tmp_path, fate, left):
    """The other rank raises too, as its neighbour does not answer any more: what is told is the cause."""
    told = Recorder(tmp_path / "saved", save_at=[2])
    with pytest.raises((ProcessLostError, OSError)) as raised:
        train(fateful(tmp_path, fate, **teacher), told)
    lines = {
        "killed": "rank 1 of 2 was killed (SIGKILL); if nobody killed it, the machine ran out of memory",
        "exits": "rank 1 of 2 ended by itself (exit code 3); its error is in the log",
        "raises": "[Errno 5] Input/output error: 'an image'",
    }
    assert str(raised.value) == lines[fate]
    assert told.epochs == [1, 2]
    assert left() == []
    if fate == "raises":
        assert "in _meet" in worker._failure(raised.value, tmp_path)["traceback"]
    train(fateful(tmp_path, fate, **teacher), told, resume_from=tmp_path / "saved" / "2")
    assert told.epochs == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_the_disks_trouble(tmp_path, left):
    (tmp_path / "1").write_text("a file where the folder is to be")
    with pytest.raises(FileExistsError):
        train(exactly("ce", ranks=2), Recorder(tmp_path, save_at=[1]))
    assert left() == []


@pytest.mark.slow
def test_who_listens_may_stop_the_training(tmp_path, left):
    class StoppedError(Exception):
        pass

    def report(epoch, metrics, save):
        raise StoppedError

    with pytest.raises(StoppedError):
        train(exactly("ce", ranks=2), report)
    assert left() == []


# --- what a config may say ------------------------------------------------------------------------------------------

SEVERAL = {"sweep": {"gpus_per_trial": 2}}
REFUSED = {
    "odd batch": (
        SEVERAL | {"recipe": {"epochs": 1, "batch_size": 63}},
        "recipe.batch_size = 63: must be a multiple of 2: each of the 2 GPUs of a trial (sweep.gpus_per_trial) trains on",
    ),
    "three": (
        {"sweep": {"gpus_per_trial": 3.0}},
        "recipe.batch_size = 64: must be a multiple of 3: each of the 3 GPUs of a trial",
    ),
    "searched": (
        SEVERAL | {"space": {"batch_size": [32, 33]}},
        "space.batch_size = 33: must be a multiple of 2",
    ),
    "searched over a range": (
        SEVERAL | {"space": {"batch_size": {"low": 32, "high": 64}}},
        "space.batch_size: must be a list of choices, each a multiple of 2",
    ),
    "mixup": (
        SEVERAL | {"data": {"name": "digits", "augment": {"mixup": 0.2}}},
        "data.augment.mixup = 0.2: must be 0: each of the 2 GPUs",
    ),
    "auto": (
        {"sweep": {"gpus_per_trial": 2, "cpus_per_trial": "auto"}},
        "sweep.cpus_per_trial = 'auto': must be a number where a trial has 2 GPUs (sweep.gpus_per_trial)",
    ),
}
RAW = {
    "data": {"name": "digits"},
    "student": "digits_cnn_tiny",
    "method": "ce",
    "recipe": {"epochs": 1},
    "space": {"lr": {"low": 0.1, "high": 1.0}},
    "baselines": None,
    "sweep": {"asha": None},
}


def written(folder, changes):
    path = folder / "space.yaml"
    raw = {key: value | changes[key] if key == "sweep" and key in changes else value for key, value in RAW.items()}
    path.write_text(json.dumps(raw | {key: value for key, value in changes.items() if key != "sweep"}))
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_what_several_gpus_cannot_do_is_one_error(tmp_path, case):
    changes, told = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        load_config(written(tmp_path, changes))
    assert told in str(refused.value)
    assert len(refused.value.problems) == 1


def test_several_gpus_are_a_space_and_change_no_result(tmp_path):
    config = load_config(written(tmp_path, SEVERAL | {"space": {"batch_size": [32, 64]}}))
    assert config.sweep.gpus_per_trial == 2
    assert what(trial(ranks=2)) == what(trial())


def test_mixup_that_an_older_sweep_asks_for_is_refused_as_it_trains():
    config = trial(data=DIGITS.model_copy(update={"augment": AugmentConfig(mixup=0.2)}))
    training = Training(config, torch.device("cpu"), Group(0, 1))
    training.group = Group(0, 2)
    with pytest.raises(ValueError, match=r"data\.augment\.mixup mixes images of the whole batch"):
        training.run_epoch()
