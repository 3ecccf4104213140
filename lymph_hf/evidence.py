"""What a reviewer asks beside the scores of an evaluation: subgroups, benefit, calibration, cells behind answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .baselines import BLENDED, CLINICAL_ALONE, NETWORK, Row
from .calibration import shift_prevalence
from .cohort import CLINICAL, Cohort, Patient
from .configuration_lymph import LymphMILConfig
from .evaluation import label_names
from .images import open_cell_image
from .inference import Inference, write_table
from .metrics import Bootstrap, Interval, decide
from .metrics_decision import decision_curve
from .metrics_subgroups import clinical_groups, subgroup_scores
from .reporting import gallery
from .reporting_evidence import calibration_figure, curves_figure, decision_curve_figure, subgroup_figure

ATTENTIONS = "attentions.csv"
CELLS_PER_PATIENT = 8
PATIENTS_PER_ANSWER = 3


def write_evidence(
    folder: Path,
    cohort: Cohort,
    predictions: Inference,
    config: LymphMILConfig,
    *,
    rows: Sequence[Row] = (),
    auroc: Interval | None = None,
    prevalence: float | None = None,
    bootstrap: Bootstrap | None = None,
) -> dict[str, Any]:
    """Draw the evidence into `folder`, and return what of it belongs into `metrics.json`.

    `curves.png`, `decision-curve.png`, `calibration.png` and `subgroups.png` of a model of two labels whose patients
    have both; `cells.png`, the cells with the most weight in patients answered rightly and wrongly, of any model. The
    figures name no patient; `cells.csv` says whose cells are shown.

    Args:
        cohort: the scored patients, in the order of the predictions.
        rows: other predictions of the same patients, drawn beside the network.
        auroc: of all patients, drawn behind the subgroups.
        prevalence: share of positive patients where the model is to be used; `None` = as in the sample.
    """
    labels = np.array([config.label2id[patient.label] for patient in cohort.patients])
    bootstrap = bootstrap or Bootstrap()
    folder.mkdir(parents=True, exist_ok=True)
    decided = decide(predictions.probabilities, threshold=config.decision_threshold)
    cells_figure(
        folder / "cells.png",
        cohort,
        labels,
        predictions.probabilities,
        predictions.attentions,
        decided=decided,
        names=label_names(config),
    )
    if config.num_labels != 2 or len(set(labels.tolist())) != 2:
        return {}
    by_name = {NETWORK: predictions.probabilities} | {row.name: row.probabilities for row in rows}
    # The frozen threshold is one of probabilities that are not moved to a prevalence.
    threshold = config.decision_threshold if prevalence is None else None
    probability_figures(
        folder,
        labels,
        by_name,
        positive=config.id2label[1],
        threshold=threshold,
        prevalence=prevalence,
        bootstrap=bootstrap,
    )
    groups = known_groups(cohort)
    if not groups:
        return {}
    subgroups = subgroup_scores(
        labels, predictions.probabilities, groups, threshold=config.decision_threshold, bootstrap=bootstrap
    )
    subgroup_figure(subgroups, folder / "subgroups.png", positive=config.id2label[1], overall=auroc)
    return {"subgroups": [group.as_dict() for group in subgroups]}


def probability_figures(
    folder: Path,
    labels: np.ndarray,
    by_name: Mapping[str, np.ndarray],
    *,
    positive: str,
    threshold: float | None = None,
    prevalence: float | None = None,
    bootstrap: Bootstrap | None = None,
) -> None:
    """`curves.png`, `calibration.png` and `decision-curve.png` of predictions of patients with both of two labels.

    Args:
        by_name: name -> probabilities (n, 2), the network first.
        positive: name of the second label.
        threshold: to be marked in the decision curve.
        prevalence: to move the probabilities to, for the decision curve.
    """
    curves_figure(labels, by_name, folder / "curves.png", positive=positive, bootstrap=bootstrap)
    network = {name: by_name[name] for name in list(by_name)[:1]}
    calibration_figure(labels, network, folder / "calibration.png", positive=positive, bootstrap=bootstrap)
    # Nobody would decide by the number of images or the vote of the cells.
    by_name = {name: by_name[name] for name in (NETWORK, CLINICAL_ALONE, BLENDED) if name in by_name}
    if prevalence is not None:
        sample = float(labels.mean())
        by_name = {name: shift_prevalence(p, of_sample=sample, to=prevalence) for name, p in by_name.items()}
    curves = {
        name: decision_curve(labels, p, prevalence=prevalence, bootstrap=bootstrap) for name, p in by_name.items()
    }
    title = f"Decision curve, n = {len(labels)} patients"
    decision_curve_figure(curves, folder / "decision-curve.png", threshold=threshold, title=title)


def known_groups(cohort: Cohort) -> dict[str, list[str]]:
    """`clinical_groups` of the variables that at least one patient has a value of."""
    values = {name: [getattr(patient, name) for patient in cohort.patients] for name in CLINICAL}
    numbers = {
        name: [np.nan if value is None else value for value in values[name]] for name in ("age", "lymphocyte_count")
    }
    groups = clinical_groups(numbers["age"], values["sex"], numbers["lymphocyte_count"])
    recorded = {name.replace("_", " ") for name in CLINICAL if any(value is not None for value in values[name])}
    return {name: of_patient for name, of_patient in groups.items() if name in recorded}


def write_attentions(path: Path, cohort: Cohort, attentions: Sequence[np.ndarray]) -> None:
    """A row per cell, `patient_id`, `file`, `attention`, so that cells can be drawn where the model is not at hand.

    Args:
        cohort: the patients, in the order of the attentions.
        attentions: for each patient the weights of its cells, (N,).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(
        [(p.patient_id, image.name) for p in cohort.patients for image in p.images], columns=["patient_id", "file"]
    )
    write_table(table.assign(attention=np.concatenate(attentions)), path)


