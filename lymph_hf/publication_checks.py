"""What may not leave: checks of a folder before it is published."""

import io
import json
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from PIL import Image
from safetensors import SafetensorError, safe_open

from .card_patterns import (
    ADAPTER_CARD,
    BASE_CARD,
    DATA_CARD,
    ENCODER_CARD,
    MODEL_CARD,
    SPACE_CARD,
    CardPattern,
    card_problems,
)
from .files import folder_files
from .modeling_loading import ADAPTER_WEIGHTS
from .runs import Run

TEXT = {".css", ".csv", ".json", ".md", ".py", ".txt"}
PICTURES = {".jpeg", ".jpg", ".png"}
# What matplotlib writes into a picture of its own, and how JPEG stores its pixels.
_HARMLESS_NOTES = {"dpi", "Software", "adobe", "adobe_transform", "progression", "progressive"}
_HARMLESS_NOTES |= {"jfif", "jfif_density", "jfif_unit", "jfif_version"}
_DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_TRAINING_STATE = re.compile(r"optimizer|exp_avg|momentum_buffer|scheduler|scaler|rng_state", re.IGNORECASE)
_DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d[-/](?:0[1-9]|1[0-2])[-/](?:0[1-9]|[12]\d|3[01])|\d{1,2}[./]\d{1,2}[./](?:19|20)\d\d)(?!\d)"
)
_PATH = re.compile(r"(?<![\w.:/~-])/(?:home|root|Users|mnt|media|tmp|var|work|srv|scratch|data)/\w|\b[A-Za-z]:\\\w")
# Shorter ones, or short numbers, cannot be told from the words and numbers of a configuration.
_SEARCHABLE = re.compile(r"(?!\d{1,4}$).{3,}")


@dataclass(frozen=True)
class Contents:
    """What a kind of repository may and must hold.

    Attributes:
        name: of the kind.
        suffixes: of its files.
        required: files that have to be there.
        card: what its README says.
        folders: sub-folders that it may have; `None` = any.
    """

    name: str
    suffixes: frozenset[str]
    required: tuple[str, ...]
    card: CardPattern
    folders: frozenset[str] | None = frozenset()


# Beside an encoder: the model that it was trained in, by the objective.
WHOLES = ("lymph-mae", "classifier")
_WITHOUT_CODE = frozenset({".json", ".md", ".png", ".safetensors"})
_SETTINGS = ("README.md", "config.json", "preprocessor_config.json")
MODEL = Contents("model", _WITHOUT_CODE | {".py"}, _SETTINGS, MODEL_CARD)
BASE = Contents("base", MODEL.suffixes, _SETTINGS, BASE_CARD)
ADAPTER = Contents("adapter", _WITHOUT_CODE, (*_SETTINGS, "adapter_config.json", ADAPTER_WEIGHTS), ADAPTER_CARD)
ENCODER = Contents("encoder", _WITHOUT_CODE, _SETTINGS[:2], ENCODER_CARD, frozenset(WHOLES))
DATASET = Contents("data set", frozenset({".md", ".parquet"}), ("README.md",), DATA_CARD, frozenset({"data"}))
SPACE = Contents("Space", frozenset(TEXT | PICTURES | {".zip"}), ("README.md", "requirements.txt"), SPACE_CARD, None)


def run_identifiers(run: Run) -> set[str]:
    """Every patient identifier that the files of a run hold."""
    found: set[str] = set()
    if run.split.exists():
        split = json.loads(run.split.read_text(encoding="utf-8"))
        found |= {name for part in split.values() if isinstance(part, list) for name in part}
    if run.cohort.exists():
        exclusions = json.loads(run.cohort.read_text(encoding="utf-8"))["exclusions"]
        found |= {item["patient_id"] for item in exclusions}
    for table in (run.folder / "validation.csv", run.evaluation / "predictions.csv"):
        if table.exists():
            found |= set(pd.read_csv(table, dtype={"patient_id": str}, usecols=["patient_id"])["patient_id"])
    return {name for name in found if name}


def run_digests(run: Run) -> set[str]:
    """SHA-256 of every image that the files of a run name: whoever has an image could ask whether it was there."""
    if not run.cohort.exists():
        return set()
    recorded = json.loads(run.cohort.read_text(encoding="utf-8"))["digests"]
    return {digest for part in recorded.values() for digest in part}


def searchable(identifiers: Iterable[str]) -> list[str]:
    """Identifiers that can be found in a text without mistaking plain numbers and words for them."""
    return sorted(name for name in identifiers if _SEARCHABLE.fullmatch(name))


def folder_problems(
    folder: Path, identifiers: Iterable[str] = (), contents: Contents = MODEL, digests: Iterable[str] = ()
) -> list[str]:
    """Why a folder may not be published; empty when it may.

    Args:
        folder: with a card.
        identifiers: of the patients it was made from; none may stand in a file.
        contents: what a folder of this kind may and must hold.
        digests: of the images it was made from; none may stand in a file.

    Returns:
        One sentence per problem, with the file's name.
    """
    names, digests = searchable(identifiers), frozenset(digests)
    # As a part of a file's name too: P003_1.jpg.
    pattern = re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, names))})(?![^\W_])") if names else None
    problems = [f"{path.name}: only {_allowed(contents)} are published" for path in _strange_folders(folder, contents)]
    for name, path in folder_files(folder).items():
        if not _is_allowed(name, contents):
            problems.append(f"{name}: only {_allowed(contents)} are published")
        else:
            found = [*_name_problems(name, pattern), *_file_problems(path, contents, pattern, digests)]
            problems += [f"{name}: {problem}" for problem in found]
    return problems + _missing(folder, contents) + _shard_problems(folder)


