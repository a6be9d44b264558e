"""Trainings that were recorded, and a model of them from which any number of others can be drawn.

Extremely randomised trees (scikit-learn) say which recorded trainings a config is like: in each tree those of its leaf. The
mean of their curves, so weighed, is what a config is expected to do; one drawn training adds to it by how much one of them
differed from what the trees without it expected, scaled so that good configs spread over seeds as real ones do.
"""

import json
import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesRegressor

from tune_topkd.config import Scalar
from tune_topkd.config import weight_of_effect

Array = NDArray[np.float64]
RECORDED = Path(__file__).parent / "recorded"
DEFAULTS: Mapping[str, Scalar] = {
    "k": 5, "scale_top": 2.0, "scale_last": 1.0, "scale_gt": 3.0, "shift": 0.1, "alpha": 1.0, "beta": 1.0,
    "temperature": 0.1, "ce_weight": 1.0, "tdl_weight": 1.0, "contrastive_weight": 1.0,
}  # fmt: skip
UNCLIPPED = 30.0
"""The norm that stands for none: the gradients of glyphs are shorter."""
TREES = 200
LEAF = 3
"""Recorded trainings in a leaf, at least."""


@dataclass(frozen=True)
class Recorded:
    """Trainings of one method: what they were given, and their validation top-1 by epoch in percent."""

    params: list[dict[str, Scalar]]
    raw: Array
    """Of the weights themselves, (trainings, epochs)."""
    ema: Array
    """Of their moving average; NaN where it was not measured."""
    test: Array
    """Test top-1 at the end, (trainings)."""


def recorded(*names: str, method: str = "topkd", kinds: Sequence[str] = ()) -> Recorded:
    """The trainings of these files of `recorded/`, of some kinds or of all."""
    lines: list[dict[str, Any]] = []
    for name in names:
        lines += map(json.loads, (RECORDED / f"{name}.jsonl").read_text().splitlines())
    lines = [line for line in lines if line["method"] == method and (not kinds or line.get("kind", "random") in kinds)]
    lines.sort(key=lambda line: (line.get("kind", ""), line["number"]))
    raw = np.array([line["val"] for line in lines])
    ema = np.array([line["ema"] or [math.nan] * raw.shape[1] for line in lines])
    return Recorded([line["params"] for line in lines], raw, ema, np.array([line["test"] for line in lines]))


def features(params: Mapping[str, Scalar]) -> list[float]:
    """What a training depends on, in units of effect: step sizes of its three terms, K, temperature, clip and the rest."""
    loss = DEFAULTS | dict(params)
    number = {name: float(value) for name, value in loss.items()}
    lr = number["lr"]
    effects = [
        number[name] / weight_of_effect(name, loss) for name in ("ce_weight", "tdl_weight", "contrastive_weight")
    ]
    logs = [lr, *(lr * effect for effect in effects), *(effect / sum(effects) for effect in effects)]
    logs += [number["k"], number["temperature"], number["alpha"] / number["beta"], number["alpha"] * number["beta"]]
    logs.append(min(number.get("clip_grad", UNCLIPPED), UNCLIPPED))
    return [*map(math.log, logs), *(number[name] for name in ("scale_top", "scale_last", "scale_gt", "shift"))]


class _Trees:
    """All trees of a forest side by side: to look one config up in each takes scikit-learn a hundred times as long."""

    def __init__(self, forest: ExtraTreesRegressor) -> None:
        trees = [estimator.tree_ for estimator in forest.estimators_]
        size = max(tree.node_count for tree in trees)

        def side_by_side(name: str) -> NDArray[Any]:
            return np.array([np.pad(getattr(tree, name), (0, size - tree.node_count)) for tree in trees])

        self._left, self._right = side_by_side("children_left"), side_by_side("children_right")
        self._feature, self._threshold = side_by_side("feature"), side_by_side("threshold")
        self._depth = max(tree.max_depth for tree in trees)

    def leaves(self, x: Array) -> NDArray[np.int64]:
        """The leaf of each tree that a config falls into."""
        trees, nodes = np.arange(len(self._left)), np.zeros(len(self._left), dtype=np.int64)
        x = x.astype(np.float32)  # as scikit-learn compares
        for _ in range(self._depth):
            is_leaf = self._left[trees, nodes] < 0
            goes_left = x[self._feature[trees, nodes]] <= self._threshold[trees, nodes]
            below = np.where(goes_left, self._left[trees, nodes], self._right[trees, nodes])
            nodes = np.where(is_leaf, nodes, below)
        return nodes


