"""Scoring of a trained model: which patients count, their scores, and the files that tell them."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .calibration import Conformal, abstention_intervals
from .cohort import Cohort
from .configuration_lymph import LymphMILConfig
from .decisions import decisions
from .files import write_json
from .inference import prediction_table, write_table
from .metrics import Bootstrap, bootstrap_intervals
from .metrics_summary import clinical_intervals
from .reporting import evaluation_figure, scores_table
from .runs import Run

logger = logging.getLogger(__name__)


class EvaluationError(ValueError):
    """There is nobody to score; the message says why."""


def evaluation_patients(cohort: Cohort, run: Run, subset: str) -> tuple[Cohort, str]:
    """The labelled patients to score, and a sentence that says who they are.

    Patients of the run are recognised by their images, not by their names: two cohorts may both have a P1.

    Args:
        cohort: checked, so that it has digests.
        run: whose training patients are to be left out; a folder without a run leaves none out.
        subset: as in `EvaluateOptions`.

    Raises:
        EvaluationError: nobody is left.
    """
    labelled = [patient.patient_id for patient in cohort.labelled]
    if not run.cohort.exists():
        chosen, note = (
            labelled,
            "all labelled patients of the folder (what the model was trained on is not known)",
        )
    else:
        of_part = {part: set(digests) for part, digests in json.loads(run.cohort.read_text())["digests"].items()}
        seen = {
            part: [patient_id for patient_id in labelled if not digests.isdisjoint(cohort.digests[patient_id])]
            for part, digests in of_part.items()
        }
        chosen, note = _subset(labelled, seen, subset)
    if not chosen:
        raise EvaluationError(
            f"{cohort.root}: no labelled patient to evaluate (--subset {subset}, {len(labelled)} labelled)."
        )
    return cohort.select(chosen), note


def _subset(labelled: list[str], seen: dict[str, list[str]], subset: str) -> tuple[list[str], str]:
    trained, chose = len(seen["train"]), len(seen["validation"])
    if subset == "all":
        return (
            labelled,
            f"all labelled patients of the folder, {trained} training patients of the run among them",
        )
    if subset != "held-out":
        return seen[subset], f"{subset} patients of the run"
    held_out = [patient_id for patient_id in labelled if patient_id not in set(seen["train"])]
    validated = f"{chose} validation patients, who chose epoch and threshold, are among them"
    return (
        held_out,
        f"held-out patients ({trained} training patients left out; {validated if chose else 'no validation patient'})",
    )


def score_report(
    labels: Sequence[int],
    probabilities: np.ndarray,
    config: LymphMILConfig,
    *,
    prevalence: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores with intervals at the model's frozen threshold, and how many patients they rest on.

    Args:
        labels, probabilities: (n,) and (n, C).
        config: of the model.
        prevalence: share of positive patients where the model is to be used, for PPV and NPV.
        resamples, seed: of the bootstrap over patients.
    """
    threshold = config.decision_threshold
    intervals = bootstrap_intervals(labels, probabilities, threshold=threshold, resamples=resamples, seed=seed)
    bootstrap = Bootstrap(resamples, seed=seed)
    if config.num_labels == 2:
        intervals |= clinical_intervals(
            labels, probabilities, threshold=threshold, prevalence=prevalence, bootstrap=bootstrap
        )
    if config.conformal is not None:
        conformal = Conformal.from_dict(config.conformal)
        intervals |= abstention_intervals(labels, probabilities, conformal, bootstrap=bootstrap)
    counts = np.bincount(labels, minlength=config.num_labels).tolist()
    return {
        "n": len(labels),
        "n_per_label": {config.id2label[i]: count for i, count in enumerate(counts)},
        "threshold": threshold if config.num_labels == 2 else None,
        "prevalence": prevalence,
        "interval": f"95% percentile bootstrap over patients, {resamples} resamples, seed {seed}",
        "scores": intervals,
    }


def write_evaluation(
    folder: Path,
    cohort: Cohort,
    probabilities: np.ndarray,
    config: LymphMILConfig,
    report: dict[str, Any],
    *,
    stem: str,
    bootstrap: Bootstrap | None = None,
) -> None:
    """`metrics.json`, `predictions.csv`, `evaluation.png`; for the validation patients `validation.*`.

    Args:
        bootstrap: of the figure's band; `None` means `Bootstrap()`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    intervals = report["scores"]
    names = {"metrics": ("predictions.csv", "evaluation.png")}.get(stem, (f"{stem}.csv", f"{stem}.png"))
    labels = [config.label2id[patient.label] for patient in cohort.patients]
    table = patient_table(cohort, probabilities, config, with_labels=True)
    write_table(table, folder / names[0])
    evaluation_figure(
        labels,
        probabilities,
        folder / names[1],
        threshold=config.decision_threshold,
        label_names=label_names(config),
        intervals=intervals,
        bootstrap=bootstrap,
    )
    report["scores"] = {name: interval.as_dict() for name, interval in intervals.items()}
    write_json(folder / f"{stem}.json", report)
    logger.info("%s (n = %d)\n%s", report["patients"], report["n"], scores_table(intervals))


def patient_table(
    cohort: Cohort, probabilities: np.ndarray, config: LymphMILConfig, *, with_labels: bool = False
) -> pd.DataFrame:
    """`inference.prediction_table` of the patients of a cohort."""
    return prediction_table(
        [patient.patient_id for patient in cohort.patients],
        probabilities,
        [len(patient.images) for patient in cohort.patients],
        label_names=label_names(config),
        threshold=config.decision_threshold,
        labels=[patient.label for patient in cohort.patients] if with_labels else None,
        decisions=decisions(probabilities, config),
    )


def label_names(config: LymphMILConfig) -> list[str]:
    """Names in the order of the labels' numbers."""
    return [config.id2label[i] for i in range(config.num_labels)]
