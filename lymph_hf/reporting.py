"""Figures and tables of a cohort, a training run and an evaluation.

Figures are drawn on `matplotlib.figure.Figure` objects, never through pyplot, so that they need no display
and leave no state behind; a figure appears under its name only when it is complete. One style serves all of
them: the colours of Okabe and Ito, which people with any common colour-vision deficiency can tell apart.
"""

import contextlib
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike
from PIL import Image

from .files import writing_file
from .metrics import (
    BINARY_SCORES,
    Interval,
    check_predictions,
    confusion,
    decide,
    reliability_bins,
    roc_band,
    roc_points,
)

GREY = "#8c8c8c"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
UNLABELLED = "unlabelled"

STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.titlesize": 13,
    "figure.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.12,
    "savefig.dpi": 150,
    # A "$" in the name of a label or a patient is a dollar, not the start of a formula.
    "text.parse_math": False,
}

_SCORE_NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "brier": "Brier score",
}
_CAPTION_SCORES = ("balanced_accuracy", "auroc", "brier")


@contextlib.contextmanager
def _figure(path: str | os.PathLike, width: float, height: float, layout: str = "constrained") -> Iterator[Figure]:
    """A figure of width x height inches in the common style, saved when the block ends without error."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        with writing_file(path) as beside:
            figure.savefig(beside)


# Cohort -----------------------------------------------------------------------------------------------------


def cohort_figure(frame: pd.DataFrame, path: str | os.PathLike, *, title: str = "Cohort") -> None:
    """Who is in a cohort: labels, cells per patient, age, lymphocyte count, sex, and what is missing.

    Args:
        frame: one row per patient with the columns `label` (a name; missing = unlabelled) and `cells` (number
            of images), and where recorded `age` (years), `sex` ("F" or "M") and `lymphocyte_count` (10^9
            cells per litre). A covariate whose column is absent or empty is shown as not recorded.
        path: where to write the picture; the suffix says the format (.png, .pdf, .svg).

    Raises:
        ValueError: no patients, a column `label` or `cells` is absent, or a lymphocyte count is not positive.
    """
    absent = {"label", "cells"} - set(frame.columns)
    if absent:
        raise ValueError(f"the cohort table has no column {sorted(absent)}, only {list(frame.columns)}")
    if frame.empty:
        raise ValueError("the cohort table has no patients: nothing to draw")
    _check_counts(frame)
    groups = _by_label(frame)
    # Two rows of panels, each with room for two lines of text per label.
    with _figure(path, 12.5, max(7.5, 2 * (1.3 + 0.6 * len(groups)))) as figure:
        axes = figure.subplots(2, 3).ravel()
        figure.suptitle(f"{title}: n = {len(frame):,} patients, {int(frame['cells'].sum()):,} cells")
        _draw_label_counts(axes[0], groups)
        _draw_cells_per_patient(axes[1], groups)
        _draw_covariate(axes[2], groups, "age", "Age", "years")
        _draw_covariate(axes[3], groups, "lymphocyte_count", "Lymphocyte count", "10⁹ cells per litre, log scale")
        _draw_sex(axes[4], groups)
        _draw_missing(axes[5], frame)


def _check_counts(frame: pd.DataFrame) -> None:
    """A log axis would leave out a count that is not positive without a word."""
    counts = pd.to_numeric(frame["lymphocyte_count"]) if "lymphocyte_count" in frame else pd.Series(dtype=float)
    for row in counts.index[counts <= 0]:
        patient = frame.loc[row].get("patient_id", row)
        raise ValueError(
            f"patient {patient}: lymphocyte_count must be positive, got {counts[row]}; correct it or leave it empty"
        )


def _by_label(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The patients of each label, numeric labels in numeric order, unlabelled patients last."""
    labels = frame["label"].astype("string")
    names = sorted(labels.dropna().unique(), key=lambda name: (float(name) if name.isdecimal() else math.inf, name))
    groups = {name: frame[(labels == name).fillna(False)] for name in names}
    if labels.isna().any():
        groups[UNLABELLED] = frame[labels.isna()]
    return groups


