"""The bank of a teacher's logits: what a live teacher would have said, said once."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import tune_topkd.models as models
from tune_topkd.config import AugmentConfig
from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.config import RecipeConfig
from tune_topkd.config import StudentConfig
from tune_topkd.config import TrialConfig
from tune_topkd.data import batches_of
from tune_topkd.data import load_dataset
from tune_topkd.data import numbered_views
from tune_topkd.data import view
from tune_topkd.data import view_count
from tune_topkd.data import view_numbers
from tune_topkd.models import build_configured
from tune_topkd.models import save_weights
from tune_topkd.teacher import BankSize
from tune_topkd.teacher import LogitBank
from tune_topkd.teacher import TeacherError
from tune_topkd.teacher import TeacherLogits
from tune_topkd.teacher import TeacherNetwork
from tune_topkd.teacher import bank
from tune_topkd.teacher import bank_file
from tune_topkd.teacher import bank_size
from tune_topkd.teacher import fill_bank
from tune_topkd.teacher import has_room
from tune_topkd.teacher import in_config
from tune_topkd.teacher import logits as logits_module
from tune_topkd.teacher import stored_banks
from tune_topkd.teacher.network import ON_CPU
from tune_topkd.train import train

SIZE = BankSize(images=50, views=18, num_classes=10)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tune_topkd.train"])  # importing it takes longer than what each of them does


def said(places):
    """What a teacher of the tests says of a row."""
    return torch.sin(places[:, None] * torch.arange(1.0, 11.0)) * 20


def rows(*places):
    places = torch.tensor(places)
    return places // SIZE.views, places % SIZE.views


def row(place):
    """Where it lies in the file."""
    return place % SIZE.views * SIZE.images + place // SIZE.views


def fill(bank, *places):
    bank.write(*rows(*places), said(torch.tensor(places)).half())


# --- the file -------------------------------------------------------------------------------------------------------


def test_what_was_filled_is_read_by_all_and_nothing_else_is_there(tmp_path):
    one, other = (LogitBank(tmp_path / "b.f16", SIZE) for _ in range(2))
    assert not one.read(*rows(*range(900)))[1].any()
    fill(one, 7, 899, 0)
    given, there = other.read(*rows(0, 1, 7, 899))
    assert there.tolist() == [True, False, True, True]
    assert torch.equal(given[there], said(torch.tensor([0, 7, 899])).half())
    assert other.filled() == 3
    assert (tmp_path / "b.f16").stat().st_size == SIZE.bytes


@pytest.mark.parametrize("special", [0.0, -0.0, float("inf"), float("nan")])
def test_any_logits_are_kept_as_they_are(tmp_path, special):
    bank = LogitBank(tmp_path / "b.f16", SIZE)
    bank.write(*rows(5), torch.full((1, 10), special).half())
    given, there = bank.read(*rows(5))
    assert there.all()
    assert torch.equal(given.view(torch.int16), torch.full((1, 10), special).half().view(torch.int16))


@pytest.mark.parametrize("word", range(12))
def test_a_row_that_is_not_as_it_was_written_counts_as_empty(tmp_path, word):
    bank = LogitBank(tmp_path / "b.f16", SIZE)
    fill(bank, 3, 4, 5)
    with open(tmp_path / "b.f16", "r+b") as file:
        file.seek((row(4) * 12 + word) * 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    assert bank.read(*rows(3, 4, 5))[1].tolist() == [True, False, True]


def fill_for_ever(path):
    bank = LogitBank(path, SIZE)
    generator = torch.Generator().manual_seed(os.getpid())
    while True:
        fill(bank, *torch.randint(900, (30,), generator=generator).tolist())


def test_writers_beside_one_another_and_kills_leave_only_what_the_teacher_says(tmp_path):
    bank = LogitBank(tmp_path / "b.f16", SIZE)
    for _ in range(3):
        writers = [PROCESSES.Process(target=fill_for_ever, args=(tmp_path / "b.f16",)) for _ in range(2)]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + 60
        before = bank.filled()
        while bank.filled() == before < 900 and time.monotonic() < deadline:
            time.sleep(0.01)
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
    given, there = bank.read(*rows(*range(900)))
    assert there.any()
    assert torch.equal(given[there], said(torch.arange(900)[there]).half())


def test_a_bank_that_has_no_room_is_not_begun(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        LogitBank(tmp_path / "sub" / "b.f16", SIZE)
    assert list((tmp_path / "sub").iterdir()) == []


def test_room_is_half_of_what_is_free(tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 2 * SIZE.bytes})
    monkeypatch.setattr(bank.shutil, "disk_usage", lambda path: free)
    assert has_room(tmp_path / "not" / "there" / "b.f16", SIZE)
    free.free -= 2
    assert not has_room(tmp_path / "not" / "there" / "b.f16", SIZE)
    (tmp_path / "b.f16").write_bytes(bytes(SIZE.bytes))
    assert has_room(tmp_path / "b.f16", SIZE)


def test_banks_that_are_there_count_for_the_share_of_the_disk(tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 4 * SIZE.bytes})
    monkeypatch.setattr(bank.shutil, "disk_usage", lambda path: free)
    (tmp_path / "one").mkdir()
    LogitBank(tmp_path / "one" / "bank-1.f16", SIZE)
    (there,) = stored_banks(tmp_path)
    assert there.bytes >= SIZE.bytes
    free.free = 2 * SIZE.bytes + there.bytes
    assert has_room(tmp_path / "two" / "bank-2.f16", SIZE)
    free.free -= 2
    assert not has_room(tmp_path / "two" / "bank-2.f16", SIZE)


@pytest.mark.parametrize(("left", "filled"), [(SIZE.bytes, 2), (SIZE.bytes // 2, 2), (0, 0)])
def test_a_bank_that_lost_its_room_is_given_it_again(tmp_path, left, filled):
    path = tmp_path / "b.f16"
    fill(LogitBank(path, SIZE), 0, 1)
    kept = path.read_bytes()[:left].rstrip(b"\0")
    path.unlink()
    path.write_bytes(kept)
    os.truncate(path, left)  # the rest is a hole
    assert path.stat().st_blocks * 512 < SIZE.bytes
    assert LogitBank(path, SIZE).filled() == filled
    assert path.stat().st_size == SIZE.bytes <= path.stat().st_blocks * 512


def test_a_bank_whose_room_cannot_be_had_again_is_only_read(tmp_path, monkeypatch):
    fill(LogitBank(tmp_path / "b.f16", SIZE), 0, 1)
    os.truncate(tmp_path / "b.f16", 2 * SIZE.bytes)  # with a hole at its end

    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    again = LogitBank(tmp_path / "b.f16", SIZE)
    fill(again, 2)
    assert (again.is_writable, again.filled()) == (False, 2)
    os.truncate(tmp_path / "b.f16", SIZE.bytes - 2)
    with pytest.raises(OSError, match=f"is shorter than {SIZE.bytes:,} bytes"):
        LogitBank(tmp_path / "b.f16", SIZE)


@pytest.mark.parametrize("put", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_file_is_no_bank(tmp_path, put):
    put(tmp_path / "b.f16")
    with pytest.raises(OSError, match=r"b\.f16"):
        LogitBank(tmp_path / "b.f16", SIZE)


def test_noise_and_the_rows_of_another_bank_count_as_empty(tmp_path):
    many = BankSize(images=1000, views=200, num_classes=10)
    noise = torch.randint(256, (many.bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    (tmp_path / "noise.f16").write_bytes(noise.numpy().tobytes())
    assert LogitBank(tmp_path / "noise.f16", many).filled() == 0
    fill(LogitBank(tmp_path / "a.f16", SIZE), *range(900))
    (tmp_path / "b.f16").write_bytes((tmp_path / "a.f16").read_bytes())
    assert LogitBank(tmp_path / "b.f16", SIZE).filled() == 0


def peak_of_allocations(call):
    """Bytes that torch's CPU allocator held for a call at its highest."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_reading_takes_no_more_than_twice_the_rows(tmp_path):
    size = BankSize(images=6000, views=1, num_classes=1000)
    bank = LogitBank(tmp_path / "b.f16", size)
    images = torch.arange(size.images)
    rows = 2 * size.images * size.num_classes
    assert rows < peak_of_allocations(lambda: bank.read(images, torch.zeros_like(images))) < 2 * rows
    assert peak_of_allocations(bank.filled) < rows


