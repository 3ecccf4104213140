"""Operating points, predictive values and net benefit against formulas written out."""

import json
import math

import numpy as np
import pytest
from prediction_cases import binary_cohort, loop_interval, multiclass_cohort
from scipy.stats import norm
from sklearn import metrics as sk

from lymph_hf.metrics import Bootstrap, bootstrap_intervals, score
from lymph_hf.metrics_decision import (
    decision_curve,
    predictive_values,
    sensitivity_at_specificity,
    specificity_at_sensitivity,
)
from lymph_hf.metrics_summary import clinical_intervals

QUICK = Bootstrap(resamples=60, seed=3)


def plain_sensitivity(labels, probabilities, specificity):
    """Every cut, one after the other."""
    if len(set(labels)) < 2:
        return math.nan
    cuts = [*np.unique(probabilities), np.inf]
    points = [(np.mean(probabilities[labels == 0] < cut), np.mean(probabilities[labels == 1] >= cut)) for cut in cuts]
    return max(sensitivity for reached, sensitivity in points if reached >= specificity - 1e-9)


def plain_specificity(labels, probabilities, sensitivity):
    cuts = np.unique(probabilities)
    points = [(np.mean(probabilities[labels == 1] >= cut), np.mean(probabilities[labels == 0] < cut)) for cut in cuts]
    return max(specificity for reached, specificity in points if reached >= sensitivity - 1e-9)


# Operating points


@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_operating_points_are_the_best_over_every_cut(target, decimals):
    for seed in range(5):
        labels, probabilities = binary_cohort(60, seed, decimals)
        found = sensitivity_at_specificity(labels, probabilities, target, bootstrap=QUICK)
        assert found.value == pytest.approx(plain_sensitivity(labels, probabilities, target))
        reverse = specificity_at_sensitivity(labels, probabilities, target, bootstrap=QUICK)
        assert reverse.value == pytest.approx(plain_specificity(labels, probabilities, target))


def test_operating_point_interval_equals_a_loop_with_a_new_cut_in_each_resample():
    labels, probabilities = binary_cohort(40, seed=7, decimals=1)
    found = sensitivity_at_specificity(labels, probabilities, 0.8, bootstrap=QUICK)
    expected = loop_interval(lambda y, p: plain_sensitivity(y, p, 0.8), labels, probabilities, QUICK)
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_a_share_that_the_patients_reach_exactly_counts_as_reached():
    """20 negatives, one above the cut: specificity 19/20, which is 0.95 but for rounding."""
    labels = np.array([0] * 20 + [1] * 2)
    probabilities = np.array([0.1] * 19 + [0.9] + [0.5, 0.95])
    assert sensitivity_at_specificity(labels, probabilities, 0.95, bootstrap=QUICK).value == 1.0


@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1]])
def test_operating_points_need_both_classes(labels):
    for function in (sensitivity_at_specificity, specificity_at_sensitivity):
        assert math.isnan(function(labels, [0.2, 0.7][: len(labels)], 0.9, bootstrap=QUICK).value)


# Predictive values


def test_predictive_values_follow_bayes_rule():
    """Deeks and Altman's kind of example: sensitivity 0.9, specificity 0.8, one patient in ten is ill."""
    labels = np.array([1] * 10 + [0] * 10)
    probabilities = np.array([0.9] * 9 + [0.1] + [0.1] * 8 + [0.9] * 2)
    found = predictive_values(labels, probabilities, prevalence=0.1, bootstrap=QUICK)
    assert found["ppv"].value == pytest.approx(0.09 / (0.09 + 0.18))
    assert found["npv"].value == pytest.approx(0.72 / (0.72 + 0.01))


def test_predictive_values_at_the_prevalence_of_the_sample_are_plain_precision():
    labels, probabilities = binary_cohort(90, seed=1)
    found = predictive_values(labels, probabilities, prevalence=labels.mean(), threshold=0.4, bootstrap=QUICK)
    assert found["ppv"].value == pytest.approx(sk.precision_score(labels, probabilities >= 0.4))
    assert found["npv"].value == pytest.approx(sk.precision_score(1 - labels, probabilities < 0.4))


