"""What stands beside the network of a cross-validation: baselines, teacher, learning curve, page; none of it leaks."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score

from lymph_hf import crossval_curve, crossval_folds, evidence
from lymph_hf.bags import BagDataset, build_bags
from lymph_hf.cli import parse
from lymph_hf.cohort import Cohort, Patient, read_cohort, scan_images
from lymph_hf.crossval import crossval
from lymph_hf.crossval_baselines import BASELINES, Case, read_baselines, row_slug, write_baselines
from lymph_hf.crossval_folds import CrossvalError, FoldPlan, check_teacher, draw_folds, run_fold
from lymph_hf.evidence import mean_attentions
from lymph_hf.image_vote import feature_vote
from lymph_hf.images import open_cell_image
from lymph_hf.inference import infer
from lymph_hf.metrics import Bootstrap, Interval, choose_threshold
from lymph_hf.metrics_comparison import paired_bootstrap
from lymph_hf.options import InferenceOptions
from lymph_hf.options_crossval import BASELINES as NAMES
from lymph_hf.options_crossval import CrossvalOptions
from lymph_hf.options_distill import FoldTeacherOptions
from lymph_hf.options_report import ReportOptions
from lymph_hf.patient_models import load_model
from lymph_hf.report_page import report
from lymph_hf.reporting_crossval import RowScores, rows_figure
from lymph_hf.runs import RunError
from lymph_hf.splits import Split
from lymph_hf.training import make_accelerator

CPU = InferenceOptions(cpu=True)
OPTIONS = CrossvalOptions(folds=2, validation_fraction=0.3, resamples=60, ensemble=False)
CELLS = {}  # figure -> pictures and captions
ROWS = ["clinical alone", "blend", "bag size", "image vote, majority", "image vote, mean"]


@pytest.fixture(scope="module", autouse=True)
def blank_figures():
    """Drawing takes most of the time, and figures are tested where they are made."""

    def remembered(images, captions, path, **options):
        CELLS[path] = [(image, caption) for image, caption in zip(images, captions, strict=True) if image is not None]
        Image.new("L", (1, 1)).save(path, "png")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, path, **options: Image.new("L", (1, 1)).save(path, "png"))
        patch.setattr(evidence, "gallery", remembered)
        yield


@pytest.fixture(scope="module")
def arguments(crossval_arguments):
    return crossval_arguments(OPTIONS)


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A finished cross-validation with the baseline that every one has."""
    return crossval(*arguments(tmp_path_factory.mktemp("runs") / "folds"))


@pytest.fixture(scope="module")
def voted(finished, arguments, tmp_path_factory):
    """A copy that has got the image vote as well, afterwards; nothing is trained for it."""
    output = shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "folds")
    settings = json.loads((output / "settings.json").read_text()) | {"output": str(output)}
    (output / "settings.json").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossval_folds, "train", lambda *groups, **named: pytest.fail("trained again"))
        options = replace(OPTIONS, baselines=["bag_size", "image_vote"])
        return crossval(*arguments(output, options, resume=True))


@pytest.fixture(scope="module")
def cohort(cohort_folder):
    return scan_images(read_cohort(cohort_folder), progress=False)


# Baselines --------------------------------------------------------------------------------------------------


def flipped(cohort: Cohort, ids) -> Cohort:
    """The cohort with the other label for some patients."""
    other = dict(zip(cohort.label_names, reversed(cohort.label_names), strict=True))
    patients = [replace(p, label=other[p.label]) if p.patient_id in ids else p for p in cohort.patients]
    return cohort.replace(patients=tuple(patients))


@pytest.fixture
def bags(tmp_path):
    """24 patients of 2 to 9 cells in memory, their features, and a split of them; the label is seen in every cell."""
    generator, patients, features = np.random.default_rng(0), [], {}
    for number in range(24):
        label, size = ("well", "sick")[number % 2], int(generator.integers(2, 10))
        patients.append(Patient(f"P{number:02}", tuple(tmp_path / f"{i}.png" for i in range(size)), label))
        cells = generator.normal(0, 2, (size, 3)) + (number % 2)
        features[f"P{number:02}"] = torch.from_numpy(cells).float()
    ids = [patient.patient_id for patient in patients]
    return features, Cohort(tmp_path, "generic", tuple(patients)), Split(*(tuple(ids[i:][::3]) for i in range(3)))