# --- views ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("pad", [0, 1, 3])
def test_views_are_numbered(pad, flip):
    augment = AugmentConfig(pad=pad, flip=flip)
    count = view_count(augment)
    assert count == (2 * pad + 1) ** 2 * (1 + flip)
    images = torch.randint(1, 256, (3, 2, 6, 6), dtype=torch.uint8)
    indices = torch.tensor([2, 0, 1, 2])
    seen = set()
    for epoch in range(1, 400):
        numbers = view_numbers(indices, augment=augment, seed=5, epoch=epoch)
        seen |= set(numbers.tolist())
        assert torch.equal(
            view(images, indices, augment=augment, seed=5, epoch=epoch),
            numbered_views(images[indices], numbers, augment),
        )
    assert seen == set(range(count))
    every = numbered_views(images[:1].expand(count, -1, -1, -1), torch.arange(count), augment)
    assert len({tuple(picture.flatten().tolist()) for picture in every}) == count


def test_what_is_drawn_anew_has_no_number():
    for augment in ({"crop_scale": [0.5, 1.0]}, {"rotate": 5.0}, {"erase": 0.2}):
        assert view_count(AugmentConfig(**augment)) is None


# --- the teacher that is asked --------------------------------------------------------------------------------------


class Recording(nn.Module):
    """Says what it was shown; remembers it while it takes its time; computes otherwise on more threads."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, images):
        self.remembered = images
        self.shown.append(images.flatten(1)[:, 0].tolist())
        time.sleep(0.01)
        return self.remembered.flatten(1)[:, :2] + torch.get_num_threads()


def pictures(count):
    return torch.arange(count).float()[:, None, None, None].expand(-1, 1, 1, 2)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_teacher_is_always_shown_as_many(threads):
    threads(1)
    model = Recording()
    said = TeacherNetwork(model, "x", torch.device("cpu")).logits(pictures(ON_CPU + 5))
    assert [len(shown) for shown in model.shown] == [ON_CPU, ON_CPU]
    assert model.shown[1] == [*range(ON_CPU, ON_CPU + 5), *[ON_CPU] * (ON_CPU - 5)]
    assert torch.equal(said[:, 0], torch.arange(ON_CPU + 5).half() + 1)


def test_what_the_teacher_says_does_not_depend_on_the_threads(threads):
    asked = TeacherNetwork(Recording(), "x", torch.device("cpu"))
    for number in (1, 3, 2):
        threads(number)
        said = asked.logits(pictures(5 * ON_CPU - 2))
        assert torch.equal(said[:, 0], torch.arange(5 * ON_CPU - 2).half() + 1)
        assert torch.get_num_threads() == number


def test_a_network_that_cannot_be_copied_works_on_one_thread(threads, caplog):
    threads(3)
    model = Recording()
    model.lock = threading.Lock()
    said = TeacherNetwork(model, "x", torch.device("cpu")).logits(pictures(2 * ON_CPU))
    assert torch.equal(said[:, 0], torch.arange(2 * ON_CPU).half() + 1)
    assert "teacher x: runs on one thread, since it cannot be copied" in caplog.text


def test_a_network_of_the_zoo_says_the_same_at_any_place_and_on_any_threads(threads):
    torch.manual_seed(0)
    model = build_configured(ModelConfig(name="resnet8"), num_classes=100).eval()
    images = torch.randn(40, 3, 32, 32)
    asked = TeacherNetwork(model, "x", torch.device("cpu"))
    order = torch.randperm(40)
    threads(1)
    expected = asked.logits(images)
    for number in (1, 4):
        threads(number)
        assert torch.equal(asked.logits(images[order]), expected[order])
        assert torch.equal(asked.logits(images[7:8]), expected[7:8])


@pytest.mark.parametrize(("value", "told"), [(7e4, "70000"), (float("inf"), "inf"), (float("nan"), "nan")])
@pytest.mark.parametrize("has_bank", [True, False])
def test_a_logit_that_float16_has_not_is_refused(teacher, tmp_path, value, told, has_bank):
    state = torch.load(teacher["teacher_checkpoint"])
    state["model"]["classifier.bias"][3] = value
    path = tmp_path / "broken.pt"
    torch.save(state, path)
    config = trial({**teacher, "teacher_checkpoint": str(path)}, tmp_path if has_bank else None)
    with pytest.raises(TeacherError, match=rf"teacher digits_cnn \(.*broken\.pt\): gives a logit of {told}.*65,504"):
        train(config)
    if has_bank:
        dataset = load_dataset(config.data)
        size = bank_size(config.data, config.recipe, dataset)
        assert LogitBank(bank_file(config, dataset), size).filled() == 0


# --- in a training --------------------------------------------------------------------------------------------------

DIGITS = DataConfig(name="digits", test_fraction=0.6, augment={"pad": 1, "flip": True})
"""539 images to train with: eight batches of 64."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(11)
    config = ModelConfig(name="digits_cnn")
    save_weights(build_configured(config, num_classes=10), path)
    return {"teacher": config, "teacher_checkpoint": str(path)}


