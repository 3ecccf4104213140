"""What every figure shares: style, colours, how a figure is saved, and how labels and scores are written.

Figures are drawn on `matplotlib.figure.Figure` objects, never through pyplot, so that they need no display and leave
no state behind; a figure appears under its name only when it is complete. The colours are those of Okabe and Ito,
which people with any common colour-vision deficiency can tell apart.
"""

import contextlib
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from .files import writing_file
from .metrics import Interval, ReliabilityBin, reliability_bins

GREY = "#8c8c8c"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
# Of the curves drawn over a solid blue one, which shows through where they lie along it; they differ in grey, too.
DASH_COLOURS = ("#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ((0, (5, 2)), (0, (1.5, 2.5)), (0, (6, 2, 1.5, 2)), (0, (10, 3)), (0, (6, 2, 1.5, 2, 1.5, 2)), (0, (3, 3)))

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
    "auroc_within_folds": "AUROC within folds",
    "auprc": "AUPRC",
    "brier": "Brier score",
    "sensitivity_at_95_specificity": "sensitivity at 95 % specificity",
    "specificity_at_95_sensitivity": "specificity at 95 % sensitivity",
    "ece": "calibration error (ECE)",
    "ppv": "PPV",
    "npv": "NPV",
}


@contextlib.contextmanager
def figure_file(path: str | os.PathLike, width: float, height: float, layout: str = "constrained") -> Iterator[Figure]:
    """A figure of width x height inches in the common style, saved when the block ends without error."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        with writing_file(path) as beside:
            figure.savefig(beside)


def label_rows(ax: Axes, rows: Sequence[str]) -> None:
    """One labelled row per group, the first on top."""
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)


def row_label(name: str, present: int, missing: int = 0) -> str:
    """A label with the number of its patients, and of those without a value."""
    return f"{wrap_name(name)}\nn = {present}" + (f", {missing} missing" if missing else "")


def wrap_name(name: str) -> str:
    """A label name in lines short enough to stand beside or under an axis."""
    return textwrap.fill(name, 18)


def say(ax: Axes, text: str) -> None:
    """An empty panel that says why it is empty."""
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="#595959")


def words(name: str) -> str:
    """`validation_auroc` -> "validation AUROC"."""
    score = name.removeprefix("validation_")
    prefix = "validation " if score != name else ""
    return prefix + _SCORE_NAMES.get(score, score.replace("_", " "))


def common_level(intervals: Mapping[str, Interval]) -> float:
    """The level that all intervals share.

    Raises:
        ValueError: no intervals, or intervals of different levels.
    """
    levels = {interval.level for interval in intervals.values()}
    if len(levels) != 1:
        raise ValueError(f"expected intervals of one level, got {sorted(levels) or 'no intervals'}")
    return levels.pop()


def percent(share: float) -> str:
    """0.95 -> "95 %"."""
    return f"{100 * share:g} %"


def shown_bins(labels: ArrayLike, probabilities: ArrayLike) -> tuple[list[ReliabilityBin], str]:
    """At most ten bins of a reliability diagram, and how many patients a dot stands for: "6 patients per dot"."""
    # Fewer than five patients in a bin say next to nothing.
    bins = reliability_bins(labels, probabilities, bins=int(np.clip(len(labels) // 5, 1, 10)))
    counts = sorted({b.count for b in bins})
    return bins, f"{' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))} patients per dot"