def test_the_vote_learns_from_training_patients_alone(bags):
    """Neither labels nor features of the others change what it says; validation labels move nothing but a threshold."""
    features, cohort, split = bags
    names = ("well", "sick")
    expected = feature_vote(features, cohort, split, names)
    assert [row.name for row in expected] == ["image vote, majority", "image vote, mean"]
    for row, other in zip(expected, feature_vote(features, flipped(cohort, split.test), split, names), strict=True):
        assert (row.probabilities == other.probabilities).all()
        assert row.threshold == other.threshold
    moved = feature_vote(features, flipped(cohort, split.validation), split, names)
    assert all((row.probabilities == other.probabilities).all() for row, other in zip(expected, moved, strict=True))
    assert [row.threshold for row in moved] != [row.threshold for row in expected]
    garbage = features | {patient_id: 1e3 * features[patient_id] for patient_id in split.test[1:]}
    for row, other in zip(expected, feature_vote(garbage, cohort, split, names), strict=True):
        assert (row.probabilities[0] == other.probabilities[0]).all()
    learnt = feature_vote(features, flipped(cohort, split.train), split, names)
    assert not np.allclose(learnt[1].probabilities, expected[1].probabilities), "it does learn from them"


def test_the_cells_of_a_patient_weigh_as_one_patient(bags):
    """Every cell of a training patient four times is the same patient; the threshold is the validation patients'."""
    features, cohort, split = bags
    first = split.train[0]
    one = feature_vote(features, cohort, split, ("well", "sick"))
    many = feature_vote(features | {first: features[first].repeat(4, 1)}, cohort, split, ("well", "sick"))
    np.testing.assert_allclose(many[1].probabilities, one[1].probabilities, atol=1e-4)
    swapped = Split(split.train, split.test, split.validation)
    validation = feature_vote(features, cohort, swapped, ("well", "sick"))[1].probabilities
    labels = [int(patient.label == "sick") for patient in cohort.select(split.validation).patients]
    assert one[1].threshold == choose_threshold(labels, validation)
    unchosen = feature_vote(features, cohort, replace(split, validation=()), ("well", "sick"))
    assert [row.threshold for row in unchosen] == [0.5, 0.5]


def test_the_bag_size_finds_a_shortcut_and_learns_from_training_patients_alone(bags, tmp_path):
    _, cohort, split = bags
    images = {"well": 4, "sick": 40}
    many = [replace(p, images=p.images[:1] * (images[p.label] + number)) for number, p in enumerate(cohort.patients)]
    case = Case(tmp_path, cohort.replace(patients=tuple(many)), split, ("well", "sick"), CPU)
    (row,) = BASELINES["bag_size"](case)
    labels = [patient.label == "sick" for patient in cohort.select(split.test).patients]
    assert roc_auc_score(labels, row.probabilities[:, 1]) == 1
    (blind,) = BASELINES["bag_size"](replace(case, cohort=flipped(case.cohort, split.test)))
    assert (blind.probabilities == row.probabilities).all() and blind.threshold == row.threshold


def test_baselines_stand_beside_out_of_fold_and_in_pairs(voted, finished, cohort):
    metrics = json.loads((voted / "metrics.json").read_text())
    assert list(metrics["baselines"]) == ROWS
    assert list(json.loads((finished / "metrics.json").read_text())["baselines"]) == ROWS[:3]
    network = pd.read_csv(voted / "out-of-fold.csv").sort_values("patient_id")
    labels = (network.label == "tumoral").astype(int).to_numpy()
    for name in ROWS:
        table = pd.read_csv(voted / f"out-of-fold-{row_slug(name)}.csv").sort_values("patient_id")
        assert list(table.patient_id) == list(network.patient_id)
        assert list(table.fold) == list(network.fold)
        beside = metrics["baselines"][name]
        assert beside["scores"]["auroc"]["value"] == pytest.approx(roc_auc_score(labels, table.probability))
        expected = paired_bootstrap(labels, table.probability, network.probability, bootstrap=Bootstrap(60))["auroc"]
        assert beside["network_lead"]["auroc"]["difference"] == pytest.approx(expected.as_dict()["difference"])
    for fold in (1, 2):
        run = voted / "repeat-1" / f"fold-{fold}"
        thresholds = read_baselines(run)["image_vote"]
        table = pd.read_csv(run / "image-vote-mean-test.csv")
        decided = table.probability >= thresholds["image vote, mean"]
        assert ((table.predicted_label == "tumoral") == decided).all()
    assert (voted / "out-of-fold.csv").read_bytes() == (finished / "out-of-fold.csv").read_bytes()