@pytest.fixture
def asked(monkeypatch):
    """The sizes of all batches that a teacher was shown."""
    asked = []
    load = logits_module.load_teacher

    def counting(*arguments, **options):
        model = load(*arguments, **options)
        model.register_forward_hook(lambda module, inputs, logits: asked.append(len(logits)))
        return model

    monkeypatch.setattr(logits_module, "load_teacher", counting)
    return asked


def trial(teacher, bank=None, data=DIGITS, method="kd", **changes):
    recipe = {"epochs": 3, "batch_size": 64, "lr": 0.05} | changes.pop("recipe", {})
    return TrialConfig(
        data=data,
        student=ModelConfig(name="digits_cnn_tiny"),
        method=method,
        recipe=RecipeConfig(**recipe),
        teacher_bank=None if bank is None else str(bank),
        **teacher,
        **changes,
    )


def weights(result):
    return torch.cat([value.flatten().double() for value in result.model.state_dict().values()])


def test_a_trial_asks_the_teacher_of_each_view_once_and_the_next_trials_not_at_all(teacher, tmp_path, asked):
    config = trial(teacher, tmp_path)
    first = train(config)
    assert sum(asked) % ON_CPU == 0
    numbers = {
        (int(index), int(number))
        for epoch in (1, 2, 3)
        for batch in batches(config, epoch)
        for index, number in zip(
            batch.indices, view_numbers(batch.indices, augment=DIGITS.augment, seed=0, epoch=epoch), strict=True
        )
    }
    (file,) = tmp_path.glob("bank-*.f16")
    assert LogitBank(file, bank_size(DIGITS, config.recipe, load_dataset(DIGITS))).filled() == len(numbers)
    asked.clear()
    again = train(config)
    other = train(trial(teacher, tmp_path, recipe={"lr": 0.02}, method="topkd"))
    assert asked == []
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    train(trial(teacher, tmp_path, seed=1))  # other views, some of them seen by now
    assert asked


