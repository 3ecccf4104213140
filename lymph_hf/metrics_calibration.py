"""How far probabilities can be taken at their word: reliability, calibration error, slope and intercept.

Two classes only: for more, ask of one class against the rest (`labels == c`, `probabilities[:, c]`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit
from scipy.stats import binomtest, rankdata

from .metrics_bootstrap import Bootstrap, Interval
from .metrics_checks import Bools, Floats, log_odds, ratio, two_classes

_NEWTON_STEPS = 100


@dataclass(frozen=True)
class ReliabilityBin:
    """Patients of similar probability: mean prediction against observed frequency of the positive class."""

    predicted: float
    observed: float
    low: float  # Wilson interval of `observed`
    high: float
    count: int


def reliability_bins(labels: ArrayLike, probabilities: ArrayLike, *, bins: int = 10) -> list[ReliabilityBin]:
    """Predicted against observed frequency of class 1, in up to `bins` groups of equally many patients.

    Patients of equal probability stay together, whatever their order, so that groups may be fewer or uneven.
    Each observed frequency carries its 95 % Wilson score interval.

    Raises:
        ValueError: as `metrics.score`; not two classes, bins below 1.
    """
    positive, predicted = two_classes(labels, probabilities, "a reliability diagram")
    _check_bins(bins)
    # Mid-ranks keep ties together.
    bin_of = np.floor((rankdata(predicted) - 0.5) * bins / max(len(positive), 1))  # (n,)
    return [_reliability_bin(positive[bin_of == b], predicted[bin_of == b]) for b in np.unique(bin_of)]


def _reliability_bin(positive: Bools, predicted: Floats) -> ReliabilityBin:
    bounds = binomtest(int(positive.sum()), len(positive)).proportion_ci(method="wilson")
    return ReliabilityBin(
        predicted=float(predicted.mean()),
        observed=float(positive.mean()),
        low=float(bounds.low),
        high=float(bounds.high),
        count=len(positive),
    )


def calibration_intervals(
    labels: ArrayLike, probabilities: ArrayLike, *, bins: int = 10, bootstrap: Bootstrap | None = None
) -> dict[str, Interval]:
    """Calibration error, slope and intercept of the probability of class 1, with bootstrap intervals.

    - `ece`: expected calibration error, the mean over patients of |mean prediction - observed frequency| of their
      bin, in [0, 1]. Bins hold equally many patients (those of `reliability_bins`, drawn anew in each resample), as
      bins of equal width leave most of them empty in a small cohort. The estimate is too high in small cohorts, and
      higher still in resamples, so that its percentile interval may lie above the value: compare models of one
      cohort by it, and judge calibration by the other two.
    - `calibration_slope`: b in logit P(y = 1) = a + b logit(p) (Cox, Biometrika 45:562, 1958). 1 is ideal; below 1
      the probabilities are too extreme, as after overfitting.
    - `calibration_intercept`: a in logit P(y = 1) = a + logit(p), the calibration in the large (Van Calster et al.,
      BMC Medicine 17:230, 2019). 0 is ideal; above 0 the probabilities are too low on average.

    Slope and intercept are maximum-likelihood fits, with probabilities clipped to [1e-6, 1 - 1e-6]. Both are
    undefined (NaN) with patients of one class only, and the slope also where all probabilities are equal or a cut
    tells the classes apart without error: its estimate is infinite there.

    Args:
        bins: largest number of bins of `ece`.
        bootstrap: how intervals are made; None means `Bootstrap()`.

    Raises:
        ValueError: as `metrics.score`; not two classes, bins below 1.

    Example:
        >>> found = calibration_intervals([0, 1, 0, 1], [0.1, 0.1, 0.9, 0.9])
        >>> round(found["ece"].value, 2), round(found["calibration_slope"].value, 2)
        (0.4, 0.0)
    """
    positive, predicted = two_classes(labels, probabilities, "calibration")
    _check_bins(bins)

    def statistics(weights: Floats) -> dict[str, Floats]:
        intercept, slope = _recalibration(positive, predicted, weights)
        error = _expected_error(positive, predicted, weights, bins)
        return {"ece": error, "calibration_slope": slope, "calibration_intercept": intercept}

    return (bootstrap or Bootstrap()).intervals(statistics, len(positive))


def _check_bins(bins: int) -> None:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")


def _expected_error(positive: Bools, predicted: Floats, weights: Floats, bins: int) -> Floats:
    """ECE (R,): the bins follow the weighted mid-ranks, so that weights are the same as repeated patients."""
    total = weights.sum(axis=1)
    if len(positive) == 0:
        return np.full(len(weights), np.nan)
    order = np.argsort(predicted)
    starts = np.flatnonzero(np.diff(predicted[order], prepend=-np.inf))  # of the G distinct values
    by_value = weights[:, order]
    mass = np.add.reduceat(by_value, starts, axis=1)  # (R, G)
    gap = np.add.reduceat(by_value * (predicted - positive)[order], starts, axis=1)
    mid_rank = mass.cumsum(axis=1) - mass / 2
    bin_of = np.floor(mid_rank * bins / total[:, None])
    error = sum(np.abs((gap * (bin_of == b)).sum(axis=1)) for b in range(bins))
    return ratio(error, total)


def _recalibration(positive: Bools, predicted: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Intercept in the large and slope, (R,) each."""
    intercept, slope = np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    if len(positive) == 0:
        return intercept, slope
    x = log_odds(predicted)  # (n,)
    both, overlapping = _estimable(positive, x, weights)
    ones = np.ones((len(x), 1))
    intercept[both] = _fit_logistic(ones, x, positive, weights[both])[:, 0]
    spread = x.std() or 1.0
    # Without an offset, and with a column of spread 1, which keeps the equations well conditioned.
    design = np.column_stack([ones, (x - x.mean()) / spread])
    slope[overlapping] = _fit_logistic(design, np.zeros_like(x), positive, weights[overlapping])[:, 1] / spread
    return intercept, slope


