"""The `evaluate` modules return what `metrics` returns, in batches, combined, and without a network."""

import math
import socket

import numpy as np
import pytest

pytest.importorskip("evaluate", reason="evaluate is not installed: pip install 'lymph-hf[train]'")

import evaluate

from lymph_hf.metric_modules import PatientIntervals, PatientMetrics
from lymph_hf.metrics import BINARY_SCORES, MULTICLASS_SCORES, bootstrap_intervals, score

LABELS = [0, 1, 1, 0, 1, 0]
PROBABILITIES = [0.2, 0.9, 0.4, 0.6, 0.7, 0.1]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No socket connects, and nothing has told the libraries to stay offline: they must not try."""

    def refuse(*address):
        raise AssertionError(f"a metric module tried to connect to {address}")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def make(tmp_path):
    return lambda module, *config: module(*config, cache_dir=str(tmp_path))


def test_scores_are_those_of_metrics(make):
    found = make(PatientMetrics).compute(predictions=PROBABILITIES, references=LABELS, threshold=0.65)
    assert found == score(LABELS, PROBABILITIES, threshold=0.65)
    assert found != score(LABELS, PROBABILITIES)


def test_arrays_and_batches_and_single_patients_add_up(make):
    metric = make(PatientMetrics)
    metric.add_batch(predictions=np.array(PROBABILITIES[:2], dtype=np.float64), references=np.array(LABELS[:2]))
    metric.add_batch(predictions=PROBABILITIES[2:5], references=LABELS[2:5])
    metric.add(prediction=PROBABILITIES[5], reference=LABELS[5])
    assert metric.compute() == score(LABELS, PROBABILITIES)


def test_a_module_is_empty_again_after_compute(make):
    metric = make(PatientMetrics)
    metric.compute(predictions=PROBABILITIES, references=LABELS)
    assert metric.compute(predictions=[0.3], references=[1])["n"] == 1


def test_a_module_recovers_from_bad_input(make):
    metric = make(PatientMetrics)
    with pytest.raises(ValueError, match="probabilities must lie in"):
        metric.compute(predictions=[1.3], references=[1])
    assert metric.compute(predictions=PROBABILITIES, references=LABELS)["n"] == 6


def test_several_classes_have_their_configuration(make):
    labels, probabilities = np.arange(9) % 3, np.random.default_rng(0).dirichlet(np.ones(3), 9)
    metric = make(PatientMetrics, "multiclass")
    assert metric.compute(predictions=probabilities, references=labels) == score(labels, probabilities)
    with pytest.raises(ValueError, match=r"config_name must be one of \['default', 'multiclass'\], got 'binary'"):
        make(PatientMetrics, "binary")


@pytest.mark.parametrize(("config", "names"), [("default", BINARY_SCORES), ("multiclass", MULTICLASS_SCORES)])
def test_no_patients_is_nan(make, config, names):
    found = make(PatientMetrics, config).compute(predictions=[], references=[])
    assert found.pop("n") == 0
    assert tuple(found) == names
    assert all(math.isnan(value) for value in found.values())
    intervals = make(PatientIntervals, config).compute(predictions=[], references=[], resamples=3)
    assert {interval["value"] for interval in intervals.values()} == {None}


def test_intervals_are_those_of_metrics(make):
    options = {"threshold": 0.3, "resamples": 50, "level": 0.8, "seed": 4, "method": "bca"}
    found = make(PatientIntervals).compute(predictions=PROBABILITIES, references=LABELS, **options)
    expected = bootstrap_intervals(LABELS, PROBABILITIES, **options)
    assert found == {f"{name}_interval": interval.as_dict() for name, interval in expected.items()}


def test_modules_combine(make):
    both = evaluate.combine([make(PatientMetrics), make(PatientIntervals)])
    both.add_batch(predictions=PROBABILITIES, references=LABELS)
    found = both.compute(threshold=0.65)
    assert set(found) == {*BINARY_SCORES, "n", *(f"{name}_interval" for name in BINARY_SCORES)}
    for name in BINARY_SCORES:
        assert found[f"{name}_interval"]["value"] == found[name]


@pytest.mark.parametrize("module", [PatientMetrics, PatientIntervals])
def test_information_is_complete(make, module):
    metric = make(module)
    assert "Brier" in metric.citation
    assert set(metric.features) == {"predictions", "references"}
    for word in ("predictions", "references", "threshold", "Returns"):
        assert word in metric.inputs_description
    assert metric.description.endswith(".")
    assert metric.module_type == "metric"
