"""Pretraining: whom it may see, exact resume, and weights that arrive in the encoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from cohort_factory import image_bytes, write_images
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from lymph_hf import pretraining, recipes
from lymph_hf.cell_sources import read_cells
from lymph_hf.cells import hold_out
from lymph_hf.cohort import read_cohort, scan_images
from lymph_hf.configuration_lymph import LymphMILConfig
from lymph_hf.encoder_weights import load_encoder_weights
from lymph_hf.encoders import build_encoder
from lymph_hf.lineage import LineageError
from lymph_hf.modeling_lymph import LymphMILForBagClassification
from lymph_hf.modeling_mae import LymphMAEForPreTraining
from lymph_hf.options_pretrain import PretrainOptions
from lymph_hf.pretraining import build_optimizer, new_model, pretrain
from lymph_hf.pretraining_data import EvaluationPatients, PretrainingError, permitted_cells
from lymph_hf.pretraining_scores import PretrainingValidation
from lymph_hf.probing import RECORD
from lymph_hf.splits import make_split

SMALL = {"encoder": "test_vit", "image_size": 32, "decoder_depth": 1, "decoder_width": 32, "decoder_heads": 4}
SMALL |= {"epochs": 2, "batch_size": 16, "micro_batch": 16, "learning_rate": 1e-3, "tracker": "none", "cpu": True}


def options(data, output, **changes) -> PretrainOptions:
    sources = [str(path) for path in (data if isinstance(data, list) else [data])]
    return PretrainOptions(data=sources, output=str(output), **(SMALL | changes))


@pytest.fixture(scope="module")
def typed_cells(tmp_path_factory) -> Path:
    """Two types of 20 cells each; one is darker."""
    folder = tmp_path_factory.mktemp("cells") / "typed"
    for start, name in ((0, "blast"), (100, "lymphocyte")):
        write_images(folder / name, range(start, start + 20))
    return folder


@pytest.fixture(scope="module")
def mae_run(typed_cells, tmp_path_factory) -> Path:
    """A finished run of a masked autoencoder with a picture after each epoch."""
    folder = tmp_path_factory.mktemp("runs") / "mae"
    pretrain(options(typed_cells, folder, validation_fraction=0.2, figure_every=1))
    return folder


@pytest.fixture(scope="module")
def split_file(cohort_folder, tmp_path_factory) -> Path:
    """Four of the painted patients are evaluated, two in validation and two in test."""
    ids = [patient.patient_id for patient in read_cohort(cohort_folder).patients]
    path = tmp_path_factory.mktemp("splits") / "split.json"
    path.write_text(json.dumps({"train": ids[4:], "validation": ids[:2], "test": ids[2:4]}))
    return path


def digests_of(folder: Path, ids) -> set[str]:
    cohort = scan_images(read_cohort(folder), progress=False)
    return {digest for patient_id in ids for digest in cohort.digests[patient_id]}


# Whom it may see --------------------------------------------------------------------------------------------


def test_mae_never_trains_on_evaluation_patients(cohort_folder, split_file, tmp_path):
    """The predecessor trained and validated its masked autoencoder on the patients it was later tested on."""
    lists = json.loads(split_file.read_text())
    evaluated = digests_of(cohort_folder, lists["validation"] + lists["test"])
    encoder = pretrain(options(cohort_folder, tmp_path / "run", split=str(split_file), epochs=1))
    record = json.loads((encoder / RECORD).read_text())
    assert set(record["digests"]) <= digests_of(cohort_folder, lists["train"])
    assert not evaluated & set(record["digests"])
    assert record["left_out_cells"] == len(evaluated)
    hashed = EvaluationPatients.read(split_file).sha256
    assert json.loads((encoder / "config.json").read_text())["pretraining"]["split_sha256"] == hashed
    saved = json.loads((tmp_path / "run" / "lymph-mae" / "config.json").read_text())
    assert saved["pretraining"]["split_sha256"] == hashed


def test_copies_of_evaluation_patients_are_found_by_their_images(cohort_folder, split_file, tmp_path):
    """Another folder, other names, no patient: the bytes give them away."""
    lists = json.loads(split_file.read_text())
    patients = {patient.patient_id: patient for patient in read_cohort(cohort_folder).patients}
    copies = tmp_path / "copies"
    copies.mkdir()
    for number, patient_id in enumerate((lists["test"][0], lists["train"][0])):
        for path in patients[patient_id].images:
            (copies / f"{number}-{path.name}").write_bytes(path.read_bytes())
    cells, record = permitted_cells(options([cohort_folder, copies], "", split=str(split_file)))
    evaluated = digests_of(cohort_folder, lists["validation"] + lists["test"])
    assert not evaluated & set(cells.digests)
    assert record["left_out_cells"] == len(evaluated) + len(patients[lists["test"][0]].images)


def test_a_run_tells_its_evaluation_patients_by_their_images(cohort_folder, trained_run, tmp_path):
    """A run knows its patients' images, so even cells without patients can be told apart."""
    validation = json.loads((trained_run / "split.json").read_text())["validation"]
    plain = tmp_path / "plain"
    plain.mkdir()
    for patient in read_cohort(cohort_folder).patients:
        for path in patient.images:
            (plain / f"{patient.patient_id}-{path.name}").write_bytes(path.read_bytes())
    cells, record = permitted_cells(options(plain, "", split=str(trained_run)))
    evaluated = digests_of(cohort_folder, validation)
    assert evaluated
    assert not evaluated & set(cells.digests)
    assert record["left_out_cells"] == len(evaluated)


