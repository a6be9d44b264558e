import itertools
import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

import tune_topkd.data.datasets as datasets
from tune_topkd.config import AugmentConfig
from tune_topkd.config import DataConfig
from tune_topkd.data import DatasetInfo
from tune_topkd.data import Split
from tune_topkd.data import dataset_info
from tune_topkd.data import eval_batches
from tune_topkd.data import fingerprint
from tune_topkd.data import load_dataset
from tune_topkd.data import missing_data
from tune_topkd.data import train_batches
from tune_topkd.data import view
from tune_topkd.data.randomness import SPLIT
from tune_topkd.data.randomness import mixed
from tune_topkd.data.randomness import random_order
from tune_topkd.data.randomness import signed
from tune_topkd.data.sources import Generated
from tune_topkd.data.splits import stratified

DIGITS = DataConfig(name="digits", val_fraction=0.3, test_fraction=0.25)
PLAIN = AugmentConfig()
BOTH = AugmentConfig(pad=2, flip=True)


def noise(n: int, channels: int = 2, height: int = 5, width: int = 7) -> Split:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(1, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % 3)


def epoch_of(split: Split, batch_size: int, *, seed=1, epoch=1, augment=PLAIN):
    batches = train_batches(
        split, batch_size=batch_size, seed=seed, epoch=epoch, augment=augment, mean=(0.0, 0.0), std=(1 / 255,) * 2
    )
    return list(batches)


# --- datasets -------------------------------------------------------------------------------------------------------


def test_info_agrees_with_the_data():
    info, dataset = dataset_info(DIGITS), load_dataset(DIGITS)
    assert dataset.num_classes == info.num_classes == len(dataset.train.labels.unique())
    assert dataset.train.images.shape[1:] == info.image_shape


