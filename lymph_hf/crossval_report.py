"""What a cross-validation says of its folds: tables, `metrics.json` and figures."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .baselines import NETWORK
from .card_evaluation import read_interval
from .cohort import Cohort
from .crossval_baselines import row_slug
from .crossval_folds import Fold, FoldPlan
from .crossval_scores import OF_DECISIONS, WITHIN_FOLDS, OutOfFold, Predictions
from .crossval_search import chosen_settings
from .evidence import ATTENTIONS, cells_figure, known_groups, mean_attentions, probability_figures
from .files import write_json
from .inference import write_table
from .metrics import Bootstrap, Interval
from .metrics_comparison import delong_test, paired_bootstrap
from .metrics_subgroups import Subgroup, subgroup_scores
from .reporting import scores_table
from .reporting_crossval import RowScores, crossval_figure, rows_figure
from .reporting_evidence import subgroup_figure
from .runs import Run

logger = logging.getLogger(__name__)

# Their definition knows no threshold, so that they can be compared whatever each fold's is.
_COMPARED = ("auroc", "auprc", "brier")


def write_report(
    run: Run, cohort: Cohort, folds: Sequence[Fold], models: Mapping[str, OutOfFold], plan: FoldPlan
) -> None:
    """Write and log what the folds have found.

    Args:
        cohort: checked.
        folds: all, finished.
        models: from `out_of_fold`.
    """
    for name, model in models.items():
        suffix = "" if name == NETWORK else f"-{row_slug(name)}"
        write_table(model.table, run.folder / f"out-of-fold{suffix}.csv")
    bootstrap = Bootstrap(plan.options.resamples, seed=plan.training.seed)
    report = crossval_report(folds, models, bootstrap)
    if plan.space is not None:
        for fold, row in zip(folds, report["folds"], strict=True):
            row["search"] = chosen_settings(fold.search_folder)
    rows = _row_scores(report)
    report |= _figures(run, cohort, folds, models, rows, bootstrap)
    write_json(run.folder / "metrics.json", {"data": cohort.root.name, **report})
    scores = {name: read_interval(stored) for name, stored in report["scores"].items()}
    logger.info("%s (n = %d)\n%s", report["patients"], report["n"], scores_table(scores))
    if len(rows) > 1:
        logger.info("Out-of-fold AUROC, and that of the network minus it\n%s", _rows_table(rows))


def crossval_report(folds: Sequence[Fold], models: Mapping[str, OutOfFold], bootstrap: Bootstrap) -> dict[str, Any]:
    """What `metrics.json` of a cross-validation holds: pooled scores first, then repeats, folds and the other models.

    Args:
        folds: all, finished.
        models: from `out_of_fold`.
        bootstrap: over patients.
    """
    network = models[NETWORK]
    pooled = network.predictions()
    names = network.label_names
    repeats = {repeat: predictions.intervals(bootstrap) for repeat, predictions in network.by_repeat().items()}
    counts = np.bincount(pooled.labels, minlength=len(names)).tolist()
    several = f", averaged over {len(repeats)} repeats" if len(repeats) > 1 else ""
    number = max(fold.number for fold in folds)
    return {
        "patients": f"all labelled patients, each predicted out of fold ({number} folds{several})",
        "n": len(pooled.labels),
        "n_per_label": dict(zip(names, counts, strict=True)),
        "threshold": None,  # each patient is decided at that of its fold
        "prevalence": None,
        "interval": f"95% percentile bootstrap over patients, {bootstrap.resamples} resamples, seed {bootstrap.seed}",
        "scores": _plain(network.intervals(bootstrap)),
        "folds_spread": _spread([_values(fold.report["scores"]) for fold in folds]),
        "repeats_spread": _spread([{name: i.value for name, i in scores.items()} for scores in repeats.values()]),
        "repeats": [{"repeat": repeat, "scores": _plain(scores)} for repeat, scores in repeats.items()],
        "folds": [_fold_row(fold) for fold in folds],
        "baselines": {name: _beside(network, model, bootstrap) for name, model in models.items() if name != NETWORK},
    }


def _fold_row(fold: Fold) -> dict[str, Any]:
    report = fold.report
    return {
        "repeat": fold.repeat,
        "fold": fold.number,
        "n": report["n"],
        "n_per_label": report["n_per_label"],
        "threshold": report["threshold"],
        "scores": report["scores"],
    }


def _beside(network: OutOfFold, model: OutOfFold, bootstrap: Bootstrap) -> dict[str, Any]:
    """Scores of another model on the same patients, and the lead of the network over it."""
    pooled, other = network.predictions(), model.predictions()
    lead = paired_bootstrap(pooled.labels, other.probabilities, pooled.probabilities, bootstrap=bootstrap)

    def within(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {WITHIN_FOLDS: network.auroc_within_folds(weights) - model.auroc_within_folds(weights)}

    report = {
        "threshold": None,
        "scores": _plain(model.intervals(bootstrap)),
        "network_lead": {name: lead[name].as_dict() for name in _COMPARED if name in lead},
        "network_lead_within_folds": bootstrap.intervals(within, len(pooled.labels))[WITHIN_FOLDS].as_dict(),
    }
    if pooled.probabilities.shape[1] == 2:
        report["delong"] = delong_test(pooled.labels, other.probabilities, pooled.probabilities).as_dict()
    return report


def _values(scores: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    return {name: np.nan if stored["value"] is None else stored["value"] for name, stored in scores.items()}


def _spread(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and range of each score over folds or repeats; undefined ones are left out."""
    table = pd.DataFrame(rows)
    spread = {"mean": table.mean(), "sd": table.std(ddof=1), "lowest": table.min(), "highest": table.max()}
    return {name: {kind: float(values[name]) for kind, values in spread.items()} for name in table}


