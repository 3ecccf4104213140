"""Bags in, tensors out; and the clinical scale is that of the training patients, whatever is read later."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoProcessor

from lymph_hf import ClinicalStandardizer, LymphImageProcessor, LymphMILConfig
from lymph_hf.encoders import encoder_data_config
from lymph_hf.processing_lymph import clinical_number, pad_bags

TRAINING = [
    {"age": 71.0, "sex": "F", "lymphocyte_count": 4.2},
    {"age": 35.5, "sex": "M", "lymphocyte_count": 18.0},
    {"age": None, "sex": "M", "lymphocyte_count": 95.0},
    {"age": 62.0, "sex": None, "lymphocyte_count": math.nan},
]


def pixels(height: int = 40, width: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cells(count: int, **size) -> list[Image.Image]:
    return [Image.fromarray(pixels(seed=i, **size)) for i in range(count)]


@pytest.fixture
def processor() -> LymphImageProcessor:
    return LymphImageProcessor(size={"height": 32, "width": 32})


# --- images


def test_one_patient_is_a_batch_of_one(processor):
    alone, batch = processor(cells(3)), processor([cells(3)])
    assert alone.pixel_values.shape == (1, 3, 3, 32, 32)
    assert alone.pixel_values.dtype == torch.float32
    assert alone.keys() == batch.keys() == {"pixel_values", "bag_mask", "clinical"}
    for name in alone:
        assert_close(alone[name], batch[name], rtol=0, atol=0, equal_nan=True)


def test_bags_are_padded_to_the_largest_and_keep_their_cells(processor):
    bags = [cells(2), cells(5), cells(1)]
    batch = processor(bags)
    assert batch.bag_mask.dtype == torch.bool
    assert batch.bag_mask.tolist() == [[True] * 2 + [False] * 3, [True] * 5, [True] + [False] * 4]
    assert (batch.pixel_values[~batch.bag_mask] == 0).all()
    for row, bag in enumerate(bags):
        assert torch.equal(batch.pixel_values[row, : len(bag)], processor(bag).pixel_values[0])


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        ([], "No image"),
        ([[]], r"position \[0\] have no image"),
        ([cells(1), [], cells(1), []], r"position \[1, 3\] have no image"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "No image"),
        (Image.new("RGB", (8, 8)), "expected a list of images"),
        (pixels(), "a single image"),
        ([pixels(), [pixels()]], "mixed"),
        (["cell.jpg"], "str is no image"),
        ([pixels() / 255], "float64: expected uint8"),
        ([torch.rand(3, 8, 8)], "float32: expected uint8"),
        ([pixels().astype(np.uint16)], "uint16: expected uint8"),
        ([Image.new("I;16", (8, 8))], "I;16.*8 bits"),
        ([Image.new("F", (8, 8))], "'F'.*8 bits"),
        ([pixels()[:, :, :2]], "shape"),
    ],
)
def test_what_is_no_bag_of_images_is_refused(processor, images, complaint):
    with pytest.raises(ValueError, match=complaint):
        processor(images)


def test_only_tensors_of_pytorch_are_made(processor):
    with pytest.raises(ValueError, match="return_tensors='np'"):
        processor(cells(1), return_tensors="np")


def test_the_kind_of_image_does_not_matter(processor):
    array = pixels()
    tensor = torch.from_numpy(array)
    kinds = [Image.fromarray(array), array, tensor, tensor.permute(2, 0, 1), array.transpose(2, 0, 1)]
    batch = processor(kinds).pixel_values[0]
    for other in batch[1:]:
        assert torch.equal(other, batch[0])
    assert torch.equal(processor(np.stack([array, array])).pixel_values[0], batch[:2])
    assert torch.equal(processor([np.stack([array]), np.stack([array, array])]).pixel_values[1], batch[:2])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_other_modes_are_read_as_pillow_shows_them(processor, mode):
    image = cells(1)[0].convert(mode)
    assert torch.equal(processor([image]).pixel_values, processor([image.convert("RGB")]).pixel_values)


def test_grey_arrays_become_three_equal_channels(processor):
    grey = pixels()[:, :, 0]
    batch = processor([grey, grey[:, :, None], grey[None]]).pixel_values[0]
    assert torch.equal(batch[0, 0], batch[0, 1]) and torch.equal(batch[0, 1], batch[0, 2])
    assert torch.equal(batch[1], batch[0]) and torch.equal(batch[2], batch[0])


def test_images_of_mixed_sizes_are_resized_as_wholes(processor):
    """Nothing is cropped: a border that a centre crop would cut away is still there."""
    framed = np.zeros((64, 96, 3), dtype=np.uint8)
    framed[:8] = framed[-8:] = 255
    framed[:, :8] = framed[:, -8:] = 255
    batch = processor([framed, *cells(1), *cells(1, height=32, width=32)])
    assert batch.pixel_values.shape == (1, 3, 3, 32, 32)
    resized = batch.pixel_values[0, 0, 0]
    assert (resized[0] > 0.9).all() and (resized[:, 0] > 0.9).all() and resized[16, 16] < -0.9


def test_an_image_of_the_right_size_is_not_resampled(processor):
    array = pixels(32, 32)
    expected = torch.from_numpy(array).permute(2, 0, 1)
    assert torch.equal(processor.stack([array])[0], expected)


@pytest.mark.parametrize(
    "encoder", ["test_vit", "vit_small_patch14_dinov2", "vit_medium_patch32_clip_224", "mobilevit_xxs"]
)
def test_fault_9_pixels_are_normalised_as_the_encoder_expects(encoder):
    config = LymphMILConfig(encoder=encoder, image_size=224)
    expected = encoder_data_config(config)
    processor = LymphImageProcessor.from_config(config)
    array = pixels(224, 224)
    by_hand = (array / 255 - np.array(expected["mean"])) / np.array(expected["std"])
    batch = processor([array])
    assert_close(batch.pixel_values[0, 0].permute(1, 2, 0).numpy(), by_hand.astype(np.float32), rtol=1e-5, atol=1e-5)


def test_size_and_resampling_are_the_encoders():
    processor = LymphImageProcessor.from_config(LymphMILConfig(encoder="vit_small_patch14_dinov2"))
    assert (processor.size["height"], processor.size["width"]) == (518, 518)
    assert processor.resample == Image.Resampling.BICUBIC
    assert LymphImageProcessor.from_config(LymphMILConfig(encoder="test_resnet")).resample == Image.Resampling.BILINEAR


def test_pad_bags_is_the_inverse_of_masking():
    rows = torch.randn(6, 3, 2, 2)
    batch = pad_bags(rows, [1, 3, 2])
    assert batch["pixel_values"].shape == (3, 3, 3, 2, 2)
    assert torch.equal(batch["pixel_values"][batch["bag_mask"]], rows)


def test_device(processor):
    batch = processor(cells(1), device="meta")
    assert {tensor.device.type for tensor in batch.values()} == {"meta"}


# --- clinical values


def by_hand(name: str) -> tuple[float, float]:
    """Mean and population deviation of what the training patients have."""
    values = {
        "age": [71.0, 35.5, 62.0],
        "sex": [0.0, 1.0, 1.0],
        "lymphocyte_count": [math.log(4.2), math.log(18.0), math.log(95.0)],
    }[name]
    return float(np.mean(values)), float(np.std(values))


def test_statistics_are_those_of_the_training_patients():
    standardizer = ClinicalStandardizer.fit(TRAINING)
    assert standardizer.features == ("age", "sex", "lymphocyte_count")
    for name, mean, std in zip(standardizer.features, standardizer.mean, standardizer.std, strict=True):
        assert (mean, std) == pytest.approx(by_hand(name))


def test_values_are_scaled_and_gaps_stay_gaps():
    table = ClinicalStandardizer.fit(TRAINING).transform(TRAINING)
    assert table.dtype == torch.float32
    assert table.isnan().tolist() == [[False] * 3, [False] * 3, [True, False, False], [False, True, True]]
    mean, std = by_hand("lymphocyte_count")
    assert table[1, 2] == pytest.approx((math.log(18.0) - mean) / std)
    assert_close(table.nanmean(dim=0), torch.zeros(3), atol=1e-6, rtol=0)


def test_fault_4_the_clinical_scale_does_not_depend_on_the_file_that_is_read(processor, tmp_path):
    """Age and count were divided by the largest of the file: a patient changed with the patients beside it."""
    statistics = ClinicalStandardizer.fit(TRAINING)
    fitted = LymphImageProcessor.from_config(LymphMILConfig(encoder="test_vit", image_size=32), statistics)
    patient = {"age": 50.0, "sex": "M", "lymphocyte_count": 7.5}
    extreme = {"age": 119.0, "sex": "F", "lymphocyte_count": 1900.0}
    alone = fitted([cells(1)], clinical=[patient]).clinical[0]
    beside = fitted([cells(1)] * 3, clinical=[extreme, patient, {}]).clinical[1]
    assert torch.equal(alone, beside)
    fitted.save_pretrained(tmp_path)
    reloaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(reloaded(cells(1), clinical=patient).clinical[0], alone)


@pytest.mark.parametrize("auto", [AutoImageProcessor, AutoProcessor])
def test_everything_comes_back_from_disk_bit_for_bit(auto, tmp_path):
    statistics = ClinicalStandardizer.fit(TRAINING, ["lymphocyte_count", "age"])
    saved = LymphImageProcessor.from_config(LymphMILConfig(encoder="test_resnet", image_size=40), statistics)
    saved.save_pretrained(tmp_path)
    reloaded = auto.from_pretrained(tmp_path)
    assert type(reloaded) is LymphImageProcessor
    assert reloaded.standardizer == statistics
    bags, clinical = [cells(2), cells(3)], TRAINING[:2]
    expected, actual = saved(bags, clinical), reloaded(bags, clinical)
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name])


def test_a_stored_processor_holds_no_patient(tmp_path):
    config = LymphMILConfig(encoder="test_vit", image_size=32)
    LymphImageProcessor.from_config(config, ClinicalStandardizer.fit(TRAINING)).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["clinical_statistics"].keys() == {"features", "mean", "std"}
    assert all(len(values) == 3 for values in stored["clinical_statistics"].values())


def test_a_constant_value_is_centred_and_not_blown_up():
    standardizer = ClinicalStandardizer.fit([{"age": 60.0, "sex": "F"}, {"age": 70.0, "sex": "F"}])
    table = standardizer.transform([{"age": 65.0, "sex": "F"}, {"age": 65.0, "sex": "M"}])
    assert table[:, 1].tolist() == [0.0, 1.0]


def test_one_training_patient_is_enough():
    table = ClinicalStandardizer.fit(TRAINING[:1]).transform(TRAINING[:1])
    assert_close(table, torch.zeros(1, 3))


def test_a_value_that_no_training_patient_has_is_left_out():
    standardizer = ClinicalStandardizer.fit([{"age": 60.0, "sex": None}, {"age": 70.0}])
    assert standardizer.features == ("age",)
    assert standardizer.transform([{"age": 65.0, "lymphocyte_count": 5.0}]).tolist() == [[0.0]]


def test_a_model_without_clinical_values_gets_none():
    config = LymphMILConfig(encoder="test_vit", image_size=32)
    processor = LymphImageProcessor.from_config(config, ClinicalStandardizer.fit(TRAINING, ()))
    assert "clinical" not in processor(cells(2), clinical=TRAINING[0])


def test_no_clinical_values_are_all_missing(processor):
    for clinical in (None, {}, [None], [{"age": None, "sex": math.nan}]):
        assert processor([cells(1)], clinical=clinical).clinical.isnan().all()


def test_a_missing_value_is_none_or_nan_of_any_kind():
    for missing in (None, math.nan, np.nan, np.float32("nan"), np.float64("nan")):
        for name in ("age", "sex", "lymphocyte_count"):
            assert math.isnan(clinical_number(name, missing))


@pytest.mark.parametrize(
    ("name", "value"),
    [("age", -0.1), ("age", 120.5), ("lymphocyte_count", 0), ("lymphocyte_count", 2001), ("lymphocyte_count", -3)]
    + [("age", "old"), ("age", ""), ("age", math.inf), ("lymphocyte_count", "7,5")]
    + [("sex", "W"), ("sex", ""), ("sex", 1), ("sex", True)],
)
def test_an_impossible_value_is_refused_with_its_name_and_the_range(processor, name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: expected")):
        clinical_number(name, value)
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        processor(cells(1), clinical={name: value})


@pytest.mark.parametrize("female", ["F", "f", "Female", " FEMALE "])
def test_spellings_of_sex(female):
    assert clinical_number("sex", female) == 0.0
    assert clinical_number("sex", female.lower().replace("female", "male").replace("f", "m")) == 1.0


def test_ends_of_the_ranges_are_legal():
    assert clinical_number("age", 0) == 0.0
    assert clinical_number("age", "120") == 120.0
    assert clinical_number("lymphocyte_count", 2000) == 2000.0


def test_a_misspelt_clinical_value_is_refused(processor):
    with pytest.raises(ValueError, match=r"Unknown clinical value\(s\) \['lymph_count'\]"):
        processor(cells(1), clinical={"lymph_count": 5.0})
    with pytest.raises(ValueError, match="height"):
        ClinicalStandardizer.fit(TRAINING, ["height"])


def test_clinical_values_must_be_one_set_per_patient(processor):
    with pytest.raises(ValueError, match="2 sets of clinical values for 3 patients"):
        processor([cells(1)] * 3, clinical=TRAINING[:2])


def test_statistics_need_patients():
    with pytest.raises(ValueError, match="No patient"):
        ClinicalStandardizer.fit([])


@pytest.mark.parametrize(
    ("mean", "std"),
    [((1.0,), (1.0,)), ((1.0, 2.0), (1.0, 0.0)), ((math.nan, 1.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, -1.0))],
)
def test_broken_statistics_are_refused(mean, std):
    with pytest.raises(ValueError, match="expected"):
        ClinicalStandardizer(features=("age", "sex"), mean=mean, std=std)
