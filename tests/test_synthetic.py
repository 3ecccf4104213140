"""The synthetic cohort: what is painted, who the patients are, what stands on disk."""

import hashlib
import json
import logging
import multiprocessing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import expit
from sklearn.metrics import roc_curve

from lymph_hf import synthetic
from lymph_hf.cohort import read_cohort
from lymph_hf.painting import CELL_TYPES, Smear, contact_sheet, paint_cell
from lymph_hf.population import LABELS, TUMORAL_SHARE, Patients, best_auroc, draw_patients
from lymph_hf.synthetic import write_synthetic_cohort

TINY = {"patients": 5, "cells": (2, 4), "image_size": 48, "workers": 1, "progress": False}


def fingerprints(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def generic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generic") / "cohort"
    write_synthetic_cohort(out, seed=3, **TINY)
    return out


@pytest.fixture(scope="module")
def challenge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("challenge") / "cohort"
    write_synthetic_cohort(out, seed=4, layout="challenge", **TINY | {"patients": 24, "cells": (1, 2)})
    return out


@pytest.fixture(scope="module")
def population() -> Patients:
    rng = np.random.default_rng(5)
    return draw_patients(rng.random(20_000) < 0.5, (16, 198), 0.0, rng)


# --- Painting ---


def paint_many(cell_type: str, number: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 224, 224, 3) as float, each on a smear of its own, and the smears' backgrounds (n, 3)."""
    rng = np.random.default_rng(6)
    smears = [Smear.draw(rng) for _ in range(number)]
    images = np.stack([paint_cell(cell_type, smear, rng) for smear in smears]).astype(float)
    return images, np.stack([smear.background for smear in smears])


@pytest.mark.parametrize("cell_type", CELL_TYPES)
def test_background_is_lightest_and_the_nucleus_darkest(cell_type: str) -> None:
    for image, background in zip(*paint_many(cell_type), strict=True):
        light = image.mean(-1)
        assert abs(np.percentile(light, 95) - background.clip(0, 255).mean()) < 8
        assert light[102:122, 102:122].mean() < light.mean() - 30
        red, green, blue = image[102:122, 102:122].mean((0, 1))
        assert green < red and green < blue  # purple


@pytest.mark.parametrize("cell_type", [name for name in CELL_TYPES if name != "smudge"])
def test_cytoplasm_is_blue_and_lies_between_nucleus_and_background(cell_type: str) -> None:
    for image, background in zip(*paint_many(cell_type), strict=True):
        middle = image[40:184, 40:184]
        blueness = middle[..., 2] - middle[..., 0] - (background[2] - background[0])
        light = middle.mean(-1)
        nucleus = light < 0.5 * background.mean()
        cytoplasm = ~nucleus & (blueness > 25) & (middle[..., 1] > middle[..., 0] - 20)
        assert cytoplasm.sum() > 30
        assert light[nucleus].mean() < light[cytoplasm].mean() < background.mean()


def nuclear_area(cell_type: str) -> float:
    images, backgrounds = paint_many(cell_type, 12)
    dark = images[..., 1] < 0.42 * backgrounds[:, None, None, 1]  # only chromatin absorbs so much green
    return float(dark[:, 50:174, 50:174].sum((1, 2)).mean())


def blue_area(cell_type: str) -> float:
    images, backgrounds = paint_many(cell_type, 12)
    tint = (images[..., 2] - images[..., 0]) - (backgrounds[:, 2] - backgrounds[:, 0])[:, None, None]
    pale = images.mean(-1) > 0.5 * backgrounds.mean(-1)[:, None, None]
    return float(((tint > 25) & pale)[:, 40:184, 40:184].sum((1, 2)).mean())


def test_types_differ_as_in_the_textbook() -> None:
    assert nuclear_area("prolymphocyte") > 1.2 * nuclear_area("small_mature")
    assert blue_area("reactive") > 2 * blue_area("small_mature") > 2 * blue_area("cll_like")


def test_paint_cell_is_deterministic_and_scales() -> None:
    smear = Smear.draw(np.random.default_rng(0))
    large, again = (paint_cell("reactive", smear, np.random.default_rng(1)) for _ in range(2))
    assert large.shape == (224, 224, 3) and large.dtype == np.uint8
    np.testing.assert_array_equal(large, again)
    assert (paint_cell("reactive", smear, np.random.default_rng(2)) != large).any()
    small = paint_cell("reactive", smear, np.random.default_rng(1), size=64)
    assert small.shape == (64, 64, 3)
    assert abs(small.mean() - large.mean()) < 12


def test_paint_cell_refuses_tiny_images() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="at least 32"):
        paint_cell("reactive", Smear.draw(rng), rng, size=31)


