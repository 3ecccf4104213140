"""A folder on disk -> a checked table of patients with their cell images.

Two layouts are recognised by themselves::

    generic                              challenge
    clinical.csv                         trainset/trainset_true.csv    ID,LABEL,GENDER,DOB,LYMPH_COUNT
      patient_id,label,age,sex,          trainset/P*/NNNNNN.jpg
      lymphocyte_count                   testset/testset_data.csv
    images/<patient_id>/*.jpg            testset/P*/NNNNNN.jpg
                                         clinical_annotation.csv       optional, both parts

Nothing is guessed: what can be read in two ways is a :class:`CohortError`, who has to be left out is an
:class:`Exclusion` with its reason, and what a reader should know is a warning of the cohort.
"""

import dataclasses
import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import pandas as pd
from tqdm import tqdm

from .clinical_table import CHALLENGE_LABELS, CohortError, Record
from .cohort_layouts import Folder, is_image, listed, read_layout
from .cohort_summary import summarise
from .images import CellImageError, open_cell_image

logger = logging.getLogger(__name__)

# The challenge gives dates of birth but no sampling dates. A fixed day keeps every patient's age the same in
# every run; this one lies near the publication of that cohort (Sahasrabudhe et al., hal-03032875).
DEFAULT_REFERENCE_DATE = "2020-12-31"
CLINICAL = ("age", "sex", "lymphocyte_count")

_SHOWN_PAIRS = 20
_SPELLED_ALIKE = "their identifiers are spellings of each other"


@dataclass(frozen=True)
class Patient:
    """One patient: a bag of cell images and what is known beside them. ``None`` = missing.

    Attributes:
        patient_id: as written in the clinical table.
        images: existing files, sorted by name.
        label: name of the class (``"reactive"``, ``"APL"``, ``"0"`` ...); ``None`` = unlabelled.
        age: years, 0 to 120.
        sex: ``"F"`` or ``"M"``.
        lymphocyte_count: 10^9 cells per litre.
        part: ``"train"`` or ``"test"`` in the challenge layout, ``None`` in the generic one.
    """

    patient_id: str
    images: tuple[Path, ...]
    label: str | None = None
    age: float | None = None
    sex: str | None = None
    lymphocyte_count: float | None = None
    part: str | None = None


@dataclass(frozen=True)
class Exclusion:
    """What was left out and why; ``file`` is empty when the whole patient is excluded."""

    patient_id: str
    file: str
    reason: str


@dataclass(frozen=True)
class Cohort:
    """Patients in the order of their identifiers, and everything worth knowing about how they were read.

    Attributes:
        root: the folder read.
        layout: ``"generic"`` or ``"challenge"``.
        patients: usable patients, each with at least one image.
        exclusions: patients and images left out.
        warnings: sentences for the reader; they name patients by identifier only.
        digests: patient -> SHA-256 of each image's bytes in the order of ``Patient.images``; empty before
            :func:`scan_images`.
    """

    root: Path
    layout: str
    patients: tuple[Patient, ...]
    exclusions: tuple[Exclusion, ...] = ()
    warnings: tuple[str, ...] = ()
    digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names; the position is the class index. Numbers in numeric order, reactive before tumoral."""
        if self.layout == "challenge":
            return tuple(name for name in CHALLENGE_LABELS.values() if name)
        names = {patient.label for patient in self.labelled}
        return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else str))

    @property
    def labelled(self) -> tuple[Patient, ...]:
        return tuple(patient for patient in self.patients if patient.label is not None)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, as :func:`dataclasses.replace`."""
        return dataclasses.replace(self, **changes)

    def select(self, ids: Iterable[str]) -> Self:
        """The patients named, in the order given.

        Raises:
            CohortError: an identifier is unknown or given twice.
        """
        wanted = list(ids)
        known = {patient.patient_id: patient for patient in self.patients}
        unknown = [patient_id for patient_id in wanted if patient_id not in known]
        if unknown:
            raise CohortError(f"no such patient in the cohort: {first_names(unknown)}; it holds {len(known)} patients")
        twice = [patient_id for patient_id, count in Counter(wanted).items() if count > 1]
        if twice:
            raise CohortError(f"patients selected more than once: {first_names(twice)}; name each once")
        digests = {patient_id: self.digests[patient_id] for patient_id in wanted if patient_id in self.digests}
        return self.replace(patients=tuple(known[patient_id] for patient_id in wanted), digests=digests)

    def to_frame(self) -> pd.DataFrame:
        """One row per patient: ``patient_id, label, age, sex, lymphocyte_count, cells, part``."""
        columns = ["patient_id", "label", *CLINICAL, "cells", "part"]
        rows = [
            {name: len(patient.images) if name == "cells" else getattr(patient, name) for name in columns}
            for patient in self.patients
        ]
        return pd.DataFrame(rows, columns=columns).astype({"age": float, "lymphocyte_count": float})

    def summary(self) -> str:
        """A text table of patients, cells, labels, clinical values and everything left out."""
        return summarise(self)


