"""Patient models: built from options, saved with their processor, loaded from wherever they are."""

import logging
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import AutoImageProcessor, AutoModel

from .adapters import attach_adapter, save_adapted, trainable_report
from .cohort import CLINICAL, Patient
from .configuration_lymph import LymphMILConfig
from .encoder_weights import load_first_weights
from .encoders import resolve_encoder
from .files import writing_folder
from .modeling_lymph import LymphMILForBagClassification
from .options import ModelOptions, TrainingOptions, chunk_size_option, json_option
from .patient_data import RecipeError
from .processing_lymph import ClinicalStandardizer, LymphImageProcessor
from .runs import RunError, model_source
from .sampling import class_weights

logger = logging.getLogger(__name__)


def new_model(
    patients: Sequence[Patient], label_names: Sequence[str], options: ModelOptions, training: TrainingOptions
) -> tuple[LymphMILForBagClassification, LymphImageProcessor]:
    """An untrained model, its encoder filled with the given weights, and the processor of its inputs.

    Args:
        patients: of training; the clinical values are standardised on them, and they set the weights of the classes.
        label_names: in the order of their numbers.

    Raises:
        RecipeError, ValueError: options that do not fit together or do not exist.
        EncoderWeightsError: weights that do not fit the encoder.
    """
    features = () if options.fusion == "none" else CLINICAL
    standardizer = ClinicalStandardizer.fit([clinical_values(patient) for patient in patients], features)
    numbers = {name: i for i, name in enumerate(label_names)}
    weights = class_weights([numbers[patient.label] for patient in patients], len(label_names))
    encoder = resolve_encoder(options.encoder)
    config = LymphMILConfig(
        encoder=encoder.name,
        encoder_options=encoder.options_with(json_option("encoder_options", options.encoder_options)),
        image_size=options.image_size,
        standardize_cells=options.standardize_cells,
        pooling=options.pooling,
        pooling_options=json_option("pooling_options", options.pooling_options),
        fusion=options.fusion,
        fusion_options=json_option("fusion_options", options.fusion_options),
        clinical_features=list(standardizer.features),
        dropout=options.dropout,
        chunk_size=chunk_size_option(options.chunk_size),
        class_weights=weights if training.balance == "weights" else None,
        label_smoothing=training.label_smoothing,
        id2label=dict(enumerate(label_names)),
        label2id=numbers,
    )
    model = LymphMILForBagClassification(config)
    load_first_weights(model.model.encoder, options.encoder_weights, encoder.weights)
    if options.freeze_encoder:
        model.model.encoder.requires_grad_(False)
    if options.adapter is not None:
        if options.freeze_encoder:
            raise RecipeError(
                "--freeze-encoder with --adapter: an adapter freezes the encoder itself, give one of them."
            )
        given = json_option("adapter_options", options.adapter_options) or {}
        model = attach_adapter(model, options.adapter, **given)
    logger.info("%s", trainable_report(model))
    return model, LymphImageProcessor.from_config(config, standardizer)


def clinical_values(patient: Patient) -> dict[str, float | str | None]:
    """Age, sex and lymphocyte count by name, `None` where unknown."""
    return {name: getattr(patient, name) for name in CLINICAL}


def save_model(model: LymphMILForBagClassification, processor: LymphImageProcessor, folder: Path) -> None:
    """Write both into a folder that is there as a whole or not at all; of an adapted model the adapter alone."""
    with writing_folder(folder) as beside:
        if isinstance(model, PeftModel):
            save_adapted(model, beside)
        else:
            model.save_pretrained(beside)
        processor.save_pretrained(beside)


def load_model(source: str | Path) -> tuple[LymphMILForBagClassification, LymphImageProcessor]:
    """Model in evaluation mode and image processor of a run folder, a model folder or a Hub id.

    Raises:
        RunError: nothing can be loaded from there, or the run has not finished.
    """
    path = model_source(source)
    try:
        return AutoModel.from_pretrained(path), AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RunError(f"No model could be loaded from {source}: {error}") from error
