"""The main job end to end: a run folder that reloads, scores that hold, bad input that stops nothing."""

import csv
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from cohort_factory import encoded, image_bytes
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from lymph_hf import LymphMILForBagClassification, recipes
from lymph_hf.cohort import CohortError, read_cohort
from lymph_hf.metrics import choose_threshold
from lymph_hf.options import CohortOptions, EvaluateOptions, InferenceOptions, PredictOptions
from lymph_hf.recipes import RecipeError
from lymph_hf.runs import Run, RunError
from lymph_hf.splits import Split, SplitError
from lymph_hf.synthetic import write_synthetic_cohort

CPU = InferenceOptions(cpu=True)


def data(folder, **options) -> CohortOptions:
    return CohortOptions(data=str(folder), **options)


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohorts") / "challenge"
    write_synthetic_cohort(folder, patients=14, seed=4, layout="challenge", cells=(2, 4), image_size=48, progress=False)
    return folder


def test_a_run_holds_what_it_promises(trained_run):
    names = {path.name for path in trained_run.iterdir()}
    assert names >= {"lymph-mil", "settings.json", "split.json", "cohort.json", "history.csv", "history.png"}
    assert names >= {"validation.json", "validation.csv", "validation.png", "checkpoints", "logs"}
    assert not [name for name in names if name.startswith(".writing")]
    assert any((trained_run / "logs").rglob("events.out.tfevents*"))
    model_files = {path.name for path in (trained_run / "lymph-mil").iterdir()}
    assert model_files == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_the_exported_folder_reloads_by_its_name(trained_run, monkeypatch, cohort_folder):
    monkeypatch.chdir(trained_run)
    model = AutoModel.from_pretrained("lymph-mil")
    processor = AutoImageProcessor.from_pretrained("lymph-mil")
    assert isinstance(model, LymphMILForBagClassification)
    assert AutoConfig.from_pretrained("lymph-mil").id2label == {0: "reactive", 1: "tumoral"}
    stored = pd.read_csv("validation.csv").iloc[0]
    patient = read_cohort(cohort_folder).select([stored.patient_id]).patients[0]
    clinical = {name: getattr(patient, name) for name in ("age", "sex", "lymphocyte_count")}
    inputs = processor([Image.open(path) for path in patient.images], clinical)
    with torch.no_grad():
        probability = model(**inputs).logits.softmax(-1)[0, 1].item()
    assert probability == pytest.approx(stored.probability, abs=1e-5)
    assert stored.cells == len(patient.images)
    decided = model.config.id2label[int(probability >= model.config.decision_threshold)]
    assert stored.predicted_label == decided


def test_the_threshold_is_frozen_in_the_model_and_chosen_on_validation(trained_run, tiny_options, tmp_path):
    config = json.loads((trained_run / "lymph-mil" / "config.json").read_text())
    table = pd.read_csv(trained_run / "validation.csv")
    labels, probabilities = (table.label == "tumoral").astype(int), table.probability
    assert config["decision_threshold"] == pytest.approx(choose_threshold(labels, probabilities))
    recipes.train(*tiny_options(tmp_path / "fixed", epochs=1, threshold=0.123))
    assert json.loads((tmp_path / "fixed/lymph-mil/config.json").read_text())["decision_threshold"] == 0.123


def test_nothing_personal_is_written(challenge, tiny_options, tmp_path):
    """Dates of birth stay in the reader; exact identifiers only where a prediction needs them."""
    births = {
        row["DOB"]
        for part in ("trainset/trainset_true.csv", "testset/testset_data.csv")
        for row in csv.DictReader((challenge / part).read_text().splitlines())
    }
    recipes.train(*tiny_options(tmp_path / "run", data=challenge, epochs=1))
    for path in (tmp_path / "run").rglob("*"):
        if path.suffix in (".json", ".csv", ".txt"):
            text = path.read_text()
            assert not any(birth in text for birth in births), path
    model_files = "".join(path.read_text() for path in (tmp_path / "run/lymph-mil").glob("*.json"))
    assert "P0" not in model_files


