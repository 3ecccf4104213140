"""Patients as `datasets` rows, and as batches for a model."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch

from .augment import Augmentation
from .cohort import CLINICAL, Cohort, scan_images
from .images import open_cell_image
from .processing_lymph import LymphImageProcessor, pad_bags
from .sampling import Key

View = Literal["patients", "cells"]


class LymphBags(datasets.GeneratorBasedBuilder):
    """A cohort in Arrow, memory-mapped or streamed: a row per patient, or a row per cell.

    The encoded images are stored as they are on disk, so a cohort takes no more room than its files. The cache is
    keyed by what is in the cohort (values and image bytes), not by where it lies.

    Args:
        cohort: from `read_cohort`; its images are checked (`scan_images`) unless they have been.
        view: `"patients"` has `images` and `files` as lists; `"cells"` has one `image` and `file` per row.
        cache_dir: where the Arrow files go; `None` means the cache of `datasets`.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIGS = [
        datasets.BuilderConfig(name="patients", version=VERSION, description="a row per patient"),
        datasets.BuilderConfig(name="cells", version=VERSION, description="a row per cell"),
    ]
    # Rows are patients of several megabytes: the writer's default of hundreds would hold a whole cohort in memory.
    DEFAULT_WRITER_BATCH_SIZE = 4

    def __init__(self, cohort: Cohort, view: View = "patients", cache_dir: str | Path | None = None):
        self.cohort = cohort if cohort.digests else scan_images(cohort)
        cache_dir = None if cache_dir is None else str(cache_dir)
        super().__init__(cache_dir=cache_dir, config_name=view, hash=cohort_fingerprint(self.cohort))

    def _info(self) -> datasets.DatasetInfo:
        names = list(self.cohort.label_names)
        features: dict[str, Any] = {
            "patient_id": datasets.Value("string"),
            # ClassLabel cannot be without names, as in a cohort that has no label yet.
            "label": datasets.ClassLabel(names=names) if names else datasets.Value("string"),
            "age": datasets.Value("float64"),
            "sex": datasets.Value("string"),
            "lymphocyte_count": datasets.Value("float64"),
        }
        if self.config.name == "patients":
            features |= {
                "images": datasets.List(datasets.Image()),
                "files": datasets.List(datasets.Value("string")),
            }
        else:
            features |= {"image": datasets.Image(), "file": datasets.Value("string")}
        return datasets.DatasetInfo(description=self.config.description, features=datasets.Features(features))

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="cohort")]

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        for patient in self.cohort.patients:
            values = {"patient_id": patient.patient_id, "label": patient.label}
            values |= {name: getattr(patient, name) for name in CLINICAL}
            if self.config.name == "patients":
                images = [_encoded(path) for path in patient.images]
                yield (
                    patient.patient_id,
                    values | {"images": images, "files": [path.name for path in patient.images]},
                )
            else:
                for path in patient.images:
                    yield (
                        f"{patient.patient_id}/{path.name}",
                        values | {"image": _encoded(path), "file": path.name},
                    )