def _strange_folders(folder: Path, contents: Contents) -> list[Path]:
    if contents.folders is None:
        return []
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in contents.folders]


def _is_allowed(name: str, contents: Contents) -> bool:
    parts = name.split("/")
    inside = len(parts) == 1 or contents.folders is None or parts[:-1] in [[folder] for folder in contents.folders]
    return inside and not any(part.startswith(".") for part in parts) and Path(name).suffix in contents.suffixes


def _allowed(contents: Contents) -> str:
    places = "" if not contents.folders else f" (also in {', '.join(sorted(contents.folders))}/)"
    return f"{', '.join(sorted(contents.suffixes))} files{places}"


def _name_problems(name: str, identifiers: re.Pattern | None) -> list[str]:
    found = (identifiers and identifiers.search(name)) or _DATE.search(name)
    return ["its name holds a patient identifier or a date"] if found else []


def _file_problems(
    path: Path, contents: Contents, identifiers: re.Pattern | None, digests: frozenset[str]
) -> Iterable[str]:
    if path.suffix in TEXT:
        return _text_problems(path, contents, identifiers, digests)
    if path.suffix in PICTURES:
        return _picture_problems(path)
    if path.suffix == ".zip":
        return _archive_problems(path, contents, identifiers, digests)
    return _table_problems(path, identifiers) if path.suffix == ".parquet" else _weight_problems(path)


def _archive_problems(
    path: Path, contents: Contents, identifiers: re.Pattern | None, digests: frozenset[str]
) -> Iterator[str]:
    """What is in an archive is looked at like the files beside it."""
    inside = replace(contents, name="archive", suffixes=contents.suffixes - {".zip"})
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(path) as archive:
        if archive.comment:
            yield "holds a comment"
        archive.extractall(temporary)
        for name, member in folder_files(Path(temporary)).items():
            if not _is_allowed(name, inside):
                yield f"{name}: only {_allowed(inside)} are published"
                continue
            found = [*_name_problems(name, identifiers), *_file_problems(member, inside, identifiers, digests)]
            yield from (f"{name}: {problem}" for problem in found)


def _text_problems(
    path: Path, contents: Contents, identifiers: re.Pattern | None, digests: frozenset[str]
) -> list[str]:
    text = path.read_text(encoding="utf-8")
    problems = []
    for kind, pattern in (("a patient identifier", identifiers), ("a date", _DATE), ("a path", _PATH)):
        if pattern and (found := pattern.search(text)):
            line = text.count("\n", 0, found.start()) + 1
            problems.append(f"holds {kind} in line {line}")  # without repeating it: logs are passed on
    if not digests.isdisjoint(_DIGEST.findall(text)):
        problems.append("holds digests of images it was made from")
    if path.name == "README.md":
        problems += card_problems(text, contents.card)
    if path.suffix == ".json":
        problems += _json_problems(text)
    return problems


def _json_problems(text: str) -> list[str]:
    try:
        json.loads(text)
    except ValueError as error:
        return [f"is not JSON ({error})"]
    return []


def _picture_problems(source: Path | io.BytesIO) -> list[str]:
    with Image.open(source) as image:
        notes = sorted(set(image.info) - _HARMLESS_NOTES)
        exif = len(image.getexif())
    problems = []
    if notes:
        problems.append(f"holds notes {notes}")
    if exif:
        problems.append(f"holds {exif} EXIF entries")
    return problems


def _table_problems(path: Path, identifiers: re.Pattern | None) -> Iterator[str]:
    """Of a parquet file: texts as anywhere else, embedded pictures without names and notes."""
    for batch in pq.ParquetFile(path).iter_batches(batch_size=4):
        for row in batch.to_pylist():
            for column, value in row.items():
                for leaf in value if isinstance(value, list) else [value]:
                    if found := next(_leaf_problems(leaf, identifiers), None):
                        yield f"column {column} {found}"
                        return


def _leaf_problems(value: Any, identifiers: re.Pattern | None) -> Iterator[str]:
    if isinstance(value, str) and ((identifiers and identifiers.search(value)) or _DATE.search(value)):
        yield "holds a patient identifier or a date"
    elif isinstance(value, dict):
        if value["path"] is not None:
            yield "holds names of files"
        yield from _picture_problems(io.BytesIO(value["bytes"]))


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


def _missing(folder: Path, contents: Contents) -> list[str]:
    missing = [name for name in contents.required if not (folder / name).exists()]
    if ".safetensors" in contents.suffixes and not any(folder.glob("*.safetensors")):
        missing.append("model.safetensors")
    return [f"{name} is missing" for name in missing]


def _shard_problems(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [f"{name} is missing, which {index.name} names" for name in sorted(shards) if not (folder / name).exists()]


def prediction_problems(
    stored: pd.DataFrame, probabilities: np.ndarray, columns: Sequence[str], tolerance: float = 1e-3
) -> list[str]:
    """Where predictions differ from stored ones by more than rounding explains.

    Args:
        stored: a table of `prediction_table`, n rows.
        probabilities: (n, C) of the same patients.
        columns: of `stored`, one per column of `probabilities`.
        tolerance: a thousandth is rounding in 32 bits, a hundredth in 16.
    """
    difference = np.abs(stored[list(columns)].to_numpy() - probabilities).max(axis=1)
    wrong = int((difference > tolerance).sum())
    if not wrong:
        return []
    count = f"{wrong} of {len(stored)} stored predictions are not reproduced"
    reason = "the weights, the configuration or the data have changed since"
    return [f"{count} (largest difference {difference.max():.2g}): {reason}"]
