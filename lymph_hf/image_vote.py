"""The image vote: a classifier of single cells asks every cell of a patient, and the answers are counted.

It is the baseline of the two-stage recipe: what the first stage says of patients without a second one. The classifier
is that first stage (`image_vote`), or a linear one over the features of an encoder (`feature_vote`).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoImageProcessor, AutoModel

from .bags import BagDataset, build_bags, collate_bags
from .baselines import VOTE, Row, frozen_threshold, ordered_columns
from .cohort import Cohort
from .configuration_lymph import LymphMILConfig
from .evaluation import evaluation_patients, label_names
from .files import write_json, writing_folder
from .inference import outputs, write_table
from .lineage import learnt_images, refuse_known
from .metrics import bootstrap_intervals
from .modeling_lymph import LymphMILForBagClassification
from .options import CohortOptions, InferenceOptions
from .options_recipe import ImageVoteOptions
from .patient_data import read_checked
from .processing_lymph import LymphImageProcessor
from .reporting import scores_table
from .runs import Run, RunError
from .sampling import class_weights
from .splits import Split
from .training import make_accelerator

logger = logging.getLogger(__name__)

FOLDER = "image-vote"
VOTES = ("majority", "mean")
_THRESHOLDS = "thresholds.json"


class ImageVoteError(ValueError):
    """These cells cannot vote for these patients; the message says why."""


def votes(cells: np.ndarray) -> dict[str, np.ndarray]:
    """What the cells of one patient say together.

    Args:
        cells: (N, C), the probabilities of each cell, rows sum to 1; at least one cell.

    Returns:
        `majority`: (C,) the share of the cells for which a label is the most probable one (the first on a tie), so
        that 0.5 is the majority of two labels. `mean`: (C,) the mean probability. Either sums to 1.
    """
    counts = np.bincount(cells.argmax(axis=1), minlength=cells.shape[1])
    return {"majority": counts / len(cells), "mean": cells.mean(axis=0)}


def image_vote(cohort_options: CohortOptions, options: ImageVoteOptions, inference: InferenceOptions) -> dict[str, Any]:
    """Put the vote of a cell classifier beside a patient model; `lymph evaluate` then scores it on the same patients.

    The thresholds are chosen on the run's validation patients. Writes into the run: `image-vote/` (the classifier and
    its thresholds), `image-vote.json` (scores of these patients) and `image-vote.csv` (their votes).

    Args:
        cohort_options: the folder that the run was trained on.

    Returns:
        The content of `image-vote.json`.

    Raises:
        ImageVoteError: no classifier there, or one of other labels.
        LineageError: the classifier was trained on the run's validation or test patients.
        EvaluationError: the folder holds no validation patient of the run.
    """
    run = Run(Path(options.run))
    if not (run.model.is_dir() and run.cohort.is_file()):
        raise RunError(f"{options.run}: no finished run of lymph train, so there are no validation patients")
    accelerator = make_accelerator(inference)
    model, processor = read_classifier(options.classifier)
    wanted = label_names(AutoModel.from_pretrained(run.model).config)
    if set(model.config.label2id) != set(wanted):
        raise ImageVoteError(
            f"{options.classifier} tells {sorted(model.config.label2id)} apart and {options.run} {sorted(wanted)}; the "
            "vote needs lymph pretrain --objective patient-label on patients of the same labels"
        )
    cohort = read_checked(cohort_options, accelerator)
    _refuse_known_patients(options, cohort, run)
    cohort, note = evaluation_patients(cohort, run, "validation")
    cells = cell_probabilities(model, processor, cohort, accelerator, inference.workers, cohort_options.cache_dir)
    cells = [ordered_columns(rows, label_names(model.config), wanted) for rows in cells]
    labels = [wanted.index(patient.label) for patient in cohort.patients]
    thresholds = _thresholds(labels, cells)
    rows = _rows(cells, thresholds)
    report = {"patients": f"{note}, who also chose the thresholds: not a test", "n": len(labels), "votes": {}}
    for row in rows:
        intervals = bootstrap_intervals(
            labels, row.probabilities, threshold=row.threshold, resamples=options.resamples, seed=options.seed
        )
        scores = {name: interval.as_dict() for name, interval in intervals.items()}
        report["votes"][row.name] = {"threshold": row.threshold, "scores": scores}
        logger.info("%s\n%s", row.name, scores_table(intervals))
    if accelerator.is_main_process:
        with writing_folder(run.folder / FOLDER) as beside:
            model.save_pretrained(beside)
            processor.save_pretrained(beside)
            write_json(beside / _THRESHOLDS, thresholds)
        write_table(vote_table(cohort, rows, wanted), run.folder / f"{FOLDER}.csv")
        write_json(run.folder / f"{FOLDER}.json", report)
    return report


def vote_rows(
    run: Path,
    cohort: Cohort,
    config: LymphMILConfig,
    accelerator: Accelerator,
    *,
    workers: int = 0,
    cache_dir: str | None = None,
) -> list[Row]:
    """The image vote of a run over some patients, where the run has one.

    Args:
        run: folder of the run.
        cohort: checked patients.
        config: of the patient model, for the order of its labels.
    """
    if not (run / FOLDER).is_dir():
        return []
    model, processor = _load(run / FOLDER)
    thresholds = json.loads((run / FOLDER / _THRESHOLDS).read_text(encoding="utf-8"))
    cells = cell_probabilities(model, processor, cohort, accelerator, workers, cache_dir)
    return _rows([ordered_columns(rows, label_names(model.config), label_names(config)) for rows in cells], thresholds)


def feature_vote(features: Mapping[str, torch.Tensor], cohort: Cohort, split: Split, names: Sequence[str]) -> list[Row]:
    """The vote of a linear classifier of cells on the test patients of a split, in their order.

    A logistic regression learns the patient's label from each cell of the training patients. The cells of a patient
    weigh together as much as one patient, whatever their number, and all labels weigh the same. The validation
    patients choose the thresholds, the test patients nothing.

    Args:
        features: patient -> (N, D), of all patients of the split.
        cohort: holds the patients of the split, labelled.
        names: of the labels, in the order of their numbers.
    """

    def numbers(ids: Sequence[str]) -> list[int]:
        return [names.index(patient.label) for patient in cohort.select(ids).patients]

    labels, bags = numbers(split.train), [features[patient_id].numpy() for patient_id in split.train]
    sizes, balance = [len(bag) for bag in bags], class_weights(labels, len(names))
    weights = np.repeat([balance[label] / size for label, size in zip(labels, sizes, strict=True)], sizes)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    weighted = {f"{step}__sample_weight": weights for step, _ in classifier.steps}
    classifier.fit(np.concatenate(bags), np.repeat(labels, sizes), **weighted)
    validation, test = (
        [classifier.predict_proba(features[patient_id].numpy()) for patient_id in ids]
        for ids in (split.validation, split.test)
    )
    return _rows(test, _thresholds(numbers(split.validation), validation))


def read_classifier(source: str | Path) -> tuple[LymphMILForBagClassification, LymphImageProcessor]:
    """The classifier of single cells that `lymph pretrain` left in its run folder, and its image processor.

    Raises:
        ImageVoteError: there is none.
    """
    folder = Path(source) / "classifier"
    if not folder.is_dir():
        raise ImageVoteError(
            f"{source}: no classifier/ there; give a finished run of lymph pretrain --objective patient-label"
        )
    return _load(folder)


def cell_probabilities(
    model: LymphMILForBagClassification,
    processor: LymphImageProcessor,
    cohort: Cohort,
    accelerator: Accelerator,
    workers: int = 0,
    cache_dir: str | None = None,
) -> list[np.ndarray]:
    """(N, C) for each patient, in the order of the cohort: every cell passes the model as a bag of its own."""
    with accelerator.main_process_first():
        rows = build_bags(cohort, cache_dir=cache_dir)
    model = model.to(accelerator.device)
    found = [
        (index, output.logits.double().softmax(dim=-1).cpu().numpy())
        for index, output in outputs(
            model, BagDataset(rows, processor), accelerator, workers=workers, collate=_each_cell_alone
        )
    ]
    return [cells for _, cells in sorted(gather_object(found), key=lambda row: row[0])]


def vote_table(cohort: Cohort, rows: Sequence[Row], names: Sequence[str]) -> pd.DataFrame:
    """A row per patient: `patient_id`, `label`, `cells`, and of each vote the share of the positive label.

    More than two labels have a column `<vote>_<label>` each.
    """
    table = pd.DataFrame(
        {
            "patient_id": [patient.patient_id for patient in cohort.patients],
            "label": [patient.label for patient in cohort.patients],
            "cells": [len(patient.images) for patient in cohort.patients],
        }
    )
    for row in rows:
        vote = row.name.removeprefix(f"{VOTE}, ")
        shown = {vote: 1} if len(names) == 2 else {f"{vote}_{name}": column for column, name in enumerate(names)}
        for title, column in shown.items():
            table[title] = row.probabilities[:, column]
    return table


def _thresholds(labels: Sequence[int], cells: Sequence[np.ndarray]) -> dict[str, float]:
    """The threshold of each vote, chosen on these patients; 0.5 where it cannot be."""
    if len(cells) == 0:
        return dict.fromkeys(VOTES, 0.5)
    return {name: frozen_threshold(labels, np.stack([votes(rows)[name] for rows in cells])) for name in VOTES}


def _rows(cells: Sequence[np.ndarray], thresholds: dict[str, float]) -> list[Row]:
    counted = [votes(rows) for rows in cells]
    return [
        Row(f"{VOTE}, {name}", np.stack([patient[name] for patient in counted]), threshold)
        for name, threshold in thresholds.items()
    ]


def _each_cell_alone(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    cells = collate_bags(items)["pixel_values"]
    return {"pixel_values": cells, "bag_offsets": torch.arange(len(cells) + 1)}


def _load(folder: Path) -> tuple[LymphMILForBagClassification, LymphImageProcessor]:
    return AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)


def _refuse_known_patients(options: ImageVoteOptions, cohort: Cohort, run: Run) -> None:
    recorded = json.loads(run.cohort.read_text(encoding="utf-8"))["digests"]
    held_out = {digest for part in ("validation", "test") for digest in recorded[part]}
    ids = [p.patient_id for p in cohort.patients if not held_out.isdisjoint(cohort.digests[p.patient_id])]
    known = learnt_images(options.classifier)
    if known is None:
        raise ImageVoteError(f"{options.classifier}: no record of the images it was trained on")
    refuse_known(options.classifier, known[0], cohort.select(ids))
