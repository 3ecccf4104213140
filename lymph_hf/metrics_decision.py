"""Scores that speak of decisions: operating points, predictive values at a stated prevalence, net benefit.

Two classes only; class 1, the positive one, is decided when its probability >= the threshold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit, ndtri

from .metrics_bootstrap import Bootstrap, Interval
from .metrics_checks import Bools, Floats, both_classes, check_share, check_threshold, log_odds, ratio, two_classes
from .metrics_curves import roc_counts, weight_by_distinct_value

# Shares of whole patients that should be equal differ by rounding.
_ROUNDING = 1e-9

Criterion = Literal["balanced_accuracy", "accuracy"]


# Threshold --------------------------------------------------------------------------------------------------


def choose_threshold(
    labels: ArrayLike, probabilities: ArrayLike, *, criterion: Criterion = "balanced_accuracy", resamples: int = 200
) -> float:
    """A decision threshold for new patients. Call it on validation patients only, then freeze it.

    The best threshold of a few patients hangs on one or two of them, so it is bagged (Breiman, Machine Learning 24:123,
    1996): the mean, as logits, of the best thresholds of resamples within each class. It depends neither on the order
    of the patients nor on chance. Where a model tells next to nothing, the best thresholds lie at both ends and their
    mean between them: if that is no better here than to call all patients alike, the best threshold is taken.

    Args:
        criterion: what a threshold is to maximise.
        resamples: at least 1.

    Raises:
        ValueError: as `best_threshold`.

    Example:
        >>> round(choose_threshold([0, 0, 1, 1], [0.25, 0.5, 0.75, 0.875]), 2)
        0.62
    """
    positive, ranked_by = both_classes(labels, probabilities, "a threshold")
    rng = np.random.default_rng(0)
    classes = [np.sort(ranked_by[positive == side]) for side in (False, True)]
    sides = np.repeat([0, 1], [len(members) for members in classes])
    found = []
    for _ in range(resamples):
        drawn = np.concatenate([rng.choice(members, len(members)) for members in classes])
        found.append(best_threshold(sides, drawn, criterion=criterion))
    bagged = float(expit(np.mean(log_odds(found))))
    above = [np.count_nonzero(members >= bagged) for members in classes]
    sizes = [len(members) for members in classes]
    reached = _merit(above[1], sizes[0] - above[0], sizes, criterion)
    alike = max(_merit(0, sizes[0], sizes, criterion), _merit(sizes[1], 0, sizes, criterion))
    return bagged if reached > alike else best_threshold(labels, probabilities, criterion=criterion)


def best_threshold(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    criterion: Criterion = "balanced_accuracy",
) -> float:
    """The threshold that maximises `criterion` on these patients; for others take `choose_threshold`.

    Candidates are the midpoints between consecutive distinct probabilities; among equally good ones the
    nearest to 0.5 wins, then the lower one. A model that gives every patient the same probability has no
    candidate: 0.5.

    Raises:
        ValueError: as `metrics.score`; not two classes, patients of one class only, unknown criterion.

    Example:
        >>> best_threshold([0, 0, 1, 1], [0.25, 0.5, 0.75, 0.875])
        0.625
    """
    positive, ranked_by = both_classes(labels, probabilities, "a threshold")
    positives, negatives = weight_by_distinct_value(positive, ranked_by, np.ones((1, len(positive))))
    true_positives = positives[0].cumsum()[:-1]  # deciding class 1 above each gap between distinct values
    true_negatives = negatives[0].sum() - negatives[0].cumsum()[:-1]
    merit = _merit(true_positives, true_negatives, (negatives.sum(), positives.sum()), criterion)
    if len(merit) == 0:
        return 0.5
    distinct = np.unique(ranked_by)
    lower, upper = distinct[:-1], distinct[1:]
    midpoints = lower + (upper - lower) / 2
    # Between neighbouring floats the midpoint rounds to one of them; the lower one must stay below the
    # threshold.
    midpoints = np.where(midpoints > lower, midpoints, upper)
    best = midpoints[merit[::-1] == merit.max()]
    return float(best[np.argmin(np.abs(best - 0.5))])


def _merit(
    true_positives: ArrayLike, true_negatives: ArrayLike, sizes: Sequence[float], criterion: Criterion
) -> np.ndarray:
    """What rises with the criterion, in whole numbers, so that what is equally good compares equal.

    Args:
        sizes: patients of class 0 and of class 1.
    """
    true_positives, true_negatives = np.asarray(true_positives), np.asarray(true_negatives)
    if criterion == "balanced_accuracy":
        return true_positives * sizes[0] + true_negatives * sizes[1]
    if criterion == "accuracy":
        return true_positives + true_negatives
    raise ValueError(f"criterion must be 'balanced_accuracy' or 'accuracy', got {criterion!r}")


# Operating points -------------------------------------------------------------------------------------------


def sensitivity_at_specificity(
    labels: ArrayLike, probabilities: ArrayLike, specificity: float, *, bootstrap: Bootstrap | None = None
) -> Interval:
    """The highest sensitivity that any threshold reaches with at least this specificity.

    Nothing is interpolated between the cuts that the patients allow. The cut is chosen anew in each resample, so that
    the interval holds the doubt about it; the score is still that of a cut chosen on these very patients. What a
    threshold frozen on other patients reaches is `sensitivity` in `metrics.bootstrap_intervals`.

    Args:
        specificity: strictly between 0 and 1.

    Raises:
        ValueError: as `metrics.score`; not two classes, specificity outside (0, 1).

    Example:
        >>> sensitivity_at_specificity([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], 0.9).value
        0.5
    """
    positive, predicted = two_classes(labels, probabilities, "sensitivity at a specificity")
    return _best_recall(positive, predicted, check_share("specificity", specificity), bootstrap)


def specificity_at_sensitivity(
    labels: ArrayLike, probabilities: ArrayLike, sensitivity: float, *, bootstrap: Bootstrap | None = None
) -> Interval:
    """The highest specificity that any threshold reaches with at least this sensitivity.

    The reverse of `sensitivity_at_specificity`, which see.

    Raises:
        ValueError: as `metrics.score`; not two classes, sensitivity outside (0, 1).
    """
    positive, predicted = two_classes(labels, probabilities, "specificity at a sensitivity")
    return _best_recall(~positive, -predicted, check_share("sensitivity", sensitivity), bootstrap)


def _best_recall(wanted: Bools, ranked_by: Floats, other_recall: float, bootstrap: Bootstrap | None) -> Interval:
    """Best share of the wanted class above a cut that leaves `other_recall` of the other class below it."""

    def statistics(weights: Floats) -> dict[str, Floats]:
        if len(wanted) == 0:
            return {"recall": np.full(len(weights), np.nan)}
        found, false = roc_counts(wanted, ranked_by, weights)  # (R, G + 1)
        allowed = false <= (1 - other_recall) * false[:, -1:] + _ROUNDING
        best = np.where(allowed, found, 0).max(axis=1)
        return {"recall": ratio(best, np.where(false[:, -1] > 0, found[:, -1], 0))}

    return (bootstrap or Bootstrap()).intervals(statistics, len(wanted))["recall"]


# Predictive values ------------------------------------------------------------------------------------------


def predictive_values(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    prevalence: float,
    threshold: float = 0.5,
    bootstrap: Bootstrap | None = None,
) -> dict[str, Interval]:
    """`ppv` and `npv` where a share `prevalence` of the patients is positive.

    Sensitivity and specificity are those of the sample, Bayes' rule carries them to the prevalence:
    ppv = se p / (se p + (1 - sp) (1 - p)), npv = sp (1 - p) / (sp (1 - p) + (1 - se) p). A cohort of
    patients chosen by their diagnosis, as most are, has no predictive value of its own.

    Where the sample holds no error of the kind in question, no resample does, and a bootstrap interval would have no
    width. There, for a value of exactly 0 or 1, stands the interval on the logit scale of Mercaldo, Lau and Zhou
    (Statistics in Medicine 26:2170, 2007), with their adjusted sensitivity and specificity (z^2 / 2 patients more
    on either side).

    Args:
        prevalence: share of positive patients where the model is to be used, strictly between 0 and 1.
        threshold: the frozen one.

    Raises:
        ValueError: as `metrics.score`; not two classes, prevalence outside (0, 1).

    Example:
        >>> found = predictive_values([0, 0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.7, 0.6, 0.9], prevalence=0.2)
        >>> round(found["ppv"].value, 3)  # 1 * 0.2 / (1 * 0.2 + 0.25 * 0.8)
        0.5
    """
    positive, predicted = two_classes(labels, probabilities, "a predictive value")
    prevalence, threshold = check_share("prevalence", prevalence), check_threshold(threshold)
    decided = predicted >= threshold
    bootstrap = bootstrap or Bootstrap()

    def statistics(weights: Floats) -> dict[str, Floats]:
        sensitivity = ratio(weights @ (decided & positive), weights @ positive)
        specificity = ratio(weights @ ~(decided | positive), weights @ ~positive)
        return bayes(sensitivity, specificity, prevalence)

    found = bootstrap.intervals(statistics, len(positive))
    for name, interval in found.items():
        if interval.value in (0.0, 1.0):
            found[name] = _logit_interval(name, interval, positive, decided, prevalence)
    return found


def bayes(sensitivity: Floats, specificity: Floats, prevalence: float) -> dict[str, Floats]:
    """`ppv` and `npv` by Bayes' rule; NaN where no patient would get that answer."""
    true_positive, false_positive = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    true_negative, false_negative = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    return {
        "ppv": ratio(true_positive, true_positive + false_positive),
        "npv": ratio(true_negative, true_negative + false_negative),
    }