def mean_attentions(paths: Sequence[Path], cohort: Cohort) -> list[np.ndarray]:
    """What `write_attentions` wrote, for each patient (N,), averaged over the files that hold it."""
    text = {"patient_id": str, "file": str}
    table = pd.concat([pd.read_csv(path, dtype=text, keep_default_na=False) for path in paths])
    weights = table.groupby(["patient_id", "file"])["attention"].mean()
    return [
        weights.loc[[(p.patient_id, image.name) for image in p.images]].to_numpy(dtype=float) for p in cohort.patients
    ]


def cells_figure(
    path: Path,
    cohort: Cohort,
    labels: np.ndarray,
    probabilities: np.ndarray,
    attentions: Sequence[np.ndarray],
    *,
    decided: np.ndarray,
    names: Sequence[str],
) -> None:
    """The cells with the most weight, of the patients answered most surely rightly and most surely wrongly.

    The figure goes into the page, which is passed on: it numbers the patients, and `cells.csv` beside it says who they
    are.

    Args:
        cohort: the patients, in the order of all that follows.
        labels, decided: (n,) integers in 0..C-1.
        probabilities: (n, C).
        attentions: for each patient the weights of its cells, (N,).
        names: of the labels, in the order of their numbers.
    """
    sure = probabilities[np.arange(len(labels)), decided]
    images, captions, shown = [], [], []
    for right in (True, False):
        answered = np.flatnonzero((decided == labels) == right)
        for index in answered[np.argsort(-sure[answered], kind="stable")][:PATIENTS_PER_ANSWER]:
            patient, weights = cohort.patients[index], attentions[index]
            said = names[decided[index]]
            shown.append((len(shown) + 1, patient.patient_id, patient.label, said))
            strongest = np.argsort(-weights, kind="stable")[:CELLS_PER_PATIENT]
            for cell in strongest:
                images.append(_cell(patient, int(cell)))
                answer = f"patient {len(shown)}, {'right' if right else 'WRONG'}:\ncalled {said}"
                captions.append(f"{answer}\nweight {weights[cell]:.3f}")
            empty = CELLS_PER_PATIENT - len(strongest)  # each patient has a row
            images += [None] * empty
            captions += [""] * empty
    gallery(images, captions, path, columns=CELLS_PER_PATIENT, title="Cells with the most weight, surest answers first")
    columns = ["number", "patient_id", "label", "predicted_label"]
    write_table(pd.DataFrame(shown, columns=columns), path.with_suffix(".csv"))


def _cell(patient: Patient, index: int):
    return open_cell_image(patient.images[index]).image
