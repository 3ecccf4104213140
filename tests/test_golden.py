"""Published models answer as they did when they were published, here and in every later version."""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from publishing_cases import FACTS
from safetensors.torch import load_file, save_file
from script_loader import script
from transformers import AutoModel

from lymph_hf.golden import GOLDEN, answer_problems, golden_cells, golden_problems
from lymph_hf.publishing_code import outdated_code, refresh_code
from lymph_hf.publishing_model import stage_run
from lymph_hf.runs import Run

ROOT = Path(__file__).parents[1]
PUBLISHED = sorted(path.parent for path in (ROOT / "model_cards").glob(f"*/{GOLDEN}"))
FROZEN = sorted(path.parent for path in (Path(__file__).parent / "frozen").glob(f"*/*/{GOLDEN}"))


@pytest.fixture(scope="module")
def published(trained_run, tmp_path_factory) -> Path:
    return stage_run(Run(trained_run), tmp_path_factory.mktemp("model_cards"), FACTS, repo="org/x", tag="v1")


@pytest.fixture
def folder(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "folder"))


def test_the_pictures_are_the_same_for_ever():
    pixels = np.stack([np.asarray(cell) for cell in golden_cells()])
    assert pixels.shape == (5, 48, 48, 3)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "20c7ef0ee2a76db8"
    assert len({cell.tobytes() for cell in golden_cells()}) == 5


def test_a_published_folder_keeps_its_answers(folder):
    assert golden_problems(folder) == []
    stored = json.loads((folder / GOLDEN).read_text())
    assert sum(stored["probabilities"].values()) == pytest.approx(1)
    assert sum(stored["attentions"]) == pytest.approx(1, abs=1e-5)


def test_changed_weights_are_noticed(folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += torch.tensor([0.0, 0.01])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    problems = golden_problems(folder)
    assert problems[0] == "model.safetensors is not the file that was published"
    assert problems[1].startswith("its probabilities differ by 0.00")


def test_changed_settings_are_noticed(folder):
    config = json.loads((folder / "config.json").read_text())
    config["calibration"] = {"method": "temperature", "temperature": 3.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert [problem[:17] for problem in golden_problems(folder)] == ["its probabilities"]


def test_the_tolerance_and_what_is_not_a_number():
    assert answer_problems({"lengths": [1.0]}, {"lengths": [1.00009]}) == []
    assert answer_problems({"lengths": [1.0]}, {"lengths": [1.0002]})
    assert answer_problems({"lengths": [1.0]}, {"lengths": [float("nan")]})


@pytest.mark.parametrize("folder", FROZEN, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_models_of_older_versions_load_and_answer_as_then(folder):
    """These folders never change: a version that cannot read them breaks what users have."""
    assert golden_problems(folder) == []


def test_frozen_models_are_there():
    assert {"v0.1/model", "v0.1/adapter", "v0.1/ensemble"} <= {f"{path.parent.name}/{path.name}" for path in FROZEN}
    model = AutoModel.from_pretrained(next(path for path in FROZEN if path.name == "model"))
    assert model.config.decision_threshold == 0.37
    assert model.config.id2label == {0: "reactive", 1: "tumoral"}
    ensemble = AutoModel.from_pretrained(next(path for path in FROZEN if path.name == "ensemble"))
    assert (len(ensemble.members), ensemble.config.shared_encoder, ensemble.dtype) == (2, True, torch.float32)
    assert (ensemble.config.decision_threshold, ensemble.config.conformal["coverage"]) == (0.41, 0.9)


@pytest.mark.parametrize("folder", PUBLISHED or [None], ids=lambda path: path.name if path else "none")
def test_the_folders_under_model_cards_keep_their_answers(folder):
    if folder is None:
        pytest.skip("no folder under model_cards/ has golden answers")
    assert golden_problems(folder) == []


@pytest.mark.parametrize("folder", PUBLISHED or [None], ids=lambda path: path.name if path else "none")
def test_the_code_under_model_cards_is_that_of_the_package(folder):
    if folder is None:
        pytest.skip("no folder under model_cards/ has golden answers")
    outdated = outdated_code(folder)
    assert not outdated, f"{', '.join(outdated)} in {folder} differ from the package: run make model-cards"


def test_code_that_drifts_is_found_and_refreshed(folder):
    assert outdated_code(folder) == []
    (folder / "fusion.py").write_text("# older\n")
    (folder / "pooling_clam.py").unlink()
    (folder / "no_longer_needed.py").write_text("# older\n")
    names = ["fusion.py", "no_longer_needed.py", "pooling_clam.py"]
    assert outdated_code(folder) == names
    before = (folder / "model.safetensors").read_bytes(), (folder / "README.md").read_bytes()
    assert refresh_code(folder) == names
    assert outdated_code(folder) == []
    assert golden_problems(folder) == []
    assert before == ((folder / "model.safetensors").read_bytes(), (folder / "README.md").read_bytes())


@pytest.fixture
def model_cards(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model_cards.py"])
    return script("model_cards")


def test_folders_are_made_from_runs_that_are_here_and_refreshed_where_not(
    published, trained_run, tmp_path, model_cards, monkeypatch, capsys
):
    cards = tmp_path / "model_cards"
    older = Path(shutil.copytree(published, cards / "older"))
    (older / "fusion.py").write_text("# older\n")
    facts = {key: value for key, value in asdict(FACTS).items() if value is not None}
    for name, run in (("made", str(trained_run)), ("older", str(tmp_path / "not-here"))):
        place = {"run": run, "repo": f"org/{name}", "output": str(cards / name)}
        (cards / f"{name}.yaml").write_text(yaml.safe_dump(place | facts))
    monkeypatch.setattr(model_cards, "CARDS", cards)
    monkeypatch.setattr(sys, "argv", ["model_cards.py", "--check"])
    assert model_cards.main() == 1
    assert "older: fusion.py differ from the package: make model-cards" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["model_cards.py"])
    assert model_cards.main() == 0
    said = capsys.readouterr().out
    assert "made: made anew" in said and "older: 1 modules refreshed" in said
    assert golden_problems(cards / "made") == outdated_code(cards / "older") == []


def test_a_folder_without_code_has_none_to_refresh(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "test_vit"}')
    assert outdated_code(tmp_path) == refresh_code(tmp_path) == []