@torch.no_grad()
def test_the_vote_of_a_fold_sees_the_cells_through_its_own_encoder(voted, cohort):
    """Rebuilt from the images, without a cache."""
    from lymph_hf.recipes import load_model

    run = voted / "repeat-1" / "fold-2"
    model, processor = load_model(run)
    features = {}
    for patient in cohort.patients:
        pixels = processor([Image.open(path) for path in patient.images])["pixel_values"]
        features[patient.patient_id] = model.model.encoder(pixels.flatten(0, -4))
    split = Split.load(run / "split.json")
    row = feature_vote(features, cohort, split, ("reactive", "tumoral"))[1]
    table = pd.read_csv(run / "image-vote-mean-test.csv").set_index("patient_id")
    np.testing.assert_allclose(table.probability[list(split.test)], row.probabilities[:, 1], atol=1e-4)


def test_a_baseline_is_not_fitted_twice(voted, cohort, monkeypatch):
    run = voted / "repeat-1" / "fold-1"
    for name in BASELINES:
        monkeypatch.setitem(BASELINES, name, lambda case: pytest.fail("fitted again"))
    write_baselines(NAMES, Case(run, cohort, Split.load(run / "split.json"), ("reactive", "tumoral"), CPU))


def test_options_name_what_there_is():
    assert tuple(BASELINES) == NAMES
    assert CrossvalOptions().baseline_names == ("bag_size",)
    assert CrossvalOptions(baselines=["none"]).baseline_names == ()
    with pytest.raises(ValueError, match=r"--baselines image-vote: expected some of bag_size, image_vote"):
        CrossvalOptions(baselines=["image-vote"])
    with pytest.raises(ValueError, match=r"--learning-curve 1.5: expected shares above 0"):
        CrossvalOptions(learning_curve=[0.5, 1.5])


def test_the_command_refuses_them_with_its_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("crossval", ["--data", "cohort", "--output", "run", "--baselines", "bag_size", "image-vote"])
    assert "usage: lymph crossval" in (told := capsys.readouterr().err)
    assert told.rstrip().endswith("--baselines image-vote: expected some of bag_size, image_vote, or none.")


# Learning curve ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curve(finished, arguments, tmp_path_factory):
    """A copy with a learning curve whose smaller folds are the whole ones, and the folds that it asked for."""
    output = shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "folds")
    settings = json.loads((output / "settings.json").read_text()) | {"output": str(output)}
    (output / "settings.json").write_text(json.dumps(settings))
    asked = []

    def copied(folds, plan, cohort, logs):
        asked.append((folds, plan))
        for fold in folds:
            shutil.copytree(output / "repeat-1" / fold.folder.name, fold.folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossval_curve, "run_folds", copied)
        crossval(*arguments(output, replace(OPTIONS, learning_curve=[1.0, 0.8, 0.5]), resume=True))
    return output, asked


def test_the_curve_takes_patients_from_training_alone(curve, finished, cohort):
    output, asked = curve
    labels = {patient.patient_id: patient.label for patient in cohort.patients}
    assert [plan.options.baseline_names for _, plan in asked] == [(), ()]
    for number in (1, 2):
        whole = Split.load(output / "repeat-1" / f"fold-{number}-split.json")
        small, larger = (folds[number - 1].split for folds, _ in asked)
        assert set(small.train) < set(larger.train) < set(whole.train), "nested"
        assert len(small.train) == round(0.5 * len(whole.train))
        for split in (small, larger):
            assert (split.validation, split.test) == (whole.validation, whole.test)
            assert {labels[patient] for patient in split.train} == {"reactive", "tumoral"}


def test_the_curve_ends_at_the_cross_validation(curve):
    output, _ = curve
    points = json.loads((output / "learning-curve.json").read_text())
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(points) == ["network", "clinical alone"]
    assert [point["share"] for point in points["network"]] == [0.5, 0.8, 1.0]
    assert [point["patients"] for point in points["network"]] == sorted(p["patients"] for p in points["network"])
    for point in points["network"]:
        assert point["auroc"] == metrics["scores"]["auroc"], "here all points have the same predictions"
        assert point["lowest"] == point["highest"] == pytest.approx(point["auroc"]["value"])
    assert points["clinical alone"][-1]["auroc"] == metrics["baselines"]["clinical alone"]["scores"]["auroc"]
    assert (output / "learning-curve.png").is_file()
    assert not list((output / "learning-curve").rglob("lymph-mil")), "only predictions are kept"
    assert "Learning curve" in (output / "report.html").read_text()


