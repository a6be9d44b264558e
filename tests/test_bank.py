"""The bank of a teacher's logits: what a live teacher would have said, said once."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

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
from tune_topkd.teacher import TeacherLogits
from tune_topkd.teacher import bank
from tune_topkd.teacher import bank_file
from tune_topkd.teacher import bank_size
from tune_topkd.teacher import fill_bank
from tune_topkd.teacher import has_room
from tune_topkd.teacher import logits as logits_module
from tune_topkd.teacher.bank import FILL_BATCH
from tune_topkd.train import train

SIZE = BankSize(images=50, views=18, num_classes=10)


def said(places):
    """What a teacher of the tests says of a row."""
    return torch.sin(places[:, None] * torch.arange(1.0, 11.0)) * 20


def rows(*places):
    places = torch.tensor(places)
    return places // SIZE.views, places % SIZE.views


def fill(bank, *places):
    asked = []

    def ask(some):
        asked.append(some.tolist())
        return said(torch.tensor(places)[some])

    return bank.fill(*rows(*places), ask), asked


# --- the file -------------------------------------------------------------------------------------------------------


def test_what_was_filled_is_read_by_all_and_nothing_else_is_there(tmp_path):
    one, other = (LogitBank(tmp_path / "b.f16", SIZE) for _ in range(2))
    assert not one.read(*rows(*range(900)))[1].any()
    filled, asked = fill(one, 7, 899, 0)
    assert [len(some) for some in asked] == [FILL_BATCH]
    assert asked[0][:3] == [0, 1, 2]
    assert torch.equal(filled, said(torch.tensor([7, 899, 0])).half())
    given, there = other.read(*rows(0, 1, 7, 899))
    assert there.tolist() == [True, False, True, True]
    assert torch.equal(given[there], said(torch.tensor([0, 7, 899])).half())
    assert other.filled() == 3
    assert (tmp_path / "b.f16").stat().st_size == SIZE.bytes


def test_the_teacher_is_always_shown_as_many(tmp_path):
    bank = LogitBank(tmp_path / "b.f16", SIZE)
    _, asked = fill(bank, *range(FILL_BATCH + 5))
    assert [len(some) for some in asked] == [FILL_BATCH, FILL_BATCH]
    assert asked[1] == [*range(FILL_BATCH, FILL_BATCH + 5), *[FILL_BATCH] * (FILL_BATCH - 5)]


@pytest.mark.parametrize("special", [0.0, -0.0, float("inf"), float("nan")])
def test_any_logits_are_kept_as_they_are(tmp_path, special):
    bank = LogitBank(tmp_path / "b.f16", SIZE)
    bank.fill(*rows(5), lambda some: torch.full((len(some), 10), special))
    given, there = bank.read(*rows(5))
    assert there.all()
    assert torch.equal(given.view(torch.int16), torch.full((1, 10), special).half().view(torch.int16))


@pytest.mark.parametrize("word", range(11))
def test_a_row_that_is_not_as_it_was_written_counts_as_empty(tmp_path, word):
    bank = LogitBank(tmp_path / "b.f16", SIZE)
    fill(bank, 3, 4, 5)
    with open(tmp_path / "b.f16", "r+b") as file:
        file.seek((4 * 11 + word) * 2)
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
    context = multiprocessing.get_context("spawn")
    bank = LogitBank(tmp_path / "b.f16", SIZE)
    for _ in range(3):
        writers = [context.Process(target=fill_for_ever, args=(tmp_path / "b.f16",)) for _ in range(2)]
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
    (tmp_path / "b.f16").touch()
    assert has_room(tmp_path / "b.f16", SIZE)


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


# --- in a training --------------------------------------------------------------------------------------------------

DIGITS = DataConfig(name="digits", augment={"pad": 1, "flip": True})


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
    assert sum(asked) % FILL_BATCH == 0
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


def batches(config, epoch):
    dataset = load_dataset(config.data)
    return batches_of(config, dataset, dataset.train, epoch)


@pytest.mark.parametrize("method", ["kd", "topkd"])
def test_with_and_without_a_bank_a_training_comes_to_the_same(teacher, tmp_path, method):
    live, banked = train(trial(teacher, method=method)), train(trial(teacher, tmp_path, method=method))
    assert banked.metrics["val_top1"] == pytest.approx(live.metrics["val_top1"], abs=1.0)
    assert banked.metrics["train_loss"] == pytest.approx(live.metrics["train_loss"], rel=2e-3)
    assert functional.cosine_similarity(weights(live), weights(banked), dim=0) > 0.9999


@pytest.mark.slow
def test_with_and_without_a_bank_glyphs_come_to_the_same(tmp_path):
    data = DataConfig(name="glyphs", kwargs={"train_images": 10_000, "test_images": 100}, val_fraction=0.2)
    network = ModelConfig(name="small_cnn", kwargs={"widths": [16, 32, 64], "strides": [2, 2, 2]})
    student = StudentConfig(name=network.name, kwargs=network.kwargs)
    recipe = RecipeConfig(epochs=8, lr=0.05, schedule="cosine")  # at the space's 0.2 training is so chaotic that it
    common = {"data": data, "student": student, "recipe": recipe}  # tells more of itself than of the rounding
    save_weights(train(TrialConfig(**common, method="ce")).model, tmp_path / "teacher.pt")
    taught = {"teacher": network, "teacher_checkpoint": str(tmp_path / "teacher.pt")}
    live, banked = (train(TrialConfig(**common, **taught, teacher_bank=b)) for b in (None, str(tmp_path)))
    assert live.metrics["val_top1"] > 15  # it has learnt something; chance is 1
    assert banked.metrics["val_top1"] == pytest.approx(live.metrics["val_top1"], abs=1.0)
    assert banked.metrics["train_loss"] == pytest.approx(live.metrics["train_loss"], rel=5e-3)


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
                torch.testing.assert_close(banked.logits(batch.images, number), expected, rtol=2e-3, atol=1e-4)


def run_and_tell(config, folder):
    """Train, and write down how many rows were asked of a teacher that takes its time."""
    asked, fill = [], LogitBank.fill

    def slow(self, images, views, ask):
        asked.append(len(images))
        time.sleep(0.05)
        return fill(self, images, views, ask)

    LogitBank.fill = slow
    torch.set_num_threads(1)
    result = train(config)
    folder.mkdir()
    (folder / "asked").write_text(str(sum(asked)))
    torch.save(weights(result), folder / "weights.pt")


def test_trials_beside_one_another_ask_of_each_view_once(teacher, tmp_path):
    config = trial(teacher, tmp_path)
    context = multiprocessing.get_context("spawn")
    beside = [context.Process(target=run_and_tell, args=(config, tmp_path / name)) for name in ("a", "b")]
    for process in beside:
        process.start()
    for process in beside:
        process.join(120)
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
    context = multiprocessing.get_context("spawn")
    is_claimed, is_told = context.Event(), context.Event()
    other = context.Process(target=claim_and_wait, args=(path, is_claimed, is_told))
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
    context = multiprocessing.get_context("spawn")
    is_claimed, is_told = context.Event(), context.Event()
    other = context.Process(target=claim_and_wait, args=(path, is_claimed, is_told))
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

    monkeypatch.setattr(bank.fcntl, "lockf", unsupported)
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
    assert functional.cosine_similarity(weights(live), weights(warm), dim=0) > 0.9999


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


def test_without_room_the_teacher_is_asked_for_every_batch(teacher, tmp_path, asked, monkeypatch, caplog):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    result = train(trial(teacher, tmp_path))
    assert sum(asked) == 3 * (len(load_dataset(DIGITS).train) // 64 * 64)
    assert "no bank of the teacher's logits" in caplog.text
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


def test_what_has_no_bank_cannot_be_filled(teacher):
    with pytest.raises(ValueError, match="there is no bank for this space"):
        fill_bank(trial(teacher), torch.device("cpu"), lambda share: None)
