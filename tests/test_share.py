"""What the trials on a node share, and what each is given of it: the dataset's file, CPU threads, a GPU's memory."""

import errno
import logging
from pathlib import Path

import formulas
import pytest
import test_train
import torch
from PIL import Image

from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.config import TrialConfig
from tune_topkd.data import load_dataset
from tune_topkd.data import load_saved
from tune_topkd.data import save_dataset
from tune_topkd.data import saving
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.ledger import Share
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import prepare
from tune_topkd.train import GPU_PART
from tune_topkd.train import LONGEST_WAIT_FOR_MEMORY
from tune_topkd.train import Training
from tune_topkd.train import device
from tune_topkd.train import in_share
from tune_topkd.train import loop
from tune_topkd.train import train

DIGITS = test_train.DIGITS
taught = test_train.teacher
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def trial(method: str = "ce", epochs: int = 2, **changes) -> TrialConfig:
    return test_train.trial(method, recipe={"epochs": epochs}, **changes)


@pytest.fixture
def dataset_file(tmp_path) -> str:
    """The digits, as a sweep writes them for its trials."""
    assert save_dataset(DIGITS, load_dataset(DIGITS), tmp_path / "dataset.pt")
    return str(tmp_path / "dataset.pt")


def run(config: TrialConfig) -> tuple[list[dict[str, float]], torch.Tensor]:
    """The metrics of every epoch but for times, and all weights at the end."""
    metrics = []
    result = train(config, lambda epoch, told, save: metrics.append(test_train.without_times(told)))
    return metrics, torch.cat([value.flatten().double() for value in result.model.state_dict().values()])


# --- the dataset's file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ce", "topkd"])
@pytest.mark.parametrize("selection", ["validation", "best_test_epoch"])
def test_a_trial_that_maps_the_dataset_is_the_one_that_reads_it(tmp_path: Path, taught, monkeypatch, method, selection):
    data = DIGITS.model_copy(update={"selection": selection})
    config = trial(method, data=data, threads=1, **(taught if method != "ce" else {}))
    metrics, weights = run(config)
    assert len(metrics) == 2
    assert save_dataset(data, load_dataset(data), tmp_path / "d.pt")

    def read_anew(config):
        raise AssertionError("the dataset is read although it is in the file")

    monkeypatch.setattr(loop, "load_dataset", read_anew)
    mapped_metrics, mapped_weights = run(config.model_copy(update={"dataset_file": str(tmp_path / "d.pt")}))
    assert mapped_metrics == metrics
    assert torch.equal(mapped_weights, weights)


def test_a_trial_trains_on_the_memory_of_the_file(dataset_file):
    made = Training(trial(dataset_file=dataset_file), CPU)
    mapped = load_saved(DIGITS, Path(dataset_file))
    assert made.train_split.images.data_ptr() == mapped.train.images.data_ptr()
    assert made.val_split.images.data_ptr() == mapped.val.images.data_ptr()
    assert made.train_split.images.data_ptr() != load_dataset(DIGITS).train.images.data_ptr()


def test_a_trial_whose_file_is_gone_reads_the_dataset_anew_and_says_so(dataset_file, caplog):
    expected, weights = run(trial())
    Path(dataset_file).unlink()
    with caplog.at_level(logging.WARNING):
        metrics, same = run(trial(dataset_file=dataset_file))
    assert metrics == expected
    assert torch.equal(weights, same)
    (told,) = caplog.messages
    assert told.startswith("the dataset is read anew: ")
    assert dataset_file in told


def test_a_trial_refuses_the_file_of_another_dataset(dataset_file):
    other = DIGITS.model_copy(update={"split_seed": 1})
    with pytest.raises(ValueError, match=rf"^{dataset_file}: holds another dataset"):
        train(trial(data=other, dataset_file=dataset_file))


SWEEP = formulas.sweep_config()


def share_dataset(folder: Path, note=lambda text: None):
    return prepare.dataset_file(SWEEP, folder, note)