def test_predictive_interval_equals_a_loop_over_the_same_resamples():
    labels, probabilities = binary_cohort(50, seed=2)

    def plain(y, p):
        sensitivity, specificity = np.mean(p[y == 1] >= 0.5), np.mean(p[y == 0] < 0.5)
        return sensitivity * 0.18 / (sensitivity * 0.18 + (1 - specificity) * 0.82)

    found = predictive_values(labels, probabilities, prevalence=0.18, bootstrap=QUICK)["ppv"]
    assert (found.low, found.high) == pytest.approx(tuple(loop_interval(plain, labels, probabilities, QUICK)))


def test_more_disease_means_higher_ppv_and_lower_npv():
    labels, probabilities = binary_cohort(60, seed=3)
    rows = [predictive_values(labels, probabilities, prevalence=p, bootstrap=QUICK) for p in (0.05, 0.2, 0.7)]
    assert rows[0]["ppv"].value < rows[1]["ppv"].value < rows[2]["ppv"].value
    assert rows[0]["npv"].value > rows[1]["npv"].value > rows[2]["npv"].value


def test_a_sample_without_errors_leaves_doubt():
    """The bootstrap has none here. The logit interval, written out, for 8 negatives and 12 positives told apart."""
    labels = np.repeat([0, 1], [8, 12])
    found = predictive_values(labels, labels.astype(float), prevalence=0.18, bootstrap=QUICK)
    z2 = norm.ppf(0.975) ** 2
    n1, n0 = 12 + z2, 8 + z2
    se, sp = (12 + z2 / 2) / n1, (8 + z2 / 2) / n0
    odds = math.log(se * 0.18 / ((1 - sp) * 0.82))
    half = math.sqrt(z2) * math.sqrt((1 - se) / se / n1 + sp / (1 - sp) / n0)
    assert (found["ppv"].value, found["ppv"].high) == (1, 1)
    assert found["ppv"].low == pytest.approx(1 / (1 + math.exp(half - odds)))
    odds = math.log(sp * 0.82 / ((1 - se) * 0.18))
    half = math.sqrt(z2) * math.sqrt(se / (1 - se) / n1 + (1 - sp) / sp / n0)
    assert found["npv"].low == pytest.approx(1 / (1 + math.exp(half - odds)))
    assert bootstrap_intervals(labels, labels.astype(float), resamples=20)["sensitivity"].low == 1


def test_undecided_sides_have_no_predictive_value():
    found = predictive_values([0, 0, 1], [0.1, 0.2, 0.3], prevalence=0.2, threshold=0.9, bootstrap=QUICK)
    assert math.isnan(found["ppv"].value)
    assert found["npv"].value == pytest.approx(0.8)


@pytest.mark.parametrize("prevalence", [0, 1, -0.1, 18, math.nan])
def test_prevalence_is_a_share(prevalence):
    with pytest.raises(ValueError, match="prevalence must lie strictly between 0 and 1"):
        predictive_values([0, 1], [0.1, 0.9], prevalence=prevalence)
    with pytest.raises(ValueError, match="prevalence must lie strictly between 0 and 1"):
        decision_curve([0, 1], [0.1, 0.9], prevalence=prevalence)


# Net benefit


def plain_benefit(labels, probabilities, threshold):
    sent_on = probabilities >= threshold
    true, false = np.sum(sent_on & (labels == 1)), np.sum(sent_on & (labels == 0))
    return true / len(labels) - false / len(labels) * threshold / (1 - threshold)


def test_net_benefit_is_the_formula_of_vickers_and_elkin():
    labels, probabilities = binary_cohort(70, seed=4, decimals=2)
    curve = decision_curve(labels, probabilities, bootstrap=QUICK)
    assert curve.thresholds == pytest.approx(np.arange(1, 100) / 100)
    assert curve.prevalence == pytest.approx(labels.mean())
    for number, threshold in enumerate(curve.thresholds):
        assert curve.model[number].value == pytest.approx(plain_benefit(labels, probabilities, threshold))
        everybody = plain_benefit(labels, np.ones(70), threshold)
        assert curve.treat_all[number].value == pytest.approx(everybody)