class Surrogate:
    """Draws trainings that are like recorded ones.

    Args:
        known: what was recorded.
        seed_noise: standard deviation over seeds of a good config's value, in points.
    """

    def __init__(self, known: Recorded, seed_noise: float) -> None:
        self.known = known
        x = np.array([features(params) for params in known.params])
        epochs = known.raw.shape[1]
        shown = known.raw[:, [epochs // 4, epochs // 2, epochs - 1]]
        forest = ExtraTreesRegressor(
            TREES, min_samples_leaf=LEAF, max_features=0.5, bootstrap=True, random_state=0
        ).fit(x, shown)
        self._trees = _Trees(forest)
        self._leaves = np.array([self._trees.leaves(row) for row in x])
        self._in_bag = np.zeros_like(self._leaves, dtype=bool)
        for tree, drawn in enumerate(forest.estimators_samples_):
            self._in_bag[np.unique(drawn), tree] = True
        own = np.array([self._weights(leaves, ~bag) for leaves, bag in zip(self._leaves, self._in_bag, strict=True)])
        self.expected = self._mean(own, known.raw)
        """What trees that had not seen a training expected of it, (trainings, epochs)."""
        self._has_ema = np.isfinite(known.ema[:, 0])
        ema_expected = self._mean(own, known.ema)
        better = known.raw[:, -1] >= np.median(known.raw[:, -1])
        spread = float(np.std((known.raw - self.expected)[better, -1]))
        self.noise_scale = min(1.0, seed_noise / spread)
        self._residual = (known.raw - self.expected) * self.noise_scale
        self._ema_residual = (known.ema - ema_expected) * self.noise_scale

    def mean(self, params: Sequence[Mapping[str, Scalar]]) -> Array:
        """The expected value of each config at its last epoch."""
        ends = self.known.raw[:, -1]
        return np.array([self._weights(self._trees.leaves(np.array(features(p)))) @ ends for p in params])

    def curve(self, params: Mapping[str, Scalar], seed: int) -> tuple[Array, Array]:
        """One training's validation top-1 by epoch: of the weights, and of their average."""
        weights = self._weights(self._trees.leaves(np.array(features(params))))
        those = self._with_ema(weights)
        like = np.random.default_rng(seed).choice(len(weights), p=those)
        # Trees expect too little of the best: what they are short of by here on average is no noise.
        raw_noise, ema_noise = (r[like] - self._mean(those[None], r)[0] for r in (self._residual, self._ema_residual))
        raw = self._mean(weights[None], self.known.raw)[0] + raw_noise
        ema = self._mean(weights[None], self.known.ema)[0] + ema_noise
        return np.clip(raw, 0.0, 100.0), np.clip(ema, 0.0, 100.0)

    def _weights(self, leaves: NDArray[np.int64], trees: NDArray[np.bool_] | None = None) -> Array:
        """How much each recorded training counts for a config in these leaves, 1 in all; of some trees or of all."""
        same = (self._leaves == leaves) & self._in_bag
        counts = same.sum(axis=0)
        of_trees = np.where(counts > 0, same / np.maximum(counts, 1), 0.0)
        weights = of_trees.sum(axis=1) if trees is None else of_trees @ trees
        return weights / weights.sum()

    def _with_ema(self, weights: Array) -> Array:
        chosen = np.where(self._has_ema, weights, 0.0)
        return chosen / chosen.sum()

    @staticmethod
    def _mean(weights: Array, curves: Array) -> Array:
        """Weighted means of the curves that there are."""
        there = np.isfinite(curves[:, 0])
        of_these = weights[:, there]
        return of_these @ curves[there] / of_these.sum(axis=1, keepdims=True)
