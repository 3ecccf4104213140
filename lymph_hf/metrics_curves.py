"""Ranking of patients by their probability: weighted ROC counts, AUROC, average precision, curves and their bands."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import roc_curve

from .metrics_bootstrap import Bootstrap, central
from .metrics_checks import Bools, Floats, both_classes, ratio


def weight_by_distinct_value(positive: Bools, ranked_by: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weight of positives and of negatives at each of G distinct values, highest first: two (R, G) arrays."""
    order = np.argsort(-ranked_by, kind="stable")
    starts = np.flatnonzero(np.diff(ranked_by[order], prepend=np.inf))
    by_value = weights[:, order]
    positives = np.add.reduceat(by_value * positive[order], starts, axis=1)
    return positives, np.add.reduceat(by_value, starts, axis=1) - positives


def roc_counts(positive: Bools, ranked_by: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """True and false positives, by weight, at each cut from "nobody" to "everybody": two (R, G + 1) arrays."""
    by_value = weight_by_distinct_value(positive, ranked_by, weights)
    true_positives, false_positives = (np.pad(part.cumsum(axis=1), ((0, 0), (1, 0))) for part in by_value)
    return true_positives, false_positives


def ranking(positive: Bools, ranked_by: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weighted AUROC and average precision, each (R,); NaN where either class has no weight.

    The AUROC is the Mann-Whitney statistic: every unit of positive weight scores the negative weight ranked
    strictly below it and half of the negative weight tied with it.
    """
    positives, negatives = weight_by_distinct_value(positive, ranked_by, weights)  # (R, G) each
    true_positives, false_positives = positives.cumsum(axis=1), negatives.cumsum(axis=1)
    all_positives, all_negatives = true_positives[:, -1], false_positives[:, -1]
    below_or_half = all_negatives[:, None] - false_positives + negatives / 2
    auroc = ratio((positives * below_or_half).sum(axis=1), all_positives * all_negatives)
    precision = ratio(true_positives, true_positives + false_positives)
    # A leading value without weight has no precision; it has no step in recall either, so it adds nothing.
    steps = np.where(positives > 0, positives * precision, 0.0).sum(axis=1)
    average_precision = ratio(steps, np.where(all_negatives > 0, all_positives, 0.0))
    return auroc, average_precision


def roc_points(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """ROC curve: false-positive rate, true-positive rate and threshold, from (0, 0) to (1, 1), each (G,).

    Raises:
        ValueError: as `metrics.score`; not two classes, patients of one class only.
    """
    positive, ranked_by = both_classes(labels, probabilities, "an ROC curve")
    return roc_curve(positive, ranked_by, drop_intermediate=False)


def roc_band(
    labels: ArrayLike, probabilities: ArrayLike, *, bootstrap: Bootstrap | None = None, points: int = 101
) -> tuple[Floats, Floats, Floats]:
    """Pointwise bootstrap band of the ROC curve: false-positive rates, lower, upper sensitivity, (points,).

    Resamples without patients of both classes are left out.

    Args:
        bootstrap: how the band is made; None means `Bootstrap()`. An equal one draws what `bootstrap_intervals` draws.

    Raises:
        ValueError: as `roc_points`; every resample held one class only.
    """
    return _band(labels, probabilities, _sensitivity_at, bootstrap or Bootstrap(), points)


def precision_recall_band(
    labels: ArrayLike, probabilities: ArrayLike, *, bootstrap: Bootstrap | None = None, points: int = 101
) -> tuple[Floats, Floats, Floats]:
    """Pointwise bootstrap band of the precision-recall curve: recalls, lower, upper precision, (points,).

    Between two cuts the precision is that of the one with more patients: a line between them would promise what no
    threshold gives (Davis and Goadrich, ICML 2006).

    Raises:
        ValueError: as `roc_band`.
    """
    return _band(labels, probabilities, _precision_at, bootstrap or Bootstrap(), points)


def _band(
    labels: ArrayLike, probabilities: ArrayLike, curve: Callable, bootstrap: Bootstrap, points: int
) -> tuple[Floats, Floats, Floats]:
    """Central quantiles of a curve over the resamples that hold both classes, at evenly spread places."""
    positive, ranked_by = both_classes(labels, probabilities, "a band")
    grid = np.linspace(0, 1, points)
    curves = []
    for weights in bootstrap.weights(len(positive)):
        true_positives, false_positives = roc_counts(positive, ranked_by, weights)
        both = (true_positives[:, -1] > 0) & (false_positives[:, -1] > 0)
        curves += [curve(grid, *counts) for counts in zip(true_positives[both], false_positives[both], strict=True)]
    if not curves:
        raise ValueError(f"all {bootstrap.resamples} resamples held one class only: no band; draw more resamples")
    low, high = np.quantile(curves, central(bootstrap.level), axis=0)
    return grid, low, high


def _sensitivity_at(grid: Floats, true_positives: Floats, false_positives: Floats) -> Floats:
    """Sensitivity at false-positive rates; counts are those of `roc_counts`, (G + 1,)."""
    return np.interp(grid, false_positives / false_positives[-1], true_positives / true_positives[-1])


def _precision_at(grid: Floats, true_positives: Floats, false_positives: Floats) -> Floats:
    """Precision at the first cut that reaches each recall."""
    drawn = true_positives + false_positives
    some = drawn > 0  # a cut above everybody has no precision
    recall = true_positives[some] / true_positives[-1]
    precision = true_positives[some] / drawn[some]
    return precision[np.searchsorted(recall, grid - 1e-12)]
