"""Scaling finds known distortions and never breaks a ranking; prediction sets cover what they promise."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize_scalar
from scipy.special import expit, log_softmax, softmax
from sklearn.metrics import log_loss, roc_auc_score

from lymph_hf import calibration
from lymph_hf.calibration import (
    REFER,
    CalibrationError,
    Conformal,
    PlattScaling,
    TemperatureScaling,
    abstention_intervals,
    fit_calibration,
    fit_conformal,
    logits_of,
    scaling_from_dict,
    shift_prevalence,
)
from lymph_hf.metrics import Bootstrap


def patients(n, seed, classes=2, spread=1.5):
    """Labels drawn from the softmax of the logits: perfectly calibrated."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (n, classes))
    labels = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return np.minimum(labels, classes - 1), logits


# Scaling


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_undoes_a_known_one(temperature, classes):
    labels, logits = patients(4000, seed=0, classes=classes)
    found = fit_calibration(labels, logits * temperature)
    assert found.temperature == pytest.approx(temperature, rel=0.08)
    np.testing.assert_allclose(found.apply(logits), logits / found.temperature)


def test_platt_undoes_a_known_slope_and_shift():
    labels, logits = patients(6000, seed=1)
    odds = logits[:, 1] - logits[:, 0]
    distorted = np.stack([np.zeros(6000), 2.5 * odds - 1.0], axis=1)
    found = fit_calibration(labels, distorted, method="platt")
    assert found.slope == pytest.approx(1 / 2.5, rel=0.08)
    assert found.intercept == pytest.approx(1 / 2.5, abs=0.1)
    calibrated = softmax(found.apply(distorted), axis=1)[:, 1]
    assert calibrated == pytest.approx(expit(found.slope * (2.5 * odds - 1.0) + found.intercept))
    assert calibrated.mean() == pytest.approx(labels.mean(), abs=0.005)


def test_temperature_is_the_minimum_of_the_documented_objective():
    labels, logits = patients(25, seed=2, classes=3)

    def objective(log_scale):
        scaled = log_softmax(np.exp(log_scale) * logits, axis=1)
        return -scaled[np.arange(25), labels].sum() + log_scale**2 / 2

    least = minimize_scalar(objective, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9})
    assert fit_calibration(labels, logits).temperature == pytest.approx(math.exp(-least.x), rel=1e-4)


def test_gradients_are_those_of_the_losses():
    labels, logits = patients(30, seed=3)
    odds = logits[:, 1] - logits[:, 0]
    for loss, data, theta in (
        (calibration._temperature_loss, logits, [0.4]),
        (calibration._platt_loss, odds, [0.4, -0.7]),
    ):
        numeric = approx_fprime(np.array(theta), lambda at, f=loss, d=data: f(at, labels, d)[0], 1e-7)
        np.testing.assert_allclose(loss(np.array(theta), labels, data)[1], numeric, rtol=1e-4)


@pytest.mark.parametrize("method", ["temperature", "platt"])
@pytest.mark.parametrize("seed", range(5))
def test_calibration_keeps_the_ranking_and_does_not_worsen_the_fit(method, seed):
    labels, logits = patients(33, seed)
    logits = logits * 4
    calibrated = fit_calibration(labels, logits, method=method).apply(logits)
    before, after = softmax(logits, axis=1), softmax(calibrated, axis=1)
    assert log_loss(labels, after) <= log_loss(labels, before)
    order = np.argsort(logits[:, 1] - logits[:, 0])
    assert (np.diff((calibrated[:, 1] - calibrated[:, 0])[order]) >= 0).all()
    assert roc_auc_score(labels, after[:, 1]) == pytest.approx(roc_auc_score(labels, before[:, 1]))


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_patients_told_apart_without_error_give_a_finite_scale(method):
    """Maximum likelihood has none: the prior holds it, and more such patients make it surer, not infinite."""
    scales = []
    for repeats in (3, 30):
        labels = np.tile([0, 1], repeats)
        logits = np.where(labels[:, None] == [0, 1], 1.0, -1.0)
        found = fit_calibration(labels, logits, method=method).to_dict()
        scales.append(1 / found["temperature"] if method == "temperature" else found["slope"])
    assert 1 < scales[0] < scales[1] < 10


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_a_model_worse_than_chance_is_flattened_not_turned_round(method):
    labels, logits = patients(200, seed=4, spread=3)
    found = fit_calibration(1 - labels, logits, method=method)
    probabilities = softmax(found.apply(logits), axis=1)[:, 1]
    assert roc_auc_score(labels, probabilities) == pytest.approx(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    assert np.ptp(probabilities) < 0.2


@pytest.mark.parametrize("scaling", [TemperatureScaling(1.7), PlattScaling(0.4, -1.2)])
def test_scaling_survives_json(scaling):
    stored = json.loads(json.dumps(scaling.to_dict()))
    assert stored["method"] in ("temperature", "platt")
    assert scaling_from_dict(stored) == scaling


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "isotonic"}, "calibration method 'isotonic': expected one of"),
        ({}, "calibration method None"),
        ({"method": "temperature", "slope": 1.0}, "parameters .*slope"),
        ({"method": "temperature", "temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"method": "platt", "slope": math.nan, "intercept": 0.0}, "slope must be a finite number above 0"),
        ({"method": "platt", "slope": 1.0, "intercept": math.inf}, "intercept must be finite"),
    ],
)
def test_unreadable_scalings_are_named(values, message):
    with pytest.raises(CalibrationError, match=message):
        scaling_from_dict(values)