def test_a_bank_that_was_filled_on_other_threads_gives_the_same_bits(teacher, tmp_path, monkeypatch, threads):
    """A network whose logits differ by the threads, as those of wide layers do in their last bits."""

    class Threaded(nn.Sequential):
        def forward(self, images):
            return super().forward(images) * torch.get_num_threads()

    def threaded(*, num_classes):
        return Threaded(nn.Flatten(), nn.Linear(64, num_classes))

    monkeypatch.setitem(models._REGISTRY, "threaded", threaded)
    network = ModelConfig(name="threaded")
    save_weights(build_configured(network, num_classes=10), tmp_path / "t.pt")
    taught = {"teacher": network, "teacher_checkpoint": str(tmp_path / "t.pt")}
    config = trial(taught, tmp_path, threads=1)
    threads(3)
    fill_bank(config, torch.device("cpu"), lambda share: None)
    assert torch.equal(weights(train(config)), weights(train(trial(taught, threads=1))))


def batches(config, epoch):
    dataset = load_dataset(config.data)
    return batches_of(config, dataset, dataset.train, epoch)


@pytest.mark.parametrize(
    ("method", "augment"), [("kd", {"rotate": 10.0}), *((m, {"pad": 1, "flip": True}) for m in ("kd", "topkd"))]
)
def test_with_and_without_a_bank_a_training_comes_to_the_same_bits(teacher, tmp_path, method, augment):
    data = DIGITS.model_copy(update={"augment": AugmentConfig(**augment)})
    live, cold, warm = (train(trial(teacher, bank, data, method)) for bank in (None, tmp_path, tmp_path))
    assert torch.equal(weights(live), weights(cold))
    assert torch.equal(weights(live), weights(warm))
    assert live.metrics["val_top1"] == cold.metrics["val_top1"] == warm.metrics["val_top1"]


