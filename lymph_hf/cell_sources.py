"""Where single cells come from: a folder of patients, a folder of images, or parquet files.

```
cohort/clinical.csv, cohort/images/<patient_id>/*     patients; cell types from cohort/cells.csv where it exists
cells/cells.csv, cells/[images/]<file>                columns file[,cell_type][,patient_id]
cells/<cell_type>/*.jpg                               one folder per type
cells/*.jpg                                           no types
cells/*.parquet, cells.parquet                        columns image[,cell_type][,patient_id][,file]
```
"""

import bisect
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .bags import build_bags
from .cells import Cells
from .clinical_table import CohortError, read_csv
from .cohort import Cohort, Patient, read_cohort, scan_images
from .images import IMAGE_SUFFIXES, CellImageError, open_cell_image

logger = logging.getLogger(__name__)


def read_cells(source: str | Path, *, cache_dir: str | Path | None = None) -> Cells:
    """Every readable cell of a source; unreadable images are left out with a logged warning.

    The test patients of a folder in the challenge layout are left out: nothing may be learnt from them.

    Args:
        source: a folder of patients, a folder of images or parquet files, or one parquet file.
        cache_dir: where the Arrow copy of a cohort goes.

    Raises:
        CohortError: nothing there, or a table that does not fit its images.
    """
    path = Path(source)
    if not path.exists():
        raise CohortError(f"{path}: no such file or folder; expected cells, a folder of patients or parquet files")
    if (path / "clinical.csv").is_file() or (path / "trainset").is_dir():
        return cells_from_cohort(read_cohort(path), cache_dir=cache_dir)
    parquet = [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet"))
    return cells_from_parquet(parquet) if parquet else cells_from_folder(path)


def cells_from_cohort(cohort: Cohort, *, cache_dir: str | Path | None = None) -> Cells:
    """The cells of a cohort but those of its `test` part, from the `"cells"` view of its bags."""
    learnable = [patient.patient_id for patient in cohort.patients if patient.part != "test"]
    cohort = cohort.select(learnable)
    cohort = cohort if cohort.digests else scan_images(cohort)
    _warn_exclusions(cohort)
    table = cohort.root / "cells.csv"
    types = _read_table(table, ("patient_id", "file", "cell_type")) if table.is_file() else []
    type_of = {(row["patient_id"], row["file"]): row["cell_type"] or None for row in types}
    keys = [(patient.patient_id, path.name) for patient in cohort.patients for path in patient.images]
    return Cells(
        source=cohort.root.name,
        files=tuple(file for _, file in keys),
        digests=tuple(digest for patient in cohort.patients for digest in cohort.digests[patient.patient_id]),
        cell_types=tuple(type_of.get(key) for key in keys),
        patient_ids=tuple(patient_id for patient_id, _ in keys),
        read=_Rows(build_bags(cohort, "cells", cache_dir=cache_dir)),
    )


def cells_from_folder(folder: str | Path) -> Cells:
    """The images of a folder, with what `cells.csv` or the names of the sub-folders say of them.

    Raises:
        CohortError: no image, or `cells.csv` names a file that is not there or a file twice.
    """
    folder = Path(folder)
    table = folder / "cells.csv"
    found = _listed(table) if table.is_file() else _found(folder)
    if not found:
        raise CohortError(f"{folder}: no image found; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    # Read and checked as a cohort of one nameless patient.
    patient = Patient("", tuple(path for path, *_ in found))
    cohort = scan_images(Cohort(folder, "cells", (patient,)))
    _warn_exclusions(cohort)
    paths = cohort.patients[0].images
    known = {path: (cell_type, patient_id) for path, cell_type, patient_id in found}
    return Cells(
        source=folder.name,
        files=tuple(path.relative_to(folder).as_posix() for path in paths),
        digests=cohort.digests[""],
        cell_types=tuple(known[path][0] for path in paths),
        patient_ids=tuple(known[path][1] for path in paths),
        read=_Files(paths),
    )


def cells_from_parquet(paths: Sequence[str | Path]) -> Cells:
    """Cells of parquet files, streamed: images stay in the files and are read by row group when they are needed.

    Reading in random order wants small row groups; `datasets` writes such (100 rows) for images.

    Args:
        paths: files with a column `image` (bytes, or the image structure of `datasets`) and, where known,
            `cell_type`, `patient_id` and `file`.

    Raises:
        CohortError: no column `image`, or no readable image.
    """
    paths = [Path(path) for path in paths]
    read = _ParquetRows(paths)
    names = [name or str(row) for row, name in enumerate(read.column("file"))]
    digests, reasons = [], Counter()
    for row in tqdm(range(len(read)), desc="checking images", disable=None):
        data = read(row)
        try:
            open_cell_image(data)
        except CellImageError as error:
            reasons[str(error)] += 1
            digests.append("")
        else:
            digests.append(hashlib.sha256(data).hexdigest())
    if not any(digests):
        raise CohortError(f"{paths[0]}: none of {len(read)} images can be read: {dict(reasons)}")
    _warn_left_out(paths[0].name, sum(reasons.values()), reasons)
    cells = Cells(
        source=paths[0].name if len(paths) == 1 else paths[0].parent.name,
        files=tuple(names),
        digests=tuple(digests),
        cell_types=tuple(read.column("cell_type")),
        patient_ids=tuple(read.column("patient_id")),
        read=read,
    )
    return cells.select(row for row, digest in enumerate(digests) if digest)


def _listed(table: Path) -> list[tuple[Path, str | None, str | None]]:
    """(path, cell type, patient) of every row of a `cells.csv`."""
    rows = _read_table(table, ("file",))
    root = table.parent / "images" if (table.parent / "images").is_dir() else table.parent
    found = {}
    for row in rows:
        path = root / row["file"]
        if not path.is_file():
            raise CohortError(f"{table}: file {row['file']!r} is not in {root}; correct the row or remove it")
        if path in found:
            raise CohortError(f"{table}: file {row['file']!r} stands twice; keep one row")
        found[path] = (path, row.get("cell_type") or None, row.get("patient_id") or None)
    return list(found.values())


def _found(folder: Path) -> list[tuple[Path, str | None, None]]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return [(path, None if path.parent == folder else path.parent.name, None) for path in paths]


def _read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    table = read_csv(path, path.name, key=columns[0])
    if missing := set(columns) - set(table.titles):
        raise CohortError(f"{path}: no column {sorted(missing)}; it has {sorted(table.titles)}")
    return list(table.rows.values())


def _warn_exclusions(cohort: Cohort) -> None:
    images = [exclusion for exclusion in cohort.exclusions if exclusion.file]
    _warn_left_out(cohort.root.name, len(images), Counter(exclusion.reason for exclusion in images))


def _warn_left_out(source: str, count: int, reasons: Counter) -> None:
    if count:
        common = "; ".join(f"{reason} ({n})" for reason, n in reasons.most_common(3))
        logger.warning("%s: %d unreadable images left out: %s", source, count, common)


@dataclass(frozen=True)
class _Files:
    paths: Sequence[Path]

    def __call__(self, row: int) -> bytes:
        return self.paths[row].read_bytes()


class _Rows:
    """The `image` column of a `datasets.Dataset`."""

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows.select_columns("image").with_format("arrow")

    def __call__(self, row: int) -> bytes:
        return self.rows[row]["image"][0].as_py()["bytes"]


class _ParquetRows:
    """The `image` column of parquet files by row, with the last few row groups kept."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._open()

    def _open(self) -> None:
        self.files = [pq.ParquetFile(path) for path in self.paths]
        for path, file in zip(self.paths, self.files, strict=True):
            if "image" not in file.schema_arrow.names:
                raise CohortError(f"{path}: no column 'image'; it has {file.schema_arrow.names}")
        self.groups = [(file, group) for file in self.files for group in range(file.num_row_groups)]
        self.ends = np.cumsum([file.metadata.row_group(g).num_rows for file, g in self.groups]).tolist()
        self._group = lru_cache(maxsize=4)(self._read_group)

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}  # open files do not travel to the workers of a loader

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["paths"])

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __call__(self, row: int) -> bytes:
        group = bisect.bisect_right(self.ends, row)
        value = self._group(group)[row - (self.ends[group - 1] if group else 0)].as_py()
        return value["bytes"] if isinstance(value, dict) else value

    def column(self, name: str) -> list[str | None]:
        """A whole column of text; all `None` where it does not exist."""
        values: list[str | None] = []
        for file in self.files:
            present = name in file.schema_arrow.names
            values += file.read([name])[name].to_pylist() if present else [None] * file.metadata.num_rows
        return [None if value is None else str(value) for value in values]

    def _read_group(self, group: int) -> Any:
        file, number = self.groups[group]
        return file.read_row_group(number, columns=["image"])["image"].combine_chunks()
