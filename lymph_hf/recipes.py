"""From options to results: training, evaluation and prediction of patient models."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset

from .augment import Augmentation
from .bags import BagDataset, build_bags, collate_bags
from .baselines import CLINICAL_ALONE, Blend, Row, clinical_rows, score_rows
from .cell_standardization import fit_cell_standardizer
from .clinical import ClinicalSettings
from .clinical_baseline import Baseline, clinical_baseline
from .cohort import Cohort
from .configuration_lymph import LymphMILConfig
from .decisions import freeze_decisions
from .evaluation import evaluation_patients, patient_table, score_report, write_evaluation
from .evidence import ATTENTIONS, write_attentions, write_evidence
from .features import FeatureBags, put_encoder, take_encoder
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
)
from .patient_data import (
    Bags,
    CachedBags,
    RecipeError,
    choose_split,
    ordered_labels,
    patients_of_part,
    read_checked,
    record_data,
)
from .patient_models import clinical_values, load_model, new_model, save_model
from .precision import with_settled_precision
from .processing_lymph import LymphImageProcessor
from .report_page import write_page
from .reporting import cohort_figure, history_figure
from .runs import Run
from .sampling import balanced_weights
from .splits import Split
from .synthetic import write_synthetic_cohort
from .training import TrainingLoop, make_accelerator, pretrained_batch_norms

logger = logging.getLogger(__name__)


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

    def lesson(self, plain: Lesson, patients: Cohort, rows: datasets.Dataset, accelerator: Accelerator) -> Lesson:
        """The plain lesson with more to learn; the parameters of its model are trained, and nothing else of it.

        Args:
            plain: the student, its data set and the collation.
            patients: of the data set, in its order.
            rows: their images, the `"patients"` view of their bags.
            accelerator: for forward passes of others.
        """


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
    cohort = read_checked(cohort_options)
    figure = Path(options.output or f"{Path(cohort_options.data).resolve().name}-cohort.png")
    cohort_figure(cohort.to_frame(), figure, title=cohort.root.name)
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
    _check_frozen(model_options, options)
    run, options = Run(Path(options.output)), with_settled_precision(options)
    accelerator = make_accelerator(options, run.folder)
    groups = [cohort_options, split_options, model_options, options, *([] if teaching is None else [teaching.options])]
    settings = {k: v for group in groups for k, v in asdict(group).items()}
    lock = run.claim(settings, resume=options.resume) if accelerator.is_main_process else None
    cohort = cohort or read_checked(cohort_options, accelerator)
    split = choose_split(cohort, split_options, options.seed)
    sources = [model_options.encoder_weights, *(() if teaching is None else teaching.sources)]
    learnt = ancestors_images(sources, cohort, split)
    label_names = ordered_labels(cohort, split_options.positive_label)
    if accelerator.is_main_process:
        record_data(run, cohort, split, learnt)
        baseline = _clinical_baseline(run, cohort, split, label_names, options)
    set_seed(options.seed)
    model, processor = new_model(cohort.select(split.train).patients, label_names, model_options, options)
    train_set, validation_set = _datasets(cohort, split, model, processor, accelerator, cohort_options, options)
    if options.tracker != "none":
        accelerator.init_trackers("lymph-hf", config={k: "" if v is None else v for k, v in settings.items()})
    lesson = Lesson(model, train_set, collate_bags)
    if teaching is not None:
        learners = cohort.select(split.train)
        lesson = teaching.lesson(lesson, learners, _images_of(train_set, learners, cohort_options), accelerator)
    weights = balanced_weights(train_set.label_ids) if options.balance == "sampling" else None
    predictions = _learn(model, lesson, validation_set, accelerator, options, run, sample_weights=weights)
    if accelerator.is_main_process:
        probabilities = _freeze_decisions(model.config, predictions, validation_set, options)
        save_model(model, processor, run.model)
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

    Writes `metrics.json`, `predictions.csv`, `attentions.csv` (the weight of every cell), `evaluation.png`, `figures/`
    and the page `report.html`.

    Args:
        cohort: checked, where it has been read before; `None` reads `cohort_options.data`.

    Returns:
        The content of `metrics.json`.

    Raises:
        RecipeError: no patient is left to score, or labels that the model does not know.
    """
    accelerator = make_accelerator(inference)
    model, processor = load_model(options.run)
    cohort = cohort or read_checked(cohort_options, accelerator)
    cohort, note = evaluation_patients(cohort, Run(Path(options.run)), options.subset)
    unknown = sorted({patient.label for patient in cohort.patients} - set(model.config.label2id))
    if unknown:
        raise RecipeError(
            f"{cohort.root}: label(s) {unknown} are not among the model's {sorted(model.config.label2id)}. "
            "Evaluate on patients with the labels the model was trained for."
        )
    if options.feature_cache is None:
        data = Bags(cohort, processor, model.config.label2id, cohort_options.cache_dir, accelerator)
    else:
        data = CachedBags(cohort, model, processor, accelerator, options.feature_cache, workers=inference.workers)
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
        bootstrap = Bootstrap(options.resamples, seed=options.seed)
        write_attentions(folder / ATTENTIONS, cohort, predictions.attentions)
        if options.figures:
            report |= write_evidence(
                folder / "figures",
                cohort,
                predictions,
                model.config,
                rows=rows,
                auroc=report["scores"]["auroc"],
                prevalence=options.prevalence,
                bootstrap=bootstrap,
            )
        probabilities = predictions.probabilities
        write_evaluation(folder, cohort, probabilities, model.config, report, stem="metrics", bootstrap=bootstrap)
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
    cohort = read_checked(cohort_options, accelerator)
    cohort = patients_of_part(cohort, "test" if options.submission else options.part)
    data = Bags(cohort, processor, None, cohort_options.cache_dir, accelerator)
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


