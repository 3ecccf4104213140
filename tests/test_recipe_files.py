"""Recipes: one split for all stages, resume between and within them, and mistakes found before anything runs."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from lymph_hf import recipe_files
from lymph_hf.cohort import read_cohort, scan_images
from lymph_hf.options_recipe import RecipeOptions
from lymph_hf.recipe_files import RecipeFileError, read_recipe, run_recipe
from lymph_hf.runs import RunError
from lymph_hf.training import TrainingLoop

RECIPES = Path(__file__).parents[1] / "scripts" / "recipes"
SHARED = {"encoder": "test_vit", "image_size": 32, "epochs": 2, "tracker": "none", "cpu": True, "resamples": 100}
CELLS = {"command": "pretrain", "objective": "patient-label", "batch_size": 16, "micro_batch": 16, "probe_cells": 0}


def content(data, output, **changes) -> dict:
    return {
        "output": str(output),
        "split": {"validation_fraction": 0.3, "test_fraction": 0.2, "seed": 3},
        "shared": SHARED | {"data": str(data)},
        "stages": {
            "cells": CELLS | {"validation_fraction": 0.2},
            "patients": {"command": "train", "encoder_weights": "stage:cells", "batch_size": 4},
            "vote": {"command": "image-vote", "run": "stage:patients", "classifier": "stage:cells"},
            "test": {"command": "evaluate", "run": "stage:patients", "subset": "test"},
        },
    } | changes


def run(folder: Path, recipe: dict) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run_recipe(RecipeOptions(file=str(path)))


@pytest.fixture(scope="module")
def finished(cohort_folder, tmp_path_factory) -> Path:
    """The output of a two-stage recipe that has run to its end."""
    folder = tmp_path_factory.mktemp("recipes")
    return run(folder, content(cohort_folder, folder / "out"))


@pytest.fixture
def counted(monkeypatch):
    """Which commands run, in their order."""
    ran = []
    for name, kind in recipe_files.KINDS.items():

        def note(*options, name=name, kind=kind):
            ran.append(name)
            return kind.run(*options)

        replaced = recipe_files.Kind(note, kind.options, kind.trains, kind.product)
        monkeypatch.setitem(recipe_files.KINDS, name, replaced)
    return ran


# Stages -----------------------------------------------------------------------------------------------------


def test_every_stage_leaves_what_it_promises(finished):
    assert (finished / "cells" / "encoder" / "model.safetensors").is_file()
    assert (finished / "patients" / "lymph-mil" / "config.json").is_file()
    assert (finished / "patients" / "image-vote.json").is_file()
    rows = json.loads((finished / "test" / "metrics.json").read_text())["baselines"]
    assert list(rows) == ["clinical alone", "blend", "image vote, majority", "image vote, mean"]
    assert set(json.loads((finished / "recipe.json").read_text())["finished"]) == {"cells", "patients", "vote", "test"}


def test_no_stage_learns_from_patients_of_the_evaluation(finished, cohort_folder):
    """The predecessor's first stage saw the patients that its second one was scored on."""
    cohort = scan_images(read_cohort(cohort_folder), progress=False)
    split = json.loads((finished / "split.json").read_text())
    evaluated = {d for part in ("validation", "test") for i in split[part] for d in cohort.digests[i]}
    learnt = set(json.loads((finished / "cells" / "pretraining.json").read_text())["digests"])
    assert split["validation"]
    assert split["test"]
    assert learnt
    assert learnt.isdisjoint(evaluated)
    second = json.loads((finished / "patients" / "split.json").read_text())
    assert all(second[part] == split[part] for part in ("train", "validation", "test"))
    assert set(pd.read_csv(finished / "test" / "predictions.csv").patient_id) == set(split["test"])


def test_the_second_stage_starts_from_the_first(finished):
    settings = json.loads((finished / "patients" / "settings.json").read_text())
    assert settings["encoder_weights"] == str(finished / "cells" / "encoder")


def test_finished_stages_are_skipped(finished, cohort_folder, tmp_path, counted, caplog):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("model.safetensors")}
    with caplog.at_level("INFO", logger="lymph_hf"):
        run(tmp_path, content(cohort_folder, finished))
    assert scan_images(read_cohort(cohort_folder), progress=False).summary() in caplog.messages
    assert counted == []
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("model.safetensors")}


class PowerCutError(RuntimeError):
    """Stands for a power cut."""


