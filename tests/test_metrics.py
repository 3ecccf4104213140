"""Scores against scikit-learn, the vectorised bootstrap against a loop, BCa against SciPy, and the edges."""

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prediction_cases import binary_cohort, multiclass_cohort, resampled_rows
from scipy.special import expit
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import norm
from sklearn import metrics as sk

from lymph_hf import metrics_bootstrap
from lymph_hf.metrics import (
    BINARY_SCORES,
    MULTICLASS_SCORES,
    Bootstrap,
    Interval,
    best_threshold,
    bootstrap_intervals,
    bootstrap_weights,
    choose_threshold,
    confusion,
    decide,
    precision_recall_band,
    reliability_bins,
    roc_band,
    roc_points,
    score,
)


def sklearn_binary(labels, probabilities, threshold):
    decided = (probabilities >= threshold).astype(int)
    return {
        "balanced_accuracy": sk.balanced_accuracy_score(labels, decided),
        "auroc": sk.roc_auc_score(labels, probabilities),
        "auprc": sk.average_precision_score(labels, probabilities),
        "sensitivity": sk.recall_score(labels, decided),
        "specificity": sk.recall_score(labels, decided, pos_label=0),
        "brier": sk.brier_score_loss(labels, probabilities),
        "accuracy": sk.accuracy_score(labels, decided),
    }


def sklearn_multiclass(labels, probabilities):
    decided = probabilities.argmax(axis=1)
    one_hot = np.eye(probabilities.shape[1])[labels]
    return {
        "balanced_accuracy": sk.balanced_accuracy_score(labels, decided),
        "auroc": sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
        "brier": np.mean(np.sum((probabilities - one_hot) ** 2, axis=1)),
        "accuracy": sk.accuracy_score(labels, decided),
    }


# Scores


@pytest.mark.parametrize("decimals", [None, 2, 1, 0])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_binary_scores_equal_scikit_learn_with_and_without_ties(decimals, threshold):
    for seed in range(5):
        labels, probabilities = binary_cohort(61, seed, decimals)
        found = score(labels, probabilities, threshold=threshold)
        assert found.pop("n") == 61
        assert tuple(found) == BINARY_SCORES
        assert found == pytest.approx(sklearn_binary(labels, probabilities, threshold), abs=1e-12)


def test_multiclass_scores_equal_scikit_learn():
    for seed in range(5):
        labels, probabilities = multiclass_cohort(90, 4, seed)
        found = score(labels, probabilities)
        assert found.pop("n") == 90
        assert tuple(found) == MULTICLASS_SCORES
        assert found == pytest.approx(sklearn_multiclass(labels, probabilities), abs=1e-12)


def test_both_forms_of_two_class_probabilities_agree():
    labels, probabilities = binary_cohort(40, seed=1)
    both = np.stack([1 - probabilities, probabilities], axis=1)
    assert score(labels, both) == score(labels, probabilities)
    np.testing.assert_array_equal(decide(both, threshold=0.4), decide(probabilities, threshold=0.4))


@pytest.mark.parametrize("prevalence", [0.18, 0.5, 0.697])
@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_regression_constant_model_has_balanced_accuracy_one_half(prevalence, constant):
    """With swapped arguments a constant "tumoral" model scored its prevalence, 0.697, instead of 0.5."""
    labels = (np.arange(1000) < 1000 * prevalence).astype(int)
    found = score(labels, np.full(1000, constant))
    assert found["balanced_accuracy"] == 0.5
    assert found["auroc"] == 0.5
    assert found["accuracy"] == pytest.approx(prevalence if constant else 1 - prevalence)


def test_regression_labels_come_first():
    """Two of three reactive wrong, nine tumoral right: (1/3 + 1) / 2, not the swapped (1 + 9/11) / 2."""
    labels = np.array([0] * 3 + [1] * 9)
    probabilities = np.array([0.1, 0.9, 0.9] + [0.9] * 9)
    assert score(labels, probabilities)["balanced_accuracy"] == pytest.approx(2 / 3)
    assert confusion(labels, probabilities, 0.5).tolist() == [[1, 2], [0, 9]]


def test_threshold_itself_decides_class_one():
    assert decide([0.5, np.nextafter(0.5, 0)], threshold=0.5).tolist() == [1, 0]