def test_calibration_errors_say_what_is_wrong():
    with pytest.raises(CalibrationError, match="no patients to fit"):
        fit_calibration([], np.empty((0, 2)))
    with pytest.raises(CalibrationError, match="needs patients of both classes, got 2 of class 1 only"):
        fit_calibration([1, 1], [[0.0, 1.0], [0.0, 2.0]], method="platt")
    with pytest.raises(CalibrationError, match="two classes expected, got 3"):
        fit_calibration([0, 1], np.eye(2, 3), method="platt")
    with pytest.raises(CalibrationError, match="must be finite, got .*nan.* in row 1"):
        fit_calibration([0, 1], [[0.0, 1.0], [0.0, math.nan]])
    with pytest.raises(CalibrationError, match=r"shape \(n, C\) with C >= 2, got \(2,\)"):
        TemperatureScaling(2.0).apply([0.0, 1.0])
    with pytest.raises(CalibrationError, match="method 'isotonic'"):
        fit_calibration([0, 1], np.eye(2), method="isotonic")
    with pytest.raises(ValueError, match="differ in length: 1 and 2"):
        fit_calibration([0], np.eye(2))


def test_logits_of_probabilities_lead_back():
    _, logits = patients(20, seed=5, classes=4)
    probabilities = softmax(logits, axis=1)
    np.testing.assert_allclose(softmax(logits_of(probabilities), axis=1), probabilities)
    assert np.isfinite(logits_of([0.0, 1.0])).all()


def test_prevalence_shift_is_bayes_rule():
    for p in (0.02, 0.4, 0.9):
        odds = p / (1 - p) * (0.18 / 0.82) / (0.69 / 0.31)
        found = shift_prevalence([p], of_sample=0.69, to=0.18)
        assert found[0] == pytest.approx([1 / (1 + odds), odds / (1 + odds)])
    labels, logits = patients(40_000, seed=6)
    keep = (labels == 0) | (np.random.default_rng(0).random(40_000) < 0.2)  # a fifth of the positives
    moved = shift_prevalence(softmax(logits, axis=1), of_sample=labels.mean(), to=labels[keep].mean())
    assert moved[keep, 1].mean() == pytest.approx(labels[keep].mean(), abs=0.005)


# Abstention


def coverage_by_simulation(n, coverage, per_class, draws=300, shift=False):
    """Mean coverage of new patients, overall and per class, over draws of the calibration set."""
    found = []
    for seed in range(draws):
        labels, logits = patients(n, 10_000 + seed)
        sets = fit_conformal(labels, softmax(logits * 3, axis=1), coverage=coverage, per_class=per_class)
        labels, logits = patients(400, 50_000 + seed)
        if shift:  # nine reactive patients of ten
            keep = np.random.default_rng(seed).random(400) < np.where(labels == 0, 1, 1 / 9)
            labels, logits = labels[keep], logits[keep]
        held = sets.sets(softmax(logits * 3, axis=1))[np.arange(len(labels)), labels]
        found.append([held.mean(), held[labels == 0].mean(), held[labels == 1].mean()])
    return np.mean(found, axis=0)


@pytest.mark.parametrize(("n", "coverage"), [(20, 0.9), (60, 0.8), (100, 0.95)])
def test_sets_cover_new_patients_however_wrong_the_probabilities(n, coverage):
    """The model is three times too sure. At least the stated coverage, and not much more."""
    overall, _, _ = coverage_by_simulation(n, coverage, per_class=False)
    assert coverage - 0.01 <= overall <= coverage + 1 / (n + 1) + 0.015


