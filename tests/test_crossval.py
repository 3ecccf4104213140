"""Cross-validation: no fold knows its patients, an interruption costs nothing, the folds' models become one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from figure_cases import remember_saved, texts
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from transformers import AutoImageProcessor, AutoModel

from lymph_hf import (
    LymphMILConfig,
    LymphMILEnsembleForBagClassification,
    LymphMILForBagClassification,
    attach_adapter,
    crossval_folds,
    crossval_search,
    recipes,
)
from lymph_hf.adapters import save_adapted
from lymph_hf.cohort import CLINICAL, read_cohort, scan_images
from lymph_hf.crossval import crossval
from lymph_hf.crossval_ensemble import load_member
from lymph_hf.crossval_folds import CrossvalError, FoldPlan, draw_folds, run_fold
from lymph_hf.crossval_report import write_report
from lymph_hf.crossval_scores import OutOfFold, out_of_fold
from lymph_hf.crossval_search import SearchError, SearchSpace, chosen_settings, search_settings
from lymph_hf.evaluation import EvaluationError
from lymph_hf.files import write_json
from lymph_hf.metrics import Bootstrap, choose_threshold
from lymph_hf.modeling_ensemble import EnsembleError
from lymph_hf.options import CohortOptions, EvaluateOptions, InferenceOptions, PredictOptions
from lymph_hf.options_crossval import CrossvalOptions
from lymph_hf.reporting_crossval import RowScores, crossval_figure
from lymph_hf.runs import Run, RunError, model_source

CPU = InferenceOptions(cpu=True)
OPTIONS = CrossvalOptions(folds=2, validation_fraction=0.3, resamples=100)


@pytest.fixture(scope="module", autouse=True)
def no_figures_of_folds():
    """Drawing them takes most of the time, and they are tested where they are made."""
    save = Figure.savefig

    def save_own(figure, path, **options):
        save(figure, path, **options) if path.name.endswith("crossval.png") else Image.new("L", (1, 1)).save(
            path, "png"
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_own)
        yield


@pytest.fixture(scope="module")
def arguments(crossval_arguments):
    return crossval_arguments(OPTIONS)


@pytest.fixture(scope="module")
def cohort(cohort_folder):
    return scan_images(read_cohort(cohort_folder), progress=False)


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A finished cross-validation."""
    return crossval(*arguments(tmp_path_factory.mktemp("runs") / "folds"))


def fold_folders(output):
    return [output / "repeat-1" / f"fold-{number}" for number in (1, 2)]


# Folds ------------------------------------------------------------------------------------------------------


def test_folds_divide_the_patients_and_never_share_one(cohort, tmp_path):
    folds = draw_folds(cohort, replace(OPTIONS, folds=3, repeats=2), tmp_path, seed=5)
    everybody = sorted(patient.patient_id for patient in cohort.labelled)
    labels = {patient.patient_id: patient.label for patient in cohort.patients}
    divided = []
    for repeat in (1, 2):
        splits = [fold.split for fold in folds if fold.repeat == repeat]
        assert sorted(patient for split in splits for patient in split.test) == everybody
        for split in splits:
            assert sorted((*split.train, *split.validation, *split.test)) == everybody
            for part in (split.train, split.validation, split.test):
                assert {labels[patient] for patient in part} == {"reactive", "tumoral"}
        divided.append({frozenset(split.test) for split in splits})
    assert divided[0] != divided[1]
    assert len({fold.seed for fold in folds}) == len({fold.folder for fold in folds}) == 6
    assert draw_folds(cohort, replace(OPTIONS, folds=3, repeats=2), tmp_path, seed=5) == folds
    with pytest.raises(CrossvalError, match="--repeats 0"):
        draw_folds(cohort, replace(OPTIONS, repeats=0), tmp_path, seed=5)


def test_no_fold_has_seen_an_image_of_its_patients(finished, cohort):
    tested = []
    for folder in fold_folders(finished):
        digests = json.loads((folder / "cohort.json").read_text())["digests"]
        patients = pd.read_csv(folder / "predictions.csv", dtype=str).patient_id
        images = {digest for patient in patients for digest in cohort.digests[patient]}
        assert images == set(digests["test"])
        assert images.isdisjoint(digests["train"])
        assert images.isdisjoint(digests["validation"])
        tested += list(patients)
    assert sorted(tested) == sorted(cohort.digests)


