"""The card of a published model: what a run knows, and what its publisher states about the data.

Every statement is a value of the run or a fact that was given; what is missing is asked for, never guessed.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from .card_evaluation import HELD_OUT, HUB_METRICS, OUT_OF_FOLD, Evaluation, required_evaluations
from .card_lineage import encoder_lineage, encoder_source, encoder_start, has_own_weights
from .card_patterns import ADAPTER_CARD, BASE_CARD, MODEL_CARD, CardError, filled_card
from .options_publish import CardOptions, Dtype
from .runs import Run

TAGS = ("medical", "haematology", "blood-smear", "multiple-instance-learning", "lymphocytosis", "lymph-hf", "timm")
_EXAMPLE = {"age": 71, "sex": "F", "lymphocyte_count": 14.2}
_FEATURES = {"age": "age in years", "sex": "sex", "lymphocyte_count": "lymphocyte count in 10⁹/L"}
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
# How the names of the package's own PEFT methods begin.
OWN_METHODS = "LYMPH_"
_LIMITATIONS = (
    "Another stain, analyser or compression can change its answers without a warning: score it on your own patients.",
    "It can learn what patients of a class share by accident, such as the number of images or the day of staining.",
    "Clinical values alone can separate many patients: compare with a model of the clinical values only.",
    "The weight of a cell says how the answer was computed, not why the patient is ill.",
)


def model_card(run: Run, facts: CardOptions, *, repo: str, tag: str, dtype: Dtype = "float32") -> ModelCard:
    """Write the card of a run's model.

    Args:
        run: finished.
        facts: what the run cannot know.
        repo: where it will be published, organisation/name.
        tag: the version that the examples pin.
        dtype: in which its weight matrices are stored.

    Raises:
        CardError: a fact or a score is missing.
    """
    evaluations, settings = required_evaluations(run), _read(run.settings)
    _require(facts, settings, evaluated=any(evaluation.kind is HELD_OUT for evaluation in evaluations))
    config = _configuration(run)
    content = _content(run, facts, config, evaluations) | {"repo": repo, "tag": tag, "name": repo.split("/")[-1]}
    content["storage"] = storage(dtype)
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
        "encoder_start": encoder_start(settings),
        "parameters": count_parameters(run.model / "model.safetensors"),
        "metadata": metadata.to_yaml(),
    }
    return filled_card("base", content, BASE_CARD, run.folder)


def require(facts: CardOptions, needed: Sequence[str]) -> None:
    """Ask for facts that only the publisher knows.

    Raises:
        CardError: some are missing; the message names their options.
    """
    missing = [name for name in needed if not (getattr(facts, name) or "").strip()]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise CardError(f"The card needs {flags}: give them in words, on the command line or in a --config file.")


def _require(facts: CardOptions, settings: Mapping[str, Any], *, evaluated: bool) -> None:
    needed = ["training_data", "reference_standard", "acquisition"] + ["evaluation_data"] * evaluated
    require(facts, needed + ["encoder_data"] * has_own_weights(settings))
    shares = facts.prevalence or ()
    if not all(0 < share < 1 for share in shares):
        raise CardError(f"--prevalence {' '.join(map(str, shares))}: expected shares between 0 and 1, such as 0.18.")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _content(run: Run, facts: CardOptions, config: dict[str, Any], evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """What the template shows, except names of the repository."""
    cohort, settings = _read(run.cohort), _read(run.settings)
    labels = _labels(config)
    main = evaluations[0]  # patients whom the run did not know, where there are some
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
        "adapter": settings.get("adapter") if (run.model / "adapter_config.json").exists() else None,
        "package_adapter": _is_package_adapter(run),
        "members": _members(config, settings),
        "parameters": count_parameters(*sorted(run.model.glob("*.safetensors"))),
        "encoder_start": encoder_start(settings),
        "encoder_lineage": encoder_lineage(run, settings, facts),
        "patients": {part: count for part, count in cohort["patients"].items() if count},
        "exclusions": dict(sorted(exclusions.items())),
        "exclusions_total": exclusions.total(),
        "evaluations": [evaluation.content(facts) for evaluation in evaluations],
        "threshold": config["decision_threshold"] if len(labels) == 2 else None,
        "threshold_source": _threshold_source(settings, cohort, config),
        "predictive_values": main.predictive_rows(facts, labels),
        "predictive_source": main.kind.title.lower(),
        "calibration": f"{_scaling(config)} {main.calibration()}",
        "referral": _referral(config, main),
        "subgroups": main.subgroups(labels),
        "limitations": _limitations(evaluations, facts),
        "procedure": _procedure(settings, config),
        "environment": environment(facts),
        "citation": citation(facts),
    }


def storage(dtype: Dtype) -> str:
    """In which precision weights are stored and computed, in words."""
    if dtype == "float32":
        return dtype
    return f"{dtype} (norms and biases in float32), computed in float32 unless another `dtype` is asked for"


def _is_package_adapter(run: Run) -> bool:
    """Whether the run's adapter is of a method that PEFT alone does not know."""
    path = run.model / "adapter_config.json"
    return path.exists() and _read(path)["peft_type"].startswith(OWN_METHODS)