def test_multiclass_brier_is_twice_the_binary_one():
    labels, probabilities = binary_cohort(50, seed=2)
    third = np.stack([1 - probabilities, probabilities, np.zeros(50)], axis=1)
    assert score(labels, third)["brier"] == pytest.approx(2 * score(labels, probabilities)["brier"])


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=1, max_size=30))
def test_scores_stay_in_range_and_auroc_mirrors(patients):
    labels = np.array([label for label, _ in patients], dtype=int)
    probabilities = np.array([twentieths / 20 for _, twentieths in patients])
    found = score(labels, probabilities)
    found.pop("n")
    assert all(math.isnan(value) or 0 <= value <= 1 for value in found.values())
    mirrored = score(labels, 1 - probabilities)["auroc"]
    assert math.isnan(mirrored) or found["auroc"] + mirrored == pytest.approx(1)


# Undefined scores


@pytest.mark.parametrize(("only", "undefined"), [(0, "sensitivity"), (1, "specificity")])
def test_one_class_only_leaves_nan_where_a_class_is_needed(only, undefined):
    found = score([only] * 3, [0.2, 0.4, 0.9])
    nan = {name for name, value in found.items() if math.isnan(value)}
    assert nan == {"balanced_accuracy", "auroc", "auprc", undefined}
    assert found["brier"] == pytest.approx(np.mean((np.array([0.2, 0.4, 0.9]) - only) ** 2))


