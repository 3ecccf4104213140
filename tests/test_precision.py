import json

import pytest
import torch

from lymph_hf import precision, recipes
from lymph_hf.inference import infer
from lymph_hf.options import InferenceOptions
from lymph_hf.precision import has_bfloat16, precision_of, resolve_precision, with_settled_precision
from lymph_hf.runs import Run, RunError
from lymph_hf.training import make_accelerator

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def hardware(monkeypatch):
    """Chooses whether the machine computes in bfloat16."""
    return lambda has: monkeypatch.setattr(precision, "has_bfloat16", lambda device: has)


@pytest.mark.parametrize(
    ("abilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),
        ({"avx2": True, "amx_bf16": False}, False),
        ({}, False),
    ],
)
def test_processors(monkeypatch, abilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert has_bfloat16(CPU) is expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_graphics_cards(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_bfloat16(GPU) is expected
    assert not has_bfloat16(torch.device("mps"))


@pytest.mark.parametrize("has", [True, False])
def test_auto_follows_the_hardware_and_nothing_else_does(hardware, has):
    hardware(has)
    assert resolve_precision("auto", CPU) == ("bf16" if has else "no")
    assert precision_of(InferenceOptions(cpu=True)) == ("bf16" if has else "no")
    assert [resolve_precision(name, CPU) for name in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]


def test_the_settings_of_a_run_hold_what_was_meant(hardware, tiny_options, tmp_path):
    hardware(True)
    run = Run(tmp_path / "run")
    options = tiny_options(run.folder, mixed_precision="auto", epochs=1)
    recipes.train(*options)
    assert json.loads(run.settings.read_text())["mixed_precision"] == "bf16"
    hardware(False)  # on another machine
    options[-1].resume = True
    assert with_settled_precision(options[-1]).mixed_precision == "bf16"
    recipes.train(*options)  # goes on in bf16
    options[-1].mixed_precision = "no"
    with pytest.raises(RunError, match="mixed_precision: 'bf16' -> 'no'"):
        recipes.train(*options)


def test_a_new_run_is_not_bound_by_an_old_one(hardware, tiny_options, tmp_path):
    (tmp_path / "settings.json").write_text('{"mixed_precision": "fp16"}')
    hardware(True)
    assert with_settled_precision(tiny_options(tmp_path, mixed_precision="auto")[-1]).mixed_precision == "bf16"


def test_probabilities_hardly_depend_on_it(trained_run, cohort_folder, hardware, tmp_path):
    model, processor = recipes.load_model(trained_run)
    from lymph_hf.bags import BagDataset, build_bags
    from lymph_hf.cohort import read_cohort

    bags = BagDataset(build_bags(read_cohort(cohort_folder), cache_dir=tmp_path), processor)
    exact, half = (
        infer(model, bags, make_accelerator(InferenceOptions(cpu=True, mixed_precision=name))).probabilities
        for name in ("no", "bf16")
    )
    assert 0 < abs(exact - half).max() < 0.01
    # The head is computed in float32: probabilities in bfloat16 would be equal for many patients.
    assert len(set(half[:, 1])) == len(half)
