"""The models of a cross-validation go to the Hub as one: its scores, its weights, and what each member said."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from hub_server import card_problems as hub_problems
from hub_server import client_environment
from huggingface_hub import ModelCard
from publishing_cases import FACTS, WRITER, options, publish_as, run_examples, sent
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lymph_hf import LymphMILEnsembleForBagClassification, recipes
from lymph_hf.card_patterns import CardError, card_problems
from lymph_hf.crossval import crossval
from lymph_hf.golden import golden_answers, golden_cells, golden_problems
from lymph_hf.hub_push import PublishError
from lymph_hf.options import CohortOptions, EvaluateOptions, InferenceOptions
from lymph_hf.options_crossval import CrossvalOptions
from lymph_hf.publication_checks import PICTURES, folder_problems, run_identifiers
from lymph_hf.publishing import publish
from lymph_hf.publishing_code import load_published, outdated_code
from lymph_hf.publishing_model import stage_run
from lymph_hf.runs import Run
from lymph_hf.synthetic import write_synthetic_cohort

CARD = replace(FACTS, evaluation_data=None, encoder_data="Noise, seed 0.")
CLINICAL = {"age": 71, "sex": "F", "lymphocyte_count": 14.2}


@pytest.fixture(scope="module")
def folds(tiny_options, tmp_path_factory) -> Path:
    """Two folds, one frozen encoder."""
    folder = tmp_path_factory.mktemp("folds") / "run"
    weights = folder.with_name("encoder.safetensors")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0, img_size=32).state_dict(), weights)
    frozen = {"encoder_weights": str(weights), "freeze_encoder": True}
    cohort, _, model, training = tiny_options(folder, epochs=1, coverage=0.5, **frozen)
    return crossval(cohort, CrossvalOptions(folds=2, validation_fraction=0.3, resamples=50), model, training)


@pytest.fixture(scope="module")
def staged(folds, tmp_path_factory) -> Path:
    """With halved weights."""
    folder = tmp_path_factory.mktemp("staged")
    return stage_run(Run(folds), folder, CARD, repo="org/folds", tag="v1", dtype="float16")


@pytest.fixture
def folder(staged, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(staged, tmp_path / "folder"))


def answers(model, processor):
    return golden_answers(model, processor)["probabilities"]["tumoral"]


def load(source, **pinned):
    from transformers import AutoImageProcessor

    model = AutoModel.from_pretrained(source, **pinned)
    return type(model).__name__, answers(model, AutoImageProcessor.from_pretrained(source, **pinned))


# What is put together -----------------------------------------------------------------------------------------


def test_matrices_are_halved_and_loaded_in_full(folds, staged):
    stored, trained = (load_file(path / "model.safetensors") for path in (staged, folds / "lymph-mil"))
    assert stored.keys() == trained.keys()
    assert not [name for name in stored if name.startswith("members.1.model.encoder")], "the encoder is there once"
    for name, tensor in trained.items():
        halved = tensor.half() if tensor.ndim > 1 else tensor
        assert stored[name].dtype == halved.dtype and stored[name].equal(halved)
    model, processor = load_published(staged)
    assert model.dtype == torch.float32 and isinstance(model, LymphMILEnsembleForBagClassification)
    assert answers(model, processor) == pytest.approx(answers(*load_published(folds / "lymph-mil")), abs=1e-3)
    assert AutoModel.from_pretrained(staged, dtype="auto").dtype == torch.float32
    half = AutoModel.from_pretrained(staged, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        inputs = processor(golden_cells(), CLINICAL)
        found = half(**inputs).logits.softmax(-1), model(**inputs).logits.softmax(-1)
    torch.testing.assert_close(*found, atol=0.02, rtol=0)


def test_the_folder_passes_every_check_and_keeps_its_answers(folds, staged):
    assert folder_problems(staged, run_identifiers(Run(folds))) == []
    assert golden_problems(staged) == outdated_code(staged) == []
    assert {"modeling_ensemble.py", "configuration_ensemble.py", "crossval.png"} <= {p.name for p in staged.iterdir()}
    assert not [path for path in staged.iterdir() if path.suffix == ".csv"]
    assert [path.name for path in staged.rglob("*") if path.suffix in PICTURES] == ["crossval.png"]


def test_pictures_and_weights_of_cells_stay_at_home(folds, staged):
    """They are there, and nothing that leaves holds them, under whatever name."""
    (cells,) = folds.rglob("cells.png")
    at_home = [cells, cells.with_suffix(".csv"), folds / "report.html", *folds.rglob("attentions.csv")]
    assert len(at_home) == 5
    sent = {path.read_bytes() for path in staged.rglob("*") if path.is_file()}
    assert not sent & {path.read_bytes() for path in at_home}
    assert "image/png" not in (staged / "README.md").read_text()


def test_each_member_reproduces_what_it_said_of_its_fold(folds, cohort_folder, tmp_path):
    wanted = options(folds, data=str(cohort_folder), cache_dir=str(tmp_path))
    found = [publish(replace(wanted, dtype=dtype), CARD).notes for dtype in ("float32", "float16")]
    for notes in found:
        assert any("reproduces the 14 predictions of out-of-fold.csv" in note for note in notes), notes
    run = Path(shutil.copytree(folds, tmp_path / "run"))
    weights = load_file(run / "lymph-mil" / "model.safetensors")
    weights["members.1.classifier.bias"] += torch.tensor([0.0, 0.5])
    save_file(weights, run / "lymph-mil" / "model.safetensors", metadata={"format": "pt"})
    second = (pd.read_csv(run / "out-of-fold.csv").fold == 2).sum()
    with pytest.raises(PublishError, match=rf"out-of-fold\.csv: {second} of 14 stored predictions are not reproduced"):
        publish(replace(wanted, run=str(run)), CARD)


def test_the_card_tells_of_folds_and_not_of_held_out_patients(folds, staged):
    text = (staged / "README.md").read_text()
    assert card_problems(text) == [] and hub_problems(text, "model") == ([], [])
    report = json.loads((folds / "metrics.json").read_text())
    auroc = report["scores"]["auroc"]
    assert f"| {auroc['value']:.3f}" in text and f"{auroc['low']:.3f} to {auroc['high']:.3f}" in text
    assert "### Out-of-fold patients" in text and "### Held-out patients" not in text
    assert "| Members | 2: those of 2 folds, with one encoder in common; their probabilities are averaged |" in text
    assert "started from weights of the publisher (Training data) and kept frozen" in text
    assert "The encoder's first weights: Noise, seed 0. No record of their training is at hand" in text
    assert "safetensors, float16 (norms and biases in float32), computed in float32" in text
    assert "clinical alone 0." in text and "AUROC among the patients of single folds" in text
    assert (
        "fitted on the out-of-fold predictions of all patients. Out-of-fold patients, each scaled by its fold" in text
    )
    assert "The published model was scored on no patient at all" in text
    assert "![Figures of the scores of these patients](crossval.png)" in text
    data = ModelCard(text).data
    assert "ensemble" in data.tags
    assert {result.dataset_split for result in data.eval_results} == {"out-of-fold"}
    named = {result.metric_type: result for result in data.eval_results}
    assert named["roc_auc"].metric_value == pytest.approx(auroc["value"], abs=1e-4)
    assert json.loads((staged / "evaluation.json").read_text())["n"] == 14


def test_other_patients_come_first_and_their_names_stay_behind(folds, tmp_path):
    run, other = Path(shutil.copytree(folds, tmp_path / "run")), tmp_path / "other"
    write_synthetic_cohort(other, patients=8, seed=9, cells=(3, 4), image_size=48, progress=False)
    table = pd.read_csv(other / "clinical.csv", dtype=str)
    table.patient_id = table.patient_id.replace("P002", "stranger")
    (other / "images" / "P002").rename(other / "images" / "stranger")
    table.to_csv(other / "clinical.csv", index=False)
    cohort, evaluation = CohortOptions(data=str(other)), EvaluateOptions(run=str(run), resamples=20)
    recipes.evaluate(cohort, evaluation, InferenceOptions(cpu=True))
    assert "stranger" in run_identifiers(Run(run))
    with pytest.raises(CardError, match="--evaluation-data"):
        publish(options(run), CARD)
    wanted = options(run, output=str(tmp_path / "kept"), data=str(other), cache_dir=str(tmp_path / "c"))
    done = publish(wanted, replace(CARD, evaluation_data="Painted patients, seed 9."))
    assert any("reproduces the 8 predictions of predictions.csv" in note for note in done.notes)
    text = (tmp_path / "kept" / "README.md").read_text()
    assert text.index("### Held-out patients") < text.index("### Out-of-fold patients")
    assert "scored on no patient at all" not in text
    assert json.loads((tmp_path / "kept" / "evaluation.json").read_text())["n"] == 8
    assert {"evaluation.png", "crossval.png"} <= done.files.keys()


@pytest.mark.parametrize("spoil", [lambda b: b[:-10], lambda b: b[:12] + b"????" + b[16:], lambda b: b""])
def test_damaged_weights_are_named(folder, spoil):
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(OSError, match=r"model\.safetensors: damaged or incomplete"):
        AutoModel.from_pretrained(folder)


def test_a_member_that_was_exchanged_is_noticed(folder):
    weights = load_file(folder / "model.safetensors")
    weights["members.1.classifier.bias"] += torch.tensor([0.0, 0.01])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    problems = golden_problems(folder)
    assert problems[0] == "model.safetensors is not the file that was published"
    assert problems[1].startswith("its probabilities differ")


# First weights ------------------------------------------------------------------------------------------------


def with_first_weights(folds: Path, folder: Path, digests: list[str]) -> Run:
    """A run whose encoder began with weights that a pretraining had left."""
    run, weights = Path(shutil.copytree(folds, folder / "run")), folder / "types" / "encoder"
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | {"encoder_weights": str(weights)}))
    weights.mkdir(parents=True)
    record = {"objective": "cell-type", "cells": 7200, "epochs": 6, "digests": digests}
    (weights / "pretraining.json").write_text(json.dumps(record))
    return Run(run)


@pytest.mark.parametrize("known", [False, True])
def test_the_origin_of_the_encoder_is_told_and_asked_for(folds, tmp_path, known):
    images = json.loads((folds / "cohort.json").read_text())["digests"]["train"]
    run = with_first_weights(folds, tmp_path, images[:3] if known else ["0" * 64])
    with pytest.raises(CardError, match="--encoder-data"):
        publish(options(run.folder), replace(CARD, encoder_data=None))
    card = replace(CARD, encoder_data="Cells of an atlas, CC BY 4.0, by its authors.")
    publish(options(run.folder, output=str(tmp_path / "kept")), card)
    text = (tmp_path / "kept" / "README.md").read_text()
    assert "The encoder's first weights: Cells of an atlas, CC BY 4.0, by its authors. They were trained as" in text
    seen = "3 images of the patients that the run was scored on were" if known else "No image of the patients that"
    assert f"classification of cells by their type; 7,200 cells, 6 epochs. {seen}" in text


# On the Hub ---------------------------------------------------------------------------------------------------

STRANGER = """
import json, sys
sys.modules["lymph_hf"] = None  # import lymph_hf fails
import torch
from pathlib import Path
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
source, clinical = json.loads(sys.argv[1])
pinned = {"trust_remote_code": True, "revision": "v1"}
model = AutoModel.from_pretrained(source, **pinned)
processor = AutoImageProcessor.from_pretrained(source, **pinned)
cells = [Image.open(path) for path in sorted(Path(".").glob("*.png"))]
with torch.no_grad():
    output = model.eval()(**processor(cells, clinical))
