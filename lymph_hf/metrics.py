"""Scores of patient-level predictions, their bootstrap intervals, and the points that figures draw.

Every function takes the labels first and the predictions second:

- `labels` (n,): integers in 0..C-1, one per patient;
- `probabilities` (n, C), rows summing to 1, or for two classes (n,): the probability of class 1;
- `threshold` in [0, 1]: two classes only. Class 1 is decided when its probability >= threshold. With three or
  more classes the most probable class is decided (the first one on a tie) and the threshold plays no part.

One weighted kernel, `_scores`, defines every score. A plain score gives each patient weight 1; a bootstrap
resample gives each patient the number of times it was drawn, so that thousands of resamples are a few matrix
products instead of thousands of passes over the patients.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import binomtest, rankdata
from sklearn.metrics import confusion_matrix, roc_curve

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

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

# Probabilities written in half precision miss a sum of 1 by up to about 1e-3.
_SUM_TOLERANCE = 2e-3
# Largest (resamples, patients) block of weights held at once: 32 MB of float64.
_BLOCK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A score with its confidence interval.

    `dropped` is the share of resamples, 0 to 1, in which the score was undefined and which the bounds
    therefore leave out. `value`, `low` and `high` are NaN where they are undefined.
    """

    value: float
    low: float
    high: float
    level: float = 0.95
    dropped: float = 0.0

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        bounds = "undefined" if math.isnan(self.low) else f"{self.low:.3f} to {self.high:.3f}"
        return f"{self.value:.3f} ({bounds})"

    def as_dict(self) -> dict[str, float | None]:
        """The fields for strict JSON: NaN becomes None."""
        return {name: None if math.isnan(field) else field for name, field in asdict(self).items()}


@dataclass(frozen=True)
class ReliabilityBin:
    """Patients of similar probability: mean prediction against observed frequency of the positive class."""

    predicted: float
    observed: float
    low: float  # Wilson interval of `observed`
    high: float
    count: int


# Scores -----------------------------------------------------------------------------------------------------


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
    scores = _scores(labels, probabilities, _checked_threshold(threshold), np.ones((1, len(labels))))
    return {name: float(values[0]) for name, values in scores.items()} | {"n": float(len(labels))}


def decide(probabilities: ArrayLike, *, threshold: float = 0.5) -> Ints:
    """The class decided for each patient, (n,) integers in 0..C-1; see the module for the rule."""
    return _decide(_checked_probabilities(probabilities), _checked_threshold(threshold))


def confusion(labels: ArrayLike, probabilities: ArrayLike, threshold: float = 0.5) -> Ints:
    """Patients by true class (rows) and decided class (columns), (C, C) integers; all 0 without patients."""
    labels, probabilities = check_predictions(labels, probabilities)
    classes = probabilities.shape[1]
    if len(labels) == 0:
        return np.zeros((classes, classes), dtype=np.int64)
    return confusion_matrix(labels, _decide(probabilities, _checked_threshold(threshold)), labels=range(classes))


def _decide(probabilities: Floats, threshold: float) -> Ints:
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= threshold).astype(np.int64)
    return probabilities.argmax(axis=1)


def _scores(labels: Ints, probabilities: Floats, threshold: float, weights: Floats) -> dict[str, Floats]:
    """Every score under R weightings of the patients: `weights` (R, n) -> one (R,) array per score."""
    classes = probabilities.shape[1]
    if len(labels) == 0:
        undefined = np.full(len(weights), np.nan)
        return dict.fromkeys(BINARY_SCORES if classes == 2 else MULTICLASS_SCORES, undefined)
    member = np.eye(classes)[labels]  # (n, C)
    correct = (_decide(probabilities, threshold) == labels).astype(float)  # (n,)
    total = weights.sum(axis=1)  # (R,)
    recall = _ratio(weights @ (member * correct[:, None]), weights @ member)  # (R, C)
    squared_error = (probabilities - member) ** 2  # (n, C)
    accuracy = _ratio(weights @ correct, total)
    if classes == 2:
        auroc, average_precision = _ranking(labels == 1, probabilities[:, 1], weights)
        return {
            "balanced_accuracy": recall.mean(axis=1),
            "auroc": auroc,
            "auprc": average_precision,
            "sensitivity": recall[:, 1],
            "specificity": recall[:, 0],
            "brier": _ratio(weights @ squared_error[:, 1], total),
            "accuracy": accuracy,
        }
    one_versus_rest = [_ranking(labels == c, probabilities[:, c], weights)[0] for c in range(classes)]
    return {
        "balanced_accuracy": recall.mean(axis=1),
        "auroc": np.mean(one_versus_rest, axis=0),
        "brier": _ratio(weights @ squared_error.sum(axis=1), total),
        "accuracy": accuracy,
    }


