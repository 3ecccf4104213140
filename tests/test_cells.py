"""Rows of cells: every kind of source, what is left out, what is held out, and random views."""

import logging
import pickle

import datasets
import numpy as np
import pytest
import torch
from cohort_factory import challenge_cohort, generic_cohort, image_bytes, write_images, write_table
from torch.utils.data import DataLoader, default_convert

from lymph_hf.augment import Augmentation
from lymph_hf.cell_sources import cells_from_folder, cells_from_parquet, read_cells
from lymph_hf.cells import CellDataset, hold_out, join_cells
from lymph_hf.clinical_table import CohortError
from lymph_hf.images import open_cell_image
from lymph_hf.processing_lymph import LymphImageProcessor

TABLE = "patient_id,label,age,sex\nA,x,50,F\nB,y,60,M\n"


@pytest.fixture
def typed_folder(tmp_path):
    """Folders of three, two and one cells."""
    for start, (name, count) in enumerate([("blast", 3), ("lymphocyte", 2), ("monocyte", 1)]):
        write_images(tmp_path / "typed" / name, range(10 * start, 10 * start + count))
    return tmp_path / "typed"


@pytest.fixture
def processor():
    return LymphImageProcessor(size={"height": 16, "width": 16})


def rows_of(cells):
    data = map(cells.read, range(len(cells)))
    return sorted(zip(cells.files, cells.cell_types, cells.patient_ids, data, strict=True), key=str)


# Sources ----------------------------------------------------------------------------------------------------


def test_a_folder_of_types(typed_folder):
    cells = read_cells(typed_folder)
    assert cells.type_names == ("blast", "lymphocyte", "monocyte")
    assert [row[:3] for row in rows_of(cells)] == [
        ("blast/000000.png", "blast", None),
        ("blast/000001.png", "blast", None),
        ("blast/000002.png", "blast", None),
        ("lymphocyte/000000.png", "lymphocyte", None),
        ("lymphocyte/000001.png", "lymphocyte", None),
        ("monocyte/000000.png", "monocyte", None),
    ]
    assert all(data == (typed_folder / file).read_bytes() for file, *_, data in rows_of(cells))


def test_a_plain_folder_has_no_types(tmp_path):
    write_images(tmp_path, range(3))
    cells = read_cells(tmp_path)
    assert len(cells) == 3
    assert cells.type_names == ()
    assert len(cells.labelled()) == 0


@pytest.mark.parametrize("images", ["images", "."])
def test_a_table_names_types_and_patients(tmp_path, images):
    write_images(tmp_path / images, range(3))
    write_table(tmp_path / "cells.csv", "file,cell_type,patient_id\n000000.png,blast,P1\n000002.png,,P2\n")
    cells = read_cells(tmp_path)
    assert [row[1:3] for row in rows_of(cells)] == [("blast", "P1"), (None, "P2")]


def test_a_cohort_knows_its_patients_and_the_types_of_some_cells(tmp_path):
    root = generic_cohort(tmp_path / "cohort", TABLE)
    write_table(root / "cells.csv", "patient_id,file,cell_type\nA,000001.png,blast\nB,000000.png,\n")
    cells = read_cells(root, cache_dir=tmp_path / "cache")
    assert [row[:3] for row in sorted(rows_of(cells), key=lambda row: (row[0], row[2]))] == [
        ("000000.png", None, "A"),
        ("000000.png", None, "B"),
        ("000001.png", "blast", "A"),
        ("000001.png", None, "B"),
    ]
    assert cells.read(1) == (root / "images" / "A" / "000001.png").read_bytes()


def test_test_patients_of_the_challenge_layout_are_no_source(tmp_path):
    root = challenge_cohort(
        tmp_path / "challenge",
        train=("P1", "P2"),
        test=("P3",),
        train_table="ID,LABEL,GENDER,DOB,LYMPH_COUNT\nP1,0,F,1/2/1950,5\nP2,1,M,3/4/1960,20\n",
        test_table="ID,LABEL,GENDER,DOB,LYMPH_COUNT\nP3,-1,F,5/6/1970,7\n",
    )
    assert set(read_cells(root, cache_dir=tmp_path / "cache").patient_ids) == {"P1", "P2"}