print(json.dumps([type(model).__module__, str(model.dtype), output.logits.double().softmax(-1)[0, 1].item()]))
"""


def test_it_is_pushed_and_answers_alike_with_and_without_the_package(hub, client, folds, tmp_path):
    commit = client.call(publish_as, WRITER, sent(folds, repo="org/folds", dtype="float16"), CARD)
    assert hub.repo("org/folds").tags == {"v1": commit}
    assert hub.repo("org/folds").titles == ["initial commit", "Publish"]
    publish(options(folds, dtype="float16", output=str(tmp_path / "kept")), CARD)
    name, expected = load(tmp_path / "kept")
    assert client.call(load, "org/folds", revision="v1") == (name, expected)
    hub.forget()
    assert client.call(load, "org/folds", revision="v1", local_files_only=True) == (name, expected)
    assert hub.requests == []
    patient = tmp_path / "patient"
    patient.mkdir()
    for number, cell in enumerate(golden_cells()):
        cell.save(patient / f"{number}.png")
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps(["org/folds", CLINICAL])],
        env=client_environment(hub, str(tmp_path / "home")),
        cwd=patient,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    module, dtype, probability = json.loads(done.stdout)
    assert module.startswith("transformers_modules.") and dtype == "torch.float32"
    assert probability == pytest.approx(expected, abs=1e-6)
    assert len(client.call(run_examples, "org/folds", tmp_path)) == 2
