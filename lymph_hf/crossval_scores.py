"""Out-of-fold predictions: every patient, predicted by models that were not trained on it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from .baselines import BLEND, BLENDED, CLINICAL_ALONE, CLINICAL_MODEL, NETWORK, Blend
from .crossval_baselines import read_baselines, row_file
from .crossval_folds import CrossvalError, Fold
from .metrics import Bootstrap, Interval, decide, weighted_scores
from .metrics_checks import ratio
from .metrics_summary import clinical_intervals

WITHIN_FOLDS = "auroc_within_folds"
# Scores of the decisions, not of the probabilities.
OF_DECISIONS = ("balanced_accuracy", "sensitivity", "specificity", "accuracy")


@dataclass(frozen=True)
class Predictions:
    """What one kind of model says of patients, and where each would have been decided.

    Attributes:
        patient_ids: (n,)
        labels: (n,) integers in 0..C-1.
        probabilities: (n, C)
        thresholds: (n,), frozen by the fold that predicted the patient; with repeats the mean over its folds.
    """

    patient_ids: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    thresholds: np.ndarray

    @property
    def decided(self) -> np.ndarray:
        """(n,) integers: two labels by the patient's own threshold, more by the largest probability."""
        if self.probabilities.shape[1] == 2:
            return (self.probabilities[:, 1] >= self.thresholds).astype(int)
        return decide(self.probabilities)

    @property
    def certain(self) -> np.ndarray:
        """(n, C): what is decided, as probabilities of 0 or 1, for scores of decisions."""
        return np.eye(self.probabilities.shape[1])[self.decided]

    def intervals(self, bootstrap: Bootstrap) -> dict[str, Interval]:
        """Every score with its bootstrap interval over patients, decisions at the patients' own thresholds."""
        both = self.probabilities, self.certain

        def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
            found, decisions = (weighted_scores(self.labels, p, 0.5, weights) for p in both)
            return found | {name: decisions[name] for name in OF_DECISIONS if name in found}

        found = bootstrap.intervals(statistics, len(self.labels))
        if self.probabilities.shape[1] == 2:
            found |= clinical_intervals(self.labels, self.probabilities, threshold=0.5, bootstrap=bootstrap)
        return found


@dataclass(frozen=True)
class OutOfFold:
    """The predictions of all folds of one kind of model.

    Attributes:
        table: `repeat`, `fold` and the columns of `inference.prediction_table`; a row per patient and repeat.
        thresholds: (rows,), the frozen threshold of the row's fold.
        label_names: in the order of their numbers.
    """

    table: pd.DataFrame
    thresholds: np.ndarray
    label_names: tuple[str, ...]

    @classmethod
    def collect(
        cls,
        folds: Sequence[Fold],
        label_names: Sequence[str],
        read: Callable[[Fold], tuple[pd.DataFrame, float]],
    ) -> Self:
        """Put the folds' tables together.

        Args:
            folds: all, finished.
            label_names: in the order of their numbers.
            read: fold -> predictions of its test patients, and the frozen threshold.

        Raises:
            CrossvalError: a fold's table is not of its patients.
        """
        tables, thresholds = [], []
        for fold in folds:
            table, threshold = read(fold)
            if sorted(table["patient_id"]) != sorted(fold.split.test):
                raise CrossvalError(
                    f"{fold}: the predictions in {fold.folder} are not those of its {len(fold.split.test)} patients. "
                    "Remove the folder, then go on with --resume."
                )
            table.insert(0, "repeat", fold.repeat)
            table.insert(1, "fold", fold.number)
            tables.append(table)
            thresholds += [threshold] * len(table)
        return cls(pd.concat(tables, ignore_index=True), np.array(thresholds), tuple(label_names))

    @property
    def probabilities(self) -> np.ndarray:
        """(rows, C)"""
        return probabilities_of(self.table, self.label_names)

    def predictions(self, rows: np.ndarray | None = None) -> Predictions:
        """Of each patient the mean over its rows, sorted by identifier.

        Args:
            rows: (rows,) booleans, such as those of one repeat; `None` = all.
        """
        rows = np.ones(len(self.table), dtype=bool) if rows is None else rows
        table = self.table[rows]
        patient_ids, first, position = np.unique(table["patient_id"], return_index=True, return_inverse=True)
        share = np.bincount(position)

        def mean(values: np.ndarray) -> np.ndarray:
            return np.bincount(position, weights=values) / share

        numbers = {name: number for number, name in enumerate(self.label_names)}
        return Predictions(
            patient_ids,
            table["label"].map(numbers).to_numpy()[first],
            np.stack([mean(column) for column in self.probabilities[rows].T], axis=1),
            mean(self.thresholds[rows]),
        )

    def auroc_within_folds(self, weights: np.ndarray) -> np.ndarray:
        """Mean over the folds of the AUROC among a fold's own patients.

        The pooled AUROC also compares patients of different folds, whose models may be unequally sure; this one does
        not, and is a mean over less patients each (Forman and Scholz, SIGKDD Explorations 12:49, 2010).

        Args:
            weights: (R, n) of the patients in the order of `predictions`.

        Returns:
            (R,); folds whose drawn patients are of one class are left out, NaN where all are.
        """
        position = np.unique(self.table["patient_id"], return_inverse=True)[1]
        labels = self.table["label"].map({name: i for i, name in enumerate(self.label_names)}).to_numpy()
        probabilities = self.probabilities
        areas = []
        for rows in self.table.groupby(["repeat", "fold"]).indices.values():
            drawn = weights[:, position[rows]]
            areas.append(weighted_scores(labels[rows], probabilities[rows], 0.5, drawn)["auroc"])
        return ratio(np.nansum(areas, axis=0), (~np.isnan(areas)).sum(axis=0))

    def intervals(self, bootstrap: Bootstrap) -> dict[str, Interval]:
        """Scores of the pooled predictions, and the AUROC within folds."""
        pooled = self.predictions()

        def within(weights: np.ndarray) -> dict[str, np.ndarray]:
            return {WITHIN_FOLDS: self.auroc_within_folds(weights)}

        return pooled.intervals(bootstrap) | bootstrap.intervals(within, len(pooled.labels))

    def by_repeat(self) -> dict[int, Predictions]:
        """Repeat -> predictions of all patients."""
        repeats = self.table["repeat"].to_numpy()
        return {int(repeat): self.predictions(repeats == repeat) for repeat in np.unique(repeats)}