def test_contact_sheet_places_every_image() -> None:
    images = [Image.new("RGB", (10, 20), (value, 0, 0)) for value in (10, 20, 30, 40, 50)]
    sheet = contact_sheet(images, 2)
    assert sheet.size == (20, 60)
    assert [sheet.getpixel((x, y))[0] for y in (10, 30, 50) for x in (5, 15)] == [10, 20, 30, 40, 50, 255]


# --- Population ---


def test_best_scores_lie_in_their_bands_and_in_order() -> None:
    best = best_auroc()
    assert 0.68 <= best["cell"] <= 0.78
    assert 0.82 <= best["clinic"] <= 0.89
    assert 0.92 <= best["images"] <= 0.97
    assert 0.96 <= best["both"] <= 0.99
    assert best["cell"] < min(best["clinic"], best["images"])
    assert best["both"] > max(best["clinic"], best["images"])
    assert best_auroc() == best
    assert best_auroc(cells=(2, 4))["images"] < best["images"]
    assert best_auroc(missing=0.5)["clinic"] < best["clinic"]


@pytest.mark.parametrize("source", ["clinic", "images", "both"])
def test_evidence_is_calibrated(population: Patients, source: str) -> None:
    """At equal shares, a log-likelihood ratio of x must mean a probability of sigmoid(x)."""
    evidence = {"clinic": population.clinical_evidence(), "images": population.cell_evidence()}
    evidence["both"] = evidence["clinic"] + evidence["images"]
    probability = expit(evidence[source])
    for low in np.arange(0, 1, 0.2):
        rows = (probability >= low) & (probability < low + 0.2)
        tolerance = 4 * 0.5 / np.sqrt(rows.sum())
        assert abs(population.tumoral[rows].mean() - probability[rows].mean()) < tolerance


def test_cell_evidence_equals_the_polya_urn(population: Patients) -> None:
    """Reference: draw the cells one by one; type t has probability (alpha_t + seen_t) / (alpha_0 + seen)."""

    def log_likelihood(counts: np.ndarray, label: str) -> float:
        total = 0.0
        for mixture in LABELS[label].mixtures:
            probability, seen = mixture.weight, np.zeros(len(counts))
            for cell_type in np.repeat(np.arange(len(counts)), counts):
                parameters = mixture.concentration * np.array(mixture.mean) + seen
                probability *= parameters[cell_type] / parameters.sum()
                seen[cell_type] += 1
            total += probability
        return np.log(total)

    expected = [log_likelihood(c, "tumoral") - log_likelihood(c, "reactive") for c in population.cell_counts[:10]]
    np.testing.assert_allclose(population.cell_evidence()[:10], expected)


def test_every_cell_type_occurs_in_both_labels(population: Patients) -> None:
    for model in LABELS.values():
        assert sum(mixture.weight for mixture in model.mixtures) == pytest.approx(1)
        for mixture in model.mixtures:
            assert len(mixture.mean) == len(CELL_TYPES) and min(mixture.mean) > 0
            assert sum(mixture.mean) == pytest.approx(1)
    for label in (False, True):
        share = (population.cell_counts[population.tumoral == label] > 0).mean(0)
        assert (share > 0.2).all()