def build_bags(
    cohort: Cohort, view: View = "patients", *, cache_dir: str | Path | None = None, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """The cohort as a `datasets.Dataset` in the order of `cohort.patients`.

    Built once and memory-mapped afterwards; peak memory does not grow with the cohort.

    Args:
        cohort, view, cache_dir: as in `LymphBags`.
        streaming: an `IterableDataset` that reads image by image and writes nothing.
    """
    builder = LymphBags(cohort, view, cache_dir)
    if streaming:
        return builder.as_streaming_dataset(split="cohort")
    builder.download_and_prepare()
    return builder.as_dataset(split="cohort")


def cohort_fingerprint(cohort: Cohort) -> str:
    """A hash of everything a model can see of a checked cohort; of no path and no date."""
    digest = hashlib.sha256()
    for patient in cohort.patients:
        files = [path.name for path in patient.images]
        values = (patient.patient_id, patient.label, *(getattr(patient, name) for name in CLINICAL))
        digest.update(repr((values, files, cohort.digests[patient.patient_id])).encode())
    return digest.hexdigest()[:32]


class SampledBags(torch.utils.data.Dataset):
    """What decides about the cells that an access by `(epoch, index)` shows: `(seed, epoch, index)` alone.

    It therefore does not depend on the number of workers or on what was read before, and a resumed run sees the cells
    it would have seen.

    Args:
        max_cells: keep a random sample of at most this many cells; `None` keeps all.
        seed: of everything random.
    """

    def __init__(self, max_cells: int | None, seed: int):
        if max_cells is not None and max_cells < 1:
            raise ValueError(f"max_cells={max_cells}: expected at least 1, or None for all cells.")
        self.max_cells = max_cells
        self.seed = seed

    def sampled_cells(self, key: Key | int, cells: int) -> list[int]:
        """Which of a patient's `cells` images an access shows, in their order."""
        return sample_cells(cells, self.max_cells, self._generator(key))

    def _generator(self, key: Key | int) -> torch.Generator:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return torch.Generator().manual_seed(derived_seed(self.seed, epoch, index))


class BagDataset(SampledBags):
    """Patients as inputs of a model: decoded, sampled, augmented and normalised on access.

    Args:
        rows: the `"patients"` view; a key's index is the row.
        processor: the model's image processor.
        label2id: number of each label name; `None` leaves the labels out.
        max_cells: keep a random sample of at most this many cells; `None` keeps all.
        augmentation: random views for training; `None` shows the cells as they are.
        seed: of the sampling and the augmentation.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        processor: LymphImageProcessor,
        *,
        label2id: dict[str, int] | None = None,
        max_cells: int | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        super().__init__(max_cells, seed)
        self.rows = rows.with_format("arrow")  # plain bytes: only the cells that are used get decoded
        self.processor = processor
        self.standardizer = processor.standardizer
        self.label_ids = None if label2id is None else [label2id[name] for name in label_names_of(rows)]
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key | int) -> dict[str, Any]:
        """`(epoch, index)`, or an index alone (epoch 0) -> `pixel_values` (N, 3, H, W), `clinical` (F,), `labels`."""
        index = key[1] if isinstance(key, tuple) else key
        row = self.rows[index].to_pylist()[0]
        generator = self._generator(key)
        images = row["images"]
        # Sampled before decoding, so cells that are not used cost nothing.
        encoded = [images[i]["bytes"] for i in sample_cells(len(images), self.max_cells, generator)]
        item = {"pixel_values": cell_pixels(encoded, self.processor, self.augmentation, generator)}
        if self.standardizer.features:
            item["clinical"] = self.standardizer.transform([{name: row[name] for name in CLINICAL}])[0]
        if self.label_ids is not None:
            item["labels"] = self.label_ids[index]
        return item


def sample_cells(cells: int, max_cells: int | None, generator: torch.Generator) -> list[int]:
    """Rising indices of a random sample of at most `max_cells` of a patient's cells; `None` = all of them."""
    if max_cells is None or cells <= max_cells:
        return list(range(cells))
    return torch.randperm(cells, generator=generator)[:max_cells].sort().values.tolist()


def cell_pixels(
    encoded: Sequence[bytes],
    processor: LymphImageProcessor,
    augmentation: Augmentation | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """Image files of one patient -> (N, 3, H, W), in a random view if an augmentation is given, and normalised."""
    cells = processor.stack([open_cell_image(image).image for image in encoded])
    return processor.normalize_cells(cells if augmentation is None else augmentation(cells, generator))


def collate_bags(items: Sequence[dict[str, Any]], *, packed: bool = True) -> dict[str, torch.Tensor]:
    """Items of a `BagDataset` or a `FeatureBags` -> inputs of a model.

    Args:
        items: one per patient.
        packed: cells in a row, `pixel_values` (T, 3, H, W) with `bag_offsets` (B + 1,), which holds no padding;
            else `pixel_values` (B, N, 3, H, W) with `bag_mask` (B, N). Features are small: they always come padded,
            `cell_embeddings` (B, N, D) with `bag_mask`.
    """
    name = "cell_embeddings" if "cell_embeddings" in items[0] else "pixel_values"
    sizes = [len(item[name]) for item in items]
    cells = torch.cat([item[name] for item in items])
    if packed and name == "pixel_values":
        batch = {name: cells, "bag_offsets": torch.tensor([0, *sizes]).cumsum(0)}
    else:
        padded = pad_bags(cells, sizes)
        batch = {name: padded["pixel_values"], "bag_mask": padded["bag_mask"]}
    if "clinical" in items[0]:
        batch["clinical"] = torch.stack([item["clinical"] for item in items])
    if "labels" in items[0]:
        batch["labels"] = torch.tensor([item["labels"] for item in items])
    return batch


def label_names_of(rows: datasets.Dataset) -> list[str | None]:
    """The label of each row by name; reads that column alone, no image."""
    feature = rows.features["label"]
    labels = rows["label"]
    if not isinstance(feature, datasets.ClassLabel):
        return list(labels)
    return [None if label is None else feature.int2str(label) for label in labels]


def _encoded(path: Path) -> dict:
    return {"bytes": path.read_bytes(), "path": path.name}


def derived_seed(*parts: int) -> int:
    """A seed that follows from all parts, and from their order."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
