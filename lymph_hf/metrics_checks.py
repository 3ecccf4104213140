"""Labels and probabilities in full form, or an error that names the row; the array types of the scores."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logit

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Probabilities written in half precision miss a sum of 1 by up to about 1e-3.
_SUM_TOLERANCE = 2e-3
# A probability of exactly 0 or 1 has no logit; single precision rounds to them within about 1e-7.
_SMALLEST_PROBABILITY = 1e-6


def check_predictions(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Ints, Floats]:
    """Labels (n,) and probabilities (n, C) in full form, or a ValueError as in `metrics.score`."""
    probabilities = check_probabilities(probabilities)
    labels = check_labels(labels, classes=probabilities.shape[1])
    if len(labels) != len(probabilities):
        raise ValueError(f"labels and probabilities differ in length: {len(labels)} and {len(probabilities)}")
    return labels, probabilities


def check_labels(labels: ArrayLike, classes: int) -> Ints:
    """Labels (n,) as integers in 0..classes-1, or a ValueError."""
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (n,), got {labels.shape}")
    if labels.size and labels.dtype.kind not in "iub":
        raise ValueError(f"labels must be integers in 0..{classes - 1}, got dtype {labels.dtype}; map names to them")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(f"labels must lie in 0..{classes - 1} for {classes} classes, got {labels[row]} in row {row}")
    return labels.astype(np.int64)


def check_probabilities(probabilities: ArrayLike) -> Floats:
    """Probabilities (n, C) of C >= 2 classes; (n,) is the probability of class 1 of two."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim == 1:
        probabilities = np.stack([1 - probabilities, probabilities], axis=1)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities must have shape (n,) or (n, C) with C >= 2, got {probabilities.shape}; for two"
            " classes pass the probability of class 1 as (n,)"
        )
    _check_rows(np.isfinite(probabilities).all(axis=1), probabilities, "be finite")
    _check_rows(((probabilities >= 0) & (probabilities <= 1)).all(axis=1), probabilities, "lie in [0, 1]")
    sums_to_one = np.abs(probabilities.sum(axis=1) - 1) <= _SUM_TOLERANCE
    _check_rows(sums_to_one, probabilities, "sum to 1 in each row (apply a softmax to logits)")
    return probabilities


def _check_rows(good: Bools, probabilities: Floats, must: str) -> None:
    if not good.all():
        row = int(good.argmin())
        raise ValueError(f"probabilities must {must}, got {probabilities[row].tolist()} in row {row}")


def two_classes(labels: ArrayLike, probabilities: ArrayLike, purpose: str) -> tuple[Bools, Floats]:
    """Which patients are positive (n,), and their probability of it (n,); a ValueError for more classes."""
    labels, probabilities = check_predictions(labels, probabilities)
    if probabilities.shape[1] != 2:
        raise ValueError(
            f"{purpose} is defined for 2 classes, got probabilities of {probabilities.shape[1]} classes;"
            " compare one class with the rest: labels == c, probabilities[:, c]"
        )
    return labels == 1, probabilities[:, 1]


def both_classes(labels: ArrayLike, probabilities: ArrayLike, purpose: str) -> tuple[Bools, Floats]:
    """As `two_classes`; each of the two must have a patient."""
    positive, predicted = two_classes(labels, probabilities, purpose)
    positives = int(positive.sum())
    if positives in (0, len(positive)):
        raise ValueError(
            f"{purpose} needs patients of both classes, got {len(positive) - positives} of class 0 and"
            f" {positives} of class 1; use a larger or a stratified set"
        )
    return positive, predicted


def check_threshold(threshold: Any) -> float:
    """A decision threshold in [0, 1]."""
    threshold = float(threshold)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    return threshold


def check_share(name: str, share: float) -> float:
    """A share that leaves something on both sides: strictly between 0 and 1."""
    share = float(share)
    if not 0 < share < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {share}")
    return share


def log_odds(probabilities: ArrayLike) -> Floats:
    """Logits of probabilities, which are clipped to [1e-6, 1 - 1e-6]."""
    return logit(np.clip(probabilities, _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY))


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Element-wise quotient; NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)
