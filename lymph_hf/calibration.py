"""Probabilities that mean what they say, and honest abstention: scaling of logits and conformal prediction sets.

Both are fitted on patients that the model was not trained on, and are small enough to be kept in a model's
configuration: `to_dict` gives plain JSON, `from_dict` reads it back.

With two classes no scaling changes the order of the patients, so AUROC and the ROC curve stay as they are, but the
threshold does not: fit the calibration first, then choose the threshold on calibrated probabilities.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logit, softmax

from .metrics_bootstrap import Bootstrap, Interval
from .metrics_checks import (
    Bools,
    Floats,
    Ints,
    check_labels,
    check_predictions,
    check_probabilities,
    check_share,
    ratio,
)

SLACK = 1e-6
"""Added to the limits of prediction sets: a calibration patient lies on the limit itself, and must stay inside whatever
the last digits of the arithmetic are. It can only raise the coverage. As in `LymphMILConfig.prediction_set`."""
REFER = -1
"""What `Conformal.decide` says of a patient who should go on to flow cytometry."""

# Standard deviations of the priors; see `fit_calibration`.
_LOG_SCALE_SPREAD = 1.0
_INTERCEPT_SPREAD = 2.0
_SMALLEST_PROBABILITY = 1e-12


class CalibrationError(ValueError):
    """Calibration cannot be fitted or read; the message says what to change."""


# Scaling ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TemperatureScaling:
    """softmax(logits / temperature), any number of classes (Guo et al., ICML 2017).

    Attributes:
        temperature: above 0; above 1 the model was too sure.
    """

    method: ClassVar[str] = "temperature"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("temperature", self.temperature)

    def apply(self, logits: ArrayLike) -> Floats:
        """Calibrated logits (n, C)."""
        return _check_logits(logits) / self.temperature

    def to_dict(self) -> dict[str, Any]:
        """`{"method": "temperature", "temperature": T}`."""
        return {"method": self.method, "temperature": self.temperature}


@dataclass(frozen=True)
class PlattScaling:
    """expit(slope * (z_1 - z_0) + intercept), two classes (Platt, 1999).

    Attributes:
        slope: above 0, so that no patient changes places with another.
        intercept: shift of the log-odds of class 1.
    """

    method: ClassVar[str] = "platt"
    slope: float = 1.0
    intercept: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("slope", self.slope)
        if not math.isfinite(self.intercept):
            raise CalibrationError(f"intercept must be finite, got {self.intercept}")

    def apply(self, logits: ArrayLike) -> Floats:
        """Calibrated logits (n, 2)."""
        odds = self.slope * _log_odds(_check_logits(logits)) + self.intercept
        return np.stack([-odds / 2, odds / 2], axis=1)

    def to_dict(self) -> dict[str, Any]:
        """`{"method": "platt", "slope": a, "intercept": b}`."""
        return {"method": self.method, "slope": self.slope, "intercept": self.intercept}


Scaling = TemperatureScaling | PlattScaling
SCALINGS: dict[str, type[Scaling]] = {scaling.method: scaling for scaling in (TemperatureScaling, PlattScaling)}


def scaling_from_dict(values: dict[str, Any]) -> Scaling:
    """The inverse of `to_dict`.

    Raises:
        CalibrationError: an unknown method, missing or unknown parameters, or one out of range.
    """
    values = dict(values)
    method = values.pop("method", None)
    if method not in SCALINGS:
        raise CalibrationError(f"calibration method {method!r}: expected one of {sorted(SCALINGS)}")
    try:
        return SCALINGS[method](**values)
    except TypeError as error:
        raise CalibrationError(f"calibration {method!r} with the parameters {sorted(values)}: {error}") from None


def fit_calibration(
    labels: ArrayLike, logits: ArrayLike, *, method: Literal["temperature", "platt"] = "temperature"
) -> Scaling:
    """Fit a scaling on validation patients, by penalised maximum likelihood with L-BFGS.

    The penalty is a weak prior that keeps the fit finite where the patients are told apart without error, which small
    validation sets often are, and that patients soon outweigh:

    - the scale s (1 / temperature, or the slope) has log s ~ N(0, 1): between 1/7 and 7 with probability 0.95. As the
      scale stays positive, calibration never reverses a ranking, not even that of a model worse than chance;
    - Platt's intercept has N(0, 2^2), on the scale of log-odds.

    Args:
        labels: (n,) integers in 0..C-1. Validation patients; never those that the result is reported on.
        logits: (n, C). Log-probabilities are logits too: `np.log(probabilities)`.
        method: `temperature` for any C; `platt` for two, which also moves the mean, as it must after training with
            class weights.

    Raises:
        CalibrationError: no patients, an unknown method, logits that are not finite, Platt scaling of more than two
            classes or with patients of one class only.
        ValueError: labels outside 0..C-1 or of another length.

    Example:
        >>> fit_calibration([0, 1, 0, 1] * 50, [[2.0, -2], [-2, 2], [-2, 2], [-2, 2]] * 50).temperature > 3
        True
    """
    logits = _check_logits(logits)
    labels = check_labels(labels, classes=logits.shape[1])
    if len(labels) != len(logits):
        raise ValueError(f"labels and logits differ in length: {len(labels)} and {len(logits)}")
    if len(labels) == 0:
        raise CalibrationError("no patients to fit a calibration on; hold some out for validation")
    if method == "temperature":
        (log_scale,) = _minimise(lambda theta: _temperature_loss(theta, labels, logits), parameters=1)
        return TemperatureScaling(temperature=math.exp(-log_scale))
    if method == "platt":
        odds = _log_odds(logits)
        if len(np.unique(labels)) < 2:
            raise CalibrationError(
                f"Platt scaling needs patients of both classes, got {len(labels)} of class {labels[0]} only;"
                " use a stratified validation set or method='temperature'"
            )
        log_scale, intercept = _minimise(lambda theta: _platt_loss(theta, labels, odds), parameters=2)
        return PlattScaling(slope=math.exp(log_scale), intercept=intercept)
    raise CalibrationError(f"method {method!r}: expected one of {sorted(SCALINGS)}")


def _temperature_loss(theta: Floats, labels: Ints, logits: Floats) -> tuple[float, Floats]:
    """Negative log posterior of log(1 / temperature), and its gradient."""
    scaled = math.exp(theta[0]) * logits
    rows = np.arange(len(labels))
    residual = softmax(scaled, axis=1)
    residual[rows, labels] -= 1
    loss = -log_softmax(scaled, axis=1)[rows, labels].sum() + theta[0] ** 2 / 2 / _LOG_SCALE_SPREAD**2
    return loss, np.array([(residual * scaled).sum() + theta[0] / _LOG_SCALE_SPREAD**2])


def _platt_loss(theta: Floats, labels: Ints, odds: Floats) -> tuple[float, Floats]:
    """Negative log posterior of (log slope, intercept), and its gradient."""
    log_scale, intercept = theta
    scaled = math.exp(log_scale) * odds
    linear = scaled + intercept
    residual = expit(linear) - labels
    loss = (np.logaddexp(0, linear) - labels * linear).sum()
    loss += log_scale**2 / 2 / _LOG_SCALE_SPREAD**2 + intercept**2 / 2 / _INTERCEPT_SPREAD**2
    gradient = [
        (residual * scaled).sum() + log_scale / _LOG_SCALE_SPREAD**2,
        residual.sum() + intercept / _INTERCEPT_SPREAD**2,
    ]
    return loss, np.array(gradient)


def _minimise(loss: Callable[[Floats], tuple[float, Floats]], parameters: int) -> list[float]:
    # Beyond e^+-10 the prior alone is worth 50 log-likelihoods; the bounds keep the exponential from overflowing.
    found = minimize(loss, np.zeros(parameters), jac=True, method="L-BFGS-B", bounds=[(-10, 10)] * parameters)
    return found.x.tolist()


def logits_of(probabilities: ArrayLike) -> Floats:
    """Logits (n, C) that a softmax takes back to these probabilities (n, C) or (n,); 0 becomes 1e-12."""
    return np.log(np.maximum(check_probabilities(probabilities), _SMALLEST_PROBABILITY))


def shift_prevalence(probabilities: ArrayLike, *, of_sample: float, to: float) -> Floats:
    """Probabilities (n, 2) where a share `to` of the patients is positive instead of `of_sample`.

    Bayes' rule with unchanged densities within each class: the log-odds move by logit(to) - logit(of_sample) (Saerens,
    Latinne and Decaestecker, Neural Computation 14:21, 2002). It assumes calibrated probabilities.

    Raises:
        ValueError: not two classes, or a share outside (0, 1).

    Example:
        >>> shift_prevalence([0.5], of_sample=0.5, to=0.2)[0, 1].item()
        0.2
    """
    moved = logit(check_share("to", to)) - logit(check_share("of_sample", of_sample))
    odds = _log_odds(logits_of(probabilities)) + moved
    return np.stack([expit(-odds), expit(odds)], axis=1)


def _check_logits(logits: ArrayLike) -> Floats:
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise CalibrationError(f"logits must have shape (n, C) with C >= 2, got {logits.shape}")
    if not np.isfinite(logits).all():
        row = int(np.isfinite(logits).all(axis=1).argmin())
        raise CalibrationError(f"logits must be finite, got {logits[row].tolist()} in row {row}")
    return logits


def _log_odds(logits: Floats) -> Floats:
    if logits.shape[1] != 2:
        raise CalibrationError(f"two classes expected, got {logits.shape[1]}; use method='temperature'")
    return logits[:, 1] - logits[:, 0]


def _check_positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise CalibrationError(f"{name} must be a finite number above 0, got {value!r}")


# Abstention -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conformal:
    """Sets of labels that hold the true one with a stated probability (split conformal prediction, LAC).

    A label belongs to a patient's set when 1 - its probability is at most the quantile of its class. A set of one
    label is a decision; any other goes on to flow cytometry. An empty set (no label fits well enough) is made the
    full one, which costs no coverage and says the same.

    Attributes:
        coverage: probability that the set holds the true label, over patients and draws of the calibration set.
        quantiles: one per class; infinite = the label is in every set, as too few patients were at hand to ever
            leave it out.
        calibrated_on: number of calibration patients of each class.
    """

    coverage: float
    quantiles: tuple[float, ...]
    calibrated_on: tuple[int, ...]

    def __post_init__(self) -> None:
        check_share("coverage", self.coverage)
        if len(self.quantiles) != len(self.calibrated_on) or len(self.quantiles) < 2:
            raise CalibrationError(
                f"expected one quantile and one number of patients per class, got {self.quantiles} and"
                f" {self.calibrated_on}"
            )

    def sets(self, probabilities: ArrayLike) -> Bools:
        """Which labels are in each patient's set, (n, C); at least one per row."""
        probabilities = check_probabilities(probabilities)
        if probabilities.shape[1] != len(self.quantiles):
            raise ValueError(f"expected {len(self.quantiles)} classes, got {probabilities.shape[1]}")
        fits = 1 - probabilities <= np.array(self.quantiles) + SLACK
        return fits | ~fits.any(axis=1, keepdims=True)

    def decide(self, probabilities: ArrayLike) -> Ints:
        """The label of each patient whose set holds one label only, `REFER` (-1) of the others, (n,)."""
        sets = self.sets(probabilities)
        return np.where(sets.sum(axis=1) == 1, sets.argmax(axis=1), REFER)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; an infinite quantile is None."""
        return {
            "coverage": self.coverage,
            "quantiles": [None if math.isinf(quantile) else quantile for quantile in self.quantiles],
            "calibrated_on": list(self.calibrated_on),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            CalibrationError: a field is missing or unknown.
        """
        if set(values) != {"coverage", "quantiles", "calibrated_on"}:
            raise CalibrationError(f"no saved prediction sets: fields {sorted(values)}")
        quantiles = tuple(math.inf if quantile is None else float(quantile) for quantile in values["quantiles"])
        return cls(float(values["coverage"]), quantiles, tuple(values["calibrated_on"]))


