"""Scores of patient-level predictions and their bootstrap intervals; the door to the plain scores.

Every function takes the labels first and the predictions second:

- `labels` (n,): integers in 0..C-1, one per patient;
- `probabilities` (n, C), rows summing to 1, or for two classes (n,): the probability of class 1;
- `threshold` in [0, 1]: two classes only. Class 1 is decided when its probability >= threshold. With three or
  more classes the most probable class is decided (the first one on a tie) and the threshold plays no part.

One weighted kernel, `weighted_scores`, defines every score. A plain score gives each patient weight 1; a bootstrap
resample gives each patient the number of times it was drawn, so that thousands of resamples are a few matrix
products instead of thousands of passes over the patients.

Beside it stand `metrics_calibration` (reliability, ECE, slope and intercept), `metrics_decision` (operating points,
predictive values, net benefit), `metrics_comparison` (two models) and `metrics_subgroups`.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import confusion_matrix

from .metrics_bootstrap import Bootstrap, Interval, bootstrap_weights
from .metrics_calibration import ReliabilityBin, reliability_bins
from .metrics_checks import Floats, Ints, check_predictions, check_probabilities, check_threshold, ratio
from .metrics_curves import precision_recall_band, ranking, roc_band, roc_points
from .metrics_decision import best_threshold, choose_threshold

__all__ = [
    "BINARY_SCORES",
    "MULTICLASS_SCORES",
    "Bootstrap",
    "Interval",
    "ReliabilityBin",
    "best_threshold",
    "bootstrap_intervals",
    "bootstrap_weights",
    "check_predictions",
    "choose_threshold",
    "confusion",
    "decide",
    "precision_recall_band",
    "reliability_bins",
    "roc_band",
    "roc_points",
    "score",
    "weighted_scores",
]

BINARY_SCORES = (
    "balanced_accuracy",
    "auroc",
    "auprc",
    "sensitivity",
    "specificity",
    "brier",
    "accuracy",
)
MULTICLASS_SCORES = ("balanced_accuracy", "auroc", "brier", "accuracy")


def score(labels: ArrayLike, probabilities: ArrayLike, *, threshold: float = 0.5) -> dict[str, float]:
    """Scores of one set of predictions, and the number of patients `n`.

    Two classes (class 1 is the positive one) give `BINARY_SCORES`, more give `MULTICLASS_SCORES`:

    - `balanced_accuracy`: mean over all C classes of the share of its patients decided correctly;
    - `sensitivity`, `specificity`: that share in class 1 and in class 0;
    - `auroc`: probability that a positive patient is ranked above a negative one, ties counting one half
      (Hanley and McNeil, Radiology 143:29, 1982); with C > 2 the unweighted mean of each class against the
      rest;
    - `auprc`: average precision, the sum over distinct thresholds of precision times the step in recall;
    - `brier`: two classes, mean of (p_1 - y)^2, in [0, 1]; C > 2, mean over patients of the sum over classes
      of (p_c - y_c)^2, in [0, 2] (Brier, Monthly Weather Review 78:1, 1950), which for C = 2 is twice the
      former;
    - `accuracy`: share of patients decided correctly.

    A score that the labels leave undefined is NaN: one that needs every class when a class has no patient
    (`balanced_accuracy`, `auroc`, `auprc`), `sensitivity` without positives, `specificity` without negatives,
    every score without patients.

    Raises:
        ValueError: wrong shapes, labels outside 0..C-1, probabilities that are not finite, outside [0, 1] or
            do not sum to 1, threshold outside [0, 1].

    Example:
        >>> score([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9])["auroc"]
        0.75
    """
    labels, probabilities = check_predictions(labels, probabilities)
    scores = weighted_scores(labels, probabilities, check_threshold(threshold), np.ones((1, len(labels))))
    return {name: float(values[0]) for name, values in scores.items()} | {"n": float(len(labels))}


def decide(probabilities: ArrayLike, *, threshold: float = 0.5) -> Ints:
    """The class decided for each patient, (n,) integers in 0..C-1; see the module for the rule."""
    return _decide(check_probabilities(probabilities), check_threshold(threshold))


def confusion(labels: ArrayLike, probabilities: ArrayLike, threshold: float = 0.5) -> Ints:
    """Patients by true class (rows) and decided class (columns), (C, C) integers; all 0 without patients."""
    labels, probabilities = check_predictions(labels, probabilities)
    classes = probabilities.shape[1]
    if len(labels) == 0:
        return np.zeros((classes, classes), dtype=np.int64)
    return confusion_matrix(labels, _decide(probabilities, check_threshold(threshold)), labels=range(classes))


def bootstrap_intervals(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    threshold: float = 0.5,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    method: Literal["percentile", "bca"] = "percentile",
) -> dict[str, Interval]:
    """Bootstrap confidence intervals of every score of `score`, resampling whole patients with replacement.

    A resample in which a score is undefined (it drew no patient of some class) is left out of that score's
    bounds and counted in `Interval.dropped`. Neither method can show doubt that the sample does not: a model
    without a single error has the interval [1, 1] however few the patients.

    Args:
        resamples, level, seed, method: as in `Bootstrap`.

    Raises:
        ValueError: as `score` and `Bootstrap`.

    Example:
        >>> interval = bootstrap_intervals([0, 0, 0, 1, 1, 1], [0.1, 0.2, 0.6, 0.4, 0.7, 0.9])["auroc"]
        >>> interval.low < interval.value <= interval.high
        True
    """
    labels, probabilities = check_predictions(labels, probabilities)
    threshold = check_threshold(threshold)
    bootstrap = Bootstrap(resamples, level, seed, method)
    return bootstrap.intervals(lambda weights: weighted_scores(labels, probabilities, threshold, weights), len(labels))


def weighted_scores(labels: Ints, probabilities: Floats, threshold: float, weights: Floats) -> dict[str, Floats]:
    """Every score under R weightings of the patients: `weights` (R, n) -> one (R,) array per score.

    Labels and probabilities are those that `check_predictions` returned.
    """
    classes = probabilities.shape[1]
    if len(labels) == 0:
        undefined = np.full(len(weights), np.nan)
        return dict.fromkeys(BINARY_SCORES if classes == 2 else MULTICLASS_SCORES, undefined)
    member = np.eye(classes)[labels]  # (n, C)
    correct = (_decide(probabilities, threshold) == labels).astype(float)  # (n,)
    total = weights.sum(axis=1)  # (R,)
    recall = ratio(weights @ (member * correct[:, None]), weights @ member)  # (R, C)
    squared_error = (probabilities - member) ** 2  # (n, C)
    accuracy = ratio(weights @ correct, total)
    if classes == 2:
        auroc, average_precision = ranking(labels == 1, probabilities[:, 1], weights)
        return {
            "balanced_accuracy": recall.mean(axis=1),
            "auroc": auroc,
            "auprc": average_precision,
            "sensitivity": recall[:, 1],
            "specificity": recall[:, 0],
            "brier": ratio(weights @ squared_error[:, 1], total),
            "accuracy": accuracy,
        }
    one_versus_rest = [ranking(labels == c, probabilities[:, c], weights)[0] for c in range(classes)]
    return {
        "balanced_accuracy": recall.mean(axis=1),
        "auroc": np.mean(one_versus_rest, axis=0),
        "brier": ratio(weights @ squared_error.sum(axis=1), total),
        "accuracy": accuracy,
    }


def _decide(probabilities: Floats, threshold: float) -> Ints:
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= threshold).astype(np.int64)
    return probabilities.argmax(axis=1)
