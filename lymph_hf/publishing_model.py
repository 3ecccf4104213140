"""A finished run -> the folder of its model: weights, code, card, figures and golden answers."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoImageProcessor, AutoModel

from .bags import BagDataset, build_bags
from .card import FIGURES, model_card
from .cohort import Cohort, read_cohort, scan_images
from .files import write_json, write_text
from .golden import golden_answers, write_golden
from .hub_push import PublishError
from .inference import infer
from .options import InferenceOptions
from .options_publish import CardOptions, PublishOptions
from .publication_checks import MODEL, prediction_problems, run_digests, run_identifiers
from .publishing_code import add_code
from .publishing_stage import Staged, refuse
from .runs import Run, RunError
from .training import make_accelerator


def stage_model(run: Run, folder: Path, options: PublishOptions, card: CardOptions) -> Staged:
    """The complete model of a run.

    Raises:
        CardError, PublishError, RunError: as in `publish`.
    """
    stage_run(run, folder, card, repo=options.repo, tag=options.tag)
    return Staged(
        folder,
        MODEL,
        identifiers=frozenset(run_identifiers(run)),
        digests=frozenset(run_digests(run)),
        notes=(check_predictions(run, options),),
    )


def stage_run(run: Run, folder: Path, card: CardOptions, *, repo: str, tag: str) -> Path:
    """Put together what is published of a run: model, code, card, figures and golden answers; nothing else of it.

    Returns:
        The folder, which loads with `from_pretrained`.

    Raises:
        CardError: as in `publish`.
        RunError: the model of the run cannot be loaded.
    """
    text = str(model_card(run, card, repo=repo, tag=tag))
    for path in run.model.iterdir():
        shutil.copyfile(path, folder / path.name)
    try:
        model = AutoModel.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{run.model} cannot be loaded: {error}") from error
    add_code(model, processor, folder)
    add_card(run, folder, text)
    write_golden(folder, golden_answers(model, processor))
    return folder


def add_card(run: Run, folder: Path, text: str) -> None:
    """Write the card, with the figures of the run that it shows, and the scores of held-out patients for programs."""
    write_text(folder / "README.md", text)
    metrics = run.folder / "metrics.json"
    if metrics.exists():
        write_json(folder / "evaluation.json", _published_scores(json.loads(metrics.read_text(encoding="utf-8"))))
    for figure in FIGURES.values():
        if figure in text:
            shutil.copyfile(run.folder / figure, folder / figure)


def _published_scores(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of `metrics.json` the scores and counts; neither the name of the data nor groups, which may be single patients.

    Four decimals: a longer fraction could be taken for a patient's number.
    """
    kept = {name: report[name] for name in ("n", "n_per_label", "interval")}
    kept["threshold"] = _rounded(report["threshold"])
    scores = {
        name: {bound: _rounded(interval[bound]) for bound in ("value", "low", "high")}
        for name, interval in report["scores"].items()
    }
    return kept | {"scores": scores}


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)


def check_predictions(run: Run, options: PublishOptions) -> str:
    """Let the model of a run predict the patients at hand anew.

    Returns:
        What was reproduced, in words.

    Raises:
        PublishError: the stored predictions are not reproduced, or the data are those of none.
    """
    if options.data is None:
        return "The stored predictions were not reproduced, as the patients are not at hand: pass --data to do so."
    settings = json.loads(run.settings.read_text(encoding="utf-8"))
    cohort = read_cohort(options.data, reference_date=options.reference_date or settings["reference_date"])
    cohort = scan_images(cohort)
    name, table = _stored_table(run, cohort, options.data)
    model, processor = AutoModel.from_pretrained(run.model), AutoImageProcessor.from_pretrained(run.model)
    rows = build_bags(cohort.select(table["patient_id"]), cache_dir=options.cache_dir)
    precision = _recorded_precision(run, name)
    accelerator = make_accelerator(InferenceOptions(cpu=True, mixed_precision=precision))
    probabilities = infer(accelerator.prepare(model), BagDataset(rows, processor), accelerator).probabilities
    columns = [f"probability_{model.config.id2label[i]}" for i in range(model.config.num_labels)]
    if "probability" in table:
        columns, probabilities = ["probability"], probabilities[:, 1:]
    refuse([f"{name}: {problem}" for problem in prediction_problems(table, probabilities, columns, precision)])
    return f"The model reproduces the {len(table)} predictions of {name}."


def _recorded_precision(run: Run, name: str) -> str:
    """The precision in which a table of predictions was computed."""
    trained = name == "validation.csv"
    path, key = (run.settings, "mixed_precision") if trained else (run.folder / "metrics.json", "precision")
    return json.loads(path.read_text(encoding="utf-8")).get(key, "no")


def _stored_table(run: Run, cohort: Cohort, data: str) -> tuple[str, pd.DataFrame]:
    """The predictions whose patients these are, recognised by name and number of cells."""
    cells = {patient.patient_id: len(patient.images) for patient in cohort.patients}
    for name in ("validation.csv", "predictions.csv"):
        path = run.folder / name
        if path.exists():
            table = pd.read_csv(path, dtype={"patient_id": str})
            if all(cells.get(row.patient_id) == row.cells for row in table.itertuples()):
                return name, table
    raise PublishError(f"--data {data}: these are not the patients of validation.csv or predictions.csv of the run.")
