"""`lymph explain` from the command line: what it writes, and what it refuses."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
from figure_cases import remember_saved, texts
from PIL import Image

from lymph_hf.cli import main
from lymph_hf.cohort import read_cohort
from lymph_hf.reporting_explain import Gallery, ShownCell, gallery_figure


@pytest.fixture(scope="module")
def explained(trained_run, cohort_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("explained")
    arguments = ["explain", str(trained_run), "--data", str(cohort_folder), "--output", str(output)]
    arguments += ["--patient", "P001", "P002", "--shown", "2", "--resamples", "50"]
    arguments += ["--judge", str(cohort_folder / "cells.csv"), "--positive", "cll_like", "small_mature"]
    assert main(arguments) == 0
    return output


def test_each_patient_has_a_summary_a_table_and_a_gallery(explained, cohort_folder):
    assert {path.name for path in explained.iterdir() if path.is_dir()} == {"P001", "P002"}
    for patient in read_cohort(cohort_folder).select(["P001", "P002"]).patients:
        folder = explained / patient.patient_id
        summary = json.loads((folder / "explanation.json").read_text())
        assert sum(summary["probabilities"].values()) == pytest.approx(1)
        assert summary["label"] == "tumoral"
        assert summary["cells"] == len(patient.images)
        assert set(summary["clinical"]) == {"age", "sex", "lymphocyte_count"}
        for name, value in summary["clinical"].items():
            assert value["value"] == getattr(patient, name)
            assert value["value"] is not None or value["effect"] == 0
        table = pd.read_csv(folder / "cells.csv")
        assert sorted(table["file"]) == [path.name for path in patient.images]
        assert table["effect"].is_monotonic_decreasing
        assert list(table["rank"]) == list(range(1, len(table) + 1))
        assert table["attention"].sum() == pytest.approx(1, abs=1e-5)
        with Image.open(folder / "gallery.png") as picture:
            assert min(picture.size) > 500


def test_the_judgement_has_intervals_rows_and_curves(explained):
    report = json.loads((explained / "judgement.json").read_text())
    assert report["patients"] == 2
    assert report["positive_types"] == ["cll_like", "small_mature"]
    assert set(report["rankings"]) == {"leave_one_out", "sampled", "attention"}
    rows = pd.read_csv(explained / "judgement.csv")
    assert len(rows) == 6
    deletion = report["rankings"]["attention"]["deletion"]
    assert deletion["value"] == pytest.approx(rows[rows["ranking"] == "attention"]["deletion"].mean())
    assert deletion["low"] <= deletion["value"] <= deletion["high"]
    assert (explained / "judgement.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name patients with --patient, or give --all or --judge"),
        (["--patient", "P999"], "no such patient in the cohort"),
        (["--patient", "P001", "--label", "blue"], "the model's labels are reactive, tumoral"),
        (["--judge", "{cells}", "--positive", "purple"], "--positive purple: no such cell type"),
        (["--judge", "{clinical}", "--positive", "purple"], "no column cell_type, file"),
        (
            ["--judge", "{cells}", "--positive", "cleaved", "--judge-label", "blue"],
            "the cohort has reactive, tumoral",
        ),
        (["--patient", "P001", "--shown", "0"], "--shown 0: expected at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(trained_run, cohort_folder, tmp_path, caplog, arguments, message):
    places = {"cells": cohort_folder / "cells.csv", "clinical": cohort_folder / "clinical.csv"}
    arguments = [argument.format(**places) for argument in arguments]
    call = ["explain", str(trained_run), "--data", str(cohort_folder), "--output", str(tmp_path / "out")]
    with caplog.at_level(logging.ERROR):
        assert main([*call, *arguments]) == 1
    assert message in caplog.text
    assert not (tmp_path / "out").exists()


def cell(effect: float, **changes) -> ShownCell:
    settings = {"attention": 0.25, "evidence": np.linspace(-1, 1, 64).reshape(8, 8)} | changes
    return ShownCell(np.full((8, 8, 3), 200, np.uint8), effect, **settings)


def draw(tmp_path, monkeypatch, **changes) -> str:
    figures = remember_saved(monkeypatch)
    settings = {"patient_id": "P7", "cells": 4, "label": "tumoral", "probability": 0.25, "threshold": 0.4}
    settings |= {"predicted_label": "reactive", "prediction_set": None, "clinical": {"age": (71.5, -0.125)}}
    settings |= {"speaking_for": [cell(0.02)], "speaking_against": [cell(-0.01)]}
    gallery_figure(Gallery(**settings | changes), tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").exists()
    return texts(figures[-1])


def test_the_gallery_says_answer_effects_and_attention(tmp_path, monkeypatch):
    said = draw(tmp_path, monkeypatch)
    assert "P7: P(tumoral) = 0.25, 4 cells" in said
    assert "called reactive" in said
    assert "threshold 0.40" in said
    assert "age: 71.5 years" in said
    assert "-0.12" in said
    assert "+0.020\nattention 25.0%" in said
    assert "speak most for tumoral" in said
    assert "speak most against tumoral" in said
    assert "flow cytometry" not in said


@pytest.mark.parametrize(
    ("prediction_set", "sentence"),
    [
        (["reactive", "tumoral"], "reactive or tumoral are possible:\nrefer to flow cytometry"),
        (["reactive"], "called reactive; the other labels are ruled out"),
    ],
)
def test_the_gallery_says_what_the_prediction_set_means(tmp_path, monkeypatch, prediction_set, sentence):
    assert sentence in draw(tmp_path, monkeypatch, prediction_set=prediction_set)


def test_the_gallery_of_what_is_not_there(tmp_path, monkeypatch):
    plain = {"evidence": None, "attention": None}
    said = draw(
        tmp_path,
        monkeypatch,
        threshold=None,
        clinical={},
        speaking_for=[cell(float("nan"), **plain)],
        speaking_against=[],
    )
    assert "the model looks at images only" in said
    assert "the only cell" in said
    assert "attention 2" not in said
    assert "where inside the cell" not in said
    said = draw(tmp_path, monkeypatch, speaking_against=[cell(0.001)], clinical={"sex": (None, 0.0)})
    assert "speak least for tumoral" in said
    assert "sex: missing" in said