def test_the_statistics_of_a_fold_are_those_of_its_training_patients(finished, cohort):
    for folder in fold_folders(finished):
        train = json.loads((folder / "split.json").read_text())["train"]
        ages = [patient.age for patient in cohort.select(train).patients if patient.age is not None]
        standardizer = AutoImageProcessor.from_pretrained(folder / "lymph-mil").standardizer
        assert standardizer.mean[standardizer.features.index("age")] == pytest.approx(np.mean(ages))


# Scores -----------------------------------------------------------------------------------------------------


def test_every_patient_is_predicted_once_and_scored_as_written(finished, cohort):
    table = pd.read_csv(finished / "out-of-fold.csv", dtype={"patient_id": str})
    assert list(table.columns[:4]) == ["repeat", "fold", "patient_id", "label"]
    assert sorted(table.patient_id) == sorted(patient.patient_id for patient in cohort.labelled)
    told = {patient.patient_id: (patient.label, len(patient.images)) for patient in cohort.patients}
    assert all(told[row.patient_id] == (row.label, row.cells) for row in table.itertuples())
    for folder, (_, rows) in zip(fold_folders(finished), table.groupby("fold"), strict=True):
        threshold = json.loads((folder / "lymph-mil" / "config.json").read_text())["decision_threshold"]
        assert ((rows.predicted_label == "tumoral") == (rows.probability >= threshold)).all()
    report = json.loads((finished / "metrics.json").read_text())
    labels, decided = ((table[column] == "tumoral").astype(int) for column in ("label", "predicted_label"))
    scores = {name: stored["value"] for name, stored in report["scores"].items()}
    assert report["n"] == len(table) == 14
    assert scores["auroc"] == pytest.approx(roc_auc_score(labels, table.probability))
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, decided))
    areas = [roc_auc_score(labels[rows.index], rows.probability) for _, rows in table.groupby("fold")]
    assert scores["auroc_within_folds"] == pytest.approx(np.mean(areas))
    assert report["folds_spread"]["auroc"]["mean"] == pytest.approx(np.mean(areas))
    assert [fold["scores"]["auroc"]["value"] for fold in report["folds"]] == pytest.approx(areas)
    assert (finished / "crossval.png").stat().st_size > 10_000


def test_the_clinical_model_and_the_blend_stand_beside(finished):
    report = json.loads((finished / "metrics.json").read_text())
    network = pd.read_csv(finished / "out-of-fold.csv").set_index("patient_id")
    clinical = pd.read_csv(finished / "out-of-fold-clinical.csv").set_index("patient_id").loc[network.index]
    blend = pd.read_csv(finished / "out-of-fold-blend.csv").set_index("patient_id").loc[network.index]
    for number, folder in enumerate(fold_folders(finished), start=1):
        weight = json.loads((folder / "blend.json").read_text())["clinical_weight"]
        rows = network.fold == number
        expected = (1 - weight) * network.probability[rows] + weight * clinical.probability[rows]
        np.testing.assert_allclose(blend.probability[rows], expected)
    labels = (network.label == "tumoral").astype(int)
    beside = report["baselines"]["clinical alone"]
    assert beside["scores"]["auroc"]["value"] == pytest.approx(roc_auc_score(labels, clinical.probability))
    lead = report["scores"]["auroc"]["value"] - beside["scores"]["auroc"]["value"]
    assert beside["delong"]["difference"]["value"] == pytest.approx(lead)
    assert beside["network_lead"]["auroc"]["difference"]["value"] == pytest.approx(lead)


