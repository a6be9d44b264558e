"""What all trials of a sweep share: the dataset, the teacher, the bank of its logits, each trial's share of a node."""

import contextlib
import logging
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from typing import TypeVar

from tune_topkd.config import AUTO
from tune_topkd.config import NO_FILES
from tune_topkd.config import ConfigError
from tune_topkd.config import PairConfig
from tune_topkd.config import Problem
from tune_topkd.config import SharedFiles
from tune_topkd.config import SweepConfig
from tune_topkd.config import TrialConfig
from tune_topkd.ledger import Share
from tune_topkd.storage import StoreError
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.wording import counted
from tune_topkd.sweep.workspace import DATASET_FILE
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.sweep.workspace import with_share

if TYPE_CHECKING:
    from tune_topkd.execution import Executor
    from tune_topkd.teacher import Teacher

_log = logging.getLogger(__name__)

PairT = TypeVar("PairT", bound=PairConfig)


def ready_data(config: PairConfig) -> None:
    """Read the data once: what is missing or wrong with it is found before anything is spent on it.

    Raises:
        ConfigError: it cannot be had as the config says.
    """
    from tune_topkd.data import load_dataset

    try:
        load_dataset(config.data)
    except ValueError as error:
        raise ConfigError("data", [Problem(key="", rule=str(error))]) from error


def image_counts(config: PairConfig) -> dict[str, int]:
    """How many images the splits of data that is ready have."""
    from tune_topkd.data import load_dataset

    found = load_dataset(config.data)
    return {"train": len(found.train), "val": len(found.val), "test": len(found.test)}


def data_line(config: PairConfig, images: Mapping[str, int]) -> str:
    """What a person is told of data that is ready."""
    train, val, test = (f"{images[split]:,}" for split in ("train", "val", "test"))
    return f"data {config.data.name}: {train} images to train on, {val} to choose by, {test} in the test set"


def ready_teacher(
    config: PairConfig, workspace: Workspace, watchers: Watchers, *, measure: bool = False
) -> "Teacher | None":
    """The teacher, trained first if need be; None if the config has none.

    Args:
        config: whose teacher.
        workspace: where teachers are kept.
        watchers: are told of its training, and how good it is.
        measure: it on the whole validation split, even if that took long and was done before.

    Raises:
        ConfigError: it cannot be had as the config says.
    """
    if config.teacher is None:
        return None
    from tune_topkd.teacher import ensure_teacher
    from tune_topkd.teacher import teacher_key
    from tune_topkd.train import default_device
    from tune_topkd.train import train

    name, recipe = config.teacher.name, config.teacher.recipe
    with watchers.phase(f"teacher {name}") as show:

        def progress(epoch: int, metrics: Mapping[str, float]) -> None:
            if recipe is not None:
                top1 = next((f", {n} {v:.2f} %" for n, v in metrics.items() if n.endswith("_top1")), "")
                show(f"training the teacher {name}: epoch {epoch}/{recipe.epochs}{top1}")

        try:
            if workspace.remote is not None:
                workspace.remote.bring_teacher(teacher_key(config))
            teacher = ensure_teacher(
                config, workspace.teachers, train, progress, device=default_device(), measure=measure
            )
            if workspace.remote is not None:
                workspace.remote.put_teacher(teacher.key, is_new=not teacher.was_cached)
        except StoreError:
            raise
        except ValueError as error:
            raise ConfigError("teacher", [Problem(key="", rule=str(error))]) from error
    how = "found" if teacher.was_cached else "trained"
    when = f", measured {teacher.measured}" if teacher.measured else ""
    if config.data.selection == "all_training":
        watchers.info(f"teacher {name}: {how} on all images but the test set's")
    else:
        watchers.info(f"teacher {name}: {how}, validation top-1 {teacher.val_top1:.2f} %{when}")
    return teacher


def teacher_files(
    teacher: "Teacher | None",
    config: PairConfig,
    workspace: Workspace,
    watchers: Watchers,
    seed: int,
    *,
    once: bool = False,
) -> SharedFiles:
    """The file of the teacher's weights, and the folder of the bank of its logits, if there is to be one.

    Args:
        teacher: as `ready_teacher` gives it.
        config: whose teacher.
        workspace: where teachers are kept.
        watchers: are told why the teacher runs on every batch, if it does.
        seed: of the trainings; a bank of endless views is for one seed.
        once: for one training alone.
    """
    if teacher is None:
        return NO_FILES
    folder = workspace.teachers / teacher.key
    files = SharedFiles(teacher_checkpoint=str(teacher.path), teacher_bank=str(folder))
    trial = trial_with(config, files, seed)
    why_not = no_bank(config, trial if once else _on_a_trials_device(config, trial), once)
    if why_not:
        watchers.info(f"teacher logits: the teacher runs on every batch: {why_not}")
    return files.model_copy(update={"teacher_bank": None}) if why_not else files


def no_bank(config: PairConfig, trial: TrialConfig, once: bool = False) -> str:
    """Why there is no bank of the teacher's logits; nothing if there is one."""
    from tune_topkd.data import load_dataset
    from tune_topkd.data import view_count
    from tune_topkd.teacher import bank_file
    from tune_topkd.teacher import bank_size
    from tune_topkd.teacher import has_room
    from tune_topkd.train import device_of

    assert config.teacher is not None, "it has a bank"
    if not config.teacher.bank:
        return "teacher.bank is false"
    dataset = load_dataset(config.data)
    size = bank_size(config.data, config.recipe, dataset)
    if size is None:
        return "mixup shows each image once"
    path = bank_file(trial, dataset, device_of(trial))
    if once and view_count(config.data.augment) is None and not path.exists():
        return "a single training sees each view once"
    if not has_room(path, size):
        return (
            f"a bank of {size.images:,} images × {size.views} views would take {size.bytes / 1e9:,.1f} GB, and with it "
            "banks more than half of the disk; `teacher --prune` removes those that no sweep uses"
        )
    return ""


