"""Which cells pretraining may see: never those of patients who will be evaluated."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from .cell_sources import read_cells
from .cells import Cells, join_cells
from .cohort import CohortError, read_cohort
from .options_pretrain import PretrainOptions
from .runs import Run
from .split_files import PARTS, read_split_lists

logger = logging.getLogger(__name__)


# The objectives that learn labels, and where the labels come from.
LABEL_SOURCES = {
    "cell-type": "Types come from cells.csv or from one sub-folder per type.",
    "patient-label": "Labels come from clinical.csv.",
}


class PretrainingError(ValueError):
    """Options and cells do not fit together; the message says what to change."""


@dataclass(frozen=True)
class EvaluationPatients:
    """Whom pretraining must not see: the validation and test patients of a run or of a split file.

    Attributes:
        patient_ids: their identifiers.
        digests: SHA-256 of their images where a run has recorded them, else empty.
        sha256: of the lists of train, validation and test patients.
    """

    patient_ids: frozenset[str]
    digests: frozenset[str]
    sha256: str

    @classmethod
    def read(cls, source: str | Path) -> Self:
        """From a run folder (`split.json`, `cohort.json`) or a split file.

        Raises:
            SplitError: the split cannot be read.
        """
        run = Run(Path(source))
        digests: set[str] = set()
        if run.cohort.is_file():
            recorded = json.loads(run.cohort.read_text(encoding="utf-8"))["digests"]
            digests = {digest for part in PARTS[1:] for digest in recorded[part]}
        lists = read_split_lists(run.split if run.folder.is_dir() else run.folder)
        canonical = json.dumps({part: sorted(lists.get(part, ())) for part in PARTS})
        return cls(
            patient_ids=frozenset(patient_id for part in PARTS[1:] for patient_id in lists.get(part, ())),
            digests=frozenset(digests),
            sha256=hashlib.sha256(canonical.encode()).hexdigest(),
        )

    def own(self, cells: Cells) -> np.ndarray:
        """(n,) True for cells of these patients, by identifier or by image."""
        by_name = [patient_id in self.patient_ids for patient_id in cells.patient_ids]
        by_image = [digest in self.digests for digest in cells.digests]
        return np.logical_or(by_name, by_image)


def permitted_cells(options: PretrainOptions) -> tuple[Cells, dict[str, Any]]:
    """The cells of all sources but those of evaluation patients, and the record of what was left out.

    A cell is left out when its patient is an evaluation patient, or when its image equals one of theirs, in
    whatever folder it lies.

    Raises:
        PretrainingError: the cells are of patients and no split was given, or the split cannot be applied to them.
    """
    sources = [_read(source, options) for source in options.data]
    record: dict[str, Any] = {
        "objective": options.objective,
        "data": [cells.source for cells in sources],
        "split_sha256": None,
        "left_out_cells": 0,
    }
    of_patients = [cells.source for cells in sources if any(p is not None for p in cells.patient_ids)]
    if options.split is None and of_patients:
        raise PretrainingError(
            f"{', '.join(of_patients)}: these cells are of patients. Name those who will be evaluated with --split "
            "RUN or --split FILE, so that their cells are left out; --split none if nobody ever will be."
        )
    if options.split not in (None, "none"):
        evaluation = EvaluationPatients.read(options.split)
        if not of_patients and not evaluation.digests:
            raise PretrainingError(
                f"{', '.join(record['data'])}: no cell has a patient, so {options.split} cannot be applied. Give a run "
                "folder, whose patients are known by their images, or cells.csv with a column patient_id."
            )
        permitted = _without(evaluation, sources)
        left_out = sum(map(len, sources)) - sum(map(len, permitted))
        logger.info("%d cells of evaluation patients left out (%s)", left_out, options.split)
        record |= {"split_sha256": evaluation.sha256, "left_out_cells": left_out}
        sources = permitted
    cells = join_cells(sources)
    if options.objective in LABEL_SOURCES:
        cells = cells.labelled()
        if len(cells.type_names) < 2:
            raise PretrainingError(
                f"{', '.join(record['data'])}: {len(cells.type_names)} {options.objective.replace('-', ' ')}s, "
                f"--objective {options.objective} needs at least 2. {LABEL_SOURCES[options.objective]}"
            )
    if not len(cells):
        raise PretrainingError(f"{', '.join(record['data'])}: no cell is left to learn from.")
    return cells, record | {"fingerprint": cells.fingerprint}


def _read(source: str, options: PretrainOptions) -> Cells:
    """The cells of a source with what the objective learns as their type."""
    cells = read_cells(source, cache_dir=options.cache_dir)
    if options.objective != "patient-label":
        return cells
    try:
        label_of = {patient.patient_id: patient.label for patient in read_cohort(source).patients}
    except CohortError as error:
        raise PretrainingError(f"{source}: --objective patient-label needs folders of patients ({error}).") from error
    return replace(cells, cell_types=tuple(label_of[patient_id] for patient_id in cells.patient_ids))


def _without(evaluation: EvaluationPatients, sources: list[Cells]) -> list[Cells]:
    """The sources without the evaluation patients' cells and without copies of them."""
    theirs = [evaluation.own(cells) for cells in sources]
    images = {digest for cells, own in zip(sources, theirs, strict=True) for digest in np.array(cells.digests)[own]}
    return [cells.select(row for row, digest in enumerate(cells.digests) if digest not in images) for cells in sources]
