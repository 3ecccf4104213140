"""The TRIPOD+AI checklist (Collins et al., BMJ 385:e078378, 2024) with what a run can say of each item.

What only people know, such as where and when patients were recruited, is listed as theirs to write.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """An item of the checklist: its number, what it asks, and the run's answer; `None` = for the authors."""

    number: str
    topic: str
    answer: str | None = None


# Numbers and subjects of the items that a run cannot know.
_AUTHORS = {
    "1": "Title names the study, the target population and the outcome",
    "2": "Abstract by TRIPOD+AI for Abstracts",
    "3": "Background: clinical context, intended purpose, known inequalities",
    "4": "Objectives: development, evaluation, or both",
    "6": "Participants: setting, eligibility, treatments",
    "17": "Ethical approval and consent",
    "18": "Funding, conflicts, protocol, registration, availability of data and code",
    "19": "Involvement of patients and the public",
    "25": "Interpretation of the results",
    "27": "Use in care: handling of poor input, need of expertise, next steps",
}


def checklist(
    *,
    metrics: Mapping[str, Any],
    validation: Mapping[str, Any],
    cohort: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
) -> list[Item]:
    """The items in their order. Each mapping may be empty: a model without its run cannot tell how it was made."""
    filled = {
        **_data(metrics, cohort, config),
        **_methods(metrics, validation, settings, config),
        **_results(metrics, cohort, settings, config),
    }
    items = [Item(number, topic) for number, topic in _AUTHORS.items()]
    items += [Item(number, topic, answer) for number, (topic, answer) in filled.items()]
    return sorted(items, key=lambda item: int(item.number))


def _data(metrics: Mapping[str, Any], cohort: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple]:
    labels = ", ".join(config.get("id2label", {}).values())
    features = ", ".join(name.replace("_", " ") for name in config.get("clinical_features", []))
    source = f"trained on {cohort['data']}; " if cohort else ""
    checked = f"{len(cohort['exclusions'])} patients or images left out, each with its reason" if cohort else None
    return {
        "5": (
            "Data: sources and dates",
            f"{source}scored on {metrics.get('data', 'the validation patients')}; dates: authors",
        ),
        "7": ("Data preparation and quality checks", checked),
        "8": (
            "Outcome: definition and assessment",
            f"labels {labels}; reference standard: authors" if labels else None,
        ),
        "9": ("Predictors", f"cell images of one smear{f', {features}' if features else ''}"),
        "10": ("Sample size", _counts(cohort, metrics)),
        "11": ("Missing data", "a missing clinical value has a learnt representation; no patient is dropped for it"),
    }


def _counts(cohort: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    if folds := metrics.get("folds"):
        parts = [f"{metrics['n']} patients, each in one of {max(fold['fold'] for fold in folds)} folds"]
    else:
        parts = [f"{count} patients to {part}" for part, count in cohort.get("patients", {}).items() if count]
    per_label = ", ".join(f"{count} {name}" for name, count in metrics["n_per_label"].items())
    return "; ".join([*parts, f"scored: {metrics['n']} ({per_label}); no formal calculation"])


def _methods(
    metrics: Mapping[str, Any], validation: Mapping[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, tuple]:
    model = f"{config.get('encoder')}, pooling {config.get('pooling')}, fusion {config.get('fusion')}"
    chosen = "epoch, calibration, threshold and prediction sets chosen on validation patients" if validation else None
    threshold = f"threshold {config.get('decision_threshold', 0.5):.3g}"
    if folds := metrics.get("folds"):
        number, repeats = (max(fold[name] for fold in folds) for name in ("fold", "repeat"))
        often = f", repeated {repeats} times" if repeats > 1 else ""
        inside = "epoch, calibration and threshold chosen on validation patients inside each fold"
        chosen = f"internal validation by {number}-fold cross-validation{often}; {inside}"
        threshold = "the threshold of each fold"
    balance = {"weights": "class weights in the loss", "sampling": "balanced sampling", "none": "none"}
    corrected = balance.get(settings.get("balance", ""))
    return {
        "12": ("Analytical methods", f"{model}; {chosen}" if chosen else model),
        "13": ("Class imbalance", corrected and f"{corrected}; {_calibration(config)}"),
        "15": ("Model output", f"probability of each label; {threshold}"),
    }


def _calibration(config: Mapping[str, Any]) -> str:
    scaling = config.get("calibration")
    return f"probabilities recalibrated by {scaling['method']} scaling" if scaling else "probabilities not recalibrated"


def _results(
    metrics: Mapping[str, Any], cohort: Mapping[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, tuple]:
    subgroups = metrics.get("subgroups")
    weights = "lymph-mil/" if settings.get("ensemble", True) else "repeat-*/fold-*/lymph-mil/"
    in_groups = "scores by age, sex and count, as far as recorded" if subgroups else None
    return {
        "14": ("Fairness", in_groups),
        "16": ("Differences between training and evaluation data", None),
        "20": (
            "Participants: flow and characteristics",
            f"flow: {_counts(cohort, metrics)}; characteristics: lymph cohort check",
        ),
        "21": ("Model development: participants and events in each analysis", _counts(cohort, metrics)),
        "22": (
            "Model specification",
            f"configuration and weights in {weights}, all settings below" if settings else None,
        ),
        "23": ("Model performance with intervals", f"below; {metrics.get('interval', '')}"),
        "24": ("Model updating", "none"),
        "26": ("Limitations", "the model card lists those of the method; of the study: authors"),
    }
