"""Figures and tables of a training run and an evaluation, galleries of cells; the door to those of a cohort."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from PIL import Image

from .metrics import (
    BINARY_SCORES,
    Bootstrap,
    Interval,
    check_predictions,
    confusion,
    decide,
    roc_band,
    roc_points,
)
from .reporting_cohort import cohort_figure
from .reporting_style import (
    COLOURS,
    GREY,
    STYLE,
    common_level,
    figure_file,
    label_rows,
    percent,
    row_label,
    say,
    shown_bins,
    words,
    wrap_name,
)

__all__ = [
    "COLOURS",
    "GREY",
    "STYLE",
    "cohort_figure",
    "evaluation_figure",
    "gallery",
    "history_figure",
    "scores_table",
]

_CAPTION_SCORES = ("balanced_accuracy", "auroc", "brier")


# Training ---------------------------------------------------------------------------------------------------


def history_figure(history: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, title: str = "Training") -> None:
    """Losses, and scores where there are any, over the course of a run, with the best evaluation marked.

    Args:
        history: records in order of time. Each holds the time as `epoch` or else `step` (optimizer steps),
            and any of: values whose name ends in `loss`, drawn in the first panel; `validation_<score>` for a
            score of `metrics`, drawn in the second. Other values are left out. A record may lack a value; a
            missing one is None or NaN.
        path: where to write the picture; the suffix says the format.

    The best record is the first with the highest `validation_auroc`, and among equals the lowest
    `validation_loss`, as in training; where none has an AUROC the loss alone decides. The legend says which.
    Without either none is marked.

    Raises:
        ValueError: no records, records that share neither `step` nor `epoch`, or no loss in any.
    """
    if not history:
        raise ValueError("the history has no records: nothing to draw")
    time = next((key for key in ("epoch", "step") if all(key in record for record in history)), None)
    if time is None:
        raise ValueError("every record of the history must hold `step`, or every record must hold `epoch`")
    names = list(dict.fromkeys(name for record in history for name in record))
    losses = [name for name in names if name.endswith("loss")]
    scores = [name for name in names if name in {f"validation_{score}" for score in BINARY_SCORES}]
    if not losses:
        raise ValueError(f"no record of the history holds a value whose name ends in `loss`, only {names}")
    panels = [("Loss", losses)] + ([("Validation scores", scores)] if scores else [])
    with figure_file(path, 5.5 * len(panels), 4.2) as figure:
        figure.suptitle(f"{title}: {len(history)} validations")
        for ax, (panel, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            ax.set_title(panel)
            _draw_series(ax, history, time, series)


def _draw_series(ax: Axes, history: Sequence[Mapping[str, Any]], time: str, series: Sequence[str]) -> None:
    for number, name in enumerate(series):
        points = [(record[time], record[name]) for record in history if _present(record.get(name))]
        times, values = zip(*points, strict=True) if points else ((), ())
        marker = "o" if len(points) <= 40 else None  # beyond that the markers hide the line
        colour = COLOURS[number % len(COLOURS)]
        ax.plot(times, values, marker=marker, markersize=3.5, color=colour, label=words(name))
    best, monitor = _best_record(history)
    if best is not None:
        label = f"best {time} {best[time]:g} ({words(monitor)})"
        ax.axvline(best[time], color="black", linestyle="--", linewidth=1, label=label)
    ax.grid()
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("optimizer step" if time == "step" else "epoch")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _best_record(history: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any] | None, str]:
    """The best record and the name of the value that says so; (None, "") when none can say."""
    for monitor in ("validation_auroc", "validation_loss"):
        candidates = [record for record in history if _present(record.get(monitor))]
        if candidates:
            return max(candidates, key=_rank), monitor
    return None, ""


def _rank(record: Mapping[str, Any]) -> tuple[float, float]:
    auroc, loss = record.get("validation_auroc"), record.get("validation_loss")
    return auroc if _present(auroc) else -math.inf, -loss if _present(loss) else -math.inf


def _present(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


# Evaluation -------------------------------------------------------------------------------------------------


def evaluation_figure(
    labels: ArrayLike,
    probabilities: ArrayLike,
    path: str | os.PathLike,
    *,
    threshold: float,
    label_names: Sequence[str],
    intervals: Mapping[str, Interval],
    bootstrap: Bootstrap | None = None,
    title: str = "Evaluation",
) -> None:
    """How well patients are told apart: ROC curve, reliability, probabilities by class, confusion matrix.

    Two classes: the ROC curve has a pointwise bootstrap band, and the strip shows the probability of class 1
    against the frozen threshold. More classes: ROC and reliability of each class against the rest, and the
    strip shows the probability of the true class.

    Args:
        labels, probabilities, threshold: as in `metrics`.
        label_names: name of each class, in the order of the labels.
        intervals: what `metrics.bootstrap_intervals` returned for these predictions.
        bootstrap: of the band; None means `Bootstrap()`.
        path: where to write the picture; the suffix says the format.

    Raises:
        ValueError: no patients, label names that do not match the classes, or predictions that `metrics`
        refuses.
    """
    labels, probabilities = check_predictions(labels, probabilities)
    if len(labels) == 0:
        raise ValueError("no patients: nothing to draw")
    matrix = confusion(labels, probabilities, threshold)
    if len(label_names) != len(matrix):
        raise ValueError(f"{len(label_names)} label names for {len(matrix)} classes: {list(label_names)}")
    counts = ", ".join(f"{count} {name}" for count, name in zip(matrix.sum(axis=1), label_names, strict=True))
    curves = _curves(labels, probabilities, label_names)
    with figure_file(path, 10.5, 9.5) as figure:
        axes = figure.subplots(2, 2).ravel()
        figure.suptitle(f"{title}: n = {len(labels)} patients ({counts})")
        figure.supxlabel(_scores_caption(intervals), fontsize=10)
        _draw_roc(axes[0], curves, bootstrap or Bootstrap())
        _draw_reliability(axes[1], curves)
        _draw_strip(axes[2], labels, probabilities, threshold, label_names)
        _draw_confusion(axes[3], matrix, label_names)


def _scores_caption(intervals: Mapping[str, Interval]) -> str:
    shown = {name: intervals[name] for name in _CAPTION_SCORES if name in intervals}
    scores = ";  ".join(f"{words(name)} {interval}" for name, interval in shown.items())
    return scores and f"{scores}  ({percent(common_level(shown))} intervals)"


class _Curve(NamedTuple):
    """One class against the rest."""

    name: str
    colour: str
    positive: np.ndarray  # (n,) 1 = a patient of the class
    probability: np.ndarray  # (n,)


def _curves(labels: np.ndarray, probabilities: np.ndarray, label_names: Sequence[str]) -> list[_Curve]:
    """Class 1 of two classes, or every class of more."""
    classes = [1] if len(label_names) == 2 else range(len(label_names))
    return [
        _Curve(label_names[c], COLOURS[c % len(COLOURS)], (labels == c).astype(int), probabilities[:, c])
        for c in classes
    ]


def _draw_roc(ax: Axes, curves: Sequence[_Curve], bootstrap: Bootstrap) -> None:
    ax.set_title("ROC curve" if len(curves) == 1 else "ROC curves, one versus rest")
    defined = [curve for curve in curves if 0 < curve.positive.sum() < len(curve.positive)]
    if not defined:
        say(ax, "undefined: patients of one class only")
        return
    for curve in defined:
        false_positive, true_positive, _ = roc_points(curve.positive, curve.probability)
        ax.plot(false_positive, true_positive, color=curve.colour, linewidth=1.8, label=wrap_name(curve.name))
    if len(curves) == 1:
        label = f"{percent(bootstrap.level)} bootstrap band"
        band = roc_band(curves[0].positive, curves[0].probability, bootstrap=bootstrap)
        ax.fill_between(*band, color=curves[0].colour, alpha=0.18, linewidth=0, label=label)
    _unit_square(ax)
    ax.set(xlabel="1 - specificity", ylabel="sensitivity")
    ax.legend(loc="lower right")


def _draw_reliability(ax: Axes, curves: Sequence[_Curve]) -> None:
    """One curve with its Wilson intervals, or several without; the ROC panel names their colours."""
    alone = len(curves) == 1
    for curve in curves:
        bins, per_dot = shown_bins(curve.positive, curve.probability)
        predicted, observed = [b.predicted for b in bins], [b.observed for b in bins]
        ax.plot(predicted, observed, color=curve.colour, marker="o", markersize=5)
        if alone:
            ax.vlines(predicted, [b.low for b in bins], [b.high for b in bins], color=curve.colour, linewidth=1)
    _unit_square(ax)
    ax.set_title(f"Reliability, {per_dot}" if alone else "Reliability, one versus rest")
    ax.set_xlabel(f"mean predicted probability of {curves[0].name}" if alone else "mean predicted probability")
    ax.set_ylabel("observed share, 95 % Wilson interval" if alone else "observed share")


def _unit_square(ax: Axes) -> None:
    """Both axes from 0 to 1, with the diagonal: a guess in the ROC panel, calibrated in the other."""
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    ax.grid()
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")


def _draw_strip(
    ax: Axes,
    labels: np.ndarray,
    probabilities: np.ndarray,
    threshold: float,
    label_names: Sequence[str],
) -> None:
    """One dot per patient in a row per true class; patients decided wrongly are crossed."""
    binary = len(label_names) == 2
    shown = probabilities[:, 1] if binary else probabilities[np.arange(len(labels)), labels]
    height = labels + np.random.default_rng(0).uniform(-0.28, 0.28, len(labels))
    right = decide(probabilities, threshold=threshold) == labels
    colours = np.array(COLOURS)[labels % len(COLOURS)]
    ax.scatter(shown[right], height[right], c=colours[right], s=22, alpha=0.7, linewidths=0, label="correct")
    ax.scatter(shown[~right], height[~right], c=colours[~right], s=34, marker="x", label="wrong")
    if binary:
        ax.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.3g}")
    label_rows(ax, [row_label(name, int((labels == c).sum())) for c, name in enumerate(label_names)])
    ax.grid(axis="x")
    ax.set(xlim=(-0.02, 1.02), title="Predicted probability by true class")
    ax.set_xlabel(f"probability of {label_names[1]}" if binary else "probability of the true class")
    legend = ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, columnspacing=1.2, handletextpad=0.4)
    for handle in legend.legend_handles[:2]:
        handle.set_color("#404040")


def _draw_confusion(ax: Axes, matrix: np.ndarray, label_names: Sequence[str]) -> None:
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        text = f"{matrix[row, column]}\n{percent(round(share, 2))}"
        ax.text(column, row, text, ha="center", va="center", color="white" if share > 0.5 else "black")
    ticks, names = range(len(label_names)), [wrap_name(name) for name in label_names]
    ax.set_yticks(ticks, names)
    ax.set_xticks(ticks, names)
    if len(names) > 4:
        ax.tick_params(axis="x", rotation=45)
        for text in ax.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(title="Confusion matrix, share of each row", xlabel="decided", ylabel="true")


def scores_table(intervals: Mapping[str, Interval], *, markdown: bool = False) -> str:
    """The scores and their intervals as a text table with aligned columns, or as a Markdown table.

    Args:
        intervals: what `metrics.bootstrap_intervals` returned; all of one level.

    Raises:
        ValueError: no intervals, or intervals of different levels.
    """
    rows = [("score", "value", f"{percent(common_level(intervals))} interval")]
    rows += [(words(name), *_cells(interval)) for name, interval in intervals.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in padded)
    rule = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])


def _cells(interval: Interval) -> tuple[str, str]:
    value = "undefined" if math.isnan(interval.value) else f"{interval.value:.3f}"
    bounds = "undefined" if math.isnan(interval.low) else f"{interval.low:.3f} to {interval.high:.3f}"
    left_out = f" ({interval.dropped:.1%} of resamples undefined)" if interval.dropped else ""
    return value, bounds + left_out


# Galleries --------------------------------------------------------------------------------------------------


def gallery(
    images: Sequence[Image.Image | None],
    captions: Sequence[str],
    path: str | os.PathLike,
    *,
    columns: int = 8,
    title: str = "",
) -> None:
    """A grid of pictures with a caption under each, row by row.

    Args:
        images: PIL images of any size, each fitted into a square of the grid with its proportions kept; None leaves
            a square empty.
        captions: one per image; wrapped to the width of the square, "" for none.
        path: where to write the picture; the suffix says the format.
        columns: pictures per row, at least 1; fewer pictures make a narrower grid.

    Raises:
        ValueError: no images, captions of another number, columns below 1.
    """
    number = sum(image is not None for image in images)
    if not number or len(images) != len(captions) or columns < 1:
        raise ValueError(
            "a gallery needs at least one image, one caption per image and one column, got"
            f" {number} images, {len(captions)} captions, columns={columns}"
        )
    side, gap, line = 1.4, 0.12, 0.15  # inches
    wrapped = [_caption(caption) for caption in captions]
    lines = max(text.count("\n") + 1 if text else 0 for text in wrapped)
    columns = min(columns, len(images))
    cell_width, cell_height = side + gap, side + gap + line * lines
    heading = textwrap.fill(f"{title}: n = {number}" if title else f"n = {number}", max(12, int(columns * 15)))
    top = 0.15 + 0.22 * (heading.count("\n") + 1)
    width, height = columns * cell_width + gap, math.ceil(len(images) / columns) * cell_height + top
    with figure_file(path, width, height, layout="none") as figure:
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set_axis_off()
        ax.text(gap, gap, heading, va="top", fontsize=12)
        for place, (image, caption) in enumerate(zip(images, wrapped, strict=True)):
            if image is None:
                continue
            row, column = divmod(place, columns)
            x, y = gap + column * cell_width + side / 2, top + row * cell_height + side / 2
            half_width, half_height = (side / 2 * extent / max(image.size) for extent in image.size)
            ax.imshow(
                image.convert("RGB"),
                extent=(x - half_width, x + half_width, y + half_height, y - half_height),
            )
            ax.text(x, y + side / 2 + 0.04, caption, ha="center", va="top", fontsize=8, linespacing=1.1)
        # One unit of the axes is one inch, y downwards.
        ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")


def _caption(text: str) -> str:
    return "\n".join(textwrap.fill(line, 21, break_on_hyphens=False) for line in text.splitlines())
