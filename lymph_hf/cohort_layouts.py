"""The two folder layouts of a cohort -> clinical records and image folders, by patient.

See :mod:`lymph_hf.cohort` for what the layouts look like.
"""

import dataclasses
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from .clinical_table import CohortError, Record, Schema, parse_challenge_label, parse_label, read_records
from .images import IMAGE_SUFFIXES

_GENERIC = Schema("patient_id", "label", "sex", "lymphocyte_count", parse_label, age="age")
_CHALLENGE = Schema("id", "label", "gender", "lymph_count", parse_challenge_label, birth="dob")
_PARTS = {"train": ("trainset", "trainset_true.csv"), "test": ("testset", "testset_data.csv")}
_ANNOTATION = "clinical_annotation.csv"
_MERGED = ("label", "age", "sex", "lymphocyte_count")
_AGE_DECIMALS = 1  # an exact age at a known reference date would give the date of birth away
_CLUTTER = frozenset({"thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Folder:
    """The images of one patient and the part of the challenge they stand in (``None``: generic layout)."""

    path: Path
    part: str | None


@dataclass(frozen=True)
class Layout:
    """What stands in a cohort folder, before rows and folders are matched; both by patient identifier."""

    name: str  # "generic" or "challenge"
    records: dict[str, Record]
    folders: dict[str, Folder]
    warnings: list[str]


def read_layout(root: Path, reference: date) -> Layout:
    """Recognise the layout of ``root`` and read its tables; ``reference`` turns dates of birth into ages.

    Raises:
        CohortError: no layout or two at once, or a table with unreadable or contradictory values.
    """
    return _read_generic(root) if _recognise(root) == "generic" else _read_challenge(root, reference)


def _recognise(root: Path) -> str:
    if not root.is_dir():
        raise CohortError(f"{root}: no such folder")
    generic = (root / "clinical.csv").is_file()
    parts = [folder for folder, _ in _PARTS.values() if (root / folder).is_dir()]
    if generic and parts:
        raise CohortError(
            f"{root}: two layouts at once, clinical.csv (generic) and {', '.join(parts)} (challenge); "
            "keep each cohort in a folder of its own"
        )
    if not generic and not parts:
        raise CohortError(
            f"{root}: no cohort found; looked for clinical.csv with images/<patient_id>/ (generic layout) "
            "and for trainset/ or testset/ (challenge layout)"
        )
    return "generic" if generic else "challenge"


def _read_generic(root: Path) -> Layout:
    if not (root / "images").is_dir():
        raise CohortError(f"{root}: clinical.csv stands without a folder 'images'; expected images/<patient_id>/*.jpg")
    records, warnings = read_records(root / "clinical.csv", "clinical.csv", _GENERIC, date.max)
    folders = _patient_folders(root / "images", None, warnings)
    return Layout("generic", records, folders, warnings)


def _read_challenge(root: Path, reference: date) -> Layout:
    warnings: list[str] = []
    folders: dict[str, Folder] = {}
    for part, (name, _) in _PARTS.items():
        found = _patient_folders(root / name, part, warnings)
        for patient_id in found.keys() & folders.keys():
            raise CohortError(f"patient {patient_id!r} has images in trainset and in testset; keep one folder")
        folders |= found
    records: dict[str, Record] = {}
    for path, part in _challenge_tables(root):
        name = path.relative_to(root).as_posix()
        found, ignored = read_records(path, name, _CHALLENGE, reference)
        warnings += ignored
        _refuse_other_part(found, part, folders)
        known = found.keys() & records.keys()
        merged = {patient_id: _merged(records[patient_id], found[patient_id]) for patient_id in known}
        filled = sum(merged[patient_id] != records[patient_id] for patient_id in known)
        if filled:
            warnings.append(f"{name}: gives values that the other table lacks, for {filled} patients")
        records |= found | merged
    return Layout("challenge", {key: _rounded(record) for key, record in records.items()}, folders, warnings)


def _refuse_other_part(found: dict[str, Record], part: str | None, folders: dict[str, Folder]) -> None:
    for patient_id, record in found.items():
        folder = folders.get(patient_id)
        if part and folder and folder.part != part:
            raise CohortError(
                f"{record.where}: the images of patient {patient_id!r} stand in {folder.path.parent.name}/; "
                "move the row or the images"
            )


def _rounded(record: Record) -> Record:
    return record if record.age is None else dataclasses.replace(record, age=round(record.age, _AGE_DECIMALS))


def _challenge_tables(root: Path) -> list[tuple[Path, str | None]]:
    """Tables with the part whose patients they list (``None``: both); tables of a part come first."""
    tables: list[tuple[Path, str | None]] = []
    for part, (folder, expected) in _PARTS.items():
        found = [path for path in listed(root / folder) if path.suffix.lower() == ".csv" and path.name != _ANNOTATION]
        named = [path for path in found if path.name == expected] or found
        if len(named) > 1:
            names = ", ".join(path.name for path in named)
            raise CohortError(f"{folder}/: several tables ({names}) and none is called {expected}; keep one")
        tables += [(path, part) for path in named]
    places = (root, *(root / folder for folder, _ in _PARTS.values()))
    tables += [(place / _ANNOTATION, None) for place in places if (place / _ANNOTATION).is_file()]
    if not tables:
        names = ", ".join(f"{folder}/{table}" for folder, table in _PARTS.values())
        raise CohortError(f"{root}: no clinical table; looked for {names} and {_ANNOTATION}")
    return tables


def _merged(first: Record, second: Record) -> Record:
    """One record of two rows about one patient; a value missing in the first is taken from the second."""
    merged = {}
    for name in _MERGED:
        one, two = getattr(first, name), getattr(second, name)
        if one is not None and two is not None and one != two:
            # Ages come from dates of birth, which must not be repeated.
            told = "different dates of birth" if name == "age" else f"{name} {one!r} against {two!r}"
            raise CohortError(f"patient {first.patient_id!r}: {told} ({first.where}; {second.where}); correct one file")
        merged[name] = two if one is None else one
    return dataclasses.replace(first, **merged)


# --- folders ------------------------------------------------------------------------------------------------


def listed(folder: Path) -> list[Path]:
    """What stands in a folder, sorted by name, without hidden files and clutter; empty if it is absent."""
    if not folder.is_dir():
        return []
    entries = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted((path for path in entries if path.name.lower() not in _CLUTTER), key=lambda path: path.name)


def is_image(path: Path) -> bool:
    """By its suffix; whether it can be decoded is seen later."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _patient_folders(parent: Path, part: str | None, warnings: list[str]) -> dict[str, Folder]:
    entries = listed(parent)
    strays = [path.name for path in entries if is_image(path)]
    if strays:
        warnings.append(f"{parent.name}/: {len(strays)} images in no patient's folder are not used ({strays[0]} ...)")
    return {path.name: Folder(path, part) for path in entries if path.is_dir()}