def test_a_sweep_has_the_dataset_in_a_file_while_it_runs(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s").mkdir()
    with share_dataset(Path("s")) as path:
        assert path == str(tmp_path / "s" / "dataset.pt")
        dataset = load_saved(SWEEP.data, Path(path))
        assert torch.equal(dataset.train.images, load_dataset(SWEEP.data).train.images)
    assert list((tmp_path / "s").iterdir()) == []


def test_the_dataset_file_is_gone_after_a_sweep_that_broke_off(tmp_path: Path):
    def break_off():
        with share_dataset(tmp_path) as path:
            assert Path(path).is_file()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_left", [False, True])
def test_a_disk_without_room_for_the_dataset_is_a_note_and_no_end(tmp_path: Path, monkeypatch, is_left):
    if is_left:  # by a sweep that was killed
        (tmp_path / "dataset.pt").write_bytes(b"old")

    def refuse(content, file):
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.torch, "save", refuse)
    told = []
    with share_dataset(tmp_path, told.append) as path:
        assert path is None
    assert told == [f"each worker reads the dataset by itself: {tmp_path / 'dataset.pt'}: No space left on device"]
    assert list(tmp_path.iterdir()) == []


def test_images_that_stay_in_their_files_have_no_dataset_file_and_no_note(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tune_topkd.data.save_dataset", lambda config, dataset, path: False)
    told = []
    with share_dataset(tmp_path, told.append) as path:
        assert path is None
    assert told == []


def test_a_dataset_file_that_cannot_be_removed_hides_nothing(tmp_path: Path, monkeypatch):
    def read_only(path, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def break_off():
        with share_dataset(tmp_path):
            monkeypatch.setattr(Path, "unlink", read_only)
            raise RuntimeError("nothing is lost")

    with pytest.raises(RuntimeError, match="nothing is lost"):
        break_off()


def test_every_trial_of_a_sweep_is_told_of_the_dataset_file(tmp_path: Path):
    """Between the sweep's ledger and its trials, without Ray."""
    told = []

    class Watched(SimulatedExecutor):
        def run(self, search, work):
            told.append((work.files.dataset_file, Path(work.files.dataset_file).is_file()))
            return search.stopped()

    raw = {
        **SWEEP.model_dump(mode="json"),
        "teacher": None,
        "method": "ce",
        "loss": {},
        "relative": None,
        "baselines": None,
    }
    raw["space"] = {"lr": raw["space"]["lr"]}
    Sweep.new(raw, "s", Workspace(tmp_path, mlflow_uri="")).run(executor=Watched(lambda trial, epoch: {}))
    path = tmp_path / "s" / "dataset.pt"
    assert told == [(str(path), True)]
    assert not path.exists()


# --- threads and workers --------------------------------------------------------------------------------------------


def test_a_trial_keeps_to_its_threads_while_it_runs_and_gives_torch_s_back():
    before = torch.get_num_threads()
    seen = []
    train(trial(threads=before + 1), lambda epoch, metrics, save: seen.append(torch.get_num_threads()))
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before


def test_a_trial_that_was_given_no_threads_has_torch_s():
    before = torch.get_num_threads()
    seen = []
    train(trial(epochs=1), lambda epoch, metrics, save: seen.append(torch.get_num_threads()))
    assert seen == [before] == [torch.get_num_threads()]


def test_torch_s_threads_are_given_back_after_an_exception():
    before = torch.get_num_threads()

    def stop(epoch, metrics, save):
        assert torch.get_num_threads() == before + 1
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(trial(threads=before + 1), stop)
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="needs both teacher and teacher_checkpoint"):
        train(trial("kd", threads=before + 1))
    assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory) -> DataConfig:
    """Images in files, which are decoded batch by batch."""
    folder = tmp_path_factory.mktemp("pictures")
    for label in range(2):
        (folder / f"class{label}").mkdir()
        for number in range(5):
            Image.new("RGB", (8, 8), (80 * label, 10 * number, 0)).save(folder / f"class{label}" / f"{number}.png")
    known = {"mean": [0.5] * 3, "std": [0.5] * 3}  # else the images are decoded for them
    return DataConfig(name="image_folder", root=str(folder), val_fraction=0.2, test_fraction=0.4, **known)