def test_an_interrupted_recipe_goes_on_where_it_was(finished, cohort_folder, tmp_path, counted, monkeypatch):
    """In the second epoch of the second stage; the weights are those of the run that was not interrupted."""
    finish, calls = TrainingLoop._finish_epoch, []

    def fail(self):
        calls.append(1)
        if len(calls) == 4:
            raise PowerCutError
        finish(self)

    recipe = content(cohort_folder, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_finish_epoch", fail)
        with pytest.raises(PowerCutError):
            run(tmp_path, recipe)
    assert counted == ["pretrain", "train"]
    run(tmp_path, recipe)
    assert counted == ["pretrain", "train", "train", "image-vote", "evaluate"]
    first, second = (load_file(out / "patients/lymph-mil/model.safetensors") for out in (finished, tmp_path / "out"))
    assert all((tensor == second[name]).all() for name, tensor in first.items())


def test_changes_after_a_stage_are_refused(finished, cohort_folder, tmp_path):
    changed = content(cohort_folder, finished)
    changed["stages"]["patients"]["epochs"] = 5
    with pytest.raises(RecipeFileError, match=r"stage patients has finished with other settings \(epochs: 2 -> 5\)"):
        run(tmp_path, changed)
    with pytest.raises(RecipeFileError, match="another split"):
        run(tmp_path, content(cohort_folder, finished, split={"validation_fraction": 0.3, "seed": 4}))
    other = shutil.copytree(cohort_folder, tmp_path / "other")
    next(next((other / "images").iterdir()).iterdir()).unlink()
    recipe = content(other, finished)
    with pytest.raises((RecipeFileError, RunError), match=r"data: .*->|has changed since"):
        run(tmp_path, recipe)


def test_a_stage_on_an_older_one_is_not_passed_off_as_new(finished, cohort_folder, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "recipe.json").write_text((finished / "recipe.json").read_text().replace(str(finished), str(out)))
    shutil.rmtree(out / "cells")
    with pytest.raises(RecipeFileError, match=r"stage patients was trained on an earlier cells.*remove"):
        run(tmp_path, content(cohort_folder, out))


def test_an_evaluation_may_change_and_is_repeated_alone(finished, cohort_folder, tmp_path, counted):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "recipe.json").write_text((finished / "recipe.json").read_text().replace(str(finished), str(out)))
    changed = content(cohort_folder, out)
    changed["stages"]["test"]["subset"] = "validation"
    run(tmp_path, changed)
    assert counted == ["evaluate"]


# Mistakes ---------------------------------------------------------------------------------------------------


def set_in(recipe: dict, path: str, value) -> dict:
    *parents, last = path.split("/")
    table = recipe
    for name in parents:
        table = table[name]
    table[last] = value
    return recipe


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stage", {}, r"no section 'stage', did you mean 'stages'"),
        ("stages/cells/command", "pre-train", r"stage cells: no command 'pre-train', did you mean 'pretrain'"),
        ("stages/patients/epoch", 3, r"stage patients: no option of lymph train 'epoch', did you mean 'epochs'"),
        ("shared/lerning_rate", 1, r"shared: no option of any stage 'lerning_rate', did you mean 'learning_rate'"),
        ("stages/cells/epochs", "many", r"stage cells: .*invalid int value: 'many'"),
        ("stages/cells/objective", "patients", r"stage cells: .*invalid choice"),
        ("stages/patients/encoder_weights", "stage:cell", r"no earlier stage 'cell', did you mean 'cells'"),
        ("stages/cells/encoder_weights", "stage:patients", r"no earlier stage 'patients'.*before it come none"),
        ("stages/vote/classifier", "stage:patients", r"classifier needs a stage of pretrain; patients is one of train"),
        ("stages/patients/encoder", "stage:cells", r"encoder cannot be another stage"),
        ("stages/patients/split", "other.json", r"split cannot be set for one stage"),
        ("stages/patients/validation_fraction", 0.1, r"validation_fraction cannot be set for one stage"),
        ("stages/test/run", None, r"stage test: .*required: --run"),
        ("stages/test/data", "nowhere", r"stage test: data nowhere: no such file or folder"),
        ("split/fraction", 0.2, r"split: no option 'fraction'"),
        ("stages", {"cells": CELLS}, r"nobody to split"),
        ("stages/cells", 3, r"stage cells: expected a table"),
        ("output", None, r"no output"),
    ],
)
def test_mistakes_are_found_before_anything_runs(cohort_folder, tmp_path, counted, path, value, message):
    with pytest.raises(RecipeFileError, match=message):
        run(tmp_path, set_in(content(cohort_folder, tmp_path / "out"), path, value))
    assert counted == []
    assert not (tmp_path / "out").exists()


def test_ranges_are_checked_before_anything_runs(cohort_folder, tmp_path):
    recipe = content(cohort_folder, tmp_path / "out")
    recipe["stages"]["small"] = {"command": "distill", "teacher": ["stage:patients"], "alpha": 2.0}
    with pytest.raises(RecipeFileError, match=r"stage small: --alpha 2.0"):
        run(tmp_path, recipe)


def test_stages_of_different_patients_are_refused(cohort_folder, tmp_path):
    recipe = content(cohort_folder, tmp_path / "out")
    recipe["stages"]["more"] = {"command": "train", "data": str(tmp_path)}
    with pytest.raises(RecipeFileError, match=r"stage more: trains on .*a recipe has one split"):
        run(tmp_path, recipe)


@pytest.mark.parametrize("text", ["stages: [", "- 1", "stages: {a: {command: train}, a: {command: train}}"])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeFileError, match=r"cannot be read as a recipe|expected a table"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_can_be_checked_alone(cohort_folder, tmp_path, counted):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content(cohort_folder, tmp_path / "unused"), sort_keys=False))
    options = RecipeOptions(file=str(tmp_path / "recipe.yaml"), output=str(tmp_path / "out"), check=True)
    assert run_recipe(options) == tmp_path / "out"
    assert counted == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["single-stage", "two-stage", "mae"])
def test_the_recipes_that_come_with_it_are_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("data/demo", "data/demo-test"):
        (tmp_path / folder).mkdir(parents=True)
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    assert recipe.output == Path("runs") / name
    assert recipe.stages[-1].command == "evaluate"
