"""The feature cache: what is found fits exactly, what is half-written is never found, training cannot tell."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lymph_hf import (
    LymphImageProcessor,
    LymphMILConfig,
    LymphMILForBagClassification,
    cli,
    feature_source,
    feature_store,
    recipes,
)
from lymph_hf.adapters import attach_adapter
from lymph_hf.augment import Augmentation
from lymph_hf.bags import BagDataset, build_bags, collate_bags
from lymph_hf.cohort import read_cohort, scan_images
from lymph_hf.feature_commands import build, list_features, prune
from lymph_hf.feature_keys import bag_digest, feature_key
from lymph_hf.feature_source import FeatureError, FeatureSource
from lymph_hf.feature_store import FeatureStore, StoredBag
from lymph_hf.features import FeatureBags, cached_features, encoder_of, put_encoder, take_encoder
from lymph_hf.options import CohortOptions, EvaluateOptions, InferenceOptions
from lymph_hf.options_features import FeatureBuildOptions, FeatureListOptions, FeaturePruneOptions
from lymph_hf.recipes import RecipeError
from lymph_hf.training import make_accelerator

ROOT = Path(__file__).parents[1]
LABELS = {"reactive": 0, "tumoral": 1}


def make_model(encoder: str = "test_vit", **options) -> LymphMILForBagClassification:
    torch.manual_seed(0)
    return LymphMILForBagClassification(LymphMILConfig(encoder=encoder, image_size=32, **options)).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def processor(model):
    return LymphImageProcessor.from_config(model.config)


@pytest.fixture(scope="module")
def cohort(cohort_folder):
    """Five patients are enough."""
    cohort = scan_images(read_cohort(cohort_folder), progress=False)
    return cohort.select([patient.patient_id for patient in cohort.patients[:5]])


@pytest.fixture(scope="module")
def accelerator():
    return make_accelerator(InferenceOptions(cpu=True))


@pytest.fixture
def features_of(model, processor, cohort, accelerator, tmp_path):
    """`cached_features` on the CPU with some of its arguments changed."""

    def call(**changes):
        arguments = {"model": model, "processor": processor, "cohort": cohort, "cache_dir": tmp_path / "cache"}
        return cached_features(**(arguments | {"accelerator": accelerator} | changes))

    return call


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of cells that pass an encoder, call by call."""
    counts = []
    encode = feature_source.encode_cells

    def counting(encoder, cells, chunk_size):
        counts.append(len(cells))
        return encode(encoder, cells, chunk_size)

    monkeypatch.setattr(feature_source, "encode_cells", counting)
    return counts


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


# --- what is found fits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_resnet", "test_efficientnet", "test_convnext"])
def test_a_key_follows_from_the_content_alone(name, tmp_path):
    model = make_model(name)
    processor = LymphImageProcessor.from_config(model.config)
    key = feature_key(encoder_of(model), processor, "no")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = LymphMILForBagClassification.from_pretrained(tmp_path)
    assert feature_key(encoder_of(loaded), LymphImageProcessor.from_pretrained(tmp_path), "no") == key
    with torch.no_grad():
        loaded(torch.randn(1, 2, 3, 32, 32))
    loaded.train().model.encoder.requires_grad_(False).set_grad_checkpointing(True)
    assert feature_key(encoder_of(loaded), processor, "no") == key


def test_whatever_changes_features_changes_the_key(processor):
    def key(change=lambda model: None, encoder="test_resnet", processor=processor, precision="no", **options):
        model = make_model(encoder, **options)
        with torch.no_grad():
            change(model.model.encoder)
        return feature_key(encoder_of(model), processor, precision)

    def one_weight(encoder):
        weight = next(encoder.parameters()).view(-1)
        weight[-1] = torch.nextafter(weight[-1], torch.tensor(9.0))

    def one_statistic(encoder):
        next(encoder.buffers())[0] += 1e-6

    mean = [0.5, 0.5, 0.501]
    keys = [
        key(),
        key(one_weight),
        key(one_statistic),
        key(lambda encoder: encoder.bfloat16()),
        key(precision="bf16"),
        key(processor=LymphImageProcessor(**(processor.to_dict() | {"image_mean": mean}))),
        key(processor=LymphImageProcessor(**(processor.to_dict() | {"resample": Image.Resampling.BILINEAR}))),
        key(encoder="test_vit"),
        key(encoder="test_vit", encoder_options={"global_pool": "avg", "fc_norm": False}),  # the tensors are the same
    ]
    assert len(set(keys)) == len(keys)
    statistics = {"features": ["age"], "mean": [50.0], "std": [9.0]}
    clinical = LymphImageProcessor(**(processor.to_dict() | {"clinical_statistics": statistics}))
    assert key(processor=clinical) == keys[0], "clinical values say nothing of images"


