"""What a training step costs: with the bank of teacher logits, against the usual loop and against plain cross-entropy.

resnet32x4 teaches resnet8x4 on 100 classes of 32×32 images (glyphs; random weights, which cost the same), batches of 64,
cropped and flipped. The usual loop is what mdistiller and its like do for every trial: PIL images through torchvision's
transforms in two worker processes, the teacher asked for every batch, a metric read off the device in every step. "Bank
filled" is `tune_topkd.train` in an epoch that another trial has had before. Cross-entropy is the same student on the same
data path without a teacher. All in wall time, turn by turn in one process, on the GPU if there is one; in float32 but for
the row that says otherwise (`recipe.precision`). Data alone: the batches without any network. Memory: the most that a
process which does nothing else takes in one such epoch, with its workers, pages that they share counted once (PSS).
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.memory import peak_megabytes
from benchmarks.ratio import Ratio
from benchmarks.ratio import in_turns
from tune_topkd.config import AugmentConfig
from tune_topkd.config import DataConfig
from tune_topkd.config import ModelConfig
from tune_topkd.config import RecipeConfig
from tune_topkd.config import StudentConfig
from tune_topkd.config import TrialConfig
from tune_topkd.data import Split
from tune_topkd.data import batches_of
from tune_topkd.data import load_dataset
from tune_topkd.loss import build_loss
from tune_topkd.models import build_model
from tune_topkd.models import save_weights
from tune_topkd.teacher import load_teacher
from tune_topkd.train import Training
from tune_topkd.train import default_device

BATCH = 64
KINDS = ("bank", "bfloat16", "live", "plain", "usual")
TEACHER, STUDENT = "resnet32x4", "resnet8x4"
PAIR = f"{TEACHER} → {STUDENT}"
USUAL = "the usual loop"


def run(quick: bool) -> list[Ratio]:
    """Images per second of a step, of the data path, and of both beside their baselines."""
    images, turns = (2 * BATCH, 1) if quick else (1280, 5)
    with tempfile.TemporaryDirectory() as folder:
        config = trial_config(Path(folder), images)
        epochs = {kind: _epochs(config, kind) for kind in KINDS}
        for epoch in epochs.values():
            epoch()  # fills the bank, as another trial would have
        usual = _UsualLoop(config)
        rates = in_turns({kind: partial(_rate, epoch, images) for kind, epoch in epochs.items()}, turns)
        data = in_turns(
            {
                "ours": lambda: _rate(lambda: _exhaust(_batches(config)), images),
                "usual": lambda: _rate(lambda: _exhaust(usual.batches()), images),
            },
            turns,
        )
        memory = in_turns({kind: partial(_peak, config, kind) for kind in KINDS}, 1)
    filled = f"{PAIR}, bank filled"
    return [
        Ratio(filled, USUAL, rates["bank"], rates["usual"], "images/s", "at least 3.5"),
        Ratio(filled, "plain cross-entropy", rates["bank"], rates["plain"], "images/s", "at least 0.95"),
        Ratio(filled, "the live teacher", rates["bank"], rates["live"], "images/s"),
        Ratio(f"{filled}, bfloat16", USUAL, rates["bfloat16"], rates["usual"], "images/s"),
        Ratio("the data path alone", "torchvision in DataLoader workers", data["ours"], data["usual"], "images/s",
              "at least 20"),
        *(Ratio(f"peak memory, {kind}", USUAL, memory[kind], memory["usual"], "MB")
          for kind in ("bank", "bfloat16", "plain", "live")),
    ]  # fmt: skip


def _epochs(config: TrialConfig, kind: str) -> Callable[[], object]:
    """What trains an epoch: bank filled, the same in bfloat16, live teacher, plain cross-entropy, or the usual loop."""
    if kind == "usual":
        return _UsualLoop(config).epoch
    recipe = config.recipe.model_copy(update={"precision": "bfloat16"})
    changes: dict[str, dict[str, object]] = {
        "bank": {},
        "bfloat16": {"recipe": recipe},
        "live": {"teacher_bank": None},
        "plain": {"method": "ce"},
    }
    return partial(_epoch, Training(config.model_copy(update=changes[kind])))


def _peak(config: TrialConfig, kind: str) -> float:
    """MB that a process takes which trains an epoch and does nothing else."""
    context = multiprocessing.get_context("spawn")
    with peak_megabytes(None, 0.1) as megabytes:
        process = context.Process(target=_alone, args=(config.model_dump(mode="json"), kind))
        process.start()
        process.join()
    assert process.exitcode == 0, f"{kind}: ended with {process.exitcode}"
    return megabytes[0]


def _alone(config: dict[str, object], kind: str) -> None:
    _epochs(TrialConfig.model_validate(config), kind)()


def trial_config(folder: Path, images: int) -> TrialConfig:
    """The pair, with a bank in this folder that is still empty, and so many training images."""
    torch.manual_seed(0)
    save_weights(build_model(TEACHER, num_classes=100), folder / "teacher.pt")
    return TrialConfig(
        data=DataConfig(
            name="glyphs",
            kwargs={"train_images": images + 200, "test_images": 100},
            val_fraction=200 / (images + 200),
            augment=AugmentConfig(pad=4, flip=True),
        ),
        student=StudentConfig(name=STUDENT),
        teacher=ModelConfig(name=TEACHER),
        teacher_checkpoint=str(folder / "teacher.pt"),
        teacher_bank=str(folder),
        method="topkd",
        recipe=RecipeConfig(epochs=240, batch_size=BATCH, lr=1e-4, momentum=0.9, weight_decay=5e-4),
    )


def _rate(call: Callable[[], object], images: int) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - started)


def _epoch(training: Training) -> None:
    training.epoch = 0  # the same views every time
    training.train_epoch()


def _batches(config: TrialConfig) -> Iterator[object]:
    dataset = load_dataset(config.data)
    return batches_of(config, dataset, dataset.train.to(default_device()), 1)


def _exhaust(batches: Iterator[object]) -> None:
    for _ in batches:
        pass


class _UsualLoop:
    """Teacher and student in one loop, as it is usually written."""

    def __init__(self, config: TrialConfig) -> None:
        dataset = load_dataset(config.data)
        assert isinstance(dataset.train, Split), "glyphs are in memory"
        assert config.teacher is not None, "set above"
        to_image, crop = v2.ToPILImage(), v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
        to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
        self._transform = v2.Compose([crop, to_tensor, v2.Normalize(list(dataset.mean), list(dataset.std))])
        images = [
            (to_image(image), int(label))
            for image, label in zip(dataset.train.images, dataset.train.labels, strict=True)
        ]
        self._loader = DataLoader(
            _Transformed(images, self._transform), BATCH, shuffle=True, drop_last=True, num_workers=2
        )
        self._device = default_device()
        teacher = load_teacher(config.teacher, Path(config.teacher_checkpoint or ""), num_classes=100)
        self._teacher, self._student = teacher.to(self._device), build_model(STUDENT, num_classes=100).to(self._device)
        self._loss = build_loss("topkd", {})
        self._optimizer = torch.optim.SGD(self._student.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._loader:
            yield images.to(self._device), labels.to(self._device)

    def epoch(self) -> None:
        self._student.train()
        for images, labels in self.batches():
            with torch.no_grad():
                teacher_logits = self._teacher(images)
            logits = self._student(images)
            terms = self._loss.terms(logits, teacher_logits, labels)
            loss = self._loss.total(terms)
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            self._optimizer.step()
            loss.item()
            functional.softmax(logits.detach(), dim=1).argmax(1).eq(labels).float().mean().item()


class _Transformed(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, images: list[tuple[object, int]], transform: Callable[[object], Tensor]) -> None:
        self._images = images
        self._transform = transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._images[index]
        return self._transform(image), label
