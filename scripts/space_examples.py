"""Paint the examples of the Space: four patients and a small cohort that never lived. Writes space/examples."""

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from lymph_hf.painting import CELL_TYPES, Smear, paint_cell
from lymph_hf.population import LABELS

FOLDER = Path(__file__).parents[1] / "space" / "examples"
CELLS = 24
SIDE = 224
STAMP = (2020, 1, 1, 0, 0, 0)  # the same bytes every time
MIXTURES = {  # name -> shares of the cell types: typical of a label, or half and half
    "reactive": np.array(LABELS["reactive"].mixtures[0].mean),
    "tumoral": np.array(LABELS["tumoral"].mixtures[0].mean),
}
MIXTURES["unclear"] = (MIXTURES["reactive"] + MIXTURES["tumoral"]) / 2
BATCH = (("A-01", "reactive", 31, "F", 6.1), ("A-02", "tumoral", 74, "M", 38.5), ("A-03", "unclear", "", "", ""))


def main():
    FOLDER.mkdir(exist_ok=True)
    patients = {name: paint_patient(shares, seed) for seed, (name, shares) in enumerate(MIXTURES.items())}
    for name, cells in patients.items():
        write_zip(f"{name}.zip", {f"cell-{i:02d}.jpg": cell for i, cell in enumerate(cells, start=1)})
    batch = {
        f"{identifier}/{i:02d}.jpg": cell
        for identifier, name, *_ in BATCH
        for i, cell in enumerate(patients[name][:16], start=1)
    }
    write_zip("batch.zip", batch)
    with (FOLDER / "batch.csv").open("w", newline="") as file:
        rows = [(identifier, *clinical) for identifier, _, *clinical in BATCH]
        csv.writer(file).writerows([("patient_id", "age", "sex", "lymphocyte_count"), *rows])
    paint_field(np.random.default_rng(7)).save(FOLDER / "field.jpg", quality=85)


def paint_patient(shares: np.ndarray, seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    smear = Smear.draw(rng)
    types = rng.choice(list(CELL_TYPES), CELLS, p=shares / shares.sum())
    return [jpeg(Image.fromarray(paint_cell(cell_type, smear, rng, SIDE))) for cell_type in types]


def paint_field(rng: np.random.Generator, rows: int = 4, columns: int = 5) -> Image.Image:
    """Painted cells side by side, as if one picture: each fades out where the next begins."""
    smear = Smear.draw(rng)
    pitch = SIDE - 40
    density = np.zeros((rows * pitch + 40, columns * pitch + 40, 3), np.float32)
    ramp = np.clip(np.minimum(np.arange(SIDE), np.arange(SIDE)[::-1]) / 40, 0, 1)
    fade = np.minimum(ramp[:, None], ramp)[..., None]
    for row, column in np.ndindex(rows, columns):
        cell_type = rng.choice(list(CELL_TYPES), p=MIXTURES["tumoral"] / MIXTURES["tumoral"].sum())
        cell = paint_cell(cell_type, smear, rng, SIDE).astype(np.float32)
        corner = (slice(row * pitch, row * pitch + SIDE), slice(column * pitch, column * pitch + SIDE))
        density[corner] = np.maximum(density[corner], fade * -np.log((cell + 1) / (1 + smear.background)))
    light = np.exp(-density) * (1 + smear.background) - 1
    return Image.fromarray(light.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def write_zip(name: str, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(FOLDER / name, "w") as archive:
        for path, data in files.items():
            archive.writestr(zipfile.ZipInfo(path, STAMP), data)


if __name__ == "__main__":
    main()