def fit_conformal(
    labels: ArrayLike, probabilities: ArrayLike, *, coverage: float = 0.9, per_class: bool = True
) -> Conformal:
    """Choose the sets on calibration patients so that they hold the true label with probability `coverage` or more.

    The quantile of n scores 1 - p(true label) is the ceil((n + 1) coverage)-th smallest, which covers a new patient
    with probability `coverage` or more whatever the model, if patients are exchangeable (Vovk, Gammerman and Shafer,
    Algorithmic Learning in a Random World, 2005; Sadinle, Lei and Wasserman, JASA 114:223, 2019). With
    n < coverage / (1 - coverage) there is no such score, and the label stays in every set: 9 patients are needed for
    0.9, 19 for 0.95, 99 for 0.99, of each class or in all.

    The guarantee holds for patients that chose nothing else. Validation patients that chose the epoch, the
    temperature or the threshold have seen a little better probabilities than new patients will; out-of-fold
    predictions, or a part of the patients set aside, have not.

    Args:
        labels: (n,) integers in 0..C-1.
        probabilities: (n, C), or for two classes (n,).
        coverage: 1 - alpha, strictly between 0 and 1.
        per_class: a quantile for each class, so that reactive and tumoral patients are each covered, whatever their
            shares (Mondrian); else one for all, which covers the mixture of this very cohort only.

    Raises:
        ValueError: as `metrics.score`; coverage outside (0, 1).

    Example:
        >>> fit_conformal([0, 1], [0.2, 0.9]).decide([0.01, 0.99]).tolist()  # two patients allow no decision
        [-1, -1]
    """
    labels, probabilities = check_predictions(labels, probabilities)
    coverage = check_share("coverage", coverage)
    classes = probabilities.shape[1]
    misfit = 1 - probabilities[np.arange(len(labels)), labels]  # (n,)
    if per_class:
        quantiles = tuple(_quantile(misfit[labels == c], coverage) for c in range(classes))
    else:
        quantiles = (_quantile(misfit, coverage),) * classes
    return Conformal(coverage, quantiles, tuple(np.bincount(labels, minlength=classes).tolist()))


