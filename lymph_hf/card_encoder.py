"""The card of a pretrained cell encoder."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .card import citation, count_parameters, environment, require, storage
from .card_evaluation import evaluations, hub_result, read_interval, with_bounds
from .card_lineage import OBJECTIVES, encoder_source
from .card_patterns import ENCODER_CARD, CardError, filled_card
from .options_pretrain import PretrainOptions
from .options_publish import CardOptions, Dtype
from .runs import Run

TAGS = ("medical", "haematology", "blood-smear", "image-feature-extraction", "lymph-hf", "timm")
# Where things lay on the machine that trained, and what changes nothing of the result.
_PRIVATE = {"data", "output", "split", "encoder_weights", "cache_dir", "tracker", "workers", "cpu", "resume", "preload"}


def encoder_card(
    run: Run,
    record: Mapping[str, Any],
    probes: Sequence[Mapping[str, Any]],
    facts: CardOptions,
    *,
    repo: str,
    tag: str,
    whole: str | None,
    dtype: Dtype = "float32",
) -> str:
    """Write the card of the encoder of a pretraining run.

    Args:
        run: finished.
        record: what the run learnt from, `pretraining.json`.
        probes: contents of `probe.json` of `lymph probe`: of this encoder first, then of other weights on the same
            cells.
        facts: what the run cannot know.
        repo: where it will be published, organisation/name.
        tag: the version that the examples pin.
        whole: sub-folder with the model the encoder was trained in, `lymph-mae` or `classifier`.
        dtype: in which weight matrices are stored.

    Raises:
        CardError: a fact is missing, or results that cannot be compared.
    """
    require(facts, ["training_data", "acquisition"])
    settings = json.loads(run.settings.read_text(encoding="utf-8"))
    weights = run.folder / "encoder"
    config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    metadata = ModelCardData(
        license=facts.license,
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=[*TAGS, *(["synthetic"] if facts.synthetic else [])],
        base_model=facts.base_model or encoder_source(settings),
        datasets=facts.datasets,
        model_name=repo.split("/")[-1],
        eval_results=_results(probes, facts) or None,
    )
    content = {
        "metadata": metadata.to_yaml(),
        "card": facts,
        "repo": repo,
        "tag": tag,
        "name": repo.split("/")[-1],
        "architecture": config["architecture"],
        "width": config["num_features"],
        "size": " x ".join(map(str, config["pretrained_cfg"]["input_size"][1:])),
        "storage": storage(dtype),
        "parameters": count_parameters(weights / "model.safetensors"),
        "record": record,
        "objective": OBJECTIVES[settings["objective"]],
        "start": encoder_source(settings) or ("random weights" if settings["encoder_weights"] is None else "others"),
        "whole": whole,
        "figure": "history.png" if (run.folder / "history.png").exists() else None,
        "scores": {name.replace("_", " "): f"{value:.4g}" for name, value in (record.get("scores") or {}).items()},
        "probe": _probe(probes) if probes else None,
        "downstream": [_downstream(item) for item in facts.downstream or ()],
        "command": training_command(settings),
        "environment": environment(facts),
        "citation": citation(facts),
    }
    return filled_card("encoder", content, ENCODER_CARD, run.folder)


def training_command(settings: Mapping[str, Any]) -> str:
    """The command of a pretraining with every option that differs from its default; places are left blank.

    >>> training_command({"epochs": 30, "seed": 0})
    'lymph pretrain --data CELLS --output RUN --epochs 30'
    """
    words = ["lymph", "pretrain", "--data", "CELLS", "--output", "RUN"]
    for field in fields(PretrainOptions):
        value = settings.get(field.name)
        if field.name in _PRIVATE or field.default is MISSING or value in (None, field.default):
            continue
        words += [f"--{field.name.replace('_', '-')}", str(value)]
    if settings.get("split") not in (None, "none"):
        words += ["--split", "SPLIT"]
    if (weights := settings.get("encoder_weights")) is not None:
        words += ["--encoder-weights", weights if _is_public(weights) else "WEIGHTS"]
    return shlex.join(words)


def _is_public(weights: str) -> bool:
    return weights == "timm" or weights.startswith("hf-hub:")


def _results(probes: Sequence[Mapping[str, Any]], facts: CardOptions) -> list[EvalResult]:
    """The scores of this encoder as the Hub reads them."""
    place = {
        "task_type": "image-classification",
        "task_name": "Probe of frozen embeddings for the type of a cell",
        "dataset_type": (facts.datasets or ["cells"])[0],
        "dataset_name": "Labelled cells described in the card",
    }
    scores = {name: read_interval(v) for probe in probes[:1] for name, v in probe["balanced_accuracy"].items()}
    return [
        hub_result("balanced_accuracy", interval, probes[0]["cells"], place | {"dataset_config": f"{name} probe"})
        for name, interval in scores.items()
    ]


def _probe(probes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the template shows of the probes of these and of other weights."""
    first = probes[0]
    asked = ("data", "cells", "how")
    for probe in probes[1:]:
        if differ := [name for name in asked if probe[name] != first[name]]:
            raise CardError(
                f"--probe: the results differ in {', '.join(differ)}, so they cannot stand beside each other. Probe "
                "all weights on the same --data with the same --held-out."
            )
    names = ["these weights", *(_weights_name(probe) for probe in probes[1:])]
    scores = [probe["balanced_accuracy"] for probe in probes]
    seen = "has not seen" in first["how"]  # what stands there names a folder
    return {
        "kinds": list(scores[0]),
        "rows": {
            name: [with_bounds(read_interval(row[kind])) for kind in scores[0]]
            for name, row in zip(names, scores, strict=True)
        },
        "cells": first["cells"],
        "types": ", ".join(Path(name).name for name in sorted(first["recall"]["knn"])),
        "how": "cells that the pretraining had not seen, told apart by those it had" if seen else first["how"],
    }


def _weights_name(probe: Mapping[str, Any]) -> str:
    source = probe["encoder_weights"]
    if source is None:
        return "random weights"
    return encoder_source(probe) or "the publisher's other weights"


def _downstream(item: str) -> dict[str, Any]:
    """One line of `--downstream`: name and AUROC of a patient model."""
    name, equals, place = item.partition("=")
    found = evaluations(Run(Path(place))) if equals else []
    if not found:
        raise CardError(f"--downstream {item}: expected NAME=RUN, a run with scores (lymph evaluate, lymph crossval).")
    best = found[0]
    return {
        "name": name,
        "n": best.report["n"],
        "patients": best.kind.title.lower(),
        "auroc": with_bounds(best.intervals["auroc"]),
    }