def _members(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """What an ensemble is made of, in words."""
    if not (members := config.get("members")):
        return None
    encoder = "with one encoder in common" if config["shared_encoder"] else "each with an encoder of its own"
    merged = f", its adapter (`{settings['adapter']}`) merged into it" if settings.get("adapter") else ""
    repeats = f" in {settings['repeats']} repeats" if settings["repeats"] > 1 else ""
    of_folds = f"{len(members)}: those of {settings['folds']} folds{repeats}"
    return f"{of_folds}, {encoder}{merged}; their probabilities are averaged"


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


def _threshold_source(settings: Mapping[str, Any], cohort: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if settings["threshold"] is not None:
        return "was set by hand before training"
    if config.get("members"):
        return (
            f"chosen for the balanced accuracy of the {_fitted_on(config)} (scored above are the decisions of "
            "the folds, each at the threshold of its own validation patients)"
        )
    if not cohort["patients"].get("validation"):
        return "the default, as there were no validation patients"
    return f"chosen for the balanced accuracy of the {_fitted_on(config)}"


def _scaling(config: Mapping[str, Any]) -> str:
    names = {"platt": "Platt scaling", "temperature": "temperature scaling"}
    if config.get("calibration") is None:
        return "The probabilities are the network's own, not scaled."
    method = names[config["calibration"]["method"]]
    return f"The probabilities went through {method}, fitted on the {_fitted_on(config)}."


def _referral(config: Mapping[str, Any], main: Evaluation) -> str:
    """What the prediction sets promise, and what they did on the scored patients."""
    conformal = config.get("conformal")
    if conformal is None:
        return "No prediction sets were fitted: the model answers for every patient, however unsure it is."
    return (
        f"Conformal prediction sets with a coverage of {conformal['coverage']:.0%} per label, fitted on the "
        f"{_fitted_on(config)}: a patient whose set holds one label gets that answer, any other is to be referred to "
        f"the reference test. {main.referral()}"
    )


def _limitations(evaluations: Sequence[Evaluation], facts: CardOptions) -> list[str]:
    main, found = evaluations[0], []
    if facts.synthetic:
        found.append("Its images are painted and its patients invented: no score here says anything of real patients.")
    if main.kind is OUT_OF_FOLD:
        found.append(
            "The published model was scored on no patient at all: all of them trained some of its members. The "
            "out-of-fold scores are those of single members, and its threshold, calibration and prediction sets were "
            "fitted on the same predictions."
        )
    elif main.kind is not HELD_OUT:
        found.append(
            "No patient outside training and validation was scored. The validation patients chose epoch and "
            "threshold, so their scores are optimistic."
        )
    return [*found, main.smallest_class(), *_LIMITATIONS, *(facts.limitations or ())]


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
    run: Run, facts: CardOptions, config: Mapping[str, Any], evaluations: Sequence[Evaluation], repo: str
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
        tags=_tags(run, facts, config),
        metrics=sorted({HUB_METRICS.get(name, name) for name in evaluations[0].intervals}),
        model_name=repo.split("/")[-1],
        eval_results=[result for evaluation in evaluations for result in evaluation.results(facts)],
        **{name: value for name, value in optional.items() if value},
    )


def _tags(run: Run, facts: CardOptions, config: Mapping[str, Any]) -> list[str]:
    adapter = (run.model / "adapter_config.json").exists()
    own = {"synthetic": facts.synthetic, "peft": adapter, "ensemble": config.get("members")}
    return [*TAGS, *(tag for tag, holds in own.items() if holds)]


def _emissions(facts: CardOptions) -> dict[str, Any] | None:
    if None in (facts.hours, facts.watts, facts.carbon_intensity):
        return None
    grams = facts.hours * facts.watts / 1000 * facts.carbon_intensity
    return {"emissions": grams, "source": "hours x mean power x carbon intensity", "training_type": "fine-tuning"}
