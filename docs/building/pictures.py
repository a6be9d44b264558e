"""Draws the pictures of docs/glossary.md, by the functions of `tune_topkd.loss` themselves.

python docs/building/pictures.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tune_topkd.loss import contrastive_loss
from tune_topkd.loss import top_k_decoupled_loss
from tune_topkd.loss import top_k_scaling
from tune_topkd.report import BEST_COLOUR
from tune_topkd.report import COMPLETED_COLOUR
from tune_topkd.report import FAILED_COLOUR
from tune_topkd.report import FAINT_INK
from tune_topkd.report import INK
from tune_topkd.report.style import new_figure
from tune_topkd.report.style import plain

FOLDER = Path(__file__).parents[1] / "pictures"

LOGITS = torch.tensor([[6.0, 4.2, 3.4, 2.6, 1.8, 1.0, 0.3, -0.4, -1.1, -1.8, -2.6, -3.6]])
"""A teacher's logits of one image, of 12 classes, sorted."""
RIGHT = torch.tensor([0])
"""The label of an image that the teacher classifies rightly."""
DEFAULTS = {"k": 5, "scale_top": 2.0, "scale_last": 1.0, "scale_gt": 3.0, "shift": 0.1}

COLOURS = (COMPLETED_COLOUR, BEST_COLOUR, "#009E73", FAILED_COLOUR)


def draw(folder: Path = FOLDER) -> list[Path]:
    """Write all pictures into a folder and give their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figure in {
        "k": _scaled("K", "k", (2, 5, 9)),
        "scale_top": _scaled("scale_top", "scale_top", (1.0, 2.0, 4.0)),
        "scale_last": _scaled("scale_last", "scale_last", (1.0, 1.5, 2.0)),
        "shift": _scaled("shift", "shift", (0.0, 0.1, 0.5)),
        "scale_gt": _missed(),
        "groups": _groups(),
        "temperature": _temperature(),
        "ema": _ema(),
    }.items():
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=110, metadata={"Software": None})
    return made


def _figure() -> tuple[Figure, Axes]:
    figure = new_figure(6.4, 3.1)
    axes = figure.subplots()
    plain(axes)
    return figure, axes


def _by_rank(axes: Axes) -> None:
    ranks = range(1, LOGITS.shape[1] + 1)
    axes.set_xticks(list(ranks))
    axes.set_xlabel("class, by the rank of its logit")
    axes.set_ylabel("teacher's logit")
    axes.axhline(0, color=FAINT_INK, linewidth=0.8)
    axes.plot(ranks, LOGITS[0], color=FAINT_INK, linewidth=1, linestyle=":", label="unscaled")


def _scaled(label: str, parameter: str, values: tuple[float, ...]) -> Figure:
    """What the scaling module makes of the logits, for some values of one parameter, with the defaults for the rest."""
    figure, axes = _figure()
    _by_rank(axes)
    for value, colour, marker in zip(values, COLOURS, "ovs", strict=False):
        given = DEFAULTS | {parameter: value}
        given["scale_gt"] = max(given["scale_gt"], given["scale_top"])
        scaled = top_k_scaling(LOGITS, RIGHT, **given)[0]  # type: ignore[arg-type]
        axes.plot(
            range(1, len(scaled) + 1), scaled, color=colour, marker=marker, markersize=4, linewidth=1.2,
            label=f"{label} = {value:g}",
        )  # fmt: skip
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _missed() -> Figure:
    """The same where the label is of rank 3: the teacher is wrong."""
    figure, axes = _figure()
    _by_rank(axes)
    for value, colour, marker in zip((2.0, 3.0, 5.0), COLOURS, "ovs", strict=False):
        scaled = top_k_scaling(LOGITS, torch.tensor([2]), **DEFAULTS | {"scale_gt": value})[0]  # type: ignore[arg-type]
        axes.plot(
            range(1, len(scaled) + 1), scaled, color=colour, marker=marker, markersize=4, linewidth=1.2,
            label=f"scale_gt = {value:g}",
        )  # fmt: skip
    axes.annotate("the ground truth, which\nthe teacher ranks third", (4.2, 13), fontsize=8, color=INK)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _groups() -> Figure:
    """The three groups of the decoupled loss, as its own weights tell them apart."""
    figure, axes = _figure()
    scaled = top_k_scaling(LOGITS, RIGHT, **DEFAULTS)  # type: ignore[arg-type]
    of = [_weighed(scaled, index) for index in range(scaled.shape[1])]
    names = {"alpha": "positive Top-K, weight α", "beta": "negative Top-K, weight β", "rest": "the rest, weight 1"}
    for (group, label), colour in zip(names.items(), COLOURS, strict=False):
        here = [index for index, found in enumerate(of) if found == group]
        axes.bar([index + 1 for index in here], scaled[0, here].tolist(), color=colour, width=0.7, label=label)
    axes.set_xticks(range(1, scaled.shape[1] + 1))
    axes.set_xlabel("class, by the rank of its logit")
    axes.set_ylabel("scaled logit")
    axes.axhline(0, color=FAINT_INK, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _weighed(scaled: Tensor, index: int) -> str:
    """Which weight of the decoupled loss a class has: the one without which its logit has no gradient."""
    student = torch.linspace(1.0, -1.0, scaled.shape[1]).unsqueeze(0).requires_grad_()
    for name, weights in {"alpha": (1.0, 0.0), "beta": (0.0, 1.0)}.items():
        loss = [
            top_k_decoupled_loss(student, scaled, k=5, alpha=alpha, beta=beta) for alpha, beta in (weights, (0.0, 0.0))
        ]
        (gradient,) = torch.autograd.grad(loss[0] - loss[1], student)
        if abs(float(gradient[0, index])) > 1e-6:
            return name
    return "rest"


def _temperature() -> Figure:
    """How the contrastive loss tells a student's image from others as their likeness grows, by temperature."""
    figure, axes = _figure()
    likeness = torch.linspace(-0.2, 1.0, 100)
    for value, colour in zip((0.05, 0.1, 0.5, 2.0), COLOURS, strict=True):
        losses = [_contrasted(float(cosine), value) for cosine in likeness]
        axes.plot(likeness, losses, color=colour, linewidth=1.4, label=f"temperature = {value:g}")
    axes.set_ylim(0, 6)
    axes.set_xlabel("cosine between the student's and the teacher's logits of the same image")
    axes.set_ylabel("contrastive loss")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _contrasted(cosine: float, temperature: float, images: int = 64) -> float:
    """The loss of images whose teacher's logits are orthogonal, and whose student's have this cosine with their own."""
    teacher = torch.eye(images, images + 1)
    student = cosine * teacher
    student[:, -1] = (1 - cosine**2) ** 0.5
    return float(contrastive_loss(student, teacher, temperature=temperature, normalize=True))


def _ema() -> Figure:
    """What a step counts in the moving average, so many epochs later."""
    figure, axes = _figure()
    epochs = torch.linspace(0, 3, 200)
    for value, colour in zip((0.2, 0.4, 1.0), COLOURS, strict=False):
        axes.plot(epochs, torch.exp(-epochs / value), color=colour, linewidth=1.4, label=f"decay_epochs = {value:g}")
    axes.set_xlabel("epochs since the step")
    axes.set_ylabel("what it counts")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER):
        print(path)
