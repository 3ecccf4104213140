"""Probes: the formulas, intervals over patients, and the report."""

import json

import numpy as np
import pytest
from cohort_factory import write_images, write_table
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from lymph_hf.files import write_json
from lymph_hf.options_pretrain import ProbeOptions
from lymph_hf.probing import (
    RECORD,
    Fold,
    ProbeError,
    balanced_accuracy,
    balanced_accuracy_interval,
    knn_predictor,
    nearest,
    predict_folds,
    predict_linear,
    probe,
)


@pytest.fixture
def blobs():
    """Three types as clouds around their centres, in six dimensions of different scale."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    centres = generator.normal(size=(3, 6)) * 3
    scale = np.array([1, 1, 1, 100, 0.01, 1])
    return (centres[labels] + generator.normal(size=(90, 6))) * scale + 50, labels


# Formulas ---------------------------------------------------------------------------------------------------


def test_knn_is_the_weighted_vote_of_the_nearest(blobs):
    x, labels = blobs
    bank, known, queries = x[::2], labels[::2], x[1::2]
    mean, std = bank.mean(axis=0), bank.std(axis=0)
    expected = []
    for query in queries:
        cosines = []
        for row in bank:
            a, b = (query - mean) / std, (row - mean) / std
            cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
        best = sorted(range(len(bank)), key=lambda i: -cosines[i])[:7]
        votes = [sum(np.exp(cosines[i] / 0.07) for i in best if known[i] == label) for label in range(3)]
        expected.append(int(np.argmax(votes)))
    assert knn_predictor(7, temperature=0.07)(bank, known, queries).tolist() == expected
    assert np.mean(np.array(expected) == labels[1::2]) > 0.8


def test_neighbours_are_found_best_first_and_not_beyond_the_bank(blobs):
    x, _ = blobs
    rows, likeness = nearest(x[:5], x[:3], k=9)
    assert rows.shape == likeness.shape == (3, 5)
    assert rows[:, 0].tolist() == [0, 1, 2]
    assert np.allclose(likeness[:, 0], 1.0)
    assert (np.diff(likeness, axis=1) <= 0).all()


def test_the_linear_probe_separates_what_a_plane_separates(blobs):
    x, labels = blobs
    assert np.mean(predict_linear(x[::2], labels[::2], x[1::2]) == labels[1::2]) > 0.9


def test_a_dimension_without_variation_is_harmless(blobs):
    x, labels = blobs
    x = np.concatenate([x, np.full((90, 1), 7.0)], axis=1)
    for predict in (knn_predictor(5), predict_linear):
        assert np.isin(predict(x[::2], labels[::2], x[1::2]), [0, 1, 2]).all()


def test_balanced_accuracy_is_scikit_learns():
    generator = np.random.default_rng(1)
    labels, predicted = generator.integers(0, 4, 200), generator.integers(0, 4, 200)
    assert balanced_accuracy(labels, predicted) == pytest.approx(balanced_accuracy_score(labels, predicted))
    always_first = np.zeros_like(labels)
    assert balanced_accuracy(labels, always_first) == pytest.approx(0.25)


def test_the_interval_is_the_quantiles_of_resampled_patients():
    generator = np.random.default_rng(2)
    groups = np.repeat(np.arange(12), 5)
    labels = generator.integers(0, 2, 60)
    predicted = np.where(generator.random(60) < 0.7, labels, 1 - labels)
    interval = balanced_accuracy_interval(labels, predicted, groups, resamples=400, seed=5)
    draws, same = [], np.random.default_rng(5)
    for chosen in same.integers(0, 12, size=(400, 12)):
        rows = np.concatenate([np.flatnonzero(groups == group) for group in chosen])
        draws.append(balanced_accuracy_score(labels[rows], predicted[rows]))
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert interval.value == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_cells_of_one_patient_are_no_independent_evidence():
    labels = np.tile([0, 1], 100)
    groups = np.repeat(np.arange(10), 20)
    predicted = np.where(groups < 5, labels, 1 - labels)  # right for half of the patients, wrong for the others
    by_patient = balanced_accuracy_interval(labels, predicted, groups)
    by_cell = balanced_accuracy_interval(labels, predicted, np.arange(200))
    assert by_patient.high - by_patient.low > 3 * (by_cell.high - by_cell.low)


def test_resamples_without_a_type_are_left_out_and_counted():
    labels, groups = np.array([0, 0, 0, 1]), np.arange(4)
    interval = balanced_accuracy_interval(labels, labels, groups, resamples=2000)
    assert interval.dropped == pytest.approx(0.75**4 + 0.25**4, abs=0.03)
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_folds_score_each_query_against_its_bank_only():
    def first_known(bank, labels, queries):
        return np.full(len(queries), labels[0])

    folds = [Fold(np.array([0, 1]), np.array([2])), Fold(np.array([2]), np.array([0, 1]))]
    rows, predicted = predict_folds(np.zeros((3, 1)), np.array([5, 6, 7]), folds, first_known)
    assert rows.tolist() == [2, 0, 1]
    assert predicted.tolist() == [5, 7, 7]


# The command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """Twelve patients with four light and four dark cells each: any encoder tells them apart."""
    folder = tmp_path_factory.mktemp("cells") / "shades"
    write_images(folder / "images", [])
    rows = ["file,cell_type,patient_id"]
    generator = np.random.default_rng(0)
    for number in range(96):
        kind, patient = ("light", "dark")[number % 2], f"P{number // 8}"
        pixels = generator.normal(190 if kind == "light" else 70, 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
        rows.append(f"{number:03d}.png,{kind},{patient}")
    write_table(folder / "cells.csv", "\n".join(rows) + "\n")
    return folder


def options(data, output, **changes) -> ProbeOptions:
    values = {"encoder": "test_vit", "image_size": 32, "resamples": 200, "neighbours": 5, "cpu": True}
    return ProbeOptions(data=str(data), output=str(output), **(values | changes))


def test_the_probe_reports_scores_and_draws_neighbours(shades, tmp_path):
    report = probe(options(shades, tmp_path))
    assert report == json.loads((tmp_path / "probe.json").read_text())
    assert report["cells"] == 96
    assert report["how"] == "5-fold cross-validation over patients"
    for name in ("knn", "linear"):
        assert report["balanced_accuracy"][name]["value"] > 0.95
        assert report["recall"][name].keys() == {"light", "dark"}
    with Image.open(tmp_path / "neighbours.png") as figure:
        assert min(figure.size) > 200
    assert probe(options(shades, tmp_path)) == report


def test_held_out_cells_are_those_the_weights_have_not_seen(shades, tmp_path):
    from lymph_hf.cell_sources import read_cells

    digests = read_cells(shades).digests
    write_json(tmp_path / RECORD, {"digests": sorted(digests[:60])})
    report = probe(options(shades, tmp_path / "out", held_out=str(tmp_path)))
    assert report["cells"] == 36
    assert report["how"].endswith("against the 60 it has")


def test_probes_that_cannot_be_made_are_refused(shades, tmp_path):
    with pytest.raises(ProbeError, match=r"no pretraining.json there.*RUN/encoder"):
        probe(options(shades, tmp_path, held_out=str(tmp_path)))
    write_json(tmp_path / RECORD, {"digests": []})
    with pytest.raises(ProbeError, match="0 cells were seen"):
        probe(options(shades, tmp_path, held_out=str(tmp_path)))
    write_images(tmp_path / "plain", range(12))
    with pytest.raises(ProbeError, match=r"0 cell types.*cells.csv or sub-folders"):
        probe(options(tmp_path / "plain", tmp_path))
