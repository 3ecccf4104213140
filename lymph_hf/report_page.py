"""A run or a cross-validation as one HTML page, which needs no network.

It holds scores, figures, exclusions, settings and the TRIPOD+AI checklist.
"""

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from .files import write_text
from .metrics import Interval
from .options_report import ReportOptions
from .report_checklist import checklist
from .reporting_style import words
from .runs import Run, RunError
from .version import __version__

# Pictures of an evaluation, in the order of the page: file, heading, what to look for.
EVALUATION_FIGURES = (
    (
        "evaluation.png",
        "Patients at the frozen threshold",
        "ROC curve with its band, reliability, the probability of every patient, and the answers at the threshold.",
    ),
    (
        "crossval.png",
        "Folds",
        "Every patient is scored by models that never saw it. Their spread is how far one split can mislead.",
    ),
    (
        "baselines.png",
        "Beside the network, in the same folds",
        "Where the interval holds 0 no lead is shown. Images that tell labels apart by their number are a shortcut.",
    ),
    (
        "figures/curves.png",
        "ROC and precision-recall curves",
        "The network with its band, beside the others. Where the clinic alone draws the same, images added nothing.",
    ),
    (
        "figures/calibration.png",
        "Calibration",
        "Dots on the dotted line: of patients given 30 %, 30 % are positive. A slope below 1 is overconfidence.",
    ),
    (
        "figures/decision-curve.png",
        "Decision curve",
        "The model is of use at the threshold probabilities where its curve lies above both other strategies.",
    ),
    (
        "figures/subgroups.png",
        "Subgroups",
        "Wide intervals say that a group is too small to judge, not that it is fair.",
    ),
    (
        "figures/cells.png",
        "Cells behind right and wrong answers",
        "The weight of a cell is the model's, not an expert's.",
    ),
    (
        "learning-curve.png",
        "Learning curve",
        "Where it still rises at its end, more patients are worth more than another model.",
    ),
)
TRAINING_FIGURES = (
    ("history.png", "Training", "Losses and validation scores by epoch; the marked epoch was kept."),
    ("validation.png", "Validation patients", "They chose epoch, calibration and threshold: not a test."),
)
_LEAST = 2 / 3  # of its width: on narrower screens a picture is moved, as its letters could not be read
MAIN_SCORES = ("auroc", "auprc", "balanced_accuracy", "sensitivity", "specificity", "brier")


def report(options: ReportOptions) -> Path:
    """Write the page of a finished run or cross-validation; `lymph evaluate` and `lymph crossval` write it as well.

    Raises:
        RunError: the folder is no run, or holds no scores yet.
    """
    run = Path(options.run)
    return write_page(run, evaluation=Path(options.evaluation or run), page=options.output)


def write_page(run: Path, *, evaluation: Path, page: str | Path | None = None) -> Path:
    """Write `report.html`, with every picture inside.

    Args:
        run: folder of the run or cross-validation; of a model alone only the evaluation is shown.
        evaluation: folder with `metrics.json` and figures.
        page: where to write; by default `report.html` in `evaluation`.

    Raises:
        RunError: neither folder holds scores.
    """
    metrics, validation = (
        _read(folder / name) for folder, name in ((evaluation, "metrics.json"), (run, "validation.json"))
    )
    settings, cohort, config = _read(run / "settings.json"), _read(run / "cohort.json"), _config(run)
    if not metrics and not validation:
        unfinished = f"lymph crossval --resume --output {run}" if "folds" in settings else None
        raise RunError(
            f"{evaluation} holds no scores: run {unfinished or f'lymph evaluate {run} --data FOLDER'} first."
        )
    content = {
        "name": run.resolve().name,
        "version": __version__,
        "metrics": metrics,
        "validation": validation,
        "score_rows": _score_rows(metrics or validation),
        "compared": _compared(metrics or validation),
        "folds": _fold_rows(metrics),
        "curve": _read(evaluation / "learning-curve.json"),
        "figures": _pictures(evaluation, EVALUATION_FIGURES),
        "training_figures": _pictures(run, TRAINING_FIGURES),
        "patients": cohort.get("patients", {}),
        "exclusions": Counter(item["reason"].split(":")[0] for item in cohort.get("exclusions", [])).most_common(),
        "warnings": len(cohort.get("warnings", [])),
        "settings": settings,
        "config": {name: value for name, value in config.items() if value is not None},
        "checklist": checklist(
            metrics=metrics or validation, validation=validation, cohort=cohort, settings=settings, config=config
        ),
        "main_scores": MAIN_SCORES,
    }
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True)
    environment.filters |= {"words": words, "interval": _interval_text, "number": _number_text}
    path = Path(page) if page else evaluation / "report.html"
    write_text(path, environment.from_string(template).render(content))
    return path


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _config(run: Path) -> dict[str, Any]:
    """Of the model; of an ensemble with the settings of its first member, of folds without one that of the first."""
    fold = Run(run / "repeat-1" / "fold-1").model
    found = (_read(folder / "config.json") for folder in (Run(run).model, run, fold))
    config = next(filter(None, found), {})
    if members := config.get("members"):
        config = members[0] | config | {"members": len(members)}
    return config


def _fold_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of the page for each fold, and for their mean and standard deviation."""
    folds, spread = metrics.get("folds", []), metrics.get("folds_spread", {})
    rows = [
        {
            "name": f"repeat {fold['repeat']}, fold {fold['fold']}",
            "patients": ", ".join(f"{count} {label}" for label, count in fold["n_per_label"].items()),
            "scores": {name: stored["value"] for name, stored in fold["scores"].items()},
            "threshold": fold["threshold"],
            "search": fold.get("search", {}).get("settings", {}),
        }
        for fold in folds
    ]
    for name, kind in (("mean", "mean"), ("standard deviation", "sd")) if folds else ():
        scores = {score: values[kind] for score, values in spread.items()}
        rows.append({"name": name, "patients": "", "scores": scores, "threshold": None, "search": {}})
    return rows


def _score_rows(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float | None]]]:
    """The main scores first, then the others in their order; those of one label name it."""
    scores = report["scores"]
    first = [name for name in MAIN_SCORES if name in scores]
    of_label = {
        f"{score}_{number}": f"{score}, {label} patients"
        for number, label in enumerate(report["n_per_label"])
        for score in ("coverage", "referred")
    }
    names = (*first, *(name for name in scores if name not in first))
    return [(of_label.get(name, name), scores[name]) for name in names]


def _compared(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]]:
    """Name, scores and the network's lead in AUROC, of the network and of every baseline."""
    baselines = report.get("baselines") or {}
    rows = [("network", report["scores"], None)] if baselines else []
    return rows + [(name, row["scores"], row["network_lead"]["auroc"]) for name, row in baselines.items()]


def _pictures(folder: Path, figures: tuple[tuple[str, str, str], ...]) -> list[dict[str, Any]]:
    """Pictures that are there, as data that a page may hold."""
    found = []
    for name, heading, text in figures:
        path = folder / name
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            with Image.open(path) as picture:  # shown as large as it was drawn, so that all letters are alike
                width = round(96 * picture.width / picture.info.get("dpi", (96,))[0])
            source = f"data:image/png;base64,{data}"
            least = round(_LEAST * width)
            found.append({"heading": heading, "text": text, "source": source, "width": width, "least": least})
    return found


def _number_text(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def _interval_text(stored: Mapping[str, Any]) -> str:
    values = {name: math.nan if value is None else value for name, value in stored.items()}
    return str(Interval(**values)).replace("undefined", "not estimable")
