"""The figure of a cross-validation: how much the score depends on the fold, and the pooled ROC curves."""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from .metrics import Interval, roc_band, roc_points
from .reporting_style import COLOURS, GREY, common_level, figure_file, label_rows, percent, wrap_name


def crossval_figure(
    labels: np.ndarray,
    models: Mapping[str, tuple[np.ndarray, Interval, Interval]],
    folds: Mapping[str, Interval],
    path: str | os.PathLike,
    *,
    label_names: Sequence[str],
    repeats: Sequence[np.ndarray] = (),
) -> None:
    """AUROC of each fold and of all patients, and out-of-fold ROC curves.

    Args:
        labels: (n,) integers in 0..C-1.
        models: name -> pooled out-of-fold probabilities (n, C), their AUROC and that within folds; the network first.
        folds: name of the fold -> AUROC of the network on its patients.
        path: where to write the picture; the suffix says the format.
        label_names: in the order of the labels. Two labels: a curve for each model; more: one for each label against
            the rest, of the network.
        repeats: two labels: the network's probabilities (n, 2) in each repeat, drawn as thin lines if there are more.

    Raises:
        ValueError: no models or no folds.
    """
    if not models or not folds:
        raise ValueError(f"nothing to draw: {len(models)} models and {len(folds)} folds")
    height = max(4.6, 1.8 + 0.3 * (len(folds) + 2 * len(models)))
    with figure_file(path, 11, height) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
        figure.suptitle(f"Cross-validation: n = {len(labels)} patients, predicted out of fold")
        _draw_forest(left, {name: areas for name, (_, *areas) in models.items()}, folds)
        _draw_curves(right, _curves(labels, models, label_names), [(labels == 1, p[:, 1]) for p in repeats])


def _curves(
    labels: np.ndarray, models: Mapping[str, tuple[np.ndarray, Interval, Interval]], label_names: Sequence[str]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name, which patients are positive (n,) and their probability (n,): each model, or each label of the network."""
    if len(label_names) == 2:
        return [(name, labels == 1, probabilities[:, 1]) for name, (probabilities, *_) in models.items()]
    network = next(iter(models.values()))[0]
    return [(name, labels == number, network[:, number]) for number, name in enumerate(label_names)]


def _draw_forest(ax: Axes, models: Mapping[str, Sequence[Interval]], folds: Mapping[str, Interval]) -> None:
    """Folds above, all patients below; the network's pooled score as a line through all."""
    rows = [*((name, area, GREY) for name, area in folds.items())]
    for number, (name, areas) in enumerate(models.items()):
        kinds = (f"{name}: all patients", f"{name}: within folds")
        rows += [(kind, area, COLOURS[number]) for kind, area in zip(kinds, areas, strict=True)]
    pooled = next(iter(models.values()))[0]
    ax.axvline(0.5, color=GREY, linestyle=":", linewidth=1)
    if not math.isnan(pooled.value):
        ax.axvline(pooled.value, color=COLOURS[0], linewidth=1, alpha=0.5)
    for height, (_, area, colour) in enumerate(rows):
        if not math.isnan(area.value):
            ax.plot([area.low, area.high], [height, height], color=colour, linewidth=1.6)
            ax.plot(area.value, height, marker="s", markersize=6, color=colour)
        ax.text(1.03, height, str(area), va="center", fontsize=8.5, transform=ax.get_yaxis_transform())
    label_rows(ax, [name for name, _, _ in rows])
    ax.axhline(len(folds) - 0.5, color=GREY, linewidth=0.8)
    ax.grid(axis="x")
    ax.set(xlim=(-0.02, 1.02), title="AUROC of each fold and of all patients")
    ax.set_xlabel(f"AUROC, {percent(common_level(folds))} bootstrap interval over patients")


def _draw_curves(
    ax: Axes, curves: Sequence[tuple[str, np.ndarray, np.ndarray]], repeats: Sequence[tuple[np.ndarray, np.ndarray]]
) -> None:
    ax.set_title("Out-of-fold ROC curves")
    for positive, probability in repeats if len(repeats) > 1 else ():
        false_positive, true_positive, _ = roc_points(positive, probability)
        ax.plot(false_positive, true_positive, color=COLOURS[0], linewidth=0.7, alpha=0.4)
    for number, (name, positive, probability) in enumerate(curves):
        false_positive, true_positive, _ = roc_points(positive, probability)
        colour = COLOURS[number % len(COLOURS)]
        ax.plot(false_positive, true_positive, color=colour, linewidth=1.8, label=wrap_name(name))
    if len(repeats) > 0:
        band = roc_band(*curves[0][1:])
        thin = ", thin: each repeat" if len(repeats) > 1 else ""
        ax.fill_between(*band, color=COLOURS[0], alpha=0.15, linewidth=0, label=f"95 % bootstrap band{thin}")
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    ax.grid()
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ax.set(xlabel="1 - specificity", ylabel="sensitivity")
    ax.legend(loc="lower right")
