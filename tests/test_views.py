"""Views that torchvision makes, image by image: functions of (seed, epoch, index), whoever makes them."""

import math
import multiprocessing
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tune_topkd.config import AugmentConfig
from tune_topkd.config import RandAugmentConfig
from tune_topkd.data import FileSplit
from tune_topkd.data import Split
from tune_topkd.data import eval_batches
from tune_topkd.data import train_batches
from tune_topkd.data import view

ROTATE = AugmentConfig(rotate=30)
CROP = AugmentConfig(crop_scale=[0.2, 0.6])
RAND = AugmentConfig(rand_augment=RandAugmentConfig(ops=2, magnitude=20))
ERASE = AugmentConfig(erase=0.7)
ALL = AugmentConfig(
    crop_scale=[0.3, 1.0], flip=True, rotate=20, rand_augment=RandAugmentConfig(ops=1, magnitude=9), erase=0.5
)
PADDED = AugmentConfig(pad=3, flip=True, rotate=10, erase=0.5)
KINDS = {"rotate": ROTATE, "crop": CROP, "rand": RAND, "erase": ERASE, "all": ALL, "padded": PADDED}


def noise(n: int, channels: int = 3, height: int = 12, width: int = 12, **kwargs) -> Split:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(1, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % 3, **kwargs)