def _palette(groups: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """One colour per label, grey for unlabelled patients."""
    return {name: GREY if name == UNLABELLED else COLOURS[number % len(COLOURS)] for number, name in enumerate(groups)}


def _label_rows(ax: Axes, rows: Sequence[str]) -> None:
    """One labelled row per group, the first on top."""
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)


def _draw_label_counts(ax: Axes, groups: Mapping[str, pd.DataFrame]) -> None:
    counts = [len(group) for group in groups.values()]
    bars = ax.barh(range(len(groups)), counts, height=0.6, color=list(_palette(groups).values()))
    ax.bar_label(bars, [f"{count} ({count / sum(counts):.0%})" for count in counts], padding=4)
    _label_rows(ax, [_wrapped(name) for name in groups])
    ax.margins(x=0.3)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set(title="Patients per label", xlabel="patients")


def _draw_cells_per_patient(ax: Axes, groups: Mapping[str, pd.DataFrame]) -> None:
    cells = [group["cells"].to_numpy(dtype=float) for group in groups.values()]
    every = np.concatenate(cells)
    ax.hist(
        cells,
        bins=min(20, max(1, int(np.ptp(every)) + 1)),
        stacked=True,
        color=list(_palette(groups).values()),
        edgecolor="white",
        linewidth=0.5,
    )
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set(
        title="Cells per patient",
        xlabel=f"cells (min {every.min():.0f}, median {np.median(every):.0f}, max {every.max():.0f})",
        ylabel="patients, stacked by label",
    )


def _draw_covariate(ax: Axes, groups: Mapping[str, pd.DataFrame], column: str, title: str, unit: str) -> None:
    """One dot per patient in a row per label, with median and quartiles; the count is drawn on a log axis."""
    ax.set_title(title)
    if not _recorded(groups, column):
        _say(ax, "not recorded")
        return
    rows, colours = [], _palette(groups)
    jitter = np.random.default_rng(0)
    for row, (name, group) in enumerate(groups.items()):
        values = group[column].dropna().to_numpy(dtype=float)
        rows.append(_row_label(name, len(values), len(group) - len(values)))
        offset = jitter.uniform(-0.22, 0.22, len(values))
        ax.scatter(values, row + offset, s=16, alpha=0.65, linewidths=0, color=colours[name])
        if len(values):
            lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75])
            ax.plot([lower, upper], [row + 0.36] * 2, color="black", linewidth=1.5, solid_capstyle="butt")
            ax.plot(median, row + 0.36, marker="d", markersize=6, color="black")
    _label_rows(ax, rows)
    if column == "lymphocyte_count":
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.grid(axis="x")
    ax.set_xlabel(f"{unit}; ♦ median, bar: quartiles")


def _row_label(name: str, present: int, missing: int = 0) -> str:
    return f"{_wrapped(name)}\nn = {present}" + (f", {missing} missing" if missing else "")


def _wrapped(name: str) -> str:
    """A label name in lines short enough to stand beside or under an axis."""
    return textwrap.fill(name, 18)


def _draw_sex(ax: Axes, groups: Mapping[str, pd.DataFrame]) -> None:
    ax.set_title("Sex")
    if not _recorded(groups, "sex"):
        _say(ax, "not recorded")
        return
    left = np.zeros(len(groups))
    sizes = np.array([len(group) for group in groups.values()])
    for name, code, colour in (
        ("female", "F", COLOURS[5]),
        ("male", "M", COLOURS[4]),
        ("missing", None, "#d9d9d9"),
    ):
        counts = np.array([_count_sex(group["sex"], code) for group in groups.values()])
        bars = ax.barh(range(len(groups)), counts / sizes, left=left, height=0.6, color=colour, label=name)
        # A sliver is too narrow for its number.
        ax.bar_label(
            bars,
            [str(c) if c / n > 0.06 else "" for c, n in zip(counts, sizes, strict=True)],
            label_type="center",
        )
        left += counts / sizes
    _label_rows(ax, [_row_label(name, len(group)) for name, group in groups.items()])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    ax.set(xlim=(0, 1), xlabel="share of patients, with their number")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, columnspacing=1, handlelength=1)