def test_training_and_evaluation_patients_never_mix(trained_run, cohort_folder, tmp_path):
    split = Split.load(trained_run / "split.json")
    report = recipes.evaluate(data(cohort_folder), EvaluateOptions(run=str(trained_run), output=str(tmp_path)), CPU)
    scored = set(pd.read_csv(tmp_path / "predictions.csv").patient_id)
    assert scored == set(split.validation)
    assert "training patients left out" in report["patients"]
    renamed = shutil.copytree(cohort_folder, tmp_path / "renamed")
    table = pd.read_csv(renamed / "clinical.csv")
    for patient_id in table.patient_id:
        (renamed / "images" / patient_id).rename(renamed / "images" / f"other-{patient_id}")
    table.patient_id = "other-" + table.patient_id
    table.to_csv(renamed / "clinical.csv", index=False)
    again = recipes.evaluate(data(renamed), EvaluateOptions(run=str(trained_run), output=str(tmp_path)), CPU)
    assert again["n"] == report["n"], "recognised by their images, whatever their names"


def test_scores_are_those_of_the_written_predictions(trained_run, cohort_folder, tmp_path):
    options = EvaluateOptions(run=str(trained_run), output=str(tmp_path), subset="all", resamples=200)
    recipes.evaluate(data(cohort_folder), options, CPU)
    table = pd.read_csv(tmp_path / "predictions.csv")
    report = json.loads((tmp_path / "metrics.json").read_text())
    labels = (table.label == "tumoral").astype(int)
    scores = report["scores"]
    assert report["n"] == len(table) == 14
    assert report["n_per_label"] == {"reactive": int((labels == 0).sum()), "tumoral": int(labels.sum())}
    assert scores["auroc"]["value"] == pytest.approx(roc_auc_score(labels, table.probability))
    decided = (table.predicted_label == "tumoral").astype(int)
    assert scores["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(labels, decided))
    assert scores["brier"]["value"] == pytest.approx(np.mean((table.probability - labels) ** 2))
    for name in ("balanced_accuracy", "auroc", "sensitivity", "specificity", "brier"):
        assert scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"]
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000


def test_a_model_folder_alone_can_be_evaluated(trained_run, cohort_folder, tmp_path):
    options = EvaluateOptions(run=str(trained_run / "lymph-mil"), output=str(tmp_path))
    report = recipes.evaluate(data(cohort_folder), options, CPU)
    assert report["n"] == 14
    assert "not known" in report["patients"]


def test_predictions_do_not_look_at_labels(trained_run, cohort_folder, tmp_path):
    bare = shutil.copytree(cohort_folder, tmp_path / "bare")
    table = pd.read_csv(bare / "clinical.csv")
    table.drop(columns="label").to_csv(bare / "clinical.csv", index=False)
    tables = []
    for folder in (bare, cohort_folder):
        output = tmp_path / f"{folder.name}.csv"
        recipes.predict(data(folder), PredictOptions(run=str(trained_run), output=str(output)), CPU)
        tables.append(pd.read_csv(output))
    assert list(tables[0].columns) == ["patient_id", "probability", "predicted_label", "decision", "cells"]
    pd.testing.assert_frame_equal(*tables)


def test_a_submission_has_the_challenges_columns_and_patients(trained_run, challenge, tmp_path):
    output = tmp_path / "submission.csv"
    options = PredictOptions(run=str(trained_run), output=str(output), submission=True)
    recipes.predict(data(challenge), options, CPU)
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert output.read_text().splitlines()[0] == "Id,Predicted"
    withheld = json.loads((challenge / "generator.json").read_text())["test_labels"]
    assert {row["Id"] for row in rows} == set(withheld)
    assert {row["Predicted"] for row in rows} <= {"0", "1"}


def test_a_part_needs_the_challenge_layout(trained_run, cohort_folder, tmp_path):
    options = PredictOptions(run=str(trained_run), output=str(tmp_path / "p.csv"), part="test")
    with pytest.raises(RecipeError, match="layout"):
        recipes.predict(data(cohort_folder), options, CPU)


def test_one_bad_image_never_ends_a_run(cohort_folder, tiny_options, tmp_path):
    bad = shutil.copytree(cohort_folder, tmp_path / "bad")
    folder = next(path for path in sorted((bad / "images").iterdir()) if len(list(path.iterdir())) >= 4)
    good = sorted(folder.iterdir())
    good[0].write_bytes(good[0].read_bytes()[:200])
    good[1].write_bytes(b"")
    (folder / "note.png").write_text("not an image")
    (folder / "deep.png").write_bytes(encoded(Image.new("I;16", (48, 48), 40000)))
    (folder / "tiny.png").write_bytes(image_bytes(side=1))
    (folder / "grey.png").write_bytes(image_bytes(1, mode="L", side=48))
    recipes.train(*tiny_options(tmp_path / "run", data=bad, epochs=1))
    excluded = json.loads((tmp_path / "run/cohort.json").read_text())["exclusions"]
    names = {entry["file"] for entry in excluded}
    assert names == {good[0].name, good[1].name, "note.png", "deep.png", "tiny.png"}
    assert all(entry["patient_id"] == folder.name and entry["reason"] for entry in excluded)
    groups = tiny_options(tmp_path / "strict", data=bad, strict=True)
    with pytest.raises(CohortError, match=folder.name):
        recipes.train(*groups)


def test_one_class_cannot_be_trained_on(cohort_folder, tiny_options, tmp_path):
    one = shutil.copytree(cohort_folder, tmp_path / "one")
    table = pd.read_csv(one / "clinical.csv")
    table.label = "tumoral"
    table.to_csv(one / "clinical.csv", index=False)
    with pytest.raises(SplitError, match="tumoral"):
        recipes.train(*tiny_options(tmp_path / "run", data=one))


def test_an_occupied_folder_is_never_written_into(trained_run, tiny_options, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained_run.rglob("*") if path.name != ".lock"}
    with pytest.raises(RunError, match="--resume"):
        recipes.train(*tiny_options(trained_run))
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not empty"):
        recipes.train(*tiny_options(tmp_path, resume=True))
    assert before == {path: path.stat().st_mtime_ns for path in trained_run.rglob("*") if path.name != ".lock"}


def test_a_run_that_failed_before_training_can_be_called_again(cohort_folder, tiny_options, tmp_path):
    """Nobody has to clear a folder because an option was misspelt."""
    with pytest.raises(ValueError, match="pooling"):
        recipes.train(*tiny_options(tmp_path / "run", pooling="gated"))
    recipes.train(*tiny_options(tmp_path / "run", epochs=1))
    assert json.loads((tmp_path / "run/settings.json").read_text())["pooling"] == "gated_attention"


def test_a_run_keeps_its_settings_and_its_data(trained_run, tiny_options, cohort_folder, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    settings = json.loads((run / "settings.json").read_text())
    settings["output"] = str(run)
    (run / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(RunError, match="epochs: 2 -> 5"):
        recipes.train(*tiny_options(run, tracker="tensorboard", resume=True, epochs=5))
    with pytest.raises(RunError, match="has changed"):
        changed = shutil.copytree(cohort_folder, tmp_path / "changed")
        next((changed / "images").rglob("*.jpg")).unlink()
        settings["data"] = str(changed)
        (run / "settings.json").write_text(json.dumps(settings))
        recipes.train(*tiny_options(run, data=changed, resume=True))


def test_two_processes_cannot_write_one_run(tmp_path):
    run = Run(tmp_path / "run")
    lock = run.claim({"a": 1}, resume=False)
    with pytest.raises(RunError, match="another process"):
        Run(tmp_path / "run").claim({"a": 1}, resume=True)
    lock.release()
    Run(tmp_path / "run").claim({"a": 1}, resume=True).release()


def test_an_unfinished_run_says_how_to_finish_it(tmp_path):
    Run(tmp_path / "run").claim({"a": 1}, resume=False).release()
    with pytest.raises(RunError, match="--resume"):
        recipes.load_model(tmp_path / "run")
    with pytest.raises(RunError, match="nowhere"):
        recipes.load_model(tmp_path / "nowhere")


def test_labels_the_model_does_not_know_are_refused(trained_run, cohort_folder, tmp_path):
    other = shutil.copytree(cohort_folder, tmp_path / "other")
    table = pd.read_csv(other / "clinical.csv")
    table.label = table.label.map({"reactive": "APL", "tumoral": "AML"})
    table.to_csv(other / "clinical.csv", index=False)
    for image in (other / "images").rglob("*.jpg"):  # other pictures, so that no patient is known
        Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image)
    with pytest.raises(RecipeError, match="APL"):
        recipes.evaluate(data(other), EvaluateOptions(run=str(trained_run), output=str(tmp_path)), CPU)


def test_the_positive_label_can_be_chosen(cohort_folder, tiny_options, tmp_path):
    recipes.train(*tiny_options(tmp_path / "run", epochs=1, positive_label="reactive"))
    config = AutoConfig.from_pretrained(tmp_path / "run/lymph-mil")
    assert config.id2label == {0: "tumoral", 1: "reactive"}
    with pytest.raises(RecipeError, match="positive_label"):
        recipes.train(*tiny_options(tmp_path / "other", positive_label="benign"))


def test_three_labels_train_and_are_scored(cohort_folder, tiny_options, tmp_path):
    three = shutil.copytree(cohort_folder, tmp_path / "three")
    table = pd.read_csv(three / "clinical.csv")
    table["label"] = [["a", "b", "c"][i % 3] for i in range(len(table))]
    table.to_csv(three / "clinical.csv", index=False)
    recipes.train(*tiny_options(tmp_path / "run", data=three, epochs=1))
    report = json.loads((tmp_path / "run/validation.json").read_text())
    assert report["threshold"] is None
    assert set(report["n_per_label"]) == {"a", "b", "c"}
    columns = pd.read_csv(tmp_path / "run/validation.csv").columns
    assert {"probability_a", "probability_b", "probability_c"} <= set(columns)


def test_without_fusion_no_clinical_value_is_used(cohort_folder, tiny_options, tmp_path):
    recipes.train(*tiny_options(tmp_path / "run", epochs=1, fusion="none"))
    assert AutoConfig.from_pretrained(tmp_path / "run/lymph-mil").clinical_features == []


def test_frozen_encoders_do_not_change(cohort_folder, tiny_options, tmp_path):
    weights = []
    for epochs in (1, 2):
        recipes.train(*tiny_options(tmp_path / str(epochs), epochs=epochs, freeze_encoder=True, learning_rate=0.01))
        weights.append(AutoModel.from_pretrained(tmp_path / str(epochs) / "lymph-mil").state_dict())
    for name, tensor in weights[0].items():
        if ".encoder." in name:
            assert torch.equal(tensor, weights[1][name]), name


def test_encoder_weights_are_loaded_into_the_encoder(trained_run, tiny_options, tmp_path):
    """The predecessor assigned its pretrained weights to a wrapper, where nothing used them."""
    source = AutoModel.from_pretrained(trained_run / "lymph-mil")
    groups = tiny_options(
        tmp_path / "run", epochs=1, freeze_encoder=True, encoder_weights=str(trained_run / "lymph-mil")
    )
    recipes.train(*groups)
    target = AutoModel.from_pretrained(tmp_path / "run/lymph-mil")
    for name, tensor in source.model.encoder.state_dict().items():
        assert torch.equal(tensor, target.model.encoder.state_dict()[name]), name


@pytest.mark.parametrize("adapter", ["lora", "dora", "vpt_deep", "bottleneck"])
def test_an_adapter_trains_in_a_frozen_encoder_and_reloads(adapter, cohort_folder, tiny_options, tmp_path, caplog):
    caplog.set_level("INFO", logger="lymph_hf")
    run = tmp_path / "run"
    recipes.train(*tiny_options(run, epochs=2, adapter=adapter, learning_rate=0.01))
    assert "trained" in caplog.text.lower() or "trainable" in caplog.text.lower()
    options = EvaluateOptions(run=str(run), output=str(tmp_path), subset="validation")
    recipes.evaluate(data(cohort_folder), options, CPU)
    stored, again = pd.read_csv(run / "validation.csv"), pd.read_csv(tmp_path / "predictions.csv")
    np.testing.assert_allclose(
        stored.probability, again.set_index("patient_id").loc[stored.patient_id].probability, atol=1e-6
    )


def test_an_adapter_and_a_frozen_encoder_exclude_each_other(tiny_options, tmp_path):
    with pytest.raises(RecipeError, match="--adapter"):
        recipes.train(*tiny_options(tmp_path / "run", adapter="lora", freeze_encoder=True))


@pytest.mark.parametrize("name", ["encoder_options", "pooling_options", "fusion_options"])
def test_options_in_json_are_checked(name, tiny_options, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        recipes.train(*tiny_options(tmp_path / "run", **{name: "{hidden: 3"}))


def test_a_split_file_is_followed(cohort_folder, tiny_options, tmp_path):
    labels = {patient.patient_id: patient.label for patient in read_cohort(cohort_folder).patients}
    validation = [next(i for i, label in labels.items() if label == name) for name in ("reactive", "tumoral")]
    train = [patient_id for patient_id in labels if patient_id not in validation]
    (tmp_path / "split.py").write_text(f"train_index = {train}\n    val_index = {validation}\n")
    recipes.train(*tiny_options(tmp_path / "run", epochs=1, split=str(tmp_path / "split.py")))
    split = Split.load(tmp_path / "run/split.json")
    assert set(split.train) == set(train)
    assert set(split.validation) == set(validation)