def _ranking(positive: NDArray[np.bool_], ranked_by: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weighted AUROC and average precision, each (R,); NaN where either class has no weight.

    The AUROC is the Mann-Whitney statistic: every unit of positive weight scores the negative weight ranked
    strictly below it and half of the negative weight tied with it.
    """
    positives, negatives = _weight_by_distinct_value(positive, ranked_by, weights)  # (R, G) each
    true_positives, false_positives = positives.cumsum(axis=1), negatives.cumsum(axis=1)
    all_positives, all_negatives = true_positives[:, -1], false_positives[:, -1]
    below_or_half = all_negatives[:, None] - false_positives + negatives / 2
    auroc = _ratio((positives * below_or_half).sum(axis=1), all_positives * all_negatives)
    precision = _ratio(true_positives, true_positives + false_positives)
    # A leading value without weight has no precision; it has no step in recall either, so it adds nothing.
    steps = np.where(positives > 0, positives * precision, 0.0).sum(axis=1)
    average_precision = _ratio(steps, np.where(all_negatives > 0, all_positives, 0.0))
    return auroc, average_precision


def _weight_by_distinct_value(positive: NDArray[np.bool_], ranked_by: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weight of positives and of negatives at each of G distinct values, highest first: two (R, G) arrays."""
    order = np.argsort(-ranked_by, kind="stable")
    starts = np.flatnonzero(np.diff(ranked_by[order], prepend=np.inf))
    by_value = weights[:, order]
    positives = np.add.reduceat(by_value * positive[order], starts, axis=1)
    return positives, np.add.reduceat(by_value, starts, axis=1) - positives


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Element-wise quotient; NaN where the denominator is 0."""
    undefined = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)


# Bootstrap --------------------------------------------------------------------------------------------------


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
        resamples: number of resamples, at least 1. 2,000 hold the ends of a 95 % interval to about its third
        digit.
        level: nominal coverage, strictly between 0 and 1.
        seed: same seed, same patients, same intervals.
        method: `percentile` takes the quantiles of the resampled scores; `bca` moves them for bias and
            skewness, with the jackknife over patients (Efron, JASA 82:171, 1987). BCa bounds are NaN where
            the correction is not defined, that is when every resample lies on one side of the value.

    Raises:
        ValueError: as `score`; resamples below 1, level outside (0, 1), unknown method.

    Example:
        >>> interval = bootstrap_intervals([0, 0, 0, 1, 1, 1], [0.1, 0.2, 0.6, 0.4, 0.7, 0.9])["auroc"]
        >>> interval.low < interval.value <= interval.high
        True
    """
    labels, probabilities = check_predictions(labels, probabilities)
    threshold = _checked_threshold(threshold)
    if method not in ("percentile", "bca"):
        raise ValueError(f"method must be 'percentile' or 'bca', got {method!r}")
    _check_bootstrap(resamples, level)
    values = score(labels, probabilities, threshold=threshold)
    draws = _scores_over(labels, probabilities, threshold, bootstrap_weights(len(labels), resamples, seed))
    if method == "percentile":
        return {name: _interval(values[name], draws[name], level, _central(level)) for name in draws}
    left_out = _scores_over(labels, probabilities, threshold, _jackknife_weights(len(labels)))
    return {
        name: _interval(values[name], draws[name], level, _bca(level, values[name], draws[name], left_out[name]))
        for name in draws
    }


def bootstrap_weights(patients: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each patient is drawn in each resample: blocks (r, n) of whole numbers, rows summing to n.

    The blocks bound the memory, and hold `resamples` rows together; the draws do not depend on where they are
    cut.
    """
    generator = np.random.default_rng(seed)
    for rows in _block_rows(resamples, patients):
        drawn = generator.integers(0, max(patients, 1), size=(rows, patients))
        cells = drawn + patients * np.arange(rows)[:, None]
        counts = np.bincount(cells.ravel(), minlength=rows * patients)
        yield counts.reshape(rows, patients).astype(float)


def _jackknife_weights(patients: int) -> Iterator[Floats]:
    """Weights that leave out one patient at a time, in blocks of rows."""
    start = 0
    for rows in _block_rows(patients, patients):
        yield 1.0 - np.eye(rows, patients, k=start)
        start += rows


def _block_rows(total: int, patients: int) -> Iterator[int]:
    rows = max(1, _BLOCK_ELEMENTS // max(patients, 1))
    for start in range(0, total, rows):
        yield min(rows, total - start)


def _scores_over(labels: Ints, probabilities: Floats, threshold: float, blocks: Iterable[Floats]) -> dict[str, Floats]:
    parts = [_scores(labels, probabilities, threshold, weights) for weights in blocks]
    if not parts:  # the jackknife of no patients
        parts = [_scores(labels, probabilities, threshold, np.empty((0, 0)))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _interval(value: float, draws: Floats, level: float, quantiles: tuple[float, float]) -> Interval:
    defined = draws[~np.isnan(draws)]
    dropped = 1.0 - len(defined) / len(draws)
    if len(defined) == 0 or np.isnan(quantiles).any():
        return Interval(value, math.nan, math.nan, level, dropped)
    low, high = np.quantile(defined, quantiles)
    return Interval(value, float(low), float(high), level, dropped)


def _central(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2


def _bca(level: float, value: float, draws: Floats, left_out: Floats) -> tuple[float, float]:
    """The two quantiles of the draws that the bias-corrected and accelerated interval reads (Efron 1987)."""
    draws, left_out = draws[~np.isnan(draws)], left_out[~np.isnan(left_out)]
    if len(draws) == 0 or len(left_out) == 0:
        return math.nan, math.nan
    share_below = ((draws < value).mean() + (draws <= value).mean()) / 2
    if share_below in (0.0, 1.0):
        return math.nan, math.nan
    bias = ndtri(share_below)
    influence = left_out.mean() - left_out
    spread = (influence**2).sum() ** 1.5
    # Without any influence the score is constant, and so are its draws: no skewness to correct.
    acceleration = (influence**3).sum() / (6 * spread) if spread > 0 else 0.0
    shifted = bias + ndtri(np.array(_central(level)))
    low, high = ndtr(bias + shifted / (1 - acceleration * shifted))
    return float(low), float(high)


def _check_bootstrap(resamples: int, level: float) -> None:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")


# Threshold --------------------------------------------------------------------------------------------------


def choose_threshold(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    criterion: Literal["balanced_accuracy", "accuracy"] = "balanced_accuracy",
) -> float:
    """The decision threshold that maximises `criterion`. Call it on validation patients only, then freeze it.

    Candidates are the midpoints between consecutive distinct probabilities; among equally good ones the
    nearest to 0.5 wins, then the lower one. A model that gives every patient the same probability has no
    candidate: 0.5.

    Raises:
        ValueError: as `score`; not two classes, patients of one class only, unknown criterion.

    Example:
        >>> choose_threshold([0, 0, 1, 1], [0.25, 0.5, 0.75, 0.875])
        0.625
    """
    positive, ranked_by = _positive_class(labels, probabilities, "a threshold")
    positives, negatives = _weight_by_distinct_value(positive, ranked_by, np.ones((1, len(positive))))
    true_positives = positives[0].cumsum()[:-1]  # deciding class 1 above each gap between distinct values
    true_negatives = negatives[0].sum() - negatives[0].cumsum()[:-1]
    # Whole numbers, so that candidates that are equally good compare equal.
    if criterion == "balanced_accuracy":
        merit = true_positives * negatives.sum() + true_negatives * positives.sum()
    elif criterion == "accuracy":
        merit = true_positives + true_negatives
    else:
        raise ValueError(f"criterion must be 'balanced_accuracy' or 'accuracy', got {criterion!r}")
    if len(merit) == 0:
        return 0.5
    distinct = np.unique(ranked_by)
    lower, upper = distinct[:-1], distinct[1:]
    midpoints = lower + (upper - lower) / 2
    # Between neighbouring floats the midpoint rounds to one of them; the lower one must stay below the
    # threshold.
    midpoints = np.where(midpoints > lower, midpoints, upper)
    best = midpoints[merit[::-1] == merit.max()]
    return float(best[np.argmin(np.abs(best - 0.5))])


# Points for figures -----------------------------------------------------------------------------------------


def roc_points(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """ROC curve: false-positive rate, true-positive rate and threshold, from (0, 0) to (1, 1), each (G,).

    Raises:
        ValueError: as `score`; not two classes, patients of one class only.
    """
    positive, ranked_by = _positive_class(labels, probabilities, "an ROC curve")
    return roc_curve(positive, ranked_by, drop_intermediate=False)


def roc_band(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    points: int = 101,
) -> tuple[Floats, Floats, Floats]:
    """Pointwise bootstrap band of the ROC curve: false-positive rates, lower, upper sensitivity, (points,).

    The resamples are those of `bootstrap_intervals` with the same seed; those without patients of both
    classes are left out.

    Raises:
        ValueError: as `roc_points` and `bootstrap_intervals`; every resample held one class only.
    """
    _check_bootstrap(resamples, level)
    positive, ranked_by = _positive_class(labels, probabilities, "an ROC band")
    grid = np.linspace(0, 1, points)
    curves = []
    for weights in bootstrap_weights(len(positive), resamples, seed):
        by_value = _weight_by_distinct_value(positive, ranked_by, weights)
        true_positive, false_positive = (np.pad(part.cumsum(axis=1), ((0, 0), (1, 0))) for part in by_value)
        both = (true_positive[:, -1] > 0) & (false_positive[:, -1] > 0)
        for y, x in zip(true_positive[both], false_positive[both], strict=True):
            curves.append(np.interp(grid, x / x[-1], y / y[-1]))
    if not curves:
        raise ValueError(f"all {resamples} resamples held one class only: no ROC band; draw more resamples")
    low, high = np.quantile(curves, _central(level), axis=0)
    return grid, low, high


def reliability_bins(labels: ArrayLike, probabilities: ArrayLike, *, bins: int = 10) -> list[ReliabilityBin]:
    """Predicted against observed frequency of class 1, in up to `bins` groups of equally many patients.

    Patients of equal probability stay together, whatever their order, so that groups may be fewer or uneven.
    Each observed frequency carries its 95 % Wilson score interval.

    Raises:
        ValueError: as `score`; not two classes, bins below 1.
    """
    labels, probabilities = check_predictions(labels, probabilities)
    _check_two_classes(probabilities, "a reliability diagram")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    predicted = probabilities[:, 1]
    # Mid-ranks keep ties together.
    bin_of = np.floor((rankdata(predicted) - 0.5) * bins / max(len(labels), 1))  # (n,)
    return [_reliability_bin(labels[bin_of == b], predicted[bin_of == b]) for b in np.unique(bin_of)]


def _reliability_bin(labels: Ints, predicted: Floats) -> ReliabilityBin:
    bounds = binomtest(int(labels.sum()), len(labels)).proportion_ci(method="wilson")
    return ReliabilityBin(
        predicted=float(predicted.mean()),
        observed=float(labels.mean()),
        low=float(bounds.low),
        high=float(bounds.high),
        count=len(labels),
    )


# Checks -----------------------------------------------------------------------------------------------------


def _positive_class(labels: ArrayLike, probabilities: ArrayLike, purpose: str) -> tuple[NDArray[np.bool_], Floats]:
    """Which patients are positive (n,), and their probability of it (n,); both classes must be present."""
    labels, probabilities = check_predictions(labels, probabilities)
    _check_two_classes(probabilities, purpose)
    positives = int(labels.sum())
    if positives in (0, len(labels)):
        raise ValueError(
            f"{purpose} needs patients of both classes, got {len(labels) - positives} of class 0 and"
            f" {positives} of class 1; use a larger or a stratified set"
        )
    return labels == 1, probabilities[:, 1]


def _check_two_classes(probabilities: Floats, purpose: str) -> None:
    if probabilities.shape[1] != 2:
        raise ValueError(
            f"{purpose} is defined for 2 classes, got probabilities of {probabilities.shape[1]} classes;"
            " compare one class with the rest: labels == c, probabilities[:, c]"
        )


def check_predictions(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Ints, Floats]:
    """Labels (n,) and probabilities (n, C) in full form, or a ValueError as in `score`."""
    probabilities = _checked_probabilities(probabilities)
    labels = _checked_labels(labels, classes=probabilities.shape[1])
    if len(labels) != len(probabilities):
        raise ValueError(f"labels and probabilities differ in length: {len(labels)} and {len(probabilities)}")
    return labels, probabilities


def _checked_labels(labels: ArrayLike, classes: int) -> Ints:
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


def _checked_probabilities(probabilities: ArrayLike) -> Floats:
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


def _check_rows(good: NDArray[np.bool_], probabilities: Floats, must: str) -> None:
    if not good.all():
        row = int(good.argmin())
        raise ValueError(f"probabilities must {must}, got {probabilities[row].tolist()} in row {row}")


def _checked_threshold(threshold: Any) -> float:
    threshold = float(threshold)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    return threshold
