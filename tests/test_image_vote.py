"""The image vote: its formulas, whom its classifier may know, and the row beside the patient model."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.metrics import roc_auc_score

from lymph_hf import recipes
from lymph_hf.cohort import read_cohort, scan_images
from lymph_hf.image_vote import ImageVoteError, cell_probabilities, image_vote, read_classifier, votes
from lymph_hf.lineage import LineageError
from lymph_hf.metrics import choose_threshold
from lymph_hf.options import CohortOptions, EvaluateOptions, InferenceOptions
from lymph_hf.options_pretrain import PretrainOptions
from lymph_hf.options_recipe import ImageVoteOptions
from lymph_hf.pretraining import pretrain
from lymph_hf.runs import RunError

CPU = InferenceOptions(cpu=True)
SMALL = {"encoder": "test_vit", "image_size": 32, "epochs": 1, "batch_size": 16, "micro_batch": 16, "probe_cells": 0}


def cell_stage(data, output, **changes) -> str:
    values = (
        SMALL | {"objective": "patient-label", "tracker": "none", "cpu": True, "validation_fraction": 0.2} | changes
    )
    pretrain(PretrainOptions(data=[str(data)], output=str(output), **values))
    return str(output)


@pytest.fixture(scope="module")
def classifier(cohort_folder, trained_run, tmp_path_factory) -> str:
    """Trained on the cells of the run's training patients."""
    return cell_stage(cohort_folder, tmp_path_factory.mktemp("cells") / "run", split=str(trained_run))


@pytest.fixture(scope="module")
def voted(cohort_folder, trained_run, classifier, tmp_path_factory):
    """A copy of the trained run with the vote beside it, and the report."""
    run = shutil.copytree(trained_run, tmp_path_factory.mktemp("runs") / "voted")
    options = ImageVoteOptions(run=str(run), classifier=classifier, resamples=200)
    return run, image_vote(CohortOptions(data=str(cohort_folder)), options, CPU)


def test_votes_are_shares_and_means():
    cells = np.array([[0.9, 0.1], [0.2, 0.8], [0.45, 0.55], [0.5, 0.5]])
    counted = votes(cells)
    assert counted["majority"].tolist() == [0.5, 0.5], "the first label on a tie"
    assert counted["mean"] == pytest.approx([0.5125, 0.4875])
    three = votes(np.array([[0.2, 0.3, 0.5], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]))
    assert three["majority"] == pytest.approx([1 / 3, 0, 2 / 3])
    assert three["mean"] == pytest.approx([0.3, 0.8 / 3, 1.3 / 3])


def test_each_cell_is_asked_alone(classifier, cohort_folder):
    """Whatever stands beside it in the bag."""
    model, processor = read_classifier(classifier)
    cohort = scan_images(read_cohort(cohort_folder), progress=False)
    found = cell_probabilities(model, processor, cohort, Accelerator(cpu=True))
    assert [len(cells) for cells in found] == [len(patient.images) for patient in cohort.patients]
    for number, path in enumerate(cohort.patients[1].images):
        with torch.no_grad():
            alone = model(**processor([Image.open(path)])).logits.softmax(-1)[0].numpy()
        assert found[1][number] == pytest.approx(alone, abs=1e-5)


def test_thresholds_come_from_the_validation_patients(voted):
    run, report = voted
    table = pd.read_csv(run / "image-vote.csv")
    assert set(table.patient_id) == set(json.loads((run / "split.json").read_text())["validation"])
    labels = (table.label == "tumoral").astype(int)
    thresholds = json.loads((run / "image-vote" / "thresholds.json").read_text())
    assert thresholds.keys() == {"majority", "mean"}
    for name, threshold in thresholds.items():
        assert threshold == pytest.approx(choose_threshold(labels, table[name]))
    assert report == json.loads((run / "image-vote.json").read_text())
    assert report["n"] == len(table)
    assert "not a test" in report["patients"]


def test_evaluation_has_the_vote_beside_the_network(voted, cohort_folder, tmp_path):
    run, report = voted
    options = EvaluateOptions(run=str(run), output=str(tmp_path), subset="validation", resamples=200)
    rows = recipes.evaluate(CohortOptions(data=str(cohort_folder)), options, CPU)["baselines"]
    assert list(rows) == ["clinical alone", "blend", "image vote, majority", "image vote, mean"]
    table = pd.read_csv(run / "image-vote.csv")
    for name in ("majority", "mean"):
        row = rows[f"image vote, {name}"]
        assert row["scores"]["auroc"]["value"] == pytest.approx(roc_auc_score(table.label == "tumoral", table[name]))
        assert row["threshold"] == report["votes"][f"image vote, {name}"]["threshold"]
        low, high = (row["network_lead"]["auroc"]["difference"][side] for side in ("low", "high"))
        assert low <= high


def test_a_classifier_that_knows_the_validation_patients_is_refused(trained_run, cohort_folder, tmp_path, caplog):
    known = cell_stage(cohort_folder, tmp_path / "cells", split="none")
    run = shutil.copytree(trained_run, tmp_path / "run")
    refused = pytest.raises(LineageError, match="validation and test patients")
    with refused, caplog.at_level("INFO", logger="lymph_hf"):
        caplog.clear()
        image_vote(CohortOptions(data=str(cohort_folder)), ImageVoteOptions(run=str(run), classifier=known), CPU)
    assert scan_images(read_cohort(cohort_folder), progress=False).summary() in caplog.messages
    assert not (run / "image-vote").exists()


def test_what_cannot_vote_is_refused(trained_run, cohort_folder, classifier, tmp_path):
    data = CohortOptions(data=str(cohort_folder))
    with pytest.raises(ImageVoteError, match=r"no classifier/ there"):
        image_vote(data, ImageVoteOptions(run=str(trained_run), classifier=str(tmp_path)), CPU)
    with pytest.raises(RunError, match="no finished run"):
        image_vote(data, ImageVoteOptions(run=str(tmp_path), classifier=classifier), CPU)
    types = cell_stage(cohort_folder, tmp_path / "types", objective="cell-type", split=str(trained_run))
    with pytest.raises(ImageVoteError, match=r"--objective patient-label on patients of the same labels"):
        image_vote(data, ImageVoteOptions(run=str(trained_run), classifier=types), CPU)
