"""Subgroups are what scoring them alone gives; learning curves train on nested stratified subsets."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from prediction_cases import binary_cohort, multiclass_cohort

from lymph_hf.metrics import Bootstrap, bootstrap_intervals, score
from lymph_hf.metrics_subgroups import (
    MISSING,
    bands,
    clinical_groups,
    learning_curve,
    nested_subsets,
    subgroup_scores,
)

QUICK = Bootstrap(resamples=50, seed=2)


def test_bands_hold_their_lower_edge_and_missing_values_stand_apart():
    assert bands([49.9, 50, 64.9, 65, 90, math.nan], (50, 65), "years") == [
        "< 50 years",
        "50 to < 65 years",
        "50 to < 65 years",
        "≥ 65 years",
        "≥ 65 years",
        MISSING,
    ]
    for edges in ([], [5, 5], [6, 5]):
        with pytest.raises(ValueError, match="edges must rise"):
            bands([1.0], edges, "years")


def test_every_patient_is_in_one_group_of_each_variable():
    rng = np.random.default_rng(0)
    labels, probabilities = binary_cohort(80, seed=0)
    age, count = rng.uniform(20, 95, 80), rng.lognormal(2, 1, 80)
    age[:3], count[3:5] = math.nan, math.nan
    sex = [None, math.nan, "", *rng.choice(["F", "M"], 77)]
    groups = clinical_groups(age, sex, count)
    found = subgroup_scores(labels, probabilities, groups, threshold=0.4, bootstrap=QUICK)
    for variable, missing in (("age", 3), ("sex", 3), ("lymphocyte count", 2)):
        rows = [row for row in found if row.variable == variable]
        assert sum(row.n for row in rows) == 80
        assert sum(row.positives for row in rows) == labels.sum()
        assert (rows[-1].group, rows[-1].n) == (MISSING, missing)
    assert [row.group for row in found if row.variable == "age"] == [
        "< 50 years",
        "50 to < 65 years",
        "65 to < 80 years",
        "≥ 80 years",
        MISSING,
    ]
    assert [row.group for row in found if row.variable == "sex"] == ["female", "male", MISSING]
    json.dumps([row.as_dict() for row in found], allow_nan=False)


def test_a_subgroup_scores_as_if_it_were_alone():
    labels, probabilities = binary_cohort(60, seed=1)
    sex = np.where(np.arange(60) % 2, "female", "male")
    found = subgroup_scores(labels, probabilities, {"sex": list(sex)}, threshold=0.4, bootstrap=QUICK)
    for row in found:
        alone = sex == row.group
        expected = bootstrap_intervals(labels[alone], probabilities[alone], threshold=0.4, resamples=50, seed=2)
        assert row.scores == expected


def test_subgroups_of_one_class_and_of_several_classes():
    (row,) = subgroup_scores([1, 1], [0.2, 0.9], {"sex": ["male", "male"]}, bootstrap=QUICK)
    assert math.isnan(row.scores["auroc"].value)
    assert row.scores["sensitivity"].value == 0.5
    labels, probabilities = multiclass_cohort(30, 3, seed=0)
    (row,) = subgroup_scores(labels, probabilities, {"all": ["all"] * 30}, bootstrap=QUICK)
    assert row.scores["auroc"].value == score(labels, probabilities)["auroc"]
    with pytest.raises(ValueError, match="groups of 'sex' and labels differ in length: 1 and 2"):
        subgroup_scores([0, 1], [0.2, 0.9], {"sex": ["male"]})


# Learning curve


@pytest.mark.parametrize("seed", range(5))
def test_subsets_are_nested_stratified_and_seeded(seed):
    labels = np.random.default_rng(9).permutation(np.repeat([0, 1, 2], [50, 25, 5]))
    sizes = [3, 10, 20, 40, 80]
    subsets = nested_subsets(labels, sizes, seed=seed)
    assert [len(rows) for rows in subsets] == sizes
    for smaller, larger in pairwise(subsets):
        assert set(smaller) < set(larger)
    for size, rows in zip(sizes, subsets, strict=True):
        counts = np.bincount(labels[rows], minlength=3)
        assert (counts >= 1).all()
        assert np.abs(counts - size * np.array([50, 25, 5]) / 80).max() <= 2
    np.testing.assert_array_equal(subsets[2], nested_subsets(labels, sizes, seed=seed)[2])
    assert not np.array_equal(subsets[2], nested_subsets(labels, sizes, seed=seed + 1)[2])


@pytest.mark.parametrize("sizes", [[], [1], [5, 5], [6, 4], [3, 11]])
def test_impossible_sizes_are_named(sizes):
    with pytest.raises(ValueError, match="sizes must rise from at least 2 to at most 10"):
        nested_subsets([0, 1] * 5, sizes)


def test_learning_curve_trains_on_the_subsets_and_averages_over_repeats():
    train_labels = np.arange(40) % 2
    labels, base = binary_cohort(60, seed=3)
    noise = np.random.default_rng(0).normal(0, 1, 60)
    seen = []

    def predict(rows):
        seen.append(rows)
        return np.clip(base + noise * 2 / len(rows), 0, 1)

    points = learning_curve(predict, train_labels, labels, sizes=[4, 40], repeats=3, seed=7, bootstrap=QUICK)
    assert [point.patients for point in points] == [4, 40]
    expected = [nested_subsets(train_labels, [4, 40], seed=7 + number) for number in range(3)]
    for number, rows in enumerate(seen):
        np.testing.assert_array_equal(rows, expected[number % 3][number // 3])
    alone = bootstrap_intervals(labels, np.clip(base + noise / 2, 0, 1), resamples=50, seed=2)["auroc"]
    assert points[0].score.value == pytest.approx(alone.value)
    assert points[0].score.low == pytest.approx(alone.low)  # the repeats agree here
    assert points[0].lowest == points[0].highest == pytest.approx(alone.value)
    assert points[1].score.value > points[0].score.value
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        learning_curve(predict, train_labels, labels, sizes=[4], repeats=0)


def test_learning_curve_shows_what_the_choice_of_patients_does():
    labels = np.arange(20) % 2

    def predict(rows):
        good = 0 in rows
        return labels * 0.8 + 0.1 if good else np.full(20, 0.5)

    (point,) = learning_curve(predict, np.arange(30) % 2, labels, sizes=[10], repeats=12, bootstrap=QUICK)
    assert (point.lowest, point.highest) == (0.5, 1.0)
    assert 0.5 < point.score.value < 1.0
