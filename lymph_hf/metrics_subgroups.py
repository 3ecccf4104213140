"""Scores within groups of patients, and scores against the number of patients that a model was trained on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .metrics import weighted_scores
from .metrics_bootstrap import Bootstrap, Interval
from .metrics_checks import Floats, Ints, check_labels, check_predictions, check_threshold

MISSING = "missing"
AGE_EDGES = (50.0, 65.0, 80.0)  # years
# 10^9 lymphocytes per litre: chronic lymphocytic leukaemia begins at 5 (of clonal B cells), and a count above 10 has
# a specificity of 90 % for a tumour (PMID 24964258).
COUNT_EDGES = (5.0, 10.0)


@dataclass(frozen=True)
class Subgroup:
    """Scores of the patients of one group; `n` and `positives` (patients of class 1) say how much they can bear."""

    variable: str
    group: str
    n: int
    positives: int
    scores: dict[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """The fields for strict JSON."""
        plain = {name: getattr(self, name) for name in ("variable", "group", "n", "positives")}
        return plain | {"scores": {name: interval.as_dict() for name, interval in self.scores.items()}}


def clinical_groups(age: ArrayLike, sex: Sequence[str | None], lymphocyte_count: ArrayLike) -> dict[str, list[str]]:
    """The groups in which a triage model is looked at: age and lymphocyte count in bands, and sex.

    Args:
        age: (n,) years, NaN = missing.
        sex: (n,) "F", "M", and None, NaN or "" = missing.
        lymphocyte_count: (n,) 10^9 cells per litre, NaN = missing.

    Returns:
        variable -> name of each patient's group, as `subgroup_scores` takes it.
    """
    names = {"F": "female", "M": "male"}
    return {
        "age": bands(age, AGE_EDGES, "years"),
        "sex": [names.get(code, MISSING) for code in sex],
        "lymphocyte count": bands(lymphocyte_count, COUNT_EDGES, "· 10⁹/L"),
    }


def bands(values: ArrayLike, edges: Sequence[float], unit: str) -> list[str]:
    """The band of each value, (n,): "< 50 years", "50 to < 65 years", "≥ 65 years"; a missing value has its own.

    Args:
        edges: rising, at least one; a value at an edge belongs above it.

    Raises:
        ValueError: edges that do not rise.
    """
    values, edges = np.asarray(values, dtype=float), np.asarray(edges, dtype=float)
    if len(edges) == 0 or (np.diff(edges) <= 0).any():
        raise ValueError(f"edges must rise, got {edges.tolist()}")
    names = [f"< {edges[0]:g} {unit}"]
    names += [f"{low:g} to < {high:g} {unit}" for low, high in pairwise(edges)]
    names += [f"≥ {edges[-1]:g} {unit}"]
    of_value = np.searchsorted(edges, values, side="right")
    return [MISSING if np.isnan(value) else names[band] for value, band in zip(values, of_value, strict=True)]


def subgroup_scores(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: Mapping[str, Sequence[str]],
    *,
    threshold: float = 0.5,
    bootstrap: Bootstrap | None = None,
) -> list[Subgroup]:
    """Every score of `metrics.score` in each group, with intervals from resampling the patients of that group.

    A group of one class has no AUROC (NaN), and a group without an error has intervals without width however few its
    patients: read `n` first.

    Args:
        groups: variable -> (n,) name of each patient's group; `clinical_groups` makes the usual ones.
        threshold: the frozen one, the same for every group.
        bootstrap: how intervals are made; None means `Bootstrap()`.

    Returns:
        For each variable its groups: in numeric order where the names are bands, else sorted; missing values last.

    Raises:
        ValueError: as `metrics.score`; a variable of another length.
    """
    labels, probabilities = check_predictions(labels, probabilities)
    threshold, bootstrap = check_threshold(threshold), bootstrap or Bootstrap()
    found = []
    for variable, of_patient in groups.items():
        if len(of_patient) != len(labels):
            raise ValueError(f"groups of {variable!r} and labels differ in length: {len(of_patient)} and {len(labels)}")
        names = np.asarray(of_patient, dtype=object)
        for group in sorted(set(of_patient), key=_order):
            member = names == group
            inside = labels[member], probabilities[member]
            scores = bootstrap.intervals(
                lambda weights, inside=inside: weighted_scores(*inside, threshold, weights), int(member.sum())
            )
            found.append(Subgroup(variable, group, int(member.sum()), int((inside[0] == 1).sum()), scores))
    return found


def _order(group: str) -> tuple[bool, float, str]:
    """Missing last; a band by its lower edge, "< 50" first of all."""
    first, _, _ = group.partition(" ")
    if first == "<":
        return False, -np.inf, group
    number = first if first != "≥" else group.split(" ")[1]
    try:
        return group == MISSING, float(number), group
    except ValueError:
        return group == MISSING, 0.0, group


# Learning curve ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearningPoint:
    """A score after training on `patients` patients: its mean over repetitions, and the least and the greatest.

    The interval is that of the mean over resamples of the scored patients; the range is what the choice of training
    patients does.
    """

    patients: int
    score: Interval
    lowest: float
    highest: float


def nested_subsets(labels: ArrayLike, sizes: Sequence[int], *, seed: int = 0) -> list[Ints]:
    """Rows of ever larger stratified subsets of the training patients, each holding all rows of the smaller ones.

    All classes fill up evenly, and each has at least one patient in every subset.

    Args:
        labels: (n,) integers from 0.
        sizes: rising numbers of patients, from the number of classes to n.

    Raises:
        ValueError: sizes that do not rise or lie outside that range.
    """
    labels = np.asarray(labels)
    labels = check_labels(labels, classes=int(labels.max(initial=1)) + 1)
    classes = np.unique(labels)
    rising = len(sizes) > 0 and (np.diff(sizes) > 0).all()
    if not rising or sizes[0] < len(classes) or sizes[-1] > len(labels):
        raise ValueError(f"sizes must rise from at least {len(classes)} to at most {len(labels)}, got {list(sizes)}")
    rng = np.random.default_rng(seed)
    # Each patient's place within its class, as a share: the order in which all classes fill up evenly. The first of
    # each class goes before everything else.
    place = np.empty(len(labels))
    for member in classes:
        rows = rng.permutation(np.flatnonzero(labels == member))
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        place[rows[0]] = -1.0
    order = np.lexsort((rng.permutation(len(labels)), place))
    return [np.sort(order[:size]) for size in sizes]


def learning_curve(
    predict: Callable[[Ints], ArrayLike],
    train_labels: ArrayLike,
    labels: ArrayLike,
    *,
    sizes: Sequence[int],
    score: str = "auroc",
    repeats: int = 5,
    threshold: float = 0.5,
    seed: int = 0,
    bootstrap: Bootstrap | None = None,
) -> list[LearningPoint]:
    """A score on fixed patients against the number of patients trained on.

    Args:
        predict: trains on some rows of the training patients and returns the probabilities of the scored patients.
        train_labels: (m,) labels of the training patients, which stratify the subsets.
        labels: (n,) labels of the scored patients.
        sizes: rising numbers of training patients.
        score: a name in `metrics.score`.
        repeats: nested series of subsets, drawn with seeds `seed`, `seed + 1`, ...
        threshold: as in `metrics`.
        bootstrap: how intervals are made; None means `Bootstrap()`.

    Returns:
        One point per size.

    Raises:
        ValueError: as `nested_subsets` and `metrics.score`; fewer than one repetition.
        KeyError: a score that these classes do not have.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    series = [nested_subsets(train_labels, sizes, seed=seed + number) for number in range(repeats)]
    threshold, bootstrap = check_threshold(threshold), bootstrap or Bootstrap()
    points = []
    for number, size in enumerate(sizes):
        predictions = [check_predictions(labels, predict(subsets[number])) for subsets in series]

        def of_each(weights: Floats, predictions=predictions) -> Floats:
            return np.stack([weighted_scores(*prediction, threshold, weights)[score] for prediction in predictions])

        def mean(weights: Floats, of_each=of_each) -> dict[str, Floats]:
            return {score: of_each(weights).mean(axis=0)}

        interval = bootstrap.intervals(mean, len(predictions[0][0]))[score]
        each = of_each(np.ones((1, len(predictions[0][0]))))
        points.append(LearningPoint(int(size), interval, float(each.min()), float(each.max())))
    return points
