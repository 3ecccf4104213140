import sys
from pathlib import Path

import pytest
import torch

from lymph_hf import bench as benchmark
from lymph_hf.bench import Patient, bench, matrix_rate, step_flops
from lymph_hf.options import InferenceOptions
from lymph_hf.options_bench import BenchOptions
from lymph_hf.training import make_accelerator

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads():
    """The commands set the number of threads; afterwards it is as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))

    def load(name: str):
        for stale in ("benching", name):
            sys.modules.pop(stale, None)
        return __import__(name)

    return load


def small(**changes) -> BenchOptions:
    return BenchOptions(**{"encoder": "test_vit", "image_size": 32, "cells": 18, "rounds": 1, "cpu": True} | changes)


def patient(**changes) -> Patient:
    model = benchmark._model(small(**changes))
    return Patient(model, make_accelerator(InferenceOptions(cpu=True, mixed_precision="bf16")), 18)


def test_what_is_measured(caplog):
    caplog.set_level("INFO", logger="lymph_hf")
    results = bench(small(mixed_precision="bf16"))
    assert results["largest_difference"] < 0.01
    assert min(results.values()) > 0
    assert results["training_rate"] < results["matrix_rate"]
    for part in (
        "| patients predicted |",
        "| steps of training |",
        "parameters are trained",
        "bf16",
        "18 cells of 32x32",
    ):
        assert part in caplog.text


def test_a_trained_run_is_measured_without_training(trained_run):
    results = bench(small(run=str(trained_run), mixed_precision="no"))
    assert results["largest_difference"] < 1e-5
    assert "training_ratio" not in results


def test_both_ways_are_the_same_model():
    subject = patient()
    plain, ours = (subject.predict(subject.cells, plain=way) for way in (True, False))
    assert plain.sum() == pytest.approx(1)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0.01)
    gradients = {}
    for way in (True, False):
        torch.manual_seed(0)
        subject.optimizer.step = lambda: None  # the weights stay
        subject.learn(subject.cells, plain=way)
        gradients[way] = torch.cat([p.grad.flatten() for p in subject.model.parameters() if p.grad is not None])
    assert torch.cosine_similarity(gradients[True], gradients[False], dim=0) > 0.99


def test_operations_are_those_of_the_products():
    """A linear layer alone: 2 per weight and row forward, as much again for the gradient of the weight."""
    subject = patient(adapter="none")
    model = torch.nn.Linear(8, 4)
    subject.model, subject.optimizer = model, torch.optim.SGD(model.parameters(), lr=0.1)
    subject.learn = lambda cells, plain: model(torch.ones(len(cells), 8)).sum().backward()
    assert step_flops(subject) == 18 * 2 * (2 * 8 * 4)


def test_matrix_rate_counts_by_the_clock(monkeypatch):
    monkeypatch.setattr(benchmark, "_SIDES", {"cpu": (8,)})
    ticks = iter(range(100))
    assert matrix_rate(CPU, "no", lambda: next(ticks)) == 4 * 2 * 8**3


@pytest.mark.parametrize("name", ["cells", "rounds", "threads"])
def test_nothing_to_measure(name):
    with pytest.raises(ValueError, match=f"--{name} 0: expected at least 1"):
        bench(small(**{name: 0}))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident memory is read as on Linux")
def test_peak_memory(script):
    peak_bytes, size = script("benching").peak_bytes, 200 * 2**20
    assert peak_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU) == pytest.approx(size, rel=0.1)
    assert peak_bytes(lambda: None, CPU) < size / 20  # what has been freed no longer counts


def test_verbs_of_adapters(script):
    adapters = script("bench_adapters")
    cells = torch.randn(2, 3, 160, 160)
    verdicts = dict(
        zip(adapters.VERBS, adapters.verdicts(adapters.Subject("bottleneck", "test_vit", cells)), strict=True)
    )
    assert verdicts.pop("merge") == "refused"
    assert set(verdicts.values()) == {"yes"}
    broken = adapters.Subject("bottleneck", "test_vit", cells)
    broken.plain = lambda: adapters.adapted_model("test_vit", "none", dropout=0.5, num_labels=3).eval()
    assert adapters.verdicts(broken)[list(adapters.VERBS).index("save, load")] == "RuntimeError"


def test_report_of_memory(script):
    memory = script("bench_memory")
    peaks = {"kept": {20: 10**9, 100: 5 * 10**9}, "chunks": {20: 10**8, 100: 2 * 10**8, 2000: 22 * 10**7}}
    text = memory.report(peaks)
    assert "| chunks | 0.10 | 0.20 | 0.22 |" in text
    assert "| kept | 1.00 | 5.00 |  |" in text
    assert "At 100 cells chunks take 0.040" in text
    assert "2000 cells take 1.10 times the memory of 100." in text


def test_figure_of_memory(script, tmp_path):
    peaks = {"kept": {20: 10**9, 100: 5 * 10**9}, "chunks": {20: 10**8, 100: 2 * 10**8, 2000: 22 * 10**7}}
    script("bench_memory").draw(tmp_path / "memory.png", peaks, "title")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
