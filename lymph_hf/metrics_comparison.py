"""Two models on the same patients: DeLong's test of their AUROCs and the paired bootstrap of every score."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from .metrics import weighted_scores
from .metrics_bootstrap import Bootstrap, Interval
from .metrics_checks import Bools, Floats, both_classes, check_predictions, check_share, check_threshold


@dataclass(frozen=True)
class Comparison:
    """Two models: the score of each, their difference (second minus first) and how surprising it would be by chance.

    `p_value` is two-sided; NaN where it is undefined.
    """

    first: float
    second: float
    difference: Interval
    p_value: float

    def as_dict(self) -> dict[str, Any]:
        """The fields for strict JSON: NaN becomes None."""
        plain = {"first": self.first, "second": self.second, "p_value": self.p_value}
        return {name: None if math.isnan(value) else value for name, value in plain.items()} | {
            "difference": self.difference.as_dict()
        }


# DeLong -----------------------------------------------------------------------------------------------------


def delong_covariance(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Floats, Floats]:
    """AUROC of M models on the same patients and the covariance matrix of the estimates.

    The structural components of DeLong, DeLong and Clarke-Pearson (Biometrics 44:837, 1988), computed from mid-ranks
    in O(M n log n) as by Sun and Xu (IEEE Signal Processing Letters 21:1389, 2014).

    Args:
        labels: (n,).
        probabilities: (M, n), the probability of class 1 under each model.

    Returns:
        AUROCs (M,) and covariance (M, M); its entries are NaN where a class has a single patient.

    Raises:
        ValueError: as `metrics.score`; patients of one class only.
    """
    checked = [both_classes(labels, model, "DeLong's covariance") for model in np.atleast_2d(probabilities)]
    above_negatives, above_positives = _placements(checked[0][0], np.stack([predicted for _, predicted in checked]))
    covariance = _covariance(above_negatives) + _covariance(above_positives)
    return above_negatives.mean(axis=1), covariance


def _placements(positive: Bools, models: Floats) -> tuple[Floats, Floats]:
    """Share of negatives below each positive, (M, m), and of positives above each negative, (M, n); ties half."""
    all_ranks = rankdata(models, axis=1)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    above_negatives = (all_ranks[:, positive] - rankdata(models[:, positive], axis=1)) / negatives
    above_positives = 1 - (all_ranks[:, ~positive] - rankdata(models[:, ~positive], axis=1)) / positives
    return above_negatives, above_positives


def _covariance(placements: Floats) -> Floats:
    """Covariance (M, M) of the mean placement."""
    patients = placements.shape[1]
    if patients < 2:
        return np.full((len(placements), len(placements)), np.nan)
    return np.atleast_2d(np.cov(placements)) / patients


def delong_interval(labels: ArrayLike, probabilities: ArrayLike, *, level: float = 0.95) -> Interval:
    """AUROC with DeLong's interval: the estimate -+ z standard errors, cut to [0, 1].

    The estimate of a model without any error has variance 0 and an interval without width, as with the bootstrap.

    Raises:
        ValueError: as `metrics.score`; not two classes, patients of one class only, level outside (0, 1).

    Example:
        >>> str(delong_interval([0, 0, 0, 1, 1, 1], [0.1, 0.2, 0.6, 0.4, 0.7, 0.9]))
        '0.889 (0.580 to 1.000)'
    """
    _, predicted = both_classes(labels, probabilities, "DeLong's interval")
    (area,), covariance = delong_covariance(labels, predicted)
    low, high = _wald(area, covariance[0, 0], level)
    return Interval(float(area), float(np.maximum(low, 0)), float(np.minimum(high, 1)), level)


def delong_test(labels: ArrayLike, first: ArrayLike, second: ArrayLike, *, level: float = 0.95) -> Comparison:
    """Do two models rank the same patients equally well? DeLong's test of the difference of their AUROCs.

    The test is for two models fixed before these patients were seen. It is not for a model and the same model with an
    input more, fitted to the very patients (Demler, Pencina and D'Agostino, Statistics in Medicine 31:2577, 2012).

    Args:
        labels: (n,).
        first, second: probabilities of the same patients in the same order.
        level: of the interval of the difference.

    Raises:
        ValueError: as `metrics.score`; not two classes, patients of one class only, level outside (0, 1).
    """
    models = np.stack([both_classes(labels, model, "DeLong's test")[1] for model in (first, second)])
    areas, covariance = delong_covariance(labels, models)
    difference = float(areas[1] - areas[0])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    low, high = _wald(difference, variance, level)
    return Comparison(
        float(areas[0]), float(areas[1]), Interval(difference, low, high, level), _two_sided(difference, variance)
    )


def _wald(value: float, variance: float, level: float) -> tuple[float, float]:
    z = float(ndtri((1 + check_share("level", level)) / 2))
    half = z * math.sqrt(max(variance, 0.0)) if not math.isnan(variance) else math.nan
    return float(value - half), float(value + half)


def _two_sided(difference: float, variance: float) -> float:
    """1 for models of equal ranking; NaN for a difference without variance, of which no test can speak."""
    if abs(difference) < 1e-12:
        return 1.0
    if not variance > 1e-15:
        return math.nan
    return float(2 * ndtr(-abs(difference) / math.sqrt(variance)))


# Paired bootstrap -------------------------------------------------------------------------------------------


def paired_bootstrap(
    labels: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    *,
    thresholds: tuple[float, float] = (0.5, 0.5),
    bootstrap: Bootstrap | None = None,
) -> dict[str, Comparison]:
    """Every score of two models on the same patients, drawn together, so that what is hard for both cancels out.

    The p-value is twice the smaller share of resamples whose difference lies on one side of 0, one resample added to
    either count (Davison and Hinkley, Bootstrap Methods, 1997), and so never below 2 / (resamples + 1).

    Args:
        labels: (n,).
        first, second: probabilities of the same patients in the same order.
        thresholds: frozen threshold of the first and of the second model.
        bootstrap: how intervals are made; None means `Bootstrap()`.

    Returns:
        A comparison for each score of `metrics.score`.

    Raises:
        ValueError: as `metrics.score`; models of different numbers of classes.
    """
    checked = [check_predictions(labels, model) for model in (first, second)]
    classes = [probabilities.shape[1] for _, probabilities in checked]
    if classes[0] != classes[1]:
        raise ValueError(f"the models differ in their classes: {classes[0]} and {classes[1]}")
    bootstrap = bootstrap or Bootstrap()
    cuts = [check_threshold(threshold) for threshold in thresholds]
    patients = len(checked[0][0])

    def scores(weights: Floats) -> list[dict[str, Floats]]:
        return [weighted_scores(*model, cut, weights) for model, cut in zip(checked, cuts, strict=True)]

    def differences(weights: Floats) -> dict[str, Floats]:
        one, other = scores(weights)
        return {name: other[name] - one[name] for name in one}

    one, other = scores(np.ones((1, patients)))
    draws = bootstrap.draws(differences, patients)
    intervals = bootstrap.intervals(differences, patients, draws)
    return {
        name: Comparison(float(one[name][0]), float(other[name][0]), intervals[name], _sign_share(draws[name]))
        for name in one
    }


def _sign_share(differences: Floats) -> float:
    defined = differences[~np.isnan(differences)]
    if len(defined) == 0:
        return math.nan
    smaller = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, 2 * (smaller + 1) / (len(defined) + 1)))