def fill_bank(config: PairConfig, files: SharedFiles, seed: int, workspace: Workspace, watchers: Watchers) -> None:
    """Run the teacher on all that its bank lacks; may be killed and called again. Runs in a store keep the bank there.

    Raises:
        ConfigError: there is to be no bank, or it cannot be filled.
        StoreError: the store refuses.
    """
    from tune_topkd.data import load_dataset
    from tune_topkd.teacher import bank_file
    from tune_topkd.teacher import fill_bank as fill
    from tune_topkd.train import device_of

    if files.teacher_bank is None:
        raise ConfigError("--fill-bank", [Problem(key="teacher", rule="has no bank for this space")])
    trial = _on_a_trials_device(config, trial_with(config, files, seed))
    remote = workspace.remote
    if remote is not None:
        remote.bring_bank(bank_file(trial, load_dataset(config.data), device_of(trial)))
    with watchers.phase("filling the bank") as show:
        try:
            bank = fill(trial, device_of(trial), lambda share: show(f"filling the bank: {share:.0%}"))
        except ValueError as error:
            raise ConfigError("--fill-bank", [Problem(key="teacher", rule=str(error))]) from error
    watchers.info(f"bank: {bank.filled():,} views in {bank.path}")
    if remote is not None:
        remote.put_bank(bank.path)
        watchers.info(f"bank: in {remote.uri}, from where each node fetches it once")


def _on_a_trials_device(config: PairConfig, trial: TrialConfig) -> TrialConfig:
    """A bank is of the kind of device that computed it: the trials' may be the CPU though there is a GPU here."""
    on_cpu = isinstance(config, SweepConfig) and config.sweep.gpus_per_trial == 0
    return trial.model_copy(update={"gpu_share": 0.0}) if on_cpu else trial


def trial_with(config: PairConfig, files: SharedFiles, seed: int) -> TrialConfig:
    """The training that a pair's config describes by itself."""
    return TrialConfig(
        data=config.data,
        student=config.student,
        teacher=config.teacher.model if config.teacher and files.teacher_checkpoint else None,
        **files.model_dump(),
        method=config.method,
        loss=config.loss,
        recipe=config.recipe,
        seed=seed,
    )


def packed(config: SweepConfig, files: SharedFiles, executor: "Executor", watchers: Watchers) -> SweepConfig:
    """The config with each trial's share of a node, measured where it says `auto`.

    Raises:
        ResourceError: no trial can be run.
    """
    settings = config.sweep
    if AUTO not in (settings.cpus_per_trial, settings.gpus_per_trial):
        return config
    from tune_topkd.train import Probe

    trial = trial_with(config, files, settings.seed)
    if (sizes := config.space.get("batch_size")) is not None:  # the largest takes the most memory
        largest = max(value for value in (*(sizes.choices or ()), sizes.high) if isinstance(value, int | float))
        trial = trial.model_copy(update={"recipe": trial.recipe.model_copy(update={"batch_size": int(largest)})})
    with watchers.phase("measuring how many trials to run at once"):
        tried = executor.measure(config, trial, Probe)
    best = tried[0]
    rates = ", ".join(f"{p.at_once}: {p.images_per_second:,.0f}" for p in sorted(tried, key=lambda p: p.at_once))
    text = f"packing: {counted(best.at_once, 'trial')} at once, each on {counted(best.share.cpus, 'CPU')}"
    text += f" and {counted(best.share.gpus, 'GPU')}" if best.share.gpus else ""
    watchers.info(f"{text} (trials: images/s of all; {rates})")
    return with_share(config, Share(best.share.cpus, best.share.gpus))


def for_the_test(config: PairT) -> PairT:
    """The config of trainings on all images but the test set's, which is read at their end."""
    return _selecting(config, "test_at_end")


def test_teacher(config: PairConfig, workspace: Workspace, watchers: Watchers) -> "Teacher | None":
    """The teacher of trainings for the test set; None if the config has none.

    One that is trained by its recipe learns from all images that its students do, as those of the field's tables have.

    Raises:
        ConfigError: it cannot be had as the config says.
    """
    if config.teacher is None or config.teacher.checkpoint is not None:
        return ready_teacher(config, workspace, watchers)
    return ready_teacher(_selecting(config, "all_training"), workspace, watchers)


def _selecting(config: PairT, selection: str) -> PairT:
    return config.model_copy(update={"data": config.data.model_copy(update={"selection": selection})})


@contextlib.contextmanager
def dataset_file(
    config: SweepConfig, folder: Path, note: Callable[[str], None], name: str = DATASET_FILE
) -> Iterator[str | None]:
    """The dataset in a file, for as long as this lasts: the trials on a node map it, and hold its images once.

    Args:
        config: the sweep's.
        folder: the sweep's.
        name: of the file.
        note: is told why each worker reads the dataset by itself, if it has to.
    """
    from tune_topkd.data import load_dataset
    from tune_topkd.data import save_dataset

    path = folder / name
    try:
        for left in folder.glob(f".{name}.*"):  # of a driver that was killed as it wrote
            left.unlink()
        is_written = save_dataset(config.data, load_dataset(config.data), path)
    except OSError as error:
        is_written = False
        note(f"each worker reads the dataset by itself: {path}: {error.strerror or error}")
    try:
        yield str(path.absolute()) if is_written else None
    finally:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s is left there: %s", path, error.strerror or error)
