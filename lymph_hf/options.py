"""Every option of every command, defined once: the command line, option files and Python calls share them.

`HfArgumentParser` turns each dataclass into flags, and the saved `settings.json` of a run holds the same names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from .cohort import DEFAULT_REFERENCE_DATE
from .precision import AUTO, PRECISION_HELP, Precision


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text. `...` makes it required."""
    metadata = {"help": help.replace("%", "%%")}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def json_option(name: str, text: str | None) -> dict[str, Any] | None:
    """The value of an option that holds a JSON object; `None` stays `None`.

    Raises:
        ValueError: something else; the message names the option.
    """
    if text is None:
        return None
    flag = f"--{name.replace('_', '-')}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} {text!r} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{flag} {text!r}: expected a JSON object such as '{{\"key\": 1}}'.")
    return value


def chunk_size_option(text: str) -> int | str | None:
    """`--chunk-size` as the configuration holds it.

    Raises:
        ValueError: neither a number nor `auto` nor `none`.
    """
    if text in ("auto", "none"):
        return None if text == "none" else text
    if not text.isdecimal():
        raise ValueError(f"--chunk-size {text!r}: expected a number of cells, auto or none.")
    return int(text)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """A table of options as command-line words, so that one parser checks the names and types of both."""
    flags = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
        flags += [f"--{name}", *map(str, values)]
    return flags


@dataclass(kw_only=True)
class CohortOptions:
    """Where the patients are."""

    _argument_group_name: ClassVar[str] = "cohort"

    data: str = option(..., "folder of patients: clinical.csv and images/<patient_id>/*, or the challenge layout")
    reference_date: str = option(
        DEFAULT_REFERENCE_DATE,
        "day at which ages are taken where the folder holds dates of birth (YYYY-MM-DD)",
    )
    strict: bool = option(False, "stop at the first unreadable image instead of leaving it out")
    cache_dir: str | None = option(None, "where the Arrow copy of the images goes; by default the datasets cache")


@dataclass(kw_only=True)
class SplitOptions:
    """Which patients train, validate and test."""

    _argument_group_name: ClassVar[str] = "split"

    split: str | None = option(None, "file with a fixed split (JSON, YAML, CSV, or train_index/val_index lists)")
    validation_fraction: float = option(0.2, "share of patients for validation, stratified by label")
    test_fraction: float = option(0.0, "share of patients held out for a final test, stratified by label")
    positive_label: str | None = option(
        None, "label whose probability is reported (two labels); by default the last in sorted order"
    )


@dataclass(kw_only=True)
class ModelOptions:
    """What is trained."""

    _argument_group_name: ClassVar[str] = "model"

    encoder: str = option("vit_tiny_patch16_224", "any timm model name, hf-hub:owner/name or local-dir:folder")
    encoder_weights: str | None = option(
        None, "'timm' for published weights, or a file or folder of weights; by default random"
    )
    encoder_options: str | None = option(None, "JSON of further timm.create_model arguments")
    image_size: int | None = option(None, "side of the input in pixels; by default what the encoder expects")
    freeze_encoder: bool = option(False, "train pooling, fusion and classifier only")
    standardize_cells: bool = option(
        False,
        "bring each feature of a frozen encoder to mean 0 and standard deviation 1 over the cells of the training "
        "patients: for an encoder that never learnt from labelled cells; one that did is mostly better without",
    )
    adapter: str | None = option(None, "train an adapter in a frozen encoder; a name in ADAPTERS, such as lora")
    adapter_options: str | None = option(None, "JSON of the adapter's options, such as '{\"r\": 16}'")
    pooling: str = option("gated_attention", "how cells become a patient; a name in POOLERS")
    pooling_options: str | None = option(None, "JSON of the pooling's options")
    fusion: str = option("concat", "how clinical values join; a name in FUSERS, 'none' leaves them out")
    fusion_options: str | None = option(None, "JSON of the fusion's options")
    dropout: float = option(0.1, "dropout before the classifier")
    chunk_size: str = option(
        "auto",
        "cells that pass the encoder at once: a number (the activations of so many are kept), none (all), or auto "
        "(chunks whose activations are kept as far as memory allows)",
    )


@dataclass(kw_only=True)
class LoopOptions:
    """What every training asks for, of patients and of cells."""

    output: str = option(..., "run folder; must not exist yet, unless with --resume")
    resume: bool = option(False, "continue the run in --output exactly where its last checkpoint stands")
    seed: int = option(0, "of everything random")
    warmup: float = option(0.1, "share of the steps with rising rate, before the cosine decay to zero")
    clip: float = option(1.0, "largest norm of the gradient")
    checkpoint_every: int = option(0, "optimizer steps between checkpoints within an epoch; 0 = epoch ends only")
    workers: int = option(0, "processes that decode images beside the training process")
    tracker: Literal["tensorboard", "trackio", "wandb", "none"] = option("tensorboard", "where curves are logged")
    mixed_precision: Precision = option(AUTO, PRECISION_HELP)
    cpu: bool = option(False, "stay on the CPU though there is an accelerator")