def test_net_benefit_intervals_equal_a_loop_over_the_same_resamples():
    labels, probabilities = binary_cohort(40, seed=5)
    curve = decision_curve(labels, probabilities, thresholds=[0.2, 0.6], bootstrap=QUICK)
    for threshold, found in zip(curve.thresholds, curve.model, strict=True):
        expected = loop_interval(lambda y, p, t=threshold: plain_benefit(y, p, t), labels, probabilities, QUICK)
        assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_a_sorted_out_cohort_has_the_prevalence_as_benefit():
    labels = np.repeat([0, 1], [30, 10])
    curve = decision_curve(labels, np.where(labels, 0.999, 0.001), bootstrap=QUICK)
    assert [point.value for point in curve.model] == pytest.approx([0.25] * 99)


def test_a_stated_prevalence_is_what_a_cohort_with_that_share_would_show():
    labels, probabilities = binary_cohort(60, seed=6)
    at_sample = decision_curve(labels, probabilities, prevalence=labels.mean(), bootstrap=QUICK)
    plain = decision_curve(labels, probabilities, bootstrap=QUICK)
    assert [p.value for p in at_sample.model] == pytest.approx([p.value for p in plain.model])
    # 20 positives and 40 times 4 negatives: prevalence 1/9 with the same sensitivity and specificity.
    repeated = np.repeat(np.arange(60), np.where(labels == 1, 1, 4))
    share = labels[repeated].mean()
    moved = decision_curve(labels, probabilities, prevalence=share, bootstrap=QUICK)
    longer = decision_curve(labels[repeated], probabilities[repeated], bootstrap=QUICK)
    assert [p.value for p in moved.model] == pytest.approx([p.value for p in longer.model])
    assert [p.value for p in moved.treat_all] == pytest.approx([p.value for p in longer.treat_all])


def test_decision_curve_rows_are_strict_json():
    labels, probabilities = binary_cohort(30, seed=7)
    rows = decision_curve(labels, probabilities, thresholds=[0.1, 0.5], bootstrap=QUICK).to_rows()
    assert [row["threshold"] for row in json.loads(json.dumps(rows, allow_nan=False))] == [0.1, 0.5]
    assert set(rows[0]) == {"threshold", "net_benefit", "low", "high", "treat_all"}


@pytest.mark.parametrize("thresholds", [[], [0.5, 0.2], [0.0], [1.0], [0.3, 0.3], [[0.5]]])
def test_bad_thresholds_are_named(thresholds):
    with pytest.raises(ValueError, match="thresholds must rise strictly between 0 and 1"):
        decision_curve([0, 1], [0.1, 0.9], thresholds=thresholds)


def test_more_than_two_classes_are_refused():
    labels, probabilities = multiclass_cohort(9, 3, seed=0)
    calls = [
        lambda: sensitivity_at_specificity(labels, probabilities, 0.9),
        lambda: specificity_at_sensitivity(labels, probabilities, 0.9),
        lambda: predictive_values(labels, probabilities, prevalence=0.2),
        lambda: decision_curve(labels, probabilities),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="defined for 2 classes, got probabilities of 3"):
            call()


# Summary


def test_summary_holds_what_a_clinician_asks_and_no_name_twice():
    labels, probabilities = binary_cohort(50, seed=8)
    found = clinical_intervals(labels, probabilities, threshold=0.4, prevalence=0.18, bootstrap=QUICK)
    without = clinical_intervals(labels, probabilities, threshold=0.4, bootstrap=QUICK)
    assert set(found) - set(without) == {"ppv", "npv"}
    assert not set(found) & set(score(labels, probabilities))
    expected = predictive_values(labels, probabilities, prevalence=0.18, threshold=0.4, bootstrap=QUICK)
    assert found["ppv"] == expected["ppv"]
    at = sensitivity_at_specificity(labels, probabilities, 0.95, bootstrap=QUICK)
    assert found["sensitivity_at_95_specificity"] == at
