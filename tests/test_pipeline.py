"""The patient pipeline: the same answer as the model, one patient or many, and clear refusals."""

import json

import pytest
import torch
from PIL import Image
from transformers import pipeline

from lymph_hf import ClinicalStandardizer, LymphImageProcessor, LymphMILConfig, LymphMILForBagClassification
from lymph_hf.images import CellImageError
from lymph_hf.pipeline_lymph import TASK, LymphPatientPipeline
from lymph_hf.publishing_code import export_with_code

CLINICAL = {"age": 71, "sex": "F", "lymphocyte_count": 14.2}


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    torch.manual_seed(0)
    config = LymphMILConfig(encoder="test_vit", image_size=32, id2label={0: "reactive", 1: "tumoral"})
    folder = tmp_path_factory.mktemp("model")
    LymphMILForBagClassification(config).save_pretrained(folder)
    LymphImageProcessor.from_config(config, ClinicalStandardizer()).save_pretrained(folder)
    return pipeline(TASK, model=str(folder), device="cpu")


def cells(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (number, 40, 40, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def test_the_answer_is_the_models(classify):
    assert isinstance(classify, LymphPatientPipeline)
    answer = classify(cells(5), clinical=CLINICAL)
    with torch.no_grad():
        output = classify.model(**classify.image_processor(cells(5), CLINICAL))
    assert list(answer["probabilities"]) == ["reactive", "tumoral"]
    assert list(answer["probabilities"].values()) == pytest.approx(output.logits.softmax(-1)[0].tolist())
    assert answer["attentions"] == pytest.approx(output.attentions[0].tolist())
    assert answer != classify(cells(5)), "clinical values count"


@pytest.mark.parametrize(("threshold", "label"), [(0.0, "tumoral"), (1.0, "reactive")])
def test_the_label_follows_the_frozen_threshold(classify, threshold, label):
    before = classify.model.config.decision_threshold
    classify.model.config.decision_threshold = threshold
    assert classify(cells(3))["label"] == label
    classify.model.config.decision_threshold = before


def test_several_patients_are_answered_one_by_one(classify):
    patients = [{"images": cells(2), "clinical": CLINICAL}, {"images": cells(4, seed=1)}]
    alone = [classify(patients[0]), classify(cells(4, seed=1))]
    assert classify(patients) == alone
    assert list(classify(patient for patient in patients)) == alone
    assert [len(answer["attentions"]) for answer in alone] == [2, 4]


def test_files_are_read_as_in_training(classify, tmp_path):
    """A picture stored on its side is turned upright, as the cohort reader does."""
    upright = cells(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    assert classify([str(tmp_path / "side.png")])["probabilities"] == classify([upright])["probabilities"]


def test_one_unreadable_file_is_named(classify, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(CellImageError, match=r"broken\.jpg"):
        classify([tmp_path / "broken.jpg"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda classify: classify([]), "at least one cell"),
        (lambda classify: classify([{"images": cells(1)}], clinical=CLINICAL), "beside the images"),
        (lambda classify: classify({"images": cells(1), "clinic": CLINICAL}), "clinic"),
        (lambda classify: classify(cells(1), clinical={"age": 300}), "age=300"),
        (lambda classify: classify([{"images": cells(1)}] * 2, batch_size=2), "one by one"),
        (lambda classify: classify(cells(1), top_k=1), "top_k"),
    ],
    ids=["no image", "clinical apart", "unknown key", "impossible age", "batches", "unknown option"],
)
def test_what_does_not_fit_is_refused(classify, call, message):
    with pytest.raises(ValueError, match=message):
        call(classify)


def test_a_folder_with_code_is_loaded_by_the_package_without_asking(classify, tmp_path, monkeypatch):
    export_with_code(classify.model, classify.image_processor, tmp_path)
    assert list(tmp_path.glob("*.py"))
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    again = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert type(again.model) is LymphMILForBagClassification
    assert again(cells(3)) == classify(cells(3))


def test_a_saved_pipeline_asks_for_no_remote_code(classify, tmp_path):
    classify.save_pretrained(tmp_path)
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))
    assert pipeline(TASK, model=str(tmp_path), device="cpu")(cells(3)) == classify(cells(3))
