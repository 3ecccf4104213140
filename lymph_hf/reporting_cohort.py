"""The figure of a cohort: who is in it, and what is missing."""

import math
import os
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .reporting_style import COLOURS, GREY, figure_file, label_rows, row_label, say, wrap_name

UNLABELLED = "unlabelled"


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
    with figure_file(path, 12.5, max(7.5, 2 * (1.3 + 0.6 * len(groups)))) as figure:
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


def _draw_label_counts(ax: Axes, groups: Mapping[str, pd.DataFrame]) -> None:
    counts = [len(group) for group in groups.values()]
    bars = ax.barh(range(len(groups)), counts, height=0.6, color=list(_palette(groups).values()))
    ax.bar_label(bars, [f"{count} ({count / sum(counts):.0%})" for count in counts], padding=4)
    label_rows(ax, [wrap_name(name) for name in groups])
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
        say(ax, "not recorded")
        return
    rows, colours = [], _palette(groups)
    jitter = np.random.default_rng(0)
    for row, (name, group) in enumerate(groups.items()):
        values = group[column].dropna().to_numpy(dtype=float)
        rows.append(row_label(name, len(values), len(group) - len(values)))
        offset = jitter.uniform(-0.22, 0.22, len(values))
        ax.scatter(values, row + offset, s=16, alpha=0.65, linewidths=0, color=colours[name])
        if len(values):
            lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75])
            ax.plot([lower, upper], [row + 0.36] * 2, color="black", linewidth=1.5, solid_capstyle="butt")
            ax.plot(median, row + 0.36, marker="d", markersize=6, color="black")
    label_rows(ax, rows)
    if column == "lymphocyte_count":
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.grid(axis="x")
    ax.set_xlabel(f"{unit}; ♦ median, bar: quartiles")


def _draw_sex(ax: Axes, groups: Mapping[str, pd.DataFrame]) -> None:
    ax.set_title("Sex")
    if not _recorded(groups, "sex"):
        say(ax, "not recorded")
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
    label_rows(ax, [row_label(name, len(group)) for name, group in groups.items()])
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
    label_rows(ax, ["label", "age", "sex", "lymphocyte\ncount"])
    ax.set(xlim=(0, len(frame) * 1.3), title="Missing values", xlabel="patients")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _recorded(groups: Mapping[str, pd.DataFrame], column: str) -> bool:
    return any(column in group and group[column].notna().any() for group in groups.values())
