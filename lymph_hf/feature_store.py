"""Features on disk: memory-mapped files that are whole or absent, found by hashes of what they were computed from.

```
CACHE/<key of encoder and preparation>/<hash of the bags>.safetensors
```

A file holds some bags in a row, each found by the digest of its images and of the view. It says what it is in its
header, so nothing else has to be kept beside it, and it names neither patients nor paths.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .files import writing_file

logger = logging.getLogger(__name__)

_FORMAT = "lymph-hf features 1"
_KEY = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{32}\.safetensors")
_UNFINISHED = re.compile(r"\.writing-\d+-[0-9a-f]{32}\.safetensors")
_LOCK = ".lock"
_LARGEST_HEADER = 2**20  # bytes; ours have some hundred


class FeatureFileError(RuntimeError):
    """A file in a cache cannot be used; the message says why."""


@dataclass(frozen=True)
class StoredBag:
    """Features of one view of one bag.

    Attributes:
        digest: of images and view.
        view: 0 = the images as they are.
        features: (N, D) float32.
    """

    digest: str
    view: int
    features: torch.Tensor


@dataclass(frozen=True)
class FeatureFile:
    """What the header of a file says.

    Attributes:
        path: of the file.
        about: texts: `encoder`, `data` (a digest), `patients`, `cells`, `views`, `checksum` ...
        size: bytes.
        last_used: seconds since 1970.
        whole: no byte is missing at its end.
    """

    path: Path
    about: Mapping[str, str]
    size: int
    last_used: float
    whole: bool


class FeatureStore:
    """The features of one encoder.

    Args:
        cache_dir: of all encoders.
        key: from `feature_key`.
    """

    def __init__(self, cache_dir: str | Path, key: str):
        self.key = key
        self.folder = Path(cache_dir) / key

    def read(self, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        """Digest -> features (N, D), memory-mapped, for those of the wanted digests that are stored.

        Files that are damaged or not ours are passed over with a warning.
        """
        found: dict[str, torch.Tensor] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if not _FILE.fullmatch(path.name):
                continue
            try:
                bags = _read_bags(path, self.key, wanted)
            except FileNotFoundError:
                continue  # pruned meanwhile
            except FeatureFileError as error:
                logger.warning("%s is not used: %s. Its cells are encoded again.", path, error)
                continue
            if bags:
                found |= bags
                with suppress(OSError):  # a cache may be read-only
                    os.utime(path)
        return found

    def write(self, bags: Sequence[StoredBag], about: Mapping[str, str]) -> None:
        """Store bags in one new file.

        Args:
            bags: at least one.
            about: further texts for the header.
        """
        tensors = {
            "features": torch.cat([bag.features for bag in bags]),
            "offsets": torch.tensor([0, *(len(bag.features) for bag in bags)]).cumsum(0),
            "digests": torch.tensor([list(bytes.fromhex(bag.digest)) for bag in bags], dtype=torch.uint8),
        }
        originals = [len(bag.features) for bag in bags if bag.view == 0]
        about = {
            **about,
            "format": _FORMAT,
            "key": self.key,
            "patients": str(len(originals)),
            "cells": str(sum(originals)),
            "checksum": _checksum(tensors),
        }
        name = hashlib.sha256("".join(bag.digest for bag in bags).encode()).hexdigest()[:32]
        with writing_file(self.folder / f"{name}.safetensors") as beside:
            save_file(tensors, beside, metadata=about)

    @contextmanager
    def locked(self, timeout: float = -1) -> Iterator[None]:
        """Keep other processes from writing; what a killed one left half-written is removed.

        Args:
            timeout: seconds to wait for them; -1 waits without end.

        Raises:
            Timeout: another process still writes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / _LOCK, timeout=timeout):
            for path in self.folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            yield


def stored_files(cache_dir: str | Path) -> list[FeatureFile]:
    """Every file of features in a cache, the damaged ones included; whatever else is there is passed over."""
    paths = sorted(path for path in Path(cache_dir).glob("*/*.safetensors") if _is_ours_by_name(path))
    headers = (read_header(path) for path in paths if _FILE.fullmatch(path.name))
    return [file for file in headers if file is not None]


def remove_files(cache_dir: str | Path, files: Collection[FeatureFile]) -> list[FeatureFile]:
    """Delete files of features, what killed processes left half-written, and folders that are empty then.

    Encoders that a process is just storing features of are left alone, with a warning.

    Returns:
        The files that are gone.
    """
    removed: list[FeatureFile] = []
    for folder in sorted({path.parent for path in Path(cache_dir).glob("*/*.safetensors") if _is_ours_by_name(path)}):
        mine = [file for file in files if file.path.parent == folder]
        try:
            with FeatureStore(cache_dir, folder.name).locked(timeout=0):
                for file in mine:
                    file.path.unlink(missing_ok=True)
                if {path.name for path in folder.iterdir()} <= {_LOCK}:
                    (folder / _LOCK).unlink(missing_ok=True)
        except Timeout:
            logger.warning("%s is being written to: left as it is.", folder)
            continue
        removed += mine
        with suppress(OSError):  # not empty
            folder.rmdir()
    return removed


def read_header(path: Path) -> FeatureFile | None:
    """What a file says of itself; `None` when it is not a file of features."""
    try:
        stat = path.stat()
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= _LARGEST_HEADER else {}
        about = header.pop("__metadata__", {})
        end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if about.get("format") != _FORMAT:
        return None
    return FeatureFile(path, about, stat.st_size, stat.st_mtime, whole=stat.st_size == end)


def _is_ours_by_name(path: Path) -> bool:
    written = _FILE.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name)
    return bool(_KEY.fullmatch(path.parent.name) and written)


def _read_bags(path: Path, key: str, wanted: Collection[str]) -> dict[str, torch.Tensor]:
    header = read_header(path)
    if header is None:
        if not path.exists():
            raise FileNotFoundError(path)
        raise FeatureFileError("it is not a file of features")
    if header.about.get("key") != key:
        raise FeatureFileError("it belongs to another encoder")
    try:
        tensors = load_file(path)  # mapped: nothing is read yet
        digests = [row.tobytes().hex() for row in tensors["digests"].numpy()]
    except (SafetensorError, KeyError) as error:
        raise FeatureFileError(f"it is damaged ({error})") from error
    if set(wanted).isdisjoint(digests):
        return {}
    if _checksum(tensors) != header.about.get("checksum"):
        raise FeatureFileError("its content has changed since it was written")
    bounds = tensors["offsets"].tolist()
    rows = zip(digests, bounds, bounds[1:], strict=False)
    return {digest: tensors["features"][start:end] for digest, start, end in rows if digest in wanted}


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(repr((name, tuple(tensors[name].shape))).encode())
        digest.update(tensors[name].numpy())
    return digest.hexdigest()