def _quantile(misfit: Floats, coverage: float) -> float:
    """The ceil((n + 1) coverage)-th smallest, infinite when there are fewer."""
    # 20 * 0.95 is 19 and a hair; a whole number must not round up.
    rank = math.ceil((len(misfit) + 1) * coverage - 1e-9)
    return float(np.sort(misfit)[rank - 1]) if rank <= len(misfit) else math.inf


def abstention_intervals(
    labels: ArrayLike, probabilities: ArrayLike, conformal: Conformal, *, bootstrap: Bootstrap | None = None
) -> dict[str, Interval]:
    """What abstention costs and brings on patients that did not choose the sets, with bootstrap intervals.

    - `coverage`, `coverage_<c>`: share of the patients (of class c) whose set holds their label;
    - `referred`, `referred_<c>`: share of the patients (of class c) sent on to flow cytometry;
    - `accuracy_decided`: share of the decided patients whose label is right; NaN if none is decided.

    Raises:
        ValueError: as `metrics.score`; another number of classes than `conformal` has.
    """
    labels, probabilities = check_predictions(labels, probabilities)
    covered = conformal.sets(probabilities)[np.arange(len(labels)), labels]
    decided = conformal.decide(probabilities)
    member = {"": np.ones(len(labels), dtype=bool)}
    member |= {f"_{c}": labels == c for c in range(probabilities.shape[1])}

    def share(what: Bools, among: Bools, weights: Floats) -> Floats:
        return ratio(weights @ (what & among), weights @ among)

    def statistics(weights: Floats) -> dict[str, Floats]:
        found = {f"coverage{suffix}": share(covered, among, weights) for suffix, among in member.items()}
        found |= {f"referred{suffix}": share(decided == REFER, among, weights) for suffix, among in member.items()}
        return found | {"accuracy_decided": share(decided == labels, decided != REFER, weights)}

    return (bootstrap or Bootstrap()).intervals(statistics, len(labels))
