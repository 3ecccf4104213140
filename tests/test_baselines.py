"""The rows beside a network: the blend's weight comes from validation patients alone, and scores are its own."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from lymph_hf import recipes
from lymph_hf.baselines import Blend, Row, frozen_threshold, ordered_columns, score_rows
from lymph_hf.clinical import ClinicalModel
from lymph_hf.cohort import read_cohort
from lymph_hf.options import CohortOptions, EvaluateOptions, InferenceOptions
from lymph_hf.synthetic import write_synthetic_cohort


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Patients that the trained run has never seen."""
    folder = tmp_path_factory.mktemp("cohorts") / "others"
    write_synthetic_cohort(folder, patients=12, seed=9, cells=(2, 3), image_size=48, progress=False)
    return folder


def evaluated(run, data, output):
    options = EvaluateOptions(run=str(run), output=str(output), resamples=200)
    report = recipes.evaluate(CohortOptions(data=str(data)), options, InferenceOptions(cpu=True))
    return report["baselines"], pd.read_csv(output / "predictions.csv")


def test_the_weight_is_chosen_on_validation_patients(trained_run):
    """Of all weights in steps of 0.05 the one with the least log-loss of the validation patients."""
    network = pd.read_csv(trained_run / "validation.csv").set_index("patient_id")
    clinical = pd.read_csv(trained_run / "clinical-validation.csv").set_index("patient_id").loc[network.index]
    labels = (network.label == "tumoral").astype(int)
    losses = {
        w: log_loss(labels, (1 - w) * network.probability + w * clinical.probability)
        for w in np.arange(0, 1.01, 0.05).round(2)
    }
    chosen = Blend.load(trained_run)
    assert chosen.clinical_weight == pytest.approx(min(losses, key=losses.get))
    assert chosen.patients == len(labels)
    report = json.loads((trained_run / "validation.json").read_text())["baselines"]
    assert list(report) == ["clinical alone", "blend"]
    assert report["blend"]["threshold"] == chosen.threshold


def test_evaluation_applies_what_was_frozen_and_chooses_nothing(trained_run, others, tmp_path):
    """Wrong labels of the evaluated patients change scores, never the blend or a threshold."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    before = (run / "blend.json").read_bytes()
    rows, table = evaluated(run, others, tmp_path / "right")
    flipped = shutil.copytree(others, tmp_path / "flipped")
    clinic = pd.read_csv(flipped / "clinical.csv")
    clinic["label"] = clinic.label.map({"reactive": "tumoral", "tumoral": "reactive"})
    clinic.to_csv(flipped / "clinical.csv", index=False)
    wrong, _ = evaluated(run, flipped, tmp_path / "wrong")
    assert (run / "blend.json").read_bytes() == before
    assert [row["threshold"] for row in rows.values()] == [row["threshold"] for row in wrong.values()]
    for name in rows:
        assert rows[name]["scores"]["auroc"]["value"] == pytest.approx(1 - wrong[name]["scores"]["auroc"]["value"])
    frame = read_cohort(others).to_frame().set_index("patient_id").loc[table.patient_id].reset_index()
    clinical = ClinicalModel.load(run / "clinical-model").predict_proba(frame)[:, 1]
    blended = 0.7 * table.probability + 0.3 * clinical
    labels = (table.label == "tumoral").astype(int)
    assert rows["clinical alone"]["scores"]["auroc"]["value"] == pytest.approx(roc_auc_score(labels, clinical))
    (run / "blend.json").write_text(json.dumps({"clinical_weight": 0.3, "threshold": 0.5, "patients": 4}))
    rows, _ = evaluated(run, others, tmp_path / "set")
    assert rows["blend"]["scores"]["auroc"]["value"] == pytest.approx(roc_auc_score(labels, blended))
    assert rows["blend"]["scores"]["brier"]["value"] == pytest.approx(np.mean((blended - labels) ** 2))


def test_a_model_folder_has_no_rows_beside_it(trained_run, others, tmp_path):
    assert evaluated(trained_run / "lymph-mil", others, tmp_path)[0] == {}


def test_rows_are_compared_in_pairs():
    labels = [0, 0, 0, 1, 1, 1]
    network = np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
    poor = np.array([0.9, 0.2, 0.3, 0.1, 0.8, 0.9])
    two = [np.column_stack([1 - p, p]) for p in (network, poor)]
    rows = [Row("itself", two[0], 0.5), Row("poor", two[1], 0.5)]
    report = score_rows(labels, two[0], 0.5, rows, resamples=300)
    lead = report["poor"]["network_lead"]["auroc"]
    assert lead["difference"]["value"] == pytest.approx(1 - roc_auc_score(labels, poor))
    assert lead["first"] == pytest.approx(roc_auc_score(labels, poor))
    assert report["itself"]["network_lead"]["auroc"]["difference"]["value"] == 0


def test_small_matters():
    assert ordered_columns(np.array([[0.2, 0.8]]), ["b", "a"], ["a", "b"]).tolist() == [[0.8, 0.2]]
    with pytest.raises(ValueError, match=r"\['b', 'a'\] cannot stand beside"):
        ordered_columns(np.array([[0.2, 0.8]]), ["b", "a"], ["a", "c"])
    assert frozen_threshold([1, 1], np.array([[0.3, 0.7], [0.1, 0.9]])) == 0.5
    assert 0.3 < frozen_threshold([0, 1], np.array([[0.7, 0.3], [0.1, 0.9]])) < 0.9
