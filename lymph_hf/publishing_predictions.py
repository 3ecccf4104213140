"""Do the weights that are about to leave still say what the run wrote down of its patients?"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import Accelerator
from transformers import PreTrainedModel

from .bags import BagDataset, build_bags
from .cohort import Cohort, read_cohort, scan_images
from .hub_push import PublishError
from .inference import outputs
from .options import InferenceOptions
from .options_publish import PublishOptions
from .processing_lymph import LymphImageProcessor
from .publication_checks import prediction_problems
from .publishing_code import load_published
from .publishing_stage import refuse
from .runs import Run
from .training import make_accelerator

TOLERANCE = 1e-3  # of a probability, for rounding in 32 bits
HALF_TOLERANCE = 1e-2  # more, for each rounding to 16 bits: of activations, of weights


@dataclass(frozen=True)
class Stored:
    """A table of predictions.

    Attributes:
        name: of the file.
        table: a row per patient; of a cross-validation a row per patient and repeat, with `fold`.
        precision: in which they were computed, as accelerate calls it.
    """

    name: str
    table: pd.DataFrame
    precision: str

    @property
    def columns(self) -> list[str]:
        """Those of the probabilities."""
        return [name for name in self.table if name == "probability" or name.startswith("probability_")]


def check_predictions(run: Run, folder: Path, options: PublishOptions) -> str:
    """Let a model predict the patients at hand anew.

    Of an ensemble of folds each member predicts the patients that it has not seen, as in the cross-validation.

    Args:
        run: whose predictions are compared.
        folder: of the model, as it will be published.
        options: `data` says where the patients are.

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
    stored = _stored(run, cohort, options.data)
    model, processor = load_published(folder)
    accelerator = make_accelerator(InferenceOptions(cpu=True, mixed_precision=stored.precision))
    probabilities = _probabilities(model, processor, cohort, stored.table, accelerator, options)
    if stored.columns == ["probability"]:
        probabilities = probabilities[:, 1:]
    halved = (stored.precision != "no") + (options.dtype != "float32")
    tolerance = TOLERANCE + halved * HALF_TOLERANCE
    problems = prediction_problems(stored.table, probabilities, stored.columns, tolerance)
    refuse([f"{stored.name}: {problem}" for problem in problems])
    largest = np.abs(stored.table[stored.columns].to_numpy() - probabilities).max()
    return (
        f"The model reproduces the {len(stored.table)} predictions of {stored.name}; no probability differs by more "
        f"than {largest:.2g}."
    )


def _probabilities(
    model: PreTrainedModel,
    processor: LymphImageProcessor,
    cohort: Cohort,
    table: pd.DataFrame,
    accelerator: Accelerator,
    options: PublishOptions,
) -> np.ndarray:
    """(rows, C): the answer of the model for each row or, where a row names a fold, of the member of that fold."""
    patients = list(dict.fromkeys(table["patient_id"]))
    dataset = BagDataset(build_bags(cohort.select(patients), cache_dir=options.cache_dir), processor)
    of_fold = "fold" in table
    answers = {}
    for index, output in outputs(accelerator.prepare(model.eval()), dataset, accelerator):
        logits = output.member_logits[0] if of_fold else output.logits  # (M, C), or (1, C)
        answers[patients[index]] = logits.double().softmax(dim=-1).cpu().numpy()
    members = _members(table) if of_fold else np.zeros(len(table), dtype=int)
    return np.stack([answers[patient][member] for patient, member in zip(table["patient_id"], members, strict=True)])


def _members(table: pd.DataFrame) -> np.ndarray:
    """(rows,) the number of the member that was not trained on the row's patient: folds in order, repeat by repeat."""
    return ((table["repeat"] - 1) * table["fold"].max() + table["fold"] - 1).to_numpy()


def _stored(run: Run, cohort: Cohort, data: str) -> Stored:
    """The predictions whose patients these are, recognised by name and number of cells."""
    cells = {patient.patient_id: len(patient.images) for patient in cohort.patients}
    trained, evaluated = (run.settings, "mixed_precision"), (run.evaluation / "metrics.json", "precision")
    places = {
        run.folder / "validation.csv": trained,
        run.folder / "out-of-fold.csv": trained,
        run.evaluation / "predictions.csv": evaluated,
    }
    found = {path: place for path, place in places.items() if path.exists()}
    for path, (record, key) in found.items():
        table = pd.read_csv(path, dtype={"patient_id": str})
        if all(cells.get(row.patient_id) == row.cells for row in table.itertuples()):
            return Stored(path.name, table, json.loads(record.read_text(encoding="utf-8")).get(key, "no"))
    names = " or ".join(path.name for path in found) or "any predictions"
    raise PublishError(f"--data {data}: these are not the patients of {names} of the run.")
