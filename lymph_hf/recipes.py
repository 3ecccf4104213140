"""From options to results: training, evaluation and prediction of patient models."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoModel

from .adapters import attach_adapter, save_adapted, trainable_report
from .augment import Augmentation
from .bags import BagDataset, build_bags, cohort_fingerprint, collate_bags
from .baselines import Blend, Row, clinical_rows, score_rows
from .clinical import ClinicalSettings
from .clinical_baseline import Baseline, clinical_baseline
from .cohort import CLINICAL, Cohort, read_cohort, scan_images
from .configuration_lymph import LymphMILConfig
from .decisions import freeze_decisions
from .encoder_weights import load_first_weights
from .encoders import resolve_encoder
from .evaluation import evaluation_patients, patient_table, score_report, write_evaluation
from .evidence import write_evidence
from .features import FeatureBags, cached_features, put_encoder, take_encoder
from .files import write_json, writing_folder
from .image_vote import vote_rows
from .inference import Inference, infer, write_table
from .lineage import ancestors_images
from .metrics import Bootstrap, score
from .modeling_lymph import LymphMILForBagClassification
from .options import (
    CheckOptions,
    CohortOptions,
    EvaluateOptions,
    InferenceOptions,
    ModelOptions,
    PredictOptions,
    SplitOptions,
    SynthOptions,
    TrainingOptions,
    chunk_size_option,
    json_option,
)
from .precision import with_settled_precision
from .processing_lymph import ClinicalStandardizer, LymphImageProcessor
from .report_page import write_page
from .reporting import cohort_figure, history_figure
from .runs import Run, RunError, model_source
from .sampling import balanced_weights, class_weights
from .split_files import PARTS
from .splits import Split, make_split, read_split
from .synthetic import write_synthetic_cohort
from .training import TrainingLoop, make_accelerator

logger = logging.getLogger(__name__)


class RecipeError(ValueError):
    """Options and data do not fit together; the message says what to change."""


@dataclass
class Lesson:
    """What the training loop trains.

    Attributes:
        model: its output has `.loss`.
        dataset: training patients.
        collate: items of the data set -> inputs of the model.
    """

    model: nn.Module
    dataset: Dataset
    collate: Callable[[list], dict[str, torch.Tensor]]


class Teaching(Protocol):
    """What a patient model learns beside the labels.

    Attributes:
        options: a dataclass, stored with the settings of the run.
        sources: other models that it rests on, whose training patients must not be evaluation patients.
    """

    options: Any
    sources: Sequence[str]

    def lesson(self, plain: Lesson, patients: Cohort, accelerator: Accelerator) -> Lesson:
        """The plain lesson with more to learn; the parameters of its model are trained, and nothing else of it."""


def synthesise(options: SynthOptions) -> Path:
    """Paint a synthetic cohort and log how well it can be told apart at best.

    Returns:
        The folder.

    Raises:
        RecipeError: `cells` is not a pair.
    """
    if options.cells is not None and len(options.cells) != 2:
        raise RecipeError(f"--cells {options.cells}: expected the least and the largest number of cells, as 16 198.")
    report = write_synthetic_cohort(
        Path(options.output),
        patients=options.patients,
        seed=options.seed,
        layout=options.layout,
        cells=None if options.cells is None else tuple(options.cells),
        image_size=options.image_size,
        missing=options.missing,
    )
    logger.info("%s", report.summary())
    return report.root


def check_cohort(cohort_options: CohortOptions, options: CheckOptions) -> Path:
    """Read a cohort, log what is in it and what was left out, and draw it.

    Returns:
        Path of the figure.
    """
    cohort = scan_images(_read(cohort_options), strict=cohort_options.strict)
    figure = Path(options.output or f"{Path(cohort_options.data).resolve().name}-cohort.png")
    cohort_figure(cohort.to_frame(), figure, title=cohort.root.name)
    logger.info("%s", cohort.summary())
    logger.info("Figure: %s", figure)
    return figure


def train(
    cohort_options: CohortOptions,
    split_options: SplitOptions,
    model_options: ModelOptions,
    options: TrainingOptions,
    *,
    teaching: Teaching | None = None,
    cohort: Cohort | None = None,
) -> Path:
    """Train a patient model from a folder of patients.

    The split is stratified and saved, the clinical values are standardised on the training patients, the epoch is
    the best in validation; calibration, decision threshold and prediction sets are fitted on the validation patients
    and frozen in the model. Beside it stand the clinical model and the blend of the two.

    Args:
        teaching: what the model learns beside the labels, as in distillation.
        cohort: checked, where it has been read before; `None` reads `cohort_options.data`.

    Returns:
        The exported model, to be loaded with `AutoModel.from_pretrained`.

    Raises:
        CohortError, SplitError, LineageError, RunError, TrainingError, CheckpointError: each with what to do.
    """
    _check_feature_cache(model_options, options, teaching)
    run = Run(Path(options.output))
    options = with_settled_precision(options)
    accelerator = make_accelerator(options, run.folder)
    groups = [cohort_options, split_options, model_options, options]
    groups += [] if teaching is None else [teaching.options]
    settings = {k: v for group in groups for k, v in asdict(group).items()}
    lock = run.claim(settings, resume=options.resume) if accelerator.is_main_process else None
    cohort = cohort or _checked_cohort(cohort_options, accelerator)
    split = choose_split(cohort, split_options, options.seed)
    sources = [model_options.encoder_weights, *(() if teaching is None else teaching.sources)]
    learnt = ancestors_images(sources, cohort, split)
    label_names = ordered_labels(cohort, split_options.positive_label)
    if accelerator.is_main_process:
        record_data(run, cohort, split, learnt)
        baseline = _clinical_baseline(run, cohort, split, label_names, options)
    set_seed(options.seed)
    model, processor = _new_model(cohort, split, label_names, model_options, options)
    encoder = None
    if options.feature_cache is None:
        data = _Bags(cohort, processor, model.config.label2id, cohort_options.cache_dir, accelerator)
    else:
        seen, views = cohort.select(split.train + split.validation), options.feature_views if options.augment else 0
        cache, workers = options.feature_cache, options.workers
        data = _FeatureBags(seen, model, processor, accelerator, cache, views=views, workers=workers)
        encoder = take_encoder(model)
        options = replace(options, workers=0)  # nothing is left to decode
    train_set = data.subset(
        split.train,
        max_cells=options.max_cells,
        augmentation=Augmentation() if options.augment else None,
        seed=options.seed,
    )
    validation_set = data.subset(split.validation) if split.validation else None
    if options.tracker != "none":
        accelerator.init_trackers("lymph-hf", config={k: "" if v is None else v for k, v in settings.items()})

    def validate(model: nn.Module) -> dict[str, float]:
        return _validate(model, validation_set, accelerator, options)

    lesson = Lesson(model, train_set, collate_bags)
    if teaching is not None:
        lesson = teaching.lesson(lesson, cohort.select(split.train), accelerator)
    loop = TrainingLoop(
        accelerator,
        lesson.model,
        lesson.dataset,
        lesson.collate,
        options,
        run.folder,
        validate=None if validation_set is None else validate,
        sample_weights=balanced_weights(train_set.label_ids) if options.balance == "sampling" else None,
        # An adapter is new, like the head: it learns at the full rate.
        encoder=model.model.encoder if model_options.adapter is None else None,
    )
    progress = loop.run()
    predictions = (
        None if validation_set is None else infer(loop.model, validation_set, accelerator, workers=options.workers)
    )
    if accelerator.is_main_process:
        if encoder is not None:
            put_encoder(model, encoder)
        history_figure(progress.history, run.folder / "history.png")
        probabilities = _freeze_decisions(model.config, predictions, validation_set, options)
        _export(model, processor, run.model)
        if probabilities is not None:
            _report_validation(run, cohort.select(split.validation), probabilities, model.config, baseline)
        logger.info("Model: %s", run.model)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if lock is not None:
        lock.release()
    return run.model


def evaluate(
    cohort_options: CohortOptions,
    options: EvaluateOptions,
    inference: InferenceOptions,
    *,
    cohort: Cohort | None = None,
) -> dict[str, Any]:
    """Score a trained model on labelled patients, with bootstrap intervals, at its frozen threshold.

    Writes `metrics.json`, `predictions.csv`, `evaluation.png`, `figures/` and the page `report.html`.

    Args:
        cohort: checked, where it has been read before; `None` reads `cohort_options.data`.

    Returns:
        The content of `metrics.json`.

    Raises:
        RecipeError: no patient is left to score, or labels that the model does not know.
    """
    accelerator = make_accelerator(inference)
    model, processor = load_model(options.run)
    cohort = cohort or _checked_cohort(cohort_options, accelerator)
    cohort, note = evaluation_patients(cohort, Run(Path(options.run)), options.subset)
    unknown = sorted({patient.label for patient in cohort.patients} - set(model.config.label2id))
    if unknown:
        raise RecipeError(
            f"{cohort.root}: label(s) {unknown} are not among the model's {sorted(model.config.label2id)}. "
            "Evaluate on patients with the labels the model was trained for."
        )
    if options.feature_cache is None:
        data = _Bags(cohort, processor, model.config.label2id, cohort_options.cache_dir, accelerator)
    else:
        data = _FeatureBags(cohort, model, processor, accelerator, options.feature_cache, workers=inference.workers)
    dataset = data.subset([patient.patient_id for patient in cohort.patients])
    model = accelerator.prepare(model)
    predictions = infer(model, dataset, accelerator, workers=inference.workers)
    folder = Path(options.output or Run(Path(options.run)).evaluation)
    report = score_report(
        dataset.label_ids,
        predictions.probabilities,
        model.config,
        prevalence=options.prevalence,
        resamples=options.resamples,
        seed=options.seed,
    )
    run, reading = Path(options.run), {"workers": inference.workers, "cache_dir": cohort_options.cache_dir}
    rows = clinical_rows(run, cohort, predictions.probabilities, model.config)
    rows += vote_rows(run, cohort, model.config, accelerator, **reading)
    report["baselines"] = score_rows(
        dataset.label_ids,
        predictions.probabilities,
        model.config.decision_threshold,
        rows,
        resamples=options.resamples,
        seed=options.seed,
    )
    report = {
        "patients": note,
        "data": cohort.root.name,
        "precision": accelerator.mixed_precision,
        "loss": predictions.loss,
        **report,
    }
    if accelerator.is_main_process:
        if options.figures:
            report |= write_evidence(
                folder / "figures",
                cohort,
                predictions,
                model.config,
                rows=rows,
                auroc=report["scores"]["auroc"],
                prevalence=options.prevalence,
                bootstrap=Bootstrap(options.resamples, seed=options.seed),
            )
        write_evaluation(folder, cohort, predictions.probabilities, model.config, report, stem="metrics")
        if options.figures:
            logger.info("Report: %s", write_page(run, evaluation=folder))
    return report


def predict(cohort_options: CohortOptions, options: PredictOptions, inference: InferenceOptions) -> Path:
    """Write the probability and the label of every patient of a folder; labels are not needed and not used.

    Returns:
        The CSV file.

    Raises:
        RecipeError: a part or a submission was asked of a folder that is not in the challenge layout.
    """
    accelerator = make_accelerator(inference)
    model, processor = load_model(options.run)
    cohort = _checked_cohort(cohort_options, accelerator)
    cohort = _part(cohort, "test" if options.submission else options.part)
    data = _Bags(cohort, processor, None, cohort_options.cache_dir, accelerator)
    dataset = data.subset([patient.patient_id for patient in cohort.patients])
    model = accelerator.prepare(model)
    predictions = infer(model, dataset, accelerator, workers=inference.workers)
    if accelerator.is_main_process:
        table = patient_table(cohort, predictions.probabilities, model.config)
        if options.submission:
            decided = table["predicted_label"].map(model.config.label2id)
            table = table[["patient_id"]].assign(Predicted=decided).rename(columns={"patient_id": "Id"})
        write_table(table, options.output)
        logger.info("%d patients: %s", len(table), options.output)
    return Path(options.output)


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


def ordered_labels(cohort: Cohort, positive_label: str | None) -> list[str]:
    """Label names in the order of their numbers; of two labels the positive one is last.

    Raises:
        RecipeError: the positive label is not in the cohort, or there are more than two.
    """
    names = list(cohort.label_names)
    if positive_label is None:
        return names
    if positive_label not in names or len(names) != 2:
        raise RecipeError(f"positive_label={positive_label!r}: expected one of two labels, the cohort has {names}.")
    return sorted(names, key=lambda name: name == positive_label)


class _Bags:
    """The rows of a cohort, and data sets over some of its patients."""

    def __init__(self, cohort: Cohort, processor, label2id: dict[str, int] | None, cache_dir, accelerator: Accelerator):
        with accelerator.main_process_first():
            self.rows = build_bags(cohort, cache_dir=cache_dir)
        self.position = {patient.patient_id: i for i, patient in enumerate(cohort.patients)}
        self.processor = processor
        self.label2id = label2id

    def subset(self, ids, **options) -> BagDataset:
        rows = self.rows.select([self.position[patient_id] for patient_id in ids])
        return BagDataset(rows, self.processor, label2id=self.label2id, **options)


class _FeatureBags:
    """The features of a cohort, and data sets over some of its patients, with the interface of `_Bags`."""

    def __init__(
        self, cohort: Cohort, model, processor, accelerator: Accelerator, folder: str, *, views: int = 0, workers: int
    ):
        self.cohort = cohort
        self.processor = processor
        self.label2id = model.config.label2id
        self.features = cached_features(
            model,
            processor,
            cohort,
            folder,
            views=views,
            accelerator=accelerator,
            chunk_size=model.config.chunk_size,
            workers=workers,
        )

    def subset(self, ids, *, augmentation: Augmentation | None = None, **options) -> FeatureBags:
        augmented = augmentation is not None and self.features.views > 0
        patients, standardizer = self.cohort.select(ids).patients, self.processor.standardizer
        return FeatureBags(
            self.features, patients, standardizer, label2id=self.label2id, augmented=augmented, **options
        )


def _check_feature_cache(model_options: ModelOptions, options: TrainingOptions, teaching: Teaching | None) -> None:
    if options.feature_cache is None:
        return
    if not model_options.freeze_encoder or model_options.adapter is not None:
        raise RecipeError(
            "--feature-cache: features can be kept of a frozen encoder only. Add --freeze-encoder (and no --adapter), "
            "or leave --feature-cache out."
        )
    if options.feature_views < 0:
        raise RecipeError(f"--feature-views {options.feature_views}: expected a number of views, 0 for none.")
    if teaching is not None:
        raise RecipeError("--feature-cache: a teacher looks at the images themselves; leave it out in distillation.")


def _read(options: CohortOptions) -> Cohort:
    return read_cohort(options.data, reference_date=options.reference_date)


def _checked_cohort(options: CohortOptions, accelerator: Accelerator) -> Cohort:
    """Read and checked by the main process, handed to the others."""
    shared = [scan_images(_read(options), strict=options.strict) if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    if accelerator.is_main_process:
        logger.info("%s", shared[0].summary())
    return shared[0]


def choose_split(cohort: Cohort, options: SplitOptions, seed: int) -> Split:
    """The split that the options name, or the one that they draw.

    Raises:
        SplitError: it cannot be read or drawn.
    """
    if options.split is not None:
        return read_split(options.split, cohort)
    return make_split(
        cohort,
        validation_fraction=options.validation_fraction,
        test_fraction=options.test_fraction,
        seed=seed,
    )


def record_data(run: Run, cohort: Cohort, split: Split, learnt: frozenset[str] = frozenset()) -> None:
    """Store what a run is trained on; on resume, refuse data that has changed meanwhile.

    Args:
        learnt: images that the weights knew before, from pretraining or through a teacher. They count as training
            images, so that their patients are never scored as held-out ones.

    Raises:
        RunError: the data has changed.
    """
    fingerprint = cohort_fingerprint(cohort)
    if run.cohort.exists():
        recorded = json.loads(run.cohort.read_text())["fingerprint"]
        if recorded != fingerprint:
            raise RunError(
                f"{cohort.root} has changed since {run.folder} was started (images, labels or clinical values). "
                "Restore it to resume, or start a new run in another --output."
            )
    split.save(run.split)
    digests = {
        part: {digest for patient_id in getattr(split, part) for digest in cohort.digests[patient_id]} for part in PARTS
    }
    digests["train"] |= learnt
    record = {
        "data": cohort.root.name,
        "fingerprint": fingerprint,
        "patients": {part: len(getattr(split, part)) for part in PARTS},
        "exclusions": [asdict(exclusion) for exclusion in cohort.exclusions],
        "warnings": list(cohort.warnings),
        "digests": {part: sorted(images) for part, images in digests.items()},
    }
    write_json(run.cohort, record)


def _new_model(
    cohort: Cohort, split: Split, label_names: list[str], options: ModelOptions, training: TrainingOptions
) -> tuple[LymphMILForBagClassification, LymphImageProcessor]:
    patients = cohort.select(split.train).patients
    features = () if options.fusion == "none" else CLINICAL
    standardizer = ClinicalStandardizer.fit([_clinical(patient) for patient in patients], features)
    numbers = {name: i for i, name in enumerate(label_names)}
    weights = class_weights([numbers[patient.label] for patient in patients], len(label_names))
    encoder = resolve_encoder(options.encoder)
    config = LymphMILConfig(
        encoder=encoder.name,
        encoder_options=encoder.options_with(json_option("encoder_options", options.encoder_options)),
        image_size=options.image_size,
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


def _clinical(patient) -> dict[str, Any]:
    return {name: getattr(patient, name) for name in CLINICAL}


def _validate(model, dataset: BagDataset, accelerator: Accelerator, options: TrainingOptions) -> dict[str, float]:
    result = infer(model, dataset, accelerator, workers=options.workers, progress=False)
    scores = score(dataset.label_ids, result.probabilities)
    return {"loss": result.loss, "auroc": scores["auroc"], "balanced_accuracy": scores["balanced_accuracy"]}


def _freeze_decisions(
    config: LymphMILConfig, predictions: Inference | None, validation_set: BagDataset | None, options: TrainingOptions
) -> np.ndarray | None:
    """Fit on the validation patients what is fitted after training; without them the threshold may still be given."""
    if predictions is None or config.num_labels == 1:
        if options.threshold is not None:
            config.decision_threshold = options.threshold
        return None
    return freeze_decisions(
        config,
        validation_set.label_ids,
        predictions.probabilities,
        calibration=options.calibration,
        threshold=options.threshold,
        coverage=options.coverage,
    )


def _export(model: LymphMILForBagClassification, processor: LymphImageProcessor, folder: Path) -> None:
    with writing_folder(folder) as beside:
        if isinstance(model, PeftModel):
            save_adapted(model, beside)
        else:
            model.save_pretrained(beside)
        processor.save_pretrained(beside)


def _clinical_baseline(
    run: Run, cohort: Cohort, split: Split, label_names: list[str], options: TrainingOptions
) -> Baseline | None:
    """The clinical model beside the image model: before the training, so that what is wrong with it is said early."""
    patients = cohort.select(split.train).patients
    recorded = any(value is not None for patient in patients for value in _clinical(patient).values())
    if options.clinical_baseline == "none" or not recorded:
        return None
    settings = ClinicalSettings(options.clinical_baseline, seed=options.seed)
    baseline = clinical_baseline(cohort, split, settings, label_names=label_names)
    baseline.model.save(run.folder / "clinical-model")
    for part, table in baseline.tables.items():
        write_table(table, run.folder / f"clinical-{part}.csv")
    return baseline


def _report_validation(
    run: Run, cohort: Cohort, probabilities: np.ndarray, config: LymphMILConfig, baseline: Baseline | None
) -> None:
    labels = [config.label2id[patient.label] for patient in cohort.patients]
    report = score_report(labels, probabilities, config)
    if baseline is not None:
        clinical = baseline.probabilities["validation"]
        blend = Blend.choose(labels, probabilities, clinical)
        blend.save(run.folder)
        rows = [Row("clinical alone", clinical, baseline.model.decision_threshold), blend.row(probabilities, clinical)]
        report["baselines"] = score_rows(labels, probabilities, config.decision_threshold, rows)
    note = "validation patients of this run, which also chose its epoch and its threshold: not a test"
    write_evaluation(run.folder, cohort, probabilities, config, {"patients": note, **report}, stem="validation")


def _part(cohort: Cohort, part: str) -> Cohort:
    if part == "all":
        return cohort
    if cohort.layout != "challenge":
        raise RecipeError(
            f"{cohort.root} is in the {cohort.layout} layout, which has no {part} folder; use --part all."
        )
    chosen = [patient.patient_id for patient in cohort.patients if patient.part == part]
    if not chosen:
        raise RecipeError(f"{cohort.root}: no usable patient in its {part} folder.")
    return cohort.select(chosen)
