"""Figures of explanations: the gallery of a patient's cells, and how well rankings of cells do."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from .reporting_style import COLOURS, GREY, figure_file, label_rows, say

# Red speaks for, blue against, in figures and in maps alike.
FOR, AGAINST = "#B2182B", "#2166AC"
_MAP_COLOURS = "RdBu_r"
_CELL_INCHES = 1.45
_UNITS = {"age": "years", "sex": "", "lymphocyte_count": "10⁹/L"}


@dataclass(frozen=True, eq=False)
class ShownCell:
    """A cell of the gallery.

    Attributes:
        picture: (H, W, 3) uint8.
        effect: change of P(label), NaN where it is not known.
        attention: weight of the pooling; `None` where the model gives none.
        evidence: (H, W) in -1..1, where inside the cell; `None` leaves the map out.
    """

    picture: np.ndarray
    effect: float
    attention: float | None = None
    evidence: np.ndarray | None = None


@dataclass(frozen=True)
class Gallery:
    """What the gallery of one patient shows.

    Attributes:
        patient_id: as in the user's table.
        cells: number of cells that were looked at.
        label: name of the label explained; `probability` is its own.
        threshold: probability of the label from which on the patient is called so; `None` = the likeliest label.
        predicted_label: what the model decides.
        prediction_set: labels that are not ruled out; `None` where the model has no sets.
        clinical: value name -> value (`None` = missing) and its effect on the probability.
        speaking_for, speaking_against: strongest first.
    """

    patient_id: str
    cells: int
    label: str
    probability: float
    threshold: float | None
    predicted_label: str
    prediction_set: Sequence[str] | None
    clinical: Mapping[str, tuple[float | str | None, float]]
    speaking_for: Sequence[ShownCell]
    speaking_against: Sequence[ShownCell]


def gallery_figure(gallery: Gallery, path: str | os.PathLike) -> None:
    """Answer, clinical effects, and the cells that spoke most for and most against the label, with maps.

    Args:
        gallery: what to show; at least one cell for the label.
        path: where to write the picture; the suffix says the format.
    """
    rows = [cells for cells in (gallery.speaking_for, gallery.speaking_against) if cells]
    columns = max(5, max(map(len, rows)))
    lines = 2 if gallery.speaking_for[0].evidence is not None else 1
    heights = [1.9, *[lines * _CELL_INCHES + 0.65] * len(rows)]
    with figure_file(path, columns * _CELL_INCHES + 0.4, sum(heights)) as figure:
        parts = figure.subfigures(len(heights), 1, height_ratios=heights)
        _draw_answer(parts[0], gallery)
        for part, cells, strongest in zip(parts[1:], rows, ("for", "against"), strict=False):
            _draw_cells(part, _title(gallery.label, cells, strongest), cells, columns, lines)


def _draw_answer(part: SubFigure, gallery: Gallery) -> None:
    left, right = part.subplots(1, 2, width_ratios=(1, 1))
    left.barh([0], [gallery.probability], color=COLOURS[0], height=0.5)
    left.barh([0], [1], color="none", edgecolor=GREY, height=0.5, linewidth=0.8)
    if gallery.threshold is not None:
        left.axvline(gallery.threshold, color="black", linestyle="--", linewidth=1.2)
        left.text(gallery.threshold + 0.01, 0.42, f"threshold {gallery.threshold:.2f}", va="bottom", fontsize=8)
    left.set(xlim=(0, 1), ylim=(-0.4, 0.7), yticks=[])
    left.set_xlabel(_answer(gallery), fontsize=9, loc="left")
    left.spines["left"].set_visible(False)
    left.set_title(f"{gallery.patient_id}: P({gallery.label}) = {gallery.probability:.2f}, {gallery.cells} cells")
    _draw_clinical(right, gallery)


def _answer(gallery: Gallery) -> str:
    """The decision, and the prediction set where there is one."""
    decided = f"called {gallery.predicted_label}"
    if gallery.prediction_set is None:
        return decided
    if len(gallery.prediction_set) > 1:
        return f"{decided}, but {' or '.join(gallery.prediction_set)} are possible:\nrefer to flow cytometry"
    return f"{decided}; the other labels are ruled out"


def _draw_clinical(ax: Axes, gallery: Gallery) -> None:
    ax.set_title(f"What the clinical values change in P({gallery.label})")
    if not gallery.clinical:
        say(ax, "the model looks at images only")
        return
    effects = [effect for _, effect in gallery.clinical.values()]
    largest = max(0.05, *map(abs, effects))
    label_rows(ax, [_clinical_label(name, value) for name, (value, _) in gallery.clinical.items()])
    for row, effect in enumerate(effects):
        ax.barh(row, effect, color=FOR if effect > 0 else AGAINST, height=0.6)
        side = 1 if effect >= 0 else -1
        ax.text(effect + side * 0.04 * largest, row, f"{effect:+#.2g}", va="center", ha="left" if side > 0 else "right")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.spines["left"].set_visible(False)
    ax.set(xlim=(-1.45 * largest, 1.45 * largest), xlabel="against the same patient with the value missing")


def _clinical_label(name: str, value: float | str | None) -> str:
    title = name.replace("_", " ")
    if value is None:
        return f"{title}: missing"
    shown = value if isinstance(value, str) else f"{value:g}"
    return f"{title}: {shown} {_UNITS.get(name, '')}".rstrip()


def _title(label: str, cells: Sequence[ShownCell], strongest: str) -> str:
    """What the cells of a row have in common; where none speaks that way, they are those that come nearest to it."""
    speaks = any(cell.effect > 0 if strongest == "for" else cell.effect < 0 for cell in cells)
    other = {"for": "against", "against": "for"}[strongest]
    return f"Cells that speak most {strongest} {label}" if speaks else f"Cells that speak least {other} {label}"


def _draw_cells(part: SubFigure, title: str, cells: Sequence[ShownCell], columns: int, lines: int) -> None:
    part.suptitle(f"{title}: change of probability, attention", x=0.01, ha="left", fontsize=11, fontweight="bold")
    for line, axes in enumerate(part.subplots(lines, columns, squeeze=False)):
        for number, ax in enumerate(axes):
            ax.set_axis_off()
            if number < len(cells):
                _draw_cell(ax, cells[number], with_map=line == 1)
    if lines == 2:
        part.supxlabel(
            "below: where inside the cell; red for, blue against, in comparison with the average cell; own scale each",
            fontsize=8,
            x=0.01,
            ha="left",
        )


def _draw_cell(ax: Axes, cell: ShownCell, *, with_map: bool) -> None:
    if not with_map:
        ax.imshow(cell.picture)
        attention = "" if cell.attention is None else f"\nattention {cell.attention:.1%}"
        effect = "the only cell" if math.isnan(cell.effect) else f"{cell.effect:+#.2g}"
        ax.set_title(f"{effect}{attention}", fontsize=8, fontweight="normal", loc="center")
        return
    ax.imshow(cell.picture.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    ax.imshow(cell.evidence, cmap=_MAP_COLOURS, vmin=-1, vmax=1, alpha=np.abs(cell.evidence) * 0.75)


def judgement_figure(
    curves: Mapping[str, Mapping[str, np.ndarray]],
    taken: np.ndarray,
    given: np.ndarray,
    path: str | os.PathLike,
) -> None:
    """Mean P(label) while cells are taken away or given, in the order of each ranking.

    Args:
        curves: `deletion` and `insertion` -> ranking, and "random", -> mean over patients (S,).
        taken, given: (S,) shares of the cells.
        path: where to write the picture; the suffix says the format.
    """
    with figure_file(path, 9, 4) as figure:
        panels = zip(figure.subplots(1, 2, sharey=True), ("deletion", "insertion"), (taken, given), strict=True)
        for ax, kind, shares in panels:
            for number, (name, values) in enumerate(curves[kind].items()):
                style = {"color": GREY, "linestyle": "--"} if name == "random" else {"color": COLOURS[number]}
                ax.plot(100 * shares, values, label=name.replace("_", " "), linewidth=1.8, **style)
            ax.grid()
            ax.set_xlabel(f"cells {'taken away' if kind == 'deletion' else 'given'}, strongest first, in %")
            ax.set_title(f"{kind.capitalize()}: {'lower' if kind == 'deletion' else 'higher'} is better")
        figure.axes[0].set_ylabel("mean probability of the label")
        figure.axes[0].legend()
