"""`lymph crossval`: every patient predicted by a model that was not trained on it, and the models as one."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from .card import read_interval
from .cohort import Cohort, read_cohort, scan_images
from .crossval_ensemble import save_ensemble
from .crossval_folds import Fold, FoldPlan, draw_folds, run_folds
from .crossval_scores import NETWORK, WITHIN_FOLDS, OutOfFold, crossval_report, out_of_fold
from .crossval_search import SearchSpace, chosen_settings
from .files import write_json
from .inference import write_table
from .metrics import Interval
from .modeling_ensemble import EnsembleError
from .options import CohortOptions, ModelOptions, TrainingOptions
from .options_crossval import CrossvalOptions
from .precision import with_settled_precision
from .recipes import ordered_labels, record_data
from .reporting import scores_table
from .reporting_crossval import crossval_figure
from .runs import Run
from .splits import Split

logger = logging.getLogger(__name__)


def crossval(
    cohort_options: CohortOptions, options: CrossvalOptions, model_options: ModelOptions, training: TrainingOptions
) -> Path:
    """Cross-validate a patient model.

    Each fold is a run of `lymph train` whose test patients are the fold. Epoch, standardiser, calibration, threshold
    and searched settings come from the other patients alone. Folds that are finished are not repeated with `resume`,
    and one that was interrupted goes on.

    ```
    out-of-fold.csv          what a model that did not know the patient said; out-of-fold-<model>.csv of the others
    metrics.json             scores of all patients, of each repeat and fold, and of the models beside
    crossval.png             AUROC of each fold, out-of-fold ROC curves
    lymph-mil/               the models of all folds as one
    repeat-1/fold-1/ ...     the runs; fold-1-split.json: their patients; fold-1-search/: what was searched
    ```

    Returns:
        The output folder.

    Raises:
        CohortError, SplitError, SearchError, RunError: before anything is trained.
        CrossvalError: a fold failed; the message names it.
    """
    run = Run(Path(training.output))
    training = with_settled_precision(training)
    space = None if options.search is None else SearchSpace.read(options.search)
    groups = (cohort_options, options, model_options, training)
    lock = run.claim({k: v for group in groups for k, v in asdict(group).items()}, resume=training.resume)
    cohort = scan_images(
        read_cohort(cohort_options.data, reference_date=cohort_options.reference_date), strict=cohort_options.strict
    )
    logger.info("%s", cohort.summary())
    label_names = ordered_labels(cohort, options.positive_label)
    folds = draw_folds(cohort, options, run.folder, training.seed)
    patients = tuple(patient.patient_id for patient in cohort.labelled)
    # Every patient trains some member: none is held out from the ensemble.
    record_data(run, cohort, Split(patients, seed=training.seed, source="cross-validation"))
    plan = FoldPlan(cohort_options, options, model_options, training, space)
    run_folds(folds, plan, cohort, run.folder / "logs")
    models = out_of_fold(folds, label_names)
    _report(run, cohort, folds, models, plan)
    if options.ensemble:
        _save_ensemble(run, cohort.select(patients), folds, models[NETWORK], training)
    lock.release()
    return run.folder


def _report(run: Run, cohort: Cohort, folds: Sequence[Fold], models: Mapping[str, OutOfFold], plan: FoldPlan) -> None:
    for name, model in models.items():
        suffix = "" if name == NETWORK else f"-{name.split()[0]}"
        write_table(model.table, run.folder / f"out-of-fold{suffix}.csv")
    report = crossval_report(folds, models, resamples=plan.options.resamples, seed=plan.training.seed)
    if plan.space is not None:
        for fold, row in zip(folds, report["folds"], strict=True):
            row["search"] = chosen_settings(fold.search_folder)
    write_json(run.folder / "metrics.json", {"data": cohort.root.name, **report})
    network = models[NETWORK]
    pooled = network.predictions()
    areas = {name: _areas(report["baselines"].get(name, report)["scores"]) for name in models}
    crossval_figure(
        pooled.labels,
        {name: (model.predictions().probabilities, *areas[name]) for name, model in models.items()},
        {str(fold): read_interval(fold.report["scores"]["auroc"]) for fold in folds},
        run.folder / "crossval.png",
        label_names=network.label_names,
        repeats=[repeat.probabilities for repeat in network.by_repeat().values()],
    )
    scores = {name: read_interval(stored) for name, stored in report["scores"].items()}
    logger.info("%s (n = %d)\n%s", report["patients"], report["n"], scores_table(scores))
    for name, beside in report["baselines"].items():
        lead = read_interval(beside["network_lead"]["auroc"]["difference"])
        logger.info("%s: AUROC %s; the network leads by %s", name, areas[name][0], lead)


def _areas(scores: Mapping[str, Mapping[str, float | None]]) -> tuple[Interval, Interval]:
    """AUROC of all patients, and within folds."""
    return read_interval(scores["auroc"]), read_interval(scores[WITHIN_FOLDS])


def _save_ensemble(
    run: Run, patients: Cohort, folds: Sequence[Fold], network: OutOfFold, training: TrainingOptions
) -> None:
    """The models as one; where they cannot be one, the scores are still worth having."""
    try:
        save_ensemble([fold.folder for fold in folds], patients, network.predictions(), training, run.model)
    except EnsembleError as error:
        logger.warning("No model of all folds was saved: %s", error)