def test_absent_class_of_several_leaves_the_macro_scores_nan():
    found = score([0, 1, 1], [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    assert math.isnan(found["balanced_accuracy"])
    assert math.isnan(found["auroc"])
    assert found["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("probabilities", "names"),
    [([], BINARY_SCORES), (np.empty((0, 2)), BINARY_SCORES), (np.empty((0, 5)), MULTICLASS_SCORES)],
)
def test_no_patients_is_nan_throughout(probabilities, names):
    found = score([], probabilities)
    assert found.pop("n") == 0
    assert tuple(found) == names
    assert all(math.isnan(value) for value in found.values())
    for method in ("percentile", "bca"):
        for interval in bootstrap_intervals([], probabilities, resamples=5, method=method).values():
            assert interval.as_dict() == {
                "value": None,
                "low": None,
                "high": None,
                "level": 0.95,
                "dropped": 1.0,
            }
    assert confusion([], probabilities).sum() == 0


# Bootstrap


@pytest.mark.parametrize("decimals", [None, 1])
def test_vectorised_bootstrap_equals_a_loop_over_the_same_resamples(decimals):
    labels, probabilities = binary_cohort(40, seed=3, decimals=decimals)
    loop = [sklearn_binary(labels[rows], probabilities[rows], 0.4) for rows in resampled_rows(40, 60, seed=5)]
    found = bootstrap_intervals(labels, probabilities, threshold=0.4, resamples=60, level=0.9, seed=5)
    for name, interval in found.items():
        low, high = np.quantile([scores[name] for scores in loop], [0.05, 0.95])
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-12)
        assert interval.value == score(labels, probabilities, threshold=0.4)[name]


def test_vectorised_multiclass_bootstrap_equals_a_loop_over_the_same_resamples():
    labels, probabilities = multiclass_cohort(45, 3, seed=4)
    loop = [sklearn_multiclass(labels[rows], probabilities[rows]) for rows in resampled_rows(45, 40, seed=1)]
    for name, interval in bootstrap_intervals(labels, probabilities, resamples=40, seed=1).items():
        expected = np.quantile([scores[name] for scores in loop], [0.025, 0.975])
        assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("name", ["brier", "auroc", "accuracy"])
def test_intervals_equal_scipy_on_the_same_draws(method, name):
    labels, probabilities = binary_cohort(50, seed=6)

    def statistic(rows):
        return score(labels[rows], probabilities[rows])[name]

    expected = scipy_bootstrap(
        (np.arange(50),),
        statistic,
        vectorized=False,
        n_resamples=300,
        method=method,
        rng=np.random.default_rng(9),
    ).confidence_interval
    found = bootstrap_intervals(labels, probabilities, resamples=300, seed=9, method=method)[name]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_resamples_do_not_depend_on_the_block_size(monkeypatch):
    whole = np.concatenate(list(bootstrap_weights(11, 50, seed=2)))
    monkeypatch.setattr(metrics_bootstrap, "_BLOCK_ELEMENTS", 33)
    blocks = list(bootstrap_weights(11, 50, seed=2))
    assert {len(block) for block in blocks} == {3, 2}
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert (whole.sum(axis=1) == 11).all()
    labels, probabilities = binary_cohort(11, seed=2)
    small = bootstrap_intervals(labels, probabilities, resamples=50, method="bca")
    monkeypatch.undo()
    for name, interval in bootstrap_intervals(labels, probabilities, resamples=50, method="bca").items():
        # The order of a matrix product's sums, and so the last bit, may depend on the shape of the block.
        assert small[name].as_dict() == pytest.approx(interval.as_dict(), abs=1e-12)


def test_seed_decides_the_intervals():
    labels, probabilities = binary_cohort(30, seed=7)
    first = bootstrap_intervals(labels, probabilities, resamples=200, seed=1)
    assert first == bootstrap_intervals(labels, probabilities, resamples=200, seed=1)
    assert first != bootstrap_intervals(labels, probabilities, resamples=200, seed=2)


def test_undefined_resamples_are_dropped_and_their_share_reported():
    """One positive among ten: a resample misses it with probability 0.9^10 = 0.349."""
    labels, probabilities = np.eye(10, dtype=int)[0], np.linspace(0.9, 0, 10)
    found = bootstrap_intervals(labels, probabilities, resamples=4000)
    assert found["auroc"].dropped == pytest.approx(0.9**10, abs=0.03)
    assert found["auroc"].dropped == found["sensitivity"].dropped == found["balanced_accuracy"].dropped
    assert found["brier"].dropped == found["specificity"].dropped == 0
    assert (found["auroc"].low, found["auroc"].high) == (1, 1)


def test_bca_bounds_are_nan_when_every_resample_is_on_one_side():
    """One resample lies above or below its own sample, never on both sides of it."""
    labels, probabilities = binary_cohort(20, seed=8)
    assert math.isnan(bootstrap_intervals(labels, probabilities, resamples=1, method="bca")["brier"].low)


def test_percentile_interval_covers_the_true_auroc_at_its_nominal_rate():
    """Binormal scores with unit variances d apart have AUROC Phi(d / sqrt 2)."""
    rng = np.random.default_rng(0)
    truth, covered, cohorts = norm.cdf(1 / math.sqrt(2)), 0, 150
    for seed in range(cohorts):
        labels = np.repeat([0, 1], 40)
        probabilities = norm.cdf(rng.normal(labels.astype(float), 1))
        interval = bootstrap_intervals(labels, probabilities, resamples=300, level=0.9, seed=seed)["auroc"]
        covered += interval.low <= truth <= interval.high
    # Three standard errors of a binomial share of 150 at 0.9 are 0.073.
    assert covered / cohorts == pytest.approx(0.9, abs=0.073)


def test_two_thousand_resamples_of_two_hundred_patients_are_fast():
    labels, probabilities = binary_cohort(200, seed=9)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        bootstrap_intervals(labels, probabilities, resamples=2000)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_interval_is_strict_json_and_readable():
    interval = Interval(0.5, math.nan, math.nan, dropped=1.0)
    assert json.loads(json.dumps(interval.as_dict(), allow_nan=False))["low"] is None
    assert str(interval) == "0.500 (undefined)"
    assert str(Interval(0.91, 0.8, 0.97)) == "0.910 (0.800 to 0.970)"
    assert str(Interval(math.nan, math.nan, math.nan)) == "undefined"


# Threshold


def balanced_accuracy_at(labels, probabilities, threshold):
    return sk.balanced_accuracy_score(labels, probabilities >= threshold)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=2, max_size=25))
def test_best_threshold_is_the_best_midpoint_nearest_one_half(patients):
    labels = np.array([label for label, _ in patients], dtype=int)
    probabilities = np.array([sixteenths / 16 for _, sixteenths in patients])
    if len(set(labels)) < 2:
        return
    distinct = np.unique(probabilities)
    candidates = (distinct[:-1] + distinct[1:]) / 2 if len(distinct) > 1 else np.array([0.5])
    merits = np.array([balanced_accuracy_at(labels, probabilities, t) for t in candidates])
    best = candidates[merits >= merits.max() - 1e-12]
    chosen = best_threshold(labels, probabilities)
    assert chosen in best
    assert abs(chosen - 0.5) == np.abs(best - 0.5).min()