def test_info_loads_nothing():
    code = (
        "import sys; from tune_topkd.config import DataConfig; from tune_topkd.data import dataset_info; "
        "[dataset_info(DataConfig(name=name)) for name in ('digits', 'glyphs', 'cifar100', 'imagenet')]; "
        "heavy = ('sklearn', 'torchvision', 'matplotlib', 'ray', 'optuna', 'mlflow', 'pandas'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


@pytest.mark.parametrize("call", [dataset_info, load_dataset, missing_data, fingerprint])
def test_unknown_dataset_tells_the_known_ones(call):
    with pytest.raises(ValueError, match=r"unknown dataset 'digit'; did you mean 'digits'.*known: cifar10, .*digits"):
        call(DataConfig(name="digit"))


def test_digits_are_uint8_from_the_darkest_to_the_brightest():
    from sklearn.datasets import load_digits

    dataset = load_dataset(DIGITS)
    splits = (dataset.train, dataset.val, dataset.test)
    assert all(s.images.dtype == torch.uint8 and s.labels.dtype == torch.int64 for s in splits)
    images = torch.cat([s.images for s in splits])
    assert images.unique().tolist() == [round(v * 255 / 16) for v in range(17)]
    assert images.double().sum().item() == pytest.approx(load_digits().images.sum() * 255 / 16, rel=1e-3)


def marked_source(counts: list[int]) -> Generated:
    """Images that say their own number, in classes of the given sizes."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 2, 1, 1) // torch.tensor([256, 1]).view(1, 2, 1, 1)
    return Generated(DatasetInfo(len(counts), (2, 1, 1)), lambda: Split((images % 256).to(torch.uint8), labels))


def numbers(split: Split) -> list[int]:
    return (split.images.flatten(1).long() @ torch.tensor([256, 1])).tolist()


@pytest.fixture
def marked(monkeypatch):
    monkeypatch.setitem(datasets.SOURCES, "marked", marked_source([100, 37, 400]))
    yield DataConfig(name="marked", val_fraction=0.2, test_fraction=0.3, split_seed=5)
    datasets._loaded.cache_clear()


def test_splits_are_disjoint_and_cover_everything_with_its_label(marked):
    dataset = load_dataset(marked)
    parts = [numbers(split) for split in (dataset.train, dataset.val, dataset.test)]
    assert sorted(itertools.chain(*parts)) == list(range(537))
    for split in (dataset.train, dataset.val, dataset.test):
        assert [0 if n < 100 else 1 if n < 137 else 2 for n in numbers(split)] == split.labels.tolist()


def test_every_class_has_its_share_in_every_split(marked):
    dataset = load_dataset(marked)
    counts = [split.labels.bincount().tolist() for split in (dataset.val, dataset.test, dataset.train)]
    assert counts == [[20, 7, 80], [30, 11, 120], [50, 19, 200]]


def test_split_is_a_function_of_its_seed(marked):
    first = numbers(load_dataset(marked).val)
    datasets._loaded.cache_clear()
    torch.rand(3)
    assert numbers(load_dataset(marked).val) == first
    assert numbers(load_dataset(marked.model_copy(update={"split_seed": 6})).val) != first


def test_split_of_digits_does_not_change_between_versions():
    assert load_dataset(DIGITS).val.labels[:20].tolist() == [2, 3, 5, 7, 0, 2, 0, 7, 9, 7, 2, 2, 6, 3, 3, 0, 5, 2, 8, 0]
    assert [len(s) for s in (load_dataset(DIGITS).train, load_dataset(DIGITS).val)] == [808, 539]


def plainly_stratified(labels, fractions: tuple[float, ...], seed: int) -> list[torch.Tensor]:
    """Class by class, each looked for among all labels."""
    shuffled = random_order(len(labels), seed, 0, SPLIT, labels.device)
    parts: list[list[torch.Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for label in torch.unique(labels).tolist():
        members = shuffled[labels[shuffled] == label]
        ends = [round(math.fsum(fractions[: i + 1]) * len(members)) for i in range(len(fractions))]
        for part, piece in zip(parts, members.tensor_split(ends), strict=True):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


@pytest.mark.parametrize("seed", [0, 2**40 + 3])
@pytest.mark.parametrize("fractions", [(0.1,), (0.3, 0.25), (1 / 3, 1 / 3)])
def test_the_split_is_the_one_made_class_by_class(fractions, seed):
    generator = torch.Generator().manual_seed(seed)
    uneven = torch.randint(0, 60, (3000,), generator=generator).square() % 70  # with labels that no image has
    for labels in (uneven, torch.arange(500) % 10, torch.zeros(7, dtype=torch.int64), torch.tensor([5, 2])):
        parts = zip(stratified(labels, fractions, seed), plainly_stratified(labels, fractions, seed), strict=True)
        assert all(torch.equal(ours, plain) for ours, plain in parts)


def test_the_work_of_a_split_does_not_grow_with_the_number_of_classes(monkeypatch):
    """Of ImageNet's images: looked at once for each of 1,000 classes they take a minute."""
    seen = []
    compare = torch.Tensor.__eq__
    monkeypatch.setattr(torch.Tensor, "__eq__", lambda one, other: seen.append(len(one)) or compare(one, other))
    stratified(torch.arange(20_000) % 1000, (0.1,), 0)
    assert sum(seen) <= 20_000


def test_fractions_that_leave_a_split_without_a_class_are_refused(marked):
    with pytest.raises(ValueError, match=r"val_fraction = 0\.01 and test_fraction = 0\.3 leave the validation split"):
        load_dataset(marked.model_copy(update={"val_fraction": 0.01}))


def test_mean_and_std_are_those_of_the_training_split(marked):
    dataset = load_dataset(marked)
    for channel in range(2):
        pixels = [Fraction(int(v), 255) for v in dataset.train.images[:, channel].flatten()]
        mean = sum(pixels) / len(pixels)
        variance = sum((p - mean) ** 2 for p in pixels) / len(pixels)
        assert dataset.mean[channel] == pytest.approx(float(mean))
        assert dataset.std[channel] == pytest.approx(float(variance) ** 0.5)


# --- batches --------------------------------------------------------------------------------------------------------


def test_batches_carry_their_images_labels_and_indices_normalised():
    split = noise(10)
    batches = list(
        train_batches(split, batch_size=4, seed=0, epoch=1, augment=PLAIN, mean=(0.25, 0.5), std=(0.5, 0.125))
    )
    for batch in batches:
        pixels = split.images[batch.indices].double() / 255
        expected = (pixels - torch.tensor([0.25, 0.5]).view(2, 1, 1)) / torch.tensor([0.5, 0.125]).view(2, 1, 1)
        assert batch.images.dtype == torch.float32
        assert torch.allclose(batch.images.double(), expected, atol=1e-6)
        assert torch.equal(batch.labels, split.labels[batch.indices])


def test_every_batch_is_full_and_no_image_comes_twice():
    batches = epoch_of(noise(11), 4)
    assert [len(b.labels) for b in batches] == [4, 4]
    assert len(torch.cat([b.indices for b in batches]).unique()) == 8


def test_all_images_come_where_the_batch_size_divides_them():
    assert sorted(torch.cat([b.indices for b in epoch_of(noise(12), 4)]).tolist()) == list(range(12))


def test_a_split_smaller_than_a_batch_is_one_batch():
    (batch,) = epoch_of(noise(3), 64, augment=BOTH)
    assert sorted(batch.indices.tolist()) == [0, 1, 2]


def test_order_is_a_function_of_seed_and_epoch():
    def order(**kwargs):
        return torch.cat([b.indices for b in epoch_of(noise(60), 20, **kwargs)]).tolist()

    first = order(seed=3, epoch=2)
    torch.rand(5)
    assert order(seed=3, epoch=2) == first
    others = [order(seed=3, epoch=1), order(seed=4, epoch=2), order(seed=2, epoch=3), list(range(60))]
    assert all(other != first for other in others)
    assert order(seed=3, epoch=2, augment=BOTH) == first


def test_every_image_comes_first_about_equally_often():
    first = torch.stack([epoch_of(noise(5), 5, epoch=epoch)[0].indices[0] for epoch in range(1, 1001)])
    assert (first.bincount(minlength=5) - 200).abs().max() < 50  # 4 standard deviations


def splitmix(*words: int) -> int:
    """64 bits for a chain of words, in Python's integers."""
    state, mask = 0, 2**64 - 1

    def mixed(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    *rest, index = words
    for word in rest:
        state = mixed(state + word)
    return mixed(state + index * 0x9E3779B97F4A7C15)


def slow_view(image: torch.Tensor, bits: int, augment: AugmentConfig) -> list[list[list[int]]]:
    """One image's view, pixel by pixel."""
    channels, height, width = image.shape
    top = ((bits & 0xFFFFF) * (2 * augment.pad + 1) >> 20) - augment.pad
    left = ((bits >> 20 & 0xFFFFF) * (2 * augment.pad + 1) >> 20) - augment.pad
    flip = augment.flip and bits >> 40 & 1

    def pixel(channel: int, row: int, column: int) -> int:
        y, x = row + top, (width - 1 - column if flip else column) + left
        return int(image[channel, y, x]) if 0 <= y < height and 0 <= x < width else 0

    return [[[pixel(c, y, x) for x in range(width)] for y in range(height)] for c in range(channels)]


@pytest.mark.parametrize("augment", [BOTH, AugmentConfig(pad=1), AugmentConfig(flip=True), AugmentConfig(pad=9)])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (2**63 + 12345, 240)])
def test_views_are_those_of_a_slow_reference(augment, seed, epoch):
    split, stream = noise(12), 2
    views = view(split.images, torch.arange(12), augment=augment, seed=seed, epoch=epoch)
    expected = [slow_view(split.images[i], splitmix(seed, epoch, stream, i), augment) for i in range(12)]
    assert views.dtype == torch.uint8
    assert views.tolist() == expected


