"""Distillation: formulas against plain references, a teacher that stays what it is, and whom it may know."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModel

from lymph_hf import recipes, teachers
from lymph_hf.bags import BagDataset, build_bags, collate_bags
from lymph_hf.clinical import ClinicalModel
from lymph_hf.cohort import read_cohort, scan_images
from lymph_hf.configuration_lymph import LymphMILConfig
from lymph_hf.distillation import (
    DistillationModel,
    TaughtBags,
    attention_loss,
    distill,
    feature_loss,
    restricted,
    soft_label_loss,
    taught_collate,
)
from lymph_hf.lineage import LineageError
from lymph_hf.modeling_lymph import LymphMILForBagClassification
from lymph_hf.options import CohortOptions, EvaluateOptions, InferenceOptions
from lymph_hf.options_distill import DistillOptions
from lymph_hf.runs import RunError
from lymph_hf.splits import Split
from lymph_hf.teachers import Answer, DistillationError, Ensemble, patient_key, read_teacher
from lymph_hf.training import TrainingLoop, set_training_mode

TERMS = {"feature_weight": 0.5, "attention_weight": 0.5}


@pytest.fixture(scope="module")
def cohort(cohort_folder):
    return scan_images(read_cohort(cohort_folder), progress=False)


@pytest.fixture(scope="module")
def rows(cohort):
    return build_bags(cohort)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def teaching(trained_run, cache):
    """Makes the options of a lesson by the trained run."""
    return lambda **changes: DistillOptions(**{"teacher": [str(trained_run)], "teacher_cache": str(cache)} | changes)


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "lymph-mil" / "model.safetensors")


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# Formulas ---------------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("size", [1, 3])
def test_soft_labels_cost_t_squared_times_the_divergence(temperature, size):
    """Hinton et al. 2015; several teachers are the mean of their softened probabilities."""
    generator = torch.Generator().manual_seed(0)
    student, taught = torch.randn(5, 3, generator=generator), torch.randn(5, size, 3, generator=generator)
    p = softmax(taught.numpy() / temperature).mean(1)
    q = softmax(student.numpy() / temperature)
    expected = temperature**2 * np.mean([sum(p[i, c] * np.log(p[i, c] / q[i, c]) for c in range(3)) for i in range(5)])
    assert soft_label_loss(student, taught, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert soft_label_loss(taught[:, 0], taught[:, :1], temperature).item() == pytest.approx(0, abs=1e-6)


def test_at_high_temperature_the_soft_labels_match_logits():
    """Section 2.1 of the paper: then the gradient is (z - v) / C for centred logits; without T^2 it would vanish."""
    student = torch.tensor([[0.3, -0.5, 0.2]], dtype=torch.float32, requires_grad=True)
    teacher = torch.tensor([[[1.0, -0.4, -0.6]]])
    soft_label_loss(student, teacher, 100.0).backward()
    assert torch.allclose(student.grad, (student.detach() - teacher[0]) / 3, atol=0.01)


def test_attentions_are_compared_on_the_real_cells():
    teacher = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.3, 0.5]])
    student = torch.tensor([[0.4, 0.6, 0.0], [0.3, 0.3, 0.4]])
    pairs = [(t, s) for t, s in zip(teacher.flatten().tolist(), student.flatten().tolist(), strict=True) if t]
    expected = sum(t * np.log(t / s) for t, s in pairs) / 2
    assert attention_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert attention_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert attention_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])).isfinite()


def test_embeddings_are_compared_by_direction_or_by_value():
    first, second = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    assert feature_loss(first, second, "cosine").item() == pytest.approx(0.5)
    assert feature_loss(first, second, "mse").item() == pytest.approx((1 + 4 + 4 + 4) / 4)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    torch.manual_seed(0)
    student = LymphMILForBagClassification(LymphMILConfig(encoder="test_vit", image_size=32)).eval()
    options = DistillOptions(teacher=["x"], alpha=0.3, temperature=3.0, feature_weight=0.2, attention_weight=0.1)
    answer = Answer(torch.randn(1, 2), torch.randn(7), torch.full((4,), 0.25))
    model = DistillationModel(student, options, answer).eval()
    inputs = {"pixel_values": torch.randn(1, 4, 3, 32, 32), "labels": torch.tensor([1])}
    asked = {f"teacher_{name}": tensor[None] for name, tensor in answer.tensors().items()}
    plain = student(**inputs)
    expected = 0.3 * plain.loss + 0.7 * soft_label_loss(plain.logits, answer.logits[None], 3.0)
    expected += 0.2 * feature_loss(model.projection(plain.bag_embedding), answer.embedding[None], "cosine")
    expected += 0.1 * attention_loss(plain.attentions, answer.attentions[None])
    assert model(**inputs, **asked).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(model(**inputs).loss, plain.loss), "without a teacher it is the student, as in validation"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, "--alpha 1.5"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"feature_weight": -1.0}, "--feature-weight -1.0"),
        ({"attention_weight": float("nan")}, "--attention-weight nan"),
    ],
)
def test_numbers_outside_their_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DistillOptions(teacher=["x"], **change)


# Training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught_run(tiny_options, teaching, tmp_path_factory):
    """A finished student with every term, of sampled cells."""
    folder = tmp_path_factory.mktemp("runs") / "taught"
    distill(*tiny_options(folder, max_cells=3), teaching(**TERMS))
    return folder


def test_without_the_teachers_share_it_is_plain_training_bit_for_bit(trained_run, tiny_options, teaching, tmp_path):
    distill(*tiny_options(tmp_path / "run"), teaching(alpha=1.0))
    assert_same_bits(weights(trained_run), weights(tmp_path / "run"))
    assert (trained_run / "history.csv").read_text() == (tmp_path / "run" / "history.csv").read_text()


def test_the_student_is_an_ordinary_patient_model(taught_run, trained_run, cohort_folder, tmp_path):
    assert weights(taught_run).keys() == weights(trained_run).keys(), "nothing of teacher or projection is exported"
    assert not torch.equal(weights(taught_run)["classifier.weight"], weights(trained_run)["classifier.weight"])
    assert isinstance(AutoModel.from_pretrained(taught_run / "lymph-mil"), LymphMILForBagClassification)
    options = EvaluateOptions(run=str(taught_run), output=str(tmp_path), resamples=100)
    report = recipes.evaluate(CohortOptions(data=str(cohort_folder)), options, InferenceOptions(cpu=True))
    assert report["n"] == len(Split.load(taught_run / "split.json").validation)
    assert {"alpha", "temperature", "teacher"} <= json.loads((taught_run / "settings.json").read_text()).keys()


def test_the_teacher_is_frozen_and_stays_as_it_was(trained_run, cohort, rows, tmp_path):
    teacher = read_teacher(str(trained_run))
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())
    answers = dict(teacher.ask(cohort, rows, Accelerator(cpu=True)))
    assert_same_bits(before, teacher.model.state_dict())
    expected = teacher.model(**collate_bags([BagDataset(rows, teacher.processor)[3]]))
    assert torch.allclose(answers[3]["logits"], expected.logits[0], atol=1e-6)
    assert torch.allclose(answers[3]["attentions"], expected.attentions[0], atol=1e-6)
    assert len(answers) == len(cohort.patients)


def test_only_student_and_projection_are_trained():
    student = LymphMILForBagClassification(LymphMILConfig(encoder="test_vit", image_size=32))
    answer = Answer(torch.zeros(1, 2), torch.zeros(5))
    model = DistillationModel(student, DistillOptions(teacher=["x"], feature_weight=1.0), answer)
    set_training_mode(model)
    names = {name for name, _ in model.named_parameters()}
    own = {f"student.{name}" for name, _ in student.named_parameters()}
    assert names == own | {"projection.weight", "projection.bias"}
    assert DistillationModel(student, DistillOptions(teacher=["x"]), answer).projection is None


class PowerCutError(RuntimeError):
    """Stands for a power cut."""


def test_an_interrupted_student_resumes_to_the_same_bits(taught_run, tiny_options, teaching, tmp_path, monkeypatch):
    finish, calls = TrainingLoop._finish_epoch, []

    def fail_in_the_second_epoch(self):
        calls.append(1)
        if len(calls) == 2:
            raise PowerCutError
        finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_finish_epoch", fail_in_the_second_epoch)
        with pytest.raises(PowerCutError):
            distill(*tiny_options(tmp_path / "run", max_cells=3), teaching(**TERMS))
    torch.manual_seed(99)
    distill(*tiny_options(tmp_path / "run", max_cells=3, resume=True), teaching(**TERMS))
    assert_same_bits(weights(taught_run), weights(tmp_path / "run"))
    with pytest.raises(RunError, match=r"alpha: 0.5 -> 0.9"):
        distill(*tiny_options(tmp_path / "run", max_cells=3, resume=True), teaching(alpha=0.9, **TERMS))


def test_an_adapter_can_be_the_student(tiny_options, teaching, tmp_path):
    chosen = tiny_options(tmp_path / "run", adapter="lora", epochs=1)
    distill(*chosen, teaching(feature_weight=0.5))
    assert (tmp_path / "run" / "lymph-mil" / "adapter_model.safetensors").is_file()


def test_a_student_learns_from_cached_features_as_from_images(tiny_options, teaching, tmp_path):
    changes = {"freeze_encoder": True, "augment": False, "max_cells": 3, "dropout": 0.3}
    distill(*tiny_options(tmp_path / "images", **changes), teaching(**TERMS))
    distill(*tiny_options(tmp_path / "features", feature_cache=str(tmp_path / "cache"), **changes), teaching(**TERMS))
    torch.testing.assert_close(weights(tmp_path / "features"), weights(tmp_path / "images"), rtol=1e-3, atol=1e-5)


# Cells ------------------------------------------------------------------------------------------------------


def test_attentions_are_those_of_the_cells_that_are_shown(trained_run, cohort, rows, cache):
    student = AutoModel.from_pretrained(trained_run / "lymph-mil")
    processor = read_teacher(str(trained_run)).processor
    needs = DistillOptions(teacher=["x"], attention_weight=1.0)
    answers = Ensemble([str(trained_run)], student.config, needs).answers(
        cohort, rows, Accelerator(cpu=True), cache_dir=cache
    )
    whole = BagDataset(rows, processor)
    bags = BagDataset(rows, processor, max_cells=2, seed=7)
    taught = TaughtBags(bags, answers)
    seen = set()
    for key in ((0, 4), (1, 4), (2, 4)):
        cells = bags.sampled_cells(key, len(answers[4].attentions))
        seen.add(tuple(cells))
        item = taught[key]
        assert torch.equal(item["pixel_values"], whole[4]["pixel_values"][cells])
        expected = answers[4].attentions[cells] / answers[4].attentions[cells].sum()
        assert torch.allclose(item["teacher_attentions"], expected)
    assert len(seen) > 1, "other epochs show other cells"
    batch = taught_collate(collate_bags)([taught[0], TaughtBags(whole, answers)[5]])
    assert batch["teacher_attentions"].shape == (2, len(answers[5].attentions))
    assert torch.allclose(batch["teacher_attentions"].sum(1), torch.ones(2))


def test_a_teacher_that_looks_at_none_of_the_cells_says_nothing_of_them():
    assert restricted(torch.tensor([0.0, 1.0, 0.0]), [0, 2]).tolist() == [0.0, 0.0]


# Cache ------------------------------------------------------------------------------------------------------


def test_answers_are_kept_by_content(trained_run, cohort, rows, tmp_path, monkeypatch):
    config = AutoModel.from_pretrained(trained_run / "lymph-mil").config
    ensemble = Ensemble([str(trained_run)], config, DistillOptions(teacher=["x"]))
    accelerator = Accelerator(cpu=True)
    first = ensemble.answers(cohort, rows, accelerator, cache_dir=tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(cohort.patients)

    def refuse(*_, **__):
        raise AssertionError("asked again")

    monkeypatch.setattr(teachers, "outputs", refuse)
    again = ensemble.answers(cohort, rows, accelerator, cache_dir=tmp_path)
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(first, again, strict=True))
    part = cohort.select([cohort.patients[2].patient_id])
    alone = ensemble.answers(part, rows.select([2]), accelerator, cache_dir=tmp_path)
    assert torch.equal(alone[0].logits, first[2].logits)


def test_the_key_of_an_answer_follows_what_a_model_sees(cohort):
    patient = cohort.patients[0]
    digests = cohort.digests[patient.patient_id]
    key = patient_key(patient, digests)
    changed = type(patient)(**{**vars(patient), "age": 99.0})
    renamed = type(patient)(**{**vars(patient), "patient_id": "other"})
    assert key != patient_key(changed, digests)
    assert key != patient_key(patient, digests[::-1])
    assert key == patient_key(renamed, digests)


def test_another_teacher_has_other_answers(trained_run, tmp_path):
    source = shutil.copytree(trained_run / "lymph-mil", tmp_path / "copy")
    assert read_teacher(str(source)).key == read_teacher(str(trained_run)).key
    model = AutoModel.from_pretrained(source)
    with torch.no_grad():
        model.classifier.bias += 1e-3
    model.save_pretrained(source)
    assert read_teacher(str(source)).key != read_teacher(str(trained_run)).key


# Teachers ---------------------------------------------------------------------------------------------------


def test_networks_and_the_clinical_model_teach_together(trained_run, cohort, rows, cache):
    """Columns follow the student's labels, whatever the teacher's order."""
    swapped = LymphMILConfig(encoder="test_vit", image_size=32, id2label={0: "tumoral", 1: "reactive"})
    clinical = trained_run / "clinical-model"
    ensemble = Ensemble([str(trained_run), str(clinical)], swapped, DistillOptions(teacher=["x"], feature_weight=1.0))
    answers = ensemble.answers(cohort, rows, Accelerator(cpu=True), cache_dir=cache)
    assert answers[0].logits.shape == (2, 2)
    assert answers[0].embedding is not None
    assert answers[0].attentions is None
    expected = ClinicalModel.load(clinical).predict_proba(cohort.to_frame())[0]
    assert np.allclose(answers[0].logits[1].softmax(0).numpy(), expected[::-1], atol=1e-5)


def test_a_clinical_model_has_neither_embedding_nor_attention(trained_run, cohort, rows, cache):
    config = AutoModel.from_pretrained(trained_run / "lymph-mil").config
    for term, value in TERMS.items():
        ensemble = Ensemble(
            [str(trained_run / "clinical-model")], config, DistillOptions(teacher=["x"], **{term: value})
        )
        with pytest.raises(DistillationError, match=f"--{term.replace('_', '-')}"):
            ensemble.answers(cohort, rows, Accelerator(cpu=True), cache_dir=cache)


def test_a_student_without_attention_cannot_copy_one(tiny_options, teaching, tmp_path):
    with pytest.raises(DistillationError, match="--pooling sum has no attention"):
        distill(*tiny_options(tmp_path / "run", pooling="sum"), teaching(attention_weight=1.0))


def test_a_teacher_of_other_labels_is_refused(trained_run):
    config = LymphMILConfig(id2label={0: "APL", 1: "AML"})
    with pytest.raises(DistillationError, match=r"knows the labels \['reactive', 'tumoral'\]"):
        Ensemble([str(trained_run)], config, DistillOptions(teacher=["x"]))


@pytest.mark.parametrize("teacher", ["", "lymph-mil", "clinical-model"])
def test_a_teacher_that_knows_the_evaluation_patients_is_refused(
    trained_run, tiny_options, teaching, tmp_path, teacher
):
    """The teacher's soft labels would carry them into the student."""
    split = Split.load(trained_run / "split.json")
    lists = {"train": [*split.train[2:], *split.validation], "validation": split.train[:2]}
    (tmp_path / "split.json").write_text(json.dumps(lists))
    chosen = tiny_options(tmp_path / "run", split=str(tmp_path / "split.json"))
    with pytest.raises(LineageError, match=r"was trained on 2 of the 2 validation and test patients"):
        distill(*chosen, teaching(teacher=[str(trained_run / teacher)]))


def test_a_teacher_without_a_record_is_warned_about(trained_run, teaching, tiny_options, tmp_path, caplog):
    source = shutil.copytree(trained_run / "lymph-mil", tmp_path / "from-elsewhere")
    distill(*tiny_options(tmp_path / "run", epochs=1), teaching(teacher=[str(source)]))
    assert "cannot be checked" in caplog.text


def test_whom_the_teacher_knows_is_not_held_out_from_the_student(trained_run, tiny_options, teaching, tmp_path):
    """A patient in no part of the student's split may still be one of the teacher's."""
    split = Split.load(trained_run / "split.json")
    lists = {"train": split.train[1:], "validation": split.validation}
    (tmp_path / "split.json").write_text(json.dumps(lists))
    distill(*tiny_options(tmp_path / "run", split=str(tmp_path / "split.json"), epochs=1), teaching())
    records = [json.loads((run / "cohort.json").read_text()) for run in (tmp_path / "run", trained_run)]
    assert records[0]["digests"]["train"] == records[1]["digests"]["train"]