def test_the_hash_of_a_split_is_of_its_patients_not_of_their_order(tmp_path):
    lists = {"train": ["A", "B"], "validation": ["C", "D"]}
    (tmp_path / "one.json").write_text(json.dumps(lists))
    (tmp_path / "two.yaml").write_text("validation: [D, C]\ntrain: [B, A]\n")
    (tmp_path / "other.json").write_text(json.dumps({"train": ["A"], "validation": ["C", "D", "B"]}))
    one, two, other = (EvaluationPatients.read(tmp_path / f).sha256 for f in ("one.json", "two.yaml", "other.json"))
    assert one == two != other


def test_patients_without_a_split_are_refused(cohort_folder):
    with pytest.raises(PretrainingError, match=r"cells are of patients.*--split none"):
        permitted_cells(options(cohort_folder, ""))
    cells, record = permitted_cells(options(cohort_folder, "", split="none"))
    assert record["split_sha256"] is None
    assert len(cells) == sum(len(patient.images) for patient in read_cohort(cohort_folder).patients)


def test_a_split_that_cannot_be_applied_is_refused(typed_cells, split_file):
    with pytest.raises(PretrainingError, match=r"no cell has a patient.*Give a run folder"):
        permitted_cells(options(typed_cells, "", split=str(split_file)))


def test_cell_types_are_needed_to_learn_them(tmp_path):
    write_images(tmp_path / "plain", range(4))
    with pytest.raises(PretrainingError, match=r"0 cell types.*needs at least 2"):
        permitted_cells(options(tmp_path / "plain", "", objective="cell-type"))


