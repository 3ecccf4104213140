"""Figures appear whole or not at all, say what they leave out, and leave matplotlib as they found it."""

import itertools
from unittest import mock

import matplotlib
import numpy as np
import pandas as pd
import pytest
from figure_cases import remember_saved, texts
from matplotlib._pylab_helpers import Gcf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from lymph_hf import reporting
from lymph_hf.metrics import Bootstrap, Interval, bootstrap_intervals
from lymph_hf.reporting import cohort_figure, evaluation_figure, gallery, history_figure, scores_table


@pytest.fixture
def saved(monkeypatch):
    return remember_saved(monkeypatch)


def panel(figure, title):
    (ax,) = (ax for ax in figure.axes if ax.get_title(loc="left") == title)
    return ax


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "patient_id": [f"P{number}" for number in range(30)],
            "label": ["reactive"] * 10 + ["tumoral"] * 18 + [None] * 2,
            "age": [None, None, None, *rng.uniform(20, 90, 27)],
            "sex": [None, *"FM" * 14, "F"],
            "lymphocyte_count": rng.lognormal(2.5, 1, 30),
            "cells": rng.integers(16, 199, 30),
        }
    )


def overlapping_texts(figure):
    """Pairs of drawn texts whose boxes share more than a sliver."""
    drawn, draw = [], Text.draw

    def record(text, renderer):
        if text.get_visible() and text.get_text().strip():
            drawn.append(text)
        draw(text, renderer)

    with matplotlib.rc_context(reporting.STYLE), mock.patch.object(Text, "draw", record):
        FigureCanvasAgg(figure).draw()
        boxes = {text: text.get_window_extent() for text in drawn}
    return [
        (one.get_text(), other.get_text())
        for (one, a), (other, b) in itertools.combinations(boxes.items(), 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 2 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2
    ]


# Cohort


def test_cohort_figure_counts_patients_cells_and_missing_values(frame, tmp_path, saved):
    cohort_figure(frame, tmp_path / "cohort.png", title="Pilot")
    shown = texts(saved[0])
    assert f"Pilot: n = 30 patients, {frame['cells'].sum():,} cells" in shown
    assert "18 (60%)" in shown
    assert "reactive\nn = 7, 3 missing" in texts(panel(saved[0], "Age"))
    assert "unlabelled\nn = 2" in shown
    assert {"2 of 30", "3 of 30", "1 of 30", "0 of 30"} <= set(texts(panel(saved[0], "Missing values")).split("\n"))
    assert panel(saved[0], "Lymphocyte count").get_xscale() == "log"
    assert overlapping_texts(saved[0]) == []


@pytest.mark.parametrize("remove", [lambda f: f.drop(columns="age"), lambda f: f.assign(age=None)])
def test_absent_covariate_is_shown_as_not_recorded(frame, tmp_path, saved, remove):
    cohort_figure(remove(frame), tmp_path / "cohort.png")
    assert "not recorded" in texts(panel(saved[0], "Age"))
    assert "not recorded" not in texts(panel(saved[0], "Lymphocyte count"))
    assert "30 of 30" in texts(panel(saved[0], "Missing values"))


def test_cohort_without_any_covariate_is_drawn(frame, tmp_path, saved):
    bare = frame[["patient_id", "label", "cells"]].assign(lymphocyte_count=None, label=None)
    cohort_figure(bare, tmp_path / "cohort.png")
    assert texts(saved[0]).count("not recorded") == 3


def test_numeric_labels_keep_numeric_order_and_long_names_do_not_overlap(frame, tmp_path, saved):
    names = ["10", "2", "myelodysplastic syndrome with isolated del(5q)"]
    cohort_figure(frame.assign(label=names * 10), tmp_path / "cohort.png")
    rows = [tick.get_text() for tick in panel(saved[0], "Patients per label").get_yticklabels()]
    assert rows[:2] == ["2", "10"]
    assert overlapping_texts(saved[0]) == []


def test_cohort_errors_name_what_is_wrong(frame, tmp_path):
    with pytest.raises(ValueError, match=r"no column \['cells'\]"):
        cohort_figure(frame.drop(columns="cells"), tmp_path / "cohort.png")
    with pytest.raises(ValueError, match="no patients"):
        cohort_figure(frame.iloc[:0], tmp_path / "cohort.png")
    frame.loc[4, "lymphocyte_count"] = 0
    with pytest.raises(ValueError, match="patient P4: lymphocyte_count must be positive, got 0"):
        cohort_figure(frame, tmp_path / "cohort.png")
    assert list(tmp_path.iterdir()) == []


# Training


def test_history_marks_the_best_auroc_and_skips_missing_values(tmp_path, saved):
    auroc = [0.6, None, 0.9, 0.8]
    history = [
        {"epoch": e + 1, "train_loss": 1 / (e + 1), "validation_auroc": auroc[e], "validation_loss": float(e)}
        for e in range(4)
    ]
    history_figure(history, tmp_path / "history.png")
    assert "best epoch 3 (validation AUROC)" in texts(saved[0])
    (curve, best) = panel(saved[0], "Validation scores").lines
    np.testing.assert_array_equal(curve.get_xydata(), [[1, 0.6], [3, 0.9], [4, 0.8]])
    assert best.get_xdata() == [3, 3]
    assert {line.get_label() for line in panel(saved[0], "Loss").lines[:2]} == {
        "train loss",
        "validation loss",
    }


def test_history_breaks_ties_of_the_auroc_by_the_loss_as_training_does(tmp_path, saved):
    rows = [(0.9, 0.5), (0.9, 0.3), (0.9, 0.3), (0.8, 0.1)]
    history = [
        {"epoch": e + 1, "step": 7 * e, "validation_auroc": auroc, "validation_loss": loss, "validation_n": 33.0}
        for e, (auroc, loss) in enumerate(rows)
    ]
    history_figure(history, tmp_path / "history.png")
    assert "best epoch 2 (validation AUROC)" in texts(saved[0])
    assert len(panel(saved[0], "Validation scores").lines) == 2, "the number of patients is no score"


def test_history_falls_back_to_the_validation_loss(tmp_path, saved):
    history = [{"step": 10 * e, "validation_loss": loss} for e, loss in enumerate([3.0, 1.0, 2.0])]
    history_figure(history, tmp_path / "history.png")
    assert "best step 10 (validation loss)" in texts(saved[0])
    assert len(saved[0].axes) == 1


def test_history_of_a_loss_alone_marks_nothing(tmp_path, saved):
    history_figure([{"step": s, "loss": 1.0 / s, "learning_rate": 1.0} for s in range(1, 99)], tmp_path / "h.png")
    assert "best" not in texts(saved[0])
    assert len(saved[0].axes[0].lines) == 1


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "no records"),
        ([{"epoch": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}], "must hold `step`"),
        ([{"epoch": 1, "validation_auroc": 0.5}], r"ends in `loss`, only \['epoch', 'validation_auroc'\]"),
    ],
)
def test_history_errors_say_what_is_missing(history, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        history_figure(history, tmp_path / "history.png")


# Evaluation


def predictions(classes, n=60):
    rng = np.random.default_rng(1)
    labels = np.arange(n) % classes
    probabilities = rng.dirichlet(np.ones(classes), n) + 0.3 * np.eye(classes)[labels]
    return labels, probabilities / probabilities.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_evaluation_figure_shows_counts_scores_and_threshold(classes, tmp_path, saved):
    labels, probabilities = predictions(classes)
    names = [f"class {c}" for c in range(classes)]
    intervals = bootstrap_intervals(labels, probabilities, threshold=0.4, resamples=50)
    evaluation_figure(labels, probabilities, tmp_path / "e.png", threshold=0.4, label_names=names, intervals=intervals)
    shown = texts(saved[0])
    assert f"n = 60 patients ({60 // classes} class 0" in shown
    assert f"AUROC {intervals['auroc']}" in shown
    assert "95 % intervals" in shown
    assert ("threshold 0.4" in shown) == ("bootstrap band" in shown) == (classes == 2)
    cells = panel(saved[0], "Confusion matrix, share of each row").texts
    assert sum(int(text.get_text().split("\n")[0]) for text in cells) == 60
    assert overlapping_texts(saved[0]) == []


def test_the_band_is_of_the_bootstrap_that_was_asked_for(tmp_path, saved):
    labels, probabilities = predictions(2)
    intervals = bootstrap_intervals(labels, probabilities, resamples=20)
    options = {"threshold": 0.5, "label_names": ["a", "b"], "intervals": intervals}
    for bootstrap in (Bootstrap(1), Bootstrap(200)):
        evaluation_figure(labels, probabilities, tmp_path / "e.png", bootstrap=bootstrap, **options)
    heights = []
    for figure in saved:
        band = panel(figure, "ROC curve").collections[0].get_paths()[0].vertices
        heights.append(np.ptp(band[np.abs(band[:, 0] - 0.3) < 1e-6, 1]))
    assert heights[0] == 0 < heights[1], "one resample has no width"
    assert "Reliability, 6 patients per dot" in texts(saved[0])


def test_both_forms_of_two_class_probabilities_draw_the_same(tmp_path):
    labels, probabilities = predictions(2)
    intervals = bootstrap_intervals(labels, probabilities, resamples=20)
    options = {"threshold": 0.5, "label_names": ["reactive", "tumoral"], "intervals": intervals}
    evaluation_figure(labels, probabilities[:, 1], tmp_path / "one.png", **options)
    both = np.stack([1 - probabilities[:, 1], probabilities[:, 1]], axis=1)
    evaluation_figure(labels, both, tmp_path / "two.png", **options)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_evaluation_of_one_class_says_that_the_roc_is_undefined(tmp_path, saved):
    labels, probabilities = [1, 1, 1], [0.2, 0.6, 0.9]
    intervals = bootstrap_intervals(labels, probabilities, resamples=20)
    names = ["reactive", "tumoral"]
    evaluation_figure(labels, probabilities, tmp_path / "e.png", threshold=0.5, label_names=names, intervals=intervals)
    assert "undefined: patients of one class only" in texts(panel(saved[0], "ROC curve"))
    assert "AUROC undefined" in texts(saved[0])


def test_evaluation_errors_say_what_is_wrong(tmp_path):
    options = {"threshold": 0.5, "intervals": {}}
    with pytest.raises(ValueError, match="no patients"):
        evaluation_figure([], [], tmp_path / "e.png", label_names=["a", "b"], **options)
    with pytest.raises(ValueError, match="3 label names for 2 classes"):
        evaluation_figure([0, 1], [0.1, 0.9], tmp_path / "e.png", label_names=["a", "b", "c"], **options)


def test_scores_table_is_aligned():
    intervals = {
        "balanced_accuracy": Interval(0.9, 0.8, 0.95),
        "auroc": Interval(0.97, 0.9, 1.0, dropped=0.25),
        "specificity": Interval(float("nan"), float("nan"), float("nan"), dropped=1.0),
    }
    assert scores_table(intervals).split("\n") == [
        "score              value      95 % interval",
        "balanced accuracy  0.900      0.800 to 0.950",
        "AUROC              0.970      0.900 to 1.000 (25.0% of resamples undefined)",
        "specificity        undefined  undefined (100.0% of resamples undefined)",
    ]
    markdown = scores_table(intervals, markdown=True).split("\n")
    assert len({len(line) for line in markdown}) == 1
    assert [cell.strip() for cell in markdown[2].strip("|").split("|")] == [
        "balanced accuracy",
        "0.900",
        "0.800 to 0.950",
    ]
    assert set(markdown[1]) == {"|", "-", " "}


@pytest.mark.parametrize("levels", [[], [0.9, 0.95]])
def test_scores_table_needs_one_level(levels):
    intervals = {str(level): Interval(0.5, 0.4, 0.6, level=level) for level in levels}
    with pytest.raises(ValueError, match="intervals of one level, got"):
        scores_table(intervals)


# Galleries


def coloured(colour, size=(32, 32)):
    return Image.new("RGB", size, colour)


def test_gallery_places_pictures_row_by_row(tmp_path):
    gallery([coloured("red"), coloured("lime"), coloured("blue")], ["", "", ""], tmp_path / "g.png", columns=2)
    pixels = np.asarray(Image.open(tmp_path / "g.png").convert("RGB")).astype(int)
    centres = []
    for channel in range(3):
        pure = (pixels[..., channel] == 255) & (pixels.sum(axis=2) == 255)
        centres.append(np.argwhere(pure).mean(axis=0))
    (red, green, blue) = centres
    assert red[0] == pytest.approx(green[0], abs=1)
    assert red[1] == pytest.approx(blue[1], abs=1)
    assert green[1] > red[1] + 150
    assert blue[0] > red[0] + 150


def test_gallery_keeps_proportions_and_captions(tmp_path, saved):
    images = [coloured("red", (20, 80)), Image.new("L", (64, 64)), Image.new("RGBA", (64, 64))]
    captions = ["a caption of many words that must be wrapped", "first line\nsecond", "costs $5 or $6"]
    gallery(images, captions, tmp_path / "g.png", title="Batch")
    left, right, bottom, top = saved[0].axes[0].images[0].get_extent()
    assert (bottom - top) / (right - left) == pytest.approx(4)
    shown = texts(saved[0])
    assert "Batch: n = 3" in shown
    assert "first line\nsecond" in shown
    assert overlapping_texts(saved[0]) == []


def test_gallery_leaves_a_square_empty(tmp_path, saved):
    gallery([coloured("red"), None, coloured("blue")], ["a", "", "b"], tmp_path / "g.png", columns=2)
    first, second = (image.get_extent() for image in saved[0].axes[0].images)
    assert first[0] == second[0] and first[2] < second[2], "the second is below the first"
    assert "n = 2" in texts(saved[0])


@pytest.mark.parametrize(("images", "captions", "columns"), [(0, 0, 8), (2, 1, 8), (1, 1, 0)])
def test_gallery_errors_give_the_numbers(images, captions, columns, tmp_path):
    with pytest.raises(ValueError, match=f"got {images} images, {captions} captions, columns={columns}"):
        gallery([coloured("red")] * images, ["x"] * captions, tmp_path / "g.png", columns=columns)


# All figures


def test_figures_are_readable_pictures_at_150_dpi(tmp_path):
    gallery([coloured("red")], ["x"], tmp_path / "g.png")
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
    history_figure([{"epoch": 1, "loss": 1.0}], tmp_path / "h.svg")
    assert "<svg" in (tmp_path / "h.svg").read_text()


def test_a_failed_save_keeps_the_old_figure_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "g.png"
    gallery([coloured("red")], ["x"], path)
    before = path.read_bytes()

    def half_written(figure, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half_written)
    with pytest.raises(OSError, match="disk full"):
        gallery([coloured("blue")], ["x"], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_figures_leave_the_settings_of_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    gallery([coloured("red")], ["x"], tmp_path / "g.png")
    assert dict(matplotlib.rcParams) == before
    assert reporting.STYLE["text.parse_math"] != before["text.parse_math"]


def test_figures_leave_no_pyplot_state(tmp_path):
    gallery([coloured("red")], ["x"], tmp_path / "g.png")
    history_figure([{"epoch": 1, "loss": 1.0}], tmp_path / "h.png")
    assert Gcf.get_all_fig_managers() == []