def probabilities_of(table: pd.DataFrame, label_names: Sequence[str]) -> np.ndarray:
    """(n, C) of a table of predictions."""
    if len(label_names) == 2:
        positive = table["probability"].to_numpy()
        return np.stack([1 - positive, positive], axis=1)
    return table[[f"probability_{name}" for name in label_names]].to_numpy()


def read_network(fold: Fold) -> tuple[pd.DataFrame, float]:
    """What the fold's network says of the fold's patients, and its threshold."""
    threshold = fold.report["threshold"]
    return _read(fold.folder / "predictions.csv"), 0.5 if threshold is None else threshold


def read_clinical(fold: Fold) -> tuple[pd.DataFrame, float]:
    """The same of the fold's clinical model."""
    record = json.loads((fold.folder / CLINICAL_MODEL / "clinical.json").read_text(encoding="utf-8"))
    return _read(fold.folder / "clinical-test.csv"), record["decision_threshold"]


def out_of_fold(folds: Sequence[Fold], label_names: Sequence[str]) -> dict[str, OutOfFold]:
    """Predictions of the networks, and of whatever every fold has beside: clinical models, blends, baselines.

    Raises:
        CrossvalError: as `OutOfFold.collect`.
    """
    found = {NETWORK: OutOfFold.collect(folds, label_names, read_network)}
    if all((fold.folder / "clinical-test.csv").exists() for fold in folds):
        found[CLINICAL_ALONE] = OutOfFold.collect(folds, label_names, read_clinical)
        if all((fold.folder / BLEND).exists() for fold in folds):
            found[BLENDED] = OutOfFold.collect(folds, label_names, lambda fold: _read_blend(fold, label_names))
    rows = [_thresholds(fold) for fold in folds]
    for name in rows[0]:
        if all(name in of_fold for of_fold in rows):
            found[name] = OutOfFold.collect(folds, label_names, lambda fold, name=name: _read_row(fold, name))
    return found


def _thresholds(fold: Fold) -> dict[str, float]:
    """Row of the fold's baselines -> its threshold."""
    return {row: threshold for rows in read_baselines(fold.folder).values() for row, threshold in rows.items()}


def _read_row(fold: Fold, name: str) -> tuple[pd.DataFrame, float]:
    return _read(row_file(fold.folder, name)), _thresholds(fold)[name]


def _read(path: Path) -> pd.DataFrame:
    text = dict.fromkeys(("patient_id", "label", "predicted_label"), str)
    return pd.read_csv(path, dtype=text, keep_default_na=False)


def _read_blend(fold: Fold, label_names: Sequence[str]) -> tuple[pd.DataFrame, float]:
    table, clinical = read_network(fold)[0], read_clinical(fold)[0].set_index("patient_id")
    clinical = clinical.loc[table["patient_id"]]
    row = Blend.load(fold.folder).row(*(probabilities_of(part, label_names) for part in (table, clinical)))
    columns = ["probability"] if len(label_names) == 2 else [f"probability_{name}" for name in label_names]
    table[columns] = row.probabilities[:, -len(columns) :]
    decided = decide(row.probabilities, threshold=row.threshold)
    table["predicted_label"] = [label_names[number] for number in decided]
    return table.drop(columns="decision", errors="ignore"), row.threshold
