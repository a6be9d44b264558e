"""The losses against plain loops written from the method's description, hand-made numbers, and their promises."""

import copy
import functools
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tune_topkd import loss as loss_module
from tune_topkd.loss import METHODS
from tune_topkd.loss import CELoss
from tune_topkd.loss import DKDLoss
from tune_topkd.loss import KDLoss
from tune_topkd.loss import LogitStandardKDLoss
from tune_topkd.loss import LossState
from tune_topkd.loss import TopKDLoss
from tune_topkd.loss import TopKDPlugin
from tune_topkd.loss import build_loss
from tune_topkd.loss import contrastive_loss
from tune_topkd.loss import loss_parameters
from tune_topkd.loss import top_k_decoupled_loss
from tune_topkd.loss import top_k_scaling

Rows = list[list[float]]
SCALING = {"scale_top": 2.5, "scale_last": 1.25, "scale_gt": 4.0, "shift": 0.3}

# --- the reference: one sample and one class at a time, in Python floats ----------------------------------------------


def ref_ranking(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def ref_scaling(
    teacher: Rows, labels: list[int], k: int, scale_top: float, scale_last: float, scale_gt: float, shift: float
) -> Rows:
    scaled = []
    for row, label in zip(teacher, labels, strict=True):
        ranking = ref_ranking(row)
        inside, outside = ranking[:k], ranking[k:]
        gap = 0.0
        if outside:
            gap = math.fsum(row[i] for i in inside) / k - math.fsum(row[i] for i in outside) / len(outside)
        weights = {}
        for position, i in enumerate(inside):
            weights[i] = scale_top if k == 1 else scale_top + (scale_last - scale_top) * position / (k - 1)
        if ranking[0] != label:
            weights[label] = scale_gt
        new = list(row)
        for i, weight in weights.items():
            new[i] = (row[i] * weight if row[i] >= 0 else row[i] / weight) + shift * gap
        scaled.append(new)
    return scaled


def ref_cosine(a: list[float], b: list[float]) -> float:
    length_a, length_b = math.hypot(*a), math.hypot(*b)
    if length_a == 0 or length_b == 0:
        return 0.0
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (length_a * length_b)


def ref_tdl(student: Rows, scaled: Rows, k: int, alpha: float, beta: float) -> float:
    total = 0.0
    for s, t in zip(student, scaled, strict=True):
        positive = [i for i in sorted(range(len(t)), key=lambda i: (-t[i], i)) if t[i] > 0][:k]
        negative = [i for i in sorted(range(len(t)), key=lambda i: (t[i], i)) if t[i] < 0][:k]
        rest = [i for i in range(len(t)) if i not in positive and i not in negative]
        for group, weight in ((positive, alpha), (negative, beta), (rest, 1.0)):
            if group:
                total += weight * (1 - ref_cosine([s[i] for i in group], [t[i] for i in group]))
    return total / len(student)


def ref_log_softmax(row: list[float]) -> list[float]:
    largest = max(row)
    log_sum = largest + math.log(math.fsum(math.exp(x - largest) for x in row))
    return [x - log_sum for x in row]


def ref_ce(logits: Rows, labels: list[int]) -> float:
    return -sum(ref_log_softmax(row)[label] for row, label in zip(logits, labels, strict=True)) / len(logits)


def ref_contrastive(student: Rows, teacher: Rows, temperature: float, normalize: bool) -> float:
    def prepared(row: list[float]) -> list[float]:
        length = math.hypot(*row) if normalize else 1.0
        return [x / length for x in row] if length > 0 else row

    student, teacher = [prepared(row) for row in student], [prepared(row) for row in teacher]
    products = [[math.fsum(a * b for a, b in zip(s, t, strict=True)) / temperature for t in teacher] for s in student]
    transposed = [list(column) for column in zip(*products, strict=True)]
    own = list(range(len(student)))
    return 0.5 * (ref_ce(products, own) + ref_ce(transposed, own))


def ref_kl(student: Rows, teacher: Rows, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        log_s = ref_log_softmax([x / temperature for x in s])
        log_t = ref_log_softmax([x / temperature for x in t])
        total += math.fsum(math.exp(b) * (b - a) for a, b in zip(log_s, log_t, strict=True))
    return total / len(student)


def ref_kd(student: Rows, teacher: Rows, labels: list[int], temperature: float = 4.0) -> dict[str, float]:
    return {"ce": ref_ce(student, labels), "kd": temperature**2 * ref_kl(student, teacher, temperature)}


def ref_dkd(student: Rows, teacher: Rows, labels: list[int], temperature: float = 4.0) -> dict[str, float]:
    def binary(logits: Rows) -> Rows:  # log p(target), log p(any other): logits of the two-way distribution
        rows = [ref_log_softmax([x / temperature for x in row]) for row in logits]
        return [
            [row[y], math.log(math.fsum(math.exp(x) for i, x in enumerate(row) if i != y))]
            for row, y in zip(rows, labels, strict=True)
        ]

    def others(logits: Rows) -> Rows:
        return [[x for i, x in enumerate(row) if i != y] for row, y in zip(logits, labels, strict=True)]

    return {
        "ce": ref_ce(student, labels),
        "tckd": temperature**2 * ref_kl(binary(student), binary(teacher), 1.0),
        "nckd": temperature**2 * ref_kl(others(student), others(teacher), temperature),
    }


def ref_lskd(student: Rows, teacher: Rows, labels: list[int], temperature: float = 2.0) -> dict[str, float]:
    def standardised(row: list[float]) -> list[float]:
        mean = math.fsum(row) / len(row)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / (len(row) - 1))
        return [(x - mean) / deviation if deviation > 1e-12 else 0.0 for x in row]

    z_student, z_teacher = [standardised(row) for row in student], [standardised(row) for row in teacher]
    return {"ce": ref_ce(student, labels), "kd": temperature**2 * ref_kl(z_student, z_teacher, temperature)}


REF_BASES = {"kd": ref_kd, "dkd": ref_dkd, "lskd": ref_lskd}

# --- inputs -----------------------------------------------------------------------------------------------------------


def random_case(batch: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(classes, (batch,), generator=generator)


def tied_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher, labels = random_case(6, 8, seed=1)
    return student, (teacher / 3).round(), labels


def missed_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher, _ = random_case(5, 7, seed=2)
    return student, teacher, teacher.argsort(1)[:, 3]


def missed_negative_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher, _ = random_case(5, 7, seed=3)
    return student, teacher, teacher.argmin(1)


def right_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher, _ = random_case(5, 7, seed=4)
    return student, teacher, teacher.argmax(1)


def negative_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher, labels = random_case(4, 6, seed=5)
    return student, -teacher.abs(), labels


def zero_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher, labels = random_case(4, 6, seed=6)
    student[0], teacher[1], teacher[2], student[2] = 0, 0, 0, 0
    return student, teacher, labels


CASES = {
    "random": random_case(8, 10),
    "ties": tied_case(),
    "teacher wrong": missed_case(),
    "ground truth negative": missed_negative_case(),
    "teacher right": right_case(),
    "all negative": negative_case(),
    "zero rows": zero_case(),
    "one sample": random_case(1, 6, seed=7),
    "two classes": random_case(5, 2, seed=8),
}
each_case = pytest.mark.parametrize("case", CASES)
each_method = pytest.mark.parametrize("method", METHODS)


def some_k(classes: int) -> list[int]:
    return sorted({1, 2, classes // 2 or 1, classes - 1, classes})


def check(actual: torch.Tensor, expected: float | Rows) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def small_input() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher, labels = random_case(3, 4, seed=11)
    return student.requires_grad_(), teacher, labels


def floats(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher, labels = case
    return student.to(dtype), teacher.to(dtype), labels


def build(method: str, **parameters: object) -> torch.nn.Module:
    """Construct with K = 2, which every small input allows."""
    return build_loss(method, {**({"k": 2} if "topkd" in method else {}), **parameters})


# --- against the reference --------------------------------------------------------------------------------------------


@each_case
def test_scaling_is_the_reference(case: str) -> None:
    _, teacher, labels = CASES[case]
    for k in some_k(teacher.shape[1]):
        actual = top_k_scaling(teacher, labels, k=k, **SCALING)
        check(actual, ref_scaling(teacher.tolist(), labels.tolist(), k, **SCALING))


@each_case
def test_decoupled_loss_is_the_reference(case: str) -> None:
    student, teacher, _ = CASES[case]
    for k in some_k(teacher.shape[1]):
        actual = top_k_decoupled_loss(student, teacher, k=k, alpha=1.7, beta=0.6)
        check(actual, ref_tdl(student.tolist(), teacher.tolist(), k, 1.7, 0.6))


@each_case
@pytest.mark.parametrize("normalize", [True, False])
def test_contrastive_loss_is_the_reference(case: str, normalize: bool) -> None:
    student, teacher, _ = CASES[case]
    actual = contrastive_loss(student, teacher, temperature=0.7, normalize=normalize)
    check(actual, ref_contrastive(student.tolist(), teacher.tolist(), 0.7, normalize))


@each_case
@pytest.mark.parametrize("normalize", [True, False])
def test_objective_is_the_reference(case: str, normalize: bool) -> None:
    tensors = CASES[case]
    student, teacher, labels = (tensor.tolist() for tensor in tensors)
    weights = {"ce_weight": 0.7, "tdl_weight": 1.9, "contrastive_weight": 0.4}
    for k in some_k(tensors[0].shape[1]):
        criterion = TopKDLoss(k=k, **SCALING, alpha=1.7, beta=0.6, temperature=0.5, normalize=normalize, **weights)
        expected = {
            "ce": ref_ce(student, labels),
            "tdl": ref_tdl(student, ref_scaling(teacher, labels, k, **SCALING), k, 1.7, 0.6),
            "contrastive": ref_contrastive(student, teacher, 0.5, normalize),
        }
        for name, term in criterion.terms(*tensors).items():
            check(term, expected[name])
        check(criterion(*tensors), sum(weights[f"{name}_weight"] * expected[name] for name in expected))


@each_case
@pytest.mark.parametrize(
    ("criterion", "reference", "weights"),
    [
        (KDLoss(), ref_kd, [0.1, 0.9]),
        (DKDLoss(), ref_dkd, [1.0, 1.0, 8.0]),
        (LogitStandardKDLoss(), ref_lskd, [0.1, 9.0]),
        (CELoss(), lambda student, _, labels: {"ce": ref_ce(student, labels)}, [1.0]),
    ],
    ids=["kd", "dkd", "lskd", "ce"],
)
def test_baselines_are_the_reference(
    case: str, criterion: KDLoss, reference: Callable[..., dict[str, float]], weights: list[float]
) -> None:
    expected = reference(*(tensor.tolist() for tensor in CASES[case]))
    actual = criterion.terms(*CASES[case])
    assert list(actual) == list(expected)
    for name, term in actual.items():
        check(term, expected[name])
    check(criterion(*CASES[case]), sum(w * term for w, term in zip(weights, expected.values(), strict=True)))


@each_case
@pytest.mark.parametrize("base", REF_BASES)
def test_plugin_is_the_reference(case: str, base: str) -> None:
    tensors = CASES[case]
    student, teacher, labels = (tensor.tolist() for tensor in tensors)
    for k in (2, tensors[0].shape[1]):
        own = {"k": k, **SCALING, "alpha": 1.7, "beta": 0.6}
        criterion = build_loss(f"{base}+topkd", own | {"ce_weight": 0.7, "base_weight": 1.3, "tdl_weight": 1.9})
        scaled = ref_scaling(teacher, labels, k, **SCALING)
        parts = REF_BASES[base](student, scaled, labels)
        weights = {"kd": {"kd": 0.9}, "dkd": {"tckd": 1.0, "nckd": 8.0}, "lskd": {"kd": 9.0}}[base]
        expected = {
            "ce": ref_ce(student, labels),
            "base": sum(weight * parts[name] for name, weight in weights.items()),
            "tdl": ref_tdl(student, scaled, k, 1.7, 0.6),
        }
        actual = criterion.terms(*tensors)
        assert list(actual) == list(expected)
        for name, term in actual.items():
            check(term, expected[name])
        check(criterion(*tensors), 0.7 * expected["ce"] + 1.3 * expected["base"] + 1.9 * expected["tdl"])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Rows, Rows, list[int], int]:
    """Draw logits in quarters, full of ties and zeros, with labels and K."""
    batch, classes = draw(st.integers(1, 4)), draw(st.integers(2, 7))
    row = st.lists(st.integers(-6, 6).map(lambda n: n / 4), min_size=classes, max_size=classes)
    rows = st.lists(row, min_size=batch, max_size=batch)
    labels = st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch)
    return draw(rows), draw(rows), draw(labels), draw(st.integers(1, classes))


def tensors_of(student: Rows, teacher: Rows, labels: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.tensor(student, dtype=torch.float64),
        torch.tensor(teacher, dtype=torch.float64),
        torch.tensor(labels),
    )


modest = settings(deadline=None, derandomize=True, max_examples=50)


@modest
@given(problems())
def test_any_scaling_is_the_reference(problem: tuple[Rows, Rows, list[int], int]) -> None:
    *rows, k = problem
    _, teacher, labels = tensors_of(*rows)
    check(top_k_scaling(teacher, labels, k=k, **SCALING), ref_scaling(rows[1], rows[2], k, **SCALING))


@modest
@given(problems())
def test_any_decoupled_loss_is_the_reference(problem: tuple[Rows, Rows, list[int], int]) -> None:
    *rows, k = problem
    student, teacher, _ = tensors_of(*rows)
    check(top_k_decoupled_loss(student, teacher, k=k, alpha=1.7, beta=0.6), ref_tdl(rows[0], rows[1], k, 1.7, 0.6))


@modest
@given(problems(), st.sampled_from(METHODS))
def test_any_loss_and_gradient_is_finite(problem: tuple[Rows, Rows, list[int], int], method: str) -> None:
    *rows, k = problem
    student, teacher, labels = floats(tensors_of(*rows))
    student.requires_grad_()
    loss = build(method, **({"k": k} if "topkd" in method else {}))(student, teacher, labels)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@modest
@given(problems())
def test_scaling_only_raises_and_only_the_top_and_the_truth(problem: tuple[Rows, Rows, list[int], int]) -> None:
    *rows, k = problem
    _, teacher, labels = tensors_of(*rows)
    scaled = top_k_scaling(teacher, labels, k=k, **SCALING)
    assert (scaled >= teacher).all()
    for row, new, label in zip(rows[1], scaled.tolist(), rows[2], strict=True):
        untouched = set(ref_ranking(row)[k:]) - {label}
        assert all(new[i] == row[i] for i in untouched)


@modest
@given(problems())
def test_neutral_scaling_changes_nothing(problem: tuple[Rows, Rows, list[int], int]) -> None:
    *rows, k = problem
    _, teacher, labels = tensors_of(*rows)
    scaled = top_k_scaling(teacher, labels, k=k, scale_top=1, scale_last=1, scale_gt=1, shift=0)
    assert torch.equal(scaled, teacher)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_decoupled_and_contrastive_losses_see_only_the_direction(factor: float) -> None:
    student, teacher, _ = (tensor.float() for tensor in random_case(4, 6))
    for function, options in (
        (top_k_decoupled_loss, {"k": 2, "alpha": 1.0, "beta": 1.0}),
        (contrastive_loss, {"temperature": 0.1, "normalize": True}),
    ):
        torch.testing.assert_close(
            function(factor * student, teacher, **options), function(student, teacher, **options)
        )


# --- numbers worked out by hand ---------------------------------------------------------------------------------------


def test_scaling_by_hand() -> None:
    # K = 2: the top is {4, 2} with mean 3, the others {1, -1} have mean 0, so delta = 0.1 * 3 = 0.3.
    # Rank 1: 4 * 2 + 0.3 = 8.3; rank 2: 2 * 1 + 0.3 = 2.3.
    # Row 1, y = 2, missed: 1 * 3 + 0.3 = 3.3. Row 2, y = 3, missed: -1 / 3 + 0.3. Row 3, y = 0, right: nothing more.
    # Row 4, y = 1, missed though in the top: 2 * 3 + 0.3 = 6.3.
    teacher = torch.tensor([[4.0, 2.0, 1.0, -1.0]] * 4, dtype=torch.float64)
    actual = top_k_scaling(
        teacher, torch.tensor([2, 3, 0, 1]), k=2, scale_top=2.0, scale_last=1.0, scale_gt=3.0, shift=0.1
    )
    expected = [[8.3, 2.3, 3.3, -1.0], [8.3, 2.3, 1.0, 0.3 - 1 / 3], [8.3, 2.3, 1.0, -1.0], [8.3, 6.3, 1.0, -1.0]]
    check(actual, expected)


def test_scaling_of_one_and_of_all_classes_by_hand() -> None:
    # K = 1: only the 3, by scale_top; delta = 0.5 * (3 - (1 - 2) / 2) = 1.75; 3 * 2 + 1.75 = 7.75.
    # K = C = 3: weights 2, 1.5, 1 and delta = 0: 6, 1.5, -2 / 1.
    teacher, right = torch.tensor([[3.0, 1.0, -2.0]], dtype=torch.float64), torch.tensor([0])
    options = {"scale_top": 2.0, "scale_last": 1.0, "scale_gt": 3.0, "shift": 0.5}
    check(top_k_scaling(teacher, right, k=1, **options), [[7.75, 1.0, -2.0]])
    check(top_k_scaling(teacher, right, k=3, **options), [[6.0, 1.5, -2.0]])


def test_decoupled_loss_by_hand() -> None:
    # K = 2. Positive {4, 3} with student (3, 4): cos = 24 / 25. Negative {-2} with -5: cos = 1.
    # Rest {0.5} with -2: cos = -1. 10 * (1 - 0.96) + 7 * 0 + 2 = 2.4.
    student = torch.tensor([[3.0, 4.0, -5.0, -2.0]], dtype=torch.float64)
    scaled = torch.tensor([[4.0, 3.0, -2.0, 0.5]], dtype=torch.float64)
    check(top_k_decoupled_loss(student, scaled, k=2, alpha=10.0, beta=7.0), 2.4)


def test_empty_groups_contribute_nothing_by_hand() -> None:
    # Row 1: all positive and K = 2 = C: only the positive group, cos((1, 0), (1, 1)) = 1 / sqrt(2).
    # Row 2: all zero: only the rest, where cos = 0. Mean of 3 * (1 - 0.70710678) and 1.
    student = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    scaled = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    check(top_k_decoupled_loss(student, scaled, k=2, alpha=3.0, beta=5.0), (3 * (1 - 0.5**0.5) + 1) / 2)


def test_contrastive_loss_by_hand() -> None:
    # S = [[2, 0], [2, 4]], over 2: [[1, 0], [1, 2]]. Both rows: log(1 + e^-1) = 0.3132616875.
    # Columns (1, 1) and (0, 2): log 2 = 0.6931471806 and log(1 + e^-2) = 0.1269280110, mean 0.4100375958.
    student = torch.eye(2, dtype=torch.float64)
    teacher = torch.tensor([[2.0, 2.0], [0.0, 4.0]], dtype=torch.float64)
    actual = contrastive_loss(student, teacher, temperature=2.0, normalize=False)
    assert actual.item() == pytest.approx((0.3132616875 + 0.4100375958) / 2, abs=1e-9)


def test_kd_by_hand() -> None:
    # T = 2: teacher softmax(ln 3, 0) = (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308120.
    # 0.1 ln 2 + 0.9 * 4 * 0.1308120 = 0.5402379.
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[2 * math.log(3), 0.0]])
    assert KDLoss(temperature=2.0)(student, teacher, torch.tensor([0])).item() == pytest.approx(0.5402379, abs=1e-6)


def test_dkd_by_hand() -> None:
    # Teacher (1/2, 3/8, 1/8), student uniform, y = 0, T = 1.
    # TCKD = KL((1/2, 1/2) || (1/3, 2/3)) = ln(9/8) / 2 = 0.0588915; NCKD = KL((3/4, 1/4) || (1/2, 1/2)) = 0.1308120.
    teacher = torch.tensor([[0.5, 0.375, 0.125]], dtype=torch.float64).log()
    terms = DKDLoss(temperature=1.0).terms(torch.zeros(1, 3, dtype=torch.float64), teacher, torch.tensor([0]))
    assert terms["tckd"].item() == pytest.approx(0.0588915, abs=1e-6)
    assert terms["nckd"].item() == pytest.approx(0.1308120, abs=1e-6)


def test_logit_standardisation_by_hand() -> None:
    # Both rows standardise (C - 1 = 2) to (1, 0, -1) and (-1, 0, 1), whose KL at T = 1 is
    # 2 (e - 1/e) / (e + 1 + 1/e) = 4.7008048 / 4.0861613 = 1.1504208.
    teacher = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    terms = LogitStandardKDLoss(temperature=1.0).terms(7 - 5 * teacher, teacher, torch.tensor([0]))
    assert terms["kd"].item() == pytest.approx(1.1504208, abs=1e-6)


def test_defaults_are_those_of_the_method() -> None:
    expected = {
        "k": 5, "scale_top": 2.0, "scale_last": 1.0, "scale_gt": 3.0, "shift": 0.1, "alpha": 1.0, "beta": 1.0,
        "scaling_rule": "linear", "temperature": 0.1, "normalize": True, "contrastive_batch": 0,
        "ce_weight": 1.0, "tdl_weight": 1.0, "contrastive_weight": 1.0,
    }  # fmt: skip
    assert loss_parameters("topkd") == expected
    assert loss_parameters("kd") == {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
    assert loss_parameters("dkd") == {"ce_weight": 1.0, "alpha": 1.0, "beta": 8.0, "temperature": 4.0}
    assert loss_parameters("lskd") == {"ce_weight": 0.1, "kd_weight": 9.0, "temperature": 2.0}


# --- ties and the order of classes ------------------------------------------------------------------------------------


each_width = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@each_width
def test_scaling_gives_ties_to_the_lower_index(dtype: torch.dtype) -> None:
    # 300 equal logits: long enough for an unstable sort to show. y = 1 is not the top-1, which is class 0.
    teacher = torch.ones(1, 300, dtype=dtype)
    scaled = top_k_scaling(teacher, torch.tensor([1]), k=3, scale_top=3.0, scale_last=2.0, scale_gt=5.0, shift=0.5)
    check(scaled.double(), [[3.0, 5.0, 2.0] + [1.0] * 297])


@each_width
def test_zeros_of_both_signs_are_tied(dtype: torch.dtype) -> None:
    teacher = torch.tensor([[-0.0, 0.0, -1.0]], dtype=dtype)
    options = {"k": 1, "scale_top": 1.0, "scale_last": 1.0, "scale_gt": 1.0, "shift": 2.0}
    scaled = top_k_scaling(teacher, torch.tensor([0]), **options)
    check(scaled.double(), [[1.0, 0.0, -1.0]])


CLOSE = [0.0, -0.0, 1.0, -1.0, 1 + 2.0**-23, -1 - 2.0**-23, 2.0**-100, -(2.0**-100), 2.0**100, -(2.0**100)]
"""Zeros of both signs, neighbours in float32, and very small and large numbers."""


@modest
@given(st.data(), st.integers(2, 12))
def test_float32_ranks_as_float64_does(data: st.DataObject, classes: int) -> None:
    numbers = st.sampled_from(CLOSE) | st.floats(-8, 8, width=32, allow_subnormal=False)
    row = data.draw(st.lists(numbers, min_size=classes, max_size=classes))
    label, k = data.draw(st.integers(0, classes - 1)), data.draw(st.integers(1, classes))
    teacher, labels = torch.tensor([row], dtype=torch.float64), torch.tensor([label])
    # No two ranks weigh the same.
    options = {"k": k, "scale_top": 4.0, "scale_last": 2.0, "scale_gt": 8.0, "shift": 0.0}
    exact, scaled = top_k_scaling(teacher, labels, **options), top_k_scaling(teacher.float(), labels, **options)
    torch.testing.assert_close(scaled, exact.float(), rtol=3e-7, atol=0.0)


@each_width
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_groups_give_ties_to_the_lower_index(sign: float, dtype: torch.dtype) -> None:
    # The group is {2, 0, 1} without ties, then {2} and the first two of the 299 equal ones. The student is aligned
    # with the teacher there and opposed in the rest: only that split gives 0 for the group and 2 for the rest.
    scaled = torch.full((1, 300), sign, dtype=dtype)
    scaled[0, 2] = 2 * sign
    student = torch.cat((scaled[:, :3], -scaled[:, 3:]), dim=1)
    loss = top_k_decoupled_loss(student, scaled, k=3, alpha=10.0, beta=10.0)
    torch.testing.assert_close(loss, torch.tensor(2.0, dtype=dtype))


@each_method
def test_order_of_classes_does_not_matter_without_ties(method: str) -> None:
    student, teacher, labels = random_case(5, 9, seed=12)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    criterion = build(method)
    shuffled = criterion(student[:, order], teacher[:, order], order.argsort()[labels])
    torch.testing.assert_close(shuffled, criterion(student, teacher, labels), rtol=1e-12, atol=0)


def test_scaling_follows_the_classes() -> None:
    _, teacher, labels = random_case(5, 9, seed=12)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = top_k_scaling(teacher[:, order], order.argsort()[labels], k=3, **SCALING)
    torch.testing.assert_close(shuffled, top_k_scaling(teacher, labels, k=3, **SCALING)[:, order], rtol=1e-14, atol=0)


# --- gradients --------------------------------------------------------------------------------------------------------


@each_method
def test_gradient_is_exact(method: str) -> None:
    student, teacher, labels = small_input()
    teacher[1] = teacher[1].abs() + 0.1  # no negative class: an empty group
    assert torch.autograd.gradcheck(lambda logits: build(method)(logits, teacher, labels), student)


@pytest.mark.parametrize("parameters", [{"normalize": False}, {"k": 1}, {"k": 4}], ids=str)
def test_gradient_of_the_objective_is_exact(parameters: dict[str, object]) -> None:
    student, teacher, labels = small_input()
    criterion = TopKDLoss(**({"k": 2, "alpha": 1.7, "beta": 0.6} | parameters))
    assert torch.autograd.gradcheck(lambda logits: criterion(logits, teacher, labels), student)


@pytest.mark.parametrize("method", ["ce", "kd", "dkd"])
def test_gradient_at_an_all_zero_student_row_is_exact(method: str) -> None:
    student, teacher, labels = small_input()
    with torch.no_grad():
        student[0] = 0
    assert torch.autograd.gradcheck(lambda logits: build(method)(logits, teacher, labels), student)


def test_gradient_where_student_and_teacher_are_zero_is_exact() -> None:
    student, teacher, _ = small_input()
    teacher[0] = 0  # cosine 0 whatever the student does, and constant around the student's zero row
    with torch.no_grad():
        student[0] = 0
    for function, options in (
        (top_k_decoupled_loss, {"k": 2, "alpha": 1.7, "beta": 0.6}),
        (contrastive_loss, {"temperature": 0.5, "normalize": False}),
    ):
        assert torch.autograd.gradcheck(lambda logits, f=function, o=options: f(logits, teacher, **o), student)


def test_gradient_of_a_group_of_one_class_vanishes() -> None:
    # A lone class has cosine 1 or -1, whatever the student's size.
    student = torch.tensor([[0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    top_k_decoupled_loss(student, torch.tensor([[3.0, -4.0]]), k=1, alpha=2.0, beta=3.0).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-14


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fill", [0.0, 0.1, 1e-3, 60000.0])
def test_gradient_of_constant_rows_is_finite(method: str, dtype: torch.dtype, fill: float) -> None:
    student, teacher, labels = floats(random_case(4, 6), dtype)
    student[0], student[1, :3], teacher[1] = fill, 0, fill
    student.requires_grad_()
    loss = build(method)(student, teacher, labels)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(("method", "term"), [("topkd", "tdl"), ("topkd", "contrastive"), ("lskd", "kd")])
@pytest.mark.parametrize("fill", [0.0, 1e-17])
def test_a_row_that_counts_as_zero_gets_no_gradient(method: str, term: str, fill: float) -> None:
    student, teacher, labels = floats(random_case(4, 6))
    student[0] = fill
    student.requires_grad_()
    build(method).terms(student, teacher, labels)[term].backward()
    assert student.grad is not None
    assert not student.grad[0].any()
    assert student.grad[1:].any()


def test_a_constant_row_standardises_to_zeros() -> None:
    # The mean of seven times 0.1 is not 0.1: what rounding leaves must not be blown up to a standard deviation of 1.
    student, teacher, labels = random_case(2, 7)
    student[0] = 0.1
    assert (student[0].mean() - student[0]).any()
    student.requires_grad_()
    LogitStandardKDLoss().terms(student, teacher, labels)["kd"].backward()
    assert student.grad is not None
    assert not student.grad[0].any()
    assert student.grad[1].any()


@each_method
def test_teacher_gets_no_gradient(method: str) -> None:
    student, teacher, labels = small_input()
    teacher.requires_grad_()
    build(method)(student, teacher, labels).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_teacher_gets_no_gradient_from_the_functions() -> None:
    student, teacher, labels = small_input()
    teacher.requires_grad_()
    assert not top_k_scaling(teacher, labels, k=2, **SCALING).requires_grad
    top_k_decoupled_loss(student, teacher, k=2, alpha=1.0, beta=1.0).backward()
    contrastive_loss(student, teacher, temperature=0.1, normalize=True).backward()
    assert teacher.grad is None


@each_method
def test_a_student_that_is_its_own_teacher_learns_as_from_a_copy(method: str) -> None:
    student, _, labels = small_input()
    (own,) = torch.autograd.grad(build(method)(student, student, labels), student)
    (copied,) = torch.autograd.grad(build(method)(student, student.detach().clone(), labels), student)
    assert torch.equal(own, copied)


def test_base_gets_scaled_detached_logits_in_full_precision() -> None:
    seen = []

    def base(*arguments: torch.Tensor) -> torch.Tensor:
        seen.extend(arguments)
        return (arguments[0] @ arguments[1].T).mean()

    student, teacher, labels = small_input()
    teacher.requires_grad_()
    criterion = TopKDPlugin(base, k=2, **SCALING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = criterion.terms(student.float(), teacher.float(), labels.int())["base"]
    torch.testing.assert_close(seen[1], top_k_scaling(teacher.float(), labels, k=2, **SCALING), rtol=0, atol=0)
    assert not seen[1].requires_grad
    assert (seen[0].dtype, seen[2].dtype, term.dtype) == (torch.float32, torch.int64, torch.float32)


# --- precision --------------------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(method: str, dtype: torch.dtype) -> None:
    student, teacher, labels = random_case(16, 12)
    half_student, half_teacher = (30 * student).to(dtype).requires_grad_(), (30 * teacher).to(dtype)
    loss = build(method)(half_student, half_teacher, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, build(method)(half_student.float(), half_teacher.float(), labels))
    assert half_student.grad is not None
    assert half_student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
    ],
)
def test_mixed_dtypes_promote(student_dtype: torch.dtype, teacher_dtype: torch.dtype, expected: torch.dtype) -> None:
    student, teacher, labels = random_case(4, 6)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    for method in set(METHODS) - {"ce"}:
        assert build(method)(student, teacher, labels).dtype == expected
    assert top_k_decoupled_loss(student, teacher, k=2, alpha=1.0, beta=1.0).dtype == expected
    assert contrastive_loss(student, teacher, temperature=0.1, normalize=True).dtype == expected
    assert top_k_scaling(teacher, labels, k=2, **SCALING).dtype == max(teacher_dtype, torch.float32, key=bits)


def bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


@each_method
def test_autocast_changes_nothing(method: str) -> None:
    student, teacher, labels = floats(random_case(8, 10))
    student.requires_grad_()
    outside = build(method)(student, teacher, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = build(method)(student, teacher, labels)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (outside, inside)]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("normalize", [True, False])
def test_autocast_changes_nothing_in_the_functions(normalize: bool) -> None:
    student, teacher, labels = floats(random_case(8, 10))

    def results() -> list[torch.Tensor]:
        return [
            top_k_scaling(teacher, labels, k=2, **SCALING),
            top_k_decoupled_loss(student, teacher, k=2, alpha=1.0, beta=1.0),
            contrastive_loss(student, teacher, temperature=0.1, normalize=normalize),
        ]

    outside = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results()
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]
)
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    student, teacher, labels = random_case(4, 6)
    for method in METHODS:
        criterion = build(method)
        assert torch.equal(criterion(student, teacher, labels.to(dtype)), criterion(student, teacher, labels))
    assert torch.equal(
        top_k_scaling(teacher, labels.to(dtype), k=2, **SCALING), top_k_scaling(teacher, labels, k=2, **SCALING)
    )


@each_method
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_logits_that_are_not_finite_are_not_hidden(method: str, bad: float) -> None:
    student, teacher, labels = random_case(4, 6)
    student[1, 2] = bad
    assert not build(method)(student, teacher, labels).isfinite()


# --- no waiting for the device, determinism ---------------------------------------------------------------------------


@each_method
def test_nothing_needs_a_value_on_the_host(method: str) -> None:
    # A meta tensor has no values: .item(), bool(tensor) and shapes that depend on data raise.
    student = torch.empty(4, 6, device="meta", requires_grad=True)
    teacher, labels = torch.empty(4, 6, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    loss = build(method)(student, teacher, labels)
    loss.backward()
    assert (loss.shape, loss.dtype) == ((), torch.float32)


@pytest.mark.parametrize("function", [top_k_scaling, top_k_decoupled_loss, contrastive_loss])
def test_functions_need_no_value_on_the_host(function: Callable[..., torch.Tensor]) -> None:
    student, teacher = torch.empty(4, 6, device="meta"), torch.empty(4, 6, device="meta")
    if function is top_k_scaling:
        assert function(teacher, torch.empty(4, dtype=torch.int64, device="meta"), k=2, **SCALING).shape == (4, 6)
    elif function is top_k_decoupled_loss:
        assert function(student, teacher, k=2, alpha=1.0, beta=1.0).shape == ()
    else:
        assert function(student, teacher, temperature=0.1, normalize=True).shape == ()


class Recorder(TorchDispatchMode):
    """Keep the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@each_method
def test_only_the_label_check_reads_a_value(method: str) -> None:
    student, teacher, labels = small_input()
    with Recorder() as recorder:
        build(method)(student, teacher, labels).backward()
    waits = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique_consecutive"}
    checks = 2 * (2 if method.endswith("+topkd") else 1)  # the smallest and the largest label; the base checks too
    assert [name for name in recorder.names if name in waits] == ["_local_scalar_dense"] * checks
    assert len(recorder.names) < 250  # a loop over samples or classes would show


def test_number_of_operators_does_not_grow_with_the_input() -> None:
    counts = []
    for batch, classes in ((2, 5), (40, 70)):
        with Recorder() as recorder:
            TopKDLoss(k=4)(*random_case(batch, classes))
        counts.append(len(recorder.names))
    assert counts[0] == counts[1]


def test_the_whole_objective_compiles_to_one_graph() -> None:
    student, teacher, labels = small_input()
    criterion = build("dkd+topkd")
    compiled = torch.compile(criterion, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher, labels), criterion(student, teacher, labels))
    torch.compiler.reset()


@each_method
def test_same_input_gives_the_same_bits(method: str) -> None:
    results = []
    for _ in range(2):
        student, teacher, labels = floats(random_case(64, 100))
        student.requires_grad_()
        loss = build_loss(method, {})(student, teacher, labels)
        loss.backward()
        results.append((loss.detach(), student.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_input_is_left_as_it_was() -> None:
    tensors = tied_case()
    before = copy.deepcopy(tensors)
    for method in METHODS:
        build(method)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_method
def test_cuda_agrees_with_cpu_and_never_waits(method: str) -> None:
    for case in CASES.values():
        results = []
        for device in ("cpu", "cuda"):
            student, teacher, labels = (tensor.to(device) for tensor in case)
            student = student.detach().requires_grad_()
            criterion = build(method)
            torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
            try:
                loss = criterion(student, teacher, labels)
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            results.append((loss.detach().cpu(), student.grad.cpu()))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


# --- terms, total, names ----------------------------------------------------------------------------------------------


@each_method
def test_total_of_the_terms_is_the_loss(method: str) -> None:
    student, teacher, labels = small_input()
    criterion = build(method)
    terms = criterion.terms(student, teacher, labels)
    assert all(term.shape == () for term in terms.values())
    assert torch.equal(criterion.total(terms), criterion(student, teacher, labels))
    assert torch.equal(criterion.total(dict(reversed(terms.items()))), criterion(student, teacher, labels))


def test_a_weight_may_be_moved_between_steps() -> None:
    student, teacher, labels = small_input()
    criterion = DKDLoss()
    criterion.alpha, criterion.beta = 0.25 * criterion.alpha, 0.25 * criterion.beta
    terms = criterion.terms(student, teacher, labels)
    warm = {name: term if name == "ce" else 0.25 * term for name, term in terms.items()}
    torch.testing.assert_close(criterion.total(terms), DKDLoss().total(warm))


def test_cross_entropy_needs_no_teacher() -> None:
    student, _, labels = small_input()
    criterion = CELoss(ce_weight=2.0)
    expected = torch.nn.functional.cross_entropy(student, labels)
    assert torch.equal(criterion(student, None, labels), 2 * expected)
    assert torch.equal(criterion.terms(student, None, labels)["ce"], expected)


@each_method
def test_parameters_round_trip(method: str) -> None:
    parameters = loss_parameters(method)
    changed = {name: value if isinstance(value, bool | str) else value + 1 for name, value in parameters.items()}
    criterion = build_loss(method, changed)
    for name, value in changed.items():
        owner = criterion.base if name.startswith("base_") and name != "base_weight" else criterion
        assert getattr(owner, name if owner is criterion else name.removeprefix("base_")) == value
        assert f"{name.removeprefix('base_')}={value!r}" in repr(criterion)
    assert repr(build_loss(method, {})) == repr(build_loss(method, parameters))


def test_objective_from_its_parameters() -> None:
    tensors = random_case(8, 10)
    expected = TopKDLoss()(*tensors)
    assert torch.equal(TopKDLoss(**loss_parameters("topkd"))(*tensors), expected)
    assert torch.equal(build_loss("topkd", loss_parameters("topkd"))(*tensors), expected)


def test_plugin_by_name_counts_the_cross_entropy_once() -> None:
    tensors = random_case(8, 10)
    named = build_loss("kd+topkd", {"base_temperature": 2.0, "base_kd_weight": 0.7, "k": 3})
    by_hand = TopKDPlugin(KDLoss(ce_weight=0.0, kd_weight=0.7, temperature=2.0), k=3)
    assert torch.equal(named(*tensors), by_hand(*tensors))
    assert "base_ce_weight" not in loss_parameters("kd+topkd")


@each_method
def test_losses_survive_pickling(method: str) -> None:
    tensors = random_case(8, 10)
    criterion = build_loss(method, {})
    assert torch.equal(pickle.loads(pickle.dumps(criterion))(*tensors), criterion(*tensors))
    assert not list(criterion.parameters())
    assert not criterion.state_dict()


def test_public_names_exist() -> None:
    assert all(hasattr(loss_module, name) for name in loss_module.__all__)
    assert METHODS == ("topkd", "kd", "dkd", "lskd", "ce", "kd+topkd", "dkd+topkd", "lskd+topkd")


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_PARAMETERS = [
    ({"k": 0}, "`k >= 1` must hold, but got k=0"),
    ({"k": -3}, "`k >= 1` must hold, but got k=-3"),
    ({"k": 2.0}, "`k` must be an integer, but got 2.0"),
    ({"k": True}, "`k` must be an integer, but got True"),
    ({"k": "5"}, "`k` must be an integer, but got '5'"),
    ({"scale_last": 0.9}, "`scale_last >= 1` must hold, but got scale_last=0.9"),
    ({"scale_last": 2.5}, "`scale_top >= scale_last` must hold, but got scale_top=2.0, scale_last=2.5"),
    ({"scale_gt": 1.5}, "`scale_gt >= scale_top` must hold, but got scale_gt=1.5, scale_top=2.0"),
    ({"shift": -0.1}, "`shift >= 0` must hold, but got shift=-0.1"),
    ({"scale_top": math.nan}, "`scale_top` must be a finite number, but got nan"),
    ({"scale_gt": math.inf}, "`scale_gt` must be a finite number, but got inf"),
    ({"alpha": -1.0}, "`alpha >= 0` must hold, but got alpha=-1.0"),
    ({"beta": -2.0}, "`beta >= 0` must hold, but got beta=-2.0"),
    ({"alpha": None}, "`alpha` must be a finite number, but got None"),
    ({"beta": False}, "`beta` must be a finite number, but got False"),
    ({"temperature": 0.0}, "`temperature > 0` must hold, but got temperature=0.0"),
    ({"temperature": -1.0}, "`temperature > 0` must hold, but got temperature=-1.0"),
    ({"temperature": math.inf}, "`temperature` must be a finite number, but got inf"),
    ({"normalize": "yes"}, "`normalize` must be True or False, but got 'yes'"),
    ({"ce_weight": -0.5}, "`ce_weight >= 0` must hold, but got ce_weight=-0.5"),
    ({"tdl_weight": "1e-1"}, "`tdl_weight` must be a finite number, but got '1e-1'"),
    ({"contrastive_weight": math.nan}, "`contrastive_weight` must be a finite number, but got nan"),
]


def refused(message: str) -> object:
    return pytest.raises(ValueError, match=f"^{message}$".translate({ord(c): f"\\{c}" for c in "()[]{}+*?.|"}))


@pytest.mark.parametrize(("parameters", "message"), BAD_PARAMETERS, ids=str)
def test_objective_refuses(parameters: dict[str, object], message: str) -> None:
    with refused(message):
        TopKDLoss(**parameters)


@pytest.mark.parametrize(("parameters", "message"), BAD_PARAMETERS, ids=str)
def test_functions_refuse(parameters: dict[str, object], message: str) -> None:
    student, teacher, labels = random_case(4, 6)
    functions = {
        top_k_scaling: (
            (teacher, labels),
            {"k": 2, "scale_top": 2.0, "scale_last": 1.0, "scale_gt": 3.0, "shift": 0.1},
        ),
        top_k_decoupled_loss: ((student, teacher), {"k": 2, "alpha": 1.0, "beta": 1.0}),
        contrastive_loss: ((student, teacher), {"temperature": 0.1, "normalize": True}),
    }
    for function, (tensors, options) in functions.items():
        if parameters.keys() <= options.keys():
            with refused(message):
                function(*tensors, **(options | parameters))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "topkd"])
def test_every_number_of_the_other_losses_is_checked(method: str) -> None:
    for name in (name for name, value in loss_parameters(method).items() if not isinstance(value, str)):
        plain = name.removeprefix("base_") if name != "base_weight" else name
        for bad in (-1, math.nan, "1"):
            with pytest.raises(ValueError, match=f"`{plain}( >= 0| > 0| >= 1)?` must"):
                build_loss(method, {name: bad})


@each_method
def test_input_of_the_wrong_kind_is_refused(method: str) -> None:
    student, teacher, labels = random_case(4, 6)
    criterion = build(method)
    with refused("`student_logits` must have the shape (B, C), neither 0, but got (24,)"):
        criterion(student.flatten(), teacher, labels)
    with refused("`student_logits` must have the shape (B, C), neither 0, but got (0, 6)"):
        criterion(student[:0], teacher[:0], labels[:0])
    with refused("`student_logits` must be floating point, but got torch.int64"):
        criterion(student.long(), teacher, labels)
    with refused("`labels` must be integers, but got torch.float64"):
        criterion(student, teacher, labels.double())
    with refused("`labels` must be integers, but got torch.bool"):
        criterion(student, teacher, labels.bool())
    with refused("`labels` must have the shape (4,), but got (4, 1)"):
        criterion(student, teacher, labels.unsqueeze(1))
    with refused("`labels` must have the shape (4,), but got (3,)"):
        criterion(student, teacher, labels[:3])
    with refused("`labels` must be from 0 to 5, but got 6"):
        criterion(student, teacher, torch.tensor([0, 6, 1, 2]))
    with refused("`labels` must be from 0 to 5, but got -100"):
        criterion(student, teacher, torch.tensor([0, -100, 1, 2]))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ce"])
def test_a_teacher_of_the_wrong_kind_is_refused(method: str) -> None:
    student, teacher, labels = random_case(4, 6)
    criterion = build(method)
    with refused("`student_logits` and `teacher_logits` must have the same shape, but got (4, 6) and (4, 5)"):
        criterion(student, teacher[:, :5], labels)
    with refused("`teacher_logits` must have the shape (B, C), neither 0, but got (4, 2, 3)"):
        criterion(student, teacher.view(4, 2, 3), labels)
    with refused("`teacher_logits` must be floating point, but got torch.complex128"):
        criterion(student, teacher.cdouble(), labels)


def test_functions_refuse_input_of_the_wrong_kind() -> None:
    student, teacher, labels = random_case(4, 6)
    with refused("`teacher_logits` must have the shape (B, C), neither 0, but got (6,)"):
        top_k_scaling(teacher[0], labels, k=2, **SCALING)
    with refused("`labels` must be from 0 to 5, but got 6"):
        top_k_scaling(teacher, labels * 0 + 6, k=2, **SCALING)
    with refused("`student_logits` and `scaled_teacher_logits` must have the same shape, but got (4, 6) and (3, 6)"):
        top_k_decoupled_loss(student, teacher[:3], k=2, alpha=1.0, beta=1.0)
    with refused("`student_logits` and `teacher_logits` must have the same shape, but got (4, 6) and (3, 6)"):
        contrastive_loss(student, teacher[:3], temperature=0.1, normalize=True)


NO_LABELS = {
    "numpy": (lambda y: y.numpy(), "a torch.Tensor, but got numpy.ndarray; torch.as_tensor(labels) makes one"),
    "list": (lambda y: y.tolist(), "a torch.Tensor, but got list; torch.as_tensor(labels) makes one"),
    "none": (lambda y: None, "a torch.Tensor, but got NoneType"),
    "number": (lambda y: 3, "a torch.Tensor, but got int"),
    "one-hot": (
        lambda y: torch.eye(6, dtype=torch.int64)[y],
        "shape (4,), but got (4, 6); the classes of one-hot rows are labels.argmax(1)",
    ),
    "soft": (
        lambda y: torch.eye(6)[y],
        "integers, but got torch.float32; the classes of one-hot rows are labels.argmax(1)",
    ),
    "unsigned out of range": (lambda y: (y * 0 + 6).to(torch.uint16), "from 0 to 5, but got 6"),
    "elsewhere": (lambda y: y.to("meta"), "where the other logits are, on cpu, but is on meta"),
}


@pytest.mark.parametrize("kind", NO_LABELS)
def test_labels_that_are_none_are_told_what_came(kind: str) -> None:
    student, teacher, labels = random_case(4, 6)
    make, told = NO_LABELS[kind]
    for call in (
        *(functools.partial(build(method), student, teacher) for method in METHODS),
        lambda labels: top_k_scaling(teacher, labels, k=2, **SCALING),
    ):
        with pytest.raises(ValueError, match=f"`labels` must (be|have the) {re.escape(told)}$"):
            call(make(labels))


NO_LOGITS = {
    "numpy": (lambda z: z.numpy(), "a torch.Tensor, but got numpy.ndarray"),
    "list": (lambda z: z.tolist(), "a torch.Tensor, but got list"),
    "none": (lambda z: None, "a torch.Tensor, but got NoneType"),
    "with features": (
        lambda z: (z, [z]),
        "a torch.Tensor, but got tuple; of what a network returns, hand over the logits alone",
    ),
    "8 bits": (
        lambda z: z.to(torch.float8_e4m3fn),
        "16 bits or more, but got torch.float8_e4m3fn; {}.float() has 32",
    ),
    "sparse": (lambda z: z.to_sparse(), "dense, but got torch.sparse_coo"),
}


@pytest.mark.parametrize("kind", NO_LOGITS)
def test_logits_that_are_none_are_told_what_came(kind: str) -> None:
    student, teacher, labels = random_case(4, 6)
    make, told = NO_LOGITS[kind]

    def refused_by(call: Callable[..., object], name: str) -> None:
        with pytest.raises(ValueError, match=f"^`{name}` must (be|have) {re.escape(told.format(name))}$"):
            call()

    for method in METHODS:
        refused_by(lambda method=method: build(method)(make(student), teacher, labels), "student_logits")
        if method != "ce":
            refused_by(lambda method=method: build(method)(student, make(teacher), labels), "teacher_logits")
    refused_by(lambda: top_k_scaling(make(teacher), labels, k=2, **SCALING), "teacher_logits")
    refused_by(lambda: top_k_decoupled_loss(student, make(teacher), k=2, alpha=1.0, beta=1.0), "scaled_teacher_logits")
    refused_by(lambda: contrastive_loss(make(student), teacher, temperature=0.1, normalize=True), "student_logits")


def test_logits_on_two_devices_are_refused() -> None:
    student, teacher, labels = random_case(4, 6)
    with refused("`teacher_logits` must be where the other logits are, on cpu, but is on meta"):
        TopKDLoss()(student, teacher.to("meta"), labels)
    with refused("`scaled_teacher_logits` must be where the other logits are, on cpu, but is on meta"):
        top_k_decoupled_loss(student, teacher.to("meta"), k=2, alpha=1.0, beta=1.0)


def test_more_than_all_classes_are_refused() -> None:
    student, teacher, labels = random_case(4, 6)
    for call in (
        lambda: TopKDLoss(k=7)(student, teacher, labels),
        lambda: TopKDPlugin(KDLoss(), k=7)(student, teacher, labels),
        lambda: top_k_scaling(teacher, labels, k=7, **SCALING),
        lambda: top_k_decoupled_loss(student, teacher, k=7, alpha=1.0, beta=1.0),
    ):
        with refused("`k <= C` must hold, but got k=7 and C=6"):
            call()


def test_decoupled_distillation_of_one_class_is_refused() -> None:
    one = torch.ones(2, 1)
    with refused("decoupled distillation needs C >= 2 classes, but got C=1"):
        DKDLoss()(one, one, torch.zeros(2, dtype=torch.int64))


def test_a_base_that_is_no_loss_is_refused() -> None:
    with refused("`base` must be callable with (student, teacher, labels), but got 'kd'"):
        TopKDPlugin("kd")
    with refused("`base` must return a scalar, but got shape (4, 6)"):
        TopKDPlugin(lambda student, teacher, labels: student - teacher, k=2)(*random_case(4, 6))


def test_terms_of_another_loss_are_refused() -> None:
    with refused("`terms` must have exactly the keys ce, kd, but got ce, tdl"):
        KDLoss().total({"ce": torch.zeros(()), "tdl": torch.zeros(())})
    with refused("`terms` must have exactly the keys ce, but got none"):
        CELoss().total({})


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    for call in (lambda: build_loss("topk", {}), lambda: loss_parameters("topk")):
        with refused(f"unknown method 'topk'; known methods: {', '.join(METHODS)}; or a callable: package.module:loss"):
            call()
    with refused("unknown parameters of method 'kd': 'tau', 'k'; known parameters: ce_weight, kd_weight, temperature"):
        build_loss("kd", {"tau": 1.0, "temperature": 2.0, "k": 3})
    for name in ("base_ce_weight", "base", "temperature", "base_k"):
        with pytest.raises(ValueError, match=f"unknown parameters of method 'kd.topkd': '{name}'; .* base_temperature"):
            build_loss("kd+topkd", {name: 1.0})


# --- groups of the contrastive loss -------------------------------------------------------------------------


def test_contrastive_batch_makes_the_term_that_of_batches_of_this_size() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 12, 7, dtype=torch.float64, generator=generator)
    labels = torch.arange(12) % 7
    whole, grouped = TopKDLoss(), TopKDLoss(contrastive_batch=4)
    parts = [
        whole.terms(student[i : i + 4], teacher[i : i + 4], labels[i : i + 4])["contrastive"] for i in range(0, 12, 4)
    ]
    term = grouped.terms(student, teacher, labels)["contrastive"]
    torch.testing.assert_close(term, torch.stack(parts).mean())
    assert term < whole.terms(student, teacher, labels)["contrastive"] - 0.1  # fewer to tell apart
    # A last group that is smaller counts by its samples.
    uneven = TopKDLoss(contrastive_batch=8).terms(student, teacher, labels)["contrastive"]
    eight, four = (whole.terms(student[s], teacher[s], labels[s])["contrastive"] for s in (slice(8), slice(8, 12)))
    torch.testing.assert_close(uneven, (8 * eight + 4 * four) / 12)


@pytest.mark.parametrize("value", [-1, 1.5, True, "4"])
def test_contrastive_batch_must_be_a_count(value: object) -> None:
    with pytest.raises(ValueError, match=f"`contrastive_batch.*{value}"):
        TopKDLoss(contrastive_batch=value)


# --- a user's loss ------------------------------------------------------------------------------------------

USERS = """
import torch
from tune_topkd.loss import KDLoss

def squared(student, teacher, labels, factor=2.0, *, power=2):
    return factor * (student - teacher).abs().pow(power).mean()

def shapeless(student, teacher, labels):
    return student - teacher

class Scaled(torch.nn.Module):
    def __init__(self, scale=3.0):
        super().__init__()
        if scale <= 0:
            raise ValueError(f"scale must be positive, but got {scale}")
        self.scale = scale

    def forward(self, student, teacher, labels):
        return self.scale * (student * teacher).mean()

class Warm(KDLoss):
    def __init__(self, *, ce_weight=0.5, temperature=8.0):
        super().__init__(ce_weight=ce_weight, temperature=temperature)

class Hidden:
    def __init__(self):
        self.map = torch.nn.Linear(9, 9)

class Listed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.maps = {"a": [torch.nn.Linear(9, 9)]}

class Lazy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.map = torch.nn.LazyLinear(9)

shared = torch.nn.Linear(9, 9)
one = torch.nn.BatchNorm1d(9)

def closed(student, teacher, labels):
    return shared(student).mean()

class Momentum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(9))

    def forward(self, student, teacher, labels):
        self.centre += teacher.mean(0)
        return (student - teacher + self.centre).square().mean()

instance = Momentum()

class ByMethod(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(9, 9)
        self.distances = [self.far, torch.nn.functional.mse_loss]

    def far(self, student, teacher):
        return (self.map(student) - teacher).abs().mean()

    def forward(self, student, teacher, labels):
        return sum(distance(student, teacher) for distance in self.distances)

class TwoTerms(KDLoss):
    def _terms(self, student, teacher, labels):
        return super()._terms(student, teacher, labels) | {"kd": student}

class Untold(KDLoss):
    def _terms(self, student, teacher, labels):
        return {"ce": student.sum()}

def told(student, teacher, labels):
    return {"loss": student.mean()}

number = 3
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with losses of a user's own."""
    name = f"users_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def pair() -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1))
    return student, teacher, torch.arange(6)


def test_a_function_of_the_users_is_a_loss_with_its_parameters(users: str) -> None:
    student, teacher, labels = pair()
    assert loss_parameters(f"{users}:squared") == {"factor": 2.0, "power": 2}
    loss = build_loss(f"{users}:squared", {"power": 3})
    assert loss.terms(student, teacher, labels).keys() == {"loss"}
    torch.testing.assert_close(loss(student, teacher, labels), 2 * (student - teacher).abs().pow(3).mean())


def test_a_class_of_the_users_is_constructed_and_keeps_its_terms(users: str) -> None:
    student, teacher, labels = pair()
    scaled = build_loss(f"{users}:Scaled", {"scale": 5.0})
    torch.testing.assert_close(scaled(student, teacher, labels), 5 * (student * teacher).mean())
    warm = build_loss(f"{users}:Warm", {"ce_weight": 1.0})
    assert warm.terms(student, teacher, labels).keys() == {"ce", "kd"}
    torch.testing.assert_close(
        warm(student, teacher, labels), KDLoss(ce_weight=1.0, temperature=8.0)(student, teacher, labels)
    )


def test_a_loss_of_the_users_is_the_base_of_the_plug_in(users: str) -> None:
    student, teacher, labels = pair()
    assert {"k", "tdl_weight", "base_weight", "base_factor", "base_power"} <= loss_parameters(
        f"{users}:squared+topkd"
    ).keys()
    assert "base_ce_weight" not in loss_parameters(f"{users}:Warm+topkd")
    ours = {"k": 2, "base_weight": 0.5}
    plugged = build_loss(f"{users}:squared+topkd", ours | {"base_power": 1})
    expected = TopKDPlugin(lambda s, t, y: 2 * (s - t).abs().mean(), **ours)
    torch.testing.assert_close(plugged(student, teacher, labels), expected(student, teacher, labels))
    warm = build_loss(f"{users}:Warm+topkd", {})
    expected = TopKDPlugin(KDLoss(ce_weight=0.0, temperature=8.0))
    torch.testing.assert_close(warm(student, teacher, labels), expected(student, teacher, labels))


@pytest.mark.parametrize(
    ("method", "parameters", "told"),
    [
        ("{}:missing", {}, "cannot be imported: AttributeError"),
        ("no_such_module_at_all:loss", {}, "cannot be imported: ModuleNotFoundError"),
        ("{}:number", {}, "must be callable, but is a int"),
        ("{}:squared", {"gamma": 1.0}, "unknown parameters of method .*: 'gamma'; known parameters: factor, power"),
        ("{}:Scaled", {"scale": -1.0}, "scale must be positive"),
        ("{}:Scaled", {"scale": "x"}, "cannot be constructed: TypeError"),
        ("{}:Hidden", {}, "its map holds what asks for a gradient, which is not trained there: derive the loss from"),
        ("{}:Hidden+topkd", {}, "its map holds what asks for a gradient"),
        ("{}:Listed", {}, "its maps holds what asks for a gradient"),
        ("{}:closed", {}, "its shared holds what asks for a gradient"),
        ("{}:Lazy", {}, r"its parameter map\.weight has no shape before the first call"),
        ("{}:one", {}, "is an object whose weights are there before the seed is set; name its class instead"),
    ],
)
def test_what_is_wrong_with_a_users_loss_is_told(users: str, method: str, parameters: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_loss(method.format(users), parameters)


def test_a_users_loss_must_return_a_scalar(users: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{users}:shapeless must return a scalar tensor, but returned shape \(6, 9\)"
    ):
        build_loss(f"{users}:shapeless", {})(*pair())


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("told", "told must return a scalar tensor, but returned dict"),
        ("TwoTerms", r"term 'kd' must be a scalar tensor, but is of shape \(6, 9\)"),
        ("Untold", "`terms` must have exactly the keys ce, kd, but got ce"),
    ],
)
def test_what_a_users_loss_returns_is_checked(users: str, method: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_loss(f"{users}:{method}", {})(*pair())


def test_an_object_of_the_users_is_new_for_every_training(users: str) -> None:
    first, second = (float(build_loss(f"{users}:instance", {})(*pair())) for _ in range(2))
    assert first == second


def test_what_a_loss_refers_to_is_not_taken_for_what_it_keeps(users: str) -> None:
    loss = build_loss(f"{users}:ByMethod", {})
    state = LossState(loss, torch.device("cpu"))
    loss(*pair()).backward()
    with torch.no_grad():
        loss.loss.map.weight += 1
    assert state.state().keys() == {"tensors"}


def test_the_state_of_a_loss_follows_it_to_its_device(users: str) -> None:
    loss = build_loss(f"{users}:Momentum", {})
    loss.loss.other = [torch.zeros(2)]
    LossState(loss, torch.device("meta"))
    assert (loss.loss.centre.device.type, loss.loss.other[0].device.type) == ("meta", "meta")


def test_a_buffer_may_grow(users: str) -> None:
    losses = [build_loss(f"{users}:Momentum", {}) for _ in range(2)]
    states = [LossState(loss, torch.device("cpu")) for loss in losses]
    losses[0].loss.centre = torch.ones(4, 9)
    states[1].restore(states[0].state())
    assert torch.equal(losses[1].loss.centre, torch.ones(4, 9))
    assert losses[1].state_dict().keys() == {"loss.centre"}
