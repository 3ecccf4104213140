"""A synthetic lymphocytosis cohort on disk: painted cells, clinical tables, and the best possible scores.

It has the shape of a real cohort and none of its patients, so that every command can be tried, tested and
judged without patient data. Who the patients are: :mod:`lymph_hf.population`; how a cell looks:
:mod:`lymph_hf.painting`.

    out/
      clinical.csv, images/<patient_id>/NNNNNN.jpg        layout "generic"
      trainset/, testset/, clinical_annotation.csv        layout "challenge" (see :mod:`lymph_hf.cohort`)
      cells.csv        true type of every cell: for probes and for judging explanations, never a model input
      generator.json   parameters, population, best possible scores, withheld labels of the test part
      examples.png     a row of painted examples per cell type
"""

import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from .cohort import DEFAULT_REFERENCE_DATE
from .painting import CELL_TYPES, Smear, contact_sheet, paint_cell
from .population import CELLS, LABELS, TUMORAL_SHARE, Patients, best_auroc, draw_patients

logger = logging.getLogger(__name__)

Layout = Literal["generic", "challenge"]

GENERATOR_VERSION = 1  # raise it when the same parameters give other files
TEST_SHARE = 0.2  # of each label, in the challenge layout
_JPEG_QUALITY = 90
_EXAMPLES = 6  # per cell type
_IMAGES_PER_WORKER = 1000  # starting a process takes about as long as painting this many
# Not "fork": the parent may hold threads of numerical libraries, which do not survive it.
_START_METHOD = "spawn"
_MANIFEST = "generator.json"


@dataclass(frozen=True)
class SyntheticReport:
    """What was written, and how well it can be told apart at best."""

    root: Path
    layout: str
    patients: dict[str, int]  # by label
    images: int
    best_auroc: dict[str, float]  # in the whole population: "cell", "clinic", "images", "both"
    written_auroc: dict[str, float]  # the same classifiers on the patients written
    reused: bool  # the folder held the identical cohort already

    def summary(self) -> str:
        """A text table."""
        labels = ", ".join(f"{number} {label}" for label, number in self.patients.items())
        state = "already there, unchanged" if self.reused else "written"
        lines = [
            f"{self.root}: synthetic cohort, {self.layout} layout, {state}",
            f"{sum(self.patients.values())} patients ({labels}), {self.images} images",
            "",
            f"{'best possible AUROC from':<26}{'population':>12}{'this cohort':>13}",
        ]
        names = {
            "cell": "one random cell",
            "clinic": "age, sex and count",
            "images": "all cells",
            "both": "cells, age, sex and count",
        }
        for key, name in names.items():
            lines.append(f"{name:<26}{self.best_auroc[key]:>12.3f}{self.written_auroc[key]:>13.3f}")
        return "\n".join(lines)