@dataclass(kw_only=True)
class TrainingOptions(LoopOptions):
    """How it is trained."""

    _argument_group_name: ClassVar[str] = "training"

    epochs: int = option(20, "passes over the training patients")
    batch_size: int = option(8, "patients per optimizer step, over all processes")
    micro_batch: int = option(1, "patients per forward pass of one process; changes memory, not the result")
    max_cells: int | None = option(64, "cells sampled per patient and step in training; evaluation uses every cell")
    augment: bool = option(True, "random views of the cells in training")
    feature_cache: str | None = option(
        None,
        "folder that keeps what a frozen encoder gives for each cell, so that later epochs and runs need not encode; "
        "with --freeze-encoder",
    )
    feature_views: int = option(
        4, "augmented views of each patient in the feature cache, of which training draws one per epoch; 0 draws none"
    )
    balance: Literal["weights", "sampling", "none"] = option(
        "weights", "against unequal classes: weights in the loss, balanced sampling of patients, or nothing"
    )
    learning_rate: float = option(3e-4, "peak rate of pooling, fusion and classifier")
    encoder_learning_rate: float | None = option(None, "peak rate of the encoder; by default a tenth of the other")
    weight_decay: float = option(0.05, "of AdamW; norms and biases have none")
    label_smoothing: float = option(0.0, "in [0, 1)")
    patience: int = option(10, "stop after this many epochs without a better validation; 0 never stops early")
    threshold: float | None = option(
        None,
        "decision threshold to freeze; by default the mean of those with the best balanced accuracy in resamples of "
        "the validation patients",
    )
    calibration: Literal["auto", "platt", "temperature", "none"] = option(
        "auto", "scaling of the probabilities, fitted on the validation patients; auto: platt for two labels"
    )
    coverage: float = option(
        0.9,
        "share of patients whose prediction set shall hold the right label; sets of more than one label are referred "
        "to flow cytometry; fitted on the validation patients; 0 fits none",
    )
    clinical_baseline: Literal["logistic", "forest", "boosting", "none"] = option(
        "logistic", "clinical-only model fitted beside the image model, on the same training patients"
    )


@dataclass(kw_only=True)
class InferenceOptions:
    """How a trained model is run."""

    _argument_group_name: ClassVar[str] = "inference"

    mixed_precision: Precision = option(AUTO, PRECISION_HELP)
    workers: int = option(0, "processes that decode images beside the main process")
    cpu: bool = option(False, "stay on the CPU though there is an accelerator")


@dataclass(kw_only=True)
class EvaluateOptions:
    """What is evaluated."""

    _argument_group_name: ClassVar[str] = "evaluation"

    run: str = option(..., "run folder, or a model folder or Hub id")
    output: str | None = option(None, "folder for metrics.json, predictions.csv and the figure; by default the run")
    subset: Literal["held-out", "validation", "test", "all"] = option(
        "held-out",
        "patients to score: all that the run did not train on, those of the run's validation or test list, "
        "or all (training patients included)",
    )
    prevalence: float | None = option(
        None, "share of positive patients where the model is to be used, for PPV and NPV; 0.18 in one laboratory"
    )
    figures: bool = option(True, "draw the evidence and write report.html; without it scores and predictions only")
    feature_cache: str | None = option(None, "folder with features of this model's encoder, as of lymph train")
    resamples: int = option(2000, "bootstrap resamples of patients")
    seed: int = option(0, "of the bootstrap")


@dataclass(kw_only=True)
class PredictOptions:
    """What is predicted."""

    _argument_group_name: ClassVar[str] = "prediction"

    run: str = option(..., "run folder, or a model folder or Hub id")
    output: str = option(..., "CSV file to write")
    part: Literal["all", "train", "test"] = option("all", "challenge layout: which of the two folders")
    submission: bool = option(False, "write the challenge's Id,Predicted for the patients of its test folder")


@dataclass(kw_only=True)
class CheckOptions:
    """What the check writes."""

    _argument_group_name: ClassVar[str] = "check"

    output: str | None = option(None, "figure to write; by default <name of the folder>-cohort.png")


@dataclass(kw_only=True)
class SynthOptions:
    """What is painted."""

    _argument_group_name: ClassVar[str] = "synthetic cohort"

    output: str = option(..., "folder to make; an identical earlier result is reused")
    patients: int = option(60, "number of patients")
    seed: int = option(0, "of everything random")
    layout: Literal["generic", "challenge"] = option("generic", "folder layout")
    cells: list[int] | None = option(None, "least and largest number of cells per patient; by default 16 to 198")
    image_size: int = option(224, "side of an image in pixels")
    missing: float = option(0.0, "share of clinical values left empty")
