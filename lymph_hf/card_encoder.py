"""The card of a pretrained cell encoder."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .card import citation, count_parameters, encoder_source, environment, read_interval, require
from .card_patterns import ENCODER_CARD, filled_card
from .options_pretrain import PretrainOptions
from .options_publish import CardOptions
from .reporting import scores_table
from .runs import Run

TAGS = ("medical", "haematology", "blood-smear", "image-feature-extraction", "lymph-hf", "timm")
OBJECTIVES = {
    "mae": "a masked autoencoder ([He et al. 2022](https://arxiv.org/abs/2111.06377)): most patches of a cell are "
    "hidden, and a decoder predicts them; no label is used",
    "cell-type": "classification of cells by their type",
    "patient-label": "classification of single cells by the label of their patient",
}
# Where things lay on the machine that trained, and what changes nothing of the result.
_PRIVATE = {"data", "output", "split", "encoder_weights", "cache_dir", "tracker", "workers", "cpu", "resume", "preload"}


def encoder_card(
    run: Run,
    record: Mapping[str, Any],
    probe: Mapping[str, Any] | None,
    facts: CardOptions,
    *,
    repo: str,
    tag: str,
    whole: str | None,
) -> str:
    """Write the card of the encoder of a pretraining run.

    Args:
        run: finished.
        record: what the run learnt from, `pretraining.json`.
        probe: content of `probe.json` of `lymph probe`.
        facts: what the run cannot know.
        repo: where it will be published, organisation/name.
        tag: the version that the examples pin.
        whole: sub-folder with the model the encoder was trained in, `lymph-mae` or `classifier`.

    Raises:
        CardError: a fact is missing.
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
        "parameters": count_parameters(weights / "model.safetensors"),
        "record": record,
        "objective": OBJECTIVES[settings["objective"]],
        "start": encoder_source(settings) or ("random weights" if settings["encoder_weights"] is None else "others"),
        "whole": whole,
        "figure": "history.png" if (run.folder / "history.png").exists() else None,
        "scores": {name.replace("_", " "): f"{value:.4g}" for name, value in (record.get("scores") or {}).items()},
        "probe": None if probe is None else _probe(probe),
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


def _probe(report: Mapping[str, Any]) -> dict[str, Any]:
    scores = {
        f"{name} balanced accuracy": read_interval(values) for name, values in report["balanced_accuracy"].items()
    }
    seen = "has not seen" in report["how"]  # what stands there names a folder
    how = "cells that the pretraining had not seen, told apart by those it had" if seen else report["how"]
    types = sorted(report["recall"]["knn"])
    return {
        "table": scores_table(scores, markdown=True),
        "cells": report["cells"],
        "types": ", ".join(Path(name).name for name in types),
        "how": how,
    }