@pytest.mark.parametrize("augment", [{"pad": 1, "flip": True}, {}, {"rotate": 10.0, "pad": 1}])
def test_a_batch_is_taught_what_the_live_teacher_says_of_it(teacher, tmp_path, augment):
    config = trial(teacher, tmp_path, data=DIGITS.model_copy(update={"augment": AugmentConfig(**augment)}))
    dataset = load_dataset(config.data)
    live = TeacherLogits(config.model_copy(update={"teacher_bank": None}), dataset, dataset.train)
    for _ in ("cold", "warm"):
        banked = TeacherLogits(config, dataset, dataset.train)
        for epoch in (1, 2):
            banked.begin(epoch)
            live.begin(epoch)
            for number, batch in enumerate(batches(config, epoch)):
                expected = live.logits(batch.images, number)
                assert torch.equal(banked.logits(batch.images, number), expected)


def run_and_tell(config, folder):
    """Train, and write down how many rows were asked of a teacher that takes its time."""
    asked, compute = [], TeacherLogits.compute

    def slow(self, images):
        asked.append(len(images))
        time.sleep(0.05)
        return compute(self, images)

    TeacherLogits.compute = slow
    torch.set_num_threads(1)
    result = train(config)
    folder.mkdir()
    (folder / "asked").write_text(str(sum(asked)))
    torch.save(weights(result), folder / "weights.pt")


@pytest.mark.slow
def test_trials_beside_one_another_ask_of_each_view_once(teacher, tmp_path):
    config = trial(teacher, tmp_path)
    beside = [PROCESSES.Process(target=run_and_tell, args=(config, tmp_path / name)) for name in ("a", "b")]
    for process in beside:
        process.start()
    for process in beside:
        process.join(280)
        assert process.exitcode == 0
    dataset = load_dataset(config.data)
    filled = LogitBank(bank_file(config, dataset), bank_size(config.data, config.recipe, dataset)).filled()
    asked = [int((tmp_path / name / "asked").read_text()) for name in ("a", "b")]
    assert sum(asked) == filled > 1000
    one, other = (torch.load(tmp_path / name / "weights.pt") for name in ("a", "b"))
    assert torch.equal(one, other)


def claim_and_wait(path, is_claimed, is_told):
    with LogitBank(path, SIZE).claimed("x"):
        is_claimed.set()
        is_told.wait(120)


def test_what_another_process_has_claimed_is_waited_for_until_it_is_done_or_dead(tmp_path, monkeypatch):
    path = tmp_path / "b.f16"
    own = LogitBank(path, SIZE)
    is_claimed, is_told = PROCESSES.Event(), PROCESSES.Event()
    other = PROCESSES.Process(target=claim_and_wait, args=(path, is_claimed, is_told))
    other.start()
    assert is_claimed.wait(120)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            other.kill()
            other.join()

    monkeypatch.setattr(bank.time, "sleep", sleep)
    with own.claimed("y"):
        assert slept == [], "another's claim of something else is no matter"
    with own.claimed("x"):
        assert len(slept) >= 3
    with own.claimed("x"):
        pass  # it is given back