def read_cohort(root: str | Path, *, reference_date: str | date = DEFAULT_REFERENCE_DATE) -> Cohort:
    """Read and check a cohort folder; images are listed here and decoded by :func:`scan_images`.

    Args:
        root: folder in one of the two layouts above.
        reference_date: day at which dates of birth (challenge layout) become ages: a ``date`` or
            ``YYYY-MM-DD``. These ages are years of 365.25 days rounded to 0.1, as an exact age at a known
            day is the date of birth; the dates themselves are not kept.

    Raises:
        CohortError: no or an ambiguous layout, unreadable or contradictory values, no usable patient.

    Example:
        >>> cohort = read_cohort("data/apl-discovery")  # doctest: +SKIP
        >>> len(cohort.patients), cohort.label_names  # doctest: +SKIP
        (82, ('AML', 'APL'))
    """
    root = Path(root)
    layout = read_layout(root, _as_date(reference_date))
    patients, exclusions, warnings = _match(layout.records, layout.folders)
    if not patients:
        reasons = Counter(exclusion.reason for exclusion in exclusions)
        told = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        raise CohortError(f"{root}: no usable patient ({told}); a patient needs a table row and a folder of images")
    warnings = layout.warnings + warnings
    warnings += [
        f"patients {one!r} and {two!r}: {_SPELLED_ALIKE}; one person?" for one, two in _spelled_alike(patients)
    ]
    return Cohort(root, layout.name, tuple(patients), tuple(exclusions), tuple(warnings))


def _as_date(value: str | date) -> date:
    if isinstance(value, date):
        return date(value.year, value.month, value.day)
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise CohortError(f"reference_date {value!r}: expected a day as YYYY-MM-DD, e.g. 2020-12-31") from None


def _match(
    records: Mapping[str, Record], folders: Mapping[str, Folder]
) -> tuple[list[Patient], list[Exclusion], list[str]]:
    """Patients with a row and images, sorted by identifier; the others with their reason; warnings."""
    patients, exclusions, others, warnings = [], [], [], []
    for patient_id in sorted(records.keys() | folders.keys()):
        record, folder = records.get(patient_id), folders.get(patient_id)
        if record is None:
            exclusions.append(Exclusion(patient_id, "", "images without patient row"))
            continue
        entries = listed(folder.path) if folder else []
        images = tuple(path for path in entries if is_image(path))
        others += sorted(set(entries) - set(images))
        if images:
            clinical = {name: getattr(record, name) for name in ("label", *CLINICAL)}
            patients.append(Patient(patient_id, images, part=folder.part, **clinical))
        else:
            reason = "no image in its folder" if folder else "no image folder"
            exclusions.append(Exclusion(patient_id, "", reason))
    rowless = [exclusion.patient_id for exclusion in exclusions if exclusion.patient_id not in records]
    if rowless:
        warnings.append(f"{len(rowless)} image folders without a row in the table: {first_names(rowless)}")
    if others:
        first = f"{others[0].parent.name}/{others[0].name}"
        warnings.append(f"{len(others)} entries of patient folders are no image files by their suffix ({first} ...)")
    return patients, exclusions, warnings


def first_names(names: Iterable[str], limit: int = 5) -> str:
    """The first few of a list of identifiers, for messages."""
    found = list(names)
    rest = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(map(repr, found[:limit])) + rest


# --- images -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scanned:
    digest: str
    notes: tuple[str, ...]
    error: str | None = None


def scan_images(cohort: Cohort, *, workers: int | None = None, strict: bool = False, progress: bool = True) -> Cohort:
    """Decode every image once and return the cohort without the bad ones, with ``digests`` filled.

    Each bad image becomes an exclusion with its reason; a patient left without images is excluded.
    Conversions, images shared by two patients and images standing twice in one patient become warnings.

    Args:
        workers: decoding threads; ``None`` = one per core, at most 8.
        strict: raise on the first bad image instead of excluding it.
        progress: show a progress bar.

    Raises:
        CohortError: ``strict`` and an image is bad, or no image at all is good.
    """
    paths = [path for patient in cohort.patients for path in patient.images]
    scanned = dict(_scan_all(paths, workers or min(8, os.cpu_count() or 1), strict, progress))
    patients, exclusions, digests = [], [], {}
    for patient in cohort.patients:
        good = tuple(path for path in patient.images if scanned[path].error is None)
        bad = (path for path in patient.images if scanned[path].error is not None)
        exclusions += [Exclusion(patient.patient_id, path.name, scanned[path].error) for path in bad]
        if not good:
            exclusions.append(Exclusion(patient.patient_id, "", "no readable image"))
            continue
        patients.append(dataclasses.replace(patient, images=good))
        digests[patient.patient_id] = tuple(scanned[path].digest for path in good)
    if not patients:
        raise CohortError(f"{cohort.root}: none of {len(paths)} images can be read; first: {exclusions[0].reason}")
    notes = Counter(note for result in scanned.values() for note in result.notes)
    warnings = [f"{note}: {count} images" for note, count in sorted(notes.items())]
    result = cohort.replace(patients=tuple(patients), exclusions=cohort.exclusions + tuple(exclusions), digests=digests)
    # A cohort scanned twice says everything once.
    return result.replace(warnings=tuple(dict.fromkeys([*cohort.warnings, *warnings, *_repeated_images(result)])))