def _count_sex(sex: pd.Series, code: str | None) -> int:
    return int(sex.isna().sum() if code is None else (sex == code).sum())


def _draw_missing(ax: Axes, frame: pd.DataFrame) -> None:
    columns = ("label", "age", "sex", "lymphocyte_count")
    missing = [int(frame[column].isna().sum()) if column in frame else len(frame) for column in columns]
    bars = ax.barh(range(len(columns)), missing, height=0.6, color=GREY)
    ax.bar_label(bars, [f"{count} of {len(frame)}" for count in missing], padding=4)
    _label_rows(ax, ["label", "age", "sex", "lymphocyte\ncount"])
    ax.set(xlim=(0, len(frame) * 1.3), title="Missing values", xlabel="patients")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _recorded(groups: Mapping[str, pd.DataFrame], column: str) -> bool:
    return any(column in group and group[column].notna().any() for group in groups.values())


def _say(ax: Axes, text: str) -> None:
    """An empty panel that says why it is empty."""
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="#595959")


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
    with _figure(path, 5.5 * len(panels), 4.2) as figure:
        figure.suptitle(f"{title}: n = {len(history)} records")
        for ax, (panel, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            ax.set_title(panel)
            _draw_series(ax, history, time, series)


def _draw_series(ax: Axes, history: Sequence[Mapping[str, Any]], time: str, series: Sequence[str]) -> None:
    for number, name in enumerate(series):
        points = [(record[time], record[name]) for record in history if _present(record.get(name))]
        times, values = zip(*points, strict=True) if points else ((), ())
        marker = "o" if len(points) <= 40 else None  # beyond that the markers hide the line
        colour = COLOURS[number % len(COLOURS)]
        ax.plot(times, values, marker=marker, markersize=3.5, color=colour, label=_words(name))
    best, monitor = _best_record(history)
    if best is not None:
        label = f"best {time} {best[time]:g} ({_words(monitor)})"
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


def _words(name: str) -> str:
    """`validation_auroc` -> "validation AUROC"."""
    score = name.removeprefix("validation_")
    prefix = "validation " if score != name else ""
    return prefix + _SCORE_NAMES.get(score, score.replace("_", " "))


# Evaluation -------------------------------------------------------------------------------------------------


def evaluation_figure(
    labels: ArrayLike,
    probabilities: ArrayLike,
    path: str | os.PathLike,
    *,
    threshold: float,
    label_names: Sequence[str],
    intervals: Mapping[str, Interval],
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
    with _figure(path, 10.5, 9.5) as figure:
        axes = figure.subplots(2, 2).ravel()
        figure.suptitle(f"{title}: n = {len(labels)} patients ({counts})")
        figure.supxlabel(_scores_caption(intervals), fontsize=10)
        _draw_roc(axes[0], curves, intervals)
        _draw_reliability(axes[1], curves)
        _draw_strip(axes[2], labels, probabilities, threshold, label_names)
        _draw_confusion(axes[3], matrix, label_names)


def _scores_caption(intervals: Mapping[str, Interval]) -> str:
    shown = {name: intervals[name] for name in _CAPTION_SCORES if name in intervals}
    scores = ";  ".join(f"{_words(name)} {interval}" for name, interval in shown.items())
    return scores and f"{scores}  ({_percent(_common_level(shown))} intervals)"


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


def _draw_roc(ax: Axes, curves: Sequence[_Curve], intervals: Mapping[str, Interval]) -> None:
    ax.set_title("ROC curve" if len(curves) == 1 else "ROC curves, one versus rest")
    defined = [curve for curve in curves if 0 < curve.positive.sum() < len(curve.positive)]
    if not defined:
        _say(ax, "undefined: patients of one class only")
        return
    for curve in defined:
        false_positive, true_positive, _ = roc_points(curve.positive, curve.probability)
        ax.plot(false_positive, true_positive, color=curve.colour, linewidth=1.8, label=_wrapped(curve.name))
    if len(curves) == 1 and "auroc" in intervals:
        level = intervals["auroc"].level
        label = f"{_percent(level)} bootstrap band"
        band = roc_band(curves[0].positive, curves[0].probability, level=level)
        ax.fill_between(*band, color=curves[0].colour, alpha=0.18, linewidth=0, label=label)
    _unit_square(ax)
    ax.set(xlabel="1 - specificity", ylabel="sensitivity")
    ax.legend(loc="lower right")


def _draw_reliability(ax: Axes, curves: Sequence[_Curve]) -> None:
    """One curve with its Wilson intervals, or several without; the ROC panel names their colours."""
    alone = len(curves) == 1
    for curve in curves:
        # Fewer than five patients in a bin say next to nothing.
        number = int(np.clip(len(curve.positive) // 5, 1, 10))
        bins = reliability_bins(curve.positive, curve.probability, bins=number)
        predicted, observed = [b.predicted for b in bins], [b.observed for b in bins]
        ax.plot(predicted, observed, color=curve.colour, marker="o", markersize=5)
        if alone:
            ax.vlines(predicted, [b.low for b in bins], [b.high for b in bins], color=curve.colour, linewidth=1)
    _unit_square(ax)
    ax.set_title("Reliability" if alone else "Reliability, one versus rest")
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
    _label_rows(ax, [_row_label(name, int((labels == c).sum())) for c, name in enumerate(label_names)])
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
        text = f"{matrix[row, column]}\n{share:.0%}"
        ax.text(column, row, text, ha="center", va="center", color="white" if share > 0.5 else "black")
    ticks, names = range(len(label_names)), [_wrapped(name) for name in label_names]
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
    rows = [("score", "value", f"{_percent(_common_level(intervals))} interval")]
    rows += [(_words(name), *_cells(interval)) for name, interval in intervals.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in padded)
    rule = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])


def _common_level(intervals: Mapping[str, Interval]) -> float:
    levels = {interval.level for interval in intervals.values()}
    if len(levels) != 1:
        raise ValueError(f"expected intervals of one level, got {sorted(levels) or 'no intervals'}")
    return levels.pop()


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _cells(interval: Interval) -> tuple[str, str]:
    value = "undefined" if math.isnan(interval.value) else f"{interval.value:.3f}"
    bounds = "undefined" if math.isnan(interval.low) else f"{interval.low:.3f} to {interval.high:.3f}"
    left_out = f" ({interval.dropped:.1%} of resamples undefined)" if interval.dropped else ""
    return value, bounds + left_out


# Galleries --------------------------------------------------------------------------------------------------


def gallery(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    path: str | os.PathLike,
    *,
    columns: int = 8,
    title: str = "",
) -> None:
    """A grid of pictures with a caption under each, row by row.

    Args:
        images: PIL images of any size, each fitted into a square of the grid with its proportions kept.
        captions: one per image; wrapped to the width of the square, "" for none.
        path: where to write the picture; the suffix says the format.
        columns: pictures per row, at least 1; fewer pictures make a narrower grid.

    Raises:
        ValueError: no images, captions of another number, columns below 1.
    """
    if not images or len(images) != len(captions) or columns < 1:
        raise ValueError(
            "a gallery needs at least one image, one caption per image and one column, got"
            f" {len(images)} images, {len(captions)} captions, columns={columns}"
        )
    side, gap, line = 1.4, 0.12, 0.15  # inches
    wrapped = [_caption(caption) for caption in captions]
    lines = max(text.count("\n") + 1 if text else 0 for text in wrapped)
    columns = min(columns, len(images))
    cell_width, cell_height = side + gap, side + gap + line * lines
    heading = textwrap.fill(
        f"{title}: n = {len(images)}" if title else f"n = {len(images)}", max(12, int(columns * 15))
    )
    top = 0.15 + 0.22 * (heading.count("\n") + 1)
    width, height = columns * cell_width + gap, math.ceil(len(images) / columns) * cell_height + top
    with _figure(path, width, height, layout="none") as figure:
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set_axis_off()
        ax.text(gap, gap, heading, va="top", fontsize=12)
        for number, (image, caption) in enumerate(zip(images, wrapped, strict=True)):
            row, column = divmod(number, columns)
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