def _estimable(positive: Bools, x: Floats, weights: Floats) -> tuple[Bools, Bools]:
    """Rows with both classes, and rows whose classes overlap so that the slope is finite; (R,) each."""
    drawn = weights > 0

    def extreme(of_class: Bools, largest: bool) -> Floats:
        fill = -np.inf if largest else np.inf
        of_rows = np.where(drawn & of_class, x, fill)
        return of_rows.max(axis=1) if largest else of_rows.min(axis=1)

    both = (drawn & positive).any(axis=1) & (drawn & ~positive).any(axis=1)
    rising = extreme(~positive, largest=True) <= extreme(positive, largest=False)
    falling = extreme(positive, largest=True) <= extreme(~positive, largest=False)
    return both, both & ~rising & ~falling


def _fit_logistic(design: Floats, offset: Floats, positive: Bools, weights: Floats) -> Floats:
    """Maximum-likelihood coefficients (R, k) of R weighted logistic regressions, by damped Newton steps.

    Args:
        design: (n, k) columns.
        offset: (n,) added to the linear predictor with coefficient 1.
        weights: (R, n); each row must have a finite maximum.
    """
    columns = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)  # (n, k * k)
    coefficients = np.zeros((len(weights), columns))
    rows = np.arange(len(weights))  # those still moving
    for _ in range(_NEWTON_STEPS):
        if len(rows) == 0:
            break
        at, of_rows = coefficients[rows], weights[rows]
        predicted = expit(at @ design.T + offset)  # (r, n)
        gradient = (of_rows * (positive - predicted)) @ design
        curvature = (of_rows * predicted * (1 - predicted)) @ products
        step = np.linalg.solve(curvature.reshape(-1, columns, columns), gradient[..., None])[..., 0]
        coefficients[rows] = _damped(at, step, design, offset, positive, of_rows)
        rows = rows[np.abs(step).max(axis=1) > 1e-9]
    coefficients[rows] = np.nan  # no maximum found
    return coefficients


def _damped(at: Floats, step: Floats, design: Floats, offset: Floats, positive: Bools, weights: Floats) -> Floats:
    """`at + step`, the step halved in each row until it no longer lowers the likelihood."""

    def deviance(coefficients: Floats) -> Floats:
        linear = coefficients @ design.T + offset
        return (weights * (np.logaddexp(0, linear) - positive * linear)).sum(axis=1)

    limit = deviance(at) * (1 + 1e-12)
    for _ in range(50):
        worse = deviance(at + step) > limit
        if not worse.any():
            break
        step = np.where(worse[:, None], step / 2, step)
    return at + step