def _scan_all(paths: list[Path], workers: int, strict: bool, progress: bool) -> Iterator[tuple[Path, _Scanned]]:
    pool = ThreadPoolExecutor(workers)
    try:
        results = zip(paths, pool.map(_scan_one, paths), strict=True)
        for path, result in tqdm(results, total=len(paths), desc="checking images", disable=None if progress else True):
            if strict and result.error is not None:
                raise CohortError(
                    f"{path.parent.name}/{path.name}: {result.error}; replace the file or scan without strict"
                )
            yield path, result
    finally:
        pool.shutdown(cancel_futures=True)


def _scan_one(path: Path) -> _Scanned:
    try:
        data = path.read_bytes()
        return _Scanned(hashlib.sha256(data).hexdigest(), open_cell_image(data).notes)
    except OSError as error:
        return _Scanned("", (), f"cannot be read: {error.strerror or type(error).__name__}")
    except CellImageError as error:
        return _Scanned("", (), str(error))


# --- links between patients ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatientLink:
    """Two identifiers that may be one person and must not be torn apart by a split."""

    first: str
    second: str
    reason: str


def patient_links(cohort: Cohort) -> list[PatientLink]:
    """Pairs with identifiers spelled alike or, after :func:`scan_images`, with images in common."""
    links = [PatientLink(one, two, _SPELLED_ALIKE) for one, two in _spelled_alike(cohort.patients)]
    shared = sorted(_shared_images(cohort).items())
    return links + [PatientLink(one, two, f"they share {count} images") for (one, two), count in shared]


def linked_groups(cohort: Cohort) -> list[list[str]]:
    """Patients that belong together (:func:`patient_links`, also over third ones); singletons included.

    Each group is sorted, and the groups are in the order of their first members.
    """
    parent = {patient.patient_id: patient.patient_id for patient in cohort.patients}

    def leader(patient_id: str) -> str:
        while parent[patient_id] != patient_id:
            patient_id = parent[patient_id]
        return patient_id

    for link in patient_links(cohort):
        parent[leader(link.second)] = leader(link.first)
    groups: dict[str, list[str]] = defaultdict(list)
    for patient_id in sorted(parent):
        groups[leader(patient_id)].append(patient_id)
    return sorted(groups.values())


def _spelled_alike(patients: Iterable[Patient]) -> list[tuple[str, str]]:
    alike: dict[str, list[str]] = defaultdict(list)
    for patient_id in sorted(patient.patient_id for patient in patients):
        alike[_spelling(patient_id)].append(patient_id)
    return [pair for ids in alike.values() for pair in combinations(ids, 2)]


def _spelling(patient_id: str) -> str:
    """``P01``, ``p1``, ``P-1`` -> ``p1``; a separator between digits stays, for ``1-12`` is not ``11-2``."""
    joined = re.sub(r"(?<=\d)[\s_.-]+(?=\d)", "|", patient_id.casefold())
    return re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"[\s_.-]+", "", joined))


def _shared_images(cohort: Cohort) -> Counter[tuple[str, str]]:
    """Pairs of patients -> number of distinct images, byte for byte, that both hold."""
    holders: dict[str, set[str]] = defaultdict(set)
    for patient_id, digests in cohort.digests.items():
        for digest in digests:
            holders[digest].add(patient_id)
    return Counter(pair for found in holders.values() for pair in combinations(sorted(found), 2))


def _repeated_images(cohort: Cohort) -> list[str]:
    shared = sorted(_shared_images(cohort).items())
    across = [
        f"patients {one!r} and {two!r} share {count} images byte for byte; one person, or misplaced files?"
        for (one, two), count in shared[:_SHOWN_PAIRS]
    ]
    if len(shared) > _SHOWN_PAIRS:  # one blank tile exported for everybody makes thousands of pairs
        across.append(f"{len(shared) - _SHOWN_PAIRS} more pairs of patients share images")
    within = {patient_id: len(digests) - len(set(digests)) for patient_id, digests in cohort.digests.items()}
    return across + [
        f"patient {patient_id!r}: {count} images are copies of others in the same folder"
        for patient_id, count in within.items()
        if count
    ]
