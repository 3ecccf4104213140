"""What may not leave: checks of a folder before it is published."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors import SafetensorError, safe_open

from .card import card_problems
from .runs import Run

KINDS = {".json", ".md", ".png", ".py", ".safetensors"}
TEXT = {".json", ".md", ".py"}
# What matplotlib writes into a picture of its own.
_HARMLESS_NOTES = {"dpi", "Software"}
_TRAINING_STATE = re.compile(r"optimizer|exp_avg|momentum_buffer|scheduler|scaler|rng_state", re.IGNORECASE)
_DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d[-/](?:0[1-9]|1[0-2])[-/](?:0[1-9]|[12]\d|3[01])|\d{1,2}[./]\d{1,2}[./](?:19|20)\d\d)(?!\d)"
)
_PATH = re.compile(r"(?<![\w.:/~-])/(?:home|root|Users|mnt|media|tmp|var|work|srv|scratch|data)/\w|\b[A-Za-z]:\\\w")
# Shorter ones, or short numbers, cannot be told from the words and numbers of a configuration.
_SEARCHABLE = re.compile(r"(?!\d{1,4}$).{3,}")


def run_identifiers(run: Run) -> set[str]:
    """Every patient identifier that the files of a run hold."""
    found: set[str] = set()
    if run.split.exists():
        split = json.loads(run.split.read_text(encoding="utf-8"))
        found |= {name for part in split.values() if isinstance(part, list) for name in part}
    if run.cohort.exists():
        exclusions = json.loads(run.cohort.read_text(encoding="utf-8"))["exclusions"]
        found |= {item["patient_id"] for item in exclusions}
    for table in (run.folder / "validation.csv", run.folder / "predictions.csv"):
        if table.exists():
            found |= set(pd.read_csv(table, dtype={"patient_id": str}, usecols=["patient_id"])["patient_id"])
    return {name for name in found if name}


def searchable(identifiers: Iterable[str]) -> list[str]:
    """Identifiers that can be found in a text without mistaking plain numbers and words for them."""
    return sorted(name for name in identifiers if _SEARCHABLE.fullmatch(name))


def folder_problems(folder: Path, identifiers: Iterable[str] = ()) -> list[str]:
    """Why a folder may not be published; empty when it may.

    Args:
        folder: of a model with its card, flat.
        identifiers: of the patients it was made from; none may stand in a file.

    Returns:
        One sentence per problem, with the file's name.
    """
    names = searchable(identifiers)
    # As a part of a file's name too: P003_1.jpg.
    pattern = re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, names))})(?![^\W_])") if names else None
    problems = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.startswith(".") or path.suffix not in KINDS:
            problems.append(f"{path.name}: only {', '.join(sorted(KINDS))} files are published")
        elif path.suffix in TEXT:
            problems += [f"{path.name}: {problem}" for problem in _text_problems(path, pattern)]
        elif path.suffix == ".png":
            problems += [f"{path.name}: {problem}" for problem in _picture_problems(path)]
        else:
            problems += [f"{path.name}: {problem}" for problem in _weight_problems(path)]
    return problems + _missing(folder) + _shard_problems(folder)


def _text_problems(path: Path, identifiers: re.Pattern | None) -> list[str]:
    text = path.read_text(encoding="utf-8")
    problems = []
    for kind, pattern in (("a patient identifier", identifiers), ("a date", _DATE), ("a path", _PATH)):
        if pattern and (found := pattern.search(text)):
            line = text.count("\n", 0, found.start()) + 1
            problems.append(f"holds {kind} in line {line}")  # without repeating it: logs are passed on
    if path.name == "README.md":
        problems += card_problems(text)
    if path.suffix == ".json":
        problems += _json_problems(text)
    return problems


def _json_problems(text: str) -> list[str]:
    try:
        json.loads(text)
    except ValueError as error:
        return [f"is not JSON ({error})"]
    return []


def _picture_problems(path: Path) -> list[str]:
    with Image.open(path) as image:
        notes = sorted(set(image.info) - _HARMLESS_NOTES)
        exif = len(image.getexif())
    problems = []
    if notes:
        problems.append(f"holds notes {notes}")
    if exif:
        problems.append(f"holds {exif} EXIF entries")
    return problems


def _weight_problems(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as weights:
            notes = set(weights.metadata() or {}) - {"format"}
            names = list(weights.keys())
            broken = [name for name in names if not weights.get_tensor(name).isfinite().all()]
    except (SafetensorError, OSError) as error:
        return [f"cannot be read as safetensors ({error})"]
    states = [name for name in names if _TRAINING_STATE.search(name)]
    problems = [f"{name} is not finite" for name in broken]
    if notes:
        problems.append(f"holds notes {sorted(notes)}")
    if states:
        problems.append(f"holds training state such as {states[0]}")
    return problems


def _missing(folder: Path) -> list[str]:
    needed = ("README.md", "config.json", "preprocessor_config.json")
    missing = [name for name in needed if not (folder / name).exists()]
    if not any(folder.glob("*.safetensors")):
        missing.append("model.safetensors")
    return [f"{name} is missing" for name in missing]


def _shard_problems(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [f"{name} is missing, which {index.name} names" for name in sorted(shards) if not (folder / name).exists()]


def prediction_problems(stored: pd.DataFrame, probabilities: np.ndarray, columns: Sequence[str]) -> list[str]:
    """Where predictions differ from stored ones by more than a thousandth, which rounding does not explain.

    Args:
        stored: a table of `prediction_table`, n rows.
        probabilities: (n, C) of the same patients.
        columns: of `stored`, one per column of `probabilities`.
    """
    difference = np.abs(stored[list(columns)].to_numpy() - probabilities).max(axis=1)
    wrong = int((difference > 1e-3).sum())
    if not wrong:
        return []
    count = f"{wrong} of {len(stored)} stored predictions are not reproduced"
    reason = "the weights, the configuration or the data have changed since"
    return [f"{count} (largest difference {difference.max():.2g}): {reason}"]