def test_no_threshold_on_the_count_is_certain(population: Patients) -> None:
    reactive = population.lymphocyte_count[~population.tumoral]
    tumoral = population.lymphocyte_count[population.tumoral]
    assert (tumoral > 7.68).mean() > (reactive > 7.68).mean() > 0.1  # the published cohort's certain answer
    assert (reactive > np.median(tumoral)).mean() > 0.03
    assert (tumoral < np.median(reactive)).mean() > 0.1
    false_positive, sensitivity, _ = roc_curve(population.tumoral, population.lymphocyte_count)
    assert ((sensitivity + 1 - false_positive) / 2).max() < 0.8


def test_ages_sexes_and_bag_sizes_resemble_the_published_cohort(population: Patients) -> None:
    assert np.median(population.age[population.tumoral]) - np.median(population.age[~population.tumoral]) > 10
    assert (population.sex == "F").mean() == pytest.approx(0.5, abs=0.02)
    sizes = population.cell_counts.sum(1)
    assert sizes.min() == 16 and sizes.max() == 198 and abs(np.median(sizes) - 66) < 3


def test_missing_values_carry_no_evidence() -> None:
    rng = np.random.default_rng(7)
    drawn = draw_patients(rng.random(4000) < 0.5, (1, 1), 0.3, rng)
    lost = np.isnan(drawn.age), drawn.sex == "", np.isnan(drawn.lymphocyte_count)
    for hidden in lost:
        assert hidden.mean() == pytest.approx(0.3, abs=0.03)
    evidence = drawn.clinical_evidence()
    assert np.isfinite(evidence).all()
    assert (evidence[lost[0] & lost[2]] == 0).all()


# --- Files ---


def test_generic_layout_is_complete(generic: Path) -> None:
    assert {path.name for path in generic.iterdir()} == {
        "clinical.csv", "cells.csv", "images", "generator.json", "examples.png",
    }  # fmt: skip
    cohort = read_cohort(generic)
    assert not cohort.warnings and not cohort.exclusions
    assert len(cohort.patients) == 5 and cohort.label_names == ("reactive", "tumoral")
    cells = pd.read_csv(generic / "cells.csv")
    assert set(cells["cell_type"]) <= set(CELL_TYPES)
    stated = {(row.patient_id, row.file) for row in cells.itertuples()}
    assert stated == {(patient.patient_id, image.name) for patient in cohort.patients for image in patient.images}
    for patient in cohort.patients:
        assert 2 <= len(patient.images) <= 4
        with Image.open(patient.images[0]) as image:
            image.load()
            assert image.format == "JPEG" and image.mode == "RGB" and image.size == (48, 48)


def test_challenge_layout_is_complete_with_its_quirks(challenge: Path) -> None:
    cohort = read_cohort(challenge)
    assert not cohort.warnings and not cohort.exclusions
    tables = {
        "train": pd.read_csv(challenge / "trainset" / "trainset_true.csv"),
        "test": pd.read_csv(challenge / "testset" / "testset_data.csv"),
        "all": pd.read_csv(challenge / "clinical_annotation.csv"),
    }
    columns = ["ID", "LABEL", "GENDER", "DOB", "LYMPH_COUNT"]
    assert list(tables["train"]) == list(tables["test"]) == columns
    assert list(tables["all"]) == ["Unnamed: 0", *columns] and len(tables["all"]) == 24
    assert set(tables["train"]["LABEL"]) == {0, 1} and set(tables["test"]["LABEL"]) == {-1}
    assert (tables["train"]["GENDER"] == "f").sum() == 1
    births = tables["all"]["DOB"]
    assert births.str.contains("/").any() and births.str.contains("-").any()

    withheld = json.loads((challenge / "generator.json").read_text())["test_labels"]
    assert set(withheld) == set(tables["test"]["ID"])
    labels = pd.Series([*withheld.values(), *tables["train"]["LABEL"].map(dict(enumerate(LABELS)))])
    assert (labels == "tumoral").sum() == round(24 * TUMORAL_SHARE)
    assert list(withheld.values()).count("tumoral") == 3 and list(withheld.values()).count("reactive") == 1