def test_a_claim_that_is_never_given_back_is_waited_for_no_longer_than_told(tmp_path, monkeypatch):
    path = tmp_path / "b.f16"
    is_claimed, is_told = PROCESSES.Event(), PROCESSES.Event()
    other = PROCESSES.Process(target=claim_and_wait, args=(path, is_claimed, is_told))
    other.start()
    assert is_claimed.wait(120)
    monkeypatch.setattr(bank, "LONGEST_WAIT_FOR_ANOTHER", 0.2)
    with LogitBank(path, SIZE).claimed("x"):
        assert other.is_alive()
    is_told.set()
    other.join(120)


def test_where_there_are_no_locks_nothing_is_waited_for(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    monkeypatch.setattr(bank.time, "sleep", lambda seconds: pytest.fail("waits"))
    with LogitBank(tmp_path / "b.f16", SIZE).claimed("x"):
        pass


def test_a_bank_that_another_batch_size_has_half_filled_gives_the_same_bits(teacher, tmp_path, asked):
    (tmp_path / "a").mkdir()
    config = trial(teacher, tmp_path / "a")
    cold = train(config)
    (tmp_path / "b").mkdir()
    train(trial(teacher, tmp_path / "b", recipe={"batch_size": 48, "epochs": 2}))
    asked.clear()
    half = train(trial(teacher, tmp_path / "b"))
    assert sum(asked) > 0
    assert torch.equal(weights(cold), weights(half))


def test_whether_the_teacher_was_needed_does_not_change_what_a_student_draws(teacher, tmp_path, monkeypatch):
    def with_dropout(*, num_classes):
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, num_classes))

    monkeypatch.setitem(models._REGISTRY, "dropout", with_dropout)
    config = trial(teacher, tmp_path).model_copy(update={"student": StudentConfig(name="dropout")})
    cold, warm = train(config), train(config)
    live = train(config.model_copy(update={"teacher_bank": None}))
    assert torch.equal(weights(cold), weights(warm))
    assert torch.equal(weights(live), weights(warm))


def test_a_trial_that_goes_on_from_its_checkpoint_is_the_same_with_a_bank(teacher, tmp_path):
    kept = tmp_path / "kept"
    whole = train(trial(teacher, tmp_path), lambda epoch, metrics, save: save(kept) if epoch == 1 else None)
    again = train(trial(teacher, tmp_path), resume_from=kept)
    assert torch.equal(weights(whole), weights(again))


def test_what_the_logits_depend_on_is_another_file(teacher, tmp_path):
    config = trial(teacher, tmp_path)
    dataset = load_dataset(DIGITS)
    other = tmp_path / "other.pt"
    torch.manual_seed(12)
    save_weights(build_configured(teacher["teacher"], num_classes=10), other)
    endless = {"augment": AugmentConfig(rotate=5.0)}
    same = [
        config,
        config.model_copy(update={"seed": 9, "method": "topkd"}),
        trial(teacher, tmp_path, recipe={"epochs": 7, "batch_size": 32}),
    ]
    others = [
        config.model_copy(update={"teacher_checkpoint": str(other)}),
        config.model_copy(update={"data": DIGITS.model_copy(update={"split_seed": 3})}),
        config.model_copy(update={"data": DIGITS.model_copy(update={"val_fraction": 0.2})}),
        config.model_copy(update={"data": DIGITS.model_copy(update={"augment": AugmentConfig(pad=1)})}),
        config.model_copy(update={"data": DIGITS.model_copy(update=endless)}),
        config.model_copy(update={"data": DIGITS.model_copy(update=endless), "seed": 1}),
    ]
    assert len({bank_file(c, dataset) for c in same}) == 1
    names = [bank_file(c, dataset) for c in [config, *others]]
    assert len(set(names)) == len(names)
    longer = others[-1].model_copy(update={"recipe": RecipeConfig(epochs=9)})
    assert bank_file(longer, dataset) == names[-1]


