"""Figures that say whether a model may be used: decision curve, calibration, subgroups, learning curve."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import ArrayLike
from sklearn.metrics import precision_recall_curve

from .metrics import Bootstrap, Interval, precision_recall_band, roc_band, roc_points, score
from .metrics_calibration import calibration_intervals
from .metrics_decision import DecisionCurve
from .metrics_subgroups import LearningPoint, Subgroup
from .reporting_style import COLOURS, DASH_COLOURS, DASHES, GREY, common_level, figure_file, percent, shown_bins, words

_FEW = 5  # patients of a class


def decision_curve_figure(
    curves: Mapping[str, DecisionCurve],
    path: str | os.PathLike,
    *,
    threshold: float | None = None,
    title: str = "Decision curve",
) -> None:
    """Net benefit of one or more models against sending on everybody and nobody, the first with a bootstrap band.

    Args:
        curves: name -> curve; all on the same patients, or at the same stated prevalence.
        path: where to write the picture; the suffix says the format.
        threshold: a frozen decision threshold to mark; None marks none.

    Raises:
        ValueError: no curves, or curves of different prevalences.
    """
    prevalences = {round(curve.prevalence, 9) for curve in curves.values()}
    if len(prevalences) != 1:
        raise ValueError(f"expected curves at one prevalence, got {sorted(prevalences) or 'no curves'}")
    with figure_file(path, 7, 4.8) as figure:
        ax = figure.subplots()
        first = next(iter(curves.values()))
        values = [interval.value for interval in first.treat_all]
        ax.plot(first.thresholds, values, color=GREY, linewidth=1.2, label="send on everybody")
        ax.axhline(0, color="black", linewidth=1, label="send on nobody")
        _draw_band(ax, first.thresholds, first.model, COLOURS[0], next(iter(curves)))
        for number, (name, curve) in list(enumerate(curves.items()))[1:]:
            benefits = [interval.value for interval in curve.model]
            ax.plot(curve.thresholds, benefits, label=name, **_style(number))
        if threshold is not None:
            label = f"frozen threshold {threshold:.3g}"
            ax.axvline(threshold, color="black", linestyle="--", linewidth=1, label=label)
        highest = max(prevalences.pop(), 0.01)
        # Everybody's benefit falls without bound; a fifth of the scale below zero is enough to see it cross.
        top = max(1.15 * highest, *(1.02 * interval.high for interval in first.model if interval.high <= 1))
        ax.set(xlim=(0, 1), ylim=(-0.25 * highest, top))
        ax.grid()
        ax.set_xlabel("threshold probability")
        ax.set_ylabel("net benefit per patient")
        level = common_level({str(number): interval for number, interval in enumerate(first.model)})
        ax.set_title(f"{title}: prevalence {percent(round(first.prevalence, 2))}, {percent(level)} band")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def curves_figure(
    labels: ArrayLike,
    predictions: Mapping[str, ArrayLike],
    path: str | os.PathLike,
    *,
    positive: str = "class 1",
    bootstrap: Bootstrap | None = None,
) -> None:
    """ROC and precision-recall curves of one or more models on the same patients, the first with bootstrap bands.

    Args:
        labels: (n,), 1 = positive; both classes.
        predictions: name -> probabilities of class 1, (n,) or (n, 2).
        path: where to write the picture; the suffix says the format.
        positive: name of class 1.
        bootstrap: of the bands; None means `Bootstrap()`.

    Raises:
        ValueError: no predictions, not two classes, patients of one class only.
    """
    if not predictions:
        raise ValueError("no predictions: nothing to draw")
    labels, bootstrap = np.asarray(labels), bootstrap or Bootstrap()
    of_positive = {name: np.asarray(p, dtype=float).reshape(len(labels), -1)[:, -1] for name, p in predictions.items()}
    first = next(iter(of_positive.values()))
    with figure_file(path, 10, 5.4) as figure:
        panels = figure.subplots(1, 2)
        figure.suptitle(f"n = {len(labels)} patients ({int(labels.sum())} {positive})")
        bands = (roc_band, precision_recall_band)
        for ax, band in zip(panels, bands, strict=True):
            x, low, high = band(labels, first, bootstrap=bootstrap)
            ax.fill_between(
                x, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, step=None if ax is panels[0] else "pre"
            )
        for number, (name, probabilities) in enumerate(of_positive.items()):
            scores = score(labels, probabilities)
            false_positive, true_positive, _ = roc_points(labels, probabilities)
            style = _style(number)
            panels[0].plot(false_positive, true_positive, label=f"{name}, AUROC {scores['auroc']:.3f}", **style)
            precision, recall, _ = precision_recall_curve(labels, probabilities)
            label = f"{name}, AUPRC {scores['auprc']:.3f}"
            panels[1].step(recall, precision, where="post", label=label, **style)
        share, band = float(labels.mean()), f"{percent(bootstrap.level)} band"
        panels[0].plot([0, 1], [0, 1], color=GREY, linewidth=1, label="chance")
        panels[1].axhline(share, color=GREY, linewidth=1, label=f"chance: {percent(round(share, 2))} {positive}")
        panels[0].set(xlabel="1 - specificity", ylabel="sensitivity", title=f"ROC, {band}")
        panels[1].set(xlabel="sensitivity (recall)", ylabel="PPV (precision)", title=f"Precision and recall, {band}")
        for ax in panels:
            ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.03), aspect="equal")
            ax.grid()
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _style(number: int) -> dict[str, Any]:
    """The first curve is solid; the others are dashed and above it."""
    if number == 0:
        return {"color": COLOURS[0], "linewidth": 2}
    look = (number - 1) % len(DASHES)
    return {"color": DASH_COLOURS[look], "linewidth": 1.3, "linestyle": DASHES[look], "zorder": 4}


def _draw_band(ax: Axes, x: Sequence[float], intervals: Sequence[Interval], colour: str, name: str) -> None:
    values, low, high = (np.array([getattr(i, part) for i in intervals]) for part in ("value", "low", "high"))
    ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    ax.plot(x, values, color=colour, linewidth=1.8, label=name, zorder=3)


def calibration_figure(
    labels: ArrayLike,
    predictions: Mapping[str, ArrayLike],
    path: str | os.PathLike,
    *,
    title: str = "Calibration",
    positive: str = "class 1",
    bootstrap: Bootstrap | None = None,
) -> None:
    """Reliability of one or more sets of probabilities of the same patients, such as before and after scaling.

    The upper panel shows observed against predicted frequency in bins of equally many patients, with Wilson
    intervals, and in its legend the slope and intercept; the lower one how the probabilities are spread.

    Args:
        labels: (n,), 1 = positive.
        predictions: name -> probabilities of class 1, (n,) or (n, 2).
        path: where to write the picture; the suffix says the format.
        positive: name of class 1.
        bootstrap: of slope and intercept; None means `Bootstrap()`.

    Raises:
        ValueError: no predictions, no patients, or more than two classes.
    """
    labels = np.asarray(labels)
    if not predictions or len(labels) == 0:
        raise ValueError(f"nothing to draw: {len(predictions)} predictions of {len(labels)} patients")
    with figure_file(path, 6.4, 8.2) as figure:
        upper, lower = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        upper.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1, label="calibrated")
        for number, (name, probabilities) in enumerate(predictions.items()):
            colour, marker = COLOURS[number], "osD^v"[number % 5]
            bins, per_dot = shown_bins(labels, probabilities)
            predicted = [b.predicted for b in bins]
            upper.vlines(predicted, [b.low for b in bins], [b.high for b in bins], color=colour, linewidth=1, alpha=0.6)
            upper.plot(
                predicted,
                [b.observed for b in bins],
                color=colour,
                marker=marker,
                markersize=5,
                label=f"{name}, {per_dot}\n{_calibration_caption(labels, probabilities, bootstrap)}",
            )
            of_positive = np.asarray(probabilities, dtype=float)
            of_positive = of_positive[:, 1] if of_positive.ndim == 2 else of_positive
            lower.hist(of_positive, bins=np.linspace(0, 1, 41), histtype="step", color=colour, linewidth=1.4)
        upper.grid()
        upper.set(ylim=(-0.02, 1.02), ylabel=f"observed share of {positive}, 95 % Wilson interval")
        upper.set_title(f"{title}: n = {len(labels)} patients, {int(labels.sum())} {positive}")
        figure.legend(loc="outside lower center", ncols=2)  # where no interval can lie under it
        lower.set(xlim=(-0.02, 1.02), xlabel=f"predicted probability of {positive}", ylabel="patients")


def _calibration_caption(labels: np.ndarray, probabilities: ArrayLike, bootstrap: Bootstrap | None) -> str:
    found = calibration_intervals(labels, probabilities, bootstrap=bootstrap)
    return f"slope {found['calibration_slope']}\nintercept {found['calibration_intercept']}"


def subgroup_figure(
    subgroups: Sequence[Subgroup],
    path: str | os.PathLike,
    *,
    score: str = "auroc",
    positive: str = "positive",
    overall: Interval | None = None,
    title: str = "Subgroups",
) -> None:
    """Forest plot: a score with its interval in every subgroup, with the number of patients behind it.

    Groups with fewer than five patients of either class are hollow: nothing may be read from their intervals, which
    have no width where no resample holds an error.

    Args:
        subgroups: what `metrics_subgroups.subgroup_scores` returned.
        path: where to write the picture; the suffix says the format.
        score: a name in the scores of every subgroup.
        positive: name of class 1.
        overall: the score of all patients, drawn as a line and a band.

    Raises:
        ValueError: no subgroups.
        KeyError: a subgroup without that score.
    """
    if not subgroups:
        raise ValueError("no subgroups: nothing to draw")
    rows: list[Subgroup | str] = []
    for group in subgroups:
        if group.variable not in rows:
            rows.append(group.variable)
        rows.append(group)
    with figure_file(path, 8.5, 1.6 + 0.32 * len(rows)) as figure:
        ax = figure.subplots()
        if overall is not None:
            ax.axvspan(overall.low, overall.high, color=GREY, alpha=0.2, linewidth=0)
            ax.axvline(overall.value, color=GREY, linewidth=1)
        for height, row in enumerate(rows):
            if isinstance(row, Subgroup):
                _draw_subgroup(ax, height, row, row.scores[score], row.n / max(group.n for group in subgroups))
        ax.set_yticks(range(len(rows)), [_forest_label(row, positive) for row in rows])
        for text, row in zip(ax.get_yticklabels(), rows, strict=True):
            text.set_fontweight("bold" if isinstance(row, str) else "normal")
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
        ax.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5))
        level = common_level({str(n): group.scores[score] for n, group in enumerate(subgroups)})
        everybody = "" if overall is None else f"grey: all patients, {overall}; "
        few = f"hollow: fewer than {_FEW} patients of a class"
        ax.set_xlabel(f"{words(score)}, {percent(level)} interval\n{everybody}{few}")
        ax.set_title(title)


def _forest_label(row: Subgroup | str, positive: str) -> str:
    return row if isinstance(row, str) else f"{row.group} (n = {row.n}, {row.positives} {positive})"


def _draw_subgroup(ax: Axes, height: int, group: Subgroup, interval: Interval, share: float) -> None:
    if math.isnan(interval.value):
        ax.text(0.02, height, "undefined: patients of one class only", va="center", fontsize=8, color="#595959")
    else:
        ax.plot([interval.low, interval.high], [height, height], color=COLOURS[0], linewidth=1.4)
        face = "white" if min(group.positives, group.n - group.positives) < _FEW else COLOURS[0]
        # The area of the marker is the share of patients.
        look = {"marker": "s", "edgecolors": COLOURS[0], "facecolors": face, "zorder": 3}
        ax.scatter(interval.value, height, s=15 + 90 * share, **look)
    ax.text(1.03, height, str(interval), va="center", fontsize=8.5, transform=ax.get_yaxis_transform())


def learning_curve_figure(
    curves: Mapping[str, Sequence[LearningPoint]],
    path: str | os.PathLike,
    *,
    score: str = "auroc",
    title: str = "Learning curve",
) -> None:
    """A score against the number of training patients: mean, bootstrap band, and the range over repetitions.

    Args:
        curves: name of the model -> what `metrics_subgroups.learning_curve` returned.
        path: where to write the picture; the suffix says the format.
        score: name of the score, for the axis.

    Raises:
        ValueError: no curves, or one without points.
    """
    if not curves or not all(curves.values()):
        raise ValueError(
            f"expected at least one point for each curve, got { ({k: len(v) for k, v in curves.items()}) }"
        )
    with figure_file(path, 7, 4.8) as figure:
        ax = figure.subplots()
        for number, (name, points) in enumerate(curves.items()):
            sizes = [point.patients for point in points]
            _draw_band(ax, sizes, [point.score for point in points], COLOURS[number], name)
            lowest, highest = [point.lowest for point in points], [point.highest for point in points]
            ax.vlines(sizes, lowest, highest, color=COLOURS[number], linewidth=1)
        sizes = sorted({point.patients for points in curves.values() for point in points})
        ax.set_xscale("log")
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        ax.grid()
        level = common_level({str(n): point.score for points in curves.values() for n, point in enumerate(points)})
        ax.set(xlabel="training patients, log scale; bars: range over repetitions", ylabel=words(score))
        ax.set_title(f"{title}: {percent(level)} bands over the scored patients")
        ax.legend(loc="lower right")