def _plain(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float | None]]:
    return {name: interval.as_dict() for name, interval in intervals.items()}


# Figures and table ------------------------------------------------------------------------------------------


def _row_scores(report: Mapping[str, Any]) -> dict[str, RowScores]:
    """The network and what stands beside it."""

    def areas(scores: Mapping[str, Mapping[str, float | None]]) -> tuple[Interval, Interval]:
        return read_interval(scores["auroc"]), read_interval(scores[WITHIN_FOLDS])

    rows = {NETWORK: RowScores(*areas(report["scores"]))}
    for name, beside in report["baselines"].items():
        lead = beside["network_lead"]["auroc"]["difference"], beside["network_lead_within_folds"]
        rows[name] = RowScores(*areas(beside["scores"]), *map(read_interval, lead))
    return rows


def _rows_table(rows: Mapping[str, RowScores]) -> str:
    """Of all patients, aligned."""
    cells = [(name, str(row.auroc), "" if row.lead is None else str(row.lead)) for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def _figures(
    run: Run,
    cohort: Cohort,
    folds: Sequence[Fold],
    models: Mapping[str, OutOfFold],
    rows: Mapping[str, RowScores],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Draw what there is to draw, and return what of it belongs into `metrics.json`."""
    network = models[NETWORK]
    predictions = {name: model.predictions() for name, model in models.items()}
    pooled = predictions[NETWORK]
    crossval_figure(
        pooled.labels,
        pooled.probabilities,
        rows[NETWORK],
        {_with_counts(fold): read_interval(fold.report["scores"]["auroc"]) for fold in folds},
        run.folder / "crossval.png",
        label_names=network.label_names,
        repeats=[repeat.probabilities for repeat in network.by_repeat().values()],
        bootstrap=bootstrap,
    )
    if len(rows) > 1:
        rows_figure(rows, run.folder / "baselines.png")
    folder = run.folder / "figures"
    folder.mkdir(exist_ok=True)
    _draw_cells(folder / "cells.png", cohort.select(pooled.patient_ids), folds, pooled, network.label_names)
    if len(network.label_names) != 2:
        return {}
    by_name = {name: of_model.probabilities for name, of_model in predictions.items()}
    probability_figures(folder, pooled.labels, by_name, positive=network.label_names[1], bootstrap=bootstrap)
    subgroups = _subgroups(cohort, pooled, bootstrap)
    if not subgroups:
        return {}
    positive, overall = network.label_names[1], rows[NETWORK].auroc
    subgroup_figure(subgroups, folder / "subgroups.png", positive=positive, overall=overall)
    return {"subgroups": [group.as_dict() for group in subgroups]}


def _with_counts(fold: Fold) -> str:
    """ "repeat 1, fold 2: 12 + 5" patients, by label."""
    return f"{fold}: {' + '.join(map(str, fold.report['n_per_label'].values()))}"


def _draw_cells(path: Path, patients: Cohort, folds: Sequence[Fold], pooled: Predictions, names: Sequence[str]) -> None:
    """As of one run; a cell has the weight that the model of its patient's fold gives it, over repeats the mean."""
    weighed = [fold.folder / ATTENTIONS for fold in folds]
    if absent := [weights for weights in weighed if not weights.is_file()]:
        logger.warning("No cells are shown: %d folds hold no %s, such as %s", len(absent), ATTENTIONS, absent[0].parent)
        return
    cells_figure(
        path,
        patients,
        pooled.labels,
        pooled.probabilities,
        mean_attentions(weighed, patients),
        decided=pooled.decided,
        names=names,
    )


def _subgroups(cohort: Cohort, pooled: Predictions, bootstrap: Bootstrap) -> list[Subgroup]:
    """Scores by age, sex and count as far as recorded; every patient is decided at the threshold of its own folds."""
    groups = known_groups(cohort.select(pooled.patient_ids))
    ranked, decided = (
        subgroup_scores(pooled.labels, probabilities, groups, bootstrap=bootstrap)
        for probabilities in (pooled.probabilities, pooled.certain)
    )
    return [
        replace(group, scores=group.scores | {name: other.scores[name] for name in OF_DECISIONS})
        for group, other in zip(ranked, decided, strict=True)
    ]