def test_repeats_are_averaged_for_each_patient():
    table = pd.DataFrame(
        {
            "repeat": [1, 1, 1, 1, 2, 2, 2, 2],
            "fold": [1, 1, 2, 2, 1, 1, 2, 2],
            "patient_id": ["b", "a", "d", "c", "a", "c", "b", "d"],
            "label": ["sick", "well", "sick", "well", "well", "well", "sick", "sick"],
            "probability": [0.6, 0.2, 0.1, 0.3, 0.4, 0.5, 0.8, 0.7],
        }
    )
    thresholds = np.array([0.5, 0.5, 0.3, 0.3, 0.4, 0.4, 0.9, 0.9])
    pooled = OutOfFold(table, thresholds, ("well", "sick")).predictions()
    assert list(pooled.patient_ids) == ["a", "b", "c", "d"]
    np.testing.assert_allclose(pooled.probabilities[:, 1], [0.3, 0.7, 0.4, 0.4])
    np.testing.assert_allclose(pooled.thresholds, [0.45, 0.7, 0.35, 0.6])
    assert list(pooled.labels) == [0, 1, 0, 1]
    assert list(pooled.decided) == [0, 1, 1, 0]


def test_within_folds_no_two_folds_are_compared():
    """Each fold ranks its patients without error, but one is surer than the other."""
    table = pd.DataFrame({"repeat": 1, "fold": [1, 1, 2, 2], "patient_id": list("abcd")})
    table = table.assign(label=["well", "sick"] * 2, probability=[0.1, 0.2, 0.8, 0.9])
    model = OutOfFold(table, np.full(4, 0.5), ("well", "sick"))
    intervals = model.intervals(Bootstrap(50))
    assert intervals["auroc"].value == 0.75
    assert intervals["auroc_within_folds"].value == 1.0
    drawn = model.auroc_within_folds(np.array([[1, 1, 0, 2], [1, 0, 0, 1]]))
    np.testing.assert_array_equal(drawn, [1.0, np.nan])


# Interruption -----------------------------------------------------------------------------------------------