def test_the_hash_is_splitmix64():
    # The first outputs of the reference implementation in C for the seed 1234567.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state = torch.tensor(1234567) + signed(0x9E3779B97F4A7C15) * torch.arange(3)
    assert [int(bits) % 2**64 for bits in mixed(state)] == known


def test_a_view_depends_on_neither_batch_size_nor_order_nor_the_other_images():
    split = noise(40)
    alone = [view(split.images, torch.tensor([i]), augment=BOTH, seed=9, epoch=3)[0] for i in range(40)]
    for batch_size in (7, 40, 64):
        for batch in epoch_of(split, batch_size, seed=9, epoch=3, augment=BOTH):
            for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                assert torch.equal(image.round().to(torch.uint8), alone[index])
    bigger = torch.cat([split.images, noise(9).images])
    assert torch.equal(view(bigger, torch.arange(40), augment=BOTH, seed=9, epoch=3), torch.stack(alone))


def test_preparing_in_chunks_changes_nothing(monkeypatch):
    split = noise(50)
    whole = epoch_of(split, 8, augment=BOTH)
    monkeypatch.setattr("tune_topkd.data.batches.CHUNK_BYTES", 1)
    for chunked, once in zip(epoch_of(split, 8, augment=BOTH), whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(chunked, once, strict=True))


def test_epochs_and_seeds_show_other_views():
    images = noise(40).images
    views = [view(images, torch.arange(40), augment=BOTH, seed=s, epoch=e) for s, e in ((1, 1), (1, 2), (2, 1))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert sum(torch.equal(x, y) for x, y in zip(views[a], views[b], strict=True)) < 10


def test_all_offsets_and_both_flips_are_about_equally_frequent():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    images = image.expand(9000, -1, -1, -1)
    middles = view(images, torch.arange(9000), augment=AugmentConfig(pad=1), seed=0, epoch=1)[:, 0, 2, 2]
    counts = middles.bincount()[[7, 8, 9, 12, 13, 14, 17, 18, 19]]
    assert counts.sum() == 9000
    assert (counts - 1000).abs().max() < 120  # 4 standard deviations
    flipped = view(images, torch.arange(9000), augment=AugmentConfig(flip=True), seed=0, epoch=1)[:, 0, 0, 0] == 5
    assert abs(int(flipped.sum()) - 4500) < 190


def test_evaluation_sees_every_image_once_in_order_and_as_it_is():
    split = noise(11)
    batches = list(eval_batches(split, mean=(0.0, 0.0), std=(1 / 255,) * 2, batch_size=4))
    assert [len(b.labels) for b in batches] == [4, 4, 3]
    assert torch.cat([b.indices for b in batches]).tolist() == list(range(11))
    assert torch.equal(torch.cat([b.images for b in batches]).round().to(torch.uint8), split.images)
    assert torch.equal(torch.cat([b.labels for b in batches]), split.labels)


@pytest.mark.gpu
def test_the_gpu_draws_what_the_cpu_draws():
    split = noise(100)
    there = epoch_of(split.to(torch.device("cuda")), 16, augment=BOTH)
    for a, b in zip(epoch_of(split, 16, augment=BOTH), there, strict=True):
        assert torch.equal(a.indices, b.indices.cpu())
        assert torch.allclose(a.images, b.images.cpu(), atol=1e-4)