def test_patient_labels_are_learnt_without_evaluation_patients(cohort_folder, tmp_path):
    """The first stage of the two-stage recipe: cells with the label of their patient."""
    split_file = tmp_path / "split.json"
    make_split(read_cohort(cohort_folder), validation_fraction=0.2, test_fraction=0.2).save(split_file)
    lists = json.loads(split_file.read_text())
    patients = {patient.patient_id: patient for patient in read_cohort(cohort_folder).patients}
    wanted = options(
        cohort_folder,
        tmp_path / "run",
        split=str(split_file),
        objective="patient-label",
        validation_fraction=0.3,
        epochs=1,
        probe_cells=0,
    )
    cells, _ = permitted_cells(wanted)
    assert cells.cell_types == tuple(patients[patient_id].label for patient_id in cells.patient_ids)
    train, held = hold_out(cells, 0.3, 0, by_type=True)
    sides = [{(cells.patient_ids[row], cells.cell_types[row]) for row in rows} for rows in (train, held)]
    assert sides[0].isdisjoint(sides[1]), "patients are held out as a whole"
    assert all({label for _, label in side} == {"reactive", "tumoral"} for side in sides)
    encoder = pretrain(wanted)
    record = json.loads((encoder / RECORD).read_text())
    assert record["objective"] == "patient-label"
    assert record["digests"]
    assert set(record["digests"]) <= digests_of(cohort_folder, lists["train"])
    assert not digests_of(cohort_folder, lists["validation"] + lists["test"]) & set(record["digests"])
    assert "validation_balanced_accuracy" in (tmp_path / "run" / "history.csv").read_text()


def test_patient_labels_need_patients(typed_cells):
    with pytest.raises(PretrainingError, match=r"patient-label needs folders of patients"):
        permitted_cells(options(typed_cells, "", objective="patient-label", split="none"))


def test_the_classifier_of_cells_is_exported_as_a_model_of_bags(typed_cells, tmp_path):
    """Of a bag of one cell it says what the trained classifier says of the cell."""
    torch.manual_seed(3)
    wanted = options(typed_cells, tmp_path, objective="cell-type")
    model, processor = new_model(wanted, ("blast", "lymphocyte"))
    pretraining.export(model.eval(), processor, tmp_path, {"digests": [], "epochs": 1})
    loaded = AutoModel.from_pretrained(tmp_path / "classifier")
    cells = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(cells).logits
        assert torch.allclose(loaded(pixel_values=cells[:, None]).logits, expected, atol=1e-6)
        together = loaded(pixel_values=cells, bag_offsets=torch.arange(4)).logits
    assert torch.allclose(together, expected, atol=1e-6)
    assert loaded.config.id2label == {0: "blast", 1: "lymphocyte"}
    assert (tmp_path / "classifier" / "preprocessor_config.json").is_file()


def test_an_encoder_that_knows_the_evaluation_patients_is_refused(cohort_folder, trained_run, tiny_options, tmp_path):
    """Its labels would be those of the patients who choose the epoch; without labels it is a warning."""
    known = {"split": "none", "epochs": 1, "probe_cells": 0, "validation_fraction": 0.0}
    labelled = pretrain(options(cohort_folder, tmp_path / "labels", objective="patient-label", **known))
    with pytest.raises(LineageError, match=r"was trained on \d+ of the \d+ validation and test patients"):
        recipes.train(*tiny_options(tmp_path / "run", encoder_weights=str(labelled)))
    permitted = options(
        cohort_folder, tmp_path / "fair", objective="patient-label", **known | {"split": str(trained_run)}
    )
    recipes.train(*tiny_options(tmp_path / "run", encoder_weights=str(pretrain(permitted)), epochs=1))


# Weights that arrive ----------------------------------------------------------------------------------------


def test_mae_weights_arrive_in_the_encoder_of_the_patient_model(mae_run):
    """The predecessor assigned its weights beside the encoder, so they were never used."""
    torch.manual_seed(1)
    model = LymphMILForBagClassification(LymphMILConfig(encoder="test_vit", image_size=32)).eval()
    bag = torch.randn(1, 3, 3, 32, 32)
    before = model(bag).logits
    report = load_encoder_weights(model.model.encoder, mae_run / "encoder")
    assert report.share == 1.0
    assert report.missing == report.unexpected == report.resized == ()
    assert not torch.allclose(before, model(bag).logits)
    mae = LymphMAEForPreTraining.from_pretrained(mae_run / "lymph-mae")
    assert_same_bits(mae.encoder.state_dict(), model.model.encoder.state_dict())


