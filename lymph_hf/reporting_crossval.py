"""The figures of a cross-validation: the scores of the folds, and what stands beside the network in them."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from .metrics import Bootstrap, Interval, roc_band, roc_points
from .reporting_style import COLOURS, GREY, common_level, figure_file, label_rows, percent, wrap_name


@dataclass(frozen=True)
class RowScores:
    """AUROC of a model out of fold.

    Attributes:
        auroc: of all patients.
        within_folds: mean of that among the patients of each fold.
        lead: AUROC of the network minus that of this model; `None` for the network itself.
        lead_within_folds: the same within folds.
    """

    auroc: Interval
    within_folds: Interval
    lead: Interval | None = None
    lead_within_folds: Interval | None = None


def crossval_figure(
    labels: np.ndarray,
    probabilities: np.ndarray,
    network: RowScores,
    folds: Mapping[str, Interval],
    path: str | os.PathLike,
    *,
    label_names: Sequence[str],
    repeats: Sequence[np.ndarray] = (),
    bootstrap: Bootstrap | None = None,
) -> None:
    """AUROC of each fold and of all patients, and the out-of-fold ROC curve of the network.

    Args:
        labels: (n,) integers in 0..C-1.
        probabilities: (n, C), pooled out of fold.
        network: its scores.
        folds: name of the fold -> AUROC on its patients.
        path: where to write the picture; the suffix says the format.
        label_names: in the order of the labels. More than two have a curve each, against the rest.
        repeats: two labels: the probabilities (n, 2) in each repeat, drawn as thin lines if there are more.
        bootstrap: of the band; None means `Bootstrap()`.

    Raises:
        ValueError: no folds.
    """
    if not folds:
        raise ValueError("nothing to draw: no folds")
    two = len(label_names) == 2
    curves = {
        name: (labels == number, probabilities[:, number])
        for number, name in enumerate(label_names)
        if not two or number == 1
    }
    counts = " + ".join(f"{(labels == number).sum()} {name}" for number, name in enumerate(label_names))
    with figure_file(path, 11, max(5.2, 1.8 + 0.3 * (len(folds) + 2))) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
        figure.suptitle(f"Cross-validation: n = {len(labels)} patients ({counts}), predicted out of fold")
        _draw_folds(left, network, folds)
        _draw_curves(right, curves, [p[:, 1] for p in repeats] if two else [], bootstrap)


def _draw_folds(ax: Axes, network: RowScores, folds: Mapping[str, Interval]) -> None:
    """Folds above, all patients below; the pooled score as a line through all."""
    rows = {name: (area, GREY) for name, area in folds.items()}
    rows |= {"all patients": (network.auroc, COLOURS[0]), "within folds, mean": (network.within_folds, COLOURS[0])}
    ax.axvline(0.5, color=GREY, linestyle=":", linewidth=1)
    if not math.isnan(network.auroc.value):
        ax.axvline(network.auroc.value, color=COLOURS[0], linewidth=1, alpha=0.5)
    for height, (area, colour) in enumerate(rows.values()):
        _draw_interval(ax, height, area, colour)
        _write_interval(ax, height, area)
    label_rows(ax, list(rows))
    ax.axhline(len(folds) - 0.5, color=GREY, linewidth=0.8)
    ax.grid(axis="x")
    ax.set(xlim=(-0.02, 1.02), title="AUROC of each fold and of all patients")
    ax.set_xlabel(f"AUROC, {percent(common_level(folds))} bootstrap interval over patients")


def _draw_curves(
    ax: Axes,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    repeats: Sequence[np.ndarray],
    bootstrap: Bootstrap | None,
) -> None:
    ax.set_title("Out-of-fold ROC curve" if len(curves) == 1 else "Out-of-fold ROC curves, one versus rest")
    for number, (name, (positive, probability)) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        false_positive, true_positive, _ = roc_points(positive, probability)
        ax.plot(false_positive, true_positive, color=colour, linewidth=1.8, label=wrap_name(name))
        for repeat in repeats if len(repeats) > 1 else ():
            ax.plot(*roc_points(positive, repeat)[:2], color=colour, linewidth=0.7, alpha=0.5)
        if len(curves) == 1:
            band = roc_band(positive, probability, bootstrap=bootstrap)
            thin = ", thin: each repeat" if len(repeats) > 1 else ""
            level = percent((bootstrap or Bootstrap()).level)
            ax.fill_between(*band, color=colour, alpha=0.15, linewidth=0, label=f"{level} bootstrap band{thin}")
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    ax.grid()
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", anchor="N")
    ax.set(xlabel="1 - specificity", ylabel="sensitivity")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))


def rows_figure(rows: Mapping[str, RowScores], path: str | os.PathLike) -> None:
    """The network among what stands beside it in the same folds: AUROC, and paired differences of it.

    Args:
        rows: name -> scores; the network first, without a lead.
        path: where to write the picture; the suffix says the format.

    Raises:
        ValueError: nothing stands beside the network.
    """
    if all(row.lead is None for row in rows.values()):
        raise ValueError("nothing to draw: nothing stands beside the network")
    level = percent(common_level({name: row.auroc for name, row in rows.items()}))
    with figure_file(path, 12, 2.0 + 0.55 * len(rows)) as figure:
        left, right = figure.subplots(1, 2)
        figure.suptitle("Beside the network, in the same folds (filled: all patients; hollow: mean within folds)")
        for height, row in enumerate(rows.values()):
            colour = COLOURS[0] if row.lead is None else GREY
            _draw_pair(left, height, (row.auroc, row.within_folds), colour)
            if row.lead is not None:
                _draw_pair(right, height, (row.lead, row.lead_within_folds), "black")
        left.axvline(next(iter(rows.values())).auroc.value, color=COLOURS[0], linewidth=1, alpha=0.5)
        left.axvline(0.5, color=GREY, linestyle=":", linewidth=1)
        right.axvline(0, color="black", linewidth=1)
        for ax in (left, right):
            label_rows(ax, list(rows) if ax is left else [""] * len(rows))
            ax.grid(axis="x")
        left.set(xlim=(-0.02, 1.02), title="AUROC", xlabel=f"AUROC, {level} bootstrap interval over patients")
        right.set_title("The network's lead")
        right.set_xlabel(f"AUROC of the network minus that of the row, {level} interval, paired")


def _draw_pair(ax: Axes, height: int, areas: tuple[Interval, Interval], colour: str) -> None:
    """Of all patients above, filled; within folds below, hollow."""
    for offset, area, face in ((-0.16, areas[0], colour), (0.16, areas[1], "white")):
        _draw_interval(ax, height + offset, area, colour, face)
        _write_interval(ax, height + offset, area)


def _draw_interval(ax: Axes, height: float, area: Interval, colour: str, face: str | None = None) -> None:
    if math.isnan(area.value):
        return
    ax.plot([area.low, area.high], [height, height], color=colour, linewidth=1.6)
    ax.plot(area.value, height, marker="s", markersize=6, color=colour, markerfacecolor=face or colour)


def _write_interval(ax: Axes, height: float, area: Interval) -> None:
    ax.text(1.03, height, str(area), va="center", fontsize=8.5, transform=ax.get_yaxis_transform())