def test_another_network_under_the_same_name_and_other_kernels_are_another_file(teacher, tmp_path, monkeypatch):
    def odd(*, num_classes, activation=nn.ReLU):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), activation(), nn.Linear(8, num_classes))

    network = ModelConfig(name="odd")
    config, dataset = trial({**teacher, "teacher": network}, tmp_path), load_dataset(DIGITS)
    names = []
    for factory in (odd, lambda *, num_classes: odd(num_classes=num_classes, activation=nn.Tanh)):
        monkeypatch.setitem(models._REGISTRY, "odd", factory)
        logits_module._fingerprint.cache_clear()
        names.append(bank_file(config, dataset))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    names.append(bank_file(config, dataset))
    assert len(set(names)) == 3


def test_without_room_the_teacher_is_asked_for_every_batch(teacher, tmp_path, asked, monkeypatch, caplog):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    result = train(trial(teacher, tmp_path))
    assert sum(asked) == 3 * (len(load_dataset(DIGITS).train) // 64 * 64)
    assert "the teacher's logits are not cached" in caplog.text
    assert torch.equal(weights(result), weights(train(trial(teacher))))


def test_mixed_images_have_no_bank(teacher, tmp_path):
    config = trial(teacher, tmp_path, data=DIGITS.model_copy(update={"augment": AugmentConfig(mixup=0.2)}))
    assert bank_size(config.data, config.recipe, load_dataset(config.data)) is None
    train(config)
    assert not list(Path(tmp_path).glob("bank-*"))


@pytest.mark.parametrize("augment", [{"pad": 1, "flip": True}, {"rotate": 10.0}])
def test_a_bank_that_was_filled_ahead_is_the_one_that_trials_use(teacher, tmp_path, asked, augment):
    config = trial(teacher, tmp_path, data=DIGITS.model_copy(update={"augment": AugmentConfig(**augment)}))
    shares = []
    bank = fill_bank(config, torch.device("cpu"), shares.append)
    dataset = load_dataset(config.data)
    assert shares[-1] == 1.0
    if "rotate" in augment:  # what an epoch leaves out is not asked for
        assert bank.filled() == 3 * (len(dataset.train) // 64 * 64)
    else:
        assert bank.filled() == len(dataset.train) * 18
    asked.clear()
    filled = train(config)
    assert asked == []
    fill_bank(config, torch.device("cpu"), shares.append)
    assert asked == []
    (tmp_path / "live").mkdir()
    lazily = train(config.model_copy(update={"teacher_bank": str(tmp_path / "live")}))
    assert torch.equal(weights(filled), weights(lazily))


def test_the_bank_of_image_files_is_filled_ahead_where_their_views_can_be_counted(tmp_path, asked):
    for number in range(40):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (90 * (number % 2), 5 * number, 200 - 4 * number)).save(path)
    data = DataConfig(
        name="image_folder",
        root=str(tmp_path / "images"),
        val_fraction=0.2,
        test_fraction=0.2,
        augment=AugmentConfig(pad=1, flip=True),
    )
    network = ModelConfig(name="small_cnn", kwargs={"widths": [4, 8], "strides": [2, 2]})
    save_weights(build_configured(network, num_classes=2), tmp_path / "t.pt")
    teacher = {"teacher": network, "teacher_checkpoint": str(tmp_path / "t.pt")}
    config = trial(teacher, tmp_path, data, recipe={"batch_size": 8}).model_copy(
        update={"student": StudentConfig(**network.model_dump())}
    )
    bank = fill_bank(config, torch.device("cpu"), lambda share: None)
    assert bank.filled() == len(load_dataset(data).train) * 18
    asked.clear()
    filled = train(config)
    assert asked == []
    assert torch.equal(weights(filled), weights(train(config.model_copy(update={"teacher_bank": None}))))


def test_a_longer_training_lengthens_a_bank_of_endless_views(teacher, tmp_path, asked):
    data = DIGITS.model_copy(update={"augment": AugmentConfig(rotate=10.0)})
    train(trial(teacher, tmp_path, data, recipe={"epochs": 2}))
    asked.clear()
    longer = train(trial(teacher, tmp_path, data))
    an_epoch = len(load_dataset(data).train) // 64 * 64
    assert sum(asked) == an_epoch
    assert len(list(tmp_path.glob("bank-*.f16"))) == 1
    assert torch.equal(weights(longer), weights(train(trial(teacher, None, data))))


@pytest.mark.parametrize("batches_at_once", [1, 5])
def test_an_epoch_is_looked_up_by_groups_of_batches(teacher, tmp_path, asked, monkeypatch, batches_at_once):
    whole = train(trial(teacher, tmp_path))
    monkeypatch.setattr(logits_module, "GROUP_BYTES", batches_at_once * 64 * 10 * 2)
    looked_up, read = [], LogitBank.read

    def reading(self, images, views):
        looked_up.append(len(images))
        return read(self, images, views)

    monkeypatch.setattr(LogitBank, "read", reading)
    asked.clear()
    assert torch.equal(weights(whole), weights(train(trial(teacher, tmp_path))))
    assert asked == []
    assert max(looked_up) == batches_at_once * 64
    assert torch.equal(weights(whole), weights(train(trial(teacher, tmp_path / "cold"))))


@pytest.fixture
def not_ours(teacher):
    """A function that fills a bank in two epochs, and then is another user, who may only read all of it."""
    place = Path(tempfile.mkdtemp())
    shutil.copy(teacher["teacher_checkpoint"], place / "teacher.pt")
    config = trial({**teacher, "teacher_checkpoint": str(place / "teacher.pt")}, place / "bank", recipe={"epochs": 2})

    def prepare(mode):
        train(config)
        for path in (place, place / "bank"):
            path.chmod(0o555)
        for path in (place / "bank").iterdir():
            path.chmod(mode)
        (place / "teacher.pt").chmod(0o444)
        if os.geteuid() == 0:
            os.seteuid(65534)
        return config

    yield prepare
    os.seteuid(os.getuid())
    for path in (place, place / "bank"):
        path.chmod(0o755)
    shutil.rmtree(place)


def test_a_bank_that_cannot_be_written_is_read(not_ours, asked):
    config = not_ours(0o444)
    asked.clear()
    again = train(config)
    assert asked == []
    longer = config.model_copy(update={"recipe": config.recipe.model_copy(update={"epochs": 3})})
    third = train(longer)
    assert 0 < sum(asked) <= 8 * 64
    live = config.model_copy(update={"teacher_bank": None})
    assert torch.equal(weights(again), weights(train(live)))
    assert torch.equal(weights(third), weights(train(live.model_copy(update={"recipe": longer.recipe}))))
    with pytest.raises(ValueError, match=r"bank-.*: can be read but not filled"):
        fill_bank(config, torch.device("cpu"), lambda share: None)


def test_a_lock_that_cannot_be_opened_is_not_needed(tmp_path, monkeypatch):
    opened = os.open

    def refusing(path, flags, *mode, **options):
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(bank.os, "open", refusing)
    own = LogitBank(tmp_path / "b.f16", SIZE)
    for _ in range(2):
        with own.claimed("x"):
            fill(own, 3)
    assert own.filled() == 1


def test_a_bank_says_beside_it_what_it_holds(teacher, tmp_path):
    train(trial(teacher, tmp_path / "key", recipe={"epochs": 1}))
    (there,) = stored_banks(tmp_path)
    assert there.content.items() >= in_config(DIGITS, teacher["teacher"], 0).items()
    there.remove()
    assert not list((tmp_path / "key").iterdir())


def test_what_has_no_bank_cannot_be_filled(teacher):
    with pytest.raises(ValueError, match="there is no bank for this space"):
        fill_bank(trial(teacher), torch.device("cpu"), lambda share: None)
