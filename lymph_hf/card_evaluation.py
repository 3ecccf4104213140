"""What a card says of the scored patients of a run."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from huggingface_hub import EvalResult

from .card_patterns import CardError
from .metrics import Interval
from .metrics_decision import bayes
from .options_publish import CardOptions
from .reporting import scores_table
from .runs import Run

PREVALENCES = (0.1, 0.18, 0.5)  # 18 %: share of tumours among the lymphocytoses of one laboratory
# Names under which the Hub knows the scores.
HUB_METRICS = {
    "auroc": "roc_auc",
    "auprc": "average_precision",
    "sensitivity": "recall",
    "brier": "brier_score",
}
_OF_LABELS = ("coverage", "referred")  # scores that are told for each label too
_OF_FOLDS = (
    "Those of the training data. Each was predicted by models of folds that it took no part in: these are scores of "
    "models trained on a part of the patients, each deciding at a threshold of its own, averaged over the repeats."
)


@dataclass(frozen=True)
class Kind:
    """A kind of scored patients.

    Attributes:
        title: heading.
        split: name of the part for the Hub.
        unseen: the models that were scored did not know these patients.
        about: fact of the publisher that says who they are, or the sentence itself.
    """

    title: str
    split: str
    unseen: bool
    about: Literal["evaluation_data", "training_data"] | str


HELD_OUT = Kind("Held-out patients", "test", True, "evaluation_data")
OUT_OF_FOLD = Kind("Out-of-fold patients", "out-of-fold", True, _OF_FOLDS)
VALIDATION = Kind("Validation patients", "validation", False, "training_data")


@dataclass(frozen=True)
class Evaluation:
    """Scores of some patients.

    Attributes:
        kind: who they are.
        report: content of `metrics.json` or `validation.json`.
        figure: picture of the scores, where there is one.
    """

    kind: Kind
    report: dict[str, Any]
    figure: Path | None

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The scores."""
        return {name: read_interval(values) for name, values in self.report["scores"].items()}

    @property
    def defined(self) -> dict[str, Interval]:
        """The scores that are numbers."""
        return {name: interval for name, interval in self.intervals.items() if _is_number(interval)}

    def content(self, facts: CardOptions) -> dict[str, Any]:
        """What the template shows."""
        counts = self.report["n_per_label"].items()
        return {
            "title": self.kind.title,
            "data": getattr(facts, self.kind.about, self.kind.about),
            "patients": self.report["patients"],
            "n": self.report["n"],
            "counts": ", ".join(f"{count} {name}" for name, count in counts),
            "interval": self.report["interval"],
            "prevalence": self.report.get("prevalence"),
            "table": scores_table(self._worded(), markdown=True).replace("undefined", "not estimable"),
            "spread": _spread(self.report),
            "beside": _beside(self.report),
            "figure": None if self.figure is None else self.figure.name,
        }

    def predictive_rows(self, facts: CardOptions, labels: Sequence[str]) -> list[dict[str, str]]:
        """Predictive values at some prevalences; none without sensitivity and specificity."""
        if len(labels) != 2 or not {"sensitivity", "specificity"} <= self.defined.keys():
            return []
        sensitivity, specificity = (self.defined[name].value for name in ("sensitivity", "specificity"))
        sample = self.report["n_per_label"][labels[1]] / self.report["n"]
        chosen = {*(facts.prevalence or PREVALENCES), self.report.get("prevalence")} - {None}
        shares = {f"{share:.0%}": share for share in sorted(chosen)}
        shares[f"{sample:.0%}, as in this sample"] = sample
        rows = []
        for name, share in shares.items():
            ppv, npv = predictive_values(sensitivity, specificity, share)
            rows.append({"share": name, "ppv": _decimal(ppv), "npv": _decimal(npv)})
        return rows

    def calibration(self) -> str:
        """How far probabilities were from what happened."""
        names = {
            "brier": "Brier score",
            "ece": "expected calibration error",
            "calibration_slope": "calibration slope",
            "calibration_intercept": "calibration intercept",
        }
        own = ", each scaled by its fold and not by this" if self.kind is OUT_OF_FOLD else ""
        return (
            f"{self.kind.title}{own}: {self._said(names) or 'not estimable'}. A probability of this model is not the "
            "risk of a patient elsewhere, where the disease is more or less common."
        )

    def referral(self) -> str:
        """What prediction sets did."""
        names = {"coverage": "sets that held the label", "referred": "referred"}
        seen = self._said(names | {"accuracy_decided": "right when decided"})
        return f"{self.kind.title}: {seen or 'prediction sets were not scored'}."

    def subgroups(self, labels: Sequence[str]) -> str:
        """A table of scores, or what is not known."""
        groups = self.report.get("subgroups")
        if not groups:
            return (
                "Scores by age, sex and lymphocyte count were not computed: nothing is known about unequal performance."
            )
        columns = ("auroc", "sensitivity", "specificity")
        lines = [f"| variable | group | patients | {labels[-1]} | {' | '.join(columns)} |", "|---" * 7 + "|"]
        for group in groups:
            scores = {name: read_interval(values) for name, values in group["scores"].items()}
            cells = [with_bounds(scores[name]) if _is_number(scores[name]) else "not estimable" for name in columns]
            start = [group["variable"], group["group"], str(group["n"]), str(group["positives"])]
            lines.append(f"| {' | '.join([*start, *cells])} |")
        return "\n".join(lines)

    def smallest_class(self) -> str:
        """How much a single patient counts."""
        name, count = min(self.report["n_per_label"].items(), key=lambda item: item[1])
        return (
            f"The scores rest on {self.report['n']} patients, {count} of them {name}: one {name} patient more or less "
            f"called right moves the share of right calls among them by {100 / max(count, 1):.0f} percentage points."
        )

    def results(self, facts: CardOptions) -> list[EvalResult]:
        """The scores as the Hub reads them."""
        cohort = "synthetic-cohort" if facts.synthetic else "private-cohort"
        place = {
            "task_type": "image-classification",
            "task_name": "Classification of patients",
            "dataset_type": (facts.datasets or [cohort])[0],
            "dataset_name": f"{self.kind.title} described in the card",
            "dataset_split": self.kind.split,
        }
        return [
            hub_result(score, interval, self.report["n"], place)
            for score, interval in self.defined.items()
            if not math.isnan(interval.low)
        ]

    def _worded(self) -> dict[str, Interval]:
        """The scores that are numbers, those of one label (`coverage_0`) under its name."""
        labels = [*self.report["n_per_label"]]
        numbered = {f"{score}_{i}": f"{score} of {name}" for i, name in enumerate(labels) for score in _OF_LABELS}
        return {numbered.get(name, name): interval for name, interval in self.defined.items()}

    def _said(self, names: Mapping[str, str]) -> str:
        """The scores of these names, in words."""
        found = {text: self.defined[name] for name, text in names.items() if name in self.defined}
        return "; ".join(f"{text} {with_bounds(interval)}" for text, interval in found.items())


