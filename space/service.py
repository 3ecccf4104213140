"""Requests of the page and of programs -> answers; knows nothing of the page itself."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from answers import Answer, Predictor, Progress
from PIL import Image
from quality import find_faults, warnings_of
from smear import Field, SmearError, find_cells
from uploads import BATCH_LIMITS, PATIENT_LIMITS, Pictures, SourceFile, UploadError, decode, read_pictures, source_files

from lymph_hf.clinical_table import CohortError, Record, Schema, parse_label, parse_number, read_records

SINGLE_CELLS, SMEAR_FIELDS = "Single cells", "Smear fields"
MAX_FIELDS = 20
MAX_PATIENTS = 200
BATCH_COLUMNS = ("patient_id", "cells", "probability", "answer", "by threshold", "remarks")
_CROP_SIDES = (32, 2000)  # pixels
_TABLE = "patient table"
_SCHEMA = Schema("patient_id", "label", "sex", "lymphocyte_count", parse_label, age="age")


@dataclass
class Cells:
    """The cells of one patient, and what is to be said of the upload."""

    images: list[Image.Image]
    notes: list[str]
    warnings: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    overviews: list[Image.Image] = field(default_factory=list)


def answer_patient(
    predictor: Predictor,
    paths: Sequence[str | Path],
    kind: str,
    crop_side: float | None,
    clinical: Mapping[str, Any],
    progress: Progress,
) -> Iterator[Answer]:
    """One patient's answer, first without and then with maps of the cells.

    Args:
        paths: image files, ZIP files, or both.
        kind: `SINGLE_CELLS` or `SMEAR_FIELDS`.
        crop_side: pixels of a smear field cut around a cell; `None` = from the width of the red cells.
        clinical: any of age, sex, lymphocyte_count; `None` = missing.

    Raises:
        UploadError: unusable pictures or values; the message is for the person who sent them.
    """
    progress(0.05, "Reading the pictures")
    pictures = read_pictures(paths)
    progress(0.15, "Checking the pictures")
    cells = _cut_fields(pictures, crop_side) if kind == SMEAR_FIELDS else _single_cells(pictures)
    yield from _answers(predictor, cells, clinical, progress)


def answer_batch(
    predictor: Predictor,
    table: str | Path | None,
    archives: Sequence[str | Path],
    left_out: list[tuple[str, str]],
    progress: Progress,
) -> Iterator[tuple[Any, ...]]:
    """One row (`BATCH_COLUMNS`) per patient, as they are answered; the patients of the table without pictures last.

    Args:
        table: CSV with patient_id and any of age, sex, lymphocyte_count; `None` = nothing is known of anybody.
        archives: ZIP files with one folder of single cells per patient, named by its patient_id.
        left_out: gets (name, reason) of files that are not even opened.

    Raises:
        UploadError: unusable files.
    """
    if not archives:
        raise UploadError("No ZIP file yet. Add one with a folder of cell images for each patient.")
    try:
        records = {} if table is None else read_records(Path(table), _TABLE, _SCHEMA, date.max)[0]
    except CohortError as error:
        raise UploadError(str(error)) from error
    seen: set[str] = set()
    for folder, files in groupby(source_files(archives, BATCH_LIMITS, left_out), key=_folder):
        patient_id = folder.name
        if patient_id in seen:
            raise UploadError(f"Patient {patient_id!r} has two folders in the ZIP files: keep one.")
        seen.add(patient_id)
        if len(seen) > MAX_PATIENTS:
            raise UploadError(f"More than {MAX_PATIENTS} patients: send them in parts.")
        progress(len(seen) / max(len(records), len(seen) + 1), f"Patient {len(seen)}")
        absent = "" if patient_id in records or table is None else "Not in the table: age, sex and count unknown."
        yield _batch_row(predictor, patient_id, files, records.get(patient_id), absent)
    for patient_id in [patient_id for patient_id in records if patient_id not in seen]:
        yield (patient_id, 0, None, "no answer", "", "No folder of this name in the ZIP files.")
    if not seen:
        raise UploadError("The ZIP files hold no picture. Expected a folder of cell images for each patient.")


def read_number(text: str | None, name: str, check: Callable[[float], float] = float) -> float | None:
    """What somebody wrote into a field, with a decimal point or comma; `None` where it is empty.

    Args:
        check: raises a ValueError that says what is expected.

    Raises:
        UploadError: no number, one that could be read in two ways, or one that does not pass the check.
    """
    if text is None or not text.strip():
        return None
    try:
        return check(parse_number(text.strip(), ","))
    except ValueError as error:
        raise UploadError(f"{name} {text.strip()[:20]!r}: {error}.") from error


def _batch_row(
    predictor: Predictor, patient_id: str, files: Iterator[SourceFile], record: Record | None, remark: str
) -> tuple[Any, ...]:
    clinical = {name: getattr(record, name, None) for name in ("age", "sex", "lymphocyte_count")}
    try:
        pictures = decode(files, PATIENT_LIMITS, [])
        if not pictures.images:
            raise UploadError("No usable picture in the folder.")
        cells = _single_cells(pictures)
        answer = next(_answers(predictor, cells, clinical, lambda share, text: None, maps=False))
    except UploadError as error:
        return (patient_id, 0, None, "no answer", "", str(error))
    remarks = [remark, *cells.warnings, *cells.notes[1:]]
    return (
        patient_id,
        len(cells.images),
        round(answer.probability, 4),
        answer.decision,
        answer.called,
        " ".join(filter(None, remarks)),
    )


def _folder(file: SourceFile) -> PurePosixPath:
    folder = PurePosixPath(file.path).parent
    if not folder.name:
        raise UploadError(f"{file.name} lies in no folder. Expected a folder of cell images for each patient.")
    return folder


def _answers(
    predictor: Predictor, cells: Cells, clinical: Mapping[str, Any], progress: Progress, *, maps: bool = True
) -> Iterator[Answer]:
    about = {name: getattr(cells, name) for name in ("warnings", "notes", "left_out", "overviews")}
    try:
        yield from predictor.answers(cells.images, clinical, maps=maps, progress=progress, **about)
    except ValueError as error:  # a clinical value out of range: the processor says which and what it expects
        raise UploadError(str(error)) from error


def _single_cells(pictures: Pictures) -> Cells:
    images = pictures.images
    return Cells(images, _notes(pictures, "cell"), warnings_of(len(images), find_faults(images)), pictures.left_out)


def _cut_fields(pictures: Pictures, crop_side: float | None) -> Cells:
    if len(pictures.images) > MAX_FIELDS:
        raise UploadError(f"{len(pictures.images)} smear fields: at most {MAX_FIELDS} can be searched at once.")
    if crop_side is not None and not _CROP_SIDES[0] <= crop_side <= _CROP_SIDES[1]:
        raise UploadError(f"Crop size {crop_side:g}: expected {_CROP_SIDES[0]} to {_CROP_SIDES[1]} pixels, or none.")
    fields: list[Field] = []
    notes = _notes(pictures, "smear field")
    for number, image in enumerate(pictures.images, start=1):
        try:
            fields.append(find_cells(image, None if crop_side is None else round(crop_side)))
        except SmearError as error:
            if len(pictures.images) == 1:
                raise UploadError(str(error)) from error
            notes.append(f"Smear field {number} was left out. {error}")
            continue
        notes.append(f"Smear field {number}: {_found(fields[-1])}")
    crops = [crop for found in fields for crop in found.crops]
    if not crops:
        raise UploadError("No cell was found in any of the smear fields. " + " ".join(notes[1:]))
    if len(crops) > PATIENT_LIMITS.files:
        raise UploadError(f"{len(crops)} cells were found: at most {PATIENT_LIMITS.files} can be read at once.")
    warnings = warnings_of(len(crops), find_faults(crops), single_cells=False)
    warnings.append(
        "The cells were found by colour and size alone. Look at the frames: other leucocytes, clumps or debris may be "
        "among them, while the model was made for lymphocytes."
    )
    return Cells(crops, notes, warnings, pictures.left_out, [found.overview for found in fields])


def _found(found: Field) -> str:
    cut = f", {found.at_border} more cut by the border" if found.at_border else ""
    ruler = f" from the width of {found.red_cells} red cells" if found.red_cells else ""
    return f"{len(found.crops)} nucleated cells{cut}; crops of {found.crop_side} pixels{ruler}."


def _notes(pictures: Pictures, noun: str) -> list[str]:
    number = len(pictures.images)
    notes = [f"{number} {noun}{'s' if number > 1 else ''} read."]
    if pictures.repeated:
        notes.append(f"{pictures.repeated} identical pictures were counted once.")
    if pictures.converted:
        notes.append(f"{pictures.converted} pictures were converted to plain colour or turned upright.")
    if pictures.left_out:
        reasons = Counter(reason.partition(":")[0] for _, reason in pictures.left_out)
        notes.append("Left out: " + "; ".join(f"{count} ({reason})" for reason, count in reasons.most_common()) + ".")
    return notes