def _check_frozen(model_options: ModelOptions, options: TrainingOptions) -> None:
    frozen = model_options.freeze_encoder and model_options.adapter is None
    if model_options.standardize_cells and not frozen:
        raise RecipeError(
            "--standardize-cells: the features of an encoder that learns keep no scale. Add --freeze-encoder (and no "
            "--adapter), or leave --standardize-cells out."
        )
    if options.feature_cache is None:
        return
    if not frozen:
        raise RecipeError(
            "--feature-cache: features can be kept of a frozen encoder only. Add --freeze-encoder (and no --adapter), "
            "or leave --feature-cache out."
        )
    if options.feature_views < 0:
        raise RecipeError(f"--feature-views {options.feature_views}: expected a number of views, 0 for none.")


def _datasets(
    cohort: Cohort,
    split: Split,
    model: LymphMILForBagClassification,
    processor: LymphImageProcessor,
    accelerator: Accelerator,
    reading: CohortOptions,
    options: TrainingOptions,
) -> tuple[BagDataset | FeatureBags, BagDataset | FeatureBags | None]:
    """Training patients, augmented, and validation patients where there are any; the former set the scale of cells."""
    augmentation = Augmentation() if options.augment else None
    if options.feature_cache is None:
        data = Bags(cohort, processor, model.config.label2id, reading.cache_dir, accelerator)
    else:
        seen, views = cohort.select(split.train + split.validation), options.feature_views if augmentation else 0
        cache, workers = options.feature_cache, options.workers
        data = CachedBags(seen, model, processor, accelerator, cache, views=views, workers=workers)
    if model.config.standardize_cells:
        fit_cell_standardizer(model, data.subset(split.train), accelerator, workers=options.workers)
    train_set = data.subset(split.train, max_cells=options.max_cells, augmentation=augmentation, seed=options.seed)
    return train_set, data.subset(split.validation) if split.validation else None


def _images_of(dataset: BagDataset | FeatureBags, patients: Cohort, reading: CohortOptions) -> datasets.Dataset:
    return dataset.rows if isinstance(dataset, BagDataset) else build_bags(patients, cache_dir=reading.cache_dir)


def _learn(
    model: LymphMILForBagClassification,
    lesson: Lesson,
    validation_set: BagDataset | FeatureBags | None,
    accelerator: Accelerator,
    options: TrainingOptions,
    run: Run,
    *,
    sample_weights: Sequence[float] | None,
) -> Inference | None:
    """Train; the model then has the weights of the best epoch, and what it says of the validation patients is given."""
    encoder, adapted = None, isinstance(model, PeftModel)
    if options.feature_cache is not None:
        # Features take the place of the images: the encoder steps aside, and nothing is left to decode.
        encoder, options = take_encoder(model), replace(options, workers=0)

    def validate(model: nn.Module) -> dict[str, float]:
        result = infer(model, validation_set, accelerator, workers=options.workers, progress=False)
        scores = score(validation_set.label_ids, result.probabilities)
        return {"loss": result.loss, "auroc": scores["auroc"], "balanced_accuracy": scores["balanced_accuracy"]}

    loop = TrainingLoop(
        accelerator,
        lesson.model,
        lesson.dataset,
        lesson.collate,
        options,
        run.folder,
        validate=None if validation_set is None else validate,
        sample_weights=sample_weights,
        # An adapter is new, like the head: it learns at the full rate. What is around it is frozen anyway.
        encoder=None if adapted else model.model.encoder,
        fixed=() if adapted else pretrained_batch_norms(model.model.encoder),
    )
    progress = loop.run()
    predictions = None
    if validation_set is not None:
        predictions = infer(loop.model, validation_set, accelerator, workers=options.workers)
    if encoder is not None:
        put_encoder(model, encoder)
    if accelerator.is_main_process:
        history_figure(progress.history, run.folder / "history.png")
    return predictions


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


def _clinical_baseline(
    run: Run, cohort: Cohort, split: Split, label_names: list[str], options: TrainingOptions
) -> Baseline | None:
    """The clinical model beside the image model: before the training, so that what is wrong with it is said early."""
    patients = cohort.select(split.train).patients
    recorded = any(value is not None for patient in patients for value in clinical_values(patient).values())
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
        rows = [Row(CLINICAL_ALONE, clinical, baseline.model.decision_threshold), blend.row(probabilities, clinical)]
        report["baselines"] = score_rows(labels, probabilities, config.decision_threshold, rows)
    note = "validation patients of this run, which also chose its epoch and its threshold: not a test"
    write_evaluation(run.folder, cohort, probabilities, config, {"patients": note, **report}, stem="validation")
