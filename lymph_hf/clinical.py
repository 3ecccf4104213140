"""The clinical-only model: what age, sex and lymphocyte count say without a single image.

It is the row that every image model must beat. Everything learnt from data (imputed values, scales, synthetic
patients, the classifier) is learnt inside `ClinicalModel.fit` from the patients given to it, so that no score of
other patients can be touched by them.
"""

import importlib
import json
import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import sklearn
from numpy.typing import ArrayLike, NDArray
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from .cohort import CLINICAL
from .files import write_json, writing_folder

logger = logging.getLogger(__name__)

Fold = tuple[NDArray[np.int64], NDArray[np.int64]]  # rows to learn from, rows held out

FEATURES = (*CLINICAL, "cells")
"""Columns of `Cohort.to_frame` that can be used; the number of cells is the bag-size baseline, no clinical value."""

_LOGARITHMIC = ("lymphocyte_count", "cells")
_SEXES = {"F": 0.0, "M": 1.0}
_SMOTE_NEIGHBOURS = 5
# What a saved pipeline holds beyond the types that skops trusts: the imputers' number format and a forest's trees.
_TRUSTED = ["numpy.dtype", "sklearn.tree._tree.Tree"]


class ClinicalError(ValueError):
    """The clinical model cannot be made of these values; the message says why and what to do."""


@dataclass(frozen=True)
class Kind:
    """A classifier: its settings, and where the search looks for better ones."""

    make: Callable[..., Any]
    defaults: Mapping[str, Any]
    space: Callable[[Any], dict[str, Any]]  # Optuna trial -> parameters


KINDS: dict[str, Kind] = {
    "logistic": Kind(
        LogisticRegression,
        {"C": 1.0, "max_iter": 1000},
        lambda trial: {"C": trial.suggest_float("C", 1e-3, 1e2, log=True)},
    ),
    "forest": Kind(
        RandomForestClassifier,
        {"n_estimators": 200, "min_samples_leaf": 5},
        lambda trial: {
            "max_depth": trial.suggest_int("max_depth", 1, 8),
            "min_samples_leaf": trial.suggest_int("min_samples_leaf", 1, 20),
            "max_features": trial.suggest_float("max_features", 0.3, 1.0),
        },
    ),
    "boosting": Kind(
        GradientBoostingClassifier,
        {"n_estimators": 100, "learning_rate": 0.05, "max_depth": 2, "min_samples_leaf": 5, "subsample": 0.8},
        lambda trial: {
            "n_estimators": trial.suggest_int("n_estimators", 20, 200),
            "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
            "max_depth": trial.suggest_int("max_depth", 1, 3),
            "min_samples_leaf": trial.suggest_int("min_samples_leaf", 1, 20),
        },
    ),
}


@dataclass(frozen=True)
class ClinicalSettings:
    """What is fitted.

    Attributes:
        kind: a name in `KINDS`.
        features: names in `FEATURES`, each once.
        smote: add synthetic patients of the smaller classes until all are equal (SMOTE-NC, Chawla et al., JAIR 16:321,
            2002). Off by default: it does not improve the ranking and ruins the calibration (van den Goorbergh et al.,
            JAMIA 29:1525, 2022).
        seed: of the classifier and of SMOTE.
        parameters: of the classifier, over the defaults of its kind.

    Raises:
        ClinicalError: an unknown kind or feature.
    """

    kind: Literal["logistic", "forest", "boosting"] = "logistic"
    features: tuple[str, ...] = CLINICAL
    smote: bool = False
    seed: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ClinicalError(f"kind {self.kind!r}: expected one of {', '.join(KINDS)}")
        wrong = [name for name in self.features if name not in FEATURES]
        if wrong or not self.features or len(set(self.features)) < len(self.features):
            raise ClinicalError(f"features {list(self.features)}: expected some of {', '.join(FEATURES)}, each once")
        if self.smote and not self.numeric:
            raise ClinicalError("SMOTE interpolates between numbers: add age or a count to the features, or leave it")

    @property
    def numeric(self) -> list[int]:
        """Columns of the features that are numbers."""
        return [column for column, name in enumerate(self.features) if name != "sex"]

    def classifier(self) -> Any:
        """The classifier, not yet fitted.

        Raises:
            ClinicalError: it does not know one of the parameters.
        """
        kind = KINDS[self.kind]
        try:
            return kind.make(**{**kind.defaults, "random_state": self.seed, **self.parameters})
        except TypeError as error:
            raise ClinicalError(f"parameters {dict(self.parameters)} of {self.kind}: {error}") from None