@pytest.mark.parametrize(
    ("threads", "workers", "expected"),
    [(None, None, 0), (1, None, 0), (2, None, 2), (5, None, 5), (3, 0, 0), (1, 2, 2), (None, 2, 2), (3, 1, 1)],
)
def test_a_trial_that_decodes_has_as_many_workers_as_threads_unless_the_yaml_says(
    picture_folder, threads, workers, expected
):
    data = picture_folder.model_copy(update={"workers": workers})
    student = ModelConfig(name="small_cnn", kwargs={"widths": [4, 8], "strides": [2, 2]})
    made = Training(trial(data=data, student=student, threads=threads), CPU)
    assert (made.train_split.workers, made.val_split.workers) == (expected, expected)
    assert made.config.data.workers == workers


@pytest.mark.parametrize(("workers", "expected"), [(None, 0), (0, 0), (2, 2)])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_images_in_memory_have_workers_only_where_the_yaml_says_so(dataset_file, workers, expected, is_mapped):
    data = DIGITS.model_copy(update={"workers": workers})
    made = Training(trial(data=data, threads=3, dataset_file=dataset_file if is_mapped else None), CPU)
    assert (made.train_split.workers, made.val_split.workers) == (expected, expected)


def test_a_checkpoint_is_gone_on_from_with_another_share_and_other_files(tmp_path: Path, taught, dataset_file):
    (tmp_path / "bank").mkdir()
    (tmp_path / "other").mkdir()
    given = {"threads": 1, "gpu_share": 0.5, "dataset_file": dataset_file, "teacher_bank": str(tmp_path / "bank")}
    config = trial("kd", **taught, **given)
    kept = tmp_path / "kept"
    train(config, lambda epoch, metrics, save: save(kept) if epoch == 1 else None)
    changes = [
        {"threads": 2},
        {"threads": None},
        {"gpu_share": 1.0},
        {"dataset_file": None},
        {"teacher_bank": None},
        {"teacher_bank": str(tmp_path / "other")},
        {"data": DIGITS.model_copy(update={"workers": 2})},
    ]
    for change in changes:
        epochs = []
        again = config.model_copy(update=change)
        assert train(again, lambda epoch, metrics, save: epochs.append(epoch), resume_from=kept).epoch == 2  # noqa: B023
        assert epochs == [2], change
    with pytest.raises(ValueError, match="another config: seed was 0 and is now 1"):
        train(config.model_copy(update={"seed": 1}), resume_from=kept)


# --- a GPU's memory -------------------------------------------------------------------------------------------------

GB = 10**9


class Memory:
    """A GPU of 80 GB as torch and the clock show it: what is free at each look, the last one for ever."""

    def __init__(self, *free: float):
        self.free = list(free)
        self.held = 0.0
        """GB that this process holds and `empty_cache` lets go."""
        self.now = 1000.0
        self.slept: list[float] = []
        self.fractions: list[tuple[float, torch.device]] = []

    def mem_get_info(self, device):
        assert device == GPU
        assert self.fractions, "the limit is set before anything else of the share is seen to"
        free = self.free.pop(0) if len(self.free) > 1 else self.free[0]
        return int((free - self.held) * GB), 80 * GB

    def empty_cache(self):
        self.held = 0.0

    def set_fraction(self, fraction, device):
        self.fractions.append((fraction, device))

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept.append(seconds)


@pytest.fixture
def memory(monkeypatch):
    """Gives torch and `train` a GPU with so many GB free at each look."""

    def memory(*free: float) -> Memory:
        fake = Memory(*free)
        monkeypatch.setattr(torch.cuda, "mem_get_info", fake.mem_get_info)
        monkeypatch.setattr(torch.cuda, "empty_cache", fake.empty_cache)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fake.set_fraction)
        monkeypatch.setattr(device, "time", fake)
        return fake

    return memory


