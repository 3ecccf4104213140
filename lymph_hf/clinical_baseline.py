"""The clinical model as the row beside an image model: same patients, same table; and the blend of the two."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from .clinical import ClinicalError, ClinicalModel, ClinicalSettings, Fold, tune
from .cohort import Cohort
from .inference import prediction_table
from .metrics import bootstrap_intervals, check_predictions, choose_threshold
from .metrics_bootstrap import Interval
from .splits import Split, make_folds

logger = logging.getLogger(__name__)

BLEND_STEP = 0.05
# A probability of 0 for what then happens has an infinite log-loss.
_SMALLEST_PROBABILITY = 1e-6
# Equal losses differ in their last bits.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Baseline:
    """A fitted clinical model and what it says of the patients that it was not fitted on.

    Attributes:
        model: fitted on the training patients, its threshold frozen.
        tables: part ("validation", "test") -> predictions as `inference.prediction_table` gives them, in the order of
            the split; a part without patients is absent.
        probabilities: part -> (n, C), the same patients.
    """

    model: ClinicalModel
    tables: dict[str, pd.DataFrame]
    probabilities: dict[str, NDArray[np.float64]]

    def intervals(self, part: str, *, resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
        """Scores of the labelled patients of a part, as `metrics.bootstrap_intervals`.

        Raises:
            ClinicalError: the split has no such patients.
        """
        if part not in self.tables:
            raise ClinicalError(f"no patients in {part}; the baseline has {', '.join(self.tables) or 'none'}")
        labelled = self.tables[part]["label"].notna().to_numpy()
        names = list(self.model.label_names)
        labels = np.array([names.index(label) for label in self.tables[part]["label"][labelled]], dtype=int)
        return bootstrap_intervals(
            labels,
            self.probabilities[part][labelled],
            threshold=self.model.decision_threshold,
            resamples=resamples,
            seed=seed,
        )


def clinical_baseline(
    cohort: Cohort,
    split: Split,
    settings: ClinicalSettings | None = None,
    *,
    label_names: Sequence[str] | None = None,
    trials: int = 0,
    inner_folds: int = 5,
) -> Baseline:
    """Fit the clinical model on the training patients of a split and predict the others.

    Training patients alone decide what is fitted, and with `trials` also its parameters, in folds among themselves
    that keep linked patients together. Validation patients choose the threshold (two classes). Test patients choose
    nothing.

    Args:
        cohort: with every patient of the split.
        split: train must hold every label.
        settings: None means `ClinicalSettings()`.
        label_names: in the order of their numbers, the positive one of two last; None means `cohort.label_names`.
        trials: parameters that Optuna tries; 0 takes those of the settings.
        inner_folds: of that search.

    Raises:
        ClinicalError: an impossible value, a label without training patients, or a package that is not installed.
        SplitError: too few training patients for the inner folds.
    """
    settings, names = settings or ClinicalSettings(), tuple(label_names or cohort.label_names)
    train = cohort.select(split.train)
    frame, labels = train.to_frame(), _numbered(train, names)
    without = [name for number, name in enumerate(names) if number not in labels]
    if without:
        raise ClinicalError(f"no training patient has the label {', '.join(without)}; the split must hold every label")
    if trials:
        settings = tune(settings, frame, labels, _inner_folds(train, inner_folds, settings.seed), trials=trials)
    model = ClinicalModel(settings).fit(frame, labels)
    model.label_names = names
    parts = {part: cohort.select(getattr(split, part)) for part in ("validation", "test") if getattr(split, part)}
    probabilities = {part: model.predict_proba(patients.to_frame()) for part, patients in parts.items()}
    if "validation" in parts and len(names) == 2:
        chosen_on = _numbered(parts["validation"], names)
        if len(set(chosen_on.tolist())) == 2:
            model.decision_threshold = choose_threshold(chosen_on, probabilities["validation"])
        else:
            logger.warning("validation patients of one label only: the clinical threshold stays at 0.5")
    tables = {part: clinical_table(model, patients, probabilities[part]) for part, patients in parts.items()}
    return Baseline(model, tables, probabilities)


def clinical_table(
    model: ClinicalModel, cohort: Cohort, probabilities: NDArray[np.float64] | None = None
) -> pd.DataFrame:
    """`inference.prediction_table` of a clinical model, with labels, in the order of the cohort."""
    if probabilities is None:
        probabilities = model.predict_proba(cohort.to_frame())
    return prediction_table(
        [patient.patient_id for patient in cohort.patients],
        probabilities,
        [len(patient.images) for patient in cohort.patients],
        label_names=model.label_names,
        threshold=model.decision_threshold,
        labels=[patient.label for patient in cohort.patients],
    )


def _numbered(cohort: Cohort, names: Sequence[str]) -> NDArray[np.int64]:
    wrong = [patient for patient in cohort.patients if patient.label not in names]
    if wrong:
        raise ClinicalError(
            f"patient {wrong[0].patient_id!r} has the label {wrong[0].label!r}, expected one of {', '.join(names)}"
        )
    return np.array([names.index(patient.label) for patient in cohort.patients], dtype=np.int64)


def _inner_folds(train: Cohort, folds: int, seed: int) -> list[Fold]:
    row = {patient.patient_id: number for number, patient in enumerate(train.patients)}
    return [
        tuple(np.array([row[patient_id] for patient_id in ids]) for ids in (fold.train, fold.test))
        for fold in make_folds(train, folds, seed=seed)
    ]


# Blend ------------------------------------------------------------------------------------------------------


def blend(network: ArrayLike, clinical: ArrayLike, weight: float) -> NDArray[np.float64]:
    """Probabilities (n, C): the share `weight` of the clinical model, the rest of the network.

    Args:
        network, clinical: probabilities (n, C) of the same patients in the same order.
        weight: in [0, 1].

    Raises:
        ClinicalError: shapes that differ, or a weight outside [0, 1].
    """
    network, clinical = np.asarray(network, dtype=float), np.asarray(clinical, dtype=float)
    if network.shape != clinical.shape:
        raise ClinicalError(f"the two models predict different patients or classes: {network.shape}, {clinical.shape}")
    if not 0 <= weight <= 1:
        raise ClinicalError(f"weight of the clinical model must lie in [0, 1], got {weight}")
    return (1 - weight) * network + weight * clinical


def choose_blend(labels: ArrayLike, network: ArrayLike, clinical: ArrayLike) -> float:
    """The weight of the clinical model with the least log-loss, in steps of 0.05; the smallest of equal ones.

    Call it on validation patients only, that neither model was trained on, then freeze it.

    Args:
        labels: (n,) integers in 0..C-1.
        network, clinical: probabilities (n, C) of the same patients in the same order.

    Raises:
        ClinicalError: no patients, or shapes that differ.
        ValueError: as `metrics.score`.
    """
    labels, _ = check_predictions(labels, network)
    if len(labels) == 0:
        raise ClinicalError("no validation patients to choose the weight on")
    rows, weights = np.arange(len(labels)), np.arange(0, 1 + BLEND_STEP / 2, BLEND_STEP).round(2)
    of_truth = [blend(network, clinical, weight)[rows, labels] for weight in weights]
    losses = [-np.log(np.maximum(truth, _SMALLEST_PROBABILITY)).mean() for truth in of_truth]
    return float(weights[np.argmax(losses <= np.min(losses) + _ROUNDING)])
