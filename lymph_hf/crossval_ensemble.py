"""The models of the folds as one, with decisions fitted on the out-of-fold predictions."""

import logging
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file

from .cohort import CLINICAL, Cohort
from .configuration_lymph import CLINICAL_FEATURES
from .crossval_scores import Predictions
from .decisions import freeze_decisions
from .files import writing_folder
from .modeling_ensemble import EnsembleError, LymphMILEnsembleForBagClassification
from .modeling_lymph import LymphMILForBagClassification
from .options import TrainingOptions
from .processing_lymph import ClinicalStandardizer, LymphImageProcessor
from .runs import Run, model_source

logger = logging.getLogger(__name__)


def save_ensemble(
    runs: Sequence[Path], patients: Cohort, predictions: Predictions, options: TrainingOptions, folder: Path
) -> None:
    """Write the models of runs as one model, which `AutoModel.from_pretrained` loads.

    Calibration, threshold and prediction sets are fitted on out-of-fold predictions: of every patient, by models that
    were not trained on it. Those come from one member for each repeat, where the ensemble has the mean of all, which
    is a little less sure and ranks a little better; so they err on the careful side.

    Args:
        runs: finished.
        patients: labelled; the statistics of the ensemble's clinical standardiser are theirs.
        predictions: out of fold, of the same patients.
        options: for `calibration`, `threshold` and `coverage`.
        folder: of the model.

    Raises:
        EnsembleError: models that differ in labels, image size or the preparation of images, or an adapter that cannot
            be merged into its encoder.
    """
    members = [load_member(run) for run in runs]
    processors = [LymphImageProcessor.from_pretrained(model_source(run)) for run in runs]
    _refuse_different_images(processors, runs)
    used = {name for processor in processors for name in processor.standardizer.features}
    standardizer = ClinicalStandardizer.fit(
        [{name: getattr(patient, name) for name in CLINICAL} for patient in patients.patients],
        [name for name in CLINICAL_FEATURES if name in used],
    )
    ensemble = LymphMILEnsembleForBagClassification.from_members(
        members, [processor.standardizer for processor in processors], standardizer
    )
    freeze_decisions(
        ensemble.config,
        predictions.labels,
        predictions.probabilities,
        calibration=options.calibration,
        threshold=options.threshold,
        coverage=options.coverage,
    )
    with writing_folder(folder) as beside:
        ensemble.save_pretrained(beside)
        LymphImageProcessor.from_config(members[0].config, standardizer).save_pretrained(beside)
    shared = "one shared encoder" if ensemble.config.shared_encoder else f"{len(members)} encoders"
    logger.info("Model of %d folds (%s): %s", len(members), shared, folder)


def load_member(folder: Path) -> LymphMILForBagClassification:
    """The model of a run, an adapter merged into its encoder."""
    path = Path(model_source(folder))
    if not (path / "adapter_config.json").exists():
        return LymphMILForBagClassification.from_pretrained(path)
    base = LymphMILForBagClassification(LymphMILForBagClassification.config_class.from_pretrained(path))
    base.load_state_dict(load_file(path / "model.safetensors"))
    try:
        return PeftModel.from_pretrained(base.eval(), path).merge_and_unload().eval()
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise EnsembleError(f"{Run(folder).folder}: its adapter cannot be merged into the encoder: {error}") from error


def _refuse_different_images(processors: Sequence[LymphImageProcessor], runs: Sequence[Path]) -> None:
    first, *others = [
        {key: value for key, value in processor.to_dict().items() if key != "clinical_statistics"}
        for processor in processors
    ]
    for run, other in zip(runs[1:], others, strict=True):
        if differ := sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key)):
            raise EnsembleError(f"{runs[0]} and {run} prepare images differently ({', '.join(differ)}).")