def evaluations(run: Run) -> list[Evaluation]:
    """The scores that were written of a run, those of patients whom it did not know first; may be empty."""
    folds = (run.folder / "out-of-fold.csv").exists()
    places = [(HELD_OUT, run.evaluation / "metrics.json", "evaluation.png")]
    places += [(OUT_OF_FOLD, run.folder / "metrics.json", "crossval.png")] * folds
    places += [(VALIDATION, run.folder / "validation.json", "validation.png")]
    found = []
    for kind, path, figure in places:
        if path.exists():
            report = json.loads(path.read_text(encoding="utf-8"))
            picture = path.with_name(figure)
            found.append(Evaluation(kind, report, picture if picture.exists() else None))
    return found


def required_evaluations(run: Run) -> list[Evaluation]:
    """The same, at least one.

    Raises:
        CardError: nobody was scored.
    """
    found = evaluations(run)
    if not found:
        raise CardError(f"{run.folder} holds no scores: run lymph evaluate on labelled patients first.")
    return found


def hub_result(score: str, interval: Interval, n: int, place: Mapping[str, Any]) -> EvalResult:
    """One score for the model-index of a card.

    Args:
        place: the other fields, such as `dataset_name`.
    """
    return EvalResult(
        metric_type=HUB_METRICS.get(score, score),
        metric_name=f"{score} ({interval.level:.0%} interval {interval.low:.3f} to {interval.high:.3f})",
        metric_value=round(interval.value, 4),
        metric_args={"n": n, "low": round(interval.low, 4), "high": round(interval.high, 4)},
        **place,
    )


def predictive_values(sensitivity: float, specificity: float, prevalence: float) -> tuple[float, float]:
    """Positive and negative predictive value by Bayes' rule; NaN where no patient would get that answer.

    >>> predictive_values(0.9, 0.8, 0.5)
    (0.8181818181818181, 0.888888888888889)
    """
    values = bayes(np.float64(sensitivity), np.float64(specificity), prevalence)
    return float(values["ppv"]), float(values["npv"])


def read_interval(stored: Mapping[str, float | None]) -> Interval:
    """An interval from JSON, which has no NaN."""
    return Interval(**{name: math.nan if value is None else value for name, value in stored.items()})


def with_bounds(interval: Interval) -> str:
    """Value and bounds; without bounds it says so."""
    return str(interval).replace("undefined", "interval not estimable")


def _is_number(interval: Interval) -> bool:
    return not math.isnan(interval.value)


def _decimal(value: float) -> str:
    return "no such answer" if math.isnan(value) else f"{value:.3f}"


def _spread(report: Mapping[str, Any]) -> str | None:
    """How much the folds and repeats of a cross-validation differ."""
    if "folds_spread" not in report:
        return None
    folds = report["folds_spread"]["auroc"]
    text = f"AUROC among the patients of single folds: mean {folds['mean']:.3f}, {_range(folds)}"
    if len(report["repeats"]) > 1:
        text += f"; of single repeats: {_range(report['repeats_spread']['auroc'])}"
    return f"{text}."


def _range(spread: Mapping[str, float]) -> str:
    return f"{spread['lowest']:.3f} to {spread['highest']:.3f}"


def _beside(report: Mapping[str, Any]) -> str | None:
    """AUROC of the other models on the same patients."""
    others = (report.get("baselines") or {}).items()
    found = {name: read_interval(model["scores"]["auroc"]) for name, model in others if "auroc" in model["scores"]}
    said = "; ".join(f"{name} {with_bounds(area)}" for name, area in found.items() if _is_number(area))
    return f"AUROC of other models on the same patients: {said}." if said else None