@pytest.fixture
def files(tmp_path: Path) -> FileSplit:
    """Twelve images of different sizes."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i in range(12):
        pixels = torch.randint(0, 256, (20 + i, 40 - 2 * i, 3), dtype=torch.uint8, generator=generator)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return FileSplit(tuple(paths), torch.arange(12) % 3, size=(16, 16), fitted=True)


def epoch_of(split, augment, *, batch_size=4, seed=1, epoch=1) -> dict[int, torch.Tensor]:
    """Each image of an epoch by its index."""
    constants = {"mean": (0.0,) * split.batch_shape[0], "std": (1 / 255,) * split.batch_shape[0]}
    batches = train_batches(split, batch_size=batch_size, seed=seed, epoch=epoch, augment=augment, **constants)
    images = {}
    for batch in batches:
        assert len(batch.labels) == batch_size
        assert torch.equal(batch.labels, split.labels[batch.indices])
        images.update(zip(batch.indices.tolist(), batch.images, strict=True))
    return images


def same(one: dict[int, torch.Tensor], two: dict[int, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[index], two[index]) for index in one)


# --- purity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["memory", "files"])
def test_a_view_is_a_function_of_seed_epoch_and_index(kind, source, files):
    split, augment = noise(12) if source == "memory" else files, KINDS[kind]
    first = epoch_of(split, augment, batch_size=4)
    torch.rand(3)
    assert same(epoch_of(split, augment, batch_size=4), first)
    assert same(epoch_of(split, augment, batch_size=6), first)
    for others in (epoch_of(split, augment, epoch=2), epoch_of(split, augment, seed=2)):
        assert sum(torch.equal(others[index], first[index]) for index in first) < 8


@pytest.mark.parametrize("kind", ["all", "padded"])
@pytest.mark.parametrize("source", ["memory", "files"])
def test_worker_processes_change_nothing(kind, source, files):
    split, augment = noise(12) if source == "memory" else files, KINDS[kind]
    with_workers = type(split)(**{**vars(split), "workers": 2})
    before = torch.get_rng_state()
    assert same(epoch_of(with_workers, augment), epoch_of(split, augment))
    assert torch.equal(torch.get_rng_state(), before)
    assert not [p for p in multiprocessing.active_children() if "resource" not in p.name]


def test_the_generator_of_the_training_is_left_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    epoch_of(noise(12), ALL)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augment", [CROP, ALL, PADDED], ids=["crop", "all", "padded"])
def test_view_gives_what_the_batches_hold_before_they_are_erased(augment):
    split, unerased = noise(12), augment.model_copy(update={"erase": 0.0})
    batches = epoch_of(split, augment, seed=3, epoch=7)
    views = view(split.images, torch.arange(12), augment=augment, seed=3, epoch=7)
    assert views.dtype == torch.uint8
    assert torch.equal(views, view(split.images, torch.arange(12), augment=unerased, seed=3, epoch=7))
    for index, image in enumerate(views):
        kept = batches[index] != 0
        assert torch.equal(batches[index].round()[kept], image[kept].float())


def test_the_crop_and_flip_are_those_of_the_batchwise_path():
    images = noise(12).images
    plain, erased = AugmentConfig(pad=3, flip=True), AugmentConfig(pad=3, flip=True, erase=0.5)
    one, two = (view(images, torch.arange(12), augment=a, seed=3, epoch=2) for a in (plain, erased))
    assert torch.equal(one, two)


def test_another_image_gets_another_view():
    images = noise(1).images.expand(50, -1, -1, -1)
    for augment in (ROTATE, CROP, RAND):
        views = view(images, torch.arange(50), augment=augment, seed=1, epoch=1)
        assert len({tuple(v.flatten().tolist()) for v in views}) > 20


# --- what is drawn --------------------------------------------------------------------------------------------------


def test_a_rotation_stays_within_its_degrees():
    image = torch.zeros(1, 1, 65, 65, dtype=torch.uint8)
    image[..., 31:34, 60] = 255  # right of the middle, 28 pixels away
    views = view(image.expand(200, -1, -1, -1), torch.arange(200), augment=ROTATE, seed=0, epoch=1)
    angles = []
    for turned in views[:, 0]:
        rows, columns = (turned == 255).nonzero(as_tuple=True)
        angles.append(math.degrees(math.atan2(rows.double().mean() - 32, columns.double().mean() - 32)))
    assert -31 < min(angles) < -25
    assert 25 < max(angles) < 31
    assert abs(sum(angles) / 200) < 4


def test_a_crop_has_its_share_of_the_area():
    ramp = torch.arange(64, dtype=torch.uint8).expand(64, -1)
    image = torch.stack([ramp, ramp.T])[None]  # each pixel says its column and its row
    views = view(image.expand(200, -1, -1, -1), torch.arange(200), augment=CROP, seed=0, epoch=1).long()
    width = views[:, 0, 32, -1] - views[:, 0, 32, 0] + 1
    height = views[:, 1, -1, 32] - views[:, 1, 0, 32] + 1
    shares = (width * height).double() / 64**2
    assert 0.15 < shares.min() < 0.25
    assert 0.55 < shares.max() < 0.65


def test_rand_augment_is_torchvision_s():
    image = noise(1).images
    drawn = view(image.expand(300, -1, -1, -1), torch.arange(300), augment=RAND, seed=0, epoch=1)
    seen = {tuple(v.flatten().tolist()) for v in drawn}
    transform = v2.RandAugment(2, 20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = {tuple(transform(image[0]).flatten().tolist()) for _ in range(300)}
    assert len(seen & expected) > 0.3 * min(len(seen), len(expected))


def test_erasing_blanks_one_rectangle_of_the_normalised_image_as_often_as_asked():
    split = noise(400)
    constants = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    batches = train_batches(split, batch_size=50, seed=1, epoch=1, augment=ERASE, **constants)
    holes = torch.cat([(batch.images == 0).all(1) for batch in batches])
    erased = holes.any(2).any(1)
    assert abs(int(erased.sum()) - 280) < 40  # 4 standard deviations
    for hole in holes[erased]:
        assert hole.sum() == hole.any(0).sum() * hole.any(1).sum()


def test_gray_images_take_every_augmentation():
    assert view(noise(12, 1).images, torch.arange(12), augment=ALL, seed=1, epoch=1).shape == (12, 1, 12, 12)


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [AugmentConfig(pad=2, flip=True), *KINDS.values()], ids=["by batch", *KINDS])
def test_batches_of_small_images_are_resized_after_the_augmentation(augment):
    split = noise(12, image_size=24)
    large = epoch_of(split, augment, seed=1)
    small = view(split.images, torch.arange(12), augment=augment, seed=1, epoch=1)
    if augment.crop_scale is None:
        expected = v2.functional.resize(small, [24, 24], antialias=True)
        for index, image in large.items():
            kept = image != 0
            assert torch.equal(image.round()[kept], expected[index][kept].float())
    assert all(image.shape == (3, 24, 24) for image in large.values())
    (batch,) = eval_batches(split, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert torch.equal(batch.images.round(), v2.functional.resize(split.images, [24, 24], antialias=True).float())


def test_a_file_is_evaluated_by_its_middle(files):
    resize_and_cut = v2.Compose([v2.Resize(18, antialias=True), v2.CenterCrop(16)])
    (batch,) = eval_batches(files, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    for path, image in zip(files.paths, batch.images, strict=True):
        with Image.open(path) as stored:
            expected = resize_and_cut(v2.functional.pil_to_tensor(stored))
        assert torch.equal(image.round(), expected.float())


def test_a_file_that_has_the_size_is_left_as_it_is(tmp_path: Path):
    image = noise(1, 3, 16, 16).images[0]
    path = tmp_path / "x.png"
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    split = FileSplit((str(path),), torch.zeros(1, dtype=torch.int64), size=(16, 16), fitted=True)
    (batch,) = eval_batches(split, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert torch.equal(batch.images[0].round(), image.float())


def test_files_are_augmented_at_their_size_in_batches(files):
    assert all(image.shape == (3, 16, 16) for image in epoch_of(files, AugmentConfig(pad=2, flip=True)).values())
    (batch,) = eval_batches(files, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    plain = epoch_of(files, AugmentConfig())
    assert all(torch.equal(plain[index], batch.images[index]) for index in plain)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named_in_one_line(files, workers):
    Path(files.paths[3]).write_bytes(Path(files.paths[3]).read_bytes()[:300])
    split = FileSplit(files.paths, files.labels, files.size, files.fitted, workers)
    with pytest.raises(ValueError, match=r"^.*3\.png: cannot be read as an image: .*replace or remove the file$"):
        epoch_of(split, CROP)
    with pytest.raises(ValueError, match=r"^.*3\.png: cannot be read as an image"):
        list(eval_batches(split, mean=(0.0,) * 3, std=(1.0,) * 3))


@pytest.mark.gpu
def test_the_gpu_gets_the_views_of_the_cpu():
    split = noise(40)
    there = split.to(torch.device("cuda"))
    for augment in (ALL, PADDED):
        for workers in (0, 2):
            moved = Split(there.images, there.labels, None, workers, there.host)
            batches = epoch_of(moved, augment)
            assert all(
                torch.allclose(batches[i].cpu(), image, atol=1e-4) for i, image in epoch_of(split, augment).items()
            )