# Half-way between neighbouring floats rounds to the even one: once it is the lower, once the upper.
@pytest.mark.parametrize("low", [0.3, np.nextafter(0.3, 1)])
def test_best_threshold_parts_neighbouring_floats(low):
    high = np.nextafter(low, 1)
    threshold = best_threshold([0, 1], [low, high])
    assert decide([low, high], threshold=threshold).tolist() == [0, 1]


def test_criterion_matters_when_classes_are_unequal():
    labels = np.array([0] * 2 + [1] * 20)
    probabilities = np.r_[0.1, 0.55, np.linspace(0.31, 0.49, 3), np.linspace(0.6, 0.9, 17)]
    assert best_threshold(labels, probabilities) > 0.55
    assert 0.1 < best_threshold(labels, probabilities, criterion="accuracy") < 0.31


THRESHOLDS = pytest.mark.parametrize("threshold_of", [best_threshold, choose_threshold])


@THRESHOLDS
def test_threshold_of_a_constant_model_is_one_half(threshold_of):
    assert threshold_of([0, 1, 1], [0.9, 0.9, 0.9]) == 0.5


@THRESHOLDS
@pytest.mark.parametrize("labels", [[0, 0], [1, 1], []])
def test_threshold_needs_both_classes(threshold_of, labels):
    with pytest.raises(ValueError, match="needs patients of both classes, got"):
        threshold_of(labels, [0.2, 0.7][: len(labels)])


@THRESHOLDS
def test_unknown_criterion_is_refused(threshold_of):
    with pytest.raises(ValueError, match=r"criterion must be .* got 'f1'"):
        threshold_of([0, 1], [0.2, 0.7], criterion="f1")


def simulated(rng, patients: int) -> tuple[np.ndarray, np.ndarray]:
    """Two classes two deviations apart, two thirds positive, with probabilities that are all too high."""
    labels = (np.arange(patients) % 3 > 0).astype(int)
    return labels, expit(2 * rng.normal(size=patients) + 4 * labels)


def test_chosen_threshold_depends_neither_on_order_nor_on_chance():
    labels, probabilities = simulated(np.random.default_rng(1), 15)
    order = np.random.default_rng(2).permutation(15)
    chosen = choose_threshold(labels, probabilities)
    assert chosen == choose_threshold(labels[order], probabilities[order])
    assert probabilities.min() < chosen < probabilities.max()


@pytest.mark.parametrize("criterion", ["balanced_accuracy", "accuracy"])
def test_chosen_threshold_of_a_model_that_tells_nothing_is_the_best(criterion):
    """Its best thresholds lie at both ends, and their mean would be wrong about most patients."""
    labels, probabilities = [1, 1, 1, 1, 0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9]
    best = best_threshold(labels, probabilities, criterion=criterion)
    assert choose_threshold(labels, probabilities, criterion=criterion) == best


def test_chosen_threshold_does_better_on_new_patients_than_the_best_of_few():
    """By a point of balanced accuracy, and by more where the few patients were unlucky."""
    rng = np.random.default_rng(0)
    others = simulated(rng, 3000)
    few = [simulated(rng, 15) for _ in range(60)]
    reached = np.array(
        [[balanced_accuracy_at(*others, rule(*drawn)) for rule in (best_threshold, choose_threshold)] for drawn in few]
    )
    (best, bagged), (unlucky_best, unlucky_bagged) = reached.mean(axis=0), np.quantile(reached, 0.1, axis=0)
    assert bagged > best + 0.005
    assert unlucky_bagged > unlucky_best + 0.01


# Points for figures


def test_roc_points_enclose_the_auroc():
    labels, probabilities = binary_cohort(50, seed=10, decimals=1)
    false_positive, true_positive, _ = roc_points(labels, probabilities)
    assert (false_positive[0], true_positive[0]) == (0, 0)
    assert (false_positive[-1], true_positive[-1]) == (1, 1)
    assert np.trapezoid(true_positive, false_positive) == pytest.approx(score(labels, probabilities)["auroc"])


def test_roc_band_encloses_the_curve_and_ends_at_one():
    labels, probabilities = binary_cohort(80, seed=11)
    grid, low, high = roc_band(labels, probabilities, bootstrap=Bootstrap(300))
    assert grid.shape == low.shape == high.shape == (101,)
    false_positive, true_positive, _ = roc_points(labels, probabilities)
    curve = np.interp(grid, false_positive, true_positive)
    assert ((low <= curve) & (curve <= high)).mean() > 0.95
    assert low[-1] == high[-1] == 1
    assert (np.diff(low) >= 0).all()