def write_synthetic_cohort(
    out: Path,
    *,
    patients: int = 60,
    seed: int = 0,
    layout: Layout = "generic",
    cells: tuple[int, int] | None = None,
    image_size: int = 224,
    missing: float = 0.0,
    workers: int | None = None,
    progress: bool = True,
) -> SyntheticReport:
    """Write a cohort of painted cells to the folder `out`; the same arguments give the same bytes.

    The cohort is written beside `out` and moved there when complete. A folder that already holds the cohort
    of the same parameters is left as it is.

    Args:
        out: folder to make.
        patients: number of patients, at least 2 (challenge: 3); 69 % are tumoral, and no label is empty.
        seed: seed of everything random.
        layout: "generic" or "challenge"; the latter puts about 20 % of each label into the test part.
        cells: fewest and most cells of a patient; None = 16 and 198, as in the published cohort.
        image_size: side of the square images in pixels, at least 32.
        missing: share of ages (dates of birth), sexes and counts left empty, in [0, 1).
        workers: painting processes, whatever their number with the same result; None = one per 1,000 images,
            at most one per core.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: `out` exists and holds something else.
    """
    cells = cells or CELLS
    _check(patients, layout, cells, image_size, missing)
    out = Path(out)
    parameters = {
        "patients": patients,
        "seed": seed,
        "layout": layout,
        "cells": list(cells),
        "image_size": image_size,
        "missing": missing,
    }
    if earlier := _earlier_result(out, parameters):
        logger.info("%s already holds this synthetic cohort; nothing was painted", out)
        return _report(out, earlier, reused=True)

    cohort_seed, picture_seed, example_seed = np.random.SeedSequence(seed).spawn(3)
    rng = np.random.default_rng(cohort_seed)
    drawn = draw_patients(_labels(patients, rng), cells, missing, rng)
    table = _table(drawn, layout, rng)
    types = [rng.permutation(np.repeat(list(CELL_TYPES), counts)) for counts in drawn.cell_counts]

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        draft = Path(beside) / out.name
        folders = [draft / parent / own for parent, own in zip(table["parent"], table["patient_id"], strict=True)]
        jobs = zip(folders, types, picture_seed.spawn(patients), [image_size] * patients, strict=True)
        _paint_all(list(jobs), workers, progress)
        {"generic": _write_generic, "challenge": _write_challenge}[layout](draft, table)
        _write_cell_types(draft, table["patient_id"], types)
        _paint_examples(image_size, np.random.default_rng(example_seed)).save(draft / "examples.png")
        manifest = _manifest(parameters, drawn, table)
        (draft / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()  # empty, or `_earlier_result` would have refused it
        draft.rename(out)
    logger.info("wrote %d patients, %d images to %s", patients, manifest["images"], out)
    return _report(out, manifest, reused=False)


def _check(patients: int, layout: str, cells: tuple[int, int], image_size: int, missing: float) -> None:
    if layout not in get_args(Layout):
        raise ValueError(f"layout is {layout!r}: choose one of {', '.join(get_args(Layout))}.")
    fewest = {"generic": 2, "challenge": 3}[layout]  # each label once, and one more for the test part
    if patients < fewest:
        raise ValueError(f"patients is {patients}: give at least {fewest} in the {layout} layout.")
    if not 1 <= cells[0] <= cells[1]:
        raise ValueError(f"cells is {cells}: give (fewest, most) with 1 <= fewest <= most.")
    if image_size < 32:
        raise ValueError(f"image_size is {image_size}: give at least 32 pixels, or no cell can be seen.")
    if not 0 <= missing < 1:
        raise ValueError(f"missing is {missing}: give a share of the clinical values, 0 <= missing < 1.")


def _earlier_result(out: Path, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of an identical cohort in `out`; None when nothing is there; else an error."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest_path = out / _MANIFEST
    if not manifest_path.is_file():
        raise FileExistsError(f"{out} exists and is no synthetic cohort: name a new or empty folder.")
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    earlier = {"generator": manifest.get("generator"), **manifest.get("parameters", {})}
    wanted = {"generator": GENERATOR_VERSION, **parameters}
    if earlier != wanted:
        other = "; ".join(
            f"{key} {earlier.get(key)!r}, not {value!r}" for key, value in wanted.items() if earlier.get(key) != value
        )
        raise FileExistsError(f"{out} holds another synthetic cohort ({other}): name a new folder.")
    found = sum(1 for _ in out.rglob("*.jpg"))
    if found != manifest["images"]:
        raise FileExistsError(f"{out} holds {found} of {manifest['images']} images: remove it and write it anew.")
    return manifest


def _labels(patients: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) shuffled booleans, the share of tumoral patients as near to the published one as possible."""
    positives = min(max(round(TUMORAL_SHARE * patients), 1), patients - 1)
    return rng.permutation(np.arange(patients) < positives)


def _table(drawn: Patients, layout: Layout, rng: np.random.Generator) -> pd.DataFrame:
    """One row per patient: identifier, label name, clinical values, folder of the images."""
    number = len(drawn.tumoral)
    names = np.array(list(LABELS))
    table = pd.DataFrame(
        {
            "patient_id": [f"P{index + 1:0{max(3, len(str(number)))}d}" for index in range(number)],
            "label": names[drawn.tumoral.astype(int)],
            "age": drawn.age,
            "sex": drawn.sex,
            "lymphocyte_count": drawn.lymphocyte_count,
        }
    )
    parents = np.full(number, "images", dtype=object)
    if layout == "challenge":
        parents[:] = "trainset"
        for positive in (False, True):
            rows = rng.permutation(np.flatnonzero(drawn.tumoral == positive))
            held_out = min(max(round(TEST_SHARE * len(rows)), 1), len(rows) - 1)
            parents[rows[:held_out]] = "testset"
    table["parent"] = parents
    table["dashes"] = rng.random(number) < 0.5  # the spelling of the date of birth, in the challenge layout
    return table


def _write_generic(root: Path, table: pd.DataFrame) -> None:
    columns = ["patient_id", "label", "age", "sex", "lymphocyte_count"]
    table[columns].to_csv(root / "clinical.csv", index=False)


def _write_challenge(root: Path, table: pd.DataFrame) -> None:
    """The challenge's three tables with their quirks: two spellings of dates, one lower-case sex."""
    test = table["parent"] == "testset"
    sex = table["sex"].copy()
    sex[sex.index[(sex == "F") & ~test][:1]] = "f"
    rows = pd.DataFrame(
        {
            "ID": table["patient_id"],
            "LABEL": table["label"].map({name: code for code, name in enumerate(LABELS)}).mask(test, -1),
            "GENDER": sex,
            "DOB": [_birth_date(age, dashes) for age, dashes in zip(table["age"], table["dashes"], strict=True)],
            "LYMPH_COUNT": table["lymphocyte_count"],
        }
    )
    for folder in ("trainset", "testset"):
        (root / folder).mkdir(exist_ok=True)
    rows[~test].to_csv(root / "trainset" / "trainset_true.csv", index=False)
    rows[test].to_csv(root / "testset" / "testset_data.csv", index=False)
    rows.to_csv(root / "clinical_annotation.csv")


def _birth_date(age: float, dashes: bool) -> str:
    """A date of birth that gives `age` at the reference date; empty when the age is missing."""
    if np.isnan(age):
        return ""
    born = date.fromisoformat(DEFAULT_REFERENCE_DATE) - timedelta(days=round(age * 365.25))
    return f"{born:%d-%m-%Y}" if dashes else f"{born.month}/{born.day}/{born.year}"


def _write_cell_types(root: Path, patient_ids: Iterable[str], types: Iterable[np.ndarray]) -> None:
    rows = [
        (patient_id, _file_name(index), cell_type)
        for patient_id, own in zip(patient_ids, types, strict=True)
        for index, cell_type in enumerate(own)
    ]
    pd.DataFrame(rows, columns=["patient_id", "file", "cell_type"]).to_csv(root / "cells.csv", index=False)


def _file_name(index: int) -> str:
    return f"{index:06d}.jpg"


_Job = tuple[Path, np.ndarray, np.random.SeedSequence, int]  # folder, cell types, seed, image size


def _paint_all(jobs: list[_Job], workers: int | None, progress: bool) -> None:
    """Paint every patient; each has a seed of its own, so the pixels do not depend on who paints them."""
    images = sum(len(types) for _, types, _, _ in jobs)
    workers = workers or min(os.cpu_count() or 1, -(-images // _IMAGES_PER_WORKER), len(jobs))
    with tqdm(total=images, desc="painting cells", unit="image", disable=not progress) as bar:
        for painted in _in_processes(jobs, workers) if workers > 1 else map(_paint_patient, jobs):
            bar.update(painted)


def _in_processes(jobs: list[_Job], workers: int) -> Iterator[int]:
    with ProcessPoolExecutor(workers, multiprocessing.get_context(_START_METHOD)) as pool:
        yield from pool.map(_paint_patient, jobs)


def _paint_patient(job: _Job) -> int:
    folder, types, seed, size = job
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    smear = Smear.draw(rng)
    for index, cell_type in enumerate(types):
        image = Image.fromarray(paint_cell(str(cell_type), smear, rng, size))
        image.save(folder / _file_name(index), quality=_JPEG_QUALITY)
    return len(types)


def _paint_examples(size: int, rng: np.random.Generator) -> Image.Image:
    smears = [Smear.draw(rng) for _ in range(_EXAMPLES)]
    images = [Image.fromarray(paint_cell(cell_type, smear, rng, size)) for cell_type in CELL_TYPES for smear in smears]
    return contact_sheet(images, _EXAMPLES, row_names=tuple(CELL_TYPES))


def _manifest(parameters: dict[str, Any], drawn: Patients, table: pd.DataFrame) -> dict[str, Any]:
    withheld = table[table["parent"] == "testset"]
    return {
        "generator": GENERATOR_VERSION,
        "parameters": parameters,
        "cell_types": list(CELL_TYPES),
        "population": {"tumoral_share": TUMORAL_SHARE} | {name: asdict(model) for name, model in LABELS.items()},
        "patients": {name: int((table["label"] == name).sum()) for name in LABELS},
        "images": int(drawn.cell_counts.sum()),
        "best_auroc": best_auroc(tuple(parameters["cells"]), parameters["missing"]),
        "written_auroc": drawn.auroc(),
        "test_labels": dict(zip(withheld["patient_id"], withheld["label"], strict=True)),
    }


def _report(root: Path, manifest: dict[str, Any], *, reused: bool) -> SyntheticReport:
    return SyntheticReport(
        root=root,
        layout=manifest["parameters"]["layout"],
        patients=manifest["patients"],
        images=manifest["images"],
        best_auroc=manifest["best_auroc"],
        written_auroc=manifest["written_auroc"],
        reused=reused,
    )
