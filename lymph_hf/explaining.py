"""From a trained model and a folder of patients to explanations: tables, galleries, and a judgement of the rankings."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from .clinical_table import CohortError
from .cohort import CLINICAL, Cohort, Patient, read_cohort, scan_images
from .explain import Explanation, explain_bag
from .explain_maps import cell_maps
from .explain_quality import (
    JudgementError,
    PatientJudgement,
    curve_shares,
    guilty_types,
    judge_patient,
    judgement_intervals,
    judgement_table,
)
from .files import write_json, writing_folder
from .images import open_cell_image
from .inference import write_table
from .metrics import Bootstrap, decide
from .options import CohortOptions
from .options_explain import ExplainOptions, JudgeOptions
from .patient_models import load_model
from .processing_lymph import LymphImageProcessor
from .reporting_explain import Gallery, ShownCell, gallery_figure, judgement_figure

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Explainer:
    """A model with what it takes to explain a patient of a cohort."""

    model: nn.Module
    processor: LymphImageProcessor
    options: ExplainOptions

    @property
    def target(self) -> int | None:
        """Number of the label to explain.

        Raises:
            ValueError: the model has no such label.
        """
        names = self.model.config.label2id
        if self.options.label is None:
            return None
        if self.options.label not in names:
            raise ValueError(f"--label {self.options.label!r}: the model's labels are {', '.join(sorted(names))}.")
        return names[self.options.label]

    def inputs(self, pictures: Sequence[Image.Image], patient: Patient) -> dict[str, torch.Tensor]:
        """What the model takes."""
        return dict(self.processor(pictures, {name: getattr(patient, name) for name in CLINICAL}))


def explain(cohort_options: CohortOptions, options: ExplainOptions, judging: JudgeOptions) -> Path:
    """Explain patients of a folder, or judge the rankings of their cells, or both.

    Writes for each patient `<output>/<patient_id>/` with `explanation.json`, `cells.csv` and `gallery.png`; for the
    judgement `judgement.json`, `judgement.csv` and `judgement.png` in `<output>`.

    Returns:
        The output folder.

    Raises:
        ValueError: nobody is named, an unknown patient or label, or cell types that do not fit the patients.
    """
    if not (options.patient or options.all or judging.judge):
        raise ValueError("Nobody to explain: name patients with --patient, or give --all or --judge cells.csv.")
    if options.shown < 1:
        raise ValueError(f"--shown {options.shown}: expected at least 1.")
    model, processor = load_model(options.run)
    explainer = Explainer(model.eval(), processor, options)
    cohort = read_cohort(cohort_options.data, reference_date=cohort_options.reference_date)
    named = cohort.select(options.patient) if options.patient else cohort
    output = Path(options.output)
    if options.patient or options.all:
        named = scan_images(named, strict=cohort_options.strict)
        for patient in tqdm(named.patients, desc="explanations", disable=None):
            _explain_patient(explainer, patient, output / patient.patient_id)
        logger.info("%d patients explained: %s", len(named.patients), output)
    if judging.judge:
        _judge(explainer, scan_images(named, strict=cohort_options.strict), judging, output)
    return output


def _explain_patient(explainer: Explainer, patient: Patient, folder: Path) -> None:
    pictures = [open_cell_image(path).image for path in patient.images]
    inputs = explainer.inputs(pictures, patient)
    options = explainer.options
    explanation = explain_bag(
        explainer.model, inputs, target=explainer.target, effect=options.effect, seed=options.seed
    )
    shown = _shown(explanation, options.shown)
    maps = None if options.maps == "none" else _maps(explainer, inputs, explanation, [*shown[0], *shown[1]])
    table = _cell_table(patient, explanation)
    summary = _summary(explainer, patient, explanation)
    with writing_folder(folder) as beside:
        write_table(table, beside / "cells.csv")
        write_json(beside / "explanation.json", summary)
        gallery_figure(_gallery(explainer, summary, explanation, pictures, shown, maps), beside / "gallery.png")


def _shown(explanation: Explanation, number: int) -> tuple[list[int], list[int]]:
    """Positions of the strongest cells for the target and of the strongest against it; none in both."""
    ranking = explanation.ranking().tolist()
    half = min(number, math.ceil(len(ranking) / 2))
    return ranking[:half], ranking[half:][::-1][:number]


def _maps(explainer: Explainer, inputs: dict, explanation: Explanation, cells: list[int]) -> dict[int, np.ndarray]:
    drawn = cell_maps(
        explainer.model,
        inputs["pixel_values"],
        cells,
        target=explanation.target,
        clinical=inputs.get("clinical"),
        cell_embeddings=explanation.cell_embeddings,
        method=explainer.options.maps,
    )
    return dict(zip(cells, drawn, strict=True))


def _cell_table(patient: Patient, explanation: Explanation) -> pd.DataFrame:
    """One row per cell, strongest evidence for the label first: `rank`, `file`, `effect`, `attention`."""
    attentions = explanation.attentions
    table = pd.DataFrame(
        {
            "file": [path.name for path in patient.images],
            "effect": explanation.effects,
            "attention": math.nan if attentions is None else attentions,
        }
    ).iloc[explanation.ranking()]
    table.insert(0, "rank", range(1, len(table) + 1))
    return table


def _summary(explainer: Explainer, patient: Patient, explanation: Explanation) -> dict[str, Any]:
    """`explanation.json`."""
    config = explainer.model.config
    probabilities = explanation.probabilities.tolist()
    two = len(probabilities) == 2
    decided = int(decide(explanation.probabilities[None], threshold=config.decision_threshold)[0])
    return {
        "patient_id": patient.patient_id,
        "cells": len(patient.images),
        "label": config.id2label[explanation.target],
        "probabilities": {config.id2label[i]: probability for i, probability in enumerate(probabilities)},
        "decision_threshold": config.decision_threshold if two else None,
        "predicted_label": config.id2label[decided],
        "prediction_set": config.prediction_set(probabilities),
        "clinical": {
            name: {"value": getattr(patient, name), "effect": effect}
            for name, effect in explanation.clinical_effects.items()
        },
        "effect": explainer.options.effect,
        "maps": explainer.options.maps,
    }


def _gallery(
    explainer: Explainer,
    summary: dict[str, Any],
    explanation: Explanation,
    pictures: Sequence[Image.Image],
    shown: tuple[list[int], list[int]],
    maps: dict[int, np.ndarray] | None,
) -> Gallery:
    size = explainer.processor.size
    sides = (size["width"], size["height"])

    def cell(position: int) -> ShownCell:
        return ShownCell(
            picture=np.asarray(pictures[position].convert("RGB").resize(sides)),
            effect=float(explanation.effects[position]),
            attention=None if explanation.attentions is None else float(explanation.attentions[position]),
            evidence=None if maps is None else maps[position],
        )

    return Gallery(
        patient_id=summary["patient_id"],
        cells=summary["cells"],
        label=summary["label"],
        probability=summary["probabilities"][summary["label"]],
        threshold=_threshold(explanation.target, summary["decision_threshold"]),
        predicted_label=summary["predicted_label"],
        prediction_set=summary["prediction_set"],
        clinical={name: (value["value"], value["effect"]) for name, value in summary["clinical"].items()},
        speaking_for=[cell(position) for position in shown[0]],
        speaking_against=[cell(position) for position in shown[1]],
    )


def _threshold(target: int, threshold: float | None) -> float | None:
    """On the scale of P(target): the model's threshold is one of label 1."""
    return threshold if threshold is None or target == 1 else 1 - threshold