@pytest.mark.parametrize(("share", "fraction"), [(1.0, 1.0), (0.5, GPU_PART * 0.5), (0.25, GPU_PART * 0.25)])
def test_a_trial_may_allocate_its_share_of_a_gpu_less_what_the_context_takes(memory, share, fraction, caplog):
    fake = memory(79)
    with in_share(trial(gpu_share=share), GPU):
        assert fake.fractions == [(fraction, GPU)]
    assert GPU_PART < 1
    assert fake.slept == []
    assert caplog.messages == []


def test_a_training_that_was_given_no_share_takes_what_it_needs_and_waits_for_nothing(memory):
    fake = memory(0)
    with in_share(trial(), GPU):
        assert (fake.fractions, fake.slept) == ([(1.0, GPU)], [])


def test_without_a_part_of_a_gpu_a_training_is_on_the_cpu(monkeypatch):
    monkeypatch.setattr(device, "default_device", lambda: GPU)
    assert [device.device_of(trial(gpu_share=share)) for share in (0.0, 0.25, 1.0, None)] == [CPU, GPU, GPU, GPU]
    assert train(trial(epochs=1, gpu_share=0.0)).epoch == 1  # on a GPU that is not there it could not


def test_on_the_cpu_nothing_is_asked_of_a_gpu(memory):
    fake = memory(0)
    with in_share(trial(gpu_share=0.5), CPU):
        assert (fake.fractions, fake.slept) == ([], [])


@pytest.mark.parametrize(("share", "enough"), [(1.0, 64), (0.5, 32), (0.25, 16)])
def test_a_trial_waits_until_most_of_its_share_is_free(memory, caplog, share, enough):
    fake = memory(1, enough - 1, enough - 0.001, enough, 0)
    with in_share(trial(gpu_share=share), GPU):
        assert len(fake.slept) == 3
        assert fake.free == [0], "it looks no more when there is enough"
    assert caplog.messages == []


def test_what_the_process_itself_still_holds_is_not_waited_for(memory):
    fake = memory(79)
    fake.held = 70.0
    with in_share(trial(gpu_share=0.5), GPU):
        assert fake.slept == []


def test_a_trial_goes_on_with_less_after_a_while_and_says_so(memory, caplog):
    fake = memory(7.25)
    with caplog.at_level(logging.WARNING), in_share(trial(gpu_share=0.5), GPU):
        assert LONGEST_WAIT_FOR_MEMORY <= sum(fake.slept) <= LONGEST_WAIT_FOR_MEMORY + 2
    assert caplog.messages == ["only 7.2 of the GPU's 80.0 GB are free: going on with less"]


def test_threads_are_given_back_when_waiting_for_the_gpu_is_broken_off(memory, monkeypatch):
    fake = memory(1)

    def interrupted(seconds):
        raise KeyboardInterrupt

    fake.sleep = interrupted
    before = torch.get_num_threads()
    try:
        with pytest.raises(KeyboardInterrupt), in_share(trial(threads=before + 1, gpu_share=0.5), GPU):
            raise AssertionError("there is no memory yet")
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("share", "threads", "gpu_share", "ranks"),
    [
        (Share(1.0, 0.0), 1, 0.0, 1),
        (Share(0.5, 0.0), 1, 0.0, 1),
        (Share(2.5, 0.0), 2, 0.0, 1),
        (Share(8.0, 1.0), 8, 1.0, 1),
        (Share(4.0, 0.2), 4, 0.2, 1),
        (Share(4.0, 2.0), 4, 1.0, 2),
    ],
)
def test_what_a_trial_is_told_of_any_share(share, threads, gpu_share, ranks):
    from tune_topkd.execution.cluster import trial_part

    assert trial_part(share) == {"threads": threads, "gpu_share": gpu_share, "ranks": ranks}
    trial(**trial_part(share))  # is what a config can have
