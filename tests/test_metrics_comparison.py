"""DeLong's test against the published example and its definition; the paired bootstrap against a loop."""

import json
import math

import numpy as np
import pytest
from prediction_cases import binary_cohort, multiclass_cohort, resampled_rows
from scipy.stats import norm

from lymph_hf.metrics import Bootstrap, score
from lymph_hf.metrics_comparison import delong_covariance, delong_interval, delong_test, paired_bootstrap

# Ovarian cancer patients of DeLong, DeLong and Clarke-Pearson (1988), those with every test: albumin, total protein,
# K-G score (low is good), and whether surgery helped.
OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1
3.8 5.7 5 1  3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0
2.3 4.4 6 1  4.2 7.6 4 0  4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1
3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1  4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0
3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1  2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1
3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""


@pytest.fixture(scope="module")
def ovarian():
    table = np.array(OVARIAN.split(), dtype=float).reshape(-1, 4)
    tests = {"albumin": table[:, 0] / 10, "protein": table[:, 1] / 10, "k_g": (10 - table[:, 2]) / 10}
    return table[:, 3].astype(int), tests


@pytest.mark.parametrize(
    ("name", "area", "error", "low", "high"),
    [
        ("k_g", 0.7258, 0.1028, 0.5243, 0.9273),
        ("albumin", 0.7366, 0.0927, 0.5549, 0.9182),
        ("protein", 0.6478, 0.1000, 0.4518, 0.8439),
    ],
)
def test_areas_and_intervals_of_the_published_example(ovarian, name, area, error, low, high):
    """Figures of PROC LOGISTIC in the SAS/STAT User's Guide, "Comparing Receiver Operating Characteristic Curves"."""
    labels, tests = ovarian
    areas, covariance = delong_covariance(labels, tests[name])
    assert areas[0] == pytest.approx(area, abs=5e-5)
    assert math.sqrt(covariance[0, 0]) == pytest.approx(error, abs=5e-5)
    interval = delong_interval(labels, tests[name])
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)


def test_contrast_of_the_published_example(ovarian):
    """Both tests against the K-G score: chi-squared 2.5340 on two degrees of freedom."""
    labels, tests = ovarian
    areas, covariance = delong_covariance(labels, np.stack([tests["albumin"], tests["protein"], tests["k_g"]]))
    contrast = np.array([[1, 0, -1], [0, 1, -1]])
    difference = contrast @ areas
    chi_squared = difference @ np.linalg.solve(contrast @ covariance @ contrast.T, difference)
    assert chi_squared == pytest.approx(2.5340, abs=5e-5)
    found = delong_test(labels, tests["k_g"], tests["protein"])
    assert found.difference.value == pytest.approx(-0.0780, abs=5e-5)
    z = found.difference.value / math.sqrt((contrast @ covariance @ contrast.T)[1, 1])
    assert found.p_value == pytest.approx(2 * norm.sf(abs(z)))
    assert found.p_value == pytest.approx(0.4561, abs=2e-4)


@pytest.mark.parametrize("decimals", [None, 1])
def test_covariance_is_its_definition(decimals):
    """The structural components written out as means over all pairs."""
    labels, first = binary_cohort(50, seed=1, decimals=decimals)
    second = binary_cohort(50, seed=2, decimals=decimals)[1]
    above, below = [], []
    for model in (first, second):
        pairs = np.sign(model[labels == 1][:, None] - model[labels == 0][None, :]) / 2 + 0.5
        above.append(pairs.mean(axis=1))
        below.append(pairs.mean(axis=0))
    expected = np.cov(above) / (labels == 1).sum() + np.cov(below) / (labels == 0).sum()
    areas, covariance = delong_covariance(labels, np.stack([first, second]))
    np.testing.assert_allclose(covariance, expected, atol=1e-15)
    assert areas == pytest.approx([score(labels, model)["auroc"] for model in (first, second)])