def test_class_conditional_sets_cover_each_class_even_at_another_prevalence():
    _, reactive, tumoral = coverage_by_simulation(80, 0.9, per_class=True, shift=True)
    assert 0.89 <= reactive <= 0.94
    assert 0.89 <= tumoral <= 0.95


@pytest.mark.parametrize(("coverage", "needed"), [(0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99)])
def test_too_few_patients_decide_nothing(coverage, needed):
    for n in (1, needed - 1):
        sets = fit_conformal(np.zeros(n, int), np.full(n, 0.01), coverage=coverage, per_class=False)
        assert sets.quantiles == (math.inf, math.inf)
        assert (sets.decide([0.0, 0.5, 1.0]) == REFER).all()
    sets = fit_conformal(np.zeros(needed, int), np.full(needed, 0.01), coverage=coverage, per_class=False)
    assert math.isfinite(sets.quantiles[0])
    assert sets.decide([0.001, 0.999]).tolist() == [0, 1]


def test_a_class_without_enough_patients_is_never_left_out():
    labels = np.array([0] * 30 + [1] * 3)
    probabilities = np.r_[np.linspace(0.01, 0.3, 30), 0.9, 0.95, 0.99]
    sets = fit_conformal(labels, probabilities, coverage=0.9)
    assert math.isfinite(sets.quantiles[0]) and math.isinf(sets.quantiles[1])
    decided = sets.decide([0.001, 0.2, 0.5, 0.99])
    assert (decided == [REFER, REFER, 1, 1]).all(), "reactive can be left out, tumoral never"
    assert sets.calibrated_on == (30, 3)


def test_quantile_is_the_stated_order_statistic():
    """19 scores, coverage 0.9: the 18th smallest of 1 - p(true label), as (19 + 1) * 0.9 = 18."""
    scores = np.random.default_rng(0).permutation(np.arange(1, 20) / 20)
    sets = fit_conformal(np.ones(19, int), 1 - scores, coverage=0.9, per_class=False)
    assert sets.quantiles[0] == pytest.approx(18 / 20)


def test_sets_without_any_label_become_the_full_set():
    sets = Conformal(0.9, (0.3, 0.3), (50, 50))
    assert sets.sets([0.1, 0.5, 0.8]).tolist() == [[True, False], [True, True], [False, True]]
    assert sets.decide([0.1, 0.5, 0.8]).tolist() == [0, REFER, 1]


def test_three_classes_are_decided_one_by_one():
    sets = Conformal(0.9, (0.5, 0.5, math.inf), (50, 50, 2))
    assert sets.decide([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7]]).tolist() == [REFER, 2]
    with pytest.raises(ValueError, match="expected 3 classes, got 2"):
        sets.sets([0.5])


def test_sets_survive_json():
    sets = Conformal(0.9, (0.42, math.inf), (50, 3))
    stored = json.loads(json.dumps(sets.to_dict(), allow_nan=False))
    assert Conformal.from_dict(stored) == sets
    with pytest.raises(CalibrationError, match="no saved prediction sets"):
        Conformal.from_dict({"coverage": 0.9})
    with pytest.raises(CalibrationError, match="one quantile and one number of patients per class"):
        Conformal(0.9, (0.1, 0.2), (3,))
    with pytest.raises(ValueError, match="coverage must lie strictly between 0 and 1, got 90"):
        fit_conformal([0, 1], [0.1, 0.9], coverage=90)


def test_abstention_report_counts_patients():
    labels = np.array([0, 0, 0, 1, 1, 1])
    probabilities = np.array([0.1, 0.5, 0.9, 0.1, 0.5, 0.9])
    sets = Conformal(0.8, (0.3, 0.3), (50, 50))
    found = abstention_intervals(labels, probabilities, sets, bootstrap=Bootstrap(resamples=50))
    values = {name: interval.value for name, interval in found.items()}
    assert values["coverage"] == pytest.approx(4 / 6)
    assert values["coverage_0"] == values["coverage_1"] == pytest.approx(2 / 3)
    assert values["referred"] == values["referred_0"] == values["referred_1"] == pytest.approx(1 / 3)
    assert values["accuracy_decided"] == 0.5
    nobody = abstention_intervals(labels, probabilities, Conformal(0.8, (math.inf,) * 2, (0, 0)))
    assert math.isnan(nobody["accuracy_decided"].value)
    assert nobody["coverage"].value == nobody["referred"].value == 1