@pytest.mark.parametrize("structure", [True, False], ids=["image structure", "plain bytes"])
def test_parquet_is_read_row_by_row(tmp_path, structure):
    data = [image_bytes(seed) for seed in range(7)]
    for part, rows in enumerate([range(4), range(4, 7)]):
        images = [{"bytes": data[i], "path": None} if structure else data[i] for i in rows]
        table = {"image": images, "cell_type": [f"t{i % 2}" for i in rows], "patient_id": [f"P{i}" for i in rows]}
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / f"{part}.parquet", batch_size=2)
    cells = read_cells(tmp_path)
    order = [6, 0, 3, 4, 1, 5, 2]
    assert [cells.select(order).read(i) for i in range(7)] == [data[i] for i in order]
    assert cells.patient_ids == tuple(f"P{i}" for i in range(7))
    assert cells.type_names == ("t0", "t1")
    copied = pickle.loads(pickle.dumps(cells))  # as a loader's worker gets it
    assert copied.read(5) == data[5]


def test_unreadable_images_are_left_out_and_told(tmp_path, typed_folder, caplog):
    whole = image_bytes(99, kind="JPEG")
    (typed_folder / "blast" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING, "lymph_hf"):
        assert len(read_cells(typed_folder)) == 6
    assert "1 unreadable images left out" in caplog.text
    table = {"image": [whole, b"no image"]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "cells.parquet")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lymph_hf"):
        assert cells_from_parquet([tmp_path / "cells.parquet"]).read(0) == whole
    assert "1 unreadable images left out" in caplog.text


