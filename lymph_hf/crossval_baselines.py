"""What a network has to beat in its own folds: each baseline is fitted on a fold's training patients alone."""

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from .baselines import Row
from .clinical import ClinicalSettings
from .clinical_baseline import clinical_baseline
from .cohort import Cohort
from .features import cached_features
from .files import write_json
from .image_vote import feature_vote
from .inference import prediction_table, write_table
from .options import InferenceOptions
from .patient_models import load_model
from .splits import Split
from .training import make_accelerator

logger = logging.getLogger(__name__)

RECORD = "baselines.json"


@dataclass(frozen=True)
class Case:
    """A trained fold.

    Attributes:
        run: its folder, with the model.
        cohort: checked; holds the patients of the split.
        split: its test patients are the fold.
        label_names: in the order of their numbers.
        inference: how the encoder is run.
        feature_cache: what keeps its features, if anything does.
        seed: of what is random.
    """

    run: Path
    cohort: Cohort
    split: Split
    label_names: tuple[str, ...]
    inference: InferenceOptions
    feature_cache: str | None = None
    seed: int = 0


def _bag_size(case: Case) -> list[Row]:
    """The number of images alone: where it tells the labels apart, a network may have learnt how a smear was taken."""
    settings = ClinicalSettings(features=("cells",), seed=case.seed)
    baseline = clinical_baseline(case.cohort, case.split, settings, label_names=case.label_names)
    return [Row("bag size", baseline.probabilities["test"], baseline.model.decision_threshold)]


def _image_vote(case: Case) -> list[Row]:
    """Each cell alone: what a network gains by looking at the cells of a patient together."""
    model, processor = load_model(case.run)
    patients = case.cohort.select((*case.split.train, *case.split.validation, *case.split.test))
    kept = tempfile.TemporaryDirectory() if case.feature_cache is None else nullcontext(case.feature_cache)
    with kept as folder:
        features = cached_features(
            model,
            processor,
            patients,
            folder,
            accelerator=make_accelerator(case.inference),
            chunk_size=model.config.chunk_size,
            workers=case.inference.workers,
        )
        return feature_vote(features, patients, case.split, case.label_names)


BASELINES: dict[str, Callable[[Case], list[Row]]] = {"bag_size": _bag_size, "image_vote": _image_vote}


def write_baselines(names: Sequence[str], case: Case) -> None:
    """Fit the baselines that the fold has not yet, and write what they say of its patients.

    `<row>-test.csv` holds the predictions of a row, `baselines.json` the baselines that are done: name -> row -> frozen
    threshold.

    Args:
        names: in `BASELINES`.
    """
    done = read_baselines(case.run)
    tested = case.cohort.select(case.split.test).patients
    for name in names:
        if name in done:
            continue
        rows = BASELINES[name](case)
        for row in rows:
            table = prediction_table(
                [patient.patient_id for patient in tested],
                row.probabilities,
                [len(patient.images) for patient in tested],
                label_names=case.label_names,
                threshold=row.threshold,
                labels=[patient.label for patient in tested],
            )
            write_table(table, row_file(case.run, row.name))
        done[name] = {row.name: row.threshold for row in rows}
        write_json(case.run / RECORD, done)
        logger.info("Baseline: %s", ", ".join(done[name]))


def read_baselines(run: Path) -> dict[str, dict[str, float]]:
    """The baselines that a fold has: name -> row -> its frozen threshold."""
    record = run / RECORD
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


def row_file(run: Path, row: str) -> Path:
    """What a row says of the fold's patients."""
    return run / f"{row_slug(row)}-test.csv"


def row_slug(row: str) -> str:
    """The name of a row in names of files: "image vote, mean" -> "image-vote-mean", "clinical alone" -> "clinical"."""
    return row.removesuffix(" alone").replace(", ", "-").replace(" ", "-")
