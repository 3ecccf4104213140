"""The evidence of an evaluation and its page: complete, self-contained, true to the stored predictions."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from figure_cases import remember_saved, texts
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from lymph_hf import evaluation, recipes
from lymph_hf.cohort import Cohort, Patient, read_cohort
from lymph_hf.configuration_lymph import LymphMILConfig
from lymph_hf.evidence import cells_figure, known_groups, mean_attentions, write_attentions, write_evidence
from lymph_hf.inference import Inference
from lymph_hf.metrics import Bootstrap
from lymph_hf.options import CohortOptions, EvaluateOptions, InferenceOptions
from lymph_hf.options_report import ReportOptions
from lymph_hf.report_checklist import checklist
from lymph_hf.report_page import report, write_page
from lymph_hf.runs import RunError

FIGURES = {"curves.png", "calibration.png", "decision-curve.png", "subgroups.png", "cells.png"}


@pytest.fixture(scope="module")
def scored(trained_run, cohort_folder, tmp_path_factory):
    """A run, and the folder of its evaluation on all patients at a stated prevalence."""
    folder = tmp_path_factory.mktemp("evaluation")
    options = EvaluateOptions(run=str(trained_run), output=str(folder), subset="all", resamples=50, prevalence=0.18)
    recipes.evaluate(CohortOptions(data=str(cohort_folder)), options, InferenceOptions(cpu=True))
    return trained_run, folder


def test_an_evaluation_brings_its_figures_and_subgroups(scored):
    _, folder = scored
    assert {path.name for path in (folder / "figures").iterdir()} == FIGURES | {"cells.csv"}
    report = json.loads((folder / "metrics.json").read_text())
    variables = {group["variable"] for group in report["subgroups"]}
    assert variables == {"age", "sex", "lymphocyte count"}
    table = pd.read_csv(folder / "predictions.csv")
    for variable in variables:
        assert sum(group["n"] for group in report["subgroups"] if group["variable"] == variable) == len(table)


def test_a_subgroup_score_is_that_of_its_patients_at_the_frozen_threshold(scored, cohort_folder):
    _, folder = scored
    report = json.loads((folder / "metrics.json").read_text())
    table = pd.read_csv(folder / "predictions.csv").set_index("patient_id")
    women = [patient.patient_id for patient in read_cohort(cohort_folder).patients if patient.sex == "F"]
    expected = balanced_accuracy_score(table.label[women], table.predicted_label[women])
    found = next(group for group in report["subgroups"] if group["group"] == "female")
    assert found["n"] == len(women)
    assert found["scores"]["balanced_accuracy"]["value"] == pytest.approx(expected)


def test_the_page_holds_everything_and_asks_for_nothing(scored):
    run, folder = scored
    page = (folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', page), "a page must not load anything"
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)
    for heading in (
        "ROC and precision-recall curves",
        "Decision curve",
        "Subgroups",
        "Training",
        "TRIPOD+AI checklist",
    ):
        assert heading in page
    assert page.count("<img") == page.count('alt="') == len(FIGURES) + 3
    assert "not a medical device" in page and "{{" not in page
    stored = json.loads((folder / "metrics.json").read_text())["scores"]["auroc"]
    assert f"{stored['value']:.3f} ({stored['low']:.3f} to {stored['high']:.3f})" in page
    assert all(option in page for option in json.loads((run / "settings.json").read_text()))


def test_the_cells_name_no_patient_but_the_table_beside_them_does(tmp_path, monkeypatch):
    saved = remember_saved(monkeypatch)
    cohort = patients(tmp_path, ["a", "b", "a"])
    probabilities = np.array([[0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    attentions = (np.ones(1), np.ones(1), np.ones(1))
    decided = np.array([0, 1, 1])
    labels, names = np.array([0, 1, 0]), ["a", "b"]
    cells_figure(tmp_path / "cells.png", cohort, labels, probabilities, attentions, decided=decided, names=names)
    shown = texts(saved[0])
    assert "patient 1, right:\ncalled a" in shown and "patient 3, WRONG:\ncalled b" in shown
    assert not re.search(r"P\d", shown)
    assert pd.read_csv(tmp_path / "cells.csv").patient_id.tolist() == ["P0", "P1", "P2"]


def test_the_bands_have_the_resamples_that_were_asked_for(trained_run, cohort_folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "evaluation_figure", lambda *_, **options: asked.append(options["bootstrap"]))
    options = EvaluateOptions(run=str(trained_run), output=str(tmp_path), resamples=7, seed=3, figures=False)
    recipes.evaluate(CohortOptions(data=str(cohort_folder)), options, InferenceOptions(cpu=True))
    assert asked == [Bootstrap(7, seed=3)]


def test_attentions_are_read_as_they_were_written_and_averaged_over_files(tmp_path):
    images = tuple(tmp_path / f"{name}.png" for name in ("NA", "b", "c"))
    cohort = Cohort(tmp_path, "generic", (Patient("007", images), Patient("NA", images[:1])), (), ())
    weights = [np.array([0.25, 0.5, 0.25], np.float32), np.ones(1, np.float32)]
    write_attentions(tmp_path / "1" / "a.csv", cohort, weights)
    write_attentions(tmp_path / "2" / "a.csv", cohort.select(["007"]), [np.array([0.75, 0, 0.25], np.float32)])
    both = [tmp_path / name / "a.csv" for name in "12"]
    backwards = cohort.select(["NA", "007"])
    for paths, expected in ((both[:1], weights[0]), (both, [0.5, 0.25, 0.25])):
        one, three = mean_attentions(paths, backwards)
        np.testing.assert_allclose(one, [1])
        np.testing.assert_allclose(three, expected)


def test_scores_of_a_label_name_it_and_wide_pictures_are_moved_on_narrow_screens(scored):
    page = (scored[1] / "report.html").read_text()
    assert (
        "coverage, tumoral patients</th>" in page
        and "referred, reactive patients</th>" in page
        and "coverage 1" not in page
    )
    for found in re.finditer(r'width="(\d+)" style="min-width: (\d+)px"', page):
        assert int(found[2]) == pytest.approx(int(found[1]) * 2 / 3, abs=1)
    assert page.count('<div class="scroll" tabindex="0"><img') == page.count("<img") > 5


def test_the_page_names_no_patient(scored, cohort_folder):
    page = re.sub(r"base64,[^\"]+", "", (scored[1] / "report.html").read_text())
    assert not [p.patient_id for p in read_cohort(cohort_folder).patients if p.patient_id in page]


def test_names_from_the_data_cannot_write_into_the_page(scored, tmp_path):
    run, folder = scored
    shutil.copytree(folder, tmp_path / "evaluation")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["n_per_label"] = {"<script>alert(1)</script>": 3, "tumoral": 2}
    (tmp_path / "evaluation/metrics.json").write_text(json.dumps(metrics))
    page = write_page(run, evaluation=tmp_path / "evaluation").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_a_run_without_evaluation_shows_its_validation_and_says_so(trained_run, tmp_path):
    page = report(ReportOptions(run=str(trained_run), output=str(tmp_path / "page.html"))).read_text()
    assert "Not evaluated yet" in page and "not a test" in page
    with pytest.raises(RunError, match="lymph evaluate"):
        report(ReportOptions(run=str(tmp_path)))


def test_the_checklist_has_every_item_once_and_in_order(scored):
    run, folder = scored
    read = {name: json.loads((run / f"{name}.json").read_text()) for name in ("validation", "cohort", "settings")}
    config = json.loads((run / "lymph-mil/config.json").read_text())
    items = checklist(metrics=json.loads((folder / "metrics.json").read_text()), config=config, **read)
    assert [int(item.number) for item in items] == list(range(1, 28))
    answers = {item.number: item.answer for item in items}
    assert "14" in answers["10"] and "class weights" in answers["13"] and answers["17"] is None
    bare = checklist(metrics=read["validation"], validation={}, cohort={}, settings={}, config={})
    assert [item.number for item in bare] == [item.number for item in items]


def patients(folder, labels) -> Cohort:
    """One painted cell each; nothing clinical is known of them."""
    paths = []
    for number in range(len(labels)):
        paths.append(folder / f"{number}.png")
        Image.new("RGB", (20, 20), (number * 20, 0, 90)).save(paths[-1])
    found = [Patient(f"P{i}", (path,), label) for i, (path, label) in enumerate(zip(paths, labels, strict=True))]
    return Cohort(folder, "generic", tuple(found), (), ())


def test_without_clinical_values_or_with_more_labels_only_what_applies_is_drawn(tmp_path):
    two = LymphMILConfig(encoder="test_vit", id2label={0: "a", 1: "b"})
    cohort = patients(tmp_path, ["a", "b", "a", "b"])
    said = Inference(np.array([[0.8, 0.2], [0.3, 0.7], [0.4, 0.6], [0.1, 0.9]]), 0.5, (np.ones(1),) * 4)
    assert known_groups(cohort) == {}
    assert write_evidence(tmp_path / "two", cohort, said, two, bootstrap=Bootstrap(20)) == {}
    assert {path.name for path in (tmp_path / "two").iterdir()} == FIGURES - {"subgroups.png"} | {"cells.csv"}
    three = LymphMILConfig(encoder="test_vit", id2label={0: "a", 1: "b", 2: "c"})
    said = Inference(np.full((4, 3), 1 / 3), 0.5, (np.ones(1),) * 4)
    assert write_evidence(tmp_path / "three", cohort, said, three) == {}
    assert {path.name for path in (tmp_path / "three").iterdir()} == {"cells.png", "cells.csv"}
