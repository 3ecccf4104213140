"""Patients as rows and batches: nothing lost, nothing mixed, memory flat."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lymph_hf import ClinicalStandardizer, LymphImageProcessor
from lymph_hf.augment import Augmentation
from lymph_hf.bags import BagDataset, build_bags, cohort_fingerprint, collate_bags, label_names_of
from lymph_hf.cohort import read_cohort, scan_images

ROOT = Path(__file__).parents[1]
LABELS = {"reactive": 0, "tumoral": 1}


@pytest.fixture(scope="module")
def cohort(cohort_folder):
    return scan_images(read_cohort(cohort_folder), progress=False)


@pytest.fixture(scope="module")
def rows(cohort):
    return build_bags(cohort)


@pytest.fixture(scope="module")
def processor():
    return LymphImageProcessor(size={"height": 32, "width": 32})


def test_a_row_per_patient_holds_the_very_bytes_of_the_files(cohort, rows):
    assert rows["patient_id"] == [patient.patient_id for patient in cohort.patients]
    assert label_names_of(rows) == [patient.label for patient in cohort.patients]
    undecoded = rows.with_format("arrow")
    for index, patient in enumerate(cohort.patients):
        row = undecoded[index].to_pylist()[0]
        assert row["files"] == [path.name for path in patient.images]
        assert [image["bytes"] for image in row["images"]] == [path.read_bytes() for path in patient.images]
        assert (row["age"], row["sex"]) == (patient.age, patient.sex)


def test_a_row_per_cell(cohort):
    cells = build_bags(cohort, "cells")
    assert len(cells) == sum(len(patient.images) for patient in cohort.patients)
    assert isinstance(cells[0]["image"], Image.Image)
    assert list(zip(cells["patient_id"], cells["file"], strict=True)) == [
        (patient.patient_id, path.name) for patient in cohort.patients for path in patient.images
    ]


@pytest.mark.parametrize("view", ["patients", "cells"])
def test_streaming_gives_the_same_rows(cohort, view):
    streamed = list(build_bags(cohort, view, streaming=True))
    stored = build_bags(cohort, view)
    assert [row["patient_id"] for row in streamed] == list(stored["patient_id"])
    assert streamed[0].keys() == stored[0].keys()


def test_the_cache_follows_the_content_not_the_place(cohort, cohort_folder, tmp_path):
    import shutil

    copy = shutil.copytree(cohort_folder, tmp_path / "elsewhere")
    assert cohort_fingerprint(scan_images(read_cohort(copy), progress=False)) == cohort_fingerprint(cohort)
    image = next((copy / "images").rglob("*.jpg"))
    Image.open(image).convert("RGB").rotate(90).save(image)
    assert cohort_fingerprint(scan_images(read_cohort(copy), progress=False)) != cohort_fingerprint(cohort)


def test_items_depend_on_seed_epoch_and_index_alone(rows, processor):
    options = {"label2id": LABELS, "max_cells": 2, "augmentation": Augmentation()}
    first, again = (BagDataset(rows, processor, **options, seed=1) for _ in range(2))
    other = BagDataset(rows, processor, **options, seed=2)
    for _ in range(3):
        first[(0, 5)]  # what was read before does not matter
    same = [first[(3, 2)]["pixel_values"], again[(3, 2)]["pixel_values"]]
    assert torch.equal(*same)
    for different in (first[(4, 2)], first[(3, 1)], other[(3, 2)]):
        assert different["pixel_values"].shape != same[0].shape or not torch.equal(different["pixel_values"], same[0])


def test_training_samples_cells_and_evaluation_uses_all(cohort, rows, processor):
    sampled = BagDataset(rows, processor, max_cells=3)
    everything = BagDataset(rows, processor)
    for index, patient in enumerate(cohort.patients):
        assert len(sampled[index]["pixel_values"]) == min(3, len(patient.images))
        assert len(everything[index]["pixel_values"]) == len(patient.images)
    big = max(range(len(rows)), key=lambda i: len(cohort.patients[i].images))
    drawn = {sampled[(epoch, big)]["pixel_values"].sum().item() for epoch in range(8)}
    assert len(drawn) > 1, "another sample in another epoch"
    with pytest.raises(ValueError, match="max_cells"):
        BagDataset(rows, processor, max_cells=0)


def test_items_are_what_the_processor_makes_of_the_images(cohort, rows):
    processor = LymphImageProcessor(
        size={"height": 48, "width": 48},
        clinical_statistics={"features": ["lymphocyte_count", "age"], "mean": [2.0, 50.0], "std": [1.0, 10.0]},
    )
    dataset = BagDataset(rows, processor, label2id=LABELS)
    for index in (0, 5):
        patient = cohort.patients[index]
        clinical = {"age": patient.age, "lymphocyte_count": patient.lymphocyte_count}
        expected = processor([Image.open(path) for path in patient.images], clinical)
        item = dataset[index]
        torch.testing.assert_close(item["pixel_values"], expected.pixel_values[0])
        torch.testing.assert_close(item["clinical"], expected.clinical[0], equal_nan=True)
        assert item["labels"] == LABELS[patient.label]


def test_packed_and_padded_batches_hold_the_same_cells(rows, processor):
    dataset = BagDataset(rows, processor, label2id=LABELS)
    items = [dataset[index] for index in (0, 3, 4)]
    packed, padded = collate_bags(items), collate_bags(items, packed=False)
    assert torch.equal(packed["pixel_values"], padded["pixel_values"][padded["bag_mask"]])
    assert packed["bag_offsets"].diff().tolist() == padded["bag_mask"].sum(1).tolist()
    assert not padded["pixel_values"][~padded["bag_mask"]].any()
    assert torch.equal(packed["labels"], padded["labels"])


def test_a_cohort_without_labels_is_read_and_streamed(cohort_folder, tmp_path, processor):
    import shutil

    import pandas as pd

    copy = shutil.copytree(cohort_folder, tmp_path / "unlabelled")
    pd.read_csv(copy / "clinical.csv").drop(columns="label").to_csv(copy / "clinical.csv", index=False)
    rows = build_bags(scan_images(read_cohort(copy), progress=False))
    assert label_names_of(rows) == [None] * len(rows)
    assert "labels" not in BagDataset(rows, processor)[0]


def test_no_clinical_features_means_no_clinical_tensor(rows):
    bare = LymphImageProcessor(
        size={"height": 32, "width": 32}, clinical_statistics={"features": [], "mean": [], "std": []}
    )
    assert "clinical" not in collate_bags([BagDataset(rows, bare)[0]])
    assert ClinicalStandardizer.fit([{}, {}]).features == ()


def _peak_memory(folder: Path, cache: Path) -> int:
    """Megabytes a fresh process needs at most to build a cohort of that folder, beyond importing."""
    script = (
        "import resource, sys; from pathlib import Path; from lymph_hf.cohort import *; from lymph_hf.bags import *\n"
        "cohort = scan_images(read_cohort(Path(sys.argv[1])), progress=False, workers=2)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); build_bags(cohort, cache_dir=sys.argv[2]); sys.stdout.write(str((peak() - before) // 1024))"
    )
    command = [sys.executable, "-c", script, str(folder), str(cache)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def test_peak_memory_of_building_does_not_grow_with_the_cohort(tmp_path):
    """Ten times the patients, hence 140 MB instead of 14 MB of images: the peak may not follow."""
    pixels = os.urandom(3 * 256 * 256)
    image = Image.frombytes("RGB", (256, 256), pixels)
    image.save(tmp_path / "noise.png")
    content = (tmp_path / "noise.png").read_bytes()
    for patients in (9, 90):
        folder = tmp_path / str(patients)
        ids = [f"P{i:03d}" for i in range(patients)]
        for number, patient_id in enumerate(ids):
            (folder / "images" / patient_id).mkdir(parents=True)
            for cell in range(8):
                # Bytes after the image's end make each file another one.
                (folder / "images" / patient_id / f"{cell}.png").write_bytes(content + f"{number}-{cell}".encode())
        labels = [f"{patient_id},{number % 2}" for number, patient_id in enumerate(ids)]
        (folder / "clinical.csv").write_text("patient_id,label\n" + "\n".join(labels) + "\n")
    small, large = (_peak_memory(tmp_path / n, tmp_path / f"cache{n}") for n in ("9", "90"))
    assert large < small + 40, f"peak grew from {small} to {large} MB"
