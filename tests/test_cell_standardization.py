"""Standardised cells: the plain formula, training patients only, the same after saving, loading and resuming."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from lymph_hf import (
    LymphMILConfig,
    LymphMILEnsembleForBagClassification,
    LymphMILForBagClassification,
    recipes,
)
from lymph_hf.cell_standardization import fit_cell_standardizer
from lymph_hf.cohort import read_cohort, scan_images
from lymph_hf.crossval_folds import FoldPlan, draw_folds, run_fold
from lymph_hf.encoder_standardizer import CellStandardizer
from lymph_hf.explain import explain_bag
from lymph_hf.features import cached_features
from lymph_hf.options_crossval import CrossvalOptions
from lymph_hf.patient_models import load_model
from lymph_hf.recipes import RecipeError
from lymph_hf.training import TrainingLoop

WIDTH = 64  # of test_vit
FROZEN = {"freeze_encoder": True, "standardize_cells": True}
SETTINGS = {"encoder": "test_vit", "image_size": 32, "fusion": "none", "clinical_features": []}


class Bags(torch.utils.data.Dataset):
    """Patients as arrays of features."""

    def __init__(self, bags):
        self.bags = [torch.as_tensor(bag, dtype=torch.float32) for bag in bags]

    def __len__(self):
        return len(self.bags)

    def __getitem__(self, index):
        return {"cell_embeddings": self.bags[index]}


def new_model(**changes) -> LymphMILForBagClassification:
    torch.manual_seed(0)
    return LymphMILForBagClassification(LymphMILConfig(**SETTINGS | {"standardize_cells": True} | changes)).eval()


def random_bags(sizes=(3, 40, 7)):
    rng = np.random.default_rng(0)
    return [rng.normal(5 + patient, 0.1, (size, WIDTH)) for patient, size in enumerate(sizes)]


def plain_statistics(bags):
    """The mean and the standard deviation of a cell drawn from a patient drawn at random."""
    mean = np.mean([bag.mean(axis=0) for bag in bags], axis=0)
    return mean, np.sqrt(np.mean([((bag - mean) ** 2).mean(axis=0) for bag in bags], axis=0))


@pytest.fixture
def fitted():
    model = new_model()
    fit_cell_standardizer(model, Bags(random_bags()), Accelerator(cpu=True))
    return model


@pytest.fixture(scope="module")
def bags():
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(2, 4, 3, 32, 32, generator=generator),
        "bag_mask": torch.tensor([[True] * 4, [True, True, False, False]]),
    }


# --- the formula --------------------------------------------------------------------------------------------


def test_the_scale_is_that_of_the_plain_formula(fitted):
    mean, std = plain_statistics([bag.astype(np.float32).astype(float) for bag in random_bags()])
    np.testing.assert_allclose(fitted.model.standardizer.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(fitted.model.standardizer.scale, 1 / std, rtol=1e-5)


def test_every_patient_weighs_the_same_whatever_its_cells(fitted):
    first, *others = random_bags()
    again = new_model()
    fit_cell_standardizer(again, Bags([np.tile(first, (50, 1)), *others]), Accelerator(cpu=True))
    torch.testing.assert_close(again.model.standardizer.state_dict(), fitted.model.standardizer.state_dict())


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_a_constant_feature_is_moved_and_not_blown_up(value):
    constant, model = random_bags(), new_model()
    for bag in constant:
        bag[:, 5] = value
    fit_cell_standardizer(model, Bags(constant), Accelerator(cpu=True))
    assert model.model.standardizer.scale[5] == 1
    assert model.model.standardizer.scale.isfinite().all()
    cells = model.model.standardizer(torch.tensor(constant[0], dtype=torch.float32))
    assert cells[:, 5].abs().max() < 1e-2


def test_the_pooling_reads_standardised_cells_and_the_output_holds_the_encoders(bags, fitted):
    """What a model gives can be given back to it, as explanations do."""
    plain = new_model(standardize_cells=False)
    plain.load_state_dict(fitted.state_dict(), strict=False)
    with torch.no_grad():
        raw, mask = plain.model.encode_bags(**bags)
        cells = (raw - fitted.model.standardizer.mean) * fitted.model.standardizer.scale
        expected = plain(cell_embeddings=cells, bag_mask=mask).logits
        torch.testing.assert_close(fitted(**bags).logits, expected)
        assert not torch.allclose(plain(**bags).logits, expected)
        given = fitted.model(**bags).cell_embeddings
        torch.testing.assert_close(given, raw)
        torch.testing.assert_close(fitted(cell_embeddings=given, bag_mask=mask).logits, expected)
    one = {name: value[:1] for name, value in bags.items()}
    np.testing.assert_allclose(explain_bag(fitted, one).probabilities, expected[0].softmax(-1), atol=1e-5)


@pytest.mark.parametrize("content", [float("nan"), 1e6])
def test_padding_stays_without_effect(bags, fitted, content):
    with torch.no_grad():
        cells, mask = fitted.model.encode_bags(**bags)
        padded = cells.masked_fill(~mask[..., None], content)
        torch.testing.assert_close(
            fitted(cell_embeddings=padded, bag_mask=mask).logits, fitted(cell_embeddings=cells, bag_mask=mask).logits
        )


# --- saving and loading -------------------------------------------------------------------------------------


def test_it_reloads_bit_for_bit(bags, fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    again = LymphMILForBagClassification.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in fitted.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(**bags).logits, fitted(**bags).logits)


def test_without_statistics_it_changes_nothing(bags, tmp_path):
    """A model saved without it, of a configuration that knows nothing of it, answers as ever; also when it is added."""
    plain = new_model(standardize_cells=False)
    plain.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("standardize_cells") is False
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "standardizer" in name]
    for added in ({}, {"standardize_cells": True}):
        path.write_text(json.dumps(settings | added))
        again = LymphMILForBagClassification.from_pretrained(tmp_path)
        assert (again.model.standardizer is not None) is bool(added)
        with torch.no_grad():
            assert torch.equal(again(**bags).logits, plain(**bags).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_not_rounded_with_the_model(dtype, fitted, tmp_path):
    expected = {name: tensor.clone() for name, tensor in fitted.model.standardizer.state_dict().items()}
    fitted.save_pretrained(tmp_path)
    loaded = LymphMILForBagClassification.from_pretrained(tmp_path, dtype=dtype)
    for model in (loaded, fitted.to(dtype)):
        assert model.dtype == dtype
        torch.testing.assert_close(model.model.standardizer.state_dict(), expected, rtol=0, atol=0)
    cells = torch.randn(1, 3, WIDTH).to(dtype)
    assert loaded.model.standardizer(cells).dtype == dtype
    assert loaded(cell_embeddings=cells).logits.isfinite().all()
    assert CellStandardizer(3).to("meta").mean.is_meta


def test_members_of_an_ensemble_keep_their_own(bags, tmp_path):
    members = [new_model(), new_model(), new_model(standardize_cells=False)]
    for shift, member in enumerate(members[:2]):
        fit_cell_standardizer(member, Bags([bag + shift for bag in random_bags()]), Accelerator(cpu=True))
    ensemble = LymphMILEnsembleForBagClassification.from_members(members)
    assert ensemble.config.shared_encoder
    ensemble.save_pretrained(tmp_path)
    again = LymphMILEnsembleForBagClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        alone = torch.stack([member(**bags).logits for member in members], dim=1)
        torch.testing.assert_close(again(**bags).member_logits, alone)


# --- training -----------------------------------------------------------------------------------------------


def statistics(folder):
    weights = load_file(folder / "lymph-mil/model.safetensors")
    return {name: tensor for name, tensor in weights.items() if "standardizer" in name}


def assert_of_training_patients(run, cohort_folder, cache):
    """The statistics of a run are those of its training patients' cells as they are, by the plain formula."""
    cohort = scan_images(read_cohort(cohort_folder), progress=False)
    features = cached_features(*load_model(run), cohort, cache, accelerator=Accelerator(cpu=True))
    split = json.loads((run / "split.json").read_text())
    mean, std = plain_statistics([features[patient].numpy().astype(float) for patient in split["train"]])
    leaky, _ = plain_statistics([features[patient].numpy().astype(float) for patient in features])
    found = statistics(run)
    np.testing.assert_allclose(found["model.standardizer.mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found["model.standardizer.scale"], 1 / std, rtol=1e-3)
    assert np.abs(leaky - mean).max() > 1e-3, "the check would not see patients that do not belong"


@pytest.mark.parametrize("cached", [False, True])
def test_training_takes_the_scale_from_training_patients_alone(cached, cohort_folder, tiny_options, tmp_path):
    """Cells as they are, all of them, whatever training samples and draws."""
    changes = {"feature_cache": str(tmp_path / "cache"), "feature_views": 1} if cached else {}
    run = tmp_path / "run"
    recipes.train(*tiny_options(run, epochs=1, max_cells=2, learning_rate=0.1, **FROZEN, **changes))
    assert_of_training_patients(run, cohort_folder, tmp_path / "cache")


def test_each_fold_has_a_scale_of_its_own(cohort_folder, crossval_arguments, tmp_path):
    cache = tmp_path / "cache"
    plain = FROZEN | {"feature_cache": str(cache), "augment": False, "clinical_baseline": "none"}
    make = crossval_arguments(CrossvalOptions(folds=2, validation_fraction=0.3, resamples=20))
    plan = FoldPlan(*make(tmp_path / "folds", **plain))
    cohort = scan_images(read_cohort(cohort_folder), progress=False)
    for fold in draw_folds(cohort, plan.options, tmp_path / "folds", seed=0):
        run_fold(fold, plan, cohort)
        assert_of_training_patients(fold.folder, cohort_folder, cache)


@pytest.mark.parametrize("changes", [{}, {"adapter": "lora"}, {"freeze_encoder": True, "adapter": "lora"}])
def test_an_encoder_that_learns_is_refused_before_anything_is_written(changes, tiny_options, tmp_path):
    with pytest.raises(RecipeError, match="--standardize-cells.*--freeze-encoder"):
        recipes.train(*tiny_options(tmp_path / "run", standardize_cells=True, **changes))
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_options, tmp_path, monkeypatch):
    """The statistics of the checkpoint hold, whatever a resumed run would find."""
    changes = FROZEN | {"feature_cache": str(tmp_path / "cache"), "feature_views": 1, "dropout": 0.3}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    recipes.train(*tiny_options(whole, epochs=3, **changes))

    def interrupt(loop, bar, one_epoch=TrainingLoop._epoch):
        if loop.progress.epoch == 2:
            raise KeyboardInterrupt
        one_epoch(loop, bar)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLoop, "_epoch", interrupt)
        recipes.train(*tiny_options(resumed, epochs=3, **changes))
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "fit_cell_standardizer", lambda model, *_, **__: model.model.standardizer.mean.fill_(9))
        recipes.train(*tiny_options(resumed, epochs=3, resume=True, **changes))
    expected, found = (load_file(run / "lymph-mil/model.safetensors") for run in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
