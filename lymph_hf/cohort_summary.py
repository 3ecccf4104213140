"""A cohort in words and figures, for a terminal or a log: counts and distributions, never a patient's row."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from .cohort import Cohort, Exclusion

_UNLABELLED = "(unlabelled)"
_NAMES_SHOWN = 5


def summarise(cohort: "Cohort") -> str:
    """Patients, cells, label and covariate distributions, missing counts, exclusions by reason, warnings."""
    frame = cohort.to_frame()
    cells = frame["cells"]
    spread = f"{cells.min()} / {cells.median():g} / {cells.max()}" if len(frame) else "-"
    lines = [
        f"Cohort {cohort.root.name} ({cohort.layout} layout)",
        f"Patients: {len(frame)}    Cells: {cells.sum():,} (per patient min / median / max: {spread})",
        "",
        _by_label(frame, cohort.label_names).to_string(),
        "",
        f"Exclusions: {len(cohort.exclusions)}",
        *_exclusion_lines(cohort.exclusions),
        f"Warnings: {len(cohort.warnings)}",
        *(f"  {warning}" for warning in cohort.warnings),
    ]
    return "\n".join(lines)


def _by_label(frame: pd.DataFrame, label_names: Sequence[str]) -> pd.DataFrame:
    """One line per class and one for all; numbers as median [minimum, maximum] with the missing counted."""
    labels = frame["label"].fillna(_UNLABELLED)
    groups = {name: frame[labels == name] for name in (*label_names, _UNLABELLED)}
    groups = {name: group for name, group in groups.items() if len(group) or name in label_names}
    groups["all"] = frame
    rows = {
        name: {
            "patients": len(group),
            "cells": int(group["cells"].sum()),
            "age (years)": _spread(group["age"]),
            "sex F / M": _sexes(group["sex"]),
            "lymphocytes (10^9/L)": _spread(group["lymphocyte_count"]),
        }
        for name, group in groups.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _spread(values: pd.Series) -> str:
    known = values.dropna()
    text = f"{known.median():g} [{known.min():g}, {known.max():g}]" if len(known) else "-"
    return text + _missing(values)


def _sexes(values: pd.Series) -> str:
    return f"{(values == 'F').sum()} / {(values == 'M').sum()}" + _missing(values)


def _missing(values: pd.Series) -> str:
    count = int(values.isna().sum())
    return f", {count} missing" if count else ""


def _exclusion_lines(exclusions: Sequence["Exclusion"]) -> list[str]:
    names: dict[str, list[str]] = defaultdict(list)
    for exclusion in exclusions:
        what = f"{exclusion.patient_id}/{exclusion.file}" if exclusion.file else exclusion.patient_id
        names[exclusion.reason].append(what)
    shown = {reason: found[:_NAMES_SHOWN] + ["..."] * (len(found) > _NAMES_SHOWN) for reason, found in names.items()}
    return [f"  {reason}: {len(names[reason])} ({', '.join(shown[reason])})" for reason in sorted(names)]