def test_an_interrupted_cross_validation_goes_on(finished, arguments, tmp_path, monkeypatch):
    """Broken off between the training of the second fold and its scores."""
    output, trained = tmp_path / "folds", []

    def interrupted(cohort_options, options, *rest, **named):
        if options.run.endswith("fold-2"):
            raise KeyboardInterrupt
        return recipes.evaluate(cohort_options, options, *rest, **named)

    monkeypatch.setattr(crossval_folds, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        crossval(*arguments(output))
    assert not (output / "metrics.json").exists()
    with pytest.raises(RunError, match="lymph crossval --resume"):
        model_source(output)
    with pytest.raises(RunError, match="--resume"):
        crossval(*arguments(output))
    monkeypatch.setattr(crossval_folds, "evaluate", recipes.evaluate)

    def counted(*groups, **named):
        trained.append(groups[-1].output)
        return recipes.train(*groups, **named)

    monkeypatch.setattr(crossval_folds, "train", counted)
    crossval(*arguments(output, resume=True))
    assert trained == [str(output / "repeat-1" / "fold-2")], "the finished fold is left alone"
    assert (output / "out-of-fold.csv").read_bytes() == (finished / "out-of-fold.csv").read_bytes()
    weights = [(folder / "lymph-mil" / "model.safetensors").read_bytes() for folder in (output, finished)]
    assert weights[0] == weights[1]
    with pytest.raises(RunError, match="other settings"):
        crossval(*arguments(output, resume=True, learning_rate=0.5))


def test_a_failed_fold_is_named(arguments, tmp_path, monkeypatch):
    def failing(*groups, **named):
        raise ValueError("no such pooling")

    monkeypatch.setattr(crossval_folds, "train", failing)
    with pytest.raises(CrossvalError, match=r"repeat 1, fold 1: ValueError: no such pooling.*--resume"):
        crossval(*arguments(tmp_path / "folds"))


@pytest.mark.slow
def test_processes_give_what_one_process_gives(finished, arguments, tmp_path):
    output = crossval(*arguments(tmp_path / "folds", replace(OPTIONS, jobs=2)))
    assert (output / "out-of-fold.csv").read_bytes() == (finished / "out-of-fold.csv").read_bytes()
    assert "epoch 1/1" in (output / "logs" / "repeat-1-fold-2.log").read_text()


@pytest.mark.slow
def test_a_process_that_fails_is_named(arguments, tmp_path):
    with pytest.raises(CrossvalError, match=r"repeat 1, fold \d: ValueError: .*no_such_encoder.*fold-\d\.log"):
        crossval(*arguments(tmp_path / "folds", replace(OPTIONS, jobs=2), encoder="no_such_encoder"))


# The model of all folds -------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_saved_model_is_the_mean_of_the_folds(finished, cohort):
    """Each member through its own processor; three clinical values in ten are missing."""
    ensemble, processor = recipes.load_model(finished)
    assert isinstance(ensemble, LymphMILEnsembleForBagClassification)
    assert ensemble.config.id2label == {0: "reactive", 1: "tumoral"}
    ensemble.config.calibration = None
    members = [recipes.load_model(folder) for folder in fold_folders(finished)]
    for patient in cohort.patients[:6]:
        images = [Image.open(path) for path in patient.images]
        clinical = {name: getattr(patient, name) for name in CLINICAL}
        alone = [member(**own(images, clinical)).logits.softmax(-1) for member, own in members]
        together = ensemble(**processor(images, clinical)).logits.softmax(-1)
        torch.testing.assert_close(together, sum(alone) / 2, atol=1e-5, rtol=0)
    assert any(None in (patient.age, patient.sex, patient.lymphocyte_count) for patient in cohort.patients[:6])


def test_its_decisions_were_fitted_out_of_fold(finished):
    config = AutoModel.from_pretrained(finished / "lymph-mil").config
    table = pd.read_csv(finished / "out-of-fold.csv")
    labels = (table.label == "tumoral").astype(int)
    odds = np.log(table.probability) - np.log1p(-table.probability)
    calibrated = 1 / (1 + np.exp(-(config.calibration["slope"] * odds + config.calibration["intercept"])))
    assert config.decision_threshold == pytest.approx(choose_threshold(labels, calibrated))
    assert config.conformal["calibrated_on"] == [int((labels == 0).sum()), int(labels.sum())]


def test_it_predicts_and_never_scores_the_patients_it_was_trained_on(finished, cohort_folder, tmp_path):
    data = CohortOptions(data=str(cohort_folder))
    output = tmp_path / "predictions.csv"
    recipes.predict(data, PredictOptions(run=str(finished), output=str(output)), CPU)
    assert len(pd.read_csv(output)) == 14
    with pytest.raises(EvaluationError, match="no labelled patient"):
        recipes.evaluate(data, EvaluateOptions(run=str(finished)), CPU)


def test_an_evaluation_leaves_the_out_of_fold_scores_alone(finished, cohort_folder, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "metrics.json").read_bytes()
    options = EvaluateOptions(run=str(run), subset="all", resamples=50)
    report = recipes.evaluate(CohortOptions(data=str(cohort_folder)), options, CPU)
    assert report["n"] == 14
    assert (run / "metrics.json").read_bytes() == before
    assert (run / "evaluation" / "metrics.json").exists()


# Search -----------------------------------------------------------------------------------------------------


@pytest.fixture
def space(tmp_path) -> SearchSpace:
    path = tmp_path / "search.yaml"
    path.write_text(
        "learning-rate: {low: 1e-4, high: 1e-2, log: true}\npooling: [mean, max]\nepochs: {low: 1, high: 2}"
    )
    return SearchSpace.read(path)


def fake_training(seen: list, fail=lambda number: False):
    """Training that notes who was handed over, and scores settings by their learning rate."""

    def train(cohort_options, split_options, model, training, *, cohort):
        seen.append((training.learning_rate, model.pooling, training.epochs, cohort, split_options.split))
        if fail(len(seen)):
            raise KeyboardInterrupt
        scores = {"auroc": {"value": 0.5 + training.learning_rate}, "brier": {"value": 0.2}}
        write_json(f"{training.output}/validation.json", {"scores": scores})

    return train


def test_the_search_never_sees_the_fold(space, cohort, arguments, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(crossval_search, "train", fake_training(seen))
    finals = []
    monkeypatch.setattr(crossval_folds, "train", lambda *groups, **named: finals.append(groups))
    monkeypatch.setattr(crossval_folds, "evaluate", lambda *groups, **named: None)
    groups = arguments(tmp_path / "run", replace(OPTIONS, trials=3))
    fold = draw_folds(cohort, groups[1], tmp_path / "run", seed=0)[0]
    run_fold(fold, FoldPlan(*groups, space), cohort)
    assert len(seen) == 3
    for *_, patients, split in seen:
        inner = json.loads(Path(split).read_text())
        assert {p.patient_id for p in patients.patients} == {*fold.split.train, *fold.split.validation}
        assert {*inner["train"], *inner["validation"]} == {*fold.split.train, *fold.split.validation}
        assert inner["test"] == []
    best = max(seen, key=lambda trial: trial[0])
    _, split_options, model, training = finals[0]
    assert (training.learning_rate, model.pooling, training.epochs) == best[:3]
    assert (training.output, training.seed) == (str(fold.folder), fold.seed)
    assert split_options.split == str(fold.split_file)
    chosen = chosen_settings(fold.search_folder)
    assert chosen["settings"] == {"learning_rate": best[0], "pooling": best[1], "epochs": best[2]}
    assert sorted(path.name for path in fold.search_folder.iterdir()) == ["split.json", "trials.json"]


def test_an_interrupted_search_tries_what_it_would_have_tried(space, cohort, arguments, tmp_path, monkeypatch):
    groups = arguments(tmp_path / "run", replace(OPTIONS, trials=4))

    def search(folder, seen, **faults):
        monkeypatch.setattr(crossval_search, "train", fake_training(seen, **faults))
        return search_settings(space, cohort, groups, tmp_path / folder)

    whole, broken = [], []
    expected = search("whole", whole)
    with pytest.raises(KeyboardInterrupt):
        search("broken", broken, fail=lambda number: number == 3)
    assert search("broken", broken) == expected
    tried = [trial[:3] for trial in broken]
    assert tried[2] == tried[3], "the interrupted trial is taken up again"
    assert [*tried[:2], *tried[3:]] == [trial[:3] for trial in whole]
    assert len(set(tried)) == 4


def test_settings_that_fail_count_as_tried(space, cohort, arguments, tmp_path, monkeypatch):
    def failing(*groups, **named):
        raise ValueError("cannot be built")

    monkeypatch.setattr(crossval_search, "train", failing)
    groups = arguments(tmp_path / "run", replace(OPTIONS, trials=2))
    with pytest.raises(SearchError, match="all 2 trials failed, the last with ValueError: cannot be built"):
        search_settings(space, cohort, groups, tmp_path / "search")


def test_a_real_search_sets_the_options_of_the_fold(cohort, arguments, tmp_path):
    path = tmp_path / "search.yaml"
    path.write_text("pooling: [max]\nmax_cells: {low: 2, high: 3}")
    groups = arguments(tmp_path / "run", replace(OPTIONS, trials=1))
    fold = draw_folds(cohort, groups[1], tmp_path / "run", seed=0)[0]
    run_fold(fold, FoldPlan(*groups, SearchSpace.read(path)), cohort)
    settings = json.loads((fold.folder / "settings.json").read_text())
    assert settings["pooling"] == "max"
    assert settings["max_cells"] in (2, 3)
    assert fold.finished
    assert not (fold.folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poling: [mean]", "Did you mean pooling"),
        ("seed: [1, 2]", "no option of model or training that can be searched"),
        ("output: [a]", "can be searched"),
        ("pooling: mean", "expected a list"),
        ("pooling: [3]", "3: expected str"),
        ("balance: [weights, sampling, sometimes]", "'sometimes': expected 'weights'"),
        ("epochs: {low: 1.5, high: 3}", "whole numbers"),
        ("dropout: {low: 0.5, high: 0.1}", "low below high"),
        ("learning_rate: {low: 0, high: 0.1, log: true}", "above 0"),
        ("dropout: {low: 0, hihg: 1}", "expected low, high"),
        ("dropout: {low: small, high: 1}", "no number"),
        ("- pooling", "expected a table"),
        ("a: [", "search"),
    ],
)
def test_mistakes_in_a_search_file_are_refused(tmp_path, text, message):
    path = tmp_path / "search.yaml"
    path.write_text(text)
    with pytest.raises(SearchError, match=message):
        SearchSpace.read(path)


def test_a_search_file_may_hold_whatever_an_option_takes(tmp_path):
    path = tmp_path / "search.yaml"
    path.write_text("pooling_options: [null, {hidden_size: 8}]\naugment: [true, false]\nmax_cells: [null, 16]")
    options = SearchSpace.read(path).options
    assert options["pooling_options"].values == (None, '{"hidden_size": 8}')
    assert options["augment"].values == (True, False)
    assert options["max_cells"].values == (None, 16)


# Adapters and more labels -----------------------------------------------------------------------------------


def adapted_member(adapter: str, folder):
    """A saved model with an adapter that changes something."""
    torch.manual_seed(0)
    config = LymphMILConfig(encoder="test_vit", image_size=32, fusion="none", clinical_features=[])
    model = attach_adapter(LymphMILForBagClassification(config), adapter).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "classifier" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_adapted(model, folder)
    return model


@torch.no_grad()
def test_an_adapter_is_merged_into_its_member(tmp_path):
    model = adapted_member("lora", tmp_path)
    bag = torch.randn(1, 4, 3, 32, 32)
    member = load_member(tmp_path)
    assert type(member) is LymphMILForBagClassification
    assert not [name for name in member.state_dict() if "lora" in name]
    torch.testing.assert_close(member(bag).logits, model(bag).logits, atol=1e-5, rtol=0)
    assert not torch.allclose(member(bag).logits, model.unload()(bag).logits, atol=1e-3), "the adapter did something"


def test_an_adapter_that_cannot_be_merged_is_refused_with_the_reason(tmp_path):
    adapted_member("bottleneck", tmp_path)
    with pytest.raises(EnsembleError, match="activation in the middle"):
        load_member(tmp_path)


def test_three_labels_are_scored_and_drawn(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    names, columns = ("a", "b", "c"), ["probability_a", "probability_b", "probability_c"]
    table = pd.DataFrame({"repeat": 1, "fold": [1, 2] * 15, "patient_id": [f"P{i:02}" for i in range(30)]})
    table = table.assign(label=list(names) * 10, **dict(zip(columns, generator.dirichlet([1] * 3, 30).T, strict=True)))
    model = OutOfFold(table, np.full(30, 0.5), names)
    pooled, intervals = model.predictions(), model.intervals(Bootstrap(50))
    labels = np.array([names.index(label) for label in table.label])
    expected = roc_auc_score(labels, table[columns], multi_class="ovr")
    assert intervals["auroc"].value == pytest.approx(expected)
    decided = table[columns].to_numpy().argmax(1)
    assert intervals["balanced_accuracy"].value == pytest.approx(balanced_accuracy_score(labels, decided))
    scores = RowScores(intervals["auroc"], intervals["auroc_within_folds"])
    path = tmp_path / "crossval.png"
    folds = {"fold 1": intervals["auroc"]}
    shown = remember_saved(monkeypatch)
    crossval_figure(pooled.labels, pooled.probabilities, scores, folds, path, label_names=names)
    assert path.stat().st_size > 10_000
    assert "n = 30 patients (10 a + 10 b + 10 c)" in texts(shown[0])


def test_the_figure_counts_the_patients_of_each_fold(arguments, finished, cohort, tmp_path, monkeypatch):
    groups = arguments(finished)
    folds = draw_folds(cohort, OPTIONS, finished, seed=groups[3].seed)
    shown = remember_saved(monkeypatch)
    write_report(Run(tmp_path), cohort, folds, out_of_fold(folds, ("reactive", "tumoral")), FoldPlan(*groups))
    labels = {patient.patient_id: patient.label for patient in cohort.patients}
    for fold in folds:
        counts = [[labels[patient] for patient in fold.split.test].count(name) for name in ("reactive", "tumoral")]
        assert f"{fold}: {counts[0]} + {counts[1]}" in texts(shown[0])