def test_layouts_hold_the_same_patients(tmp_path: Path) -> None:
    """The challenge layout only writes ages as dates of birth; nothing else about a patient changes."""
    options = TINY | {"patients": 8, "cells": (1, 1)}
    for layout in ("generic", "challenge"):
        write_synthetic_cohort(tmp_path / layout, layout=layout, missing=0.2, **options)
    first, second = (
        {patient.patient_id: patient for patient in read_cohort(tmp_path / layout).patients}
        for layout in ("generic", "challenge")
    )
    assert first.keys() == second.keys()
    for name, patient in first.items():
        other = second[name]
        assert (patient.sex, patient.lymphocyte_count) == (other.sex, other.lymphocyte_count)
        assert other.part == "test" or patient.label == other.label
        assert (patient.age is None) == (other.age is None)
        assert patient.age is None or abs(patient.age - other.age) <= 0.11
        assert patient.images[0].read_bytes() == other.images[0].read_bytes()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs quickly started processes")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_same_seed_same_bytes_whatever_the_workers(
    generic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "_START_METHOD", "fork")  # "spawn" imports the package in every process
    write_synthetic_cohort(tmp_path / "a", seed=3, **TINY | {"workers": 2})
    assert fingerprints(tmp_path / "a") == fingerprints(generic)


def test_another_seed_gives_other_patients_and_pixels(generic: Path, tmp_path: Path) -> None:
    write_synthetic_cohort(tmp_path / "a", seed=8, **TINY)
    ours, theirs = fingerprints(tmp_path / "a"), fingerprints(generic)
    assert all(ours[name] != theirs[name] for name in ours.keys() & theirs.keys())


def test_identical_cohort_is_used_again(generic: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = fingerprints(generic)
    with caplog.at_level(logging.INFO, logger="lymph_hf"):
        report = write_synthetic_cohort(generic, seed=3, **TINY)
    assert report.reused and "already holds" in caplog.text
    assert fingerprints(generic) == before
    assert report.images == sum(name.endswith(".jpg") for name in before)


def test_other_contents_are_never_touched(generic: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="seed 3, not 4"):
        write_synthetic_cohort(generic, seed=4, **TINY)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no synthetic cohort"):
        write_synthetic_cohort(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_incomplete_cohort_is_not_used_again(tmp_path: Path) -> None:
    write_synthetic_cohort(tmp_path / "a", **TINY)
    next((tmp_path / "a").rglob("*.jpg")).unlink()
    with pytest.raises(FileExistsError, match=r"holds \d+ of \d+ images"):
        write_synthetic_cohort(tmp_path / "a", **TINY)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "_write_cell_types", fail)
    with pytest.raises(OSError, match="disk full"):
        write_synthetic_cohort(tmp_path / "deep" / "a", **TINY)
    assert not list((tmp_path / "deep").iterdir())


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    report = write_synthetic_cohort(tmp_path, **TINY)
    assert not report.reused and (tmp_path / "clinical.csv").is_file()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patients": 1}, "patients is 1: give at least 2"),
        ({"patients": 2, "layout": "challenge"}, "at least 3 in the challenge layout"),
        ({"layout": "flat"}, "layout is 'flat'"),
        ({"cells": (5, 4)}, "fewest <= most"),
        ({"image_size": 16}, "at least 32"),
        ({"missing": 1.0}, "0 <= missing < 1"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_synthetic_cohort(tmp_path / "a", **TINY | wrong)


def test_summary_shows_every_score(generic: Path) -> None:
    report = write_synthetic_cohort(generic, seed=3, **TINY)
    text = report.summary()
    for scores in (report.best_auroc, report.written_auroc):
        assert all(f"{score:.3f}" in text for score in scores.values())
    assert "5 patients (2 reactive, 3 tumoral)" in text
    assert json.loads((generic / "generator.json").read_text())["best_auroc"] == report.best_auroc