def test_an_adapter_and_its_scale_count(processor):
    keys = {feature_key(encoder_of(make_model()), processor, "no")}
    for alpha in (8, 16):  # a fresh LoRA changes no output, and its scale no tensor
        model = attach_adapter(make_model(), "lora", rank=2, alpha=alpha)
        keys.add(feature_key(encoder_of(model), processor, "no"))
    assert len(keys) == 3


def test_a_changed_pixel_costs_its_patient_and_no_other(features_of, encoded, cohort, tmp_path):
    before = features_of()
    encoded.clear()
    folder = shutil.copytree(cohort.root, tmp_path / "changed")
    patient = cohort.patients[2]
    path = folder / "images" / patient.patient_id / patient.images[0].name
    picture = Image.open(path).convert("RGB")
    pixels = picture.load()
    pixels[24, 24] = tuple(255 - value for value in pixels[24, 24])
    picture.save(path, quality=95)
    changed = scan_images(read_cohort(folder), progress=False).select(cohort.digests)
    after = features_of(cohort=changed)
    assert encoded == [len(patient.images)]
    for patient_id in cohort.digests:
        assert torch.equal(before[patient_id], after[patient_id]) == (patient_id != patient.patient_id)
    assert torch.equal(before[patient.patient_id][1:], after[patient.patient_id][1:])


def test_an_image_that_changes_after_the_check_is_refused(features_of, cohort, tmp_path):
    folder = shutil.copytree(cohort.root, tmp_path / "copy")
    checked = scan_images(read_cohort(folder), progress=False).select(cohort.digests)
    path = checked.patients[0].images[0]
    path.write_bytes(checked.patients[0].images[1].read_bytes())
    with pytest.raises(FeatureError, match=checked.patients[0].patient_id):
        features_of(cohort=checked)


def test_numbers_that_are_not_finite_are_refused(features_of):
    broken = make_model()
    with torch.no_grad():
        broken.model.encoder.cls_token += torch.nan
    with pytest.raises(FeatureError, match="not finite"):
        features_of(model=broken)


# --- features are what the encoder gives --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"drop_rate": 0.5, "drop_path_rate": 0.5}])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_features_are_the_encoders_in_evaluation_mode(name, options, features_of, cohort, processor):
    model = make_model(name, encoder_options=options).train()
    next(model.model.encoder.children()).eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    features = features_of(model=model, chunk_size=2)
    assert torch.equal(torch.get_rng_state(), state), "a cached run would draw other numbers"
    assert [module.training for module in model.modules()] == modes
    assert list(features) == [patient.patient_id for patient in cohort.patients]
    for patient in cohort.patients:
        pixel_values = processor([Image.open(path) for path in patient.images]).pixel_values[0]
        with torch.no_grad():
            expected = model.eval().model.encoder(pixel_values)
        torch.testing.assert_close(features[patient.patient_id], expected, rtol=1e-4, atol=1e-5)


def test_the_second_call_encodes_nothing_and_maps_the_file(features_of, encoded, tmp_path):
    first = features_of()
    encoded.clear()
    second = features_of()
    assert not encoded
    assert all(torch.equal(first[patient_id], second[patient_id]) for patient_id in first)
    assert str(files_in(tmp_path / "cache")[0]) in Path("/proc/self/maps").read_text()


def test_an_encoder_alone_and_its_model_share_features(features_of, encoded, model):
    features_of()
    encoded.clear()
    features_of(model=model.model.encoder)
    features_of(model=model.model)
    assert not encoded


