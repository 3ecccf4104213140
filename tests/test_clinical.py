"""The clinical baseline learns from training patients only, says so for missing values, and reloads without pickle."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skops.io
from imblearn.over_sampling import SMOTENC
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from lymph_hf import clinical
from lymph_hf.clinical import KINDS, ClinicalError, ClinicalModel, ClinicalSettings, out_of_fold, tune
from lymph_hf.clinical_baseline import blend, choose_blend, clinical_baseline, clinical_table
from lymph_hf.cohort import Cohort, Patient
from lymph_hf.inference import prediction_table
from lymph_hf.metrics import bootstrap_intervals, choose_threshold
from lymph_hf.population import draw_patients
from lymph_hf.splits import make_split

SMALL = {"logistic": {}, "forest": {"n_estimators": 15}, "boosting": {"n_estimators": 15}}


def small(kind, **options):
    return ClinicalSettings(kind, parameters=SMALL[kind], **options)


def cohort(n=90, seed=0, missing=0.15):
    rng = np.random.default_rng(seed)
    tumoral = rng.random(n) < 0.6
    drawn = draw_patients(tumoral, (5, 30), missing, rng)
    patients = tuple(
        Patient(
            f"patient-{number:03d}-x",
            tuple(Path(f"{number}-{cell}.png") for cell in range(int(drawn.cell_counts[number].sum()))),
            "tumoral" if tumoral[number] else "reactive",
            age=None if np.isnan(drawn.age[number]) else float(drawn.age[number]),
            sex=str(drawn.sex[number]) or None,
            lymphocyte_count=None
            if np.isnan(drawn.lymphocyte_count[number])
            else float(drawn.lymphocyte_count[number]),
        )
        for number in range(n)
    )
    return Cohort(Path("memory"), "generic", patients)


def table(n=90, seed=0, missing=0.15):
    patients = cohort(n, seed, missing)
    return patients.to_frame(), np.array([int(patient.label == "tumoral") for patient in patients.patients])


def folds(labels, k=5, seed=0):
    return list(StratifiedKFold(k, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels))


# Model


@pytest.mark.parametrize("smote", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_ranks_new_patients_near_the_best_possible(kind, smote):
    frame, labels = table(150, seed=1)
    fresh = cohort(800, seed=2)
    truth = [patient.label == "tumoral" for patient in fresh.patients]
    probabilities = ClinicalModel(small(kind, smote=smote)).fit(frame, labels).predict_proba(fresh.to_frame())
    assert probabilities.shape == (800, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert roc_auc_score(truth, probabilities[:, 1]) > 0.75  # the likelihood ratio reaches 0.84


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_model(kind):
    frame, labels = table()
    one, two = (ClinicalModel(small(kind, smote=True, seed=3)).fit(frame, labels) for _ in range(2))
    np.testing.assert_array_equal(one.predict_proba(frame), two.predict_proba(frame))


def test_logistic_regression_is_that_of_the_written_out_columns():
    """Median and mode imputation, standardised age and log count, an indicator of missing for each value."""
    frame, labels = table(120, seed=3)
    age = frame["age"].fillna(frame["age"].median())
    count = np.log(frame["lymphocyte_count"])
    count = count.fillna(count.median())
    male = (frame["sex"].fillna(frame["sex"].mode()[0]) == "M").astype(float)
    columns = np.column_stack(
        [
            (age - age.mean()) / age.std(ddof=0),
            (count - count.mean()) / count.std(ddof=0),
            male,
            frame["age"].isna(),
            frame["sex"].isna(),
            frame["lymphocyte_count"].isna(),
        ]
    ).astype(float)
    plain = LogisticRegression(max_iter=1000).fit(columns, labels)
    model = ClinicalModel().fit(frame, labels)
    np.testing.assert_allclose(model.predict_proba(frame), plain.predict_proba(columns), atol=1e-6)
    assert list(model.coefficients()) == [
        "intercept",
        "age",
        "log lymphocyte_count",
        "male",
        "age missing",
        "sex missing",
        "lymphocyte_count missing",
    ]
    assert model.coefficients()["age"] == pytest.approx([plain.coef_[0, 0]], abs=1e-4)


def test_any_value_may_be_missing_when_predicting_and_all_when_fitting():
    frame, labels = table(missing=0.0)
    model = ClinicalModel(small("forest")).fit(frame, labels)
    blank = frame.assign(age=np.nan, sex=None, lymphocyte_count=np.nan)
    assert np.ptp(model.predict_proba(blank), axis=0) == pytest.approx([0, 0])
    nothing = ClinicalModel(ClinicalSettings(smote=True)).fit(blank, labels)
    assert nothing.predict_proba(frame).shape == (90, 2)


def test_features_can_be_chosen_and_only_they_matter():
    frame, labels = table()
    model = ClinicalModel(ClinicalSettings(features=("age", "sex"))).fit(frame, labels)
    changed = frame.assign(lymphocyte_count=99.0)
    np.testing.assert_array_equal(model.predict_proba(frame), model.predict_proba(changed))
    bag_size = ClinicalModel(ClinicalSettings(features=("cells",))).fit(frame, labels)
    assert list(bag_size.coefficients()) == ["intercept", "log cells", "cells missing"]
    assert ClinicalModel(ClinicalSettings(features=("sex",))).fit(frame, labels).predict_proba(frame).shape == (90, 2)


def test_three_classes_are_fitted():
    frame, _ = table()
    labels = np.arange(90) % 3
    assert ClinicalModel(small("boosting", smote=True)).fit(frame, labels).predict_proba(frame).shape == (90, 3)


def test_smote_makes_whole_patients():
    """Synthetic patients are of one sex, and have a value or have not; classes come out equal."""
    frame, labels = table(60, seed=4)
    model = ClinicalModel(ClinicalSettings(smote=True))
    columns = model._preparation().fit_transform(model._values(frame))
    resampled, new_labels = model._smote(labels).fit_resample(columns, labels)
    assert len(resampled) > 60
    assert set(np.unique(resampled[:, 2:])) == {0.0, 1.0}
    assert np.ptp(np.bincount(new_labels)) == 0


# Leaks


def test_regression_smote_runs_inside_the_folds():
    """Oversampled before cross-validation, copies of a held-out patient train the model that is scored on it.

    The labels here are noise, so an honest AUROC is one half. Put in front of the folds, as the leaky version below
    has it, SMOTE makes them look predictable.
    """
    rng = np.random.default_rng(0)
    labels = (np.arange(150) % 5 == 0).astype(int)
    frame = pd.DataFrame(
        {
            "age": rng.normal(60, 15, 150),
            "sex": rng.choice(["F", "M"], 150),
            "lymphocyte_count": rng.lognormal(2, 1, 150),
        }
    )
    model = ClinicalModel(ClinicalSettings("forest", smote=True, parameters={"n_estimators": 30}))
    columns = model._preparation().fit_transform(model._values(frame))
    resampled, new_labels = SMOTENC(categorical_features=[2, 3, 4, 5], random_state=0).fit_resample(columns, labels)
    leaky = np.empty(len(new_labels))
    for train, held_out in folds(new_labels):
        neighbour = KNeighborsClassifier(3).fit(resampled[train], new_labels[train])
        leaky[held_out] = neighbour.predict_proba(resampled[held_out])[:, 1]
    honest = out_of_fold(model.settings, frame, labels, folds(labels))[:, 1]
    assert roc_auc_score(new_labels, leaky) > 0.75
    assert roc_auc_score(labels, honest) == pytest.approx(0.5, abs=0.15)


def test_regression_smote_never_sees_a_held_out_patient(monkeypatch):
    frame, labels = table(60, seed=5, missing=0.0)
    seen, plain = [], SMOTENC.fit_resample

    def remember(sampler, columns, labels):
        seen.append(len(columns))
        return plain(sampler, columns, labels)

    monkeypatch.setattr(SMOTENC, "fit_resample", remember)
    inner = folds(labels)
    out_of_fold(ClinicalSettings(smote=True), frame, labels, inner)
    assert seen == [len(train) for train, _ in inner]


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_out_patient_changes_nothing_that_judges_it(kind):
    """Imputation, scales, synthetic patients and trees: none may depend on the held-out label or values."""
    frame, labels = table(80, seed=6)
    inner = folds(labels)
    _, held_out = inner[0]
    before = out_of_fold(small(kind, smote=True), frame, labels, inner[:1])
    other_labels = labels.copy()
    other_labels[held_out] = 1 - labels[held_out]
    after = out_of_fold(small(kind, smote=True), frame, other_labels, inner[:1])
    np.testing.assert_array_equal(before, after)
    wild = frame.copy()
    wild.loc[held_out[1:], ["age", "lymphocyte_count"]] = [1.0, 500.0]
    beside = out_of_fold(small(kind, smote=True), wild, labels, inner[:1])
    np.testing.assert_array_equal(before[held_out[0]], beside[held_out[0]])
    assert np.isnan(before[inner[0][0]]).all()


def test_folds_that_overlap_are_refused():
    frame, labels = table(20)
    with pytest.raises(ClinicalError, match="learns from patients that it holds out"):
        out_of_fold(ClinicalSettings(), frame, labels, [(np.arange(15), np.arange(14, 20))])


def test_tuning_finds_no_worse_settings_and_repeats_itself():
    frame, labels = table(70, seed=7)
    settings, inner = small("boosting", seed=1), folds(labels, k=3)
    tuned = tune(settings, frame, labels, inner, trials=4)
    assert tuned == tune(settings, frame, labels, inner, trials=4)
    losses = [log_loss(labels, out_of_fold(each, frame, labels, inner)) for each in (settings, tuned)]
    assert losses[1] <= losses[0]
    assert tune(settings, frame, labels, inner, trials=1) == settings
    with pytest.raises(ClinicalError, match="trials must be at least 1, got 0"):
        tune(settings, frame, labels, inner, trials=0)


# Files


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_predicts_the_same(kind, tmp_path):
    frame, labels = table()
    model = ClinicalModel(small(kind, smote=True, features=("age", "lymphocyte_count"))).fit(frame, labels)
    model.label_names, model.decision_threshold = ("reactive", "tumoral"), 0.37
    model.save(tmp_path / "clinical")
    assert {path.name for path in (tmp_path / "clinical").iterdir()} == {"clinical.json", "model.skops"}
    loaded = ClinicalModel.load(tmp_path / "clinical")
    np.testing.assert_array_equal(loaded.predict_proba(frame), model.predict_proba(frame))
    assert loaded.settings == model.settings
    assert (loaded.label_names, loaded.decision_threshold) == (("reactive", "tumoral"), 0.37)
    model.save(tmp_path / "clinical")  # an older one is replaced
    record = json.loads((tmp_path / "clinical/clinical.json").read_text())
    assert (record["coefficients"] is None) == (kind != "logistic")


def test_foreign_types_in_a_model_file_are_refused(tmp_path):
    frame, labels = table()
    model = ClinicalModel().fit(frame, labels)
    model.save(tmp_path)
    skops.io.dump(clinical.ClinicalSettings(), tmp_path / "model.skops")
    with pytest.raises(ClinicalError, match="foreign types .*ClinicalSettings"):
        ClinicalModel.load(tmp_path)
    with pytest.raises(ClinicalError, match="no clinical model there"):
        ClinicalModel.load(tmp_path / "nowhere")


def test_another_version_of_scikit_learn_is_said(tmp_path, caplog):
    frame, labels = table()
    ClinicalModel().fit(frame, labels).save(tmp_path)
    record = json.loads((tmp_path / "clinical.json").read_text())
    (tmp_path / "clinical.json").write_text(json.dumps(record | {"scikit_learn": "0.1"}))
    ClinicalModel.load(tmp_path)
    assert "fitted with scikit-learn 0.1" in caplog.text


# Errors


@pytest.mark.parametrize(
    ("column", "bad", "message"),
    [
        ("lymphocyte_count", 0.0, "patient patient-003-x: lymphocyte_count is .*0.0.*, expected a number above 0"),
        ("age", np.inf, "patient patient-003-x: age is .*inf.*, expected a finite number"),
        ("age", "old", "patient patient-003-x: age is 'old', expected a number or missing"),
        ("sex", "X", "patient patient-003-x: sex is 'X', expected F, M or missing"),
    ],
)
def test_impossible_values_are_named(column, bad, message):
    frame, labels = table()
    frame[column] = frame[column].astype(object)
    frame.loc[3, column] = bad
    with pytest.raises(ClinicalError, match=message):
        ClinicalModel().fit(frame, labels)


def test_misuse_is_named(tmp_path, monkeypatch):
    frame, labels = table()
    calls = {
        "kind 'svm': expected one of logistic, forest, boosting": lambda: ClinicalSettings("svm"),
        "expected some of age, sex, lymphocyte_count, cells": lambda: ClinicalSettings(features=("weight",)),
        "each once": lambda: ClinicalSettings(features=("age", "age")),
        "SMOTE interpolates between numbers": lambda: ClinicalSettings(features=("sex",), smote=True),
        "parameters .* of logistic": lambda: ClinicalSettings(parameters={"depth": 3}).classifier(),
        "no column age": lambda: ClinicalModel().fit(frame.drop(columns="age"), labels),
        "call fit first": lambda: ClinicalModel().predict_proba(frame),
        "nothing to save": lambda: ClinicalModel().save(tmp_path / "m"),
        "expected 90 integer labels": lambda: ClinicalModel().fit(frame, labels[1:]),
        "every class 0..C-1": lambda: ClinicalModel().fit(frame, labels + 1),
        "at least two patients of each class": lambda: ClinicalModel(ClinicalSettings(smote=True)).fit(
            frame, np.eye(90, dtype=int)[0]
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ClinicalError, match=message):
            call()
    monkeypatch.setitem(__import__("sys").modules, "skops.io", None)
    with pytest.raises(ClinicalError, match=r"skops is not installed .* pip install 'lymph-hf\[train\]'"):
        ClinicalModel().fit(frame, labels).save(tmp_path / "m")


# Baseline


def test_the_baseline_has_the_table_of_an_image_model():
    patients = cohort()
    split = make_split(patients, validation_fraction=0.2, test_fraction=0.2, seed=0)
    found = clinical_baseline(patients, split)
    assert set(found.tables) == {"validation", "test"}
    for part in ("validation", "test"):
        ids = list(getattr(split, part))
        rows = patients.select(ids).patients
        assert found.tables[part]["patient_id"].tolist() == ids
        expected = prediction_table(
            ids,
            found.probabilities[part],
            [len(row.images) for row in rows],
            label_names=("reactive", "tumoral"),
            threshold=found.model.decision_threshold,
            labels=[row.label for row in rows],
        )
        pd.testing.assert_frame_equal(found.tables[part], expected)
        pd.testing.assert_frame_equal(clinical_table(found.model, patients.select(ids)), expected)
    labels = (found.tables["test"]["label"] == "tumoral").astype(int).to_numpy()
    expected = bootstrap_intervals(
        labels, found.probabilities["test"], threshold=found.model.decision_threshold, resamples=30, seed=1
    )
    assert found.intervals("test", resamples=30, seed=1) == expected


def test_the_threshold_comes_from_validation_and_the_fit_from_train_alone():
    patients = cohort()
    split = make_split(patients, validation_fraction=0.2, test_fraction=0.2, seed=0)
    found = clinical_baseline(patients, split)
    validation = found.tables["validation"]
    expected = choose_threshold((validation["label"] == "tumoral").astype(int), found.probabilities["validation"])
    assert found.model.decision_threshold == expected
    frame, labels = table()
    train = np.isin(frame["patient_id"], split.train)
    alone = ClinicalModel().fit(frame[train], labels[train])
    test = frame[np.isin(frame["patient_id"], split.test)]
    np.testing.assert_array_equal(found.probabilities["test"], alone.predict_proba(test))


def test_the_baseline_searches_among_training_patients(monkeypatch):
    patients = cohort(60)
    split = make_split(patients, validation_fraction=0.2, test_fraction=0.2, seed=0)
    seen = []

    def remember(settings, frame, labels, folds, *, trials):
        seen.append((set(frame["patient_id"]), folds, trials))
        return settings

    monkeypatch.setattr("lymph_hf.clinical_baseline.tune", remember)
    clinical_baseline(patients, split, trials=5, inner_folds=3)
    ((ids, inner, trials),) = seen
    assert (ids, trials, len(inner)) == (set(split.train), 5, 3)
    assert sorted(np.concatenate([held_out for _, held_out in inner])) == list(range(len(split.train)))


def test_the_positive_label_of_the_baseline_can_be_turned():
    patients = cohort()
    split = make_split(patients, validation_fraction=0.3, seed=0)
    plain = clinical_baseline(patients, split)
    turned = clinical_baseline(patients, split, label_names=["tumoral", "reactive"])
    expected = 1 - plain.tables["validation"]["probability"]
    assert turned.tables["validation"]["probability"].to_numpy() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ClinicalError, match="no training patient has the label APL"):
        clinical_baseline(patients, split, label_names=["reactive", "tumoral", "APL"])
    with pytest.raises(ClinicalError, match="has the label 'tumoral', expected one of reactive, APL"):
        clinical_baseline(patients, split, label_names=["reactive", "APL"])
    with pytest.raises(ClinicalError, match="no patients in test; the baseline has validation"):
        plain.intervals("test")


# Blend


def test_blend_weighs_the_two_models_and_picks_the_better():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    good = np.clip(rng.normal(0.3 + 0.4 * labels, 0.15), 0.01, 0.99)
    good, poor = (np.stack([1 - p, p], axis=1) for p in (good, rng.uniform(0.2, 0.8, 60)))
    assert choose_blend(labels, good, poor) < 0.3
    assert choose_blend(labels, poor, good) > 0.7
    assert choose_blend(labels, good, good) == 0.0, "the network alone where the clinical model adds nothing"
    np.testing.assert_allclose(blend(good, poor, 0.25), 0.75 * good + 0.25 * poor)
    weights = np.arange(0, 1.01, 0.05)
    losses = [log_loss(labels, blend(good, poor, weight.round(2))) for weight in weights]
    assert choose_blend(labels, good, poor) == pytest.approx(weights[np.argmin(losses)])


def test_blend_errors_say_what_is_wrong():
    two = np.full((3, 2), 0.5)
    with pytest.raises(ClinicalError, match="different patients or classes"):
        blend(two, two[1:], 0.5)
    with pytest.raises(ClinicalError, match=r"must lie in \[0, 1\], got 1.5"):
        blend(two, two, 1.5)
    with pytest.raises(ClinicalError, match="no validation patients"):
        choose_blend([], two[:0], two[:0])