def test_faults_of_a_source_are_named(tmp_path):
    with pytest.raises(CohortError, match="no such file or folder"):
        read_cells(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CohortError, match="no image found"):
        read_cells(tmp_path / "empty")
    write_images(tmp_path / "table", range(1))
    write_table(tmp_path / "table" / "cells.csv", "file,cell_type\n000007.png,blast\n")
    with pytest.raises(CohortError, match=r"'000007.png' is not in"):
        cells_from_folder(tmp_path / "table")
    write_table(tmp_path / "table" / "cells.csv", "file\n000000.png\n000000.png\n")
    with pytest.raises(CohortError, match="stands twice"):
        cells_from_folder(tmp_path / "table")
    datasets.Dataset.from_dict({"picture": [b""]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(CohortError, match=r"no column 'image'.*picture"):
        read_cells(tmp_path / "other.parquet")


def test_real_cells_are_read(shared_data, tmp_path):
    """A few of each type, listed with the layout of the real folder."""
    folder = shared_data / "pbc-cells"
    header, *lines = (folder / "cells.csv").read_text().splitlines()
    few = lines[::500]
    (tmp_path / "images").symlink_to(folder / "images")
    write_table(tmp_path / "cells.csv", "\n".join([header, *few]) + "\n")
    cells = read_cells(tmp_path)
    assert len(cells) == 16
    assert len(cells.type_names) == 8


# Joining, selecting, holding out ----------------------------------------------------------------------------


def test_patients_of_different_sources_stay_different(tmp_path):
    for number in range(2):
        write_images(tmp_path / f"{number}", range(number * 2, number * 2 + 2))
        write_table(tmp_path / f"{number}" / "cells.csv", "file,patient_id\n000000.png,P1\n000001.png,P1\n")
    parts = [read_cells(tmp_path / f"{number}") for number in range(2)]
    cells = join_cells(parts)
    assert len(np.unique(cells.groups)) == 2
    assert [cells.read(i) for i in range(4)] == [part.read(i) for part in parts for i in range(2)]
    assert cells.select([3, 1]).read(0) == parts[1].read(1)
    assert cells.fingerprint != cells.select([3, 1]).fingerprint


def test_nobody_is_on_both_sides_of_the_held_out(tmp_path):
    write_images(tmp_path, [*range(40), 0, 1])  # the last two are copies of the first two
    rows = [f"{i:06d}.png,{f'P{i // 4}' if i < 40 else ''}" for i in range(42)]
    write_table(tmp_path / "cells.csv", "file,patient_id\n" + "\n".join(rows) + "\n")
    cells = read_cells(tmp_path)
    for seed in range(5):
        train, held = hold_out(cells, 0.3, seed)
        assert sorted([*train, *held]) == list(range(42))
        assert 0.2 < len(held) / 42 < 0.4
        for column in (cells.digests, cells.patient_ids[:40]):
            sides = [{column[row] for row in side if row < len(column)} for side in (train, held)]
            assert not set.intersection(*sides)
        assert np.array_equal(held, hold_out(cells, 0.3, seed)[1])
    assert len(hold_out(cells, 0.0, 0)[1]) == 0


def test_holding_out_all_or_nothing_is_refused(tmp_path):
    write_images(tmp_path, range(3))
    write_table(tmp_path / "cells.csv", "file,patient_id\n" + "".join(f"00000{i}.png,P\n" for i in range(3)))
    with pytest.raises(CohortError, match="cannot be held out; change --validation-fraction"):
        hold_out(read_cells(tmp_path), 0.2, seed=0)


# Inputs of a model ------------------------------------------------------------------------------------------


def test_views_depend_on_seed_epoch_and_row_alone(typed_folder, processor):
    cells = read_cells(typed_folder)

    def dataset(**changes):
        return CellDataset(cells, processor, **({"patches": 4, "augmentation": Augmentation(), "seed": 3} | changes))

    first, again = dataset(), dataset()
    again[0, 2], again[5, 0]  # what is read before makes no difference
    one, other = first[1, 4], again[1, 4]
    assert one.keys() == {"pixel_values", "noise"}
    assert all(torch.equal(one[name], other[name]) for name in one)
    for changed in (first[2, 4], dataset(seed=4)[1, 4]):
        assert not torch.equal(one["noise"], changed["noise"])
        assert not torch.equal(one["pixel_values"], changed["pixel_values"])


@pytest.mark.parametrize("preload", [False, True])
def test_items_read_together_are_those_read_alone(typed_folder, processor, preload):
    cells = read_cells(typed_folder)
    label2id = {name: i for i, name in enumerate(cells.type_names)}
    dataset = CellDataset(
        cells, processor, label2id=label2id, patches=4, augmentation=Augmentation(), seed=3, preload=preload
    )
    keys = [(1, row) for row in [*reversed(range(len(cells))), *range(len(cells))]]
    (together,) = DataLoader(dataset, batch_sampler=[keys], collate_fn=default_convert)
    for i, key in enumerate(keys):
        alone = dataset[key]
        assert torch.equal(together["labels"][i], alone["labels"])
        assert torch.equal(together["noise"][i], alone["noise"])
        torch.testing.assert_close(together["pixel_values"][i], alone["pixel_values"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("augmentation", "expected"), [(None, None), (Augmentation(), (16, 16))])
def test_only_random_views_are_decoded_at_a_smaller_size(typed_folder, processor, monkeypatch, augmentation, expected):
    """What is scored, compared or shown is read as prediction reads it."""
    asked = []

    def watched(data, *, at_least=None):
        asked.append(at_least)
        return open_cell_image(data, at_least=at_least)

    monkeypatch.setattr("lymph_hf.cells.open_cell_image", watched)
    CellDataset(read_cells(typed_folder), processor, augmentation=augmentation)[0]
    assert asked == [expected]


def test_preloaded_cells_are_the_same(typed_folder, processor):
    cells = read_cells(typed_folder)
    label2id = {name: i for i, name in enumerate(cells.type_names)}
    plain, preloaded = (
        CellDataset(cells, processor, label2id=label2id, augmentation=Augmentation(), preload=preload)
        for preload in (False, True)
    )
    for row in range(len(cells)):
        assert torch.equal(plain[3, row]["pixel_values"], preloaded[3, row]["pixel_values"])
    assert [plain[row]["labels"] for row in range(6)] == [label2id[name] for name in cells.cell_types]


def test_an_unaugmented_cell_is_the_processors(typed_folder, processor):
    cells = read_cells(typed_folder)
    expected = processor([open_cell_image(cells.read(2)).image]).pixel_values[0, 0]
    assert torch.allclose(CellDataset(cells, processor)[2]["pixel_values"], expected)