# Teacher ----------------------------------------------------------------------------------------------------


def test_each_fold_is_taught_by_the_model_of_the_same_fold(finished, arguments, cohort, tmp_path):
    """A real fold: its record names the teacher, and no teacher knows its patients."""
    groups = arguments(tmp_path / "students", replace(OPTIONS, baselines=["none"]))
    plan = FoldPlan(*groups, teacher=FoldTeacherOptions(teacher=str(finished), teacher_cache=str(tmp_path / "cache")))
    folds = draw_folds(cohort, groups[1], tmp_path / "students", seed=0)
    check_teacher(folds, plan)
    run_fold(folds[1], plan, cohort)
    assert folds[1].finished
    settings = json.loads((folds[1].folder / "settings.json").read_text())
    assert settings["teacher"] == [str(finished / "repeat-1" / "fold-2")]
    learnt = json.loads((folds[1].folder / "cohort.json").read_text())["digests"]["train"]
    tested = {digest for patient in folds[1].split.test for digest in cohort.digests[patient]}
    assert tested.isdisjoint(learnt)


def test_a_teacher_of_other_folds_is_refused(finished, arguments, cohort, tmp_path):
    groups = arguments(tmp_path / "students")
    plan = FoldPlan(*groups, teacher=FoldTeacherOptions(teacher=str(finished)))
    with pytest.raises(CrossvalError, match=r"repeat 1, fold 1 has other .*test patients there.*--seed"):
        check_teacher(draw_folds(cohort, OPTIONS, tmp_path, seed=7), plan)
    with pytest.raises(CrossvalError, match=r"no finished repeat 2, fold 1 there"):
        check_teacher(draw_folds(cohort, replace(OPTIONS, repeats=2), tmp_path, seed=0), plan)
    curved = replace(plan, options=replace(OPTIONS, learning_curve=[0.5]))
    with pytest.raises(CrossvalError, match="--teacher with --learning-curve"):
        check_teacher(draw_folds(cohort, OPTIONS, tmp_path, seed=0), curved)
    check_teacher([], replace(plan, teacher=None))


# Page and figure --------------------------------------------------------------------------------------------


def test_the_page_of_a_cross_validation_holds_folds_rows_and_checklist(voted, cohort):
    page = (voted / "report.html").read_text()
    text = re.sub(r"base64,[^\"]+", "", page)
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', page) and "http" not in text
    metrics = json.loads((voted / "metrics.json").read_text())
    for heading in ("Folds", "Beside the network, in the same folds", "ROC and precision-recall curves", "Calibration"):
        assert f"<h3>{heading}</h3>" in page
    assert all(f'<th scope="row">{name}</th>' in page for name in ("network", *ROWS, "repeat 1, fold 2", "mean"))
    fold = metrics["folds"][1]["scores"]["auroc"]["value"]
    assert re.search(rf"repeat 1, fold 2</th>.*?<td>{fold:.3f}</td>", page)
    lead = metrics["baselines"]["bag size"]["network_lead"]["auroc"]["difference"]
    assert f"{lead['value']:.3f} ({lead['low']:.3f} to {lead['high']:.3f})" in page
    assert "internal validation by 2-fold cross-validation; epoch" in page
    assert "14 patients, each in one of 2 folds" in page
    assert 'id="training"' not in page and "test_vit, pooling gated_attention" in page
    assert not [patient.patient_id for patient in cohort.patients if patient.patient_id in text]
    variables = {group["variable"] for group in metrics["subgroups"]}
    assert variables == {"age", "sex", "lymphocyte count"}


