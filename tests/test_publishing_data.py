"""Patients as a data set: streamed back as they were, and nothing that says who they are."""

import hashlib
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import load_dataset
from hub_server import card_problems as hub_problems
from huggingface_hub import DatasetCard
from PIL import Image
from publishing_cases import FACTS, WRITER, options, publish_as, run_examples, sent

from lymph_hf import publishing_data
from lymph_hf.card_patterns import CardError
from lymph_hf.cohort import read_cohort, scan_images
from lymph_hf.hub_push import PublishError
from lymph_hf.images import open_cell_image
from lymph_hf.options_publish import DownloadOptions
from lymph_hf.publication_checks import DATASET, folder_problems
from lymph_hf.publishing import publish
from lymph_hf.publishing_data import download

CARD = replace(FACTS, data_license="cc-by-nc-4.0")
YES = {"repo_type": "dataset", "patients_may_be_published": True, "repo": "org/cells"}


@pytest.fixture(scope="module")
def cohort_of_jpegs(cohort_folder, tmp_path_factory) -> Path:
    """The painted cohort with what analysers write into files, one exact and one rare age, and a broken image."""
    folder = Path(shutil.copytree(cohort_folder, tmp_path_factory.mktemp("cohorts") / "clinic"))
    exif = Image.Exif()
    exif[0x010F], exif[0x0132] = "analyser of ward 3", "2019:03:04 10:11:12"
    for path in sorted((folder / "images").rglob("*.*")):
        with Image.open(path) as image:
            picture = image.convert("RGB")
        path.unlink()
        picture.save(path.with_suffix(".jpg"), exif=exif, comment=b"Mrs X")
    table = pd.read_csv(folder / "clinical.csv")
    table.loc[0, "age"], table.loc[1, "age"] = 71.37, 97.0
    table.to_csv(folder / "clinical.csv", index=False)
    broken = sorted((folder / "images" / str(table.loc[2, "patient_id"])).iterdir())[0]
    broken.write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def staged(cohort_of_jpegs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("staged") / "cells"
    publish(options(data=str(cohort_of_jpegs), output=str(folder), **YES), CARD)
    return folder


def key_of(images) -> str:
    """Of a patient by the pixels alone, in no order."""
    digests = sorted(hashlib.sha256(np.asarray(image).tobytes()).hexdigest() for image in images)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def streamed(repo, **pinned):
    """In the client's process: rows with the images as a key."""
    rows = load_dataset(repo, split="train", streaming=True, **pinned)
    names = rows.features["label"].names
    return [
        {key: value for key, value in row.items() if key != "images"}
        | {"label": names[row["label"]], "key": key_of(row["images"]), "size": len(row["images"])}
        for row in rows
    ]


def test_patients_come_back_by_streaming(hub, client, cohort_of_jpegs):
    commit = client.call(publish_as, WRITER, sent(data=str(cohort_of_jpegs), **YES), CARD)
    assert hub.repo("org/cells", "dataset").tags == {"v1": commit}
    rows = {row["key"]: row for row in client.call(streamed, "org/cells", revision="v1")}
    cohort = scan_images(read_cohort(cohort_of_jpegs))
    assert len(rows) == len(cohort.patients) == 14
    for patient in cohort.patients:
        row = rows[key_of(open_cell_image(path).image for path in patient.images)]
        assert (row["label"], row["sex"], row["size"]) == (patient.label, patient.sex, len(patient.images))
        count = patient.lymphocyte_count
        assert row["lymphocyte_count"] == (None if count is None else pytest.approx(count, rel=1e-6))
        assert row["age"] == (None if patient.age is None else min(round(patient.age), 90))
    assert max(row["age"] for row in rows.values() if row["age"]) == 90
    assert client.call(publish_as, WRITER, sent(data=str(cohort_of_jpegs), **YES), CARD) == commit


def test_a_downloaded_data_set_is_a_cohort_again(client, staged, cohort_of_jpegs, tmp_path):
    options = DownloadOptions(repo=str(staged), output=str(tmp_path / "cohort"))
    cohort = read_cohort(download(options))
    original = read_cohort(cohort_of_jpegs)
    assert cohort.label_names == original.label_names
    assert sum(len(p.images) for p in cohort.patients) == sum(len(p.images) for p in original.patients) - 1
    with pytest.raises(PublishError, match="exists"):
        download(options)


def test_the_viewer_sees_pictures_classes_and_numbers(staged):
    rows = datasets.Dataset.from_parquet(str(next((staged / "data").iterdir())), cache_dir=str(staged.parent))
    assert rows.features["images"] == datasets.List(datasets.Image())
    assert rows.features["label"] == datasets.ClassLabel(names=["reactive", "tumoral"])
    assert rows.features["age"].dtype == rows.features["lymphocyte_count"].dtype == "float32"


def test_nothing_says_who_they_are(staged, cohort_of_jpegs):
    rows = datasets.Dataset.from_parquet(str(next((staged / "data").iterdir())), cache_dir=str(staged.parent))
    rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    assert set(rows.column_names) == {"patient_id", "label", "age", "sex", "lymphocyte_count", "images"}
    for row in rows:
        assert re.fullmatch(r"p[0-9a-f]{12}", row["patient_id"])
        for image in row["images"]:
            assert image["path"] is None
            assert b"ward 3" not in image["bytes"] and b"Mrs X" not in image["bytes"]
            assert not Image.open(io.BytesIO(image["bytes"])).getexif()
    content = b"".join(path.read_bytes() for path in staged.rglob("*") if path.is_file())
    for patient in read_cohort(cohort_of_jpegs).patients:
        assert patient.patient_id.encode() not in content


def test_names_do_not_follow_from_identifiers_and_files_are_reproducible(staged, cohort_of_jpegs, tmp_path):
    renamed = Path(shutil.copytree(cohort_of_jpegs, tmp_path / "renamed"))
    table = pd.read_csv(renamed / "clinical.csv", dtype=str)
    for i, old in enumerate(table["patient_id"]):
        (renamed / "images" / old).rename(renamed / "images" / f"Z{100 - i}")
    table["patient_id"] = [f"Z{100 - i}" for i in range(len(table))]
    table.to_csv(renamed / "clinical.csv", index=False)
    publish(options(data=str(renamed), output=str(tmp_path / "again"), **YES), CARD)
    shard = "data/train-00000-of-00001.parquet"
    assert (tmp_path / "again" / shard).read_bytes() == (staged / shard).read_bytes()


def test_the_card_is_complete_and_its_example_runs(hub, client, staged, cohort_of_jpegs, tmp_path):
    text = (staged / "README.md").read_text()
    assert hub_problems(text, "dataset") == ([], [])
    data = DatasetCard(text).data
    assert data.license == "cc-by-nc-4.0" and data.size_categories == ["n<1K"]
    assert data.task_categories == ["image-classification"]
    assert data.to_dict()["dataset_info"]["splits"][0]["num_examples"] == 14
    assert re.search(r"\| train \| 14 \| \d+ reactive, \d+ tumoral \|", text)
    assert "| empty file | 1 |" in text
    client.call(publish_as, WRITER, sent(data=str(cohort_of_jpegs), **YES | {"repo": "org/explained-cells"}), CARD)
    printed = client.call(run_examples, "org/explained-cells", tmp_path, "dataset")
    assert re.fullmatch(r"p[0-9a-f]{12} \d+\n", printed[0])


def test_shards_are_numbered(cohort_of_jpegs, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing_data, "SHARD_BYTES", 20_000)
    done = publish(options(data=str(cohort_of_jpegs), **YES), CARD)
    shards = sorted(name for name in done.files if name.endswith(".parquet"))
    assert len(shards) > 1
    assert shards == [f"data/train-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]


def test_patients_are_not_published_by_accident(cohort_of_jpegs):
    with pytest.raises(PublishError, match="--patients-may-be-published"):
        publish(options(data=str(cohort_of_jpegs), **YES | {"patients_may_be_published": False}), CARD)
    with pytest.raises(PublishError, match="--data"):
        publish(options(**YES), CARD)
    with pytest.raises(CardError, match="--data-license"):
        publish(options(data=str(cohort_of_jpegs), **YES), FACTS)


def test_what_slipped_into_a_table_is_found(staged, cohort_of_jpegs, tmp_path):
    folder = Path(shutil.copytree(staged, tmp_path / "spoilt"))
    shard = next((folder / "data").iterdir())
    rows = datasets.Dataset.from_parquet(str(shard), cache_dir=str(tmp_path))
    rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    original = next(iter((cohort_of_jpegs / "images" / "P001").iterdir())).read_bytes()

    def problems(change):
        rows.map(change, load_from_cache_file=False).to_parquet(shard)
        return "\n".join(folder_problems(folder, {"P001", "P002"}, DATASET))

    assert "column patient_id holds a patient identifier" in problems(lambda row: {"patient_id": "P002"})
    assert "column images holds names of files" in problems(
        lambda row: {"images": [image | {"path": "1.jpg"} for image in row["images"]]}
    )
    assert re.search(
        "column images holds .*(exif|comment)", problems(lambda row: {"images": [{"bytes": original, "path": None}]})
    )
    assert problems(lambda row: {}) == ""