def _judge(explainer: Explainer, cohort: Cohort, options: JudgeOptions, output: Path) -> None:
    if options.judge_label is not None:
        ids = [patient.patient_id for patient in cohort.patients if patient.label == options.judge_label]
        if not ids:
            raise JudgementError(
                f"--judge-label {options.judge_label!r}: the cohort has {', '.join(cohort.label_names)}."
            )
        cohort = cohort.select(ids)
    table = _cell_types(Path(options.judge))
    guilty = guilty_types((kind for kind in table.values() if kind), options.positive or [])
    types = _types_of(cohort, table, Path(options.judge))
    judged = dict(_judgements(explainer, cohort, types, guilty))
    rows = pd.DataFrame(
        [
            {"patient_id": patient_id, "ranking": ranking, **scores}
            for patient_id, judgement in judged.items()
            for ranking, scores in judgement.rows.items()
        ]
    )
    bootstrap = Bootstrap(options.resamples, seed=explainer.options.seed)
    intervals = judgement_intervals(rows, bootstrap)
    report = {
        "data": cohort.root.name,
        "label": explainer.options.label,
        "positive_types": sorted(guilty),
        "patients": len(judged),
        "patients_with_both_kinds": int(rows.groupby("patient_id")["auroc"].first().notna().sum()),
        "interval": f"95% percentile bootstrap over patients, {options.resamples} resamples",
        "rankings": {
            ranking: {score: interval.as_dict() for score, interval in scores.items()}
            for ranking, scores in intervals.items()
        },
    }
    write_table(rows, output / "judgement.csv")
    write_json(output / "judgement.json", report)
    judgement_figure(_mean_curves(list(judged.values())), *curve_shares(), output / "judgement.png")
    logger.info("%d patients; types that speak for the label: %s", len(judged), "; ".join(sorted(guilty)))
    logger.info("%s", judgement_table(intervals))


