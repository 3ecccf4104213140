"""The card of a published model: what a run knows, and what its publisher states about the data.

Every statement is a value of the run or a fact that was given; what is missing is asked for, never guessed.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .card_patterns import ADAPTER_CARD, BASE_CARD, MODEL_CARD, CardError, filled_card
from .metrics import Interval
from .metrics_decision import bayes
from .options_publish import CardOptions
from .reporting import scores_table
from .runs import Run

PREVALENCES = (0.1, 0.18, 0.5)  # 18 %: share of tumours among the lymphocytoses of one laboratory
TAGS = ("medical", "haematology", "blood-smear", "multiple-instance-learning", "lymphocytosis", "lymph-hf", "timm")
FIGURES = {"metrics": "evaluation.png", "validation": "validation.png"}
_EXAMPLE = {"age": 71, "sex": "F", "lymphocyte_count": 14.2}
_FEATURES = {"age": "age in years", "sex": "sex", "lymphocyte_count": "lymphocyte count in 10⁹/L"}
# Names under which the Hub knows the scores.
_HUB_METRICS = {
    "auroc": "roc_auc",
    "auprc": "average_precision",
    "sensitivity": "recall",
    "brier": "brier_score",
}
_PROCEDURE = (
    "folds",
    "repeats",
    "epochs",
    "batch_size",
    "max_cells",
    "augment",
    "balance",
    "learning_rate",
    "encoder_learning_rate",
    "freeze_encoder",
    "weight_decay",
    "dropout",
    "label_smoothing",
    "patience",
    "mixed_precision",
    "seed",
)
_LIMITATIONS = (
    "Another stain, analyser or compression can change its answers without a warning: score it on your own patients.",
    "It can learn what patients of a class share by accident, such as the number of images or the day of staining.",
    "Clinical values alone can separate many patients: compare with a model of the clinical values only.",
    "The weight of a cell says how the answer was computed, not why the patient is ill.",
)


def model_card(run: Run, facts: CardOptions, *, repo: str, tag: str) -> ModelCard:
    """Write the card of a run's model.

    Args:
        run: finished.
        facts: what the run cannot know.
        repo: where it will be published, organisation/name.
        tag: the version that the examples pin.

    Raises:
        CardError: a fact or a score is missing.
    """
    evaluations = _evaluations(run)
    _require(facts, evaluated="metrics" in evaluations)
    config = _configuration(run)
    content = _content(run, facts, config, evaluations) | {"repo": repo, "tag": tag, "name": repo.split("/")[-1]}
    content["metadata"] = _metadata(run, facts, config, evaluations, repo).to_yaml()
    pattern = MODEL_CARD if content["adapter"] is None else ADAPTER_CARD
    return ModelCard(filled_card("model", content, pattern, run.folder))


def base_card(run: Run, facts: CardOptions, *, adapter: str, tag: str) -> str:
    """The card of the frozen model that an adapter goes with.

    Args:
        run: that trained the adapter.
        facts: of the adapter; `base_model` is where the base will be published.
        adapter: where the adapter will be published.
        tag: the version.
    """
    settings = _read(run.settings)
    metadata = ModelCardData(
        license=facts.license, library_name="transformers", tags=list(TAGS), base_model=encoder_source(settings)
    )
    content = {
        "card": facts,
        "name": facts.base_model.split("/")[-1],
        "adapter": adapter,
        "tag": tag,
        "config": _read(run.model / "config.json"),
        "encoder_start": _encoder_start(settings),
        "parameters": count_parameters(run.model / "model.safetensors"),
        "metadata": metadata.to_yaml(),
    }
    return filled_card("base", content, BASE_CARD, run.folder)


def predictive_values(sensitivity: float, specificity: float, prevalence: float) -> tuple[float, float]:
    """Positive and negative predictive value by Bayes' rule; NaN where no patient would get that answer.

    >>> predictive_values(0.9, 0.8, 0.5)
    (0.8181818181818181, 0.888888888888889)
    """
    values = bayes(np.float64(sensitivity), np.float64(specificity), prevalence)
    return float(values["ppv"]), float(values["npv"])


def require(facts: CardOptions, needed: Sequence[str]) -> None:
    """Ask for facts that only the publisher knows.

    Raises:
        CardError: some are missing; the message names their options.
    """
    missing = [name for name in needed if not (getattr(facts, name) or "").strip()]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise CardError(f"The card needs {flags}: give them in words, on the command line or in a --config file.")


def _require(facts: CardOptions, *, evaluated: bool) -> None:
    require(facts, ["training_data", "reference_standard", "acquisition"] + ["evaluation_data"] * evaluated)
    shares = facts.prevalence or ()
    if not all(0 < share < 1 for share in shares):
        raise CardError(f"--prevalence {' '.join(map(str, shares))}: expected shares between 0 and 1, such as 0.18.")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _evaluations(run: Run) -> dict[str, dict[str, Any]]:
    """`metrics` (held-out patients) and `validation`, as far as they were written, in this order."""
    found = {stem: run.folder / f"{stem}.json" for stem in FIGURES}
    reports = {stem: _read(path) for stem, path in found.items() if path.exists()}
    if not reports:
        raise CardError(f"{run.folder} holds no scores: run lymph evaluate on labelled patients first.")
    for report in reports.values():
        report["intervals"] = {name: read_interval(values) for name, values in report["scores"].items()}
    return reports


def read_interval(stored: Mapping[str, float | None]) -> Interval:
    """An interval from JSON, which has no NaN."""
    return Interval(**{name: math.nan if value is None else value for name, value in stored.items()})


def _content(run: Run, facts: CardOptions, config: dict[str, Any], evaluations: dict[str, dict]) -> dict[str, Any]:
    """What the template shows, except names of the repository."""
    cohort, settings = _read(run.cohort), _read(run.settings)
    labels = _labels(config)
    main = next(iter(evaluations))  # the held-out patients where there are some
    exclusions = Counter(item["reason"].split(":")[0] for item in cohort["exclusions"])
    features = config.get("clinical_features") or []
    size = _read(run.model / "preprocessor_config.json")["size"]
    return {
        "card": facts,
        "config": config,
        "labels": labels,
        "features": [_FEATURES.get(name, name) for name in features],
        "example": json.dumps({name: _EXAMPLE[name] for name in features}),
        "image_size": f"{size['height']} x {size['width']}",
        "adapter": settings.get("adapter"),
        "parameters": count_parameters(*sorted(run.model.glob("*.safetensors"))),
        "encoder_start": _encoder_start(settings),
        "patients": {part: count for part, count in cohort["patients"].items() if count},
        "exclusions": dict(sorted(exclusions.items())),
        "exclusions_total": exclusions.total(),
        "evaluations": [_evaluation(run, stem, report, facts) for stem, report in evaluations.items()],
        "threshold": config["decision_threshold"] if len(labels) == 2 else None,
        "threshold_source": _threshold_source(settings, cohort, config),
        "predictive_values": _predictive_rows(evaluations[main], facts, labels),
        "predictive_source": _title(main).lower(),
        "calibration": f"{_scaling(config)} {_calibration(evaluations[main], main)}",
        "referral": _referral(config, evaluations[main]["intervals"]),
        "subgroups": _subgroups(evaluations[main], labels),
        "limitations": _limitations(evaluations, facts),
        "procedure": _procedure(settings, config),
        "environment": environment(facts),
        "citation": citation(facts),
    }


def _configuration(run: Run) -> dict[str, Any]:
    """The settings of the model; of an ensemble with what its members are made of."""
    config = _read(run.model / "config.json")
    if members := config.get("members"):
        config |= {n: ", ".join(sorted({member[n] for member in members})) for n in ("encoder", "pooling", "fusion")}
    return config


def _fitted_on(config: Mapping[str, Any]) -> str:
    return "out-of-fold predictions of all patients" if config.get("members") else "validation patients"


def _labels(config: Mapping[str, Any]) -> list[str]:
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return [names[str(i)] for i in range(len(names))]


def count_parameters(*paths: Path) -> int:
    """Numbers in files of safetensors."""
    total = 0
    for path in paths:
        with safe_open(path, framework="np") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def _encoder_start(settings: Mapping[str, Any]) -> str:
    if settings["encoder_weights"] is None:
        return "random weights" if settings.get("adapter") else "trained from random weights"
    return f"started from {encoder_source(settings) or 'weights of the publisher'}"


def encoder_source(settings: Mapping[str, Any]) -> str | None:
    """Hub id of the weights that the encoder started from, where the run tells it."""
    source = settings["encoder_weights"] or ""
    if source == "timm":
        return timm.get_pretrained_cfg(settings["encoder"]).hf_hub_id
    return source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else None


def _title(stem: str) -> str:
    return {"metrics": "Held-out patients", "validation": "Validation patients"}[stem]


def _evaluation(run: Run, stem: str, report: Mapping[str, Any], facts: CardOptions) -> dict[str, Any]:
    defined = {name: interval for name, interval in report["intervals"].items() if _is_number(interval)}
    return {
        "title": _title(stem),
        "data": facts.evaluation_data if stem == "metrics" else facts.training_data,
        "patients": report["patients"],
        "n": report["n"],
        "counts": ", ".join(f"{count} {name}" for name, count in report["n_per_label"].items()),
        "interval": report["interval"],
        "prevalence": report.get("prevalence"),
        "table": scores_table(defined, markdown=True).replace("undefined", "not estimable"),
        "figure": FIGURES[stem] if (run.folder / FIGURES[stem]).exists() else None,
    }


def _is_number(interval: Interval) -> bool:
    return not math.isnan(interval.value)


def _threshold_source(settings: Mapping[str, Any], cohort: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if settings["threshold"] is not None:
        return "was set by hand before training"
    if not (cohort["patients"].get("validation") or config.get("members")):
        return "the default, as there were no validation patients"
    return f"the one with the best balanced accuracy on the {_fitted_on(config)}"


def _predictive_rows(report: Mapping[str, Any], facts: CardOptions, labels: Sequence[str]) -> list[dict[str, str]]:
    found = [report["intervals"].get(name) for name in ("sensitivity", "specificity")]
    if len(labels) != 2 or not all(interval and _is_number(interval) for interval in found):
        return []
    sensitivity, specificity = (interval.value for interval in found)
    sample = report["n_per_label"][labels[1]] / report["n"]
    chosen = {*(facts.prevalence or PREVALENCES), report.get("prevalence")} - {None}
    shares = {f"{share:.0%}": share for share in sorted(chosen)}
    shares[f"{sample:.0%}, as in this sample"] = sample
    rows = []
    for name, share in shares.items():
        ppv, npv = predictive_values(sensitivity, specificity, share)
        rows.append({"share": name, "ppv": _decimal(ppv), "npv": _decimal(npv)})
    return rows


def _decimal(value: float) -> str:
    return "no such answer" if math.isnan(value) else f"{value:.3f}"


def _calibration(report: Mapping[str, Any], stem: str) -> str:
    names = {
        "brier": "Brier score",
        "ece": "expected calibration error",
        "calibration_slope": "calibration slope",
        "calibration_intercept": "calibration intercept",
    }
    found = {names[key]: value for key, value in report["intervals"].items() if key in names and _is_number(value)}
    scores = "; ".join(f"{name} {_with_bounds(interval)}" for name, interval in found.items())
    return (
        f"{_title(stem)}: {scores or 'not estimable'}. A probability of this model is not the risk of a patient "
        "elsewhere, where the disease is more or less common."
    )


def _scaling(config: Mapping[str, Any]) -> str:
    names = {"platt": "Platt scaling", "temperature": "temperature scaling"}
    if config.get("calibration") is None:
        return "The probabilities are the network's own, not scaled."
    method = names[config["calibration"]["method"]]
    return f"The probabilities went through {method}, fitted on the {_fitted_on(config)}."


def _referral(config: Mapping[str, Any], intervals: Mapping[str, Interval]) -> str:
    """What the prediction sets promise, and what they did on the scored patients."""
    conformal = config.get("conformal")
    if conformal is None:
        return "No prediction sets were fitted: the model answers for every patient, however unsure it is."
    names = {"coverage": "sets that held the label", "referred": "referred", "accuracy_decided": "right when decided"}
    found = {text: intervals.get(name) for name, text in names.items()}
    seen = "; ".join(f"{text} {_with_bounds(value)}" for text, value in found.items() if value and _is_number(value))
    return (
        f"Conformal prediction sets with a coverage of {conformal['coverage']:.0%} per label: a patient whose set "
        f"holds one label gets that answer, any other is to be referred to flow cytometry. Scored: {seen or 'nobody'}."
    )


def _with_bounds(interval: Interval) -> str:
    return str(interval).replace("undefined", "interval not estimable")


def _subgroups(report: Mapping[str, Any], labels: Sequence[str]) -> str:
    groups = report.get("subgroups")
    if not groups:
        return "Scores by age, sex and lymphocyte count were not computed: nothing is known about unequal performance."
    columns = ("auroc", "sensitivity", "specificity")
    lines = [f"| variable | group | patients | {labels[-1]} | {' | '.join(columns)} |", "|---" * 7 + "|"]
    for group in groups:
        scores = {name: read_interval(values) for name, values in group["scores"].items()}
        cells = [_with_bounds(scores[name]) if _is_number(scores[name]) else "not estimable" for name in columns]
        start = [group["variable"], group["group"], str(group["n"]), str(group["positives"])]
        lines.append(f"| {' | '.join([*start, *cells])} |")
    return "\n".join(lines)


def _limitations(evaluations: Mapping[str, Mapping[str, Any]], facts: CardOptions) -> list[str]:
    found = []
    if facts.synthetic:
        found.append("Its images are painted and its patients invented: no score here says anything of real patients.")
    if "metrics" not in evaluations:
        found.append(
            "No patient outside training and validation was scored. The validation patients chose epoch and "
            "threshold, so their scores are optimistic."
        )
    report = next(iter(evaluations.values()))
    name, count = min(report["n_per_label"].items(), key=lambda item: item[1])
    found.append(
        f"The scores rest on {report['n']} patients, {count} of them {name}: "
        f"one {name} patient more or less called right moves the share of right calls among them by "
        f"{100 / max(count, 1):.0f} percentage points."
    )
    return [*found, *_LIMITATIONS, *(facts.limitations or ())]


def _procedure(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    chosen = {name: settings[name] for name in _PROCEDURE if settings.get(name) is not None}
    plain = {name.replace("_", " "): _plain(value) for name, value in chosen.items()}
    return plain | {"transformers": config["transformers_version"]}


def _plain(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def environment(facts: CardOptions) -> str:
    """What is known of the energy of a training, in words."""
    if facts.hours is None or facts.watts is None:
        return (
            "The energy of this training was not metered. An estimate is hours of training times mean power: "
            "0.1 kWh is one hour at 100 W."
        )
    energy = facts.hours * facts.watts / 1000
    where = f" on {facts.hardware}" if facts.hardware else ""
    text = f"Trained in {facts.hours:g} hours{where} at about {facts.watts:g} W: {energy:.3g} kWh."
    if facts.carbon_intensity is not None:
        text += f" At {facts.carbon_intensity:g} g CO2 equivalent per kWh, {energy * facts.carbon_intensity:.3g} g."
    return text


def citation(facts: CardOptions) -> str:
    """BibTeX of the package."""
    return (
        "@software{lymph_hf,\n"
        "  title  = {lymph-hf: patient-level blood-cell diagnosis on Hugging Face},\n"
        f"  author = {{{facts.authors}}},\n"
        f"  year   = {{{facts.year}}},\n"
        "  url    = {https://github.com/lymph-hf/lymph-hf}\n"
        "}"
    )


def _metadata(
    run: Run, facts: CardOptions, config: Mapping[str, Any], evaluations: Mapping[str, Mapping], repo: str
) -> ModelCardData:
    optional = {
        "base_model": facts.base_model or encoder_source(_read(run.settings)),
        "datasets": facts.datasets,
        "co2_eq_emissions": _emissions(facts),
    }
    return ModelCardData(
        language="en",
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=_tags(run, facts),
        metrics=sorted({_HUB_METRICS.get(name, name) for name in next(iter(evaluations.values()))["scores"]}),
        model_name=repo.split("/")[-1],
        eval_results=[result for stem, report in evaluations.items() for result in _results(stem, report, facts)],
        **{name: value for name, value in optional.items() if value},
    )


def _tags(run: Run, facts: CardOptions) -> list[str]:
    own = {"synthetic": facts.synthetic, "peft": _read(run.settings).get("adapter")}
    return [*TAGS, *(tag for tag, holds in own.items() if holds)]


def _emissions(facts: CardOptions) -> dict[str, Any] | None:
    if None in (facts.hours, facts.watts, facts.carbon_intensity):
        return None
    grams = facts.hours * facts.watts / 1000 * facts.carbon_intensity
    return {"emissions": grams, "source": "hours x mean power x carbon intensity", "training_type": "fine-tuning"}


def _results(stem: str, report: Mapping[str, Any], facts: CardOptions) -> list[EvalResult]:
    cohort = "synthetic-cohort" if facts.synthetic else "private-cohort"
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Classification of patients",
            dataset_type=(facts.datasets or [cohort])[0],
            dataset_name=f"{_title(stem)} described in the card",
            dataset_split={"metrics": "test", "validation": "validation"}[stem],
            metric_type=_HUB_METRICS.get(score, score),
            metric_name=f"{score} ({interval.level:.0%} interval {interval.low:.3f} to {interval.high:.3f})",
            metric_value=round(interval.value, 4),
            metric_args={"n": report["n"], "low": round(interval.low, 4), "high": round(interval.high, 4)},
        )
        for score, interval in report["intervals"].items()
        if _is_number(interval) and not math.isnan(interval.low)
    ]