class ClinicalModel:
    """A classifier of patients by their clinical values.

    Age and the logarithm of the counts are imputed with the median and standardised, sex is imputed with the more
    frequent one, and every feature brings an indicator of being missing.

    Args:
        settings: what is fitted; None means `ClinicalSettings()`.

    Attributes:
        label_names: names of the classes, in their order; empty until somebody sets them.
        decision_threshold: class 1 of two is decided at this probability; to be chosen on validation patients.

    Example:
        >>> frame = pd.DataFrame({"age": [30, 40, 70, None], "sex": list("FMFM"), "lymphocyte_count": [4, 5, 30, 90]})
        >>> model = ClinicalModel().fit(frame, [0, 0, 1, 1])
        >>> model.predict_proba(frame).shape
        (4, 2)
    """

    def __init__(self, settings: ClinicalSettings | None = None) -> None:
        self.settings = settings or ClinicalSettings()
        self.pipeline: Pipeline | None = None
        self.label_names: tuple[str, ...] = ()
        self.decision_threshold = 0.5

    def fit(self, frame: pd.DataFrame, labels: ArrayLike) -> Self:
        """Learn from these patients.

        Args:
            frame: one row per patient, as `Cohort.to_frame` gives it; None and NaN are missing.
            labels: (n,) integers in 0..C-1, each at least once.

        Raises:
            ClinicalError: a column is absent, an impossible value, labels with gaps, too few patients for SMOTE, or
                SMOTE without imbalanced-learn.
        """
        values, labels = self._values(frame), _checked_labels(labels, len(frame))
        steps = [("prepare", self._preparation()), ("classify", self.settings.classifier())]
        if self.settings.smote:
            # The sampler stands in the pipeline, behind the preparation, and is gone once it is fitted.
            sampling = _optional("imblearn.pipeline", "imbalanced-learn").Pipeline
            fitted = sampling([steps[0], ("smote", self._smote(labels)), steps[1]]).fit(values, labels)
            self.pipeline = Pipeline([("prepare", fitted["prepare"]), ("classify", fitted["classify"])])
        else:
            self.pipeline = Pipeline(steps).fit(values, labels)
        return self

    def predict_proba(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """Probabilities (n, C) of patients with any values missing; rows sum to 1.

        Raises:
            ClinicalError: not fitted, a column is absent, or an impossible value.
        """
        if self.pipeline is None:
            raise ClinicalError("this model is not fitted: call fit first")
        return self.pipeline.predict_proba(self._values(frame))

    def save(self, folder: str | Path) -> None:
        """Write `clinical.json` (settings, readable) and `model.skops` (the fitted pipeline; no pickle), in one step.

        Raises:
            ClinicalError: not fitted, or skops is not installed.
        """
        if self.pipeline is None:
            raise ClinicalError("this model is not fitted: there is nothing to save")
        record = {
            "settings": asdict(self.settings),
            "label_names": list(self.label_names),
            "decision_threshold": self.decision_threshold,
            "scikit_learn": sklearn.__version__,
            "coefficients": self.coefficients(),
        }
        with writing_folder(folder) as beside:
            write_json(beside / "clinical.json", record)
            _optional("skops.io", "skops").dump(self.pipeline, beside / "model.skops", compression=zipfile.ZIP_DEFLATED)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The inverse of `save`.

        Raises:
            ClinicalError: no such folder, or the file holds types that a clinical model has not.
        """
        folder, skops = Path(folder), _optional("skops.io", "skops")
        try:
            record = json.loads((folder / "clinical.json").read_text(encoding="utf-8"))
            foreign = set(skops.get_untrusted_types(file=folder / "model.skops")) - set(_TRUSTED)
            if foreign:
                raise ClinicalError(f"{folder}: model.skops holds foreign types {sorted(foreign)}; it is not loaded")
            pipeline = skops.load(folder / "model.skops", trusted=_TRUSTED)
        except OSError as error:
            raise ClinicalError(f"{folder}: no clinical model there ({error})") from error
        if record["scikit_learn"].split(".")[:2] != sklearn.__version__.split(".")[:2]:
            logger.warning(
                "%s was fitted with scikit-learn %s; this is %s", folder, record["scikit_learn"], sklearn.__version__
            )
        settings = record["settings"] | {"features": tuple(record["settings"]["features"])}
        model = cls(ClinicalSettings(**settings))
        model.pipeline = pipeline
        model.label_names = tuple(record["label_names"])
        model.decision_threshold = record["decision_threshold"]
        return model

    def coefficients(self) -> dict[str, list[float]] | None:
        """Log-odds per feature and class of a logistic regression, per standard deviation of a number; else None."""
        if self.settings.kind != "logistic" or self.pipeline is None:
            return None
        classifier = self.pipeline["classify"]
        columns = dict(zip(self.column_names, classifier.coef_.T.tolist(), strict=True))
        return {"intercept": classifier.intercept_.tolist(), **columns}

    @property
    def column_names(self) -> list[str]:
        """Columns that the classifier sees: numbers, sex, and an indicator for each feature."""
        names = [f"log {name}" if name in _LOGARITHMIC else name for name in self.settings.features]
        numbers = [names[column] for column in self.settings.numeric]
        sex = ["male"] if "sex" in self.settings.features else []
        return numbers + sex + [f"{name} missing" for name in self.settings.features]

    def _values(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """(n, features) as numbers: counts as logarithms, sex as 0 (female) or 1 (male), NaN = missing."""
        absent = [name for name in self.settings.features if name not in frame]
        if absent:
            raise ClinicalError(f"the table has no column {', '.join(absent)}, only {', '.join(map(str, frame))}")
        return np.column_stack([_numbers(frame, name) for name in self.settings.features])

    def _preparation(self) -> ColumnTransformer:
        every, numeric = list(range(len(self.settings.features))), self.settings.numeric
        # A feature nobody has is kept as 0, so that the columns are the same whatever is missing.
        number = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
        sex = SimpleImputer(strategy="most_frequent", keep_empty_features=True)
        return ColumnTransformer(
            [
                ("number", number, numeric),
                ("sex", sex, [column for column in every if column not in numeric]),
                ("missing", MissingIndicator(features="all"), every),
            ]
        )

    def _smote(self, labels: NDArray[np.int64]) -> Any:
        fewest = int(np.bincount(labels).min())
        if fewest < 2:
            raise ClinicalError("SMOTE needs at least two patients of each class to interpolate between; switch it off")
        return _optional("imblearn.over_sampling", "imbalanced-learn").SMOTENC(
            categorical_features=list(range(len(self.settings.numeric), len(self.column_names))),
            k_neighbors=min(_SMOTE_NEIGHBOURS, fewest - 1),
            random_state=self.settings.seed,
        )


def out_of_fold(
    settings: ClinicalSettings, frame: pd.DataFrame, labels: ArrayLike, folds: Sequence[Fold]
) -> NDArray[np.float64]:
    """Probabilities (n, C) of each patient by a model that has not seen it; NaN for patients no fold holds out.

    Args:
        settings: of every model.
        frame, labels: as in `ClinicalModel.fit`.
        folds: rows to learn from and rows held out, for each fold.

    Raises:
        ClinicalError: as `ClinicalModel.fit`; a fold learns from a patient that it holds out.
    """
    labels = _checked_labels(labels, len(frame))
    probabilities = np.full((len(frame), labels.max() + 1), np.nan)
    for train, held_out in folds:
        if np.intersect1d(train, held_out).size:
            raise ClinicalError("a fold learns from patients that it holds out")
        model = ClinicalModel(settings).fit(frame.iloc[train], labels[train])
        probabilities[held_out] = model.predict_proba(frame.iloc[held_out])
    return probabilities


def tune(
    settings: ClinicalSettings, frame: pd.DataFrame, labels: ArrayLike, folds: Sequence[Fold], *, trials: int = 30
) -> ClinicalSettings:
    """The settings with the parameters of the lowest out-of-fold log-loss that Optuna finds (TPE, seeded).

    Give it training patients only: it is the inner loop of a nested cross-validation. The defaults of the kind are the
    first trial, so that the search never ends worse than it began.

    Args:
        settings: kind, features, SMOTE and seed stay as they are.
        folds: inner folds of these patients.
        trials: settings to try, at least 1.

    Raises:
        ClinicalError: as `out_of_fold`; trials below 1, or Optuna is not installed.
    """
    if trials < 1:
        raise ClinicalError(f"trials must be at least 1, got {trials}")
    labels = _checked_labels(labels, len(frame))
    optuna = _optional("optuna", "optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def loss(parameters: Mapping[str, Any]) -> float:
        probabilities = out_of_fold(replace(settings, parameters=parameters), frame, labels, folds)
        held_out = ~np.isnan(probabilities[:, 0])
        return log_loss(labels[held_out], probabilities[held_out], labels=range(probabilities.shape[1]))

    start = dict(settings.parameters)
    best, least = start, loss(start)
    space = KINDS[settings.kind].space
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=settings.seed))
    for _ in range(trials - 1):
        trial = study.ask()
        parameters = start | space(trial)
        found = loss(parameters)
        study.tell(trial, found)
        if found < least:
            best, least = parameters, found
    logger.info("clinical %s: out-of-fold log-loss %.4f with %s", settings.kind, least, best or "its defaults")
    return replace(settings, parameters=best)


def _numbers(frame: pd.DataFrame, name: str) -> NDArray[np.float64]:
    column = frame[name]
    if name == "sex":
        known = column[column.notna() & (column != "")]
        _refuse(frame, known[~known.isin(list(_SEXES))], name, "F, M or missing")
        return column.map(_SEXES).to_numpy(dtype=float)
    values = pd.to_numeric(column, errors="coerce")
    _refuse(frame, column[values.isna() & column.notna()], name, "a number or missing")
    _refuse(frame, column[np.isinf(values)], name, "a finite number")
    if name in _LOGARITHMIC:
        _refuse(frame, column[values <= 0], name, "a number above 0 or missing")
        return np.log(values.to_numpy(dtype=float))
    return values.to_numpy(dtype=float)


def _refuse(frame: pd.DataFrame, wrong: pd.Series, name: str, expected: str) -> None:
    if len(wrong):
        row = wrong.index[0]
        patient = frame.loc[row, "patient_id"] if "patient_id" in frame else f"in row {row}"
        raise ClinicalError(f"patient {patient}: {name} is {wrong.iloc[0]!r}, expected {expected}; correct the table")


def _checked_labels(labels: ArrayLike, patients: int) -> NDArray[np.int64]:
    labels = np.asarray(labels)
    if labels.shape != (patients,) or labels.dtype.kind not in "iu":
        raise ClinicalError(f"expected {patients} integer labels, got shape {labels.shape} of {labels.dtype}")
    found = np.unique(labels)
    if len(found) < 2 or not np.array_equal(found, np.arange(len(found))):
        raise ClinicalError(f"expected patients of every class 0..C-1, at least two classes, got {found.tolist()}")
    return labels.astype(np.int64)


def _optional(module: str, package: str) -> Any:
    """A module of the training extra, imported where it is needed: loading a cohort or a network needs none of them."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ClinicalError(f"{package} is not installed ({error}): pip install 'lymph-hf[train]'") from error
