"""Lists of patients written by hand or by other programs -> identifiers by part; nothing is executed."""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from .clinical_table import CohortError, read_csv

PARTS = ("train", "validation", "test")

_PART_NAMES = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}
_NOTES = frozenset({"seed", "source"})  # what a saved split says beside its lists
_ASSIGNMENT = re.compile(r"^[ \t]*(\w+)\s*=\s*(\[.*?\])", re.MULTILINE | re.DOTALL)


class SplitError(ValueError):
    """A split cannot be drawn or read; the message names patient or class, numbers and what to do."""


def read_split_lists(path: Path) -> dict[str, list[str]]:
    """Part (``train``, ``validation``, ``test``) -> identifiers, by the file's suffix; parts may be absent.

    Raises:
        SplitError: the file is unreadable, names an unknown part or one part twice, or holds no train list.
    """
    reader = {
        ".json": _from_json,
        ".yaml": _from_yaml,
        ".yml": _from_yaml,
        ".csv": _from_csv,
        ".tsv": _from_csv,
    }
    try:
        pairs = reader.get(path.suffix.lower(), _from_assignments)(path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError, CohortError) as error:
        raise SplitError(f"{path.name}: cannot be read as a split: {error}") from error
    lists: dict[str, list[str]] = {}
    for name, ids in pairs:
        part = _part(name, path.name)
        if part in lists:
            raise SplitError(f"{path.name}: more than one list for {part} ({name!r} is the second); keep one")
        if not isinstance(ids, list) or not all(isinstance(patient_id, str) for patient_id in ids):
            raise SplitError(f"{path.name}: {name!r} has to be a list of patient identifiers (text)")
        lists[part] = ids
    if not lists.get("train"):
        raise SplitError(f"{path.name}: no train list; found lists for {', '.join(lists) or 'nothing'}")
    return lists


def _part(name: object, where: str) -> str:
    part = _PART_NAMES.get(str(name).strip().casefold())
    if part is None:
        raise SplitError(f"{where}: unknown part {name!r}; expected train, validation (val, valid) or test")
    return part


def _from_json(path: Path) -> Iterable[tuple[str, object]]:
    # Identifiers written as numbers stay what they are in the file.
    content = json.loads(path.read_text(encoding="utf-8-sig"), parse_int=str, parse_float=str)
    return _without_notes(content, path)


def _from_yaml(path: Path) -> Iterable[tuple[str, object]]:
    # The base loader keeps every scalar as text: no 007 read as a number, no "no" as a truth value.
    return _without_notes(yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader), path)


def _without_notes(content: object, path: Path) -> Iterable[tuple[str, object]]:
    if not isinstance(content, dict):
        raise SplitError(f'{path.name}: expected {{"train": [...], "validation": [...], "test": [...]}}')
    return [(name, ids) for name, ids in content.items() if name not in _NOTES]


def _from_csv(path: Path) -> Iterable[tuple[str, object]]:
    table = read_csv(path, path.name, key="patient_id")
    table.raise_problems()
    if "split" not in table.titles:
        raise SplitError(f"{path.name}: no column 'split'; expected the columns patient_id,split")
    lists: dict[str, list[str]] = {}
    for line, cells in table.rows.items():
        part = _part(cells["split"], f"{path.name}, line {line}")
        lists.setdefault(part, []).append(cells["patient_id"])
    return lists.items()


def _from_assignments(path: Path) -> Iterable[tuple[str, object]]:
    """Assignments of literal lists, anywhere in a text, at any indentation: ``val_index = ['P1', 'P2']``."""
    found = []
    for name, literal in _ASSIGNMENT.findall(path.read_text(encoding="utf-8-sig")):
        part = name.casefold().split("_")[0]
        if part not in _PART_NAMES:
            continue
        try:
            found.append((part, ast.literal_eval(literal)))
        except (ValueError, SyntaxError):
            raise SplitError(f"{path.name}: {name} is no plain list of quoted patient identifiers") from None
    return found
