"""Small cohort folders for tests: drawn noise, invented patients."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lymph_hf.cohort import Cohort, Patient

SIDE = 16
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def image_bytes(seed: int = 0, *, mode: str = "RGB", side: int = SIDE, kind: str = "PNG", **options) -> bytes:
    """One encoded image of seeded noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise).convert(mode), kind, **options)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_images(folder: Path, seeds: Sequence[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (folder / f"{number:06d}.png").write_bytes(image_bytes(seed))


def write_table(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def generic_cohort(root: Path, table: str, cells: Mapping[str, int] | None = None) -> Path:
    """``clinical.csv`` as given and ``cells[patient]`` images each; without ``cells``, two per row."""
    write_table(root / "clinical.csv", table)
    if cells is None:
        rows = list(csv.reader(io.StringIO(table), delimiter=";" if ";" in table.splitlines()[0] else ","))[1:]
        cells = {row[0].strip(): 2 for row in rows if row}
    seed = 0
    (root / "images").mkdir(exist_ok=True)
    for patient_id, count in cells.items():
        write_images(root / "images" / patient_id, range(seed, seed + count))
        seed += count
    return root


def challenge_cohort(root: Path, *, train: Sequence[str] = (), test: Sequence[str] = (), **tables: str) -> Path:
    """Image folders of both parts; tables by keyword: ``train_table``, ``test_table``, ``annotation``."""
    seed = 1000
    for folder, ids in (("trainset", train), ("testset", test)):
        for patient_id in ids:
            write_images(root / folder / patient_id, (seed, seed + 1))
            seed += 2
    places = {
        "train_table": "trainset/trainset_true.csv",
        "test_table": "testset/testset_data.csv",
        "annotation": "clinical_annotation.csv",
    }
    for name, text in tables.items():
        write_table(root / places[name], text)
    return root


def cohort_in_memory(labels: Mapping[str, str | None], digests: Mapping[str, tuple[str, ...]] | None = None) -> Cohort:
    """A cohort without files, for everything that never opens an image."""
    patients = tuple(Patient(name, (Path(f"{name}.png"),), label) for name, label in labels.items())
    return Cohort(Path("memory"), "generic", patients, digests=digests or {})
