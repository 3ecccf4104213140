"""`lymph crossval`: every patient predicted by a model that was not trained on it, and the models as one."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .baselines import NETWORK
from .cohort import Cohort
from .crossval_curve import draw_learning_curve
from .crossval_ensemble import save_ensemble
from .crossval_folds import Fold, FoldPlan, check_teacher, draw_folds, run_folds
from .crossval_report import write_report
from .crossval_scores import OutOfFold, out_of_fold
from .crossval_search import SearchSpace
from .modeling_ensemble import EnsembleError
from .options import CohortOptions, ModelOptions, TrainingOptions
from .options_crossval import CrossvalOptions
from .options_distill import FoldTeacherOptions
from .patient_data import ordered_labels, read_checked, record_data
from .precision import with_settled_precision
from .report_page import write_page
from .runs import Run
from .splits import Split

logger = logging.getLogger(__name__)


def crossval(
    cohort_options: CohortOptions,
    options: CrossvalOptions,
    model_options: ModelOptions,
    training: TrainingOptions,
    teacher: FoldTeacherOptions | None = None,
) -> Path:
    """Cross-validate a patient model.

    Each fold is a run of `lymph train` whose test patients are the fold. Epoch, standardiser, calibration, threshold
    and searched settings come from the other patients alone. Folds that are finished are not repeated with `resume`,
    and one that was interrupted goes on. Baselines and a learning curve may be asked for later, with `resume`.

    ```
    out-of-fold.csv          what a model that did not know the patient said; out-of-fold-<model>.csv of the others
    metrics.json             scores of all patients, of each repeat and fold, and of the models beside
    crossval.png             AUROC of each fold, out-of-fold ROC curve
    baselines.png            the network among what stands beside it, with paired differences
    figures/                 out of fold: ROC and precision-recall curves, calibration, decision curve, subgroups, cells
    learning-curve.json, .png, learning-curve/     scores after training on less patients
    report.html              all of that as one page
    lymph-mil/               the models of all folds as one
    repeat-1/fold-1/ ...     the runs; fold-1-split.json: their patients; fold-1-search/: what was searched
    ```

    Args:
        teacher: another cross-validation in the same folds, whose models teach those of this one.

    Returns:
        The output folder.

    Raises:
        CohortError, SplitError, SearchError, RunError: before anything is trained.
        CrossvalError: a teacher of other folds, before anything is trained; a fold failed; the message names it.
    """
    run = Run(Path(training.output))
    training = with_settled_precision(training)
    space = None if options.search is None else SearchSpace.read(options.search)
    taught = teacher is not None and teacher.teacher is not None
    groups = (cohort_options, options, model_options, training, *((teacher,) if taught else ()))
    lock = run.claim({k: v for group in groups for k, v in asdict(group).items()}, resume=training.resume)
    cohort = read_checked(cohort_options)
    label_names = ordered_labels(cohort, options.positive_label)
    folds = draw_folds(cohort, options, run.folder, training.seed)
    patients = tuple(patient.patient_id for patient in cohort.labelled)
    # Every patient trains some member: none is held out from the ensemble.
    record_data(run, cohort, Split(patients, seed=training.seed, source="cross-validation"))
    plan = FoldPlan(cohort_options, options, model_options, training, space, teacher if taught else None)
    check_teacher(folds, plan)
    run_folds(folds, plan, cohort, run.folder / "logs")
    models = out_of_fold(folds, label_names)
    write_report(run, cohort, folds, models, plan)
    if options.ensemble:
        _save_ensemble(run, cohort.select(patients), folds, models[NETWORK], training)
    if options.learning_curve:
        draw_learning_curve(run, cohort, folds, models, plan)
    logger.info("Report: %s", write_page(run.folder, evaluation=run.folder))
    lock.release()
    return run.folder


def _save_ensemble(
    run: Run, patients: Cohort, folds: Sequence[Fold], network: OutOfFold, training: TrainingOptions
) -> None:
    """The models as one; where they cannot be one, the scores are still worth having."""
    try:
        save_ensemble([fold.folder for fold in folds], patients, network.predictions(), training, run.model)
    except EnsembleError as error:
        logger.warning("No model of all folds was saved: %s", error)