def _judgements(
    explainer: Explainer, cohort: Cohort, types: dict[str, list[str | None]], guilty: set[str]
) -> Iterator[tuple[str, PatientJudgement]]:
    for patient in tqdm(cohort.patients, desc="judging", disable=None):
        own = [math.nan if kind is None else float(kind in guilty) for kind in types[patient.patient_id]]
        inputs = explainer.inputs([open_cell_image(path).image for path in patient.images], patient)
        seed = explainer.options.seed
        yield (
            patient.patient_id,
            judge_patient(explainer.model, inputs, np.array(own), target=explainer.target, seed=seed),
        )


def _cell_types(path: Path) -> dict[tuple[str, str], str | None]:
    """(patient, file) -> cell type, `None` where it is not known.

    Raises:
        CohortError: the table lacks a column, or names an image twice.
    """
    table = pd.read_csv(path, dtype=str)
    if missing := {"patient_id", "file", "cell_type"} - set(table.columns):
        raise CohortError(f"{path}: no column {', '.join(sorted(missing))}; expected patient_id, file, cell_type.")
    if (twice := table.duplicated(["patient_id", "file"])).any():
        first = table[twice].iloc[0]
        raise CohortError(f"{path}: image {first['file']} of patient {first['patient_id']} stands twice; name it once.")
    types = table["cell_type"].astype(object).where(table["cell_type"].notna(), None)
    return dict(zip(zip(table["patient_id"], table["file"], strict=True), types, strict=True))


def _types_of(cohort: Cohort, table: dict[tuple[str, str], str | None], path: Path) -> dict[str, list[str | None]]:
    """Patient -> type of each image, in the order of `Patient.images`.

    Raises:
        CohortError: the table knows none of the images.
    """
    found = {
        patient.patient_id: [table.get((patient.patient_id, image.name)) for image in patient.images]
        for patient in cohort.patients
    }
    if not any(kind for kinds in found.values() for kind in kinds):
        raise CohortError(f"{path}: knows no image of {cohort.root}; is it the table of another cohort?")
    return found


def _mean_curves(judged: Sequence[PatientJudgement]) -> dict[str, dict[str, np.ndarray]]:
    """`deletion` and `insertion` -> ranking -> mean over patients (10,)."""
    return {
        kind: {name: np.mean([getattr(j, kind)[name] for j in judged], axis=0) for name in getattr(judged[0], kind)}
        for kind in ("deletion", "insertion")
    }
