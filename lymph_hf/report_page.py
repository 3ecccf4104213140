"""A run as one HTML page: scores, figures, exclusions, settings and the TRIPOD+AI checklist; it needs no network."""

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
    ("crossval.png", "Cross-validation", "Every patient is scored by models that never saw it."),
)
TRAINING_FIGURES = (
    ("history.png", "Training", "Losses and validation scores by epoch; the marked epoch was kept."),
    ("validation.png", "Validation patients", "They chose epoch, calibration and threshold: not a test."),
)
MAIN_SCORES = ("auroc", "auprc", "balanced_accuracy", "sensitivity", "specificity", "brier")


def report(options: ReportOptions) -> Path:
    """Write the page of a finished run; `lymph evaluate` writes it as well.

    Raises:
        RunError: the folder is no run, or holds no scores yet.
    """
    run = Path(options.run)
    return write_page(run, evaluation=Path(options.evaluation or run), page=options.output)


def write_page(run: Path, *, evaluation: Path, page: str | Path | None = None) -> Path:
    """Write `report.html`, with every picture inside.

    Args:
        run: folder of the run; of a model alone only the evaluation is shown.
        evaluation: folder with `metrics.json` and figures.
        page: where to write; by default `report.html` in `evaluation`.

    Raises:
        RunError: neither folder holds scores.
    """
    metrics, validation = (
        _read(folder / name) for folder, name in ((evaluation, "metrics.json"), (run, "validation.json"))
    )
    if not metrics and not validation:
        raise RunError(f"{evaluation} holds no scores: run lymph evaluate {run} --data FOLDER first.")
    settings, cohort = _read(run / "settings.json"), _read(run / "cohort.json")
    config = _read(Run(run).model / "config.json") or _read(run / "config.json")
    content = {
        "name": run.resolve().name,
        "version": __version__,
        "metrics": metrics,
        "validation": validation,
        "score_rows": _score_rows(metrics or validation),
        "compared": _compared(metrics or validation),
        "folds": metrics.get("folds", []),
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
    environment.filters |= {"words": words, "interval": _interval_text}
    path = Path(page) if page else evaluation / "report.html"
    write_text(path, environment.from_string(template).render(content))
    return path


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _score_rows(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float | None]]]:
    """The main scores first, then the others in their order."""
    scores = report["scores"]
    first = [name for name in MAIN_SCORES if name in scores]
    return [(name, scores[name]) for name in (*first, *(name for name in scores if name not in first))]


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
            found.append({"heading": heading, "text": text, "source": source, "width": width})
    return found


def _interval_text(stored: Mapping[str, Any]) -> str:
    values = {name: math.nan if value is None else value for name, value in stored.items()}
    return str(Interval(**values)).replace("undefined", "not estimable")