def _logit_interval(name: str, interval: Interval, positive: Bools, decided: Bools, prevalence: float) -> Interval:
    """Mercaldo's interval of a value of 0 or 1; the value itself stays, and belongs to the interval."""
    z = ndtri((1 + interval.level) / 2)
    positives, negatives = positive.sum() + z**2, (~positive).sum() + z**2
    sensitivity = ((decided & positive).sum() + z**2 / 2) / positives
    specificity = ((~(decided | positive)).sum() + z**2 / 2) / negatives
    centre = logit(bayes(sensitivity, specificity, prevalence)[name])
    if name == "ppv":
        variance = (1 - sensitivity) / sensitivity / positives + specificity / (1 - specificity) / negatives
    else:
        variance = sensitivity / (1 - sensitivity) / positives + (1 - specificity) / specificity / negatives
    low, high = expit(centre + np.array([-z, z]) * math.sqrt(variance))
    bounds = min(float(low), interval.value), max(float(high), interval.value)
    return Interval(interval.value, *bounds, interval.level, interval.dropped)


# Net benefit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit against the threshold probability, per patient.

    Attributes:
        thresholds: T threshold probabilities, rising.
        model: net benefit of sending on the patients whose probability is at least the threshold.
        treat_all: net benefit of sending on every patient; sending on nobody has 0.
        prevalence: share of positive patients that the net benefits stand for.
    """

    thresholds: tuple[float, ...]
    model: tuple[Interval, ...]
    treat_all: tuple[Interval, ...]
    prevalence: float

    def to_rows(self) -> list[dict[str, float | None]]:
        """One dictionary per threshold, for a table or JSON."""
        return [
            {
                "threshold": threshold,
                "net_benefit": model.as_dict()["value"],
                "low": model.as_dict()["low"],
                "high": model.as_dict()["high"],
                "treat_all": treat_all.as_dict()["value"],
            }
            for threshold, model, treat_all in zip(self.thresholds, self.model, self.treat_all, strict=True)
        ]


def decision_curve(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    thresholds: Sequence[float] | None = None,
    prevalence: float | None = None,
    bootstrap: Bootstrap | None = None,
) -> DecisionCurve:
    """Net benefit of the model and of sending on everybody (Vickers and Elkin, Med. Decis. Making 26:565, 2006).

    At threshold probability t a missed positive weighs as much as (1 - t) / t needless examinations:
    net benefit = TP / n - FP / n * t / (1 - t).

    Args:
        thresholds: rising, each strictly between 0 and 1; None means 0.01, 0.02, ... 0.99.
        prevalence: share of positive patients where the model is to be used. Sensitivity and specificity of the
            sample then stand for net benefit = se p - (1 - sp) (1 - p) t / (1 - t), and the probabilities must be
            those for that prevalence too (`calibration.shift_prevalence`). None means the share in the sample.
        bootstrap: how intervals are made; None means `Bootstrap()`.

    Raises:
        ValueError: as `metrics.score`; not two classes, patients of one class only, thresholds or prevalence outside
            (0, 1), thresholds that do not rise.

    Example:
        >>> curve = decision_curve([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], thresholds=[0.5])
        >>> curve.model[0].value, curve.treat_all[0].value  # 1/4 - 1/4 * 1, 2/4 - 2/4 * 1
        (0.0, 0.0)
    """
    positive, predicted = both_classes(labels, probabilities, "a decision curve")
    at = np.arange(1, 100) / 100 if thresholds is None else np.asarray(thresholds, dtype=float)
    if at.ndim != 1 or len(at) == 0 or not ((at > 0) & (at < 1)).all() or (np.diff(at) <= 0).any():
        raise ValueError(f"thresholds must rise strictly between 0 and 1, got {thresholds}")
    decided = (predicted[:, None] >= at).astype(float)  # (n, T)
    odds = at / (1 - at)
    strategies = {"model": decided, "treat_all": np.ones_like(decided)}

    def statistics(weights: Floats) -> dict[tuple[str, int], Floats]:
        positives, negatives = (weights @ member for member in (positive, ~positive))
        share = positives / (positives + negatives) if prevalence is None else np.full(len(weights), prevalence)
        found = {}
        for name, sent_on in strategies.items():
            true_positive = _share_of(weights @ (sent_on * positive[:, None]), positives, prevalence)
            false_positive = _share_of(weights @ (sent_on * ~positive[:, None]), negatives, prevalence)
            benefit = true_positive * share[:, None] - false_positive * (1 - share)[:, None] * odds
            found |= {(name, column): benefit[:, column] for column in range(len(at))}
        return found

    if prevalence is not None:
        check_share("prevalence", prevalence)
    intervals = (bootstrap or Bootstrap()).intervals(statistics, len(positive))
    model, treat_all = (tuple(intervals[name, column] for column in range(len(at))) for name in strategies)
    return DecisionCurve(
        tuple(at.tolist()), model, treat_all, float(positive.mean()) if prevalence is None else prevalence
    )


def _share_of(sent_on: Floats, members: Floats, prevalence: float | None) -> Floats:
    """Share of a class that is sent on, (R, T). A resample without the class has none of it to send on, unless a
    stated prevalence asks what would happen to it: NaN."""
    share = ratio(sent_on, members[:, None])
    return np.nan_to_num(share) if prevalence is None else share