def test_cells_are_shown_as_the_model_of_their_fold_weighs_them(finished, cohort, tmp_path):
    """The models are asked anew; right and wrong are those of the out-of-fold table."""
    weights = {}
    for fold in sorted((finished / "repeat-1").glob("fold-?")):
        model, processor = load_model(fold)
        ids = pd.read_csv(fold / "predictions.csv").patient_id
        rows = build_bags(cohort.select(ids), cache_dir=tmp_path)
        weights |= dict(
            zip(ids, infer(model, BagDataset(rows, processor), make_accelerator(CPU)).attentions, strict=True)
        )
    answers = pd.read_csv(finished / "out-of-fold.csv").set_index("patient_id")
    shown = pd.read_csv(finished / "figures" / "cells.csv").set_index("number")
    cells = iter(CELLS[finished / "figures" / "cells.png"])
    for number, patient_id, label, said in shown.itertuples():
        assert tuple(answers.loc[patient_id, ["label", "predicted_label"]]) == (label, said)
        (patient,) = cohort.select([patient_id]).patients
        for cell in np.argsort(-weights[patient_id], kind="stable")[:8]:
            picture, caption = next(cells)
            answer = f"patient {number}, {'right' if label == said else 'WRONG'}:\ncalled {said}"
            assert caption == f"{answer}\nweight {weights[patient_id][cell]:.3f}"
            assert picture.tobytes() == open_cell_image(patient.images[cell]).image.tobytes()
    assert next(cells, None) is None
    right = answers.label == answers.predicted_label
    assert len(shown) == min(3, right.sum()) + min(3, (~right).sum())
    assert "<h3>Cells behind right and wrong answers</h3>" in (finished / "report.html").read_text()


def test_folds_without_attentions_are_reported_without_cells(finished, arguments, tmp_path, caplog):
    """As an earlier version left them."""
    output = shutil.copytree(finished, tmp_path / "folds")
    settings = json.loads((output / "settings.json").read_text()) | {"output": str(output)}
    (output / "settings.json").write_text(json.dumps(settings))
    for path in (output / "repeat-1/fold-2/attentions.csv", output / "figures/cells.png"):
        path.unlink()
    crossval(*arguments(output, resume=True))
    assert "No cells are shown: 1 folds hold no attentions.csv" in caplog.text
    assert "Cells behind" not in (output / "report.html").read_text()


def test_a_fold_of_cached_features_weighs_its_cells_too(arguments, cohort, tmp_path):
    frozen = {"freeze_encoder": True, "feature_cache": str(tmp_path / "cache"), "clinical_baseline": "none"}
    groups = arguments(tmp_path / "folds", replace(OPTIONS, baselines=["none"]), **frozen)
    fold, _ = draw_folds(cohort, groups[1], tmp_path / "folds", seed=0)
    run_fold(fold, FoldPlan(*groups), cohort)
    tested = cohort.select(fold.split.test)
    model, processor = load_model(fold.folder)
    images = BagDataset(build_bags(tested, cache_dir=tmp_path), processor)
    expected = infer(model, images, make_accelerator(CPU)).attentions
    for patient, weights, own in zip(
        tested.patients, mean_attentions([fold.folder / "attentions.csv"], tested), expected, strict=True
    ):
        assert len(weights) == len(patient.images)
        np.testing.assert_allclose(weights, own, atol=1e-5)


def test_a_subgroup_is_decided_at_the_thresholds_of_its_folds(voted, cohort):
    group = next(g for g in json.loads((voted / "metrics.json").read_text())["subgroups"] if g["group"] == "female")
    women = [patient.patient_id for patient in cohort.patients if patient.sex == "F"]
    table = pd.read_csv(voted / "out-of-fold.csv").set_index("patient_id").loc[women]
    assert group["n"] == len(women)
    assert group["scores"]["accuracy"]["value"] == pytest.approx((table.label == table.predicted_label).mean())
    assert group["scores"]["auroc"]["value"] == pytest.approx(roc_auc_score(table.label, table.probability))


def test_lymph_report_takes_both_kinds_of_folder(voted, trained_run, tmp_path):
    again = report(ReportOptions(run=str(voted), output=str(tmp_path / "folds.html"))).read_text()
    assert again == (voted / "report.html").read_text()
    assert "Training" in report(ReportOptions(run=str(trained_run), output=str(tmp_path / "run.html"))).read_text()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "settings.json").write_text('{"folds": 5}')
    with pytest.raises(RunError, match="lymph crossval --resume"):
        report(ReportOptions(run=str(tmp_path / "unfinished")))


def test_rows_are_drawn_with_their_leads(tmp_path):
    area = Interval(0.8, 0.7, 0.9)
    with pytest.raises(ValueError, match="nothing stands beside"):
        rows_figure({"network": RowScores(area, area)}, tmp_path / "rows.png")
    undefined = Interval(np.nan, np.nan, np.nan)
    rows = {"network": RowScores(area, area), "bag size": RowScores(undefined, area, undefined, Interval(0.1, 0, 0.2))}
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **options: (drawn.append(figure), path.touch()))
        rows_figure(rows, tmp_path / "rows.png")
    left, right = drawn[0].axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["network", "bag size"]
    assert {text.get_text() for text in right.texts} == {"undefined", "0.100 (0.000 to 0.200)"}
