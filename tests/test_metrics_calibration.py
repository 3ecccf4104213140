"""Calibration error, slope and intercept against plain formulas, scikit-learn and known truths."""

import math

import numpy as np
import pytest
from prediction_cases import binary_cohort, loop_interval, multiclass_cohort
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from lymph_hf.metrics import Bootstrap, reliability_bins
from lymph_hf.metrics_calibration import calibration_intervals


def value(labels, probabilities, name, **options):
    return calibration_intervals(labels, probabilities, bootstrap=Bootstrap(resamples=1), **options)[name].value


def clipped(probabilities):
    return logit(np.clip(probabilities, 1e-6, 1 - 1e-6))


def plain_slope(labels, probabilities):
    if len(set(labels)) < 2:
        return math.nan
    x = clipped(probabilities)[:, None]
    return LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, labels).coef_.item()


def plain_intercept(labels, probabilities):
    if len(set(labels)) < 2:
        return math.nan
    x = clipped(probabilities)
    return brentq(lambda a: np.sum(expit(a + x) - labels), -50, 50, xtol=1e-12)


def plain_error(labels, probabilities, bins):
    """Equal-mass bins of distinct probabilities: n / bins patients each."""
    order = np.argsort(probabilities)
    groups = np.array_split(order, bins)
    return sum(abs(probabilities[g].mean() - labels[g].mean()) * len(g) for g in groups) / len(labels)


@pytest.mark.parametrize("seed", range(4))
def test_slope_and_intercept_are_the_maximum_likelihood_fits(seed):
    labels, probabilities = binary_cohort(80, seed)
    assert value(labels, probabilities, "calibration_slope") == pytest.approx(
        plain_slope(labels, probabilities), rel=1e-4
    )
    assert value(labels, probabilities, "calibration_intercept") == pytest.approx(
        plain_intercept(labels, probabilities), abs=1e-8
    )


def test_calibration_error_is_the_mean_gap_of_equal_bins():
    labels, probabilities = binary_cohort(100, seed=1)
    probabilities = np.clip(probabilities, 0, 1) * 0.98 + np.linspace(0, 0.02, 100)  # no ties
    for bins in (1, 5, 10):
        assert value(labels, probabilities, "ece", bins=bins) == pytest.approx(plain_error(labels, probabilities, bins))


@pytest.mark.parametrize("decimals", [None, 1])
def test_calibration_error_uses_the_bins_of_the_reliability_diagram(decimals):
    labels, probabilities = binary_cohort(73, seed=2, decimals=decimals)
    bins = reliability_bins(labels, probabilities, bins=7)
    expected = sum(b.count * abs(b.predicted - b.observed) for b in bins) / 73
    assert value(labels, probabilities, "ece", bins=7) == pytest.approx(expected)


def test_intervals_equal_a_loop_over_the_same_resamples():
    labels, probabilities = binary_cohort(60, seed=3, decimals=2)
    bootstrap = Bootstrap(resamples=40, seed=4, level=0.9)

    def error(y, p):
        bins = reliability_bins(y, p)
        return sum(b.count * abs(b.predicted - b.observed) for b in bins) / len(y)

    found = calibration_intervals(labels, probabilities, bootstrap=bootstrap)
    plain = {"ece": error, "calibration_slope": plain_slope, "calibration_intercept": plain_intercept}
    for name, statistic in plain.items():
        expected = loop_interval(statistic, labels, probabilities, bootstrap)
        assert (found[name].low, found[name].high) == pytest.approx(tuple(expected), rel=1e-3), name


def test_known_miscalibration_is_found():
    """Log-odds doubled: slope 1/2. Log-odds moved up by 1: intercept -1. As they are: 1 and 0."""
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 1.5, 40_000)
    labels = (rng.random(40_000) < expit(odds)).astype(int)
    for changed, slope, intercept in ((odds, 1, 0), (2 * odds, 0.5, None), (odds + 1, 1, -1)):
        assert value(labels, expit(changed), "calibration_slope") == pytest.approx(slope, abs=0.03)
        if intercept is not None:
            assert value(labels, expit(changed), "calibration_intercept") == pytest.approx(intercept, abs=0.04)
    assert value(labels, expit(odds), "ece") < 0.012 < 0.05 < value(labels, expit(odds + 1), "ece")


@pytest.mark.parametrize(
    ("labels", "probabilities", "undefined"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.7, 0.9], {"calibration_slope"}),  # separated
        ([0, 0, 1, 1], [0.9, 0.7, 0.2, 0.1], {"calibration_slope"}),  # the wrong way round
        ([0, 0, 1, 1], [0.1, 0.5, 0.5, 0.9], {"calibration_slope"}),  # touching: still infinite
        ([0, 1, 1, 1], [0.3, 0.3, 0.3, 0.3], {"calibration_slope"}),
        ([1, 1, 1], [0.2, 0.5, 0.9], {"calibration_slope", "calibration_intercept"}),
        ([], [], {"ece", "calibration_slope", "calibration_intercept"}),
    ],
)
def test_what_cannot_be_estimated_is_nan(labels, probabilities, undefined):
    found = calibration_intervals(labels, probabilities, bootstrap=Bootstrap(resamples=3))
    assert {name for name, interval in found.items() if math.isnan(interval.value)} == undefined


def test_separated_resamples_are_dropped_not_infinite():
    labels, probabilities = np.array([0, 0, 0, 1, 1, 1]), np.array([0.1, 0.2, 0.6, 0.4, 0.7, 0.9])
    slope = calibration_intervals(labels, probabilities)["calibration_slope"]
    assert 0.3 < slope.dropped < 0.9
    assert np.isfinite([slope.value, slope.low, slope.high]).all()


def test_probabilities_of_zero_and_one_are_clipped():
    labels, probabilities = [0, 1, 0, 1, 1, 0], [0.0, 0.0, 0.3, 1.0, 0.8, 1.0]
    assert np.isfinite(value(labels, probabilities, "calibration_slope"))
    assert np.isfinite(value(labels, probabilities, "calibration_intercept"))


def test_two_classes_and_a_bin_are_needed():
    with pytest.raises(ValueError, match="defined for 2 classes, got probabilities of 3"):
        calibration_intervals(*multiclass_cohort(9, 3, seed=0))
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        calibration_intervals([0, 1], [0.1, 0.9], bins=0)