def test_mae_weights_reach_the_model_that_lymph_train_writes(mae_run, tiny_options, tmp_path):
    chosen = tiny_options(
        tmp_path / "mil", encoder_weights=str(mae_run / "encoder"), freeze_encoder=True, epochs=1, augment=False
    )
    recipes.train(*chosen)
    trained = AutoModel.from_pretrained(tmp_path / "mil" / "lymph-mil")
    assert_same_bits(load_file(mae_run / "encoder" / "model.safetensors"), trained.model.encoder.state_dict())


def test_timm_reads_the_exported_folder(mae_run):
    encoder = timm.create_model(f"local-dir:{mae_run / 'encoder'}", pretrained=True).eval()
    expected = build_encoder(LymphMILConfig(encoder="test_vit", image_size=32)).eval()
    load_encoder_weights(expected, mae_run / "encoder")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images), expected(images))
    data = timm.data.resolve_model_data_config(encoder)
    assert data["input_size"] == (3, 32, 32)
    assert data["crop_pct"] == 1.0


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]):
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_stages_follow_each_other_by_weight_folders(mae_run, typed_cells, tmp_path):
    """Masked autoencoder -> cell types -> patients."""
    stage = options(
        typed_cells,
        tmp_path / "types",
        objective="cell-type",
        encoder_weights=str(mae_run / "encoder"),
        validation_fraction=0.2,
    )
    torch.manual_seed(0)
    begun, _ = new_model(stage, ("blast", "lymphocyte"))
    assert_same_bits(load_file(mae_run / "encoder" / "model.safetensors"), begun.encoder.state_dict())
    encoder = pretrain(stage)
    history = (tmp_path / "types" / "history.csv").read_text().splitlines()
    assert "validation_balanced_accuracy" in history[0]
    assert "validation_knn_balanced_accuracy" in history[0]
    assert len(history) == 3
    patients = build_encoder(LymphMILConfig(encoder="test_vit", image_size=32))
    assert load_encoder_weights(patients, encoder).share == 1.0
    assert not torch.equal(patients.blocks[0].attn.qkv.weight, begun.encoder.blocks[0].attn.qkv.weight)


def test_pretraining_starts_from_foreign_checkpoints(tmp_path):
    """The layout of DinoBloom: under `teacher`, with the wrapper's name, beside the heads of its own training."""
    torch.manual_seed(5)
    source = timm.create_model("test_vit", img_size=32, num_classes=0)
    state = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"teacher": state | {"dino_head.mlp.weight": torch.zeros(3, 3)}}, tmp_path / "foreign.pth")
    model, _ = new_model(options("", "", encoder_weights=str(tmp_path / "foreign.pth")), ())
    assert_same_bits(source.state_dict(), model.encoder.state_dict())


# Training ---------------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_promises(mae_run, typed_cells):
    assert (mae_run / "history.png").exists()
    assert sorted(path.name for path in (mae_run / "reconstructions").iterdir()) == ["epoch-0001.png", "epoch-0002.png"]
    record = json.loads((mae_run / RECORD).read_text())
    assert (record["cells"], record["held_out_cells"], record["epochs"]) == (32, 8, 2)
    assert len(record["digests"]) == 32
    assert record["scores"].keys() == {"loss", "knn_balanced_accuracy"}
    assert record["fingerprint"] == read_cells(typed_cells).fingerprint
    first, second = (line.split(",") for line in (mae_run / "history.csv").read_text().splitlines()[1:])
    assert float(second[2]) < float(first[2])  # the loss falls


class PowerCutError(RuntimeError):
    """Stands for a power cut."""


