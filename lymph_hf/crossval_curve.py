"""The learning curve of a cross-validation: the same folds, trained on less patients."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .baselines import CLINICAL_ALONE, NETWORK
from .card_evaluation import read_interval
from .cohort import Cohort
from .crossval_folds import Fold, FoldPlan, run_folds
from .crossval_scores import WITHIN_FOLDS, OutOfFold, out_of_fold
from .files import remove_folder, write_json
from .metrics import Bootstrap, score
from .metrics_subgroups import LearningPoint, nested_subsets
from .reporting_evidence import learning_curve_figure
from .runs import Run

logger = logging.getLogger(__name__)

FOLDER = "learning-curve"


def draw_learning_curve(
    run: Run, cohort: Cohort, folds: Sequence[Fold], models: Mapping[str, OutOfFold], plan: FoldPlan
) -> None:
    """Train every fold on shares of its training patients, and draw the out-of-fold AUROC against their number.

    The subsets are stratified and nested: a smaller one lies in the larger ones. Validation patients and folds are
    those of the cross-validation. Writes `learning-curve.json` and `.png`; what is finished already is not repeated,
    and of the models only their predictions are kept.

    Args:
        cohort: checked.
        folds: all, finished; they are the curve's last point.
        models: their predictions, from `out_of_fold`.
        plan: of the folds; its `learning_curve` are the shares.
    """
    bootstrap = Bootstrap(plan.options.resamples, seed=plan.training.seed)
    smaller_plan = replace(plan, options=replace(plan.options, baselines=["none"], learning_curve=None))
    by_share = {}
    for share in sorted({share for share in plan.options.learning_curve if share < 1}):
        name = f"{FOLDER}/{share:g}"
        smaller = [_smaller(fold, cohort, share, run.folder / name) for fold in folds]
        logger.info("Learning curve: %g of the training patients, %s", share, _range(smaller))
        run_folds(smaller, smaller_plan, cohort, run.folder / "logs" / name)
        for fold in smaller:
            remove_folder(Run(fold.folder).model)
        by_share[share] = smaller, out_of_fold(smaller, models[NETWORK].label_names)
    by_share[1.0] = folds, models
    curves = {
        name: [_point(share, *of_share, name, bootstrap) for share, of_share in by_share.items()]
        for name in (NETWORK, CLINICAL_ALONE)
        if all(name in of_share[1] for of_share in by_share.values())
    }
    write_json(run.folder / f"{FOLDER}.json", curves)
    drawn = {name: [_drawn(point) for point in points] for name, points in curves.items()}
    learning_curve_figure(drawn, run.folder / f"{FOLDER}.png", title="Learning curve, out of fold")


def _smaller(fold: Fold, cohort: Cohort, share: float, output: Path) -> Fold:
    """The fold with a share of its training patients, at least one of each label."""
    train = cohort.select(fold.split.train).patients
    names = sorted({patient.label for patient in train})
    labels = [names.index(patient.label) for patient in train]
    (rows,) = nested_subsets(labels, [max(len(names), round(share * len(train)))], seed=fold.seed)
    split = replace(
        fold.split,
        train=tuple(train[row].patient_id for row in rows),
        source=f"{fold.split.source}; {share:g} of its training patients",
    )
    return replace(fold, split=split, folder=output.joinpath(*fold.folder.parts[-2:]))


def _range(folds: Sequence[Fold]) -> str:
    sizes = sorted({len(fold.split.train) for fold in folds})
    return f"{' to '.join(map(str, sizes[:: max(1, len(sizes) - 1)]))} patients"


def _point(
    share: float, folds: Sequence[Fold], models: Mapping[str, OutOfFold], name: str, bootstrap: Bootstrap
) -> dict[str, Any]:
    """What `learning-curve.json` holds of one model after training on one share.

    The AUROC is that of predictions averaged over the repeats, which may lie above those of each repeat, `lowest` to
    `highest`.
    """
    intervals = models[name].intervals(bootstrap)
    repeats = [score(p.labels, p.probabilities)["auroc"] for p in models[name].by_repeat().values()]
    return {
        "share": share,
        "patients": float(np.mean([len(fold.split.train) for fold in folds])),
        "auroc": intervals["auroc"].as_dict(),
        WITHIN_FOLDS: intervals[WITHIN_FOLDS].as_dict(),
        "lowest": min(repeats),
        "highest": max(repeats),
    }


def _drawn(point: Mapping[str, Any]) -> LearningPoint:
    patients, area = round(point["patients"]), read_interval(point["auroc"])
    return LearningPoint(patients, area, point["lowest"], point["highest"])
