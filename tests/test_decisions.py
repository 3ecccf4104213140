"""What is frozen after training: calibrated probabilities, a threshold on them, sets that say when to refer."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit
from transformers import AutoModel

from lymph_hf import LymphMILConfig, LymphMILForBagClassification, recipes
from lymph_hf.calibration import Conformal, fit_calibration, fit_conformal, logits_of, scaling_from_dict
from lymph_hf.decisions import REFERRED, calibrate, decisions, freeze_decisions
from lymph_hf.metrics import choose_threshold


def patients(n=60, seed=0):
    """Labels and overconfident probabilities (n, 2)."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n)
    odds = 4 * (labels - 0.5 + generator.normal(0, 0.8, n)) + 1
    return labels, np.stack([expit(-odds), expit(odds)], axis=1)


@pytest.mark.parametrize("calibration", [{"method": "temperature", "temperature": 2.5}, None])
@pytest.mark.parametrize("labels", [2, 3])
def test_the_model_applies_what_the_stage_fitted(calibration, labels):
    config = {"encoder": "test_vit", "image_size": 32, "num_labels": labels}
    assert_scaled(LymphMILForBagClassification(LymphMILConfig(**config)).eval(), calibration)


def test_the_model_applies_platt_scaling():
    model = LymphMILForBagClassification(LymphMILConfig(encoder="test_vit", image_size=32)).eval()
    assert_scaled(model, {"method": "platt", "slope": 0.4, "intercept": -0.7})


def assert_scaled(model, calibration):
    cells = torch.randn(3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(cells).logits.double().softmax(-1).numpy()
        model.config.calibration = calibration
        scaled = model(cells).logits.double().softmax(-1).numpy()
    expected = plain
    if calibration is not None:
        logits = scaling_from_dict(calibration).apply(logits_of(plain))
        expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert scaled == pytest.approx(expected, abs=1e-6)


def test_the_order_is_calibration_then_threshold_then_sets():
    labels, probabilities = patients()
    config = LymphMILConfig(encoder="test_vit")
    calibrated = freeze_decisions(config, labels, probabilities, calibration="platt", coverage=0.8)
    assert config.calibration == fit_calibration(labels, logits_of(probabilities), method="platt").to_dict()
    assert calibrated == pytest.approx(calibrate(probabilities, config))
    assert config.decision_threshold == choose_threshold(labels, calibrated)
    assert config.conformal == fit_conformal(labels, calibrated, coverage=0.8).to_dict()
    loss = [-np.log(p[np.arange(len(labels)), labels]).mean() for p in (probabilities, calibrated)]
    assert loss[1] < loss[0], "the probabilities were overconfident"
    with pytest.raises(ValueError, match="calibrated already"):
        freeze_decisions(config, labels, probabilities)


def test_nothing_is_fitted_that_was_not_asked_for():
    labels, probabilities = patients()
    config = LymphMILConfig(encoder="test_vit")
    kept = freeze_decisions(config, labels, probabilities, calibration="none", threshold=0.2, coverage=0)
    assert np.array_equal(kept, probabilities)
    assert (config.calibration, config.conformal, config.decision_threshold) == (None, None, 0.2)
    assert decisions(probabilities, config) is None and config.prediction_set([0.5, 0.5]) is None


def test_auto_calibration_needs_both_labels_for_platt_scaling():
    labels, probabilities = patients()
    ill = labels == 1
    config = LymphMILConfig(encoder="test_vit")
    freeze_decisions(config, labels[ill], probabilities[ill])
    assert config.calibration["method"] == "temperature"


def test_the_configuration_decides_as_the_statistics_do():
    labels, probabilities = patients()
    config = LymphMILConfig(encoder="test_vit", id2label={0: "reactive", 1: "tumoral"})
    calibrated = freeze_decisions(config, labels, probabilities, coverage=0.8)
    sets = Conformal.from_dict(config.conformal).sets(calibrated)
    own = [config.prediction_set(row) for row in calibrated]
    assert own == [[config.id2label[i] for i in np.flatnonzero(row)] for row in sets]
    said = decisions(calibrated, config)
    assert said == [names[0] if len(names) == 1 else REFERRED for names in own]
    assert {"reactive", "tumoral", REFERRED} == set(said), "the example shows every answer"


def test_too_few_patients_refer_everybody_and_say_so(caplog):
    labels, probabilities = patients(n=10)
    config = LymphMILConfig(encoder="test_vit", id2label={0: "reactive", 1: "tumoral"})
    with caplog.at_level("WARNING", logger="lymph_hf"):
        calibrated = freeze_decisions(config, labels, probabilities, coverage=0.95)
    assert "too few patients of reactive and of tumoral" in caplog.text
    assert set(decisions(calibrated, config)) == {REFERRED}


def test_a_run_keeps_what_was_fitted_and_its_files_agree(tiny_options, tmp_path):
    recipes.train(*tiny_options(tmp_path / "run", epochs=1, coverage=0.5))
    model = AutoModel.from_pretrained(tmp_path / "run/lymph-mil")
    assert model.config.calibration["method"] == "platt"
    assert model.config.conformal["coverage"] == 0.5
    table = pd.read_csv(tmp_path / "run/validation.csv")
    assert table.decision.tolist() == decisions(table.probability.to_numpy(), model.config)
    scores = json.loads((tmp_path / "run/validation.json").read_text())["scores"]
    assert scores["referred"]["value"] == pytest.approx((table.decision == REFERRED).mean())


def test_a_leaked_calibration_would_be_seen(tiny_options, tmp_path, monkeypatch):
    """The calibration, the threshold and the sets see the validation patients and nobody else."""
    seen = []
    original = recipes.freeze_decisions

    def spy(config, labels, probabilities, **options):
        seen.append(len(labels))
        return original(config, labels, probabilities, **options)

    monkeypatch.setattr(recipes, "freeze_decisions", spy)
    recipes.train(*tiny_options(tmp_path / "run", epochs=1, test_fraction=0.2))
    split = json.loads((tmp_path / "run/split.json").read_text())
    assert seen == [len(split["validation"])]