def test_an_interrupted_run_resumes_to_the_same_bits(mae_run, typed_cells, tmp_path, monkeypatch):
    wanted = options(typed_cells, tmp_path / "run", validation_fraction=0.2, figure_every=1, checkpoint_every=1)
    score = PretrainingValidation.__call__

    def fail_in_the_second_epoch(self, model, epoch):
        if epoch == 2:
            raise PowerCutError
        return score(self, model, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingValidation, "__call__", fail_in_the_second_epoch)
        with pytest.raises(PowerCutError):
            pretrain(wanted)
    torch.manual_seed(99)
    wanted.resume = True
    pretrain(wanted)
    for name in ("encoder", "lymph-mae"):
        first, second = (load_file(run / name / "model.safetensors") for run in (mae_run, tmp_path / "run"))
        assert_same_bits(first, second)
    assert (mae_run / "history.csv").read_text() == (tmp_path / "run" / "history.csv").read_text()


def test_cells_that_changed_are_not_resumed_on(typed_cells, tmp_path):
    write_images(tmp_path / "cells", range(8))
    wanted = options(tmp_path / "cells", tmp_path / "run", epochs=1, validation_fraction=0)
    pretrain(wanted)
    (tmp_path / "cells" / "000003.png").write_bytes(image_bytes(77))
    wanted.resume = True
    with pytest.raises(PretrainingError, match="have changed since"):
        pretrain(wanted)


def test_micro_batches_change_the_memory_not_the_result(mae_run, typed_cells, tmp_path):
    pretrain(options(typed_cells, tmp_path / "run", validation_fraction=0.2, micro_batch=5))
    first, second = (np.loadtxt(run / "history.csv", delimiter=",", skiprows=1) for run in (mae_run, tmp_path / "run"))
    assert np.allclose(first[:, 2:4], second[:, 2:4], rtol=1e-4)  # losses of training and of held-out cells


def test_without_held_out_cells_the_last_epoch_is_kept(typed_cells, tmp_path):
    encoder = pretrain(options(typed_cells, tmp_path / "run", validation_fraction=0, epochs=1))
    assert json.loads((encoder / RECORD).read_text())["held_out_cells"] == 0
    assert not (tmp_path / "run" / "reconstructions").exists()


@pytest.mark.parametrize(("objective", "betas"), [("mae", (0.9, 0.95)), ("cell-type", (0.9, 0.999))])
def test_the_optimizer_holds_each_parameter_once_and_spares_vectors(objective, betas):
    wanted = options("", "", objective=objective, learning_rate=None, batch_size=512)
    model, _ = new_model(wanted, ("a", "b"))
    optimizer = build_optimizer(model, wanted)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {group["betas"] for group in optimizer.param_groups} == {betas}
    assert {group["lr"] for group in optimizer.param_groups} == {2 * pretraining.OBJECTIVES[objective].base_rate}
    spared = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    tokens = [model.encoder.pos_embed, model.encoder.cls_token]
    tokens += [model.decoder.mask_token] if objective == "mae" else []
    vectors = [p for m in model.modules() if isinstance(m, nn.LayerNorm | nn.Linear) for p in (m.bias,)]
    assert {id(p) for p in tokens + vectors} <= spared
    assert id(model.encoder.blocks[0].attn.qkv.weight) not in spared


@pytest.mark.parametrize("by_name", [False, True], ids=["encoder weights", "weights of the encoder's name"])
def test_rates_fall_from_block_to_block_when_given_weights_are_tuned(mae_run, by_name):
    folder = str(mae_run / "encoder")
    given = {"encoder": f"local-dir:{folder}"} if by_name else {"encoder_weights": folder}
    wanted = options("", "", objective="cell-type", learning_rate=1.0, **given)
    model, _ = new_model(wanted, ("a", "b"))
    rate = {id(p): group["lr"] for group in build_optimizer(model, wanted).param_groups for p in group["params"]}
    blocks = [rate[id(block.mlp.fc1.weight)] for block in model.encoder.blocks]
    assert np.allclose(np.divide(blocks[:-1], blocks[1:]), 0.75)
    assert rate[id(model.encoder.patch_embed.proj.weight)] < blocks[0]
    assert rate[id(model.classifier.weight)] == 1.0
