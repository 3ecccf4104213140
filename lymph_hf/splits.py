"""Seeded patient-level splits: who is trained on, who stops the training, who is only ever scored.

A split is drawn over *linked groups* (:func:`lymph_hf.cohort.linked_groups`), not over patients: two
identifiers of one person, or one patient's cells under two names, never stand on both sides. It depends on
the cohort's identifiers, labels and links and on the seed alone: the order of rows and files changes nothing.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.model_selection import StratifiedKFold

from .cohort import Cohort, first_names, linked_groups, patient_links
from .files import write_json
from .split_files import PARTS, SplitError, read_split_lists

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Disjoint patient identifiers of the three parts.

    Attributes:
        train: patients whose labels may be learnt from.
        validation: patients that choose epochs, thresholds and settings; may be empty.
        test: patients that are scored and choose nothing; may be empty.
        seed: what the split was drawn with; ``None`` for a list read from a file.
        source: where it comes from, in words.

    Raises:
        SplitError: a patient stands twice.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    seed: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        places = defaultdict(list)
        for part in PARTS:
            for patient_id in getattr(self, part):
                places[patient_id].append(part)
        twice = {patient_id: parts for patient_id, parts in places.items() if len(parts) > 1}
        if twice:
            patient_id, parts = next(iter(twice.items()))
            raise SplitError(
                f"{len(twice)} patients stand more than once, first {patient_id!r} in {' and '.join(parts)}; "
                "a patient belongs to one part"
            )

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if name in PARTS else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            SplitError: a field is missing or unknown.
        """
        if "train" not in values or not values.keys() <= {known.name for known in fields(cls)}:
            raise SplitError(f"no saved split: it has the fields {', '.join(values)}; expected train, validation, test")
        return cls(**{name: tuple(value) if name in PARTS else value for name, value in values.items()})

    def save(self, path: str | Path) -> None:
        """Write JSON in one step, so that a half-written split never looks finished."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What :meth:`save` wrote; for lists written by hand use :func:`read_split`, which checks them."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def make_split(cohort: Cohort, *, validation_fraction: float = 0.2, test_fraction: float = 0.0, seed: int = 0) -> Split:
    """Draw a split of the labelled patients, stratified by label.

    Of every class, ``round(fraction * groups)`` groups of linked patients go to validation and to test, the
    rest to train: each class is within one group of its share on every side.

    Args:
        validation_fraction: share of the patients, 0 (no validation) to below 1.
        test_fraction: share of the patients, likewise.

    Raises:
        SplitError: impossible fractions, fewer than two classes, linked patients with different labels, or a
            class that would be missing on one side.
    """
    fractions = {"validation": validation_fraction, "test": test_fraction}
    if not (all(share >= 0 for share in fractions.values()) and sum(fractions.values()) < 1):
        raise SplitError(
            f"validation_fraction {validation_fraction} and test_fraction {test_fraction}: expected shares "
            "from 0 that leave some patients to train on (sum below 1)"
        )
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[str]] = {part: [] for part in PARTS}
    for label, groups in _groups_by_label(cohort).items():
        counts = {part: int(fraction * len(groups) + 0.5) for part, fraction in fractions.items()}
        counts["train"] = len(groups) - sum(counts.values())
        _refuse_empty_sides(label, len(groups), counts, fractions)
        shuffled = iter(rng.permutation(len(groups)))
        for part in PARTS:
            for _ in range(counts[part]):
                drawn[part] += groups[next(shuffled)]
    source = f"make_split(validation_fraction={validation_fraction}, test_fraction={test_fraction}, seed={seed})"
    return Split(**{part: tuple(sorted(ids)) for part, ids in drawn.items()}, seed=seed, source=source)


def make_folds(cohort: Cohort, k: int, *, seed: int = 0, repeat: int = 0) -> list[Split]:
    """Draw ``k`` stratified cross-validation folds of the labelled patients.

    The held-out fold of each split is its ``test``; every labelled patient is in exactly one. ``validation``
    is empty: an epoch chosen on the held-out fold would make its score too good. Where training needs one,
    draw it from the others with ``make_split(cohort.select(split.train))``.

    Args:
        k: number of folds, 2 up to the number of linked groups in the smallest class.
        repeat: number of the repetition; each draws other folds from the same seed.

    Raises:
        SplitError: ``k`` is too small or too large, fewer than two classes, or linked patients with different
            labels.
    """
    if k < 2:
        raise SplitError(f"k={k} folds: expected at least 2, so that something is left to train on")
    by_label = _groups_by_label(cohort)
    label = min(by_label, key=lambda name: len(by_label[name]))
    fewest = len(by_label[label])
    if fewest < k:
        raise SplitError(
            f"class {label!r} has {fewest} patients (linked ones count once), too few for {k} folds; "
            f"use at most k={fewest} or leave the class out"
        )
    groups = [group for of_label in by_label.values() for group in of_label]
    labels = [label for label, of_label in by_label.items() for _ in of_label]
    state = int(np.random.SeedSequence([seed, repeat]).generate_state(1)[0])
    folds = StratifiedKFold(k, shuffle=True, random_state=state).split(np.zeros(len(groups)), labels)
    return [
        Split(
            train=_members(groups, train),
            test=_members(groups, held_out),
            seed=seed,
            source=f"make_folds(k={k}, seed={seed}, repeat={repeat}), fold {number}",
        )
        for number, (train, held_out) in enumerate(folds)
    ]


def read_split(path: str | Path, cohort: Cohort) -> Split:
    """Read a split somebody wrote and check it against the cohort.

    Formats: JSON or YAML ``{"train": [...], "validation" | "val" | "valid": [...], "test": [...]}``; CSV with
    the columns ``patient_id,split``; text (or a ``.py`` file, which is never executed) with assignments such
    as ``train_index = ['P27', ...]`` and ``val_index = [...]``.

    Labelled patients in no list are left out with a logged warning.

    Raises:
        SplitError: an unreadable file, unknown, excluded, doubled or (outside test) unlabelled patients,
            linked patients torn apart, or fewer than two classes in train.
    """
    path = Path(path)
    lists = read_split_lists(path)
    split = Split(**{part: tuple(lists.get(part, ())) for part in PARTS}, source=f"read from {path.name}")
    _check_against(split, cohort, path.name)
    return split


def _groups_by_label(cohort: Cohort) -> dict[str, list[list[str]]]:
    """Class -> linked groups of labelled patients, both in a fixed order."""
    labels = {patient.patient_id: patient.label for patient in cohort.labelled}
    by_label: dict[str, list[list[str]]] = {name: [] for name in sorted(set(labels.values()))}
    if len(by_label) < 2:
        found = f"only the class {next(iter(by_label))!r}" if by_label else "no labelled patient"
        raise SplitError(f"the cohort has {found}; a split needs patients of at least two classes")
    for group in linked_groups(cohort):
        labelled = [patient_id for patient_id in group if patient_id in labels]
        if len({labels[patient_id] for patient_id in labelled}) > 1:
            told = ", ".join(f"{patient_id!r} is {labels[patient_id]!r}" for patient_id in labelled)
            raise SplitError(
                f"linked patients have different labels: {told}; they share images or are spelled alike "
                "(see the cohort's warnings), so correct the labels, rename one or remove one"
            )
        if labelled:
            by_label[labels[labelled[0]]].append(labelled)
    return by_label


def _refuse_empty_sides(label: str, total: int, counts: dict[str, int], fractions: dict[str, float]) -> None:
    for part, count in counts.items():
        if count < 1 and fractions.get(part, 1) > 0:
            shares = ", ".join(f"{name}_fraction {fraction:g}" for name, fraction in fractions.items())
            raise SplitError(
                f"class {label!r} has {total} patients (linked ones count once), which leaves none of it in "
                f"{part} at {shares}; change the fractions, add patients of the class or leave it out"
            )


def _members(groups: list[list[str]], chosen: Iterable[int]) -> tuple[str, ...]:
    return tuple(sorted(patient_id for index in chosen for patient_id in groups[index]))


def _check_against(split: Split, cohort: Cohort, name: str) -> None:
    part_of = {patient_id: part for part in PARTS for patient_id in getattr(split, part)}
    labels = {patient.patient_id: patient.label for patient in cohort.patients}
    _refuse_unknown(part_of, cohort, name)
    unlabelled = [patient_id for patient_id, part in part_of.items() if part != "test" and labels[patient_id] is None]
    if unlabelled:
        raise SplitError(
            f"{name}: patients without label in train or validation: {first_names(unlabelled)}; remove them"
        )
    _refuse_torn_groups(part_of, cohort, name)
    if len({labels[patient_id] for patient_id in split.train}) < 2:
        raise SplitError(f"{name}: train has {len(split.train)} patients of fewer than two classes; add the others")
    left_out = [patient.patient_id for patient in cohort.labelled if patient.patient_id not in part_of]
    if left_out:
        logger.info("%s: %d labelled patients of the cohort are in no part and not used", name, len(left_out))


def _refuse_torn_groups(part_of: dict[str, str], cohort: Cohort, name: str) -> None:
    reasons = {(link.first, link.second): link.reason for link in patient_links(cohort)}
    for group in linked_groups(cohort):
        for first, second in combinations([patient_id for patient_id in group if patient_id in part_of], 2):
            if part_of[first] != part_of[second]:
                indirect = f"they are linked through others of {first_names(group)}"
                reason = reasons.get((first, second), indirect)
                raise SplitError(
                    f"{name}: {first!r} is in {part_of[first]} and {second!r} in {part_of[second]}, but "
                    f"{reason}; put both into one part"
                )


def _refuse_unknown(part_of: dict[str, str], cohort: Cohort, name: str) -> None:
    known = {patient.patient_id for patient in cohort.patients}
    unknown = [patient_id for patient_id in part_of if patient_id not in known]
    if not unknown:
        return
    reasons = {exclusion.patient_id: exclusion.reason for exclusion in cohort.exclusions if not exclusion.file}
    excluded = [f"{patient_id} ({reasons[patient_id]})" for patient_id in unknown if patient_id in reasons]
    missing = [patient_id for patient_id in unknown if patient_id not in reasons]
    told = [f"excluded from the cohort: {first_names(excluded)}"] if excluded else []
    told += [f"not in the cohort: {first_names(missing)}"] if missing else []
    raise SplitError(f"{name}: {'; '.join(told)}; correct the spelling, restore their images or take them off the list")