def test_views_differ_and_are_reproducible(features_of, encoded, cohort, tmp_path):
    features = features_of(views=2)
    again = features_of(views=2, cache_dir=tmp_path / "other")
    for patient_id in features:
        views = [features.view(patient_id, view) for view in range(3)]
        assert torch.equal(views[0], features[patient_id])
        assert not any(torch.equal(views[i], views[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
        assert all(torch.equal(view, again.view(patient_id, i)) for i, view in enumerate(views))
    encoded.clear()
    more = features_of(views=3)
    assert sum(encoded) == sum(len(patient.images) for patient in cohort.patients), "the third view alone is new"
    assert torch.equal(more.view(patient_id, 2), views[2])
    encoded.clear()
    features_of(views=1, augmentation=Augmentation(rotation=10.0))
    assert sum(encoded) == sum(len(patient.images) for patient in cohort.patients), "cells as they are stay"
    with pytest.raises(FeatureError, match="views=-1"):
        features_of(views=-1)


def test_a_view_belongs_to_its_images_in_their_order():
    digests = ["aa", "bb"]
    assert bag_digest(digests, 0, Augmentation()) == bag_digest(digests)
    distinct = [(digests, 0), (digests[::-1], 0), (digests[:1], 0), (digests, 1), (digests, 2)]
    assert len({bag_digest(names, view, Augmentation()) for names, view in distinct}) == len(distinct)


# --- files are whole or absent ------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def replace_by_foreign_tensors(path: Path) -> None:
    save_file({"features": torch.zeros(3)}, path, metadata={"format": "pt"})


def replace_by_text(path: Path) -> None:
    path.write_text("a thesis")


def claim_another_encoder(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(path.parent.name.encode(), b"0" * 32))


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, replace_by_foreign_tensors, replace_by_text, claim_another_encoder]
)
def test_a_damaged_or_foreign_file_is_refused_and_rebuilt(damage, features_of, encoded, cohort, tmp_path, caplog):
    before = {patient_id: bag.clone() for patient_id, bag in features_of().items()}
    (path,) = files_in(tmp_path / "cache")
    damage(path)
    encoded.clear()
    after = features_of()
    assert len(encoded) == len(cohort.patients)
    assert "is not used" in caplog.text
    assert all(torch.equal(before[patient_id], after[patient_id]) for patient_id in before)
    encoded.clear()
    features_of()
    assert not encoded, "and what was rebuilt is whole"


def in_processes(*targets: Callable[[], None]) -> list[int]:
    """Exit codes of functions that run at the same time, each in a process of its own."""
    processes = [multiprocessing.get_context("fork").Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_process_leaves_nothing_to_find(features_of, cohort, monkeypatch, tmp_path):
    def dies_half_way(tensors, path, metadata):
        save_file(tensors, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(feature_store, "save_file", dies_half_way)
        assert in_processes(features_of) == [-signal.SIGKILL]
    (unfinished,) = (tmp_path / "cache").glob("*/.writing-*")
    wanted = [bag_digest(digests) for digests in cohort.digests.values()]
    assert FeatureStore(tmp_path / "cache", unfinished.parent.name).read(wanted) == {}
    assert list_features(FeatureListOptions(feature_cache=str(tmp_path / "cache"))).empty
    features_of()
    assert not unfinished.exists()
    assert len(FeatureStore(tmp_path / "cache", unfinished.parent.name).read(wanted)) == len(wanted)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_of_two_processes_that_lack_the_same_features_one_computes_them(
    features_of, encoded, cohort, monkeypatch, tmp_path
):
    barrier = multiprocessing.get_context("fork").Barrier(2)
    store = FeatureSource.store

    def both_wait(*arguments, **options):
        barrier.wait(60)  # neither has found anything
        store(*arguments, **options)

    def build_and_count(name):
        features = features_of()
        (tmp_path / name).write_text(f"{len(features)} {sum(encoded)}")

    monkeypatch.setattr(FeatureSource, "store", both_wait)
    assert in_processes(*(partial(build_and_count, name) for name in "ab")) == [0, 0]
    told = [tuple(map(int, (tmp_path / name).read_text().split())) for name in "ab"]
    cells = sum(len(patient.images) for patient in cohort.patients)
    assert sorted(told) == [(len(cohort.patients), 0), (len(cohort.patients), cells)]
    assert len(files_in(tmp_path / "cache")) == 1


def test_writers_of_one_encoder_wait_for_each_other(tmp_path):
    store = FeatureStore(tmp_path, "a" * 32)
    with store.locked(), pytest.raises(TimeoutError), FeatureStore(tmp_path, "a" * 32).locked(timeout=0):
        pass


# --- features in place of images ----------------------------------------------------------------------------


@pytest.fixture
def both(features_of, cohort, processor):
    """Makes the data set of images and that of features with the same options."""
    rows, features = build_bags(cohort), features_of(views=2)

    def make(augmented: bool = False, **options) -> tuple[BagDataset, FeatureBags]:
        options = {"label2id": LABELS} | options
        from_features = FeatureBags(features, cohort.patients, processor.standardizer, augmented=augmented, **options)
        return BagDataset(rows, processor, **options), from_features

    return make


@pytest.mark.parametrize("max_cells", [None, 2])
def test_the_same_key_shows_the_same_cells_as_images_do(max_cells, both, model):
    images, features = both(max_cells=max_cells, seed=3)
    assert len(images) == len(features)
    assert images.label_ids == features.label_ids
    for key in (0, (0, 1), (1, 1), (7, 4)):
        image, feature = images[key], features[key]
        with torch.no_grad():
            expected = model.model.encoder(image.pop("pixel_values"))
        torch.testing.assert_close(feature.pop("cell_embeddings"), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(feature, image, rtol=0, atol=0, equal_nan=True)
        assert images.sampled_cells(key, 6) == features.sampled_cells(key, 6)


def test_a_view_is_drawn_by_seed_epoch_and_patient(both, features_of):
    _, plain = both(max_cells=2, seed=1)
    _, augmented = both(augmented=True, max_cells=2, seed=1)
    features = features_of(views=2)
    name = list(features)[3]
    drawn = []
    for epoch in range(12):
        shown = augmented[epoch, 3]["cell_embeddings"]
        assert torch.equal(shown, augmented[epoch, 3]["cell_embeddings"])
        cells = plain.sampled_cells((epoch, 3), len(features[name]))
        drawn += [view for view in (0, 1, 2) if torch.equal(shown, features.view(name, view)[cells])]
    assert len(drawn) == 12, "all cells of one view, those a plain access shows"
    assert set(drawn) == {1, 2}
    with pytest.raises(ValueError, match="no augmented view"):
        FeatureBags(features_of(), [], LymphImageProcessor().standardizer, augmented=True)
    with pytest.raises(ValueError, match="max_cells=0"):
        both(max_cells=0)


def test_a_head_says_of_features_what_the_model_says_of_images(both):
    images, features = both()
    whole, head = make_model(), make_model()
    encoder = take_encoder(head)
    assert not [name for name in head.state_dict() if "encoder" in name]
    batch = collate_bags([features[i] for i in range(5)])
    sizes = batch["bag_mask"].sum(1).tolist()
    assert batch["cell_embeddings"].shape[:2] == batch["bag_mask"].shape == (5, max(sizes))
    assert len(set(sizes)) > 1, "some are padded"
    with torch.no_grad():
        expected = whole(**collate_bags([images[i] for i in range(5)])).logits
        torch.testing.assert_close(head(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    put_encoder(head, encoder)
    assert head.state_dict().keys() == whole.state_dict().keys()


# --- training -----------------------------------------------------------------------------------------------


def test_training_from_the_cache_equals_training_from_images(tiny_options, tmp_path):
    changes = {"encoder": "test_resnet", "freeze_encoder": True, "augment": False, "max_cells": 3, "dropout": 0.3}
    recipes.train(*tiny_options(tmp_path / "images", **changes))
    recipes.train(*tiny_options(tmp_path / "features", feature_cache=str(tmp_path / "cache"), **changes))
    images, features = (pd.read_csv(tmp_path / run / "validation.csv") for run in ("images", "features"))
    assert features.probability.values == pytest.approx(images.probability.values, abs=1e-5)
    images, features = (load_file(tmp_path / run / "lymph-mil/model.safetensors") for run in ("images", "features"))
    torch.testing.assert_close(features, images, rtol=1e-3, atol=1e-5)
    checkpoint = next((tmp_path / "features/checkpoints").glob("step-*/model.safetensors"))
    assert not [name for name in load_file(checkpoint) if "encoder" in name], "what does not learn is not stored again"


def test_evaluation_from_the_cache_equals_evaluation_from_images(trained_run, cohort_folder, encoded, tmp_path):
    tables = []
    for name, cache in (("images", None), ("cache", str(tmp_path / "cache")), ("again", str(tmp_path / "cache"))):
        before = len(encoded)
        options = EvaluateOptions(run=str(trained_run), output=str(tmp_path / name), figures=False, feature_cache=cache)
        recipes.evaluate(CohortOptions(data=str(cohort_folder)), options, InferenceOptions(cpu=True))
        tables.append(pd.read_csv(tmp_path / name / "predictions.csv"))
        assert not (tmp_path / name / "report.html").exists()
    assert len(encoded) == before, "the second time nothing is encoded"
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], atol=1e-5)


def test_training_draws_views_and_later_runs_encode_nothing(tiny_options, encoded, tmp_path):
    changes = {"epochs": 1, "freeze_encoder": True, "feature_cache": str(tmp_path / "cache"), "feature_views": 2}
    recipes.train(*tiny_options(tmp_path / "views", **changes))
    assert len(encoded) == 3 * 14
    encoded.clear()
    recipes.train(*tiny_options(tmp_path / "plain", **changes, augment=False))
    assert not encoded
    views, plain = (load_file(tmp_path / run / "lymph-mil/model.safetensors") for run in ("views", "plain"))
    assert not torch.equal(views["classifier.weight"], plain["classifier.weight"])
    assert torch.equal(views["model.encoder.cls_token"], plain["model.encoder.cls_token"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--freeze-encoder"),
        ({"adapter": "lora"}, "--freeze-encoder"),
        ({"freeze_encoder": True, "adapter": "lora"}, "no --adapter"),
        ({"freeze_encoder": True, "feature_views": -1}, "--feature-views -1"),
    ],
)
def test_a_cache_of_an_encoder_that_learns_is_refused_before_anything_is_written(
    changes, message, tiny_options, tmp_path
):
    with pytest.raises(RecipeError, match=message):
        recipes.train(*tiny_options(tmp_path / "run", feature_cache=str(tmp_path / "cache"), **changes))
    assert not list(tmp_path.iterdir())


# --- lymph features -----------------------------------------------------------------------------------------


def test_build_by_run_or_by_encoder(trained_run, cohort_folder, encoded, tmp_path, caplog):
    cache = str(tmp_path / "cache")
    data, cpu = CohortOptions(data=str(cohort_folder)), InferenceOptions(cpu=True)
    with caplog.at_level("INFO", logger="lymph_hf"):
        by_run = build(data, FeatureBuildOptions(feature_cache=cache, run=str(trained_run)), cpu)
    assert scan_images(read_cohort(cohort_folder), progress=False).summary() in caplog.messages
    assert len(by_run) == 14
    weights = str(trained_run / "lymph-mil")
    by_name = FeatureBuildOptions(feature_cache=cache, encoder="test_vit", encoder_weights=weights, image_size=32)
    encoded.clear()
    build(data, by_name, cpu)
    assert not encoded, "the same weights, however they are given"
    for wrong in ({}, {"run": "r", "encoder": "e"}):
        with pytest.raises(FeatureError, match="--run"):
            build(data, FeatureBuildOptions(feature_cache=cache, **wrong), cpu)


@pytest.fixture
def cache(tmp_path):
    """Three sets of features: of one encoder last used 3 and 2 days ago, of another one now."""
    folder = tmp_path / "cache"
    for number, (key, days) in enumerate([("a", 3), ("a", 2), ("b", 0)]):
        store = FeatureStore(folder, key * 32)
        bags = [StoredBag(bag_digest([str(number)], view), view, torch.zeros(100, 8)) for view in (0, 1)]
        store.write(bags, {"encoder": f"encoder-{key}", "data": f"data-{number}", "views": "1"})
        for path in store.folder.glob("*.safetensors"):
            if path.stat().st_mtime > time.time() - 1000:
                used = time.time() - days * 86_400
                os.utime(path, (used, used))
    return folder


def test_the_list_says_what_is_there(cache, caplog):
    caplog.set_level("INFO", "lymph_hf")
    table = list_features(FeatureListOptions(feature_cache=str(cache)))
    assert list(table["data"]) == ["data-2", "data-1", "data-0"], "the last used first"
    assert list(table["encoder"]) == ["encoder-b", "encoder-a", "encoder-a"]
    assert set(table["cells"]) == {100} and set(table["patients"]) == {1} and set(table["views"]) == {1}
    assert "3 sets of features" in caplog.text
    truncate(files_in(cache)[0])
    assert list(list_features(FeatureListOptions(feature_cache=str(cache)))["state"]).count("damaged") == 1
    with pytest.raises(FeatureError, match="no such folder"):
        list_features(FeatureListOptions(feature_cache=str(cache / "no")))


def test_using_features_keeps_them_young(cache):
    store = FeatureStore(cache, "a" * 32)
    store.read([bag_digest(["0"])])
    table = list_features(FeatureListOptions(feature_cache=str(cache)))
    assert list(table["data"])[-1] == "data-1", "data-0 is no longer the oldest"


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ({"older_than": 2.5}, 2),
        ({"older_than": 1.0}, 1),
        ({"older_than": 9.0}, 3),
        ({"keep_size": 1.0}, 3),
        ({"keep_size": 0.000_008}, 1),  # a file has some 7 kB
        ({"keep_size": 0.0}, 0),
        ({"all": True}, 0),
    ],
)
def test_pruning_by_age_and_size(rule, left, cache):
    oldest = {path.name: path.stat().st_mtime for path in files_in(cache)}
    options = {"feature_cache": str(cache), **rule}
    would = prune(FeaturePruneOptions(dry_run=True, **options))
    assert len(files_in(cache)) == 3
    gone = prune(FeaturePruneOptions(**options))
    assert sorted(gone) == sorted(would)
    stayed = [oldest[path.name] for path in files_in(cache)]
    assert len(stayed) == left
    assert sorted(stayed) == sorted(oldest.values())[3 - left :], "the oldest go first"
    assert len(list(cache.iterdir())) == min(left, 2), "no empty folder stays"


def test_pruning_removes_nothing_that_it_does_not_know(cache):
    foreign = [cache / "notes.txt", cache / ("a" * 32) / "notes.txt", cache / "models" / f"{'c' * 32}.safetensors"]
    foreign += [cache / ("a" * 32) / "model.safetensors", cache / ("d" * 32) / f"{'d' * 32}.safetensors"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        save_file({"weight": torch.ones(2)}, path)
    unfinished = cache / ("a" * 32) / f".writing-123-{'e' * 32}.safetensors"
    unfinished.write_bytes(b"half")
    truncate(next((cache / ("b" * 32)).glob("*.safetensors")))
    prune(FeaturePruneOptions(feature_cache=str(cache), all=True))
    assert all(path.exists() for path in foreign)
    assert not unfinished.exists()
    assert {path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"} == set(foreign)


def test_pruning_leaves_alone_what_is_being_written(cache, caplog):
    with FeatureStore(cache, "a" * 32).locked():
        prune(FeaturePruneOptions(feature_cache=str(cache), all=True))
    assert len(files_in(cache)) == 2
    assert "being written" in caplog.text


@pytest.mark.parametrize("rules", [{}, {"all": True, "older_than": 1.0}])
def test_pruning_needs_exactly_one_rule(rules, cache):
    with pytest.raises(FeatureError, match="exactly one"):
        prune(FeaturePruneOptions(feature_cache=str(cache), **rules))
    assert len(files_in(cache)) == 3


def test_the_command_line_reaches_all_three(cache, cohort_folder, tmp_path, capsys):
    made = str(tmp_path / "made")
    named = ["--encoder", "test_vit", "--image-size", "32", "--cpu", "--feature-views", "1"]
    assert cli.main(["features", "build", "--data", str(cohort_folder), "--feature-cache", made, *named]) == 0
    assert cli.main(["features", "list", "--feature-cache", made]) == 0
    assert cli.main(["features", "prune", "--feature-cache", made, "--all"]) == 0
    assert cli.main(["features", "prune", "--feature-cache", made]) == 1
    assert not files_in(Path(made))


def test_the_cache_names_neither_patients_nor_places(features_of, cohort, tmp_path):
    features_of(views=1)
    content = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    names = "".join(str(path.relative_to(tmp_path)) for path in (tmp_path / "cache").rglob("*"))
    for patient in cohort.patients:
        for secret in (patient.patient_id, patient.images[0].name, cohort.root.name):
            assert secret.encode() not in content and secret not in names


@pytest.mark.slow
def test_two_processes_of_one_run_share_the_encoding(cohort_folder, tmp_path):
    cache = tmp_path / "cache"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "scripts/train.py", "--data", str(cohort_folder), "--cpu"]
    options = ["--encoder", "test_vit", "--image_size", "32", "--epochs", "1", "--batch_size", "4", "--tracker", "none"]
    options += ["--freeze_encoder", "--feature_cache", str(cache), "--output", str(tmp_path / "run")]
    done = subprocess.run([*launcher, *options], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(files_in(cache)) == 2, "each wrote its share"
    table = list_features(FeatureListOptions(feature_cache=str(cache)))
    assert list(table["patients"]) == [14]
