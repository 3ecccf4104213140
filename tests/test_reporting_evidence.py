"""The figures of the evidence show the numbers that they were given, and say what is undefined."""

import numpy as np
import pytest
from figure_cases import remember_saved, texts
from prediction_cases import binary_cohort

from lymph_hf.metrics import Bootstrap, Interval, bootstrap_intervals
from lymph_hf.metrics_decision import decision_curve
from lymph_hf.metrics_subgroups import LearningPoint, Subgroup, clinical_groups, subgroup_scores
from lymph_hf.reporting_evidence import (
    calibration_figure,
    curves_figure,
    decision_curve_figure,
    learning_curve_figure,
    subgroup_figure,
)

QUICK = Bootstrap(resamples=30)


@pytest.fixture
def saved(monkeypatch):
    return remember_saved(monkeypatch)


def test_decision_curve_draws_every_model_and_both_simple_rules(tmp_path, saved):
    labels, first = binary_cohort(60, seed=0)
    curves = {"image model": decision_curve(labels, first, bootstrap=QUICK)}
    curves["clinical model"] = decision_curve(labels, first**2, bootstrap=QUICK)
    decision_curve_figure(curves, tmp_path / "d.png", threshold=0.4)
    (ax,) = saved[0].axes
    drawn = {line.get_label(): line for line in ax.lines}
    assert set(drawn) == {"send on everybody", "send on nobody", *curves, "frozen threshold 0.4"}
    for name, curve in curves.items():
        np.testing.assert_allclose(drawn[name].get_ydata(), [point.value for point in curve.model])
    assert "prevalence 67 %, 95 % band" in texts(saved[0])
    assert ax.get_ylim()[1] > max(point.high for point in curves["image model"].model), "the band is not cut off"
    other = decision_curve(labels, first, prevalence=0.2, bootstrap=QUICK)
    for bad in ({}, curves | {"elsewhere": other}):
        with pytest.raises(ValueError, match="expected curves at one prevalence"):
            decision_curve_figure(bad, tmp_path / "d.png")


def test_a_curve_along_another_is_seen(tmp_path, saved):
    """The blend of a model with nothing is that model: both have to be there."""
    labels, probabilities = binary_cohort(40, seed=3)
    same = {"network": probabilities, "blend": probabilities, "clinical alone": probabilities}
    curves_figure(labels, same, tmp_path / "c.png", positive="tumoral", bootstrap=QUICK)
    decision_curve_figure({n: decision_curve(labels, p, bootstrap=QUICK) for n, p in same.items()}, tmp_path / "d.png")
    assert f"n = 40 patients ({labels.sum()} tumoral)" in texts(saved[0])
    for ax in (*saved[0].axes, *saved[1].axes):
        under, *above = (next(x for x in ax.lines if x.get_label().startswith(name)) for name in same)
        assert under.get_linestyle() == "-"
        assert len({line.get_color() for line in (under, *above)}) == 3
        for line in above:
            assert line.get_linestyle() == "--" and line.get_linewidth() < under.get_linewidth()
            assert line.get_zorder() > under.get_zorder()


def test_bands_are_those_of_the_bootstrap_that_was_asked_for(tmp_path, saved):
    labels, probabilities = binary_cohort(40, seed=3)
    for bootstrap in (Bootstrap(1), Bootstrap(200), Bootstrap(200, level=0.5)):
        curves_figure(labels, {"network": probabilities}, tmp_path / "c.png", bootstrap=bootstrap)
    heights = []
    for figure, level in zip(saved, ("95 %", "95 %", "50 %"), strict=True):
        band = figure.axes[0].collections[0].get_paths()[0].vertices
        heights.append(np.ptp(band[np.abs(band[:, 0] - 0.3) < 1e-6, 1]))
        assert f"ROC, {level} band" in texts(figure)
    assert heights[0] == 0 and heights[1] > heights[2] > 0, "one resample has no width, half of the patients less"


def test_calibration_shows_slope_and_intercept_of_each_model(tmp_path, saved):
    labels, before = binary_cohort(60, seed=1)
    after = np.stack([1 - before**2, before**2], axis=1)
    calibration_figure(labels, {"before": before, "after": after}, tmp_path / "c.svg", positive="tumoral")
    shown = texts(saved[0])
    assert shown.count("slope") == shown.count("intercept") == 2
    assert "n = 60 patients, 40 tumoral" in shown
    assert "before, 6 patients per dot\n" in shown
    assert "<svg" in (tmp_path / "c.svg").read_text()
    for bad in (({}, labels), ({"a": []}, [])):
        with pytest.raises(ValueError, match="nothing to draw"):
            calibration_figure(bad[1], bad[0], tmp_path / "c.png")


def test_forest_plot_has_a_row_for_every_group_with_its_n(tmp_path, saved):
    rng = np.random.default_rng(0)
    labels, probabilities = binary_cohort(60, seed=2)
    groups = clinical_groups(rng.uniform(20, 90, 60), rng.choice(["F", "M"], 60).tolist(), rng.lognormal(2, 1, 60))
    rows = subgroup_scores(labels, probabilities, groups, bootstrap=QUICK)
    nan = Interval(float("nan"), float("nan"), float("nan"))
    rows.append(Subgroup("centre", "B", 4, 4, {"auroc": nan}))
    rows.append(Subgroup("centre", "C", 30, 1, {"auroc": Interval(1, 1, 1)}))
    overall = bootstrap_intervals(labels, probabilities, resamples=30)["auroc"]
    subgroup_figure(rows, tmp_path / "s.png", positive="tumoral", overall=overall)
    shown = texts(saved[0])
    for row in rows:
        assert f"{row.group} (n = {row.n}, {row.positives} tumoral)" in shown
        assert str(row.scores["auroc"]) in shown
    assert "hollow: fewer than 5 patients of a class" in shown
    drawn = [row for row in rows if not np.isnan(row.scores["auroc"].value)]
    few = [min(row.positives, row.n - row.positives) < 5 for row in drawn]
    assert True in few and False in few
    left, right = saved[0].axes[0].get_xlim()
    for row, hollow, marker in zip(drawn, few, saved[0].axes[0].collections, strict=True):
        assert (marker.get_facecolor().min() == 1) == hollow
        assert left < row.scores["auroc"].value < right, "a marker at 1 is not cut in half"
    assert "undefined: patients of one class only" in shown
    assert f"all patients, {overall}" in shown
    assert [shown.count(f"\n{variable}\n") for variable in ("age", "sex", "lymphocyte count", "centre")] == [1] * 4
    with pytest.raises(ValueError, match="no subgroups"):
        subgroup_figure([], tmp_path / "s.png")


def test_learning_curve_shows_mean_and_range(tmp_path, saved):
    points = [LearningPoint(n, Interval(0.6 + n / 500, 0.5, 0.9), 0.55, 0.8) for n in (10, 30, 90)]
    learning_curve_figure({"clinical": points}, tmp_path / "l.png")
    (ax,) = saved[0].axes
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[10, 0.62], [30, 0.66], [90, 0.78]])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["10", "30", "90"]
    assert ax.get_ylabel() == "AUROC"
    for bad in ({}, {"clinical": []}):
        with pytest.raises(ValueError, match="at least one point for each curve"):
            learning_curve_figure(bad, tmp_path / "l.png")
