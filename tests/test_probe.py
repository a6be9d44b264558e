"""How fast a training is: real ones on digits, shown for so many steps as they take at least."""

import psutil
import pytest
import test_train
import torch
from torch import nn

import tune_topkd.models as models
from tune_topkd.config import ModelConfig
from tune_topkd.data import load_dataset
from tune_topkd.teacher import LogitBank
from tune_topkd.teacher import bank_size
from tune_topkd.train import Probe
from tune_topkd.train import probe

DIGITS = test_train.DIGITS
teacher = test_train.teacher
trial = test_train.trial


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(probe, "device_of", lambda config: torch.device("cpu"))


@pytest.fixture
def steps(monkeypatch):
    """A student that keeps of each step how many images it had and on how many threads; it draws at random."""
    steps = []

    class Student(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, num_classes))

        def forward(self, images):
            if torch.is_grad_enabled():
                steps.append((len(images), torch.get_num_threads()))
            return self.layers(images)

    monkeypatch.setitem(models._REGISTRY, "counted", lambda *, num_classes: Student(num_classes))
    return steps


@pytest.fixture
def step_takes(monkeypatch, steps):
    """Time that goes by with the steps alone."""

    def step_takes(seconds):
        monkeypatch.setattr(probe.time, "perf_counter", lambda: seconds * len(steps))

    return step_takes


@pytest.fixture
def threads():
    """torch's number of threads here, which is not that of the training."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


COUNTED = ModelConfig(name="counted")


def test_a_rate_is_images_by_seconds(steps, step_takes, on_the_cpu):
    step_takes(0.1)
    probe = Probe(trial(student=COUNTED))
    before = len(steps)
    assert probe(2.0).images_per_second == pytest.approx(64 / 0.1)
    assert len(steps) - before == 20


@pytest.mark.parametrize("method", ["ce", "topkd"])
def test_a_real_training_has_a_rate_and_memory_within_the_machine(method, teacher, on_the_cpu):
    taught = {} if method == "ce" else teacher
    found = Probe(trial(method, **taught))(0.1)
    assert 0 < found.images_per_second < float("inf")
    assert psutil.Process().memory_info().rss * 0.5 < found.peak_bytes < found.total_bytes
    assert found.total_bytes == pytest.approx(psutil.virtual_memory().total, rel=0.05)


@pytest.mark.gpu
def test_on_a_gpu_the_memory_is_its_own():
    found = Probe(trial(recipe={"batch_size": 256}))(0.1)
    assert found.total_bytes == torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    assert probe.CONTEXT_BYTES < found.peak_bytes < found.total_bytes


def test_it_goes_on_at_the_end_of_an_epoch(steps, step_takes):
    step_takes(0.1)
    size = len(load_dataset(DIGITS).train)
    probe = Probe(trial(student=COUNTED, recipe={"batch_size": size}))
    before = len(steps)
    assert before > 0
    probe(2.0)
    assert [images for images, _ in steps[before:]] == [size] * 20


@pytest.mark.parametrize("seconds", [0.001, 1.0])
def test_the_bank_is_filled_before_the_time_is_taken(seconds, teacher, tmp_path, steps, step_takes):
    """Numbers of trials that are run one after the other do the same work: the first does not pay for the teacher."""
    step_takes(seconds)
    config = trial("kd", student=COUNTED, **teacher, teacher_bank=str(tmp_path), recipe={"batch_size": 2})
    probe = Probe(config)
    (file,) = tmp_path.glob("bank-*.f16")
    bank = LogitBank(file, bank_size(config.data, config.recipe, load_dataset(config.data)))
    shown = len(steps)
    assert 0 < shown * seconds < 30
    assert bank.filled() == 2 * shown
    probe(3.0 * shown * seconds)
    assert len(steps) >= 4 * shown
    assert bank.filled() == 2 * shown


@pytest.mark.parametrize("given", [1, None])
def test_it_keeps_to_its_threads_and_gives_them_back(steps, threads, given):
    probe = Probe(trial(student=COUNTED, threads=given))
    assert torch.get_num_threads() == threads
    probe(0.0)
    assert torch.get_num_threads() == threads
    assert {used for _, used in steps} == {given or threads}


def test_it_leaves_the_generator_alone(steps):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    Probe(trial(student=COUNTED))(0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_built_is_told_and_leaves_all_as_it_was(threads):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="no_such_network"):
        Probe(trial(student=ModelConfig(name="no_such_network"), threads=1))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)