def test_precision_recall_band_encloses_the_curve():
    labels, probabilities = binary_cohort(80, seed=11)
    grid, low, high = precision_recall_band(labels, probabilities, bootstrap=Bootstrap(300))
    precision, recall, _ = sk.precision_recall_curve(labels, probabilities)
    # The least recall that a cut reaches, at or above each place of the grid: no line between two cuts.
    curve = [precision[recall >= place - 1e-12][np.argmin(recall[recall >= place - 1e-12])] for place in grid[1:]]
    assert ((low[1:] <= curve) & (curve <= high[1:])).mean() > 0.95
    assert (low <= high).all()
    assert low[-1] >= 0.9 * labels.mean() - 0.1 and high[-1] < 1, "everybody at the latest reaches full recall"


def test_reliability_bins_are_equal_in_mass_and_independent_of_order():
    labels, probabilities = binary_cohort(100, seed=12)
    bins = reliability_bins(labels, probabilities, bins=5)
    assert [b.count for b in bins] == [20] * 5
    lowest = np.argsort(probabilities)[:20]
    assert bins[0].predicted == pytest.approx(probabilities[lowest].mean())
    assert bins[0].observed == pytest.approx(labels[lowest].mean())
    assert all(b.low <= b.observed <= b.high for b in bins)
    order = np.random.default_rng(0).permutation(100)
    tied = probabilities.round(1)
    shuffled = reliability_bins(labels[order], tied[order])
    for one, other in zip(reliability_bins(labels, tied), shuffled, strict=True):
        assert (one.count, one.observed) == (other.count, pytest.approx(other.observed))


def test_reliability_keeps_equal_probabilities_together():
    bins = reliability_bins([0, 1, 1, 0], [0.7] * 4, bins=4)
    assert [(b.count, b.observed) for b in bins] == [(4, 0.5)]
    assert reliability_bins([], []) == []


def test_reliability_interval_is_the_wilson_score_interval():
    share, n, z = 0.3, 10, norm.ppf(0.975)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    (found,) = reliability_bins([1] * 3 + [0] * 7, [0.5] * 10)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))


@pytest.mark.parametrize("function", [choose_threshold, roc_points, roc_band, reliability_bins])
def test_two_class_functions_refuse_more_classes(function):
    labels, probabilities = multiclass_cohort(9, 3, seed=0)
    with pytest.raises(ValueError, match="defined for 2 classes, got probabilities of 3"):
        function(labels, probabilities)


# Checks of the inputs


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1], [0.1], "differ in length: 2 and 1"),
        ([[0, 1]], [0.1, 0.2], r"labels must have shape \(n,\), got \(1, 2\)"),
        ([0, 1], [[0.1], [0.2]], r"shape \(n,\) or \(n, C\) with C >= 2, got \(2, 1\)"),
        ([0, 1], 0.5, "probabilities must have shape"),
        ([0, 2], [0.1, 0.2], r"labels must lie in 0\.\.1 for 2 classes, got 2 in row 1"),
        ([-1, 1], [0.1, 0.2], "got -1 in row 0"),
        ([0.0, 1.0], [0.1, 0.2], r"labels must be integers in 0\.\.1, got dtype float64"),
        (["reactive"], [0.1], "labels must be integers"),
        ([0, 1], [0.1, np.nan], "must be finite, got .*nan.* in row 1"),
        ([0, 1], [0.1, 1.2], r"must lie in \[0, 1\], got .* in row 1"),
        ([0, 1], [[0.5, 0.5], [0.9, 0.3]], r"must sum to 1 .*got \[0.9, 0.3\] in row 1"),
    ],
)
def test_bad_inputs_are_named(labels, probabilities, message):
    for function in (score, bootstrap_intervals, confusion):
        with pytest.raises(ValueError, match=message):
            function(labels, probabilities)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
        ({"threshold": math.nan}, "threshold must lie in"),
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
        ({"level": 95}, "level must lie strictly between 0 and 1, got 95"),
        ({"method": "basic"}, "method must be 'percentile' or 'bca', got 'basic'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals([0, 1], [0.2, 0.8], **options)


def test_half_precision_softmax_is_accepted():
    logits = np.random.default_rng(0).normal(size=(50, 8))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert score(np.arange(50) % 8, softmax.astype(np.float16))["n"] == 50