def test_interval_covers_the_true_area_at_its_nominal_rate():
    """Binormal scores with unit variances d apart have AUROC Phi(d / sqrt 2)."""
    rng = np.random.default_rng(0)
    truth, labels = norm.cdf(1 / math.sqrt(2)), np.repeat([0, 1], [40, 60])
    intervals = [delong_interval(labels, norm.cdf(rng.normal(labels, 1)), level=0.9) for _ in range(400)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert covered == pytest.approx(0.9, abs=0.045)  # three standard errors


def test_test_has_its_size_under_equal_models():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], [40, 60])
    p_values = []
    for _ in range(400):
        shared = rng.normal(labels, 1)
        first, second = (norm.cdf(shared + rng.normal(0, 1, 100)) for _ in range(2))
        p_values.append(delong_test(labels, first, second).p_value)
    assert np.mean(np.array(p_values) < 0.1) == pytest.approx(0.1, abs=0.045)


def test_models_that_rank_alike_do_not_differ():
    labels, first = binary_cohort(40, seed=3)
    found = delong_test(labels, first, first**2)
    assert (found.difference.value, found.p_value) == (0, 1)
    assert found.difference.low == found.difference.high == 0


def test_what_has_no_variance_has_no_p_value():
    labels = np.repeat([0, 1], 5)
    found = delong_test(labels, 1 - labels.astype(float), labels.astype(float))
    assert found.difference.value == 1
    assert math.isnan(found.p_value)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["p_value"] is None
    lonely = delong_interval([0, 0, 0, 1], [0.1, 0.2, 0.8, 0.7])
    assert math.isnan(lonely.low) and lonely.value == pytest.approx(2 / 3)


def test_comparison_needs_both_classes():
    for function in (delong_interval, lambda y, p: delong_test(y, p, p)):
        with pytest.raises(ValueError, match="needs patients of both classes"):
            function([1, 1], [0.2, 0.7])


# Paired bootstrap


def test_paired_bootstrap_equals_a_loop_over_the_same_resamples():
    labels, first = binary_cohort(40, seed=4)
    second = np.clip(first + np.random.default_rng(5).normal(0, 0.1, 40), 0, 1)
    bootstrap = Bootstrap(resamples=80, seed=6, level=0.9)
    found = paired_bootstrap(labels, first, second, thresholds=(0.4, 0.6), bootstrap=bootstrap)
    for name, comparison in found.items():
        draws = [
            score(labels[r], second[r], threshold=0.6)[name] - score(labels[r], first[r], threshold=0.4)[name]
            for r in resampled_rows(40, 80, seed=6)
        ]
        low, high = np.quantile(draws, [0.05, 0.95])
        assert (comparison.difference.low, comparison.difference.high) == pytest.approx((low, high), abs=1e-12)
        one_side = min(np.sum(np.array(draws) <= 1e-15), np.sum(np.array(draws) >= -1e-15))
        assert comparison.p_value == pytest.approx(min(1, 2 * (one_side + 1) / 81))
        assert comparison.first == score(labels, first, threshold=0.4)[name]


def test_pairing_narrows_the_interval_of_similar_models():
    """Hard patients are hard for both: the paired difference is far surer than either score."""
    labels, first = binary_cohort(100, seed=7)
    second = np.clip(first + 0.02 * (labels - 0.5), 0, 1)
    difference = paired_bootstrap(labels, first, second)["auroc"].difference
    alone = paired_bootstrap(labels, np.full(100, 0.5), first)["auroc"].difference
    assert difference.high - difference.low < 0.25 * (alone.high - alone.low)


def test_a_clear_difference_is_found_and_none_is_not():
    labels, first = binary_cohort(120, seed=8)
    better = np.clip(0.5 * first + 0.5 * labels, 0, 1)
    assert paired_bootstrap(labels, first, better)["auroc"].p_value == pytest.approx(2 / 2001)
    assert paired_bootstrap(labels, first, first)["auroc"].p_value == 1
    labels, several = multiclass_cohort(40, 3, seed=0)
    assert set(paired_bootstrap(labels, several, several)) == {"balanced_accuracy", "auroc", "brier", "accuracy"}
    with pytest.raises(ValueError, match="the models differ in their classes: 3 and 4"):
        paired_bootstrap(labels, several, np.full((40, 4), 0.25))
